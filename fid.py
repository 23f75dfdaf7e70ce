"""FID, Inception Score, KID, precision and recall, of image files or straight from a model.

    python fid.py REAL FAKE                                         # folders, zips, npz of images or of statistics
    python fid.py REAL --save real.npz                              # statistics for later, in pytorch-fid's format
    python fid.py --ckpt out/train/ckpt.pt --data celeba.zip --steps 2 4 8 64 -n 30000    # a row of Table 1
    python fid.py --ckpt out/dsdi/ckpt.pt out/tsd/ckpt.pt --data celeba.zip               # Table 2
    python fid.py --ldm imagenet256 --ckpt out/dsdn/ckpt.pt --data imagenet/ --guidance 2 # LDM's models: see ldm.py
    torchrun --nproc_per_node=8 fid.py --ckpt out/dsdi/ckpt.pt --data celeba.zip          # sooner, equal to 1e-9
    python fid.py --ckpt out/train/ckpt.pt --weights random -n 2048 # no download: "rFID", on the built-in pictures

The features are those of the 2015 Inception network as pytorch-fid uses it, see inception.py. A score means something
only beside what it was computed from, so that is printed and stored with it; unlike things (other weights, other image
sizes) refuse to be compared. With --weights random no network has to be fetched: the scores are then named rFID.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoint import check_writable, claimed, data_for, trained_on, whole_file
from data import DataError, eight_bits, load_data, open_source, to_pixels
from flags import at_least, checkpoint, device_flags, finite, positive, seed
from inception import load_features
from ldm import image_channels, image_size, ldm_flag, model_hash
from runtime import (
    broadcast,
    keep_freed_memory,
    launch,
    log_stderr,
    pick_device,
    pick_dtype,
    rank,
    ranks,
    warn_if_busy,
)
from sample import Sampler, load_sampler, model_name, spread_classes
from scores import (
    MANY,
    NEIGHBOURS,
    NOISES,
    VERSION,
    Statistics,
    check_alike,
    compare,
    fidelity,
    reading,
    statistics_of_batches,
)

# ---- where images come from ------------------------------------------------------------------------------------
def own_batches(items, batch):
    """This rank's batches of an iterable: (number of the first item, list); batch i is done on rank i mod ranks."""
    items = iter(items)
    for i, chunk in enumerate(iter(lambda: list(islice(items, batch)), [])):
        if i % ranks() == rank():
            yield i * batch, chunk

@dataclass
class Side:
    """One side of a comparison, opened and checked before anything is computed.

    compute  features -> its Statistics, on rank 0
    size     of its images, or of the first of them: "64x64", "mixed", "unknown";  exact  all have that size
    network  whose features it holds already (`Features.id`); None: it computes those that are asked for"""

    compute: Callable
    size: str
    exact: bool = True
    network: str | None = None

def open_side(path, size=None, crop=None, batch=64, cache=None):
    """A `Side` of the comparison: a folder, zip, LMDB, npz of images or of statistics. Raises DataError.

    size, crop, cache   bring the images to a model's size first, through the very packing of training"""
    path = Path(path).expanduser()
    about = dict(source=str(path), prepared="as stored")
    if path.suffix == ".npz" and path.is_file():
        if size:
            raise DataError(f"error: --size needs image files or an LMDB; an npz can't be resized: {path}")
        if is_statistics(path):
            stats = Statistics.load(path)
            stats.provenance.setdefault("source", str(path))
            return Side(lambda _: stats, stats.provenance["size"], network=stats.weights)
        images, exact = npz_images(path), True
        n, shape, batches = len(images), images.shape[1:], lambda: own_batches(images, batch)
    elif size:
        images = load_data(path, size, crop, cache)
        return Side(lambda features: packed_statistics(images, features, batch), f"{size}x{size}")
    else:
        source, exact = open_source(path), False
        n, batches = source.count, lambda: decoded_batches(source, batch)
        shape = decode_stored(source, next(source.items(0, None))).shape
    if n < 2:
        raise DataError(f"error: {path}: a covariance needs at least two images")
    return Side(lambda features: statistics_of_batches(batches(), n, features, about, path.name),
                f"{shape[1]}x{shape[0]}", exact)

