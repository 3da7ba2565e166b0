"""Depthwise convolution for maps that lie channels last, and its two gradients, in Triton.

Each map may be read several times (`copies`) without being repeated. Input [N, 2C or C', H, W]; with `copies` > 1 the
input is two maps of C channels, the result 2 * copies maps in the order (map, copy, channel). Undilated or dilated,
stride 1, sides kept.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl


@triton.jit
def _forward(x, w, y, P, H, W, CIN, COUT, C, COPIES, K: tl.constexpr, DIL: tl.constexpr,
             BP: tl.constexpr, BC: tl.constexpr):
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    o = tl.program_id(1) * BC + tl.arange(0, BC)
    row, col, there = (p // W) % H, p % W, o < COUT
    src = (o // (C * COPIES)) * C + o % C
    total = tl.zeros((BP, BC), tl.float32)
    for dy in tl.static_range(K):
        for dx in tl.static_range(K):
            r, c = row + (dy - K // 2) * DIL, col + (dx - K // 2) * DIL
            ok = (r >= 0) & (r < H) & (c >= 0) & (c < W) & (p < P)
            at = p + ((dy - K // 2) * W + (dx - K // 2)) * DIL
            v = tl.load(x + at[:, None] * CIN + src[None, :], mask=ok[:, None] & there[None, :], other=0.0)
            k = tl.load(w + o * (K * K) + dy * K + dx, mask=there, other=0.0)
            total += v.to(tl.float32) * k.to(tl.float32)[None, :]
    tl.store(y + p[:, None] * COUT + o[None, :], total.to(y.dtype.element_ty), mask=(p < P)[:, None] & there[None, :])


@triton.jit
def _input(g, w, d, P, H, W, CIN, COUT, C, COPIES: tl.constexpr, K: tl.constexpr, DIL: tl.constexpr,
           BP: tl.constexpr, BC: tl.constexpr):
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    i = tl.program_id(1) * BC + tl.arange(0, BC)
    row, col, there = (p // W) % H, p % W, i < CIN
    total = tl.zeros((BP, BC), tl.float32)
    for copy in range(COPIES):  # unrolled, it takes ten times as long to compile
        o = (i // C) * (C * COPIES) + copy * C + i % C
        for dy in tl.static_range(K):
            for dx in tl.static_range(K):
                r, c = row - (dy - K // 2) * DIL, col - (dx - K // 2) * DIL
                ok = (r >= 0) & (r < H) & (c >= 0) & (c < W) & (p < P)
                at = p - ((dy - K // 2) * W + (dx - K // 2)) * DIL
                v = tl.load(g + at[:, None] * COUT + o[None, :], mask=ok[:, None] & there[None, :], other=0.0)
                k = tl.load(w + o * (K * K) + dy * K + dx, mask=there, other=0.0)
                total += v.to(tl.float32) * k.to(tl.float32)[None, :]
    tl.store(d + p[:, None] * CIN + i[None, :], total.to(d.dtype.element_ty), mask=(p < P)[:, None] & there[None, :])


@triton.jit
def _weight(g, x, d, P, H, W, CIN, COUT, C, COPIES, SPAN, K: tl.constexpr, DIL: tl.constexpr,
            BP: tl.constexpr, BC: tl.constexpr):
    "A sum over SPAN pixels for one tap; the parts are added afterwards, always in the same order."
    o = tl.program_id(0) * BC + tl.arange(0, BC)
    part, tap = tl.program_id(1), tl.program_id(2)
    dy, dx, there = tap // K - K // 2, tap % K - K // 2, o < COUT
    src = (o // (C * COPIES)) * C + o % C
    total = tl.zeros((BP, BC), tl.float32)
    for start in range(0, SPAN, BP):
        p = part * SPAN + start + tl.arange(0, BP)
        r, c = (p // W) % H + dy * DIL, p % W + dx * DIL
        ok = ((r >= 0) & (r < H) & (c >= 0) & (c < W) & (p < P))[:, None] & there[None, :]
        at = p + (dy * W + dx) * DIL
        u = tl.load(g + p[:, None] * COUT + o[None, :], mask=ok, other=0.0)
        v = tl.load(x + at[:, None] * CIN + src[None, :], mask=ok, other=0.0)
        total += u.to(tl.float32) * v.to(tl.float32)
    tl.store(d + (part * K * K + tap) * COUT + o, tl.sum(total, 0), mask=there)


def _dense(x): return x.contiguous(memory_format=torch.channels_last)
def _blocks(c): return min(64, triton.next_power_of_2(c))
def _channels(cin, copies): return cin // (2 if copies > 1 else 1)


def _empty(n, c, like):
    return torch.empty((n, c, *like.shape[2:]), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def forward(x, w, dil, copies):
    x, (n, cin, h, wide), cout = _dense(x), x.shape, len(w)
    y, bc, pixels = _empty(n, cout, x), _blocks(cout), n * h * wide
    bp = 4096 // bc
    sizes = pixels, h, wide, cin, cout, _channels(cin, copies), copies
    _forward[(triton.cdiv(pixels, bp), triton.cdiv(cout, bc))](x, w.contiguous(), y, *sizes, w.shape[-1], dil, bp, bc)
    return y


def input_gradient(g, w, dil, copies):
    g, (n, cout, h, wide) = _dense(g), g.shape
    cin, pixels = cout // copies, n * h * wide
    d, bc = _empty(n, cin, g), _blocks(cin)
    bp = 4096 // bc
    sizes = pixels, h, wide, cin, cout, _channels(cin, copies), copies
    _input[(triton.cdiv(pixels, bp), triton.cdiv(cin, bc))](g, w.contiguous(), d, *sizes, w.shape[-1], dil, bp, bc)
    return d


def weight_gradient(g, x, w, dil, copies):
    g, x, (n, cin, h, wide), cout, k = _dense(g), _dense(x), x.shape, len(w), w.shape[-1]
    bc, pixels = min(32, triton.next_power_of_2(cout)), n * h * wide
    bp = 2048 // bc
    span = triton.cdiv(triton.cdiv(pixels, 32), bp) * bp  # up to 32 parts
    parts = triton.cdiv(pixels, span)
    d = torch.empty((parts, k * k, cout), dtype=torch.float32, device=x.device)
    sizes = pixels, h, wide, cin, cout, _channels(cin, copies), copies, span
    _weight[(triton.cdiv(cout, bc), parts, k * k)](g, x, d, *sizes, k, dil, bp, bc)
    return d.sum(0).t().reshape(w.shape).to(w.dtype)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, dil, copies):
        ctx.save_for_backward(x, w)
        ctx.how = dil, copies
        return forward(x, w, dil, copies)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return input_gradient(g, w, *ctx.how), weight_gradient(g, x, w, *ctx.how), None, None


def depthwise(x, weight, dil, copies): return _Depthwise.apply(x, weight, dil, copies)


def check(x, w, dil, copies: int = 1) -> float:
    "The largest relative difference of result and gradients from PyTorch's convolution in float64."
    side = w.shape[-1]
    a, b = (t.detach().double().requires_grad_() for t in (x, w))
    C = x.shape[1] // 2
    wide = torch.cat([a[:, :C]] * copies + [a[:, C:]] * copies, 1) if copies > 1 else a
    want = F.conv2d(wide, b, None, 1, dil * (side // 2), dil, wide.shape[1])
    c, d = (t.detach().clone().requires_grad_() for t in (x, w))
    got = depthwise(c, d, dil, copies)
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).to(got)
    gradients = zip(torch.autograd.grad(got, (c, d), g), torch.autograd.grad(want, (a, b), g.double()))
    return max(float((p.detach().double() - q.detach()).norm() / q.detach().norm())
               for p, q in [(got, want), *gradients])
