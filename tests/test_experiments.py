"""The scripts of experiments/ that make many runs, each from its first update to its page, at a size of nothing."""

import json
import re

import claims
import classes
import common
import figure3
import guard
import pytest
import second_term
import settings
import table2
import torch
from conftest import SMALL_RUN, labelled_images, same
from PIL import Image

import ddim
import scores
import shortcut
import train
from checkpoint import load_checkpoint

BASE = [*SMALL_RUN, "--updates", "2", "--lr", "0.01", "--warmup", "0"]
P = ["--batch", "4", "--steps", "4", "--for-steps", "1", "2"]

@pytest.fixture
def place(tmp_path, monkeypatch):
    """The flags of a rehearsal on twenty images, into tmp_path. Pictures of single runs are left out."""
    monkeypatch.setenv("DSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hooks.SHOWN", (1, 2))
    monkeypatch.setattr("hooks.WATCHED", (1, 2))
    monkeypatch.setattr("hooks.Guard.picture", lambda guard, trainer: None)
    return ["--data", labelled_images(tmp_path / "data", 20), "--device", "cpu", "-n", "8", "--seeds", "0", "1",
            "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]

def rehearse(script, flags, out, monkeypatch, capsys, picture=True):
    """Run a script, and again for its page alone: its figures, and that page."""
    name = script.__name__
    script.main(flags)
    assert re.search(r"(\d+) runs and scores to make: about \d+\.\d h", capsys.readouterr().err)
    made, page = ((out / f"{name}.{kind}").read_text() for kind in ("json", "md"))
    assert (out / f"{name}.png").exists() == picture
    for module in (common, script):                           # a run or a score would now be an error
        monkeypatch.setattr(module, "to_the_end", None, raising=False)
    monkeypatch.setattr(scores, "frechet_distance", None)
    script.main([*flags, "--seeds"])
    assert (out / f"{name}.json").read_text() == made and (out / f"{name}.md").read_text() == page
    return json.loads(made), page

def cells(page, start):
    """The cells of the first line of a table that begins so."""
    return re.search(rf"^\| {re.escape(start)} \| (.*) \|$", page, re.M)[1].split(" | ")

def test_table2(place, tmp_path, monkeypatch, capsys):
    methods = {"tsd": (["--schedule", "tsd", "--updates", "3", *P], 1e-3),
               "dsdi": (["--schedule", "dsdi", "--updates", "3", *P], None)}     # no search: at the default rate
    for name, value in (("BASE", BASE), ("SIZES", {32: ["--size", "8"]}), ("METHODS", methods), ("STEPS", (1, 2))):
        monkeypatch.setattr(table2, name, value)
    table2.main([*place, "--methods", "dsdi"])                # a first sitting: the picture has what is there
    before = Image.open(tmp_path / "table2.png").width
    figures, page = rehearse(table2, place, tmp_path, monkeypatch, capsys)
    assert Image.open(tmp_path / "table2.png").width > before
    assert len([name for name in figures if "seed" in name]) == 1 + 2 * 2 + 2
    tried = {lr: figures[f"rate of tsd: {lr:g}"] for lr in common.Experiment.GRID if f"rate of tsd: {lr:g}" in figures}
    best = max(tried, key=tried.get)
    assert best == figures["tsd, own rate, seed 0"]["lr"] == figures["dsdi, TSD's rate, seed 1"]["lr"]
    assert figures["dsdi, own rate, seed 1"]["lr"] == 3e-6 != best
    for metric in ("quick score", "precision", "recall", "contrast"):
        assert f"**{metric}** at N steps" in page
    at_two = [figures[f"dsdi, own rate, seed {seed}"]["scores"]["2"]["quick score"] for seed in (0, 1)]
    found = cells(page, "dsdi, own rate")
    assert found[1] == "2" and found[-1].startswith(f"{sum(at_two) / 2:.3g} ± ")
    assert found[3] == common.least_to_most([figures[f"dsdi, own rate, seed {seed}"]["seconds"] for seed in (0, 1)])
    assert [common.least_to_most(v) for v in ([1200, 3], [5, 5], [])] == ["3 to 1,200", "5", ""]
    (tmp_path / "table2.png").unlink()
    table2.main(place)                                        # no run is opened again, the base model's neither
    assert (tmp_path / "table2.png").exists()
    with pytest.raises(SystemExit, match="has other figures"):           # other samples do not go into the same file
        table2.main([*place, "--seeds", "-n", "9"])
    with pytest.raises(SystemExit, match="figures of another base model"):     # none is trained first: that would fail
        table2.main([*place, "--seeds", "5", "--runs", str(tmp_path / "elsewhere")])
    small = str(tmp_path / "runs" / "undistilled" / "ckpt.pt")
    monkeypatch.setattr(table2, "SIZES", {32: ["--size", "16"]})
    with pytest.raises(SystemExit, match="draws images of 8x8, and these figures are of 16x16"):
        table2.main([*place, "--ckpt", small, "--out", str(tmp_path / "other")])

def test_table2_by_fid(place, tmp_path, monkeypatch, capsys):
    methods = {"dsdi": (["--schedule", "dsdi", "--updates", "3", *P], None),     # no search: at the default rate
               "shortcut-data": (["--schedule", "shortcut", "--data", common.DATA, "--updates", "40", *P], None)}
    for name, value in (("BASE", BASE), ("SIZES", {32: ["--size", "8"]}), ("METHODS", methods), ("STEPS", (1, 2)),
                        ("PAPERS", ())):
        monkeypatch.setattr(table2, name, value)
    table2.main(place)
    runs = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.rglob("ckpt.pt")}  # noqa: E731
    made = runs()
    figures, page = rehearse(table2, [*place, "--weights", "random"], tmp_path, monkeypatch, capsys)
    assert figures["random: dsdi, own rate, seed 0"]["lr"] == 3e-6
    assert not any(name.startswith("rate of") for name in figures)
    assert all(f"**{metric}** at N steps" in page for metric in ("rFID", "rprecision", "rrecall", "contrast"))
    assert len(made) == 5 and runs() == made                  # scored once more, not made anew
    (of_data,) = tmp_path.rglob("0.0005-seed0/shortcut-data/ckpt.pt")
    assert load_checkpoint(of_data)["args"]["data"] == place[1] and not [*of_data.parent.glob("pool-*")]
    assert cells(page, "shortcut-data, own rate")[2] == "0.4"            # 40 x 4 x 2.5 evaluations, no own samples
    with pytest.raises(SystemExit):
        table2.main(place[2:])
    assert "shortcut-data learns from images" in capsys.readouterr().err
    assert page.index("**quick score**") < page.index("By `fid.py --weights random`") < page.index("**rFID**")

