"""Figure 3: does self-distillation help while a model is trained? Scores against updates, at few steps and at many.

    python experiments/figure3.py                             # built-in pictures; 2 hours on a thread
    python experiments/figure3.py --data celeba-10k.zip       # faces at 32x32; 8 hours, for the same page

Trains plainly, with Equation 1, and told how far it jumps (docs/shortcut.md), at one rate that falls. Writes
docs/figure3.md, .json and .png. What figure3.json has is not made again, and a run that was stopped goes on.
"""

import sys
from contextlib import contextmanager

import matplotlib.pyplot as plt
from common import (
    ROOT,
    Figures,
    QuickScore,
    file_name,
    heading,
    pairs,
    row,
    seconds_per_evaluation,
    shared_flags,
    tell_hours,
    to_the_end,
    write,
)

import train
from hooks import sampler_of
from rundir import read_log
from runtime import pick_device

SCORED = 4, 64                                                # steps
SHARED = ["--lr-end", "1e-5", "--sample-every", "0"]
SETS = {
    "built-in": ["--updates", "2000", *SHARED],
    "faces": ["--crop", "0.787", "--size", "32", "--model", "small32", "--batch", "64", "--updates", "3000", "--ema",
              "0.999", *SHARED],
}
KINDS = {"plain": ["--distill", "0"], "Equation 1": ["--distill", "0.15"],
         "shortcut": ["--distill", "0.25", "--shortcut"]}
POINTS = 10                                                   # of each curve

@contextmanager
def scored_along(every, score):
    """Within it, training also calls score(trainer) every so many updates, and logs the dict that it returns."""
    original = train.Trainer
    def trainer(args, net, device, model_info, hooks=()):
        return original(args, net, device, model_info, [*hooks, (every, lambda it: [score(it)])])
    train.Trainer = trainer
    try:
        yield
    finally:
        train.Trainer = original

def curve(args, flags, kind, seed, quick):
    """[[update, [[score, contrast] at each of SCORED]], …] of a run, which is made, or goes on."""
    updates = train.parse_args(flags).updates
    every, out = max(1, updates // POINTS), ROOT / args.runs / file_name(f"{updates}-{kind}-{seed}")
    with scored_along(every, lambda it: dict(quick=[quick(sampler_of(it), steps) for steps in SCORED])):
        to_the_end(train.main, out, [*flags, *KINDS[kind], "--seed", str(seed), "--save-every", str(every), "--device",
                                     args.device])
    return [[entry["step"], entry["quick"]] for entry in read_log(out) if "quick" in entry]

def make(args, figures):
    """All curves that are missing, of one data set."""
    images, data = ("faces", ["--data", args.data]) if args.data else ("built-in", [])
    flags, quick = [*SETS[images], *data], None
    missing = [(kind, seed) for seed in args.seeds for kind in KINDS
               if f"{images}, {kind}, seed {seed}" not in figures.values]
    if missing:
        given, device = train.parse_args(flags), pick_device(args.device)
        count = 4 * given.updates * given.batch + POINTS * args.n * sum(SCORED)
        tell_hours(len(missing), len(missing) * count * seconds_per_evaluation(given, device))
        quick = QuickScore(args.data, given.size, given.crop, args.n)
    for kind, seed in missing:
        figures.made(f"{images}, {kind}, seed {seed}",
                     lambda kind=kind, seed=seed: curve(args, flags, kind, seed, quick))

def page(args, figures):
    """The table in Markdown, of the last scores, and the picture."""
    found = {(images, kind): runs for images in SETS for kind in KINDS
             if (runs := figures.of_seeds(f"{images}, {kind}"))}
    if not found:
        sys.exit(f"error: {figures.path} has no figures yet")
    sets = [images for images in SETS if any(name == images for name, _ in found)]
    figure, axes = plt.subplots(len(sets), len(SCORED), figsize=(5 * len(SCORED), 3.5 * len(sets)), squeeze=False)
    for (images, kind), runs in found.items():
        for i, axis in enumerate(axes[sets.index(images)]):
            for run in runs:
                axis.plot([step for step, _ in run], [scores[i][0] for _, scores in run], alpha=0.7,
                          color=f"C{[*KINDS].index(kind)}", label=kind if run is runs[0] else None)
            axis.set(yscale="log", xlabel="updates", title=f"{images}: quick score at {SCORED[i]} steps")
    axes[0][-1].legend()
    figure.savefig(args.out / "figure3.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    lines = [f"`python experiments/figure3.py`: {figures}. Quick score at the end, at N steps: mean of seeds of "
             f"training ± half their range, and contrast. Updates are equal, costs are not: an update with Equation 1 "
             f"has one evaluation more than a plain one, with shortcut half of one.", "",
             "![scores against updates](figure3.png)", "",
             heading("images", "training", "seeds", *SCORED)]
    return "\n".join([*lines, *(row(images, [kind, f"{len(runs)}", *pairs([run[-1][1] for run in runs])])
                                for (images, kind), runs in found.items())])

def main(argv=None):
    args = shared_flags("figure3", __doc__, samples=512).parse_args(argv)
    figures = Figures(args.out / "figure3.json", dict(samples=args.n), ROOT / args.runs)
    make(args, figures)
    write(args.out / "figure3.md", page(args, figures))

if __name__ == "__main__":
    main()
