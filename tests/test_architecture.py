"Architectures: counts, files, genotypes, the built network."
import copy, json, os
from dataclasses import replace
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from mgdarts.base.options import InputError
from mgdarts.fast import compiled
from mgdarts.fast.engine import FastEngine
from mgdarts.net.architecture import Architecture
from mgdarts.net.count import count, counts
from mgdarts.net.discrete import DerivedCell, DerivedNet
from mgdarts.net.engine import Engine
from mgdarts.net.files import fingerprint, load, save
from mgdarts.net.genotype import import_genotype
from mgdarts.net.sample import at_width, fitted, random_architecture
from mgdarts.space.darts import NetSpec
from mgdarts.space.found import ArchCell, Op
from mgdarts.space.layers import avg_pool, max_pool

SHARED = Path(os.environ.get("MGDARTS_SHARED", Path(__file__).parents[2] / "shared"))
PUBLISHED = SHARED / "data" / "published"
published = pytest.mark.skipif(not (PUBLISHED / "genotype_small.txt").exists(),
                               reason="the authors' published files are not here: set MGDARTS_SHARED")

engines = pytest.mark.parametrize("engine", (Engine, FastEngine))

def gen(seed=0): return torch.Generator().manual_seed(seed)
def masked(arch, keep=.7, seed=0):
    g = gen(seed)
    return replace(arch, masks={k: torch.rand(s, generator=g) < keep for k, s in arch.mask_shapes().items()})
def small(): return masked(random_architecture(NetSpec(4, 5, size=16), 20_000, seed=3))
def images(arch, n=2): return torch.randn(n, arch.in_channels, arch.size, arch.size, generator=gen(1))


@pytest.fixture(scope="module")
def net_small():
    return import_genotype(PUBLISHED / "genotype_small.txt", PUBLISHED / "mask_cifar10_darts_small.npy", channels=24)

@published
def test_published_counts(net_small):
    n = counts(net_small)
    assert (n["params_total"], n["params_deployable"], n["params_nonzero"]) == (1_143_644, 704_082, 697_142)
    assert abs(n["macs"] - 137.4e6) < 0.05e6 and isinstance(n["macs"], int) and n["macs_nonzero"] < n["macs"]
    assert (n["ops"], n["convs"], n["edges"]) == (184, 108, 77)
    assert n["breakdown"] == dict(stem=2_088, preprocess_conv=136_416, preprocess_norm=1_552, op_conv=538_968,
                                  op_norm=21_208, classifier=3_850, aux_head=439_562)

@published
def test_published_table_by_cell(net_small):
    table = [(24, 18, 25, 19, .339, .759, .9678), (24, 24, 12, 8, .143, 1.0, .9601),
             (48, 36, 34, 20, .357, .755, .9886), (48, 38, 36, 18, .321, .796, .9900),
             (48, 40, 25, 17, .304, .835, .9898), (96, 72, 22, 11, .196, .750, .9834),
             (96, 64, 22, 12, .214, .669, .9876), (96, 96, 8, 3, .054, 1.0, .9969)]
    for row, (ci, width, ops, convs, conv, filt, weight) in zip(counts(net_small)["cells"], table, strict=True):
        r = row["retention"]
        assert (row["channels"], set(row["widths"]), row["ops"], row["convs"]) == (ci, {width}, ops, convs)
        assert abs(r["conv"] - conv) <= .0005 and abs(r["filter"] - filt) <= .0006
        assert abs(r["weight"] - weight) <= .00006 and r["operation"] == ops / 98
    assert [c["index"] for c in counts(net_small)["cells"] if c["reduction"]] == [2, 5]

@published
def test_published_table_by_type(net_small):
    n = counts(net_small)["by_type"]
    for name, ops, ratio, filt, weight in (("sep_conv_3x3", 31, .277, .764, .9824),
                                           ("sep_conv_5x5", 44, .393, .769, .9899),
                                           ("dil_conv_3x3", 11, .098, .796, .9823),
                                           ("dil_conv_5x5", 22, .196, .788, .9827)):
        r = n[name]
        assert r["ops"] == ops and abs(r["operation"] - ratio) <= .0006 and abs(r["filter"] - filt) <= .0006
        assert abs(r["weight"] - weight) <= .00006
    assert (n["skip_connect"]["ops"], n["max_pool_3x3"]["ops"], n["avg_pool_3x3"]["ops"]) == (19, 36, 21)

