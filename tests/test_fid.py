"""fid.py, scores.py, inception.py against values of pytorch-fid and torch-fidelity (fid_golden.npz), and against numpy.

The reference network had synthetic weights, made by the rule in `synthetic`: a network that agrees on
those has the right graph, and with the released weights gives the released features.
"""

import hashlib
import io
import json
import math
import pickle
import urllib.error
import zipfile
import zlib
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import Tiny, log_of
from PIL import Image
from test_sample import make_checkpoint
from torch.testing import assert_close

import fid
import inception
import sample as sampling
import scores
from data import DataError

HERE = Path(__file__).parent
GOLDEN = np.load(HERE / "fid_golden.npz")
KEYS = json.loads((HERE / "inception_keys.json").read_text())
CPU = torch.device("cpu")

def synthetic(key, shape):
    g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("running_var"):
        return 1 + 0.1 * torch.rand(shape, generator=g)
    z = torch.randn(shape, generator=g)
    if key.endswith("conv.weight"):
        return z * math.sqrt(2 / math.prod(shape[1:]))
    if key == "fc.weight":
        return z / math.sqrt(shape[1])
    return 1 + 0.1 * z if key.endswith("bn.weight") else 0.1 * z

@pytest.fixture(scope="module")
def released():
    return {k: synthetic(k, s) for k, s in KEYS}

@pytest.fixture
def tiny(monkeypatch):
    features = inception.Features(Tiny(), "tiny", CPU)
    monkeypatch.setattr(fid, "load_features", lambda *a: features)
    return features

class Rows:
    """A stand-in for Features: `numbered` image i has row i of an array as its features, and of another as logits."""

    def __init__(self, features, logits=None):
        self.features = torch.as_tensor(features)
        self.logits = torch.zeros(len(features), 2) if logits is None else torch.as_tensor(logits)
        weight = torch.empty(self.logits.shape[1], self.features.shape[1])
        self.net, self.id, self.device = SimpleNamespace(fc=SimpleNamespace(weight=weight)), "rows", CPU

    def __call__(self, images):
        index = [int(image[0, 0].astype(int) @ [1, 256, 65536]) for image in images]
        return self.features[index], self.logits[index]

    def statistics(self, batch=64, **kw):
        n = len(self.features)
        images = np.stack([np.arange(n) >> shift & 255 for shift in (0, 8, 16)], 1).astype(np.uint8)[:, None, None]
        return scores.statistics_of_batches(fid.own_batches(images, batch), n, self, {}, "rows", **kw)

def pictures(n, seed=0, shape=(8, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)

def folder_of(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03}.png")
    return path

# ---- the network ------------------------------------------------------------------------------------------
def statistics_of(path, features, **kw):
    """The statistics of one side of a comparison of files."""
    return fid.open_side(path, **kw).compute(features)

def test_the_synthetic_weights_are_the_reference_ones(released):
    """If this fails, the random stream differs, and nothing below can match."""
    for (key, _), (total, absolute, first) in zip(KEYS, GOLDEN["weights_check"], strict=True):
        w = released[key].double().flatten()
        assert abs(w.sum() - total) <= 1e-6 * absolute and abs(w[0] - first) <= 1e-6 * max(absolute, 1)

@pytest.mark.parametrize("tag", ["64", "32x48", "400x360"])
def test_features_and_logits_are_those_of_pytorch_fid(released, tag):
    net = inception.Inception().eval()
    net.load_state_dict(inception.fold(released))
    features, logits = inception.Features(net, "", CPU)(GOLDEN[f"images_{tag}"])
    for out, name in ((features, "pool3"), (logits, "logits_unbiased")):
        reference = torch.from_numpy(GOLDEN[f"{name}_{tag}"])
        assert (out - reference).norm() / reference.norm() < 2e-5

def test_images_of_different_sizes_may_share_a_batch(released):
    net = inception.Inception().eval()
    net.load_state_dict(inception.fold(released))
    features = inception.Features(net, "", CPU)
    a, b = GOLDEN["images_64"][0], GOLDEN["images_32x48"][0]
    assert_close(features([a, b])[0], torch.cat([features(a[None])[0], features(b[None])[0]]), rtol=1e-4, atol=1e-5)

def test_weights_load_by_name_with_or_without_counters_and_nothing_else(released, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(dict(reversed(released.items())), path)
    a = inception.load_features(path)
    torch.save({k: v for k, v in released.items() if "num_batches" not in k}, path)
    b = inception.load_features(path)
    assert all(torch.equal(p, q) for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True))
    assert a.id != b.id and len(a.id) == 64     # other bytes: other name, until someone looks closer
    for change, message in (
        (lambda w: w.pop("Mixed_6b.branch7x7_2.bn.bias"), "Mixed_6b.branch7x7_2.bn.bias"),
        (lambda w: w.update({"AuxLogits.fc.weight": torch.zeros(2)}), "surplus AuxLogits.fc.weight"),
        (lambda w: w.update({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 5, 5)}), "Conv2d_1a_3x3.weight"),
    ):
        broken = dict(released)
        change(broken)
        torch.save(broken, path)
        with pytest.raises(SystemExit, match=message):
            inception.load_features(path)

