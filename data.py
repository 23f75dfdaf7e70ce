"""Pictures in and out: four kinds of data source behind one packed cache, batches, and PNG grids.

    images = load_data(None, size=32)                       # the built-in pictures, drawn once
    images = load_data("celeba.zip", size=64, crop=140)     # or a folder, or an LSUN LMDB folder
    x, y = images.batch(step, 64, seed=0)                   # (64, 3, 32, 32) in [-1, 1], labels (64,)

Whatever the source, its images are centre-cropped to a square, resized with an antialiasing filter and
packed once into one file of raw uint8 pixels, which is then mapped into memory: LSUN's 3 million
bedrooms need 37 GB of disk at 64x64, and hardly any memory. Packing goes on where it was interrupted.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: packing works, but two runs must not pack the same data at once
    fcntl = None

VERSION = 1     # of the packing: a change to what is drawn or how it is resized must raise it
CHUNK = 1024    # images packed between two entries of the journal
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class DataError(SystemExit):
    """Data that can't be used. A SystemExit: uncaught, its one-line message is all the user sees."""


# ---- the built-in pictures --------------------------------------------------------------------------

SHAPES = ["ball", "ring", "star", "heart", "moon", "checkers", "flower", "house", "tree", "face"]
BUILTIN_COUNT = 20_000


def draw_picture(index, size, seed=0):
    """Picture number `index` of the built-in data: (H, W, 3) uint8; its class is index % 10, in the order of SHAPES.

    A shape of random colour, place, size and tilt on a pale two-coloured gradient. Each kind has parts
    that must fit together (a face has two eyes, a star five equal points), so that bad samples look bad.
    """
    rng = np.random.default_rng([seed, index])
    big = 4 * size                                            # drawn large, then shrunk: smooth edges
    hue = rng.random()
    fore, part, top, bottom = (_colour(rng, h) for h in (hue, hue + 0.17, hue + 0.42, hue + 0.58))
    top, bottom = (0.5 * c + 110 for c in (top, bottom))      # pale: the shape stands out
    ramp = np.linspace(0, 1, big)[:, None, None]
    image = Image.fromarray(np.uint8(np.broadcast_to(ramp * bottom + (1 - ramp) * top, (big, big, 3))))
    r = big * rng.uniform(0.38, 0.44)
    centre = complex(*rng.uniform(r * 1.05, big - r * 1.05, 2))
    pen = _Pen(ImageDraw.Draw(image), centre, r, rng.uniform(-0.12, 0.12))
    _DRAW[SHAPES[index % len(SHAPES)]](pen, tuple(np.uint8(fore).tolist()), tuple(np.uint8(part).tolist()))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _colour(rng, hue):
    """A fairly saturated colour (3,) in 0 … 255 by its hue in turns: three cosines, a third of a turn apart."""
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (hue + np.array([0, 1, 2]) / 3))
    return 255 * (rng.uniform(0.55, 1.0) * (0.15 + 0.85 * wave))


class _Pen:
    """Draws in the shape's own coordinates: complex numbers, centre 0, radius 1, y down, tilted by an angle."""

    def __init__(self, draw, centre, radius, angle):
        self.draw, self.centre, self.scale = draw, centre, radius * np.exp(1j * angle)

    def polygon(self, points, colour):
        points = self.centre + self.scale * np.asarray(points)
        self.draw.polygon([(p.real, p.imag) for p in points], fill=colour)

    def disc(self, centre, radius, colour):
        self.polygon(centre + radius * np.exp(2j * np.pi * np.arange(48) / 48), colour)

    def box(self, left, top, right, bottom, colour):
        self.polygon([left + 1j * top, right + 1j * top, right + 1j * bottom, left + 1j * bottom], colour)


def _ball(pen, fore, part):
    pen.disc(0, 1, fore)
    pen.disc(-0.35 - 0.35j, 0.28, (255, 255, 255))


def _ring(pen, fore, part):
    pen.disc(0, 1, fore)
    pen.disc(0, 0.55, part)
    pen.disc(0, 0.3, fore)


def _star(pen, fore, part):
    k = np.arange(10)
    pen.polygon(np.where(k % 2, 0.42, 1.0) * np.exp(1j * np.pi * (k / 5 - 0.5)), fore)


def _heart(pen, fore, part):
    a = 2 * np.pi * np.arange(64) / 64
    up = (13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) / 16
    pen.polygon(np.sin(a) ** 3 - 1j * up, fore)


