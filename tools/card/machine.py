"The machine: what it is, its two ceilings, and whether it compiles the C++ kernels."
import importlib
import os
import shutil
import subprocess
import sys
import time

import torch

from card.ground import Ground, attempt
from mgdarts.fast.compiled import kernels_in_use

HOWS = ("fp32", "tf32", "bf16")  # of products: float32; float32 rounded to 10 bits of mantissa; maps in bfloat16


def compiled(g: Ground):
    "Whether the C++ kernels compile, and how long that takes. Runs beside the first parts."
    start = time.perf_counter()
    yield {"kernels": kernels_in_use(), "seconds": time.perf_counter() - start,
           "compiler": shutil.which("c++") or shutil.which("g++") or "none"}


def version(library: str) -> str: return getattr(importlib.import_module(library), "__version__", "there")


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def what_it_is(g: Ground) -> dict:
    "Versions, cores, and the card."
    row = {"python": sys.version.split()[0], "torch": torch.__version__, "cores": os.cpu_count()}
    for name in ("plotly", "triton", "torchvision", "sklearn", "safetensors"):
        attempt(row, name, lambda name=name: version(name))
    if g.gpu:
        p = torch.cuda.get_device_properties(0)
        row |= {"name": p.name, "memory_gib": p.total_memory / 2**30, "multiprocessors": p.multi_processor_count,
                "capability": f"{p.major}.{p.minor}", "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version()}
        attempt(row, "driver", driver)
    return row


def product(g: Ground, n: int, how: str) -> dict:
    "Products a second of two n x n matrices."
    g.precision(how)
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=g.device).to(dtype) for _ in range(2))
    return {"what": f"matrix product {n}, {how}", "tflop_per_s": 2 * n**3 / g.ms(lambda: a @ b, 0.3) / 1e9}


def copying(g: Ground) -> dict:
    "Bytes moved a second: each is read and written."
    a = torch.randn(2**20 if g.toy else 2**29, device=g.device)
    b = torch.empty_like(a)
    return {"what": "copy", "gb_per_s": 2 * a.numel() * 4 / g.ms(lambda: b.copy_(a), 0.3) / 1e6}


def launching(g: Ground):
    "Microseconds of a kernel that has nothing to do: launched one by one, and in a graph."
    x = torch.zeros(8).to(g.device)

    def thousand():
        for _ in range(1000): x.add_(1)

    yield {"what": "launch of a small kernel, eager", "us": 1e3 * g.ms(thousand, 0.3) / 1000}
    row = {"what": "the same in a graph"}
    replay = attempt(row, "graph", lambda: g.graph(thousand))
    yield row | ({"graph": True, "us": 1e3 * g.ms(replay, 0.3) / 1000} if replay else {})


def machine(g: Ground):
    "The card and its two ceilings: bytes moved and products a second, measured."
    yield what_it_is(g)
    for how in HOWS: yield product(g, 256 if g.toy else 8192, how)
    yield copying(g)
    yield from launching(g)
