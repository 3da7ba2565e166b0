"What a scheduler does to a run: signals before, during and after a search, requeues, a lock that somebody else took."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.process import FAST, SETS
from test_faults import searched

from mgdarts.base import locks
from mgdarts.base.events import JOBS
from mgdarts.base.locks import LockLost
from mgdarts.cli.main import main
from mgdarts.methods.registry import preset
from mgdarts.runs import run as runs
from mgdarts.runs.listen import Signals

ROOT = Path(__file__).resolve().parent.parent
SEARCH = ["search", "--preset", "smoke", *SETS, "--save-every", "0.5", "--requeue"]
posix = pytest.mark.skipif(sys.platform != "linux", reason="needs SIGUSR1, bash and /proc")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("preempt") / "whole"
    runs.search(preset("smoke", **FAST), out)
    return out


def begin(out, job=(), script=(), path=()):
    "The command in a process, as one of a job of some scheduler."
    env = {k: v for k, v in os.environ.items() if k not in JOBS} | dict(job)
    env["PATH"] = os.pathsep.join([*path, env["PATH"]])
    return subprocess.Popen([*script, sys.executable, "-m", "mgdarts", *SEARCH, "--out", str(out)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def more(out, before):
    "Wait until a run has saved a state that was not there before, and return all states."
    for _ in range(1200):
        if (now := {p.name for p in (out / "checkpoint").glob("*.pt")}) - before:
            return now
        time.sleep(0.02)
    raise AssertionError("it has saved nothing")


def lines(err):
    return [line for line in err.splitlines() if line.startswith("mgdarts: ")]


@posix
def test_one_command_begins_goes_on_and_answers(whole, tmp_path, capsys):
    "Twice preempted, by two signals; the third time the script of a Slurm job asks for a requeue; the fourth ends it."
    out, saved, fake = tmp_path / "run", set(), tmp_path / "bin"
    for number, job in ((signal.SIGUSR1, {}), (signal.SIGTERM, {"PBS_JOBID": "17.server"})):
        p = begin(out, job)
        saved = more(out, saved)
        for _ in range(3):
            p.send_signal(number)  # schedulers say it more than once
            time.sleep(0.01)
        _, err = p.communicate()
        (line,) = lines(err)
        assert p.returncode == 75 and "the state is saved" in line and "--requeue" in line, (p.returncode, err)
        saved = {f.name for f in (out / "checkpoint").glob("*.pt")}
    fake.mkdir()
    (fake / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (fake / "scontrol").chmod(0o755)
    script, job = ["bash", str(ROOT / "tools/slurm.sh")], {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2"}
    p = begin(out, job, script, [str(fake)])
    more(out, saved)
    p.send_signal(signal.SIGUSR1)
    _, err = p.communicate()
    assert p.returncode == 0 and (tmp_path / "asked").read_text() == "requeue 4711\n", err
    p = begin(out, job, script, [str(fake)])
    assert p.communicate() and p.returncode == 0 and (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert searched(out) == searched(whole)
    before = sorted((str(f), f.stat().st_mtime_ns) for f in out.rglob("*"))
    assert main([*SEARCH, "--out", str(out)]) == 0 and "target reached" in capsys.readouterr().out
    assert before == sorted((str(f), f.stat().st_mtime_ns) for f in out.rglob("*"))


def script(tmp_path, code, **job):
    "What the script of a Slurm job does with an exit code: its own, what it says, and what it asked for."
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexit ${{REFUSE:-0}}\n')
    (tmp_path / "scontrol").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "1"} | job
    p = subprocess.run(["bash", ROOT / "tools/slurm.sh", "sh", "-c", f"exit {code}"], env=env, text=True,
                       capture_output=True)
    asked = tmp_path / "asked"
    return p.returncode, p.stderr, asked.read_text() if asked.exists() else ""


@posix
def test_a_job_is_requeued_only_when_that_helps(tmp_path):
    assert script(tmp_path, 0) == (0, "", "") and script(tmp_path, 1) == (1, "", "")
    assert script(tmp_path, 139) == (139, "", "")
    code, said, asked = script(tmp_path, 75, SLURM_RESTART_COUNT="3", MGDARTS_REQUEUES="3")
    assert code == 75 and "requeued 3 times" in said and not asked
    code, said, asked = script(tmp_path, 75, REFUSE="1")
    assert code == 75 and "refused" in said and asked == "requeue 1\n"


@posix
def test_a_signal_before_the_search_asks_for_a_requeue_too(tmp_path):
    p = begin(tmp_path / "run")
    caught = 0
    while not caught >> (signal.SIGUSR1 - 1) & 1:  # while it starts
        status = Path(f"/proc/{p.pid}/status").read_text()
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    p.send_signal(signal.SIGUSR1)
    _, err = p.communicate()
    assert p.returncode == 75 and len(lines(err)) == 1 and "Traceback" not in err, err


def test_requeue_says_what_is_wrong(whole, tmp_path, capsys):
    assert main(SEARCH) == 2 and "--out" in capsys.readouterr().err
    assert main([*SEARCH, "--resume", "--out", str(tmp_path / "run")]) == 2
    assert main([*SEARCH, "--seed", "5", "--out", str(whole)]) == 2
    assert "another configuration" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*SEARCH, "--out", str(tmp_path)]) == 2 and "exists" in capsys.readouterr().err


def test_a_training_is_begun_gone_on_with_and_answered(whole, capsys):
    order = ["train", str(whole), "--requeue"]
    assert main(order) == 0
    before = (whole / "train/events.jsonl").read_bytes()
    (whole / "train/result.json").unlink()  # as if it had been killed before its end
    assert main(order) == 0 and main(order) == 0
    assert (whole / "train/events.jsonl").read_bytes() == before
    capsys.readouterr()
    assert main([*order, "--set", "train.lr=0.1"]) == 2 and "another configuration" in capsys.readouterr().err


def test_systems_without_these_signals(monkeypatch):
    for name in ("SIGUSR1", "SIGUSR2"):
        monkeypatch.delattr(signal, name, raising=False)
    with Signals() as seen:
        signal.raise_signal(signal.SIGTERM)
    assert seen.number == signal.SIGTERM and main(["--version"]) == 0


def test_a_run_whose_lock_was_taken_stops_and_writes_nothing(whole, tmp_path):
    "As after a suspension longer than the lease, with another process that has gone on meanwhile."
    out, there = tmp_path / "run", []

    def rob(event):
        if event.type == "commit" and not there:
            locks.let_out(out / ".lock.rw", locks.last(out / ".lock.rw"))
            there.append(locks.lock(out))
            there[0].__enter__()
            there.append({p: p.stat().st_mtime_ns for p in out.rglob("*") if ".lock.rw" not in p.parts})

    with pytest.raises(LockLost, match="another has gone on") as e:
        runs.search(preset("smoke", **FAST), out, listeners=(rob,), save_every=0)
    assert e.value.code == 1 and "\n" not in str(e.value)
    assert there[1] == {p: p.stat().st_mtime_ns for p in out.rglob("*") if ".lock.rw" not in p.parts}
    there[0].__exit__(None, None, None)
    runs.search(None, out, resume=True)
    assert searched(out) == searched(whole)