@published
@engines
def test_published_net_builds(net_small, engine, tmp_path):
    net = DerivedNet(net_small, aux=True, engine=engine())
    assert sum(p.numel() for p in net.parameters()) == 1_143_644
    assert sum(int((net.kernel(k) == 0).sum()) for k in net_small.masks) == 6_940
    logits, aux = net(images(net_small, 1).expand(2, -1, -1, -1))
    assert logits.shape == aux.shape == (2, 10)
    assert load(save(net_small, tmp_path)) == net_small


@pytest.mark.parametrize("spec", (NetSpec(4, 5, size=16), NetSpec(6, 3, size=9, in_channels=1, classes=3),
                                  NetSpec(4, 8, size=70), NetSpec(4, 4, size=8)))
def test_built_and_counted_agree(spec):
    arch = masked(random_architecture(spec, 30_000, seed=1))
    n = counts(arch)
    for aux, key in ((True, "params_total"), (False, "params_deployable")):
        assert sum(p.numel() for p in DerivedNet(arch, aux).parameters()) == n[key]
    net = DerivedNet(arch)
    assert n["params_deployable"] - sum(int((net.kernel(k) == 0).sum()) for k in arch.masks) == n["params_nonzero"]
    assert n["params_deployable"] == sum(v for k, v in n["breakdown"].items() if k != "aux_head")
    assert sum(c["params"]
               for c in n["cells"]) + n["breakdown"]["stem"] + n["breakdown"]["classifier"] == n["params_deployable"]
    json.dumps(n, allow_nan=False)

@engines
@pytest.mark.parametrize("size", (16, 15, 66))
def test_macs_are_those_of_the_executed_convolutions(size, engine, monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda: None)  # PyTorch counts its own operators only
    from torch.utils.flop_counter import FlopCounterMode
    arch = random_architecture(NetSpec(4, 5, size=size), 25_000, seed=2)
    with FlopCounterMode(display=False) as f: DerivedNet(arch, engine=engine()).eval()(images(arch, 1))
    executed = f.get_total_flops() / 2
    assert executed == counts(arch)["macs"]

@engines
def test_unequal_widths(engine):
    ops = (Op("sep_conv_3x3", 0, 2, (3, 7, 5)), Op("skip_connect", 2, 3, (5,)), Op("dil_conv_5x5", 1, 4, (4, 2)),
           Op("dil_conv_3x3", 3, 4, (5, 2)), Op("sep_conv_5x5", 4, 5, (2, 2, 9)))
    arch = Architecture("uneven", NetSpec(4, 5, 10, 16), (ArchCell(ops, (3, 4, 5, 5, 2, 9)),) * 5)
    net = DerivedNet(arch, True, engine=engine())
    assert sum(p.numel() for p in net.parameters()) == counts(arch)["params_total"]
    assert net(images(arch))[1].shape == (2, 10)

def test_forward_is_the_sum_of_its_operations():
    "A node, computed by hand from the modules."
    arch = small()
    net = DerivedNet(arch).eval()
    cell, data = net.cells[1], arch.cells[1]
    assert arch.spec.cell[1].reduction # edges from its inputs have stride 2
    with torch.no_grad():
        x0, x1 = (torch.randn(2, width, 16, 16, generator=gen(i)) for i, width in enumerate(arch.inputs(1)))
        out = cell(x0, x1, None)
        states = [cell.pre[0](x0.relu()), cell.pre[1](x1.relu())]
        for node in range(2, 6):
            total = 0
            for op, m in zip(data.ops, cell.ops, strict=True):
                if op.dst != node: continue
                x, stride, pool = states[op.src], 2 if op.src < 2 else 1, {"avg_pool_3x3": avg_pool,
                                                                           "max_pool_3x3": max_pool}.get(op.op)
                assert m.stride == stride
                total = total + (x if op.op == "skip_connect" and stride == 1
                                 else m(pool(x, stride) if pool else x.relu()))
            states.append(total)
    torch.testing.assert_close(out, torch.cat(states[2:], 1))

