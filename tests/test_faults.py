"Runs are killed, stopped, starved and fed damaged files; each goes on to the same bits, or says why not in one line."
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from faults.inputs import Row, refuse
from faults.process import FAST, OFTEN, SETS
from faults.rot import Kind, rot

from mgdarts.base.files import Checkpoints, pack_state, read_json, unpack_state, write_json
from mgdarts.base.locks import lock
from mgdarts.base.options import InputError
from mgdarts.cli.main import main
from mgdarts.methods.registry import preset
from mgdarts.runs import run as runs
from mgdarts.runs.listen import read_events
from mgdarts.space.darts import NetSpec


def searched(run):
    "What a search leaves behind that must not depend on interruptions."
    events = [{k: v for k, v in e.items() if k != "time"} for e in read_events(run / "events.jsonl")]
    net = {k: v.numpy().tobytes() for k, v in Checkpoints(run / "checkpoint").load()["net"].items()}
    return events, net, (run / "architecture.json").read_bytes(), (run / "masks.safetensors").read_bytes()


def said(capsys):
    "The lines that are for the user."
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("mgdarts: ")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "whole"
    runs.search(preset("smoke", **FAST), out)
    return out


def test_some_of_the_fault_suite(tmp_path, here):
    "Kills, failing system calls, rotten files and wrong inputs, through the notebook; `make faults` does more of each."
    notebook = Path(__file__).resolve().parent.parent / "nbs/runs/fault_suite.ipynb"
    some = {"out": str(tmp_path), "kills": 2, "failures": 3, "places": 6}
    papermill.execute_notebook(notebook, tmp_path / "out.ipynb", some, kernel_name="python3", progress_bar=False)
    record = read_json(tmp_path / "record.json", "a record of faults")
    assert record["lost"] == [] and record["kills"] >= 2 and record["kinds_of_files"] >= 10
    assert len(record["inputs"]) >= 80
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    shown = "".join(str(o.get("data", {}).get("text/markdown", "")) for o in outputs)
    assert "| wrong input |" in shown and "did you mean" in shown


def test_the_suite_notices_what_is_lost(tmp_path):
    "A reader that overlooks damage is found out."
    file = tmp_path / "a.json"
    write_json(file, {"accuracy": 91.25})
    assert rot("json", Kind(file, lambda: read_json(file, "it")), 20)[2] == []
    file.write_text('{"accuracy": 91.25}')
    assert rot("json", Kind(file, file.read_bytes), 20)[2]
    assert refuse(Row("fine", ["count"], "never"), tmp_path)[1]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_the_run(whole, tmp_path, number, code):
    order = ["search", "--preset", "smoke", *SETS, *OFTEN, "--out", str(tmp_path / "run")]
    p = subprocess.Popen([sys.executable, "-m", "mgdarts", *order], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
    for _ in range(600):
        if (tmp_path / "run/checkpoint").exists():
            break
        time.sleep(0.05)
    p.send_signal(number)
    _, err = p.communicate()
    lines = [line for line in err.splitlines() if line.startswith("mgdarts: ")]
    assert p.returncode == code and len(lines) == 1 and "--resume" in lines[0], (p.returncode, err)
    runs.search(None, tmp_path / "run", resume=True)
    assert searched(tmp_path / "run") == searched(whole)


def test_a_state_is_saved_as_often_as_is_asked(tmp_path):
    saved, cfg = [], preset("smoke", **FAST)

    def count(search):
        search.events.listen(lambda e: saved.append(len(Checkpoints(tmp_path / "run/checkpoint").files())), "rest")

    runs.search(cfg, tmp_path / "run", prepare=count, save_every=0)
    assert saved[:4] == [0, 1, 2, 2]  # those who listened first see what the saver has done after the step before


def test_a_folder_belongs_to_one_process(whole, tmp_path, capsys):
    with lock(tmp_path):
        (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
        assert main(["search", "--resume", "--out", str(tmp_path)]) == 2
    assert "another process" in capsys.readouterr().err


WILD = ["lr_weights=10", "search.clip=1e30", "lr_arch=100", "search.momentum=0.999"]


def test_the_first_tensor_that_goes_bad_is_named(tmp_path, capsys):
    every = [f"{k}={v}" for k, v in (FAST | {"rules.ops": ",".join(NetSpec.ops)}).items()]
    sets = [x for s in (*every, *WILD) for x in ("--set", s)]
    code = main(["search", "--preset", "smoke", *sets, "--out", str(tmp_path / "run")])
    (line,) = said(capsys)
    assert code == 1 and "epoch" in line and "step" in line and any(w in line for w in ("gradient", "loss", "cells."))
    state = Checkpoints(tmp_path / "run/checkpoint").load()
    assert all(v.isfinite().all() for v in state["net"].values() if v.is_floating_point())  # the state before it


def test_out_of_memory_says_what_is_needed(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.optim.SGD, "step", full)
    assert main(["search", "--preset", "smoke", *SETS, "--out", str(tmp_path / "run")]) == 1
    (line,) = said(capsys)
    assert "GB" in line and "search.batch" in line


def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path)
    kept.save({"i": 1})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        kept.save({"i": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["state-00000000.pt"] and kept.load() == {"i": 1}


def test_no_damage_to_a_state_goes_unnoticed():
    state = {"net": {"w": torch.arange(50.0)}, "n": 3}
    content, r = pack_state(state), random.Random(0)
    for _ in range(200):
        at = r.randrange(len(content))
        for bad in (content[:at], content[:at] + bytes([content[at] ^ (1 << r.randrange(8))]) + content[at + 1:]):
            try:
                found = unpack_state(bad)
            except (ValueError, InputError):
                continue
            # nothing but the version's number is not summed
            assert found["n"] == 3 and torch.equal(found["net"]["w"], state["net"]["w"])


def test_a_state_from_the_future_and_one_that_would_run_code_are_refused(tmp_path):
    later = pack_state({"a": 1}).replace(b"mgdarts-state 1 ", b"mgdarts-state 2 ", 1)
    with pytest.raises(InputError, match="version 2"):
        unpack_state(later)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    with pytest.raises(Exception):
        unpack_state(pack_state({"a": Evil()}))
    assert not (tmp_path / "hacked").exists()


def test_when_no_state_is_whole_the_run_is_not_started_anew(tmp_path):
    (tmp_path / "state-00000000.pt").write_bytes(b"garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="new run"):
            Checkpoints(tmp_path).load()


def test_the_same_configuration_gives_the_same_architecture_file(whole, tmp_path):
    runs.search(preset("smoke", **FAST), tmp_path / "elsewhere")
    for name in ("architecture.json", "masks.safetensors"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (whole / name).read_bytes()
    env = json.loads((whole / "config.json").read_text())["environment"]
    assert {"torch", "device", "threads", "cpu_capability", "commit"} <= set(env)