def reference_name(images, count=None):
    """What tables call a packed data set, or the first `count` of it."""
    return f"the {len(images):,} in {images.folder.name}" if count else images.folder.name

def packed_statistics(images, features, batch=64, count=None):
    """Statistics of a packed data set (data.Images), kept beside it: the reference is computed once. On rank 0.

    count   how many images, the first of an order that is always the same; None: all"""
    source, path = reference_name(images, count), reference_path(images, features, count)
    if broadcast(path.exists()):
        return None if rank() else Statistics.load(path)
    order = np.random.default_rng(0).permutation(len(images))[:count] if count else range(len(images))
    about = dict(source=source, prepared=images.preparation + ", greyscale" * (images.channels == 1))
    stats = statistics_of_batches(own_batches(map(images.image, order), batch), len(order), features, about,
                                  f"reference, {source}")
    try:
        if stats:
            stats.save(path)
    except SystemExit as e:
        log_stderr(f"warning: the reference's statistics are not kept: {e}")
    return stats

def reference_path(images, features, count=None):
    """Where `packed_statistics` keeps them."""
    part = "grey-" * (images.channels == 1) + (f"{count}-" if count else "")
    return images.folder / f"statistics-{VERSION}-{part}{features.id[-12:]}.npz"

def sampled_statistics(sampler, steps, n, features, provenance, batch=64):
    """Statistics of n images drawn from a model on the fly, rounded to 8 bits as if they had been saved. On rank 0."""
    batches = ((start, to_pixels(sampler(indices, steps))) for start, indices in own_batches(range(n), batch))
    provenance = provenance | dict(steps=steps, seed=sampler.seed, guidance=sampler.guidance,
                                   classes=sampler.classes and "uniform")
    return statistics_of_batches(batches, n, features, provenance, f"{steps} steps")

def is_statistics(path):
    """Whether an npz holds statistics. Raises DataError."""
    with reading(path, "is no readable npz"), np.load(path) as f:
        return "mu" in f

def npz_images(path):
    """The images of an npz, its `arr_0` or first array: (N, H, W, 3) uint8, all in memory. Raises DataError."""
    with reading(path, "holds no images and no statistics"), np.load(path) as f:
        images = f["arr_0" if "arr_0" in f else f.files[0]]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"error: {path}: images must be (N, H, W, 3) uint8, not {images.shape} {images.dtype}")
    return images

def decode_stored(source, item):
    """The image of an item of a data source, (H, W, 3) uint8 of its own size. Raises DataError."""
    name, read, _ = item
    with reading(f"{name} in {source.path}", "can't be read"), Image.open(io.BytesIO(read())) as image:
        if image.width * image.height > 2 ** 20:
            keep_freed_memory(False)
        return np.asarray(eight_bits(image).convert("RGB"))   # as pytorch-fid: no EXIF rotation, no white behind alpha

def decoded_batches(source, batch):
    """This rank's batches (see `own_batches`) of a data source's images, decoded in threads as they are asked for.

    Two images for each thread are decoded ahead, of whatever batch: photographs are big."""
    items = ((start, item) for start, items in own_batches(source.items(0, None), batch) for item in items)
    threads, begun = min(8, os.cpu_count()), deque()
    with ThreadPoolExecutor(threads) as pool:
        def in_order():
            for start, item in chain(items, [(None, None)] * 2 * threads):
                begun.append((start, item and pool.submit(decode_stored, source, item)))
                if len(begun) > 2 * threads:
                    start, image = begun.popleft()
                    yield start, image.result()
        for start, images in groupby(in_order(), key=itemgetter(0)):
            yield start, map(itemgetter(1), images)

