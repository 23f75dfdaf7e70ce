"""Command-line flags that several scripts share, and the types of their values."""

import argparse
import math
import sys
from pathlib import Path

from checkpoint import load_checkpoint

def checked(kind, fits, what):
    """A type for argparse: a number for which `fits` holds, or an error that says what it must be."""
    def parse(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value
    parse.__name__ = kind.__name__                            # as argparse names it in its messages
    return parse

def at_least(low):
    """A type for argparse: whole numbers from `low` on."""
    return checked(int, lambda value: value >= low, f"a number from {low} on")

seed = checked(int, lambda value: 0 <= value <= 2 ** 62, "a number from 0 to 2^62")
positive = checked(float, lambda value: 0 < value < math.inf, "a positive number")
finite = checked(float, math.isfinite, "a finite number")
fraction = checked(float, lambda value: 0 <= value < 1, "at least 0 and below 1")

def checkpoint(text):
    """A type for argparse: a checkpoint, or the folder of a run, which stands for its ckpt.pt.

    Where the guard ended a run before its first checkpoint there is only the best model."""
    inside = (Path(text).expanduser() / name for name in ("ckpt.pt", "best.pt"))
    return next((str(path) for path in inside if path.is_file()), text)

def device_flags(g, compiled=False):
    """`--device` and `--dtype`, for every script that runs a network, and `--compile` if it is to be compiled."""
    g.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                   help="precision of the network's insides (default: bf16 where the hardware has it)")
    if compiled:
        g.add_argument("--compile", nargs="?", const="default", default="", metavar="MODE",
                       choices=["", "default", "reduce-overhead"],
                       help="torch.compile the network: default, or reduce-overhead (CUDA graphs for small batches)")

def out_flags(g, out):
    """Where a run is kept. out: the default of --out, in words."""
    g.add_argument("--out", metavar="DIR", help=f"folder of the run (default: {out})")
    g.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    g.add_argument("--overwrite", action="store_true", help="delete the run in --out")

def optimiser_flags(g):
    """What one would change first."""
    g.add_argument("--updates", type=at_least(1), metavar="P", help="optimiser steps in all (default: %(default)s)")
    g.add_argument("--batch", type=at_least(1), help="images per update, of all processes (default: %(default)s)")
    g.add_argument("--lr", type=positive, help="learning rate after warm-up (default: %(default)s)")
    g.add_argument("--ema", type=fraction, help="decay of the weight average, which is sampled (default: %(default)s)")
    g.add_argument("--seed", type=seed, default=0, help="of weights, batches and noise (default: 0)")

def score_flags(g):
    """Scores while a run goes on, as fid.py gives them."""
    g.add_argument("--fid-every", type=at_least(0), default=0, metavar="N",
                   help="updates between two scores, at --sample-steps, or in distill.py at 1, 2, 4 and 8, without "
                        "guidance but what is built in; 0: no scores (default: 0)")
    g.add_argument("--fid-samples", type=at_least(2), default=10_000, metavar="M",
                   help="images for each score (default: 10000)")
    g.add_argument("--weights", metavar="FILE", help="Inception weights, or random, as in fid.py")

def run_flags(g):
    """What most runs leave as it is."""
    g.add_argument("--log-every", type=at_least(1), metavar="N",
                   help="updates between two lines of the log (default: %(default)s)")
    g.add_argument("--sample-every", type=at_least(0), metavar="N",
                   help="updates between two pictures; 0: none, or in distill.py only the last (default: %(default)s)")
    g.add_argument("--save-every", type=at_least(1), metavar="N",
                   help="updates between two checkpoints (default: %(default)s)")
    g.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
                   help="write OUT's log and pictures for TensorBoard too (needs the package tensorboard)")
    g.add_argument("--lr-end", type=positive,
                   help="what the rate falls to, along a cosine (default: in distill.py a tenth of --lr, for shortcut "
                        "a fiftieth; in train.py with --shortcut a hundredth, else in the toy preset a 200th, else it "
                        "stays)")
    g.add_argument("--warmup", type=at_least(0), help="updates over which the rate rises from 0 (default: %(default)s)")
    g.add_argument("--betas", type=fraction, nargs=2, default=[0.9, 0.999], help="of Adam (default: %(default)s)")
    g.add_argument("--clip", type=positive, default=1.0, help="largest norm of the gradient (default: 1)")
    g.add_argument("--cache", metavar="DIR", help="where packed images are kept (default: $DSD_CACHE or ~/.cache/dsd)")
    g.add_argument("--accumulate", type=at_least(1), default=1, metavar="K",
                   help="take each batch in K parts, one after the other: a K-th of the memory for activations")
    g.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False,
                   help="compute activations twice: a fraction of the memory, a third more time")
    g.set_defaults(lr_share=1.0)                              # not a flag: --lr-end as a share of --lr, unless given
    device_flags(g, compiled=True)

def parse_with_saved(p, argv, defaults, fixed):
    """Parse flags, which beat the settings of the run that --resume names, which beat `defaults`: of a preset, say.

    defaults  a function of the flags as given, which returns {name: value}
    fixed     args -> {names of settings that a resumed run can't change}: others are told"""
    argv = sys.argv[1:] if argv is None else argv
    given = p.parse_args([flag for flag in argv if flag not in ("-h", "--help")])
    settings = defaults(given)
    out = Path(given.out or settings["out"])
    if given.resume and not (out / "ckpt.pt").exists():
        sys.exit(f"error: {out} has no checkpoint to go on from: start the run without --resume")
    saved = load_checkpoint(out / "ckpt.pt").get("args") if given.resume else {}
    if saved is None:
        sys.exit(f"error: {out}/ckpt.pt is a model without the settings of a run: it can't be resumed")
    if saved and hasattr(given, "schedule") != ("schedule" in saved):
        sys.exit(f"error: the run in {out} is one of {'distill' if 'schedule' in saved else 'train'}.py")
    if saved:                                                 # a flag that is newer than the run: as if not given
        settings = saved | dict(out=settings["out"])
    p.set_defaults(**settings)
    args = p.parse_args(argv)
    for name in ("data", "cache", "weights"):                 # for --resume in another folder
        if getattr(args, name) not in (None, "random"):
            setattr(args, name, str(Path(getattr(args, name)).expanduser().absolute()))
    changed = {k for k, v in saved.items() if getattr(args, k, v) != v}
    stays = args.lr_end == args.lr if args.lr_end else args.lr_share == 1      # the rate; one that falls, falls anew
    if wrong := sorted(changed & fixed(args)):
        p.error(f"--resume can't change {', '.join('--' + name.replace('_', '-') for name in wrong)}: what the run has "
                f"done until now depends on it")
    harmless = {"cache", "dry_run", "sample_every", "sample_steps", "save_every", "tensorboard", "fid_every",
                "fid_samples", "weights", "guard", *(["updates"] if stays else [])}
    if changed := changed - harmless:
        print(f"resuming with another {', '.join(sorted(changed))}: "
              f"no longer the same as a run that was never interrupted")
    return args
