"""What a GPU would do with this code, shown without one: on a pretend device (see `pretend.py`), by counting launches,
and with something that stands for CUDA graphs."""
import collections

import pytest
import torch
import torch.nn.functional as F

import pretend
from mgdarts.base.data import load_data
from mgdarts.base.options import Search as Settings
from mgdarts.fast import engine as fast_engine
from mgdarts.fast.engine import FastEngine
from mgdarts.fast.graph import Graphs
from mgdarts.fast.launches import Launches
from mgdarts.fast.layout import natively
from mgdarts.methods.registry import METHODS, parts_of, preset
from mgdarts.net.derive import derive
from mgdarts.net.sample import random_architecture
from mgdarts.net.supernet import SuperNet
from mgdarts.runs import make
from mgdarts.search import loop, train
from mgdarts.search.loss import regulariser
from mgdarts.search.step import make_optimizer
from mgdarts.space.darts import NetSpec

TINY = {"data.subset": 200, "search.batch": 32, "search.length": 2, "search.max_epochs": 2, "search.warmup": 1,
        "search.prune_every": 1, "search.lambda_step": .05, "rules.samples": 1, "rules.batches": 1, "train.epochs": 1,
        "train.batch": 32, "train.drop_path": .2, "train.aux_weight": .4}
FEW = {"rules.ops": "skip_connect,sep_conv_3x3,dil_conv_5x5,max_pool_3x3"}  # but for MG-DARTS, which has all
OWN = {"dass": {"rules.sparse": .5}, "zero-cost-pt": {"rules.ops": "skip_connect,sep_conv_3x3", "space.cells": 3},
       "mobilenet": {"space.kind": "mobilenet", "search.max_epochs": 2}}
LAYERS = ("random", "tanglenas") # methods that are tried in the MobileNet-like space, too
# what crosses in a step between the first ones of an epoch: what is drawn on the CPU, so that all devices draw the same
LEFT = {"gdas": {"methods/sampled.py", "net/supernet.py"}, "proxylessnas": {"methods/sampled.py", "net/supernet.py"},
        **dict.fromkeys(("random", "weaknas", "ctnas"), {"methods/sampled.py", "net/supernet.py"}),
        "p-darts": {"net/cell.py"},
        "tanglenas": {"methods/tanglenas.py", "net/cell.py", "search/step.py"}}


def config(name, **more):
    method, _, space = name.rpartition(" ")
    if space == "mobilenet" and method: more = {"space.kind": space, **more}
    else: method = "mg-darts" if name == "mobilenet" else name
    halves = {"search.batch": 16} if "arch" in parts_of(preset("smoke", method)).schedule.images else {}
    few = {} if method == "mg-darts" else FEW
    return preset("smoke", method, **{**TINY, **few, **halves, **OWN.get(name, {}), **more})


@pytest.fixture(scope="module")
def splits():
    return load_data(config("mg-darts").data, 0)


def steps_watched(monkeypatch, device, module):
    "What crosses in steps that are neither the first after something changed nor the last of an epoch."
    seen, inner, done = collections.Counter(), module.optimise, []

    def optimise(owner):
        steps, at = len(owner.loaders["train"]), owner.state.epoch_step if hasattr(owner, "state") else owner.epoch_step
        before = device.seen.copy()
        inner(owner)
        if 1 < at < steps - 1:
            done.append(at)
            seen.update({what: n for what, n in (device.seen - before).items() if what[0] != "copy on the device"})
    monkeypatch.setattr(module, "optimise", optimise)
    return seen, done


def told(search):
    "What a search says, without losses that come from sums in another order."
    heard = []
    search.events.listen(lambda e: heard.append(e.to_dict()), "stage", "epoch", "commit", "regrow", "done")
    return heard


@pytest.mark.parametrize("name", [*METHODS, "mobilenet", *(f"{name} mobilenet" for name in LAYERS)])
def test_a_whole_search_on_a_device(name, splits, monkeypatch):
    cfg = config(name)
    with natively():
        here = make.make_search(cfg, splits)
        expected = told(here)
        here.run()
    monkeypatch.setattr(make, "device_of", lambda cfg: pretend.NAME)
    with pretend.Device() as device:
        moved = load_data(cfg.data, 0, pretend.NAME)
        search = make.make_search(cfg, moved)
        heard, (seen, done) = told(search), steps_watched(monkeypatch, device, loop)
        search.run()
        arch = derive(search.net)
        assert search.net.alpha.device == pretend.NAME and search.finished and bool(done) == bool(search.length)
        assert {line.split(":")[0] for _, line in seen} <= LEFT.get(name.removesuffix(" mobilenet"), set()), seen
        trainer = make.make_trainer(cfg, arch, moved)
        seen, done = steps_watched(monkeypatch, device, train)
        result = trainer.run()
        assert done and result["epochs"] == 1 and not seen, seen
    assert heard == expected  # the same numbers as on a CPU that computes as a GPU does, to the last bit


# ---- launches

