"""Denoising Diffusion Probabilistic Models in one file, in the order of the paper.

    python ddpm.py train --data ./images   # a folder of pictures, or shapes, mnist, cifar10, ...
    python ddpm.py sample                  # new pictures from the newest run
    python ddpm.py eval                    # its bits/dim on pictures that it has not seen
    python ddpm.py show progressive        # a figure: forward, progressive or interpolate

The paper is Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020
(arXiv 2006.11239). "The released code" is the authors' TensorFlow repository,
hojonathanho/diffusion, which settles what the paper leaves open. The idea:

  * Destroy a picture x_0 by adding a little Gaussian noise T times, until only noise is left
    (Eq. 2). x_t can be drawn from x_0 in one jump, for any t (Eq. 4).
  * Train a network to predict, from x_t and t, which noise was added (Eq. 14, Algorithm 1).
  * Start from pure noise and remove the predicted noise in small steps (Algorithm 2).

Sections 1 and 2 are the paper; 3 to 5 are what it takes to train one. Shapes are (B, C, H, W):
batch, channels, height, width. A picture x_0 is float32 in [-1, 1], and uint8 near its file.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from torchvision import datasets, models, utils
from torchvision.transforms.functional import pil_to_tensor, to_pil_image


class UserError(ValueError):
    """A mistake that the user can fix. It is printed as one line; the exit status is 2."""


def setting(default, help, low=0, high=10**9, choices=None):
    """A field of Config: its line of `--help`, and the values that it can take."""
    about = {"help": f"{help} [{default}]", "range": (low, high), "choices": choices}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run; the defaults are the paper's for CIFAR-10. Raises UserError."""

    # the network, and what its weights are learned for
    image_size: int = setting(32, "height and width of the pictures in pixels", 1)
    channels: int = setting(3, "3 for colour, 1 for grey", choices=(1, 3))
    base_channels: int = setting(128, "channels at full resolution, a multiple of 16", 16)
    channel_mults: tuple = setting((1, 2, 2, 2), "channels of each level, as multiples", 1)
    num_res_blocks: int = setting(2, "residual blocks a level going down, one more going up", 1)
    attention_resolutions: tuple = setting((16,), "feature map sizes with self-attention", 1)
    group_size: int = setting(4, "fewest channels of a GroupNorm group; at most 32 groups", 2, 16)
    timesteps: int = setting(1000, "T, the number of noising steps", 2)
    # training and sampling
    dropout: float = setting(0.1, "dropout inside the residual blocks", 0, 1)
    variance: str = setting("fixedlarge", "reverse variance", choices=("fixedlarge", "fixedsmall"))
    steps: int = setting(800_000, "optimiser steps in all", 1)
    batch_size: int = setting(128, "pictures in an optimiser step", 1)
    accumulate: int = setting(1, "passes that a batch is split into, to save memory", 1)
    lr: float = setting(2e-4, "peak learning rate of Adam")
    adam_beta_2: float = setting(0.999, "Adam's decay of squared gradients", 0, 0.9999)
    warmup: int = setting(5000, "steps of linear learning-rate warm-up")
    lr_decay: float = setting(0.0, "last part of the run, in which the rate falls to 0", 0, 1)
    grad_clip: float = setting(1.0, "largest global norm of the gradient, 0 for any")
    ema_decay: float = setting(0.9999, "decay of the EMA of the weights", 0, 1)
    flip: bool = setting(True, "mirror half of the pictures, left to right")
    seed: int = setting(0, "seed of every random draw", 0, 2**63 - 1)
    amp: str = setting("auto", "mixed precision", choices=("auto", "off", "bf16"))
    compile: bool = setting(False, "torch.compile: a slow start, then faster; for CUDA")
    data: str = setting("", "a folder of pictures, or shapes, mnist, cifar10, cifar10/ship, ...")
    cache_gb: float = setting(4.0, "larger data sets stay in the memory of the CPU")
    log_every: int = setting(100, "steps between rows of log.csv", 1)
    save_every: int = setting(5000, "steps between checkpoints, each with a grid of samples", 1)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low, high = field.metadata["range"]
            choices = field.metadata["choices"]
            numbers = value if field.type is tuple else [value]
            if choices and value not in choices:
                raise UserError(f"{flag_of(field.name)} {value} must be one of {choices}")
            if field.type is not str and not all(low <= number <= high for number in numbers):
                raise UserError(f"{flag_of(field.name)} {value} must be from {low} to {high:.15g}")
        if self.batch_size % self.accumulate:
            raise UserError(f"--batch-size {self.batch_size} must be a multiple of --accumulate")
        if self.base_channels % 16:
            raise UserError(f"--base-channels {self.base_channels} must be a multiple of 16")
        if not self.channel_mults:
            raise UserError("--channel-mults needs at least one number")
        halvings = len(self.channel_mults) - 1
        if self.image_size % 2**halvings:
            problem = f"--image-size {self.image_size} can't be halved {halvings} times"
            while self.image_size % 2**halvings:
                halvings -= 1
            shorter = " ".join(map(str, self.channel_mults[: halvings + 1]))
            raise UserError(f"{problem}: use another, such as 32, or --channel-mults {shorter}")
        for size in self.attention_resolutions:
            if size not in self.sizes():
                raise UserError(f"--attention-resolutions {size} must be among {self.sizes()}")

    def sizes(self):
        """Height, or width, of each level's feature maps."""
        return [self.image_size // 2**i for i in range(len(self.channel_mults))]

    def shape(self, n):
        """The shape of n pictures: (n, C, H, W)."""
        return n, self.channels, self.image_size, self.image_size


def flag_of(name):
    """The command-line flag of a field of Config."""
    return "--" + name.replace("_", "-")


PRESETS = {
    "cifar10": Config(),
    "celebahq256": Config(
        image_size=256,
        channel_mults=(1, 1, 2, 2, 4, 4),
        dropout=0.0,
        variance="fixedsmall",
        steps=500_000,
        batch_size=64,
        lr=2e-5,
    ),
    "tiny": Config(  # minutes on two CPU cores: few channels where the maps are large
        base_channels=16,
        channel_mults=(1, 2, 4, 8),
        num_res_blocks=1,
        attention_resolutions=(),
        group_size=16,  # smaller groups would erase how bright a picture is
        dropout=0.0,
        steps=1600,
        batch_size=96,
        lr=3.5e-3,  # twice that can diverge
        adam_beta_2=0.99,
        warmup=200,
        lr_decay=0.8,
        ema_decay=0.995,
        save_every=400,
    ),
}


# 1. The diffusion process
# q destroys a picture x_0 in T steps; p_theta, which has the network, undoes them one by one. t
# counts as in the paper, 1..T; x_0 is the picture. As released, the network is fed t - 1.


def linear_beta_schedule(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    """Return the forward variances beta_1, ..., beta_T, linear in t (Sec. 4): (T,) float64."""
    betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
    betas = 1000 / timesteps * betas  # so that x_T is as noisy as the paper's, whatever T is
    return betas.clamp(max=0.999)  # with T < 21 they would exceed 1


class Diffusion(nn.Module):
    """Two Markov chains: q adds noise; p_theta removes it, with a network model(x_t, t - 1) -> eps.

    Tables have T + 1 entries: table[t] is the paper's, alpha_bars[0] = 1, other entries 0 are not
    used. The reverse variance (Sec. 3.2) is beta_t if "fixedlarge", beta~_t if "fixedsmall".
    """

    def __init__(self, timesteps=1000, variance="fixedlarge"):
        super().__init__()
        self.timesteps = timesteps
        betas = F.pad(linear_beta_schedule(timesteps), (1, 0))
        alphas = 1 - betas
        alpha_bars = alphas.cumprod(0)
        alpha_bars_prev = F.pad(alpha_bars[:-1], (1, 0), value=1.0)  # alpha_bar_{t-1}
        posterior_variance = betas * (1 - alpha_bars_prev) / (1 - alpha_bars)  # beta~_t, Eq. 7
        sigma = {"fixedlarge": betas, "fixedsmall": posterior_variance}[variance].sqrt()
        # Only the likelihood uses sigma_1, as sampling adds no noise in its last step. beta~_1 = 0
        # would make L_0 infinite; the released code takes beta~_2, whatever the variance.
        sigma[1] = posterior_variance[2].sqrt()

        posterior_mean_x_0 = alpha_bars_prev.sqrt() * betas / (1 - alpha_bars)
        posterior_mean_x_t = alphas.sqrt() * (1 - alpha_bars_prev) / (1 - alpha_bars)
        self.register_buffer("betas", betas.float())
        self.register_buffer("alpha_bars", alpha_bars.float())
        self.register_buffer("sqrt_alpha_bars", alpha_bars.sqrt().float())
        self.register_buffer("sqrt_one_minus_alpha_bars", (1 - alpha_bars).sqrt().float())
        self.register_buffer("posterior_mean_x_0", posterior_mean_x_0.float())
        self.register_buffer("posterior_mean_x_t", posterior_mean_x_t.float())
        self.register_buffer("posterior_sigma", posterior_variance.sqrt().float())
        self.register_buffer("sigma", sigma.float())

    def q_sample(self, x_0, t, eps):
        """Draw x_t ~ q(x_t | x_0) (Eq. 4). x_0 and noise eps: (B, C, H, W); t: (B,) or an int."""
        if torch.is_tensor(t):
            t = t.view(-1, 1, 1, 1)  # table[t] then broadcasts over (B, C, H, W)
        return self.sqrt_alpha_bars[t] * x_0 + self.sqrt_one_minus_alpha_bars[t] * eps

    def loss(self, model, x_0):
        """Return L_simple (Eq. 14) of pictures x_0: (B, C, H, W), by Algorithm 1, lines 3 to 5."""
        t = torch.randint(1, self.timesteps + 1, (len(x_0),), device=x_0.device)  # 3: t ~ Uniform
        eps = torch.randn_like(x_0)  # line 4: eps ~ N(0, I)
        x_t = self.q_sample(x_0, t, eps)
        return F.mse_loss(model(x_t, t - 1), eps)  # line 5: || eps - eps_theta(x_t, t) ||^2

    def q_posterior(self, x_0, x_t, t):
        """Return mean and standard deviation of q(x_{t-1} | x_t, x_0) (Eqs. 6, 7); t is an int."""
        mean = self.posterior_mean_x_0[t] * x_0 + self.posterior_mean_x_t[t] * x_t
        return mean, self.posterior_sigma[t]

    def p_mean_variance(self, model, x_t, t):
        """Return mean and sigma of p_theta(x_{t-1} | x_t), and the predicted x_0; t is an int.

        Without the clipping, which is as released, the mean would be that of Eq. 11:
        (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t).
        """
        eps = model(x_t, torch.full((len(x_t),), t - 1, device=x_t.device))
        x_0 = (x_t - self.sqrt_one_minus_alpha_bars[t] * eps) / self.sqrt_alpha_bars[t]  # Eq. 4
        x_0 = x_0.clamp(-1, 1)
        mean, _ = self.q_posterior(x_0, x_t, t)
        return mean, self.sigma[t], x_0

    @torch.no_grad()
    def sample(self, model, x_t, start=None, randn_like=torch.randn_like):
        """Run Algorithm 2 from line 1, noise x_T ~ N(0, I): (B, C, H, W), or from x_t at t = start.

        Yields (t, x_{t-1}, predicted x_0) for t = T, ..., 1; the last x_{t-1} is the picture.
        """
        start = self.timesteps if start is None else start
        for t in range(start, 0, -1):  # line 2: for t = T, ..., 1
            mean, sigma, x_0 = self.p_mean_variance(model, x_t, t)
            z = randn_like(x_t) if t > 1 else 0  # line 3: z ~ N(0, I) if t > 1, else z = 0
            x_t = mean + sigma * z  # line 4
            yield t, x_t, x_0

    @torch.no_grad()
    def sample_ddim(self, model, x_t, steps, eta=0.0, randn_like=torch.randn_like):
        """Run DDIM (Song et al. 2020) from x_T in `steps` of the T steps; yield as `sample` does.

        eta = 0 adds no noise; eta = 1 in all T steps is Algorithm 2 with variance beta~_t.
        """
        if not (1 <= steps <= self.timesteps and 0 <= eta <= 1):
            raise UserError(f"can't take {steps} of {self.timesteps} steps with eta {eta}")
        times = 1 + np.linspace(self.timesteps - 1, 0, steps).round().astype(int)
        # float64, as 1 - alpha_bar has few digits in float32; on the CPU, as MPS has no float64
        alpha_bars = (1 - self.betas.cpu().double()).cumprod(0).tolist()
        for t, s in itertools.pairwise([*times.tolist(), 0]):  # from x_t to x_s
            alpha_bar_t, alpha_bar_s = alpha_bars[t], alpha_bars[s]
            _, _, x_0 = self.p_mean_variance(model, x_t, t)
            eps = (x_t - math.sqrt(alpha_bar_t) * x_0) / math.sqrt(1 - alpha_bar_t)
            variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
            sigma = eta * math.sqrt(variance)  # Eq. 16 there
            direction = math.sqrt(max(0, 1 - alpha_bar_s - sigma**2))  # rounding can pass 0
            x_t = math.sqrt(alpha_bar_s) * x_0 + direction * eps + sigma * randn_like(x_t)  # Eq. 12
            yield t, x_t, x_0

    @torch.no_grad()
    def bits_per_dim(self, model, x_0, randn_like=torch.randn_like):
        """Yield L_0, ..., L_T of Eq. 5, each (B,): their sum bounds -log2 p(x_0) per dimension."""
        for t in range(1, self.timesteps + 1):
            x_t = self.q_sample(x_0, t, randn_like(x_0))
            mean, sigma, _ = self.p_mean_variance(model, x_t, t)
            if t == 1:
                nats = -discretised_log_likelihood(x_0, mean, sigma)  # L_0
            else:
                nats = kl(*self.q_posterior(x_0, x_t, t), mean, sigma)  # L_{t-1}
            yield nats.mean((1, 2, 3)) / math.log(2)
        nats = kl(self.sqrt_alpha_bars[-1] * x_0, self.sqrt_one_minus_alpha_bars[-1], 0, 1)  # L_T
        yield nats.mean((1, 2, 3)) / math.log(2)


def kl(mean_1, sigma_1, mean_2, sigma_2):
    """Return KL(N(mean_1, sigma_1^2) || N(mean_2, sigma_2^2)) in nats, elementwise."""
    ratio = (sigma_1 / sigma_2) ** 2
    distance = ((mean_1 - mean_2) / sigma_2) ** 2
    return 0.5 * (ratio + distance - 1 - ratio.log())


def normal_cdf(z):
    """Return P(Z < z) of Z ~ N(0, 1), by the tanh approximation of the released code."""
    return 0.5 + 0.5 * torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))


