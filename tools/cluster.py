"""Does a sweep on a real Ray cluster survive the loss of a worker and of a node, to the last bit? What does it cost?

usage: python tools/cluster.py [--runs 12] [--out DIR] [--record figures/scale/cluster.json] [--set KEY=VALUE ...]

A head and two further nodes are started on this machine, each by a `ray start` of its own with ports and a temporary
folder of its own. A sweep of small searches runs on them, through the command that users have; in the middle one worker
is killed (SIGKILL) and then a whole node with all its processes. Afterwards every run is compared with that of a sweep
in this process: events without the clock, architecture and masks. Then trivial jobs say what each executor costs a run.
Not a test of `make test`: it takes some minutes.
"""
import argparse
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mgdarts.base.files import read_json, write_json
from mgdarts.methods.registry import preset
from mgdarts.runs.folder import environment
from mgdarts.runs.listen import read_events
from mgdarts.sweep.executors import Local
from mgdarts.sweep.jobs import job_of
from mgdarts.sweep.ray import Ray
from mgdarts.sweep.table import read_plan

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["data.subset=100", "data.test_subset=200", "search.warmup=0", "search.max_epochs=8", "search.prune_every=1",
         "search.batch=50"]  # five seconds of one core; three stages, about thirty commits, three times regrown


# processes
def below(pid: int) -> list:
    "All processes that descend from one."
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try: parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError: continue
    found, new = [], [pid]
    while new:
        new = [p for p, parent in parents.items() if parent in new]
        found += new
    return found


def killed(pids: list):
    for pid in pids:
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass


def working(run: Path):  # None: nobody
    "The process that is at a run, if it has saved a state of it."
    if (run / "result.json").exists() or not list(run.glob("checkpoint/*.pt")): return None
    try: return json.loads((run / ".lock.rw/who.json").read_text())["pid"]
    except (OSError, ValueError, KeyError): return None


# the cluster; a raylet waits 15 s for agents whose ports it does not know, which a busy machine may exceed
PORTS = ("node-manager", "object-manager", "metrics-export", "runtime-env-agent", "dashboard-agent-grpc",
         "dashboard-agent-listen")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    "A head and further nodes, each a `ray start --block` with ports and a folder of its own."

    def __init__(self, nodes: int):
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # of these nodes and drivers
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
        self.port, self.nodes = free_port(), []
        self.address = f"127.0.0.1:{self.port}"
        self.start("--head", f"--port={self.port}", "--include-dashboard=false")
        for _ in range(nodes): self.start(f"--address={self.address}")

    def start(self, *how, tries: int = 4):
        "Start a node and wait until it stands; on a busy machine Ray may need more than one try."
        for n in range(tries):
            place = self.folder / f"node-{len(self.nodes)}-{n}"
            own = [f"--{what}-port={free_port()}" for what in PORTS]
            command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *how, *own, "--num-cpus=1",
                       "--object-store-memory=80000000", f"--temp-dir={place}",
                       "--disable-usage-stats"]
            with open(self.folder / f"{place.name}.log", "w") as log:
                node = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
            for _ in range(240):
                text = (self.folder / f"{place.name}.log").read_text()
                if "Ray runtime started" in text: return self.nodes.append(node)
                if node.poll() is not None: break
                time.sleep(0.5)
            self.kill(node)
            print(f"a node did not start: {text[-300:]}", file=sys.stderr)
        raise SystemExit("the cluster does not start")

    def kill(self, node):
        "What the failure of a machine is: everything of it is gone at once."
        killed([*below(node.pid), node.pid])
        node.wait()

    def close(self):
        for node in self.nodes: self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)


# the sweeps
def command(runs: int, sets: list, out: Path, *how) -> list:
    given = [x for s in sets for x in ("--set", s)]
    return [sys.executable, "-m", "mgdarts", "sweep", "--preset", "smoke", "--seeds", ",".join(map(str, range(runs))),
            *given, "--out", str(out), "--json", *how]


def done(out: Path) -> int:
    try: rows = read_json(out / "sweep.json", "a sweep")["rows"]
    except ValueError: return 0
    return sum(r["status"] == "done" for r in rows)


