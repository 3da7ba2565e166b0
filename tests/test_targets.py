"Targets in multiply-adds and in latency: counted, predicted, reached, refused, resumed."
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mgdarts.base.batches import Loader
from mgdarts.base.data import load_data
from mgdarts.base.files import read_json, write_json
from mgdarts.base.options import Config, InputError, Search as Settings, configure, from_dict, to_dict
from mgdarts.cli.main import main
from mgdarts.methods.registry import METHODS, preset
from mgdarts.net import files as architecture
from mgdarts.net.cost import MACS, PARAMS, Cost, spent
from mgdarts.net.count import counts
from mgdarts.net.derive import derive
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.latency import Grid, Latency, soft_latency, to_time
from mgdarts.net.sample import at_width, fitted, random_architecture, random_like
from mgdarts.net.supernet import SuperNet
from mgdarts.runs import latency as timing, run as runs
from mgdarts.runs.latency import How, compared, measure, read_table
from mgdarts.search.loop import Search
from mgdarts.search.loss import average_cost, cost, filter_shares, prices
from mgdarts.search.prune import Sizes, candidates, choose
from mgdarts.search.stages import met
from mgdarts.space.darts import NetSpec
from mgdarts.space.mobile import MobileSpec
from mgdarts.space.operation import OPERATIONS
from mgdarts.space.space import count_supernet
from mgdarts.sweep.jobs import checksum

DARTS, MOBILE = NetSpec(4, 3, size=8, in_channels=1), MobileSpec(5, .25, 10, 32)
SPACES = {"darts": DARTS, "mobilenet": MOBILE}


def price(*widths):  # ms: a known plane, so that interpolation is exact
    return .02 + .001 * sum(widths)


def table(spec, of=price):
    return {"overhead_ms": .1, "entries": {t.key: t.entry(of) for t in to_time(spec)}}


@pytest.fixture(params=list(SPACES))
def spec(request): return SPACES[request.param]


def thinned(spec, seed=0):
    "A super-net with some operations and filters gone."
    net, g = SuperNet(spec, seed=seed), torch.Generator().manual_seed(seed)
    net.open(spec.cells - 1, 2)
    keep = torch.rand(net.op_live.shape, generator=g) < .3
    for node in spec.graph.nodes: keep[:, spec.graph.into[node][0], 1] = True
    gates = [net.full_gates(c) for c in range(spec.cells)]
    gates = [v & ((torch.rand(len(v), generator=g) < .8) | ~net.cells[c].index.filters["mid"])
             for c, v in enumerate(gates)]
    net.rebuild(keep, gates)
    return net


# ---- multiply-adds

def by_dispatcher(arch):
    "Multiply-adds of one picture, as PyTorch's own counter sees convolutions and matrix products go by."
    net = DerivedNet(arch).eval()
    with FlopCounterMode(display=False) as seen, torch.no_grad():
        net(torch.zeros(1, arch.in_channels, arch.size, arch.size))
    return seen.get_total_flops() // 2


def test_multiply_adds_of_operations_by_hand():
    sep, dil, skip, reduction = 16 ** 2 * 2 * (4 * 9 + 16), 16 ** 2 * (4 * 25 + 16), 0, 8 ** 2 * 8 * 8
    big = NetSpec(4, 3, size=16)
    def widths(name, w): return OPERATIONS[name].widths_by_port((w,) * len(OPERATIONS[name].ports))
    added = [MACS.added(big, 0, set(), (0, big.ops.index(name)), widths(name, 4))
             for name in ("sep_conv_3x3", "dil_conv_5x5", "skip_connect", "max_pool_3x3")]
    assert added == [sep, dil, skip, 0]
    strided = MACS.added(big, 1, set(), (0, 0), widths("skip_connect", 8))
    assert strided == reduction  # two halves, 1x1, on half the side
    assert MACS.ends(big, 16) - MACS.ends(big, None) == 16 * 10


def test_multiply_adds_are_what_a_pass_multiplies(spec):
    for seed in range(2):
        arch = derive(thinned(spec, seed))
        assert MACS.of_arch(arch) == by_dispatcher(arch) == counts(arch)["macs"]
    full = SuperNet(spec)
    full.open(spec.cells - 1, 2)
    assert MACS.whole(spec) == by_dispatcher(derive(full)) == count_supernet(spec)["macs"]


