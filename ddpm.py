"""Denoising Diffusion Probabilistic Models in one file, in the order of the paper.

    python ddpm.py train --data ./images      # a folder of pictures, or: shapes, mnist, fashion-mnist, cifar10, ...
    python ddpm.py sample                     # new pictures from the newest run
    python ddpm.py train --help               # every hyper-parameter

The paper is Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020 (arXiv 2006.11239). "The
released code" is the authors' TensorFlow repository, hojonathanho/diffusion, which settles what the paper leaves open.

The idea, in four lines:
  * destroy a picture x_0 by adding a little Gaussian noise T times, until x_T is nothing but noise      (Eq. 2)
  * x_t can be drawn from x_0 in one jump, for any t                                                     (Eq. 4)
  * train a network to tell, from x_t and t, which noise eps was mixed in                  (Eq. 14, Algorithm 1)
  * start from pure noise and take the predicted noise out again, one small step at a time   (Eq. 11, Algorithm 2)

From file to paper:
  section of this file         what of the paper
  hyper-parameters             Sec. 4, Appendix B
  1. the diffusion process     Secs. 2 and 3: Eqs. 2, 4, 6, 7, 11, 14, Algorithms 1 and 2; DDIM (Song et al. 2020)
  2. the network               Appendix B
  3. data                      Sec. 3.3: pictures in, numbers in [-1, 1] out, and back
  4. training                  Appendix B: Adam, warm-up, gradient clipping, EMA
  5. sampling                  Sec. 4
  6. command line

Whoever has read sections 1 and 2 has understood DDPM; section 4 is what it takes to train one.

Shapes are written (B, C, H, W): pictures in the batch, channels, height, width. A picture is float32 in [-1, 1].
"""

import argparse
import copy
import dataclasses
import itertools
import math
import os
import pickle
import random
import signal
import struct
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints it as one line and exits with status 2."""


def flag(default, help, low=-math.inf, high=math.inf, choices=None):
    """A hyper-parameter: the default is the paper's for CIFAR-10, the help is what `--help` prints; its range."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def flag_name(name):
    """The flag of a field of Config: --batch-size of batch_size. `class` is no name for a field, so it is `only`."""
    return "--class" if name == "only" else "--" + name.replace("_", "-")


AMP = ("auto", "off", "bf16", "fp16")


@dataclass(frozen=True)
class Config:
    """Everything that can be turned; each field is a flag of `train`. Raises UserError for values out of range."""

    # the network
    image_size: int = flag(32, "height and width of the pictures, in pixels", low=1)
    channels: int = flag(3, "3 for colour, 1 for grey", choices=(1, 3))
    base_channels: int = flag(128, "channels at full resolution, a multiple of 32", low=32)
    channel_mults: tuple = flag((1, 2, 2, 2), "channels of each level, as multiples; each halves the picture", low=1)
    num_res_blocks: int = flag(2, "residual blocks a level on the way down (one more on the way up)", low=1)
    attention_resolutions: tuple = flag((16,), "picture sizes inside the network that get self-attention", low=1)
    dropout: float = flag(0.1, "dropout inside the residual blocks", low=0, high=1)
    # the diffusion process
    timesteps: int = flag(1000, "T, the number of noising steps", low=1)
    beta_start: float = flag(1e-4, "noise variance of the first step, for T = 1000", low=0)
    beta_end: float = flag(0.02, "noise variance of the last step, for T = 1000", low=0)
    variance: str = flag("fixedlarge", "of the reverse process, beta or beta~", choices=("fixedlarge", "fixedsmall"))
    # training
    steps: int = flag(800_000, "optimiser steps, in all", low=1)
    batch_size: int = flag(128, "pictures in an optimiser step", low=1)
    accumulate: int = flag(1, "split each batch into this many passes, to save memory", low=1)
    lr: float = flag(2e-4, "learning rate of Adam", low=0)
    warmup: int = flag(5000, "steps of linear learning-rate warm-up", low=0)
    grad_clip: float = flag(1.0, "largest global norm of the gradient", low=0)
    ema_decay: float = flag(0.9999, "decay of the moving average of the weights", low=0, high=1)
    flip: bool = flag(True, "mirror half of the pictures, left to right")
    seed: int = flag(0, "seed of every random draw", low=0)
    amp: str = flag("auto", "mixed precision; auto: where the device gains from it", choices=AMP)
    # the run
    data: str = flag("", "a folder of pictures, searched recursively, or shapes, mnist, fashion-mnist, cifar10, ...")
    only: str = flag("", "train on this class alone: a sub-folder's name, or a class of the named set")
    data_root: str = flag("data", "where the named sets are kept, and downloaded to once")
    cache_gb: float = flag(4.0, "sets up to this size are held in memory, larger ones stream from disk", low=0)
    workers: int = flag(4, "processes that read pictures", low=0)
    log_every: int = flag(100, "steps between rows of log.csv", low=1)
    sample_every: int = flag(5000, "steps between grids of samples (50 DDIM steps)", low=1)
    ckpt_every: int = flag(5000, "steps between checkpoints", low=1)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, name = getattr(self, f.name), flag_name(f.name)
            low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, str) and not low <= number <= high:
                    limit = f"at most {high}" if number > high else f"at least {low}"
                    raise UserError(f"{name} is {number}: it must be {limit}")
            if choices and value not in choices:
                raise UserError(f"{name} is {value}: it must be one of {choices}")
        if self.batch_size % self.accumulate:
            raise UserError(f"--batch-size {self.batch_size} can't be split evenly by --accumulate {self.accumulate}")


