"Every chapter runs from top to bottom. Notebooks with parameters run through papermill, in tests of their own."
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

from mgdarts.paper.data import TARGETS

CFG = get_config()
PARAMETERISED = ("start/quickstart", "start/workbench", "runs/benchmarks", "runs/fault_suite", "paper/claims")
NAME = lambda p: f"{p.parent.name}/{p.stem}"
NOTEBOOKS = [p for p in sorted(nbglob(CFG.nbs_path, as_path=True)) if NAME(p) not in PARAMETERISED and p.stem not in TARGETS]
run_nb.__test__ = False


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAME)
def test_notebook(path):
    ok, _ = run_nb(path.absolute(), skip_flags=[], basepath=CFG.config_path)
    assert ok
