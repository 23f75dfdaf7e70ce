"""Tables 1, 2 and 4 in small, and Figure 2: every method on one model of 32x32 faces, at 1 to 64 steps.

    python experiments/table2.py --data celeba-10k.zip        # out/table2: a page, .json, .png; a day on an old core
    python experiments/table2.py --data celeba-10k.zip --size 16                # the same of 16x16, half the time
    python experiments/table2.py --data celeba-10k.zip --weights pt_inception.pth -n 10000 --out out/fid     # on a GPU
    python experiments/table2.py --data celeba-10k.zip --weights random --methods tsd dsdi  # adds rFID of these two

Trains the base model, then distils it with every method at its own rate, chosen by the fidelity (not shown) of a run
of another seed (shortcut also at fixed ones), and the paper's four also as the paper does, at the best rate for TSD.
Tells the time first. What table2.json has is not made again, so that several sittings, one after the other, may
each make some of it: with --seeds, and on another machine with the same base as --ckpt and table2.json copied along.
"""

from pathlib import Path

from common import (
    DATA,
    STEPS,
    UNDISTILLED,
    Experiment,
    cell,
    claims_table,
    evaluations,
    fid_scores,
    heading,
    least_to_most,
    rates_of,
    row,
    seconds,
    seeds_of,
    verdict,
)

import distill

BASE = ["--crop", "0.787", "--updates", "4000", "--ema", "0.998", "--lr-end", "1e-5", "--sample-every", "0"]
SIZES = {16: ["--size", "16"], 32: ["--size", "32", "--model", "small32", "--updates", "6000"]}
P = ["--updates", "128", "--batch", "32"]
STEADIED = ["--schedule", "dsdgl", "--target-ema", "0.98", *P]
BRIEF = ["--schedule", "shortcut", "--updates", "76", "--pool", "64", "--steps", "32"]
METHODS = {                                                   # flags, and the rate to begin the search at
    **{name: (["--schedule", name, *P], lr) for name, lr in (
        ("pd", 3e-4), ("tsd", 1e-4), ("dsdn", 3e-5), ("dsdi", 1e-5), ("dsdgl", 1e-5), ("dsdgexp", 1e-5))},
    "dsdgl-average": (STEADIED, 3e-4),
    "shortcut": (["--schedule", "shortcut"], None),
    "shortcut-tuned": (["--schedule", "shortcut"], 1e-3),
    "shortcut-1e-3": (["--schedule", "shortcut", "--lr", "1e-3"], None),
    "shortcut-data": (["--schedule", "shortcut", "--data", DATA], None),
    "shortcut-middle": (["--schedule", "shortcut", "--updates", "300", "--pool", "375"], None),
    "shortcut-brief": (BRIEF, None),
    "shortcut-brief-tuned": (BRIEF, 1e-3),
    "shortcut-tenfold": (["--schedule", "shortcut", "--updates", "6000", "--lr", "1e-3"], None),
    # Of about as many evaluations as shortcut, 10^5.
    "pd-long": (["--schedule", "pd", *P, "--updates", "1024"], 3e-5),
    "tsd-long": (["--schedule", "tsd", *P, "--updates", "1024"], 1e-5),
    "dsdgl-average-long": ([*STEADIED, "--updates", "1536"], 3e-6),
}
PAPERS = "dsdn", "dsdi", "dsdgl", "dsdgexp"                   # which the paper compares with TSD at one rate
ABOUT = {16: "results.md#every-method-on-faces", 32: "shortcut.md#faces"}       # what was distilled, by size
OWN, SAME = "own rate", "TSD's rate"

