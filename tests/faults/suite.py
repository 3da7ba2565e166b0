"All of it. Trials that need runs are shared out among as many processes as there are cores."
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from mgdarts.base.data import load_data
from mgdarts.base.files import write_json
from mgdarts.cli.main import main as command
from mgdarts.cli.shared import table
from mgdarts.methods.registry import preset
from mgdarts.runs.folder import environment

from . import inputs, strangers
from .disk import fail
from .kills import PARTS, kill, undisturbed
from .process import steps
from .rot import kinds, rot


def shared(trials: list, workers: int) -> list:
    "Call functions in some processes; their values, which are JSON-ready."
    with tempfile.TemporaryDirectory() as tmp:
        pids = []
        for w in range(workers):
            sys.stdout.flush()
            pids.append(os.fork())
            if pids[-1] == 0:
                done = {}
                try:
                    for i in range(w, len(trials), workers):
                        try: done[i] = trials[i]()
                        except Exception as e: done[i] = ["", 0, f"{type(e).__name__}: {e}"]
                    Path(tmp, str(w)).write_text(json.dumps(done))
                finally: os._exit(0)
        for pid in pids: os.waitpid(pid, 0)
        found = {int(k): v for w in range(workers) for k, v in json.loads(Path(tmp, str(w)).read_text()).items()}
        return [found[i] for i in range(len(trials))]


@dataclass
class Suite:
    "What was tried so far."
    tmp: Path
    workers: int
    begin: float = field(default_factory=time.time)
    rows: list = field(default_factory=list)  # a class of faults each
    lost: list = field(default_factory=list)  # sentences
    inputs: list = field(default_factory=list)  # a wrong input each
    kills: int = 0
    runs_killed: int = 0

    def say(self, what: str): print(f"{what}, {time.time() - self.begin:.0f} s", flush=True)

    def add(self, what: str, where: str, tried: int, wrong: list):
        self.rows.append({"fault": what, "where": where, "tried": tried, "survived": tried - len(wrong),
                          "lost": len(wrong)})
        self.lost += [f"{what}, {where}: {w}" for w in wrong]

    def trial(self, do, n: int, whole):
        "A trial; the folder of one that lost nothing goes at once."
        def done():
            folder = self.tmp / f"{do.__name__}{n}"
            value = do(n, folder, whole)
            shutil.rmtree(folder, ignore_errors=True)
            return value
        return done


def whole_run(s: Suite):
    "An undisturbed run; before it one in this process, which loads and compiles what the forks will need."
    load_data(preset("smoke").data, 0)  # before forking
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        for args in steps(s.tmp / "warm"): command([str(a) for a in args])
    whole = undisturbed(s.tmp / "whole")
    s.say(f"an undisturbed run takes {sum(whole.took):.1f} s")
    return whole


def kill_some(s: Suite, whole, kills: int):
    "At least so many kills; a timer may ring after the run has ended."
    killed, wrong = Counter(), {name: [] for name in PARTS}
    while sum(killed.values()) < kills:
        some = max(s.workers, kills - sum(killed.values()))
        trials = [s.trial(kill, s.runs_killed + i, whole) for i in range(some)]
        for name, count, error in shared(trials, s.workers):
            killed[name] += count
            if error: wrong.setdefault(name, []).append(error)
            s.runs_killed += 1
        s.say(f"{sum(killed.values())} kills in {s.runs_killed} runs")
    for name in killed: s.add("kill", name, killed[name], wrong[name])
    s.kills = sum(killed.values())


def fail_some(s: Suite, whole, failures: int):
    "So many runs in which system calls fail."
    found = shared([s.trial(fail, i, whole) for i in range(failures)], s.workers)
    for what in dict.fromkeys(w for w, *_ in found):
        of = [error for w, *_, error in found if w == what]
        s.add("failing system call", what, len(of), [e for e in of if e])
    s.say(f"{failures} failing system calls")


def rot_some(s: Suite, places: int):
    "So many cuts and bits of each kind of file."
    (s.tmp / "rot").mkdir()
    for name, kind in kinds(s.tmp / "whole", s.tmp / "rot").items():
        tried, _, errors = rot(name, kind, places)
        s.add("file cut or bit turned", name, tried, errors)
    s.say(f"{places} cuts and bits a kind of file")


def refuse_all(s: Suite):
    "All wrong inputs."
    t = inputs.Table(s.tmp / "inputs", s.tmp / "whole")
    t.d.mkdir()
    for make in (inputs.options, inputs.genotypes, inputs.architectures, strangers.configurations, strangers.states,
                 strangers.records, inputs.images): make(t)
    wrong = []
    for row in t.rows:
        line, error = inputs.refuse(row, t.d)
        line = line.removeprefix("mgdarts: ").replace(str(t.d), "…").replace(str(t.run), "RUN")
        s.inputs.append({"input": row.what, "exit code": row.code,
                         "answer": line if len(line) < 240 else line[:239] + "…"})
        if error: wrong.append(f"{row.what}: {error}")
    s.add("wrong input", "commands, files and folders from strangers", len(t.rows), wrong)


def suite(kills: int = 50, failures: int = 24, places: int = 200, workers: int = 0) -> dict:
    "Try all faults. JSON-ready: a row a class of faults, the wrong inputs, what was lost."
    with tempfile.TemporaryDirectory() as tmp:
        s = Suite(Path(tmp), workers or os.cpu_count() or 1)
        whole = whole_run(s)
        kill_some(s, whole, kills)
        fail_some(s, whole, failures)
        rot_some(s, places)
        refuse_all(s)
    return {"rows": s.rows, "lost": s.lost, "inputs": s.inputs, "kills": s.kills, "runs_killed": s.runs_killed,
            "kinds_of_files": sum(r["fault"].startswith("file") for r in s.rows),
            "seconds": round(time.time() - s.begin, 1), "workers": s.workers,
            "environment": environment(torch.device("cpu"))}


def main(out: str = "", kills: int = 50, failures: int = 24, places: int = 200, workers: int = 0):
    "Break things on purpose, count what is lost, and write record.json into a folder."
    found = suite(kills, failures, places, workers)
    rows = [tuple(r.values()) for r in found["rows"]]
    shown = table(f"{found['seconds']:.0f} s", ["fault", "where", "tried", "survived", "lost"], rows)
    Console(width=110, force_terminal=False).print(shown)
    for line in found["lost"]: print("LOST", line)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / "record.json", found)
    sys.exit(bool(found["lost"]))
