"The algorithm against slow, independent versions of itself."
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st

from mgdarts.fast.cell import fused, plan_cell
from mgdarts.fast.engine import FastEngine
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.derive import derive
from mgdarts.net.cost import COUNTED
from mgdarts.net.count import counts
from mgdarts.base.options import Rules
from mgdarts.net.discretise import discretise, start_thresholds, step, strongest, surrogate
from mgdarts.search.loss import Lambda, average_cost, cost, prices, regulariser, size_loss
from mgdarts.space.mobile import MobileSpec
from mgdarts.search.prune import Sizes, candidates, chance_weaker, choose, commit, evenly
from mgdarts.search.regrow import potential, quotas, regrow
from mgdarts.space.darts import NetSpec
from mgdarts.net.supernet import SuperNet

OPS, EDGES, INPUTS, STATES = NetSpec.ops, NetSpec.graph.edges, 2, 6  # of the DARTS-like space
NODE_EDGES = {n: [e for e, (_, to) in enumerate(EDGES) if to == n] for n in range(INPUTS, STATES)}


def random_net(seed, cells=3, width=4, size=8, stage=2):
    net, g = SuperNet(NetSpec(width, cells, size=size), seed=seed,
                      engine=FastEngine()), torch.Generator().manual_seed(seed)
    net.open(net.spec.ends[stage], stage)
    with torch.no_grad():
        net.alpha.add_(torch.randn(net.alpha.shape, generator=g))
        for name in net.THRESHOLDS:
            t = getattr(net, name)
            t.copy_(torch.rand(t.shape, generator=g) * (0.3 if name == "t_omega" else 0.7))
        for cell in net.cells:
            cell.beta.add_(torch.randn(cell.beta.shape, generator=g))
            cell.scale.add_(0.3 * torch.randn(cell.scale.shape, generator=g))
            cell.shift.add_(torch.randn(cell.shift.shape, generator=g))
    net.discretising = True
    return net


# --- Eq. 1-3

@pytest.mark.parametrize("x, s, h", [(0, 0, 2), (0.1, 1, 1.6), (-0.1, 0, 1.6), (0.4, 1, 0.4), (-0.4, 0, 0.4),
                                     (0.7, 1, 0.4), (1, 1, 0.4), (-1, 0, 0.4), (1.001, 1, 0), (-3, 0, 0)])
def test_step_and_surrogate(x, s, h):
    x = torch.tensor(float(x), dtype=torch.double, requires_grad=True)
    y = step(x)
    y.backward()
    assert y.item() == s and x.grad.item() == pytest.approx(h, abs=1e-12)


@given(st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_discretise_is_the_product_rule_unit_by_unit(seed, m):
    r = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (m,), generator=r)
    n = int(lengths.sum())
    g = (torch.randn(n, generator=r, dtype=torch.double)).requires_grad_()
    t = torch.rand(m, generator=r, dtype=torch.double).requires_grad_()
    live, keep = torch.rand(n, generator=r) < 0.7, torch.rand(n, generator=r) < 0.3
    grad = torch.randn(n, generator=r, dtype=torch.double)
    out = discretise(g, t, lengths, live, keep)
    out.backward(grad)
    at, want_t = 0, [0.0] * m
    for k in range(m):
        for i in range(at, at + int(lengths[k])):
            a, tk = abs(g[i].item()), t[k].item()
            x = a - tk
            on = live[i] and (x > 0 or keep[i])
            h = float(surrogate(torch.tensor(x, dtype=torch.double))) if live[i] and not (keep[i] and x <= 0) else 0.0
            assert out[i].item() == (g[i].item() if on else 0)
            assert g.grad[i].item() == pytest.approx(grad[i].item() * (float(on) + a * h), abs=1e-12)
            want_t[k] -= grad[i].item() * g[i].item() * h
        at += int(lengths[k])
    assert t.grad.tolist() == pytest.approx(want_t, abs=1e-12)


@given(st.lists(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.5, 0.9]), st.booleans()), min_size=1, max_size=5),
                min_size=1, max_size=5))
