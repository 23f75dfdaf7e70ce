"""Table 2's class-conditional half in small: built-in pictures, guidance, and a classifier in place of Inception Score.

    python experiments/classes.py              # writes out/classes/classes.md, .json and .png; 8 hours on an old core
    python experiments/classes.py --seeds 1    # of one seed; elsewhere with the same base model as --ckpt
    python experiments/classes.py --methods trained-w1 trained-w2     # only the runs of these

Trains a model of ten classes and distils it, guided; and trains others that learn to jump, with guidance or without.
The score is the share of samples that a classifier takes for the class that was asked for; it learned from other
pictures than those on which its own accuracy is told. What classes.json has is not made again.
"""

import sys
from functools import cache

import numpy as np
import torch
from common import UNDISTILLED, Experiment, claims_table, drawn, heading, pairs, rates_of, row, seeds_of, to_the_end
from torch import nn

import train
from data import load_data, to_tensor
from pictures import SHAPES, draw_picture
from runtime import progress

STEPS = 1, 2, 4, 8, 16
BASE = ["--classes", "--updates", "3000", "--lr-end", "1e-5", "--sample-every", "0"]
JUMPS = [*BASE, "--updates", "2680", "--distill", "0.25", "--shortcut"]          # for as long as the base
P = ["--updates", "128", "--batch", "32"]
METHODS = {                                                   # flags, and the rate to begin the search at
    "pd": (["--schedule", "pd", *P], 3e-4),
    "tsd": (["--schedule", "tsd", *P], 3e-5),
    "dsdn": (["--schedule", "dsdn", *P], 1e-5),
    "dsdi": (["--schedule", "dsdi", *P], 3e-6),
    "dsdgl-average": (["--schedule", "dsdgl", "--target-ema", "0.98", *P], 3e-5),
    "shortcut-w1": (["--schedule", "shortcut", "--guidance", "1", "1"], None),
    "shortcut-w2": (["--schedule", "shortcut", "--guidance", "2", "2"], None),
}
TRAINED = {f"trained-w{w}": [*JUMPS, "--guidance", str(w)] for w in (1, 2)}
GUIDANCE = 1.0, 2.0                                           # built into some, while the others are sampled with each
BAKED = {f"{kind}-w{w:g}": w for kind in ("shortcut", "trained") for w in GUIDANCE}
CLASSIFIER = dict(updates=1500, batch=64, unseen=2000)

# The claim, and two rows of which the first should have the higher accuracy, at their lowest guidance.
CLAIMS = {
    "DSDI beats TSD": ("dsdi", "tsd"),
    "an average as the target beats TSD": ("dsdgl-average", "tsd"),
    "shortcut beats dsdgl-average": ("shortcut-w1", "dsdgl-average"),
    "guidance that is built in helps shortcut": ("shortcut-w2", "shortcut-w1"),
    "guidance that is built in helps training with jumps": ("trained-w2", "trained-w1"),
    "PD beats DSDI": ("pd", "dsdi"),
    "DSDN, which needs no schedule, beats DSDI": ("dsdn", "dsdi"),
    "DSDI beats the undistilled model": ("dsdi", "undistilled"),
    "TSD beats the undistilled model": ("tsd", "undistilled"),
}

