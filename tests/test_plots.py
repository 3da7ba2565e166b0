"Figures from partial runs, drawings of both spaces, and pages: escaping, files, what they ask the network for."
import json
import re
from dataclasses import replace

import plotly.graph_objects as go
import pytest
import torch

from mgdarts.base.options import InputError
from mgdarts.net.count import count
from mgdarts.net.sample import random_architecture
from mgdarts.space.darts import NetSpec
from mgdarts.space.graph import Graph
from mgdarts.space.found import ArchCell, Op
from mgdarts.space.mobile import MobileSpec
from mgdarts.space.space import GRANULARITIES
from mgdarts.views.drawings import Look, arc_heights, cell_graph, cell_title, cells, distribution, draw_cell, unit_of
from mgdarts.views.figures import (dynamics, epochs_of, learning, prunings, retrain_curves, size_and_lambda,
                                   stage_spans, starts)
from mgdarts.views.page import asset, report, write_page
from mgdarts.views.theme import empty, legend, op_legend, sign


def epoch(n, stage="stage 1", phase="joint", **kw):
    thresholds = dict.fromkeys(GRANULARITIES, None if phase == "warm-up" else .4)
    retention = dict.fromkeys(GRANULARITIES, 1.) | {"weight": None}
    return {"type": "epoch", "step": n, "epoch": n, "stage": stage, "loss": 1., "phase": phase, "ce": 1.,
            "val_loss": 1.1, "train_acc": 50., "val_acc": None, "params": 5000 - n, "target": 1e3, "lambda": 0.,
            "retention": retention, "thresholds": thresholds} | kw


def commit(n, **kw):
    return {"type": "commit", "step": n, "epoch": n, "stage": "stage 1", "pruned": dict.fromkeys(GRANULARITIES, 3)} | kw


def darts(seed=0, target=30_000): return random_architecture(NetSpec(8, 3, size=16), target, seed)


def mobile(share=.7):
    spec = MobileSpec(6, .35, 10, 16)
    return random_architecture(spec, int(share * spec.params))


ARCHS = {"darts": darts, "mobilenet": mobile}
RUNS = {"nothing": [],
        "only opened": [{"type": "stage", "step": 0, "epoch": 0, "stage": "stage 1", "status": "open", "params": 1}],
        "warm-up": [epoch(0, phase="warm-up")], "no commits": [epoch(0, phase="warm-up"), epoch(1)],
        "bare": [{"type": "epoch", "step": 1, "epoch": 0, "stage": "stage 1"}],
        "bare commit": [epoch(0), {"type": "commit", "epoch": 0, "stage": "stage 1"}]}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("draw", [dynamics, size_and_lambda, learning])
def test_partial_runs(draw, name):
    fig = draw(RUNS[name])
    json.loads(fig.to_json())
    if not epochs_of(RUNS[name]):
        assert not fig.data and len(fig.layout.annotations) == 1
    else:
        assert fig.layout.paper_bgcolor == "rgba(0,0,0,0)" and fig.layout.font.color == "#7f8790"


@pytest.mark.parametrize("draw", [prunings, starts])
@pytest.mark.parametrize("name", RUNS)
def test_what_no_event_told_is_not_drawn(draw, name):
    assert not draw(RUNS[name]).data


def test_search_and_training_are_kept_apart():
    both = [epoch(0), epoch(1), epoch(0, "train", val_acc=80.)]
    assert len(dynamics(both).data[0].x) == 2 and learning(both).data[0].x == (1, 2)
    assert retrain_curves({"a": both}).data[0].y == (80.,)
    assert learning(both[2:]).data[0].x == (1,)


def test_repeats_gaps_and_commits():
    events = [epoch(0), epoch(1), commit(1, params=77), epoch(1, params=9), epoch(2, "stage 2")]
    line = size_and_lambda(events).data[0]
    assert line.x == (1, 2, 2.5, 3) and line.y == (.005, 77e-6, None, .004998)  # after the commit; a gap between stages
    assert stage_spans(epochs_of(events)) == [("stage 1", 0, 2), ("stage 2", 2, 3)]


