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

Sections 1 and 2 are the paper; 3 to 5 are what it takes to train one. Shapes are (B, C, H, W):
batch, channels, height, width. A picture x_0 is float32 in [-1, 1], and uint8 near its file.
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import signal
import sqlite3
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
from torch.distributions import Distribution, Normal, kl_divergence
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets, models, utils
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

Distribution.set_default_validate_args(False)  # a check makes the host wait for the GPU
RANK = int(os.environ.get("RANK", 0))  # torchrun's
WORLD = int(os.environ.get("WORLD_SIZE", 1))
STOPPING = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]

class UserError(Exception):
    """A mistake that the user can mend. It is printed as one line; the exit status is 2."""
def say(text, end="\n"):
    """Prints a line, in a terminal over the progress line; into nothing if its reader is gone."""
    try:
        if RANK == 0:
            print("\r\x1b[K" + text if sys.stdout.isatty() else text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def progress(items, what, total, first=0, notes=()):
    """Hands items on and shows how far they are: in a terminal at once, else every 30 s."""
    terminal = sys.stdout.isatty()
    start = shown = time.perf_counter()
    for done, item in enumerate(items, first + 1):
        yield item
        now = time.perf_counter()
        if done == total or now - shown > (0.1 if terminal else 30):
            shown, pace = now, (now - start) / (done - first)
            left = timedelta(seconds=round(pace * (total - done)))
            end = "" if terminal and done < total else "\n"
            say("  ".join([f"{what} {done}/{total}", *notes, f"{left} left"]), end)

@dataclasses.dataclass(frozen=True)
class Config:
    """A run's settings, the paper's for CIFAR-10; the comments are `--help`. Or UserError."""
    image_size: int = 32  # height and width of the pictures in pixels
    channels: int = 3  # 3 for colour, 1 for grey
    base_channels: int = 128  # channels at full resolution, a multiple of 32
    channel_mults: tuple = (1, 2, 2, 2)  # channels of each level, as multiples
    num_res_blocks: int = 2  # residual blocks a level going down, one more up
    attention_resolutions: tuple = (16,)  # feature map sizes with self-attention
    dropout: float = 0.1  # dropout inside the residual blocks
    timesteps: int = 1000  # T, the number of noising steps
    variance: str = "fixedlarge"  # reverse variance, beta or (fixedsmall) the posterior's
    steps: int = 800_000  # optimiser steps in all
    batch_size: int = 128  # pictures in an optimiser step, or computed at a time
    accumulate: int = 1  # passes that a batch is split into, to save memory
    lr: float = 2e-4  # learning rate of Adam
    warmup: int = 5000  # steps of linear learning-rate warm-up
    grad_clip: float = 1.0  # largest global norm of the gradient, 0 for any
    ema_decay: float = 0.9999  # decay of the moving average of the weights
    flip: bool = True  # mirror half of the pictures, left to right
    seed: int = 0  # seed of every random draw
    amp: str = "auto"  # mixed precision
    compile: bool = False  # torch.compile: slow at first, then faster; for CUDA
    data: str = ""  # a folder of pictures, or shapes, mnist, cifar10, cifar10/ship, ...
    cache_gb: float = 4.0  # larger sets stream from disk, others stay in memory
    workers: int = 4  # processes that read pictures
    log_every: int = 100  # steps between rows of log.csv
    sample_every: int = 5000  # steps between grids of samples
    ckpt_every: int = 5000  # steps between checkpoints
    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))
        if not 0 < len(self.channel_mults) <= 8 or self.batch_size % self.accumulate:
            raise UserError("--channel-mults must be 1 to 8, --accumulate must divide --batch-size")
    def shape(self, n):
        """Of n pictures: (n, C, H, W)."""
        return n, self.channels, self.image_size, self.image_size
CHOICES = {"channels": (1, 3), "variance": ("fixedlarge", "fixedsmall"),
           "amp": ("auto", "off", "bf16"), "device": ("auto", "cuda", "mps", "cpu")}
LIMITS = {"image_size base_channels attention_resolutions": (1, 1024), "timesteps": (2, 10**5),
          "steps batch_size accumulate log_every sample_every ckpt_every n": (1, 10**9),
          "channel_mults num_res_blocks": (1, 64), "seed": (0, 2**63 - 1),
          "dropout ema_decay eta": (0, 1)}  # of other numbers 0 to 10^9
def flag_of(name):
    """How a field is called on the command line."""
    return "-n" if name == "n" else "--" + name.removeprefix("ddim_").replace("_", "-")
def check_setting(field, value):
    """UserError, which names the flag, unless the value is of the field's kind and in its range."""
    choices, kinds = CHOICES.get(field.name), {float: (float, int), tuple: (int,)}
    low, high = next((LIMITS[key] for key in LIMITS if field.name in key.split()), (0, 10**9))
    for item in value if field.type is tuple else [value]:
        fits = type(item) in kinds.get(field.type, (field.type,))
        inside = fits and (item in choices if choices else field.type is str or low <= item <= high)
        if not inside:  # as NaN is not, either
            wanted = f"one of {choices}" if choices else f"from {low} to {high}"
            raise UserError(f"{flag_of(field.name)} is {item!r:.50}: it must be {wanted}")

PRESETS = {
    "cifar10": Config(),
    "celebahq256": Config(image_size=256, channel_mults=(1, 1, 2, 2, 4, 4), dropout=0.0, lr=2e-5,
                          variance="fixedsmall", steps=500_000, batch_size=64),
    "tiny": Config(base_channels=32, num_res_blocks=1, attention_resolutions=(8,), dropout=0.0,
                   steps=2500, batch_size=32, lr=1e-3, warmup=100, ema_decay=0.995,
                   sample_every=500, ckpt_every=500)}  # ten minutes on two CPU cores

