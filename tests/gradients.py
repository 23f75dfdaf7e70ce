"""Gradients of one update in float64, for test_ranks.py: alone, or with others under torchrun.

    torchrun --nproc_per_node=2 tests/gradients.py train ACCUMULATE OUT.pt
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import distill  # noqa: E402
import train  # noqa: E402
from model import UNet, UNetConfig, launch, pick_device, rank, ranks  # noqa: E402

TINY = dict(channels=8, mult=(1, 2), blocks=1, attention=(), groups=4, head_channels=8, classes=3)


def gradients(method, accumulate=1):
    """{name: gradient} after the fourth update's backward passes. method: train, or a schedule of distill.py."""
    torch.set_default_dtype(torch.float64)
    try:
        device = pick_device("cpu")
        torch.manual_seed(0)
        net = UNet(UNetConfig(**TINY))
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
        settings = dict(batch=8, accumulate=accumulate, dtype="fp32", clip=1e9, lr=1e-9)
        about = dict(schedule="cosine", predicts="v", shape=[3, 8, 8], classes=["a", "b", "c"])
        x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
        stream = iter(lambda: (x.chunk(ranks())[rank()], y.chunk(ranks())[rank()]), None)
        if method == "train":
            args = train.parse_args(["--updates", "9"])
            vars(args).update(settings)
            run = train.Run(args, net, device, about)
            losses = train.Losses(run, stream, b=0.15)
        else:
            args = distill.parse_args(["--schedule", method, "--steps", "8", "--updates", "12"])
            vars(args).update(settings, stagger=method == "dsdi")
            run, losses = distill.setup(args, net, device, about, stream)
        for step in range(3):                                 # long enough for walks to end and begin on either rank
            run.update(losses(step))
        run.opt.step = lambda: None                           # the gradients are what is wanted
        zero_grad, run.opt.zero_grad = run.opt.zero_grad, lambda **_: None
        run.update(losses(3))
        found = {name: p.grad.clone() for name, p in net.named_parameters()}
        zero_grad()
        return found
    finally:
        torch.set_default_dtype(torch.float32)


def main():
    result = gradients(sys.argv[1], int(sys.argv[2]))
    if rank() == 0:
        torch.save(result, sys.argv[3])


if __name__ == "__main__":
    launch(main)
