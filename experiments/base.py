"""The search behind the toy preset: settings of train.py at equal CPU time, by score, and by loss on unseen pictures.

    OMP_NUM_THREADS=1 python experiments/base.py      # writes out/base/base.md; a quarter of an hour

CPU seconds of a process with one thread hardly depend on what else the machine does, unlike the time on the wall. Each
setting first shows what an update costs, then makes as many as --updates of the preset cost.
"""

import argparse
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import QuickScore, heading, pairs, row, write

import train
from checkpoint import load_model
from data import to_tensor
from ddim import Cosine
from pictures import draw_picture
from runtime import pick_device
from trainer import Trainer

SETTINGS = {
    "the preset": [], "t uniform": ["--times", "uniform"], "rate 1e-3": ["--lr", "1e-3"],
    "rate that stays": ["--lr-end", "2e-3"], "batch 16": ["--batch", "16", "--ema", "0.998"],
    "wider below": ["--mult", "1", "4", "4"], "not mirrored": ["--no-flip"],
    "attention at 8x8": ["--attention", "2", "--head-channels", "32"],
}
STEPS = 4, 64

def cost(flags, out):
    """CPU seconds of an update: the median of twelve, after four."""
    ends, update = [], Trainer.update
    def timed(self):
        update(self)
        ends.append(time.process_time())
    with mock.patch.object(Trainer, "update", timed):
        train.main([*flags, "--updates", "17", "--out", str(out), "--overwrite"])
    return float(np.median(np.diff(ends[4:])))

@torch.no_grad()
def loss_on_unseen(net, n=1000):
    """Mean squared error of v̂ on n pictures after the last of the training data, one t and one noise for each."""
    x = to_tensor(np.stack([draw_picture(20_000 + i, 16) for i in range(n)]))
    g = torch.Generator().manual_seed(5)
    eps, t = torch.randn(x.shape, generator=g), (torch.randperm(n, generator=g) + 0.5) / n
    a, s = Cosine()(t)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.cat([net(*part) for part in zip((a * x + s * eps).split(100), t.split(100), strict=True)])
    return (out - (a * eps - s * x)).square().mean().item()

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--updates", type=int, default=500, help="of the preset (default: 500)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], metavar="SETTING")
    p.add_argument("--out", default="out/base", metavar="DIR", help="of the runs (default: %(default)s)")
    p.add_argument("--docs", default="out/base", metavar="DIR",
                   help="of the table (default: out/base; that of the docs is in docs)")
    args = p.parse_args(argv)
    base, out = ["--distill", "0.15", "--sample-every", "0"], Path(args.out)
    one, quick, rows = cost(base, out / "cost"), QuickScore(None, 16), []
    for name in args.settings:
        flags = [*base, *SETTINGS[name]]
        updates = round(args.updates * one / cost(flags, out / "cost"))
        losses, scores = [], []
        for seed in args.seeds:
            here = out / f"{name.replace(' ', '-')}-{seed}"
            train.main([*flags, "--updates", str(updates), "--seed", str(seed), "--out", str(here), "--overwrite"])
            losses.append(loss_on_unseen(load_model(here / "ckpt.pt")[0]))
            scores.append(quick.of_file(here / "ckpt.pt", STEPS, pick_device()))
        rows.append(row(name, [f"`{' '.join(SETTINGS[name])}`" if SETTINGS[name] else "", f"{updates}", *pairs(scores),
                               f"{sum(losses) / len(losses):.4f}"]))
        write(Path(args.docs, "base.md"), "\n".join([
            f"The toy at the CPU time of {args.updates} updates of `python train.py --distill 0.15`, "
            f"seed{'s' * (len(args.seeds) > 1)} {', '.join(map(str, args.seeds))} (`python experiments/base.py`).",
            f"Quick score of 512 samples in N steps, and contrast (of the data: {quick.contrast:.3f}); loss of v̂ on "
            "1,000 unseen pictures, t uniform.", "", heading("setting", "flags", "updates", *STEPS, "loss"), *rows]))

if __name__ == "__main__":
    main()
