"""Pictures in and out: four kinds of data source behind one packed cache, batches, and PNG grids.

    images = load_data(None, size=32)                       # the built-in pictures, drawn once
    images = load_data("celeba.zip", size=64, crop=140)     # or a folder, or an LSUN LMDB folder
    x, y = images.batch(step, 64, seed=0)                   # (64, 3, 64, 64) in [-1, 1], labels (64,)

Whatever the source, its images are centre-cropped to a square, resized with an antialiasing filter and
packed once into one file of raw uint8 pixels, which is then mapped into memory: LSUN's 3 million
bedrooms need 37 GB of disk at 64x64, and hardly any memory. Packing goes on where it was interrupted.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from checkpoint import file_hash, whole_file
from pictures import BuiltIn
from runtime import log_stderr, progress

VERSION = 2     # of the packing: a change to what is drawn, resized or noted beside it must raise it
CHUNK = 1024    # images packed between two entries of the journal
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
UNREAD = {".heic", ".heif", ".avif", ".jxl", ".jfif", ".jp2", ".tga", ".psd", ".svg", ".exr",      # pictures too, that
          ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"}     # PIL may not read: then they are named

class DataError(SystemExit):
    """Data that can't be used. A SystemExit: uncaught, its one-line message is all the user sees."""

# ---- sources, and decoding what they yield -------------------------------------------------------------
# Each has a name, a fingerprint that changes with its contents, a count, that many labels (class indices, or
# -1 where there are none), and the names of its classes. items(start, size) yields (name, read, label) from
# item `start` on; read() gives encoded bytes, or pixels of that size.

class Files:
    """Image files in a folder or a zip. Sub-folders name classes, if every image lies in one and there are several;
    or dataset.json does, as in EDM's data sets."""

    def __init__(self, path):
        self.path, self.name = path, path.stem
        names = self._open_folder() if path.is_dir() else self._open_zip()
        # macOS leaves "._" files and a __MACOSX folder in its archives: they end in .jpg but are no pictures.
        self.names = sorted(n for n in names if Path(n).suffix.lower() in SUFFIXES | UNREAD
                            and not any(p.startswith((".", "__MACOSX")) for p in Path(n).parts))
        self.count = len(self.names)
        self.labels, self.classes = self._edm_labels() if "dataset.json" in names else _labels(self.names)

    def _open_folder(self):
        names, digest, seen = [], hashlib.sha256(), set()
        for root, dirs, files in os.walk(self.path, followlinks=True):
            if os.path.realpath(root) in seen:                # a link that leads back up
                dirs.clear()
                continue
            seen.add(os.path.realpath(root))
            dirs.sort()
            for file in (Path(root, name) for name in sorted(files)):
                with contextlib.suppress(OSError):            # a dangling link, or a file that went away just now
                    info = file.stat()
                    names.append(file.relative_to(self.path).as_posix())
                    digest.update(f"{names[-1]} {info.st_size} {info.st_mtime_ns}\n".encode(errors="surrogateescape"))
        self.fingerprint, self.read = digest.hexdigest(), lambda name: (self.path / name).read_bytes()
        return names

    def _open_zip(self):
        try:
            archive, info = zipfile.ZipFile(self.path), self.path.stat()
        except (zipfile.BadZipFile, OSError) as e:
            raise DataError(f"error: {self.path} is neither a folder, nor a zip, nor an LMDB folder ({e})") from None
        self.fingerprint = f"{info.st_size} {info.st_mtime_ns}"
        self.stored = {i.filename.replace("\\", "/"): i for i in archive.infolist() if not i.is_dir()}
        self.read = lambda name: archive.read(self.stored[name])
        return list(self.stored)                              # some programs for Windows write folders with \

    def _edm_labels(self):
        """Of EDM's and StyleGAN's data sets: dataset.json lists [name, class], and the folders are only shards."""
        try:
            listed = dict(json.loads(self.read("dataset.json")).get("labels") or [])
            labels = [int(listed[name]) for name in self.names] if listed else []
        except (ValueError, TypeError, AttributeError, KeyError) as e:
            raise DataError(f"error: {self.path}: dataset.json does not give each image one class "
                            f"({type(e).__name__}: {e})") from None
        return (labels, [str(i) for i in range(max(labels) + 1)]) if labels else ([-1] * self.count, [])

    def items(self, start, size):
        for name, label in zip(self.names[start:], self.labels[start:], strict=True):
            yield name, partial(self.read, name), label

