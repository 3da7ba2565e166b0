"""Measure everything on a card in a few minutes, and write a record.

Needs PyTorch and the package's other requirements; a report of a search needs plotly.

usage: python tools/gpu.py [measure] [--device auto|cpu|cuda] [--toy] [--budget SECONDS] [--out FOLDER] [--parts a,b]
                           [--images PACK] [--inline]
                                          record.json and log.txt, a short table, and a whole search with its Figure 8;
                                          with --toy in under a minute, on any machine
       python tools/gpu.py list RECORD... [--seeds 0,1] [--set KEY=VALUE,...] [--arms LABEL] --out LIST.json
                                          the arms of some records as a list of jobs, with other seeds and settings
       python tools/gpu.py pack [LIST.json] --out PACK.safetensors [--data-dir FOLDER]
                                          the images that the jobs need, or without a list the whole search of
                                          `measure`, for a machine without them
       python tools/gpu.py jobs LIST.json --out FOLDER [--images PACK] [--runs FOLDER] [--workers N]
                           [--device cpu|cuda] [--limit SECONDS]
                                          run them side by side, one thread each, until the time is up; put the run
                                          folders into archives
       python tools/gpu.py unpack ARCHIVE... [--runs runs/repro]
                                          at home: `mgdarts reproduce` finds the runs finished

Each part is measured in a process of its own, with a time limit: one that fails or hangs stops no other.
"""
import argparse
import contextlib
import importlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from card.summary import lines, summary

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))

# name: (module, seconds it may take), by what they are worth
PARTS = {"machine": ("machine", 40), "losses": ("search", 45), "steps": ("steps", 100), "layouts": ("layouts", 70),
         "retraining": ("training", 40), "real": ("search", 45), "bits": ("search", 45), "advice": ("search", 25),
         "table4": ("steps", 45), "crowd": ("crowd", 60), "whole": ("whole", 170), "crowd_cpu": ("crowd", 45),
         "convolutions": ("layouts", 30)}
# run beside the others, from the first or second on: they compile and count, and measure nothing
BESIDE = {"compiled": ("machine", 0), "triton": ("layouts", 1), "planned": ("steps", 1)}


def rows_of(part: str, args, seconds=None):
    """Measure a part here; a part that fails ends with a row that says so.

    seconds: it may take; None: they are read from stdin, once all is imported.
    """
    import torch
    from card.ground import Ground, said

    torch.set_num_threads(1)
    module = importlib.import_module(f"card.{(BESIDE.get(part) or PARTS[part])[0]}")
    if seconds is None: seconds = float(sys.stdin.readline() or 0)
    ground = Ground(args.device, args.toy, time.monotonic() + seconds, args.out, args.images)
    try: yield from getattr(module, part)(ground)
    except Exception as e: yield {"part_error": said(e)}


def python_path() -> str: return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def start(part: str, folder: Path, log, args) -> subprocess.Popen:
    """A part in a process of its own, which is the head of its group.

    It imports all it needs, waits for `go`, and writes a row a line.
    """
    env = {**os.environ, "PYTHONPATH": python_path(), "OMP_WAIT_POLICY": "PASSIVE",
           "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    rows = str(folder / f"{part}.jsonl")
    command = [sys.executable, __file__, "part", part, "--device", args.device, "--rows", rows, "--out", args.out,
               "--images", args.images, *["--toy"] * args.toy]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, text=True,
                            start_new_session=True)


def go(process: subprocess.Popen, seconds: float):
    with contextlib.suppress(OSError): print(seconds, file=process.stdin, flush=True)


def end(process: subprocess.Popen):
    "End a process that we started, with all that it started."
    with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_rows(path: Path) -> list:
    if not path.exists(): return []
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def plain(value):
    "Fit for JSON: numbers that are none become text."
    if isinstance(value, dict): return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [plain(v) for v in value]
    if isinstance(value, float): return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, (int, str, type(None))) else str(value)


def outlasted(process: subprocess.Popen, seconds: float) -> str:  # what went wrong; empty: nothing
    "Wait for a process, and end it when the time is up."
    try: code = process.wait(seconds)
    except subprocess.TimeoutExpired: return "it took too long and was ended"
    finally: end(process)
    return f"its process ended with code {code}" if code else ""


def measured(name: str, args, folder: Path, log, seconds: float, process=None) -> dict:  # process: started before
    "A part: its rows, how long it took, what went wrong."
    begun, note = time.monotonic(), ""
    if args.inline: rows = [plain(r) for r in rows_of(name, args, seconds)]
    else:
        process = process or start(name, folder, log, args)
        go(process, seconds)
        note = outlasted(process, seconds + 12)  # it ends by itself, if it does not hang
        rows = read_rows(folder / f"{name}.jsonl")
    return {"seconds": round(time.monotonic() - begun, 1), **({"note": note} if note else {}), "rows": rows}


