"""ldm.py: LDM's models against values that CompVis's own code gave, their files, and diffusers' layout.

The golden files hold inputs and outputs of two tiny models in LDM's layout. Their weights are drawn from the names of
the tensors, by the rule in `drawn`, so that a weight in the wrong place shows. ldm_keys.json has the names and shapes
in the real files.
"""

import functools
import json
import os
import pickle
import sys
import types
import zlib
from pathlib import Path

import bench
import diffusers
import numpy as np
import pytest
import torch
from conftest import log_of
from PIL import Image
from torch.testing import assert_close

import data
import distill
import export
import fid
import hooks
import ldm
import sample as script
from checkpoint import CheckpointError, load_checkpoint
from ddim import Denoiser, LDMDiscrete, ddim_sample
from model import UNet, UNetConfig, param_count

HERE = Path(__file__).parent
TINY_VQ = ldm.AutoencoderConfig(channels=32, codes=256)
TINY = {
    "uncond": ldm.Model(UNetConfig(channels=32, mult=(1, 2, 3, 4), blocks=2, attention=(2, 4, 8)), TINY_VQ, 64),
    "class": ldm.Model(UNetConfig(channels=32, mult=(1, 2, 3, 5), blocks=2, attention=(2, 4, 8), head_channels=0,
                                  classes=10, context_dim=64), TINY_VQ, 64),
}
GOLDEN = {name: {k: torch.from_numpy(v) for k, v in np.load(HERE / f"ldm_{name}_golden.npz").items() if v.ndim or
                 k == "null_label"} for name in TINY}

def drawn(key, shape, ema=False):
    """The tensor called `key`: the rule of the golden files."""
    mean, sd = 0, 0.9 / np.sqrt(np.prod(shape[1:]))
    if "embedding" in key:
        sd = 0.8
    elif key.endswith(".bias"):
        sd = 0.05
    elif len(shape) == 1:
        mean, sd = 1, 0.2
    elif any(part in key for part in ("proj_out", "out_layers.3", "conv2")):
        sd /= 3
    z = lambda name: torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))  # noqa: E731
    return mean + sd * z(key) + (0.5 * sd * z("ema:" + key) if ema else 0)

def state_dict_of(name, ema=True):
    """The state dict of a tiny model in CompVis's layout: schedule, raw weights, their averages, first stage."""
    return {k: v for k, v in whole_state_dict(name).items() if ema or not k.startswith("model_ema.")}

@functools.cache
def whole_state_dict(name):
    both = ldm.build(name)
    alphas = LDMDiscrete().alpha2.float()
    tensors = {"betas": 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]]), "alphas_cumprod": alphas}
    for ours, (key,) in ldm.compvis_names(both).items():
        shape = list(both.state_dict()[ours].shape)
        tensors[key] = drawn(key, shape)
        if key.startswith("model."):
            tensors["model_ema." + key.removeprefix("model.").replace(".", "")] = drawn(key, shape, ema=True)
    return tensors | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1000)}

