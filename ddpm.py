"""Denoising Diffusion Probabilistic Models in one file, in the order of the paper.

    python ddpm.py train --data ./images   # a folder of pictures, or shapes, mnist, cifar10, ...
    python ddpm.py sample                  # new pictures from the newest run
    python ddpm.py eval                    # its bits/dim on test pictures
    python ddpm.py show progressive        # a figure: forward, progressive or interpolate

The paper is Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020
(arXiv 2006.11239). "Released" is the authors' code, hojonathanho/diffusion. The idea:

  * Destroy a picture x_0 by adding a little Gaussian noise T times, until only noise is left
    (Eq. 2). x_t can be drawn from x_0 in one jump, for any t (Eq. 4).
  * Train a network to predict, from x_t and t, which noise was added (Eq. 14, Algorithm 1).
  * Start from pure noise and remove the predicted noise in small steps (Algorithm 2).

Sections 1 and 2 are the paper; 3 to 6 train a network, sample from it and measure it; 7 and 8 are
files, devices and the command line. Shapes are (B, C, H, W): batch, channels, height, width.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision import datasets, models, utils
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

# 1. The diffusion process
# q destroys a picture x_0 in T steps; p_theta, which has the network, undoes them one by one. t
# counts as in the paper, 1..T; x_0 is the picture. As released, the network is fed t - 1.


def linear_beta_schedule(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    """Return the forward variances beta_1, ..., beta_T, linear in t (Sec. 4): (T,) float64."""
    betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
    scale = 1000 / timesteps  # so that x_T is noise for any T
    return (scale * betas).clamp(max=0.999)  # with T <= 20 they would reach 1


class Diffusion(nn.Module):
    """Two Markov chains: q adds noise; p_theta removes it, with a network model(x_t, t - 1) -> eps.

    Tables have T + 1 entries, so that table[t] is the paper's; alpha_bars[0] = 1, other entries 0
    mean nothing. The reverse variance (Sec. 3.2) is beta_t if "fixedlarge", else beta~_t.
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
        # Sampling never uses sigma_1, L_0 does: as released, it is that of beta~_2, as beta~_1 = 0.
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
            raise UserError(f"--steps must be from 1 to {self.timesteps}, and --eta from 0 to 1")
        times = (1 + np.linspace(self.timesteps - 1, 0, steps).round().astype(int)).tolist()
        # float64, as 1 - alpha_bar has few digits in float32; on the CPU, as MPS has no float64
        alpha_bars = (1 - self.betas.cpu().double()).cumprod(0).tolist()
        for t, s in zip(times, [*times[1:], 0]):  # from x_t to x_s
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


# 2. The network
# The U-Net of Appendix B as released, with the parameter names under which the authors' weights are
# published (google/ddpm-cifar10-32). h is a feature map, temb the embedded time.


def setting(default, help, choices=None):
    """Declare a field of Config, with the help text and the choices of its flag."""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    metadata = {"help": f"{help} [{shown}]", "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


PRECISIONS = ("auto", "off", "bf16", "fp16")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The settings that weights are learned for. Resuming and fine-tuning can't change them."""

    image_size: int = setting(32, "height and width of the pictures in pixels")
    channels: int = setting(3, "3 for colour, 1 for grey", choices=(1, 3))
    base_channels: int = setting(128, "channels at full resolution, best a multiple of 32")
    channel_mults: tuple = setting((1, 2, 2, 2), "channels of each level, as multiples of the base")
    num_res_blocks: int = setting(2, "residual blocks per level on the way down, one more going up")
    attention_resolutions: tuple = setting((16,), "sizes of feature maps that have self-attention")
    group_size: int = setting(
        4, "least number of channels in a GroupNorm group", choices=(4, 8, 16)
    )
    timesteps: int = setting(1000, "T, the number of noising steps")


@dataclasses.dataclass(frozen=True)
class Config(Architecture):
    """The settings of a run; by default the paper's for CIFAR-10. Raises UserError."""

    dropout: float = setting(0.1, "dropout inside the residual blocks")
    variance: str = setting("fixedlarge", "reverse variance", choices=("fixedlarge", "fixedsmall"))
    steps: int = setting(800_000, "optimiser steps of the whole run")
    batch_size: int = setting(128, "pictures in an optimiser step, on all GPUs together")
    accumulate: int = setting(1, "passes that split a GPU's part of a batch, to save memory")
    lr: float = setting(2e-4, "peak learning rate of Adam")
    adam_beta_2: float = setting(0.999, "Adam's beta_2")
    warmup: int = setting(5000, "steps of linear warm-up, a quarter of the run at most")
    lr_decay: float = setting(0.0, "last fraction of the run, over which the rate falls to 0")
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0 means no clipping")
    ema_decay: float = setting(0.9999, "decay of the moving average (EMA) of the weights")
    flip: bool = setting(True, "mirror half of the pictures, left to right")
    seed: int = setting(0, "seed of all random numbers")
    amp: str = setting("auto", "mixed precision", choices=PRECISIONS)
    compile: bool = setting(False, "use torch.compile: a slow start, then faster; for CUDA")
    data: str = setting("", "a folder of pictures, or one of SETS")
    log_every: int = setting(100, "steps between rows of log.csv")
    save_every: int = setting(5000, "steps between checkpoints, each with a grid of samples")

    def __post_init__(self):
        multiple = 2 ** (len(self.channel_mults) - 1)  # each level but the first halves the size
        if self.image_size % multiple:
            raise UserError(f"--image-size {self.image_size} must be a multiple of {multiple}")
        if self.timesteps < 2 or not 0 <= self.dropout <= 1:
            raise UserError("--timesteps must be at least 2, and --dropout from 0 to 1")

    def sizes(self):
        """Return the height, or width, of each level's feature maps."""
        return [self.image_size // 2**i for i in range(len(self.channel_mults))]

    def shape(self, n):
        """Return the shape of n pictures: (n, C, H, W)."""
        return n, self.channels, self.image_size, self.image_size


FIXED = {field.name for field in dataclasses.fields(Architecture)}
SETTINGS = {field.name for field in dataclasses.fields(Config)}


def sinusoidal_embedding(t, dim):
    """Embed times t: (B,) as in the Transformer: (B, dim) float32, first sines, then cosines."""
    half = dim // 2  # the frequencies fall from 1 to 1/10000, both included: hence half - 1
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], 1)