def test_classes(place, tmp_path, monkeypatch, capsys):
    methods = {"dsdi": (["--schedule", "dsdi", "--updates", "3", *P], 1e-3),
               "shortcut-w2": (["--schedule", "shortcut", "--guidance", "2", "2", "--updates", "2", "--pool", "8", *P],
                               None)}
    jumps = ["--classes", *BASE, "--distill", "0.25", "--shortcut"]
    for name, value in (("BASE", ["--classes", *BASE]), ("METHODS", methods), ("STEPS", (1, 2)),
                        ("CLASSIFIER", dict(updates=60, batch=64, unseen=200)),
                        ("TRAINED", {"trained-w2": [*jumps, "--guidance", "2"]})):
        monkeypatch.setattr(classes, name, value)
    monkeypatch.setattr("pictures.BuiltIn.__init__.__defaults__", (300,))
    classes.main([*place[2:], "--methods", "trained-w2"])     # a first sitting
    assert not (tmp_path / "classes.png").exists()
    classes.main(place[2:])
    width = Image.open(tmp_path / "classes.png").width
    classes.main([*place[2:], "--methods", "dsdi"])           # a sitting for some leaves the others in the picture
    assert Image.open(tmp_path / "classes.png").width == width
    figures, page = rehearse(classes, place[2:], tmp_path, monkeypatch, capsys)
    assert 30 < figures["classifier"] <= 100                  # by chance: 10
    assert figures["dsdi, seed 1"]["scores"].keys() == {"1", "2"}
    for name in ("shortcut-w2", "trained-w2"):
        assert figures[f"{name}, seed 1"]["scores"].keys() == {"1"}
    trained = [load_checkpoint(tmp_path / "runs" / f"trained-w2-seed{seed}" / "ckpt.pt") for seed in (0, 1)]
    assert [state["guidance"] for state in trained] == [2, 2] and not same(*(state["weights"] for state in trained))
    accuracies = [figures[f"shortcut-w2, seed {seed}"]["scores"]["1"][1][0] for seed in (0, 1)]
    assert cells(page, "shortcut-w2 | 2")[-1].startswith(f"{sum(accuracies) / 2:.3g} ± ")

