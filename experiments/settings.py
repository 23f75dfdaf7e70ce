"""Which settings of jumps matter: one changed at a time, on faces of 16x16, in fine-tuning or in training.

    python experiments/settings.py --data celeba-10k.zip               # fine-tuning: 8 hours on an old core
    python experiments/settings.py --data celeba-10k.zip --training    # `train.py --shortcut`: 9 hours
    python experiments/settings.py --lab                               # in lab.py's plane: ten minutes
    python experiments/settings.py --seeds                             # only the page, of what the JSON has

Fine-tuning has half as many updates as the default, on a model like that of table2.py --size 16; its last row asks
whether many updates and a high rate spoil it. Training is figure3.py's, beside plain training. Writes settings.md,
settings-training.md or settings-lab.md, and .json, to out/table2-16 (--out docs: the pages of the docs). What the JSON
has is not made again.
"""

from functools import partial
from unittest import mock

import figure3
import lab
from common import (
    ROOT,
    STEPS,
    UNDISTILLED,
    Experiment,
    Figures,
    evaluations,
    file_name,
    heading,
    pairs,
    row,
    seeds_of,
    to_the_end,
    write,
)
from table2 import ABOUT, BASE, SIZES
from torch.nn.functional import huber_loss

import distill
import shortcut
import train
from runtime import pick_device, progress

HALF = ["--schedule", "shortcut", "--updates", "300"]
SETTINGS = {                                                  # flags beside HALF
    "the defaults": [],
    "a quarter of the rows jump": ["--share", "0.25"],
    "three quarters": ["--share", "0.75"],
    "targets of a faster average": ["--target-ema", "0.9"],
    "of a slower one": ["--target-ema", "0.99"],
    "twice the rate": ["--lr", "1e-3"],
    "half of it": ["--lr", "2.5e-4"],
    "a rate that stays": ["--lr-end", "5e-4"],
    "a quarter of the own samples": ["--pool", "500"],
    "those in four times the steps": ["--pool", "500", "--steps", "64"],
    "twice the rate, ten times the default's updates": ["--lr", "1e-3", "--updates", "6000"],
}
METHODS = {name: ([*HALF, *flags], None) for name, flags in SETTINGS.items()}      # no search: at their rates

PLAIN = "plain training"
FACES = "faces, 16x16"                                        # of `figure3.SETS`
TRAINING = {                                                  # flags, and arguments of `train_shortcut`, if it jumps
    "the defaults": ([], {}),
    PLAIN: ([], {}),
    "a quarter of the rows jump: `--distill 0.125`": (["--distill", "0.125"], {}),
    "jumps weigh as much as data": ([], dict(weight=1.0)),
    "jumps weigh ten times as much as data": ([], dict(weight=10.0)),
    "a quarter of the rows, but from the first update on": ([], dict(start=0.0)),
    "and weigh as much as data": ([], dict(start=0.0, weight=1.0)),
    "targets of a slower average: `--target-ema 0.99`": (["--target-ema", "0.99"], {}),
    "a rate that stays: `--lr-end 2e-3`": (["--lr-end", "2e-3"], {}),
}

# Of `lab.in_the_lab`, and levels: the number of lengths; error: what stands for `shortcut.squared_error`.
LAB = {
    "those of lab.md": {},
    "a quarter of the rows jump": dict(share=0.25),
    "three quarters": dict(share=0.75),
    "targets of a faster average": dict(target_ema=0.8),
    "of a slower one": dict(target_ema=0.995),
    "of the weights themselves": dict(target_ema=0.0),
    "a third of the rate": dict(lr=3e-4, lr_end=3e-5),
    "a rate that stays": dict(lr_end=1e-3),
    "a hundred own samples": dict(pool=100),
    "ten thousand": dict(pool=10_000),
    "lengths from 1 to 1/16": dict(levels=5),
    "from 1 to 1/256": dict(levels=9),
    "the loss in x instead of v": dict(error=lambda v, target, s: (s * (v - target)).square()),
    "absolute differences": dict(error=lambda v, target, s: (v - target).abs()),
    "Huber's loss, linear from 0.03 on": dict(error=lambda v, target, s: huber_loss(v, target, "none", 0.03)),
}

def make(table):
    """All figures that are missing."""
    scoring = table.args.n * sum(STEPS)
    finals = {f"{name}, seed {seed}": (name, seed) for seed in table.args.seeds for name in METHODS}
    def of_run(rates, name, seed):
        ckpt = table.distilled(f"settings-seed{seed}/{name}", seed, (name, rates[name]))
        return dict(scores=table.last_scores(ckpt, STEPS))
    costs = {figure: ((name,), scoring, 0) for figure, (name, _) in finals.items()}
    undistilled = UNDISTILLED, lambda: dict(scores=table.quick_scores(table.base, STEPS))
    table.gather(finals, costs, undistilled, of_run)

