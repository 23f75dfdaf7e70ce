"""How far does fine-tuning get with so many evaluations? PD, TSD, steadied DSD and shortcut at equal cost.

    python experiments/budgets.py --ckpt out/celeba32        # 10^4 and 10^5: 3 hours on two cores with AMX

An evaluation is one image through the network once, with a gradient or without; those of shortcut's own samples count.
Each method has several rates, of one seed; the best of them, by the geometric mean of the quick score at 1 to 8 steps,
is then run with the other seeds. What exists is not made again, what was stopped goes on. Writes budgets.md and .json.
"""

import argparse
import math
from pathlib import Path

from common import STEPS, Figures, QuickScore, evaluations, heading, pairs, row, seconds, to_the_end, write

import distill
from checkpoint import file_hash, load_checkpoint, trained_on
from runtime import pick_device

BATCH = 32
CHOICE = 4                                                    # the first of STEPS, 1 to 8, whose scores choose a rate
METHODS = {                                                   # and further flags
    "tsd": [], "pd": [], "dsdgl": ["--target-ema", "0.98"], "shortcut": ["--ema", "0.95"],
}
RATES = {                                                     # that are tried: many updates want low ones
    1e4: dict(tsd=[3e-4, 1e-4], pd=[3e-4, 1e-4], dsdgl=[1.5e-4, 7e-5], shortcut=[1e-3]),
    1e5: dict(tsd=[3e-5, 1e-5], pd=[3e-5, 1e-5], dsdgl=[2e-5, 7e-6], shortcut=[1e-3]),
    1e6: dict(tsd=[3e-6, 1e-6], pd=[3e-5, 3e-6], dsdgl=[2e-6, 7e-7], shortcut=[1e-3]),
}

def flags_of(method, budget, lr, seed, ckpt, data):
    """(flags of distill.py, evaluations) of a run that makes about `budget` evaluations."""
    flags = ["--schedule", method, "--lr", str(lr), "--seed", str(seed), "--ckpt", ckpt, "--batch", str(BATCH),
             "--no-guard", *METHODS[method], *(["--data", data] if method == "pd" and data else [])]
    if method == "shortcut":
        pool, steps = (100, 32) if budget < 5e4 else (500, 64)
        flags += ["--pool", str(pool), "--steps", str(steps), "--lr-end", f"{lr / 10:g}"]
    args = distill.parse_args(flags)
    args.updates = 0
    own = evaluations(args)                                   # its samples
    args.updates = 1
    args.updates = int((budget - own) / (evaluations(args) - own))
    return [*flags, "--updates", str(args.updates)], evaluations(args)

def line(name, runs, budget):
    """A line of the table: the same run with several seeds."""
    took = sum(r["seconds"] for r in runs) // len(runs)
    return row(name, pairs([r["scores"] for r in runs]), f"10^{math.log10(budget):.0f}", f"{len(runs)}",
               f"{took}")

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="out/train", help="the model to distil, or its folder (default: out/train)")
    p.add_argument("--data", help="the images that pd and the score read (default: what it was trained on)")
    p.add_argument("--budgets", type=float, nargs="+", choices=RATES, default=[1e4, 1e5],
                   help="evaluations (default: 1e4 1e5; 1e6 is for a GPU)")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one chooses the rate")
    p.add_argument("--runs", default="out/budgets", metavar="DIR", help="for the runs (default: %(default)s)")
    p.add_argument("--out", default="out/budgets", metavar="DIR", help="for the table (default: %(default)s)")
    args = p.parse_args(argv)
    ckpt = str(Path(args.ckpt) / "ckpt.pt") if Path(args.ckpt).is_dir() else args.ckpt
    state, lines = load_checkpoint(ckpt), []
    origin = trained_on(state)
    score, device = QuickScore(args.data or origin["data"], state["shape"][1], origin["crop"]), pick_device()
    about = dict(base=file_hash(ckpt, 8), data=score.data.folder.name, samples=score.n)
    figures = Figures(Path(args.out, "budgets.json"), about, Path(args.runs))

    def run(method, budget, lr, seed):
        """What is known of a run, made if need be: None if it fell apart."""
        def make():
            flags, count = flags_of(method, budget, lr, seed, ckpt, args.data)
            to_the_end(distill.main, out, flags)
            return dict(lr=lr, evaluations=count, scores=score.of_file(out / "ckpt.pt", STEPS, device),
                        seconds=round(seconds(out, BATCH)))
        out = Path(args.runs) / file_hash(ckpt, 8) / f"{method}-{budget:g}-{lr:g}-{seed}"
        return figures.made(f"{method}, {budget:g}, {lr:g}, seed {seed}", make)

    undistilled = figures.made("undistilled", score.of_file, Path(ckpt), STEPS, device)
    lines.append(row("undistilled", pairs([undistilled]), "", "", ""))
    for budget in args.budgets:
        for method in args.methods:
            tried = [r for lr in RATES[budget][method] if (r := run(method, budget, lr, args.seeds[0]))]
            if not tried:
                continue
            best = min(tried, key=lambda r: math.prod(s for s, _ in r["scores"][:CHOICE]))
            same = [best, *(r for s in args.seeds[1:] if (r := run(method, budget, best["lr"], s)))]
            for r in tried:
                if r is not best:
                    lines.append(line(f"{method}, {r['lr']:g}", [r], budget))
            lines.append(line(f"**{method}, {best['lr']:g}**", same, budget))
            text = "\n".join([
                "Fine-tuning at equal cost (`python experiments/budgets.py`): quick score of 512 samples in N steps,",
                f"and contrast (of the data: {score.contrast:.3f}). Bold: the best rate of a method, chosen by seed "
                f"{args.seeds[0]};", "mean and half the range over seeds. Seconds of updates.", "",
                heading("method, rate", *STEPS, "budget", "seeds", "seconds"), *lines])
            write(Path(args.out, "budgets.md"), text)

if __name__ == "__main__":
    main()
