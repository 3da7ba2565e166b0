"""What a GPU would do with this code, shown without one: on a pretend device (see `pretend.py`), by counting launches, and
with something that stands for CUDA graphs."""
import collections

import pytest
import torch
import torch.nn.functional as F

import pretend
from mgdarts.base.data import load_data
from mgdarts.base.options import Compute, Train
from mgdarts.fast import engine as fast_engine
from mgdarts.fast.engine import FastEngine
from mgdarts.fast.graph import Graphs
from mgdarts.fast.launches import Launches
from mgdarts.fast.layout import natively
from mgdarts.methods.registry import METHODS, preset
from mgdarts.net.derive import derive
from mgdarts.net.supernet import SuperNet
from mgdarts.runs import make
from mgdarts.search import loop, train
from mgdarts.search.loss import regulariser
from mgdarts.search.step import make_optimizer
from mgdarts.base.options import Search as Settings
from mgdarts.space.darts import NetSpec

TINY = {"data.subset": 200, "search.batch": 32, "search.length": 2, "search.max_epochs": 3, "search.warmup": 1,
        "search.prune_every": 1, "search.lambda_step": .05, "rules.samples": 1, "rules.batches": 1, "train.epochs": 1,
        "train.batch": 32}
OWN = {"dass": {"rules.sparse": .5}, "zero-cost-pt": {"rules.ops": "skip_connect,sep_conv_3x3", "space.cells": 3},
       "mobilenet": {"space.kind": "mobilenet", "search.max_epochs": 2}}
# what crosses in a step between the first ones of an epoch: what is drawn on the CPU, so that all devices draw the same
LEFT = {"gdas": {"methods/sampled.py", "net/supernet.py"}, "proxylessnas": {"methods/sampled.py", "net/supernet.py"},
        "random": {"methods/sampled.py", "net/supernet.py"}, "p-darts": {"net/cell.py"},
        "tanglenas": {"methods/tanglenas.py", "net/cell.py", "search/step.py"}}


def config(name, **more):
    method = "mg-darts" if name == "mobilenet" else name
    return preset("smoke", method, **{**TINY, **OWN.get(name, {}), **more})


@pytest.fixture(scope="module")
def splits():
    return load_data(config("mg-darts").data, 0)


class There:
    "A loader whose batches lie on the pretend device from the beginning."
    def __init__(self, loader): self.loader = loader
    def __len__(self): return len(self.loader)
    def batch(self, epoch, step): return tuple(map(pretend.there, self.loader.batch(epoch, step)))
    def eval(self): return (tuple(map(pretend.there, pair)) for pair in self.loader.eval())


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


def placed(monkeypatch):
    monkeypatch.setattr(make, "device_of", lambda cfg: pretend.NAME)
    inner = make.Loader
    monkeypatch.setattr(make, "Loader", lambda *args, **more: There(inner(*args, **more)))


def told(search):
    "What a search says, without losses that come from sums in another order."
    heard = []
    search.events.listen(lambda e: heard.append(e.to_dict()), "stage", "epoch", "commit", "regrow", "done")
    return heard


@pytest.mark.parametrize("name", [*METHODS, "mobilenet"])
def test_a_whole_search_on_a_device(name, splits, monkeypatch):
    cfg = config(name)
    with natively():
        here = make.make_search(cfg, splits)
        expected = told(here)
        here.run()
    placed(monkeypatch)
    with pretend.Device() as device:
        search = make.make_search(cfg, splits)
        heard, (seen, done) = told(search), steps_watched(monkeypatch, device, loop)
        search.run()
        arch = derive(search.net)
        assert search.net.alpha.device == pretend.NAME and search.finished and done
        assert {line.split(":")[0] for _, line in seen} <= LEFT.get(name, set()), seen
        trainer = make.make_trainer(cfg, arch, splits)
        seen, done = steps_watched(monkeypatch, device, train)
        result = trainer.run()
        assert done and result["epochs"] == 1 and not seen, seen
    assert heard == expected  # the same numbers as on a CPU that computes as a GPU does, to the last bit
