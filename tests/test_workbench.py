"The view-model against independent counts, the stepper against plain runs, the panels without a browser: both spaces."
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
import torch

from mgdarts.base.events import Event, evaluate
from mgdarts.base.files import Checkpoints
from mgdarts.base.options import InputError
from mgdarts.methods.registry import preset
from mgdarts.net import files as architecture
from mgdarts.runs import run as runs
from mgdarts.runs.listen import read_events
from mgdarts.runs.make import bare_search, make_search
from mgdarts.runs.memory import prune_to, step_memory
from mgdarts.search.prune import commit
from mgdarts.search.stages import open_stage
from mgdarts.space.space import GRANULARITIES
from mgdarts.views.branch import branch
from mgdarts.views.inspector import (View, WhatIf, accuracy, distribution, fixed_ratio, place_of, pruned, scope,
                                     some_images)
from mgdarts.views.replay import replay

ROOT = Path(__file__).resolve().parent.parent
FAST = {"data.subset": 200, "search.warmup": 1, "search.max_epochs": 2, "train.epochs": 2, "search.batch": 32}
LASTING = {**FAST, "search.max_epochs": 100, "search.prune_every": 100}  # it does not end before it is paused
LONGER = {"search.max_epochs": 4}  # a search in its second stage that goes on
SPACES = ("darts", "mobilenet")


def settings(space="darts", **more): return preset("smoke", **{**FAST, "space.kind": space, **more})


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module", params=SPACES)
def search(request):
    s = make_search(settings(request.param, **LONGER))
    s.run("stage")
    s.run("stage")
    while s.warmup or s.phase_epoch < 2:
        s.run("epoch")
    s.step()
    return s


def like(search):
    "Another search in the same state."
    other = make_search(settings(search.spec.kind, **LONGER))
    other.load_state_dict(search.state_dict())
    return other


@pytest.fixture(scope="module", params=SPACES)
def finished(request, tmp_path_factory, run_of):
    more = {} if request.param == "darts" else {"space.kind": request.param}
    return run_of(tmp_path_factory.mktemp("runs") / f"demo-{request.param}", **FAST, **more)


def test_questions_leave_the_search_as_it_was(search):
    before = copy.deepcopy(search.state_dict())
    grad, ops = search.net.alpha.grad.clone(), search.spec.ops
    view = View(search)
    w = WhatIf(view)
    w.move("operation", "all", 0.5)
    w.move("filter", ops[1], 0.6)
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
    other = like(search)
    view = View(other)
    params, strength = view.count.params, view.strength.clone()
    other.run("commit")
    assert torch.equal(view.strength, strength) and view.net.count().params == params
    assert not torch.equal(torch.sigmoid(other.net.alpha[: len(strength)]), strength)


MOVES = [("operation", "all", 0.52), ("operation", (0, 0, 2), 0.9), ("filter", "all", 0.55), ("filter", 2, 0.7),
         ("weight", "all", 0.05), ("weight", 1, 0.02)]  # a number: that operation of the space


@pytest.mark.parametrize("granularity, which, to", MOVES)
def test_an_outcome_is_what_a_commit_does(search, granularity, which, to):
    w = WhatIf(View(search))
    w.move(granularity, search.spec.ops[which] if isinstance(which, int) else which, to)
    result, other, masked = w.outcome(), like(search), View(search).net
    for net in (other.net, masked):
        with torch.no_grad():
            for k, v in w.thresholds().items():
                getattr(net, k).copy_(v)
    done = commit(other.net, 0.0, other.optimizer, 99)
    assert done.after.summary() == result.count.summary()
    # and its accuracy is that of the masked net, with nothing taken out
    images = some_images(search.loaders["val"])
    assert accuracy(w.view, result.masks, images) == evaluate([masked], images)[0][0]


def test_moving_thresholds(search):
    w = WhatIf(View(search))
    learned = {k: v.clone() for k, v in w.view.thresholds.items()}
    live, o = w.view.live, 1
    name = search.spec.ops[o]
    w.move("operation", name, 0.8)
    d = (w.thresholds()["t_alpha"] - learned["t_alpha"])[: len(live)]
    assert d[..., o][live[..., o]].std() < 1e-6 and not d[..., :o].any() and not d[..., o + 1:].any()
    assert w.value("operation", name) == pytest.approx(0.8)
    w.move("operation", name, 0.0)
    assert w.value("operation", name) < 1e-5 and (w.thresholds()["t_alpha"] >= 0).all()
    w.reset()
    assert not w.moved and same(learned, w.thresholds())