def test_masked_weights_are_multiplied_and_not_stored():
    net = thinned(DARTS)
    before = MACS.of(net), PARAMS.of(net)
    with torch.no_grad(): net.cells[0].omega_live[::2] = False
    assert MACS.of(net) == before[0] == MACS.of_arch(derive(net)) and PARAMS.of(net) < before[1]


# ---- one cost, asked in three ways

@pytest.mark.parametrize("name", ["params", "macs", "latency"])
def test_super_net_candidates_and_architecture_cost_the_same(spec, name):
    by = {"params": PARAMS, "macs": MACS, "latency": Latency(table(spec))}[name]
    net = thinned(spec, 3)
    net.discretising = True
    with torch.no_grad():
        for c in net.cells: c.beta.normal_(generator=torch.Generator().manual_seed(1))
        net.t_beta.fill_(.45)
        net.t_alpha[:, :2] = .6
    found = candidates(net)
    sizes, everything = Sizes(net, found, by), torch.ones(len(found.places), dtype=torch.bool)
    assert sizes(~everything) == by.of(net) == Cost.of(by, net) == by.of_arch(derive(net))
    masks = found.masks(found.off)
    gone = sizes(everything)
    for cell, keep in zip(net.cells, masks["weights"]): cell.omega_live &= keep
    net.rebuild(masks["ops"], [net.full_gates(c, g) for c, g in enumerate(masks["gates"])])
    assert gone == by.of(net) == by.of_arch(derive(net)) < by.whole(spec)


@pytest.mark.parametrize("share", [.3, .5, .8])
def test_choosing_ends_within_a_hundredth_below(spec, share):
    for by in (MACS, Latency(table(spec))):
        net = SuperNet(spec)
        net.open(spec.cells - 1, 2)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            net.alpha.normal_(generator=g)
            for c in net.cells: c.beta.normal_(generator=g)
            for name in net.THRESHOLDS: getattr(net, name).fill_(1.)
        net.discretising, found = True, candidates(net, more=True)
        sizes = Sizes(net, found, by)
        least, most = sizes(torch.ones(len(found.places), dtype=torch.bool)), by.of(net)
        target = least + share * (most - least)
        off = choose(net, found, target, sizes=sizes)
        assert met(sizes(off[found.places]), target)


# ---- tables of times

def test_interpolation_on_known_numbers():
    one, two = {"widths": [[2, 4, 8]], "ms": [1., 2., 10.]}, {"widths": [[2, 4], [1, 3]], "ms": [[0., 4.], [2., 8.]]}
    once = {"widths": [[5]], "ms": [7.]}
    def ms(entry, *widths): return float(Grid([entry])(torch.tensor([[*widths, 0][:2]]))) / 1e6
    assert [ms(one, w) for w in (2, 3, 4, 6, 8)] == [1., 1.5, 2., 6., 10.]
    assert [ms(one, w) for w in (9, 1)] == [12., .5]  # lines go on; but nothing takes less than no time
    assert ms({"widths": [[4, 8]], "ms": [1., 5.]}, 1) == 0.
    assert ms(two, 3, 2) == (0 + 4 + 2 + 8) / 4 and ms(two, 4, 2) == 5. and ms(two, 2, 3) == 4.
    assert ms(once, 1) == ms(once, 50) == 7.


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=2, max_size=5, unique=True).map(sorted), st.data())
def test_interpolation_like_a_slow_one(line, data):
    values = data.draw(st.lists(st.integers(1, 1000), min_size=len(line), max_size=len(line)))
    w = data.draw(st.integers(line[0], line[-1]))
    at = next(i for i in range(1, len(line)) if w <= line[i])
    (x0, y0), (x1, y1) = (line[at - 1], values[at - 1]), (line[at], values[at])
    slow = y0 + (y1 - y0) * (w - x0) / (x1 - x0)
    two = Grid([{"widths": [[1, 2]], "ms": [1., 2.]}, {"widths": [line], "ms": values}])
    found = two(torch.tensor([[1, 0], [w, 0]]))
    assert float(found[1]) / 1e6 == pytest.approx(slow)


