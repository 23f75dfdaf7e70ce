"""Everything that a GPU must show: that it agrees with the CPU, how fast it is, and what a short training gives.

    python experiments/gpu.py --data img_align_celeba.zip       # writes docs/gpu.md, gpu.json and gpu-steps.png
    python experiments/gpu.py --minutes 9                       # ends in time; the same command goes on
    python experiments/gpu.py --only agreement speed/train      # parts, or single pieces of them
    python experiments/gpu.py --tiny --out out/rehearsal        # a rehearsal on a CPU, which measures nothing

The most important pieces come first, each in a process of its own. One that fails leaves its reason, and is tried again
by the next call, after those that were never tried. Three trainings take 15 minutes of it. The largest tables need 60
GB of memory. diffusers and pytorch-fid have their rows where they are installed.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import agreement
import bench
import torch
from agreement import ROOT, judged, off, small
from common import to_the_end
from gradients import METHODS, gradients

import fid
import hooks
import sample
import train
from checkpoint import whole_file
from flags import positive, seed
from ldm import MODELS
from model import CONFIGS
from rundir import read_log
from runtime import log_stderr, pick_device, pick_dtype

GRACE = 20                # seconds that a training which is stopped may take to write its checkpoint
STOPPED = "stopped"

# Each piece takes the settings, with `found`, what came of the pieces before, and returns (title, rows).

# ---- speed and memory: bench.py ---------------------------------------------------------------------------------
def settings(args, flags):
    """What bench.py's functions take, from its flags."""
    tiny = " --size 8 --batch 2 --repeats 1 --methods dsdi tsd --steps 1" * args.tiny
    given = bench.parse_args((flags + tiny).split())
    given.device = pick_device(str(args.device))
    given.dtype = pick_dtype("fp32" if args.tiny else "auto", given.device)
    return given

def benched(group, flags, **more):
    """A piece that is a table of bench.py."""
    return lambda args: bench.GROUPS[group](args.bench(flags), **more)

DISTILLED = {f"speed/{model}-{batch}": f"--model {model} --batch {batch}"
             for model in ("celebahq256", "imagenet256") for batch in (1, 8)}

def memory(args):
    """The memory that distillation took, beside what is counted tensor by tensor without a GPU."""
    rows = []
    for name, flags in DISTILLED.items():
        for row in args.found.get(name, {}).get("rows", []):
            counted = bench.rehearsed(args.bench(flags), row["what"])[1].peak / 2 ** 20
            rows.append({"what": f"{flags}, {row['what']}", "counted MiB": counted,
                         "measured MiB": row["peak MiB"], "measured / counted": row["peak MiB"] / counted})
    if not rows:
        raise RuntimeError("no memory was measured yet")
    return "Peak memory of an update, without CUDA's own 1 to 2 GB", rows

# ---- a short training -------------------------------------------------------------------------------------------
RUNS = {"plain": ["--distill=0"], "equation-1": ["--distill=0.15"], "shortcut": ["--distill=0.25", "--shortcut"]}

def pace(args):
    """How many updates each of the three trainings gets, so that together they take --training minutes."""
    given = args.bench("--model unet64 --batch 128 --repeats 2")
    calls = {name: bench.training(given, name)[0] for name in bench.TRAININGS}
    rows = bench.table_rows(bench.race(calls, given.repeats, given.device, "pace"), given.batch)
    updates = 4 if args.tiny else int(60 * args.training / sum(row["s"] for row in rows))
    return (f"{updates:,} updates each, of celeba64's {train.PRESETS['celeba64']['updates']:,}: what fits "
            f"{args.training:g} minutes", [row | dict(updates=updates) for row in rows])

def folder_of(run, args):
    return args.runs / f"{run}-{args.found['runs/pace']['rows'][0]['updates']}"

