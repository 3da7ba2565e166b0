"What the methods of the DARTS family have and MG-DARTS has not, and that each has the settings it was published with."
import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mgdarts.runs.make import make_search
from mgdarts.fast.engine import make
from mgdarts.fast.layout import natively
from mgdarts.net.discrete import DerivedNet
from mgdarts.fast import compiled
from mgdarts.base.options import Compute, InputError, Rules
from mgdarts.base.data import load_data
from mgdarts.net.derive import derive, inherited
from mgdarts.methods.darts import Normal
from mgdarts.methods.registry import METHODS, preset
from mgdarts.space.layers import AuxHead
from mgdarts.search.stages import open_stage
from mgdarts.search.step import fetch, loss_of, of_alpha
from mgdarts.space.darts import DARTS_GRAPH as GRAPH, NetSpec
from mgdarts.net.supernet import SuperNet, add_cell

POOLS = ("avg_pool_3x3", "max_pool_3x3")
POOLED = [NetSpec.ops.index(name) for name in POOLS] # their places among the operations
DARTS = dict(relaxation="softmax", gates=False, discretiser="argmax", pool_norm=True)


@pytest.fixture(params=("reference", "fused", "as on GPUs", "compiled"))
def how(request):
    "(implementation, number type, bound)"
    if request.param == "compiled" and compiled.library() is None: pytest.skip("there is no C++ compiler here")
    impl = "reference" if request.param == "reference" else "fused"
    with natively() if request.param == "as on GPUs" else contextlib.nullcontext():
        yield (impl, torch.float32, 1e-4) if request.param == "compiled" else (impl, torch.float64, 1e-9)


# ---------------------------------------------------------------- batch norms after pools

