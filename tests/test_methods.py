"Every method, through the same loop, files and commands."
import io
import json

import pytest
import torch

from mgdarts.runs.make import make_search
from mgdarts.net.discrete import DerivedNet
from mgdarts.net import files as architecture
from mgdarts.net.count import counts
from mgdarts.cli import main as cli
from mgdarts.runs.make import bare_search
from mgdarts.base.options import (ALIKE, DECISIONS, PRESSURES, REGISTRIES, TWO, InputError, Method, Rules, Search,
                                  configure, refuse_unhandled)
from mgdarts.base.data import load_data
from mgdarts.methods.registry import METHODS, add_method, parts_of, preset
from mgdarts.methods.dass import Scores
from mgdarts.methods.proxies import SCORES
from mgdarts.methods.unroll import ahead
from mgdarts.search.decide import final_strength
from mgdarts.search.rules import Final, Pressure
from mgdarts.search.stages import decide
from mgdarts.space.darts import DARTS_GRAPH

TINY = {"data.subset": 100, "search.batch": 40, "search.length": 3, "search.max_epochs": 2, "search.warmup": 1,
        "search.prune_every": 1, "train.epochs": 1, "rules.samples": 1, "rules.batches": 1, "search.lambda_step": .05}
OWN = {"dass": {"rules.sparse": .5}, "random": {"rules.samples": 2},
       "shapley-nas": {"rules.ops": "skip_connect,sep_conv_3x3"},
       "zero-cost-pt": {"rules.ops": "skip_connect,sep_conv_3x3", "space.cells": 3}}


def config(method, **more):
    return preset("smoke", method, **{**TINY, **OWN.get(method, {}), **more})


@pytest.fixture(scope="module")
def splits():
    return load_data(config("mg-darts").data, 0)


def bits(search):
    return {**search.net.state_dict(), "mom": search.mom, "steps": torch.tensor(search.steps)}


