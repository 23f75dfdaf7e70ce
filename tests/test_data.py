"""The built-in pictures, data sources, broken files, the packed cache, batches, grids."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from conftest import ROOT, labelled_images
from PIL import Image
from torch.testing import assert_close

import data
import pictures
from data import (
    DataError,
    centre_square,
    decode,
    load_data,
    open_source,
    save_grid,
    to_pixels,
    to_rgb,
    to_tensor,
    wait_for_first_rank,
)
from pictures import SHAPES, draw_picture

def png(array, mode=None, format="PNG", **kw):
    """An array, or an image, as the bytes of a file."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))
    f = io.BytesIO()
    (image.convert(mode) if mode else image).save(f, format, **kw)
    return f.getvalue()

def photo(i, size=(20, 20)):
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 255, (3, 3, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)

def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder

def lmdb_of(path, files):
    """An LMDB folder as LSUN's are: encoded images under their names."""
    with lmdb.open(str(path), map_size=1 << 22) as env, env.begin(write=True) as txn:
        for name, content in files.items():
            txn.put(name.encode(), content)
    return path

@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"

@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one with each image that is decoded."""
    calls, original = [], data.decode
    monkeypatch.setattr(data, "decode", lambda *a: (calls.append(1), original(*a))[1])
    return calls

# ---- the built-in pictures ------------------------------------------------------------------------
def test_builtin_pictures_are_deterministic_varied_and_labelled():
    first = [draw_picture(i, 16) for i in range(40)]
    assert all(np.array_equal(a, draw_picture(i, 16)) for i, a in enumerate(first))
    assert len({a.tobytes() for a in first}) == 40
    assert not np.array_equal(draw_picture(0, 16, seed=1), first[0])
    assert first[0].shape == (16, 16, 3) and first[0].dtype == np.uint8

def test_builtin_classes_can_be_told_apart():
    """Nearest neighbour by shape alone (grey, contrast-normalised) finds the class most of the time."""
    def features(indices):
        grey = np.stack([draw_picture(i, 16).mean(2).ravel() for i in indices])
        edges = np.abs(grey - np.median(grey, axis=1, keepdims=True))
        return edges / np.linalg.norm(edges, axis=1, keepdims=True)
    train, test = features(range(1000)), features(range(1000, 1100))
    guess = (test @ train.T).argmax(1) % 10
    assert (guess == np.arange(1000, 1100) % 10).mean() > 0.5  # chance is 0.1

def test_builtin_pictures_are_what_caches_hold():
    """Up to a few pixels, as PIL's versions may differ. If this fails, raise data.VERSION: caches can't notice."""
    pattern = np.random.default_rng(0).standard_normal((16, 16, 3))
    found = [float((pattern * draw_picture(i, 16)).sum()) for i in range(10)]
    known = [-338.0, -767.0, -1090.0, 1184.0, -1241.0, -3238.0, -4729.0, -1050.0, 359.0, -2739.0]
    assert_close(found, known, rtol=0, atol=100)

def test_builtin_data_is_packed_once_and_reused(cache, monkeypatch):
    monkeypatch.setattr(pictures.BuiltIn.__init__, "__defaults__", (50,))
    images = load_data(None, 8, cache=cache)
    assert len(images) == 50 and images.classes == SHAPES and list(images.labels[:3]) == [0, 1, 2]
    assert np.array_equal(images.pixels[7], draw_picture(7, 8))
    monkeypatch.setattr(pictures, "draw_picture", None)         # drawing again would fail
    assert np.array_equal(load_data(None, 8, cache=cache).pixels, images.pixels)

# ---- sources ----------------------------------------------------------------------------------------
@pytest.fixture
def three(tmp_path):
    """The same seven images as a folder, a zip and an LMDB folder."""
    files = {f"{i:03}.png": png(photo(i)) for i in range(7)}
    write(tmp_path / "faces", files)
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as z:
        for name, content in files.items():
            z.writestr("deep/inside/" + name, content)
        z.writestr("__MACOSX/._000.png", b"not an image")
        z.writestr("readme.txt", b"no image either")
    return [tmp_path / "faces", tmp_path / "faces.zip", lmdb_of(tmp_path / "church_outdoor_train_lmdb", files)]

def test_folder_zip_and_lmdb_give_the_same_images(three, cache):
    a, b, c = (load_data(path, 8, cache=cache) for path in three)
    assert len(a) == 7 and a.classes == b.classes == c.classes == []
    assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.pixels, c.pixels)
    assert set(a.labels) == {-1}

def test_a_source_is_read_from_any_item_on(three):
    def read_from(source, start):
        return [(name, read(), label) for name, read, label in source.items(start, 8)]
    for source in (*map(open_source, three), pictures.BuiltIn(7)):
        everything = read_from(source, 0)
        assert len(everything) == source.count == 7
        for start in (3, 7):
            rest = read_from(source, start)
            assert [label for *_, label in rest] == list(source.labels[start:])
            assert [name for name, *_ in rest] == [name for name, *_ in everything[start:]]
            assert all(np.array_equal(a, b) for (_, a, _), (_, b, _) in zip(rest, everything[start:], strict=True))

def test_packing_that_stopped_at_its_very_end_reads_nothing_again(three, cache, monkeypatch, decoded):
    def interrupted(*a):
        raise KeyboardInterrupt

    for path in three:
        decoded.clear()
        with monkeypatch.context() as m, pytest.raises(DataError, match="stopped packing .*; the same command"):
            m.setattr(np, "save", interrupted)
            load_data(path, 8, cache=cache)
        assert len(load_data(path, 8, cache=cache)) == len(decoded) == 7

def test_nested_folders_name_the_classes(tmp_path, cache):
    files = {f"root/{c}/sub{i}/{i}.png": png(photo(i)) for c in ("cat", "dog") for i in range(3)}
    images = load_data(write(tmp_path / "pets", files), 8, cache=cache)
    assert images.classes == ["cat", "dog"] and list(images.labels) == [0, 0, 0, 1, 1, 1]

def test_links_that_lead_back_up_are_walked_once(tmp_path, cache):
    folder = write(tmp_path / "x", {"a/1.png": png(photo(1)), "a/b/2.png": png(photo(2))})
    (folder / "a" / "b" / "up").symlink_to(folder)
    assert len(load_data(folder, 8, cache=cache)) == 2

def test_a_stray_image_beside_the_class_folders_means_no_labels(tmp_path, cache):
    files = {"cat/1.png": png(photo(1)), "dog/1.png": png(photo(2)), "3.png": png(photo(3))}
    assert load_data(write(tmp_path / "pets", files), 8, cache=cache).classes == []

@pytest.mark.parametrize("make,message", [
    (lambda p: p / "nowhere", "no such file or folder"),
    (lambda p: write(p / "empty", {"notes.txt": b"x"}), "no images in"),
    (lambda p: write(p, {"x.zip": b"PK no zip at all"}) / "x.zip", "neither a folder"),
    (lambda p: write(p, {"x.png": png(photo(0))}) / "x.png", "neither a folder"),
    (lambda p: write(p / "bad", {"a.png": b"", "b.jpg": b"junk"}), "none of the 2 images could be read"),
])
def test_unusable_sources_are_one_line_errors(tmp_path, cache, make, message):
    with pytest.raises(DataError, match=message) as e:
        load_data(make(tmp_path), 8, cache=cache)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)

def test_an_empty_zip_and_a_damaged_lmdb_are_one_line_errors(tmp_path, cache):
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    write(tmp_path / "church_lmdb", {"data.mdb": b"junk" * 5000})
    lmdb_of(tmp_path / "empty_lmdb", {})
    for name, message in (("empty.zip", "no images in"), ("church_lmdb", "no readable LMDB"),
                          ("empty_lmdb", "no images in")):
        with pytest.raises(DataError, match=message):
            load_data(tmp_path / name, 8, cache=cache)

# ---- decoding ---------------------------------------------------------------------------------------
ODD = {
    "grey.png": lambda: png(photo(0).convert("L")),
    "grey_alpha.png": lambda: png(photo(0).convert("LA")),
    "palette.png": lambda: png(photo(0).convert("P")),
    "palette_transparent.gif": lambda: png(photo(0).convert("P"), format="GIF", transparency=0),
    "rgba.png": lambda: png(photo(0).convert("RGBA")),
    "one_bit.png": lambda: png(photo(0).convert("1")),
    "cmyk.jpg": lambda: png(photo(0).convert("CMYK"), format="JPEG"),
    "grey16.png": lambda: png(np.full((9, 9), 40_000, np.uint16)),
    "tall.jpg": lambda: png(photo(0, (10, 90)), format="JPEG"),
    "dot.png": lambda: png(photo(0, (1, 1))),
}

@pytest.mark.parametrize("name", ODD)
def test_odd_formats_become_rgb(name):
    out = decode(ODD[name](), 8)
    assert out.shape == (8, 8, 3) and out.dtype == np.uint8

def test_colours_survive_the_conversion():
    grey16 = decode(png(np.full((9, 9), 40_000, np.uint16)), 8)
    assert (grey16 == 40_000 // 257).all()
    clear = Image.new("RGBA", (9, 9), (255, 0, 0, 0))
    assert (np.asarray(to_rgb(clear)) == 255).all()             # transparent lies on white
    cmyk = np.asarray(to_rgb(Image.new("CMYK", (9, 9), (0, 255, 255, 0))))
    assert (cmyk[0, 0] == [255, 0, 0]).all()

def test_a_rotated_photograph_stands_upright():
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 16, 8))                         # the top half is white
    exif = Image.Exif()
    exif[0x0112] = 3                                            # taken upside down
    out = decode(png(image, exif=exif), 16)
    assert out[0].max() == 0 and out[-1].min() == 255

def test_broken_files_are_skipped_with_one_line_and_keep_labels_in_step(tmp_path, cache, capfd):
    files = {f"{c}/{i:03}.jpg": png(photo(i, (64, 64)), format="JPEG") for c in "ab" for i in range(5)}
    cut = files["a/004.jpg"][:len(files["a/004.jpg"]) // 2]
    bad = {"a/001.jpg": b"", "a/004.jpg": cut, "b/000.jpg": b"<html>404</html>", "b/002.png": png(photo(1))[:40]}
    images = load_data(write(tmp_path / "x", files | bad), 8, cache=cache)
    assert len(images) == 7 and list(images.labels) == [0, 0, 0, 1, 1, 1, 1]
    lines = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 1 and "skipped 4 of 11" in lines[0] and "a/001.jpg" in lines[0] and "…" in lines[0]

@pytest.mark.parametrize("size,crop,box", [
    ((100, 60), None, (20, 0, 80, 60)),
    ((178, 218), 140, (19, 39, 159, 179)),                      # CelebA's convention
    ((89, 109), 140 / 178, (9, 19, 79, 89)),                    # the same share of half-size files
    ((100, 60), 1, (20, 0, 80, 60)),                            # a share of 1: all of it
    ((50, 60), 140, (0, 5, 50, 55)),                            # a crop larger than the image: all of it
])
def test_the_crop_is_centred(size, crop, box):
    left, top, right, bottom = centre_square(*size, crop)
    assert (left, top, right, bottom) == box

def test_only_the_crop_is_shown():
    """But for the filter, which takes a few pixels from beyond its edge."""
    image = Image.new("RGB", (100, 60), "black")
    image.paste("white", (30, 10, 70, 50))
    assert decode(png(image), 8, crop=20).min() == 255 and decode(png(image), 8).min() < 50

def test_resizing_does_not_alias():
    """One-pixel stripes shrunk by 8 must become grey; sampling without a filter would keep black or white."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(decode(png(stripes), 32).astype(int) - 127).max() < 8