def group_norm(config, channels):
    """Build a GroupNorm of 32 groups, or fewer, so that each has group_size channels or more.

    128 channels are 32 groups of 4; in `tiny`, 16 channels are one group, and 64 are 4 groups. A
    group of one channel would subtract temb again, and small groups at full resolution lose how
    bright a picture is. Raises UserError if the channels can't be split so.
    """
    groups = min(32, channels // config.group_size)
    if channels % config.group_size or channels % groups:
        raise UserError(f"{channels} channels can't be grouped: change --base-channels")
    return nn.GroupNorm(groups, channels, eps=1e-6)  # TensorFlow's eps, not PyTorch's


class ResBlock(nn.Module):
    """Add to a shortcut two convolutions, with temb in between: (B, C_in, H, W) -> (B, C, H, W)."""

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
    """Add self-attention over all positions, with a single head: (B, C, H, W) -> (B, C, H, W)."""

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
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])  # (B, 1, HW, C)
        h = self.to_out(h[:, 0])  # softmax(q k^T / sqrt(C)) v, projected
        return x + h.transpose(1, 2).view_as(x)


def downsample(channels):
    """Build a layer that halves height and width: (B, C, H, W) -> (B, C, H/2, W/2)."""
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # TensorFlow's SAME: right and bottom only
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv))


def upsample(channels):
    """Build a layer that doubles height and width: (B, C, H, W) -> (B, C, 2H, 2W)."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(resize=nn.Upsample(scale_factor=2), conv=conv))


class Level(nn.Module):
    """Hold the layers of one resolution: resnets[i], then attentions[i] or nothing, and so on."""

    def __init__(self):
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def add(self, config, channels_in, channels, attend):
        """Append a ResBlock and, if `attend`, an Attention after it."""
        self.resnets.append(ResBlock(config, channels_in, channels))
        self.attentions.append(Attention(config, channels) if attend else nn.Identity())


class UNet(nn.Module):
    """Predict the noise in x_t: (B, C, H, W) at times t: (B,). Returns (B, C, H, W) float32."""

    def __init__(self, config):
        super().__init__()
        self.base_channels = base = config.base_channels
        linear_1 = nn.Linear(base, 4 * base)
        linear_2 = nn.Linear(4 * base, 4 * base)
        layers = OrderedDict(linear_1=linear_1, act=nn.SiLU(), linear_2=linear_2)
        self.time_embedding = nn.Sequential(layers)
        self.conv_in = nn.Conv2d(config.channels, base, 3, padding=1)
        skips = [base]  # the channels of each feature map that the way up will take
        sizes = config.sizes()  # a level each, half the size of the one before it
        levels = list(zip(sizes, config.channel_mults))

        self.down_blocks = nn.ModuleList()
        for size, mult in levels:
            level = Level()
            for _ in range(config.num_res_blocks):
                level.add(config, skips[-1], base * mult, size in config.attention_resolutions)
                skips.append(base * mult)
            if size != sizes[-1]:
                level.downsamplers.append(downsample(skips[-1]))
                skips.append(skips[-1])
            self.down_blocks.append(level)

        channels = skips[-1]
        self.mid_block = Level()
        self.mid_block.add(config, channels, channels, attend=True)
        self.mid_block.add(config, channels, channels, attend=False)

        self.up_blocks = nn.ModuleList()
        for size, mult in reversed(levels):
            level = Level()
            for _ in range(config.num_res_blocks + 1):
                channels_in = channels + skips.pop()
                channels = base * mult
                level.add(config, channels_in, channels, size in config.attention_resolutions)
            if size != sizes[0]:
                level.upsamplers.append(upsample(channels))
            self.up_blocks.append(level)

        self.conv_norm_out = group_norm(config, channels)
        self.conv_out = nn.Conv2d(channels, config.channels, 3, padding=1)
        for name, weights in self.named_parameters():
            if name.endswith(("bias", "conv2.weight", "to_out.0.weight", "conv_out.weight")):
                nn.init.zeros_(weights)  # so each block starts as its shortcut, and eps as 0
            elif weights.dim() > 1:  # the gain of a norm stays 1
                nn.init.xavier_uniform_(weights)

    def forward(self, x_t, t):
        temb = self.time_embedding(sinusoidal_embedding(t, self.base_channels))  # (B, 4 base)
        h = self.conv_in(x_t)  # (B, base, H, W)
        skips = [h]
        for level in self.down_blocks:  # (B, C, H, W) -> (B, C', H/2, W/2) -> ...
            for resnet, attention in zip(level.resnets, level.attentions):
                h = attention(resnet(h, temb))
                skips.append(h)
            for halve in level.downsamplers:  # one, but none at the last level
                h = halve(h)
                skips.append(h)
        for resnet, attention in zip(self.mid_block.resnets, self.mid_block.attentions):
            h = attention(resnet(h, temb))
        for level in self.up_blocks:  # ... -> (B, C', H/2, W/2) -> (B, C, H, W)
            for resnet, attention in zip(level.resnets, level.attentions):
                h = attention(resnet(torch.cat([h, skips.pop()], 1), temb))
            for double in level.upsamplers:
                h = double(h)
        return self.conv_out(F.silu(self.conv_norm_out(h))).to(x_t.dtype)  # not autocast's dtype


def build(config, device=None):
    """Return the (UNet, Diffusion) of a Config."""
    return UNet(config).to(device), Diffusion(config.timesteps, config.variance).to(device)


# 3. Pictures
# The network sees float32 in [-1, 1]; files and memory hold uint8. Section 7 reads the files.


def to_unit(pictures):
    """Map uint8, 0..255, to float32 in [-1, 1] (Sec. 3.3)."""
    return pictures.float() / 127.5 - 1


def to_uint8(x_0):
    """Map float32 in [-1, 1] to uint8, 0..255; rounded, as a cast alone would make it darker."""
    levels = (x_0.clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8)


def grid(pictures, columns=None):
    """Tile pictures, uint8 (N, C, H, W), into a PIL image, square unless `columns` is given."""
    columns = columns or math.ceil(len(pictures) ** 0.5)
    return to_pil_image(utils.make_grid(pictures.cpu(), columns, pad_value=255))


@functools.lru_cache(2)  # a batch can begin in one epoch and end in the next
def epoch_order(n, seed, epoch):
    """Shuffle range(n) into a list that depends on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(seed_of(seed, EPOCH, epoch))
    return torch.randperm(n, generator=generator).tolist()