class Measuring:
    "The parts of a record, one after the other, and those beside them."

    def __init__(self, args, folder: Path, log):
        self.args, self.folder, self.log, self.begun = args, folder, log, time.monotonic()
        self.beside, self.ahead = {}, {}  # processes that run beside the others; those that import their libraries

    def spent(self) -> float: return time.monotonic() - self.begun
    def left(self) -> float: return self.args.budget - self.spent()
    def start(self, name: str): return start(name, self.folder, self.log, self.args)

    def part(self, name: str, after: list) -> dict:  # after: the next part
        "Measure a part, while the one after it imports its libraries."
        this = self.ahead.pop(name, None)
        for n in after:
            if n not in BESIDE and not self.args.inline: self.ahead[n] = self.start(n)
        most = min(PARTS.get(name, (None, 60))[1], self.left() - 5)
        if most > 10 or self.args.toy and most > 0:
            return measured(name, self.args, self.folder, self.log, most, this)
        if this: end(this)
        return {"seconds": 0, "note": "skipped: the time is spent", "rows": []}

    def parts(self, chosen: list):
        "(name, what was measured) of each part; of those beside the others last."
        for i, name in enumerate(chosen):
            for b, (_, at) in BESIDE.items():
                if b not in chosen or at != i or self.args.inline: continue
                self.beside[b] = self.start(b)
                go(self.beside[b], self.args.budget)
            if name not in self.beside: yield name, self.part(name, chosen[i + 1 : i + 2])
        for name, process in self.beside.items():
            note = outlasted(process, max(1, self.left()))
            yield name, {**({"note": note} if note else {}), "rows": read_rows(self.folder / f"{name}.jsonl")}

    def close(self):
        for process in (*self.beside.values(), *self.ahead.values()): end(process)


def measure(args) -> dict:
    "All parts; the record is written after each of them."
    import torch

    from mgdarts.base.files import write_json
    from mgdarts.runs.folder import environment

    if args.device == "auto": args.device = "cuda" if torch.cuda.is_available() else "cpu"
    out, chosen = Path(args.out), args.parts.split(",") if args.parts else [*PARTS, *BESIDE]
    out.mkdir(parents=True, exist_ok=True)
    here = environment(torch.device(args.device)) | ({"commit": args.commit, "modified": False} if args.commit else {})
    record = {"schema": 1, "title": "What a card does", "scale": "toy" if args.toy else "full", "environment": here,
              "command": shlex.join(["tools/gpu.py", *args.argv]), "budget_s": args.budget, "parts": {}}
    with tempfile.TemporaryDirectory() as folder, open(out / "log.txt", "w") as log:
        measuring = Measuring(args, Path(folder), log)
        with contextlib.closing(measuring):
            for name, part in measuring.parts(chosen):
                record["parts"][name] = part
                record["wall_s"] = round(measuring.spent(), 1)
                write_json(out / "record.json", record)
                if name in measuring.beside: continue
                said = lines(name, part)
                print("\n".join(said), flush=True)
                print("\n".join(said[:1] + [json.dumps(r) for r in part["rows"]]), file=log, flush=True)
    return record


def jobs(args) -> dict:
    if args.device == "cpu": os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a configuration says auto, and names its runs
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": python_path()}
    from card import jobs as made

    todo, folder, out = made.read_list(args.paths[0]), Path(args.runs or Path(args.out) / "runs"), Path(args.out)
    found = made.run(todo, folder, args.images, args.workers, args.limit, args.commit)
    found |= made.collected(todo, folder, out)
    (out / "jobs.json").write_text(json.dumps(found, indent=1))
    return found


def part(args):
    "What a process of `start` does."
    with open(args.rows, "w", encoding="utf-8") as f:
        for row in rows_of(args.paths[0], args): print(json.dumps(plain(row)), file=f, flush=True)


def listed(args) -> list:
    from card.jobs import listed
    from mgdarts.methods.registry import pairs
    from mgdarts.paper.study import seeds_of

    seeds, labels = (seeds_of(args.seeds) if args.seeds else []), (args.arms.split(",") if args.arms else [])
    found = listed(args.paths, seeds, pairs(args.set), labels)
    Path(args.out).write_text(json.dumps([vars(j) for j in found]))
    return found


def packed(args) -> dict:
    from card.jobs import pack, read_list
    from card.whole import job

    return pack(read_list(args.paths[0]) if args.paths else [job()], Path(args.out), args.data_dir)


def unpacked(args) -> list:
    from card.jobs import unpack

    return unpack(args.paths, Path(args.runs or ROOT / "runs/repro"))


def arguments(argv: list) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("measure", "part", "list", "pack", "jobs", "unpack"))
    p.add_argument("paths", nargs="*")
    p.add_argument("--device", default="auto")
    p.add_argument("--commit", default=os.environ.get("MGDARTS_COMMIT", ""))
    for name in ("out", "parts", "rows", "seeds", "set", "arms", "images", "runs", "data-dir"):
        p.add_argument(f"--{name}", default="")
    p.add_argument("--budget", type=float, default=300.0)
    p.add_argument("--limit", type=float, default=0.0)
    p.add_argument("--workers", type=int, default=0)
    for name in ("toy", "inline"): p.add_argument(f"--{name}", action="store_true")
    args = p.parse_args(argv if argv and not argv[0].startswith("-") else ["measure", *argv])
    args.argv = argv
    if args.what == "measure": args.out = args.out or str(ROOT / "runs/gpu")
    return args


def main(argv: list):
    args = arguments(argv)
    if args.what == "part": part(args)
    elif args.what == "measure": print(summary(measure(args)))
    elif args.what == "jobs": print(json.dumps(jobs(args)))
    elif args.what == "list": print(f"{len(listed(args))} jobs")
    elif args.what == "pack": print(json.dumps(packed(args)))
    else: print("\n".join(unpacked(args)))


if __name__ == "__main__": main(sys.argv[1:])