def write_file(path, tensors):
    """A file as Lightning leaves it on a GPU: tagged cuda:0, with the class of a callback that is not installed."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType(name)
        module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, name, module)
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"epoch": 3, "state_dict": tensors, "callbacks": {module.ModelCheckpoint: {"best": 0.1}},
                    "optimizer_states": []}, path)
    return path

@pytest.fixture(scope="module", autouse=True)
def tiny_models():
    """The tiny models beside the real ones, so that all code finds them by name."""
    with pytest.MonkeyPatch.context() as patch:
        for name, model in TINY.items():
            patch.setitem(ldm.MODELS, name, model)
        yield

@pytest.fixture(scope="module")
def files(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm")
    return {name: write_file(folder / f"{name}.ckpt", state_dict_of(name)) for name in TINY}

@pytest.fixture(scope="module")
def loaded(files):
    return {name: ldm.load_any_model(path, name=name) for name, path in files.items()}

@pytest.fixture(params=list(TINY))
def name(request):
    return request.param

# ---- the real models ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name,count", [("celebahq256", 274_056_163), ("imagenet256", 400_920_579)])
def test_the_real_models_have_the_names_and_shapes_of_the_real_files(name, count):
    both, keys = ldm.build(name), json.loads((HERE / "ldm_keys.json").read_text())
    embedder = keys["imagenet256: cond_stage_model."] if name == "imagenet256" else {}
    expected = {f"model.diffusion_model.{k}": v for k, v in keys[f"{name}: model.diffusion_model."].items()}
    expected |= {f"first_stage_model.{k}": v for k, v in keys["first_stage_model. (both)"].items()}
    expected |= {f"cond_stage_model.{k}": v for k, v in embedder.items()}
    ours = {key: list(both.state_dict()[own].shape) for own, (key,) in ldm.compvis_names(both).items()}
    assert ours.keys() == expected.keys() and len(ours) == len(both.state_dict())
    assert all(expected[k][:len(shape)] == shape and set(expected[k][len(shape):]) <= {1} for k, shape in ours.items())
    assert all(ldm.IGNORED.fullmatch(k) for k in keys["schedule (both)"])
    label = both.unet.label
    assert param_count(both.unet) - (param_count(label) if label else 0) == count
    assert param_count(both.autoencoder) == 55_322_782 and (not label or param_count(label) == 512_512)

# ---- golden values --------------------------------------------------------------------------------------------
def test_the_unet_is_ldms(loaded, name):
    (net, _), g = loaded[name], GOLDEN[name]
    t = g["t"] / 1000
    if name == "uncond":
        assert_close(net(g["x"], t), g["eps"], rtol=0, atol=1e-4)
        return
    null = torch.full((2,), int(g["null_label"]))
    assert_close(net(g["x"], t, g["class_labels"]), g["eps"], rtol=0, atol=1e-4)
    assert_close(net(g["x"], t, null), g["eps_null"], rtol=0, atol=1e-4)
    assert_close(net(g["x"], t, context=g["context_tokens"]), g["eps_context_tokens"], rtol=0, atol=1e-4)
    assert_close(net.label(g["class_labels"])[:, None], g["context"])

def test_the_autoencoder_is_ldms(loaded, name):
    net, g = ldm.autoencoder_of(loaded[name][1]), GOLDEN[name]
    assert_close(net.encode(g["image"]), g["encoded"], rtol=0, atol=1e-4)
    assert torch.equal(net.nearest(g["z"]), g["z_indices"])
    assert_close(net.decode(g["z"]), g["decoded"], rtol=0, atol=1e-4)
    assert_close(net.decode(g["z_q"]), g["decoded"], rtol=0, atol=1e-4)

def test_decoding_ends_in_float32_also_under_autocast(loaded, name):
    """The last layer has all 256 shades to tell; what is before it may be rounded."""
    net, g = ldm.autoencoder_of(loaded[name][1]), GOLDEN[name]
    with torch.autocast("cpu", torch.bfloat16):
        x = net.decode(g["z"])
    assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())
    assert (x - g["decoded"]).abs().mean() < 0.02 * g["decoded"].std()

def test_the_nearest_code_is_the_first_of_equals():
    net = ldm.Autoencoder(ldm.AutoencoderConfig(channels=32, mult=(1,), blocks=1, codes=3)).requires_grad_(False)
    net.quantize.embedding.weight.copy_(torch.tensor([[5.0, 5, 5], [1, 0, 0], [-1, 0, 0]]))
    assert net.nearest(torch.zeros(1, 3, 2, 2)).tolist() == [[[1, 1], [1, 1]]]

def test_ddim_samples_are_ldms(loaded, name):
    xhat, g = Denoiser.of(*loaded[name]), GOLDEN[name]
    y = g.get("class_labels")
    assert [round(1000 * t) for t in xhat.schedule.times(10)][-2::-1] == g["ddim10_timesteps"].tolist()
    assert_close(ddim_sample(xhat, g["z_T"], 4, y), g["ddim4_z0"], rtol=0, atol=2e-3)
    assert_close(ddim_sample(xhat, g["z_T"], 10, y), g["ddim10_z0"], rtol=0, atol=2e-3)
    if y is not None:
        assert_close(ddim_sample(xhat, g["z_T"], 4, y, w=3.0), g["ddim4_cfg3_z0"], rtol=0, atol=2e-3)

def test_without_averaged_weights_or_if_asked_the_raw_ones_are_used(files, name, tmp_path):
    """The released ImageNet file has no averages."""
    bare = write_file(tmp_path / "bare.ckpt", state_dict_of(name, ema=False))
    g = GOLDEN[name]
    for path, ema in ((bare, True), (files[name], False)):
        net, _ = ldm.load_any_model(path, ema=ema, name=name)
        y = () if name == "uncond" else (g["class_labels"],)
        assert_close(net(g["x"], g["t"] / 1000, *y), g["eps_raw"], rtol=0, atol=1e-4)

# ---- files ----------------------------------------------------------------------------------------------------
def test_a_file_that_torch_refuses_loads_with_stand_ins_for_its_classes(files):
    with pytest.raises(pickle.UnpicklingError, match="ModelCheckpoint"):
        torch.load(files["uncond"], map_location="cpu", weights_only=True)
    state = ldm.read_file(files["uncond"])
    (callback,) = state["callbacks"]
    assert isinstance(callback, ldm.StubClass) and state["epoch"] == 3
    assert all(value.device.type == "cpu" for value in state["state_dict"].values())
    assert "pytorch_lightning" not in sys.modules

class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced

class Unknown:
    """Pickles as an instance of a class; its state would be restored by code, if there were any."""

    def __setstate__(self, state):
        raise AssertionError("code of the file's class was run")

@pytest.mark.parametrize("payload", [
    lambda path: Calls(os.system, f"touch {path}"),
    lambda path: Calls(eval, f"open({str(path)!r}, 'w')"),
    lambda path: Calls(Path(path).touch),
    lambda path: Calls(__import__, "os"),
])
def test_a_file_that_tries_to_run_code_is_refused_and_runs_nothing(payload, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"state_dict": {}, "x": payload(canary)}, tmp_path / "evil.ckpt")
    for load in (lambda p: ldm.load_any_model(p, name="uncond"), lambda p: ldm.load_any_model(p)):
        with pytest.raises(CheckpointError, match="is refused.*nothing of it was run") as e:
            load(tmp_path / "evil.ckpt")
        assert "\n" not in str(e.value) and not canary.exists()

def test_instances_of_unknown_classes_are_empty(tmp_path):
    thing = Unknown()
    thing.kept = 3
    torch.save({"state_dict": {}, "x": thing}, tmp_path / "odd.ckpt")
    found = ldm.read_file(tmp_path / "odd.ckpt")["x"]
    assert isinstance(type(found), ldm.StubClass) and not hasattr(found, "kept")

@pytest.mark.parametrize("change,message", [
    (lambda s: s.pop("model_ema.diffusion_modelout2weight"), "there is no model_ema.diffusion_modelout2weight$"),
    (lambda s: s.pop("first_stage_model.quantize.embedding.weight"), "there is no .*quantize.embedding.weight"),
    (lambda s: s.update({"model.diffusion_model.surplus": torch.ones(1)}), "nothing is known of its model.diff"),
    (lambda s: s.update({"scale_factor": torch.ones(1)}), "nothing is known of its scale_factor"),
    (lambda s: s.update({"first_stage_model.quant_conv.bias": torch.ones(4)}), r"quant_conv.bias .*\[4\], not \[3\]"),
    (lambda s: s.update({"alphas_cumprod": torch.linspace(1, 0, 1000)}), "another noise schedule"),
])
def test_what_does_not_fit_is_named(change, message, tmp_path):
    tensors = state_dict_of("uncond")
    change(tensors)
    with pytest.raises(CheckpointError, match=f"^error: .*x.ckpt is not LDM's uncond: .*{message}"):
        ldm.load_any_model(write_file(tmp_path / "x.ckpt", tensors), name="uncond")

def test_known_harmless_extras_are_ignored(tmp_path):
    extras = {k: torch.ones(2) for k in ("ddim_sigmas", "lvlb_weights", "first_stage_model.loss.discriminator.w")}
    ldm.load_any_model(write_file(tmp_path / "x.ckpt", state_dict_of("uncond") | extras), name="uncond")

def test_what_is_no_model_file_is_a_one_line_error(files, tmp_path):
    whole = files["uncond"].read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "folder").mkdir()
    for path, message in (("cut.ckpt", "no readable"), ("text.ckpt", "no readable"),
                          ("folder", "no folder in diffusers"), ("missing.ckpt", "no file or folder")):
        with pytest.raises(CheckpointError, match=f"^error: .*{message}") as e:
            ldm.load_any_model(tmp_path / path, name="uncond")
        assert "\n" not in str(e.value)
    with pytest.raises(CheckpointError, match="say which model it is, with --ldm"):
        ldm.load_any_model(files["uncond"])
    with pytest.raises(CheckpointError, match="is not LDM's class: "):
        ldm.load_any_model(files["uncond"], name="class")

def test_unconditional_models_draw_other_sizes(files):
    state = ldm.load_any_model(files["uncond"], name="uncond", size=32)[1]
    assert state["shape"] == [3, 8, 8] and ldm.image_size(state) == 32
    with pytest.raises(CheckpointError, match="multiple of 32"):
        ldm.load_any_model(files["uncond"], name="uncond", size=48)
    with pytest.raises(CheckpointError, match="it must be 64 and nothing else"):
        ldm.load_any_model(files["class"], name="class", size=32)

def test_an_export_of_another_size_keeps_it(files, tmp_path):
    export.export(*ldm.load_any_model(files["uncond"], name="uncond", size=32), tmp_path / "x")
    assert ldm.load_any_model(tmp_path / "x", name="uncond")[1]["shape"] == [3, 8, 8]
    assert ldm.load_any_model(tmp_path / "x", name="uncond", size=64)[1]["shape"] == [3, 16, 16]
    (tmp_path / "x" / "unet" / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="unet/config.json is no readable JSON"):
        ldm.load_any_model(tmp_path / "x", name="uncond")

# ---- diffusers' layout ------------------------------------------------------------------------------------------
def exported(loaded, name, folder):
    export.export(*loaded[name], folder)
    return folder

def test_heads_are_split_and_merged():
    qkv = torch.arange(12)[:, None].float()                   # two heads of two channels: q q k k v v, twice
    parts = ldm.split_heads(qkv, 2)
    assert [p.flatten().tolist() for p in parts] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert torch.equal(ldm.merge_heads(parts, 2), qkv)

def test_what_was_exported_loads_again_bit_for_bit(loaded, name, tmp_path):
    net, state = loaded[name]
    again, other = ldm.load_any_model(exported(loaded, name, tmp_path / "x"), name=name)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v, other["autoencoder"][k]) for k, v in state["autoencoder"].items())
    assert other.keys() == state.keys()
    assert all(other[k] == v for k, v in state.items() if k not in ("autoencoder", "files"))
    with pytest.raises(CheckpointError, match="choose another --export"):
        export.export(net, state, tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]

def test_an_export_that_fails_leaves_nothing(loaded, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(ldm.safetensors().torch, "save_file", full)
    with pytest.raises(CheckpointError, match="can't write .*No space left on device"):
        export.export(*loaded["uncond"], tmp_path / "x")
    assert not any(tmp_path.iterdir())

def test_group_norms_have_ldms_epsilons(loaded):
    """1e-5 in the UNet, 1e-6 in the autoencoder: activations of the golden files are too large to tell."""
    net, state = loaded["uncond"]
    for module, eps in ((net, 1e-5), (ldm.autoencoder_of(state), 1e-6)):
        assert {m.eps for m in module.modules() if isinstance(m, torch.nn.GroupNorm)} == {eps}

def test_old_names_and_bin_files_load_too(loaded, tmp_path):
    """The attention's layers as older versions of diffusers named them."""
    folder = exported(loaded, "uncond", tmp_path / "x")
    for part in ("unet", "vqvae"):
        file, tensors = next((folder / part).glob("*.safetensors")), {}
        for key, value in ldm.safetensors().torch.load_file(file).items():
            for new, old in {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.",
                             ".to_out.0.": ".proj_attn."}.items():
                key = key.replace(new, old)
            tensors[key] = value
        torch.save(tensors, file.with_suffix(".bin"))
        file.rename(file.with_suffix(".away"))
    again, _ = ldm.load_any_model(folder, name="uncond")
    for file in folder.glob("*/*.away"):                      # where both are there, safetensors is the one to read
        file.with_suffix(".bin").write_bytes(b"damaged")
        file.rename(file.with_suffix(".safetensors"))
    ldm.load_any_model(folder, name="uncond")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in loaded["uncond"][0].state_dict().items())

