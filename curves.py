"""A picture of a run: OUT/curves.png, what its log.jsonl says along the updates."""

from checkpoint import whole_file
from rundir import read_log
from runtime import rank

STEPS = 1, 2, 4, 8, 64
PANELS = {                                                    # title: keys of the log, of which some may be missing
    "loss": ["loss", "v", "x", "jump"], "norm of the gradient": ["grad_norm"], "learning rate": ["lr"],
    "depth": ["depth"], "fidelity at N steps": [f"fidelity_{n}" for n in STEPS],
    "contrast at N steps": [f"contrast_{n}" for n in STEPS],
}
LOGARITHMIC = "loss", "norm of the gradient", "depth"

def draw_curves(trainer):
    """A hook. Draws nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # no pyplot: it would look for a screen
    except ImportError:
        return
    if rank():
        return
    log = [entry for entry in read_log(trainer.out) if "loss" in entry]
    panels = {title: [key for key in keys if any(key in entry for entry in log)] for title, keys in PANELS.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    if not panels:                                            # the log is gone
        return
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axis.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 30 else "")
        values = [entry[key] for entry in log for key in keys if key in entry]
        axis.set(title=title, xlabel="updates")
        if title in LOGARITHMIC and min(values) >= 0 < max(values):         # 0: of jumps that have not begun
            axis.set_yscale("log", base=2 if title == "depth" else 10)
        if len(keys) > 1:
            axis.legend()
    with whole_file(trainer.out / "curves.png") as tmp:
        figure.savefig(tmp, format="png", dpi=100)
