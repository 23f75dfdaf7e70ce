"""Noise schedules, DDIM, its inverse, and sampling: the mathematics of the paper, and nothing else.

    xhat = Denoiser(net, Cosine(), "v")
    x = ddim_sample(xhat, start_noise(0, range(16), (3, 64, 64)), steps=8)      # 16 images, 8 evaluations each

Notation, the same in every file (the paper's, section 3):
    t, t1, t2    times t > t' > t'' in [0, 1]: 1 is noise, 0 is data. A float, or a tensor (B,): one time per image
    z, z1, z2    noisy images z_t, z_t', z_t'' (B, C, H, W); ε is the noise in them
    x, x1, x2    clean images: the data x; the model's x' = x̂(z_t); the target x''
    a, s         α_t and σ_t: z_t = α_t x + σ_t ε with α_t² + σ_t² = 1
    y            class indices (B,), or None; w is the guidance weight
    d            the length of a step, for networks that are told it (beyond the paper: shortcut.py)
"""

import math
from itertools import pairwise

import numpy as np
import torch

WITHOUT_FLOAT64 = {"mps"}                                     # devices of Apple's GPUs

# ---- noise schedules ----------------------------------------------------------------------------
class Schedule:
    """α_t and σ_t for t in [0, 1], and the times at which N DDIM steps evaluate the network.

    A subclass gives `alpha`: α_t of a float64 tensor t, between 0 and 1."""

    def sigma(self, t):
        return (1 - self.alpha(t).square()).sqrt()

    def __call__(self, t):
        """(α_t, σ_t) that multiply images: scalars for one time, (B, 1, 1, 1) for a time per image.

        Computed in float64, because near t = 0 and 1 one of the two is a small difference; the result
        has the precision of t (a float counts as float64: as a scalar, it does not promote images to that)."""
        t = torch.as_tensor(t, dtype=None if torch.is_tensor(t) else torch.float64)
        shape = (-1, 1, 1, 1) if t.ndim else ()
        exact = t if t.device.type in WITHOUT_FLOAT64 else t.double()
        return tuple(f(exact).to(t.dtype).reshape(shape) for f in (self.alpha, self.sigma))

    def log_snr(self, t):
        """λ_t = log(α_t² / σ_t²) (Algorithms 1 and 2), kept within ±20 so that it is finite at t = 0 and 1."""
        a, s = self(t)                                        # α_1 may be rounded to a little below 0
        return (2 * (a.clamp(min=1e-12).log() - s.log())).clamp(-20, 20)

    @staticmethod
    def equal_times(steps):
        """N equal intervals, t_i = i / N, i = N … 0. Every other time of N steps is one of N/2, which distillation
        relies on: the jumps of one depth are the steps of the next."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return [i / steps for i in range(steps, -1, -1)]

    def times(self, steps):
        """The N + 1 times of N DDIM steps when sampling, from noise to data."""
        return self.equal_times(steps)

    def shown(self, t):
        """The time that the network is shown at time t."""
        return t

class Cosine(Schedule):
    """α_t = cos(π t / 2): the continuous schedule of our own v-prediction models (Salimans & Ho 2022)."""

    def alpha(self, t):
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t):                                       # exact near t = 0, where √(1 − cos²) loses digits
        return torch.sin(math.pi / 2 * t)

class LDMDiscrete(Schedule):
    """The 1000 discrete steps of the LDM checkpoints: time t is step round(1000 t), at most 999.

    β runs from 0.0015 to 0.0195, linearly in √β (CompVis calls this one "linear"); α_t² = Π (1 − β)."""

    length = 1000

    def __init__(self):
        betas = np.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, self.length) ** 2
        # The original keeps this table in float32, and its samples depend on those digits.
        self.alpha2 = torch.from_numpy(np.cumprod(1 - betas).astype(np.float32).astype(np.float64))
        self.tables = {}                                      # copies of it by device

    def alpha(self, t):
        if t.device not in self.tables:                       # once: a GPU waits for each copy
            self.tables[t.device] = self.alpha2.to(t.device, t.dtype)
        return self.tables[t.device][self._step(t).long()].sqrt()

    def _step(self, t):                                       # in float32: a half must round alike in every precision
        return (self.length * t.float()).round().clamp(0, self.length - 1)

    def shown(self, t):
        """The very step whose α is used: the network was trained on whole steps 0 … 999."""
        if torch.is_tensor(t):
            return (self._step(t) / self.length).to(t.dtype)
        return self._step(torch.tensor(t, dtype=torch.float64)).item() / self.length

    def times(self, steps):
        """LDM's own rule where N divides 1000 (steps 1, 1 + c, 1 + 2c … with c = 1000 / N), else t_i = i / N.

        N = 1 is i / N too: LDM's rule would show pure noise to the network as if it were step 1. Both rules
        end on step 0, whose α is not quite 1: LDM's samples keep that trace of noise, and so do ours."""
        if not 1 <= steps < self.length:
            raise ValueError(f"steps must be between 1 and {self.length - 1} with this schedule, got {steps}")
        if self.length % steps or steps == 1:
            return self.equal_times(steps)
        return [(i - 1) / steps + 1 / self.length for i in range(steps, 0, -1)] + [0.0]

