"CTNAS: closed forms of the comparator and the policy, and what is refused."
import pytest
import torch

from mgdarts.base.data import load_data
from mgdarts.base.options import InputError
from mgdarts.methods.ctnas import Comparator, Policy, agreement, beats, graphs_of, learn, pairs_of, reinforce
from mgdarts.methods.registry import preset
from mgdarts.runs.make import make_search
from mgdarts.search.decide import strongest_two
from mgdarts.space.darts import NetSpec
from mgdarts.space.graph import dense_graph

SPEC = NetSpec(4, 3, size=8, constraint=1)
GRID = SPEC.cell[0].grid


def seeded(seed): return torch.Generator().manual_seed(seed)
def some(n, seed=0):
    return strongest_two(torch.rand(2 * n, *GRID, generator=seeded(seed)), SPEC.graph).view(n, 2, *GRID)


def test_a_graph_by_hand():
    "Two inputs, two nodes; the operation into the second node from the first reads both that lead to the first."
    ops = torch.zeros(1, 2, *GRID, dtype=torch.bool)
    edge = {e: i for i, e in enumerate(SPEC.edges)}
    for k in range(2):
        for e, o in (((0, 2), 1), ((1, 2), 0), ((0, 3), 5), ((2, 3), 3)): ops[0, k, edge[e], o] = True
    names, reads = graphs_of(SPEC, ops)
    assert names[0, 0].tolist() == [0, 1, 3, 2, 7, 5]
    sees = {i: reads[0, 0, i].nonzero().flatten().tolist() for i in range(6)}
    assert sees == {0: [], 1: [], 2: [0], 3: [1], 4: [0], 5: [2, 3]}


def test_published_comparisons_are_not_fair_and_can_be_made_so():
    comparator = Comparator(9, 2, seeded(0))
    f = comparator.encode(*graphs_of(SPEC, some(30))).detach()
    p, fair = beats(comparator, f[:, None], f), beats(comparator, f[:, None], f, True)
    assert (p + p.t() - 1).abs().max() > .01
    torch.testing.assert_close(fair + fair.t(), torch.ones(30, 30))
    torch.testing.assert_close(fair.diagonal(), torch.full((30,), .5))
    logits = comparator.logit(f[:, None], f)
    assert ((logits - logits[:, :1]).std(0) < 1e-5).all() # any baseline only shifts


def test_the_order_of_operations_does_not_matter():
    comparator, (names, reads) = Comparator(9, 2, seeded(0)), graphs_of(SPEC, some(10))
    order = torch.randperm(10, generator=seeded(3))
    other = comparator.encode(names[..., order], reads[..., order, :][..., order])
    torch.testing.assert_close(comparator.encode(names, reads), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed, antisymmetric", [(0, False), (1, True)])
def test_a_ranking_is_learned(seed, antisymmetric):
    every = torch.cartesian_prod(*[torch.arange(3)] * 5)
    truth = torch.rand(5, 3, generator=seeded(seed + 10))[torch.arange(5), every].sum(1)
    names, reads = (every + 3 * torch.arange(5))[:, None], torch.zeros(len(every), 1, 5, 5)
    at = torch.randperm(243, generator=seeded(seed))
    known, held = at[:50], at[50:100]
    comparator, g = Comparator(15, 1, seeded(seed)), seeded(seed)
    adam = torch.optim.Adam(comparator.parameters(), 1e-3)
    for _ in range(200): learn(comparator, adam, (names[known], reads[known]), truth[known], g, antisymmetric)
    def tau(scores): return agreement(comparator, (names[held], reads[held]), scores, antisymmetric)
    assert tau(truth[held]) > .9 and tau(-truth[held]) == -tau(truth[held])


def test_nothing_is_paired_with_itself():
    for seed in range(20):
        codes = torch.arange(5.)
        a, b, better = pairs_of(codes, codes, seeded(seed))
        assert (a != b).all() and better.equal((a > b).float())


def test_the_policy_draws_cells_of_the_space():
    policy, whole = Policy(SPEC.graph, 7, seeded(0)), torch.ones(GRID, dtype=torch.bool)
    whole[:, 3] = whole[13] = False # an operation, and an edge into the last node
    ops, logp, entropy = policy(200, whole, seeded(1))
    assert (ops.sum(-1) <= 1).all() and not ops[:, :, 3].any() and not ops[:, 13].any()
    for node in SPEC.graph.nodes: assert (ops[:, list(SPEC.graph.into[node])].sum((1, 2)) == 2).all()
    again = policy(200, whole, seeded(1))
    assert again[0].equal(ops) and again[1].equal(logp) and (entropy > 0).all()


def test_log_probabilities_are_those_of_the_draws():
    "Of a cell with one node and two operations there are eight ways to be drawn."
    policy, whole, seen = Policy(dense_graph(2, 1), 2, seeded(0)), torch.ones(2, 2, dtype=torch.bool), {}
    ops, logp, _ = policy(4000, whole, seeded(2))
    for one, p in zip(ops, logp.detach().exp().tolist()):
        seen.setdefault(tuple(one.flatten().tolist()), [set(), 0])
        row = seen[tuple(one.flatten().tolist())]
        row[0].add(round(p, 6))
        row[1] += 1
    assert len(seen) == 4 and abs(sum(sum(ps) for ps, _ in seen.values()) - 1) < 1e-4
    for ps, n in seen.values(): assert abs(n / 4000 - sum(ps)) < .04


def test_the_gradient_of_a_policy():
    logp = torch.tensor([-.3, -.7], requires_grad=True)
    reinforce(logp, torch.tensor([1., 2.]), torch.tensor([.9, .1]), 0.).backward()
    torch.testing.assert_close(logp.grad, torch.tensor([-.45, -.05]))


def test_one_space_only():
    with pytest.raises(InputError, match="space.constraint=1"): preset("smoke", "ctnas", **{"space.constraint": 2})


def test_a_search_leaves_its_table():
    cfg = preset("smoke", "ctnas", **{"data.subset": 100, "search.batch": 40, "search.length": 1, "rules.labelled": 8,
                                      "rules.comparator_epochs": 3, "rules.policy_steps": 4, "rules.own_every": 2,
                                      "rules.base_every": 3})
    search, told = make_search(cfg, load_data(cfg.data, 0)), []
    search.events.listen(lambda e: told.append(e.data), "candidates")
    search.run()
    (table,) = told
    assert [row["order"] for row in table["candidates"]] == list(range(8)) and -1 <= table["chosen"]["tau"] <= 1
    assert search.net.op_live.sum((1, 2)).tolist() == [8] * 3
