"""The folder of a run: which run it belongs to, which files in it may be deleted, where a stopped run goes on.

    state = check_out(args)       # before any work: the checkpoint to go on from, or None; exits if a run is in the way
    prepare_out(args, state)      # after all checks, before the first update: what is out of date goes
"""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoint import claimed, load_checkpoint, naming, whole_file
from runtime import rank, ranks

# What this project writes into the folder of a run, by its exact names: nothing else is ever deleted.
RUN_FILES = re.compile(r"((ckpt|best)\.pt|log\.jsonl|curves\.png|samples-\d{6,}\.png)(\.\d+\.tmp)?"
                       r"|events\.out\.tfevents\.[\w.-]+")

@contextlib.contextmanager
def open_log(out, tensorboard=False):
    """Yields what writes a line, {name: value} with the update as `step`, into OUT/log.jsonl, and into TensorBoard's
    file if wanted, with the pictures. `out` None: nothing is written."""
    board = contextlib.nullcontext()
    if out and tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(out)
    with open(out / "log.jsonl" if out else os.devnull, "a") as file, board:
        def write(entry):
            with naming(file.name):
                print(json.dumps(entry), file=file, flush=True)
            if out and tensorboard:
                show(board, entry, out / f"samples-{entry['step']:06d}.png")
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
            if state["step"] >= args.updates and hooks_are_done(state, out):
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

def prepare_out(args, state):
    """Make OUT ready for the first update: an old run goes, after all checks, lest a typing error delete it.

    With the state of a checkpoint: what a killed run logged after it goes, as that will be done again."""
    if rank():
        return
    out = Path(args.out)
    with claimed(out):
        if not state:                                         # one that came while data were packed, say
            refuse_another_run(args, out)
        for f in out.iterdir():                               # of a resumed run: what it was writing when it was killed
            if RUN_FILES.fullmatch(f.name) and (not state or f.suffix == ".tmp"):
                f.unlink()
        if not state:
            return
        step, done = state["step"], hooks_are_done(state, out)
        kept = [e for e in read_log(out) if e["step"] < step or (e["step"] == step and (done or "loss" in e))]
        with whole_file(out / "log.jsonl") as tmp:
            tmp.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
