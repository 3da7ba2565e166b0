"Arms, records, verdicts, notebooks by command: nothing runs twice, nothing is lost, noise is not called a result."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import papermill
import pytest
import torch

from mgdarts.base.events import RunFailed, Stopped
from mgdarts.base.files import read_json, write_json
from mgdarts.base.options import InputError, from_dict, to_dict
from mgdarts.cli.main import main
from mgdarts.methods.registry import preset
from mgdarts.net.built import built, masked
from mgdarts.net.count import counts
from mgdarts.net.files import load
from mgdarts.paper import data as paper
from mgdarts.paper import study as reproduce
from mgdarts.paper.arms import Arm, job
from mgdarts.paper.checks import CHECKS
from mgdarts.paper.data import TARGETS
from mgdarts.paper.measure import measure
from mgdarts.paper.noise import gap, more
from mgdarts.paper.record import at, make_record, rebuild, scale_of
from mgdarts.paper.study import Study, seeds_of
from mgdarts.paper.verdicts import judge
from mgdarts.space.darts import NetSpec
from mgdarts.sweep import executors
from mgdarts.sweep.executors import Local, run_jobs
from mgdarts.sweep.work import do

ROOT = Path(__file__).resolve().parent.parent
FAST = {"data.subset": 100, "data.test_subset": 200, "search.stages": 1, "search.warmup": 0, "search.max_epochs": 2,
        "search.prune_every": 1, "search.batch": 50, "train.epochs": 1}
WHOLE = {"preset", "seeds", "dataset", "data_dir", "device", "settings", "arms", "jobs", "on", "address", "out",
         "runs_dir"}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    "Drawn by a Chromium that is started for each: as on a machine that has none, figures are pages here."
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")


def make(label="one", seed=0, how=None, **kw):
    return job(Arm(label, how or {}, **kw), "smoke", seed, **FAST)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "Two seeds of an arm, finished, in a folder of runs."
    folder = tmp_path_factory.mktemp("repro")
    pair = [make(seed=s) for s in (0, 1)]
    assert run_jobs(pair, folder, Local(1)) == {}
    return folder, pair


def test_a_finished_arm_is_not_run_again(done, monkeypatch):
    folder, pair = done
    assert all(j.finished(folder) for j in pair)
    def started(*_): pytest.fail("something was started")
    monkeypatch.setattr(executors.multiprocessing, "get_context", started)
    wanted = [*pair, make("the same under another name")]
    assert run_jobs(wanted, folder) == run_jobs(wanted, folder, Local(1), started) == {}


def test_the_key_is_of_what_is_run():
    one = make()
    names = {make("another name").key(), make(how={"train.epochs": 5}).key(), make(how={"search.stages": 1}).key()}
    assert names == {one.key()}
    others = [make(seed=1), make(how={"search.regrow": 0.5}), make(build={"filters": 0.5})]
    assert len({j.key() for j in (one, *others)}) == 4
    trained = [make(how={"train.epochs": 5}), make(keep=0.5), make(random=True),
               make(how={"train.weights": "supernet"})]
    assert len({j.training(Path("r")) for j in (one, *trained)}) == 5
    elsewhere = make(how={"data.dir": "/somewhere/else"})
    assert elsewhere.key() == one.key() and at(elsewhere, "") == one
    assert from_dict(one.search).preset == "smoke"


def test_a_killed_arm_goes_on_and_ends_the_same(done, tmp_path):
    folder, (one, _) = done
    code = ("import json, sys; from mgdarts.sweep.work import Job, do\n"
            "do(Job(**json.loads(sys.argv[1])), sys.argv[2])")
    p = subprocess.Popen([sys.executable, "-c", code, json.dumps(vars(one)), str(tmp_path)])
    for _ in range(1200):
        if list(one.run(tmp_path).glob("checkpoint/*.pt")):
            break
        time.sleep(0.05)
    p.kill()
    p.wait()
    assert not one.finished(tmp_path) and list(one.run(tmp_path).glob("checkpoint/*.pt"))
    do(one, tmp_path)
    def same(row): return {k: v for k, v in row.items() if not k.endswith("_s")}
    assert same(measure(one, tmp_path)) == same(measure(one, folder))