def training(run):
    """A piece that is one of RUNS, from its start, or from where it was stopped."""
    def piece(args):
        updates = args.found["runs/pace"]["rows"][0]["updates"]
        paper = train.PRESETS["celeba64"]                     # as flags, since --preset wants --data
        flags = {"times": "uniform", "lr_end": paper["lr"] * (0.01 if run == "shortcut" else 1)} | paper | dict(
            updates=updates, warmup=min(1000, updates // 10), sample_every=0, save_every=max(1, updates // 4),
            log_every=max(1, updates // 100), data=args.data, seed=args.seed, device=args.device)
        flags |= dict(size=8, batch=4) if args.tiny else {}
        flags |= {} if args.data else dict(crop=None)
        to_the_end(train.main, folder_of(run, args), [
            *RUNS[run], "--betas", "0.9", "0.999",
            *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items() if v is not None)])
        lines = [line for line in read_log(folder_of(run, args)) if "loss" in line]
        speed = statistics.median(line["images_per_s"] for line in lines)
        return (f"{updates:,} updates of {flags['batch']}, not celeba64's {train.PRESETS['celeba64']['updates']:,}; "
                f"seed {args.seed}; {Path(args.data).name if args.data else 'built-in pictures'}",
                [{"run": run, "images/s": speed, "first loss": lines[0]["loss"], "last loss": lines[-1]["loss"]}])
    return piece

def scores(args):
    """rFID of the three at each step count, and a grid from the same noise."""
    if not all("rows" in args.found.get(f"runs/{run}", {}) for run in RUNS):
        raise RuntimeError("the trainings are not at their end")
    ckpts = ["--ckpt", *(str(folder_of(run, args) / "ckpt.pt") for run in RUNS), "--device", str(args.device)]
    steps, n = (["1"], "2") if args.tiny else (["1", "2", "4", "8", "64"], "2048")
    sample.main([*ckpts, "--steps", *steps, "-n", "5", "--out", str(args.out / "gpu-steps.png")])
    fid.main([*ckpts, "--weights", "random", "--steps", *steps, "-n", n, "--out", str(args.runs),
              *["--real=2"] * args.tiny])
    table = json.loads((args.runs / "table.json").read_text())
    rows = [{"run": run} | {f"{result['fake']['steps']} steps": next(iter(result["scores"].values()))
                            for result in results} for run, results in zip(RUNS, table.values(), strict=True)]
    return f"rFID (random features) of {n} samples of those trainings; pictures: gpu-steps.png", rows

# ---- several processes ------------------------------------------------------------------------------------------
def torchrun(args):
    """Gradients under torchrun, beside those of a process alone: by NCCL on GPUs, by gloo on a CPU."""
    rows, gpu = [], args.device.type == "cuda"
    alone = {name: gradients(name, 1, str(args.device)) for name in METHODS}
    for processes in range(1, min(2, torch.cuda.device_count()) + 1) if gpu else [2]:
        file = args.runs / f"gradients-{processes}.pt"
        done = subprocess.run([
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
            ROOT / "tests" / "gradients.py", file, args.device.type],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{processes} processes: {done.stdout[-180:]}")
        there = torch.load(file, weights_only=True)
        rows.append(judged({"processes": processes, "by": "NCCL" if gpu else "gloo",
                            "off": max(off(there[name], alone[name]) for name in METHODS)}, off=1e-9))
    return "Gradients of all methods under torchrun, off those of a process alone, in float64: at most 1e-9", rows

# ---- the pieces --------------------------------------------------------------------------------------------------
# By part, the most important first: what each does, and the seconds that it may take, compiling included.
PIECES = {
    "agreement/networks": (agreement.networks, 60), "agreement/sampling": (agreement.sampling, 20),
    "agreement/methods": (agreement.methods, 40), "agreement/waiting": (agreement.waiting, 60),
    "agreement/resuming": (agreement.resuming, 60),
    "speed/train": (benched("train", "--model unet64 --batch 128 --repeats 5"), 120),
    **{name: (benched("distill", f"{flags} --methods dsdi tsd pd shortcut --repeats 5"), 120)
       for name, flags in DISTILLED.items()},
    "speed/compiled": (benched("train", "--model unet64 --batch 128 --repeats 5 --compile", names=["plain"]), 300),
    "speed/sampling": (benched("sample", "--model unet64 --batch 512 --steps 1 2 4 8 --repeats 8"), 60),
    "speed/latents": (benched("sample", "--model celebahq256 --batch 32 --steps 1 2 4 8 --repeats 8"), 90),
    "speed/features": (benched("fid", "--size 64 --batch 256"), 60),
    "runs/pace": (pace, 60), **{f"runs/{run}": (training(run), 60) for run in RUNS}, "runs/scores": (scores, 240),
    "nccl/torchrun": (torchrun, 120),
    "speed/graphs": (benched("distill", "--model celebahq256 --batch 1 --methods dsdi --repeats 5 "
                             "--compile reduce-overhead"), 300),
    "speed/compiled-all": (benched("train", "--model unet64 --batch 128 --repeats 5 --compile"), 420),
    "speed/memory": (memory, 120),
}
ALIKE = {*list(DISTILLED)[1::2], "speed/compiled-all"}        # in a tiny size others do the same

def rehearse():
    """Put small things in the place of those that take a CPU too long."""
    tiny = dict(channels=16, mult=(1, 2), blocks=1, attention=(2,), head_channels=16, groups=8)
    CONFIGS.update({name: tiny for name in CONFIGS})
    MODELS.update({name: small(model) for name, model in MODELS.items()})
    bench.matmul_peak, bench.memory_of = partial(bench.matmul_peak, n=256, repeats=1), bench.peak
    torch.compile = partial(torch.compile, backend="eager")
    hooks.SHOWN, fid.MANY = (1, 2, 4, 8), 8

def work(name, args, pipe):
    """Do a piece, in a process of its own, and send what came of it."""
    if args.tiny:
        rehearse()
    args.bench = partial(settings, args)
    torch.backends.cudnn.allow_tf32 = not name.startswith("agreement")
    try:
        title, rows = PIECES[name][0](args)
        pipe.send(dict(title=title, rows=rows))
    except BaseException as e:  # whatever it is, the others go on
        traceback.print_exc()
        why = " ".join(str(e.code if isinstance(e, SystemExit) else e).split())
        pipe.send(dict(failed=f"{type(e).__name__}: {why[:200]}"))

def in_a_process(name, args, limit):
    """What came of a piece: dict(title, rows) or dict(failed). It is stopped after `limit` seconds; None: never."""
    kinds = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
    context.set_forkserver_preload(["agreement", "fid"])      # these import torch, once for all pieces
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(name, args, there))
    child.start()
    there.close()
    try:
        late = not here.poll(limit)
        if late:
            os.kill(child.pid, signal.SIGINT)                 # a training saves
        result = here.recv() if here.poll(GRACE) else dict(failed="")
        return dict(failed=f"{STOPPED} after {limit:.0f} seconds") if late and "failed" in result else result
    except EOFError:
        child.join()
        return dict(failed=f"its process died (exit code {child.exitcode})")
    finally:
        child.join(5)
        child.kill()

# ---- the page ------------------------------------------------------------------------------------------------------
def targets(found):
    """[dict(target, found, reached)] of what we aimed at, as far as it was measured."""
    def values(key, *names, what=""):
        rows = [row for name in names for row in found.get(name, {}).get("rows", [])]
        return [row[key] for row in rows if key in row and row.get("what", "").startswith(what)]
    ours, theirs = (values("images/s", "speed/compiled", what=what) for what in ("plain", "diffusers"))
    faster, rows = [max(ours) / max(theirs)] if ours and theirs else [], []
    def aim(text, numbers, reached, pick):
        if numbers:
            rows.append({"target": text, "found": pick(numbers), "reached": reached(pick(numbers))})
    aim("agreement and nccl: everything within its limits", values("ok", *found), bool, all)
    aim("training 1.5 times as fast as diffusers at its best", faster, lambda x: x >= 1.5, max)
    aim("MFU of 35 % compiled", values("MFU", "speed/compiled", what="plain --compile"), lambda x: x >= 0.35, max)
    for what, names in (("", DISTILLED), (" with CUDA graphs", ["speed/graphs"])):
        aim(f"batches of 1 to 8{what} not bound by launches: the GPU at work for 90 %", values("GPU at work", *names),
            lambda x: x >= 0.9, min)
    aim("DSD at 0.80 of the time of TSD", values("time of TSD's", *DISTILLED, what="dsdi"), lambda x: x <= 0.8, max)
    for pick, name in ((min, "least"), (max, "most")):
        aim(f"memory within 15 % of what is counted: {name}", values("measured / counted", "speed/memory"),
            lambda x: abs(x - 1) <= 0.15, pick)
    return rows

def write(path, about, found):
    """The JSON of all pieces, and the page beside it."""
    with whole_file(path) as tmp:
        tmp.write_text(json.dumps(dict(about=about, pieces=found), indent=1))
    aims = targets(found)
    text = [f"# On a GPU\n\n{about}.", *([bench.table("What we aimed at", aims)] if aims else [])]
    for name in [name for name in PIECES if name in found]:
        piece, took = found[name], f"(`{name}`, {found[name]['seconds']:.0f} seconds)"
        text.append(f"**Failed:** {piece['failed']} {took}" if "failed" in piece else
                    bench.table(f"{piece['title']} {took}", piece["rows"]))
    with whole_file(path.with_suffix(".md")) as tmp:
        tmp.write_text("\n\n".join(text) + "\n")

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = dict.fromkeys(name.split("/")[0] for name in PIECES)
    p.add_argument("--only", nargs="+", choices=[*parts, *PIECES], default=[*parts], metavar="PART",
                   help=f"of {', '.join(parts)}, or of their pieces: {', '.join(PIECES)}")
    p.add_argument("--minutes", type=positive, help="end the call in this time; the same command goes on")
    p.add_argument("--training", type=positive, default=15, metavar="M",
                   help="minutes of the three trainings together (default: 15)")
    p.add_argument("--data", metavar="PATH", help="faces to train on, as of train.py (default: the built-in pictures)")
    p.add_argument("--seed", type=seed, default=0, help="of the trainings (default: 0)")
    p.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR", help="for the pages (default: docs)")
    p.add_argument("--runs", type=Path, metavar="DIR", help="for the trainings (default: out/gpu, or OUT with --tiny)")
    p.add_argument("--tiny", action="store_true", help="rehearse on a CPU, in a tiny size")
    p.add_argument("--overwrite", action="store_true", help="measure again what is there")
    args = p.parse_args(argv)
    if args.tiny and args.out == ROOT / "docs":
        p.error("--tiny measures nothing that belongs into docs: give --out")
    if not args.tiny and not torch.cuda.is_available():
        p.error("there is no GPU here: --tiny rehearses on a CPU")
    args.device = torch.device("cpu" if args.tiny else "cuda")
    args.runs = args.runs or (args.out if args.tiny else ROOT / "out" / "gpu")
    return args

def about(args):
    """What the numbers are, and what they were measured on: only such a page is gone on with."""
    what = "A rehearsal on a CPU in a tiny size, which measures nothing" if args.tiny else "Measured"
    return f"{what}, by `python experiments/gpu.py`: " + bench.machine(SimpleNamespace(
        device=args.device, dtype="bfloat16 where nothing else is said"))

def read(path, args):
    """{piece: what came of it} of earlier calls. Exits if they were made elsewhere, unless --overwrite."""
    before = json.loads(path.read_text()) if path.exists() else dict(about=about(args), pieces={})
    if before["about"] != about(args) and not args.overwrite:
        sys.exit(f"error: {path} is of another machine: --overwrite it, or give another --out ({before['about']})")
    return before["pieces"] if before["about"] == about(args) else {}

def tells_of_a_fault(piece):
    return not piece.get("failed", STOPPED).startswith(STOPPED)

def main(argv=None):
    args, start = parse_args(argv), time.perf_counter()
    args.runs.mkdir(parents=True, exist_ok=True)
    path, chosen = args.out / "gpu.json", [name for name in PIECES if {name, name.split("/")[0]} & {*args.only}]
    chosen = [name for name in chosen if not (args.tiny and name in ALIKE)]
    args.found = {name: piece for name, piece in read(path, args).items() if not (args.overwrite and name in chosen)}
    undone = [name for name in chosen if "rows" not in args.found.get(name, {})]
    for name in sorted(undone, key=lambda name: tells_of_a_fault(args.found.get(name, {}))):            # these last
        begun = time.perf_counter()
        left = 60 * args.minutes - GRACE - (begun - start) if args.minutes else None
        if args.minutes and left < (0 if args.tiny else PIECES[name][1]):
            continue                                          # a later one may be short enough
        log_stderr(f"\n{name}")
        args.found[name] = in_a_process(name, args, left)
        args.found[name]["seconds"] = time.perf_counter() - begun
        write(path, about(args), args.found)
    undone = [name for name in chosen if "rows" not in args.found.get(name, {})]
    print(f"{path} and gpu.md " + (f"lack {', '.join(undone)}: the same command goes on" if undone else "are complete"))

if __name__ == "__main__":
    main()
