"""A GPU that is not there: the device "meta", made to do what a GPU does, to count kernels and memory and see waiting.

    with pretended_gpu() as gpu:
        trainer = Rehearsal(args, net, META, model_info)      # a Trainer, and its whole loop
        …
    gpu.kernels, gpu.peak

Tensors on "meta" have shapes and no values. So to ask for a value, which a GPU has to be waited for, is an error.
"""

import contextlib
import weakref
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from trainer import Trainer

META = torch.device("meta")

class Autocast(TorchFunctionMode):
    """torch.autocast as it is on CUDA, for the operations of our networks. It casts each weight once."""

    LOW, HIGH = {torch.conv2d, F.linear}, {F.group_norm, F.layer_norm}
    entered, casts = [], {}

    def __init__(self, device_type, dtype=torch.bfloat16, enabled=True):
        super().__init__()
        self.dtype = dtype if enabled else None

    def __enter__(self):
        self.entered.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        self.entered.pop()
        if not self.entered:
            self.casts.clear()
        return super().__exit__(*error)

    def cast(self, x, dtype):
        if not torch.is_tensor(x) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self.casts:
            self.casts[id(x)] = x.to(dtype)
        return self.casts[id(x)]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        dtype = self.dtype if func in self.LOW else torch.float32 if func in self.HIGH else None
        if dtype and self.dtype and self.entered[-1] is self:
            args, kwargs = tree_map(lambda x: self.cast(x, dtype), (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

def fused_attention(q, k, v):
    """Attention as a GPU computes it: the matrix of all pairs of tokens is never in memory."""
    if Autocast.entered and Autocast.entered[-1].dtype:
        q, k, v = (x.to(Autocast.entered[-1].dtype) for x in (q, k, v))
    if q.dtype == torch.float32 or q.shape[3] > 256:          # the flash kernels take neither
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

def copied_tensor(*args, device=None, kind=torch.tensor, **kw):
    """torch.tensor as it is on a GPU: made on the CPU, then copied."""
    x = kind(*args, **kw)
    return x if device is None else x.to(device)

class NoGenerator:
    """There is none for "meta": random numbers are then those of no generator, None."""

    def __init__(self, device):
        pass

    def manual_seed(self, seed):
        pass

class Counter(TorchDispatchMode):
    """Sees every operation.

    kernels        how many so far did more than make a view: about the launches of a GPU
    memory, peak   bytes of all tensors on the GPU now, and at most
    waiting        False: a copy between the devices is an error, since a GPU has to be waited for"""

    def __init__(self):
        super().__init__()
        self.kernels, self.memory, self.peak, self.waiting = 0, 0, 0, True
        self.alive = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        out = None if name == "_fused_adam_" else func(*args, **(kwargs or {}))        # that works in place
        given, made = ([x for x in tree_leaves(tree) if torch.is_tensor(x)] for tree in ((args, kwargs), out))
        # A number (no dimensions) on the CPU is part of the command, unless it is copied.
        devices = {x.device.type for x in given + made if x.ndim or "copy" in name}
        if not self.waiting and len(devices) > 1:
            raise AssertionError(f"{func} goes from one device to another, for which a GPU has to be waited for")
        new = {x.untyped_storage() for x in made if x.is_meta} - {x.untyped_storage() for x in given}
        self.kernels += devices == {"meta"} and bool(new or func._schema.is_mutable) and "empty" not in name
        for storage in new:
            if storage not in self.alive:
                self.alive.add(storage)
                self.memory += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.memory)
        return out

    def _freed(self, count):
        self.memory -= count

@contextlib.contextmanager
def pretended_gpu():
    """A `Counter` of what happens within. Of PyTorch that is replaced which "meta" lacks, or does as no GPU does."""
    meta = lambda: ["meta"]  # noqa: E731
    with (mock.patch("torch.Generator", NoGenerator), mock.patch("torch.tensor", copied_tensor),
          mock.patch("torch.autocast", Autocast),
          mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention),
          mock.patch("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", meta),
          mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", meta), Counter() as counter):
        yield counter

class Rehearsal(Trainer):
    """A Trainer without files on a pretended GPU, whose loop may wait for it in the log alone.

    counter   of `pretended_gpu`;  kernels  of each update;  lines  how often it looked at values for the log"""

    def __init__(self, counter, *args, **kw):
        super().__init__(*args, **kw)
        self.counter, self.kernels, self.lines = counter, [], 0
        self.opt = torch.optim.Adam(self.net.parameters(), lr=self.args.lr, betas=tuple(self.args.betas), fused=True)
        self.schedule(torch.zeros(1, device=self.device))     # LDM's table is copied once

    def steps(self):
        self.counter.waiting, before = False, self.counter.kernels
        for step in super().steps():
            yield step
            self.kernels.append(self.counter.kernels - before)
            before = self.counter.kernels
        self.counter.waiting = True

    def _means(self, stopped):
        assert torch.stack(self.pending).shape == (len(self.pending), len(self.names))
        self.pending, self.lines = [], self.lines + 1
        return dict.fromkeys(self.names, 0.0), False
