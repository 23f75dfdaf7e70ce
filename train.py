"""Train a diffusion model with self-distillation (section 4.2): the model learns from data, and from itself.

    python train.py --distill 0.15                                          # built-in pictures, CPU
    python train.py --distill 0.15 --data celeba.zip --preset celeba64      # one GPU
    python train.py --distill 0.15 --data DIR --preset church64 --size 32   # any flag beats the preset
    python train.py --resume --out out/train                                # go on where a run stopped
    torchrun --nproc_per_node=8 train.py --distill 0.15 --data celeba.zip --preset celeba64    # eight GPUs

A run leaves OUT/ckpt.pt (weights, their average, optimiser, random state, settings), OUT/log.jsonl (a
line every --log-every updates) and OUT/samples-NNNNNN.png (from the averaged weights, always with the
same noise, to be flipped through). Ctrl-C saves and ends; --resume goes on bit for bit.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import load_data, save_grid
from ddim import SCHEDULES, Denoiser, ddim_target, noise, sample, to_x
from fid import compare, load_features, packed_statistics, sampled_statistics
from model import (
    CONFIGS,
    UNet,
    UNetConfig,
    Vote,
    autocast,
    average,
    config_dict,
    from_all,
    launch,
    load_checkpoint,
    memory_format,
    mine,
    param_count,
    pick_device,
    pick_dtype,
    progress,
    rank,
    ranks,
    save_checkpoint,
    where,
)
from sample import Sampler

# A preset only changes the defaults of flags. Updates, learning rate and size of the three LSUN and CelebA
# runs are the paper's (section 5.2); it is silent about batch, model, warm-up and EMA: those are ours.
PAPER = dict(size=64, model="unet64", batch=128, warmup=1000, ema=0.9999,
             log_every=50, sample_every=5000, save_every=1000, sample_steps=128, needs_data=True)
PRESETS = {
    "toy": dict(size=16, model="toy", updates=2000, batch=32, lr=1e-3, warmup=100, ema=0.995,
                log_every=20, sample_every=500, save_every=500, sample_steps=32),
    "celeba64": PAPER | dict(updates=65_000, lr=1e-4, crop=140 / 178),   # the usual 140 of 178 pixels
    "bedroom64": PAPER | dict(updates=50_000, lr=4e-4),
    "church64": PAPER | dict(updates=40_000, lr=4e-4),
}

STEP = 1 / 128            # from t to t' in the self-distillation term: the paper samples these models with 128 steps
LABEL_DROPOUT = 0.1       # how often a label gives way to the null class, so that guidance has something to push from


# ---- the loss ---------------------------------------------------------------------------------------


def training_loss(xhat, x, t, eps, y, b, step=STEP):
    """Equation 1: the diffusion loss plus b times self-distillation, from one evaluation with gradient.

    xhat  Denoiser of a v-prediction network;  x (B, C, H, W) data;  y (B,) labels or None;  b in [0, 1]
    t     (B,) times ~ U(0, 1];  eps (B, C, H, W) noise ε ~ N(0, I)
    returns  loss (scalar), and its terms by name

        L = (1 − b) ‖v̂_t − v_t‖² + b ‖x' − x''‖²,   v_t = α_t ε − σ_t x        (Eq. 1)

    ‖·‖² is the mean over pixels. v̂_t and x' come from the same evaluation, and b = 0 never makes the second.
    """
    a, s = xhat.schedule(t)
    z = a * x + s * eps                                       # z_t
    v = xhat.output(z, t, y)                                  # v̂_t, the one evaluation with a gradient
    loss_v = (v - (a * eps - s * x)).square().mean()
    if b == 0:
        return loss_v, {"v": loss_v}
    x1 = to_x("v", v, z, a, s)                                # x' = x̂(z_t)
    t1, t2 = (t - step).clamp(min=0), (t - 2 * step).clamp(min=0)
    x2, _ = ddim_target(xhat, z, x1, t, t1, t2, y=y)          # x'', no gradient: the second evaluation
    loss_x = (x1 - x2).square().mean()
    return (1 - b) * loss_v + b * loss_x, {"v": loss_v, "x": loss_x}


def drop_labels(y, null, u, p=LABEL_DROPOUT):
    """Replace labels y (B,) by the null class with probability p, by the random numbers u (B,) ~ U[0, 1)."""
    return torch.where(u < p, null, y)


class Losses:
    """losses(step) for `fit`: Equation 1 on batch after batch of a stream of (x, y), this rank's rows of each."""

    def __init__(self, run, stream, b):
        self.run, self.stream, self.b = run, stream, b
        self.classes = run.net.config.classes
        self.xhat = run.denoiser(run.model)

    def __call__(self, step):
        (images, labels), draw = next(self.stream), self.run.draw
        times, noises = 1 - draw(torch.rand), draw(torch.randn, *images.shape[1:])
        labels = drop_labels(labels, self.classes, draw(torch.rand)) if self.classes else None
        for x, t, eps, y in self.run.split(images, times, noises, labels):
            yield training_loss(self.xhat, x, t, eps, y, self.b)


