"""Sample from a trained or distilled model: a grid that compares step counts, or many images to evaluate.

    python sample.py                                            # the last model at 2, 4, 8 and 64 steps, same noise
    python sample.py --steps 1 2 4 8 -n 16 --out few.png        # 16 columns, another file
    python sample.py --ckpt out/train/ckpt.pt out/dsdi/ckpt.pt  # models under each other, before and after (Figure 2)
    python sample.py --steps 8 -n 50000 --save out/png          # PNG files 00000.png, 00001.png …
    python sample.py --steps 8 -n 50000 --save out/8.npz        # or one file: arr_0 (N, H, W, 3) uint8
    torchrun --nproc_per_node=8 sample.py --steps 8 -n 50000 --save out/8.npz    # the same, on eight GPUs
    python sample.py --ldm celebahq256 --ckpt model.ckpt        # one of LDM's models: see ldm.py
    python sample.py --ckpt out/dsdn/ckpt.pt --export out/hf    # a distilled one of them, for diffusers

Image i of a seed starts from the same noise whatever the batch, the device or -n. A --save that was
interrupted goes on where it stopped when the same command is given again.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import save_grid, to_pixels
from ddim import Denoiser, noise, sample
from ldm import autoencoder_of, export, image_size, ldm_flag, load_model, model_hash
from model import autocast, from_first, in_turn, launch, memory_format, pick_device, pick_dtype, progress, rank

# ---- one batch, one grid ------------------------------------------------------------------------------


class Sampler:
    """A checkpoint's model made ready to draw images by their number.

    xhat     Denoiser;  shape (C, H, W) of what it draws: an image, or the latents that LDM's autoencoder decodes
    classes  class indices given to image 0, 1, 2 … in turn, or None for an unconditional model
    decoded_at_a_time  latents, as a 256x256 image needs 0.2 GB for its decoding; None: what suits the device
    """

    def __init__(self, net, state, device, dtype, classes=None, w=1.0, seed=0, decoded_at_a_time=None):
        self.xhat, self.shape = Denoiser.of(net, state), state["shape"]
        self.device, self.dtype, self.classes, self.w, self.seed = device, dtype, classes, w, seed
        self.autoencoder = autoencoder_of(state, device) if "ldm" in state else None
        self.image_shape = [3, image_size(state), image_size(state)] if self.autoencoder else self.shape
        self.decoded_at_a_time = decoded_at_a_time or (8 if device.type == "cuda" else 1)

    def labels(self, indices):
        """The classes (B,) of images number `indices`, or None."""
        return self.classes and torch.tensor([self.classes[i % len(self.classes)] for i in indices])

    def __call__(self, indices, steps, bar=None):
        """Images number `indices` (B, 3, H, W) in about [-1, 1], float32 on the device."""
        return self.decode(self.draw(indices, steps, bar))

    @torch.no_grad()
    def decode(self, x):
        """The images of what was drawn (B, C, H, W), on any device: of pixels those themselves."""
        if self.autoencoder is None:
            return x
        with autocast(self.device, self.dtype):
            return torch.cat([self.autoencoder.decode(z.to(self.device)) for z in x.split(self.decoded_at_a_time)])

    def draw(self, indices, steps, bar=None):
        """What the network draws for the images number `indices` (B, C, H, W): pixels or latents."""
        z = noise(self.seed, indices, self.shape).to(self.device, memory_format=memory_format(self.device))
        y = self.labels(indices)
        with autocast(self.device, self.dtype):
            return sample(self.xhat, z, steps, y if y is None else y.to(self.device), self.w, bar)


def draw_grid(samplers, steps, n, path):
    """One PNG: a row for every step count and, in it, every model; the same n noises in every row.

    samplers  {name: Sampler} of models that draw images of one shape
    """
    several = len(samplers) > 1
    if rank():
        return
    with progress(total=sum(steps) * len(samplers), desc="sampling", unit="step") as bar:
        rows = [sampler(range(n), s, bar).cpu() for s in steps for sampler in samplers.values()]
    labels = [f"{s} {name}" if several else f"{s} step{'s' * (s > 1)}" for s in steps for name in samplers]
    save_grid(torch.cat(rows), path, columns=n, labels=labels)


# ---- many images ----------------------------------------------------------------------------------------


class Folder:
    """PNG files 00000.png, 00001.png … in a folder; whole files only, so that what exists counts as done."""

    def __init__(self, path, n, shape, settings, overwrite):
        self.path, self.n = path, n
        path.mkdir(parents=True, exist_ok=True)
        old = [f for f in path.glob("*.png") if f.stem.isdigit()]
        note = path / "settings.json"
        keep = _keep(note, settings, bool(old), overwrite, path)
        for f in [] if keep else old:
            f.unlink()
        note.write_text(json.dumps(settings, indent=1))       # after the old files: it vouches for all that is there
        done = {int(f.stem) for f in old} if keep else set()
        self.todo = [i for i in range(n) if i not in done]

    def write(self, pool, indices, pixels):
        list(pool.map(self._write_one, indices, pixels))      # in threads: PIL compresses without the interpreter lock

    def _write_one(self, i, pixels):
        tmp = self.path / f"{i:05d}.tmp"
        Image.fromarray(pixels).save(tmp, "PNG")
        os.replace(tmp, self.path / f"{i:05d}.png")

    def finish(self, labels):
        pass


class Npz:
    """One npz: arr_0 (N, H, W, 3) uint8, arr_1 (N,) classes if there are any; until it is whole, raw pixels."""

    def __init__(self, path, n, shape, settings, overwrite):
        self.path, self.n, self.image = path, n, (shape[1], shape[2], shape[0])
        self.raw, self.note = path.with_name(path.name + ".raw"), path.with_name(path.name + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = settings | {"n": n}
        if not _keep(self.note, settings, path.exists() or self.raw.exists(), overwrite, path):
            path.unlink(missing_ok=True)
            self.raw.unlink(missing_ok=True)
        self.note.write_text(json.dumps(settings, indent=1))
        done = n if path.exists() else 0
        if self.raw.exists():                                 # a batch that was cut off in the middle is drawn again
            done = self.raw.stat().st_size // np.prod(self.image)
            os.truncate(self.raw, done * np.prod(self.image))
        self.todo = list(range(done, n))

    def write(self, pool, indices, pixels):
        with open(self.raw, "ab") as f:
            f.write(pixels.tobytes())

    def finish(self, labels):
        if not self.raw.exists():
            return
        arrays = {"arr_0": np.memmap(self.raw, np.uint8, "r", shape=(self.n, *self.image))}
        if labels is not None:
            arrays["arr_1"] = labels.numpy()
        tmp = self.path.with_name(self.path.name + ".tmp")
        with open(tmp, "wb") as f:
            np.savez(f, **arrays)                             # in pieces: 50,000 images need not fit in memory
        os.replace(tmp, self.path)
        self.raw.unlink()


def _keep(note, settings, present, overwrite, path):
    """True if what lies at `path` was made with the same settings and may be continued; False if it must go.

    Exits if other samples are there and may not be overwritten, or images that this script did not make.
    """
    try:
        old = json.loads(note.read_text())
    except (OSError, ValueError):
        old = None
    if present and old is None:
        sys.exit(f"error: {path} holds images that sample.py did not write; choose another --save")
    if present and not overwrite and old != settings:
        other = [k for k in settings if old.get(k) != settings[k]]
        sys.exit(f"error: {path} holds samples made with another {', '.join(other)}; "
                 f"choose another --save, or --overwrite them")
    return present and not overwrite


def save_images(sampler, steps, n, batch, target):
    """Draw the images that `target` still misses, batch by batch, the ranks in turn. Ctrl-C leaves whole images.

    target  a Folder or Npz on rank 0, which writes; None on the others
    """
    todo = from_first(target and target.todo)
    batches, done = [todo[k:k + batch] for k in range(0, len(todo), batch)], n - len(todo)
    try:
        with (ThreadPoolExecutor(os.cpu_count()) as pool,
              progress(total=n, initial=done, desc=f"{steps} steps", unit="img") as bar):
            drawn = in_turn(batches, lambda indices: to_pixels(sampler(indices, steps)))
            for indices, pixels in zip(batches, drawn, strict=False):        # nothing is drawn on other ranks than 0
                target.write(pool, indices, pixels)
                done += len(indices)
                bar.update(len(indices))
    except KeyboardInterrupt:
        if rank() == 0:
            print(f"stopped with {done:,} of {n:,} images in {target.path}; the same command, without --overwrite, "
                  f"goes on")
        sys.exit(130)
    if target:
        target.finish(sampler.labels(range(n)))


# ---- command line ---------------------------------------------------------------------------------------


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", nargs="+", default=["out/train/ckpt.pt"], metavar="FILE",
                   help="checkpoints of train.py or distill.py, or with --ldm files of LDM's: a row for each in every "
                        "step count; with --save just one (default: out/train/ckpt.pt)")
    ldm_flag(p)
    p.add_argument("--size", type=int, help="with --ldm: side of the images in pixels (default: 256)")
    p.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 64], metavar="N",
                   help="network evaluations per image, each a row of the grid (default: 2 4 8 64); with --save one")
    p.add_argument("-n", type=int, metavar="N", help="images: columns of the grid (default: 10), or how many to --save")
    p.add_argument("--out", metavar="PATH",
                   help="the grid: a .png, or a folder for grid.png (default: the last checkpoint's folder)")
    p.add_argument("--save", metavar="PATH",
                   help="instead of a grid, write -n images: PNG files into a folder, or one .npz")
    p.add_argument("--export", metavar="DIR", help="instead of a grid, write one of LDM's models in diffusers' layout")
    p.add_argument("--class", dest="classes", nargs="+", metavar="C",
                   help="classes, by name or number, given to the images in turn (default: all of them)")
    p.add_argument("--guidance", type=float, default=1.0, metavar="W",
                   help="classifier-free guidance: 1 is none; more follows the class more strictly, at twice the cost")
    p.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    p.add_argument("--raw", action="store_true", help="the weights themselves instead of their average (EMA)")
    p.add_argument("--batch", type=int, default=64, help="images at a time with --save (default: 64)")
    p.add_argument("--decode-batch", type=int, metavar="N",
                   help="images of an LDM decoded at a time (default: 8 on a GPU, 1 on a CPU)")
    p.add_argument("--overwrite", action="store_true", help="delete the samples that --save finds there")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    p.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                   help="precision of the network's insides (default: bf16 where the hardware has it)")
    args = p.parse_args(argv)
    if args.save and (args.n is None or len(args.steps) != 1 or len(args.ckpt) != 1):
        p.error("--save needs -n, exactly one step count and one --ckpt: --steps 8 -n 50000 --save DIR")
    if args.save and args.out:
        p.error("--out is for the grid, --save for many images: give one of them")
    if args.export and (args.save or args.out or len(args.ckpt) != 1):
        p.error("--export writes one model itself, --out and --save are for samples: give one of them, and one --ckpt")
    if args.out and Path(args.out).suffix not in ("", ".png"):
        p.error(f"--out {args.out}: the grid is a .png")
    args.n = 10 if args.n is None else args.n
    if min(args.n, args.batch, *args.steps, *(v for v in (args.size, args.decode_batch) if v is not None)) < 1:
        p.error("--steps, -n, --size and both batches must be at least 1")
    if args.seed < 0:
        p.error("--seed must be at least 0")
    return args


def pick_classes(wanted, guidance, state):
    """`--class` as class indices; all of them by default, None for a model without classes. Exits if impossible."""
    count, names = state["config"]["classes"], state["classes"]
    if not count:
        if wanted or guidance != 1:
            sys.exit("error: this model was trained without --classes, so it knows no --class and no --guidance")
        return None
    numbers = {**{str(i): i for i in range(count)}, **{name: i for i, name in enumerate(names)}}
    for c in wanted or []:
        if c not in numbers:
            sys.exit(f"error: no class {c!r}; this model has {', '.join(names) or f'0 … {count - 1}'}")
    return [numbers[c] for c in wanted] if wanted else list(range(count))


def load_sampler(path, args, device, dtype):
    """(Sampler, state) of one checkpoint, with the classes, guidance and seed of the flags. Exits if it can't be."""
    net, state = load_model(path, device, not args.raw, args.ldm, args.size)
    classes = pick_classes(args.classes, args.guidance, state)
    sampler = Sampler(net, state, device, dtype, classes, args.guidance, args.seed, args.decode_batch)
    try:
        sampler.xhat.schedule.times(max(args.steps))
    except ValueError as e:
        sys.exit(f"error: {path}: {e}")
    return sampler, state


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.export:
        if rank() == 0:
            net, state = load_model(args.ckpt[0], "cpu", not args.raw, args.ldm, args.size)
            export(net, state, args.export)
            print(f"wrote {args.export}{told(state)}")
        return
    samplers = {}
    for ckpt in args.ckpt:
        name = Path(ckpt).parent.name or Path(ckpt).stem
        sampler, state = load_sampler(ckpt, args, device, dtype)
        samplers[name if name not in samplers else str(ckpt)] = sampler
    if len({tuple(s.image_shape) for s in samplers.values()}) > 1:
        sys.exit("error: these models draw images of different sizes: they need a grid each")
    path = Path(args.save or args.out or Path(args.ckpt[-1]).parent)
    if not args.save and path.suffix != ".png":
        path = path / "grid.png"
    try:
        if args.save:
            settings = dict(ckpt=model_hash(args.ckpt[0]), steps=args.steps[0], seed=args.seed, classes=sampler.classes,
                            guidance=args.guidance, weights="raw" if args.raw else "ema", dtype=dtype)
            settings |= {"size": image_size(state)} if "ldm" in state else {}      # the others have only one
            kind = Npz if path.suffix == ".npz" else Folder
            target = None if rank() else kind(path, args.n, sampler.image_shape, settings, args.overwrite)
            save_images(sampler, args.steps[0], args.n, args.batch, target)
        else:
            draw_grid(samplers, args.steps, args.n, path)
    except OSError as e:
        sys.exit(f"error: can't write {path} ({e.strerror or e})")
    print(f"wrote {path}{told(state) if len(samplers) == 1 else ''}")


def told(state):
    """What was done to a distilled model, as the end of a sentence; nothing for one that was only trained."""
    runs = [h["how"] + (f", {h['updates']:,} updates" if "updates" in h else "")
            + (f" from {h['steps']} steps" if "steps" in h else "")
            for h in state.get("history", [])]
    return f" (the model: {'; then '.join(runs)})" if runs else ""


if __name__ == "__main__":
    launch(main)
