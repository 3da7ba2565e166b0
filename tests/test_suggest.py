"Settings that Optuna asks for: ordinary runs, and what was killed goes on as if nothing had been."
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mgdarts.base.options import InputError
from mgdarts.cli.main import main
from mgdarts.runs.folder import read_config
from mgdarts.sweep import suggest
from mgdarts.sweep.executors import Local
from mgdarts.sweep.work import do

pytest.importorskip("optuna")
QUICK = {"search.length": 1, "data.subset": 128}
WANTED = suggest.Wanted("val_acc", "lr_arch=0.1..10:log, edge_norm=false,true", method="darts-v1", set=QUICK)


@pytest.mark.parametrize("text", ["", "0.1..1", "mu=1..0", "mu=0..1:log", "mu=0..1:exp", "max_epochs=1..2.5", "mu=0..x",
                                  "mu=0..1, 0.5", "mu=0,1, mu=1", "nothing=0..1", "seed=0,1", "method=gdas,dass"])
def test_a_space_that_is_none_is_refused(text):
    with pytest.raises(InputError): suggest.space_in(text)


def test_a_space_is_read():
    found = suggest.space_in("lr_arch=0.1..10:log, mu=0..1, regrow=0,0.1,0.2, max_epochs=10..40")
    assert found["search.lr_arch"] == suggest.Range(.1, 10., True) and found["search.mu"] == suggest.Range(0., 1.)
    assert found["search.regrow"].values == ("0", "0.1", "0.2") and found["search.max_epochs"].whole


def test_what_is_asked_for_depends_on_what_was_told_alone():
    first = suggest.ask([], WANTED, 12)  # ten are drawn at random
    told = [suggest.replace(t, state="complete", value=float(-abs(t.set["search.lr_arch"] - 2))) for t in first]
    assert suggest.ask(told, WANTED, 2) == suggest.ask(told, WANTED, 2) != suggest.ask(first, WANTED, 2)
    assert [t.number for t in suggest.ask(told, WANTED, 2)] == [12, 13]


def some_fail(job, folder):
    if job.set["rules.edge_norm"] == "true" or job.set["rules.edge_norm"] is True: raise InputError("it cannot be")
    do(job, folder)


def test_trials_are_runs_and_one_that_fails_stops_no_other(tmp_path):
    found = suggest.suggest_sweep(WANTED, 3, tmp_path / "sweep", Local(1), quiet=True, work=some_fail)
    states = {t["set"]["rules.edge_norm"]: (t["state"], t["why"]) for t in found["trials"]}
    assert states["true"] == ("failed", "it cannot be") and states["false"] == ("complete", None)
    rows = json.loads((tmp_path / "sweep/sweep.json").read_text())["rows"]
    assert [r["run"] for r in rows] == ["trial-0000", "trial-0001", "trial-0002"]
    assert {r["status"] for r in rows} == {"failed", "done"}
    best = found["best"]
    cfg = read_config(tmp_path / f"sweep/trial-{best['number']:04}")
    assert cfg.search.lr_arch == best["set"]["search.lr_arch"] and cfg.method == "darts-v1"
    again = suggest.suggest_sweep(WANTED, 3, tmp_path / "sweep", Local(1), quiet=True)  # what failed is not tried again
    assert again == found
    with pytest.raises(InputError, match="something else"):
        suggest.suggest_sweep(suggest.replace(WANTED, seed=1), 3, tmp_path / "sweep", Local(1))


def test_a_sweep_that_is_killed_goes_on_with_the_same_trials(tmp_path):
    args = ["sweep", "--methods", "darts-v1", "--set", "search.length=2", "--set", "data.subset=128", "--suggest",
            "optuna", "--trials", "4", "--space", "lr_arch=0.1..10:log", "--jobs", "2", "--json"]
    def command(out): return [sys.executable, "-m", "mgdarts", *args, "--out", str(out)]
    whole = json.loads(subprocess.run(command(tmp_path / "a"), capture_output=True, check=True, text=True).stdout)
    process = subprocess.Popen(command(tmp_path / "b"), stdout=subprocess.DEVNULL, start_new_session=True)
    until = time.time() + 120
    while not list((tmp_path / "b").glob("trial-0002/events.jsonl")) and time.time() < until: time.sleep(.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = ["sweep", "--resume", "--out", str(tmp_path / "b"), "--jobs", "2", "--json"]
    done = subprocess.run([sys.executable, "-m", "mgdarts", *again], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trials"] == whole["trials"]


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    out = ["--out", str(tmp_path / "x"), "--suggest"]
    for args, said in ((["optuna"], "needs --space"), (["other", "--space", "mu=0..1"], "there is optuna"),
                       (["optuna", "--space", "mu=0..1", "--objective", "luck"], "unknown objective"),
                       (["optuna", "--space", "mu=0..1", "--objective", "test_acc"], "--train"),
                       (["optuna", "--space", "mu=0..1", "--seeds", "0,1"], "one of seeds"),
                       (["optuna", "--space", "mu=0..1", "--set", "mu=0"], "one or the other")):
        assert main(["sweep", *out, *args]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_without_optuna_a_line_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", "--out", str(tmp_path / "x"), "--suggest", "optuna", "--space", "mu=0..1"]) == 2
    assert "pip install 'mgdarts[optuna]'" in capsys.readouterr().err
