"""The laboratory: self-distillation of a mixture of Gaussians in the plane, where everything is known exactly.

    python experiments/lab.py     # trains, distils with every method; out/lab: lab.md and lab.png; 23 minutes, busy

The ideal denoiser of a mixture is a formula, so is its sampling path; the model is a small MLP. A point is an
"image" (2, 1, 1), and the code under test is the very code of distill.py and shortcut.py: losses and loops.
"""

import argparse
import copy
import math
import types
from pathlib import Path

import numpy as np
import torch
from common import ROOT, cell, heading, row, write
from torch import nn

import distill
import train
from data import save_grid
from ddim import Cosine, Denoiser, ddim_sample
from model import zero
from plans import METHODS, plan
from runtime import progress
from shortcut import train_shortcut
from trainer import Trainer

SHAPE = [2, 1, 1]
MODEL_INFO = dict(schedule="cosine", predicts="v", shape=SHAPE, classes=[])

class Mixture(Denoiser):
    """Eight Gaussians on a circle, of different weights. Its denoiser is exact: x̂(z_t) = E[x | z_t]."""

    def __init__(self, count=8, radius=1.2, std=0.12):
        angle = torch.arange(count) * (2 * math.pi / count)
        self.mean, self.std = radius * torch.stack([angle.cos(), angle.sin()], 1), std
        self.weight = torch.linspace(1, 2, count) / torch.linspace(1, 2, count).sum()
        super().__init__(None, Cosine(), "x")

    def draw(self, n, generator=None):
        """n exact samples (n, 2, 1, 1)."""
        which = torch.multinomial(self.weight, n, replacement=True, generator=generator)
        return (self.mean[which] + self.std * torch.randn(n, 2, generator=generator))[:, :, None, None]

    def __call__(self, z, t, y=None, w=1.0, d=0.0):
        """E[x | z_t] (B, 2, 1, 1): each component's posterior mean, weighted by its posterior probability."""
        a, s = self.schedule(torch.as_tensor(t).expand(len(z)))
        a, s, z = a[:, :, 0, 0], s[:, :, 0, 0], z[:, :, 0, 0]
        variance = (a * self.std) ** 2 + s ** 2                               # of z_t within a component (B, 1)
        off = z[:, None] - a[:, None] * self.mean                             # (B, K, 2)
        p = (self.weight.log() - off.square().sum(2) / (2 * variance)).softmax(1)
        means = self.mean + (a * self.std ** 2 / variance)[:, None] * off
        return (p[:, :, None] * means).sum(1)[:, :, None, None]

class MLP(nn.Module):
    """v̂(z_t, t) of a point."""

    def __init__(self, width=128):
        super().__init__()
        self.config = types.SimpleNamespace(classes=0, step_length=False)
        self.freqs = math.pi * torch.arange(1, 9) / 2
        self.layers = nn.Sequential(nn.Linear(2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def add_step_length(self):
        """As the UNet takes it on: nothing changes at first, and at d = 0 never."""
        self.config, width = types.SimpleNamespace(classes=0, step_length=True), self.layers[0].out_features
        self.length = nn.Sequential(nn.Linear(16, width, bias=False), nn.SiLU(),
                                    zero(nn.Linear(width, width, bias=False)))
        return self

    def forward(self, z, t, d=None):
        t, d = (torch.as_tensor(v, dtype=z.dtype).expand(len(z))[:, None] * self.freqs
                for v in (t, 0.0 if d is None else d))
        h = self.layers[0](torch.cat([z[:, :, 0, 0], t.sin(), t.cos()], 1))
        if self.config.step_length:
            h = h + self.length(torch.cat([d.sin(), d.cos() - 1], 1))
        return self.layers[1:](h)[:, :, None, None]

def trained(mixture, updates=3000, batch=512, seed=0):
    """An MLP trained as train.py trains (v-prediction, cosine schedule), its rate falling to zero."""
    torch.manual_seed(seed)
    net, schedule = MLP(), mixture.schedule
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in range(updates):
        opt.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * step / updates)) / 2
        x, eps, t = mixture.draw(batch), torch.randn(batch, *SHAPE), torch.rand(batch)
        a, s = schedule(t)
        loss = (net(a * x + s * eps, t) - (a * eps - s * x)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net.eval()

def in_the_lab(net, mixture, schedule, lr, updates=600, batch=256, seed=0, pool=500, **settings):
    """The averaged weights of a copy of `net` after one of the methods, by the code of distill.py. Writes no files.

    pd reads data from the mixture, shortcut `pool` samples of the network's own. settings: flags of distill.py, by
    name"""
    torch.manual_seed(seed)
    own = points(net, 64, pool, seed=3)[:, :, None, None] if METHODS[schedule].shortcut else None
    def draw():
        x = mixture.draw(batch) if own is None else own[torch.randint(len(own), (batch,))]
        return x, torch.zeros(batch, dtype=torch.long)
    student = copy.deepcopy(net)
    if METHODS[schedule].shortcut:
        student.add_step_length()
    args = distill.parse_args(["--schedule", schedule, "--lr", str(lr)])
    vars(args).update(dict(updates=updates, batch=batch, warmup=updates // 10, dtype="fp32", seed=seed, out=None)
                      | settings)
    trainer = Trainer(args, student.requires_grad_(True), torch.device("cpu"), MODEL_INFO, ema_warmup=False)
    distill.loop_of(schedule)(trainer, plan(schedule, args.steps, args.updates), iter(draw, None))
    return trainer.ema

def trained_to_jump(mixture, updates=3000, batch=512, seed=0, b=0.25):
    """The averaged weights of an MLP trained by `train.py --distill 0.25 --shortcut`'s code, its rate falling to 0."""
    args = train.parse_args(["--distill", str(b), "--shortcut", "--seed", str(seed)])
    vars(args).update(updates=updates, batch=batch, lr=2e-3, lr_end=1e-9, times="uniform", out=None, dtype="fp32")
    torch.manual_seed(seed)
    trainer = Trainer(args, MLP().add_step_length(), torch.device("cpu"), MODEL_INFO)
    train_shortcut(trainer, iter(lambda: (mixture.draw(batch), torch.zeros(batch, dtype=torch.long)), None), b)
    return trainer.ema

def points(model, steps, n=4000, seed=1):
    """n samples (n, 2) of a network, or of the exact denoiser, in N steps, always from the same noise."""
    z = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))
    xhat = model if isinstance(model, Mixture) else Denoiser.of(model, MODEL_INFO)
    return ddim_sample(xhat, z, steps)[:, :, 0, 0]