def _moon(pen, fore, part):
    a = np.linspace(0.25, 1.75, 40) * np.pi                    # the outer arc, then back along the inner one
    inner = 0.45 + 0.75 * np.exp(1j * np.linspace(1.61, 0.39, 40) * np.pi)
    pen.polygon(np.concatenate([np.exp(1j * a), inner]), fore)


def _checkers(pen, fore, part):
    for i in range(4):
        for j in range(4):
            x, y = 0.45 * i - 0.9, 0.45 * j - 0.9
            pen.box(x, y, x + 0.45, y + 0.45, (20, 20, 20) if (i + j) % 2 else fore)


def _flower(pen, fore, part):
    for k in range(6):
        pen.disc(0.62 * np.exp(2j * np.pi * k / 6), 0.36, fore)
    pen.disc(0, 0.36, (250, 240, 120))


def _house(pen, fore, part):
    pen.box(-0.75, -0.1, 0.75, 0.95, fore)
    pen.polygon([-1 - 0.1j, 1 - 0.1j, -1j], part)
    pen.box(-0.2, 0.35, 0.2, 0.95, (60, 35, 20))


def _tree(pen, fore, part):
    pen.box(-0.16, 0.4, 0.16, 1, (90, 55, 30))
    for top, half, base in ((-1, 0.5, -0.35), (-0.65, 0.68, 0.1), (-0.25, 0.85, 0.55)):
        pen.polygon([1j * top, half + 1j * base, -half + 1j * base], fore)


def _face(pen, fore, part):
    pen.disc(0, 1, fore)
    pen.disc(-0.38 - 0.25j, 0.17, (10, 10, 10))
    pen.disc(0.38 - 0.25j, 0.17, (10, 10, 10))
    a = np.linspace(0.1, 0.9, 24) * np.pi
    arc = np.cos(a) + 1j * np.sin(a)
    pen.polygon(np.concatenate([0.62 * arc, 0.42 * arc[::-1]]) + 0.08j, (10, 10, 10))


_DRAW = dict(zip(SHAPES, (_ball, _ring, _star, _heart, _moon, _checkers, _flower, _house, _tree, _face), strict=True))


# ---- sources: each yields (name, something to decode, label) -----------------------------------------


class BuiltIn:
    """The drawn pictures as a source."""

    classes = SHAPES

    def __init__(self, count=BUILTIN_COUNT):
        self.name, self.count, self.fingerprint = "builtin", count, f"builtin {count}"

    def items(self, start, size):
        for i in range(start, self.count):
            yield f"picture {i}", (lambda i=i: draw_picture(i, size)), i % len(SHAPES)