# ---- the cache -----------------------------------------------------------------------------------------
def test_the_cache_notices_a_changed_source_or_setting(tmp_path, cache):
    folder = write(tmp_path / "x", {f"{i}.png": png(photo(i)) for i in range(3)})
    first = load_data(folder, 8, cache=cache)
    assert load_data(folder, 8, cache=cache).folder == first.folder
    others = {load_data(folder, 4, cache=cache).folder, load_data(folder, 8, crop=6, cache=cache).folder}
    (folder / "1.png").write_bytes(png(photo(77)))
    changed = load_data(folder, 8, cache=cache)
    assert len(others | {first.folder, changed.folder}) == 4
    assert not np.array_equal(changed.pixels[1], first.pixels[1])
    (folder / "9.png").write_bytes(png(photo(9)))
    assert len(load_data(folder, 8, cache=cache)) == 4

def test_packing_killed_half_way_goes_on_and_ends_the_same(tmp_path, cache, decoded):
    """SIGKILL in the middle of packing, and a torn write besides; the result equals an undisturbed one."""
    folder = write(tmp_path / "x", {f"{c}/{i:04}.png": png(photo(i)) for c in "ab" for i in range(300)}
                   | {"a/0005.png": b"broken"})
    code = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
import data
decode, calls, data.CHUNK = data.decode, [], 64
def slow(*a):
    calls.append(1)
    if len(calls) == 3 * 64 + 9: print("now", flush=True); time.sleep(60)
    return decode(*a)
