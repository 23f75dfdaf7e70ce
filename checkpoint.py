"""Checkpoints: files of tensors and plain values, written whole or not at all, and read without running any code.

    save_checkpoint("ckpt.pt", state)
    net, state = load_model("ckpt.pt", device)      # the network, ready to sample, and what the file says of it

A state has at least: config, weights and ema (state dicts), schedule, predicts, shape and classes (their names), as
`ddim.Denoiser.of` and sample.py need them. What a run adds to go on exactly: see trainer.py. LDM's files: see ldm.py.
"""

import contextlib
import hashlib
import os
import sys
from pathlib import Path

import torch

from model import UNet, UNetConfig
from runtime import memory_format

class CheckpointError(SystemExit):
    """A checkpoint that can't be used. A SystemExit: uncaught, its one-line message is all the user sees."""

@contextlib.contextmanager
def whole_file(path):
    """Yields a path to write a file to, which then takes the place of `path`: nobody ever finds half a file there.

    Exits if it can't be written, as on a full disk."""
    path = Path(path)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")    # of this process alone
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:                      # torch's zip writer makes the latter of the former
        cause = e
        while cause and not isinstance(cause, (OSError, KeyboardInterrupt)):
            cause = cause.__context__
        if not cause:                                         # an error of other code in the block
            raise
        if isinstance(cause, KeyboardInterrupt):              # Ctrl-C while it was writing
            raise cause from None
        why = cause.strerror or str(e).splitlines()[0]
        raise SystemExit(f"error: can't write {path} ({why}); what was there before is untouched") from None
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink()

@contextlib.contextmanager
def naming(path):
    """Within it an OSError names the file: by itself one from a full disk does not."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise

def check_writable(folder):
    """Make a folder, before the work whose results it is for. Exits if that, or writing into it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        why = None if os.access(folder, os.W_OK) else "permission denied"
    except OSError as e:
        why = e.strerror
    if why:
        sys.exit(f"error: can't write into {folder} ({why}); choose another place")

@contextlib.contextmanager
def claimed(path, folder=True):
    """Hold the lock of a folder, or of a file, made if need be. Exits if it can't be, or if another process has it."""
    path = Path(path)
    check_writable(path if folder else path.parent)
    if not folder:
        path.touch()
    with contextlib.ExitStack() as held:
        with contextlib.suppress(ImportError):                # on Windows, which has other locks
            import fcntl
            handle = os.open(path, os.O_RDONLY)
            held.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"error: another process is writing into {path}: wait for it, or choose another place")
            except OSError:                                   # on a file system that has no locks
                pass
        yield

def save_checkpoint(path, state):
    """Write a dict of tensors and plain values, so that `path` always holds a whole file, old or new."""
    with whole_file(path) as tmp, open(tmp, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())        # on the disk before the name is, or a power cut could leave an empty file

def load_checkpoint(path):
    """Read what `save_checkpoint` wrote, on the CPU, without running code from the file. Raises CheckpointError.

    Its tensors are mapped from the disk: a sampler of a big model never reads the optimiser's state. (Windows can't
    replace a file that is mapped, as a resumed run does.)"""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
    except FileNotFoundError:
        raise CheckpointError(f"error: no checkpoint at {path}; to make one: python train.py --distill 0.15") from None
    except OSError as e:
        raise CheckpointError(f"error: can't read {path} ({e.strerror or e})") from None
    except Exception as e:  # torch raises half a dozen types here, all meaning the same to a user
        raise CheckpointError(f"error: {path} is no readable checkpoint ({type(e).__name__}): damaged, or with more in "
                              f"it than tensors and plain values") from None
    needed = {"config", "weights", "ema", "schedule", "predicts", "shape", "classes"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise CheckpointError(f"error: {path} is not a checkpoint of this project")
    return state

def load_model(path, device="cpu", ema=True):
    """The network of a checkpoint, ready to sample: (net, state). `ema=False`: the weights, not their average."""
    state = load_checkpoint(path)
    try:
        with torch.device("meta"):                            # no random weights: those of the file follow
            net = UNet(UNetConfig(**state["config"]))
        net.to_empty(device="cpu").load_state_dict(state["ema" if ema else "weights"])
    except (TypeError, ValueError, RuntimeError) as e:
        why = " ".join(str(e).split())[:200]
        raise CheckpointError(f"error: {path}: its config and its weights make no model ({why})") from None
    return net.to(device, memory_format=memory_format(device)).eval().requires_grad_(False), state

def trained_on(state):
    """The data that a model comes from, as its training had it: dict(data, crop, flip, known), which distilled models
    pass on. `known`: whether the file says so; data None are then the built-in pictures.

    An older distilled file has no flip and no `known`: its own run's flip stands for the former."""
    args = state.get("args", {})
    return dict(flip=args.get("flip", True), known="args" in state and "ldm" not in state) | (
        state.get("trained_on") or dict(data=args.get("data"), crop=args.get("crop")))

def data_for(path, state, given):
    """The data to read beside a model: `given`, or what it was trained on. Exits if its file does not name that."""
    origin = trained_on(state)
    if not (given or origin["data"] or origin["known"]):
        sys.exit(f"error: {path} does not say on what it was trained: the images have to be given, as --data")
    return given or origin["data"]

def file_hash(path, digits=16):
    """The first digits of a file's SHA-256: which checkpoint an image or a score came from."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:digits]
