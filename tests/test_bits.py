"The same bits: what is set and taken back, what a run says it used, and a retraining that does what it is told."
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from mgdarts.base.data import load_data
from mgdarts.base.options import Compute, InputError
from mgdarts.cli.main import main
from mgdarts.fast.engine import FastEngine
from mgdarts.methods.registry import preset
from mgdarts.net.engine import Engine
from mgdarts.net.sample import random_architecture
from mgdarts.runs import bits, folder, make, run as runs
from mgdarts.runs.bits import PROCESS, WORKSPACE, flags, held
from mgdarts.runs.folder import device_of, environment, read_record
from mgdarts.runs.make import make_trainer, net_spec
from mgdarts.views.report import machines

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAST = {"data.subset": 200, "search.warmup": 1, "search.max_epochs": 2, "train.epochs": 2, "search.batch": 32}


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    "Whatever a test does, PyTorch is told nothing new after it."
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = flags()
    yield
    assert flags() == before and not PROCESS.holders
    os.environ.pop(WORKSPACE, None)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    "Runs hold what they would on a GPU, and are computed on the CPU. Returns the flags that each epoch saw."
    monkeypatch.setattr(runs, "device_of", lambda cfg: CUDA)
    monkeypatch.setattr(runs, "load_data", lambda cfg, seed, device: load_data(cfg, seed))
    seen = []
    def watch(event):
        if event.type != "written": seen.append(flags())  # it is over then
    return seen, watch


def a_card(monkeypatch, name="NVIDIA A40", cuda="12.8", cudnn=91002, driver="570.86.15"):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    real = bits.said
    monkeypatch.setattr(bits, "said", lambda *c: driver if c[0] == "nvidia-smi" else real(*c))


def what(path):
    events = [{k: v for k, v in json.loads(line).items() if k != "time"}
              for line in (path / "events.jsonl").read_text().splitlines()]
    return events, (path / "architecture.json").read_bytes(), (path / "masks.safetensors").read_bytes()


def test_a_search_and_its_retraining_are_the_same_with_and_without(tmp_path, as_on_a_gpu):
    "On a CPU by the knob alone, and with all that it sets on a GPU."
    seen, watch = as_on_a_gpu
    with pytest.MonkeyPatch.context() as here:
        here.setattr(runs, "device_of", device_of)
        for name, on in (("plain", False), ("asked", True)):
            runs.search(preset("smoke", **FAST, **{"compute.deterministic": on}), tmp_path / name, listeners=(watch,))
            runs.retrain(tmp_path / name, listeners=(watch,))
    assert set(seen) == {flags()}
    seen.clear()
    runs.search(preset("smoke", **FAST, **{"compute.deterministic": True}), tmp_path / "set", listeners=(watch,))
    runs.retrain(tmp_path / "set", listeners=(watch,))
    assert {(f.deterministic, f.benchmark, f.fill) for f in seen} == {(2, False, False)}
    plain = what(tmp_path / "plain")
    for name in ("asked", "set"):
        assert what(tmp_path / name) == plain
        assert what(tmp_path / name / "train") == what(tmp_path / "plain/train")


def test_settings_are_taken_back_whatever_happens(tmp_path, as_on_a_gpu):
    seen, watch = as_on_a_gpu
    torch.backends.cudnn.benchmark = True
    try:
        before = flags()
        def stop(event): raise KeyboardInterrupt
        cfg = preset("smoke", **FAST, **{"compute.deterministic": True, "compute.tf32": True})
        with pytest.raises(KeyboardInterrupt): runs.search(cfg, tmp_path / "a", listeners=(watch, stop))
        assert flags() == before and seen[0] != before
        assert (seen[0].tf32, seen[0].benchmark, seen[0].deterministic) == ((True, True), False, 2)
        assert os.environ[WORKSPACE] == ":4096:8"
        with held(Compute(deterministic=True, tf32=True), CPU): assert flags() == before
    finally: torch.backends.cudnn.benchmark = False


def test_the_users_own_choice_is_kept():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with held(Compute(), CUDA): assert flags().deterministic == 1
        with held(Compute(deterministic=True), CUDA): assert flags().deterministic == 2
        assert flags().deterministic == 1
    finally: torch.use_deterministic_algorithms(False)


