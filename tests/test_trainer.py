"""trainer.py: the optimiser's step, the average, resuming after a kill, signals, full disks; by way of train.py."""

import dataclasses
import math
import signal
import sys
import time
import types

import pytest
import torch
from conftest import SMALL_RUN, log_of, same, start
from PIL import Image
from torch.testing import assert_close

import distill
import fid
import sample
import train
import trainer
from checkpoint import load_checkpoint, save_checkpoint
from model import UNet

def a_trainer(**settings):
    """A Trainer of a tiny network, without files."""
    args = train.parse_args([*SMALL_RUN, "--updates", "9"])
    vars(args).update(dict(out=None, dtype="fp32", batch=2) | settings)
    torch.manual_seed(0)
    return trainer.Trainer(args, UNet(train.make_config(args)), torch.device("cpu"),
                           dict(schedule="cosine", predicts="v", shape=[3, 8, 8]))

# ---- one update ---------------------------------------------------------------------------------------
def test_an_update_is_adam_on_the_clipped_gradient_at_the_rate_of_the_schedule():
    """By hand in double: gradient over its norm where that is above --clip, Adam's formulas, warm-up."""
    t = a_trainer(lr=0.1, lr_share=1.0, warmup=4, clip=0.25, betas=[0.8, 0.9])
    p = t.net.out.bias
    target, want = torch.tensor([3.0, -1.0, 0.5]), p.detach().double()
    m = v = torch.zeros(3, dtype=torch.double)
    for step in t.steps():
        loss = (p - target).square().sum()
        t.backward(loss)
        t.update()
        g = 2 * (want - target.double())
        norm = g.norm()
        assert_close(t.pending[-1][t.names.index("grad_norm")], norm.float())      # as it came, before clipping
        g = g * min(1, 0.25 / norm)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        rate = 0.1 * min(1, (step + 1) / 4)
        want = want - rate * (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
        assert_close(p.detach().double(), want, rtol=1e-4, atol=1e-6)
        assert all(q.grad is None for q in t.net.parameters())
        if step == 5:
            break

def test_labels_are_dropped_one_time_in_ten():
    t = a_trainer(batch=10_000)
    t.net.config = dataclasses.replace(t.net.config, classes=7)
    y = t.drop_labels(torch.zeros(10_000, dtype=torch.long))
    assert set(y.tolist()) == {0, 7} and 0.08 < (y == 7).float().mean() < 0.12

@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_follows_and_forgets_a_random_start_quickly(warmup):
    t = a_trainer(lr=0.5, ema=0.9)
    t.ema_warmup = warmup
    p, average = t.net.out.bias, t.ema.out.bias.clone()
    for step in t.steps():
        t.backward((p - 100).square().sum())
        t.update()
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        average = decay * average + (1 - decay) * p.detach()
        assert_close(t.ema.out.bias, average)

def test_parts_of_a_batch_add_up_to_its_gradient_and_its_means():
    rows, grads, logged = torch.randn(8, 3, 8, 8), [], []
    for count in (1, 4):
        t = a_trainer(batch=8, accumulate=count, clip=1e9)
        t.opt.step = lambda: None
        t.opt.zero_grad = lambda **kw: None
        for _ in t.steps():
            sizes = []
            for x, nothing in t.parts(rows, None):
                loss = (t.net(x, 0.5) - 1).square().mean()
                t.backward(loss, {"twice": 2 * loss})
                sizes.append(len(x))
                assert nothing is None
            t.update()
            break
        assert sizes == [8 // count] * count
        grads.append([p.grad.clone() for p in t.net.parameters()])
        logged.append(t.pending[0])
        assert t.names == ["loss", "twice", "grad_norm"] and t.pending[0][1] == 2 * t.pending[0][0]
    assert_close(*grads)
    assert_close(*logged)

def test_the_rate_warms_up_and_falls_along_half_a_cosine():
    args = types.SimpleNamespace(updates=30, lr=1.0, lr_end=0.1, lr_share=1.0, warmup=4)
    rates = [trainer.learning_rate(args, i) for i in range(30)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1] and rates[4] == pytest.approx(1) and rates[-1] == pytest.approx(0.1)
    # 4 + 12.5: half way from the warm-up's end to the last update
    assert (rates[16] + rates[17]) / 2 == pytest.approx(0.55, abs=1e-3)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    args.lr_end = None
    assert trainer.learning_rate(args, 29) == 1

def test_decay_0_copies_weights():
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    trainer.update_ema(a, b, decay=0)
    assert same(a.state_dict(), b.state_dict())

# ---- interruptions ------------------------------------------------------------------------------------
def strip(log):
    return [{k: v for k, v in e.items() if k != "images_per_s"} for e in log]

def test_a_killed_and_resumed_run_ends_bit_identical(small_run, tmp_path):
    """SIGKILL in the middle; dropout, label dropout, flips, optimiser and EMA all go on as if nothing had happened."""
    flags = [*small_run, "--updates", "100", "--distill", "0.15", "--classes", "--dropout", "0.1"]
    child = start("train.py", *flags)
    while not (tmp_path / "out" / "ckpt.pt").exists():
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    stopped_at = load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"]
    assert 0 < stopped_at < 100
    with open(tmp_path / "out" / "log.jsonl", "a") as f:      # what a kill may leave: entries after the checkpoint,
        f.write('{"step": 99, "loss": 1}\n\0\0\0\n{"step": 100, "lo')   # what a power cut does to one, and half a line
    train.main(["--resume", "--out", str(tmp_path / "out")])
    train.main([*flags, "--out", str(tmp_path / "whole")])
    a, b = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("out", "whole"))
    assert a["step"] == b["step"] == 100
    assert same(a["weights"], b["weights"]) and same(a["ema"], b["ema"])
    assert torch.equal(a["random"], b["random"]) and torch.equal(a["dropout"], b["dropout"])
    assert strip(log_of(tmp_path / "out")) == strip(log_of(tmp_path / "whole"))

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(small_run, tmp_path, number):
    child = start("train.py", *small_run, "--updates", "100000", "--save-every", "100000", "--log-every", "100000")
    while not (tmp_path / "out" / "log.jsonl").exists():
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.05)
    time.sleep(1)
    child.send_signal(number)
    output = child.communicate(timeout=60)[0]
    assert child.returncode == 130 and "--resume --out" in output and "Traceback" not in output
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert state["step"] == log_of(tmp_path / "out")[-1]["step"] > 0