class Classifier:
    """A network that learns at once to tell the built-in pictures' ten kinds apart."""

    def __init__(self, size):
        images = load_data(None, size)
        torch.manual_seed(0)
        layers = [(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ((3, 32), (32, 64), (64, 128))]
        self.net = nn.Sequential(*sum(layers, ()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(SHAPES)))
        opt = torch.optim.Adam(self.net.parameters(), lr=2e-3)
        for step in progress(iterable=range(CLASSIFIER["updates"]), desc="the classifier"):
            x, y = images.batch(step, CLASSIFIER["batch"], seed=0)
            opt.zero_grad()
            nn.functional.cross_entropy(self.net(x), y).backward()
            opt.step()
        self.net.eval()
        unseen = range(len(images), len(images) + CLASSIFIER["unseen"])
        self.own_accuracy = self.accuracy(to_tensor(np.stack([draw_picture(i, size) for i in unseen])),
                                          torch.tensor(unseen) % len(SHAPES))

    @torch.no_grad()
    def accuracy(self, x, y):
        """The percentage of images x (N, 3, H, W) in [-1, 1] that it takes for their classes y (N,)."""
        found = torch.cat([self.net(part).argmax(1) for part in x.split(250)])
        return 100 * (found == y).double().mean().item()

classifier = cache(Classifier)                                # trained where a figure is missing, once

def scored(table, ckpt, guidance, **more):
    """{guidance: [[accuracy in percent, quick score] at each of STEPS]} of a checkpoint, with `more` beside it."""
    def at(w, steps):
        sampler = table.sampler(ckpt, w=w)
        x = drawn(sampler, steps, table.args.n)
        return [judge.accuracy(x, sampler.labels(range(len(x))).cpu()), table.quick.of_images(x)[0]]
    judge = classifier(table.sampler(ckpt).image_shape[1])
    table.made("classifier", lambda: judge.own_accuracy)
    return dict(more, scores={f"{w:g}": [at(w, s) for s in STEPS] for w in guidance})

def guidance(name):
    """What a model is sampled with: 1 where its guidance is built in."""
    return (1.0,) if name in BAKED else GUIDANCE

def training(name):
    """About how many guided evaluations it takes to train one of TRAINED; the others are not trained."""
    if name not in TRAINED:
        return 0
    args = train.parse_args(TRAINED[name])
    return 2 * args.updates * args.batch

def make(table):
    """All figures that are missing, and the picture."""
    finals = {f"{name}, seed {seed}": (name, seed) for seed in table.args.seeds for name in table.args.methods}
    scoring = 1.5 * table.args.n * sum(STEPS)                 # of the guided evaluations that `tell_time` counts
    costs = {UNDISTILLED: ((), scoring, 0)} | {
        figure: ((name,) * (name in METHODS), scoring + training(name), 0) for figure, (name, _) in finals.items()}
    def of_run(rates, name, seed):
        if name in TRAINED:
            out = table.runs / f"{name}-seed{seed}"
            to_the_end(train.main, out, [*TRAINED[name], "--seed", str(seed), "--device", table.args.device])
            return scored(table, out / "ckpt.pt", guidance(name))
        return scored(table, table.run(name, rates[name], seed), guidance(name), lr=rates[name])
    undistilled = UNDISTILLED, lambda: scored(table, table.base, GUIDANCE)
    if table.gather(finals, costs, undistilled, of_run):      # not after trainings alone, which need no base model
        table.draw(METHODS, "", "--steps", *map(str, STEPS), "-n", "4", "--class", "star", "flower", "house", "face")

def page(table):
    """The table in Markdown."""
    found = {name: table.figures.of_seeds(name) for name in ("undistilled", *METHODS, *TRAINED)}
    lines = [f"`python experiments/classes.py`: {table.figures}. The percentage of samples that a classifier "
             f"takes for the class that was asked for, and in brackets the quick score, at N steps; means of seeds of "
             f"distillation, ± half their range. The classifier tells {table.figures.values['classifier']:.1f} % of "
             f"pictures that it never saw. w: guidance, built into the models that jump (shortcut, trained), and in "
             f"the others while sampling, at twice the cost.", "", heading("method", "w", "rate", "seeds", *STEPS)]
    for name, runs in found.items():
        lines += [row(name, [f"{BAKED.get(name, float(w)):g}", rates_of(runs), seeds_of(table.figures, name),
                             *pairs([run["scores"][w] for run in runs])]) for w in (runs[0]["scores"] if runs else ())]
    def wrong(name, steps):
        return [100 - run["scores"]["1"][STEPS.index(steps)][0] for run in found.get(name, [])]
    return "\n".join([*lines, *claims_table(CLAIMS, STEPS, table.figures, wrong,
                                            ", by the share that the classifier takes for another class, sampled "
                                            "without guidance (shortcut-w2 and trained-w2 have theirs built in)")])

def main(argv=None):
    p = Experiment.flags("classes", __doc__, samples=500)
    p.add_argument("--methods", nargs="+", choices=[*METHODS, *TRAINED], default=[*METHODS, *TRAINED], metavar="M",
                   help="only the runs of these (default: all); the page has what is there")
    args = p.parse_args(argv)
    if args.data:
        sys.exit("error: classes.py is about the built-in pictures: it takes no --data")
    table = Experiment("classes", args, BASE, {m: METHODS[m] for m in args.methods if m in METHODS})
    table.sitting(make, page)

if __name__ == "__main__":
    main()