def test_a_folder_of_another_model_is_refused(loaded, tmp_path):
    folder = exported(loaded, "uncond", tmp_path / "x")
    with pytest.raises(CheckpointError, match="_class_name in .* is UNet2DModel, not UNet2DConditionModel"):
        ldm.load_any_model(folder, name="class")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"attention_head_dim": 8}))
    with pytest.raises(CheckpointError, match="attention_head_dim in .* is 8, not 32"):
        ldm.load_any_model(folder, name="uncond")

def test_a_folder_may_have_any_scheduler(loaded, tmp_path):
    """Its networks are the model: other pipelines bring schedulers of their own."""
    folder = exported(loaded, "uncond", tmp_path / "x")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "PNDMScheduler"}')
    assert ldm.load_any_model(folder, name="uncond")[1]["schedule"] == "ldm"

def test_diffusers_loads_an_export_and_gives_the_same(loaded, name, tmp_path):
    """Its networks, and with its scheduler the samples and images of LDM itself."""
    folder, g = exported(loaded, name, tmp_path / "x"), GOLDEN[name]
    kind = diffusers.UNet2DModel if name == "uncond" else diffusers.UNet2DConditionModel
    unet, vqvae = kind.from_pretrained(folder / "unet"), diffusers.VQModel.from_pretrained(folder / "vqvae")
    steps = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    context = ()
    if name == "class":
        rows = ldm.safetensors().torch.load_file(folder / "class_embedder" / "diffusion_pytorch_model.safetensors")
        context = (rows["embedding.weight"][g["class_labels"]][:, None],)
    with torch.no_grad():
        assert_close(unet(g["x"], g["t"], *context).sample, g["eps"], rtol=0, atol=1e-4)
        assert_close(vqvae.decode(g["z"]).sample, g["decoded"], rtol=0, atol=1e-4)
        assert_close(vqvae.encode(g["image"]).latents, g["encoded"], rtol=0, atol=1e-4)
        steps.set_timesteps(4)
        z = g["z_T"]
        for t in steps.timesteps:
            z = steps.step(unet(z, t, *context).sample, t, z).prev_sample
        assert_close(z, g["ddim4_z0"], rtol=0, atol=2e-3)
    if name == "uncond":                                      # the pipeline draws its noise from the generator
        pipeline, rng = diffusers.DiffusionPipeline.from_pretrained(folder), torch.Generator()
        images = pipeline(2, rng.manual_seed(0), num_inference_steps=4, output_type="np").images
        z = torch.randn(2, 3, 16, 16, generator=rng.manual_seed(0))
        net, state = loaded[name]
        ours = ldm.autoencoder_of(state).decode(ddim_sample(Denoiser.of(net, state), z, 4)) / 2 + 0.5
        assert np.abs(ours.clamp(0, 1).permute(0, 2, 3, 1).numpy() - images).mean() < 1e-3