@settings(deadline=None)
def test_strongest_is_the_first_largest_live_unit(rows):
    g = torch.tensor([v for row in rows for v, _ in row])
    live = torch.tensor([b for row in rows for _, b in row])
    got = strongest(g, torch.tensor([len(r) for r in rows]), live).split([len(r) for r in rows])
    for row, mask in zip(rows, got):
        best = max((v for v, b in row if b), default=None)
        want = next((i for i, (v, b) in enumerate(row) if b and v == best), None)
        assert mask.nonzero().flatten().tolist() == ([] if want is None else [want])


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5])
def test_no_live_unit_is_off_at_the_start(margin):
    g = torch.rand(20) + 0.01
    t = start_thresholds(g, torch.tensor([5, 15]), None, margin)
    assert t.tolist() == pytest.approx([g[:5].min().item() * (1 - margin), g[5:].min().item() * (1 - margin)])
    assert margin == 0 or (discretise(g, t, torch.tensor([5, 15])) == g).all()


# --- Eq. 4, 5: every pattern of masks

def test_every_mask_pattern_of_a_node_and_of_a_convolution():
    net = SuperNet(NetSpec(2, 3, size=8), seed=5)
    net.open(0, 0)
    ops = torch.zeros(1, 14, 7, dtype=torch.bool)
    for n in range(INPUTS, STATES):
        ops[0, NODE_EDGES[n][0], 6] = True
    ops[0, 0, 0] = ops[0, 0, 3] = ops[0, 1, 5] = True  # into node 2: skip, dil conv, max pool, avg pool
    net.rebuild(ops, [net.full_gates(0)])
    net.eval().double()
    cell = net.cells[0]
    with torch.no_grad():
        for v in (cell.scale, cell.shift, cell.mean):
            v.copy_(torch.randn(v.shape, dtype=torch.double))
        cell.var.copy_(torch.rand(cell.var.shape, dtype=torch.double) + 0.5)
    x = torch.randn(2, 6, 8, 8, dtype=torch.double)
    r = torch.Generator().manual_seed(0)
    strength = torch.rand(98, generator=r, dtype=torch.double)
    live = [(0, 0), (0, 3), (0, 6), (1, 5)]
    dw, pw = cell.omega[: 2 * 9].view(2, 1, 3, 3), cell.omega[2 * 9:].view(2, 2, 1, 1)
    pre = [cell.plain[:12].view(2, 6, 1, 1), cell.plain[12:].view(2, 6, 1, 1)]
    def norm(y, i):
        mean, var, scale, shift = (v[i:i + 2].view(1, -1, 1, 1) for v in (cell.mean, cell.var, cell.scale, cell.shift))
        return (y - mean) / (var + 1e-5).sqrt() * scale + shift
    plan = plan_cell(cell)
    with torch.no_grad():
        for on in itertools.product((0, 1), repeat=4):  # operations
            for filters in itertools.product((0.0, 0.6), repeat=2):  # filters of the convolution
                for weights in itertools.product((0, 1), repeat=2):  # a weight of each kernel
                    alpha = torch.zeros(98, dtype=torch.double)
                    for keep, (e, o) in zip(on, live):
                        alpha[e * 7 + o] = strength[e * 7 + o] * keep
                    gate = torch.tensor([0.7, 0.8, 0.9, 0.4, *filters], dtype=torch.double)
                    omega = cell.omega.clone()
                    omega[4] *= weights[0]
                    omega[19] *= weights[1]
                    s = [norm(F.conv2d(F.relu(x), pre[i]), 2 * i) * gate[2 * i:2 * i + 2].view(1, -1, 1, 1)
                         for i in (0, 1)]
                    w_dw, w_pw = omega[:18].view_as(dw), omega[18:].view_as(pw)
                    conv = norm(F.conv2d(F.conv2d(F.relu(s[0]), w_dw, None, 1, 2, 2, 2), w_pw),
                                4) * gate[4:].view(1, -1, 1, 1)
                    want = (alpha[0] * s[0] + alpha[3] * conv + alpha[6] * F.max_pool2d(s[0], 3, 1, 1) + alpha[7 + 5]
                            * F.avg_pool2d(s[1], 3, 1, 1, count_include_pad=False))
                    r = F.relu(x).contiguous(memory_format=torch.channels_last)
                    how = {"alpha": alpha, "gate": gate, "omega": omega}
                    for y, *_ in (cell(x, x, **how), fused(cell, plan, r, r, **how)):
                        torch.testing.assert_close(y[:, :2], want, rtol=1e-9, atol=1e-10)


