"The script that measures a card, at toy size on a CPU, and the runs that are made on another machine and brought home: they must not rot."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import gpu
import gpu_jobs
import gpu_layouts
from mgdarts.paper.arms import Arm, job
from mgdarts.base.options import InputError, from_dict
from mgdarts.base.data import load_data
from mgdarts.paper.measure import measure


def failures(record): return {n: r for n, p in record["parts"].items() for r in p["rows"] for k in r if k.endswith("error")} | {n: p["note"] for n, p in record["parts"].items() if "note" in p}


def test_every_part_measures_something(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--toy", "--inline", "--out", str(tmp_path), "--parts", ",".join(p for p in [*gpu.PARTS, "planned"] if not p.startswith("crowd"))])
    record = json.loads((tmp_path / "record.json").read_text())
    assert failures(record) == {} and all(p["rows"] for p in record["parts"].values()), capsys.readouterr().out
    rows = {n: p["rows"] for n, p in record["parts"].items()}
    assert [r["difference"] for r in rows["losses"]] == [0.0] * 6  # the device is the CPU
    assert all(r["error_relative"] < 1e-5 for r in rows["layouts"])
    assert all(r["same_bits"] for r in rows["bits"]) and rows["bits"][1]["resume_equal"]
    assert all(r["ms"] > 0 for n in ("steps", "layouts", "real", "retraining") for r in rows[n])


def test_parts_in_processes_of_their_own_have_a_time_limit(tmp_path):
    out = subprocess.run([sys.executable, "tools/gpu.py", "--device", "cpu", "--toy", "--out", str(tmp_path), "--parts", "crowd,planned"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    record = json.loads((tmp_path / "record.json").read_text())
    assert out.returncode == 0 and failures(record) == {} and list(record["parts"]) == ["crowd", "planned"], out.stdout + out.stderr
    assert record["parts"]["crowd"]["rows"][0]["ms"] > 0 and record["parts"]["planned"]["rows"][0]["planned_native_mib"] > 0
    args = type("Args", (), {"device": "cpu", "toy": True, "inline": False})
    with open(tmp_path / "log", "w") as log: found = gpu.measured("no such part", args, tmp_path, log, 30)
    assert "code 1" in found["note"] and found["rows"] == []
    with open(tmp_path / "log", "w") as log: found = gpu.measured("losses", args, tmp_path, log, -11.5)
    assert "too long" in found["note"] and found["seconds"] < 10


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_all_ways_to_mix_channels_are_the_same(copies, interleaved):
    C, x = 3, torch.randn(2, 24, 4, 4)
    w = torch.randn(8, C, C)
    want = gpu_layouts.grouped(x, w, False)
    order = torch.arange(24).view(2, 4, C).transpose(1, 2).flatten() if interleaved else torch.arange(24)
    for fmt in (torch.contiguous_format, torch.channels_last):
        u = x[:, order].contiguous(memory_format=fmt)
        torch.testing.assert_close(gpu_layouts.blocked(u, w, interleaved), want)
        if not interleaved: torch.testing.assert_close(gpu_layouts.batched(u, w, False), want)
    depth = torch.randn(24, 1, 3, 3)
    maps = x[:, :6] if copies == 4 else x
    y = gpu_layouts.multiplied(maps, depth, 2, copies)
    torch.testing.assert_close(y, gpu_layouts.repeated(maps, depth, 2, copies)[:, torch.arange(24).view(2, 4, C).transpose(1, 2).flatten() if copies == 4 else slice(None)])


def test_runs_made_elsewhere_are_found_finished(tmp_path):
    tiny = {"data.subset": 100, "data.test_subset": 100, "search.max_epochs": 2, "search.warmup": 1, "train.epochs": 1}
    jobs = [job(Arm("a"), "smoke", 3, **tiny), job(Arm("b", random=True), "smoke", 3, **tiny), job(Arm("long"), "smoke", 4, **{**tiny, "train.epochs": 100_000})]
    (tmp_path / "jobs.json").write_text(json.dumps([vars(j) for j in jobs]))
    gpu.main(["pack", str(tmp_path / "jobs.json"), "--out", str(tmp_path / "images")])
    images = gpu_jobs.Packed(tmp_path / "images")
    for j in jobs:  # the very images, whatever made them
        cfg = from_dict(j.search)
        here, packed = load_data(cfg.data, cfg.seed), images(cfg.data, cfg.seed)
        assert here.fingerprint == packed.fingerprint and all(torch.equal(getattr(here, p).images, getattr(packed, p).images) for p in ("train", "val", "test"))
    with pytest.raises(InputError, match="no images"): images(cfg.data, 5)
    long = jobs[2].training(tmp_path / "out/runs")

    def up():  # the time is up when the long one has begun
        while not ((long / "events.jsonl").exists() and (long / "events.jsonl").stat().st_size) or not jobs[1].finished(tmp_path / "out/runs"): time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGALRM)

    threading.Thread(target=up, daemon=True).start()
    said = gpu_jobs.run(jobs, tmp_path / "out/runs", str(tmp_path / "images"), 2, 300, "c" * 40)
    assert said["finished"] == 2 and said["time_is_up"] and said["failed"] == []
    packed = subprocess.run([sys.executable, "tools/gpu.py", "jobs", str(tmp_path / "jobs.json"), "--out", str(tmp_path / "out"), "--images", str(tmp_path / "images"), "--device", "cpu", "--limit", "0.1"], cwd=ROOT, capture_output=True, text=True, timeout=150)
    found = json.loads((tmp_path / "out/jobs.json").read_text())
    assert (found["finished"], found["runs"], found["left_out"]) == (2, 2, []), packed.stdout + packed.stderr
    gpu.main(["unpack", *map(str, (tmp_path / "out").glob("*.tar.gz")), "--runs", str(tmp_path / "home")])
    assert [j.finished(tmp_path / "home") for j in jobs] == [True, True, False]
    rows = [measure(j, tmp_path / "home") for j in jobs[:2]]
    assert rows[0]["acc"] > 0 and rows[1]["label"] == "b" and rows[0]["environment"]["commit"]
    assert not list(jobs[0].run(tmp_path / "home").rglob("checkpoint")) and any((jobs[2].training(tmp_path / "home") / "checkpoint").iterdir())  # saved when it was stopped
    assert gpu_jobs.unpack((tmp_path / "out").glob("*.tar.gz"), tmp_path / "home") == []