class NaiveCell(nn.Module):
    "A DARTS cell with pools only, module by module: every pool of every edge has a batch norm of its own."
    def __init__(self, spec, one):
        super().__init__()
        self.reduction, C = spec.reduction, spec.width
        self.pre = nn.ModuleList([nn.Sequential(nn.ReLU(), nn.Conv2d(n, C, 1, bias=False),
                                                nn.BatchNorm2d(C, affine=False))
                                  for n in (spec.inputs[0], spec.inputs[1])])
        self.second = None
        if spec.reduction_prev:
            self.second = nn.Conv2d(spec.inputs[0], C - C // 2, 1, 2, bias=False)
            self.pre[0][1] = nn.Conv2d(spec.inputs[0], C // 2, 1, 2, bias=False)
        strides = [2 if spec.reduction and i < GRAPH.inputs else 1 for i, _ in GRAPH.edges]
        def pools(s): return nn.AvgPool2d(3, s, 1, count_include_pad=False), nn.MaxPool2d(3, s, 1)
        self.ops = nn.ModuleList([nn.ModuleList([nn.Sequential(pool, nn.BatchNorm2d(C, affine=False))
                                                 for pool in pools(s)]) for s in strides])
        with torch.no_grad():
            convs = [self.pre[0][1], *([self.second] if self.second else []), self.pre[1][1]]
            for conv, w in zip(convs, one.plain.split([c.weight.numel() for c in convs])):
                conv.weight.copy_(w.view_as(conv.weight))

    def forward(self, x0, x1, weights): # [14, 2]
        relu, conv, norm = self.pre[0]
        x = relu(x0)
        states = [norm(conv(x) if self.second is None else torch.cat([conv(x), self.second(x[:, :, 1:, 1:])], 1)),
                  self.pre[1](x1)]
        for j in GRAPH.nodes:
            into = [(w, op, GRAPH.edges[e][0]) for e in GRAPH.into[j] for w, op in zip(weights[e], self.ops[e])]
            states.append(sum(w * op(states[i]) for w, op, i in into))
        return torch.cat(states[GRAPH.inputs:], 1)


def test_pools_against_a_plain_darts_net(how):
    impl, dtype, bound = how
    net = SuperNet(NetSpec(4, 6, size=16), engine=make(Compute(impl=impl)), rules=Rules(ops=POOLS, **DARTS))
    net.open(5, 2)
    net.alpha.data.normal_(generator=torch.Generator().manual_seed(0))
    net.to(dtype).train()
    naive = nn.ModuleList([NaiveCell(spec, one) for spec, one in zip(net.spec.cell, net.cells)]).to(dtype).train()
    alpha = net.alpha.detach()[..., POOLED].clone().requires_grad_()
    stem, head = copy.deepcopy(net.stem), copy.deepcopy(net.head)
    def plain(x):
        x0, x1 = stem(x)
        for one, a in zip(naive, alpha.softmax(-1)): x0, x1 = x1, one(x0, x1, a)
        return head(x1)
    def close(a, b): torch.testing.assert_close(a, b, rtol=bound, atol=bound * float(b.detach().abs().max()))
    g = torch.Generator().manual_seed(1)
    for _ in range(3): # running statistics move
        x, y = torch.randn(8, 3, 16, 16, generator=g).to(dtype), torch.randint(10, (8,), generator=g)
        ours, theirs = net(x), plain(x)
        close(ours, theirs)
        net.zero_grad()
        naive.zero_grad()
        alpha.grad = None
        F.cross_entropy(ours, y).backward()
        F.cross_entropy(theirs, y).backward()
        close(net.alpha.grad[..., POOLED], alpha.grad)
        for one, other in zip(net.cells, naive):
            close(one.plain.grad,
                  torch.cat([m.weight.grad.flatten()
                             for m in ([other.pre[0][1]] + ([other.second] if other.second else [])
                                       + [other.pre[1][1]])]))
    for one, other in zip(net.cells, naive):
        means, variances = (v.view(GRAPH.states - 1, 2, 4 * 2 ** one.spec.stage) for v in (one.pool_mean, one.pool_var))
        for e, (i, _) in enumerate(GRAPH.edges): # those of all edges from a state are the same
            for k in range(2):
                close(means[i, k], other.ops[e][k][1].running_mean)
                close(variances[i, k], other.ops[e][k][1].running_var)
    close(net.eval()(x), (naive.eval(), stem.eval(), plain(x))[2])


@pytest.mark.parametrize("partial", (1, 4))
def test_both_implementations_with_pool_norms(partial):
    nets = []
    for impl in ("reference", "fused"):
        n = SuperNet(NetSpec(8, 6, size=10, constraint=1, partial=partial),
                     engine=make(Compute(impl=impl, recompute="all")),
                     rules=Rules(partial=partial, edge_norm=partial > 1, **DARTS))
        n.open(5, 2)
        Normal().fresh(n)
        nets.append(n.double().train())
    x, out = torch.randn(4, 3, 10, 10, dtype=torch.double, generator=torch.Generator().manual_seed(0)), []
    for n in nets:
        y = n(x.clone()) if partial > 1 else n(x.clone())
        y.square().sum().backward()
        out.append([y, *(p.grad for p in n.parameters() if p.grad is not None),
                    *(v for c in n.cells for v in c.statistics), n.eval()(x)])
    for a, b in zip(*out): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    width = 8 // partial
    # of the channels that operations see
    assert [len(c.pool_mean) for c in nets[0].cells] == [10 * width * 2 ** c.spec.stage for c in nets[0].cells]
    assert nets[0].count().searched.params == nets[0].spec.params # nothing to count


def test_drop_out_on_skips_is_that_of_both_implementations():
    out, x = [], torch.randn(8, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for impl in ("reference", "fused"):
        n = SuperNet(NetSpec(4, 3, size=8, constraint=1), engine=make(Compute(impl=impl)), rules=Rules(**DARTS))
        n.open(2, 2)
        n.double().train()
        n.skip_dropout, n.noise = .4, torch.Generator().manual_seed(1)
        out.append(n(x))
        n.skip_dropout = 0.
        assert not torch.allclose(out[-1], n(x))
    torch.testing.assert_close(*out, rtol=1e-9, atol=1e-9)


def test_pool_statistics_where_paths_are_drawn():
    "What was not drawn keeps its statistics; what was drawn on one edge or several moves once."
    rules = Rules(**{**DARTS, "relaxation": "gumbel"}, ops=POOLS + ("skip_connect",))
    n = SuperNet(NetSpec(4, 3, size=8, constraint=1), rules=rules)
    n.open(2, 2)
    n.double().train()
    x = torch.randn(8, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    old = [(c.pool_mean.clone(), c.pool_var.clone()) for c in n.cells]
    n.paths, n.noise = True, torch.Generator().manual_seed(3)
    drawn = n.mixture(True).chosen
    n.noise = torch.Generator().manual_seed(3)
    n(x)
    still = 0
    for c, (mean, var), one in zip(n.cells, old, drawn):
        moved = [(a != b).view(GRAPH.states - 1, 2, -1).any(-1) for a, b in ((c.pool_mean, mean), (c.pool_var, var))]
        for s in range(GRAPH.states - 1):
            for k, o in enumerate(POOLED):
                there = bool(one[[e for e, (i, _) in enumerate(GRAPH.edges) if i == s], o].any())
                assert bool(moved[0][s, k]) == bool(moved[1][s, k]) == there
                still += not there
    assert 0 < still < 30


def test_pool_statistics_follow_every_layout():
    """Pruned, compacted, grown again: what stays keeps its statistics, what comes back has fresh ones; nothing that is
    0 changes what a training step sees."""
    net, g = SuperNet(NetSpec(4, 3, size=8), engine=make(Compute()),
                      rules=Rules(pool_norm=True)), torch.Generator().manual_seed(0)
    net.open(2, 2)
    net.double().train()
    for c in net.cells:
        c.pool_mean.normal_(generator=g)
        c.pool_var.uniform_(1, 2, generator=g)
    ops, gates = torch.rand(3, 14, 7, generator=g) < .6, []
    ops[:, [GRAPH.into[j][0] for j in GRAPH.nodes], 1] = True
    for c in net.cells:
        keep = torch.rand(len(c.spec.gates), c.spec.width, generator=g) < .7
        keep[:, 0] = True
        keep[[not gate.learned for gate in c.spec.gates]] = True # a strided skip goes as a whole
        gates.append(keep.flatten())
    small = copy.deepcopy(net)
    before = [dict(zip(c.pool_slots.tolist(), zip(c.pool_mean.tolist(), c.pool_var.tolist()))) for c in small.cells]
    small.rebuild(ops, gates)
    for c, old in zip(small.cells, before):
        new = dict(zip(c.pool_slots.tolist(), zip(c.pool_mean.tolist(), c.pool_var.tolist())))
        assert 0 < len(new) < len(old) and all(old[k] == v for k, v in new.items())
    for c, keep in zip(net.cells, gates):
        # everything is stored, and what is pruned is switched off
        c.gates = lambda t, widths=None, c=c, keep=keep: torch.sigmoid(c.beta) * keep
    net.op_live[:] = ops
    x = torch.randn(8, 3, 8, 8, dtype=torch.double, generator=g)
    with torch.no_grad(): torch.testing.assert_close(small(x), net(x), rtol=1e-9, atol=1e-9)
    grown = copy.deepcopy(small)
    kept = [set(c.pool_slots.tolist()) for c in grown.cells]
    for c in grown.cells:
        c.pool_mean.fill_(7.)
        c.pool_var.fill_(3.)
    grown.rebuild(torch.ones_like(ops), [torch.ones_like(k) for k in gates])
    for c, old in zip(grown.cells, kept):
        for slot, mean, var in zip(c.pool_slots.tolist(), c.pool_mean.tolist(), c.pool_var.tolist()):
            assert (mean, var) == ((7., 3.) if slot in old else (0., 1.))


def test_a_derived_network_begins_with_the_pools_statistics():
    "Where only whole operations were pruned it computes what the super-net computed."
    net, g = SuperNet(NetSpec(4, 3, size=16), rules=Rules(pool_norm=True)), torch.Generator().manual_seed(0)
    net.open(2, 2)
    ops = torch.rand(3, 14, 7, generator=g) < .5
    ops[..., 0] = False
    ops[:, :, 6] = True
    net.rebuild(ops, [net.full_gates(c) for c in range(3)])
    net.alpha.data.normal_(generator=g)
    x = torch.randn(8, 3, 16, 16, generator=g)
    for _ in range(3): net.train()(x)
    arch = derive(net)
    derived = DerivedNet(arch, aux=False)
    derived.load_state_dict(inherited(net, arch))
    with torch.no_grad(): a, b = net.eval()(x), derived.eval()(x)[0]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_a_net_without_pool_norms_is_saved_as_before():
    net = SuperNet(NetSpec(4, 3, size=8))
    net.open(2, 2)
    assert not any("pool" in k for k in net.state_dict()) and [len(c.statistics) for c in net.cells] == [2] * 3


# ---------------------------------------------------------------- PC-DARTS

@pytest.mark.parametrize("partial", (1, 2, 4))
def test_preprocessing_after_a_reduction_is_one_of_all_channels(partial):
    """ReLU, two strided convolutions side by side, batch norm; then the first channels are for the operations, and the
    others go round them."""
    spec = NetSpec(8, 6, size=8, constraint=1, partial=partial)
    net = SuperNet(spec, rules=Rules(partial=partial, edge_norm=partial > 1, **{**DARTS, "pool_norm": False}),
                   engine=make(Compute(impl="reference")))
    net.open(5, 2)
    c = net.double().cells[3]
    assert c.spec.reduction_prev
    C = c.spec.width + c.spec.rest
    segs = [(seg, w.view(shape)) for (seg, shape), w in zip([k for k in c.layout.kernels if k[0].group == "plain"],
                                                            c.plain.split(c.sizes["plain"])) if seg.edge == -1]
    even, odd = (torch.cat([w for seg, w in segs if seg.role[0] == r]) for r in "ab")
    assert len(even) == C // 2 and len(odd) == C - C // 2
    rows = torch.cat([torch.arange(seg.row0, seg.row0 + seg.rows) for seg, _ in segs])
    where = torch.cat([torch.arange(c.spec.state(0)[0], c.spec.state(0)[0] + c.spec.width),
                       torch.arange(c.spec.rest_unit(0), c.spec.rest_unit(0) + c.spec.rest)])
    assert torch.equal(rows, where) # the order of the channels
    assert c.spec.sizes["plain"] == sum(w.numel() for w in c.plain.split(c.sizes["plain"]))
    x = torch.randn(4, c.spec.inputs[0], 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    both = torch.cat([F.conv2d(F.relu(x), even, None, 2), F.conv2d(F.relu(x)[:, :, 1:, 1:], odd, None, 2)], 1)
    whole, mean = F.batch_norm(both, None, None, training=True), both.mean((0, 2, 3))
    x1 = torch.randn(4, c.spec.inputs[1], 4, 4, dtype=torch.double)
    alpha, edges = torch.zeros(98, dtype=torch.double), torch.zeros(14, dtype=torch.double)
    alpha[0], edges[0] = 1., 1. # node 2 is its first edge's skip connection, and nothing else
    y, means, _ = c(x, x1, alpha=alpha, t_gate=None, t_weight=None, edges=edges)
    torch.testing.assert_close(means[:C], mean) # batch norm channel by channel
    expected = whole if partial == 1 else whole.view(4, partial, C // partial, 4, 4).transpose(1, 2).reshape(4, C, 4, 4)
    torch.testing.assert_close(y[:, :C], expected)


def test_edges_start_with_noise_too():
    search = make_search(preset("smoke", "pc-darts", **{"data.subset": 100, "search.batch": 40}))
    net = search.net
    for p in (net.alpha, net.zero, net.edge):
        kinds = p.detach()[sorted(set(net.spec.kinds))]
        assert 2e-4 < kinds.std() < 3e-3 and kinds.unique().numel() == kinds.numel()
        assert torch.equal(p[0], p[[i for i, k in enumerate(net.spec.kinds) if k == 0][-1]])
    assert not torch.equal(net.zero.detach(), net.edge.detach())


def test_states_of_another_preprocessing_are_refused():
    def make(method): # as the configuration of an old run is read
        return make_search(preset("smoke", method, **{"data.subset": 100, "search.batch": 40, "search.length": 3,
                                                      "rules.pool_norm": False, "search.threshold_init": "own",
                                                      "search.lambda_cap_fine": .5}))
    def old(search):
        state = search.state_dict()
        rules = {k: v for k, v in state["rules"].items() if k not in ("pool_norm", "aux")}
        config = {k: v for k, v in state["config"].items() if k not in ("lambda_cap_fine", "label_smoothing")}
        return {**state, "version": 1, "rules": rules, "config": {**config, "threshold_init": "min"}}
    search = make("pc-darts")
    search.step()
    make("pc-darts").load_state_dict(search.state_dict())
    with pytest.raises(InputError, match="older version"): make("pc-darts").load_state_dict(old(search))
    search.run()
    assert search.settled
    make("pc-darts").load_state_dict(old(search)) # what has been decided has whole channels, as before
    search, again = make("darts-v1"), make("darts-v1")
    search.step()
    again.load_state_dict(old(search)) # other methods are what they were
    search.run()
    again.run()
    assert all(torch.equal(a, b) for a, b in zip(search.net.state_dict().values(), again.net.state_dict().values()))


# ---------------------------------------------------------------- settings

FAMILY = {"search.batch": 64, "search.length": 50, "search.momentum": .9, "search.weight_decay": 3e-4,
          "search.clip": 5., "search.lr_weights": .025, "search.lr_end": .001, "search.nesterov": False,
          "search.adam": True, "search.adam_beta": .5, "search.lr_arch": 3e-4, "search.arch_decay": 1e-3,
          "search.arch_speed": 1., "search.label_smoothing": 0., "search.optimisation": "first-order",
          "rules.init": "normal", "rules.weights_only": 0., "rules.zero": True, "rules.gates": False,
          "rules.pool_norm": True, "rules.aux": 0., "data.autoaugment": False, "data.search_cutout": False,
          "data.cutout": -1, "data.flip": True, "data.crop": -1}
PUBLISHED = {
    "darts-v1": {}, "darts-v2": {"search.optimisation": "second-order"}, "beta-darts": {"rules.beta_decay": 50.},
    "pc-darts": {"search.batch": 256, "search.lr_weights": .1, "search.lr_end": 0., "search.lr_arch": 6e-4,
                 "rules.partial": 4, "rules.edge_norm": True, "rules.weights_only": .3},
    "gdas": {"search.batch": 256, "search.length": 250, "search.nesterov": True, "search.weight_decay": 5e-4,
             "rules.tau": (10., .1), "rules.pool_norm": False, "rules.relaxation": "gumbel"},
    "p-darts": {"search.batch": 96, "search.lr_end": 0., "search.lr_arch": 6e-4, "rules.weights_only": .4,
                "rules.skip_dropout": (.1, .4, .7), "rules.max_skips": 2},
    "dass": {"search.length": 70, "rules.keep": .9},
    "tanglenas": {"search.lr_end": 0., "search.nesterov": True, "rules.relaxation": "dirichlet",
                  "rules.superpose": "kernels"},
    "proxylessnas": {"search.batch": 256, "search.length": 160, "search.lr_end": 0., "search.nesterov": True,
                     "search.weight_decay": 4e-5, "search.clip": 0., "search.label_smoothing": .1,
                     "search.lr_arch": 1e-3, "search.adam_beta": 0., "search.arch_decay": 0.,
                     "rules.weights_only": .25, "rules.arch_every": 5},
    "zero-cost-pt": {"search.length": 0, "search.optimisation": "none", "rules.zero": False, "rules.init": "zero",
                     "rules.samples": 10, "rules.batches": 100},
    "random": {"search.length": 100, "search.clip": .25, "search.optimisation": "joint", "rules.zero": False,
               "rules.init": "zero", "rules.weights_only": 1., "rules.samples": 1000, "rules.batches": 10},
    "csc-darts": {"search.optimisation": "second-order", "rules.partial": 2, "rules.identity": True,
                  "rules.edge_norm": False},
    "u-darts": {"search.optimisation": "second-order", "search.length": 100, "search.arch_decay": 0.,
                "space.constraint": 4, "data.search_cutout": True, "rules.redraw": 100, "rules.complexity": .0175,
                "rules.drawn_decay": 1e-3, "rules.aux": .4, "rules.init": "positive"},
    "aca-pc-darts": {"search.batch": 256, "search.lr_weights": .1, "search.lr_end": 0., "search.lr_arch": 6e-4,
                     "rules.partial": 4, "rules.edge_norm": True, "rules.weights_only": .3, "rules.zero": False},
    "pa-darts": {"search.batch": 256, "search.lr_weights": .1, "search.lr_end": 0., "search.lr_arch": 6e-4,
                 "rules.partial": 2, "rules.parts": (8, 4, 2), "rules.growth": (1., 1., 1.), "rules.edge_norm": True,
                 "rules.attention": "cbam", "rules.weights_only": .4},
    "l-darts": {"search.batch": 256, "search.lr_weights": .1, "search.lr_end": 0., "search.lr_arch": 6e-4,
                "rules.partial": 4, "rules.edge_norm": True, "rules.weights_only": .3, "rules.zero": False,
                "rules.normalise": "each"},
    "shapley-nas": {"search.batch": 256, "search.lr_weights": .1, "search.lr_end": 0., "rules.partial": 4,
                    "rules.edge_norm": False, "rules.zero": False, "rules.weights_only": .5, "search.adam": False,
                    "search.optimisation": "contribution", "rules.samples": 10, "rules.batches": 4,
                    "rules.truncate": .5, "rules.credit_momentum": .8, "rules.credit_step": .1},
    **{name: {"search.length": epochs, "search.clip": .25, "search.optimisation": "joint", "rules.zero": False,
              "rules.init": "zero", "rules.weights_only": 1., **more}  # a super-net trained as for `random`
       for name, epochs, more in (("ctnas", 120, {"rules.labelled": 423, "rules.comparator_epochs": 1000,
                                                  "rules.policy_steps": 10000, "rules.own_every": 100,
                                                  "rules.base_every": 500}),
                                  ("weaknas", 100, {"rules.pool": 10000, "rules.rounds": 10, "rules.draw": 100,
                                                    "rules.top": 1000}))},
    "cdarts": {"search.batch": 256, "search.lr_weights": .2, "rules.lr_evaluation": .2, "search.lr_end": -1.,
               "search.weight_decay": 0., "search.arch_decay": 0., "search.length": 32, "search.warmup": 2,
               "rules.weights_only": -1., "search.optimisation": "cyclic", "rules.depth": 2.5, "rules.cycle": 1,
               "rules.cycle_warmup": 1, "rules.temperature": 2., "rules.plain": 5., "rules.plain_share": .2},
}
ONE_LEVEL = {"search.batch": 96, "search.lr_weights": .01, "search.lr_arch": 1., "search.lr_end": -1.,
             "search.weight_decay": 3e-4, "search.adam": False, "data.autoaugment": True, "data.search_cutout": True,
             "rules.pool_norm": False, "rules.init": "zero"}
PUBLISHED_ONE_LEVEL = {"mg-darts": {"rules.aux": 0.}, "fixed-rate": {"rules.aux": 0.},
                       "gold-nas": {"rules.aux": .4, "rules.ops": ("skip_connect", "sep_conv_3x3"),
                                    "rules.share_min": .01, "rules.share_max": .05, "rules.share_n": 4,
                                    "search.lambda_growth": 2., "search.lambda_step": 1e-5, "rules.gates": False}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ("small", "large"))
def test_the_long_presets_have_the_published_settings(name, method):
    assert {*PUBLISHED, *PUBLISHED_ONE_LEVEL} == {*METHODS}
    cfg = preset(name, method)
    for key, value in ({**FAMILY, **PUBLISHED[method]} if method in PUBLISHED
                       else {**ONE_LEVEL, **PUBLISHED_ONE_LEVEL[method]}).items():
        part, knob = key.split(".")
        assert getattr(getattr(cfg, part), knob) == value, key


@pytest.fixture(scope="module")
def splits():
    return load_data(preset("smoke", **{"data.subset": 100}).data, 0)


def test_temperature_drop_out_and_regulariser_by_the_published_formulas(splits):
    small = {"data.subset": 100, "search.batch": 40, "search.length": 7}
    def watch(method, what, **more):
        search, seen = make_search(preset("smoke", method, **{**small, **more}), splits), {}
        def note(event):
            seen.setdefault((search.stage, search.phase_epoch + (0 if search.warmup else search.warm_epochs)),
                            set()).add(what(search))
        search.events.listen(note, "update")
        search.run()
        return seen
    for (_, epoch), tau in watch("gdas", lambda s: s.net.tau).items():
        assert list(tau) == pytest.approx([10 - (10 - .1) * epoch / 6])
    stages = watch("p-darts", lambda s: s.net.skip_dropout, **{"search.length": 20})
    assert {stage for stage, _ in stages} == {0, 1, 2} and len(stages) == 30
    for (stage, epoch), p in stages.items(): # ten epochs a stage, four of them for the weights only
        assert list(p) == pytest.approx([(.1, .4, .7)[stage] * ((10 - epoch - 1) / 10 if epoch < 4
                                                                else math.exp(-.2 * (epoch - 4)))])
    search = make_search(preset("smoke", "beta-darts", **small), splits)
    search.run("epoch")
    search.run("epoch")
    alpha = torch.zeros_like(search.net.alpha)
    torch.testing.assert_close(sum(of_alpha(search, alpha)), torch.tensor(50 * 2 / 7 * math.log(7)))


def test_rates_fall_at_the_beginning_of_an_epoch(splits):
    "In 64-bit numbers 29/50 of 50 is a little less than 29."
    search = make_search(preset("smoke", "darts-v1", **{"data.subset": 100, "search.length": 50}), splits)
    search.step()
    search.state.phase_epoch = 29
    assert search.clock.share * 50 < 29 and search.clock.turn == 29


def test_smoothing_is_for_the_weights_only(splits, monkeypatch):
    search, seen = make_search(preset("smoke", "proxylessnas", **{"data.subset": 100, "search.batch": 40,
                                                                  "search.length": 1, "rules.weights_only": 0.,
                                                                  "rules.arch_every": 1}), splits), []
    original = F.cross_entropy
    monkeypatch.setattr("mgdarts.search.step.F.cross_entropy", lambda *a,
                        **k: seen.append(k.get("label_smoothing", 0.)) or original(*a, **k))
    search.step()
    assert seen[:3] == [0., 0., .1] # alpha's loss; what is reported; the weights' loss


def test_the_second_head_of_gold_nas(splits):
    "Its loss has a weight of 0.4, its weights learn, it follows what is pruned, and it is not counted."
    search = make_search(preset("smoke", "gold-nas", **{"data.subset": 100, "search.batch": 40, "search.max_epochs": 3,
                                                        "search.lambda_step": .05, "search.target_m": .007}), splits)
    plain = make_search(preset("smoke", "gold-nas", **{"data.subset": 100, "search.batch": 40, "search.target_m": .007,
                                                       "rules.aux": 0.}), splits)
    open_stage(search)
    open_stage(plain)
    net = search.net
    assert isinstance(net.aux, AuxHead) and plain.net.aux is None and net.count().params == plain.net.count().params
    x, y = fetch(search)
    net.train()
    plain.net.train()
    also = []
    with torch.no_grad():
        net(x, also)
        loss, other = loss_of(search, x, y)[0], loss_of(plain, x, y)[0]
    torch.testing.assert_close(loss - other, .4 * F.cross_entropy(also[0], y))
    assert any(p is net.aux.reads for g in search.optimizer.param_groups if g["name"] == "weights" for p in g["params"])
    before = net.aux.classifier.weight.clone()
    search.step()
    assert not torch.equal(before, net.aux.classifier.weight)
    search.run()
    assert search.finished


def test_the_second_head_follows_the_channels_it_reads():
    net = SuperNet(NetSpec(4, 6, size=16), rules=Rules(aux=.4))
    net.open(5, 2)
    ops, gates = torch.zeros(6, 14, 7, dtype=torch.bool), [net.full_gates(c) for c in range(6)]
    ops[:, [GRAPH.into[j][0] for j in GRAPH.nodes], 1] = True # a separable convolution into every node
    for gate in net.spec.cell[4].gates:
        if gate.role == "out" and gate.edge == GRAPH.into[3][0]: gates[4][gate.start:gate.start + 5] = False
    before, width = net.aux.reads.detach().clone(), net.spec.cell[4].width
    moved = net.rebuild(ops, gates)
    left = torch.tensor([c for c in range(4 * width) if not width <= c < width + 5])
    assert torch.equal(net.aux.reads.detach(), before[:, left]) and any(new is net.aux.reads for _, new, *_ in moved)
    also = []
    net(torch.randn(2, 3, 16, 16), also)
    assert also[0].shape == (2, 10)
    again = SuperNet(NetSpec(4, 6, size=16), rules=Rules(aux=.4), seed=1)
    for c in net.cells: add_cell(again, c.layout.ops, c.layout.alive)
    again.open(5, 2)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.aux.reads, net.aux.reads)
