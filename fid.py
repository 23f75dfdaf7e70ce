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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoint import check_writable, claimed, trained_on, whole_file
from data import DataError, eight_bits, load_data, locked, open_source, to_pixels
from ddim import WITHOUT_FLOAT64
from flags import at_least, checkpoint, device_flags, seed
from inception import RANDOM, SHA256, load_features
from ldm import image_channels, image_size, ldm_flag, model_hash
from runtime import (
    broadcast,
    keep_freed_memory,
    launch,
    log_stderr,
    pick_device,
    pick_dtype,
    progress,
    rank,
    ranks,
    sum_over_ranks,
    warn_if_busy,
)
from sample import Sampler, load_sampler, spread_classes

VERSION = 2     # of all scores: a change to how they are computed, or stored, must raise it
NOISES, MANY = 20, 64       # of fidelity: how many samples, and the steps of those that it compares with
KEPT = 5000     # features kept for what sums do not determine: 41 MB, however many images there are
NEIGHBOURS = 3  # k of precision and recall: that of Kynkäänniemi et al. (2019)

# ---- statistics of many images ------------------------------------------------------------------------------
@dataclass
class Statistics:
    """What the scores need to know of a set of images, and what it was."""

    mu: np.ndarray                              # (2048,) mean of the features, float64
    sigma: np.ndarray                           # (2048, 2048) their covariance
    weights: str                                # whose features they are: `Features.id`
    provenance: dict                            # printed and stored with each score: images, size ("64x64", "mixed") …
    score: tuple | None = None                  # (mean, standard deviation) of the Inception Score
    kid_features: np.ndarray | None = None      # (<= KEPT, 2048) some of the features: for KID, precision, recall

    def save(self, path):
        """Write an npz: `mu` and `sigma` as pytorch-fid reads them, and the rest beside them."""
        arrays = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        about = dict(version=VERSION, weights=self.weights, provenance=self.provenance, score=self.score)
        with whole_file(path) as tmp, open(tmp, "wb") as f:
            np.savez(f, about=json.dumps(about), **arrays)

    @classmethod
    def load(cls, path):
        """Read an npz of ours, or of pytorch-fid's, which knows no other weights. Raises DataError."""
        unknown = dict(images="unknown", size="unknown", note="no weights recorded: taken for pytorch-fid's")
        with reading(path, "holds no readable statistics"), np.load(path) as f:
            about = dict(version=VERSION, weights=SHA256, provenance=unknown)
            about = json.loads(str(f["about"])) if "about" in f else about
            if about.pop("version", 1) != VERSION:
                raise DataError(f"error: {path} holds statistics of another version of fid.py: make them again")
            stats = cls(f["mu"], f["sigma"], kid_features=f.get("kid_features"), **about)
        if stats.mu.ndim != 1 or stats.sigma.shape != (len(stats.mu),) * 2:
            raise DataError(f"error: {path}: mu {stats.mu.shape} and sigma {stats.sigma.shape} do not fit each other")
        return stats

@contextmanager
def reading(what, wrong):
    """Around what reads a file: a damaged one may raise a dozen things, and this a DataError instead of them."""
    try:
        yield
    except Exception as e:
        raise DataError(f"error: {what} {wrong} ({type(e).__name__}: {' '.join(str(e).split())})") from None

