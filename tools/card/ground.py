"""What `tools/gpu.py` measures on a card, part by part. Each part is a generator of rows, plain dictionaries; what it costs is bounded by `Ground.left`."""
import collections
import contextlib
import copy
import gc
import itertools
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from mgdarts.runs.make import make_search, make_trainer
from mgdarts.net.discrete import DerivedNet
from mgdarts.fast import cell as fast_cell
from mgdarts.fast import convolutions, engine
from mgdarts.fast.engine import make
from mgdarts.fast.layout import natively
from mgdarts.search import loss
from mgdarts.runs import memory
from mgdarts.runs.listen import read_events
from mgdarts.runs import run as runs
from mgdarts.views.report import report
from mgdarts.net.count import count
from mgdarts.net.sample import random_architecture
from mgdarts.base.options import Compute, Search as Settings
from mgdarts.methods.registry import preset
from mgdarts.base.data import Split, Splits, channel_stats
from mgdarts.base.randomness import stream
from mgdarts.search.step import fetch, make_optimizer, optimise
from mgdarts.search.stages import begin_joint, open_stage, plan
from mgdarts.space.darts import NetSpec
from mgdarts.net.supernet import SuperNet

HOWS = ("fp32", "tf32", "bf16")  # of products: float32; float32 rounded to 10 bits of mantissa; maps in bfloat16


class Ground:
    "A device, and how much time there is."

    def __init__(self, device: str, toy: bool, ends: float = math.inf):  # ends: of `time.monotonic`
        self.device, self.toy, self.ends = torch.device(device), toy, ends
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
        "What a call launches: kernels, copies, the time in which the card is busy; the costliest kernels. On a CPU: operators."
        from torch.profiler import ProfilerActivity, profile

        f()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA if self.gpu else ProfilerActivity.CPU]) as p:
            f()
            self.wait()
        seen = [(e.name(), e.duration_ns() / 1e6) for e in p.profiler.kineto_results.events() if ("CUDA" if self.gpu else "CPU") in str(e.device_type())]
        copies = [s for s in seen if s[0].startswith(("Memcpy", "Memset"))]
        out = {"kernels": len(seen) - len(copies), "copies": len(copies), "busy_ms": sum(t for _, t in seen)}
        if top:
            by = collections.defaultdict(list)
            for name, t in seen: by[name].append(t)
            out["top"] = [{"kernel": n[:160], "calls": len(t), "ms": sum(t)} for n, t in sorted(by.items(), key=lambda kv: -sum(kv[1]))[:top]]
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
        return {"allocated_mib": torch.cuda.max_memory_allocated() / 2**20, "reserved_mib": torch.cuda.max_memory_reserved() / 2**20}


def said(e: Exception) -> str: return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def attempt(row: dict, name: str, f):
    "Put `name` or what went wrong into a row: one variant that fails stops no other."
    try: row[name] = f()
    except Exception as e: row[f"{name}_error"] = said(e)
    return row.get(name)


