"The methods of Table III in the MobileNet-like space: what a candidate is there, and whole searches."
import io
import json

import pytest
import torch
import torch.nn.functional as F

from mgdarts.base.data import load_data
from mgdarts.base.options import Compute, InputError, Rules
from mgdarts.cli import main as cli
from mgdarts.fast.engine import FastEngine
from mgdarts.methods.ctnas import ChainComparator, ChainPolicy, agreement, learn
from mgdarts.methods.registry import METHODS, preset, refused_in, spaces_of
from mgdarts.methods.sampled import SHARED
from mgdarts.methods.tanglenas import superposed
from mgdarts.methods.weaknas import features
from mgdarts.net import files as architecture
from mgdarts.net.count import count, counts
from mgdarts.net.derive import derive
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.engine import Engine
from mgdarts.net.sample import choice_sizes, fitted, random_architecture
from mgdarts.net.supernet import SuperNet
from mgdarts.runs.make import bare_search, make_search
from mgdarts.search.candidates import network_of, of_its_size, random_candidate, recalibrated, shared_accuracy
from mgdarts.search.decide import all_but, strongest_two
from mgdarts.search.prune import commit
from mgdarts.search.trial import apart, code_of, ops_of
from mgdarts.space.mobile import EXPANSIONS, MobileSpec
from mgdarts.space.operation import nests

THERE = ("random", "fixed-rate", "proxylessnas", "zero-cost-pt", "weaknas", "ctnas", "tanglenas") # Table III
TOO = ("darts-v1", "darts-v2", "beta-darts", "gdas") # nothing of these is about cells
SPEC = MobileSpec(5, .25, 10, 16, constraint=1)
CHOICES = len(SPEC.choices)
TINY = {"space.kind": "mobilenet", "data.subset": 100, "search.batch": 40, "search.length": 2, "search.max_epochs": 3,
        "search.warmup": 1, "search.prune_every": 1, "search.lambda_step": .05, "train.epochs": 1, "rules.samples": 1,
        "rules.batches": 1, "rules.recalibrate": 1, "rules.predictor": "ridge", "rules.rounds": 2,
        "rules.draw": 3, "rules.top": 6, "rules.pool": 12, "rules.hidden": 8, "rules.labelled": 8,
        "rules.comparator_epochs": 3, "rules.policy_steps": 4, "rules.own_every": 2,
        "rules.base_every": 3}


def seeded(seed): return torch.Generator().manual_seed(seed)
def drawn(seed): return strongest_two(torch.rand(5, 1, CHOICES, generator=seeded(seed)), SPEC.graph)
def images(seed, n=3): return torch.randn(n, 3, 16, 16, generator=seeded(seed)).double()
def config(method, **more): return preset("smoke", method, **{**TINY, **more})


def a_net(seed=0, engine=None, how="filters", relaxation="softmax"):
    rules = Rules(gates=False, superpose=how, relaxation=relaxation)
    net, g = SuperNet(SPEC, seed=seed, engine=engine or FastEngine(), rules=rules), seeded(seed)
    net.open(SPEC.cells - 1, 2)
    net.double()
    with torch.no_grad():
        for p in (net.alpha, net.widths): p.copy_(torch.randn(p.shape, generator=g))
        for c in net.cells: c.mean.normal_(generator=g), c.var.uniform_(.5, 2, generator=g)
    return net


@pytest.fixture(scope="module")
def splits(): return load_data(config("random").data, 0)


# ---------------------------------------------------------------- candidates

def test_a_candidate_is_a_kernel_and_an_expansion_a_layer():
    assert SPEC.two and not SPEC.alike and SPEC.kinds == [*range(5)]
    for seed in range(20):
        some = drawn(seed)
        assert some.sum((1, 2)).tolist() == [1] * 5 and ops_of(SPEC, code_of(SPEC, some)).equal(some)
        arch, (sizes, around) = network_of(SPEC, some), choice_sizes(SPEC)
        assert count(arch).params == around + int((sizes * some).sum())
        for c, cell in enumerate(arch.cells):
            (op,), (at,) = cell.ops, some[c, 0].nonzero().flatten().tolist()
            assert SPEC.choices[at] == f"{op.op}_e{op.widths[1] // op.widths[0]}"
            assert op.widths[1] == EXPANSIONS[at % 3] * op.widths[0]
    x = features(SPEC, torch.stack([drawn(s) for s in range(20)]))
    assert x.shape == (20, 5 * (3 + 3)) and (x.sum(1) == 10).all()