def _labels(names):
    """Class indices and class names from relative paths: the first folder, below any folder that all have in common."""
    folders = [n.split("/")[:-1] for n in names]
    depth = len(os.path.commonprefix(folders))
    tops = ["/".join(f[depth:depth + 1]) for f in folders]    # "" for an image that lies beside the classes' folders
    classes = sorted(set(tops), key=natural)
    if len(classes) < 2 or "" in classes:
        return [-1] * len(names), []
    number = {name: i for i, name in enumerate(classes)}
    return [number[top] for top in tops], classes

def natural(name):
    """A key that sorts names as people do: 2 before 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", name)]

class LSUN:
    """An LSUN category as distributed: an LMDB folder of encoded images, e.g. church_outdoor_train_lmdb."""

    classes = []

    def __init__(self, path):
        try:
            import lmdb
            with lmdb.open(str(path), readonly=True, lock=False, readahead=False) as env:
                self.count, size = env.stat()["entries"], (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        except ImportError:
            raise DataError("error: reading LSUN's LMDB needs the package lmdb: pip install lmdb") from None
        except lmdb.Error as e:
            raise DataError(f"error: {path} is no readable LMDB ({e})") from None
        self.path, self.name = path, path.name.removesuffix("_lmdb")
        info = (path / "data.mdb").stat()
        if info.st_size < size:                               # to read beyond the end of it would end Python
            raise DataError(f"error: {path}/data.mdb is cut off: {info.st_size:,} of {size:,} bytes")
        self.fingerprint = f"{info.st_size} {info.st_mtime_ns} {self.count}"
        self.labels = [-1] * self.count

    def items(self, start, size):
        """Another process reads: where a page is damaged, LMDB's library ends the process that it runs in."""
        # Not spawned where that can be helped: it would run the user's script again, to wait for this very work.
        context = multiprocessing.get_context("spawn" if os.name == "nt" else "fork")
        pipe, end = context.Pipe(duplex=False)
        reader = context.Process(target=_read_lmdb, args=(str(self.path), start, end), daemon=True)
        reader.start()
        end.close()                                           # so that the pipe ends when the reader does
        done = start
        try:
            while (record := pipe.recv()) is not None:
                yield record[0], (lambda image=record[1]: image), -1
                done += 1
        except EOFError:
            raise DataError(f"error: {self.path} is damaged: it can't be read beyond image {done:,}") from None
        finally:
            reader.kill()
            reader.join()

def _read_lmdb(path, start, pipe):
    """Send (name, bytes) of each entry from number `start` on, and None after the last."""
    import lmdb
    signal.signal(signal.SIGINT, signal.SIG_IGN)              # Ctrl-C is for the process that waits for this one
    with (contextlib.suppress(lmdb.Error, BrokenPipeError),   # the pipe's end says it
          lmdb.open(path, readonly=True, lock=False, readahead=False) as env, env.begin(buffers=True) as txn):
        for key, value in islice(txn.cursor(), start, None):  # buffers: no image before `start` is read from the disk
            pipe.send((bytes(key).decode(errors="replace"), bytes(value)))     # in key order: one pass over the disk
        pipe.send(None)

def open_source(path):
    """The source behind `--data`: None for the built-in pictures, a folder, a zip, or an LMDB folder."""
    if path is None:
        return BuiltIn()
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"error: no such file or folder: {path}")
    source = LSUN(path) if (path / "data.mdb").is_file() else Files(path)
    if not source.count:
        raise DataError(f"error: no images in {path} or its sub-folders (looked for {' '.join(sorted(SUFFIXES))})")
    return source

def to_rgb(image):
    """Any PIL image as RGB: palettes and greyscale expanded, transparency laid on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def eight_bits(image):
    """A PIL image with 8 bits a channel: 16-bit greyscale is scaled, where PIL would clip it at 255.

    Raises ValueError for values whose range nobody can know: floats, and 32 bits but in a PNG, which has only 16."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"32 bits a pixel (mode {image.mode}), of unknown range: store it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 257))
    return image

def centre_square(width, height, crop=None):
    """The centred square (left, top, right, bottom) in pixels. crop: its side, or if <= 1 a share of the shorter."""
    crop, side = crop or 1, min(width, height)
    side = min(side, round(side * crop) if crop <= 1 else round(crop))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side