# ---- a run: what is trained, and its files -----------------------------------------------------------


class Run:
    """A network in training with its average, optimiser, place in the run and files. One loop, `fit`, drives it.

    args   needs: out, updates, batch, accumulate, lr, lr_end, warmup, betas, clip, ema, ema_device, checkpointing,
           seed, dtype, compile, log_every, save_every
    about  what the checkpoint says of the model: schedule, predicts, shape, classes, …, as sample.py needs them
    young  the network starts from random weights, which its average must be quick to forget
    parts  further state that a resumed run needs, by name: objects with state_dict and load_state_dict
    """

    def __init__(self, args, net, device, about, young=True):
        self.args, self.device, self.out, self.about, self.young = args, device, Path(args.out), about, young
        self.parts = {}
        self.net = net.to(device, memory_format=memory_format(device))
        self.net.checkpointing = args.checkpointing
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        if args.ema_device == "cpu":
            self.ema.to("cpu")
        self.shared = DistributedDataParallel(self.net, gradient_as_bucket_view=True) if ranks() > 1 else self.net
        self.model = self.compiled(self.shared)
        self.opt = torch.optim.Adam(self.net.parameters(), lr=args.lr, betas=tuple(args.betas), fused=True)
        self.step = 0
        self.random = torch.Generator(device).manual_seed(args.seed)     # alike on all ranks, see `draw`
        torch.manual_seed(args.seed + rank())                            # for dropout, the only other user of chance

    @property
    def ckpt(self):
        return self.out / "ckpt.pt"

    @cached_property
    def schedule(self):
        return SCHEDULES[self.about["schedule"]]()

    def compiled(self, net):
        """A network as --compile wants it."""
        return torch.compile(net, mode=self.args.compile) if self.args.compile else net

    def denoiser(self, net):
        """x̂ of this run's network, or of one like it: the network wrapped for several ranks, an average, a teacher."""
        return Denoiser(net, self.schedule, self.about["predicts"], self.net.config.classes or None)

    def draw(self, kind, *shape):
        """Random numbers for each image of the batch, this rank's rows: kind(batch, *shape), e.g. of torch.randn.

        All ranks draw the same, for the whole batch: what image i gets does not depend on how many they are.
        """
        return mine(kind(self.args.batch, *shape, generator=self.random, device=self.device))

    def split(self, *rows):
        """This rank's rows (of tensors or None) in --accumulate equal parts, one after the other."""
        count = self.args.accumulate
        return zip(*([x] * count if x is None else x.chunk(count) for x in rows), strict=True)

    def average(self):
        """The averaged network on the run's device, to sample from: a copy if it is kept elsewhere."""
        return self.ema if self.args.ema_device == "same" else copy.deepcopy(self.ema).to(self.device)

    def autocast(self):
        return autocast(self.device, self.args.dtype)

    def lr(self):
        """Learning rate of the update about to be made."""
        return learning_rate(self.args, self.step)

    def update(self, losses):
        """One optimiser step, and one of the weight average.

        losses  yields (loss, {name: scalar}) for each of --accumulate parts of the batch
        returns {name: scalar tensor} for the log: means over the parts, and the norm of the gradient before clipping
        """
        values, count = [], self.args.accumulate
        for part in range(count):
            # Ranks exchange their gradients in the last backward pass only.
            alone = self.shared.no_sync() if ranks() > 1 and part < count - 1 else contextlib.nullcontext()
            if self.args.compile:
                torch.compiler.cudagraph_mark_step_begin()    # what the last update's CUDA graphs put out is done with
            with alone:
                with self.autocast():
                    loss, terms = next(losses)
                (loss / count).backward()
            values.append(dict(loss=loss.detach()) | {k: v.detach() for k, v in terms.items()})
        for group in self.opt.param_groups:
            group["lr"] = self.lr()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.args.clip)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        # A short memory at first: an average still full of the random start would show noise for thousands of updates.
        follow(self.ema, self.net, min(self.args.ema, (1 + self.step) / (10 + self.step) if self.young else 1))
        self.step += 1
        return {k: sum(v[k] for v in values) / count for k in values[0]} | dict(grad_norm=norm)

    def state(self):
        """Everything a run needs to go on exactly, and sample.py needs to load the model. To be called on all ranks."""
        return dict(self.about, config=config_dict(self.net.config), step=self.step,
                    args={k: v for k, v in vars(self.args).items() if k not in ("out", "resume", "overwrite")},
                    parts={name: part.state_dict() for name, part in self.parts.items()},
                    weights=self.net.state_dict(), ema=self.ema.state_dict(), optimizer=self.opt.state_dict(),
                    random=self.random.get_state(), dropout=from_all(_dropout_state(self.device)[None]))

    def save(self):
        state = self.state()
        if rank() == 0:
            save_checkpoint(self.ckpt, state)

    def load(self, state):
        """Take up the state of a checkpoint of the same network. Says so where the run can't go on bit for bit."""
        if "random" not in state:
            sys.exit(f"error: {self.ckpt} is of an older version: it can be sampled and distilled, but not resumed")
        try:
            self.net.load_state_dict(state["weights"])
        except RuntimeError as e:
            sys.exit(f"error: the model of {self.ckpt} has another shape than these flags ask for "
                     f"({str(e).splitlines()[1].strip()})")
        self.ema.load_state_dict(state["ema"])
        self.opt.load_state_dict(state["optimizer"])
        for group in self.opt.param_groups:
            group["betas"] = tuple(self.args.betas)           # flags beat the checkpoint, as everywhere
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.step = state["step"]
        before = len(state["dropout"])
        if state["random"].shape != self.random.get_state().shape:
            self.random.manual_seed(self.args.seed + self.step)
            print("resuming on another kind of device: other noise from here on, no longer bit for bit")
        else:
            self.random.set_state(state["random"])
            if before == ranks():
                _set_dropout_state(self.device, state["dropout"][rank()])
        if before != ranks():
            print(f"resuming on {ranks()} processes what ran on {before}: the same images and the same noise, but "
                  f"gradients are summed in another order, and --dropout draws other masks: no longer bit for bit")


