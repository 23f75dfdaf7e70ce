"""Train a diffusion model with self-distillation (section 4.2): the model learns from data, and from itself.

    python train.py --distill 0.15                                          # built-in pictures: 3 to 26 min on a CPU
    python train.py --distill 0.15 --data celeba.zip --preset celeba64      # one GPU
    python train.py --distill 0.15 --data DIR --preset church64 --size 32   # any flag beats the preset
    python train.py --resume --out out/train                                # go on where a run stopped
    torchrun --nproc_per_node=8 train.py --distill 0.15 --data celeba.zip --preset celeba64    # eight GPUs

A run leaves OUT/ckpt.pt (weights, their average, optimiser, random state, settings), OUT/log.jsonl (a
line every --log-every updates), OUT/curves.png, and OUT/samples-NNNNNN.png (from the averaged weights, always
with the same noise, to be flipped through). Ctrl-C saves and ends; --resume goes on bit for bit.
"""

import argparse
import sys
from dataclasses import replace

import torch

from curves import draw_curves
from data import load_data, save_grid
from ddim import ddim_sample, ddim_target, start_noise, to_x
from flags import (
    at_least,
    finite,
    fraction,
    optimiser_flags,
    out_flags,
    parse_with_saved,
    positive,
    run_flags,
    score_flags,
)
from model import CONFIGS, UNet, UNetConfig, param_count
from rundir import check_out, prepare_out
from runtime import describe_device, launch, memory_format, pick_device, pick_dtype, rank
from shortcut import jump_rows, train_shortcut
from trainer import Trainer, batches, data_of_run

# A preset only changes the defaults of flags. Updates, learning rate and size of the three LSUN and CelebA
# runs are the paper's (section 5.2); it is silent about batch, model, warm-up and EMA: those are ours. The toy's
# settings were found by a search (docs/base.md).
PAPER = dict(size=64, model="unet64", batch=128, warmup=1000, ema=0.9999,
             log_every=50, sample_every=5000, save_every=1000, sample_steps=128)
PRESETS = {
    "toy": dict(size=16, model="toy", updates=2400, batch=32, lr=2e-3, lr_share=0.005, betas=[0.9, 0.99], warmup=50,
                ema=0.995, times="middle", log_every=20, sample_every=600, save_every=600, sample_steps=32),
    "celeba64": PAPER | dict(updates=65_000, lr=1e-4, crop=140 / 178),   # the usual 140 of 178 pixels
    "bedroom64": PAPER | dict(updates=50_000, lr=4e-4),
    "church64": PAPER | dict(updates=40_000, lr=4e-4),
}

STEP = 1 / 128            # from t to t' in the self-distillation term: the paper samples these models with 128 steps

# ---- Equation 1 -------------------------------------------------------------------------------------
def training_loss(xhat, x, t, eps, y, b, step=STEP):
    """Equation 1: the diffusion loss plus self-distillation, from one evaluation with gradient.

    xhat  Denoiser of a v-prediction network;  x (B, C, H, W) data;  y (B,) labels or None
    t     (B,) times in (0, 1];  eps (B, C, H, W) noise ε ~ N(0, I);  b in [0, 1] is the paper's β, and α = 1 − b
    step  the length of the two steps t − t' = t' − t'', shorter where t is less
    returns  loss (scalar), and its terms by name

        L = α ‖v̂_t − v_t‖² + β ‖x' − x''‖²,   v_t = α_t ε − σ_t x              (Eq. 1)

    ‖·‖² is the mean over pixels. v̂_t and x' come from the same evaluation, and b = 0 never makes the second."""
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

def train(trainer, stream, b):
    """Training DSD (section 4.2): Equation 1 on batch after batch of a stream of (x, y), this rank's rows of each."""
    xhat, classes = trainer.denoiser(), trainer.net.config.classes
    for _ in trainer.steps():                                 # logs, saves, resumes, stops
        x, y = next(stream)
        t, eps = trainer.times(), trainer.randn(*x.shape[1:])
        y = trainer.drop_labels(y) if classes else None
        for part in trainer.parts(x, t, eps, y):              # the whole batch, or --accumulate parts of it
            with trainer.autocast():
                loss, terms = training_loss(xhat, *part, b)   # Equation 1
            trainer.backward(loss, terms)
        trainer.update()

