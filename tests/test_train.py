"""train.py from its command line: learning, resuming, stopping, refusing."""

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import train
from data import load_data
from ddim import Cosine, Denoiser, noise, sample
from model import load_checkpoint, load_model, save_checkpoint

ROOT = Path(__file__).parent.parent
TINY = ["--size", "8", "--channels", "16", "--mult", "1", "2", "--attention", "--batch", "8", "--sample-steps", "2",
        "--device", "cpu", "--log-every", "1", "--sample-every", "0", "--save-every", "5"]


def labelled_images(data):
    """Ten images of 8x8 in two sub-folders. Returns their folder, as a flag wants it."""
    rng = np.random.default_rng(0)
    for i in range(10):
        folder = data / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(data)


@pytest.fixture
def tiny(tmp_path):
    """The flags of a run of a second, on ten labelled images."""
    return [*TINY, "--data", labelled_images(tmp_path / "data"), "--cache", str(tmp_path / "cache"),
            "--out", str(tmp_path / "out")]


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def run_script(args, **kw):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **kw)


# ---- what a run leaves --------------------------------------------------------------------------------


def test_a_run_leaves_checkpoint_log_and_picture(tiny, tmp_path, capsys):
    train.main([*tiny, "--updates", "7", "--distill", "0.15", "--sample-every", "3"])
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "ckpt.pt", "log.jsonl", "samples-000003.png", "samples-000006.png", "samples-000007.png"]
    log = log_of(out)
    assert [e["step"] for e in log] == [1, 2, 3, 4, 5, 6, 7]
    assert log[0].keys() == {"step", "loss", "grad_norm", "v", "x", "lr", "images_per_s"}
    assert all(abs(e["loss"] - (0.85 * e["v"] + 0.15 * e["x"])) < 1e-5 for e in log)
    state = load_checkpoint(out / "ckpt.pt")
    assert state["step"] == 7 and state["args"]["distill"] == 0.15 and state["shape"] == [3, 8, 8]
    assert "python sample.py --ckpt" in capsys.readouterr().out


def test_sample_pictures_start_from_the_same_noise(tiny, tmp_path):
    """With a learning rate of almost nothing the model never changes, and neither does the picture."""
    train.main([*tiny, "--updates", "4", "--sample-every", "2", "--lr", "1e-30"])
    a, b = ((tmp_path / "out" / f"samples-00000{k}.png").read_bytes() for k in (2, 4))
    assert a == b


def test_a_handful_of_images_is_learnt(tmp_path):
    """Four images of one colour each: trained on them, the model samples those colours and nothing else."""
    colours = np.array([[230, 30, 30], [30, 230, 30], [30, 30, 230], [230, 230, 30]], np.uint8)
    for i, c in enumerate(colours):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(np.broadcast_to(c, (8, 8, 3)).copy()).save(tmp_path / "data" / f"{i}.png")
    train.main([*TINY, "--data", str(tmp_path / "data"), "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "out"),
                "--batch", "32", "--updates", "200", "--lr", "3e-3", "--distill", "0.15",
                "--save-every", "1000", "--log-every", "50", "--dtype", "fp32"])
    net, state = load_model(tmp_path / "out" / "ckpt.pt")
    x = sample(Denoiser.of(net, state), noise(0, range(40), state["shape"]), 16).mean((2, 3))      # (40, 3)
    distance = torch.cdist(x, torch.from_numpy(colours / 127.5 - 1).float())
    assert distance.min(1).values.median() < 0.3   # the colours lie more than 1.5 apart
    assert len(set(distance.argmin(1).tolist())) == 4
    log = log_of(tmp_path / "out")
    assert log[-1]["v"] < 0.5 * log[0]["v"]