# ---- in training --------------------------------------------------------------------------------------------------
def test_the_class_embedding_stays_fixed_in_training(loaded):
    net = UNet(TINY["class"].unet).requires_grad_(True)
    assert [k for k, p in net.named_parameters() if not p.requires_grad] == ["label.weight"]

def gradients(net, z, *inputs):
    """All gradients, and the bytes that the forward pass kept for them beside the weights."""
    kept, weights = {}, {p.data_ptr() for p in net.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = net(z, *inputs)
    return torch.autograd.grad(out.square().sum(), [p for p in net.parameters() if p.requires_grad]), sum(kept.values())

def test_checkpointing_gives_the_same_gradients_from_less_memory(loaded):
    net, g = UNet(TINY["class"].unet), GOLDEN["class"]
    net.load_state_dict(loaded["class"][0].state_dict())
    plain, bytes_plain = gradients(net.requires_grad_(True), g["x"], g["t"] / 1000, g["class_labels"])
    net.checkpointing = True
    thrifty, bytes_thrifty = gradients(net, g["x"], g["t"] / 1000, g["class_labels"])
    assert_close(thrifty, plain, rtol=0, atol=0)
    assert bytes_thrifty < bytes_plain / 4

# ---- from the command line --------------------------------------------------------------------------------------
# The smallest models: these runs are about what goes where.
SMALL_VQ = ldm.AutoencoderConfig(channels=32, mult=(1, 2), blocks=1, codes=16)
SMALL = {
    "small": ldm.Model(UNetConfig(channels=32, mult=(1, 1), blocks=1, attention=(2,)), SMALL_VQ, 16),
    "small-class": ldm.Model(UNetConfig(channels=32, mult=(1, 1), blocks=1, attention=(2,), head_channels=0, classes=3,
                                        context_dim=8), SMALL_VQ, 16),
}
CPU = ["--device", "cpu", "--dtype", "fp32"]

@pytest.fixture
def small(tmp_path, monkeypatch):
    """Files of the small models, and a labelled data set of three classes."""
    for name, model in SMALL.items():
        monkeypatch.setitem(ldm.MODELS, name, model)
        write_file(tmp_path / f"{name}.ckpt", state_dict_of(name))
    monkeypatch.setattr(hooks, "SHOWN", (2, 4))
    monkeypatch.setattr(hooks, "WATCHED", (2, 4))
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "data" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path

def distil(folder, name, *flags, out="out"):
    distill.main(["--ldm", name, "--ckpt", str(folder / f"{name}.ckpt"), "--out", str(folder / out), "--steps", "8",
                  "--batch", "4", "--log-every", "1", "--no-guard", "--for-steps", "2", "4",
                  "--cache", str(folder / "cache"), *CPU, *flags])
    return folder / out / "ckpt.pt"

def test_an_ldm_is_sampled_into_a_grid_and_files(small):
    flags = ["--ldm", "small-class", "--ckpt", str(small / "small-class.ckpt"), *CPU]
    script.main([*flags, "--steps", "1", "2", "-n", "3", "--class", "2", "0", "--guidance", "2"])
    assert Image.open(small / "grid-2-0-w2.png").height == 20 + 2 * 68 - 4      # the classes stand above
    script.main([*flags, "--steps", "2", "-n", "5", "--batch", "3", "--save", str(small / "x.npz")])
    saved = np.load(small / "x.npz")
    assert saved["arr_0"].shape == (5, 16, 16, 3) and saved["arr_1"].tolist() == [0, 1, 2, 0, 1]
    net, state = ldm.load_any_model(small / "small-class.ckpt", name="small-class")
    sampler = script.Sampler(net, state, torch.device("cpu"), "fp32", [0, 1, 2])
    images = ldm.autoencoder_of(state).decode(sampler.draw(range(5), 2))
    assert np.abs(data.to_pixels(images).astype(int) - saved["arr_0"]).max() <= 1

def test_an_unconditional_ldm_draws_images_of_another_size(small):
    flags = ["--ldm", "small", "--ckpt", str(small / "small.ckpt"), *CPU, "--steps", "2", "-n", "1"]
    script.main([*flags, "--size", "24", "--save", str(small / "png")])
    assert Image.open(small / "png" / "00000.png").size == (24, 24)
    with pytest.raises(SystemExit, match="made with another size"):
        script.main([*flags, "--save", str(small / "png")])

@pytest.mark.parametrize("schedule,data", [("dsdi", False), ("tsd", False), ("pd", True), ("shortcut", False),
                                           ("shortcut", True)])
def test_an_ldm_is_distilled_and_the_result_needs_nothing_else(small, schedule, data, capsys):
    """The checkpoint samples, is scored and exported without the file it came from; its autoencoder is that file's."""
    more = ["--data", str(small / "data")] if data else ["--pool", "9"] if schedule == "shortcut" else []
    ckpt = distil(small, "small-class", "--schedule", schedule, "--updates", "6", "--lr", "1e-4", *more)
    source = ldm.load_any_model(small / "small-class.ckpt", name="small-class")[1]
    (small / "small-class.ckpt").unlink()
    net, state = ldm.load_any_model(ckpt)
    assert state["ldm"] == "small-class" and state["shape"] == [3, 8, 8] and state["step"] == 6
    assert net.config.step_length == (schedule == "shortcut")
    if schedule == "shortcut":
        assert net.length_out.weight.any() and state["guidance"] == 2
    assert all(torch.equal(v, state["autoencoder"][k]) for k, v in source["autoencoder"].items())
    fixed = drawn("cond_stage_model.embedding.weight", [4, 8])
    assert torch.equal(state["weights"]["label.weight"], fixed) and torch.equal(state["ema"]["label.weight"], fixed)
    assert [h["how"] for h in state["history"]] == ["LDM's small-class", schedule]
    script.main(["--ckpt", str(ckpt), "--steps", "2", "-n", "2", "--out", str(small / "g.png"), *CPU])
    assert f"(the model: LDM's small-class; then {schedule}, 6 updates from 8 steps)" in capsys.readouterr().out
    files = {p.name for p in ckpt.parent.iterdir()}
    pools = {name for name in files if name.startswith("pool-")}
    assert len(pools) == (schedule == "shortcut" and not data)
    files -= pools
    assert files == {"best.pt", "ckpt.pt", "curves.png", "log.jsonl", "samples-000006.png"}

@pytest.mark.parametrize("name", ["small", "small-class"])
def test_an_ldm_takes_the_path_of_step_lengths_on_unchanged(small, name):
    net, _ = ldm.load_any_model(small / f"{name}.ckpt", name=name)
    z, t, y = torch.randn(3, 3, 8, 8), torch.rand(3), torch.arange(3) if net.config.classes else None
    with torch.no_grad():
        before = net(z, t, y)
        net.add_step_length()
        assert before.any() and torch.equal(net(z, t, y, d=torch.tensor([0.0, 0.5, 1.0])), before)

def test_a_distilled_ldm_is_scored_and_exported(small):
    ckpt = distil(small, "small", "--updates", "3", "--fid-every", "3", "--fid-samples", "4", "--weights", "random",
                  "--data", str(small / "data"))
    scores = ["--weights", "random", "--data", str(small / "data"), "--cache", str(small / "cache"), "-n", "4", *CPU]
    fid.main(["--ckpt", str(ckpt), "--steps", "2", *scores, "--out", str(small / "fid")])
    (card,) = json.loads((small / "fid" / "table.json").read_text())["out"]
    assert card["real"]["prepared"] == "crop square, PIL bicubic to 16x16"
    logged = log_of(small / "out")
    (same,) = [e for e in logged if e.get("fake", {}).get("steps") == 2]
    assert same["rFID (random features)"] == pytest.approx(card["scores"]["rFID (random features)"], rel=1e-6)
    script.main(["--ckpt", str(ckpt), "--export", str(small / "hf"), *CPU])
    net, state = ldm.load_any_model(small / "hf", name="small")
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in load_checkpoint(ckpt)["ema"].items())
    assert state["schedule"] == load_checkpoint(ckpt)["schedule"] == "ldm-distilled"
    config = small / "hf" / "scheduler" / "scheduler_config.json"
    told = json.loads(config.read_text())
    for other, schedule in ((dict(timestep_spacing="leading", note="not trailing"), "ldm"), ({}, "ldm-distilled")):
        config.write_text(json.dumps(told | other))
        assert ldm.load_any_model(small / "hf", name="small")[1]["schedule"] == schedule

