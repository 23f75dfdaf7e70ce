"""What the experiments share: runs that go on where they stopped, figures that several sittings gather, a quick score,
tables over seeds."""

import argparse
import json
import math
import re
import shutil
import sys
import textwrap
import time
from copy import copy
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import distill
import fid
import hooks
import inception
import sample
import scores
import train
from checkpoint import file_hash, load_checkpoint, load_model, trained_on, whole_file
from data import load_data, locked, to_tensor
from flags import checkpoint
from model import UNet
from plans import METHODS
from rundir import read_log
from runtime import autocast, log_stderr, pick_device, pick_dtype, progress
from sample import Sampler
from scores import NOISES
from source import reads_data

STEPS = 1, 2, 4, 8, 16, 64
UNDISTILLED = "undistilled, seed 0"                          # the figure that every table has
DATA = "DATA"             # in the flags of a method that is to learn from the --data of the experiment
LOOK = 1 / 6              # seconds that a thread of an old CPU needs for Inception's features of an image

# ---- runs -----------------------------------------------------------------------------------------------
def to_the_end(main, out, flags):
    """A run of train.main or distill.main into `out`: from its start, or from where it stopped; none if finished."""
    try:
        main([*(["--resume"] if (out / "ckpt.pt").exists() else [*flags, "--overwrite"]), "--out", str(out)])
    except SystemExit as e:
        if "is finished" not in str(e.code):
            raise

def seconds(out, batch):
    """What the updates of a run took, from its log: without pictures, checkpoints and own samples."""
    total, before = 0.0, 0
    for entry in read_log(out):
        if "images_per_s" in entry:
            total, before = total + (entry["step"] - before) * batch / entry["images_per_s"], entry["step"]
    return total

def evaluations(args):
    """How many images a run of distill.py with these settings puts through networks, with a gradient or without.

    With shortcut a row that jumps takes two more, any other the anchor's one; its own samples, if any, count."""
    method = METHODS[args.schedule]
    own = args.pool * args.steps if method.shortcut and not reads_data(args) else 0
    extra = 1 + args.share if method.shortcut else 2 if method.teacher else 1
    return round(args.updates * args.batch * (1 + extra)) + own

def seconds_per_evaluation(args, device):
    """What a network with these settings of train.py needs for an image, without a gradient."""
    net, dtype = UNet(train.make_config(args)).to(device), pick_dtype("auto", device)
    z, t = torch.randn(64, 3, args.size, args.size, device=device), torch.rand(64, device=device)
    def elapsed(calls):
        start = time.perf_counter()
        with torch.no_grad(), autocast(device, dtype):
            sum(net(z, t).sum() for _ in range(calls)).item()
        return time.perf_counter() - start
    elapsed(1)
    return elapsed(4) / (4 * len(z))

def tell_hours(runs, seconds):
    """Say how long it will take to make what is missing."""
    log_stderr(f"{runs} runs and scores to make: about {seconds / 3600:.1f} h")

def climb(grid, start, value):
    """The point of a grid, reached from `start` by steps to better neighbours, that has no better neighbour."""
    i = grid.index(start)
    best = max([start, *grid[max(0, i - 1):i], *grid[i + 1:i + 2]], key=value)
    return start if best == start else climb(grid, best, value)

def draw_if_here(runs, before, flags, device, path):
    """A picture by sample.py of the models `before` and of the checkpoints `runs`, unless one of these is not here."""
    away = [str(run) for run in runs if not run.exists()]
    if away:
        return log_stderr(f"{path} is not drawn: {', '.join(away)} not here")
    sample.main(["--ckpt", *before, *map(str, runs), *flags, "--device", device, "--out", str(path)])

# ---- experiments of many runs ---------------------------------------------------------------------------
def file_name(text):
    """A name, or a path, that any file may have."""
    return re.sub(r"[^\w./]+", "-", text)

