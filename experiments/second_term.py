"""Why Equation 1 hardly helps: the gradient of its second term beside that of its first, at several step lengths.

    python experiments/second_term.py --ckpt out/train                     # prints a table; seconds

Of a trained model, on images that it may have seen, with b = 0.15: the norms of the two weighted gradients.
"""

import argparse

import torch
from common import heading, row

from checkpoint import load_model, trained_on
from data import load_data
from ddim import Denoiser
from flags import checkpoint
from train import training_loss

B, STEPS = 0.15, (1 / 128, 1 / 16, 1 / 4)                     # the paper's weight; t − t', of which the first is ours

def shares(net, state, x):
    """For each of STEPS the norm of the second term's gradient, as a share of the first's, on images x (N, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    t, eps = 1 - torch.rand(len(x), generator=generator), torch.randn(x.shape, generator=generator)
    def norm(loss):
        grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        return torch.stack([g.norm() for g in grads]).norm().item()
    for step in STEPS:
        _, terms = training_loss(Denoiser.of(net, state), x, t, eps, None, B, step)
        yield norm(B * terms["x"]) / norm((1 - B) * terms["v"])

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", type=checkpoint, default="out/train/ckpt.pt", help="a model of train.py without classes")
    p.add_argument("-n", type=int, default=512, help="images (default: %(default)s)")
    args = p.parse_args(argv)
    net, state = load_model(args.ckpt)
    origin = trained_on(state)
    images = load_data(origin["data"], state["shape"][1], origin["crop"])
    x, _ = images.batch(0, args.n, seed=1)
    print(heading("t − t'", *(f"1/{1 / step:g}" for step in STEPS)))
    found = shares(net.requires_grad_(True), state, x)
    print(row("second term's gradient, share of the first's", [f"{s:.1%}" for s in found]))

if __name__ == "__main__":
    main()
