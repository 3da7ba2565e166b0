"CDARTS: two nets by turns, what they teach each other, and a cycle that goes on where it was stopped."
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mgdarts.base.data import load_data
from mgdarts.base.options import Compute, InputError
from mgdarts.fast.engine import make
from mgdarts.methods.cdarts import distillation, joint_loss, lasting, plain_weight, predictions
from mgdarts.methods.registry import METHODS, preset
from mgdarts.runs.make import make_search
from mgdarts.search.rules import Clock
from mgdarts.space.darts import NetSpec

TINY = {"data.subset": 100, "search.batch": 20, "search.length": 4, "search.lr_weights": .05,
        "rules.lr_evaluation": .05}


@pytest.fixture(scope="module")
def splits():
    return load_data(preset("smoke", **{"data.subset": 100}).data, 0)


def begun(splits, steps=None, method="cdarts", **more):
    search = make_search(preset("smoke", method, **{**TINY, **more}), splits)
    while steps is not None and search.steps < steps: search.step()
    return search


def joint(splits, **more):
    "At its first step with both nets."
    search = begun(splits, **more)
    while search.along.warmed < len(search.loaders["train"]): search.step()
    return search


def saved(search):
    file = io.BytesIO()
    torch.save(search.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b):
    pairs = [(a.net.state_dict(), b.net.state_dict()), (a.along.weights(), b.along.weights()),
             (a.along.heads.state_dict(), b.along.heads.state_dict())]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


def test_the_divergence_is_torchs():
    g = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(7, 10, generator=g).double() for _ in range(2))
    for T in (1., 2.):
        torchs = F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="none") * T * T
        assert distillation(s, t, T).item() == pytest.approx(torchs.mean().item()) # over classes, too: as published
        assert 10 * distillation(s, t, T).item() == pytest.approx(torchs.sum(1).mean().item()) # the divergence itself
    both = [v.clone().requires_grad_() for v in (s, t)]
    distillation(*both, 2.).backward()
    assert all(v.grad.abs().max() > 0 for v in both) # the teacher is pulled, too
    equal = s.clone().requires_grad_()
    distillation(equal, equal.detach(), 2.).backward()
    assert distillation(s, s, 2.).abs() < 1e-15 and equal.grad.abs().max() < 1e-15


def test_the_pull_does_not_depend_on_the_temperature():
    g = torch.Generator().manual_seed(1)
    s, t = (1e-5 * torch.randn(1, 5, generator=g).double() for _ in range(2))
    want = ((s - t) - (s - t).mean()) / 5 / 5 # classes, and the mean over them
    for T in (.5, 2., 20.):
        x = s.clone().requires_grad_()
        distillation(x, t, T).backward()
        torch.testing.assert_close(x.grad, want, atol=1e-10, rtol=0)


def test_the_weight_of_plain_operations():
    def at(epoch, length=32, warm=2): return plain_weight(5., .2, Clock(0, False, epoch, 0, 10, 0, length, warm))
    assert (at(0), at(3), at(6), at(30)) == (5, 2.5, 0, 0) and at(1) == pytest.approx(5 * 5 / 6)
    assert at(0, 1, 1) == 5 # no epoch in which alpha moves


@pytest.mark.parametrize("impl", ("fused", "reference"))
def test_nothing_taught_is_darts(impl, splits):
    "To the last bit, over two cycles."
    nothing = {"rules.distill": 0, "rules.plain": 0, "rules.lr_evaluation": 0, "compute.impl": impl}
    plain = {"search.lr_end": -1, "search.weight_decay": 0, "search.arch_decay": 0, "rules.weights_only": -1}
    a, b = begun(splits, **nothing), begun(splits, method="darts-v1", **{**plain, "compute.impl": impl,
                                                                         "rules.lr_evaluation": .2})
    for search in (a, b):
        for _ in range(3): search.run("epoch")
    assert a.along.built == 2 and b.along is None
    pairs = list(zip(a.net.named_parameters(), b.net.parameters(), strict=True))
    assert all(torch.equal(p, q) for (_, p), q in pairs) and a.net.alpha.abs().max() > .01
    for c, d in zip(a.net.cells, b.net.cells): assert all(torch.equal(p, q) for p, q in zip(c.statistics, d.statistics))


