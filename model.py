"""The UNet, the device it runs on, and the files its weights are kept in.

    net = UNet(UNetConfig(channels=64, mult=(1, 2, 2), attention=(4,)))
    out = net(z, t)            # z (B, 3, H, W), t in [0, 1]: a float or (B,)  ->  (B, 3, H, W)

One class serves every model of this project: the small pixel models of train.py and the three latent
models of LDM (Rombach et al. 2022) differ only in their config. The network is that of
guided-diffusion (Dhariwal & Nichol 2021): a path down of residual blocks, a middle, a path up that
sees the path down again through skip connections, with attention at the coarse resolutions.

        z ─ conv ─ [res (attn)]×blocks ─ halve ─ … ─ res attn res ─ … ─ double ─ [res (attn)]×(blocks+1) ─ out
                        └────────────────── skip connections ──────────────────────┘

What the network predicts (v, ε or x) and its noise schedule are not its business: see ddim.py.
"""

import ctypes
import hashlib
import math
import os
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


@dataclass(frozen=True)
class UNetConfig:
    """Everything that decides the shape of the weights. `attention` holds downsampling factors, not sizes."""

    channels: int = 64                      # width at full resolution
    mult: tuple[int, ...] = (1, 2, 2)       # width of each level, in units of `channels`
    blocks: int = 2                         # residual blocks per level on the way down, one more going up
    attention: tuple[int, ...] = (2, 4)     # attend where the image is this many times smaller
    head_channels: int = 32                 # channels per attention head; 0: `heads` heads at every level
    heads: int = 1
    groups: int = 32                        # of GroupNorm; with one channel a group it would erase the time signal
    dropout: float = 0.0
    classes: int = 0                        # > 0: label embedding, with index `classes` as the null class
    context_dim: int = 0                    # > 0: transformer blocks that cross-attend to a context: the label, if any
    in_channels: int = 3                    # image or latent channels, in and out

    def __post_init__(self):
        for name in ("mult", "attention"):  # lists, as they come from JSON or the command line, will do
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if min(self.channels, self.blocks, self.groups, *self.mult) < 1:
            raise ValueError("channels, mult, blocks and groups must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must be at least 0 and below 1")
        if self.head_channels < 0 or self.heads < 1:
            raise ValueError("head_channels must be at least 0, heads at least 1")
        factors = [2 ** i for i in range(len(self.mult))]
        if not set(self.attention) <= set(factors):
            raise ValueError(f"attention = {list(self.attention)}: with {len(self.mult)} levels the image is "
                             f"{', '.join(map(str, factors))} times smaller, nothing else")
        if self.channels % self.groups:
            raise ValueError(f"channels = {self.channels} must be a multiple of groups = {self.groups}")
        attending = {m * self.channels for i, m in enumerate(self.mult) if 2 ** i in self.attention}
        for width in attending | {self.mult[-1] * self.channels}:            # the middle always attends
            if width % (self.head_channels or self.heads):
                raise ValueError(f"{width} channels do not divide into heads of {self.head_channels or self.heads}")


# The networks of train.py's presets, by name. The paper does not give the size of its 64x64 models: `unet64`
# is a common size for that resolution. No dropout: x' and x'' would differ by their masks, not by their times.
CONFIGS = {
    "toy": dict(channels=32, mult=(1, 2, 4), blocks=1, attention=(), groups=8),
    "small32": dict(channels=32, mult=(1, 1, 2, 4), blocks=1, attention=(), groups=8),
    "unet64": dict(channels=128, mult=(1, 2, 2, 2), blocks=2, attention=(4, 8), head_channels=64),
}


