"Training of a found network on the device."
import contextlib
import math

import torch
import torch.nn.functional as F

from card.ground import Ground, attempt, batch, each, noise, syncs, tried
from mgdarts.fast import engine
from mgdarts.fast.engine import make
from mgdarts.methods.registry import preset
from mgdarts.net.count import count
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.sample import random_architecture
from mgdarts.runs.make import make_trainer
from mgdarts.space.darts import NetSpec


@contextlib.contextmanager
def plain_stem(net):
    "The maps of a net's stem in PyTorch's default layout (NCHW), instead of channels last."
    inner = engine.run

    def run(m, *args):
        out = inner(m, *args)
        return engine.each(torch.Tensor.contiguous, out) if m is net.stem else out

    engine.run = run
    try: yield
    finally: engine.run = inner


def training_step(g: Ground, arch, n: int, how: str, layout: str):
    "A function: one step of training a network, all of it but the batch."
    net = DerivedNet(arch, True, 0, make()).to(g.device)
    if layout == "nhwc": net = net.to(memory_format=torch.channels_last)
    opt = torch.optim.SGD(net.parameters(), 0.025, 0.9, weight_decay=3e-4)
    x, y = batch(g, n, arch.spec.size)
    net.train()

    def step():
        opt.zero_grad(set_to_none=True)
        stem = plain_stem(net) if layout == "nchw" else contextlib.nullcontext()
        with torch.autocast(g.device.type, torch.bfloat16, enabled=how == "bf16"), stem: logits, aux = net(x)
        (F.cross_entropy(logits.float(), y) + 0.4 * F.cross_entropy(aux.float(), y)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        opt.step()

    return step


def bare_steps(g: Ground, row: dict, arch):
    "Eager and as one graph."
    g.fresh()
    g.precision(row["how"])
    n = row["batch"]
    step = training_step(g, arch, n, row["how"], row["layout"])
    g.fresh()
    row["ms"] = g.ms(step)
    row |= g.peaks()
    attempt(row, "launches", lambda: g.kernels(step, 8))
    replay = attempt(row, "graph", lambda: g.graph(step))
    if replay: row |= {"graph": True, "graph_ms": g.ms(replay)}
    row["images_per_s"] = 1e3 * n / min(row["ms"], row.get("graph_ms", math.inf))


def trainer_steps(g: Ground, row: dict, arch, n: int):
    "With batches and drop path."
    g.fresh()
    cfg = preset("small", device=g.device.type, **{"train.batch": n, "compute.tf32": True})
    t = make_trainer(cfg, arch, noise(8 * n, arch.spec.size, g.device))
    t.epoch, t.epoch_step = 300, 1  # drop path is at half its strength
    last = len(t.loaders["train"])

    def step():
        t.epoch_step = 1 + t.epoch_step % (last - 2)
        t.optimise()

    row |= {"batch": n, "ms": g.ms(step)}
    row["images_per_s"] = 1e3 * n / row["ms"]
    with syncs(g) as where: step()
    row |= {"syncs": sum(where.values()), "where": dict(where)}


def retraining(g: Ground):
    """A found net of 0.7 million parameters in training.

    Bare steps, eager and as one graph, and steps of the trainer with batches and drop path.
    """
    spec, n = (NetSpec(4, 3, size=8), 8) if g.toy else (NetSpec(24, 8), 96)
    arch = random_architecture(spec, 8_000 if g.toy else 700_000, 0)
    size = {"params": count(arch).params, "macs": count(arch).macs_dense}
    cases = [("tf32", n, "nhwc"), ("bf16", n, "nhwc"), ("fp32", n, "nhwc"), ("bf16", n, "nchw"),
             ("bf16", 4 * n, "nhwc")]
    named = [dict(zip(("how", "batch", "layout"), case)) | size for case in cases[: 2 if g.toy else None]]
    for row in each(g, 6, bare_steps, ((row, arch) for row in named)): yield row
    if "note" in row: return
    row = {"how": "trainer"}
    yield tried(row, trainer_steps, g, row, arch, named[-1]["batch"])
