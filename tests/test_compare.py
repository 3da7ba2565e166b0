"The front, differences and tables against slow ways to find them, in both spaces."
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from mgdarts.base.options import InputError
from mgdarts.cli.main import main
from mgdarts.methods.registry import preset
from mgdarts.net import files as architecture
from mgdarts.net.count import counts
from mgdarts.net.sample import random_architecture
from mgdarts.runs import run as runs
from mgdarts.runs.records import list_runs
from mgdarts.space.darts import NetSpec
from mgdarts.space.mobile import MobileSpec
from mgdarts.views import compare
from mgdarts.views.difference import ONLY, difference, difference_figure, difference_table


def darts(seed=0, cells=3, target=30_000):
    return random_architecture(NetSpec(8, cells, size=16), target, seed)


def mobile(seed=0, cells=6, share=.7):
    spec = MobileSpec(cells, .35, 10, 16)
    return random_architecture(spec, int(share * spec.params), seed)


PAIRS = {"darts": (darts(0), darts(1)), "darts, more cells": (darts(2, 3, 60_000), darts(3, 6, 120_000)),
         "darts, fewer": (darts(4, 6, 120_000), darts(4, 3, 60_000)), "mobilenet": (mobile(0), mobile(1)),
         "mobilenet, more layers": (mobile(0, 6), mobile(1, 8))}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_nothing_dominates(points):
    def beats(p, q): return p[0] <= q[0] and p[1] >= q[1] and p != q
    got = compare.front(points)
    best = {q for q in points if not any(beats(p, q) for p in points)}
    assert {points[i] for i in got} == best and len(got) == len(best)
    assert got == sorted(got, key=lambda i: points[i][0])


@pytest.mark.parametrize("pair", PAIRS)
def test_a_difference_is_one_of_sets(pair):
    a, b = PAIRS[pair]
    d = difference(a, b)

    def every(x): return {(c, op.op, op.src, op.dst) for c, cell in enumerate(x.cells) for op in cell.ops}
    def listed(key): return {(c["cell"], o["op"], o["src"], o["dst"]) for c in d["cells"] for o in c[key]}

    both = every(a) & every(b)
    assert listed("only_a") == every(a) - both and listed("only_b") == every(b) - both and listed("both") == both
    assert d["shared"] == pytest.approx(len(both) / len(every(a) | every(b)))
    for c in d["cells"]:
        for o in c["both"]:
            for side, x in (("a", a), ("b", b)):
                op, = (p for p in x.cells[c["cell"]].ops if (p.op, p.src, p.dst) == (o["op"], o["src"], o["dst"]))
                assert o[f"widths_{side}"] == list(op.widths) and o[f"weights_kept_{side}"] in (None, 1.0)
    json.dumps(d, allow_nan=False)
    assert len(difference_table(d)) == max(len(a.cells), len(b.cells))


def test_architectures_of_different_spaces_have_no_difference():
    for one, two in ((darts(), mobile()), (mobile(), darts())):
        with pytest.raises(InputError, match="no operation in common"):
            difference(one, two)


@pytest.mark.parametrize("a", [darts(), mobile()], ids=["darts", "mobilenet"])
def test_masks_show_in_a_difference(a):
    key, shape = next(iter(a.mask_shapes().items()))
    m = torch.ones(shape, dtype=torch.bool)
    m.view(-1)[:2] = False
    b = replace(a, masks={key: m})
    c, i = int(key[1]), int(key.split(".")[1][1:])
    op = a.cells[c].ops[i]
    cell = difference(a, b)["cells"][c]
    found, = (o for o in cell["both"] if (o["op"], o["src"], o["dst"]) == (op.op, op.src, op.dst))
    whole = sum(torch.Size(s).numel() for k, s in a.mask_shapes().items() if k.startswith(f"c{c}.o{i}."))
    assert found["weights_kept_a"] == 1 and found["weights_kept_b"] == pytest.approx(1 - 2 / whole)
    assert found["params_a"] - found["params_b"] == 2


@pytest.mark.parametrize("pair", ["darts", "mobilenet"])
def test_the_drawn_difference_has_every_operation_once(pair):
    a, b = PAIRS[pair]
    d, fig, ops = difference(a, b), difference_figure(a, b), a.spec.ops
    arcs = [t for t in fig.data if t.mode == "lines" and t.name in ops]
    n = {label: sum(x is None for t in arcs if t.line.color == colour for x in t.x)
         for label, (_, colour, _) in ONLY.items()}
    assert n == {k: d[k] for k in n} and len({(colour, dash) for _, colour, dash in ONLY.values()}) == 3
    assert [x.text for x in difference_figure(a, b, (2,)).layout.annotations] == [fig.layout.annotations[2].text]
    with pytest.raises(InputError, match=f"no cell {len(a.cells)}"):
        difference_figure(a, b, (len(a.cells),))


def row(i, method, **extra):
    return {"run": f"r/{i}", "method": method, "dataset": "d", "seed": i, "params_nonzero": 10**5 * (i + 1),
            "params_deployable": 2 * 10**5 * (i + 1), "test_acc": 50. + i, **extra}


ROWS = [row(0, "mg-darts", random_acc=40., random_params_nonzero=10**5), row(1, "darts"),
        row(2, "mg-darts", test_acc=None), row(3, "mg-darts", random_acc=51.5, random_params_nonzero=3 * 10**5)]


