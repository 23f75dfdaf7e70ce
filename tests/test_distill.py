"""distill.py: the plans, Algorithm 2 and 1 by hand, what has a gradient and what has none, resuming, refusing."""

import copy
import json
import math
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import distill
import sample
import train
from ddim import Cosine, Denoiser
from model import UNet, UNetConfig, config_dict, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = dict(channels=8, mult=(1, 2), blocks=1, attention=(), groups=4, head_channels=8)
SHAPE = [3, 8, 8]


def tiny_net(classes=0, seed=0):
    """A UNet whose layers all matter (none is zero), in float64."""
    torch.manual_seed(seed)
    net = UNet(UNetConfig(**TINY, classes=classes)).double()
    for p in net.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    return net


def a_run(net, schedule="dsdi", steps=8, updates=12, **kw):
    """A Run and its Updates without files, and the plan."""
    args = distill.parse_args(["--schedule", schedule, "--steps", str(steps), "--updates", str(updates)])
    vars(args).update(dict(batch=4, lr=1e-3, lr_end=1e-3, warmup=0, ema=0.9, dtype="fp32") | kw)
    torch.manual_seed(0)
    about = dict(schedule="cosine", predicts="v", shape=SHAPE)
    run, updates = distill.setup(args, net, CPU, about)
    updates.source.z, updates.source.w = updates.source.z.double(), updates.source.w.double()
    return run, updates, updates.plan