def disturbed(process, cluster: Cluster, out: Path, runs: int) -> list:  # what was killed
    "Kill a worker when a quarter of the runs are done, and the last node when half of them are."
    plan, killings = read_plan_patiently(out, process), []
    while process.poll() is None and len(killings) < 2:
        time.sleep(0.1)
        if done(out) < runs // 4 * (len(killings) + 1): continue
        of_last = set(below(cluster.nodes[-1].pid))
        for r in plan:
            pid = working(r.run(out))
            if pid is None or (pid in of_last) != bool(killings): continue
            what = {"run": r.name, "events": len(read_events(r.run(out) / "events.jsonl")), "done": done(out)}
            if killings: cluster.kill(cluster.nodes[-1])
            else: killed([pid])
            killings.append({"what": "node" if killings else "worker", **what})
            print(json.dumps(killings[-1]), flush=True)
            break
    return killings


def read_plan_patiently(out: Path, process) -> list:
    while process.poll() is None:
        try: return read_plan(out)
        except ValueError: time.sleep(0.2)
    raise SystemExit("the sweep ended before it began")


def bits(run: Path) -> dict:
    "Checksums of what a run computed."
    events = [{k: v for k, v in e.items() if k != "time"} for e in read_events(run / "events.jsonl")]
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()
             for p in (run / "architecture.json", run / "masks.safetensors") if p.exists()}
    return {"events": hashlib.sha256(json.dumps(events).encode()).hexdigest(), **files}


def nothing(job, folder):
    "A trivial job. It notes what its process has cost so far, which does not depend on who else is at work."
    (Path(folder) / f"{job.seed}.cpu").write_text(str(time.process_time()))


def costs(cluster: Cluster, n: int = 6) -> dict:  # seconds
    "What a run costs in each executor when it has nothing to do: the first one, each further one; starting a process."
    jobs, out = [job_of("", preset("smoke", seed=s)) for s in range(n)], {}
    from ray import cloudpickle
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    for name, executor in (("in this process", Local(1)), ("one process beside it", Local(2)),
                           ("ray", Ray(cluster.address, gpus=0))):
        start, ends, folder = time.monotonic(), [], tempfile.mkdtemp(dir=cluster.folder)
        groups = [[(i, job)] for i, job in enumerate(jobs)]
        at_once = 2 if name == "ray" else 1  # nodes of one core that are left
        if name == "one process beside it": executor.jobs, groups = 2, [sum(groups, [])]
        for _ in executor(groups, folder, nothing): ends.append(time.monotonic())
        cpu = [float(path.read_text()) for path in Path(folder).glob("*.cpu")]
        out[name] = {"first_s": round(ends[0] - start, 3), "at_once": at_once,
                     "next_s": round((ends[-1] - ends[0]) / (n - 1) * at_once, 4),
                     "process_start_cpu_s": None if name == "in this process" else round(min(cpu), 2)}
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=12)
    p.add_argument("--out", type=Path, default=ROOT / "runs/cluster")
    p.add_argument("--record", type=Path)
    p.add_argument("--set", action="append", dest="sets", default=[])
    a = p.parse_args()
    sets, wall = SMALL + a.sets, {}
    shutil.rmtree(a.out, ignore_errors=True)
    start = time.monotonic()
    subprocess.run(command(a.runs, sets, a.out / "here", "--jobs", "1"), check=True, stdout=subprocess.DEVNULL)
    wall["in this process"] = round(time.monotonic() - start, 1)
    cluster = Cluster(2)
    try:
        start = time.monotonic()
        how = "--on", "ray", "--address", cluster.address
        process = subprocess.Popen(command(a.runs, sets, a.out / "ray", *how), stdout=subprocess.DEVNULL)
        killings = disturbed(process, cluster, a.out / "ray", a.runs)
        code, wall["on the cluster"] = process.wait(), round(time.monotonic() - start, 1)
        overheads = costs(cluster)
    finally: cluster.close()
    rows = [{"run": r.name, "same": bits(r.run(a.out / "here")) == bits(r.run(a.out / "ray")),
             **bits(r.run(a.out / "ray"))} for r in read_plan(a.out / "here")]
    what = "a sweep on a head and two nodes of Ray, of which a worker and a node are killed, and the same in a process"
    record = {"what": what, "runs": a.runs, "settings": sets, "exit": code, "killed": killings,
              "same": sum(r["same"] for r in rows), "wall_s": wall, "load": os.getloadavg()[0], "overhead": overheads,
              "environment": environment(torch.device("cpu")), "rows": rows}
    for r in rows: print(f"{r['run']:14} {'same' if r['same'] else 'DIFFERENT':10} events {r['events'][:16]}")
    print(json.dumps({k: record[k] for k in ("exit", "killed", "same", "wall_s", "overhead")}, indent=1))
    if a.record:
        a.record.parent.mkdir(parents=True, exist_ok=True)
        write_json(a.record, record)
    sys.exit(code or record["same"] < a.runs or len(killings) < 2)


if __name__ == "__main__": main()
