"The view-model against independent counts, the stepper against plain runs, the panels without a browser."
import copy
import json
import os
import subprocess
import sys
import time

import nbformat
import papermill
import pytest
import torch

from mgdarts.runs.make import make_search
from mgdarts.base.events import Event
from mgdarts.base.files import Checkpoints
from mgdarts.net import files as architecture
from mgdarts.runs.listen import read_events
from mgdarts.runs.make import bare_search
from mgdarts.runs import run as runs
from mgdarts.base.options import InputError
from mgdarts.methods.registry import preset
from mgdarts.views.inspector import View, WhatIf, accuracy, distribution, fixed_ratio, pruned, some_images
from mgdarts.views.branch import branch
from mgdarts.runs.memory import step_memory
from mgdarts.search.prune import commit
from mgdarts.views.replay import replay
from mgdarts.base.events import evaluate
from mgdarts.space.darts import EDGES, OPS, is_conv
from mgdarts.space.space import GRANULARITIES
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAST = {"data.subset": 200, "search.warmup": 1, "search.max_epochs": 2, "train.epochs": 2, "search.batch": 32}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def search():
    s = make_search(preset("smoke", **FAST))
    s.run("stage")
    s.run("stage")
    while s.warmup or s.phase_epoch < 2:
        s.run("epoch")
    s.step()
    return s


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_of):
    return run_of(tmp_path_factory.mktemp("runs") / "demo", **FAST)


def test_questions_leave_the_search_as_it_was(search):
    before = copy.deepcopy(search.state_dict())
    grad = search.net.alpha.grad.clone()
    view = View(search)
    w = WhatIf(view)
    w.move("operation", "all", 0.5)
    w.move("filter", "sep_conv_3x3", 0.6)
    w.move("weight", (0, 0, 1), 0.01)
    result = w.outcome()
    images = some_images(search.loaders["val"])
    accuracy(view, result.masks, images)
    fixed_ratio(view, result.count.params)
    for g in GRANULARITIES:
        distribution(w, g)
    pruned(view, result.masks).alpha.data.zero_()
    assert same(before, search.state_dict()) and torch.equal(grad, search.net.alpha.grad)


def test_a_view_stays_when_the_search_goes_on(search):
    other = make_search(preset("smoke", **FAST))
    other.load_state_dict(search.state_dict())
    view = View(other)
    params, strength = view.count.params, view.strength.clone()
    other.run("commit")
    assert torch.equal(view.strength, strength) and view.net.count().params == params
    assert not torch.equal(torch.sigmoid(other.net.alpha[: len(strength)]), strength)


@pytest.mark.parametrize("granularity, which, to", [("operation", "all", 0.52), ("operation", (0, 1, 2), 0.9), ("filter", "all", 0.55), ("filter", "dil_conv_5x5", 0.7), ("weight", "all", 0.05), ("weight", "sep_conv_5x5", 0.02)])
def test_an_outcome_is_what_a_commit_does(search, granularity, which, to):
    w = WhatIf(View(search))
    w.move(granularity, which, to)
    result = w.outcome()
    other = make_search(preset("smoke", **FAST))
    other.load_state_dict(search.state_dict())
    with torch.no_grad():
        for k, v in w.thresholds().items():
            getattr(other.net, k).copy_(v)
    done = commit(other.net, 0.0, other.optimizer, 99)
    assert done.after.summary() == result.count.summary()
    # and its accuracy is that of the masked net, with nothing taken out
    images = some_images(search.loaders["val"])
    masked = View(search).net
    with torch.no_grad():
        for k, v in w.thresholds().items():
            getattr(masked, k).copy_(v)
    assert accuracy(w.view, result.masks, images) == evaluate([masked], images)[0][0]


