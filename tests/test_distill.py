"""distill.py: Algorithms 1 and 2 by hand, what has a gradient and what has none, resuming, refusing."""

import math
import re
import signal
import time
import types
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, labelled_images, log_of, same, start
from torch import nn
from torch.testing import assert_close

import distill
import hooks
import sample
import train
from checkpoint import load_checkpoint, load_model, save_checkpoint
from ddim import Cosine, Denoiser, LDMDiscrete
from fid import fidelity_scorer
from model import UNet, UNetConfig
from plans import METHODS, locate, plan
from scores import fidelity
from trainer import Trainer

CPU = torch.device("cpu")
SHAPE = [3, 8, 8]

@pytest.fixture
def double():
    """Everything in float64: what is drawn, the times, the networks."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def tiny_net(classes=0, seed=0):
    """A UNet whose layers all matter (none is zero), in float64."""
    torch.manual_seed(seed)
    net = UNet(UNetConfig(**TINY, classes=classes)).double()
    for p in net.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    return net

class Watched(Trainer):
    """A Trainer without files that calls before(step) and after(step) around each update of its loop."""

    before = after = staticmethod(lambda step: None)

    def steps(self):
        while self.step < self.args.updates:
            self.before(self.step)
            yield self.step
            self.after(self.step)
            self.step += 1

def a_run(net, schedule="dsdi", steps=8, updates=12, **kw):
    """(Trainer, its plan), for `distill.fine_tune` or `distill.progressive`."""
    args = distill.parse_args(["--schedule", schedule, "--steps", str(steps), "--updates", str(updates)])
    vars(args).update(dict(out=None, batch=4, lr=1e-3, lr_end=1e-3, warmup=0, ema=0.9, dtype="fp32") | kw)
    trainer = Watched(args, net.requires_grad_(True), CPU, dict(schedule="cosine", predicts="v", shape=SHAPE),
                      ema_warmup=False)
    return trainer, plan(schedule, steps, updates)

class Calls(list):
    """What networks were called with: (network, z, t of the first image, y, whether gradients were on)."""

    def watch(self, *nets):
        for net in nets:
            net.register_forward_pre_hook(lambda net, a: self.append(
                (net, a[0], a[1][0].item(), a[2] if len(a) > 2 else None, torch.is_grad_enabled())))
        return self

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
    state = dict(config=asdict(net.config), schedule="cosine", predicts="v", shape=SHAPE, classes=list(classes),
                 args=dict(data="faces.zip", crop=None, distill=0.15, updates=7), step=7,
                 weights=net.state_dict(), ema=net.state_dict())
    save_checkpoint(path, state)
    return path

def flags(ckpt, out, **kw):
    base = dict(steps=8, updates=12, batch=4, device="cpu", dtype="fp32", log_every=1, save_every=5, lr=1e-4)
    pairs = [[f"--{k.replace('_', '-')}", str(v)] for k, v in (base | kw).items()]
    return ["--ckpt", str(ckpt), "--out", str(out), *sum(pairs, [])]

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
    w = {"snr": max(snr, 1), "none": 1}[weight]
    return w * (x - goal).square().mean(), z2

@pytest.mark.parametrize("target", ["ddim", "x0"])
@pytest.mark.parametrize("weight", ["snr", "none"])
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
    models = (teacher, teacher) if frozen else (xhat, None)
    loss, z2 = distill.distillation_loss(xhat, z, *times, None, None, *models, target, weight)
    assert_close(loss, want[1])
    assert_close(z2, z_want)
    assert_close(torch.autograd.grad(loss, list(net.parameters())), want[0])

def test_only_x_prime_has_a_gradient():
    """Every weight gets one from the first evaluation; none flows through the second, the target, or a teacher."""
    net, average, teacher = tiny_net(), tiny_net(seed=1), tiny_net(seed=2)
    hat = lambda n: Denoiser(n, Cosine(), "v")  # noqa: E731
    z = torch.randn(4, *SHAPE, dtype=torch.float64)
    times = [torch.full((4,), v, dtype=torch.float64) for v in (0.5, 0.4, 0.3)]
    for models in ((hat(net), None), (hat(average), None), (hat(teacher), hat(teacher))):
        net.zero_grad()
        loss, z2 = distill.distillation_loss(hat(net), z, *times, None, None, *models)
        assert not z2.requires_grad
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert all(p.grad is None for n in (average, teacher) for p in n.parameters())

class Constant(nn.Module):
    """The model of a world of one picture: it knows the answer at every t (as v), but for an error at t > 0.9."""

    def __init__(self, error=0.0):
        super().__init__()
        self.config, self.error = types.SimpleNamespace(classes=0, step_length=False), error
        self.x = nn.Parameter(torch.randn(*SHAPE, dtype=torch.float64))

    def forward(self, z, t):
        t = torch.as_tensor(t).double().expand(len(z))
        a, s = Cosine()(t)
        return (a * z - self.x - self.error * (t > 0.9).reshape(-1, 1, 1, 1)) / s

@pytest.mark.parametrize("schedule", ["dsdn", "dsdi", "dsdgl", "dsdgexp", "tsd"])
@pytest.mark.parametrize("error", [0.0, 0.5])
def test_a_model_that_knows_the_answer_does_not_move(schedule, error, double):
    """Twelve updates of Adam leave it where it is; one that is wrong at one noise level is pulled."""
    net = Constant(error)
    trainer, steps = a_run(net, schedule)
    trainer.opt.param_groups[0]["eps"] = 1e-3                 # or Adam would make steps of mere rounding errors
    before = net.x.detach().clone()
    distill.fine_tune(trainer, steps)
    moved = (net.x - before).abs().max().item()
    assert moved < 1e-5 if error == 0 else moved > 1e-3

# ---- the loops -----------------------------------------------------------------------------------------------
def test_a_trajectory_walks_the_chain_and_starts_again(double):
    """Two evaluations an update at t, t'; from noise down to t'' = 0, then fresh noise; z_t'' is the next z_t."""
    trainer, steps = a_run(tiny_net(), "dsdn", steps=8, updates=9)
    calls, seen = Calls().watch(trainer.net), []
    trainer.after = lambda step: seen.append(trainer.carried["z"])
    distill.fine_tune(trainer, steps)
    first, second = calls[0::2], calls[1::2]
    assert [t for _, _, t, _, _ in first] == [1, 0.75, 0.5, 0.25] * 2 + [1]
    assert [t for _, _, t, _, _ in second] == [0.875, 0.625, 0.375, 0.125] * 2 + [0.875]
    assert [grad for *_, grad in calls] == [True, False] * 9
    for step in range(1, 9):
        goes_on = torch.equal(first[step][1], seen[step - 1])
        assert goes_on == (step % 4 != 0)                     # the fourth update arrives; then noise
    for start_of_a_walk in (0, 4, 8):
        z = first[start_of_a_walk][1]
        assert abs(z.mean()) < 0.2 and abs(z.std() - 1) < 0.1

