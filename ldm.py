"""LDM's pretrained models (Rombach et al. 2022): the autoencoder they draw in, and their files in two layouts.

    net, state = load_any_model("model.ckpt", name="celebahq256") # CompVis's file; a folder in diffusers' layout
    images = autoencoder_of(state).decode(z)                      # latents (B, 3, 64, 64) -> (B, 3, 256, 256)

Their UNet is model.py's. It predicts the noise in latents, which a fixed autoencoder (VQ-f4: four times smaller, a
codebook of 8192 entries) makes of images and turns into images again. A file is only ever read as tensors and plain
values. Every tensor in it has a place here, or a reason to be ignored; one that is missing, unknown or of another
shape is an error that names it.
"""

import hashlib
import json
import os
import pickle
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from checkpoint import CheckpointError, file_hash, load_model
from data import Images, check_space, locked, mapped, wait_for_first_rank
from ddim import LDMDiscrete
from model import Downsample, ResBlock, SelfAttention, Transformer, UNet, UNetConfig, Upsample, attend
from runtime import autocast, memory_format, progress

# ---- the autoencoder ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything that decides the shape of an autoencoder's weights; the defaults are VQ-f4."""

    channels: int = 128                     # width at full resolution
    mult: tuple[int, ...] = (1, 2, 4)       # width of each level, in units of `channels`
    blocks: int = 2                         # residual blocks per level of the encoder, one more in the decoder
    latent: int = 3                         # channels of the latents, and length of a code
    codes: int = 8192                       # rows of the codebook

    @property
    def factor(self):
        """How many times smaller than its image a latent is."""
        return 2 ** (len(self.mult) - 1)

def named_sequential(**layers):
    """Layers one after the other, under names."""
    return nn.Sequential(OrderedDict(layers))

def group_norm(ch):
    return nn.GroupNorm(32, ch, eps=1e-6)                     # another epsilon than in the UNet

class Block(nn.Module):
    """Residual block without time: (B, Cin, H, W) -> (B, Cout, H, W)."""

    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.norm2 = group_norm(cin), group_norm(cout)
        self.conv1, self.conv2 = nn.Conv2d(cin, cout, 3, padding=1), nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, h):
        r = self.conv1(F.silu(self.norm1(h)))
        return self.nin_shortcut(h) + self.conv2(F.silu(self.norm2(r)))

class Attention(nn.Module):
    """Every pixel looks at every other, with one head. Keeps the shape (B, C, H, W)."""

    def __init__(self, ch):
        super().__init__()
        self.norm = group_norm(ch)
        self.q, self.k, self.v, self.proj_out = (nn.Linear(ch, ch) for _ in range(4))

    def forward(self, h):
        x = self.norm(h).flatten(2).transpose(1, 2)           # (B, HW, C): tokens
        x = self.proj_out(attend(*(layer(x)[:, :, None] for layer in (self.q, self.k, self.v))))
        return h + x.transpose(1, 2).reshape(h.shape)

def blocks(cin, cout, count):
    return nn.Sequential(*(Block(cout if i else cin, cout) for i in range(count)))

def middle(ch):
    return named_sequential(block_1=Block(ch, ch), attn_1=Attention(ch), block_2=Block(ch, ch))

def encoder(c):
    """Images (B, 3, H, W) -> (B, latent, H/f, W/f). Names as in LDM's files, here and in the decoder."""
    widths, levels = [c.channels, *(m * c.channels for m in c.mult)], []
    for i, (cin, cout) in enumerate(pairwise(widths)):
        levels.append(named_sequential(block=blocks(cin, cout, c.blocks)))
        if i < len(c.mult) - 1:                               # padded at the right and the bottom only
            pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(cout, cout, 3, stride=2)
            levels[-1].add_module("downsample", named_sequential(pad=pad, conv=conv))
    return named_sequential(
        conv_in=nn.Conv2d(3, c.channels, 3, padding=1), down=nn.Sequential(*levels), mid=middle(cout),
        norm_out=group_norm(cout), act=nn.SiLU(), conv_out=nn.Conv2d(cout, c.latent, 3, padding=1))