def batch_of(pictures, seed, first, size):
    """Take `size` pictures, from number `first` on, of the endless sequence of shuffled epochs."""
    n = len(pictures)
    rows = []
    for number in range(first, first + size):
        epoch, place = divmod(number, n)
        rows.append(epoch_order(n, seed, epoch)[place])
    return torch.from_numpy(pictures[rows])


# 4. Training
# Algorithm 1. From section 7: `progress` passes items on and shows how far they are, `say` prints,
# `write_file` writes whole files, `seed_of` derives seeds, `over_processes` asks all GPUs.

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
    "tiny": Config(  # minutes on two CPU cores: few channels where the feature maps are large
        base_channels=16,
        channel_mults=(1, 2, 4, 8),
        num_res_blocks=1,
        attention_resolutions=(),
        group_size=16,
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


def train(config, model, diffusion, pictures, out, checkpoint, signals=()):
    """Train on pictures, uint8 (N, C, H, W); write checkpoints, log.csv and grids to folder `out`.

    All noise depends on the seed and the step alone: on a CPU, a resumed run ends bit for bit where
    an unbroken one does. Returns the signal that ended the run, or 0. Raises UserError.
    """
    device = diffusion.betas.device
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    dtype = pick_precision(device, config.amp)
    fp16 = dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)  # without fp16, it does nothing
    saved = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    for name, part in saved.items():
        if checkpoint.get(name):  # to fine-tune, there is no optimiser; without fp16, no scale
            part.load_state_dict(checkpoint[name])
    done = checkpoint.get("step", 0)
    log = checkpoint.get("log", ["step,loss,lr,grad_norm\n"])

    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    net = torch.compile(net) if config.compile else net
    predict = in_precision(net, device, dtype)
    say(f"run folder {out}: {len(pictures):,} pictures, {device.type} in {dtype or 'float32'}")
    say(str(config))
    if done == 0:  # a disk that can't be written shows before the work
        save_checkpoint(out, config, saved, done, log)

    losses, notes = [], []
    steps = range(done, config.steps)
    for step in progress(steps, "step", config.steps, config.batch_size, done, notes):
        lr = learning_rate(config, step)
        optimizer.param_groups[0].update(lr=lr, betas=(0.9, config.adam_beta_2))
        for x_0 in parts_of_batch(config, pictures, step, device):  # Algorithm 1, line 2
            loss = diffusion.loss(predict, x_0)  # lines 3 to 5
            scaler.scale(loss / config.accumulate).backward()
            losses.append(loss.detach())
        scaler.unscale_(optimizer)
        largest = config.grad_clip if config.grad_clip > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
        scaler.step(optimizer)  # but not if a gradient overflows in fp16
        scaler.update()
        optimizer.zero_grad()
        update_ema(ema, model, config.ema_decay, step)

        done = step + 1
        stopped = over_processes(torch.tensor(max(signals, default=0)), dist.ReduceOp.MAX)
        saving = stopped or done == config.steps or done % config.save_every == 0
        if saving or done % config.log_every == 0:  # reading the loss waits for the device
            loss = over_processes(torch.stack(losses).mean()) / WORLD
            losses.clear()
            if not math.isfinite(loss if fp16 else loss + norm):
                raise UserError(f"loss not finite at step {done}: resume with a lower --lr")
            log.append(f"{done},{loss:.6f},{lr:.6g},{norm:.4f}\n")
            notes[:] = [f"loss {loss:.4f}", f"lr {lr:.1e}"]
            write_file(out / "log.csv", lambda path: path.write_text("".join(log)))
        if saving:
            save_checkpoint(out, config, saved, done, log)
        if stopped and done < config.steps:
            return stopped
        if saving:  # as many pictures as x_0 has, at most 64, always from the same noise
            numbers, ddim_steps = range(min(64, len(x_0))), min(50, config.timesteps)
            sampler = in_precision(ema, device, dtype)
            _, chain = draw(sampler, diffusion, config, config.seed, numbers, ddim_steps)
            write_file(out / f"step-{done:06}.png", grid(end_of(chain)).save)
    return 0


def parts_of_batch(config, pictures, step, device):
    """Yield this process's parts x_0: (b, C, H, W) of a step's batch, and seed each one's noise."""
    size = config.batch_size // (config.accumulate * WORLD)
    for part in range(RANK * config.accumulate, (RANK + 1) * config.accumulate):
        torch.manual_seed(seed_of(config.seed, STEP, step, part))
        first = step * config.batch_size + part * size
        x_0 = to_unit(batch_of(pictures, config.seed, first, size).to(device))
        if config.flip:
            mirrored = torch.rand(size, 1, 1, 1, device=device) < 0.5
            x_0 = torch.where(mirrored, x_0.flip(3), x_0)
        yield x_0


