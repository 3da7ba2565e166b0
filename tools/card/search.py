"A search on the device: the same losses, steps with their data, the same bits, and what is said when memory runs out."
import contextlib
import tempfile
import time
import warnings
from pathlib import Path

import torch

from card.ground import Ground, each, noise, syncs, tried
from mgdarts.methods.registry import preset
from mgdarts.runs import run as runs
from mgdarts.runs.listen import read_events
from mgdarts.runs.make import make_search
from mgdarts.search.stages import begin_joint, open_stage
from mgdarts.search.step import fetch, optimise
from mgdarts.views.report import report


# the same losses
def three_losses(g: Ground, method: str, device: str) -> tuple:  # losses, lines at which the third step waits
    "Three steps of a search."
    s, values = make_search(preset("smoke", method, device=device, **{"data.subset": 256, "search.warmup": 0})), []
    open_stage(s)
    s.events.listen(lambda event: values.append(event.data["value"].detach()), "forward")
    for _ in range(2): optimise(s)
    with syncs(g) if device != "cpu" else contextlib.nullcontext({}) as where: optimise(s)
    return [float(v) for v in values], where


def compare_losses(g: Ground, row: dict):
    seen = {device: three_losses(g, row["method"], device) for device in dict.fromkeys(("cpu", g.device.type))}
    (expected, _), (found, where) = seen["cpu"], seen[g.device.type]
    row |= {"losses": found, "syncs": sum(where.values()), "where": dict(where)}
    row["difference"] = max(abs(a - b) for a, b in zip(expected, found, strict=True))


def losses(g: Ground):
    "Three steps of the same search on the CPU and on the device, and what makes the third one wait."
    for method in ("mg-darts", "darts-v1", "darts-v2", "pc-darts", "gdas", "dass"):
        row = {"method": method}
        yield tried(row, compare_losses, g, row)


# real steps, with their data
def real_search(g: Ground, C: int, how: str, auto: bool, graph: str, n: int):
    "A search whose last stage has just begun, on random images."
    cfg = preset("small", device=g.device.type, **{
        "space.channels": C, "space.cells": 3 if g.toy else 8, "data.autoaugment": auto, "search.batch": n,
        "compute.tf32": how != "fp32", "compute.amp": how == "bf16", "compute.recompute": "none",
        "compute.graph": graph, "search.target_m": 0.03 if g.toy else 0.3})
    s = make_search(cfg, noise(8 * n, 8 if g.toy else 32, g.device))
    s.state.stage = 1  # the next one to be opened is the last
    open_stage(s)
    begin_joint(s)
    s.state.epoch_step = 1  # no copy of the state, which is made once an epoch
    return s


def real_steps(g: Ground, row: dict):
    g.fresh()
    n = 16 if g.toy else 96
    s = real_search(g, *row.values(), n)
    count = len(s.loaders["train"])

    def step():
        s.state.epoch_step = 1 + s.state.epoch_step % (count - 2)
        optimise(s)

    for _ in range(0 if g.toy else 5): step()  # the first ones of a kind are computed without a graph
    g.wait()
    row["ms"] = g.ms(step, 1.0)
    row["batch_ms"] = g.ms(lambda: fetch(s), 0.3)
    row["images_per_s"] = 1e3 * n / row["ms"]
    with syncs(g) as where: step()
    row |= {"syncs": sum(where.values()), "where": dict(where)}
    row["validation_images_per_s"] = 1e3 * len(s.loaders["val"].split) / g.ms(s.validate, 0.3)
    row["state_ms"] = 1e3 * g.once(s.state_dict)


def real(g: Ground):
    "Steps of a search as it is run: batch, forward, backward, update."
    cases = [(16, "bf16", True, "auto"), (16, "bf16", False, "auto"), (16, "bf16", False, "off"),
             (16, "tf32", True, "auto"), (24, "bf16", True, "auto"), (24, "tf32", True, "auto")]
    names = "C", "how", "autoaugment", "graph"
    if g.toy: cases = [(4, "fp32", True, "auto")]
    yield from each(g, 6, real_steps, ([dict(zip(names, case))] for case in cases))