def ours() -> str:
    "The line of the package that is being run."
    frames = [f for f in traceback.extract_stack() if f"{os.sep}mgdarts{os.sep}" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"


@contextlib.contextmanager
def syncs(g: Ground):  # a Counter of lines
    "Lines that make the host wait for the card."
    found = collections.Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: found.update([ours()] * ("synchroniz" in str(message)))
        if g.gpu: torch.cuda.set_sync_debug_mode("warn")
        try: yield found
        finally:
            if g.gpu: torch.cuda.set_sync_debug_mode("default")


def compiled(g: Ground):
    "Whether the C++ kernels compile, and how long that takes. Runs beside the first parts."
    from mgdarts.fast.compiled import kernels_in_use

    start = time.perf_counter()
    yield {"kernels": kernels_in_use(), "seconds": time.perf_counter() - start, "compiler": shutil.which("c++") or shutil.which("g++") or "none"}


# 1: the same losses
def losses(g: Ground):
    "Three steps of the same search on the CPU and on the device, and what makes the third one wait."
    for method in ("mg-darts", "darts-v1", "darts-v2", "pc-darts", "gdas", "dass"):
        row, seen = {"method": method}, {}
        try:
            for device in dict.fromkeys(("cpu", g.device.type)):
                s = make_search(preset("smoke", method, device=device, **{"data.subset": 256, "search.warmup": 0}))
                open_stage(s)
                values = []
                s.events.listen(lambda event, values=values: values.append(event.data["value"].detach()), "forward")
                for i in range(3):
                    with syncs(g) if i == 2 and device != "cpu" else contextlib.nullcontext({}) as where: optimise(s)
                seen[device] = [float(v) for v in values]
                if device == g.device.type: row |= {"losses": seen[device], "syncs": sum(where.values()), "where": dict(where)}
            row["difference"] = max(abs(a - b) for a, b in zip(seen["cpu"], seen[g.device.type], strict=True))
        except Exception as e: row["error"] = said(e)
        yield row


# 2: steps of the super-net
@contextlib.contextmanager
def plain_stem(net):
    "The maps of a net's stem in PyTorch's default layout (NCHW), instead of channels last."
    inner = engine.run

    def run(m, *args):
        out = inner(m, *args)
        return engine.each(torch.Tensor.contiguous, out) if m is net.stem else out

    engine.run = run
    try: yield
    finally: engine.run = inner


@contextlib.contextmanager
def contiguous(net):
    "The same for all maps of the fast path."
    plain = lambda f: lambda x: f(x).contiguous()
    seen, back = dict(convolutions.SEEN), fast_cell.from_phases
    convolutions.SEEN.update({k: plain(f) for k, f in seen.items() if k != "map"})
    fast_cell.from_phases = plain(back)
    try:
        with plain_stem(net): yield
    finally:
        convolutions.SEEN.update(seen)
        fast_cell.from_phases = back


def whole_net(C: int, cells: int, live: float, size: int = 32, **how) -> SuperNet:  # how: of `Compute`
    "The last stage's net, everything in it that has not been pruned."
    net = SuperNet(NetSpec(C, cells, 10, size), seed=0, engine=make(Compute(**how)))
    net.open(cells - 1, 2)
    net.discretising = True
    if live < 1: memory.prune_to(net, live, torch.Generator().manual_seed(0))
    return net


def batch(g: Ground, n: int, size: int) -> tuple:
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x.to(g.device), (torch.arange(n) % 10).to(g.device)


def trained(net, n: int, g: Ground):
    "A function: one training step, all of it but the batch."
    opt = make_optimizer(net, Settings())
    weights, (x, y) = opt.param_groups[0]["params"], batch(g, n, net.spec.size)
    net.train()

    def step():
        net.zero_grad(set_to_none=True)
        out = F.cross_entropy(net(x), y) + 0.01 * sum(loss.regulariser(net))
        out.backward()
        torch.nn.utils.clip_grad_norm_(weights, 5.0)
        opt.step()
        return out

    return step


#       C  L   batch live how     impl         layout  search for the fastest cuDNN kernels
STEPS = [(16, 8, 96, 1.0, "tf32", "fused", "nhwc", False),
         (16, 8, 96, 1.0, "bf16", "fused", "nhwc", False),
         (16, 8, 96, 1.0, "fp32", "fused", "nhwc", False),
         (16, 8, 96, 1.0, "tf32", "reference", "nchw", False),
         (16, 8, 96, 1.0, "bf16", "reference", "nchw", False),
         (16, 8, 96, 1.0, "tf32", "fused", "nchw", False),
         (16, 8, 96, 1.0, "bf16", "fused", "nchw", False),
         (24, 8, 96, 1.0, "tf32", "fused", "nhwc", False),
         (44, 14, 96, 1.0, "bf16", "fused", "nhwc", False),
         (16, 8, 96, 0.3, "tf32", "fused", "nhwc", False),
         (16, 8, 96, 0.3, "bf16", "fused", "nhwc", False),
         (16, 8, 96, 0.3, "fp32", "fused", "nhwc", False),
         (16, 8, 96, 1.0, "tf32", "fused", "nhwc", True),
         (24, 8, 96, 1.0, "bf16", "fused", "nhwc", False)]
TOY_STEPS = [(4, 3, 8, 1.0, "fp32", "fused", "nhwc", False), (4, 3, 8, 0.3, "bf16", "fused", "nchw", True), (2, 3, 4, 0.1, "fp32", "reference", "nchw", False)]


def steps(g: Ground):
    "A training step of the last stage's net: eager and as one graph, time, memory, launches."
    for C, L, n, live, how, impl, layout, search in TOY_STEPS if g.toy else STEPS:
        if g.left() < 8:
            yield {"note": "cut short: the time is spent"}
            return
        row = {"C": C, "L": L, "batch": n, "live": live, "how": how, "impl": impl, "layout": layout, "cudnn_search": search}
        try:
            g.precision(how)
            torch.backends.cudnn.benchmark = search
            net = whole_net(C, L, live, 8 if g.toy else 32, impl=impl, amp=how == "bf16", tf32=how != "fp32").to(g.device)
            g.fresh()
            with contiguous(net) if layout == "nchw" and impl == "fused" else contextlib.nullcontext():
                step = trained(net, n, g)
                row["first_ms"] = 1e3 * g.once(step)
                row["ms"] = g.ms(step, 0.9)
                row |= g.peaks()
                attempt(row, "launches", lambda: g.kernels(step, 15 if (C, live, search) == (16, 1.0, False) else 0))
                if impl == "fused":
                    net.zero_grad(set_to_none=True)
                    g.fresh()
                    replay = attempt(row, "graph", lambda: g.graph(step))
                    if replay:
                        row["graph"] = True
                        row["graph_ms"] = g.ms(replay, 0.6)
                        row |= {f"graph_{k}": v for k, v in g.peaks().items()}
                        row["graph_loss_finite"] = bool(torch.stack([p.isfinite().all() for p in net.parameters()]).all())
                    del replay
                    if C == 16 and live == 1 and not search: row["parts"] = halves_of(net, n, g)
                del step
        except Exception as e: row["error"] = said(e)
        finally: torch.backends.cudnn.benchmark = False
        net = None
        g.fresh()
        yield row


def halves_of(net, n: int, g: Ground) -> dict:
    "Milliseconds of the parts of a step, each waited for."
    opt, (x, y), seen = make_optimizer(net, Settings()), batch(g, n, net.spec.size), collections.defaultdict(list)

    def clocked(name, f):
        out = []
        seen[name].append(1e3 * g.once(lambda: out.append(f())))
        return out[0]

    for _ in range(5):
        net.zero_grad(set_to_none=True)
        out = clocked("forward", lambda: F.cross_entropy(net(x), y))
        out = out + 0.01 * clocked("regularisers", lambda: sum(loss.regulariser(net)))
        clocked("backward", out.backward)
        clocked("clip", lambda: torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 5.0))
        clocked("update", opt.step)
    return {k: statistics.median(v) for k, v in seen.items()}


