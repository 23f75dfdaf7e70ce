"""Where the code runs: device and precision, and the processes that torchrun starts.

    torchrun --nproc_per_node=8 train.py --distill 0.15 --preset celeba64 --data celeba.zip

Every process runs the same script. Whatever is random is drawn alike in all of them, for the whole batch, and each
takes its own rows of it. So a run on eight ranks is the run on one, but for dropout and the order of summing gradients.
"""

import ctypes
import os
import platform
import re
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

# ---- device and precision -------------------------------------------------------------------------------
def pick_device(name="auto"):
    """`--device`: a torch device; auto takes CUDA, else Apple's MPS, else the CPU. Exits if it can't be used.

    Under torchrun each process gets a GPU of its own, or its part of the cores, and meets the others here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"             # whatever number was asked for: it can't serve all
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        sys.exit(f"error: --device {name} can't be used here ({str(e).splitlines()[0]})")
    if name.startswith("cuda"):
        if ":" in name:
            torch.cuda.set_device(name)                       # for the collectives that name no device
        torch.backends.cudnn.benchmark = True                 # the shapes never change
    if name == "cpu":
        keep_freed_memory()
        if "LOCAL_RANK" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
            # That is torchrun's choice, however many cores there are; another number is the user's, and stays.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    if "RANK" in os.environ and not dist.is_initialized():
        if sys.platform == "linux":                           # torchrun, if killed, leaves its processes to themselves
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)        # PR_SET_PDEATHSIG, from prctl.h
        # Tensors on the CPU travel by gloo, on GPUs by NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if name.startswith("cuda") else "gloo",
                                timeout=timedelta(minutes=30))
    return torch.device(name)

def keep_freed_memory(keep=True):
    """Have glibc keep what PyTorch frees. Else it gives big blocks back to the system after each layer, and
    the next gets them cleared page by page: a tenth of the time of an update with self-distillation.

    keep  False: no longer, for blocks that are never the same, as those of photographs: they would pile up"""
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4        # from malloc.h
        mallopt(mmap_max, 0 if keep else 65_536)
        mallopt(trim_threshold, -1 if keep else 131_072)      # these are its defaults

def pick_dtype(name, device):
    """`--dtype`: auto is bf16 where the hardware multiplies in it (2-3x faster on such CPUs), else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return "fp32"
    # oneDNN also claims bf16 on x86 CPUs that only emulate it, slowly: ask those for the instructions.
    x86 = platform.machine() in ("x86_64", "AMD64")
    fast = torch.cpu._is_avx512_bf16_supported() if x86 else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"

def autocast(device, dtype):
    """Run convolutions and matrix products in bfloat16, weights and losses staying float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")

def memory_format(device):
    """The order of an image's values in memory that convolutions like best: channels last on a GPU and on a CPU."""
    return torch.channels_last if torch.device(device).type in ("cpu", "cuda") else torch.contiguous_format

# ---- several processes ----------------------------------------------------------------------------------
def rank():
    """The number of this process, 0 … ranks() − 1: number 0 writes files, prints and shows progress."""
    return dist.get_rank() if dist.is_initialized() else 0

def ranks():
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1

def local_rows(x):
    """This rank's share of the rows of a batch that all ranks know: (B, …) -> (B / ranks, …)."""
    return x.chunk(ranks())[rank()]

def all_gather(x):
    """The shares of all ranks, as one batch on each of them: (B / ranks, …) -> (B, …). Waits for the device."""
    if ranks() == 1:
        return x
    shares = [None] * ranks()
    dist.all_gather_object(shares, x.cpu())
    return torch.cat(shares).to(x.device)

def broadcast(value):
    """What rank 0 has, on every rank: any plain values, or tensors on the CPU."""
    box = [value]
    if ranks() > 1:
        dist.broadcast_object_list(box)
    return box[0]

def sum_over_ranks(x):
    """The sum over the ranks of a tensor, in place."""
    if ranks() > 1:
        dist.all_reduce(x)
    return x