@pytest.fixture
def ckpt(tmp_path):
    """Checkpoint of a tiny model, as train.py would leave it, made of random weights."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(**TINY))
    for p in net.parameters():
        p.data = p.data + 0.02 * torch.randn_like(p)
    return write_ckpt(net, tmp_path / "train" / "ckpt.pt")


def write_ckpt(net, path, classes=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = dict(config=config_dict(net.config), schedule="cosine", predicts="v", shape=SHAPE, classes=list(classes),
                 args=dict(data="faces.zip", crop=None, distill=0.15, updates=7), step=7,
                 weights=net.state_dict(), ema=net.state_dict())
    save_checkpoint(path, state)
    return path


def flags(ckpt, out, **kw):
    base = dict(steps=8, updates=12, batch=4, device="cpu", dtype="fp32", log_every=1, save_every=5, lr=1e-4)
    pairs = [[f"--{k.replace('_', '-')}", str(v)] for k, v in (base | kw).items()]
    return ["--ckpt", str(ckpt), "--out", str(out), *sum(pairs, [])]


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


# ---- plans ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", distill.SCHEDULES)
@pytest.mark.parametrize("steps", [2, 6, 48, 50, 64])
@pytest.mark.parametrize("updates", [32, 33, 1000, 4001])
def test_a_plan_spends_exactly_P(schedule, steps, updates):
    plan = distill.plan(schedule, steps, updates)
    assert sum(n for _, n in plan) == updates
    assert plan[0][0] == steps and all(n >= 1 and d % 2 == 0 and d >= 2 for d, n in plan)
    assert [d for d, _ in plan] == sorted({d for d, _ in plan}, reverse=True)


def test_the_depths_are_the_papers():
    depths = {s: [d for d, _ in distill.plan(s, 64, 4000)] for s in distill.SCHEDULES}
    assert depths["dsdn"] == [64]
    assert depths["dsdi"] == depths["tsd"] == depths["pd"] == [64, 32, 16, 8, 4, 2]
    assert depths["dsdgl"] == depths["dsdgexp"] == list(range(64, 0, -2))
    assert [d for d, _ in distill.plan("dsdi", 50, 99)] == [50, 24, 12, 6, 2]      # odd halves are rounded down


def test_the_shares_are_the_papers():
    for schedule in ("dsdi", "dsdgl", "tsd", "pd"):
        updates = [n for _, n in distill.plan(schedule, 64, 4000)]
        assert max(updates) - min(updates) <= 1
    plan = distill.plan("dsdgexp", 64, 100_000)
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
        distill.plan("dsdgl", steps, updates)


def test_place_walks_through_the_plan():
    plan = [(8, 3), (4, 1), (2, 2)]
    assert [distill.place(plan, i) for i in range(6)] == [(8, 0), (8, 1), (8, 2), (4, 0), (2, 0), (2, 1)]
    with pytest.raises(IndexError):
        distill.place(plan, 6)


# ---- the loss --------------------------------------------------------------------------------------------


def by_hand(net, z, t, t1, t2, weight, target, teacher=None):
    """Algorithm 2 (with a teacher: targets of Algorithm 1), written out for the cosine schedule and v-prediction."""
    a, s = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    a1, s1 = math.cos(math.pi * t1 / 2), math.sin(math.pi * t1 / 2)
    a2, s2 = math.cos(math.pi * t2 / 2), math.sin(math.pi * t2 / 2)
    x = a * z - s * net(z, t)
    with torch.no_grad():
        guide = teacher or net
        xt = a * z - s * guide(z, t)
        z1 = a1 * xt + s1 / s * (z - a * xt)
        x1 = a1 * z1 - s1 * guide(z1, t1)
        z2 = a2 * x1 + s2 / s1 * (z1 - a1 * x1)
        goal = (z2 - s2 / s * z) / (a2 - s2 / s * a) if target == "ddim" else x1
    snr = a * a / (s * s)
    w = {"snr": max(snr, 1), "logsnr": max(math.log(snr), 1), "none": 1}[weight]
    return w * (x - goal).square().mean(), z2


@pytest.mark.parametrize("target", ["ddim", "x0"])
@pytest.mark.parametrize("weight", ["snr", "logsnr", "none"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("i", [8, 2])
def test_one_update_is_algorithm_2(target, weight, frozen, i):
    """Loss, z_t'' and all gradients against the formulas written out, in float64."""
    net, other = tiny_net(), tiny_net(seed=1)
    z = torch.randn(4, *SHAPE, dtype=torch.float64)
    t, t1, t2 = i / 8, (i - 1) / 8, (i - 2) / 8
    want, z_want = by_hand(net, z, t, t1, t2, weight, target, other if frozen else None)
    want = torch.autograd.grad(want, list(net.parameters())), want
    xhat, teacher = Denoiser(net, Cosine(), "v"), Denoiser(other, Cosine(), "v")
    times = [torch.full((4,), v, dtype=torch.float64) for v in (t, t1, t2)]
    second, first = (teacher, teacher) if frozen else (xhat, None)
    loss, z2 = distill.distillation_loss(xhat, z, times, second, first, target, weight)
    assert_close(loss, want[1])
    assert_close(z2, z_want)
    assert_close(torch.autograd.grad(loss, list(net.parameters())), want[0])


def test_only_x_prime_has_a_gradient():
    """Every weight gets one from the first evaluation; none flows through the second, the target, or a teacher."""
    net, average, teacher = tiny_net(), tiny_net(seed=1), tiny_net(seed=2)
    hat = lambda n: Denoiser(n, Cosine(), "v")  # noqa: E731
    z = torch.randn(4, *SHAPE, dtype=torch.float64)
    times = [torch.full((4,), v, dtype=torch.float64) for v in (0.5, 0.4, 0.3)]
    for second, first in ((hat(net), None), (hat(average), None), (hat(teacher), hat(teacher))):
        net.zero_grad()
        loss, z2 = distill.distillation_loss(hat(net), z, times, second, first)
        assert not z2.requires_grad
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert all(p.grad is None for n in (average, teacher) for p in n.parameters())


class Constant(nn.Module):
    """The model of a world of one picture: it knows the answer at every t (as v)."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(classes=0)
        self.x = nn.Parameter(torch.randn(*SHAPE, dtype=torch.float64))

    def forward(self, z, t):
        a, s = Cosine()(torch.as_tensor(t).double().expand(len(z)))
        return (a * z - self.x) / s


@pytest.mark.parametrize("schedule", ["dsdn", "dsdi", "dsdgl", "dsdgexp", "tsd"])
def test_a_model_that_knows_the_answer_does_not_move(schedule):
    net = Constant()
    run, updates, _ = a_run(net, schedule)
    before = net.x.detach().clone()
    for step in range(12):
        loss, _ = next(updates(step))
        assert loss < 1e-9                                    # times are float32
        assert torch.autograd.grad(loss, net.x, retain_graph=True)[0].norm() < 1e-5
    assert torch.equal(net.x, before)
    # and one that is off at one noise level only is pulled
    net.x.data += 0.1
    skewed = Denoiser(lambda z, t: net(z, t) + (torch.as_tensor(t) > 0.9).double().reshape(-1, 1, 1, 1), Cosine(), "v")
    times = [torch.full((4,), v, dtype=torch.float64) for v in (1.0, 0.875, 0.75)]
    assert distill.distillation_loss(skewed, torch.randn(4, *SHAPE).double(), times, skewed)[0] > 1e-3


