"""Denoising Diffusion Probabilistic Models in one file, in the order of the paper.

    python ddpm.py train --data ./images      # a folder of pictures, or shapes, mnist, cifar10, ...
    python ddpm.py sample                     # new pictures from the newest run
    python ddpm.py eval                       # its bits/dim on pictures that it has not seen
    python ddpm.py show progressive           # a figure: forward, progressive or interpolate

The paper is Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020
(arXiv 2006.11239). "The released code" is the authors' TensorFlow repository,
hojonathanho/diffusion, which settles what the paper leaves open. The idea:

  * Destroy a picture x_0 by adding a little Gaussian noise T times, until only noise is left
    (Eq. 2). x_t can be drawn from x_0 in one jump, for any t (Eq. 4).
  * Train a network to tell, from x_t and t, which noise was mixed in (Eq. 14, Algorithm 1).
  * Start from pure noise, and take the predicted noise out again in small steps (Algorithm 2).

Sections 1 and 2 are the paper; 3 to 5 are what it takes to train: data, files, the loop. Shapes
are written (B, C, H, W): pictures in a batch, channels, height, width. A picture x_0 is float32
in [-1, 1]; on the way from or to a file it is uint8, 0..255.
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import functools
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
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.distributions import Distribution, Normal, kl_divergence
from torchvision import datasets, utils

Distribution.set_default_validate_args(False)  # a check makes the host wait for the GPU
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
STOPPING = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]

class UserError(Exception):
    """A mistake that the user can mend. It is printed as one line; the exit status is 2."""

def say(text, end="\n"):
    """Prints a line, over the progress line in a terminal; of several processes the first does.
    A terminal or a pipe that is gone must not end a run: what follows is printed into nothing."""
    try:
        if RANK == 0:
            print("\r\x1b[K" + text if sys.stdout.isatty() else text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

class Progress:
    """Hands items on and shows how far they are, with `text` and an estimate of the time left.
    In a terminal that is a line which rewrites itself, elsewhere a new line every 30 s."""

    def __init__(self, items, what, total, first=0):
        self.items, self.what, self.total, self.first, self.text = items, what, total, first, ""

    def __iter__(self):
        terminal = sys.stdout.isatty()
        start = shown = time.perf_counter()
        for done, item in enumerate(self.items, self.first + 1):
            yield item
            now = time.perf_counter()
            if done == self.total or now - shown > (0.1 if terminal else 30):
                shown, pace = now, (now - start) / (done - self.first)
                left = timedelta(seconds=round(pace * (self.total - done)))
                end = "" if terminal and done < self.total else "\n"
                say(f"{self.what} {done}/{self.total}{self.text}  {left} left", end)

def setting(default, help, low=0, high=10**9, choices=()):
    """A field that the user can set: its default, what `--help` says, and what it may be."""
    about = {"help": f"{help} [{default}]", "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=about)

def flag_of(name):
    """How a field is called on the command line."""
    return "-n" if name == "n" else "--" + name.replace("_", "-")

def check_setting(field, value):
    """UserError, which names the flag, unless the value is of the field's kind and in its range."""
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    kinds = {float: (float, int), tuple: (int,)}.get(field.type, (field.type,))
    for item in value if field.type is tuple else [value]:
        fits = type(item) in kinds and (item in choices if choices else
                                        field.type is str or low <= item <= high)  # not so for NaN
        if not fits:
            wanted = f"one of {choices}" if choices else f"from {low} to {high}"
            raise UserError(f"{flag_of(field.name)} is {item!r:.50}: it must be {wanted}")

@dataclasses.dataclass(frozen=True)
class Config:
    """All that makes a run, the paper's for CIFAR-10, and the flags of `train`; or UserError."""

    # the network
    image_size: int = setting(32, "height and width of the pictures in pixels", 1, 1024)
    channels: int = setting(3, "3 for colour, 1 for grey", choices=(1, 3))
    base_channels: int = setting(128, "channels at full resolution, a multiple of 32", 32, 1024)
    channel_mults: tuple = setting((1, 2, 2, 2), "channels of each level, as multiples", 1, 64)
    num_res_blocks: int = setting(2, "residual blocks a level going down, one more up", 1, 16)
    attention_resolutions: tuple = setting((16,), "feature map sizes with self-attention", 1, 1024)
    dropout: float = setting(0.1, "dropout inside the residual blocks", 0, 1)
    # the diffusion process
    timesteps: int = setting(1000, "T, the number of noising steps", 2, 100_000)
    beta_start: float = setting(1e-4, "noise variance of the first step, for T = 1000", 0, 1)
    beta_end: float = setting(0.02, "noise variance of the last step, for T = 1000", 0, 1)
    variance: str = setting("fixedlarge", "reverse variance", choices=("fixedlarge", "fixedsmall"))
    # the training
    steps: int = setting(800_000, "optimiser steps in all", 1)
    batch_size: int = setting(128, "pictures in an optimiser step", 1, 2**16)
    accumulate: int = setting(1, "passes that a batch is split into, to save memory", 1)
    lr: float = setting(2e-4, "learning rate of Adam")
    warmup: int = setting(5000, "steps of linear learning-rate warm-up")
    grad_clip: float = setting(1.0, "largest global norm of the gradient, 0 for any")
    ema_decay: float = setting(0.9999, "decay of the moving average of the weights", 0, 1)
    flip: bool = setting(True, "mirror half of the pictures, left to right")
    seed: int = setting(0, "seed of every random draw", 0, 2**63 - 1)
    amp: str = setting("auto", "mixed precision", choices=("auto", "off", "bf16"))
    compile: bool = setting(False, "torch.compile: slow at first, then faster; for CUDA")
    # the run
    data: str = setting("", "a folder of pictures, or shapes, mnist, cifar10, cifar10/ship, ...")
    data_root: str = setting("data", "where the named sets are kept, and downloaded to once")
    cache_gb: float = setting(4.0, "larger sets stream from disk, others stay in memory")
    workers: int = setting(4, "processes that read pictures", 0, 256)
    log_every: int = setting(100, "steps between rows of log.csv", 1)
    sample_every: int = setting(5000, "steps between grids of samples", 1)
    ckpt_every: int = setting(5000, "steps between checkpoints", 1)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))
        if not 0 < len(self.channel_mults) <= 8 or self.batch_size % self.accumulate:
            raise UserError("--channel-mults must be 1 to 8, --accumulate must divide --batch-size")

    def shape(self, n):
        """Of n pictures: (n, C, H, W)."""
        return n, self.channels, self.image_size, self.image_size

NETWORK = ("image_size", "channels", "base_channels", "channel_mults", "num_res_blocks",
           "attention_resolutions", "dropout")

