"The fast super-net against the plain one, and its kernels against plain PyTorch."
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from mgdarts.fast.compiled import compiled
from mgdarts.fast.convolutions import Pair, pairs
from mgdarts.fast.layout import from_phases, images_abreast, narrow, pixels, from_pixels, widen
from mgdarts.fast.norms import weighted_sum
from mgdarts.space.darts import EDGES, INPUTS, NODE_EDGES, OPS, STATES, NetSpec
from mgdarts.net.supernet import SuperNet
from mgdarts.net.engine import Engine
from mgdarts.fast.engine import FastEngine
from mgdarts.base.options import Compute


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(memory_format=torch.channels_last)


@given(n=st.integers(1, 200), channels=st.integers(1, 70))
def test_images_abreast_divide_the_batch_and_fill_no_more_than_64_channels(n, channels):
    b = images_abreast(n, channels)
    assert n % b == 0 and (b == 1 or b * channels <= 64)


@settings(max_examples=25, deadline=None)
@given(b=st.sampled_from((1, 2, 4)), m=st.integers(1, 3), c=st.integers(1, 5), h=st.integers(1, 6), w=st.integers(1, 6))
def test_views_of_wide_maps_keep_every_number(b, m, c, h, w):
    x = draw(b * m, c, h, w)
    wide = widen(x, b)
    assert narrow(wide, b).equal(x)
    assert from_pixels(pixels(wide, b), b).equal(wide) and pixels(wide, b).flatten().sort()[0].equal(x.flatten().sort()[0])


@settings(max_examples=80, deadline=None)
@given(b=st.sampled_from((1, 2, 4)), c=st.integers(1, 20), f=st.integers(1, 20), side=st.integers(1, 11), stride=st.sampled_from((1, 2)), threads=st.sampled_from((1, 1, 3)),
       kinds=st.lists(st.tuples(st.sampled_from((3, 5)), st.booleans()), min_size=1, max_size=4), relu=st.booleans(), dtype=st.sampled_from((torch.double, torch.float)))