# ---- trajectories, teachers, averages ----------------------------------------------------------------------


class Recorder:
    """A Denoiser's network that notes what it was called with."""

    def __init__(self, net):
        self.net, self.config, self.calls = net, net.config, []

    def __call__(self, z, t, y=None):
        self.calls.append((torch.as_tensor(t).clone(), None if y is None else y.clone(), torch.is_grad_enabled()))
        return self.net(z, t) if y is None else self.net(z, t, y)


def test_a_trajectory_walks_the_chain_and_starts_again():
    """Two evaluations an update at t, t'; from noise down to t'' = 0, then fresh noise; z_t'' is the next z_t."""
    run, updates, plan = a_run(tiny_net(), "dsdn", steps=8, updates=9)
    updates.xhat.net = spy = Recorder(run.net)
    seen = []
    for step in range(9):
        next(updates(step))
        seen.append(updates.source.z.clone())
    first = [t[0].item() for t, _, _ in spy.calls[0::2]]
    second = [t[0].item() for t, _, _ in spy.calls[1::2]]
    assert len(spy.calls) == 18
    assert first == [1, 0.75, 0.5, 0.25] * 2 + [1] and second == [0.875, 0.625, 0.375, 0.125] * 2 + [0.875]
    assert [g for _, _, g in spy.calls] == [True, False] * 9
    assert_close(updates.source.ends, seen[7])                # where the second walk arrived
    assert not torch.allclose(seen[3], seen[7])


