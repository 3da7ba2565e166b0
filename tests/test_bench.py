"Memory plan and benchmarks, at sizes that take seconds: they must not rot."
import copy
import json
from pathlib import Path

import nbformat
import papermill
import pytest
import torch

from mgdarts.base.options import Compute, Search as Settings
from mgdarts.cli.main import main
from mgdarts.fast.engine import make
from mgdarts.net.supernet import SuperNet
from mgdarts.runs.bench import measured
from mgdarts.runs.memory import memory_plan, prune_to, step_memory
from mgdarts.space.darts import DARTS_GRAPH, NetSpec


@pytest.mark.parametrize("recompute", ["none", "earlier", "all"])
def test_the_plan_is_what_real_tensors_take(recompute):
    net = SuperNet(NetSpec(4, 3, size=16), engine=make(Compute(recompute=recompute)))
    net.open(0, 0)
    net.open(1, 1)
    net.discretising = True
    fake, real = step_memory(net, Settings(), 8), step_memory(copy.deepcopy(net), Settings(), 8, real=True)
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    assert fake.activations == pytest.approx(real.activations, rel=0.02)


def test_more_recomputing_needs_less_memory():
    def plan(how): return memory_plan(NetSpec(4, 3, size=16), Settings(), 32, 3, compute=Compute(recompute=how))
    peak = {how: {m.name: m.peak_bytes for m in plan(how)} for how in ("none", "earlier", "all")}
    assert peak["all"]["stage 3"] <= peak["earlier"]["stage 3"] < peak["none"]["stage 3"]
    assert peak["earlier"]["stage 1"] == peak["none"]["stage 1"]  # there is no earlier one


def test_momentum_gradients_and_parameters_are_counted_by_hand():
    net = SuperNet(NetSpec(4, 3, size=16))
    net.open(0, 0)
    m = step_memory(net, Settings(), 4)
    n = sum(p.numel() for p in net.parameters())
    assert m.grads == m.optimizer == 4 * n
    assert m.params == 4 * n + sum(b.numel() * b.element_size() for b in net.buffers())
    assert m.peak_bytes >= m.params + m.optimizer + m.activations


@pytest.mark.parametrize("live", [0.5, 0.1])
def test_pruning_to_a_share_feeds_every_node(live):
    net = SuperNet(NetSpec(2, 3, size=8))
    net.open(2, 2)
    prune_to(net, live, torch.Generator().manual_seed(0))
    assert int(net.op_live.sum()) == max(int(live * 294), 12)
    assert all(net.op_live[c, DARTS_GRAPH.into[n]].any() for c in range(3) for n in DARTS_GRAPH.nodes)


def test_bench_step_in_a_process_of_its_own():
    tiny = ("step", "--channels", 4, "--cells", 3, "--size", 16, "--batch", 8, "--steps", 1)
    full, few = measured(*tiny), measured(*tiny, "--live", 0.3)
    assert full["peak_rss_mb"] > full["rss_before_mb"] > 0 and full["cpu_s"] > 0 and full["times_floor"] > 1
    plan = memory_plan(NetSpec(4, 3, size=16), Settings(stages=1, stage_keep=(0.3,)), 8, 1)
    # what the allocator handed out in a real step
    assert full["peak_allocated_mb"] == pytest.approx(plan[0].peak_bytes / 2**20, rel=0.1)
    assert few["live_ops"] < full["live_ops"] and few["flop"] < full["flop"]
    assert full["flop"] == 6 * 8 * full["macs"]


def test_bench_train(capsys):
    assert main(["bench", "train", "--preset", "smoke", "--steps", "1", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["times_faster"] == pytest.approx(out["reference_cpu_s"] / out["cpu_s"])
    assert out["ops"] > 0 and 0 < out["params"] <= 14_000
    assert main(["bench", "train", "--preset", "smoke", "--set", "space.kind=mobilenet"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_plan_command(capsys, tmp_path):
    sizes = ["--channels", "4", "--cells", "3", "--batch", "4", "--size", "16"]
    assert main(["plan", *sizes, "--json", "--figure", str(tmp_path / "plan.html")]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in out["stages"]] == ["stage 1", "stage 2", "stage 3", "fine-tune"]
    assert out["peak_bytes"] == max(s["peak_bytes"] for s in out["stages"]) and out["percent_of_single_stage"] > 0
    assert set(out["stages"][0]) >= {"name", "peak_bytes", "params", "grads", "optimizer", "activations"}
    assert "memory plan" in (tmp_path / "plan.html").read_text("utf-8")
    assert main(["plan", *sizes, "--stages", "1", "--json"]) == 0
    assert [s["name"] for s in json.loads(capsys.readouterr().out)["stages"]] == ["stage 1", "fine-tune"]


@pytest.mark.parametrize("bad", [["--stages", "2"], ["--recompute", "some"], ["--channels", "3"], ["--size", "4"],
                                 ["--figure", "nowhere/plan.html"], ["--figure", "plan.gif"]])
def test_plan_refuses_with_one_line(bad, capsys):
    assert main(["plan", *bad]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_benchmark_notebook(tmp_path, here):
    notebook = Path(__file__).resolve().parent.parent / "nbs/runs/benchmarks.ipynb"
    papermill.execute_notebook(notebook, tmp_path / "out.ipynb", {"out": str(tmp_path / "bench")},
                               kernel_name="python3", progress_bar=False, cwd=notebook.parent)
    record = json.loads((tmp_path / "bench/record.json").read_text())
    assert set(record) >= {"batch", "width", "depth", "live", "recompute", "validation", "plan", "search",
                           "environment"}
    shown = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    assert sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in shown) == 4