def _dropout_state(device):
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_dropout_state(device, state):
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def learning_rate(args, step):
    """Linear warm-up to --lr, then constant; with --lr-end half a cosine from --lr to there (section 5, Table 3)."""
    warm = min(1, (step + 1) / max(1, args.warmup))
    if args.lr_end is None:
        return args.lr * warm
    progress = max(0, step - args.warmup) / max(1, args.updates - 1 - args.warmup)
    return warm * (args.lr_end + (args.lr - args.lr_end) * (1 + math.cos(math.pi * min(1, progress))) / 2)


@torch.no_grad()
def follow(average, net, decay):
    """One step of a running average of weights, which may be on another device: decay · average + (1 − decay) · net."""
    averages = list(average.parameters())
    weights = [p.to(a.device) for a, p in zip(averages, net.parameters(), strict=True)]
    torch._foreach_lerp_(averages, weights, 1 - decay)


def fit(run, losses, hooks=(), watch=None):
    """The training loop. losses(step) yields (loss, {name: scalar tensor}) for each of --accumulate parts of a batch.

    hooks  pairs (N, hook): hook(run) is called every N updates and after the last; returns dicts to log, or nothing
    watch  called before each line of the log is written and each checkpoint: returns more to log, or ends the run

    Every rank runs it, and rank 0 writes. Nothing here waits for the GPU except where a value is logged (and, in
    every update, to copy the weights with --ema-device cpu). A loss or
    gradient that is not finite ends the run with the last good checkpoint in place, Ctrl-C or SIGTERM with a fresh one.
    """
    a, pending, since, vote = run.args, [], time.perf_counter(), Vote()
    every = lambda n: n and (run.step % n == 0 or run.step == a.updates)  # noqa: E731
    log_file = os.devnull if rank() else run.out / "log.jsonl"
    with (disk_errors(run), catch_signals() as stopped, open(log_file, "a") as log,
          progress(total=a.updates, initial=run.step, unit="update") as bar):
        stop = False
        while run.step < a.updates and not stop:
            lr, values = run.lr(), run.update(losses(run.step))
            pending.append(torch.stack([*values.values()]).float())
            bar.update()
            stop = vote(bool(stopped))                        # read once: the next update notices a later signal
            if every(a.log_every) or every(a.save_every) or stop:
                entry = _mean_of(run, pending, values.keys(), bar)
                now = time.perf_counter()
                entry |= watch() if watch else {}
                entry |= dict(lr=lr, images_per_s=round(len(pending) * a.batch / (now - since), 1))
                log.write(json.dumps(entry) + "\n")
                log.flush()
                shown = {k: f"{entry[k]:.3g}" for k in values if k != "grad_norm"}
                bar.set_postfix(shown | {"img/s": entry["images_per_s"]})
                pending, since = [], now
            paused = time.perf_counter()
            if every(a.save_every) or stop:
                run.save()
            for n, hook in hooks if not stop or run.step == a.updates else ():
                for entry in (every(n) and hook(run)) or []:
                    log.write(json.dumps({"step": run.step} | entry) + "\n")
                    log.flush()
            since += time.perf_counter() - paused             # neither is training: keep them out of images/s
    if run.step < a.updates:
        again = "torchrun …" if ranks() > 1 else "python"
        print(f"stopped at update {run.step} of {a.updates}; saved {run.ckpt}. Go on with: "
              f"{again} {Path(sys.argv[0]).name} --resume --out {run.out}")
        sys.exit(130)


