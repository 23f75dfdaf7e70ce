"""The model that a run of distill.py works on: opened, checked against the flags, and what is remembered of it.

    net, source, model_info, images = opened(args, state, device)
    remember_before(trainer, source, state)
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from checkpoint import claimed, data_for, trained_on
from data import load_data
from ddim import Denoiser
from hooks import draw_shown, shown_guidance
from ldm import image_channels, image_size, load_any_model, model_hash
from plans import METHODS
from runtime import broadcast, rank
from sample import Sampler
from shortcut import OwnSamples
from trainer import data_of_run, final_rate

def reads_data(args):
    """Whether the method of a run learns from a data set: pd does, and shortcut where it is given one."""
    method = METHODS[args.schedule]
    return method.data or (method.shortcut and bool(args.data))

# What a distilled model has of its source:
FROM_SOURCE = "schedule", "predicts", "shape", "classes", "guidance", "ldm", "autoencoder"

def history(args, source, resumed):
    """What was done to a model, one dict for each run: training, distillation, distillation of that …

    resumed  whether `source` is of the run itself, whose settings may have changed"""
    was = source.get("args", {})
    trained = dict(how="train --shortcut" if was.get("shortcut") else "train", updates=source.get("step"),
                   distill=was.get("distill"), data=was.get("data"))
    *past, now = source["history"] if resumed else [*source.get("history", [trained]), dict(
        how=args.schedule, ckpt=str(args.ckpt), hash=model_hash(source))]
    keep = ["updates", "batch", "steps", "lr", "ema", "target_ema", "seed"]
    keep += ["share", "pool"] if METHODS[args.schedule].shortcut else ["target", "weight"]
    keep += ["guidance"] * bool(source["config"]["classes"])
    return [*past, now | {k: getattr(args, k) for k in keep} | dict(lr_end=final_rate(args))]

def check_source(args, net, source, images):
    """Exit if the model does not go with the flags: its defaults, its guidance, its noise schedule, its classes."""
    if "ldm" in source and not args.ldm:
        sys.exit(f"error: {args.ckpt} is LDM's {source['ldm']}: give --ldm {source['ldm']}, which has other defaults")
    if net.config.step_length and not METHODS[args.schedule].shortcut:
        sys.exit(f"error: {args.ckpt} is told the length of its steps: only --schedule shortcut distils it further")
    built_in = source.get("guidance", 1)
    if built_in not in (1, args.guidance[0]):
        sys.exit(f"error: guidance {built_in:g} is built into {args.ckpt}: distil it further with --guidance "
                 f"{built_in:g} {built_in:g}")
    try:
        Denoiser.of(net, source).times(args.steps)
    except ValueError as e:
        sys.exit(f"error: {e}")
    if reads_data(args) and net.config.classes:
        if source["classes"]:
            images.number_as(source["classes"])
        elif len(images.classes) != net.config.classes:       # LDM's have numbers only, in the order of their names
            sys.exit(f"error: the model has {net.config.classes} classes, but the data has "
                     f"{len(images.classes)} (sub-folders name the classes)")

def own_samples(trainer):
    """The data of a run of shortcut without --data: samples of the undistilled model, in --steps steps."""
    a, anchor = trainer.args, trainer.second_net("anchor")
    sampler = Sampler(anchor, trainer.model_info, trainer.device, a.dtype, range(anchor.config.classes) or None,
                      seed=a.seed)
    sampler.xhat.lengths = False                              # the ordinary denoiser
    what = [trainer.model_info["history"][-1]["hash"], a.seed, a.dtype]
    with nullcontext() if rank() else claimed(a.out):
        pool = OwnSamples(a.out, sampler, a.pool, a.steps, a.batch, what)
    trainer.drawn = pool.path
    return pool

def opened(args, state, device):
    """(net, source, model_info, images) of a run. Packs the images if need be; exits if model and flags do not fit.

    state   that of the run's own checkpoint if it is resumed, or None;  source  that of the file that net was read from
    images  the data set that the method or --fid-every reads, or None
    model_info  what the run's checkpoints will say of the model"""
    path = Path(args.out) / "ckpt.pt" if state else args.ckpt
    net, source = load_any_model(path, device, name=args.ldm, size=args.size)
    past = history(args, source, resumed=bool(state))         # now: the file may be replaced meanwhile
    method, origin = METHODS[args.schedule], trained_on(source)
    data, images = args.data or origin["data"], None
    args.flip = origin["flip"] if args.flip is None else args.flip
    if reads_data(args) or args.ldm:
        origin |= dict(data=data, flip=args.flip, known=bool(data) or origin["known"])
    if reads_data(args) or args.fid_every:
        images = load_data(data_for(path, source, args.data), image_size(source), origin["crop"], args.cache)
        images.channels = image_channels(source)
    if method.shortcut and not net.config.step_length:
        net.add_step_length()
    check_source(args, net, source, images)
    model_info = {k: source[k] for k in FROM_SOURCE if k in source} | dict(history=past, trained_on=origin)
    if args.ldm:
        model_info["schedule"] = "ldm-distilled"
    if reads_data(args):
        model_info["data"] = data_of_run(images, state)
    return net, source, model_info, images

def remember_before(trainer, source, state):
    """Have the checkpoints of a run hold what the undistilled model draws: the reference of all its looks."""
    model_info = trainer.model_info
    if state:
        kept = "before", "reference", "reference_guidance", "best"        # best: after a look
        model_info |= {k: state[k] for k in kept if k in state}
    else:
        model_info["before"] = before = broadcast(draw_shown(trainer))
        w, _ = shown_guidance(trainer)
        first = "reference" in source and source.get("reference_guidance") == w     # of a chain, what its first drew
        model_info |= dict(reference=source["reference"] if first else before[-1], reference_guidance=w)
