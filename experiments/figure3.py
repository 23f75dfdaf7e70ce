"""Figure 3: does self-distillation help while a model is trained? Scores along the run, and at its end at every N.

    python experiments/figure3.py                                  # built-in pictures; ten hours on an old core
    python experiments/figure3.py --data celeba-10k.zip            # faces of 16x16, for the same page; as long
    python experiments/figure3.py --data celeba-10k.zip --size 32  # of 32x32: four times as long
    python experiments/figure3.py --seeds 1                        # elsewhere: of one seed

Trains models plainly, with Equation 1, and told how far they jump (docs/shortcut.md), for the same time each, and then
fine-tunes the plain one. Writes out/figure3/figure3.md, .json and .png (--out docs: adds to the page of the docs), and
pictures of samples. What figure3.json has is not made again, and a run that was stopped goes on.
"""

import sys
from unittest import mock

from common import (
    ROOT,
    STEPS,
    Figures,
    QuickScore,
    claims_table,
    draw_if_here,
    evaluations,
    file_name,
    heading,
    least_to_most,
    pairs,
    plain_numbers,
    pyplot,
    row,
    seconds,
    seconds_per_evaluation,
    shared_flags,
    tell_hours,
    to_the_end,
    write,
)
from table2 import SIZES

import distill
import train
from checkpoint import load_checkpoint
from hooks import sampler_of
from rundir import read_log
from runtime import pick_device

plt = pyplot()
SCORED, POINTS = (4, 64), 4                                   # steps, and how often along a run
FACES = ["--crop", "0.787", "--ema", "0.998"]
SETS = {                                                      # flags of training, and the updates that `share` is of
    "built-in": ([], 2000),
    "faces, 16x16": (FACES + SIZES[16], 2000),
    "faces, 32x32": (FACES + SIZES[32], 3000),
}
# The share of updates with which the trainings take the same time (b = 0.125: as many as 0.25). Evaluations for each
# image of a batch: one with a gradient and, of Equation 1, one more; two for each row that jumps.
TRAIN = ["--lr-end", "1e-5", "--sample-every", "0"]
KINDS = {
    "plain": dict(share=1.2, evaluations=1, flags=["--distill", "0", *TRAIN]),
    "Equation 1": dict(share=1, evaluations=2, flags=["--distill", "0.15", *TRAIN]),
    "shortcut": dict(share=1.07, evaluations=1.5, flags=["--distill", "0.25", "--shortcut", *TRAIN]),
    "shortcut, b = 0.125": dict(share=1.07, evaluations=1.25, flags=["--distill", "0.125", "--shortcut", *TRAIN]),
}
# Fine-tuning takes the time of 1,233 updates of plain training, its own samples included: 118,400 evaluations, where
# a backward pass counts as two. So the second of these takes as long as one of the trainings.
AFTER = {"plain, then shortcut": 1.2, "both in the time of one": 0.58}          # the share of the plain training
TUNED = ["--schedule", "shortcut", "--no-guard"]
NAMES = [*KINDS, *AFTER]

# The claim, and two rows of which the first should have the lower score.
CLAIMS = {
    "Equation 1 beats plain training": ("Equation 1", "plain"),
    "--shortcut beats plain training": ("shortcut", "plain"),
    "--shortcut, b = 0.125, beats plain training": ("shortcut, b = 0.125", "plain"),
    "fine-tuning by shortcut helps": ("plain, then shortcut", "plain"),
    "fine-tuning by shortcut helps, both in the time of one training": ("both in the time of one", "plain"),
    "--shortcut beats fine-tuning in the time of one training": ("shortcut", "both in the time of one"),
}

def place(args, images, name, seed):
    """The folder of a run."""
    return ROOT / args.runs / file_name(f"{images}-{name}-{seed}")

def flags_of(args, images, name, share=None):
    """Flags of train.py for one of KINDS, with --updates: the kind's share of them, or another."""
    flags, updates = SETS[images]
    reads = ["--data", args.data] if args.data else []
    return [*flags, *reads, *KINDS[name]["flags"], "--updates", str(round(updates * (share or KINDS[name]["share"])))]