def shared_flags(name, doc, samples):
    """A parser of the flags that they share."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", metavar="PATH", help="the images (default: the built-in pictures)")
    p.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], metavar="S",
                   help="the runs of these seeds (default: 0 1 2); none: only the table of what is there")
    p.add_argument("-n", type=int, default=samples, help="samples for each score (default: %(default)s)")
    p.add_argument("--device", default="auto", help="cpu, cuda … (default: a GPU if there is one)")
    p.add_argument("--runs", default=f"out/{name}", metavar="DIR", help="for the runs (default: %(default)s)")
    p.add_argument("--out", default=ROOT / "out" / name, type=Path, metavar="DIR",
                   help=f"for the table, its JSON and its picture (default: out/{name}; those of the docs are in docs)")
    return p

class Figures:
    """What was measured, by name, in a JSON file to which several processes may add: what is there is not made again.

    about  what all of it has in common;  runs  the folder of the runs, for a lock
    source  what the names begin with that are looked up
    Exits if the file holds figures of something else."""

    def __init__(self, path, about, runs):
        self.path, self.about, self.runs, self.values, self.source = path, about, runs, {}, ""
        self.read()

    def __str__(self):
        return ", ".join(f"{name} {value}" for name, value in self.about.items())

    def read(self):
        """Take up what is in the file by now."""
        found = json.loads(self.path.read_text()) if self.path.exists() else {"about": self.about}
        if found["about"] != self.about:
            sys.exit(f"error: {self.path} has other figures ({found['about']}, not {self.about}): choose another --out")
        self.values |= found

    def made(self, name, make, *args):
        """The figure of this name, by make(*args) if it is not there: None where that ends in values that are not
        finite."""
        self.read()
        if name not in self.values:
            try:
                value = make(*args)
            except (SystemExit, ValueError) as e:             # a score of such samples is a ValueError
                if "not finite" not in str(e):
                    raise
                value = None
            with locked(self.runs, f"writing {self.path}", "--runs"):
                self.read()
                self.values[name] = value
                lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(self.values.items()))
                with whole_file(self.path) as tmp:
                    tmp.write_text(f"{{\n{lines}\n}}\n")
        return self.values[name]

    def sources(self):
        """All that begin the name of a figure of the undistilled model; the first is "", if it is there."""
        return sorted((k.removesuffix(UNDISTILLED) for k in self.values if k.endswith(UNDISTILLED)), key=len)

    def of_source(self, source):
        """The same figures, to look up those of another source."""
        view = copy(self)
        view.source = source
        return view

    def seeds(self, name):
        """What is called "NAME, seed S", by seed: None of a run that fell apart."""
        return [v for k, v in sorted(self.values.items()) if k.rpartition(", seed ")[0] == self.source + name]

    def of_seeds(self, name):
        """The same, without those that fell apart."""
        return [value for value in self.seeds(name) if value]

    def broken(self, name):
        """How many seeds of the runs of this name fell apart."""
        return self.seeds(name).count(None)

class Experiment:
    """Distillations of one base model by several methods, and figures of them.

    args     of `Experiment.flags`;  base  flags of train.py for a base model where no --ckpt is given
    methods  {name: (flags of distill.py, the rate to begin the search at)}, None: the default rate, and no search
    about    what all figures have in common, beside the size of the images and the number of samples"""

    CHOICE = 9                                                # the seed of the runs that choose rates
    GRID = [float(f"{digit}e-{e}") for e in range(8, 1, -1) for digit in (1, 3)]     # rates to choose from

    def __init__(self, name, args, base, methods, **about):
        self.name, self.args, self.runs, self.methods = name, args, ROOT / args.runs, methods
        self.data = ["--data", args.data] if args.data else []
        self.device, self.base_flags = pick_device(args.device), [*base, *self.data]
        about |= dict(size=train.parse_args(self.base_flags).size, samples=args.n)
        self.figures = Figures(args.out / f"{name}.json", about, self.runs)
        self.made = self.figures.made

    @staticmethod
    def flags(name, doc, samples):
        """`shared_flags` and --ckpt."""
        p = shared_flags(name, doc, samples)
        p.add_argument("--ckpt", type=checkpoint, metavar="FILE", help="the base model (default: one is trained first)")
        return p

    # ---- models ----
    @cached_property
    def base(self):
        """The checkpoint of the base model, which is trained now if need be."""
        ckpt, known = Path(self.args.ckpt or self.runs / "undistilled" / "ckpt.pt"), self.figures.values.get("base")
        if not (self.args.ckpt or known):                     # one that is known was trained to its end
            to_the_end(train.main, ckpt.parent, [*self.base_flags, "--device", self.args.device])
        digest = file_hash(ckpt) if ckpt.exists() else None   # None: it is not here
        if known not in (None, digest):
            sys.exit(f"error: {self.figures.path} has figures of another base model than {ckpt}: give that one as "
                     f"--ckpt, or choose another --out")
        size, wanted = load_checkpoint(ckpt)["shape"][1], self.figures.about["size"]
        if size != wanted:
            sys.exit(f"error: {ckpt} draws images of {size}x{size}, and these figures are of {wanted}x{wanted}")
        self.made("base", lambda: digest)
        return ckpt

    def folder(self, place):
        """The folder of a run."""
        return self.runs / file_hash(self.base, 8) / file_name(place)

    def distilled(self, place, seed, *stages):
        """The checkpoint of runs of distill.py, each upon the last, in the folder `place`.

        stages  pairs (name of a method, its rate)"""
        out, ckpt = self.folder(place), self.base
        for i, (name, lr) in enumerate(stages, 1):
            source, ckpt = ckpt, (out if i == len(stages) else out / f"stage-{i}") / "ckpt.pt"
            flags = self.methods[name][0]
            args = distill.parse_args(flags)
            reads = self.data if reads_data(args) else []     # after DATA, whose place it takes
            to_the_end(distill.main, ckpt.parent, [
                *flags, *reads, "--lr", str(lr), "--ckpt", str(source), "--seed", str(seed), "--no-guard", "--device",
                self.args.device, "--log-every", str(args.updates)])                          # one look, at its end
        return ckpt

    @staticmethod
    def place(name, lr, seed):
        """Where the run of a method at a rate, of a seed, has its folder, which is of the method's name."""
        return f"{lr:g}-seed{seed}/{name}"

    def run(self, name, lr, seed):
        """The checkpoint of that run, made if need be."""
        return self.distilled(self.place(name, lr, seed), seed, (name, lr))

    def sampler(self, ckpt, w=1.0):
        """A Sampler of the averaged weights; of a model with classes it draws all in turn."""
        net, state = load_model(ckpt, self.device)
        return Sampler(net, state, self.device, pick_dtype("auto", self.device), range(net.config.classes) or None, w)

    def draw(self, methods, way, *flags):
        """NAME.png by sample.py: a row for each step count, the models side by side in it, from the same noises.

        Of the runs of the first seed whose figures, "METHOD{way}, seed S", are made by now. None is drawn where one of
        them is not here: it was made elsewhere."""
        made = {figure.rpartition(": ")[2]: value for figure, value in self.figures.values.items()}
        found = {name: made.get(f"{name}{way}, seed {self.args.seeds[0]}") for name in methods}
        rates = {name: run["lr"] for name, run in found.items() if run}
        draw_if_here([self.folder(self.place(name, lr, self.args.seeds[0])) / "ckpt.pt" for name, lr in rates.items()],
                     [str(self.base)], flags, self.args.device, self.args.out / f"{self.name}.png")

    # ---- figures ----
    def sitting(self, make, page):
        """make(self) all figures that are missing, unless there are no --seeds, and write page(self)."""
        if self.args.seeds:
            make(self)
        if not self.figures.sources():
            sys.exit(f"error: {self.figures.path} has no figures yet")
        write(self.args.out / f"{self.name}.md", page(self))

    @cached_property
    def quick(self):
        """The quick score against what the base model is trained on."""
        origin = vars(train.parse_args(self.base_flags))
        if self.args.ckpt:
            origin |= trained_on(load_checkpoint(self.base))
        return QuickScore(self.args.data or origin["data"], origin["size"], origin["crop"], self.args.n)

    def quick_scores(self, ckpt, steps):
        """[[score, contrast] at each of `steps`] of a checkpoint."""
        return self.quick.of_file(ckpt, steps, self.device)

    def last_scores(self, ckpt, steps):
        """The same of a run that is then deleted."""
        found = self.quick_scores(ckpt, steps)
        shutil.rmtree(ckpt.parent)
        return found

    def rates(self):
        """{method: its rate}: of the best mean fidelity at 2, 4 and 8 steps, at the end of a run of seed CHOICE."""
        def of_run(name, lr):
            out = self.run(name, lr, self.CHOICE).parent
            last = [entry for entry in read_log(out) if f"fidelity_{hooks.WATCHED[0]}" in entry][-1]
            shutil.rmtree(out)                                # a hundred of them would take gigabytes
            return sum(last[f"fidelity_{n}"] for n in hooks.WATCHED) / len(hooks.WATCHED)
        def found(name, lr):
            value = self.made(f"rate of {name}: {lr:g}", of_run, name, lr)
            return -math.inf if value is None else value
        return {name: climb(self.GRID, start, partial(found, name)) if start else distill.parse_args(flags).lr
                for name, (flags, start) in self.methods.items()}

    def gather(self, finals, costs, undistilled, of_run):
        """Make all figures that are missing, after saying how long it takes. Returns {method: its rate}.

        finals  {figure: of what it is};  of_run(rates, *of_what) makes one;  costs  as `jobs` has them
        undistilled  a pair: the figure of the undistilled model, and what makes it"""
        self.tell_time(self.jobs(costs))
        self.made(*undistilled)
        rates = self.rates()
        for figure, of_what in finals.items():
            self.made(figure, of_run, rates, *of_what)
        return rates

    def jobs(self, finals):
        """{figure: (evaluations, images that fid.py looks at)} of the choice of rates, and of others.

        finals  {figure: (methods of its run, evaluations of its scores, images)}"""
        looks, cost, choice = 2 * NOISES * sum(hooks.SHOWN), {}, {}
        for name, (flags, start) in self.methods.items():
            args = distill.parse_args(flags)                  # a backward pass takes the time of two
            cost[name] = evaluations(args) + 2 * args.updates * args.batch + looks
            near = self.GRID.index(start) if start else 0     # three runs at least
            choice |= {f"rate of {name}: {lr:g}": (cost[name], 0) for lr in self.GRID[near - 1:near + 2] if start}
        return choice | {name: (sum(cost[m] for m in run) + scores, images)
                         for name, (run, scores, images) in finals.items()}

    def tell_time(self, jobs):
        """Say how long those of `jobs` take that are missing, by a few evaluations of a network like the base model."""
        args = train.parse_args(self.base_flags)
        each, look = seconds_per_evaluation(args, self.device), LOOK if self.device.type == "cpu" else 0
        each *= 1 + args.classes                              # guided: with its label, and without
        missing = [job for name, job in jobs.items() if name not in self.figures.values]
        if missing and not self.args.ckpt and not (self.runs / "undistilled" / "ckpt.pt").exists():
            missing.append((3 * args.updates * args.batch, 0))
        tell_hours(len(missing), sum(count * each + images * look for count, images in missing))

