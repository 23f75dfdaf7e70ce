"""train.py from its command line: learning, what a run leaves, refusing."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, labelled_images, log_of
from PIL import Image
from torch.testing import assert_close

import distill
import sample
import train
import trainer
from checkpoint import load_checkpoint, load_model
from data import load_data
from ddim import Cosine, Denoiser, ddim_sample, start_noise

def test_a_run_leaves_checkpoint_log_and_picture(small_run, tmp_path, capsys):
    train.main([*small_run, "--updates", "7", "--distill", "0.15", "--sample-every", "3"])
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "ckpt.pt", "curves.png", "log.jsonl", "samples-000003.png", "samples-000006.png", "samples-000007.png"]
    log = log_of(out)
    assert [e["step"] for e in log] == [1, 2, 3, 4, 5, 6, 7]
    assert log[0].keys() == {"step", "loss", "grad_norm", "v", "x", "lr", "images_per_s"}
    assert all(abs(e["loss"] - (0.85 * e["v"] + 0.15 * e["x"])) < 1e-5 for e in log)
    state = load_checkpoint(out / "ckpt.pt")
    assert state["step"] == 7 and state["args"]["distill"] == 0.15 and state["shape"] == [3, 8, 8]
    assert "python sample.py --ckpt" in capsys.readouterr().out

def test_training_loads_neither_ldms_files_nor_the_network_of_the_scores(tmp_path):
    """A toy run on the built-in pictures, in a fresh process: none of ldm.py, fid.py, inception.py is imported."""
    flags = [*SMALL_RUN, "--updates", "2", "--cache", str(tmp_path), "--out", str(tmp_path / "out")]
    code = (f"import sys, data, train; data.BuiltIn.__init__.__defaults__ = (20,); train.main({flags!r}); "
            "print('loaded:', {'ldm', 'fid', 'inception'} & set(sys.modules))")
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "loaded: set()" in output

def test_sample_pictures_start_from_the_same_noise(small_run, tmp_path):
    """With a learning rate of almost nothing the model never changes, and neither does the picture."""
    train.main([*small_run, "--updates", "4", "--sample-every", "2", "--lr", "1e-30"])
    a, b = ((tmp_path / "out" / f"samples-00000{k}.png").read_bytes() for k in (2, 4))
    assert a == b

def test_a_handful_of_images_is_learnt(tmp_path):
    """Four images of one colour each: trained on them, the model samples those colours and nothing else."""
    colours = np.array([[230, 30, 30], [30, 230, 30], [30, 30, 230], [230, 230, 30]], np.uint8)
    for i, c in enumerate(colours):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(np.broadcast_to(c, (8, 8, 3)).copy()).save(tmp_path / "data" / f"{i}.png")
    train.main([*SMALL_RUN, "--data", str(tmp_path / "data"), "--cache", str(tmp_path / "c"),
                "--out", str(tmp_path / "out"),
                "--batch", "32", "--updates", "200", "--lr", "3e-3", "--distill", "0.15",
                "--save-every", "1000", "--log-every", "50", "--dtype", "fp32"])
    net, state = load_model(tmp_path / "out" / "ckpt.pt")
    x = ddim_sample(Denoiser.of(net, state), start_noise(0, range(40), state["shape"]), 16).mean((2, 3))      # (40, 3)
    distance = torch.cdist(x, torch.from_numpy(colours / 127.5 - 1).float())
    assert distance.min(1).values.median() < 0.3   # the colours lie more than 1.5 apart
    assert len(set(distance.argmin(1).tolist())) == 4
    log = log_of(tmp_path / "out")
    assert log[-1]["v"] < 0.5 * log[0]["v"]

def test_classes_of_the_data_become_classes_of_the_model(small_run, tmp_path, monkeypatch):
    seen, loss = [], train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: (seen.append(a[4]), loss(*a))[1])
    train.main([*small_run, "--updates", "12", "--classes"])
    state = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert state["classes"] == ["a", "b"] and state["weights"]["label.weight"].shape[0] == 3
    assert set(torch.cat(seen).tolist()) == {0, 1, 2}         # both classes, and now and then none

@pytest.mark.parametrize("flags,message", [
    (["--updates", "0"], "argument --updates: 0 is not a number from 1 on"),
    (["--batch", "1.5"], "argument --batch: invalid int value: '1.5'"),
    (["--distill", "15"], "--distill must be between 0 and 1"),
    (["--target-ema", "0.9"], "--target-ema is for --shortcut"),
    (["--ema", "1"], "argument --ema: 1 is not at least 0 and below 1"),
    (["--lr", "nan"], "argument --lr: nan is not a positive number"),
    (["--crop", "-3"], "argument --crop: -3 is not a positive number"),
    (["--betas", "0.9", "1"], "argument --betas: 1 is not"),
    (["--dropout", "1"], "dropout = 1.0 must be"),
    (["--attention", "4"], "2 levels"),
    (["--clip", "0"], "argument --clip: 0 is not a positive number"),
    (["--seed", "-1"], "argument --seed: -1 is not a number from 0"),
    (["--size", "9"], "--size 9 must be divisible by 2"),
    (["--channels", "12"], "multiple of groups"),
    (["--device", "cuda:99"], "--device cuda:99 can't be used"),
    (["--resume"], "has no checkpoint to go on from: start the run without --resume"),
    (["--compile", "reduce-overhead", "--accumulate", "2"], "--compile reduce-overhead is for a single process"),
    (["--ema-device", "cpu"], "unrecognized arguments: --ema-device cpu"),
])
def test_bad_flags_are_explained_in_one_line(small_run, flags, message, capsys):
    with pytest.raises(SystemExit) as e:
        train.main([*small_run, *flags])
    text = capsys.readouterr().err.strip().splitlines()[-1] if e.value.code == 2 else str(e.value)
    assert message in text and "\n" not in text

def test_real_image_presets_ask_for_their_data(capsys):
    with pytest.raises(SystemExit):
        train.main(["--preset", "celeba64"])
    assert "--preset celeba64 trains on real images" in capsys.readouterr().err

def test_presets_are_the_papers_and_flags_beat_them():
    paper = {"celeba64": (65_000, 1e-4), "bedroom64": (50_000, 4e-4), "church64": (40_000, 4e-4)}
    for name, (updates, lr) in paper.items():
        args = train.parse_args(["--preset", name, "--data", "x", "--distill"])
        assert (args.updates, args.lr, args.size, args.distill) == (updates, lr, 64, 0.15)
    assert train.parse_args(["--preset", "celeba64", "--data", "x", "--lr", "3"]).lr == 3
    known = vars(train.parse_args([])).keys()
    assert all(preset.keys() <= known for preset in train.PRESETS.values())

def test_each_update_reads_the_batch_of_its_number(small_run, monkeypatch):
    """Off by one here, and a resumed run would train on other images than one never stopped."""
    used = []
    loss = train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: (used.append(a[1].clone()), loss(*a))[1])
    train.main([*small_run, "--updates", "4"])
    images = load_data(small_run[small_run.index("--data") + 1], 8, cache=small_run[small_run.index("--cache") + 1])
    assert len(used) == 4
    assert all(torch.equal(x, images.batch(k, 8, seed=0)[0]) for k, x in enumerate(used))

def test_the_loss_gets_times_in_0_1_and_fresh_noise(small_run, monkeypatch):
    used, loss = [], train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: (used.append((a[2], a[3])), loss(*a))[1])
    small_run += ["--times", "uniform"]
    train.main([*small_run, "--updates", "40", "--save-every", "100"])
    t, eps = (torch.cat(values) for values in zip(*used, strict=True))
    assert 0 < t.min() < 0.02 and 0.98 < t.max() <= 1 and abs(t.mean() - 0.5) < 0.05
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "rand", lambda self: torch.zeros(self.args.batch))
        train.main([*small_run, "--updates", "1", "--overwrite"])
    assert (used[-1][0] == 1).all()                            # U(0, 1]: pure noise is learnt from, pure data is not
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02 and len(eps.flatten(1).unique(dim=0)) == 320

def test_most_times_are_from_the_middle(small_run, monkeypatch):
    """By the quantiles of a normal variable: 0, 1 and -2 standard deviations; u = 1 stays pure noise."""
    used, loss = [], train.training_loss
    monkeypatch.setattr(train, "training_loss", lambda *a: (used.append(a[2]), loss(*a))[1])
    u = torch.tensor([0.5, 0.841345, 0.02275, 1e-6, 1.001, 1.125, 1.2475, 1.25]) * 0.8
    monkeypatch.setattr(train.Trainer, "rand", lambda self: 1 - u)
    train.main([*small_run, "--updates", "1", "--times", "middle"])
    mean, spread, share = trainer.MIDDLE
    assert share == 0.8
    assert_close(torch.logit(used[0][:3]), mean + spread * torch.tensor([0.0, 1, -2]), atol=2e-3, rtol=0)
    assert_close(used[0][4:], torch.tensor([0.004, 0.5, 0.99, 1]))
    assert 0 < used[0][3] < used[0][2]

def test_compiled_training_learns_the_same(small_run, tmp_path, monkeypatch):
    """Through all of torch.compile but its last stage, the C++ compiler, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    train.main([*small_run, "--updates", "3", "--dtype", "fp32", "--out", str(tmp_path / "plain")])
    train.main([*small_run, "--updates", "3", "--dtype", "fp32", "--out", str(tmp_path / "compiled"), "--compile"])
    a, b = (load_model(tmp_path / name / "ckpt.pt")[0] for name in ("plain", "compiled"))
    z = torch.randn(2, 3, 8, 8)
    assert_close(Denoiser(a, Cosine())(z, 0.5), Denoiser(b, Cosine())(z, 0.5), rtol=1e-3, atol=1e-3)

