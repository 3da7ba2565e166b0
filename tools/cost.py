"""Measure what runs take besides their steps, and check the cost model against runs, in one process and in two.

usage: python tools/cost.py [check] [--out figures/scale/cost.json] [--runs FOLDER] [--again]
                                          again: predict the runs that are in FOLDER, as the record says their rest
       python tools/cost.py paper [--out figures/scale/paper.json]
                                          what the paper's whole evidence costs on 1, 8 and 64 GPUs

`check` writes the record that `mgdarts plan --sweep` reads. All seconds are CPU seconds of
one thread: what others do on the same cores makes a run slower by the clock, and by its caches a little here too.
"""
import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
import torch

from mgdarts.base.files import read_json, write_json
from mgdarts.base.options import from_dict
from mgdarts.methods.registry import preset
from mgdarts.paper.evidence import evidence
from mgdarts.runs.folder import environment
from mgdarts.runs.run import train
from mgdarts.sweep import cost, pace
from mgdarts.sweep.executors import Local, grouped
from mgdarts.sweep.jobs import job_of
from mgdarts.sweep.work import do

HARDLY = {"data.subset": 96, "search.prune_every": 1, "search.lambda_step": 0., "search.stage_keep": (.99, .99, .99),
          "search.target_m": .0775}  # one step an epoch, and nothing goes
BIGGER = {"space.channels": 6, "space.cells": 4, "data.size": 12, "search.target_m": .03}
KINDS = {"MG-DARTS": ("mg-darts", {}), "DARTS-V1": ("darts-v1", {}), "MG-DARTS, a larger net": ("mg-darts", BIGGER)}


def spent(f) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def rest_of_a_search(folder: Path, stages: int, epochs: int) -> float:
    "CPU seconds of a search, without its steps and looks at images."
    cfg = preset("smoke", **HARDLY, **{"search.stages": stages, "search.max_epochs": epochs})
    p, images = pace.measured(cfg, parts=("search",)), pace.images_of(cfg)
    steps = cost.search_seconds(cfg, p, images)
    return spent(lambda: do(job_of("hardly", cfg, train=False), folder / f"{stages}-{epochs}")) - steps


def rest_of_a_training(folder: Path, epochs: int) -> float:
    cfg = preset("smoke", **{"data.subset": 96, "train.epochs": epochs, "train.batch": 40})  # two steps an epoch
    p, images = pace.measured(cfg, parts=("train",)), pace.images_of(cfg)
    return spent(lambda: train(cfg, p.arch, folder / f"t-{epochs}")) - cost.train_seconds(cfg, p, images)


def overhead(folder: Path) -> dict:
    "What a run takes besides its steps, as `cost.Overhead` has it."
    torch.set_num_threads(1)
    few, many, one = (rest_of_a_search(folder, *k) for k in ((3, 2), (3, 12), (1, 2)))
    epoch = (many - few) / 40
    stage = (few - one) / 2 - 3 * epoch
    short, long = (rest_of_a_training(folder, n) for n in (2, 42))
    loading = "import time, mgdarts.sweep.work; print(time.process_time())"
    worker = float(subprocess.run([sys.executable, "-c", loading], capture_output=True, text=True, check=True).stdout)
    found = {"search": few - 4 * stage - 12 * epoch, "stage": stage, "epoch": epoch,
             "train": short - 2 * (long - short) / 40, "train_epoch": (long - short) / 40, "worker": worker}
    source = "searches and retrainings of one step an epoch, on a CPU, CPU seconds: figures/scale/cost.json"
    return {k: round(max(v, 0.), 4) for k, v in found.items()} | {"source": source}


def timed(job, folder):
    "Do a job, and note what it took."
    start, clock = time.process_time(), time.time()
    do(job, folder)
    taken = {"cpu_s": time.process_time() - start, "wall_s": time.time() - clock, "pid": os.getpid()}
    write_json(job.run(Path(folder)) / "taken.json", taken)


def carried_out(jobs: list, folder: Path, workers: int):
    with closing(Local(workers)(grouped(jobs, folder), folder, timed)) as ends:
        for i, why, seconds in ends:
            print(f"{jobs[i].label}, seed {jobs[i].seed}: {seconds:.0f} s by the clock {why}", flush=True)
            assert not why


def jobs_of(seeds: tuple) -> list:
    kinds = KINDS.items()
    return [job_of(label, preset("smoke", method, **more, seed=s)) for label, (method, more) in kinds for s in seeds]


