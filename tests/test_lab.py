"""Every method in the laboratory of lab.py, against the exact distribution: the oracle for changes to the loop."""

import lab
import pytest
import torch
from torch.testing import assert_close

from plans import METHODS

TWO, FOUR, EIGHT = (lab.STEPS.index(s) for s in (2, 4, 8))

@pytest.fixture(scope="module")
def mixture():
    return lab.Mixture()

@pytest.fixture(scope="module")
def net(mixture):
    return lab.trained(mixture)

def test_the_exact_denoiser_is_the_posterior_mean(mixture):
    """Against the mean of exact samples, weighted by the probability that each was what z_t shows."""
    x = mixture.draw(400_000, torch.Generator().manual_seed(0))[:, :, 0, 0].double()
    z, t = torch.tensor([0.5, 0.3], dtype=torch.float64), 0.4
    a, s = (float(v) for v in mixture.schedule(t))
    p = (-(z - a * x).square().sum(1) / (2 * s * s)).softmax(0)
    got = mixture(z.float()[None, :, None, None], t)[0, :, 0, 0]
    assert_close(got, (p[:, None] * x).sum(0).float(), atol=0.01, rtol=0)

def test_many_steps_with_the_exact_denoiser_give_the_exact_distribution(mixture):
    found = lab.distance(lab.points(mixture, 256), lab.exact_points(mixture, 4000))
    assert found < 1.2 * max(lab.noise_of_distances(mixture))

def test_the_trained_model_samples_as_the_exact_one(mixture, net):
    for ours, exact in zip(lab.distances(net, mixture), lab.distances(mixture, mixture), strict=True):
        assert abs(ours - exact) < 0.05

@pytest.mark.parametrize("schedule", METHODS)
def test_every_method_improves_few_step_samples(schedule, mixture, net):
    before = lab.distances(net, mixture)
    after = lab.distances(lab.in_the_lab(net, mixture, schedule, **lab.SETTINGS[schedule]), mixture)
    assert after[TWO] < 0.95 * before[TWO] and after[FOUR] < 0.8 * before[FOUR], (before, after)
    assert after[EIGHT] < 1.1 * before[EIGHT], (before, after)

def test_a_model_that_is_told_its_step_comes_to_rest(mixture, net):
    """It samples as well as anyone can tell in every number of steps, and three times the updates spoil nothing."""
    exact = max(lab.noise_of_distances(mixture))
    for updates in (600, 1800):
        settings = lab.SETTINGS["shortcut"] | dict(updates=updates)
        found = lab.distances(lab.in_the_lab(net, mixture, "shortcut", **settings), mixture)
        assert max(found) < exact, (updates, found)

def test_one_training_with_jumps_is_enough(mixture):
    found = lab.distances(lab.trained_to_jump(mixture), mixture)
    assert max(found) < max(lab.noise_of_distances(mixture)), found

def test_an_average_as_the_target_steadies_self_distillation(mixture, net):
    """The feedback of DSD: at this rate it blows up. With --target-ema it is better than TSD instead."""
    steadied = lab.distances(lab.in_the_lab(net, mixture, **lab.STEADIED), mixture)
    alone = lab.distances(lab.in_the_lab(net, mixture, **lab.STEADIED | dict(target_ema=0.0)), mixture)
    tsd = lab.distances(lab.in_the_lab(net, mixture, "tsd", lr=1e-4), mixture)
    assert not alone[TWO] < 2
    assert all(steadied[s] < tsd[s] for s in (TWO, FOUR, EIGHT)), (steadied, tsd)
