"submitit, on its cluster of this machine: runs preempted, lost, refused and cancelled; and what Slurm is told."
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faults.process import FAST
from test_faults import searched

from mgdarts.base.events import RunFailed
from mgdarts.base.options import InputError
from mgdarts.cli.main import main
from mgdarts.methods.registry import preset
from mgdarts.runs import run as runs
from mgdarts.sweep.executors import run_jobs
from mgdarts.sweep.jobs import job_of
from mgdarts.sweep.on import executor
from mgdarts.sweep.work import do

submitit = pytest.importorskip("submitit")
from mgdarts.sweep.slurm import Slurm  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="submitit is for Linux")


def often(job, folder):
    "A search that saves often; the number of threads is that of all."
    import torch  # in the job's process
    torch.set_num_threads(1)
    from mgdarts.base.options import from_dict
    from mgdarts.runs.folder import begun
    cfg = from_dict(job.search)
    runs.search(cfg, job.run(folder), begun(job.run(folder), cfg), save_every=0.1)


def dies_once(job, folder):
    "The process of a run is killed at its first try."
    mark = job.run(folder).with_suffix(".tried")
    if not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def here():
    "Functions of this file are found by name in the jobs' processes."
    old = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), old])
    yield
    os.environ["PYTHONPATH"] = old


@pytest.fixture
def given(monkeypatch):
    "The jobs that were handed in."
    jobs, inner = [], submitit.AutoExecutor.map_array

    def noted(self, *args):
        jobs.extend(new := inner(self, *args))
        return new

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", noted)
    return jobs


def when(condition, what, seconds=120):
    "Do something in another thread, as soon as a condition holds."
    def wait():
        last = time.time() + seconds
        while not condition() and time.time() < last:
            time.sleep(0.02)
        what()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def task_of(job):
    "The process that does a job: a child of the one that submitit began, as a step of Slurm's is of its batch script."
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == job._process.pid:
                return int(path.parent.name)
    raise AssertionError("it has none")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "What nothing happens to."
    out = tmp_path_factory.mktemp("slurm") / "whole"
    runs.search(preset("smoke", **FAST), out)
    return out


def logs(folder):
    return "".join(p.read_text() for p in sorted((folder / ".submitit").glob("*_log.*")))


def test_a_preempted_run_ends_with_the_same_bits(whole, tmp_path, here, given):
    "Two searches, one of which gets the signal of a preemption in the middle."
    jobs = [job_of(f"seed {s}", preset("smoke", **FAST, seed=s), False) for s in (0, 1)]
    first = jobs[0].run(tmp_path)
    hurry = when(lambda: any((first / "checkpoint").glob("*.pt")), lambda: os.kill(task_of(given[0]), signal.SIGUSR2))
    assert run_jobs(jobs, tmp_path, Slurm(cluster="local", jobs=2, gpus=0), often) == {}
    hurry.join()
    said = logs(tmp_path)
    assert "this job is preempted" in said and "Requeued job" in said, said
    assert searched(first) == searched(whole) and jobs[1].finished(tmp_path)


def test_a_lost_job_is_handed_in_again_and_a_failing_one_is_a_row(tmp_path, here, monkeypatch):
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 1)
    job = job_of("dies", preset("smoke", seed=5), False)
    failed = run_jobs([job], tmp_path, Slurm(cluster="local", jobs=1, retries=0), dies_once)
    assert "has not produced any output" in failed[0]
    job.run(tmp_path).with_suffix(".tried").unlink()
    assert run_jobs([job], tmp_path, Slurm(cluster="local", jobs=1), dies_once) == {}
    bad = job_of("bad", preset("smoke", **FAST, **{"search.target_m": 9.0}), False)
    failed = run_jobs([bad], tmp_path, Slurm(cluster="debug"), do)
    assert list(failed) == [0] and "\n" not in failed[0] and not bad.finished(tmp_path)