def learning_rate(config, step):
    """Return Adam's rate: linear warm-up, constant (Appendix B), linear to 0 if lr_decay > 0."""
    warmup = min(config.warmup, config.steps // 4)
    rise = min(1, (step + 1) / max(1, warmup))
    fall = min(1, (config.steps - step) / max(1, config.lr_decay * config.steps))
    return config.lr * rise * fall


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Move the EMA of the weights: ema <- decay * ema + (1 - decay) * model; step counts from 0."""
    decay = min(decay, (1 + step) / (10 + step))  # low at first; then one lerp_ for all weights
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def save_checkpoint(out, config, saved, step, log):
    """Write out/ckpt.pt, from which a run is resumed: the states of `saved`, and how far it is."""
    checkpoint = {"config": dataclasses.asdict(config), "step": step, "log": log}
    for name, part in saved.items():
        checkpoint[name] = part.state_dict()
    write_file(out / "ckpt.pt", functools.partial(torch.save, checkpoint))


# 5. Samples and figures
# Algorithm 2. A chain is a generator of (t, x_{t-1}, predicted x_0), for t = T, ..., 1.


def draw(model, diffusion, config, seed, numbers, steps=0, eta=1.0):
    """Return x_T of the pictures `numbers` of a seed, and the chain that draws them from it."""
    randn_like = seeded_randn_like(seed, numbers, diffusion.betas.device)
    x_T = randn_like(torch.empty(config.shape(len(numbers))))
    if steps or eta != 1:
        steps = steps or diffusion.timesteps
        return x_T, diffusion.sample_ddim(model, x_T, steps, eta, randn_like)
    return x_T, diffusion.sample(model, x_T, randn_like=randn_like)


def end_of(chain):
    """Run a chain and return its pictures: uint8 (B, C, H, W)."""
    _, x_0, _ = deque(chain, maxlen=1).pop()  # this runs the chain, and keeps its end
    return to_uint8(x_0)


def filmed(x_T, chain, steps, frames):
    """Pass a chain on; append grids of at most 64 pictures to `frames`: x_T, then 60 or fewer."""
    frames.append(grid(to_uint8(x_T[:64])))
    for done, (t, x_t, x_0) in enumerate(chain, 1):
        if (steps - done) % math.ceil(steps / 60) == 0:
            frames.append(grid(to_uint8(x_t[:64])))
        yield t, x_t, x_0


def sample_command(args):
    """Draw new pictures with a trained network."""
    model, diffusion, config, path = load_network(args)
    steps = args.steps or diffusion.timesteps
    batches = torch.arange(args.n).split(args.batch_size)
    shown, frames = [], []
    with new_folder(args.out, path.with_name("samples")) as out:
        for done, numbers in enumerate(batches):
            numbers = numbers.tolist()
            x_T, chain = draw(model, diffusion, config, args.seed, numbers, args.steps, args.eta)
            if args.gif and done == 0:
                chain = filmed(x_T, chain, steps, frames)
            what = f"batch {done + 1} of {len(batches)}, step"
            chain = progress(chain, what, steps, len(numbers) / steps)
            pictures = end_of(chain).cpu()  # Algorithm 2 runs here
            shown.extend(pictures[: 256 - len(shown)])  # more would be hard to see, and to hold
            if args.individual:
                for number, picture in zip(numbers, pictures):
                    write_file(out / "pictures" / f"{number:06}.png", to_pil_image(picture).save)

        write_file(out / "grid.png", grid(torch.stack(shown)).save)
        if args.gif:
            times = [60] * (len(frames) - 1) + [2000]  # milliseconds
            how = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
            write_file(out / "chain.gif", functools.partial(frames[0].save, **how))
        files = ", ".join(sorted(map(str, out.iterdir())))
    say(f"wrote {files}: {args.n} pictures of seed {args.seed}; for others, --seed {args.seed + 1}")


def forward(args):
    """Show pictures, and the same with more and more of one noise (Eq. 4)."""
    x_0 = to_unit(some_pictures(args.data, Config(image_size=64), args.n, args.seed))
    eps = seeded_randn_like(args.seed, range(len(x_0)), "cpu")(x_0)
    times = range(1, 1001, 111)
    diffusion = Diffusion()
    columns = [x_0] + [diffusion.q_sample(x_0, t, eps) for t in times]
    return torch.stack(columns, 1), f"columns: x_0, t = {[*times]}"


def progressive(args):
    """Show x_t in a row, and under it the x_0 predicted from it (Fig. 6)."""
    model, diffusion, config, _ = load_network(args)
    T = diffusion.timesteps
    times = range(T, 0, -math.ceil(T / 11))
    x_t, chain = draw(model, diffusion, config, args.seed, range(args.n))
    columns = []
    for t, x_next, x_0 in progress(chain, "sampling, step", T, args.n / T):
        if t in times:
            columns.append(torch.stack([x_t, x_0], 1).flatten(0, 1))
        x_t = x_next
    columns.append(torch.stack([x_t, x_t], 1).flatten(0, 1))
    return torch.stack(columns, 1), f"columns: t = {[*times]}, x_0; rows: x_t, predicted x_0"


def interpolate(args):
    """Show two pictures, noised to T/2, mixed there in tenths, and denoised (Fig. 8)."""
    model, diffusion, config, _ = load_network(args)
    device = diffusion.betas.device
    pictures = some_pictures(args.data or config.data, config, 2, args.seed)
    x_0 = to_unit(pictures.to(device))[[0, -1]]  # a folder of one picture has it twice
    eps = seeded_randn_like(args.seed, [0, 1], device)(x_0)
    t = diffusion.timesteps // 2
    a, b = diffusion.q_sample(x_0, t, eps)
    x_t = torch.stack([a.lerp(b, tenth / 10) for tenth in range(11)])
    randn_like = seeded_randn_like(args.seed, [2] * 11, device)  # one z for all
    chain = progress(diffusion.sample(model, x_t, t, randn_like), "interpolating, step", t, 11 / t)
    row = torch.cat([x_0[:1], to_unit(end_of(chain)), x_0[1:]])
    return row[None], f"columns: source, 0 to 1 in tenths at t = {t}, source"


FIGURES = {"forward": forward, "progressive": progressive, "interpolate": interpolate}


def show_command(args):
    """Draw a figure of the paper as a PNG."""
    out = Path(args.out or f"{args.figure}.png")
    if out.suffix != ".png" or out.exists():
        raise UserError(f"--out {out} must be a new file, and end in .png")
    figure, text = FIGURES[args.figure](args)  # (rows, columns, C, H, W) in [-1, 1]
    pictures = to_uint8(figure.flatten(0, 1))
    write_file(out, grid(pictures, columns=figure.shape[1]).save)
    say(f"wrote {out}, {text}")


# 6. Evaluation
# The bound of Eq. 5 in bits per dimension; and FID, which compares drawn pictures with real ones.


def eval_command(args):
    """Print the bits/dim of a network, or the FID of pictures on disk."""
    if args.samples:
        return print_fid(args)
    model, diffusion, config, _ = load_network(args)
    data = args.data or config.data
    pictures = some_pictures(data, config, args.n, args.seed)
    say(f"bits/dim of {len(pictures)} pictures of {data} (the test split, if that is a named set)")
    total = diffusion.timesteps + 1
    tables = []
    for numbers in torch.arange(len(pictures)).split(args.batch_size):
        x_0 = to_unit(pictures[numbers].to(diffusion.betas.device))
        randn_like = seeded_randn_like(args.seed, numbers.tolist(), x_0.device)
        terms = diffusion.bits_per_dim(model, x_0, randn_like)
        terms = progress(terms, f"pictures from {numbers[0]}, term", total, len(x_0) / total)
        tables.append(torch.stack(list(terms)))
    table = torch.cat(tables, 1).cpu()  # (T + 1, N): L_0, ..., L_T

    rate, distortion = table[1:].sum(0), table[0]  # Sec. 4.3
    parts = {"total": rate + distortion, "rate": rate, "distortion": distortion}
    for name, bits in parts.items():
        say(f"{name:12} {bits.mean():7.4f} bits/dim")


def print_fid(args):
    """Print the FID of the pictures in folders, at their own size, against the training set."""
    training_set = find_dataset(args.data, train=True)
    samples = [path for folder in args.samples for path in find_pictures(folder)]
    sizes = {Image.open(path).size: path for path in samples}
    if len(sizes) > 1:
        (size, path), (other_size, other), *_ = sizes.items()
        raise UserError(f"samples must have one size: {path} has {size}, {other} {other_size}")
    inception = load_inception(pick_device(args.device))  # last, as it may have to be fetched

    [size] = sizes  # the only one
    ours = torch.cat([inception(batch) for batch in read_pictures(samples, size, 3)])
    theirs = torch.cat([inception(batch) for batch in read_pictures(training_set, size, 3)])
    fid = frechet_distance(ours, theirs)
    note = " (below 10,000, it comes out too high)" if len(ours) < 10_000 else ""
    say(f"FID {fid:.3f} of {len(ours)} pictures against {len(theirs)} of {args.data}{note}")


def frechet_distance(a, b):
    """Return FID (Heusel et al. 2017) of two sets of features (N, D):
    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))."""
    a, b = a.double(), b.double()
    means = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt()  # rounding can pass 0
    return (means + (cov_a + cov_b).trace() - 2 * roots.sum()).item()


INCEPTION = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)


def load_inception(device="cpu"):
    """Return TensorFlow's Inception of 2015: uint8 (B, 1 or 3, H, W) -> features (B, 2048)."""
    net = models.Inception3(1008, aux_logits=False, init_weights=False)
    how = {"map_location": "cpu", "check_hash": True, "weights_only": True}
    try:
        net.load_state_dict(torch.hub.load_state_dict_from_url(INCEPTION, **how))
    except Exception as error:  # there is no network, or the file in torch's cache is damaged
        file = Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION).name)
        raise UserError(f"save {INCEPTION} as {file}: can't fetch it ({error!s:.80})") from error
    pool_as_tensorflow(net)
    net.fc = nn.Identity()
    net.to(device).eval()

    @torch.no_grad()
    def inception(pictures):
        x = to_unit(pictures.to(device)).expand(-1, 3, -1, -1)
        return net(F.interpolate(x, (299, 299), mode="bilinear")).cpu()

    return inception


