"""Which settings of `--schedule shortcut` matter: one changed at a time, half as many updates, on table2.py's model.

    python experiments/settings.py --data celeba-10k.zip   # out/table2: settings.md and .json; an hour on an old core
    python experiments/settings.py --seeds                 # only the page, of what settings.json has

What settings.json has is not made again. Small differences mean nothing: the page shows more than one seed if you do.
"""

from common import STEPS, Experiment, evaluations, heading, pairs, row, seeds_of
from table2 import BASE, SIZES

import distill

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
}
METHODS = {name: ([*HALF, *flags], None) for name, flags in SETTINGS.items()}      # no search: at their rates

def make(table):
    """All figures that are missing."""
    scoring = table.args.n * sum(STEPS)
    finals = {f"{name}, seed {seed}": (name, seed) for seed in table.args.seeds for name in METHODS}
    table.tell_time(table.jobs({figure: ((name,), scoring, 0) for figure, (name, _) in finals.items()}))
    table.made("undistilled, seed 0", lambda: dict(scores=table.quick_scores(table.base, STEPS)))
    for figure, (name, seed) in finals.items():
        lr = distill.parse_args(METHODS[name][0]).lr
        table.made(figure, lambda name=name, seed=seed, lr=lr: dict(scores=table.last_scores(
            table.distilled(f"settings-seed{seed}/{name}", seed, (name, lr)), STEPS)))

def page(table):
    """The table in Markdown."""
    found = {name: runs for name in ("undistilled", *METHODS) if (runs := table.figures.of_seeds(name))}
    lines = [f"`python experiments/settings.py`: {table.figures}. Quick score at N steps, mean of seeds of "
             f"distillation ± half their range, and contrast. Evaluations: thousands of images through a network.", "",
             heading("setting", "flags", "seeds", "evaluations", *STEPS)]
    for name, runs in found.items():
        cost = evaluations(distill.parse_args(METHODS[name][0])) / 1000 if name in METHODS else 0
        lines.append(row(name, [f"`{' '.join(SETTINGS.get(name, []))}`" if SETTINGS.get(name) else "",
                                seeds_of(table.figures, name) if cost else "", f"{cost:.1f}" if cost else "",
                                *pairs([run["scores"] for run in runs])]))
    return "\n".join(lines)

def main(argv=None):
    args = Experiment.flags("table2", __doc__, samples=256).parse_args(argv)
    Experiment("settings", args, [*BASE, *SIZES[16]], METHODS).sitting(make, page)

if __name__ == "__main__":
    main()
