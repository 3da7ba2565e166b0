"The published MobileNet-like network: its size, and that it computes what standard layers compute."
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mgdarts.fast.engine import FastEngine
from mgdarts.net.count import counts
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.engine import Engine
from mgdarts.net.sample import weaknas

# block by block: kernel, in, inside, out, stride, squeezed, activation
TABLE = [(3, 24, 24, 24, 1, 0, "relu"),
         (5, 24, 72, 32, 2, 0, "relu"), (3, 32, 96, 32, 1, 0, "relu"), (3, 32, 128, 32, 1, 0, "relu"),
         (3, 32, 96, 32, 1, 0, "relu"),
         (5, 32, 128, 48, 2, 32, "relu"), (5, 48, 288, 48, 1, 72, "relu"), (5, 48, 192, 48, 1, 48, "relu"),
         (7, 48, 192, 96, 2, 0, "hswish"), (5, 96, 576, 96, 1, 0, "hswish"), (7, 96, 576, 96, 1, 0, "hswish"),
         (3, 96, 576, 136, 1, 144, "hswish"), (5, 136, 816, 136, 1, 208, "hswish"),
         (5, 136, 816, 136, 1, 208, "hswish"),
         (7, 136, 816, 192, 2, 208, "hswish"), (5, 192, 1152, 192, 1, 288, "hswish"),
         (3, 192, 1152, 192, 1, 288, "hswish"), (5, 192, 576, 192, 1, 144, "hswish")]
ACT = {"relu": nn.ReLU, "hswish": nn.Hardswish}


class Plain(nn.Module):
    "The published network from standard layers."

    class Squeeze(nn.Module):
        def __init__(self, c, s):
            super().__init__()
            self.f = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, s, 1), nn.ReLU(), nn.Conv2d(s, c, 1),
                                   nn.Hardsigmoid())

        def forward(self, x):
            return x * self.f(x)

    class Block(nn.Module):
        def __init__(self, k, cin, mid, cout, stride, s, act):
            super().__init__()
            wide = [] if mid == cin else [nn.Conv2d(cin, mid, 1, bias=False), nn.BatchNorm2d(mid), ACT[act]()]
            self.f = nn.Sequential(*wide, nn.Conv2d(mid, mid, k, stride, k // 2, groups=mid, bias=False),
                                   nn.BatchNorm2d(mid), ACT[act](),
                                   *([Plain.Squeeze(mid, s)] if s else []), nn.Conv2d(mid, cout, 1, bias=False),
                                   nn.BatchNorm2d(cout))
            self.residual = stride == 1 and cin == cout

        def forward(self, x):
            return x + self.f(x) if self.residual else self.f(x)

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.Hardswish(),
                               *(Plain.Block(*row) for row in TABLE),
                               nn.Conv2d(192, 1152, 1, bias=False), nn.BatchNorm2d(1152), nn.Hardswish(),
                               nn.AdaptiveAvgPool2d(1),
                               nn.Conv2d(1152, 1536, 1, bias=False), nn.Hardswish(), nn.Flatten(),
                               nn.Linear(1536, 1000))

    def forward(self, x):
        return self.f(x)


def test_the_published_network():
    found, size = [], counts(weaknas())
    net = Plain().eval()

    def hook(m, x, y):
        found.append(y[0].numel() * m.weight[0].numel())

    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(hook)
    ours = DerivedNet(weaknas()).eval()
    with torch.no_grad():
        # the same weights, in the order in which they come
        mine = [p for n, p in ours.named_parameters()]
        theirs = list(net.parameters())
        assert sum(p.numel() for p in theirs) == sum(p.numel() for p in mine) == size["params_deployable"] == 8_813_720
        def by_shape(ps): return sorted(tuple(d for d in p.shape if d > 1) for p in ps)
        assert by_shape(mine) == by_shape(theirs)
        net(torch.zeros(1, 3, 236, 236))
    assert sum(found) == size["macs"] == 560_829_800
    for ours.engine in (Engine(), FastEngine()):
        with FlopCounterMode(display=False) as f, torch.no_grad():
            ours(torch.zeros(1, 3, 236, 236))
        assert f.get_total_flops() == 2 * size["macs"]


def test_the_published_network_computes_what_standard_layers_compute():
    net, ours = Plain().double().eval(), DerivedNet(weaknas(size=64)).double().eval()
    net.f[0].stride = (1, 1)  # in the stem: images of 64 pixels are small
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                for v, low, high in ((m.weight, 0.5, 1.5), (m.bias, -1, 1), (m.running_mean, -1, 1),
                                     (m.running_var, 0.5, 2)):
                    v.uniform_(low, high, generator=g)
        state = ours.state_dict()
        def put(name, v): state[name].copy_(v.view_as(state[name]))

        def norm(name, m):
            for k in ("weight", "bias", "running_mean", "running_var"):
                put(f"{name}.{k}", getattr(m, k))

        f = net.f
        put("stem.first.weight", f[0].weight), norm("stem.first.norm", f[1])
        b = f[3].f
        put("stem.depth", b[0].weight), norm("stem.norm", b[1])
        put("stem.last.weight", b[3].weight), norm("stem.last.norm", b[4])
        for c in range(17):
            at, b = f"cells.{c}.ops.0", f[4 + c].f
            put(f"{at}.exp", b[0].weight), norm(f"{at}.norms.0", b[1])
            put(f"{at}.dw", b[3].weight), norm(f"{at}.norms.1", b[4])
            if isinstance(b[6], Plain.Squeeze):
                for k, i in (("squeeze", 1), ("excite", 3)):
                    put(f"{at}.{k}", b[6].f[i].weight), put(f"{at}.{k}_bias", b[6].f[i].bias)
            put(f"{at}.proj", b[-2].weight), norm(f"{at}.norms.2", b[-1])
        put("classifier.wide.weight", f[21].weight), norm("classifier.wide.norm", f[22])
        put("classifier.mix", f[25].weight)
        put("classifier.classifier.weight", f[28].weight), put("classifier.classifier.bias", f[28].bias)
        x = torch.randn(2, 3, 64, 64, dtype=torch.double, generator=g)
        a = net(x)
        for ours.engine in (Engine(), FastEngine()):
            assert (a - ours(x)[0]).abs().max() <= 1e-9 * a.abs().max()
