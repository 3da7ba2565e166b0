"Figures from partial runs, and the report: escaping, files, what it asks the network for."
import json, re
from dataclasses import replace
import plotly.graph_objects as go
import pytest, torch
from mgdarts.net.count import count
from mgdarts.net.sample import random_architecture
from mgdarts.base.options import InputError
from mgdarts.views.plots import *
from mgdarts.views.plots import _arc_heights
from mgdarts.space.space import GRANULARITIES
from mgdarts.space.darts import NetSpec, OPS


def epoch(n, stage="stage 1", phase="joint", **kw):
    return {"type": "epoch", "step": n, "epoch": n, "stage": stage, "loss": 1., "phase": phase, "ce": 1., "val_loss": 1.1, "train_acc": 50., "val_acc": None, "params": 5000 - n, "target": 1e3, "lambda": 0.,
            "retention": dict.fromkeys(GRANULARITIES, 1.) | {"weight": None}, "thresholds": dict.fromkeys(GRANULARITIES, None if phase == "warm-up" else .4)} | kw
def commit(n, **kw): return {"type": "commit", "step": n, "epoch": n, "stage": "stage 1", "pruned": dict.fromkeys(GRANULARITIES, 3)} | kw
def arch(): return random_architecture(NetSpec(8, 3, size=16), 30_000)

RUNS = {"nothing": [], "only opened": [{"type": "stage", "step": 0, "epoch": 0, "stage": "stage 1", "status": "open", "params": 1}], "warm-up": [epoch(0, phase="warm-up")],
        "no commits": [epoch(0, phase="warm-up"), epoch(1)], "bare": [{"type": "epoch", "step": 1, "epoch": 0, "stage": "stage 1"}], "bare commit": [epoch(0), {"type": "commit", "epoch": 0, "stage": "stage 1"}]}

@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("draw", [dynamics, size_and_lambda, learning])
def test_partial_runs(draw, name):
    fig = draw(RUNS[name])
    json.loads(fig.to_json())
    if not epochs_of(RUNS[name]): assert not fig.data and len(fig.layout.annotations) == 1
    else: assert fig.layout.paper_bgcolor == "rgba(0,0,0,0)" and fig.layout.font.color == "#7f8790"

def test_search_and_training_are_kept_apart():
    both = [epoch(0), epoch(1), epoch(0, "train", val_acc=80.)]
    assert len(dynamics(both).data[0].x) == 2 and learning(both).data[0].x == (1, 2)
    assert retrain_curves({"a": both}).data[0].y == (80.,)
    assert learning(both[2:]).data[0].x == (1,)

def test_repeats_gaps_and_commits():
    events = [epoch(0), epoch(1), commit(1, params=77), epoch(1, params=9), epoch(2, "stage 2")]
    x, y = size_and_lambda(events).data[0].x, size_and_lambda(events).data[0].y
    assert x == (1, 2, 2.5, 3) and y == (.005, 77e-6, None, .004998) # the size after the commit, and a gap between stages
    assert stage_spans(epochs_of(events)) == [("stage 1", 0, 2), ("stage 2", 2, 3)]

def test_stage_names_do_not_run_into_each_other():
    events = [epoch(i, "stage 1" if i < 90 else "stage 2" if i < 93 else "fine-tune") for i in range(100)]
    assert [a.text for a in dynamics(events).layout.annotations] == ["stage 1", "s2", "ft"]

def test_labels_and_stages_are_escaped():
    assert retrain_curves({"<a href='x'>y</a>": [epoch(0, "train", val_acc=1.)]}).data[0].name.startswith("&lt;a")
    assert dynamics([epoch(i, "<b>s</b>") for i in range(3)]).layout.annotations[0].text.startswith("&lt;b")