# ---- models: the rows of Tables 1 and 2 --------------------------------------------------------------------------
def fidelity_scorer(sampler, state):
    """A function steps -> `fidelity` of a checkpoint's samples in so many steps, and its spread over noises, as scores.

    The reference is what the undistilled model drew, as the checkpoint has it, or else the model itself, in MANY steps.
    Classes are spread over all, and guidance is that of the sampler: a distilled model whose reference had another gets
    no score."""
    r = state.get("reference")
    if r is not None and state.get("reference_guidance", sampler.guidance) != sampler.guidance:
        return lambda steps: {}
    n = NOISES if r is None else len(r)
    own = Sampler(sampler.xhat.net, state, sampler.device, sampler.dtype,
                  spread_classes(state["config"]["classes"], n), sampler.w)
    draw = cache(lambda steps: own.draw(range(n), steps).float().cpu())
    def score(steps):
        value, error = fidelity(draw(steps), draw(MANY) if r is None else r)
        return {"fidelity": round(value, 4), "fidelity std": round(error * n ** 0.5, 4)}
    return score

def evaluate(args, path, features, device):
    """What `compare` gives for one checkpoint at each of --steps, from its cache where that is known: on rank 0."""
    sampler, state = load_sampler(path, args, device, pick_dtype(args.dtype, device))
    model = dict(hash=model_hash(state), weights="raw" if args.raw else "ema", dtype=sampler.dtype)
    images = load_data(data_for(path, state, args.data), image_size(state), trained_on(state)["crop"], args.cache)
    images.channels = image_channels(state)
    count = args.real if args.real and args.real < len(images) else None
    def kept(steps):
        """The file of a score."""
        key = dict(model, version=VERSION, steps=steps, n=args.n, seed=args.seed, guidance=sampler.guidance,
                   features=features.id, reference=images.hash,               # not their path or date
                   neighbours=NEIGHBOURS)
        key |= dict(real=count) if count else {}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return Path(path).parent / "scores" / f"{digest}.json"
    unknown = [steps for steps in args.steps if not kept(steps).exists()]
    new = 0 if reference_path(images, features, count).exists() else count or len(images)
    tell_time(path, sampler, features, unknown, args.n, new)
    fidelity_at = fidelity_scorer(sampler, state)
    reference = cache(lambda: packed_statistics(images, features, args.batch, count))
    results = []
    for steps in args.steps:
        file, result = kept(steps), None
        with suppress(OSError, ValueError):                    # not known yet, or a file that a power cut emptied
            result = json.loads(file.read_text())
        result = broadcast(result)
        if result:
            log_stderr(f"{path} at {steps} steps: known from {file}")
        else:
            real, fake = reference(), sampled_statistics(sampler, steps, args.n, features, model, args.batch)
            if rank():
                continue
            result = compare(real, fake)
            result["scores"] |= fidelity_at(steps)
            try:
                with whole_file(file) as tmp:
                    tmp.write_text(json.dumps(result, indent=1))
            except SystemExit as e:
                log_stderr(f"warning: this score is not kept: {e}")
        result["fake"]["checkpoint"], result["real"]["source"] = str(path), reference_name(images, count)    # as of now
        results.append(result)
    return results

def tell_time(path, sampler, features, steps, n, new):
    """Say how long the scores of a model will take, if that is over a minute: by a few images, after as many more.

    steps  the step counts;  n  samples for each;  new  images of the reference that are still to be looked at"""
    if not steps:
        return
    def seconds(work):
        work()
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) / 4
    pixels = to_pixels(sampler(range(4), 1))
    look, draw = seconds(lambda: features(pixels)[0].cpu()), seconds(lambda: sampler(range(4), 1).cpu())
    minutes = ((new + n * len(steps)) * look + n * sum(steps) * draw) / ranks() / 60
    if minutes > 1:
        log_stderr(f"{path}: {n:,} samples at {', '.join(map(str, steps))} steps, {new:,} images of the reference: "
                   f"about {minutes:.0f} min" + (", of which --real 5000 saves some" if new > 5000 else ""))

