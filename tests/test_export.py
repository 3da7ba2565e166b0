"What is exported computes the same where mgdarts cannot be imported; what cannot be written is refused in one line."
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mgdarts.base.files import Checkpoints
from mgdarts.base.options import InputError
from mgdarts.cli.main import main
from mgdarts.methods.registry import preset
from mgdarts.net import files as architecture
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.sample import random_architecture
from mgdarts.runs import export, run as runs
from mgdarts.space.darts import NetSpec
from mgdarts.views.theme import empty
from mgdarts.views.save import save_figure

SPECS = {"cifar": (NetSpec(8, 6, size=16), 60_000), "odd sides, one channel": (NetSpec(6, 3, 7, 15, 1), 30_000),
         "imagenet": (NetSpec(8, 3, 5, 72), 50_000)}
SMALL = {"data.subset": 200, "search.warmup": 0, "search.max_epochs": 1, "search.prune_every": 1, "search.batch": 50,
         "train.epochs": 1, "train.aux_weight": 0.4}


def masked(spec, target, seed=0):
    arch, g = random_architecture(spec, target, seed), torch.Generator().manual_seed(seed)
    return replace(arch, masks={k: torch.rand(s, generator=g) < 0.8 for k, s in arch.mask_shapes().items()})


@torch.no_grad()
def lively(arch):
    "Our network after a look at random images: running statistics and affine weights are not those of a fresh one."
    torch.manual_seed(1)
    net = DerivedNet(arch)
    for name, p in net.named_parameters():
        if "norm" in name:
            p.add_(0.2 * torch.randn_like(p))
    net.train()
    for _ in range(3):
        net(torch.randn(8, arch.in_channels, arch.size, arch.size))
    return net.eval()


OUTSIDE = """
import sys
sys.modules["mgdarts"] = None
sys.path[:] = [p for p in sys.path if p and "mgdarts" not in p]
sys.path.insert(0, sys.argv[1])
import torch
from net import Net
given = torch.load(sys.argv[1] + "/given.pt", weights_only=True)
net = Net().eval()
net.load_state_dict(given["state"])
loaded = sorted(m for m in sys.modules if m.split(".")[0] == "mgdarts")
torch.save({"y": net(given["x"]).detach(), "loaded": loaded}, sys.argv[1] + "/out.pt")
"""


@pytest.mark.parametrize("which", SPECS)
def test_the_python_file_computes_the_same_without_this_package(which, tmp_path):
    arch = masked(*SPECS[which])
    architecture.save(arch, tmp_path / "A")
    done = export.export_arch(tmp_path / "A", "python", tmp_path / "net.py")
    assert done["files"] == [str(tmp_path / "net.py")]
    assert "import mgdarts" not in (tmp_path / "net.py").read_text("utf-8")
    net, x = lively(arch), torch.randn(4, arch.in_channels, arch.size, arch.size)
    with torch.no_grad():
        want = net(x)[0]
    torch.save({"state": net.state_dict(), "x": x}, tmp_path / "given.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", OUTSIDE, str(tmp_path)], check=True, cwd=tmp_path, env=env)
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert got["loaded"] == ["mgdarts"] and (got["y"] - want).abs().max() <= 1e-6 * want.abs().max().clamp(min=1)


