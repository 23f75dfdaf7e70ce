"""Beyond the paper: tell the network how far it jumps, and self-distillation can come to rest.

    python train.py --distill 0.25 --shortcut     # one training, samples in 1 … 64 steps
    python distill.py --schedule shortcut         # the same for a trained model, from its own samples

The paper asks one output x̂(z_t) for two things: the direction of a small step, and the aim of a big jump. They are
different functions, so Algorithm 2 chases itself and never rests. Here the network is told the length d of its step:
x̂_θ(z_t, t, d) is the clean image with which one DDIM step t → t − d lands where the flow does. d = 0 is the ordinary
denoiser. A share of the rows of each batch learns to jump, the others learn from data as ever:

    L = ‖v' − v''‖²          v' = v̂_θ(z_t, t, d), and v'' = (α_t z_t − x'') / σ_t of the x'' with which one step lands
                             where two steps of d/2 by a running average of the weights do (ddim_target)
    L = ‖v' − v_t‖²          d = 0: the diffusion loss of Equation 1

It is Equation 1 with another second term. In training, over the whole run a share b of the rows jumps: none in the
first half of the updates, when there is nothing yet to jump to, and 2b in the second, with three times the weight. N
steps are sampled with d = 1/N, or with two lengths (ddim.jump_times). In fine-tuning the rows that do not jump learn
from the undistilled model, whose targets have no noise, as in F2D2 (Ai et al. 2025).

Relatives: shortcut models (Frans et al. 2024), whose loss this is, but for the schedule and the real d; TRACT
(Berthelot et al. 2023): this x'' with an average as the teacher, and no d; flow-map self-distillation (Boffi et al.
2025); MeanFlow (Geng et al. 2025); Align Your Flow (Sabour et al. 2025).
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

from checkpoint import naming
from data import Images, mapped
from ddim import LEVELS, ddim_target, to_x
from runtime import broadcast, local_rows, log_stderr, map_over_ranks, progress, rank

# ---- the loss -----------------------------------------------------------------------------------------------
def to_v(xhat, out, z, a, s):
    """v = (α z − x) / σ of the clean image x that an output of the Denoiser x̂'s network stands for."""
    return out if xhat.kind == "v" else (a * z - to_x(xhat.kind, out, z, a, s)) / s

def squared_error(v, target, s):
    """‖v' − v''‖² of each pixel (B, C, H, W), before its mean. experiments/settings.py tries others, with σ = s."""
    return (v - target).square()

def shortcut_loss(xhat, average, x, eps, t, d, y, jumps, rest, anchor=None, w=1.0, weight=1.0):
    """The loss of a batch of which some rows jump, from one evaluation with gradient.

    xhat, average  Denoisers of v̂_θ and of the running average of its weights, which makes the targets of jumps
    x, eps         (B, C, H, W) data and noise;  t, d  (B,) times and step lengths, d = 0 in rows that do not jump
    y              (B,) labels or None;  jumps, rest  the indices of the rows that jump, and of those that do not
    anchor         Denoiser of the undistilled model, from which the rest then learns; None: it learns from the data
    w              guidance weight in the targets of the shortest steps; longer ones inherit it (Frans et al.)
    weight         of the rows that jump, in the loss
    returns        loss (scalar), and by name what each kind of row adds to it, before the weight"""
    a, s = xhat.schedule(t)
    z = a * x + s * eps
    v = to_v(xhat, xhat.output(z, t, y, d=d), z, a, s)        # v', the one evaluation with a gradient
    target = a * eps - s * x
    def rows(which):
        return [value if value is None else value[which] for value in (z, t, y, a, s)]
    if anchor:
        target[rest] = anchor_target(anchor, *rows(rest))
    if len(jumps):
        target[jumps] = shortcut_target(average, *rows(jumps), d[jumps], w)
    error = squared_error(v, target, s)
    jumped = error[jumps].sum() / error.numel()
    return error.mean() + (weight - 1) * jumped, {"v": error.mean() - jumped, "jump": jumped}

@torch.no_grad()
def anchor_target(anchor, z, t, y, a, s):
    """v̂ (B, C, H, W) of the undistilled model at d = 0: the target of the rows that do not jump."""
    return to_v(anchor, anchor.output(z, t, y), z, a, s)

@torch.no_grad()
def shortcut_target(average, z, t, y, a, s, d, w=1.0):
    """v'' (B, C, H, W) of the one step of length d > 0 that lands where two of d/2 do; for the shortest d, where two
    steps of the ordinary denoiser (d = 0), guided by w, do."""
    shortest = d < 1.5 * 0.5 ** (LEVELS - 1)
    cond = dict(y=y, d=torch.where(shortest, 0, d / 2))
    if y is not None and w != 1:
        cond["w"] = torch.where(shortest, w, 1.0)[:, None, None, None]
    x2, _ = ddim_target(average, z, average(z, t, **cond), t, t - d / 2, t - d, **cond)
    return (a * z - x2) / s

def jump_rows(batch, b):
    """Which rows of a batch jump (B,) bool: a share b of them, spread evenly, so that every part has its share."""
    row = torch.arange(batch + 1, dtype=torch.float64)
    return (row * b + 1e-9).floor().diff() > 0

