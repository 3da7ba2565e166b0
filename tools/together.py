"""What a step costs in two processes, beside one that has the same work: half of the batch.

usage: python tools/together.py [--steps 8] [--rounds 3] [--set KEY=VALUE ...] [--out RECORD.json]
"""
import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
from mgdarts.base.events import TEAM

SIZE = {"space.channels": "16", "space.cells": "8", "data.name": "digits", "data.size": "32", "data.subset": "600",
        "search.warmup": "0", "search.target_m": "0.3", "search.stages": "1", "threads": "1"}


def steps(batch: int, n: int, settings: dict, own: bool):
    "Steps of a search in this process, which may be one of two: seconds of each as JSON."
    import torch

    from mgdarts.base import ranks
    from mgdarts.methods.registry import preset
    from mgdarts.runs.make import make_search
    from mgdarts.search.stages import open_stage
    from mgdarts.search.step import optimise

    torch.set_num_threads(1)
    ranks.join(synced=not own)
    calls, sent, real = [0], [0], ranks.exchanged

    def counted(f, *args):
        calls[0] += 1
        sent[0] += sum(t.numel() * t.element_size() for t in args if isinstance(t, torch.Tensor))
        return real(f, *args)

    ranks.exchanged = counted
    search = make_search(preset("small", **{**SIZE, **settings, "search.batch": batch}))
    open_stage(search)
    for _ in range(2): optimise(search)
    calls[0] = sent[0] = 0
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(n): optimise(search)
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in search.net.parameters() if p.grad is not None)
    print(json.dumps({"wall_s": (time.perf_counter() - wall) / n, "cpu_s": (time.process_time() - cpu) / n,
                      "exchanges": calls[0] / n, "bytes_sent": sent[0] / n, "gradient_bytes": gradients}))
    ranks.leave()


def alone() -> dict:
    "The environment of a process that does not know of others yet."
    env = {k: v for k, v in os.environ.items() if k not in TEAM}
    return env | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


def team(n: int, *command: str) -> list:  # what each process prints
    "Start processes of a run as `torchrun` starts them; one is alone."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = alone()
    if n > 1: env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n)}
    ps = [subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                           env=env | ({"RANK": str(r)} if n > 1 else {})) for r in range(n)]
    said = [p.communicate(timeout=400)[0] for p in ps]
    codes = [p.returncode for p in ps]
    if any(codes): raise RuntimeError(f"processes of {command} ended with {codes}")
    return said


def compare(args) -> dict:
    "Rounds of all kinds, one after the other; medians."
    from mgdarts.base.files import write_json
    from mgdarts.runs.folder import environment

    kinds = {"one process, half the batch": (1, args.batch // 2, 0), "two processes": (2, args.batch, 0),
             "two processes, norms of each": (2, args.batch, 1)}
    found = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind, (n, batch, own) in kinds.items():
            found[kind] += map(json.loads, team(n, __file__, "part", str(batch), str(args.steps), str(own), *args.set))
    rows = [{"kind": kind, **{k: statistics.median(r[k] for r in said) for k in said[0]}}
            for kind, said in found.items()]
    for r in rows: r |= {f"{k}_ratio": r[f"{k}_s"] / rows[0][f"{k}_s"] for k in ("cpu", "wall")}
    import torch

    record = {"title": "A step in two processes, beside one that has the same work", "batch": args.batch,
              "settings": {**SIZE, **dict(p.split("=", 1) for p in args.set)}, "steps": args.steps,
              "rounds": args.rounds, "environment": environment(torch.device("cpu")), "rows": rows}
    if args.out: write_json(Path(args.out), record)
    return record


def main(argv: list):
    if argv[:1] == ["part"]:
        return steps(int(argv[1]), int(argv[2]), dict(p.split("=", 1) for p in argv[4:]), argv[3] == "1")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--set", action="append", default=[])
    p.add_argument("--out", default="")
    for row in compare(p.parse_args(argv))["rows"]:
        print(f"{row['kind']:30} {row['cpu_s']:.3f} s of CPU ({row['cpu_ratio']:.2f}), {row['wall_s']:.3f} s "
              f"({row['wall_ratio']:.2f}); {row['exchanges']:.0f} exchanges, {row['bytes_sent'] / 2**20:.2f} MiB, "
              f"gradients {row['gradient_bytes'] / 2**20:.2f} MiB")


if __name__ == "__main__": main(sys.argv[1:])