@pytest.mark.parametrize("method", METHODS)
def test_a_search_goes_on_to_the_same_bits(method, splits):
    whole, heard = make_search(config(method), splits), []
    whole.events.listen(lambda e: heard.append(e.to_dict()), "stage", "epoch", "commit", "regrow", "done")
    whole.run()
    assert heard[-1]["type"] == "done" and whole.finished
    first, events = make_search(config(method), splits), []
    first.events.listen(lambda e: events.append(e.to_dict()), "stage", "epoch", "commit", "regrow", "done")
    while first.steps < .6 * whole.steps: first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make_search(config(method), splits)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.events.listen(lambda e: events.append(e.to_dict()), "stage", "epoch", "commit", "regrow", "done")
    second.run()
    assert events == heard
    a, b = bits(whole), bits(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", METHODS)
def test_search_derive_retrain(method, tmp_path, capsys):
    out = tmp_path / "run"
    sets = [f"--set={k}={v}" for k, v in {**TINY, **OWN.get(method, {})}.items()]
    assert cli.main(["search", "--preset", "smoke", "--method", method, "--out", str(out), "--json", *sets]) == 0
    result = json.loads(capsys.readouterr().out)
    arch = architecture.load(out)
    masked = sum(int((~m).sum()) for m in arch.masks.values())
    stored = sum(p.numel() for p in DerivedNet(arch, aux=False).parameters()) - masked
    assert counts(arch)["params_nonzero"] == result["derived"]["params_nonzero"] == stored
    for cell in arch.cells: # every node is fed, and by two edges with an operation each where the space says so
        for j in DARTS_GRAPH.nodes:
            into = [op.src for op in cell.ops if op.dst == j]
            if config(method).rules.identity: # and an identity beside each
                beside = [op.src for op in cell.ops if op.dst == j and op.op == "skip_connect"]
                into = [op.src for op in cell.ops if op.dst == j and op.op != "skip_connect"]
                assert into == beside
            assert into and (config(method).space.constraint == 3 or len(into) == len(set(into)) == 2)
    if config(method).space.constraint in ALIKE:
        kinds = {}
        for cell, spec in zip(arch.cells, arch.spec.cell):
            ops = [(o.op, o.src, o.dst) for o in cell.ops]
            assert kinds.setdefault(spec.reduction, ops) == ops
    if config(method).rules.fit:
        # the width is a whole number of filters, here two or three
        assert abs(result["derived"]["params_nonzero"] / 1e4 - 1) < .35
    assert cli.main(["train", str(out), "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["test_acc_final"] <= 100
    assert (out / "report.html").exists()
    bare_search(out) # and its last state can be looked at


def test_the_registry_and_the_knobs_agree():
    assert tuple(METHODS) == ("mg-darts", "darts-v1", "darts-v2", "pc-darts", "gdas", "p-darts", "gold-nas",
                              "beta-darts", "dass", "tanglenas", "proxylessnas", "zero-cost-pt", "fixed-rate", "random",
                              "shapley-nas", "csc-darts", "l-darts", "ctnas", "weaknas", "cdarts", "u-darts",
                              "pa-darts", "aca-pc-darts")
    choices = {f.name: f.metadata["choices"] for f in Rules.__dataclass_fields__.values()}
    assert set(choices["relaxation"]) == {"sigmoid", "softmax", "gumbel", "binary", "dirichlet", "uniform",
                                          "path"}
    assert set(choices["discretiser"]) == {"thresholds", "share", "rate", "argmax", "perturbation", "sample",
                                           "predictor", "comparator"}
    assert set(choices["superpose"]) == {"none", "filters", "kernels", "kernels+filters"}
    assert set(choices["init"]) == {"zero", "normal", "positive", "saliency", "synflow", "grasp", "fisher", "jacobian",
                                    "naswot"}
    assert set(choices["score"]) == set(SCORES)
    assert set(choices["regulariser"]) == {"size+threshold", "size", "none"}
    optimisation = Search.__dataclass_fields__["optimisation"].metadata["choices"]
    assert set(optimisation) == {"joint", "iterative-epoch", "iterative-half-epoch", "first-order", "second-order",
                                 "contribution", "cyclic", "none"}
    assert configure(preset("smoke"), init="saliency", beta_decay=5).rules.beta_decay == 5


@pytest.mark.parametrize("settings, says", [
    ({"method": "darts"}, "unknown method"),
    ({"rules.discretiser": "argmax"}, "search.stages=1"),
    ({"space.constraint": 1}, "searched together"),
    ({"method": "darts-v1", "rules.discretiser": "thresholds"}, "rules.relaxation"),
    ({"method": "pc-darts", "rules.partial": 3}, "multiple"),
    ({"method": "pc-darts", "train.weights": "supernet"}, "train.weights=scratch"),
    ({"method": "darts-v1", "search.granularities": "filter"}, "search.granularities"),
    ({"rules.gates": False}, "search.granularities"),
    ({"method": "gold-nas", "rules.superpose": "kernels"}, "rules.superpose=none"),
    ({"method": "gold-nas", "rules.partial": 2}, "rules.partial=1"),
    ({"method": "dass", "rules.superpose": "kernels"}, "rules.keep=1"),
    ({"method": "zero-cost-pt", "rules.aux": 0.4}, "rules.aux=0"),
    ({"method": "cdarts", "rules.aux": 0.4}, "rules.aux=0"),
    ({"method": "cdarts", "space.constraint": 2}, "space.constraint=1"),
    ({"method": "shapley-nas", "rules.relaxation": "gumbel"}, "without a draw"),
    ({"method": "l-darts", "rules.relaxation": "gumbel"}, "without a draw"),
    ({"method": "shapley-nas", "space.kind": "mobilenet"}, "space.kind=darts"),
    ({"method": "u-darts", "rules.discretiser": "sample"}, "rules.discretiser=argmax"),
    ({"method": "darts-v2", "rules.regulariser": "size"}, "rules.regulariser pushes through a loss"),
    ({"method": "cdarts", "rules.regulariser": "size+threshold"}, "rules.regulariser pushes through a loss"),
    ({"method": "shapley-nas", "rules.beta_decay": 5.}, "rules.beta_decay pushes through a loss"),
    ({"method": "zero-cost-pt", "rules.beta_decay": 5.}, "rules.beta_decay pushes through a loss"),
    ({"search.optimisation": "second-order"}, "learned thresholds learn from the whole loss|pushes through a loss"),
    ({"method": "gold-nas", "search.optimisation": "none"}, "nothing comes to be pruned"),
])
def test_rules_that_do_not_go_together(settings, says):
    with pytest.raises(InputError, match=says): preset("smoke", **settings)


def test_thresholds_on_other_images_than_the_weights(splits):
    "MG-DARTS on two levels: alpha and thresholds move in turns of their own, and what they prune grows back."
    search = make_search(preset("smoke", **{"search.optimisation": "first-order", "search.max_epochs": 8,
                                            "search.prune_every": 1}), splits)
    groups = set()
    search.events.listen(lambda e: groups.add((e.data["images"], e.data["groups"])), "update")
    events = []
    search.events.listen(events.append, "commit", "regrow")
    search.run()
    assert ("arch", ("strengths", "thresholds", "weight_thresholds")) in groups and ("train", ("weights",)) in groups
    assert {e.type for e in events} == {"commit", "regrow"} and any(sum(e.data["pruned"].values()) for e in events[:-1]
                                                                   if e.type == "commit")


def test_without_training_nothing_is_trained(splits):
    search = make_search(preset("smoke", "zero-cost-pt"), splits)
    before = [p.detach().clone() for p in search.net.parameters()]
    for _ in range(5): search.run("step")
    assert search.trial["todo"] and all(map(torch.equal, before, search.net.parameters()))


# ---------------------------------------------------------------- parts from outside

@pytest.fixture
def parts():
    "Whatever a test adds to the registries is gone afterwards."
    before = [(r, dict(r), dict(r.beside)) for r in REGISTRIES]
    yield
    for r, own, beside in before:
        r.clear(), r.beside.clear()
        r.update(own), r.beside.update(beside)
    METHODS.pop("weakest", None)


def test_a_part_and_a_method_of_ones_own(parts, splits):
    "A few lines outside the package: a decision under a name of its own, and a method that names it."
    @DECISIONS.add("weakest")
    class Weakest(Final):
        def at_end(self, search): decide(search, 1 - final_strength(search.net))
    add_method(Method("weakest", "the weakest stay", "this test", {**METHODS["darts-v1"].settings,
                                                                   "rules.discretiser": "weakest",
                                                                   "rules.zero": False}))
    cfg = config("weakest")
    assert isinstance(parts_of(cfg).decision, Weakest)
    search = make_search(cfg, splits)
    search.run()
    alpha, live = search.net.alpha, search.net.op_live
    assert search.finished and live.sum((1, 2)).tolist() == [8] * 3
    for c, e, o in live.nonzero().tolist(): assert alpha[c, e, o] == alpha[c, e].min()
    with pytest.raises(ValueError, match="already"):
        add_method(Method("weakest", "another", "", {}))


def test_a_pressure_beside_the_others(parts, splits):
    @PRESSURES.also
    class One(Pressure):
        def of_alpha(self, alpha, live, clock): return [alpha.sum() * 0 + 1]
    search, plain, seen = make_search(config("darts-v1"), splits), None, []
    search.events.listen(lambda e: seen.append(float(e.data["value"].detach())), "forward")
    search.step()
    del PRESSURES.beside["One"]
    plain = make_search(config("darts-v1"), splits)
    plain.events.listen(lambda e: seen.append(float(e.data["value"].detach())), "forward")
    plain.step()
    assert [round(a - b, 4) for a, b in zip(seen[:2], seen[2:])] == [1, 1]


def test_what_nobody_handles_fails_loudly(parts):
    with pytest.raises(InputError, match="not one of its values"): preset("smoke", **{"rules.discretiser": "mine"})
    cfg = preset("smoke", "darts-v1")
    del DECISIONS["argmax"]
    with pytest.raises(InputError, match="rules.discretiser=argmax is handled by no part"): parts_of(cfg)
    del PRESSURES.beside["BetaDecay"]
    with pytest.raises(InputError, match="rules.beta_decay is handled by no part"):
        refuse_unhandled(Rules(beta_decay=1.))
    with pytest.raises(ValueError, match="already"): DECISIONS.add("thresholds")(type("Mine", (Final,), {}))


def test_events_of_a_step(splits):
    "They come in order, for each turn, with what they say, and only where somebody listens."
    search, seen = make_search(config("darts-v2"), splits), []
    search.events.listen(lambda e: seen.append((e.type, e.data["images"], sorted(e.data))), "batch", "forward",
                         "backward", "update")
    search.step()
    # second order: both batches
    arch = [("batch", "train"), ("batch", "arch"), ("backward", "arch"), ("update", "arch")]
    assert [s[:2] for s in seen] == arch + [(type, "train") for type in ("batch", "forward", "backward", "update")]
    assert {type: data for type, _, data in seen} == {"batch": ["images", "x", "y"], "forward": ["images", "value"],
                                                      "backward": ["images"], "update": ["groups", "images"]}


@pytest.mark.parametrize("constraint", (1, 2, 3, 4))
@pytest.mark.parametrize("method", ("mg-darts", "darts-v1", "pc-darts", "gdas"))
def test_the_three_spaces(method, constraint, splits):
    """Table VI: space 1 has two edges a node and cells that are alike, space 2 cells that are alike, space 3 neither,
    and space 4 two edges a node; free connections end at the target."""
    own = {"search.stages": 1, "search.regrow": 0, "search.granularities": "operation", "search.stage_keep": 0.5,
           "search.max_epochs": 3} if method == "mg-darts" else {}
    search = make_search(config(method, **own, **{"space.constraint": constraint, "search.target_m": .015
                                                  if method != "mg-darts" else .03}), splits)
    search.run()
    live = search.net.op_live.cpu()
    if constraint in ALIKE: assert live[1].equal(live[2]) # the reduction cells
    if constraint in TWO: # learned thresholds may leave a node one edge
        assert live.sum(-1).max() == 1
        assert all(live[c, list(DARTS_GRAPH.into[j])].any(-1).sum() in ((1, 2) if method == "mg-darts" else (2,))
                   for c in range(3) for j in DARTS_GRAPH.nodes)
    elif method != "mg-darts": assert search.net.count().params <= 15_000


def test_dass_keeps_the_share_it_is_asked_for(splits):
    search = make_search(config("dass", **{"rules.keep": .6}), splits)
    search.run()
    kept = [m for c in search.net.cells for m in c.omega_live.split(c.sizes["omega"])]
    assert all(int(m.sum()) == -(-len(m) * 6 // 10) for m in kept)


def test_weights_stand_still_while_scores_are_learned(splits):
    search = make_search(config("dass", **{"search.length": 6}), splits)
    (scored,) = (p for p in search.parts.shapes if isinstance(p, Scores))
    while not scored.on(search.clock): search.step()
    before, scores = [c.omega.clone() for c in search.net.cells], [c.score.clone() for c in search.net.cells]
    search.step()
    assert all(torch.equal(a, c.omega) for a, c in zip(before, search.net.cells))
    assert not any(torch.equal(a, c.score) for a, c in zip(scores, search.net.cells))


@pytest.mark.parametrize("method", ("pc-darts", "gdas", "tanglenas", "p-darts", "fixed-rate"))
def test_the_workbench_sees_any_method(method, splits):
    from mgdarts.views.inspector import View
    search = make_search(config(method), splits)
    search.run("epoch")
    view = View(search)
    assert torch.equal(view.strength, search.net.importance()[:len(search.net.cells)])
    assert view.now.count.params == search.net.count().params


def test_second_order_leaves_the_net_alone(splits):
    search = make_search(config("darts-v2"), splits)
    search.step()
    before = {k: v.clone() for k, v in search.net.state_dict().items()}
    ahead(search)
    assert all(torch.equal(v, search.net.state_dict()[k]) for k, v in before.items())
    first = make_search(config("darts-v1"), splits)
    first.load_state_dict({**search.state_dict(), "config": {**search.state_dict()["config"],
                                                             "optimisation": "first-order"}})
    assert first.net.alpha.grad is None or not torch.equal(first.net.alpha.grad, search.net.alpha.grad)
