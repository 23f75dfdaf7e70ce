"""One training for all step counts? Plain, Equation 1, and told how far it jumps, in the same time, of three seeds.

    python experiments/few_steps.py            # writes docs/few-steps.md and docs/few-steps.png; 4 hours on one core
    OMP_NUM_THREADS=1 python experiments/few_steps.py --seeds 0       # in another window: of one seed

Trains on the built-in pictures, then fine-tunes the plain model. What is there already is not made again, so that
several processes can take a seed each, and a last one without flags the table and the picture.
"""

import argparse
from functools import partial

from common import ROOT, STEPS, QuickScore, heading, pairs, row, seconds, to_the_end

import distill
import sample
import train

# Updates such that the three trainings take the same time. Evaluations for each image of a batch: one with a gradient
# and, of Equation 1, one more; two for each row that jumps; one for each that the undistilled model anchors.
BATCH, POOL = 32, 500 * 64
TRAIN = ["--lr-end", "1e-5", "--sample-every", "0"]
RUNS = {
    "plain": dict(main=train.main, updates=2400, evaluations=1, flags=TRAIN),
    "Equation 1": dict(main=train.main, updates=1750, evaluations=2, flags=["--distill", "0.15", *TRAIN]),
    "shortcut": dict(main=train.main, updates=2000, evaluations=1.5,
                     flags=["--distill", "0.25", "--shortcut", *TRAIN]),
    "plain, then shortcut": dict(main=distill.main, updates=600, evaluations=2.5, flags=["--schedule", "shortcut"]),
}

def folder(out, name, seed):
    return out / f"{name.replace(' ', '-').replace(',', '').lower()}-{seed}"

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    p.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS], metavar="RUN", help=f"of {', '.join(RUNS)}")
    p.add_argument("--out", default="out/few-steps", metavar="DIR", help="of the runs (default: %(default)s)")
    args = p.parse_args(argv)
    place = partial(folder, ROOT / args.out)
    for seed in args.seeds:
        for name in args.runs:
            run = RUNS[name]
            source = ["--ckpt", str(place("plain", seed) / "ckpt.pt")] if run["main"] is distill.main else []
            to_the_end(run["main"], place(name, seed),
                       [*run["flags"], *source, "--seed", str(seed), "--updates", str(run["updates"])])
    score, lines = QuickScore(None, 16), []
    for name in args.runs:
        run, outs = RUNS[name], [place(name, seed) for seed in args.seeds]
        scores = [score.of_file(out / "ckpt.pt") for out in outs]
        evaluations = BATCH * run["updates"] * run["evaluations"] + (POOL if run["main"] is distill.main else 0)
        took = sum(seconds(out, BATCH) for out in outs) / len(outs)
        lines.append(row(name, pairs(scores), f"{evaluations:,.0f}", f"{took:.0f}"))
    if args.seeds == [0, 1, 2] and args.runs == [*RUNS]:
        (ROOT / "docs" / "few-steps.md").write_text("\n".join([
            "Built-in pictures at 16x16, toy model, batch 32, three seeds (`python experiments/few_steps.py`).",
            "Quick score of 512 samples in N steps, mean and half the range of the seeds, and contrast.", "",
            heading("", *STEPS, "evaluations", "seconds"), *lines]) + "\n")
        sample.main(["--ckpt", *(str(place(name, 0) / "ckpt.pt") for name in RUNS), "--steps", "1", "2", "4", "64",
                     "--out", str(ROOT / "docs" / "few-steps.png")])
    print("\n".join(lines))

if __name__ == "__main__":
    main()
