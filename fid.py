"""FID, Inception Score and KID, of image files or straight from a model.

    python fid.py REAL FAKE                                         # folders, zips, npz of images or of statistics
    python fid.py REAL --save real.npz                              # statistics for later, in pytorch-fid's format
    python fid.py --ckpt out/train/ckpt.pt --data celeba.zip --steps 2 4 8 64 -n 30000    # a row of Table 1
    python fid.py --ckpt out/dsdi/ckpt.pt out/tsd/ckpt.pt --data celeba.zip               # Table 2
    python fid.py --ldm imagenet256 --ckpt out/dsdn/ckpt.pt --data imagenet/ --guidance 2 # LDM's models: see ldm.py
    torchrun --nproc_per_node=8 fid.py --ckpt out/dsdi/ckpt.pt --data celeba.zip          # the same numbers, sooner
    python fid.py --ckpt out/train/ckpt.pt --weights random -n 2048 # no download: "rFID", on the built-in pictures

The features are those of the 2015 Inception network as pytorch-fid uses it: the same weights, resized the
same way, float32. A score means something only beside what it was computed from, so that is printed and
stored with it; unlike things (other weights, other image sizes) refuse to be compared. With --weights random
no network has to be fetched: the numbers are then named rFID, and compare only with each other (Naeem et al. 2020).
"""

import argparse
import hashlib
import http.client
import io
import json
import math
import os
import sys
import urllib.request
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from data import DataError, default_cache, load_data, made, open_source, to_pixels
from ddim import Denoiser
from ldm import image_size, ldm_flag, load_model, model_hash
from model import autocast, file_hash, from_first, in_turn, launch, pick_device, pick_dtype, progress, rank, ranks
from sample import Sampler, pick_classes

# ---- the Inception network ---------------------------------------------------------------------------


class Conv(nn.Conv2d):
    """Convolution, batch norm, ReLU; the batch norm lives in the convolution's weight and bias, see `fold`."""

    def __init__(self, cin, cout, kernel, stride=1, padding=0):
        super().__init__(cin, cout, kernel, stride, padding)

    def forward(self, x):
        return F.relu_(super().forward(x))


class Mixed(nn.Module):
    """Inception block: branches side by side, and a pooling branch, concatenated.

    branches  {name: [layer, …]} with layers (channels, kernel) or (channels, kernel, 2) for stride 2; a list of two
              layers stands side by side. Names are those of the released file: branch5x5_1, branch3x3_2a …
    pool      "avg" or "max" (3x3, keeping the size), "halve" (max, stride 2, joined as it is)
    """

    def __init__(self, cin, branches, pool, pool_channels=0):
        super().__init__()
        self.pool, self.chains = pool, []
        for branch, layers in branches.items():
            chain, ch = [], cin
            for i, layer in enumerate(layers, 1):
                name = f"{branch}_{i}" if len(layers) > 1 else branch
                twins = dict(zip("ab", layer, strict=True)) if isinstance(layer, list) else {"": layer}
                for suffix, (cout, kernel, *stride) in twins.items():
                    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
                    padding = 0 if stride else (kernel[0] // 2, kernel[1] // 2)
                    self.add_module(name + suffix, Conv(ch, cout, kernel, *(stride or [1]), padding))
                chain.append([name + suffix for suffix in twins])
                ch = cout
            self.chains.append(chain)
        if pool_channels:
            self.branch_pool = Conv(cin, pool_channels, 1)

    def forward(self, x):
        outs = []
        for chain in self.chains:
            h = [x]
            for names in chain:
                h = [self.get_submodule(name)(h[0]) for name in names]
            outs += h
        if self.pool == "halve":
            return torch.cat([*outs, F.max_pool2d(x, 3, 2)], 1)
        # The average is over real pixels, and the last block takes the maximum: both as in the TensorFlow graph.
        pooled = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*outs, self.branch_pool(pooled)], 1)


def _mixed_35(cin, pool):
    return Mixed(cin, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
                       "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "avg", pool)


def _mixed_17(ch):
    return Mixed(768, {"branch1x1": [(192, 1)], "branch7x7": [(ch, 1), (ch, (1, 7)), (192, (7, 1))],
                       "branch7x7dbl": [(ch, 1), (ch, (7, 1)), (ch, (1, 7)), (ch, (7, 1)), (192, (1, 7))]}, "avg", 192)


def _mixed_8(cin, pool):
    return Mixed(cin, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), [(384, (1, 3)), (384, (3, 1))]],
                       "branch3x3dbl": [(448, 1), (384, 3), [(384, (1, 3)), (384, (3, 1))]]}, pool, 192)