def test_cells_show_every_operation_once():
    a = arch(); per_cell = [len(c.ops) for c in a.cells]
    drawn = lambda fig: sum(sum(map(bool, t.marker.size)) for t in fig.data if t.mode == "markers" and t.name in OPS)
    assert [drawn(cell_graph(a, c)) for c in range(3)] == per_cell and drawn(cells(a)) == drawn(cells(a, 1)) == sum(per_cell)
    assert [t.text for t in cells(a, 2).layout.annotations] == [cell_title(a, c) for c in range(3)]
    assert cell_title(a, 1).startswith("cell 1 (reduction), width ") and cell_title(a, 1).endswith(f", {per_cell[1]} ops")
    with pytest.raises(InputError): cell_graph(a, 3)

def test_arcs_never_coincide():
    for seed in range(5):
        for cell in random_architecture(NetSpec(8, 3, size=16), 60_000, seed=seed).cells:
            arcs = [(op.src, op.dst, h) for op, h in zip(cell.ops, _arc_heights(cell.ops))]
            assert len(set(arcs)) == len(arcs)
            for (a, b, h) in arcs: # whatever lies within a wider pair on its side is lower
                assert all(abs(h2) < abs(h) for a2, b2, h2 in arcs if a <= a2 and b2 <= b and (a, b) != (a2, b2) and h * h2 > 0)

def test_hover_tells_kept_weights():
    a = arch(); key, shape = next(iter(a.mask_shapes().items())); m = torch.ones(shape, dtype=torch.bool); m.view(-1)[0] = False
    a = replace(a, masks={key: m}); c, o = int(key[1]), int(key.split(".")[1][1:]); op = a.cells[c].ops[o]
    row = count(a).cells[c].by_op[op.edge, op.index]
    texts = {t for d in cell_graph(a, c).data if d.hovertext and d.name == op.op for t in d.hovertext}
    assert any(f"weights {row[2]:,} of {row[3]:,} kept" in t and row[2] == row[3] - 1 for t in texts)

def test_distribution():
    fig = distribution(arch())
    assert [len(t.x) for t in fig.data] == [3, 3, 3, 7, 7, 7] and fig.data[4].y[0] is None # skips have no filters


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"

def test_report_escapes_everything(tmp_path):
    fig = retrain_curves({EVIL: [epoch(0, "train", val_acc=1.)]}); fig.add_annotation(text=EVIL)
    page = report(EVIL, {EVIL: EVIL, "list": [EVIL, 1]}, {EVIL: fig}, {EVIL: [{EVIL: EVIL}]}, [EVIL])
    assert "<script>alert" not in page and "<img" not in page
    assert page.count("</script>") == 2 # the library's, and the figure's

def test_report_values():
    page = report("t", {"n": 1234567, "x": .123456, "yes": True, "none": None}, {}, {"T": [{"a": 1}, {"b": "x"}], "E": []}, "note")
    for text in ("1,234,567", "0.1235", "<dd>yes</dd>", "<dd>–</dd>", '<th scope="col" class="n">a</th><th scope="col">b</th>', "<p>none</p>", "<p>note</p>"): assert text in page

@pytest.mark.parametrize("mode, size", [("directory", 2e5), ("cdn", 2e5), ("inline", 1e7)])
def test_plotly_is_there_once(mode, size, tmp_path):
    page = report("t", {}, {"a": empty("x"), "b": empty("y")}, {}, plotlyjs=mode)
    assert len(page) < size and len(re.findall(r"<script[^>]*src=", page)) == (mode != "inline")
    if mode == "directory": assert "http" not in re.sub(r"http://www.w3.org\S*", "", page)
    write_report(tmp_path / "r.html", page); write_report(tmp_path / "r.html", page)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["plotly.min.js", "r.html"] if mode == "directory" else ["r.html"])

def test_report_refuses_other_modes():
    with pytest.raises(InputError): report("t", {}, {}, {}, plotlyjs="require")

def test_figures_are_static():
    for fig in (dynamics([epoch(0)]), cells(arch()), empty("x")): assert type(fig) is go.Figure
