"""Tests of ddpm.py: each name is a sentence about diffusion, or about what a user sees.

    python -m pytest

Expectations are built another way than the code builds them: closed forms, numerical
integration, brute force.
"""

import copy
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small get slower with more threads
import torch
from PIL import Image
from torch import nn

import ddpm

SCRIPT = Path(ddpm.__file__).resolve()
# A network and a process so small that a command takes less than a second.
FAST = """--image-size 8 --base-channels 32 --channel-mults 1 --num-res-blocks 1
    --attention-resolutions --dropout 0 --timesteps 5 --batch-size 4 --warmup 2
    --device cpu --amp off""".split()
CPU = ["--device", "cpu", "--amp", "off"]
needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")

@pytest.fixture(autouse=True)
def seeded_and_in_a_folder_of_its_own(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    ddpm.say_once.cache_clear()
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in ddpm.STOPPING}
    yield  # a program that is started here does not inherit that it ignores Ctrl-C
    for number, handler in handlers.items():
        signal.signal(number, handler)

@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A folder with images/ and runs/images/, three steps of training on them."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = ["--data", folder_of_shapes(3), *FAST, "--lr", 0.1, "--log-every", 1]
        assert run("train", *flags, "--steps", 3) == 0
    return folder

@pytest.fixture
def trained(trained_once):
    """The folder of a trained run, the test's own copy, with the pictures beside it."""
    shutil.copytree(trained_once, ".", dirs_exist_ok=True)
    return Path("runs", "images")

def paper_schedule(T=1000):
    """betas and alpha_bars in float64, from Sec. 4's words alone."""
    betas = np.array([1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)]) * 1000 / T
    return betas, np.array([math.prod(1 - betas[: i + 1]) for i in range(T)])