# ---- greyscale ------------------------------------------------------------------------------------------
def test_greyscale_images_make_a_model_of_one_channel(small_run, tmp_path, capsys):
    for f in (tmp_path / "data").rglob("*.png"):
        Image.open(f).convert("L").save(f)
    train.main([*small_run, "--updates", "2", "--sample-every", "2"])
    assert "the images have no colour: a model of one channel" in capsys.readouterr().out
    ckpt, cpu = str(tmp_path / "out" / "ckpt.pt"), ["--device", "cpu", "--dtype", "fp32"]
    assert load_checkpoint(ckpt)["shape"] == [1, 8, 8]
    sample.main(["--ckpt", ckpt, "--steps", "2", "-n", "3", "--save", str(tmp_path / "x.npz"), *cpu])
    saved = np.load(tmp_path / "x.npz")["arr_0"]
    assert saved.shape == (3, 8, 8, 3) and (saved == saved[..., :1]).all() and saved.std() > 1
    for schedule, more in (("pd", []), ("shortcut", ["--pool", "4"])):
        distill.main(["--ckpt", ckpt, "--schedule", schedule, "--steps", "4", "--updates", "2", "--batch", "4", *cpu,
                      *more, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / schedule)])
        assert load_checkpoint(tmp_path / schedule / "ckpt.pt")["shape"] == [1, 8, 8]
    train.main([*small_run, "--updates", "3", "--resume"])
    train.main([*small_run, "--updates", "1", "--channels-in", "3", "--out", str(tmp_path / "colour")])
    assert load_checkpoint(tmp_path / "colour" / "ckpt.pt")["shape"] == [3, 8, 8]
    sample.main(["--ckpt", ckpt, str(tmp_path / "colour" / "ckpt.pt"), "--steps", "2", "-n", "2", "--out",
                 str(tmp_path / "both.png"), *cpu])
    train.main([*small_run, "--updates", "1", "--overwrite", "--channels-in", "3"])
    assert load_checkpoint(ckpt)["shape"] == [3, 8, 8]

def test_the_lightness_of_colours_is_pils(tmp_path):
    images = load_data(labelled_images(tmp_path / "d", 4), 8, None, tmp_path / "c")
    colour, grey = images.read(np.arange(4), np.zeros(4, bool)), [np.asarray(Image.fromarray(p).convert("L"))
                                                                  for p in images.pixels]
    images.channels = 1
    got = images.read(np.arange(4), np.zeros(4, bool))
    assert colour.shape == (4, 3, 8, 8) and got.shape == (4, 1, 8, 8)
    assert np.abs((got[:, 0].numpy() + 1) * 127.5 - np.stack(grey)).max() <= 1
