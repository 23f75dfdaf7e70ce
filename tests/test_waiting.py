"""What a GPU would do, as far as a machine without one can tell: that it never waits between two lines of the log, how
much it launches, how much memory it needs."""

import dataclasses
import re

import bench
import pytest
import torch
from conftest import ROOT, TINY
from pretend import META, Autocast, pretended_gpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddim import Denoiser, LDMDiscrete, ddim_sample
from ldm import MODELS
from model import CONFIGS, UNet, UNetConfig

# Kernels of an update of the tiny network: what was counted, and a tenth more.
KERNELS = {"plain": 660, "--distill 0.15": 960, "--distill 0.25 --shortcut": 1450, "dsdi": 980,
           "dsdi --target-ema D, D = --ema": 1070, "dsdi --target-ema D": 1070, "tsd": 1370, "pd": 1390,
           "shortcut": 1740}

@pytest.fixture
def tiny(monkeypatch):
    """A function: bench.py's settings for tiny networks with classes, ours and one of LDM's, in mixed precision."""
    config = TINY | dict(attention=(2,), classes=3)
    monkeypatch.setitem(CONFIGS, "toy", config)
    monkeypatch.setitem(MODELS, "imagenet256", dataclasses.replace(
        MODELS["imagenet256"], unet=UNetConfig(**config, context_dim=8)))

    def settings(*flags, model="toy"):
        return bench.parse_args(["--model", model, "--size", "8", "--batch", "8", "--dtype", "bf16", *flags])

    return settings

# ---- the pretended GPU --------------------------------------------------------------------------------------------
def test_it_sees_what_makes_a_gpu_wait():
    with pretended_gpu() as gpu:
        on_gpu, gpu.waiting = torch.zeros(3, device=META), False
        for waits in (lambda: on_gpu.sum().item(), lambda: on_gpu[on_gpu > 0], lambda: torch.zeros(3).to(META),
                      lambda: on_gpu.cpu(), lambda: torch.zeros(()).to(META), lambda: torch.tensor([1.0], device=META)):
            with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
                waits()
        on_gpu + torch.tensor(2.0)                            # a number is part of the command
        torch.full((3,), 2.0, device=META)

def test_it_counts_kernels_and_the_memory_of_tensors_while_they_live():
    with pretended_gpu() as gpu:
        x = torch.zeros(1000, device=META)
        y = (x + 1).view(10, 100)[2:] * 2                     # the sum is freed; views are no kernels
        assert (gpu.kernels, gpu.memory, gpu.peak) == (3, 4000 + 3200, 4000 + 4000 + 3200)
        del x, y
        assert gpu.memory == 0

def test_its_autocast_is_that_of_cuda():
    """Convolutions and products in bfloat16, norms in float32; weights are cast once; off where that is asked."""
    with pretended_gpu() as gpu, META:
        conv, norm, linear = torch.nn.Conv2d(4, 4, 1), torch.nn.GroupNorm(2, 4), torch.nn.Linear(2, 4)
        with Autocast("meta"):
            h = conv(torch.zeros(1, 4, 2, 2))
            before = gpu.kernels
            conv(h)
            assert gpu.kernels == before + 1                  # nothing is cast again
            assert [h.dtype, norm(h).dtype, linear(h).dtype] == [torch.bfloat16, torch.float32, torch.bfloat16]
            with Autocast("meta", enabled=False):
                assert linear(h.float()).dtype == torch.float32

# ---- updates ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*bench.TRAININGS, *bench.METHODS])
def test_an_update_never_waits_and_launches_no_more_than_it_did(name, tiny):
    """From the batch to the average, by trainer.steps(): autocast, clipping, Adam; where walks end and depths begin."""
    trainer, gpu = bench.rehearsed(tiny(), name, steps=4, updates=3, log_every=2)
    assert (trainer.step, trainer.lines) == (3, 2)
    assert 0.8 * KERNELS[name] < max(trainer.kernels[1:]) <= KERNELS[name]

@pytest.mark.parametrize("name", ["--distill 0.15", "dsdi", "shortcut"])
def test_parts_of_a_batch_do_not_wait_and_need_less_memory(name, tiny):
    whole, parts = (bench.rehearsed(tiny(), name, steps=4, updates=2, accumulate=k)[1].peak for k in (1, 4))
    assert parts < whole

@pytest.mark.parametrize("name", ["dsdi", "pd", "shortcut"])
def test_updates_of_ldms_models_never_wait(name, tiny):
    assert bench.rehearsed(tiny(model="imagenet256"), name, steps=4, updates=3)[0].step == 3

def test_sampling_never_waits_for_the_gpu():
    with pretended_gpu() as gpu:
        with META:
            xhat = Denoiser(UNet(UNetConfig(**TINY, classes=3)), LDMDiscrete(), "eps", 3)
            xhat.schedule(torch.zeros(1))                     # its table is copied once
            z, y = torch.empty(8, 3, 8, 8), torch.empty(8, dtype=torch.long)
        gpu.waiting = False
        ddim_sample(xhat, z, 4, y, w=2.0)

@pytest.mark.parametrize("model,row", [("celebahq256", 0), ("imagenet256", 1)])
def test_the_memory_that_the_docs_say_is_what_is_counted(model, row):
    """Tensor by tensor, for the real network, and 1.5 GB for CUDA and its libraries; to a tenth."""
    page = (ROOT / "docs" / "ldm.md").read_text()
    told = re.findall(r"^\| distilling \w+, batch 8.* \| (\d+) GB", page, flags=re.M)[row]
    args = bench.parse_args(["--model", model, "--batch", "8", "--dtype", "bf16"])
    assert bench.rehearsed(args, "dsdi", updates=2)[1].peak / 1e9 + 1.5 == pytest.approx(float(told), rel=0.1)

def test_training_small32_with_jumps_needs_no_more_memory_than_equation_1():
    args = bench.parse_args(["--model", "small32", "--batch", "64"])
    jumps, theirs = (bench.rehearsed(args, f"--distill {b}")[1].peak for b in ("0.25 --shortcut", "0.15"))
    assert 0 < jumps < theirs

# ---- devices without float64 --------------------------------------------------------------------------------------
class NoFloat64(TorchDispatchMode):
    """Stands for Apple's MPS, which has no float64, by the device "meta"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not (torch.is_tensor(x) and x.device.type == "meta" and x.dtype == torch.float64), func
        return out

@pytest.mark.parametrize("model,name", [("toy", "--distill 0.15"), ("toy", "pd"), ("toy", "shortcut"),
                                        ("imagenet256", "dsdi"), ("imagenet256", "shortcut")])
def test_no_loop_needs_float64_on_mps(model, name, tiny, monkeypatch):
    monkeypatch.setattr("ddim.WITHOUT_FLOAT64", {"meta"})
    with NoFloat64():
        trainer, _ = bench.rehearsed(tiny(model=model), name, steps=4, updates=2)
        with pretended_gpu():
            ddim_sample(trainer.denoiser(), torch.empty(8, 3, 8, 8, device=META), 4,
                        torch.zeros(8, dtype=torch.long, device=META))
