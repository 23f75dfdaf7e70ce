"""What several test files need: tiny networks, labelled images, the log of a run, a script in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"     # pytest has a process for each core; read when torch is first imported

import numpy as np
import pytest
import torch
from PIL import Image

import inception

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
TINY = dict(channels=8, mult=(1, 2), blocks=1, attention=(), groups=4, head_channels=8)      # of a UNetConfig

SMALL_RUN = ["--size", "8", "--channels", "16", "--mult", "1", "2", "--attention", "--batch", "8", "--sample-steps",
             "2", "--device", "cpu", "--log-every", "1", "--sample-every", "0", "--save-every", "5"]     # of train.py

@pytest.fixture
def small_run(tmp_path):
    """The flags of a training run of a second, on ten labelled images, into tmp_path / "out"."""
    return [*SMALL_RUN, "--data", labelled_images(tmp_path / "data"), "--cache", str(tmp_path / "cache"),
            "--out", str(tmp_path / "out")]

class Tiny(torch.nn.Module):
    """A stand-in for Inception with 6 features: means of colours, and of their squares."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(6, 6, bias=False)
        self.fc.weight.data = 3 * torch.eye(6)

    def forward(self, x):
        f = torch.cat([x.mean((2, 3)), x.square().mean((2, 3))], 1)
        return f, self.fc(f)

@pytest.fixture(autouse=True)
def short(request, monkeypatch):
    """Runs look at samples of 8 steps at most, their curves.png is empty, and `--weights random` is of six features.

    Except in a test that is marked `whole`, and in other processes."""
    if request.node.get_closest_marker("whole"):
        return
    features, real = inception.Features(Tiny(), inception.RANDOM, torch.device("cpu")), inception.load_features
    for module in ("fid", "hooks"):
        monkeypatch.setattr(f"{module}.load_features", lambda weights=None, *more: (
            features if weights == inception.RANDOM else real(weights, *more)))
    monkeypatch.setattr("hooks.SHOWN", (1, 2, 4, 8))
    for script in ("distill", "train"):
        monkeypatch.setattr(f"{script}.draw_curves", lambda trainer: (trainer.out / "curves.png").touch())

def log_of(out):
    """The entries of a run's log."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "hooks" not in line]

def same(a, b):
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)

def labelled_images(folder, n=10, classes="ab", size=(8, 8)):
    """Random images in a sub-folder for each class. Returns the folder, as a flag wants it."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = Path(folder) / classes[i % len(classes)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return str(folder)

def start(script, *args, **kw):
    """A script of the project in a process of its own: Popen, its output and errors in one stream.

    Ctrl-C reaches it also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)      # a child inherits what is ignored
    try:
        return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, args)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kw)
    finally:
        signal.signal(signal.SIGINT, before)