def table(results):
    """Markdown: a table per metric, rows = models, columns = steps. results: {name: [what `compare` gives, …]}."""
    every, lines = [r for row in results.values() for r in row], []
    for metric in dict.fromkeys(m for r in every for m in r["scores"] if not m.endswith(" std")):
        steps = [str(r["fake"]["steps"]) for r in next(iter(results.values()))]
        lines += [f"**{metric}** at N steps", "", f"| model | images | {' | '.join(steps)} |"]
        lines += ["|---|---|" + "---|" * len(steps)]
        for name, row in results.items():
            cells = (f"{r['scores'][metric]:.4g}" if metric in r["scores"] else "–" for r in row)
            lines.append(f"| {name} | {row[0]['fake']['images']:,} | {' | '.join(cells)} |")
        lines.append("")
    samples = {"seed {seed}, {weights} weights, {dtype}, guidance {guidance:g}".format(**r["fake"]) for r in every}
    references = {"{images:,} of {source} ({prepared}; contrast {contrast:.4g})".format(**r["real"]) for r in every}
    features = every[0]["features"]
    near = f"Precision and recall: {features.get('precision and recall', 'none of so few')}. "
    lines.append(f"Against {'; '.join(sorted(references))}. Features: {features['network']}, images "
                 f"{features['resized']}. {near}Samples: {'; '.join(sorted(samples))}.")
    if len(references) > 1:
        lines.append("The rows were measured against different references: do not compare them.")
    return "\n".join(lines)

# ---- command line ----------------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("models")
    g.add_argument("--ckpt", type=checkpoint, nargs="+", metavar="FILE",
                   help="checkpoints to sample from, or folders of runs: the rows of the table")
    g.add_argument("--data", metavar="PATH",
                   help="the real images, prepared as the checkpoint's training did (default: what it was trained on)")
    g.add_argument("--steps", type=at_least(1), nargs="+", default=[2, 4, 8, 16, 32, 64], metavar="N",
                   help="the columns of the table (default: 2 4 8 16 32 64)")
    g.add_argument("--real", type=at_least(2), metavar="N", help="only N of the real images (default: all of them)")
    g.add_argument("-n", type=at_least(2), default=30_000, metavar="N", help="images for each score (default: 30000)")
    g.add_argument("--guidance", type=finite, default=1.0, metavar="W", help="classifier-free guidance (default: 1)")
    ldm_flag(g)
    g.add_argument("--out", default="out/fid", metavar="DIR",
                   help="for table.md and table.json (default: out/fid); scores/ beside each --ckpt keeps its scores")
    g = p.add_argument_group("image files")
    g.add_argument("sides", nargs="*", metavar="REAL FAKE",
                   help="two of: folder, zip, LMDB, npz of images (arr_0), npz of statistics; or one, with --save")
    g.add_argument("--save", metavar="NPZ", help="write the statistics of the last side here")
    g.add_argument("--size", type=at_least(1),
                   help="bring REAL to this size as training does; with --ldm: side of the model's images")
    g.add_argument("--crop", type=positive,
                   help="with --size: centre crop as in train.py, in pixels, or up to 1: a share")
    g = p.add_argument_group("features")
    g.add_argument("--weights", metavar="FILE",
                   help="Inception weights (default: pytorch-fid's, downloaded once), or random: rFID, no download")
    g.add_argument("--features", choices=["fp32", "bf16"], default="fp32",
                   help="precision of the Inception network; bf16 is faster, not for published numbers (default: fp32)")
    g = p.add_argument_group("rarely needed")
    g.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    g.add_argument("--raw", action="store_true", help="the weights themselves instead of their average (EMA)")
    g.add_argument("--batch", type=at_least(1), default=64, help="images at a time (default: 64)")
    g.add_argument("--cache", metavar="DIR", help="where packed images are kept (default: $DSD_CACHE or ~/.cache/dsd)")
    device_flags(g)
    p.set_defaults(classes=None)                              # all of them, in turn
    args = p.parse_args(argv)
    if args.save and (args.ckpt or Path(args.save).suffix != ".npz" or args.save in args.sides):
        p.error("--save needs a file ending in .npz, another than REAL and FAKE, and image files")
    if len(args.sides) not in ([0] if args.ckpt else [1, 2] if args.save else [2]):
        p.error("give REAL and FAKE, or one of them with --save, or --ckpt")
    models = ["-n" if k == "n" else f"--{k}" for k in ("data", "steps", "real", "n", "guidance", "ldm", "seed", "raw")
              if getattr(args, k) != p.get_default(k)]
    if args.sides and models:
        p.error(f"{', '.join(models)}: of models only, which --ckpt names")
    if args.crop and (args.ckpt or not args.size):
        p.error("--crop goes with REAL and --size: it is part of bringing REAL to a model's size")
    return args