@pytest.mark.parametrize("how", ["filters", "kernels+filters"])
def test_what_is_judged_is_what_is_left_when_the_rest_is_pruned(how):
    "All filters beyond an expansion are off; taken away with all other blocks, nothing changes."
    if how == "kernels+filters": return superposed_candidate()
    for seed in range(3):
        net, x, some = a_net(seed).eval(), images(seed), drawn(seed)
        live = net.op_live.clone()
        net.op_live[:], net.cuts = apart(SPEC, some)
        before = net(x).detach()
        assert (net.strengths().sum(1) - 1).abs().max() < 1e-9
        net.op_live.copy_(live)
        commit(net, 0., found=all_but(net, *apart(SPEC, some)), wait=False)
        torch.testing.assert_close(net(x).detach(), before, rtol=1e-9, atol=1e-9)
        assert derive(net).cells == network_of(SPEC, some).cells


def superposed_candidate():
    "A small kernel among superposed ones is the middle of the large one."
    net, x, some = a_net(1, how="kernels+filters").eval(), images(0), drawn(1)
    net.op_live[:], net.cuts = apart(SPEC, some)
    ks = [SPEC.operations[i // 3].k for i in some.flatten(1).float().argmax(1).tolist()]
    assert len({*ks}) > 1
    mixed = net(x).detach()
    with torch.no_grad():
        for cell, k in zip(net.cells, ks):
            for w, shape in zip(cell.omega.split(cell.sizes["omega"]), cell.shapes["omega"]):
                far = (torch.arange(7) - 3).abs()
                if shape[-1] == 7: w.view(shape)[..., torch.maximum(far[:, None], far) > k // 2] = 0
    torch.testing.assert_close(net(x).detach(), mixed, rtol=1e-9, atol=1e-9)
    wide = some.view(5, 1, 3, 3).any(2).float().argmax(-1).flatten().tolist()
    gates = [cell.gates(None, net.mixture().widths[c]) for c, cell in enumerate(net.cells)]
    for (cell, g), e in zip(zip(net.cells, gates), wide):
        (own,) = [v for (gate, _), v in zip(cell.layout.gates, g.split(cell.gate_sizes)) if gate.learned]
        assert int(own.sum()) == EXPANSIONS[e] * cell.spec.inputs[0] and own.sort(descending=True)[0].equal(own)


@pytest.mark.parametrize("how", ["filters", "kernels+filters"])
@pytest.mark.parametrize("relaxation", ["softmax", "dirichlet", "binary"])
@pytest.mark.parametrize("training", [True, False])
def test_fused_is_the_reference(how, relaxation, training):
    found = []
    for engine in (FastEngine(), Engine()):
        net, x = a_net(3, engine, how, relaxation).train(training), images(2, 4)
        net.noise = seeded(5)
        y = net(x)
        of = [net.alpha, net.widths, *(c.omega for c in net.cells)]
        found.append((y, *torch.autograd.grad(y.square().sum(), of, allow_unused=True, materialize_grads=True)))
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7) # hard sigmoid: see test_mobile
    torch.testing.assert_close(*(f[0] for f in found), rtol=1e-9, atol=1e-9)


def test_three_kernels_in_one():
    w, chain = torch.rand(2, 1, 3, generator=seeded(0)), nests(SPEC.operations)
    out, share = superposed(w, torch.tensor([False, False, True]).expand(2, 1, 3), chain)
    assert chain == [(0, 1, 2)] and not out[:, :2].any()
    torch.testing.assert_close(out[:, 2], w.sum((1, 2)))
    net = a_net(0, how="kernels+filters")
    cell, v = net.cells[2], share[0].double()
    mixed = [m.view(s) for m, s in zip(cell.weights(None, 1., v).split(cell.sizes["omega"]), cell.shapes["omega"])]
    own = [m.view(s) for m, s in zip(cell.omega.split(cell.sizes["omega"]), cell.shapes["omega"])]
    at, (small, middle, large) = next(i for i, m in enumerate(own) if m.shape[-1] == 7), (w[0, 0] / w[0].sum()).double()
    naive = sum(f * F.pad(own[at][..., 3 - r:4 + r, 3 - r:4 + r], (3 - r,) * 4)
                for f, r in ((small, 1), (middle, 2), (large, 3)))
    torch.testing.assert_close(mixed[at], naive)
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(mixed, own)) if i != at)