def _mean_of(run, pending, names, bar):
    """Means, over the ranks too, of the values gathered since the last call, as a log entry; ends the run if one is
    not finite.
    """
    values = average(torch.stack(pending)).cpu()
    bad = (~values.isfinite().all(dim=1)).nonzero()
    if len(bad):
        bar.close()
        first = run.step - len(pending) + 1 + bad[0].item()
        sys.exit(f"error: loss or gradient not finite at update {first}; {what_is_kept(run)}. "
                 f"Try a lower --lr, or --dtype fp32.")
    return {"step": run.step} | dict(zip(names, values.mean(0).tolist(), strict=True))


def what_is_kept(run):
    return f"{run.ckpt} holds the last good checkpoint" if run.ckpt.exists() else "there is no checkpoint yet"


@contextlib.contextmanager
def disk_errors(run):
    """A disk that is full, or gone, ends a run in one line."""
    try:
        yield
    except OSError as e:
        sys.exit(f"error: can't write to {run.out} ({e.strerror or e}); {what_is_kept(run)}")


@contextlib.contextmanager
def catch_signals():
    """A list that is empty until Ctrl-C or SIGTERM arrives; a second Ctrl-C interrupts at once.

    Not under torchrun: it passes on what the terminal sends as well, and ends a process that takes over 30 seconds.
    """
    stopped = []

    def handler(number, frame):
        if stopped and ranks() == 1:
            raise KeyboardInterrupt
        stopped.append(number)

    old = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for n, h in old.items():
            signal.signal(n, h)


# ---- the folder of a run ------------------------------------------------------------------------------


RUN_FILES = "ckpt.pt", "log.jsonl", "samples-*.png"