def decoder(c):
    """(B, latent, h, w) -> images (B, 3, f h, f w)."""
    ch, levels = c.mult[-1] * c.channels, {}
    conv_in, mid = nn.Conv2d(c.latent, ch, 3, padding=1), middle(ch)
    for i, mult in reversed(list(enumerate(c.mult))):         # the coarsest level, which has the highest number, first
        level, ch = named_sequential(block=blocks(ch, mult * c.channels, c.blocks + 1)), mult * c.channels
        if i:
            level.add_module("upsample", named_sequential(conv=Upsample(ch)))
        levels[str(i)] = level
    return named_sequential(conv_in=conv_in, mid=mid, up=named_sequential(**levels),
                            norm_out=group_norm(ch), act=nn.SiLU(), conv_out=nn.Conv2d(ch, 3, 3, padding=1))

class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in about [-1, 1] to latents (B, latent, H/f, W/f), and back."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.encoder, self.decoder = encoder(c), decoder(c)
        self.quantize = named_sequential(embedding=nn.Embedding(c.codes, c.latent))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(c.latent, c.latent, 1), nn.Conv2d(c.latent, c.latent, 1)

    def encode(self, x):
        """Latents as diffusion sees them: not quantised."""
        return self.quant_conv(self.encoder(x))

    def nearest(self, z):
        """For each latent pixel the row of the codebook that is nearest to it, the first of equals: (B, h, w)."""
        codes, rows = self.quantize.embedding.weight, []
        with torch.autocast(z.device.type, enabled=False):
            for image in z.float():                           # one by one: 64x64 pixels have 134 MB of distances
                distance = codes.square().sum(1) - 2 * image.flatten(1).T @ codes.T    # less the pixel's own square
                rows.append(distance.argmin(1).view(image.shape[1:]))
        return torch.stack(rows)

    def decode(self, z):
        """Latents, quantised first, to images; float32 also under autocast, since bfloat16 has no 256 shades."""
        codes = self.quantize.embedding(self.nearest(z)).permute(0, 3, 1, 2)
        h = self.decoder[:-1](self.post_quant_conv(codes))
        with torch.autocast(z.device.type, enabled=False):
            return self.decoder.conv_out(h.float())

# ---- the three models -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Model:
    """A released model: its UNet, its autoencoder, and the side of its images in pixels."""

    unet: UNetConfig
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    size: int = 256

UNCONDITIONAL = UNetConfig(channels=224, mult=(1, 2, 3, 4), blocks=2, attention=(2, 4, 8), head_channels=32)
MODELS = {
    "celebahq256": Model(UNCONDITIONAL),
    "bedroom256": Model(UNCONDITIONAL),
    "imagenet256": Model(UNetConfig(channels=192, mult=(1, 2, 3, 5), blocks=2, attention=(2, 4, 8), head_channels=0,
                                    heads=1, classes=1000, context_dim=512)),
}
DIFFUSION = dict(schedule="ldm", predicts="eps")    # of all three, as a checkpoint's state has it

def build(name):
    """UNet and autoencoder of MODELS[name] as `unet` and `autoencoder` of one module, without memory for weights."""
    with torch.device("meta"):
        return nn.ModuleDict(dict(unet=UNet(MODELS[name].unet), autoencoder=Autoencoder(MODELS[name].autoencoder)))

def image_size(state):
    """The side of a model's images in pixels, whatever it draws in."""
    return state["shape"][1] * (MODELS[state["ldm"]].autoencoder.factor if "ldm" in state else 1)

def image_channels(state):
    """1 for a model of greyscale images, else 3, whatever it draws in."""
    return 3 if "ldm" in state else state["shape"][0]

def autoencoder_of(state, device="cpu"):
    """The autoencoder that a checkpoint carries, ready for use."""
    with torch.device("meta"):
        net = Autoencoder(MODELS[state["ldm"]].autoencoder)
    net.load_state_dict(state["autoencoder"], assign=True)
    return net.to(device, memory_format=memory_format(device)).eval().requires_grad_(False)

# ---- names: ours -> a file's ----------------------------------------------------------------------------
# Inside a block. Both layouts have the transformer's names in common.
TRANSFORMER = {"norm": "norm", "proj_in": "proj_in", "proj_out": "proj_out",
               "ff.up": "transformer_blocks.0.ff.net.0.proj", "ff.down": "transformer_blocks.0.ff.net.2"}
