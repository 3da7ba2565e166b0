"Tensor functions against plain PyTorch."
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from mgdarts.fast.layout import from_phases, to_phases
from mgdarts.fast.parts import even_odd, reduced
from mgdarts.space.darts import NetSpec
from mgdarts.space.layers import AuxHead, Stem, avg_pool, depthwise, factorized_reduce, init_conv, max_pool
from mgdarts.space.space import HeadSpec


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64).to(memory_format=torch.channels_last)

def with_grads(f, *args):
    args = [a.clone(memory_format=torch.preserve_format).requires_grad_() for a in args]
    y = f(*args)
    return [y.detach(), *torch.autograd.grad((y * draw(*y.shape, seed=9)).sum(), args)]

def agree(f, g, *args):
    for a, b in zip(with_grads(f, *args), with_grads(g, *args)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 3), c=st.integers(1, 5), h=st.integers(1, 9), w=st.integers(1, 9), k=st.sampled_from((3, 5)),
       stride=st.sampled_from((1, 2)))
def test_a_dilated_kernel_is_a_larger_one_with_gaps(n, c, h, w, k, stride):
    def gaps(w): return F.conv_transpose2d(w, torch.ones(1, 1, 1, 1, dtype=w.dtype), stride=2)
    agree(lambda x, w: depthwise(x, w, stride, 2), lambda x, w: F.conv2d(x, gaps(w), None, stride, k - 1, 1, c),
          draw(n, c, h, w), draw(c, 1, k, k, seed=1))

@pytest.mark.parametrize("k", (3, 5))
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("dilation", (1, 2))
def test_contiguous_input_gives_the_same(k, stride, dilation):
    x, w = draw(2, 4, 8, 6), draw(4, 1, k, k, seed=1)
    assert depthwise(x.contiguous(), w.contiguous(), stride, dilation).allclose(depthwise(x, w, stride, dilation))

@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 3), c=st.integers(1, 5), h=st.integers(1, 5), w=st.integers(1, 5))
def test_phases(n, c, h, w):
    x = draw(n, c, 2 * h, 2 * w)
    p = to_phases(x)
    assert p.shape == (4 * n, c, h, w)
    for i in range(4): assert p[i * n:(i + 1) * n].equal(x[:, :, i // 2::2, i % 2::2])
    assert from_phases(p).equal(x)
    if min(c, h, w) > 1: # otherwise strides say nothing
        for y in (p, from_phases(p)): assert y.is_contiguous(memory_format=torch.channels_last)

def test_phases_do_not_copy_gradients_wrong():
    agree(lambda x: from_phases(to_phases(x) ** 2), lambda x: x ** 2, draw(2, 3, 4, 6))

@pytest.mark.parametrize("side", (2, 8))
def test_factorized_reduce(side):
    def plain(x, a, b): return torch.cat([F.conv2d(x, a, None, 2), F.conv2d(x[:, :, 1:, 1:], b, None, 2)], 1)
    for f in (factorized_reduce, lambda x, a, b: reduced(even_odd(x), a, b)):
        agree(f, plain, draw(2, 5, side, side), draw(3, 5, 1, 1, seed=1), draw(2, 5, 1, 1, seed=2))

@pytest.mark.parametrize("side", (1, 3, 7))
def test_factorized_reduce_pads_odd_sides_with_zeros(side):
    x, a, b = draw(2, 5, side, side), draw(3, 5, 1, 1, seed=1), draw(2, 5, 1, 1, seed=2)
    y, padded = factorized_reduce(x, a, b), factorized_reduce(F.pad(x, (0, 1, 0, 1)), a, b)
    assert y.shape[-1] == (side + 1) // 2 and torch.allclose(y, padded)
    assert torch.allclose(y, reduced(even_odd(x), a, b))

def test_pools():
    x = draw(2, 3, 7, 7)
    ones = F.avg_pool2d(torch.ones_like(x), 3, 2, 1)
    assert torch.allclose(avg_pool(x, 2), F.avg_pool2d(x, 3, 2, 1) / ones) and max_pool(x).shape == x.shape
    assert max_pool(x, 2).shape[-1] == 4

def test_fresh_weights_depend_on_their_generator_alone():
    def make(seed): return init_conv((8, 4, 3, 3), 36, torch.Generator().manual_seed(seed))
    torch.manual_seed(1)
    a = make(0)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    b = make(0)
    assert a.equal(b) and not a.equal(make(1)) and a.abs().max() <= 1 / 6 and a.requires_grad
    torch.manual_seed(1)
    assert state.equal(torch.get_rng_state())

@pytest.mark.parametrize("size, stem", ((8, "cifar"), (65, "imagenet"), (33, "imagenet")))
def test_stem_is_the_specified_one(size, stem):
    spec = NetSpec(6, 4, size=size, stem=stem, in_channels=2)
    net = Stem(spec, torch.Generator().manual_seed(0))
    x0, x1 = net(draw(2, 2, size, size).float())
    assert sum(p.numel() for p in net.parameters()) == spec.stem_params and (x0.shape[1], x1.shape[1]) == spec.stem_out
    assert x1.shape[-1] == spec.cell[0].side_in

def test_head_with_fewer_channels():
    head = AuxHead(HeadSpec(24, 8, 128, 768, 1, 5), torch.Generator().manual_seed(0), width=7)
    assert head(draw(2, 7, 8, 8).float()).shape == (2, 5) and head.reads.shape == (128, 7, 1, 1)