def statistics_of_batches(batches, n, features, provenance, desc, splits=10):
    """Statistics of n images that come in batches, with a progress bar: on rank 0; None on the others.

    batches   this rank's own, see `own_batches`: (number of the first image, images as `Features.__call__` takes them)
    desc      their name, for the bar and for errors
    splits    of the images, in their order, for the Inception Score

    Of the images only sums are kept, so that memory does not grow with their number. The sums are float64, so that it
    hardly matters in which order, or on which rank, they were made: the scores agree to about 1e-9."""
    if n < 2:
        sys.exit(f"error: {desc}: a covariance needs at least two images")
    classes, dim = features.net.fc.weight.shape
    home = "cpu" if features.device.type in WITHOUT_FLOAT64 else features.device
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=home)  # noqa: E731
    total, outer, split_sums = zeros(dim), zeros(dim, dim), zeros(splits, 2 + classes)
    split, chosen = split_numbers(n, splits).to(home), chosen_for_kid(n)
    kid_features = torch.zeros(len(chosen), dim, device=home)
    shades = np.zeros(256, np.int64)                          # how often each value of a pixel occurs
    sides = np.zeros((2, 2), np.int64)                        # sums of the heights and widths, and of their squares
    def counted(images):
        for image in images:
            shades[:] += np.bincount(image.ravel(), minlength=256)
            sides[:] += np.array(image.shape[:2]) ** [[1], [2]]
            yield image
    with progress(total=n, desc=desc, unit="img") as bar:
        for start, images in batches:
            pooled, logits = (x.to(home) for x in features(counted(images)))
            if not pooled.isfinite().all():
                sys.exit(f"error: {desc}: features are not finite; the images, or the weights, are not usable")
            x, end = pooled.double(), start + len(pooled)
            total += x.sum(0)
            outer += x.T @ x
            split_sums.index_add_(0, split[start:end], split_terms(logits))
            first, last = np.searchsorted(chosen, [start, end])
            kid_features[first:last] = pooled[torch.from_numpy(chosen[first:last] - start)]
            bar.update(min(n, start + ranks() * len(x)) - bar.n)     # the other ranks are about as far
    # Of kid_features each rank has filled rows of its own, so that their sum is all of them.
    for part in (total, outer, split_sums, kid_features, torch.from_numpy(shades), torch.from_numpy(sides)):
        sum_over_ranks(part)                                  # in place
    if rank():
        return None
    mu = total / n
    sigma = (outer - n * torch.outer(mu, mu)) / (n - 1)
    values, share = np.arange(256) / 127.5 - 1, shades / shades.sum()
    contrast = (share @ values ** 2 - (share @ values) ** 2) ** 0.5   # the standard deviation of the pixels
    (h, w), (h2, w2) = sides.tolist()                         # of no variance: all of one size
    size = f"{w // n}x{h // n}" if (n * h2, n * w2) == (h ** 2, w ** 2) else "mixed"
    provenance = dict(images=n, size=size) | provenance | dict(splits=splits, contrast=round(float(contrast), 4))
    return Statistics(mu.cpu().numpy(), sigma.cpu().numpy(), features.id, provenance, inception_score(split_sums),
                      kid_features.cpu().numpy())

def split_numbers(n, splits):
    """Which split of the Inception Score each of n images is in (n,): split s begins with image ⌊n s / splits⌋."""
    return ((torch.arange(n) + 1) * splits - 1) // n

def split_terms(logits):
    """What the Inception Score adds up: 1, Σ p log p, and p = p(y|x) itself. (B, classes) -> (B, 2 + classes)."""
    logp = logits.double().log_softmax(1)
    p = logp.exp()
    return torch.cat([torch.ones_like(p[:, :1]), (p * logp).sum(1, keepdim=True), p], 1)

def inception_score(sums):
    """exp E[KL(p(y|x) ‖ p(y))] (Salimans et al. 2016) of each split, from its sum of `split_terms`: (mean, std).

    E[KL] = E[Σ p log p] − Σ p̄ log p̄. The standard deviation is that of the population."""
    sums = sums[sums[:, 0] > 0]                               # fewer images than splits leave some of them empty
    mean_p = sums[:, 2:] / sums[:, :1]
    kl = sums[:, 1] / sums[:, 0] - torch.special.xlogy(mean_p, mean_p).sum(1)
    return kl.exp().mean().item(), kl.exp().std(correction=0).item()

def chosen_for_kid(n):
    """The numbers of at most KEPT of n images, in order: a uniform random choice, the same at each call."""
    return np.sort(np.random.default_rng(0).choice(n, min(n, KEPT), replace=False))

