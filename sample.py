"""Sample from a trained or distilled model: a grid that compares step counts, or many images to evaluate.

    python sample.py                                            # out/train/ckpt.pt at 2, 4, 8, 64 steps, same noise
    python sample.py --steps 1 2 4 8 -n 16 --out few.png        # 16 columns, another file
    python sample.py --ckpt out/train/ckpt.pt out/dsdi/ckpt.pt  # models under each other, before and after (Figure 2)
    python sample.py --steps 8 -n 50000 --save out/png          # PNG files 00000.png, 00001.png …
    python sample.py --steps 8 -n 50000 --save out/8.npz        # or one file: arr_0 (N, H, W, 3) uint8
    torchrun --nproc_per_node=8 sample.py --steps 8 -n 50000 --save out/8.npz    # the same, on eight GPUs
    python sample.py --ldm celebahq256 --ckpt model.ckpt        # one of LDM's models: see ldm.py
    python sample.py --export out/hf                            # the model for diffusers: see export.py

Image i of a seed starts from the same noise whatever the batch, the device or -n. A --save that was
interrupted goes on where it stopped when the same command is given again.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoint import check_writable, claimed, naming, whole_file
from data import first_not_finite, mapped, save_grid, to_pixels
from ddim import Denoiser, ddim_sample, start_noise
from flags import at_least, checkpoint, device_flags, finite, seed
from ldm import autoencoder_of, image_size, ldm_flag, load_any_model, model_hash
from runtime import autocast, broadcast, launch, map_over_ranks, memory_format, pick_device, pick_dtype, progress, rank

# ---- one batch, one grid --------------------------------------------------------------------------------
def spread_classes(count, n):
    """At most n of `count` classes, spread over all; None for a model without classes."""
    some = min(count, n)
    return [i * count // some for i in range(some)] or None

class Sampler:
    """A checkpoint's model made ready to draw images by their number.

    xhat     Denoiser;  shape (C, H, W) of what it draws: an image, or the latents that LDM's autoencoder decodes
    classes  class indices given to image 0, 1, 2 … in turn, or None for an unconditional model
    w        the guidance of its evaluations: 1 where it is built into the model;  guidance  that of its images"""

    def __init__(self, net, state, device="cpu", dtype="fp32", classes=None, w=1.0, seed=0):
        self.xhat, self.shape, self.names = Denoiser.of(net, state), state["shape"], state.get("classes")
        self.device, self.dtype, self.classes, self.w, self.seed = torch.device(device), dtype, classes, w, seed
        self.state, self.guidance = state, w * state.get("guidance", 1)      # what is built in counts: one of them is 1
        self.image_shape = [3, image_size(state), image_size(state)]     # greyscale is saved as RGB

    @cached_property
    def autoencoder(self):
        """What decodes an LDM's latents, loaded by the first who needs it: few-step looks do not. None for pixels."""
        return autoencoder_of(self.state, self.device) if "ldm" in self.state else None

    def labels(self, indices):
        """The classes (B,) of images number `indices`, on the device, or None."""
        return self.classes and torch.tensor([self.classes[i % len(self.classes)] for i in indices], device=self.device)

    def class_names(self, indices):
        """The class of each image number `indices`, in words; empty without classes."""
        if not self.classes:
            return [""] * len(indices)
        return [self.names[y] if self.names else str(y) for y in self.labels(indices).tolist()]

    def __call__(self, indices, steps):
        """Images number `indices` (B, 3, H, W) in about [-1, 1], float32 on the device."""
        return self.decode(self.draw(indices, steps))

    def draw(self, indices, steps):
        """What the network draws for the images number `indices` (B, C, H, W): pixels or latents.

        Exits if a value is not finite, which would become a black picture."""
        z = start_noise(self.seed, indices, self.shape).to(self.device, memory_format=memory_format(self.device))
        with autocast(self.device, self.dtype):
            x = ddim_sample(self.xhat, z, steps, self.labels(indices), self.w)
        bad = first_not_finite(x)
        if bad is not None:
            sys.exit(f"error: image {indices[bad]} at {steps} steps is not finite (NaN): the model is "
                     f"broken{', or needs --dtype fp32' * (self.dtype == 'bf16')}")
        return x

    @torch.no_grad()
    def decode(self, x):
        """The images (B, 3, H, W) of what was drawn (B, C, H, W), on any device: pixels are returned as they are."""
        if self.autoencoder is None:
            return x.expand(-1, 3, -1, -1)                    # of greyscale: three times the same
        batch = 8 if self.device.type == "cuda" else 1        # a 256x256 image needs 0.2 GB for it
        with autocast(self.device, self.dtype):
            return torch.cat([self.autoencoder.decode(z.to(self.device)) for z in x.split(batch)])