def test_a_weights_file_runs_no_code(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return print, ("code from a file",)

    bomb = pickle.dumps({"fc.weight": Bomb()}, protocol=2)
    for name, content in (("bomb.pth", bomb), ("junk.pth", b"junk"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match="does not hold the Inception weights") as e:
            inception.load_features(tmp_path / name)
        assert "\n" not in str(e.value)
    with pytest.raises(SystemExit, match=r"missing\.pth does not hold the Inception weights .*No such file.*--weights"):
        inception.load_features(tmp_path / "missing.pth")
    assert "code from a file" not in capsys.readouterr().out

def test_random_weights_are_the_same_everywhere_and_never_called_fid():
    state = torch.get_rng_state()
    a, b = inception.load_features("random"), inception.load_features("random")
    assert torch.equal(torch.get_rng_state(), state)            # or training with --fid-every would be another training
    assert a.id == b.id == "random-72007735"
    features = a(pictures(3, shape=(16, 16, 3)))[0]
    assert features.isfinite().all() and features.std(0).mean() > 0.01
    assert scores.metric_names(a.id) == ("rFID (random features)", None, *(
        f"r{name} (random features)" for name in ("KID", "precision", "recall")))
    assert scores.metric_names(inception.SHA256)[0] == "FID"
    assert scores.metric_names("ab" * 32)[0] == "FD (weights abababab)"
    assert "FID" not in scores.metric_names("ab" * 32)

# ---- fetching the weights -----------------------------------------------------------------------------------
def test_without_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("DSD_CACHE", str(tmp_path))

    def offline(*a, **k):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(SystemExit) as e:
        inception.load_features()
    for part in (inception.URL, "no route", "95,628,359", str(tmp_path), "--weights"):
        assert part in str(e.value)
    assert "\n" not in str(e.value) and list(tmp_path.iterdir()) == []

class Answer(io.BytesIO):
    """What a server sends."""

    def info(self):
        return Message()

def test_a_download_is_checked_and_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    content = b"weights" * 1000
    monkeypatch.setenv("DSD_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *a, **k: Answer(content))
    with pytest.raises(SystemExit, match="invalid hash"):
        inception.fetch_weights()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(content).hexdigest())
    path = inception.fetch_weights()
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    path.write_bytes(content[:-1])                              # damaged: it is fetched again
    assert inception.fetch_weights().read_bytes() == content
    monkeypatch.setattr(torch.hub, "urlopen", None)             # a further download would fail
    assert inception.fetch_weights() == path
    path.write_bytes(b"")
    with pytest.raises(SystemExit, match="is damaged, and can't fetch"):
        inception.fetch_weights()

# ---- statistics and scores -----------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_streamed_moments_are_those_of_numpy(batch):
    x = torch.randn(130, 5) * 3 + 100
    stats = Rows(x).statistics(batch)
    np.testing.assert_allclose(stats.mu, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.sigma, np.cov(x.double().numpy(), rowvar=False), rtol=1e-8, atol=1e-9)

def moments(x):
    x = x.astype(np.float64)
    return x.mean(0), np.cov(x, rowvar=False)

def test_frechet_distances_are_the_references():
    mu1, sigma1, mu2, sigma2 = (GOLDEN[f"wc64_{k}"] for k in ("mu1", "sigma1", "mu2", "sigma2"))
    far = scores.frechet_distance(mu1, sigma1, mu2, sigma2)
    assert far == pytest.approx(GOLDEN["wc64_fid_exact"].item(), rel=1e-10)
    assert abs(scores.frechet_distance(mu1, sigma1, mu1, sigma1)) < 1e-9
    shift = scores.frechet_distance(mu1, sigma1, mu2, sigma1)
    assert shift == pytest.approx(GOLDEN["shift64_fid_exact"].item(), rel=1e-10)

def test_singular_covariances_need_no_fudge():
    """Rank 49 of 256: the accurate value, where a general matrix root is 2e-5 off."""
    one, two = moments(GOLDEN["rd256_feat1"]), moments(GOLDEN["rd256_feat2"])
    exact = GOLDEN["rd256_fid_exact"].item()
    assert scores.frechet_distance(*one, *two) == pytest.approx(exact, abs=1e-8)
    assert scores.frechet_distance(*two, *one) == pytest.approx(exact, abs=1e-8)
    assert abs(scores.frechet_distance(*one, *one)) < 1e-8
    full = (one[0], one[1] + np.eye(256))                      # one side singular, the other not
    assert scores.frechet_distance(*one, *full) == pytest.approx(scores.frechet_distance(*full, *one), abs=1e-8)
    zero = (one[0], np.zeros((256, 256)))
    assert scores.frechet_distance(*zero, *one) == pytest.approx(np.trace(one[1]))

def test_statistics_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="different length: 2 and 3"):
        scores.frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="not finite"):
        scores.frechet_distance(np.zeros(2), np.eye(2) * np.nan, np.zeros(2), np.eye(2))

