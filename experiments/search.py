"""The search behind the defaults of distill.py: many settings on one model, judged by a quick score.

    python experiments/search.py --ckpt out/celeba32/ckpt.pt --data celeba-10k.zip --crop 0.787

The quick score is a Fréchet distance over the 256 features of a small random convolutional network, from 512
samples: good for ranking settings of one model, and comparable with nothing else. Beside it stands the standard
deviation of the pixels (8 steps), which tells over-sharpened samples from washed-out ones.
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from lab import distilled

from checkpoint import load_model
from data import load_data, to_tensor
from fid import frechet_distance
from plans import METHODS
from runtime import pick_device, pick_dtype
from sample import Sampler
from trainer import batches

STEPS = 2, 4, 8
RATES = [3e-6, 1e-5, 3e-5, 1e-4]
SETTINGS = [
    *(dict(schedule=s, lr=lr) for s in METHODS for lr in RATES),
    *(dict(schedule=s, lr=lr, target_ema=0.98) for s in ("dsdn", "dsdi", "dsdgl") for lr in (3e-5, 6e-5)),
    *(dict(schedule="dsdi", lr=lr, target_ema=d, ema=d) for d in (0.95, 0.99) for lr in (3e-5, 6e-5)),
    dict(schedule="dsdi", lr=1e-5, weight="none"),
    dict(schedule="dsdi", lr=1e-5, target="x0"),
]

class Features(nn.Module):
    """256 features of an image of any size: three strided convolutions with seeded random weights, averaged."""

    def __init__(self):
        super().__init__()
        generator, self.convs = torch.Generator().manual_seed(1), nn.ModuleList()
        for cin, cout, k in ((3, 64, 5), (64, 128, 3), (128, 256, 3)):
            conv = nn.Conv2d(cin, cout, k, stride=2, padding=k // 2)
            conv.weight.data = torch.randn(conv.weight.shape, generator=generator) * (2 / (cin * k * k)) ** 0.5
            conv.bias.data.zero_()
            self.convs.append(conv)

    @torch.no_grad()
    def forward(self, x):
        for conv in self.convs:
            x = conv(x).relu()
        return x.mean((2, 3))

def statistics(features, batches):
    """Mean and covariance of the features of batches of images."""
    x = torch.cat([features(x) for x in batches]).double()
    return x.mean(0), x.T.cov()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="out/celeba32/ckpt.pt")
    p.add_argument("--data")
    p.add_argument("--crop", type=float)
    p.add_argument("-n", type=int, default=512)
    args = p.parse_args()
    device, features = pick_device(), Features()
    net, state = load_model(args.ckpt, device)
    data = load_data(args.data, state["shape"][1], args.crop)
    real = statistics(features, (to_tensor(data.pixels[i:i + 250]) for i in range(0, len(data), 250)))

    def row(name, model):
        sampler, cells = Sampler(model, state, device, pick_dtype("auto", device)), []
        for steps in STEPS:
            x = torch.cat([sampler(range(i, i + 64), steps).float().cpu() for i in range(0, args.n, 64)]).clamp(-1, 1)
            cells.append(f"{frechet_distance(*statistics(features, x.split(250)), *real):.2f}")
        print(f"| {name} | {' | '.join(cells)} | {x.std():.3f} |", flush=True)

    print(f"| setting | {' | '.join(map(str, STEPS))} | std |")
    row("undistilled", net)
    for setting in SETTINGS:
        stream = batches(data, Namespace(batch=32, seed=0, flip=True), 0, device)
        row(" ".join(f"{k} {v}" for k, v in setting.items()),
            distilled(net, state, stream, dtype=pick_dtype("auto", device), **setting))

if __name__ == "__main__":
    main()