def distance(a, b, directions=64):
    """Sliced Wasserstein-2 distance of two sets of as many points (n, 2): 0 means the same distribution."""
    angle = torch.arange(directions) * (math.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])                            # (2, directions)
    gap = (a @ axes).sort(0).values - (b @ axes).sort(0).values
    return gap.square().mean().sqrt().item()

STEPS = 1, 2, 4, 8, 64

def exact_points(mixture, n, seed=2):
    """n exact samples (n, 2) of the mixture."""
    return mixture.draw(n, torch.Generator().manual_seed(seed))[:, :, 0, 0]

def distances(model, mixture, n=4000):
    """Sliced Wasserstein-2 distance of N-step samples to the exact distribution, for N in STEPS."""
    return [distance(points(model, steps, n), exact_points(mixture, n)) for steps in STEPS]

def noise_of_distances(mixture, n=4000):
    """Distances of nine other sets of exact samples to that one: what `distances` can't tell from nothing."""
    return [distance(exact_points(mixture, n, seed), exact_points(mixture, n)) for seed in range(3, 12)]

def density(points, side=64, extent=1.8):
    """A picture (3, side, side) in [-1, 1] of where points (n, 2) lie: dark where many are."""
    counts = np.histogram2d(*points.numpy().T, bins=side, range=[[-extent, extent]] * 2)[0]
    dark = np.sqrt(counts / np.quantile(counts, 0.995).clip(1)).clip(0, 1)
    return torch.from_numpy(1 - 2 * dark).float().expand(3, -1, -1)

# Rates that improve 2 and 4 steps without spoiling 8, of 5e-6 … 3e-3.
SETTINGS = {
    "dsdn": dict(lr=1e-5), "dsdi": dict(lr=1e-5), "dsdgl": dict(lr=1e-5), "dsdgexp": dict(lr=1e-5),
    "tsd": dict(lr=5e-5), "pd": dict(lr=3e-5), "shortcut": dict(lr=1e-3, lr_end=1e-4, ema=0.95),
}
STEADIED = dict(schedule="dsdi", lr=2e-4, target_ema=0.995, ema=0.995)
FEW = dict(schedule="dsdgl", lr=3e-5, updates=128)            # from 64 steps hardly a trajectory is walked to its end

def all_models(mixture, seed):
    """{name: model}: the exact denoiser, trained networks, and one distilled by each method."""
    net = trained(mixture, seed=seed)
    models = {"exact denoiser": mixture, "trained": net}
    models |= {name: in_the_lab(net, mixture, name, seed=seed, **settings) for name, settings in SETTINGS.items()}
    models["dsdi, D = 0.995"] = in_the_lab(net, mixture, seed=seed, **STEADIED)
    models["shortcut, 10 x the updates"] = in_the_lab(net, mixture, "shortcut", seed=seed, updates=6000,
                                                      **SETTINGS["shortcut"])
    models["dsdgl, P = 128"] = in_the_lab(net, mixture, seed=seed, **FEW)
    models["dsdgl, P = 128, from 20 steps"] = in_the_lab(net, mixture, seed=seed, steps=20, **FEW)
    return models | {"trained with --shortcut": trained_to_jump(mixture, seed=seed),
                     "trained with --shortcut, 10 x the updates": trained_to_jump(mixture, 30_000, seed=seed)}

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="(default: 0 1 2)")
    p.add_argument("--out", default=ROOT / "out" / "lab", type=Path, metavar="DIR",
                   help="for the table and its picture (default: out/lab; those of the docs are in docs)")
    args = p.parse_args(argv)
    mixture, runs = Mixture(), []
    for seed in progress(iterable=args.seeds, desc="the laboratory", unit="seed"):
        models = all_models(mixture, seed)
        runs.append({name: distances(model, mixture) for name, model in models.items()})
        if seed == args.seeds[0]:
            pictures = [density(points(model, steps, 40_000)) for model in models.values() for steps in STEPS]
            save_grid(torch.stack(pictures), args.out / "lab.png", len(STEPS), list(models))
    found = {name: [run[name] for run in runs] for name in runs[0]}
    write(args.out / "lab.md", page("`python experiments/lab.py`", found))

def page(command, found):
    """A table in Markdown. found: {name: `distances` of each seed}."""
    noise, seeds = noise_of_distances(Mixture()), len(next(iter(found.values())))
    lines = [f"{command}: sliced Wasserstein-2 distance of 4,000 samples of N steps to 4,000 exact ones, mean of "
             f"{seeds} seeds of training and of distillation ± half their range, in float32. Other exact samples have "
             f"{min(noise):.3f} to {max(noise):.3f}: what is no farther can't be told from exact. All rows have the "
             f"same noise and the same exact samples, so that less parts them.", "", heading("model", *STEPS)]
    return "\n".join([*lines, *(row(name, map(cell, zip(*runs, strict=True))) for name, runs in found.items())])

if __name__ == "__main__":
    main()
