"""shortcut.py: the loss by hand and on an exactly known flow, which rows jump and from where, its own samples."""

import json
import signal
import time

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, TINY, labelled_images, log_of, same, start
from torch import nn
from torch.testing import assert_close

import distill
import fid
import sample
import shortcut
import train
from checkpoint import load_checkpoint
from ddim import SHORTEST, Cosine, Denoiser, LDMDistilled, ddim_inverse, ddim_sample
from model import UNet, UNetConfig

SHAPE = 6, 3, 8, 8

def tiny_net(seed=0, **config):
    """A UNet in float64 that is told step lengths, with no layer at zero."""
    torch.manual_seed(seed)
    net = UNet(UNetConfig(**TINY, step_length=True, **config)).double()
    for p in net.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    return net

def hat(net):
    return Denoiser(net, Cosine(), null=net.config.classes or None, lengths=True)

def a_batch(jump, k, dtype=torch.float64):
    """Data, noise, times, step lengths, and the numbers of the rows that jump and of the rest."""
    torch.manual_seed(1)
    jump = torch.tensor(jump)
    t, d = shortcut.step_lengths(jump, 1 - torch.rand(6, dtype=dtype), torch.tensor(k))
    x, eps = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)
    return x, eps, t, d.to(dtype), jump.nonzero().flatten(), (~jump).nonzero().flatten()

# ---- the loss ---------------------------------------------------------------------------------------------
class GaussianFlow(nn.Module):
    """The flow of data N(m, D²), exactly: v of the x with which a step of length d ends where the flow does."""

    def __init__(self, m=0.3, std=0.5):
        super().__init__()
        self.m, self.std, self.scale = m, std, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, z, t, d=0.0):
        schedule, d = Cosine(), torch.as_tensor(d).expand(len(z))
        width = lambda t: ((schedule(t)[0] * self.std) ** 2 + schedule(t)[1] ** 2).sqrt()  # noqa: E731
        (a, s), (a1, _) = schedule(t), schedule(t - d)
        z1 = a1 * self.m + width(t - d) / width(t) * (z - a * self.m)
        mean = self.m + a * self.std ** 2 / width(t) ** 2 * (z - a * self.m)
        x = torch.where(d.reshape(-1, 1, 1, 1) > 0, ddim_inverse(schedule, z, z1, t, t - d), mean)
        return self.scale * (a * z - x) / s

@pytest.mark.parametrize("k", range(shortcut.LEVELS))
def test_a_network_that_knows_the_flow_has_no_loss_and_no_gradient(k):
    """At every d; at the shortest but for the error of two ordinary steps. One that is a little wrong has both."""
    x, eps, t, d, jumps, rest = a_batch([True] * 6, [k] * 6)
    for scale, exact in ((1.0, True), (1.1, False)):
        net = GaussianFlow()
        net.scale.data.fill_(scale)
        xhat, average = (Denoiser(n, Cosine(), lengths=True) for n in (net, GaussianFlow()))
        loss, _ = shortcut.shortcut_loss(xhat, average, x, eps, t, d, None, jumps, rest)
        gradient = torch.autograd.grad(loss, net.scale)[0].abs()
        least, most = (1e-25, 1e-12) if k < shortcut.LEVELS - 1 else (1e-5, 2e-3)
        assert (loss < least and gradient < most) if exact else (loss > 1e-4 and gradient > 1e-2)

def test_rows_that_do_not_jump_are_plain_training_bit_for_bit():
    net = tiny_net()
    x, eps, t, d, jumps, rest = a_batch([False] * 6, [0] * 6)
    ours, _ = shortcut.shortcut_loss(hat(net), hat(net), x, eps, t, d, None, jumps, rest)
    plain, _ = train.training_loss(hat(net), x, t, eps, None, b=0)
    assert torch.equal(ours, plain)
    gradients = [torch.autograd.grad(loss, net.parameters(), allow_unused=True) for loss in (ours, plain)]
    assert all(torch.equal(a, b) if b is not None else not a.any() for a, b in zip(*gradients, strict=True))

