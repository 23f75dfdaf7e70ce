"""The folder of a run: which run it belongs to, which files in it may be deleted, where a stopped run goes on.

    state = check_out(args)       # before any work: the checkpoint to go on from, or None; exits if a run is in the way
    prepare_out(args, state)      # after all checks, before the first update: what is out of date of a resumed run goes
    clear_out(out, drawn)         # after the first update of a new run: the old one goes, as the new one can be made
"""

import contextlib
import json
import os
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoint import claimed, load_checkpoint, naming, whole_file
from runtime import rank, ranks

# What train.py and distill.py write into the folder of a run, by its exact names: nothing else is ever deleted.
RUN_FILES = re.compile(r"((ckpt|best)\.pt|log\.jsonl|curves\.png|samples-\d{6,}\.png)(\.\d+\.tmp)?"
                       r"|pool-[0-9a-f]{12}\.(f16|part)|events\.out\.tfevents\.[\w.-]+")

@contextlib.contextmanager
def open_log(out, tensorboard=False):
    """Yields what writes a line, {name: value} with the update as `step`, into OUT/log.jsonl, and into TensorBoard's
    file if wanted, with the pictures. `out` None: nothing is written. Before the first line no file is touched."""
    path = out / "log.jsonl" if out else os.devnull
    with contextlib.ExitStack() as opened:
        @cache
        def board():
            from torch.utils.tensorboard import SummaryWriter
            return opened.enter_context(SummaryWriter(out))
        def write(entry):
            if out:
                out.mkdir(exist_ok=True)                      # of a run whose folder was taken away
            with naming(path), open(path, "a") as file:
                print(json.dumps(entry), file=file)
            if out and tensorboard:
                show(board(), entry, out / f"samples-{entry['step']:06d}.png")
        yield write

def show(board, entry, picture):
    """A line of the log in TensorBoard, and the picture of its update with the line that says that it is made."""
    step, at = entry["step"], entry.get("fake", {}).get("steps")
    for name, value in entry.items():
        if isinstance(value, (int, float)) and name not in ("step", "hooks"):
            board.add_scalar(f"{name} at {at} steps" if at else name, value, step)
    if "hooks" in entry and picture.exists():
        board.add_image("samples", np.asarray(Image.open(picture)), step, dataformats="HWC")
    board.flush()

def read_log(out):
    """The lines of a run's log that are whole, as dicts: one that was being written in a power cut is not."""
    log, entries = out / "log.jsonl", []
    for line in log.read_text().splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries

def hooks_are_done(state, out):
    """Whether the pictures and scores that were due at a checkpoint's update were made: a killed run may lack them."""
    return any("hooks" in entry and entry["step"] == state["step"] for entry in read_log(out))

def check_out(args, more="--updates N asks for more"):
    """Look at flags and OUT before any work: the checkpoint to --resume from, or None. Exits if a run is in the way.

    more  what the user of a finished run can do"""
    out, state = Path(args.out), None
    if args.batch % (ranks() * args.accumulate):
        sys.exit(f"error: --batch {args.batch} can't be shared equally by {ranks()} processes"
                 f" with --accumulate {args.accumulate}")
    if args.compile == "reduce-overhead" and (ranks() > 1 or args.accumulate > 1):
        sys.exit("error: --compile reduce-overhead is for a single process without --accumulate: its graphs keep "
                 "gradients in place; --compile default takes both")
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            sys.exit("error: --tensorboard needs the package tensorboard: pip install tensorboard")
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())    # OUT is made after all checks
    if not (place.is_dir() and os.access(place, os.W_OK)):
        sys.exit(f"error: can't write into {place}; choose another --out")
    with claimed(out) if out.exists() and not rank() else contextlib.nullcontext():
        if args.resume:
            state = load_checkpoint(out / "ckpt.pt")
            if state["step"] > args.updates or (state["step"] == args.updates and hooks_are_done(state, out)):
                sys.exit(f"{out} is finished ({state['step']} updates); {more}")
        elif not rank():                                      # by now it may have begun to write
            refuse_another_run(args, out)
    return state

def refuse_another_run(args, out):
    """Exit if a run is in the way of a new one: also one that the guard ended, of which only the best model is left."""
    goes_on, best = (out / "ckpt.pt").exists(), (out / "best.pt").exists()
    if not args.overwrite and (goes_on or best):
        sys.exit(f"error: {out} holds a run already: {'--resume goes on, ' * goes_on}--overwrite deletes it, "
                 f"--out takes another")

def remove(out, suffix="", but=None):
    """Delete the files of a run in OUT whose names end so, `but` one."""
    for f in out.iterdir():
        if RUN_FILES.fullmatch(f.name) and f.name.endswith(suffix) and f != but:
            f.unlink()

def clear_out(out, drawn=None):
    """Delete the old run in OUT, and begin the log of the new one, which has `drawn` this file. Called after its first
    update, lest an error in that, for want of memory say, leave neither."""
    if out and not rank():
        remove(out, but=drawn)
        (out / "log.jsonl").touch()                           # for those who watch it

def prepare_out(args, state):
    """Make OUT ready for the first update. With the state of a checkpoint: what a killed run was writing goes, and what
    it logged after the checkpoint, as that will be done again."""
    if rank():
        return
    out = Path(args.out)
    with claimed(out):
        if not state:                                         # one that came while data were packed, say
            return refuse_another_run(args, out)
        remove(out, ".tmp")
        step, done = state["step"], hooks_are_done(state, out)
        kept = [e for e in read_log(out) if e["step"] < step or (e["step"] == step and (done or "loss" in e))]
        with whole_file(out / "log.jsonl") as tmp:
            tmp.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