def pool_as_tensorflow(net):
    """Make torchvision's Inception3 pool as TensorFlow's graph of 2015 does.

    Its averages leave out the padding, and the last block takes a maximum. Each block pools within
    its forward: hooks change what the layer behind that, `branch_pool`, is given.
    """

    def without_padding(layer, inputs):  # a sum of 9, some of them padding, over 9
        return inputs[0] / F.avg_pool2d(torch.ones_like(inputs[0]), 3, 1, 1)

    *others, last = [block for block in net.children() if hasattr(block, "branch_pool")]
    for block in others:
        block.branch_pool.register_forward_pre_hook(without_padding)
    kept = []
    last.register_forward_pre_hook(lambda block, x: kept.append(F.max_pool2d(x[0], 3, 1, 1)))
    last.branch_pool.register_forward_pre_hook(lambda layer, inputs: kept.pop())


# 7. Files, devices, processes
# Nothing here is about diffusion. Functions raise UserError for whatever a user can mend.


class UserError(ValueError):
    """A mistake that the user can mend. `main` prints it as one line; the exit status is 2."""


class Shapes:
    """Draw circles, squares and triangles, 10,000 per split, with the interface of torchvision."""

    def __init__(self, root="", train=True, download=False):
        self.first = 0 if train else 10_000

    def __len__(self):
        return 10_000

    def __getitem__(self, i):
        rng = np.random.default_rng(self.first + i)
        radius, hue, light = rng.uniform((24, 0, 35), (48, 360, 60))
        x, y = rng.uniform(radius, 128 - radius, 2)
        image = Image.new("RGB", (128, 128), "white")
        sides, colour = (64, 4, 3)[i % 3], f"hsl({hue:.0f}, 80%, {light:.0f}%)"
        ImageDraw.Draw(image).regular_polygon((x, y, radius), sides, fill=colour)
        return image, i % 3


SETS = {  # the class, called as torchvision's are; channels; whether mirroring does no harm
    "shapes": (Shapes, 3, True),
    "mnist": (datasets.MNIST, 1, False),
    "fashion-mnist": (datasets.FashionMNIST, 1, False),
    "cifar10": (datasets.CIFAR10, 3, True),
    "cifar100": (datasets.CIFAR100, 3, True),
}


def find_dataset(data, train):
    """Return what --data names: the paths of a folder, or one of SETS, downloaded to ./data."""
    if os.path.isdir(data):
        return find_pictures(data)
    if data not in SETS:
        raise UserError(f"no pictures at --data {data!r}: name a folder, or {', '.join(SETS)}")
    kind, _, _ = SETS[data]
    try:
        return kind("data", train=train, download=True)
    except Exception as error:  # a file that was cut short may raise anything
        folder = Path("data", getattr(kind, "base_folder", kind.__name__))
        hint = f"if a download broke off, delete {folder} and try again"
        raise UserError(f"can't get {data} ({error!s:.200}): {hint}") from error


def find_pictures(folder):
    """List the pictures below a folder, links followed, hidden ones and those of runs left out."""

    def fail(error):
        raise error

    paths, seen = [], set()
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in seen or {"ckpt.pt", "config.json"} <= set(files):  # by another link; or a run
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(root, name) for name in files if not name.startswith(".")]
    endings = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = sorted(path for path in paths if path.suffix.lower() in endings)
    if not pictures:
        raise UserError(f"{folder} holds no images (looked for .png .jpg .webp ..., not in runs)")
    say(f"{folder}: {len(pictures)} of {len(paths)} files are pictures")
    return pictures


