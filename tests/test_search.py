"The whole search: any settings, any moment to stop, what its stages begin and end with."

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from mgdarts.fast.engine import FastEngine
from mgdarts.base.options import InputError, Rules, Search as Settings
from mgdarts.base.events import NonFiniteLoss
from mgdarts.search.loop import Search
from mgdarts.search.step import fetch, loss_of
from mgdarts.space.darts import NetSpec
from mgdarts.space.space import count_supernet

OPS, EDGES, INPUTS, STATES = NetSpec.ops, NetSpec.graph.edges, 2, 6  # of the DARTS-like space
NODE_EDGES = {n: [e for e, (_, to) in enumerate(EDGES) if to == n] for n in range(INPUTS, STATES)}


# --- the whole search

class Noise:
    "Random images with random labels: nothing to learn, everything to survive."
    def __init__(self, size, classes, steps): self.size, self.classes, self.steps = size, classes, steps
    def __len__(self): return self.steps
    def batch(self, epoch, step):
        g = torch.Generator().manual_seed(epoch * 97 + step)
        return torch.randn(8, 3, self.size, self.size, generator=g), torch.randint(self.classes, (8,), generator=g)
    def eval(self): yield self.batch(10**6, 0)


@pytest.mark.parametrize("init", ["min", "own", "zero"])
def test_where_the_thresholds_of_a_sub_net_start(init):
    search = Search(NetSpec(2, 3, 3, 8), {"train": Noise(8, 3, 4), "val": Noise(8, 3, 4)},
                    Settings(target_m=0.004, warmup=0, prune_every=1, max_epochs=2, lambda_step=0.02,
                             threshold_init=init), engine=FastEngine())
    search.run("stage")
    while search.stage < 1 or search.warmup: search.step()  # the second stage begins with alphas that differ
    net, n = search.net, len(search.net.cells)
    g = {"t_alpha": torch.sigmoid(net.alpha[:n])[net.op_live[:n]],
         "t_beta": torch.cat([torch.sigmoid(c.beta)[~c.skips] for c in net.cells]),
         "t_omega": torch.cat([c.omega[c.omega_live].abs() for c in net.cells])}
    assert len(g["t_alpha"].unique()) > 10
    for name, values in g.items():
        t = getattr(net, name)[:n]
        if init == "zero": assert not t.any()
        elif init == "min":
            assert (t == t.flatten()[0]).all()
            assert t.flatten()[0].item() == pytest.approx(0.9 * values.min().item(), rel=1e-6)
        elif name == "t_alpha": torch.testing.assert_close(t[net.op_live[:n]], 0.9 * values)
    if init == "min": assert (net.t_pre[:n] == net.t_beta[0, 0, 0]).all()


def test_lambda_looks_at_the_cells_of_its_stage():
    """R_size of the stage's own cells is what the controller sees; in fine-tuning all cells are its own; the gradient
    reaches all in both."""
    search = Search(NetSpec(2, 6, 3, 8), {"train": Noise(8, 3, 4), "val": Noise(8, 3, 4)},
                    Settings(target_m=0.004, warmup=0, prune_every=1, max_epochs=2, lambda_step=0.02),
                    engine=FastEngine())
    heard = []
    search.events.listen(lambda e: heard.append(e), "epoch")
    search.run()
    for e in heard:
        if e.stage in ("stage 1", "fine-tune"):
            assert e.data["r_size_stage"] == pytest.approx(e.data["r_size"], rel=1e-6)
        else:
            assert 0 < e.data["r_size_stage"] < e.data["r_size"]
    assert {e.stage for e in heard} == {"stage 1", "stage 2", "stage 3", "fine-tune"}
    search.lam.value = 1.0
    loss_of(search, *fetch(search))[0].backward()
    assert bool((search.net.alpha.grad[:2].abs().sum((1, 2)) > 0).all())


def test_a_space_without_convolutions_is_searched():
    cfg = Settings(target_m=0.0012, warmup=0, prune_every=1, max_epochs=3, lambda_step=0.02)
    search = Search(NetSpec(4, 3, 3, 8), {"train": Noise(8, 3, 2), "val": Noise(8, 3, 2)}, cfg, engine=FastEngine(),
                    rules=Rules(ops=("skip_connect", "max_pool_3x3")))
    done = []
    search.events.listen(done.append, "done")
    search.run()
    assert search.finished and [e.data["drift"]["weight"] for e in done] == [{"pruned": 0, "free": None, "auc": None}]


def test_the_last_epoch_of_a_stage_commits():
    "Also where it is none of those in which a commit is due."
    cfg = Settings(target_m=0.0012, warmup=0, prune_every=2, max_epochs=3, lambda_step=0.02, stage_keep=(0.01,) * 3)
    search, heard = Search(NetSpec(2, 3, 3, 8), {"train": Noise(8, 3, 2), "val": Noise(8, 3, 2)}, cfg,
                           engine=FastEngine()), []
    search.events.listen(lambda e: heard.append((e.stage, e.epoch)), "commit")
    search.run()
    assert [epoch for stage, epoch in heard if stage == "stage 1"] == [1, 2]


