"""Fewer, larger kernels: one moment of a cell, which is everything that reads two of its states, in several layouts.

A prototype, to learn which of them pays. Two maps [N, C, H, W] are read by eight edges (each goes to four nodes), with
four kinds of convolutions an edge: 32 times depthwise and 1x1, 16 of them (separable) followed by a norm, a ReLU and a
second depthwise and 1x1; then a norm each, and the sum of what goes to a node.
"""
import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from card.ground import Ground, attempt, each, tried

KINDS = {"sep3": (3, 1), "sep5": (5, 1), "dil3": (3, 2), "dil5": (5, 2)}  # side of the depthwise kernel, dilation
SEPS = ("sep3", "sep5")
NODES, EDGES = 4, 8  # edge e reads map e // 4 and goes to node e % 4


class Weights(nn.Module):
    "Of a moment. Channels of eight maps side by side are in the order (edge, channel)."

    def __init__(self, C: int):
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def kernel(*shape, fan):
            return nn.Parameter(torch.empty(shape).uniform_(-1, 1, generator=g) / math.sqrt(fan))

        def depth(k): return kernel(EDGES * C, 1, KINDS[k][0], KINDS[k][0], fan=KINDS[k][0] ** 2)
        def point(k): return kernel(EDGES, C, C, fan=C)
        def norm(k): return nn.Parameter(torch.rand(2, EDGES * C, generator=g) + 0.5)
        def of_each(kinds, make): return nn.ParameterDict({k: make(k) for k in kinds})

        self.C = C
        self.depth, self.depth2 = of_each(KINDS, depth), of_each(SEPS, depth)
        self.point, self.point2 = of_each(KINDS, point), of_each(SEPS, point)
        self.norm2, self.norm = of_each(SEPS, norm), of_each(KINDS, norm)  # of the middles, of the ends


def normed(x, scale, shift): return torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, 1e-5)[0]
def format_of(x): return torch.channels_last if is_last(x) else torch.contiguous_format
def is_last(x): return x.is_contiguous(memory_format=torch.channels_last)