# ---- the scores ----------------------------------------------------------------------------------------------
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """‖μ1 − μ2‖² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½ between two Gaussians (Heusel et al. 2017), float64.

    With Σ1 = A Aᵀ and Σ2 = B Bᵀ the eigenvalues of Σ1 Σ2 are the squares of the singular values of Aᵀ B, so that no
    matrix root is needed, and no root of a rounding error is taken. Raises ValueError."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise ValueError(f"features of different length: {len(mu1)} and {len(mu2)}")
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics are not finite")
    trace_root = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_root).item()

def factor(sigma):
    """A matrix A with Σ = A Aᵀ: the Cholesky factor, or if Σ is singular, of eigenvectors for the directions it has."""
    rounding = sigma.trace() * len(sigma) * torch.finfo(sigma.dtype).eps
    a, failed = torch.linalg.cholesky_ex(sigma)
    if failed or a.diagonal().min() ** 2 <= rounding:
        values, vectors = torch.linalg.eigh(sigma)
        present = values > rounding
        a = vectors[:, present] * values[present].sqrt()
    return a

def mmd2(x, y):
    """Unbiased squared MMD with the kernel (x·y / d + 1)³ (Bińkowski et al. 2018). x (N, d), y (M, d); may be < 0."""
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y).double()
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    within = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))  # noqa: E731
    return (within(kernel(x, x)) + within(kernel(y, y)) - 2 * kernel(x, y).mean()).item()

def kid(x, y, subsets=100, size=1000):
    """Kernel Inception Distance: (mean, std) of `mmd2` over random subsets, drawn as torch-fidelity draws them."""
    size = min(size, len(x), len(y))
    if size == len(x) == len(y):
        return mmd2(x, y), 0.0                                # all subsets are the whole
    rng = np.random.RandomState(2020)
    values = [mmd2(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)])
              for _ in progress(iterable=range(subsets), desc="KID", unit="subset", leave=False)]
    return float(np.mean(values)), float(np.std(values))

def fidelity(x, reference):
    """How much samples x (n, …) are those of a reference model, (n, …) from the same noise: (mean, standard error).

        1 − ‖x − r‖² / E ‖r − r'‖²           r' another of the reference's

    1 is the same pictures, 0.5 their average, 0 unrelated ones. It needs no network and no data, but sees a model that
    draws other good pictures, or better ones, as a worse model."""
    unrelated = 2 * reference.var(0).sum()
    value = 1 - (x - reference).square().flatten(1).sum(1) / unrelated
    return value.mean().item(), (value.std() / len(value) ** 0.5).item()

def equally_many(*sets):
    """As many rows of each of several arrays, as a manifold of more points is another: random ones, always the same."""
    n, rng = min(map(len, sets)), np.random.default_rng(0)
    return [torch.as_tensor(x[np.sort(rng.choice(len(x), n, replace=False))]).double() for x in sets]

def precision_recall(real, fake, k=NEIGHBOURS):
    """Improved precision and recall (Kynkäänniemi et al. 2019): the share of `fake` that lies within the manifold of
    `real`, and the share of `real` that lies within that of `fake`. Features (N, d) and (M, d), more than k of each.

    The manifold of a set is made of balls: one around each point, as far as its k-th nearest neighbour in the set. The
    paper has VGG-16's features, and 50,000 of each: its numbers are on another scale."""
    pairs = progress(iterable=[(fake, real), (real, fake)], desc="precision, recall", leave=False)
    return tuple(share_within(*pair, k) for pair in pairs)

def share_within(points, manifold, k):
    """The share of points (N, d) that lie in a ball of a manifold (M, d). By a thousand rows: 40 MB of distances."""
    nearest = k + 1                                           # the first is the point itself
    radii = torch.cat([torch.cdist(rows, manifold).kthvalue(nearest).values for rows in manifold.split(1000)])
    within = [(torch.cdist(rows, manifold) <= radii).any(1) for rows in points.split(1000)]
    return torch.cat(within).double().mean().item()