def test_moving_thresholds(search):
    w = WhatIf(View(search))
    learned = {k: v.clone() for k, v in w.view.thresholds.items()}
    w.move("operation", "sep_conv_3x3", 0.8)
    now = w.thresholds()["t_alpha"]
    live = w.view.live
    o = OPS.index("sep_conv_3x3")
    d = (now - learned["t_alpha"])[: len(live)]
    assert d[..., o][live[..., o]].std() < 1e-6 and not d[..., :o].any() and not d[..., o + 1:].any()
    assert w.value("operation", "sep_conv_3x3") == pytest.approx(0.8)
    w.move("operation", "sep_conv_3x3", 0.0)
    assert w.value("operation", "sep_conv_3x3") < 1e-5 and (w.thresholds()["t_alpha"] >= 0).all()
    w.reset()
    assert not w.moved and same(learned, w.thresholds())
    for bad in (float("nan"), -1, "x", None):
        with pytest.raises(InputError):
            w.move("operation", "all", bad)
    for bad in ("kernels", "sep"):
        with pytest.raises(InputError):
            w.scope("operation" if bad == "sep" else bad, bad)
    with pytest.raises(InputError, match="no operation"):
        w.scope("operation", (99, 0, 0))


def test_distributions_hold_every_unit(search):
    w = WhatIf(View(search))
    n = w.view.count
    for g, i in (("filter", 0), ("weight", 2)):
        types = [distribution(w, g, o) for o in OPS if is_conv(OPS.index(o))]
        assert sum(sum(d.kept) + sum(d.going) for d in types if d) == sum(r[i] for c in n.cells for r in c.by_op.values())
    gone = distribution(w, "operation")
    assert sum(gone.going) == n.ops - w.view.after.ops and sum(gone.kept) == w.view.after.ops
    assert distribution(w, "weight", (0, 0, 0)) is None


def test_fixed_ratios(search):
    view = View(search)
    share, o = fixed_ratio(view, int(view.count.params * 0.7))
    assert 0 < share < 1 and view.count.params * 0.66 < o.count.params <= view.count.params * 0.7
    # one share everywhere: of every gate the same, as far as it divides
    for cell, keep in zip(view.net.cells, o.masks["gates"]):
        for (gate, _), k in zip(cell.layout.gates, keep.split(cell.gate_n.tolist())):
            if gate.learned:
                assert int((~k).sum()) == min(int(share * len(k) + 1e-9), len(k) - 1)


@pytest.mark.parametrize("cells, live", [(3, 1.0), (3, 0.4)])
def test_memory_estimate(cells, live):
    from mgdarts.runs.memory import prune_to
    from mgdarts.search.stages import open_stage
    s = make_search(preset("smoke", **FAST, **{"space.channels": 12, "space.cells": cells, "data.size": 16, "search.stages": 1}))
    open_stage(s)
    prune_to(s.net, live, torch.Generator().manual_seed(0))
    view = View(s)
    exact = step_memory(s.net, s.cfg, view.batch, real=True).peak_bytes
    assert exact * 0.7 < view.now.memory < exact * 1.4, view.now.memory / exact


def test_a_branch_is_a_run_like_any_other(finished, tmp_path):
    class Enough(Exception):
        pass

    def stop(e):
        if e.epoch == 3:
            raise Enough

    cfg, a = preset("smoke", **FAST), tmp_path / "a"
    def prepare(s):
        s.events.listen(lambda e: s.events.emit(Event("save", 0, 0, "")), "rest")

    with pytest.raises(Enough):
        runs.search(cfg, a, listeners=(stop,), prepare=prepare)
    bare, state = bare_search(a), Checkpoints(a / "checkpoint").load()
    w = WhatIf(View(bare))
    files = {p: p.read_bytes() for p in a.rglob("*") if p.is_file()}
    w.move("operation", "all", 0.5)
    out = branch(a, state, w, tmp_path / "b")
    assert files == {p: p.read_bytes() for p in a.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="exists"):
        branch(a, state, w, out)
    result = runs.search(None, out, resume=True)
    events = read_events(out / "events.jsonl")
    assert events[-1]["type"] == "done" and result["params"] == events[-1]["params"] and len({(e["type"], e["step"], e["stage"], json.dumps(e)) for e in events}) == len(events)
    assert json.loads((out / "config.json").read_text())["branch"]["run"] == "a" and not replay(out).missing
    with pytest.raises(InputError, match="finished"):
        branch(finished, bare_search(finished).state_dict(), w, tmp_path / "c")
    assert not (tmp_path / "c").exists()