def decode(image, size, mode):
    """Crop a PIL image to (W, H) = size, upright, on white, in mode L or RGB."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("it has 32 bits a channel: save it with 8 or 16")
    image.load()
    with contextlib.suppress(Exception):  # the tags may be broken while the pixels are whole
        image.getexif()  # keeps the orientation; exif_transpose would write all tags anew, or fail
    for tags in ("exif", "Raw profile type exif"):
        image.info.pop(tags, None)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion cuts off at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode not in ("L", "RGB") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return ImageOps.fit(image.convert(mode), size)


def read_pictures(dataset, size, channels):
    """Yield a data set in batches: uint8 (B, C, H, W), cropped to (W, H) = size."""

    def read(i):
        item = dataset[i]  # a path, or an image and its label
        try:
            image = Image.open(item) if isinstance(item, Path) else item[0]
            return pil_to_tensor(decode(image, size, "L" if channels == 1 else "RGB"))
        except Exception as error:  # a decoder may raise anything on a broken file
            if lacks_memory(error):
                raise MemoryError(f"{item}: {error}") from error
            say(f"skipped a broken picture, {item}: {error or type(error).__name__}")

    parts = torch.arange(len(dataset)).split(64)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = 0
    with ThreadPoolExecutor(min(16, cores)) as threads:  # Pillow releases the GIL
        for part in progress(parts, "reading pictures, batch", len(parts), 64):
            pictures = list(filter(torch.is_tensor, threads.map(read, part.tolist())))
            found += len(pictures)
            if pictures:
                yield torch.stack(pictures)
    if not found:
        raise UserError(f"none of the {len(dataset)} pictures can be read")


def some_pictures(data, config, n, seed):
    """Read n pictures of `data`, or of a set's test split, shuffled: uint8 (n, C, H, W)."""
    dataset = find_dataset(data, train=False)
    shuffled = torch.utils.data.Subset(dataset, epoch_order(len(dataset), seed, 0))
    pictures = []
    for batch in read_pictures(shuffled, config.shape(1)[2:], config.channels):
        pictures.extend(batch)
        if len(pictures) >= n:
            break
    return torch.stack(pictures[:n])


def new_run(config, out):
    """Make the folder of a run, and in it pictures.bin: its pictures, decoded and resized."""
    dataset = find_dataset(config.data, train=True)

    def write_pictures(path):
        with open(path, "wb") as file:
            for batch in read_pictures(dataset, config.shape(1)[2:], config.channels):
                file.write(batch.numpy().tobytes())

    with new_folder(out, Path("runs", Path(config.data).name)) as folder:
        write_file(folder / "pictures.bin", write_pictures)
    return folder


@contextlib.contextmanager
def new_folder(out, default):
    """Make the folder `out`, new or empty, or the first free of default, default-2, ..."""
    folder, number = Path(out or default), 1
    while folder.exists() and not out:
        number += 1
        folder = default.with_name(f"{default.name}-{number}")
    try:
        folder.mkdir(parents=True, exist_ok=bool(out))
    except OSError as error:
        raise UserError(f"can't make {folder} ({error.strerror}): choose another --out") from error
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another --out")
    try:
        yield folder
    finally:
        if not out and not any(folder.iterdir()):  # nothing was written
            folder.rmdir()


def write_file(path, write):
    """On torchrun's first process, call write for another path, then rename: whole or absent."""
    if RANK > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("." + path.name)
    whole = False
    try:
        write(temporary)
        whole = True
        os.replace(temporary, path)  # if only this fails, the whole file stays under its other name
    except (OSError, RuntimeError) as error:  # torch.save's is a RuntimeError if the disk is full
        raise OSError(f"can't write {path} (a full disk?): {error}") from error
    finally:
        if not whole:
            temporary.unlink(missing_ok=True)


PUBLISHED = "diffusion_pytorch_model.bin"  # the authors' weights, as the diffusers library has them


def find_checkpoint(name=""):
    """Return the path of the checkpoint that `name` means: a file, a folder, or "", the newest."""
    if not name:
        runs = sorted(Path("runs").rglob("ckpt.pt"), key=os.path.getmtime)
        if not runs:
            raise UserError("no run below ./runs: train first, or name a checkpoint")
        return runs[-1]
    files = ("ckpt.pt", PUBLISHED, f"unet/{PUBLISHED}")
    for file in ("", *files):
        if Path(name, file).is_file():
            return Path(name, file)
    raise UserError(
        f"no checkpoint at {name} (it may be, or hold, {', '.join(files)}, not .safetensors)"
    )