def test_thresholds_that_there_are_not(search):
    w = WhatIf(View(search))
    for bad in (float("nan"), -1, "x", None):
        with pytest.raises(InputError):
            w.move("operation", "all", bad)
    for granularity, which in (("kernels", "all"), ("operation", "sep"), ("operation", (99, 0, 0))):
        with pytest.raises(InputError):
            scope(w.view, granularity, which)
    with pytest.raises(InputError, match="no operation"):
        scope(w.view, "operation", (0, 0, len(search.spec.ops)))


def test_distributions_hold_every_unit(search):
    w = WhatIf(View(search))
    n, after = w.view.count, w.view.next.count
    for g, i in (("filter", 0), ("weight", 2)):
        types = [distribution(w, g, o) for o, conv in zip(search.spec.ops, search.spec.convs) if conv]
        drawn = sum(sum(d.kept) + sum(d.going) for d in types if d)
        assert drawn == sum(r[i] for c in n.cells for r in c.by_op.values())
    ops = distribution(w, "operation")
    assert sum(ops.going) == n.ops - after.ops and sum(ops.kept) == after.ops
    if not search.spec.convs[0]:
        assert distribution(w, "weight", (0, 0, 0)) is None


def test_fixed_ratios(search):
    view = View(search)
    share, o = fixed_ratio(view, int(view.count.params * 0.7))
    assert 0 < share < 1 and view.count.params * 0.6 < o.count.params <= view.count.params * 0.7
    # one share everywhere: of every gate the same, as far as it divides
    for cell, keep in zip(view.net.cells, o.masks["gates"]):
        for (gate, _), k in zip(cell.layout.gates, keep.split(cell.gate_n.tolist())):
            if gate.learned:
                assert int((~k).sum()) == min(int(share * len(k) + 1e-9), len(k) - 1)


SIZES = {"darts": {"space.channels": 12}, "mobilenet": {"space.width": .5, "search.target_m": .45}}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("live", [1.0, 0.4])
def test_memory_estimate(space, live):
    more = {**SIZES[space], "space.cells": 3, "data.size": 16, "search.stages": 1}
    s = make_search(settings(space, **more))
    open_stage(s)
    prune_to(s.net, live, torch.Generator().manual_seed(0))
    view = View(s)
    exact = step_memory(s.net, s.cfg, view.batch, real=True).peak_bytes
    assert exact * 0.7 < view.now.memory < exact * 1.4, view.now.memory / exact


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("live", [1.0, 0.4])
def test_memory_estimate_of_a_gpu(space, amp, live):
    more = {**SIZES[space], "space.cells": 3, "data.size": 16, "search.stages": 1, "compute.amp": amp}
    s = make_search(settings(space, **more))
    open_stage(s)
    prune_to(s.net, live, torch.Generator().manual_seed(0))
    view = View(s)
    view.device = "cuda"
    exact = step_memory(s.net, s.cfg, view.batch, device="cuda").peak_bytes
    assert exact * 0.7 < view.now.memory < exact * 1.4, view.now.memory / exact


def test_operations_are_numbered_as_events_name_them(search):
    spec = search.spec
    for e, (a, b) in enumerate(spec.graph.edges):
        for o, name in enumerate(spec.ops):
            assert place_of(spec, (1, a, b, name)) == (1, e, o)


def test_a_branch_is_a_run_like_any_other(finished, tmp_path):
    class Enough(Exception):
        pass

    def stop(e):
        if e.epoch == 3:
            raise Enough

    cfg, a = settings(finished.name.removeprefix("demo-")), tmp_path / "a"

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
    assert events[-1]["type"] == "done" and result["params"] == events[-1]["params"]
    assert len({json.dumps(e) for e in events}) == len(events)
    assert json.loads((out / "config.json").read_text())["branch"]["run"] == "a" and not replay(out).missing
    with pytest.raises(InputError, match="finished"):
        branch(finished, bare_search(finished).state_dict(), w, tmp_path / "c")
    assert not (tmp_path / "c").exists()


# ---- with widgets
workbench = pytest.importorskip("mgdarts.views.workbench", reason="the lab requirements are not installed")
stepper = pytest.importorskip("mgdarts.views.stepper")
words = pytest.importorskip("mgdarts.views.words")


def until(ready, seconds=300):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def strip(folder):
    return [{k: v for k, v in e.items() if k != "time"} for e in read_events(folder / "events.jsonl")]


