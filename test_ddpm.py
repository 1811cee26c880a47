"""Tests of ddpm.py: what the paper says, and what a user of the program would miss.

    python -m pytest

Expectations are built another way than the code builds them: closed forms, numerical
integration, brute force.
"""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from math import sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image, PngImagePlugin
from pytest import approx
from torch import nn, randn, tensor
from torch.testing import assert_close

import ddpm

SCRIPT = Path(ddpm.__file__).resolve()
torch.set_num_threads(1)  # networks this small get slower with more threads
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # in processes of their own, too

# A network and a process so small that a command takes less than a second.
FAST = """--image-size 8 --base-channels 32 --channel-mults 1 --num-res-blocks 1
    --attention-resolutions --dropout 0 --timesteps 5 --batch-size 4 --warmup 2 --lr-decay 0
    --device cpu --amp off"""
CPU = "--device cpu --amp off"
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals and shells")
both_variances = pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])


@pytest.fixture(autouse=True)
def seed_and_folder(tmp_path, monkeypatch):
    """Each test starts with seed 0, in an empty folder."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained():
    """The folder of a run of three steps, with its pictures in images/."""
    folder_of_shapes(3)
    do(f"train --data images {FAST} --lr 0.1 --log-every 1 --steps 3")
    return Path("runs", "images")


def folder_of_shapes(count, folder="images"):
    """A folder of so many pictures."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    shapes = ddpm.Shapes()
    for i in range(count):
        image, _ = shapes[i]
        image.save(f"{folder}/{i}.png")


def read(folder, size=8, channels=3):
    """All pictures of a folder, as the program reads them: uint8 (N, C, H, W)."""
    paths = ddpm.find_pictures(folder)
    return torch.cat(list(ddpm.read_pictures(paths, (size, size), channels)))


def run(command):
    """A command line in this process: its exit status."""
    return ddpm.main(command.split())


def do(command):
    """A command line that must end well."""
    assert run(command) == 0


