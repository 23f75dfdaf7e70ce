"""What looks at a run on its way: pictures before and after distillation, fidelity, the guard, scores.

    trainer.watch = guard = Guard(trainer)                                                   # at each line of the log
    trainer.hooks = [(1000, guard.picture), (500, scorer(args, images, device, steps))]      # every so many updates
"""

import math

import torch

from data import save_grid
from fid import packed_statistics, sampled_statistics
from inception import load_features
from runtime import broadcast, log_stderr, progress, rank
from sample import Sampler, spread_classes
from scores import MANY, NOISES, compare, fidelity

SHOWN = 1, 2, 4, 8, MANY   # step counts of the pictures, and of the scores except for the last
COLUMNS = 10               # of the pictures: this many of the NOISES samples
LOOKS = 12                 # of the guard in the course of a run

# ---- samples from always the same noise ---------------------------------------------------------------------
def sampler_of(trainer, count=None, w=1.0):
    """A Sampler of the averaged weights. It draws the classes in turn: all of them, or `count` spread over all."""
    classes = trainer.net.config.classes
    y = spread_classes(classes, count or classes)
    return Sampler(trainer.ema, trainer.model_info, trainer.device, trainer.args.dtype, y, w)

def shown_guidance(trainer):
    """(The guidance of the samples of `draw_shown`: what is built into the model, or else the middle of --guidance; the
    w that their sampler needs for it: 1 if it is built in)."""
    built_in = trainer.model_info.get("guidance", 1)
    w = sum(trainer.args.guidance) / 2 if trainer.net.config.classes and built_in == 1 else 1.0
    return w * built_in, w

def draw_shown(trainer, steps=None, bar=True):
    """Samples at each of `steps` (SHOWN), from the same noises in every run, not decoded: (rows, NOISES, C, H, W),
    float32 on the CPU of rank 0. None on the others."""
    if rank():
        return None
    steps = steps or SHOWN
    sampler, rows = sampler_of(trainer, NOISES, shown_guidance(trainer)[1]), []
    with progress(total=sum(steps), desc="sampling", unit="step", leave=False, quiet=not bar) as shown:
        for s in steps:
            rows.append(sampler.draw(range(NOISES), s).float().cpu().contiguous())
            shown.update(s)
    return torch.stack(rows)

def print_table(seen):
    """Print what a run did. seen: for each of SHOWN what `look_at` gives, before and after."""
    print(f"\n{'steps':10}" + "".join(f"{s:14d}" for s in SHOWN))
    for name, kind in (("fidelity", 0), ("contrast", 2)):
        print(f"{name:10}" + "".join(f"{b[kind]:7.2f} → {a[kind]:4.2f}" for b, a in seen))
    print(f"fidelity to the undistilled model at {SHOWN[-1]} steps: 1 the same pictures, 0.5 their average, 0 others; "
          f"standard errors up to {max(error for pair in seen for _, error, _ in pair):.2f}")

# ---- fidelity along a run, and the guard -----------------------------------------------------------------------
WATCHED = 2, 4, 8                  # step counts of every look; every fourth has the last of SHOWN as well
FIDELITY, CONTRAST = 0.5, 1.2      # a run is lost below the one or above the other (docs/guard.md shows the runs)
NEAR = 0.05                        # a run that ends this near to such an edge says so

def look_at(x, reference):
    """(fidelity, its standard error, contrast) of samples (n, C, H, W) against the undistilled model's in many steps,
    from the same noise: see scores.fidelity. Contrast is the standard deviation of all values, as a share of theirs."""
    return *fidelity(x, reference), (x.std() / reference.std()).item()

def keyed(steps, seen):
    """A line of the log: {"fidelity_N": …, "contrast_N": …} of what `look_at` gives for each N of `steps`."""
    return {f"{kind}_{s}": round(value, 4) for s, (f, _, c) in zip(steps, seen, strict=True)
            for kind, value in (("fidelity", f), ("contrast", c))}