@pytest.mark.parametrize("size,n", [(16, 8), (16, 3), (14, 4), (9, 2)])
@pytest.mark.parametrize("drop", [0., .3])
def test_fused_is_reference(size, n, drop, monkeypatch):
    "Outputs, gradients, running statistics: op by op with PyTorch's own kernels, and the way a CPU does it."
    def run(fused):
        with monkeypatch.context() as m:
            if fused: m.setattr(DerivedCell, "forward", None)
            else: m.setattr("mgdarts.fast.discrete.fused", None)
            net = DerivedNet(arch, True, engine=FastEngine() if fused else None).double()
            net.drop_path_prob, net.drop_path_generator = drop, gen(1)
            y, aux = net(x)
            (y.square().mean() + aux.square().mean()).backward()
            return {"logits": y, "aux": aux, "eval": net.eval()(x)[0], **{k: p.grad for k, p in net.named_parameters()},
                    **dict(net.named_buffers())}
    for seed in range(3):
        arch = masked(random_architecture(NetSpec(4, 5, size=size), 25_000, seed=seed))
        x = torch.randn(n, 3, size, size, generator=gen(seed), dtype=torch.double)
        a, b = run(True), run(False)
        assert {o.op for c in arch.cells for o in c.ops} > {"sep_conv_3x3", "dil_conv_5x5", "max_pool_3x3",
                                                            "skip_connect"}
        assert all(v is not None for v in b.values())
        for k in b: torch.testing.assert_close(a[k], b[k], rtol=1e-9, atol=1e-9, msg=lambda m: f"{k}, seed {seed}: {m}")

@engines
def test_masked_weights_stay_exactly_zero(engine):
    arch = small()
    net = DerivedNet(arch, True, engine=engine())
    twin = copy.deepcopy(net) # copies keep the promise too
    for n in (net, twin):
        opt = torch.optim.SGD(n.parameters(), .05, .9, weight_decay=.01)
        for i in range(4):
            n.drop_path_prob, n.drop_path_generator = .2, gen(i)
            opt.zero_grad()
            y, aux = n(images(arch, 4))
            (y.square().mean() + aux.square().mean()).backward()
            opt.step()
        for key, m in arch.masks.items(): assert not n.kernel(key)[~m].any() and bool(n.kernel(key)[m].all())
    assert all(a.equal(b) for a, b in zip(net.state_dict().values(), twin.state_dict().values()))

def test_loaded_weights_are_masked():
    arch = small()
    whole = DerivedNet(replace(arch, masks={}))
    net = DerivedNet(arch, seed=5)
    net.load_state_dict(whole.state_dict())
    for key, m in arch.masks.items():
        assert not net.kernel(key)[~m].any() and net.kernel(key)[m].equal(whole.kernel(key)[m])

def test_weights_depend_on_the_seed_alone():
    arch = small()
    a = DerivedNet(arch, True, seed=1).state_dict()
    torch.rand(7)
    b, c, d = (DerivedNet(arch, aux, seed=n).state_dict() for aux, n in ((True, 1), (True, 2), (False, 1)))
    assert all(a[k].equal(b[k]) for k in a) and not a["classifier.weight"].equal(c["classifier.weight"])
    assert all(a[k].equal(d[k]) for k in d)

@engines
def test_drop_path(engine):
    arch = small()
    net = DerivedNet(arch, engine=engine())
    x = images(arch)
    net.drop_path_prob = .5
    with pytest.raises(RuntimeError): net(x)
    def run(seed):
        net.drop_path_generator = gen(seed)
        return net(x)[0]
    assert run(0).equal(run(0)) and not run(0).equal(run(1))
    net.eval()
    net.drop_path_generator = None
    net(x)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2 ** 31), target=st.integers(15_000, 400_000), cells=st.integers(3, 8))