# What must agree between a checkpoint and the run that loads its weights.
NETWORK_FIELDS = ("image_size", "channels", "base_channels", "channel_mults", "num_res_blocks", "attention_resolutions")

PRESETS = {
    "cifar10": Config(),
    "celebahq256": Config(image_size=256, channel_mults=(1, 1, 2, 2, 4, 4), dropout=0.0, variance="fixedsmall",
                          steps=500_000, batch_size=64, lr=2e-5),
    "small": Config(base_channels=64, channel_mults=(1, 2, 4, 4), attention_resolutions=(16, 8), steps=100_000,
                    warmup=1000, ema_decay=0.999),
    "tiny": Config(base_channels=32, num_res_blocks=1, attention_resolutions=(8,), dropout=0.0, steps=2500,
                   batch_size=32, lr=1e-3, warmup=100, ema_decay=0.995, log_every=50, sample_every=500, ckpt_every=500),
}


# 1. The diffusion process ---------------------------------------------------------------------------------------------
#
# Time: the paper counts steps 1..T and calls the clean picture x_0. Here, as in the released code, t runs over 0..T-1,
# so that it can index a table and be fed to the network: t here is t+1 in the paper, and alpha_bars[t] is the paper's
# alpha_bar_{t+1}. x_0 is the clean picture in both, and x_t with t = 0 already holds a little noise.


def linear_beta_schedule(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    """Variances of the forward steps, beta_1..beta_T (Sec. 4): linear from beta_start to beta_end. (T,) float64.

    For T other than 1000 both ends are scaled by 1000/T, so that as much noise is added in all. Raises UserError when
    a beta falls outside (0, 1), as it does for a very small T.
    """
    scale = 1000 / timesteps if timesteps > 0 else math.inf
    if not 0 < scale * beta_start <= scale * beta_end < 1:
        raise UserError(f"T = {timesteps} steps have betas from {scale * beta_start:.4g} to {scale * beta_end:.4g}, "
                        "not rising within (0, 1): change --timesteps, --beta-start or --beta-end")
    return torch.linspace(scale * beta_start, scale * beta_end, timesteps, dtype=torch.float64)


def at(table, t):
    """Entries t: (B,) of a table: (T,), shaped (B, 1, 1, 1) so that they broadcast over pictures."""
    return table[t].view(-1, 1, 1, 1)


def seeded(device, *numbers):
    """A random generator that is a function of these numbers alone, e.g. (seed, picture)."""
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state)