def test_pareto_marks_methods_baselines_and_the_front():
    fig = compare.pareto(ROWS)
    points = {t.name: list(zip(t.x, t.y)) for t in fig.data if t.mode == "markers"}
    assert points == {"mg-darts": [(.1, 50.), (.4, 53.)], "darts": [(.2, 51.)],
                      "random, same size": [(.1, 40.), (.3, 51.5)]}
    line, = (t for t in fig.data if t.name == "Pareto front")
    assert list(zip(line.x, line.y)) == [(.1, 50.), (.2, 51.), (.3, 51.5), (.4, 53.)]
    joined = fig.data[0]
    assert list(zip(joined.x, joined.y)) == [(.1, 50.), (.1, 40.), (None, None), (.4, 53.), (.3, 51.5), (None, None)]
    assert len({t.marker.symbol for t in fig.data if t.mode == "markers"}) == 3
    assert fig.layout.xaxis.title.text.endswith("(millions)") and fig.layout.yaxis.title.text == "test accuracy (%)"
    deployable = compare.pareto(ROWS, "params_deployable")
    assert [list(t.x) for t in deployable.data if t.mode == "markers"] == [[.2, .8], [.4]]
    with pytest.raises(InputError, match="no size"):
        compare.pareto(ROWS, "weight")
    assert not compare.pareto([]).data


def test_curves_lie_over_each_other():
    def events(n):
        return [{"type": "epoch", "epoch": i, "step": i, "stage": "stage 1", "val_acc": 10. * i, "params": 10**6,
                 "retention": {"operation": .5}} for i in range(n)]

    fig = compare.overlay({"a": events(3), "b<": events(5), "none": []}, ("val_acc", "operation"))
    assert [(t.name, len(t.x)) for t in fig.data] == [("a", 3), ("a", 3), ("b&lt;", 5), ("b&lt;", 5)]
    assert fig.data[2].y == (0., 10., 20., 30., 40.)
    many = compare.overlay({str(i): events(2) for i in range(12)}, ("params",))
    assert len({(t.line.color, t.line.dash) for t in many.data}) == 12
    with pytest.raises(InputError, match="no curve"):
        compare.overlay({}, ("speed",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A run that was trained, one that was not, two of the other space, and an architecture."
    out = tmp_path_factory.mktemp("compare")
    fast = {"data.subset": 200, "search.warmup": 0, "search.max_epochs": 1, "search.prune_every": 1, "search.batch": 50,
            "train.epochs": 1}
    for seed in (0, 1):
        runs.search(preset("smoke", seed=seed, **fast), out / f"run-{seed}")
        runs.search(preset("smoke", seed=seed, **fast, **{"space.kind": "mobilenet"}), out / f"layers-{seed}")
    runs.retrain(out / "run-0")
    architecture.save(random_architecture(architecture.load(out / "run-0").spec, 9000, name="by hand"), out / "arch")
    return out


def test_command(folder, tmp_path, capsys):
    names = [str(folder / n) for n in ("run-0", "run-1", "arch")]
    assert main(["compare", *names, "--figure", str(tmp_path / "c.html"), "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in got["runs"]] == ["run-0", "run-1", "by hand"]
    assert [(d["a"], d["b"]) for d in got["differences"]] == [("run-0", "run-1"), ("run-0", "by hand")]
    size = counts(architecture.load(folder / "arch"))
    assert got["runs"][2]["params_nonzero"] == size["params_nonzero"]
    assert got["runs"][0]["test_acc"] is not None and got["runs"][1]["test_acc"] is None
    page = (tmp_path / "c.html").read_text("utf-8")
    assert "Accuracy against size" in page and "by hand" in page and page.count("plotly-graph-div") == 4
    assert main(["compare", *names]) == 0
    assert "only in A" in capsys.readouterr().out


def test_command_on_both_spaces(folder, tmp_path, capsys):
    names = [str(folder / n) for n in ("layers-0", "run-0", "layers-1")]
    assert main(["compare", *names, "--figure", str(tmp_path / "c.html"), "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in got["runs"]] == ["layers-0", "run-0", "layers-1"]
    assert [(d["a"], d["b"]) for d in got["differences"]] == [("layers-0", "layers-1")]
    assert main(["compare", *names]) == 0
    assert "block" in capsys.readouterr().out


def test_rows_of_a_table_are_those_of_the_list(folder):
    listed = {r["run"]: r for r in list_runs(folder)}
    for e in compare.entries([folder / "run-0", folder / "run-1", folder / "layers-0"]):
        assert listed[str(e.path)] == e.row
    assert [e.name for e in compare.entries([folder / "run-0"] * 3)] == ["run-0", "run-0 #2", "run-0 #3"]


def test_settings_that_differ(folder):
    found = compare.entries([folder / n for n in ("run-0", "run-1", "layers-0")])
    told = {key: values for key, *values in compare.settings(found)}
    assert told["seed"] == [0, 1, 0] and told["space.kind"] == ["darts", "darts", "mobilenet"] and "method" not in told


@pytest.mark.parametrize("args", [["run-0"], ["run-0", "nothing"], ["run-0", "."],
                                  ["run-0", "run-1", "--figure", "x.png"], ["run-0", "run-1", "--figure", "no/x.html"]])
def test_bad_input(folder, args, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["compare", *args]) == 2
    io = capsys.readouterr()
    assert len(io.err.strip().splitlines()) == 1 and not io.out


def test_a_training_is_an_architecture_with_an_accuracy(folder):
    found, = compare.entries([folder / "run-0/train"])
    result = json.loads((folder / "run-0/train/result.json").read_text())
    assert not found.events and found.row["test_acc"] == result["test_acc_final"]
    assert found.row["params_nonzero"] == result["params_nonzero"]
    assert list_runs(folder / "run-0") == []  # trainings are not runs of their own