def test_random_architecture(seed, target, cells):
    spec = NetSpec(8, cells, size=16)
    arch = random_architecture(spec, target, seed)
    n = counts(arch)
    assert n["params_nonzero"] <= target and arch.spec == replace(spec, stem="cifar")
    assert arch == random_architecture(spec, target, seed)
    if n["ops"] < 98 * cells: assert n["params_nonzero"] >= .99 * target
    assert all({op.dst for op in c.ops} == {2, 3, 4, 5} and len(set(c.widths)) == 1 and c.widths[0] % 2 == 0
               for c in arch.cells)

def test_random_architecture_at_the_ends_of_the_space():
    spec = NetSpec(8, 4, size=16)
    with pytest.raises(InputError, match="smallest"): random_architecture(spec, 500)
    large, few = (counts(random_architecture(spec, n))["params_deployable"] for n in (10 ** 8, 50_000))
    assert .9 * large > few


def test_round_trip(tmp_path):
    arch = replace(small(), provenance={"b": [1, 2.5, None], "a": "ä"})
    path = save(arch, tmp_path / "x" / "y")
    assert load(path) == arch == load(path.parent) and fingerprint(load(path)) == fingerprint(arch)
    before = path.read_bytes(), (path.parent / "masks.safetensors").read_bytes()
    with pytest.raises(InputError, match="already"): save(arch, path.parent)
    save(arch, path.parent, overwrite=True)
    assert before == (path.read_bytes(), (path.parent / "masks.safetensors").read_bytes())
    bare = replace(arch, masks={})
    assert load(save(bare, path.parent, overwrite=True)) == bare != arch
    assert sorted(os.listdir(path.parent)) == ["architecture.json", "masks.safetensors"]

def test_equality_sees_every_part():
    arch = small()
    key = next(iter(arch.masks))
    other = arch.masks[key].clone()
    other.view(-1)[0] ^= True
    specs = [dict(spec=replace(arch.spec, **c)) for c in (dict(size=32), dict(classes=3), dict(channels=5),
                                                          dict(in_channels=1), dict(stem="imagenet"))]
    changes = (dict(name="b"), *specs, dict(masks={**arch.masks, key: other}), dict(masks={}),
               dict(provenance={"x": 1}), dict(cells=arch.cells[1:]))
    for c in changes:
        try: assert replace(arch, **c) != arch and fingerprint(replace(arch, **c)) != fingerprint(arch)
        except InputError: assert "cells" in c
    without = {k: m for k, m in arch.masks.items() if k != key}
    assert replace(arch, masks={**without, key: torch.ones_like(other)}) == replace(arch, masks=without)

def damage(path, change):
    "Change an architecture by hand, which takes its checksum away."
    d = json.loads(path.read_text())
    d.pop("sha256", None)
    change(d)
    path.write_text(json.dumps(d))

def test_a_changed_file_is_noticed_and_one_without_a_checksum_is_read(tmp_path):
    path = save(small(), tmp_path)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"name": "another"}))
    with pytest.raises(InputError, match="remove its sha256"): load(path)
    damage(path, lambda d: None)
    assert load(path).name == "another"
    damage(path, lambda d: d.update(schema=1)) # as the first version wrote it
    assert load(path).name == "another"