def folder_of_shapes(count, folder="images"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        ddpm.Shapes()[i][0].save(Path(folder, f"{i}.png"))
    return folder

def network(size, channels, base, mults, attention, dropout=0.0):
    return ddpm.UNet(ddpm.Config(size, channels, base, mults, 1, attention, dropout))

def pictures_of(data, size, channels=3, **options):
    return ddpm.Pictures(data, ddpm.Config(image_size=size, channels=channels), **options)

def run(*args):
    """The command line in this process: its exit status."""
    return ddpm.main([str(arg) for arg in args])

def one_line_error(capsys, *args):
    """The line with which a command ends in status 2."""
    capsys.readouterr()
    assert run(*args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]

def ckpt(folder):
    return torch.load(Path(folder, "ckpt.pt"), weights_only=True)

def log_rows(folder):
    """The rows of log.csv, split, without the header."""
    return [row.split(",") for row in Path(folder, "log.csv").read_text().splitlines()[1:]]

def pixels_of(path):
    return np.array(Image.open(path), int)

def same(a, b):
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

def noise(*shape, seed=0, **options):
    return ddpm.noise_for(shape, "cpu", seed, **options)

def last(chain):
    """The picture at which a chain of (t, x_t, x_0) ends."""
    *_, (t, x_t, x_0) = chain
    assert t == -1 and torch.equal(x_t, x_0)
    return x_t

# The schedule and the forward process

@pytest.mark.parametrize("T", [1000, 4000, 250])
def test_schedule_is_linear_and_ends_as_nothing_but_noise(T):
    betas, alpha_bars = paper_schedule(T)
    assert ddpm.linear_beta_schedule(T).dtype == torch.float64
    np.testing.assert_allclose(ddpm.linear_beta_schedule(T), betas, rtol=1e-12)
    np.testing.assert_allclose(ddpm.Diffusion(T).alpha_bars, alpha_bars, rtol=1e-6)
    assert 3e-5 < alpha_bars[-1] < 5e-5  # the paper's alpha_bar_T, which T must hardly move

@pytest.mark.parametrize("T", [2, 5, 20])
def test_a_schedule_of_few_steps_stays_below_1_and_still_ends_as_noise(T):
    betas, _ = paper_schedule(T)
    assert betas.max() >= 1
    np.testing.assert_allclose(ddpm.linear_beta_schedule(T), np.minimum(betas, 0.999), rtol=1e-12)
    assert 0 < ddpm.Diffusion(T).alpha_bars[-1] < 1e-3

def test_tables_are_float32_of_float64():
    _, alpha_bars = paper_schedule()
    diffusion = ddpm.Diffusion()
    tables = list(diffusion.buffers())
    assert all(table.dtype == torch.float32 and table.shape == (1000,) for table in tables)
    # computed in float32, 1 - alpha_bar of the first step would be off by 1e-4 of itself
    table = diffusion.sqrt_one_minus_alpha_bars
    np.testing.assert_allclose(table, np.sqrt(1 - alpha_bars), rtol=1e-6)

def test_one_jump_equals_step_by_step_noising():
    """Eq. 4 against Eq. 2 taken t times, in mean and variance."""
    diffusion, (betas, _) = ddpm.Diffusion(), paper_schedule()
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    mean, variance = 1.0, 0.0
    for t in range(1000):
        mean = math.sqrt(1 - betas[t]) * mean
        variance = (1 - betas[t]) * variance + betas[t]
        for step in (t, torch.tensor([t])) if t in (0, 1, 10, 500, 999) else ():
            assert diffusion.q_sample(one, step, zero).item() == pytest.approx(mean, rel=1e-6)
            deviation = diffusion.q_sample(zero, step, one).item()
            assert deviation == pytest.approx(math.sqrt(variance), rel=1e-6)

@pytest.mark.parametrize("t", [1, 2, 50, 500, 999])
def test_posterior_is_bayes_rule(t):
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0), integrated on a fine grid."""
    betas, alpha_bars = paper_schedule()
    x_0, x_t = 0.3, -0.2
    q = ddpm.Diffusion().q_posterior(torch.tensor(x_0), torch.tensor(x_t), t)
    x = np.linspace(-8, 8, 1_600_001)
    from_x_0 = (x - math.sqrt(alpha_bars[t - 1]) * x_0) ** 2 / (2 * (1 - alpha_bars[t - 1]))
    to_x_t = (x_t - math.sqrt(1 - betas[t]) * x) ** 2 / (2 * betas[t])
    density = np.exp((from_x_0 + to_x_t).min() - from_x_0 - to_x_t)
    density /= density.sum()
    mean = (density * x).sum()
    assert q.mean.item() == pytest.approx(mean, abs=1e-5)
    variance = (density * (x - mean) ** 2).sum()
    assert q.stddev.item() == pytest.approx(math.sqrt(variance), rel=1e-4)

def test_first_posterior_is_x_0_itself():
    x_0, x_t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    q = ddpm.Diffusion().q_posterior(x_0, x_t, 0)
    torch.testing.assert_close(q.mean, x_0)
    assert q.stddev.max() == 0

# Algorithm 1

def test_loss_is_zero_for_whoever_knows_the_noise_and_one_for_whoever_says_nothing():
    diffusion = ddpm.Diffusion()
    black = torch.zeros(64, 3, 8, 8)  # with x_0 = 0 the noise can be read off x_t
    scale = diffusion.sqrt_one_minus_alpha_bars
    knows = diffusion.loss(lambda x_t, t: x_t / scale[t].view(-1, 1, 1, 1), black)
    says_nothing = diffusion.loss(lambda x_t, t: torch.zeros_like(x_t), black)
    assert knows.item() < 1e-10
    assert says_nothing.item() == pytest.approx(1, abs=0.03)

def test_loss_draws_every_step_equally_often():
    drawn, diffusion = [], ddpm.Diffusion(50)
    for _ in range(20):
        diffusion.loss(lambda x_t, t: drawn.append(t) or x_t, torch.zeros(1000, 1, 1, 1))
    counts = torch.cat(drawn).bincount(minlength=50)
    assert len(counts) == 50  # no step beyond the last
    assert counts.min() > 300 and counts.max() < 500  # 400 each, the first and the last step too

# Algorithm 2 and DDIM

class GaussianData:
    """The best possible eps for pixels that are N(mean, std^2): E[eps | x_t], in closed form."""

    def __init__(self, diffusion, mean=0.3, std=0.1):
        self.alpha_bars, self.mean, self.std = diffusion.alpha_bars.double(), mean, std

    def __call__(self, x_t, t):
        a = self.alpha_bars[t].view(-1, 1, 1, 1)
        variance = a * self.std**2 + 1 - a
        return ((1 - a).sqrt() * (x_t - a.sqrt() * self.mean) / variance).to(x_t.dtype)

def test_the_predicted_x_0_undoes_the_noise():
    diffusion, x_0 = ddpm.Diffusion(), torch.rand(4, 3, 8, 8) * 2 - 1
    for t in (0, 10, 500, 999):
        eps = torch.randn(4, 3, 8, 8)
        _, found = diffusion.p_step(lambda x, t: eps, diffusion.q_sample(x_0, t, eps), t)
        torch.testing.assert_close(found, x_0, atol=2e-4, rtol=0)

def test_predicted_x_0_is_kept_where_pictures_are():
    diffusion, x_t = ddpm.Diffusion(), torch.full((1, 1, 2, 2), 3.0)
    for sign in (1, -1):
        p, x_0 = diffusion.p_step(lambda x, t: torch.zeros_like(x), sign * x_t, 999)
        assert (x_0 == sign).all()
        torch.testing.assert_close(p.mean, diffusion.q_posterior(x_0, sign * x_t, 999).mean)

def test_reverse_mean_is_equation_11_when_nothing_is_clipped():
    betas, alpha_bars = paper_schedule()
    diffusion = ddpm.Diffusion()
    for t in (0, 1, 300, 999):
        eps = torch.randn(4, 3, 8, 8)
        x_t = diffusion.q_sample(torch.rand(4, 3, 8, 8) - 0.5, t, eps)
        p, x_0 = diffusion.p_step(lambda x, t: eps, x_t, t)
        expected = x_t - betas[t] / math.sqrt(1 - alpha_bars[t]) * eps
        torch.testing.assert_close(p.mean, expected / math.sqrt(1 - betas[t]), atol=1e-4, rtol=0)
        assert x_0.abs().max() <= 0.51

@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_reverse_variance_is_the_one_asked_for_and_beta_tilde_2_at_the_first_step(variance):
    betas, alpha_bars = paper_schedule()
    beta_tilde = (1 - alpha_bars[:-1]) / (1 - alpha_bars[1:]) * betas[1:]  # of steps 2..T
    later = betas[1:] if variance == "fixedlarge" else beta_tilde
    expected = np.sqrt(np.concatenate([beta_tilde[:1], later]))
    diffusion, x = ddpm.Diffusion(variance=variance), torch.zeros(1, 1, 1, 1)
    found = [diffusion.p_step(lambda x, t: x, x, t)[0].stddev.item() for t in range(1000)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(diffusion.posterior_sigma[1:], np.sqrt(beta_tilde), rtol=1e-5)

@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_algorithm_2_with_the_optimal_network_gives_back_the_data(variance):
    diffusion = ddpm.Diffusion(variance=variance)
    x_0 = last(diffusion.sample(GaussianData(diffusion), noise(16, 1, 32, 32)))
    assert x_0.mean().item() == pytest.approx(0.3, abs=0.005)
    assert x_0.std().item() == pytest.approx(0.1, rel=0.04)

@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_ddim_without_noise_contracts_noise_to_the_data_as_its_closed_form(steps):
    """For Gaussian data each step is linear in the distance from the mean: factors multiply."""
    diffusion = ddpm.Diffusion()
    x_0 = last(diffusion.sample_ddim(GaussianData(diffusion), noise(16, 1, 32, 32), steps, 0.0))
    _, alpha_bars = paper_schedule()
    levels = [alpha_bars[round(t)] for t in np.linspace(999, 0, steps)] + [1.0]
    std = 1.0
    for a, b in zip(levels[:-1], levels[1:]):
        gain = math.sqrt(a * b) * 0.1**2 + math.sqrt((1 - a) * (1 - b))
        std *= gain / (a * 0.1**2 + 1 - a)
    assert x_0.mean().item() == pytest.approx(0.3, abs=0.005)
    assert x_0.std().item() == pytest.approx(std, rel=0.03)

def test_ddim_at_all_steps_with_eta_1_is_algorithm_2_with_the_posterior_variance():
    diffusion = ddpm.Diffusion(variance="fixedsmall").double()
    model = GaussianData(diffusion)
    doubles = [map(torch.Tensor.double, noise(2, 3, 8, 8, seed=3)) for _ in range(2)]
    algorithm_2 = last(diffusion.sample(model, doubles[0]))
    ddim = last(diffusion.sample_ddim(model, doubles[1], 1000, 1.0))
    torch.testing.assert_close(ddim, algorithm_2, atol=1e-4, rtol=0)
    assert algorithm_2.std() > 0.05  # pictures, not a constant

def test_the_last_step_adds_no_noise_and_the_others_do():
    diffusion, x_t = ddpm.Diffusion(), torch.randn(2, 1, 4, 4)
    for start, equal in ((1, True), (2, False)):
        chains = [iter([x_t, torch.randn(2, 1, 4, 4)]) for _ in range(2)]
        a, b = (last(diffusion.sample(lambda x, t: x, chain, start)) for chain in chains)
        assert torch.equal(a, b) == equal

@pytest.mark.parametrize("steps, expected", [
    (None, list(range(999, -1, -1))), (1, [999]), (2, [999, 0]), (4, [999, 666, 333, 0]),
])
def test_sampling_visits_the_steps_it_should(steps, expected):
    visited, diffusion = [], ddpm.Diffusion()

    def model(x, t):
        visited.append(t.tolist())
        return x

    chain = (diffusion.sample(model, noise(2, 1, 2, 2)) if steps is None
             else diffusion.sample_ddim(model, noise(2, 1, 2, 2), steps, 0.5))
    assert [t for t, _, _ in chain] == [*expected, -1]
    assert visited == [[t, t] for t in expected]

@pytest.mark.parametrize("steps, eta", [
    (0, 0.0), (1001, 0.0), (-3, 0.0), (50, 1.5), (50, math.inf), (50, math.nan), (50, -0.1),
])
def test_impossible_ddim_is_refused(steps, eta):
    with pytest.raises(ddpm.UserError, match=f"--steps {steps} --eta {eta}"):
        next(ddpm.Diffusion().sample_ddim(lambda x, t: x, noise(1, 1, 2, 2), steps, eta))

def test_picture_i_of_a_seed_does_not_depend_on_its_batch():
    diffusion = ddpm.Diffusion(50)
    model = GaussianData(diffusion)

    def drawn(seed, size):
        states = ddpm.draw(diffusion, model, (5, 3, 8, 8), seed, size)
        return torch.cat([x_t for _, t, x_t in states if t < 0])

    together = drawn(7, 5)
    torch.testing.assert_close(drawn(7, 2), together)
    torch.testing.assert_close(last(diffusion.sample(model, noise(2, 3, 8, 8, seed=7, first=3))),
                               together[3:])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(drawn(8, 5), together)

def test_epochs_steps_and_pictures_of_one_number_have_random_streams_of_their_own():
    keys = [(seed, tag, n) for seed in range(4) for tag in range(3) for n in range(4)]
    assert len({ddpm.seed_of(*key) for key in keys}) == len(keys)

# Bits per dimension

@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_bits_per_dim_of_a_gaussian_model_agree_with_numerical_integration(variance):
    T, mean, deviation, x_0 = 60, 0.1, 0.3, 51 / 127.5 - 1
    diffusion = ddpm.Diffusion(T, variance=variance)
    pictures = torch.full((2, 3, 128, 128), x_0)
    model = GaussianData(diffusion, mean, deviation)
    columns = list(diffusion.bits_per_dim(model, pictures, noise(*pictures.shape)))
    terms, mse = (torch.stack(column, dim=1) for column in zip(*columns))
    assert terms.shape == mse.shape == (2, T + 1)

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
        seen = b * (x_t - math.sqrt(a) * mean) / (a * deviation**2 + b)
        guess = np.clip((x_t - seen) / math.sqrt(a), -1, 1)
        from_x_0 = math.sqrt(previous[t]) * betas[t] / b
        from_x_t = math.sqrt(1 - betas[t]) * (1 - previous[t]) / b
        centre, sigma = from_x_0 * guess + from_x_t * x_t, math.sqrt(model_variance[t])
        errors.append((weights * (guess - x_0) ** 2).sum())
        if t:  # KL(q || p) by integrating q log(q / p) over a fine grid
            m = from_x_0 * x_0 + from_x_t * x_t
            z = np.linspace(-9, 9, 4001)[:, None]
            x = m + z * math.sqrt(tilde[t])
            log_q = -0.5 * z**2 - math.log(math.sqrt(tilde[t]))
            log_p = -0.5 * ((x - centre) / sigma) ** 2 - math.log(sigma)
            q = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
            expected.append((weights * (q * (log_q - log_p)).sum(0)).sum())
        else:  # the mass of one grey level
            cdf = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))
            low, high = (cdf((x_0 + edge - centre) / sigma) for edge in (-1 / 255, 1 / 255))
            expected.append((weights * -np.log((high - low).clip(1e-12))).sum())
    a, b = alpha_bars[-1], 1 - alpha_bars[-1]
    expected.append(0.5 * (-math.log(b) - 1 + b + a * x_0**2))
    expected = np.array(expected) / math.log(2)
    np.testing.assert_allclose(terms.mean(0), expected, rtol=0.05, atol=2e-6)
    np.testing.assert_allclose(terms.sum(1).mean(), expected.sum(), rtol=0.005)
    np.testing.assert_allclose(mse.mean(0), [*errors, x_0**2], rtol=0.05)

@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_whoever_knows_the_noise_pays_for_the_variance_alone(variance):
    x_0 = torch.rand(2, 3, 8, 8) * 1.8 - 0.9
    diffusion = ddpm.Diffusion(variance=variance)

    def knows(x_t, t):
        a = diffusion.alpha_bars.double()[t].view(-1, 1, 1, 1)
        return ((x_t - a.sqrt() * x_0) / (1 - a).sqrt()).float()

    columns = list(diffusion.bits_per_dim(knows, x_0, noise(2, 3, 8, 8)))
    terms, mse = (torch.stack(column) for column in zip(*columns))
    _, alpha_bars = paper_schedule()
    ratio = np.ones(999)  # beta~ / the model's variance
    if variance == "fixedlarge":
        ratio = (1 - alpha_bars[:-1]) / (1 - alpha_bars[1:])
    kl = 0.5 * (ratio - 1 - np.log(ratio)) / math.log(2)  # of two Gaussians with one mean
    np.testing.assert_allclose(terms[1:-1], np.stack([kl, kl], 1), atol=2e-4)
    assert mse[:-1].max() < 1e-3  # rounding, magnified where x_t is almost only noise
    torch.testing.assert_close(mse[-1], x_0.square().mean((1, 2, 3)))

def log_mass(x_0, mean, std):
    p = torch.distributions.Normal(torch.tensor(mean), torch.tensor(std))
    return ddpm.discretised_log_likelihood(x_0, p)

def test_a_wide_discretised_gaussian_is_the_density_times_the_bin():
    x_0, mean, scale = torch.linspace(-0.95, 0.95, 9), 0.2, 0.5
    density = -0.5 * ((x_0 - mean) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))
    expected = density + math.log(2 / 255)
    torch.testing.assert_close(log_mass(x_0, mean, scale), expected, atol=0.03, rtol=0)
    levels = torch.arange(256) / 127.5 - 1
    for centre in (-1.0, 0.3, 1.0):  # all grey levels together are everything
        assert abs(log_mass(levels, centre, 0.05).exp().sum() - 1) < 1e-5
    assert log_mass(torch.tensor(0.5), -0.5, 0.007).item() == pytest.approx(math.log(1e-12))

# The network

def test_networks_have_exactly_the_papers_parameters():
    with torch.device("meta"):
        cifar10 = ddpm.UNet(ddpm.Config())
        celebahq256 = ddpm.UNet(ddpm.Config(image_size=256, channel_mults=(1, 1, 2, 2, 4, 4)))
    assert sum(p.numel() for p in cifar10.parameters()) == 35_746_307
    assert sum(p.numel() for p in celebahq256.parameters()) == 113_673_219

@pytest.mark.parametrize("preset", ["cifar10", "celebahq256", "tiny"])
def test_every_preset_builds_and_needs_no_size_changed(preset):
    with torch.device("meta"):
        model, diffusion = ddpm.build(ddpm.PRESETS[preset])
        size = ddpm.PRESETS[preset].image_size
        out = model(torch.empty(2, 3, size, size), torch.zeros(2, dtype=torch.long))
    assert out.shape == (2, 3, size, size) and diffusion.timesteps == 1000

@pytest.mark.parametrize("size, channels, mults, attention", [
    (16, 3, (1, 2, 2, 2), (4,)), (8, 1, (1,), ()), (12, 1, (1, 2), (12, 6)), (1, 3, (1,), (1,)),
])
def test_network_answers_in_the_shape_of_its_question(size, channels, mults, attention):
    model = network(size, channels, 32, mults, attention)
    x_t = torch.randn(2, channels, size, size)
    assert model(x_t, torch.tensor([0, 999])).shape == x_t.shape

def test_untrained_network_predicts_no_noise_and_learns_in_all_its_parts():
    model = network(16, 3, 32, (1, 2), (8,))
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    assert model(x_t, t).abs().max() == 0  # the last convolution starts at zero
    for name, weights in model.named_parameters():
        if name.endswith(("conv2.weight", "to_out.0.weight", "conv_out.weight")):
            assert weights.abs().max() == 0
            nn.init.normal_(weights, std=0.1)
        elif weights.dim() > 1:  # Xavier uniform: variance 2 / (fan_in + fan_out)
            fan_in, fan_out = weights[0].numel(), weights.numel() // weights.shape[1]
            assert weights.var().item() == pytest.approx(2 / (fan_in + fan_out), rel=0.2)
    model(x_t, t).square().mean().backward()
    gradients = {name: weights.grad for name, weights in model.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    # all matter but the key's bias: it shifts a query's logits alike, which softmax ignores
    dead = [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-9]
    assert all(name.endswith("to_k.bias") for name in dead)

def test_network_is_told_the_time_and_each_picture_its_own():
    model = network(8, 1, 32, (1,), ())
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.1)
    x = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    early_late = model(x, torch.tensor([3, 700]))
    assert not torch.allclose(early_late[0], early_late[1], atol=1e-3)
    torch.testing.assert_close(model(x, torch.tensor([700, 3])), early_late.flip(0))

def test_embedding_is_sines_then_cosines_from_1_to_one_ten_thousandth():
    times = (0, 1, 999)
    for row, t in zip(ddpm.sinusoidal_embedding(torch.tensor(times), 128), times):
        angles = [t * 10000 ** (-i / 63) for i in range(64)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        np.testing.assert_allclose(row, expected, atol=2e-4)

def test_attention_is_softmax_over_all_positions():
    attention = ddpm.Attention(32)
    x, norm = torch.randn(2, 32, 3, 3), attention.group_norm
    h = nn.functional.group_norm(x, 8, norm.weight, norm.bias, eps=1e-6)
    expected = torch.empty_like(x)
    for b in range(2):
        rows = h[b].flatten(1).T  # (positions, channels)
        q, k, v = attention.to_q(rows), attention.to_k(rows), attention.to_v(rows)
        weights = torch.softmax(q @ k.T / math.sqrt(32), dim=1)
        expected[b] = x[b] + attention.to_out[0](weights @ v).T.view(32, 3, 3)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)

def test_a_residual_block_is_its_formula():
    block, x, temb = ddpm.ResBlock(32, 64, 16, 0.0), torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    silu = nn.functional.silu
    normed = nn.functional.group_norm(x, 8, eps=1e-6)
    h = block.conv1(silu(normed)) + block.time_emb_proj(silu(temb))[..., None, None]
    h = block.conv2(silu(nn.functional.group_norm(h, 16, eps=1e-6)))
    torch.testing.assert_close(block(x, temb), block.conv_shortcut(x) + h)

def test_halving_looks_one_pixel_past_the_right_and_the_bottom_only():
    model, seen = network(4, 1, 32, (1, 1), ()), []
    halving = model.down_blocks[0].downsamplers[0]
    nn.init.ones_(halving.conv.weight)
    halving.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.conv_in.weight.data.zero_()  # all ones reach it: the block before starts as nothing
    model.conv_in.bias.data.fill_(1)
    model(torch.zeros(1, 1, 4, 4), torch.tensor([0]))
    # a 3x3 window sees nine ones in the corner at the top left, and zeros past the other edges
    assert (seen[0][0, 0] / 32).tolist() == [[9, 6], [6, 4]]

@pytest.mark.parametrize("kwargs, message", [
    ({"image_size": 30}, "--image-size 30 must be a multiple of 8"),
    ({"base_channels": 48}, "--base-channels 48 of 32"),
    ({"attention_resolutions": (7,)}, r"--attention-resolutions \(7,\) among \[32, 16, 8, 4\]"),
])
def test_networks_that_cannot_be_are_refused_with_what_would_fit(kwargs, message):
    with pytest.raises(ddpm.UserError, match=message):
        ddpm.UNet(ddpm.Config(**kwargs))

def published(folder, **changes):
    """Published weights, as diffusers lays them out, of a small random network: that network."""
    model = network(8, 3, 128, (1, 2), (4,))
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.02)
    # as in the authors' own files
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = model.state_dict()
    for ours, theirs in old.items():
        state = {name.replace(ours, theirs): weights for name, weights in state.items()}
    config = {"act_fn": "silu", "attention_head_dim": None, "block_out_channels": [128, 256],
              "center_input_sample": False, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
              "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3,
              "layers_per_block": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-6,
              "norm_num_groups": 32, "out_channels": 3, "sample_size": 8,
              "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]} | changes
    config = {name: value for name, value in config.items() if value != "left out"}
    Path(folder).mkdir()
    Path(folder, "config.json").write_text(json.dumps(config))
    torch.save(state, Path(folder, "diffusion_pytorch_model.bin"))
    return model

def test_published_weights_are_the_same_network_here():
    weights = published("weights").state_dict()
    names = {"time_embedding.linear_1.weight", "mid_block.attentions.0.to_out.0.bias",
             "down_blocks.0.downsamplers.0.conv.weight", "up_blocks.0.resnets.1.conv_shortcut.bias"}
    assert names <= weights.keys()
    model, diffusion, config = ddpm.load("weights")
    assert same(model.state_dict(), weights) and not model.training
    assert diffusion.timesteps == 1000 and config.variance == "fixedsmall"
    flags = ["-n", 1, "--steps", 2, *CPU, "--out", "new.png"]
    assert run("sample", "--ckpt", "weights", *flags) == 0
    assert Image.open("new.png").size == (8, 8)
    flags = ["--data", folder_of_shapes(2), *CPU, "--timesteps", 5]
    flags += ["--batch-size", 2, "--steps", 1, "--lr", 0, "--out", "tuned"]
    assert run("train", "--init-from", "weights", *flags) == 0
    assert same(ckpt("tuned")["ema"], weights)

def safetensors(tensors, **changes):
    """A .safetensors file, as bytes, with changes to what its header says of conv_in.bias."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        numbers = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    header["conv_in.bias"] |= changes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data