class Inception(nn.Module):
    """Inception v3 as in the 2015 TensorFlow graph: images (B, 3, 299, 299) in [-1, 1] -> features, logits.

    features (B, 2048): the spatial mean of the last block; logits (B, 1008), without bias, as Inception Score has them.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = _mixed_35(192, 32)
        self.Mixed_5c = _mixed_35(256, 64)
        self.Mixed_5d = _mixed_35(288, 64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3, 2)],
                                    "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}, "halve")
        self.Mixed_6b = _mixed_17(128)
        self.Mixed_6c = _mixed_17(160)
        self.Mixed_6d = _mixed_17(160)
        self.Mixed_6e = _mixed_17(192)
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3, 2)],
                                    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]}, "halve")
        self.Mixed_7b = _mixed_8(1280, "avg")
        self.Mixed_7c = _mixed_8(2048, "max")
        self.fc = nn.Linear(2048, 1008, bias=False)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        for block in list(self.children())[5:-1]:
            x = block(x)
        features = x.float().mean((2, 3))
        with torch.autocast(x.device.type, enabled=False):
            return features, self.fc(features)


def fold(state, eps=1e-3):
    """The released file's tensors as this class holds them: each batch norm (γ, β, μ, σ²) folded into its convolution.

    γ (w∗x − μ) / √(σ² + ε) + β = (s w)∗x + (β − s μ) with s = γ / √(σ² + ε). Raises KeyError on a missing tensor.
    """
    folded = {"fc.weight": state["fc.weight"]}
    for name in (k.removesuffix(".conv.weight") for k in state if k.endswith(".conv.weight")):
        w, gamma, beta, mean, var = (state[f"{name}.{k}"].double() for k in (
            "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"))
        s = gamma / (var + eps).sqrt()
        folded[f"{name}.weight"] = (w * s[:, None, None, None]).float()
        folded[f"{name}.bias"] = (beta - s * mean).float()
    return folded


# ---- its weights ---------------------------------------------------------------------------------------

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + FILE
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
BYTES = 95_628_359
RANDOM = "random"


@dataclass(frozen=True)
class Features:
    """A network that makes features, and what to call it. weights: SHA-256 of its file, or "random-…"."""

    net: nn.Module
    weights: str
    device: torch.device
    dtype: str = "fp32"

    @property
    def id(self):
        """What statistics must have in common: the weights and the precision."""
        return self.weights + ("" if self.dtype == "fp32" else "-" + self.dtype)

    @torch.no_grad()
    def __call__(self, images):
        """A list of (H, W, 3) uint8 arrays, or one (B, H, W, 3) -> features (B, 2048), logits (B, 1008), float32."""
        if isinstance(images, list) and len({i.shape for i in images}) == 1:
            images = np.stack(images)
        parts = [images] if isinstance(images, np.ndarray) else [i[None] for i in images]
        x = torch.cat([_resize(torch.tensor(p, device=self.device)) for p in parts])
        # On a GPU, "float32" convolutions would be TF32, a thousandth off, unless that is forbidden.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False)
        with autocast(self.device, self.dtype), exact:
            return self.net(x.contiguous(memory_format=torch.channels_last))


def _resize(pixels):
    """(B, H, W, 3) uint8 -> (B, 3, 299, 299) in [-1, 1]: bilinear without antialiasing, as pytorch-fid does it."""
    x = pixels.permute(0, 3, 1, 2).float() / 255
    return 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1


def metric_names(weights):
    """What the scores may be called by the weights behind them: only the released network gives FID."""
    weights = weights.removesuffix("-bf16")
    if weights == SHA256:
        return "FID", "Inception Score", "KID"
    if weights.startswith(RANDOM):
        return tuple(f"{name} (random features)" for name in ("rFID", "rIS", "rKID"))
    return tuple(f"{name} (weights {weights[:8]})" for name in ("FD", "IS", "KD"))


def load_features(weights=None, device="cpu", dtype="fp32"):
    """The network of `--weights`: a file, "random", or None for the released one, fetched once. Exits on errors."""
    with torch.device("meta"):                                # draws no random numbers: those belong to training
        net = Inception().eval().requires_grad_(False)
    net = net.to_empty(device="cpu")
    if weights == RANDOM:
        name = _random_weights(net)
    else:
        path = Path(weights) if weights else fetch_weights()
        name = _load_weights(net, path)
    return Features(net.to(device, memory_format=torch.channels_last), name, torch.device(device), dtype)


def _random_weights(net):
    """Fill the network from numpy's generator: the same numbers on every machine. Returns their name."""
    digest = hashlib.sha256()
    for key, p in sorted(net.named_parameters()):
        rng = np.random.default_rng(list(key.encode()))
        scale = math.sqrt((1 if key == "fc.weight" else 2) / p[0].numel()) if p.ndim > 1 else 0.1
        values = rng.standard_normal(p.shape, dtype=np.float32) * np.float32(scale)
        digest.update(values.tobytes())
        p.copy_(torch.from_numpy(values))
    return f"{RANDOM}-{digest.hexdigest()[:8]}"


