"Training steps of the super-net: time, memory and launches of each way to compute them, and what was planned."
import collections
import copy
import itertools
import statistics

import torch
import torch.nn.functional as F

from card.ground import Ground, attempt, batch, each
from mgdarts.base.options import Compute, Search as Settings
from mgdarts.fast.engine import make
from mgdarts.fast.layout import natively
from mgdarts.net.supernet import SuperNet
from mgdarts.runs import memory
from mgdarts.search import loss
from mgdarts.search.stages import plan
from mgdarts.search.step import make_optimizer
from mgdarts.space.darts import NetSpec


def whole_net(C: int, cells: int, live: float, size: int = 32, **how) -> SuperNet:  # how: of `Compute`
    "The last stage's net, everything in it that has not been pruned."
    net = SuperNet(NetSpec(C, cells, 10, size), seed=0, engine=make(Compute(**how)))
    net.open(cells - 1, 2)
    net.discretising = True
    if live < 1: memory.prune_to(net, live, torch.Generator().manual_seed(0))
    return net


def trained(net, n: int, g: Ground):
    "A function: one training step, all of it but the batch."
    opt = make_optimizer(net, Settings())
    weights, (x, y) = opt.param_groups[0]["params"], batch(g, n, net.spec.size)
    net.train()

    def step():
        net.zero_grad(set_to_none=True)
        out = F.cross_entropy(net(x), y) + 0.01 * sum(loss.regulariser(net))
        out.backward()
        torch.nn.utils.clip_grad_norm_(weights, 5.0)
        opt.step()
        return out

    return step


# cudnn_search: for the fastest of cuDNN's kernels
NAMES = ("C", "L", "batch", "live", "how", "impl", "cudnn_search")
STEPS = [(16, 8, 96, 1.0, "tf32", "fused", False),
         (16, 8, 96, 1.0, "bf16", "fused", False),
         (16, 8, 96, 1.0, "fp32", "fused", False),
         (24, 8, 96, 1.0, "bf16", "fused", False),
         (24, 8, 96, 1.0, "tf32", "fused", False),
         (16, 8, 96, 1.0, "tf32", "reference", False),
         (16, 8, 96, 1.0, "bf16", "reference", False),
         (44, 14, 96, 1.0, "bf16", "fused", False),
         (16, 8, 96, 0.3, "tf32", "fused", False),
         (16, 8, 96, 0.3, "bf16", "fused", False),
         (16, 8, 96, 0.3, "fp32", "fused", False),
         (44, 14, 96, 1.0, "tf32", "fused", False),
         (16, 8, 96, 1.0, "bf16", "fused", True),
         (24, 8, 96, 1.0, "bf16", "fused", True)]
TOY_STEPS = [(4, 3, 8, 1.0, "fp32", "fused", False),
             (4, 3, 8, 0.3, "bf16", "fused", True),
             (2, 3, 4, 0.1, "fp32", "reference", False)]


def in_a_graph(g: Ground, row: dict, net, step):
    "The step as one graph: time, memory, and whether it computes numbers."
    net.zero_grad(set_to_none=True)
    g.fresh()
    replay = attempt(row, "graph", lambda: g.graph(step))
    if not replay: return
    row["graph"] = True
    row["graph_ms"] = g.ms(replay, 0.6)
    row |= {f"graph_{k}": v for k, v in g.peaks().items()}
    row["graph_loss_finite"] = bool(torch.stack([p.isfinite().all() for p in net.parameters()]).all())


def one_step(g: Ground, row: dict):
    C, L, n, live, how, impl, search = row.values()
    g.fresh()
    g.precision(how)
    net = whole_net(C, L, live, 8 if g.toy else 32, impl=impl, amp=how == "bf16", tf32=how != "fp32").to(g.device)
    typical = (C, live, search) == (16, 1.0, False)
    step = trained(net, n, g)
    row["first_ms"] = 1e3 * g.once(step)
    row["ms"] = g.ms(step, 0.9)
    row |= g.peaks()
    attempt(row, "launches", lambda: g.kernels(step, 15 if typical else 0))
    if impl == "fused":
        in_a_graph(g, row, net, step)
        if typical: row["parts"] = halves_of(net, n, g)