@pytest.mark.parametrize("anchored,weight", [(False, 1.0), (True, 3.0)])
def test_an_update_is_the_formula(anchored, weight):
    """Loss and all gradients, in float64, row by row: two steps of d/2 by the average, d = 0 at the shortest."""
    net, average, anchor = tiny_net(), tiny_net(1), tiny_net(2)
    x, eps, t, d, jumps, rest = a_batch([True, False, True, True, False, True], [0, 3, 2, shortcut.LEVELS - 1, 0, 3])
    want = 0
    for i in range(6):
        def angle(t):
            return torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)
        (a, s), row = angle(t[i]), slice(i, i + 1)
        z = a * x[row] + s * eps[row]
        with torch.no_grad():
            if d[i] == 0:
                goal = anchor(z, t[row]) if anchored else a * eps[row] - s * x[row]
            else:
                half, at, when = (d[row] / 2 if d[i] > SHORTEST else torch.zeros(1).double()), z, t[i]
                for _ in range(2):
                    v = average(at, when[None], d=half)
                    (a1, s1), (a2, s2) = angle(when), angle(when - d[i] / 2)
                    clean, noise = a1 * at - s1 * v, s1 * at + a1 * v
                    at, when = a2 * clean + s2 * noise, when - d[i] / 2
                a2, s2 = angle(t[i] - d[i])
                clean = (at - s2 / s * z) / (a2 - s2 / s * a)
                goal = (a * z - clean) / s
        want = want + (weight if d[i] else 1) * (net(z, t[row], d=d[row]) - goal).square().mean() / 6
    loss, terms = shortcut.shortcut_loss(hat(net), hat(average), x, eps, t, d, None, jumps, rest,
                                         hat(anchor) if anchored else None, weight=weight)
    assert_close(loss, want)
    assert_close(terms["v"] + weight * terms["jump"], loss)
    for other in (average, anchor):                           # targets are detached
        gradients = torch.autograd.grad(loss, other.parameters(), allow_unused=True, retain_graph=True)
        assert all(g is None for g in gradients)
    ours, theirs = (torch.autograd.grad(v, net.parameters()) for v in (loss, want))
    assert_close(ours, theirs)

@pytest.mark.parametrize("kind", ["eps", "x"])
def test_other_predictions_have_the_loss_of_their_v(kind):
    """What a network predicts does not change the loss: here one that predicts v, asked in other words."""
    net = tiny_net()
    def said(z, t, d=0.0):
        (a, s), v = Cosine()(t), net(z, t, d=d)
        return s * z + a * v if kind == "eps" else a * z - s * v
    x, eps, t, d, jumps, rest = a_batch([True, False] * 3, [1, 2, 3, 4, 5, 6])
    other = Denoiser(said, Cosine(), kind, lengths=True)
    t = t * 0.9 + 0.05 * (d == 0)                             # at t = 1 an ε says nothing of x
    d = d * 0.9
    assert_close(shortcut.shortcut_loss(other, other, x, eps, t, d, None, jumps, rest)[0],
                 shortcut.shortcut_loss(hat(net), hat(net), x, eps, t, d, None, jumps, rest)[0])

def test_guidance_enters_at_the_shortest_steps_and_nowhere_else():
    net, y, shortest = tiny_net(classes=2), torch.tensor([0, 1, 0, 1, 2, 0]), shortcut.LEVELS - 1
    x, eps, t, d, _, _ = a_batch([True] * 6, [0, 3, shortest - 1, shortest, shortest, shortest])
    a, s = Cosine()(t)
    z = a * x + s * eps
    plain, guided = (shortcut.shortcut_target(hat(net), z, t, y, a, s, d, w) for w in (1.0, 3.0))
    moved = (plain - guided).abs().amax((1, 2, 3)) > 1e-9     # the null class is guided to itself
    assert moved.tolist() == [False, False, False, True, False, True]
    def by_hand(z, t, y, d):
        without = net(z, t, torch.full_like(y, 2), d=d)
        return without + 3 * (net(z, t, y, d=d) - without)
    want = shortcut.shortcut_target(Denoiser(by_hand, Cosine(), lengths=True), z, t, y, a, s, d)
    assert_close(guided[3:], want[3:])