def time_embedding(t, dim):
    """Sinusoidal embedding of t in [0, 1] -> (B, dim); cosines first, as guided-diffusion has it.

    The frequencies were made for timesteps 0 … 1000, so t is scaled to that range: LDM's step i is t = i / 1000.
    """
    half = dim // 2
    freqs = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(10000) / half))
    angle = 1000 * t[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def zero(layer):
    """Start a residual branch at zero, so that a block is the identity at first (as in guided-diffusion)."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """h + conv(norm(conv(norm(h)) + time)): the workhorse. (B, Cin, H, W) -> (B, Cout, H, W)."""

    def __init__(self, c, cin, cout):
        super().__init__()
        self.norm1 = nn.GroupNorm(c.groups, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(4 * c.channels, cout)
        self.norm2 = nn.GroupNorm(c.groups, cout)
        self.dropout = nn.Dropout(c.dropout)
        self.conv2 = zero(nn.Conv2d(cout, cout, 3, padding=1))
        self.skip = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, h, emb):
        """emb (B, 4 · channels): the time (and class) embedding, already through its SiLU."""
        r = self.conv1(F.silu(self.norm1(h)))
        r = r + self.emb(emb)[:, :, None, None]
        r = self.conv2(self.dropout(F.silu(self.norm2(r))))
        return self.skip(h) + r


def attend(q, k, v):
    """softmax(q kᵀ / √d) v over tokens. q (B, T, heads, d), k and v (B, S, heads, d) -> (B, T, heads · d)."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # (B, heads, T, d)
    # On a CPU the fused kernel's backward is several times slower than plain products at these few tokens.
    plain = q.device.type == "cpu" and q.requires_grad and q.shape[2] <= 256
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Every pixel looks at every other: h + proj(attention(norm(h))). Keeps the shape (B, C, H, W)."""

    def __init__(self, c, ch):
        super().__init__()
        self.heads = ch // c.head_channels if c.head_channels else c.heads
        self.norm = nn.GroupNorm(c.groups, ch)
        self.qkv = nn.Linear(ch, 3 * ch)
        self.proj = zero(nn.Linear(ch, ch))

    def forward(self, h, context=None):
        x = self.norm(h).flatten(2).transpose(1, 2)               # (B, HW, C): tokens
        qkv = self.qkv(x).unflatten(2, (self.heads, 3, -1))       # grouped by head first, as in the LDM files
        x = self.proj(attend(*qkv.unbind(3)))
        return h + x.transpose(1, 2).reshape(h.shape)


class CrossAttention(nn.Module):
    """Attention of the tokens x (B, T, C) to a context (B, S, D), or to themselves when it is None."""

    def __init__(self, c, ch, context_dim):
        super().__init__()
        self.heads = ch // c.head_channels if c.head_channels else c.heads
        self.q = nn.Linear(ch, ch, bias=False)
        self.k = nn.Linear(context_dim, ch, bias=False)
        self.v = nn.Linear(context_dim, ch, bias=False)
        self.out = nn.Linear(ch, ch)

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (a.unflatten(2, (self.heads, -1)) for a in (self.q(x), self.k(context), self.v(context)))
        return self.out(attend(q, k, v))


class GEGLU(nn.Module):
    """Feed-forward block of the transformer: the first half of the hidden units, gated by the second."""

    def __init__(self, ch):
        super().__init__()
        self.up = nn.Linear(ch, 8 * ch)
        self.down = nn.Linear(4 * ch, ch)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class Transformer(nn.Module):
    """LDM's SpatialTransformer of depth 1: self-attention, attention to the context, feed-forward. Keeps the shape."""

    def __init__(self, c, ch):
        super().__init__()
        self.norm = nn.GroupNorm(c.groups, ch, eps=1e-6)          # this one norm has another epsilon in LDM
        self.proj_in = nn.Linear(ch, ch)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(ch) for _ in range(3))
        self.attn1 = CrossAttention(c, ch, ch)
        self.attn2 = CrossAttention(c, ch, c.context_dim)
        self.ff = GEGLU(ch)
        self.proj_out = zero(nn.Linear(ch, ch))

    def forward(self, h, context):
        x = self.proj_in(self.norm(h).flatten(2).transpose(1, 2))  # (B, HW, C)
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        return h + self.proj_out(x).transpose(1, 2).reshape(h.shape)