# The claim, and two rows of which the first should have the lower score: at their own rates unless another is named.
CLAIMS = {
    "DSDI beats TSD at TSD's rate": (f"dsdi, {SAME}", "tsd"),
    "DSDI beats TSD, each at its own rate": ("dsdi", "tsd"),
    "DSDN, which needs no schedule, beats DSDI": ("dsdn", "dsdi"),
    "DSDGL beats DSDI: a linear reduction, halving": ("dsdgl", "dsdi"),
    "DSDN beats DSDGL": ("dsdn", "dsdgl"),
    "PD, which reads data, beats DSDI": ("pd", "dsdi"),
    "an average as the target helps DSDGL": ("dsdgl-average", "dsdgl"),
    "DSDGL with an average beats TSD": ("dsdgl-average", "tsd"),
    "PD with eight times as many updates beats DSDI": ("pd-long", "dsdi"),
    "shortcut-brief beats dsdgl-average, of 10^4 evaluations": ("shortcut-brief", "dsdgl-average"),
    "shortcut-brief beats PD": ("shortcut-brief", "pd"),
    "shortcut-brief-tuned beats dsdgl-average": ("shortcut-brief-tuned", "dsdgl-average"),
    "shortcut-brief-tuned beats PD": ("shortcut-brief-tuned", "pd"),
    "shortcut-middle, of 3·10^4, beats dsdgl-average": ("shortcut-middle", "dsdgl-average"),
    "shortcut-middle beats PD": ("shortcut-middle", "pd"),
    "shortcut beats dsdgl-average": ("shortcut", "dsdgl-average"),
    "shortcut beats PD": ("shortcut", "pd"),
    "shortcut beats TSD": ("shortcut", "tsd"),
    "shortcut-tuned beats shortcut": ("shortcut-tuned", "shortcut"),
    "shortcut at 1e-3 beats shortcut": ("shortcut-1e-3", "shortcut"),
    "shortcut-data, which learns from data, beats shortcut": ("shortcut-data", "shortcut"),
    "ten times its updates beat it": ("shortcut-tenfold", "shortcut-1e-3"),
    "shortcut beats dsdgl-average-long, of 10^5": ("shortcut", "dsdgl-average-long"),
    "shortcut beats PD-long": ("shortcut", "pd-long"),
    "shortcut beats TSD-long": ("shortcut", "tsd-long"),
    "DSDI beats the undistilled model": ("dsdi", "undistilled"),
    "TSD beats the undistilled model": ("tsd", "undistilled"),
}

def source_of(args):
    """What the names of figures begin with: the weights that score them, or nothing for the quick score."""
    return f"{Path(args.weights).name}: " if args.weights else ""

def scored(table, ckpt, **more):
    """{steps: {score: value}} of a checkpoint, by fid.py if there are --weights, with `more` beside it."""
    if table.args.weights:
        scores, contrast = fid_scores(ckpt, STEPS, table.args.n, table.data, table.args.weights, table.args.device)
        return dict(more, scores=scores, contrast=contrast)
    sampler = table.sampler(ckpt)
    return dict(more, contrast=table.quick.contrast,
                scores={str(s): table.quick.with_variety(sampler, s) for s in STEPS})

def finals(args):
    """{figure: (method, way, seed)} of all that the table shows but the undistilled model."""
    ways = [(name, OWN) for name in args.methods]
    ways += [(name, SAME) for name in PAPERS if {name, "tsd"} <= {*args.methods}]
    return {f"{source_of(args)}{name}, {way}, seed {seed}": (name, way, seed)
            for seed in args.seeds for name, way in ways}

def make(table):
    """All figures that are missing, and the picture."""
    scoring, looks = table.args.n * sum(STEPS), table.args.n * len(STEPS) * bool(table.args.weights)
    undistilled, asked = source_of(table.args) + UNDISTILLED, finals(table.args)
    costs = {undistilled: ((), scoring, looks)} | {
        figure: ((name,), scoring, looks) for figure, (name, *_) in asked.items()}
    def of_run(rates, name, way, seed):
        lr, batch = rates[name if way == OWN else "tsd"], distill.parse_args(METHODS[name][0]).batch
        ckpt = table.run(name, lr, seed)
        return scored(table, ckpt, lr=lr, seconds=round(seconds(ckpt.parent, batch)))
    table.gather(asked, costs, (undistilled, lambda: scored(table, table.base)), of_run)
    table.draw(METHODS, f", {OWN}", "--steps", *map(str, STEPS), "-n", "2")