# ---- rows, times, lengths ---------------------------------------------------------------------------------
@pytest.mark.parametrize("b,batch", [(0.25, 32), (0.15, 40), (0.5, 8), (0.125, 64), (0.9, 10), (0.0, 8)])
def test_a_share_of_the_rows_jumps_evenly_spread(b, batch):
    jump = shortcut.jump_rows(batch, b)
    assert jump.shape == (batch,) and jump.sum() == round(b * batch)
    for part in jump.chunk(2):
        assert abs(part.sum() - b * batch / 2) < 1

def test_times_of_jumps_are_on_the_grid_of_their_length_and_end_at_0_or_above():
    torch.manual_seed(0)
    jump, t, k = torch.arange(40_000) % 2 == 0, 1 - torch.rand(40_000), torch.randint(shortcut.LEVELS, (40_000,))
    at, d = shortcut.step_lengths(jump, t, k)
    assert torch.equal(at[~jump], t[~jump]) and not d[~jump].any()
    at, d = at[jump], d[jump]
    assert torch.equal(d, 0.5 ** k[jump]) and torch.equal(at / d, (at / d).round())
    assert (at - d).min() == 0 and at.max() == 1
    for length in d.unique():                                 # every place on its grid, equally often
        counts = (at[d == length] / length).long().bincount()[1:]
        assert len(counts) == 1 / length and counts.min() > 0.5 * counts.float().mean()

# ---- the network ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [{}, dict(classes=4, context_dim=8, attention=[1])])
def test_a_network_takes_the_path_on_and_nothing_changes_until_it_is_trained(config):
    """Also one of LDM's kind, with a label that is looked up as a context."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(**TINY | config))
    for p in net.parameters():                                # no layer at zero
        p.data += 0.1 * torch.randn_like(p)
    z, t, d = torch.randn(4, 3, 8, 8), torch.rand(4), torch.tensor([0.0, 0.3, 1.0, 1 / 64])
    y = torch.arange(4) if config else None
    before = net(z, t, y)
    with pytest.raises(ValueError, match="takes no step length"):
        net(z, t, y, d=d)
    net.add_step_length()
    assert net.config.step_length and torch.equal(net(z, t, y, d=d), before)
    nn.init.normal_(net.length_out.weight)
    after = net(z, t, y, d=d)
    assert torch.equal(after[0], before[0]) and torch.equal(net(z, t, y), before)
    assert all(not torch.allclose(a, b) for a, b in zip(after[1:], before[1:], strict=True))
    assert torch.equal(net(z, t, y, d=0.3)[1], after[1])      # one length for all, as sampling gives it

def test_the_same_seed_gives_both_networks_the_same_weights():
    weights = []
    for step_length in (False, True):
        torch.manual_seed(0)
        weights.append(UNet(UNetConfig(**TINY, step_length=step_length)).state_dict())
    assert same(weights[0], {k: v for k, v in weights[1].items() if not k.startswith("length")})

@pytest.mark.parametrize("schedule", [Cosine(), LDMDistilled()])
@pytest.mark.parametrize("steps,lengths", [
    (1, [1.0]), (4, [1 / 4] * 4), (8, [1 / 8] * 8), (64, [1 / 64] * 64),
    (3, [1 / 4] * 2 + [1 / 2]), (6, [1 / 8] * 4 + [1 / 4] * 2), (63, [1 / 64] * 62 + [1 / 32]), (100, [1 / 100] * 100),
])
def test_n_steps_are_n_evaluations_told_lengths_that_were_learned(schedule, steps, lengths):
    """d = 1/N, or two lengths: always at places where training has those. What is shorter is told as the shortest."""
    seen = []
    def net(z, t, d):
        seen.append((t, d))
        return 0 * z
    ddim_sample(Denoiser(net, schedule, "x", lengths=True), torch.randn(SHAPE), steps)
    assert_close([d for _, d in seen], [max(d, SHORTEST) for d in lengths])
    at = 1 - np.cumsum([0, *lengths[:-1]])
    assert_close([t for t, _ in seen], [schedule.shown(float(t)) for t in at])

def test_ldm_has_no_thousand_steps_with_lengths_either():
    with pytest.raises(ValueError, match="steps must be between 1 and 999"):
        ddim_sample(Denoiser(None, LDMDistilled(), lengths=True), torch.randn(SHAPE), 1000)

# ---- runs -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model of train.py, without step lengths, and the flags that distil it."""
    folder = tmp_path_factory.mktemp("shortcut")
    train.main([*SMALL_RUN, "--updates", "20", "--data", labelled_images(folder / "data"), "--cache",
                str(folder / "cache"), "--out", str(folder / "base")])
    return ["--schedule", "shortcut", "--ckpt", str(folder / "base" / "ckpt.pt"), "--batch", "8", "--steps", "4",
            "--pool", "20", "--log-every", "1", "--device", "cpu", "--dtype", "fp32", "--cache", str(folder / "cache")]