def test_pairs_of_convolutions(b, c, f, side, stride, threads, kinds, relu, dtype):
    x = draw(4, c, side, side)
    weights = [w for i, (k, _) in enumerate(kinds) for w in (draw(c, 1, k, k, seed=i), draw(f, c, 1, 1, seed=9 + i))]

    def fast(x, *ws):
        ys = pairs(widen(x, b), [Pair(d.repeat(b, 1, 1, 1), p, None, f, stride, dil) for d, p, (_, dil) in zip(ws[::2], ws[1::2], kinds)], b, relu)
        return torch.cat([narrow(from_phases(y) if dil and stride == 1 and side % 2 == 0 else y, b) for y, (_, dil) in zip(ys, kinds)], 1)

    def plain(x, *ws):
        r = F.relu(x) if relu else x
        return torch.cat([F.conv2d(F.conv2d(r, d, None, stride, (1 + dil) * (d.shape[-1] // 2), 1 + dil, c), p) for d, p, (_, dil) in zip(ws[::2], ws[1::2], kinds)], 1)

    results = []
    for fn, number in ((fast, dtype), (plain, torch.double)):
        args = [a.to(number, copy=True).requires_grad_() for a in (x, *weights)]
        torch.set_num_threads(threads if fn is fast else 1)
        y = fn(*args)
        results.append([y.detach(), *torch.autograd.grad((y * draw(*y.shape, seed=7).to(number)).sum(), args)])
        torch.set_num_threads(1)
    for p, q in zip(*results):
        if dtype == torch.double:
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
        else:
            assert (p - q).abs().max() < 1e-5 * q.abs().max().clamp(min=1e-6), compiled(x.to(dtype))


@pytest.mark.parametrize("n", [1, 3])
def test_weighted_sums(n):
    maps, f = [draw(4, 3, 2, 2, seed=i).requires_grad_() for i in range(n)], draw(n, 1, 1, 1, seed=9).flatten().requires_grad_()
    y, weight = weighted_sum([widen(x, 2) for x in maps], f), draw(4, 3, 2, 2, seed=7)
    (narrow(y, 2) * weight).sum().backward()
    torch.testing.assert_close(narrow(y, 2), sum(k * x for k, x in zip(f, maps)))
    for k, x, g in zip(f, maps, f.grad):
        torch.testing.assert_close(x.grad, k.detach() * weight)
        assert g.item() == pytest.approx((x * weight).sum().item())


def random_net(seed, size, dtype, cells=3, width=4):
    g = torch.Generator().manual_seed(seed)
    net = SuperNet(NetSpec(width, cells, size=size), seed=seed)
    net.open(cells - 1, 2)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.startswith("t_"):
                p.copy_(torch.rand(p.shape, generator=g) * (0.1 if "omega" in name else 0.7))
            elif name == "alpha" or name.endswith(("beta", "scale", "shift")):
                p.add_(torch.randn(p.shape, generator=g))
        for c in net.cells:
            c.omega_live &= torch.rand(c.omega_live.shape, generator=g) < 0.9
    net.discretising = True
    return net.to(dtype)


def prune(net, seed, share):
    g = torch.Generator().manual_seed(seed)
    ops = torch.rand(len(net.cells), len(EDGES), len(OPS), generator=g) < share
    for node in range(INPUTS, STATES):
        ops[:, NODE_EDGES[node][0], int(torch.randint(len(OPS), (1,), generator=g))] = True
    gates = [torch.rand(len(c.spec.gates), c.spec.width, generator=g) < 0.6 for c in net.cells]
    for keep in gates:
        keep[:, 0] = True
    net.rebuild(ops, [keep.flatten() for keep in gates])


def difference(net, x):
    "Relative, largest over outputs, gradients of every parameter and running statistics."
    seen = []
    for engine in (Engine(), FastEngine()):
        twin = copy.deepcopy(net)
        twin.engine = engine
        y = twin(x)
        (y**2).mean().backward()
        seen.append([y.detach()] + [p.grad for p in twin.parameters() if p.grad is not None] + [v for c in twin.cells for v in (c.mean, c.var)])
    assert len(seen[0]) == len(seen[1])
    return max(float((a - b).norm() / a.norm().clamp(min=1e-8)) for a, b in zip(*seen) if len(a.flatten()))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype, tol", [(torch.double, 1e-9), (torch.float, 1e-4)])
def test_fused_is_the_reference(seed, dtype, tol):
    size = (16, 8, 10)[seed % 3]  # maps with odd sides too
    net = random_net(seed, size, dtype)
    x = torch.randn(8 if seed % 2 else 6, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    assert difference(net, x) <= tol  # normal cells, and reduction cells with both strides
    prune(net, seed, 0.4)
    assert difference(net, x) <= tol
    assert difference(net.eval(), x) <= tol
    prune(net.train(), seed + 1, 0.1)  # nodes of one operation; operations that come back
    assert difference(net, x) <= tol


@pytest.mark.parametrize("how", ["recompute", "native"])
def test_other_ways_to_the_same_gradients(how, monkeypatch):
    net = random_net(1, 8, torch.double)
    prune(net, 1, 0.5)
    x, seen = torch.randn(4, 3, 8, 8, dtype=torch.double), []
    for other in (False, True):
        twin = copy.deepcopy(net)
        twin.engine = FastEngine(Compute(recompute="all" if other and how == "recompute" else "none"))
        if other and how == "native":
            for module in ("kernels", "parts", "cell", "engine"): monkeypatch.setattr(f"mgdarts.fast.{module}.native", lambda x: True)
        twin(x).square().mean().backward()
        seen.append([p.grad for p in twin.parameters() if p.grad is not None] + [c.var for c in twin.cells])
    for a, b in zip(*seen):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_compiled_cell_computes_the_same_before_and_after_a_commit(monkeypatch):
    # the compiler's own backend needs a C++ compiler; this one traces the graph and runs it
    monkeypatch.setattr(FastEngine, "COMPILER", "aot_eager")
    net = SuperNet(NetSpec(2, 3, size=8), seed=1, engine=FastEngine())
    net.open(0, 0)
    net.discretising = True
    twin = copy.deepcopy(net)
    twin.engine = FastEngine(Compute(compile=True))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for pruned in (False, True):
        if pruned:
            prune(net, 1, 0.2)
            prune(twin, 1, 0.2)
        for n in (net, twin):
            n.zero_grad()
            n(x).square().mean().backward()
        assert len(twin.engine._compiled) == 1
        for p, q in zip(net.parameters(), twin.parameters()):
            if p.grad is not None:
                assert (p.grad - q.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6


def test_bfloat16_leaves_masks_gates_and_statistics_in_float32():
    net = random_net(2, 8, torch.float)
    x, seen = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for amp in (False, True):
        twin = copy.deepcopy(net)
        twin.engine = FastEngine(Compute(amp=amp))
        y = twin(x)
        y.square().mean().backward()
        assert y.dtype == torch.float and all(p.grad.dtype == torch.float for p in twin.parameters() if p.grad is not None)
        seen.append((y.detach(), twin.strengths().detach(), twin.cells[0].gates(twin.thresholds(0)[0]).detach(), twin.cells[0].mean))
    assert torch.equal(seen[0][1], seen[1][1]) and torch.equal(seen[0][2], seen[1][2])
    assert seen[1][3].dtype == torch.float
    assert 0 < (seen[0][0] - seen[1][0]).norm() < 0.1 * seen[0][0].norm()