def test_one_arm_fails_and_the_others_end(done, capsys):
    folder, pair = done
    others = [make("no search", build={"filters": 0.5}), make("luck", random=True), make("half", keep=0.5)]
    bad = make("too large", how={"search.target_m": 9.0})
    failed = run_jobs([bad, *pair, *others], folder, Local(1))
    assert list(failed) == [0] and "target_m" in failed[0] and all(j.finished(folder) for j in others)
    assert "FAILED" in capsys.readouterr().out
    record = make_record("table05", [bad, *pair, *others], folder, {}, failed, 0.0)
    assert [f["label"] for f in record["failed"]] == ["too large"] and len(record["rows"]) == 5
    one, _, _, luck, half = record["rows"]
    assert luck["params_m"] <= one["params_m"] and half["search_s"] == one["search_s"]
    assert half["ratio_weight"] == 0.5 and half["params_m"] < one["params_m"]
    out = others[1].training(folder)
    assert luck["ops"] == counts(load(out))["ops"]
    assert luck["acc"] == read_json(out / "result.json", "a result")["test_acc_final"]


def test_an_arm_trained_on_all_images_shares_the_search_and_has_no_validation(done):
    folder, (one, _) = done
    every = make(how={"train.images": "train+val"})
    assert every.key() == one.key() and not every.finished(folder)
    do(every, folder)
    record = make_record("table05", [one, every], folder, {}, {}, 0.0)
    a, b = record["rows"]
    assert (a["trained_on"], b["trained_on"]) == ("train", "train+val") and b["acc"] >= 0
    assert a["val_acc"] is not None and b["val_acc"] is b["acc_best_val"] is None
    assert a["data_source"] == b["data_source"] == "scikit-learn" and record["values"]["one"]["val_acc"]["n"] == 1


def test_a_record_at_the_papers_scale_is_trained_on_all_images():
    assert scale_of(to_dict(preset("small"))) == "paper"
    assert scale_of(to_dict(preset("small", **{"train.images": "train"}))) == "scaled down"


def dies(job, folder):
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_that_are_killed_are_noticed(tmp_path):
    failed = run_jobs([make(seed=s) for s in range(3)], tmp_path, Local(2, retries=0), dies)
    assert failed == dict.fromkeys(range(3), "its process ended with code -9")


def stops(job, folder):
    if job.seed: raise Stopped(signal.SIGINT, "SIGINT")
    raise ValueError("two\nlines")


def test_a_signal_ends_the_arms_of_this_process_and_an_error_does_not(tmp_path, capsys):
    threads = torch.get_num_threads()
    with pytest.raises(Stopped): run_jobs([make(seed=s) for s in range(3)], tmp_path, Local(1), stops)
    assert "1 of 3 arms: one, seed 0 FAILED: ValueError: two lines" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_two_that_run_the_same_arm_take_turns(tmp_path):
    "Who comes later finds it finished."
    seen = []
    def work(job, folder):
        if seen: return seen.append("later")
        seen.append("first")
        other = threading.Thread(target=run_jobs, args=([make()], tmp_path, Local(1), work))
        other.start()
        other.join(0.2)
        assert seen == ["first"] and other.is_alive()
        seen.append("done")
    assert run_jobs([make()], tmp_path, Local(1), work) == {}
    for _ in range(100):
        if len(seen) == 3: break
        time.sleep(0.05)
    assert seen == ["first", "done", "later"]