def test_a_distilled_ldm_is_sampled_at_the_times_that_it_learned(small):
    """Here, and within one of the thousand steps in diffusers; before it, at LDM's own."""
    ckpt = distil(small, "small", "--updates", "3")
    before, after = ldm.load_any_model(small / "small.ckpt", name="small"), ldm.load_any_model(ckpt)
    at = lambda loaded, n: [1000 * t for t in Denoiser.of(*loaded).schedule.times(n)]  # noqa: E731
    assert at(before, 2) == [501, 1, 0] and at(after, 2) == [1000, 500, 0] and at(after, 4)[1:3] == [750, 500]
    script.main(["--ckpt", str(ckpt), "--export", str(small / "hf"), *CPU])
    steps = diffusers.DDIMScheduler.from_pretrained(small / "hf" / "scheduler")
    for n in (2, 4, 8):
        steps.set_timesteps(n)
        off = [ours - theirs for ours, theirs in zip(at(after, n), steps.timesteps.tolist(), strict=False)]
        assert len(off) == n and all(0 <= o <= 1 for o in off)

def test_a_stopped_distillation_goes_on_bit_for_bit(small, monkeypatch):
    """Also with activations computed twice."""
    flags = ["--updates", "8", "--save-every", "3", "--schedule", "dsdi"]
    whole = load_checkpoint(distil(small, "small-class", *flags))
    real, calls = distill.distillation_loss, []

    def stops(*args, **kw):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("power cut")
        return real(*args, **kw)

    monkeypatch.setattr(distill, "distillation_loss", stops)
    with pytest.raises(RuntimeError):
        distil(small, "small-class", *flags, "--checkpointing", out="cut")
    assert load_checkpoint(small / "cut" / "ckpt.pt")["step"] == 3
    distill.main(["--resume", "--out", str(small / "cut")])
    resumed = load_checkpoint(small / "cut" / "ckpt.pt")
    for part in ("weights", "ema", "autoencoder"):
        assert all(torch.equal(v, resumed[part][k]) for k, v in whole[part].items())

