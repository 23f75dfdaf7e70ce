"""The UNet and its configs.

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

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

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
    step_length: bool = False               # told the length d of the step it is asked for: see shortcut.py

    def __post_init__(self):
        for name in ("mult", "attention"):  # lists, as they come from JSON or the command line, will do
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if min(self.channels, self.blocks, self.groups, self.heads, *self.mult) < 1 or self.head_channels < 0:
            raise ValueError("channels, mult, blocks, groups and heads must be at least 1, head_channels at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must be at least 0 and below 1")
        factors = [2 ** i for i in range(len(self.mult))]
        if not set(self.attention) <= set(factors):
            raise ValueError(f"attention = {list(self.attention)}: with {len(self.mult)} levels it takes {factors}")
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
    """Sinusoidal embedding of t (B,) in [0, 1] -> (B, dim); cosines first, as guided-diffusion has it.

    The frequencies were made for timesteps 0 … 1000, so t is scaled to that range: LDM's step i is t = i / 1000."""
    half = dim // 2
    freqs = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(10000) / half))
    angle = 1000 * t[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=1)

def zero(layer):
    """Start a residual branch at zero, so that a block is the identity at first (as in guided-diffusion)."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer

class GroupNorm(nn.GroupNorm):
    """On a CPU bfloat16 runs in float32: its channels-last kernel is several times slower, backwards above all."""

    def forward(self, h):
        slow = h.device.type == "cpu" and h.dtype == torch.bfloat16
        return super().forward(h.float()).to(h.dtype) if slow else super().forward(h)

class ResBlock(nn.Module):
    """h + conv(norm(conv(norm(h)) + time)): the workhorse. (B, Cin, H, W) -> (B, Cout, H, W)."""

    def __init__(self, c, cin, cout):
        super().__init__()
        self.norm1 = GroupNorm(c.groups, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(4 * c.channels, cout)
        self.norm2 = GroupNorm(c.groups, cout)
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
        self.norm = GroupNorm(c.groups, ch)
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
        self.norm = GroupNorm(c.groups, ch, eps=1e-6)          # this one norm has another epsilon in LDM
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
    """Double the image: nearest neighbour, then a convolution that smooths it.

    On a CPU both at once, as a transposed convolution of the small image: 16 products in place of 36. Of three
    neighbours in the doubled image two are the same pixel: their weights add up."""

    def __init__(self, ch):
        super().__init__(ch, ch, 3, padding=1)

    def forward(self, h):
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
    for a fraction of the memory, and a third more time."""

    def __init__(self, config):
        super().__init__()
        self.checkpointing = False
        c = self.config = config
        width = 4 * c.channels
        self.time_in, self.time_out = nn.Linear(c.channels, width), nn.Linear(width, width)
        self.label = nn.Embedding(c.classes + 1, c.context_dim or width) if c.classes else None
        def attention(ch):
            return Transformer(c, ch) if c.context_dim else SelfAttention(c, ch)

        ch, factor, skips = c.channels, 1, [c.channels]    # skips: channels of everything the way up will see again
        self.down = nn.ModuleList([Stage(resample=nn.Conv2d(c.in_channels, ch, 3, padding=1))])
        for level, mult in enumerate(c.mult):
            for _ in range(c.blocks):
                res, ch = ResBlock(c, ch, mult * c.channels), mult * c.channels
                self.down.append(Stage(res, attention(ch) if factor in c.attention else None))
                skips.append(ch)
            if level < len(c.mult) - 1:
                self.down.append(Stage(resample=Downsample(ch)))
                skips.append(ch)
                factor *= 2

        middle = attention(ch)
        self.mid = nn.ModuleList([Stage(ResBlock(c, ch, ch), middle), Stage(ResBlock(c, ch, ch))])
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(c.mult))):
            for i in range(c.blocks + 1):
                res, ch = ResBlock(c, ch + skips.pop(), mult * c.channels), mult * c.channels
                attn = attention(ch) if factor in c.attention else None
                self.up.append(Stage(res, attn, Upsample(ch) if i == c.blocks and level else None))
            factor //= 2
        self.norm = GroupNorm(c.groups, ch)
        self.out = zero(nn.Conv2d(ch, c.in_channels, 3, padding=1))
        self.length_in = self.length_out = None
        if c.step_length:
            self.add_step_length()

    def add_step_length(self):
        """Take on the input d. Nothing changes until the path is trained, and at d = 0 nothing ever does.

        Without biases and from features that are 0 at d = 0, the path adds exactly 0 there."""
        self.config, (width, ch) = replace(self.config, step_length=True), self.time_in.weight.shape
        device = self.time_in.weight.device
        self.length_in = nn.Linear(ch, width, bias=False, device=device)
        self.length_out = zero(nn.Linear(width, width, bias=False, device=device))

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

    def forward(self, z, t, y=None, context=None, d=None):
        """z (B, C, H, W); t in [0, 1], float or (B,); y (B,) class indices; context (B, S, context_dim).
        d >= 0, float or (B,): the length of the step, for a config with step_length; None is 0.

        Returns (B, C, H, W) in the dtype of the weights, also under autocast: the difference between two
        neighbouring predictions is what self-distillation learns from, and bfloat16 would round it away.
        H and W must be divisible by 2^(levels - 1). y is needed exactly if the config has classes; where the label is
        looked up as a context of one token, a context may be given in its place. Raises ValueError otherwise."""
        if any(side % 2 ** (len(self.config.mult) - 1) for side in z.shape[2:]):
            raise ValueError(f"image size {tuple(z.shape[2:])} is not divisible by 2 at each of this UNet's levels")
        if (y is not None) != (self.config.classes > 0 and context is None):
            raise ValueError("this UNet needs class labels y" if y is None else "this UNet has no classes, but got y")
        if d is not None and self.length_in is None:
            raise ValueError("this UNet takes no step length d")
        dtype, ch = self.out.weight.dtype, self.config.channels
        def rows(t):                                  # filled on the device: a copy would make a GPU wait
            return t.to(dtype).expand(len(z)) if torch.is_tensor(t) else z.new_full((len(z),), t, dtype=dtype)
        emb = self.time_out(F.silu(self.time_in(time_embedding(rows(t), ch))))
        if d is not None:
            d = rows(d)
            features = time_embedding(d, ch) - time_embedding(torch.zeros_like(d), ch)
            emb = emb + self.length_out(F.silu(self.length_in(features)))
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
    return sum(p.numel() for p in net.parameters())