def compare_files(args, sides, features):
    """Print the scores of the second side against the first, and what they are; with --save keep its statistics."""
    if len(sides) == 2:                                       # before hours are spent on the first
        sizes = [side.size for side in sides]
        told = any(side.exact for side in sides) and "mixed" not in sizes
        check_alike([side.network or features.id for side in sides], sizes if told else ["unknown"] * 2)
    stats = [side.compute(features) for side in sides]
    if rank():
        return
    if len(stats) == 2:
        result = compare(*stats)
        for name, value in result["scores"].items():
            print(f"{name}: {value:.6g}")
        for part in ("real", "fake", "features"):
            print(f"{part}: " + ", ".join(f"{k} {v}" for k, v in result[part].items()))
    if args.save:                                             # last: a full disk must not cost the scores
        stats[-1].save(args.save)
        print(f"wrote {args.save}")

def check_save(path):
    """Exit if --save would take the place of something else than statistics, or can't be written."""
    if path.exists() and not is_statistics(path):
        sys.exit(f"error: {path} is there already, and holds no statistics; choose another --save")
    check_writable(path.parent)

def check_models(args):
    """Exit if one of --ckpt can't be scored, before hours are spent on the first."""
    for path in args.ckpt or []:
        _, state = load_sampler(path, args, torch.device("cpu"), "fp32")
        data_for(path, state, args.data)

def compare_models(args, features, device):
    """Score every checkpoint at every step count: table.md and table.json in --out."""
    results, out = {}, Path(args.out)
    for path in args.ckpt:
        name = model_name(path)
        results[name if name not in results else str(path)] = evaluate(args, path, features, device)
        if rank() == 0:                                        # after each model: an interrupted table is still a table
            for file, text in (("table.md", table(results) + "\n"), ("table.json", json.dumps(results, indent=1))):
                with whole_file(out / file) as tmp:
                    tmp.write_text(text, "utf-8", errors="backslashreplace")       # of a folder's odd name
    if rank() == 0:
        print(table(results))
        log_stderr(f"wrote {out}/table.md and table.json")

def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    check_models(args)
    for path in args.sides:                                    # before the first is packed, and a long download
        if not Path(path).expanduser().exists():
            sys.exit(f"error: no such file or folder: {path}")
    sides = [open_side(path, None if i else args.size, args.crop, args.batch, args.cache)
             for i, path in enumerate(args.sides)]
    if args.save:
        check_save(Path(args.save))
    needed = args.ckpt or not all(side.network for side in sides)
    features = load_features(args.weights, device, args.features) if needed else None
    if not args.ckpt:
        return compare_files(args, sides, features)
    warn_if_busy(device)
    with claimed(args.out) if rank() == 0 else nullcontext():
        compare_models(args, features, device)

if __name__ == "__main__":
    launch(main)