class Downsample(nn.Conv2d):
    """Halve the image by a strided convolution."""

    def __init__(self, ch):
        super().__init__(ch, ch, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Double the image: nearest neighbour, then a convolution that smooths it."""

    def __init__(self, ch):
        super().__init__(ch, ch, 3, padding=1)

    def forward(self, h):
        """On a CPU both at once, as a transposed convolution of the small image: 16 products in place of 36.

        Of three neighbours in the doubled image two are the same pixel: their weights add up.
        """
        if h.device.type != "cpu":
            return super().forward(F.interpolate(h, scale_factor=2, mode="nearest"))
        w = self.weight
        for dim in (2, 3):
            first, middle, last = w.unbind(dim)
            w = torch.stack([last, middle + last, first + middle, first], dim)
        return F.conv_transpose2d(h, w.transpose(0, 1), self.bias, stride=2, padding=1)


class Stage(nn.Module):
    """One station of the path: a residual block, attention, resampling; each may be missing."""

    def __init__(self, res=None, attn=None, resample=None):
        super().__init__()
        self.res, self.attn, self.resample = res, attn, resample

    def forward(self, h, emb, context):
        h = h if self.res is None else self.res(h, emb)
        h = h if self.attn is None else self.attn(h, context)
        return h if self.resample is None else self.resample(h)


class UNet(nn.Module):
    """The network. Stages are numbered as guided-diffusion numbers its input_blocks and output_blocks.

    With `checkpointing` a stage keeps only its input, and is computed again in the backward pass: the same gradients
    for a fraction of the memory, and a third more time.
    """

    def __init__(self, config):
        super().__init__()
        self.checkpointing = False
        c = self.config = config
        width = 4 * c.channels
        self.time_in, self.time_out = nn.Linear(c.channels, width), nn.Linear(width, width)
        self.label = nn.Embedding(c.classes + 1, c.context_dim or width) if c.classes else None

        def attention(ch, factor):
            if factor not in c.attention:
                return None
            return Transformer(c, ch) if c.context_dim else SelfAttention(c, ch)

        ch, factor = c.channels, 1
        self.down = nn.ModuleList([Stage(resample=nn.Conv2d(c.in_channels, ch, 3, padding=1))])
        skips = [ch]                                  # channels of everything the way up will see again
        for level, mult in enumerate(c.mult):
            for _ in range(c.blocks):
                res, ch = ResBlock(c, ch, mult * c.channels), mult * c.channels
                self.down.append(Stage(res, attention(ch, factor)))
                skips.append(ch)
            if level < len(c.mult) - 1:
                self.down.append(Stage(resample=Downsample(ch)))
                skips.append(ch)
                factor *= 2

        middle = Transformer(c, ch) if c.context_dim else SelfAttention(c, ch)   # always attends
        self.mid = nn.ModuleList([Stage(ResBlock(c, ch, ch), middle), Stage(ResBlock(c, ch, ch))])

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(c.mult))):
            for i in range(c.blocks + 1):
                res, ch = ResBlock(c, ch + skips.pop(), mult * c.channels), mult * c.channels
                last = i == c.blocks and level > 0
                self.up.append(Stage(res, attention(ch, factor), Upsample(ch) if last else None))
            factor //= 2

        self.norm = nn.GroupNorm(c.groups, ch)
        self.out = zero(nn.Conv2d(ch, c.in_channels, 3, padding=1))

    def requires_grad_(self, requires_grad=True):
        """As for any module, but an embedding looked up as a context stays fixed: LDM trains it apart from the UNet."""
        super().requires_grad_(requires_grad)
        if self.label is not None and self.config.context_dim:
            self.label.requires_grad_(False)
        return self

    def _run(self, stage, *inputs):
        """A stage's output, by way of `checkpointing` if that is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)

    def forward(self, z, t, y=None, context=None):
        """z (B, C, H, W); t in [0, 1], float or (B,); y (B,) class indices; context (B, S, context_dim).

        Returns (B, C, H, W) in the dtype of the weights, also under autocast: the difference between two
        neighbouring predictions is what self-distillation learns from, and bfloat16 would round it away.
        H and W must be divisible by 2^(levels - 1). y is needed exactly if the config has classes; where the label is
        looked up as a context of one token, a context may be given in its place.
        """
        side = 2 ** (len(self.config.mult) - 1)
        if z.shape[2] % side or z.shape[3] % side:
            raise ValueError(f"image size {tuple(z.shape[2:])} is not divisible by {side}, as this UNet needs")
        if (y is not None) != (self.config.classes > 0 and context is None):
            raise ValueError("this UNet needs class labels y" if y is None else "this UNet has no classes, but got y")
        dtype = self.out.weight.dtype
        # Filled on the device: a copy would make a GPU wait.
        t = t.to(dtype).expand(len(z)) if torch.is_tensor(t) else z.new_full((len(z),), t, dtype=dtype)
        emb = self.time_out(F.silu(self.time_in(time_embedding(t, self.config.channels))))
        if y is not None and self.config.context_dim:
            context = self.label(y)[:, None]          # (B, 1, context_dim): LDM's class embedder
        elif y is not None:
            emb = emb + self.label(y)
        emb = F.silu(emb)                             # every ResBlock begins with this SiLU: do it once

        h, skips = z, []
        for stage in self.down:
            h = self._run(stage, h, emb, context)
            skips.append(h)
        for stage in self.mid:
            h = self._run(stage, h, emb, context)
        for stage in self.up:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), emb, context)
        h = F.silu(self.norm(h))
        with torch.autocast(z.device.type, enabled=False):
            return self.out(h.to(dtype))