def test_training_learns_to_jump_and_goes_on(small_run, tmp_path, monkeypatch):
    """With classes and guidance; resumed it is the run that was never interrupted."""
    flags = [*small_run, "--distill", "0.25", "--shortcut", "--classes", "--guidance", "2"]
    train.main([*flags, "--updates", "10"])
    whole = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert whole["config"]["step_length"] and whole["weights"]["length_out.weight"].any()
    assert [e["jump"] > 0 for e in log_of(tmp_path / "out")] == [False] * 5 + [True] * 5      # in the second half
    for e in log_of(tmp_path / "out"):
        assert_close(e["loss"], e["v"] + 3 * e["jump"], rtol=1e-4, atol=0)    # with three times the weight
    real, calls, labels = shortcut.shortcut_loss, [], []
    def stops(*args, **kw):
        t, d, y, jumps, rest = args[4:9]
        calls.append(len(jumps))
        labels.append(y)
        assert d[jumps].all() and not d[rest].any()
        assert torch.equal(t[jumps] / d[jumps], (t[jumps] / d[jumps]).round())    # t is a multiple of d
        if len(calls) == 8:
            raise RuntimeError("power cut")
        return real(*args, **kw)
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="power cut"):
        m.setattr(shortcut, "shortcut_loss", stops)
        train.main([*flags, "--updates", "10", "--overwrite"])
    assert calls == [0] * 5 + [4] * 3                         # none of 8 rows, then twice the share of 0.25
    assert torch.cat(labels).unique().tolist() == [0, 1, 2]   # some are dropped, for guidance
    train.main(["--resume", "--out", str(tmp_path / "out")])
    again = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert same(whole["weights"], again["weights"]) and same(whole["ema"], again["ema"])
    assert same(whole["extra_state"]["target"], again["extra_state"]["target"])
    sample.main(["--ckpt", str(tmp_path / "out" / "ckpt.pt"), "--steps", "1", "3", "-n", "2", "--device", "cpu"])
    asked = [["--ckpt", str(tmp_path / "out" / "ckpt.pt"), "--guidance", w, "--steps", "2", "-n", "2", "--device",
              "cpu", "--out", str(tmp_path / f"{w}.png")] for w in "123"]
    with pytest.raises(SystemExit, match="guidance 2 is built into"):
        sample.main(asked[2])
    sample.main(asked[0])
    sample.main(asked[1])                                     # what is built in may be asked for: it is there already
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    assert sample.Sampler(*sample.load_any_model(tmp_path / "out" / "ckpt.pt"), classes=[0]).guidance == 2
    fid.main(["--ckpt", str(tmp_path / "out"), "--steps", "1", "-n", "4", "--weights", "random", "--device", "cpu",
              "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "fid")])
    (score,) = json.loads((tmp_path / "fid" / "table.json").read_text())["out"]
    assert score["fake"]["guidance"] == 2
    with pytest.raises(SystemExit, match="only --schedule shortcut distils it further"):
        distill.main(["--ckpt", str(tmp_path / "out"), "--schedule", "dsdi", "--out", str(tmp_path / "d"), "--device",
                      "cpu"])

def test_the_guidance_that_is_asked_for_is_what_both_trainings_learn(small_run, tmp_path):
    """Nothing else reads it: the batches are the same, and so were the weights if it did not reach the targets."""
    def ends(script, name, w, *flags):
        out = tmp_path / f"{name}-{len(w)}-{w[0]}"
        script.main([*flags, "--updates", "10", "--guidance", *w, "--overwrite", "--out", str(out)])
        return load_checkpoint(out / "ckpt.pt")
    data = [*small_run[:-2], "--classes"]
    train.main([*data, "--updates", "2", "--out", str(tmp_path / "base")])
    tune = ["--schedule", "shortcut", "--ckpt", str(tmp_path / "base"), "--data", str(tmp_path / "data"), "--cache",
            str(tmp_path / "cache"), "--batch", "8", "--device", "cpu"]
    for script, flags, count in ((train, [*data, "--distill", "0.25", "--shortcut"], 1), (distill, tune, 2)):
        first, again, other = (ends(script, script.__name__, [w] * count, *flags) for w in "223")
        assert same(first["weights"], again["weights"]) and not same(first["weights"], other["weights"])
        assert (first["guidance"], other["guidance"]) == (2, 3)

def test_guidance_that_is_built_in_is_not_built_over(small_run, tmp_path, capsys):
    """Samples of the source would be compared with others; and --resume keeps it, too."""
    flags = [*small_run, "--distill", "0.25", "--shortcut", "--classes", "--guidance", "2", "--updates", "2"]
    train.main(flags)
    with pytest.raises(SystemExit, match=r"guidance 2 is built into .*: distil it further with --guidance 2 2"):
        distill.main(["--ckpt", str(tmp_path / "out"), "--schedule", "shortcut", "--guidance", "3", "3", "--out",
                      str(tmp_path / "d"), "--device", "cpu"])
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(tmp_path / "out"), "--guidance", "1"])
    assert "--resume can't change --guidance" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="is finished .2 updates.; distil it further"):       # it can't have more
        train.main(["--resume", "--out", str(tmp_path / "out")])

