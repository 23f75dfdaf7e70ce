"""Models of train.py in diffusers' layout: its own networks and its own sampler give what ours give."""

import diffusers
import pytest
import torch
from torch.testing import assert_close

from checkpoint import CheckpointError
from ddim import Cosine, Denoiser, ddim_sample
from export import T, cosine_betas, export
from model import CONFIGS, UNet, UNetConfig

# Each preset's network, with attention where it has some, at a width that takes no minutes.
SMALL = {
    "toy": CONFIGS["toy"] | dict(channels=16),
    "small32": CONFIGS["small32"] | dict(channels=32),
    "unet64": CONFIGS["unet64"] | dict(channels=64),
    "one head": CONFIGS["toy"] | dict(channels=16, head_channels=0),
}

def model(name, classes):
    """(net, state) with random weights, also where training starts from zeros."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(**SMALL[name], classes=classes)).eval().requires_grad_(False)
    for p in net.parameters():
        p.copy_(torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    return net, dict(schedule="cosine", predicts="v", shape=[3, 16, 16], classes=[str(i) for i in range(classes)])

def test_the_betas_are_our_schedule():
    alpha2 = torch.cumprod(1 - torch.tensor(cosine_betas(), dtype=torch.float64), 0)
    t = (torch.arange(T, dtype=torch.float64) + 1) / T
    ours, _ = Cosine()(t)
    assert_close(alpha2.sqrt(), ours.flatten(), rtol=0, atol=1e-9)

@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("name", SMALL)
def test_diffusers_takes_the_same_steps(name, classes, tmp_path):
    net, state = model(name, classes)
    export(net, state, tmp_path / "x")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "x" / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "x" / "scheduler")
    start = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([2, 3]) if classes else None             # 3: the null class
    for steps in (1, 4, 5):
        scheduler.set_timesteps(steps)
        z = start
        with torch.no_grad():
            for t in scheduler.timesteps:
                z = scheduler.step(unet(z, t, y).sample, t, z).prev_sample
        ours = ddim_sample(Denoiser.of(net, state), start, steps, y)
        assert ours.std() > 0.1
        assert_close(z, ours, rtol=1e-4, atol=1e-5)

def test_a_pipeline_draws_what_we_draw(tmp_path):
    net, state = model("toy", 0)
    export(net, state, tmp_path / "x")
    pipeline, generator = diffusers.DDIMPipeline.from_pretrained(tmp_path / "x"), torch.Generator()
    images = pipeline(2, generator.manual_seed(0), num_inference_steps=4, output_type="np").images
    z = torch.randn(2, 3, 16, 16, generator=generator.manual_seed(0))
    ours = (ddim_sample(Denoiser.of(net, state), z, 4) / 2 + 0.5).clamp(0, 1)
    assert_close(torch.from_numpy(images).permute(0, 3, 1, 2), ours, rtol=0, atol=1e-4)

def test_a_model_that_is_told_its_steps_is_refused(tmp_path):
    net, state = model("toy", 0)
    with pytest.raises(CheckpointError, match="told the length of its steps: diffusers' networks have no such input"):
        export(net.add_step_length() or net, state, tmp_path / "x")