@pytest.mark.parametrize("change", (
    lambda d: d.update(schema=99), lambda d: d.update(schema="1"), lambda d: d.update(schema=True),
    lambda d: d.pop("cells"), lambda d: d.pop("schema"), lambda d: d.update(extra=1),
    lambda d: d.update(cells={}), lambda d: d.update(cells=[]), lambda d: d.update(cells=d["cells"] * 20),
    lambda d: d.update(cells=[1, 2, 3]), lambda d: d.update(name=""), lambda d: d.update(name=3),
    lambda d: d.update(channels=2.5), lambda d: d.update(channels=10 ** 9), lambda d: d.update(classes=0),
    lambda d: d.update(size=-4), lambda d: d.update(size=10 ** 7), lambda d: d.update(stem="huge"),
    lambda d: d.update(in_channels=None), lambda d: d.update(provenance=[]), lambda d: d.update(masks_sha256="0" * 64),
    lambda d: d.update(masks_sha256=None), lambda d: d.update(masks="../x"),
    lambda d: d["cells"][0]["ops"][0].__setitem__(0, "conv_9x9"),
    lambda d: d["cells"][0]["ops"][0].__setitem__(0, ["x"]),
    lambda d: d["cells"][0]["ops"][0].__setitem__(0, "irb_3x3"),
    lambda d: d["cells"][0]["ops"][0].__setitem__(1, 5), lambda d: d["cells"][0]["ops"][0].__setitem__(1, -1),
    lambda d: d["cells"][0]["ops"][0].__setitem__(2, 7), lambda d: d["cells"][0]["ops"][0].__setitem__(2, "3"),
    lambda d: d["cells"][0]["ops"][0].__setitem__(3, [1] * 9), lambda d: d["cells"][0]["ops"][0].__setitem__(3, "abc"),
    lambda d: d["cells"][0]["ops"][0].__setitem__(3, 4), lambda d: d["cells"][0]["ops"][0].append(1),
    lambda d: d["cells"][0].update(ops=[]), lambda d: d["cells"][0].update(ops=d["cells"][0]["ops"][::-1]),
    lambda d: d["cells"][0].update(ops=d["cells"][0]["ops"][:1] + d["cells"][0]["ops"]),
    lambda d: d["cells"][0].update(widths=[4] * 5), lambda d: d["cells"][0].update(widths=[10 ** 8] * 6),
    lambda d: d["cells"][0].update(widths=None), lambda d: d["cells"][0].update(widths=["4"] * 6),
    lambda d: d["cells"][0].update(other=1)))
def test_damaged_files_are_refused_in_one_line(tmp_path, change):
    path = save(small(), tmp_path)
    damage(path, change)
    with pytest.raises(InputError) as e: load(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400

@pytest.mark.parametrize("text", ("", "{", "[]", "null", "NaN", "[" * 100_000, '{"schema": NaN}', '{"schema": 1e999}',
                                  '{"schema": ' + "9" * 5000 + "}", "\x00\xff"))
def test_not_json(tmp_path, text):
    (tmp_path / "architecture.json").write_text(text)
    with pytest.raises(InputError): load(tmp_path)

def test_damaged_masks_are_refused(tmp_path):
    from safetensors.torch import save as pack
    import hashlib
    arch = small()
    path = save(arch, tmp_path)
    file = tmp_path / "masks.safetensors"
    key = next(iter(arch.masks))
    def put(raw, fix=True):
        file.write_bytes(raw)
        if fix: damage(path, lambda d: d.update(masks_sha256=hashlib.sha256(raw).hexdigest()))
        with pytest.raises(InputError): load(path)
    raw = file.read_bytes()
    put(raw[:-1], fix=False)
    put(raw[:20])
    put(b"")
    put(b"\xff" * 64)
    put(pack({key: arch.masks[key].float()}))
    put(pack({key: arch.masks[key][:, :, :1].contiguous()}))
    put(pack({"c99.o0.dw": arch.masks[key]}))
    put(pack({"../../x": arch.masks[key]}))
    file.unlink()
    with pytest.raises(InputError, match="no file"): load(path)
    for odd in (tmp_path / "absent", "\0", tmp_path / "masks.safetensors"):
        with pytest.raises(InputError): load(odd)

def test_too_large_is_refused_before_anything_is_built():
    w = 4096
    ops = tuple(Op("sep_conv_3x3", 0, n, (w,) * 3) for n in range(2, 6))
    with pytest.raises(InputError, match="weights"): Architecture("big", NetSpec(4, 8), (ArchCell(ops, (w,) * 6),) * 8)

def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    arch = small()
    path = save(arch, tmp_path)
    before = path.read_bytes()
    def fail(*a): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError): save(replace(arch, name="other"), tmp_path, overwrite=True)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["architecture.json", "masks.safetensors"]


CELL = ("[('sep_conv_3x3', 0, 2, [4, 6, 4]), ('skip_connect', 1, 3, [4]), ('dil_conv_5x5', 0, 4, [4, 4]), "
        "('max_pool_3x3', 4, 5, [4])]")