def check_out(args, more="--updates N asks for more"):
    """Look at flags and OUT before any work: the checkpoint to --resume from, or None. Exits if a run is in the way.

    more  what the user of a finished run can do
    """
    out = Path(args.out)
    if args.batch % (ranks() * args.accumulate):
        sys.exit(f"error: --batch {args.batch} can't be shared equally by {ranks()} processes"
                 f" with --accumulate {args.accumulate}")
    if args.compile == "reduce-overhead" and ranks() > 1:
        sys.exit("error: --compile reduce-overhead is for a single process; several take --compile default")
    if args.resume:
        state = load_checkpoint(out / "ckpt.pt")
        if state["step"] >= args.updates:
            sys.exit(f"{out} is finished ({state['step']} updates); {more}")
        return state
    if rank():                                                # rank 0 looks: it may have begun to write by now
        return None
    if any(f for pattern in RUN_FILES for f in out.glob(pattern)) and not args.overwrite:
        sys.exit(f"error: {out} holds a run already: --resume goes on, --overwrite deletes it, --out takes another")
    return None


def claim_out(args, state):
    """Make OUT ready for the first update: an old run goes, after all checks, lest a typing error delete it."""
    out = Path(args.out)
    if rank():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        if state:
            _cut_log(out / "log.jsonl", state["step"])
        else:
            for f in [f for pattern in RUN_FILES for f in out.glob(pattern)]:
                f.unlink()
    except OSError as e:
        sys.exit(f"error: can't write to {out} ({e.strerror})")


def _cut_log(path, step):
    """Drop what a killed run logged after its last checkpoint: those updates will be made, and logged, again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        tmp = path.with_name(path.name + ".tmp")
        tmp.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        os.replace(tmp, path)


def batches(images, args, start, device):
    """Yield this rank's rows of batch `start`, `start` + 1 … as (x, y) on the device; a thread reads one ahead."""

    def fetch(step):
        x, y = images.batch(step, args.batch, args.seed, args.flip, (rank(), ranks()))
        return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fetch, start)
        while True:
            x, y = future.result()
            start += 1
            future = pool.submit(fetch, start)
            yield x.to(device, non_blocking=True, memory_format=memory_format(device)), y.to(device, non_blocking=True)


def sample_picture(run, count=80, columns=10):
    """Sample grid from the averaged weights, always with the same noise; with ten classes, each has its column."""
    if rank():
        return
    a, c = run.args, run.net.config
    y = torch.arange(count, device=run.device) % c.classes if c.classes else None
    xhat = run.denoiser(run.average())
    z = noise(a.seed, range(count), run.about["shape"]).to(run.device, memory_format=memory_format(run.device))
    with run.autocast():
        x = sample(xhat, z, a.sample_steps, y)
    save_grid(x, run.out / f"samples-{run.step:06d}.png", columns)


def scorer(args, images, device, steps):
    """A hook that scores the averaged weights against the training images, for curves like Figure 3.

    steps  step counts: each gives a line of the log
    """
    features = load_features(args.weights, device)
    real = packed_statistics(images, features)

    def score(run):
        y = list(range(run.net.config.classes)) or None
        sampler = Sampler(run.average(), run.about, run.device, args.dtype, y, seed=args.seed)
        for s in steps:
            fake = sampled_statistics(sampler, s, args.fid_samples, features, dict(weights="ema", dtype=args.dtype))
            if rank():                                        # which has drawn its share
                continue
            card = compare(real, fake)
            yield card["scores"] | {k: card[k] for k in ("features", "real", "fake")}

    return score


# ---- command line ---------------------------------------------------------------------------------------