@given(st.data())
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_search_ends_with_every_node_fed_and_the_size_at_or_just_under_the_target(data):
    draw = data.draw
    spec = NetSpec(draw(st.sampled_from([2, 4])), draw(st.integers(3, 4)), draw(st.integers(2, 4)),
                   draw(st.sampled_from([6, 8, 9])))
    full = count_supernet(spec)["main"]
    def one_of(*values): return draw(st.sampled_from(values))
    cfg = Settings(target_m=full * draw(st.floats(0.1, 0.5)) / 1e6, stages=one_of(1, 3), regrow=one_of(0.0, 0.2, 0.7),
                   regrow_cells=one_of("uniform", "density"), warmup=draw(st.integers(0, 1)),
                   prune_every=draw(st.integers(1, 2)), max_epochs=6,
                   optimisation=one_of("joint", "iterative-epoch", "iterative-half-epoch"),
                   threshold_init=one_of("min", "zero"), cost=one_of("params", "macs"), mu=one_of(0.0, 1.0),
                   granularities=one_of(("operation", "filter", "weight"), ("operation",), ("operation", "filter"),
                                        ("filter", "weight")), lambda_step=one_of(1e-5, 0.02))
    cfg.stage_keep = (0.3,) * cfg.stages
    loader, commits = Noise(spec.size, spec.classes, 2), []
    search = Search(spec, {"train": loader, "val": loader}, cfg, engine=FastEngine(), seed=draw(st.integers(0, 5)))
    done = []
    search.events.listen(commits.append, "commit")
    search.events.listen(done.append, "done")
    search.run()
    assert len(done) == 1 and search.finished
    net = search.net
    for c in range(spec.cells):
        for n in range(INPUTS, STATES):
            assert net.op_live[c, list(NODE_EDGES[n])].any()
    params = net.count().params
    target = cfg.target_m * 1e6
    assert done[0].data["reached"] == (0.99 * target <= params <= target) and params == done[0].data["params"]
    assert net(loader.batch(0, 0)[0]).isfinite().all()
    for before, after in zip(commits, commits[1:]):  # within a stage the super-net only shrinks
        assert before.stage != after.stage or after.data["params_searched"] <= before.data["params_searched"]


def small_search():
    spec, cfg = NetSpec(2, 3, 3, 8), Settings(target_m=0.004, warmup=1, prune_every=1, max_epochs=3, lambda_step=0.02)
    loader = Noise(8, 3, 3)
    return Search(spec, {"train": loader, "val": loader}, cfg, engine=FastEngine(), seed=1)


@pytest.fixture(scope="module")
def whole_search():
    whole, events = small_search(), []
    whole.events.listen(lambda e: events.append(e.to_dict()), "epoch", "commit", "regrow", "stage", "done")
    whole.run()
    return whole, events


@pytest.mark.parametrize("at", [0, 17, 26])
def test_resume_gives_the_same_bits(at, whole_search):
    make, (whole, events) = small_search, whole_search
    part, before = make(), []
    part.events.listen(lambda e: before.append(e.to_dict()), "epoch", "commit", "regrow", "stage", "done")
    for _ in range(at):
        part.step()
    rest = make()
    rest.load_state_dict(part.state_dict())
    rest.events.listen(lambda e: before.append(e.to_dict()), "epoch", "commit", "regrow", "stage", "done")
    rest.run()
    assert before == events
    a, b = whole.net.state_dict(), rest.net.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_until_stops_where_it_says():
    spec, loader = NetSpec(2, 3, 3, 8), Noise(8, 3, 3)
    search = Search(spec, {"train": loader, "val": loader}, Settings(target_m=0.004, warmup=1, prune_every=2,
                                                                     max_epochs=2), engine=FastEngine(), seed=1)
    search.run("step")
    assert search.steps == 1
    search.run("epoch")
    assert (search.steps, search.epoch) == (3, 1)
    search.run("commit")
    assert search.epoch == 3 and search.rebuilds >= 1
    with pytest.raises(InputError, match="run until"):
        search.run("tomorrow")


def test_a_loss_that_is_not_finite_stops_with_the_state_before_it():
    spec, loader = NetSpec(2, 3, 3, 8), Noise(8, 3, 3)
    search = Search(spec, {"train": loader, "val": loader}, Settings(target_m=0.004, warmup=1, lr_weights=1e-3),
                    engine=FastEngine(), seed=1)
    search.run("epoch")
    search.net.stem.convs[0].weight.data.fill_(float("nan"))
    good = search.net.cells[0].omega.detach().clone()
    with pytest.raises(NonFiniteLoss):
        search.run("epoch")
    assert search.safe_state["counters"]["epoch"] == 1 and torch.equal(search.safe_state["net"]["cells.0.omega"], good)


def test_a_target_above_the_net_is_refused():
    loader = Noise(8, 3, 3)
    with pytest.raises(InputError, match="target_m"):
        Search(NetSpec(2, 3, 3, 8), {"train": loader, "val": loader}, Settings(target_m=5.0), engine=FastEngine())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_search_step_on_cuda():
    spec, loader = NetSpec(4, 3, 3, 8), Noise(8, 3, 3)
    losses = []
    for device in ("cpu", "cuda"):
        search = Search(spec, {"train": loader, "val": loader}, Settings(target_m=0.004, warmup=0), engine=FastEngine(),
                        seed=1, device=device)
        search.events.listen(lambda e: losses.append(e.loss), "step")
        search.run("step")
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_names_of_operations_are_in_the_fields_order():
    assert OPS == ("skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5", "avg_pool_3x3",
                   "max_pool_3x3")