class Files:
    """Image files in a folder or a zip. Sub-folders name classes, if every image lies in one and there are several."""

    def __init__(self, path):
        self.path, self.name = path, path.stem
        if path.is_dir():
            self.fingerprint, names = self._list_folder()
        else:
            self.fingerprint, names = self._list_zip()
        # macOS leaves "._" files and a __MACOSX folder in its archives: they end in .jpg but are no pictures.
        self.names = sorted(n for n in names if Path(n).suffix.lower() in SUFFIXES
                            and not any(p.startswith((".", "__MACOSX")) for p in Path(n).parts))
        if not self.names:
            raise DataError(f"error: no images in {path} or its sub-folders (looked for {' '.join(sorted(SUFFIXES))})")
        self.count = len(self.names)
        self.labels, self.classes = _labels(self.names)

    def _list_folder(self):
        digest, names, seen = hashlib.sha256(), [], set()
        for root, dirs, files in os.walk(self.path, followlinks=True):
            dirs.sort()
            if os.path.realpath(root) in seen:                # a link that leads back up
                dirs.clear()
                continue
            seen.add(os.path.realpath(root))
            for name in sorted(files):
                try:
                    info = os.stat(os.path.join(root, name))
                except OSError:       # a dangling link, or a file that went away just now
                    continue
                names.append(os.path.relpath(os.path.join(root, name), self.path).replace(os.sep, "/"))
                digest.update(f"{names[-1]} {info.st_size} {info.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest(), names

    def _list_zip(self):
        try:
            with zipfile.ZipFile(self.path) as z:
                names = [i.filename for i in z.infolist() if not i.is_dir()]
        except zipfile.BadZipFile:
            raise DataError(f"error: {self.path} is no zip file (--data: a folder, a zip or an LMDB folder)") from None
        except OSError as e:
            raise DataError(f"error: can't read {self.path} ({e.strerror or e})") from None
        info = self.path.stat()
        return f"{info.st_size} {info.st_mtime_ns}", names

    def items(self, start, size):
        archive = None if self.path.is_dir() else zipfile.ZipFile(self.path)
        for name, label in zip(self.names[start:], self.labels[start:], strict=True):
            if archive:
                yield name, (lambda n=name: archive.read(n)), label
            else:
                yield name, (self.path / name).read_bytes, label


def _labels(names):
    """Class indices and class names from relative paths: the first folder, below any folder that all have in common."""
    folders = [n.split("/")[:-1] for n in names]
    common = os.path.commonprefix(folders)
    tops = [f[len(common)] if len(f) > len(common) else None for f in folders]
    classes = sorted(set(tops) - {None})
    if None in tops or len(classes) < 2:
        return [-1] * len(names), []
    index = {c: i for i, c in enumerate(classes)}
    return [index[t] for t in tops], classes


class LSUN:
    """An LSUN category as distributed: an LMDB folder of encoded images, e.g. church_outdoor_train_lmdb."""

    classes = []

    def __init__(self, path):
        try:
            import lmdb
        except ImportError:
            raise DataError("error: reading LSUN's LMDB needs the package lmdb: pip install lmdb") from None
        self.path, self.name, self.lmdb = path, path.name.removesuffix("_lmdb"), lmdb
        try:
            self.env = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
            self.count = self.env.stat()["entries"]
        except lmdb.Error as e:
            raise DataError(f"error: {path} is no readable LMDB ({e})") from None
        if not self.count:
            raise DataError(f"error: no images in {path}")
        info = (path / "data.mdb").stat()
        self.fingerprint = f"{info.st_size} {info.st_mtime_ns} {self.count}"

    def items(self, start, size):
        if start >= self.count:                               # a cursor moved past the end would begin again
            return
        try:
            with self.env.begin() as txn, txn.cursor() as cursor:
                for _ in range(start + 1):                    # to item `start`, without reading the images before it
                    cursor.next()
                for key, value in cursor.iternext():          # in key order: one pass over the disk
                    yield key.decode(errors="replace"), (lambda v=value: v), -1
        except self.lmdb.Error as e:
            raise DataError(f"error: {self.path} can't be read to its end ({e})") from None


def open_source(path):
    """The source behind `--data`: None for the built-in pictures, a folder, a zip, or an LMDB folder."""
    if path is None:
        return BuiltIn()
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"error: no such file or folder: {path}")
    return LSUN(path) if (path / "data.mdb").is_file() else Files(path)


# ---- decoding -------------------------------------------------------------------------------------------


def to_rgb(image):
    """Any PIL image as RGB: palettes and greyscale expanded, transparency laid on white, 16-bit scaled to 8."""
    if image.mode.startswith("I"):                            # 16-bit greyscale, which PIL would clip at 255
        return Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 257)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def centre_square(width, height, crop=None):
    """The centred square (left, top, right, bottom) in pixels. crop: its side, or if <= 1 a share of the shorter."""
    side = min(width, height)
    if crop:
        side = min(side, round(side * crop) if crop <= 1 else round(crop))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def read_rgb(source):
    """Encoded bytes to an upright RGB image. Raises what PIL raises on a broken file."""
    with Image.open(io.BytesIO(source)) as image:
        return to_rgb(ImageOps.exif_transpose(image))         # photographs know which side is up


def decode(source, size, crop=None):
    """Encoded bytes, or a (H, W, 3) array, to (size, size, 3) uint8. Raises what PIL raises on a broken file."""
    if isinstance(source, np.ndarray):
        return source
    image = read_rgb(source)
    # PIL's bicubic widens its support when it shrinks: unlike torch's default, it does not alias.
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=centre_square(*image.size, crop))
    return np.asarray(image)


# ---- the packed cache -----------------------------------------------------------------------------------


