"What is planned and estimated is about the device that is asked for, which need not be there."
import json
from pathlib import Path

import pytest
import torch

import pretend
from mgdarts.base.files import write_json
from mgdarts.base.options import Compute, Search as Settings
from mgdarts.cli.main import main
from mgdarts.fast.engine import make
from mgdarts.fast.layout import CHANNELS, natively
from mgdarts.methods.registry import preset
from mgdarts.net.supernet import SuperNet
from mgdarts.runs import estimate as estimates, run as runs
from mgdarts.runs.allocator import MIB, Segments
from mgdarts.runs.bench import launches_of
from mgdarts.runs.make import make_search
from mgdarts.runs.memory import WORKSPACE, Accountant, memory_plan, step_memory
from mgdarts.search.stages import open_stage
from mgdarts.space.darts import NetSpec
from mgdarts.views.inspector import freeze

TINY = NetSpec(12, 3, size=16)
GPU = json.loads((Path(__file__).parent.parent / "figures/gpu/second/record.json").read_text())


def opened(**compute):
    net = SuperNet(TINY, engine=make(Compute(**compute)))
    net.open(2, 2)
    net.discretising = True
    return net


def test_blocks_are_cut_from_segments_and_joined_again():
    card, g = Segments(), torch.Generator().manual_seed(0)
    blocks = [card.take(int(torch.randint(1, 15 * MIB, (1,), generator=g))) for _ in range(200)]
    taken = card.reserved
    assert taken >= sum(b.size for b in blocks) and all(b.size % 512 == 0 for b in blocks)
    places = sorted((b.small, b.segment, b.at, b.at + b.size) for b in blocks)
    assert all(a[:2] != b[:2] or a[3] <= b[2] for a, b in zip(places, places[1:]))  # none overlaps
    for b in blocks: card.give(b)
    assert sum(size for free in card.free.values() for size, *_ in free) == card.reserved
    assert sum(map(len, card.free.values())) == card.count  # each segment is one piece
    with Accountant(card) as seen:
        x = torch.zeros(3 * MIB)
        del x
    assert seen.now == 0 and seen.peak == 12 * MIB and card.reserved == taken


@pytest.mark.parametrize("amp", [False, True])
def test_a_plan_for_a_gpu_is_what_its_way_takes_with_real_tensors(amp):
    plan = step_memory(opened(amp=amp), Settings(), 8, device="cuda")
    real = step_memory(opened(amp=amp), Settings(), 8, real=True, device="cuda")
    assert plan.device == "cuda" and plan.workspace == WORKSPACE
    assert plan.peak_bytes == pytest.approx(real.peak_bytes, rel=.02)
    assert plan.reserved_bytes >= plan.peak_bytes and plan.graph_bytes > plan.activations * .9
    assert step_memory(opened(amp=amp, graph="off"), Settings(), 8, device="cuda").graph_bytes == 0


def test_maps_are_as_wide_as_there():
    net = opened()
    with natively(CHANNELS):
        net.engine.prepare(net)
        assert {net.engine.plan(c, True).width for c in net.cells} == {16, 24, 48}
    with natively():
        net.engine.prepare(net)
        assert {net.engine.plan(c, True).width for c in net.cells} == {12, 24, 48}


def test_on_a_full_device_nothing_is_allocated_for_advice():
    expected = step_memory(opened(), Settings(), 8, device="cuda")
    with pretend.Device() as device:
        net = opened().to(pretend.NAME)
        device.seen.clear()
        assert step_memory(net, Settings(), 8) == expected
        copy = freeze(net)
        assert {what for what, _ in device.seen} <= {"read back"}, device.seen
    assert copy.alpha.device.type == "cpu" and type(copy.alpha.data) is torch.Tensor


def test_out_of_memory_advice_is_about_the_device_of_the_run():
    search = make_search(preset("smoke", **{"data.subset": 200}))
    open_stage(search)
    here = runs.memory_advice(search)
    with pretend.Device():
        search.net.to(pretend.NAME)
        there = runs.memory_advice(search)
    assert "needs about" in here and "needs about" in there and here != there


def test_bfloat16_and_recomputing_take_less_there():
    def peak(**compute):
        plan = memory_plan(TINY, Settings(), 32, compute=Compute(**compute), device="cuda")
        return {m.name: m.peak_bytes for m in plan}["stage 3"]
    assert peak(amp=True) < peak() and peak(recompute="earlier") < peak()


def test_plan_for_a_device_that_is_not_there(capsys):
    sizes = ["plan", "--channels", "4", "--cells", "3", "--batch", "4", "--size", "16", "--stages", "1", "--json"]
    def planned(device):
        assert main([*sizes, "--device", device]) == 0
        return json.loads(capsys.readouterr().out)
    there, here = planned("cuda:3"), planned("cpu")
    assert (there["device"], here["device"]) == ("cuda", "cpu") and there["reserved_bytes"] > there["peak_bytes"]
    assert here["reserved_bytes"] == here["peak_bytes"] and set(there) == set(here)
    assert main([*sizes, "--device", "toaster"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_time_is_not_made_up(capsys):
    assert main(["search", "--preset", "smoke", "--dry-run", "--json", "--device", "cuda"]) == 2
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert said.err.count("\n") == 1 and "not there" in said.err
    assert found["search_hours_at_most"] is found["train_hours"] is found["time_source"] is None
    assert all(s["epoch_s"] is None for s in found["stages"]) and found["peak_bytes"] > WORKSPACE
    assert main(["bench", "step", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_times_come_from_records_of_the_same_net(tmp_path):
    (tmp_path / "card").mkdir()
    write_json(tmp_path / "card/record.json", {k: v for k, v in GPU.items() if k not in ("schema", "sha256")})
    def look(spec, **compute):
        return estimates.recorded(preset("small", **{f"compute.{k}": v for k, v in compute.items()}), spec, tmp_path)
    plain = {"recompute": "none", "amp": False, "tf32": False}
    found = look(NetSpec(24, 8), **plain)
    assert set(found.by_stage) == {"stage 1", "stage 2", "stage 3"} and found.source.startswith("NVIDIA H200")
    one = look(NetSpec(16, 8), **plain)
    assert one.step == pytest.approx(.128801) and one.macs and not one.by_stage
    assert look(NetSpec(16, 8), **plain | {"graph": "off"}).step == pytest.approx(.429246)
    for other in (look(NetSpec(20, 8), **plain), look(NetSpec(16, 8, size=64), **plain),
                  look(NetSpec(16, 8), **plain | {"recompute": "all"}), look(NetSpec(24, 8), **plain | {"tf32": True})):
        assert other == estimates.Timed()
    (tmp_path / "card/record.json").write_text("{}")
    assert look(NetSpec(24, 8), **plain) == estimates.Timed()


def test_launches_are_those_of_a_gpu_wherever_they_are_counted():
    net = opened()
    few, many = launches_of(net), launches_of(opened(impl="reference"))
    assert few == launches_of(opened()) and 3 * few < many