# --- loss

@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_size_loss_operation_by_operation(seed):
    r = torch.Generator().manual_seed(seed)
    alpha, live = torch.randn(2, 14, 7, generator=r, dtype=torch.double), torch.rand(2, 14, 7, generator=r) < 0.4
    cost, want = torch.rand(2, 14, 7, generator=r, dtype=torch.double), 0.0
    for c in range(2):
        for node in range(INPUTS, STATES):
            units = [(e, o) for e in NODE_EDGES[node] for o in range(7) if live[c, e, o]]
            z = sum(torch.sigmoid(alpha[c, e, o]).item() for e, o in units)
            for e, o in units:
                want += math.log(1 + len(units) * torch.sigmoid(alpha[c, e,
                                                                      o]).item() / z) * (0.5 + 2 * cost[c, e, o].item())
    assert size_loss(alpha, live, NetSpec(2, 3).node_sizes, cost, 0.5, 2.0).item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("what", ["params", "macs"])
def test_the_price_reaches_all_three_granularities(what):
    net = random_net(0)
    price, _ = regulariser(net, what, 1.0, 10.0)
    price.backward()
    assert net.alpha.grad.abs().sum() > 0
    assert all(c.beta.grad.abs().sum() > 0 and c.omega.grad.abs().sum() > 0 for c in net.cells)
    assert net.t_beta.grad.abs().sum() > 0 and net.t_omega.grad.abs().sum() > 0


@pytest.mark.parametrize("what", ["params", "macs"])
@pytest.mark.parametrize("spec", [NetSpec(4, 6, size=16), MobileSpec(6, 0.25, 10, 16)], ids=["darts", "mobilenet"])
def test_at_mu_1_the_average_cost_weighs_as_much_as_the_constant_price(spec, what):
    net = SuperNet(spec)
    net.open(spec.cells - 1, 2)
    full = torch.stack([cost(c, None, None, COUNTED[what]).detach() for c in net.cells])
    assert full.mean().item() == pytest.approx(average_cost(spec, COUNTED[what]), rel=1e-5)
    constant, both = prices(net, what, 1.0, 0.0).sum().item(), prices(net, what, 1.0, 1.0).sum().item()
    assert both == pytest.approx(2 * constant, rel=1e-4)  # all operations are equally strong


# (kappa, a commit's pruned operations, CE, R_size); what the authors' rule makes of lambda and d, from (0, 1e-5) on
LAMBDA = [
    [(1.0, 0, 2.3, 100.0), (1.0, 0, 2.3, 100.0), (1.0, 23, 2.3, 100.0), (1.0, 24, 2.3, 100.0), (1.0, 47, 2.3, 100.0),
     (1.0, 48, 2.3, 100.0), (1.0, 0, 2.3, 100.0)],
    [(1.0, 0, 1.0, 50.0)] * 9 + [(1.0, 60, 1.0, 50.0)] * 2 + [(1.0, 5, 0.2, 30.0)] * 3,
    [(0.5, 0, 1.0, 50.0)] * 9 + [(0.5, 49, 1.0, 40.0), (0.5, 10, 0.9, 35.0), (0.5, 0, 0.01, 30.0), (0.5, 0, 5.0, 30.0)],
]