def test_warmup_clipping_and_ema_are_what_the_formulas_say(tiny, tmp_path):
    args = train.parse_args([*tiny, "--updates", "9", "--lr", "0.5", "--warmup", "4", "--ema", "0.9"])
    args.dtype = "fp32"
    torch.manual_seed(0)
    run = train.Run(args, train.UNet(train.make_config(args)), torch.device("cpu"), about={})
    assert [run.lr() for run.step in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    run.step = 0
    p, average = run.net.out.bias, run.ema.out.bias.clone()
    for step in range(3):
        norm = run.update(iter([((run.net(torch.randn(2, 3, 8, 8), 0.5) - 100).square().sum(), {})]))["grad_norm"]
        assert norm > 1                                       # of the gradient as it came, before clipping
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * p.detach()
        assert_close(run.ema.out.bias, average)
    assert run.step == 3 and all(p.grad is None for p in run.net.parameters())


def test_labels_are_dropped_one_time_in_ten():
    y = train.drop_labels(torch.zeros(10_000, dtype=torch.long), 7, torch.rand(10_000))
    assert set(y.tolist()) == {0, 7} and 0.08 < (y == 7).float().mean() < 0.12


def test_classes_of_the_data_become_classes_of_the_model(tiny, tmp_path):
    train.main([*tiny, "--updates", "2", "--classes"])
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert state["classes"] == ["a", "b"] and state["weights"]["label.weight"].shape[0] == 3


# ---- interruptions ------------------------------------------------------------------------------------


def test_a_killed_and_resumed_run_ends_bit_identical(tiny, tmp_path):
    """SIGKILL in the middle; dropout, label dropout, flips, optimiser and EMA all go on as if nothing had happened."""
    flags = [*tiny, "--updates", "100", "--distill", "0.15", "--classes", "--dropout", "0.1"]
    child = run_script(flags)
    while not (tmp_path / "out" / "ckpt.pt").exists():
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    stopped_at = load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"]
    assert 0 < stopped_at < 100
    with open(tmp_path / "out" / "log.jsonl", "a") as f:      # what a kill may leave: entries after the checkpoint,
        f.write('{"step": 99, "loss": 1}\n{"step": 100, "lo')  # and half a line
    child = run_script(["--resume", "--out", str(tmp_path / "out")])
    assert child.wait() == 0, child.stdout.read()
    whole = run_script([*flags, "--out", str(tmp_path / "whole")])
    assert whole.wait() == 0, whole.stdout.read()
    a, b = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("out", "whole"))
    assert a["step"] == b["step"] == 100
    assert weights_equal(a["weights"], b["weights"]) and weights_equal(a["ema"], b["ema"])
    assert torch.equal(a["random"], b["random"]) and torch.equal(a["dropout"], b["dropout"])
    strip = lambda out: [{k: v for k, v in e.items() if k != "images_per_s"} for e in log_of(out)]  # noqa: E731
    assert strip(tmp_path / "out") == strip(tmp_path / "whole")


def test_a_full_disk_ends_the_run_in_one_line(tiny, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_grid", full)
    with pytest.raises(SystemExit, match="can't write to .*No space left on device.*holds the last good checkpoint"):
        train.main([*tiny, "--updates", "9", "--sample-every", "5"])
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tiny, tmp_path, number):
    child = run_script([*tiny, "--updates", "100000", "--save-every", "100000"])
    while not (tmp_path / "out" / "log.jsonl").exists() or not log_of(tmp_path / "out"):
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.05)
    child.send_signal(number)
    output = child.communicate(timeout=60)[0]
    assert child.returncode == 130 and "--resume --out" in output and "Traceback" not in output
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert state["step"] == log_of(tmp_path / "out")[-1]["step"] > 0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    original = train.training_loss
    calls = iter(range(100))

    def poisoned(*args):
        loss, terms = original(*args)
        return (loss * float("nan") if next(calls) == 7 else loss), terms

    monkeypatch.setattr(train, "training_loss", poisoned)
    with pytest.raises(SystemExit, match="not finite at update 8; .*ckpt.pt holds the last good checkpoint"):
        train.main([*tiny, "--updates", "20", "--log-every", "4"])
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert state["step"] == 5
    assert all(v.isfinite().all() for part in ("weights", "ema") for v in state[part].values())


def test_resume_asks_for_more_updates_when_finished_and_warns_of_changes(tiny, tmp_path, capsys):
    train.main([*tiny, "--updates", "5"])
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"finished \(5 updates\)"):
        train.main(["--resume", "--out", out])
    train.main(["--resume", "--out", out, "--updates", "7", "--lr", "1e-5"])
    assert "resuming with another lr" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 7
    assert [e["step"] for e in log_of(tmp_path / "out")] == list(range(1, 8))