def planned(g: Ground):
    "What the plan says of those steps and of Table IV's stages: as it is, which is of the CPU's compiled kernels, and of the path that a device without them takes. Runs beside the others."
    for C, L, n, live, how, impl in dict.fromkeys(s[:6] for s in (TOY_STEPS[:1] if g.toy else STEPS)):
        if impl == "reference": continue  # a plan of it takes minutes
        net = whole_net(C, L, live, 8 if g.toy else 32, amp=how == "bf16")
        yield {"of": "steps", "C": C, "L": L, "batch": n, "live": live, "how": how, "impl": impl, "planned_mib": memory.step_memory(net, Settings(), n).peak_bytes / 2**20, "planned_native_mib": native_plan(net, n) / 2**20}
    for row, net, n in itertools.islice(stage_nets(g), 1 if g.toy else None):
        row = {"of": "table4", **row, "planned_native_mib": native_plan(net, n) / 2**20}
        if row["how"] == "fp32" and row["recompute"] == "none": row["planned_mib"] = memory.step_memory(net, Settings(), n).peak_bytes / 2**20
        yield row


def native_plan(net, n: int) -> int:  # bytes
    with natively(): return memory.step_memory(net, Settings(), n).peak_bytes


# 4: real steps, with their data
def noise(n: int, size: int, device) -> Splits:
    "Random images: what they show costs no time."
    made = [torch.randint(0, 256, (k, 3, size, size), dtype=torch.uint8, generator=stream("noise", k)) for k in (n, n // 4, n // 4)]
    mean, std = channel_stats(made[0])
    parts = [Split(x.to(device), (torch.arange(len(x)) % 10).to(device), mean.to(device), std.to(device)) for x in made]
    return Splits(*parts, [str(c) for c in range(10)], size, "noise", "")


def real(g: Ground):
    "Steps of a search as it is run: batch, forward, backward, update."
    cases = [(16, "tf32", True), (16, "tf32", False), (16, "bf16", False)]
    for C, how, auto in cases if not g.toy else [(4, "fp32", True)]:
        if g.left() < 6:
            yield {"note": "cut short: the time is spent"}
            return
        row, n = {"C": C, "how": how, "autoaugment": auto}, 16 if g.toy else 96
        try:
            cfg = preset("small", device=g.device.type, **{"space.channels": C, "space.cells": 3 if g.toy else 8, "data.autoaugment": auto, "search.batch": n, "compute.tf32": how != "fp32", "compute.amp": how == "bf16", "compute.recompute": "none", "search.target_m": 0.03 if g.toy else 0.3})
            s = make_search(cfg, noise(8 * n, 8 if g.toy else 32, g.device))
            s.state.stage = 1  # the next one to be opened is the last
            open_stage(s)
            begin_joint(s)
            s.state.epoch_step = 1  # no copy of the state, which is made once an epoch
            count = len(s.loaders["train"])

            def step():
                s.state.epoch_step = 1 + s.state.epoch_step % (count - 2)
                optimise(s)

            row["ms"] = g.ms(step, 1.0)
            row["batch_ms"] = g.ms(lambda: fetch(s), 0.3)
            row["images_per_s"] = 1e3 * n / row["ms"]
            with syncs(g) as where: step()
            row |= {"syncs": sum(where.values()), "where": dict(where)}
            row["validation_images_per_s"] = 1e3 * len(s.loaders["val"].split) / g.ms(lambda: s.validate(), 0.3)
            row["state_ms"] = 1e3 * g.once(s.state_dict)
        except Exception as e: row["error"] = said(e)
        s = None
        g.fresh()
        yield row


def retraining(g: Ground):
    "A found net of 0.7 million parameters in training: bare steps, eager and as one graph, and steps of the trainer with batches and drop path."
    spec, n = (NetSpec(4, 3, size=8), 8) if g.toy else (NetSpec(24, 8), 96)
    arch = random_architecture(spec, 8_000 if g.toy else 700_000, 0)
    size = count(arch)
    for how, n, layout in [("tf32", n, "nhwc"), ("bf16", n, "nhwc"), ("fp32", n, "nhwc"), ("bf16", n, "nchw"), ("bf16", 4 * n, "nhwc")][: 2 if g.toy else None]:
        if g.left() < 6:
            yield {"note": "cut short: the time is spent"}
            return
        row = {"how": how, "batch": n, "layout": layout, "params": size.params, "macs": size.macs_dense}
        try:
            g.precision(how)
            net = DerivedNet(arch, True, 0, make()).to(g.device)
            if layout == "nhwc": net = net.to(memory_format=torch.channels_last)
            opt = torch.optim.SGD(net.parameters(), 0.025, 0.9, weight_decay=3e-4)
            x, y = batch(g, n, spec.size)
            net.train()

            def step():
                opt.zero_grad(set_to_none=True)
                with torch.autocast(g.device.type, torch.bfloat16, enabled=how == "bf16"), plain_stem(net) if layout == "nchw" else contextlib.nullcontext(): logits, aux = net(x)
                (F.cross_entropy(logits.float(), y) + 0.4 * F.cross_entropy(aux.float(), y)).backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
                opt.step()

            g.fresh()
            row["ms"] = g.ms(step)
            row |= g.peaks()
            attempt(row, "launches", lambda: g.kernels(step, 8))
            replay = attempt(row, "graph", lambda: g.graph(step))
            if replay: row |= {"graph": True, "graph_ms": g.ms(replay)}
            row["images_per_s"] = 1e3 * n / min(row["ms"], row.get("graph_ms", math.inf))
        except Exception as e: row["error"] = said(e)
        net = opt = step = replay = None
        g.fresh()
        yield row
    row = {"how": "trainer"}
    try:
        cfg = preset("small", device=g.device.type, **{"train.batch": n, "compute.tf32": True})
        t = make_trainer(cfg, arch, noise(8 * n, spec.size, g.device))
        t.epoch, t.epoch_step = 300, 1  # drop path is at half its strength
        count_ = len(t.loaders["train"])

        def step():
            t.epoch_step = 1 + t.epoch_step % (count_ - 2)
            t.optimise()

        row |= {"batch": n, "ms": g.ms(step)}
        row["images_per_s"] = 1e3 * n / row["ms"]
        with syncs(g) as where: step()
        row |= {"syncs": sum(where.values()), "where": dict(where)}
    except Exception as e: row["error"] = said(e)
    yield row


# 5: the same bits
def smoke(g: Ground, **more):
    return preset("smoke", device=g.device.type, **{"data.subset": 256, "search.warmup": 1, "search.max_epochs": 1 if g.toy else 4, **more})


def bits(g: Ground):
    "Twelve steps twice, and a search that is interrupted and goes on, beside one that is not: plain, then with PyTorch's deterministic algorithms."
    for strict in (False, True):
        row = {"deterministic": strict}
        torch.use_deterministic_algorithms(strict, warn_only=True)
        torch.backends.cudnn.deterministic = strict
        try:
            found = []
            with warnings.catch_warnings(record=True) as w:
                warnings.simplefilter("always")
                for _ in range(2):
                    s = make_search(smoke(g, **{"search.warmup": 0}))
                    for _ in range(3 if g.toy else 12): s.step()
                    found.append(torch.cat([p.detach().flatten() for p in s.net.parameters()]).cpu())
            row["same_bits"] = len(found[0]) == len(found[1]) and bool(torch.equal(*found))
            if len(found[0]) == len(found[1]): row["difference"] = float((found[0] - found[1]).abs().max())
            row["not_deterministic"] = sorted({str(x.message).split(" does not")[0][:80] for x in w if "does not have a deterministic" in str(x.message)})
            row["step_ms"] = g.ms(lambda: optimise(s), 0.3)
            if g.left() > 15 and (strict or not g.toy): row |= resumed(g)
        except Exception as e: row["error"] = said(e)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic = False
        yield row


def resumed(g: Ground) -> dict:
    "An interrupted search that goes on, and the same one uninterrupted."
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        a, b, cfg = Path(folder) / "whole", Path(folder) / "cut", smoke(g)
        start = time.perf_counter()
        whole = runs.search(cfg, a, listeners=(report,))
        out = {"search_s": time.perf_counter() - start, "search_steps": whole["steps"], "report": (a / "report.html").exists()}

        def stop(event):
            if event.type == "epoch" and event.epoch == 2: raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt): runs.search(cfg, b, listeners=(stop,))
        runs.search(None, b, resume=True)
        events = [[{k: v for k, v in e.items() if k != "time"} for e in read_events(f / "events.jsonl")] for f in (a, b)]
        same = [x == y for x, y in zip(*events)]
        return out | {"resume_equal": events[0] == events[1], "events": len(events[0]), "first_different": same.index(False) if False in same else None,
                      "resume_warnings": sorted({str(x.message)[:120] for x in w if "was begun with" in str(x.message)})}


def advice(g: Ground):
    "What is said when memory runs out."
    s = make_search(preset("smoke", device=g.device.type))
    open_stage(s)
    yield {"asked": "advice of a search on the device", **attempt_row(lambda: runs.memory_advice(s))}
    if g.gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 600 * 2**20 / total))  # as if the card had 600 MiB
        with tempfile.TemporaryDirectory() as folder:
            yield {"asked": "a search with too large a batch", **attempt_row(lambda: runs.search(preset("smoke", device="cuda", **{"space.channels": 64, "space.cells": 6, "data.size": 32, "search.batch": 400, "search.target_m": 2.0}), Path(folder) / "run"))}
        torch.cuda.set_per_process_memory_fraction(1.0)


