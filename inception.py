"""The Inception network behind FID, Inception Score and KID: its graph, its weights, and images in, features out.

    features = load_features(device="cuda")                   # the released weights: 96 MB, fetched once
    pool, logits = features(images)                           # images (B, H, W, 3) uint8 -> (B, 2048), (B, 1008)

It is the network of 2015 (Szegedy et al. 2016) as pytorch-fid uses it: the same weights, resized the same way, float32.
With --weights random nothing is fetched; such features compare models only with each other (Naeem et al. 2020).
"""

import hashlib
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from checkpoint import file_hash
from data import default_cache, wait_for_first_rank
from runtime import autocast, log_stderr

# ---- the network: its names are those of the released file ---------------------------------------------------
class Conv(nn.Conv2d):
    """Convolution, batch norm, ReLU; the batch norm lives in the weight and the bias, see `fold`."""

    def __init__(self, cin, cout, kernel, stride=1, padding=None, before=None):
        super().__init__(cin, cout, kernel, stride, padding or ("same" if stride == 1 else "valid"))
        self.before = before or nn.Identity()                 # a pooling

    def forward(self, x):
        return F.relu_(super().forward(self.before(x)))

class Branches(nn.Module):
    """Modules side by side on the same input, their channels concatenated in the order given."""

    def __init__(self, **branches):
        super().__init__()
        self.branches = list(branches.values())               # a plain list, in which PyTorch names nothing
        for name, branch in branches.items():
            for path, layer in branch.named_modules():        # the file's names: branch1x1, branch5x5_1, branch3x3_2a
                if isinstance(layer, Conv):
                    self.add_module(name + path.replace(".", ""), layer)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)

def chain(cin, *layers):
    """Layers one after the other: (channels, kernel) or (channels, kernel, stride) of a convolution, or a module."""
    named = nn.Sequential()
    for i, layer in enumerate(layers, 1):
        if isinstance(layer, tuple):
            layer, cin = Conv(cin, *layer), layer[0]
        named.add_module(f"_{i}", layer)
    return named

class Inception(nn.Module):
    """Inception v3 as in the 2015 TensorFlow graph: images (B, 3, 299, 299) in [-1, 1] -> features, logits.

    features (B, 2048): the spatial mean of the last block; logits (B, 1008), without bias, as Inception Score has them.
    """

    def __init__(self):
        super().__init__()
        halve = partial(nn.MaxPool2d, 3, 2)
        average = partial(nn.AvgPool2d, 3, 1, 1, count_include_pad=False)      # of real pixels only
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.pool_2 = halve()                                                  # (B, 64, 73, 73)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.pool_4 = halve()                                                  # (B, 192, 35, 35)
        for name, cin, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", Branches(
                branch1x1=Conv(cin, 64, 1),
                branch5x5=chain(cin, (48, 1), (64, 5)),
                branch3x3dbl=chain(cin, (64, 1), (96, 3), (96, 3)),
                branch_pool=Conv(cin, pooled, 1, before=average())))
        self.Mixed_6a = Branches(                                              # (B, 768, 17, 17)
            branch3x3=Conv(288, 384, 3, stride=2), branch3x3dbl=chain(288, (64, 1), (96, 3), (96, 3, 2)), pool=halve())
        for name, ch in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", Branches(
                branch1x1=Conv(768, 192, 1),
                branch7x7=chain(768, (ch, 1), (ch, (1, 7)), (192, (7, 1))),
                branch7x7dbl=chain(768, (ch, 1), (ch, (7, 1)), (ch, (1, 7)), (ch, (7, 1)), (192, (1, 7))),
                branch_pool=Conv(768, 192, 1, before=average())))
        self.Mixed_7a = Branches(                                              # (B, 1280, 8, 8)
            branch3x3=chain(768, (192, 1), (320, 3, 2)),
            branch7x7x3=chain(768, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)), pool=halve())
        for name, cin, pool in (("7b", 1280, average()), ("7c", 2048, nn.MaxPool2d(3, 1, 1))):     # as in that graph
            fork, fork_dbl = (Branches(a=Conv(384, 384, (1, 3)), b=Conv(384, 384, (3, 1))) for _ in range(2))
            self.add_module(f"Mixed_{name}", Branches(                         # (B, 2048, 8, 8)
                branch1x1=Conv(cin, 320, 1),
                branch3x3=chain(cin, (384, 1), fork),
                branch3x3dbl=chain(cin, (448, 1), (384, 3), fork_dbl),
                branch_pool=Conv(cin, 192, 1, before=pool)))
        self.fc = nn.Linear(2048, 1008, bias=False)

    def forward(self, x):
        for block in list(self.children())[:-1]:
            x = block(x)
        features = x.float().mean((2, 3))
        with torch.autocast(x.device.type, enabled=False):
            return features, self.fc(features)

