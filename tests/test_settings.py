"A setting is done or refused, never dropped."
import json

import pytest

from mgdarts.base.options import InputError
from mgdarts.cli.main import main
from mgdarts.methods.registry import preset
from mgdarts.runs import run as runs

TINY = {"data.subset": 100, "search.batch": 40, "search.max_epochs": 2, "search.warmup": 1, "search.prune_every": 1,
        "search.lambda_step": .05, "search.target_m": .04, "train.epochs": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings") / "run"
    runs.search(preset("smoke", **TINY), folder)
    return folder


def refused(capsys, says, *args):
    assert main([str(a) for a in args]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said


@pytest.mark.parametrize("args, says", [
    (["search", "--set", "channels=4", "--set", "space.channels=5", "--dry-run"], "says space.channels twice"),
    (["search", "--seed", "1", "--set", "seed=2", "--dry-run"], "--set seed is also said by an option"),
    (["count", "--width", "1.0"], "--width is of the MobileNet-like space"),
    (["count", "--space", "mobilenet", "--channels", "8"], "--channels is of the DARTS-like space"),
    (["sweep", "--seeds", "0", "--on", "mars", "--dry-run"], "no executor 'mars'"),
    (["sweep", "--seeds", "0", "--set", "channels=4,6", "--set", "channels=8", "--dry-run"], "channels twice"),
    (["plan", "--seeds", "1"], "without --sweep: leave out --seeds"),
    (["plan", "--sweep", "smoke", "--batch", "8"], "--sweep plans many runs: leave out --batch"),
])
def test_what_is_said_twice_or_in_vain(args, says, capsys): refused(capsys, says, *args)


@pytest.mark.parametrize("more", [["--preset", "cpu"], ["--dry-run"], ["--seed", "3"], ["--set", "seed=3"]])
def test_resuming_takes_nothing_else(more, run, capsys):
    refused(capsys, f"leave out {more[0]}", "search", "--resume", "--out", run, *more)


@pytest.mark.parametrize("more", [["--preset", "cpu"], ["--seeds", "1"], ["--arms", "all"], ["--out", "x"],
                                  ["--set", "seed=3"], ["--dataset", "digits"], ["--device", "cpu"]])
def test_a_record_is_made_again_as_it_was(more, tmp_path, capsys):
    (tmp_path / "record.json").write_text("{}")
    refused(capsys, f"leave out {more[0]}", "reproduce", tmp_path / "record.json", *more)


def test_a_retraining_has_no_use_for_knobs_of_a_search(run, capsys):
    for name in ("search.batch=8", "batch=8", "channels=4", "rules.samples=2"):
        refused(capsys, "a retraining has no use for it" if name != "batch=8" else "batch", "train", run, "--set", name)
    assert not (run / "train").exists()


def test_weights_of_the_super_net_are_taken_wherever_the_training_goes(run, tmp_path, capsys):
    "Into the run's own folder or another one the first epoch begins with the same loss; from scratch with another."
    def losses(out, *more):
        assert main([*map(str, ("train", run, "--out", out, *more)), "--json"]) == 0
        capsys.readouterr()
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        return [e["loss"] for e in events if e["type"] == "epoch"]
    inherited = losses(tmp_path / "one", "--set", "train.weights=supernet")
    assert main(["train", str(run), "--set", "train.weights=supernet", "--json"]) == 0
    capsys.readouterr()
    events = [json.loads(line) for line in (run / "train/events.jsonl").read_text().splitlines()]
    assert inherited == [e["loss"] for e in events if e["type"] == "epoch"] != losses(tmp_path / "two")
    refused(capsys, "train.weights=supernet needs the run", "train", run / "architecture.json", "--preset", "smoke",
            "--set", "train.weights=supernet", "--out", tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_a_random_network_has_no_weights_to_inherit(run, tmp_path, capsys):
    args = ["train", run, "--baseline", "--set", "train.weights=supernet", "--out", tmp_path / "random", "--json"]
    assert main([str(a) for a in args]) == 0
    assert json.loads((tmp_path / "random/config.json").read_text())["config"]["train"]["weights"] == "scratch"


def test_names_that_cannot_be_stored_or_look_like_markup(tmp_path, capsys):
    refused(capsys, "is not text that can be stored", "search", "--out", f"{tmp_path}/\udcff")
    args = ["search", "--out", f"{tmp_path}/a[/b]", *(w for k, v in TINY.items() for w in ("--set", f"{k}={v}"))]
    assert main(args) in (0, 1)
    assert "a[/b]" in "".join(capsys.readouterr().out.split())


def test_the_api_refuses_what_it_cannot_do(tmp_path, run):
    from mgdarts.net import files
    cfg = preset("smoke", **TINY, **{"train.weights": "supernet"})
    with pytest.raises(InputError, match="needs the run"): runs.train(cfg, files.load(run), tmp_path / "x")