def test_runs_side_by_side_ask_for_the_same():
    with held(Compute(deterministic=True), CUDA):
        with pytest.raises(InputError, match="deterministic=true: wait for its end"):
            with held(Compute(), CUDA): raise AssertionError
        with held(Compute(deterministic=True), CUDA): pass
        assert flags().deterministic == 2
        PROCESS.by_hand(Compute(tf32=True), CUDA)  # who only looks changes nothing for a run at work
        assert flags().tf32 == (False, False)


def test_stepped_by_hand_tf32_is_as_the_configuration_says(monkeypatch):
    before = flags()
    monkeypatch.setattr(make, "device_of", lambda cfg: CUDA)
    cfg = preset("smoke", **FAST, **{"compute.tf32": True})
    try:
        with pytest.raises((RuntimeError, AssertionError)):  # there is no GPU, but it has been set by then
            splits = load_data(cfg.data, cfg.seed)
            make_trainer(cfg, random_architecture(net_spec(cfg, splits), 8_000, 0), splits)
            raise AssertionError
        assert flags().tf32 == (True, True)
    finally: before.set()


def test_an_operation_without_a_deterministic_form_ends_with_2(tmp_path, as_on_a_gpu, monkeypatch, capsys):
    def step(search):
        raise RuntimeError("histc_cuda does not have a deterministic implementation, but you set "
                           "'torch.use_deterministic_algorithms(True)'. You can turn off determinism ...")
    monkeypatch.setattr("mgdarts.search.loop.optimise", step)
    args = ["search", "--set", "compute.deterministic=true", "--set", "data.subset=200", "--out", str(tmp_path / "a")]
    assert main(args) == 2
    *_, said = capsys.readouterr().err.strip().splitlines()  # after the bar
    assert said == ("mgdarts: histc_cuda has no deterministic form on cuda: start again with "
                    "compute.deterministic=false, or device=cpu")


def test_too_late_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(InputError, match=f"{WORKSPACE}=:4096:8"):
        with held(Compute(deterministic=True), CUDA): raise AssertionError
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with held(Compute(deterministic=True), CUDA): assert os.environ[WORKSPACE] == ":16:8"


def test_cublas_is_told_before_images_go_to_the_gpu(monkeypatch):
    a_card(monkeypatch)
    assert device_of(preset("smoke")).type == "cuda" and WORKSPACE not in os.environ
    assert device_of(preset("smoke", device="cpu", **{"compute.deterministic": True})).type == "cpu"
    assert WORKSPACE not in os.environ
    device_of(preset("smoke", **{"compute.deterministic": True}))
    assert os.environ[WORKSPACE] == ":4096:8"


def test_the_record_names_the_card_and_the_numbers(monkeypatch):
    a_card(monkeypatch)
    cfg = preset("smoke", **{"compute.tf32": True, "compute.amp": True, "compute.deterministic": True})
    with held(cfg.compute, CUDA): found = environment(CUDA, cfg)
    assert found.items() >= {"device": "cuda", "device_name": "NVIDIA A40", "driver": "570.86.15", "cuda": "12.8",
                             "cudnn": 91002, "tf32_matmul": True, "tf32_cudnn": True, "bf16": True,
                             "deterministic": True, "kernels": "grouped"}.items()
    with held(Compute(), CUDA): plain = environment(CUDA, preset("smoke"))
    assert not any(plain[k] for k in ("tf32_matmul", "tf32_cudnn", "bf16", "deterministic"))
    here = environment(CPU, preset("smoke"))
    assert here["deterministic"] and not here["bf16"] and "cuda" not in here and "driver" not in here
    json.dumps(found)


@pytest.mark.parametrize("settings, device, search, train", [
    ({}, CUDA, "grouped", "torch"), ({"compute.impl": "reference"}, CUDA, "torch", "torch"),
    ({"compute.compile": True}, CUDA, "torch", "torch"), ({"space.kind": "mobilenet"}, CUDA, "torch", "torch"),
    ({"method": "pc-darts"}, CUDA, "torch", "torch"), ({"compute.amp": True}, CPU, "grouped", "torch"),
    ({"compute.impl": "reference"}, CPU, "torch", "torch"), ({}, CPU, "compiled", "compiled"),
    ({"compute.compile": True}, CPU, "torch", "compiled")])
