"How kernels are compiled, and what happens where they cannot be."
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mgdarts.base.options import InputError
from mgdarts.runs.folder import read_record
from mgdarts.fast import compiled
from mgdarts.fast.convolutions import Pair, pairs
from mgdarts.fast.norms import normalise, spread_index
from mgdarts.runs import run as runs
from mgdarts.methods.registry import preset

build = compiled.library.__wrapped__
TINY = " ".join(f'extern "C" void {name}() {{}}' for name in ("pairs", "pointwise", "norms"))


def write(folder, source):
    for name, text in zip(compiled.SOURCES, (source, "")): (folder / name).write_text(text)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A small source, an empty cache, and a compiler that counts its calls."
    command = compiled.find_compiler()
    if not command: pytest.skip("no C++ compiler")
    script = tmp_path / "counting"
    script.write_text(f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo called >> {tmp_path}/calls;; esac\n'
                      f'exec {" ".join(command)} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    write(tmp_path, TINY)
    monkeypatch.setattr(compiled, "files", lambda _: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.delenv("MGDARTS_KERNELS", raising=False)
    return tmp_path


def calls(folder): return len((folder / "calls").read_text().splitlines())


def test_compiled_once_and_kept(tiny, capsys):
    assert build() and build() and calls(tiny) == 1
    assert capsys.readouterr().err == "compiling kernels for this machine, once ...\n"
    assert sorted(p.suffix for p in (tiny / "cache/mgdarts").iterdir()) == [".sha256", ".so"]


@pytest.mark.parametrize("name", compiled.SOURCES)
def test_another_source_is_another_library(tiny, name):
    build()
    with open(tiny / name, "a") as f: f.write(" // changed")
    build()
    assert calls(tiny) == 2


def test_a_damaged_library_is_compiled_again(tiny):
    code = ("from pathlib import Path; from mgdarts.fast import compiled; "
            f"compiled.files = lambda _: Path({str(tiny)!r}); print(compiled.library() is not None)")
    def process():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert process() == "True\n"
    path, = (tiny / "cache/mgdarts").glob("*.so")
    for n, keep in enumerate((100, -8), 2):  # no library; one that would end the process
        path.write_bytes(path.read_bytes()[:keep])
        assert process() == "True\n" and calls(tiny) == n


def test_nothing_that_others_may_write_is_run(tiny):
    build()
    path, = (tiny / "cache/mgdarts").glob("*.so")
    mark = path.with_suffix(".sha256")
    path.chmod(0o777)  # others may have written it
    assert build() and calls(tiny) == 2 and stat.S_IMODE(path.stat().st_mode) == 0o700
    mark.unlink()  # nobody vouches for it
    assert build() and calls(tiny) == 3
    elsewhere = tiny / "elsewhere.so"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert build() and calls(tiny) == 4 and not path.is_symlink()
    path.parent.chmod(0o777)  # others may put a library there
    before = [(p.name, p.stat().st_mtime_ns) for p in path.parent.iterdir()]
    assert build() and calls(tiny) == 5
    assert [(p.name, p.stat().st_mtime_ns) for p in path.parent.iterdir()] == before


def test_a_folder_of_this_process_alone_is_gone_with_it(tiny):
    (tiny / "cache").write_text("a file")
    code = ("from pathlib import Path; from mgdarts.fast import compiled; "
            f"compiled.files = lambda _: Path({str(tiny)!r}); print(compiled.library()._name)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).parent.exists()


def test_a_library_without_its_functions_is_none(tiny):
    write(tiny, 'extern "C" void pairs() {}')
    with pytest.warns(UserWarning, match="PyTorch's are used: .*undefined symbol"): assert build() is None


@pytest.mark.parametrize("name, value, says", [("MGDARTS_KERNELS", "TORCH", "choose torch or compiled"),
                                               ("MGDARTS_KERNELS", "pytorch", "choose torch or compiled"),
                                               ("CXX", '"', "is no command")])
def test_what_the_environment_says_is_done_or_refused(monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=says): build()


def test_source_that_does_not_compile(tiny):
    "The compiler's own words, with the line of the file that was shipped."
    write(tiny, TINY + "\n\nnonsense")
    with pytest.warns(UserWarning, match=f"cannot be compiled, PyTorch's are used: {tiny}/kernels.cpp:3:.*error"):
        assert build() is None
    assert not list((tiny / "cache/mgdarts").iterdir())


@pytest.mark.parametrize("name, value", [("MGDARTS_KERNELS", "torch"), ("CXX", "no-such-compiler")])
def test_there_need_be_none(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert build() is None


def test_a_cache_that_cannot_be_made(tiny, monkeypatch):
    (tiny / "cache").write_text("a file")
    assert build()


def test_a_search_is_the_same_search_with_both(tmp_path, monkeypatch):
    "But for the last bits: losses of the first epoch agree, and the run that goes on with others says so."
    if not compiled.library(): pytest.skip("no C++ compiler")
    cfg = preset("smoke", **{"data.subset": 128, "search.max_epochs": 4})
    def begin(folder):
        losses = []
        def stop(event):
            if event.type == "epoch":
                losses.append(event.loss)
                if event.epoch == 2: raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): runs.search(cfg, folder, listeners=(stop,), save_every=0)
        return losses[0]
    first = begin(tmp_path / "compiled")
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert begin(tmp_path / "torch") == pytest.approx(first, rel=1e-3)
    assert read_record(tmp_path / "torch")["environment"]["kernels"] == "torch"
    with pytest.warns(UserWarning, match="kernels compiled, now torch: it goes on"):
        runs.search(cfg, tmp_path / "compiled", resume=True)


def test_a_diverged_map_stays_visible():
    "NaN passes the ReLU of both."
    x = torch.full((2, 16, 4, 4), float("nan")).to(memory_format=torch.channels_last)
    y, = pairs(x, [Pair(torch.randn(16, 1, 3, 3), torch.randn(8, 16, 1, 1))], relu=True)
    assert y.isnan().all()
    ys, _, _ = normalise([x], torch.ones(16), torch.zeros(16), (None, None), spread_index([16], 1), 1, True, relu=True)
    assert ys[0].isnan().all()