def test_safetensors_are_taken_before_the_other_file_and_give_the_same_network():
    weights = published("weights").state_dict()
    doubled = {name: 2 * weight for name, weight in weights.items()}
    path = Path("weights/diffusion_pytorch_model.safetensors")
    path.write_bytes(safetensors(doubled))
    assert same(dict(ddpm.load("weights")[0].state_dict()), doubled)
    Path("weights/diffusion_pytorch_model.bin").unlink()
    assert same(dict(ddpm.load("weights")[0].state_dict()), doubled)

@pytest.mark.parametrize("damage", [
    lambda weights: safetensors(weights)[:-4], lambda weights: safetensors(weights)[:100],
    lambda weights: b"", lambda weights: (2**60).to_bytes(8, "little") + b"{}",
    lambda weights: b"\x02" + bytes(7) + b"[]",
    lambda weights: safetensors(weights, dtype="Q9"), lambda weights: safetensors(weights, shape=[7]),
    lambda weights: safetensors(weights, data_offsets=[0, 512]),
    lambda weights: safetensors(weights, data_offsets=[512, 0]),
    lambda weights: safetensors(weights, data_offsets=[0, 2**60]),
    lambda weights: safetensors(weights, data_offsets=["a", None]),
], ids=range(11))
def test_damaged_safetensors_are_one_line(damage, capsys):
    weights = published("weights").state_dict()
    Path("weights/diffusion_pytorch_model.safetensors").write_bytes(damage(weights))
    error = one_line_error(capsys, "sample", "--ckpt", "weights", *CPU)
    assert "weights is damaged" in error

@pytest.mark.parametrize("field, value", [
    ("norm_eps", 1e-5), ("downsample_padding", 1), ("flip_sin_to_cos", True),
    ("attention_head_dim", 8), ("freq_shift", "left out"), ("block_out_channels", [64, 128]),
])
def test_published_weights_of_another_kind_of_network_are_refused(field, value, capsys):
    published("weights", **{field: value})
    assert field in one_line_error(capsys, "sample", "--ckpt", "weights", *CPU)

# Data

def test_pixels_go_to_minus_1_to_1_and_back_without_loss():
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = ddpm.to_unit(pixels)
    assert unit.dtype == torch.float32 and unit[0] == -1 and unit[255] == 1
    for nudge in (0, 0.49, -0.49):  # a truncating cast would be wrong for the last
        assert torch.equal(ddpm.to_uint8(unit + nudge / 127.5), pixels)
    assert ddpm.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]

def colour(image, name, channels=3, **options):
    """The one colour of a picture, saved in a file of this name, as the program reads it."""
    image.save(name, **options)
    pixels = ddpm.read_picture(Image.open(name), 8, channels)
    assert pixels.shape == (channels, 8, 8) and pixels.dtype == np.uint8
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()

def test_pictures_of_every_mode_are_read_as_a_person_sees_them():
    size, white = (20, 20), [255, 255, 255]
    palette = Image.new("P", size, 0)
    palette.putpalette([9, 99, 199] * 256)
    deep = Image.fromarray(np.full(size, 0x8080, np.uint16))
    assert colour(Image.new("RGB", size, (10, 200, 30)), "rgb.png") == [10, 200, 30]
    assert colour(Image.new("RGBA", size, (0, 0, 0, 0)), "clear.png") == white
    assert colour(Image.new("LA", size, (0, 0)), "la.png") == white
    assert colour(palette, "palette.png") == [9, 99, 199]
    assert colour(palette, "clear-palette.png", transparency=0) == white
    assert colour(palette, "clear.gif", transparency=0) == white
    assert colour(Image.new("L", size, 77), "grey.png") == [77, 77, 77]
    assert colour(Image.new("1", size, 1), "bit.png") == white
    assert colour(Image.new("RGB", size, "white"), "white.bmp", channels=1) == [255]
    for name in ("deep.png", "deep.tiff", "deep.pgm"):  # 16 bits
        assert colour(deep, name) == [128, 128, 128]
        assert colour(deep, name, channels=1) == [128]
    half = colour(Image.new("RGBA", size, (255, 0, 0, 128)), "half.png")
    assert half[0] == 255 and abs(half[1] - 127) <= 1 and half[1] == half[2]
    cmyk = colour(Image.new("CMYK", size, (0, 255, 255, 0)), "cmyk.jpg", quality=100)
    assert cmyk[0] > 200 and max(cmyk[1:]) < 60  # no cyan, all magenta and yellow: red

@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pictures_of_32_bits_are_refused_with_a_reason(kind):
    Image.fromarray(np.full((20, 20), 100, kind)).save("deep.tiff")
    with pytest.raises(ValueError, match="32 bits"):
        ddpm.read_picture(Image.open("deep.tiff"), 8, 3)

def test_pictures_are_turned_as_the_camera_was_held():
    image, exif = Image.new("RGB", (16, 16), "white"), Image.Exif()
    image.paste("black", (0, 0, 16, 8))  # the top half
    exif[0x0112] = 6  # shown turned clockwise by a quarter: the top goes to the right
    image.save("turned.jpg", exif=exif, quality=95)
    pixels = ddpm.read_picture(Image.open("turned.jpg"), 16, 1)[0]
    assert pixels[:, :7].min() > 200 and pixels[:, 9:].max() < 55

