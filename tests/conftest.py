import os

import pytest
import torch
from hypothesis import settings

from mgdarts.fast import compiled
from mgdarts.runs.listen import read_events
from mgdarts.runs import run as runs

# Nets this small are fastest on one thread, and tests may share the machine.
torch.set_num_threads(1)
# Compiled now, if ever: commands that tests start say nothing of it then.
compiled.library()
# In continuous integration every run draws the same examples; elsewhere new ones are tried.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    "Run in parallel (pytest -n), the tests of a file with a fixture to share share a process; the others go wherever there is room."
    shares = {path: 'scope="module"' in path.read_text("utf-8") and path.stem != "test_methods" for path in {item.path for item in items}}
    for item in items:
        if shares[item.path]: item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def environment():
    "What a test or a notebook sets ends with it."
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}: del os.environ[name]
    os.environ.update({k: v for k, v in before.items() if k != "PYTEST_CURRENT_TEST"})


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