class Diffusion(nn.Module):
    """The two Markov chains: q, which adds noise, and p_theta, which a network `model(x_t, t) -> eps` takes back.

    Holds tables over t = 0..T-1, computed in float64 and kept as float32 buffers (`.to(device)` moves them). `variance`
    is the reverse process's (Sec. 3.2): "fixedlarge", beta_t, or "fixedsmall", beta~_t.
    """

    def __init__(self, timesteps=1000, beta_start=1e-4, beta_end=0.02, variance="fixedlarge"):
        super().__init__()
        if variance not in ("fixedlarge", "fixedsmall"):
            raise UserError(f"variance is {variance!r}: use 'fixedlarge' or 'fixedsmall'")
        self.timesteps = timesteps
        betas = linear_beta_schedule(timesteps, beta_start, beta_end)
        alphas = 1 - betas
        alpha_bars = torch.cumprod(alphas, dim=0)
        alpha_bars_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])  # alpha_bar_0 = 1
        posterior_variance = betas * (1 - alpha_bars_prev) / (1 - alpha_bars)  # beta~, Eq. 7
        # beta~_1 is 0, its logarithm would not be finite: the released code takes beta~_2 there, in both variances.
        first = posterior_variance[1:2]
        model_variance = betas if variance == "fixedlarge" else posterior_variance
        tables = {
            "betas": betas,
            "alpha_bars": alpha_bars,
            "sqrt_alpha_bars": alpha_bars.sqrt(),
            "sqrt_one_minus_alpha_bars": (1 - alpha_bars).sqrt(),
            "posterior_mean_x_0": alpha_bars_prev.sqrt() * betas / (1 - alpha_bars),
            "posterior_mean_x_t": alphas.sqrt() * (1 - alpha_bars_prev) / (1 - alpha_bars),
            "posterior_variance": posterior_variance,
            "posterior_log_variance": torch.cat([first, posterior_variance[1:]]).log(),
            "model_log_variance": torch.cat([first, model_variance[1:]]).log(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float())

    def q_sample(self, x_0, t, eps):
        """x_t drawn from q(x_t | x_0) in one jump: x_0 with noise eps mixed in. (B, C, H, W); t: (B,). Eq. 4."""
        return at(self.sqrt_alpha_bars, t) * x_0 + at(self.sqrt_one_minus_alpha_bars, t) * eps

    def q_posterior(self, x_0, x_t, t):
        """q(x_{t-1} | x_t, x_0), a Gaussian: (mean, variance, log_variance), the last two (B, 1, 1, 1). Eqs. 6, 7.

        At t = 0 the variance is 0 and the log-variance is that of t = 1 (see the tables).
        """
        mean = at(self.posterior_mean_x_0, t) * x_0 + at(self.posterior_mean_x_t, t) * x_t
        return mean, at(self.posterior_variance, t), at(self.posterior_log_variance, t)

    def loss(self, model, x_0):
        """Algorithm 1, one step: L_simple (Eq. 14) on a batch of pictures x_0: (B, C, H, W) in [-1, 1]. A scalar."""
        # line 2: x_0 ~ q(x_0) is the batch
        t = torch.randint(0, self.timesteps, (len(x_0),), device=x_0.device)  # line 3: t ~ Uniform({1..T})
        eps = torch.randn_like(x_0)  # line 4: eps ~ N(0, I)
        x_t = self.q_sample(x_0, t, eps)
        return F.mse_loss(model(x_t, t), eps)  # line 5: || eps - eps_theta(x_t, t) ||^2

    def predict_x0(self, x_t, t, eps):
        """The x_0 that Eq. 4 would have made x_t from, if the noise was eps. (B, C, H, W), not clipped."""
        return (x_t - at(self.sqrt_one_minus_alpha_bars, t) * eps) / at(self.sqrt_alpha_bars, t)

    def p_mean_variance(self, model, x_t, t):
        """p_theta(x_{t-1} | x_t), a Gaussian: (mean, variance, log_variance, x_0), where x_0 is the network's guess.

        Without the clipping the mean would be Eq. 11, (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t).
        Going through x_0, as the released sampler does, lets it be kept inside [-1, 1], where pictures are.
        """
        x_0 = self.predict_x0(x_t, t, model(x_t, t)).clamp(-1, 1)
        mean, _, _ = self.q_posterior(x_0, x_t, t)
        log_variance = at(self.model_log_variance, t)
        return mean, log_variance.exp(), log_variance, x_0

    def p_sample(self, model, x_t, t, z=None):
        """x_{t-1} drawn from p_theta(x_{t-1} | x_t), with noise z: (B, C, H, W), drawn here if not given.

        The last step (t = 0) adds no noise, whatever z is. Algorithm 2, lines 3 and 4.
        """
        z = torch.randn_like(x_t) if z is None else z
        mean, _, log_variance, _ = self.p_mean_variance(model, x_t, t)
        return mean + (t > 0).view(-1, 1, 1, 1) * (0.5 * log_variance).exp() * z

    def ddim_step(self, model, x_t, t, s, eta, z):
        """x_s from x_t for any s < t: (B,), with noise z: (B, C, H, W); s = -1 is x_0 itself. DDIM, Eqs. 12 and 16.

        With eta = 0 nothing is random; eta = 1 over all T steps is Algorithm 2 with variance beta~_t.
        """
        noise_t = at(self.sqrt_one_minus_alpha_bars, t)
        noise_s = at(self.sqrt_one_minus_alpha_bars, s.clamp(min=0)) * (s >= 0).view(-1, 1, 1, 1)
        alpha_bar_s = 1 - noise_s**2
        x_0 = self.predict_x0(x_t, t, model(x_t, t)).clamp(-1, 1)
        eps = (x_t - at(self.sqrt_alpha_bars, t) * x_0) / noise_t  # the noise that goes with the clipped x_0
        variance = eta**2 * (noise_s / noise_t) ** 2 * (noise_t**2 - noise_s**2) / alpha_bar_s  # Eq. 16
        direction = (noise_s**2 - variance).clamp(min=0).sqrt() * eps  # rounding can take it just below 0
        return alpha_bar_s.sqrt() * x_0 + direction + variance.sqrt() * z  # Eq. 12

    @torch.no_grad()
    def sample(self, model, shape, steps=None, eta=1.0, seed=0, first=0, on_step=None):
        """Algorithm 2: pictures from noise, (B, C, H, W) = shape, in [-1, 1]. With `steps`, DDIM in that many steps.

        DDIM with eta = 0 asks more of the network than eta = 1: after a short training it may draw speckles.
        Picture i is number first + i of this seed: its noise comes from a generator of its own, so that it does not
        depend on the batch that it is made in. `on_step(t, x_t)` is called with the input of every step.
        Raises UserError when steps is not within 1..T.
        """
        if steps is not None and not 1 <= steps <= self.timesteps:
            raise UserError(f"{steps} sampling steps: this model has T = {self.timesteps}, use 1 to {self.timesteps}")
        device = self.betas.device
        generators = [seeded(device, seed, first + i) for i in range(shape[0])]

        def noise():
            return torch.stack([torch.randn(shape[1:], generator=g, device=device) for g in generators])

        times = torch.linspace(self.timesteps - 1, 0, steps or self.timesteps, dtype=torch.float64).round().long()
        x_t = noise()  # line 1: x_T ~ N(0, I)
        for step, t in enumerate(times.tolist()):  # line 2: for t = T, ..., 1
            if on_step:
                on_step(t, x_t)
            t = torch.full((shape[0],), t, device=device)
            z = noise()  # line 3: z ~ N(0, I), which the last step leaves out
            if steps is None:
                x_t = self.p_sample(model, x_t, t, z)  # line 4
            else:
                s = torch.full_like(t, times[step + 1] if step + 1 < len(times) else -1)
                x_t = self.ddim_step(model, x_t, t, s, eta, z)
        return x_t  # line 6: x_0


# 2. The network -------------------------------------------------------------------------------------------------------
#
# The U-Net of Appendix B as released. Every detail that looks odd is theirs, and the published weights need it.


def sinusoidal_embedding(t, dim):
    """The Transformer's position embedding of the step t: (B,) -> (B, dim) float32, sines first, then cosines.

    Frequencies fall from 1 to 1/10000 with both ends included, hence dim/2 - 1. Released code, nn.py.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angles = t.float()[:, None] * frequencies[None, :]  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class GroupNorm(nn.GroupNorm):
    """Group normalisation in the paper's 32 groups. (B, C, H, W) -> same.

    Networks thinner than the paper's have fewer, of 4 channels: a group of one channel would lose its mean, and with
    it the time embedding, which is added to whole channels.
    """

    def __init__(self, channels):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)  # TensorFlow's eps, not PyTorch's 1e-5

    def forward(self, x):
        return super().forward(x.contiguous())  # PyTorch's CPU kernel takes twice as long on channels_last


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, told the time in between. (B, in, H, W), (B, temb) -> (B, out, H, W)."""

    def __init__(self, in_channels, out_channels, temb_channels, dropout):
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = GroupNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Self-attention over all positions of a feature map, one head as wide as the channels. (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = nn.Linear(channels, channels)  # the paper's 1x1 convolutions
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (proj(h).unsqueeze(1) for proj in (self.q, self.k, self.v))  # (B, 1, HW, C): one head
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # softmax(q k^T / sqrt(C)) v
        return x + self.proj_out(h).transpose(1, 2).view_as(x)


class UNet(nn.Module):
    """eps_theta(x_t, t): the noise in x_t, (B, C, H, W) and t: (B,) -> (B, C, H, W).

    One level per entry of channel_mults, each half the size of the one before; attention where a level's size is in
    attention_resolutions. The defaults are CIFAR-10's 35.7 M parameters. Raises UserError, saying what would fit, on
    sizes that cannot be halved often enough, channels that 32 groups do not divide, and attention that is not reached.
    """

    def __init__(self, image_size=32, channels=3, base_channels=128, channel_mults=(1, 2, 2, 2), num_res_blocks=2,
                 attention_resolutions=(16,), dropout=0.1):
        super().__init__()
        levels, factor = len(channel_mults), 2 ** (len(channel_mults) - 1)
        if image_size < factor or image_size % factor:
            raise UserError(f"image size {image_size} can't be halved {levels - 1} times ({levels} levels): "
                            f"use a multiple of {factor}")
        if base_channels < 32 or base_channels % 32:
            raise UserError(f"{base_channels} base channels can't be normalised in groups: use a multiple of 32")
        sizes = [image_size // 2**level for level in range(levels)]
        if not set(attention_resolutions) <= set(sizes):
            raise UserError(f"attention at {attention_resolutions}, but this network's levels are {sizes} pixels: "
                            "choose among them with --attention-resolutions")
        temb_channels = 4 * base_channels

        def block(in_channels, out_channels, size):
            attention = Attention(out_channels) if size in attention_resolutions else nn.Identity()
            return nn.ModuleList([ResBlock(in_channels, out_channels, temb_channels, dropout), attention])

        self.base_channels = base_channels
        time_layers = nn.Linear(base_channels, temb_channels), nn.SiLU(), nn.Linear(temb_channels, temb_channels)
        self.time_mlp = nn.Sequential(*time_layers)
        self.conv_in = nn.Conv2d(channels, base_channels, 3, padding=1)

        h, skips = base_channels, [base_channels]  # channels that flow here, and of each map kept for the way up
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for mult, size in zip(channel_mults, sizes):
            self.down.append(nn.ModuleList())
            for _ in range(num_res_blocks):
                self.down[-1].append(block(h, base_channels * mult, size))
                h = base_channels * mult
                skips.append(h)
            if size != sizes[-1]:
                self.downsample.append(nn.Conv2d(h, h, 3, stride=2))
                skips.append(h)
        self.middle1 = ResBlock(h, h, temb_channels, dropout)
        self.middle_attention = Attention(h)
        self.middle2 = ResBlock(h, h, temb_channels, dropout)
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for mult, size in zip(reversed(channel_mults), reversed(sizes)):
            self.up.append(nn.ModuleList())
            for _ in range(num_res_blocks + 1):
                self.up[-1].append(block(h + skips.pop(), base_channels * mult, size))
                h = base_channels * mult
            if size != sizes[0]:
                self.upsample.append(nn.Conv2d(h, h, 3, padding=1))
        self.norm_out = GroupNorm(h)
        self.conv_out = nn.Conv2d(h, channels, 3, padding=1)

        for name, weights in self.named_parameters():
            if name.endswith(("bias", "conv2.weight", "proj_out.weight", "conv_out.weight")):
                nn.init.zeros_(weights)  # each residual branch starts as nothing, and so does the answer
            elif weights.dim() > 1:  # not the gains of the normalisation, which stay 1
                nn.init.xavier_uniform_(weights)

    def forward(self, x_t, t):
        temb = self.time_mlp(sinusoidal_embedding(t, self.base_channels))  # (B, 4 base)
        h = self.conv_in(x_t)  # (B, base, H, W)
        skips = [h]
        for i, level in enumerate(self.down):
            for res, attention in level:
                h = attention(res(h, temb))
                skips.append(h)
            if i < len(self.downsample):
                h = F.pad(h, (0, 1, 0, 1))  # TensorFlow's SAME: on the right and at the bottom only
                h = self.downsample[i](h)  # (B, ., H/2, W/2)
                skips.append(h)
        h = self.middle2(self.middle_attention(self.middle1(h, temb)), temb)  # the smallest size
        for i, level in enumerate(self.up):
            for res, attention in level:
                h = attention(res(torch.cat([h, skips.pop()], dim=1), temb))
            if i < len(self.upsample):
                h = self.upsample[i](F.interpolate(h, scale_factor=2, mode="nearest"))  # (B, ., 2H, 2W)
        return self.conv_out(F.silu(self.norm_out(h))).to(x_t.dtype)  # (B, C, H, W), float32 whatever autocast does


# 3. Data --------------------------------------------------------------------------------------------------------------
#
# Pictures are kept as uint8, 0..255, and become float32 in [-1, 1] batch by batch (Sec. 3.3).

SETS = {  # names for --data
    "shapes": None, "mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100, "flowers102": datasets.Flowers102,
}
EXTENSIONS = (*datasets.folder.IMG_EXTENSIONS, ".gif")
# What Pillow's many decoders raise on files that are broken, or no pictures at all.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


def to_unit(pictures):
    """uint8, 0..255 -> float32 in [-1, 1]. Sec. 3.3."""
    return pictures.float() / 127.5 - 1


def to_uint8(x_0):
    """float32 in [-1, 1] -> uint8, 0..255. Rounds to the nearest: a cast alone truncates, and darkens the picture."""
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def read_picture(source, size, channels):
    """A picture file or PIL image as a uint8 array (channels, size, size). Raises one of BROKEN if it can't be read.

    Turned as its EXIF says; transparent over white; 16 bits brought to 8; of other shapes the middle square; resized
    with antialiasing, smaller ones enlarged.
    """
    with source if isinstance(source, Image.Image) else Image.open(source) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion would clip at 255
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size))
        return np.array(image).reshape(size, size, channels).transpose(2, 0, 1)


class Shapes:
    """10,000 coloured circles, squares and triangles, drawn when asked for. Has the interface of a torchvision set."""

    classes = ("circle", "square", "triangle")
    targets = [i % 3 for i in range(10_000)]

    def __getitem__(self, i):
        uniform = random.Random(i).uniform
        radius = uniform(24, 48)
        x, y = uniform(radius, 128 - radius), uniform(radius, 128 - radius)
        colour = f"hsl({uniform(0, 360):.0f}, 80%, {uniform(35, 60):.0f}%)"
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).regular_polygon((x, y, radius), (64, 4, 3)[self.targets[i]], fill=colour)
        return image, self.targets[i]


