"""Scheduling N (section 4.1.1): the depths (step counts) of each method, and how many updates each depth gets.

    plan("dsdi", steps=64, updates=600)        # [(64, 100), (32, 100), (16, 100), (8, 100), (4, 100), (2, 100)]
    python distill.py --schedule dsdgl --dry-run --updates 4000 --lr 1e-6
"""

import math
from dataclasses import dataclass
from itertools import islice

import numpy as np

from trainer import learning_rate

def halves(n):
    """n, n/2, n/4 … 2, each made even by rounding down: 64, 32, 16, 8, 4, 2 (DSDI)."""
    return [n] if n == 2 else [n, *halves(n // 4 * 2)]

def downwards(n):
    """n, n − 2, n − 4 … 2 (DSDGL)."""
    return list(range(n, 0, -2))

@dataclass(frozen=True)
class Method:
    """What tells one method from another."""

    depths: callable                             # start depth N -> the depths N_i
    share: callable = lambda depth: 1.0          # of the updates, not normalised
    teacher: bool = False                        # a frozen copy of the model, renewed at each depth, makes the targets
    data: bool = False                           # Algorithm 1: z_t from data at random t, not from a trajectory
    shortcut: bool = False                       # beyond the paper: another loss and loop, see shortcut.py

METHODS = {
    "dsdn": Method(lambda n: [n]),
    "dsdi": Method(halves),
    "dsdgl": Method(downwards),
    # Eq. 2: exp(1/S), S = …, 6, 4, 2, 1 the depth after N_i, and 1 after 2 (read so that few steps get most)
    "dsdgexp": Method(downwards, lambda depth: math.exp(1 / max(1, depth - 2))),
    "tsd": Method(halves, teacher=True),
    "pd": Method(halves, teacher=True, data=True),
    "shortcut": Method(lambda n: [n], shortcut=True),
}

def plan(schedule, steps, updates):
    """[(N_i, updates at this depth), …]: the U_i of section 4.1.1, counted in updates, which sum exactly to P.

    schedule  a name in METHODS;  steps  the start depth N, even but for shortcut;  updates  P, at least one per depth
    A trajectory of N_i steps makes N_i / 2 updates; the last one of a depth is cut short where its budget ends.
    Raises ValueError for a plan that can't be made."""
    method = METHODS[schedule]
    if steps < 2 or (steps % 2 and not method.shortcut):
        raise ValueError(f"--steps {steps}: " + (
            "own samples of one step are not worth learning from" if method.shortcut else
            "the start depth must be even and at least 2, as steps are taken in pairs"))
    depths = method.depths(steps)
    if updates < len(depths):
        raise ValueError(f"--updates {updates}: {schedule} from {steps} steps has {len(depths)} depths, "
                         f"and each needs at least one update")
    part = np.cumsum([0, *map(method.share, depths)])          # one update each; the rest in proportion
    ends = np.arange(len(part)) + np.rint((updates - len(depths)) * part / part[-1])
    return [(depth, int(n)) for depth, n in zip(depths, np.diff(ends), strict=True)]

def locate(plan, step):
    """Where update number `step` falls: (depth N_i, which update of that depth)."""
    for depth, updates in plan:
        if step < updates:
            return depth, step
        step -= updates
    raise IndexError("the plan is spent")

def late(depth, updates):
    """How many of the first `updates` updates at a depth begin at t <= 1/2: in the second half of a trajectory."""
    return sum(4 * (u % (depth // 2)) >= depth for u in range(updates))

def shares(args):
    """[(N_i, updates, share of the updates, share weighted by their learning rates)] of a plan (Figure 4)."""
    rows = plan(args.schedule, args.steps, args.updates)
    rates = (learning_rate(args, i) for i in range(args.updates))
    by_rate = [sum(islice(rates, n)) for _, n in rows]
    return [(depth, n, n / args.updates, rate / sum(by_rate)) for (depth, n), rate in zip(rows, by_rate, strict=True)]

def print_plan(args):
    """Print the plan as a table: Figure 4 in numbers."""
    print(f"{args.schedule}: {args.updates:,} updates of {args.batch}, from {args.steps} steps\n")
    print(" depth  updates   share  by rate  trajectories  at t <= 1/2")
    method = METHODS[args.schedule]
    walked = not (method.data or method.shortcut)             # these draw their t
    rows = shares(args)
    for depth, updates, share, weighted in rows:
        walks, end = (f"{2 * updates / depth:.2f}", f"{late(depth, updates):,}") if walked else ("-", "-")
        print(f"{depth:6d} {updates:8,d} {share:7.1%} {weighted:8.1%} {walks:>13} {end:>12}")
    if walked:
        end = sum(late(depth, updates) for depth, updates, *_ in rows)
        print(f"\n{end / args.updates:.0%} of the updates are made in the second half of a trajectory, at t <= 1/2")
    print("\nFor all methods, as a picture: python experiments/figure4.py")