# ---- with widgets
workbench = pytest.importorskip("mgdarts.views.workbench", reason="the lab requirements are not installed")


def until(ready, seconds=300):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_that_was_clicked_through_leaves_the_same_bits(finished, tmp_path):
    s = workbench.Stepper(workbench.on_new(preset("smoke", **FAST), tmp_path / "clicked"))
    until(lambda: s.search is not None)
    assert s.wait() == "paused" and s.search.steps == 0
    s.step(3)
    s.wait()
    s.run("commit")
    s.wait()
    assert s.events[-1]["type"] == "commit"
    s.ask(lambda search: View(search)).result()
    s.ask(lambda search: s.save()).result()
    s.stop()
    assert s.state == "stopped"
    s.close()
    t = workbench.Stepper(workbench.on_run(tmp_path / "clicked"))
    until(lambda: t.search is not None)
    t.wait()
    t.run("stage")
    t.wait()
    t.run()
    until(lambda: t.state == "finished")
    t.close()
    strip = lambda p: [{k: v for k, v in e.items() if k != "time"} for e in read_events(p / "events.jsonl")]
    assert strip(tmp_path / "clicked") == strip(finished)
    assert architecture.load(tmp_path / "clicked").cells == architecture.load(finished).cells
    assert (tmp_path / "clicked/masks.safetensors").read_bytes() == (finished / "masks.safetensors").read_bytes()
    assert t.events == [{k: v for k, v in e.items() if k != "time"} for e in t.events] or len(t.events) == len(strip(finished))


def test_a_run_belongs_to_one(tmp_path):
    s = workbench.Stepper(workbench.on_new(preset("smoke", **FAST), tmp_path / "run"))
    until(lambda: s.search is not None)
    s.step(2)
    s.wait()
    s.ask(lambda search: s.save()).result()
    t = workbench.Stepper(workbench.on_run(tmp_path / "run"))
    until(lambda: t.search is not None)
    t.run()
    until(lambda: t.state == "failed")
    assert "another process" in workbench.status_line(t)[1]
    t.close()
    s.close()


