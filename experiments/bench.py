"""Measure how fast everything is, side by side: training, distillation, sampling, features for FID, reading data.

    python experiments/bench.py                                                    # small32 at 32x32 on this machine
    python experiments/bench.py train distill --model unet64 --size 64 --batch 8   # some of it, a larger network
    python experiments/bench.py --model unet64 --batch 128 --compile default       # on a GPU: eager and compiled
    python experiments/bench.py distill --model imagenet256 --batch 8 --methods dsdi    # LDM's, guided, on latents
    python experiments/bench.py counted --model imagenet256 --batch 8    # kernels and memory of a GPU, without one

All that a table compares takes turns in one process, call by call, and medians count: a machine that is busy for
a while slows all alike. Networks have random weights, which cost the same as trained ones. Where diffusers or
pytorch-fid are installed, they have a row too. Leaves OUT/bench.md, and OUT/bench.json with every single time.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import re
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from pretend import META, Rehearsal, pretended_gpu

import distill
import train
from checkpoint import whole_file
from data import load_data
from flags import at_least, device_flags
from inception import Features, Inception
from ldm import DIFFUSION, MODELS, Autoencoder
from model import CONFIGS, UNet, UNetConfig, param_count
from plans import plan
from runtime import log_stderr, memory_format, pick_device, pick_dtype, progress
from sample import Sampler
from shortcut import shortcut
from trainer import Trainer

# Updates of train.py, and the weight b of each in Equation 1, or the share of rows that jump
TRAININGS = {"plain": 0.0, "--distill 0.15": 0.15, "--distill 0.25 --shortcut": 0.25}

# What one update of a distillation needs: flags, evaluations of each row on average (one of them with a backward pass),
# copies of the weights
METHODS = {
    "dsdi": (dict(schedule="dsdi"), 2, "–"),
    "dsdi --target-ema D, D = --ema": (dict(schedule="dsdi", target_ema=0.98), 2, "–"),
    "dsdi --target-ema D": (dict(schedule="dsdi", target_ema=0.9), 2, "average"),
    "tsd": (dict(schedule="tsd"), 3, "teacher"),
    "pd": (dict(schedule="pd"), 3, "teacher"),
    "shortcut": (dict(schedule="shortcut", target_ema=0.95, guidance=[2.0, 2.0]), 2.5, "anchor, average"),
}

# ---- measuring ----------------------------------------------------------------------------------------
def wait(device):
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

def race(contestants, repeats, device, title):
    """{name: [seconds of a call, …]} of {name: function without arguments}, which take turns.

    The first calls warm up, and compile. On a GPU ten calls count as one look at the clock: a real loop waits for none.
    """
    times, at_once = {name: [] for name in contestants}, 10 if device.type == "cuda" else 1
    with progress(total=(repeats + 1) * len(contestants), desc=title, unit="call") as bar:
        for repeat in range(repeats + 1):
            for name, call in contestants.items():
                for _ in range(0 if repeat else 2):
                    call()
                wait(device)
                start = time.perf_counter()
                for _ in range(at_once):
                    call()
                wait(device)
                times[name] += [(time.perf_counter() - start) / at_once] if repeat else []
                bar.update()
    return times

def table_rows(times, images, reference=None):
    """A dict for each of `race`'s contestants: the median, images per second, how many times as fast as `reference`.

    images  in each call
    """
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    against = {f"times as fast as {reference}": medians[reference]} if reference in medians else {}
    return [{"what": name, "s": median, "images/s": images / median} | {k: s / median for k, s in against.items()}
            | {"seconds": times[name]} for name, median in medians.items()]

def matmul_peak(device, dtype, n=4096, repeats=10):
    """FLOP/s of a plain n x n matrix product: what arithmetic can reach here, measured."""
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16 if dtype == "bf16" else torch.float32) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")                # TF32 on a GPU, as its convolutions have it
    times = race({"": lambda: a @ b}, repeats, device, f"{n} x {n} matrix product")
    torch.set_float32_matmul_precision(before)
    return 2 * n ** 3 / statistics.median(times[""])

def flops(call):
    """The floating-point operations of the convolutions and matrix products in a call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()