def _load_weights(net, path):
    """Load a file with the released one's keys, by name, executing nothing from it. Returns its SHA-256."""
    try:
        name = file_hash(path, digits=64)
        state = torch.load(path, map_location="cpu", weights_only=True)
        surplus = {k for k in state if not k.endswith(".num_batches_tracked")}
        surplus -= {f"{k}.{end}" for k in (k.rpartition(".")[0] for k in net.state_dict()) for end in (
            "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")} | {"fc.weight", "fc.bias"}
        if surplus:
            raise KeyError(f"surplus {min(surplus)}")
        if "fc.bias" not in state:                            # unused here, but a file without it is another file
            raise KeyError("fc.bias is missing")
        net.load_state_dict(fold(state))
    except FileNotFoundError:
        sys.exit(f"error: no weights at {path}. {HOW_TO_GET}")
    except Exception as e:  # an unreadable file fails in a dozen ways
        first = " ".join(str(e).split())[:160]
        sys.exit(f"error: {path} does not hold the Inception weights ({first}). {HOW_TO_GET}")
    return name


HOW_TO_GET = (f"The file is {FILE} ({BYTES / 1e6:.0f} MB) from {URL}; put it there, or give its place as --weights, "
              f"or use --weights random, whose scores are no FID")


def fetch_weights():
    """The released file in the cache folder, downloaded if it is not there, and whole or not at all. Exits offline."""
    path = default_cache() / FILE
    if made(path, lambda path: path.exists() and file_hash(path, digits=64) == SHA256):
        return path
    damaged = f"{path} is damaged, and " if path.exists() else ""
    tmp = path.with_name(f"{FILE}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (urllib.request.urlopen(URL, timeout=30) as answer, open(tmp, "wb") as f,
              tqdm(total=BYTES, desc=f"fetching {FILE}", unit="B", unit_scale=True) as bar):
            while block := answer.read(1 << 18):
                f.write(block)
                bar.update(len(block))
        if file_hash(tmp, digits=64) != SHA256:
            raise OSError("what came is not that file: its SHA-256 differs")
        os.replace(tmp, path)
    except (OSError, http.client.HTTPException) as e:         # URLError and timeouts are OSErrors too
        tmp.unlink(missing_ok=True)
        sys.exit(f"error: {damaged}can't fetch {URL} ({getattr(e, 'reason', None) or e}). Put that file ({BYTES:,} "
                 f"bytes) into {path.parent}, or give its place as --weights, or use --weights random: no FID then")
    return path


# ---- statistics, image by image ----------------------------------------------------------------------------

VERSION = 1     # of all scores: a change to how they are computed, or stored, must raise it
KEPT = 5000     # features kept for KID, which moments do not determine: 41 MB, however many images there are


