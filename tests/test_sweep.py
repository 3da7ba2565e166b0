"Sweeps: what a specification means, what a killed worker and Ctrl-C leave, and the same bits whoever computes a run."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mgdarts.base.files import read_json, write_json
from mgdarts.base.options import InputError
from mgdarts.cli.main import main
from mgdarts.cli.sweep import add_to, target_of
from mgdarts.cli.sweep import sweep as sweep_command
from mgdarts.sweep.executors import Local, run_jobs
from mgdarts.sweep.on import executor_in
from mgdarts.sweep.ray import Ray
from mgdarts.sweep.spec import runs_of
from mgdarts.sweep.table import read_plan
from mgdarts.sweep.work import do
from mgdarts.views.compare import entries

ROOT = Path(__file__).resolve().parent.parent
FAST = {"data.subset": 100, "data.test_subset": 200, "search.stages": 1, "search.warmup": 0, "search.max_epochs": 2,
        "search.prune_every": 1, "search.batch": 50, "search.regrow": 0.2}
SPEC = {"preset": "smoke", "seeds": [0, 1, 2], "set": FAST}


def lines(text):
    return [line for line in text.splitlines() if line]


def written(folder, spec, name="spec.json"):
    path = folder / name
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    return path


def sweep(*args):
    return main(["sweep", *map(str, args)])


@pytest.fixture
def bits(events_of):
    "What a run computed, to the last bit: its events, its network, its masks."
    def of(run):
        files = {p.name: p.read_bytes() for p in (run / "architecture.json", run / "masks.safetensors") if p.exists()}
        return events_of(run), files
    return of


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A sweep of three seeds and of one run that cannot be, one by one in this process: its folder, its exit code."
    folder = tmp_path_factory.mktemp("sweep")
    spec = {**SPEC, "runs": [{"label": "few"}, {"label": "too large", "seeds": [0], "set": {"target_m": 9}}]}
    code = sweep(written(folder, spec), "--out", folder / "out", "--jobs", 1)
    return folder / "out", code


@pytest.mark.parametrize("spec, said", [
    ({"seed": [0]}, "did you mean 'seeds'?"), ({"seeds": 0}, "must be a list"), ({"seeds": []}, "is empty"),
    ({"seeds": [0, 0]}, "twice"), ({"seeds": [-1]}, "out of range"), ({"seeds": ["x"]}, "no whole number"),
    ({"methods": ["dartz"]}, "unknown method"), ({"methods": [["darts-v1"]]}, "must be text"),
    ({"preset": "smok"}, "unknown preset"), ({"set": {"chanels": 4}}, "did you mean"),
    ({"set": {"channels": [4, "4"]}}, "twice"), ({"set": {"channels": {"a": 1}}}, "cannot be"),
    ({"set": {"channels": []}}, "has no value"), ({"set": {"seed": 3}}, "say seeds"),
    ({"set": {"channels": 4, "space.channels": 8}}, "set twice"),
    ({"runs": [3]}, "list of mappings"), ({"runs": [{"labels": "a"}]}, "unknown key"), ({"arms": ["r = 0"]}, "target"),
    ({"runs": [{"label": "a"}, {"label": "b"}]}, "once as a"), ({"train": "yes"}, "true or false"),
    ({"target": "tabel05"}, "table05"), ({"target": "table05", "methods": ["gdas"]}, "does not go with"),
    ({"target": "table05", "set": {"regrow": [0, 1]}}, "one value"), ({"seeds": list(range(10_001))}, "more than"),
    ("seeds: [0]\nseeds: [1]", "twice"), ("seeds: [", "line 1"), ("- 1", "not a mapping"), ("a: &a [*a]", "")])
def test_what_is_wrong_in_a_specification_is_a_line(spec, said, tmp_path, capsys):
    assert sweep(written(tmp_path, spec), "--out", tmp_path / "out") == 2
    err = lines(capsys.readouterr().err)
    assert len(err) == 1 and err[0].startswith("mgdarts: ") and said in err[0]
    assert not (tmp_path / "out" / "sweep.json").exists() and not list(tmp_path.glob("out/*/config.json"))


@pytest.mark.parametrize("args", [
    [], ["--seeds", "0"], ["nothing.yaml", "--out", "x"], ["--resume"], ["--resume", "--out", "nothing"],
    ["--resume", "--seeds", "0", "--out", "x"], ["--seeds", "0", "--out", "x", "--on", "rya"],
    ["--seeds", "0", "--out", "x", "--gpus", ".5"], ["--seeds", "0", "--out", "x", "--on", "ray", "--cpus", "0"],
    ["--seeds", "0", "--out", "x", "--on", "ray", "--address", "127.0.0.1:1"], ["--set", "channels", "--out", "x"],
    ["--seeds", "0", "--out", "x", "--on", "ray", "--gpus", "-1"], ["--seeds", "0", "--out", "x", "--jobs", "-1"],
    ["--seeds", "0", "--out", "x", "--on", "slurm", "--gpus", ".5"], ["--resume", "--dry-run"],
    ["--suggest", "optuna", "--space", "mu=0..1", "--out", "x", "--dry-run"],
    ["--seeds", "0", "--out", "x", "--space", "mu=0..1"], ["--seeds", "0", "--out", "x", "--trials", "3"]])