def test_long_pictures_are_cropped_not_squashed_and_small_ones_enlarged():
    image = Image.new("L", (300, 100), 255)
    image.paste(0, (100, 0, 200, 100))  # the middle square is black, its edge blends
    assert ddpm.read_picture(image.copy(), 20, 1)[0, :, 1:-1].max() == 0
    for size in ((1, 1), (20_000, 2)):
        assert (ddpm.read_picture(Image.new("L", size, 7), 20, 1) == 7).all()

def test_resizing_does_not_alias():
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))  # gone at a tenth of the size
    pixels = ddpm.read_picture(Image.fromarray(stripes), 24, 1)
    assert abs(pixels.astype(int) - 127).max() < 20

def test_broken_files_are_skipped_and_named_and_others_are_not_looked_at(capsys):
    whole = Path(folder_of_shapes(5), "0.png").read_bytes()
    Path("images/sub").mkdir()
    Path("images/sub/cut.PNG").write_bytes(whole[: len(whole) // 2])
    Path("images/empty.jpg").write_bytes(b"")
    Path("images/words.png").write_text("not a picture")
    Path("images/notes.txt").write_text("not looked at")
    Path("images/._0.png").write_text("what another system left behind")
    assert run("train", "--data", "images", "--steps", 1, *FAST) == 0
    out = capsys.readouterr().out
    assert out.count("skipped a broken picture") == 3 and "5 pictures" in out
    assert all(name in out for name in ("cut.PNG", "empty.jpg", "words.png"))

@pytest.mark.parametrize("data", [
    b"DDS " + (124).to_bytes(4, "little") + bytes(range(120)),
    b"BLP2" + bytes([1, 0, 0, 0, 9, 9, 9, 9]) + (8).to_bytes(4, "little") * 2 + bytes(300),
    b"BLP1" + bytes(20), b"\0\0\0 ftypavif" + bytes(40), b"II*\0\x08\0\0\0\xff\xff" + bytes(30),
    b"GIF89a" + bytes(7), b"RIFF\x40\0\0\0WEBPVP8 " + bytes(60), b"P6 9999999999 1 255 ",
], ids=["dds", "blp2", "blp1", "avif", "tiff", "gif", "webp", "ppm"])
def test_damaged_content_of_any_kind_is_a_broken_picture(data, capsys):
    Path(folder_of_shapes(1), "1.png").write_bytes(data)
    assert pictures_of("images", 8)[1] is None and pictures_of("images", 8)[0] is not None
    assert "skipped a broken picture, 'images" in capsys.readouterr().out

def test_a_folder_of_nothing_but_broken_files_is_refused(capsys):
    Path("images").mkdir()
    Path("images/words.png").write_text("not a picture")
    error = one_line_error(capsys, "train", "--data", "images", *FAST)
    assert "none of the 1 pictures can be read" in error

def test_some_pictures_finds_readable_ones_beyond_the_broken():
    folder_of_shapes(12)
    for i in range(10):
        Path(f"images/{i}.png").write_text("broken")
    for seed in range(3):
        some = ddpm.some_pictures("images", ddpm.Config(), 2, seed)
        assert some.shape == (2, 3, 32, 32) and not torch.equal(some[0], some[1])

def test_reading_ends_its_line_once_when_many_files_are_broken(capsys):
    Path("images").mkdir()
    for i in range(300):
        Image.new("L", (8, 8)).save(f"images/{i}.png")
    for i in range(260):
        Path(f"images/0{i}.png").write_text("sorted before the others, more than read at a time")
    assert len(pictures_of("images", 8, 3).read()) == 300
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("reading pictures, batch 35/35")]) == 1

def test_links_hidden_folders_and_runs_below_the_data_are_not_read_and_a_link_gives_its_name():
    folder_of_shapes(3)
    folder_of_shapes(2, "images/.hidden")
    Path(folder_of_shapes(2, "images/run"), "ckpt.pt").touch()
    try:
        Path("images/again").symlink_to(Path("images").resolve(), target_is_directory=True)
        Path("pets").symlink_to("images", target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let this user make links")
    found = ddpm.find_pictures(Path("images"))
    assert [path.as_posix() for path in found] == [f"images/{i}.png" for i in range(3)]
    assert run("train", "--data", "pets", "--steps", 1, *FAST) == 0
    assert ckpt("runs/pets")["config"]["data"] == "pets"

def test_one_class_of_a_folder_or_a_set():
    folder_of_shapes(3, "images/ship")
    folder_of_shapes(4, "images/train/car")
    numbers = {"images": 7, "images/train/car": 4, "shapes/Circle": 3334, "shapes/2": 3333}
    for data, number in numbers.items():
        assert len(pictures_of(data, 8, 3)) == number
    assert pictures_of("shapes/square", 8, 3)[1].shape == (3, 8, 8)
    no_ship = "no class 'ship', it has: circle, square, triangle"
    for data, message in ("shapes/ship", no_ship), ("images/plane", "holds no images"):
        with pytest.raises(ddpm.UserError, match=message):
            pictures_of(data, 8, 3)

@pytest.mark.parametrize("name, folder, flip", [
    ("mnist", "MNIST", False), ("fashion-mnist", "FashionMNIST", True),
])
def test_a_downloaded_set_is_read_in_grey_and_digits_are_not_mirrored(name, folder, flip):
    raw = Path("data", folder, "raw")  # where the download puts it
    raw.mkdir(parents=True)
    pictures = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in pictures.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pictures.tobytes())
        header, labels = b"\0\0\x08\x01" + (20).to_bytes(4, "big"), bytes(i % 10 for i in range(20))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels)
    assert np.array_equal(pictures_of(name, 28, 1)[3][0], pictures[3])
    assert np.array_equal(pictures_of(f"{name}/7", 28, 1)[1][0], pictures[17])
    assert run("train", "--data", f"{name}/7", "--steps", 1, *FAST) == 0
    config = ckpt(f"runs/{name}-7")["config"]
    assert config["channels"] == 1 and config["flip"] == flip

def test_every_epoch_shows_each_picture_once_in_a_new_order():
    numbers = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    config = ddpm.Config(batch_size=4)
    data = ddpm.training_batches(numbers, config, 0)
    seen = torch.cat([next(data).flatten() for _ in range(10)])  # four epochs
    for epoch in seen.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:20].tolist()
    later = ddpm.training_batches(numbers, config, 6)  # taken up in the middle
    assert torch.equal(next(later).flatten(), seen[24:28])
    halves = ddpm.training_batches(numbers, config, 6, passes=2)
    assert torch.equal(torch.cat([next(halves), next(halves)]).flatten(), seen[24:28])

def test_test_pictures_are_not_training_pictures():
    train, test = pictures_of("shapes", 8, 3), pictures_of("shapes", 8, 3, train=False)
    assert len(train) == len(test) == 10_000
    assert not any(np.array_equal(train[i], test[i]) for i in range(50))
    config = ddpm.Config(image_size=8)
    some, more, others = (ddpm.some_pictures("shapes", config, n, seed)
                          for n, seed in ((5, 3), (9, 3), (5, 4)))
    assert len(some) == 5 and torch.equal(some, more[:5]) and not torch.equal(some, others)
    held_out = [test[i] for i in ddpm.epoch_order(10_000, 3, 0)[:5]]
    assert np.array_equal(some, held_out)

# Training

def test_a_tiny_network_learns_one_picture_and_draws_it():
    torch.manual_seed(1)
    picture = torch.rand(1, 1, 8, 8).round() * 1.6 - 0.8
    diffusion = ddpm.Diffusion(100)
    model = network(8, 1, 32, (1, 2), (4,))
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
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert np.mean(losses[-50:]) < 0.12 * losses[0]
    for chain in (diffusion.sample(ema, noise(4, 1, 8, 8)),
                  diffusion.sample_ddim(ema, noise(4, 1, 8, 8), 20)):
        drawn = last(chain)
        assert (drawn - picture).abs().mean() < 0.1
        assert ((drawn > 0) == (picture > 0)).all()

