"""No loop waits for a GPU between two lines of the log, as far as a machine without one can tell."""

import contextlib

import pytest
import torch
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distill
import train
from ddim import Denoiser, LDMDiscrete, ddim_sample
from model import UNet, UNetConfig
from plans import plan
from trainer import Trainer

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

class NeverWaiting(Trainer):
    """A Trainer without files, whose loop's body must not wait. PyTorch's fused Adam knows no "meta"."""

    def steps(self):
        self.opt.step = lambda: None
        for step in range(self.args.updates):
            with NoWaiting():
                yield step

@pytest.fixture
def network(monkeypatch):
    """A function that makes a tiny UNet on the device "meta"."""
    monkeypatch.setattr(torch, "Generator", NoGenerator)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kw: contextlib.nullcontext())

    def make(**kw):
        with META:
            return UNet(UNetConfig(**TINY | dict(attention=(2,)), **kw))

    return make

def test_the_dispatch_mode_sees_what_makes_a_gpu_wait():
    on_gpu, mask = torch.zeros(3, device=META), torch.ones(3, device=META) > 0
    for waits in (lambda: on_gpu.sum().item(), lambda: on_gpu[mask], lambda: torch.zeros(3).to(META)):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWaiting():
            waits()
    with NoWaiting():
        on_gpu + torch.tensor(2.0)

MODEL_INFO = dict(schedule="cosine", predicts="v", shape=[3, 8, 8])

def batch():
    return torch.empty(8, 3, 8, 8, device=META), torch.empty(8, dtype=torch.long, device=META)

@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_never_waits_for_the_gpu(network, accumulate):
    args = train.parse_args(["--updates", "3", "--batch", "8", "--dtype", "fp32", "--accumulate", str(accumulate)])
    args.out = None
    train.train(NeverWaiting(args, network(classes=3), META, MODEL_INFO), iter(batch, None), 0.15)

@pytest.mark.parametrize("schedule", ["dsdi", "tsd", "pd", "shortcut"])
@pytest.mark.parametrize("diffusion", ["cosine", "ldm"])
def test_distillation_never_waits_for_the_gpu(network, schedule, diffusion):
    """Nor where walks begin and end, and where a new depth does."""
    args = distill.parse_args(["--schedule", schedule, "--steps", "4", "--updates", "5"])
    vars(args).update(batch=8, dtype="fp32", out=None)
    net = network(classes=3, step_length=schedule == "shortcut")
    trainer = NeverWaiting(args, net, META, MODEL_INFO | dict(schedule=diffusion))
    trainer.schedule(torch.zeros(1, device=META))             # LDM's table is copied once
    steps = plan(schedule, 4, 5)
    distill.loop_of(schedule)(trainer, steps, iter(batch, None))

def test_sampling_never_waits_for_the_gpu(network):
    xhat = Denoiser(network(classes=3), LDMDiscrete(), "eps", 3)
    z, y = batch()
    with NoWaiting():
        ddim_sample(xhat, z, 4, y, w=2.0)

# ---- devices without float64 --------------------------------------------------------------------------------------
class NoFloat64(TorchDispatchMode):
    """Stands for Apple's MPS, which has no float64, by the device "meta"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not (torch.is_tensor(x) and x.device.type == "meta" and x.dtype == torch.float64), func
        return out

@pytest.mark.parametrize("schedule", ["dsdi", "pd", "shortcut"])
@pytest.mark.parametrize("diffusion", ["cosine", "ldm"])
def test_no_loop_needs_float64_on_mps(network, monkeypatch, schedule, diffusion):
    monkeypatch.setattr("ddim.WITHOUT_FLOAT64", {"meta"})
    args = distill.parse_args(["--schedule", schedule, "--steps", "4", "--updates", "3"])
    vars(args).update(batch=8, dtype="fp32", out=None)
    net = network(step_length=schedule == "shortcut")
    trainer = NeverWaiting(args, net, META, MODEL_INFO | dict(schedule=diffusion))
    trainer.schedule(torch.zeros(1, device=META))             # LDM's table is copied once
    with NoFloat64():
        distill.loop_of(schedule)(trainer, plan(schedule, 4, 3), iter(batch, None))
        ddim_sample(trainer.denoiser(), batch()[0], 4)
    args = train.parse_args(["--updates", "2", "--batch", "8", "--dtype", "fp32"])
    args.out = None
    with NoFloat64():
        train.train(NeverWaiting(args, network(), META, MODEL_INFO), iter(batch, None), 0.15)