@pytest.mark.parametrize("n", [400, 403])
@pytest.mark.parametrize("splits", [10, 1])
def test_inception_score_is_the_reference(n, splits):
    logits = GOLDEN["is_logits"][:n]
    stats = Rows(logits[:, :2], logits).statistics(splits=splits)
    np.testing.assert_allclose(stats.score, GOLDEN[f"is{n}_ordered_splits{splits}"], rtol=1e-6, atol=1e-12)

def test_kid_is_the_reference():
    x, y = GOLDEN["kid_x"], GOLDEN["kid_y"]
    assert scores.mmd2(x, y) == pytest.approx(GOLDEN["kid_mmd2_full"].item(), rel=1e-9)
    assert scores.mmd2(x, y[:150]) == pytest.approx(GOLDEN["kid_mmd2_200v150"].item(), rel=1e-9)
    assert scores.mmd2(x[:100], x[100:]) == pytest.approx(GOLDEN["kid_mmd2_self_halves"].item(), rel=1e-9)
    np.testing.assert_allclose(scores.kid(x, y, 20, 50), GOLDEN["kid_subsets20x50"], rtol=1e-9)
    assert scores.kid(x, y) == (scores.mmd2(x, y), 0.0)

def test_fidelity_is_1_for_the_same_a_half_for_the_average_and_0_for_others():
    torch.manual_seed(0)
    r, other = torch.randn(2, 2000, 3, 4, 4).unbind()
    assert scores.fidelity(r, r) == (1, 0)
    assert scores.fidelity(r.mean(0).expand_as(r), r)[0] == pytest.approx(0.5, abs=1e-3)
    assert scores.fidelity(other, r)[0] == pytest.approx(0, abs=0.01)
    assert scores.fidelity(other.flip(0), r.flip(0))[0] == pytest.approx(scores.fidelity(other, r)[0], abs=1e-6)
    value, error = scores.fidelity(other[:500], r[:500])         # its standard error is that of the mean
    assert abs(value) < 4 * error and error == pytest.approx(scores.fidelity(other, r)[1] * 2, rel=0.2)

def test_precision_and_recall_are_the_reference():
    """Of torch-fidelity 0.4.0, `prc_features_to_metric` with a neighbourhood of 3."""
    real, fake = (torch.from_numpy(GOLDEN[f"kid_{k}"]).double() for k in "xy")
    for fakes, reference in ((fake, (0.265, 0.96)), (fake[:150], (37 / 150, 0.965)),
                             ((real.mean(0) + fake) / 2, (1, 0))):
        assert scores.precision_recall(real, fakes) == pytest.approx(reference, abs=1e-6)

@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_what_the_definition_says(k):
    real, fake = np.random.default_rng(0).normal(size=(40, 3)), np.random.default_rng(1).normal(2, 1, (30, 3))
    def within(points, manifold):
        radii = [sorted(math.dist(a, b) for b in manifold)[k] for a in manifold]              # the 0th is itself
        return np.mean([any(math.dist(p, a) <= r for a, r in zip(manifold, radii, strict=True)) for p in points])
    got = scores.precision_recall(torch.from_numpy(real), torch.from_numpy(fake), k)
    assert got == (within(fake, real), within(real, fake)) and 0 < got[0] != got[1] < 1

def test_samples_without_variety_are_precise_and_recall_little():
    """The direction: exchanged, a collapsed model would have the better recall."""
    real = torch.randn(1500, 2, generator=torch.Generator().manual_seed(0))
    fake = torch.randn(1500, 2, generator=torch.Generator().manual_seed(1))
    collapsed, noisy = 0.05 * fake, 20 * fake
    found = scores.compare(*(Rows(x).statistics() for x in (real, collapsed)))["scores"]
    names = scores.metric_names("rows")[3:]
    assert names == ("precision (weights rows)", "recall (weights rows)")
    assert found[names[0]] > 0.95 and found[names[1]] < 0.05
    precision, recall = scores.precision_recall(real.double(), noisy.double())
    assert precision < 0.1 and recall > 0.5