def test_nothing_is_drawn_only_where_there_is_an_identity():
    rules = Rules(gates=False, superpose="filters", relaxation="binary", zero=True)
    net = SuperNet(MobileSpec(10, .25, 10, 16, constraint=1), rules=rules)
    net.open(9, 2)
    net.train()
    empty = torch.zeros(10)
    for seed in range(100):
        net.noise = seeded(seed)
        empty += net.strengths().detach().sum(1) < .5
    rests = torch.tensor([c.residual for c in net.spec.cell])
    assert rests.any() and not rests.all() and bool((empty[rests] > 5).all()) and not empty[~rests].any()


# ---------------------------------------------------------------- sizes

def test_candidates_have_the_size_that_is_asked_for():
    spec, taken = MobileSpec(constraint=1), []
    def draw(): return strongest_two(torch.rand(17, 1, CHOICES, generator=g), spec.graph)
    for target, within in ((7.4e6, True), (5e6, False)): # smaller than any of this width
        g, (sizes, around) = seeded(0), choice_sizes(spec)
        taken = [around + int((sizes * of_its_size(spec, draw, target)).sum()) for _ in range(20)]
        assert all(.95 * target <= n <= target for n in taken) == within
    assert max(taken) - min(taken) > 2e5 # which does not press all of them to one end


@pytest.mark.parametrize("seed", range(3))
def test_a_width_is_fitted_to_the_target(seed):
    arch = network_of(SPEC, drawn(seed))
    for share in (.3, .9, 1., 1.1, 3.):
        found = fitted(arch, target := int(share * count(arch).params))
        assert .99 * target <= count(found).params <= target
        assert [[o.op for o in c.ops] for c in found.cells] == [[o.op for o in c.ops] for c in arch.cells]
        assert count(found).params == sum(p.numel() for p in DerivedNet(found, aux=False).parameters())
    several = random_architecture(MobileSpec(5, .25, 10, 16), 200_000)
    assert 89_000 < count(fitted(several, 90_000)).params <= 90_000
    assert count(fitted(arch, 1)).params > 1 # there is nothing so small; the smallest comes


# ---------------------------------------------------------------- judging

