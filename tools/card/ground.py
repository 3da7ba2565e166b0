"A device, its clock, and what every part does with them: wait, count, time, and go on where one case fails."
import collections
import contextlib
import gc
import math
import os
import statistics
import time
import traceback
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mgdarts.base.data import Split, Splits, channel_stats
from mgdarts.base.randomness import stream


class Ground:
    "A device, how much time there is, and where what is more than rows goes to."

    def __init__(self, device: str, toy: bool, ends: float = math.inf,  # of `time.monotonic`
                 out: str = "", images: str = ""):  # folder of the record; pack of images that came along
        self.device, self.toy, self.ends, self.out, self.images = torch.device(device), toy, ends, out, images
        self.gpu = self.device.type == "cuda"

    def left(self) -> float: return self.ends - time.monotonic()

    def wait(self):
        if self.gpu: torch.cuda.synchronize()

    def once(self, f) -> float:  # seconds
        self.wait()
        start = time.perf_counter()
        f()
        self.wait()
        return time.perf_counter() - start

    def ms(self, f, seconds: float = 0.6) -> float:
        "Milliseconds of a call, calls one right after the other: the median of three blocks."
        f()
        n = max(1, min(100, int((0.02 if self.toy else seconds) / 3 / max(self.once(f), 1e-6))))
        return statistics.median(self.once(lambda: [f() for _ in range(n)]) / n for _ in range(3)) * 1e3

    def precision(self, how: str):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = how != "fp32"

    def kernels(self, f, top: int = 0) -> dict:
        """What a call launches: kernels, copies, the time in which the card is busy; the costliest kernels.

        On a CPU: operators.
        """
        f()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA if self.gpu else ProfilerActivity.CPU]) as p:
            f()
            self.wait()
        seen = [(e.name(), e.duration_ns() / 1e6) for e in p.profiler.kineto_results.events()
                if ("CUDA" if self.gpu else "CPU") in str(e.device_type())]
        copies = [s for s in seen if s[0].startswith(("Memcpy", "Memset"))]
        out = {"kernels": len(seen) - len(copies), "copies": len(copies), "busy_ms": sum(t for _, t in seen)}
        if top:
            by = collections.defaultdict(list)
            for name, t in seen: by[name].append(t)
            costly = sorted(by.items(), key=lambda kv: -sum(kv[1]))[:top]
            out["top"] = [{"kernel": n[:160], "calls": len(t), "ms": sum(t)} for n, t in costly]
        return out

    def graph(self, f):  # a function that replays it
        "A call as one CUDA graph. On a CPU: the call itself."
        if not self.gpu: return f
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): f()
        torch.cuda.current_stream().wait_stream(side)
        self.wait()
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g): f()
        return g.replay

    def fresh(self):
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict:
        if not self.gpu: return {}
        return {"allocated_mib": torch.cuda.max_memory_allocated() / 2**20,
                "reserved_mib": torch.cuda.max_memory_reserved() / 2**20}


def said(e: Exception) -> str: return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def attempt(row: dict, name: str, f):
    "Put `name` or what went wrong into a row: one variant that fails stops no other."
    try: row[name] = f()
    except Exception as e: row[f"{name}_error"] = said(e)
    return row.get(name)


def tried(row: dict, measure, *args) -> dict:
    "A row that `measure(*args)` adds to, or what went wrong: one case that fails stops no other."
    try: measure(*args)
    except Exception as e: row["error"] = said(e)
    return row


def each(g: Ground, seconds: float, measure, cases):  # cases: of (row, what else `measure` needs)
    "The rows of some cases, each with what `measure(g, row, ...)` adds, while there are `seconds` left."
    for row, *more in cases:
        if g.left() < seconds:
            yield {"note": "cut short: the time is spent"}
            return
        yield tried(row, measure, g, row, *more)


def ours() -> str:
    "The line of the package that is being run."
    frames = [f for f in traceback.extract_stack() if f"{os.sep}mgdarts{os.sep}" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"


@contextlib.contextmanager
def syncs(g: Ground):  # a Counter of lines
    "Lines that make the host wait for the card."
    found = collections.Counter()

    def seen(message, *_, **__):
        if "synchroniz" in str(message): found[ours()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = seen
        if g.gpu: torch.cuda.set_sync_debug_mode("warn")
        try: yield found
        finally:
            if g.gpu: torch.cuda.set_sync_debug_mode("default")


def batch(g: Ground, n: int, size: int) -> tuple:
    "Random images, normalised, with labels."
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x.to(g.device), (torch.arange(n) % 10).to(g.device)


def noise(n: int, size: int, device) -> Splits:
    "Random images: what they show costs no time."
    made = [torch.randint(0, 256, (k, 3, size, size), dtype=torch.uint8, generator=stream("noise", k))
            for k in (n, n // 4, n // 4)]
    mean, std = (t.to(device) for t in channel_stats(made[0]))
    parts = [Split(x.to(device), (torch.arange(len(x)) % 10).to(device), mean, std) for x in made]
    return Splits(*parts, [str(c) for c in range(10)], size, "noise", "")