def discretised_log_likelihood(x_0, mean, sigma):
    """Return log p(x_0) of N(mean, sigma^2) on 256 grey levels (Eq. 13), elementwise, in nats.

    A level is 2/255 wide; the first and the last extend to infinity. As released, p >= 1e-12.
    """
    below = normal_cdf((x_0 - 1 / 255 - mean) / sigma)
    below = torch.where(x_0 < -0.999, 0.0, below)
    above = normal_cdf((x_0 + 1 / 255 - mean) / sigma)
    above = torch.where(x_0 > 0.999, 1.0, above)
    return (above - below).clamp(min=1e-12).log()


EPOCH, STEP, PICTURE = range(3)  # what a random stream is for: tags that keep seeds apart


def seed_of(seed, *key):
    """A seed that is a function of the run's seed and a key: a tag, then its numbers."""
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0])


def seeded_randn_like(seed, numbers, device):
    """A randn_like whose row i is the noise of picture numbers[i] of the seed, in any batch."""
    generators = [torch.Generator(device) for _ in numbers]
    for generator, number in zip(generators, numbers):
        generator.manual_seed(seed_of(seed, PICTURE, number))

    def randn_like(x):
        rows = [torch.randn(x.shape[1:], generator=g, device=device) for g in generators]
        return torch.stack(rows)

    return randn_like


# 2. The network
#
# Appendix B as released, oddities and all, with the parameter names of the published weights.
# `h` is a feature map, `temb` the embedding of the time t.


