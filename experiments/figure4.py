"""Figure 4: the share of the updates that each depth gets, plain and weighted by the learning rate.

    python experiments/figure4.py                    # the paper's P = 4,000 from 64 steps; writes out/figure4.png
"""

import argparse
from pathlib import Path

from common import pyplot

import distill
from plans import METHODS, halves, shares

plt = pyplot()

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--updates", type=int, default=4000, metavar="P", help="updates in all (default: 4000)")
    p.add_argument("--steps", type=int, default=64, metavar="N", help="start depth (default: 64)")
    p.add_argument("--out", default="out/figure4.png", metavar="PNG",
                   help="the picture (default: %(default)s)")
    given = p.parse_args(argv)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for i, name in enumerate(name for name, method in METHODS.items() if not method.shortcut):
        args = distill.parse_args(["--ldm", "celebahq256", "--ckpt", "x", "--schedule", name,         # Table 3's rates
                                   "--updates", str(given.updates), "--steps", str(given.steps)])
        depths, _, share, weighted = zip(*shares(args), strict=True)
        for axis, values in zip(axes, (share, weighted), strict=True):
            # Some plans are equal: the first curves are broad, so that the last ones do not hide them.
            axis.plot(depths, values, marker="o", markersize=9 - 1.3 * i, linewidth=8 - 1.3 * i, alpha=0.7, label=name)
    for axis, title in zip(axes, ("share of updates", "weighted by the learning rate"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="depth N (a step is 1/N)", title=title)
        axis.set_xticks(halves(given.steps), halves(given.steps))
        axis.minorticks_off()
        axis.invert_xaxis()
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))      # beside the curves, not on them
    Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=120, bbox_inches="tight")
    print(f"wrote {given.out}")

if __name__ == "__main__":
    main()