@pytest.mark.parametrize("case", range(len(LAMBDA)))
def test_lambda_follows_the_authors_rule(case):
    lam, d = 0.0, 1e-5  # their way: a cap that is either where lambda stands or far away
    ours = Lambda(1e-5, 48, 24, 1 / LAMBDA[case][0][0])
    for kappa, p, ce, r in LAMBDA[case]:
        cap = lam if ce < kappa * (lam * r) else 100.0
        if p >= 4 * 12: d, lam = 1e-5, lam / 2
        elif p < 2 * 12 and lam != cap:
            d = 4 * d
            lam = lam + d
        lam = min(lam, cap)
        assert ours.update(p, ce, r) == pytest.approx(lam, rel=1e-12) and ours.d == pytest.approx(d, rel=1e-12)


# --- protection, commit, compaction

@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_ever_emptied(seed):
    net = random_net(seed)
    for name in ("t_alpha", "t_beta", "t_pre"):
        getattr(net, name).data.fill_(2.0)  # everything is under its threshold
    commit(net, 0)
    for c, cell in enumerate(net.cells):
        for n in range(INPUTS, STATES):
            ops = [(e, o) for e in NODE_EDGES[n] for o in range(7) if net.op_live[c, e, o]]
            assert len(ops) == 1
            e, o = ops[0]
            block = net.alpha[c, NODE_EDGES[n][0]:NODE_EDGES[n][-1] + 1]
            assert net.alpha[c, e, o] == block.max()
        assert all(len(ids) == 1 for gate, ids in cell.layout.gates if gate.learned)
    assert net(torch.randn(2, 3, 8, 8)).isfinite().all()


@given(st.integers(0, 1000), st.floats(0.05, 1.0))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_commit_never_overshoots(seed, share):
    net = random_net(seed, stage=1)
    target = share * net.count().params
    found = candidates(net)
    off = choose(net, found, target)
    all_off, after = (net.count(**found.masks(o)).params for o in (found.off, off))
    assert bool((off <= found.off).all()) and after >= 0.99 * target
    if all_off >= 0.99 * target:
        assert torch.equal(off, found.off)
    elif after > target:  # nothing that is off can bring it there: whatever is left would take it too far
        sizes = Sizes(net, found)
        taken = off[found.places]
        # finer units than the filters that decide on a width
        for i in (~taken & (sizes.widths() < 0)).nonzero().flatten()[:40].tolist():
            assert sizes(taken.index_fill(0, torch.tensor([i]), True)) < 0.99 * target
    below = choose(net, found, target, wait=False)
    assert net.count(**found.masks(below)).params <= target or all_off > target
    report = commit(net, target)
    assert report.after.params == after == net.count().params


def random_masks(spec, seed, pressure):
    "A net of either space with a good part of everything off."
    net = SuperNet(spec, seed=seed)
    net.open(spec.cells - 1, 2)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        net.alpha.add_(torch.randn(net.alpha.shape, generator=g))
        for name in net.THRESHOLDS:
            getattr(net, name).copy_(torch.rand(getattr(net, name).shape, generator=g) * pressure
                                     * (0.3 if name == "t_omega" else 1))
        for cell in net.cells:
            cell.beta.add_(torch.randn(cell.beta.shape, generator=g))
    net.discretising = True
    return net


@given(st.integers(0, 10_000), st.floats(0.1, 1.2), st.booleans())
@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_size_of_the_masks_is_the_size_of_the_derived_network(seed, pressure, mobile):
    spec = MobileSpec(6, 0.25, 10, 16) if mobile else NetSpec(4 + 2 * (seed % 3), 3 + seed % 4, size=16)
    net = random_masks(spec, seed, pressure)
    found = candidates(net)
    g = torch.Generator().manual_seed(seed)
    taken = torch.rand(len(found.places), generator=g) < torch.rand(1, generator=g)
    foretold, fast = net.count(**found.masks(found.only(taken))), Sizes(net, found)(taken)
    masks = found.masks(found.only(taken))
    for cell, keep in zip(net.cells, masks["weights"]):
        cell.omega_live &= keep
    net.rebuild(masks["ops"], [net.full_gates(c, k) for c, k in enumerate(masks["gates"])])
    now, arch = net.count(), derive(net)
    n = counts(arch)
    assert (foretold.derived, foretold.searched, fast) == (now.derived, now.searched, now.params)
    assert (n["params_nonzero"], n["params_deployable"], n["macs_nonzero"], n["macs"],
            n["ops"]) == (now.params, now.dense, now.macs, now.macs_dense, now.ops)
    built = sum(p.numel() for p in DerivedNet(arch).parameters())
    assert built == now.dense
    # and the super-net's own size, weight by weight
    held = sum(p.numel() for c in net.cells for p in (c.omega, c.plain, c.scale,
                                                      c.shift)) + sum(p.numel() for m in (net.stem, net.head)
                                                                      for p in m.parameters())
    assert now.searched.dense == held
    assert now.searched.params == held - sum(int((~c.omega_live).sum()) for c in net.cells)