class Pictures(torch.utils.data.Dataset):
    """The pictures of a folder or of a named set. Item i is a uint8 array (C, size, size), or says why it is broken.

    `only` keeps one class: a sub-folder, or a class of the set by name or number. Raises UserError when there are no
    pictures, no such class, or the set can't be downloaded.
    """

    def __init__(self, data, size, channels, only="", root="data", split="train"):
        self.size, self.channels, self.set = size, channels, None
        if data not in SETS:
            self.items = self.find(data, only)
            return
        part = {"split": split} if data == "flowers102" else {"train": split == "train"}
        try:
            self.set = Shapes() if data == "shapes" else SETS[data](root, download=True, **part)
        except (OSError, RuntimeError) as error:  # no network, or a damaged download
            reason = " ".join(str(error).split())
            raise UserError(f"can't get {data} into {root} ({reason}): check the network") from error
        labels = [int(label) for label in (self.set._labels if data == "flowers102" else self.set.targets)]
        names = [name.lower() for name in self.set.classes]
        wanted = names.index(only.lower()) if only.lower() in names else only
        self.items = [i for i, label in enumerate(labels) if not only or str(label) == str(wanted)]
        if not self.items:
            raise UserError(f"{data} has no class {only!r}, it has: {', '.join(self.set.classes)}")

    def find(self, folder, only):
        """Paths of all picture files below the folder, sorted; with `only`, those below a sub-folder of that name."""
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is neither a folder nor a named set ({', '.join(SETS)})")
        paths, seen = [], set()
        for parent, folders, names in os.walk(folder, followlinks=True):
            if os.path.realpath(parent) in seen:  # a link that leads back
                folders.clear()
            elif not only or only in Path(parent).relative_to(folder).parts:
                paths += [Path(parent, name) for name in names if name.lower().endswith(EXTENSIONS) and name[0] != "."]
            seen.add(os.path.realpath(parent))
        if not paths:
            where = f"{folder} has no sub-folder {only!r} that" if only else folder
            raise UserError(f"{where} holds no images (looked for {' '.join(EXTENSIONS)})")
        return sorted(paths)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:
            return read_picture(self.set[self.items[i]][0] if self.set else self.items[i], self.size, self.channels)
        except BROKEN as error:
            return f"{self.items[i]}: {error or type(error).__name__}"