def attempt_row(f) -> dict:
    try: return {"said": str(f())[:400]}
    except Exception as e: return {"error": said(e)}


# 7: Table IV
def stage_nets(g: Ground):
    "The nets that stages begin with, at C=24, L=8, batch 96, in one stage and in three; between stages random operations go and some return."
    C, L, n = (4, 3, 8) if g.toy else (24, 8, 96)
    cases = [(1, "fp32", "none"), (3, "fp32", "none"), (1, "bf16", "none"), (3, "bf16", "none"), (3, "fp32", "earlier"), (3, "bf16", "earlier")]
    for stages, how, recompute in cases[1:2] if g.toy else cases:
        net, draw = SuperNet(NetSpec(C, L, size=8 if g.toy else 32), seed=0, engine=make(Compute(amp=how == "bf16", recompute=recompute))), torch.Generator().manual_seed(0)
        for i, (name, end, head) in enumerate(plan(net.spec, stages)[:stages]):
            net.open(end, head)
            net.discretising = True
            yield {"stages": stages, "stage": name, "how": how, "recompute": recompute}, net, n
            if i + 1 < stages: memory._thin(net, 0.3, Settings().regrow, draw)


def table4(g: Ground):
    "The most memory that a joint step of each stage takes (Table IV); `planned` says what was planned."
    for row, net, n in stage_nets(g):
        if g.left() < 3:
            yield {"note": "cut short: the time is spent"}
            return
        try:
            g.precision(row["how"])
            on = copy.deepcopy(net).to(g.device)
            g.fresh()
            step = trained(on, n, g)
            for _ in range(3): step()
            row |= {"step_ms": 1e3 * g.once(step), **g.peaks()}
        except Exception as e: row["error"] = said(e)
        on = step = None
        g.fresh()
        yield row


