"""Measure what an update of distillation costs: time and peak memory of each method, side by side.

    python bench.py                                       # small32 at 32x32, batch 32
    python bench.py --model unet64 --size 64 --batch 8    # the 37 M network of the 64x64 presets
    python bench.py --model imagenet256 --batch 8 --methods dsdi    # LDM's, guided, on latents

Time: the methods take turns in one process, update by update, and the median counts; the network has random
weights, which cost the same as trained ones. Memory: the peak of a process of its own for each method (on a GPU,
of what was allocated there).
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time

import torch
from tqdm import tqdm

import distill
from ldm import DIFFUSION, MODELS
from model import CONFIGS, UNet, UNetConfig, param_count, pick_device, pick_dtype

# What one update needs: evaluations, of which one with a backward pass, and copies of the weights beside the student's
METHODS = {
    "dsdi": (dict(schedule="dsdi"), 2, "–"),
    "dsdi --target-ema D, D = --ema": (dict(schedule="dsdi", target_ema=0.98), 2, "–"),
    "dsdi --target-ema D": (dict(schedule="dsdi", target_ema=0.9), 2, "average"),
    "tsd": (dict(schedule="tsd"), 3, "teacher"),
    "pd": (dict(schedule="pd"), 3, "teacher"),
}


def config_of(name):
    return UNetConfig(**CONFIGS[name]) if name in CONFIGS else MODELS[name].unet


class Method:
    """One of METHODS, ready to be called once for each update."""

    def __init__(self, args, name):
        device = pick_device(args.device)
        settings = distill.parse_args(["--updates", "10000", "--lr", "1e-6"])
        vars(settings).update(METHODS[name][0], batch=args.batch, compile=args.compile,
                              checkpointing=args.checkpointing, ema_device=args.ema_device,
                              dtype=pick_dtype(args.dtype, device))
        torch.manual_seed(0)
        diffusion = dict(schedule="cosine", predicts="v") if args.model in CONFIGS else DIFFUSION
        about = diffusion | dict(shape=[3, args.size, args.size])
        images = torch.rand(args.batch, *about["shape"], device=device) * 2 - 1
        labels = torch.zeros(args.batch, dtype=torch.long, device=device)
        self.run, self.updates = distill.setup(
            settings, UNet(config_of(args.model)), device, about, iter(lambda: (images, labels), None))

    def __call__(self):
        with self.run.autocast():
            loss, _ = self.updates(self.run.step)
        self.run.update(loss)
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)


def seconds(args):
    """Median seconds per update of each method, the methods taking turns."""
    methods, times = {name: Method(args, name) for name in args.methods}, {name: [] for name in args.methods}
    for repeat in tqdm(range(args.repeats + 2), desc="timing", unit="round", dynamic_ncols=True):
        for name, update in methods.items():
            start = time.perf_counter()
            update()
            if repeat >= 2:                                   # the first ones warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def peak(args, name):
    """Peak memory in bytes of a few updates of a method; meant for a fresh process."""
    update = Method(args, name)
    for _ in range(4):
        update()
    if update.run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(update.run.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peaks(args):
    """`peak` of each method, each in a process of its own."""
    found = {}
    for name in tqdm(args.methods, desc="memory", unit="method", dynamic_ncols=True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(peak, (args, name))
    return found


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=[*CONFIGS, *MODELS], default="small32", help="the UNet (default: small32)")
    p.add_argument("--size", type=int, help="side of the images in pixels; for LDM's: of the latents (default: 32; 64)")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="METHOD",
                   help=f"of {', '.join(METHODS)} (default: all of them, which are in memory together when timed)")
    p.add_argument("--batch", type=int, default=32, help="images per update (default: 32)")
    p.add_argument("--repeats", type=int, default=20, help="updates of each method that count (default: 20)")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    p.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                   help="precision of the network's insides (default: bf16 where the hardware has it)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the network")
    p.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="as in distill.py")
    p.add_argument("--ema-device", choices=["same", "cpu"], default="same", help="as in distill.py")
    args = p.parse_args(argv)
    args.size = args.size if args.size is not None else 32 if args.model in CONFIGS else 64
    if min(args.size, args.batch, args.repeats) < 1:
        p.error("--size, --batch and --repeats must be at least 1")
    sides = 2 ** (len(config_of(args.model).mult) - 1)
    if args.size % sides:
        p.error(f"--size {args.size} must be divisible by {sides}, as {args.model} halves the image")
    return args


def main(argv=None):
    args = parse_args(argv)
    memory, times = peaks(args), seconds(args)
    with torch.device("meta"):
        weights = param_count(UNet(config_of(args.model))) * 4 / 2 ** 20
    print(f"\n{args.model} ({weights:.1f} MiB of weights), {args.size}x{args.size}, batch {args.batch}, "
          f"medians of {args.repeats}\n")
    print("| method | evaluations | further weights | s/update | of TSD | peak MiB | TSD − this |")
    print("|---|---|---|---|---|---|---|")
    for name in args.methods:
        _, evaluations, further = METHODS[name]
        ratio, saved = "–", "–"
        if "tsd" in times:
            ratio, saved = f"{times[name] / times['tsd']:.2f}", f"{(memory['tsd'] - memory[name]) / 2 ** 20:,.1f}"
        print(f"| {name} | {evaluations} | {further} | {times[name]:.4g} | {ratio} "
              f"| {memory[name] / 2 ** 20:,.0f} | {saved} |")


if __name__ == "__main__":
    main()
