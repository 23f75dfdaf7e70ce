"""How a data-free run overshoots: scores and contrast at 8 steps against the updates made.

    python experiments/curve.py --ckpt out/celeba32/ckpt.pt --data celeba-10k.zip    # writes docs/curve.png; 40 minutes

Three runs of distill.py without its guard, scored every 32 updates (rFID, 192 samples): dsdi at two rates, and
dsdgl with an average of the weights as the target. A run that was stopped goes on.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from common import ROOT, to_the_end

import distill

RUNS = {
    "dsdi, 3e-5": ["--schedule", "dsdi", "--lr", "3e-5"],
    "dsdi, 1e-5": ["--schedule", "dsdi", "--lr", "1e-5"],
    "dsdgl, D = 0.98, 6e-5": ["--schedule", "dsdgl", "--lr", "6e-5", "--target-ema", "0.98"],
}

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="out/train/ckpt.pt", help="the model to distil (default: out/train/ckpt.pt)")
    p.add_argument("--data", help="what it was trained on (default: as its checkpoint says)")
    p.add_argument("--updates", type=int, default=256)
    p.add_argument("--every", type=int, default=32, help="updates between two scores")
    p.add_argument("-n", type=int, default=192, help="samples for each score")
    p.add_argument("--out", default=str(ROOT / "docs" / "curve.png"), metavar="PNG", help="the picture")
    args = p.parse_args(argv)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for number, (name, flags) in enumerate(RUNS.items()):
        out = Path("out/curve") / str(number)
        to_the_end(distill.main, out, [
            *flags, "--ckpt", args.ckpt, "--updates", str(args.updates), "--no-guard", "--save-every",
            str(args.every), "--fid-every", str(args.every), "--fid-samples", str(args.n), "--weights", "random",
            *(["--data", args.data] if args.data else [])])
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        scores = [e for e in log if e.get("fake", {}).get("steps") == 8]
        for axis, key in zip(axes, ("rFID (random features)", "contrast"), strict=True):
            axis.plot([e["step"] for e in scores], [e[key] for e in scores], marker="o", markersize=4, label=name)
    axes[0].set(yscale="log", xlabel="updates", title="rFID at 8 steps")
    axes[1].set(xlabel="updates", title="contrast at 8 steps")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(args.out, dpi=120, bbox_inches="tight")
    print(f"wrote {args.out}")

if __name__ == "__main__":
    main()