# ---- one update at a time -----------------------------------------------------------------------------
class OneUpdate(Trainer):
    """A Trainer whose loop ends after one update, to be called again for the next. Writes nothing."""

    def steps(self):
        yield self.step
        self.step += 1
        self.pending.clear()

def model_of(args):
    """(UNetConfig of --model, what a checkpoint would say of it)."""
    small = args.model in CONFIGS
    diffusion = dict(schedule="cosine", predicts="v") if small else DIFFUSION
    return (UNetConfig(**CONFIGS[args.model]) if small else MODELS[args.model].unet,
            diffusion | dict(shape=[3, args.size, args.size]))

def network(args, step_length=False):
    """The UNet of --model with random weights, on the device."""
    with args.device:
        return UNet(replace(model_of(args)[0], step_length=step_length))

def one_update(script, args, net, layout=None, kind=OneUpdate, stream=None, **settings):
    """(Trainer of a network with the flags of train.py or distill.py at next to no learning rate, a stream of data).

    kind  the Trainer's class;  stream  None: random data, always the same;  settings  flags by name"""
    flags = script.parse_args(["--updates", "1000000", "--lr", "1e-6"])
    vars(flags).update(dict(batch=args.batch, dtype=args.dtype, checkpointing=args.checkpointing, out=None) | settings)
    trainer = kind(flags, net.requires_grad_(True), args.device, model_of(args)[1])
    layout = layout or memory_format(args.device)
    trainer.net.to(memory_format=layout)
    x = torch.rand(args.batch, *trainer.model_info["shape"], device=args.device) * 2 - 1
    x, y = x.contiguous(memory_format=layout), torch.zeros(args.batch, dtype=torch.long, device=args.device)
    return trainer, stream or iter(lambda: (x, y), None)

def training(args, name, net=None, layout=None, **settings):
    """(A function that makes one update of train.py's loop, or of shortcut.py's, by one of TRAININGS; its Trainer)."""
    net = net or network(args, name.endswith("--shortcut"))
    trainer, stream = one_update(train, args, net, layout, **settings)
    loop = partial(shortcut, weight=3.0) if net.config.step_length else train.train
    return (lambda: loop(trainer, stream, TRAININGS[name])), trainer

def distillation(args, name, **settings):
    """(A function that makes one update of distill.py's loop by one of METHODS, its Trainer)."""
    torch.manual_seed(0)
    settings = METHODS[name][0] | settings
    net = network(args, settings["schedule"] == "shortcut")
    trainer, stream = one_update(distill, args, net, **dict(compile=args.compile) | settings)
    steps = plan(trainer.args.schedule, trainer.args.steps, trainer.args.updates)
    loop = distill.loop_of(trainer.args.schedule)
    return (lambda: loop(trainer, steps, stream)), trainer

def updates_of(args, name, **settings):
    """`training` or `distillation`, by its name."""
    return (training if name in TRAININGS else distillation)(args, name, **settings)

class DiffusersUNet(nn.Module):
    """diffusers' UNet2DModel of the same widths, depth, attention and parameter count."""

    def __init__(self, c, size):
        super().__init__()
        from diffusers import UNet2DModel
        attends, self.config = [2 ** i in c.attention for i in range(len(c.mult))], c
        self.net = UNet2DModel(
            sample_size=size, in_channels=c.in_channels, out_channels=c.in_channels, layers_per_block=c.blocks,
            block_out_channels=[m * c.channels for m in c.mult], attention_head_dim=c.head_channels,
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            norm_num_groups=c.groups, norm_eps=1e-5, dropout=c.dropout)

    def forward(self, z, t):
        return self.net(z, 1000 * t).sample