def load_checkpoint(path):
    """Load a run or published weights: return (EMA network, Diffusion, Config, checkpoint)."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if path.name == PUBLISHED:
            checkpoint = from_published(path, checkpoint)
        differing = sorted(SETTINGS ^ checkpoint["config"].keys())
        if differing:
            raise ValueError(f"another version of it has other settings: {', '.join(differing)}")
        config = Config(**checkpoint["config"])
        ema, diffusion = build(config)
        ema.load_state_dict(checkpoint["ema"])
    except Exception as error:  # the unpickler may raise anything on a damaged file
        reason = f"{error!r:.200}"
        if "Weights only" in reason:
            reason = "it is damaged, or holds code, which isn't run"
        raise UserError(f"{path} is not a checkpoint of this ddpm.py: {reason}") from error
    return ema.eval().requires_grad_(False), diffusion, config, checkpoint


def from_published(path, weights):
    """Convert published weights to a checkpoint. Raises ValueError if it is another network."""
    given = json.loads(path.with_name("config.json").read_bytes())
    expected = {"norm_num_groups": 32, "norm_eps": 1e-6, "downsample_padding": 0, "act_fn": "silu"}
    expected |= {"attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1}
    if not expected.items() <= given.items():  # what the shapes of the weights don't show
        raise ValueError(f"its config.json differs from {expected}")
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for old, new in names.items():
        weights = {name.replace(f".{old}.", f".{new}."): w for name, w in weights.items()}
    preset = "cifar10" if given["sample_size"] == 32 else "celebahq256"
    return {"config": dataclasses.asdict(PRESETS[preset]), "ema": weights}


def load(path="", device="cpu"):
    """Load the checkpoint that `path` means to sample from it: (EMA network, Diffusion, Config)."""
    model, diffusion, config, _ = load_checkpoint(find_checkpoint(path))
    return model.to(device), diffusion.to(device), config


def load_network(args):
    """Load --ckpt for --device and --amp: return (model, Diffusion, Config, path)."""
    device = pick_device(args.device)
    dtype = pick_precision(device, args.amp)
    path = find_checkpoint(args.ckpt)
    model, diffusion, config = load(path, device)
    for layer in model.modules():
        if dtype and isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(dtype)  # once; autocast would cast the same layers at every step
    if device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # a tenth faster in sampling
    say(f"{path}: {device.type} in {dtype or 'float32'}, seed {args.seed}")
    return in_precision(model, device, dtype), diffusion, config, path


def pick_device(name):
    """Return the torch.device of --device; "auto" is the accelerator, if there is one."""
    best = torch.device("cpu")
    if torch.accelerator.is_available():
        best = torch.accelerator.current_accelerator()
    if name not in ("auto", "cpu", best.type):
        raise UserError(f"--device {name}: torch finds none on this machine, use auto or cpu")
    if best.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return best if name == "auto" else torch.device(name)


def pick_precision(device, amp):
    """Return the dtype of --amp, None for float32; "auto" is the fastest, never an emulated one."""
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    torch.backends.cudnn.allow_tf32 = amp != "off"  # "off" is float32 in convolutions, too
    dtypes = {"auto": None, "off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes["auto"] = torch.bfloat16
    elif device.type == "cuda" and torch.cuda.get_device_capability() >= (7, 0):  # tensor cores
        dtypes["auto"] = torch.float16
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older torch can't tell
        can = torch.cpu.get_capabilities()
        if can.get("amx_bf16") or can.get("avx512_bf16"):
            dtypes["auto"] = torch.bfloat16
    return dtypes[amp]


def in_precision(model, device, dtype):
    """Return model(x_t, t), computed in mixed precision of this dtype, or in float32 if None."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)(model)  # it wraps calls


def lacks_memory(error):
    """Tell whether an error of Python, Pillow or torch says that there is not enough memory."""
    signs = ("out of memory", "allocate memory", "enough memory", "alloc_failed")
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


EPOCH, STEP, PICTURE = range(3)  # the first number of a key: keeps different random streams apart


def seed_of(seed, *key):
    """Derive a seed from the run's seed and a key: one of the tags above, then integers."""
    sequence = np.random.SeedSequence(abs(seed), spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0])


def seeded_randn_like(seed, numbers, device):
    """Return a randn_like that draws row i from a generator of its own, for picture numbers[i]."""
    seeds = [seed_of(seed, PICTURE, number) for number in numbers]
    generators = [torch.Generator(device).manual_seed(s) for s in seeds]

    def randn_like(x):
        rows = [torch.randn(x.shape[1:], generator=g, device=device) for g in generators]
        return torch.stack(rows)

    return randn_like


TERMINAL = hasattr(sys.stdout, "isatty") and sys.stdout.isatty()  # not a file, nor a notebook
RANK = int(os.environ.get("RANK", 0))  # the number of this process among torchrun's
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are


def over_processes(tensor, op=dist.ReduceOp.SUM):
    """Combine a tensor's number with those of torchrun's other processes."""
    if WORLD > 1:
        dist.all_reduce(tensor, op)
    return tensor.item()


def say(text, end="\n"):
    """Print a line on torchrun's first process; in a terminal, it replaces the progress line."""
    try:
        if RANK == 0:
            print("\r\x1b[K" + text if TERMINAL else text, end=end, flush=True)
    except OSError:  # nobody reads the output any longer
        sys.stdout = None


def progress(items, what, total, images, first=0, notes=()):
    """Yield items, of `images` images each, and show how far they are; in a file, every 30 s."""
    start = shown = time.perf_counter()
    for done, item in enumerate(items, first + 1):
        yield item
        now = time.perf_counter()
        if done == total or now - shown > (0.1 if TERMINAL else 30):
            shown = now
            seconds = (now - start) / (done - first)  # per item
            left = timedelta(seconds=round(seconds * (total - done)))
            speed = f"{images / seconds:.3g} images/s"
            line = "  ".join([f"{what} {done}/{total}", *notes, speed, f"{left} left"])
            live = done < total and TERMINAL
            width = shutil.get_terminal_size().columns - 1 if live else None  # longer lines wrap
            say(line[:width], end="" if live else "\n")


@contextlib.contextmanager
def noted_signals():
    """Collect Ctrl-C and SIGTERM in a list, so that `train` can finish its step and save."""
    noted, usual = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # in a thread, Python doesn't allow it
            usual[number] = signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


# 8. The command line
# Each command is a function of the parsed arguments; `sample`, `show` and `eval` stand above.


def train_command(args):
    """Train a network on a folder of pictures, or on a data set by name."""
    config, checkpoint, out = choose_config(args)
    device = pick_device(args.device)
    torch.manual_seed(config.seed % 2**63)
    model, diffusion = build(config, device)
    if WORLD > 1:  # gloo is for CPU tensors; the others wait while pictures are decoded: 3 hours
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    if RANK == 0 and not out:
        out = new_run(config, args.out)
    if WORLD > 1:  # the others wait for the folder
        folder = [out]
        dist.broadcast_object_list(folder, device=torch.device("cpu"))
        out = folder[0]
    settings = json.dumps(dataclasses.asdict(config), indent=2)
    write_file(out / "config.json", lambda path: path.write_text(settings))
    try:
        pictures = np.memmap(out / "pictures.bin", np.uint8, "r").reshape(config.shape(-1))
    except ValueError as error:
        raise UserError(f"{out}/pictures.bin is not whole: {error}") from error
    with noted_signals() as signals:
        stopped = train(config, model, diffusion, pictures, out, checkpoint, signals)
    if WORLD > 1:  # not after an error: it would wait for the others, which torchrun ends
        time.sleep(0.1)  # torch 2.6 hangs if a thread of its own still needs Python
        dist.destroy_process_group()
    if stopped:
        say(f"stopped and saved; to resume: python ddpm.py train --resume {shlex.quote(str(out))}")
        return 128 + stopped
    say(f"finished; to draw new pictures: python ddpm.py sample --ckpt {shlex.quote(str(out))}")