PRESETS = {
    "cifar10": Config(),
    "celebahq256": Config(image_size=256, channel_mults=(1, 1, 2, 2, 4, 4), dropout=0.0, lr=2e-5,
                          variance="fixedsmall", steps=500_000, batch_size=64),
    "tiny": Config(base_channels=32, num_res_blocks=1, attention_resolutions=(8,), dropout=0.0,
                   steps=2500, batch_size=32, lr=1e-3, warmup=100, ema_decay=0.995,
                   log_every=50, sample_every=500, ckpt_every=500),  # ten minutes on two CPU cores
}


# 1. The diffusion process -------------------------------------------------------------------------
#
# The paper counts steps 1..T and calls the clean picture x_0. Here, as in the released code, t runs
# over 0..T-1, so that it indexes a table and is what the network is fed: t here is t + 1 in the
# paper, alpha_bars[t] is its alpha_bar_{t+1}, and x_t with t = 0 already holds a little noise.

def linear_beta_schedule(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    """Variances of the forward steps, beta_1..beta_T: (T,) float64, linear (Sec. 4).
    Both ends are scaled by 1000/T. UserError if a beta is not within (0, 1), or T is below 2."""
    first, last = (1000 / max(1, timesteps) * beta for beta in (beta_start, beta_end))
    if timesteps < 2 or not 0 < first <= last < 1:
        raise UserError(f"T = {timesteps} has betas {first:.3g} to {last:.3g}: more --timesteps")
    return torch.linspace(first, last, timesteps, dtype=torch.float64)

class Diffusion(nn.Module):
    """Two Markov chains: q adds noise, p_theta takes it away by a network model(x_t, t) -> eps.
    Tables over t = 0..T-1 are computed in float64 and kept as float32 buffers. `variance` is the
    reverse process's (Sec. 3.2): "fixedlarge" is beta_t, "fixedsmall" is beta~_t."""

    def __init__(self, timesteps=1000, beta_start=1e-4, beta_end=0.02, variance="fixedlarge"):
        super().__init__()
        self.timesteps = timesteps
        betas = linear_beta_schedule(timesteps, beta_start, beta_end)
        alphas = 1 - betas
        alpha_bars = alphas.cumprod(dim=0)
        alpha_bars_prev = F.pad(alpha_bars[:-1], (1, 0), value=1.0)  # alpha_bar_0 = 1
        posterior_variance = betas * (1 - alpha_bars_prev) / (1 - alpha_bars)  # beta~, Eq. 7
        sigma = {"fixedlarge": betas, "fixedsmall": posterior_variance}[variance].sqrt()
        # beta~_1 is 0, of which no picture has a likelihood: the released code takes beta~_2.
        sigma[0] = posterior_variance[1].sqrt()
        tables = {
            "betas": betas,
            "alpha_bars": alpha_bars,
            "sqrt_alpha_bars": alpha_bars.sqrt(),
            "sqrt_one_minus_alpha_bars": (1 - alpha_bars).sqrt(),
            "posterior_mean_x_0": alpha_bars_prev.sqrt() * betas / (1 - alpha_bars),
            "posterior_mean_x_t": alphas.sqrt() * (1 - alpha_bars_prev) / (1 - alpha_bars),
            "posterior_sigma": posterior_variance.sqrt(),
            "sigma": sigma,
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float())

    def q_sample(self, x_0, t, eps):
        """x_t ~ q(x_t | x_0) in one jump (Eq. 4). x_0, noise eps: (B, C, H, W); t: (B,) or int."""
        if torch.is_tensor(t):
            t = t.view(-1, 1, 1, 1)  # table[t] then broadcasts over (B, C, H, W)
        return self.sqrt_alpha_bars[t] * x_0 + self.sqrt_one_minus_alpha_bars[t] * eps

    def loss(self, model, x_0):
        """Algorithm 1, with a batch x_0: (B, C, H, W) from line 2: L_simple (Eq. 14), a scalar."""
        t = torch.randint(self.timesteps, (len(x_0),), device=x_0.device)  # line 3: t ~ Uniform
        eps = torch.randn_like(x_0)  # line 4: eps ~ N(0, I)
        x_t = self.q_sample(x_0, t, eps)
        return F.mse_loss(model(x_t, t), eps)  # line 5: || eps - eps_theta(x_t, t) ||^2

    def q_posterior(self, x_0, x_t, t):
        """q(x_{t-1} | x_t, x_0): a Normal over (B, C, H, W); t: an int from here on (Eqs. 6, 7)."""
        mean = self.posterior_mean_x_0[t] * x_0 + self.posterior_mean_x_t[t] * x_t
        return Normal(mean, self.posterior_sigma[t])

    def predict_x_0(self, model, x_t, t):
        """x_0: (B, C, H, W), by Eq. 4 from the network's noise; clipped, as released."""
        eps = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
        x_0 = (x_t - self.sqrt_one_minus_alpha_bars[t] * eps) / self.sqrt_alpha_bars[t]
        return x_0.clamp(-1, 1)

    def p_step(self, model, x_t, t):
        """p_theta(x_{t-1} | x_t), a Normal, and the predicted x_0. Unless clipped, its mean is
        (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t), Eq. 11."""
        x_0 = self.predict_x_0(model, x_t, t)
        return Normal(self.q_posterior(x_0, x_t, t).mean, self.sigma[t]), x_0

    @torch.no_grad()
    def sample(self, model, noise, start=None):
        """Algorithm 2: yields (t, x_t, predicted x_0) for t = T-1..0, and last (-1, x_0, x_0).
        `noise` yields x_T: (B, C, H, W), then each z; with `start` x_t of t = start - 1, then z."""
        x_t = next(noise)  # line 1: x_T ~ N(0, I)
        for t in reversed(range(start or self.timesteps)):  # line 2: for t = T, ..., 1
            p, x_0 = self.p_step(model, x_t, t)
            yield t, x_t, x_0
            z = next(noise) if t > 0 else 0  # line 3: z ~ N(0, I) if t > 1, else 0
            x_t = p.mean + p.stddev * z  # line 4
        yield -1, x_t, x_t  # line 6: x_0

    @torch.no_grad()
    def sample_ddim(self, model, noise, steps, eta=0.0):
        """DDIM (Song et al. 2020) in `steps` of the T steps: yields as `sample` does.
        eta = 0 adds no noise, 1 in all T steps is Algorithm 2 with beta~_t. UserError elsewhere."""
        if not (1 <= steps <= self.timesteps and 0 <= eta <= 1):
            raise UserError(f"--steps {steps} --eta {eta}: use 1 to {self.timesteps}, and 0 to 1")
        times = torch.linspace(self.timesteps - 1, 0, steps).round().int().tolist()
        x_t = next(noise)
        for t, s in zip(times, times[1:]):  # from x_t to x_s
            x_0 = self.predict_x_0(model, x_t, t)
            yield t, x_t, x_0
            noise_t, noise_s = self.sqrt_one_minus_alpha_bars[t], self.sqrt_one_minus_alpha_bars[s]
            eps = (x_t - self.sqrt_alpha_bars[t] * x_0) / noise_t  # goes with the clipped x_0
            beta = (noise_t**2 - noise_s**2) / self.alpha_bars[s]  # 1 - alpha_bar_t / alpha_bar_s
            sigma = eta * noise_s / noise_t * beta.sqrt()  # Eq. 16
            direction = (noise_s**2 - sigma**2).clamp(min=0).sqrt()  # rounding can pass 0
            x_t = self.sqrt_alpha_bars[s] * x_0 + direction * eps + sigma * next(noise)  # Eq. 12
        x_0 = self.predict_x_0(model, x_t, times[-1])
        yield times[-1], x_t, x_0
        yield -1, x_0, x_0  # where alpha_bar_s is 1, Eq. 12 is the predicted x_0

    @torch.no_grad()
    def bits_per_dim(self, model, x_0, noise):
        """The bound on -log2 p(x_0) term by term (Eq. 5): yields (L_t in bits/dim, mse), each (B,).
        t = 0..T as the paper counts. mse: of the x_0 predicted before L_t is sent, at T of 0."""
        for t in range(self.timesteps):
            x_t = self.q_sample(x_0, t, next(noise))
            p, predicted = self.p_step(model, x_t, t)
            if t > 0:
                nats = kl_divergence(self.q_posterior(x_0, x_t, t), p)
            else:
                nats = -discretised_log_likelihood(x_0, p)
            yield nats.mean((1, 2, 3)) / math.log(2), (predicted - x_0).square().mean((1, 2, 3))
        q = Normal(self.sqrt_alpha_bars[-1] * x_0, self.sqrt_one_minus_alpha_bars[-1])
        nats = kl_divergence(q, Normal(torch.zeros_like(x_0), 1))  # L_T
        yield nats.mean((1, 2, 3)) / math.log(2), x_0.square().mean((1, 2, 3))

def discretised_log_likelihood(x_0, p):
    """log of the mass of the Normal p within the grey level of x_0, 2/255 wide, elementwise.
    Eq. 13: black and white are open to infinity. The tanh is the released code's normal CDF."""
    low, high = ((x_0 + edge - p.mean) / p.stddev for edge in (-1 / 255, 1 / 255))
    below, above = (0.5 + 0.5 * torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
                    for z in (low, high))
    mass = above.masked_fill(x_0 > 0.999, 1) - below.masked_fill(x_0 < -0.999, 0)
    return mass.clamp(min=1e-12).log()

EPOCH, STEP, PICTURE = range(3)  # what a random stream is for: tags that keep seeds apart

def seed_of(seed, *key):
    """A seed that is a function of the run's seed and a key: a tag, then its numbers."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])

def noise_for(shape, device, seed, first=0):
    """Yields N(0, I) for ever, (B, C, H, W) = shape; picture i's is that of (seed, first + i)."""
    ahead = max(1, 2**17 // math.prod(shape[1:]))  # steps drawn at once: a GPU likes few calls
    seeds = (seed_of(seed, PICTURE, first + i) for i in range(shape[0]))
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    while True:
        draws = [torch.randn(ahead, *shape[1:], generator=g, device=device) for g in generators]
        yield from torch.stack(draws, dim=1)


# 2. The network -----------------------------------------------------------------------------------
#
# Appendix B as released, oddities and all, with the parameter names of the published weights.
# `h` is a feature map, `width` a number of channels.

def sinusoidal_embedding(t, dim):
    """The Transformer's embedding of steps t: (B,) -> (B, dim) float32, sines, then cosines."""
    half = dim // 2  # the frequencies fall from 1 to 1/10000, both included, hence half - 1
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)

def group_norm(width):
    """GroupNorm in the paper's 32 groups; in thin networks of 4 channels: 1 would lose the time."""
    return nn.GroupNorm(min(32, width // 4), width, eps=1e-6)  # TensorFlow's eps, not PyTorch's

class ResBlock(nn.Module):
    """Convolutions beside a shortcut, told the time: (B, width_in, H, W) -> (B, width, H, W)."""

    def __init__(self, width_in, width, temb_width, dropout):
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_width, width)
        self.norm2 = group_norm(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.conv_shortcut(x) + h

class Attention(nn.Module):
    """Self-attention over all positions, one head as wide as the channels: (B, C, H, W) -> same."""

    def __init__(self, width):
        super().__init__()
        self.group_norm = group_norm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))  # its published name is to_out.0

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2).contiguous()  # (B, HW, C)
        q, k, v = (project(h).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # softmax(q k^T / sqrt(C)) v
        return x + self.to_out(h).transpose(1, 2).view_as(x)

def named(**layers):
    """A Sequential whose layers have these names, those of the published weights."""
    return nn.Sequential(OrderedDict(layers))

class Level(nn.Module):
    """Residual blocks of one size, one for each of `widths_in`, an attention or none after each."""

    def __init__(self, widths_in, width, temb_width, dropout, attend):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(w, width, temb_width, dropout) for w in widths_in)
        self.attentions = nn.ModuleList(Attention(width) if a else nn.Identity() for a in attend)