def draw_grid(samplers, steps, n, path, batch=64):
    """One PNG of every model at every step count, always from the same n noises. Rank 0 draws it.

    One or two models: a row for each step count and model, so that before and after lie under each other. More: a row
    for each step count, the models side by side in it.

    samplers  {name: Sampler} of models that draw images of one shape"""
    if rank():
        return
    rows, labels, aside = [], [], len(samplers) > 2
    with progress(total=sum(steps) * len(samplers), desc="sampling", unit="step") as bar:
        for s, (name, sampler) in product(steps, samplers.items()):
            rows += [sampler(range(n)[k:k + batch], s).cpu() for k in range(0, n, batch)]
            labels.append(f"{s} {name}" if len(samplers) == 2 else f"{s} step{'s' * (s > 1)}")
            bar.update(s)
    heads = [text for name, sampler in samplers.items() for text in ([name] + [""] * (n - 1) if aside else
                                                                     sampler.class_names(range(n)))]
    count = len(samplers) if aside else 1
    save_grid(torch.cat(rows), path, count * n, labels[::count], heads[:count * n])

# ---- many images ----------------------------------------------------------------------------------------
class Samples:
    """n images as files: 00000.png, 00001.png … in a folder, or one npz: arr_0 (N, H, W, 3) uint8, arr_1 (N,) classes.

    A PNG file is whole or not there. An npz is made when all its pixels are there, in a raw file. So what exists counts
    as done. A note of the settings lies with it, so that samples of two kinds never mix: exits if there are others that
    may not be overwritten, or images that this script did not make. Those that may are deleted when the first new
    ones are drawn: a model that can't draw, for want of memory say, loses nothing. For rank 0 alone."""

    def __init__(self, path, n, sampler, settings, overwrite):
        self.path, self.n, self.sampler = path, n, sampler
        self.raw = Path(f"{path}.raw") if path.suffix == ".npz" else None
        self.note = Path(f"{path}.json") if self.raw else path / "settings.json"
        self.settings = settings | ({"n": n} if self.raw else {})       # a folder may grow later, an npz can't
        found = list(self._pngs().values())
        if self.raw:                                          # the lock makes an empty one
            found = [f for f in (path, self.raw) if f.exists() and f.stat().st_size]
        noted = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            noted = dict(json.loads(self.note.read_text()))
        others = [k for k, value in self.settings.items() if noted.get(k) != value]
        if (found or self.note.exists()) and "ckpt" not in noted:
            sys.exit(f"error: {path} holds images, or {self.note.name}, that sample.py did not write; "
                     f"choose another --save")
        if found and others and not overwrite:
            sys.exit(f"error: {path} holds samples made with another {', '.join(others)}; "
                     f"choose another --save, or --overwrite them")
        if not self.raw and max(self._pngs(), default=0) >= n and not overwrite:
            sys.exit(f"error: {path} holds {len(found)} samples, more than -n {n}; --overwrite them, or ask for more")
        self.old, self.begun = found if overwrite else [], False

    def _begin(self):
        """The old samples go, and then the note is written, which vouches for all that is there."""
        for file in self.old:
            if file == self.raw:
                os.truncate(file, 0)                          # the lock is on this very file
            else:
                file.unlink()
        with whole_file(self.note) as tmp:
            tmp.write_text(json.dumps(self.settings, indent=1))
        self.old, self.begun = [], True

    def _pngs(self):
        """{number: file} of the images that are there, under the names that this script gives."""
        return {int(f.stem): f for f in self.path.glob("*.png") if re.fullmatch("[0-9]{5}|[1-9][0-9]{5,}", f.stem)}

    def missing(self):
        """The numbers of the images to draw, in order."""
        if self.old:
            return list(range(self.n))
        if not self.raw:
            return sorted(set(range(self.n)) - self._pngs().keys())
        size = self.raw.stat().st_size if self.raw.exists() else 0
        done = min(size // np.prod(self.sampler.image_shape), self.n - 1)  # writing the last one makes the npz
        return list(range(self.n if self.path.exists() else done, self.n))

    def write(self, indices, pixels):
        """Keep pixels (B, H, W, 3) uint8 as the images number `indices`, the next of those missing."""
        if not self.begun:
            self._begin()
        if not self.raw:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL compresses without the interpreter lock
                list(pool.map(self._write_png, indices, pixels))
            return
        with naming(self.raw), open(self.raw, "ab") as f:
            f.truncate(indices[0] * pixels[0].nbytes)         # half an image, where a run was killed
            f.write(pixels.tobytes())
        if indices[-1] == self.n - 1:
            arrays = {"arr_0": mapped(self.raw, np.uint8, (self.n, *pixels.shape[1:]))}
            if self.sampler.classes:
                arrays["arr_1"] = self.sampler.labels(range(self.n)).cpu().numpy()
            with whole_file(self.path) as tmp, open(tmp, "wb") as f:
                np.savez(f, **arrays)                         # in pieces: 50,000 images need not fit in memory
            self.raw.unlink()

    def _write_png(self, i, image):
        with whole_file(self.path / f"{i:05d}.png") as tmp:
            Image.fromarray(image).save(tmp, "PNG")

@contextlib.contextmanager
def saving(path):
    """Hold the lock of what --save names: of a folder, or of the raw file that becomes an npz."""
    raw = Path(f"{path}.raw") if path.suffix == ".npz" else None
    with claimed(raw or path, folder=not raw):
        try:
            yield
        finally:
            if raw and raw.exists() and not raw.stat().st_size:      # made by the lock alone
                raw.unlink()

def save_images(sampler, steps, n, batch, samples):
    """Draw those of n images that are missing, batch by batch, the ranks in turn. Ctrl-C leaves whole images.

    samples  Samples on rank 0, which writes; None on the others"""
    missing = broadcast(samples and samples.missing())
    batches = [missing[k:k + batch] for k in range(0, len(missing), batch)]
    drawn = map_over_ranks(batches, lambda indices: to_pixels(sampler(indices, steps)))
    bar = progress(total=n, initial=n - len(missing), desc=f"{steps} steps", unit="img")
    try:
        with bar:
            for indices, pixels in zip(batches, drawn, strict=False):        # nothing is drawn on other ranks than 0
                samples.write(indices, pixels)
                bar.update(len(indices))
    except KeyboardInterrupt:
        spared = ", without --overwrite," if samples and samples.begun else ""
        print(f"stopped with {bar.n:,} of {n:,} images; the same command{spared} goes on")
        sys.exit(130)

# ---- command line ---------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("images")
    g.add_argument("--ckpt", type=checkpoint, nargs="+", default=["out/train/ckpt.pt"], metavar="FILE",
                   help="models, or folders of runs, to compare (default: out/train/ckpt.pt)")
    g.add_argument("--steps", type=at_least(1), nargs="+", default=[2, 4, 8, 64], metavar="N",
                   help="network evaluations per image, each a row of the grid (default: 2 4 8 64)")
    g.add_argument("-n", type=at_least(1), metavar="N",
                   help="noises in the grid (default: 10, or 4 for more than two models), or images to --save")
    g.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    g.add_argument("--class", dest="classes", nargs="+", metavar="C",
                   help="classes, by name or number, given to the images in turn (default: all of them)")
    g.add_argument("--guidance", type=finite, default=1.0, metavar="W",
                   help="classifier-free guidance: 1 is none; more follows the class more strictly, at twice the cost")
    g = p.add_argument_group("where to").add_mutually_exclusive_group()
    g.add_argument("--out", metavar="PATH",
                   help="the grid: a .png, or a folder for grid.png (default: beside the last --ckpt)")
    g.add_argument("--save", metavar="PATH", help="no grid but -n images: PNG files into a folder, or one .npz")
    g.add_argument("--export", metavar="DIR", help="no images: write the model in diffusers' layout")
    g = p.add_argument_group("LDM's models")
    ldm_flag(g)
    g.add_argument("--size", type=at_least(1), help="with --ldm: side of the images in pixels (default: 256)")
    g = p.add_argument_group("rarely needed")
    g.add_argument("--raw", action="store_true", help="the weights themselves instead of their average (EMA)")
    g.add_argument("--batch", type=at_least(1), default=64, help="images at a time (default: 64)")
    g.add_argument("--overwrite", action="store_true", help="delete the samples that --save finds there")
    device_flags(g)
    args = p.parse_args(argv)
    if args.save and (args.n is None or len(args.steps) != 1 or len(args.ckpt) != 1):
        p.error("--save needs -n, exactly one step count and one --ckpt: --steps 8 -n 50000 --save DIR")
    if args.export and len(args.ckpt) != 1:
        p.error("--export writes one model: give one --ckpt")
    if args.export and (args.classes or args.guidance != 1):
        p.error("--export writes the whole model: it takes no --class and no --guidance")
    if args.out and Path(args.out).suffix not in ("", ".png") and not Path(args.out).is_dir():
        p.error(f"--out {args.out}: the grid is a .png")
    return args

def pick_classes(wanted, guidance, state):
    """`--class` as class indices; all of them by default, None for a model without classes. Exits if impossible."""
    count, names = state["config"]["classes"], state["classes"]
    if not count and (wanted or guidance != 1):
        sys.exit("error: this model was trained without --classes, so it knows no --class and no --guidance")
    if guidance != 1 and state.get("guidance", 1) not in (1, guidance):
        sys.exit(f"error: guidance {state['guidance']:g} is built into this model, so it takes no other --guidance")
    numbers = {str(i): i for i in range(count)} | {name: i for i, name in enumerate(names)}
    for c in wanted or []:
        if c not in numbers:
            sys.exit(f"error: no class {c!r}; this model has {', '.join(names) or f'0 … {count - 1}'}")
    return [numbers[c] for c in wanted] if wanted else list(range(count)) or None

def model_name(path):
    """What pictures and tables call a model: by the folder of its run, or of its files."""
    path = Path(path)
    return path.name if path.is_dir() else path.parent.name or path.stem

def load_sampler(path, args, device, dtype):
    """(Sampler, state) of one checkpoint, with the classes, guidance and seed of the flags. Exits if it can't be."""
    net, state = load_any_model(path, device, not args.raw, args.ldm, args.size)
    classes = pick_classes(args.classes, args.guidance, state)
    w = 1.0 if args.guidance == state.get("guidance") else args.guidance       # what is built in needs no w
    sampler = Sampler(net, state, device, dtype, classes, w, args.seed)
    try:
        sampler.xhat.times(max(args.steps))
    except ValueError as e:
        sys.exit(f"error: {path}: {e}")
    return sampler, state

def main(argv=None):
    args = parse_args(argv)
    device = pick_device("cpu" if args.export else args.device)
    dtype = pick_dtype(args.dtype, device)
    samplers = {}
    for ckpt in args.ckpt:
        name = model_name(ckpt)
        sampler, state = load_sampler(ckpt, args, device, dtype)
        samplers[name if name not in samplers else str(ckpt)] = sampler
    if len({tuple(s.image_shape) for s in samplers.values()}) > 1:
        sys.exit("error: these models draw images of different sizes: they need a grid each")
    path = Path(args.export or args.save or args.out or Path(args.ckpt[-1]).parent)
    if args.export:
        if rank() == 0:
            from export import export  # not at the top: few need it
            export(sampler.xhat.net, state, path)
    elif args.save:
        settings = dict(ckpt=model_hash(state), steps=args.steps[0], seed=args.seed, classes=sampler.classes,
                        guidance=sampler.guidance, weights="raw" if args.raw else "ema", dtype=dtype)
        settings |= {"size": image_size(state)} if "ldm" in state else {}          # the others have only one
        with saving(path) if rank() == 0 else contextlib.nullcontext():
            samples = None if rank() else Samples(path, args.n, sampler, settings, args.overwrite)
            save_images(sampler, args.steps[0], args.n, args.batch, samples)
    else:
        path = path if path.suffix == ".png" else path / grid_name(args)
        check_writable(path.parent)
        draw_grid(samplers, args.steps, args.n or (10 if len(samplers) < 3 else 4), path, args.batch)
    print(f"wrote {path}{describe_history(state) if len(samplers) == 1 else ''}")

def grid_name(args):
    """grid.png, or with what was asked for in its name: grid-cat-dog-w3.png."""
    asked = ["grid", *(args.classes or []), *([f"w{args.guidance:g}"] if args.guidance != 1 else [])]
    return re.sub(r"[^\w.-]", "_", "-".join(asked)) + ".png"

def describe_history(state):
    """What was done to a distilled model, as the end of a sentence; nothing for one that was only trained."""
    runs = [h["how"] + (f", {h['updates']:,} updates" if h.get("updates") else "")
            + (f" from {h['steps']} steps" if "steps" in h else "") for h in state.get("history", [])]
    return f" (the model: {'; then '.join(runs)})" if runs else ""

if __name__ == "__main__":
    launch(main)