def test_the_defaults_are_table_3s():
    get = lambda *flags: vars(distill.parse_args(["--ckpt", "model.ckpt", *flags]))  # noqa: E731
    want = dict(updates=4000, lr=1e-6, lr_share=0.1, betas=[0.9, 0.98], ema=0.995, clip=1.0, steps=64)
    for name in ("celebahq256", "bedroom256"):
        assert want.items() <= get("--ldm", name).items()
    want |= dict(updates=5000, lr=1e-7, betas=[0.99, 0.999], ema=0.9995, guidance=[1.0, 3.0])
    assert want.items() <= get("--ldm", "imagenet256", "--schedule", "dsdn").items()
    assert get("--ldm", "imagenet256", "--updates", "7")["updates"] == 7

def test_what_cant_work_with_an_ldm_is_refused(small):
    with pytest.raises(SystemExit, match="does not say on what it was trained: .* --data"):
        distil(small, "small", "--schedule", "pd", "--updates", "6")
    with pytest.raises(SystemExit, match="has 3 classes, but .* has 2"):
        for f in (small / "data" / "c").iterdir():
            f.unlink()
        distil(small, "small-class", "--schedule", "pd", "--updates", "6", "--data", str(small / "data"))
    ckpt = distil(small, "small", "--updates", "3")
    with pytest.raises(SystemExit, match="is LDM's small: give --ldm small"):
        distill.main(["--ckpt", str(ckpt), "--out", str(small / "x"), *CPU])
    with pytest.raises(SystemExit, match="is LDM's small, not small-class"):
        script.main(["--ckpt", str(ckpt), "--ldm", "small-class"])
    with pytest.raises(SystemExit, match="draws images of 16 pixels, not 32"):
        script.main(["--ckpt", str(ckpt), "--size", "32"])
    with pytest.raises(SystemExit, match="have to be given, as --data"):
        fid.main(["--ckpt", str(ckpt), "--weights", "random", *CPU])