def test_a_run_that_was_clicked_through_leaves_the_same_bits(finished, tmp_path):
    out = tmp_path / "clicked"
    s = stepper.Stepper(stepper.on_new(settings(finished.name.removeprefix("demo-")), out))
    until(lambda: s.search is not None)
    assert s.wait() == "paused" and s.search.steps == 0
    s.step(3)
    s.wait()
    s.run("commit")
    s.wait()
    assert [e["type"] for e in s.diary.events].count("commit") == 1
    s.ask(lambda search: View(search)).result()
    s.ask(stepper.save).result()
    s.stop()
    assert s.state == "stopped"
    s.close()
    t = stepper.Stepper(stepper.on_run(out))
    until(lambda: t.search is not None)
    t.wait()
    t.run("stage")
    t.wait()
    t.run()
    until(lambda: t.state == "finished")
    t.close()
    assert strip(out) == strip(finished) and len(t.diary.events) == len(strip(finished))
    assert architecture.load(out).cells == architecture.load(finished).cells
    assert (out / "masks.safetensors").read_bytes() == (finished / "masks.safetensors").read_bytes()
    assert (out / "report.html").exists()


def test_a_run_belongs_to_one(tmp_path):
    s = stepper.Stepper(stepper.on_new(settings(), tmp_path / "run"))
    until(lambda: s.search is not None)
    s.step(2)
    s.wait()
    s.ask(stepper.save).result()
    t = stepper.Stepper(stepper.on_run(tmp_path / "run"))
    until(lambda: t.search is not None)
    t.run()
    until(lambda: t.state == "failed")
    assert "another process" in words.status_line(t)[1]
    t.close()
    s.close()


def look_around(bench, finished):
    "Everything that can be seen of a finished run."
    events, spec = bench.stepper.diary.events, bench.view.spec
    assert bench.deck.state["word"] == "finished" and bench.can() == ("pictures",)
    bench.do("pictures")
    until(lambda: any("pictures are in" in t for t in bench.said))
    assert {"progress.html", "cells.svg", "cell-0.svg"} <= {p.name for p in (finished / "pictures").iterdir()}
    assert len(bench.stepper.diary.history) == len({e["epoch"] for e in events if e["type"] == "epoch"})
    assert len(bench.live.plot.fig.data) > 10 and "dashed" in bench.live.history.svg
    assert bench.live.overview.svg.count('class="cell"') == spec.cells
    assert bench.live.cell.svg.count('class="op ') == len(spec.graph.edges) * len(spec.ops)
    bench.tabs.selected_index = 1
    until(lambda: bench.thresholds.table.value)
    bench.thresholds.fields["filter"].value = 0.8
    until(lambda: bench.whatif.value("filter") == pytest.approx(0.8))
    assert set(dict(bench.thresholds.scope.options).values()) == {"all", *spec.ops, "selected"}
    bench.thresholds.scope.value = "selected"
    until(lambda: bench.thresholds.pics["weight"].svg)
    bench.ask("accuracy")
    until(lambda: "fixed images" in bench.answers.found.get("accuracy", ""))
    bench.tabs.selected_index = bench.tabs.titles.index("Replay")
    until(lambda: bench.replay.rep is not None and len(bench.replay.plot.fig.data) > 10)
    frames = bench.replay.rep.frames
    bench.replay.slider.value = 3
    until(lambda: bench.replay.drawn and bench.replay.drawn[1] == 3)
    assert bench.replay.slider.labels[3] == frames[3].label
    assert bench.replay.plot.fig.layout.title.text.startswith(frames[3].stage) and bench.replay.cell.fig.data
    bench.tabs.selected_index = bench.tabs.titles.index("Compare")
    until(lambda: bench.compare.drawn == [finished.name])
    assert bench.compare.table.rows[0][0] == finished.name and len(bench.compare.curves.fig.data) == 3
    assert not bench.compare.difference.fig.data
    bench.tabs.selected_index = bench.tabs.titles.index("Log")
    until(lambda: "commit: pruned" in bench.log.html.value)