def sinusoidal_embedding(t, dim):
    """The Transformer's embedding of steps t: (B,) -> (B, dim) float32, sines, then cosines."""
    half = dim // 2  # the frequencies fall from 1 to 1/10000, both included, hence half - 1
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], 1)


def group_norm(config, channels):
    """GroupNorm in the paper's 32 groups, fewer if thin: groups of 1 channel would erase temb."""
    groups = math.gcd(min(32, channels // config.group_size), channels)  # must divide the channels
    return nn.GroupNorm(groups, channels, eps=1e-6)  # TensorFlow's eps, not PyTorch's


class ResBlock(nn.Module):
    """Convolutions beside a shortcut, told the time: (B, C_in, H, W) -> (B, C, H, W)."""

    def __init__(self, config, channels_in, channels):
        super().__init__()
        self.norm1 = group_norm(config, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.base_channels, channels)
        self.norm2 = group_norm(config, channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Identity()
        if channels_in != channels:
            self.conv_shortcut = nn.Conv2d(channels_in, channels, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention over all positions, one head as wide as the channels: (B, C, H, W) -> same."""

    def __init__(self, config, channels):
        super().__init__()
        self.group_norm = group_norm(config, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # published as to_out.0

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2).contiguous()  # (B, HW, C)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])  # one head
        h = self.to_out(h[:, 0])  # softmax(q k^T / sqrt(C)) v, projected
        return x + h.transpose(1, 2).view_as(x)


def downsample(channels):
    """Halves height and width: (B, C, H, W) -> (B, C, H/2, W/2)."""
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # TensorFlow's SAME: right and bottom only
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv))


def upsample(channels):
    """Doubles height and width: (B, C, H, W) -> (B, C, 2H, 2W)."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(resize=nn.Upsample(scale_factor=2), conv=conv))


class Level(nn.Module):
    """The residual blocks of one feature map size, each followed by an attention or by nothing."""

    def __init__(self):
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()

    def add(self, config, channels_in, channels, attend):
        """Appends a residual block, and self-attention if it shall attend."""
        self.resnets.append(ResBlock(config, channels_in, channels))
        self.attentions.append(Attention(config, channels) if attend else nn.Identity())


class UNet(nn.Module):
    """eps_theta(x_t, t): the noise in x_t. x_t: (B, C, H, W) and t: (B,) -> (B, C, H, W) float32.

    A level for each of the config's channel_mults, each half the size of the one before it.
    """

    def __init__(self, config):
        super().__init__()
        self.base_channels = config.base_channels
        temb_channels = 4 * config.base_channels
        linear_1 = nn.Linear(config.base_channels, temb_channels)
        linear_2 = nn.Linear(temb_channels, temb_channels)
        self.time_embedding = nn.ModuleDict({"linear_1": linear_1, "linear_2": linear_2})
        channels = config.base_channels
        self.conv_in = nn.Conv2d(config.channels, channels, 3, padding=1)
        skips = [channels]  # the channels of each feature map that the way up will take
        sizes = config.sizes()

        self.down_blocks = nn.ModuleList()
        for size, mult in zip(sizes, config.channel_mults):
            level = Level()
            for _ in range(config.num_res_blocks):
                channels_in, channels = channels, config.base_channels * mult
                level.add(config, channels_in, channels, size in config.attention_resolutions)
                skips.append(channels)
            level.downsamplers = nn.ModuleList()
            if size > sizes[-1]:
                level.downsamplers.append(downsample(channels))
                skips.append(channels)
            self.down_blocks.append(level)

        self.mid_block = Level()
        self.mid_block.add(config, channels, channels, attend=True)
        self.mid_block.add(config, channels, channels, attend=False)

        self.up_blocks = nn.ModuleList()
        for size, mult in zip(reversed(sizes), reversed(config.channel_mults)):
            level = Level()
            for _ in range(config.num_res_blocks + 1):
                channels_in = channels + skips.pop()
                channels = config.base_channels * mult
                level.add(config, channels_in, channels, size in config.attention_resolutions)
            level.upsamplers = nn.ModuleList()
            if size < sizes[0]:
                level.upsamplers.append(upsample(channels))
            self.up_blocks.append(level)

        self.conv_norm_out = group_norm(config, channels)
        self.conv_out = nn.Conv2d(channels, config.channels, 3, padding=1)
        for name, weights in self.named_parameters():
            if name.endswith(("bias", "conv2.weight", "to_out.0.weight", "conv_out.weight")):
                nn.init.zeros_(weights)  # each residual branch starts as nothing, and so does eps
            elif weights.dim() > 1:  # but a norm's gain stays 1
                nn.init.xavier_uniform_(weights)

    def forward(self, x_t, t):
        temb = self.time_embedding["linear_1"](sinusoidal_embedding(t, self.base_channels))
        temb = self.time_embedding["linear_2"](F.silu(temb))  # (B, 4 base)
        h = self.conv_in(x_t)  # (B, base, H, W)
        skips = [h]
        for level in self.down_blocks:  # (B, C, H, W) -> (B, C', H/2, W/2) -> ...
            for resnet, attention in zip(level.resnets, level.attentions):
                h = attention(resnet(h, temb))
                skips.append(h)
            for halve in level.downsamplers:  # one, or none at the last level
                h = halve(h)
                skips.append(h)
        for resnet, attention in zip(self.mid_block.resnets, self.mid_block.attentions):
            h = attention(resnet(h, temb))
        for level in self.up_blocks:  # ... -> (B, C', H/2, W/2) -> (B, C, H, W)
            for resnet, attention in zip(level.resnets, level.attentions):
                h = attention(resnet(torch.cat([h, skips.pop()], 1), temb))
            for double in level.upsamplers:
                h = double(h)
        return self.conv_out(F.silu(self.conv_norm_out(h))).to(x_t.dtype)  # not autocast's


def build(config, device=None):
    """(UNet, Diffusion) of a Config."""
    return UNet(config).to(device), Diffusion(config.timesteps, config.variance).to(device)


# 3. Data
#
# Pictures are decoded once, to uint8; all that comes after sees one tensor (N, C, H, W).

RANK = int(os.environ.get("RANK", 0))  # torchrun's number of this process
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are


def in_terminal():
    """Whether standard output is a terminal; it can also be closed, or a notebook's own object."""
    return hasattr(sys.stdout, "isatty") and sys.stdout.isatty()


def say(text, end="\n"):
    """Prints a line, in a terminal over the progress line; into nothing if its reader is gone."""
    try:
        if RANK == 0:
            print("\r\x1b[K" + text if in_terminal() else text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress(items, what, total, first=0, images=0, notes=()):
    """Yields items, of so many images each, and shows how far they are: in a terminal at once,
    in a file every 30 s. The caller may change the list of notes on the way."""
    terminal = in_terminal()
    pause = 0.1 if terminal else 30
    start = shown = time.perf_counter()
    for done, item in enumerate(items, first + 1):
        yield item
        now = time.perf_counter()
        if done < total and now - shown < pause:
            continue
        shown = now
        seconds_each = (now - start) / (done - first)
        parts = [f"{what} {done}/{total}", *notes]
        if images:
            parts.append(f"{images / seconds_each:.3g} images/s")
        left = timedelta(seconds=round(seconds_each * (total - done)))
        parts.append(f"{left} left")
        say("  ".join(parts), end="" if terminal and done < total else "\n")


def to_unit(pictures):
    """uint8, 0..255 -> float32 in [-1, 1] (Sec. 3.3)."""
    return pictures.float() / 127.5 - 1


def to_uint8(x_0):
    """float32 in [-1, 1] -> uint8, 0..255, rounded: a cast alone truncates, and darkens."""
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def grid(pictures, columns=None):
    """A PIL image of pictures, uint8 (N, C, H, W), side by side; a square if not told how wide."""
    columns = columns or math.ceil(len(pictures) ** 0.5)
    return to_pil_image(utils.make_grid(pictures.cpu(), columns, pad_value=255))


class Shapes:
    """Coloured circles, squares and triangles, 10,000 a split, used like torchvision's sets."""

    classes = ("circle", "square", "triangle")

    def __init__(self, root="", train=True, download=False):
        self.first = 0 if train else 10_000
        self.targets = [i % 3 for i in range(10_000)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        rng = np.random.default_rng(self.first + i)
        radius, hue, light = rng.uniform((24, 0, 35), (48, 360, 60))
        x, y = rng.uniform(radius, 128 - radius, 2)
        image = Image.new("RGB", (128, 128), "white")
        sides, colour = (64, 4, 3)[i % 3], f"hsl({hue:.0f}, 80%, {light:.0f}%)"
        ImageDraw.Draw(image).regular_polygon((x, y, radius), sides, fill=colour)
        return image, i % 3


SETS = {  # how to get it, its channels, and whether a mirrored picture is as good
    "shapes": (Shapes, 3, True),
    "mnist": (datasets.MNIST, 1, False),
    "fashion-mnist": (datasets.FashionMNIST, 1, False),
    "cifar10": (datasets.CIFAR10, 3, True),
    "cifar100": (datasets.CIFAR100, 3, True),
}


class Folder:
    """The pictures below a folder, as (PIL image, 0). Raises UserError if there are none.

    Hidden ones, links to folders and the folders of runs are left out.
    """

    def __init__(self, root):
        endings = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        runs = {path.parent for path in Path(root).rglob("ckpt.pt")}
        self.paths, others = [], []
        for path in sorted(Path(root).rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            of_a_run = any(parent in runs for parent in path.parents)
            if hidden or of_a_run or path.is_dir():
                continue
            if path.suffix.lower() in endings:
                self.paths.append(path)
            else:
                others.append(path.suffix or path.name)
        kinds = " ".join(sorted(set(others)))
        left_out = f"{len(others)} files of kinds that Pillow can't read: {kinds:.99}"
        if not self.paths:
            raise UserError(f"{root} holds no images (looked for .png .jpg .webp ...; {left_out})")
        if others:
            say(f"{root}: left out {left_out}")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # the pixels are whole, however long the text
        Image.MAX_IMAGE_PIXELS = None  # Pillow refuses 179 megapixels; phones make 200
        image = Image.open(self.paths[i])
        if image.width * image.height > 3e8:
            raise ValueError("it has more than 300 megapixels")
        return image, 0


def find_dataset(data, train):
    """What --data names, as a data set of (PIL image, label). Raises UserError if there is none.

    A folder; or one of SETS, its training or test split, downloaded to ./data; or a class of it.
    """
    name, _, label = data.partition("/")
    if data and Path(data).is_dir():
        if name in SETS:
            say(f"--data {data}: using the folder ./{data}, not the data set of that name")
        return Folder(data)
    if name == "flowers102":  # torchvision's own needs scipy to read its labels
        raise UserError("--data flowers102: unpack its archive and name the folder")
    if name not in SETS:
        raise UserError(f"--data {data!r} is neither a folder nor one of {', '.join(SETS)}")
    try:
        dataset = SETS[name][0]("data", train=train, download=True)
    except (OSError, RuntimeError) as error:  # no network, or a damaged download
        raise UserError(f"can't download {name} to ./data ({error}): try again") from error
    if not label:
        return dataset
    classes = [name.lower() for name in dataset.classes]
    targets = [int(target) for target in dataset.targets]
    members = [i for i, k in enumerate(targets) if label.lower() in (str(k), classes[k])]
    if not members:
        raise UserError(f"{name} has no class {label!r}, it has: {', '.join(classes)}")
    return Subset(dataset, members)


def decode(image):
    """A PIL image upright, on white, in mode L or RGB; raises whatever Pillow's decoder raises."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("it has 32 bits a channel: save it with 8 or 16")
    image.load()
    image.getexif()  # keeps the orientation, and the next line removes the raw tags,
    image.info.pop("exif", None)  # not all of which can be written anew
    image = ImageOps.exif_transpose(image)
    if "I" in image.mode:  # 16 bits, which Pillow's own conversion cuts off at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_pictures(dataset, size, channels, order=None, at_once=256, what=""):
    """Yields the pictures of a data set, or those in `order`, in batches: uint8 (N, C, H, W).

    The middle of each, resized to (W, H) = size. Broken ones are named and left out. With a text
    for `what`, shows how far it is. Raises UserError if none can be read.
    """
    order = order or range(len(dataset))
    names = getattr(dataset, "paths", range(len(dataset)))  # a Folder's files, or numbers

    def read(i):
        try:
            image = decode(dataset[i][0])
        except Exception as error:  # a decoder may raise anything on a broken file
            say(f"skipped a broken picture, {names[i]}: {error or type(error).__name__}")
            return None
        image = image.convert("L" if channels == 1 else "RGB")
        return pil_to_tensor(ImageOps.fit(image, size))

    found = 0
    parts = [order[i : i + at_once] for i in range(0, len(order), at_once)]
    if what:
        parts = progress(parts, f"{what}, batch", len(parts))
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes outside of Python's lock
        for part in parts:
            pictures = [picture for picture in threads.map(read, part) if picture is not None]
            found += len(pictures)
            if pictures:
                yield torch.stack(pictures)
    if not found:
        raise UserError(f"none of the {len(order)} pictures can be read")


def load_pictures(data, config):
    """The training pictures of `data`, decoded once: uint8 (N, C, H, W). Raises UserError."""
    dataset = find_dataset(data, train=True)
    pictures = torch.empty(config.shape(len(dataset)), dtype=torch.uint8)
    n, size, what = 0, config.shape(1)[2:], "reading pictures"
    for batch in read_pictures(dataset, size, config.channels, what=what):
        pictures[n : n + len(batch)] = batch
        n += len(batch)
    return pictures[:n]


def epoch_order(n, seed, epoch):
    """The order of n pictures in an epoch, a list: a function of the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(seed_of(seed, EPOCH, epoch))
    return torch.randperm(n, generator=generator).tolist()


def training_batches(pictures, config, step, passes=1):
    """Yields this process's batches from a step on, uint8 (B / passes, C, H, W), for ever.

    Picture k of a run is number k % n of epoch k // n, whatever the number of processes.
    """
    n, size = len(pictures), config.batch_size // passes
    epoch, order = -1, []
    for i in itertools.count(step * passes + RANK, WORLD):  # pass i of the run
        rows = []
        for k in range(i * size, (i + 1) * size):
            if k // n != epoch:
                epoch = k // n
                order = epoch_order(n, config.seed, epoch)
            rows.append(order[k % n])
        yield pictures[torch.tensor(rows).to(pictures.device, non_blocking=True)]


def some_pictures(data, config, n, seed):
    """n pictures of `data`, of a named set's test split, in an order of the seed: (n, C, H, W)."""
    dataset = find_dataset(data, train=False)
    order = epoch_order(len(dataset), seed, 0)
    found = []
    for batch in read_pictures(dataset, config.shape(1)[2:], config.channels, order, at_once=n):
        found.extend(batch)
        if len(found) >= n:
            break
    return torch.stack(found[:n])


# 4. Devices and files


def pick_device(name, amp):
    """(device, dtype) of --device and --amp; dtype None is float32. Raises UserError."""
    best = "cpu"
    if torch.accelerator.is_available():
        best = torch.accelerator.current_accelerator().type
    if name == "auto":
        name = best
    if name not in ("cpu", best):
        raise UserError(f"--device {name}: torch finds none on this machine, use auto or cpu")
    has_bf16 = False  # without it in hardware it is emulated, a hundred times slower
    if name == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif name == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older torch can't tell
        can = torch.cpu.get_capabilities()
        has_bf16 = can.get("amx_bf16", False) or can.get("avx512_bf16", False)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = amp != "off"  # --amp off is float32, in convolutions too
    bf16 = amp == "bf16" or (amp == "auto" and has_bf16)
    return torch.device(name), torch.bfloat16 if bf16 else None


def in_precision(model, device, dtype, compiled=False):
    """model(x_t, t), computed in mixed precision of this dtype, or in float32 if it is None."""
    model = torch.compile(model) if compiled else model

    def call(x_t, t):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(x_t, t)

    return call


def replace_file(path, write):
    """Writes a file whole or not at all: write(another path), flush, rename. Raises OSError."""
    temporary = path.with_name("." + path.name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's when the disk is full
        temporary.unlink(missing_ok=True)
        raise OSError(f"can't write {path} (a full disk?): {error}") from error
    for wait in (0.1, 0.5, 2, 5, 0):
        try:
            return os.replace(temporary, path)
        except PermissionError:  # on Windows, while a virus scanner has the old file open
            time.sleep(wait)
    raise OSError(f"can't replace {path}: its new content is in {temporary}")


@contextlib.contextmanager
def new_file(paths):
    """The first free path, as a file, removed if left empty. Raises UserError if none is free."""
    for path in paths:
        had_folder = path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.open("x").close()
            break
    else:
        raise UserError(f"{path} already exists: choose another --out")
    try:
        yield path
    finally:
        if path.exists() and path.stat().st_size == 0:
            path.unlink()
            if not had_folder:
                with contextlib.suppress(OSError):  # there are other files by now
                    path.parent.rmdir()


# The authors' weights are published in the diffusers library's layout; config.json must say this:
PUBLISHED = {
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_tensors(path):
    """What torch.save wrote, on the CPU; code in it is not run. Raises UserError if damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # its unpickler may raise anything on a damaged file
        raise UserError(f"{path} is damaged, or was not written by torch.save") from error


def read_published(path):
    """Published weights as the dictionary that `train` saves; ValueError for another network."""
    given = json.loads(path.with_name("config.json").read_bytes())
    size, widths = given["sample_size"], given["block_out_channels"]
    for name, value in PUBLISHED.items():
        if given.get(name, "missing") != value:
            raise ValueError(f"{name} is {given.get(name, 'missing')!r}, here it must be {value!r}")
    if any(width % 128 for width in widths):  # thinner levels are normalised in fewer groups here
        raise ValueError(f"block_out_channels is {widths}, here it must be multiples of 128")
    levels = enumerate(given["down_block_types"])
    config = {
        "image_size": size,
        "channels": given["in_channels"],
        "base_channels": widths[0],
        "channel_mults": tuple(width // widths[0] for width in widths),
        "num_res_blocks": given["layers_per_block"],
        "attention_resolutions": tuple(size // 2**i for i, kind in levels if "Attn" in kind),
        # not in the file: the released scripts' values for CIFAR-10, and for the others
        "variance": "fixedlarge" if size == 32 else "fixedsmall",
        "dropout": 0.1 if size == 32 else 0.0,
    }
    weights = load_tensors(path)
    for old, new in OLD_NAMES.items():
        weights = {name.replace(f".{old}.", f".{new}."): w for name, w in weights.items()}
    return {"config": config, "step": 0, "log": "", "model": weights, "ema": weights}


def find_checkpoint(name=""):
    """The file of a checkpoint, a run's folder or a published one; of the newest run if ""."""
    if not name:
        runs = sorted(Path("runs").rglob("ckpt.pt"), key=os.path.getmtime)
        if not runs:
            raise UserError("no run below ./runs: train first, or name a checkpoint")
        return runs[-1]
    files = ("", "ckpt.pt", "diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.bin")
    for file in files:
        if Path(name, file).is_file():
            return Path(name, file)
    raise UserError(f"no checkpoint at {name} (looked for a file, or in it {', '.join(files[1:])})")


def load_checkpoint(path):
    """(checkpoint, Config) of what `train` saved, or of published weights. Raises UserError."""
    try:
        published = path.name == "diffusion_pytorch_model.bin"
        checkpoint = read_published(path) if published else load_tensors(path)
        missing = {"config", "step", "log", "model", "ema"} - set(checkpoint)
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        return checkpoint, Config(**checkpoint["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of this ddpm.py ({error})") from error


def load_weights(model, weights):
    """Copies weights, tensors by name, into a model. Raises UserError if they don't fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise UserError("the checkpoint's weights don't fit the network it describes") from error


def load(path="", device="cpu"):
    """(EMA network, Diffusion, Config) to sample from; the path as `find_checkpoint` takes it."""
    path = find_checkpoint(path)
    checkpoint, config = load_checkpoint(path)
    model, diffusion = build(config, device)
    load_weights(model, checkpoint["ema"])
    return model.eval().requires_grad_(False), diffusion, config


# 5. Training


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay * ema + (1 - decay) * model, their weights in float32, after step 0, 1, ..."""
    decay = min(decay, (1 + step) / (10 + step))  # starts low, as TensorFlow's can
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def learning_rate(config, step):
    """Adam's rate: linear warm-up, constant (Appendix B), linear to 0 in the last `lr_decay`."""
    warmup = min(1, (step + 1) / max(1, config.warmup))
    decay = min(1, (config.steps - step) / max(1, config.lr_decay * config.steps))
    return config.lr * warmup * decay


def over_processes(tensor, op=dist.ReduceOp.SUM):
    """A tensor's number, combined with those of torchrun's other processes."""
    if WORLD > 1:
        dist.all_reduce(tensor, op)
    return tensor.item()


@contextlib.contextmanager
def noted_signals():
    """A list that Ctrl-C, SIGTERM and SIGHUP join, so that `train` can end a step and save."""
    noted, usual = [], {}

    def note(number, frame):
        noted.append(number)
        if WORLD == 1:  # a second one has its usual effect, but torchrun repeats the first
            signal.signal(number, usual[number])

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            usual[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def draw(diffusion, model, shape, seed, batch_size, steps=0, eta=1.0):
    """Samples pictures, (N, C, H, W) = shape, in batches: DDIM if given steps or an eta below 1.

    Yields (number of the batch's first picture, steps left, x_t) after each step; with 0 left,
    x_t is the pictures. Picture i of a seed is the same in any batch.
    """
    for first in range(0, shape[0], batch_size):
        numbers = range(first, min(first + batch_size, shape[0]))
        randn_like = seeded_randn_like(seed, numbers, diffusion.betas.device)
        x_T = randn_like(torch.empty(len(numbers), *shape[1:]))
        left = steps or diffusion.timesteps
        if steps or eta < 1:
            chain = diffusion.sample_ddim(model, x_T, left, eta, randn_like)
        else:
            chain = diffusion.sample(model, x_T, randn_like=randn_like)
        for _, x_t, _ in chain:
            left -= 1
            yield first, left, x_t


def finished(states):
    """The pictures among what `draw` yields, in batches: uint8 (B, C, H, W)."""
    return (to_uint8(x_t) for _, left, x_t in states if left == 0)


def try_replace_file(path, write):
    """replace_file for what a run can do without: a failure is a line."""
    try:
        replace_file(path, write)
    except OSError as error:
        say(str(error))


@dataclasses.dataclass
class Run:
    """A network in training: what a checkpoint holds."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    log: str = "step,loss,lr,grad_norm\n"


def start_run(config, device, checkpoint=None):
    """A Run: new, fine-tuned from a checkpoint of step 0, or resumed from one of a later step."""
    torch.manual_seed(config.seed)
    model = UNet(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    run = Run(model, ema, torch.optim.Adam(model.parameters(), fused=True))
    if checkpoint:
        load_weights(model, checkpoint["model"])
        load_weights(ema, checkpoint["ema"])
    if checkpoint and checkpoint["step"] > 0:
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.step, run.log = checkpoint["step"], checkpoint["log"]
    return run


def save_run(run, config, path, write):
    """Saves the checkpoint of a Run by `write`, which is replace_file or try_replace_file."""
    state = {"config": dataclasses.asdict(config), "step": run.step, "log": run.log}
    state["model"] = run.model.state_dict()
    state["ema"] = run.ema.state_dict()
    state["optimizer"] = run.optimizer.state_dict()
    write(path, lambda file: torch.save(state, file))


def draw_grid(ema, diffusion, config, path, dtype, batch_size):
    """64 samples of the EMA as a PNG, always from the same noise, by DDIM in 50 steps."""
    model = in_precision(ema, diffusion.betas.device, dtype)
    steps = min(50, config.timesteps)
    states = draw(diffusion, model, config.shape(64), config.seed, batch_size, steps)
    try_replace_file(path, grid(torch.cat(list(finished(states)))).save)


def train(config, pictures, out, device, dtype, checkpoint=None, signals=()):
    """Algorithm 1 on pictures, uint8 (N, C, H, W); checkpoints, log.csv and grids go to `out`.

    All noise is a function of (seed, step), so a resumed run ends bit for bit where an unbroken
    one does. Returns the signal that ended it, or 0. Raises UserError if the loss is not finite.
    """
    passes = math.lcm(config.accumulate, WORLD)  # of all processes together
    if config.batch_size % passes:
        raise UserError(f"--batch-size {config.batch_size} for {WORLD} processes: use n * {passes}")
    run = start_run(config, device, checkpoint)
    diffusion = Diffusion(config.timesteps, config.variance).to(device)
    net = run.model
    if WORLD > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    predict = in_precision(net, device, dtype, config.compile)
    batches = training_batches(pictures, config, run.step, passes)
    size = sum(weights.numel() for weights in run.model.parameters())
    say(f"{size:,} parameters, {len(pictures):,} pictures, {device.type} in {dtype or 'float32'}")
    say(f"run folder {out}\n{config}")

    total_loss, logged, notes = torch.zeros((), device=device), run.step, []
    steps = range(run.step, config.steps)
    for step in progress(steps, "step", config.steps, run.step, config.batch_size, notes):
        lr = learning_rate(config, step)
        run.optimizer.param_groups[0].update(lr=lr, betas=(0.9, config.adam_beta_2))
        for i in range(RANK, passes, WORLD):
            torch.manual_seed(seed_of(config.seed, STEP, step, i))
            x_0 = to_unit(next(batches).to(device, non_blocking=True))
            if config.flip:
                mirrored = torch.rand(len(x_0), 1, 1, 1, device=device) < 0.5
                x_0 = torch.where(mirrored, x_0.flip(3), x_0)
            net.require_backward_grad_sync = i + WORLD >= passes  # DDP: in the last pass alone
            loss = diffusion.loss(predict, x_0) / (passes // WORLD)  # Algorithm 1, lines 2 to 5
            loss.backward()
            total_loss += loss.detach()
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
        run.optimizer.step()
        run.optimizer.zero_grad()
        update_ema(run.ema, run.model, config.ema_decay, step)

        run.step = step + 1
        stopped = over_processes(torch.tensor(max(signals, default=0)), dist.ReduceOp.MAX)
        last = stopped > 0 or run.step == config.steps
        saving = last or run.step % config.save_every == 0
        if saving or run.step % config.log_every == 0:  # this waits for the device
            loss = over_processes(total_loss) / WORLD / (run.step - logged)
            total_loss, logged = torch.zeros_like(total_loss), run.step
            if not math.isfinite(loss + norm):
                raise UserError(f"loss not finite at step {run.step}: resume with a lower --lr")
            run.log += f"{run.step},{loss:.6f},{lr:.6g},{norm:.4f}\n"
            notes[:] = [f"loss {loss:.4f}", f"lr {lr:.1e}"]
            if RANK == 0:
                try_replace_file(out / "log.csv", lambda file: file.write_text(run.log))
        if saving and RANK == 0:
            save_run(run, config, out / "ckpt.pt", replace_file if last else try_replace_file)
        if stopped and run.step < config.steps:
            return stopped
        if saving and RANK == 0:
            file = out / f"step-{run.step:06}.png"
            draw_grid(run.ema, diffusion, config, file, dtype, config.batch_size // passes)
    return 0


# 6. Samples and figures


def load_network(args):
    """(model, Diffusion, Config, path) of --ckpt; model(x_t, t) is ready for --device and --amp."""
    device, dtype = pick_device(args.device, args.amp)
    path = find_checkpoint(args.ckpt)
    model, diffusion, config = load(path, device)
    for layer in model.modules():
        if dtype and isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(dtype)  # once, where autocast would cast anew at every step
    if device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # 0.78 to 1.09 of the time, as measured
    say(f"{path}: {device.type} in {dtype or 'float32'}, seed {args.seed}")
    return in_precision(model, device, dtype, args.compile), diffusion, config, path


def draw_as_told(args, model, diffusion, config, n):
    """`draw` n pictures with the flags of the command line. Raises UserError if they can't be."""
    if args.ddim_steps > diffusion.timesteps or not 0 <= args.eta <= 1:
        raise UserError(f"--steps must be 1 to {diffusion.timesteps}, and --eta 0 to 1")
    shape = config.shape(n)
    return draw(diffusion, model, shape, args.seed, args.batch_size, args.ddim_steps, args.eta)


def sample_command(args):
    """`sample`: new pictures as a grid; if asked for, also one by one and as an animation."""
    model, diffusion, config, path = load_network(args)
    n = args.n or 64
    states = draw_as_told(args, model, diffusion, config, n)
    steps = args.ddim_steps or diffusion.timesteps
    in_gif = set(np.linspace(0, steps - 1, 60).round())  # the steps left at its frames
    names = (path.with_name(f"samples-{i:03}.png") for i in itertools.count())
    if args.out:
        names = [Path(args.out.removesuffix(".png") + ".png")]
    with new_file(names) as out, contextlib.ExitStack() as stack:
        folder, gif = out.with_suffix(""), out.with_suffix(".gif")
        written = [out]
        if args.individual:
            folder.mkdir()
            written.append(folder)
        if args.gif:
            stack.enter_context(new_file([gif]))
            written.append(gif)
        pictures, frames = [], []
        total = math.ceil(n / args.batch_size) * steps
        for first, left, x_t in progress(states, "sampling, step", total):
            if args.gif and first == 0 and left in in_gif:
                frames.append(grid(to_uint8(x_t)))
            if left == 0:
                batch = to_uint8(x_t).cpu()
                pictures.append(batch)
                for i, picture in enumerate(batch, first):
                    if args.individual:
                        replace_file(folder / f"{i:06}.png", to_pil_image(picture).save)
        replace_file(out, grid(torch.cat(pictures)).save)
        if args.gif:
            how = {"save_all": True, "append_images": frames[1:], "duration": 60, "loop": 0}
            replace_file(gif, lambda file: frames[0].save(file, **how))
    files = ", ".join(map(str, written))
    say(f"wrote {files}: {n} pictures of seed {args.seed}; for others use --seed {args.seed + 1}")
    return 0


def forward_figure(args):
    """Pictures, and the same with more and more of one noise mixed in (Eq. 4)."""
    times = range(1, 1001, 111)
    diffusion = Diffusion()
    x_0 = to_unit(some_pictures(args.data, Config(image_size=64), args.n or 4, args.seed))
    eps = seeded_randn_like(args.seed, range(len(x_0)), "cpu")(x_0)
    columns = [x_0] + [diffusion.q_sample(x_0, t, eps) for t in times]
    return columns, f"columns: x_0, t = {', '.join(map(str, times))}"


def progressive_figure(args):
    """Two rows a picture along the reverse process: x_t, and the x_0 predicted from it (Fig. 6)."""
    model, diffusion, config, _ = load_network(args)
    T, device = diffusion.timesteps, diffusion.betas.device
    times = (1 + np.linspace(T - 1, 0, min(11, T)).round().astype(int)).tolist()
    randn_like = seeded_randn_like(args.seed, range(args.n or 4), device)
    x_t = randn_like(torch.empty(config.shape(args.n or 4)))
    columns = []
    chain = diffusion.sample(model, x_t, randn_like=randn_like)
    for t, x_next, x_0 in progress(chain, "step", T):
        if t in times:
            columns.append(torch.stack([x_t, x_0], 1).flatten(0, 1))
        x_t = x_next
    columns.append(torch.stack([x_t, x_t], 1).flatten(0, 1))
    return columns, f"columns: t = {', '.join(map(str, times))}, x_0; rows: x_t, predicted x_0"


def interpolate_figure(args):
    """Two pictures noised to some t, mixed there by tenths, and denoised (Figs. 8 and 9)."""
    model, diffusion, config, _ = load_network(args)
    device = diffusion.betas.device
    pictures = some_pictures(args.data or config.data, config, 2, args.seed)
    x_0 = to_unit(pictures.to(device))[[0, -1]]
    eps = seeded_randn_like(args.seed, [0, 1], device)(x_0)
    starts = [max(1, diffusion.timesteps * eighth // 8) for eighth in range(1, 9)]
    rows = []
    for start in starts:
        a, b = diffusion.q_sample(x_0, start, eps)
        x_t = torch.stack([a.lerp(b, tenth / 10) for tenth in range(11)])
        randn_like = seeded_randn_like(args.seed, [2] * 11, device)  # the same for the whole row
        chain = diffusion.sample(model, x_t, start, randn_like)
        for _, x_next, _ in progress(chain, "interpolating, step", start):
            x_t = x_next
        rows.append(torch.cat([x_0[:1], x_t, x_0[1:]]))
    return torch.stack(rows, 1), f"columns: source, 0 to 1 by tenths, source; rows: {starts} steps"


FIGURES = {
    "forward": forward_figure,
    "progressive": progressive_figure,
    "interpolate": interpolate_figure,
}


def show_command(args):
    """`show`: a figure of the paper as a PNG."""
    with new_file([Path((args.out or args.figure).removesuffix(".png") + ".png")]) as out:
        columns, text = FIGURES[args.figure](args)  # each (rows, C, H, W) in [-1, 1]
        pictures = torch.stack(list(columns), 1).flatten(0, 1)
        replace_file(out, grid(to_uint8(pictures), len(columns)).save)
    say(f"wrote {out}, {text}")
    return 0


# 7. Evaluation


def print_bound(model, diffusion, config, data, args):
    """The variational bound in bits/dim, and its two parts (Sec. 4.3)."""
    pictures = some_pictures(data, config, args.n or 64, args.seed)
    say(f"bits/dim of {len(pictures)} pictures of {data!r}, of a named set's test split")
    tables = []
    for first in range(0, len(pictures), args.batch_size):
        x_0 = to_unit(pictures[first : first + args.batch_size].to(diffusion.betas.device))
        randn_like = seeded_randn_like(args.seed, range(first, first + len(x_0)), x_0.device)
        what = f"bits/dim, pictures {first + 1} to {first + len(x_0)}, step"
        terms = diffusion.bits_per_dim(model, x_0, randn_like)
        terms = list(progress(terms, what, diffusion.timesteps + 1))
        tables.append(torch.stack(terms))
    table = torch.cat(tables, 1).cpu()  # (T + 1, N): L_0..L_T

    rate, distortion = table[1:].sum(0), table[0]
    parts = {"total": rate + distortion, "rate": rate, "distortion": distortion}
    for name, bits in parts.items():
        error = bits.std(correction=0) / len(bits) ** 0.5
        say(f"{name:12} {bits.mean():7.4f} +- {error:.4f} bits/dim")


INCEPTION = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)


def pool_as_tensorflow(net):
    """Makes torchvision's Inception3 pool as TensorFlow's graph of 2015 does.

    That has no padding in its averages, and a maximum in the last block. The pools are inside
    each block's forward: one hook pools the block's input, one gives it to the layer behind.
    """
    kept = []
    for name, block in net.named_children():
        if not hasattr(block, "branch_pool"):
            continue

        def keep(module, inputs, last=name == "Mixed_7c"):
            if last:
                kept.append(F.max_pool2d(inputs[0], 3, 1, 1))
            else:
                kept.append(F.avg_pool2d(inputs[0], 3, 1, 1, count_include_pad=False))

        block.register_forward_pre_hook(keep)
        block.branch_pool.register_forward_pre_hook(lambda module, inputs: kept.pop())


def load_inception(file=None, device="cpu"):
    """TensorFlow's Inception of 2015: uint8 (B, 1 or 3, H, W) -> (features (B, 2048), class
    probabilities (B, 1008)). The weights of a file, or fetched once. Raises UserError."""
    net = models.Inception3(1008, aux_logits=False, init_weights=False)
    try:
        if file:
            weights = load_tensors(file)
        else:
            how = {"map_location": "cpu", "check_hash": True, "weights_only": True}
            weights = torch.hub.load_state_dict_from_url(INCEPTION, **how)
        net.load_state_dict(weights)
    except (OSError, RuntimeError, TypeError, UserError) as error:
        why = f"no Inception ({error!s:.60})"
        raise UserError(f"{why}: fetch {INCEPTION} for --inception-weights") from error
    pool_as_tensorflow(net)
    classes = net.fc.weight.to(device)  # the reference IS has no bias here
    net.fc = nn.Identity()
    net.to(device).eval()

    @torch.no_grad()
    def inception(pictures):
        x = to_unit(pictures.to(device)).expand(-1, 3, -1, -1)
        features = net(F.interpolate(x, (299, 299), mode="bilinear"))
        return features.cpu(), (features @ classes.T).softmax(1).cpu()

    return inception


def features_of(batches, inception):
    """What `load_inception`'s function gives for all pictures of the batches, 16 at a time."""
    features, probabilities = [], []
    for batch in batches:
        for part in batch.split(16):
            part_features, part_probabilities = inception(part)
            features.append(part_features)
            probabilities.append(part_probabilities)
    return torch.cat(features), torch.cat(probabilities)


def gaussian_of(features):
    """Mean (D,) and covariance (D, D), in float64, of features (N, D)."""
    mean = features.mean(0, dtype=torch.float64)
    products = 0
    for part in features.split(1024):  # all of them in float64 may not fit
        centred = part.double() - mean
        products = products + centred.T @ centred
    return mean, products / max(1, len(features) - 1)


def frechet_distance(a, b):
    """FID (Heusel et al. 2017) of two sets of features (N, D):
    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))."""
    mean_a, cov_a = gaussian_of(a)
    mean_b, cov_b = gaussian_of(b)
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt()  # rounding can pass 0
    return ((mean_a - mean_b).square().sum() + (cov_a + cov_b).trace() - 2 * roots.sum()).item()


def inception_score(probabilities, splits=10):
    """IS (Salimans et al. 2016), exp E KL(p(y|x) || p(y)): mean and deviation of so many splits."""
    scores = []
    for part in probabilities.tensor_split(splits):
        p = part.double()
        kl = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1)
        scores.append(kl.mean().exp().item())
    return np.mean(scores), np.std(scores)


def size_of(folder):
    """(width, height) of all pictures of a Folder. Raises UserError, naming two, if they differ."""
    sizes = {}
    for i, path in enumerate(folder.paths):
        with contextlib.suppress(Exception):  # broken ones are named when they are read
            sizes.setdefault(folder[i][0].size, path)
    if len(sizes) > 1:
        (size, path), (other_size, other), *_ = sizes.items()
        raise UserError(f"samples must have one size: {path} has {size}, {other} {other_size}")
    return next(iter(sizes), (1, 1))


def eval_command(args):
    """`eval`: bits/dim of the network (Sec. 4.3); FID and Inception Score of samples."""
    metrics = set(args.metrics or (["fid", "is"] if args.samples else ["bpd"]))
    data = args.data
    if "bpd" in metrics or not args.samples:
        model, diffusion, config, _ = load_network(args)
        n, size, channels = args.n or 50_000, config.shape(1)[2:], config.channels
        data = data or config.data
        batches = finished(draw_as_told(args, model, diffusion, config, n))
        total = math.ceil(n / args.batch_size)
        batches = progress(batches, "sampling, batch", total, images=args.batch_size)
        steps = args.ddim_steps or config.timesteps
        source = f"samples in {steps} steps, eta {args.eta}, amp {args.amp}"
    if args.samples:
        folder = Folder(args.samples)
        n, size, channels = len(folder), size_of(folder), 3
        batches = read_pictures(folder, size, channels, what="reading samples")
        source = f"pictures of {args.samples}"

    # what can be missing is looked for before anything is computed
    if "is" in metrics and n < 10:
        raise UserError(f"10 splits of an Inception Score need at least 10 pictures, not {n}")
    if "fid" in metrics:
        training_set = find_dataset(data, train=True)
    if "fid" in metrics or "is" in metrics:
        inception = load_inception(args.inception_weights, pick_device(args.device, args.amp)[0])

    if "bpd" in metrics:
        print_bound(model, diffusion, config, data, args)
    if metrics == {"bpd"}:
        return 0
    features, probabilities = features_of(batches, inception)
    made = f"{len(features)} {source}"
    if n < 10_000:
        say("fewer than 10,000 pictures: FID comes out too high, Inception Score too low")
    if "fid" in metrics:
        batches = read_pictures(training_set, size, channels, what="features of the training set")
        theirs, _ = features_of(batches, inception)
        fid = frechet_distance(features, theirs)
        say(f"FID {fid:.3f} of {made}, against {len(theirs)} training pictures of {data!r}")
    if "is" in metrics:
        mean, deviation = inception_score(probabilities)
        say(f"Inception Score {mean:.3f} +- {deviation:.3f} of {made}")
    return 0


# 8. The command line


def preset_config(args, given):
    """The Config of a preset, changed by the given settings; some follow the data and the size."""
    slow = args.device == "cpu" or not torch.accelerator.is_available()
    preset = args.preset or ("tiny" if slow else "cifar10")
    if preset == "cifar10" and not args.preset and "steps" not in given:
        say("training the paper's network for 800,000 steps; for less, --steps N or --preset tiny")
    settings = dataclasses.asdict(PRESETS[preset])
    data = given.get("data", "")
    name = data.partition("/")[0]
    if name in SETS and not Path(data).is_dir():
        _, settings["channels"], settings["flip"] = SETS[name]
    settings |= given
    if "attention_resolutions" not in given:  # the preset's, if the network has them
        wanted = settings.pop("attention_resolutions")
        sizes = Config(**settings, attention_resolutions=()).sizes()
        kept = [size for size in wanted if size in sizes]
        if wanted and not kept:
            kept = sizes[-1:]
        settings["attention_resolutions"] = tuple(kept)
    return Config(**settings)


def checkpoint_config(args, given):
    """(Config, checkpoint, its path) to resume, or with step 0 to fine-tune. Raises UserError."""
    path = find_checkpoint(args.init_from or args.out)
    checkpoint, learned = load_checkpoint(path)
    names = [field.name for field in dataclasses.fields(Config)]
    for name in names[: names.index("dropout")]:  # what the weights are learned for
        value = getattr(learned, name)
        if given.get(name, value) != value:
            raise UserError(f"{path} has {flag_of(name)} {value}, which can't be changed")
    if args.init_from:
        checkpoint["step"] = 0
        checkpoint["model"] = checkpoint["ema"]
        return dataclasses.replace(learned, **({"data": ""} | given)), checkpoint, path
    config = dataclasses.replace(learned, **given)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds only weights: fine-tune them with --init-from")
    if checkpoint["step"] >= config.steps:
        raise UserError(f"{path} is finished after {checkpoint['step']} steps: raise --steps")
    if config.data != learned.data and not args.out:
        raise UserError(f"{path} was trained on {learned.data!r}: name another run with --out")
    return config, checkpoint, path


def log_names(data):
    """Yields where a new run can write log.csv: in runs/NAME, runs/NAME-2, ..."""
    name = data.replace("/", "-")
    if Path(data).is_dir():
        name = Path(os.path.abspath(data)).name
    yield Path("runs", name, "log.csv")
    for i in itertools.count(2):
        yield Path("runs", f"{name}-{i}", "log.csv")


def train_command(args):
    """`train`: a preset or a checkpoint, changed by the flags given, trains on --data."""
    given = {}
    for field in dataclasses.fields(Config):
        value = getattr(args, field.name)
        if value is not None:
            given[field.name] = tuple(value) if field.type is tuple else value
    checkpoint = None
    if args.resume or args.init_from:
        config, checkpoint, path = checkpoint_config(args, given)
    else:
        config = preset_config(args, given)
    device, dtype = pick_device(args.device, config.amp)
    if WORLD > 1:  # gloo for numbers that live on the CPU; grids keep the others waiting
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))

    with contextlib.ExitStack() as stack:
        out = path.parent if args.resume else Path()
        if RANK == 0 and not args.resume:
            logs = [Path(args.out, "log.csv")] if args.out else log_names(config.data)
            out = stack.enter_context(new_file(logs)).parent
        pictures = load_pictures(config.data, config)
        if pictures.numel() <= config.cache_gb * 2**30:
            pictures = pictures.to(device)
        if RANK == 0:
            settings = json.dumps(dataclasses.asdict(config), indent=2)
            replace_file(out / "config.json", lambda file: file.write_text(settings))
        signals = stack.enter_context(noted_signals())
        stopped = train(config, pictures, out, device, dtype, checkpoint, signals)
    if WORLD > 1:  # not after an error: it would wait for the others, which torchrun ends
        time.sleep(0.1)  # torch 2.6 waits for ever for threads that need Python to end
        dist.destroy_process_group()
    if stopped:
        say(f"stopped and saved; to resume: python ddpm.py train --resume --out {out}")
        return 128 + stopped
    say(f"training finished; to draw new pictures: python ddpm.py sample --ckpt {out / 'ckpt.pt'}")
    return 0


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, as all others of this program."""

    def error(self, message):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def at_least(low):
    """An argparse type: whole numbers from `low`."""

    def whole_number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return int(text)

    return whole_number


def add_command(commands, name, run, out=""):
    """Adds a command: a parser that sets `run`; `out` says what the command writes, if it does."""
    parser = commands.add_parser(name, help=run.__doc__, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    if out:
        parser.add_argument("--out", default="", help=out)
    return parser


def add_network_flags(parser, n, amp="auto"):
    """Flags of the commands that load a network; n says how many pictures by default."""
    add = parser.add_argument
    add("--ckpt", default="", help="a checkpoint, run's folder or published weights [newest run]")
    add("--amp", choices=("auto", "off", "bf16"), default=amp, help=f"mixed precision [{amp}]")
    add("--compile", action="store_true", help="torch.compile: a slow start, then faster; for CUDA")
    add("--seed", type=at_least(0), default=0, help="seed of all noise [0]")
    add("-n", type=at_least(1), help=f"how many pictures [{n}]")


def add_sampling_flags(parser):
    """Flags of the commands that draw samples."""
    add = parser.add_argument
    add("--batch-size", type=at_least(1), default=128, help="pictures computed at a time [128]")
    add("--steps", type=at_least(1), default=0, dest="ddim_steps", help="DDIM in so many steps")
    add("--eta", type=float, default=1.0, help="noise of DDIM, 0 to 1, as much as DDPM's [1]")


def make_parser():
    """The parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = add_command(commands, "train", train_command, "the run's folder [runs/NAME]")
    start = train.add_mutually_exclusive_group()
    start.add_argument("--preset", choices=PRESETS, help="[cifar10 with an accelerator, else tiny]")
    start.add_argument("--resume", action="store_true", help="the run in --out, or the newest")
    start.add_argument("--init-from", metavar="CKPT", help="fine-tune the weights of a checkpoint")
    for field in dataclasses.fields(Config):
        how = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is tuple:
            how = {"type": int, "nargs": "*"}
        elif field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        train.add_argument(flag_of(field.name), help=field.metadata["help"], **how)

    sample = add_command(commands, "sample", sample_command, "the PNG [beside the checkpoint]")
    add_network_flags(sample, n=64)
    add_sampling_flags(sample)
    sample.add_argument("--individual", action="store_true", help="each picture as a file, too")
    sample.add_argument("--gif", action="store_true", help="an animation of the first batch, too")

    evaluate = add_command(commands, "eval", eval_command)
    add_network_flags(evaluate, n="64, or 50000 for fid and is", amp="off")  # as in a paper
    add_sampling_flags(evaluate)
    evaluate.add_argument("--metrics", nargs="+", choices=("bpd", "fid", "is"), help="[bpd]")
    evaluate.add_argument("--data", default="", help="other pictures than those of the run")
    evaluate.add_argument("--samples", default="", help="a folder of pictures to score")
    evaluate.add_argument("--inception-weights", help="a file, if they can't be fetched")

    show = add_command(commands, "show", show_command, "the PNG [FIGURE.png]")
    show.add_argument("figure", choices=FIGURES)
    add_network_flags(show, n=4)
    show.add_argument("--data", default="", help="other pictures than those of the run")
    return parser


def main(argv=None):
    """The command line; returns the exit status. Mistakes are one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook, nor when the stream is closed
            stream.reconfigure(errors="backslashreplace")  # not every name can be printed
    try:
        args = make_parser().parse_args(argv)
        return args.run(args)
    except (UserError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if not (isinstance(error, MemoryError) or "of memory" in text or "ate memory" in text):
            raise
        message = f"out of memory ({error}): lower --batch-size or raise --accumulate; "
        message += "for the pictures --image-size, or on a GPU --cache-gb"
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 128 + signal.SIGINT
    print("error:", " ".join(message.split()), file=sys.stderr)  # some have several lines
    return 2


if __name__ == "__main__":
    sys.exit(main())