def test_fused_is_the_reference(splits):
    "What both nets say, and the gradients of what they learn from."
    search, found = joint(splits), []
    x, y = search.loaders["arch"].batch(0, 0)
    how = search.parts.schedule
    everything = search.net.double(), search.along.net.double(), search.along.heads.double()
    for impl in ("fused", "reference"):
        engine = make(Compute(impl=impl))
        search.net.engine = search.along.net.engine = engine
        for m in everything: m.zero_grad(set_to_none=True)
        said = [predictions(n, search.along.heads, x.double())[1] for n in everything[:2]]
        joint_loss(search, x.double(), y, how).backward()
        grads = [p.grad for m in everything for p in m.parameters() if p.grad is not None]
        found.append([*said, *grads])
    assert len(found[0]) == len(found[1]) > 50
    for a, b in zip(*found): torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_whose_turn_it_is(splits):
    "Alpha's turn moves alpha, the stem, the heads and the evaluation net; the other one the super-net alone."
    search, seen = joint(splits), []
    along = search.along
    own = [p for m in (search.net.cells, search.net.head) for p in m.parameters()]
    def copies(): return {"alpha": [search.net.alpha.clone()], "own": [p.clone() for p in own],
                          "stem": [p.clone() for p in search.net.stem.parameters()],
                          "net": [p.clone() for p in along.net.cells.parameters()],
                          "heads": [p.clone() for p in along.heads.parameters() if p.requires_grad]}
    def update(e): seen.append(copies())
    search.events.listen(update, "update")
    before = copies()
    search.step()
    arch, train = seen
    def moved(a, b): return {k for k in a if any(not torch.equal(p, q) for p, q in zip(a[k], b[k]))}
    assert moved(before, arch) == {"alpha", "stem", "net", "heads"} and moved(arch, train) == {"own", "stem"}
    assert all(p.requires_grad for p in search.net.parameters())


def test_kernels_wait(splits):
    "A net that stays as it is goes on; kernels of an operation that goes are there when it comes back."
    search = joint(splits)
    search.step()
    along, keep = search.along, search.along.keep
    before = {k: v.clone() for k, v in along.weights().items()}
    along.begin(keep, 7)
    assert all(torch.equal(v, along.weights()[k]) for k, v in before.items())
    assert along.weights().keys() == before.keys() and not along.optimizer.state
    other = keep.roll(1, -1)
    along.begin(other, 8)
    fresh = [p for k, p in along.net.named_parameters() if ".ops." in k and lasting(along.arch, k) not in before]
    assert fresh and len(along.pool) == len(before) < len(along.weights())
    along.begin(keep, 9)
    assert all(torch.equal(v, along.weights()[k]) for k, v in before.items())
    deep = along.arch.spec
    assert deep.cells == 8 and [c.index for c in deep.cell if c.reduction] == [2, 5]


def test_cells_are_those_of_the_super_net(splits):
    search = joint(splits, **{"rules.partial": 2})
    assert search.along.arch.spec.channels == search.spec.channels
    names = [op.name for op in search.spec.operations]
    for kind, c in ((0, 0), (1, 2)):
        mine = {(search.spec.edges[e], names[o]) for e, o in search.along.keep[kind].nonzero().tolist()}
        assert mine == {((op.src, op.dst), op.op) for op in search.along.arch.cells[c].ops} and len(mine) == 8


@pytest.mark.parametrize("when", ("alone", "warm-up", "joint", "end"))
def test_a_killed_cycle_goes_on(when, splits):
    "Cycles of two epochs, two of warm-up before each; two cycles and the rest are all of them."
    more = {"search.length": 5, "rules.cycle": 2, "rules.cycle_warmup": 2, "rules.depth": 1.7,
            "rules.ops": "skip_connect,sep_conv_3x3,max_pool_3x3"}
    whole, first = begun(splits, **more), begun(splits, **more)
    whole.run()
    n = len(whole.loaders["train"])
    at = {"alone": lambda s: s.steps == 1, "warm-up": lambda s: s.along.built == 2 and s.along.warmed == n + 1,
          "joint": lambda s: s.along.built == 2 and s.epoch_step == 1, "end": lambda s: s.phase_epoch == 4}
    while not (at[when](first) or first.finished): first.step()
    second = begun(splits, **more)
    second.load_state_dict(saved(first))
    assert same(first, second) and second.along.warmed == first.along.warmed
    second.run()
    assert whole.along.built == 2 and whole.steps == second.steps == 5 * n + 2 * 2 * n
    assert same(whole, second) and torch.equal(whole.along.keep, second.along.keep)


def test_an_older_state_goes_on_without_anything_along(splits):
    search = begun(splits, 2, "darts-v1")
    state = saved(search)
    del state["along"], state["memory"]
    other = begun(splits, method="darts-v1")
    other.load_state_dict(state)
    assert other.along is None and other.steps == 2


def test_what_it_does_not_go_with():
    for more, says in (({"space.constraint": 3}, "constraint=1"), ({"rules.aux": .4}, "rules.aux=0"),
                       ({"space.kind": "mobilenet"}, "space.kind=darts"),
                       ({"rules.depth": 16, "space.cells": 8}, "64")):
        with pytest.raises(InputError, match=says): preset("smoke", "cdarts", **more)


def test_standing_and_depth():
    assert METHODS["cdarts"].standing == "as published"
    spec = NetSpec(16, 8)
    assert [c.index for c in replace(spec, cells=round(2.5 * spec.cells)).cell if c.reduction] == [6, 13]
