"""What a training loop needs that is not in the paper: optimiser, average, log, checkpoints, resuming, signals.

    trainer = Trainer(args, net, device, model_info)
    for step in trainer.steps():                 # after each update: log, checkpoint, hooks, Ctrl-C
        x, t = …                                 # this rank's rows of the batch
        for x, t in trainer.parts(x, t):         # all of them, or --accumulate parts one after the other
            with trainer.autocast():
                loss = …
            trainer.backward(loss)
        trainer.update()                         # clipping, Adam, running average

The loops themselves stand in train.py, distill.py and shortcut.py.
"""

import contextlib
import copy
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import claimed, save_checkpoint
from ddim import SCHEDULES, Denoiser
from rundir import clear_out, hooks_are_done, open_log
from runtime import (
    all_gather,
    autocast,
    broadcast,
    local_rows,
    log_stderr,
    memory_format,
    progress,
    rank,
    ranks,
    sum_over_ranks,
    warn_if_busy,
)

MIDDLE = 0.4, 0.8, 0.8    # of --times middle: mean and spread of the normal variable, and the share that is drawn so
LABEL_DROPOUT = 0.1       # how often a label gives way to the null class

class Trainer:
    """A network in training with its optimiser, its running average, its place in the run, and its files.

    args         the settings that flags.py gives a run; args.out None: a loop that writes no files
    model_info   what a checkpoint says of the model: schedule, predicts, shape, classes …, as sample.py needs them
    ema_warmup   the network starts from random weights, which its average must be quick to forget
    hooks        pairs (N, hook): hook(trainer) is called every N updates and after the last; returns dicts to log
    watch        None, or called before each line of the log: watch(trainer) returns more to log
    lost         what `watch` says of a run that must not go on, in words: it ends after that line
    drawn        a file in its folder that the run needs from before its first update
    extra_state  further networks that a resumed run needs, by name: see `second_net`
    carried      tensors with a row for each image that the loop carries from one update to the next, by name"""

    def __init__(self, args, net, device, model_info, hooks=(), ema_warmup=True):
        self.args, self.device, self.model_info, self.ema_warmup = args, device, model_info, ema_warmup
        self.out = None if args.out is None else Path(args.out)
        self.net = net.to(device, memory_format=memory_format(device))
        self.net.checkpointing = args.checkpointing
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.shared = DistributedDataParallel(self.net, gradient_as_bucket_view=True) if ranks() > 1 else self.net
        self.opt = torch.optim.Adam(self.net.parameters(), lr=args.lr, betas=tuple(args.betas),
                                    fused=device.type in ("cpu", "cuda"))
        self.schedule = SCHEDULES[model_info["schedule"]]()
        self.step, self.hooks, self.watch = 0, hooks, None
        self.extra_state, self.carried, self.resumed = {}, {}, None
        self.compiled, self.values, self.pending, self.interruptible = {}, [], [], False
        self.told, self.lost, self.drawn = False, "", None
        self.random = torch.Generator(device).manual_seed(args.seed)     # alike on all ranks, see `rand`
        torch.manual_seed(args.seed + rank())                            # for dropout, the only other user of chance
        self.chance = torch.cuda if device.type == "cuda" else torch

    # ---- for the loop ----
    def denoiser(self, net=None):
        """x̂ of the network in training, or of one like it (an average, a teacher), as --compile wants it."""
        net = self.shared if net is None else net
        if self.args.compile and net not in self.compiled:
            self.compiled[net] = torch.compile(net, mode=self.args.compile)
        c = self.net.config
        return Denoiser(self.compiled.get(net, net), self.schedule, self.model_info["predicts"], c.classes or None,
                        c.step_length)

    def second_net(self, name):
        """A copy of the averaged weights, kept in the checkpoints under this name: a teacher, another average."""
        if name not in self.extra_state:
            self.extra_state[name] = copy.deepcopy(self.ema)
            if self.resumed:
                self.extra_state[name].load_state_dict(self.resumed["extra_state"][name])
        return self.extra_state[name]

    def target_net(self):
        """The running average with decay --target-ema: the one that is sampled if that has it, too, or one more."""
        return self.ema if self.args.target_ema == self.args.ema else self.second_net("target")

    def _draw(self, kind, *args):
        return local_rows(kind(*args, generator=self.random, device=self.device))

    def rand(self):
        """U[0, 1) for each image (B,). All ranks draw the same, for the whole batch, and each keeps its own rows."""
        return self._draw(torch.rand, self.args.batch)

    def times(self):
        """t in (0, 1] for each image (B,): uniform as in the paper; by --times middle one in five is, and the others
        are the sigmoid of a normal variable (logit-normal, Esser et al. 2024)."""
        u = 1 - self.rand()
        if self.args.times == "uniform":
            return u
        mean, spread, share = MIDDLE
        own = torch.where(u <= share, u / share, (u - share) / (1 - share))      # U(0, 1] again, within each part
        return torch.where(u <= share, torch.sigmoid(mean + spread * 2 ** 0.5 * torch.erfinv(2 * own - 1)), own)

    def randn(self, *shape):
        """N(0, I) for each image (B, *shape), as `rand`."""
        return self._draw(torch.randn, self.args.batch, *shape).to(memory_format=memory_format(self.device))

    def randint(self, high):
        """0 … high − 1 for each image (B,), as `rand`."""
        return self._draw(torch.randint, high, (self.args.batch,))

    def drop_labels(self, y):
        """The labels y (B,) with the null class in place of one in ten, so that guidance has something to push from."""
        return torch.where(self.rand() < LABEL_DROPOUT, self.net.config.classes, y)

    def autocast(self):
        return autocast(self.device, self.args.dtype)

    def parts(self, *rows):
        """This rank's rows (tensors (B, …) or None) in --accumulate equal parts, one after the other."""
        count = self.args.accumulate
        for i, part in enumerate(zip(*([x] * count if x is None else x.chunk(count) for x in rows), strict=True)):
            if self.args.compile:
                torch.compiler.cudagraph_mark_step_begin()    # the last update's outputs are no longer needed
            # Ranks exchange their gradients in the last backward pass only.
            with self.shared.no_sync() if ranks() > 1 and i < count - 1 else contextlib.nullcontext():
                yield part

    def backward(self, loss, terms=()):
        """Add the gradient of one part's loss. terms: {name: scalar tensor} for the log."""
        (loss / self.args.accumulate).backward()
        self.values.append(dict(loss=loss.detach()) | {k: v.detach() for k, v in dict(terms).items()})

    def update(self):
        """One step of the optimiser from the gradients of all parts, and one of the running average."""
        for group in self.opt.param_groups:
            group["lr"] = learning_rate(self.args, self.step)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.args.clip)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        # A short memory at first: an average still full of the random start would show noise for thousands of updates.
        update_ema(self.ema, self.net, min(self.args.ema, (1 + self.step) / (10 + self.step) if self.ema_warmup else 1))
        if "target" in self.extra_state:
            update_ema(self.extra_state["target"], self.net, self.args.target_ema)
        means = {k: sum(v[k] for v in self.values) / len(self.values) for k in self.values[0]} | dict(grad_norm=norm)
        self.names, self.values = list(means), []
        self.pending.append(torch.stack([*means.values()]).float())

    def steps(self):
        """Yields the numbers of the updates to make: from 0, or where a checkpoint left off, to P − 1.

        After each: the log, checkpoints, hooks. Every rank runs it, and rank 0 writes. Nothing here waits for a GPU
        except where a value is logged. A loss or gradient that is not finite ends the run with the last good checkpoint
        in place, Ctrl-C or SIGTERM with a fresh one: at once, or on several ranks at the next line of the log."""
        a, first, since, stop = self.args, self.step, time.perf_counter(), False
        if self.out:
            warn_if_busy(self.device)
        signals = catch_signals(self) if self.out else contextlib.nullcontext(())    # without files nothing is saved
        lock = contextlib.nullcontext() if rank() or not self.out else claimed(self.out)
        with (signals as stopped, lock, open_log(None if rank() else self.out, a.tensorboard) as log,
              progress(total=a.updates, initial=self.step, unit="update") as bar):
            if self.resumed and broadcast(not hooks_are_done(self.resumed, self.out)):
                self._call_hooks(log)                         # a run that was killed while they worked lost them
            while self.step < a.updates and not stop:
                lr = learning_rate(a, self.step)
                yield self.step                               # here the loop's body runs
                if self.step == first and not self.resumed:
                    clear_out(self.out, self.drawn)
                self.step += 1
                bar.update()
                stop, count, now = ranks() == 1 and bool(stopped), len(self.pending), time.perf_counter()
                if self.step == first + 1:
                    begun = now                               # it compiles, say: no measure of the speed
                elif now - begun > 60:                        # the first line of the log may be hours away
                    self._tell_long((self.step - first - 1) * a.batch / (now - begun))
                if self._due(a.log_every) or self._due(a.save_every) or stop:
                    means, stop = self._means(bool(stopped))
                    now = time.perf_counter()
                    speed = round(count * a.batch / (now - since), 1)
                    entry = {"step": self.step} | means | dict(lr=lr, images_per_s=speed)
                    if self.watch:
                        entry |= self.watch(self)
                    log(entry)
                    if self.lost:
                        sys.exit(f"error: {self.lost}")
                    shown = {k: f"{means[k]:.3g}" for k in means if k != "grad_norm"}
                    bar.set_postfix(shown | {"img/s": speed})
                    since = time.perf_counter()
                paused = time.perf_counter()
                if self.out and (self._due(a.save_every) or stop):
                    self.save()
                if not stop or self.step == a.updates:
                    self._call_hooks(log)
                paused = time.perf_counter() - paused         # neither is training: keep them out of images/s
                since, begun = since + paused, begun + paused
        if self.step < a.updates:
            self._stopped(f"update {self.step} of {a.updates}")

    def _tell_long(self, images_per_s):
        """Say once that a run will take days."""
        hours = (self.args.updates - self.step) * self.args.batch / max(images_per_s, 1e-9) / 3600
        if hours > 48 and not self.told:
            log_stderr(f"\nat this speed the run takes {hours:,.0f} hours more: fewer --updates, a smaller --batch or "
                       f"model, or a GPU")
        self.told = True

    def _due(self, n):
        """Whether what happens every n updates, and after the last, happens now. n = 0: never."""
        return n and (self.step % n == 0 or self.step == self.args.updates)

    def _call_hooks(self, log):
        """The pictures and scores that are due, and a line in the log that says they are all made.

        Ctrl-C ends them at once, and the run: --resume makes them."""
        due = [hook for n, hook in self.hooks if self._due(n)]
        try:
            self.interruptible = True
            for hook in due:
                for entry in hook(self) or []:
                    log({"step": self.step} | entry)
        except KeyboardInterrupt:
            self.save()
            self._stopped(f"the pictures and scores of update {self.step}")
        finally:
            self.interruptible = False
        if due or self.step == self.args.updates:
            log({"step": self.step, "hooks": len(due)})

    def _stopped(self, where):
        """End a run that was stopped and saved, and say how it goes on."""
        again = f"{'torchrun …' if ranks() > 1 else 'python'} {Path(sys.argv[0]).name} --resume --out {self.out}"
        print(f"stopped at {where}; saved {self.ckpt}. Go on with: {again}")
        sys.exit(130)

    def _means(self, stopped):
        """({name: mean of the updates since the last call}, whether any rank was stopped), over all ranks.

        Ends the run if a value is not finite."""
        values = torch.stack(self.pending)
        flag = values.new_full((1,), stopped)                 # it rides on the one exchange that the log needs
        everything = (sum_over_ranks(torch.cat([values.flatten(), flag])) / ranks()).cpu()
        values, flag = everything[:-1].view(values.shape), everything[-1]
        bad = (~values.isfinite().all(dim=1)).nonzero()
        if len(bad):
            first = self.step - len(values) + 1 + bad[0].item()
            kept = self.out and self.ckpt.exists()
            left = f"{self.ckpt} holds the last good checkpoint" if kept else "there is no checkpoint yet"
            sys.exit(f"error: loss or gradient not finite at update {first}; {left}. "
                     f"Try a lower --lr, or --dtype fp32.")
        self.pending = []
        return dict(zip(self.names, values.mean(0).tolist(), strict=True)), flag.item() > 0

    # ---- its files ----
    @property
    def ckpt(self):
        return self.out / "ckpt.pt"

    def _model(self):
        """What sample.py needs of the model, but for its weights."""
        return dict(self.model_info, config=asdict(self.net.config), step=self.step,
                    args={k: v for k, v in vars(self.args).items() if k not in ("out", "resume", "overwrite")})

    def save(self):
        """Write everything that a run needs to go on exactly, and sample.py needs of the model. Called on all ranks."""
        state = dict(self._model(), extra_state={name: net.state_dict() for name, net in self.extra_state.items()},
                     carried={name: all_gather(rows) for name, rows in self.carried.items()},
                     weights=self.net.state_dict(), ema=self.ema.state_dict(), optimizer=self.opt.state_dict(),
                     random=self.random.get_state(), dropout=all_gather(self.chance.get_rng_state()[None]))
        if rank() == 0:
            save_checkpoint(self.ckpt, state)

    def save_best(self):
        """Write the model alone, its averaged weights, as OUT/best.pt."""
        weights = self.ema.state_dict()
        if rank() == 0 and self.out:
            save_checkpoint(self.out / "best.pt", dict(self._model(), weights=weights, ema=weights))

    def load(self, state, needs=()):
        """Take up the state of a checkpoint of the same network. Says so where the run can't go on bit for bit.

        needs  names of further entries that the loop needs: exits if the checkpoint is too old to have them"""
        if not {"extra_state", *needs} <= state.keys():
            sys.exit(f"error: {self.ckpt} is of an older version: it can be sampled and distilled, but not resumed")
        try:
            self.net.load_state_dict(state["weights"])
        except RuntimeError as e:
            sys.exit(f"error: the model of {self.ckpt} has another shape than these flags ask for "
                     f"({str(e).splitlines()[1].strip()})")
        self.ema.load_state_dict(state["ema"])
        self.opt.load_state_dict(state["optimizer"])
        for group in self.opt.param_groups:
            group["betas"] = tuple(self.args.betas)           # flags beat the checkpoint, as everywhere
        self.carried = {name: local_rows(rows).to(self.device) for name, rows in state["carried"].items()}
        self.step, self.resumed, before = state["step"], state, len(state["dropout"])
        if state["random"].shape != self.random.get_state().shape:
            self.random.manual_seed(self.args.seed + self.step)
            print("resuming on another kind of device: other noise from here on, no longer bit for bit")
        else:
            self.random.set_state(state["random"])
            if before == ranks():
                self.chance.set_rng_state(state["dropout"][rank()])
        if before != ranks():
            print(f"resuming on {ranks()} processes what ran on {before}: the same images and the same noise, but "
                  f"gradients are summed in another order, and --dropout draws other masks: no longer bit for bit")

