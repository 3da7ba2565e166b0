"Run folders, the command line, and what bad input gets: one line, exit code 2, nothing written."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mgdarts import __version__
from mgdarts.base.augment import Augment
from mgdarts.base.data import load_data
from mgdarts.base.files import Checkpoints, read_json, write_json
from mgdarts.base.options import InputError
from mgdarts.cli.main import main
from mgdarts.methods.registry import METHODS, preset
from mgdarts.net import files as architecture
from mgdarts.net.count import counts
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.supernet import SuperNet
from mgdarts.runs import estimate, run as runs
from mgdarts.runs.folder import read_config, read_record
from mgdarts.runs.listen import read_events
from mgdarts.runs.make import make_search, make_trainer, supernet_weights
from mgdarts.runs.records import list_runs, load_run, run_row
from mgdarts.space.darts import NetSpec
from mgdarts.space.space import count_supernet
from mgdarts.views import compare, figures
from mgdarts.views.report import report, write_report

SHARED = Path(os.environ.get("MGDARTS_SHARED", Path(__file__).resolve().parent.parent.parent / "shared"))
FAST = {"data.subset": 200, "search.warmup": 1, "search.max_epochs": 2, "train.epochs": 2, "search.batch": 32}
SETS = [x for k, v in FAST.items() for x in ("--set", f"{k}={v}")]


def call(args, capsys):
    code = main([str(a) for a in args])
    io = capsys.readouterr()
    return code, io.out, io.err


@pytest.fixture(scope="module")
def run(tmp_path_factory, run_of):
    return run_of(tmp_path_factory.mktemp("runs") / "one", trained=True, **FAST)


def test_count(capsys):
    code, out, _ = call(["count", "--channels", 16, "--cells", 8, "--json"], capsys)
    small = json.loads(out)
    assert code == 0 and small["main"] == 1987194 and small["ops"] == 784
    assert small["stages"] == [97536, 438784, 1446912]
    _, out, _ = call(["count", "--channels", 44, "--cells", 14, "--json"], capsys)
    large = json.loads(out)
    assert large["main"] == 21003982
    assert [sum(large["aux"][k]) for k in ("small", "medium", "large")] == [692500, 2695700, 3236372]


def test_counts_agree_with_built_super_nets():
    for C, L in ((16, 8), (44, 14)):
        spec = NetSpec(C, L)
        want = count_supernet(spec)
        for size in ("small", "medium", "large") if C == 44 else ("medium",):
            net = SuperNet(spec, size)
            for stage in (0, 1):
                net.open(spec.ends[stage], stage)
                assert sum(p.numel() for p in net.head.parameters()) == want["aux"][size][stage]
        net.open(L - 1, 2)
        arch = {id(net.alpha)} | {id(getattr(net, t)) for t in net.THRESHOLDS} | {id(c.beta) for c in net.cells}
        weights = sum(p.numel() for p in net.parameters() if id(p) not in arch)
        assert weights == want["main"] == net.count().searched.params


@pytest.mark.skipif(not (SHARED / "data/published").exists(), reason="the published architecture is not there")
def test_import_of_the_published_architecture(tmp_path, capsys):
    published = SHARED / "data/published"
    given = ["--genotype", published / "genotype_small.txt", "--masks", published / "mask_cifar10_darts_small.npy"]
    code, _, err = call(["arch", "import", *given, "--channels", 24, "--out", tmp_path / "A"], capsys)
    assert code == 0, err
    code, out, _ = call(["arch", "show", tmp_path / "A", "--json"], capsys)
    got = json.loads(out)
    sizes = {"params_total": 1143644, "params_deployable": 704082, "params_nonzero": 697142, "ops": 184}
    assert {k: got[k] for k in sizes} == sizes
    assert got["macs"] == pytest.approx(137.4e6, rel=1e-3)
    net = DerivedNet(architecture.load(tmp_path / "A"), aux=True)
    assert sum(p.numel() for p in net.parameters()) == 1143644
    assert net(torch.randn(2, 3, 32, 32))[0].shape == (2, 10)