# ---- what is measured: each returns (title, rows) ---------------------------------------------------------
def no_row(package, error):
    """Say why a comparison is missing: as the end of a title."""
    return f"; no row for {package}, which can't be used here ({' '.join(str(error).split())[-120:]})"

def train_rows(args, names=TRAININGS):
    """Updates of train.py: forward, backward, clipping, Adam, average."""
    config, missing = model_of(args)[0], ""
    modes = ["", args.compile] if args.compile else [""]
    named = lambda name, mode: name + (f" --compile {mode}" if mode else "")  # noqa: E731
    calls = {named(name, mode): training(args, name, compile=mode)[0] for mode in modes for name in names}
    theirs = partial(training, args, "plain")
    try:
        for mode in modes:
            calls[named("diffusers", mode)] = theirs(DiffusersUNet(config, args.size), torch.contiguous_format,
                                                     compile=mode)[0]
        calls["diffusers, channels last"] = theirs(DiffusersUNet(config, args.size), torch.channels_last)[0]
    except (ImportError, RuntimeError) as e:                  # the latter is how diffusers tells of a broken one
        missing = no_row("diffusers", e)
    work = {name: flops(training(args, name)[0]) / 1e9 for name in names}
    times = race(calls, args.repeats, args.device, "training")
    eager = [name for name in times if name.startswith("diffusers") and "--compile" not in name]
    best = min(eager or ["plain"], key=lambda name: statistics.median(times[name]))
    reachable, rows = matmul_peak(args.device, args.dtype), table_rows(times, args.batch, best)
    for row in rows:
        row["GFLOP"] = work.get(row["what"].split(" --compile")[0], work["plain"])
        row["MFU"] = 1e9 * row["GFLOP"] / row["s"] / reachable
    tell_at_work(rows, calls, args)
    return (f"Training updates of {args.batch} (MFU: GFLOP counted for our network, over the {reachable / 1e12:.3g} "
            f"TFLOP/s that a {args.dtype} product of two 4096 x 4096 matrices reaches){missing}", rows)

def peak(args, name):
    """Peak memory in bytes of a few updates of a method; on a CPU meant for a fresh process."""
    args.device = pick_device(str(args.device))               # sets up the process as for a run
    if args.device.type == "cuda":
        gc.collect()                                          # of the method before
        torch.cuda.reset_peak_memory_stats(args.device)
    update, _ = distillation(args, name)
    for _ in range(4):
        update()
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated(args.device)
    status = Path("/proc/self/status")                        # elsewhere than on Linux there is no such number
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) if status.exists() else float("nan")

def memory_of(args, name):
    """`peak` of a method, beside which nothing counts: on a CPU that takes a process of its own."""
    if args.device.type == "cuda":
        return peak(args, name)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (args, name))

def distill_rows(args):
    """Updates of distill.py, method by method, and their peak memory."""
    memory = {name: memory_of(args, name) / 2 ** 20
              for name in progress(iterable=args.methods, desc="memory", unit="method")}
    calls = {name: distillation(args, name)[0] for name in args.methods}
    times = race(calls, args.repeats, args.device, "distillation")
    rows = table_rows(times, args.batch)
    for row in rows:
        _, row["evaluations"], row["further weights"] = METHODS[row["what"]]
        row["peak MiB"] = memory[row["what"]]
        if "tsd" in times:
            row["time of TSD's"] = row["s"] / statistics.median(times["tsd"])
            row["MiB less than TSD"] = memory["tsd"] - memory[row["what"]]
    tell_at_work(rows, calls, args)
    with torch.device("meta"):
        weights = param_count(UNet(model_of(args)[0])) * 4 / 2 ** 20
    return f"Distillation updates of {args.batch} ({weights:.1f} MiB of weights)", rows

