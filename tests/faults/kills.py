"""Kills. To hit a commit, or the moment between two writes, one cannot just wait.

The function that does a part is wrapped: at its k-th call a timer is set, and the kernel ends the process when it
rings, wherever it is by then. k is drawn from the calls of an undisturbed run, the delay from 0 to what that call took
there. Half of the runs that were killed are killed again, at any time, while they resume.
"""
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mgdarts.base.files import Checkpoints
from mgdarts.net.supernet import SuperNet
from mgdarts.runs import run as runs
from mgdarts.runs.listen import Recorder
from mgdarts.search import loop, stages, train
from mgdarts.search.loop import Search
from mgdarts.views import report

from .disk import watch_writes
from .process import bits, call, steps


@dataclass
class Part:
    "A part of a run, by the function that does it."
    owner: object  # module or class
    name: str
    counts: Callable = lambda *_: True  # which of its calls are meant, by their arguments

    def wrap(self, before=lambda: None, after=lambda seconds: None):
        "In this process, call `before` and `after` around it."
        inner = getattr(self.owner, self.name)

        def outer(*args, **kwargs):
            if not self.counts(*args): return inner(*args, **kwargs)
            before()
            start = time.perf_counter()
            try: return inner(*args, **kwargs)
            finally: after(time.perf_counter() - start)

        setattr(self.owner, self.name, outer)


def _searching(search): return not search.fine_tuning
def _fine_tuning(search): return search.fine_tuning
def _at_the_end(trainer):
    return trainer.epoch == trainer.cfg.epochs - 1 and trainer.epoch_step == len(trainer.loaders["train"]) - 1


PARTS = {
    "search": Part(loop, "step", _searching), "fine-tuning": Part(loop, "step", _fine_tuning),
    "validation": Part(Search, "validate"), "commit": Part(loop, "commit"), "compaction": Part(SuperNet, "rebuild"),
    "regrowing": Part(stages, "regrow"), "opening a stage": Part(SuperNet, "open"),
    "checkpoint": Part(Checkpoints, "save"), "force to disk": Part(os, "fsync"), "rename": Part(os, "replace"),
    "event": Part(Recorder, "__call__"), "derivation": Part(runs, "finish"), "report": Part(report, "write_report"),
    "retraining": Part(train, "step"), "test": Part(train, "step", _at_the_end)}


@dataclass
class Whole:
    "A run that nothing happens to. In pairs: of the search, of the retraining."
    bits: dict
    times: list  # part -> seconds of each call
    took: list  # seconds
    writes: list  # calls of `write`


def undisturbed(run: Path) -> Whole:
    "Do a run that nothing happens to."
    times, took, log = [], [], run.parent / "times.json"
    for args in steps(run):
        seen = {"write": 0}

        def count(*_): seen["write"] += 1

        def prepare():
            for name, part in PARTS.items(): part.wrap(after=seen.setdefault(name, []).append)
            watch_writes(count)

        start = time.perf_counter()
        code, err = call(args, prepare, lambda: log.write_text(json.dumps(seen)))
        if code: raise RuntimeError(f"the undisturbed run failed: {err}")
        took.append(time.perf_counter() - start)
        times.append(json.loads(log.read_text()))
    return Whole(bits(run), times, took, [t.pop("write") for t in times])


def kill_in(name: str, k: int, delay: float):
    "A preparation: the process is gone `delay` seconds after the k-th call of a part (from 0) begins."
    def prepare():
        calls = iter(range(k + 1))
        def before():
            if next(calls, None) == k: signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
        PARTS[name].wrap(before)
    return prepare


def kill(seed: int, run: Path, whole: Whole) -> tuple:
    "A trial: a run that is killed, resumed, and compared. (part, kills, what went wrong: empty if nothing)"
    r, name = random.Random(f"kill/{seed}"), list(PARTS)[seed % len(PARTS)]
    at = r.choice([i for i in (0, 1) if whole.times[i][name]])
    seconds = whole.times[at][name]
    k, kills = r.randrange(len(seconds)), 0
    for i in (0, 1):
        code, err = call(steps(run)[i], kill_in(name, k, r.uniform(0, seconds[k])) if i == at else None)
        if code == -signal.SIGALRM:
            kills += 1
            if r.random() < .5:
                again = r.uniform(.01, whole.took[i])
                code, _ = call(steps(run)[i], lambda: signal.setitimer(signal.ITIMER_REAL, again))
                kills += code == -signal.SIGALRM
            code, err = call(steps(run)[i])
        if code: return name, kills, f"exit {code}: {err[-300:]}"
    return name, kills, "" if bits(run) == whole.bits else "other bits"