def step_lengths(jump, t, k):
    """(t, d) (B,). Where `jump`: d = 2^-k, t rounded up to a multiple of d, so that t − d >= 0; elsewhere t and 0."""
    d = 0.5 ** k
    return torch.where(jump, (t / d).ceil() * d, t), torch.where(jump, d, 0.0)

def kinds_of_rows(trainer, b):
    """(mask of this rank's rows that jump, [(their indices, indices of the rest) for each --accumulate part])."""
    jump, device = local_rows(jump_rows(trainer.args.batch, b)), trainer.device
    parts = [tuple(mask.nonzero().flatten().to(device) for mask in (part, ~part))
             for part in jump.chunk(trainer.args.accumulate)]
    return jump.to(device), parts

def shortcut(trainer, stream, b, anchor=None, w=1.0, weight=1.0, start=0):
    """The loss on batch after batch of a stream of (x, y), this rank's rows of each.

    b      the share of the rows that jump, from update `start` on
    anchor the undistilled network, or None;  w, weight  see `shortcut_loss`"""
    xhat, average = trainer.denoiser(), trainer.denoiser(trainer.target_net())
    anchor = anchor and trainer.denoiser(anchor)
    early, late = kinds_of_rows(trainer, 0), kinds_of_rows(trainer, b)
    for step in trainer.steps():                              # logs, saves, resumes, stops
        jump, kinds = late if step >= start else early
        x, y = next(stream)
        t, eps = trainer.times(), trainer.randn(*x.shape[1:])
        y = trainer.drop_labels(y) if trainer.net.config.classes else None
        t, d = step_lengths(jump, t, trainer.randint(LEVELS))
        for (jumps, rest), part in zip(kinds, trainer.parts(x, eps, t, d, y), strict=True):
            with trainer.autocast():
                loss, terms = shortcut_loss(xhat, average, *part, jumps, rest, anchor, w, weight)
            trainer.backward(loss, terms)
        trainer.update()

def train_shortcut(trainer, stream, b, w=1.0, weight=3.0, start=0.5):
    """Training: a share b of all rows jumps, none in the first half of the updates, since nothing is known to jump to.

    Jumps weigh three times as much as data, whose noise would drown them in Adam's normalised steps. `start` is the
    share of the updates before the first jump."""
    shortcut(trainer, stream, b / (1 - start), w=w, weight=weight, start=int(start * trainer.args.updates))

# ---- data of its own ----------------------------------------------------------------------------------------
class OwnSamples(Images):
    """Samples of the undistilled model as a data set: `batch` gives what it draws (B, C, H, W), and labels.

    Drawn once, by all ranks, into a memory-mapped file in half precision, OUT/pool-….f16. Its name holds a hash of
    all that decides what is drawn, `settings` included. Drawing goes on where it was interrupted. Raises OSError on a
    full disk."""

    FIRST = 1_000_000_000                                     # from noise that no picture and no score starts from

    def __init__(self, out, sampler, n, steps, batch, settings):
        digest = hashlib.sha256(json.dumps([settings, n, steps]).encode()).hexdigest()[:12]
        self.path, shape = Path(out) / f"pool-{digest}.f16", (n, *sampler.shape)
        if not broadcast(self.path.exists()):
            self._draw(self.path, shape, sampler, steps, batch)
        broadcast(None)                                       # rank 0 has written all of it
        self.samples = mapped(self.path, np.float16, shape)
        labels = sampler.labels([self.FIRST + i for i in range(n)])
        self.labels = np.zeros(n, int) if labels is None else labels.cpu().numpy()

    def __len__(self):
        return len(self.samples)

    def read(self, index, mirrored):
        """Samples number `index` (B,) as (B, C, H, W) float32; never mirrored: latents have no mirror image."""
        return torch.from_numpy(self.samples[index].astype(np.float32))

    def _draw(self, path, shape, sampler, steps, batch):
        part, one = path.with_suffix(".part"), 2 * int(np.prod(shape[1:]))     # bytes of a sample
        done = broadcast(part.stat().st_size // one if part.exists() else 0)
        log_stderr(f"drawing {shape[0]:,} samples of its own: {shape[0] * steps:,} evaluations, "
                   f"{shape[0] * one / 1e6:,.0f} MB; kept as {path}")
        jobs = [range(k, min(k + batch, shape[0])) for k in range(done, shape[0], batch)]
        def draw(job):
            return sampler.draw([self.FIRST + i for i in job], steps).half().cpu().numpy()
        drawn = map_over_ranks(jobs, draw)
        with (naming(part), open(os.devnull if rank() else part, "ab") as f,
              progress(total=shape[0], initial=done, unit="img") as bar):
            if rank() == 0:
                f.truncate(done * one)                        # what was cut off in the middle is drawn again
            for job, x in zip(jobs, drawn, strict=False):     # nothing is drawn on other ranks than 0
                f.write(x.tobytes())
                f.flush()
                bar.update(len(job))
        if rank() == 0:
            os.replace(part, path)