class Features:
    """An Inception network that looks at 8-bit images.

    id: what statistics must share to be compared: the SHA-256 of the weights, or "random-…", and the precision."""

    def __init__(self, net, weights, device, dtype="fp32"):
        self.net, self.device, self.dtype = net, torch.device(device), dtype
        self.id = weights + ("" if dtype == "fp32" else "-" + dtype)

    @torch.no_grad()
    def __call__(self, images):
        """(H, W, 3) uint8 arrays of any sizes, or one (B, H, W, 3) -> features (B, 2048), logits (B, 1008), float32.

        Takes them one by one from an iterator, so that big ones need not be in memory together."""
        # Bilinear without antialiasing: as pytorch-fid does it, also where that shrinks an image.
        x = torch.cat([F.interpolate(torch.tensor(image).to(self.device).permute(2, 0, 1)[None] / 255, (299, 299),
                                     mode="bilinear", align_corners=False) for image in images])
        # On a GPU, "float32" convolutions would be TF32, a thousandth off, unless that is forbidden.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False)
        with autocast(self.device, self.dtype), exact:
            return self.net((2 * x - 1).contiguous(memory_format=torch.channels_last))

# ---- its weights ---------------------------------------------------------------------------------------------
FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + FILE
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RANDOM = "random"
HOW_TO_GET = (f"Get {URL} (95,628,359 bytes) and put it there, or give its place as --weights; "
              f"or use --weights random, whose scores are no FID")

def load_features(weights=None, device="cpu", dtype="fp32"):
    """The network of `--weights`: a file, "random", or None for the released one, fetched once. Exits on errors."""
    with torch.device("meta"):                                # draws no random numbers: those belong to training
        net = Inception().eval().requires_grad_(False)
    if weights == RANDOM:
        state, name = random_weights(net)
        net.load_state_dict(state, assign=True)
    else:
        path = Path(weights) if weights else fetch_weights()
        try:
            name = file_hash(path, digits=64)
            state = torch.load(path, map_location="cpu", weights_only=True)     # executes nothing
            net.load_state_dict(fold(state), assign=True)
        except Exception as e:  # an unreadable file fails in a dozen ways
            why = " ".join(str(e).split())[:160]
            sys.exit(f"error: {path} does not hold the Inception weights ({why}). {HOW_TO_GET}")
    return Features(net.to(device, memory_format=torch.channels_last), name, device, dtype)

def fold(state, eps=1e-3):
    """The released file's tensors as `Inception` holds them: each batch norm (γ, β, μ, σ²) folded into its convolution.

    Raises KeyError naming a tensor that is missing, or one too many."""
    rest = {key: tensor for key, tensor in state.items() if not key.endswith(".num_batches_tracked")}
    folded = {"fc.weight": rest.pop("fc.weight")}
    rest.pop("fc.bias")                                       # unused here, but a file without it is another file
    for name in [key.removesuffix(".conv.weight") for key in rest if key.endswith(".conv.weight")]:
        w, gamma, beta, mean, var = (rest.pop(f"{name}.{key}").double() for key in (
            "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"))
        weight, bias = fuse_conv_bn_weights(w, None, mean, var, eps, gamma, beta)
        folded |= {f"{name}.weight": weight.float(), f"{name}.bias": bias.float()}
    if rest:
        raise KeyError(f"surplus {min(rest)}")
    return folded

def random_weights(net):
    """Weights from numpy's generator, the same on every machine, and a name with their hash: state dict, name."""
    digest, state = hashlib.sha256(), {}
    for key, p in sorted(net.named_parameters()):
        scale = math.sqrt((1 if key == "fc.weight" else 2) / p[0].numel()) if p.ndim > 1 else 0.1
        values = np.random.default_rng(list(key.encode())).standard_normal(p.shape, np.float32) * np.float32(scale)
        digest.update(values.tobytes())
        state[key] = torch.from_numpy(values)
    return state, f"{RANDOM}-{digest.hexdigest()[:8]}"

def fetch_weights():
    """The released file in the cache folder, downloaded if it is not there, and whole or not at all. Exits offline."""
    path = default_cache() / FILE
    if wait_for_first_rank(path, lambda path: path.exists() and file_hash(path, digits=64) == SHA256):
        return path
    damaged = f"{path} is damaged, and " if path.exists() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log_stderr(f"fetching {URL}")
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)      # under another name until it is whole
    except Exception as e:  # so does a download
        sys.exit(f"error: {damaged}can't fetch the Inception weights into {path.parent} ({getattr(e, 'reason', e)}). "
                 f"{HOW_TO_GET}")
    return path