def test_a_base_model_that_is_given_is_scored_against_its_own_images(place, tmp_path, monkeypatch):
    train.main([*BASE, *place[:2], "--crop", "0.5", "--out", str(tmp_path / "model")])
    args, seen = common.Experiment.flags("x", "", 8).parse_args([*place[2:], "--ckpt", str(tmp_path / "model")]), []
    monkeypatch.setattr(common, "QuickScore", lambda *asked: seen.append(asked))
    common.Experiment("x", args, ["--size", "8"], {}).quick  # noqa: B018 (a property)
    assert seen == [(place[1], 8, 0.5, 8)]

def test_the_laboratory_samples_with_the_lengths_that_were_learned(monkeypatch):
    monkeypatch.setattr(settings.lab, "in_the_lab", lambda *args, **changed: shortcut.LEVELS)
    monkeypatch.setattr(settings.lab, "distances", lambda levels, mixture: (levels, ddim.SHORTEST))
    assert settings.in_the_lab(None, None, 0, levels=5) == (5, 1 / 16)

def test_claims(place, tmp_path, monkeypatch, capsys):
    methods = {f"{name}, P = {p}": (["--schedule", name, "--updates", str(p), *P], None)
               for name in ("dsdi", "pd") for p in (2, 3)}
    orders = {"DSD first, PD after": ["dsdi, P = 2", "pd, P = 2"], "PD first, DSD after": ["pd, P = 2", "dsdi, P = 2"]}
    for name, value in (("BASE", BASE), ("SIZES", {16: ["--size", "8"]}), ("METHODS", methods), ("ORDERS", orders),
                        ("STEPS", (1, 2))):
        monkeypatch.setattr(claims, name, value)
    figures, page = rehearse(claims, place, tmp_path, monkeypatch, capsys)
    assert figures["DSD first, PD after, seed 0"]["lr"] == [3e-6, 1e-4]         # the default rates
    both, alone = ([figures[f"{name}, seed {seed}"]["scores"][0][0] for seed in (0, 1)] for name in orders)
    assert cells(page, "DSD first, PD after, beats the other order")[0] == common.verdict(both, alone)
    assert "PD's 512 beat its 128" not in page                # neither was run

def test_settings(place, tmp_path, monkeypatch, capsys):
    half = ["--schedule", "shortcut", "--updates", "3", "--warmup", "0", "--pool", "4", *P]
    methods = {name: ([*half, *flags], None) for name, flags in settings.SETTINGS.items()
               if not {"--pool", "--updates"} & {*flags}}
    for name, value in (("BASE", BASE), ("SIZES", {16: ["--size", "8"]}), ("METHODS", methods), ("STEPS", (1, 2))):
        monkeypatch.setattr(settings, name, value)
    figures, page = rehearse(settings, place, tmp_path, monkeypatch, capsys, picture=False)
    assert len({json.dumps(figures[f"{name}, seed 0"]) for name in methods}) == len(methods)      # each does something
    last = [figures[f"twice the rate, seed {seed}"]["scores"][1][0] for seed in (0, 1)]
    assert cells(page, "twice the rate | `--lr 1e-3`")[-1].startswith(f"{sum(last) / 2:.3g} ± ")