def test_stage_names_do_not_run_into_each_other():
    events = [epoch(i, "stage 1" if i < 90 else "stage 2" if i < 93 else "fine-tune") for i in range(100)]
    assert [a.text for a in dynamics(events).layout.annotations] == ["stage 1", "s2", "ft"]


def test_labels_and_stages_are_escaped():
    assert retrain_curves({"<a href='x'>y</a>": [epoch(0, "train", val_acc=1.)]}).data[0].name.startswith("&lt;a")
    assert dynamics([epoch(i, "<b>s</b>") for i in range(3)]).layout.annotations[0].text.startswith("&lt;b")


# --- operations by name

def test_operations_of_a_space_look_different():
    for spec in (NetSpec, MobileSpec):
        looks = [legend(name) for name in spec.ops]
        signs, labels = {(look.colour, look.marker) for look in looks}, {look.label for look in looks}
        assert len(signs) == len(labels) == len(spec.ops)


def test_new_operations_have_a_look_that_stays():
    known = [legend(name) for name in NetSpec.ops]
    for name in ("sep_conv_7x7", "sep_conv_9x9", "my <b>op</b>"):
        look = legend(name)
        assert look == legend(name) and (look.colour, look.marker) not in {(k.colour, k.marker) for k in known}
    fig = op_legend(go.Figure(), ["sep_conv_7x7", "skip_connect"])
    assert [t.legendgroup for t in fig.data] == ["sep_conv_7x7", "skip_connect"]


def test_open_signs_are_lines():
    assert sign(legend("skip_connect"), [9, 0])["line"]["width"] == [1.5, 0]
    assert sign(legend("max_pool_3x3"))["line"]["width"] == 0


# --- cells

@pytest.mark.parametrize("space", ARCHS)
def test_cells_show_every_operation_once(space):
    a = ARCHS[space]()
    per_cell = [len(c.ops) for c in a.cells]

    def drawn(fig):
        return sum(sum(map(bool, t.marker.size)) for t in fig.data if t.mode == "markers" and t.name in a.spec.ops)

    assert [drawn(cell_graph(a, c)) for c in range(len(a.cells))] == per_cell
    assert drawn(cells(a)) == drawn(cells(a, 1)) == sum(per_cell)
    with pytest.raises(InputError):
        cell_graph(a, len(a.cells))


def test_titles_of_cells():
    a = darts()
    assert [t.text for t in cells(a, 2).layout.annotations] == [cell_title(a, c) for c in range(3)]
    title = cell_title(a, 1)
    assert title.startswith("cell 1 (reduction), width ") and title.endswith(f", {len(a.cells[1].ops)} ops")
    assert cell_title(mobile(), 0, short=True) == "cell 0 ↓2, 3 ops"


def test_arcs_never_coincide():
    for seed in range(5):
        for cell in darts(seed, 60_000).cells:
            arcs = [(op.src, op.dst, h) for op, h in zip(cell.ops, arc_heights(cell.ops))]
            assert len(set(arcs)) == len(arcs)
            for (a, b, h) in arcs:  # whatever lies within a wider pair on its side is lower
                inside = [h2 for a2, b2, h2 in arcs if a <= a2 and b2 <= b and (a, b) != (a2, b2) and h * h2 > 0]
                assert all(abs(h2) < abs(h) for h2 in inside)


def test_blocks_of_a_layer_lie_on_both_sides():
    for cell in mobile().cells:
        heights = arc_heights(cell.ops)
        assert len(set(heights)) == len(heights) and sum(heights) == 0