# 1. The diffusion process -----
# The paper counts steps 1..T and calls the clean picture x_0. Here, as in the released code, t runs
# over 0..T-1, so that it indexes a table and is what the network is fed: t here is t + 1 in the
# paper, alpha_bars[t] is its alpha_bar_{t+1}, and x_t with t = 0 already holds a little noise.
def linear_beta_schedule(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    """Forward variances, beta_1..beta_T: (T,) float64, linear (Sec. 4), both ends times 1000/T."""
    betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
    return (1000 / timesteps * betas).clamp(max=0.999)  # a T below 21 would pass 1

class Diffusion(nn.Module):
    """Two Markov chains: q adds noise, p_theta takes it away by a network model(x_t, t) -> eps.
    Tables over t = 0..T-1 are computed in float64 and kept as float32 buffers. `variance` is the
    reverse process's (Sec. 3.2): "fixedlarge" is beta_t, "fixedsmall" is beta~_t."""
    def __init__(self, timesteps=1000, variance="fixedlarge"):
        super().__init__()
        self.timesteps = timesteps
        betas = linear_beta_schedule(timesteps)
        alphas, alpha_bars = 1 - betas, (1 - betas).cumprod(0)
        alpha_bars_prev = F.pad(alpha_bars[:-1], (1, 0), value=1.0)  # alpha_bar_0 = 1
        posterior_variance = betas * (1 - alpha_bars_prev) / (1 - alpha_bars)  # beta~, Eq. 7
        sigma = {"fixedlarge": betas, "fixedsmall": posterior_variance}[variance].sqrt()
        # beta~_1 is 0, of which no picture has a likelihood: the released code takes beta~_2.
        sigma[0] = posterior_variance[1].sqrt()
        tables = {
            "betas": betas, "alpha_bars": alpha_bars,
            "sqrt_alpha_bars": alpha_bars.sqrt(),
            "sqrt_one_minus_alpha_bars": (1 - alpha_bars).sqrt(),
            "posterior_mean_x_0": alpha_bars_prev.sqrt() * betas / (1 - alpha_bars),
            "posterior_mean_x_t": alphas.sqrt() * (1 - alpha_bars_prev) / (1 - alpha_bars),
            "posterior_sigma": posterior_variance.sqrt(), "sigma": sigma}
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

    def p_step(self, model, x_t, t):
        """p_theta(x_{t-1} | x_t), a Normal, and the x_0 that Eq. 4 predicts, clipped as released.
        Unclipped, this is Eq. 11: (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t)."""
        eps = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
        x_0 = (x_t - self.sqrt_one_minus_alpha_bars[t] * eps) / self.sqrt_alpha_bars[t]
        x_0 = x_0.clamp(-1, 1)
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
        times = np.linspace(self.timesteps - 1, 0, steps).round().astype(int).tolist()
        signal = F.pad(self.sqrt_alpha_bars, (0, 1), value=1.0)  # at -1, after the last step, 1
        spread = F.pad(self.sqrt_one_minus_alpha_bars, (0, 1))  # and no noise
        x_t = next(noise)
        for t, s in zip(times, [*times[1:], -1]):  # from x_t to x_s
            _, x_0 = self.p_step(model, x_t, t)
            yield t, x_t, x_0
            eps = (x_t - signal[t] * x_0) / spread[t]  # goes with the clipped x_0
            beta = (spread[t] ** 2 - spread[s] ** 2) / signal[s] ** 2  # 1 - alpha_bar_t / _s
            sigma = eta * spread[s] / spread[t] * beta.sqrt()  # Eq. 16
            direction = (spread[s] ** 2 - sigma**2).clamp(min=0).sqrt()  # rounding can pass 0
            x_t = signal[s] * x_0 + direction * eps + sigma * next(noise)  # Eq. 12
        yield -1, x_t, x_t

    @torch.no_grad()
    def bits_per_dim(self, model, x_0, noise):
        """The bound on -log2 p(x_0) term by term (Eq. 5): yields (L_t in bits/dim, mse), each (B,).
        t = 0..T as the paper counts. mse: of the x_0 predicted before L_t is sent, at T of 0."""
        for t in range(self.timesteps):
            x_t = self.q_sample(x_0, t, next(noise))
            p, predicted = self.p_step(model, x_t, t)
            q = self.q_posterior(x_0, x_t, t)
            nats = kl_divergence(q, p) if t > 0 else -discretised_log_likelihood(x_0, p)
            yield nats.mean((1, 2, 3)) / math.log(2), (predicted - x_0).square().mean((1, 2, 3))
        q = Normal(self.sqrt_alpha_bars[-1] * x_0, self.sqrt_one_minus_alpha_bars[-1])
        nats = kl_divergence(q, Normal(torch.zeros_like(x_0), 1))  # L_T
        yield nats.mean((1, 2, 3)) / math.log(2), x_0.square().mean((1, 2, 3))

def discretised_log_likelihood(x_0, p):
    """log of the mass of the Normal p within the grey level of x_0, 2/255 wide, elementwise.
    Eq. 13: black and white are open to infinity. The tanh is the released code's normal CDF."""
    z = (torch.stack([x_0 - 1 / 255, x_0 + 1 / 255]) - p.mean) / p.stddev
    below, above = 0.5 + 0.5 * torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    mass = above.masked_fill(x_0 > 0.999, 1) - below.masked_fill(x_0 < -0.999, 0)
    return mass.clamp(min=1e-12).log()
EPOCH, STEP, PICTURE = range(3)  # what a random stream is for: tags that keep seeds apart
def seed_of(seed, *key):
    """A seed that is a function of the run's seed and a key: a tag, then its numbers."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])
def noise_for(shape, device, seed, first=0):
    """Yields N(0, I) for ever, (B, C, H, W) = shape; picture i's is that of (seed, first + i)."""
    ahead = max(1, 2**17 // math.prod(shape[1:]))  # steps drawn at once: a GPU likes few calls
    generators = [torch.Generator(device).manual_seed(seed_of(seed, PICTURE, i))
                  for i in range(first, first + shape[0])]
    while True:
        draws = [torch.randn(ahead, *shape[1:], generator=g, device=device) for g in generators]
        yield from torch.stack(draws, 1)

# 2. The network ---------------
# Appendix B as released, oddities and all, with the parameter names of the published weights.
# `h` is a feature map, `width` a number of channels.
def sinusoidal_embedding(t, dim):
    """The Transformer's embedding of steps t: (B,) -> (B, dim) float32, sines, then cosines."""
    half = dim // 2  # the frequencies fall from 1 to 1/10000, both included, hence half - 1
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], 1)
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
class Level(nn.Module):
    """Residual blocks of one size, one for each of `widths_in`, an attention or none after each."""
    def __init__(self, widths_in, width, temb_width, dropout, attend):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(w, width, temb_width, dropout) for w in widths_in)
        self.attentions = nn.ModuleList(Attention(width) if a else nn.Identity() for a in attend)