def test_what_an_update_costs_is_measured(small):
    args = bench.parse_args(["--model", "small-class", "--size", "8", "--batch", "2", "--repeats", "1",
                             "--checkpointing", "--methods", "dsdi", "pd", *CPU])
    args.device = torch.device("cpu")
    times = bench.race({name: bench.distillation(args, name)[0] for name in args.methods}, 1, args.device, "")
    assert all(0 < times[name][0] < 60 for name in ("dsdi", "pd")) and bench.peak(args, "dsdi") > 1e6

# ---- data as latents ------------------------------------------------------------------------------------------------
@pytest.fixture
def images(small):
    return data.load_data(small / "data", 16, None, small / "cache")

def test_latents_are_those_of_the_images_and_of_their_mirror_images(small, images):
    state = ldm.load_any_model(small / "small.ckpt", name="small")[1]
    latents, net = ldm.Latents(images, state, torch.device("cpu"), "fp32"), ldm.autoencoder_of(state)
    (x, y), (z, labels) = images.batch(3, 8, seed=1), latents.batch(3, 8, seed=1)
    assert_close(z, net.encode(x), rtol=1e-3, atol=1e-3)
    assert torch.equal(labels, y) and z.dtype == torch.float32
    z, x = (source.batch(0, 8, 1, flip=False)[0] for source in (latents, images))
    assert_close(z, net.encode(x), rtol=1e-3, atol=1e-3)

def test_interrupted_encoding_goes_on(small, images, monkeypatch):
    state, cpu = ldm.load_any_model(small / "small.ckpt", name="small")[1], torch.device("cpu")
    whole = ldm.Latents(images, state, cpu, "fp32")
    (file,) = images.folder.glob("latents-*")
    kept = file.read_bytes()
    file.with_suffix(".part").write_bytes(kept[:len(kept) // 2 + 100])
    file.unlink()
    encoded, real = [], ldm.Autoencoder.encode
    monkeypatch.setattr(ldm.Autoencoder, "encode", lambda self, x: encoded.append(len(x)) or real(self, x))
    again = ldm.Latents(images, state, cpu, "fp32")
    assert sum(encoded) == 2 * 6 and [p.name for p in images.folder.glob("latents-*")] == [file.name]
    assert_close(torch.tensor(again.latents), torch.tensor(whole.latents), rtol=1e-3, atol=1e-3)
    ldm.Latents(images, state, cpu, "fp32")
    assert sum(encoded) == 2 * 6