def metric_names(weights):
    """What Fréchet distance, Inception Score, KID, precision and recall may be called by the weights behind them; None:
    they say nothing. Only the released network gives FID."""
    weights, others = weights.removesuffix("-bf16"), ("KID", "precision", "recall")
    if weights == SHA256:
        return "FID", "Inception Score", *others
    if weights.startswith(RANDOM):                            # an rIS is always about 1
        return "rFID (random features)", None, *(f"r{name} (random features)" for name in others)
    return tuple(f"{name} (weights {weights[:8]})" for name in ("FD", "IS", "KD", *others[1:]))

@cache
def warn_once(text):
    """A warning that would stand beside each cell of a table, once."""
    log_stderr(text)

def compare(real, fake):
    """All scores of `fake` against `real` (Statistics), with what they are: dict(scores, features, real, fake).

    Exits if the two can't be compared."""
    check_alike((real.weights, fake.weights), [s.provenance["size"] for s in (real, fake)])
    for side, s in (("REAL", real), ("FAKE", fake)):
        n = s.provenance["images"]
        if n != "unknown" and n < len(s.mu):
            warn_once(f"warning: {side} has {n} images, fewer than the {len(s.mu)} features: its covariance is "
                      f"singular, and the Fréchet distance biased upwards; compare only scores of equal counts")
    fid_name, is_name, kid_name, *pr_names = metric_names(fake.weights)
    features = dict(network=fake.weights, resized="bilinear to 299x299, as pytorch-fid")
    with reading("these statistics", "can't be compared"):
        scores = {fid_name: frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)}
    if fake.score and is_name:
        scores[is_name], scores[f"{is_name} std"] = fake.score
    if real.kid_features is not None and fake.kid_features is not None:
        scores[kid_name], scores[f"{kid_name} std"] = kid(real.kid_features, fake.kid_features)
        some = equally_many(real.kid_features, fake.kid_features)
        if len(some[0]) > NEIGHBOURS:
            scores |= zip(pr_names, precision_recall(*some), strict=True)
            features["precision and recall"] = f"k = {NEIGHBOURS}, {len(some[0]):,} of each"
    if "contrast" in fake.provenance:                         # above REAL's: over-sharpened; below: washed out
        scores["contrast"] = fake.provenance["contrast"]
    return dict(scores=scores, features=features, real=real.provenance, fake=fake.provenance)

def check_alike(networks, sizes):
    """Exit unless REAL and FAKE (pairs) have features of one network, and images of one size."""
    if len(set(networks)) > 1:
        sys.exit("error: features of different networks can't be compared: REAL has {}, FAKE {}".format(*networks))
    if len(set(sizes)) > 1 and "unknown" not in sizes:
        sys.exit("error: images of different sizes can't be compared: REAL has {}, FAKE {}. --size N brings REAL to "
                 "the size of FAKE as training does.".format(*sizes))

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
    size     of its images, or of the first of them: "64x64", "mixed", "unknown";  exact  it is that of all
    network  whose features it holds already; None: whose are asked for"""

    compute: Callable
    size: str
    exact: bool = True
    network: str | None = None

def open_side(path, size=None, crop=None, batch=64):
    """A `Side` of the comparison: a folder, zip, LMDB, npz of images or of statistics. Raises DataError.

    size, crop   bring the images to a model's size first, through the very packing of training"""
    path = Path(path).expanduser()
    about = dict(source=str(path), prepared="as stored")
    if path.suffix == ".npz" and path.is_file():
        if size:
            raise DataError(f"error: --size needs image files or an LMDB; {path} holds images as they are")
        if is_statistics(path):
            stats = Statistics.load(path)
            stats.provenance.setdefault("source", str(path))
            return Side(lambda _: stats, stats.provenance["size"], network=stats.weights)
        images, exact = npz_images(path), True
        n, shape, batches = len(images), images.shape[1:], lambda: own_batches(images, batch)
    elif size:
        images = load_data(path, size, crop)
        return Side(lambda features: packed_statistics(images, features, batch), f"{size}x{size}")
    else:
        source, exact = open_source(path), False
        n, batches = source.count, lambda: decoded_batches(source, batch)
        shape = decode_stored(source, next(source.items(0, None))).shape
    if n < 2:
        raise DataError(f"error: {path}: a covariance needs at least two images")
    return Side(lambda features: statistics_of_batches(batches(), n, features, about, path.name),
                f"{shape[1]}x{shape[0]}", exact)