def apart(w: Weights, x0, x1):  # [N, 4C, H, W], the four nodes side by side
    "As it is computed today on a card: operation by operation."
    C, maps, nodes = w.C, (x0.relu(), x1.relu()), [None] * NODES

    def mix(x, depth, point, side, dil):
        return F.conv2d(F.conv2d(x, depth, None, 1, dil * (side // 2), dil, C), point[:, :, None, None])

    for k, (side, dil) in KINDS.items():
        depth, point = w.depth[k].to(x0.dtype), w.point[k].to(x0.dtype)
        if k in SEPS: depth2, point2 = w.depth2[k].to(x0.dtype), w.point2[k].to(x0.dtype)
        for e in range(EDGES):
            own = slice(e * C, (e + 1) * C)
            y = mix(maps[e // NODES], depth[own], point[e], side, dil)
            if k in SEPS: y = mix(normed(y, *w.norm2[k][..., own]).relu(), depth2[own], point2[e], side, 1)
            y, j = normed(y, *w.norm[k][..., own]), e % NODES
            nodes[j] = y if nodes[j] is None else nodes[j] + y
    return torch.cat(nodes, 1)


# depthwise: from 2 maps, each read four times, to 8
def repeated(x, weight, dil, copies):
    "Repeat each map for all edges that read it."
    side, fmt, C = weight.shape[-1], format_of(x), x.shape[1] // 2
    if copies > 1: x = torch.cat([x[:, :C]] * copies + [x[:, C:]] * copies, 1).contiguous(memory_format=fmt)
    return F.conv2d(x, weight, None, 1, dil * (side // 2), dil, x.shape[1])


def multiplied(x, weight, dil, copies):
    """One group for each channel of a map, with a filter for each edge that reads it.

    Channels come in the order (map, channel, node).
    """
    if copies == 1: return repeated(x, weight, dil, 1)
    side, C = weight.shape[-1], x.shape[1] // 2
    filters = weight.view(2, copies, C, side * side).transpose(1, 2).reshape(weight.shape)
    return F.conv2d(x, filters, None, 1, dil * (side // 2), dil, 2 * C)


# 1x1: eight maps, each with its own matrix
def rows(u): return u.permute(0, 2, 3, 1).reshape(-1, u.shape[1])
def unrows(y, u): return y.view(len(u), *u.shape[2:], -1).permute(0, 3, 1, 2)


def grouped(u, w, interleaved):
    return F.conv2d(u, w.flatten(0, 1)[:, :, None, None], None, groups=EDGES)


def batched(u, w, interleaved):
    n, c, h, wide = u.shape
    if is_last(u):  # the maps are read where they lie
        y = torch.bmm(rows(u).view(-1, EDGES, c // EDGES).transpose(0, 1), w.transpose(1, 2))
        return unrows(y.transpose(0, 1).reshape(-1, c), u)
    return torch.matmul(w, u.view(n, EDGES, c // EDGES, h * wide)).view(u.shape)


def matrix(w, interleaved):  # [8C, 8C]
    "The eight matrices as one, zero elsewhere: a card has arithmetic to spare."
    C, whole = w.shape[-1], EDGES * w.shape[-1]
    def one(n): return torch.eye(n, dtype=w.dtype, device=w.device)
    if not interleaved: return (w[:, :, None, :] * one(EDGES)[:, None, :, None]).reshape(whole, whole)
    maps, nodes = one(2).view(2, 1, 1, 2, 1, 1), one(NODES).view(1, NODES, 1, 1, 1, NODES)
    return (w.view(2, NODES, C, 1, C, 1) * maps * nodes).reshape(whole, whole)


def blocked(u, w, interleaved):
    m = matrix(w, interleaved)
    if is_last(u): return unrows(rows(u) @ m.t(), u)
    return torch.matmul(m, u.flatten(2)).view(u.shape)


DEPTH = {"repeated": repeated, "multiplied": multiplied}
POINT = {"grouped": grouped, "batched": batched, "blocked": blocked}


def moment(w: Weights, x0, x1, depth, point, one_norm: bool = False):  # [N, 4C, H, W]
    "The same with one kernel for all edges."
    def mix(x, first, second, dil, copies, interleaved):
        return point(depth(x, first.to(x0.dtype), dil, copies), second.to(x0.dtype), interleaved)

    x, y, fmt = torch.cat([x0, x1], 1).relu(), {}, format_of(x0)
    for k, (_, dil) in KINDS.items(): y[k] = mix(x, w.depth[k], w.point[k], dil, NODES, depth is multiplied)

    def norms(kinds, params):
        if not one_norm: return {k: normed(y[k], *params[k]) for k in kinds}
        z = normed(torch.cat([y[k] for k in kinds], 1), *torch.cat([params[k] for k in kinds], 1))
        return dict(zip(kinds, z.split(EDGES * w.C, 1)))

    middle = norms(SEPS, w.norm2)
    for k in SEPS: y[k] = mix(middle[k].relu().contiguous(memory_format=fmt), w.depth2[k], w.point2[k], 1, 1, False)
    a, b, c, d = norms(tuple(KINDS), w.norm).values()
    total = a + b + c + d
    return total[:, : NODES * w.C] + total[:, NODES * w.C :]


# A depthwise kernel of our own
def own_kernels(g: Ground):  # None without a card or Triton
    "The module of our kernels: maps channels last, each of them read `copies` times without being repeated."
    if not g.gpu: return None
    try: from card import depthwise
    except ImportError: return None
    return depthwise


def drawn(g: Ground, how: str, seed: int, *shape):
    "Random numbers on the device."
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return t.to(g.device, torch.bfloat16 if how == "bf16" else torch.float32)


def lying(x, layout: str):
    "Maps in a layout."
    return x.contiguous(memory_format=torch.contiguous_format if layout == "nchw" else torch.channels_last)


TRITON = ((16, "bf16"), (16, "tf32"), (44, "bf16"))  # compiling takes its time


def triton_error(g: Ground, row: dict):
    from card import depthwise

    C, how, kind, copies = row.values()
    k, dil = KINDS[kind]
    x = lying(drawn(g, how, 0, 8, (2 if copies > 1 else EDGES) * C, 32, 32), "nhwc")
    row["error_relative"] = depthwise.check(x, drawn(g, how, 1, EDGES * C, 1, k, k), dil, copies)


def triton(g: Ground):
    """The Triton kernels against PyTorch's convolution in float64, at the sizes of `layouts`.

    Runs beside the first parts, and leaves the compiled kernels for the others.
    """
    if not g.gpu: return
    for (C, how), kind, copies in itertools.product(TRITON, KINDS, (NODES, 1)):
        if copies == 1 and kind not in SEPS: continue
        row = {"C": C, "how": how, "what": kind, "copies": copies}
        yield tried(row, triton_error, g, row)


def variants(own):  # own: a depthwise convolution like `repeated`, or None
    "(name, function of weights and two maps, layouts to try) of each way to compute a moment."
    yield "apart", apart, ("nchw", "nhwc")
    for d, p in (("repeated", "grouped"), ("repeated", "batched"), ("repeated", "blocked"), ("multiplied", "blocked")):
        yield f"{d}, {p}", functools.partial(moment, depth=DEPTH[d], point=POINT[p]), ("nchw", "nhwc")
    one_norm = functools.partial(moment, depth=repeated, point=blocked, one_norm=True)
    yield "repeated, blocked, one norm", one_norm, ("nhwc",)
    for p in ("blocked", "batched") if own else ():
        yield f"triton, {p}", functools.partial(moment, depth=own, point=POINT[p]), ("nhwc",)


def one_moment(g: Ground, row: dict, f, w: Weights, maps: list, reference: list):  # reference: empty the first time
    x0, x1, towards = (lying(m.detach(), row["layout"]) for m in maps)
    towards = torch.cat([towards] * NODES, 1)
    inputs = [x0.requires_grad_(), x1.requires_grad_(), *w.parameters()]
    def step(): return torch.autograd.grad(f(w, x0, x1), inputs, towards)
    g.fresh()
    out = [t.float() for t in (f(w, x0, x1).detach(), *step())]
    if not reference: reference.extend(out)  # operation by operation, NCHW
    far = (float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(out, reference))
    row["error_relative"] = max(far)
    del out
    row["ms"] = g.ms(step, 0.15)
    row |= g.peaks()
    replay = attempt(row, "graph", lambda: g.graph(step))
    if replay: row |= {"graph": True, "graph_ms": g.ms(replay, 0.15)}
    del replay
    if row["how"] == "bf16" or g.toy: row |= g.kernels(step, 6)


MOMENTS = [(16, 32, 96, "bf16"), (16, 32, 96, "tf32"), (44, 32, 96, "bf16"), (24, 32, 96, "bf16"),
           (44, 32, 96, "tf32"), (64, 8, 96, "bf16"), (16, 32, 96, "fp32")]  # C, side, batch, how


def moments(g: Ground):
    "The cases of `layouts`: for each, a row, the function, its weights, its maps, and what it should give."
    own = own_kernels(g)
    for C, side, n, how in [(4, 8, 2, "fp32")] if g.toy else MOMENTS:
        g.precision(how)
        w, reference = Weights(C).to(g.device), []
        maps = [drawn(g, how, seed, n, C, side, side) for seed in (1, 2, 3)]  # two states, and a gradient
        for name, f, formats in variants(own.depthwise if own and (C, how) in TRITON else None):
            for layout in formats:
                row = {"C": C, "side": side, "batch": n, "how": how, "variant": name, "layout": layout}
                yield row, f, w, maps, reference


def layouts(g: Ground):
    """Forward and backward of a moment in each layout: eager, as one graph, kernels launched.

    And how far it is from operation by operation.
    """
    yield from each(g, 4, one_moment, moments(g))


def gradients(x, w, dil: int) -> dict:
    "PyTorch's convolution and its two gradients: functions."
    k, groups = w.shape[-1], len(w) if w.shape[1] == 1 else 1
    y = F.conv2d(x, w, None, 1, dil * (k // 2), dil, groups)
    how = None, [1] * 2, [dil * (k // 2)] * 2, [dil] * 2, False, [0] * 2, groups
    def back(mask): return torch.ops.aten.convolution_backward(y, x, w, *how, mask)
    return {"forward": lambda: F.conv2d(x, w, None, 1, dil * (k // 2), dil, groups),
            "input": lambda: back([True, False, False]), "weight": lambda: back([False, True, False])}


def own_gradients(own, x, w, dil: int) -> dict:
    "Ours."
    y = F.conv2d(x, w, None, 1, dil * (w.shape[-1] // 2), dil, len(w))
    return {"forward": lambda: own.forward(x, w, dil, 1), "input": lambda: own.input_gradient(y, w, dil, 1),
            "weight": lambda: own.weight_gradient(y, x, w, dil, 1)}


SINGLE = {"dw3": (3, 1), "dw5": (5, 1), "dil5": (5, 2), "pw": (1, 1)}  # side of the kernel, dilation
SHAPES = [(16, 32, 96), (128, 32, 96), (352, 32, 96), (13, 32, 96), (256, 16, 96), (512, 8, 96)]  # C, side, batch


def one_convolution(g: Ground, row: dict, n: int, own):
    C, side, kind, how, layout = row.values()
    g.precision(how)
    k, dil = SINGLE[kind]
    x = lying(drawn(g, how, 0, n, C, side, side), layout)
    w = drawn(g, how, 1, C, C if k == 1 else 1, k, k)
    if layout == "triton": row["error_relative"] = own.check(x, w, dil)
    calls = own_gradients(own, x, w, dil) if layout == "triton" else gradients(x, w, dil)
    row |= {f"{name}_ms": g.ms(f, 0.03) for name, f in calls.items()}


def singles(g: Ground):
    "The cases of `convolutions`."
    own, ways = own_kernels(g), ("nchw", "nhwc", "triton")
    for C, side, n in [(4, 8, 2)] if g.toy else SHAPES:
        for kind, how, layout in itertools.product(SINGLE, ("tf32", "bf16"), ways):
            if layout == "triton" and (own is None or kind == "pw" or C not in (128, 352) or how != "bf16"): continue
            yield {"C": C, "side": side, "what": kind, "how": how, "layout": layout}, n, own


def convolutions(g: Ground):
    "Single convolutions, milliseconds of forward, gradient of the input, gradient of the weights: what a layout costs."
    yield from each(g, 2, one_convolution, singles(g))