def sample_picture(trainer, columns=10):
    """Sample grid from the averaged weights, always with the same noise; with ten classes, each has its column."""
    if rank():
        return
    device, classes = trainer.device, trainer.net.config.classes
    count = 20 if device.type == "cpu" and trainer.args.size > 32 else 80      # big ones take a CPU minutes
    y = torch.arange(count, device=device) % classes if classes else None
    z = start_noise(trainer.args.seed, range(count), trainer.model_info["shape"])
    with trainer.autocast():
        x = ddim_sample(trainer.denoiser(trainer.ema), z.to(device, memory_format=memory_format(device)),
                        trainer.args.sample_steps, y)
    save_grid(x, trainer.out / f"samples-{trainer.step:06d}.png", columns)

def told_passes(images, args):
    """A line for people, if a run shows each of its images so often that it will learn them by heart; else nothing."""
    passes = args.updates * args.batch / images
    return "" if passes < 200 else (
        f"each image will be seen {passes:,.0f} times, and so many views of so few are learned by heart: "
        f"{max(1, 100 * images // args.batch):,} updates would make it 100\n")

# ---- command line ---------------------------------------------------------------------------------------
def parse_args(argv=None):
    """Flags beat the settings of a resumed run, which beat the preset, which beats the defaults."""
    p = argparse.ArgumentParser(usage="%(prog)s [flags]", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("the method")
    g.add_argument("--distill", type=float, nargs="?", const=0.15, default=0.0, metavar="b",
                   help="weight of the self-distillation term in Equation 1; the paper's is 0.15; 0: plain training")
    g.add_argument("--shortcut", action=argparse.BooleanOptionalAction, default=False,
                   help="beyond the paper: tell the network how far it jumps; --distill b: the share of rows that do")
    g.add_argument("--target-ema", type=fraction, default=0.95, metavar="D",
                   help="with --shortcut: decay of the running average that makes the targets (default: 0.95)")
    g.add_argument("--preset", choices=PRESETS, default="toy", help="defaults for all other flags (default: toy)")
    optimiser_flags(g)
    out_flags(g, "out/train")
    g = p.add_argument_group("the data")
    g.add_argument("--data", metavar="PATH",
                   help="folder or zip of images, or an LSUN LMDB folder (default: the built-in pictures)")
    g.add_argument("--size", type=at_least(1), help="side of the training images in pixels (default: %(default)s)")
    g.add_argument("--crop", type=positive, help="centre crop first: in pixels; up to 1: a share of the shorter side")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half (default: on)")
    g.add_argument("--guidance", type=finite, default=1.0, metavar="W",
                   help="with --shortcut and --classes: the guidance that is built into jumps (default: 1, none)")
    g.add_argument("--channels-in", type=int, choices=[1, 3], help="1: greyscale, 3: RGB (default: as the images are)")
    g.add_argument("--classes", action=argparse.BooleanOptionalAction, default=False,
                   help="condition on the labels (sub-folders), one in ten dropped, for guidance")
    g = p.add_argument_group("the model (each of these beats what --model says)")
    g.add_argument("--model", choices=CONFIGS, help="size of the UNet, by name (default: %(default)s)")
    g.add_argument("--channels", type=int, help="width at full resolution")
    g.add_argument("--mult", type=int, nargs="+", help="width of each level, in units of --channels")
    g.add_argument("--blocks", type=int, help="residual blocks per level")
    g.add_argument("--attention", type=int, nargs="*", help="attend where the image is this many times smaller")
    g.add_argument("--head-channels", type=int, help="channels per attention head")
    g.add_argument("--dropout", type=float, help="in the residual blocks; x' and x'' then see different masks")
    score_flags(p.add_argument_group("scores on the way"))
    g = p.add_argument_group("rarely changed")
    g.add_argument("--times", choices=["uniform", "middle"], default="uniform",
                   help="how t is drawn: uniformly, as in the paper, or mostly from the middle, where it is decided "
                        "what a picture shows (logit-normal, Esser et al. 2024) (default: %(default)s)")
    g.add_argument("--sample-steps", type=at_least(1), metavar="S",
                   help="DDIM steps of the pictures (default: %(default)s)")
    run_flags(g)
    def defaults(given):                                      # jumps want a falling rate, at every step count
        return dict(out="out/train") | PRESETS[given.preset] | (dict(lr_share=0.01) if given.shortcut else {})
    args = parse_with_saved(p, argv, defaults, fixed=lambda args: {         # jumps begin halfway, and need an average
        "preset", "shortcut", "guidance", *(("updates", "ema", "target_ema") if args.shortcut else ())})
    if not 0 <= args.distill <= 1:
        p.error("--distill must be between 0 and 1: it is b in Equation 1")
    if args.shortcut and not 0 < args.distill < 0.5:
        p.error("--shortcut needs a share of the rows that jump, below a half: --distill 0.25")
    if args.shortcut and not jump_rows(args.batch, 2 * args.distill).any():
        p.error(f"--distill {args.distill:g} of --batch {args.batch}: no row would learn to jump")
    if args.target_ema != p.get_default("target_ema") and not args.shortcut:
        p.error("--target-ema is for --shortcut: Equation 1's target is of the model itself")
    if args.guidance != 1 and not (args.shortcut and args.classes):
        p.error("--guidance is for --shortcut with --classes; other models are guided by sample.py")
    if args.preset != "toy" and args.data is None:
        p.error(f"--preset {args.preset} trains on real images: give their folder, zip or LMDB as --data")
    return args

def make_config(args):
    """The UNet's config from --model and the flags that beat it. Exits if it can't be built or does not fit --size."""
    flags = {k: getattr(args, k) for k in ("channels", "mult", "blocks", "attention", "head_channels", "dropout")}
    try:
        config = UNetConfig(**CONFIGS[args.model] | {k: v for k, v in flags.items() if v is not None})
    except ValueError as e:
        sys.exit(f"error: {e}")
    factor = 2 ** (len(config.mult) - 1)
    if args.size % factor:
        sys.exit(f"error: --size {args.size} must be divisible by {factor}, as this model halves the image")
    return config

def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, device)
    state = check_out(args, *[
        f"distil it further: python distill.py --schedule shortcut --ckpt {args.out}/ckpt.pt"] * args.shortcut)
    config = make_config(args)
    images = load_data(args.data, args.size, args.crop, args.cache)
    if args.classes and not images.classes:
        sys.exit(f"error: --classes needs labels, and {args.data} has none (of sub-folders, or a dataset.json)")
    if args.classes and state:
        images.number_as(state["classes"])
    classes = list(images.classes) if args.classes else []
    images.channels = args.channels_in or (state["shape"][0] if state else 1 if images.grey() else 3)
    if images.channels == 1 and not args.channels_in:
        print("the images have no colour: a model of one channel (--channels-in 3 makes one of three)")
    hooks = [(args.sample_every, sample_picture), (args.updates, draw_curves)]
    if args.fid_every:
        from hooks import scorer  # not at the top: it loads the network of the scores
        hooks.append((args.fid_every, scorer(args, images, device, [args.sample_steps])))
    torch.manual_seed(args.seed)
    model_info = dict(schedule="cosine", predicts="v", shape=[images.channels, args.size, args.size], classes=classes,
                      guidance=args.guidance, data=data_of_run(images, state))
    net = UNet(replace(config, classes=len(classes), step_length=args.shortcut, in_channels=images.channels))
    trainer = Trainer(args, net, device, model_info, hooks)
    if state:
        trainer.load(state)
    prepare_out(args, state)
    print(f"{len(images):,} images of {args.size}x{args.size}, {param_count(trainer.net) / 1e6:.2f} M parameters, "
          f"{args.updates:,} updates of {args.batch} images on {describe_device(device)} in {args.dtype}, "
          f"distill {args.distill}")
    print(told_passes(len(images), args), end="")
    stream = batches(images, args, trainer.step, device)
    if args.shortcut:
        train_shortcut(trainer, stream, args.distill, args.guidance)
    else:
        train(trainer, stream, args.distill)
    picture = trainer.out / f"samples-{trainer.step:06d}.png"
    print(f"done: {trainer.ckpt}{f' and {picture}' if picture.exists() else ''}; few-step samples side by side: "
          f"python sample.py --ckpt {trainer.ckpt}")

if __name__ == "__main__":
    launch(main)
