"""Where the guard's band comes from: good and bad runs of every method, and what fidelity and contrast they reach.

    python experiments/guard.py                                            # toy: out/guard/guard.md; half an hour
    python experiments/guard.py --ckpt out/celeba32 --data celeba-10k.zip  # faces: guard-faces.md there
    python experiments/guard.py --lab                                      # guard-lab.md there; 4 minutes

Each run goes to its end without the guard. "By eye" is what was said of its pictures at 2, 4 and 8 steps: good, poor
(better left undistilled) or lost; experiments/eye.json has it. In the laboratory the distance to the exact distribution
says it instead.
"""

import argparse
import json
import shlex
from itertools import product
from pathlib import Path

import lab
from common import ROOT, fid_scores, heading, row, to_the_end, write

import distill
from checkpoint import load_checkpoint
from flags import checkpoint
from rundir import read_log
from scores import MANY, NOISES, fidelity

VERDICTS, SAMPLES = ("good", "poor", "lost", "?"), 256        # for rFID
RUNS = {                                                      # method, rate, updates, further flags
    **{f"{method} {lr}": (method, float(lr), 128, []) for method, rates in (
        ("dsdn", ["3e-6", "1e-5", "1e-4"]), ("dsdi", ["3e-6", "1e-5", "3e-5"]), ("dsdgl", ["3e-6"]),
        ("dsdgexp", ["3e-6"]), ("tsd", ["3e-5", "1e-4"]), ("pd", ["1e-4"])) for lr in rates},
    **{f"dsdgl {lr}, D = .98": ("dsdgl", float(lr), 128, ["--target-ema", "0.98"]) for lr in ("3e-5", "7e-5")},
    "shortcut 5e-4": ("shortcut", 5e-4, 600, []),
}

def laboratory(docs):
    """Each method at three rates, 600 updates, judged by the distance to the exact distribution: lost is who is further
    from it in 4 steps than the undistilled model in 2, poor who is in 8 further than that in 4."""
    mixture, rows = lab.Mixture(), []
    net = lab.trained(mixture)
    at = lambda model: dict(zip(lab.STEPS, lab.distances(model, mixture), strict=True))  # noqa: E731
    was, r = at(net), lab.points(net, MANY)
    for method, lr in product(lab.SETTINGS, (1, 3, 10)):
        lr *= lab.SETTINGS[method]["lr"]
        settings = lab.SETTINGS[method] | dict(lr=lr, lr_end=lr / 10)
        model = lab.in_the_lab(net, mixture, method, **settings)
        now, few = at(model), {n: lab.points(model, n) for n in (2, 4, 8)}
        verdict = "lost" if not now[4] < was[2] else "poor" if now[8] > was[4] else "good"
        rows.append([verdict, f"{method} {lr:g}",
                     *(f"{fidelity(x, r)[0]:.2f}" for x in few.values()),
                     f"{max((x.std() / r.std()).item() for x in few.values()):.2f}",
                     *(f"{now[n]:.3f}" for n in (2, 4, 8))])
    rows.sort(key=lambda cells: (VERDICTS.index(cells[0]), -float(cells[4])))
    before = ", ".join(f"{was[n]:.3f}" for n in (2, 4, 8))
    write(Path(docs, "guard-lab.md"), "\n".join([
        "The laboratory, 600 updates of 256, one seed (`python experiments/guard.py --lab`). Distances as in lab.md,",
        f"of the undistilled at 2, 4, 8 steps {before}. Lost: in 4 steps farther from exact than the undistilled model "
        "in 2. Poor: in 8 farther than that in 4.", "",
        heading("by distance", "run", "fidelity 2", "4", "8", "highest contrast", "distance 2", "4", "8"),
        *(row(name, cells) for name, *cells in rows)]))

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="out/train", help="the model to distil, or its folder (default: out/train)")
    p.add_argument("--data", help="what it was trained on, for pd (default: the built-in pictures)")
    p.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS], metavar="RUN")
    p.add_argument("--out", default="out/guard", metavar="DIR", help="of the runs (default: %(default)s)")
    p.add_argument("--docs", default="out/guard", metavar="DIR",
                   help="of the table (default: out/guard; those of the docs are in docs)")
    p.add_argument("--lab", action="store_true", help="the laboratory instead of a model of images")
    args = p.parse_args(argv)
    if args.lab:
        return laboratory(args.docs)
    name_of, rows, data = "guard-faces" if args.data else "guard", [], ["--data", args.data] if args.data else []
    made = f" --ckpt {args.ckpt} --data {Path(args.data).name}" if args.data else ""
    if args.runs != [*RUNS]:
        made += " --runs " + " ".join(map(shlex.quote, args.runs))
    eye = json.loads((ROOT / "experiments" / "eye.json").read_text()).get(name_of, {})
    def rfid(ckpt):
        scores, _ = fid_scores(Path(ckpt), (2, 4, 8), SAMPLES, data)
        return " ".join(f"{value['rFID']:.3g}" for value in scores.values())
    was = rfid(checkpoint(args.ckpt))
    for name in args.runs:
        method, lr, updates, flags = RUNS[name]
        out = Path(args.out) / name.replace(" ", "-").replace(",", "").replace("=-", "")
        reads = data if method == "pd" else []
        to_the_end(distill.main, out, ["--schedule", method, "--lr", str(lr), "--updates", str(updates), "--no-guard",
                                       "--ckpt", args.ckpt, *flags, *reads])
        looks = [e for e in read_log(out) if "fidelity_2" in e]
        last, best = looks[-1], load_checkpoint(out / "ckpt.pt")["best"]["step"]
        rows.append([eye.get(name, "?"), name, *(f"{last[f'fidelity_{n}']:.2f}" for n in (2, 4, 8)),
                     f"{min(e[f'fidelity_{n}'] for e in looks for n in (2, 4, 8)):.2f}",
                     f"{max(e[f'contrast_{n}'] for e in looks for n in (2, 4, 8)):.2f}",
                     f"{best} of {updates}", rfid(out / "ckpt.pt")])
    rows.sort(key=lambda cells: (VERDICTS.index(cells[0]), -float(cells[5])))
    write(Path(args.docs, f"{name_of}.md"), "\n".join([
        f"What runs do to fidelity and contrast (a share of the undistilled model's at {MANY} steps), from one model, "
        f"seed 0, {NOISES} noises (`python experiments/guard.py{made}`), without the guard. Lowest and highest are "
        f"over all looks at 2, 4 and 8 steps; best update: that of best.pt. rFID of {SAMPLES} samples in 2, 4, 8 "
        f"steps against 2,000 images; undistilled: {was}.", "",
        heading("by eye", "run", "fidelity 2", "4", "8", "lowest on the way", "highest contrast", "best update",
                "rFID 2 4 8"),
        *(row(name, cells) for name, *cells in rows)]))

if __name__ == "__main__":
    main()