def packed_statistics(images, features, batch=64, count=None):
    """Statistics of a packed data set (data.Images), kept beside it: the reference is computed once. On rank 0.

    count   how many images, the first of an order that is always the same; None: all"""
    source, path = images.folder.name, reference_path(images, features, count)
    if broadcast(path.exists()):
        return None if rank() else Statistics.load(path)
    order = range(len(images))
    if count:
        order, source = np.random.default_rng(0).permutation(len(images))[:count], f"the {len(images):,} in {source}"
    about = dict(source=source, prepared=images.preparation + ", greyscale" * (images.channels == 1))
    stats = statistics_of_batches(own_batches(map(images.image, order), batch), len(order), features, about,
                                  f"reference, {source}")
    if stats:
        with locked(images.folder, "scoring"):                # another run may write the same
            stats.save(path)
    return stats

def reference_path(images, features, count=None):
    """Where `packed_statistics` keeps them."""
    part = "grey-" * (images.channels == 1) + (f"{count}-" if count else "")
    return images.folder / f"statistics-{VERSION}-{part}{features.id[-12:]}.npz"

def sampled_statistics(sampler, steps, n, features, provenance, batch=64):
    """Statistics of n images drawn from a model on the fly, rounded to 8 bits as if they had been saved. On rank 0."""
    batches = ((start, to_pixels(sampler(indices, steps))) for start, indices in own_batches(range(n), batch))
    provenance = provenance | dict(steps=steps, seed=sampler.seed, guidance=sampler.w,
                                   classes=sampler.classes and "uniform")
    return statistics_of_batches(batches, n, features, provenance, f"{steps} steps")