data.decode = slow
data.load_data({str(folder)!r}, 8, cache={str(cache)!r})
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout.readline() == b"now\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    part = next(cache.iterdir())
    assert not (part / "meta.json").exists()
    with open(part / "images.u8", "ab") as f:
        f.write(b"x" * 100)
    resumed = load_data(folder, 8, cache=cache)
    assert len(decoded) == 600 - 3 * 64                         # only what was missing
    whole = load_data(folder, 8, cache=tmp_path / "other")
    assert len(whole) == 599 and np.array_equal(resumed.pixels, whole.pixels)
    assert np.array_equal(resumed.labels, whole.labels)

def test_packing_begins_again_if_its_journal_was_torn(three, cache, monkeypatch, decoded):
    whole = load_data(three[0], 8, cache=cache)
    journal = whole.folder / "journal.json"
    for content in ("", "[5, [", "[5, []"):
        (whole.folder / "meta.json").unlink()
        journal.write_text(content)
        decoded.clear()
        again = load_data(three[0], 8, cache=cache)
        assert len(decoded) == 7 and np.array_equal(again.pixels, whole.pixels) and not journal.exists()

def test_a_damaged_cache_is_named_not_used(tmp_path, cache):
    folder = write(tmp_path / "x", {f"{i}.png": png(photo(i)) for i in range(3)})
    images = load_data(folder, 8, cache=cache)
    os.truncate(images.folder / "images.u8", 100)
    with pytest.raises(DataError, match=f"damaged.*; delete {images.folder} to have it made again"):
        load_data(folder, 8, cache=cache)