GOOD = f"Mine = Genotype(gene=[{CELL}, {CELL}, {CELL}], concat=range(2, 6))"

def genotype(tmp_path, text, **kw):
    (tmp_path / "g.txt").write_text(text)
    return import_genotype(tmp_path / "g.txt", **{"channels": 6, **kw})

def test_genotype(tmp_path):
    arch = genotype(tmp_path, "from collections import namedtuple\nGenotype = namedtuple('Genotype', 'gene concat')\n"
                    + GOOD)
    for other in (GOOD.replace("range(2, 6)", "[2, 3, 4, 5]"), GOOD.replace(", concat=range(2, 6)", "")):
        assert genotype(tmp_path, other).cells == arch.cells
    assert arch.cells[0].ops[0] == Op("sep_conv_3x3", 0, 2, (4, 6, 4)) and counts(arch)["ops"] == 12
    two = GOOD + "\n" + GOOD.replace("Mine", "Other")
    assert genotype(tmp_path, two, name="Other").name == "Other"
    with pytest.raises(InputError, match="Mine, Other"): genotype(tmp_path, two)
    with pytest.raises(InputError, match="Other"): genotype(tmp_path, two, name="Othr")

def test_state_nobody_uses_keeps_the_cell_width(tmp_path):
    cell = ("[('sep_conv_3x3', 0, 2, [4, 4, 4]), ('skip_connect', 0, 3, [4]), ('skip_connect', 0, 4, [4]), "
            "('skip_connect', 0, 5, [4])]")
    arch = genotype(tmp_path, f"A = Genotype(gene=[{cell}, {cell}, {cell}], concat=range(2, 6))")
    assert [c.widths[1] for c in arch.cells] == [6, 12, 24] and arch.cells[0].widths[0] == 4

@pytest.mark.parametrize("text", ("", "hello world", "x = 1", "import os", "Mine = Genotype()",
                                  "Mine = Genotype(gene=__import__('os').system('true'), concat=range(2, 6))",
                                  "(" * 5000, "Mine = " + "[" * 3000,
    GOOD.replace("range(2, 6)", "range(1, 6)"), GOOD.replace("range(2, 6)", "open('x')"),
    GOOD.replace("concat", "other"), GOOD.replace("Genotype(", "Phenotype("), "\0",
    GOOD.replace("'skip_connect'", "'none'"), GOOD.replace("1, 3, [4]", "0, 3, [5]"),
    GOOD.replace("1, 3, [4]", "3, 3, [4]"), GOOD.replace("1, 3, [4]", "1, 9, [4]"),
    GOOD.replace("1, 3, [4]", "1, 3, []"),
    GOOD.replace("1, 3, [4]", "1, 3, [-4]"), GOOD.replace("[4, 6, 4]", "[4, 4]"),
    GOOD.replace("[4, 6, 4]", "[4, 10**9, 4]"), GOOD.replace("[4, 6, 4]", "[4, 999999999, 4]"),
    GOOD.replace("1, 3, [4]", "1, 3"), GOOD.replace("1, 3, [4]", "1, 3, 'ab'"),
    GOOD.replace("1, 3, [4]", "1, 3, [[4]]"), GOOD.replace("1, 3, [4]", "[1], 3, [4]"),
    "Mine = Genotype(gene=[], concat=range(2, 6))", "Mine = Genotype(gene=[[], [], []], concat=range(2, 6))",
    "Mine = Genotype(gene=3, concat=range(2, 6))", GOOD.replace("('skip_connect', 1, 3, [4]), ", "")))
def test_not_a_genotype(tmp_path, text):
    with pytest.raises(InputError) as e: genotype(tmp_path, text)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400

def test_genotype_files_that_are_none(tmp_path):
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00" * 9)
    for bad in ("b", "absent", "."):
        with pytest.raises(InputError): import_genotype(tmp_path / bad, channels=6)
    (tmp_path / "large").write_text("#" * (2 << 20))
    with pytest.raises(InputError, match="large"): import_genotype(tmp_path / "large", channels=6)