def parse_args(argv=None):
    """Flags beat the settings of a resumed run, which beat the preset, which beats the defaults."""
    pre = argparse.ArgumentParser(add_help=False)
    pre.add_argument("--preset", choices=PRESETS, default="toy",
                     help="defaults for the other flags (default: %(default)s)")
    pre.add_argument("--resume", action="store_true", help="continue the run in --out, with its own settings")
    pre.add_argument("--out", default="out/train", metavar="DIR", help="folder of the run (default: %(default)s)")
    first = pre.parse_known_args(argv)[0]
    p = argparse.ArgumentParser(parents=[pre], description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)

    g = p.add_argument_group("the method")
    g.add_argument("--distill", type=float, nargs="?", const=0.15, default=0.0, metavar="b",
                   help="weight b of the self-distillation term in Equation 1; the paper uses 0.15; 0: plain training")
    optimiser_flags(g)

    g = p.add_argument_group("the data")
    g.add_argument("--data", metavar="PATH",
                   help="folder or zip of images, or an LSUN LMDB folder (default: the built-in pictures)")
    g.add_argument("--size", type=int, help="side of the training images in pixels (default: %(default)s)")
    g.add_argument("--crop", type=float,
                   help="centre crop before resizing: in pixels (CelebA: 140), or up to 1: a share of the shorter side")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                   help="mirror half of the images (default: on)")
    g.add_argument("--classes", action=argparse.BooleanOptionalAction, default=False,
                   help="condition on the labels (sub-folders); they are dropped one time in ten, for guidance")

    g = p.add_argument_group("the model (each of these beats what --model says)")
    g.add_argument("--model", choices=CONFIGS, help="size of the UNet, by name (default: %(default)s)")
    g.add_argument("--channels", type=int, help="width at full resolution")
    g.add_argument("--mult", type=int, nargs="+", help="width of each level, in units of --channels")
    g.add_argument("--blocks", type=int, help="residual blocks per level")
    g.add_argument("--attention", type=int, nargs="*", help="attend where the image is this many times smaller")
    g.add_argument("--head-channels", type=int, help="channels per attention head")
    g.add_argument("--dropout", type=float, help="in the residual blocks; x' and x'' then see different masks")

    g = p.add_argument_group("the run")
    g.add_argument("--sample-steps", type=int, metavar="S", help="DDIM steps of the samples (default: %(default)s)")
    run_flags(g)

    p.set_defaults(**PRESETS[first.preset])
    args, changed = settle(p, argv, first)
    if changed - {"updates"}:
        print(f"resuming with another {', '.join(sorted(changed))}: "
              f"no longer the same as a run that was never interrupted")
    check_numbers(p, args)
    if not 0 <= args.distill <= 1:
        p.error("--distill must be between 0 and 1: it is b in Equation 1")
    if getattr(args, "needs_data", False) and args.data is None:
        p.error(f"--preset {args.preset} trains on real images: give their folder, zip or LMDB as --data")
    return args


def optimiser_flags(g):
    """The flags of `Run`'s optimiser, for every script that trains."""
    g.add_argument("--updates", type=int, metavar="P", help="optimiser steps in all (default: %(default)s)")
    g.add_argument("--batch", type=int,
                   help="images per update, all processes of torchrun together (default: %(default)s)")
    g.add_argument("--accumulate", type=int, default=1, metavar="K",
                   help="make each update from K parts of the batch, one after the other: a K-th of the memory for "
                        "activations (default: 1)")
    g.add_argument("--lr", type=float, help="learning rate after warm-up (default: %(default)s)")
    g.add_argument("--lr-end", type=float, help="where it falls to, along a cosine (default: it stays)")
    g.add_argument("--warmup", type=int, help="updates over which it rises from 0 (default: %(default)s)")
    g.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.999], help="of Adam (default: %(default)s)")
    g.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (default: 1)")
    g.add_argument("--ema", type=float,
                   help="decay of the weight average that samples are drawn from (default: %(default)s)")
    g.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default: 0)")


def run_flags(g):
    """The flags of `fit`, `scorer` and the device, for every script that trains."""
    g.add_argument("--overwrite", action="store_true", help="delete the run that --out holds")
    g.add_argument("--log-every", type=int, metavar="N",
                   help="updates between two lines of log.jsonl (default: %(default)s)")
    g.add_argument("--sample-every", type=int, metavar="N",
                   help="updates between two sample grids; 0: none (default: %(default)s)")
    g.add_argument("--save-every", type=int, metavar="N", help="updates between two checkpoints (default: %(default)s)")
    g.add_argument("--fid-every", type=int, default=0, metavar="N",
                   help="updates between two scores (as fid.py gives) in log.jsonl (default: 0: none)")
    g.add_argument("--fid-samples", type=int, default=10_000, metavar="M", help="images for each (default: 10000)")
    g.add_argument("--weights", metavar="FILE", help="Inception weights for that, or random, as in fid.py")
    g.add_argument("--cache", metavar="DIR", help="where packed images are kept (default: $DSD_CACHE or ~/.cache/dsd)")
    g.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                   help="precision of the network's insides (default: bf16 where the hardware has it)")
    g.add_argument("--ema-device", choices=["same", "cpu"], default="same",
                   help="where the weight average is kept: beside the model, or on the CPU to save a GPU its memory, "
                        "which waits in every update then")
    g.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False,
                   help="compute activations again in the backward pass: a fraction of the memory, a third more time")
    compile_flag(g)