def test_kernels(settings, device, search, train, monkeypatch):
    monkeypatch.setattr(bits, "kernels_in_use", lambda kind: "compiled")
    cfg = preset("smoke", **settings)
    assert (bits.kernels(cfg, device), bits.kernels(cfg, device, True)) == (search, train)


@pytest.fixture
def cut(tmp_path):
    "A search that was stopped, as if it had been on a card."
    def stop(event):
        if event.type == "epoch" and event.epoch == 1: raise KeyboardInterrupt
    cfg = preset("smoke", **FAST)
    with pytest.raises(KeyboardInterrupt): runs.search(cfg, tmp_path / "run", listeners=(stop,), save_every=0)
    return tmp_path / "run"


def test_what_each_part_used(cut, monkeypatch, recwarn):
    real = folder.environment
    def on(**changes): monkeypatch.setattr(runs, "environment", lambda *what: {**real(*what), **changes})
    first = (cut / "config.json").read_bytes()
    def again(**changes):
        left = iter((True, False))  # an epoch's states are saved before the next one stops it
        def stop(event):
            if event.type == "epoch" and not next(left): raise KeyboardInterrupt
        on(**changes)
        recwarn.clear()
        with pytest.raises(KeyboardInterrupt): runs.search(None, cut, resume=True, listeners=(stop,), save_every=0)
        return [str(w.message) for w in recwarn]
    assert again() == [] and (cut / "config.json").read_bytes() == first
    said, = again(device="cuda", device_name="NVIDIA A40", cuda="12.8", threads=9)
    before = read_record(cut)["environment"]
    assert f"was begun with device cpu, now cuda; device_name {before['device_name']}, now NVIDIA A40" in said
    assert f"threads {before['threads']}, now 9: it goes on, but not to the same last bits" in said
    one, = read_record(cut)["parts"]
    assert one["environment"]["cuda"] == "12.8" and one["step"] > 0 and one["epoch"] >= 1
    assert "from step" in machines(read_record(cut)) and read_record(cut)["environment"] == before
    said, = again(device="cuda", device_name="NVIDIA H100", cuda="12.8", threads=9)
    assert f"{cut} went on with device_name NVIDIA A40, now NVIDIA H100: it goes on" in said
    assert again(device="cuda", device_name="NVIDIA H100", cuda="12.8", threads=9) == []
    on()
    with pytest.warns(UserWarning, match="device_name NVIDIA H100, now"): runs.search(None, cut, resume=True)
    steps = [p["step"] for p in read_record(cut)["parts"]]
    assert len(steps) == 3 and steps == sorted(set(steps))
    assert read_record(cut)["parts"][-1]["environment"]["device"] == "cpu"


def test_a_part_that_left_nothing_is_forgotten(tmp_path, monkeypatch):
    now = environment(CPU, preset("smoke"))
    other = {**now, "device_name": "another"}
    runs.write_json(tmp_path / "config.json", {"environment": now})
    def parts(): return [(p["step"], p["environment"]["device_name"]) for p in
                         runs.read_json(tmp_path / "config.json", "it").get("parts", [])]
    with pytest.warns(UserWarning, match="was begun"): runs.go_on(tmp_path, other, 1, 10)
    assert parts() == [(10, "another")]
    runs.go_on(tmp_path, other, 2, 20)
    assert parts() == [(10, "another")]
    with pytest.warns(UserWarning, match="went on"): runs.go_on(tmp_path, now, 2, 20)
    assert parts() == [(10, "another"), (20, now["device_name"])]
    runs.go_on(tmp_path, other, 2, 20)  # nothing was saved since then
    assert parts() == [(10, "another")]
    runs.go_on(tmp_path, now, 1, 10)
    assert parts() == []


def test_records_from_before_go_on_without_a_word(tmp_path, recwarn):
    "They name fewer things, and the kernels that there were, whoever computed."
    cfg = preset("smoke", **{"compute.impl": "reference"})
    old = {k: v for k, v in environment(CPU).items()}
    assert "bf16" not in old
    runs.write_json(tmp_path / "config.json", {"environment": old})
    before = (tmp_path / "config.json").read_bytes()
    runs.go_on(tmp_path, environment(CPU, cfg), 1, 10)
    assert not recwarn.list and (tmp_path / "config.json").read_bytes() == before


