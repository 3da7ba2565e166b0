"""A search by hand in one of many processes: its losses, and what is alive after each commit, as JSON on stdout.

usage: steps.py METHOD IMPL DTYPE STEPS [KEY=VALUE ...]; METHOD train: a retraining, with all that is random in one
"""
import hashlib
import json
import sys

import torch

from mgdarts.base import ranks
from mgdarts.base.batches import Loader
from mgdarts.methods.registry import preset
from mgdarts.base.data import load_data
from mgdarts.net.sample import random_architecture
from mgdarts.runs.make import make_search, make_trainer, net_spec


def masks(net) -> str:
    live = [net.op_live, *(c.layout.alive for c in net.cells), *(c.layout.ops for c in net.cells)]
    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in live)).hexdigest()


def train(kind, steps):
    "A retraining in its second epoch, where paths are dropped."
    cfg = preset("smoke", **{"data.size": 16, "data.subset": 200, "data.autoaugment": True, "train.batch": 32,
                             "train.autoaugment": True, "train.drop_path": 0.5, "train.aux_weight": 0.4})
    ranks.join()
    splits, losses = load_data(cfg.data, cfg.seed), []
    trainer = make_trainer(cfg, random_architecture(net_spec(cfg, splits), 60_000), splits)
    real, trainer.epoch = trainer.loaders["train"].batch, 1
    trainer.net.to(kind)
    trainer.loaders["train"].batch = lambda *at: tuple(t.to(kind) if t.is_floating_point() else t for t in real(*at))
    trainer.events.listen(lambda e: losses.append(e.loss), "step")
    for _ in range(steps): trainer.step()
    if ranks.HERE.leads: print(json.dumps({"losses": losses}))
    ranks.leave()


def main(method, impl, dtype, steps, *settings):
    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    if method == "train": return train(kind, int(steps))
    size = {"data.subset": 160, "data.test_subset": 60, "search.batch": 32, "search.warmup": 1, "search.length": 4,
            "search.max_epochs": 4, "search.prune_every": 1, "search.lambda_step": 0.05, "compute.impl": impl}
    cfg = preset("smoke", method, **{**size, **dict(pair.split("=", 1) for pair in settings)})
    ranks.join(synced=cfg.compute.sync_norms)
    real, shown = Loader.batch, Loader.eval
    Loader.batch = lambda self, *at: tuple(t.to(kind) if t.is_floating_point() else t for t in real(self, *at))
    Loader.eval = lambda self: ((x.to(kind), y) for x, y in shown(self))
    search, losses, alive = make_search(cfg), [], []
    def widen(event):
        "Before a step, whatever has grown, and what is trained along with it."
        for part in (search.net, *(m for m in vars(search.along or search).values() if isinstance(m, torch.nn.Module))):
            part.to(kind)
    search.events.listen(widen, "batch")
    search.events.listen(lambda e: losses.append(e.loss), "step")
    search.events.listen(lambda e: alive.append([e.type, masks(search.net)]), "commit", "regrow", "stage")
    while not search.finished and (int(steps) == 0 or len(losses) < int(steps)): search.step()
    net, whole = search.net, hashlib.sha256()
    for t in (*net.parameters(), *net.buffers()): whole.update(t.detach().cpu().numpy().tobytes())
    if ranks.HERE.many: ranks.refuse_different(int(whole.hexdigest()[:15], 16), "the end")
    if ranks.HERE.leads: print(json.dumps({"losses": losses, "alive": alive, "net": whole.hexdigest()}))
    ranks.leave()


if __name__ == "__main__": main(*sys.argv[1:])