def is_statistics(path):
    """Whether a path is that of an npz of statistics. Raises DataError."""
    path = Path(path).expanduser()
    if path.suffix != ".npz" or not path.is_file():
        return False
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
        return np.asarray(eight_bits(image).convert("RGB"))   # as pytorch-fid: no turning, no white behind alpha

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

    The reference is the model that it was distilled from, as its checkpoint has it, or else the model itself, in
    MANY steps. Classes are spread over all, and guidance is that of the sampler: of a distilled model no score if its
    reference had another."""
    r, guidance = state.get("reference"), sampler.w * state.get("guidance", 1)      # one of the two is 1
    if r is not None and state.get("reference_guidance", guidance) != guidance:
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
    origin = trained_on(state)
    images = load_data(args.data or origin["data"], image_size(state), origin["crop"], args.cache)
    images.channels = image_channels(state)
    count = args.real if args.real and args.real < len(images) else None
    def kept(steps):
        """The file of a score."""
        key = dict(model, version=VERSION, steps=steps, n=args.n, seed=args.seed, guidance=args.guidance,
                   features=features.id, reference=images.folder.name,          # not the path: it may have moved
                   neighbours=NEIGHBOURS)
        key |= dict(real=count) if count else {}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return Path(path).parent / "scores" / f"{digest}.json"
    unknown = [steps for steps in args.steps if not kept(steps).exists()]
    new = 0 if reference_path(images, features, count).exists() else count or len(images)
    tell_time(path, sampler, features, unknown, args.n, new)
    fidelity_at = fidelity_scorer(sampler, state)
    reference, results = [], []                               # read, or computed, for the first score that is not known
    for steps in args.steps:
        file, result = kept(steps), None
        with suppress(OSError, ValueError):                    # not known yet, or a file that a power cut emptied
            result = json.loads(file.read_text())
        result = broadcast(result)
        if result:
            log_stderr(f"{path} at {steps} steps: known from {file}")
        else:
            reference = reference or [packed_statistics(images, features, args.batch, count)]
            fake = sampled_statistics(sampler, steps, args.n, features, model, args.batch)
            if rank():
                continue
            result = compare(reference[0], fake)
            result["scores"] |= fidelity_at(steps)
            try:
                with whole_file(file) as tmp:
                    tmp.write_text(json.dumps(result, indent=1))
            except SystemExit as e:
                log_stderr(f"warning: this score is not kept: {e}")
        result["fake"]["checkpoint"] = str(path)
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
                   f"about {minutes:.0f} min at most" + (", of which --real 5000 saves some" if new > 5000 else ""))

def table(results):
    """Markdown: a table per metric, rows = models, columns = steps. results: {name: [what `compare` gives, …]}."""
    every, lines = [r for row in results.values() for r in row], []
    for metric in (m for m in every[0]["scores"] if not m.endswith(" std")):
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
    g.add_argument("--real", type=at_least(2), metavar="N", help="so many of the real images (default: all of them)")
    g.add_argument("-n", type=at_least(2), default=30_000, metavar="N", help="images for each score (default: 30000)")
    g.add_argument("--guidance", type=float, default=1.0, metavar="W", help="classifier-free guidance (default: 1)")
    ldm_flag(g)
    g.add_argument("--out", default="out/fid", metavar="DIR", help="for table.md and table.json (default: out/fid)")
    g = p.add_argument_group("image files")
    g.add_argument("sides", nargs="*", metavar="REAL FAKE",
                   help="two of: folder, zip, LMDB, npz of images (arr_0), npz of statistics; or one, with --save")
    g.add_argument("--save", metavar="NPZ", help="write the statistics of the last side here")
    g.add_argument("--size", type=at_least(1), help="bring REAL to this size as training does; with --ldm: the models'")
    g.add_argument("--crop", type=float, help="with --size: centre crop as in train.py, in pixels, or up to 1: a share")
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
    if args.save and (Path(args.save).suffix != ".npz" or args.save in args.sides):
        p.error("--save needs a new file, ending in .npz")
    if len(args.sides) not in ([0] if args.ckpt else [1, 2] if args.save else [2]):
        p.error("give REAL and FAKE, or one of them with --save, or --ckpt with --data")
    if args.crop and not args.size:
        p.error("--crop goes with --size: it is part of bringing REAL to a model's size")
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

def compare_models(args, features, device):
    """Score every checkpoint at every step count: table.md and table.json in --out."""
    for path in args.ckpt:                                     # each of them, before hours are spent on the first
        _, state = load_sampler(path, args, torch.device("cpu"), "fp32")
        if "ldm" in state and not args.data:
            sys.exit(f"error: {path} is one of LDM's models: the images to compare with have to be given, as --data")
    results, out = {}, Path(args.out)
    for path in args.ckpt:
        name = Path(path).parent.name or Path(path).stem
        results[name if name not in results else str(path)] = evaluate(args, path, features, device)
        if rank() == 0:                                        # after each model: an interrupted table is still a table
            for file, text in (("table.md", table(results) + "\n"), ("table.json", json.dumps(results, indent=1))):
                with whole_file(out / file) as tmp:
                    tmp.write_text(text)
    if rank() == 0:
        print(table(results))
        log_stderr(f"wrote {out}/table.md and table.json")

def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    for path in [*(args.ckpt or []), *args.sides]:             # before a long download, and longer sampling
        if not Path(path).expanduser().exists():
            sys.exit(f"error: no such file or folder: {path}")
    sides = [open_side(path, None if i else args.size, args.crop, args.batch) for i, path in enumerate(args.sides)]
    if args.save:
        check_save(Path(args.save))
    needed = args.ckpt or not all(is_statistics(path) for path in args.sides)
    features = load_features(args.weights, device, args.features) if needed else None
    if not args.ckpt:
        return compare_files(args, sides, features)
    warn_if_busy(device)
    with claimed(args.out) if rank() == 0 else nullcontext():
        compare_models(args, features, device)

if __name__ == "__main__":
    launch(main)