def test_a_latency_by_hand():
    arch = random_architecture(DARTS, 20_000, 1)
    total = .1 + price(DARTS.channels) + price(arch.out(2))
    for c, (full, cell) in enumerate(zip(arch.spec.cell, arch.cells)):
        w, ops = cell.widths[2], {o.name: o for o in full.ops}
        reads = {(o.src, ops[o.op].reads, full.stride(arch.spec.edges.index((o.src, o.dst)))) for o in cell.ops}
        total += sum(price(n, w) for n in arch.inputs(c)) + sum(price(w) for _, what, _ in reads if what) + price(w)
        total += sum(price(w, w) if len(o.widths) == 3 else price(w) for o in cell.ops)
    assert Latency(table(DARTS)).of_arch(arch) / 1e6 == pytest.approx(total, rel=1e-6)


def test_what_is_priced_on_average_and_reaches_filters():
    by = Latency(table(DARTS))
    net = SuperNet(DARTS)
    net.open(2, 2)
    full = torch.stack([cost(c, None, None, by=by).detach() for c in net.cells])
    assert float(full.mean()) == pytest.approx(average_cost(DARTS, by), rel=1e-5)
    net.priced = by
    constant, both = (float(prices(net, "latency", 1., mu).sum().detach()) for mu in (0., 1.))
    assert both == pytest.approx(2 * constant, rel=.1)
    with torch.no_grad():
        for c in net.cells: c.beta.normal_(generator=torch.Generator().manual_seed(0))  # else no filter leads
    prices(net, "latency", 1., 1.).sum().backward()
    assert all(c.beta.grad.abs().sum() > 0 for c in net.cells)
    thin = soft_latency(by, net.cells[0], .5 * filter_shares(net.cells[0], None))
    assert bool((thin <= full[0] * 1e6 + 1e-3).all()) and bool((thin < full[0] * 1e6).any())


def test_a_table_of_another_space_is_refused():
    with pytest.raises(InputError, match="no time of"): Latency(table(DARTS)).fits(MOBILE)


# ---- networks of a cost, nobody's search

@pytest.mark.parametrize("name", ["macs", "latency"])
def test_random_networks_and_widths_meet_other_costs(spec, name):
    by = {"macs": MACS, "latency": Latency(table(spec))}[name]
    target = int(.5 * by.whole(spec))
    arch = random_architecture(spec, target, 2, cost=by)
    assert .99 * target <= by.of_arch(arch) <= target and arch == random_architecture(spec, target, 2, cost=by)
    assert met(by.of_arch(random_like(arch, 5, by)), by.of_arch(arch))
    if spec is MOBILE: return
    asked = (by.of_arch(at_width(arch, 2)) + by.of_arch(arch)) / 2
    assert .95 * asked <= by.of_arch(fitted(arch, asked, by)) <= asked


# ---- searches

SEARCHES = {"mg-darts": {"search.max_epochs": 30}, "fixed-rate": {"search.max_epochs": 30},
            "darts-v1": {"rules.fit": True, "search.length": 2},
            "random": {"search.length": 1, "rules.samples": 2, "rules.fit": True}}


@pytest.mark.parametrize("method", list(SEARCHES))
def test_searches_end_at_their_multiply_adds(method, tmp_path):
    asked = {"search.target_macs_m": .2, "data.subset": 128, "search.prune_every": 1, **SEARCHES[method]}
    result = runs.search(preset("smoke", method=method, **asked), tmp_path / "run")
    macs = result["derived"]["macs"]
    assert result["target"] == 200_000 and result["cost"] == macs and result["cost_of"] == "macs"
    assert result["gap"] == pytest.approx(macs / 200_000 - 1)
    assert result["reached"] and .99 * 200_000 <= macs <= 200_000
    assert by_dispatcher(architecture.load(tmp_path / "run")) == macs


def small(tmp_path):
    "A search of seconds, with a table of known prices."
    prices = tmp_path / "prices.json"
    write_json(prices, {**table(DARTS), "device": "cpu", "device_name": "made up", "how": vars(How()),
                        "space": {}, "environment": {}})
    whole = Latency(read_json(prices, "a table")).whole(DARTS)
    return preset("smoke", **{"search.target_ms": round(.5 * whole / 1e6, 3), "search.latency": str(prices),
                              "data.subset": 128, "search.prune_every": 1, "search.max_epochs": 30, "search.stages": 1})