def test_places_are_spread_in_whole_numbers():
    # of float32 the last would be rounded up to n
    for n in (1, 2, 7, 1 << 17, (1 << 24) + 3, 19_049_184, (1 << 25) - 3):
        at = evenly(n)
        assert at[0] == 0 and at[-1] == n - 1 and len(at) == min(n, 1 << 17) and bool((at.diff() > 0).all())


def test_chance_weaker_is_that_of_all_pairs():
    g = torch.Generator().manual_seed(0)
    for n, m in ((1, 1), (3, 40), (200, 7)):
        a, b = (torch.randint(0, 6, (k,), generator=g).float() for k in (n, m))
        want = sum(float(x < y) + 0.5 * float(x == y) for x in a for y in b) / (n * m)
        assert chance_weaker(a, b) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_compaction_is_exact_and_the_optimizer_goes_on(seed):
    net = random_net(seed, size=8 + 2 * (seed % 2)).double()
    x, y = torch.randn(4, 3, net.spec.size, net.spec.size, dtype=torch.double), torch.arange(4)
    opt = torch.optim.SGD(net.parameters(), 0.01, 0.9)
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    net.eval()
    with torch.no_grad():
        before = net(x)
        old = [(c.layout.slots, c.omega.clone(), opt.state[c.omega]["momentum_buffer"].clone(), c.beta.clone())
               for c in net.cells]
        commit(net, 0, opt)
        assert (net(x) - before).abs().max() <= 1e-12 * before.abs().max()
    for (slots, omega, momentum, beta), cell in zip(old, net.cells):  # slot by slot, the slow way
        where = {s: i for i, s in enumerate(slots["omega"].tolist())}
        at = torch.tensor([where[s] for s in cell.layout.slots["omega"].tolist()])
        assert torch.equal(omega[at], cell.omega)
        assert torch.equal(momentum[at], opt.state[cell.omega]["momentum_buffer"])
        where = {s: i for i, s in enumerate(slots["gates"].tolist())}
        assert torch.equal(beta[[where[s] for s in cell.layout.slots["gates"].tolist()]], cell.beta)
    inside = {id(p) for g in opt.param_groups for p in g["params"]}
    assert all(id(p) in inside for p in net.parameters())  # the authors' code loses its weights here
    net.train()
    weights = [c.omega.clone() for c in net.cells]
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.step()
    assert all((w != c.omega).any() for w, c in zip(weights, net.cells))


def test_a_pruned_unit_gets_no_gradient_and_one_that_is_off_does():
    net = random_net(1)
    net.alpha.data[0, 0] = torch.tensor([1.0, -1, 0, 0, 0, 0, 0])
    net.t_alpha.data[0, 0, 1] = 0.5  # off
    net.op_live[0, 0, 2] = False  # pruned
    net(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert net.alpha.grad[0, 0, 1] != 0 and net.alpha.grad[0, 0, 2] == 0


# --- regrowth

@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6)), min_size=1, max_size=20), st.integers(0, 60))
@settings(deadline=None)
def test_quotas_sum_exactly(pairs, num):
    p, room = torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    q = quotas(p, room, num)
    assert q.sum() == min(num, int(room.sum())) and (q <= room).all() and (q >= 0).all()


