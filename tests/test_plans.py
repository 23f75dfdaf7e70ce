"""plans.py: the depths and budgets of section 4.1.1, and the table of Figure 4."""

import math
import re
import types

import pytest

import distill
import plans
import trainer

@pytest.mark.parametrize("schedule", plans.METHODS)
@pytest.mark.parametrize("steps", [2, 6, 48, 50, 64])
@pytest.mark.parametrize("updates", [32, 33, 1000, 4001])
def test_a_plan_spends_exactly_P(schedule, steps, updates):
    plan = plans.plan(schedule, steps, updates)
    assert sum(n for _, n in plan) == updates
    assert plan[0][0] == steps and all(n >= 1 and d % 2 == 0 and d >= 2 for d, n in plan)
    assert [d for d, _ in plan] == sorted({d for d, _ in plan}, reverse=True)

def test_the_depths_are_the_papers():
    depths = {s: [d for d, _ in plans.plan(s, 64, 4000)] for s in plans.METHODS}
    assert depths["dsdn"] == [64]
    assert depths["dsdi"] == depths["tsd"] == depths["pd"] == [64, 32, 16, 8, 4, 2]
    assert depths["dsdgl"] == depths["dsdgexp"] == list(range(64, 0, -2))
    assert [d for d, _ in plans.plan("dsdi", 50, 99)] == [50, 24, 12, 6, 2]      # odd halves are rounded down

def test_the_shares_are_the_papers():
    for schedule in ("dsdi", "dsdgl", "tsd", "pd"):
        updates = [n for _, n in plans.plan(schedule, 64, 4000)]
        assert max(updates) - min(updates) <= 1
    plan = plans.plan("dsdgexp", 64, 100_000)
    aims = [max(1, d - 2) for d, _ in plan]                                        # …, 6, 4, 2, 1
    assert aims[-4:] == [6, 4, 2, 1]
    total = sum(math.exp(1 / s) for s in aims)
    for (_, n), s in zip(plan, aims, strict=True):
        assert abs(n - 100_000 * math.exp(1 / s) / total) < 3
    assert plan[-1][1] > 2.5 * plan[0][1]

@pytest.mark.parametrize("steps,updates,word", [(63, 100, "even"), (0, 100, "even"), (-2, 9, "even"),
                                                (64, 31, "32 depths"), (64, 0, "32 depths")])
def test_a_plan_that_cant_be_made_is_refused(steps, updates, word):
    with pytest.raises(ValueError, match=word):
        plans.plan("dsdgl", steps, updates)

def test_locate_walks_through_the_plan():
    plan = [(8, 3), (4, 1), (2, 2)]
    assert [plans.locate(plan, i) for i in range(6)] == [(8, 0), (8, 1), (8, 2), (4, 0), (2, 0), (2, 1)]
    with pytest.raises(IndexError):
        plans.locate(plan, 6)

def test_the_shares_by_rate_are_sums_of_the_rates():
    args = types.SimpleNamespace(schedule="dsdi", steps=8, updates=30, lr=1.0, lr_end=0.1, warmup=4)
    rates = [trainer.learning_rate(args, i) for i in range(30)]
    rows = plans.shares(args)
    assert [r[:3] for r in rows] == [(d, 10, pytest.approx(1 / 3)) for d in (8, 4, 2)]
    assert [r[3] for r in rows] == pytest.approx([sum(rates[i:i + 10]) / sum(rates) for i in (0, 10, 20)])

def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    distill.main(["--schedule", "dsdi", "--dry-run", "--updates", "600", "--out", str(tmp_path / "p")])
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line[:6].strip().isdigit()]
    assert [r[:2] for r in rows] == [[str(d), "100"] for d in (64, 32, 16, 8, 4, 2)]
    assert [r[-2] for r in rows] == ["3.12", "6.25", "12.50", "25.00", "50.00", "100.00"]             # of N / 2 updates
    assert not (tmp_path / "p").exists()

def test_dry_run_of_shortcut_tells_of_no_trajectories(capsys):
    distill.main(["--schedule", "shortcut", "--dry-run", "--steps", "15"])         # of its own samples: may be odd
    out = capsys.readouterr().out
    assert re.search(r"^ +15 +600 +100.0% +100.0% +- +-$", out, re.M) and "half of a trajectory" not in out

@pytest.mark.parametrize("updates,share", [(128, "5%"), (4000, "45%")])
def test_dry_run_tells_how_much_is_learned_near_the_data(updates, share, capsys):
    """A plan for few updates is no small copy of one for many: its trajectories never arrive."""
    distill.main(["--schedule", "dsdgl", "--dry-run", "--updates", str(updates)])
    out = capsys.readouterr().out
    assert f"{share} of the updates are made in the second half of a trajectory" in out
    if updates == 128:
        assert re.search(r"^ +64 +4 +3.1% +1.2% +0.12 +0$", out, re.M) and re.search(r"^ +2 +4 .* 4.00 +0$", out, re.M)
