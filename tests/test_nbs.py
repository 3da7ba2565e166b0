"Every chapter runs from top to bottom. Those with parameters, of `start` and `runs`, have tests of their own."
from pathlib import Path

import papermill
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

from mgdarts.base.files import read_json
from mgdarts.paper.data import TARGETS

CFG = get_config()
PARAMETERISED = ("start/quickstart", "start/workbench", "runs/benchmarks", "runs/fault_suite", "paper/claims")
NAMES = [str(p.relative_to(CFG.nbs_path))[:-6] for p in sorted(nbglob(CFG.nbs_path, as_path=True))]
run_nb.__test__ = False


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PARAMETERISED and Path(n).name not in TARGETS])
def test_notebook(name):
    ok, _ = run_nb((CFG.nbs_path / f"{name}.ipynb").absolute(), skip_flags=[], basepath=CFG.config_path)
    assert ok


SMALL = ("data.subset=100, data.test_subset=200, search.warmup=0, search.max_epochs=2, search.prune_every=1, "
         "search.batch=50, train.epochs=1")


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_notebook_of_the_paper(name, here, in_turn, shared, tmp_path):
    "With all of its arms, at the smallest size; arms that several notebooks have in common run once."
    given = {"preset": "smoke", "settings": SMALL, "out": str(tmp_path), "runs_dir": str(shared / "arms")}
    papermill.execute_notebook(CFG.nbs_path / f"paper/{name}.ipynb", tmp_path / "out.ipynb", given, kernel_name="python3",
                               progress_bar=False, cwd=CFG.config_path)
    if (tmp_path / name / "record.json").exists():
        assert read_json(tmp_path / name / "record.json", "a record")["failed"] == []
