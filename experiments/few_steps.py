"""One training for all step counts? Plain, Equation 1, and told how far it jumps, in the same time, of three seeds.

    python experiments/few_steps.py                 # built-in pictures: docs/few-steps.md and .png; 1 hour on one core
    python experiments/few_steps.py --data celeba-10k.zip --crop 0.787    # faces: docs/few-steps-faces.…; 3 hours
    OMP_NUM_THREADS=1 python experiments/few_steps.py --seeds 0 --docs /tmp    # in another window: of one seed

Trains, then fine-tunes the plain model. What is there already is not made again, so that several processes can take a
seed each, and a last one without flags the table and the picture.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from common import ROOT, STEPS, QuickScore, heading, pairs, row, seconds, to_the_end, write

import distill
import sample
import train

# The share of --updates with which the three trainings take the same time. Evaluations for each image of a batch: one
# with a gradient and, of Equation 1, one more; two for each row that jumps; one for each that is anchored.
TRAIN = ["--lr-end", "1e-5", "--sample-every", "0"]
RUNS = {
    "plain": dict(main=train.main, share=1.2, evaluations=1, flags=TRAIN),
    "Equation 1": dict(main=train.main, share=0.875, evaluations=2, flags=["--distill", "0.15", *TRAIN]),
    "shortcut": dict(main=train.main, share=1, evaluations=1.5, flags=["--distill", "0.25", "--shortcut", *TRAIN]),
    "plain, then shortcut": dict(main=distill.main, updates=600, evaluations=2.5, flags=["--schedule", "shortcut"]),
}

def folder(out, name, seed):
    return out / f"{name.replace(' ', '-').replace(',', '').lower()}-{seed}"

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    p.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS], metavar="RUN", help=f"of {', '.join(RUNS)}")
    p.add_argument("--out", default="out/few-steps", metavar="DIR", help="of the runs (default: %(default)s)")
    p.add_argument("--docs", default=str(ROOT / "docs"), metavar="DIR", help="of table and picture (default: docs)")
    p.add_argument("--data", help="folder or zip of faces, for 32x32 and small32 (default: built-in pictures, toy)")
    p.add_argument("--crop", type=float, help="as in train.py")
    p.add_argument("--updates", type=int, help="of the training with jumps (default: 2000, with --data 3000)")
    args = p.parse_args(argv)
    size, updates = (32, 3000) if args.data else (16, 2000)
    updates, name_of = args.updates or updates, "few-steps-faces" if args.data else "few-steps"
    data = ["--data", args.data, "--size", "32", "--model", "small32", "--ema", "0.998"] if args.data else []
    data += ["--crop", str(args.crop)] if args.crop else []
    place = partial(folder, Path(args.out))
    def updates_of(run):
        return run.get("updates") or round(run["share"] * updates)
    for seed in args.seeds:
        for name in args.runs:
            run = RUNS[name]
            source = ["--ckpt", str(place("plain", seed) / "ckpt.pt")] if run["main"] is distill.main else data
            to_the_end(run["main"], place(name, seed),
                       [*run["flags"], *source, "--seed", str(seed), "--updates", str(updates_of(run))])
    score, lines, found = QuickScore(args.data, size, args.crop), [], {}
    for name in args.runs:
        run, outs = RUNS[name], [place(name, seed) for seed in args.seeds]
        found[name] = [score.of_file(out / "ckpt.pt") for out in outs]
        own = 2000 * 16 if run["main"] is distill.main else 0
        took = sum(seconds(out, 32) for out in outs) / len(outs)
        evaluations = 32 * updates_of(run) * run["evaluations"] + own
        lines.append(row(name, pairs(found[name]), f"{evaluations:,.0f}", f"{took:.0f}"))
    text = "\n".join([
        f"{'Faces at 32x32, small32' if args.data else 'Built-in pictures at 16x16, toy model'}, batch 32, seeds "
        f"{', '.join(map(str, args.seeds))} (`python experiments/few_steps.py`).", "Quick score of 512 samples in N "
        f"steps, mean and half the range of the seeds, and contrast (of the data: {score.contrast:.3f}).", "",
        heading("", *STEPS, "evaluations", "seconds"), *lines])
    write(Path(args.docs, f"{name_of}.md"), text)
    Path(args.docs, f"{name_of}.json").write_text(json.dumps(found, indent=1))
    sample.main(["--ckpt", *(str(place(name, args.seeds[0]) / "ckpt.pt") for name in args.runs), "--steps", "1", "2",
                 "4", "64", "--out", str(Path(args.docs, f"{name_of}.png"))])

if __name__ == "__main__":
    main()