def test_ema_is_the_weighted_sum_of_all_past_weights():
    model = nn.Linear(1, 1, bias=False)
    ema = copy.deepcopy(model).requires_grad_(False)
    expected = model.weight.item()
    for step in range(200):
        model.weight.data.fill_(math.sin(step))
        ddpm.update_ema(ema, model, 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * math.sin(step)
    assert ema.weight.item() == pytest.approx(expected, abs=1e-5)
    assert ema.weight.dtype == torch.float32 and not ema.weight.requires_grad

@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(amp):
    flags = ["--data", folder_of_shapes(7), *FAST, "--log-every", 1]
    flags += ["--amp", amp, "--dropout", 0.1, "--accumulate", 2]
    assert run("train", *flags, "--steps", 6, "--out", "whole") == 0
    assert run("train", *flags, "--steps", 4, "--out", "halves") == 0
    assert run("train", "--resume", "--steps", 6, "--out", "halves", "--device", "cpu") == 0
    whole, halves = ckpt("whole"), ckpt("halves")
    assert whole["step"] == halves["step"] == 6
    for part in ("model", "ema", "optimizer"):
        assert same(whole[part], halves[part]), part
    assert not same(whole["model"], whole["ema"])
    rows, others = log_rows("whole"), log_rows("halves")
    assert len(rows) == 6 and [row[:4] for row in rows] == [row[:4] for row in others]

def test_the_log_of_a_resumed_run_is_the_checkpoints_and_holds_each_step_once(trained):
    with open(trained / "log.csv", "a") as file:  # after the last checkpoint, cut short
        file.write("4,0.5,0.0002,0.1\n5,0.5")
    assert run("train", "--resume", "--steps", 5, *CPU) == 0
    (trained / "log.csv").write_text("2,nonsense\n")
    assert run("train", "--resume", "--steps", 6, *CPU) == 0
    header = (trained / "log.csv").read_text().splitlines()[0]
    assert header == "step,loss,lr,grad_norm"
    rows = log_rows(trained)
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert ckpt(trained)["log"] == (trained / "log.csv").read_text()
    assert rows[3][1] != "0.5"
    rates = [float(row[2]) for row in rows]
    assert rates[0] == pytest.approx(rates[1] / 2) and rates[1] == rates[5]  # --warmup 2

def test_streaming_from_disk_trains_on_the_same_pictures_as_from_memory():
    flags = ["--data", folder_of_shapes(6), *FAST, "--steps", "3"]
    assert run("train", *flags, "--out", "memory") == 0
    assert run("train", *flags, "--out", "disk", "--cache-gb", "0") == 0
    assert same(ckpt("memory")["model"], ckpt("disk")["model"])

def test_streaming_is_done_by_workers_and_survives_broken_pictures(capfd):
    picture = Path(folder_of_shapes(1), "0.png").read_bytes()
    for i in range(1024):
        Path(f"images/{i}.png").write_bytes(picture if i % 2 else b"broken")
    flags = ["--steps", 3, "--cache-gb", 0, "--workers", 2]
    assert run("train", "--data", "images", *FAST, *flags) == 0
    assert "skipped a broken picture" in capfd.readouterr().out
    assert ckpt("runs/images")["step"] == 3

def test_fine_tuning_starts_from_the_ema_weights_of_another_run(trained, capsys):
    tuned = ["train", "--init-from", trained / "ckpt.pt", "--data", "shapes/circle", *CPU]
    assert run(*tuned, "--lr", 0, "--steps", 1, "--out", "tuned") == 0
    general, special = ckpt(trained), ckpt("tuned")
    assert special["step"] == 1 and special["config"]["data"] == "shapes/circle"
    assert same(special["model"], general["ema"])  # a learning rate of 0 leaves them alone
    assert not same(general["model"], general["ema"])
    error = one_line_error(capsys, *tuned, "--base-channels", 64, "--out", "other")
    assert "another network" in error

def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(trained, capsys):
    flags = ["--steps", 50, "--lr", 1000, "--grad-clip", 0, "--ckpt-every", 5]
    weights = ckpt(trained)
    weights["model"]["conv_in.bias"] *= 1e38
    torch.save(weights, trained / "ckpt.pt")
    before = (trained / "ckpt.pt").read_bytes()
    assert "not finite" in one_line_error(capsys, "train", "--resume", *flags, *CPU)
    assert (trained / "ckpt.pt").read_bytes() == before

def test_a_largest_norm_of_0_leaves_the_gradient_as_it_is():
    flags = ["--data", folder_of_shapes(3), *FAST, "--steps", 2]
    for clip in (0, 1e8, 1e-9):
        assert run("train", *flags, "--grad-clip", clip, "--out", clip) == 0
    assert same(ckpt("0")["model"], ckpt("100000000.0")["model"])
    moved = ckpt("0")["model"]["conv_out.weight"].abs().max()  # from zero
    assert moved > ckpt("1e-09")["model"]["conv_out.weight"].abs().max() and moved > 1e-4

def test_a_run_folder_with_a_checkpoint_is_never_overwritten(trained, capsys):
    before = (trained / "ckpt.pt").read_bytes()
    error = one_line_error(capsys, "train", "--data", "images", *FAST)
    assert "--resume" in error and "--out" in error
    assert (trained / "ckpt.pt").read_bytes() == before

def test_a_failed_last_save_is_an_error_and_leaves_the_checkpoint_before_it(
        trained, monkeypatch, capsys):
    before = (trained / "ckpt.pt").read_bytes()

    def full_disk(checkpoint, path):
        Path(path).write_bytes(b"half a check")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        error = one_line_error(capsys, "train", "--resume", "--steps", 4, *CPU)
    assert "No space left" in error and (trained / "ckpt.pt").read_bytes() == before
    assert [path.name for path in trained.glob("*ckpt*")] == ["ckpt.pt"]
    assert run("train", "--resume", "--steps", 4, *CPU) == 0

def test_what_can_not_be_written_for_a_moment_is_said_and_the_run_goes_on(monkeypatch, capsys):
    failed = []

    def failing_once(write, name):
        def wrapped(*args, **options):
            if name not in failed:
                failed.append(name)
                raise OSError(f"no {name} now")
            return write(*args, **options)
        return wrapped

    def skipping_the_first(replace):
        calls = []
        return lambda *args, **how: replace(*args, **how) if calls else calls.append(1)

    flags = ["--data", folder_of_shapes(2), *FAST, "--ckpt-every", 2, "--sample-every", 2]
    assert run("train", *flags, "--steps", 1, "--out", "run") == 0
    monkeypatch.setattr(torch, "save", failing_once(torch.save, "checkpoint"))
    monkeypatch.setattr(Image.Image, "save", failing_once(Image.Image.save, "grid"))
    monkeypatch.setattr(os, "fsync", failing_once(os.fsync, "row"))
    monkeypatch.setattr(ddpm, "replace_file", skipping_the_first(ddpm.replace_file))
    assert run("train", "--resume", "--steps", 4, "--out", "run", *CPU) == 0
    out = capsys.readouterr().out
    assert sorted(failed) == ["checkpoint", "grid", "row"]
    assert all(f"no {name} now" in out for name in failed)
    assert [row[0] for row in log_rows("run")] == ["1", "2", "4"]
    assert ckpt("run")["step"] == 4 and Path("run/step-000004.png").exists()
    assert not Path("run/step-000002.png").exists()

MOMENTS = {
    "one number": lambda state: state[0].update(exp_avg=torch.zeros(1)),
    "an infinite one": lambda state: state[0]["exp_avg"].fill_(math.inf),
    "a view": lambda state: state[1].update(
        exp_avg=torch.zeros(2).expand(*state[1]["exp_avg"].shape, 2)),
    "no variance": lambda state: state[3].pop("exp_avg_sq"),
    "one weight less": lambda state: state.pop(5),
}

@pytest.mark.parametrize("change", MOMENTS)
def test_a_checkpoint_with_the_moments_of_another_network_is_refused(change, trained, capsys):
    checkpoint = ckpt(trained)
    MOMENTS[change](checkpoint["optimizer"]["state"])
    torch.save(checkpoint, trained / "ckpt.pt")
    error = one_line_error(capsys, "train", "--resume", "--steps", 4, *CPU)
    assert "ckpt.pt is damaged" in error  # not a read past the end of the moments

def test_a_checkpoint_without_its_optimizer_can_be_sampled_but_not_resumed(trained, capsys):
    checkpoint = ckpt(trained)
    del checkpoint["optimizer"]
    torch.save(checkpoint, trained / "ckpt.pt")
    assert run("sample", "-n", 1, *CPU) == 0
    assert "ckpt.pt" in one_line_error(capsys, "train", "--resume", "--steps", 4, *CPU)

@without_cuda
def test_a_checkpoint_of_an_accelerator_goes_on_and_is_sampled_without_one(trained, monkeypatch):
    """As torch.save leaves it there: each tensor is marked with the device that it was on."""
    checkpoint = ckpt(trained)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(checkpoint, trained / "ckpt.pt")
    with pytest.raises(RuntimeError, match="CUDA"):
        ckpt(trained)
    assert run("sample", "-n", 1, *CPU) == 0
    assert run("train", "--resume", "--steps", 4, *CPU) == 0 and ckpt(trained)["step"] == 4

def test_a_checkpoint_in_another_order_of_memory_is_the_same_checkpoint(trained):
    state = ckpt(trained)
    moments = [moment for part in state["optimizer"]["state"].values() for moment in part.values()]
    for tensor in (*state["model"].values(), *state["ema"].values(), *moments):
        if tensor.dim() == 4:
            tensor.data = tensor.contiguous(memory_format=torch.channels_last)
    assert not state["model"]["conv_in.weight"].is_contiguous()
    torch.save(state, trained / "ckpt.pt")
    assert run("train", "--resume", "--steps", 4, *CPU) == 0 and ckpt(trained)["step"] == 4

def test_a_run_goes_on_in_another_precision(trained):
    for dtype, steps in ((torch.bfloat16, 5), (None, 7)):
        checkpoint, config = ddpm.load_checkpoint(trained / "ckpt.pt", resume=True)
        config = dataclasses.replace(config, steps=steps)
        pictures = ddpm.Pictures("images", config)
        cpu = torch.device("cpu")
        assert ddpm.train(config, pictures, trained, cpu, dtype, checkpoint) == 0
        assert ckpt(trained)["step"] == steps
        weights = [*ckpt(trained)["model"].values(), *ckpt(trained)["ema"].values()]
        assert {weight.dtype for weight in weights} == {torch.float32}

def test_one_picture_smaller_than_the_network_is_enough():
    Path("images").mkdir()
    Image.new("RGB", (3, 5), "red").save("images/only.bmp")
    assert run("train", "--data", "images", *FAST, "--steps", 2) == 0
    assert ckpt("runs/images")["step"] == 2

def test_training_draws_new_noise_at_every_step_and_averages_the_weights():
    flags = ["--data", folder_of_shapes(1), *FAST, "--no-flip", "--log-every", 1]
    assert run("train", *flags, "--steps", 5, "--lr", 0, "--out", "still") == 0
    losses = {row[1] for row in log_rows("still")}
    assert len(losses) == 5  # the same network and picture, another loss each time
    for steps in (1, 2):
        assert run("train", *flags, "--steps", steps, "--out", steps) == 0
    one, two = ckpt("1"), ckpt("2")
    for name, average in two["ema"].items():  # decay (1 + step) / (10 + step), step = 1
        expected = 2 / 11 * one["ema"][name] + 9 / 11 * two["model"][name]
        torch.testing.assert_close(average, expected)

def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    flags = ["--data", folder_of_shapes(5), *FAST, "--steps", 2]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("train", *flags, "--out", name, "--seed", seed) == 0
    assert same(ckpt("a")["model"], ckpt("b")["model"])
    assert not same(ckpt("a")["model"], ckpt("c")["model"])

def test_a_batch_that_the_processes_cannot_share_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(ddpm, "WORLD", 3)
    with pytest.raises(ddpm.UserError, match="--batch-size 128.*3 processes"):
        ddpm.train(ddpm.Config(), None, Path("run"), torch.device("cpu"), None)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_training_on_an_accelerator_goes_on_and_is_sampled_without_one(amp):
    device = ["--device", "cuda", "--amp", amp]
    flags = ["--data", folder_of_shapes(5), *FAST, *device, "--out", "run"]
    assert run("train", *flags, "--steps", 3) == 0
    assert run("train", "--resume", "--out", "run", "--steps", 5, *device) == 0
    assert all(torch.isfinite(weights).all() for weights in ckpt("run")["ema"].values())
    assert run("sample", "--ckpt", "run/ckpt.pt", "-n", 2, *CPU) == 0

# Sampling and figures

def test_sample_writes_a_grid_single_pictures_and_a_film(trained, capsys):
    assert run("sample", "-n", 5, "--gif", "--individual", *CPU) == 0
    out = capsys.readouterr().out
    paths = [str(trained / name) for name in ("samples-000.png", "samples-000.gif", "samples-000")]
    assert out.splitlines()[-1] == f"wrote 5 pictures: {', '.join(paths)}"
    grid = pixels_of(trained / "samples-000.png")
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3)  # 3 by 2 of 8 pixels, 2 pixels between
    singles = sorted((trained / "samples-000").iterdir())
    assert len(singles) == 5
    assert np.array_equal(pixels_of(singles[4]), grid[12:20, 12:20])
    film = Image.open(trained / "samples-000.gif")
    assert film.n_frames == 6 and film.size == (32, 22)  # T = 5, and the pictures
    film.seek(5)
    assert np.abs(np.array(film.convert("RGB"), int) - grid).mean() < 10
    flags = ["-n", 5, "--batch-size", 3, "--gif", "--out", "short.png"]
    assert run("sample", *flags, *CPU) == 0
    short = Image.open("short.gif")  # a film of the first batch
    assert short.size == (22, 22) and short.n_frames == 6