# retraining
def trainer(**settings):
    cfg = preset("smoke", **{**FAST, "train.aux_weight": .4, "train.drop_path": .2, **settings})
    splits = load_data(cfg.data, cfg.seed)
    return make_trainer(cfg, random_architecture(net_spec(cfg, splits), 8_000, 0), splits)


def losses(t, n=5):
    out = []
    for _ in range(n):
        before = t.sums.clone()
        t.optimise()
        loss, _, images = (t.sums - before).tolist()
        out.append(loss / images)
    return torch.tensor(out)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_retraining_in_bfloat16(impl):
    plain, t = trainer(**{"compute.impl": impl}), trainer(**{"compute.impl": impl, "compute.amp": True})
    found, want = losses(t), losses(plain)
    assert not found.equal(want) and (found - want).abs().max() < .1 * want.mean()
    assert abs(found[0] - want[0]) < .01 * want[0]
    kept = [*t.net.state_dict().values(), *(p.grad for p in t.net.parameters())]
    assert {v.dtype for v in kept if v.is_floating_point()} == {torch.float32}
    logits, aux = t.net(t.loaders["train"].batch(0, 0)[0])
    assert logits.dtype == aux.dtype == torch.float32
    seen = []
    for m in t.net.modules():
        if isinstance(m, torch.nn.Conv2d | torch.nn.BatchNorm2d):
            m.register_forward_pre_hook(lambda m, x: seen.append(x[0].dtype))
    t.net(t.loaders["train"].batch(0, 0)[0])
    assert torch.bfloat16 in seen  # maps really are in 16 bits
    t.net.eval()
    assert t.net(t.loaders["train"].batch(0, 0)[0])[0].dtype == torch.float32


def test_retraining_in_bfloat16_resumes_to_the_same_bits():
    a, b, c = (trainer(**{"compute.amp": True}) for _ in range(3))
    losses(a, 4)
    losses(b, 2)
    c.load_state_dict(b.state_dict())
    losses(c, 2)
    for k, v in a.net.state_dict().items(): assert v.equal(c.net.state_dict()[k]), k


def test_retraining_is_computed_by_what_is_asked_for():
    t, plain = trainer(**{"compute.impl": "reference"}), trainer()
    assert type(t.net.engine) is Engine and type(plain.net.engine) is FastEngine
    torch.testing.assert_close(losses(t, 2), losses(plain, 2), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings, word", [
    ({"compute.compile": True}, "^compute.compile=true is for searches"),
    ({"compute.recompute": "all"}, "^compute.recompute=all is for searches"),
    ({"compute.compile": True, "compute.recompute": "all"}, "^compute.compile=true and compute.recompute=all is for")])
def test_what_a_retraining_has_no_use_for_is_said(settings, word):
    with pytest.warns(UserWarning, match=word) as said: t = trainer(**settings)
    assert len(said) == 1
    losses(t, 1)


def test_earlier_stages_need_no_word(recwarn):
    trainer(**{"compute.recompute": "earlier"})
    assert not recwarn.list


def test_tf32_in_a_retraining_is_set_and_taken_back(tmp_path, as_on_a_gpu):
    seen, watch = as_on_a_gpu
    cfg = preset("smoke", **FAST, **{"compute.tf32": True})
    splits = load_data(cfg.data, cfg.seed)
    runs.train(cfg, random_architecture(net_spec(cfg, splits), 8_000, 0), tmp_path / "t", splits, listeners=(watch,))
    assert {f.tf32 for f in seen} == {(True, True)} and len(seen) == 3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_same_seed_same_card_same_bits(tmp_path):
    "In processes of their own, since cuBLAS has to know first."
    folders = [tmp_path / "a", tmp_path / "b"]
    for out in folders:
        words = ["-m", "mgdarts", "search", "--set", "compute.deterministic=true", "--device", "cuda", "--out", out]
        subprocess.run([os.sys.executable, *map(str, words)], cwd=Path(__file__).parent.parent, check=False)
    assert what(folders[0]) == what(folders[1])
    assert read_record(folders[0])["environment"]["deterministic"]
