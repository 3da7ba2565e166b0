"""Fewer, larger kernels: one moment of a cell, which is everything that reads two of its states, in several layouts. A prototype, to learn which of them pays.

Two maps [N, C, H, W] are read by eight edges (each goes to four nodes), with four kinds of convolutions an edge: 32 times depthwise and 1x1,
16 of them (separable) followed by a norm, a ReLU and a second depthwise and 1x1; then a norm each, and the sum of what goes to a node.
"""
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from gpu_parts import Ground, attempt, said

KINDS = {"sep3": (3, 1), "sep5": (5, 1), "dil3": (3, 2), "dil5": (5, 2)}  # side of the depthwise kernel, dilation
SEPS = ("sep3", "sep5")
NODES, EDGES = 4, 8  # edge e reads map e // 4 and goes to node e % 4


class Weights(nn.Module):
    "Of a moment. Channels of eight maps side by side are in the order (edge, channel)."

    def __init__(self, C: int):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        draw = lambda *shape, fan: nn.Parameter(torch.empty(shape).uniform_(-1, 1, generator=g) / math.sqrt(fan))
        self.C = C
        self.depth = nn.ParameterDict({k: draw(EDGES * C, 1, s, s, fan=s * s) for k, (s, _) in KINDS.items()})
        self.depth2 = nn.ParameterDict({k: draw(EDGES * C, 1, KINDS[k][0], KINDS[k][0], fan=KINDS[k][0] ** 2) for k in SEPS})
        self.point = nn.ParameterDict({k: draw(EDGES, C, C, fan=C) for k in KINDS})
        self.point2 = nn.ParameterDict({k: draw(EDGES, C, C, fan=C) for k in SEPS})
        self.norm2 = nn.ParameterDict({k: nn.Parameter(torch.rand(2, EDGES * C, generator=g) + 0.5) for k in SEPS})  # of the middles
        self.norm = nn.ParameterDict({k: nn.Parameter(torch.rand(2, EDGES * C, generator=g) + 0.5) for k in KINDS})


def normed(x, scale, shift): return torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, 1e-5)[0]


