"""An operation, a method, a space and a data source from outside the package, each in a few lines.

What stands between two lines of dashes is what somebody writes who wants it; the tests count these lines.
"""
import inspect

import onnx
import pytest
import torch

from mgdarts.base.files import read_json
from mgdarts.base import options
from mgdarts.base.options import Compute
from mgdarts.fast.engine import FastEngine
from mgdarts.methods.registry import preset
from mgdarts.net.derive import derive, inherited
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.engine import Engine
from mgdarts.net.files import load
from mgdarts.net.supernet import SuperNet
from mgdarts.runs import run as runs
from mgdarts.runs.export import export_arch
from mgdarts.space import spaces
from mgdarts.space.darts import NetSpec
from mgdarts.views.drawings import cells as draw
from mgdarts.views.replay import replay

FAST = {"search.max_epochs": 2, "search.prune_every": 1, "search.warmup": 0, "search.stages": 1,
        "search.stage_keep": 0.5, "search.regrow": 0.2, "search.lambda_step": 0.3, "train.epochs": 1,
        "data.subset": 128}


def operation_of_ones_own():
    # ------------------------------------------------------------------
    from mgdarts.space.operation import SepConv, add_operation

    add_operation(SepConv("sep_conv_7x7", 7))
    # ------------------------------------------------------------------


def unlike_any_other():
    # ------------------------------------------------------------------
    from mgdarts.space.operation import BatchNorm, Kernel, Operation, add_operation

    class Mixer(Operation):
        "ReLU, a 1x1 convolution to the middle, a depthwise 3x3, batch norm, ReLU, a 1x1 convolution, batch norm."
        ports, reads, kind = ("in", "mid", "out"), "relu", "mixer"

        def kernels(self, stride):
            deep = Kernel("deep", "mid", "mid", 3, depthwise=True)
            return Kernel("wide", "mid", "in"), deep, Kernel("narrow", "out", "mid")

        def norms(self, stride):
            return BatchNorm("mid", "mid"), BatchNorm("out", "out")

        def forward(self, x, parts, stride):
            y = parts.gated("mid", parts.conv("deep", parts.conv("wide", x), stride))
            return parts.gated("out", parts.conv("narrow", y.relu()))

    add_operation(Mixer("mixer"))
    # ------------------------------------------------------------------


def method_of_ones_own():
    # ------------------------------------------------------------------
    from dataclasses import dataclass

    from mgdarts.base.options import DECISIONS, Method
    from mgdarts.methods.bounds import ONE_LEVEL
    from mgdarts.methods.registry import add_method
    from mgdarts.search.prune import bounded, units
    from mgdarts.search.rules import Pruning

    @DECISIONS.add("half-life")
    @dataclass(frozen=True)
    class HalfLife(Pruning):
        "Every commit prunes the weaker half of the operations that are left, down to the target."
        everywhere = True

        def candidates(self, net, more=False):
            found = units(net)
            strength, live, kept = found[0][1], found[0][2], found[0][3]
            bound = strength[live & ~kept].median() if (live & ~kept).any() else 0.0
            return bounded(net, found, [1.0 if more else float(bound)] + [None] * (len(found) - 1))

    add_method(Method("half-life", "the weaker half of the operations goes each time", "this test",
                      {**ONE_LEVEL, "search.granularities": ("operation",), "rules.regulariser": "none",
                       "rules.discretiser": "half-life"}))
    # ------------------------------------------------------------------


def space_of_ones_own():
    # ------------------------------------------------------------------
    from dataclasses import dataclass
    from functools import cached_property

    from mgdarts.space.darts import chain, stem_sizes
    from mgdarts.space.graph import Graph
    from mgdarts.space.space import Space
    from mgdarts.space.spaces import add_space

    @add_space
    @dataclass(frozen=True)
    class Diamond(Space):
        "Cells of one input and three nodes, two of which read the input and one the other two."
        channels: int
        cells: int
        classes: int = 10
        size: int = 32
        in_channels: int = 3
        stem: str = "cifar"
        ops: tuple = ("skip_connect", "sep_conv_3x3", "max_pool_3x3")
        kind, graph = "diamond", Graph(1, ((0, 1), (0, 2), (1, 3), (2, 3)))
        head_fields = ("channels", *Space.head_fields)

        @classmethod
        def of_config(cls, cfg, classes, size, in_channels=3):
            return cls(cfg.space.channels, cfg.space.cells, classes, size, in_channels)

        @property
        def stem_out(self): return (3 * self.channels,)
        @property
        def stem_params(self): return stem_sizes(self.channels, self.in_channels, self.size, "cifar")[0]
        @property
        def stem_macs(self): return stem_sizes(self.channels, self.in_channels, self.size, "cifar")[1]
        @cached_property
        def cell(self): return chain(self, self.channels, self.size, False)

        def make_stem(self, generator):
            from mgdarts.space.layers import Stem
            return Stem(self, generator)
    # ------------------------------------------------------------------


