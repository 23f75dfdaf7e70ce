"""How many updates a method needs, and whether DSD and PD are best one after the other: two claims of the paper.

    python experiments/claims.py --data celeba-10k.zip  # out/table2-16: claims.md, .json, .png; 3 hours on an old core
    python experiments/claims.py --seeds                # only the page, of what claims.json has

The base model is trained as that of table2.py --size 16. Each number of updates has a rate of its own, chosen by a run
of another seed. What claims.json has is not made again, so that several sittings and machines may each make some of it.
"""

from common import (
    UNDISTILLED,
    Experiment,
    claims_table,
    evaluations,
    heading,
    pairs,
    plain_numbers,
    pyplot,
    row,
    seeds_of,
)
from table2 import BASE, SIZES

import distill

plt = pyplot()
STEPS = 1, 2, 4, 8
ABOUT = "results.md#how-many-updates-and-one-method-after-the-other"
TICKS = 32, 128, 512, 1024                                    # of the picture
KINDS = {                                                     # flags, and for each P the rate to begin the search at
    "dsdi": (["--schedule", "dsdi"], {32: 1e-5, 128: 3e-6, 512: 1e-6, 1024: 1e-6, 160: 3e-6, 320: 1e-6}),
    "tsd": (["--schedule", "tsd"], {32: 1e-4, 128: 3e-5, 512: 1e-5}),
    "pd": (["--schedule", "pd"], {32: 3e-4, 128: 1e-4, 256: 1e-4, 512: 3e-5}),
}
def of_updates(kind, p):
    """The flags of so many updates of one of KINDS."""
    return [*KINDS[kind][0], "--updates", str(p), "--batch", "16"]

METHODS = {f"{kind}, P = {p}": (of_updates(kind, p), lr)
           for kind, (_, rates) in KINDS.items() for p, lr in rates.items()}
# The runs of one method that ORDERS are compared with, at other rates too: rate does more than the order may.
METHODS |= {f"{kind} at {lr}, P = {p}": ([*of_updates(kind, p), "--lr", lr], None)
            for kind, p, lr in (("pd", 256, "3e-4"), ("dsdi", 320, "3e-6"))}

# Of about one cost with 256 updates of PD and 320 of DSD: 8 of PD take as long as 9 to 10 of DSD (docs/results.md).
ORDERS = {
    "DSD first, PD after": ["dsdi, P = 160", "pd, P = 128"],
    "PD first, DSD after": ["pd, P = 128", "dsdi, P = 160"],
}

# The claim, and two rows of which the first should have the lower score.
CLAIMS = {
    "few updates suffice: 128 of DSDI beat the undistilled model": ("dsdi, P = 128", "undistilled"),
    "128 beat 512 of DSDI, each at its best rate": ("dsdi, P = 128", "dsdi, P = 512"),
    "128 beat 1,024": ("dsdi, P = 128", "dsdi, P = 1024"),
    "DSDI's 128 beat PD's 128": ("dsdi, P = 128", "pd, P = 128"),
    "PD's 512 beat its 128": ("pd, P = 512", "pd, P = 128"),
    "PD's 512 beat DSDI's 128": ("pd, P = 512", "dsdi, P = 128"),
    "DSD first, PD after, beats PD alone, at equal cost": ("DSD first, PD after", "pd, P = 256"),
    "… and PD alone at the rate that PD has there": ("DSD first, PD after", "pd at 3e-4, P = 256"),
    "DSD first, PD after, beats DSD alone": ("DSD first, PD after", "dsdi, P = 320"),
    "… and DSD alone at a lower rate": ("DSD first, PD after", "dsdi at 3e-6, P = 320"),
    "DSD first, PD after, beats the other order": ("DSD first, PD after", "PD first, DSD after"),
}

def make(table):
    """All figures that are missing."""
    runs, scoring = {name: [name] for name in METHODS} | ORDERS, table.args.n * sum(STEPS)
    finals = {f"{name}, seed {seed}": (name, seed) for seed in table.args.seeds for name in runs}
    def of_run(rates, name, seed):
        stages = [(method, rates[method]) for method in runs[name]]
        place = f"{name}-seed{seed}-{'-'.join(f'{lr:g}' for _, lr in stages)}"
        return dict(lr=[lr for _, lr in stages], scores=table.last_scores(table.distilled(place, seed, *stages), STEPS))
    costs = {figure: (runs[name], scoring, 0) for figure, (name, _) in finals.items()}
    undistilled = UNDISTILLED, lambda: dict(scores=table.quick_scores(table.base, STEPS))
    table.gather(finals, costs, undistilled, of_run)

def page(table):
    """The table in Markdown, and the picture: scores against updates at each step count."""
    found = {name: runs for name in ("undistilled", *METHODS, *ORDERS) if (runs := table.figures.of_seeds(name))}
    draw(found, table.args.out / "claims.png")
    def about(name):
        run = ORDERS.get(name, [name] * (name in METHODS))
        cost = sum(evaluations(distill.parse_args(METHODS[method][0])) for method in run)
        rates = "; ".join(dict.fromkeys(", ".join(f"{lr:g}" for lr in run.get("lr", [])) for run in found[name]))
        return rates, seeds_of(table.figures, name) if run else "", f"{cost / 1000:.1f}" if run else ""
    lines = [f"`python experiments/claims.py --data …`: {table.figures}; [on what]({ABOUT}), in updates of 16. "
             f"Quick score at N steps, mean of seeds of distillation ± half their range, and contrast. Rates: chosen "
             f"by the mean fidelity at 2, 4 and 8 steps of a run of seed {table.CHOICE}, tried in steps of three: a "
             f"row may have too high a one, which gains it 2 steps and costs it 8. Evaluations: thousands of images "
             f"through a network.", "",
             "![scores against updates](claims.png)", "",
             heading("run", "rate", "seeds", "evaluations", *STEPS)]
    lines += [row(name, [*about(name), *pairs([run["scores"] for run in runs])]) for name, runs in found.items()]
    def values(name, steps):
        return [run["scores"][STEPS.index(steps)][0] for run in found.get(name, [])]
    return "\n".join([*lines, *claims_table(CLAIMS, STEPS, table.figures, values)])

def draw(found, path):
    """Scores against the number of updates, a dot for each seed, and a line through the means of each method."""
    figure, axes = plt.subplots(1, len(STEPS), figsize=(4 * len(STEPS), 3.5))
    for i, (axis, steps) in enumerate(zip(axes, STEPS, strict=True)):
        for number, kind in enumerate(KINDS):
            points = sorted((int(name.split(" = ")[1]), [run["scores"][i][0] for run in runs])
                            for name, runs in found.items() if name.startswith(f"{kind}, "))
            for updates, scores in points:
                axis.plot([updates] * len(scores), scores, ".", color=f"C{number}")
            axis.plot([p for p, _ in points], [sum(s) / len(s) for _, s in points], color=f"C{number}", label=kind)
        axis.axhline(found["undistilled"][0]["scores"][i][0], color="grey", linestyle=":", label="undistilled")
        axis.set(xscale="log", yscale="log", xlabel="updates", title=f"quick score at {steps} step{'s' * (steps > 1)}")
        axis.xaxis.set_minor_locator(plt.NullLocator())
        ticks = [p for p in TICKS if f"dsdi, P = {p}" in found]
        axis.set_xticks(ticks, ticks)
        plain_numbers(axis.yaxis)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)

def main(argv=None):
    args = Experiment.flags("table2-16", __doc__, samples=512).parse_args(argv)
    Experiment("claims", args, [*BASE, *SIZES[16]], METHODS).sitting(make, page)

if __name__ == "__main__":
    main()