def test_a_depth_that_ends_cuts_its_trajectory_short():
    trainer, steps = a_run(tiny_net().float(), "dsdi", steps=8, updates=8)
    assert steps[0][1] < 4                                    # less than one walk
    calls = Calls().watch(trainer.net)
    distill.fine_tune(trainer, steps)
    want = [1 - 2 * (u % (depth // 2)) / depth for depth, n in steps for u in range(n)]
    assert [t for _, _, t, _, _ in calls[0::2]] == want

@pytest.mark.parametrize("schedule", ["tsd", "pd"])
def test_the_teacher_is_frozen_and_replaced_at_each_depth(schedule):
    trainer, steps = a_run(tiny_net().float(), schedule, steps=8, updates=9)
    teacher, was = trainer.second_net("teacher"), {}
    copy_of = lambda net: {k: v.clone() for k, v in net.state_dict().items()}  # noqa: E731
    trainer.before = lambda step: was.update(teacher=copy_of(teacher), student=copy_of(trainer.net))

    def after(step):
        _, u = locate(steps, step)
        assert same(teacher.state_dict(), was["student" if u == 0 else "teacher"])
        assert not same(teacher.state_dict(), trainer.net.state_dict())

    trainer.after = after
    if schedule == "pd":
        distill.progressive(trainer, steps, iter(lambda: (torch.randn(4, *SHAPE), None), None))
    else:
        distill.fine_tune(trainer, steps)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())

def test_tsd_follows_the_teacher_not_the_student(double):
    trainer, steps = a_run(tiny_net(), "tsd", steps=8, updates=12)
    z = []
    trainer.after = lambda step: z.append(trainer.carried["z"])
    distill.fine_tune(trainer, steps[:1] * 3)                 # the first depth only: its teacher is the first student
    _, z_want = by_hand(tiny_net(), z[0], 0.75, 0.625, 0.5, "snr", "ddim")
    assert_close(z[1], z_want)

@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_target_ema_is_a_running_average(decay):
    """D makes the second evaluation by an average of the weights; with the D of --ema no further copy is held."""
    trainer, steps = a_run(tiny_net().float(), target_ema=decay, ema=0.9)
    average = trainer.ema if decay == 0.9 else trainer.second_net("target")
    want = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    used = Calls().watch(trainer.net, average)

    def before(step):
        assert_close(average.state_dict(), want)
        del used[:]

    def after(step):
        assert [net for net, *_ in used] == [trainer.net, average]
        for k, v in trainer.net.state_dict().items():
            want[k] = decay * want[k] + (1 - decay) * v

    trainer.before, trainer.after = before, after
    distill.fine_tune(trainer, steps)
    assert set(trainer.extra_state) == (set() if decay == 0.9 else {"target"})

@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_plain_dsd_holds_no_second_set_of_weights(ema):
    trainer, steps = a_run(tiny_net().float(), ema=ema)
    calls = Calls().watch(trainer.net, trainer.ema)
    distill.fine_tune(trainer, steps)
    assert {net for net, *_ in calls} == {trainer.net}
    assert trainer.extra_state == {} and set(trainer.carried) == {"z"}

def test_pd_draws_t_on_the_students_grid(monkeypatch):
    """z_t from data at t = i / (N/2), uniformly; the teacher's two half-steps end on the grid again."""
    x, given = torch.full((3000, 3, 4, 4), 0.5), []

    def loss(xhat, z, t, t1, t2, y, w, second, first, target, weight):
        given.append((z, t, t1, t2))
        assert y is w is None and first is second and first.net is not xhat.net
        return xhat.net.out.bias.sum(), z

    monkeypatch.setattr(distill, "distillation_loss", loss)
    trainer, _ = a_run(tiny_net().float(), "pd", batch=3000, updates=4)
    distill.progressive(trainer, [(16, 3), (8, 1)], iter([(x, None)] * 4))
    z, t, t1, t2 = given[0]
    assert sorted(set(t.tolist())) == [i / 8 for i in range(1, 9)]
    assert sorted(set(given[3][1].tolist())) == [i / 4 for i in range(1, 5)]
    assert torch.unique(t, return_counts=True)[1].min() > 300
    assert_close(t - t1, torch.full_like(t, 1 / 16))
    assert_close(t - t2, torch.full_like(t, 1 / 8))
    a, s = Cosine()(t)
    eps = (z - a * x) / s
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02

@pytest.mark.parametrize("schedule", ["dsdi", "tsd"])
def test_guidance_is_the_same_in_all_evaluations(schedule, monkeypatch):
    """One class for each image and one w for the batch, from its noise to its end; then others."""
    trainer, steps = a_run(tiny_net(classes=5).float(), schedule, steps=8, updates=12, batch=64)
    calls, weights, labels, loss = Calls(), [], [], distill.distillation_loss
    calls.watch(trainer.net, *([trainer.second_net("teacher")] if schedule == "tsd" else []))

    def watched(xhat, z, t, t1, t2, y, w, *rest):
        del calls[:]
        result = loss(xhat, z, t, t1, t2, y, w, *rest)
        assert len(calls) == (3 if schedule == "tsd" else 2)
        for _, _, _, got, _ in calls:
            assert torch.equal(got, torch.cat([torch.full_like(y, 5), y]))     # null and class, in one batch
        assert w.unique().numel() == 1 and 1 <= w[0] <= 3
        weights.append(w[0].item())
        labels.append(y)
        return result

    monkeypatch.setattr(distill, "distillation_loss", watched)
    distill.fine_tune(trainer, steps)
    places = [locate(steps, i) for i in range(12)]
    starts = [i for i, (depth, u) in enumerate(places) if u % (depth // 2) == 0]
    assert [i for i in range(12) if i == 0 or weights[i] != weights[i - 1]] == starts       # one w for each walk
    assert all(torch.equal(labels[i], labels[i - 1]) != (i in starts) for i in range(1, 12))
    assert torch.cat(labels).unique().tolist() == [0, 1, 2, 3, 4]

def test_guided_prediction_is_what_is_distilled():
    net = tiny_net(classes=5)
    xhat, z = Denoiser(net, Cosine(), "v", 5), torch.randn(4, *SHAPE).double()
    y, w = torch.tensor([0, 1, 2, 3]), torch.full((4, 1, 1, 1), 2.5).double()
    times = [torch.full((4,), v, dtype=torch.float64) for v in (0.5, 0.4, 0.3)]
    guided = lambda z, t: 2.5 * net(z, t, y) - 1.5 * net(z, t, torch.full_like(y, 5))  # noqa: E731
    want, z_want = by_hand(guided, z, 0.5, 0.4, 0.3, "snr", "ddim")
    loss, z2 = distill.distillation_loss(xhat, z, *times, y, w, xhat)
    assert_close((loss, z2), (want, z_want))

# ---- runs ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", [name for name, method in METHODS.items() if not method.shortcut])
def test_the_command_line_end_to_end(schedule, ckpt, tmp_path, monkeypatch, capsys):
    """Checkpoint, log and picture; only pd reads data; sample.py and fid.py take the result as any other."""
    if not METHODS[schedule].data:
        monkeypatch.setattr("source.load_data", lambda *a: pytest.fail("a data-free method read data"))
    out, source = tmp_path / schedule, ckpt.read_bytes()
    cache = ["--cache", str(tmp_path / "cache")]
    if schedule == "pd":
        cache += ["--data", labelled_images(tmp_path / "data")]
    distill.main(["--schedule", schedule, *flags(ckpt, out), *cache])
    files = {"best.pt", "ckpt.pt", "curves.png", "log.jsonl", "samples-000012.png"}
    assert {p.name for p in out.iterdir()} == files
    assert ckpt.read_bytes() == source
    log = log_of(out)
    assert [e["step"] for e in log] == list(range(1, 13)) and all(math.isfinite(e["loss"]) for e in log)
    assert [e["depth"] for e in log] == [locate(plan(schedule, 8, 12), i)[0] for i in range(12)]
    assert log[-1].keys() >= {f"{kind}_{n}" for kind in ("fidelity", "contrast") for n in hooks.SHOWN}
    state = load_checkpoint(out / "ckpt.pt")
    assert not same(state["weights"], load_checkpoint(ckpt)["weights"])
    trained, here = state["history"]
    assert trained["how"] == "train" and trained["updates"] == 7
    assert here["how"] == schedule and here["updates"] == 12 and here["steps"] == 8 and here["target"] == "ddim"
    assert here["hash"] and here["ckpt"] == str(ckpt)
    sample.main(["--ckpt", str(out / "ckpt.pt"), "--steps", "2", "-n", "2", "--device", "cpu"])
    assert (out / "grid.png").exists() and f"{schedule}, 12 updates from 8 steps" in capsys.readouterr().out

def test_a_distilled_model_can_be_distilled_again(ckpt, tmp_path):
    distill.main(["--schedule", "dsdn", *flags(ckpt, tmp_path / "a")])
    distill.main(["--schedule", "tsd", *flags(tmp_path / "a" / "ckpt.pt", tmp_path / "b")])
    state = load_checkpoint(tmp_path / "b" / "ckpt.pt")
    assert [h["how"] for h in state["history"]] == ["train", "dsdn", "tsd"]

@pytest.mark.whole                                            # as the process that is killed
@pytest.mark.parametrize("extra", [["--schedule", "dsdi", "--target-ema", "0.5"], ["--schedule", "tsd"],
                                   ["--schedule", "pd"]])
def test_a_killed_run_resumes_bit_for_bit(extra, ckpt, tmp_path):
    """SIGKILL in mid-trajectory; the resumed run ends with the weights, average, place and log of a whole one."""
    settings = dict(updates=40, save_every=3, log_every=7, cache=tmp_path / "cache")
    if "pd" in extra:
        settings["data"] = labelled_images(tmp_path / "data")
    distill.main([*flags(ckpt, tmp_path / "whole", **settings), *extra])
    process = start("distill.py", *flags(ckpt, tmp_path / "killed", **settings), *extra)
    log, deadline = tmp_path / "killed" / "log.jsonl", time.time() + 120
    while not (log.exists() and log.read_text().count("\n") >= 3) and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < load_checkpoint(tmp_path / "killed" / "ckpt.pt")["step"] < 40, "killed too late to test anything"
    distill.main(["--resume", "--out", str(tmp_path / "killed")])
    a, b = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "killed"))
    assert same(a["weights"], b["weights"]) and same(a["ema"], b["ema"]) and same(a["carried"], b["carried"])
    assert all(same(v, b["extra_state"][k]) for k, v in a["extra_state"].items())
    drop = lambda log: [{k: v for k, v in e.items() if k != "images_per_s"} for e in log]  # noqa: E731
    assert drop(log_of(tmp_path / "whole")) == drop(log_of(tmp_path / "killed"))

@pytest.mark.parametrize("schedule", ["dsdi", "pd"])
def test_ldms_models_learn_the_jumps_of_equal_steps(schedule, monkeypatch):
    """From each depth to the next, though LDM's own rule for sampling takes others at 8, 4 and 2 steps."""
    trainer, steps = a_run(tiny_net().float(), schedule, steps=8, updates=12)
    trainer.schedule, jumps, target = LDMDiscrete(), set(), distill.ddim_target
    def watched(second, z, x, t, t1, t2, *a, **kw):
        jumps.update(zip(t.tolist(), t1.tolist(), t2.tolist(), strict=True))
        return target(second, z, x, t, t1, t2, *a, **kw)
    monkeypatch.setattr(distill, "ddim_target", watched)
    data = iter(lambda: (torch.randn(4, *SHAPE), None), 0)
    distill.loop_of(schedule)(trainer, steps, data)
    grid = {(i / n, (i - 1) / n, (i - 2) / n) for n in (8, 4, 2) for i in range(n, 0, -2)}
    assert jumps <= grid and len(jumps) >= 6

def test_the_source_is_not_deleted_by_its_own_distillation(ckpt, tmp_path, capsys):
    distill.main(flags(ckpt, tmp_path / "out"))
    with pytest.raises(SystemExit):
        distill.parse_args(flags(tmp_path / "out" / "best.pt", tmp_path / "out", overwrite="")[:-1])
    assert "--out is the folder of --ckpt" in capsys.readouterr().err and (tmp_path / "out" / "best.pt").exists()

def test_a_conditional_model_is_distilled_with_guidance(tmp_path):
    torch.manual_seed(0)
    ckpt = write_ckpt(UNet(UNetConfig(**TINY, classes=2)), tmp_path / "c" / "ckpt.pt", ["a", "b"])
    distill.main([*flags(ckpt, tmp_path / "out"), "--guidance", "1", "2"])
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert state["classes"] == ["a", "b"] and 1 <= state["carried"]["w"].max() <= 2

def test_guidance_stays_what_it_was_when_a_run_began(tmp_path, capsys):
    """The reference of all looks was drawn with it. The command that is told for scores compares at the same."""
    torch.manual_seed(0)
    ckpt = write_ckpt(UNet(UNetConfig(**TINY, classes=2)), tmp_path / "c" / "ckpt.pt", ["a", "b"])
    distill.main([*flags(ckpt, tmp_path / "out", updates=3, lr=1e-9), "--guidance", "1", "3"])
    assert f"fid.py --guidance 2 --ckpt {ckpt} {tmp_path}/out/ckpt.pt" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["history"][-1]["guidance"] == [1, 3]
    with pytest.raises(SystemExit):
        distill.main(["--resume", "--out", str(tmp_path / "out"), "--guidance", "1", "1"])
    assert "--resume can't change --guidance" in capsys.readouterr().err

def test_the_history_has_the_settings_with_which_a_run_ended(ckpt, tmp_path):
    distill.main([*flags(ckpt, tmp_path / "out", lr_end=1e-5, updates=6, save_every=3), "--schedule", "dsdn"])
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    save_checkpoint(tmp_path / "out" / "ckpt.pt", state | dict(step=5))
    distill.main(["--resume", "--out", str(tmp_path / "out"), "--lr", "2e-4"])
    again = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert again["history"] == [state["history"][0], state["history"][1] | dict(lr=2e-4)]
    assert "guidance" not in again["history"][1]              # a model without classes has none

def test_data_are_mirrored_as_in_training_unless_asked(ckpt, tmp_path, monkeypatch):
    asked, real = [], distill.batches
    monkeypatch.setattr(distill, "batches", lambda data, args, *rest: (
        asked.append(args.flip), real(data, args, *rest))[1])
    more = ["--schedule", "pd", "--data", labelled_images(tmp_path / "data"), "--cache", str(tmp_path / "cache")]
    state = load_checkpoint(ckpt)
    never = tmp_path / "never.pt"
    save_checkpoint(never, state | dict(args=state["args"] | dict(flip=False)))
    for source, out, flag in ((ckpt, "a", []), (never, "b", []), (tmp_path / "b" / "ckpt.pt", "c", []),
                              (never, "d", ["--flip"]), (tmp_path / "d" / "ckpt.pt", "e", [])):
        distill.main([*flags(source, tmp_path / out, updates=1, steps=2), *more, *flag])
    assert asked == [True, False, False, True, True]

def test_guidance_of_one_costs_no_second_evaluation(tmp_path, monkeypatch):
    """And is what another weight of nearly 1 does, at twice the rows."""
    torch.manual_seed(0)
    ckpt = write_ckpt(UNet(UNetConfig(**TINY, classes=2)), tmp_path / "c" / "ckpt.pt", ["a", "b"])
    counts, losses = [], []
    real = distill.distillation_loss
    def watched(xhat, z, *rest):
        calls = Calls()
        calls.watch(xhat.net)
        loss = real(xhat, z, *rest)
        counts.append({len(z) for _, z, *_ in calls})
        losses.append(loss[0].item())
        return loss
    monkeypatch.setattr(distill, "distillation_loss", watched)
    for w in ("1", "1.000001"):
        distill.main([*flags(ckpt, tmp_path / w, updates=3, lr=1e-9), "--guidance", w, w])
    assert counts == [{4}] * 3 + [{8}] * 3
    assert losses[0] == pytest.approx(losses[3], rel=1e-3)

def test_the_guards_band_begins_where_the_model_is():
    """And what is near its edge is not told as beyond it."""
    guard = hooks.Guard.__new__(hooks.Guard)
    guard.steps, guard.judged = [2, 4], (2, 4)
    guard.had = dict(fidelity_2=0.52, fidelity_4=0.9, contrast_2=1.0, contrast_4=1.27)
    seen = dict(fidelity_2=0.49, fidelity_4=0.6, contrast_2=1.1, contrast_4=1.3)
    assert guard.outside(seen) == "" and guard.score(seen) == pytest.approx(0.545)
    assert guard.outside(seen | dict(fidelity_2=0.46)) == "fidelity_2 0.46, at least 0.47 is sane"
    assert guard.outside(seen | dict(contrast_2=1.21)) == "contrast_2 1.21, at most 1.20 is"
    assert guard.outside(seen | dict(contrast_4=1.33)) == "contrast_4 1.33, at most 1.32 is"
    assert guard.outside(seen, hooks.NEAR) == "fidelity_2 0.49, at least 0.47 is sane; contrast_4 1.30, at most 1.32 is"

def test_fidelity_compares_samples_of_one_guidance(tmp_path):
    """A reference that was drawn with another is none: fid.py leaves fidelity out, and a chain draws its own."""
    torch.manual_seed(0)
    ckpt = write_ckpt(UNet(UNetConfig(**TINY, classes=2)), tmp_path / "c" / "ckpt.pt", ["a", "b"])
    distill.main([*flags(ckpt, tmp_path / "one", updates=3, lr=1e-9), "--guidance", "1", "3"])
    one = load_checkpoint(tmp_path / "one" / "ckpt.pt")
    assert one["reference_guidance"] == 2
    net, state = load_model(tmp_path / "one" / "ckpt.pt")
    at = lambda w: fidelity_scorer(sample.Sampler(net, state, classes=[0, 1], w=w), state)(8)  # noqa: E731
    assert at(2.0)["fidelity"] == pytest.approx(1, abs=1e-3) and at(1.0) == {}
    for w, same_reference in ((2, True), (1, False)):
        out = tmp_path / f"chain{w}"
        distill.main([*flags(tmp_path / "one" / "ckpt.pt", out, updates=3, lr=1e-9), "--guidance", str(w), str(w)])
        two = load_checkpoint(out / "ckpt.pt")
        assert two["reference_guidance"] == w and torch.equal(two["reference"], one["reference"]) == same_reference
        assert log_of(out)[-1]["fidelity_8"] == pytest.approx(1, abs=1e-3)

def test_a_run_that_is_lost_ends_with_its_best_model_in_place(ckpt, tmp_path, capsys):
    """And --no-guard lets it go where it will."""
    lost = flags(ckpt, tmp_path / "out", lr=0.3, updates=40, warmup=0)
    with pytest.raises(SystemExit, match=r"are lost: fidelity_\d .*best\.pt has the best until now, of update \d+\."):
        distill.main(lost)
    best, log = load_checkpoint(tmp_path / "out" / "best.pt"), log_of(tmp_path / "out")
    assert all(torch.isfinite(v).all() for v in best["weights"].values()) and log[-1]["step"] < 40
    assert min(v for k, v in log[-1].items() if k.startswith("fidelity")) < 0.5 or log[-1]["contrast_8"] > 1.2
    (tmp_path / "out" / "ckpt.pt").unlink(missing_ok=True)    # as of a run that ended before its first one
    with pytest.raises(SystemExit, match="holds a run already: --overwrite deletes it"):
        distill.main(lost)
    assert load_checkpoint(tmp_path / "out" / "best.pt")["step"] == best["step"]
    assert sample.parse_args(["--ckpt", str(tmp_path / "out")]).ckpt == [str(tmp_path / "out" / "best.pt")]
    distill.main([*lost, "--no-guard", "--overwrite"])
    assert re.search(r"no update had as much as there was before, [01]\.\d\d\d; scores", capsys.readouterr().out)
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 40

@pytest.mark.whole
def test_the_model_of_the_best_fidelity_is_kept(ckpt, tmp_path, capsys):
    """best.pt holds the weights that had it at --for-steps, as the log says, and is a model like any other."""
    distill.main([*flags(ckpt, tmp_path / "out", lr=3e-3, updates=12, warmup=0), "--no-guard", "--for-steps", "1", "8"])
    table = capsys.readouterr().out
    assert "fidelity" in table and "contrast" in table and "→" in table
    seen = {e["step"]: e["fidelity_1"] + e["fidelity_8"] for e in log_of(tmp_path / "out") if "fidelity_1" in e}
    many = {key: [e["step"] for e in log_of(tmp_path / "out") if key in e] for key in ("fidelity_64", "contrast_64")}
    assert many == dict(fidelity_64=[4, 8, 12], contrast_64=[4, 8, 12])        # at every fourth look
    net, best = load_model(tmp_path / "out" / "best.pt")
    assert best["step"] == max(seen, key=seen.get) and best["best"]["step"] == best["step"]
    x = sample.Sampler(net, best)(range(hooks.NOISES), 8)
    again = fidelity(x, best["reference"])[0]
    assert abs(again - [e for e in log_of(tmp_path / "out") if e["step"] == best["step"]][0]["fidelity_8"]) < 1e-3

def test_a_run_of_an_older_version_is_refused_before_anything_is_touched(ckpt, tmp_path):
    distill.main(flags(ckpt, tmp_path / "out"))
    state, log = load_checkpoint(tmp_path / "out" / "ckpt.pt"), (tmp_path / "out" / "log.jsonl").read_bytes()
    save_checkpoint(tmp_path / "out" / "ckpt.pt", {k: v for k, v in state.items() if k != "reference"} | dict(step=5))
    with pytest.raises(SystemExit, match="of an older version.*not resumed"):
        distill.main(["--resume", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == log

def test_a_chain_is_compared_with_its_first_model(ckpt, tmp_path):
    """The reference is handed on: what the middle model spoiled counts as spoiled."""
    distill.main([*flags(ckpt, tmp_path / "a", lr=1e-2), "--no-guard"])
    distill.main([*flags(tmp_path / "a" / "ckpt.pt", tmp_path / "b"), "--no-guard"])
    a, b = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in "ab")
    assert torch.equal(a["reference"], b["reference"]) and not torch.equal(b["before"][-1], b["reference"])

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
                      (["--stagger"], "unrecognized"), (["--for-steps", "3"], "invalid choice"),
                      (["--weight", "logsnr"], "invalid choice"),
                      (["--schedule", "shortcut", "--share", "0"], "no row"),
                      (["--schedule", "shortcut", "--share", "0.1", "--batch", "8"], "of --batch 8: no row"),
                      (["--schedule", "shortcut", "--steps", "1"], "own samples of one step"),
                      (["--share", "0.9"], "for shortcut, not for dsdi"), (["--pool", "5"], "for shortcut, not"),
                      (["--schedule", "shortcut", "--target", "x0"], "has a loss of its own"),
                      (["--schedule", "shortcut", "--weight", "none"], "has a loss of its own"),
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
    with pytest.raises(SystemExit):                           # --target-ema may be that same average
        distill.main(["--resume", "--out", str(out), "--ema", "0.5"])
    assert "can't change --ema" in capsys.readouterr().err
    with pytest.raises(SystemExit):                           # by which best.pt was chosen until now
        distill.main(["--resume", "--out", str(out), "--for-steps", "1"])
    assert "can't change --for-steps" in capsys.readouterr().err

def test_scores_on_the_way(ckpt, tmp_path):
    distill.main([*flags(ckpt, tmp_path / "out", updates=3), "--fid-every", "3", "--fid-samples", "4", "--weights",
                  "random", "--data", labelled_images(tmp_path / "data"), "--cache", str(tmp_path / "cache")])
    scores = [e for e in log_of(tmp_path / "out") if "rFID (random features)" in e]
    assert [e["fake"]["steps"] for e in scores] == [1, 2, 4, 8] and all(e["step"] == 3 for e in scores)
    trained = load_checkpoint(tmp_path / "out" / "ckpt.pt")["trained_on"]["data"]
    assert trained != str(tmp_path / "data")                  # that only scored it
    with pytest.raises(SystemExit, match="is finished"):      # the scores may be switched off, the data stay
        distill.main(["--resume", "--fid-every", "0", "--out", str(tmp_path / "out")])

def test_a_run_in_the_way_goes_after_all_checks_of_its_source(ckpt, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text("of an older run")
    state = load_checkpoint(ckpt)
    state["ema"] = {k: v * math.nan for k, v in state["ema"].items()}
    save_checkpoint(tmp_path / "nan.pt", state)
    with pytest.raises(SystemExit, match="not finite"):
        distill.main([*flags(tmp_path / "nan.pt", tmp_path / "out"), "--overwrite"])
    assert (tmp_path / "out" / "log.jsonl").read_text() == "of an older run"

def test_a_model_of_one_channel_is_scored_against_lightness(small_run, tmp_path, monkeypatch):
    train.main([*small_run, "--updates", "1", "--channels-in", "1"])
    seen = []
    monkeypatch.setattr("distill.scorer", lambda args, images, *more: seen.append(images.channels) or (lambda _: []))
    distill.main([*flags(tmp_path / "out" / "ckpt.pt", tmp_path / "dsdi", updates=3), "--fid-every", "3", "--cache",
                  str(tmp_path / "cache")])
    assert seen == [1]