def apart(w: Weights, x0, x1):  # [N, 4C, H, W], the four nodes side by side
    "As it is computed today on a card: operation by operation."
    C, maps, nodes = w.C, (x0.relu(), x1.relu()), [None] * NODES
    cut = lambda v, e: v[..., e * C : (e + 1) * C] if v.dim() == 2 else v[e * C : (e + 1) * C]
    for k, (side, dil) in KINDS.items():
        as_x = lambda v: v.to(x0.dtype)
        depth, point = as_x(w.depth[k]), as_x(w.point[k])
        depth2, point2 = (as_x(w.depth2[k]), as_x(w.point2[k])) if k in SEPS else (None, None)
        for e in range(EDGES):
            y = F.conv2d(F.conv2d(maps[e // NODES], cut(depth, e), None, 1, dil * (side // 2), dil, C), point[e][:, :, None, None])
            if k in SEPS:
                y = normed(y, *cut(w.norm2[k], e)).relu()
                y = F.conv2d(F.conv2d(y, cut(depth2, e), None, 1, side // 2, 1, C), point2[e][:, :, None, None])
            y, j = normed(y, *cut(w.norm[k], e)), e % NODES
            nodes[j] = y if nodes[j] is None else nodes[j] + y
    return torch.cat(nodes, 1)


# depthwise: from 2 maps, each read four times, to 8
def repeated(x, weight, dil, copies):
    "Repeat each map for all edges that read it."
    side, (n, _, h, w) = weight.shape[-1], x.shape
    if copies > 1:
        fmt = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        C = x.shape[1] // 2
        x = torch.cat([x[:, :C]] * copies + [x[:, C:]] * copies, 1).contiguous(memory_format=fmt)
    return F.conv2d(x, weight, None, 1, dil * (side // 2), dil, x.shape[1])


def multiplied(x, weight, dil, copies):
    "One group for each channel of a map, with a filter for each edge that reads it: channels come in the order (map, channel, node)."
    if copies == 1: return repeated(x, weight, dil, 1)
    side, C = weight.shape[-1], x.shape[1] // 2
    return F.conv2d(x, weight.view(2, copies, C, side * side).transpose(1, 2).reshape(weight.shape), None, 1, dil * (side // 2), dil, 2 * C)


# 1x1: eight maps, each with its own matrix
def rows(u): return u.permute(0, 2, 3, 1).reshape(-1, u.shape[1])
def unrows(y, u): return y.view(len(u), *u.shape[2:], -1).permute(0, 3, 1, 2)


def grouped(u, w, interleaved):
    return F.conv2d(u, w.flatten(0, 1)[:, :, None, None], None, groups=EDGES)


def batched(u, w, interleaved):
    n, c, h, wide = u.shape
    if u.is_contiguous(memory_format=torch.channels_last):
        y = torch.bmm(rows(u).view(-1, EDGES, c // EDGES).transpose(0, 1), w.transpose(1, 2))  # the maps are read where they lie
        return unrows(y.transpose(0, 1).reshape(-1, c), u)
    return torch.matmul(w, u.view(n, EDGES, c // EDGES, h * wide)).view(u.shape)


def matrix(w, interleaved):  # [8C, 8C]
    "The eight matrices as one, zero elsewhere: a card has arithmetic to spare."
    C, one = w.shape[-1], lambda n: torch.eye(n, dtype=w.dtype, device=w.device)
    if not interleaved: return (w[:, :, None, :] * one(EDGES)[:, None, :, None]).reshape(EDGES * C, EDGES * C)
    return (w.view(2, NODES, C, 1, C, 1) * one(2).view(2, 1, 1, 2, 1, 1) * one(NODES).view(1, NODES, 1, 1, 1, NODES)).reshape(EDGES * C, EDGES * C)


def blocked(u, w, interleaved):
    m = matrix(w, interleaved)
    if u.is_contiguous(memory_format=torch.channels_last): return unrows(rows(u) @ m.t(), u)
    return torch.matmul(m, u.flatten(2)).view(u.shape)


DEPTH, POINT = {"repeated": repeated, "multiplied": multiplied}, {"grouped": grouped, "batched": batched, "blocked": blocked}


def moment(w: Weights, x0, x1, depth, point, one_norm: bool = False):  # [N, 4C, H, W]
    "The same with one kernel for all edges."
    C, as_x, inter = w.C, lambda v: v.to(x0.dtype), depth is multiplied
    fmt = torch.channels_last if x0.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    x, y = torch.cat([x0, x1], 1).relu(), {}
    for k, (_, dil) in KINDS.items(): y[k] = point(depth(x, as_x(w.depth[k]), dil, NODES), as_x(w.point[k]), inter)

    def norms(kinds, params):
        if not one_norm: return {k: normed(y[k], *params[k]) for k in kinds}
        z = normed(torch.cat([y[k] for k in kinds], 1), *torch.cat([params[k] for k in kinds], 1))
        return dict(zip(kinds, z.split(EDGES * C, 1)))

    middle = norms(SEPS, w.norm2)
    for k in SEPS: y[k] = point(depth(middle[k].relu().contiguous(memory_format=fmt), as_x(w.depth2[k]), 1, 1), as_x(w.point2[k]), False)
    a, b, c, d = norms(tuple(KINDS), w.norm).values()
    total = a + b + c + d
    return total[:, : NODES * C] + total[:, NODES * C :]


# A depthwise kernel of our own
def triton_depthwise():  # a function like `repeated`; None without Triton
    "Depthwise convolution in Triton: maps channels last, each of them read `copies` times without being repeated."
    try: import gpu_triton
    except ImportError: return None
    return gpu_triton.depthwise


TRITON = ((16, "bf16"), (16, "tf32"), (44, "bf16"))  # compiling takes its time


def triton(g: Ground):
    "The Triton kernels against PyTorch's convolution in float64, at the sizes of `layouts`. Runs beside the first parts, and leaves the compiled kernels for the others."
    if not g.gpu: return
    import gpu_triton

    for (C, how), (name, (k, dil)), copies in itertools.product(TRITON, KINDS.items(), (NODES, 1)):
        if copies == 1 and name not in SEPS: continue
        row, t = {"C": C, "how": how, "what": name, "copies": copies}, torch.bfloat16 if how == "bf16" else torch.float32
        draw = lambda seed, *shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(g.device, t)
        maps = 2 if copies > 1 else EDGES
        try: row["error_relative"] = gpu_triton.check(draw(0, 8, maps * C, 32, 32).contiguous(memory_format=torch.channels_last), draw(1, EDGES * C, 1, k, k), dil, copies)
        except Exception as e: row["error"] = said(e)
        yield row


def variants(g: Ground, own):
    yield "apart", lambda w, *x: apart(w, *x), ("nchw", "nhwc")
    for d, p in (("repeated", "grouped"), ("repeated", "batched"), ("repeated", "blocked"), ("multiplied", "blocked")):
        yield f"{d}, {p}", lambda w, *x, d=DEPTH[d], p=POINT[p]: moment(w, *x, d, p), ("nchw", "nhwc")
    yield "repeated, blocked, one norm", lambda w, *x: moment(w, *x, repeated, blocked, True), ("nhwc",)
    if own: yield from ((f"triton, {p}", lambda w, *x, p=POINT[p]: moment(w, *x, own, p), ("nhwc",)) for p in ("blocked", "batched"))


def layouts(g: Ground):
    "Forward and backward of a moment in each layout: eager, as one graph, kernels launched; and how far it is from operation by operation."
    cases = [(4, 8, 2, "fp32")] if g.toy else [(16, 32, 96, "bf16"), (16, 32, 96, "tf32"), (44, 32, 96, "bf16"), (24, 32, 96, "bf16"), (44, 32, 96, "tf32"), (64, 8, 96, "bf16"), (16, 32, 96, "fp32")]
    for C, side, n, how in cases:
        own = triton_depthwise() if g.gpu and (C, how) in TRITON else None
        g.precision(how)
        w, dtype, reference = Weights(C).to(g.device), torch.bfloat16 if how == "bf16" else torch.float32, None
        made = [torch.randn(n, C, side, side, generator=torch.Generator().manual_seed(i)).to(g.device, dtype) for i in (1, 2, 3)]
        for name, f, formats in variants(g, own):
            for layout in formats:
                if g.left() < 4:
                    yield {"note": "cut short: the time is spent"}
                    return
                x0, x1, towards = (m.detach().contiguous(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format) for m in made)
                towards = torch.cat([towards] * NODES, 1)
                row = {"C": C, "side": side, "batch": n, "how": how, "variant": name, "layout": layout}
                try:
                    inputs = [x0.requires_grad_(), x1.requires_grad_(), *w.parameters()]
                    step = lambda: torch.autograd.grad(f(w, x0, x1), inputs, towards)
                    g.fresh()
                    out = [t.float() for t in (f(w, x0, x1).detach(), *step())]
                    if reference is None: reference = out  # operation by operation, NCHW
                    row["error_relative"] = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(out, reference))
                    del out
                    row["ms"] = g.ms(step, 0.15)
                    row |= g.peaks()
                    replay = attempt(row, "graph", lambda: g.graph(step))
                    if replay: row |= {"graph": True, "graph_ms": g.ms(replay, 0.15)}
                    del replay
                    if how == "bf16" or g.toy: row |= g.kernels(step, 6)
                except Exception as e: row["error"] = said(e)
                yield row
        reference = None
        g.fresh()


def convolutions(g: Ground):
    "Single convolutions, milliseconds of forward, gradient of the input, gradient of the weights: what a layout costs."
    own = triton_depthwise() if g.gpu else None
    shapes = [(4, 8, 2)] if g.toy else [(16, 32, 96), (128, 32, 96), (352, 32, 96), (13, 32, 96), (256, 16, 96), (512, 8, 96)]
    for C, side, n in shapes:
        for (name, k, dil), how, layout in itertools.product((("dw3", 3, 1), ("dw5", 5, 1), ("dil5", 5, 2), ("pw", 1, 1)), ("tf32", "bf16"), ("nchw", "nhwc", "triton")):
            if g.left() < 2:
                yield {"note": "cut short: the time is spent"}
                return
            if layout == "triton" and (own is None or k == 1 or C not in (128, 352) or how != "bf16"): continue
            g.precision(how)
            t = torch.bfloat16 if how == "bf16" else torch.float32
            x = torch.randn(n, C, side, side, generator=torch.Generator().manual_seed(0)).to(g.device, t).contiguous(memory_format=torch.contiguous_format if layout == "nchw" else torch.channels_last)
            w = torch.randn(C, C if k == 1 else 1, k, k, generator=torch.Generator().manual_seed(1)).to(g.device, t)
            row = {"C": C, "side": side, "what": name, "how": how, "layout": layout}
            try:
                args = (None, 1, dil * (k // 2), dil, 1 if k == 1 else C)
                y = F.conv2d(x, w, *args)
                if layout == "triton":
                    import gpu_triton

                    row["error_relative"] = gpu_triton.check(x, w, dil)
                    calls = {"forward": lambda: gpu_triton.forward(x, w, dil, 1), "input": lambda: gpu_triton.input_gradient(y, w, dil, 1), "weight": lambda: gpu_triton.weight_gradient(y, x, w, dil, 1)}
                else:
                    back = lambda mask: torch.ops.aten.convolution_backward(y, x, w, None, [1] * 2, [args[2]] * 2, [dil] * 2, False, [0] * 2, args[4], mask)
                    calls = {"forward": lambda: F.conv2d(x, w, *args), "input": lambda: back([True, False, False]), "weight": lambda: back([False, True, False])}
                row |= {f"{k}_ms": g.ms(f, 0.03) for k, f in calls.items()}
            except Exception as e: row["error"] = said(e)
            yield row