def test_a_full_disk_ends_the_run_in_one_line(small_run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    train.main([*small_run, "--updates", "5"])
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit, match="can't write .*ckpt.pt .No space left on device.; what was there before"):
        train.main(["--out", small_run[small_run.index("--out") + 1], "--resume", "--updates", "9"])
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 5

def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(small_run, tmp_path, monkeypatch):
    original = train.training_loss
    calls = iter(range(100))

    def poisoned(*args):
        loss, terms = original(*args)
        return (loss * math.nan if next(calls) == 7 else loss), terms

    monkeypatch.setattr(train, "training_loss", poisoned)
    with pytest.raises(SystemExit, match="not finite at update 8; .*ckpt.pt holds the last good checkpoint"):
        train.main([*small_run, "--updates", "20", "--log-every", "4"])
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert state["step"] == 5
    assert all(v.isfinite().all() for part in ("weights", "ema") for v in state[part].values())

def test_hooks_are_called_at_their_updates_and_after_the_last(small_run, tmp_path):
    t, calls = a_trainer(updates=7), []
    t.hooks = [(3, lambda t: calls.append(t.step)), (0, lambda t: calls.append("never"))]
    for _ in t.steps():
        t.backward(t.net.out.bias.sum())
        t.update()
    assert calls == [3, 6, 7]

# ---- resuming -----------------------------------------------------------------------------------------
def test_resume_asks_for_more_updates_when_finished_and_warns_of_changes(small_run, tmp_path, capsys):
    train.main([*small_run, "--updates", "5"])
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"finished \(5 updates\)"):
        train.main(["--resume", "--out", out])
    train.main(["--resume", "--out", out, "--updates", "7", "--lr", "1e-5"])
    assert "resuming with another lr" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 7
    assert [e["step"] for e in log_of(tmp_path / "out")] == list(range(1, 8))