@pytest.mark.parametrize("channels, cells, most", [(16, 8, 3500), (44, 14, 7000)])
def test_launches_of_a_step(channels, cells, most):
    "The whole step of the last stage's net: forward, regularisers, backward, clipping, update."
    net = SuperNet(NetSpec(channels, cells, size=16), seed=0, engine=FastEngine())
    net.open(cells - 1, 2)
    net.discretising = True
    optimizer, weights = make_optimizer(net, Settings()), [p for c in net.cells for p in (c.omega, c.plain)]
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])

    def step():
        loss = F.cross_entropy(net(x, []), y) + .01 * sum(regulariser(net))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 5.)
        optimizer.step()
        net.zero_grad(set_to_none=True)
    with natively():
        step()
        with Launches() as seen: step()
    assert seen.total <= most, seen.by_name.most_common(12)


# ---- graphs

class Notes:
    "Stands for a CUDA graph: recording computes nothing, playing computes from the tensors that were recorded."
    made: list = []
    first = staticmethod(lambda f, inputs: f(*inputs))

    def __init__(self):
        self.played = 0
        self.made.append(self)

    def record(self, f, inputs):
        self.kept = {k: v.clone() for k, v in self.net.state_dict().items()}
        self.f, self.inputs, self.out = f, inputs, f(*inputs)
        self.grads = [(p, p.grad) for p in self.net.parameters() if p.grad is not None]
        self.net.load_state_dict(self.kept)
        return self.out

    def play(self):
        self.played += 1
        new = self.f(*self.inputs)
        for p, there in self.grads: there.copy_(p.grad)
        for there, value in zip(self.out, new): there.copy_(value)


@pytest.mark.parametrize("method", ("mg-darts", "darts-v1", "gdas", "beta-darts"))
def test_a_search_whose_steps_are_played(method, splits, monkeypatch):
    "It is the same search to the last bit; and where steps are not alike, nothing is recorded."
    plain = make.make_search(config(method), splits)
    expected = told(plain)
    plain.run()
    search = make.make_search(config(method), splits)
    heard = told(search)
    search.engine.graphs, Notes.made = Graphs(Notes), []
    monkeypatch.setattr(fast_engine, "worth_a_graph", lambda how, device: how != "off")
    inner = Graphs.forget_if_changed
    def forget(self, net):
        inner(self, net)
        Notes.net = net
    monkeypatch.setattr(Graphs, "forget_if_changed", forget)
    search.run()
    assert heard == expected
    assert bool(Notes.made) == (method in ("mg-darts", "darts-v1"))
    assert all(n.played for n in Notes.made)


def test_a_retraining_whose_steps_are_played(splits, monkeypatch):
    spec = NetSpec(4, 3, splits.num_classes, splits.size, splits.in_channels)
    arch, cfg = random_architecture(spec, 10_000), config("mg-darts", **{"train.epochs": 2})
    plain, trainer = (make.make_trainer(cfg, arch, splits) for _ in range(2))
    expected = plain.run()
    trainer.net.engine.graphs, Notes.made, Notes.net = Graphs(Notes), [], trainer.net
    monkeypatch.setattr(fast_engine, "worth_a_graph", lambda how, device: how != "off")
    assert trainer.run() == expected
    assert len(Notes.made) == 2 and all(n.played for n in Notes.made)  # without drop path in the first epoch, and with
    states = plain.net.state_dict(), trainer.net.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))


def test_a_step_that_cannot_be_recorded_is_computed(recwarn):
    net, key = torch.nn.Sequential(torch.nn.Linear(2, 1)), "alike"
    net.cells = []

    class Broken(Notes):
        def record(self, f, inputs): raise RuntimeError("operation not permitted when stream is capturing")

    def f(x):
        net.zero_grad(set_to_none=True)
        y = net[0](x).sum()
        y.backward()
        return (y.detach(),)
    graphs = Graphs(Broken)
    outs = [graphs(net, f, (torch.ones(1, 2),), key)[0] for _ in range(6)]
    assert all(torch.equal(o, outs[0]) for o in outs) and net[0].weight.grad is not None
    said = ("a step cannot be recorded, and is computed without a graph: "
            "operation not permitted when stream is capturing")
    assert [str(w.message) for w in recwarn] == [said]


def test_a_recording_that_differs_is_not_used(recwarn):
    net = torch.nn.Sequential(torch.nn.Linear(2, 1))
    net.cells = []

    class Wrong(Notes):
        def play(self):
            super().play()
            for there in self.out: there.mul_(2)
            for _, there in self.grads: there.zero_()

    def f(x):
        net.zero_grad(set_to_none=True)
        y = net[0](x).sum()
        y.backward()
        return (y.detach(),)
    Wrong.net, graphs = net, Graphs(Wrong)
    outs = [graphs(net, f, (torch.ones(1, 2),), "alike")[0] for _ in range(6)]
    assert all(torch.equal(o, outs[0]) for o in outs) and net[0].weight.grad.eq(1).all()
    assert len(recwarn) == 1 and "other numbers" in str(recwarn[0].message)