def error_of(command, capsys):
    """The one line with which a command line ends in status 2."""
    capsys.readouterr()
    assert run(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def ckpt(folder):
    return torch.load(Path(folder, "ckpt.pt"), weights_only=True)


def settings_of(folder):
    return json.loads(Path(folder, "config.json").read_text())


def log_rows(folder):
    """The rows of log.csv, split, without the header."""
    rows = Path(folder, "log.csv").read_text().splitlines()[1:]
    return [row.split(",") for row in rows]


def assert_equal(a, b):
    """Two dictionaries of tensors are the same, bit for bit."""
    assert_close(a, b, rtol=0, atol=0)


def network(size, channels, mults, attention, base=32):
    config = ddpm.Config(size, channels, base, mults, 1, attention, dropout=0.0)
    return ddpm.UNet(config)


def randomise(model, std):
    """Gives a network weights that are all random: a new one predicts nothing."""
    for weights in model.parameters():
        nn.init.normal_(weights, std=std)


def no_noise(x_t, t):
    """A network that always predicts eps = 0."""
    return torch.zeros_like(x_t)


def last(chain):
    """The picture at which a chain of (t, x_{t-1}, predicted x_0) ends."""
    *_, (_, x, _) = chain
    return x


def paper_schedule(T=1000):
    """beta_t and alpha_bar_t for t = 0..T in float64, from Sec. 4's words alone."""
    betas = np.append(0, 1000 / T * np.linspace(1e-4, 0.02, T))
    alpha_bars = [math.prod(1 - betas[: t + 1]) for t in range(T + 1)]
    return betas, np.array(alpha_bars)


# The schedule and the forward process


@pytest.mark.parametrize("T", [1000, 4000, 250])
def test_schedule_is_linear_and_ends_as_noise(T):
    betas, alpha_bars = paper_schedule(T)
    diffusion = ddpm.Diffusion(T)
    assert_allclose(ddpm.linear_beta_schedule(T), betas[1:], rtol=1e-12)
    assert_allclose(diffusion.alpha_bars, alpha_bars, rtol=1e-6)
    assert 3e-5 < alpha_bars[-1] < 5e-5  # the paper's alpha_bar_T, which T must hardly move
    # computed in float32, 1 - alpha_bar of the first step would be off by 1e-4 of itself
    sigma = np.sqrt(1 - alpha_bars)
    assert_allclose(diffusion.sqrt_one_minus_alpha_bars, sigma, rtol=1e-6)


def test_one_jump_equals_step_by_step_noising():
    """Eq. 4 against Eq. 2 taken t times, in mean and variance."""
    diffusion = ddpm.Diffusion()
    betas, _ = paper_schedule()
    x_0, eps = tensor([1.0, 0.0]), tensor([0.0, 1.0])
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(betas[1:], 1):
        mean = sqrt(1 - beta) * mean
        variance = (1 - beta) * variance + beta
        x_t = diffusion.q_sample(x_0, t, eps)
        assert x_t.tolist() == approx([mean, sqrt(variance)], rel=1e-5)


@pytest.mark.parametrize("t", [2, 3, 50, 500, 1000])
def test_posterior_is_bayes_rule(t):
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0), integrated on a fine grid."""
    betas, alpha_bars = paper_schedule()
    x_0, x_t = 0.3, -0.2
    found_mean, found_deviation = ddpm.Diffusion().q_posterior(tensor(x_0), tensor(x_t), t)

    beta, previous = betas[t], alpha_bars[t - 1]
    x = np.linspace(-8, 8, 1_600_001)
    from_x_0 = (x - sqrt(previous) * x_0) ** 2 / (1 - previous)
    to_x_t = (x_t - sqrt(1 - beta) * x) ** 2 / beta
    log_density = -(from_x_0 + to_x_t) / 2
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = (density * x).sum()
    variance = (density * (x - mean) ** 2).sum()

    assert found_mean.item() == approx(mean, abs=1e-5)
    assert found_deviation.item() == approx(sqrt(variance), rel=1e-4)


# Algorithm 1


def test_loss_of_a_perfect_and_of_a_zero_predictor():
    diffusion = ddpm.Diffusion()
    scale = diffusion.sqrt_one_minus_alpha_bars
    x_0 = torch.zeros(64, 3, 8, 8)  # then the noise can be read off x_t

    def perfect(x_t, t):
        return x_t / scale[t + 1].view(-1, 1, 1, 1)  # a network is fed t - 1

    assert diffusion.loss(perfect, x_0).item() < 1e-10
    assert diffusion.loss(no_noise, x_0).item() == approx(1, abs=0.03)


def test_loss_draws_every_step_equally_often():
    drawn = []

    def model(x_t, t):
        drawn.append(t)
        return x_t

    ddpm.Diffusion(50).loss(model, torch.zeros(20_000, 1, 1, 1))
    counts = drawn[0].bincount()
    assert len(counts) == 50  # no step beyond the last
    assert counts.tolist() == approx([400] * 50, abs=100)


# Algorithm 2 and DDIM


class GaussianData:
    """The best possible eps for pixels that are N(mean, std^2): E[eps | x_t], in closed form."""

    def __init__(self, diffusion, mean=0.3, std=0.1):
        self.alpha_bars = diffusion.alpha_bars.double()
        self.mean, self.std = mean, std

    def __call__(self, x_t, t):
        a = self.alpha_bars[t + 1].view(-1, 1, 1, 1)  # a network is fed t - 1
        variance = a * self.std**2 + 1 - a
        eps = (1 - a).sqrt() * (x_t - a.sqrt() * self.mean) / variance
        return eps.to(x_t.dtype)


def test_reverse_mean_is_equation_11_where_nothing_is_clipped():
    betas, alpha_bars = paper_schedule()
    diffusion = ddpm.Diffusion()
    eps = randn(4, 3, 8, 8)
    x_0 = torch.rand(4, 3, 8, 8) - 0.5
    for t in (1, 2, 300, 1000):
        x_t = diffusion.q_sample(x_0, t, eps)
        mean, sigma, found = diffusion.p_mean_variance(lambda x, t: eps, x_t, t)
        expected = (x_t - betas[t] / sqrt(1 - alpha_bars[t]) * eps) / sqrt(1 - betas[t])
        assert_close(mean, expected, atol=1e-4, rtol=0)
        assert_close(found, x_0, atol=2e-4, rtol=0)
        if t > 1:
            assert sigma.item() == approx(sqrt(betas[t]), rel=1e-5)


def test_variance_of_the_first_step_is_beta_tilde_of_the_second():
    betas, alpha_bars = paper_schedule()
    expected = betas[2] * (1 - alpha_bars[1]) / (1 - alpha_bars[2])
    for variance in ("fixedlarge", "fixedsmall"):
        diffusion = ddpm.Diffusion(variance=variance)
        _, sigma, _ = diffusion.p_mean_variance(no_noise, torch.zeros(1, 1, 1, 1), 1)
        assert sigma.item() ** 2 == approx(expected, rel=1e-5)


@both_variances
def test_algorithm_2_with_the_best_network_gives_back_the_data(variance):
    diffusion = ddpm.Diffusion(variance=variance)
    model = GaussianData(diffusion)
    x_0 = last(diffusion.sample(model, randn(16, 1, 32, 32)))
    assert x_0.mean().item() == approx(0.3, abs=0.005)
    assert x_0.std().item() == approx(0.1, rel=0.04)


@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_ddim_without_noise_follows_its_closed_form(steps):
    """For Gaussian data each step is linear in the distance from the mean: factors multiply."""
    diffusion = ddpm.Diffusion()
    model = GaussianData(diffusion)
    x_0 = last(diffusion.sample_ddim(model, randn(16, 1, 32, 32), steps))

    _, alpha_bars = paper_schedule()
    times = 1 + np.linspace(999, 0, steps).round().astype(int)
    levels = [*alpha_bars[times], 1.0]
    std = 1.0
    for a, b in zip(levels[:-1], levels[1:]):
        gain = sqrt(a * b) * 0.1**2 + sqrt((1 - a) * (1 - b))
        std *= gain / (a * 0.1**2 + 1 - a)

    assert x_0.mean().item() == approx(0.3, abs=0.005)
    assert x_0.std().item() == approx(std, rel=0.03)


def test_ddim_in_all_steps_with_eta_1_is_algorithm_2_with_beta_tilde():
    diffusion = ddpm.Diffusion(variance="fixedsmall").double()
    model = GaussianData(diffusion)
    x_T = randn(2, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    algorithm_2 = last(diffusion.sample(model, x_T))
    torch.manual_seed(1)
    ddim = last(diffusion.sample_ddim(model, x_T, 1000, eta=1.0))
    assert_close(ddim, algorithm_2, atol=1e-4, rtol=0)
    assert algorithm_2.std() > 0.05  # pictures, not a constant


def test_the_last_step_adds_no_noise_and_the_others_do():
    diffusion = ddpm.Diffusion()
    x_t = randn(2, 1, 4, 4)
    for start, is_last in ((1, True), (2, False)):
        one, other = (last(diffusion.sample(no_noise, x_t, start)) for _ in range(2))
        assert torch.equal(one, other) == is_last


def test_impossible_ddim_is_a_value_error():
    for steps, eta in ((0, 0), (1001, 0), (50, 1.5), (50, math.nan)):
        with pytest.raises(ValueError, match="from 1 to 1000, and --eta from 0 to 1"):
            next(ddpm.Diffusion().sample_ddim(no_noise, randn(1, 1, 2, 2), steps, eta))


def test_ddim_takes_any_number_of_steps_with_any_schedule():
    for T in (2, 8, 9, 11, 13, 15):  # rounding can leave a variance just below 0
        for steps in range(1, T + 1):
            drawn = last(ddpm.Diffusion(T).sample_ddim(no_noise, randn(1, 1, 2, 2), steps, 1.0))
            assert drawn.isfinite().all()


def test_times_are_the_papers_and_the_network_is_fed_one_less():
    diffusion, fed = ddpm.Diffusion(5), []

    def model(x_t, t):
        fed.append(t[0].item())
        return torch.zeros_like(x_t)

    chains = {
        (5, 4, 3, 2, 1): diffusion.sample(model, randn(1, 1, 2, 2)),
        (3, 2, 1): diffusion.sample(model, randn(1, 1, 2, 2), start=3),
        (5, 3, 1): diffusion.sample_ddim(model, randn(1, 1, 2, 2), 3),
    }
    for times, chain in chains.items():
        fed.clear()
        assert [t for t, _, _ in chain] == [*times] == [t + 1 for t in fed]
    assert not list(diffusion.sample(model, randn(1, 1, 2, 2), start=0))


def test_picture_i_of_a_seed_is_the_same_in_any_batch():
    diffusion = ddpm.Diffusion(50)
    model = GaussianData(diffusion)

    def pictures(seed, batch_size):
        batches = torch.arange(5).split(batch_size)
        config = ddpm.Config(image_size=8)
        chains = [ddpm.draw(model, diffusion, config, seed, batch.tolist())[1] for batch in batches]
        return torch.cat([last(chain) for chain in chains])

    together = pictures(7, 5)
    assert_close(pictures(7, 2), together)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(pictures(8, 5), together)


# Bits per dimension


@both_variances
def test_bits_per_dim_agree_with_numerical_integration(variance):
    """Each term of the bound, with the best network for Gaussian data."""
    T, mean, deviation, x_0 = 60, 0.9, 0.5, 230 / 127.5 - 1  # so that x_0 is often clipped
    diffusion = ddpm.Diffusion(T, variance)
    pictures = torch.full((2, 3, 128, 128), x_0)
    model = GaussianData(diffusion, mean, deviation)
    terms = torch.stack(list(diffusion.bits_per_dim(model, pictures)))
    assert terms.shape == (T + 1, 2)

    betas, alpha_bars = paper_schedule(T)
    previous = np.append(1, alpha_bars[:-1])  # alpha_bar_{t-1}
    tilde = betas * (1 - previous) / (1 - alpha_bars).clip(1e-9)
    model_variance = (betas if variance == "fixedlarge" else tilde).copy()
    model_variance[1] = tilde[2]
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)  # E[f(z)] over z ~ N(0, 1)
    weights = weights / weights.sum()
    expected = []
    for t in range(1, T + 1):
        a, b = alpha_bars[t], 1 - alpha_bars[t]
        signal, sigma = sqrt(a), sqrt(model_variance[t])
        x_t = signal * x_0 + sqrt(b) * nodes
        eps = b * (x_t - signal * mean) / (a * deviation**2 + b)
        guess = np.clip((x_t - eps) / signal, -1, 1)
        from_x_0 = sqrt(previous[t]) * betas[t] / b
        from_x_t = sqrt(1 - betas[t]) * (1 - previous[t]) / b
        centre = from_x_0 * guess + from_x_t * x_t
        if t == 1:  # the mass of one grey level
            high = normal_cdf((x_0 + 1 / 255 - centre) / sigma)
            low = normal_cdf((x_0 - 1 / 255 - centre) / sigma)
            nats = -np.log((high - low).clip(1e-12))
        else:  # KL(q || p) by integrating q log(q / p) over a fine grid
            z = np.linspace(-9, 9, 4001)[:, None]
            x = from_x_0 * x_0 + from_x_t * x_t + z * sqrt(tilde[t])
            log_q = -0.5 * z**2 - math.log(sqrt(tilde[t]))
            log_p = -0.5 * ((x - centre) / sigma) ** 2 - math.log(sigma)
            q = np.exp(-0.5 * z**2)
            nats = (q / q.sum() * (log_q - log_p)).sum(0)
        expected.append(weights @ nats)
    a, b = alpha_bars[-1], 1 - alpha_bars[-1]
    expected.append(0.5 * (-math.log(b) - 1 + b + a * x_0**2))

    expected = np.array(expected) / math.log(2)
    assert_allclose(terms.mean(1), expected, rtol=0.05, atol=2e-6)
    assert_allclose(terms.sum(0).mean(), expected.sum(), rtol=0.005)


@np.vectorize
def normal_cdf(z):
    return 0.5 * (1 + math.erf(z / sqrt(2)))


def test_masses_of_all_grey_levels_sum_to_1():
    levels = torch.arange(256) / 127.5 - 1
    for mean in (-1.0, 0.3, 1.0):  # black and white are open to infinity
        masses = ddpm.discretised_log_likelihood(levels, mean, 0.05).exp()
        assert masses.sum().item() == approx(1, abs=1e-5)


# The network


def test_networks_have_exactly_the_papers_parameters():
    with torch.device("meta"):
        cifar10 = ddpm.UNet(ddpm.PRESETS["cifar10"])
        celebahq256 = ddpm.UNet(ddpm.PRESETS["celebahq256"])
    assert sum(p.numel() for p in cifar10.parameters()) == 35_746_307
    assert sum(p.numel() for p in celebahq256.parameters()) == 113_673_219


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("preset", ["tiny", "cifar10"])
def test_presets_work_at_usual_sizes_as_they_are(preset, size):
    config = dataclasses.replace(ddpm.PRESETS[preset], image_size=size)
    with torch.device("meta"):
        x_t = torch.empty(2, 3, size, size)
        assert ddpm.UNet(config)(x_t, torch.zeros(2)).shape == x_t.shape


def test_a_network_starts_silent_and_is_told_the_time():
    model = network(8, 3, (1, 2), (4,))
    x_t = randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    times = tensor([3, 700])
    assert model(x_t, times).abs().max() == 0
    randomise(model, 0.1)
    early, late = model(x_t, times)
    assert not torch.allclose(early, late, atol=1e-3)


def test_embedding_is_sines_then_cosines_from_1_to_one_ten_thousandth():
    times = (0, 1, 999)
    rows = ddpm.sinusoidal_embedding(tensor(times), 128)
    for row, t in zip(rows, times):
        angles = [t * 10000 ** (-i / 63) for i in range(64)]
        expected = np.concatenate([np.sin(angles), np.cos(angles)])
        assert_allclose(row, expected, atol=2e-4)


def test_attention_is_softmax_over_all_positions():
    attention = ddpm.Attention(ddpm.Config(group_size=16), 32)
    nn.init.normal_(attention.to_out[0].weight)
    x = randn(2, 32, 3, 3)
    h = nn.functional.group_norm(x, 2, eps=1e-6)
    rows = h.flatten(2).mT  # (B, positions, channels)
    q, k, v = attention.to_q(rows), attention.to_k(rows), attention.to_v(rows)
    weights = (q @ k.mT / sqrt(32)).softmax(2)
    h = attention.to_out[0](weights @ v)
    expected = x + h.mT.view(2, 32, 3, 3)
    assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


def test_residual_block_is_its_formula():
    block = ddpm.ResBlock(ddpm.Config(base_channels=16, dropout=0.0), 32, 64)
    x, temb = randn(2, 32, 4, 4), randn(2, 64)
    silu, group_norm = nn.functional.silu, nn.functional.group_norm
    h = block.conv1(silu(group_norm(x, 8, eps=1e-6)))
    h = h + block.time_emb_proj(silu(temb))[..., None, None]
    h = block.conv2(silu(group_norm(h, 16, eps=1e-6)))
    assert_close(block(x, temb), block.conv_shortcut(x) + h)


def test_downsampling_pads_on_the_right_and_the_bottom_only():
    model = network(4, 1, (1, 1), ())
    halve = model.down_blocks[0].downsamplers[0]
    nn.init.constant_(halve.conv.weight, 1 / 32)
    # a 3x3 window sees nine ones in the corner at the top left, and zeros past the other edges
    h = halve(torch.ones(1, 32, 4, 4))
    assert h[0, 0].tolist() == [[9, 6], [6, 4]]


def test_the_way_up_puts_its_input_before_the_skip():
    model = network(4, 1, (1,), ())
    randomise(model, 0.1)
    seen = []
    middle, up = model.mid_block.resnets[1], model.up_blocks[0].resnets[0]
    middle.register_forward_hook(lambda layer, x, h: seen.append(h))
    up.register_forward_pre_hook(lambda layer, x: seen.append(x[0]))
    model(randn(1, 1, 4, 4), tensor([7]))
    h, joined = seen
    assert torch.equal(joined[:, :32], h)


# Published weights


def published(folder, monkeypatch, **changes):
    """Published weights, as diffusers lays them out, of a small random network: that network."""
    config = ddpm.Config(8, 3, 128, (1, 2), 1, (4,), lr=0.125, variance="fixedsmall")
    monkeypatch.setitem(ddpm.PRESETS, "celebahq256", config)
    model = ddpm.UNet(config)
    randomise(model, 0.02)
    state = model.state_dict()
    # as in the authors' own files
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for ours, theirs in old.items():
        state = {name.replace(ours, theirs): weights for name, weights in state.items()}
    config = json.loads("""{
        "act_fn": "silu", "attention_head_dim": null, "block_out_channels": [128, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "downsample_padding": 0,
        "flip_sin_to_cos": false, "freq_shift": 1, "in_channels": 3, "layers_per_block": 1,
        "norm_eps": 1e-06, "norm_num_groups": 32, "sample_size": 8}""")
    Path(folder).mkdir(parents=True)
    Path(folder, "config.json").write_text(json.dumps(config | changes))
    torch.save(state, Path(folder, "diffusion_pytorch_model.bin"))
    return model


def test_published_weights_are_the_same_network_here(monkeypatch):
    weights = published("pipe/unet", monkeypatch).state_dict()
    assert "time_embedding.linear_1.weight" in weights
    assert "mid_block.attentions.0.to_out.0.bias" in weights
    assert "down_blocks.0.downsamplers.0.conv.weight" in weights
    for folder in ("pipe/unet", "pipe"):  # the network's own folder, or its pipeline's
        model, diffusion, config = ddpm.load(folder)
        assert_equal(model.state_dict(), weights)
        assert not model.training
        assert (diffusion.timesteps, config.variance) == (1000, "fixedsmall")


def test_published_weights_are_fine_tuned_at_the_papers_rate(monkeypatch, capsys):
    published("weights", monkeypatch)
    folder_of_shapes(2)
    do(f"train --init-from weights --data images --steps 1 --batch-size 1 --log-every 1 {CPU}")
    [[_, _, rate, _]] = log_rows("runs/images")
    assert float(rate) == 0.125
    assert settings_of("runs/images")["variance"] == "fixedsmall"
    assert "--init-from" in error_of(f"train --resume weights {CPU}", capsys)


def test_published_weights_of_another_network_are_refused(monkeypatch, capsys):
    changes = {"norm_eps": 1e-5, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0}
    for name, value in changes.items():
        published(name, monkeypatch, **{name: value})
        assert name in error_of(f"sample --ckpt {name} {CPU}", capsys)


# Data


def test_pixels_go_to_minus_1_to_1_and_back_without_loss():
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = ddpm.to_unit(pixels)
    assert_close(unit, torch.linspace(-1, 1, 256))
    for nudge in (0, 0.49, -0.49):  # a cast alone would be wrong for the last
        assert torch.equal(ddpm.to_uint8(unit + nudge / 127.5), pixels)
    assert ddpm.to_uint8(tensor([-7.0, 7.0])).tolist() == [0, 255]


def colour(image, name, **options):
    """The one colour of a picture, saved in a file of this name, as the program reads it."""
    folder = Path(f"folder of {name}")
    folder.mkdir()
    image.save(folder / name, **options)
    pixels = read(folder)[0]
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


def test_pictures_of_every_mode_are_read_as_a_person_sees_them():
    grey, white = [77, 77, 77], [255, 255, 255]
    image = Image.new("L", (20, 20), 77)
    for name in ("a.png", "b.jfif", "c.tga", "d.bmp", "e.webp"):
        assert colour(image, name) == grey
    tags = PngImagePlugin.PngInfo()
    tags.add_text("Raw profile type exif", "\n\n\nnot hexadecimal")
    assert colour(image, "tags.png", pnginfo=tags) == grey
    assert colour(image, "tags.jpg", exif=b"Exif\0\0garbage") == grey
    deep = Image.fromarray(np.full((20, 20), 77 * 257, np.uint16))
    for name in ("16.png", "16.tiff"):
        assert colour(deep, name) == grey
    Path("maps").mkdir()
    Path("maps/16.pgm").write_bytes(b"P5 20 20 65535 " + bytes([77, 77]) * 400)
    assert (read("maps") == 77).all()

    palette = Image.new("P", (20, 20))
    palette.putpalette([9, 99, 199])
    assert colour(palette, "palette.png") == [9, 99, 199]
    assert colour(palette, "clear.gif", transparency=0) == white
    for mode in ("RGBA", "LA"):
        assert colour(Image.new(mode, (20, 20)), f"{mode}.png") == white


def test_pictures_are_turned_as_the_camera_was_held():
    image = Image.new("L", (16, 16), 255)
    image.paste(0, (0, 0, 16, 8))  # the top half is black
    # Orientation 6, a quarter clockwise: the top goes to the right. The other tag, ResolutionUnit,
    # has a value that its type can't hold: Pillow can read this EXIF, and can't write it.
    tags = struct.pack("<HHII HHII", 0x0112, 3, 1, 6, 0x0128, 4, 1, 70_000)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + bytes(4)
    Path("photos").mkdir()
    image.save("photos/1.jpg", exif=exif, quality=95)
    pixels = read("photos", 16, 1)[0, 0]
    assert pixels[:, :7].min() > 200
    assert pixels[:, 9:].max() < 55


BROKEN = {
    "cut.dds": b"DDS " + (124).to_bytes(4, "little") + bytes(range(120)),
    "cut.tiff": b"II*\0\x08\0\0\0\xff\xff" + bytes(30),
    "cut.gif": b"GIF89a" + bytes(7),
    "cut.webp": b"RIFF\x40\0\0\0WEBPVP8 " + bytes(60),
    "empty.jpg": b"",
    "words.PNG": b"not a picture",
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_pictures_are_named_and_skipped_and_others_counted(monkeypatch, capsys):
    folder_of_shapes(3)
    whole = Path("images/0.png").read_bytes()
    files = BROKEN | {"half.png": whole[: len(whole) // 2], "a.svg": b"", "b.heic": b""}
    Path("images/sub").mkdir()
    for name, content in files.items():
        Path("images/sub", name).write_bytes(content)
    Path("images/._0.png").write_text("what another system left behind")
    assert len(read("images")) == 3
    out = capsys.readouterr().out
    assert out.count("skipped a broken picture") == len(BROKEN) + 1
    assert all(name in out for name in [*BROKEN, "half.png"])
    assert f"{len(BROKEN) + 4} of {len(BROKEN) + 6} files" in out

    errors = [ZeroDivisionError("0/0")]  # a decoder may raise anything

    def faulty(*args):
        raise errors[0]

    monkeypatch.setattr(ddpm, "decode", faulty)
    assert "none of the" in error_of(f"train --data images {FAST}", capsys)
    for error in (MemoryError(), OSError("out of memory error when reading image file")):
        errors[0] = error  # is no fault of the picture
        assert "error: out of memory" in error_of(f"train --data images {FAST}", capsys)
    assert not Path("runs/images").exists()


def test_a_folder_is_searched_through_links_but_not_where_they_lead_back(monkeypatch, capsys):
    folder_of_shapes(4, "elsewhere/car")
    folder_of_shapes(3, "images/ship")
    folder_of_shapes(2, "images/.hidden")
    folder_of_shapes(2, "images/runs")  # a name like any other
    folder_of_shapes(2, "images/run/samples")
    for file in ("ckpt.pt", "config.json"):
        Path("images/run", file).touch()
    Path("images/car").symlink_to(Path("elsewhere/car").resolve())
    Path("images/ship/back").symlink_to(Path("images").resolve())
    assert len(ddpm.find_dataset("images", train=True)) == 4 + 3 + 2

    scandir = os.scandir

    def locked(path):
        if str(path).endswith("ship"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert "images/ship" in error_of(f"train --data images {FAST}", capsys)


def test_data_is_a_folder_or_a_set():
    train, test = (ddpm.find_dataset("shapes", split) for split in (True, False))
    assert len(train) == len(test) == 10_000
    assert all(train[i][0] != test[i][0] for i in range(50))
    folder_of_shapes(2, "shapes")
    assert len(ddpm.find_dataset("shapes", train=True)) == 2


def idx(array):
    """An array as a file of MNIST."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def test_a_preset_attends_at_the_smallest_size_if_it_lacks_its_own(monkeypatch):
    monkeypatch.setattr(ddpm, "train", lambda *args: 0)
    folder_of_shapes(1)
    for size, attended in {32: [16], 96: [12]}.items():
        flags = f"--preset cifar10 --base-channels 32 --image-size {size} --device cpu"
        do(f"train --data images {flags} --out {size}")
        assert settings_of(f"{size}")["attention_resolutions"] == attended


def test_digits_and_clothes_are_grey_and_not_mirrored(monkeypatch, capsys):
    monkeypatch.setattr(ddpm, "train", lambda *args: 0)
    pictures = np.arange(20 * 28 * 28, dtype=np.uint8).reshape(20, 28, 28)
    labels = np.arange(20, dtype=np.uint8) % 10
    for folder in ("data/MNIST/raw", "data/FashionMNIST/raw"):  # where the download puts it
        Path(folder).mkdir(parents=True)
        for part in ("train", "t10k"):
            Path(folder, f"{part}-images-idx3-ubyte").write_bytes(idx(pictures))
            Path(folder, f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    expected = {"mnist": (1, False), "fashion-mnist": (1, False), "cifar10": (3, True)}
    folder_of_shapes(1, "cifar10")
    for i, (data, (channels, flip)) in enumerate(expected.items()):
        do(f"train --data {data} --device cpu --out run{i}")
        settings = settings_of(f"run{i}")
        assert settings["channels"] == channels
        assert settings["flip"] == flip
    for length in (0, 100):  # of a download that broke off
        file = Path("data/MNIST/raw/train-images-idx3-ubyte")
        file.write_bytes(file.read_bytes()[:length])
        assert str(Path("data", "MNIST")) in error_of(f"train --data mnist {CPU}", capsys)


def test_every_epoch_shows_each_picture_once_in_a_new_order():
    numbers = np.arange(10, dtype=np.uint8)
    seen = ddpm.batch_of(numbers, 0, 0, 20).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert ddpm.batch_of(numbers, 0, 8, 4).tolist() == seen[8:12]  # taken up in the middle
    assert ddpm.batch_of(numbers, 1, 0, 20).tolist() != seen


def test_some_pictures_are_whole():
    folder_of_shapes(9)
    for i in range(7):
        Path(f"images/{i}.png").write_text("broken")
    assert len(ddpm.some_pictures("images", ddpm.Config(image_size=16), 2, 0)) == 2


# Training


def test_a_tiny_network_learns_one_picture_and_draws_it():
    torch.manual_seed(1)
    picture = torch.rand(1, 1, 8, 8).round() * 1.6 - 0.8
    diffusion = ddpm.Diffusion(100)
    model = network(8, 1, (1, 2), (4,))
    ema = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for step in range(300):
        loss = diffusion.loss(model, picture.expand(8, -1, -1, -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ddpm.update_ema(ema, model, 0.98, step)
        losses.append(loss.item())
    assert losses[0] == approx(1, abs=0.1)
    assert np.mean(losses[-50:]) < 0.12
    x_T = randn(4, 1, 8, 8)
    for chain in (diffusion.sample(ema, x_T), diffusion.sample_ddim(ema, x_T, 20)):
        drawn = last(chain)
        assert (drawn - picture).abs().mean() < 0.1
        assert torch.equal(drawn > 0, (picture > 0).expand(4, 1, 8, 8))


def test_ema_is_the_weighted_sum_of_all_past_weights():
    model = nn.Linear(1, 1, bias=False)
    ema = nn.Linear(1, 1, bias=False)
    expected = ema.weight.item()
    for step in range(200):
        weight = math.sin(step)
        nn.init.constant_(model.weight, weight)
        ddpm.update_ema(ema, model, 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
        assert ema.weight.item() == approx(expected, abs=1e-5)


def test_half_of_the_pictures_are_mirrored():
    pictures = np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8), dtype=np.uint8)
    config = ddpm.Config(image_size=8, batch_size=400)
    [x_0] = ddpm.parts_of_batch(config, pictures, 0, "cpu")
    mirrored = ddpm.to_unit(tensor(pictures)).flip(3)
    same = (x_0 == mirrored).flatten(1).all(1)
    assert same.sum().item() == approx(200, abs=50)


def test_adams_rate_rises_is_constant_and_may_fall_to_0():
    folder_of_shapes(1)
    command = f"train --data images {FAST} --log-every 1 --lr 0.1 --warmup 4 --steps 16"
    rise = [0.025, 0.05, 0.075, 0.1] + 8 * [0.1]
    falls = {"0": [0.1, 0.1, 0.1, 0.1], "0.25": [0.1, 0.075, 0.05, 0.025]}
    for decay, fall in falls.items():
        do(f"{command} --lr-decay {decay} --out {decay}")
        rates = [float(row[2]) for row in log_rows(decay)]
        assert rates == approx(rise + fall, rel=1e-4)
    do(f"{command} --warmup 5000 --steps 8 --out short")  # at most a quarter of the run
    assert [float(row[2]) for row in log_rows("short")] == approx([0.05] + 7 * [0.1], rel=1e-4)
    do(f"{command} --steps 1 --adam-beta-2 0.95 --out one")
    moved = ckpt("one")["model"]["conv_out.weight"].abs()  # from 0, by Adam's rate, however steep
    assert moved.median().item() == approx(0.1, rel=1e-3)
    adam = list(ckpt("one")["optimizer"]["state"].values())[-1]  # (1 - beta_1) g, (1 - beta_2) g^2
    assert_close(adam["exp_avg_sq"], (1 - 0.95) * (adam["exp_avg"] / (1 - 0.9)) ** 2)


def test_every_step_draws_noise_of_its_own():
    folder_of_shapes(1)
    do(f"train --data images {FAST} --no-flip --log-every 1 --steps 4 --lr 0 --out still")
    losses = {row[1] for row in log_rows("still")}
    assert len(losses) == 4  # of one network and picture


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(amp):
    folder_of_shapes(7)
    command = f"train --data images {FAST} --amp {amp} --log-every 1 --dropout 0.1 --accumulate 2"
    do(f"{command} --out whole --steps 6")
    do(f"{command} --out halves --steps 4")
    with open("halves/log.csv", "a") as file:  # after the last checkpoint, cut short
        file.write("5,0.5")
    shutil.rmtree("images")  # they are in pictures.bin
    do("train --resume halves --steps 6 --device cpu")
    whole, halves = ckpt("whole"), ckpt("halves")
    assert whole["log"] == halves["log"]
    assert "".join(whole["log"]) == Path("halves/log.csv").read_text()
    for part in ("model", "ema"):
        assert_equal(whole[part], halves[part])
    assert_equal(whole["optimizer"]["state"], halves["optimizer"]["state"])
    assert whole["scaler"] == halves["scaler"]
    assert bool(whole["scaler"]) == (amp == "fp16")


def test_in_fp16_an_overflow_skips_a_step_and_the_run_learns():
    folder_of_shapes(1)
    command = f"train --data images {FAST} --amp fp16 --lr 0.01 --log-every 1"
    do(f"{command} --steps 3 --out run")
    checkpoint = ckpt("run")
    checkpoint["scaler"]["scale"] = 2.0**40
    torch.save(checkpoint, "run/ckpt.pt")
    before = ckpt("run")["model"]
    do("train --resume run --steps 4 --device cpu")
    assert_equal(ckpt("run")["model"], before)
    assert ckpt("run")["scaler"]["scale"] == 2.0**39
    assert not math.isfinite(float(log_rows("run")[-1][3]))  # the gradient, which is no error
    do("train --resume run --steps 60 --device cpu")
    losses = [float(row[1]) for row in log_rows("run")]
    assert np.mean(losses[-10:]) < 0.9 * losses[0]
    do("train --resume run --steps 61 --device cpu --amp off")  # another machine may have none
    do("train --resume run --steps 62 --device cpu --amp fp16")
    do("sample -n 1 --ckpt run --device cpu --amp fp16")


def test_automatic_precision_is_the_fastest_that_the_hardware_has(monkeypatch):
    def auto(kind, bf16, capability=(0, 0)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        can = {"amx_bf16": False, "avx512_bf16": bf16}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
        return ddpm.pick_precision(torch.device(kind), "auto")

    assert auto("cuda", True, (8, 0)) == torch.bfloat16
    assert auto("cuda", False, (7, 0)) == auto("cuda", False, (7, 5)) == torch.float16
    assert auto("cuda", False, (6, 1)) is None
    assert auto("cpu", True) == torch.bfloat16
    assert auto("cpu", False) is auto("mps", True) is None


def test_fine_tuning_starts_from_the_average_of_another_run(trained):
    folder_of_shapes(2, "others")
    do(f"train --init-from {trained} --data others {CPU} --lr 0 --steps 1")
    special = ckpt("runs/others")
    assert special["step"] == 1
    assert special["config"]["data"] == str(Path("others").resolve())
    assert_equal(special["model"], ckpt(trained)["ema"])  # a rate of 0 leaves them alone


def test_weights_are_not_used_for_what_they_did_not_learn(trained, capsys):
    changes = ("--timesteps 7", "--base-channels 64", "--image-size 16", "--channels 1")
    for change in (*changes, "--group-size 4"):
        for start in ("--resume", f"--init-from {trained} --data images"):
            error = error_of(f"train {start} {change} --steps 9 {CPU}", capsys)
            assert change.split()[0][2:].replace("-", "_") in error


def test_a_finished_run_says_how_it_can_go_on(trained, capsys):
    for flags in ("", "--steps 2"):
        error = error_of(f"train --resume {flags} {CPU}", capsys)
        assert "finished after 3 steps" in error
        assert "--steps" in error
    for flags in ("--data shapes", "--out other"):
        assert "--init-from" in error_of(f"train --resume --steps 9 {flags} {CPU}", capsys)
    os.truncate(trained / "pictures.bin", 100)  # as of a copy that broke off
    assert "pictures.bin" in error_of(f"train --resume --steps 9 {CPU}", capsys)


def test_a_new_run_never_takes_the_folder_of_another(trained, capsys):
    before = Path(trained, "ckpt.pt").read_bytes()
    Path("empty").mkdir()
    do(f"train --data images {FAST} --steps 1 --out empty")
    do(f"train --data ./images/ {FAST} --steps 2 --save-every 1")
    assert ckpt("runs/images-2")["step"] == 2
    assert "--out" in error_of(f"train --data images {FAST} --out {trained}", capsys)
    assert Path(trained, "ckpt.pt").read_bytes() == before
    settings = settings_of("runs/images-2")
    assert settings["save_every"] == 1
    assert settings["channel_mults"] == [1]


@pytest.mark.parametrize("error", [OSError("No space left"), RuntimeError("writing failed")])
def test_a_failed_write_is_one_line_and_the_old_file_stays(error, trained, monkeypatch, capsys):
    before = Path(trained, "ckpt.pt").read_bytes()

    def full_disk(checkpoint, path):
        Path(path).write_bytes(b"half a check")
        raise error

    monkeypatch.setattr(torch, "save", full_disk)
    assert str(error) in error_of(f"train --resume --steps 4 {CPU}", capsys)
    assert Path(trained, "ckpt.pt").read_bytes() == before
    assert [path.name for path in trained.glob("*ckpt*")] == ["ckpt.pt"]


def test_a_file_that_is_held_is_not_lost(monkeypatch):
    def held(source, target):
        raise PermissionError(13, "another program holds it", source, None, target)

    file = Path("picture.png")
    file.write_text("old")
    monkeypatch.setattr(os, "replace", held)
    with pytest.raises(OSError, match="picture.png") as caught:
        ddpm.write_file(file, lambda path: path.write_text("new"))
    kept = {path.read_text(): path.name for path in Path().glob("*picture*")}
    assert kept["old"] == "picture.png"
    assert kept["new"] in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_on_a_gpu_goes_on_and_is_sampled_without_one(amp):
    folder_of_shapes(5)
    device = f"--device cuda --amp {amp}"
    do(f"train --data images {FAST} {device} --steps 3")
    do(f"train --resume --steps 5 {device}")
    for weights in ckpt("runs/images")["ema"].values():
        assert weights.isfinite().all()
    do(f"sample -n 2 {CPU}")


# Samples and figures


def test_sample_writes_a_grid_single_pictures_and_an_animation(trained, capsys):
    do(f"sample -n 5 --gif --individual --seed 3 --batch-size 3 {CPU}")
    line = capsys.readouterr().out.splitlines()[-1]
    for text in ("5 pictures", "--seed 4", "samples/grid.png", "samples/chain.gif", "pictures"):
        assert text in line
    figure = tiles(trained / "samples/grid.png", 8)
    assert figure.shape == (2, 3, 8, 8, 3)
    *_, single = sorted(trained.glob("samples/pictures/*"))
    assert single.name == "000004.png"
    assert np.array_equal(Image.open(single), figure[1, 1])
    film = Image.open(trained / "samples/chain.gif")
    assert film.n_frames == 6  # noise, then T = 5 steps
    times = []
    for i in range(6):
        film.seek(i)
        times.append(film.info["duration"])
    assert times == [60] * 5 + [2000]  # milliseconds


def test_a_grid_shows_the_first_256_pictures(trained):
    do(f"sample -n 259 --individual --steps 1 --batch-size 100 --out many {CPU}")
    figure = tiles("many/grid.png", 8)
    assert figure.shape[:2] == (16, 16)
    pictures = sorted(Path("many/pictures").iterdir())
    assert len(pictures) == 259
    assert np.array_equal(Image.open(pictures[255]), figure[15, 15])


def test_an_animation_goes_evenly_from_noise_to_pictures():
    chain = ((t, torch.full((1, 3, 8, 8), t / 50 - 1.02), None) for t in range(100, 0, -1))
    frames = []
    assert len(list(ddpm.filmed(torch.ones(1, 3, 8, 8), chain, 100, frames))) == 100
    greys = [frame.convert("L").getpixel((5, 5)) for frame in frames]
    assert [greys[0], greys[-1]] == [255, 0]
    assert set((-np.diff(greys) / 2.55).round()) == {2}  # in steps


def test_a_folder_of_samples_is_always_new(trained, monkeypatch, capsys):
    command = f"sample -n 1 --steps 2 {CPU}"
    Path("mine").mkdir()
    for flags in ("", "--seed 1", "--out mine"):
        do(f"{command} {flags}")
    assert "mine is not empty" in error_of(f"{command} --seed 1 --out mine", capsys)
    folders = ["samples", "samples-2", "../../mine"]
    one, two, mine = (Path(trained, folder, "grid.png").read_bytes() for folder in folders)
    assert one == mine != two

    def stopped(chain):
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpm, "end_of", stopped)
    assert run(command) == 130
    assert not Path(trained, "samples-3").exists()  # there was nothing to keep

    def denied(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    assert "--out" in error_of(command, capsys)


def tiles(path, size):
    """The pictures of a figure, (rows, columns, size, size, 3), without the lines between them."""
    pixels = np.array(Image.open(path), int)[2:, 2:]
    rows, columns = (side // (size + 2) for side in pixels.shape[:2])
    pixels = pixels.reshape(rows, size + 2, columns, size + 2, 3)
    return pixels.swapaxes(1, 2)[:, :, :size, :size]


def test_forward_figure_goes_from_the_picture_to_noise():
    folder_of_shapes(1)
    do("show forward --data images -n 3")
    figure = tiles("forward.png", 64)
    assert figure.shape == (1, 11, 64, 64, 3)  # there is but one picture
    likeness = np.corrcoef(figure.reshape(11, -1))[0]
    assert 0.99 < likeness[1] < 1  # a little noise at t = 0
    assert abs(likeness[-1]) < 0.1  # only noise


def test_progressive_figure_ends_as_the_pictures_that_sample_draws(trained):
    do(f"show progressive -n 2 {CPU}")
    do(f"sample -n 2 --out new {CPU}")
    figure = tiles("progressive.png", 8)
    assert figure.shape == (4, 6, 8, 8, 3)  # t = 5..1 and x_0, two rows a picture
    samples = tiles("new/grid.png", 8)[0]
    assert np.array_equal(figure[::2, -1], samples)
    assert np.array_equal(figure[1::2, -2], samples)  # the last step is its predicted x_0


def test_pictures_are_mixed_where_the_reverse_process_takes_over(monkeypatch):
    seen = []

    def model(x_t, t):
        seen.append((t[0].item() + 1, x_t.clone()))
        return torch.zeros_like(x_t)

    folder_of_shapes(2)
    network = model, ddpm.Diffusion(80), ddpm.Config(data="images"), Path("ckpt.pt")
    monkeypatch.setattr(ddpm, "load_network", lambda args: network)
    do("show interpolate")
    figure = tiles("interpolate.png", 32)
    assert figure.shape == (1, 13, 32, 32, 3)
    pictures = ddpm.to_unit(tensor(figure[0, [0, -1]]).permute(0, 3, 1, 2))
    _, alpha_bars = paper_schedule(80)
    (start, row), sigma = seen[0], sqrt(1 - alpha_bars[40])
    assert start == 40
    a, b = row[[0, 10]] - sqrt(alpha_bars[40]) * pictures
    assert a.std().item() == approx(sigma, rel=0.05)
    assert (a - b).std().item() == approx(1.414 * sigma, rel=0.05)  # two noises
    assert_close(row[3], 0.7 * row[0] + 0.3 * row[10])


# Evaluation


def test_bits_per_dim_that_eval_prints_are_the_bounds(capsys):
    folder_of_shapes(20)
    do(f"train --data images {FAST} --timesteps 25 --steps 60 --ema-decay 0.9 --out run")
    do(f"eval --ckpt run -n 20 --batch-size 7 {CPU}")
    out = capsys.readouterr().out
    model, diffusion, config = ddpm.load("run")
    x_0 = ddpm.to_unit(ddpm.some_pictures("images", config, 20, 0))
    randn_like = ddpm.seeded_randn_like(0, range(20), "cpu")
    terms = np.stack(list(diffusion.bits_per_dim(model, x_0, randn_like)))
    parts = {"total": terms, "rate": terms[1:], "distortion": terms[:1]}
    for name, part in parts.items():
        bits = part.sum(0)
        mean = re.search(rf"^{name} +(\S+) bits", out, re.M)[1]
        assert float(mean) == approx(bits.mean(), abs=1e-3)


def test_frechet_distance_of_gaussians_is_its_closed_form():
    cross = torch.cat([torch.eye(3), -torch.eye(3)])  # mean 0, covariance 2/5
    a = cross * tensor([1.0, 2.0, 3.0])
    b = cross * tensor([1.5, 1.0, 3.0]) + tensor([0.5, 0.0, -1.0])
    expected = 0.5**2 + 1 + 2 / 5 * (0.5**2 + 1)
    assert ddpm.frechet_distance(a, b) == approx(expected, rel=1e-4)
    assert ddpm.frechet_distance(b, a) == approx(expected, rel=1e-4)
    few = randn(20, 100)  # fewer pictures than features: singular
    assert ddpm.frechet_distance(few, few) == approx(0, abs=1e-3)


def test_inception_pools_as_tensorflow_did():
    net = ddpm.models.Inception3(1008, aux_logits=False, init_weights=False).eval()
    ddpm.pool_as_tensorflow(net)
    inputs = {}

    def note(name):
        return lambda layer, x: inputs.update({name: x[0]})

    blocks = ("Mixed_5c", "Mixed_6e", "Mixed_7b", "Mixed_7c")
    for name in blocks:
        block = getattr(net, name)
        block.register_forward_pre_hook(note(name))
        block.branch_pool.conv.register_forward_pre_hook(note(f"{name} pooled"))
    with torch.no_grad():
        net(randn(2, 3, 299, 299))
    for name in blocks:
        padded = nn.functional.pad(inputs[name], (1, 1, 1, 1), value=math.nan)
        windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
        expected = windows.nanmean(4)  # without the padding
        if name == "Mixed_7c":
            expected = windows.nan_to_num(-1e9).amax(4)
        assert_close(inputs[f"{name} pooled"], expected)


def test_fid_of_pictures_on_disk(monkeypatch, capsys):
    net = ddpm.models.Inception3(1008, aux_logits=False, init_weights=False)
    Path("checkpoints").mkdir()
    torch.save(net.state_dict(), Path("checkpoints", ddpm.INCEPTION.split("/")[-1]))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: ".")
    folder_of_shapes(4)
    for part, numbers in {"one": (0, 1), "two": (2, 3)}.items():
        Path(part).mkdir()
        for i in numbers:
            shutil.copy(f"images/{i}.png", part)
    do("eval --samples one two --data images --device cpu")
    fid = re.search(
        r"^FID (\S+) of 4 pictures against 4 of images .below 10,000", capsys.readouterr().out, re.M
    )
    assert float(fid[1]) == approx(0, abs=1e-2)  # a set with itself
    inception = ddpm.load_inception()
    grey = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    assert inception(grey).shape == (2, 2048)
    assert_close(inception(grey), inception(grey.expand(-1, 3, -1, -1)))


def test_eval_looks_for_all_it_needs_before_it_computes(monkeypatch, capsys):
    def no_network(*args, **options):
        raise OSError("<urlopen error no network>")

    monkeypatch.delattr(ddpm, "read_pictures")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    folder_of_shapes(1)
    folder_of_shapes(1, "small")
    Image.new("RGB", (4, 4)).save("small/other.png")
    mistakes = {
        "--samples images --data typo": ["typo"],
        "--samples images": ["--data"],
        "--samples typo --data images": ["typo"],
        "--samples images small --data images": ["0.png", "other.png", "(128, 128)", "(4, 4)"],
        "--samples images --data images": [ddpm.INCEPTION, torch.hub.get_dir()],
    }
    for flags, texts in mistakes.items():
        error = error_of(f"eval {flags} --device cpu", capsys)
        assert all(text in error for text in texts), error


# The command line


MISTAKES = [
    ("train", "--data ''"),
    ("show forward", "--data ''"),
    ("train --data nowhere", "--data 'nowhere': name a folder, or shapes, mnist"),
    ("train --data images --steps x", "--steps: invalid positive value: 'x'"),
    ("train --data images --steps -1", "--steps: -1 is below 1"),
    ("train --data images --dropout 2", "--dropout"),
    ("train --data images --timesteps 1", "--timesteps"),
    ("train --data images --batch-size 6 --accumulate 4", "--accumulate"),
    ("train --data images --base-channels 26", "--base-channels"),
    ("train --data images --image-size 28", "28 must be a multiple of 8"),
    ("train --data images --attention-resolutions 7", "among [32, 16, 8, 4]"),
    ("train --data images --out images/0.png/run", "images/0.png"),
    ("train --data images --out images", "images is not empty"),
    ("train --data images --amp bf8", "--amp"),
    ("train --resume", "no run below ./runs"),
    ("train --resume images", "no checkpoint at images"),
    ("train --resume --preset tiny", "not allowed with"),
    ("sample --ckpt nothing.pt", "no checkpoint at nothing.pt"),
    ("sample -n 0", "-n: 0 is below 1"),
    ("sample --batch-size 0", "--batch-size"),
    ("eval --batch 4", "--batch"),  # not short for --batch-size
    ("show waves", "invalid choice: 'waves'"),
    ("show forward --data images --out images", "end in .png"),
]


@pytest.mark.parametrize("command, message", MISTAKES)
def test_every_mistake_is_one_line_that_names_it(command, message, capsys):
    if "images" in command:
        folder_of_shapes(1)
    if command.startswith("train --data"):
        command += " --device cpu"
    assert message in error_of(command, capsys)
    assert not list(Path().glob("runs/*"))  # no folder of a run that never began


def test_help_is_for_a_newcomer(capsys):
    do("")
    assert "Draw new pictures with a trained network." in capsys.readouterr().out
    for command in ("train", "sample", "eval", "show"):
        with pytest.raises(SystemExit, match="0"):
            run(f"{command} --help")
        out = capsys.readouterr().out
        assert "`" not in out
        if command == "train":
            flags = ["--data", "--preset", "--resume", "--init-from", "--out"]
            assert re.findall(r"^  (--[a-z-]+)", out, re.M)[:5] == flags
            assert "on a CPU the preset is tiny" in " ".join(out.split())
            assert "[1 2 2 2]" in " ".join(out.split())


class Evil:
    """What a pickle can hold: a call that unpickling would make."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_checkpoints_that_are_none_are_one_line(trained, capsys):
    good = ckpt(trained)
    config = good["config"]
    torch.save(good | {"config": config | {"base_channels": 64}}, "weights.pt")
    torch.save(good | {"config": config | {"cache_gb": 4.0}}, "older.pt")
    torch.save({"config": config}, "bare.pt")
    torch.save({"weights": torch.ones(3)}, "other.pt")
    torch.save(Evil(), "evil.pt")
    Path("cut.pt").write_bytes(Path("other.pt").read_bytes()[:100])
    reasons = {
        "weights": "size mismatch",
        "older": "other settings: cache_gb",
        "evil": "holds code",
    }
    for name in ("weights", "older", "bare", "other", "evil", "cut"):
        error = error_of(f"sample --ckpt {name}.pt {CPU}", capsys)
        assert f"{name}.pt is not a checkpoint of this ddpm.py" in error
        assert reasons.get(name, "") in error
        error_of(f"train --init-from {name}.pt --data images {CPU}", capsys)
    assert not Path("executed").exists()
    Path("hub").mkdir()
    Path("hub/diffusion_pytorch_model.safetensors").touch()
    error = error_of(f"sample --ckpt hub {CPU}", capsys)
    assert "diffusion_pytorch_model.bin" in error
    assert "not .safetensors" in error


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory.\nTried to allocate 20 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory",
        "CUDA error: an illegal memory access was encountered",
    ],
)
def test_without_memory_the_flags_that_help_are_named(message, trained, monkeypatch, capsys):
    def full(*args):
        raise RuntimeError(message)

    monkeypatch.setattr(ddpm.Diffusion, "loss", full)
    if "illegal" in message:  # a fault of the program keeps its traceback
        with pytest.raises(RuntimeError, match="illegal"):
            run(f"train --resume --steps 4 {CPU}")
    else:
        assert "--accumulate" in error_of(f"train --resume --steps 4 {CPU}", capsys)


def test_output_may_go_to_a_notebook_or_nowhere(trained, monkeypatch):
    lines = []
    notebook = SimpleNamespace(write=lines.append, flush=list)  # without isatty and reconfigure
    for stream in (notebook, io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        do(f"sample -n 1 {CPU}")
    assert "1 pictures of seed 0" in "".join(lines)


# The program in processes of its own, as a user starts it


def program(command, *launcher):
    """Starts the program, by itself or by a launcher."""
    words = [sys.executable, *launcher, str(SCRIPT), *command.split()]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=ONE_THREAD)


def test_from_a_folder_of_pictures_to_new_ones():
    folder_of_shapes(10)
    running = program(f"train --data ./images {FAST} --steps 4 --save-every 2 --log-every 1")
    out, err = running.communicate(timeout=100)
    assert running.returncode == 0
    assert err == ""
    assert "\r" not in out  # not a terminal: plain lines
    for text in ("10 pictures", "step 4/4  loss", "images/s", "python ddpm.py sample"):
        assert text in out
    files = {path.name for path in Path("runs/images").iterdir()}
    grids = {"step-000002.png", "step-000004.png"}
    assert files == {"ckpt.pt", "config.json", "log.csv", "pictures.bin"} | grids
    assert Image.open("runs/images/step-000002.png").size == (22, 22)  # 2 by 2 pictures
    pictures = np.fromfile("runs/images/pictures.bin", np.uint8).reshape(10, 3, 8, 8)
    assert np.array_equal(pictures, read("images"))


@posix
def test_a_closed_standard_output_is_no_error(trained):
    command = f"{sys.executable} {SCRIPT} sample -n 1 --out new >&-"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=100, env=ONE_THREAD)
    assert done.returncode == 0
    assert done.stderr == b""
    assert Path("new/grid.png").exists()
    command = f"{sys.executable} {SCRIPT} sample -n 1 --out piped {CPU} | true"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=100, env=ONE_THREAD)
    assert done.stderr == b""
    assert Path("piped/grid.png").exists()


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_is_stopped_or_killed_can_go_on(name):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else a job's `&` has it ignored
    folder_of_shapes(3)
    running = program(f"train --data images {FAST} --log-every 1 --save-every 3 --steps 100000")
    deadline = time.monotonic() + 60
    log = Path("runs/images/log.csv")
    while not log.exists() or log.read_text().count("\n") < 9:
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(getattr(signal, name))
    out, err = running.communicate(timeout=60)
    assert "Traceback" not in err
    checkpoint = ckpt("runs/images")
    step = checkpoint["step"]
    if name != "SIGKILL":
        assert running.returncode == 128 + getattr(signal, name)
        assert "python ddpm.py train --resume runs/images" in out
        assert "".join(checkpoint["log"]) == log.read_text()  # the last step is saved
    do(f"train --resume --steps {step + 2} --device cpu")
    steps = [int(row[0]) for row in log_rows("runs/images")]
    assert steps == list(range(1, step + 3))


@pytest.mark.skipif(os.name == "nt", reason="torch lacks libuv on Windows")
def test_two_processes_train_as_one_does():
    folder_of_shapes(10)
    command = f"train --data images {FAST} --log-every 1 --steps 3"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    running = program(f"{command} --out two", *launcher)
    out, err = running.communicate(timeout=100)
    assert running.returncode == 0, err
    assert out.count("step 3/3") == 1  # the first alone prints
    do(f"{command} --out one --accumulate 2")
    one, two = ckpt("one"), ckpt("two")
    for name, weights in one["ema"].items():
        assert_close(two["ema"][name], weights, atol=1e-5, rtol=0)
    for a, b in zip(log_rows("one"), log_rows("two")):
        assert float(a[1]) == approx(float(b[1]), abs=2e-6)
    do(f"train --resume two --steps 4 {CPU}")  # one goes on alone


@pytest.mark.parametrize("command", ["sample", "eval", "show progressive"])
def test_torchrun_is_for_training(command, monkeypatch, capsys):
    monkeypatch.setattr(ddpm, "WORLD", 2)  # or left over in the environment
    assert "torchrun is for train" in error_of(command, capsys)


def test_training_works_in_a_thread_as_of_a_web_page(trained):
    thread = threading.Thread(target=run, args=[f"train --resume --steps 4 {CPU}"])
    thread.start()
    thread.join()
    assert ckpt(trained)["step"] == 4


def test_commands_that_are_printed_can_be_copied(capsys):
    folder_of_shapes(1, "my pictures")
    assert ddpm.main(["train", "--data", "my pictures", *FAST.split(), "--steps", "1"]) == 0
    *_, command = capsys.readouterr().out.rstrip().partition("ddpm.py ")
    assert ddpm.main([*shlex.split(command), *CPU.split()]) == 0
    assert Path("runs/my pictures/samples/grid.png").exists()


def test_in_a_terminal_lines_replace_each_other_and_errors_begin_one(trained):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    parent, child = os.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 30, 0, 0))  # 30 columns
    words = f"train --resume --steps 9000 --lr 1e38 --log-every 500 {CPU}".split()
    words = [sys.executable, SCRIPT, *words]
    running = subprocess.Popen(words, stdout=child, stderr=child, env=ONE_THREAD)
    os.close(child)
    out = b""
    with contextlib.suppress(OSError):  # at the end, on Linux
        while part := os.read(parent, 1000):
            out += part
    assert running.wait() == 2
    *lines, last_line = re.split(r"\r\x1b\[K|\r\n", out.decode().rstrip())
    shown = [line for line in lines if line.startswith("step")]
    assert shown
    assert max(map(len, shown)) == 29
    assert last_line.startswith("error: loss not finite")