def test_pictures_of_a_seed_are_the_same_whatever_the_number_and_the_batch(trained):
    flags = [*CPU, "--seed", 5, "--individual"]
    assert run("sample", "-n", 5, "--batch-size", 2, "--out", "a.png", *flags) == 0
    assert run("sample", "-n", 4, "--batch-size", 4, "--out", "b.png", *flags) == 0
    for i in range(4):
        a, b = (pixels_of(f"{name}/{i:06}.png") for name in "ab")
        assert np.abs(a - b).max() <= 1

def test_files_of_an_earlier_sample_are_kept(trained, capsys):
    flags = ["sample", "-n", 1, "--steps", 2, *CPU]
    assert run(*flags) == run(*flags, "--seed", 1) == 0
    one, two = (Path(trained, f"samples-00{i}.png").read_bytes() for i in (0, 1))
    assert one != two
    assert run(*flags, "--out", "mine.png") == 0
    before = Path("mine.png").read_bytes()
    assert "mine.png" in one_line_error(capsys, *flags, "--out", "mine.png", "--seed", 1)
    assert Path("mine.png").read_bytes() == before == one

def test_sample_takes_the_newest_run_or_the_one_asked_for(trained):
    flags = ["--data", "images", *FAST, "--steps", 3, "--lr", 0.1, "--seed", 1]
    assert run("train", *flags, "--out", "runs/new") == 0
    os.utime(trained / "ckpt.pt", (1, 1))
    asked = {"newest": [], "file": ["--ckpt", "runs/new/ckpt.pt"],
             "folder": ["--ckpt", "runs/new"], "old": ["--ckpt", trained]}
    for name, checkpoint in asked.items():
        assert run("sample", *checkpoint, "-n", 1, *CPU, "--out", f"{name}.png") == 0
    newest, file, folder, old = (Path(f"{name}.png").read_bytes() for name in asked)
    assert newest == file == folder != old

def test_single_pictures_are_kept_when_sampling_is_stopped(trained, monkeypatch):
    def stopped(*args):
        yield 0, -1, torch.zeros(2, 3, 8, 8)
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpm, "draw", stopped)
    assert run("sample", "-n", 4, "--individual", "--out", "some.png", *CPU) == 130
    assert sorted(path.name for path in Path("some").iterdir()) == ["000000.png", "000001.png"]

def test_load_gives_the_averaged_weights_ready_to_sample(trained):
    model, diffusion, config = ddpm.load(trained)
    assert same(model.state_dict(), ckpt(trained)["ema"]) and not model.training
    assert diffusion.timesteps == config.timesteps == 5