def test_own_samples_of_an_old_run_stay_as_long_as_it_does(trained, tmp_path, monkeypatch):
    flags = [*trained, "--updates", "1", "--pool", "4", "--overwrite", "--out", str(tmp_path / "out")]
    def pools():
        return {path.name for path in (tmp_path / "out").glob("pool-*")}
    distill.main(flags)
    old, loss = pools(), shortcut.shortcut_loss
    def too_big(*args, **kw):
        raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(shortcut, "shortcut_loss", too_big)
    with pytest.raises(torch.OutOfMemoryError):
        distill.main([*flags, "--seed", "1"])
    assert old < pools() and len(pools()) == 2
    monkeypatch.setattr(shortcut, "shortcut_loss", loss)
    distill.main([*flags, "--seed", "1"])
    new = pools()
    assert len(new) == 1 and new != old
    distill.main(["--schedule", "dsdn", *flags[2:4], *flags[-3:], "--updates", "1", "--batch", "8", "--steps", "4",
                  "--device", "cpu"])
    assert not pools()                                        # another method needs none

@pytest.mark.parametrize("extra", [[], ["--accumulate", "2"]])
def test_fine_tuning_without_data(trained, tmp_path, extra, capsys):
    """The plain model takes the path on and learns to jump; it is the anchor, and its samples are the data."""
    distill.main([*trained, *extra, "--updates", "8", "--out", str(tmp_path / "out")])
    state, log = load_checkpoint(tmp_path / "out" / "ckpt.pt"), log_of(tmp_path / "out")
    base = load_checkpoint(trained[3])
    anchor = {k: v for k, v in state["extra_state"]["anchor"].items() if not k.startswith("length")}
    assert same(anchor, base["ema"]) and log[0]["jump"] > 0
    assert log[0]["v"] < 1e-7 and log[-1]["v"] > log[0]["v"]  # zero but for rounding: the anchor sees other batches
    assert state["config"]["step_length"] and state["history"][-1]["how"] == "shortcut"
    assert "drawing 20 samples of its own: 80 evaluations" in capsys.readouterr().err
    (pool,) = (tmp_path / "out").glob("pool-*")
    samples = np.fromfile(pool, np.float16).reshape(20, 3, 8, 8)
    net, s = sample.load_any_model(trained[3])
    want = sample.Sampler(net, s, torch.device("cpu"), "fp32").draw([shortcut.OwnSamples.FIRST + 7], 4)
    assert_close(torch.from_numpy(samples[7:8]).float(), want, rtol=1e-2, atol=1e-2)
    again = [*trained[:3], str(tmp_path / "out"), *trained[4:], "--updates", "1", "--out", str(tmp_path / "again")]
    distill.main(again)                                       # of this model, too, the ordinary denoiser draws them
    (pool,) = (tmp_path / "again").glob("pool-*")
    sampler = sample.Sampler(*sample.load_any_model(tmp_path / "out" / "ckpt.pt"), torch.device("cpu"), "fp32")
    drawn = np.fromfile(pool, np.float16).reshape(20, 3, 8, 8)[:8]
    for sampler.xhat.lengths in (False, True):
        same_way = sampler.draw(range(shortcut.OwnSamples.FIRST, shortcut.OwnSamples.FIRST + 8), 4).half().numpy()
        assert (same_way == drawn).all() != sampler.xhat.lengths

