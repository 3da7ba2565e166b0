"CSC-DARTS: an identity beside every edge, in the search and in what is derived."
import pytest
import torch

from mgdarts.base.data import load_data
from mgdarts.methods.csc_darts import IdentityKept
from mgdarts.methods.registry import METHODS, preset
from mgdarts.net.derive import derive
from mgdarts.net.discrete import DerivedNet
from mgdarts.runs.make import make_search
from mgdarts.search.decide import strongest_two
from mgdarts.space.darts import DARTS_GRAPH, NetSpec

TINY = {"data.subset": 100, "search.batch": 20, "search.length": 2}


@pytest.fixture(scope="module")
def splits():
    return load_data(preset("smoke", **{"data.subset": 100}).data, 0)


def test_without_the_identity_it_is_darts_on_half_of_the_channels(splits):
    "To the last bit; and with it alpha goes elsewhere."
    def steps(method, **more):
        search = make_search(preset("smoke", method, **{**TINY, **more}), splits)
        for _ in range(2): search.step()
        return search.net
    a, b = steps("csc-darts", **{"rules.identity": False}), steps("darts-v2", **{"rules.partial": 2})
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(steps("csc-darts").alpha, a.alpha)


def test_what_is_derived_has_an_operation_and_an_identity_on_each_edge(splits):
    search = make_search(preset("smoke", "csc-darts", **TINY), splits)
    search.run()
    for cell in derive(search.net).cells:
        skips = [(op.src, op.dst) for op in cell.ops if op.op == "skip_connect"]
        others = [(op.src, op.dst) for op in cell.ops if op.op != "skip_connect"]
        assert len(skips) == len(others) == 8 and skips == others
    assert not search.net.rules.identity and search.net.count().ops == 3 * 16


def test_identities_in_the_network(splits):
    "With everything else at 0, a normal cell hands on sums of the states that its nodes read."
    search = make_search(preset("smoke", "csc-darts", **TINY), splits)
    search.run()
    net = DerivedNet(derive(search.net)).eval()
    for cell in net.cells:
        for op in cell.ops:
            for norm in op.norms: norm.weight.data.zero_()
    cell = net.cells[0]
    states = [torch.randn(2, cell.arch_ops[0].widths[0], 8, 8) for _ in range(2)]
    for pre, x in zip(cell.pre, states): pre.forward = lambda _, x=x: x
    maps, sums = [torch.zeros(2, 1, 8, 8)] * 2, list(states)
    y = cell(*maps, None)
    for node in DARTS_GRAPH.nodes: sums.append(sum(sums[op.src] for op in cell.arch_ops
                                                   if op.dst == node and op.op == "skip_connect"))
    torch.testing.assert_close(y, torch.cat(sums[2:], 1))


def test_the_candidate_does_not_compete_at_the_end():
    strength = torch.rand(3, 14, 7, generator=torch.Generator().manual_seed(0))
    spec, one = NetSpec(8, 3), IdentityKept(True)
    keep = one.connected(strongest_two(strength, spec.graph), strength, spec)
    strength[..., 0] = 5
    assert torch.equal(keep, one.connected(strongest_two(strength, spec.graph), strength, spec))
    strength[..., 0] = 0
    assert torch.equal(keep[..., 1:], strongest_two(strength, spec.graph)[..., 1:])


def test_standing():
    assert METHODS["csc-darts"].standing == "from its abstract"
