"""What makes the loops fast on a GPU, as far as a machine without one can tell."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distill
import train
from ddim import Denoiser, LDMDiscrete, sample
from model import UNet, UNetConfig

TINY = dict(channels=8, mult=(1, 2), blocks=1, attention=(2,), groups=4, head_channels=8)
META = torch.device("meta")


class NoWaiting(TorchDispatchMode):
    """Stands for a GPU by the device "meta", whose tensors have no values: to ask for one is an error by itself, and a
    copy from one device to the other is one here. A number (no dimensions) on the CPU is part of the command.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x) and x.ndim}
        assert len(devices) < 2, f"{func} goes from one device to another, for which a GPU has to be waited for"
        return out


class NoGenerator:
    """There is none for "meta": random numbers are then those of no generator, None."""

    def __init__(self, device):
        pass

    def manual_seed(self, seed):
        pass


@pytest.fixture
def meta(monkeypatch):
    monkeypatch.setattr(torch, "Generator", NoGenerator)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kw: contextlib.nullcontext())

    def network(**kw):
        with META:
            return UNet(UNetConfig(**TINY, **kw))

    return network


def test_the_dispatch_mode_sees_what_makes_a_gpu_wait():
    on_gpu, mask = torch.zeros(3, device=META), torch.ones(3, device=META) > 0
    for waits in (lambda: on_gpu.sum().item(), lambda: on_gpu[mask], lambda: torch.zeros(3).to(META)):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWaiting():
            waits()
    with NoWaiting():
        on_gpu + torch.tensor(2.0)


ABOUT = dict(schedule="cosine", predicts="v", shape=[3, 8, 8])


def batch():
    return torch.empty(8, 3, 8, 8, device=META), torch.empty(8, dtype=torch.long, device=META)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_never_waits_for_the_gpu(meta, accumulate):
    args = train.parse_args(["--updates", "9", "--batch", "8", "--dtype", "fp32", "--accumulate", str(accumulate)])
    run = train.Run(args, meta(classes=3), META, ABOUT)
    losses = train.Losses(run, iter(batch, None), 0.15)
    run.opt.step = lambda: None                               # PyTorch's fused Adam knows no "meta"
    with NoWaiting():
        run.update(losses(0))


@pytest.mark.parametrize("schedule", ["dsdi", "tsd", "pd"])
@pytest.mark.parametrize("diffusion", ["cosine", "ldm"])
def test_distillation_never_waits_for_the_gpu(meta, schedule, diffusion):
    """Nor where walks begin and end; only a new depth has its times copied, once."""
    args = distill.parse_args(["--schedule", schedule, "--steps", "8", "--updates", "12"])
    vars(args).update(batch=8, dtype="fp32", stagger=schedule == "dsdi")
    about = ABOUT | dict(schedule=diffusion)
    run, updates = distill.setup(args, meta(classes=3), META, about, iter(batch, None))
    for steps in (8, 4, 2):
        run.schedule.grid(steps, META)
    run.schedule(torch.zeros(1, device=META))                 # LDM's table
    run.opt.step = lambda: None
    with NoWaiting():
        for step in range(12):
            run.update(updates(step))


def test_sampling_never_waits_for_the_gpu(meta):
    xhat = Denoiser(meta(classes=3), LDMDiscrete(), "eps", 3)
    z, y = batch()
    with NoWaiting():
        sample(xhat, z, 4, y, w=2.0)