def test_a_checkpoint_of_an_older_version_is_not_resumed(tiny, tmp_path):
    train.main([*tiny, "--updates", "2"])
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    save_checkpoint(tmp_path / "out" / "ckpt.pt", {k: v for k, v in state.items() if k != "random"})
    with pytest.raises(SystemExit, match="is of an older version"):
        train.main(["--resume", "--out", str(tmp_path / "out"), "--updates", "4"])


# ---- refusals -------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_only_touched_on_demand(tiny, tmp_path):
    train.main([*tiny, "--updates", "2"])
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already"):
        train.main([*tiny, "--updates", "3"])
    with pytest.raises(SystemExit, match="no such file"):      # a typing error with --overwrite deletes nothing
        train.main([*tiny, "--updates", "3", "--overwrite", "--data", "nowhere"])
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
    train.main([*tiny, "--updates", "3", "--overwrite"])
    assert [e["step"] for e in log_of(tmp_path / "out")] == [1, 2, 3]


@pytest.mark.parametrize("flags,message", [
    (["--updates", "0"], "--updates must be at least 1"),
    (["--distill", "15"], "--distill must be between 0 and 1"),
    (["--ema", "1"], "--ema must be"),
    (["--lr", "nan"], "--lr must be a positive number"),
    (["--crop", "-3"], "--crop must be a positive number"),
    (["--betas", "0.9", "1"], "--betas must be"),
    (["--dropout", "1"], "dropout = 1.0 must be"),
    (["--attention", "4"], "2 levels"),
    (["--clip", "0"], "--clip must be a positive number"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--size", "9"], "--size 9 must be divisible by 2"),
    (["--channels", "12"], "multiple of groups"),
    (["--device", "cuda:99"], "--device cuda:99 can't be used"),
    (["--resume"], "no checkpoint at"),
])
def test_bad_flags_are_explained_in_one_line(tiny, flags, message, capsys):
    with pytest.raises(SystemExit) as e:
        train.main([*tiny, *flags])
    text = capsys.readouterr().err.strip().splitlines()[-1] if e.value.code == 2 else str(e.value)
    assert message in text and "\n" not in text


def test_real_image_presets_ask_for_their_data(capsys):
    with pytest.raises(SystemExit):
        train.main(["--preset", "celeba64"])
    assert "--preset celeba64 trains on real images" in capsys.readouterr().err


def test_presets_are_the_papers_and_flags_beat_them(capsys):
    paper = {"celeba64": (65_000, 1e-4), "bedroom64": (50_000, 4e-4), "church64": (40_000, 4e-4)}
    for name, (updates, lr) in paper.items():
        args = train.parse_args(["--preset", name, "--data", "x", "--distill"])
        assert (args.updates, args.lr, args.size, args.distill) == (updates, lr, 64, 0.15)
    assert train.parse_args(["--preset", "celeba64", "--data", "x", "--lr", "3"]).lr == 3
    known = vars(train.parse_args([])).keys()
    assert all(preset.keys() - {"needs_data"} <= known for preset in train.PRESETS.values())


def test_each_update_reads_the_batch_of_its_number(tiny, monkeypatch):
    """Off by one here, and a resumed run would train on other images than one never stopped."""
    used = []
    loss = train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: (used.append(a[1].clone()), loss(*a))[1])
    train.main([*tiny, "--updates", "4"])
    images = load_data(tiny[tiny.index("--data") + 1], 8, cache=tiny[tiny.index("--cache") + 1])
    assert len(used) == 4
    assert all(torch.equal(x, images.batch(k, 8, seed=0)[0]) for k, x in enumerate(used))


def test_compiled_training_learns_the_same(tiny, tmp_path, monkeypatch):
    """Through all of torch.compile but its last stage, the C++ compiler, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    train.main([*tiny, "--updates", "3", "--dtype", "fp32", "--out", str(tmp_path / "plain")])
    train.main([*tiny, "--updates", "3", "--dtype", "fp32", "--out", str(tmp_path / "compiled"), "--compile"])
    a, b = (load_model(tmp_path / name / "ckpt.pt")[0] for name in ("plain", "compiled"))
    z = torch.randn(2, 3, 8, 8)
    assert_close(Denoiser(a, Cosine())(z, 0.5), Denoiser(b, Cosine())(z, 0.5), rtol=1e-3, atol=1e-3)