TRANSFORMER |= {f"norm{i}": f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)}
TRANSFORMER |= {f"attn{i}.{ours}": f"transformer_blocks.0.attn{i}.to_{theirs}" for i in (1, 2)
                for ours, theirs in {"q": "q", "k": "k", "v": "v", "out": "out.0"}.items()}
COMPVIS = {
    ResBlock: {"norm1": "in_layers.0", "conv1": "in_layers.2", "emb": "emb_layers.1", "norm2": "out_layers.0",
               "conv2": "out_layers.3", "skip": "skip_connection"},
    SelfAttention: {"norm": "norm", "qkv": "qkv", "proj": "proj_out"},
    Transformer: TRANSFORMER,
    Downsample: {"": "op"},
    Upsample: {"": "conv"},
}
DIFFUSERS = {
    ResBlock: {"norm1": "norm1", "conv1": "conv1", "emb": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
               "skip": "conv_shortcut"},
    SelfAttention: {"norm": "group_norm", "qkv": ("to_q", "to_k", "to_v"), "proj": "to_out.0"},
    Transformer: TRANSFORMER,
    Downsample: {"": "conv"},
    Upsample: {"": "conv"},
}

def compvis_places(net):
    """(part of our UNet, its place in CompVis's UNet); a stage's parts are numbered as far as they exist."""
    yield from {"time_in": "time_embed.0", "time_out": "time_embed.2", "norm": "out.0", "out": "out.2",
                "mid.0.res": "middle_block.0", "mid.0.attn": "middle_block.1", "mid.1.res": "middle_block.2"}.items()
    for path, theirs in (("down", "input_blocks"), ("up", "output_blocks")):
        for i, stage in enumerate(getattr(net, path)):
            for k, (part, _) in enumerate(stage.named_children()):
                yield f"{path}.{i}.{part}", f"{theirs}.{i}.{k}"

def diffusers_places(net):
    """(part of our UNet, its place in diffusers' UNet2DModel and UNet2DConditionModel)."""
    yield from {"time_in": "time_embedding.linear_1", "time_out": "time_embedding.linear_2", "norm": "conv_norm_out",
                "out": "conv_out", "down.0.resample": "conv_in", "mid.0.res": "mid_block.resnets.0",
                "mid.0.attn": "mid_block.attentions.0", "mid.1.res": "mid_block.resnets.1"}.items()
    for path, first, resampled in (("down", 1, "downsamplers"), ("up", 0, "upsamplers")):
        for i, stage in enumerate(getattr(net, path)[first:]):
            level, j = divmod(i, net.config.blocks + 1)       # going down, the last one of a level only halves
            theirs = dict(res=f"resnets.{j}", attn=f"attentions.{j}", resample=f"{resampled}.0")
            for part, _ in stage.named_children():
                yield f"{path}.{i + first}.{part}", f"{path}_blocks.{level}.{theirs[part]}"

def names_of(bundle, places, inner, unet, embedder, autoencoder_name):
    """{our name: their names} of UNet and autoencoder; three of theirs where they keep q, k and v apart."""
    names = {}
    if "autoencoder" in bundle:
        names |= {f"autoencoder.{key}": (autoencoder_name(key),) for key in bundle.autoencoder.state_dict()}
    for ours, theirs in places(bundle.unet):
        part = bundle.unet.get_submodule(ours)
        for key in part.state_dict():
            module, _, kind = key.rpartition(".")
            found = inner.get(type(part), {"": ""})[module]
            found = [found] if isinstance(found, str) else found
            names[f"unet.{ours}.{key}"] = tuple(".".join(filter(None, (unet, theirs, x, kind))) for x in found)
    if bundle.unet.label is not None:
        names["unet.label.weight"] = (f"{embedder}.embedding.weight",)
    return names

