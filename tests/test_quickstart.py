"The quickstart runs headless with papermill, small; bad parameters stop it."
import os
from pathlib import Path

import nbformat
import papermill
import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs/start/quickstart.ipynb"
FAST = "data.subset=200, search.warmup=1, search.max_epochs=2, train.epochs=2, search.batch=32"


@pytest.fixture(autouse=True)
def in_this_process(here):
    "Where nothing else is said."


def execute(target, engine=None, **parameters):
    papermill.execute_notebook(NOTEBOOK, target, parameters, engine, kernel_name="python3", progress_bar=False,
                               cwd=NOTEBOOK.parent)


def test_quickstart(tmp_path):
    out = tmp_path / "out.ipynb"
    execute(out, "nbclient", out=str(tmp_path / "run"), settings=FAST)  # in a kernel, as a user runs it
    assert (tmp_path / "run/report.html").exists() and os.path.getsize(out) < 1_000_000
    nb = nbformat.read(out, 4)
    shown = [o for c in nb.cells for o in c.get("outputs", [])]
    assert sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in shown) == 5
    text = "".join(o.get("text", "") for o in shown)
    assert "searched" in text and "random" in text and "standard error" in text
    # after a failure, here in the retraining, the same notebook goes on
    (tmp_path / "run/train/result.json").unlink()
    execute(out, out=str(tmp_path / "run"), settings=FAST)
    again = "".join(o.get("text", "") for c in nbformat.read(out, 4).cells for o in c.get("outputs", []))
    def last(said): return [line for line in said.splitlines() if "standard error" in line]
    assert last(again) == last(text) and (tmp_path / "run/train/result.json").exists()


def test_quickstart_takes_a_method(tmp_path):
    execute(tmp_path / "out.ipynb", out=str(tmp_path / "run"), settings=f"{FAST}, search.length=1", method="darts-v1")
    assert '"darts-v1"' in (tmp_path / "run/config.json").read_text("utf-8")


@pytest.mark.parametrize("bad", [{"preset": "smok"}, {"seed": "1"}, {"settings": "nothing"}, {"sede": 1},
                                 {"method": "magic"}])
def test_bad_parameters(tmp_path, bad):
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="InputError"):
        execute(tmp_path / "out.ipynb", out=str(tmp_path / "run"), **bad)
    assert not (tmp_path / "run").exists()