# 8: many at once
def small_step(device: str, toy: bool):
    "A step at the size of the scaled-down searches: C=8, L=6, 16 pixels, batch 64."
    net = whole_net(*((4, 3, 1.0, 8) if toy else (8, 6, 1.0, 16))).to(device)
    return trained(net, 8 if toy else 64, Ground(device, toy))


def paced(i: int, rounds: list, seconds: float, device: str, toy: bool, gate, answers):
    "A process that makes steps in those rounds in which it takes part."
    try:
        torch.set_num_threads(1)
        step, g = small_step(device, toy), Ground(device, toy)
        for _ in range(3): step()
        for at, n in enumerate(rounds):
            g.wait()
            gate.wait(120)
            if i < n:
                done, start, cpu = 0, time.perf_counter(), time.process_time()
                while time.perf_counter() - start < seconds:
                    step()
                    g.wait()
                    done += 1
                answers.put((at, 1e3 * (time.perf_counter() - start) / done, 1e3 * (time.process_time() - cpu) / done))
            gate.wait(120)
    except Exception as e: answers.put((-1, said(e), 0.0))


def together(rounds: list, seconds: float, device: str, toy: bool) -> list:  # a row a round
    "Milliseconds of a step with several processes at once."
    context = multiprocessing.get_context("spawn")
    gate, answers = context.Barrier(max(rounds)), context.Queue()
    team = [context.Process(target=paced, args=(i, rounds, seconds, device, toy, gate, answers)) for i in range(max(rounds))]
    for p in team: p.start()
    found, errors = collections.defaultdict(list), []
    try:
        for _ in range(sum(rounds)):
            at, ms, cpu = answers.get(timeout=150)
            if at < 0:
                errors.append(ms)
                break
            found[at].append((ms, cpu))
    except Exception as e: errors.append(said(e))
    finally:
        if errors: gate.abort()
        for p in team:
            p.join(20)
            if p.is_alive(): p.kill()
    rows = [{"processes": n, "ms": statistics.fmean(m for m, _ in found[at]), "slowest_ms": max(m for m, _ in found[at]), "cpu_ms": statistics.fmean(c for _, c in found[at]), "steps_per_s": sum(1e3 / m for m, _ in found[at])}
            for at, n in enumerate(rounds) if found[at]]
    return rows + [{"error": e} for e in errors]


