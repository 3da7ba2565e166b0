"A whole search of the paper's small net on part of CIFAR-10: its run folder, and its thresholds as in Figure 8."
import contextlib
import shutil
import time
from pathlib import Path

from card.ground import Ground, attempt, tried
from card.jobs import Packed
from mgdarts.base.data import load_data
from mgdarts.base.options import to_dict
from mgdarts.methods.registry import preset
from mgdarts.paper.arms import Job
from mgdarts.runs import run as runs
from mgdarts.runs.listen import read_events
from mgdarts.views.figures import dynamics
from mgdarts.views.report import report
from mgdarts.views.save import save_figure

# as the preset `cpu` moves lambda and prunes: 56 steps an epoch, not 468
FEW = {"search.warmup": 2, "search.max_epochs": 24, "search.lambda_step": 5e-4, "search.prune_low": 0.06,
       "search.prune_high": 0.1, "search.target_m": 0.7}
TOY = {"space.channels": 4, "space.cells": 3, "data.size": 8, "data.subset": 150, "data.test_subset": 50,
       "search.warmup": 0, "search.max_epochs": 1, "search.target_m": 0.01, "search.batch": 32}


def configuration(device: str, toy: bool, images: str):  # a Config
    "The search: C=24, L=8, batch 96 and three stages, bfloat16; on digits at 32 pixels where no images came along."
    part = {"data.name": "cifar10", "data.subset": 6000, "data.test_subset": 1000}
    if not images: part |= {"data.name": "digits", "data.size": 32, "data.subset": 1.0, "data.test_subset": 1.0}
    more = {"compute.amp": device != "cpu", "device": device, "threads": 1, **part, **FEW}
    return preset("small", **{**more, **(TOY if toy else {})})


def job() -> Job:
    "What a pack needs to know."
    return Job("whole", 0, to_dict(configuration("cuda", False, "a pack")), None)


def search(g: Ground, row: dict):
    cfg, run, begun = configuration(g.device.type, g.toy, g.images), Path(g.out) / "whole", time.monotonic()
    load = Packed(Path(g.images)) if g.images else load_data
    splits = load(cfg.data, cfg.seed, g.device)

    def hear(event):
        if event.type == "epoch" and g.left() < 12: raise KeyboardInterrupt  # enough to draw what there is

    shutil.rmtree(run, ignore_errors=True)
    g.fresh()
    row |= {"dataset": splits.label, "finished": False}
    with contextlib.suppress(KeyboardInterrupt):
        result = runs.search(cfg, run, splits=splits, listeners=(report, hear))
        first = ("reached", "target", "params", "epochs", "steps", "wall_s", "derived", "retention")
        row |= {"finished": True, **{k: result[k] for k in first}}
    events = read_events(run / "events.jsonl")
    epochs = [e for e in events if e["type"] == "epoch"]
    row |= {"seconds": time.monotonic() - begun, "epochs_done": len(epochs), "stage": events[-1]["stage"],
            "val_acc": epochs[-1]["val_acc"] if epochs else None, **g.peaks()}
    shutil.rmtree(run / "checkpoint", ignore_errors=True)  # states and a library need not come home
    (run / "plotly.min.js").unlink(missing_ok=True)
    attempt(row, "figure", lambda: save_figure(dynamics(events), Path(g.out) / "fig08.html", plotlyjs="cdn"))


def whole(g: Ground):
    "A whole search, and Figure 8 of it."
    row = {}
    yield tried(row, search, g, row)