def default_cache():
    """Where packed data lives unless told otherwise: $DSD_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DSD_CACHE") or Path(base) / "dsd")


def load_data(path=None, size=32, crop=None, cache=None):
    """Open a data set, packing it first if there is no valid cache. Returns an `Images`; raises DataError.

    path   None (the built-in pictures), a folder, a zip, or an LSUN LMDB folder
    size   side of the square images in pixels
    crop   side of the centre crop in the source's pixels, or <= 1 as a share of its shorter side; None: all of it
    cache  folder for the packed file; its name holds a hash of the source (names, sizes, dates) and the settings
    """
    source = open_source(path)
    if path is None:
        crop = None
    settings = dict(version=VERSION, size=size, crop=crop, source=source.fingerprint,
                    path=str(path and Path(path).expanduser().resolve()))
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(cache or default_cache()).expanduser() / f"{source.name}-{size}-{key}"
    if not made(folder / "meta.json"):
        try:
            _pack(source, folder, size, crop)
        except OSError as e:
            raise DataError(f"error: can't write the packed data to {folder} ({e.strerror or e}); "
                            f"--cache names another folder") from None
        except KeyboardInterrupt:
            raise DataError(f"stopped packing {source.name}; the same command goes on from there") from None
    return Images(folder)


def _pack(source, folder, size, crop):
    """Fill `folder`: images.u8 (raw pixels, N x H x W x 3), labels.npy, and last meta.json, which makes it valid.

    A journal notes after each chunk how far the packing got; a later call goes on from its last whole
    line. A lock keeps two runs from packing at once: the second waits, and finds the work done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if (folder / "meta.json").exists():
            return
        journal = _read_journal(folder / "journal.jsonl", folder / "images.u8", 3 * size * size)
        done = sum(j["seen"] for j in journal)
        check_space(folder, (source.count - done) * 3 * size * size, f"packing {source.name}")
        with (open(folder / "images.u8", "ab") as pixels, open(folder / "journal.jsonl", "a") as notes,
              tqdm(total=source.count, initial=done, desc=f"packing {source.name} at {size}x{size}", unit="img",
                   dynamic_ncols=True) as bar):
            for entry, images in _decoded_chunks(source, done, size, crop):
                pixels.write(images)
                pixels.flush()                                # pixels first: the journal never promises too much
                notes.write(json.dumps(entry) + "\n")
                notes.flush()
                journal.append(entry)
                bar.update(entry["seen"])
        _finish(source, folder, journal, size, crop)


def made(path, good=Path.exists):
    """Whether a file of the cache is there. Of torchrun's processes on a machine the first makes it, others wait."""
    while not good(path):
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            return False
        time.sleep(0.2)
    return True