def crowd_cpu(g: Ground):
    "One-thread steps on the machine's CPU, alone and with as many processes as it has cores, but one."
    from mgdarts.runs.bench import bench_step
    from mgdarts.fast.compiled import kernels_in_use

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "unknown")
    cores = len(os.sched_getaffinity(0))
    yield {"cpu": cpu, "cores": cores, "capability": torch.backends.cpu.get_cpu_capability(), "kernels": kernels_in_use()}
    found = bench_step(4, 3, 8, size=8, steps=1) if g.toy else bench_step(8, 6, 64, size=16, steps=5)
    yield {"bench_step": {k: found[k] for k in ("cpu_s", "wall_s", "matmul_gflops", "times_floor", "kernels", "channels", "cells", "batch", "size")}}
    many = max(2, cores - 1)
    for row in together([2] if g.toy else [1, many], 0.2 if g.toy else 3.0, "cpu", g.toy): yield {"device": "cpu", **row}


def crowd(g: Ground):
    "Small steps on the card: one process, four, eight; and again through CUDA's multi-process service, where there is one."
    rounds, seconds = ([1], 0.2) if g.toy else ([1, 4, 8], 3.0)
    for row in together(rounds, seconds, g.device.type, g.toy): yield {"mps": False, **row}
    server = shutil.which("nvidia-cuda-mps-control")
    if not g.gpu or not server or g.left() < 25:
        yield {"mps": "not tried" if g.gpu and server else "not there"}
        return
    with tempfile.TemporaryDirectory() as folder:
        place = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        os.environ.update(place)
        try:
            subprocess.run([server, "-d"], timeout=20, check=True, capture_output=True)
            for row in together([4, 8], seconds, "cuda", g.toy): yield {"mps": True, **row}
        except Exception as e: yield {"mps": True, "error": said(e)}
        finally:
            with contextlib.suppress(Exception): subprocess.run([server], input=b"quit\n", timeout=20, capture_output=True)
            for k in place: os.environ.pop(k, None)


