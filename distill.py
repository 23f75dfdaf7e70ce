"""Distil a trained diffusion model into itself (section 4.1): afterwards it samples well in few steps.

    python distill.py --schedule dsdi                          # the model of out/train; no data, no teacher
    python distill.py --schedule shortcut                      # beyond the paper: 1 to 64 steps from one model
    python distill.py --schedule tsd --ckpt out/train/ckpt.pt  # a frozen teacher makes the targets, for comparison
    python distill.py --schedule pd --data celeba.zip          # progressive distillation: the one that reads data
    python distill.py --ldm celebahq256 --ckpt model.ckpt --schedule dsdn      # LDM's models: see ldm.py
    python distill.py --schedule dsdgl --dry-run               # the plan as a table; distils nothing
    torchrun --nproc_per_node=8 distill.py --schedule dsdi     # eight GPUs
    python distill.py --resume --out out/dsdi                  # go on where a run stopped, in mid-trajectory

A run leaves OUT/ckpt.pt (for sample.py, fid.py, and as --ckpt for another run), OUT/log.jsonl, OUT/curves.png and
OUT/samples-NNNNNN.png: the model before and after, at 1, 2, 4, 8 and 64 steps, from the same noise. OUT/best.pt is the
model of the update with the best fidelity, see hooks.py.
"""

import argparse
from pathlib import Path

import torch

from curves import draw_curves
from ddim import WEIGHTS, ddim_target
from flags import (
    at_least,
    checkpoint,
    finite,
    fraction,
    optimiser_flags,
    out_flags,
    parse_with_saved,
    run_flags,
    score_flags,
)
from hooks import SHOWN, WATCHED, Guard, scorer
from ldm import MODELS, Latents, ldm_flag
from model import param_count
from plans import METHODS, locate, plan, print_plan
from rundir import check_out, prepare_out
from runtime import describe_device, launch, pick_device, pick_dtype, ranks
from shortcut import jump_rows, shortcut
from source import opened, own_samples, reads_data, remember_before
from trainer import Trainer, batches, final_rate, update_ema

# ---- Algorithms 1 and 2 -----------------------------------------------------------------------------------
def distillation_loss(xhat, z, t, t1, t2, y, w, target_model, teacher=None, target="ddim", weight="snr"):
    """The body of Algorithms 1 and 2: pull x' = x̂_θ(z_t) to the x'' of one big step t -> t'' that lands where two
    small ones t -> t' -> t'' do.

    xhat    x̂_θ, the Denoiser in training;  z (B, C, H, W) noisy images z_t;  t, t1, t2 times, each (B,)
    y, w    class (B,) and guidance weight (B, 1, 1, 1), the same in all evaluations; None: no classes, no guidance
    target_model  the Denoiser that takes the second step: x̂_θ itself (DSD), a running average of it, or the teacher
    teacher       x̂_η of TSD and PD, which takes the first step, too; None: x̂_θ does
    target        what x'' is, see ddim.ddim_target;  weight  the name of w, in ddim.WEIGHTS
    returns loss (scalar), and z_t'' (B, C, H, W), where a trajectory goes on: no gradient

        L = w(λ_t) ‖x' − x''‖²,   λ_t = log(α_t² / σ_t²)             ‖·‖² is the mean over pixels

    Algorithm 2 writes x' as the inverse of the first step, which is x̂_θ(z_t) itself."""
    x1 = xhat(z, t, y, w)                                     # x': the only evaluation with a gradient
    with torch.no_grad():
        x = x1.detach() if teacher is None else teacher(z, t, y, w)
    x2, z2 = ddim_target(target_model, z, x, t, t1, t2, target, y=y, w=w)       # x'' and z_t''
    weights = WEIGHTS[weight](xhat.schedule.log_snr(t))       # (B, 1, 1, 1)
    return (weights * (x1 - x2).square()).mean(), z2