def test_the_workbench(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("MGDARTS_ROOT", str(tmp_path))
    bench = workbench.Workbench(finished, interactive=True)
    try:
        until(lambda: bench.view is not None and bench.live.cell.svg)
        look_around(bench, finished)
        bench.start(settings(finished.name.removeprefix("demo-")), tmp_path / "live")
        until(lambda: bench.stepper.search is not None and bench.stepper.search.steps > 2)
        bench.do("pause")
        until(lambda: bench.deck.state["word"] == "paused")
        steps = bench.stepper.search.steps
        for _ in range(2):  # the page says again what it takes for lost
            bench.hear(bench.deck, {"do": "step", "n": 7.0})
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
        assert len(workbench.stills([], bench.view)) == 5
    finally:
        bench.close()


def test_one_workbench_goes_from_space_to_space(tmp_path, monkeypatch):
    monkeypatch.setenv("MGDARTS_ROOT", str(tmp_path))
    bench = workbench.Workbench(settings(), interactive=True)
    try:
        until(lambda: bench.view is None and bench.stepper.search is not None)
        for space in ("mobilenet", "darts"):
            bench.new.space.value, bench.new.settings.value = space, ", ".join(f"{k}={v}" for k, v in LASTING.items())
            bench.start(bench.new.asked(), tmp_path / space)
            until(lambda: bench.view is not None and bench.view.spec.kind == space)
            bench.do("pause")
            until(lambda: bench.deck.state["word"] == "paused")
            until(lambda: bench.live.cell.selected == ",".join(map(str, bench.selection.unit)))
            edges, ops = len(bench.view.spec.graph.edges), len(bench.view.spec.ops)
            assert bench.live.cell.svg.count('class="op ') == edges * ops
            bench.selection.key("ArrowUp")
            assert bench.selection.unit[2] < ops
        assert ("MobileNet" in bench.deck.state["about"]) is False
    finally:
        bench.close()


def test_runs_of_two_spaces_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("MGDARTS_ROOT", str(tmp_path))
    for space, seed in (("darts", 0), ("mobilenet", 0), ("mobilenet", 1)):
        cfg = settings(space, seed=seed, **{"search.prune_every": 1})
        runs.search(cfg, tmp_path / "runs" / f"{space}-{seed}")
    bench = workbench.Workbench(tmp_path / "runs/mobilenet-0", interactive=True)
    try:
        bench.tabs.selected_index = bench.tabs.titles.index("Compare")
        until(lambda: bench.compare.drawn is not None)
        bench.compare.table.chosen = ["darts-0", "mobilenet-0"]
        until(lambda: bench.compare.drawn == ["darts-0", "mobilenet-0"])
        assert "different spaces" in bench.compare.difference.fig.layout.annotations[0].text
        bench.compare.table.chosen = ["mobilenet-0", "darts-0", "mobilenet-1"]
        until(lambda: len(bench.compare.difference.fig.data) > 5)
        assert bench.compare.said.value.startswith("A: mobilenet-0, B: mobilenet-1")
    finally:
        bench.close()


def test_bad_input_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="run folder"):
        workbench.Workbench(tmp_path / "nowhere", interactive=True)
    bench = workbench.Workbench(interactive=True)
    try:
        assert bench.deck.state["word"] == "nothing open"
        start = bench.new.widget.children[0]
        for text, named in (("chanels=4", "chanels"), ("method=darts-v1", "method"), ("seed=3", "seed")):
            bench.new.settings.value = text
            start.click()
            assert named in bench.said[-1] and bench.stepper is None
        bench.branch()
        assert "run folder" in bench.said[-1]
    finally:
        bench.close()


def test_a_damaged_run_is_said_once(finished, tmp_path):
    for name in ("config.json", "events.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    with open(tmp_path / "events.jsonl", "ab") as f:
        f.write(b"no event\n")
    bench = workbench.Workbench(tmp_path, interactive=True)
    try:
        until(lambda: bench.deck.state["word"] == "failed")
        assert "damaged" in bench.deck.state["why"]
        bench.tabs.selected_index = bench.tabs.titles.index("Replay")
        until(lambda: any("damaged" in t for t in bench.said))
        time.sleep(1.5)
        assert len([t for t in bench.said if "damaged" in t]) == 1
    finally:
        bench.close()


def test_a_failed_search_says_why(tmp_path):
    s = stepper.Stepper(stepper.on_new(settings(), tmp_path / "run"))
    until(lambda: s.search is not None)
    s.wait()
    s.search.events.listen(lambda e: 1 / 0, "forward")
    s.run()
    until(lambda: s.state == "failed")
    assert "ZeroDivisionError" in words.status_line(s)[1] and "in optimise" in s.trace
    with pytest.raises(ZeroDivisionError):
        s.wait()
    s.close()


def test_the_core_needs_no_widgets():
    names = ("inspector", "replay", "compare", "animation", "report", "save", "pictures", "branch", "stepper", "words",
             "answers")
    code = ("import sys; sys.modules['ipywidgets'] = sys.modules['anywidget'] = None; "
            f"import mgdarts.runs.run, mgdarts.cli.main, {', '.join('mgdarts.views.' + n for n in names)}")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def execute(out, **parameters):
    papermill.execute_notebook(ROOT / "nbs/start/workbench.ipynb", out, parameters, kernel_name="python3",
                               progress_bar=False, cwd=ROOT / "nbs")


def test_headless_it_is_a_small_still(finished, tmp_path, here):
    out = tmp_path / "out.ipynb"
    execute(out, folder=str(finished))
    nb = nbformat.read(out, 4)
    shown = [o.get("data", {}) for c in nb.cells for o in c.get("outputs", [])]
    assert sum("application/vnd.plotly.v1+json" in d for d in shown) == 1
    assert sum("image/svg+xml" in d for d in shown) == 5
    assert os.path.getsize(out) < 1_000_000 and "widgets" not in nb.metadata
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="InputError"):
        execute(out, foldr="x")