def machine(g: Ground):
    "The card and its two ceilings: bytes moved and products a second, measured."
    row = {"python": os.sys.version.split()[0], "torch": torch.__version__, "cores": os.cpu_count()}
    for name in ("plotly", "triton", "torchvision", "sklearn", "safetensors"): attempt(row, name, lambda: getattr(__import__(name), "__version__", "there"))
    if g.gpu:
        p = torch.cuda.get_device_properties(0)
        row |= {"name": p.name, "memory_gib": p.total_memory / 2**30, "multiprocessors": p.multi_processor_count, "capability": f"{p.major}.{p.minor}", "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        attempt(row, "driver", lambda: subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20).stdout.strip())
    yield row
    n = 256 if g.toy else 8192
    for how in HOWS:
        g.precision(how)
        a, b = (torch.randn(n, n, device=g.device).to(torch.bfloat16 if how == "bf16" else torch.float32) for _ in range(2))
        yield {"what": f"matrix product {n}, {how}", "tflop_per_s": 2 * n**3 / g.ms(lambda: a @ b, 0.3) / 1e9}
    a = torch.randn(2**20 if g.toy else 2**29, device=g.device)
    b = torch.empty_like(a)
    yield {"what": "copy", "gb_per_s": 2 * a.numel() * 4 / g.ms(lambda: b.copy_(a), 0.3) / 1e6}
    x = torch.zeros(8).to(g.device)
    yield {"what": "launch of a small kernel, eager", "us": 1e3 * g.ms(lambda: [x.add_(1) for _ in range(1000)], 0.3) / 1000}
    row = {"what": "the same in a graph"}
    replay = attempt(row, "graph", lambda: g.graph(lambda: [x.add_(1) for _ in range(1000)]))
    yield row | ({"graph": True, "us": 1e3 * g.ms(replay, 0.3) / 1000} if replay else {})