@pytest.mark.parametrize("name,length", [("meta.json", 0), ("meta.json", 9), ("labels.npy", 0), ("labels.npy", 130)])
def test_what_a_power_cut_left_of_a_small_file_is_named(tmp_path, cache, name, length):
    folder = write(tmp_path / "x", {f"{i}.png": png(photo(i)) for i in range(3)})
    images = load_data(folder, 8, cache=cache)
    os.truncate(images.folder / name, length)
    with pytest.raises(DataError, match="meta.json or labels.npy in .* is damaged; delete the folder"):
        load_data(folder, 8, cache=cache)

def test_an_unwritable_cache_is_a_one_line_error(tmp_path):
    folder = write(tmp_path / "x", {"1.png": png(photo(1)), "cache": b"a file where a folder should be"})
    with pytest.raises(DataError, match="--cache names another folder"):
        load_data(folder, 8, cache=folder / "cache")

def test_a_file_system_without_locks_is_no_obstacle(tmp_path, cache, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", flock)
    assert len(load_data(write(tmp_path / "x", {"1.png": png(photo(1)), "2.png": png(photo(2))}), 8, cache=cache)) == 2

def test_of_two_runs_that_pack_at_once_one_does(tmp_path, cache, decoded):
    """In threads, which locks of files keep apart as they do processes."""
    folder = write(tmp_path / "x", {f"{i:03}.png": png(photo(i)) for i in range(200)})
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(lambda _: load_data(folder, 8, cache=cache), "ab")
    assert len(a) == len(b) == len(decoded) == 200 and len(list(cache.iterdir())) == 1

def test_what_does_not_fit_on_the_disk_is_not_begun(three, cache, monkeypatch, decoded):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 1, 99))
    with pytest.raises(DataError, match="packing faces needs .* GB.*--cache names another folder"):
        load_data(three[0], 8, cache=cache)
    assert not decoded

def test_other_ranks_wait_for_the_first(tmp_path, monkeypatch):
    assert not wait_for_first_rank(tmp_path / "file")           # the first is to make it
    monkeypatch.setenv("LOCAL_RANK", "1")
    threading.Timer(0.3, (tmp_path / "file").touch).start()
    assert wait_for_first_rank(tmp_path / "file") and (tmp_path / "file").exists()

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_packed_images_stay_on_disk(cache):
    """Images are mapped, not loaded: opening 60 MB of pixels adds little to the memory of the process."""
    folder = cache / "big"
    folder.mkdir(parents=True)
    n, size = 20_000, 32
    (folder / "images.u8").write_bytes(np.random.default_rng(0).bytes(n * size * size * 3))
    np.save(folder / "labels.npy", np.zeros(n, np.int32))
    (folder / "meta.json").write_text(json.dumps(dict(count=n, size=size, crop=None, classes=[], hash="")))
    before = resident()
    images = data.Images(folder)
    images.batch(0, 64, seed=0)
    assert isinstance(images.pixels, np.memmap) and resident() - before < 20e6