def page(table):
    """The page in Markdown."""
    lines = [f"`python experiments/table2.py --data … --size {table.args.size}`: {table.figures}; [on "
             f"what]({ABOUT[table.args.size]}). Means of seeds of distillation, ± half their range; the base model is "
             f"one. Own rates: chosen by the fidelity of a run of seed {table.CHOICE}, but for those of shortcut "
             f"whose name does not end in tuned. Evaluations: thousands of images through a network. Seconds, where "
             f"they are known: of the updates, without own samples, least and most of the seeds, beside other "
             f"programs."]
    return "\n".join([*lines, *(line for source in table.figures.sources()
                                for line in tables(table.figures.of_source(source)))])

def tables(figures):
    """Lines of Markdown: the tables and the claims of the figures of one `source`."""
    rows = ["undistilled", *(f"{name}, {way}" for way in (OWN, SAME) for name in METHODS)]
    found = {name: runs for name in rows if (runs := figures.of_seeds(name))}
    first, timed = found["undistilled"][0], any("seconds" in run for runs in found.values() for run in runs)
    def values(name, steps, metric):
        return [run["scores"][str(steps)][metric] for run in found.get(name, [])]
    claims = {claim: [f"{side}, {OWN}" if side in METHODS else side for side in sides]
              for claim, sides in CLAIMS.items()}
    def about(name, runs):
        if name == "undistilled":
            return [""] * (3 + timed)
        flags, _ = METHODS[name.split(",")[0]]
        cost = evaluations(distill.parse_args(flags))
        took = least_to_most([run["seconds"] for run in runs if "seconds" in run])
        return rates_of(runs), seeds_of(figures, name), f"{cost / 1000:.1f}", *[took] * timed
    by = f"By `fid.py --weights {figures.source[:-2]}`. " if figures.source else ""
    lines = ["", f"{by}Contrast of the real images: {first['contrast']:.3f}."]
    metrics = [m for m in first["scores"]["1"] if not any(part in m for part in ("std", "KID", "fidelity"))]
    head = heading("method", "rate", "seeds", "evaluations", *["seconds"] * timed, *STEPS)
    for metric in metrics:
        lines += ["", f"**{metric}** at N steps", "", head]
        lines += [row(name, [*about(name, runs), *(cell(values(name, s, metric)) for s in STEPS)])
                  for name, runs in found.items()]
    sharp = [verdict([first["contrast"]] * 2, values(f"dsdgexp, {OWN}", s, "contrast")) for s in STEPS]
    over = "DSDGEXP over-sharpens (by contrast: every seed has more than the real images)"
    lines += claims_table(claims, STEPS, figures, lambda name, steps: values(name, steps, metrics[0]),
                          f", by {metrics[0]}", {over: sharp})
    return lines

def main(argv=None):
    p = Experiment.flags("table2", __doc__, samples=256)
    p.add_argument("--size", type=int, choices=SIZES, default=32,
                   help="side of the images (default: 32); the names of others' files and folders end in it: table2-16")
    p.add_argument("--weights", metavar="FILE", help="score by fid.py with these features, not by the quick score")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="M",
                   help="only the runs of these (default: all); the page and the picture have what is there")
    args = p.parse_args(argv)
    learns = [name for name in args.methods if DATA in METHODS[name][0]]
    if args.seeds and learns and not args.data:
        p.error(f"{learns[0]} learns from images: give them as --data, or name other --methods")
    name, args.runs = (end + f"-{args.size}" * (args.size != p.get_default("size")) for end in ("table2", args.runs))
    table = Experiment(name, args, [*BASE, *SIZES[args.size]], {m: METHODS[m] for m in args.methods})
    table.sitting(make, page)

if __name__ == "__main__":
    main()
