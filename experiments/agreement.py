"""That a GPU computes what the CPU does: the part of gpu.py that looks for mistakes.

Each check takes gpu.py's settings and returns (title, rows); a row says with `ok` whether it kept its limits.
"""

import contextlib
import copy
import os
import signal
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import bench
import numpy as np
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from gradients import METHODS, gradients

import distill
import train
from checkpoint import load_checkpoint
from ddim import Denoiser, ddim_sample
from ldm import DIFFUSION, MODELS, AutoencoderConfig
from model import CONFIGS, UNet, UNetConfig
from runtime import autocast, memory_format, progress
from trainer import Trainer, batches

CPU, OURS = torch.device("cpu"), dict(schedule="cosine", predicts="v")

def off(a, b):
    """‖a − b‖ / ‖b‖ of two tensors, or of all tensors of two dicts, in float64."""
    a, b = (torch.cat([x.detach().cpu().double().flatten() for x in tree_leaves(tensors)]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()

def judged(row, **limits):
    """A row, with whether all of these values are at most their limits: NaN is not."""
    return row | dict(ok=all(row[name] <= limit for name, limit in limits.items()))

# ---- networks ---------------------------------------------------------------------------------------------------
def small(model):
    """One of LDM's models with all of its parts, in a small size."""
    unet = replace(model.unet, channels=64, mult=(1, 2), blocks=1, attention=(2,), classes=min(model.unet.classes, 10))
    return replace(model, unet=unet, autoencoder=AutoencoderConfig(channels=32, mult=(1, 1, 2), blocks=1, codes=64))

def awake(config):
    """A network of random weights, of which none are zero."""
    torch.manual_seed(0)
    net = UNet(config)
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return net

def copied(net, device, dtype):
    return copy.deepcopy(net).to(device, dtype, memory_format=memory_format(device))

def evaluation(net, device, dtype, precision="fp32"):
    """(output, gradients by name) of a copy of a network, given the same numbers on every device."""
    net, chance = copied(net, device, dtype), torch.Generator().manual_seed(1)
    z, t = torch.randn(2, 3, 16, 16, generator=chance), torch.rand(2, generator=chance)
    y = torch.tensor([0, 3]).to(device) if net.config.classes else None
    with autocast(device, precision):
        out = net(z.to(device, dtype), t.to(device, dtype), y)
    out.square().sum().backward()
    return out, {name: p.grad for name, p in net.named_parameters()}

def networks(args):
    """Outputs and gradients of every config, beside the CPU's in float64."""
    configs, rows = {name: UNetConfig(**settings) for name, settings in CONFIGS.items()}, []
    configs |= {f"{name}, small": small(MODELS[name]).unet for name in ("celebahq256", "imagenet256")}
    for name, config in progress(iterable=configs.items(), desc="networks"):
        net, row = awake(config), {"network": name}
        exact = evaluation(net, CPU, torch.float64)
        for where, device, precision in (("CPU", CPU, "fp32"), ("here", args.device, "fp32"),
                                         ("here, bf16", args.device, "bf16")):
            out, grads = evaluation(net, device, torch.float32, precision)
            row |= {where: off(out, exact[0]), f"gradients, {where}": off(grads, exact[1])}
        rows.append(judged(row, **{"here": 1e-5, "gradients, here": 1e-4}))
    return "Off the CPU's float64. Here in float32 at most 1e-5, and 1e-4 of the gradients", rows

def sampling(args):
    """DDIM in 8 steps, beside the CPU's in float64."""
    plain, rows = small(MODELS["imagenet256"]).unet, []
    for name, config, info, w in (("cosine, v", plain, OURS, 1.0), ("LDM's, ε, guided", plain, DIFFUSION, 2.0),
                                  ("cosine, v, told lengths", replace(plain, step_length=True), OURS, 1.0)):
        net, z, y = awake(config), torch.randn(4, 3, 8, 8), torch.arange(4)
        exact, cpu, here = (
            ddim_sample(Denoiser.of(copied(net, device, dtype), info), z.to(device, dtype), 8, y.to(device), w)
            for device, dtype in ((CPU, torch.float64), (CPU, torch.float32), (args.device, torch.float32)))
        rows.append(judged({"DDIM": name, "CPU": off(cpu, exact), "here": off(here, exact)}, here=1e-4))
    return "Samples in 8 steps, off the CPU's float64. Here in float32 at most 1e-4", rows

# ---- updates ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def same_chance():
    """Random numbers within are drawn on the CPU, whatever the device: the same ones on all."""
    class OnCPU:
        def __new__(cls, device=None, kind=torch.Generator):
            return kind()
    def on_cpu(kind):
        return lambda *args, device=None, **kw: kind(*args, **kw).to(device)
    with contextlib.ExitStack() as patches:
        for name in ("rand", "randn", "randint"):
            patches.enter_context(mock.patch.object(torch, name, on_cpu(getattr(torch, name))))
        patches.enter_context(mock.patch.object(torch, "Generator", OnCPU))
        yield

def methods(args):
    """Gradients of the losses of each method, beside the CPU's: float64 shows three real updates before as well."""
    rows, numbers = [], {"float32": (torch.float32, 1e-9), "float64": (torch.float64, 1e-3)}
    for name in progress(iterable=METHODS, desc="methods"):
        row = {"method": name}
        for what, (dtype, lr) in numbers.items():
            with same_chance():
                row[what] = off(*(gradients(name, 1, str(device), dtype, lr) for device in (args.device, CPU)))
        rows.append(judged(row, float32=1e-4, float64=1e-8))
    return ("Gradients of a fourth update, off the CPU's: in float32 at most 1e-4; in float64, after three updates "
            "at a rate of 1e-3, at most 1e-8"), rows

class NeverWaiting(Trainer):
    """A Trainer whose loop may wait for the GPU at a line of the log; elsewhere that is an error."""

    def debug(self, mode):
        """What waiting is on a GPU: an error, or nothing special ("default")."""
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    def steps(self):
        self.debug("error")
        try:
            yield from super().steps()
        finally:
            self.debug("default")

    def _means(self, *args):
        self.debug("default")
        means = super()._means(*args)
        self.debug("error")
        return means

def waiting(args):
    """20 updates of each method, in which only lines of the log may wait."""
    given, updates, rows = args.bench("--model toy --size 16 --batch 8"), 4 if args.tiny else 20, []
    x, y = torch.randn(given.batch, 3, given.size, given.size), torch.zeros(given.batch, dtype=torch.long)
    images = SimpleNamespace(batch=lambda *which: (x, y))
    for name in [*bench.TRAININGS, *bench.METHODS]:
        stream = batches(images, SimpleNamespace(batch=given.batch, seed=0, flip=True), 0, given.device)
        loop, trainer = bench.updates_of(given, name, kind=NeverWaiting, stream=stream, updates=updates, steps=4,
                                         log_every=updates // 2)
        why = "–"
        try:
            loop()
        except RuntimeError as e:
            why = " ".join(str(e).split())[:200]
        finally:
            trainer.debug("default")
        rows.append({"method": name, "updates": trainer.step, "waits": why, "ok": trainer.step == updates})
    return "Updates in which nothing but a line of the log waits for the GPU (set_sync_debug_mode)", rows

# ---- runs -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def ctrl_c_after(updates):
    """Interrupts a run after so many updates, as Ctrl-C does: it saves and ends."""
    number, update = count(1), Trainer.update
    def counted(trainer):
        update(trainer)
        if next(number) == updates:
            signal.raise_signal(signal.SIGINT)
    with contextlib.suppress(SystemExit), mock.patch.object(Trainer, "update", counted):
        yield

def resuming(args):
    """Weights of a run that was stopped and resumed, beside those of one that was not, bit for bit."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"         # without which cuBLAS is not deterministic
    torch.use_deterministic_algorithms(True)
    folder, draw, rows = args.runs / "resume", np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(8):
        Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / "images" / f"{i}.png")
    net = ["--size", "8", "--channels", "16", "--mult", "1", "2", "--attention", "2", "--head-channels", "16",
           "--dropout", "0.1", "--sample-every", "0", "--data", str(folder / "images"), "--cache", str(folder)]
    for name, main, flags in (("train", train.main, ["--distill", "0.15", *net]),
                              ("distill", distill.main, ["--steps", "8", "--ckpt", str(folder / "train" / "ckpt.pt")])):
        flags += ["--updates", "8", "--batch", "8", "--device", str(args.device), "--overwrite", "--out"]
        outs = [folder / name, folder / f"{name}-resumed"]
        main([*flags, str(outs[0])])
        with ctrl_c_after(3):
            main([*flags, str(outs[1])])
        main(["--resume", "--out", str(outs[1])])
        one, two = (load_checkpoint(out / "ckpt.pt") for out in outs)
        differ = sum(not torch.equal(a, two[key][p]) for key in ("weights", "ema") for p, a in one[key].items())
        rows.append(judged({"run": f"{name}.py", "tensors that differ": differ}, **{"tensors that differ": 0}))
    return "8 updates, stopped after 3 and resumed, beside 8 at once (deterministic algorithms): bit for bit", rows