def test_leaving_cancels_the_jobs_and_leaves_a_sweep_that_resumes(whole, tmp_path, here, given):
    job = job_of("one", preset("smoke", **FAST), False)
    ends = Slurm(cluster="local", jobs=1)([[(0, job)]], tmp_path, often)

    thread = when(lambda: any((job.run(tmp_path) / "checkpoint").glob("*.pt")),
                  lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        next(ends)
    thread.join()
    assert given[0].done() and not job.finished(tmp_path)
    assert run_jobs([job], tmp_path, Slurm(cluster="debug"), often) == {}
    assert searched(job.run(tmp_path)) == searched(whole)


def fake_slurm(folder, **scripts):
    known = {"srun": "exit 0", "sacct": "echo 'JobID|State|NodeList'", "scancel": "exit 0"}
    for name, text in {**known, **scripts}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


def test_what_slurm_is_told(tmp_path, monkeypatch):
    "The script that sbatch gets, and what scancel is asked when somebody leaves."
    fake_slurm(tmp_path, sbatch='echo "Submitted batch job 4711"', scancel=f'echo "$@" >> {tmp_path}/cancelled')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    jobs = [job_of(f"seed {s}", preset("smoke", seed=s, device="cuda"), False) for s in range(3)]
    slurm = Slurm(partition="long", time=90, jobs=2, cpus=3, memory=12, timeouts=7)
    ends = slurm([[(i, j)] for i, j in enumerate(jobs)], tmp_path / "sweep", do)
    monkeypatch.setattr("mgdarts.sweep.slurm.time.sleep", lambda s: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("mgdarts.sweep.slurm.leave.__defaults__", (0.0,))
    with pytest.raises(KeyboardInterrupt):
        next(ends)
    (script,) = (tmp_path / "sweep/.submitit").glob("4711_*.sh")
    told = script.read_text()
    for line in ("--partition=long", "--time=90", "--array=0-2%2", "--cpus-per-task=3", "--gpus-per-node=1",
                 "--mem=12GB", "--signal=USR2@90", "--job-name=mgdarts"):
        assert f"#SBATCH {line}" in told, told
    delayed = submitit.core.utils.DelayedSubmission.load(tmp_path / "sweep/.submitit/4711_0_submitted.pkl")
    assert delayed._timeout_countdown == 7
    assert (tmp_path / "cancelled").read_text().split() == ["4711_0", "4711_1", "4711_2"]


def test_what_slurm_refuses_is_said_in_one_line(tmp_path, monkeypatch):
    fake_slurm(tmp_path, sbatch="echo 'sbatch: error: invalid partition specified: lnog' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job = job_of("one", preset("smoke"), False)
    with pytest.raises(RunFailed, match="invalid partition specified: lnog") as e:
        list(Slurm(partition="lnog")([[(0, job)]], tmp_path / "sweep", do))
    assert "\n" not in str(e.value)


def test_what_is_missing_is_said(monkeypatch, tmp_path, capsys):
    with pytest.raises(InputError, match="srun is not here.*--cluster local"):
        monkeypatch.setenv("PATH", str(tmp_path))
        executor("slurm")
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["sweep", "--preset", "smoke", "--out", str(tmp_path / "s"), "--on", "slurm"]) == 2
    assert "pip install 'mgdarts[slurm]'" in capsys.readouterr().err


def test_the_command_line(tmp_path):
    sets = [x for k, v in FAST.items() for x in ("--set", f"{k}={v}") if k != "rules.ops"]
    order = ["sweep", "--preset", "smoke", *sets, "--on", "slurm", "--cluster", "local", "--jobs", "1",
             "--time", "60", "--out", str(tmp_path / "sweep")]
    p = subprocess.run([sys.executable, "-m", "mgdarts", *order], capture_output=True, text=True)
    assert p.returncode == 0 and (tmp_path / "sweep/sweep.json").exists(), p.stderr
