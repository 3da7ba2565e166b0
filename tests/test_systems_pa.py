"A reading of PA-DARTS: attention that picks channels, more of them by stage."
import io

import pytest
import torch
import torch.nn.functional as F

from mgdarts.base.data import load_data
from mgdarts.base.options import Compute, Rules
from mgdarts.fast.engine import make
from mgdarts.methods.pa_darts import ChannelAttention, highest, scores
from mgdarts.methods.registry import METHODS, preset
from mgdarts.net.cell import Pass, input_states, weighed
from mgdarts.net.supernet import SuperNet
from mgdarts.runs.make import make_search
from mgdarts.space.darts import NetSpec

TINY = {"data.subset": 100, "search.batch": 20, "search.length": 2, "space.channels": 8, "search.warmup": 0}


@pytest.fixture(scope="module")
def splits():
    return load_data(preset("smoke", **{"data.subset": 100}).data, 0)


def config(**more):
    return preset("smoke", "pa-darts", **{**TINY, **more})


def net(partial=2, attention="cbam", impl="reference"):
    rules = Rules(relaxation="softmax", gates=False, partial=partial, pool_norm=True, attention=attention)
    n = SuperNet(NetSpec(8, 3, size=8, constraint=1, partial=partial), engine=make(Compute(impl=impl)), rules=rules)
    n.open(2, 2)
    return n.double()


def test_scores_and_choices():
    g = torch.Generator().manual_seed(0)
    x, narrow, widen = (torch.randn(s, generator=g).double() for s in ((4, 6, 3, 3), (2, 6), (6, 2)))
    s = scores(x, narrow, widen)
    by_hand = torch.zeros(4, 6).double()
    for v in (x.mean((2, 3)), x.amax((2, 3))): by_hand += (v @ narrow.T).clamp(min=0) @ widen.T
    torch.testing.assert_close(s, 1 / (1 + (-by_hand).exp()))
    assert highest(torch.tensor([.2, .5, .5, .5, .1]), 2).tolist() == [1, 2]
    assert highest(torch.full((16,), .5), 4).tolist() == [0, 1, 2, 3]


def test_without_weights_it_is_the_unshuffled_partial_mixture_of_half_the_states():
    n = net()
    cell, maps = n.cells[1], [torch.randn(2, c, 8, 8, dtype=torch.float64) for c in (24, 32)]  # a reduction
    with torch.no_grad():
        for p in cell.attention.parameters(): p.zero_()
        alpha, edges = n.mixture().alpha[1], torch.rand(14, dtype=torch.float64)
        y, *_ = cell.train()(*maps, alpha=alpha, edges=edges)
        cell.attention = None
        y2 = halved(cell, maps, alpha, edges)
    torch.testing.assert_close(y, y2)


def halved(cell, maps, alpha, edges):
    "The equations with every state that is read at half its size, operation by operation, and no shuffle."
    run = Pass(cell, None, None, None, None, None)
    states, rest = input_states(run, maps)
    states, rest, out, spec = [s / 2 for s in states], [r / 2 for r in rest], [], cell.spec
    for node, live in cell.nodes.items():
        first = sum(weighed(run, op, states[spec.graph.edges[op.edge][0]], alpha[op.edge * len(spec.ops) + op.op], ())
                    for op in live)
        others = 0
        for e in spec.graph.into[node]:
            x = rest[spec.graph.edges[e][0]]
            others = others + edges[e] * (x if spec.stride(e) == 1 else F.max_pool2d(x, 2))
        out.append(torch.cat([first, others], 1))
        states.append(first / 2)
        rest.append(others / 2)
    return torch.cat(out, 1)


def test_a_channel_with_weight_is_chosen_and_the_choice_does_not_depend_on_the_batch():
    one, x = ChannelAttention(2, 8, torch.Generator().manual_seed(0)), torch.rand(6, 8, 2, 2)
    with torch.no_grad():
        for p in one.parameters(): p.zero_()
        one.narrow[1], one.widen[1, 5] = 1., 1.
        assert one(1, x, 2)[1].tolist() == [0, 5] and one(0, x, 2)[1].tolist() == [0, 1]
        for _ in range(3): one.track(.5)
        one.eval()
        assert all(one(1, part, 2)[1].tolist() == [0, 5] for part in x.split(1))
        torch.testing.assert_close(one.mean[0], torch.full((8,), .5 * (1 - .5 ** 3)))


def test_two_passes_and_two_engines():
    pair = [net(), net(impl="fused")]
    pair[1].load_state_dict(pair[0].state_dict())
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    for _ in range(3):
        ys = [n.train()(x) for n in pair]
        torch.testing.assert_close(*ys, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(n.eval()(x) for n in pair), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(n.cells[1].attention.mean for n in pair))
    assert pair[0].cells[1].attention.mean.all()


def test_stages_have_more_channels_and_fewer_operations(splits):
    cfg = config()
    whole, seen = make_search(cfg, splits), []
    whole.events.listen(lambda e: seen.append((whole.net.spec.partial, int(whole.net.op_live[0, 0].sum()))), "epoch")
    whole.run()
    assert seen == [(4, 7), (4, 5), (2, 3)] and whole.net.spec.partial == 1
    again = make_search(cfg, splits)
    while again.state.stage < 1 or again.state.epoch_step < 1: again.step()  # in the middle of the second net
    file = io.BytesIO()
    torch.save(again.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert any("attention.mean" in k for k in state["net"])
    last = make_search(cfg, splits)
    last.load_state_dict(state)
    last.run()
    a, b = whole.net.state_dict(), last.net.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and not any("attention" in k for k in a)


def test_standing():
    assert METHODS["pa-darts"].standing == "a reading"