def kernel_shapes(op):
    "Shapes of the kernels of a convolution, in the authors' order; of other operations none."
    kind, w, k = op.op[:3], op.widths, int(op.op[-1]) if op.op[-1].isdigit() else 0
    if kind == "sep": return (w[0], 1, k, k), (w[1], w[0], 1, 1), (w[1], 1, k, k), (w[2], w[1], 1, 1)
    return ((w[0], 1, k, k), (w[1], w[0], 1, 1)) if kind == "dil" else ()

def mask_list(arch): return [[[torch.ones(s) for s in kernel_shapes(op)] for op in c.ops] for c in arch.cells]

def test_genotype_masks(tmp_path):
    arch = genotype(tmp_path, GOOD)
    file = tmp_path / "m.npy"
    def read(masks):
        torch.save(masks, file)
        return genotype(tmp_path, GOOD, masks_path=file)
    good = mask_list(arch)
    good[1][0][1].view(-1)[:3] = 0
    got = read(good)
    assert list(got.masks) == ["c1.o0.pw1"] and counts(got)["params_nonzero"] == counts(got)["params_deployable"] - 3
    def broken(change):
        m = mask_list(arch)
        change(m)
        with pytest.raises(InputError) as e: read(m)
        assert "\n" not in str(e.value)
    broken(lambda m: m.pop())
    broken(lambda m: m[0].pop())
    broken(lambda m: m[0][0].pop())
    broken(lambda m: m[0][0].__setitem__(0, torch.ones(2)))
    broken(lambda m: m[0][0].__setitem__(0, "x"))
    broken(lambda m: m[0][0][0].fill_(.5))
    broken(lambda m: m[0][0][0].fill_(float("nan")))
    broken(lambda m: m.__setitem__(0, 3))
    broken(lambda m: m[0].__setitem__(0, None))
    for raw in (b"", b"hello", b"PK\x03\x04" + b"\0" * 40, torch.zeros(3)):
        if isinstance(raw, bytes): file.write_bytes(raw)
        else: torch.save(raw, file)
        with pytest.raises(InputError): genotype(tmp_path, GOOD, masks_path=file)

@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_mask_file_with_code_is_not_run(tmp_path):
    import pickle
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "owned"),)
    (tmp_path / "m.npy").write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), tmp_path / "n.npy")
    for name in ("m.npy", "n.npy"):
        with pytest.raises(InputError): genotype(tmp_path, GOOD, masks_path=tmp_path / name)
    assert not (tmp_path / "owned").exists()

def test_genotype_in_another_order_is_sorted_with_its_masks(tmp_path):
    arch = genotype(tmp_path, GOOD)
    turned = CELL.replace("('sep_conv_3x3', 0, 2, [4, 6, 4]), ", "")[:-1] + ", ('sep_conv_3x3', 0, 2, [4, 6, 4])]"
    masks = mask_list(arch)
    masks[0][0][0].view(-1)[0] = 0
    masks = [m[1:] + m[:1] for m in masks]
    torch.save(masks, tmp_path / "m.npy")
    got = genotype(tmp_path, f"Mine = Genotype(gene=[{turned}, {turned}, {turned}], concat=range(2, 6))",
                   masks_path=tmp_path / "m.npy")
    assert got.cells == arch.cells and list(got.masks) == ["c0.o0.dw1"]


@pytest.mark.parametrize("seed", range(6))
def test_a_width_is_fitted_to_the_target(seed):
    arch = random_architecture(NetSpec(6, 3 + seed, size=16), 20_000 + 4_000 * seed, seed)
    least = count(at_width(arch, 2)).params
    for target in (1_000, least + 400, 30_000, 120_000):
        found = fitted(arch, target)
        n, widths = count(found).params, [c.widths[0] for c in found.cells]
        assert min(widths) >= 2 and all(a <= b for a, b in zip(widths, widths[1:]))
        assert n == least if target < least else 0.97 * target <= n <= target
        if target >= 30_000:
            assert n >= 0.99 * target
            shares = [w / c.width for w, c in zip(widths, found.spec.cell)]
            assert max(shares) - min(shares) <= 1 / min(c.width for c in found.spec.cell) + 1e-9  # in proportion