def test_an_interruption_keeps_what_is_finished(done, tmp_path):
    "SIGINT to the one who waits ends the arms, and starting again runs the rest only."
    folder, (one, two) = done
    os.symlink(one.run(folder), one.run(tmp_path))
    code = ("import json, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from mgdarts.sweep.executors import run_jobs\n"
            "from mgdarts.sweep.jobs import Job\n"
            "run_jobs([Job(**j) for j in json.loads(sys.argv[1])], sys.argv[2])")
    given = json.dumps([vars(one), vars(two)]), str(tmp_path)
    p = subprocess.Popen([sys.executable, "-c", code, *given], stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if (two.run(tmp_path) / "events.jsonl").exists():
            break
        time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    assert p.wait(60) != 0 and one.finished(tmp_path)
    assert run_jobs([one, two], tmp_path, Local(1)) == {} and two.finished(tmp_path)


def test_weights_taken_away_and_networks_built():
    spec = NetSpec(8, 3, size=16)
    found = [built(spec, 20_000, f, fit_at=0.5, seed=3) for f in (0.5, 1.0)]
    assert found[0] == built(spec, 20_000, 0.5, fit_at=0.5, seed=3)
    def ops(a): return [[(op.op, op.src, op.dst) for op in c.ops] for c in a.cells]
    assert ops(found[0]) == ops(found[1])
    whole = built(spec, 20_000, 0.5, weights=1.0)
    g = torch.Generator().manual_seed(0)
    scores = {k: torch.rand(s, generator=g) for k, s in whole.mask_shapes().items()}
    masks = masked(whole, scores, 0.3).masks
    kept = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert 0.3 <= kept < 0.33 and all(bool(m.any()) for m in masks.values())
    with pytest.raises(InputError, match="filter ratio"):
        built(spec, 100, 1.0)


def test_a_record_is_rebuilt_from_the_configurations_in_it(done):
    folder, pair = done
    path = folder / "record.json"
    write_json(path, make_record("table05", pair, folder, {"preset": "smoke"}, {}, 0.0))
    record = read_json(path, "a record")
    path.unlink()
    for j in pair:  # nothing is left but the record
        for f in sorted(j.run(folder).rglob("*"), reverse=True):
            f.unlink() if f.is_file() else f.rmdir()
        j.run(folder).rmdir()
    new = rebuild(record, folder, Local(1))
    def clockless(rows): return [{k: v for k, v in r.items() if k not in ("search_s", "train_s")} for r in rows]
    assert clockless(new["rows"]) == clockless(record["rows"]) and new["arms"] == record["arms"]
    assert new["values"]["one"]["acc"] == record["values"]["one"]["acc"] and record["values"]["one"]["acc"]["n"] == 2
    assert record["scale"] == "scaled down" and "digits" in record["dataset"]
    assert record["environment"]["torch"] == torch.__version__
    assert record["paper"] == paper.table(5)
    with pytest.raises(InputError, match="no arms"):
        rebuild({"item": "table05", "arms": [{"label": "x"}]}, folder)


def test_a_recorded_arm_is_not_run_again(done, tmp_path, monkeypatch):
    "Not even where the files of its run are gone: seeds add up from record to record."
    folder, pair = done
    assert run_jobs(pair, folder, Local(1)) == {}
    old = make_record("table05", pair, folder, {}, {}, 0.0)
    (tmp_path / "table09").mkdir()
    write_json(tmp_path / "table09/record.json", {**old, "item": "table09"})
    (tmp_path / "table08").mkdir()
    (tmp_path / "table08/record.json").write_text("{}")  # damaged: says nothing
    started = []
    def not_here(wanted, *_):
        started.extend(wanted)
        return dict.fromkeys(range(len(wanted)), "not here")
    monkeypatch.setattr(reproduce, "run_jobs", not_here)
    def study(seeds, **more):
        settings = ", ".join(f"{k}={v}" for k, v in {**FAST, "search.length": 6, "search.lambda_step": 4e-3}.items())
        s = Study("table05", seeds=seeds, out=str(tmp_path), runs_dir=str(tmp_path / "runs"), settings=settings)
        return s.run([Arm("under another name")], **more)
    record = study("0,1,2").record
    assert [(j.label, j.seed) for j in started] == [("under another name", 2)] and record["failed"][0]["seed"] == 2
    assert [{**r, "label": "one"} for r in record["rows"]] == old["rows"]
    assert record["values"]["under another name"]["acc"]["n"] == 2
    started.clear()
    with pytest.raises(RunFailed):
        study("0", files=True)
    assert len(started) == 1


def rows(**values):
    return [{"label": k, "seed": s, "acc": v} for k, vs in values.items() for s, v in enumerate(vs)]


@pytest.mark.parametrize("ours, theirs, by, verdict", [
    ([97.1, 97.2, 97.3], [96.1, 96.2, 96.3], 0, "reproduced"),
    ([96.1, 96.2, 96.3], [97.1, 97.2, 97.3], 0, "not reproduced"),
    ([97.1, 97.2, 97.3], [97.0, 97.2, 97.4], 0, "inconclusive"),
    ([99.0], [50.0], 0, "inconclusive"),  # one seed says nothing about noise
    ([97.1, 97.2, 97.3], [97.1, 97.2, 97.3], -0.5, "reproduced"),  # no loss, within half a point
    ([97.1, 97.2, 97.3], [97.7, 97.8, 97.9], -0.5, "inconclusive"),
    ([97.0, 97.0], [97.0, 97.0], 0, "inconclusive"),
])
def test_verdicts_on_made_up_numbers(ours, theirs, by, verdict):
    assert more("", ours, theirs, by)[0] == verdict


def test_a_claim_needs_all_of_its_parts():
    claim = next(c for c in paper.claims() if c["id"] == "joint-beats-iterative")
    def record(half):
        accs = {"Joint": [97.1, 97.2, 97.3], "Iterative (Full Epoch)": [95.1, 95.2, 95.3]}
        return {"rows": rows(**accs, **{"Iterative (Half Epoch)": half}), "scale": "scaled down", "dataset": "made up"}
    assert judge(claim, record([95.0, 95.1, 95.2]))["verdict"] == "reproduced"
    assert judge(claim, record([97.0, 97.2, 97.4]))["verdict"] == "inconclusive"
    assert judge(claim, record([99.0, 99.1, 99.2]))["verdict"] == "not reproduced"
    assert judge(claim, record([])) ["verdict"] == "not run" and judge(claim, None)["verdict"] == "not run"
    assert judge(claim, record([95.0, 95.1, 95.2]))["scale"] == "scaled down"


def test_welch_is_students_where_it_can_be_looked_up():
    diff, half = gap([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    # Student's 97.5 % point, 4 degrees of freedom
    assert diff == -3 and half == pytest.approx(2.776445 * (2 / 3) ** 0.5, rel=1e-6)
    assert gap([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], tests=10)[1] > half


def test_every_claim_has_a_check_and_every_target_a_notebook():
    assert {c["id"] for c in paper.claims()} == set(CHECKS)
    assert {p.stem for p in (ROOT / "nbs/paper").glob("*.ipynb")} >= set(TARGETS) >= {c["item"] for c in paper.claims()}


@pytest.mark.parametrize("args", [
    ["tabel05"], ["table05", "--seeds", "a"], ["table05", "--seeds", "-1"], ["all", "--preset", "smok"],
    ["all", "--arms", "r = 0"], ["table05", "--set", "chanels=4"], ["table05", "--dataset", "nothing-here"],
    ["table05", "--jobs", "-1"], ["nowhere/record.json"]])
def test_bad_input_gets_one_line(args, capsys):
    assert main(["reproduce", *args]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("mgdarts: ") and "\n" not in err


def test_claims_command(tmp_path, capsys):
    assert main(["claims", "--records", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["claims"]
    assert len(found) == len(paper.claims()) and {c["verdict"] for c in found} == {"not run"}
    assert {"id", "text", "verdict", "scale"} <= found[0].keys()
    assert main(["claims", "--records", str(tmp_path / "nothing")]) == 2
    capsys.readouterr()
    (tmp_path / "table05").mkdir()
    (tmp_path / "table05/record.json").write_text("{}")
    assert main(["claims", "--records", str(tmp_path)]) == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("bad", [{"seeds": "x"}, {"preset": 3}, {"arms": ["a"]}, {"jobs": True}, {"dataset": 1}])
def test_parameters_are_checked(bad):
    with pytest.raises(InputError):
        Study("table05", **bad)


def test_an_unknown_arm_is_refused(tmp_path):
    with pytest.raises(InputError, match="r = 0.2"):
        Study("table05", arms="r = 0.25", runs_dir=str(tmp_path)).run([Arm("r = 0.2")])
    assert seeds_of("2, 0,2") == (2, 0) and seeds_of(1) == (1,)


def test_a_notebook_by_command(tmp_path, capsys, monkeypatch, here):
    "A table at smoke: record, figure, executed notebook; and made again from its record."
    monkeypatch.setattr(reproduce, "root", lambda: ROOT)
    executed = tmp_path / "runs"
    def elsewhere(name, given): return run(name, given | {"runs_dir": str(executed)}, executed)
    monkeypatch.setattr(reproduce, "run_notebook", elsewhere)
    fast = [x for k, v in {**FAST, "search.max_epochs": 1}.items() for x in ("--set", f"{k}={v}")]
    given = [*fast, "--arms", "r = 0,r = 0.1", "--jobs", "1", "--out", str(tmp_path / "figures"), "--json"]
    assert main(["reproduce", "table05", *given]) == 0
    out = json.loads(capsys.readouterr().out)["targets"][0]
    record = read_json(tmp_path / "figures/table05/record.json", "a record")
    assert out["arms"] == 2 and record["scale"] == "scaled down"
    assert [r["label"] for r in record["rows"]] == ["r = 0", "r = 0.1"]
    assert any(f.endswith("accuracy.html") for f in out["figures"])
    assert out["verdicts"] == [{"id": "regrowing-helps", "verdict": "not run", "scale": None}]
    nb = nbformat.read(executed / "table05.ipynb", 4)
    assert os.path.getsize(executed / "table05.ipynb") < 1_000_000
    shown = [o["data"] for c in nb.cells for o in c.get("outputs", []) if "data" in o]
    assert any("| r = 0.1 |" in d.get("text/markdown", "") for d in shown)
    assert any("application/vnd.plotly.v1+json" in d for d in shown)
    again = rebuild(tmp_path / "figures/table05/record.json", executed)
    assert again["rows"] == record["rows"] and again["values"] == record["values"]


def test_the_notebook_of_claims(tmp_path, here):
    "All claims in a table and a picture, from a folder of records; an unknown parameter is refused."
    accs = {"Joint": 97.0, "Iterative (Full Epoch)": 95.0, "Iterative (Half Epoch)": 95.0}
    made = rows(**{n: [v, v + 0.1, v + 0.2] for n, v in accs.items()})
    record = {"item": "table09", "rows": made, "scale": "scaled down", "dataset": "made up"}
    (tmp_path / "table09").mkdir()
    write_json(tmp_path / "table09/record.json", record)
    given = {"records": str(tmp_path), "out": str(tmp_path / "claims")}
    def execute(given, out):
        papermill.execute_notebook(str(ROOT / "nbs/paper/claims.ipynb"), str(out), given, kernel_name="python3",
                                   progress_bar=False, cwd=str(ROOT))
        cells = nbformat.read(out, 4).cells
        return [o["data"] for c in cells for o in c.get("outputs", []) if "data" in o]
    shown = execute(given, tmp_path / "claims.ipynb")
    text = shown[0]["text/markdown"]
    assert f"| not run | {len(paper.claims()) - 1} |" in text and "| reproduced | 1 |" in text
    figure = next(d["application/vnd.plotly.v1+json"] for d in shown if "application/vnd.plotly.v1+json" in d)
    assert sum(len(t["y"]) for t in figure["data"]) == len(paper.claims())
    assert (tmp_path / "claims/verdicts.html").exists()
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="recrods"):
        execute({"recrods": ""}, tmp_path / "bad.ipynb")


run = reproduce.run_notebook


@pytest.mark.parametrize("path", [ROOT / f"nbs/paper/{name}.ipynb" for name in sorted(TARGETS)], ids=lambda p: p.stem)
def test_papermill_knows_all_parameters(path):
    found = papermill.inspect_notebook(str(path))
    assert WHOLE <= found.keys()
    assert all(p["help"] and p["inferred_type_name"] != "None" for p in found.values())


@pytest.mark.parametrize("bad", [{"preset": "smok"}, {"sedes": "1"}, {"seeds": "a"}])
def test_bad_parameters_stop_a_notebook(tmp_path, bad, here):
    with pytest.raises(InputError):
        run("table09", {"out": str(tmp_path), "runs_dir": str(tmp_path / "runs"), **bad}, tmp_path)
    assert not (tmp_path / "runs").exists()
