"""What the experiments share: runs that go on where they stopped, a quick score, tables over seeds."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from checkpoint import load_model, whole_file
from data import load_data, to_tensor
from fid import frechet_distance
from runtime import pick_device, pick_dtype, progress
from sample import Sampler

STEPS = 1, 2, 4, 8, 16, 64

# ---- runs -----------------------------------------------------------------------------------------------
def to_the_end(main, out, flags):
    """A run of train.main or distill.main into `out`: from its start, or from where it stopped; none if finished."""
    try:
        main([*(["--resume"] if (out / "ckpt.pt").exists() else [*flags, "--overwrite"]), "--out", str(out)])
    except SystemExit as e:
        if "is finished" not in str(e.code):
            raise

def seconds(out, batch):
    """What the updates of a run took, from its log: without pictures, checkpoints and own samples."""
    total, before = 0.0, 0
    for line in (out / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "images_per_s" in entry:
            total, before = total + (entry["step"] - before) * batch / entry["images_per_s"], entry["step"]
    return total

# ---- quick score ----------------------------------------------------------------------------------------
class Features(nn.Module):
    """256 features of an image of any size: three strided convolutions with seeded random weights, averaged."""

    def __init__(self):
        super().__init__()
        generator, self.convs = torch.Generator().manual_seed(1), nn.ModuleList()
        for cin, cout, k in ((3, 64, 5), (64, 128, 3), (128, 256, 3)):
            conv = nn.Conv2d(cin, cout, k, stride=2, padding=k // 2)
            conv.weight.data = torch.randn(conv.weight.shape, generator=generator) * (2 / (cin * k * k)) ** 0.5
            conv.bias.data.zero_()
            self.convs.append(conv)

    @torch.no_grad()
    def forward(self, x):
        for conv in self.convs:
            x = conv(x).relu()
        return x.mean((2, 3))

class QuickScore:
    """A Fréchet distance over `Features`, of n samples to a data set: good for ranking settings of one model, and
    comparable with nothing else. It is blind to much, and likes grain: look at the pictures."""

    def __init__(self, data, size, crop=None, n=512):
        self.data, self.features, self.n = load_data(data, size, crop), Features(), n
        self.contrast = to_tensor(self.data.pixels[:2000]).std().item()      # of the data
        self.real = self.statistics(to_tensor(self.data.pixels[i:i + 250]) for i in range(0, len(self.data), 250))

    def statistics(self, batches):
        """Mean and covariance of the features of batches of images."""
        x = torch.cat([self.features(x) for x in batches]).double()
        return x.mean(0), x.T.cov()

    def __call__(self, sampler, steps):
        """(score, contrast) of n samples in `steps` steps; contrast is the standard deviation of all pixels."""
        jobs = [range(i, min(i + 64, self.n)) for i in range(0, self.n, 64)]
        x = torch.cat([sampler(job, steps).float().cpu() for job in jobs]).clamp(-1, 1)
        return frechet_distance(*self.statistics(x.split(250)), *self.real), x.std().item()

    def of_file(self, ckpt, steps=STEPS):
        """[[score, contrast] for each of `steps`] of a checkpoint, kept beside it."""
        kept, stamp = ckpt.with_name("quick.json"), [os.stat(ckpt).st_mtime, self.n, *steps]
        if kept.exists() and json.loads(kept.read_text())["stamp"] == stamp:
            return json.loads(kept.read_text())["scores"]
        device = pick_device()
        sampler = Sampler(*load_model(ckpt, device), device, pick_dtype("auto", device))
        scores = [self(sampler, s) for s in progress(iterable=steps, desc=f"scoring {ckpt.parent.name}")]
        with whole_file(kept) as tmp:
            tmp.write_text(json.dumps(dict(stamp=stamp, scores=scores)))
        return scores

# ---- tables ---------------------------------------------------------------------------------------------
def cell(values):
    """The mean of a score over seeds, and how far the seeds lie apart."""
    mean = sum(values) / len(values)
    return f"{mean:.3g}" + (f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else "")

def row(name, scores, *rest):
    """A line of Markdown: scores of each seed as `QuickScore.of_file` gives them."""
    cells = [f"{cell([s for s, _ in at])} ({sum(c for _, c in at) / len(at):.3f})" for at in zip(*scores, strict=True)]
    return "| " + " | ".join([name, *cells, *rest]) + " |"

def heading(*columns):
    """The first two lines of a table in Markdown."""
    return f"| {' | '.join(map(str, columns))} |\n|{'---|' * len(columns)}"
