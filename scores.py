"""The scores: FID, Inception Score, KID, precision and recall of features, fidelity, and the statistics behind them.

    stats = statistics_of_batches(batches, n, features, provenance, desc)    # features: see inception.load_features
    compare(real, fake)                                                      # two `Statistics`: all scores, and of what

Whose images they are of: fid.py.
"""

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from checkpoint import whole_file
from data import DataError
from ddim import WITHOUT_FLOAT64
from inception import RANDOM, SHA256
from runtime import log_stderr, progress, rank, ranks, sum_over_ranks

VERSION = 2     # of all scores: a change to how they are computed, or stored, must raise it
NOISES, MANY = 20, 64       # of fidelity: how many samples, and the step count of its reference
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
        """Read an npz of ours, or of pytorch-fid's, which is taken to be of its own weights. Raises DataError."""
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

    batches   this rank's own, see fid.own_batches: (number of the first image, images as inception.Features takes them)
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
    sums = np.zeros(7, np.int64)                              # heights, widths, their squares; pixels, values, squares
    def counted(images):
        for image in images:
            h, w, _ = image.shape
            values, squares = image.sum(dtype=np.int64), np.square(image, dtype=np.uint16).sum(dtype=np.int64)
            sums[:] += h, w, h * h, w * w, image.size, values, squares
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
    for part in (total, outer, split_sums, kid_features, torch.from_numpy(sums)):
        sum_over_ranks(part)                                  # in place
    if rank():
        return None
    mu = total / n
    sigma = (outer - n * torch.outer(mu, mu)) / (n - 1)
    h, w, h2, w2, pixels, values, squares = sums.tolist()
    contrast = (squares / pixels - (values / pixels) ** 2) ** 0.5 / 127.5      # the standard deviation in [-1, 1]
    size = f"{w // n}x{h // n}" if (n * h2, n * w2) == (h ** 2, w ** 2) else "mixed"       # of no variance
    provenance = dict(images=n, size=size) | provenance | dict(splits=splits, contrast=round(contrast, 4))
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
    """How far samples x (n, …) agree with a reference model's (n, …) from the same noise: (mean, standard error).

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

warn_once = cache(log_stderr)                                 # else each cell of a table would repeat it

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
