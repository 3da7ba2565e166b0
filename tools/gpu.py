"""Measure everything on a card in a few minutes, and write a record. Needs PyTorch and the package's other requirements; a report of a search needs plotly.

usage: python tools/gpu.py [measure] [--device auto|cpu|cuda] [--toy] [--budget SECONDS] [--out FOLDER] [--parts a,b] [--inline]
                                          record.json and log.txt, and a short table; with --toy in under a minute, on any machine
       python tools/gpu.py list RECORD... [--seeds 0,1] [--set KEY=VALUE,...] [--arms LABEL] --out LIST.json
                                          the arms of some records as a list of jobs, with other seeds and settings
       python tools/gpu.py pack LIST.json --out PACK.safetensors [--data-dir FOLDER]
                                          the images that the jobs need, for a machine without them
       python tools/gpu.py jobs LIST.json --out FOLDER [--images PACK] [--runs FOLDER] [--workers N] [--device cpu|cuda] [--limit SECONDS]
                                          run them side by side, one thread each, until the time is up; put the run folders into archives
       python tools/gpu.py unpack ARCHIVE... [--runs runs/repro]
                                          at home: `mgdarts reproduce` finds the runs finished

Each part is measured in a process of its own, with a time limit: one that fails or hangs stops no other.
"""
import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tools"):
    if str(folder) not in sys.path: sys.path.insert(0, str(folder))

# name: (module, seconds it may take), by what they are worth
PARTS = {"machine": ("gpu_parts", 40), "losses": ("gpu_parts", 45), "steps": ("gpu_parts", 100), "layouts": ("gpu_layouts", 70), "retraining": ("gpu_parts", 40), "real": ("gpu_parts", 30),
         "bits": ("gpu_parts", 45), "advice": ("gpu_parts", 25), "table4": ("gpu_parts", 45), "crowd": ("gpu_parts", 60), "crowd_cpu": ("gpu_parts", 45), "convolutions": ("gpu_layouts", 30)}
BESIDE = {"compiled": ("gpu_parts", 0), "triton": ("gpu_layouts", 1), "planned": ("gpu_parts", 1)}  # run beside the others, from the first or second on: they compile and count, and measure nothing


def rows_of(part: str, device: str, toy: bool, seconds=None):
    "Measure a part here; a part that fails ends with a row that says so. seconds: it may take; None: they are read from stdin, once all is imported."
    import importlib

    import torch

    torch.set_num_threads(1)
    parts = importlib.import_module("gpu_parts")
    module = importlib.import_module((BESIDE.get(part) or PARTS[part])[0])
    if seconds is None: seconds = float(sys.stdin.readline() or 0)
    try: yield from getattr(module, part)(parts.Ground(device, toy, time.monotonic() + seconds))
    except Exception as e: yield {"part_error": parts.said(e)}


def start(part: str, folder: Path, log, args) -> subprocess.Popen:
    "A part in a process of its own, which is the head of its group; it imports all it needs, waits for `go`, and writes a row a line."
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))), "OMP_WAIT_POLICY": "PASSIVE", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, __file__, "part", part, "--device", args.device, "--rows", str(folder / f"{part}.jsonl")] + ["--toy"] * args.toy
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, text=True, start_new_session=True)


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
    if isinstance(value, float): return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else str(value)
    return value if isinstance(value, (int, str, type(None))) else str(value)


def measured(name: str, args, folder: Path, log, seconds: float, process=None) -> dict:  # process: started before
    "A part: its rows, how long it took, what went wrong."
    begun, out = time.monotonic(), {}
    if args.inline: rows = [plain(r) for r in rows_of(name, args.device, args.toy, seconds)]
    else:
        process = process or start(name, folder, log, args)
        go(process, seconds)
        try:
            if code := process.wait(seconds + 12): out["note"] = f"its process ended with code {code}"  # it ends by itself, if it does not hang
        except subprocess.TimeoutExpired: out["note"] = "it took too long and was ended"
        finally: end(process)
        rows = read_rows(folder / f"{name}.jsonl")
    return {"seconds": round(time.monotonic() - begun, 1), **out, "rows": rows}


def short(v) -> str:
    if isinstance(v, float): return f"{v:.4g}"
    if isinstance(v, dict): return "{" + " ".join(f"{k}={short(x)}" for k, x in v.items() if not isinstance(x, (list, dict))) + "}"
    return str(v)