def test_a_search_ends_at_its_latency_and_resumes_to_the_same_bits(tmp_path):
    cfg = small(tmp_path)
    whole = runs.search(cfg, tmp_path / "whole")
    target, found = cfg.search.target_ms * 1e6, whole["latency"]
    assert whole["reached"] and .99 * target <= whole["cost"] <= target and whole["cost_of"] == "latency"
    assert found["predicted_ms"] == whole["cost"] / 1e6 and found["measured_ms"] is None
    assert "made up" in found["why_not"] and found["error"] is None
    by = Latency(table(DARTS))
    assert by.of_arch(architecture.load(tmp_path / "whole")) == whole["cost"]

    def stop(event):
        if event.type == "epoch" and event.epoch == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): runs.search(cfg, tmp_path / "cut", listeners=(stop,), save_every=0)
    (tmp_path / "prices.json").unlink()  # the run has its own copy
    runs.search(None, tmp_path / "cut", resume=True)
    def events(run):
        lines = (tmp_path / run / "events.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]
    assert events("cut") == events("whole")
    assert spent(events("cut")[-1]) == (whole["cost"], "ms")


def test_a_state_goes_on_with_its_own_table_alone(tmp_path):
    cfg = small(tmp_path)
    splits = load_data(cfg.data, 0)
    loaders = {k: Loader(splits, k, 64) for k in ("train", "val")}
    def made(of): return Search(DARTS, loaders, cfg.search, latency=Latency(table(DARTS, of), str(of)), rules=cfg.rules)
    search = made(price)
    search.run("epoch")
    made(price).load_state_dict(search.state_dict())
    with pytest.raises(InputError, match="not the table"):
        made(lambda *w: 2 * price(*w)).load_state_dict(search.state_dict())
    with pytest.raises(InputError, match="was not read"): Search(DARTS, loaders, cfg.search, rules=cfg.rules)


def test_the_other_space_too(tmp_path):
    cfg = preset("smoke", **{"space.kind": "mobilenet", "space.cells": 5, "data.size": 16, "search.target_macs_m": 1.2,
                             "data.subset": 128, "search.prune_every": 1, "search.stages": 1, "search.max_epochs": 20})
    result = runs.search(cfg, tmp_path / "run")
    assert met(result["derived"]["macs"], 1.2e6) == result["reached"]
    assert result["derived"]["macs"] == by_dispatcher(architecture.load(tmp_path / "run"))


# ---- what cannot be

@pytest.mark.parametrize("wrong, said", [
    ({"search.target_macs_m": 1, "search.target_ms": 1, "search.latency": "t.json"}, "two targets"),
    ({"search.target_ms": 1}, "mgdarts latency"), ({"search.latency": "t.json"}, "asked by nobody"),
    ({"search.cost": "latency"}, "mgdarts latency"),
    ({"search.target_macs_m": 1, "search.granularities": "weight"}, "multiplied like others"),
    ({"search.target_macs_m": -1}, "out of range")])
def test_impossible_targets_are_refused(wrong, said):
    with pytest.raises(InputError, match=said) as e: preset("smoke", **wrong)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("wrong, said", [
    (["--set", "target_macs_m=100"], "not below"), (["--set", "target_macs_m=0.00001"], "no room"),
    (["--set", "target_ms=1", "--set", "search.latency=/nowhere.json"], "no table"),
    (["--method", "dass", "--set", "rules.fit=true", "--set", "target_macs_m=0.3"], "masking weights")])
def test_the_command_says_it_in_a_line(wrong, said, tmp_path, capsys):
    assert main(["search", "--preset", "smoke", "--out", str(tmp_path / "run"), *wrong]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and err.count("\n") == 0 and not (tmp_path / "run").exists()


def test_defaults_change_no_checksum():
    whole = to_dict(Config())
    before = {**whole, "search": {k: v for k, v in whole["search"].items()
                                  if k not in ("target_macs_m", "target_ms", "latency")}}
    assert checksum(whole) == checksum(before) and to_dict(from_dict(before)) == whole
    assert checksum(to_dict(configure(Config(), target_macs_m=3))) != checksum(whole)
    assert Settings().aim == ("params", .7e6) and not any("target_macs_m" in m.settings for m in METHODS.values())


# ---- measuring

@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "A real table of this machine, as the command writes it."
    path = tmp_path_factory.mktemp("latency") / "table.json"
    small = ["--preset", "smoke", "--repeats", "3", "--widths", "0.5"]
    assert main(["latency", str(path), *small]) == 0
    return path


def test_a_real_table(measured):
    by = read_table(measured)
    assert {"device", "device_name", "how", "environment", "space", "shares"} <= by.table.keys()
    assert by.table["environment"]["torch"] == torch.__version__ and by.table["shares"] == [.5, 1.]
    by.fits(DARTS)
    assert all(e["widths"][0] and min(flat(e["ms"])) >= 0 for e in by.entries.values())
    assert by.cells == {} or by.whole(DARTS) > 0
    found = [compared(by, random_architecture(DARTS, 15_000, seed)) for seed in (0, 1)]
    for f in found:  # a machine at work may be slow now and fast then: but not by so much
        assert f["measured_ms"] > 0 and .2 < f["predicted_ms"] / f["measured_ms"] < 5
        assert f["error"] == pytest.approx(f["predicted_ms"] / f["measured_ms"] - 1)


def flat(v): return [x for e in v for x in flat(e)] if isinstance(v, list) else [v]


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(InputError), timing.with_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise InputError
    assert torch.get_num_threads() == before


def test_the_command_checks_and_shows(measured, tmp_path, capsys):
    arch = tmp_path / "net"
    architecture.save(random_architecture(DARTS, 15_000), arch)
    capsys.readouterr()
    assert main(["latency", str(measured), "--check", str(arch), "--json"]) == 0
    (net,) = json.loads(capsys.readouterr().out)["networks"]
    assert main(["arch", "show", str(arch), "--latency", str(measured), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["latency"]["predicted_ms"] == net["predicted_ms"] == read_table(measured).of_arch(
        architecture.load(arch)) / 1e6
    assert shown["macs"] == MACS.of_arch(architecture.load(arch)) and shown["latency"]["measured_ms"] > 0


@pytest.mark.parametrize("args, said", [
    (["--device", "cuda:7"], "not there"), (["--device", "auto"], "which device"),
    (["--runtime", "tflite"], "--runtime"), (["--widths", "2"], "--widths"), (["--threads", "0"], "threads"),
    (["--check", "/nowhere"], "no table")])
def test_bad_orders_write_nothing(args, said, tmp_path, capsys):
    assert main(["latency", str(tmp_path / "t.json"), "--preset", "smoke", *args]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_damaged_table_is_refused(measured, tmp_path):
    text, path = measured.read_text(), tmp_path / "table.json"
    path.write_text(text.replace('"overhead_ms"', '"overheat_ms"'))
    with pytest.raises(InputError, match="damaged"): read_table(path)
    path.unlink()
    write_json(path, {"entries": {"relu:1@8": {"widths": [[1]], "ms": "soon"}}, "overhead_ms": 0, "how": vars(How())})
    with pytest.raises(InputError, match="not a table"): read_table(path)
    assert main(["latency", str(path), "--preset", "smoke"]) == 2  # it is there already


def test_a_missing_runtime_names_the_extra(monkeypatch):
    real = timing.importlib.util.find_spec
    monkeypatch.setattr(timing.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(InputError, match=r"mgdarts\[latency\]"): timing.onnx_runtime()


def test_onnx_runtime_times_the_same_pieces():
    pytest.importorskip("onnxruntime")
    tiny = NetSpec(2, 3, size=8, in_channels=1)
    by = Latency(measure(tiny, How(runtime="onnx", repeats=1, least=1e-5), (1.,)))
    arch = random_architecture(tiny, 4_000)
    found = compared(by, arch)
    assert found["measured_ms"] > 0 and found["runtime"] == "onnx"


def test_a_killed_measurement_leaves_nothing(tmp_path):
    path = tmp_path / "table.json"
    code = f"from mgdarts.cli.main import main; main(['latency', {str(path)!r}, '--preset', 'smoke', '--widths', '1'])"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert "turn 1" in child.stderr.readline()
    child.kill()
    child.wait()
    assert not list(tmp_path.iterdir())