class Moments:
    """Running mean and covariance of features, in float64: memory does not grow with the number of images."""

    def __init__(self):
        self.n, self.total, self.outer = 0, 0, 0

    def update(self, features):
        """features (B, dim)"""
        x = features.double()
        self.n += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    def result(self):
        """μ (dim,) and Σ (dim, dim), dividing by n − 1, as float64 arrays."""
        mu = self.total / self.n
        sigma = (self.outer - self.n * torch.outer(mu, mu)) / max(1, self.n - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()


class SplitScores:
    """Running Inception Score (Salimans et al. 2016): exp E[KL(p(y|x) ‖ p(y))] in each of 10 splits.

    Row i of n belongs to split ⌊i · 10 / n⌋, in the order given as in the original code, or after torch-fidelity's
    shuffling. E[KL] = E[Σ p log p] − Σ p̄ log p̄ needs only sums.
    """

    def __init__(self, n, splits=10, shuffle=False):
        bounds = [i * n // splits for i in range(splits + 1)]
        place = np.repeat(np.arange(splits), np.diff(bounds))
        self.split = np.empty(n, np.int64)
        self.split[np.random.RandomState(2020).permutation(n) if shuffle else slice(None)] = place
        self.seen, self.splits, self.sums = 0, splits, None

    def update(self, logits):
        """logits (B, classes) of the next B rows"""
        logp = logits.double().log_softmax(1)
        p = logp.exp()
        rows = torch.cat([torch.ones_like(p[:, :1]), (p * logp).sum(1, keepdim=True), p], 1)
        if self.sums is None:
            self.sums = rows.new_zeros(self.splits, rows.shape[1])
        split = torch.from_numpy(self.split[self.seen:self.seen + len(p)]).to(p.device)
        self.sums.index_add_(0, split, rows)
        self.seen += len(p)

    def result(self):
        """(mean, population standard deviation) over the splits."""
        sums = self.sums[self.sums[:, 0] > 0]
        mean_p = sums[:, 2:] / sums[:, :1]
        kl = sums[:, 1] / sums[:, 0] - torch.special.xlogy(mean_p, mean_p).sum(1)
        return kl.exp().mean().item(), kl.exp().std(correction=0).item()


class Reservoir:
    """A uniform random sample of at most `size` rows of a stream, the same for the same stream (Vitter 1985)."""

    def __init__(self, size=KEPT):
        self.size, self.seen, self.rows, self.rng = size, 0, [], np.random.default_rng(0)

    def update(self, rows):
        for row in rows.float().cpu().numpy():
            if self.seen < self.size:
                self.rows.append(row.copy())                  # a view would keep its whole batch in memory
            elif (place := self.rng.integers(self.seen + 1)) < self.size:
                self.rows[place] = row.copy()
            self.seen += 1

    def result(self):
        return np.stack(self.rows)


@dataclass
class Statistics:
    """What FID, Inception Score and KID need to know of a set of images, and what it was.

    mu (2048,), sigma (2048, 2048) float64;  n  images
    weights   which features: `Features.id`
    size      "64x64", "mixed", or "" if unknown
    kept      features (<= KEPT, 2048) for KID, or None;  score  (mean, std) of the Inception Score, or None
    card      what else is known of the images, printed and stored with every score
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int = 0
    weights: str = ""
    size: str = ""
    kept: np.ndarray | None = None
    score: tuple | None = None
    card: dict = field(default_factory=dict)

    def save(self, path):
        """Write an npz, atomically: `mu` and `sigma` as pytorch-fid reads them, and the rest beside them."""
        path = Path(path)
        about = dict(n=self.n, weights=self.weights, size=self.size, score=self.score, card=self.card)
        kept = {} if self.kept is None else {"kept": self.kept}
        tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            np.savez(f, mu=self.mu, sigma=self.sigma, about=json.dumps(about), **kept)
        os.replace(tmp, path)

    @classmethod
    def load(cls, path):
        """Read an npz of ours or of pytorch-fid's. Raises DataError."""
        try:
            with np.load(path, allow_pickle=False) as f:
                about = json.loads(str(f["about"])) if "about" in f else dict(
                    weights=SHA256, card=dict(note="no weights recorded: taken for pytorch-fid's"))
                stats = cls(f["mu"], f["sigma"], kept=f.get("kept"), **about)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as e:
            raise DataError(f"error: {path} holds no readable statistics ({e})") from None
        if stats.mu.ndim != 1 or stats.sigma.shape != (len(stats.mu),) * 2:
            raise DataError(f"error: {path}: mu {stats.mu.shape} and sigma {stats.sigma.shape} do not fit each other")
        return stats


def gather(batches, total, features, card, desc, shuffle=False):
    """Statistics of a stream of images, with a progress bar: on rank 0; None on the others.

    batches  functions that return a batch each, as `Features.__call__` takes it. The ranks call them in turn, but all
             results are added up on rank 0 in the order of the stream: the scores are those of a single process
    """
    moments, scores, kept = Moments(), SplitScores(total, shuffle=shuffle), Reservoir()
    sizes, values = set(), np.zeros(3)                        # values: count, sum and sum of squares of the pixels

    def work(batch):
        images = batch()
        pixels = (np.asarray(i) / 127.5 - 1 for i in images)  # one by one: eight bytes for each value
        parts = features(images)
        return ({f"{i.shape[1]}x{i.shape[0]}" for i in images},
                np.array([(x.size, x.sum(), np.square(x).sum()) for x in pixels]),
                *(x.cpu() if ranks() > 1 else x for x in parts))

    with progress(total=total, desc=desc, unit="img") as bar:
        for size, value, feats, logits in in_turn(batches, work):
            sizes |= size
            for row in value:
                values += row
            feats, logits = feats.to(features.device), logits.to(features.device)
            if not feats.isfinite().all():
                sys.exit(f"error: {desc}: features are not finite; the images, or the weights, are not usable")
            for part, value in ((moments, feats), (scores, logits), (kept, feats)):
                part.update(value)
            bar.update(len(feats))
    if rank():
        return None
    if moments.n < 2:
        sys.exit(f"error: {desc}: a covariance needs at least two images")
    contrast = (values[2] / values[0] - (values[1] / values[0]) ** 2) ** 0.5
    card = card | dict(splits="10, shuffled" if shuffle else "10, in order", contrast=round(float(contrast), 4))
    size = sizes.pop() if len(sizes) == 1 else "mixed"
    return Statistics(*moments.result(), moments.n, features.id, size, kept.result(), scores.result(), card)


# ---- the scores ----------------------------------------------------------------------------------------------


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """‖μ1 − μ2‖² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½ between two Gaussians (Heusel et al. 2017), float64.

    With Σ1 = B Bᵀ the eigenvalues of Σ1 Σ2 are those of the symmetric Bᵀ Σ2 B, so that no general matrix root is
    needed. B is a Cholesky factor, or if Σ1 is singular, made of the eigenvectors for the directions it does have.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise ValueError(f"features of different length: {len(mu1)} and {len(mu2)}")
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics are not finite")
    b, other = _cholesky(sigma1), sigma2
    if b is not None and _cholesky(sigma2) is None:           # the singular one is the one to take apart: rounding
        b, sigma1, other = None, sigma2, sigma1               # in directions it lacks would count by its root
    if b is None:
        values, vectors = torch.linalg.eigh(sigma1)
        present = values > _rounding(sigma1)
        b = vectors[:, present] * values[present].sqrt()
    trace_root = torch.linalg.eigvalsh(b.T @ other @ b).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + other.trace() - 2 * trace_root).item()


def _rounding(sigma):
    """Eigenvalues of a covariance below this are rounding errors."""
    return sigma.trace() * len(sigma) * torch.finfo(sigma.dtype).eps


def _cholesky(sigma):
    """The Cholesky factor, or None if the matrix is singular, or as good as."""
    factor, failed = torch.linalg.cholesky_ex(sigma)
    return None if failed or factor.diagonal().min() ** 2 <= _rounding(sigma) else factor


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


def compare(real, fake):
    """All scores of `fake` against `real` (Statistics), with what they are. Exits if the two can't be compared."""
    for name, what in (("weights", "features of different networks"), ("size", "images of different sizes")):
        a, b = getattr(real, name), getattr(fake, name)
        if a and b and a != b:
            hint = " --size N brings REAL to the size of FAKE as training does." if name == "size" else ""
            sys.exit(f"error: {what} can't be compared: REAL has {a}, FAKE {b}.{hint}")
    for side, s in (("REAL", real), ("FAKE", fake)):
        if 0 < s.n < 2048:
            print(f"warning: {side} has {s.n} images, fewer than the 2048 features: its covariance is singular, and "
                  f"the Fréchet distance is biased upwards; compare only scores of equal counts", file=sys.stderr)
    if not (real.size and fake.size):
        print("warning: a file of statistics does not say how large its images were: that could not be compared",
              file=sys.stderr)
    try:
        distance = frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)
    except ValueError as e:
        sys.exit(f"error: {e}")
    fid_name, is_name, kid_name = metric_names(fake.weights)
    scores = {fid_name: distance}
    if fake.score:
        scores[is_name], scores[is_name + " std"] = fake.score
    if real.kept is not None and fake.kept is not None:
        scores[kid_name], scores[kid_name + " std"] = kid(real.kept, fake.kept)
    if "contrast" in fake.card:                               # above REAL's: over-sharpened; below: washed out
        scores["contrast"] = fake.card["contrast"]
    card = lambda s: dict(images=s.n or "unknown", size=s.size or "unknown") | s.card  # noqa: E731
    about = dict(network=fake.weights, resized="bilinear to 299x299, as pytorch-fid")
    return dict(scores=scores, features=about, real=card(real), fake=card(fake))


# ---- where images come from ------------------------------------------------------------------------------------


def _is_statistics(path):
    path = Path(path).expanduser()
    return path.suffix == ".npz" and path.is_file() and "mu.npy" in _npz_names(path)


def statistics_of(path, features, size=None, crop=None, batch=64, shuffle=False):
    """Statistics of a side of the comparison: a folder, zip, LMDB, npz of images or of statistics. Raises DataError.

    size, crop   bring the images to a model's size first, through the very packing of training
    """
    path = Path(path).expanduser()
    card = dict(source=str(path))
    if path.suffix == ".npz" and path.is_file():
        if size:
            raise DataError(f"error: --size needs image files or an LMDB; {path} holds images as they are")
        if _is_statistics(path):
            stats = Statistics.load(path)
            stats.card = card | stats.card
            return stats
        total, batches = _npz_images(path, batch)
    elif size:
        return packed_statistics(load_data(path, size, crop), features, batch)
    else:
        source = open_source(path)
        total, batches = source.count, _source_images(source, batch)
    return gather(batches, total, features, card | dict(prepared="as stored"), path.name, shuffle)


def packed_statistics(images, features, batch=64):
    """Statistics of a packed data set (data.Images), kept beside it: the reference is computed once. On rank 0."""
    path = images.folder / f"statistics-{VERSION}-{features.id[-12:]}.npz"
    if from_first(path.exists()):
        return None if rank() else Statistics.load(path)
    card = dict(source=images.folder.name, prepared=images.about)
    batches = (lambda i=i: images.pixels[i:i + batch] for i in range(0, len(images), batch))
    stats = gather(batches, len(images), features, card, f"reference, {images.folder.name}")
    try:
        if stats:
            stats.save(path)
    except OSError as e:
        raise DataError(f"error: can't write {path} ({e.strerror or e})") from None
    return stats


def _npz_names(path):
    try:
        with zipfile.ZipFile(path) as z:
            return z.namelist()
    except (zipfile.BadZipFile, OSError) as e:
        raise DataError(f"error: {path} is no readable npz ({e})") from None


def _npz_images(path, batch):
    """Count and batches (see `gather`) of the images (N, H, W, 3) uint8 in an npz, read piece by piece."""
    names = [n for n in _npz_names(path) if n.endswith(".npy")]
    name = "arr_0.npy" if "arr_0.npy" in names else (names or [""])[0]
    try:
        with zipfile.ZipFile(path) as z, z.open(name) as f:
            version = np.lib.format.read_magic(f)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(f)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as e:
        raise DataError(f"error: {path} holds no images and no statistics ({e})") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise DataError(f"error: {path}: images must be (N, H, W, 3) uint8, but {name} is {shape} {dtype}")

    def batches():
        with zipfile.ZipFile(path) as z, z.open(name) as f:
            np.lib.format.read_magic(f)
            read(f)
            for start in range(0, shape[0], batch):
                count = min(batch, shape[0] - start)
                try:
                    pixels = np.frombuffer(f.read(count * math.prod(shape[1:])), np.uint8).reshape(count, *shape[1:])
                except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as e:
                    raise DataError(f"error: {path} is damaged after image {start} ({e})") from None
                yield lambda pixels=pixels: pixels

    return shape[0], batches()


def _source_images(source, batch):
    """Batches (see `gather`; lists of (H, W, 3) uint8 arrays) of a data source, decoded in threads one batch ahead.

    This rank decodes its own batches only, as `in_turn` shares them out: one in `ranks()`.
    """

    def work(item):
        name, read, _ = item
        try:
            with Image.open(io.BytesIO(read())) as image:     # as pytorch-fid: no turning, no white behind alpha
                return image.convert("RGB")
        except Exception as e:  # whatever PIL raises on a broken file
            raise DataError(f"error: {name} in {source.path} can't be read ({type(e).__name__}: {e})") from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        items, number = source.items(0, None), count()

        def fetch():
            own, chunk = next(number) % ranks() == rank(), list(islice(items, batch))
            return [own and pool.submit(work, item) for item in chunk]

        ahead = deque(fetch() for _ in range(ranks()))
        while now := ahead.popleft():
            ahead.append(fetch())
            yield lambda now=now: [np.asarray(f.result()) for f in now]


def sampled_statistics(sampler, steps, n, features, card, batch=64):
    """Statistics of n images drawn from a model on the fly, rounded to 8 bits as if they had been saved. On rank 0."""
    batches = (lambda i=i: to_pixels(sampler(range(i, min(i + batch, n)), steps)) for i in range(0, n, batch))
    card = card | dict(steps=steps, seed=sampler.seed, guidance=sampler.w, classes=sampler.classes and "uniform")
    return gather(batches, n, features, card, f"{steps} steps")


# ---- models: the rows of Tables 1 and 2 --------------------------------------------------------------------------


def evaluate(args, path, features, device):
    """The scores of one checkpoint at each of --steps, from its cache where they are: [card, …], on rank 0."""
    net, state = load_model(path, device, not args.raw, args.ldm, args.size)
    trained = state.get("args", {})
    images = load_data(args.data or trained.get("data"), image_size(state), trained.get("crop"), args.cache)
    dtype = pick_dtype(args.dtype, device)
    sampler = Sampler(net, state, device, dtype, pick_classes(None, args.guidance, state), args.guidance, args.seed,
                      args.decode_batch)
    model = dict(checkpoint=str(path), hash=model_hash(path), weights="raw" if args.raw else "ema", dtype=dtype)
    real, rows = [], []
    for steps in args.steps:
        key = dict(model, version=VERSION, steps=steps, n=args.n, seed=args.seed, guidance=args.guidance,
                   features=features.id, reference=images.folder.name)
        del key["checkpoint"]                                  # a moved checkpoint is still the same
        cache = Path(path).parent / "scores" / f"{_digest(key)}.json"
        known = from_first(_read_score(cache))
        if known:
            rows.append(known)
            rows[-1]["fake"]["checkpoint"] = str(path)         # it may have moved since
            tell(f"{path} at {steps} steps: known from {cache}")
            continue
        if not real:
            real.append(packed_statistics(images, features, args.batch))
        fake = sampled_statistics(sampler, steps, args.n, features, model, args.batch)
        if rank():
            continue
        rows.append(compare(real[0], fake))
        try:
            _write(cache, json.dumps(rows[-1], indent=1))
        except OSError as e:
            tell(f"warning: can't keep this score in {cache} ({e.strerror or e})")
    return rows


def _read_score(path):
    """A score of the cache, or None."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def tell(text):
    """A line for people, on standard error: standard output is for the table."""
    if rank() == 0:
        print(text, file=sys.stderr)


def _digest(key):
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _write(path, text):
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def table(results):
    """Markdown: a table per metric, rows = models, columns = steps. results: {name: [card of `compare`, …]}."""
    first = next(iter(results.values()))
    lines = []
    for metric in (m for m in first[0]["scores"] if not m.endswith(" std")):
        steps = [card["fake"]["steps"] for card in first]
        lines += ["", f"**{metric}** at N steps", "", f"| model | images | {' | '.join(map(str, steps))} |",
                  "|---|---|" + "---|" * len(steps)]
        for name, cards in results.items():
            cells = (f"{c['scores'][metric]:.4g}" if metric in c["scores"] else "–" for c in cards)
            lines.append(f"| {name} | {cards[0]['fake']['images']:,} | {' | '.join(cells)} |")
    sampled = {"seed {seed}, {weights} weights, {dtype}, guidance {guidance:g}".format(**c["fake"])
               for cards in results.values() for c in cards}
    counts = {f"{c['real']['images']:,} of {c['real']['source']} ({c['real']['prepared']}"
              + (f"; contrast {c['real']['contrast']:.4g})" if "contrast" in c["real"] else ")")
              for cards in results.values() for c in cards}
    lines += ["", f"Against {'; '.join(sorted(counts))}. Features: {first[0]['features']['network']}, images "
              f"{first[0]['features']['resized']}. Samples: {'; '.join(sorted(sampled))}."]
    if len(counts) > 1:
        lines.append("The rows were measured against different references: do not compare them.")
    return "\n".join(lines[1:])


# ---- command line ----------------------------------------------------------------------------------------------


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sides", nargs="*", metavar="REAL FAKE",
                   help="two of: folder, zip, LMDB, npz of images (arr_0), npz of statistics; or one, with --save")
    p.add_argument("--weights", metavar="FILE",
                   help="Inception weights (default: pytorch-fid's, downloaded once), or random: rFID, no download")
    p.add_argument("--batch", type=int, default=64, help="images at a time (default: 64)")
    p.add_argument("--features", choices=["fp32", "bf16"], default="fp32",
                   help="precision of the Inception network; bf16 is faster, not for published numbers (default: fp32)")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")

    g = p.add_argument_group("image files")
    g.add_argument("--size", type=int,
                   help="first bring REAL to this size, with the crop and filter of train.py; with --ldm: the models'")
    g.add_argument("--crop", type=float, help="with --size: centre crop as in train.py, in pixels, or up to 1: a share")
    g.add_argument("--save", metavar="NPZ", help="write the statistics of the last side here")
    g.add_argument("--shuffle", action="store_true",
                   help="shuffle before the 10 splits of Inception Score, as torch-fidelity; the original does not")

    g = p.add_argument_group("models")
    g.add_argument("--ckpt", nargs="+", metavar="FILE", help="checkpoints to sample from: the rows of the table")
    ldm_flag(g)
    g.add_argument("--data", metavar="PATH",
                   help="the real images, prepared as the checkpoint's training did (default: what it was trained on)")
    g.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], metavar="N",
                   help="the columns of the table (default: 2 4 8 16 32 64)")
    g.add_argument("-n", type=int, default=30_000, metavar="N",
                   help="images to sample for each score (default: 30000, as in the paper)")
    g.add_argument("--guidance", type=float, default=1.0, metavar="W", help="classifier-free guidance (default: 1)")
    g.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    g.add_argument("--raw", action="store_true", help="the weights themselves instead of their average (EMA)")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="precision of the sampled model")
    g.add_argument("--decode-batch", type=int, metavar="N",
                   help="images of an LDM decoded at a time (default: 8 on a GPU, 1 on a CPU)")
    g.add_argument("--cache", metavar="DIR", help="where packed images are kept (default: $DSD_CACHE or ~/.cache/dsd)")
    g.add_argument("--out", default="out/fid", metavar="DIR",
                   help="folder for table.md and table.json (default: %(default)s)")
    args = p.parse_args(argv)
    if args.save and (Path(args.save).suffix != ".npz" or args.save in args.sides):
        p.error("--save needs a new file, ending in .npz")
    if args.ckpt and args.sides:
        p.error("give either two sides, or --ckpt with --data")
    if not args.ckpt and not (len(args.sides) == 2 or (len(args.sides) == 1 and args.save)):
        p.error("give REAL and FAKE, or one of them with --save, or --ckpt")
    if args.crop and not args.size:
        p.error("--crop goes with --size: it is part of bringing REAL to a model's size")
    if min(args.batch, *args.steps, *(v for v in (args.size, args.decode_batch) if v is not None)) < 1:
        p.error("--steps, --size and both batches must be at least 1")
    if args.n < 2 or args.seed < 0:
        p.error("out of range: -n at least 2, --seed at least 0")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    for path in [*(args.ckpt or []), *args.sides]:             # before a long download, and longer sampling
        if not Path(path).expanduser().exists():
            sys.exit(f"error: no such file or folder: {path}")
    try:
        needed = args.ckpt or not all(_is_statistics(path) for path in args.sides)
        features = load_features(args.weights, device, args.features) if needed else None
        compare_models(args, features, device) if args.ckpt else compare_files(args, features)
    except OSError as e:
        sys.exit(f"error: {e.filename or ''}: {e.strerror or e}")
    except KeyboardInterrupt:
        tell("stopped; the same command goes on: statistics and scores that were whole are kept")
        sys.exit(130)


def compare_files(args, features):
    sides = [statistics_of(path, features, None if i else args.size, args.crop, args.batch, args.shuffle)
             for i, path in enumerate(args.sides)]
    if rank():
        return
    if args.save:
        sides[-1].save(args.save)
        print(f"wrote {args.save}")
    if len(sides) == 2:
        card = compare(*sides)
        for name, value in card["scores"].items():
            if not name.endswith(" std"):
                spread = card["scores"].get(name + " std")
                print(f"{name}: {value:.6g}" + (f" ± {spread:.3g}" if spread is not None else ""))
        for part in ("real", "fake", "features"):
            print(f"{part}: " + ", ".join(f"{k} {v}" for k, v in card[part].items()))


def compare_models(args, features, device):
    results = {}
    for path in args.ckpt:                                     # each of them, before hours are spent on the first
        net, state = load_model(path, name=args.ldm, size=args.size)
        pick_classes(None, args.guidance, state)
        if "ldm" in state and not args.data:
            sys.exit(f"error: {path} is one of LDM's models: the images to compare with have to be given, as --data")
        try:
            Denoiser.of(net, state).schedule.times(max(args.steps))
        except ValueError as e:
            sys.exit(f"error: {path}: {e}")
    for path in args.ckpt:
        name = Path(path).parent.name or Path(path).stem
        results[name if name not in results else str(path)] = evaluate(args, path, features, device)
        if rank():
            continue
        text = table(results)                                  # after each model: an interrupted table is still a table
        _write(Path(args.out) / "table.md", text + "\n")
        _write(Path(args.out) / "table.json", json.dumps(results, indent=1))
    if rank() == 0:
        print(text)
        tell(f"wrote {args.out}/table.md and table.json")


if __name__ == "__main__":
    launch(main)