def line(row: dict) -> str:
    "A row, short: what is long is in the record only."
    text = " ".join(f"{k}={short(v)}" for k, v in row.items() if not isinstance(v, list) and k not in ("batch", "capability", "where", "macs"))
    where = row.get("where") or {}
    return (text + "".join(f"\n      {n} x {at}" for at, n in sorted(where.items(), key=lambda kv: -kv[1])[:6]))[:420]


BRIEF = {"steps": ("C", "L", "live", "how", "impl", "layout", "cudnn_search", "ms", "graph_ms", "allocated_mib", "launches", "error", "graph_error"),
         "layouts": ("C", "side", "how", "variant", "layout", "ms", "graph_ms", "kernels", "busy_ms", "error_relative", "error"),
         "convolutions": ("C", "side", "what", "how", "layout", "forward_ms", "input_ms", "weight_ms", "error")}


def measure(args) -> dict:
    "All parts; the record is written after each of them."
    import torch

    from mgdarts.base.files import write_json
    from mgdarts.runs.folder import environment

    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    out, begun = Path(args.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    here = environment(torch.device(args.device)) | ({"commit": args.commit, "modified": False} if args.commit else {})
    record = {"schema": 1, "title": "What a card does", "scale": "toy" if args.toy else "full", "environment": here,
              "command": shlex.join(["tools/gpu.py", *args.argv]), "budget_s": args.budget, "parts": {}}
    chosen, left = [p for p in (args.parts.split(",") if args.parts else [*PARTS, *BESIDE])], lambda: args.budget - (time.monotonic() - begun)
    with tempfile.TemporaryDirectory() as folder, open(out / "log.txt", "w") as log:
        folder, beside, ahead = Path(folder), {}, {}
        try:
            for i, name in enumerate(chosen):
                for b in (b for b, (_, at) in BESIDE.items() if b in chosen and at == i and not args.inline): go(beside.setdefault(b, start(b, folder, log, args)), args.budget)
                if name in beside: continue
                this = ahead.pop(name, None)
                for n in chosen[i + 1 : i + 2]:  # imports its libraries while this one measures
                    if n not in BESIDE and not args.inline: ahead[n] = start(n, folder, log, args)
                most = min(PARTS.get(name, (0, 60))[1], left() - 5)
                if most > 10 or args.toy and most > 0: record["parts"][name] = measured(name, args, folder, log, most, this)
                else:
                    record["parts"][name] = {"seconds": 0, "note": "skipped: the time is spent", "rows": []}
                    if this: end(this)
                part = record["parts"][name]
                said = [f"## {name}: {len(part['rows'])} rows, {part['seconds']} s" + (f", {part['note']}" if "note" in part else "")] + [line({k: r[k] for k in BRIEF.get(name, r) if k in r} or r) for r in part["rows"]]
                print("\n".join(said), flush=True)
                print("\n".join(said[:1] + [json.dumps(r) for r in part["rows"]]), file=log, flush=True)
                write_json(out / "record.json", record | {"wall_s": round(time.monotonic() - begun, 1)})
            for name, process in beside.items():
                record["parts"][name] = {}
                try: process.wait(max(1, left()))
                except subprocess.TimeoutExpired: record["parts"][name]["note"] = "it took too long and was ended"
                record["parts"][name]["rows"] = read_rows(folder / f"{name}.jsonl")
        finally:
            for process in (*beside.values(), *ahead.values()): end(process)
        record["wall_s"] = round(time.monotonic() - begun, 1)
        write_json(out / "record.json", record)
    return record


def summary(record: dict) -> str:
    "The end of the output: steps with their plan, the best layouts, what failed."
    parts, same = record["parts"], ("C", "L", "batch", "live", "how", "impl")
    rows = lambda name: parts.get(name, {}).get("rows", [])
    planned = {tuple(r[k] for k in same): r for r in rows("planned") if r.get("of") == "steps"}
    num = lambda v, n=1: f"{v:.{n}f}" if isinstance(v, (int, float)) else "-"
    out = ["", "# steps: C L live how impl layout | ms, graph ms | kernels, busy ms | allocated, planned now, planned native, MiB"]
    for r in (r for r in rows("steps") if "C" in r):
        p, k = planned.get(tuple(r[x] for x in same), {}), r.get("launches") or {}
        out.append(f"{r['C']} {r['L']} {r['live']} {r['how']} {r['impl']} {r['layout']}{' search' if r['cudnn_search'] else ''} | {num(r.get('ms'))} {num(r.get('graph_ms'))} | {k.get('kernels', '-')} {num(k.get('busy_ms'))} | {num(r.get('allocated_mib'), 0)} {num(p.get('planned_mib'), 0)} {num(p.get('planned_native_mib'), 0)} {r.get('error', r.get('graph_error', ''))[:120]}")
    found = {}
    for r in rows("layouts"):
        if "ms" in r: found.setdefault((r["C"], r["side"], r["how"]), []).append(r)
    out.append("# layouts: C, side, how | graph ms (or eager) of operation by operation and of the three best")
    for key, of in found.items():
        cost = lambda r: r.get("graph_ms", r["ms"])
        out.append(f"{key} | " + "; ".join(f"{r['variant']} {r['layout']} {cost(r):.2f}" for r in [*(r for r in of if r["variant"] == "apart"), *sorted((r for r in of if r["variant"] != "apart"), key=cost)[:3]]))
    out.append("# failed: " + ("; ".join(f"{n}: {r[k][:110]}" for n, p in parts.items() for r in p["rows"] for k in r if k.endswith("error")) or "nothing")[:2500])
    out.append("# notes: " + ("; ".join(f"{n}: {r['note']}" for n, p in parts.items() for r in (p, *p["rows"]) if "note" in r) or "none") + f"; {record['wall_s']} s")
    return "\n".join(out)


def jobs(args) -> dict:
    if args.device == "cpu": os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a configuration says auto, and its runs are known by it
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    import gpu_jobs

    todo, folder, out = gpu_jobs.read_list(args.paths[0]), Path(args.runs or Path(args.out) / "runs"), Path(args.out)
    found = gpu_jobs.run(todo, folder, args.images, args.workers, args.limit, args.commit)
    found |= gpu_jobs.collected(todo, folder, out)
    (out / "jobs.json").write_text(json.dumps(found, indent=1))
    return found


def main(argv: list):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("measure", "part", "list", "pack", "jobs", "unpack"))
    p.add_argument("paths", nargs="*")
    for name, value in (("device", "auto"), ("out", ""), ("parts", ""), ("commit", os.environ.get("MGDARTS_COMMIT", "")), ("rows", ""), ("seeds", ""), ("set", ""), ("arms", ""), ("images", ""), ("runs", ""), ("data-dir", "")): p.add_argument(f"--{name}", default=value)
    for name, kind, value in (("budget", float, 300.0), ("limit", float, 0.0), ("workers", int, 0)): p.add_argument(f"--{name}", type=kind, default=value)
    for name in ("toy", "inline"): p.add_argument(f"--{name}", action="store_true")
    args = p.parse_args(argv if argv and not argv[0].startswith("-") else ["measure", *argv])
    args.argv = argv
    if args.what == "part":
        with open(args.rows, "w", encoding="utf-8") as f:
            for row in rows_of(args.paths[0], args.device, args.toy): print(json.dumps(plain(row)), file=f, flush=True)
    elif args.what == "measure":
        args.out = args.out or str(ROOT / "runs/gpu")
        print(summary(measure(args)))
    elif args.what == "jobs": print(json.dumps(jobs(args)))
    else:
        import gpu_jobs

        if args.what == "list":
            from mgdarts.methods.registry import pairs
            from mgdarts.paper.study import seeds_of

            found = gpu_jobs.listed(args.paths, seeds_of(args.seeds) if args.seeds else [], pairs(args.set), args.arms.split(",") if args.arms else [])
            Path(args.out).write_text(json.dumps([vars(j) for j in found]))
            print(f"{len(found)} jobs")
        elif args.what == "pack": print(json.dumps(gpu_jobs.pack(gpu_jobs.read_list(args.paths[0]), Path(args.out), args.data_dir)))
        else: print("\n".join(gpu_jobs.unpack(args.paths, Path(args.runs or ROOT / "runs/repro"))))


if __name__ == "__main__": main(sys.argv[1:])
