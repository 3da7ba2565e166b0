"The fast super-net against the plain one, and its kernels against plain PyTorch."
import contextlib
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from mgdarts.fast.compiled import compiled
from mgdarts.base.options import OPERATION_NAMES, Compute, Rules
from mgdarts.fast.convolutions import Pair, kernel_gradient, pairs
from mgdarts.fast.engine import Compiled, FastEngine, plan_of
from mgdarts.fast.layout import from_phases, from_pixels, images_abreast, narrow, natively, pixels, widen
from mgdarts.fast.norms import weighted_sum
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.engine import Engine
from mgdarts.net.sample import random_architecture
from mgdarts.net.supernet import SuperNet
from mgdarts.space.operation import DARTS_OPS
from mgdarts.space.darts import NetSpec
from mgdarts.space.mobile import MobileSpec
from mgdarts.space.operation import OPERATIONS, DilConv, SepConv, add_operation


def draw(*shape, seed=0):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return drawn.to(memory_format=torch.channels_last)


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
    assert from_pixels(pixels(wide, b), b).equal(wide)
    assert pixels(wide, b).flatten().sort()[0].equal(x.flatten().sort()[0])


def pairs_and_plain(x, weights, b, stride, kinds, relu, dtype, place=None, width=None):
    "Results and all gradients of pairs of convolutions: as computed here in `dtype`, then plainly in 64 bits."
    c, side = x.shape[1], x.shape[3]

    def fast(x, *ws):
        jobs = [Pair(d.repeat(b, 1, 1, 1), p, place, width, stride, dil)
                for d, p, (_, dil) in zip(ws[::2], ws[1::2], kinds)]
        ys = zip(jobs, pairs(widen(x, b), jobs, b, relu))
        return [narrow(from_phases(y) if job.reads(side)[0] == "phases" else y, b) for job, y in ys]

    def plain(x, *ws):
        x, out = F.relu(x) if relu else x, []
        for d, p, (k, dil) in zip(ws[::2], ws[1::2], kinds):
            if place is not None: p = p.new_zeros(width, c, 1, 1).index_copy(0, place, p)
            out.append(F.conv2d(F.conv2d(x, d, None, stride, (1 + dil) * (k // 2), 1 + dil, c), p))
        return out

    for fn, number in ((fast, dtype), (plain, torch.double)):
        args = [a.to(number, copy=True).requires_grad_() for a in (x, *weights)]
        y = torch.cat(fn(*args), 1)
        yield [y.detach(), *torch.autograd.grad((y * draw(*y.shape, seed=7).to(number)).sum(), args)]


def agree(results, dtype):
    for p, q in zip(*results):
        if dtype == torch.double: torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
        else: assert (p - q).abs().max() < 1e-5 * q.abs().max().clamp(min=1e-6)


@settings(max_examples=120, deadline=None)
@given(b=st.sampled_from((1, 2, 4)), c=st.integers(1, 20), f=st.integers(1, 20), side=st.integers(1, 11),
       stride=st.sampled_from((1, 2)), threads=st.sampled_from((1, 1, 3)), relu=st.booleans(),
       kinds=st.lists(st.tuples(st.sampled_from((1, 3, 5, 7, 9)), st.booleans()), min_size=1, max_size=4),
       dtype=st.sampled_from((torch.double, torch.float)))
def test_pairs_of_convolutions(b, c, f, side, stride, threads, kinds, relu, dtype):
    weights = [w for i, (k, _) in enumerate(kinds) for w in (draw(c, 1, k, k, seed=i), draw(f, c, 1, 1, seed=9 + i))]
    torch.set_num_threads(threads)
    try: agree(pairs_and_plain(draw(4, c, side, side), weights, b, stride, kinds, relu, dtype), dtype)
    finally: torch.set_num_threads(1)


@pytest.mark.parametrize("how", ["for CPUs", "compiled", "native"])
@pytest.mark.parametrize("dilated", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
def test_kernels_of_any_odd_side(k, stride, dilated, how):
    "On maps larger and smaller than the kernel, wider and narrower than a vector, square or not."
    dtype = torch.float if how == "compiled" else torch.double
    if how == "compiled" and not compiled(torch.zeros(1)): pytest.skip("no C++ compiler")
    for c, sides in ((3, (8, 8)), (21, (7, 7)), (3, (2, 2)), (5, (1, 1)), (3, (4, 10)), (3, (3, 5))):
        x, weights = draw(4, c, *sides), (draw(c, 1, k, k, seed=1), draw(2, c, 1, 1, seed=2))
        b, place = 1 if how == "native" else 2, torch.tensor([0, 3])  # the pair's are some channels of a node's five
        with natively() if how == "native" else contextlib.nullcontext():
            agree(pairs_and_plain(x, weights, b, stride, [(k, dilated)], True, dtype, place, 5), dtype)


def test_kernels_without_a_middle_are_refused():
    with pytest.raises(ValueError, match="even side"): Pair(torch.zeros(3, 1, 4, 4), torch.zeros(2, 3, 1, 1))
    odd = Pair(torch.zeros(3, 1, 3, 3), torch.zeros(2, 3, 1, 1))
    with pytest.raises(ValueError, match="other channels than 6"): pairs(torch.zeros(2, 6, 4, 4), [odd], 2)


@pytest.mark.parametrize("n", [1, 3])
def test_weighted_sums(n):
    maps = [draw(4, 3, 2, 2, seed=i).requires_grad_() for i in range(n)]
    f = draw(n, 1, 1, 1, seed=9).flatten().requires_grad_()
    y, weight = weighted_sum([widen(x, 2) for x in maps], f), draw(4, 3, 2, 2, seed=7)
    (narrow(y, 2) * weight).sum().backward()
    torch.testing.assert_close(narrow(y, 2), sum(k * x for k, x in zip(f, maps)))
    for k, x, g in zip(f, maps, f.grad):
        torch.testing.assert_close(x.grad, k.detach() * weight)
        assert g.item() == pytest.approx((x * weight).sum().item())


def random_net(seed, size, dtype, cells=3, width=4, ops=DARTS_OPS):
    g = torch.Generator().manual_seed(seed)
    net = SuperNet(NetSpec(width, cells, size=size, ops=ops), seed=seed, rules=Rules(ops=ops))
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
    g, graph = torch.Generator().manual_seed(seed), net.spec.graph
    ops = torch.rand(len(net.cells), *net.spec.cell[0].grid, generator=g) < share
    for node in graph.nodes:
        ops[:, graph.into[node][0], int(torch.randint(len(net.spec.ops), (1,), generator=g))] = True
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
        seen.append([y.detach()] + [p.grad for p in twin.parameters() if p.grad is not None]
                    + [v for c in twin.cells for v in (c.mean, c.var)])
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


@pytest.fixture
def named():
    "A function that makes an operation known for the length of a test."
    names = list(OPERATION_NAMES)
    yield lambda op: add_operation(op).name
    for name in OPERATION_NAMES[len(names):]: del OPERATIONS[name]
    OPERATION_NAMES[:] = names


@pytest.mark.parametrize("dtype, tol", [(torch.double, 1e-9), (torch.float, 1e-4)])
def test_operations_with_larger_kernels(dtype, tol, named):
    "Super-nets and discrete networks with 1x1, 7x7 and 9x9 kernels are computed fast, and rightly."
    ops = tuple(named(kind(f"{kind.__name__}_{k}", k)) for kind in (SepConv, DilConv) for k in (1, 7, 9))
    net = random_net(0, 10, dtype, ops=DARTS_OPS[:1] + ops)
    x = torch.randn(6, 3, 10, 10, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert all(map(plan_of, net.cells)) and difference(net, x) <= tol
    prune(net, 0, 0.4)
    assert difference(net, x) <= tol
    arch, found = random_architecture(NetSpec(4, 3, size=10, ops=ops), 12_000, 0), []
    for engine in (Engine(), FastEngine()):
        net = DerivedNet(arch, True, engine=engine).to(dtype)
        assert all(map(plan_of, net.cells))
        y, aux = net(x)
        (y.square().mean() + aux.square().mean()).backward()
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters())  # an input may be unread
        found.append([y.detach(), aux.detach(), *grads])
    assert max(float((a - b).norm() / a.norm().clamp(min=1e-6)) for a, b in zip(*found)) <= tol


class Halved(SepConv):
    "An operation that the fast chapters do not know, though it is like one that they do."
    def forward(self, x, parts, stride): return super().forward(x, parts, stride) / 2


def test_what_is_not_known_is_computed_as_the_equations_stand(named):
    net = random_net(3, 8, torch.double, ops=DARTS_OPS[:3] + (named(Halved("halved", 3)),))
    x = torch.randn(4, 3, 8, 8, dtype=torch.double)
    assert not any(map(plan_of, net.cells)) and difference(net, x) <= 1e-9
    net.op_live[1, :, 3] = False  # one cell is without it, between two that have it: images abreast come and go
    net.rebuild(net.op_live.clone(), [net.full_gates(c) for c in range(3)])
    assert [plan_of(c) is None for c in net.cells] == [True, False, True] and difference(net, x) <= 1e-9
    arch = random_architecture(NetSpec(4, 3, size=8, ops=("skip_connect", "halved")), 4_000, 0)
    plain, fast = (DerivedNet(arch, engine=e).double() for e in (Engine(), FastEngine()))
    torch.testing.assert_close(fast(x)[0], plain(x)[0], rtol=1e-9, atol=1e-9)


def test_another_cell_class_is_not_taken_for_one_that_is_known():
    net = random_net(3, 8, torch.double)
    class Other(type(net.cells[0])):
        def forward(self, *maps, **more):
            y, *stats = super().forward(*maps, **more)
            return 2 * y, *stats
    for c in net.cells: c.__class__ = Other
    x = torch.randn(4, 3, 8, 8, dtype=torch.double)
    assert not any(map(plan_of, net.cells)) and difference(net, x) <= 1e-9


def test_layers_of_the_second_space():
    net = SuperNet(MobileSpec(6, .25, classes=4, size=16))
    net.open(5, 2)
    x = torch.randn(4, 3, 16, 16, dtype=torch.double)
    assert all(map(plan_of, net.double().cells)) and difference(net, x) <= 1e-8


def test_plans_follow_layouts_and_die_with_their_cells():
    net, engine = random_net(1, 8, torch.float), FastEngine()
    net.engine = engine
    x = torch.randn(4, 3, 8, 8)
    net(x)
    before = [engine.plan(c) for c in net.cells]
    net(x)
    assert all(engine.plan(c) is p for c, p in zip(net.cells, before))
    prune(net, 1, 0.5)
    net(x)
    assert all(engine.plan(c) is not p for c, p in zip(net.cells, before)) and len(engine.plan.known) == 3
    copied = copy.deepcopy(net)
    assert not copied.engine.plan.known and copied.engine.compute == engine.compute
    del net
    gc.collect()
    assert not engine.plan.known


@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_kernel_gradients_of_maps_that_are_not_square(side, stride):
    for h, w in ((8, 3), (2, 9), (1, 1), (5, 4)):
        x, k = draw(2, 3, h, w), draw(3, 1, side, side, seed=1).requires_grad_()
        y = F.conv2d(x, k, None, stride, side // 2, 1, 3)
        g = draw(*y.shape, seed=2)
        torch.testing.assert_close(kernel_gradient(g, x, side, stride), *torch.autograd.grad(y, k, g))


@pytest.mark.parametrize("how", ["recompute", "native"])
def test_other_ways_to_the_same_gradients(how):
    net = random_net(1, 8, torch.double)
    prune(net, 1, 0.5)
    x, seen = torch.randn(4, 3, 8, 8, dtype=torch.double), []
    for other in (False, True):
        twin = copy.deepcopy(net)
        twin.engine = FastEngine(Compute(recompute="all" if other and how == "recompute" else "none"))
        with natively() if other and how == "native" else contextlib.nullcontext(): twin(x).square().mean().backward()
        seen.append([p.grad for p in twin.parameters() if p.grad is not None] + [c.var for c in twin.cells])
    for a, b in zip(*seen):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_compiled_cell_computes_the_same_before_and_after_a_commit(monkeypatch):
    # the compiler's own backend needs a C++ compiler; this one traces the graph and runs it
    monkeypatch.setattr(Compiled, "BACKEND", "aot_eager")
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
        assert len(twin.engine.compiled.cells) == 1
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
        assert y.dtype == torch.float
        assert all(p.grad.dtype == torch.float for p in twin.parameters() if p.grad is not None)
        gates = twin.cells[0].gates(twin.thresholds(0)[0])
        seen.append((y.detach(), twin.strengths().detach(), gates.detach(), twin.cells[0].mean))
    assert torch.equal(seen[0][1], seen[1][1]) and torch.equal(seen[0][2], seen[1][2])
    assert seen[1][3].dtype == torch.float
    assert 0 < (seen[0][0] - seen[1][0]).norm() < 0.1 * seen[0][0].norm()