def test_statistics_of_its_own(splits):
    search = make_search(config("random"), splits)
    for _ in range(3): search.step()
    net, before = search.net, {k: v.clone() for k, v in search.net.state_dict().items()}
    some = random_candidate(search, torch.ones(3, 1, CHOICES, dtype=torch.bool), 0)
    assert shared_accuracy(search, some, 1, 2) == shared_accuracy(search, some, 1, 2)
    assert all(v.equal(before[k]) for k, v in net.state_dict().items()) and net.cuts is None and net.momentum == .1
    batches = [search.loaders["train"].batch(0, i)[0] for i in (0, 1)]
    with recalibrated(net, batches):
        both = [c.mean.clone() for c in net.cells]
        assert not torch.equal(both[0], before["cells.0.mean"])
    first = [b for b in both]
    with recalibrated(net, batches[:1]): one = net.cells[0].mean.clone()
    with recalibrated(net, batches[1:]): two = net.cells[0].mean.clone()
    torch.testing.assert_close(first[0], (one + two) / 2, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- CTNAS in a chain

def test_a_comparator_of_chains_learns_a_ranking():
    pool = torch.stack([drawn(s) for s in range(120)])
    value = torch.rand(5, 1, CHOICES, generator=seeded(1))
    truth, codes = (pool * value).sum((1, 2, 3)), (features(SPEC, pool).float(),)
    comparator, g = ChainComparator(30, seeded(0), width=64), seeded(0)
    adam = torch.optim.Adam(comparator.parameters(), 1e-3)
    def tau(n): return agreement(comparator, (codes[0][n:],), truth[n:])
    early = tau(80)
    for _ in range(150): learn(comparator, adam, (codes[0][:80],), truth[:80], g)
    assert tau(80) > .5 > early


def test_log_probabilities_are_those_of_the_draws():
    "Of a chain of one layer, with three of six choices left."
    policy, whole, seen = ChainPolicy(2, 3, seeded(0)), torch.tensor([[[True, False, True, False, True, False]]]), {}
    some, logp, entropy = policy(3000, whole, seeded(1))
    for at, p in zip(some.flatten(1).float().argmax(1).tolist(), logp.detach().exp().tolist()):
        seen.setdefault(at, [set(), 0])
        seen[at][0].add(round(p, 6))
        seen[at][1] += 1
    assert seen.keys() == {0, 2, 4} and abs(sum(sum(ps) for ps, _ in seen.values()) - 1) < 1e-4
    for ps, n in seen.values(): assert len(ps) == 1 and abs(n / 3000 - sum(ps)) < .04


# ---------------------------------------------------------------- whole searches

def bits(search): return {**search.net.state_dict(), "steps": torch.tensor(search.steps)}


@pytest.mark.parametrize("method", THERE + TOO)
def test_a_search_goes_on_to_the_same_bits(method, splits):
    kinds = ("stage", "epoch", "candidates", "commit", "done")
    whole, heard = make_search(config(method), splits), []
    whole.events.listen(lambda e: heard.append(e.to_dict()), *kinds)
    states = []
    while not whole.finished:
        whole.step()
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
        states.append((file, len(heard)))
    tried = [i for i, (f, _) in enumerate(states) if (f.seek(0), torch.load(f, weights_only=True)["trial"])[1]]
    for at in {len(states) // 2, tried[len(tried) // 2] if tried else 0}: # in the middle of the trials, too
        (file, n), other, events = states[at], make_search(config(method), splits), []
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        other.events.listen(lambda e: events.append(e.to_dict()), *kinds)
        other.run()
        assert events == heard[n:]
        a, b = bits(whole), bits(other)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    live = whole.net.op_live.sum((1, 2))
    assert (live == 1).all() or method == "fixed-rate"


@pytest.mark.parametrize("method", THERE)
def test_search_derive_retrain(method, tmp_path, capsys):
    out, target = tmp_path / "run", 115_000
    sets = [f"--set={k}={v}" for k, v in TINY.items()]
    assert cli.main(["search", "--preset", "smoke", "--method", method, "--out", str(out), "--json", *sets]) == 0
    result, arch = json.loads(capsys.readouterr().out), architecture.load(out)
    assert counts(arch)["params_nonzero"] == result["derived"]["params_nonzero"]
    if method != "fixed-rate": # which has too few epochs here to get to its target
        assert result["reached"] and .99 * target <= count(arch).params <= target
        assert all(len(cell.ops) == 1 for cell in arch.cells)
    if (out / "candidates.json").exists():
        chosen = json.loads((out / "candidates.json").read_text())["chosen"]["code"]
        assert [c.ops[0].op for c in arch.cells] == [word.rsplit("_", 1)[0] for word in chosen.split(" | ")]
    assert cli.main(["train", str(out), "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["test_acc_final"] <= 100
    assert (out / "report.html").exists()
    bare_search(out) # and its last state can be looked at


# ---------------------------------------------------------------- who goes where

def test_claims(capsys):
    there = {name for name in METHODS if "mobilenet" in spaces_of(name)}
    assert there == {"mg-darts", *THERE, *TOO} and all("darts" in spaces_of(name) for name in METHODS)
    assert cli.main(["methods", "--json"]) == 0
    rows = {m["name"]: m["spaces"] for m in json.loads(capsys.readouterr().out)["methods"]}
    assert rows["random"] == ["darts", "mobilenet"] and rows["pc-darts"] == ["darts"]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("mg-darts", *THERE, *TOO)])
def test_others_are_refused_in_one_line(method, tmp_path, capsys):
    args = ["search", "--preset", "smoke", "--method", method, "--set", "space.kind=mobilenet"]
    assert cli.main([*args, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "space.kind=mobilenet, as " in said and said.endswith("or space.kind=darts")
    assert not (tmp_path / "run").exists() and refused_in(method, "mobilenet") in said


@pytest.mark.parametrize("settings, says", [
    ({"rules.superpose": "none"}, "rules.superpose=filters"), ({"space.constraint": 3}, "space.constraint=1"),
    ({"rules.gates": True, "rules.superpose": "none"}, "space.constraint=3"),
    ({"rules.gates": True}, "rules.gates=false"),
    ({"train.weights": "supernet"}, "train.weights=scratch"),
    ({"rules.pool_norm": True}, "no pools")])
def test_settings_that_do_not_go_with_the_space(settings, says):
    with pytest.raises(InputError, match=says): config("random", **settings)


@pytest.mark.parametrize("method", THERE)
def test_at_the_size_of_the_paper(method):
    cfg = preset("mobilenet", method)
    spec = MobileSpec.of_config(cfg, 1000, 224)
    assert (spec.cells, spec.width, cfg.search.target_m) == (17, 1.2, 7.4)
    assert cfg.rules.fit == ("rules.fit" in METHODS[method].settings) and (method == "fixed-rate" or spec.two)
    net = SuperNet(spec, rules=cfg.rules)
    net.open(16, 2)
    size = net.count().params
    assert size == 21_943_384 if method != "tanglenas" else size < 10e6 # one block a layer is stored
    assert SHARED["search.length"] == 100 and Compute().impl == "fused"
