"""Every method on one model: scores by step count, and pictures from the same noise (Tables 1, 2, 4; Figure 2).

    python experiments/methods.py --ckpt out/celeba32/ckpt.pt --data celeba-10k.zip      # into out/methods; 2 hours

Distils with each method at the rate that a search found best for it (docs/results.md), then scores and draws them
all with fid.py and sample.py. What is there already is not made again.
"""

import argparse
from pathlib import Path

from common import to_the_end

import distill
import fid
import sample
from plans import METHODS

RUNS = {name: ["--schedule", name] for name in METHODS} | {
    "dsdi-average": ["--schedule", "dsdi", "--target-ema", "0.98", "--lr", "3e-5"],
    "dsdgl-average": ["--schedule", "dsdgl", "--target-ema", "0.98", "--lr", "7e-5"],
}

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="out/train/ckpt.pt", help="the model to distil (default: out/train/ckpt.pt)")
    p.add_argument("--data", help="what it was trained on (default: as its checkpoint says)")
    p.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS], metavar="RUN", help=f"of {', '.join(RUNS)}")
    p.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64], metavar="N")
    p.add_argument("-n", type=int, default=512, help="samples for each score (default: 512)")
    p.add_argument("--seed", type=int, default=0, help="of the distillations (default: 0)")
    p.add_argument("--out", default="out/methods", metavar="DIR")
    args = p.parse_args(argv)
    out, data = Path(args.out), ["--data", args.data] if args.data else []
    ckpts = [args.ckpt]
    for name in args.runs:
        ckpts.append(str(out / name / "ckpt.pt"))
        reads = data if name == "pd" else []
        to_the_end(distill.main, out / name, [*RUNS[name], "--ckpt", args.ckpt, "--seed", str(args.seed), *reads])
    sample.main(["--ckpt", *ckpts, "--steps", "2", "4", "8", "--out", str(out / "grid.png")])
    fid.main(["--weights", "random", "-n", str(args.n), *data, "--steps", *map(str, args.steps), "--ckpt", *ckpts,
              "--out", str(out)])

if __name__ == "__main__":
    main()
