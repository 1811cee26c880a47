"""Tests of ddpm.py: each name is a sentence about diffusion, or about what a user sees. Run: python -m pytest

Expectations are built another way than the code builds them: closed forms, numerical integration, brute force.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ddpm

SCRIPT = Path(ddpm.__file__).resolve()
# A network and a process so small that a command of the program takes a second.
FAST = ["--image-size", "8", "--base-channels", "32", "--channel-mults", "1", "--num-res-blocks", "1",
        "--attention-resolutions", "--timesteps", "50", "--batch-size", "4", "--warmup", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def seeded_and_in_a_folder_of_its_own(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


def paper_schedule(T=1000):
    """betas and alpha_bars in float64, from Sec. 4's words alone."""
    betas = np.array([1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)]) * 1000 / T
    return betas, np.array([math.prod(1 - betas[: i + 1]) for i in range(T)])


def folder_of_shapes(count, folder="images"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        ddpm.Shapes()[i][0].save(Path(folder, f"{i}.png"))
    return folder


def run(*args):
    """The command line in this process: its exit status."""
    return ddpm.main([str(arg) for arg in args])


def ckpt(folder):
    return torch.load(Path(folder, "ckpt.pt"), weights_only=True)


def same(a, b):
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# The schedule and the forward process


@pytest.mark.parametrize("T", [1000, 4000, 250])
def test_schedule_is_linear_and_ends_as_nothing_but_noise(T):
    betas, alpha_bars = paper_schedule(T)
    assert ddpm.linear_beta_schedule(T).dtype == torch.float64
    np.testing.assert_allclose(ddpm.linear_beta_schedule(T), betas, rtol=1e-12)
    np.testing.assert_allclose(ddpm.Diffusion(T).alpha_bars, alpha_bars, rtol=1e-6)
    assert 3e-5 < alpha_bars[-1] < 5e-5  # the paper's alpha_bar_T, which T must hardly move


@pytest.mark.parametrize("T", [0, 1, 20, -5])
def test_schedule_that_leaves_0_to_1_is_refused_by_name(T):
    with pytest.raises(ddpm.UserError, match=f"T = {T} "):
        ddpm.linear_beta_schedule(T)


def test_tables_are_float32_of_float64():
    _, alpha_bars = paper_schedule()
    diffusion = ddpm.Diffusion()
    assert all(table.dtype == torch.float32 for table in diffusion.buffers())
    # computed in float32, 1 - alpha_bar of the first step would be off by 1e-4 of itself
    np.testing.assert_allclose(diffusion.sqrt_one_minus_alpha_bars, np.sqrt(1 - alpha_bars), rtol=1e-6)


def test_one_jump_equals_step_by_step_noising():
    """Eq. 4 against Eq. 2 taken t times, in mean and variance."""
    diffusion = ddpm.Diffusion()
    betas, _ = paper_schedule()
    mean, variance = 1.0, 0.0
    for t in range(1000):
        mean, variance = math.sqrt(1 - betas[t]) * mean, (1 - betas[t]) * variance + betas[t]
        if t in (0, 1, 10, 500, 999):
            ones, zeros, step = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([t])
            assert diffusion.q_sample(ones, step, zeros).item() == pytest.approx(mean, rel=1e-6)
            assert diffusion.q_sample(zeros, step, ones).item() == pytest.approx(math.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize("t", [1, 2, 50, 500, 999])
def test_posterior_is_bayes_rule(t):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): integrated on a fine grid."""
    betas, alpha_bars = paper_schedule()
    x_0, x_t = 0.3, -0.2
    step = torch.tensor([t])
    mean, variance, log_variance = ddpm.Diffusion().q_posterior(
        torch.full((1, 1, 1, 1), x_0), torch.full((1, 1, 1, 1), x_t), step
    )
    x = np.linspace(-8, 8, 1_600_001)
    log_density = (-((x_t - math.sqrt(1 - betas[t]) * x) ** 2) / (2 * betas[t])
                   - (x - math.sqrt(alpha_bars[t - 1]) * x_0) ** 2 / (2 * (1 - alpha_bars[t - 1])))
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    expected_mean = (density * x).sum()
    expected_variance = (density * (x - expected_mean) ** 2).sum()
    assert mean.item() == pytest.approx(expected_mean, abs=1e-5)
    assert variance.item() == pytest.approx(expected_variance, rel=1e-4)
    assert log_variance.item() == pytest.approx(math.log(expected_variance), abs=1e-4)


def test_first_posterior_is_x_0_itself():
    x_0, x_t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    mean, variance, log_variance = ddpm.Diffusion().q_posterior(x_0, x_t, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(mean, x_0)
    assert variance.max() == 0 and torch.isfinite(log_variance).all()


# Algorithm 1


def test_eps_and_x_0_give_back_each_other():
    diffusion, t = ddpm.Diffusion(), torch.tensor([0, 10, 500, 999])
    x_0, eps = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    recovered = diffusion.predict_x0(diffusion.q_sample(x_0, t, eps), t, eps)
    torch.testing.assert_close(recovered, x_0, atol=2e-4, rtol=0)


def test_loss_is_zero_for_whoever_knows_the_noise_and_one_for_whoever_says_nothing():
    diffusion = ddpm.Diffusion()
    black = torch.zeros(64, 3, 8, 8)  # with x_0 = 0 the noise can be read off x_t
    knows = diffusion.loss(lambda x_t, t: x_t / ddpm.at(diffusion.sqrt_one_minus_alpha_bars, t), black)
    says_nothing = diffusion.loss(lambda x_t, t: torch.zeros_like(x_t), black)
    assert knows.item() < 1e-10
    assert says_nothing.item() == pytest.approx(1, abs=0.03)


def test_loss_draws_every_step_equally_often():
    drawn = []
    diffusion = ddpm.Diffusion(50)
    for _ in range(20):
        diffusion.loss(lambda x_t, t: drawn.append(t) or x_t, torch.zeros(1000, 1, 1, 1))
    counts = torch.cat(drawn).bincount(minlength=50)
    assert len(counts) == 50  # no step beyond the last
    assert counts.min() > 300 and counts.max() < 500  # 400 each, the first and the last step too


# Algorithm 2 and DDIM


class GaussianData:
    """The best possible eps for pictures whose pixels are N(mean, std^2): E[eps | x_t], in closed form."""

    def __init__(self, diffusion, mean=0.3, std=0.1):
        self.alpha_bars, self.mean, self.std = diffusion.alpha_bars.double(), mean, std

    def __call__(self, x_t, t):
        alpha_bar = self.alpha_bars[t].view(-1, 1, 1, 1)
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        return ((1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * self.mean) / variance).to(x_t.dtype)


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_algorithm_2_with_the_optimal_network_gives_back_the_data(variance):
    diffusion = ddpm.Diffusion(variance=variance)
    x_0 = diffusion.sample(GaussianData(diffusion), (16, 1, 32, 32))
    assert x_0.mean().item() == pytest.approx(0.3, abs=0.005)
    assert x_0.std().item() == pytest.approx(0.1, rel=0.04)


@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_ddim_without_noise_contracts_noise_to_the_data_as_its_closed_form(steps):
    """For Gaussian data each step is linear in the distance from the mean, so that their factors multiply."""
    diffusion = ddpm.Diffusion()
    x_0 = diffusion.sample(GaussianData(diffusion), (16, 1, 32, 32), steps=steps, eta=0.0)
    _, alpha_bars = paper_schedule()
    levels = [alpha_bars[round(t)] for t in np.linspace(999, 0, steps)] + [1.0]
    std = 1.0
    for a, b in zip(levels[:-1], levels[1:]):
        std *= (math.sqrt(a * b) * 0.1**2 + math.sqrt((1 - a) * (1 - b))) / (a * 0.1**2 + 1 - a)
    assert x_0.mean().item() == pytest.approx(0.3, abs=0.005)
    assert x_0.std().item() == pytest.approx(std, rel=0.03)


def test_ddim_at_all_steps_with_eta_1_is_algorithm_2_with_the_posterior_variance():
    diffusion = ddpm.Diffusion(variance="fixedsmall").double()
    model = GaussianData(diffusion)
    algorithm_2 = diffusion.sample(model, (2, 3, 8, 8), seed=3)
    ddim = diffusion.sample(model, (2, 3, 8, 8), steps=1000, eta=1.0, seed=3)
    torch.testing.assert_close(ddim, algorithm_2, atol=1e-4, rtol=0)
    assert algorithm_2.std() > 0.05  # pictures, not a constant


def test_reverse_mean_is_equation_11_when_nothing_is_clipped():
    betas, alpha_bars = paper_schedule()
    diffusion, t = ddpm.Diffusion(), torch.tensor([0, 1, 300, 999])
    eps = torch.randn(4, 3, 8, 8)
    x_t = diffusion.q_sample(torch.rand(4, 3, 8, 8) - 0.5, t, eps)
    mean, variance, _, x_0 = diffusion.p_mean_variance(lambda x, t: eps, x_t, t)
    for i, step in enumerate(t.tolist()):
        expected = (x_t[i] - betas[step] / math.sqrt(1 - alpha_bars[step]) * eps[i]) / math.sqrt(1 - betas[step])
        torch.testing.assert_close(mean[i], expected, atol=1e-4, rtol=0)
    assert variance[3].item() == pytest.approx(betas[999], rel=1e-5)
    assert x_0.abs().max() <= 0.51


def test_predicted_x_0_is_kept_where_pictures_are():
    diffusion, t = ddpm.Diffusion(), torch.tensor([999])
    mean, _, _, x_0 = diffusion.p_mean_variance(lambda x, t: torch.zeros_like(x), torch.full((1, 1, 2, 2), 3.0), t)
    assert x_0.max() == 1
    expected, _, _ = diffusion.q_posterior(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0), t)
    torch.testing.assert_close(mean, expected)


def test_reverse_variance_is_the_one_asked_for_and_beta_tilde_2_at_the_first_step():
    betas, alpha_bars = paper_schedule()
    beta_tilde = (1 - alpha_bars[:-1]) / (1 - alpha_bars[1:]) * betas[1:]  # of the paper's steps 2..T
    for name, later in (("fixedlarge", betas[1:]), ("fixedsmall", beta_tilde)):
        t = torch.arange(1000)
        x = torch.zeros(1000, 1, 1, 1)
        _, variance, log_variance, _ = ddpm.Diffusion(variance=name).p_mean_variance(lambda x, t: x, x, t)
        expected = np.concatenate([beta_tilde[:1], later])
        np.testing.assert_allclose(variance.flatten(), expected, rtol=1e-5)
        np.testing.assert_allclose(log_variance.flatten(), np.log(expected), atol=1e-5)


def test_the_last_step_adds_no_noise_and_the_others_do():
    diffusion, x_t = ddpm.Diffusion(), torch.randn(2, 1, 4, 4)
    zero, one = torch.tensor([0, 0]), torch.tensor([1, 1])
    assert torch.equal(diffusion.p_sample(lambda x, t: x, x_t, zero), diffusion.p_sample(lambda x, t: x, x_t, zero))
    assert not torch.equal(diffusion.p_sample(lambda x, t: x, x_t, one), diffusion.p_sample(lambda x, t: x, x_t, one))


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_bits_per_dim_of_a_gaussian_model_agree_with_numerical_integration(variance):
    T, mean, deviation, x_0 = 60, 0.1, 0.3, 51 / 127.5 - 1
    diffusion = ddpm.Diffusion(T, variance=variance)
    pictures = torch.full((2, 3, 128, 128), x_0)
    terms, mse = diffusion.bits_per_dim(GaussianData(diffusion, mean, deviation), pictures)
    assert terms.shape == (2, T + 1) and mse.shape == (2, T)

    betas, alpha_bars = paper_schedule(T)
    previous = np.append(1, alpha_bars[:-1])
    tilde = betas * (1 - previous) / (1 - alpha_bars)
    model_variance = (betas if variance == "fixedlarge" else tilde).copy()
    model_variance[0] = tilde[1]
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)  # E[f(z)] over z ~ N(0, 1)
    weights = weights / weights.sum()
    expected, errors = [], []
    for t in range(T):
        a, b = alpha_bars[t], 1 - alpha_bars[t]
        x_t = math.sqrt(a) * x_0 + math.sqrt(b) * nodes
        guess = np.clip((x_t - b * (x_t - math.sqrt(a) * mean) / (a * deviation**2 + b)) / math.sqrt(a), -1, 1)
        from_x_0 = math.sqrt(previous[t]) * betas[t] / b
        from_x_t = math.sqrt(1 - betas[t]) * (1 - previous[t]) / b
        centre, deviation_t = from_x_0 * guess + from_x_t * x_t, math.sqrt(model_variance[t])
        errors.append((weights * (guess - x_0) ** 2).sum())
        if t:  # KL(N(m, tilde) || N(centre, model variance)) by integrating q log(q / p) over a fine grid
            m = from_x_0 * x_0 + from_x_t * x_t
            z = np.linspace(-9, 9, 4001)[:, None]
            x = m + z * math.sqrt(tilde[t])
            log_q = -0.5 * z**2 - math.log(math.sqrt(tilde[t]))
            log_p = -0.5 * ((x - centre) / deviation_t) ** 2 - math.log(deviation_t)
            kl = (np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * (log_q - log_p)).sum(0) * (z[1] - z[0])
            expected.append((weights * kl).sum())
        else:  # the mass of one grey level
            cdf = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))
            mass = cdf((x_0 + 1 / 255 - centre) / deviation_t) - cdf((x_0 - 1 / 255 - centre) / deviation_t)
            expected.append((weights * -np.log(mass.clip(1e-12))).sum())
    a, b = alpha_bars[-1], 1 - alpha_bars[-1]
    expected.append(0.5 * (-math.log(b) - 1 + b + a * x_0**2))
    expected = np.array(expected) / math.log(2)
    np.testing.assert_allclose(terms.mean(0), expected, rtol=0.05, atol=2e-6)
    np.testing.assert_allclose(terms.sum(1).mean(), expected.sum(), rtol=0.005)
    np.testing.assert_allclose(mse.mean(0), errors, rtol=0.05)


def test_whoever_knows_the_noise_pays_for_the_variance_alone():
    x_0 = torch.rand(2, 3, 8, 8) * 1.8 - 0.9
    for variance in ("fixedsmall", "fixedlarge"):
        diffusion = ddpm.Diffusion(variance=variance)

        def knows(x_t, t):
            a = diffusion.alpha_bars.double()[t].view(-1, 1, 1, 1)
            return ((x_t - a.sqrt() * x_0) / (1 - a).sqrt()).float()

        terms, mse = diffusion.bits_per_dim(knows, x_0)
        betas, alpha_bars = paper_schedule()
        ratio = (1 - alpha_bars[:-1]) / (1 - alpha_bars[1:]) if variance == "fixedlarge" else np.ones(999)  # beta~ / beta
        kl = 0.5 * (ratio - 1 - np.log(ratio)) / math.log(2)  # of two Gaussians with one mean
        np.testing.assert_allclose(terms[:, 1:-1], np.tile(kl, (2, 1)), atol=2e-4)
        assert mse.max() < 1e-3  # rounding, magnified where x_t is almost only noise


def test_a_wide_discretised_gaussian_is_the_density_times_the_bin():
    x_0, mean, scale = torch.linspace(-0.95, 0.95, 9), torch.tensor(0.2), 0.5
    density = -0.5 * ((x_0 - mean) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))
    found = ddpm.discretised_log_likelihood(x_0, mean, torch.tensor(scale))
    torch.testing.assert_close(found, density + math.log(2 / 255), atol=0.03, rtol=0)  # the tanh is that good
    levels = torch.arange(256) / 127.5 - 1
    for centre in (-1.0, 0.3, 1.0):
        mass = ddpm.discretised_log_likelihood(levels, torch.tensor(centre), torch.tensor(0.05)).exp()
        assert abs(mass.sum() - 1) < 1e-5  # all grey levels together are everything
    far = ddpm.discretised_log_likelihood(torch.tensor(0.5), torch.tensor(-0.5), torch.tensor(0.007))
    assert far.item() == pytest.approx(math.log(1e-12))


@pytest.mark.parametrize("steps, expected", [(None, list(range(999, -1, -1))), (1, [999]), (2, [999, 0])])
def test_sampling_visits_the_steps_it_should(steps, expected):
    visited = []
    ddpm.Diffusion().sample(lambda x, t: visited.append(t.tolist()) or x, (2, 1, 2, 2), steps=steps)
    assert visited == [[t, t] for t in expected]


def test_picture_i_of_a_seed_does_not_depend_on_its_batch():
    diffusion = ddpm.Diffusion(50)
    model = GaussianData(diffusion)
    together = diffusion.sample(model, (5, 3, 8, 8), seed=7)
    torch.testing.assert_close(diffusion.sample(model, (2, 3, 8, 8), seed=7, first=3), together[3:])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(diffusion.sample(model, (5, 3, 8, 8), seed=8), together)


@pytest.mark.parametrize("steps", [0, 1001, -3])
def test_impossible_numbers_of_sampling_steps_are_refused(steps):
    with pytest.raises(ddpm.UserError, match=f"{steps} sampling steps"):
        ddpm.Diffusion().sample(lambda x, t: x, (1, 1, 2, 2), steps=steps)


# The network


def test_networks_have_exactly_the_papers_parameters():
    with torch.device("meta"):
        cifar10 = ddpm.UNet()
        celebahq256 = ddpm.UNet(image_size=256, channel_mults=(1, 1, 2, 2, 4, 4), dropout=0.0)
    assert sum(p.numel() for p in cifar10.parameters()) == 35_746_307
    assert sum(p.numel() for p in celebahq256.parameters()) == 113_673_219


@pytest.mark.parametrize("preset", ddpm.PRESETS)
def test_every_preset_builds_and_needs_no_size_changed(preset):
    with torch.device("meta"):
        model, diffusion = ddpm.build(ddpm.PRESETS[preset])
    size = ddpm.PRESETS[preset].image_size
    out = model(torch.empty(2, 3, size, size, device="meta"), torch.zeros(2, dtype=torch.long, device="meta"))
    assert out.shape == (2, 3, size, size) and diffusion.timesteps == 1000


@pytest.mark.parametrize("size, channels, mults, attention", [
    (32, 3, (1, 2, 2, 2), (16,)), (8, 1, (1,), ()), (12, 1, (1, 2), (12, 6)), (64, 3, (1, 1, 2), (16,)), (1, 3, (1,), (1,)),
])
def test_network_answers_in_the_shape_of_its_question(size, channels, mults, attention):
    model = ddpm.UNet(size, channels, 32, mults, 1, attention)
    x_t = torch.randn(2, channels, size, size)
    assert model(x_t, torch.tensor([0, 999])).shape == x_t.shape


def test_untrained_network_predicts_no_noise_and_learns_in_all_its_parts():
    model = ddpm.UNet(16, 3, 32, (1, 2), 1, (8,), 0.0)
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    assert model(x_t, t).abs().max() == 0  # the last convolution starts at zero
    for name, weights in model.named_parameters():
        if name.endswith(("conv2.weight", "to_out.weight", "conv_out.weight")):
            assert weights.abs().max() == 0
            nn.init.normal_(weights, std=0.1)
        elif weights.dim() > 1:  # Xavier uniform: variance 2 / (fan_in + fan_out)
            fan_in, fan_out = weights[0].numel(), weights.numel() // weights.shape[1]
            assert weights.var().item() == pytest.approx(2 / (fan_in + fan_out), rel=0.2)
    model(x_t, t).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    # every weight matters but the key's bias, which shifts all logits of a query alike, and softmax ignores
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.grad.abs().max() < 1e-9} <= {"to_k"}


def test_network_is_told_the_time_and_each_picture_its_own():
    model = ddpm.UNet(8, 1, 32, (1,), 1, (), 0.0)
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.1)
    x = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    early_late = model(x, torch.tensor([3, 700]))
    assert not torch.allclose(early_late[0], early_late[1], atol=1e-3)
    torch.testing.assert_close(model(x, torch.tensor([700, 3])), early_late.flip(0))


def test_embedding_is_sines_then_cosines_from_1_to_one_ten_thousandth():
    embedding = ddpm.sinusoidal_embedding(torch.tensor([0, 1, 999]), 128)
    for row, t in zip(embedding, (0, 1, 999)):
        angles = [t * 10000 ** (-i / 63) for i in range(64)]
        np.testing.assert_allclose(row, [math.sin(a) for a in angles] + [math.cos(a) for a in angles], atol=2e-4)


def test_attention_is_softmax_over_all_positions():
    attention = ddpm.Attention(32)
    x = torch.randn(2, 32, 3, 3)
    h = nn.functional.group_norm(x, 8, attention.group_norm.weight, attention.group_norm.bias, eps=1e-6)
    expected = torch.empty_like(x)
    for b in range(2):
        rows = h[b].flatten(1).T  # (positions, channels)
        q, k, v = attention.to_q(rows), attention.to_k(rows), attention.to_v(rows)
        weights = torch.softmax(q @ k.T / math.sqrt(32), dim=1)
        expected[b] = x[b] + attention.to_out(weights @ v).T.view(32, 3, 3)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


def test_halving_looks_one_pixel_past_the_right_and_the_bottom_only():
    model = ddpm.UNet(4, 1, 32, (1, 1), 1, (), 0.0)
    halving, seen = model.down[1], []  # after the one block of the first level
    nn.init.ones_(halving[1].weight)
    halving.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.conv_in.weight.data.zero_()  # all ones reach the downsampling: its blocks start as nothing
    model.conv_in.bias.data.fill_(1)
    model(torch.zeros(1, 1, 4, 4), torch.tensor([0]))
    # a 3x3 window sees nine ones in the corner at the top left, and zeros past the other edges
    assert (seen[0][0, 0] / 32).tolist() == [[9, 6], [6, 4]]


@pytest.mark.parametrize("kwargs, message", [
    ({"image_size": 0}, "0 can't be halved"),
    ({"base_channels": 0}, "0 base channels"),
    ({"image_size": 30}, "30 can't be halved 3 times: use a multiple of 8"),
    ({"base_channels": 48}, "48 base channels.*multiple of 32"),
    ({"attention_resolutions": (7,)}, r"--attention-resolutions \(7,\).*\[32, 16, 8, 4\]"),
])
def test_networks_that_cannot_be_are_refused_with_what_would_fit(kwargs, message):
    with pytest.raises(ddpm.UserError, match=message):
        ddpm.UNet(**kwargs)


def published(folder, **changes):
    """A folder of published weights, as diffusers lays them out, of a small random network: that network."""
    torch.manual_seed(3)
    model = ddpm.UNet(8, 3, 128, (1, 2), 1, (4,), 0.0)
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.02)
    layers = {"down.0": "down_blocks.0.resnets.0", "down.1.1": "down_blocks.0.downsamplers.0.conv",
              "down.2": "down_blocks.1.resnets.0", "down.2.attention": "down_blocks.1.attentions.0",
              "middle1": "mid_block.resnets.0", "middle1.attention": "mid_block.attentions.0",
              "middle2": "mid_block.resnets.1", "up.0": "up_blocks.0.resnets.0", "up.1": "up_blocks.0.resnets.1",
              "up.0.attention": "up_blocks.0.attentions.0", "up.1.attention": "up_blocks.0.attentions.1",
              "up.2.1": "up_blocks.0.upsamplers.0.conv", "up.3": "up_blocks.1.resnets.0",
              "up.4": "up_blocks.1.resnets.1", "time1": "time_embedding.linear_1", "time2": "time_embedding.linear_2"}
    renamed = {}
    for name, weights in model.state_dict().items():
        ours = max((prefix for prefix in layers if name.startswith(prefix + ".")), key=len, default=None)
        theirs = layers[ours] + name[len(ours):] if ours else name
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "proj_attn"}.items():
            theirs = theirs.replace(new, old)  # as in the authors' own files
        renamed[theirs] = weights
    config = {"act_fn": "silu", "attention_head_dim": None, "block_out_channels": [128, 256],
              "center_input_sample": False, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
              "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3,
              "layers_per_block": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-6, "norm_num_groups": 32,
              "out_channels": 3, "sample_size": 8, "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]} | changes
    Path(folder).mkdir()
    Path(folder, "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "left out"}))
    torch.save(renamed, Path(folder, "diffusion_pytorch_model.bin"))
    return model


def test_published_weights_are_the_same_network_here(capsys):
    model, x_t, t = published("weights").eval(), torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    assert torch.equal(ddpm.UNet.from_pretrained("weights")(x_t, t), model(x_t, t))
    assert run("sample", "--ckpt", "weights", "-n", 1, "--steps", 2, "--device", "cpu", "--out", "new.png") == 0
    assert Image.open("new.png").size == (8, 8)
    tuned = ["train", "--init-from", "weights", "--data", folder_of_shapes(2), "--device", "cpu", "--batch-size", 2]
    assert run(*tuned, "--steps", 1, "--lr", 0, "--out", "tuned") == 0
    assert same(ckpt("tuned")["ema"], model.state_dict())


@pytest.mark.parametrize("field, value", [
    ("norm_eps", 1e-5), ("downsample_padding", 1), ("flip_sin_to_cos", True), ("attention_head_dim", 8),
    ("freq_shift", "left out"), ("block_out_channels", [64, 128]),
])
def test_published_weights_of_another_kind_of_network_are_refused_by_the_field(field, value, capsys):
    published("weights", **{field: value})
    assert run("sample", "--ckpt", "weights", "--device", "cpu") == 2
    assert field in capsys.readouterr().err


# Data


def test_pixels_go_to_minus_1_to_1_and_back_without_loss():
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = ddpm.to_unit(pixels)
    assert unit.dtype == torch.float32 and unit[0] == -1 and unit[255] == 1
    assert torch.equal(ddpm.to_uint8(unit), pixels)
    nudged = ddpm.to_uint8(unit + 0.49 / 127.5)  # a truncating cast would be right here and wrong below
    assert torch.equal(nudged, pixels) and torch.equal(ddpm.to_uint8(unit - 0.49 / 127.5), pixels)
    assert ddpm.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def colour(image, channels=3, size=8):
    """The one colour of a picture as the program reads it."""
    pixels = ddpm.read_picture(image, size, channels)
    assert pixels.shape == (channels, size, size) and pixels.dtype == np.uint8
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


def saved(image, name, **options):
    image.save(name, **options)
    return Image.open(name)


def test_pictures_of_every_mode_are_read_as_a_person_sees_them():
    size = (20, 20)
    assert colour(saved(Image.new("RGB", size, (10, 200, 30)), "rgb.png")) == [10, 200, 30]
    assert colour(saved(Image.new("RGBA", size, (0, 0, 0, 0)), "clear.png")) == [255, 255, 255]  # transparent: white
    half = colour(saved(Image.new("RGBA", size, (255, 0, 0, 128)), "half.png"))
    assert half[0] == 255 and abs(half[1] - 127) <= 1 and half[1] == half[2]
    assert colour(saved(Image.new("LA", size, (0, 0)), "la.png")) == [255, 255, 255]
    palette = Image.new("P", size, 0)
    palette.putpalette([9, 99, 199] * 256)
    assert colour(saved(palette, "palette.png")) == [9, 99, 199]
    assert colour(saved(palette, "clear-palette.png", transparency=0)) == [255, 255, 255]
    assert colour(saved(palette, "clear.gif", transparency=0)) == [255, 255, 255]
    assert colour(saved(Image.new("L", size, 77), "grey.png")) == [77, 77, 77]
    assert colour(saved(Image.new("1", size, 1), "bit.png")) == [255, 255, 255]
    deep = Image.fromarray(np.full(size, 0x8080, np.uint16))
    assert colour(saved(deep, "deep.png")) == [128, 128, 128]
    assert colour(saved(deep, "deep.tiff")) == [128, 128, 128]
    cmyk = colour(saved(Image.new("CMYK", size, (0, 255, 255, 0)), "cmyk.jpg", quality=100))
    assert cmyk[0] > 200 and max(cmyk[1:]) < 60  # no cyan, all magenta and yellow: red
    assert colour(saved(Image.new("RGB", size, (255, 255, 255)), "white.bmp"), channels=1) == [255]


def test_pictures_are_turned_as_the_camera_was_held():
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 16, 8))  # the top half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter: what is at the top goes to the right
    image.save("turned.jpg", exif=exif, quality=95)
    pixels = ddpm.read_picture("turned.jpg", 16, 1)[0]
    assert pixels[:, :7].min() > 200 and pixels[:, 9:].max() < 55


def test_long_pictures_are_cropped_not_squashed_and_small_ones_enlarged():
    image = Image.new("L", (300, 100), 255)
    image.paste(0, (100, 0, 200, 100))  # the middle square is black
    assert ddpm.read_picture(image, 20, 1)[0, :, 1:-1].max() == 0  # the outermost pixels blend with what is beyond
    assert ddpm.read_picture(Image.new("L", (1, 1), 7), 20, 1).tolist() == [[[7] * 20] * 20]
    assert ddpm.read_picture(Image.new("L", (20_000, 2), 7), 20, 1).tolist() == [[[7] * 20] * 20]


def test_resizing_does_not_alias():
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))  # one pixel wide, gone at a tenth of the size
    pixels = ddpm.read_picture(Image.fromarray(stripes), 24, 1)
    assert abs(pixels.astype(int) - 127).max() < 20


def test_broken_files_are_skipped_counted_and_named(capsys):
    folder_of_shapes(5)
    whole = Path("images/0.png").read_bytes()
    Path("images/sub").mkdir()
    Path("images/sub/cut.PNG").write_bytes(whole[: len(whole) // 2])
    Path("images/empty.jpg").write_bytes(b"")
    Path("images/words.png").write_text("not a picture")
    Path("images/notes.txt").write_text("not looked at")
    Path("images/._0.png").write_text("what another system left behind")
    assert run("train", "--data", "images", "--steps", 1, *FAST) == 0
    out = capsys.readouterr().out
    assert "(3 so far)" in out and "5 pictures" in out
    assert all(name in out for name in ("cut.PNG", "empty.jpg", "words.png"))
    assert "notes.txt" not in out


def test_reading_ends_its_line_once_when_many_files_are_broken(capsys):
    folder_of_shapes(300)
    for i in range(260):
        Path(f"images/0{i}.png").write_text("sorted before the others, more than are read at a time")
    assert len(ddpm.Pictures("images", 8, 3).read(workers=0)) == 300
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("reading pictures, batch 3/3")]


def test_an_image_folder_with_links_in_a_circle_is_read_once():
    folder_of_shapes(3)
    try:
        Path("images/again").symlink_to(Path("images").resolve(), target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let this user make links")
    assert len(ddpm.Pictures("images", 8, 3)) == 3


def test_one_class_of_a_folder_or_a_set(capsys):
    folder_of_shapes(3, "images/ship")
    folder_of_shapes(4, "images/train/car")
    assert len(ddpm.Pictures("images", 8, 3)) == 7
    assert len(ddpm.Pictures("images", 8, 3, only="car")) == 4
    circles = ddpm.Pictures("shapes", 8, 3, only="Circle")
    assert len(circles) == 3334 and circles[1].shape == (3, 8, 8)
    assert len(ddpm.Pictures("shapes", 8, 3, only="2")) == 3333
    with pytest.raises(ddpm.UserError, match="no class 'ship', it has: circle, square, triangle"):
        ddpm.Pictures("shapes", 8, 3, only="ship")
    with pytest.raises(ddpm.UserError, match="plane holds no images"):
        ddpm.Pictures("images", 8, 3, only="plane")


@pytest.mark.parametrize("name, folder, flip", [("mnist", "MNIST", False), ("fashion-mnist", "FashionMNIST", True)])
def test_a_downloaded_set_is_read_in_grey_and_digits_are_not_mirrored(name, folder, flip):
    raw = Path("data", folder, "raw")  # where the download puts it
    raw.mkdir(parents=True)
    pictures = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in pictures.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pictures.tobytes())
        labels = bytes(i % 10 for i in range(20))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (20).to_bytes(4, "big") + labels)
    assert np.array_equal(ddpm.Pictures(name, 28, 1)[3][0], pictures[3])
    assert len(ddpm.Pictures(name, 28, 1, only="7")) == 2
    assert run("train", "--data", name, "--steps", 1, *FAST) == 0
    config = ckpt(f"runs/{name}")["config"]
    assert config["channels"] == 1 and config["flip"] == flip


def test_every_epoch_shows_each_picture_once_in_a_new_order():
    numbers = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    config = ddpm.Config(batch_size=4)
    data = ddpm.training_batches(numbers, config, 0)
    seen = torch.cat([next(data).flatten() for _ in range(10)])  # four epochs
    for epoch in seen.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:20].tolist()
    later = ddpm.training_batches(numbers, config, 6)
    assert torch.equal(next(later).flatten(), seen[24:28])  # taken up in the middle


# Training


def test_a_tiny_network_learns_one_picture_and_draws_it():
    torch.manual_seed(1)
    picture = torch.rand(1, 1, 8, 8).round() * 1.6 - 0.8
    diffusion = ddpm.Diffusion(100)
    model = ddpm.UNet(8, 1, 32, (1, 2), 1, (4,), 0.0)
    ema = ddpm.EMA(model, 0.98)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for step in range(400):
        loss = diffusion.loss(model, picture.expand(32, -1, -1, -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model, step)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert np.mean(losses[-50:]) < 0.1 * losses[0]
    for drawn in (diffusion.sample(ema.model, (4, 1, 8, 8)), diffusion.sample(ema.model, (4, 1, 8, 8), steps=20)):
        assert (drawn - picture).abs().mean() < 0.1
        assert ((drawn > 0) == (picture > 0)).all()


def test_ema_is_the_weighted_sum_of_all_past_weights():
    model = nn.Linear(1, 1, bias=False)
    ema = ddpm.EMA(model, 0.9)
    expected = model.weight.item()
    for step in range(200):
        model.weight.data.fill_(math.sin(step))
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * math.sin(step)
    assert ema.model.weight.item() == pytest.approx(expected, abs=1e-5)
    assert ema.model.weight.dtype == torch.float32 and not ema.model.weight.requires_grad


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(amp):
    flags = ["--data", folder_of_shapes(7), *FAST, "--amp", amp, "--dropout", "0.1", "--accumulate", "2"]
    assert run("train", *flags, "--steps", 6, "--out", "whole") == 0
    assert run("train", *flags, "--steps", 4, "--out", "halves") == 0
    assert run("train", "--resume", "--steps", 6, "--out", "halves", "--device", "cpu") == 0
    whole, halves = ckpt("whole"), ckpt("halves")
    assert whole["step"] == halves["step"] == 6
    for part in ("model", "ema", "optimizer", "scaler"):
        assert same(whole[part], halves[part]), part
    assert not same(whole["model"], whole["ema"])


def test_the_log_of_a_resumed_run_holds_each_step_once():
    flags = ["--data", folder_of_shapes(3), *FAST, "--log-every", "1", "--out", "run"]
    assert run("train", *flags, "--steps", 3) == 0
    with open("run/log.csv", "a") as file:
        file.write("4,0.5,0.0002,0.1,99.0\n5,0.5")  # written after the last checkpoint, the last row cut short
    assert run("train", "--resume", "--out", "run", "--steps", 6) == 0
    header, *rows = Path("run/log.csv").read_text().splitlines()
    assert header == "step,loss,lr,grad_norm,images_per_s"
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert "99.0" not in rows[3]
    rates = [float(row.split(",")[2]) for row in rows]
    assert rates[0] == pytest.approx(rates[1] / 2) and rates[1] == rates[5]  # --warmup 2


def test_streaming_from_disk_trains_on_the_same_pictures_as_from_memory():
    flags = ["--data", folder_of_shapes(6), *FAST, "--steps", "3"]
    assert run("train", *flags, "--out", "memory") == 0
    assert run("train", *flags, "--out", "disk", "--cache-gb", "0") == 0
    assert same(ckpt("memory")["model"], ckpt("disk")["model"])


def test_streaming_is_done_by_workers_and_survives_broken_pictures(capsys):
    folder_of_shapes(1024)
    for i in range(0, 1024, 2):
        Path(f"images/{i}.png").write_text("broken")
    assert run("train", "--data", "images", *FAST, "--steps", "3", "--cache-gb", "0", "--workers", "2") == 0
    assert "skipped a broken picture (1 so far)" in capsys.readouterr().out


def test_fine_tuning_starts_from_the_ema_weights_of_another_run(capsys):
    flags = ["--data", folder_of_shapes(3), *FAST]
    assert run("train", *flags, "--steps", 5, "--out", "general") == 0
    tuned = ["train", "--init-from", "general/ckpt.pt", "--data", "shapes", "--class", "circle", "--device", "cpu"]
    assert run(*tuned, "--lr", 0, "--steps", 1, "--out", "tuned") == 0
    general, special = ckpt("general"), ckpt("tuned")
    assert special["step"] == 1 and special["config"]["only"] == "circle"
    assert same(special["model"], general["ema"])  # with a learning rate of 0 they stay what they began as
    assert run(*tuned, "--base-channels", 64, "--out", "other") == 2
    assert "--base-channels 64, but general/ckpt.pt has 32" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(capsys):
    flags = ["--data", folder_of_shapes(3), *FAST, "--out", "run", "--steps", 2]
    assert run("train", *flags) == 0
    before = Path("run/ckpt.pt").read_bytes()
    capsys.readouterr()
    assert run("train", "--resume", "--out", "run", "--steps", 50, "--lr", 1e30, "--ckpt-every", 5) == 2
    assert "not finite" in capsys.readouterr().err
    assert Path("run/ckpt.pt").read_bytes() == before


def test_spikes_of_the_gradient_are_counted_and_shown(capsys):
    flags = ["--data", folder_of_shapes(3), *FAST, "--steps", 3]
    assert run("train", *flags) == 0 and "spikes" not in capsys.readouterr().out
    assert run("train", *flags, "--grad-clip", 1e-6, "--out", "spiky") == 0  # each gradient is ten times as large
    assert "3 spikes of the gradient" in capsys.readouterr().out


def test_a_run_folder_with_a_checkpoint_is_never_overwritten(capsys):
    flags = ["--data", folder_of_shapes(3), *FAST, "--steps", 1]
    assert run("train", *flags) == 0
    before = Path("runs/images/ckpt.pt").read_bytes()
    assert run("train", *flags) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and "--out" in error
    assert Path("runs/images/ckpt.pt").read_bytes() == before


def test_a_failed_save_leaves_the_checkpoint_before_it(monkeypatch, capsys):
    flags = ["--data", folder_of_shapes(3), *FAST, "--out", "run"]
    assert run("train", *flags, "--steps", 1) == 0
    before = Path("run/ckpt.pt").read_bytes()

    def full_disk(checkpoint, path):
        Path(path).write_bytes(b"half a check")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        assert run("train", "--resume", "--out", "run", "--steps", 2) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(Path("run").glob("*.tmp"))
    assert Path("run/ckpt.pt").read_bytes() == before
    assert run("train", "--resume", "--out", "run", "--steps", 2) == 0


@pytest.mark.parametrize("change", [
    lambda optimizer: optimizer["state"][0].update(exp_avg=torch.zeros(1)),
    lambda optimizer: optimizer["state"][1].update(exp_avg=torch.zeros(1).expand(optimizer["state"][1]["exp_avg"].shape)),
    lambda optimizer: optimizer["state"][3].pop("exp_avg_sq"),
    lambda optimizer: optimizer["state"].pop(5),
    lambda optimizer: optimizer.clear(),
])
def test_a_checkpoint_with_the_moments_of_another_network_is_refused(change, capsys):
    assert run("train", "--data", folder_of_shapes(2), *FAST, "--steps", 2) == 0
    checkpoint = ckpt("runs/images")
    change(checkpoint["optimizer"])
    torch.save(checkpoint, "runs/images/ckpt.pt")
    assert run("train", "--resume", "--steps", 4, "--device", "cpu") == 2  # not a read past the end of the moments
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "ckpt.pt is damaged" in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_checkpoint_of_an_accelerator_goes_on_and_is_sampled_without_one(monkeypatch):
    """As torch.save leaves it there: each tensor is marked with the device that it was on."""
    assert run("train", "--data", folder_of_shapes(2), *FAST, "--steps", 2) == 0
    checkpoint = ckpt("runs/images")
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(checkpoint, "runs/images/ckpt.pt")
    with pytest.raises(RuntimeError, match="CUDA"):
        ckpt("runs/images")
    assert run("train", "--resume", "--steps", 4, "--device", "cpu") == 0 and ckpt("runs/images")["step"] == 4
    assert run("sample", "-n", 1, "--device", "cpu") == 0


def test_a_run_goes_on_in_another_precision():
    """As when it moves to an accelerator that has fp16 alone: what was saved then knows of no loss scale."""
    flags = ["--data", folder_of_shapes(2), *FAST, "--amp", "off"]
    assert run("train", *flags, "--steps", 2) == 0
    _, checkpoint, config = ddpm.load_checkpoint("runs/images/ckpt.pt")
    config, checkpoint["optimizer"]["state"] = dataclasses.replace(config, steps=4), {}  # each step so far overflowed
    torch.save(checkpoint, "runs/images/ckpt.pt")
    _, checkpoint, _ = ddpm.load_checkpoint("runs/images/ckpt.pt")
    for amp in (torch.float16, torch.bfloat16):
        assert ddpm.train(config, Path("runs/images"), torch.device("cpu"), amp, checkpoint) == 0
        _, checkpoint, config = ddpm.load_checkpoint("runs/images/ckpt.pt")
        assert checkpoint["step"] == config.steps and bool(checkpoint["scaler"]) == (amp == torch.float16)
        config = dataclasses.replace(config, steps=6)


def test_one_picture_smaller_than_the_network_is_enough():
    Path("images").mkdir()
    Image.new("RGB", (3, 5), "red").save("images/only.bmp")
    assert run("train", "--data", "images", *FAST, "--steps", 2) == 0


def test_training_draws_new_noise_at_every_step_and_averages_the_weights():
    flags = ["--data", folder_of_shapes(1), *FAST, "--no-flip", "--amp", "off", "--log-every", 1]
    assert run("train", *flags, "--steps", 5, "--lr", 0, "--out", "still") == 0
    rows = Path("still/log.csv").read_text().splitlines()[1:]
    assert len({row.split(",")[1] for row in rows}) == 5  # the same network and picture, another loss each time
    for steps in (1, 2):
        assert run("train", *flags, "--steps", steps, "--out", steps) == 0
    one, two = ckpt("1"), ckpt("2")
    for name, average in two["ema"].items():
        expected = 2 / 11 * one["ema"][name] + 9 / 11 * two["model"][name]  # decay (1 + step) / (10 + step), step = 1
        torch.testing.assert_close(average, expected)


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    flags = ["--data", folder_of_shapes(5), *FAST, "--steps", 2]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("train", *flags, "--out", name, "--seed", seed) == 0
    assert same(ckpt("a")["model"], ckpt("b")["model"])
    assert not same(ckpt("a")["model"], ckpt("c")["model"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_on_an_accelerator_goes_on_and_is_sampled_without_one(amp):
    flags = ["--data", folder_of_shapes(5), *FAST[:-2], "--device", "cuda", "--amp", amp, "--out", "run"]
    assert run("train", *flags, "--steps", 3) == 0
    assert run("train", "--resume", "--out", "run", "--steps", 5, "--device", "cuda", "--amp", amp) == 0
    assert all(torch.isfinite(weights).all() for weights in ckpt("run")["ema"].values())
    assert run("sample", "--ckpt", "run/ckpt.pt", "-n", 2, "--device", "cpu") == 0


# Sampling


def test_sample_writes_a_grid_single_pictures_and_a_film(capsys):
    assert run("train", "--data", folder_of_shapes(3), *FAST, "--steps", 1) == 0
    assert run("sample", "-n", 5, "--gif", "--individual", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "runs" in out and "samples-000.png" in out
    grid = Image.open("runs/images/samples-000.png")
    assert grid.size == (3 * 10 + 2, 2 * 10 + 2)  # 3 by 2 pictures of 8 pixels, 2 pixels between
    singles = sorted(Path("runs/images/samples-000").iterdir())
    assert len(singles) == 5
    assert np.array_equal(np.array(Image.open(singles[4])), np.array(grid)[12:20, 12:20])
    film = Image.open("runs/images/samples-000.gif")
    assert film.n_frames > 20 and film.size == grid.size
    assert run("sample", "-n", 5, "--batch-size", 3, "--gif", "--device", "cpu", "--out", "short.png") == 0
    short = Image.open("short.gif")  # a film of the first batch
    assert short.size == (2 * 10 + 2, 2 * 10 + 2) and 20 < short.n_frames <= 51
    film.seek(film.n_frames - 1)
    assert np.abs(np.array(film.convert("RGB"), int) - np.array(grid, int)).mean() < 10  # it ends with the pictures


def test_pictures_of_a_seed_are_the_same_whatever_the_number_and_the_batch():
    assert run("train", "--data", folder_of_shapes(3), *FAST, "--steps", 3) == 0
    common = ["--device", "cpu", "--amp", "off", "--seed", 5, "--individual"]
    assert run("sample", "-n", 5, "--batch-size", 2, "--out", "a.png", *common) == 0
    assert run("sample", "-n", 4, "--batch-size", 4, "--out", "b.png", *common) == 0
    for i in range(4):
        a, b = (np.array(Image.open(f"{name}/{i:06}.png"), int) for name in "ab")
        assert np.abs(a - b).max() <= 1


def test_files_of_an_earlier_sample_are_kept(capsys):
    assert run("train", "--data", folder_of_shapes(3), *FAST, "--steps", 1) == 0
    flags = ["sample", "-n", 1, "--steps", 2, "--device", "cpu"]
    assert run(*flags) == run(*flags, "--seed", 1) == 0
    assert Path("runs/images/samples-000.png").read_bytes() != Path("runs/images/samples-001.png").read_bytes()
    assert run(*flags, "--out", "mine.png") == 0
    before = Path("mine.png").read_bytes()
    assert run(*flags, "--out", "mine.png", "--seed", 1) == 2
    assert "mine.png" in capsys.readouterr().err and Path("mine.png").read_bytes() == before


def test_sample_takes_the_newest_run_and_the_weights_asked_for():
    flags = ["--data", folder_of_shapes(3), *FAST, "--steps", 3, "--lr", 0.1]
    assert run("train", *flags, "--out", "runs/old") == run("train", *flags, "--out", "runs/new", "--seed", 1) == 0
    os.utime("runs/old/ckpt.pt", (1, 1))
    flags = ["-n", 1, "--steps", 5, "--device", "cpu", "--out"]
    assert run("sample", *flags, "newest.png") == run("sample", "--ckpt", "runs/new/ckpt.pt", *flags, "new.png") == 0
    assert run("sample", "--ckpt", "runs/new", *flags, "folder.png") == 0
    assert Path("folder.png").read_bytes() == Path("new.png").read_bytes()
    assert run("sample", "--no-ema", *flags, "plain.png") == 0
    assert Path("newest.png").read_bytes() == Path("new.png").read_bytes() != Path("plain.png").read_bytes()


def tiles(path, left, size):
    """The pictures of a figure: (rows, columns, size, size, 3), without its labels and the lines between."""
    pixels = np.array(Image.open(path), int)[24:, left:]
    scale = 64 // size
    step = (size + 2) * scale
    rows, columns = (pixels.shape[0] - 2 * scale) // step, (pixels.shape[1] - 2 * scale) // step
    assert pixels.shape[:2] == (rows * step + 2 * scale, columns * step + 2 * scale)
    inner = [[pixels[2 * scale + r * step :: scale, 2 * scale + c * step :: scale][:size, :size] for c in range(columns)]
             for r in range(rows)]
    return np.array(inner)


def test_figures_show_what_they_say(capsys):
    folder_of_shapes(3)
    assert run("train", "--data", "images", *FAST, "--steps", 1, "--lr", 0) == 0  # a network that predicts no noise
    flags = ["--device", "cpu", "--amp", "off"]
    Path("other").mkdir()
    ddpm.Shapes()[7][0].save("other/7.png")
    assert run("show", "forward", "--ckpt", "runs/images/ckpt.pt", "-n", 3, "--data", "other", *flags) == 0
    forward, other = tiles("forward.png", 0, 8), ddpm.Pictures("other", 8, 3)[0].transpose(1, 2, 0)
    assert forward.shape == (1, 12, 8, 8, 3)
    assert np.abs(forward[0, 0] - other).mean() < 10  # a little noise at t = 0
    assert forward[0, 11].std() > 80 and abs(np.corrcoef(forward[0, 11].flat, other.flat)[0, 1]) < 0.2  # only noise
    pictures = [ddpm.Pictures("images", 8, 3)[i].transpose(1, 2, 0) for i in range(3)]

    assert run("show", "progressive", "-n", 2, "--out", "steps.png", *flags) == 0
    assert run("sample", "-n", 2, "--out", "samples.png", "--individual", *flags) == 0
    progressive = tiles("steps.png", 110, 8)
    assert progressive.shape == (4, 12, 8, 8, 3)
    for i in range(2):  # rows of x_t and of the predicted x_0, which both end as the picture that sample draws
        sample = np.array(Image.open(f"samples/{i:06}.png"), int)
        assert np.array_equal(progressive[2 * i, -1], sample) and np.array_equal(progressive[2 * i + 1, -1], sample)
        x_T = next(ddpm.noise_for((1, 3, 8, 8), "cpu", 0, i))[0]  # without noise, x_0 would be x_T, undone its fading
        guess = ddpm.to_uint8(x_T / ddpm.Diffusion(50).sqrt_alpha_bars[-1]).permute(1, 2, 0)
        assert np.abs(progressive[2 * i + 1, 0] - guess.numpy()).max() <= 1

    assert run("show", "interpolate", *flags) == 0
    interpolate = tiles("interpolate.png", 110, 8)
    assert interpolate.shape == (8, 13, 8, 8, 3)
    for end in (0, -1):  # every row has the two pictures themselves at its ends
        assert (interpolate[:, end] == interpolate[0, end]).all()
        assert min(np.abs(interpolate[0, end] - picture).max() for picture in pictures) == 0
    near = [np.abs(interpolate[row, 1] - interpolate[row, 0]).mean() for row in range(8)]
    assert near[0] < 0.5 * near[-1]  # a few steps of noise can be undone, all of them cannot
    assert run("show", "interpolate", *flags) == 2 and "interpolate.png is there already" in capsys.readouterr().err


def test_pictures_are_mixed_where_the_reverse_process_takes_over():
    diffusion, seen = ddpm.Diffusion(80), {}
    args = argparse.Namespace(data=folder_of_shapes(2), seed=0)
    config = ddpm.Config(image_size=32, data="images")

    def model(x_t, t):
        seen.setdefault(t[0].item(), []).append(x_t)
        return torch.zeros_like(x_t)

    ddpm.interpolation_figure(diffusion, model, config, args)
    assert {t: len(calls) for t, calls in seen.items()} == {t: 8 - t // 10 for t in range(80)}
    pictures = [ddpm.to_unit(torch.from_numpy(ddpm.Pictures("images", 32, 3)[i])) for i in (0, 1)]
    _, alpha_bars = paper_schedule(80)
    for t in range(9, 80, 10):  # where a row begins: its ends are the two pictures at t, with one noise
        a, b = seen[t][0][0], seen[t][0][10]
        noise = min(((x - math.sqrt(alpha_bars[t]) * picture).std().item() for x in (a, b) for picture in pictures))
        assert noise == pytest.approx(math.sqrt(1 - alpha_bars[t]), rel=0.05)
        assert (a - b).std() < math.sqrt(alpha_bars[t]) * (pictures[0] - pictures[1]).std() * 1.01 + 1e-6
        torch.testing.assert_close(seen[t][0][3], 0.7 * a + 0.3 * b)


def test_the_forward_figure_needs_no_checkpoint():
    assert run("show", "forward", "--data", "shapes", "-n", 2) == 0
    assert tiles("forward.png", 0, 64).shape == (2, 12, 64, 64, 3)


def test_eval_measures_bits_per_dim_on_test_pictures_and_they_fall_with_training(capsys):
    flags = [*FAST, "--data", "shapes", "--amp", "off", "--lr", 1e-3, "--ema-decay", 0.9]
    assert run("train", *flags, "--steps", 1, "--out", "short") == run("train", *flags, "--steps", 80, "--out", "long") == 0
    totals = []
    for name in ("short", "long"):
        capsys.readouterr()
        command = ["eval", "--ckpt", f"{name}/ckpt.pt", "-n", 20, "--device", "cpu", "--json"]
        assert run(*command, f"{name}.json") == 0
        out, result = capsys.readouterr().out, json.loads(Path(f"{name}.json").read_text())
        assert "over 20 pictures" in out and f"{result['total']['mean']:.4f}" in out
        parts = result["rate"]["mean"] + result["distortion"]["mean"]
        assert result["total"]["mean"] == pytest.approx(parts) == pytest.approx(sum(result["terms"]))
        assert len(result["terms"]) == 51 and len(result["mse"]) == 50 and result["total"]["standard_error"] > 0
        totals.append(result["total"]["mean"])
    assert totals[1] < totals[0] - 0.5
    _, checkpoint, config = ddpm.load_checkpoint("long/ckpt.pt")
    model, diffusion = ddpm.build(config)
    model.load_state_dict(checkpoint["ema"])
    x_0 = ddpm.to_unit(ddpm.chosen_pictures(argparse.Namespace(data=None, seed=0), config, 20))
    bits = diffusion.bits_per_dim(model.eval(), x_0)[0].sum(1).numpy()
    assert result["total"]["mean"] == pytest.approx(bits.mean(), rel=1e-4)
    assert result["total"]["standard_error"] == pytest.approx(bits.std() / 20**0.5, rel=1e-3)
    assert run(*command, "long.json") == 2 and "long.json is there already" in capsys.readouterr().err
    assert run(*command, "again.json", "--batch-size", 7) == 0  # the noise of a picture does not depend on its batch
    assert json.loads(Path("again.json").read_text())["terms"] == pytest.approx(result["terms"], rel=1e-3, abs=1e-5)


def test_test_pictures_are_not_training_pictures():
    train, test = ddpm.Pictures("shapes", 8, 3), ddpm.Pictures("shapes", 8, 3, train=False)
    assert len(train) == len(test) == 10_000
    assert not any(np.array_equal(train[i], test[i]) for i in range(50))
    config = ddpm.Config(image_size=8, attention_resolutions=(), data="shapes")
    some, more, others = (ddpm.chosen_pictures(argparse.Namespace(data=None, seed=seed), config, n)
                          for seed, n in ((3, 5), (3, 9), (4, 5)))
    assert len(some) == 5 and torch.equal(some, more[:5]) and not torch.equal(some, others)
    held_out = {test[i].tobytes() for i in range(10_000)}
    assert all(picture.numpy().tobytes() in held_out for picture in some)


# The command line


@pytest.mark.parametrize("args, fragments", [
    (["train"], ["--data '' is neither a folder of pictures nor one of shapes"]),
    (["train", "--data", "nowhere"], ["--data 'nowhere' is neither a folder of pictures nor one of shapes, mnist"]),
    (["train", "--data", "."], ["holds no images (looked for .jpg"]),
    (["train", "--data", "images", "--steps", "x"], ["--steps: invalid int value: 'x'"]),
    (["train", "--data", "images", "--steps", "0"], ["--steps is 0: it must be at least 1"]),
    (["train", "--data", "images", "--lr", "nan"], ["--lr is nan"]),
    (["train", "--data", "images", "--dropout", "1.5"], ["--dropout is 1.5", "at most 1"]),
    (["train", "--data", "images", "--channel-mults"], ["--channel-mults", "expected at least one"]),
    (["train", "--data", "images", "--batch-size", "6", "--accumulate", "4"], ["6", "--accumulate 4"]),
    (["train", "--data", "images", "--image-size", "30"], ["30 can't be halved", "multiple of 8"]),
    (["train", "--data", "images", "--preset", "huge"], ["--preset", "huge", "cifar10"]),
    (["train", "--data", "images", "--preset", "tiny", "--resume"], ["not allowed with"]),
    (["train", "--data", "images", "--timesteps", "10"], ["T = 10 ", "--timesteps"]),
    (["train", "--data", "images", "--amp", "fp16", "--device", "cpu"], ["fp16", "bf16 or off"]),
    (["train", "--resume"], ["no run below ./runs"]),
    (["train", "--resume", "--out", "nowhere"], ["no checkpoint nowhere"]),
    (["sample"], ["no run below ./runs", "train first"]),
    (["sample", "--ckpt", "nothing.pt"], ["no checkpoint nothing.pt"]),
    (["sample", "--ckpt", "broken.pt"], ["broken.pt is damaged"]),
    (["sample", "--ckpt", "evil.pt"], ["evil.pt is damaged, or no checkpoint"]),
    (["sample", "--ckpt", "other.pt"], ["other.pt is damaged, or no checkpoint"]),
    (["sample", "-n", "0"], ["error: -n is 0: it must be at least 1"]),
    (["sample", "--eta", "0.5"], ["--eta", "--steps"]),
    (["eval"], ["no run below ./runs", "train first"]),
    (["eval", "--batch-size", "0"], ["--batch-size is 0: it must be at least 1"]),
    (["sample", "--ckpt", "huge.pt"], ["huge.pt is damaged: its weights"]),
    (["sample", "--ckpt", "."], ["no checkpoint config.json"]),
    (["sample", "--out", "new.jpg", "--ckpt", "good.pt"], ["new.jpg does not end in .png"]),
    (["show", "forward"], ["--data '' is neither a folder of pictures nor one of shapes"]),
    (["show", "progressive"], ["no run below ./runs"]),
    (["show", "waves"], ["invalid choice: 'waves'"]),
    (["paint"], ["invalid choice: 'paint'"]),
])
def test_every_mistake_is_one_line_that_names_it_and_status_2(args, fragments, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    if "good.pt" in args:
        assert run("train", "--data", folder_of_shapes(1), *FAST, "--steps", 1, "--out", ".") == 0
        Path("ckpt.pt").rename("good.pt")
        capsys.readouterr()
    torch.save(Evil(), "evil.pt")
    torch.save({"weights": torch.ones(3)}, "other.pt")
    config = {"base_channels": 1024, "channel_mults": (1, 64, 64, 64), "attention_resolutions": ()}  # terabytes
    torch.save({"config": config, "model": {}, "ema": {}, "step": 0}, "huge.pt")
    Path("broken.pt").write_bytes(Path("other.pt").read_bytes()[:200])
    if "images" in args:
        folder_of_shapes(1)
    assert run(*args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert all(fragment in lines[0] for fragment in fragments), lines[0]
    assert not Path("executed").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_accelerator_that_is_not_there_is_one_line(capsys):
    assert run("train", "--data", folder_of_shapes(1), "--device", "cuda") == 2
    assert "--device cuda" in capsys.readouterr().err


def test_every_field_of_a_preset_has_a_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        run("train", "--help")
    help_text = capsys.readouterr().out
    assert exit_.value.code == 0
    for name in ddpm.PRESETS["tiny"].__dict__:
        assert ("--class" if name == "only" else f"--{name.replace('_', '-')}") in help_text


def program(*args, **options):
    """The program as a user starts it, in a process of its own."""
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_from_a_folder_of_pictures_to_new_ones():
    folder_of_shapes(10)
    trained = program("train", "--data", "./images", *FAST, "--steps", 4, "--sample-every", 2, "--log-every", 1)
    out, err = trained.communicate(timeout=100)
    assert trained.returncode == 0 and err == ""
    assert "\r" not in out  # not a terminal: plain lines
    assert "step 4/4  loss" in out and "10 pictures" in out and "python ddpm.py sample" in out
    assert Image.open("runs/images/step-000002.png").size == (82, 82)  # 8 by 8 pictures
    made = program("sample", "-n", 4)
    out, err = made.communicate(timeout=100)
    assert made.returncode == 0 and err == ""
    assert Path("runs", "images", "ckpt.pt").as_posix() in out.replace("\\", "/")
    assert Image.open("runs/images/samples-000.png").size == (22, 22)
    again = program("train", "--data", "./images", *FAST)
    out, err = again.communicate(timeout=100)
    assert again.returncode == 2 and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to whole consoles only")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(number):
    folder_of_shapes(3)
    running = program("train", "--data", "images", *FAST, "--steps", 100_000, "--log-every", 1)
    log = Path("runs/images/log.csv")
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 128 + number and "Traceback" not in err
    assert "python ddpm.py train --resume --out" in out
    step = ckpt("runs/images")["step"]
    assert step == int(log.read_text().splitlines()[-1].split(",")[0]) > 2
    assert run("train", "--resume", "--steps", step + 1, "--device", "cpu") == 0
    assert ckpt("runs/images")["step"] == step + 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_run_killed_at_any_moment_goes_on_and_logs_each_step_once():
    args, log = ["train", "--data", folder_of_shapes(3), *FAST, "--log-every", 1, "--ckpt-every", 1], Path("run/log.csv")
    for kill in range(3):
        before = log.read_text().count("\n") if log.exists() else 0
        running = program(*args, "--out", "run", "--steps", 100_000, *(["--resume"] if kill else []))
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") > before + 10 * kill) and time.monotonic() < deadline:
            time.sleep(0.05)
        while not Path("run/ckpt.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        running.kill()
        _, err = running.communicate(timeout=60)
        assert running.returncode == -signal.SIGKILL and "error" not in err, err
    step = ckpt("run")["step"]
    assert step > 10 and run(*args, "--out", "run", "--steps", step + 2, "--resume") == 0
    assert [int(row.split(",")[0]) for row in log.read_text().splitlines()[1:]] == list(range(1, step + 3))
    assert not list(Path("run").glob("*.tmp"))
    assert run("sample", "--ckpt", "run/ckpt.pt", "-n", 1, "--steps", 2, "--device", "cpu") == 0


def test_running_out_of_memory_names_the_flags_that_help(monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    command = ["train", "--data", folder_of_shapes(1), *FAST]
    assert run(*command, "--steps", 1) == 0
    monkeypatch.setattr(ddpm.Diffusion, "loss", full)
    monkeypatch.setattr(ddpm.Diffusion, "p_sample", full)
    before = Path("runs/images/ckpt.pt").read_bytes()
    for command in (["train", "--resume", "--steps", 2], ["sample", "--batch-size", 4]):
        assert run(*command, "--device", "cpu") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--batch-size" in error and "--accumulate" in error
        assert "4 pictures of 8 pixels" in error
    assert Path("runs/images/ckpt.pt").read_bytes() == before


def torchrun(*args):
    """The program in two processes, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=100)


