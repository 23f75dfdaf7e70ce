"""experiments/gpu.py, rehearsed on a CPU in a tiny size."""

import json

import gpu
import pytest
from conftest import labelled_images

@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """A function that calls the script: what it leaves, and the pieces."""
    monkeypatch.setenv("DSD_CACHE", str(tmp_path / "cache"))

    def call(*flags):
        gpu.main(["--tiny", "--out", str(tmp_path / "out"), *flags])
        out = tmp_path / "out"
        return (out / "gpu.md").read_text(), json.loads((out / "gpu.json").read_text())["pieces"]

    return call

def test_every_part_leaves_its_rows(rehearse, tmp_path, capfd):
    text, pieces = rehearse("--data", labelled_images(tmp_path / "images"))
    failed = {name: piece["failed"] for name, piece in pieces.items() if "failed" in piece}
    assert not failed and pieces.keys() == gpu.PIECES.keys() - gpu.ALIKE
    assert all(row.get("ok", True) for piece in pieces.values() for row in piece["rows"])
    assert "which measures nothing" in text
    assert "| agreement and nccl: everything within its limits | True | True |" in text
    assert {row["what"] for row in pieces["speed/compiled"]["rows"]} >= {"plain", "plain --compile default"}
    assert {row["method"] for row in pieces["agreement/methods"]["rows"]} >= {"plain", "tsd", "train --shortcut"}
    assert [row["run"] for row in pieces["runs/scores"]["rows"]] == [*gpu.RUNS]
    assert (tmp_path / "out" / "gpu-steps.png").exists()
    before = (tmp_path / "out" / "gpu.json").read_text()
    rehearse("--only", "runs", "speed/train")                 # there is nothing left to do
    assert (tmp_path / "out" / "gpu.json").read_text() == before and "are complete" in capfd.readouterr().out

def test_a_piece_that_fails_leaves_its_reason_and_the_others_go_on(rehearse, tmp_path, capfd):
    """And is tried again by the next call."""
    flags = ["--only", "runs/plain", "agreement/networks"]
    text, pieces = rehearse(*flags)
    assert pieces["runs/plain"]["failed"] == "KeyError: 'runs/pace'" and len(pieces["agreement/networks"]["rows"]) == 5
    assert "**Failed:** KeyError: 'runs/pace' (`runs/plain`" in text
    assert "gpu.md lack runs/plain: the same command goes on" in capfd.readouterr().out
    path = tmp_path / "out" / "gpu.json"
    path.write_text(path.read_text().replace("threads of", "threads of another"))
    with pytest.raises(SystemExit, match="is of another machine"):
        rehearse(*flags)

def test_a_training_is_stopped_when_its_time_is_over_and_not_scored_before_its_end(tmp_path):
    args = gpu.parse_args(["--tiny", "--out", str(tmp_path)])
    args.found = {"runs/pace": dict(rows=[dict(updates=10 ** 6)])}
    stopped = gpu.in_a_process("runs/plain", args, 1)
    assert stopped["failed"].startswith(("stopped after 1 seconds", "its process died"))
    args.found["runs/plain"] = stopped
    assert "the trainings are not at their end" in gpu.in_a_process("runs/scores", args, None)["failed"]

def test_no_piece_is_begun_that_may_not_end_in_time(rehearse, tmp_path):
    with pytest.raises(FileNotFoundError):                    # not even a page was written
        rehearse("--minutes", "0.1")
    assert list((tmp_path / "out").iterdir()) == []

@pytest.mark.parametrize("flags,message", [
    (["--tiny"], "give --out"), ([], "there is no GPU here"), (["--tiny", "--only", "nothing"], "invalid choice")])
def test_what_can_not_be_measured_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        gpu.parse_args(flags)
    assert message in capsys.readouterr().err

def test_the_targets_are_read_off_the_tables():
    found = {"speed/compiled": dict(rows=[{"what": "plain", "images/s": 10.0, "MFU": 0.2},
                                          {"what": "plain --compile default", "images/s": 30.0, "MFU": 0.4},
                                          {"what": "diffusers --compile default", "images/s": 25.0, "MFU": 0.3}]),
             "speed/celebahq256-8": dict(rows=[{"what": "dsdi", "time of TSD's": 0.7},
                                               {"what": "tsd", "time of TSD's": 1}]),
             "agreement/methods": dict(rows=[dict(ok=True), dict(ok=False)]), "nccl/torchrun": dict(failed="why")}
    rows = {row["target"].split()[0]: (row["found"], row["reached"]) for row in gpu.targets(found)}
    assert rows == {"agreement": (False, False), "training": (1.2, False), "MFU": (0.4, True), "DSD": (0.7, True)}