class UNet(nn.Module):
    """eps_theta(x_t, t): the noise in x_t. x_t: (B, C, H, W) and t: (B,) -> (B, C, H, W) float32.
    A level for each of channel_mults, each half the size of the one before; or UserError."""
    def __init__(self, config):
        super().__init__()
        size, base, mults = config.image_size, config.base_channels, config.channel_mults
        blocks, attended = config.num_res_blocks, config.attention_resolutions
        last = len(mults) - 1  # the number of the last level
        sizes = [size // 2**i for i in range(last + 1)]
        if size % 2**last or base % 32 or not set(attended) <= set(sizes):
            raise UserError(f"--image-size {size} must be a multiple of {2**last}, --base-channels "
                            f"{base} of 32, --attention-resolutions {attended} among {sizes}")
        self.base_channels, temb = base, 4 * base
        linear_1, linear_2 = nn.Linear(base, temb), nn.Linear(temb, temb)
        self.time_embedding = nn.ModuleDict({"linear_1": linear_1, "linear_2": linear_2})
        self.conv_in = nn.Conv2d(config.channels, base, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        widths = [base * mult for mult in (1, *mults, mults[-1])]
        for i, attend in enumerate(size in attended for size in sizes):
            before, width, after = widths[i : i + 3]  # of the levels above, here, and below
            ways_in = [before] + [width] * (blocks - 1)
            down = Level(ways_in, width, temb, config.dropout, [attend] * blocks)
            skips = [width] * blocks + [before]  # what forward() kept on the way down
            ways_in = [w + skip for w, skip in zip([after] + [width] * blocks, skips)]
            up = Level(ways_in, width, temb, config.dropout, [attend] * len(skips))
            halve, double = (nn.Conv2d(width, width, 3, s, p) for s, p in ((2, 0), (1, 1)))
            down.downsamplers = nn.ModuleList([nn.ModuleDict({"conv": halve})] if i < last else [])
            up.upsamplers = nn.ModuleList([nn.ModuleDict({"conv": double})] if i > 0 else [])
            self.down_blocks.append(down)
            self.up_blocks.insert(0, up)
        self.mid_block = Level([width, width], width, temb, config.dropout, [True, False])
        self.conv_norm_out = group_norm(widths[1])
        self.conv_out = nn.Conv2d(widths[1], config.channels, 3, padding=1)
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
        for level in self.down_blocks:  # (B, width, H, W) -> (B, width, H/2, W/2) -> ...
            for resnet, attention in zip(level.resnets, level.attentions):
                h = attention(resnet(h, temb))
                skips.append(h)
            for downsample in level.downsamplers:  # one, or none at the last level
                h = downsample["conv"](F.pad(h, (0, 1, 0, 1)))  # TensorFlow's SAME
                skips.append(h)
        for resnet, attention in zip(self.mid_block.resnets, self.mid_block.attentions):
            h = attention(resnet(h, temb))
        for level in self.up_blocks:  # ... -> (B, width, H/2, W/2) -> (B, width, H, W)
            for resnet, attention in zip(level.resnets, level.attentions):
                h = attention(resnet(torch.cat([h, skips.pop()], 1), temb))
            for upsample in level.upsamplers:
                h = upsample["conv"](F.interpolate(h, scale_factor=2))
        return self.conv_out(F.silu(self.conv_norm_out(h))).to(x_t.dtype)  # not autocast's

def build(config, device=None):
    """(UNet, Diffusion) of a Config."""
    return UNet(config).to(device), Diffusion(config.timesteps, config.variance).to(device)

# 3. Data ----------------------
def to_unit(pictures):
    """uint8, 0..255 -> float32 in [-1, 1] (Sec. 3.3)."""
    return pictures.float() / 127.5 - 1
def to_uint8(x_0):
    """float32 in [-1, 1] -> uint8, 0..255, rounded: a cast alone truncates, and darkens."""
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
def grid(pictures, columns=None):
    """A PIL image of pictures, uint8 (N, C, H, W), side by side; a square if not told how wide."""
    width = columns or math.ceil(len(pictures) ** 0.5)
    return to_pil_image(utils.make_grid(pictures.cpu(), width, pad_value=255))
def read_picture(image, size, channels):
    """The middle square of a PIL image, resized: uint8 (channels, size, size); or one of BROKEN."""
    mode = "L" if channels == 1 else "RGB"
    with image:
        if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
            raise ValueError("it has 32 bits a channel: save it with 8 or 16")
        image = ImageOps.exif_transpose(image)
        if "I" in image.mode:  # 16 bits, which Pillow's own conversion cuts off at 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        image = ImageOps.fit(image.convert("RGBA"), (size, size))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
        return pil_to_tensor(image).numpy()

class Shapes:
    """Coloured circles, squares and triangles, 10,000 a split, used like torchvision's sets."""
    classes = ("circle", "square", "triangle")
    def __init__(self, root="", train=True, download=False):
        self.first, self.targets = 0 if train else 10_000, [i % 3 for i in range(10_000)]
    def __getitem__(self, i):
        rng = np.random.default_rng(self.first + i)
        radius, hue, light = rng.uniform((24, 0, 35), (48, 360, 60))
        circle, sides = (*rng.uniform(radius, 128 - radius, 2), radius), (64, 4, 3)[i % 3]
        image, colour = Image.new("RGB", (128, 128), "white"), f"hsl({hue:.0f}, 80%, {light:.0f}%)"
        ImageDraw.Draw(image).regular_polygon(circle, sides, fill=colour)
        return image, i % 3
def flowers(root, train, download):
    """Flowers by torchvision's ways; its own Flowers102 needs scipy to read labels and splits."""
    folder, md5 = Path(root, "flowers-102"), "52808999861908f626f3c1f4e79d11fa"
    url = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz"
    if len(list(folder.glob("jpg/*.jpg"))) < 8189:
        datasets.utils.download_and_extract_archive(url, folder, md5=md5)
    return datasets.ImageFolder(folder)
SETS = {"shapes": Shapes, "mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "flowers102": flowers}
ENDINGS = (*datasets.folder.IMG_EXTENSIONS, ".gif")
# What Pillow's many decoders, and torch.load, raise on files that are broken or something else.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, RuntimeError,
          AttributeError, struct.error, pickle.PickleError, Image.DecompressionBombError)
Image.MAX_IMAGE_PIXELS = 2**26  # twice as many are a DecompressionBombError
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
say_once = functools.cache(say)
def find_pictures(folder):
    """Paths of all pictures below a folder, sorted; none of hidden folders or runs of `train`."""
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
    def __init__(self, data, config, train=True):
        self.config, self.set = config, None
        name, _, label = data.partition("/")
        if name in SETS:
            try:
                self.set = SETS[name]("data", train=train, download=True)
            except (OSError, RuntimeError) as error:  # no network, or a damaged download
                raise UserError(f"can't get {name} into ./data ({error}): try again")
            classes = [name.lower() for name in self.set.classes]
            self.items = [i for i, target in enumerate(map(int, self.set.targets))
                          if label.lower() in ("", str(target), classes[target])]
            missing = f"{name} has no class {label!r}, it has: {', '.join(classes)}"
        else:
            self.items = find_pictures(Path(data)) if data else []
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
    def in_order(self, what):
        """All pictures that can be read, batch by batch; `what` is done with them is shown."""
        groups = torch.arange(len(self)).split(16)
        return progress(self.batches(groups), f"{what}, batch", len(groups))

    def read(self):
        """All pictures that can be read, in order: uint8 (N, C, H, W)."""
        pictures, n = torch.empty(self.config.shape(len(self)), dtype=torch.uint8), 0
        for batch in self.in_order("reading pictures"):
            pictures[n : n + len(batch)] = batch
            n += len(batch)
        return pictures[:n]

@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The order of n pictures in an epoch, a list: a function of the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(seed_of(seed, EPOCH, epoch))
    return torch.randperm(n, generator=generator).tolist()

def training_batches(pictures, config, step, passes=1):
    """This process's batches, uint8 (B / passes, C, H, W), of a tensor or a Pictures, for ever.
    Picture k of a run is number k % n of epoch k // n, whatever the number of processes."""
    n, size = len(pictures), config.batch_size // passes
    runs = (range(i * size, (i + 1) * size) for i in itertools.count(step * passes + RANK, WORLD))
    groups = ([epoch_order(n, config.seed, k // n)[k % n] for k in run] for run in runs)
    if isinstance(pictures, Pictures):
        return filter(len, pictures.batches(groups))
    return (pictures[torch.tensor(rows).to(pictures.device, non_blocking=True)] for rows in groups)
def some_pictures(data, config, n, seed):
    """n pictures of `data`, of a named set's test split, in an order of the seed: (n, C, H, W)."""
    pictures = Pictures(data, config, train=False)
    order = torch.tensor(epoch_order(len(pictures), seed, 0))
    found = itertools.chain.from_iterable(pictures.batches(order.split(n)))
    return torch.stack(list(itertools.islice(found, n)))  # more than one batch if some are broken

# 4. Devices and files ---------
def pick_device(name, amp):
    """(device, dtype) of --device and --amp; dtype None is float32. UserError if not to be had."""
    found = torch.accelerator.is_available()
    best = torch.accelerator.current_accelerator().type if found else "cpu"
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
    bf16 = amp == "bf16" or amp == "auto" and has_bf16
    return torch.device(name), torch.bfloat16 if bf16 else None
def in_precision(model, device, dtype, compiled=False):
    """model(x_t, t), computed in mixed precision of this dtype, or in float32 if it is None."""
    model = torch.compile(model) if compiled else model
    def call(x_t, t):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(x_t, t)
    return call

def replace_file(path, write, essential=True):
    """Rank 0 puts what write(temporary path) makes in place. If it can't: UserError, or a line."""
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
            raise UserError(f"can't write {path} (a full disk?): {error}")
        say(f"can't write {path} (a full disk?): {error}")

# The authors' weights are published in the diffusers library's layout; config.json must say this:
PUBLISHED = {"act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-6, "downsample_padding": 0,
             "attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
def read_safetensors(path):
    """The tensors of a .safetensors file, by name. Raises one of BROKEN if it is damaged."""
    data = bytearray(path.read_bytes())  # the length of a header, the header, and the numbers
    end = 8 + int.from_bytes(data[:8], "little")
    header, tensors, at = json.loads(data[8:end]), {}, end
    header.pop("__metadata__", None)
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (end + offset for offset in about["data_offsets"])
        if start != at or about["dtype"] != "F32":
            raise ValueError(f"{name!r:.50} is not F32, or not where the tensor before it ends")
        tensor = torch.frombuffer(data[start:stop], dtype=torch.float32)
        tensors[name], at = tensor.view(about["shape"]), stop
    return tensors

def read_published(folder):
    """A published folder as the dictionary that `train` saves. ValueError for another network."""
    given = json.loads((folder / "config.json").read_bytes())
    size, widths = given["sample_size"], given["block_out_channels"]
    for name, value in PUBLISHED.items():
        if given.get(name, "missing") != value:
            raise ValueError(f"{name} is {given.get(name, 'missing')!r}, here it must be {value!r}")
    if any(width % 128 for width in widths):  # thinner levels are normalised in fewer groups here
        raise ValueError(f"block_out_channels is {widths}, here it must be multiples of 128")
    levels = enumerate(given["down_block_types"])
    config = {
        "image_size": size, "channels": given["in_channels"], "base_channels": widths[0],
        "channel_mults": tuple(width // widths[0] for width in widths),
        "num_res_blocks": given["layers_per_block"],
        "attention_resolutions": tuple(size // 2**i for i, kind in levels if "Attn" in kind),
        # not in the file: the released scripts' values for CIFAR-10, and for the others
        "variance": "fixedlarge" if size == 32 else "fixedsmall",
        "dropout": 0.1 if size == 32 else 0.0}
    file = folder / "diffusion_pytorch_model.safetensors"
    binary = file.with_suffix(".bin")
    weights = read_safetensors(file) if file.exists() else torch.load(binary, "cpu")
    for old, new in OLD_NAMES.items():
        weights = {name.replace(f".{old}.", f".{new}."): w for name, w in weights.items()}
    return {"config": config, "step": 0, "log": "", "model": weights, "ema": weights}
def check_tensors(tensors, shapes):
    """ValueError unless these are finite tensors of these shapes, by name; repairs strides."""
    fit = {name: tensor.shape for name, tensor in tensors.items()} == shapes
    if not fit or not all(w.is_floating_point() and w.isfinite().all() for w in tensors.values()):
        raise ValueError("its weights are not finite, or not those of the network it describes")
    tensors.update({name: tensor.contiguous() for name, tensor in tensors.items()})
def find_checkpoint(name=""):
    """The path of a checkpoint file, of a run's folder, or of the newest run below ./runs if ""."""
    runs = [Path(name)] if name else sorted(Path("runs").rglob("ckpt.pt"), key=os.path.getmtime)
    if not runs:
        raise UserError("there is no run below ./runs: train first, or name a checkpoint")
    return runs[-1] / "ckpt.pt" if (runs[-1] / "ckpt.pt").exists() else runs[-1]

def load_checkpoint(path, resume=False):
    """(checkpoint, Config) of a file that `train` saved, or of a folder of published weights.
    Nothing in it is run. UserError if it is missing or damaged, to `resume` Adam's part too."""
    try:
        checkpoint = read_published(path) if path.is_dir() else torch.load(path, "cpu")
        config, step = Config(**checkpoint["config"]), checkpoint["step"]
        with torch.device("meta"):  # takes no memory, whatever the configuration asks for
            weights = build(config)[0].state_dict()
        shapes = {name: weight.shape for name, weight in weights.items()}
        check_tensors(checkpoint["model"], shapes)
        check_tensors(checkpoint["ema"], shapes)
        if type(step) is not int or step < 0 or type(checkpoint["log"]) is not str:
            raise ValueError("its step is no number of steps, or its log no text")
        for i, shape in enumerate(shapes.values() if resume else ()):  # Adam's kernels don't check
            moments = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
            check_tensors(checkpoint["optimizer"]["state"][i], moments)
        return checkpoint, config
    except (UserError, *BROKEN) as error:
        why = f" ({error})" if isinstance(error, (UserError, OSError, ValueError)) else ""
        raise UserError(f"{path} is damaged, or no checkpoint of ddpm.py{why}")
def load(path="", device="cpu"):
    """(averaged UNet, Diffusion, Config) to sample, as `find_checkpoint` finds it; or UserError."""
    checkpoint, config = load_checkpoint(find_checkpoint(path))
    model, diffusion = build(config, device)
    model.load_state_dict(checkpoint["ema"])
    return model.eval().requires_grad_(False), diffusion, config

# 5. Training ------------------
@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay * ema + (1 - decay) * model, their weights in float32, after step 0, 1, ..."""
    decay = min(decay, (1 + step) / (10 + step))  # starts low, as TensorFlow's can
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
def over_processes(tensor, op=dist.ReduceOp.SUM):
    """A tensor's number, combined with those of torchrun's other processes."""
    if WORLD > 1:
        dist.all_reduce(tensor, op)
    return tensor.item()

def note_signals():
    """A list that Ctrl-C, SIGTERM and SIGHUP join, so that `train` can end a step and save."""
    noted = []
    def note(number, frame):
        if noted and number == signal.SIGINT and WORLD == 1:  # torchrun repeats the first
            os._exit(128 + number)
        noted.append(number)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nending after this step; Ctrl-C ends it at once\n")
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, note)
    return noted

def draw(diffusion, model, shape, seed, size, steps=None, eta=1.0):
    """Samples pictures, (N, C, H, W) = shape, `size` at a time: DDIM if given steps or eta below 1.
    Yields (number of the batch's first picture, t, x_t) for all states; at t = -1 it is done."""
    for first in range(0, shape[0], size):
        batch = min(size, shape[0] - first), *shape[1:]
        noise = noise_for(batch, diffusion.betas.device, seed, first)
        chain = diffusion.sample(model, noise)
        if steps or eta != 1:
            chain = diffusion.sample_ddim(model, noise, steps or diffusion.timesteps, eta)
        for t, x_t, _ in chain:
            yield first, t, x_t

def train(config, pictures, out, device, dtype, checkpoint=None, signals=()):
    """Algorithm 1 on a Pictures; checkpoints, log.csv and grids of samples go to the folder `out`.
    A `checkpoint` of step 0 is fine-tuned, of a later step resumed, bit for bit, as all noise is a
    function of (seed, step). Returns the signal that ended it, or 0. UserError if it diverges."""
    passes = math.lcm(config.accumulate, WORLD)  # each process takes as many of them
    if config.batch_size % passes:
        raise UserError(f"--batch-size {config.batch_size} for {WORLD} processes: use n * {passes}")
    torch.manual_seed(config.seed)
    model, diffusion = build(config, device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    first, log = 0, "step,loss,lr,grad_norm\n"
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
        except RuntimeError:
            raise UserError("the checkpoint is of another network: leave its flags out")
        ema.load_state_dict(checkpoint["ema"])
        first = checkpoint["step"]
    if first:
        moments, log = checkpoint["optimizer"]["state"], checkpoint["log"]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
    net = in_precision(net, device, dtype, config.compile)
    ema_net = in_precision(ema, device, dtype)
    if math.prod(config.shape(len(pictures))) <= config.cache_gb * 2**30:
        pictures = pictures.read().to(device)
    data = training_batches(pictures, config, first, passes)
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pictures):,} pictures"
    say(f"{size}, {device.type} in {dtype or torch.float32}, run folder {out}\n{config}")
    replace_file(out / "log.csv", lambda file: file.write_text(log))

    total_loss, logged, notes = torch.zeros((), device=device), first, []
    for step in progress(range(first, config.steps), "step", config.steps, first, notes):
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
        update_ema(ema, model, config.ema_decay, step)
        done = step + 1
        stop = over_processes(torch.tensor(max(signals, default=0)), dist.ReduceOp.MAX)
        ending = stop or done == config.steps
        saving = ending or done % config.ckpt_every == 0
        if saving or done % config.log_every == 0:  # it waits for the device
            loss = over_processes(total_loss) / (done - logged)
            if not math.isfinite(loss + norm):
                raise UserError(f"loss not finite at step {done}: --resume with a lower --lr")
            total_loss, logged = torch.zeros_like(total_loss), done
            log += f"{done},{loss:.6f},{lr:.6g},{norm:.4f}\n"
            replace_file(out / "log.csv", lambda file: file.write_text(log), essential=False)
            notes[:] = [f"loss {loss:.4f}", f"lr {lr:.1e}"]
        if saving:
            state = {"config": dataclasses.asdict(config), "step": done, "log": log,
                     "model": model.state_dict(), "ema": ema.state_dict(),
                     "optimizer": optimizer.state_dict()}
            replace_file(out / "ckpt.pt", functools.partial(torch.save, state), ending)
        if stop and done < config.steps:
            return stop
        if RANK == 0 and (done % config.sample_every == 0 or ending):
            size, steps = config.batch_size // passes, min(50, config.timesteps)
            states = draw(diffusion, ema_net, config.shape(64), config.seed, size, steps)
            samples = torch.cat([to_uint8(x_t) for _, t, x_t in states if t < 0])
            replace_file(out / f"step-{done:06}.png", grid(samples).save, essential=False)
    return 0

# 6. Samples and figures -------
def reserve(paths):
    """The first free path, as an empty file to be replaced, or removed at the end; or UserError."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.open("x").close()
            atexit.register(lambda: path.exists() and path.stat().st_size == 0 and path.unlink())
            return path
    raise UserError(f"{path} is there already: name another --out")
def load_network(args):
    """(model, Diffusion, Config, path) of --ckpt, ready to be called as model(x_t, t)."""
    device, dtype = pick_device(args.device, args.amp)
    path = find_checkpoint(args.ckpt)
    model, diffusion, config = load(path, device)
    for layer in model.modules():
        if dtype and isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(dtype)  # once, where autocast would cast anew at every step
    if device.type == "cpu":  # faster so: a step takes 0.78 to 1.04 of the time, as measured
        model.to(memory_format=torch.channels_last)
    say(f"{path}: {device.type} in {dtype or torch.float32}, seed {args.seed}")
    return in_precision(model, device, dtype, args.compile), diffusion, config, path

def sample_command(args):
    """`sample`: new pictures from a checkpoint as one grid; as files and a film if asked for."""
    model, diffusion, config, path = load_network(args)
    names = (path.parent / f"samples-{i:03}.png" for i in itertools.count())
    out = reserve([Path(args.out).with_suffix(".png")] if args.out else names)
    folder, gif = out.with_suffix(""), out.with_suffix(".gif")
    if args.gif:
        reserve([gif])
    if args.individual:
        folder.mkdir()
    steps, pictures, frames = args.ddim_steps or diffusion.timesteps, [], []
    states = draw(diffusion, model, config.shape(args.n), args.seed,
                  args.batch_size, args.ddim_steps, args.eta)
    total = math.ceil(args.n / args.batch_size) * (steps + 1)
    for first, t, x_t in progress(states, "sampling, step", total):
        if args.gif and first == 0 and (t < 0 or t % math.ceil(steps / 60) == 0):
            frames.append(grid(to_uint8(x_t)))  # a film of the first batch
        if t < 0:
            pictures.append(to_uint8(x_t).cpu())
            for i, picture in enumerate(pictures[-1] if args.individual else ()):
                replace_file(folder / f"{first + i:06}.png", grid(picture[None]).save)
    replace_file(out, grid(torch.cat(pictures)).save)
    if args.gif:
        how = {"save_all": True, "append_images": frames[1:], "duration": 60, "loop": 0}
        replace_file(gif, lambda file: frames[0].save(file, **how))
    say(f"wrote {args.n} pictures: {out}" + f", {gif}" * args.gif + f", {folder}" * args.individual)

def forward_figure(args):
    """Pictures, and the same with more and more of one noise mixed in (Eq. 4)."""
    times, diffusion = range(0, 1000, 111), Diffusion()
    x_0 = to_unit(some_pictures(args.data, Config(image_size=64), args.n, args.seed))
    eps = next(noise_for(x_0.shape, "cpu", args.seed))
    columns = [x_0] + [diffusion.q_sample(x_0, t, eps) for t in times]
    return columns, f"columns: x_0, t = {', '.join(map(str, times))}"

def progressive_figure(args):
    """Two rows a picture along the reverse process: x_t, and the x_0 predicted from it (Fig. 6)."""
    model, diffusion, config, _ = load_network(args)
    T, columns = diffusion.timesteps, []
    times = dict.fromkeys(torch.linspace(T - 1, 0, 11).int().tolist())
    noise = noise_for(config.shape(args.n), diffusion.betas.device, args.seed)
    for t, x_t, x_0 in progress(diffusion.sample(model, noise), "step", T + 1):
        if t in (*times, -1):
            columns.append(torch.stack([x_t, x_0], 1).flatten(0, 1))
    return columns, f"columns: t = {', '.join(map(str, times))}, x_0; rows: x_t, predicted x_0"

def interpolate_figure(args):
    """Two pictures noised to some t by one noise, mixed there, and taken back (Figs. 8 and 9)."""
    model, diffusion, config, _ = load_network(args)
    pictures = some_pictures(args.data or config.data, config, 2, args.seed)
    x_0 = to_unit(pictures.to(diffusion.betas.device))[[0, -1]]
    noise = noise_for((1, *x_0.shape[1:]), x_0.device, args.seed)  # the same for the whole row
    eps, rows = next(noise), []
    starts = [max(1, diffusion.timesteps * eighth // 8) for eighth in range(1, 9)]
    for start in starts:
        a, b = diffusion.q_sample(x_0, start - 1, eps)
        mixed = torch.stack([a.lerp(b, tenth / 10) for tenth in range(11)])
        chain = diffusion.sample(model, itertools.chain([mixed], noise), start)
        *_, (_, x_t, _) = progress(chain, "interpolating, step", start + 1)
        rows.append(torch.cat([x_0[:1], x_t, x_0[1:]]))
    return torch.stack(rows, 1), f"columns: source, 0 to 1 by tenths, source; rows: {starts} steps"
FIGURES = {"forward": forward_figure, "progressive": progressive_figure,
           "interpolate": interpolate_figure}
def show_command(args):
    """`show`: a figure as a PNG."""
    out = reserve([Path(args.out or args.figure).with_suffix(".png")])
    columns, text = FIGURES[args.figure](args)  # each (rows, C, H, W) in [-1, 1]
    pictures = torch.stack([*columns], 1).flatten(0, 1)
    replace_file(out, grid(to_uint8(pictures), len(columns)).save)
    say(f"wrote {out}, {text}")

# 7. Evaluation ----------------
def print_bound(model, diffusion, config, args):
    """The variational bound in bits/dim, its parts (Sec. 4.3), and Fig. 5 in ten rows."""
    data, device, T = args.data or config.data, diffusion.betas.device, diffusion.timesteps
    parts, tables = some_pictures(data, config, args.n or 64, args.seed).split(args.batch_size), []
    say(f"bits/dim of {sum(map(len, parts))} pictures of {data!r}, of a named set's test split")
    for i, part in enumerate(parts):
        noise = noise_for(part.shape, device, args.seed, first=i * args.batch_size)
        terms = diffusion.bits_per_dim(model, to_unit(part.to(device)), noise)
        terms = progress(terms, f"bits/dim, batch {i + 1}/{len(parts)}, step", T + 1)
        tables.append(torch.stack([torch.stack(term) for term in terms], -1))
    terms, errors = torch.cat(tables, 1).cpu()  # each (N, T + 1), of L_0..L_T
    rate, distortion = terms[:, 1:].sum(1), terms[:, 0]
    for name, bits in {"total": rate + distortion, "rate": rate, "distortion": distortion}.items():
        error = bits.std(correction=0) / len(bits) ** 0.5
        say(f"{name:12} {bits.mean():7.4f} +- {error:.4f} bits/dim")
    rmse, terms = 127.5 * errors.mean(0).sqrt(), terms.mean(0)
    say("\nFig. 5: once x_t is known\n     t  bits/dim  error of x_0, of 255")
    for t in dict.fromkeys(T * k // 1000 for k in (999, 800, 600, 400, 200, 100, 50, 20, 10, 0)):
        say(f"{t:6} {terms[t + 1 :].sum():9.4f} {rmse[t]:13.2f}")

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")

def load_inception(file=None, device="cpu"):
    """TensorFlow's network of 2015: uint8 pictures (B, 1 or 3, H, W) -> (features (B, 2048), class
    probabilities (B, 1008)). Its weights are fetched once, or a file's; else UserError."""
    net = models.Inception3(1008, aux_logits=False, init_weights=False)
    try:
        weights = torch.load(file, "cpu") if file else torch.hub.load_state_dict_from_url(
            INCEPTION, check_hash=True, weights_only=True)
        net.load_state_dict(weights)
    except BROKEN as error:
        raise UserError(f"no Inception ({error!s:.60}): fetch {INCEPTION} for --inception-weights")
    kept, average = [], functools.partial(F.avg_pool2d, count_include_pad=False)
    for block in (block for block in net.children() if hasattr(block, "branch_pool")):
        pool = F.max_pool2d if block is net.Mixed_7c else average  # not as torchvision pools
        block.register_forward_pre_hook(lambda _, x, pool=pool: kept.append(pool(*x, 3, 1, 1)))
        block.branch_pool.register_forward_pre_hook(lambda *_: (kept.pop(),))
    net.to(device).eval().requires_grad_(False)
    classes, net.fc = net.fc.weight, nn.Identity()  # the reference IS has no bias here
    net.register_forward_pre_hook(lambda _, pictures: F.interpolate(
        to_unit(pictures[0].to(device)).expand(-1, 3, -1, -1), (299, 299), mode="bilinear"))
    net.register_forward_hook(lambda _, x, features: (features, (features @ classes.T).softmax(1)))
    return net

def gaussian_of(batches):
    """Number, mean (D,) and covariance (D, D) in float64, of features in batches (B, D)."""
    n, total, products = 0, 0, 0
    for features in batches:
        features = features.double()
        n, total = n + len(features), total + features.sum(0)
        products = products + features.T @ features
    mean = total / n
    return n, mean, (products - n * mean.outer(mean)) / max(1, n - 1)

def training_gaussian(pictures, inception):
    """gaussian_of the features of a Pictures: computed once, then kept below ./data in a file
    that is named after all bytes of the pictures and of the network's weights."""
    batches, name = pictures.in_order("checking the training set"), hashlib.sha256()
    for part in itertools.chain(inception.state_dict().values(), batches):
        name.update(repr(part.shape).encode() + part.cpu().numpy().tobytes())
    file = Path(f"data/inception-{name.hexdigest():.16}.pt")
    if file.exists():
        return torch.load(file)
    batches = pictures.in_order("features of the training set")
    gaussian = gaussian_of(inception(batch)[0].cpu() for batch in batches)
    replace_file(file, functools.partial(torch.save, gaussian), essential=False)
    return gaussian

def frechet_distance(a, b):
    """FID (Heusel et al. 2017) of two sets of features (N, D), or of their `gaussian_of`:
    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))."""
    (_, mean_a, cov_a), (_, mean_b, cov_b) = (
        gaussian_of(x.split(1024)) if torch.is_tensor(x) else x for x in (a, b))
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt()  # rounding can pass 0
    return ((mean_a - mean_b).square().sum() + (cov_a + cov_b).trace() - 2 * roots.sum()).item()
def inception_score(probabilities, splits=10):
    """IS (Salimans et al. 2016), exp E KL(p(y|x) || p(y)): mean and deviation of so many splits."""
    scores, n = [], len(probabilities)
    for p in probabilities.tensor_split([k * n // splits for k in range(1, splits)]):
        p = p.double()
        kl = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1)
        scores.append(kl.mean().exp().item())
    return np.mean(scores), np.std(scores)

def eval_command(args):
    """`eval`: the bound and Fig. 5 (Sec. 4.3); FID and Inception Score of new or given samples."""
    metrics = args.metrics or (["fid", "is"] if args.samples else ["bpd"])
    if "bpd" in metrics or not args.samples:
        model, diffusion, config, _ = load_network(args)
    if "bpd" in metrics:
        print_bound(model, diffusion, config, args)
    if metrics == ["bpd"]:
        return
    inception = load_inception(args.inception_weights, pick_device(args.device, args.amp)[0])
    if args.samples:
        samples = Pictures(os.path.abspath(args.samples), Config())
        samples.config = config = Config(image_size=min(Image.open(samples.items[0]).size))
        batches, made = samples.in_order("features of samples"), f"pictures of {args.samples}"
    else:
        steps, n = args.ddim_steps or config.timesteps, args.n or 50_000
        made = f"samples in {steps} steps, eta {args.eta}, amp {args.amp}"
        states = draw(diffusion, model, config.shape(n), args.seed,
                      args.batch_size, args.ddim_steps, args.eta)
        batches = (to_uint8(x_t) for _, t, x_t in states if t < 0)
        batches = progress(batches, "sampling, batch", math.ceil(n / args.batch_size))
    ours, probabilities = zip(*([answer.cpu() for answer in inception(part)]
                                for batch in batches for part in batch.split(16)))  # below 2 GB
    ours, probabilities = gaussian_of(ours), torch.cat(probabilities)
    data, made = args.data or config.data, f"{len(probabilities)} {made}"
    if "fid" in metrics and len(probabilities) < 10_000:
        say("a FID of fewer than 10,000 pictures is too high: do not compare it with others")
    if "fid" in metrics:
        theirs = training_gaussian(Pictures(data, config), inception)
        fid = frechet_distance(ours, theirs)
        say(f"FID {fid:.3f} of {made} against {theirs[0]} training pictures of {data!r}")
    if "is" in metrics:
        say("Inception Score {:.3f} +- {:.3f} of {}".format(*inception_score(probabilities), made))

# 8. The command line ----------
@dataclasses.dataclass
class Options:
    """The flags of the commands that are no part of a run's Config; the comments are `--help`."""
    ckpt: str = ""  # a checkpoint, a run's folder or published weights; if none, the newest run
    n: int = 64  # how many pictures
    ddim_steps: int = 0  # DDIM in so many steps, e.g. 50, in place of Algorithm 2
    eta: float = 1.0  # DDIM's noise, from 0 to 1, as much as DDPM's
    device: str = "auto"  # where to compute
    individual: bool = False  # each picture as a file, too
    gif: bool = False  # a film of the first batch, too
    samples: str = ""  # a folder of pictures to score in place of new samples
    inception_weights: str = ""  # the file of Inception's weights, if it can't be fetched
    out: str = ""  # the PNG or the run's folder to write
FLAGS = Config.__dataclass_fields__ | Options.__dataclass_fields__
HELP = dict(re.findall(r"^    (\w+): \w+ = .*  # (.*)", Path(__file__).read_text(), re.M))

class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, as all others of this program."""
    def error(self, message):
        raise UserError(f"{message} (see `{self.prog} --help`)")

def add_command(group, run, name, flags, **options):
    """A parser of a command or figure that `run` runs; options: of add_argument, for all flags."""
    about = FIGURES.get(name, run).__doc__
    parser = group.add_parser(name, help=about, allow_abbrev=False)
    parser.set_defaults(run=run)
    for field in map(FLAGS.get, flags.split()):
        how = {"type": field.type, "choices": CHOICES.get(field.name)}
        if field.type is tuple:
            how = {"type": int, "nargs": "*"}
        elif field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        how |= {"dest": field.name, "default": field.default}
        how["help"] = f"{HELP[field.name]} [{field.default}]"
        parser.add_argument(flag_of(field.name), **how | options)
    return parser

def train_command(args):
    """`train`: the configuration of a preset or checkpoint, changed by the flags given; trains."""
    given = {k: v for k, v in vars(args).items() if v is not None and hasattr(Config, k)}
    data = args.data or ""
    name = Path(os.path.abspath(data)).name if os.path.isdir(data) else data.replace("/", "-")
    out, checkpoint = Path(args.out or f"runs/{name}"), None
    if args.resume or args.init_from:
        path = find_checkpoint(args.init_from or (out if args.out or name else ""))
        checkpoint, base = load_checkpoint(path, args.resume)
    if args.resume:
        out = path.parent
    elif (out / "ckpt.pt").exists():
        raise UserError(f"{out} holds a checkpoint: resume it with --resume, or name another --out")
    elif args.init_from:
        checkpoint |= {"step": 0, "model": checkpoint["ema"]}
        base = dataclasses.replace(base, data="")
    else:
        slow = args.device == "cpu" or not torch.accelerator.is_available()
        base = PRESETS[args.preset or ("tiny" if slow else "cifar10")]
        if data.startswith(("mnist", "fashion-mnist")):  # grey, and digits can't be mirrored
            base = dataclasses.replace(base, channels=1, flip=data[0] == "f")
    config = dataclasses.replace(base, **given)
    device, dtype = pick_device(args.device, config.amp)
    pictures = Pictures(config.data, config)
    if WORLD > 1:  # gloo for numbers that live on the CPU; grids keep the others waiting
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(out / f".lock-{RANK}", timeout=0)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")  # it ends with the process
        except sqlite3.OperationalError:
            raise UserError(f"another program trains in {out}: name another --out")
        stopped = train(config, pictures, out, device, dtype, checkpoint, note_signals())
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
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    flags = " ".join(Config.__dataclass_fields__) + " device out"
    train = add_command(commands, train_command, "train", flags, default=None)
    train.set_defaults(device="auto")  # all others are None unless given
    start = train.add_mutually_exclusive_group()
    start.add_argument("--preset", choices=PRESETS, help="[cifar10 with an accelerator, else tiny]")
    start.add_argument("--resume", action="store_true", help="the run in --out, or the newest")
    start.add_argument("--init-from", metavar="CKPT", help="fine-tune the weights of a checkpoint")
    network, sampling = "ckpt seed device amp compile", "n batch_size ddim_steps eta"
    add_command(commands, sample_command, "sample", f"{network} {sampling} gif individual out")
    scored = f"{network} {sampling} data samples inception_weights"
    evaluate = add_command(commands, eval_command, "eval", scored)
    evaluate.add_argument("--metrics", nargs="+", choices=("bpd", "fid", "is"))
    evaluate.set_defaults(amp="off", n=None)  # float32, for figures to compare with a paper's
    show = commands.add_parser("show", help=show_command.__doc__)
    figures = show.add_subparsers(required=True, metavar="FIGURE", dest="figure")
    add_command(figures, show_command, "forward", "data n seed out").set_defaults(n=4)
    add_command(figures, show_command, "progressive", f"{network} n out").set_defaults(n=4)
    add_command(figures, show_command, "interpolate", f"{network} data out")
    try:
        args = parser.parse_args(argv)
        for name, value in vars(args).items():
            if name in FLAGS and value is not None:
                check_setting(FLAGS[name], value)
        return args.run(args) or 0
    except (UserError, OSError) as error:
        message = str(error)
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):  # a GPU's, the CPU's
            raise
        message = f"{error}: lower --batch-size, or raise --accumulate"
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 128 + signal.SIGINT
    print("error:", " ".join(message.split()), file=sys.stderr)  # torchvision's have several lines
    return 2
if __name__ == "__main__":
    sys.exit(main())