def guidance_weight(trainer):
    """One guidance weight w ~ U[low, high] for the whole batch (section 5): this rank's rows (B, 1, 1, 1). None if it
    is always 1, which needs no second evaluation."""
    low, high = trainer.args.guidance
    if low == high == 1:
        return None
    w = low + (high - low) * torch.rand(1, 1, 1, 1, generator=trainer.random, device=trainer.device)
    return w.expand(trainer.args.batch // ranks(), 1, 1, 1)

def fine_tune(trainer, depths, stream=None):
    """Algorithm 2, fine-tuning DSD: a batch walks from noise to data, and the model learns from two steps at a time.

    With a teacher, renewed at each depth: TSD. With --target-ema an average of the weights takes the second step."""
    args, net, classes = trainer.args, trainer.net, trainer.net.config.classes
    xhat = trainer.denoiser()                                 # x̂_θ
    frozen = trainer.second_net("teacher") if METHODS[args.schedule].teacher else None
    teacher = frozen and trainer.denoiser(frozen)             # x̂_η
    target_model = teacher or (trainer.denoiser(trainer.target_net()) if args.target_ema else xhat)
    z, y, w = (trainer.carried.get(name) for name in ("z", "y", "w"))
    for step in trainer.steps():                              # logs, saves, resumes, stops
        N, u = locate(depths, step)                           # N_i, and which of its U_i updates this is
        if frozen and u == 0:
            update_ema(frozen, net, decay=0)                  # η ← θ
        i = N - 2 * u % N                                     # i = N_i, N_i − 2, … 2, and from N_i again
        if i == N:
            z = trainer.randn(*trainer.model_info["shape"])   # z_t ~ N(0, I): a fresh trajectory
            y, w = (trainer.randint(classes), guidance_weight(trainer)) if classes else (None, None)
        times = trainer.schedule.equal_times(N)[N - i:N - i + 3]
        t, t1, t2 = (torch.full((len(z),), t, device=z.device) for t in times)
        z2 = []
        for part in trainer.parts(z, t, t1, t2, y, w):        # the whole batch, or --accumulate parts of it
            with trainer.autocast():
                loss, arrived = distillation_loss(xhat, *part, target_model, teacher, args.target, args.weight)
            trainer.backward(loss)                            # ∇_θ L
            z2.append(arrived)
        trainer.update()                                      # θ ← θ − γ ∇_θ L
        z = torch.cat(z2)                                     # z_t'': there the trajectory goes on
        trainer.carried = {name: rows for name, rows in dict(z=z, y=y, w=w).items() if rows is not None}

def progressive(trainer, depths, stream):
    """Algorithm 1, progressive distillation: a student of N/2 steps learns from its teacher's N on noised data.

    stream  yields data (x, y) on the device: this rank's rows of each batch"""
    args, classes, schedule = trainer.args, trainer.net.config.classes, trainer.schedule
    frozen = trainer.second_net("teacher")
    xhat, teacher = trainer.denoiser(), trainer.denoiser(frozen)          # x̂_θ, x̂_η
    times = {N: torch.tensor(schedule.equal_times(N), device=trainer.device) for N, _ in depths}
    for step in trainer.steps():
        N, u = locate(depths, step)                           # twice the paper's N: the teacher's steps
        if u == 0:
            update_ema(frozen, trainer.net, decay=0)          # η ← θ: the student becomes the next teacher
        x, y = next(stream)                                   # x ~ D
        i = 2 * trainer.randint(N // 2)                       # t = 1 − i/N: on the student's grid
        t, t1, t2 = (times[N][i + k] for k in range(3))
        a, s = schedule(t)
        z = a * x + s * trainer.randn(*x.shape[1:])           # z_t = α_t x + σ_t ε
        y, w = (y, guidance_weight(trainer)) if classes else (None, None)
        for part in trainer.parts(z, t, t1, t2, y, w):
            with trainer.autocast():
                loss, _ = distillation_loss(xhat, *part, teacher, teacher, args.target, args.weight)
            trainer.backward(loss)
        trainer.update()                                      # θ ← θ − γ ∇_θ L

def fine_tune_shortcut(trainer, depths, stream):
    """Beyond the paper (shortcut.py): jumps of every length at once, anchored by the undistilled model."""
    args = trainer.args
    shortcut(trainer, stream, args.share, trainer.second_net("anchor"), args.guidance[0])

def loop_of(schedule):
    """The loop of a method: loop(trainer, depths, stream), depths as plans.plan gives them."""
    method = METHODS[schedule]
    return fine_tune_shortcut if method.shortcut else progressive if method.data else fine_tune

# ---- command line -----------------------------------------------------------------------------------------
# For small models.
DEFAULTS = dict(updates=128, batch=32, warmup=12, betas=[0.9, 0.98], ema=0.98, log_every=10, sample_every=0,
                save_every=64)
# At these rates no step count from 2 to 8 got worse, with two small exceptions (docs/results.md, "A recipe").
RATES = {"dsdn": 3e-6, "dsdi": 3e-6, "dsdgl": 3e-6, "dsdgexp": 3e-6, "tsd": 3e-5, "pd": 1e-4, "shortcut": 5e-4}

# For shortcut, with any model, but never tried with LDM's.
SHORTCUT = dict(updates=600, lr=RATES["shortcut"], lr_share=0.02, warmup=30, ema=0.98, target_ema=0.95, steps=16,
                guidance=[2.0, 2.0])

# For LDM's models: Table 3. It gives no batch size and no length of the warm-up: those are ours.
TABLE3 = dict(updates=4000, batch=8, lr=1e-6, warmup=100, betas=[0.9, 0.98], ema=0.995, log_every=20, sample_every=1000,
              save_every=500)
TABLE3_CLASSES = TABLE3 | dict(updates=5000, lr=1e-7, betas=[0.99, 0.999], ema=0.9995)

def defaults(given):
    """What the flags of the optimiser and the run are unless given."""
    settings = dict(out=f"out/{given.schedule}", lr_share=0.1)    # the rate falls to 10 % (section 5)
    if given.ldm:
        settings |= TABLE3_CLASSES if MODELS[given.ldm].unet.classes else TABLE3
    else:
        settings |= DEFAULTS | dict(lr=RATES[given.schedule])
    return settings | (SHORTCUT if METHODS[given.schedule].shortcut else {})

def parse_args(argv=None):
    """Flags beat the settings of a resumed run, which beat the defaults."""
    p = argparse.ArgumentParser(usage="%(prog)s [flags]", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("the method")
    g.add_argument("--schedule", choices=METHODS, default="dsdi",
                   help="the method (default: dsdi); default --lr of small models: "
                        + ", ".join(f"{m} {r:g}" for m, r in RATES.items())
                        + " (of shortcut with LDM's, too, where no rate of it was ever tried: begin far lower)")
    g.add_argument("--ckpt", type=checkpoint, default="out/train/ckpt.pt", metavar="FILE",
                   help="the model to distil, or its folder; from its averaged weights (default: %(default)s)")
    ldm_flag(g)
    g.add_argument("--steps", type=int, default=64, metavar="N",
                   help="start depth (default: 64, the paper's); of shortcut: steps of its own samples (default: 16)")
    optimiser_flags(g)
    g.add_argument("--target", choices=["ddim", "x0"], default="ddim",
                   help="x'': where one big step must aim (ddim, default), or the second prediction (x0, section 4.1)")
    g.add_argument("--weight", choices=WEIGHTS, default="snr", help="w(λ) of the loss: truncated SNR (default), or 1")
    g.add_argument("--guidance", type=finite, nargs=2, default=[1.0, 3.0], metavar=("LOW", "HIGH"),
                   help="range of the guidance weight, for models with classes (default: 1 3; of shortcut: 2 2)")
    g.add_argument("--dry-run", action="store_true", help="only print the plan")
    out_flags(g, "out/<schedule>")
    g = p.add_argument_group("beyond the paper")
    g.add_argument("--target-ema", type=fraction, default=0.0, metavar="D",
                   help="a running average of the weights with this decay takes the second step: steadier than the "
                        "model itself; if D is that of --ema, without a further copy (default: 0, the paper's; of "
                        "shortcut: 0.95)")
    g.add_argument("--for-steps", type=int, choices=SHOWN, nargs="+", default=[*WATCHED], metavar="K",
                   help="what the model is for: the update with the best fidelity at these step counts is kept as "
                        "OUT/best.pt (default: 2 4 8)")
    g.add_argument("--guard", action=argparse.BooleanOptionalAction, default=True,
                   help="end a run whose few-step samples are lost, see docs/guard.md (default: on)")
    g.add_argument("--share", type=fraction, default=0.5, metavar="b",
                   help="for shortcut: the share of rows that jump (default: 0.5)")
    g.add_argument("--pool", type=at_least(1), default=2000, metavar="M",
                   help="for shortcut without --data: how many samples it draws, in --steps steps, to learn from "
                        "(default: 2000)")
    g = p.add_argument_group("the data")
    g.add_argument("--data", metavar="PATH",
                   help="folder, zip or LMDB that pd and --fid-every read (default: what the model was trained on), "
                        "and that shortcut learns from in place of its own samples, if given")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction,
                   help="mirror half of it (default: as the model was trained)")
    score_flags(p.add_argument_group("scores on the way"))
    g = p.add_argument_group("rarely changed")
    g.add_argument("--size", type=at_least(1), help="with --ldm: side of the images in pixels (default: 256)")
    run_flags(g)
    p.set_defaults(times="uniform")                           # of shortcut's rows: the middle did no better
    args = parse_with_saved(p, argv, defaults, fixed=lambda args: {
        "schedule", "ckpt", "ldm", "size", "steps", "updates", "batch", "ema", "target_ema", "pool", "seed",
        "for_steps", "guidance"})
    check(p, args)
    return args

def check(p, args):
    """Refuse values that can't work before anything is touched, and settle what depends on others."""
    method = METHODS[args.schedule]
    def given(*names):                                        # with another value than the default's, or the saved one
        return any(getattr(args, name) != p.get_default(name) for name in names)
    for wrong, message in (
        (args.target_ema and method.teacher,
         f"--target-ema is for the methods without a teacher; in {args.schedule} the teacher makes the target"),
        (given("data") and not (method.data or method.shortcut or args.fid_every),
         f"{args.schedule} reads no data; --data is for pd, shortcut and --fid-every"),
        (not method.shortcut and given("share", "pool"),
         f"--share and --pool are for shortcut, not for {args.schedule}"),
        (method.shortcut and given("target", "weight"),
         "--target and --weight are of Algorithms 1 and 2: shortcut has a loss of its own"),
        (method.shortcut and not jump_rows(args.batch, args.share).any(),
         f"--share {args.share:g} of --batch {args.batch}: no row would learn to jump"),
        (method.shortcut and args.guidance[0] != args.guidance[1],
         "--guidance: shortcut bakes one weight into the model: give it twice"),
        (not 0 <= args.guidance[0] <= args.guidance[1], "--guidance LOW HIGH: two weights, the lower one first"),
        (Path(args.ckpt).resolve() in [(Path(args.out) / name).resolve() for name in ("ckpt.pt", "best.pt")],
         "--out is the folder of --ckpt: the distilled model would take its place"),
    ):
        if wrong:
            p.error(message)
    try:
        plan(args.schedule, args.steps, args.updates)
    except ValueError as e:
        p.error(str(e))

def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        return print_plan(args)
    device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, device)
    state = check_out(args, f"distil it further as --ckpt {args.out}/ckpt.pt, into another --out")
    torch.manual_seed(args.seed)                              # of the path that `opened` may add to the network
    net, source, model_info, images = opened(args, state, device)
    hooks = [(args.updates, draw_curves)]
    if args.fid_every:
        hooks.append((args.fid_every, scorer(args, images, device, SHOWN[:-1])))
    trainer = Trainer(args, net.requires_grad_(True), device, model_info, hooks, ema_warmup=False)
    if state:
        trainer.load(state, needs=["reference"])
    data = Latents(images, source, device, args.dtype) if args.ldm and reads_data(args) else images
    print(f"{args.schedule}: {param_count(net) / 1e6:.2f} M parameters, {args.updates:,} updates of {args.batch} on "
          f"{describe_device(device)} in {args.dtype}, from {args.steps} steps, lr {args.lr:g} to {final_rate(args):g}")
    remember_before(trainer, source, state)
    prepare_out(args, state)
    method, depths = METHODS[args.schedule], plan(args.schedule, args.steps, args.updates)
    if method.shortcut and net.config.classes:
        model_info["guidance"] = args.guidance[0]             # from here on built in
    if method.shortcut and not reads_data(args):
        data = own_samples(trainer)
    stream = batches(data, args, trainer.step, device) if method.data or method.shortcut else None
    guard = Guard(trainer, args.for_steps, args.guard)
    trainer.hooks.insert(0, (args.sample_every or args.updates, guard.picture))
    def watch(trainer):
        depth = {} if method.shortcut else dict(depth=locate(depths, trainer.step - 1)[0])
        return depth | guard(trainer)
    trainer.watch = watch
    loop_of(args.schedule)(trainer, depths, stream)
    best, w = model_info["best"], model_info.get("reference_guidance", 1)          # older runs have none
    scores = f"--ldm {args.ldm} --data IMAGES " * bool(args.ldm) + f"--guidance {w:g} " * (w != 1)
    print(f"done: {trainer.ckpt} and {trainer.out}/samples-{trainer.step:06d}.png"
          + (f"; the best fidelity was that of update {best['step']}: {trainer.out}/best.pt"
             if best["step"] < trainer.step else "")
          + (f"; no update had as much as there was before, {guard.score(guard.had):.3f}"
             if best["fidelity"] < guard.score(guard.had) else "")
          + f"; scores: python fid.py {scores}--ckpt {args.ckpt} {trainer.ckpt}")

if __name__ == "__main__":
    launch(main)
