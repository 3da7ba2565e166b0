"Our reading of l-DARTS: what edges give has variance 1."
import contextlib
import io

import pytest
import torch

from mgdarts.base.data import load_data
from mgdarts.base.options import Compute, Rules
from mgdarts.fast.engine import make, plan_of
from mgdarts.fast.layout import natively
from mgdarts.methods.registry import METHODS, preset
from mgdarts.net.supernet import SuperNet
from mgdarts.runs.make import make_search
from mgdarts.space.darts import NetSpec


def net(normalise, impl="reference", partial=1, **rules):
    rules = Rules(**{"relaxation": "softmax", "gates": False, "pool_norm": True, "partial": partial,
                     "normalise": normalise, **rules})
    n = SuperNet(NetSpec(8, 3, size=8, constraint=1, partial=partial), engine=make(Compute(impl=impl)), rules=rules)
    n.open(2, 2)
    for i, name in enumerate(n.strong): getattr(n, name).data.normal_(generator=torch.Generator().manual_seed(i))
    return n.double()


X = torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("how", ("each", "mix"))
@pytest.mark.parametrize("partial", (1, 2))
@pytest.mark.parametrize("plainly", (False, True))
def test_both_implementations(how, partial, plainly):
    "In cells of both kinds, as a CPU and as a GPU would compute them."
    with natively() if plainly else contextlib.nullcontext():
        a, b = net(how, "fused", partial), net(how, "reference", partial)
        b.load_state_dict(a.state_dict())
        ys = [n.train()(X) for n in (a, b)]
        torch.testing.assert_close(*ys, rtol=1e-9, atol=1e-9)
        for y in ys: y.square().sum().backward()
        for (k, p), (_, q) in zip(a.named_parameters(), b.named_parameters()):
            if p.grad is not None: torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-8, msg=k)
        for (k, p), (_, q) in zip(a.named_buffers(), b.named_buffers()): torch.testing.assert_close(p, q, msg=k)
        torch.testing.assert_close(a.eval()(X), b.eval()(X), rtol=1e-9, atol=1e-9)
        assert (plan_of(a.cells[0], plainly) is None) == (how == "mix")


def test_nothing_is_normalised_where_nothing_says_so():
    a, b = net("none"), net("each")
    assert a.cells[0].pools == [[5, 6]] * 5 and b.cells[0].pools == [[0, 5, 6]] * 5
    assert b.cells[1].pools == [[5, 6]] * 2 + [[0, 5, 6]] * 3 # a strided skip has its own
    assert not a.cells[0].mixed and net("mix").cells[0].mixed == list(range(14))


@pytest.mark.parametrize("how", ("each", "mix"))
def test_scale_and_offset_of_what_is_handed_on_do_not_matter(how):
    "A state that is larger and shifted gives the same, through skips and pools."
    ops = "skip_connect", "avg_pool_3x3", "max_pool_3x3" # in a mix, nothing that is normalised before
    n = net(how, ops=ops, pool_norm=how == "each").train()
    cell, alpha = n.cells[0], n.mixture().alpha[0].detach()
    g = torch.Generator().manual_seed(0)
    maps = [m.relu() for m in n.stem(X)]
    with torch.no_grad():
        cell.plain.copy_(torch.randn(cell.plain.shape, generator=g))
        y = cell(*maps, alpha=alpha)[0]
        cell.scale.data.fill_(1e3) # of the preprocessing alone: nothing else has a gate here
        cell.shift.data.fill_(7)
        torch.testing.assert_close(cell(*maps, alpha=alpha)[0], y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ("each", "mix"))
def test_a_search_goes_on_to_the_same_bits(how):
    "The running statistics of skips and edges are saved, too, and the net that is settled has none of them."
    cfg = preset("smoke", "l-darts", **{"data.subset": 100, "search.batch": 20, "search.length": 2,
                                        "rules.normalise": how, "rules.weights_only": 0.})
    splits = load_data(cfg.data, 0)
    whole, first, second = (make_search(cfg, splits) for _ in range(3))
    whole.run()
    for _ in range(3): first.step()
    assert first.net.cells[0].pool_mean.abs().sum() > 0
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.run()
    a, b = whole.net.state_dict(), second.net.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    assert whole.net.rules.normalise == "none" and not whole.net.cells[0].mixed


def test_standing():
    assert METHODS["l-darts"].standing == "a reading"