def param_count(net):
    """Number of weights."""
    return sum(p.numel() for p in net.parameters())


# ---- where it runs ------------------------------------------------------------------------------


def pick_device(name="auto"):
    """`--device`: a torch device; auto takes CUDA, else the CPU. Exits if it can't be used.

    Under torchrun each process gets a GPU of its own, or its part of the cores, and meets the others here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"             # whatever number was asked for: it can't serve all
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        sys.exit(f"error: --device {name} can't be used here ({str(e).splitlines()[0]})")
    if name.startswith("cuda"):
        if ":" in name:
            torch.cuda.set_device(name)                       # for the collectives that name no device
        torch.backends.cudnn.benchmark = True                 # the shapes never change
    if name == "cpu":
        _keep_freed_memory()
        if "LOCAL_RANK" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
            # That is torchrun's choice, however many cores there are; another number is the user's, and stays.
            torch.set_num_threads(max(1, cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    if "RANK" in os.environ and not dist.is_initialized():
        _meet(torch.device(name))
    return torch.device(name)


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _keep_freed_memory():
    """Have glibc keep what PyTorch frees. It would give big blocks back to the system after each layer, and
    have them cleared page by page at the next: a tenth of the time of an update with self-distillation.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4        # from malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def pick_dtype(name, device):
    """`--dtype`: auto is bf16 where the hardware multiplies in it (2-3x faster on such CPUs), else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return "fp32"
    # oneDNN also claims bf16 on x86 CPUs that only emulate it, slowly: ask those for the instructions.
    x86 = platform.machine() in ("x86_64", "AMD64")
    fast = torch.cpu._is_avx512_bf16_supported() if x86 else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"


def memory_format(device):
    """The order of an image's values in memory that convolutions like best: pixels first, channels last on a GPU."""
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


def autocast(device, dtype):
    """Run convolutions and matrix products in bfloat16, weights and losses staying float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


# ---- several processes, started by torchrun -------------------------------------------------------
#
# All of them run the same script. Whatever is random is drawn alike in all of them, for the whole batch, and each takes
# its own rows of it: so a run on eight ranks is the run on one, but for the order in which gradients are summed.


def _meet(device):
    """Join the process group: tensors on the CPU travel by gloo, on GPUs by NCCL."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))


def where(device):
    """What a run runs on, in words."""
    return str(device) if ranks() == 1 else f"{ranks()} processes ({device.type})"


def rank():
    """The number of this process, 0 … ranks() − 1: number 0 writes files, prints and shows progress."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(x):
    """This rank's share of the rows of a batch that all ranks know: (B, …) -> (B / ranks, …)."""
    return x.chunk(ranks())[rank()]


def from_all(x):
    """The shares of all ranks, as one batch on each of them: (B / ranks, …) -> (B, …). Waits for the device."""
    if ranks() == 1:
        return x
    shares = [None] * ranks()
    dist.all_gather_object(shares, x.cpu())
    return torch.cat(shares).to(x.device)


def from_first(value):
    """What rank 0 has, on every rank: any plain values, or tensors on the CPU."""
    box = [value]
    if ranks() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def average(x):
    """The mean over the ranks of a tensor."""
    if ranks() > 1:
        dist.all_reduce(x)
        x /= ranks()
    return x


def in_turn(jobs, work):
    """work(job) for each job of an iterable, shared out one by one: job i is done on rank i mod ranks.

    Yields the results in the order of the jobs, on rank 0; on the others nothing, but they must iterate as well.
    Tensors among the results must be on the CPU.
    """
    jobs = iter(jobs)
    while group := list(islice(jobs, ranks())):
        result = work(group[rank()]) if rank() < len(group) else None
        if ranks() == 1:
            yield result
        else:
            results = None if rank() else [None] * ranks()
            dist.gather_object(result, results)
            yield from (results or [])[:len(group)]


