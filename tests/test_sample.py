"""sample.py from its command line, on a tiny untrained model with its zero layers filled."""

import json
import math
import signal
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import start
from PIL import Image
from torch.testing import assert_close

import sample as script
from checkpoint import save_checkpoint
from data import to_pixels
from ddim import Cosine, Denoiser, ddim_sample, start_noise
from model import UNet, UNetConfig

def make_checkpoint(path, classes=0):
    torch.manual_seed(0)
    net = UNet(UNetConfig(channels=16, mult=(1,), blocks=1, attention=(), head_channels=16, groups=8, classes=classes))
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    ema = {k: v * 0.9 for k, v in net.state_dict().items()}
    save_checkpoint(path, dict(config=asdict(net.config), weights=net.state_dict(), ema=ema, schedule="cosine",
                               predicts="v", shape=[3, 8, 8], classes=["cat", "dog", "owl"][:classes], step=7))
    return net.eval()

def flags_of(path):
    return ["--ckpt", str(path), "--device", "cpu", "--dtype", "fp32"]

@pytest.fixture
def ckpt(tmp_path):
    make_checkpoint(tmp_path / "ckpt.pt")
    return flags_of(tmp_path / "ckpt.pt")

@pytest.fixture
def ckpt3(tmp_path):
    make_checkpoint(tmp_path / "ckpt.pt", classes=3)
    return flags_of(tmp_path / "ckpt.pt")

@pytest.fixture
def drawn(monkeypatch):
    """The numbers of the images that are drawn, batch by batch. Ctrl-C is pressed in the batch number drawn.stop."""
    class Batches(list):
        stop = None

    batches, original = Batches(), script.Sampler.__call__

    def record(self, indices, steps):
        if len(batches) == batches.stop:
            raise KeyboardInterrupt
        batches.append(list(indices))
        return original(self, indices, steps)
    monkeypatch.setattr(script.Sampler, "__call__", record)
    return batches

def pictures(path):
    """The images in a folder or an npz, by name."""
    if path.suffix == ".npz":
        return {f"{i:05d}.png": image for i, image in enumerate(np.load(path)["arr_0"])}
    return {p.name: np.asarray(Image.open(p)) for p in sorted(path.glob("*.png"))}

def test_the_grid_has_a_row_per_step_count_and_the_same_noise_in_a_column(ckpt, tmp_path):
    script.main([*ckpt, "--steps", "1", "4", "-n", "3", "--seed", "5", "--raw", "--out", str(tmp_path / "g.png")])
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    grid = grid[:, grid.shape[1] - 26 * 8:][::8, ::8]                   # without labels, one value per pixel
    assert grid.shape == (17, 26, 3)
    z = start_noise(5, range(3), (3, 8, 8))
    xhat = Denoiser(make_checkpoint(tmp_path / "again.pt"), Cosine())
    for row, steps in enumerate((1, 4)):
        x = to_pixels(ddim_sample(xhat, z, steps))
        for column in range(3):
            shown = grid[9 * row:9 * row + 8, 9 * column:9 * column + 8]
            assert np.abs(shown.astype(int) - x[column]).max() <= 1

def test_models_stand_under_each_other_in_every_step_count(ckpt, tmp_path):
    (tmp_path / "same").mkdir()
    make_checkpoint(tmp_path / "same" / "ckpt.pt")
    flags = ["--steps", "1", "4", "-n", "3", "--out", str(tmp_path / "g.png")]
    script.main([*ckpt, *flags, "--ckpt", ckpt[1], str(tmp_path / "same" / "ckpt.pt")])
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    grid = grid[:, grid.shape[1] - 26 * 8:][::8, ::8]
    rows = [grid[9 * i:9 * i + 8].astype(int) for i in range(4)]
    assert len(grid) == 35 and (rows[0] == rows[1]).all() and (rows[2] == rows[3]).all()
    assert np.abs(rows[1] - rows[2]).max() > 1

def test_many_models_stand_side_by_side_in_every_step_count(ckpt, tmp_path):
    for name in ("second", "third"):
        (tmp_path / name).mkdir()
        make_checkpoint(tmp_path / name / "ckpt.pt")
    flags = ["--steps", "1", "4", "-n", "2", "--out", str(tmp_path / "g.png")]
    script.main([*ckpt, *flags, "--ckpt", ckpt[1], str(tmp_path / "second"), str(tmp_path / "third")])
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert (grid[:20, -6 * 72:] < 128).any()                  # the names above
    grid = grid[20:, grid.shape[1] - 53 * 8:][::8, ::8].astype(int)
    blocks = [grid[:, 18 * i:18 * i + 17] for i in range(3)]
    assert len(grid) == 17 and (blocks[0] == blocks[1]).all() and (blocks[1] == blocks[2]).all()
    assert np.abs(grid[:8] - grid[9:]).max() > 1