def learning_rate(args, step):
    """Linear warm-up to --lr, then half a cosine from there to `final_rate` (section 5, Table 3)."""
    warm = min(1, (step + 1) / max(1, args.warmup))
    gone = max(0, step - args.warmup) / max(1, args.updates - 1 - args.warmup)
    end = final_rate(args)
    return warm * (end + (args.lr - end) * (1 + math.cos(math.pi * gone)) / 2)

def final_rate(args):
    """Where the learning rate ends: --lr-end, or else the share `lr_share` of --lr, so that it follows another --lr."""
    return args.lr * args.lr_share if args.lr_end is None else args.lr_end

@torch.no_grad()
def update_ema(average, net, decay):
    """One step of a running average of weights: decay · average + (1 − decay) · net. decay 0 copies the weights."""
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)

def data_of_run(images, state):
    """What a checkpoint records of the data it learns from; prints a line if the run had other data until now."""
    now, was = dict(images=len(images), digest=images.digest()), (state or {}).get("data")
    if was not in (None, now):
        print(f"the data is not what it was: {was['images']:,} images then, {now['images']:,} now, or others; "
              f"no longer the same as a run that was never interrupted")
    return now

def batches(images, args, start, device):
    """Yield this rank's rows of batch `start`, `start` + 1 … as (x, y) on the device; a thread reads one ahead."""
    def fetch(step):
        x, y = images.batch(step, args.batch, args.seed, args.flip, (rank(), ranks()))
        return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fetch, start)
        while True:
            x, y = future.result()
            start += 1
            future = pool.submit(fetch, start)
            yield x.to(device, non_blocking=True, memory_format=memory_format(device)), y.to(device, non_blocking=True)

@contextlib.contextmanager
def catch_signals(trainer):
    """A list that is empty until Ctrl-C or SIGTERM arrives; a second Ctrl-C, or one in a hook, interrupts at once.

    Neither does under torchrun, which sends each signal of the terminal again, and kills a process after 30 seconds."""
    stopped = []
    def handler(number, frame):
        if (stopped or trainer.interruptible) and ranks() == 1:
            raise KeyboardInterrupt
        stopped.append(number)
        log_stderr("\nstopping " + ("after this update; Ctrl-C again: at once" if ranks() == 1 else
                                    "at the next line of the log"))
    old = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for n, h in old.items():
            signal.signal(n, h)