def compile_flag(g):
    g.add_argument("--compile", nargs="?", const="default", default="", metavar="MODE",
                   choices=["", "default", "reduce-overhead"],
                   help="torch.compile the network: default, or reduce-overhead, which adds CUDA graphs for small "
                        "batches on a GPU; the first update then takes a minute (default: not)")


def settle(p, argv, first):
    """Parse with the settings of the run that --resume names as defaults: (args, names of settings that changed)."""
    saved = load_checkpoint(Path(first.out) / "ckpt.pt")["args"] if first.resume else {}
    p.set_defaults(**{k: v for k, v in saved.items() if k not in ("out", "resume", "overwrite")})
    args = p.parse_args(argv)
    return args, {k for k, v in saved.items() if getattr(args, k, v) != v}


def check_numbers(p, args):
    """Refuse values that can't work before anything is touched."""
    least = dict(updates=1, batch=1, accumulate=1, size=1, log_every=1, save_every=1, sample_steps=1,
                 sample_every=0, fid_every=0, fid_samples=2, warmup=0, seed=0)
    for name, value in least.items():
        given = getattr(args, name, None)
        if given is not None and given < value:
            p.error(f"--{name.replace('_', '-')} must be at least {value}")
    if args.compile == "reduce-overhead" and args.accumulate > 1:
        p.error("--compile reduce-overhead keeps gradients where the next part of --accumulate would overwrite them")
    if not all(0 <= beta < 1 for beta in args.betas):
        p.error("--betas must be at least 0 and below 1")
    if not 0 <= args.ema < 1:
        p.error("--ema must be at least 0 and below 1")
    for name in ("lr", "lr_end", "clip", "crop"):
        value = getattr(args, name, None)
        if value is not None and not (value > 0 and math.isfinite(value)):
            p.error(f"--{name.replace('_', '-')} must be a positive number")


def make_config(args):
    """The UNet's config from --model and the flags that beat it. Exits if it can't be built or does not fit --size."""
    flags = {k: getattr(args, k) for k in ("channels", "mult", "blocks", "attention", "head_channels", "dropout")}
    try:
        config = UNetConfig(**CONFIGS[args.model] | {k: v for k, v in flags.items() if v is not None})
    except ValueError as e:
        sys.exit(f"error: {e}")
    if args.size % 2 ** (len(config.mult) - 1):
        sys.exit(f"error: --size {args.size} must be divisible by {2 ** (len(config.mult) - 1)}, "
                 f"as this model halves the image {len(config.mult) - 1} times")
    return config


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, device)
    state, config = check_out(args), make_config(args)
    images = load_data(args.data, args.size, args.crop, args.cache)
    if args.classes and not images.classes:
        sys.exit(f"error: --classes needs labels, and {args.data} has none (sub-folders name the classes)")
    classes = images.classes if args.classes else []
    hooks = [(args.sample_every, sample_picture)]
    if args.fid_every:
        hooks.append((args.fid_every, scorer(args, images, device, [args.sample_steps])))
    torch.manual_seed(args.seed)
    about = dict(schedule="cosine", predicts="v", shape=[3, args.size, args.size], classes=list(classes))
    run = Run(args, UNet(replace(config, classes=len(classes))), device, about)
    if state:
        run.load(state)
    claim_out(args, state)
    print(f"{len(images):,} images of {args.size}x{args.size}, {param_count(run.net) / 1e6:.2f} M parameters, "
          f"{args.updates:,} updates of {args.batch} images on {where(device)} in {args.dtype}, distill {args.distill}")

    losses = Losses(run, batches(images, args, run.step, device), args.distill)
    fit(run, losses, hooks)
    pictures = f" and {run.out}/samples-{run.step:06d}.png" if args.sample_every else ""
    print(f"done: {run.ckpt}{pictures}; few-step samples side by side: python sample.py --ckpt {run.ckpt}")


if __name__ == "__main__":
    launch(main)
