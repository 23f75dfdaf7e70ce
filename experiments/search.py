"""The search behind the defaults of distill.py: many settings on one model, judged by a quick score.

    python experiments/search.py --ckpt out/celeba32/ckpt.pt --data celeba-10k.zip --crop 0.787

Beside the quick score of `common.py` stands the standard deviation of the pixels (8 steps), which tells over-sharpened
samples from washed-out ones.
"""

import argparse
from argparse import Namespace

from common import QuickScore
from lab import distilled

from checkpoint import load_model
from plans import METHODS
from runtime import pick_device, pick_dtype
from sample import Sampler
from trainer import batches

STEPS = 2, 4, 8
RATES = [3e-6, 1e-5, 3e-5, 1e-4]
SETTINGS = [
    *(dict(schedule=s, lr=lr) for s, method in METHODS.items() if not method.shortcut for lr in RATES),
    *(dict(schedule=s, lr=lr, target_ema=0.98) for s in ("dsdn", "dsdi", "dsdgl") for lr in (3e-5, 6e-5)),
    *(dict(schedule="dsdi", lr=lr, target_ema=d, ema=d) for d in (0.95, 0.99) for lr in (3e-5, 6e-5)),
    dict(schedule="dsdi", lr=1e-5, weight="none"),
    dict(schedule="dsdi", lr=1e-5, target="x0"),
]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="out/celeba32/ckpt.pt")
    p.add_argument("--data")
    p.add_argument("--crop", type=float)
    p.add_argument("-n", type=int, default=512)
    args = p.parse_args()
    device = pick_device()
    net, state = load_model(args.ckpt, device)
    score = QuickScore(args.data, state["shape"][1], args.crop, args.n)

    def row(name, model):
        sampler = Sampler(model, state, device, pick_dtype("auto", device))
        scores = [score(sampler, steps) for steps in STEPS]
        print(f"| {name} | {' | '.join(f'{s:.2f}' for s, _ in scores)} | {scores[-1][1]:.3f} |", flush=True)

    print(f"| setting | {' | '.join(map(str, STEPS))} | std |")
    row("undistilled", net)
    for setting in SETTINGS:
        stream = batches(score.data, Namespace(batch=32, seed=0, flip=True), 0, device)
        row(" ".join(f"{k} {v}" for k, v in setting.items()),
            distilled(net, state, stream, dtype=pick_dtype("auto", device), **setting))

if __name__ == "__main__":
    main()
