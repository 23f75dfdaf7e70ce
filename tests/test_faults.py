"""What goes wrong around the project: full disks, second processes, replaced files, odd names, damaged data.

With the real thing where it can be had: a process of its own that is killed, files that can't grow.
"""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, labelled_images, log_of, same, start
from PIL import Image

import curves
import data
import distill
import fid
import hooks
import runtime
import sample
import train
import trainer
from checkpoint import claimed, load_checkpoint, save_checkpoint, whole_file
from data import DataError, load_data
from ldm import load_any_model, model_hash

CPU = ["--device", "cpu", "--dtype", "fp32"]
QUICK = ["--weights", "random", "-n", "4", "--steps", "2", *CPU]

@pytest.fixture
def ckpt(small_run, tmp_path):
    train.main([*small_run, "--updates", "2"])
    return tmp_path / "out" / "ckpt.pt"

def exits(message):
    return pytest.raises(SystemExit, match=message)

# ---- full disks -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def limited(size):
    """Within it no file may grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

@pytest.mark.parametrize("size", [30_000, 200_000])
def test_no_room_for_a_checkpoint(small_run, tmp_path, size):
    with limited(size), exits(rf"error: can't write {tmp_path}/out/ckpt\.pt \(File too large\); what was there before"):
        train.main([*small_run, "--updates", "5"])
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["log.jsonl"]

def test_no_room_for_statistics_costs_no_score(tmp_path, capsys):
    folder = labelled_images(tmp_path / "a", 4)
    with limited(1000), exits(rf"error: can't write {tmp_path}/s\.npz \(File too large\)"):
        fid.main([folder, folder, *QUICK[:2], *CPU, "--save", str(tmp_path / "s.npz")])
    assert "rFID (random features): " in capsys.readouterr().out
    assert not list(tmp_path.glob("s.npz*"))

def test_no_room_for_the_references_statistics_costs_no_score(ckpt, tmp_path, monkeypatch, capsys):
    def full(*a, **k):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez", full)
    fid.main(["--ckpt", str(ckpt), *QUICK, "--out", str(tmp_path / "fid"), "--cache", str(tmp_path / "cache")])
    said = capsys.readouterr()
    assert "warning: the reference's statistics are not kept: error: can't write" in said.err
    assert "**rFID (random features)** at N steps" in said.out

def test_no_room_for_many_samples_is_told_with_the_name_of_the_file(ckpt, tmp_path):
    with limited(1000), pytest.raises(OSError, match=r"File too large: '.*x\.npz\.raw'"):
        sample.main(["--ckpt", str(ckpt), "--steps", "2", "-n", "40", "--save", str(tmp_path / "x.npz"), *CPU])

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_no_room_in_memory_is_one_line(error, monkeypatch):
    def main():
        raise error
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for stream in (sys.stdout, sys.stderr):                   # pytest's own
        monkeypatch.setattr(stream, "reconfigure", lambda **k: None, raising=False)
    with exits("error: out of memory; a smaller --batch needs less"):
        runtime.launch(main)

def test_the_root_of_the_disk_is_a_place_like_any_other(monkeypatch):
    monkeypatch.setattr("os.access", lambda *a: True)
    assert train.check_out(train.parse_args([*SMALL_RUN, "--out", "/"])) is None

def test_a_run_whose_log_is_gone_has_no_curves(tmp_path):
    curves.draw_curves(types.SimpleNamespace(out=tmp_path))
    assert not list(tmp_path.iterdir())

# ---- second processes -----------------------------------------------------------------------------------
def test_two_runs_never_share_a_folder(small_run, ckpt, tmp_path):
    before = ckpt.read_bytes()
    with claimed(tmp_path / "out"):
        for flags in (["--overwrite", "--updates", "3"], ["--resume", "--updates", "3"], ["--updates", "3"]):
            with exits("another process is writing into"):
                train.main([*small_run, *flags])
        with exits("another process is writing"):
            fid.main(["--ckpt", str(ckpt), *QUICK, "--out", str(tmp_path / "out")])
    assert ckpt.read_bytes() == before

def test_a_run_that_came_while_another_packed_its_data_stays(small_run, tmp_path, monkeypatch):
    other = tmp_path / "out" / "ckpt.pt"
    def packing(*args):
        other.parent.mkdir()
        other.write_bytes(b"of a run that was quicker")
        return load_data(*args)
    monkeypatch.setattr(train, "load_data", packing)
    with exits("holds a run already"):
        train.main([*small_run, "--updates", "1"])
    assert other.read_bytes() == b"of a run that was quicker"

def test_own_samples_are_drawn_under_the_lock_of_the_run(ckpt, tmp_path, monkeypatch):
    def drawing(out, *args):
        with exits("another process is writing"), claimed(out):
            pass
        raise KeyboardInterrupt
    monkeypatch.setattr("source.OwnSamples", drawing)
    with pytest.raises(KeyboardInterrupt):
        distill.main(["--ckpt", str(ckpt), "--schedule", "shortcut", "--out", str(tmp_path / "s"), *CPU])

def test_a_folder_that_cant_be_made_is_told_before_any_work(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_data", None)             # to call it would be a TypeError
    (tmp_path / "file").touch()
    with exits("can't write into"):
        train.main([*small_run, "--updates", "1", "--out", str(tmp_path / "file" / "out")])

@pytest.mark.parametrize("name", ["x.npz", "folder"])
def test_two_savers_never_share_a_target(ckpt, tmp_path, name):
    flags = ["--ckpt", str(ckpt), "--steps", "1", "--batch", "8", *CPU]
    first = start("sample.py", *flags, "-n", "4000", "--save", tmp_path / name)
    while not (tmp_path / f"{name}.raw").exists() and not (tmp_path / name).exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.02)
    with exits("another process is writing"):
        sample.main([*flags, "-n", "4000", "--save", str(tmp_path / name)])
    first.kill()
    first.communicate()
    sample.main([*flags, "-n", "40", "--save", str(tmp_path / "ok.npz")])
    assert sorted(f.name for f in tmp_path.glob("ok.npz*")) == ["ok.npz", "ok.npz.json"]
    sample.main([*flags, "-n", "40", "--save", str(tmp_path / "ok.npz")])      # nothing to do, and nothing left behind
    assert sorted(f.name for f in tmp_path.glob("ok.npz*")) == ["ok.npz", "ok.npz.json"]

def test_the_lock_stays_on_the_file_that_an_overwriting_saver_writes(ckpt, tmp_path, monkeypatch):
    flags = ["--ckpt", str(ckpt), "--steps", "1", "-n", "8", *CPU, "--save", str(tmp_path / "x.npz")]
    (tmp_path / "x.npz.raw").write_bytes(b"of a killed run")
    (tmp_path / "x.npz.json").write_text('{"ckpt": "another"}')
    original = sample.Samples.write
    def write(self, indices, pixels):
        original(self, indices, pixels)
        with exits("another process is writing"), claimed(self.raw, folder=False):
            pass
        assert self.raw.stat().st_size == pixels.nbytes
        raise KeyboardInterrupt
    monkeypatch.setattr(sample.Samples, "write", write)
    with pytest.raises(SystemExit) as e:
        sample.main([*flags, "--batch", "4", "--overwrite"])
    assert e.value.code == 130

@pytest.mark.skipif(not os.path.exists("/proc"), reason="asks Linux who is still there")
def test_ranks_end_when_their_launcher_is_killed(small_run, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    child = subprocess.Popen([*launcher, str(ROOT / "train.py"), *small_run, "--updates", "100000"],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "out" / "log.jsonl", time.time() + 120
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert child.poll() is None and time.time() < deadline
        time.sleep(0.1)
    child.kill()
    child.wait()
    def alive():
        pids = [p for p in os.listdir("/proc") if p.isdigit()]
        with contextlib.suppress(OSError):
            return [p for p in pids if str(tmp_path).encode() in open(f"/proc/{p}/cmdline", "rb").read()]
        return ["?"]
    while alive():
        assert time.time() < deadline, alive()
        time.sleep(0.2)

# ---- replaced files ---------------------------------------------------------------------------------------
def test_a_score_belongs_to_the_weights_that_were_read(ckpt, small_run, tmp_path, monkeypatch):
    """The checkpoint is replaced while fid.py waits for its data."""
    was = model_hash(load_any_model(ckpt)[1])
    def slow(*args):
        state = load_checkpoint(ckpt)
        save_checkpoint(ckpt, {k: v for k, v in state.items()} | dict(step=9))
        return load_data(*args)
    monkeypatch.setattr(fid, "load_data", slow)
    fid.main(["--ckpt", str(ckpt), *QUICK, "--out", str(tmp_path / "fid"), "--cache", str(tmp_path / "cache")])
    (score,) = (tmp_path / "out" / "scores").iterdir()
    assert json.loads(score.read_text())["fake"]["hash"] == was != model_hash(load_any_model(ckpt)[1])

def test_a_file_that_changed_since_it_was_read_has_no_hash(ckpt):
    _, state = load_any_model(ckpt)
    save_checkpoint(ckpt, load_checkpoint(ckpt))
    with exits("has changed since it was read"):
        model_hash(state)

# ---- data that changed --------------------------------------------------------------------------------------
def test_classes_are_numbered_as_people_count(tmp_path):
    names = ["0", "1", "2", "10", "11", "b", "n010", "n9"]
    labelled_images(tmp_path / "d", 16, classes=names)
    images = load_data(tmp_path / "d", 8, None, tmp_path / "cache")
    assert images.classes == ["0", "1", "2", "10", "11", "b", "n9", "n010"]

def test_labels_keep_the_meaning_that_a_model_gave_them(tmp_path):
    labelled_images(tmp_path / "d", 6, classes=["a", "b", "c"])
    images = load_data(tmp_path / "d", 8, None, tmp_path / "cache")
    names = [images.classes[i] for i in images.labels]
    images.number_as(["c", "a", "b"])
    assert [images.classes[i] for i in images.labels] == names and images.classes == ["c", "a", "b"]
    with pytest.raises(DataError, match="classes are not those of the data, which differ in: c, d"):
        images.number_as(["a", "b", "d"])

def test_resuming_on_other_data_is_told_and_on_other_classes_refused(small_run, tmp_path, capsys):
    train.main([*small_run, "--classes", "--updates", "2"])
    resume = ["--resume", "--out", str(tmp_path / "out")]
    train.main([*resume, "--updates", "3"])
    assert "not what it was" not in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a" / "more.png")
    train.main([*resume, "--updates", "4"])
    assert "the data is not what it was: 10 images then, 11 now" in capsys.readouterr().out
    (tmp_path / "data" / "b").rename(tmp_path / "data" / "c")
    with exits("classes are not those of the data, which differ in: b, c"):
        train.main([*resume, "--updates", "5"])
    with exits("classes are not those of the data"):
        distill.main(["--ckpt", str(tmp_path / "out" / "ckpt.pt"), "--schedule", "pd", "--out", str(tmp_path / "pd"),
                      "--cache", str(tmp_path / "cache"), *CPU])

def test_one_image_of_many_that_changed_is_noticed_and_another_place_is_no_change(tmp_path):
    labelled_images(tmp_path / "d", 600)
    digest = lambda name: load_data(tmp_path / name, 8, None, tmp_path / "c").digest()  # noqa: E731
    before = digest("d")
    (tmp_path / "d").rename(tmp_path / "e")
    assert digest("e") == before
    for file in (tmp_path / "e").rglob("*.png"):
        file.write_bytes(file.read_bytes())                   # a copy: newer, and the same
    assert digest("e") == before
    digests = {before}
    for file in sorted((tmp_path / "e").rglob("*.png"))[1:4]:     # of the pixels a digest sees every second or third
        Image.new("RGB", (8, 8), "red").save(file)
        digests.add(digest("e"))
    assert len(digests) == 4

# ---- settings ------------------------------------------------------------------------------------------------
def test_what_follows_from_a_setting_follows_the_new_one(ckpt, tmp_path):
    out = ["--out", str(tmp_path / "d")]
    distill.main(["--ckpt", str(ckpt), "--steps", "4", "--updates", "2", "--lr", "1e-4", *out, *CPU])
    args = distill.parse_args(["--resume", *out])
    assert distill.final_rate(args) == pytest.approx(1e-5)
    assert distill.final_rate(distill.parse_args(["--resume", "--lr", "2e-3", *out])) == pytest.approx(2e-4)
    assert distill.final_rate(distill.parse_args(["--resume", "--lr-end", "7e-6", *out])) == pytest.approx(7e-6)

def test_a_preset_is_not_changed_on_the_way(ckpt, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--resume", "--preset", "celeba64", "--out", str(tmp_path / "out")])
    assert "--resume can't change --preset: what the run has done" in capsys.readouterr().err

def test_a_run_goes_on_from_another_folder(tmp_path, monkeypatch):
    labelled_images(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL_RUN, "--data", "pictures", "--cache", str(tmp_path / "c"), "--out", "run", "--updates", "2"])
    monkeypatch.chdir("/")
    train.main(["--resume", "--out", str(tmp_path / "run"), "--updates", "3"])
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 3

def test_a_run_without_data_reads_none_when_resumed(ckpt, tmp_path, monkeypatch):
    """The model was trained on images of its user's, and shortcut learns from its own samples."""
    class Killed(BaseException):
        pass
    def killed(guard, trainer):
        raise Killed
    flags = ["--ckpt", str(ckpt), "--schedule", "shortcut", "--steps", "4", "--pool", "4", "--updates", "4", "--batch",
             "4", "--save-every", "2", *CPU]
    distill.main([*flags, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(hooks.Guard, "picture", killed)
    with pytest.raises(Killed):
        distill.main([*flags, "--sample-every", "2", "--out", str(tmp_path / "cut")])
    monkeypatch.setattr(hooks.Guard, "picture", lambda guard, trainer: None)
    monkeypatch.setattr("source.load_data", lambda *args: pytest.fail("it reads data"))
    distill.main(["--resume", "--out", str(tmp_path / "cut")])
    whole, cut = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "cut"))
    assert same(whole["weights"], cut["weights"]) and cut["args"]["data"] is None
    assert cut["trained_on"] == dict(data=str(tmp_path / "data"), crop=None, flip=True, known=True)         # for fid.py
    cache = ["--cache", str(tmp_path / "cache")]
    fid.main(["--ckpt", str(tmp_path / "cut"), *QUICK, "--out", str(tmp_path / "f"), *cache])

