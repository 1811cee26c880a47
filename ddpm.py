"""Denoising Diffusion Probabilistic Models in one file, in the order of the paper.

    python ddpm.py train --data ./images      # a folder of pictures, or: shapes, mnist, fashion-mnist, cifar10, ...
    python ddpm.py sample                     # new pictures from the newest run
    python ddpm.py eval                       # its bits/dim, rate and distortion, on test pictures
    python ddpm.py show progressive           # one of the paper's figures: forward, progressive or interpolate

The paper is Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020 (arXiv 2006.11239). "The
released code" is the authors' TensorFlow repository, hojonathanho/diffusion, which settles what the paper leaves open.

  * destroy a picture x_0 by adding a little Gaussian noise T times, until x_T is nothing but noise      (Eq. 2)
  * x_t can be drawn from x_0 in one jump, for any t                                                     (Eq. 4)
  * train a network to tell, from x_t and t, which noise eps was mixed in                  (Eq. 14, Algorithm 1)
  * start from pure noise and take the predicted noise out again, one small step at a time   (Eq. 11, Algorithm 2)

The sections: 1 the diffusion process (the paper's Secs. 2 and 3, and DDIM), 2 the network (Appendix B), 3 data (Sec.
3.3), 4 training (Sec. 4, Appendix B), 5 sampling, figures, evaluation (Secs. 4.1, 4.3, 4.4), 6 the command line.

Shapes are written (B, C, H, W): pictures in the batch, channels, height, width. A picture is float32 in [-1, 1].
"""

import argparse
import copy
import dataclasses
import itertools
import json
import math
import os
import pickle
import signal
import struct
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.distributions import Normal, kl_divergence
from torchvision import datasets, utils

class UserError(Exception):
    """A mistake that the user can mend. The command line prints it as one line and exits with status 2."""

def flag(default, help, low=-math.inf, high=math.inf, choices=None):
    """A hyper-parameter: the default is the paper's for CIFAR-10, the help is what `--help` prints; its range."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})

def flag_name(name):
    """The flag of a field of Config: --batch-size of batch_size. `class` is no name for a field, so it is `only`."""
    return "--class" if name == "only" else "--" + name.replace("_", "-")

@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that can be turned; each field is a flag of `train`. Raises UserError for values out of range."""
    # the network
    image_size: int = flag(32, "height and width of the pictures, in pixels", low=1, high=4096)
    channels: int = flag(3, "3 for colour, 1 for grey", choices=(1, 3))
    base_channels: int = flag(128, "channels at full resolution, a multiple of 32", low=32, high=1024)
    channel_mults: tuple = flag((1, 2, 2, 2), "channels of each level, as multiples; each halves the picture", low=1)
    num_res_blocks: int = flag(2, "residual blocks a level on the way down (one more on the way up)", low=1)
    attention_resolutions: tuple = flag((16,), "picture sizes inside the network that get self-attention", low=1)
    dropout: float = flag(0.1, "dropout inside the residual blocks", low=0, high=1)
    # the diffusion process
    timesteps: int = flag(1000, "T, the number of noising steps", low=1, high=10**6)
    beta_start: float = flag(1e-4, "noise variance of the first step, for T = 1000", low=0)
    beta_end: float = flag(0.02, "noise variance of the last step, for T = 1000", low=0)
    variance: str = flag("fixedlarge", "of the reverse process, beta or beta~", choices=("fixedlarge", "fixedsmall"))
    # training
    steps: int = flag(800_000, "optimiser steps, in all", low=1)
    batch_size: int = flag(128, "pictures in an optimiser step", low=1, high=2**16)
    accumulate: int = flag(1, "split each batch into this many passes, to save memory", low=1)
    lr: float = flag(2e-4, "learning rate of Adam", low=0)
    warmup: int = flag(5000, "steps of linear learning-rate warm-up", low=0)
    grad_clip: float = flag(1.0, "largest global norm of the gradient", low=0)
    ema_decay: float = flag(0.9999, "decay of the moving average of the weights", low=0, high=1)
    flip: bool = flag(True, "mirror half of the pictures, left to right")
    seed: int = flag(0, "seed of every random draw", low=0, high=2**63 - 1)
    amp: str = flag("auto", "mixed precision; auto: where the device gains", choices=("auto", "off", "bf16", "fp16"))
    compile: bool = flag(False, "torch.compile the network: minutes at first, then faster steps")
    # the run
    data: str = flag("", "a folder of pictures, searched recursively, or shapes, mnist, fashion-mnist, cifar10, ...")
    only: str = flag("", "train on this class alone: a sub-folder's name, or a class of the named set")
    data_root: str = flag("data", "where the named sets are kept, and downloaded to once")
    cache_gb: float = flag(4.0, "sets up to this size are held in the device's memory, others stream from disk", low=0)
    workers: int = flag(4, "processes that read pictures", low=0)
    log_every: int = flag(100, "steps between rows of log.csv", low=1)
    sample_every: int = flag(5000, "steps between grids of samples (50 DDIM steps)", low=1)
    ckpt_every: int = flag(5000, "steps between checkpoints", low=1)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, str) and not low <= number <= high:
                    limit = f"at most {high}" if number > high else f"at least {low}"
                    raise UserError(f"{flag_name(f.name)} is {number}: it must be {limit}")
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise UserError(f"{flag_name(f.name)} is {value}: it must be one of {f.metadata['choices']}")
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
    For T other than 1000 both are scaled by 1000/T, to add as much noise in all. UserError if a beta leaves (0, 1)."""
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
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

def noise_for(shape, device, seed, first=0):
    """N(0, I) again and again, (B, C, H, W) = shape; picture i's is a function of (seed, first + i) alone."""
    generators = [seeded(device, seed, first + i) for i in range(shape[0])]
    while True:
        yield torch.stack([torch.randn(shape[1:], generator=generator, device=device) for generator in generators])

def discretised_log_likelihood(x_0, mean, sigma):
    """log of the mass of N(mean, sigma^2) within the grey level of x_0, 2/255 wide, elementwise. Eq. 13.
    The darkest and the lightest level are open to infinity. The tanh approximates the CDF, as in the released code."""
    low, high = ((x_0 + edge - mean) / sigma for edge in (-1 / 255, 1 / 255))
    below, above = (0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) for z in (low, high))
    return (above.masked_fill(x_0 > 0.999, 1) - below.masked_fill(x_0 < -0.999, 0)).clamp(min=1e-12).log()