def test_the_workbench(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("MGDARTS_ROOT", str(tmp_path))
    bench = workbench.Workbench(finished, interactive=True)
    try:
        until(lambda: bench.view is not None and bench.live.cell.svg)
        assert bench.deck.state["word"] == "finished" and bench.can() == ("pictures",)
        bench.do("pictures")
        until(lambda: any("pictures are in" in t for t in bench.said))
        assert {"progress.html", "cells.svg", "cell-0.svg"} <= {p.name for p in (finished / "pictures").iterdir()}
        assert len(bench.stepper.history) == len({e["epoch"] for e in bench.stepper.events if e["type"] == "epoch"}) and "dashed" in bench.live.history.svg
        assert len(bench.live.plot.fig.data) > 10 and bench.live.overview.svg.count('class="cell"') == 3
        bench.tabs.selected_index = 1
        until(lambda: bench.thresholds.table.value)
        bench.thresholds.fields["filter"].value = 0.8
        until(lambda: bench.whatif.value("filter") == pytest.approx(0.8))
        bench.thresholds.scope.value = "selected"
        until(lambda: bench.thresholds.pics["weight"].svg)
        bench.accuracy()
        until(lambda: getattr(bench, "answer", None))
        assert 0 <= bench.answer["whatif"] <= 100
        bench.tabs.selected_index = bench.tabs.titles.index("Replay")
        until(lambda: bench.replay.rep is not None and len(bench.replay.plot.fig.data) > 10)
        frames = bench.replay.rep.frames
        bench.replay.slider.value = 3
        until(lambda: bench.replay.drawn and bench.replay.drawn[1] == 3)
        assert bench.replay.slider.labels[3] == frames[3].label and bench.replay.plot.fig.layout.title.text.startswith(frames[3].stage)
        bench.tabs.selected_index = bench.tabs.titles.index("Compare")
        until(lambda: bench.compare.drawn == ["demo"])
        assert bench.compare.table.rows[0][0] == "demo" and len(bench.compare.curves.fig.data) == 3 and not bench.compare.difference.fig.data
        bench.start(preset("smoke", **FAST), tmp_path / "live")
        until(lambda: bench.stepper.search is not None and bench.stepper.search.steps > 2)
        bench.do("pause")
        until(lambda: bench.deck.state["word"] == "paused")
        steps = bench.stepper.search.steps
        for _ in range(2):  # the page says again what it takes for lost
            bench._message(bench.deck, {"do": "step", "n": 7.0})
        until(lambda: bench.stepper.search.steps == steps + 1)
        assert bench.deck.heard == 7 and bench.stepper.state == "paused"
        bench.do("checkpoint")
        until(lambda: any("state saved" in t for t in bench.said))
        again = workbench.Workbench(finished, interactive=True)  # the cell is run again, the live search is taken over
        assert again.stepper.folder == tmp_path / "live" and again.stepper.search.steps == steps + 1
        bench = again
        bench.do("stop")
        until(lambda: bench.stepper.state == "stopped")
        assert Checkpoints(tmp_path / "live/checkpoint").load()["counters"]["steps"] == steps + 1
        bench.do("step")
        until(lambda: bench.stepper.search is not None and bench.stepper.search.steps == steps + 2)
        until(lambda: bench.view is not None)
        assert len(bench.stills()) == 6
    finally:
        bench.close()


def test_bad_input_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="run folder"):
        workbench.Workbench(tmp_path / "nowhere", interactive=True)
    bench = workbench.Workbench(interactive=True)
    try:
        assert bench.deck.state["word"] == "nothing open"
        bench.new.settings.value = "chanels=4"
        bench.new.start()
        assert "chanels" in bench.said[-1]
        bench.branch()
        assert "run folder" in bench.said[-1]
    finally:
        bench.close()


def test_a_failed_search_says_why(tmp_path):
    s = workbench.Stepper(workbench.on_new(preset("smoke", **FAST), tmp_path / "run"))
    until(lambda: s.search is not None)
    s.wait()
    s.search.events.listen(lambda e: 1 / 0, "forward")
    s.run()
    until(lambda: s.state == "failed")
    assert "ZeroDivisionError" in workbench.status_line(s)[1] and "in optimise" in s.trace
    with pytest.raises(ZeroDivisionError):
        s.wait()
    s.close()


def test_the_core_needs_no_widgets():
    code = "import sys; sys.modules['ipywidgets'] = sys.modules['anywidget'] = None; import mgdarts.views.inspector, mgdarts.runs.run, mgdarts.cli.main, mgdarts.views.pictures"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_headless_it_is_a_small_still(finished, tmp_path, here):
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(ROOT / "nbs/start/workbench.ipynb", out, {"folder": str(finished)}, kernel_name="python3", progress_bar=False, cwd=ROOT / "nbs")
    nb = nbformat.read(out, 4)
    shown = [o.get("data", {}) for c in nb.cells for o in c.get("outputs", [])]
    assert sum("application/vnd.plotly.v1+json" in d for d in shown) == 1 and sum("image/svg+xml" in d for d in shown) == 5
    assert os.path.getsize(out) < 1_000_000 and "widgets" not in nb.metadata
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="InputError"):
        papermill.execute_notebook(ROOT / "nbs/start/workbench.ipynb", out, {"foldr": "x"}, kernel_name="python3", progress_bar=False, cwd=ROOT / "nbs")