class Guard:
    """Looks at few-step samples from fixed noises while a run goes on: logs how far they are from the undistilled
    model's, keeps the best model as OUT/best.pt, ends a run that is lost. All ranks come to the same decision.

    judged  the step counts, of SHOWN, whose mean fidelity says which model is best
    ends    whether it may end the run"""

    def __init__(self, trainer, judged=WATCHED, ends=True):
        a, was = trainer.args, trainer.model_info
        self.judged, self.ends, self.steps = judged, ends, sorted({*WATCHED, *judged})
        self.every = a.log_every * max(1, round(a.updates / a.log_every / LOOKS))
        self.had, self.drawn = keyed(SHOWN, [look_at(x, was["reference"]) for x in was["before"]]), (None, None)

    def __call__(self, trainer):
        last, many = trainer.step == trainer.args.updates, trainer.step % (4 * self.every) == 0
        if trainer.step % self.every and not last:
            return {}
        steps = SHOWN if last else sorted({*self.steps, *(SHOWN[-1:] if many else ())})
        drawn, reference = draw_shown(trainer, steps, bar=last), trainer.model_info["reference"]
        if last:
            self.drawn = trainer.step, drawn                  # for the picture
        seen = broadcast(drawn is not None and keyed(steps, [look_at(x, reference) for x in drawn]))
        self._keep_best(trainer, seen)
        if self.ends and (lost := self.outside(seen)):
            best = trainer.model_info["best"]["step"]
            trainer.lost = (f"at update {trainer.step} few-step samples are lost: {lost}. {trainer.out}/best.pt has "
                            f"the best until now, of update {best}. Try a third of --lr, fewer --updates, or "
                            f"--schedule shortcut (--no-guard lets a run go on)")
        if last and (near := self.outside(seen, NEAR)):
            log_stderr(f"\nwithin {NEAR} of the edge of what is sane, or beyond: {near}. Look at the pictures, and at "
                       f"{trainer.out}/best.pt")
        return seen

    def picture(self, trainer):
        """A hook: before and after under each other at each of SHOWN, each column from one noise, with their fidelity.

        Writes OUT/samples-NNNNNN.png, and prints a table after the last update."""
        if rank():
            return
        before, reference = trainer.model_info["before"], trainer.model_info["reference"]
        step, after = self.drawn
        after = after if step == trainer.step else draw_shown(trainer)
        rows = torch.stack([before, after], 1)                # (rows, 2, n, C, H, W): 1 before, 1 after, 2 before …
        seen = [[look_at(x, reference) for x in pair] for pair in rows]
        labels = [f"{s} {when} {f:.2f}" for s, pair in zip(SHOWN, seen, strict=True)
                  for when, (f, *_) in zip(("before", "after"), pair, strict=True)]
        path = trainer.out / f"samples-{trainer.step:06d}.png"
        save_grid(sampler_of(trainer).decode(rows[:, :, :COLUMNS].flatten(0, 2)), path, COLUMNS, labels)
        if trainer.step == trainer.args.updates:
            print_table(seen)

    def outside(self, seen, margin=0.0):
        """What of a look leaves the band, or comes as near to its edge as `margin`, in words; "" if nothing does.

        A fidelity of 0.5 is that of the average picture: less is worse than no picture at all. If the model had hardly
        more before the run, or more contrast than CONTRAST, the edge lies a little beyond that. Other step counts than
        WATCHED count only if the model is for them (`judged`): at many steps the paper's methods get worse."""
        low = {key: min(FIDELITY, self.had[key] - NEAR) for key in (f"fidelity_{s}" for s in self.steps)}
        high = {key: max(CONTRAST, self.had[key] + NEAR) for key in (f"contrast_{s}" for s in self.steps)}
        return "; ".join([f"{k} {seen[k]:.2f}, at least {low[k]:.2f} is sane" for k in low if seen[k] < low[k] + margin]
                         + [f"{k} {seen[k]:.2f}, at most {high[k]:.2f} is" for k in high if seen[k] > high[k] - margin])

    def score(self, seen):
        """The mean fidelity of a look at the step counts that it judges by."""
        return sum(seen[f"fidelity_{s}"] for s in self.judged) / len(self.judged)

    def _keep_best(self, trainer, seen):
        """Keep the model if its fidelity is the highest until now: more updates often make it worse."""
        if self.score(seen) > trainer.model_info.get("best", {}).get("fidelity", -math.inf):
            trainer.model_info["best"] = dict(fidelity=self.score(seen), step=trainer.step)
            trainer.save_best()

# ---- scores ----------------------------------------------------------------------------------------------------
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