# the same bits
def smoke(g: Ground, **more):
    size = {"data.subset": 150, "search.max_epochs": 1} if g.toy else {"data.subset": 256, "search.max_epochs": 4}
    changes = {**size, "search.warmup": 1, **more}
    return preset("smoke", device=g.device.type, **changes)


def twice(g: Ground, row: dict):
    "The parameters after twelve steps, made twice, and what PyTorch says is not deterministic."
    found = []
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        for _ in range(2):
            s = make_search(smoke(g, **{"search.warmup": 0}))
            for _ in range(3 if g.toy else 12): s.step()
            found.append(torch.cat([p.detach().flatten() for p in s.net.parameters()]).cpu())
    as_long = len(found[0]) == len(found[1])
    row["same_bits"] = as_long and bool(torch.equal(*found))
    if as_long: row["difference"] = float((found[0] - found[1]).abs().max())
    named = [str(x.message) for x in w if "does not have a deterministic" in str(x.message)]
    row["not_deterministic"] = sorted({text.split(" does not")[0][:80] for text in named})
    row["step_ms"] = g.ms(lambda: optimise(s), 0.3)
    if g.left() > 15 and (row["deterministic"] or not g.toy): row |= resumed(g)


def bits(g: Ground):
    """Twelve steps twice, and a search that is interrupted and goes on, beside one that is not.

    Plain, then with PyTorch's deterministic algorithms.
    """
    for strict in (False, True):
        row = {"deterministic": strict}
        torch.use_deterministic_algorithms(strict, warn_only=True)
        torch.backends.cudnn.deterministic = strict
        tried(row, twice, g, row)
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        yield row


def stop(event):
    if event.type == "epoch" and event.epoch == 2: raise KeyboardInterrupt


def timeless(run: Path) -> list:
    "The events of a run, without when they were."
    return [{k: v for k, v in e.items() if k != "time"} for e in read_events(run / "events.jsonl")]


def resumed(g: Ground) -> dict:
    "An interrupted search that goes on, and the same one uninterrupted."
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        a, b, cfg = Path(folder) / "whole", Path(folder) / "cut", smoke(g)
        start = time.perf_counter()
        whole = runs.search(cfg, a, listeners=(report,))
        out = {"search_s": time.perf_counter() - start, "search_steps": whole["steps"],
               "report": (a / "report.html").exists()}
        with contextlib.suppress(KeyboardInterrupt): runs.search(cfg, b, listeners=(stop,))
        runs.search(None, b, resume=True)
        events = [timeless(run) for run in (a, b)]
        same = [x == y for x, y in zip(*events)]
        elsewhere = "was begun with", "went on with"  # what is said of the first and of later parts of a run
        warned = {text[:120] for text in (str(x.message) for x in w) if any(words in text for words in elsewhere)}
        return out | {"resume_equal": events[0] == events[1], "events": len(events[0]),
                      "first_different": same.index(False) if False in same else None,
                      "resume_warnings": sorted(warned)}


# what is said when memory runs out
def memory_of(g: Ground, row: dict):
    s = make_search(preset("smoke", device=g.device.type))
    open_stage(s)
    row["said"] = runs.memory_advice(s)[:400]


def too_large(g: Ground, row: dict):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 600 * 2**20 / total))  # as if the card had 600 MiB
    cfg = preset("smoke", device="cuda", **{"space.channels": 64, "space.cells": 6, "data.size": 32,
                                            "search.batch": 400, "search.target_m": 2.0})
    try:
        with tempfile.TemporaryDirectory() as folder: row["said"] = str(runs.search(cfg, Path(folder) / "run"))[:400]
    finally: torch.cuda.set_per_process_memory_fraction(1.0)


def advice(g: Ground):
    "What is said when memory runs out."
    row = {"asked": "advice of a search on the device"}
    yield tried(row, memory_of, g, row)
    row = {"asked": "a search with too large a batch"}
    if g.gpu: yield tried(row, too_large, g, row)