# ---- damaged and odd data ------------------------------------------------------------------------------------
@pytest.mark.parametrize("cut", [-1, 1])
def test_a_mapped_file_of_the_wrong_length_is_refused(tmp_path, cut):
    path = tmp_path / "x.f16"
    path.write_bytes(bytes(24 + cut))
    with pytest.raises(DataError, match=f"is damaged .{24 + cut} bytes, not 24.; delete it"):
        data.mapped(path, np.float16, (2, 2, 3))

def an_lmdb(path, n=300):
    lmdb = pytest.importorskip("lmdb")
    labelled_images(path / "src", n, size=(40, 40))
    with lmdb.open(str(path / "x_lmdb"), map_size=1 << 28) as env, env.begin(write=True) as txn:
        for f in sorted((path / "src").rglob("*.png")):
            txn.put(f.stem.zfill(40).encode(), f.read_bytes())
    return path / "x_lmdb" / "data.mdb"

@pytest.mark.parametrize("damage,message", [
    (lambda b: b[:len(b) // 2], r"is cut off: [\d,]+ of [\d,]+ bytes"),
    (lambda b: b[:len(b) // 2] + bytes(len(b) - len(b) // 2), r"is damaged: it can't be read beyond image \d"),
])
def test_a_damaged_lmdb_is_one_line(tmp_path, damage, message):
    file = an_lmdb(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    child = start("train.py", *SMALL_RUN, "--data", file.parent, "--cache", tmp_path / "c", "--out", tmp_path / "out")
    output = child.communicate(timeout=120)[0]
    assert child.returncode == 1 and "Traceback" not in output
    assert re.search(rf"error: {re.escape(str(tmp_path))}.* {message}", output), output

def test_an_lmdb_is_packed_by_a_script_without_a_guard(tmp_path):
    """Which another process would run once more, and wait for itself."""
    (tmp_path / "x.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data import load_data; "
                                   f"print(len(load_data({str(an_lmdb(tmp_path, 5).parent)!r}, 8)))")
    child = start(tmp_path / "x.py", env=dict(os.environ, DSD_CACHE=str(tmp_path / "c")))
    assert child.communicate(timeout=60)[0].splitlines()[-1] == "5"

@pytest.mark.parametrize("encoding", ["ascii:strict", "cp1252:strict", "utf-8:strict"])
def test_names_that_cant_be_printed(tmp_path, encoding, monkeypatch):
    labelled_images(tmp_path / "data")
    (tmp_path / "data" / "a" / os.fsdecode(b"d\xe9.jpg")).write_bytes(b"")
    def printed(script, *flags):
        """What a script prints in a terminal of that encoding."""
        raw = io.BytesIO()
        terminal = io.TextIOWrapper(raw, *encoding.split(":"), write_through=True)
        with monkeypatch.context() as m:
            for name, value in (("argv", [script.__name__, *flags]), ("stdout", terminal), ("stderr", terminal)):
                m.setattr(sys, name, value)
            try:
                runtime.launch(script.main)
            except SystemExit as e:                           # of --help
                assert not e.code
        return raw.getvalue()
    flags = [*SMALL_RUN, "--data", str(tmp_path / "data"), "--cache", str(tmp_path / "c"), "--updates", "2"]
    first, from_the_cache = (printed(train, *flags, "--out", str(tmp_path / run)) for run in "ab")
    assert b"done: " in first and rb"d\udce9.jpg" in first and b"done: " in from_the_cache
    for script in (train, distill, sample, fid):
        assert b"usage: " in printed(script, "--help")

def test_samples_that_are_not_finite_are_no_pictures(ckpt, tmp_path):
    state = load_checkpoint(ckpt)
    save_checkpoint(ckpt, state | dict(ema={k: v * float("nan") for k, v in state["ema"].items()}))
    for flags in (["--steps", "3", "-n", "2", "--save", str(tmp_path / "p")], ["--steps", "3"]):
        with exits("error: image 0 at 3 steps is not finite"):
            sample.main(["--ckpt", str(ckpt), *flags, *CPU])
    with exits("error: image 0 at [12] steps is not finite"):
        fid.main(["--ckpt", str(ckpt), *QUICK, "--out", str(tmp_path / "f"), "--cache", str(tmp_path / "cache")])
    with pytest.raises(DataError, match="image 1 of 2 is not finite"):
        data.to_pixels(torch.tensor([0.0, float("inf")])[:, None, None, None].expand(2, 3, 4, 4))

def test_pixels_of_unknown_range_are_named_and_16_bits_are_scaled(tmp_path, capsys):
    folder = tmp_path / "d"
    folder.mkdir()
    shade = np.full((8, 8), 100)
    Image.fromarray(np.uint8(shade)).save(folder / "0.png")
    Image.fromarray(np.uint16(shade * 257)).save(folder / "1.png")
    Image.fromarray(np.uint16(shade * 257)).save(folder / "2.tif")
    Image.fromarray(np.float32(shade / 255)).save(folder / "3.tif")
    Image.fromarray(np.int32(shade)).save(folder / "4.tif")
    images = load_data(folder, 8, None, tmp_path / "c")
    assert images.pixels.shape == (3, 8, 8, 3) and (images.pixels == 100).all()
    error = capsys.readouterr().err
    assert "skipped 2 of 5 images" in error and "3.tif (ValueError: 32 bits a pixel (mode F), of unknown range" in error
    source = data.open_source(folder)
    assert (fid.decode_stored(source, list(source.items(0, None))[1]) == 100).all()
    with pytest.raises(DataError, match="3.tif in .* can't be read .ValueError: 32 bits"):
        fid.decode_stored(source, list(source.items(0, None))[3])

def test_a_message_names_the_file_and_not_the_object(tmp_path, capsys):
    labelled_images(tmp_path / "d")
    (tmp_path / "d" / "a" / "broken.png").write_bytes(b"no picture")
    load_data(tmp_path / "d", 8, None, tmp_path / "c")
    error = capsys.readouterr().err
    assert "a/broken.png (UnidentifiedImageError: cannot identify image file)" in error

def test_the_order_of_an_array_in_memory_does_not_matter(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 9, 3), np.uint8)
    np.savez(tmp_path / "c.npz", x)
    np.savez(tmp_path / "f.npz", np.asfortranarray(x))
    fid.main([str(tmp_path / "c.npz"), str(tmp_path / "f.npz"), "--weights", "random", *CPU])
    assert abs(float(re.search(r"rFID .*: (\S+)", capsys.readouterr().out)[1])) < 1e-6

@pytest.mark.parametrize("name", ["x.npy", "x.pkl"])
def test_what_is_no_data_set_is_called_so(tmp_path, name):
    (tmp_path / name).write_bytes(b"numbers")
    with exits(f"{name} is neither a folder, nor a zip, nor an LMDB folder"):
        fid.main([str(tmp_path / name), str(tmp_path / name), *QUICK[:2], *CPU])

def test_a_zip_with_backslashes_has_labels(tmp_path):
    labelled_images(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as z:
        for f in (tmp_path / "d").rglob("*.png"):
            info = zipfile.ZipInfo("x")
            info.filename = str(f.relative_to(tmp_path / "d")).replace("/", "\\")      # ZipInfo() itself would turn it
            z.writestr(info, f.read_bytes())
    images = load_data(tmp_path / "d.zip", 8, None, tmp_path / "c")
    assert images.classes == ["a", "b"] and len(images) == 10

# ---- work that was cut off --------------------------------------------------------------------------------------
def test_a_run_killed_at_its_last_picture_makes_it_when_resumed(ckpt, tmp_path, monkeypatch, capsys):
    class Killed(BaseException):
        pass
    def killed(guard, trainer):
        yield dict(rFID=1.0)
        raise Killed
    out, picture = tmp_path / "d", hooks.Guard.picture
    monkeypatch.setattr(hooks.Guard, "picture", killed)
    with pytest.raises(Killed):
        distill.main(["--ckpt", str(ckpt), "--steps", "4", "--updates", "4", "--log-every", "2", "--out", str(out),
                      *CPU])
    assert load_checkpoint(out / "ckpt.pt")["step"] == 4 and not list(out.glob("samples*"))
    monkeypatch.setattr(hooks.Guard, "picture", picture)
    distill.main(["--resume", "--out", str(out)])
    assert "done: " in capsys.readouterr().out
    assert [f.name for f in out.glob("samples*")] == ["samples-000004.png"]
    assert [e["step"] for e in log_of(out)] == [2, 4]                # the score of the hook that was cut off is gone
    with exits("is finished"):
        distill.main(["--resume", "--out", str(out)])

def test_ctrl_c_in_a_hook_ends_it_at_once_and_resume_makes_up_for_it(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "sample_picture", lambda trainer: signal.raise_signal(signal.SIGINT))
    with exits("130"):
        train.main([*small_run, "--updates", "9", "--sample-every", "3"])
    assert "stopped at the pictures and scores of update 3; saved" in capsys.readouterr().out
    monkeypatch.setattr(train, "sample_picture", lambda trainer: [dict(seen=trainer.step)])
    train.main(["--resume", "--out", str(tmp_path / "out")])
    assert [e["seen"] for e in log_of(tmp_path / "out") if "seen" in e] == [3, 6, 9]

def test_a_run_that_ended_before_its_first_checkpoint_is_no_obstacle(small_run, tmp_path):
    child = start("train.py", *small_run, "--updates", "100000", "--save-every", "100000")
    while not (tmp_path / "out" / "log.jsonl").exists():
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.05)
    child.kill()
    child.communicate()
    with exits("has no checkpoint to go on from: start the run without --resume"):
        train.main([*small_run, "--resume"])
    train.main([*small_run, "--updates", "2"])
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 2 and len(log_of(tmp_path / "out")) == 2

def test_ctrl_c_anywhere_is_one_line(ckpt, tmp_path):
    labelled_images(tmp_path / "many", 400, size=(64, 64))
    for script, flags in (("sample.py", ["--ckpt", ckpt, "--steps", "100000", "--out", tmp_path / "g.png", *CPU]),
                          ("fid.py", [tmp_path / "many", tmp_path / "many", "--weights", "random", *CPU])):
        child, output = start(script, *flags), ""
        while "%|" not in output:                             # a progress bar
            assert (more := child.stdout.read(1)), output
            output += more
        child.send_signal(signal.SIGINT)
        output += child.communicate(timeout=60)[0]
        assert child.returncode == 130 and "stopped; all files are whole" in output, output
        assert "Traceback" not in output

# ---- checks before work, and its bounds ----------------------------------------------------------------------------
def test_fid_looks_at_everything_before_it_computes(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "statistics_of_batches", None)          # to call it would be a TypeError
    small, big = (labelled_images(tmp_path / n, 4, size=(s, s)) for n, s in (("small", 8), ("big", 9)))
    np.savez(tmp_path / "f.npz", np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path / "i.npz", np.zeros((4, 9, 9, 3), np.uint8))
    flags = ["--weights", "random", *CPU]
    for fake, message in ((tmp_path / "f.npz", "must be .N, H, W, 3. uint8"), (tmp_path / "i.npz", "different sizes"),
                          (labelled_images(tmp_path / "one", 1), "at least two images")):
        with exits(message):
            fid.main([small, str(fake), *flags])
    with exits("is there already, and holds no statistics"):
        fid.main([small, big, "--save", str(tmp_path / "i.npz"), *flags])
    (tmp_path / "file").write_text("in the way")
    with exits("can't write into"):
        fid.main([small, small, "--save", str(tmp_path / "file" / "s.npz"), *flags])

def test_big_photographs_are_in_memory_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(fid.os, "cpu_count", lambda: 1)
    labelled_images(tmp_path / "d", 20)
    alive, most = set(), []
    original = fid.decode_stored
    def counted(source, item):
        image = original(source, item)
        alive.add(item[0])
        weakref.finalize(image, alive.discard, item[0])
        most.append(len(alive))
        return image
    monkeypatch.setattr(fid, "decode_stored", counted)
    for _, images in fid.decoded_batches(data.open_source(tmp_path / "d"), 10):
        for image in images:
            assert image.shape == (8, 8, 3)
    assert len(most) == 20 and max(most) <= 5

# ---- the user's own files, and surroundings ----------------------------------------------------------------------
def test_only_files_of_this_project_are_deleted(small_run, ckpt, tmp_path):
    own = [tmp_path / "out" / name for name in ("samples-holiday.png", "samples-1.png", "notes.txt", "pool-party.f16")]
    for f in own:
        f.write_text("mine")
    train.main([*small_run, "--updates", "2", "--overwrite"])
    assert all(f.read_text() == "mine" for f in own)
    folder = tmp_path / "album"
    folder.mkdir()
    (folder / "settings.json").write_text('{"mine": 1}')
    with exits("settings.json, that sample.py did not write"):
        sample.main(["--ckpt", str(ckpt), "--steps", "1", "-n", "2", "--save", str(folder), "--overwrite", *CPU])
    assert json.loads((folder / "settings.json").read_text()) == {"mine": 1}

def test_fewer_samples_than_are_there_are_refused(ckpt, tmp_path):
    flags = ["--ckpt", str(ckpt), "--steps", "1", "--save", str(tmp_path / "p"), *CPU]
    sample.main([*flags, "-n", "8"])
    with exits("holds 8 samples, more than -n 4"):
        sample.main([*flags, "-n", "4"])
    sample.main([*flags, "-n", "4", "--overwrite"])
    assert len(list((tmp_path / "p").glob("*.png"))) == 4

def test_without_a_home(tmp_path, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")
    for name in ("DSD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(data.Path, "home", nobody)
    with pytest.raises(DataError, match="there is no home folder .* set DSD_CACHE"):
        load_data(None, 8)
    assert len(load_data(labelled_images(tmp_path / "d"), 8, None, tmp_path / "c")) == 10

def test_a_tilde_that_the_shell_left_alone(ckpt, tmp_path):
    child = start("sample.py", f"--ckpt={ckpt}", "--steps", "1", "--out=~/g.png", *CPU,
                  env=os.environ | dict(HOME=str(tmp_path)))
    assert f"wrote {tmp_path}/g.png" in child.communicate(timeout=120)[0]

@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler to take away")
def test_compile_without_a_compiler_is_one_line(small_run, tmp_path):
    env = os.environ | dict(PATH="/nowhere", CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    child = start("train.py", *small_run, "--updates", "1", "--compile", env=env)
    output = child.communicate(timeout=300)[0]
    assert child.returncode == 1 and "error: --compile does not work here" in output, output
    assert "Traceback" not in output

def test_a_seed_that_no_generator_takes(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--seed", str(2 ** 62 + 1)])
    assert "is not a number from 0 to 2^62" in capsys.readouterr().err
    assert sample.parse_args(["--seed", str(2 ** 62)]).seed == 2 ** 62

def test_a_log_is_json_even_for_a_batch_of_one(ckpt, tmp_path):
    distill.main(["--ckpt", str(ckpt), "--steps", "4", "--updates", "4", "--batch", "1", "--log-every", "1",
                  "--out", str(tmp_path / "d"), *CPU])
    for line in (tmp_path / "d" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

# ---- what a run will be like, told before -------------------------------------------------------------------------
def test_pictures_of_kinds_that_cant_be_read_are_named(tmp_path, capsys):
    labelled_images(tmp_path / "d")
    for name in ("IMG_1.HEIC", "IMG_2.dng", "notes.txt"):
        (tmp_path / "d" / "a" / name).write_bytes(b"II*")
    (tmp_path / "d" / "a" / "0.png").rename(tmp_path / "d" / "a" / "0.jfif")
    assert len(load_data(tmp_path / "d", 8, None, tmp_path / "c")) == 10
    assert re.search(r"skipped 2 of 12 images .* a/IMG_1.HEIC .* a/IMG_2.dng", capsys.readouterr().err)

def test_a_few_pictures_are_learned_by_heart(small_run, capsys):
    train.main([*small_run, "--updates", "2"])
    assert "by heart" not in capsys.readouterr().out
    args = train.parse_args([*small_run, "--updates", "1000"])
    assert train.told_passes(10, args) == ("each image will be seen 800 times, and so many views of so few are learned "
                                           "by heart: 125 updates would make it 100\n")

@pytest.mark.parametrize("log_every", ["1", "1000"])
def test_a_run_of_months_is_told_after_a_minute(log_every, small_run, capsys, monkeypatch):
    """At the speed of all updates but the first, which takes an hour here, the others 40 s, and without pictures."""
    now, steps = [0.0], iter(range(10))
    def picture(_):
        now[0] += 5000
        if next(steps) == 3:
            raise KeyboardInterrupt
    real = trainer.Trainer.update
    def update(self):
        now[0] += 40 if self.step else 3600
        return real(self)
    monkeypatch.setattr(train, "sample_picture", picture)
    monkeypatch.setattr(trainer.Trainer, "update", update)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with exits("130"):
        train.main([*small_run, "--updates", "9003", "--sample-every", "1", "--log-every", log_every])
    told = re.findall(r"at this speed the run takes ([\d,]+) hours more", capsys.readouterr().err)
    assert told == ["100"]                                    # 9,000 of 40 s

def test_a_busy_machine_is_told(monkeypatch, capsys):
    for several, threads, told in ((2.0, 2, True), (0.6, 2, False), (1.0, 1, False)):
        monkeypatch.setattr("runtime.seconds_of_work", lambda n, several=several: several if n > 1 else 0.9)
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        runtime.warn_if_busy(torch.device("cpu"))
        assert ("2 times slower here than one" in capsys.readouterr().err) == told

def test_measuring_the_machine_leaves_it_as_it_was():
    before = torch.get_num_threads()
    assert 0 < runtime.seconds_of_work(before + 1) < 60 and torch.get_num_threads() == before

def test_ctrl_c_in_the_midst_of_a_checkpoint_is_no_full_disk(tmp_path):
    """torch.save makes a RuntimeError of it, as of an error of the disk."""
    class Interrupted(io.BytesIO):
        def write(self, data):
            if self.tell():
                raise KeyboardInterrupt
            return super().write(data)
    save_checkpoint(tmp_path / "a.pt", dict(step=1))
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.pt"):
        torch.save(dict(step=torch.zeros(9)), Interrupted())
    assert torch.load(tmp_path / "a.pt") == dict(step=1) and len(list(tmp_path.iterdir())) == 1

def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} {ROOT}/distill.py --dry-run --steps 64 | head -1"
    child = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert child.stderr == "" and child.returncode == 0 and child.stdout.count("\n") == 1