def test_settings_of_training(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figure3, "SETS", {settings.FACES: (BASE, 4)})
    monkeypatch.setattr(settings, "STEPS", (1, 2))
    settings.main([*place, "--training"])
    assert f"{2 * len(settings.TRAINING)} runs and scores to make" in capsys.readouterr().err
    figures = json.loads((tmp_path / "settings-training.json").read_text())
    page = (tmp_path / "settings-training.md").read_text()
    assert len({json.dumps(figures[f"{name}, seed 1"]) for name in settings.TRAINING}) == len(settings.TRAINING)
    train.main([*BASE, *place[:2], *figure3.KINDS["shortcut"]["flags"], "--updates", "4", "--out", str(tmp_path / "t")])
    assert same(*(load_checkpoint(folder / "ckpt.pt")["weights"] for folder in (
        tmp_path / "t", tmp_path / "runs" / "training-the-defaults-0")))        # the defaults are train.py's
    last = [figures[f"and weigh as much as data, seed {seed}"][1][0] for seed in (0, 1)]
    assert cells(page, "and weigh as much as data")[-1].startswith(f"{sum(last) / 2:.3g} ± ")
    monkeypatch.setattr(settings, "trained", None)            # a run would now be an error
    settings.main([*place, "--training", "--seeds"])
    assert (tmp_path / "settings-training.md").read_text() == page
    with pytest.raises(SystemExit):
        settings.main(["--training"])

def test_settings_in_the_laboratory(tmp_path, monkeypatch):
    monkeypatch.setattr(settings.lab, "trained", lambda mixture, seed: settings.lab.MLP())
    known = {*vars(settings.distill.parse_args(settings.HALF)), "levels", "pool", "error"}
    assert all(changed.keys() <= known for changed in settings.LAB.values())
    changes = {"as ever": {}, "few": dict(pool=2), "levels": dict(levels=2), "again": dict(levels=7),
               "in x": dict(error=settings.LAB["the loss in x instead of v"]["error"])}
    monkeypatch.setattr(settings, "LAB", changes)
    monkeypatch.setitem(settings.lab.SETTINGS, "shortcut", dict(lr=1e-2, updates=30))
    settings.main(["--lab", "--seeds", "0", "--out", str(tmp_path)])
    page = (tmp_path / "settings-lab.md").read_text()
    ever, few, two, again = (cells(page, name) for name in ("as ever", "few: pool 2", "levels: levels 2",
                                                            "again: levels 7"))
    assert ever == again != two and few not in (ever, two) and len(cells(page, "trained")) == len(settings.lab.STEPS)
    assert cells(page, "in x") != ever

def test_figure3(place, tmp_path, monkeypatch, capsys):
    sets = dict.fromkeys(("built-in", "faces, 16x16"), (BASE, 4))
    tuned = ["--schedule", "shortcut", *P, "--pool", "2", "--updates", "2"]
    for name, value in (("SETS", sets), ("POINTS", 2), ("TUNED", tuned), ("STEPS", (1, 2)), ("SCORED", (1, 2))):
        monkeypatch.setattr(figure3, name, value)
    figure3.main([*place, "--rows", "plain, then shortcut", "shortcut"])    # the former trains plainly first
    some = json.loads((tmp_path / "figure3.json").read_text())
    assert {name.split(", ")[-2] for name in some if "seed" in name} == {"then shortcut", "shortcut"}
    before = Image.open(tmp_path / "figure3-faces-16x16.png").width
    capsys.readouterr()
    figures, page = rehearse(figure3, place, tmp_path, monkeypatch, capsys)
    for kind, last in (("plain", 5), ("Equation 1", 4), ("shortcut", 4)):
        run = figures[f"faces, 16x16, {kind}, seed 1"]
        assert [step for step, _ in run["curve"]] == [2, last] and run["curve"][-1][1] == run["last"]
    assert len({json.dumps(figures[f"faces, 16x16, {name}, seed 0"]) for name in figure3.NAMES}) == len(figure3.NAMES)
    last = [figures[f"faces, 16x16, plain, seed {seed}"]["last"][0][0] for seed in (0, 1)]
    assert cells(page, "plain")[1].startswith(f"{sum(last) / 2:.3g} ± ")
    other = [figures[f"faces, 16x16, Equation 1, seed {seed}"]["last"][0][0] for seed in (0, 1)]
    assert cells(page, "Equation 1 beats plain training")[0] == common.verdict(other, last)
    assert Image.open(tmp_path / "figure3-faces-16x16.png").width > before
    other = ["--data", labelled_images(tmp_path / "other", 21), *place[2:], "--seeds", "5"]
    with pytest.raises(SystemExit, match="has figures of other faces, 16x16: choose another --out, and other --runs"):
        figure3.main(other)

