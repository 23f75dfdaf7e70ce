"""Distil a trained diffusion model into itself (section 4.1): afterwards it samples well in few steps.

    python distill.py --schedule dsdi                          # the last trained model; no data, no teacher
    python distill.py --schedule tsd --ckpt out/train/ckpt.pt  # a frozen teacher makes the targets, for comparison
    python distill.py --schedule pd --data celeba.zip          # progressive distillation: the one that reads data
    python distill.py --ldm celebahq256 --ckpt model.ckpt --schedule dsdn      # LDM's models: see ldm.py
    python distill.py --schedule dsdgl --dry-run               # the plan as a table, and Figure 4; distils nothing
    torchrun --nproc_per_node=8 distill.py --schedule dsdi     # eight GPUs
    python distill.py --resume --out out/dsdi                  # go on where a run stopped, in mid-trajectory

A run leaves OUT/ckpt.pt (for sample.py, fid.py, and as --ckpt for another run), OUT/log.jsonl and
OUT/samples-NNNNNN.png: the model before and after, at 2, 4, 8 and 64 steps, from the same noise.
"""

import argparse
import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data import load_data, save_grid
from ddim import WEIGHTS, Denoiser, ddim_step, ddim_target
from ldm import MODELS, Latents, image_size, ldm_flag, load_model, model_hash
from model import (
    from_all,
    from_first,
    launch,
    memory_format,
    mine,
    param_count,
    pick_device,
    pick_dtype,
    progress,
    rank,
    where,
)
from sample import Sampler
from train import (
    Run,
    batches,
    check_numbers,
    check_out,
    claim_out,
    fit,
    follow,
    learning_rate,
    optimiser_flags,
    run_flags,
    scorer,
    settle,
    what_is_kept,
)

# ---- the plan: which step sizes, and how many updates each ----------------------------------------------


