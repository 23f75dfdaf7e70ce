"""The UNet."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from model import CONFIGS, SelfAttention, UNet, UNetConfig, Upsample, param_count, time_embedding

SMALL = dict(channels=16, mult=(1, 2), blocks=1, attention=(2,), head_channels=16, groups=8)
TINY = UNetConfig(**SMALL)

def awake(net, seed=0):
    """The network with its zero layers filled, so that every part shows in the output."""
    torch.manual_seed(seed)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()

@pytest.mark.parametrize("name", CONFIGS)
def test_presets_build_and_keep_the_shape(name):
    net = UNet(UNetConfig(**CONFIGS[name]))
    assert net(torch.zeros(2, 3, 16, 24), torch.zeros(2)).shape == (2, 3, 16, 24)
    assert param_count(net) > 1_000_000

@pytest.mark.parametrize("extra", [{}, dict(classes=10), dict(context_dim=24, in_channels=4),
                                   dict(heads=2, head_channels=0)])
def test_every_weight_matters(extra):
    """Each parameter of each kind of UNet gets a gradient: nothing is built and then not used."""
    config = UNetConfig(**SMALL | extra)
    net = awake(UNet(config))
    y = torch.arange(11) if config.classes else None
    context = torch.randn(11, 5, 24) if config.context_dim else None
    net(torch.randn(11, config.in_channels, 8, 8), torch.rand(11), y, context).square().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []

def test_a_new_network_predicts_zero_and_skips_its_residual_branches():
    """With an output layer that is not zero it still does not see the time, which enters in the branches."""
    net, z = UNet(TINY), torch.randn(2, 3, 8, 8)
    assert not net(z, 0.5).any()
    torch.nn.init.normal_(net.out.weight)
    assert net(z, 0.5).any() and torch.equal(net(z, 0.1), net(z, 0.9))

def test_images_of_a_batch_do_not_see_each_other():
    net = awake(UNet(TINY))
    z, t = torch.randn(4, 3, 8, 8), torch.rand(4)
    assert_close(net(z, t)[2:3], net(z[2:3], t[2:3]), rtol=1e-4, atol=1e-5)

def test_the_output_depends_on_time_class_and_far_pixels():
    net = awake(UNet(UNetConfig(**SMALL, classes=3)))
    z, y = torch.randn(1, 3, 16, 16), torch.tensor([0])
    out = net(z, 0.5, y)
    assert not torch.allclose(out, net(z, 0.6, y)) and not torch.allclose(out, net(z, 0.5, y + 1))
    moved = z.clone()
    moved[..., 0, 0] += 5
    assert (net(moved, 0.5, y) - out)[..., -1, -1].abs().max() > 1e-6

def test_attention_is_softmax_of_scaled_products():
    """SelfAttention against the formula in float64; its weights are grouped by head first, as in LDM's files."""
    torch.manual_seed(0)
    layer = SelfAttention(UNetConfig(channels=16, head_channels=8, groups=8), 16).double()
    torch.nn.init.normal_(layer.proj.weight)
    h = torch.randn(2, 16, 3, 5, dtype=torch.double)
    tokens = torch.nn.functional.group_norm(h, 8, layer.norm.weight, layer.norm.bias).flatten(2).mT  # (B, T, C)
    qkv = tokens @ layer.qkv.weight.T + layer.qkv.bias
    heads = []
    for k in range(2):
        q, key, v = qkv[..., 24 * k:24 * (k + 1)].split(8, dim=2)
        heads.append(torch.softmax(q @ key.mT / 8 ** 0.5, dim=2) @ v)
    expected = h + (torch.cat(heads, dim=2) @ layer.proj.weight.T + layer.proj.bias).mT.reshape(h.shape)
    assert_close(layer(h), expected)

def test_upsample_is_a_convolution_of_the_doubled_image():
    torch.manual_seed(0)
    layer, h = Upsample(4).double(), torch.randn(2, 4, 3, 5, dtype=torch.double, requires_grad=True)
    plain = F.conv2d(h.repeat_interleave(2, 2).repeat_interleave(2, 3), layer.weight, layer.bias, padding=1)
    assert_close(layer(h), plain)
    leaves, g = [h, layer.weight, layer.bias], torch.randn_like(plain)
    assert_close(torch.autograd.grad(layer(h), leaves, g), torch.autograd.grad(plain, leaves, g))

def test_time_embedding_is_the_sinusoid_of_1000_t():
    e = time_embedding(torch.tensor([0.0, 0.25], dtype=torch.double), 8)
    freqs = 10000 ** (-torch.arange(4, dtype=torch.double) / 4)
    assert_close(e, torch.stack([torch.cat([(250 * k * freqs).cos(), (250 * k * freqs).sin()]) for k in (0, 1)]))

def test_output_stays_float32_under_autocast_and_close_to_it():
    net, z = awake(UNet(TINY)), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(z, 0.5)
    assert out.dtype == torch.float32
    assert_close(out, net(z, 0.5), rtol=0.1, atol=0.1)

@pytest.mark.parametrize("bad,message", [
    (dict(channels=20, groups=8), "multiple of groups"),
    (dict(blocks=0), "must be at least 1"),
    (dict(channels=48, groups=8, head_channels=32, mult=(1, 1), attention=()), "do not divide into heads"),
])
def test_impossible_configs_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**bad)

def test_wrong_inputs_are_refused_with_a_reason():
    net = UNet(TINY)
    with pytest.raises(ValueError, match="not divisible by 2"):
        net(torch.zeros(1, 3, 7, 8), 0.5)
    with pytest.raises(ValueError, match="no classes"):
        net(torch.zeros(1, 3, 8, 8), 0.5, torch.zeros(1, dtype=torch.long))