def test_pruned_weights_stay_away_and_strangers_cannot_bring_them_back():
    arch = masked(*SPECS["cifar"])
    net = export.plain_net(arch)
    state = {k: v + 1 if v.is_floating_point() else v for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    sgd = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
    for _ in range(2):
        sgd.zero_grad()
        net(torch.randn(4, 3, 16, 16)).square().mean().backward()
        sgd.step()
    total = 0
    for key, m in arch.masks.items():
        c, o, role = key.split(".")
        w = net.get_parameter(f"cells.{c[1:]}.ops.{o[1:]}.{role}")
        total += int((~m).sum())
        assert not w[~m].any()
    assert total > 1000 and sum(int(d.sum()) for d in net.pruned.values()) == total


def test_names_cannot_break_out_of_the_source():
    arch = replace(random_architecture(NetSpec(4, 3, size=8), 9_000), name='x"""\nimport os; os.abort()\n"""')
    source = export.to_python(arch, 'a"; b')
    assert "os.abort()" not in source and "@" not in source.replace("@torch", "")
    compile(source, "net.py", "exec")


def runtime(path):
    "A function that runs an ONNX graph: onnxruntime where it is installed, else the reference evaluator."
    try:
        import onnxruntime
        session = onnxruntime.InferenceSession(str(path))
    except ImportError:
        from onnx.reference import ReferenceEvaluator
        session = ReferenceEvaluator(str(path))
    return lambda x: torch.as_tensor(session.run(None, {"images": x.numpy()})[0])


def test_the_onnx_graph_computes_the_same_for_any_batch(tmp_path):
    pytest.importorskip("onnx", reason="the extra 'export' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    arch = masked(NetSpec(4, 3, 5, 9), 9_000)
    architecture.save(arch, tmp_path / "A")
    done = export.export_arch(tmp_path / "A", "onnx", tmp_path / "net.onnx")
    assert [p.name for p in tmp_path.glob("net*")] == ["net.onnx"]
    assert done["bytes"] == (tmp_path / "net.onnx").stat().st_size
    net, run = DerivedNet(arch).eval(), runtime(tmp_path / "net.onnx")
    for n in (1, 3):
        x = torch.randn(n, 3, 9, 9)
        with torch.no_grad():
            assert (run(x) - net(x)[0]).abs().max() < 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    runs.search(preset("smoke", **SMALL), out)
    return out


def test_trained_weights_go_along(run, tmp_path, capsys):
    def out(name): return ["--out", str(tmp_path / name)]
    assert main(["arch", "export", str(run), "--format", "torch", "--weights", "train", *out("net.pt")]) == 2
    assert "no finished training" in capsys.readouterr().err
    runs.retrain(run)
    saved = Checkpoints(run / "train/checkpoint").load()["net"]
    for source, name in ((run, "net"), (run / "train", "same")):
        assert main(["arch", "export", str(source), "--format", "torch", *out(f"{name}.pt"), "--json"]) == 0
        done = json.loads(capsys.readouterr().out)
        assert done["weights"] == "train" and done["max_difference"] < 1e-5
        assert sorted(map(os.path.basename, done["files"])) == [f"{name}.pt", f"{name}.py"]
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert state.keys() == {k for k in saved if not k.startswith("aux.")}
        assert all(v.equal(saved[k]) for k, v in state.items())
    arch = architecture.load(run)
    export.plain_net(arch).load_state_dict(state)
    assert main(["arch", "export", str(run), "--weights", "none", *out("bare.py"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "none" and not (tmp_path / "bare.pt").exists()
    assert main(["arch", "export", str(run), "--format", "python", *out("full.py")]) == 0
    assert (tmp_path / "full.pt").exists()


def test_json_can_be_read_back(run, tmp_path):
    export.export_arch(run, "json", tmp_path / "found.json")
    assert architecture.load(tmp_path / "found.json") == architecture.load(run)


@pytest.mark.parametrize("args, word", [
    (["--format", "tflite", "--out", "x.tflite"], "tflite"), (["--out", "x.onnx"], ".py"),
    (["--out", "no/x.py"], "no folder"), (["--weights", "best", "--out", "x.py"], "best"),
    (["--format", "json", "--weights", "train", "--out", "x.json"], "json"), (["--out", "there.py"], "exists")])
def test_bad_input(run, args, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.py").write_text("mine")
    assert main(["arch", "export", str(run), *args]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and word in err and [p.name for p in tmp_path.iterdir()] == ["there.py"]


def test_missing_packages_are_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["arch", "export", str(run), "--format", "onnx", "--out", str(tmp_path / "x.onnx")]) == 2
    assert "mgdarts[export]" in capsys.readouterr().err and not list(tmp_path.iterdir())
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="kaleido"):
        save_figure(empty("x"), tmp_path / "x.png")


def test_figures_as_files(tmp_path, monkeypatch):
    fig = empty("nothing yet")
    page = save_figure(fig, tmp_path / "a.html")
    assert page.stat().st_size > 4e6 and "nothing yet" in page.read_text("utf-8")
    for bad in ("a.bmp", "a", "no/a.png"):
        with pytest.raises(InputError):
            save_figure(fig, tmp_path / bad)
    pytest.importorskip("kaleido", reason="the extra 'export' is not installed")
    try:
        svg = save_figure(fig, tmp_path / "a.svg")
    except InputError as e:
        assert "Chromium" in str(e)
        pytest.skip("there is no Chromium to draw pictures with")
    assert svg.read_text("utf-8").startswith("<svg") and "nothing yet" in svg.read_text("utf-8")
    assert save_figure(fig, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert fig.layout.paper_bgcolor == "rgba(0,0,0,0)"  # the figure itself keeps its look
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="Chromium"):
        save_figure(fig, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()
