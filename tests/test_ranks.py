"One run in many processes."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from mgdarts.base.batches import Drawn, whole_batch
from mgdarts.base.options import InputError
from mgdarts.base.ranks import HERE
from mgdarts.cli.main import main
from mgdarts.methods.registry import preset
from mgdarts.runs.listen import read_events
from mgdarts.runs.make import make_search
from together import alone, team

TINY = ["--preset", "smoke", "--set", "data.subset=120", "--set", "data.test_subset=60", "--set", "search.batch=32",
        "--set", "search.max_epochs=2", "--set", "search.prune_every=1", "--set", "search.lambda_step=0.05"]


def steps(n, *args):
    "What `ranks/steps.py` says, in one process or several."
    return json.loads(team(n, "tests/ranks/steps.py", *args)[0])


def torchrun(flag, how, *args, restarts=0, n=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", "0",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", str(restarts),
               "tests/ranks/run.py", str(flag), how, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, timeout=1200)


def content(run):
    "What a run has found, without the clock."
    events = [{k: v for k, v in e.items() if k != "time"} for e in read_events(run / "events.jsonl")]
    return events, (run / "architecture.json").read_text(), (run / "masks.safetensors").read_bytes()


def test_two_processes_take_the_steps_of_one():
    how = "mg-darts", "fused", "float32", "60"
    one, two = steps(1, *how), steps(2, *how)
    assert [e for e, _ in two["alive"]].count("commit") >= 4 and "regrow" in dict(two["alive"])
    assert one["alive"] == two["alive"]
    assert max(abs(a - b) for a, b in zip(one["losses"][:50], two["losses"][:50], strict=True)) < 1e-4


@pytest.mark.parametrize("impl, n", [("fused", 50), ("reference", 10)])
def test_in_double_precision_they_are_the_same_steps(impl, n):
    how = "mg-darts", impl, "float64", str(n), "search.batch=8", "data.subset=500", "search.warmup=0"
    one, two = steps(1, *how), steps(2, *how)
    assert len(two["losses"]) == n
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < 1e-9


def test_a_net_that_is_trained_along():
    how = "cdarts", "fused", "float64", "9", "rules.ops=skip_connect,sep_conv_3x3", "search.lr_weights=.05"
    one, two = steps(1, *how), steps(2, *how)
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < 1e-9


def test_a_retraining_with_all_that_is_random_in_it():
    one, two = (steps(n, "train", "fused", "float64", "4") for n in (1, 2))
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < 1e-9


def test_a_store_that_is_kept_misleads_nobody():
    "As `torchrun` keeps its own, with the addresses of processes that are gone in it."
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {**alone(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2",
           "TORCHELASTIC_USE_AGENT_STORE": "True"}
    two = [subprocess.Popen([sys.executable, "tests/ranks/again.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            env={**env, "RANK": str(r)}) for r in range(2)]
    try: assert [json.loads(p.communicate(timeout=120)[0]) for p in two] == [[3] * 12] * 2
    finally:
        for p in two: p.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "flag").touch()
    done = torchrun(folder / "flag", "kill", "search", *TINY, "--out", folder / "run", "--json")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_killed_process_costs_no_bit(undisturbed, tmp_path):
    out = tmp_path / "run"
    search = "search", *TINY, "--requeue", "--out", out, "--save-every", 0.3
    done = torchrun(tmp_path / "flag", "kill", *search, "--json", restarts=1)
    assert done.returncode == 0 and (tmp_path / "flag").exists(), done.stderr
    assert "Traceback" not in done.stderr.split("mgdarts: another process of this run has ended")[0]
    assert content(out) == content(undisturbed)
    record = json.loads((out / "config.json").read_text())
    assert record["environment"]["processes"] == 2 and record["environment"]["norms"] == "of all"


def test_a_signal_to_one_of_them_stops_all_and_another_number_is_refused(undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    done = torchrun(tmp_path / "flag", "signal", "search", *TINY, "--requeue", "--out", out)
    assert done.returncode and "stopped by SIGUSR1; the state is saved" in done.stderr, done.stderr
    assert main(["search", "--resume", "--out", str(out), "--json"]) == 2
    said = capsys.readouterr().err
    assert "2 processes, and here is 1 process" in said and said.count("\n") == 1
    done = torchrun(tmp_path / "flag", "signal", "search", *TINY, "--requeue", "--out", out)
    assert done.returncode == 0 and content(out) == content(undisturbed), done.stderr


def test_other_decisions_end_the_run(tmp_path):
    done = torchrun(tmp_path / "flag", "differ", "search", *TINY, "--out", tmp_path / "run")
    assert done.returncode and "decided differently at the epoch of epoch 3" in done.stderr, done.stderr


def test_norms_of_each_process_resume_exactly_and_go_on_with_another_number_when_asked(tmp_path):
    own, cut = ("search", *TINY, "--set", "compute.sync_norms=false", "--requeue", "--out"), tmp_path / "cut"
    (tmp_path / "flag").touch()
    whole = torchrun(tmp_path / "flag", "signal", *own, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    done = torchrun(tmp_path / "second", "signal", *own, cut, "--save-every", 0.2)
    assert "stopped by SIGUSR1" in done.stderr
    shutil.copytree(cut, tmp_path / "one")
    done = torchrun(tmp_path / "second", "signal", *own, cut)
    assert done.returncode == 0 and content(cut) == content(tmp_path / "whole"), done.stderr
    with pytest.warns(UserWarning, match="processes 2, now 1"):
        assert main(["search", "--resume", "--elastic", "--out", str(tmp_path / "one"), "--json"]) == 0
    parts = json.loads((tmp_path / "one/config.json").read_text())["parts"]
    assert [p["environment"]["processes"] for p in parts] == [1]


def test_shares_of_a_batch_are_the_batch(monkeypatch):
    cfg = preset("smoke", **{"data.autoaugment": True, "data.size": 16, "data.subset": 120})
    whole = make_search(cfg).loaders["train"].batch(1, 0)
    parts = []
    for r in range(2):
        monkeypatch.setattr(HERE, "rank", r)
        monkeypatch.setattr(HERE, "size", 2)
        loader = make_search(cfg).loaders["train"]
        assert all(torch.equal(a, b) for a, b in zip(whole_batch(loader, 1, 0), whole))
        parts.append(loader.batch(1, 0))
    for a, *b in zip(whole, *parts): assert torch.equal(a, torch.cat(b))
    assert isinstance(loader.drawn(1, 0), Drawn) and len(parts[0][1]) * 2 == len(whole[1])
    monkeypatch.setattr(HERE, "size", 7)
    with pytest.raises(InputError, match="64 images a step cannot be shared equally by 7 processes"):
        make_search(cfg)