@contextlib.contextmanager
def locked(folder):
    """Hold the lock of a folder in the cache: what two runs would write at once, one writes and the other waits for."""
    with open(folder / "lock", "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_space(folder, need, what):
    """Raise DataError if a folder has less than `need` bytes left."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(f"error: {what} needs {need / 1e9:.1f} GB in {folder}, but only {free / 1e9:.1f} GB are free; "
                        f"--cache names another folder")


def _read_journal(path, pixels, image_bytes):
    """The chunks already packed; cuts the pixel file, and the journal, back to what both agree on."""
    entries, good = [], 0
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            entry = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            entry = None
        size = sum(len(e["labels"]) for e in entries) * image_bytes
        if entry is None or pixels.stat().st_size < size + len(entry["labels"]) * image_bytes:
            break
        entries.append(entry)
        good += len(line.encode())
    if path.exists():
        os.truncate(path, good)
    if pixels.exists():
        os.truncate(pixels, sum(len(e["labels"]) for e in entries) * image_bytes)
    return entries


def _decoded_chunks(source, start, size, crop):
    """Decode a source from item `start` on, in threads (PIL frees the interpreter lock): (journal entry, pixels)."""

    def work(item):
        name, read, label = item
        try:
            return name, decode(read(), size, crop), label
        except Exception as e:  # a broken file among three million must not end the run, whatever it raises
            return name, f"{type(e).__name__}: {e}".splitlines()[0][:120], label

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        items = source.items(start, size)
        while chunk := list(islice(items, CHUNK)):
            results = list(pool.map(work, chunk))
            good = [(image, label) for _, image, label in results if not isinstance(image, str)]
            yield ({"seen": len(chunk), "labels": [label for _, label in good],
                    "skipped": [(name, why) for name, why, _ in results if isinstance(why, str)]},
                   b"".join(image.tobytes() for image, _ in good))


def _finish(source, folder, journal, size, crop):
    """Report what was skipped, and write the small files that make the cache valid."""
    labels = np.array([label for j in journal for label in j["labels"]], dtype=np.int32)
    skipped = [s for j in journal for s in j["skipped"]]
    if not len(labels):
        shutil.rmtree(folder, ignore_errors=True)             # leave no trace: the files may be repaired
        raise DataError(f"error: none of the {len(skipped)} images could be read; the first: {': '.join(skipped[0])}")
    if skipped:
        first = "; ".join(f"{name} ({why})" for name, why in skipped[:3]) + "; …" * (len(skipped) > 3)
        tqdm.write(f"skipped {len(skipped)} of {source.count} images that can't be read: {first}")
    np.save(folder / "labels.npy", labels)
    meta = dict(count=len(labels), size=size, crop=crop, classes=source.classes, skipped=skipped)
    tmp = folder / "meta.json.tmp"
    tmp.write_text(json.dumps(meta))
    os.replace(tmp, folder / "meta.json")
    (folder / "journal.jsonl").unlink(missing_ok=True)


# ---- the packed images ----------------------------------------------------------------------------------


class Images:
    """A packed data set, mapped into memory.

    pixels  (N, H, W, 3) uint8;  labels  (N,) int32, -1 where there are none;  classes  names, [] if no labels
    """

    def __init__(self, folder):
        meta = json.loads((folder / "meta.json").read_text())
        shape = (meta["count"], meta["size"], meta["size"], 3)
        if (folder / "images.u8").stat().st_size != np.prod(shape):
            raise DataError(f"error: {folder} is damaged (images.u8 has the wrong size); delete it to pack it again")
        self.pixels = np.memmap(folder / "images.u8", np.uint8, "r", shape=shape)
        self.labels = np.load(folder / "labels.npy")
        self.classes, self.folder = meta["classes"], folder
        self.about = f"crop {meta['crop'] or 'square'}, PIL bicubic to {meta['size']}x{meta['size']}"
        self._order = (None, None)

    def __len__(self):
        return len(self.pixels)

    def batch(self, step, size, seed, flip=True, share=(0, 1)):
        """Batch number `step`: images (size, 3, H, W) in [-1, 1], labels (size,); half of the images mirrored.

        share (r, n): only part r of the batch's n equal parts. Every epoch is a fresh permutation. The batch depends
        on the arguments alone, so a resumed run sees exactly what it would have seen, and n processes together see
        what one would. Raises nothing; batches run across the end of an epoch.
        """
        part, n = slice(share[0] * size // share[1], (share[0] + 1) * size // share[1]), len(self)
        index = np.array([self._epoch(k // n, seed)[k % n] for k in range(step * size, (step + 1) * size)[part]])
        mirrored = np.random.default_rng([seed, 1, step]).random(size)[part] < 0.5 * flip
        return self.read(index, mirrored), torch.from_numpy(self.labels[index]).long()

    def read(self, index, mirrored):
        """Images number `index` (B,) as (B, 3, H, W) in [-1, 1]; those in the mask `mirrored` (B,) as in a mirror."""
        pixels = self.pixels[index]
        pixels[mirrored] = pixels[mirrored, :, ::-1]
        return to_tensor(pixels)

    def _epoch(self, epoch, seed):
        if self._order[0] != (epoch, seed):
            self._order = (epoch, seed), np.random.default_rng([seed, 0, epoch]).permutation(len(self))
        return self._order[1]


def to_tensor(pixels):
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1].

    By numpy: batches are read in a thread, and one that used torch would bring threads of its own, which go on spinning
    after each operation and take the cores from the network: an eighth of the time of an update on a CPU.
    """
    x = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    x /= 127.5
    x -= 1
    return torch.from_numpy(x)


def to_pixels(x):
    """(N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8, clipped and rounded."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(x, path, columns, labels=(), gap=1):
    """Write images (N, 3, H, W) in [-1, 1] as one PNG, row by row; small ones enlarged, so that one can see them.

    labels  a short text for each row, written to its left
    """
    pixels = to_pixels(x)
    n, side = len(pixels), pixels.shape[1]
    scale = max(1, 64 // side)
    rows = -(-n // columns)
    grid = np.full((rows * (side + gap) - gap, columns * (side + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (side + gap), i % columns * (side + gap)
        grid[top:top + side, left:left + side] = image
    image = Image.fromarray(grid).resize((grid.shape[1] * scale, grid.shape[0] * scale), Image.Resampling.NEAREST)
    if labels:
        image = _label_rows(image, labels, (side + gap) * scale, side * scale)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    image.save(tmp, "PNG")
    os.replace(tmp, path)                                     # a viewer that reloads never sees half a picture


def _label_rows(image, labels, pitch, height):
    """The image with a white margin on its left, one text in the middle of each row's `height`."""
    font = ImageFont.load_default(14)
    margin = 12 + round(max(font.getlength(text) for text in labels))
    wide = Image.new("RGB", (image.width + margin, image.height), "white")
    wide.paste(image, (margin, 0))
    pen = ImageDraw.Draw(wide)
    for row, text in enumerate(labels):
        pen.text((margin - 6, row * pitch + height / 2), text, "black", font, anchor="rm")
    return wide