@pytest.mark.parametrize("script,target_ema", [(train, 0.8), (train, 0.9), (distill, 0.8), (distill, 0.9)])
def test_the_running_average_makes_the_targets(small_run, trained, tmp_path, monkeypatch, script, target_ema):
    """That of --target-ema, or where it is the decay of --ema the average that is sampled."""
    real, seen = shortcut.shortcut_loss, []
    def spy(xhat, average, *rest, **kw):
        seen.append([{k: v.clone() for k, v in hat.net.state_dict().items()} for hat in (xhat, average)])
        return real(xhat, average, *rest, **kw)
    monkeypatch.setattr(shortcut, "shortcut_loss", spy)
    flags = [*trained, "--out", str(tmp_path / "out")] if script is distill else [*small_run, "--distill", "0.25",
                                                                                  "--shortcut"]
    script.main([*flags, "--updates", "4", "--lr", "1e-2", "--warmup", "0", "--ema", "0.9", "--target-ema",
                 str(target_ema)])
    warm = script is train and target_ema == 0.9              # the average that is sampled begins with a shorter memory
    assert len(seen) == 4
    for k in range(3):
        decay = min(target_ema, (1 + k) / (10 + k)) if warm else target_ema
        (_, before), (weights, after) = seen[k], seen[k + 1]
        for name in weights:
            assert_close(after[name], decay * before[name] + (1 - decay) * weights[name])
    assert not same(*seen[-1])