def test_a_depth_that_ends_cuts_its_trajectory_short():
    run, updates, plan = a_run(tiny_net(), "dsdi", steps=8, updates=8)
    assert plan[0][1] < 4                                     # less than one walk
    updates.xhat.net = spy = Recorder(run.net)
    for step in range(8):
        next(updates(step))
    starts = [t[0].item() for t, _, _ in spy.calls[0::2]]
    want = []
    for depth, n in plan:
        want += [1 - 2 * (u % (depth // 2)) / depth for u in range(n)]
    assert starts == want


def test_the_teacher_is_frozen_and_replaced_at_each_depth():
    run, updates, plan = a_run(tiny_net(), "tsd", steps=8, updates=9)
    teacher = run.parts["teacher"]
    for step in range(9):
        depth, u = distill.place(plan, step)
        before = copy.deepcopy(teacher.state_dict())
        student = copy.deepcopy(run.net.state_dict())
        loss, _ = next(updates(step))
        run.update(iter([(loss, {})]))
        assert same(teacher.state_dict(), student if u == 0 else before)
        assert not same(teacher.state_dict(), run.net.state_dict())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_tsd_follows_the_teacher_not_the_student():
    run, updates, _ = a_run(tiny_net(), "tsd", steps=8, updates=12)
    loss, _ = next(updates(0))
    run.update(iter([(loss, {})]))
    z = updates.source.z.clone()
    _, z_want = by_hand(run.net, z, 0.75, 0.625, 0.5, "snr", "ddim", run.parts["teacher"])
    next(updates(1))
    assert_close(updates.source.z, z_want)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_target_ema_is_a_running_average(decay):
    """D makes the second evaluation by an average of the weights; with the D of --ema no further copy is held."""
    run, updates, _ = a_run(tiny_net(), target_ema=decay, ema=0.9)
    assert ("target" in run.parts) == (decay != 0.9)
    average = copy.deepcopy(run.net.state_dict())
    for step in range(5):
        loss, _ = next(updates(step))
        used = updates.second.net.state_dict()
        assert_close(used, average)
        run.update(iter([(loss, {})]))
        average = {k: decay * average[k] + (1 - decay) * v for k, v in run.net.state_dict().items()}
    assert updates.first is None and updates.second.net is not run.net


def test_without_target_ema_no_second_set_of_weights_is_held():
    run, updates, _ = a_run(tiny_net())
    assert set(run.parts) == {"trajectories"} and updates.second is updates.xhat


def test_pd_draws_t_on_the_students_grid():
    """z_t from data at t = i / (N/2), uniformly; the teacher's two half-steps end on the grid again."""
    x = torch.full((3000, 3, 4, 4), 0.5)
    points = distill.DataPairs(a_run(tiny_net(), batch=3000)[0], iter([(x, None)]))
    z, (t, t1, t2), cond = points.batch(Denoiser(None, Cosine(), "v"), 16, 0)
    assert sorted(set(t.tolist())) == [i / 8 for i in range(1, 9)]
    assert torch.unique(t, return_counts=True)[1].min() > 300
    assert_close(t - t1, torch.full_like(t, 1 / 16))
    assert_close(t - t2, torch.full_like(t, 1 / 8))
    a, s = Cosine()(t)
    eps = (z - a * x) / s
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02 and cond == {}


@pytest.mark.parametrize("schedule", ["dsdi", "tsd"])
def test_guidance_is_the_same_in_all_evaluations(schedule):
    run, updates, plan = a_run(tiny_net(classes=5), schedule, steps=8, updates=12, batch=64)
    spies = {id(d): Recorder(d.net) for d in (updates.xhat, updates.second)}
    for d in {id(d): d for d in (updates.xhat, updates.second)}.values():
        d.net = spies[id(d)]
    weights = []
    for step in range(12):
        _, u = distill.place(plan, step)
        before = sum(len(s.calls) for s in spies.values())
        next(updates(step))
        calls = [c for s in spies.values() for c in s.calls[-3:]]
        assert sum(len(s.calls) for s in spies.values()) - before == (3 if schedule == "tsd" else 2)
        y, w = updates.source.y, updates.source.w
        for _, got, _ in calls[-2:]:
            assert torch.equal(got, torch.cat([torch.full_like(y, 5), y]))     # null and class, in one batch
        assert w.unique().numel() == 1 and 1 <= w[0] <= 3
        weights.append(w[0].item())
    starts = [i for i in range(12) if distill.place(plan, i)[1] % (distill.place(plan, i)[0] // 2) == 0]
    assert len(set(weights)) == len(starts)                   # one w for each walk
    assert updates.source.y.unique().tolist() == [0, 1, 2, 3, 4]


def test_guided_prediction_is_what_is_distilled():
    net = tiny_net(classes=5)
    xhat, z = Denoiser(net, Cosine(), "v", 5), torch.randn(4, *SHAPE).double()
    y, w = torch.tensor([0, 1, 2, 3]), torch.full((4, 1, 1, 1), 2.5).double()
    times = [torch.full((4,), v, dtype=torch.float64) for v in (0.5, 0.4, 0.3)]
    guided = lambda z, t: 2.5 * net(z, t, y) - 1.5 * net(z, t, torch.full_like(y, 5))  # noqa: E731
    want, z_want = by_hand(guided, z, 0.5, 0.4, 0.3, "snr", "ddim")
    loss, z2 = distill.distillation_loss(xhat, z, times, xhat, y=y, w=w)
    assert_close((loss, z2), (want, z_want))


def test_stagger_covers_all_noise_levels_in_every_update():
    run, updates, plan = a_run(tiny_net(), "dsdn", steps=8, updates=9, batch=8, stagger=True)
    updates.xhat.net = spy = Recorder(run.net)
    points, previous = updates.source, None
    for step in range(9):
        del spy.calls[:]
        was = points.z.clone()
        next(updates(step))
        (t, _, grad), (t1, _, _) = spy.calls[-2:]
        assert grad and sorted(t.tolist()) == sorted([1, 0.75, 0.5, 0.25] * 2)
        assert_close(t - t1, torch.full_like(t, 1 / 8))
        assert len(spy.calls) == (2 if step else 2 + 3)       # once, to spread them
        if step:
            moved = points.pairs(points.all, 8, step) != 0    # a new walk begins with noise, the others go on
            assert_close(t[moved], (previous - 0.25)[moved])
            assert not torch.equal(was, points.z)
        previous = t
    assert points.arrived.all()


def test_a_staggered_walk_passes_through_the_same_points():
    """Spread to their places, staggered trajectories lie on DDIM chains of the model: checked with an exact one."""
    net = Constant()
    xhat = Denoiser(net, Cosine(), "v")
    points = distill.Trajectories(a_run(tiny_net(), batch=8)[0], stagger=True)
    points.z = points.z.double()
    z, (t, _, _), _ = points.batch(xhat, 8, 0)
    a, s = Cosine()(t.double())
    eps = (z - a * net.x) / s
    assert 0.8 < eps.std() < 1.2 and abs(eps.mean()) < 0.1


# ---- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", distill.SCHEDULES)
def test_the_command_line_end_to_end(schedule, ckpt, tmp_path, monkeypatch, capsys):
    """Checkpoint, log and picture; only pd reads data; sample.py and fid.py take the result as any other."""
    if not distill.SCHEDULES[schedule].data:
        monkeypatch.setattr(distill, "load_data", lambda *a: pytest.fail("a data-free method read data"))
    out, source = tmp_path / schedule, ckpt.read_bytes()
    cache = ["--cache", str(tmp_path / "cache")]
    if schedule == "pd":
        monkeypatch.setattr(distill, "load_data", lambda *a: train.load_data(small_data(tmp_path), 8, None, cache[1]))
    distill.main(["--schedule", schedule, *flags(ckpt, out), *cache])
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "log.jsonl", "samples-000012.png"]
    assert ckpt.read_bytes() == source
    log = log_of(out)
    assert [e["step"] for e in log] == list(range(1, 13)) and all(math.isfinite(e["loss"]) for e in log)
    if schedule != "pd":
        assert log[-1].keys() >= {"depth", "mean", "std", "diversity"}
    state = load_checkpoint(out / "ckpt.pt")
    assert not same(state["weights"], load_checkpoint(ckpt)["weights"])
    trained, here = state["history"]
    assert trained["how"] == "train" and trained["updates"] == 7
    assert here["how"] == schedule and here["updates"] == 12 and here["steps"] == 8 and here["target"] == "ddim"
    assert here["hash"] and here["ckpt"] == str(ckpt)
    sample.main(["--ckpt", str(out / "ckpt.pt"), "--steps", "2", "-n", "2", "--device", "cpu"])
    assert (out / "grid.png").exists() and f"{schedule}, 12 updates from 8 steps" in capsys.readouterr().out


def small_data(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir(exist_ok=True)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
    return tmp_path / "data"


def test_a_distilled_model_can_be_distilled_again(ckpt, tmp_path):
    distill.main(["--schedule", "dsdn", *flags(ckpt, tmp_path / "a")])
    distill.main(["--schedule", "tsd", *flags(tmp_path / "a" / "ckpt.pt", tmp_path / "b")])
    state = load_checkpoint(tmp_path / "b" / "ckpt.pt")
    assert [h["how"] for h in state["history"]] == ["train", "dsdn", "tsd"]


@pytest.mark.parametrize("extra", [["--schedule", "dsdi", "--target-ema", "0.5"], ["--schedule", "tsd"],
                                   ["--schedule", "dsdn", "--stagger"]])
def test_a_killed_run_resumes_bit_for_bit(extra, ckpt, tmp_path):
    """SIGKILL in mid-trajectory; the resumed run ends with the weights, average, place and log of a whole one."""
    settings = dict(updates=40, save_every=3, sample_every=100)
    distill.main([*flags(ckpt, tmp_path / "whole", **settings), *extra])
    command = [sys.executable, str(ROOT / "distill.py"), *flags(ckpt, tmp_path / "killed", **settings), *extra]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "killed" / "log.jsonl", time.time() + 120
    while not (log.exists() and log.read_text().count("\n") >= 7) and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < load_checkpoint(tmp_path / "killed" / "ckpt.pt")["step"] < 40, "killed too late to test anything"
    distill.main(["--resume", "--out", str(tmp_path / "killed")])
    a, b = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "killed"))
    assert same(a["weights"], b["weights"]) and same(a["ema"], b["ema"])
    assert same(a["parts"]["trajectories"], b["parts"]["trajectories"])
    drop = lambda log: [{k: v for k, v in e.items() if k != "images_per_s"} for e in log]  # noqa: E731
    assert drop(log_of(tmp_path / "whole")) == drop(log_of(tmp_path / "killed"))


def test_a_conditional_model_is_distilled_with_guidance(tmp_path):
    torch.manual_seed(0)
    ckpt = write_ckpt(UNet(UNetConfig(**TINY, classes=2)), tmp_path / "c" / "ckpt.pt", ["a", "b"])
    distill.main([*flags(ckpt, tmp_path / "out"), "--guidance", "1", "2"])
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert state["classes"] == ["a", "b"] and 1 <= state["parts"]["trajectories"]["w"].max() <= 2


def test_a_run_that_drifts_is_ended_with_the_last_good_checkpoint(ckpt, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"(?s)trajectories end with a .*last good checkpoint.*--target-ema"):
        distill.main([*flags(ckpt, tmp_path / "out", lr=0.3, updates=400, save_every=1, drift=1.3, warmup=0)])
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert 0 < state["step"] < 400 and all(torch.isfinite(v).all() for v in state["weights"].values())


def test_drift_0_lets_a_run_go_where_it_will(ckpt, tmp_path):
    distill.main(flags(ckpt, tmp_path / "out", lr=0.3, updates=40, drift=0, warmup=0))
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 40


def test_a_loss_that_is_not_finite_ends_the_run(ckpt, tmp_path, monkeypatch):
    real = distill.distillation_loss
    calls = []

    def broken(*a, **kw):
        calls.append(1)
        loss, z = real(*a, **kw)
        return (loss * math.nan if len(calls) == 8 else loss), z

    monkeypatch.setattr(distill, "distillation_loss", broken)
    with pytest.raises(SystemExit, match="not finite at update 8.*last good checkpoint"):
        distill.main(flags(ckpt, tmp_path / "out"))
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 5


def test_what_cant_work_is_refused(ckpt, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="no checkpoint at .*python train.py"):
        distill.main(flags(tmp_path / "no.pt", out))
    for bad, word in ((["--steps", "7"], "even"), (["--updates", "2"], "depths"), (["--data", "x"], "reads no data"),
                      (["--schedule", "tsd", "--target-ema", "0.9"], "teacher"), (["--target-ema", "1"], "below 1"),
                      (["--schedule", "pd", "--stagger"], "trajectories"), (["--drift", "0.5"], "factor"),
                      (["--guidance", "3", "1"], "lower one first"), (["--out", str(ckpt.parent)], "folder of --ckpt")):
        with pytest.raises(SystemExit):
            distill.main([*flags(ckpt, out), *bad])
        assert word in capsys.readouterr().err
    assert not out.exists()
    distill.main(flags(ckpt, out))
    with pytest.raises(SystemExit, match="holds a run already"):
        distill.main(flags(ckpt, out))
    with pytest.raises(SystemExit, match="is finished"):
        distill.main(["--resume", "--out", str(out)])
    with pytest.raises(SystemExit):
        distill.main(["--resume", "--out", str(out), "--updates", "20"])
    assert "can't change --updates" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_draws_figure_4(tmp_path, capsys):
    distill.main(["--schedule", "dsdi", "--dry-run", "--updates", "600", "--out", str(tmp_path / "p")])
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line[:6].strip().isdigit()]
    assert [r[:2] for r in rows] == [[str(d), "100"] for d in (64, 32, 16, 8, 4, 2)]
    assert [r[-1] for r in rows] == ["4", "7", "13", "25", "50", "100"]              # ceil(100 / (N/2)) walks
    assert ("plan.png" in text) == (tmp_path / "p" / "plan.png").exists()
    assert "matplotlib" in text or (tmp_path / "p" / "plan.png").exists()


def test_the_shares_by_rate_are_sums_of_the_rates():
    args = types.SimpleNamespace(steps=8, updates=30, lr=1.0, lr_end=0.1, warmup=4)
    rates = [train.learning_rate(args, i) for i in range(30)]
    assert rates[0] == 0.25 and max(rates) <= 1 and rates[-1] == pytest.approx(0.1) and rates[4] == pytest.approx(1)
    rows = distill.shares_of(args, "dsdi")
    assert [r[3] for r in rows] == pytest.approx([sum(rates[i:i + 10]) / sum(rates) for i in (0, 10, 20)])


def test_scores_on_the_way(ckpt, tmp_path):
    distill.main([*flags(ckpt, tmp_path / "out", updates=3), "--fid-every", "3", "--fid-samples", "4", "--weights",
                  "random", "--data", str(small_data(tmp_path)), "--cache", str(tmp_path / "cache")])
    scores = [e for e in log_of(tmp_path / "out") if "rFID (random features)" in e]
    assert [e["fake"]["steps"] for e in scores] == [2, 4, 8] and all(e["step"] == 3 for e in scores)
