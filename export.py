"""Models in the layout of diffusers: `python sample.py --ckpt out/train/ckpt.pt --export out/hf`.

Weights and configs go into unet/, scheduler/ and, for LDM's, vqvae/. diffusers then builds the same network and takes
the same steps: for LDM's models where N divides 1000 (but not 1), for our own where N divides T = 1600. For a distilled
LDM, where N divides 1000, diffusers' timesteps differ from ours by at most 1 of 1000.

    pipe = diffusers.DDIMPipeline.from_pretrained("out/hf")
    image = pipe(num_inference_steps=4).images[0]
"""

import json
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from checkpoint import CheckpointError
from ldm import (
    DISTILLED_SPACING,
    WEIGHTS_FILE,
    autoencoder_of,
    config_name,
    diffusers_names,
    heads_of,
    ldm_configs,
    safetensors,
    split_heads,
    unet_config,
)
from model import time_embedding

T = 1600                  # timesteps of a scheduler that takes our steps: 1, 2, 4 … 64 divide it, and 10, 20, 50, 100

def cosine_betas():
    """β_k = 1 − ᾱ_k / ᾱ_(k−1) with ᾱ_k = cos²(π (k + 1) / 2T): timestep k is our t = (k + 1) / T. The last is 1."""
    alpha2 = (torch.arange(T + 1, dtype=torch.float64) * (torch.pi / (2 * T))).cos() ** 2
    betas = 1 - alpha2[1:] / alpha2[:-1]
    betas[-1] = 1
    return betas.tolist()

def own_configs(net, size):
    """{sub-folder: config} for a model of train.py. Its time embedding becomes a table, a row for each timestep."""
    c = net.config
    unet = unet_config(c, size) | dict(time_embedding_type="learned", num_train_timesteps=T)
    unet |= dict(num_class_embeds=c.classes + 1) if c.classes else {}          # the last is the null class
    steps = dict(_class_name="DDIMScheduler", num_train_timesteps=T, trained_betas=cosine_betas(), clip_sample=False,
                 set_alpha_to_one=True, timestep_spacing="trailing", prediction_type="v_prediction")
    return dict(unet=unet, scheduler=steps)

def own_extra(net):
    """{name: tensor} of what diffusers keeps as tables: the sinusoids of each timestep, and the classes."""
    t = (torch.arange(T) + 1) / T
    extra = {"time_proj.weight": time_embedding(t, net.config.channels)}
    return extra | ({"class_embedding.weight": net.label.weight} if net.config.classes else {})

def parts_of(net, state):
    """({sub-folder: {name: tensor}}, {sub-folder: config}) of a model, in diffusers' names."""
    own = "ldm" not in state
    bundle = nn.ModuleDict(dict(unet=net) if own else dict(unet=net, autoencoder=autoencoder_of(state)))
    weights, parts = bundle.state_dict(), {}
    for key, theirs in diffusers_names(bundle).items():
        values = split_heads(weights[key], heads_of(bundle, key)) if len(theirs) > 1 else [weights[key]]
        for name, value in zip(theirs, values, strict=True):
            part, _, name = name.partition(".")
            parts.setdefault(part, {})[name] = value
    if not own:
        configs = ldm_configs(net.config, bundle.autoencoder.config, state["shape"][1])
        if state["schedule"] == "ldm-distilled":
            configs["scheduler"]["timestep_spacing"] = DISTILLED_SPACING
        return parts, configs
    parts.pop("class_embedder", None)
    parts["unet"] |= own_extra(net)
    return parts, own_configs(net, state["shape"][1])

def export(net, state, folder):
    """Write a model in diffusers' layout. The folder is there as a whole or not at all.

    Raises CheckpointError for a model that is told the length of its steps, and if the folder is in use."""
    if net.config.step_length:
        raise CheckpointError("error: this model is told the length of its steps: diffusers' networks have no such "
                              "input")
    folder, save_file = Path(folder).absolute(), safetensors().torch.save_file
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"error: {folder} exists; choose another --export")
    parts, configs = parts_of(net, state)
    files = {config_name(part): config for part, config in configs.items()}
    if not net.config.classes:                                # no pipeline passes classes on: see docs/ldm.md
        pipeline = dict(_class_name="LDMPipeline" if "ldm" in state else "DDIMPipeline")
        pipeline |= {part: ["diffusers", config["_class_name"]] for part, config in configs.items()}
        files["model_index.json"] = pipeline
    tmp = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")         # of this process alone
    try:
        for part in {**configs, **parts}:
            (tmp / part).mkdir(parents=True)
        for file, content in files.items():
            (tmp / file).write_text(json.dumps(content, indent=2))
        for part, tensors in parts.items():
            tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
            save_file(tensors, tmp / part / f"{WEIGHTS_FILE}.safetensors", {"format": "pt"})
        if folder.exists():
            folder.rmdir()
        os.replace(tmp, folder)
    except Exception as e:  # safetensors has an error type of its own
        raise CheckpointError(f"error: can't write {folder} ({getattr(e, 'strerror', None) or e})") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