def test_a_grid_of_classes_says_which_and_its_file_too(ckpt3, tmp_path):
    script.main([*ckpt3, "--steps", "1", "-n", "3"])
    script.main([*ckpt3, "--steps", "1", "-n", "3", "--class", "dog", "--guidance", "2.5"])
    every, dog = (np.asarray(Image.open(tmp_path / name)) for name in ("grid.png", "grid-dog-w2.5.png"))
    assert every.shape == dog.shape and (every[:20, -200:] != dog[:20, -200:]).any()

def test_models_of_different_sizes_need_a_grid_each(ckpt, tmp_path):
    state = torch.load(ckpt[1]) | {"shape": [3, 16, 16]}
    save_checkpoint(tmp_path / "big.pt", state)
    with pytest.raises(SystemExit, match="different sizes"):
        script.main([*ckpt, "--steps", "1", "--ckpt", ckpt[1], str(tmp_path / "big.pt")])

def test_models_are_called_by_their_folders(tmp_path):
    (tmp_path / "celebahq" / "unet").mkdir(parents=True)
    assert script.model_name(tmp_path / "celebahq") == "celebahq"                     # in diffusers' layout
    assert script.model_name(tmp_path / "dsdi" / "ckpt.pt") == "dsdi" and script.model_name("ckpt.pt") == "ckpt"

def test_the_grid_lies_beside_the_checkpoint_by_default(ckpt, tmp_path):
    script.main([*ckpt, "--steps", "1"])
    assert (tmp_path / "grid.png").exists()
    script.main([*ckpt, "--steps", "1", "--out", str(tmp_path / "folder")])
    assert (tmp_path / "folder" / "grid.png").exists()

def test_folder_and_npz_hold_the_same_images_whatever_the_batch(ckpt, tmp_path):
    script.main([*ckpt, "--steps", "2", "-n", "7", "--save", str(tmp_path / "png"), "--batch", "3"])
    script.main([*ckpt, "--steps", "2", "-n", "7", "--save", str(tmp_path / "x.npz"), "--batch", "7"])
    files = pictures(tmp_path / "png")
    assert list(files) == [f"{i:05d}.png" for i in range(7)]
    array = np.load(tmp_path / "x.npz", allow_pickle=False)["arr_0"]
    assert array.shape == (7, 8, 8, 3) and array.dtype == np.uint8
    assert np.abs(array.astype(int) - np.stack(list(files.values()))).max() <= 1
    assert not (tmp_path / "x.npz.raw").exists()

def test_averaged_and_raw_weights_give_other_images(ckpt, tmp_path):
    for flags, name in (([], "a.npz"), (["--raw"], "b.npz")):
        script.main([*ckpt, "--steps", "2", "-n", "2", "--save", str(tmp_path / name), *flags])
    a, b = (np.load(tmp_path / name)["arr_0"] for name in ("a.npz", "b.npz"))
    assert (a != b).mean() > 0.1

def test_a_folder_is_completed_not_drawn_again(ckpt, tmp_path, drawn):
    args = [*ckpt, "--steps", "2", "--save", str(tmp_path / "png"), "-n"]
    script.main([*args, "6"])
    whole = pictures(tmp_path / "png")
    for i in (1, 4):
        (tmp_path / "png" / f"{i:05d}.png").unlink()
    script.main([*args, "8"])                                           # and two more than before
    assert drawn == [[0, 1, 2, 3, 4, 5], [1, 4, 6, 7]]
    now = pictures(tmp_path / "png")
    assert len(now) == 8 and all(np.abs(now[k].astype(int) - whole[k]).max() <= 1 for k in whole)