def page(table):
    """The table in Markdown."""
    found = {name: runs for name in ("undistilled", *METHODS) if (runs := table.figures.of_seeds(name))}
    lines = [f"`python experiments/settings.py --data …`: {table.figures}; [on what]({ABOUT[16]}). Quick score at N "
             f"steps, mean of seeds of distillation ± half their range, and contrast. Evaluations: thousands of images "
             f"through a network.", "",
             heading("setting", "flags", "seeds", "evaluations", *STEPS)]
    for name, runs in found.items():
        cost = evaluations(distill.parse_args(METHODS[name][0])) / 1000 if name in METHODS else 0
        lines.append(row(name, [f"`{' '.join(SETTINGS.get(name, []))}`" if SETTINGS.get(name) else "",
                                seeds_of(table.figures, name) if cost else "", f"{cost:.1f}" if cost else "",
                                *pairs([run["scores"] for run in runs])]))
    return "\n".join(lines)

def trained(args, name, seed):
    """The checkpoint of a training of TRAINING, made or gone on with."""
    flags, changed = TRAINING[name]
    out = ROOT / args.runs / file_name(f"training-{name}-{seed}")
    flags = [*figure3.flags_of(args, FACES, "plain" if name == PLAIN else "shortcut"), *flags, "--seed", str(seed),
             "--device", args.device]
    with mock.patch("train.train_shortcut", partial(shortcut.train_shortcut, **changed)):
        to_the_end(train.main, out, flags)
    return out / "ckpt.pt"

def training(args):
    """The page of trainings, after those that are missing were made."""
    figures = Figures(args.out / "settings-training.json", dict(samples=args.n), ROOT / args.runs)
    missing = [(name, seed) for seed in args.seeds for name in TRAINING if f"{name}, seed {seed}" not in figures.values]
    if missing:
        quick = figure3.quick_score(args, FACES, "shortcut", len(missing), 3.5, sum(STEPS))
    def of_run(name, seed):
        return quick.of_file(trained(args, name, seed), STEPS, pick_device(args.device))
    for name, seed in missing:
        figures.made(f"{name}, seed {seed}", of_run, name, seed)
    found = {name: runs for name in TRAINING if (runs := figures.of_seeds(name))}
    lines = [f"`python experiments/settings.py --data … --training`: {figures}; [on what]({ABOUT[16]}). Quick score at "
             f"N steps of `train.py --distill 0.25 --shortcut` with one setting changed, and of plain training for the "
             f"same time: mean of seeds of training ± half their range, and contrast.", "",
             heading("setting", "seeds", *STEPS)]
    return "\n".join([*lines, *(row(name, [seeds_of(figures, name), *pairs(runs)]) for name, runs in found.items())])

def in_the_lab(net, mixture, seed, levels=shortcut.LEVELS, error=shortcut.squared_error, **changed):
    """`lab.distances` of a network that was fine-tuned with some settings changed."""
    with (mock.patch("shortcut.LEVELS", levels), mock.patch("ddim.SHORTEST", 0.5 ** (levels - 1)),
          mock.patch("shortcut.squared_error", error)):
        student = lab.in_the_lab(net, mixture, "shortcut", seed=seed, **lab.SETTINGS["shortcut"] | changed)
        return lab.distances(student, mixture)

def laboratory(seeds):
    """The page of the laboratory."""
    mixture, found = lab.Mixture(), {}
    for seed in progress(iterable=seeds, desc="the laboratory", unit="seed"):
        net = lab.trained(mixture, seed=seed)
        found.setdefault("trained", []).append(lab.distances(net, mixture))
        for name, changed in LAB.items():
            values = ", ".join(f"{key} {value:g}" for key, value in changed.items() if not callable(value))
            found.setdefault(name + (f": {values}" if values else ""), []).append(
                in_the_lab(net, mixture, seed, **changed))
    return lab.page("`python experiments/settings.py --lab`", found)

def main(argv=None):
    p = Experiment.flags("table2-16", __doc__, samples=256)
    p.add_argument("--lab", action="store_true", help="in the laboratory instead, which has --seeds and --out only")
    p.add_argument("--training", action="store_true", help="of training instead of fine-tuning")
    args = p.parse_args(argv)
    if args.training and (args.lab or args.ckpt or args.seeds and not args.data):
        p.error("--training is of faces: give them as --data, without --lab and --ckpt")
    if args.training:
        return write(args.out / "settings-training.md", training(args))
    if args.lab and (not args.seeds or args.data or args.ckpt):
        p.error("--lab has no page without --seeds, and takes no --data and no --ckpt")
    if args.lab:
        return write(args.out / "settings-lab.md", laboratory(args.seeds))
    Experiment("settings", args, [*BASE, *SIZES[16]], METHODS).sitting(make, page)

if __name__ == "__main__":
    main()
