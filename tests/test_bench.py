"""The measurements of bench.py: that they measure what they say."""

import json
import re
from functools import partial

import bench
import pytest
import torch
from PIL import Image

from model import UNet, param_count

TINY = ["--model", "toy", "--size", "8", "--batch", "2", "--repeats", "1", "--dtype", "fp32", "--steps", "1", "3"]

def settings(*flags):
    args = bench.parse_args([*TINY, *flags])
    args.device = torch.device("cpu")
    return args

def test_every_group_leaves_its_rows(tmp_path, capsys, monkeypatch):
    """Medians, rates and ratios that fit together, in Markdown and in JSON."""
    monkeypatch.setattr(bench, "matmul_peak", partial(bench.matmul_peak, n=1024, repeats=2))
    for name in ("one.jpg", "two.jpg"):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), "red").save(tmp_path / "data" / name)
    bench.main([*TINY, "--methods", "dsdi", "tsd", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"),
                "--cache", str(tmp_path / "cache")])
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    groups = {name: {row["what"]: row for row in g["rows"]} for name, g in found["groups"].items()}
    assert groups.keys() == bench.GROUPS.keys()
    assert groups["train"].keys() == {"plain", "--distill 0.15", "--distill 0.25 --shortcut", "diffusers",
                                      "diffusers, channels last"}
    assert groups["distill"].keys() == {"dsdi", "tsd"}
    assert groups["sample"].keys() == {"1 steps", "3 steps"} and "fid.py" in groups["fid"]
    for row in groups["train"].values():
        assert row["images/s"] == pytest.approx(2 / row["s"]) and 0 < row["MFU"] < 1 and len(row["seconds"]) == 1
    assert groups["distill"]["tsd"]["time of TSD's"] == 1 and groups["distill"]["tsd"]["MiB less than TSD"] == 0
    text = (tmp_path / "out" / "bench.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert re.search(r"^\| dsdi \|.*\| 2 \| – \|", text, flags=re.M) and "threads of" in text

@pytest.mark.parametrize("name", bench.METHODS)
def test_evaluations_and_copies_are_those_of_the_table(name):
    update, trainer = bench.distillation(settings(), name)
    _, evaluations, further = bench.METHODS[name]
    update()                                                  # the first one makes the further copies
    nets, rows = [trainer.net, trainer.ema, *trainer.extra_state.values()], []
    for net in nets:
        net.register_forward_hook(lambda net, inputs, output: rows.append(len(output)))
    update()
    assert sum(rows) == evaluations * trainer.args.batch
    assert len(nets) - 2 == (0 if further == "–" else len(further.split(", "))) and trainer.step == 2

def test_contestants_take_turns_and_warm_up():
    order = []
    times = bench.race({k: lambda k=k: order.append(k) for k in "ab"}, 3, torch.device("cpu"), "")
    assert "".join(order) == "aaabbb" + "ab" * 3              # twice to warm up, once unrecorded, then in turn
    assert [len(t) for t in times.values()] == [3, 3]

def test_the_count_of_operations_is_that_of_the_formula():
    """A 3x3 convolution: 2 · 9 · Cin · Cout · H · W · B; backward the same for its weights, and again for its input."""
    conv, x = torch.nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8, requires_grad=True)
    assert bench.flops(lambda: conv(x).sum().backward()) == 3 * 2 * 9 * 4 * 6 * 8 * 8 * 2

@pytest.mark.parametrize("model", ["toy", "small32", "unet64"])
def test_the_unet_of_diffusers_has_our_size(model):
    config, _ = bench.model_of(bench.parse_args(["--model", model]))
    with torch.device("meta"):
        assert param_count(bench.DiffusersUNet(config, 32)) == param_count(UNet(config))

@pytest.mark.parametrize("what,flags,message", [
    ([], ["--size", "9"], "--size 9"), ([], ["--batch", "0"], "--batch"), ([], ["--repeats", "0"], "--repeats"),
    (["speed"], [], "speed: not among train"), (["train"], ["--model", "celebahq256"], "does not train celebahq256")])
def test_what_can_not_be_measured_is_refused(what, flags, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse_args([*what, *TINY, *flags])
    assert message in capsys.readouterr().err