def choose_config(args):
    """Return train's Config, the checkpoint to start from, if any, and the folder to resume in."""
    given = {}
    for name in SETTINGS & vars(args).keys():
        value = getattr(args, name)
        given[name] = tuple(value) if isinstance(value, list) else value
    if os.path.isdir(given.get("data", "")):
        given["data"] = os.path.abspath(given["data"])
    checkpoint, out = {}, None
    if args.resume is None and not args.init_from:
        slow = pick_device(args.device).type == "cpu"
        config = PRESETS[args.preset or ("tiny" if slow else "cifar10")]
        if given.get("data") in SETS:
            _, channels, flip = SETS[given["data"]]
            config = dataclasses.replace(config, channels=channels, flip=flip)
    else:
        path = find_checkpoint(args.init_from or args.resume)
        ema, _, config, checkpoint = load_checkpoint(path)
        for name in FIXED:
            if given.get(name, getattr(config, name)) != getattr(config, name):
                raise UserError(f"{path} was trained with another {name}, which can't be changed")
    if args.init_from:
        checkpoint = {"model": ema.state_dict(), "ema": ema.state_dict()}
    if args.resume is not None:
        if "optimizer" not in checkpoint:
            raise UserError(f"{path} holds only weights: fine-tune them with --init-from")
        if args.out or given.get("data", config.data) != config.data:
            raise UserError(f"{path} resumes in its folder, on its pictures: else use --init-from")
        if checkpoint["step"] >= given.get("steps", config.steps):
            raise UserError(f"{path} is finished after {checkpoint['step']} steps: raise --steps")
        out = path.parent
    config = dataclasses.replace(config, **given)
    if config.batch_size % (config.accumulate * WORLD):
        raise UserError(f"--batch-size must be a multiple of --accumulate x {WORLD} (processes)")
    sizes, wanted = config.sizes(), config.attention_resolutions
    for size in given.get("attention_resolutions", ()):
        if size not in sizes:
            raise UserError(f"--attention-resolutions {size} must be among {sizes}")
    if wanted and not set(wanted) & set(sizes):  # a preset's, for pictures of another size
        config = dataclasses.replace(config, attention_resolutions=(sizes[-1],))
    return config, checkpoint, out


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like all others of this program."""

    def error(self, message):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def positive(text):
    """Convert an argument to a whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def add_command(commands, name, run, n=0, amp="auto"):
    """Add the command that calls `run`; if it loads a network, it takes n pictures by default."""
    about = {"help": run.__doc__, "description": run.__doc__, "allow_abbrev": False}
    parser = commands.add_parser(name, **about)
    parser.set_defaults(run=run)
    add = parser.add_argument
    if n:
        add("--ckpt", default="", help="checkpoint, run's folder or published weights [newest run]")
        add("-n", type=positive, default=n, help=f"how many pictures [{n}]")
        add("--seed", type=int, default=0, help="seed of all random numbers [0]")
        add("--device", default="auto", help="cpu, cuda or mps [auto]")
        add("--amp", choices=PRECISIONS, default=amp, help=f"mixed precision [{amp}]")
    return parser


def make_parser():
    """Build the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.set_defaults(run=lambda args: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND")

    train = add_command(commands, "train", train_command)
    train.description += " Defaults in brackets are those of cifar10; on a CPU the preset is tiny."
    add, start = train.add_argument, train.add_mutually_exclusive_group().add_argument
    add("--data", default=argparse.SUPPRESS, help=f"a folder of pictures, or {', '.join(SETS)}")
    start("--preset", choices=PRESETS, help="settings to start from [cifar10; on a CPU tiny]")
    start("--resume", nargs="?", const="", metavar="RUN", help="go on with a run [the newest]")
    start("--init-from", metavar="CKPT", help="fine-tune the weights of a checkpoint")
    add("--out", help="the run's folder, new or empty [runs/NAME, or runs/NAME-2, ...]")
    add("--device", default="auto", help="cpu, cuda or mps [auto]")
    fields = {field.name: field for field in dataclasses.fields(Config) if field.name != "data"}
    for name, field in fields.items():
        how = {"choices": field.metadata["choices"], "type": field.type}
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif field.type is tuple:
            how = {"type": positive, "nargs": "*"}
        elif field.type is int and name not in ("warmup", "seed"):
            how["type"] = positive
        how |= {"default": argparse.SUPPRESS, "help": field.metadata["help"]}
        add("--" + name.replace("_", "-"), **how)

    add = add_command(commands, "sample", sample_command, n=64).add_argument
    add("--out", help="a new or empty folder [samples, beside the checkpoint]")
    add("--batch-size", type=positive, default=128, help="pictures computed at a time [128]")
    add("--steps", type=positive, default=0, help="steps of DDIM, which is faster [DDPM]")
    add("--eta", type=float, default=1.0, help="noise of DDIM: 0 is none, 1 as DDPM's [1]")
    add("--individual", action="store_true", help="also write each picture as a file")
    add("--gif", action="store_true", help="also write an animation of the first 64")

    add = add_command(commands, "eval", eval_command, n=64, amp="off").add_argument
    add("--batch-size", type=positive, default=128, help="pictures computed at a time [128]")
    add("--data", default="", help="pictures to measure; for FID, the training set [of the run]")
    add("--samples", nargs="+", metavar="FOLDER", help="folders of pictures: FID against --data")

    add = add_command(commands, "show", show_command, n=4).add_argument
    add("figure", choices=FIGURES)
    add("--out", help="the PNG [FIGURE.png]")
    add("--data", default="", help="pictures to start from, needed by forward [of the run]")
    return parser


def main(argv=None):
    """Run a command line; return its exit status. A mistake is one line on stderr and status 2."""
    try:
        args = make_parser().parse_args(argv)
        if WORLD > 1 and args.run is not train_command:
            raise UserError("torchrun is for train: here each process would do the same work")
        return args.run(args) or 0
    except (UserError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        message = f"out of memory: lower --batch-size or -n, raise --accumulate ({error!r:.300})"
    except KeyboardInterrupt:
        say("stopped")
        return 128 + signal.SIGINT
    say("", end="")  # the error takes the place of a progress line
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