def test_more_updates_are_told_where_the_rate_falls(small_run, tmp_path, capsys):
    """It falls anew, from where it had not been; a rate that stays makes the longer run."""
    for lr_end, told in (("1e-5", True), ("2e-3", False)):
        train.main([*small_run, "--updates", "2", "--lr", "2e-3", "--lr-end", lr_end, "--overwrite"])
        train.main(["--resume", "--out", str(tmp_path / "out"), "--updates", "3"])
        assert ("resuming with another updates" in capsys.readouterr().out) == told

def test_what_changes_no_weight_is_not_told(small_run, tmp_path, capsys):
    train.main([*small_run, "--updates", "2", "--lr-end", "2e-3", "--lr", "2e-3"])
    train.main(["--resume", "--out", str(tmp_path / "out"), "--updates", "3", "--save-every", "1"])
    assert "resuming with another" not in capsys.readouterr().out

def test_a_run_goes_on_with_its_own_script(small_run, tmp_path):
    train.main([*small_run, "--updates", "2"])
    with pytest.raises(SystemExit, match="is one of train.py"):
        distill.main(["--resume", "--out", str(tmp_path / "out")])
    distill.main(["--ckpt", str(tmp_path / "out"), "--out", str(tmp_path / "d"), "--steps", "4", "--updates", "2",
                  "--batch", "4", "--no-guard", "--device", "cpu"])
    with pytest.raises(SystemExit, match="is one of distill.py"):
        train.main(["--resume", "--out", str(tmp_path / "d")])

@pytest.mark.parametrize("change", [["--updates", "4"], ["--ema", "0.5"], ["--target-ema", "0.5"]])
def test_what_jumps_depend_on_does_not_change_on_the_way(change, small_run, tmp_path, capsys):
    train.main([*small_run, "--updates", "2", "--distill", "0.25", "--shortcut"])
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(tmp_path / "out"), *change])
    assert f"--resume can't change {change[0]}: what the run has done" in capsys.readouterr().err

def test_a_flag_that_is_newer_than_a_run_is_as_if_not_given(small_run, tmp_path):
    """The toy's preset draws times from the middle; a run of before that flag goes on as it began."""
    train.main([*small_run, "--updates", "2"])
    ckpt = tmp_path / "out" / "ckpt.pt"
    state = load_checkpoint(ckpt)
    assert state["args"]["times"] == "middle"
    del state["args"]["times"]
    save_checkpoint(ckpt, state)
    train.main(["--resume", "--out", str(tmp_path / "out"), "--updates", "3"])
    assert load_checkpoint(ckpt)["args"]["times"] == "uniform"

def test_a_checkpoint_of_an_older_version_is_not_resumed(small_run, tmp_path):
    train.main([*small_run, "--updates", "2"])
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    save_checkpoint(tmp_path / "out" / "ckpt.pt", {k: v for k, v in state.items() if k != "extra_state"})
    with pytest.raises(SystemExit, match="is of an older version: it can be sampled and distilled, but not resumed"):
        train.main(["--resume", "--out", str(tmp_path / "out"), "--updates", "4"])