def decode(source, size, crop=None):
    """Encoded bytes, or a (H, W, 3) array, to (size, size, 3) uint8. Raises what PIL raises on a broken file."""
    if isinstance(source, np.ndarray):
        return source
    with Image.open(io.BytesIO(source)) as image:
        image = to_rgb(ImageOps.exif_transpose(eight_bits(image)))     # photographs know which side is up
    # PIL's bicubic widens its support when it shrinks: unlike torch's default, it does not alias.
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=centre_square(*image.size, crop)))

# ---- the packed cache -----------------------------------------------------------------------------------
def default_cache():
    """Where packed data lives unless told otherwise: $DSD_CACHE, or the user's cache folder. Raises DataError."""
    try:
        base = os.environ.get("DSD_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dsd")
        return Path(base).expanduser()
    except RuntimeError:                                      # no HOME, and a user that the system does not know
        raise DataError("error: there is no home folder to keep packed images and weights in: set DSD_CACHE") from None

def load_data(path=None, size=32, crop=None, cache=None):
    """Open a data set, packing it first if there is no valid cache. Returns an `Images`; raises DataError.

    path   None (the built-in pictures), a folder, a zip, or an LSUN LMDB folder
    size   side of the square images in pixels
    crop   side of the centre crop in the source's pixels, or <= 1 as a share of its shorter side; None: all of it
    cache  folder for the packed file; its name holds a hash of the source (names, sizes, dates) and the settings"""
    source = open_source(path)
    crop = None if path is None else crop
    settings = dict(version=VERSION, size=size, crop=crop, source=source.fingerprint,
                    path=str(path and Path(path).expanduser().resolve()))
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(cache or default_cache()).expanduser() / f"{source.name}-{size}-{key}"
    if not wait_for_first_rank(folder / "meta.json"):
        with locked(folder, f"packing {source.name}"):
            if not (folder / "meta.json").exists():           # another run may just have made it
                _pack(source, folder, size, crop)
    return Images(folder)

def _pack(source, folder, size, crop):
    """Fill `folder`: images.u8 (raw pixels, N x H x W x 3), labels.npy, and last meta.json, which makes it valid.

    A journal notes after each chunk how far the packing got and what can't be read: a later call goes on from there."""
    def work(item):
        name, read, _ = item
        try:
            return decode(read(), size, crop).tobytes(), None
        except Exception as e:  # a broken file among three million must not end the run, whatever it raises
            why = re.sub(r" *<_io\.BytesIO object at \w+>", "", f"{type(e).__name__}: {e}")
            return b"", (name, why.splitlines()[0][:120])
    journal, image_bytes, seen, skipped = folder / "journal.json", 3 * size * size, 0, []
    with contextlib.suppress(OSError, ValueError):            # no journal yet, or one that a power cut emptied
        seen, skipped = json.loads(journal.read_text())
    check_space(folder, (source.count - seen) * image_bytes, f"packing {source.name}")
    with (open(folder / "images.u8", "ab") as pixels, ThreadPoolExecutor(os.cpu_count()) as pool,
          progress(desc=f"packing {source.name}, {size}x{size}", total=source.count, initial=seen, unit="img") as bar):
        pixels.truncate((seen - len(skipped)) * image_bytes)  # what was written after the last note
        items = source.items(seen, size)
        while chunk := list(islice(items, CHUNK)):
            results = list(pool.map(work, chunk))             # in threads: PIL frees the interpreter lock
            pixels.write(b"".join(image for image, _ in results))
            pixels.flush()
            os.fsync(pixels.fileno())                         # pixels first: the journal never promises too much
            skipped += [(seen + i, *why) for i, (_, why) in enumerate(results) if why]
            seen += len(chunk)
            with whole_file(journal) as tmp:
                tmp.write_text(json.dumps([seen, skipped]))
            bar.update(len(chunk))
    if len(skipped) == source.count:
        shutil.rmtree(folder, ignore_errors=True)             # leave no trace: the files may be repaired
        first = ": ".join(skipped[0][1:])
        raise DataError(f"error: none of the {source.count} images could be read; the first: {first}")
    if skipped:
        first = "; ".join(f"{name} ({why})" for _, name, why in skipped[:3]) + "; …" * (len(skipped) > 3)
        log_stderr(f"skipped {len(skipped)} of {source.count} images that can't be read: {first}")
    labels = np.delete(np.array(source.labels, np.int32), [number for number, _, _ in skipped])
    np.save(folder / "labels.npy", labels)
    meta = dict(count=len(labels), size=size, crop=crop, classes=source.classes, skipped=[s[1:] for s in skipped],
                hash=file_hash(folder / "images.u8"))
    with whole_file(folder / "meta.json") as tmp:
        tmp.write_text(json.dumps(meta))
    journal.unlink()

