"""The README, the docs and the docstrings promise commands and files: they must exist and parse."""

import argparse
import importlib
import re
import shlex
import shutil
import textwrap

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ["train", "distill", "sample", "fid", "bench"]      # the last one is among the experiments
EXPERIMENTS = sorted({p.stem for p in (ROOT / "experiments").glob("*.py")} - {"agreement", "common", "pretend"})

def commands():
    """Every `python script.py …`, or torchrun, of the pages and of the scripts' docstrings, without comments."""
    texts = [*(page.read_text() for page in PAGES), *(importlib.import_module(s).__doc__ for s in SCRIPTS)]
    found = re.findall(r"(?:python|torchrun(?: --\w+=\S+)*) +(?:experiments/(?=bench))?(\w+)\.py([^\n`#]*)",
                       "\n".join(texts).replace("\\\n", " "))
    return sorted({(script, flags.strip().rstrip(";.,)")) for script, flags in found if "--help" not in flags})

@pytest.mark.parametrize("script,flags", commands())
def test_every_command_parses(script, flags, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    if "--resume" in flags:                                   # there is a run to resume in each folder
        monkeypatch.setattr("flags.load_checkpoint", lambda path: {"args": {}})
        monkeypatch.chdir(tmp_path)
        for place in ("train", "dsdi"):
            (tmp_path / "out" / place).mkdir(parents=True)
            (tmp_path / "out" / place / "ckpt.pt").touch()
    module.parse_args(shlex.split(flags))

def commands_of_experiments():
    """Every `python experiments/script.py …` of the pages and of the experiments' docstrings."""
    texts = [*(page.read_text() for page in PAGES), *(importlib.import_module(s).__doc__ for s in EXPERIMENTS)]
    text = re.sub(r"`[^`]*`", lambda span: span[0].replace("\n", " "), "\n".join(texts).replace("\\\n", " "))
    found = re.findall(r"python experiments/(\w+)\.py([^\n`#]*)", text)
    return sorted({(script, flags.replace("…", "x.zip").strip().rstrip(";.,)")) for script, flags in found})

@pytest.mark.parametrize("script,flags", commands_of_experiments())
def test_every_command_of_an_experiment_parses(script, flags, monkeypatch):
    parse = argparse.ArgumentParser.parse_args
    def parsed(p, argv=None, *more):
        parse(p, argv, *more)
        raise InterruptedError
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(InterruptedError):
        importlib.import_module(script).main(shlex.split(flags))

@pytest.mark.parametrize("name,flags", [
    ("table2", []), ("table2-16", ["--size", "16"]), ("classes", []), ("claims", []), ("figure3", []), ("settings", []),
    ("settings-training", ["--training"]),
])
def test_a_page_of_the_docs_is_what_its_figures_give(name, flags, tmp_path):
    shutil.copy(ROOT / "docs" / f"{name}.json", tmp_path)
    flags = [*flags, "--seeds", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    importlib.import_module(name.split("-")[0]).main(flags)
    assert (tmp_path / f"{name}.md").read_text() == (ROOT / "docs" / f"{name}.md").read_text()

def test_there_are_commands_for_every_script():
    assert {script for script, _ in commands()} == set(SCRIPTS)

def test_every_experiment_exists_and_says_how_it_is_run():
    for page in PAGES:
        for name in re.findall(r"python experiments/(\w+)\.py", page.read_text()):
            assert name in EXPERIMENTS, (page, name)
    for name in EXPERIMENTS:
        module = importlib.import_module(name)
        assert f"python experiments/{name}.py" in module.__doc__ and callable(module.main)

def test_the_file_map_names_every_file_and_no_other():
    part = re.search(r"\n## The paper, file by file\n(.*?)\n## ", README, re.S)[1]
    named = re.findall(r"^\| `(\w+\.py)` \|", part, re.M) + re.findall(r"[;:]\s`(\w+\.py)`\s", part)
    assert sorted(named) == sorted(p.name for p in ROOT.glob("*.py"))

def test_what_the_pages_name_in_a_file_is_there():
    """`file.py`: `name`, `other` in a table means that the file defines them; so does the README's map of files."""
    named = re.findall(r"^\| `(\w+\.py)` \|[^|]*\|([^|]*)\|$", README, re.M)
    rows = re.findall(r"^\| `(\w+\.py)` \|", README, re.M)
    assert [file for file, _ in named] == rows and sum("`" in names for _, names in named) > 6
    for page in PAGES:
        named += re.findall(r"`(\w+\.py)`: ([^|;]*)", page.read_text())
    for file, names in named:
        for name in re.findall(r"`(\w+)", names):
            assert re.search(rf"^ *(def|class) {name}\b|^{name}\b.* =", (ROOT / file).read_text(), re.M), (file, name)

@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_linked_files_exist(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        heads = re.findall(r"^#+ (.*)", file.read_text(), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads}, anchor

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches_every_flag_on_two_screens(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    text = capsys.readouterr().out
    assert re.search(rf"python (experiments/)?{script}\.py", text) and len(text.splitlines()) <= 100
    flags = re.findall(r"^  (-.*)\n(.*)", text, flags=re.M)
    assert len(flags) > 4
    for flag, below in flags:                                 # its help stands on the same line, or on the next
        assert re.search(r"\S {2,}\S", flag) or below.startswith(" " * 20), flag

def test_an_installation_has_every_module():
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"py-modules = \[(.*?)\]", text, re.S)[1]
    assert re.findall(r'"(\w+)"', listed) == sorted(p.stem for p in ROOT.glob("*.py"))

def test_the_torch_of_the_tests_is_one_that_users_may_have():
    allowed, pinned = ({r.name: r for r in map(Requirement, re.findall(r"^\w.*", (ROOT / name).read_text(), re.M))}
                       for name in ("requirements.txt", "requirements-dev.txt"))
    [version] = [s.version for s in pinned["torch"].specifier if s.operator == "=="]
    assert version in allowed["torch"].specifier and len(allowed["torch"].specifier) == 2
    assert not any(s.operator == "==" for r in allowed.values() for s in r.specifier)

def test_the_lines_for_python_draw_a_picture(small_run, tmp_path, monkeypatch):
    import train
    train.main([*small_run, "--updates", "1"])
    lines = re.search(r"    from checkpoint import load_model\n(    .*\n)+", (ROOT / "docs" / "use.md").read_text())[0]
    seen = []
    monkeypatch.setattr("PIL.Image.Image.show", lambda image: seen.append(image))
    exec(textwrap.dedent(lines).replace("out/train/ckpt.pt", str(tmp_path / "out" / "ckpt.pt")), {})
    assert [image.size for image in seen] == [(5 * 9 * 8 - 8, 2 * 9 * 8 - 8)]