@pytest.mark.skipif(os.name == "nt", reason="torchrun needs libuv, which torch lacks on Windows")
def test_two_processes_do_what_one_does():
    flags = ["--data", folder_of_shapes(10), *FAST, "--amp", "off", "--log-every", 1]
    together = torchrun("train", *flags, "--steps", 3, "--out", "two")
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("step 3/3") == 1  # the first alone prints
    assert run("train", *flags, "--steps", 3, "--out", "one", "--accumulate", 2) == 0
    one, two = ckpt("one"), ckpt("two")
    for key in ("model", "ema"):
        for name, weights in one[key].items():
            torch.testing.assert_close(two[key][name], weights, atol=1e-5, rtol=0)
    losses = [[row.split(",")[1] for row in Path(out, "log.csv").read_text().splitlines()[1:]] for out in ("one", "two")]
    assert len(losses[0]) == 3 and np.allclose(np.float64(losses[0]), np.float64(losses[1]), atol=2e-6)
    assert run("train", "--resume", "--out", "two", "--steps", 4, "--device", "cpu") == 0  # goes on with one
    for command, out in (["sample", "-n", 5, "--batch-size", 2], "png"), (["eval", "-n", 5, "--batch-size", 2], "json"):
        command += ["--ckpt", "one/ckpt.pt", "--amp", "off", "--device", "cpu", "--json" if out == "json" else "--out"]
        assert run(*command, f"one.{out}") == 0
        together = torchrun(*command, f"two.{out}")
        assert together.returncode == 0, together.stderr
    assert np.abs(np.array(Image.open("one.png"), int) - np.array(Image.open("two.png"), int)).max() <= 1
    terms = [json.loads(Path(f"{name}.json").read_text())["terms"] for name in ("one", "two")]
    assert terms[0] == pytest.approx(terms[1], rel=1e-3, abs=1e-5)
    assert torchrun("train", *flags, "--out", "one").returncode != 0  # both end, with the error


