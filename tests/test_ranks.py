"""Several processes: the same results as one, whole files when one dies. Two of them, on the CPU, by gloo."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, labelled_images, log_of
from gradients import METHODS, gradients
from torch.testing import assert_close

import distill
import fid
import sample
import train
from checkpoint import load_checkpoint
from data import load_data

TINY = ["--size", "8", "--channels", "8", "--mult", "1", "2", "--blocks", "1", "--attention", "--head-channels", "8",
        "--batch", "4", "--distill", "0.15", "--log-every", "1", "--sample-every", "0", "--device", "cpu",
        "--dtype", "fp32"]

def torchrun(*args, **kw):
    """A script in two processes: Popen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kw)

def done(child):
    """What a child printed, once it has ended well."""
    output = child.communicate(timeout=120)[0]
    assert child.returncode == 0, output
    return output

@pytest.fixture
def tiny(tmp_path):
    """The flags of a small run on labelled images, for one process or two."""
    return [*TINY, "--data", labelled_images(tmp_path / "data"), "--cache", str(tmp_path / "cache"), "--classes"]

@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The gradients that two processes have, by method."""
    path = tmp_path_factory.mktemp("gradients") / "two.pt"
    done(torchrun("tests/gradients.py", path, "cpu"))
    return torch.load(path, weights_only=True)

@pytest.mark.parametrize("method", METHODS)
def test_two_processes_have_the_gradients_of_one(method, of_two):
    """To float64's rounding; so has one that takes the batch in parts."""
    one, two = gradients(method), of_two[method]
    assert one.keys() == two.keys() and all(g.any() for g in one.values())
    assert_close(two, one, rtol=1e-9, atol=1e-12)
    assert_close(gradients(method, accumulate=4), one, rtol=1e-9, atol=1e-12)

def test_a_run_goes_on_with_another_number_of_processes(tiny, tmp_path, capsys):
    """The same images and noise: the log is that of a single process; and it is said that bits may differ."""
    done(torchrun("train.py", *tiny, "--updates", 4, "--out", tmp_path / "out"))
    assert len(load_checkpoint(tmp_path / "out" / "ckpt.pt")["dropout"]) == 2
    train.main(["--resume", "--out", str(tmp_path / "out"), "--updates", "8"])
    assert "on 1 processes what ran on 2" in capsys.readouterr().out
    train.main([*tiny, "--updates", "8", "--out", str(tmp_path / "one")])
    a, b = log_of(tmp_path / "out"), log_of(tmp_path / "one")
    assert [e["step"] for e in a] == list(range(1, 9))
    for x, y in zip(a, b, strict=True):
        assert_close({k: x[k] for k in ("loss", "v", "grad_norm")}, {k: y[k] for k in ("loss", "v", "grad_norm")},
                     rtol=1e-4, atol=0)

@pytest.mark.whole                                            # as those processes do
def test_samples_and_scores_of_two_processes_are_those_of_one(tiny, tmp_path):
    """Samples to the last bit; scores to the rounding of sums, which two processes add up in another order."""
    train.main([*tiny, "--updates", "2", "--out", str(tmp_path / "out")])
    ckpt = ["--ckpt", str(tmp_path / "out" / "ckpt.pt"), "--device", "cpu", "--dtype", "fp32", "--batch", "4"]
    draw = [*ckpt, "--steps", "2", "-n", "30", "--save"]
    score = [*ckpt, "--weights", "random", "--steps", "2", "-n", "14", "--cache", str(tmp_path / "cache"), "--out"]
    done(torchrun("sample.py", *draw, tmp_path / "two.npz"))
    output = done(torchrun("fid.py", *score, tmp_path / "two"))
    assert output.count("rFID (random features)") == 1        # one table, not one from each
    sample.main([*draw, str(tmp_path / "one.npz")])
    for f in [*(tmp_path / "cache").glob("*/statistics-*"), *(tmp_path / "out" / "scores").iterdir()]:
        f.unlink()
    fid.main([*score, str(tmp_path / "one")])
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert all(np.array_equal(one[k], two[k]) for k in ("arr_0", "arr_1"))
    one, two = (json.loads((tmp_path / name / "table.json").read_text())["out"][0] for name in ("one", "two"))
    assert one["scores"] == pytest.approx(two["scores"], rel=1e-7, abs=1e-9)
    assert one["fake"] == two["fake"] and one["real"] == two["real"] and one["fake"]["images"] == 14

def test_own_samples_of_two_processes_are_those_of_one(tiny, tmp_path):
    train.main([*tiny, "--updates", "2", "--out", str(tmp_path / "base")])
    flags = ["--schedule", "shortcut", "--ckpt", str(tmp_path / "base"), "--pool", "13", "--steps", "2", "--batch", "4",
             "--updates", "1", "--device", "cpu", "--dtype", "fp32", "--out"]
    done(torchrun("distill.py", *flags, tmp_path / "two"))
    distill.main([*flags, str(tmp_path / "one")])
    one, two = (next((tmp_path / name).glob("pool-*")) for name in ("one", "two"))
    assert one.name == two.name and one.suffix == ".f16" and one.read_bytes() == two.read_bytes()

def pid_of(number, out):
    """The process of rank `number` that trains into `out`."""
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if (f"RANK={number}".encode() in (p / "environ").read_bytes().split(b"\0")
                    and str(out).encode() in (p / "cmdline").read_bytes()):
                return int(p.name)
        except OSError:                                       # it has ended meanwhile, or is not ours
            continue
    raise AssertionError(f"no rank {number}")

@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("victim,number", [(1, signal.SIGKILL), ("all", signal.SIGINT), (1, signal.SIGINT)])
def test_when_a_rank_dies_all_end_and_the_checkpoint_is_whole(victim, number, tiny, tmp_path):
    """Killed: within seconds, with a message. Interrupted, even one alone: with a fresh one, of the same update."""
    out = tmp_path / "out"
    child = torchrun("train.py", *tiny, "--updates", 100_000, "--save-every", 50, "--out", out, start_new_session=True)
    try:
        while not (out / "ckpt.pt").exists():
            assert child.poll() is None, child.stdout.read()
            time.sleep(0.05)
        os.kill(child.pid if victim == "all" else pid_of(victim, out), number)
        output = child.communicate(timeout=60)[0]
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode != 0
    state = load_checkpoint(out / "ckpt.pt")
    assert all(v.isfinite().all() for v in state["weights"].values())
    if number == signal.SIGINT:
        assert log_of(out)[-1]["step"] == state["step"]
        assert victim == 1 or re.search(rf"stopped at update {state['step']} of 100000; .*--resume", output)
    else:
        assert "another process of this run has died" in output and state["step"] % 50 == 0
        assert "Signal 9 (SIGKILL)" in output                 # torchrun's own report names the one that died first

def test_a_batch_that_can_not_be_shared_is_refused_once(tiny, tmp_path):
    output = torchrun("train.py", *tiny, "--batch", "5", "--out", tmp_path / "out").communicate(timeout=60)[0]
    assert output.count("--batch 5 can't be shared equally by 2 processes") == 1
    assert not (tmp_path / "out").exists()

def test_a_batch_is_the_same_however_it_is_shared(tiny, tmp_path):
    images = load_data(str(tmp_path / "data"), 8, cache=str(tmp_path / "cache"))
    x, y = images.batch(3, 8, seed=1)
    parts = [images.batch(3, 8, 1, share=(r, 4)) for r in range(4)]
    assert torch.equal(torch.cat([p[0] for p in parts]), x) and torch.equal(torch.cat([p[1] for p in parts]), y)