def diffusers_vq_name(key, levels):
    """An autoencoder's tensor in diffusers' VQModel. Its decoder numbers the levels in the order they run in."""
    def level(m):
        i = int(m[3])
        return f"{m[1]}.{m[2]}_blocks.{i if m[2] == 'down' else levels - 1 - i}."
    key = re.sub(r"^(encoder|decoder)\.(down|up)\.(\d+)\.", level, key)
    key = re.sub(r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}", key)
    key = re.sub(r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1.", key)
    for ours, theirs in {".mid.attn_1.norm.": ".mid_block.attentions.0.group_norm.", ".block.": ".resnets.",
                         ".mid.attn_1.proj_out.": ".mid_block.attentions.0.to_out.0.", "nin_shortcut": "conv_shortcut",
                         "downsample.": "downsamplers.0.", "upsample.": "upsamplers.0.",
                         ".norm_out.": ".conv_norm_out."}.items():
        key = key.replace(ours, theirs)
    return key

def compvis_names(bundle, ema=False):
    """{our name: (name in CompVis's state dict,)} of what `build` gave. ema: of the UNet the averages, without dots."""
    names = names_of(bundle, compvis_places, COMPVIS, "model.diffusion_model", "cond_stage_model",
                     lambda key: f"first_stage_model.{key}")
    averaged = lambda name: re.sub(r"^model\.(.*)", lambda m: "model_ema." + m[1].replace(".", ""), name)  # noqa: E731
    return {ours: (averaged(theirs),) for ours, (theirs,) in names.items()} if ema else names

def diffusers_names(bundle):
    """{our name: (folder.name, …)} in diffusers' layout; the class embedding lies in a folder of our own choice."""
    def vq_name(key):
        return f"vqvae.{diffusers_vq_name(key, len(bundle.autoencoder.config.mult))}"
    return names_of(bundle, diffusers_places, DIFFUSERS, "unet", "class_embedder", vq_name)

# ---- values: a file's -> ours -----------------------------------------------------------------------------
def merge_heads(parts, heads):
    """q, k and v apart, each (C, …), as one tensor (3 C, …) that is grouped by head first."""
    return torch.stack([p.unflatten(0, (heads, -1)) for p in parts], 1).flatten(0, 2)

def split_heads(qkv, heads):
    """The inverse of `merge_heads`."""
    return [p.flatten(0, 1) for p in qkv.unflatten(0, (heads, 3, -1)).unbind(1)]

def heads_of(bundle, key):
    return bundle.get_submodule(key.rpartition(".")[0].removesuffix(".qkv")).heads

def load_tensors(bundle, names, tensors, what):
    """Give what `build` made memory, and the values of a file: names {our name: their names}, tensors by theirs.

    Trailing dimensions of size 1 don't count: LDM's 1x1 convolutions are our linear layers. Raises CheckpointError."""
    weights = bundle.state_dict()
    missing = [name for theirs in names.values() for name in theirs if not torch.is_tensor(tensors.get(name))]
    refuse(missing, what, "there is no")
    for key, theirs in names.items():
        shape = [weights[key].shape[0] // len(theirs), *weights[key].shape[1:]]
        for name in theirs:
            found = list(tensors[name].shape)
            if found != shape + [1] * (len(found) - len(shape)):
                raise CheckpointError(f"error: {what}: {name} has the shape {found}, not {shape}")
    weights = bundle.to_empty(device="cpu").state_dict()
    for key, theirs in names.items():                         # one by one: a mapped file is never in memory as a whole
        parts = [tensors[name].reshape(-1, *weights[key].shape[1:]) for name in theirs]
        weights[key].copy_(parts[0] if len(parts) == 1 else merge_heads(parts, heads_of(bundle, key)))
    return bundle.requires_grad_(False).eval()

def refuse(names, what, why):
    """Raise CheckpointError if there are any such names of tensors: it says how many, and names the first."""
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(f"error: {what}: {why} {min(names)}{more}")

# ---- CompVis's files --------------------------------------------------------------------------------------
# Beside the weights a file holds the tables of its noise schedule, which follow from alphas_cumprod (that one is
# checked), counters of the average, what a sampler left behind, and the loss the autoencoder was trained with.
NOT_KNOWN = "nothing is known of its"
IGNORED = re.compile(
    r"betas|alphas_cumprod(_prev)?|(log|sqrt)_one_minus_alphas_cumprod|sqrt_(recip_|recipm1_)?alphas_cumprod|"
    r"posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|model_ema\.(decay|num_updates)|ddim_\w+|(first_stage_model\.)?loss\..*")

class StubClass(type):
    """Type of the stand-ins for classes that a file names: it may make instances, which are empty, but call nothing."""

    def __call__(cls, *args, **kwargs):
        raise pickle.UnpicklingError(f"it calls {cls.__name__}")

EMPTY = {"__new__": lambda cls, *args: object.__new__(cls), "__setstate__": lambda self, state: None}

def read_file(path):
    """A file of torch.save, or .safetensors, as plain values, mapped from the disk. Nothing in it is imported or run.

    Lightning's files mention classes (of callbacks), which torch rightly refuses: they become empty stand-ins here.
    A file that calls anything but torch's own functions for tensors is refused. Raises CheckpointError."""
    try:
        if path.suffix == ".safetensors":
            return safetensors().torch.load_file(path)
        unknown = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([(StubClass(name, (), EMPTY), name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        reason = str(e.__context__ or e).splitlines()[0][:120]
        raise CheckpointError(f"error: {path} is refused: it is more than tensors and plain values ({reason}); "
                              f"nothing of it was run") from None
    except Exception as e:  # a broken file fails in half a dozen ways
        raise CheckpointError(f"error: {path} is no readable checkpoint ({str(e).splitlines()[0][:120]})") from None

def fill_from_file(bundle, tensors, ema, what):
    """The weights of a CompVis state dict: the UNet's averaged ones if wanted and there, else the raw ones."""
    raw, averaged = compvis_names(bundle), compvis_names(bundle, ema=True)
    known = {name for names in (raw, averaged) for theirs in names.values() for name in theirs}
    refuse([name for name in tensors if name not in known and not IGNORED.fullmatch(name)], what, NOT_KNOWN)
    table, own = tensors.get("alphas_cumprod"), LDMDiscrete().alpha2
    if table is not None and (table.shape != own.shape or not torch.allclose(table.double(), own, rtol=0, atol=1e-6)):
        raise CheckpointError(f"error: {what}: its alphas_cumprod is another noise schedule than LDM's")
    has_average = any(name.startswith("model_ema.") for name in tensors)
    return load_tensors(bundle, averaged if ema and has_average else raw, tensors, what)

# ---- folders in diffusers' layout --------------------------------------------------------------------------
WEIGHTS_FILE = "diffusion_pytorch_model"
DISTILLED_SPACING = "trailing"                                # of a scheduler's steps: 999 - 1000 i/N, ours less one
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

def safetensors():
    """The package safetensors, or a CheckpointError that says how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise CheckpointError("error: files in diffusers' layout need the package safetensors: "
                              "pip install safetensors") from None
    return safetensors

def weights_files(folder):
    """{sub-folder: its file of weights} in diffusers' layout. Raises CheckpointError if there is none."""
    files = {name: path for name in ("unet", "vqvae", "class_embedder") for end in (".bin", ".safetensors")
             if (path := Path(folder) / name / (WEIGHTS_FILE + end)).exists()}       # the latter if both are there
    if not files:
        raise CheckpointError(f"error: {folder} holds no ckpt.pt, and is no folder in diffusers' layout: it has no "
                              f"unet/{WEIGHTS_FILE}.safetensors or .bin")
    return files

def read_folder(folder):
    """All tensors of a folder in diffusers' layout, as {sub-folder.name: tensor}; old names become the present ones."""
    tensors = {}
    for part, path in weights_files(folder).items():
        for name, value in read_file(path).items():
            for old, new in OLD_NAMES.items():
                name = name.replace(old, new)
            tensors[f"{part}.{name}"] = value
    return tensors

def unet_config(unet, size):
    """The config.json with which diffusers builds our UNet, for images or latents of `size`."""
    def kinds(attending, plain):
        return [attending if 2 ** i in unet.attention else plain for i in range(len(unet.mult))]
    cross = "Cross" if unet.context_dim else ""
    net = dict(_class_name="UNet2DModel", sample_size=size, in_channels=unet.in_channels,
               out_channels=unet.in_channels, block_out_channels=[m * unet.channels for m in unet.mult],
               layers_per_block=unet.blocks, down_block_types=kinds(f"{cross}AttnDownBlock2D", "DownBlock2D"),
               up_block_types=kinds(f"{cross}AttnUpBlock2D", "UpBlock2D")[::-1],
               attention_head_dim=unet.head_channels or None, norm_num_groups=unet.groups, norm_eps=1e-5, act_fn="silu",
               downsample_padding=1, flip_sin_to_cos=True, freq_shift=0)
    if unet.context_dim:                                      # here diffusers' head_dim is the number of heads
        net |= dict(_class_name="UNet2DConditionModel", cross_attention_dim=unet.context_dim,
                    use_linear_projection=True, attention_head_dim=unet.heads)
    return net

def ldm_configs(unet, autoencoder, latent_size):
    """{sub-folder: config.json} with which diffusers builds the same networks and takes the same steps."""
    c, levels = autoencoder, len(autoencoder.mult)
    vq = dict(_class_name="VQModel", sample_size=latent_size * c.factor, in_channels=3, out_channels=3,
              block_out_channels=[m * c.channels for m in c.mult], layers_per_block=c.blocks, act_fn="silu",
              down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
              latent_channels=c.latent, num_vq_embeddings=c.codes, norm_num_groups=32, scaling_factor=1.0)
    steps = dict(_class_name="DDIMScheduler", num_train_timesteps=LDMDiscrete.length, beta_schedule="scaled_linear",
                 beta_start=0.0015, beta_end=0.0195, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                 timestep_spacing="leading", prediction_type="epsilon")
    return dict(unet=unet_config(unet, latent_size), vqvae=vq, scheduler=steps)

def config_name(part):
    """Where a folder in diffusers' layout has the config of a part."""
    return f"{part}/{'scheduler_' * (part == 'scheduler')}config.json"

def config_of(folder, part):
    """What the config of a part of such a folder says, {} if there is none. Raises CheckpointError."""
    path = Path(folder) / config_name(part)
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"error: {path} is no readable JSON ({e})") from None

def check_folder(folder, configs, what):
    """Compare what no shape of a tensor tells; a setting that the file leaves out is taken on trust.

    The scheduler may be any: samples are drawn by ours."""
    for part in ("unet", "vqvae"):
        ours, theirs = configs[part], config_of(folder, part)
        for key in ("_class_name", "attention_head_dim", "norm_num_groups", "norm_eps", "downsample_padding",
                    "flip_sin_to_cos", "freq_shift"):
            if key in ours and theirs.get(key, ours[key]) != ours[key]:
                path = Path(folder) / config_name(part)
                raise CheckpointError(f"error: {what}: {key} in {path} is {theirs[key]}, not {ours[key]}")

# ---- any checkpoint -----------------------------------------------------------------------------------------
def load_any_model(path, device="cpu", ema=True, name=None, size=None):
    """The network of any checkpoint, ready to sample, and its state: `checkpoint.load_model`, and LDM's own files too.

    path   a checkpoint of ours, a model.ckpt of CompVis's, or a folder in diffusers' layout
    ema    the averaged weights where there are any; False: the weights themselves
    name   which of MODELS it is: needed for files that are not ours; those know it
    size   side of the images in pixels, for an unconditional model's file that is to draw others than it was made for;
           None: what a folder's config says, or the published size

    The state of an LDM has its name as `ldm`, and the `autoencoder`'s tensors. Every state has its `files`, see
    `model_hash`. Raises CheckpointError."""
    path = Path(path).expanduser()
    if name and not path.exists():
        raise CheckpointError(f"error: no file or folder of LDM's at {path}")
    files = files_of(path)
    content = read_file(path) if path.is_file() else None
    if path.is_dir() or isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        if name is None:
            raise CheckpointError(f"error: {path} is in the layout of LDM's files: say which model it is, with --ldm "
                                  f"(if train.py made it, give its ckpt.pt instead)")
        net, state = _load_foreign(path, content, device, ema, name, size)
        return net, state | dict(files=files)
    net, state = load_model(path, device, ema)
    state["files"] = files
    known = state.get("ldm")
    if name not in (None, known) or known not in (None, *MODELS):
        is_a = f"LDM's {known}" if known else "a model of train.py"
        raise CheckpointError(f"error: {path} is {is_a}, not {name or 'one of ' + ', '.join(MODELS)}")
    if size not in (None, image_size(state)):
        raise CheckpointError(f"error: {path} draws images of {image_size(state)} pixels, not {size}")
    return net, state

def _load_foreign(path, content, device, ema, name, size):
    bundle, c, what = build(name), MODELS[name], f"{path} is not LDM's {name}"
    sample_size = config_of(path, "unet").get("sample_size") if content is None else None
    size = size or (sample_size * c.autoencoder.factor if sample_size else c.size)
    step = c.autoencoder.factor * 2 ** (len(c.unet.mult) - 1)
    if size < step or size % step or (size != c.size and c.unet.classes):
        allowed = f"{c.size} and nothing else" if c.unet.classes else f"a multiple of {step}"
        raise CheckpointError(f"error: --size {size}: for {name} it must be {allowed}")
    side = size // c.autoencoder.factor
    if content is None:
        names, tensors = diffusers_names(bundle), read_folder(path)
        check_folder(path, ldm_configs(c.unet, c.autoencoder, side), what)
        refuse(tensors.keys() - {name for theirs in names.values() for name in theirs}, what, NOT_KNOWN)
        load_tensors(bundle, names, tensors, what)
    else:
        fill_from_file(bundle, content["state_dict"], ema, what)
    state = DIFFUSION | dict(config=asdict(c.unet), shape=[c.autoencoder.latent, side, side], classes=[], ldm=name,
                             autoencoder=bundle.autoencoder.state_dict(), history=[dict(how=f"LDM's {name}")])
    if content is None and config_of(path, "scheduler").get("timestep_spacing") == DISTILLED_SPACING:
        state["schedule"] = "ldm-distilled"
    return bundle.unet.to(device, memory_format=memory_format(device)), state

def ldm_flag(p):
    """`--ldm`, for every script that takes one of LDM's models."""
    p.add_argument("--ldm", choices=MODELS,
                   help="--ckpt is this LDM model: CompVis's file, a folder in diffusers' layout, or our ckpt.pt")

def files_of(path):
    """{file of a model: what changes if another takes its place}. Of one that is not there, nothing."""
    files = weights_files(path).values() if path.is_dir() else [path] if path.exists() else []
    return {file: (info.st_ino, info.st_size, info.st_mtime_ns) for file in files for info in [file.stat()]}

def model_hash(state):
    """Which model an image or a score came from: the hash of the files that `load_any_model` read it from.

    Raises CheckpointError if others have taken their place since."""
    hashes = [file_hash(file) for file in state["files"]]
    for file, seen in state["files"].items():
        if files_of(file).get(file) != seen:
            raise CheckpointError(f"error: {file} has changed since it was read; the same command takes the new one")
    return "+".join(hashes)

# ---- a data set as latents ------------------------------------------------------------------------------------
class Latents(Images):
    """A packed data set as an LDM's autoencoder sees it: `batch` gives latents (B, C, h, w) and labels.

    Encoded once, each image and its mirror image, into a memory-mapped file beside the pixels, in half precision (which
    rounds by 5e-4 of a value): 49 KB for a 256x256 image. The file's name holds a hash of the autoencoder. Encoding
    goes on where it was interrupted. Raises DataError."""

    def __init__(self, images, state, device, dtype):
        super().__init__(images.folder)
        digest = hashlib.sha256(dtype.encode())
        for _, value in sorted(state["autoencoder"].items()):
            digest.update(value.numpy().tobytes())
        path = self.folder / f"latents-{digest.hexdigest()[:12]}.f16"
        shape = (len(self), 2, *state["shape"])
        if not wait_for_first_rank(path):
            with locked(self.folder, "encoding the data"):
                if not path.exists():                         # another run may just have made it
                    self._encode(autoencoder_of(state, device), path, shape, device, dtype)
        self.latents = mapped(path, np.float16, shape)

    def read(self, index, mirrored):
        """Latents number `index` (B,) as (B, C, h, w) float32; those in the mask `mirrored` of the mirrored image."""
        return torch.from_numpy(self.latents[index, mirrored.astype(int)].astype(np.float32))

    def _encode(self, net, path, shape, device, dtype):
        part, one = path.with_suffix(".part"), 2 * int(np.prod(shape[1:]))     # bytes of an image and its mirror image
        with open(part, "ab") as f, torch.no_grad(), autocast(device, dtype):
            done = f.tell() // one
            f.truncate(done * one)                            # what was cut off in the middle is encoded again
            check_space(self.folder, (shape[0] - done) * one, "encoding the data")
            with progress(total=shape[0], initial=done, desc="encoding", unit="img") as bar:
                for start in range(done, shape[0], 8):        # so many at a time
                    index = np.arange(start, min(start + 8, shape[0]))
                    pairs = [net.encode(super(Latents, self).read(index, np.full(len(index), mirrored)).to(device))
                             for mirrored in (False, True)]
                    f.write(torch.stack(pairs, 1).half().cpu().numpy().tobytes())
                    bar.update(len(index))
        os.replace(part, path)