@pytest.mark.skipif(os.name == "nt", reason="torchrun needs libuv, which torch lacks on Windows")
def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("", 0)) as server:
        port = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
        process = subprocess.run([sys.executable, SCRIPT, "sample"], capture_output=True, text=True, timeout=100,
                                 env=os.environ | port | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert process.returncode == 2
    lines = process.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and port["MASTER_PORT"] in lines[0]


def test_the_readme_says_which_lines_hold_which_section():
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    starts = [lines.index("class UserError(Exception):") + 1]
    starts += [n for n, line in enumerate(lines, start=1) if line[:3] in {f"# {i}" for i in range(1, 10)}]
    ends = [start - 1 for start in starts[1:]] + [len(lines)]
    rows = [row.split("|") for row in SCRIPT.with_name("README.md").read_text(encoding="utf-8").splitlines()]
    table = [(row[1].strip(), row[2].strip()) for row in rows if len(row) == 5 and re.fullmatch(r" \d+-\d+ ", row[2])]
    assert [name for name, _ in table[1:]] == [lines[n - 1][2:].rstrip("- ") for n in starts[1:]]
    assert [span for _, span in table] == [f"{start}-{end}" for start, end in zip(starts, ends)]


def test_the_file_keeps_its_budget():
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 1000 and max(map(len, lines)) <= 120
