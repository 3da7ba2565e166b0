"The script that measures a card, at toy size on a CPU, and the runs that are made elsewhere and brought home."
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
from card import jobs as card_jobs
from card import layouts
from mgdarts.base.data import load_data
from mgdarts.base.options import InputError, from_dict
from mgdarts.paper.arms import Arm, job
from mgdarts.paper.measure import measure


def failures(record):
    parts = record["parts"].items()
    return ({name: r for name, p in parts for r in p["rows"] for k in r if k.endswith("error")}
            | {name: p["note"] for name, p in parts if "note" in p})


def script(*words, timeout):
    return subprocess.run([sys.executable, "tools/gpu.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout)


def test_every_part_measures_something(tmp_path, capsys):
    parts = ",".join(p for p in [*gpu.PARTS, "planned"] if not p.startswith("crowd"))
    gpu.main(["--device", "cpu", "--toy", "--inline", "--out", str(tmp_path), "--parts", parts])
    record = json.loads((tmp_path / "record.json").read_text())
    assert failures(record) == {} and all(p["rows"] for p in record["parts"].values()), capsys.readouterr().out
    rows = {n: p["rows"] for n, p in record["parts"].items()}
    assert [r["difference"] for r in rows["losses"]] == [0.0] * 6  # the device is the CPU
    assert all(r["error_relative"] < 1e-5 for r in rows["layouts"])
    assert all(r["same_bits"] for r in rows["bits"]) and rows["bits"][1]["resume_equal"]
    assert all(r["ms"] > 0 for n in ("steps", "layouts", "real", "retraining") for r in rows[n])
    assert rows["whole"][0]["finished"] and (tmp_path / "fig08.html").exists()
    assert (tmp_path / "whole/result.json").exists() and not (tmp_path / "whole/checkpoint").exists()


def test_parts_in_processes_of_their_own_have_a_time_limit(tmp_path):
    out = script("--device", "cpu", "--toy", "--out", tmp_path, "--parts", "crowd,planned", timeout=120)
    record = json.loads((tmp_path / "record.json").read_text())
    assert out.returncode == 0 and failures(record) == {}, out.stdout + out.stderr
    assert list(record["parts"]) == ["crowd", "planned"]
    crowd, planned = (record["parts"][name]["rows"][0] for name in ("crowd", "planned"))
    assert crowd["ms"] > 0 and planned["planned_native_mib"] > 0
    args = type("Args", (), {"device": "cpu", "toy": True, "inline": False, "out": str(tmp_path), "images": ""})
    with open(tmp_path / "log", "w") as log: found = gpu.measured("no such part", args, tmp_path, log, 30)
    assert "code 1" in found["note"] and found["rows"] == []
    with open(tmp_path / "log", "w") as log: found = gpu.measured("losses", args, tmp_path, log, -11.5)
    assert "too long" in found["note"] and found["seconds"] < 10


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_all_ways_to_mix_channels_are_the_same(copies, interleaved):
    C, x = 3, torch.randn(2, 24, 4, 4)
    w = torch.randn(8, C, C)
    want = layouts.grouped(x, w, False)
    straight = torch.arange(24)
    turned = straight.view(2, 4, C).transpose(1, 2).flatten()
    order = turned if interleaved else straight
    for fmt in (torch.contiguous_format, torch.channels_last):
        u = x[:, order].contiguous(memory_format=fmt)
        torch.testing.assert_close(layouts.blocked(u, w, interleaved), want)
        if not interleaved: torch.testing.assert_close(layouts.batched(u, w, False), want)
    depth = torch.randn(24, 1, 3, 3)
    maps = x[:, :6] if copies == 4 else x
    want = layouts.repeated(maps, depth, 2, copies)[:, turned if copies == 4 else straight]
    torch.testing.assert_close(layouts.multiplied(maps, depth, 2, copies), want)


def test_runs_made_elsewhere_are_found_finished(tmp_path):
    tiny = {"data.subset": 100, "data.test_subset": 100, "search.max_epochs": 2, "search.warmup": 1, "train.epochs": 1}
    jobs = [job(Arm("a"), "smoke", 3, **tiny), job(Arm("b", random=True), "smoke", 3, **tiny),
            job(Arm("long"), "smoke", 4, **{**tiny, "train.epochs": 100_000})]
    (tmp_path / "jobs.json").write_text(json.dumps([vars(j) for j in jobs]))
    gpu.main(["pack", str(tmp_path / "jobs.json"), "--out", str(tmp_path / "images")])
    images = card_jobs.Packed(tmp_path / "images")
    for j in jobs:  # the very images, whatever made them
        cfg = from_dict(j.search)
        here, packed = load_data(cfg.data, cfg.seed), images(cfg.data, cfg.seed)
        assert (here.fingerprint, here.origin) == (packed.fingerprint, packed.origin)
        for part in card_jobs.PARTS: assert torch.equal(getattr(here, part).images, getattr(packed, part).images)
    with pytest.raises(InputError, match="no images"): images(cfg.data, 5)
    with pytest.raises(InputError, match="no images"):  # a run takes its images from the pack, and nowhere else
        card_jobs.work(job(Arm("a"), "smoke", 5, **tiny), tmp_path / "other", str(tmp_path / "images"), "")
    runs, packs = tmp_path / "out/runs", tmp_path / "out"
    long = jobs[2].training(runs)

    def up():  # the time is up when the long one has begun
        events = long / "events.jsonl"
        while not (events.exists() and events.stat().st_size and jobs[1].finished(runs)): time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGALRM)

    threading.Thread(target=up, daemon=True).start()
    said = card_jobs.run(jobs, runs, str(tmp_path / "images"), 2, 300, "c" * 40)
    assert said["finished"] == 2 and said["time_is_up"] and said["failed"] == []
    packed = script("jobs", tmp_path / "jobs.json", "--out", packs, "--images", tmp_path / "images", "--device", "cpu",
                    "--limit", "0.1", timeout=150)
    found = json.loads((packs / "jobs.json").read_text())
    assert (found["finished"], found["runs"], found["left_out"]) == (2, 2, []), packed.stdout + packed.stderr
    home, archives = tmp_path / "home", list(packs.glob("*.tar.gz"))
    gpu.main(["unpack", *map(str, archives), "--runs", str(home)])
    assert [j.finished(home) for j in jobs] == [True, True, False]
    rows = [measure(j, home) for j in jobs[:2]]
    assert rows[0]["acc"] > 0 and rows[1]["label"] == "b" and rows[0]["environment"]["commit"] == "c" * 40
    assert not list(jobs[0].run(home).rglob("checkpoint"))
    assert any((jobs[2].training(home) / "checkpoint").iterdir())  # saved when it was stopped
    assert card_jobs.unpack(archives, home) == []