def halves(n):
    """n, n/2, n/4 … 2, each made even by rounding down: 64, 32, 16, 8, 4, 2 (section 4.1.1, DSDI)."""
    return [n] if n == 2 else [n, *halves(n // 4 * 2)]


def downwards(n):
    """n, n − 2, n − 4 … 2 (section 4.1.1, DSDGL)."""
    return list(range(n, 0, -2))


@dataclass(frozen=True)
class Schedule:
    """What tells one method from another: all of them go through the same loop."""

    depths: callable                             # start depth N -> the depths N_i
    share: callable = lambda depth: 1.0          # of the updates, not normalised
    teacher: bool = False                        # a frozen copy of the model, renewed at each depth, makes the targets
    data: bool = False                           # z_t from data at random t, not from a trajectory


SCHEDULES = {
    "dsdn": Schedule(lambda n: [n]),
    "dsdi": Schedule(halves),
    "dsdgl": Schedule(downwards),
    # exp(1/S), S = …, 6, 4, 2, 1 the step count that depth N_i aims at (Appendix J, read so that few steps get most)
    "dsdgexp": Schedule(downwards, lambda depth: math.exp(1 / max(1, depth - 2))),
    "tsd": Schedule(halves, teacher=True),
    "pd": Schedule(halves, teacher=True, data=True),
}


def plan(schedule, steps, updates):
    """[(N_i, updates at this depth), …]: the U_i of section 4.1.1, counted in updates, which sum exactly to P.

    schedule  a name in SCHEDULES;  steps  the start depth N, even;  updates  P, at least one for each depth
    A trajectory of N_i steps makes N_i / 2 updates; the last one of a depth is cut short where its budget ends.
    Raises ValueError for a plan that can't be made.
    """
    if steps < 2 or steps % 2:
        raise ValueError(f"--steps {steps}: the start depth must be even and at least 2, as steps are taken in pairs")
    depths = SCHEDULES[schedule].depths(steps)
    if updates < len(depths):
        raise ValueError(f"--updates {updates}: {schedule} from {steps} steps has {len(depths)} depths, "
                         f"and each needs at least one update")
    shares = [SCHEDULES[schedule].share(depth) for depth in depths]
    spare, ends, total = updates - len(depths), [0], 0.0       # one update each; the rest in proportion
    for i, share in enumerate(shares, 1):
        total += share
        ends.append(i + round(spare * total / sum(shares)))
    return [(depth, ends[i + 1] - ends[i]) for i, depth in enumerate(depths)]


def place(plan, step):
    """Where update number `step` falls: (depth N_i, which update of that depth)."""
    for depth, updates in plan:
        if step < updates:
            return depth, step
        step -= updates
    raise IndexError("the plan is spent")


# ---- one update -------------------------------------------------------------------------------------------


def distillation_loss(xhat, z, times, second, first=None, target="ddim", weight="snr", **cond):
    """Algorithm 2 on one pair of steps t -> t' -> t'': pull x' = x̂_θ(z_t) to the x'' of one big step.

    xhat    x̂_θ, the Denoiser in training;  z (B, C, H, W) noisy images z_t;  times  t, t', t'', each (B,)
    second  the Denoiser that takes the second step: xhat itself (DSD), or a running average of it
    first   one to take the first step as well: the teacher η of TSD and PD (Algorithm 1); None: x' does
    cond    y, w: the condition, the same in all evaluations
    returns loss (scalar), and z_t'' (B, C, H, W), where a trajectory goes on: no gradient

        L = w(λ_t) ‖x' − x''‖²,   λ_t = log(α_t² / σ_t²)
    """
    t, t1, t2 = times
    x1 = xhat(z, t, **cond)                                   # x': the only evaluation with a gradient
    with torch.no_grad():
        x = x1.detach() if first is None else first(z, t, **cond)
    x2, z2 = ddim_target(second, z, x, t, t1, t2, target, **cond)
    w = WEIGHTS[weight](xhat.schedule.log_snr(t))             # (B, 1, 1, 1)
    return (w * (x1 - x2).square()).mean(), z2


class Trajectories:
    """z_t of Algorithm 2: a batch that walks from noise to data in N_i steps, two of them in each update.

    With `stagger` its trajectories stand at evenly spread places, so that every update sees all noise
    levels, and one that arrives restarts from noise. Otherwise (the paper) all stand at the same t.

    run  whose `draw` gives the noise, and which says where and how many: each rank holds its own rows
    """

    def __init__(self, run, guidance=(1.0, 3.0), stagger=False):
        self.run, self.classes, self.guidance = run, run.net.config.classes, guidance
        shape, device = run.about["shape"], run.device
        # Where the trajectories stand is known beforehand: of all ranks on the CPU, to decide alike, and of this rank's
        # on the device, to compute with.
        self.all = torch.arange(run.args.batch) * stagger
        self.own = mine(self.all).to(device)
        count = len(self.own)
        self.z = torch.zeros(count, *shape, device=device).contiguous(memory_format=memory_format(device))
        self.y = torch.zeros(count, dtype=torch.long, device=device)
        self.w = torch.ones(count, 1, 1, 1, device=device)
        self.ends = torch.zeros_like(self.z)                  # where each trajectory arrived last
        self.arrived = torch.zeros(count, dtype=torch.bool, device=device)

    def _state(self):
        return dict(z=self.z, y=self.y, w=self.w, ends=self.ends, arrived=self.arrived)

    def state_dict(self):
        """The trajectories of all ranks."""
        return {name: from_all(value) for name, value in self._state().items()}

    def load_state_dict(self, state):
        for name, value in self._state().items():
            value.copy_(mine(state[name]))

    def pairs(self, which, depth, u):
        """Which pair of steps, 0 … N_i / 2 − 1 from noise to data, trajectories make in update u of a depth.

        which  `all` trajectories, or this rank's `own`
        """
        return (which * (depth // 2) // len(self.all) + u) % (depth // 2)

    def cond(self):
        return dict(y=self.y, w=self.w) if self.classes else {}

    def start(self, which):
        """New noise, class and guidance weight for the trajectories in the mask `which`: one w for all of them."""
        draw, each = self.run.draw, which[:, None, None, None]
        self.z = torch.where(each, draw(torch.randn, *self.z.shape[1:]).to(memory_format=memory_format(self.z.device)),
                             self.z)
        if self.classes:
            self.y = torch.where(which, draw(lambda n, **kw: torch.randint(self.classes, (n,), **kw)), self.y)
            self.w = torch.where(each, weight_for_all(self.run, self.guidance), self.w)

    def batch(self, xhat, depth, u):
        """z_t, the times t, t', t'' (each (B,)) and the condition of update u of a depth."""
        times, now = xhat.schedule.grid(depth, self.z.device), self.pairs(self.own, depth, u)
        if u == 0:
            self.start(torch.ones_like(now, dtype=torch.bool))
            self._spread(xhat, depth)
        elif (self.pairs(self.all, depth, u) == 0).any():
            self.start(now == 0)
        return self.z, [times[2 * now + i] for i in range(3)], self.cond()

    @torch.no_grad()
    def _spread(self, xhat, depth):
        """Walk fresh noise to the places of a staggered batch: one evaluation for each step of two."""
        times, now = xhat.schedule.times(depth), mine(self.pairs(self.all, depth, 0))
        for k in range(int(now.max())):
            first = int((now <= k).sum())                     # places rise along the batch: the rest of it goes on
            z, t, t1 = self.z[first:], times[2 * k], times[2 * k + 2]
            x = xhat(z, t, **{name: value[first:] for name, value in self.cond().items()})
            self.z = torch.cat([self.z[:first], ddim_step(xhat.schedule, z, x, t, t1)])

    def advance(self, z2, depth, u):
        self.z = z2
        if (self.pairs(self.all, depth, u) == depth // 2 - 1).any():
            there = self.pairs(self.own, depth, u) == depth // 2 - 1
            self.ends = torch.where(there[:, None, None, None], z2, self.ends)
            self.arrived = self.arrived | there


def weight_for_all(run, guidance):
    """One guidance weight w ~ U[low, high] for the whole batch, as (1, 1, 1, 1)."""
    low, high = guidance
    return low + (high - low) * torch.rand(1, 1, 1, 1, generator=run.random, device=run.device)


class DataPairs:
    """z_t of Algorithm 1: data with noise, at a random t of the student's grid of N_i / 2 steps."""

    def __init__(self, run, stream, guidance=(1.0, 3.0)):
        self.run, self.stream, self.classes, self.guidance = run, stream, run.net.config.classes, guidance

    def batch(self, xhat, depth, u):
        (x, y), draw = next(self.stream), self.run.draw
        times = xhat.schedule.grid(depth, x.device)
        now = draw(lambda n, **kw: torch.randint(depth // 2, (n,), **kw))
        t, t1, t2 = (times[2 * now + i] for i in range(3))
        a, s = xhat.schedule(t)
        z = a * x + s * draw(torch.randn, *x.shape[1:])
        w = weight_for_all(self.run, self.guidance).expand(len(x), 1, 1, 1) if self.classes else None
        return z, [t, t1, t2], dict(y=y, w=w) if self.classes else {}

    def advance(self, z2, depth, u):
        pass


class Updates:
    """losses(step) for train.fit: finds the update's place in the plan, and keeps teacher and average up to date."""

    def __init__(self, run, plan, source):
        a, self.run, self.plan, self.source = run.args, run, plan, source
        self.options = dict(target=a.target, weight=a.weight)
        self.xhat = self.second = run.denoiser(run.model)
        self.first = None
        if SCHEDULES[a.schedule].teacher:
            self.first = self.second = self._copy("teacher")
        elif a.target_ema and a.target_ema == a.ema and a.ema_device == "same":
            self.second = run.denoiser(run.compiled(run.ema))  # the average for sampling is the very same: no copy
        elif a.target_ema:
            self.second = self._copy("target")

    def _copy(self, name):
        """A second set of weights, part of the run's state."""
        self.run.parts[name] = copy.deepcopy(self.run.ema).to(self.run.device)
        return self.run.denoiser(self.run.compiled(self.run.parts[name]))

    def __call__(self, step):
        (depth, u), parts, net = place(self.plan, step), self.run.parts, self.run.net
        if "teacher" in parts and u == 0:
            follow(parts["teacher"], net, 0.0)                # η ← θ: the student becomes the teacher
        if "target" in parts and step:
            follow(parts["target"], net, self.run.args.target_ema)
        batch, times, cond = self.source.batch(self.xhat, depth, u)
        ends = []
        for z, t, t1, t2, y, w in self.run.split(batch, *times, cond.get("y"), cond.get("w")):
            cond = {} if y is None else dict(y=y, w=w)
            loss, z2 = distillation_loss(self.xhat, z, (t, t1, t2), self.second, self.first, **self.options, **cond)
            ends.append(z2)
            if len(ends) == self.run.args.accumulate:         # before the last loss: nobody asks for one more
                self.source.advance(torch.cat(ends), depth, u)
            yield loss, {}


def setup(args, net, device, about, stream=None):
    """The Run of a network and its Updates, for `train.fit` or a loop of one's own.

    args    as parse_args gives them;  about  as `Run` wants it
    stream  yields (x, y) on the device, for the methods that read data: this rank's rows
    """
    run = Run(args, net.requires_grad_(True), device, about, young=False)
    steps = plan(args.schedule, args.steps, args.updates)
    if SCHEDULES[args.schedule].data:
        source = DataPairs(run, stream, args.guidance)
    else:
        source = run.parts["trajectories"] = Trajectories(run, args.guidance, args.stagger)
    return run, Updates(run, steps, source)


# ---- what is looked at on the way -------------------------------------------------------------------------

SHOWN = 2, 4, 8, 64        # step counts of the pictures, and of the scores except for the last


def show(sampler, n=10):
    """n samples at each of SHOWN, from the same noise, not decoded: (rows, n, C, H, W) float32 on the CPU of rank 0."""
    if rank():
        return None
    with progress(total=sum(SHOWN), desc="sampling", unit="step", leave=False) as bar:
        return torch.stack([sampler.draw(range(n), s, bar).float().cpu().contiguous() for s in SHOWN])


def sampler_of(run, net):
    classes = net.config.classes
    y = list(range(0, classes, max(1, classes // 10))) or None                # of a thousand, ten that differ
    return Sampler(net, run.about, run.device, run.args.dtype, y, seed=run.args.seed)


def compare_picture(run):
    """Before and after under each other for each step count, each column from one noise; the EMA is what is shown."""
    if rank():
        return
    sampler = sampler_of(run, run.average())
    before, after = run.about["before"], show(sampler)
    labels = [f"{s} {when}" for s in SHOWN for when in ("before", "after")]
    rows = torch.stack([before, after], 1).flatten(0, 2)      # 2 before, 2 after, 4 before …
    save_grid(sampler.decode(rows), run.out / f"samples-{run.step:06d}.png", before.shape[1], labels)


def moments(x):
    """Mean, standard deviation and diversity of (B, C, H, W), drawn: how much a pixel differs from image to image."""
    return dict(mean=x.mean().item(), std=x.std().item(), diversity=x.std(0).mean().item() if len(x) > 1 else math.nan)


class Watch:
    """Nothing anchors a data-free run: log where its trajectories end, and end it when that makes no sense.

    Sane is a standard deviation and a diversity within a factor `drift` of those the undistilled model's
    samples had, and a mean within `drift` of their standard deviations.
    """

    def __init__(self, run, plan, trajectories):
        self.run, self.plan, self.trajectories = run, plan, trajectories
        self.was = moments(run.about["before"][-1])

    def __call__(self):
        depth, _ = place(self.plan, self.run.step - 1)
        ends, mask = (from_all(x) for x in (self.trajectories.ends, self.trajectories.arrived))
        arrived = ends[mask]                                  # of all ranks: they must come to the same decision
        if not len(arrived):
            return dict(depth=depth)
        now, was, f = moments(arrived.float()), self.was, self.run.args.drift
        if not f or len(arrived) == 1:
            return dict(depth=depth) | now
        sane = {"mean": (was["mean"] - f * was["std"], was["mean"] + f * was["std"])}
        sane |= {k: (was[k] / f, was[k] * f) for k in ("std", "diversity")}
        for name, (low, high) in sane.items():
            if not low <= now[name] <= high:
                sys.exit(f"error: at update {self.run.step} the trajectories end with a {name} of {now[name]:.3g}; "
                         f"before distillation it was {was[name]:.3g}, sane is {low:.3g} to {high:.3g} (--drift). "
                         f"{what_is_kept(self.run)}. Try a lower --lr, fewer --updates, or --target-ema 0.98")
        return dict(depth=depth) | now


# ---- the plan, shown (Figure 4) ---------------------------------------------------------------------------


def shares_of(args, schedule):
    """[(N_i, updates, share of the updates, share weighted by their learning rates)] of a schedule (Figure 4)."""
    rows, step, rates = plan(schedule, args.steps, args.updates), 0, []
    for _, updates in rows:
        rates.append(sum(learning_rate(args, i) for i in range(step, step + updates)))
        step += updates
    return [(depth, n, n / args.updates, rate / sum(rates))
            for (depth, n), rate in zip(rows, rates, strict=True)]


def dry_run(args):
    """Print the plan as a table, and draw Figure 4 for all schedules where matplotlib is installed."""
    print(f"{args.schedule}: {args.updates:,} updates of {args.batch}, from {args.steps} steps\n")
    print(" depth  updates   share  by rate  trajectories")
    for depth, updates, share, weighted in shares_of(args, args.schedule):
        walks = "-" if SCHEDULES[args.schedule].data else -(-updates // (depth // 2))
        print(f"{depth:6d} {updates:8,d} {share:7.1%} {weighted:8.1%} {walks:>13}")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nFigure 4 is drawn where matplotlib is installed: pip install matplotlib")
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for name in SCHEDULES:
        try:
            depths, _, share, weighted = zip(*shares_of(args, name), strict=True)
        except ValueError:                                    # too few updates for this one
            continue
        for axis, values in zip(axes, (share, weighted), strict=True):
            axis.plot(depths, values, marker="o", markersize=3 + 3 * (name == args.schedule), label=name)
    for axis, title in zip(axes, ("share of updates", "weighted by the learning rate"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="depth N (a step is 1/N)", title=title)
        axis.set_xticks(halves(args.steps), halves(args.steps))
        axis.minorticks_off()
        axis.invert_xaxis()
    axes[0].legend()
    path = Path(args.out) / "plan.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"\nwrote {path}")


# ---- command line -----------------------------------------------------------------------------------------

# For small models: the rates that a search (see the README) found best for each method at these other settings.
DEFAULTS = dict(updates=128, batch=32, warmup=12, betas=[0.9, 0.98], ema=0.98, log_every=8, sample_every=0,
                save_every=64)
RATES = {"dsdn": 1e-5, "dsdi": 1e-5, "dsdgl": 5e-6, "dsdgexp": 5e-6, "tsd": 1e-4, "pd": 1e-4}

# For LDM's models: Table 3. It has no batch, and no length of the warm-up: those are ours.
TABLE3 = dict(updates=4000, batch=8, lr=1e-6, warmup=100, betas=[0.9, 0.98], ema=0.995, log_every=20, sample_every=1000,
              save_every=500)
TABLE3_CLASSES = TABLE3 | dict(updates=5000, lr=1e-7, betas=[0.99, 0.999], ema=0.9995)


def defaults(schedule, ldm):
    """What the flags of the optimiser and the run are unless given."""
    if ldm:
        return TABLE3_CLASSES if MODELS[ldm].unet.classes else TABLE3
    return DEFAULTS | dict(lr=RATES[schedule])


def parse_args(argv=None):
    """Flags beat the settings of a resumed run, which beat the defaults."""
    pre = argparse.ArgumentParser(add_help=False)
    pre.add_argument("--schedule", choices=SCHEDULES, default="dsdi", help="the method (default: %(default)s)")
    ldm_flag(pre)
    pre.add_argument("--resume", action="store_true", help="continue the run in --out, with its own settings")
    pre.add_argument("--out", metavar="DIR", help="folder of the run (default: out/<schedule>)")
    first = pre.parse_known_args(argv)[0]
    first.out = first.out or f"out/{first.schedule}"
    p = argparse.ArgumentParser(parents=[pre], description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("the method")
    g.add_argument("--ckpt", default="out/train/ckpt.pt", metavar="FILE",
                   help="the model to distil; it starts from its averaged weights (default: %(default)s)")
    g.add_argument("--size", type=int, help="with --ldm: side of the images in pixels (default: 256)")
    g.add_argument("--steps", type=int, default=64, metavar="N", help="start depth (default: 64, the paper's)")
    g.add_argument("--target", choices=["ddim", "x0"], default="ddim",
                   help="x'': where one big step must aim (ddim, Algorithm 2), or the next step's own prediction (x0, "
                        "section 4.1) (default: ddim)")
    g.add_argument("--weight", choices=WEIGHTS, default="snr",
                   help="w(λ) of the loss: truncated SNR, its logarithm, or 1 (default: snr, the paper's)")
    g.add_argument("--target-ema", type=float, default=0.0, metavar="D",
                   help="a running average of the weights with this decay makes the second evaluation: steadier than "
                        "the model itself; if D is that of --ema, without a further copy (default: 0, the paper's)")
    g.add_argument("--stagger", action="store_true",
                   help="spread a batch's trajectories over all noise levels, where the paper's all stand at the same")
    g.add_argument("--guidance", type=float, nargs=2, default=[1.0, 3.0], metavar=("LOW", "HIGH"),
                   help="range of the guidance weight, for models with classes (default: 1 3)")
    optimiser_flags(g)

    g = p.add_argument_group("the data")
    g.add_argument("--data", metavar="PATH",
                   help="folder, zip or LMDB that pd and --fid-every read (default: what the model was trained on)")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                   help="mirror half of the images for pd (default: on)")

    g = p.add_argument_group("the run")
    g.add_argument("--dry-run", action="store_true", help="only print the plan, and draw it to OUT/plan.png")
    g.add_argument("--drift", type=float, default=3.0, metavar="F",
                   help="end the run when the trajectories arrive with F times more or less contrast or diversity than "
                        "before; 0: never (default: 3)")
    run_flags(g)

    p.set_defaults(**defaults(first.schedule, first.ldm), out=first.out)
    args, changed = settle(p, argv, first)
    fixed = {"schedule", "ckpt", "ldm", "size", "steps", "updates", "batch", "stagger", "target_ema"} & changed
    if fixed:
        p.error(f"--resume can't change {', '.join('--' + f.replace('_', '-') for f in sorted(fixed))}: "
                f"the place in the plan depends on it")
    _check(p, args)
    return args


def _check(p, args):
    """Refuse values that can't work before anything is touched, and settle what depends on others."""
    check_numbers(p, args)
    if not 0 <= args.target_ema < 1:
        p.error("--target-ema must be at least 0 and below 1")
    if args.target_ema and SCHEDULES[args.schedule].teacher:
        p.error(f"--target-ema is for the methods without a teacher; in {args.schedule} the teacher makes the target")
    if args.stagger and SCHEDULES[args.schedule].data:
        p.error(f"--stagger spreads trajectories, and {args.schedule} has none")
    if args.data and not (SCHEDULES[args.schedule].data or args.fid_every or args.resume):
        p.error(f"{args.schedule} reads no data; --data is for pd and --fid-every")
    if not 0 <= args.guidance[0] <= args.guidance[1]:
        p.error("--guidance LOW HIGH: two weights, the lower one first")
    if args.drift and args.drift <= 1:
        p.error("--drift is a factor: above 1, or 0 for never")
    if Path(args.ckpt).resolve() == (Path(args.out) / "ckpt.pt").resolve():
        p.error("--out is the folder of --ckpt: the distilled model would take its place")
    args.lr_end = args.lr / 10 if args.lr_end is None else args.lr_end      # to 10 % (section 5)
    try:
        plan(args.schedule, args.steps, args.updates)
    except ValueError as e:
        p.error(str(e))


ABOUT = "schedule", "predicts", "shape", "classes", "ldm", "autoencoder"      # what a distilled model has of its source


def history(args, source):
    """What was done to a model, one dict for each run: training, distillation, distillation of that …"""
    was = source.get("args", {})
    trained = dict(how="train", updates=source.get("step"), distill=was.get("distill"), data=was.get("data"))
    keep = "updates", "batch", "steps", "lr", "lr_end", "target", "weight", "target_ema", "ema", "stagger", "seed"
    now = dict(how=args.schedule, ckpt=str(args.ckpt), hash=model_hash(args.ckpt)) | {k: getattr(args, k) for k in keep}
    return [*source.get("history", [trained]), now]


def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        return dry_run(args)
    device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, device)
    state = check_out(args, f"distil it further as --ckpt {args.out}/ckpt.pt, into another --out")
    net, source = load_model(Path(args.out) / "ckpt.pt" if state else args.ckpt, device, name=args.ldm, size=args.size)
    was = source.get("args", {})
    args.size, args.crop, args.data = image_size(source), was.get("crop"), args.data or was.get("data")
    about = {k: source[k] for k in ABOUT if k in source}
    about["history"] = source["history"] if state else history(args, source)
    check_source(args, net, source)
    images = stream = None
    if SCHEDULES[args.schedule].data or args.fid_every:
        images = load_data(args.data, args.size, args.crop, args.cache)
    if SCHEDULES[args.schedule].data:
        check_labels(args, net, images)
        read = Latents(images, source, device, args.dtype) if args.ldm else images
        stream = batches(read, args, state["step"] if state else 0, device)
    torch.manual_seed(args.seed)
    run, updates = setup(args, net, device, about, stream)
    about["before"] = source["before"].cpu() if state else from_first(show(sampler_of(run, run.average())))
    watch = None if SCHEDULES[args.schedule].data else Watch(run, updates.plan, updates.source)
    hooks = [(args.sample_every or args.updates, compare_picture)]
    if args.fid_every:
        hooks.append((args.fid_every, scorer(args, images, device, SHOWN[:-1])))
    if state:
        run.load(state)
    claim_out(args, state)
    print(f"{args.schedule}: {param_count(net) / 1e6:.2f} M parameters, {args.updates:,} updates of {args.batch} on "
          f"{where(device)} in {args.dtype}, from {args.steps} steps, lr {args.lr:g} to {args.lr_end:g}")
    fit(run, updates, hooks, watch)
    scores = f"--ldm {args.ldm} --data IMAGES " if args.ldm else ""
    print(f"done: {run.ckpt} and {run.out}/samples-{run.step:06d}.png; "
          f"scores: python fid.py {scores}--ckpt {args.ckpt} {run.ckpt}")


def check_source(args, net, source):
    """Exit if the model does not go with the flags: its defaults, its data, its noise schedule."""
    if "ldm" in source and not args.ldm:
        sys.exit(f"error: {args.ckpt} is LDM's {source['ldm']}: give --ldm {source['ldm']}, which has other defaults")
    if args.ldm and not args.data and (SCHEDULES[args.schedule].data or args.fid_every):
        sys.exit(f"error: nobody knows what LDM's {args.ldm} was trained on: give the images as --data")
    try:
        Denoiser.of(net, source).schedule.times(args.steps)
    except ValueError as e:
        sys.exit(f"error: {e}")


def check_labels(args, net, images):
    """Exit if the classes of a data set, in alphabetical order as everywhere, are not those of the model."""
    if net.config.classes and len(images.classes) != net.config.classes:
        sys.exit(f"error: the model has {net.config.classes} classes, but {args.data or 'the data'} has "
                 f"{len(images.classes)} (sub-folders name the classes)")


if __name__ == "__main__":
    launch(main)
