"""What looks at a run on its way: pictures before and after distillation, the drift alarm, scores.

    trainer.hooks = [(1000, compare_picture), (500, scorer(args, images, device, steps))]    # every so many updates
    trainer.watch = Guard(trainer)                                                           # at each line of the log
"""

import sys

import torch

from data import save_grid
from fid import compare, packed_statistics, sampled_statistics
from inception import load_features
from rundir import what_is_kept
from runtime import all_gather, progress, rank
from sample import Sampler

SHOWN = 1, 2, 4, 8, 64     # step counts of the pictures, and of the scores except for the last

def sampler_of(trainer, count=None):
    """A Sampler of the averaged weights. It draws the classes in turn: all of them, or `count` spread over all."""
    classes = trainer.net.config.classes
    y = list(range(0, classes, max(1, classes // count) if count else 1)) or None
    return Sampler(trainer.ema, trainer.model_info, trainer.device, trainer.args.dtype, y, seed=trainer.args.seed)

def draw_shown(trainer, n=10):
    """n samples at each of SHOWN, from the same noise, not decoded: (rows, n, C, H, W) float32 on the CPU of rank 0."""
    if rank():
        return None
    sampler, rows = sampler_of(trainer, n), []
    with progress(total=sum(SHOWN), desc="sampling", unit="step", leave=False) as bar:
        for s in SHOWN:
            rows.append(sampler.draw(range(n), s).float().cpu().contiguous())
            bar.update(s)
    return torch.stack(rows)

def compare_picture(trainer):
    """Before and after under each other for each step count, each column from one noise."""
    if rank():
        return
    before, after = trainer.model_info["before"], draw_shown(trainer)
    labels = [f"{s} {when}" for s in SHOWN[-len(before):] for when in ("before", "after")]
    after = after[-len(before):]                              # runs of old have no row for 1 step
    rows = torch.stack([before, after], 1).flatten(0, 2)      # 1 before, 1 after, 2 before …
    path = trainer.out / f"samples-{trainer.step:06d}.png"
    save_grid(sampler_of(trainer).decode(rows), path, before.shape[1], labels)

def moments(x):
    """Mean, standard deviation and diversity of (B, C, H, W), drawn: how much a pixel differs from image to image."""
    several = dict(diversity=x.std(0).mean().item()) if len(x) > 1 else {}     # one image has none
    return dict(mean=x.mean().item(), std=x.std().item()) | several

class Guard:
    """Nothing anchors a data-free run: log where its trajectories end, and end it when that makes no sense.

    Sane is a standard deviation and a diversity within a factor `args.drift` of those the undistilled model's
    samples had, and a mean within `args.drift` of their standard deviations. All ranks come to the same decision."""

    def __init__(self, trainer):
        self.was, self.drift = moments(trainer.model_info["before"][-1]), trainer.args.drift

    def __call__(self, trainer):
        if "ends" not in trainer.carried:                     # no trajectory has arrived yet
            return {}
        now, was, f = moments(all_gather(trainer.carried["ends"]).float()), self.was, self.drift
        if not f:
            return now
        sane = {"mean": (was["mean"] - f * was["std"], was["mean"] + f * was["std"])}
        sane |= {k: (was[k] / f, was[k] * f) for k in ("std", "diversity") if k in now}
        for name, (low, high) in sane.items():
            if not low <= now[name] <= high:
                sys.exit(f"error: at update {trainer.step} the trajectories end with a {name} of {now[name]:.3g}; "
                         f"before distillation it was {was[name]:.3g}, sane is {low:.3g} to {high:.3g} (--drift). "
                         f"{what_is_kept(trainer)}. Try a lower --lr, fewer --updates, or --target-ema 0.98")
        return now

def scorer(args, images, device, steps):
    """A hook that scores the averaged weights against the training images, for curves like Figure 3.

    steps  step counts: each gives a line of the log"""
    features = load_features(args.weights, device)
    real = packed_statistics(images, features)
    def score(trainer):
        for s in steps:
            fake = sampled_statistics(sampler_of(trainer), s, args.fid_samples, features,
                                      dict(weights="ema", dtype=args.dtype))
            if rank() == 0:                                   # the others have drawn their share
                result = compare(real, fake)
                yield result["scores"] | {k: result[k] for k in ("features", "real", "fake")}
    return score
