"""checkpoint.py: files come back as they were, are whole or not there, and run nothing."""

import pickle
from dataclasses import asdict

import pytest
import torch
from conftest import TINY
from torch.testing import assert_close

from checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint
from model import UNet, UNetConfig

CONFIG = UNetConfig(**TINY)

def state_of(net):
    return dict(config=asdict(net.config), weights=net.state_dict(), ema=net.state_dict(),
                schedule="cosine", predicts="v", shape=[3, 8, 8], classes=[], step=3)

def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    net = UNet(CONFIG)
    save_checkpoint(tmp_path / "c.pt", state_of(net))
    back, state = load_model(tmp_path / "c.pt")
    z = torch.randn(2, 3, 8, 8)
    assert_close(back(z, 0.3), net(z, 0.3))
    assert state["step"] == 3 and [p.name for p in tmp_path.iterdir()] == ["c.pt"]

def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "c.pt", state_of(UNet(CONFIG)))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(tmp_path / "c.pt", {"config": lambda: 0})
    assert load_checkpoint(tmp_path / "c.pt")["step"] == 3

def test_a_full_disk_is_a_one_line_error_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    save_checkpoint(tmp_path / "c.pt", state_of(UNet(CONFIG)))
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit, match="No space left"):
        save_checkpoint(tmp_path / "c.pt", state_of(UNet(CONFIG)) | {"step": 4})
    assert load_checkpoint(tmp_path / "c.pt")["step"] == 3 and [p.name for p in tmp_path.iterdir()] == ["c.pt"]

class Malicious:
    def __reduce__(self):
        return print, ("code from a file was run",)

def test_unusable_checkpoints_are_one_line_errors_and_run_nothing(tmp_path, capsys):
    good = tmp_path / "good.pt"
    save_checkpoint(good, state_of(UNet(CONFIG)))
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:1000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    torch.save(Malicious(), tmp_path / "evil2.pt")
    (tmp_path / "folder.pt").mkdir()
    for name in ("missing.pt", "cut.pt", "text.pt", "other.pt", "evil.pt", "evil2.pt", "folder.pt"):
        with pytest.raises(CheckpointError) as e:
            load_checkpoint(tmp_path / name)
        message = str(e.value)
        assert message.startswith("error: ") and name in message and "\n" not in message
    assert "code from a file" not in capsys.readouterr().out

def test_weights_that_do_not_fit_name_the_tensor(tmp_path):
    state = state_of(UNet(CONFIG))
    state["ema"] = {k: v for k, v in state["ema"].items() if k != "out.weight"}
    save_checkpoint(tmp_path / "c.pt", state)
    with pytest.raises(CheckpointError, match="out.weight"):
        load_model(tmp_path / "c.pt")
    state["config"] = state["config"] | {"depth": 3}
    save_checkpoint(tmp_path / "c.pt", state)
    with pytest.raises(CheckpointError, match="depth"):
        load_model(tmp_path / "c.pt")
    state["config"] = asdict(CONFIG) | {"groups": 3}
    save_checkpoint(tmp_path / "c.pt", state)
    with pytest.raises(CheckpointError, match="make no model.*\\b3\\b"):
        load_model(tmp_path / "c.pt")