def test_a_cell_of_a_graph_that_no_space_has():
    graph = Graph(1, ((0, 1), (0, 2), (1, 2)))
    ops = (Op("sep_conv_9x9", 0, 1, (4, 4)), Op("skip_connect", 0, 2, (4,)), Op("sep_conv_9x9", 1, 2, (4, 4)))
    fig = go.Figure().set_subplots(1, 1)
    draw_cell(fig, ArchCell(ops, (4, 4, 4)), graph, 2, dict.fromkeys(ops, Look("x", 2)), {"row": 1, "col": 1})
    assert fig.data[-1].x == (0, 1, 2) and fig.data[-1].hovertext[0].startswith("<b>state 0</b> of cell 1")
    assert {t.name for t in fig.data if t.mode == "lines"} == {"sep_conv_9x9", "skip_connect"}


@pytest.mark.parametrize("space", ARCHS)
def test_hover_tells_kept_weights(space):
    a = ARCHS[space]()
    key, shape = next(iter(a.mask_shapes().items()))
    m = torch.ones(shape, dtype=torch.bool)
    m.view(-1)[0] = False
    a = replace(a, masks={key: m})
    c, o = int(key[1]), int(key.split(".")[1][1:])
    op = a.cells[c].ops[o]
    row = count(a).cells[c].by_op[unit_of(a.spec, op)]
    texts = {t for d in cell_graph(a, c).data if d.hovertext and d.name == op.op for t in d.hovertext}
    assert row[2] == row[3] - 1 and any(f"weights {row[2]:,} of {row[3]:,} kept" in t for t in texts)


def test_distribution():
    fig = distribution(darts())
    assert [len(t.x) for t in fig.data] == [3, 3, 3, 7, 7, 7] and fig.data[4].y[0] is None  # skips have no filters
    assert [len(t.x) for t in distribution(mobile()).data] == [6, 6, 6, 3, 3, 3]


# --- pages

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_report_escapes_everything():
    fig = retrain_curves({EVIL: [epoch(0, "train", val_acc=1.)]})
    fig.add_annotation(text=EVIL)
    page = report(EVIL, {EVIL: EVIL, "list": [EVIL, 1]}, {EVIL: fig}, {EVIL: [{EVIL: EVIL}]}, [EVIL])
    assert "<script>alert" not in page and "<img" not in page
    assert page.count("</script>") == 2  # the library's, and the figure's


def test_report_values():
    facts = {"n": 1234567, "x": .123456, "yes": True, "none": None}
    page = report("t", facts, {}, {"T": [{"a": 1}, {"b": "x"}], "E": []}, "note")
    for text in ("1,234,567", "0.1235", "<dd>yes</dd>", "<dd>–</dd>", "<p>none</p>", "<p>note</p>",
                 '<th scope="col" class="n">a</th><th scope="col">b</th>'):
        assert text in page


@pytest.mark.parametrize("mode, size", [("directory", 2e5), ("cdn", 2e5), ("inline", 1e7)])
def test_plotly_is_there_once(mode, size, tmp_path):
    page = report("t", {}, {"a": empty("x"), "b": empty("y")}, {}, plotlyjs=mode)
    assert len(page) < size and len(re.findall(r"<script[^>]*src=", page)) == (mode != "inline")
    if mode == "directory":
        assert "http" not in re.sub(r"http://www.w3.org\S*", "", page)
    for _ in range(2):
        write_page(tmp_path / "r.html", page)
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == (["plotly.min.js", "r.html"] if mode == "directory" else ["r.html"])


def test_report_refuses_other_modes():
    with pytest.raises(InputError):
        report("t", {}, {}, {}, plotlyjs="require")


def test_figures_are_static():
    for fig in (dynamics([epoch(0)]), cells(darts()), empty("x")):
        assert type(fig) is go.Figure


def test_files_that_are_no_python_belong_to_the_package():
    for name in ("common.js", "deck.js", "picture.js", "table.js", "moments.js", "plotly.js", "library.js", "chart.js",
                 "replay.js", "widgets.css", "page.css"):
        assert len(asset(name)) > 100