@pytest.mark.parametrize("start,best,tried", [(1, 4, [0, 1, 2, 3, 4, 5]), (5, 4, [3, 4, 5, 6]), (4, 4, [3, 4, 5]),
                                              (1, 0, [0, 1, 2]), (8, 9, [7, 8, 9])])
def test_a_search_tries_both_neighbours_of_the_rate_that_it_takes(start, best, tried):
    seen = []
    def value(place):
        seen.append(place)
        return -abs(place - best)
    assert common.climb(list(range(10)), start, value) == best and sorted(set(seen)) == tried

def test_runs_that_fell_apart_count_against_a_claim(tmp_path):
    figures = common.Figures(tmp_path / "figures.json", {}, tmp_path)
    figures.values |= {"dsdi, seed 0": {"lr": 1e-5}, "dsdi, seed 1": None, "dsdi, seed 2": {"lr": 3e-5}}
    assert common.seeds_of(figures, "dsdi") == "2, and 1 broken" and figures.broken("tsd") == 0
    assert common.rates_of(figures.of_seeds("dsdi")) == "1e-05, 3e-05"
    assert common.verdict([1, 1, float("inf")], [2, 2, 2]) == "undecided"
    values = {"dsdi": [1, 1], "tsd": [2, 2, 2]}
    lines = common.claims_table({"beats": ("dsdi", "tsd")}, [4], figures, lambda name, column: values[name])
    assert lines[-1] == "| beats | undecided |"               # by the two that are left it would hold
    assert figures.made("tsd, seed 0", scores.frechet_distance, *[torch.tensor([[float("nan")]])] * 4) is None
    assert figures.broken("tsd") == 1

@pytest.mark.parametrize("low,high,says", [
    ([1, 2], [3, 4], "holds"), ([3, 4], [1, 2], "does not"), ([1, 3], [2, 4], "undecided"), ([1], [2, 3], "–"),
])
def test_a_claim_is_decided_by_all_seeds(low, high, says):
    assert common.verdict(low, high) == says

def test_guard(tmp_path, monkeypatch):
    data = labelled_images(tmp_path / "data", 20)
    monkeypatch.setenv("DSD_CACHE", str(tmp_path / "cache"))
    train.main([*BASE, "--data", data, "--out", str(tmp_path / "base")])
    monkeypatch.setattr(guard, "RUNS", {"dsdi 1e-3": ("dsdi", 1e-3, 3, P[:4]), "pd 1e-3": ("pd", 1e-3, 3, P[:4])})
    monkeypatch.setattr(guard, "SAMPLES", 8)
    guard.main(["--ckpt", str(tmp_path / "base"), "--data", data, "--docs", str(tmp_path),
                "--out", str(tmp_path / "guard"), "--runs", *guard.RUNS])
    assert len(cells((tmp_path / "guard-faces.md").read_text(), "? | dsdi 1e-3")) == 7

def test_the_second_term_has_little_gradient_at_short_steps(small_run, tmp_path, capsys):
    """The shorter the step, the less: it is a difference of two neighbouring predictions."""
    train.main([*small_run, "--updates", "20", "--overwrite"])
    second_term.main(["--ckpt", str(tmp_path / "out"), "-n", "10"])
    found = cells(capsys.readouterr().out, "second term's gradient, share of the first's")
    shares = [float(cell.rstrip("%")) for cell in found]
    assert 0 <= shares[0] < shares[1] < shares[2] < 100