@pytest.mark.parametrize("name", ["png", "x.npz"])
def test_after_ctrl_c_the_same_command_goes_on(name, ckpt, tmp_path, drawn, capsys):
    args = [*ckpt, "--steps", "2", "-n", "7", "--batch", "2", "--save", str(tmp_path / name)]
    drawn.stop = 2
    with pytest.raises(SystemExit) as e:
        script.main(args)
    assert e.value.code == 130 and "stopped with 4 of 7 images" in capsys.readouterr().out
    drawn.stop = None
    script.main(args)
    script.main(args)                                                   # nothing is left to draw
    assert drawn == [[0, 1], [2, 3], [4, 5], [6]]
    script.main([*args[:-1], str(tmp_path / "whole.npz")])
    a, b = pictures(tmp_path / name), pictures(tmp_path / "whole.npz")
    assert a.keys() == b.keys() and all(np.abs(a[k].astype(int) - b[k]).max() <= 1 for k in a)

def test_a_killed_npz_goes_on(ckpt, tmp_path, drawn):
    args = [*ckpt, "--steps", "4", "-n", "100", "--batch", "4", "--save"]
    child = start("sample.py", *args, tmp_path / "x.npz")
    raw, image = tmp_path / "x.npz.raw", 8 * 8 * 3
    while not raw.exists() or raw.stat().st_size < 8 * image:
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "x.npz").exists()
    with open(raw, "ab") as f:
        f.write(b"half an image")
    kept = raw.stat().st_size // image
    script.main([*args, str(tmp_path / "x.npz")])
    assert kept < 100 and sum(drawn, []) == list(range(kept, 100))
    script.main([*args, str(tmp_path / "whole.npz")])
    a, b = (np.load(tmp_path / name)["arr_0"] for name in ("x.npz", "whole.npz"))
    assert np.abs(a.astype(int) - b).max() <= 1 and len(a) == 100

def test_an_npz_that_was_killed_while_it_was_put_together_is_made_again(ckpt, tmp_path, monkeypatch):
    args = [*ckpt, "--steps", "2", "-n", "4", "--save", str(tmp_path / "x.npz")]
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(np, "savez", lambda *a, **k: 1 / 0)
        script.main(args)
    script.main(args)
    assert len(pictures(tmp_path / "x.npz")) == 4 and not (tmp_path / "x.npz.raw").exists()

def test_samples_of_other_settings_are_not_mixed(ckpt, tmp_path):
    for target in ("png", "x.npz"):
        args = [*ckpt, "-n", "2", "--save", str(tmp_path / target), "--steps"]
        script.main([*args, "2"])
        with pytest.raises(SystemExit, match="made with another steps"):
            script.main([*args, "4"])
        with pytest.raises(SystemExit, match="made with another seed"):
            script.main([*args, "2", "--seed", "3"])
        assert not (tmp_path / "x.npz.raw").exists()                    # the lock of a refused command
        script.main([*args, "4", "--overwrite"])
    assert json.loads((tmp_path / "png" / "settings.json").read_text())["steps"] == 4
    with pytest.raises(SystemExit, match="made with another n;"):
        script.main([*args, "4", "-n", "3"])                            # the npz: a folder may grow
    with pytest.raises(SystemExit, match="made with another ckpt"):
        make_checkpoint(tmp_path / "ckpt.pt", classes=3)
        script.main([*args, "4"])