def data_of_ones_own():
    # ------------------------------------------------------------------
    import torch

    from mgdarts.base.sources import Dataset, register
    from mgdarts.base.folders import Source

    def stripes(folder, cfg):
        "Upright and lying stripes of random width."
        g = torch.Generator().manual_seed(0)
        labels = torch.arange(240) % 2
        wide = torch.randint(1, 4, (240, 1), generator=g)
        waves = ((torch.arange(8) // wide) % 2 * 255).to(torch.uint8)
        images = torch.stack([w.expand(8, 8) if y else w[:, None].expand(8, 8) for w, y in zip(waves, labels)])[:, None]
        return Source(images[:180], labels[:180], images[180:], labels[180:], ["lying", "upright"], 8, origin="made")

    register(Dataset("stripes", stripes, "stripes", 2, 8))
    # ------------------------------------------------------------------


ALL = (operation_of_ones_own, unlike_any_other, method_of_ones_own, space_of_ones_own, data_of_ones_own)


@pytest.mark.parametrize("one", ALL, ids=lambda f: f.__name__)
def test_sixty_lines_are_enough(one):
    lines = inspect.getsource(one).splitlines()
    first, last = (i for i, line in enumerate(lines) if line.strip().startswith("# ---"))
    assert last - first - 1 <= 60


def everything(cfg, tmp_path):
    "Search, derive, retrain, draw, replay, export: the run's folder and its architecture."
    out = tmp_path / "run"
    runs.search(cfg, out)
    arch, derived = load(out), read_json(out / "result.json", "a result")["derived"]
    assert runs.retrain(out)["params_nonzero"] == derived["params_nonzero"]
    assert len(draw(arch).data) > 0 and any(f.at is not None for f in replay(out).frames)
    export_arch(out, "onnx", tmp_path / "net.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"))
    net = DerivedNet(arch).eval()
    assert net(torch.randn(2, arch.in_channels, arch.size, arch.size))[0].shape == (2, arch.classes)
    return arch


def both_ways(spec, used):
    "Outputs and gradients of a super-net by the equations and by the fast path, in double precision."
    found = []
    for engine in (Engine(), FastEngine(Compute())):
        net = SuperNet(spec, seed=1, engine=engine, rules=options.Rules(ops=spec.ops)).double()
        for stage, end in enumerate(spec.ends): net.open(end, stage)
        with torch.no_grad():
            g = torch.Generator().manual_seed(0)
            for p in (net.alpha, *(c.beta for c in net.cells)): p.add_(torch.randn(p.shape, generator=g))
        y = net.double()(torch.randn(4, 3, spec.size, spec.size, generator=torch.Generator().manual_seed(2)).double())
        y.square().sum().backward()
        found.append([y.detach(), net.alpha.grad[..., used], *(c.omega.grad for c in net.cells)])
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found))


def test_a_kernel_of_another_size(tmp_path):
    operation_of_ones_own()
    spec = NetSpec(4, 3, size=8, ops=(*NetSpec.ops, "sep_conv_7x7"))
    assert both_ways(spec, spec.ops.index("sep_conv_7x7")) <= 1e-9
    mine = {"rules.ops": "skip_connect,sep_conv_3x3,sep_conv_7x7", "search.target_m": 0.005}
    arch = everything(preset("smoke", **FAST, **mine), tmp_path)
    assert any(op.op == "sep_conv_7x7" for c in arch.cells for op in c.ops)


def test_an_operation_unlike_any_other(tmp_path):
    unlike_any_other()
    spec = NetSpec(4, 3, size=8, ops=(*NetSpec.ops, "mixer"))
    assert both_ways(spec, spec.ops.index("mixer")) <= 1e-9
    mine = {"rules.ops": "skip_connect,mixer", "search.target_m": 0.004}
    arch = everything(preset("smoke", **FAST, **mine), tmp_path)
    assert any(op.op == "mixer" and len(op.widths) == 3 for c in arch.cells for op in c.ops)


def test_the_derived_network_computes_what_the_super_net_did():
    unlike_any_other()
    net = SuperNet(NetSpec(4, 3, size=8, ops=("skip_connect", "mixer")), rules=options.Rules(ops=("mixer",)))
    for stage, end in enumerate(net.spec.ends): net.open(end, stage)
    x = torch.randn(4, 3, 8, 8)
    net(x), net.eval()
    arch = derive(net)
    small = DerivedNet(arch)
    small.load_state_dict(inherited(net, arch))
    torch.testing.assert_close(small.eval()(x)[0], net(x), rtol=1e-4, atol=1e-4)


def test_a_method(tmp_path):
    method_of_ones_own()
    mine = {"search.regrow": 0, "search.stage_keep": 0.0, "search.max_epochs": 6, "search.target_m": 0.012}
    arch = everything(preset("smoke", "half-life", **{**FAST, **mine}), tmp_path)
    assert sum(len(c.ops) for c in arch.cells) < 3 * 98 / 2


def test_a_space_and_its_data(tmp_path):
    space_of_ones_own(), data_of_ones_own()
    mine = {"space.kind": "diamond", "data.name": "stripes", "data.subset": 1.0, "search.target_m": 0.002}
    arch = everything(preset("smoke", **{**FAST, **mine}), tmp_path)
    assert arch.spec.kind == "diamond" and arch.classes == 2 and all(len(c.widths) == 4 for c in arch.cells)
    assert both_ways(spaces.SPACES["diamond"](4, 3, size=8), 1) <= 1e-9