def test_own_samples_have_the_labels_that_they_were_drawn_with(tmp_path):
    """Of any number of classes: three do not divide the number of the first one's noise."""
    net = UNet(UNetConfig(**TINY, classes=3))
    sampler = sample.Sampler(net, dict(schedule="cosine", predicts="v", shape=SHAPE[1:]), classes=range(3))
    real, seen = sampler.draw, []
    sampler.draw = lambda numbers, steps: (seen.append(sampler.labels(numbers)), real(numbers, steps))[1]
    pool = shortcut.OwnSamples(tmp_path, sampler, 7, 2, 4, [])
    assert pool.labels.tolist() == torch.cat(seen).tolist() and len(set(pool.labels)) == 3

def test_the_path_that_a_model_takes_on_is_that_of_the_seed(trained, tmp_path):
    """Whatever else a process did before."""
    def path(seed):
        torch.rand(3)
        distill.main([*trained, "--updates", "1", "--warmup", "100", "--seed", str(seed), "--overwrite", "--out",
                      str(tmp_path / "out")])
        return load_checkpoint(tmp_path / "out" / "ckpt.pt")["weights"]["length_in.weight"].clone()
    first, other, again = path(0), path(1), path(0)
    assert (first == again).all() and (first - other).abs().max() > 1e-2

def test_data_with_other_classes_is_refused(small_run, trained, tmp_path):
    """Their numbers would be those of other classes of the model."""
    train.main([*small_run, "--classes", "--updates", "2"])
    flags = [*trained[:2], "--ckpt", str(tmp_path / "out"), *trained[4:], "--updates", "2", "--out",
             str(tmp_path / "jumps")]
    with pytest.raises(SystemExit, match="the model's classes are not those of the data, which differ in: b, c"):
        distill.main([*flags, "--data", labelled_images(tmp_path / "others", classes="ac")])
    distill.main([*flags, "--data", labelled_images(tmp_path / "same", classes="ab")])

def test_drawing_that_was_killed_goes_on_and_so_does_the_run(trained, tmp_path, monkeypatch):
    flags = [*trained, "--pool", "80", "--steps", "16", "--updates", "6", "--save-every", "3", "--sample-every", "0"]
    child = start("distill.py", *flags, "--out", tmp_path / "cut")
    def part():
        return next((tmp_path / "cut").glob("pool-*.part"), None)
    while not (part() and part().stat().st_size):
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = part().stat().st_size // (2 * 3 * 64)
    assert before < 80
    with open(part(), "ab") as f:                             # and of one more, a part
        f.write(b"cut off")
    real, drawn = sample.Sampler.draw, []
    monkeypatch.setattr(sample.Sampler, "draw", lambda self, numbers, steps: (
        drawn.extend(numbers), real(self, numbers, steps))[1])
    distill.main([*flags, "--out", str(tmp_path / "cut")])
    first = min(number for number in drawn if number >= shortcut.OwnSamples.FIRST)
    assert first == shortcut.OwnSamples.FIRST + before        # not those that were there
    distill.main([*flags, "--out", str(tmp_path / "whole")])
    pools = [next((tmp_path / out).glob("pool-*")) for out in ("cut", "whole")]
    assert pools[0].name == pools[1].name and pools[0].suffix == ".f16"
    assert pools[0].read_bytes() == pools[1].read_bytes()
    a, b = (load_checkpoint(tmp_path / out / "ckpt.pt") for out in ("cut", "whole"))
    assert same(a["weights"], b["weights"])

@pytest.mark.parametrize("script,flags,message", [
    (train, ["--shortcut"], "--shortcut needs a share of the rows"),
    (train, ["--shortcut", "--distill", "1"], "--shortcut needs a share of the rows"),
    (train, ["--guidance", "2"], "--guidance is for --shortcut with --classes"),
    (distill, ["--schedule", "shortcut", "--guidance", "1", "2"], "give it twice"),
])
def test_what_makes_no_sense_is_refused(script, flags, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(flags)
    assert message in capsys.readouterr().err