def map_over_ranks(jobs, work):
    """work(job) for each job of a list, shared out one by one: job i is done on rank i mod ranks.

    Yields the results in the order of the jobs, on rank 0; on the others nothing, but they must iterate as well."""
    for start in range(0, len(jobs), ranks()):
        group = jobs[start:start + ranks()]
        mine = work(group[rank()]) if rank() < len(group) else None
        results = [mine] * ranks() if rank() == 0 else None
        if ranks() > 1:
            dist.gather_object(mine, results)
        yield from results[:len(group)] if rank() == 0 else ()

def describe_device(device):
    """What a run runs on, in words."""
    return str(device) if ranks() == 1 else f"{ranks()} processes ({device.type})"

def warn_if_busy(device):
    """Say before a long computation on a CPU that others use it: threads that wait for each other crawl."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and threads > 1 and (slower := seconds_of_work(threads) / seconds_of_work(1)) > 2:
        log_stderr(f"warning: {threads} threads are {slower:.0f} times slower here than one, as other programs keep "
                   f"the processor busy. Try OMP_NUM_THREADS=1")

def seconds_of_work(threads):
    """How long so many threads take for a hundred small products of matrices: less than 0.1 s on an idle machine."""
    before, a = torch.get_num_threads(), torch.ones(256, 256)
    torch.set_num_threads(threads)
    a @ a                                                     # the threads start
    start = time.perf_counter()
    for _ in range(100):
        a @ a
    seconds = time.perf_counter() - start
    torch.set_num_threads(before)
    return seconds

def progress(quiet=False, **settings):
    """A tqdm bar, on rank 0 alone; none if `quiet`."""
    return tqdm(dynamic_ncols=True, disable=quiet or rank() > 0, **settings)

def log_stderr(text):
    """A line for people, once: standard output is for results."""
    if rank() == 0:
        print(text, file=sys.stderr)

def launch(main):
    """Run a script's main. Under torchrun only rank 0 prints; an error that all ranks meet is told once, by rank 0
    (but what argparse refuses, by each)."""
    other, code = int(os.environ.get("RANK", 0)) > 0, 0
    sys.argv[1:] = [re.sub(r"^(--[\w-]+=)?~(?=/)", lambda m: (m[1] or "") + os.path.expanduser("~"), arg)
                    for arg in sys.argv[1:]]                  # of --out=~/runs the shell leaves it as it is
    for stream in (sys.stdout, sys.stderr):                   # no name of a file, no Greek letter may end a run
        stream.reconfigure(errors="backslashreplace")
    if other:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                                   # the reader of `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (SystemExit, OSError) as e:
        told = e.code if isinstance(e, SystemExit) else f"error: {e.filename or 'a file'}: {e.strerror or e}"
        if other and isinstance(told, str):
            time.sleep(3)                                     # torchrun ends this process if rank 0 met the error too
        if ranks() == 1:
            sys.exit(told)
        code = 1 if isinstance(told, str) else told
        if isinstance(told, str):
            print(told, file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; all files are whole, and what was saved before is kept", file=sys.stderr)
        code = 130
        if ranks() == 1:
            sys.exit(code)
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e):
            sys.exit("error: out of memory; a smaller --batch needs less, and so do --accumulate K and --checkpointing "
                     "in training")
        if type(e).__module__.startswith(("torch._inductor", "torch._dynamo")):
            sys.exit(f"error: --compile does not work here ({' '.join(str(e).split())[:200]}); leave it out")
        lost = isinstance(e, dist.DistError) or any(sign in str(e) for sign in ("onnection", "imed out"))
        if ranks() == 1 or not lost:
            raise
        code, why = 1, " ".join(str(e).split())[:300]
        log_stderr(f"error: another process of this run has died, or can't be reached: {why}\nWhat was saved is whole; "
                   f"a run of train.py or distill.py goes on with --resume")
    if dist.is_initialized():
        if not code:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # Gloo's threads may still hold Python objects, on which the interpreter's usual end crashes now and then.
        os._exit(code or 0)
