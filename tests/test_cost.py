"What many runs cost is worked out before any is started, and every number has a source."
import json
import statistics
from dataclasses import replace

import pytest

from mgdarts.base.files import read_json
from mgdarts.base.options import InputError, root
from mgdarts.cli.main import main
from mgdarts.methods.registry import METHODS, preset
from mgdarts.paper.evidence import PAPER, evidence, jobs_of
from mgdarts.sweep import cost, pace
from mgdarts.sweep.jobs import job_of

SECONDS = pace.Lap("stage 1", (100, 50), (8, 4), (1000, 500), (2, 2), (1., .5), 1., (2., 1.))
IMAGES = pace.Images(640, 64, 64, 10, 8)


def priced(cfg, share=1., extra=cost.Overhead(), ranks=cost.Ranks()):
    laps = [replace(SECONDS, name=n) for n in ("stage 1", "stage 2", "stage 3", "fine-tune")]
    return cost.search_seconds(cfg, pace.Pace(laps, None, 100, 8, 1000), IMAGES, share, extra, ranks)


def test_a_search_costs_its_steps_and_the_rest_of_its_epochs():
    cfg = preset("smoke", **{"search.max_epochs": 10, "search.warmup": 1, "search.batch": 64, "search.prune_every": 1})
    assert priced(cfg) == 4 * (10 * 11 * 1. + 11 * 2.)  # ten steps an epoch, one epoch of warm-up
    assert priced(cfg, .5) == 4 * (10 * (1 + 5 * .75) + 2. + 5 * 1.5)  # it gets faster as it prunes
    extra = cost.Overhead(search=7., stage=1., epoch=.5)
    assert priced(cfg, extra=extra) == priced(cfg) + 7 + 4 + 44 * .5
    two = cost.Ranks(2, 1., .01, 3.)
    assert priced(cfg, ranks=two) == pytest.approx(4 * (110 * (.5 + 4000 / 1e9 + 2 * 3 * .01) + 22))
    two_level = preset("smoke", "darts-v1", **{"search.length": 4, "search.warmup": 0, "search.batch": 64})
    assert priced(two_level) == 4 * (4 * 5 * 1. + 4 * 2.)  # half of the images are for alpha


def test_runs_go_to_whoever_is_free_the_longest_first():
    assert cost.schedule([1, 5, 2, 4, 3], 2) == [8, 7] and cost.schedule([3], 4) == [3, 0, 0, 0]
    found = cost.on_devices([3600.] * 5, 4)
    assert (found["hours"], found["device_hours"], found["busy_percent"]) == (2., 5., 62.5)
    shared = cost.on_devices([3600.] * 5, 8, cost.Ranks(2))
    assert (shared["hours"], shared["device_hours"]) == (2., 10.)
    with pytest.raises(InputError, match="fewer than"): cost.on_devices([1.], 2, cost.Ranks(4))


def test_a_search_that_several_jobs_share_is_paid_once():
    class Known(cost.Paces):
        def __call__(self, cfg): return pace.Pace([replace(SECONDS, name=n) for n in "1234"], None, 9, 9, 9, 1., 0., 0.)
    cfg = preset("smoke")
    other = preset("smoke", **{"train.epochs": 5})
    one, more = job_of("a", cfg), replace(job_of("b", cfg), train=job_of("b", other).train)
    alone, both = (cost.costs_of(jobs, Known("cpu"), {}, cost.Overhead())[0] for jobs in ([one], [one, more, one]))
    steps = pace.images_of(cfg).train // cfg.train.batch
    assert both.most - alone.most == 5 * steps and both.labels == ["a", "b", "a"]


def test_past_runs_say_how_many_epochs_are_expected():
    cfg = preset("cpu")
    known = {("cpu", "mg-darts", 3): [.1, .3, .2], ("cpu", "mg-darts", 1): [.9], ("smoke", "mg-darts", 3): [.5]}
    assert cost.expected(cfg, known)[0] == .2
    assert cost.expected(preset("small"), known)[0] == statistics.median([.1, .3, .2, .5])
    assert cost.expected(cfg, {}) == (1., "no past search: at most")
    assert cost.share_of(preset("smoke"), 4, 4 + 80) == .5 and cost.shares()["cpu", "mg-darts", 3]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_led_through_its_stages(method):
    cfg = preset("smoke", method)
    found = pace.untimed(cfg, pace.images_of(cfg))
    assert all(a >= b > 0 for lap in found.laps for a, b in (lap.macs, lap.ops, lap.params))
    assert abs(found.train_params / 1e6 / cfg.search.target_m - 1) < .2


def test_times_of_a_card_are_those_of_its_record_and_say_so():
    card, cfg = pace.card_of(), preset("small", **{"compute.recompute": "none"})
    found = pace.recorded(cfg, card)
    for lap in found.laps[:3]: assert lap.step[0] == pytest.approx(card.search[3, "none", "fp32"][lap.name])
    assert "H200" in found.source and "not measured here" in found.source
    wide = preset("large", **{"compute.recompute": "none"})
    by_macs, by_ops = (pace.recorded(wide, card, law=law).laps[0].step[0] for law in pace.LAWS)
    assert by_macs > 2 * by_ops > found.laps[0].step[0]


def test_the_papers_evidence_is_counted_and_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr("mgdarts.paper.study.run_jobs", None)  # nobody may run any
    whole = evidence("0,1")
    jobs = [j for v in whole.values() for j in v]
    assert set(whole) == set(PAPER) and len({j.place() for j in jobs}) == len(jobs) and {j.seed for j in jobs} == {0, 1}
    assert [j.label for j in jobs_of("table04", preset="small")] == ["Single-stage", "Multi-stage"]
    rates = [j.search["rules"]["rate_ops"] for j in jobs_of("fig06", preset="small") if j.label.startswith("fixed")]
    assert min(rates) > 0 and len(set(rates)) == 2  # from the record of the adaptive search


def test_the_model_was_checked_against_runs_in_one_and_two_processes():
    record = read_json(root() / "figures/scale/cost.json", "a record")
    assert {r["processes"] for r in record["rows"]} == {1, 2} and record["command"] and record["environment"]["commit"]
    for r in record["rows"]: assert .75 < r["measured_s"] / r["epochs_known_s"] < 1.34, r
    two = record["two_processes"]
    assert .75 < two["measured_s"] / two["predicted_s"] < 1.34


def test_plan_of_a_sweep_on_the_command_line(tmp_path, capsys, monkeypatch):
    spec = tmp_path / "sweep.yaml"
    spec.write_text("methods: [mg-darts, darts-v1]\nseeds: [0, 1, 2]\ntrain: true\n")
    assert main(["plan", "--sweep", str(spec), "--device", "cpu", "--devices", "1,3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["searches"] for p in found["parts"]] == [3, 3] and found["whole"]["sources"] == ["measured here"]
    one, three = found["whole"]["typical"]
    assert one["hours"] > three["hours"] >= one["hours"] / 3 * .99 and found["by_operations"] is None
    assert main(["plan", "--sweep", "nothing"]) == 2 and "no such file" in capsys.readouterr().err
    assert main(["plan", "--sweep", "smoke", "--devices", "none"]) == 2
    assert main(["plan", "--sweep", "smoke", "--devices", "1", "--devices-a-run", "2", "--device", "cpu"]) == 2