def row(job, folder: Path, costs, paces, extra) -> dict:
    "What was predicted of a run, and what it took."
    run, cfg = job.run(folder), from_dict(job.search)
    result, taken = read_json(run / "result.json", "a result"), read_json(run / "taken.json", "a run")
    prunes = cost.parts_of(cfg).decision.prunes
    share = cost.share_of(cfg, 4, result["epochs"]) if prunes else 1.
    own = cost.costs_of([job], paces, {(cfg.preset, cfg.method, cfg.search.stages): [share]}, extra)[0]
    return {"label": job.label, "seed": job.seed, "epochs": result["epochs"], "reached": result["reached"],
            "predicted_s": costs and round(costs.typical, 2), "epochs_known_s": round(own.typical, 2),
            "most_s": round(own.most, 2), "measured_s": round(taken["cpu_s"], 2), "wall_s": round(taken["wall_s"], 2),
            "pid": taken["pid"]}


def record_of(jobs: list, rows: list) -> dict:
    return {"arms": [asdict(j) for j in jobs], "rows": rows}


def checked(folder: Path, extra: cost.Overhead) -> dict:
    "Predict runs, do them, and put the two beside each other."
    paces, first, then = cost.Paces("cpu"), jobs_of((0,)), jobs_of((1, 2))
    carried_out(first, folder, 1)
    before = [row(j, folder, None, paces, extra) for j in first]
    known = {}
    for *key, share in cost.shares_in(record_of(first, before)): known.setdefault(tuple(key), []).append(share)
    found = {id(j): cost.costs_of([j], paces, own(known, j, before), extra)[0] for j in then}
    then.sort(key=lambda j: -found[id(j)].typical)  # the longest first
    plan = cost.on_devices([found[id(j)].typical for j in then], 2, extra=extra)
    carried_out(then, folder, 2)
    after = [row(j, folder, found[id(j)], paces, extra) for j in then]
    loads = [sum(r["measured_s"] for r in after if r["pid"] == p) for p in {r["pid"] for r in after}]
    together = {"predicted_s": round(3600 * plan["hours"], 1), "measured_s": round(max(loads) + extra.worker, 1),
                "predicted_device_s": round(3600 * plan["device_hours"], 1),
                "measured_device_s": round(sum(loads) + 2 * extra.worker, 1)}
    rows = [{"processes": 1, **r} for r in before] + [{"processes": 2, **r} for r in after]
    for r in rows: del r["pid"]
    return record_of(first + then, rows) | {"two_processes": together}


def own(known: dict, job, before: list) -> dict:
    "The share of the run before it of the same kind: nets of two sizes have the same method and preset."
    r, cfg = next(r for r in before if r["label"] == job.label), from_dict(job.search)
    if not cost.parts_of(cfg).decision.prunes: return known
    return {(cfg.preset, cfg.method, cfg.search.stages): [cost.share_of(cfg, 4, r["epochs"])]}


def paper(out: Path):
    "What the paper's evidence costs on cards like the one that was measured."
    plan = asdict(cost.plan_of(evidence(), "cuda", (1, 8, 64)))
    other = {"whole": plan.pop("by_operations"), "parts": plan.pop("parts_by_operations")}
    write_json(out, {"item": "paper", "title": "the paper's evidence on 1, 8 and 64 GPUs",
                     "environment": environment(torch.device("cpu")), "command": shlex.join(["python", *sys.argv]),
                     "by_multiply_adds": plan, "by_operations": other})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("check", "paper"), default="check")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=Path, help="folder of the runs; a new one if not given")
    parser.add_argument("--again", action="store_true", help="predict runs that are there")
    given = parser.parse_args()
    given.out = given.out or ROOT / f"figures/scale/{'cost' if given.what == 'check' else 'paper'}.json"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.what == "paper": return paper(given.out)
    start = time.time()
    folder = given.runs or Path(tempfile.mkdtemp(prefix="cost-"))
    folder.mkdir(parents=True, exist_ok=True)
    found = read_json(given.out, "a record")["overhead"] if given.again else overhead(folder)
    print(found, flush=True)
    result = checked(folder / "runs", cost.Overhead(**found))
    ratios = [r["measured_s"] / r["epochs_known_s"] for r in result["rows"]]
    write_json(given.out, {"item": "cost", "title": "the cost model against runs", "scale": "scaled down",
                           "dataset": "digits", "environment": environment(torch.device("cpu")),
                           "command": shlex.join(["python", *sys.argv]), "wall_s": round(time.time() - start, 1),
                           "overhead": found, "median_ratio": round(statistics.median(ratios), 3), **result})
    for r in result["rows"]: print(r)
    print(result["two_processes"], "median of measured by predicted", statistics.median(ratios))


if __name__ == "__main__": main()