class Diffusion(nn.Module):
    """The two Markov chains: q, which adds noise, and p_theta, which a network `model(x_t, t) -> eps` takes back.
    Holds tables over t = 0..T-1, computed in float64 and kept as float32 buffers. `variance` is the reverse process's
    (Sec. 3.2): "fixedlarge", beta_t, or "fixedsmall", beta~_t; KeyError if it is another."""

    def __init__(self, timesteps=1000, beta_start=1e-4, beta_end=0.02, variance="fixedlarge"):
        super().__init__()
        self.timesteps = timesteps
        betas = linear_beta_schedule(timesteps, beta_start, beta_end)
        alphas = 1 - betas
        alpha_bars = torch.cumprod(alphas, dim=0)
        alpha_bars_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])  # alpha_bar_0 = 1
        posterior_variance = betas * (1 - alpha_bars_prev) / (1 - alpha_bars)  # beta~, Eq. 7
        model_variance = {"fixedlarge": betas, "fixedsmall": posterior_variance}[variance]
        # beta~_1 is 0, its logarithm would not be finite: the released code takes beta~_2 there, in both variances.
        first = posterior_variance[1:2]
        for name, table in {
            "betas": betas,
            "alpha_bars": alpha_bars,
            "sqrt_alpha_bars": alpha_bars.sqrt(),
            "sqrt_one_minus_alpha_bars": (1 - alpha_bars).sqrt(),
            "posterior_mean_x_0": alpha_bars_prev.sqrt() * betas / (1 - alpha_bars),
            "posterior_mean_x_t": alphas.sqrt() * (1 - alpha_bars_prev) / (1 - alpha_bars),
            "posterior_variance": posterior_variance,
            "posterior_log_variance": torch.cat([first, posterior_variance[1:]]).log(),
            "model_log_variance": torch.cat([first, model_variance[1:]]).log(),
        }.items():
            self.register_buffer(name, table.float())

    def q_sample(self, x_0, t, eps):
        """x_t drawn from q(x_t | x_0) in one jump: x_0 with noise eps mixed in. (B, C, H, W); t: (B,). Eq. 4."""
        return at(self.sqrt_alpha_bars, t) * x_0 + at(self.sqrt_one_minus_alpha_bars, t) * eps

    def q_posterior(self, x_0, x_t, t):
        """q(x_{t-1} | x_t, x_0), a Gaussian: (mean, variance, log_variance), the last two (B, 1, 1, 1). Eqs. 6, 7."""
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
        Going through x_0, as the released sampler does, lets it be kept inside [-1, 1], where pictures are."""
        x_0 = self.predict_x0(x_t, t, model(x_t, t)).clamp(-1, 1)
        mean, _, _ = self.q_posterior(x_0, x_t, t)
        log_variance = at(self.model_log_variance, t)
        return mean, log_variance.exp(), log_variance, x_0

    def p_sample(self, model, x_t, t, z=None):
        """x_{t-1} drawn from p_theta(x_{t-1} | x_t), with noise z: (B, C, H, W), or fresh. Algorithm 2, lines 3-4."""
        z = torch.randn_like(x_t) if z is None else z
        mean, _, log_variance, _ = self.p_mean_variance(model, x_t, t)
        return mean + (t > 0).view(-1, 1, 1, 1) * (0.5 * log_variance).exp() * z  # no noise in the last step

    def ddim_step(self, model, x_t, t, s, eta, z):
        """x_s from x_t for any s < t: (B,), with noise z: (B, C, H, W); s = -1 is x_0 itself. DDIM, Eqs. 12 and 16.
        With eta = 0 nothing is random; eta = 1 over all T steps is Algorithm 2 with variance beta~_t."""
        noise_t = at(self.sqrt_one_minus_alpha_bars, t)
        noise_s = at(self.sqrt_one_minus_alpha_bars, s.clamp(min=0)) * (s >= 0).view(-1, 1, 1, 1)
        alpha_bar_s = 1 - noise_s**2
        x_0 = self.predict_x0(x_t, t, model(x_t, t)).clamp(-1, 1)
        eps = (x_t - at(self.sqrt_alpha_bars, t) * x_0) / noise_t  # the noise that goes with the clipped x_0
        variance = eta**2 * (noise_s / noise_t) ** 2 * (noise_t**2 - noise_s**2) / alpha_bar_s  # Eq. 16
        direction = (noise_s**2 - variance).clamp(min=0).sqrt() * eps  # rounding can take it just below 0
        return alpha_bar_s.sqrt() * x_0 + direction + variance.sqrt() * z  # Eq. 12

    @torch.no_grad()
    def sample(self, model, shape, steps=None, eta=1.0, seed=0, first=0):
        """Algorithm 2: pictures from noise, (B, C, H, W) = shape, in [-1, 1]. With `steps`, DDIM in so many.
        Picture i is number first + i of this seed, whatever the batch. UserError if `steps` is not in 1..T."""
        if steps is not None and not 1 <= steps <= self.timesteps:
            raise UserError(f"{steps} sampling steps: this model has T = {self.timesteps}, use 1 to {self.timesteps}")
        times = torch.linspace(self.timesteps - 1, 0, steps or self.timesteps).round().long().tolist()
        device, noise = self.betas.device, noise_for(shape, self.betas.device, seed, first)
        x_t = next(noise)  # line 1: x_T ~ N(0, I)
        for t, s in zip(times, [*times[1:], -1]):  # line 2: for t = T, ..., 1
            t, s = torch.full((shape[0],), t, device=device), torch.full((shape[0],), s, device=device)
            z = next(noise)  # line 3: z ~ N(0, I), which the last step leaves out
            x_t = self.ddim_step(model, x_t, t, s, eta, z) if steps else self.p_sample(model, x_t, t, z)  # line 4
        return x_t  # line 6: x_0

    @torch.no_grad()
    def bits_per_dim(self, model, x_0, seed=0, first=0):
        """The bound on -log2 p(x_0) of pictures (B, C, H, W), in bits per dimension, term by term. Eqs. 5 and 13.
        Returns (terms, mse): terms (B, T+1) are L_0 .. L_T as the paper counts them; mse (B, T) is the mean squared
        error of the x_0 predicted from each x_t. The noise is drawn as in `sample`."""
        noise, terms, mse = noise_for(x_0.shape, x_0.device, seed, first), [], []
        for t in range(self.timesteps):
            t = torch.full((len(x_0),), t, device=x_0.device)
            x_t = self.q_sample(x_0, t, next(noise))
            mean, _, log_variance, predicted = self.p_mean_variance(model, x_t, t)
            true_mean, _, true_log_variance = self.q_posterior(x_0, x_t, t)
            p, q = Normal(mean, (0.5 * log_variance).exp()), Normal(true_mean, (0.5 * true_log_variance).exp())
            nats = kl_divergence(q, p) if terms else -discretised_log_likelihood(x_0, mean, p.scale)  # L_t, or L_0
            terms.append(nats.mean((1, 2, 3)))
            mse.append(((predicted - x_0) ** 2).mean((1, 2, 3)))
        q = Normal(self.sqrt_alpha_bars[-1] * x_0, self.sqrt_one_minus_alpha_bars[-1])
        nats = kl_divergence(q, Normal(torch.zeros_like(x_0), 1))  # L_T: x_T against N(0, I)
        return torch.stack([*terms, nats.mean((1, 2, 3))], dim=1) / math.log(2), torch.stack(mse, dim=1)

# 2. The network -------------------------------------------------------------------------------------------------------

def sinusoidal_embedding(t, dim):
    """The Transformer's embedding of step t: (B,) -> (B, dim) float32, sines, then cosines. Released code, nn.py."""
    half = dim // 2  # the frequencies fall from 1 to 1/10000, both ends included, hence half - 1
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angles = t.float()[:, None] * frequencies[None, :]  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)

