"Every chapter runs from top to bottom. Notebooks with parameters run through papermill, in tests of their own."
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

CFG = get_config()
NOTEBOOKS = [p for p in sorted(nbglob(CFG.nbs_path, as_path=True)) if p.stem not in ("quickstart", "benchmarks", "claims", "faults", "workbench") and p.parent.name != "repro"]
run_nb.__test__ = False


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    ok, _ = run_nb(path.absolute(), skip_flags=[], basepath=CFG.config_path)
    assert ok
