"""Tables 1, 2 and 4 in small, and Figure 2: every method on one model of 32x32 faces, at 1 to 64 steps.

    python experiments/table2.py --data celeba-10k.zip         # docs/table2.md, .json and .png; 3 hours on a thread
    python experiments/table2.py --data celeba-10k.zip --seeds 1 --ckpt FILE    # elsewhere: a seed, of the same base
    python experiments/table2.py --data celeba-10k.zip --weights pt_inception.pth -n 10000     # FID, on a GPU

Trains the base model, then distils it with every method, twice: at the method's own rate, chosen by fidelity, which is
not shown, of a run of another seed, and as the paper does, all at the rate that is best for TSD. Tells the time first.
What table2.json has is not made again, so that several sittings and machines may each make some of it.
"""

from common import STEPS, Experiment, cell, claims_table, evaluations, fid_scores, heading, row, verdict

import distill
import inception
import train

BASE = ["--crop", "0.787", "--size", "32", "--model", "small32", "--batch", "64", "--updates", "6000", "--ema", "0.999",
        "--lr-end", "1e-5", "--sample-every", "0"]
FINE, COARSE, JUMPING = [1e-6, 3e-6, 1e-5, 3e-5], [1e-5, 3e-5, 1e-4, 3e-4], [5e-4, 1e-3]     # rates to choose from
P = ["--updates", "128", "--batch", "32"]
METHODS = {name: (["--schedule", name, *P], COARSE) for name in ("pd", "tsd")} | {
    name: (["--schedule", name, *P], FINE) for name in ("dsdn", "dsdi", "dsdgl", "dsdgexp")} | {
    "dsdgl-average": (["--schedule", "dsdgl", "--target-ema", "0.98", *P], COARSE),
    "shortcut": (["--schedule", "shortcut"], JUMPING),
    "shortcut-brief": (["--schedule", "shortcut", "--updates", "76", "--pool", "64", "--steps", "32"], JUMPING),
}
PAPERS = "dsdn", "dsdi", "dsdgl", "dsdgexp"                   # which the paper compares with TSD at one rate
OWN, SAME = "own rate", "TSD's rate"

# The claim, and two rows of which the first should have the lower score.
CLAIMS = {
    "DSDI beats TSD at TSD's rate": (f"dsdi, {SAME}", f"tsd, {OWN}"),
    "DSDI beats TSD, each at its own rate": (f"dsdi, {OWN}", f"tsd, {OWN}"),
    "DSDN, which needs no schedule, beats DSDI": (f"dsdn, {OWN}", f"dsdi, {OWN}"),
    "DSDN beats DSDGL": (f"dsdn, {OWN}", f"dsdgl, {OWN}"),
    "an average as the target helps DSDGL": (f"dsdgl-average, {OWN}", f"dsdgl, {OWN}"),
    "shortcut beats dsdgl-average": (f"shortcut, {OWN}", f"dsdgl-average, {OWN}"),
    "shortcut does at equal cost": (f"shortcut-brief, {OWN}", f"dsdgl-average, {OWN}"),
    "DSDI beats the undistilled model": (f"dsdi, {OWN}", "undistilled"),
    "TSD beats the undistilled model": (f"tsd, {OWN}", "undistilled"),
}

def scored(table, ckpt, **more):
    """{steps: {score: value}} of a checkpoint by fid.py, with `more` beside it."""
    scores, contrast = fid_scores(ckpt, STEPS, table.args.n, table.data, table.args.weights, table.args.device)
    return dict(more, scores=scores, contrast=contrast)

def finals(args):
    """{figure: (method, way)} of all that the table shows but the undistilled model."""
    ways = [(name, OWN) for name in METHODS] + [(name, SAME) for name in PAPERS if name in METHODS]
    return {f"{name}, {way}, seed {seed}": (name, way, seed) for seed in args.seeds for name, way in ways}

def make(table):
    """All figures that are missing, and the picture."""
    scoring, looks = table.args.n * sum(STEPS), table.args.n * len(STEPS)
    table.tell_time(table.jobs({"undistilled, seed 0": ((), scoring, looks)} | {
        figure: ((name,), scoring, looks) for figure, (name, *_) in finals(table.args).items()}))
    table.made("undistilled, seed 0", lambda: scored(table, table.base))
    rates = table.rates()
    for figure, (name, way, seed) in finals(table.args).items():
        lr = rates[name if way == OWN else "tsd"]
        table.made(figure, lambda name=name, lr=lr, seed=seed: scored(table, table.run(name, lr, seed), lr=lr))
    table.draw(rates, "--steps", *map(str, STEPS), "-n", "2")

def page(table):
    """The tables in Markdown."""
    rows = ["undistilled", *(f"{name}, {way}" for way in (OWN, SAME) for name in METHODS)]
    found = {name: runs for name in rows if (runs := table.figures.of_seeds(name))}
    first = found["undistilled"][0]
    def values(name, steps, metric):
        return [run["scores"][str(steps)][metric] for run in found.get(name, [])]
    def about(name, runs):
        if name == "undistilled":
            return "", "", ""
        flags, grid = METHODS[name.split(",")[0]]
        end = " (end of the grid)" * (OWN in name and runs[0]["lr"] in (grid[0], grid[-1]))
        return f"{runs[0]['lr']:g}{end}", f"{len(runs)}", f"{evaluations(distill.parse_args(flags)) / 1000:.1f}"
    lines = [f"`python experiments/table2.py`: {table.figures}. Means of seeds of distillation, ± half their "
             f"range; the base model is one. Own rates: chosen by the fidelity of a run of seed "
             f"{table.CHOICE}. Evaluations: thousands of images through a network. Contrast of the real images: "
             f"{first['contrast']:.3f}."]
    metrics = [m for m in first["scores"]["1"] if not any(part in m for part in ("std", "KID", "fidelity"))]
    for metric in metrics:
        lines += ["", f"**{metric}** at N steps", "", heading("method", "rate", "seeds", "evaluations", *STEPS)]
        lines += [row(name, [*about(name, runs), *(cell(values(name, s, metric)) for s in STEPS)])
                  for name, runs in found.items()]
    lines += claims_table(CLAIMS, STEPS, lambda name, steps: values(name, steps, metrics[0]), f", by {metrics[0]}")
    sharp = [verdict([first["contrast"]] * 2, values(f"dsdgexp, {OWN}", s, "contrast")) for s in STEPS]
    return "\n".join([*lines, row("DSDGEXP over-sharpens: more contrast than the real images", sharp)])

def main(argv=None):
    p = Experiment.flags("table2", __doc__, samples=256)
    p.add_argument("--weights", default=inception.RANDOM, metavar="FILE", help="of the features (default: random)")
    args = p.parse_args(argv)
    table = Experiment("table2", args, BASE, METHODS, size=train.parse_args(BASE).size, weights=args.weights)
    table.sitting(make, page)

if __name__ == "__main__":
    main()