def group_norm(channels):
    """Normalisation in the paper's 32 groups, in thin networks of 4 channels each: 1 would lose the time embedding."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)  # TensorFlow's eps, not PyTorch's 1e-5

class Attention(nn.Module):
    """Self-attention over all positions of a feature map, one head as wide as the channels. (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = group_norm(channels)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels) for _ in range(4))  # 1x1 convs

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (proj(h).unsqueeze(1) for proj in (self.to_q, self.to_k, self.to_v))  # (B, 1, HW, C): one head
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # softmax(q k^T / sqrt(C)) v
        return x + self.to_out(h).transpose(1, 2).view_as(x)

class ResBlock(nn.Module):
    """Convolutions beside a shortcut, told the time; then attention, or none. (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels, out_channels, temb_channels, dropout, attention):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.conv_shortcut(x) + h)

class UNet(nn.Module):
    """eps_theta(x_t, t): the noise in x_t, (B, C, H, W) and t: (B,) -> (B, C, H, W). Appendix B, as released: every
    detail that looks odd is theirs. One level per entry of channel_mults, each half the size of the one before, with
    attention if its size is in attention_resolutions. The defaults are CIFAR-10's. UserError if sizes don't fit."""

    def __init__(self, image_size=32, channels=3, base_channels=128, channel_mults=(1, 2, 2, 2), num_res_blocks=2,
                 attention_resolutions=(16,), dropout=0.1):
        super().__init__()
        n = len(channel_mults) - 1
        if image_size < 2**n or image_size % 2**n:
            raise UserError(f"image size {image_size} can't be halved {n} times: use a multiple of {2**n}")
        if base_channels < 32 or base_channels % 32:
            raise UserError(f"{base_channels} base channels can't be normalised in groups: use a multiple of 32")
        sizes, widths = [image_size // 2**i for i in range(n + 1)], [base_channels * mult for mult in channel_mults]
        if not set(attention_resolutions) <= set(sizes):
            raise UserError(f"--attention-resolutions {attention_resolutions}: this network's sizes are {sizes} pixels")
        self.base_channels, temb_channels = base_channels, 4 * base_channels
        self.time1, self.time2 = nn.Linear(base_channels, temb_channels), nn.Linear(temb_channels, temb_channels)
        self.conv_in = nn.Conv2d(channels, base_channels, 3, padding=1)
        h, skips = base_channels, [base_channels]  # channels that flow here, and of each map kept for the way up
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for width, size in zip(widths, sizes):
            for _ in range(num_res_blocks):
                self.down.append(ResBlock(h, width, temb_channels, dropout, size in attention_resolutions))
                h = width
                skips.append(h)
            if size != sizes[-1]:  # padded as TensorFlow's SAME: on the right and at the bottom only
                self.down.append(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(h, h, 3, stride=2)))
                skips.append(h)
        self.middle1 = ResBlock(h, h, temb_channels, dropout, attention=True)
        self.middle2 = ResBlock(h, h, temb_channels, dropout, attention=False)
        for width, size in zip(reversed(widths), reversed(sizes)):
            for _ in range(num_res_blocks + 1):
                self.up.append(ResBlock(h + skips.pop(), width, temb_channels, dropout, size in attention_resolutions))
                h = width
            if size != sizes[0]:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(h, h, 3, padding=1)))
        self.conv_norm_out = group_norm(h)
        self.conv_out = nn.Conv2d(h, channels, 3, padding=1)
        for name, weights in self.named_parameters():
            if name.endswith(("bias", "conv2.weight", "to_out.weight", "conv_out.weight")):
                nn.init.zeros_(weights)  # each residual branch starts as nothing, and so does the answer
            elif weights.dim() > 1:  # not the gains of the normalisation, which stay 1
                nn.init.xavier_uniform_(weights)

    @classmethod
    def from_pretrained(cls, folder):
        """The network of the published weights in a folder, ready to predict. Raises UserError as load_checkpoint."""
        _, checkpoint, config = load_checkpoint(folder)
        model, _ = build(config)
        model.load_state_dict(checkpoint["ema"])
        return model.eval()

    def forward(self, x_t, t):
        temb = self.time2(F.silu(self.time1(sinusoidal_embedding(t, self.base_channels))))  # (B, 4 base)
        h = self.conv_in(x_t)  # (B, base, H, W)
        skips = [h]
        for layer in self.down:  # (B, base, H, W) -> (B, ., H/2, W/2) -> ...
            h = layer(h, temb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        h = self.middle2(self.middle1(h, temb), temb)  # the smallest size
        for layer in self.up:  # ... -> (B, ., H/2, W/2) -> (B, base, H, W)
            h = layer(torch.cat([h, skips.pop()], dim=1), temb) if isinstance(layer, ResBlock) else layer(h)
        return self.conv_out(F.silu(self.conv_norm_out(h))).to(x_t.dtype)  # (B, C, H, W), float32 even if autocast

# The authors' weights are published in the layout of the diffusers library: its names of what is called otherwise here,
# and what its config.json must say, as nothing in the weights themselves would tell another network from this one.
RENAMED = {"time_embedding.linear_": "time", "mid_block.resnets.0": "middle1", "mid_block.resnets.1": "middle2",
           "mid_block.attentions.0": "middle1.attention", "query": "to_q", "key": "to_k", "value": "to_v",
           "proj_attn": "to_out", "to_out.0": "to_out"}
FIXED = {"act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-6, "downsample_padding": 0, "attention_head_dim": None,
         "flip_sin_to_cos": False, "freq_shift": 1, "center_input_sample": False, "mid_block_scale_factor": 1}

def read_published(folder):
    """A folder of published weights, config.json and diffusion_pytorch_model.bin, as the dictionary that `train` saves.
    Raises ValueError, which names the field, for a network that can't be had here."""
    given, names = json.loads((folder / "config.json").read_text()), dict(RENAMED)
    size, widths, n = given["sample_size"], given["block_out_channels"], given["layers_per_block"]
    multiples = [max(1, width // 128) * 128 for width in widths]  # thinner ones are normalised in fewer groups here
    for name, value in (FIXED | {"block_out_channels": multiples}).items():
        if given.get(name, "missing") != value:
            raise ValueError(f"{name} is {given.get(name, 'missing')}, here it can only be {value}")
    attention = tuple(size // 2**i for i, kind in enumerate(given["down_block_types"]) if kind.startswith("Attn"))
    config = {
        "image_size": size, "channels": given["in_channels"], "base_channels": widths[0], "num_res_blocks": n,
        "channel_mults": tuple(width // widths[0] for width in widths), "attention_resolutions": attention,
        # as the paper's Sec. 3.2 and Appendix B say for CIFAR-10 and for the others; the file does not
        "variance": "fixedlarge" if size == 32 else "fixedsmall", "dropout": 0.1 if size == 32 else 0.0,
    }
    for i, j in itertools.product(range(len(widths)), range(n + 1)):
        down, up = f"down.{i * (n + 1) + j}", f"up.{i * (n + 2) + j}"
        names |= {f"down_blocks.{i}.resnets.{j}": down, f"down_blocks.{i}.attentions.{j}": f"{down}.attention",
                  f"up_blocks.{i}.resnets.{j}": up, f"up_blocks.{i}.attentions.{j}": f"{up}.attention",
                  f"down_blocks.{i}.downsamplers.0.conv": f"down.{i * (n + 1) + n}.1",
                  f"up_blocks.{i}.upsamplers.0.conv": f"up.{i * (n + 2) + n + 1}.1"}
    weights = torch.load(folder / "diffusion_pytorch_model.bin", map_location="cpu", weights_only=True)
    for old, new in names.items():
        weights = {name.replace(old, new): weight.contiguous() for name, weight in weights.items()}
    return {"config": config, "step": 0, "model": weights, "ema": weights}

# 3. Data --------------------------------------------------------------------------------------------------------------

def to_unit(pictures):
    """uint8, 0..255, as pictures are kept -> float32 in [-1, 1], batch by batch. Sec. 3.3."""
    return pictures.float() / 127.5 - 1

def to_uint8(x_0):
    """float32 in [-1, 1] -> uint8, 0..255. Rounds to the nearest: a cast alone truncates, and darkens the picture."""
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def read_picture(source, size, channels):
    """A picture file or PIL image as a uint8 array (channels, size, size): its middle square, antialiased or enlarged.
    Turned as its EXIF says; transparent over white; 16 bits brought to 8. Raises one of BROKEN if it can't be read."""
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
    """Coloured circles, squares and triangles, 10,000 a split, drawn when asked for. Used like a torchvision set."""
    classes = ("circle", "square", "triangle")

    def __init__(self, root="", train=True, download=False):
        self.first, self.targets = 0 if train else 10_000, [i % 3 for i in range(10_000)]

    def __getitem__(self, i):
        uniform = np.random.default_rng(self.first + i).uniform
        radius, colour = uniform(24, 48), f"hsl({uniform(0, 360):.0f}, 80%, {uniform(35, 60):.0f}%)"
        circle, image = (*uniform(radius, 128 - radius, 2), radius), Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).regular_polygon(circle, (64, 4, 3)[self.targets[i]], fill=colour)
        return image, self.targets[i]

SETS = {"shapes": Shapes, "mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100, "flowers102": datasets.Flowers102}  # names for --data
EXTENSIONS = (*datasets.folder.IMG_EXTENSIONS, ".gif")
# What Pillow's many decoders, and other readers, raise on files that are broken, or something else.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of large pictures, twice as large ones are an error

class Pictures(torch.utils.data.Dataset):
    """The pictures of a folder or of a named set. Item i is a uint8 array (C, size, size), or says why it is broken.
    `only` keeps one class: a sub-folder's, or one of the set by name or number. UserError if there are no pictures."""

    def __init__(self, data, size, channels, only="", root="data", train=True):
        self.size, self.channels, self.set = size, channels, None
        if data in SETS:
            part = {"split": "train" if train else "test"} if data == "flowers102" else {"train": train}
            try:
                self.set = SETS[data](root, download=True, **part)
            except (OSError, RuntimeError) as error:  # no network, or a damaged download
                raise UserError(f"can't get {data} into {root} ({error}): check the network") from error
            labels = map(int, self.set._labels if data == "flowers102" else self.set.targets)
            self.items = [i for i, label in enumerate(labels)
                          if only.lower() in ("", str(label), self.set.classes[label].lower())]
            missing = f"{data} has no class {only!r}, it has: {', '.join(self.set.classes)}"
        elif os.path.isdir(data):
            paths = (path for path in Path(data).rglob("*") if path.name[0] != "." and path.is_file())
            self.items = sorted(path for path in paths if path.name.lower().endswith(EXTENSIONS)
                                and (not only or only in path.relative_to(data).parts[:-1]))
            missing = f"{Path(data, only)} holds no images (looked for {' '.join(EXTENSIONS)})"
        else:
            raise UserError(f"--data {data!r} is neither a folder of pictures nor one of {', '.join(SETS)}")
        if not self.items:
            raise UserError(missing)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:
            return read_picture(self.set[self.items[i]][0] if self.set else self.items[i], self.size, self.channels)
        except BROKEN as error:
            return f"{str(self.items[i])!r}: {error or type(error).__name__}"  # repr: not every name can be printed

    def batches(self, groups, workers):
        """For each group of item numbers, its pictures that can be read, uint8 (., C, H, W); names the others, once."""
        broken, workers = set(), min(workers, os.cpu_count(), len(self) // 256)
        for items in torch.utils.data.DataLoader(self, batch_sampler=groups, num_workers=workers, collate_fn=list):
            for item in items:
                if isinstance(item, str) and item not in broken:
                    broken.add(item)
                    line_end = "\n" if sys.stdout.isatty() else ""  # of the progress line
                    print(f"{line_end}skipped a broken picture ({len(broken)} so far): {item}", flush=True)
            if len(broken) == len(self):
                raise UserError(f"none of the {len(self)} pictures can be read")
            good = [item for item in items if not isinstance(item, str)]
            yield torch.from_numpy(np.array(good, np.uint8).reshape(-1, self.channels, self.size, self.size))

    def read(self, workers):
        """All pictures that can be read, uint8 (N, C, H, W)."""
        groups, kept = [range(i, min(i + 256, len(self))) for i in range(0, len(self), 256)], []
        progress = Progress("reading pictures, batch", len(groups))
        for batch in self.batches(groups, workers):
            kept.append(batch)
            progress.update()
        return torch.cat(kept)

def training_batches(pictures, config, step):
    """This rank's batches from training step `step` on, for ever: uint8 (B, C, H, W), of a tensor of pictures, or of a
    Pictures to stream. An epoch's order depends on the seed and its number alone: a run can be taken up anywhere."""
    n, seen, size = len(pictures), step * config.batch_size, config.batch_size // config.accumulate
    orders = (torch.randperm(n, generator=seeded("cpu", config.seed, e)).tolist() for e in itertools.count(seen // n))
    stream = itertools.islice(itertools.chain.from_iterable(orders), seen % n, None)
    groups = iter(lambda: list(itertools.islice(stream, size)), [])  # without end: no group is ever []
    groups = itertools.islice(groups, RANK, None, WORLD)
    if isinstance(pictures, Pictures):
        return (batch for batch in pictures.batches(groups, config.workers) if len(batch))
    return (pictures[torch.tensor(group, device=pictures.device)] for group in groups)

# 4. Training ----------------------------------------------------------------------------------------------------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun starts WORLD processes

def all_sum(number):
    """The sum of a tensor over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(number)
    return number

def shared_out(work, items):
    """[work(item) for item in items], the items shared out among the processes; all get all results."""
    everyones = [[work(item) for item in items[RANK::WORLD]]] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyones, everyones[RANK])
    return [everyones[i % WORLD][i // WORLD] for i in range(len(items))]

class EMA:
    """A moving average of a model's weights, float32; `ema.model` is what samples and figures are made with.
    Its decay starts low, as TensorFlow's can, to forget the first random weights; a long run can't tell."""

    def __init__(self, model, decay):
        self.decay, self.model = decay, copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model, step):
        """ema <- decay * ema + (1 - decay) * weights, after training step number `step` = 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)

class Progress:
    """What is being done, how far, and how long is left: one line that rewrites itself, plain lines if no terminal."""

    def __init__(self, what, total, done=0):
        self.what, self.total, self.first, self.done = what, total, done, done
        self.start = self.shown = time.monotonic()

    def update(self, text="", now=False):
        """One more is done: shown if the last time is some time ago, if it must be now, and at the end."""
        self.done += 1
        clock, terminal, ended = time.monotonic(), sys.stdout.isatty(), self.done == self.total
        if ended or now or clock - self.shown > (0.1 if terminal else 30):
            self.shown = clock
            left = (clock - self.start) / (self.done - self.first) * (self.total - self.done)
            line = f"{self.what} {self.done}/{self.total}{text}  {timedelta(seconds=round(left))} left"
            print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal and not ended else "\n", flush=True)

def pick_device(name, amp):
    """(device, dtype) of --device and --amp; dtype None is float32. Raises UserError on a device that is not there."""
    there = ["cpu", *([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else [])]
    name = there[-1] if name == "auto" else name
    if name not in there:
        raise UserError(f"--device {name}: torch finds none on this machine, use --device auto or cpu")
    if amp == "auto" and name == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":  # older releases of torch can't tell what a CPU has
        capabilities = getattr(torch.cpu, "get_capabilities", dict)() if name == "cpu" else {}
        amp = "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "off"
    if amp == "fp16" and name == "cpu":
        raise UserError("--amp fp16 is for accelerators: use --amp bf16 or off on the CPU")
    return torch.device(name), {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]

def build(config):
    """(UNet, Diffusion) of a configuration."""
    model = UNet(**{name: getattr(config, name) for name in NETWORK_FIELDS}, dropout=config.dropout)
    return model, Diffusion(config.timesteps, config.beta_start, config.beta_end, config.variance)

def replace_file(path, write):
    """Has write(temporary path) make a file, then puts it in place at once: a crash leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if RANK == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's, when the disk is full
        temporary.unlink(missing_ok=True)
        raise UserError(f"can't write {path} ({error}): what was there before is untouched") from error

def load_checkpoint(path):
    """(path, checkpoint, its Config) of a run of `train`, its file or its folder, or the newest below runs/ if none.
    Raises UserError when it is something else, damaged, or holds the weights of another network than it describes."""
    files = [path] if path else sorted(Path("runs").glob("**/ckpt.pt"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError("there is no run below ./runs: train first, or name a checkpoint")
    path = Path(files[-1], "ckpt.pt" if Path(files[-1], "ckpt.pt").exists() else "")  # a run's folder will do, too
    try:
        checkpoint = read_published(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**checkpoint["config"])
        with torch.device("meta"):  # takes no memory, whatever the configuration asks for
            expected = {name: weight.shape for name, weight in build(config)[0].state_dict().items()}
        held = [checkpoint["model"], checkpoint["ema"]]
        adam = checkpoint["optimizer"]["state"] if checkpoint["step"] else {}  # {} too if fp16 left out all updates
        held += [{name: adam[i][key] for i, name in enumerate(expected)} for key in ("exp_avg", "exp_avg_sq") if adam]
        shapes = [{name: tensor.is_contiguous() and tensor.shape for name, tensor in part.items()} for part in held]
        if shapes != [expected] * len(held) or not isinstance(checkpoint["step"], int):  # fused Adam checks no shapes
            raise UserError(f"{path} is damaged: its weights are not those of the network that it describes")
        return path, checkpoint, config
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {error.filename}: name another, or train first") from error
    except (*BROKEN, RuntimeError, LookupError, AttributeError, pickle.PickleError) as error:
        why = f" ({error})" if isinstance(error, (OSError, ValueError)) else ""  # torch's text advises to run the code
        raise UserError(f"{path} is damaged, or no checkpoint of ddpm.py{why}") from error

def train(config, out, device, amp, checkpoint=None):
    """Algorithm 1 on the pictures of config.data. Checkpoints, log.csv and grids of samples go to the folder `out`.
    A `checkpoint` is gone on with exactly, random numbers being a function of (seed, step); of step 0, it only gives
    the weights. Returns the number of the signal that ended the run, or 0. UserError when the loss is not finite."""
    torch.manual_seed(config.seed)  # for the first weights
    model, diffusion = build(config)
    pictures = Pictures(config.data, config.image_size, config.channels, config.only, config.data_root)
    if len(pictures) * config.channels * config.image_size**2 <= config.cache_gb * 2**30:  # others are streamed
        pictures = pictures.read(config.workers).to(device)
    model, diffusion = model.to(device), diffusion.to(device)
    ema = EMA(model, config.ema_decay)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    parts = {"model": model, "ema": ema.model, "optimizer": optimizer, "scaler": scaler}
    for name, part in parts.items():
        if checkpoint and checkpoint.get(name):  # fine-tuning has weights alone, and only runs in fp16 a scale to keep
            part.load_state_dict(checkpoint[name])
    mixed = torch.autocast(device.type, amp, enabled=amp is not None)
    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    net, ema_net = mixed(torch.compile(net) if config.compile else net), mixed(ema.model)
    log, first = out / "log.csv", checkpoint["step"] if checkpoint else 0
    rows = [row.split(",") for row in log.read_text().splitlines()] if first and log.exists() else []
    rows = [",".join(row) for row in rows if len(row) == 5 and row[0].isdecimal() and int(row[0]) <= first]
    replace_file(log, lambda path: path.write_text("\n".join(["step,loss,lr,grad_norm,images_per_s", *rows, ""])))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pictures):,} pictures, {device.type} "
          f"in {amp or torch.float32}, run folder {out}\n{config}")
    data, stop = training_batches(pictures, config, first), []

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second one ends the program at once

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    progress, total_loss, logged = Progress("step", config.steps, first), torch.zeros((), device=device), first
    logged_at, text, spikes = time.monotonic(), "", torch.zeros((), device=device)

    for step in range(first, config.steps):
        optimizer.param_groups[0]["lr"] = lr = config.lr * min(1, (step + 1) / max(1, config.warmup))
        for part in range(RANK, config.accumulate, WORLD):
            x_0 = to_unit(next(data).to(device))  # Algorithm 1, line 2
            torch.manual_seed(seeded("cpu", config.seed, step, part).initial_seed())
            if config.flip:
                x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1, device=device) < 0.5, x_0.flip(3), x_0)
            loss = diffusion.loss(net, x_0) / config.accumulate  # lines 3 to 5
            scaler.scale(loss * WORLD).backward()  # of several processes, the gradients are averaged
            total_loss += loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        spikes += ~(norm <= 10 * config.grad_clip)  # or not finite: such steps are left out in fp16
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ema.update(model, step)

        done = step + 1
        stopping = all_sum(torch.tensor(len(stop))) > 0 and done < config.steps
        saving = done % config.ckpt_every == 0 or done == config.steps or stopping
        if saving or done % config.log_every == 0:  # reading the loss waits for the device: not at every step
            loss = all_sum(total_loss).item() / (done - logged)
            if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())):
                raise UserError(f"the loss or its gradient is not finite any more at step {done}, the last checkpoint "
                                "is from before: try a lower --lr, a longer --warmup or --amp off")
            speed = (done - logged) * config.batch_size / (time.monotonic() - logged_at)
            if RANK == 0:
                with log.open("a") as file:
                    file.write(f"{done},{loss:.6f},{lr:.6g},{norm:.4f},{speed:.1f}\n")
            total_loss.zero_()
            logged, logged_at, text = done, time.monotonic(), f"  loss {loss:.4f}  lr {lr:.1e}  {speed:.0f} images/s"
            text += f"  {spikes.item():.0f} spikes of the gradient" if spikes > 0 else ""
        progress.update(text, now=logged == done)
        if saving:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"config": dataclasses.asdict(config), "step": done}
            replace_file(out / "ckpt.pt", lambda path: torch.save(state, path))
        if stopping:
            break
        if done % config.sample_every == 0 or done == config.steps:
            shape = (64, config.channels, config.image_size, config.image_size)
            samples = to_uint8(diffusion.sample(ema_net, shape, steps=min(50, config.timesteps)))
            replace_file(out / f"step-{done:06}.png", lambda path: grid(samples).save(path, format="PNG"))
            logged_at = time.monotonic()  # sampling does not count as slow training
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return stop[0] if stopping else 0

# 5. Sampling, figures, evaluation -------------------------------------------------------------------------------------

def load_run(args):
    """(diffusion, network, config, path) of --ckpt, on --device; the network is ready to be called as model(x_t, t)."""
    path, checkpoint, config = load_checkpoint(args.ckpt)
    args.image_size = config.image_size
    device, dtype = pick_device(args.device, args.amp)
    model, diffusion = build(config)
    model.load_state_dict(checkpoint["model" if args.no_ema else "ema"])
    model = model.eval().to(device)
    print(f"{path}: step {checkpoint['step']:,}, {'plain' if args.no_ema else 'EMA'} weights, seed {args.seed}")
    return diffusion.to(device), torch.autocast(device.type, dtype, enabled=dtype is not None)(model), config, path

def watched(model, what, calls, on_call=lambda number, x_t, t, eps: None):
    """The model, with a line that says how many of so many calls it has had; on_call(number, x_t, t, eps) sees each."""
    progress = Progress(what, calls)

    def watched_model(x_t, t):
        eps = model(x_t, t)
        on_call(progress.done, x_t, t, eps)
        progress.update()
        return eps

    return watched_model

def draw(diffusion, model, config, args, on_call):
    """Pictures 0 .. -n - 1 of --seed, made --batch-size at a time: uint8 (n, C, H, W)."""
    starts = range(0, args.n, args.batch_size)
    calls = math.ceil(len(starts) / WORLD) * (args.steps or diffusion.timesteps)
    model = watched(model, "sampling, step", calls, on_call)

    def batch(first):
        shape = (min(args.batch_size, args.n - first), config.channels, config.image_size, config.image_size)
        return to_uint8(diffusion.sample(model, shape, args.steps, args.eta, args.seed, first)).cpu()

    return torch.cat(shared_out(batch, starts))

def grid(pictures, columns=None):
    """A PIL image of all pictures, uint8 (n, C, H, W); as many rows as columns, if not told how many."""
    columns = columns or math.ceil(len(pictures) ** 0.5)
    return Image.fromarray(utils.make_grid(pictures.cpu(), columns, pad_value=255).permute(1, 2, 0).numpy())

def unused(path, ending):
    """The path, at which nothing must be yet and whose name must end so: UserError otherwise."""
    path = Path(path)
    if path.exists() or not path.name.lower().endswith(ending):
        why = "is there already" if path.exists() else f"does not end in {ending}"
        raise UserError(f"{path} {why}: name another file")
    return path

def sample_command(args):
    """`sample`: new pictures from a checkpoint, as one grid, and as single files and a film if asked for."""
    if args.eta != 1 and args.steps is None:
        raise UserError("--eta is for DDIM: say in how many --steps")
    diffusion, model, config, path = load_run(args)
    names = (path.parent / f"samples-{i:03}.png" for i in itertools.count())
    out = unused(args.out or next(name for name in names if not name.exists()), ".png")
    film = args.gif and unused(out.with_suffix(".gif"), ".gif")
    folder = args.individual and unused(out.with_suffix(""), "")
    steps, frames = args.steps or diffusion.timesteps, []

    def on_call(number, x_t, t, eps):
        if args.gif and number < steps and number % math.ceil(steps / 60) == 0:  # the film is of the first batch
            frames.append(grid(to_uint8(x_t)))

    pictures = draw(diffusion, model, config, args, on_call)
    replace_file(out, lambda file: grid(pictures).save(file, format="PNG"))
    if film:
        frames.append(grid(pictures[: args.batch_size]))
        options = {"append_images": frames[1:], "duration": [50] * (len(frames) - 1) + [2000], "loop": 0}  # in ms
        replace_file(film, lambda file: frames[0].save(file, format="GIF", save_all=True, **options))
    for i, picture in enumerate(pictures if folder else []):
        replace_file(folder / f"{i:06}.png", lambda file: grid(picture[None]).save(file, format="PNG"))
    print(f"wrote {args.n} pictures to", " and ".join(str(path) for path in (out, film, folder) if path))

def labelled(pictures, columns, rows=()):
    """A PIL image of pictures (R, K, C, H, W) in [-1, 1], small ones enlarged; labels over columns and before rows."""
    tiles = grid(to_uint8(pictures.flatten(0, 1)), len(columns))
    scale, left, top = max(1, 64 // pictures.shape[-1]), 110 if rows else 0, 24
    tiles = tiles.resize((tiles.width * scale, tiles.height * scale), Image.Resampling.NEAREST)
    image = Image.new("RGB", (left + tiles.width, top + tiles.height), "white")
    image.paste(tiles, (left, top))
    places = [(left + (i + 0.5) * tiles.width / len(columns), top / 2) for i in range(len(columns))]
    places += [(left / 2, top + (i + 0.5) * tiles.height / len(rows)) for i in range(len(rows))]
    for place, label in zip(places, [*columns, *rows]):
        ImageDraw.Draw(image).text(place, label, "black", anchor="mm", font_size=13)
    return image

def chosen_pictures(args, config, n):
    """n pictures of --data, or of what the network learned from, of named sets the test split. uint8 (n, C, H, W)."""
    data, only = (args.data, "") if args.data else (config.data, config.only)
    pictures = Pictures(data, config.image_size, config.channels, only, config.data_root, train=False)
    order = torch.randperm(len(pictures), generator=seeded("cpu", args.seed))
    pictures.items = [pictures.items[i] for i in order[:n]]
    return pictures.read(config.workers)

def forward_figure(diffusion, model, config, args):
    """Rows of pictures with more and more of one noise mixed in (Eq. 4)."""
    x_0 = to_unit(chosen_pictures(args, config, args.n)).to(diffusion.betas.device)
    times = [t * diffusion.timesteps // 1000 for t in (0, 10, 50, 100, 150, 200, 250, 300, 400, 600, 800, 999)]
    eps = next(noise_for(x_0.shape, x_0.device, args.seed))
    columns = [diffusion.q_sample(x_0, torch.full((len(x_0),), t, device=x_0.device), eps) for t in times]
    return labelled(torch.stack(columns, dim=1), [f"t = {t}" for t in times])

def progressive_figure(diffusion, model, config, args):
    """Two rows a picture along the reverse process: x_t, and the x_0 that the network predicts from it (Fig. 6)."""
    args.batch_size, T, columns = args.n, diffusion.timesteps, []
    times = [T - 1, *(T * tenth // 10 for tenth in range(9, -1, -1))]

    def on_call(number, x_t, t, eps):
        if t[0].item() in times:
            columns.append(torch.stack([x_t, diffusion.predict_x0(x_t, t, eps)], dim=1).flatten(0, 1).cpu())

    x_0 = to_unit(draw(diffusion, model, config, args, on_call)).repeat_interleave(2, dim=0)
    labels = [*(f"t = {t}" for t in times), "x_0"]
    return labelled(torch.stack([*columns, x_0], dim=1), labels, ["x_t", "predicted x_0"] * args.n)

@torch.no_grad()
def interpolation_figure(diffusion, model, config, args):
    """Two pictures taken to several t by one noise, mixed there, and taken back: a row for each t (Figs. 8 and 9)."""
    x_0 = to_unit(chosen_pictures(args, config, 2)).to(diffusion.betas.device)[[0, -1]]
    noise, mix = noise_for((1, *x_0.shape[1:]), x_0.device, args.seed), torch.linspace(0, 1, 11, device=x_0.device)
    starts, eps, rows = [diffusion.timesteps * eighth // 8 for eighth in range(1, 9)], next(noise), []
    model = watched(model, "interpolating, step", sum(starts))
    for start in starts:
        a, b = diffusion.q_sample(x_0, torch.full((2,), start - 1, device=x_0.device), eps)
        x_t = torch.lerp(a, b, mix.view(-1, 1, 1, 1))
        for t in reversed(range(start)):
            x_t = diffusion.p_sample(model, x_t, torch.full((len(mix),), t, device=x_0.device), next(noise))
        rows.append(torch.cat([x_0[:1], x_t, x_0[1:]]))
    labels = ["source", "rec.", *(f"{value:.1f}" for value in mix.tolist()[1:-1]), "rec.", "source"]
    return labelled(torch.stack(rows), labels, [f"{start} steps" for start in starts])

FIGURES = {"forward": forward_figure, "progressive": progressive_figure, "interpolate": interpolation_figure}

def show_command(args):
    """`show`: one of the paper's figures, as a PNG."""
    out = unused(args.out or f"{args.figure}.png", ".png")
    alone = args.figure == "forward" and not args.ckpt  # it needs no network
    run = (Diffusion(), None, Config(image_size=args.image_size, data=args.data or "")) if alone else load_run(args)[:3]
    image = FIGURES[args.figure](*run, args)
    replace_file(out, lambda file: image.save(file, format="PNG"))
    print(f"wrote {out}")

def eval_command(args):
    """`eval`: the variational bound on test pictures in bits/dim, and its split into rate and distortion. Sec. 4.3."""
    json_file = args.json and unused(args.json, ".json")
    diffusion, model, config, _ = load_run(args)
    parts = chosen_pictures(args, config, args.n).split(args.batch_size)
    model = watched(model, "bits/dim, step", math.ceil(len(parts) / WORLD) * diffusion.timesteps)

    def bits(i):
        x_0 = to_unit(parts[i]).to(diffusion.betas.device)
        return [table.cpu() for table in diffusion.bits_per_dim(model, x_0, args.seed, i * args.batch_size)]

    terms, mse = map(torch.cat, zip(*shared_out(bits, range(len(parts)))))
    print(f"mean and standard error over {len(terms)} pictures; the first three in bits/dim, the last on 0..255")
    results = {"pictures": len(terms), "terms": terms.mean(0).tolist(), "mse": mse.mean(0).tolist()}
    for name, values in (("total", terms.sum(1)), ("rate (L_1 + ... + L_T)", terms[:, 1:].sum(1)),
                         ("distortion (L_0)", terms[:, 0]), ("rmse of the last x_0", mse[:, 0].sqrt() * 127.5)):
        mean, error = values.mean().item(), values.std(correction=0).item() / len(values) ** 0.5
        results[name.split()[0]] = {"mean": mean, "standard_error": error}
        print(f"{name:22} {mean:8.4f} +- {error:.4f}")
    if json_file:
        replace_file(json_file, lambda file: file.write_text(json.dumps(results)))

# 6. The command line --------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, like all others of this program."""

    def error(self, message):
        raise UserError(f"{message} (`{self.prog} --help` lists every flag)")

def train_command(args):
    """`train`: the configuration is that of a preset or a checkpoint, changed by the flags given; then trains."""
    flags = {name: value for name, value in vars(args).items() if name in Config.__dataclass_fields__}
    flags |= {name: tuple(value) for name, value in flags.items() if isinstance(value, list)}
    name, path, checkpoint = Path(flags.get("data", "")).resolve().name if "data" in flags else "", None, None
    out = Path(args.out or Path("runs", "-".join(filter(None, [name, flags.get("only")]))))
    if args.resume:
        path, checkpoint, base = load_checkpoint(out / "ckpt.pt" if args.out or name else None)
        out = path.parent
    elif (out / "ckpt.pt").exists():
        raise UserError(f"{out} holds a checkpoint: go on from it with --resume, or name another folder with --out")
    elif args.init_from:
        path, checkpoint, base = load_checkpoint(args.init_from)
        checkpoint = {"step": 0, "model": checkpoint["ema"], "ema": checkpoint["ema"]}
        base = dataclasses.replace(base, data="", only="")
    else:
        slow = pick_device(args.device, "off")[0].type == "cpu"
        if slow and not args.preset:
            print("no accelerator found: training the preset tiny (--preset cifar10 is the paper's network)")
        base = PRESETS[args.preset or ("tiny" if slow else "cifar10")]
        if name in ("mnist", "fashion-mnist"):
            base = dataclasses.replace(base, channels=1, flip=name != "mnist")
    config = dataclasses.replace(base, **flags)
    config = dataclasses.replace(config, accumulate=math.lcm(config.accumulate, WORLD))  # each process has its passes
    for name in NETWORK_FIELDS if checkpoint else ():
        if getattr(config, name) != getattr(base, name):
            raise UserError(f"{flag_name(name)} {getattr(config, name)}, but {path} has {getattr(base, name)}")
    if args.resume and checkpoint["step"] >= config.steps:
        raise UserError(f"{path} is at step {checkpoint['step']} of {config.steps} already: give it more with --steps")
    args.batch_size, args.image_size = config.batch_size, config.image_size
    number = train(config, out, *pick_device(args.device, config.amp), checkpoint)
    if number:
        print(f"\nstopped and saved; to go on: python ddpm.py train --resume --out {out}")
        return 128 + number
    print(f"trained; for new pictures: python ddpm.py sample --ckpt {out / 'ckpt.pt'}")

def main(argv=None):
    """The command line; returns the exit status. Mistakes are one line on stderr and status 2."""
    parser = Parser(prog="ddpm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="train|sample|eval|show")
    train_parser = commands.add_parser("train", help="train on pictures", description="In [] are cifar10's values.")
    train_parser.set_defaults(run=train_command)
    train_parser.add_argument("--out", help="the run's folder [runs/NAME OF THE DATA]")
    start = train_parser.add_mutually_exclusive_group()
    start.add_argument("--preset", choices=PRESETS, help="[cifar10 with an accelerator, tiny without]")
    start.add_argument("--resume", action="store_true", help="go on where the run in --out, or the newest, stopped")
    start.add_argument("--init-from", metavar="CKPT", help="begin with this checkpoint's weights (fine-tuning)")
    for f in dataclasses.fields(Config):
        options = {"dest": f.name, "default": argparse.SUPPRESS, "help": f"{f.metadata['help']} [{f.default}]"}
        if isinstance(f.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            options |= {"type": int, "nargs": "*" if f.name == "attention_resolutions" else "+"}
        else:
            options |= {"type": type(f.default), "choices": f.metadata["choices"]}
        train_parser.add_argument(flag_name(f.name), **options)

    sample = commands.add_parser("sample", help="make new pictures from a checkpoint")
    evaluate = commands.add_parser("eval", help="measure a checkpoint on test pictures: bits/dim, rate and distortion")
    show = commands.add_parser("show", help="make one of the paper's figures")
    show.add_argument("figure", choices=FIGURES)
    for command, run, n in (sample, sample_command, 64), (evaluate, eval_command, 256), (show, show_command, 8):
        command.set_defaults(run=run, steps=None, eta=1.0, image_size=64)
        command.add_argument("--ckpt", help="a checkpoint or its folder, or that of published weights [newest run]")
        command.add_argument("-n", type=int, default=n, help=f"number of pictures [{n}]")
        command.add_argument("--batch-size", type=int, default=64, help="pictures worked on at a time [64]")
        command.add_argument("--seed", type=int, default=0, help="another seed, other noise, other pictures [0]")
        command.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="[auto]")
        command.add_argument("--no-ema", action="store_true", help="the weights themselves, not their moving average")
    for command in (evaluate, show):
        command.add_argument("--data", help="a folder of pictures, or a named set's test split [what it learned from]")
    sample.add_argument("--steps", type=int, help="DDIM in so many steps, e.g. 50, in place of Algorithm 2 in T")
    sample.add_argument("--eta", type=float, default=1.0, help="DDIM's noise, from 0 (none) to 1 (as much as DDPM) [1]")
    sample.add_argument("--out", help="the PNG file [samples-NUMBER.png beside the checkpoint]")
    sample.add_argument("--individual", action="store_true", help="each picture as a PNG too")
    sample.add_argument("--gif", action="store_true", help="a film of the reverse process too")
    evaluate.add_argument("--json", help="every term to this file too")
    show.add_argument("--out", help="the PNG file [FIGURE.png]")
    for command in (train_parser, sample, evaluate, show):
        command.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="[auto]")
    try:
        args = parser.parse_args(argv)
        for name, low in (("-n", 1), ("--batch-size", 1), ("--seed", 0), ("--eta", 0)):
            if not (value := getattr(args, name.strip("-").replace("-", "_"), low)) >= low:
                raise UserError(f"{name} is {value}: it must be at least {low}")
        if WORLD > 1:
            dist.init_process_group()
            sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return args.run(args) or 0
    except (UserError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            size = f"{args.batch_size} pictures of {args.image_size} pixels"
            error = UserError(f"{error} ({size}: lower --batch-size, or raise --accumulate)")
        if isinstance(error, RuntimeError) and "EADDRINUSE" not in str(error):
            raise
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)  # torchvision's have several lines
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if WORLD > 1 and dist.is_initialized():
            time.sleep(0.1)  # torch 2.6 waits for ever for threads that need Python to drop their last tensors
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main())
