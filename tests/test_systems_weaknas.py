"WeakNAS and the table of candidates: closed forms, and a run that is killed in the middle of judging."
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from sklearn.linear_model import Ridge

from mgdarts.base.data import load_data
from mgdarts.base.files import read_json
from mgdarts.base.options import InputError
from mgdarts.methods.registry import preset
from mgdarts.methods.weaknas import features, next_round, perceptron, ridge
from mgdarts.runs.make import make_search
from mgdarts.search.candidates import kendall
from mgdarts.search.trial import ops_of
from mgdarts.space.darts import NetSpec

SMALL = {"data.subset": 100, "search.batch": 40, "search.length": 1, "rules.pool": 20, "rules.rounds": 2,
         "rules.draw": 3, "rules.top": 6, "rules.hidden": 8, "rules.batches": 1}


def world(n, seed, slots=8, kinds=4):
    "Random nets of a made-up space, and what they are worth."
    g = torch.Generator().manual_seed(seed)
    choice = torch.randint(kinds, (n, slots), generator=g)
    ops = torch.nn.functional.one_hot(choice, kinds).bool()[:, None]
    x = features(NetSpec(4, 3), ops)
    return x, x[:, :slots * kinds] @ torch.rand(slots * kinds, generator=g).double()


def test_ridge_is_ridge():
    x, y = world(120, 0)
    theirs = Ridge(alpha=.5).fit(x[:80], y[:80]).predict(x)
    torch.testing.assert_close(ridge(x[:80], y[:80], .5)(x), torch.tensor(theirs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_ranking_without_noise_is_known(seed):
    x, y = world(400, seed)
    assert kendall(ridge(x[:100], y[:100])(x[100:]), y[100:]) > .999
    g = torch.Generator().manual_seed(seed)
    assert kendall(perceptron(x[:100], y[:100], 64, g)(x[100:]), y[100:]) > .5


@pytest.mark.parametrize("fit", ("ridge", "mlp"))
def test_later_rounds_are_better_than_the_first(fit):
    for seed in range(5 if fit == "ridge" else 2):
        x, y = world(2000, seed)
        y = y + .3 * x[:, 0] * x[:, 5]
        g, asked, means, predicted = torch.Generator().manual_seed(seed), [], [], None
        for _ in range(5):
            new = next_round(predicted, asked, 20, 200, g, len(x))
            if predicted is not None:
                order = predicted.argsort(descending=True, stable=True).tolist()
                assert set(new) <= set([i for i in order if i not in asked][:200])
            asked += new
            means.append(float(y[new].mean()))
            predicted = (ridge(x[asked], y[asked]) if fit == "ridge" else perceptron(x[asked], y[asked], 64, g))(x)
        assert len(asked) == len({*asked}) == 100 and min(means[1:]) > means[0]


def test_a_pool_that_runs_out():
    g = torch.Generator().manual_seed(0)
    assert sorted(next_round(None, [0, 2], 5, 5, g, 5)) == [1, 3, 4]
    assert next_round(torch.arange(3.), [0, 1, 2], 5, 5, g, 3) == []


def test_sizes_that_do_not_go_together():
    with pytest.raises(InputError, match="rules.top=50"): preset("smoke", "weaknas", draw=60, top=50)


def test_judged_by_short_training_and_killed(tmp_path):
    "Killed in the middle of a candidate's training it goes on to the same table and the same network."
    sets = [f"--set={k}={v}" for k, v in {**SMALL, "search.length": 0, "rules.judge": "training",
                                          "rules.judge_epochs": 4}.items()]
    main = [sys.executable, "-c", "from mgdarts.cli.main import main; main()", "search"]
    new = [*main, "--preset", "smoke", "--method", "weaknas", *sets, "--out"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*new, tmp_path / "whole"], check=True, **quiet)
    table = read_json(tmp_path / "whole/candidates.json", "a table")
    assert len(table["candidates"]) == 6 == len({row["code"] for row in table["candidates"]})
    child = subprocess.Popen([*new, tmp_path / "cut"], **quiet)
    begun = time.monotonic()
    while not (tmp_path / "cut/events.jsonl").exists() and time.monotonic() < begun + 120: time.sleep(.02)
    time.sleep(.3)
    child.send_signal(signal.SIGTERM)
    child.wait()
    assert not (tmp_path / "cut/result.json").exists()
    subprocess.run([*main, "--out", tmp_path / "cut", "--resume"], check=True, **quiet)
    assert read_json(tmp_path / "cut/candidates.json", "a table") == table
    a, b = (json.loads((tmp_path / run / "architecture.json").read_text()) for run in ("whole", "cut"))
    assert a["cells"] == b["cells"] and os.path.exists(tmp_path / "cut/result.json")


def test_the_search_becomes_what_is_predicted_best():
    cfg = preset("smoke", "weaknas", **SMALL)
    search, told = make_search(cfg, load_data(cfg.data, 0)), []
    search.events.listen(lambda e: told.append(e.data), "candidates")
    search.run()
    (table,) = told
    ops = ops_of(search.spec, table["chosen"]["code"])
    live = search.net.op_live
    assert live[0].equal(ops[0]) and live[1].equal(ops[1]) and live[2].equal(ops[1])
    assert len(table["chosen"]["taus"]) == 1 and table["chosen"]["predicted"] <= 100