def tiles(path, size):
    """The pictures of a figure, (rows, columns, size, size, 3), without the lines between them."""
    pixels = pixels_of(path)[2:, 2:]
    rows, columns = (side // (size + 2) for side in pixels.shape[:2])
    assert pixels.shape[:2] == (rows * (size + 2), columns * (size + 2))
    pixels = pixels.reshape(rows, size + 2, columns, size + 2, 3)
    return pixels.swapaxes(1, 2)[:, :, :size, :size]

def as_read(folder, i, size):
    return pictures_of(folder, size, 3)[i].transpose(1, 2, 0).astype(int)

def test_the_forward_figure_needs_no_checkpoint_and_goes_from_the_picture_to_noise():
    Path("other").mkdir()
    ddpm.Shapes()[7][0].save("other/7.png")
    assert run("show", "forward", "--data", "other", "-n", 3) == 0
    forward, other = tiles("forward.png", 64), as_read("other", 0, 64)
    assert forward.shape == (1, 11, 64, 64, 3)  # there is but one
    assert np.array_equal(forward[0, 0], other)
    assert 0 < np.abs(forward[0, 1] - other).mean() < 10  # a little noise at t = 0
    likeness = np.corrcoef(forward[0, 10].flat, other.flat)[0, 1]
    assert forward[0, 10].std() > 80 and abs(likeness) < 0.1  # only noise
    assert run("show", "forward", "--data", "shapes", "-n", 2, "--out", "two.png") == 0
    assert tiles("two.png", 64).shape == (2, 11, 64, 64, 3)

def test_figures_of_a_network_show_what_they_say(trained, capsys):
    flags = ["--data", "images", *FAST, "--steps", 1, "--lr", 0]  # it predicts no noise
    assert run("train", *flags, "--out", "runs/still") == 0
    os.utime(trained / "ckpt.pt", (1, 1))
    assert run("show", "progressive", "-n", 2, "--out", "steps.png", *CPU) == 0
    assert run("sample", "-n", 2, "--out", "samples.png", "--individual", *CPU) == 0
    progressive = tiles("steps.png", 8)
    assert progressive.shape == (4, 6, 8, 8, 3)  # t = 4..0 and x_0
    last_alpha_bar = math.prod(1 - np.linspace(0.02, 4, 5).clip(max=0.999))
    for i in range(2):  # x_t and the predicted x_0 both end as the picture that sample draws
        sample = pixels_of(f"samples/{i:06}.png")
        for row in (2 * i, 2 * i + 1):
            assert np.array_equal(progressive[row, -1], sample)
        x_T = next(noise(1, 3, 8, 8, first=i))[0]
        guess = ddpm.to_uint8(x_T / math.sqrt(last_alpha_bar)).permute(1, 2, 0)
        assert np.abs(progressive[2 * i + 1, 0] - guess.numpy()).max() <= 1

    assert run("show", "interpolate", *CPU) == 0
    interpolate = tiles("interpolate.png", 8)
    assert interpolate.shape == (8, 13, 8, 8, 3)
    pictures = [as_read("images", i, 8) for i in range(3)]
    for end in (0, -1):  # every row has the two pictures themselves at its ends
        assert (interpolate[:, end] == interpolate[0, end]).all()
        assert any((interpolate[0, end] == picture).all() for picture in pictures)
    near = [np.abs(row[1] - row[0]).mean() for row in interpolate]
    assert near[0] < 0.5 * near[-1]  # a few steps of noise can be undone, all of them cannot
    error = one_line_error(capsys, "show", "interpolate", *CPU)
    assert "interpolate.png" in error

def test_pictures_are_mixed_where_the_reverse_process_takes_over(monkeypatch):
    seen = {}

    class Listener(nn.Module):
        def forward(self, x_t, t):
            seen.setdefault(t[0].item(), []).append(x_t)
            return torch.zeros_like(x_t)

    config = ddpm.Config(image_size=32, data=folder_of_shapes(2))
    loaded = Listener(), ddpm.Diffusion(80), config
    monkeypatch.setattr(ddpm, "load", lambda *args, **options: loaded)
    assert run("show", "interpolate", "--ckpt", "any", *CPU) == 0
    assert {t: len(calls) for t, calls in seen.items()} == {t: 8 - t // 10 for t in range(80)}
    pictures = [ddpm.to_unit(torch.tensor(pictures_of("images", 32, 3)[i])) for i in (0, 1)]
    _, alpha_bars = paper_schedule(80)
    for t in range(9, 80, 10):  # where a row begins: its ends are the two pictures at t
        fading, (a, b) = math.sqrt(alpha_bars[t]), seen[t][0][[0, 10]]
        noises = [(x - fading * picture).std() for x in (a, b) for picture in pictures]
        assert min(noises).item() == pytest.approx(math.sqrt(1 - alpha_bars[t]), rel=0.05)
        apart = (pictures[0] - pictures[1]).std()  # by one noise, which their difference lacks
        assert (a - b).std() < fading * apart * 1.01 + 1e-6
        torch.testing.assert_close(seen[t][0][3], 0.7 * a + 0.3 * b)

# Evaluation

def bits_in(text):
    """Mean and error of each part that eval prints, and the rows of its table for Fig. 5."""
    parts = re.findall(r"^(\w+).* (\S+) \+- (\S+) bits/dim$", text, re.M)
    table = re.findall(r"^ *(\d+) +(\S+) +(\S+)$", text, re.M)
    return ({name: (float(mean), float(error)) for name, mean, error in parts},
            [tuple(map(float, row)) for row in table])

def test_eval_measures_bits_per_dim_on_test_pictures_and_they_fall_with_training(capsys):
    flags = [*FAST, "--data", "shapes/circle", "--lr", 3e-3, "--ema-decay", 0.9, "--timesteps", 25]
    flags += ["--cache-gb", 0, "--workers", 0]  # reads no more than it needs
    found = {}
    for steps in (1, 60):
        assert run("train", *flags, "--steps", steps, "--out", steps) == 0
        capsys.readouterr()
        command = ["eval", "--ckpt", steps, "-n", 20, *CPU]
        assert run(*command) == 0
        parts, table = found[steps] = bits_in(capsys.readouterr().out)
        total = parts["rate"][0] + parts["distortion"][0]
        assert parts["total"][0] == pytest.approx(total, abs=2e-4)
    assert found[60][0]["total"][0] < found[1][0]["total"][0] - 0.5

    model, diffusion, config = ddpm.load("60")
    x_0 = ddpm.to_unit(ddpm.some_pictures(config.data, config, 20, 0))
    terms, mse = zip(*diffusion.bits_per_dim(model, x_0, noise(*x_0.shape)))
    bits = torch.stack(terms).sum(0).numpy()
    assert parts["total"][0] == pytest.approx(bits.mean(), abs=1e-3)
    assert parts["total"][1] == pytest.approx(bits.std() / 20**0.5, abs=1e-3)
    assert table[0][0] == 24 and table[-1][0] == 0  # of T = 25
    expected = [sum(term.mean().item() for term in terms[int(t) + 1:]) for t, _, _ in table]
    assert [rate for _, rate, _ in table] == pytest.approx(expected, abs=1e-3)
    rmse = [127.5 * mse[int(t)].mean().item() ** 0.5 for t, _, _ in table]
    assert [error for _, _, error in table] == pytest.approx(rmse, abs=0.02)
    assert run(*command, "--batch-size", 7) == 0  # a picture's noise is its own, not its batch's
    again, _ = bits_in(capsys.readouterr().out)
    assert again["total"] == pytest.approx(parts["total"], abs=1e-3)

def moments(mean, std, n=500):
    """Features (n, 3) that have exactly this mean and these standard deviations, uncorrelated."""
    x = torch.randn(n, 3, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0))[0] * math.sqrt(n - 1)
    return (x * torch.tensor(std) + torch.tensor(mean)).float()

def test_frechet_distance_of_two_gaussians_is_its_closed_form():
    a, b = moments([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]), moments([0.5, 1.0, 1.0], [1.5, 1.0, 3.0], 900)
    expected = 0.5**2 + 1 + 0.5**2 + 1  # means, and standard deviations: both apart
    assert ddpm.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert ddpm.frechet_distance(b, a) == pytest.approx(expected, rel=1e-4)

def test_frechet_distance_of_a_set_with_itself_is_nothing_also_with_few_pictures():
    for n, width in ((1000, 8), (20, 100)):  # fewer pictures than features: singular
        features = torch.randn(n, width) * 3 + 1
        assert abs(ddpm.frechet_distance(features, features)) < 1e-3

def test_inception_score_of_sure_of_clueless_and_of_other_answers():
    classes = torch.eye(10).repeat(20, 1)  # each picture surely of a class, all equally often
    assert ddpm.inception_score(classes) == pytest.approx((10, 0), abs=1e-6)
    assert ddpm.inception_score(torch.full((200, 10), 0.1)) == pytest.approx((1, 0), abs=1e-6)
    p = torch.rand(50, 7).softmax(1)
    scores = []
    for part in p.view(5, 10, 7).double().numpy():
        mean = part.mean(0)
        kl = sum(sum(x * math.log(x / m) for x, m in zip(row, mean)) for row in part) / 10
        scores.append(math.exp(kl))
    expected = (np.mean(scores), np.std(scores))
    assert ddpm.inception_score(p, splits=5) == pytest.approx(expected, rel=1e-6)
    p, n = torch.rand(53, 7, dtype=torch.float64).softmax(1), 53  # cut as in the reference of 2016
    parts = [p[i * n // 5 : (i + 1) * n // 5].numpy() for i in range(5)]
    scores = [np.exp((x * np.log(x / x.mean(0))).sum(1).mean()) for x in parts]
    assert ddpm.inception_score(p, splits=5) == pytest.approx((np.mean(scores), np.std(scores)))

@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the layout of the published file, which can't be had without a network."""
    torch.manual_seed(0)
    net = ddpm.models.Inception3(1008, aux_logits=False, init_weights=False)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(net.state_dict(), path)
    return path

def test_inception_pools_without_its_padding_and_its_last_block_takes_the_maximum(
        inception_file, monkeypatch):
    built, seen = [], {}
    original = ddpm.models.Inception3
    monkeypatch.setattr(ddpm.models, "Inception3",
                        lambda *args, **how: built.append(original(*args, **how)) or built[0])
    inception = ddpm.load_inception(inception_file)
    pools = {"Mixed_5c": "average", "Mixed_6e": "average", "Mixed_7b": "average", "Mixed_7c": "max"}
    for name in pools:
        block = getattr(built[0], name)
        block.register_forward_pre_hook(lambda block, x, name=name: seen.update({name: [x[0]]}))
        block.branch_pool.conv.register_forward_pre_hook(
            lambda layer, x, name=name: seen[name].append(x[0]))
    pictures = torch.randint(256, (2, 1, 40, 40), dtype=torch.uint8)
    features, probabilities = inception(pictures)
    assert features.shape == (2, 2048) and probabilities.shape == (2, 1008)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
    torch.testing.assert_close(inception(pictures.expand(2, 3, 40, 40))[0], features)  # grey
    for name, kind in pools.items():
        x, pooled = seen[name][:2]
        windows = nn.functional.unfold(nn.functional.pad(x, (1, 1, 1, 1), value=math.nan), 3)
        windows = windows.view(2, x.shape[1], 9, -1)
        expected = windows.nanmean(2) if kind == "average" else windows.nan_to_num(-1e9).amax(2)
        torch.testing.assert_close(pooled.flatten(2), expected)

def test_eval_scores_new_samples_and_pictures_on_disk(trained, inception_file, capsys):
    weights = ["--inception-weights", inception_file, *CPU]
    assert run("eval", "--metrics", "fid", "is", "-n", 6, "--batch-size", 4, *weights) == 0
    out = capsys.readouterr().out
    assert re.search(r"^FID \S+ of 6 samples in 5 steps, eta 1.0, amp off against 3 training pictures of 'i",
                     out, re.M)
    assert re.search(r"^Inception Score \S+ \+- \S+ of 6 samples", out, re.M)
    assert "too high" in out and "bits/dim" not in out
    shutil.rmtree("runs")  # a folder of pictures needs no checkpoint
    for i in range(3):  # as large as they are learned, so that they are read as they are
        picture = pictures_of("images", 8)[i].transpose(1, 2, 0)
        Path("small").mkdir(exist_ok=True)
        Image.fromarray(picture).save(f"small/{i}.png")
    assert run("eval", "--samples", "small", "--data", "images", "--metrics", "fid", *weights) == 0
    fid = re.search(r"^FID (\S+) of 3 pictures of small", capsys.readouterr().out, re.M)[1]
    assert abs(float(fid)) < 1e-2  # a set with itself

def test_a_training_sets_statistics_are_computed_once_and_never_taken_for_others():
    class Features(nn.Module):  # in place of Inception: a few sums of pixels
        def __init__(self, scale):
            super().__init__()
            self.scale, self.calls = nn.Parameter(torch.tensor(scale), requires_grad=False), 0

        def forward(self, pictures):
            self.calls += 1
            return self.scale * pictures.float().sum(1).flatten(1)[:, 27:30], None

    def statistics(net, *args, **options):
        net.calls = 0
        n, *gaussian = ddpm.training_gaussian(pictures_of(*args, **options), net)
        return n, gaussian, net.calls > 0

    folder_of_shapes(6)
    Path("images", "broken.png").write_bytes(b"none")
    net = Features(1.0)
    n, gaussian, computed = statistics(net, "images", 8)
    assert n == 6 and computed
    x = np.stack([pictures_of("images", 8)[i].astype(float) for i in range(6)])
    x = x.sum(1).reshape(6, -1)[:, 27:30]
    np.testing.assert_allclose(gaussian[0], x.mean(0))
    np.testing.assert_allclose(gaussian[1], np.cov(x.T), rtol=1e-6)
    again = statistics(net, "images", 8)
    assert not again[2] and again[0] == 6 and all(map(torch.equal, again[1], gaussian))
    assert statistics(net, "images", 16)[2] and statistics(net, "images", 8, 1)[2]
    assert statistics(Features(2.0), "images", 8)[2]  # other weights
    assert not statistics(net, shutil.copytree("images", "moved"), 8)[2]  # the same pictures
    ddpm.Shapes()[9][0].save("images/2.png")
    assert statistics(net, "images", 8)[2]
    assert ddpm.frechet_distance(torch.tensor(x).float(), (n, *gaussian)) == pytest.approx(0, abs=1e-2)

def test_inception_weights_that_cannot_be_had_are_one_line(trained, monkeypatch, capsys):
    def no_network(*args, **how):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    torch.save({"other": torch.ones(1)}, "other.pth")
    for flags in ([], ["--inception-weights", "other.pth"], ["--inception-weights", "none.pth"]):
        error = one_line_error(capsys, "eval", "--metrics", "is", *flags, *CPU)
        assert "pt_inception-2015-12-05-6726825d.pth" in error and "--inception-weights" in error

# An accelerator that is not there

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

@pytest.mark.skipif(not torch.version.cuda or TORCH < (2, 7),
                    reason="needs a PyTorch for CUDA whose fake device needs no real one")
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_nothing_is_computed_across_devices():
    """On a fake CUDA device, which knows where each tensor is. (Gradients need a real one.)"""
    fake, cuda = torch._subclasses.fake_tensor.FakeTensorMode(), torch.device("cuda")
    with fake, cuda:
        model, average = (network(8, 3, 32, (1, 2), (4,), 0.1) for _ in range(2))
        diffusion = ddpm.Diffusion()
    with fake:
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        net = ddpm.in_precision(model, cuda, torch.bfloat16)
        x_0 = ddpm.to_unit(torch.zeros(2, 3, 8, 8, dtype=torch.uint8).to(cuda))
        loss = diffusion.loss(net, x_0)
        for weights in model.parameters():
            weights.grad = torch.zeros_like(weights)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ddpm.update_ema(average.requires_grad_(False), model, 0.9, 3)
        net = ddpm.in_precision(average, cuda, torch.bfloat16)
        zeros = (torch.zeros(2, 3, 8, 8, device=cuda) for _ in itertools.count())
        chains = (diffusion.sample(net, zeros), diffusion.sample_ddim(net, zeros, 4, 0.5),
                  diffusion.bits_per_dim(net, x_0, zeros))
        found = [loss, *(tensor for chain in chains for _, *tensors in itertools.islice(chain, 3)
                         for tensor in tensors)]
    assert len(found) == 1 + 3 * 2 + 3 * 2 + 3
    assert all(tensor.device.type == "cuda" and tensor.dtype == torch.float32 for tensor in found)

# The command line

MISTAKES = [
    ("train", ["--data '' holds no images", "nor is it one of shapes"]),
    ("train --data nowhere", ["--data 'nowhere' holds no", "shapes, mnist"]),
    ("train --data .", ["holds no images (looked for .jpg"]),
    ("train --data images --steps x", ["--steps: invalid int value: 'x'"]),
    ("train --data images --steps 0", ["--steps is 0: it must be from 1"]),
    ("train --data images --lr nan", ["--lr is nan"]),
    ("train --data images --dropout 1.5", ["--dropout is 1.5", "from 0 to 1"]),
    ("train --data images --steps 1 --attention-resolutions --channel-mults", ["--channel-mults"]),
    ("train --data images --batch-size 6 --accumulate 4", ["--accumulate must divide --batch-size"]),
    ("train --data images --image-size 30 --preset cifar10", ["--image-size 30 must be a multiple of 8"]),
    ("train --data images --preset huge", ["--preset", "huge", "cifar10"]),
    ("train --data images --preset tiny --resume", ["not allowed with"]),
    ("train --data images --timesteps 1", ["--timesteps is 1"]),
    ("train --data images --amp fp16 --device cpu", ["--amp", "fp16", "bf16"]),
    ("train --data images --ckpt 5", ["--ckpt"]),  # not short for --ckpt-every
    ("train --resume", ["no run below ./runs"]),
    ("train --resume --out nowhere", ["nowhere is damaged, or no checkpoint", "No such file"]),
    ("sample", ["no run below ./runs", "train first"]),
    ("sample --ckpt nothing.pt", ["nothing.pt is damaged, or no checkpoint", "No such file"]),
    ("sample --ckpt broken.pt", ["broken.pt is damaged"]),
    ("sample --ckpt evil.pt", ["evil.pt is damaged, or no checkpoint"]),
    ("sample --ckpt other.pt", ["other.pt is damaged, or no checkpoint"]),
    ("sample --ckpt huge.pt", ["huge.pt is damaged", "its weights"]),
    ("sample --ckpt nan.pt", ["nan.pt is damaged", "not finite"]),
    ("sample --ckpt lr.pt", ["'x'"]),
    ("sample --ckpt seed.pt", ["1.5"]),
    ("sample --ckpt mults.pt", ["1.5"]),
    ("sample --ckpt .", ["No such file", "config.json"]),
    ("sample -n 0", ["error: -n is 0: it must be from 1"]),
    ("sample --batch 4", ["--batch"]),
    ("sample --eta 1.5", ["--eta is 1.5"]),
    ("sample --steps 6 --ckpt runs/images", ["--steps 6", "use 1 to 5"]),
    ("sample --steps 2 --eta 1.5", ["--eta is 1.5"]),
    ("sample --steps 2 --eta inf", ["--eta is inf"]),
    ("sample --out images/0.png --ckpt runs/images", ["0.png is there already", "--out"]),
    ("eval", ["no run below ./runs", "train first"]),
    ("eval --batch-size 0", ["--batch-size is 0: it must be from 1"]),
    ("show forward", ["--data '' holds no images", "nor is it one of shapes"]),
    ("show forward --ckpt runs/images", ["--ckpt"]),
    ("show interpolate -n 3", ["-n"]),
    ("show progressive", ["no run below ./runs"]),
    ("show waves", ["invalid choice: 'waves'"]),
    ("paint", ["invalid choice: 'paint'"]),
]

@pytest.mark.parametrize("setting", [
    {"channels": 2}, {"variance": "learned"}, {"amp": "fp16"}, {"lr": math.nan}, {"steps": True},
])
def test_a_setting_that_no_flag_could_make_is_refused_also_without_the_command_line(setting):
    (name, value), = setting.items()
    with pytest.raises(ddpm.UserError, match=f"--{name} is {value!r}: it must be"):
        ddpm.Config(**setting)

@pytest.fixture(scope="module")
def faulty(trained_once, tmp_path_factory):
    """A folder of checkpoints that are not to be trusted."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    def changed(**config):
        good = ckpt(trained_once / "runs/images")
        return good | {"config": good["config"] | config}

    terabytes = {"base_channels": 1024, "channel_mults": (1, 64, 64), "attention_resolutions": ()}
    nan = changed()
    nan["ema"]["conv_in.bias"][0] = math.nan
    checkpoints = {"evil": Evil(), "other": {"weights": torch.ones(3)}, "nan": nan,
                   "huge": {"config": terabytes, "model": {}, "ema": {}, "step": 0},
                   "lr": changed(lr="x"), "seed": changed(seed=1.5),
                   "mults": changed(channel_mults=(1.5,))}
    folder = tmp_path_factory.mktemp("faulty")
    for name, checkpoint in checkpoints.items():
        torch.save(checkpoint, folder / f"{name}.pt")
    (folder / "broken.pt").write_bytes((folder / "nan.pt").read_bytes()[:200])
    return folder

@pytest.mark.parametrize("command, fragments", MISTAKES)
def test_every_mistake_is_one_line_that_names_it(command, fragments, request, faulty, capsys):
    shutil.copytree(faulty, ".", dirs_exist_ok=True)
    if "runs/images" in command:
        request.getfixturevalue("trained")
    elif "images" in command:
        folder_of_shapes(1)
    error = one_line_error(capsys, *command.split())
    assert all(fragment in error for fragment in fragments), error
    assert not Path("executed").exists()

@without_cuda
def test_an_accelerator_that_is_not_there_is_one_line(capsys):
    flags = ["--data", folder_of_shapes(1), "--device", "cuda"]
    assert "--device cuda" in one_line_error(capsys, "train", *flags)

def test_every_field_of_a_configuration_has_a_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        run("train", "--help")
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for field in dataclasses.fields(ddpm.Config):
        assert f"--{field.name.replace('_', '-')}" in text

def test_running_out_of_memory_names_the_flags_that_help(trained, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(ddpm.Diffusion, "loss", full)
    monkeypatch.setattr(ddpm.Diffusion, "p_step", full)
    before = (trained / "ckpt.pt").read_bytes()
    for command in (["train", "--resume", "--steps", 4], ["sample", "--batch-size", 4]):
        error = one_line_error(capsys, *command, *CPU)
        assert "--batch-size" in error and "--accumulate" in error
    assert (trained / "ckpt.pt").read_bytes() == before
    assert all(path.stat().st_size == 0 for path in trained.glob("samples*"))

# The program in processes of its own, as a user starts it

def program(*args, **options):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)

def wait_for(condition, process):
    """Until it holds; a process that has ended before is a failure."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)

def logged_steps(folder):
    path = Path(folder, "log.csv")
    return path.read_text().count("\n") - 1 if path.exists() else -1

def test_from_a_folder_of_pictures_to_new_ones():
    flags = [*FAST, "--steps", 4, "--sample-every", 2, "--log-every", 1]
    running = program("train", "--data", "./" + folder_of_shapes(10), *flags)
    out, err = running.communicate(timeout=100)
    assert running.returncode == 0 and err == ""
    assert "\r" not in out and "\x1b" not in out  # not a terminal: plain lines
    assert "step 4/4  loss" in out and "10 pictures" in out and "python ddpm.py sample" in out
    assert Image.open("runs/images/step-000002.png").size == (82, 82)  # 8 by 8 pictures
    running = program("sample", "-n", 4)
    out, err = running.communicate(timeout=100)
    assert running.returncode == 0 and err == ""
    assert Path("runs", "images", "ckpt.pt").as_posix() in out.replace("\\", "/")
    assert Image.open("runs/images/samples-000.png").size == (22, 22)

@needs_signals
def test_a_run_whose_reader_is_gone_goes_on_to_its_end():
    running = program("train", "--data", folder_of_shapes(2), *FAST, "--steps", 9, "--log-every", 1)
    assert running.stdout.readline()
    running.stdout.close()  # as `| head -1` does
    err = running.stderr.read()
    assert running.wait(timeout=100) == 0 and err == ""
    assert ckpt("runs/images")["step"] == 9 and Path("runs/images/step-000009.png").exists()

@needs_signals
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_says_how_to_go_on(name):
    number, flags = getattr(signal, name), ["--data", folder_of_shapes(3), *FAST, "--log-every", 1]
    running = program("train", *flags, "--steps", 100_000)
    wait_for(lambda: logged_steps("runs/images") > 2, running)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 128 + number and "Traceback" not in err
    assert "python ddpm.py train --resume --out" in out
    step = ckpt("runs/images")["step"]
    assert step == int(log_rows("runs/images")[-1][0]) > 2
    assert run("train", "--resume", "--steps", step + 1, "--device", "cpu") == 0
    assert ckpt("runs/images")["step"] == step + 1

@needs_signals
def test_a_run_alone_has_its_folder_and_killed_at_any_moment_goes_on(capsys):
    args = ["train", "--data", folder_of_shapes(3), *FAST, "--log-every", 1, "--ckpt-every", 1]
    for resume, more in (([], 0), (["--resume"], 17)):
        before = logged_steps("run")
        running = program(*args, "--out", "run", "--steps", 100_000, *resume)
        wait_for(lambda: logged_steps("run") > before + more, running)
        wait_for(lambda: Path("run/ckpt.pt").exists(), running)
        error = one_line_error(capsys, "train", "--resume", "--out", "run", *CPU)
        assert "another program trains in run" in error
        running.kill()
        _, err = running.communicate(timeout=60)
        assert running.returncode == -signal.SIGKILL and err == ""
    step = ckpt("run")["step"]
    assert step > 10 and run(*args, "--out", "run", "--steps", step + 2, "--resume") == 0
    assert [int(row[0]) for row in log_rows("run")] == list(range(1, step + 3))
    assert [path.name for path in Path("run").glob("*ckpt*")] == ["ckpt.pt"]

@needs_signals
def test_a_signal_to_the_whole_group_saves_although_workers_read_the_pictures():
    picture = Path(folder_of_shapes(1), "0.png").read_bytes()
    for i in range(512):
        Path(f"images/{i}.png").write_bytes(picture)
    flags = ["--data", "images", *FAST, "--log-every", 1, "--cache-gb", 0, "--workers", 2]
    running = program("train", *flags, "--steps", 100_000, start_new_session=True)
    wait_for(lambda: logged_steps("runs/images") > 2, running)
    os.killpg(running.pid, signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    assert ckpt("runs/images")["step"] > 2

def test_two_programs_that_sample_at_once_choose_two_names(trained):
    running = [program("sample", "-n", 1, "--seed", seed, *CPU) for seed in (0, 1)]
    outs = [process.communicate(timeout=100)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sorted(re.findall(r"samples-(\d+).png", "".join(outs))) == ["000", "001"]
    assert all(path.stat().st_size > 0 for path in trained.glob("samples*"))

def torchrun(*args):
    """The program in two processes, as torchrun starts them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)

@pytest.mark.skipif(os.name == "nt", reason="torchrun needs libuv, which torch lacks on Windows")
def test_two_processes_train_as_one_does_and_both_end_with_an_error():
    flags = ["--data", folder_of_shapes(10), *FAST, "--log-every", 1]
    together = torchrun("train", *flags, "--steps", 3, "--out", "two")
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("step 3/3") == 1  # the first alone prints
    assert run("train", *flags, "--steps", 3, "--out", "one", "--accumulate", 2) == 0
    one, two = ckpt("one"), ckpt("two")
    for part in ("model", "ema"):
        for name, weights in one[part].items():
            torch.testing.assert_close(two[part][name], weights, atol=1e-5, rtol=0)
    losses = [[float(row[1]) for row in log_rows(out)] for out in ("one", "two")]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=2e-6)
    assert torchrun("train", *flags, "--out", "two").returncode != 0
    assert run("train", "--resume", "--out", "two", "--steps", 4, *CPU) == 0  # goes on with one

# The file

def test_the_readme_says_which_lines_hold_which_section():
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    starts = [lines.index("class UserError(Exception):") + 1]
    sections = {f"# {i}" for i in range(1, 9)}
    starts += [n for n, line in enumerate(lines, start=1) if line[:3] in sections]
    ends = [start - 1 for start in starts[1:]] + [len(lines)]
    readme = SCRIPT.with_name("README.md").read_text(encoding="utf-8").splitlines()
    rows = [row.split("|") for row in readme]
    table = [(row[1].strip(), row[2].strip()) for row in rows
             if len(row) == 5 and re.fullmatch(r" \d+-\d+ ", row[2])]
    assert [name for name, _ in table[1:]] == [lines[n - 1][2:].rstrip("- ") for n in starts[1:]]
    assert [span for _, span in table] == [f"{a}-{b}" for a, b in zip(starts, ends)]

def test_the_file_keeps_its_budget():
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 1100 and max(map(len, lines)) <= 100