def test_precision_and_recall_are_of_equally_many():
    real, fake = (Rows(torch.randn(n, 2, generator=torch.Generator().manual_seed(n))).statistics() for n in (400, 50))
    result = scores.compare(real, fake)
    assert result["features"]["precision and recall"] == "k = 3, 50 of each"
    some, all_of_them = scores.equally_many(real.kid_features, fake.kid_features)
    assert len(some) == 50 and set(some[:, 0].tolist()) < set(real.kid_features[:, 0].astype(float).tolist())
    assert np.array_equal(all_of_them, fake.kid_features) and not torch.equal(some, torch.from_numpy(
        real.kid_features[:50]).double())                     # not the first: a folder may be sorted by class
    assert [result["scores"][name] for name in scores.metric_names("rows")[3:]] == list(
        scores.precision_recall(some, all_of_them))
    few = Rows(torch.randn(3, 2)).statistics()
    assert not any("recall" in name for name in scores.compare(real, few)["scores"])

def test_features_kept_for_kid_are_a_bounded_uniform_and_repeatable_choice():
    n = 4 * scores.KEPT
    kept = Rows(torch.arange(float(n))[:, None]).statistics(64).kid_features[:, 0]
    assert len(kept) == len(set(kept)) == scores.KEPT and kept.dtype == np.float32
    assert np.array_equal(kept, scores.chosen_for_kid(n))
    assert np.array_equal(kept, Rows(torch.arange(float(n))[:, None]).statistics(97).kid_features[:, 0])
    tenths = np.bincount((kept * 10 // n).astype(int), minlength=10)
    assert np.abs(tenths - scores.KEPT / 10).max() < 5 * math.sqrt(scores.KEPT / 10)
    few = torch.randn(scores.KEPT, 1)
    assert np.array_equal(Rows(few).statistics().kid_features, few)               # all there are, in order

def test_contrast_and_size_are_those_of_all_images(tiny):
    wide, tall = pictures(3, shape=(4, 8, 3)), pictures(5, seed=1, shape=(8, 4, 3))
    stats = scores.statistics_of_batches(fid.own_batches(wide, 2), 3, tiny, {"source": "here"}, "images")
    assert stats.provenance == dict(images=3, size="8x4", source="here", splits=10,
                                    contrast=round((wide / 127.5 - 1).std(), 4))
    stats = scores.statistics_of_batches(fid.own_batches([*wide, *tall], 2), 8, tiny, {}, "images")
    pixels = np.concatenate([wide.ravel(), tall.ravel()]) / 127.5 - 1
    assert stats.provenance == dict(images=8, size="mixed", splits=10, contrast=round(pixels.std(), 4))

@pytest.mark.parametrize("shape", [(4, 8, 3), (8, 4, 3)])
def test_images_that_differ_in_one_side_are_mixed(tiny, shape):
    images = [*pictures(3, shape=(8, 8, 3)), *pictures(3, shape=shape)]
    stats = scores.statistics_of_batches(fid.own_batches(images, 2), 6, tiny, {}, "images")
    assert stats.provenance["size"] == "mixed"

def test_ranks_take_batches_in_turn_and_leave_none_out(monkeypatch):
    monkeypatch.setattr(fid, "ranks", lambda: 3)
    taken = []
    for number in range(3):
        monkeypatch.setattr(fid, "rank", lambda number=number: number)
        taken.append(list(fid.own_batches(range(14), 2)))
    assert [[start for start, _ in own] for own in taken] == [[0, 6, 12], [2, 8], [4, 10]]
    assert all(items == list(range(start, start + 2)) for own in taken for start, items in own)

def test_what_makes_no_statistics_is_refused(tiny):
    with pytest.raises(SystemExit, match="few: a covariance needs at least two images"):
        scores.statistics_of_batches(fid.own_batches(pictures(1), 2), 1, tiny, {}, "few")
    with pytest.raises(SystemExit, match="rows: features are not finite"):
        Rows(torch.tensor([[1.0], [math.nan]])).statistics()

def on_two_ranks(number, folder):
    """Rank `number` of two: statistics of three sources, which rank 0 writes down."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=number, world_size=2)
    stats = statistics_of_three(folder)
    assert number == 0 or stats == [None] * 3
    for i, s in enumerate(stats if number == 0 else []):
        s.save(folder / f"two-{i}.npz")
    dist.destroy_process_group()

def statistics_of_three(folder):
    """Statistics of files and of an npz, and of so few images that a second rank has none."""
    tiny = inception.Features(Tiny(), "tiny", CPU)
    return [statistics_of(folder / name, tiny, batch=batch)
            for name, batch in (("f", 3), ("a.npz", 4), ("a.npz", 64))]

def test_statistics_of_two_ranks_are_those_of_one(tmp_path):
    folder_of(tmp_path / "f", pictures(23))
    np.savez(tmp_path / "a.npz", pictures(30))
    torch.multiprocessing.spawn(on_two_ranks, (tmp_path,), nprocs=2)
    for i, one in enumerate(statistics_of_three(tmp_path)):
        two = scores.Statistics.load(tmp_path / f"two-{i}.npz")
        for a, b in ((one.mu, two.mu), (one.sigma, two.sigma), (one.score, two.score)):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(one.kid_features, two.kid_features, rtol=1e-6)    # float32: of other batches
        assert one.provenance == two.provenance

# ---- sources --------------------------------------------------------------------------------------------------
def test_folder_zip_and_npz_of_the_same_images_give_the_same(tmp_path, tiny):
    images = pictures(20)
    folder = folder_of(tmp_path / "f", images)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        for f in sorted(folder.iterdir()):
            z.write(f, f.name)
    np.savez(tmp_path / "a.npz", images)
    np.savez_compressed(tmp_path / "b.npz", arr_0=images, arr_1=np.zeros(20))
    expected = moments(tiny(images)[0].numpy())
    for name in ("f", "z.zip", "a.npz", "b.npz"):
        stats = statistics_of(tmp_path / name, tiny, batch=6)
        assert stats.provenance["images"] == 20 and stats.provenance["size"] == "8x8"
        np.testing.assert_allclose(stats.mu, expected[0], rtol=1e-6)
        np.testing.assert_allclose(stats.sigma, expected[1], rtol=1e-5, atol=1e-9)

def test_the_last_short_batch_counts(tmp_path, tiny):
    np.savez(tmp_path / "a.npz", pictures(13))
    one, many = (statistics_of(tmp_path / "a.npz", tiny, batch=b) for b in (13, 4))
    assert one.provenance == many.provenance and one.provenance["images"] == 13
    np.testing.assert_allclose(one.sigma, many.sigma, rtol=1e-6, atol=1e-10)

def test_statistics_go_to_and_come_from_pytorch_fid(tmp_path, tiny):
    np.savez(tmp_path / "images.npz", pictures(20))
    stats = statistics_of(tmp_path / "images.npz", tiny)
    stats.save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as f:                   # what pytorch-fid does with a file of statistics
        mu, sigma = f["mu"][:], f["sigma"][:]
    again = statistics_of(tmp_path / "ours.npz", tiny)
    assert again.provenance == stats.provenance and again.weights == "tiny" and tuple(again.score) == stats.score
    assert again.provenance["source"] == str(tmp_path / "images.npz")
    assert np.array_equal(again.kid_features, stats.kid_features)
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    theirs = statistics_of(tmp_path / "theirs.npz", tiny)
    assert theirs.weights == inception.SHA256 and theirs.kid_features is None   # pytorch-fid knows no other weights
    with pytest.raises(SystemExit, match="different networks"):
        scores.compare(theirs, again)
    again.weights = inception.SHA256
    found = scores.compare(theirs, again)["scores"]
    assert abs(found["FID"]) < 1e-9 and "KID" not in found
    fid.main([str(tmp_path / "theirs.npz"), str(tmp_path / "theirs.npz"), "--device", "cpu"])   # needs no network

def test_statistics_of_another_version_are_refused(tmp_path, tiny, monkeypatch):
    np.savez(tmp_path / "images.npz", pictures(20))
    stats = statistics_of(tmp_path / "images.npz", tiny)
    monkeypatch.setattr(scores, "VERSION", scores.VERSION + 1)
    stats.save(tmp_path / "newer.npz")
    monkeypatch.undo()
    about = dict(n=20, weights="tiny", size="8x8", score=[1, 0], card={})         # as the first version had it
    np.savez(tmp_path / "older.npz", mu=stats.mu, sigma=stats.sigma, about=json.dumps(about))
    for name in ("newer.npz", "older.npz"):
        with pytest.raises(DataError, match=f"{name} holds statistics of another version of fid.py"):
            statistics_of(tmp_path / name, tiny)

@pytest.mark.parametrize("content,message", [
    (b"junk", "no readable npz"),
    (dict(arr_0=np.zeros((5, 8, 8, 3))), "must be .N, H, W, 3. uint8"),
    (dict(arr_0=np.zeros((5, 8, 8), np.uint8)), "must be .N, H, W, 3. uint8"),
    (dict(mu=np.zeros(3)), "no readable statistics"),
    (dict(mu=np.zeros(3), sigma=np.eye(2)), "do not fit each other"),
    (dict(arr_0=np.array([{}], dtype=object)), "no images and no statistics"),
])
def test_bad_npz_files_are_one_line_errors(tmp_path, tiny, content, message):
    path = tmp_path / "x.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    with pytest.raises(DataError, match=message) as e:
        statistics_of(path, tiny)
    assert "\n" not in str(e.value)

def test_a_damaged_npz_is_a_one_line_error(tmp_path, tiny):
    np.savez_compressed(tmp_path / "a.npz", pictures(50))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[2000:2100] = bytes(100)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="holds no images and no statistics"):
        statistics_of(tmp_path / "a.npz", tiny, batch=4)

def test_a_broken_image_ends_the_comparison_with_its_name(tmp_path, tiny):
    folder = folder_of(tmp_path / "f", pictures(5))
    (folder / "002.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"002\.png in .* can't be read"):
        statistics_of(folder, tiny)

def test_unlike_things_are_not_compared(tmp_path, tiny, capsys):
    for name, shape in (("a", (8, 8, 3)), ("b", (9, 8, 3))):
        np.savez(tmp_path / f"{name}.npz", pictures(20, shape=shape))
    a, b = (statistics_of(tmp_path / f"{n}.npz", tiny) for n in "ab")
    with pytest.raises(SystemExit, match="sizes can't be compared: REAL has 8x8, FAKE 8x9"):
        scores.compare(a, b)
    other = statistics_of(tmp_path / "a.npz", inception.Features(Tiny(), "other", CPU))
    with pytest.raises(SystemExit, match="different networks can't be compared: REAL has tiny, FAKE other"):
        scores.compare(a, other)
    bf16 = statistics_of(tmp_path / "a.npz", inception.Features(Tiny(), "tiny", CPU, "bf16"))
    with pytest.raises(SystemExit, match="FAKE tiny-bf16"):
        scores.compare(a, bf16)
    capsys.readouterr()
    scores.compare(a, a)
    assert "images" not in capsys.readouterr().err
    few = scores.statistics_of_batches(fid.own_batches(pictures(5), 5), 5, tiny, {}, "few")
    scores.compare(few, a)
    assert "REAL has 5 images, fewer than the 6 features" in capsys.readouterr().err

# ---- the command line -------------------------------------------------------------------------------------------
@pytest.mark.whole
def test_two_folders_from_the_command_line_with_the_real_network(tmp_path, capsys):
    a, b = folder_of(tmp_path / "a", pictures(4)), folder_of(tmp_path / "b", pictures(4, seed=1))
    fid.main([str(a), str(b), "--weights", "random", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "rFID (random features): " in out and "\nFID" not in out
    assert "images 4, size 8x8" in out and "random-" in out

def test_real_images_are_prepared_as_training_does(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setenv("DSD_CACHE", str(tmp_path / "cache"))
    real = folder_of(tmp_path / "real", pictures(6, shape=(20, 16, 3)))
    fake = folder_of(tmp_path / "fake", pictures(6))
    with pytest.raises(SystemExit, match="REAL has 16x20, FAKE 8x8.* --size N"):
        fid.main([str(real), str(fake)])
    fid.main([str(real), str(fake), "--size", "8", "--crop", "12", "--cache", str(tmp_path / "there")])
    assert list((tmp_path / "there").iterdir()) and not (tmp_path / "cache").exists()
    assert "crop 12.0, PIL bicubic to 8x8" in capsys.readouterr().out
    no_network = inception.Features(None, "tiny", CPU)                # the statistics come from their file
    assert fid.packed_statistics(fid.load_data(real, 8, 12.0, tmp_path / "there"), no_network).provenance["images"] == 6

@pytest.fixture
def model(tmp_path, monkeypatch):
    """A checkpoint, and the flags to score it on twelve images."""
    monkeypatch.setenv("DSD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "run").mkdir()
    make_checkpoint(tmp_path / "run" / "ckpt.pt")
    data = folder_of(tmp_path / "data", pictures(12))
    return ["--ckpt", str(tmp_path / "run" / "ckpt.pt"), "--data", str(data), "-n", "10", "--batch", "4",
            "--steps", "2", "3", "--device", "cpu", "--dtype", "fp32", "--out", str(tmp_path / "scores")]

def test_a_model_is_scored_as_its_saved_images_would_be(tmp_path, tiny, model):
    fid.main(model)
    results = json.loads((tmp_path / "scores" / "table.json").read_text())
    two, three = results["run"]
    assert two["fake"].pop("contrast") == two["scores"]["contrast"]
    assert two["fake"] | {"hash": 0} == dict(
        images=10, size="8x8", checkpoint=model[1], hash=0, weights="ema", dtype="fp32", steps=2, seed=0, guidance=1.0,
        classes=None, splits=10)
    assert three["fake"]["steps"] == 3 and two["real"]["images"] == 12
    sampling.main([*model[:2], "-n", "10", "--steps", "2", "--save", str(tmp_path / "png"), "--device", "cpu",
                   "--dtype", "fp32"])
    saved = scores.compare(statistics_of(model[3], tiny), statistics_of(tmp_path / "png", tiny))
    assert two["scores"].keys() - saved["scores"].keys() == {"fidelity", "fidelity std"}
    for name, value in saved["scores"].items():
        assert value == pytest.approx(two["scores"][name], rel=1e-5, abs=1e-9), name
    pixels = np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / "png").glob("*.png"))]) / 127.5 - 1
    assert two["scores"]["contrast"] == pytest.approx(pixels.std(), abs=1e-4)
    text = (tmp_path / "scores" / "table.md").read_text()
    assert "| model | images | 2 | 3 |" in text and "| run | 10 |" in text and "Against 12 of data-8" in text
    assert "seed 0, ema weights, fp32, guidance 1" in text

def test_greyscale_models_are_scored_against_the_lightness_of_the_data(tmp_path, tiny):
    images = fid.load_data(folder_of(tmp_path / "data", pictures(12)), 8, None, tmp_path / "cache")
    colour = fid.packed_statistics(images, tiny)
    images.channels = 1
    grey = fid.packed_statistics(images, tiny)
    lightness = [np.asarray(Image.fromarray(p).convert("L").convert("RGB")) for p in images.pixels]
    folder_of(tmp_path / "grey", lightness)
    assert_close(grey.mu, statistics_of(tmp_path / "grey", tiny).mu, rtol=0, atol=0.01)
    assert np.abs(grey.mu - colour.mu).max() > 0.01 and grey.provenance["prepared"].endswith("greyscale")

def test_an_interrupted_evaluation_goes_on(tmp_path, tiny, model, monkeypatch):
    drawn, original = [], sampling.Sampler.__call__

    def counting(self, indices, steps):
        drawn.extend([steps] * (steps > 1))                   # one step: to tell the time beforehand
        if steps == 3 and len(drawn) == 4:
            raise KeyboardInterrupt
        return original(self, indices, steps)

    monkeypatch.setattr(sampling.Sampler, "__call__", counting)
    with pytest.raises(KeyboardInterrupt):                    # which `launch` tells
        fid.main(model)
    assert drawn == [2, 2, 2, 3]
    fid.main(model)
    assert drawn[4:] == [3, 3, 3]                               # two steps were known
    fid.main(model)
    assert len(drawn) == 7
    fid.main([*model, "--seed", "1", "--steps", "2"])           # another seed is another score
    assert len(drawn) == 10
    (tmp_path / "data").rename(tmp_path / "moved")              # the same images elsewhere are not
    fid.main([*model, "--data", str(tmp_path / "moved")])
    assert len(drawn) == 10
    (results,) = json.loads((tmp_path / "scores" / "table.json").read_text()).values()
    assert all(r["real"]["source"].startswith("moved-8") for r in results)
    Image.fromarray(pictures(1, seed=1)[0]).save(tmp_path / "moved" / "000.png")      # as many, but another
    fid.main([*model, "--data", str(tmp_path / "moved"), "--steps", "2"])
    assert len(drawn) == 13

def test_several_models_make_a_table(tmp_path, tiny, model):
    (tmp_path / "other").mkdir()
    make_checkpoint(tmp_path / "other" / "ckpt.pt", classes=3)
    fid.main([model[0], model[1], str(tmp_path / "other" / "ckpt.pt"), *model[2:]])
    text = (tmp_path / "scores" / "table.md").read_text()
    assert "| run | 10 |" in text and "| other | 10 |" in text
    results = json.loads((tmp_path / "scores" / "table.json").read_text())
    assert results["other"][0]["fake"]["classes"] == "uniform"
    del results["run"][0]["scores"]["fidelity"]                  # as of a model whose reference had other guidance
    assert "**fidelity** at N steps" in fid.table(results) and "| run | 10 | – |" in fid.table(results)

def test_scores_are_logged_during_training(tmp_path, tiny, monkeypatch):
    import train

    monkeypatch.setattr("hooks.load_features", lambda *a: tiny)
    monkeypatch.setenv("DSD_CACHE", str(tmp_path / "cache"))
    data = folder_of(tmp_path / "data", pictures(12))
    train.main(["--size", "8", "--channels", "16", "--mult", "1", "2", "--batch", "4", "--updates", "4",
                "--device", "cpu", "--data", str(data), "--out", str(tmp_path / "out"), "--sample-every", "0",
                "--sample-steps", "2",
                "--fid-every", "2", "--fid-samples", "6", "--weights", "random"])
    scored = [e for e in log_of(tmp_path / "out") if "fake" in e]
    assert [e["step"] for e in scored] == [2, 4]
    for e in scored:
        assert math.isfinite(e["FD (weights tiny)"]) and e["features"]["network"] == "tiny"
        assert e["real"]["images"] == 12
        assert e["fake"].items() >= dict(images=6, steps=2, seed=0, weights="ema", size="8x8").items()

@pytest.mark.parametrize("flags,message", [
    ([], "give REAL and FAKE"),
    (["a"], "give REAL and FAKE"),
    (["a", "b", "--ckpt", "c"], "give REAL and FAKE, or one of them with --save, or --ckpt"),
    (["a", "b", "--crop", "3"], "--crop goes with REAL and --size"),
    (["a", "--save", "a"], "ending in .npz"),
    (["a.npz", "--save", "a.npz"], "another than REAL and FAKE"),
    (["a", "b", "-n", "5", "--data", "d", "--steps", "2"], "--data, --steps, -n: of models only, which --ckpt names"),
    (["a", "b", "--seed", "5", "--raw"], "--seed, --raw: of models only"),
    (["a", "b", "--size", "8", "--crop", "-5"], "argument --crop: -5 is not a positive number"),
    (["--ckpt", "c", "--guidance", "nan"], "argument --guidance: nan is not a finite number"),
    (["--ckpt", "c", "--save", "x.npz"], "and image files"),
    (["--ckpt", "c", "--ldm", "celebahq256", "--size", "64", "--crop", "3"], "--crop goes with REAL and --size"),
    (["--ckpt", "c", "-n", "1"], "argument -n: 1 is not a number from 2 on"),
    (["--ckpt", "c", "--steps", "2", "0"], "argument --steps: 0 is not"),
])
def test_bad_flags_are_explained(flags, message, capsys):
    with pytest.raises(SystemExit):
        fid.parse_args(flags)
    assert message in capsys.readouterr().err

def test_missing_files_are_named_before_any_work(monkeypatch):
    monkeypatch.setattr(fid, "load_features", None)             # would fail if it came first
    with pytest.raises(SystemExit, match="no such file or folder: nowhere"):
        fid.main(["nowhere", "neither", "--device", "cpu"])

def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, tiny, monkeypatch):
    def full(*a, **k):
        raise OSError(28, "No space left on device")

    np.savez(tmp_path / "a.npz", pictures(4))
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(SystemExit, match=r"error: can't write .*b\.npz \(No space left on device\)"):
        fid.main([str(tmp_path / "a.npz"), "--save", str(tmp_path / "b.npz"), "--device", "cpu"])
    assert [f.name for f in tmp_path.iterdir()] == ["a.npz"]

def test_a_part_of_the_reference_is_always_the_same_and_told(tmp_path, tiny, model, capsys):
    fid.main([*model, "--real", "5"])
    text = (tmp_path / "scores" / "table.md").read_text()
    assert "Against 5 of the 12 in data-8" in text
    images = fid.load_data(model[3], 8)
    order = np.random.default_rng(0).permutation(12)[:5]
    want = scores.statistics_of_batches(fid.own_batches(images.pixels[order], 5), 5, tiny, {}, "part")
    assert np.abs(fid.packed_statistics(images, tiny, count=5).mu - want.mu).max() < 1e-9
    assert "known from" not in capsys.readouterr().err
    fid.main([*model, "--real", "20"])                        # more than there are: all of them
    assert "Against 12 of data-8" in (tmp_path / "scores" / "table.md").read_text()
    assert "known from" not in capsys.readouterr().err

def test_the_time_is_told_before_it_is_spent(tiny, model, monkeypatch, capsys):
    ticks = iter(range(0, 10_000, 40))                        # four images take 40 s
    monkeypatch.setattr(fid.time, "perf_counter", lambda: next(ticks))
    fid.main(model)
    # 12 images of the reference and 2 x 10 samples to look at, and 10 x (2 + 3) evaluations, of 10 s each
    assert ": 10 samples at 2, 3 steps, 12 images of the reference: about 14 min" in capsys.readouterr().err