def test_what_is_wrong_on_the_command_line_is_a_line(args, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sweep(*args) == 2
    err = lines(capsys.readouterr().err)
    assert len(err) == 1 and err[0].startswith("mgdarts: ")
    assert not list(tmp_path.glob("x/*.json")) or args[-1] == "127.0.0.1:1"  # known only when a worker is looked for


def test_a_grid_is_the_same_in_yaml_in_json_and_on_the_command_line(tmp_path, capsys):
    grid = {"preset": "smoke", "methods": ["mg-darts", "fixed-rate"], "seeds": [0, 1], "train": True,
            "set": {"channels": [4, 8], "granularities": "operation,filter"}}
    yaml = "preset: smoke\nmethods: [mg-darts, fixed-rate]\nseeds: [0, 1]\ntrain: true\n" \
           "set:\n  channels: [4, 8]  # a grid\n  granularities: operation,filter\n"
    said = ["--preset", "smoke", "--methods", "mg-darts,fixed-rate", "--seeds", "0,1", "--train",
            "--set", "channels=4,8", "--set", "granularities=operation,filter"]
    def rows(*args):
        assert sweep(*args, "--out", tmp_path / "out", "--dry-run", "--json") == 0
        return json.loads(capsys.readouterr().out)["runs"]
    found = rows(*said)
    assert found == rows(written(tmp_path, grid)) == rows(written(tmp_path, yaml, "spec.yaml"))
    assert len({r["run"] for r in found}) == 8 and {r["status"] for r in found} == {"waiting"}
    assert found[0]["run"] == "mg-darts-channels4-s0" and found[-1]["set"]["space.channels"] == 8
    assert not (tmp_path / "out").exists()
    runs = runs_of(grid)
    assert all(r.train and r.search["search"]["granularities"] == ["operation", "filter"] for r in runs)


def test_a_failing_run_is_a_row_and_stops_no_other(plain, capsys):
    folder, code = plain
    rows = read_json(folder / "sweep.json", "a sweep")["rows"]
    assert code == 1 and [r["status"] for r in rows] == ["done"] * 3 + ["failed"]
    assert rows[3]["label"] == "too large" and "target_m" in rows[3]["why"] and rows[3]["params"] is None
    assert all(r["params"] > 0 and r["seconds"] > 0 and r["ops"] > 0 for r in rows[:3])
    assert [e.name for e in entries([folder])] == ["few-s0", "few-s1", "few-s2"]
    assert main(["compare", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 3


def test_the_same_sweep_goes_on_another_is_refused(plain, tmp_path, capsys):
    folder, _ = plain
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/result.json")}
    assert sweep("--resume", "--out", folder, "--jobs", 1) == 1  # what failed is tried again, what is done is not
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*/result.json")} == before
    assert "target_m" in capsys.readouterr().err
    plan = [r.name for r in read_plan(folder)]
    other = written(tmp_path, {**SPEC, "seeds": [0, 1]})
    assert sweep(other, "--out", folder) == 2 and "holds another sweep" in capsys.readouterr().err
    more = {**SPEC, "seeds": [3, 0, 1, 2], "runs": [{}, {"seeds": [0], "set": {"target_m": 9}}]}
    assert sweep(written(tmp_path, more), "--out", folder, "--dry-run", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [r["run"] for r in rows][:4] == plan and [r["seed"] for r in rows if r["status"] == "waiting"] == [0, 3]
    assert [r.name for r in read_plan(folder)] == plan  # a dry run writes nothing
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    assert sweep(other, "--out", tmp_path / "taken") == 2


def dies_once(job, folder):
    "The first process at this job is killed when its first state has been saved."
    met = Path(folder) / f"{job.name}.killed"
    if not met.exists():
        def kill():
            while not list(job.run(folder).glob("checkpoint/*.pt")): time.sleep(0.01)
            met.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=kill, daemon=True).start()
    do(job, folder)


def test_a_killed_process_is_replaced_and_its_run_ends_with_the_same_bits(plain, tmp_path, bits):
    run = read_plan(plain[0])[1]
    assert run_jobs([run], tmp_path, Local(2), dies_once) == {}
    assert (tmp_path / f"{run.name}.killed").exists() and bits(run.run(tmp_path)) == bits(run.run(plain[0]))


def test_ray_gives_the_same_bits_and_tries_a_killed_worker_again(plain, tmp_path, bits):
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know this file
    def killed_first(job, folder): return (dies_once if job.seed == 1 else do)(job, folder)
    runs = read_plan(plain[0])[:3]
    assert run_jobs(runs, tmp_path, Ray("local", gpus=0), killed_first) == {}
    assert (tmp_path / f"{runs[1].name}.killed").exists()
    for r in runs: assert bits(r.run(tmp_path)) == bits(r.run(plain[0]))


def test_ctrl_c_leaves_a_sweep_that_resumes(plain, tmp_path, bits):
    spec, out = written(tmp_path, {**SPEC, "runs": [{"label": "few"}]}), tmp_path / "out"
    command = [sys.executable, "-m", "mgdarts", "sweep"]
    p = subprocess.Popen([*command, spec, "--out", out, "--jobs", "2"], stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if list(out.glob("*/checkpoint/*.pt")): break
        time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    err = lines(p.communicate(timeout=60)[1])
    assert p.returncode == 130 and err[-1].startswith("mgdarts: interrupted; ") and err[-1].endswith(f"--out {out}")
    rows = read_json(out / "sweep.json", "a sweep")["rows"]
    assert {r["status"] for r in rows} <= {"waiting", "done"} and rows[2]["status"] == "waiting"
    assert sweep("--resume", "--out", out, "--jobs", 1) == 0
    for r in read_plan(out): assert bits(r.run(out)) == bits(r.run(plain[0]))


def test_without_ray_all_else_works_and_asking_for_it_names_the_extra(tmp_path):
    code = """
import sys
for name in ("ray", "submitit", "optuna"): sys.modules[name] = None
from mgdarts.cli.main import main
from mgdarts.cli.sweep import add_to, target_of
from mgdarts.cli.sweep import sweep as sweep_command
sys.exit(main(sys.argv[1:]))
"""
    def run(*args):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stderr.strip()
    given = "sweep", "--seeds", "0", "--out", "out"
    assert run(*given, "--dry-run") == (0, "")
    assert run(*given, "--on", "ray") == (2, "mgdarts: --on ray needs ray: pip install 'mgdarts[ray]'")
    assert run("reproduce", "table05", "--on", "ray")[1].endswith("pip install 'mgdarts[ray]'")
    assert not (tmp_path / "out").exists()


def test_a_table_of_the_paper_is_a_sweep_too(tmp_path, capsys, monkeypatch, here):
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    monkeypatch.chdir(ROOT)
    spec = {"target": "table05", "arms": ["r = 0"], "set": {**FAST, "search.max_epochs": 1, "train.epochs": 1}}
    del spec["set"]["search.regrow"]
    out = tmp_path / "out"
    assert sweep(written(tmp_path, spec), "--out", out, "--jobs", 1, "--json") == 0
    row, = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert row["status"] == "done" and row["label"] == "r = 0" and row["test_acc"] > 0
    assert (out / row["run"] / "train/result.json").exists() and (out / "table05/record.json").exists()
    assert [e.name for e in entries([out])] == [row["run"]]
    spec |= {"preset": "cpu"}
    assert sweep(written(tmp_path, spec), "--out", out) == 2 and "another sweep" in capsys.readouterr().err


def test_shares_of_devices_are_numbers_however_they_are_typed():
    pytest.importorskip("ray")
    assert executor_in("ray gpus=.5 memory=2 jobs=3") == Ray(gpus=0.5, memory=2.0, jobs=3)


def test_a_target_that_there_is_not_is_known_before_and_a_wrong_arm_leaves_the_sweep_as_it_was(tmp_path, capsys,
                                                                                              monkeypatch):
    def refuses(*_): raise InputError("no arm")
    monkeypatch.setattr(sys.modules[sweep_command.__module__], "reproduced", refuses)
    out = tmp_path / "out"
    assert sweep(written(tmp_path, {"target": "tabel05"}), "--out", out, "--dry-run") == 2
    assert sweep(written(tmp_path, {"target": "table05", "arms": ["r = zero"]}), "--out", out) == 2
    add_to(out, right := target_of({"target": "table05", "arms": ["r = 0"]}))  # nothing of the wrong one was begun
    (out / "r-0-s0").mkdir()
    write_json(out / "r-0-s0" / "config.json", {})
    assert sweep(written(tmp_path, {"target": "table05", "arms": ["r = 0", "r = zero"]}), "--out", out) == 2
    assert read_json(out / "plan.json", "a sweep")["arms"] == right["arms"]
    assert "another sweep" not in capsys.readouterr().err


def test_a_damaged_plan_or_table_is_a_line(tmp_path, capsys):
    for name, value in (("plan.json", {"runs": [{"name": "a"}]}), ("sweep.json", {"rows": [{}]})):
        write_json(tmp_path / name, value)
    assert sweep("--resume", "--out", tmp_path) == 2 and len(lines(capsys.readouterr().err)) == 1
    with pytest.raises(InputError, match="no rows"): entries([tmp_path])