class LDMDistilled(LDMDiscrete):
    """The same for a distilled model, which is sampled where it has learned its jumps: at t_i = i / N for every N,
    or at `jump_times`."""

    def times(self, steps):
        super().times(steps)                                  # the same limits
        return self.equal_times(steps)

SCHEDULES = {"cosine": Cosine, "ldm": LDMDiscrete, "ldm-distilled": LDMDistilled}

# w(λ_t) of Algorithms 1 and 2 by name. snr: the truncated signal-to-noise ratio (section 4.1; Salimans & Ho 2022).
WEIGHTS = {"snr": lambda log_snr: log_snr.exp().clamp(min=1), "none": torch.ones_like}

# ---- what the network predicts --------------------------------------------------------------------
def to_x(kind, out, z, a, s):
    """The clean image that a network's output stands for. kind: "v" (= α ε − σ x), "eps" or "x"."""
    if kind == "v":
        return a * z - s * out
    if kind == "eps":
        return (z - s * out) / a
    if kind != "x":
        raise ValueError(f"unknown prediction {kind!r}: v, eps or x")
    return out

class Denoiser:
    """x̂_θ(z_t): a network together with its schedule and what it predicts.

    net        net(z, t, y) -> (B, C, H, W); y only if the network has classes
    schedule   a Schedule;  kind  "v", "eps" or "x"
    null       the class index that means "no class", needed for guidance
    lengths    whether the network is told the length d of its step, as net(…, d=d); if not, d is never passed"""

    def __init__(self, net, schedule, kind="v", null=None, lengths=False):
        self.net, self.schedule, self.kind, self.null, self.lengths = net, schedule, kind, null, lengths

    @classmethod
    def of(cls, net, state):
        """The denoiser of a checkpoint, as `checkpoint.load_model` returns it: (net, state)."""
        c = net.config
        return cls(net, SCHEDULES[state["schedule"]](), state["predicts"], c.classes or None, c.step_length)

    def times(self, steps):
        """The N + 1 times of N DDIM steps when sampling, from noise to data. Raises ValueError if N is out of range."""
        times = self.schedule.times(steps)                    # whose limits of N hold in either case
        return jump_times(steps) if self.lengths else times

    def output(self, z, t, y=None, w=1.0, d=None):
        """The network's own output; if w ≠ 1 guided: null + w (class − null), in one batch (Ho & Salimans 2022).

        w: a number, None for 1, or a tensor (B, 1, 1, 1) with a weight for each image (which is then always guided).
        Raises ValueError for guidance of a model without a null class."""
        t, d = self.schedule.shown(t), dict(d=d) if self.lengths and d is not None else {}
        if y is None:
            return self.net(z, t, **d)
        if w is None or (not torch.is_tensor(w) and w == 1.0):
            return self.net(z, t, y, **d)
        if self.null is None:
            raise ValueError("guidance needs a model with a null class")
        def twice(x):
            return torch.cat([x, x]) if torch.is_tensor(x) else x
        y, d = torch.cat([torch.full_like(y, self.null), y]), {k: twice(v) for k, v in d.items()}
        without, with_class = self.net(twice(z), twice(t), y, **d).chunk(2)
        return without + w * (with_class - without)

    def __call__(self, z, t, y=None, w=1.0, d=None):
        """The predicted clean image (B, C, H, W), not clipped: the paper's algorithms do not clip."""
        a, s = self.schedule(t)
        return to_x(self.kind, self.output(z, t, y, w, d), z, a, s)

