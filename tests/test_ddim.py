"""The mathematics: schedules, DDIM and its inverse, the loss, each against float64 and closed forms."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ddim import (
    SCHEDULES,
    WEIGHTS,
    Cosine,
    Denoiser,
    LDMDiscrete,
    LDMDistilled,
    ddim_inverse,
    ddim_sample,
    ddim_step,
    ddim_target,
    start_noise,
    to_x,
)
from train import training_loss

SHAPE = (64, 3, 4, 4)

def random_times(n, schedule, seed=0):
    """n pairs 1 >= t > t1 >= 0, at least 1/128 apart."""
    rng = np.random.default_rng(seed)
    t1 = rng.uniform(0, 1 - 1 / 128, n)
    t = t1 + rng.uniform(1 / 128, 1 - t1)
    return torch.tensor(t), torch.tensor(t1)

def ab(schedule, t):
    """α, σ of a float, by the definition in the paper, with numpy in float64."""
    if isinstance(schedule, Cosine):
        return math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    beta = np.linspace(math.sqrt(0.0015), math.sqrt(0.0195), 1000) ** 2
    a2 = np.float32(np.cumprod(1 - beta)[min(round(1000 * t), 999)]).astype(np.float64)
    return math.sqrt(a2), math.sqrt(1 - a2)

class Point(torch.nn.Module):
    """Knows all data to be one image x0: predicts the exact v, ε or x, and counts how often it is asked."""

    def __init__(self, x0, schedule, kind):
        super().__init__()
        self.x0, self.schedule, self.kind, self.calls = x0, schedule, kind, 0

    def forward(self, z, t, y=None):
        self.calls += 1
        a, s = self.schedule(t)
        s = s.clamp(min=1e-12)                               # at t = 0 an exact ε is 0 / 0
        x = self.x0.expand_as(z)
        return {"x": x, "eps": (z - a * x) / s, "v": (a * z - x) / s}[self.kind]

class Gaussian(torch.nn.Module):
    """The ideal v-prediction for data N(m, d²) per pixel: x̂ = m + α d² (z − α m) / (α² d² + σ²)."""

    def __init__(self, m, d, schedule):
        super().__init__()
        self.m, self.d, self.schedule = m, d, schedule

    def forward(self, z, t, y=None):
        a, s = self.schedule(t)
        var = a ** 2 * self.d ** 2 + s ** 2
        eps_hat, x_hat = s * (z - a * self.m) / var, self.m + a * self.d ** 2 * (z - a * self.m) / var
        return a * eps_hat - s * x_hat

@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_its_definition_finite_and_variance_preserving(name):
    schedule = SCHEDULES[name]()
    for t in np.linspace(0, 1, 77):
        a, s = schedule(float(t))
        assert_close((a.item(), s.item()), ab(schedule, float(t)), rtol=1e-12, atol=1e-12)
        assert math.isfinite(schedule.log_snr(float(t)))
    a, s = schedule(torch.linspace(0, 1, 77))
    assert_close(a ** 2 + s ** 2, torch.ones(77, 1, 1, 1))

def test_cosine_at_its_ends_is_exactly_data_and_exactly_noise():
    assert [v.item() for v in Cosine()(0.0)] == [1, 0]
    a, s = Cosine()(1.0)
    assert 0 <= a.item() < 1e-15 and s.item() == 1
    assert Cosine().log_snr(0.0) == 20 and Cosine().log_snr(1.0) == -20 and abs(Cosine().log_snr(0.5)) < 1e-12
    with mock.patch("ddim.WITHOUT_FLOAT64", {"cpu"}):             # there α_1 = cos(π/2) is rounded to below 0
        assert Cosine().log_snr(torch.ones(2)).flatten().tolist() == [-20, -20]
    z = torch.randn(4, 3, 2, 2)
    for t, t1 in ((1.0, 0.5), (0.5, 0.0), (1.0, 0.0), (0.0, 0.0)):
        assert ddim_step(Cosine(), z, torch.tanh(z), t, t1).isfinite().all()

@pytest.mark.parametrize("name", SCHEDULES)
def test_step_agrees_with_float64_for_a_time_per_image(name):
    schedule = SCHEDULES[name]()
    t, t1 = random_times(64, schedule)
    z, x = torch.randn(SHAPE), torch.randn(SHAPE)
    out = ddim_step(schedule, z, x, t.float(), t1.float())
    for i in range(64):
        (a, s), (a1, s1) = ab(schedule, float(t[i].float())), ab(schedule, float(t1[i].float()))
        eps = (z[i].numpy().astype(np.float64) - a * x[i].numpy()) / s
        assert_close(out[i].double(), torch.tensor(a1 * x[i].numpy() + s1 * eps), rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize("name", SCHEDULES)
def test_inverse_gives_back_the_x_that_the_step_used(name):
    schedule = SCHEDULES[name]()
    t, t1 = random_times(64, schedule, seed=1)
    z, x = torch.randn(SHAPE, dtype=torch.double), torch.randn(SHAPE, dtype=torch.double)
    assert_close(ddim_inverse(schedule, z, ddim_step(schedule, z, x, t, t1), t, t1), x, rtol=1e-7, atol=1e-7)
    z1 = torch.randn(SHAPE, dtype=torch.double)
    assert_close(ddim_step(schedule, z, ddim_inverse(schedule, z, z1, t, t1), t, t1), z1, rtol=1e-7, atol=1e-7)

def test_float32_target_is_close_to_float64_also_for_the_smallest_steps():
    """x'' divides by a difference of order 1/128: rounding must not grow to the size of the signal."""
    net = lambda z, t, y=None: torch.tanh(z) * 0.5  # noqa: E731
    z, t = torch.randn(SHAPE), torch.linspace(2 / 128, 1, 64)
    both = []
    for dtype in (torch.float32, torch.float64):
        xhat, zz, tt = Denoiser(net, Cosine()), z.to(dtype), t.to(dtype)
        both.append(ddim_target(xhat, zz, xhat(zz, tt), tt, tt - 1 / 128, tt - 2 / 128)[0].double())
    assert_close(*both, rtol=1e-4, atol=1e-4)

def test_one_jump_with_the_target_lands_where_two_steps_do():
    z, xhat = torch.randn(2, 3, 8, 8, dtype=torch.double), Denoiser(lambda z, t: torch.tanh(z + t), Cosine(), "x")
    z1 = ddim_step(Cosine(), z, xhat(z, 0.9), 0.9, 0.6)
    z2 = ddim_step(Cosine(), z1, xhat(z1, 0.6), 0.6, 0.3)
    x2, landed = ddim_target(xhat, z, xhat(z, 0.9), 0.9, 0.6, 0.3)
    assert_close(landed, z2)
    assert_close(ddim_step(Cosine(), z, x2, 0.9, 0.3), z2)
    assert not torch.allclose(x2, xhat(z, 0.9), atol=1e-3)  # and it is news to the model

@pytest.mark.parametrize("kind", ["v", "eps", "x"])
def test_every_prediction_stands_for_the_same_clean_image(kind):
    x, eps = torch.randn(SHAPE, dtype=torch.double), torch.randn(SHAPE, dtype=torch.double)
    a, s = Cosine()(torch.rand(64, dtype=torch.double) * 0.9 + 0.05)
    z = a * x + s * eps
    out = {"v": a * eps - s * x, "eps": eps, "x": x}[kind]
    back = to_x(kind, out, z, a, s)
    assert_close(back, x)

def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        to_x("score", *torch.zeros(4))

def test_truncated_snr_is_the_snr_but_at_least_one():
    assert_close(WEIGHTS["snr"](torch.tensor([-3.0, 0.0, 2.0])), torch.tensor([1.0, 1.0, math.exp(2)]))

def test_ldm_times_are_the_originals_where_n_divides_1000_and_exactly_n_elsewhere():
    steps = lambda n: [round(1000 * t) for t in LDMDiscrete().times(n)]  # noqa: E731
    assert steps(4) == [751, 501, 251, 1, 0]
    assert steps(2) == [501, 1, 0]
    assert steps(10)[:3] == [901, 801, 701] and steps(10)[-3:] == [101, 1, 0]
    assert steps(1) == [1000, 0]
    assert steps(3) == [1000, 667, 333, 0]
    for n in (1, 3, 7, 64, 999):
        assert len(steps(n)) == n + 1 and all(np.diff(steps(n)) < 0) and steps(n)[-1] == 0
    for n in (0, 1000):
        with pytest.raises(ValueError, match="between 1 and 999"):
            LDMDiscrete().times(n)

def test_an_ldms_network_sees_the_very_step_whose_alpha_is_used():
    """It was trained on whole steps 0 … 999, which i / 64 are not."""
    seen, schedule = [], LDMDiscrete()
    def net(z, t):
        seen.append(t)
        return torch.zeros_like(z)
    xhat = Denoiser(net, schedule, "eps")
    ddim_sample(xhat, torch.zeros(1, 3, 4, 4), 64)
    xhat(torch.zeros(3, 3, 4, 4), torch.tensor([1.0, 0.5161, 0.0]))
    steps, last = 1000 * np.array(seen[:-1]), 1000 * seen[-1]
    assert steps[0] == 999 and len(set(steps)) == 64 and np.abs(steps - steps.round()).max() < 1e-9
    assert_close(last, torch.tensor([999.0, 516.0, 0.0]))
    for step in steps[[0, 5, 63]]:
        alpha2 = schedule.alpha2[round(step)]
        assert_close(schedule(float(step) / 1000)[0].square(), alpha2)

@pytest.mark.parametrize("steps", [80, 160, 400])
def test_halves_of_a_step_round_alike_in_every_precision(steps):
    """1000 i / N is often a half, which float32 and float64 put on different sides."""
    schedule, t = LDMDiscrete(), torch.arange(steps + 1, dtype=torch.float64) / steps
    alone = [schedule.shown(i / steps) for i in range(steps + 1)]
    for times in (t, t.float()):
        shown = schedule.shown(times)
        assert_close(shown.double(), torch.tensor(alone, dtype=torch.float64), rtol=0, atol=1e-7)
        alphas = schedule.alpha2[(1000 * shown).round().long()]
        assert_close(schedule(times)[0].flatten().square().double(), alphas, rtol=0, atol=1e-6)

@pytest.mark.parametrize("kind,name", [("v", "cosine"), ("x", "cosine"), ("eps", "ldm"), ("v", "ldm")])
@pytest.mark.parametrize("steps", [2, 7])
def test_data_in_one_point_is_sampled_exactly_in_n_evaluations(kind, name, steps):
    x0, schedule = torch.randn(1, 3, 4, 4, dtype=torch.double), SCHEDULES[name]()
    net = Point(x0, schedule, kind)
    z = torch.randn(5, 3, 4, 4, dtype=torch.double)
    x = ddim_sample(Denoiser(net, schedule, kind), z, steps)
    assert net.calls == steps
    a, s = schedule(0.0)                                     # LDM's last step keeps a trace of the noise
    tolerance = 1e-9 if name == "cosine" else 3 * s.item() + (1 - a.item())
    assert (x - x0).abs().max() < tolerance * (1 + z.abs().max())

def chance(x):
    """Times ~ U(0, 1] and noise for the images x."""
    return 1 - torch.rand(len(x), dtype=x.dtype), torch.randn_like(x)

def test_data_in_one_point_has_no_loss():
    """Also for t < 1/128, where both small steps end at 0."""
    x0 = torch.randn(1, 3, 4, 4, dtype=torch.double)
    x = x0.expand(2000, 3, 4, 4)
    loss, terms = training_loss(Denoiser(Point(x0, Cosine(), "v"), Cosine()), x, *chance(x), None, 0.15)
    assert max(loss, terms["v"], terms["x"]) < 1e-18

def test_gaussian_data_is_sampled_as_the_closed_form_says():
    """For N(m, d²) each DDIM step is linear in z − α m; with many steps the end is m + d · noise, the exact flow."""
    m, d, schedule = 0.3, 0.5, Cosine()
    z = torch.randn(200, 3, 4, 4, dtype=torch.double)
    gain = 1.0
    times = schedule.times(8)
    for t, t1 in zip(times, times[1:], strict=False):
        (a, s), (a1, s1) = ab(schedule, t), ab(schedule, t1)
        gain *= (a1 * a * d ** 2 + s1 * s) / (a ** 2 * d ** 2 + s ** 2)
    xhat = Denoiser(Gaussian(m, d, schedule), schedule)
    assert_close(ddim_sample(xhat, z, 8), m + gain * z)
    assert_close(ddim_sample(xhat, z, 2000), m + d * z, rtol=2e-3, atol=2e-3)

@pytest.mark.parametrize("schedule", [Cosine(), LDMDistilled()])
def test_the_steps_of_a_distilled_model_are_the_jumps_it_learned(schedule):
    """LDM's own rule for sampling does not nest."""
    for n in (64, 8, 4, 2):
        assert schedule.times(n)[::2] == schedule.times(n // 2) == schedule.equal_times(n // 2)
    assert LDMDiscrete().times(8)[::2] != LDMDiscrete().times(4)

def test_gaussian_data_has_the_loss_of_the_closed_form():
    """E‖v̂ − v‖² = E[d² / (α² d² + σ²)] over t; x' − x'' is linear in z and known at each t."""
    torch.manual_seed(0)
    m, d, n, step = 0.3, 0.5, 100_000, 1 / 128
    xhat = Denoiser(Gaussian(m, d, Cosine()), Cosine())
    x = m + d * torch.randn(n, 1, 1, 4, dtype=torch.double)
    _, terms = training_loss(xhat, x, *chance(x), None, 0.15, step)
    t = (np.arange(100_000) + 0.5) / 100_000
    assert_close(terms["v"].item(), gaussian_v(t, d), rtol=1.5e-2, atol=0)
    assert_close(terms["x"].item(), gaussian_x(t, d, step), rtol=3e-2, atol=0)

def gaussian_v(t, d):
    a, s = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
    return np.mean(d ** 2 / (a ** 2 * d ** 2 + s ** 2))

def gaussian_x(t, d, step):
    """E(x' − x'')²: with g(t → t') the gain of one DDIM step, both x are m + gain · (z − α m)."""
    t1, t2 = np.maximum(t - step, 0), np.maximum(t - 2 * step, 0)
    a, s = (lambda u: np.cos(np.pi * u / 2)), (lambda u: np.sin(np.pi * u / 2))
    var = lambda u: a(u) ** 2 * d ** 2 + s(u) ** 2  # noqa: E731
    gain = lambda u, w: (a(w) * a(u) * d ** 2 + s(w) * s(u)) / var(u)  # noqa: E731
    r = s(t2) / s(t)
    x1, x2 = a(t) * d ** 2 / var(t), (gain(t, t1) * gain(t1, t2) - r) / (a(t2) - r * a(t))
    return np.mean((x1 - x2) ** 2 * var(t))

def test_the_gradient_flows_only_through_the_first_evaluation():
    """The target x'' is made by the same weights, but is a constant to the gradient."""
    torch.manual_seed(0)
    scale = torch.tensor(0.7, requires_grad=True, dtype=torch.double)
    net = lambda z, t, y=None: scale * torch.tanh(z + 1)  # noqa: E731
    x = torch.randn(SHAPE, dtype=torch.double)

    def grad(b):
        return torch.autograd.grad(training_loss(Denoiser(net, Cosine()), x, t, eps, None, b)[0], scale)[0]

    t, eps = chance(x)                                       # by hand: the target from a frozen copy
    a, s = Cosine()(t)
    z = a * x + s * eps
    frozen = Denoiser(lambda z, t, y=None: 0.7 * torch.tanh(z + 1), Cosine())
    x2, _ = ddim_target(frozen, z, frozen(z, t), t, (t - 1 / 128).clamp(min=0), (t - 2 / 128).clamp(min=0))
    expected = torch.autograd.grad((a * z - s * net(z, t) - x2).square().mean(), scale)[0]
    assert expected.abs() > 1e-6
    assert_close(grad(1.0), expected)
    assert_close(grad(0.15), 0.85 * grad(0.0) + 0.15 * expected)

@pytest.mark.parametrize("b,evaluations", [(0.0, 1), (0.15, 2)])
def test_plain_training_pays_for_one_evaluation_and_distillation_for_two(b, evaluations):
    net = Point(torch.zeros(1, 3, 4, 4), Cosine(), "v")
    x = torch.randn(8, 3, 4, 4)
    training_loss(Denoiser(net, Cosine()), x, *chance(x), None, b)
    assert net.calls == evaluations

def test_guidance_is_null_plus_w_times_the_difference_and_one_batch():
    calls = []

    def net(z, t, y):
        calls.append(len(z))
        return z * 0 + y[:, None, None, None].to(z.dtype)

    xhat, y = Denoiser(net, Cosine(), "x", null=10), torch.tensor([0, 3, 9])
    z = torch.randn(3, 3, 4, 4)
    assert_close(xhat(z, 0.5, y, 2.5)[:, 0, 0, 0], 10 + 2.5 * (y.float() - 10))
    assert_close(xhat(z, 0.5, y)[:, 0, 0, 0], y.float())
    assert_close(xhat(z, torch.full((3,), 0.5), y, 2.5)[:, 0, 0, 0], 10 + 2.5 * (y.float() - 10))
    assert calls == [6, 3, 6]
    with pytest.raises(ValueError, match="null class"):
        Denoiser(net, Cosine(), "x")(z, 0.5, y, 2.0)

def test_start_noise_depends_on_seed_and_index_alone():
    a = start_noise(5, range(10), (3, 8, 8))
    assert_close(start_noise(5, [7, 2], (3, 8, 8)), a[[7, 2]], rtol=0, atol=0)
    assert not torch.equal(start_noise(6, [0], (3, 8, 8))[0], a[0])
    assert len(start_noise(5, range(40), (3, 8, 8)).flatten(1).unique(dim=0)) == 40
    assert abs(a.mean()) < 0.1 and abs(a.std() - 1) < 0.1