def wait_for_first_rank(path, good=Path.exists):
    """Whether a file of the cache is there. Of torchrun's processes on a machine the first makes it, others wait."""
    while not (there := good(path)) and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(0.2)
    return there

@contextlib.contextmanager
def locked(folder, work, flag="--cache"):
    """Hold the lock of a folder: what two runs would write at once, one writes and the other waits for.

    work  what is done there, in words, for the DataError that Ctrl-C becomes
    flag  the flag that names another folder, for the DataError that a full disk becomes"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            with contextlib.suppress(ImportError, OSError):   # no locks: two runs must not pack the same data at once
                import fcntl
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as e:
        raise DataError(f"error: can't write {folder} ({e.strerror or e}); {flag} names another folder") from None
    except KeyboardInterrupt:
        raise DataError(f"stopped {work}; the same command goes on from there") from None

def check_space(folder, need, what):
    """Raise DataError if a folder of the cache has less than `need` bytes left."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(f"error: {what} needs {need / 1e9:.1f} GB, {folder} has {free / 1e9:.1f}; "
                        f"--cache names another folder")

def mapped(path, dtype, shape, unit=None):
    """A file as an array, read from the disk as it is used. Raises DataError if its length is wrong, since reading
    beyond the end of a mapped file kills Python without a word.

    unit  what has to be deleted to have it made again, if not the file alone"""
    want, found = int(np.prod(shape)) * np.dtype(dtype).itemsize, path.stat().st_size
    if found != want:
        raise DataError(f"error: {path} is damaged ({found:,} bytes, not {want:,}); delete {unit or 'it'} to have it "
                        f"made again")
    return np.memmap(path, dtype, "r", shape=shape)