def resident():
    """Bytes of memory of this process that are no file's: the system can't take them back when it needs some."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

# ---- batches and pictures ---------------------------------------------------------------------------------
@pytest.fixture
def twelve(tmp_path, cache):
    """Image i is of class i % 2 and has the value 20 i everywhere."""
    files = {f"{'ab'[i % 2]}/{i:02}.png": png(np.full((8, 8, 3), 20 * i, np.uint8)) for i in range(12)}
    return load_data(write(tmp_path / "x", files), 8, cache=cache)

def test_every_epoch_shows_every_image_once_in_a_new_order(twelve):
    seen = [twelve.batch(step, 8, seed=3)[0][:, 0, 0, 0] for step in range(6)]   # 48 images: 4 epochs
    epochs = to_pixels(torch.cat(seen).reshape(48, 1, 1, 1).expand(48, 3, 1, 1))[:, 0, 0, 0].reshape(4, 12)
    assert all(sorted(e) == list(range(0, 240, 20)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4

def test_a_batch_depends_on_step_and_seed_alone(twelve):
    a = twelve.batch(5, 8, seed=3)[0]
    twelve.batch(0, 8, seed=4)
    assert_close(twelve.batch(5, 8, seed=3)[0], a, rtol=0, atol=0)
    assert not torch.equal(twelve.batch(5, 8, seed=4)[0], a)

def test_labels_go_with_their_images(twelve):
    x, y = twelve.batch(1, 12, seed=0)
    assert y.dtype == torch.int64 and torch.equal(torch.from_numpy(to_pixels(x)[:, 0, 0, 0] // 20 % 2).long(), y)

def test_about_half_of_the_images_are_mirrored(tmp_path, cache):
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, :4] = 255
    images = load_data(write(tmp_path / "x", {"a.png": png(half), "b.png": png(half)}), 8, cache=cache)
    left = images.batch(0, 400, seed=0)[0][:, 0, 0, 0]
    assert 0.4 < (left < 0).float().mean() < 0.6
    assert (images.batch(0, 400, seed=0, flip=False)[0][:, 0, 0, 0] > 0).all()

def test_pixels_and_tensors_convert_exactly():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    x = to_tensor(pixels)
    assert x.min() == -1 and x.max() == 1 and np.array_equal(to_pixels(x), pixels)
    assert (to_pixels(torch.tensor([-7.0, 7.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2)) == [[[0] * 3, [255] * 3]]).all()

def test_a_grid_shows_each_image_in_its_place_beside_its_label(tmp_path):
    x = torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 0.0, 1.0, 0.5, -0.5)])
    save_grid(x, tmp_path / "new" / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (17 * 8, 26 * 8, 3)                    # 8-pixel images are enlarged to 64
    assert [grid[4 * 8, 8 * c][0] for c in (4, 13, 22)] == [0, 128, 255] and grid[13 * 8, 4 * 8][0] == 191
    save_grid(x, tmp_path / "grid.png", columns=3, labels=["2 steps", "64 steps"])
    wide = np.asarray(Image.open(tmp_path / "grid.png"))
    assert np.array_equal(wide[:, wide.shape[1] - 26 * 8:], grid) and wide[:, :wide.shape[1] - 26 * 8].min() < 100

def test_running_out_of_memory_is_not_called_a_full_disk(tmp_path, monkeypatch):
    def grid(*args):
        raise RuntimeError("CUDA out of memory")
    monkeypatch.setattr(data, "grid", grid)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        data.save_grid(torch.zeros(1, 3, 8, 8), tmp_path / "x.png", 1)
    with pytest.raises(RuntimeError, match="CUDA out of memory"), data.whole_file(tmp_path / "x.png"):
        grid()

# ---- EDM's data sets ------------------------------------------------------------------------------------
@pytest.mark.parametrize("packed", [False, True])
def test_edms_labels_are_those_of_its_json_and_its_folders_are_none(tmp_path, packed):
    folder = Path(labelled_images(tmp_path / "d", 6, classes=["00000", "00001"]))
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*.png"))
    path = folder
    def write(text):
        (folder / "dataset.json").write_text(text)
        if packed:
            shutil.make_archive(str(tmp_path / "d"), "zip", folder)
        return tmp_path / "d.zip" if packed else folder
    path = write(json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]}))
    images = load_data(path, 8, None, tmp_path / "c")
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2] and images.classes == ["0", "1", "2"]
    assert load_data(write('{"labels": null}'), 8, None, tmp_path / "c").classes == []
    for text in (json.dumps({"labels": [[name, 0] for name in names[1:]]}), "{", "[]", '{"labels": [["a", [1, 2]]]}'):
        with pytest.raises(DataError, match="dataset.json does not give each image one class"):
            load_data(write(text), 8, None, tmp_path / "c")
