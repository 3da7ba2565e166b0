"The MobileNet-like space: its super-net against a slow, independent version of itself; searches, runs and files."
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mgdarts.base.options import Compute, InputError, Search as Settings
from mgdarts.cli.main import main
from mgdarts.fast import discrete
from mgdarts.fast.engine import FastEngine, plan_of
from mgdarts.fast.mobile import fused
from mgdarts.methods.registry import preset
from mgdarts.net import files as architecture
from mgdarts.net.architecture import Architecture
from mgdarts.net.count import counts
from mgdarts.net.derive import derive, inherited
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.engine import Engine
from mgdarts.net.sample import random_architecture
from mgdarts.net.supernet import SuperNet
from mgdarts.runs import export
from mgdarts.runs import run as runs
from mgdarts.runs.make import supernet_weights
from mgdarts.search.loop import Search
from mgdarts.search.loss import regulariser
from mgdarts.search.prune import candidates, choose, commit
from mgdarts.search.stages import plan
from mgdarts.space.found import ArchCell, Op
from mgdarts.space.mobile import MobileSpec
from mgdarts.space.space import count_supernet

# --- the super-net

def test_sizes_of_the_super_net(capsys):
    assert main(["count", "--space", "mobilenet", "--size", "236", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["main"] == 21_943_384 and out["ops"] == 51
    assert out["weaknas"] == {"params": 8_813_720, "macs": 560_829_800}
    assert main(["count", "--space", "mobilenet", "--width", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["main"] == 15_431_920
    spec = MobileSpec()
    net = SuperNet(spec)
    for stage in (0, 1):
        net.open(spec.ends[stage], stage)
        assert sum(p.numel() for p in net.head.parameters()) == count_supernet(spec)["aux"]["medium"][stage]
    net.open(16, 2)
    arch = {id(net.alpha)} | {id(getattr(net, t)) for t in net.THRESHOLDS} | {id(c.beta) for c in net.cells}
    assert sum(p.numel() for p in net.parameters() if id(p) not in arch) == 21_943_384 == net.count().params
    assert net.count().macs == spec.stem_macs + sum(c.macs for c in spec.cell) + spec.top(192)[1]


def random_net(seed, spec=MobileSpec(6, 0.25, 4, 16), double=True, engine=None):
    net, g = SuperNet(spec, seed=seed, engine=engine or FastEngine()), torch.Generator().manual_seed(seed)
    net.open(spec.cells - 1, 2)
    if double:
        net.double()
    with torch.no_grad():
        for n, p in net.named_parameters():
            if n.startswith("t_"):
                p.copy_(torch.rand(p.shape, generator=g) * (0.1 if "omega" in n else 0.7))
            elif n == "alpha" or n.endswith(("beta", "scale", "shift")):
                p.add_(torch.randn(p.shape, generator=g))
        for c in net.cells:
            c.mean.normal_(generator=g)
            c.var.uniform_(0.5, 2, generator=g)
    net.discretising = True
    return net


def naive_layer(cell, alpha, x, t_alpha=None, t_beta=None, t_omega=None):
    "A layer filter by filter and weight by weight, from the stored vectors. Thresholds: [3] each."
    s, total, at, gat = cell.spec, x if cell.spec.residual else 0, {"omega": 0, "plain": 0}, 0
    cin, cout, stride, mid = s.inputs[0], s.width, 2 if s.reduction else 1, 6 * s.inputs[0]
    act = torch.relu if s.ops[0].act == "relu" else lambda v: v * torch.clamp(v + 3, 0, 6) / 6

    def take(group, *shape):
        n = torch.Size(shape).numel()
        w = getattr(cell, group)[at[group]:at[group] + n].view(shape)
        at[group] += n
        return w

    def batch_norm(y, n):
        nonlocal gat
        i = slice(gat, gat + n)
        gat += n
        m, v = (y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)) if cell.training else (cell.mean[i], cell.var[i])
        def c(z): return z.view(1, -1, 1, 1)
        return (y - c(m)) / (c(v) + 1e-5).sqrt() * c(cell.scale[i]) + c(cell.shift[i]), torch.sigmoid(cell.beta[i])

    a = torch.sigmoid(alpha)
    for k, (side, few) in enumerate((op.k, op.inner(cin).get("squeeze")) for op in s.ops):
        def weights(*shape):
            w = take("omega", *shape)
            return w if t_omega is None else w * (w.abs() > t_omega[k])

        y, _ = batch_norm(torch.einsum("oi,nihw->nohw", weights(mid, cin), x), mid)
        y, dw, pad = act(y), weights(mid, side, side), side // 2
        z = F.pad(y, (pad,) * 4)
        taps = [(i, j) for i in range(side) for j in range(side)]
        y = torch.stack([sum(dw[f, i, j] * z[:, f, i:i + y.shape[2]:stride, j:j + y.shape[3]:stride] for i, j in taps)
                         for f in range(mid)], 1)
        y, beta = batch_norm(y, mid)
        on = torch.ones(mid) if t_beta is None else (beta > t_beta[k]) | (torch.arange(mid) == beta.argmax())
        y = act(y * (beta * on).view(1, -1, 1, 1))
        if few:
            w1, b1, w2, b2 = take("plain", few, mid), take("plain", few), take("plain", mid, few), take("plain", mid)
            y = y * (torch.clamp(torch.relu(y.mean((2, 3)) @ w1.T + b1) @ w2.T + b2 + 3, 0, 6) / 6)[:, :, None, None]
        y, _ = batch_norm(torch.einsum("oi,nihw->nohw", weights(cout, mid), y), cout)
        m = a[k] if t_alpha is None or a[k] > t_alpha[k] or k == int(a.argmax()) else 0 * a[k]
        total = total + m * y
    used = {group: getattr(cell, group).numel() for group in at}
    assert at == used and gat == cell.beta.numel()  # all of it
    return total


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("c", [0, 1, 2, 5])  # without and with squeeze, both activations, a residual
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_the_slow_one(impl, c, training):
    net = random_net(3).train(training)
    cell, full = net.cells[c], net.spec.cell[c]
    side = 6 if full.residual else full.side_in  # the last layers' own maps are a pixel wide
    x = torch.randn(3, full.inputs[0], side, side, dtype=torch.double).to(memory_format=torch.channels_last)

    def ours(discretise):
        net.discretising = discretise
        alpha, (g, w) = net.strengths()[c], net.thresholds(c)
        if impl == "reference":
            return cell(x, alpha=alpha, t_gate=g, t_weight=w)[0]
        return fused(cell, plan_of(cell), x, alpha=alpha, gate=cell.gates(g), omega=cell.weights(w))[0]

    on = naive_layer(cell, net.alpha[c, 0], x, net.t_alpha[c, 0], net.t_beta[c, 0], net.t_omega[c, 0])
    torch.testing.assert_close(ours(True), on, rtol=1e-9, atol=1e-9)
    params = [net.alpha, cell.omega, cell.plain, cell.scale, cell.shift, cell.beta]
    grads = []
    for y in (ours(False), naive_layer(cell, net.alpha[c, 0], x)):
        probe = torch.cos(torch.arange(y.numel(), dtype=torch.double)).view(y.shape)
        grads.append(torch.autograd.grad((y * probe).sum(), [p for p in params if p.numel()], allow_unused=True))
    for a, b in zip(*grads):
        zero = torch.zeros(())
        # torch's hard sigmoid has a sixth in single precision in its backward pass
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("engine", [FastEngine, Engine])
@pytest.mark.parametrize("seed", range(4))
def test_compaction_is_exact_and_the_size_is_the_one_predicted(seed, engine):
    net = random_net(seed, double=False, engine=engine()).eval()
    x = torch.randn(4, 3, 16, 16)
    before, full = net(x).detach(), net.count().params
    found = candidates(net)
    least = net.count(**found.masks(found.off)).params
    target = least + (full - least) * seed / 4
    off = choose(net, found, target)
    predicted = net.count(**found.masks(off))
    if target > least:  # as little as it takes
        assert 0.99 * target <= predicted.params <= target
    else:  # everything that is off goes: nothing changes
        assert torch.equal(off, found.off)
    live = net.op_live.clone()
    done = commit(net, target)
    if target == least:
        assert (net(x) - before).abs().max() <= 1e-5
    assert net.count().params == predicted.params == done.after.params
    assert bool((net.op_live <= live).all()) and bool(net.op_live.any(2).all())
    assert all(row[0] >= 1 for c in net.count().cells for row in c.by_op.values())
    with FlopCounterMode(display=False) as f, torch.no_grad():
        net(x)
    assert f.get_total_flops() == 2 * 4 * net.count().macs_dense  # what was pruned is not computed
    arch = derive(net)
    n = counts(arch)
    now = net.count()
    assert (n["params_nonzero"], n["params_deployable"]) == (now.params, now.dense)
    assert (n["macs_nonzero"], n["macs"]) == (now.macs, now.macs_dense)
    assert n["params_deployable"] == sum(p.numel() for p in DerivedNet(arch).parameters())
    assert n["retention"] | {"conv": 0} == net.count().retention() | {"conv": 0}
    derived = DerivedNet(arch, engine=engine())
    derived.load_state_dict(inherited(net, arch))
    net.discretising = False
    with torch.no_grad():
        torch.testing.assert_close(derived.eval()(x)[0], net(x), rtol=1e-4, atol=1e-4)


def test_the_price_is_that_of_nodes_with_three_blocks():
    net = random_net(1)
    net.op_live[2, 0, 1] = False
    price, pressure = regulariser(net)
    want = 0.0
    for c in range(6):
        a = torch.sigmoid(net.alpha[c, 0])[net.op_live[c, 0]]
        want += sum(torch.log(1 + len(a) * v / a.sum()) for v in a)
    torch.testing.assert_close(price, want)
    torch.testing.assert_close(pressure, sum(torch.exp(-getattr(net, t)[net.op_live]).sum()
                                             for t in ("t_alpha", "t_beta", "t_omega")))


def test_recomputing_changes_nothing():
    x, found = torch.randn(2, 3, 16, 16).double(), []
    for recompute in ("none", "all", "earlier"):
        net = random_net(2, engine=FastEngine(Compute(recompute=recompute)))
        net.first = 3
        net(x).square().mean().backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# --- the search

class Batches:
    def __init__(self, n=2):
        self.n, self.batch_size = n, 16

    def __len__(self):
        return self.n

    def batch(self, epoch, step):
        g = torch.Generator().manual_seed(100 * epoch + step)
        y = torch.randint(4, (16,), generator=g)
        return torch.randn(16, 3, 8, 8, generator=g) + y.view(-1, 1, 1, 1), y

    def eval(self):
        yield self.batch(99, 0)


SPEC = MobileSpec(5, 0.25, 4, 8)


def make(stages=3, **more):
    more = {"target_m": 0.15, "stages": stages, "stage_keep": (0.5,) * stages, "warmup": 1, "prune_every": 1,
            "max_epochs": 12, "lambda_step": 4e-3, "batch": 16} | more
    return Search(SPEC, {"train": Batches(), "val": Batches()}, Settings(**more), seed=1, engine=FastEngine())


@pytest.mark.parametrize("stages", [1, 3])
def test_a_search_ends_at_its_target_and_goes_on_from_any_state_with_the_same_bits(stages):
    assert [end for _, end, _ in plan(SPEC, stages)] == ([1, 3, 4, 4] if stages == 3 else [4, 4])
    whole, states = make(stages), []
    commits = []
    whole.events.listen(lambda e: commits.append(e.data), "commit")
    regrown = []
    whole.events.listen(lambda e: regrown.extend(e.data["regrown"]), "regrow")
    while not whole.finished:
        whole.step()
        if whole.steps % 7 == 3:
            states.append(whole.state_dict())
    assert whole.net.count().params <= 150_000 and commits and all(c["params"] <= c["params_before"] for c in commits)
    assert all(SPEC.ops.index(op) in range(3) and (a, b) == (0, 1) for _, a, b, op in regrown)
    for state in states:
        other = make(stages)
        other.load_state_dict(state)
        other.run()
        assert other.steps == whole.steps
        assert all(torch.equal(a, b) for a, b in zip(whole.net.state_dict().values(), other.net.state_dict().values(),
                                                     strict=True))


def test_a_target_below_what_is_not_searched_is_refused():
    with pytest.raises(InputError, match="stem and head"):
        make(target_m=0.05)
    with pytest.raises(InputError, match="not below"):
        make(target_m=5.0)


# --- runs

FAST = {"space.kind": "mobilenet", "data.subset": 200, "search.warmup": 1, "search.max_epochs": 3, "train.epochs": 2,
        "search.batch": 32}
SETS = [x for k, v in FAST.items() for x in ("--set", f"{k}={v}")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("mobile") / "run"
    assert main(["search", "--preset", "smoke", *SETS, "--out", str(out)]) == 0
    assert main(["train", str(out)]) == 0 and main(["train", str(out), "--baseline"]) == 0
    return out


def test_search_derive_retrain_report(run, capsys):
    capsys.readouterr()
    assert json.loads((run / "architecture.json").read_text())["space"] == "mobilenet"
    assert main(["arch", "show", str(run), "--json"]) == 0
    shown, result = json.loads(capsys.readouterr().out), json.loads((run / "result.json").read_text())
    assert shown["params_nonzero"] == result["params"]
    assert shown["ops"] == result["ops"] == sum(len(c["blocks"]) for c in shown["cells"])
    searched, other = (json.loads((run / k / "result.json").read_text()) for k in ("train", "random"))
    assert 0.98 * searched["params_nonzero"] < other["params_nonzero"] <= searched["params_nonzero"]
    page = (run / "report.html").read_text("utf-8")
    assert "MobileNet-like" in page and "Derived blocks" in page
    arch = architecture.load(run)
    result = runs.train(preset("smoke", **FAST, **{"train.weights": "supernet"}), arch, run / "inherited",
                        init_state=supernet_weights(run, arch))
    assert result["epochs"] == 2
    assert main(["compare", str(run), str(run / "random"), "--json"]) == 0


def test_an_interrupted_run_resumes_to_the_same_events(run, interrupted, events_of):
    cut = interrupted(preset("smoke", **FAST))
    assert events_of(run) == events_of(cut)
    for name in ("architecture.json", "masks.safetensors"):
        assert (run / name).read_bytes() == (cut / name).read_bytes()


def test_a_run_is_drawn(run):
    from mgdarts.views.workbench import seen_in, stills
    drawn = stills(*seen_in(run))
    assert {"progress", "cells", "operations", "filters", "weights"} < drawn.keys() and len(drawn) == 6  # and a cell
    assert all(svg.startswith("<svg") for name, svg in drawn.items() if name != "progress")


def test_what_cannot_be_exported_is_said(run, tmp_path):
    with pytest.raises(InputError, match="onnx or json"):
        export.export_arch(run, "python", tmp_path / "net.py")
    done = export.export_arch(run, "json", tmp_path / "net.json")
    assert architecture.load(tmp_path / "net.json") == architecture.load(run) and done["max_difference"] is None


def test_the_onnx_graph_computes_the_same(tmp_path):
    pytest.importorskip("onnx", reason="the extra 'export' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    from onnx.reference import ReferenceEvaluator
    arch = random_architecture(MobileSpec(3, 0.25, 4, 16), 110_000)
    architecture.save(arch, tmp_path / "A")
    export.export_arch(tmp_path / "A", "onnx", tmp_path / "net.onnx")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    (got,) = ReferenceEvaluator(str(tmp_path / "net.onnx")).run(None, {"images": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), DerivedNet(arch).eval()(x)[0], rtol=1e-4, atol=1e-4)


# --- architectures

def test_files_and_what_is_wrong_with_them(tmp_path):
    arch = random_architecture(MobileSpec(4, 0.25, 3, 16), 110_000, seed=2)
    arch.masks = {k: torch.rand(s, generator=torch.Generator().manual_seed(0)) > 0.4
                  for k, s in arch.mask_shapes().items()}
    path = architecture.save(arch, tmp_path)
    assert architecture.load(tmp_path) == arch
    assert architecture.fingerprint(arch) == architecture.fingerprint(architecture.load(tmp_path))
    whole, real = (architecture.fingerprint(random_architecture(MobileSpec(4, w, 3, 16), 10 ** 7)) for w in (1, 1.0))
    assert whole == real
    text = path.read_text()
    whole = json.loads(text)
    del whole["sha256"]
    for change, word in (({"space": "mars"}, "mars"), ({"space": 3}, "space"), ({"width": "wide"}, "width"),
                         ({"width": 1e9}, "width"), ({"width": 10 ** 400}, "width"),
                         ({"cells": whole["cells"][:2]}, "cells"), ({"channels": 8}, "channels"),
                         ({"cells": [[[3, 10 ** 9, 0]], *whole["cells"][1:]]}, "filters"),
                         ({"cells": [[[4, 8, 0]], *whole["cells"][1:]]}, "kernel"),
                         ({"cells": [[], *whole["cells"][1:]]}, "blocks"),
                         ({"cells": [[[3, 8, 8]], *whole["cells"][1:]]}, "squeezed"),
                         ({"cells": [[[5, 8, 0], [3, 8, 0]], *whole["cells"][1:]]}, "order")):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(InputError, match=word):
            architecture.load(tmp_path)
    path.write_text(text.replace("mobilenet", "mobilenot"))
    with pytest.raises(InputError, match="damaged"):
        architecture.load(tmp_path)
    with pytest.raises(InputError, match="belongs to no kernel"):
        Architecture("x", arch.spec, arch.cells, {"c0.o0.squeeze": torch.zeros(1, dtype=torch.bool)})
    first = arch.cells[0]
    foreign = ArchCell((Op("sep_conv_3x3", 0, 1, (first.widths[0], 8, first.widths[1])),), first.widths)
    with pytest.raises(InputError, match="operation 0 of cell 0 is 'sep_conv_3x3'"):
        Architecture("x", arch.spec, (foreign, *arch.cells[1:]))


def test_drop_path_drops_what_is_beside_an_identity():
    spec = MobileSpec(6, 0.25, 3, 16)

    def one(layer):  # the block with a 3x3 kernel, eight filters inside
        cin, cout, few = layer.inputs[0], layer.width, layer.ops[0].inner(layer.inputs[0]).get("squeeze")
        return ArchCell((Op("irb_3x3", 0, 1, (cin, 8, few, cout) if few else (cin, 8, cout)),), (cin, cout))

    arch = Architecture("x", spec, tuple(map(one, spec.cell)))
    net = DerivedNet(arch).train()
    assert [cell.droppable for cell in net.cells] == [0, 0, 0, 0, 0, 1]
    x = torch.randn(4, spec.cell[5].inputs[0], 1, 1)
    cell, keep = net.cells[5], torch.tensor([[0.0, 2.0, 0.0, 2.0]])
    for y in (cell(x, keep), discrete.blocks(cell, plan_of(cell), (x,), keep)):
        assert torch.equal(y[::2], x[::2]) and not torch.equal(y[1::2], x[1::2])


def test_the_memory_plan_of_this_space(capsys):
    from mgdarts.runs.memory import step_memory
    net = random_net(0, SPEC, double=False)
    fake = step_memory(net, Settings(), 8)
    real = step_memory(random_net(0, SPEC, double=False), Settings(), 8, real=True)
    assert fake.live_ops == 15 and abs(fake.peak_bytes / real.peak_bytes - 1) < 0.02
    assert abs(fake.activations / real.activations - 1) < 0.02
    assert main(["plan", "--space", "mobilenet", "--width", "0.25", "--cells", "5", "--size", "32", "--classes", "10",
                 "--batch", "8", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [s["live_ops"] for s in out["stages"]][0] == 6 and len(out["stages"]) == 4
    assert 0 < out["percent_of_single_stage"] < 100