# ---- the packed images ----------------------------------------------------------------------------------
class Images:
    """A packed data set, mapped into memory. Raises DataError if its file of pixels is damaged.

    pixels  (N, H, W, 3) uint8;  labels  (N,) int32, -1 where there are none;  classes  names, [] if no labels
    folder  where it lies;  preparation  how the pixels were made of the source's, in words
    channels  of the batches: 3, or 1 for the lightness alone"""

    channels = 3

    def __init__(self, folder):
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.labels = np.load(folder / "labels.npy")
        except (EOFError, ValueError):                        # a power cut leaves empty files, or parts of files
            meta = None
        if not meta or self.labels.shape != (meta["count"],):
            raise DataError(f"error: meta.json or labels.npy in {folder} is damaged; delete the folder to have it "
                            f"packed again")
        self.pixels = mapped(folder / "images.u8", np.uint8, (meta["count"], *[meta["size"]] * 2, 3), unit=folder)
        self.classes, self.folder, self.hash = meta["classes"], folder, meta["hash"]
        self.preparation = f"crop {meta['crop'] or 'square'}, PIL bicubic to {meta['size']}x{meta['size']}"

    def __len__(self):
        return len(self.pixels)

    def number_as(self, classes):
        """Give the labels the numbers that a model has for classes of these names. Raises DataError for others."""
        if set(classes) != set(self.classes):
            names = ", ".join(sorted(set(classes) ^ set(self.classes))[:5])
            raise DataError(f"error: the model's classes are not those of the data, which differ in: {names}")
        number = np.array([classes.index(name) for name in self.classes], np.int32)
        self.labels, self.classes = number[self.labels], list(classes)

    def digest(self):
        """Tells one data set from another: a hash of all its pixels and labels."""
        return hashlib.sha256(self.hash.encode() + self.labels.tobytes()).hexdigest()[:16]

    def batch(self, step, size, seed, flip=True, share=(0, 1)):
        """Batch number `step`: images (size, channels, H, W) in [-1, 1], labels (size,). With `flip` half are mirrored.

        share (r, n): only part r of the batch's n equal parts. Every epoch is a fresh permutation. The batch depends
        on the arguments alone, so a resumed run sees exactly what it would have seen, and n processes together see
        what one would. Raises nothing; batches run across the end of an epoch."""
        part, n = slice(share[0] * size // share[1], (share[0] + 1) * size // share[1]), len(self)
        index = np.array([_epoch(n, seed, k // n)[k % n] for k in range(step * size, (step + 1) * size)[part]])
        mirrored = np.random.default_rng([seed, 1, step]).random(size)[part] < 0.5 * flip
        return self.read(index, mirrored), torch.from_numpy(self.labels[index]).long()

    def read(self, index, mirrored):
        """Images number `index` (B,) as (B, channels, H, W) in [-1, 1]; those in the mask `mirrored` (B,) mirrored."""
        pixels = self.pixels[index]
        pixels[mirrored] = pixels[mirrored, :, ::-1]
        return to_tensor(pixels if self.channels == 3 else lightness(pixels))

    def image(self, i):
        """Image number i as a model of so many channels draws it: (H, W, 3) uint8."""
        pixels = self.pixels[i]
        return pixels if self.channels == 3 else lightness(pixels).astype(np.uint8).repeat(3, -1)

    def grey(self):
        """Whether a few hundred of the images have no colour."""
        some = self.pixels[np.linspace(0, len(self) - 1, 256).astype(int)]
        return bool((some == some[..., :1]).all())

def lightness(pixels):
    """(…, 3) uint8 to (…, 1) whole numbers, as PIL makes greyscale: ITU-R 601."""
    return np.rint(pixels @ np.float32([0.299, 0.587, 0.114]))[..., None]

@lru_cache(maxsize=2)                                         # a batch may run across the end of an epoch
def _epoch(n, seed, epoch):
    """The order in which an epoch shows n images."""
    return np.random.default_rng([seed, 0, epoch]).permutation(n)

def to_tensor(pixels):
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1].

    By numpy: batches are read in a thread, and one that used torch would bring threads of its own, which go on spinning
    after each operation and take the cores from the network: an eighth of the time of an update on a CPU."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1)

def first_not_finite(x):
    """The number of the first of the images (N, …) that holds a NaN or an infinity, or None. Waits for the device."""
    return next((i for i, good in enumerate(x.isfinite().flatten(1).all(1).tolist()) if not good), None)

def to_pixels(x):
    """(N, 3 or 1, H, W) in [-1, 1] to (N, H, W, 3) uint8, clipped and rounded. Raises DataError if it is not finite."""
    bad = first_not_finite(x)
    if bad is not None:
        raise DataError(f"error: image {bad} of {len(x)} is not finite (NaN). If the model's weights are "
                        f"finite, try --dtype fp32")
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
    return pixels.expand(-1, -1, -1, 3).numpy()

def grid(x, columns, labels=(), heads=()):
    """Images (N, 3, H, W) in [-1, 1] as one PIL image, row by row; small ones enlarged, so that one can see them.

    labels  a short text for each row, written to its left
    heads   one for each column, written above it as far as the next one that is not empty"""
    pixels, font = to_pixels(x), ImageFont.load_default(14)
    rows, side = -(-len(pixels) // columns), pixels.shape[1]
    scale = max(1, 64 // side)
    pitch = (side + 1) * scale                                # a white line between neighbours
    margin = 12 + round(max(map(font.getlength, labels))) if labels else 0
    top = 20 if any(heads) else 0
    image = Image.new("RGB", (margin + columns * pitch - scale, top + rows * pitch - scale), "white")
    for i, cell in enumerate(pixels):
        place = margin + i % columns * pitch, top + i // columns * pitch
        image.paste(Image.fromarray(cell.repeat(scale, 0).repeat(scale, 1)), place)
    draw, starts = ImageDraw.Draw(image), [*(i for i, text in enumerate(heads) if text), columns]
    for row, text in enumerate(labels):
        draw.text((margin - 6, top + row * pitch + side * scale / 2), text, "black", font, anchor="rm")
    for here, after in pairwise(starts):
        text, room = heads[here], (after - here) * pitch - 4
        while font.getlength(text) > room and len(text) > 1:
            text = text[:-1]
        draw.text((margin + here * pitch, 2), text, "black", font)
    return image

def save_grid(x, path, columns, labels=(), heads=()):
    """Write a `grid` as a PNG."""
    with whole_file(path) as tmp:                             # a viewer that reloads never sees half a picture
        grid(x, columns, labels, heads).save(tmp, "PNG")