def trained(args, images, name, seed, quick):
    """The folder of a training of KINDS, made or gone on with, `quick` scores at POINTS along it in its log."""
    out, flags = place(args, images, name, seed), [*flags_of(args, images, name), "--seed", str(seed)]
    updates = train.parse_args(flags).updates
    every = max(1, updates // POINTS)
    def score(trainer):                                       # the last point is that of `last`
        last = trainer.step + every > updates
        return [] if last else [dict(quick=[quick(sampler_of(trainer), steps) for steps in SCORED])]
    with mock.patch("train.sample_picture", score):           # a hook: what it returns is logged
        to_the_end(train.main, out, [*flags, "--device", args.device, "--sample-every", str(every), "--save-every",
                                     str(every)])
    return out

def quick_score(args, images, name, runs, evaluations, steps):
    """The QuickScore of a data set, after it was told how long `runs` trainings of KINDS[name] and their scores take.

    evaluations  for each image of a batch, a backward pass counting as two;  steps  of all samples of a run"""
    given, device = train.parse_args(flags_of(args, images, name)), pick_device(args.device)
    count = evaluations * given.updates * given.batch + args.n * steps
    tell_hours(runs, runs * count * seconds_per_evaluation(given, device))
    return QuickScore(args.data, given.size, given.crop, args.n)

def made(args, images, name, seed, quick):
    """A run, made or gone on with: {curve: [[update, [[score, contrast] at each of SCORED]], …], last: the same pairs
    at each of STEPS, seconds, evaluations}."""
    if name in AFTER:
        out, more = place(args, images, name, seed), ["--seed", str(seed), "--device", args.device]
        flags = flags_of(args, images, "plain", AFTER[name])
        if AFTER[name] == KINDS["plain"]["share"]:
            plain = trained(args, images, "plain", seed, quick)
        else:
            plain = place(args, images, f"plain for {name}", seed)
            to_the_end(train.main, plain, [*flags, *more])
        to_the_end(distill.main, out, [*TUNED, "--ckpt", str(plain / "ckpt.pt"), *more])
        before, given = train.parse_args(flags), distill.parse_args(TUNED)
        count = before.updates * before.batch + evaluations(given)
        took = seconds(plain, before.batch) + seconds(out, given.batch)
    else:
        out, given = trained(args, images, name, seed, quick), train.parse_args(flags_of(args, images, name))
        count = given.updates * given.batch * KINDS[name]["evaluations"]
        took = seconds(out, given.batch)
    last = quick.of_file(out / "ckpt.pt", STEPS, pick_device(args.device))
    curve = [[e["step"], e["quick"]] for e in read_log(out) if "quick" in e]
    curve.append([load_checkpoint(out / "ckpt.pt")["step"], [last[STEPS.index(n)] for n in SCORED]])
    return dict(curve=curve, last=last, seconds=round(took), evaluations=count)

def make(args, figures):
    """All runs that are missing, of one data set, and a picture of samples of all that there are."""
    images = f"faces, {args.size}x{args.size}" if args.data else "built-in"
    missing = [(name, seed) for seed in args.seeds for name in args.rows
               if f"{images}, {name}, seed {seed}" not in figures.values]
    if missing:
        quick = quick_score(args, images, "plain", len(missing), 3, POINTS * sum(SCORED) + sum(STEPS))
        digest = quick.data.digest()
        if figures.made(f"images of {images}", lambda: digest) != digest:
            sys.exit(f"error: {figures.path} has figures of other {images}: choose another --out, and other --runs")
    for name, seed in missing:
        figures.made(f"{images}, {name}, seed {seed}", made, args, images, name, seed, quick)
    runs = [place(args, images, name, args.seeds[0]) / "ckpt.pt" for name in NAMES
            if figures.values.get(f"{images}, {name}, seed {args.seeds[0]}")]
    if runs:
        draw_if_here(runs, [], ["--steps", "1", "2", "4", "64"], args.device,
                     args.out / f"figure3-{file_name(images)}.png")

def page(args, figures):
    """The tables in Markdown, of the last scores, and the picture."""
    found = {(images, name): runs for images in SETS for name in NAMES
             if (runs := figures.of_seeds(f"{images}, {name}"))}
    if not found:
        sys.exit(f"error: {figures.path} has no figures yet")
    sets = [images for images in SETS if any(other == images for other, _ in found)]
    draw(found, sets, args.out / "figure3.png")
    lines = [f"`python experiments/figure3.py`: {figures}. Quick score at N steps: mean of seeds of training ± half "
             f"their range, and contrast. The numbers of updates are such that all but *{next(iter(AFTER))}* "
             f"should take about the same time (docs/scaling.md). Evaluations: images through the "
             f"network, with a gradient or without. Seconds: of the updates, without own samples, least and most "
             f"of the seeds, beside other programs.", "",
             "![scores against updates](figure3.png)"]
    for images in sets:
        lines += ["", f"**{images}**", "", heading("", "seeds", *STEPS, "evaluations", "seconds")]
        lines += [row(name, [f"{len(runs)}", *pairs([run["last"] for run in runs])], f"{runs[0]['evaluations']:,.0f}",
                      least_to_most([run["seconds"] for run in runs]))
                  for (other, name), runs in found.items() if other == images]
        def values(row, steps):
            return [run["last"][STEPS.index(steps)][0] for run in figures.of_seeds(row)]
        claims = {claim: [f"{images}, {name}" for name in names] for claim, names in CLAIMS.items()}
        lines += claims_table(claims, STEPS, figures, values)
    return "\n".join(lines)

def draw(found, sets, path):
    """Scores against updates, a line for each seed in its training's colour."""
    figure, axes = plt.subplots(len(sets), len(SCORED), figsize=(5 * len(SCORED), 4 * len(sets)), squeeze=False,
                                layout="constrained")
    for (images, name), runs in found.items():
        if name in AFTER:
            continue
        for i, axis in enumerate(axes[sets.index(images)]):
            for run in runs:
                axis.plot([step for step, _ in run["curve"]], [scores[i][0] for _, scores in run["curve"]], ".-",
                          alpha=0.7, color=f"C{NAMES.index(name)}", label=name if run is runs[0] else None)
            axis.set(yscale="log", xlabel="updates", title=f"{images}: quick score at {SCORED[i]} steps")
            plain_numbers(axis.yaxis)
    lines = {label: line for axis in axes.flat
             for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(KINDS))
    figure.savefig(path, dpi=100)
    plt.close(figure)

def main(argv=None):
    p = shared_flags("figure3", __doc__, samples=512)
    p.add_argument("--size", type=int, choices=SIZES, default=16, help="of faces (default: 16)")
    p.add_argument("--rows", nargs="+", choices=NAMES, default=NAMES, metavar="ROW",
                   help="only the runs of these, of " + ", ".join(map(repr, NAMES)) + " (default: all)")
    args = p.parse_args(argv)
    if args.size != 16 and not args.data:
        p.error("--size is of faces: give them as --data")
    figures = Figures(args.out / "figure3.json", dict(samples=args.n), ROOT / args.runs)
    if args.seeds:
        make(args, figures)
    write(args.out / "figure3.md", page(args, figures))

if __name__ == "__main__":
    main()