@given(st.integers(0, 2**31), st.sampled_from(["uniform", "density"]))
@settings(max_examples=25, deadline=None)
def test_potential_type_by_type(seed, cells):
    r = torch.Generator().manual_seed(seed)
    s, mom = torch.rand(3, 14, 7, generator=r, dtype=torch.double), torch.randn(3, 14, 7, generator=r,
                                                                                dtype=torch.double)
    live = torch.rand(3, 14, 7, generator=r) < 0.3
    live[:, 0, 0] = True
    got = potential(s, mom, live, cells)
    means = []
    for v in (s, mom.abs()):
        table = [[None] * 7 for _ in range(3)]
        for c in range(3):
            for o in range(7):
                units = [v[c, e, o].item() for e in range(14) if live[c, e, o]]
                table[c][o] = sum(units) / len(units) if units else None
            low = min(m for m in table[c] if m is not None)
            table[c] = [low / 2 if m is None else m for m in table[c]]
        means.append(table)
    want = [[0.0] * 7 for _ in range(3)]
    for table in means:
        total = sum(map(sum, table))
        for c in range(3):
            for o in range(7):
                want[c][o] += 0.5 * table[c][o] / (sum(table[c]) if cells == "density" else total)
    if cells == "density":
        q = [0.0] * 3
        for table in means:
            d = [sum(table[c]) / int(live[c].sum()) for c in range(3)]
            q = [a + 0.5 * b / sum(d) for a, b in zip(q, d)]
        want = [[q[c] * w for w in want[c]] for c in range(3)]
    total = sum(map(sum, want))
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.double) / total)


@given(st.sets(st.sampled_from(OPS), min_size=1), st.booleans(), st.integers(0, 2**31), st.integers(0, 300))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_only_what_was_pruned_returns(ops, mobile, seed, num):
    spec = MobileSpec(6, 0.25, 10, 16) if mobile else NetSpec(2, 3, size=8)
    net = SuperNet(spec, rules=Rules(ops=tuple(sorted(ops, key=OPS.index))))
    net.open(spec.cells - 1, 2)
    began, g = net.op_live.clone(), torch.Generator().manual_seed(seed)
    keep = torch.rand(began.shape, generator=g) < 0.5
    for cell, there in zip(keep.flatten(1), began.flatten(1)):  # no node is ever emptied
        for node, some in zip(cell.split(spec.node_sizes), there.split(spec.node_sizes)):
            node[int(some.int().argmax())] = True
    net.rebuild(began & keep, [net.full_gates(c) for c in range(spec.cells)])
    before = net.op_live.clone()
    back, _ = regrow(net, num, torch.randn(net.alpha.shape, generator=g), seed % 1000)
    assert bool((net.op_live <= began).all())
    assert len(back) == min(num, int((began & ~before).sum())) == int((net.op_live & ~before).sum())


def test_regrown_operations_start_as_the_paper_says():
    net = random_net(2)
    commit(net, 0)
    alpha, live = net.alpha.detach().clone(), net.op_live.clone()
    widths = [list(c.channels) for c in net.cells]
    back, _ = regrow(net, 40, torch.randn(net.alpha.shape, generator=torch.Generator().manual_seed(0)), 3)
    assert len(back) == 40 and torch.equal(net.alpha, alpha)  # alpha is what it was just before pruning
    for c, e, o in back:
        assert not live[c, e, o] and net.op_live[c, e, o]
        cell = net.cells[c]
        for (gate, ids), beta in zip(cell.layout.gates, cell.beta.split(cell.gate_sizes)):
            if (gate.edge, gate.op) == (e, o) and OPS[o].startswith(("sep_conv", "dil_conv")):
                assert (beta == 0).all() and len(ids) == widths[c][EDGES[e][1]]
    assert [b for b in back] == [b for b in regrow(_again(2), 40,
                                                   torch.randn(net.alpha.shape,
                                                               generator=torch.Generator().manual_seed(0)), 3)[0]]


def _again(seed):
    net = random_net(seed)
    commit(net, 0)
    return net