def test_a_model_without_a_run_is_not_resumed(small_run, tmp_path):
    """What checkpoint.py says that a checkpoint has at least is enough to sample it."""
    train.main([*small_run, "--updates", "2"])
    state, ckpt = load_checkpoint(tmp_path / "out" / "ckpt.pt"), tmp_path / "out" / "ckpt.pt"
    least = "config", "weights", "ema", "schedule", "predicts", "shape", "classes"
    save_checkpoint(ckpt, {k: state[k] for k in least})
    sample.main(["--ckpt", str(ckpt), "--steps", "1", "-n", "1", "--device", "cpu"])
    with pytest.raises(SystemExit, match="a model without the settings of a run: it can't be resumed"):
        train.main(["--resume", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="does not say on what it was trained: .* --data"):
        fid.main(["--ckpt", str(ckpt), "--steps", "1", "-n", "2", "--weights", "random", "--device", "cpu"])
    distill.main(["--ckpt", str(ckpt), "--schedule", "dsdn", "--steps", "2", "--updates", "1", "--batch", "2",
                  "--device", "cpu", "--out", str(tmp_path / "d")])
    sample.main(["--ckpt", str(tmp_path / "d"), "--steps", "1", "-n", "1", "--device", "cpu"])      # tells its history
    with pytest.raises(SystemExit, match="does not say on what it was trained: .* --data"):       # nor does its heir
        fid.main(["--ckpt", str(tmp_path / "d"), "--steps", "1", "-n", "2", "--weights", "random", "--device", "cpu"])
    with pytest.raises(SystemExit, match="does not say on what it was trained: .* --data"):
        distill.main(["--ckpt", str(ckpt), "--schedule", "pd", "--steps", "2", "--updates", "1", "--batch", "2",
                      "--device", "cpu", "--out", str(tmp_path / "pd")])
    save_checkpoint(ckpt, {k: state[k] for k in least[:-1]})
    with pytest.raises(SystemExit, match="is not a checkpoint of this project"):
        sample.main(["--ckpt", str(ckpt)])

def test_a_folder_with_a_run_is_only_touched_on_demand(small_run, tmp_path):
    train.main([*small_run, "--updates", "2"])
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already"):
        train.main([*small_run, "--updates", "3"])
    with pytest.raises(SystemExit, match="no such file"):      # a typing error with --overwrite deletes nothing
        train.main([*small_run, "--updates", "3", "--overwrite", "--data", "nowhere"])
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
    train.main([*small_run, "--updates", "3", "--overwrite"])
    assert [e["step"] for e in log_of(tmp_path / "out")] == [1, 2, 3]
    with pytest.raises(SystemExit, match="is finished .3 updates."):      # it can't have fewer
        train.main(["--resume", "--updates", "2", "--out", str(tmp_path / "out")])

def test_an_old_run_stays_until_the_new_one_has_made_an_update(small_run, tmp_path, monkeypatch):
    out, flags = tmp_path / "out", ["--sample-every", "1", "--tensorboard", "--overwrite"]
    def files():
        return {f.name: f.read_bytes() for f in out.iterdir()}
    train.main([*small_run, "--updates", "2", *flags])
    (out / "best.pt").write_bytes(b"of another script")
    before, loss = files(), train.training_loss
    def too_big(*args):
        raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(train, "training_loss", too_big)
    with pytest.raises((SystemExit, torch.OutOfMemoryError)):
        train.main([*small_run, "--updates", "1", *flags])
    assert files() == before
    monkeypatch.setattr(train, "training_loss", loss)
    train.main([*small_run, "--updates", "1", *flags])
    after = files()
    assert not {"best.pt", "samples-000002.png"} & after.keys() and [e["step"] for e in log_of(out)] == [1]
    assert len([name for name in after if name.startswith("events")]) == 1

def test_tensorboard_has_the_values_and_pictures_of_the_log(small_run, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train.main([*small_run, "--updates", "4", "--sample-every", "2", "--tensorboard"])
    board = EventAccumulator(str(tmp_path / "out")).Reload()
    logged = log_of(tmp_path / "out")
    for name in ("loss", "grad_norm", "lr"):
        assert [e.value for e in board.Scalars(name)] == pytest.approx([e[name] for e in logged])
    assert [e.step for e in board.Images("samples")] == [2, 4]
    with monkeypatch.context() as m, pytest.raises(SystemExit, match="needs the package tensorboard"):
        m.setitem(sys.modules, "torch.utils.tensorboard", None)
        train.main([*small_run, "--updates", "1", "--overwrite", "--tensorboard"])
    assert log_of(tmp_path / "out") == logged                 # it has deleted nothing
    train.main([*small_run, "--updates", "1", "--overwrite"])
    assert not list((tmp_path / "out").glob("events*"))

@pytest.mark.whole
def test_a_run_leaves_a_picture_of_its_log_where_matplotlib_is(small_run, tmp_path, monkeypatch):
    train.main([*small_run, "--updates", "3"])
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        assert picture.width == 3 * 400                       # loss, gradient, rate
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train.main([*small_run, "--updates", "3", "--overwrite"])
    assert not (tmp_path / "out" / "curves.png").exists()