class UNet(nn.Module):
    """eps_theta(x_t, t): the noise in x_t. x_t: (B, C, H, W) and t: (B,) -> (B, C, H, W) float32.
    A level for each of channel_mults, each half the size of the one before; or UserError."""

    def __init__(self, image_size=32, channels=3, base_channels=128, channel_mults=(1, 2, 2, 2),
                 num_res_blocks=2, attention_resolutions=(16,), dropout=0.1):
        super().__init__()
        last = len(channel_mults) - 1  # the number of the last level
        sizes = [image_size // 2**i for i in range(last + 1)]
        if image_size % 2**last:
            raise UserError(f"image size {image_size} can't be halved {last} times: "
                            f"use a multiple of {2**last}")
        if base_channels % 32:
            raise UserError(f"{base_channels} base channels are no multiple of 32")
        if not set(attention_resolutions) <= set(sizes):
            raise UserError(f"--attention-resolutions {attention_resolutions} are not of {sizes}")
        self.base_channels, temb = base_channels, 4 * base_channels
        linear_1, linear_2 = nn.Linear(base_channels, temb), nn.Linear(temb, temb)
        self.time_embedding = named(linear_1=linear_1, act=nn.SiLU(), linear_2=linear_2)
        self.conv_in = nn.Conv2d(channels, base_channels, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        widths = [base_channels * mult for mult in (1, *channel_mults, channel_mults[-1])]
        for i, attend in enumerate(size in attention_resolutions for size in sizes):
            before, width, after = widths[i : i + 3]  # of the levels above, here, and below
            ways_in = [before] + [width] * (num_res_blocks - 1)
            down = Level(ways_in, width, temb, dropout, [attend] * num_res_blocks)
            skips = [width] * num_res_blocks + [before]  # what forward() kept on the way down
            ways_in = [after] + [width] * num_res_blocks
            ways_in = [w + skip for w, skip in zip(ways_in, skips)]
            up = Level(ways_in, width, temb, dropout, [attend] * len(skips))
            halve, double = (nn.Conv2d(width, width, 3, s, p) for s, p in ((2, 0), (1, 1)))
            down.downsamplers = nn.ModuleList([named(conv=halve)] if i < last else [])
            up.upsamplers = nn.ModuleList([named(conv=double)] if i > 0 else [])
            self.down_blocks.append(down)
            self.up_blocks.insert(0, up)
        self.mid_block = Level([width, width], width, temb, dropout, [True, False])
        self.conv_norm_out = group_norm(widths[1])
        self.conv_out = nn.Conv2d(widths[1], channels, 3, padding=1)
        for name, weights in self.named_parameters():
            if name.endswith(("bias", "conv2.weight", "to_out.0.weight", "conv_out.weight")):
                nn.init.zeros_(weights)  # each residual branch starts as nothing, and so does eps
            elif weights.dim() > 1:  # but a norm's gain stays 1
                nn.init.xavier_uniform_(weights)

    def forward(self, x_t, t):
        temb = self.time_embedding(sinusoidal_embedding(t, self.base_channels))  # (B, 4 base)
        h = self.conv_in(x_t)  # (B, base, H, W)
        skips = [h]
        for level in self.down_blocks:  # (B, width, H, W) -> (B, width, H/2, W/2) -> ...
            for resnet, attention in zip(level.resnets, level.attentions):
                h = attention(resnet(h, temb))
                skips.append(h)
            for downsample in level.downsamplers:  # one, or none at the last level
                h = downsample.conv(F.pad(h, (0, 1, 0, 1)))  # TensorFlow's SAME
                skips.append(h)
        for resnet, attention in zip(self.mid_block.resnets, self.mid_block.attentions):
            h = attention(resnet(h, temb))
        for level in self.up_blocks:  # ... -> (B, width, H/2, W/2) -> (B, width, H, W)
            for resnet, attention in zip(level.resnets, level.attentions):
                h = attention(resnet(torch.cat([h, skips.pop()], dim=1), temb))
            for upsample in level.upsamplers:
                h = upsample.conv(F.interpolate(h, scale_factor=2))
        return self.conv_out(F.silu(self.conv_norm_out(h))).to(x_t.dtype)  # not autocast's

def build(config, device=None):
    """(UNet, Diffusion) of a Config."""
    network = {name: getattr(config, name) for name in NETWORK}
    betas = config.timesteps, config.beta_start, config.beta_end
    return UNet(**network).to(device), Diffusion(*betas, config.variance).to(device)


# 3. Data ------------------------------------------------------------------------------------------

def to_unit(pictures):
    """uint8, 0..255 -> float32 in [-1, 1] (Sec. 3.3)."""
    return pictures.float() / 127.5 - 1

def to_uint8(x_0):
    """float32 in [-1, 1] -> uint8, 0..255, rounded: a cast alone truncates, and darkens."""
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def grid(pictures, columns=None):
    """A PIL image of pictures, uint8 (N, C, H, W), side by side; a square if not told how wide."""
    width = columns or math.ceil(len(pictures) ** 0.5)
    tiled = utils.make_grid(pictures.cpu(), width, pad_value=255).permute(1, 2, 0)
    return Image.fromarray(tiled.numpy())

def read_picture(image, size, channels):
    """The middle square of a PIL image, resized: uint8 (channels, size, size).
    Turned as its EXIF says, transparent over white, 16 bits to 8. Raises one of BROKEN."""
    mode = "L" if channels == 1 else "RGB"
    with image:
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise ValueError("it has 32 bits a channel: save it with 8 or 16")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion cuts off at 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        image = ImageOps.fit(image.convert("RGBA"), (size, size))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
        return np.array(image).reshape(size, size, channels).transpose(2, 0, 1)

class Shapes:
    """Coloured circles, squares and triangles, 10,000 a split, used like torchvision's sets."""

    classes = ("circle", "square", "triangle")

    def __init__(self, root="", train=True, download=False):
        self.first, self.targets = 0 if train else 10_000, [i % 3 for i in range(10_000)]

    def __getitem__(self, i):
        uniform = np.random.default_rng(self.first + i).uniform
        radius, colour = uniform(24, 48), f"hsl({uniform(0, 360):.0f}, 80%, {uniform(35, 60):.0f}%)"
        circle, sides = (*uniform(radius, 128 - radius, 2), radius), (64, 4, 3)[self.targets[i]]
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).regular_polygon(circle, sides, fill=colour)
        return image, self.targets[i]

def flowers(root, train, download):
    """Flowers by torchvision's ways; its own Flowers102 needs scipy to read labels and splits."""
    folder, url = Path(root, "flowers-102"), "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    if len(list(folder.glob("jpg/*.jpg"))) < 8189:
        archive, md5 = url + "102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"
        datasets.utils.download_and_extract_archive(archive, folder, md5=md5)
    return datasets.ImageFolder(folder)

SETS = {"shapes": Shapes, "mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "flowers102": flowers}
ENDINGS = (*datasets.folder.IMG_EXTENSIONS, ".gif")
# What Pillow's many decoders raise on files that are broken, or that are something else.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, RuntimeError,
          struct.error, Image.DecompressionBombError)
Image.MAX_IMAGE_PIXELS = 2**26  # twice as many are a DecompressionBombError
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
say_once = functools.cache(say)

def find_pictures(folder):
    """Paths of all pictures below a folder, sorted; none of hidden folders or runs of `train`."""
    folder = Path(folder)
    runs = {path.parent for path in folder.rglob("ckpt.pt")}
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS]
    paths = [path for path in paths if "/." not in f"/{path.relative_to(folder).as_posix()}"]
    return sorted(path for path in paths if runs.isdisjoint(path.parents) and path.is_file())

def ignore_signals(worker):
    """Ctrl-C and the like reach a whole group of processes: the main one says when to end."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)

class Pictures(torch.utils.data.Dataset):
    """The pictures of a folder, a named set, or one class of it. UserError if there are none.
    Item i is uint8 (C, size, size), or None, and said once, if it can't be read."""

    def __init__(self, data, config, root="data", train=True):
        self.config, self.set = config, None
        name, _, label = data.partition("/")
        if name in SETS:
            try:
                self.set = SETS[name](root, train=train, download=True)
            except (OSError, RuntimeError) as error:  # no network, or a damaged download
                raise UserError(f"can't get {name} into {root} ({error}): try again") from error
            classes = [name.lower() for name in self.set.classes]
            self.items = [i for i, target in enumerate(map(int, self.set.targets))
                          if label.lower() in ("", str(target), classes[target])]
            missing = f"{name} has no class {label!r}, it has: {', '.join(classes)}"
        else:
            self.items = find_pictures(data) if data else []
            missing = (f"--data {data!r} holds no images (looked for {' '.join(ENDINGS)}), "
                       f"nor is it one of {', '.join(SETS)}")
        if not self.items:
            raise UserError(missing)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        try:
            image = self.set[item][0] if self.set else Image.open(item)
            return read_picture(image, self.config.image_size, self.config.channels)
        except BROKEN as error:
            say_once(f"skipped a broken picture, {str(item)!r}: {error or type(error).__name__}")

    def batches(self, groups):
        """For each group of item numbers, those pictures that can be read: uint8 (N, C, H, W)."""
        workers = min(self.config.workers, os.cpu_count(), len(self) // 256)
        tried = found = 0
        for items in torch.utils.data.DataLoader(self, batch_sampler=groups, num_workers=workers,
                                                 collate_fn=list, worker_init_fn=ignore_signals):
            good = np.array([item for item in items if item is not None], np.uint8)
            tried, found = tried + len(items), found + len(good)
            if tried >= len(self) and not found:
                raise UserError(f"none of the {len(self)} pictures can be read")
            yield torch.from_numpy(good.reshape(self.config.shape(len(good))))

    def read(self):
        """All pictures that can be read, in order: uint8 (N, C, H, W)."""
        pictures = torch.empty(self.config.shape(len(self)), dtype=torch.uint8)
        groups, n = torch.arange(len(self)).split(256), 0
        for batch in Progress(self.batches(groups), "reading pictures, batch", len(groups)):
            pictures[n : n + len(batch)] = batch
            n += len(batch)
        return pictures[:n]

@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The order of n pictures in an epoch, a list: a function of the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(seed_of(seed, EPOCH, epoch))
    return torch.randperm(n, generator=generator).tolist()

def training_batches(pictures, config, step, passes=1):
    """This process's batches from a training step on, for ever: uint8 (B / passes, C, H, W).
    Picture k of a run is number k % n of epoch k // n: it can be resumed anywhere, by any number
    of processes. `pictures` is a tensor of them, or a Pictures to stream."""
    n, size = len(pictures), config.batch_size // passes

    def groups():
        for i in itertools.count(step * passes + RANK, WORLD):
            run = range(i * size, (i + 1) * size)
            yield [epoch_order(n, config.seed, k // n)[k % n] for k in run]

    if isinstance(pictures, Pictures):
        return filter(len, pictures.batches(groups()))
    return (pictures[torch.tensor(group).to(pictures.device)] for group in groups())

def some_pictures(data, config, n, seed):
    """n pictures of `data`, of a named set's test split, in an order of the seed: (n, C, H, W)."""
    pictures, found = Pictures(data, config, train=False), []
    order = torch.tensor(epoch_order(len(pictures), seed, 0))
    for batch in pictures.batches(order.split(n)):
        found += batch
        if len(found) >= n:  # as a rule at once, but some may be broken
            break
    return torch.stack(found[:n])


# 4. Devices and files -----------------------------------------------------------------------------

def pick_device(name, amp):
    """(device, dtype) of --device and --amp; dtype None is float32. UserError if not to be had."""
    found = torch.accelerator.current_accelerator(check_available=True)
    best = found.type if found else "cpu"
    name = best if name == "auto" else name
    if name not in ("cpu", best):
        raise UserError(f"--device {name}: torch finds none on this machine, use auto or cpu")
    if name == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:  # without bf16 in hardware it is emulated, a hundred times slower
        can = getattr(torch.cpu, "get_capabilities", dict)()  # older torch can't tell
        has_bf16 = name == "cpu" and (can.get("amx_bf16") or can.get("avx512_bf16"))
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = amp != "off"  # --amp off is float32, in convolutions too
    bf16 = amp == "bf16" or (amp == "auto" and has_bf16)
    return torch.device(name), torch.bfloat16 if bf16 else None

def in_precision(model, device, dtype):
    """model(x_t, t), computed in mixed precision of this dtype, or in float32 if it is None."""

    def call(x_t, t):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(x_t, t)

    return call

def replace_file(path, write, essential=True):
    """Has write(temporary path) make a file, then puts it in place; the first of several processes.
    A file that can't be written is a UserError, or if not essential it is said."""
    temporary = path.with_name("." + path.name)
    if RANK > 0:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's when the disk is full
        temporary.unlink(missing_ok=True)
        if essential:
            raise UserError(f"can't write {path} ({error})") from error
        say(f"can't write {path} ({error}): the run continues without")

# The authors' weights are published in the diffusers library's layout; config.json must say this:
PUBLISHED = {"act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-6, "downsample_padding": 0,
             "attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

def read_published(folder):
    """A published folder as the dictionary that `train` saves. ValueError for another network."""
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
    weights = torch.load(folder / "diffusion_pytorch_model.bin", "cpu", weights_only=True)
    for old, new in OLD_NAMES.items():
        weights = {name.replace(f".{old}.", f".{new}."): w for name, w in weights.items()}
    return {"config": config, "step": 0, "log": "", "model": weights, "ema": weights}

def check_tensors(tensors, shapes):
    """ValueError unless these are tensors of these shapes, by name, and all numbers are finite."""
    fit = {name: tensor.shape for name, tensor in tensors.items()} == shapes
    if not fit or not all(w.is_floating_point() and w.isfinite().all() for w in tensors.values()):
        raise ValueError("its weights are not finite, or not those of the network it describes")

def find_checkpoint(name=""):
    """The path of a checkpoint file, of a run's folder, or of the newest run below ./runs if ""."""
    if name:
        return Path(name, "ckpt.pt") if Path(name, "ckpt.pt").exists() else Path(name)
    runs = list(Path("runs").glob("**/ckpt.pt"))
    if not runs:
        raise UserError("there is no run below ./runs: train first, or name a checkpoint")
    return max(runs, key=os.path.getmtime)

def load_checkpoint(path, resume=False):
    """(checkpoint, Config) of a file that `train` saved, or of a folder of published weights.
    Nothing in it is run. UserError if it is missing or damaged, to `resume` Adam's part too."""
    try:
        if path.is_dir():
            checkpoint = read_published(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, step = Config(**checkpoint["config"]), checkpoint["step"]
        with torch.device("meta"):  # takes no memory, whatever the configuration asks for
            weights = build(config)[0].state_dict()
        shapes = {name: weight.shape for name, weight in weights.items()}
        check_tensors(checkpoint["model"], shapes)
        check_tensors(checkpoint["ema"], shapes)
        if type(step) is not int or step < 0 or type(checkpoint.get("log", "")) is not str:
            raise ValueError("its step is no number of steps, or its log no text")
        if resume:  # Adam's kernels don't check
            state = checkpoint["optimizer"]["state"]
            for i, shape in enumerate(shapes.values()):
                wanted = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
                check_tensors(state[i], wanted)
                state[i] = {name: moment.contiguous() for name, moment in state[i].items()}
        return checkpoint, config
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {error.filename}: train first") from error
    except (UserError, *BROKEN, AttributeError, pickle.PickleError) as error:
        why = f" ({error})" if isinstance(error, (UserError, OSError, ValueError)) else ""
        raise UserError(f"{path} is damaged, or no checkpoint of ddpm.py{why}") from error

def load(path="", device="cpu", ema=True):
    """(UNet, Diffusion, Config) of a checkpoint, a run's folder or published weights, to sample.
    The newest run's if no path is given; the weights' average unless `ema` is false."""
    checkpoint, config = load_checkpoint(find_checkpoint(path))
    model, diffusion = build(config, device)
    model.load_state_dict(checkpoint["ema" if ema else "model"])
    return model.eval().requires_grad_(False), diffusion, config


# 5. Training --------------------------------------------------------------------------------------

class EMA:
    """A moving average of a model's weights, float32. Its decay starts low, as TensorFlow's can."""

    def __init__(self, model, decay):
        self.decay, self.model = decay, copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model, step):
        """ema <- decay * ema + (1 - decay) * weights, after training step 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)

def over_processes(tensor, op=dist.ReduceOp.SUM):
    """A tensor's number, combined with those of torchrun's other processes."""
    if WORLD > 1:
        dist.all_reduce(tensor, op)
    return tensor.item()

def note_signals():
    """A list that Ctrl-C, SIGTERM and SIGHUP are added to, so that `train` can end a step and save.
    A second Ctrl-C ends the program, unless torchrun is there, which repeats the first."""
    noted = []

    def note(number, frame):
        if number == signal.SIGINT in noted and WORLD == 1:
            os._exit(128 + number)
        noted.append(number)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nending after this step; Ctrl-C ends it at once\n")

    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, note)
    return noted

def draw(diffusion, model, shape, seed, size, steps=None, eta=1.0):
    """Samples pictures, (N, C, H, W) = shape, `size` at a time, by Algorithm 2 or DDIM in `steps`.
    Yields (number of the batch's first picture, t, x_t) for all states; at t = -1 it is done."""
    for first in range(0, shape[0], size):
        batch = (min(size, shape[0] - first), *shape[1:])
        noise = noise_for(batch, diffusion.betas.device, seed, first)
        ddim = diffusion.sample_ddim(model, noise, steps, eta) if steps else None
        for t, x_t, _ in ddim or diffusion.sample(model, noise):
            yield first, t, x_t

def train(config, out, device, dtype, checkpoint=None, signals=()):
    """Algorithm 1 on the pictures of config.data; checkpoints, log.csv, samples go to folder `out`.
    A `checkpoint` of step 0 is fine-tuned, of a later step resumed, bit for bit, as all noise is a
    function of (seed, step). Returns the signal that ended it, or 0. UserError if it diverges."""
    passes = math.lcm(config.accumulate, WORLD)  # each process takes as many of them
    if config.batch_size % passes:
        raise UserError(f"--batch-size {config.batch_size} for {WORLD} processes: use n * {passes}")

    # What is trained.
    torch.manual_seed(config.seed)
    model, diffusion = build(config, device)
    ema = EMA(model, config.ema_decay)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    first, log = 0, "step,loss,lr,grad_norm\n"
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            raise UserError("the checkpoint is of another network: leave its flags out") from error
        ema.model.load_state_dict(checkpoint["ema"])
        first = checkpoint["step"]
    if first:
        moments = checkpoint["optimizer"]["state"]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        log = checkpoint.get("log", log)
    net = model
    if WORLD > 1:
        net = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    net = in_precision(torch.compile(net) if config.compile else net, device, dtype)
    ema_net = in_precision(ema.model, device, dtype)

    # What it is trained on.
    pictures = Pictures(config.data, config, config.data_root)
    if math.prod(config.shape(len(pictures))) <= config.cache_gb * 2**30:
        pictures = pictures.read().to(device)
    data = training_batches(pictures, config, first, passes)
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pictures):,} pictures"
    say(f"{size}, {device.type} in {dtype or torch.float32}, run folder {out}\n{config}")
    replace_file(out / "log.csv", lambda file: file.write_text(log))

    total_loss, logged = torch.zeros((), device=device), first
    progress = Progress(range(first, config.steps), "step", config.steps, first)
    for step in progress:
        lr = config.lr * min(1, (step + 1) / max(1, config.warmup))
        optimizer.param_groups[0]["lr"] = lr
        for i in range(RANK, passes, WORLD):
            x_0 = to_unit(next(data).to(device, non_blocking=True))
            torch.manual_seed(seed_of(config.seed, STEP, step, i))
            if config.flip:
                mirror = torch.rand(len(x_0), 1, 1, 1, device=device) < 0.5
                x_0 = torch.where(mirror, x_0.flip(3), x_0)
            loss = diffusion.loss(net, x_0) / passes  # Algorithm 1, lines 2 to 5
            (loss * WORLD).backward()  # the processes' gradients are averaged
            total_loss += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)

        done = step + 1
        stop = over_processes(torch.tensor(max(signals, default=0)), dist.ReduceOp.MAX)
        ending = stop or done == config.steps
        saving = ending or done % config.ckpt_every == 0
        if saving or done % config.log_every == 0:  # not each step: it waits for the device
            loss = over_processes(total_loss) / (done - logged)
            if not math.isfinite(loss + norm):
                raise UserError(f"the loss or its gradient is not finite at step {done}: "
                                "--resume with a lower --lr, or --amp off")
            total_loss, logged = torch.zeros_like(total_loss), done
            log += f"{done},{loss:.6f},{lr:.6g},{norm:.4f}\n"
            replace_file(out / "log.csv", lambda file: file.write_text(log), essential=False)
            progress.text = f"  loss {loss:.4f}  lr {lr:.1e}"
        if saving:
            state = {"config": dataclasses.asdict(config), "step": done, "log": log,
                     "model": model.state_dict(), "ema": ema.model.state_dict(),
                     "optimizer": optimizer.state_dict()}
            replace_file(out / "ckpt.pt", lambda file: torch.save(state, file), ending)
        if stop and done < config.steps:
            return stop
        if RANK == 0 and (done % config.sample_every == 0 or ending):
            size, steps = config.batch_size // passes, min(50, config.timesteps)
            states = draw(diffusion, ema_net, config.shape(64), config.seed, size, steps)
            samples = torch.cat([to_uint8(x_t) for _, t, x_t in states if t < 0])
            replace_file(out / f"step-{done:06}.png", grid(samples).save, essential=False)
    return 0


