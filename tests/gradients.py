"""Gradients of one update of each method, for test_ranks.py and experiments/gpu.py: alone, or under torchrun.

    torchrun --nproc_per_node=2 tests/gradients.py OUT.pt cpu
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import distill
import train
from model import UNet, UNetConfig
from plans import plan
from runtime import launch, local_rows, pick_device, rank
from shortcut import train_shortcut
from trainer import Trainer

TINY = dict(channels=8, mult=(1, 2), blocks=1, attention=(), groups=4, head_channels=8, classes=3)
# Into how many parts each takes a batch
METHODS = {"plain": 1, "train": 2, "train --shortcut": 2, "dsdi": 1, "tsd": 2, "pd": 1, "shortcut": 2}
LOOPS = {"plain": partial(train.train, b=0), "train": partial(train.train, b=0.15),
         "train --shortcut": partial(train_shortcut, b=0.25)}          # without jumps until the fourth of six updates

class FourUpdates(Trainer):
    """Its loop makes four updates, of which the last leaves its gradients and no step."""

    def steps(self):
        step, zero_grad = self.opt.step, self.opt.zero_grad
        for self.step in range(4):                            # noqa: B020 (long enough for walks to end and begin)
            if self.step == 3:
                self.opt.step, self.opt.zero_grad = (lambda: None), (lambda **_: None)
            yield self.step
        self.gradients = {name: p.grad.cpu() for name, p in self.net.named_parameters()}
        self.opt.step, self.opt.zero_grad = step, zero_grad
        zero_grad()

def gradients(method, accumulate=1, device="cpu", dtype=torch.float64, lr=1e-9):
    """{name: gradient} after the fourth update's backward passes. method: of METHODS."""
    torch.set_default_dtype(dtype)
    try:
        device = pick_device(device)
        torch.manual_seed(0)
        net = UNet(UNetConfig(**TINY, step_length="shortcut" in method))
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
        x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 3   # before a Trainer seeds each rank apart, for dropout
        flags = ["--updates", "6"] if method in LOOPS else ["--schedule", method, "--steps", "8", "--updates", "12"]
        args = (train if method in LOOPS else distill).parse_args(flags)
        vars(args).update(batch=8, accumulate=accumulate, dtype="fp32", clip=1e9, lr=lr, out=None)
        trainer = FourUpdates(args, net, device, dict(schedule="cosine", predicts="v", shape=[3, 8, 8]))
        stream = iter(lambda: (local_rows(x).to(device), local_rows(y).to(device)), None)
        if method in LOOPS:
            LOOPS[method](trainer, stream)
        else:
            distill.loop_of(method)(trainer, plan(method, 8, 12), stream)
        return trainer.gradients
    finally:
        torch.set_default_dtype(torch.float32)

def main():
    out, device = sys.argv[1:]
    found = {method: gradients(method, accumulate, device) for method, accumulate in METHODS.items()}
    if rank() == 0:
        torch.save(found, out)

if __name__ == "__main__":
    launch(main)