# ---- quick score ----------------------------------------------------------------------------------------
class Features(nn.Module):
    """256 features of an image of any size: three strided convolutions with seeded random weights, averaged."""

    def __init__(self):
        super().__init__()
        generator, self.convs = torch.Generator().manual_seed(1), nn.ModuleList()
        for cin, cout, k in ((3, 64, 5), (64, 128, 3), (128, 256, 3)):
            conv = nn.Conv2d(cin, cout, k, stride=2, padding=k // 2)
            conv.weight.data = torch.randn(conv.weight.shape, generator=generator) * (2 / (cin * k * k)) ** 0.5
            conv.bias.data.zero_()
            self.convs.append(conv)

    @torch.no_grad()
    def forward(self, x):
        for conv in self.convs:
            x = conv(x).relu()
        return x.mean((2, 3))

def drawn(sampler, steps, n):
    """n samples (n, 3, H, W) in [-1, 1], float32 on the CPU."""
    jobs = [range(i, min(i + 64, n)) for i in range(0, n, 64)]
    return torch.cat([sampler(job, steps).float().cpu() for job in jobs]).clamp(-1, 1)

class QuickScore:
    """A Fréchet distance over `Features`, of n samples to a data set: good for ranking settings of one model, and
    comparable with nothing else. It is blind to much, and likes grain: look at the pictures."""

    def __init__(self, data, size, crop=None, n=512):
        self.data, self.features, self.n = load_data(data, size, crop), Features(), n
        self.contrast = to_tensor(self.data.pixels[:2000]).std().item()      # of the data
        self.real = torch.cat([self.features(to_tensor(self.data.pixels[i:i + 250]))
                               for i in range(0, len(self.data), 250)])
        self.real_statistics = self.statistics(self.real)

    @staticmethod
    def statistics(features):
        """Mean and covariance of features (N, 256)."""
        x = features.double()
        return x.mean(0), x.T.cov()

    def __call__(self, sampler, steps):
        """(score, contrast) of n samples in `steps` steps; contrast is the standard deviation of all pixels."""
        return self.of_images(drawn(sampler, steps, self.n))

    def of_images(self, x):
        """The same of images (N, 3, H, W) in [-1, 1]."""
        return self.distance(self.features_of(x)), x.std().item()

    def features_of(self, x):
        """The features (N, 256) of images (N, 3, H, W) in [-1, 1]."""
        return torch.cat([self.features(part) for part in x.split(250)])

    def distance(self, features):
        """The Fréchet distance of features (N, 256) to those of the data set."""
        return scores.frechet_distance(*self.statistics(features), *self.real_statistics)

    def with_variety(self, sampler, steps):
        """{name: value} of n samples: score, contrast, and precision and recall against the first n images."""
        x = drawn(sampler, steps, self.n)
        fake = self.features_of(x)
        precision, recall = scores.precision_recall(self.real[:self.n], fake)
        return {"quick score": self.distance(fake), "precision": precision, "recall": recall,
                "contrast": x.std().item()}

    def of_file(self, ckpt, steps, device):
        """[[score, contrast] at each of `steps`] of a checkpoint."""
        sampler = Sampler(*load_model(ckpt, device), device, pick_dtype("auto", device))
        return [self(sampler, s) for s in progress(iterable=steps, desc=f"scoring {ckpt.parent.name}")]

# ---- scores of fid.py ----------------------------------------------------------------------------------
def fid_scores(ckpt, steps, n, data=(), weights=inception.RANDOM, device="auto"):
    """{steps: {score: value}} of a checkpoint by fid.py, and the contrast of the real images.

    data  the flag --data, if any. Of random weights against 2,000 images: it need not be exact."""
    quicker = ["--real", "2000"] if weights == inception.RANDOM else []
    fid.main(["--ckpt", str(ckpt), *data, "--steps", *map(str, steps), "-n", str(n), "--weights", weights, *quicker,
              "--device", device, "--out", str(ckpt.parent / "fid")])
    (results,) = json.loads((ckpt.parent / "fid" / "table.json").read_text()).values()
    return {str(r["fake"]["steps"]): {name.replace(" (random features)", ""): round(value, 5)
                                      for name, value in r["scores"].items()} for r in results}, \
        results[0]["real"]["contrast"]

# ---- tables ---------------------------------------------------------------------------------------------
def cell(values):
    """The mean of a score over seeds, and how far the seeds lie apart."""
    mean = sum(values) / len(values)
    return f"{mean:.3g}" + (f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else "")

def pairs(scores):
    """The cells of scores of each seed as `QuickScore.of_file` gives them: in brackets the second value."""
    return ["{} ({})".format(*map(cell, zip(*at, strict=True))) for at in zip(*scores, strict=True)]

def least_to_most(values):
    """A cell of the least and the most of some whole numbers: one if they are equal, none if there are none."""
    return " to ".join(dict.fromkeys(f"{most(values):,}" for most in (min, max) if values))

def row(name, cells, *rest):
    """A line of Markdown."""
    return "| " + " | ".join([name, *cells, *rest]) + " |"

def heading(*columns):
    """The first two lines of a table in Markdown."""
    return f"| {' | '.join(map(str, columns))} |\n|{'---|' * len(columns)}"

def verdict(low, high):
    """What the values of some seeds say of the claim that they are lower than others."""
    if min(len(low), len(high)) < 2:
        return "–"
    return "holds" if max(low) < min(high) else "does not" if min(low) > max(high) else "undecided"

def claims_table(claims, columns, figures, values, by="", more=()):
    """Lines of Markdown: a verdict on each claim in each column; none on claims of fewer than two seeds.

    claims  {claim: (a row, and another, of which the first should have the lower values)}
    values  (row, column) -> the values of its seeds that did not fall apart: the others count as the highest
    figures  the `Figures` that know those;  by  what the values are, in words
    more    {another claim: its verdicts}"""
    def side(name, column):                                   # the undistilled model is one, and stands for all seeds
        return values(name, column) * (2 if name == "undistilled" else 1) + [math.inf] * figures.broken(name)
    found = {claim: [verdict(side(low, c), side(high, c)) for c in columns] for claim, (low, high) in claims.items()}
    lines = [row(claim, cells) for claim, cells in (found | dict(more)).items() if "–" not in cells]
    return ["", f"**Claims**{by}. {VERDICTS}", "", heading("claim", *columns), *lines] if lines else []

VERDICTS = ("A claim holds where every seed has the lower score, does not where none has, and is undecided where they "
            "overlap: there more seeds would decide (`--seeds`). Of two equal methods three seeds each are parted by "
            "chance one time in ten, and from a single value (the undistilled model, the data) one time in two.")

def seeds_of(figures, name):
    """The cell that says how many seeds a row has, and how many runs of it fell apart."""
    broken = figures.broken(name)
    return f"{len(figures.of_seeds(name))}" + (f", and {broken} broken" if broken else "")

def rates_of(runs):
    """The cell of the rates that the seeds of a row had: one, unless several sittings chose differently."""
    return ", ".join(dict.fromkeys(f"{lr:g}" for run in runs for lr in ([run["lr"]] if "lr" in run else [])))

def pyplot():
    """matplotlib's, for a script's pictures. Exits if it is missing: nothing else here needs it."""
    try:
        import matplotlib.pyplot
    except ImportError:
        sys.exit("error: the picture needs the package matplotlib: pip install matplotlib")
    return matplotlib.pyplot

def plain_numbers(axis):
    """Have a logarithmic axis of matplotlib say 0.5, not 5 x 10^-1."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")

def write(path, text):
    """Write a page of Markdown, its paragraphs in lines of 120 characters, and print it."""
    text = "\n".join(line if line.startswith("|") else textwrap.fill(line, 120, break_on_hyphens=False)
                     for line in text.splitlines())
    with whole_file(path) as tmp:
        tmp.write_text(text + "\n")
    print(f"{text}\nwrote {path}")