# 6. Samples and figures ---------------------------------------------------------------------------

def reserve(path, ending=".png"):
    """Makes an empty file for the result to replace, so that no other program takes the name.
    UserError if something is there already, or the path has another ending."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() != ending:
            raise FileExistsError
        path.open("x").close()
    except FileExistsError as error:
        raise UserError(f"{path} is there already, or is no {ending}: name another file") from error
    path = path.absolute()  # removed again at the end if there was no result
    atexit.register(lambda: path.exists() and path.stat().st_size == 0 and path.unlink())

def load_network(args):
    """(model, Diffusion, Config, path) of --ckpt, ready to be called as model(x_t, t)."""
    device, dtype = pick_device(args.device, args.amp)
    path = find_checkpoint(args.ckpt)
    model, diffusion, config = load(path, device)
    for layer in model.modules():
        if dtype and isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(dtype)  # once, where autocast would cast anew at every step
    say(f"{path}: {device.type} in {dtype or torch.float32}, seed {args.seed}")
    model = torch.compile(model) if args.compile else model
    return in_precision(model, device, dtype), diffusion, config, path

def sample_command(args):
    """`sample`: new pictures from a checkpoint as one grid; as files and a film if asked for."""
    if args.eta != 1 and not args.steps:
        raise UserError("--eta is for DDIM: say in how many --steps")
    model, diffusion, config, path = load_network(args)
    names = (path.parent / f"samples-{i:03}.png" for i in itertools.count())
    out = Path(args.out or next(name for name in names if not name.exists()))
    folder, film = out.with_suffix(""), out.with_suffix(".gif")
    reserve(out)
    if args.gif:
        reserve(film, ".gif")
    if args.individual:
        folder.mkdir()
    shape = config.shape(args.n)
    steps = args.steps or diffusion.timesteps
    states = draw(diffusion, model, shape, args.seed, args.batch_size, args.steps, args.eta)
    total = math.ceil(args.n / args.batch_size) * (steps + 1)
    pictures, frames = [], []
    for i, (first, t, x_t) in enumerate(Progress(states, "sampling, step", total)):
        if args.gif and i <= steps and (t < 0 or i % math.ceil(steps / 60) == 0):
            frames.append(grid(to_uint8(x_t)))  # a film of the first batch
        if t < 0:
            pictures.append(to_uint8(x_t).cpu())
            for i, picture in enumerate(pictures[-1] if args.individual else ()):
                replace_file(folder / f"{first + i:06}.png", grid(picture[None]).save)
    replace_file(out, grid(torch.cat(pictures)).save)
    if args.gif:
        film_of = functools.partial(frames[0].save, save_all=True, append_images=frames[1:])
        replace_file(film, functools.partial(film_of, duration=60, loop=0))  # ms a frame, for ever
    say(f"wrote {args.n} pictures to {out}")

def labelled(rows, labels):
    """A PIL image of rows of pictures, (R, K, C, H, W) in [-1, 1], K labels over their columns."""
    tiles = grid(to_uint8(rows.flatten(0, 1)), len(labels))
    tiles = ImageOps.scale(tiles, max(1, 64 // rows.shape[-1]), Image.Resampling.NEAREST)
    image = ImageOps.expand(tiles, (0, 24, 0, 0), "white")
    for i, label in enumerate(labels):
        middle = ((i + 0.5) * image.width / len(labels), 12)
        ImageDraw.Draw(image).text(middle, label, "black", anchor="mm", font_size=13)
    return image

def forward_figure(args):
    """Pictures with more and more of one noise mixed in (Eq. 4)."""
    times, diffusion = range(0, 1000, 111), Diffusion()
    x_0 = to_unit(some_pictures(args.data, Config(image_size=64), args.n, args.seed))
    eps = next(noise_for(x_0.shape, "cpu", args.seed))
    columns = [diffusion.q_sample(x_0, t, eps) for t in times]
    return labelled(torch.stack(columns, dim=1), [f"t = {t}" for t in times])

def progressive_figure(args):
    """Two rows a picture along the reverse process: x_t, and the x_0 predicted from it (Fig. 6)."""
    model, diffusion, config, _ = load_network(args)
    T, columns, labels = diffusion.timesteps, [], []
    shape = config.shape(args.n)
    chain = diffusion.sample(model, noise_for(shape, diffusion.betas.device, args.seed))
    for t, x_t, x_0 in Progress(chain, "step", T + 1):
        if t in (T - 1, -1, *range(0, T, math.ceil(T / 10))):
            columns.append(torch.stack([x_t, x_0], dim=1).flatten(0, 1))
            labels.append(f"t = {t}" if t >= 0 else "x_0")
    return labelled(torch.stack(columns, dim=1), labels)

def interpolate_figure(args):
    """Two pictures noised to T/8, 2T/8, ... T, mixed there, and taken back (Figs. 8 and 9)."""
    model, diffusion, config, _ = load_network(args)
    pictures = some_pictures(args.data or config.data, config, 2, args.seed)
    x_0 = to_unit(pictures.to(diffusion.betas.device))[[0, -1]]
    noise = noise_for((1, *x_0.shape[1:]), x_0.device, args.seed)  # the same for the whole row
    eps, rows, shares = next(noise), [], torch.linspace(0, 1, 11).tolist()
    for eighth in range(1, 9):
        start = max(1, diffusion.timesteps * eighth // 8)
        a, b = diffusion.q_sample(x_0, start - 1, eps)
        mixed = torch.stack([a.lerp(b, share) for share in shares])
        chain = diffusion.sample(model, itertools.chain([mixed], noise), start)
        *_, (_, x_t, _) = Progress(chain, "interpolating, step", start + 1)
        rows.append(torch.cat([x_0[:1], x_t, x_0[1:]]))
    return labelled(torch.stack(rows), ["source", *(f"{share:.1f}" for share in shares), "source"])

FIGURES = {"forward": forward_figure, "progressive": progressive_figure,
           "interpolate": interpolate_figure}

def show_command(args):
    """`show`: a figure as a PNG."""
    out = Path(args.out or f"{args.figure}.png")
    reserve(out)
    replace_file(out, FIGURES[args.figure](args).save)
    say(f"wrote {out}")


# 7. Evaluation ------------------------------------------------------------------------------------

def eval_command(args):
    """`eval`: the variational bound of pictures in bits/dim, its parts (Sec. 4.3) and Fig. 5."""
    model, diffusion, config, _ = load_network(args)
    data, device, T = args.data or config.data, diffusion.betas.device, diffusion.timesteps
    parts = some_pictures(data, config, args.n, args.seed).split(args.batch_size)
    tables = []
    say(f"bits/dim of {sum(map(len, parts))} pictures of {data!r}, of a named set's test split")

    for i, part in enumerate(parts):
        noise = noise_for(part.shape, device, args.seed, first=i * args.batch_size)
        terms = diffusion.bits_per_dim(model, to_unit(part.to(device)), noise)
        terms = Progress(terms, f"bits/dim, batch {i + 1}/{len(parts)}, step", T + 1)
        tables.append(torch.stack([torch.stack(term) for term in terms], dim=-1))
    terms, errors = torch.cat(tables, dim=1).cpu()  # each (N, T + 1), of L_0..L_T
    rate, distortion = terms[:, 1:].sum(1), terms[:, 0]
    for name, bits in {"total": rate + distortion, "rate": rate, "distortion": distortion}.items():
        error = bits.std(correction=0) / len(bits) ** 0.5
        say(f"{name:22} {bits.mean():7.4f} +- {error:.4f} bits/dim")
    rmse, terms = 127.5 * errors.mean(0).sqrt(), terms.mean(0)
    say(f"{'error of the last x_0':22} {rmse[0]:7.4f} of 255, root of the mean square")
    say("\nFig. 5: once x_t is known\n     t  bits/dim  error of x_0")
    for t in dict.fromkeys(T * k // 1000 for k in (999, 800, 600, 400, 200, 100, 50, 20, 10, 0)):
        say(f"{t:6} {terms[t + 1 :].sum():9.4f} {rmse[t]:13.2f}")


# 8. The command line ------------------------------------------------------------------------------

@dataclasses.dataclass
class Options:
    """The flags of the commands that are no part of a run's Config."""

    ckpt: str = setting("", "a checkpoint, a run's folder or published weights, or the newest run")
    n: int = setting(64, "how many pictures", 1, 10**7)
    steps: int = setting(0, "DDIM in so many steps, e.g. 50, in place of Algorithm 2")
    eta: float = setting(1.0, "DDIM's noise, from 0 to 1, as much as DDPM's", 0, 1)
    device: str = setting("auto", "where to compute", choices=("auto", "cuda", "mps", "cpu"))
    individual: bool = setting(False, "each picture as a file, too")
    gif: bool = setting(False, "a film of the first batch, too")
    out: str = setting("", "the file or the run's folder to write")