def searching(g: Ground, row: dict):
    "A step with or without the search for the fastest of cuDNN's kernels."
    torch.backends.cudnn.benchmark = row["cudnn_search"]
    try: one_step(g, row)
    finally: torch.backends.cudnn.benchmark = False


def steps(g: Ground):
    "A training step of the last stage's net: eager and as one graph, time, memory, launches."
    cases = ([dict(zip(NAMES, case))] for case in (TOY_STEPS if g.toy else STEPS))
    yield from each(g, 8, searching, cases)


def halves_of(net, n: int, g: Ground) -> dict:
    "Milliseconds of the parts of a step, each waited for."
    opt, (x, y), seen = make_optimizer(net, Settings()), batch(g, n, net.spec.size), collections.defaultdict(list)

    def clocked(name, f):
        out = []
        seen[name].append(1e3 * g.once(lambda: out.append(f())))
        return out[0]

    for _ in range(5):
        net.zero_grad(set_to_none=True)
        out = clocked("forward", lambda: F.cross_entropy(net(x), y))
        out = out + 0.01 * clocked("regularisers", lambda: sum(loss.regulariser(net)))
        clocked("backward", out.backward)
        clocked("clip", lambda: torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 5.0))
        clocked("update", opt.step)
    return {k: statistics.median(v) for k, v in seen.items()}


def planned_mib(net, n: int) -> float: return memory.step_memory(net, Settings(), n).peak_bytes / 2**20


def native_mib(net, n: int) -> float:
    with natively(): return planned_mib(net, n)


def planned(g: Ground):
    """What the plan says of those steps and of Table IV's stages. Runs beside the others.

    As it is, which is of the CPU's compiled kernels, and of the path that a device without them takes.
    """
    for case in dict.fromkeys(s[:6] for s in (TOY_STEPS[:1] if g.toy else STEPS)):
        C, L, n, live, how, impl = case
        if impl == "reference": continue  # a plan of it takes minutes
        net = whole_net(C, L, live, 8 if g.toy else 32, amp=how == "bf16")
        yield {"of": "steps", **dict(zip(NAMES, case)), "planned_mib": planned_mib(net, n),
               "planned_native_mib": native_mib(net, n)}
    for row, net, n in itertools.islice(stage_nets(g), 1 if g.toy else None):
        row = {"of": "table4", **row, "planned_native_mib": native_mib(net, n)}
        if row["how"] == "fp32" and row["recompute"] == "none": row["planned_mib"] = planned_mib(net, n)
        yield row


# Table IV
def stage_nets(g: Ground):
    """The nets that stages begin with, at C=24, L=8, batch 96, in one stage and in three.

    Between stages random operations go and some return.
    """
    C, L, n = (4, 3, 8) if g.toy else (24, 8, 96)
    cases = [(1, "fp32", "none"), (3, "fp32", "none"), (1, "bf16", "none"), (3, "bf16", "none"),
             (3, "fp32", "earlier"), (3, "bf16", "earlier")]
    for stages, how, recompute in cases[1:2] if g.toy else cases:
        made, draw = make(Compute(amp=how == "bf16", recompute=recompute)), torch.Generator().manual_seed(0)
        net = SuperNet(NetSpec(C, L, size=8 if g.toy else 32), seed=0, engine=made)
        for i, (name, end, head) in enumerate(plan(net.spec, stages)[:stages]):
            net.open(end, head)
            net.discretising = True
            yield {"stages": stages, "stage": name, "how": how, "recompute": recompute}, net, n
            if i + 1 < stages: memory._thin(net, 0.3, Settings().regrow, draw)


def stage_step(g: Ground, row: dict, net, n: int):
    g.fresh()
    g.precision(row["how"])
    step = trained(copy.deepcopy(net).to(g.device), n, g)
    for _ in range(3): step()
    row |= {"step_ms": 1e3 * g.once(step), **g.peaks()}


def table4(g: Ground):
    "The most memory that a joint step of each stage takes (Table IV); `planned` says what was planned."
    yield from each(g, 3, stage_step, stage_nets(g))