# ---- DDIM -------------------------------------------------------------------------------------------
def ddim_step(schedule, z, x, t, t1):
    """One DDIM step z_t -> z_t', given the clean image x that was predicted at t (Algorithms 1 and 2).

        z_t' = α_t' x + (σ_t' / σ_t) (z_t − α_t x)"""
    (a, s), (a1, s1) = schedule(t), schedule(t1)
    r = s1 / s.clamp(min=1e-12)                               # at t = t' = 0 there is nothing to do: 0 / 0 counts as 0
    return a1 * x + r * (z - a * x)

def ddim_inverse(schedule, z, z1, t, t1):
    """The x that a single step from z_t to z_t' must have used: `ddim_step` solved for x (Algorithms 1 and 2).

        x = (z_t' − (σ_t' / σ_t) z_t) / (α_t' − (σ_t' / σ_t) α_t)            defined for t' < t"""
    (a, s), (a1, s1) = schedule(t), schedule(t1)
    r = s1 / s.clamp(min=1e-12)
    return (z1 - r * z) / (a1 - r * a)

@torch.no_grad()
def ddim_target(xhat, z, x1, t, t1, t2, target="ddim", **cond):
    """Two small steps t -> t' -> t'' and the x'' with which one big step would land there too (Algorithm 2).

    z (B, C, H, W) at t; x1 = x̂(z_t), or the teacher's, already evaluated; `xhat`, or the teacher, makes the second
    prediction, x0 = x̂(z_t'), with `cond` (y, w, d) as its condition. Returns x'' and z_t'', both without gradient: x''
    is the target that x' is pulled to, and z_t'' is where the next pair of steps begins. target "x0" returns x̂(z_t')
    itself as x'', which is what sections 1 and 4.1 and Figure 1 describe."""
    schedule = xhat.schedule
    z1 = ddim_step(schedule, z, x1, t, t1)
    x0 = xhat(z1, t1, **cond)
    z2 = ddim_step(schedule, z1, x0, t1, t2)
    return x0 if target == "x0" else ddim_inverse(schedule, z, z2, t, t2), z2

# ---- sampling -----------------------------------------------------------------------------------------
LEVELS = 7                # a network that is told d has learned d = 2^-k for k < LEVELS: 1, 1/2 … 1/64 (shortcut.py)
SHORTEST = 0.5 ** (LEVELS - 1)

def start_noise(seed, indices, shape):
    """Noise z_1 ~ N(0, I) to start images number `indices` from: (len(indices), *shape), float32, on the CPU.

    Image i of a seed is the same in any batch, on any device and on any number of processes."""
    draws = [np.random.default_rng([seed, i]).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(draws))

def jump_times(steps):
    """The N + 1 times of N steps of a network that is told d, at places and of lengths that it has learned.

    If N is no power of two, the steps have two lengths, the shorter ones first: 3 steps are of 1/4, 1/4 and 1/2. More
    than 64 steps are equally long."""
    times = Schedule.equal_times(steps)
    if steps * SHORTEST > 1:
        return times
    long = 2 ** (steps.bit_length() - 1)                      # this many long steps; N − long of them are halved
    halves, short = Schedule.equal_times(2 * long), 2 * (steps - long)
    return halves[:short] + halves[short::2]

@torch.no_grad()
def ddim_sample(xhat, z, steps, y=None, w=1.0):
    """Deterministic DDIM from noise z (B, C, H, W) in exactly `steps` network evaluations. Returns x (B, C, H, W).

    The same z gives the same picture, in fewer steps a more blurred one. A network that is told the length of its steps
    gets d = t − t', but at least the shortest that it has learned: see `jump_times`."""
    for t, t1 in pairwise(xhat.times(steps)):
        z = ddim_step(xhat.schedule, z, xhat(z, t, y, w, max(t - t1, SHORTEST)), t, t1)
    return z