def sample_rows(args):
    """Images of sample.py's sampler, from noise to pixels, through LDM's decoder where there is one."""
    config, model_info = model_of(args)
    if args.model in MODELS:
        model_info |= dict(ldm=args.model, autoencoder=Autoencoder(MODELS[args.model].autoencoder).state_dict())
    net = UNet(config).to(args.device, memory_format=memory_format(args.device)).eval().requires_grad_(False)
    sampler = Sampler(net, model_info, args.device, args.dtype, list(range(config.classes)) or None)
    calls = {f"{steps} steps": lambda steps=steps: sampler(range(args.batch), steps) for steps in args.steps}
    rows = table_rows(race(calls, max(2, args.repeats // 4), args.device, "sampling"), args.batch)
    for row in rows:
        row["minutes for 50,000"] = 50_000 / row["images/s"] / 60
    return f"Sampling, {args.batch} images at a time", rows

def fid_rows(args):
    """Inception features of images, float32 and bfloat16, and pytorch-fid's own network."""
    images = torch.randint(256, (args.batch, args.size, args.size, 3), dtype=torch.uint8).numpy()
    net = Inception().eval().requires_grad_(False).to(args.device, memory_format=torch.channels_last)
    exact, rough = (Features(net, "bench", args.device, dtype) for dtype in ("fp32", "bf16"))
    calls = {"fid.py": lambda: exact(images)}
    if pick_dtype("auto", args.device) == "bf16":             # elsewhere it would be emulated, many times slower
        calls["fid.py --features bf16"] = lambda: rough(images)
    missing = ""
    try:
        from pytorch_fid import inception
        with (mock.patch.object(inception, "load_state_dict_from_url", lambda *args, **kw: {}),    # random weights do
              mock.patch.object(nn.Module, "load_state_dict", lambda *args: None)):
            theirs = inception.InceptionV3().eval().to(args.device)
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).to(args.device)
        calls["pytorch-fid"] = torch.no_grad()(lambda: theirs(x))
    except (ImportError, RuntimeError) as e:                  # a torchvision of another torch raises the latter
        missing = no_row("pytorch-fid", e)
    times = race(calls, max(2, args.repeats // 4), args.device, "features")
    return f"Features for FID, {args.batch} images at a time{missing}", table_rows(times, len(images), "pytorch-fid")

def data_rows(args):
    """Batches out of the packed cache, as train.py's loop reads them in a thread beside its updates."""
    images, step = load_data(args.data, args.size, None, args.cache), count()
    times = race({f"{args.size}x{args.size}": lambda: images.batch(next(step), args.batch, seed=0)}, 10 * args.repeats,
                 torch.device("cpu"), "reading")
    return f"Batches of {args.batch} from the packed cache", table_rows(times, args.batch)

def rehearsed(args, name, **settings):
    """(Rehearsal, Counter) of a few updates of a method on a GPU that is not there."""
    args = argparse.Namespace(**vars(args) | dict(device=META))
    with pretended_gpu() as gpu:
        loop, trainer = updates_of(args, name, kind=partial(Rehearsal, gpu), **dict(updates=2, steps=2) | settings)
        loop()
    return trainer, gpu

def counted_rows(args):
    """What an update launches on a GPU and the memory it needs there, counted without one."""
    rows = []
    for name in progress(iterable=[*(TRAININGS if args.model in CONFIGS else ()), *args.methods], desc="counting"):
        trainer, gpu = rehearsed(args, name)
        rows.append({"what": name, "kernels": trainer.kernels[-1], "peak MiB": gpu.peak / 2 ** 20})
    return f"Counted for a GPU: updates of {args.batch}", rows

GROUPS = {"train": train_rows, "distill": distill_rows, "sample": sample_rows, "fid": fid_rows, "data": data_rows,
          "counted": counted_rows}

def at_work(call, device):
    """For which share of the time of three calls a GPU was at work: launching bounds what is low."""
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]) as found:
        start = time.perf_counter()
        for _ in range(3):
            call()
        wait(device)
        seconds = time.perf_counter() - start
    return sum(e.self_device_time_total for e in found.key_averages()
               if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation) / 1e6 / seconds

def tell_at_work(rows, calls, args):
    """Add to each row of a race on a GPU for which share of the time the GPU was at work at all."""
    for row in rows if args.device.type == "cuda" else []:
        row["GPU at work"] = at_work(calls[row["what"]], args.device)

# ---- tables and command line ------------------------------------------------------------------------------
def table(title, rows):
    """Markdown of one group's rows."""
    columns = [k for k in dict.fromkeys(k for row in rows for k in row) if k != "seconds"]
    cell = lambda v: str(v) if not isinstance(v, float) else f"{v:,.0f}" if v >= 1000 else f"{v:.3g}"  # noqa: E731
    lines = [f"**{title}**", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(cell(row.get(k, '–')) for k in columns)} |" for row in rows)])

def machine(args):
    """What the numbers were measured on, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = f"{torch.get_num_threads()} threads of {cpu[1] if cpu else platform.processor() or platform.machine()}"
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else name
    return f"{name}, torch {torch.__version__}, {args.dtype}"

def parse_args(argv=None):
    p = argparse.ArgumentParser(usage="%(prog)s [WHAT ...] [flags]", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(GROUPS)} (default: all)")
    p.add_argument("--model", choices=[*CONFIGS, *MODELS], default="small32", help="the UNet (default: small32)")
    p.add_argument("--size", type=at_least(1),
                   help="side of the images in pixels; for LDM's: of the latents (default: the model's)")
    p.add_argument("--batch", type=at_least(1), default=32, help="images per update (default: 32)")
    p.add_argument("--repeats", type=at_least(1), default=20, help="calls of each that count (default: 20)")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="METHOD",
                   help=f"of {', '.join(METHODS)} (default: all, which are in memory together when timed)")
    p.add_argument("--steps", type=at_least(1), nargs="+", default=[2, 4, 8, 64], metavar="N", help="when sampling")
    p.add_argument("--data", metavar="PATH", help="images to read (default: the built-in pictures)")
    p.add_argument("--cache", metavar="DIR", help="where packed images are kept (default: $DSD_CACHE or ~/.cache/dsd)")
    p.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="as in distill.py")
    device_flags(p, compiled=True)
    p.add_argument("--out", default="out/bench", metavar="DIR", help="folder of bench.md and bench.json")
    args = p.parse_args(argv)
    unknown = set(args.what) - set(GROUPS)
    if unknown:
        p.error(f"{', '.join(sorted(unknown))}: not among {', '.join(GROUPS)}")
    small = args.model in CONFIGS
    args.what = [g for g in GROUPS if g in (args.what or GROUPS) and (small or args.what or g in ("distill", "sample"))]
    if not small and "train" in args.what:
        p.error(f"train.py does not train {args.model}: measure distill or sample")
    args.size = args.size or {"toy": 16, "small32": 32}.get(args.model, 64)
    if args.size % 2 ** (len(model_of(args)[0].mult) - 1):
        p.error(f"--size {args.size}: {args.model} halves the image {len(model_of(args)[0].mult) - 1} times")
    return args

def main(argv=None):
    args = parse_args(argv)
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    out, groups, text = Path(args.out), {}, []
    for what in args.what:
        torch.manual_seed(0)
        title, rows = GROUPS[what](args)
        groups[what] = dict(title=title, rows=rows)
        text += ["", table(title, rows)]
        log_stderr(f"\n{text[-1]}")
    settings = {k: str(v) if k == "device" else v for k, v in vars(args).items()}
    given = " ".join(argv if argv is not None else sys.argv[1:])
    command = (f"`python experiments/bench.py {given}`: {args.model} at {args.size}x{args.size}; medians; "
               f"{machine(args)}")
    about = dict(about=command, settings=settings, groups=groups)
    for name, content in (("bench.md", "\n".join([command, *text, ""])), ("bench.json", json.dumps(about, indent=1))):
        with whole_file(out / name) as tmp:
            tmp.write_text(content)
    print("\n".join([command, *text]))
    log_stderr(f"wrote {out}/bench.md and bench.json")

if __name__ == "__main__":
    main()
