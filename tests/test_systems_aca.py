"A reading of ACA's search: PC-DARTS without skip connections. The refill is not there, and is not claimed."
import pytest

from mgdarts.base.data import load_data
from mgdarts.methods.registry import METHODS, preset
from mgdarts.net.derive import derive
from mgdarts.runs.make import make_search

TINY = {"data.subset": 100, "search.batch": 20, "search.length": 2}


@pytest.mark.parametrize("impl", ("fused", "reference"))
def test_no_skip_connection_lives_at_any_time(impl):
    cfg, seen = preset("smoke", "aca-pc-darts", **{**TINY, "compute.impl": impl}), []
    search = make_search(cfg, load_data(cfg.data, 0))
    skip = search.whole.ops.index("skip_connect")
    while not search.finished:
        search.step()
        seen.append(bool(search.net.op_live[..., skip].any()))
    assert len(seen) > 2 and not any(seen)
    for cell in derive(search.net).cells:
        assert len(cell.ops) == 8 and all(op.op != "skip_connect" for op in cell.ops)


def test_nothing_but_the_candidates_differs_of_pc_darts_and_it_says_what_it_is():
    own, pc = METHODS["aca-pc-darts"], METHODS["pc-darts"]
    assert {k for k, v in own.settings.items() if pc.settings.get(k) != v} == {"rules.ops", "rules.zero"}
    assert own.standing.startswith("a reading") and "refill" in own.standing and "no refill" in own.doc
