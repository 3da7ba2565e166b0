"U-DARTS: random paths through cells that all differ, and a price on simple operations."
import io

import pytest
import torch

from mgdarts.base.data import load_data
from mgdarts.base.options import InputError
from mgdarts.methods.registry import METHODS, preset
from mgdarts.methods.u_darts import Complexity, complexities
from mgdarts.methods.unroll import unrolled
from mgdarts.net.derive import derive
from mgdarts.runs.make import make_search
from mgdarts.space.darts import DARTS_GRAPH, NetSpec

TINY = {"data.subset": 120, "search.batch": 20, "search.length": 2, "rules.redraw": 2}


@pytest.fixture(scope="module")
def splits():
    return load_data(preset("smoke", **{"data.subset": 120}).data, 0)


def config(**more):
    return preset("smoke", "u-darts", **{**TINY, **more})


def test_prices_of_operations():
    of = dict(zip(NetSpec.ops, complexities(NetSpec.ops).tolist()))
    assert {k: round(v, 4) for k, v in of.items()} == {
        "skip_connect": 1, "avg_pool_3x3": 1, "max_pool_3x3": 1, "sep_conv_3x3": .3618, "sep_conv_5x5": .3715,
        "dil_conv_3x3": .5142, "dil_conv_5x5": .5191}


def test_the_price_and_the_decay_pull_at_what_is_drawn_alone():
    alpha = torch.randn(3, 14, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    there = torch.rand(3, 14, 7, generator=torch.Generator().manual_seed(1)) > .8
    c = complexities(NetSpec.ops).double()
    for price, decay in ((.0175, 0.), (0., 1e-3), (.0175, 1e-3)):
        (g,) = torch.autograd.grad(sum(Complexity(price, decay, NetSpec.ops).of_alpha(alpha, there, None)), [alpha])
        torch.testing.assert_close(g, there * (price * c + decay * alpha.detach()), rtol=1e-6, atol=0)
    assert not Complexity(0., 0., NetSpec.ops).wanted()


def test_a_path_stays_for_some_steps_of_an_epoch(splits):
    search, seen = make_search(config(**{"search.batch": 16}), splits), {}
    assert len(search.loaders["train"]) == 3 # so that the last path of an epoch is a short one
    while not search.finished:
        at = search.epoch, search.epoch_step
        search.step()
        seen[at] = search.net.path[1].clone()
    draws = {}
    for (epoch, step), path in seen.items(): draws.setdefault((epoch, step // 2), []).append(path)
    firsts = [paths[0] for paths in draws.values()]
    assert len(firsts) > 2 and all(torch.equal(p, paths[0]) for paths in draws.values() for p in paths)
    assert not any(torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])
    assert all(int(p.sum(-1).max()) == 1 for p in firsts)


def test_only_what_is_drawn_moves_and_all_four_passes_see_it(splits, monkeypatch):
    search, paths = make_search(config(), splits), []
    search.step()
    inner = type(search.net).forward
    monkeypatch.setattr(type(search.net), "forward",
                        lambda net, *given: (paths.append(net.path[1].clone()), inner(net, *given))[1])
    before = search.net.alpha.detach().clone()
    search.adam.state.clear()  # else the momenta of what the first step drew go on
    search.step()
    assert len(paths) >= 5 and all(torch.equal(p, paths[0]) for p in paths[:5])
    assert torch.equal(search.net.alpha.detach() != before, paths[0])


def test_second_order_with_an_auxiliary_head(splits):
    "In closed form elsewhere; here: the head takes part in both losses of alpha."
    def gradient(aux):
        search = make_search(config(**{"rules.aux": aux, "rules.complexity": 0., "rules.drawn_decay": 0.}), splits)
        search.run("step")
        net, (x, y) = search.net, search.loaders["train"].batch(0, 0)
        names = [k for k, p in net.named_parameters() if k.startswith("cells")]
        def loss(f, x, y, regularised, values):
            heads = []
            return torch.nn.functional.cross_entropy(f(x, heads), y) + sum(aux * h.square().mean() for h in heads)
        return unrolled(net, loss, (x, y), (x, y), names, ["alpha"], .1)["alpha"], net
    (without, plain), (found, net) = gradient(0.), gradient(.4)
    assert plain.aux is None and net.aux is not None
    assert found.isfinite().all() and not torch.allclose(found, without)


@pytest.mark.parametrize("impl", ("fused", "reference"))
def test_it_goes_on_in_the_middle_of_a_path(impl, splits):
    cfg = config(**{"compute.impl": impl, "rules.redraw": 3})
    whole, first, second = (make_search(cfg, splits) for _ in range(3))
    whole.run()
    for _ in range(len(first.loaders["train"]) + 1): first.step()  # one into a path of the second epoch
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.run()
    a, b = whole.net.state_dict(), second.net.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_cells_of_their_own_with_two_edges_a_node(splits):
    search = make_search(config(), splits)
    search.run()
    cells = derive(search.net).cells
    for cell in cells:
        for j in DARTS_GRAPH.nodes: assert len({op.src for op in cell.ops if op.dst == j}) == 2
        assert len(cell.ops) == 8
    assert len({tuple((op.op, op.src, op.dst) for op in c.ops) for c in cells}) == len(cells)


def test_darts_with_cells_of_their_own(splits):
    "The two properties are apart: any method may have the fourth space."
    search = make_search(preset("smoke", "darts-v1", **{**TINY, "space.constraint": 4}), splits)
    search.run()
    assert search.net.op_live.sum((1, 2)).tolist() == [8] * 3 and len(search.net.op_live.unique(dim=0)) == 3


def test_what_it_does_not_go_with():
    for wrong in ({"rules.discretiser": "sample"}, {"space.kind": "mobilenet"}):
        with pytest.raises(InputError): config(**wrong)
    assert METHODS["u-darts"].standing == "as published (without the long connections)"