def test_samples_are_overwritten_when_there_are_new_ones(ckpt, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt
    for target, kept in (("png", "png/00001.png"), ("x.npz", "x.npz")):
        args = [*ckpt, "-n", "2", "--save", str(tmp_path / target), "--steps"]
        script.main([*args, "2"])
        old = (tmp_path / kept).read_bytes()
        with monkeypatch.context() as broken:
            broken.setattr("sample.ddim_sample", lambda xhat, z, *more: z * math.nan)
            with pytest.raises(SystemExit, match="not finite"):
                script.main([*args, "4", "--overwrite"])
            broken.setattr("sample.ddim_sample", interrupted)
            with pytest.raises(SystemExit, match="130"):
                script.main([*args, "4", "--overwrite"])
            assert "stopped with 0 of 2 images; the same command goes on" in capsys.readouterr().out
        assert (tmp_path / kept).read_bytes() == old
        with pytest.raises(SystemExit, match="made with another steps"):
            script.main([*args, "4"])                                   # they are still those of two steps
        script.main([*args, "4", "--overwrite"])
        new = (tmp_path / kept).read_bytes()
        assert new != old
        script.main([*args, "4"])                                       # nothing to do
        assert (tmp_path / kept).read_bytes() == new

def test_a_folder_of_foreign_images_is_refused(ckpt, tmp_path):
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mine" / "00001.png")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(SystemExit, match="did not write; choose another --save"):
            script.main([*ckpt, "-n", "2", "--save", str(tmp_path / "mine"), "--steps", "2", *flags])
    assert (tmp_path / "mine" / "00001.png").exists()

def test_classes_are_chosen_by_name_or_number_and_saved(ckpt3, tmp_path):
    args = [*ckpt3, "-n", "5", "--steps", "2", "--save"]
    script.main([*args, str(tmp_path / "all.npz")])
    assert list(np.load(tmp_path / "all.npz")["arr_1"]) == [0, 1, 2, 0, 1]
    script.main([*args, str(tmp_path / "two.npz"), "--class", "owl", "1"])
    assert list(np.load(tmp_path / "two.npz")["arr_1"]) == [2, 1, 2, 1, 2]
    script.main([*args, str(tmp_path / "guided.npz"), "--class", "owl", "1", "--guidance", "3"])
    a, b = (np.load(tmp_path / name)["arr_0"] for name in ("two.npz", "guided.npz"))
    assert (a != b).any()

@pytest.mark.parametrize("count,n,found", [(0, 5, None), (3, 5, [0, 1, 2]), (5, 3, [0, 1, 3]),
                                           (1000, 4, [0, 250, 500, 750])])
def test_a_few_classes_are_spread_over_all(count, n, found):
    assert script.spread_classes(count, n) == found

def test_guidance_is_the_formula_with_the_null_class(tmp_path):
    net = make_checkpoint(tmp_path / "ckpt.pt", classes=3)
    state = dict(schedule="cosine", predicts="v", shape=[3, 8, 8])
    sampler = script.Sampler(net, state, torch.device("cpu"), "fp32", [2, 0], 2.5)
    z, y = start_noise(0, [3, 4], (3, 8, 8)), torch.tensor([0, 2])      # the classes in turn: 2, 0, 2, 0, 2
    guided = lambda z, t: net(z, t, torch.tensor([3, 3])) * -1.5 + net(z, t, y) * 2.5  # noqa: E731
    assert_close(sampler([3, 4], 3), ddim_sample(Denoiser(guided, Cosine()), z, 3), rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize("flags,message", [
    (["--save", "x"], "--save needs -n, exactly one step count and one --ckpt"),
    (["--save", "x", "-n", "5", "--steps", "2", "4"], "--save needs -n, exactly one step count and one --ckpt"),
    (["--save", "x", "-n", "5", "--steps", "2", "--ckpt", "a.pt", "b.pt"], "and one --ckpt"),
    (["--steps", "0"], "--steps: 0 is not a number from 1 on"),
    (["--save", "x", "--out", "y"], "not allowed with argument --save"),
    (["--export", "x", "--ckpt", "a.pt", "b.pt"], "give one --ckpt"),
    (["--export", "x", "--guidance", "2"], "--export writes the whole model: it takes no --class and no --guidance"),
    (["--out", "grid.jpg"], "the grid is a .png"),
    (["--class", "cat"], "trained without --classes"),
    (["--guidance", "2"], "trained without --classes"),
    (["--ckpt", "nowhere.pt"], "no checkpoint at nowhere.pt"),
])
def test_bad_flags_are_explained_in_one_line(ckpt, flags, message, capsys):
    with pytest.raises(SystemExit) as e:
        script.main([*ckpt, *flags])
    text = capsys.readouterr().err.strip().splitlines()[-1] if e.value.code == 2 else str(e.value)
    assert message in text and "\n" not in text

def test_an_unknown_class_lists_the_known_ones(ckpt3):
    with pytest.raises(SystemExit, match="no class 'cow'; this model has cat, dog, owl"):
        script.main([*ckpt3, "--class", "cow"])

def test_an_unwritable_target_is_a_one_line_error(ckpt, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for flags in (["--save", str(tmp_path / "file" / "png"), "-n", "2"], ["--out", str(tmp_path / "file" / "g.png")]):
        with pytest.raises(SystemExit, match="error: can't write"):
            script.main([*ckpt, "--steps", "2", *flags])

def test_overwriting_spares_files_that_are_no_samples(ckpt, tmp_path):
    args = [*ckpt, "-n", "2", "--save", str(tmp_path / "png"), "--steps"]
    script.main([*args, "2"])
    others = {"2026-holiday.png", "²0000.png", "1.png", "000001.png"}
    for name in others:
        Image.new("RGB", (8, 8)).save(tmp_path / "png" / name)
    script.main([*args, "4", "--overwrite"])
    assert set(pictures(tmp_path / "png")) == {"00000.png", "00001.png"} | others
