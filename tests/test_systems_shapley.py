"Shapley-NAS: games with known values, and a search whose alpha moves by nothing else."
import io
from itertools import permutations

import pytest
import torch

from mgdarts.base.data import load_data
from mgdarts.base.options import OPERATIONS
from mgdarts.methods.registry import METHODS, preset
from mgdarts.methods.shapley import credit, removal, standardised, taken_apart
from mgdarts.runs.make import make_search
from mgdarts.search.trial import kinds_of

TINY = {"data.subset": 120, "search.batch": 24, "search.length": 4, "rules.samples": 2, "rules.batches": 1,
        "rules.ops": "skip_connect,sep_conv_3x3"}


@pytest.fixture(scope="module")
def splits():
    return load_data(preset("smoke", **{"data.subset": 120}).data, 0)


def config(**more):
    return preset("smoke", "shapley-nas", **{**TINY, **more})


def test_additive_games_null_and_symmetric_players():
    worth = torch.rand(6, generator=torch.Generator().manual_seed(0)).double()
    worth[2] = 0
    found = removal([5, 0, 2, 1, 4, 3], 6, lambda there: float((worth * there).sum()))
    torch.testing.assert_close(found, worth) # one order is enough
    def value(there): # the last player is worth nothing; the first two are worth the same, and more together
        return float(there[0] + there[1] + there[0] * there[1])
    rows = torch.stack([removal(order, 3, value) for order in permutations(range(3))])
    assert rows.mean(0).tolist() == [1.5, 1.5, 0] and rows[:, 2].eq(0).all() and rows.sum(1).eq(3).all()
    assert credit(rows).tolist() == pytest.approx([1, 1, 0]) # half of the orders say 1, half say 2


def test_an_order_ends_where_little_is_left():
    found = removal([0, 1, 2, 3], 4, lambda there: float(there.sum()), .6) # of 4 players 2 are under 60 %
    assert found.tolist() == [1, 1, 0, 0]


def test_credits_of_a_kind_of_cell():
    live = torch.rand(2, 14, 7, generator=torch.Generator().manual_seed(1)) > .3
    s = 5 * torch.randn(2, 14, 7, generator=torch.Generator().manual_seed(2)).double() + 3
    z = standardised(s, live)
    assert not z[~live].any()
    for k in range(2):
        assert abs(z[k][live[k]].mean()) < 1e-12 and abs(z[k][live[k]].std() - 1) < 1e-12
    assert not standardised(torch.full((1, 14, 7), .3).double(), live[:1]).any()


def test_others_do_not_grow(splits):
    "A mask leaves them what they weigh; what is not live is not there to share with."
    search = make_search(config(**{"rules.ops": ",".join(OPERATIONS)}), splits)
    search.step()
    net = search.net
    net.alpha.data.zero_()
    net.mask = torch.ones(3, 14, 7)
    net.mask[:, 0, 0] = 0
    masked = net.mixture().alpha.view(3, 14, 7)[0, 0].clone()
    net.mask, net.op_live[:, 0, 0] = None, False
    gone = net.mixture().alpha.view(3, 14, 7)[0, 0]
    torch.testing.assert_close(masked, torch.tensor([0.] + [1 / 7] * 6))
    torch.testing.assert_close(gone, torch.tensor([0.] + [1 / 6] * 6))


@pytest.mark.parametrize("impl", ("fused", "reference"))
def test_a_net_that_is_taken_apart_guesses_in_the_end(impl, splits):
    search = make_search(config(**{"compute.impl": impl}), splits)
    for _ in range(2): search.run("epoch")
    net, images = search.net, [search.loaders["arch"].batch(0, 0)]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.eval()
    with torch.no_grad(): whole = 100 * float((net(images[0][0]).argmax(1) == images[0][1]).float().mean())
    players = net.op_live[kinds_of(net.spec)].flatten().nonzero().flatten()
    order = players[torch.randperm(len(players), generator=torch.Generator().manual_seed(0))].tolist()
    found = taken_apart(search, order, images, 0.)
    with torch.no_grad():
        net.eval().mask = torch.zeros(3, 14, 7)
        nothing = 100 * float((net(images[0][0]).argmax(1) == images[0][1]).float().mean())
        net.mask = None
    assert abs(float(found.sum()) - (whole - nothing)) < 1e-4 # efficiency: it telescopes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_alpha_moves_by_credits_alone(splits):
    search, heard = make_search(config(), splits), []
    search.events.listen(lambda e: heard.append((search.epoch, search.epoch_step, e.data["groups"])), "update")
    alpha, seen = search.net.alpha.detach().clone(), []
    while not search.finished:
        search.step()
        if search.settled: break
        if not torch.equal(alpha, search.net.alpha): seen.append((search.epoch, search.epoch_step))
        alpha = search.net.alpha.detach().clone()
    assert seen == [(2, 0), (3, 0)] # half of four epochs are for the weights
    assert [h for h in heard if "strengths" in h[2]] == [(2, 0, ("strengths",)), (3, 0, ("strengths",))]
    assert search.adam is None and search.finished and not search.memory.get("rows")


@pytest.mark.parametrize("at", (0, 1))
def test_it_goes_on_between_two_orders(at, splits):
    whole = make_search(config(), splits)
    whole.run()
    first = make_search(config(), splits)
    while len(first.memory.get("rows", [])) != 1 or first.epoch != 2 + at: first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make_search(config(), splits)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert len(second.memory["rows"]) == 1
    second.run()
    assert torch.equal(whole.memory["smooth"], second.memory["smooth"])
    a, b = whole.net.state_dict(), second.net.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and whole.steps == second.steps


def test_cells_of_their_own_are_players_of_their_own(splits):
    search = make_search(config(**{"space.constraint": 3, "search.target_m": .015}), splits)
    assert len(kinds_of(search.spec)) == 3
    search.run()
    assert search.finished and search.net.count().params <= 15_000


def test_standing():
    assert METHODS["shapley-nas"].standing == METHODS["mg-darts"].standing == "as published"
