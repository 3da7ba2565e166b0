"""What the published code computes, this code computes: parameters, outputs and gradients of the authors' own networks
(see `oracles/README.md`)."""
import contextlib
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from mgdarts.base.options import Compute
from mgdarts.fast import compiled
from mgdarts.fast.engine import make
from mgdarts.fast.layout import natively
from mgdarts.methods.registry import preset
from mgdarts.methods.unroll import unrolled
from mgdarts.net.architecture import Architecture
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.discretise import threshold_loss
from mgdarts.net.supernet import SuperNet
from mgdarts.search.loss import live_thresholds, size_loss
from mgdarts.search.step import groups
from mgdarts.space.darts import NetSpec
from mgdarts.space.found import ArchCell, Op
from mgdarts.space.layers import AuxHead
from mgdarts.space.space import HeadSpec

ORACLES = Path(__file__).parent / "oracles"
OPS, EDGES = NetSpec.ops, NetSpec.graph.edges # of the DARTS-like space


@functools.cache
def read(name):
    "Tensors and metadata of a file."
    with safe_open(ORACLES / f"{name}.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, {k: json.loads(v) if v[0] in "[{" else v for k,
                                                        v in f.metadata().items()}


def oracle(name, dtype):
    tensors, meta = read(name)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}, meta


@dataclass
class How:
    "An implementation, and how close it must come: a share of the largest value."
    impl: str
    dtype: torch.dtype = torch.float64
    bound: float = 1e-9
    device: str = "cpu"

    def here(self, *names, of):  # tensors of a file, where the net is
        return tuple(of[n].to(self.device) for n in names)


HOW = {"reference": How("reference"), "fused": How("fused"), "as on GPUs": How("fused"),
       "compiled": How("fused", torch.float32, 1e-3), "on a GPU": How("fused", device="cuda")}


@pytest.fixture(params=HOW)
def how(request):
    """Operation by operation; fused, with the CPU kernels in PyTorch; with those that GPUs use; compiled, which are for
    32-bit numbers."""
    if request.param == "on a GPU" and not torch.cuda.is_available(): pytest.skip("there is no GPU here")
    if request.param == "compiled" and compiled.library() is None: pytest.skip("there is no C++ compiler here")
    with natively() if request.param == "as on GPUs" else contextlib.nullcontext(): yield HOW[request.param]


class Comparison:
    "Collects what there is and what there should be, by kind."
    def __init__(self, bound): self.bound, self.seen = bound, {}

    def add(self, kind, got, want):
        got, want = torch.zeros_like(want) if got is None else got.detach().cpu(), want.cpu()
        assert got.shape == want.shape, kind
        off, size = self.seen.get(kind, (0., 0.))
        if want.numel(): self.seen[kind] = max(off, float((got - want).abs().max())), max(size, float(want.abs().max()))

    def check(self):
        assert self.seen
        wrong = {kind: f"off by {off:.1e} of {size:.1e}" for kind, (off, size) in self.seen.items()
                 if not off <= self.bound * size}
        assert not wrong, wrong


# ---------------------------------------------------------------- where things lie

def kernel_key(c, seg):
    role = {"pre": "conv", "a": "conv_a", "b": "conv_b"}.get(seg.role, seg.role)
    return f"cell{c}.pre{-1 - seg.edge}.{role}" if seg.op < 0 else f"cell{c}.edge{seg.edge:02d}.{OPS[seg.op]}.{role}"


def gate_key(c, gate, what): # what: bn or beta
    if gate.op < 0: return f"cell{c}.pre{-1 - gate.edge}.{what}"
    return f"cell{c}.edge{gate.edge:02d}.{OPS[gate.op]}.{what}" + ("" if not OPS[gate.op].startswith("sep_conv")
                                                                   else "1" if gate.role == "mid" else "2")


def stored_kernels(net):
    "(cell, segment, its place in its group, shape, key, what of the full kernel is stored)"
    for c, one in enumerate(net.cells):
        at, lay = {"omega": 0, "plain": 0}, one.layout
        for seg, shape in lay.kernels:
            n = torch.Size(shape).numel()
            places = (seg.row0, seg.rows), (seg.col0, seg.cols)
            rows, cols = (lay.alive[first:first + k].nonzero().flatten() for first, k in places)
            cut = rows if seg.depthwise else torch.meshgrid(rows, cols, indexing="ij")
            yield one, seg, slice(at[seg.group], at[seg.group] + n), shape, kernel_key(c, seg), cut
            at[seg.group] += n


def stored_gates(net):
    for c, one in enumerate(net.cells):
        at = 0
        for gate, ids in one.layout.gates:
            yield c, one, gate, ids, slice(at, at + len(ids))
            at += len(ids)


# ---------------------------------------------------------------- the super-net of MG-DARTS

def whole_norms(net):
    "Batch norms of the parts that are not searched."
    yield "stem.bn", net.stem.convs[0].norm
    if isinstance(net.head, AuxHead):
        yield "head.bn1", net.head.narrow.norm
        yield "head.bn2", net.head.whole.norm


def whole_weights(net, read=None):
    "Other parameters of those. `read`: the columns of a head that are stored."
    yield "stem.conv", net.stem.convs[0].weight
    top = net.head
    if isinstance(net.head, AuxHead):
        top = net.head.classifier
        yield "head.conv1", net.head.narrow.weight
        yield "head.conv2", net.head.whole.weight
    yield "head.classifier.weight", top.weight
    yield "head.classifier.bias", top.bias


def super_net(number, D, cfg, dtype):
    "A stage's sub-net with what is pruned gone, and everything of the file in it."
    spec, n = NetSpec(cfg["channels"], cfg["layers"], cfg["classes"], cfg["image"]), cfg["cells"]
    net = SuperNet(spec, engine=make(Compute()))
    net.open(n - 1, number - 1)
    if cfg["head_channels"]:
        last = spec.cell[n - 1]
        net.head = AuxHead(HeadSpec(last.out, last.side, *cfg["head_channels"], 1, cfg["classes"]), torch.Generator(),
                           last.out)
    keep = [torch.ones(c.spec.sizes["gates"], dtype=torch.bool) for c in net.cells]
    for c, one in enumerate(net.cells):
        for gate in one.spec.gates:
            state = D.get("state." + gate_key(c, gate, "beta"))
            if gate.learned and state is not None: keep[c][gate.start:gate.start + gate.width] = state > 0
    net.rebuild(D["state.ops"] > 0, keep)
    net.to(dtype).discretising = True
    with torch.no_grad():
        for name in ("alpha", *net.THRESHOLDS): getattr(net, name)[:n] = D[name]
        for one, seg, at, _, key, cut in stored_kernels(net):
            getattr(one, seg.group)[at] = D[key][cut].flatten()
            if seg.group == "omega": one.omega_live[at] = D["state." + key][cut].flatten() > 0
        for c, one, gate, ids, at in stored_gates(net):
            for name, row in zip(("scale", "shift", "mean", "var"), D[gate_key(c, gate, "bn")]):
                getattr(one, name)[at] = row[ids]
            one.beta[at] = D[gate_key(c, gate, "beta")][ids]
        for key, norm in whole_norms(net):
            for name, row in zip(("weight", "bias", "running_mean", "running_var"), D[key]):
                getattr(norm, name).copy_(row)
        for key, p in whole_weights(net):
            for k in (key, "grad." + key):
                if D[k].shape != p.shape: D[k] = D[k][:, net._out(n - 1)] # of channels that are gone
            p.copy_(D[key])
    return net


def gradients(net, D, seen):
    "Everything the loss has a gradient of, and the running statistics after one pass."
    n = len(net.cells)
    for one, seg, at, shape, key, cut in stored_kernels(net):
        want = D["grad." + key]
        seen.add(f"gradient of {seg.group}, {'depthwise' if seg.depthwise else '1x1'}",
                 getattr(one, seg.group).grad[at].view(shape), want[cut])
        gone = torch.ones_like(want, dtype=torch.bool)
        gone[cut] = False
        assert not want[gone].any() # nothing that is pruned has a gradient in the published code either
    for c, one, gate, ids, at in stored_gates(net):
        norm, beta = D["grad." + gate_key(c, gate, "bn")], D["grad." + gate_key(c, gate, "beta")]
        seen.add("gradient of batch-norm scale", one.scale.grad[at], norm[0, ids])
        seen.add("gradient of batch-norm shift", one.shift.grad[at], norm[1, ids])
        seen.add("gradient of beta" + "" if gate.learned else " of strided skips", one.beta.grad[at], beta[ids])
        after = D["after." + gate_key(c, gate, "bn")]
        seen.add("running mean", one.mean[at], after[0, ids])
        seen.add("running variance", one.var[at], after[1, ids])
    seen.add("gradient of alpha", net.alpha.grad[:n] * net.op_live[:n], D["grad.alpha"])
    for name in net.THRESHOLDS: seen.add(f"gradient of {name}", getattr(net, name).grad[:n], D["grad." + name])
    for key, norm in whole_norms(net):
        seen.add(f"gradient of {key}", torch.stack([norm.weight.grad, norm.bias.grad]), D["grad." + key])
        seen.add(f"statistics of {key}", torch.stack([norm.running_mean, norm.running_var]), D["after." + key])
    for key, p in whole_weights(net): seen.add(f"gradient of {key}", p.grad, D["grad." + key])


@pytest.mark.parametrize("number", (1, 2, 3))
def test_super_net(number, how):
    D, meta = oracle(f"mgdarts_stage{number}", how.dtype)
    net, seen = super_net(number, D, meta["config"], how.dtype), Comparison(how.bound)
    net.engine = make(Compute(impl=how.impl))
    net.to(how.device).eval()
    x, y = how.here("x", "y", of=D)
    with torch.no_grad(): logits = net(x)
    seen.add("logits in evaluation", logits, D["out.eval.logits"])
    seen.add("cross-entropy in evaluation", F.cross_entropy(logits, y), D["out.eval.cross_entropy"])
    net.train()
    logits = net(x)
    loss = F.cross_entropy(logits, y)
    seen.add("logits", logits, D["out.train.logits"])
    seen.add("cross-entropy", loss, D["out.train.cross_entropy"])
    loss.backward()
    gradients(net, D, seen)
    seen.check()


@pytest.mark.parametrize("number", (1, 2, 3))
def test_masks_and_regularisers(number):
    D, meta = oracle(f"mgdarts_stage{number}", torch.float64)
    net, seen = super_net(number, D, meta["config"], torch.float64), Comparison(1e-9)
    n = len(net.cells)
    on = [(c.gates(net.thresholds(i)[0]) != 0, c.weights(net.thresholds(i)[1]) != 0) for i, c in enumerate(net.cells)]
    assert torch.equal(net.strengths().view(n, 14, 7) != 0, D["state.ops"] == 2)
    for c, one, gate, ids, at in stored_gates(net):
        if gate.learned: assert torch.equal(on[c][0][at], D["state." + gate_key(c, gate, "beta")][ids] == 2)
    for one, seg, at, shape, key, cut in stored_kernels(net):
        if seg.group == "omega":
            assert torch.equal(on[list(net.cells).index(one)][1][at].view(shape), D["state." + key][cut] == 2)
    pressure = sum(threshold_loss(getattr(net, k)[:n], live) for k, live in live_thresholds(net).items())
    first = 0 if number == 1 else net.spec.ends[number - 2] + 1
    price = size_loss(net.alpha[first:n], net.op_live[first:n], net.spec.node_sizes) # of the stage's own cells
    (pressure + price).backward()
    seen.add("R_threshold", pressure, D["r_thr"])
    seen.add("R_size", price, D["r_size.live"])
    for name in net.THRESHOLDS:
        seen.add(f"gradient of R_threshold on {name}", getattr(net, name).grad[:n], D["grad_r_thr." + name])
    seen.add("gradient of R_size", net.alpha.grad[:n], D["grad_r_size.live.alpha"])
    seen.check()


# ---------------------------------------------------------------- the derived network

def derived(D, meta):
    "The network of the genotype; its weights and batch norms by the file's keys."
    cfg, cells, masks, keys = meta["config"], [], {}, []
    for c, gene in enumerate(meta["gene"]):
        ops = tuple(Op(name, i, j, tuple(widths)) for name, i, j, widths in gene)
        cells.append(ArchCell(ops, tuple(D["widths"][c].tolist())))
        keys.append([f"cell{c}.edge{EDGES.index((op.src, op.dst)):02d}.{op.op}." for op in ops])
        for i, key in enumerate(keys[-1]):
            masks |= {f"c{c}.o{i}.{role}": D[f"mask.{key}{role}"] != 0
                      for role in ("dw1", "pw1", "dw2", "pw2", "dw", "pw") if f"mask.{key}{role}" in D}
    arch = Architecture("oracle", NetSpec(cfg["channels"], len(cells), cfg["classes"], cfg["image"]), tuple(cells),
                        masks)
    net, head = DerivedNet(arch, True, 0), arch.aux_head
    net.aux = AuxHead(HeadSpec(head.width, head.side, *cfg["aux_channels"], 1, head.classes), torch.Generator())
    weights = {"stem.conv": net.stem.convs[0].weight, "aux.conv1": net.aux.narrow.weight,
               "aux.conv2": net.aux.whole.weight}
    norms = {"stem.bn": net.stem.convs[0].norm, "aux.bn1": net.aux.narrow.norm, "aux.bn2": net.aux.whole.norm}
    for name, top in (("aux.classifier", net.aux.classifier), ("classifier", net.classifier)):
        weights |= {name + ".weight": top.weight, name + ".bias": top.bias}
    for c, one in enumerate(net.cells):
        for key, module in [(f"cell{c}.pre{s}.", m) for s, m in enumerate(one.pre)] + list(zip(keys[c], one.ops)):
            own = dict(module.named_parameters(recurse=False))
            weights |= {key + {"pre": "conv", "a": "conv_a", "b": "conv_b"}.get(role, role): p for role,
                        p in own.items()}
            own = list(getattr(module, "norms", []))
            norms |= {f"{key}bn{i + 1 if len(own) > 1 else ''}": m for i, m in enumerate(own)}
    assert {*weights, *norms} == {k for k in D if not k.startswith(("mask.", "grad.", "after.", "out.", "x", "y", "ops",
                                                                    "widths"))}
    return net, weights, norms


def test_derived_network(how):
    D, meta = oracle("mgdarts_retrain", how.dtype)
    net, weights, norms = derived(D, meta)
    net.to(how.device, how.dtype).engine = make(Compute(impl=how.impl))
    seen, (x, y) = Comparison(how.bound), how.here("x", "y", of=D)
    with torch.no_grad():
        for key, p in weights.items(): p.copy_(D[key])
        for key, norm in norms.items():
            for name, row in zip(("weight", "bias", "running_mean", "running_var"), D[key]):
                getattr(norm, name).copy_(row)
        net.apply_masks()
        seen.add("logits in evaluation", net.eval()(x)[0], D["out.eval.logits"])
    logits, aux = net.train()(x)
    loss = F.cross_entropy(logits, y) + meta["config"]["aux_weight"] * F.cross_entropy(aux, y)
    loss.backward()
    for name, value in (("logits", logits), ("aux_logits", aux), ("loss", loss)):
        seen.add(name, value, D["out.train." + name])
    for key, p in weights.items(): seen.add(f"gradient of {key.split('.')[-1]}", p.grad, D["grad." + key])
    for key, norm in norms.items():
        seen.add("gradient of batch norms", torch.stack([norm.weight.grad, norm.bias.grad]), D["grad." + key])
        seen.add("running statistics", torch.stack([norm.running_mean, norm.running_var]), D["after." + key])
    seen.check()


# ---------------------------------------------------------------- DARTS and PC-DARTS

FIXED = {"stem.convs.0.weight": "stem.conv", "stem.convs.0.norm.weight": "stem.bn.weight",
         "stem.convs.0.norm.bias": "stem.bn.bias", "head.weight": "classifier.weight", "head.bias": "classifier.bias"}


def preprocessing(key, D):
    "Rows of the kernel before a cell, in the order of segments."
    return D[key + "conv"] if key + "conv" in D else torch.cat([D[key + "conv_a"], D[key + "conv_b"]])


def weights_of(net, D, prefix=""):
    "Name of a parameter -> its value."
    out = {ours: D[prefix + theirs] for ours, theirs in FIXED.items()}
    for c, one in enumerate(net.cells):
        flat, rows = {"omega": [], "plain": []}, {-1 - s: preprocessing(f"{prefix}cell{c}.pre{s}.", D)
                                                  for s in range(2)}
        for seg, shape in one.layout.kernels:
            if seg.op >= 0: w = D[prefix + kernel_key(c, seg)]
            else: w, rows[seg.edge] = rows[seg.edge][:shape[0]], rows[seg.edge][shape[0]:]
            assert tuple(w.shape) == tuple(shape)
            flat[seg.group].append(w.flatten())
        assert not any(map(len, rows.values()))
        out |= {f"cells.{c}.{group}": torch.cat(ws) for group, ws in flat.items()}
    return out


def baseline(method, D, meta, dtype, pool_norm):
    "A method's super-net with the settings it has, and the file's parameters in it."
    cfg, own, ops = meta["config"], preset("small", method), meta["ops"]
    assert own.rules.partial == cfg["K"] and own.rules.pool_norm
    own.rules.pool_norm = pool_norm
    spec = NetSpec(cfg["channels"], cfg["layers"], cfg["classes"], cfg["image"], constraint=own.space.constraint,
                   partial=own.rules.partial)
    net = SuperNet(spec, granularities=own.search.granularities, engine=make(Compute()), rules=own.rules)
    net.open(cfg["layers"] - 1, 2)
    net.to(dtype).train()
    with torch.no_grad():
        for name, value in weights_of(net, D).items(): net.get_parameter(name).copy_(value)
        for c, one in enumerate(spec.cell):
            kind = "reduce" if one.reduction else "normal"
            alpha = D["alpha_" + kind]
            net.alpha[c], net.zero[c] = alpha[:, [ops.index(o) for o in OPS]], alpha[:, ops.index("none")]
            if cfg["K"] > 1: net.edge[c] = D["beta_" + kind]
    return net


def strengths_of(net, found, meta):
    "Gradients of the strengths, by name of a parameter, in the order of the file."
    for name, g in found.items(): net.get_parameter(name).grad = g.clone()
    net.tie()
    ops = meta["ops"]
    for kind, c in (("normal", 0), ("reduce", next(c.index for c in net.spec.cell if c.reduction))):
        both = torch.cat([net.alpha.grad[c], net.zero.grad[c][:, None]], 1)
        yield f"alpha_{kind}", both[:, [[*OPS, "none"].index(o) for o in ops]]
        if hasattr(net, "edge"): yield f"beta_{kind}", net.edge.grad[c]


@pytest.mark.parametrize("variant", ("", "no_pool_bn."), ids=("as published", "no batch norm after pools"))
@pytest.mark.parametrize("method, file", (("darts-v2", "darts"), ("pc-darts", "pcdarts")))
def test_two_level_methods(method, file, variant, how):
    D, meta = oracle(file, how.dtype)
    net, seen = baseline(method, D, meta, how.dtype, not variant), Comparison(how.bound)
    net.to(how.device).engine = make(Compute(impl=how.impl))
    train, valid = how.here("x_train", "y_train", of=D), how.here("x_valid", "y_valid", of=D)
    of, names = groups(net), {id(p): n for n, p in net.named_parameters()}
    weights, strengths = ([names[id(p)] for p in of[k]] for k in ("weights", "strengths"))
    with torch.no_grad(): seen.add("logits", net(train[0]), D[variant + "out.logits_train"])
    logits = net(valid[0])
    seen.add("logits", logits, D[variant + "out.logits_valid"])
    first = torch.autograd.grad(F.cross_entropy(logits, valid[1]), [net.get_parameter(k) for k in strengths])
    for name, g in strengths_of(net, dict(zip(strengths, first)), meta):
        seen.add(f"first-order gradient of {name}", g, D[f"{variant}grad_first.{name}"])
    if variant or method == "pc-darts" and how is not HOW["reference"]:
        return seen.check() # the step ahead is the same code, and PC-DARTS takes none
    buffers = {k: v.to(how.device) for k, v in weights_of(net, D, "momentum.").items()}
    assert {k for k in weights if net.get_parameter(k).numel()} == set(buffers)
    rate, momentum, decay = (float(D[k]) for k in ("eta", "momentum", "weight_decay"))
    second = unrolled(net, lambda f, x, y, *_: F.cross_entropy(f(x), y), train, valid, weights, strengths, rate,
                      momentum, decay, buffers)
    for name, g in strengths_of(net, second, meta):
        seen.add(f"second-order gradient of {name}", g, D[f"{variant}grad_second.{name}"])
    seen.check()


def test_a_wrong_number_is_found():
    "One weight of thousands, off by a millionth, fails the comparison of what it gives."
    how = HOW["reference"]
    D, meta = oracle("darts", how.dtype)
    D["cell3.edge05.sep_conv_5x5.dw1"] = D["cell3.edge05.sep_conv_5x5.dw1"].clone()
    D["cell3.edge05.sep_conv_5x5.dw1"][0, 0, 0, 0] += 1e-6
    net, seen = baseline("darts-v1", D, meta, how.dtype, True), Comparison(how.bound)
    net.engine = make(Compute(impl=how.impl))
    with torch.no_grad(): seen.add("logits", net(D["x_train"]), D["out.logits_train"])
    with pytest.raises(AssertionError, match="logits"): seen.check()
