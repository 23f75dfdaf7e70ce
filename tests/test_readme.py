"""The README and the docstrings promise commands and files: they must exist and parse."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ["train", "distill", "sample", "fid", "bench"]


def commands():
    """Every `python script.py …`, or torchrun, of the README and of the scripts' docstrings, without comments."""
    texts = [README, *(importlib.import_module(s).__doc__ for s in SCRIPTS)]
    found = re.findall(r"(?:python|torchrun(?: --\w+=\S+)*) (\w+)\.py([^\n`#]*)", "\n".join(texts).replace("\\\n", " "))
    return sorted({(script, flags.strip().rstrip(";.,)")) for script, flags in found if "--help" not in flags})


@pytest.mark.parametrize("script,flags", commands())
def test_every_command_parses(script, flags, monkeypatch):
    module = importlib.import_module(script)
    if "--resume" in flags:
        monkeypatch.setattr("train.load_checkpoint", lambda path: {"args": {}})
    module.parse_args(shlex.split(flags))


def test_there_are_commands_for_every_script():
    assert {script for script, _ in commands()} == set(SCRIPTS)


def test_the_file_map_names_every_file_and_no_other():
    named = set(re.findall(r"^\| `(\w+\.py)`", README, flags=re.M))
    assert named == {p.name for p in ROOT.glob("*.py")}


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches_every_flag(script, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    text = capsys.readouterr().out
    assert f"python {script}.py" in text
    flags = re.findall(r"^  (-.*)\n(.*)", text, flags=re.M)
    assert len(flags) > 4
    for flag, below in flags:                                 # its help stands on the same line, or on the next
        assert re.search(r"\S {2,}\S", flag) or below.startswith(" " * 20), flag
