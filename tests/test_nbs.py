"Every chapter runs from top to bottom. Those with parameters, of `start` and `runs`, have tests of their own."

import nbformat
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

from mgdarts.base.files import read_json
from mgdarts.paper.data import TARGETS, claims
from mgdarts.paper.study import run_notebook

CFG = get_config()
PARAMETERISED = ("start/quickstart", "start/workbench", "runs/benchmarks", "runs/fault_suite", "paper/claims")
NAMES = [str(p.relative_to(CFG.nbs_path))[:-6] for p in sorted(nbglob(CFG.nbs_path, as_path=True))]
run_nb.__test__ = False


@pytest.mark.parametrize("name", [n for n in NAMES if n not in {*PARAMETERISED, *(f"paper/{t}" for t in TARGETS)}])
def test_notebook(name):
    ok, _ = run_nb((CFG.nbs_path / f"{name}.ipynb").absolute(), skip_flags=[], basepath=CFG.config_path)
    assert ok


SMALLEST = ("data.subset=100, data.test_subset=100, search.warmup=0, search.max_epochs=1, search.prune_every=1, "
            "search.batch=50, train.epochs=1")


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_notebook_of_the_paper(name, here, shared, tmp_path, monkeypatch):
    "From top to bottom, at the smallest size, in this process; an arm that several notebooks want runs once."
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")  # figures are pages, as on a machine that has no Chromium
    given = {"settings": SMALLEST, "jobs": 1, "out": str(tmp_path), "runs_dir": str(shared / "arms")}
    cells = nbformat.read(run_notebook(name, given, tmp_path), 4).cells
    outputs = [o.data for c in cells for o in c.get("outputs", []) if "data" in o]
    drawn = [o for o in outputs if "application/vnd.plotly.v1+json" in o]
    assert drawn and len(list((tmp_path / name).glob("*.html"))) >= len(drawn)
    if name in ("fig02", "fig03", "fig04"): return  # nothing is recorded
    record = read_json(tmp_path / name / "record.json", "a record")
    assert record["failed"] == [] and len(record["rows"]) == len(record["arms"]) > 0
    said = [o["text/markdown"] for o in outputs if "text/markdown" in o]
    assert all(label in said[0] for label in record["values"])
    assert said[-1].startswith("| claim |") == (name in {c["item"] for c in claims()})