FLAGS = Config.__dataclass_fields__ | Options.__dataclass_fields__

class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, as all others of this program."""

    def error(self, message):
        raise UserError(f"{message} (see `{self.prog} --help`)")

def add_command(group, run, name, flags, fields=FLAGS, **options):
    """A parser of a command or figure that `run` runs; options: of add_argument, for all flags."""
    about = FIGURES.get(name, run).__doc__
    parser = group.add_parser(name, help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=run)
    for field in (fields[flag] for flag in flags):
        how = {"type": field.type, "choices": field.metadata["choices"] or None}
        if field.type is tuple:
            how = {"type": int, "nargs": "*"}
        elif field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        how |= {"dest": field.name, "default": field.default, "help": field.metadata["help"]}
        parser.add_argument(flag_of(field.name), **how | options)
    return parser

def train_command(args):
    """`train`: the configuration of a preset or checkpoint, changed by the flags given; trains."""
    given = {name: value for name, value in vars(args).items() if hasattr(Config, name)}
    data = given.get("data", "")
    is_folder = os.path.isdir(data)  # then as the user calls it, also if it is a link
    name = os.path.basename(os.path.abspath(data)) if is_folder else data.replace("/", "-")
    out, checkpoint = Path(args.out or Path("runs", name)), None
    if args.resume or args.init_from:
        path = find_checkpoint(args.init_from or (out if args.out or name else ""))
        checkpoint, base = load_checkpoint(path, args.resume)
    if args.resume:
        out = path.parent
    elif (out / "ckpt.pt").exists():
        raise UserError(f"{out} holds a checkpoint: resume it with --resume, or name another --out")
    elif args.init_from:
        checkpoint |= {"step": 0, "model": checkpoint["ema"]}
        base = dataclasses.replace(base, data="", data_root="data")
    else:
        slow = pick_device(args.device, "off")[0].type == "cpu"
        preset = args.preset or ("tiny" if slow else "cifar10")
        say(f"--preset {preset} (cifar10 is the paper's network, tiny is for CPUs)")
        base = PRESETS[preset]
        if name.startswith(("mnist", "fashion-mnist")):
            base = dataclasses.replace(base, channels=1, flip=name.startswith("fashion"))
    config = dataclasses.replace(base, **given)
    device, dtype = pick_device(args.device, config.amp)
    if WORLD > 1:  # gloo for numbers that live on the CPU; grids keep the others waiting
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    stopped = train(config, out, device, dtype, checkpoint, note_signals())
    if WORLD > 1:  # not after an error: it would wait for the others, which torchrun ends
        time.sleep(0.1)  # torch 2.6 waits for ever for threads that need Python to end
        dist.destroy_process_group()
    if stopped:
        say(f"stopped and saved; to resume: python ddpm.py train --resume --out {out}")
        return 128 + stopped
    say(f"trained; for new pictures: python ddpm.py sample --ckpt {out / 'ckpt.pt'}")

def main(argv=None):
    """The command line; returns the exit status. Mistakes are one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # not every name can be printed everywhere
    parser = Parser(prog="ddpm.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    settings = Config.__dataclass_fields__
    train = add_command(commands, train_command, "train", [*settings, "device", "out"],
                        FLAGS | settings, default=argparse.SUPPRESS)
    train.set_defaults(device="auto", out="")
    start = train.add_mutually_exclusive_group()
    start.add_argument("--preset", choices=PRESETS, help="[cifar10 with an accelerator, else tiny]")
    start.add_argument("--resume", action="store_true", help="the run in --out, or the newest")
    start.add_argument("--init-from", metavar="CKPT", help="fine-tune the weights of a checkpoint")
    network = "ckpt seed device amp compile"
    sampling = f"{network} n batch_size steps eta gif individual out"
    add_command(commands, sample_command, "sample", sampling.split())
    evaluate = add_command(commands, eval_command, "eval", f"{network} n batch_size data".split())
    evaluate.set_defaults(amp="off")  # for figures to compare with a paper's
    show = commands.add_parser("show", help=show_command.__doc__)
    figures = show.add_subparsers(required=True, metavar="FIGURE", dest="figure")
    add_command(figures, show_command, "forward", ["data", "n", "seed", "out"])
    add_command(figures, show_command, "progressive", f"{network} n out".split())
    add_command(figures, show_command, "interpolate", f"{network} data out".split())
    try:
        args = parser.parse_args(argv)
        if args.run is not train_command and WORLD > 1:
            raise UserError("torchrun is for train: give each GPU its own --seed here")
        for name in FLAGS.keys() & vars(args).keys():
            check_setting(FLAGS[name], getattr(args, name))
        return args.run(args) or 0
    except (UserError, OSError) as error:
        message = str(error)
    except RuntimeError as error:  # of accelerators, and of the CPU
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        message = f"{error}: lower --batch-size, or raise --accumulate"
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 128 + signal.SIGINT
    print("error:", " ".join(message.split()), file=sys.stderr)  # torchvision's have several lines
    return 2

if __name__ == "__main__":
    sys.exit(main())