def test_a_run_folder_is_complete(run, capsys):
    names = {p.name for p in run.iterdir()}
    assert {"config.json", "events.jsonl", "checkpoint", "architecture.json", "masks.safetensors", "report.html",
            "result.json", "train", "random"} <= names
    record = json.loads((run / "config.json").read_text())
    assert record["config"]["seed"] == 0 and record["environment"]["torch"]
    assert (record["dataset"], record["data_source"]) == ("digits", "scikit-learn")
    events = read_events(run / "events.jsonl")
    assert events[-1]["type"] == "done"
    assert all({"type", "step", "epoch", "stage", "time"} <= e.keys() for e in events)
    assert all("loss" in e for e in events if e["type"] == "epoch")
    result = json.loads((run / "result.json").read_text())
    arch = architecture.load(run)
    assert counts(arch)["params_nonzero"] == result["derived"]["params_nonzero"]
    a, b = (json.loads((run / k / "result.json").read_text())["params_nonzero"] for k in ("train", "random"))
    assert b <= a and b > 0.95 * a
    code, out, _ = call(["runs", run.parent, "--json"], capsys)
    assert code == 0 and json.loads(out)["runs"][0]["run"] == str(run)
    page = (run / "report.html").read_text("utf-8")
    assert "digits (scikit-learn)" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_events_depend_on_the_clock_in_nothing_but_time(run, tmp_path, events_of):
    runs.search(preset("smoke", **FAST), tmp_path / "again")
    assert events_of(run) == events_of(tmp_path / "again")
    for name in ("architecture.json", "masks.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_an_interrupted_run_resumes_to_the_same_events(run, interrupted, events_of):
    cut = interrupted(preset("smoke", **FAST))
    assert events_of(run) == events_of(cut)


def test_training_from_the_super_nets_weights(run):
    cfg = preset("smoke", **FAST, **{"train.weights": "supernet"})
    arch = architecture.load(run)
    result = runs.train(cfg, arch, run / "inherited", init_state=supernet_weights(run, arch))
    assert result["epochs"] == 2


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    kept = Checkpoints(tmp_path)
    for i in range(4):
        kept.save({"i": i})
    assert len(kept.files()) == 2 and kept.load()["i"] == 3
    kept.files()[-1].write_bytes(b"garbage")
    assert kept.load()["i"] == 2


BAD = [
    (["search", "--preset", "smok"], "preset"),
    (["search", "--dataset", "no-such-data"], "no-such-data"),
    (["search", "--method", "magic"], "magic"),
    (["search", "--set", "chanels=4"], "chanels"),
    (["search", "--set", "channels=5"], "even"),
    (["search", "--set", "search.lr_weights=-1"], "lr_weights"),
    (["search", "--set", "search.batch=0"], "batch"),
    (["search", "--set", "target_m=1000"], "target_m"),
    (["search", "--set", "target_m=nan"], "target_m"),
    (["search", "--set", "search.warmup=many"], "warmup"),
    (["search", "--set", "nonsense"], "KEY=VALUE"),
    (["search", "--device", "cuda:99"], "cuda:99"),
    (["search", "--device", "toaster"], "toaster"),
    (["search", "--dataset", "cifar10", "--data-dir", "{tmp}/empty"], "cifar"),
    (["search", "--dataset", "half", "--data-dir", "{tmp}"], "half"),
    (["search", "--out", "{run}"], "exists"),
    (["search", "--resume"], "--out"),
    (["search", "--resume", "--out", "{tmp}/nowhere"], "run folder"),
    (["search", "--resume", "--dry-run", "--out", "{tmp}/nowhere"], "leave out --"),
    (["search", "--bogus"], "bogus"),
    (["train", "{tmp}/nowhere"], "nowhere"),
    (["train", "{run}"], "exists"),
    (["train", "{tmp}/empty"], "preset"),
    (["arch", "show", "{tmp}/nowhere"], "nowhere"),
    (["arch", "show", "{tmp}/text"], "text"),
    (["arch", "import", "--genotype", "{tmp}/text", "--channels", "24", "--out", "{tmp}/never"], "genotype"),
    (["arch", "import", "--genotype", "{tmp}/nowhere", "--channels", "24", "--out", "{tmp}/never"], "nowhere"),
    (["count", "--channels", "0"], "channels"),
    (["count", "--space", "mars"], "mars"),
    (["runs", "{tmp}/nowhere"], "nowhere"),
]


@pytest.mark.parametrize("args, word", BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_bad_input(args, word, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MGDARTS_ROOT", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "half/train/a").mkdir(parents=True)
    (tmp_path / "text").write_text("hello")
    if "cifar10" in args:  # what no network looks like
        def offline(self): raise RuntimeError("no network")
        monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline, raising=False)
    before = sorted(p for p in tmp_path.rglob("*") if "cifar" not in p.name)
    args = [a.format(tmp=tmp_path, run=run) for a in args]
    code, out, err = call(args, capsys)
    assert code == 2 and out == "", (code, out, err)
    assert err.count("\n") == 1 and err.startswith("mgdarts: ") and word in err, err
    assert sorted(p for p in tmp_path.rglob("*") if "cifar" not in p.name) == before


def test_a_non_finite_loss_ends_with_1_and_a_saved_state(tmp_path, capsys):
    wild = [x for s in ("lr_weights=10", "search.clip=1e30", "lr_arch=100") for x in ("--set", s)]
    code, _, err = call(["search", "--preset", "smoke", *SETS, *wild, "--out", tmp_path / "run"], capsys)
    lines = [line for line in err.splitlines() if line.startswith("mgdarts: ")]
    assert code == 1 and len(lines) == 1 and "finite" in lines[0]
    assert Checkpoints(tmp_path / "run/checkpoint").load()["version"] == 2


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("mgdarts")
    if not command.exists():
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([command, "count", "--channels", "3"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_data_for_another_architecture_is_refused(run):
    cfg = preset("smoke", **FAST, size=16)
    with pytest.raises(InputError, match="data.size=8"):
        runs.train(cfg, architecture.load(run), run / "never")
    assert not (run / "never").exists()


def test_retraining_on_all_images_and_everything_that_shows_it(run, tmp_path, capsys):
    copy = tmp_path / "all"
    shutil.copytree(run, copy)
    for k in ("train", "random"): shutil.rmtree(copy / k)
    order = ["train", copy, "--set", "train.images=train+val"]
    code, out, err = call([*order, "--json"], capsys)
    assert code == 0, err
    got = json.loads(out)
    assert got["trained_on"] == "train+val" and not [k for k in got if "val" in k]
    record, searched = read_record(copy / "train"), read_record(copy)
    assert record["config"]["train"]["images"] == "train+val" and searched["images"]["val"] == 20
    assert record["images"] == {**searched["images"], "train": 200, "val": 0}
    code, out, err = call([*order, "--baseline"], capsys) # with a bar, and as a table
    assert code == 0 and "train+val" in out and "validation" not in out, err
    events = read_events(copy / "random/events.jsonl")
    assert [e["type"] for e in events] == ["epoch", "epoch", "result"]
    assert not [k for e in events for k in e if "val" in k]
    assert call([*order, "--resume", "--json"], capsys)[0] == 0
    assert [t.name for t in figures.learning(events).data] == ["train", "train"]
    page = (copy / "report.html").read_text("utf-8")
    assert "train+val" in page and "best validation epoch" not in page and "images it learns from" in page
    both = (run / "report.html").read_text("utf-8")
    assert "best validation epoch" in both and "images it learns from" not in both
    row = next(r for r in list_runs(tmp_path) if r["run"] == str(copy))
    assert row["test_acc"] == got["test_acc_final"] and row["random_acc"] is not None
    assert row["val_acc"] is row["random_val_acc"] is None
    assert compare.pareto([row]).data and not compare.pareto([row], accuracy="val_acc").data
    assert compare.entries([copy, copy / "train"])[1].row["test_acc"] == got["test_acc_final"]
    assert call(["compare", copy, run, "--figure", tmp_path / "c.html"], capsys)[0] == 0


def test_presets_search_and_retrain_as_the_paper_does():
    for name in ("imagenet", "mobilenet"):
        cfg = preset(name)
        assert Augment.of(cfg.data).at(224) == Augment(28, True, 112, True, "imagenet")
        assert not cfg.train.autoaugment and not cfg.train.cutout
    long = dict.fromkeys(("small", "large", "imagenet", "mobilenet"), "train+val")
    images = {"smoke": "train", "cpu": "train", **long}
    assert {name: preset(name).train.images for name in images} == images
    assert preset("large").search.target_m == 2.2
    assert preset("cpu").data.name == preset("cpu", kind="mobilenet").data.name == "cifar10"
    assert preset("small").data.policy == "cifar10" and preset("small").train.cutout


def test_a_retraining_without_cutout_has_none(run):
    def cfg(**more): return preset("smoke", **FAST, **{"data.cutout": 4}, **more)
    splits = load_data(cfg().data, 0)
    def cutout(loop): return loop.loaders["train"].augment.cutout
    def trainer(**more): return make_trainer(cfg(**more), architecture.load(run), splits)
    assert cutout(trainer()) == 4 and cutout(trainer(**{"train.cutout": False})) == 0
    assert cutout(make_search(cfg(**{"train.cutout": False}), splits)) == 4


@pytest.mark.parametrize("kind", ["darts", "mobilenet"])
def test_a_dry_run_says_what_is_needed_and_writes_nothing(kind, tmp_path, capsys, monkeypatch):
    order = ["search", "--preset", "smoke", "--dry-run", "--json", "--out", str(tmp_path / "run"),
             "--set", f"space.kind={kind}", "--set", "data.subset=200"]
    assert main(order) == 0
    found = json.loads(capsys.readouterr().out)
    seconds = sum(s["epoch_s"] * s["epochs_at_most"] for s in found["stages"])
    assert found["search_hours_at_most"] == pytest.approx(seconds / 3600)
    assert found["search_hours_at_most"] > 0 and found["train_hours"] > 0
    assert found["images"] == {"train": 180, "val": 20, "test": 359, "retraining": 180}
    assert found["peak_bytes"] == max(s["peak_bytes"] for s in found["stages"])
    assert not found["problems"] and not list(tmp_path.iterdir())
    monkeypatch.setattr(estimate, "memory_there", lambda device: 1000)
    assert main(order) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "a step needs about" in said.err
    assert len(json.loads(said.out)["problems"]) == 1
    assert main([*order, "--set", "data.name=nowhere"]) == 2


def test_a_run_of_before_opens_and_its_sizes_are_called_what_they_were(run, tmp_path, capsys):
    "Older runs compared the size before alignment with their target, and each of their thresholds started alone."
    old = tmp_path / "old"
    shutil.copytree(run, old)
    record, result = read_json(old / "config.json", "a record"), read_json(old / "result.json", "a result")
    for name in ("lambda_cap_fine", "label_smoothing"): del record["config"]["search"][name]
    for name in ("gap", "drift"): del result[name]
    result["params"] = result.pop("params_searched")
    for name, content in (("config", record), ("result", result)): write_json(old / f"{name}.json", content)
    before = read_config(old).search
    assert before.threshold_init == "own" and before.lambda_cap_fine == 0.5
    assert read_config(run).search.threshold_init == "min"
    row = run_row(old, load_run(old))
    assert row["status"].endswith("reached (before alignment)")
    assert row["params"] == result["derived"]["params_nonzero"] and row["params_searched"] == result["params"]
    code, out, _ = call(["search", "--resume", "--out", old], capsys)
    assert code == 0 and "as counted" in out
    assert "before alignment" in write_report(old).read_text("utf-8")


def test_what_there_is(capsys):
    code, out, _ = call(["methods", "--json"], capsys)
    found = {m["name"]: m for m in json.loads(out)["methods"]}
    assert code == 0 and list(found) == list(METHODS) and found["mg-darts"]["settings"] == {}
    code, out, _ = call(["knobs", "--json"], capsys)
    every = {k["name"]: k for k in json.loads(out)["knobs"]}
    assert code == 0 and every["search.lambda_step"]["default"] == 1e-5 and every["search.cost"]["choices"]
    code, out, _ = call(["knobs", "LAMBDA", "--json"], capsys)
    some = json.loads(out)["knobs"]
    assert code == 0 and {"search.lambda_step", "search.lambda_cap"} <= {k["name"] for k in some} < set(every)
    assert call(["methods"], capsys)[0] == call(["knobs", "warmup"], capsys)[0] == 0
    code, out, err = call(["knobs", "lamda"], capsys)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert call(["--version"], capsys)[1] == f"mgdarts {__version__}\n"
    assert json.loads(call(["--version", "--json"], capsys)[1]) == {"version": __version__}


def test_the_package_is_a_command():
    done = subprocess.run([sys.executable, "-m", "mgdarts", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"mgdarts {__version__}\n")


def test_a_report_is_written_once_results_are_there(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    page = copy / "report.html"
    page.unlink()
    runs.search(None, copy, resume=True, listeners=(report,))  # the run was killed just before
    written = page.stat().st_mtime_ns
    runs.search(None, copy, resume=True, listeners=(report,))
    assert page.stat().st_mtime_ns == written
