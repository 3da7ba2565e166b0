import hashlib
import json
import os
import shutil
import sys

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from mgdarts.base.options import to_dict
from mgdarts.fast import compiled
from mgdarts.methods.registry import preset
from mgdarts.runs.listen import read_events
from mgdarts.runs import run as runs
from mgdarts.views.report import report

# Nets this small are fastest on one thread, and tests may share the machine.
torch.set_num_threads(1)
# Compiled now, if ever: commands that tests start say nothing of it then.
compiled.library()
# In continuous integration every run draws the same examples; elsewhere new ones are tried.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def environment():
    "What a test or a notebook sets ends with it."
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}: del os.environ[name]
    os.environ.update({k: v for k, v in before.items() if k != "PYTEST_CURRENT_TEST"})


@pytest.fixture(autouse=True)
def additions():
    "What a test or a notebook adds to the lists of the package (operations, methods, spaces, data) goes with it."
    from mgdarts.base import options, sources
    from mgdarts.methods.registry import METHODS
    from mgdarts.space import operation, spaces
    lists = [(x, x.copy()) for x in (options.OPERATION_NAMES, options.SPACE_KINDS)]
    known = (operation.OPERATIONS, spaces.SPACES, sources.DATASETS, METHODS, *options.REGISTRIES)
    dicts = [(x, dict(x)) for x in known]
    beside = [(r.beside, dict(r.beside)) for r in options.REGISTRIES]
    yield
    for now, before in lists: now[:] = before
    for now, before in dicts + beside:
        now.clear()
        now.update(before)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    "A folder of this test run, the same in each of its processes."
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def run_of(shared):
    """A finished search of preset smoke by its settings, copied to the folder `to`; None: in one to look at only.

    Each is searched once in a test run, whichever process asks first; `trained`: with both retrainings and a report.
    """
    def find(to=None, trained=False, **given):
        cfg = preset("smoke", **given)
        name = hashlib.sha256(json.dumps(to_dict(cfg), sort_keys=True).encode()).hexdigest()[:12]
        out = shared / (name + "-trained" * trained)
        with FileLock(f"{out}.lock"):
            if not out.exists() and trained:
                half = find(shared / f"{name}-half", **given)
                runs.retrain(half)
                runs.retrain(half, baseline=True, listeners=(report,))
                half.rename(out)
            elif not out.exists():
                runs.search(cfg, shared / f"{name}-begun")
                (shared / f"{name}-begun").rename(out)
        return shutil.copytree(out, to) if to else out
    return find


@pytest.fixture
def here(monkeypatch):
    "Papermill runs the notebooks of this test in this process: no kernel has to start and import torch."
    import plotly.io
    from execnb.shell import CaptureShell
    from nbformat import from_dict
    from papermill.engines import Engine, papermill_engines

    class Shell(CaptureShell):
        def run_cell(self, raw_cell, store_history=True, **more):
            return super().run_cell(raw_cell, True, **more)  # in `In`, where a notebook looks for its parameters

    class Here(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **_):
            shell = Shell()
            for i, cell in enumerate(nb_man.nb.cells):
                nb_man.cell_start(cell, i)
                if cell.cell_type == "code": cell.outputs = from_dict(shell.run(cell.source))
                if failed := cell.cell_type == "code" and shell.exc: nb_man.cell_exception(cell, i)
                nb_man.cell_complete(cell, i)
                if failed: break

    monkeypatch.setitem(papermill_engines._engines, None, Here)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # a shell puts its own there
    before, plotly.io.renderers.default = plotly.io.renderers.default, "plotly_mimetype"
    yield
    plotly.io.renderers.default = before
    Shell.clear_instance()


@pytest.fixture
def interrupted(tmp_path):
    "A search that is interrupted after five epochs, with a state saved after every step, and goes on: its folder."
    def search(cfg):
        def stop(event):
            if event.type == "epoch" and event.epoch == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            runs.search(cfg, tmp_path / "cut", listeners=(stop,), save_every=0)
        runs.search(None, tmp_path / "cut", resume=True)
        return tmp_path / "cut"
    return search


@pytest.fixture
def events_of():
    "The events of a run, without the clock."
    return lambda run: [{k: v for k, v in e.items() if k != "time"} for e in read_events(run / "events.jsonl")]