def read_batches(pictures, groups, workers):
    """For each group of item numbers, those of its pictures that can be read, uint8 (., C, H, W); names the others."""
    broken = set()
    workers = min(workers, os.cpu_count(), len(pictures) // 256)
    for items in torch.utils.data.DataLoader(pictures, batch_sampler=groups, num_workers=workers, collate_fn=list):
        for item in items:
            if isinstance(item, str) and item not in broken:
                broken.add(item)
                line_end = "\n" if sys.stdout.isatty() else ""  # of the progress line
                print(f"{line_end}skipped a broken picture ({len(broken)} so far): {item}", flush=True)
        good = [item for item in items if not isinstance(item, str)]
        if good:
            yield torch.from_numpy(np.stack(good))
        elif len(broken) == len(pictures):
            raise UserError(f"none of the {len(pictures)} pictures can be read")


def load_pictures(config, device):
    """The training set, decoded once: uint8 (N, C, H, W), on the device if it fits there.

    A set larger than config.cache_gb comes back as a Pictures, to be streamed from disk.
    """
    pictures = Pictures(config.data, config.image_size, config.channels, config.only, config.data_root)
    n, size = len(pictures), len(pictures) * config.channels * config.image_size**2
    if size > config.cache_gb * 2**30:
        return pictures
    kept, progress = [], Progress("reading pictures", n)
    groups = [range(i, min(i + 256, n)) for i in range(0, n, 256)]
    for batch in read_batches(pictures, groups, config.workers):
        kept.append(batch)
        progress.update(min(256 * len(kept), n - 1))
    progress.update(n)  # not above: a group without a readable picture gives no batch
    fits = device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4
    return torch.cat(kept).to(device if fits else "cpu")


def training_batches(pictures, config, step, device):
    """The batches of training step `step` and all that follow, for ever: uint8 (B, C, H, W) on the device.

    Every epoch is a new order, a function of the seed and the epoch alone, so that a run can be taken up anywhere.
    Batches go on across the end of an epoch; a batch is split into config.accumulate parts.
    """

    def numbers():
        epoch, offset = divmod(step * config.batch_size, len(pictures))
        while True:
            order = torch.randperm(len(pictures), generator=seeded("cpu", config.seed, epoch))
            yield from order[offset:].tolist()
            epoch, offset = epoch + 1, 0

    stream, size = numbers(), config.batch_size // config.accumulate
    groups = iter(lambda: list(itertools.islice(stream, size)), [])  # without end: no group is ever []
    if isinstance(pictures, torch.Tensor):
        batches = (pictures[torch.tensor(group, device=pictures.device)] for group in groups)
    else:
        batches = read_batches(pictures, groups, config.workers)
    for batch in batches:
        yield batch.to(device)


# 4. Training ----------------------------------------------------------------------------------------------------------


class EMA:
    """A moving average of a model's weights, float32; `ema.model` is what samples and figures are made with.

    The decay starts low, TensorFlow's min(decay, (1 + step) / (10 + step)), so that early samples do not show the
    random first weights. The released code goes without, which a long run can't tell.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model, step):
        """ema <- decay * ema + (1 - decay) * weights, after training step number `step` = 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


class Progress:
    """What is being done, how far, and how long is left: one line that rewrites itself, plain lines if no terminal."""

    def __init__(self, what, total, done=0):
        self.what, self.total, self.first = what, total, done
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def update(self, done, text="", now=False):
        """Shows the state if the last time is some time ago, if it must be now, and at the end."""
        clock = time.monotonic()
        ended = done == self.total
        if ended or now or clock - self.shown > (0.1 if self.terminal else 30):
            self.shown = clock
            left = (clock - self.start) / max(1, done - self.first) * (self.total - done)
            line = f"{self.what} {done}/{self.total}{text}  {timedelta(seconds=round(left))} left"
            rewrite = self.terminal and not ended
            print(f"\r{line}\x1b[K" if self.terminal else line, end="" if rewrite else "\n", flush=True)


def pick_device(name):
    """The torch.device of --device; "auto" is the best there is. Raises UserError when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in there.items() if is_there)
    if not there[name]:
        raise UserError(f"--device {name}: torch finds none on this machine, use --device auto or cpu")
    return torch.device(name)


def pick_amp(name, device):
    """The dtype of --amp for autocast, None for float32. "auto" is one that the device computes faster in."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":  # older releases of torch can't tell what a CPU has
        capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        name = "bf16" if capabilities.get("amx_bf16") else "off"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 is for accelerators: use --amp bf16 or off on the CPU")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(model, device, dtype):
    """model(x_t, t) under mixed precision with this dtype, or as it is with None."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)(model)


def build(config):
    """(UNet, Diffusion) of a configuration."""
    model = UNet(**{name: getattr(config, name) for name in NETWORK_FIELDS}, dropout=config.dropout)
    return model, Diffusion(config.timesteps, config.beta_start, config.beta_end, config.variance)


def replace_file(path, write):
    """Has write(temporary path) make a file, then puts it in place at once: a crash leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's, when the disk is full
        temporary.unlink(missing_ok=True)
        raise UserError(f"can't write {path} ({error}): what was there before is untouched") from error


def load_checkpoint(path):
    """(checkpoint, its Config) from a file of `train`. Raises UserError when it is something else, or damaged."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint, Config(**checkpoint["config"])
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}: name another, or train first") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, or no checkpoint of ddpm.py") from error


def newest_checkpoint():
    """The checkpoint below runs/ that was written last."""
    files = sorted(Path("runs").glob("**/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError("there is no run below ./runs: train first, or name a checkpoint")
    return files[-1]


def start_log(path, first):
    """Begins log.csv; in a run that goes on from step `first`, cuts the rows after it, which will come again."""
    rows = path.read_text().splitlines()[1:] if first and path.exists() else []
    rows = [row for row in rows if row.count(",") == 4 and int(row.split(",")[0]) <= first]
    replace_file(path, lambda file: file.write_text("\n".join(["step,loss,lr,grad_norm,images_per_s", *rows, ""])))


def train(config, out, device, checkpoint=None):
    """Algorithm 1 on the pictures of config.data. Checkpoints, log.csv and grids of samples go to the folder `out`.

    A `checkpoint` is gone on with exactly: the random numbers of a step are a function of (seed, step), so that no
    random state has to be kept. Of one whose step is 0 only the weights are taken. Returns the number of the signal
    that ended the run early, or 0. Raises UserError when the loss is not finite, the last checkpoint being intact.
    """
    torch.manual_seed(config.seed)  # for the first weights
    amp, (model, diffusion) = pick_amp(config.amp, device), build(config)
    pictures = load_pictures(config, device)
    model, diffusion = model.to(device, memory_format=torch.channels_last), diffusion.to(device)
    net = autocast(model, device, amp)
    ema = EMA(model, config.ema_decay)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    first = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        ema.model.load_state_dict(checkpoint["ema"])
    if first:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    for group in optimizer.param_groups:
        group["initial_lr"] = config.lr  # a resumed run may have been given another
    warmup = LambdaLR(optimizer, lambda step: min(1, (step + 1) / max(1, config.warmup)), last_epoch=first - 1)
    out.mkdir(parents=True, exist_ok=True)
    start_log(out / "log.csv", first)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pictures):,} pictures, {device.type} "
          f"in {amp or torch.float32}, run folder {out}")
    print(config)
    data = training_batches(pictures, config, first, device)
    progress, stop = Progress("step", config.steps, first), []

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second one ends the program at once

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    total_loss, logged, logged_at, text = torch.zeros((), device=device), first, time.monotonic(), ""
    model.train()

    for step in range(first, config.steps):
        for part in range(config.accumulate):
            x_0 = to_unit(next(data))  # Algorithm 1, line 2
            torch.manual_seed(seeded("cpu", config.seed, step, part).initial_seed())
            if config.flip:
                mirrored = torch.rand(len(x_0), 1, 1, 1, device=device) < 0.5
                x_0 = torch.where(mirrored, x_0.flip(3), x_0)
            loss = diffusion.loss(net, x_0) / config.accumulate  # lines 3 to 5
            scaler.scale(loss).backward()
            total_loss += loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        rate = warmup.get_last_lr()[0]
        warmup.step()
        optimizer.zero_grad()
        ema.update(model, step)

        done = step + 1
        stopping = len(stop) > 0 and done < config.steps
        saving = done % config.ckpt_every == 0 or done == config.steps or stopping
        if saving or done % config.log_every == 0:  # reading the loss waits for the device: not at every step
            loss = total_loss.item() / (done - logged)
            if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())):
                raise UserError(f"the loss or its gradient is not finite any more at step {done}, the last checkpoint "
                                "is from before: try a lower --lr, a longer --warmup or --amp off")
            speed = (done - logged) * config.batch_size / (time.monotonic() - logged_at)
            with (out / "log.csv").open("a") as file:
                file.write(f"{done},{loss:.6f},{rate:.6g},{norm:.4f},{speed:.1f}\n")
            total_loss.zero_()
            logged, logged_at, text = done, time.monotonic(), f"  loss {loss:.4f}  lr {rate:.1e}  {speed:.0f} images/s"
        progress.update(done, text, now=logged == done)
        if saving:
            parts = {"model": model, "ema": ema.model, "optimizer": optimizer, "scaler": scaler}
            checkpoint = {name: part.state_dict() for name, part in parts.items()}
            checkpoint |= {"config": dataclasses.asdict(config), "step": done}
            replace_file(out / "ckpt.pt", lambda path: torch.save(checkpoint, path))
        if stopping:
            break
        if done % config.sample_every == 0 or done == config.steps:
            shape = (64, config.channels, config.image_size, config.image_size)
            samples = diffusion.sample(autocast(ema.model, device, amp), shape, steps=min(50, config.timesteps))
            replace_file(out / f"step-{done:06}.png", lambda path: grid(to_uint8(samples)).save(path, format="PNG"))
            logged_at = time.monotonic()  # sampling does not count as slow training
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return stop[0] if stopping else 0


# 5. Sampling ----------------------------------------------------------------------------------------------------------


def grid(pictures):
    """A PIL image of all pictures, uint8 (n, C, H, W), as many rows as columns."""
    side = math.ceil(len(pictures) ** 0.5)
    return Image.fromarray(make_grid(pictures.cpu(), side, pad_value=255).permute(1, 2, 0).numpy())


def sample_command(args):
    """`sample`: new pictures from a checkpoint, as one grid, and as single files and a film if asked for."""
    for name, low in (("n", 1), ("batch_size", 1), ("seed", 0), ("eta", 0)):
        if not getattr(args, name) >= low:
            raise UserError(f"{name.replace('_', ' ')} is {getattr(args, name)}: it must be at least {low}")
    if args.eta != 1 and args.steps is None:
        raise UserError("--eta is for DDIM: say in how many --steps")
    path, device = Path(args.ckpt or newest_checkpoint()), pick_device(args.device)
    checkpoint, config = load_checkpoint(path)
    model, diffusion = build(config)
    model.load_state_dict(checkpoint["model" if args.no_ema else "ema"])
    net = autocast(model.eval().to(device, memory_format=torch.channels_last), device, pick_amp(args.amp, device))
    diffusion.to(device)
    print(f"{path}: step {checkpoint['step']:,}, {'plain' if args.no_ema else 'EMA'} weights, seed {args.seed}")

    names = (path.parent / f"samples-{number:03}.png" for number in itertools.count())
    out = Path(args.out) if args.out else next(name for name in names if not name.exists())
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the name of the grid must end in .png")
    film, folder = out.with_suffix(".gif"), out.with_suffix("")
    for made, asked in ((out, True), (film, args.gif), (folder, args.individual)):
        if asked and made.exists():
            raise UserError(f"{made} is there already: name another file with --out, or remove it")

    calls = args.steps or diffusion.timesteps
    progress = Progress("sampling, step", math.ceil(args.n / args.batch_size) * calls)
    pictures, frames, count = [], {}, itertools.count()

    def on_step(t, x_t):
        done = next(count)
        progress.update(done + 1)
        if args.gif and done % calls % math.ceil(calls / 60) == 0:
            frames.setdefault(t, []).append(to_uint8(x_t).cpu())

    for first in range(0, args.n, args.batch_size):
        shape = (min(args.batch_size, args.n - first), config.channels, config.image_size, config.image_size)
        pictures.append(to_uint8(diffusion.sample(net, shape, args.steps, args.eta, args.seed, first, on_step)).cpu())
    pictures = torch.cat(pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda file: grid(pictures).save(file, format="PNG"))
    print(f"wrote {args.n} pictures to {out}")
    if args.gif:
        images = [grid(torch.cat(parts)) for parts in frames.values()] + [grid(pictures)]
        durations = [50] * (len(images) - 1) + [2000]  # milliseconds; the result stays for a while
        images[0].save(film, save_all=True, append_images=images[1:], duration=durations, loop=0)
        print(f"wrote the reverse process to {film}")
    if args.individual:
        folder.mkdir()
        for number, picture in enumerate(pictures):
            to_pil_image(picture).save(folder / f"{number:06}.png")
        print(f"wrote each picture to {folder}{os.sep}")
    return 0


# 6. The command line --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, like all others of this program."""

    def error(self, message):
        raise UserError(f"{message} (`{self.prog} --help` lists every flag)")


def train_command(args):
    """`train`: the configuration is that of a preset or a checkpoint, changed by the flags given; then trains."""
    device, checkpoint = pick_device(args.device), None
    flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    name = os.path.basename(os.path.abspath(flags["data"])) if "data" in flags else ""
    out = Path(args.out or Path("runs", "-".join(filter(None, [name, flags.get("only")]))))
    if args.resume:
        path = out / "ckpt.pt" if args.out or name else newest_checkpoint()
        checkpoint, base = load_checkpoint(path)
        out = path.parent
    elif (out / "ckpt.pt").exists():
        raise UserError(f"{out} holds a checkpoint: go on from it with --resume, or name another folder with --out")
    elif args.init_from:
        path = args.init_from
        checkpoint, base = load_checkpoint(path)
        checkpoint = {"step": 0, "model": checkpoint["ema"], "ema": checkpoint["ema"]}
        base = dataclasses.replace(base, data="", only="")
    else:
        if not args.preset and device.type == "cpu":
            print("no accelerator found: training the preset tiny (--preset cifar10 is the paper's network)")
        base = PRESETS[args.preset or ("tiny" if device.type == "cpu" else "cifar10")]
        if name in ("mnist", "fashion-mnist"):
            base = dataclasses.replace(base, channels=1, flip=name != "mnist")
    config = dataclasses.replace(base, **flags)
    if not config.data:
        raise UserError(f"--data is missing: name a folder of pictures, or one of {', '.join(SETS)}")
    for name in NETWORK_FIELDS if checkpoint else ():
        if getattr(config, name) != getattr(base, name):
            raise UserError(f"{flag_name(name)} {getattr(config, name)} does not fit the weights in {path}, "
                            f"which were trained with {getattr(base, name)}")
    if args.resume and checkpoint["step"] >= config.steps:
        raise UserError(f"{path} is at step {checkpoint['step']} of {config.steps} already: give it more with --steps")
    number = train(config, out, device, checkpoint)
    if number:
        print(f"\nstopped and saved; to go on: python ddpm.py train --resume --out {out}")
        return 128 + number
    print(f"trained; for new pictures: python ddpm.py sample --ckpt {out / 'ckpt.pt'}")
    return 0


def main(argv=None):
    """The command line; returns the exit status. Mistakes are one line on stderr and status 2."""
    parser = Parser(prog="ddpm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="train|sample")
    train_parser = commands.add_parser("train", help="train on pictures", description="In []: values of the presets.")
    train_parser.set_defaults(run=train_command)
    train_parser.add_argument("--out", help="the run's folder [runs/NAME OF THE DATA]")
    start = train_parser.add_mutually_exclusive_group()
    start.add_argument("--preset", choices=PRESETS, help="[cifar10 with an accelerator, tiny without]")
    start.add_argument("--resume", action="store_true", help="go on where the run in --out, or the newest, stopped")
    start.add_argument("--init-from", metavar="CKPT", help="begin with this checkpoint's weights (fine-tuning)")
    for f in dataclasses.fields(Config):
        kind, values = type(f.default), {name: getattr(preset, f.name) for name, preset in PRESETS.items()}
        others = [f"{name} {value}" for name, value in values.items() if value != f.default]
        options = {"help": f"{f.metadata['help']} [{', '.join([str(f.default), *others])}]"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options |= {"type": int, "metavar": "INT", "nargs": "*" if f.name == "attention_resolutions" else "+"}
        elif f.metadata["choices"]:
            options |= {"type": kind, "choices": f.metadata["choices"]}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        train_parser.add_argument(flag_name(f.name), dest=f.name, default=argparse.SUPPRESS, **options)

    sample = commands.add_parser("sample", help="make new pictures from a checkpoint")
    sample.set_defaults(run=sample_command)
    sample.add_argument("--ckpt", help="a checkpoint of train [the newest below runs/]")
    sample.add_argument("-n", type=int, default=64, help="number of pictures [64]")
    sample.add_argument("--batch-size", type=int, default=64, help="pictures made at a time [64]")
    sample.add_argument("--seed", type=int, default=0, help="another seed, other pictures [0]")
    sample.add_argument("--steps", type=int, help="DDIM in so many steps, e.g. 50, in place of Algorithm 2 in T")
    sample.add_argument("--eta", type=float, default=1.0, help="DDIM's noise, from 0 (none) to 1 (as much as DDPM) [1]")
    sample.add_argument("--out", help="the PNG file [samples-NUMBER.png beside the checkpoint]")
    sample.add_argument("--individual", action="store_true", help="each picture as a PNG too")
    sample.add_argument("--gif", action="store_true", help="a film of the reverse process too")
    sample.add_argument("--amp", choices=AMP, default="auto", help="mixed precision [auto]")
    sample.add_argument("--no-ema", action="store_true", help="the weights themselves, not their moving average")
    for command in (train_parser, sample):
        command.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="[auto]")
    try:
        args = parser.parse_args(argv)
        return args.run(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