class Vote:
    """Whether any rank says yes, as all of them learn in the same update: the next one, so that nobody waits now."""

    def __init__(self):
        self.cast = None

    def __call__(self, yes):
        if ranks() == 1:
            return yes
        before, ballot = self.cast, torch.tensor(float(yes))
        self.cast = ballot, dist.all_reduce(ballot, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return before[0].item() > 0


def progress(**settings):
    """A tqdm bar, on rank 0 alone."""
    return tqdm(dynamic_ncols=True, disable=rank() > 0, **settings)


def launch(main):
    """Run a script's main. Under torchrun only rank 0 prints, and tells errors that all meet or that end a rank."""
    other, code = int(os.environ.get("RANK", 0)) > 0, 0
    if other:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    try:
        main()
    except SystemExit as e:
        if other and isinstance(e.code, str):
            time.sleep(3)                                     # torchrun ends this process if rank 0 met the error too
        if ranks() == 1:
            raise
        code = 1 if isinstance(e.code, str) else e.code
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except RuntimeError as e:
        lost = isinstance(e, dist.DistError) or any(sign in str(e) for sign in ("onnection", "imed out"))
        if ranks() == 1 or not lost:
            raise
        code, why = 1, " ".join(str(e).split())[:300]
        if not other:
            print(f"error: another process of this run has died, or can't be reached: {why}\nWhat was saved is whole; "
                  f"a run of train.py or distill.py goes on with --resume", file=sys.stderr)
    if dist.is_initialized():
        if not code:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # Gloo's threads may still hold Python objects, on which the interpreter's usual end crashes now and then.
        os._exit(code or 0)


# ---- checkpoints --------------------------------------------------------------------------------

class CheckpointError(SystemExit):
    """A checkpoint that can't be used. A SystemExit: uncaught, its one-line message is all the user sees."""


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values, so that `path` always holds a whole file, old or new.

    Raises CheckpointError when the disk is full or the folder can't be written.
    """
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())    # on the disk before the name is, or a power cut could leave an empty file
        os.replace(tmp, path)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise CheckpointError(f"error: can't write {path} ({e.strerror or e}); the old one is untouched") from None


def load_checkpoint(path):
    """Read what `save_checkpoint` wrote, on the CPU, without running code from the file. Raises CheckpointError.

    Its tensors are mapped from the disk: a sampler of a big model never reads the optimiser's state. (Windows can't
    replace a file that is mapped, as a resumed run does.)
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
    except FileNotFoundError:
        raise CheckpointError(f"error: no checkpoint at {path}; to make one: python train.py --distill 0.15") from None
    except Exception as e:  # torch raises half a dozen types here, all meaning the same to a user
        raise CheckpointError(f"error: {path} is no readable checkpoint ({str(e).splitlines()[0][:120]})") from None
    if not isinstance(state, dict) or not {"config", "weights", "ema", "schedule", "predicts", "shape"} <= state.keys():
        raise CheckpointError(f"error: {path} is not a checkpoint of this project")
    return state


def load_model(path, device="cpu", ema=True):
    """The network of a checkpoint, ready to sample: (net, state). `ema=False`: the weights, not their average."""
    state = load_checkpoint(path)
    known = {f.name for f in fields(UNetConfig)}
    if not state["config"].keys() <= known:
        raise CheckpointError(f"error: {path}: unknown model settings {sorted(state['config'].keys() - known)}")
    with torch.device("meta"):                                # no random weights: those of the file follow
        net = UNet(UNetConfig(**state["config"])).to_empty(device="cpu")
    try:
        net.load_state_dict(state["ema" if ema else "weights"])
    except RuntimeError as e:
        first = str(e).splitlines()[1].strip()
        raise CheckpointError(f"error: {path}: its weights do not fit its own config ({first})") from None
    return net.to(device, memory_format=memory_format(device)).eval().requires_grad_(False), state


def file_hash(path, digits=16):
    """The first digits of a file's SHA-256: which checkpoint an image or a score came from."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:digits]


def config_dict(config):
    """A config as plain values, for a checkpoint."""
    return asdict(config)
