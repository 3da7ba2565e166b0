"Zero-cost scores: what a look leaves behind, as a start and as a decision of a search, and on the command line."
import json

import pytest
import torch
import torch.nn.functional as F

from mgdarts.base.data import load_data
from mgdarts.base.options import InputError, Rules
from mgdarts.cli import main as cli
from mgdarts.fast.engine import FastEngine
from mgdarts.methods.proxies import SCORES, image_gradients, kernels_of, looked_at, scores_of, slopes
from mgdarts.methods.registry import preset
from mgdarts.net import files as architecture
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.sample import random_architecture
from mgdarts.net.supernet import SuperNet
from mgdarts.runs.make import make_search
from mgdarts.space.darts import NetSpec
from mgdarts.space.mobile import MobileSpec

SPECS = {"darts": NetSpec(4, 3, size=8), "mobilenet": MobileSpec(4, .25, 10, 16)}
TINY = {"data.subset": 100, "search.batch": 20, "search.length": 1, "search.warmup": 1, "search.max_epochs": 1}


def batch(size, n=6):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=g), torch.arange(n)


@pytest.mark.parametrize("kind", SPECS)
def test_a_look_leaves_nothing_behind(kind):
    arch = random_architecture(SPECS[kind], 60_000 if kind == "darts" else 200_000, 0)
    net, (x, y) = DerivedNet(arch, seed=1, engine=FastEngine()).train(), batch(arch.size)
    net.requires_grad_(False)
    before, engine = {k: v.clone() for k, v in net.state_dict().items()}, net.engine
    has = {k: s for k, s in SCORES.items() if kind == "darts" or k != "grasp"}
    if kind == "mobilenet":
        with pytest.raises(InputError, match="twice"): SCORES["grasp"](net, x, y)
    first = {name: score(net, x, y) for name, score in has.items()}
    assert all(v.equal(before[k]) for k, v in net.state_dict().items())
    assert net.training and net.engine is engine and not any(p.requires_grad for p in net.parameters())
    assert first == {name: score(net, x, y) for name, score in has.items()} == scores_of(arch, x, y, seed=1)


def test_snip_and_grasp_of_a_network_by_differences():
    "Along a random direction: what the gradients say, and what the numbers do."
    net = DerivedNet(random_architecture(NetSpec(4, 3, size=8), 20_000, 0)).double()
    x, y, of = batch(8)[0].double(), batch(8)[1], kernels_of(net)
    with looked_at(net, True, of): g = slopes(net, x, y, of)
    assert abs(SCORES["snip"](net, x, y) - float(sum((p * v).detach().abs().sum() for p, v in zip(of, g)))) < 1e-12
    ends = []
    for by in (1e-7, -1e-7):
        with torch.no_grad():
            for p, v in zip(of, g): p.add_(v, alpha=by)
        with looked_at(net, True, of): ends.append(slopes(net, x, y, of))
        with torch.no_grad():
            for p, v in zip(of, g): p.sub_(v, alpha=by)
    slow = -sum(float((p * (a - b)).detach().sum()) / 2e-7 for p, a, b in zip(of, *ends))
    assert abs(SCORES["grasp"](net, x, y) - slow) < 1e-3 * abs(slow)


def test_synflow_counts_layers_where_there_is_one_path():
    "Of skips alone, weights are in the stem, the preprocessing and the classifier: R is a product along each path."
    net = SuperNet(NetSpec(4, 3, size=8)).double()
    net.open(2, 2)
    net.double()
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    one, (w,) = SCORES["synflow"](net, x), [net.head.weight]
    with torch.no_grad(): w.mul_(-2) # the sum of the logits is linear in the classifier, whatever its sign
    assert abs(SCORES["synflow"](net, x) / one - 2) < 1e-9


def test_images_do_not_see_each_other():
    "In evaluation mode the gradient of the sum of all logits is that of each image's own."
    rules = Rules(relaxation="softmax", gates=False, pool_norm=True) # Zero-Cost-PT's, and all of DARTS's kind
    net, (x, _) = SuperNet(NetSpec(4, 3, size=8), rules=rules), batch(8)
    net.open(2, 2)
    with looked_at(net, False):
        whole = image_gradients(net, x)
        alone = torch.cat([image_gradients(net, x[n:n + 1]) for n in range(len(x))])
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-6)
    assert whole.abs().max() > 1e-4
    with looked_at(net, True): assert image_gradients(net, x).abs().max() < 1e-5


def test_naswot_by_hand():
    arch, (x, _) = random_architecture(NetSpec(4, 3, size=8), 20_000, 0), batch(8)
    seen, relu = [], F.relu
    net = DerivedNet(arch).eval()
    try:
        F.relu = lambda x, *more: seen.append(x) or relu(x, *more)
        torch.Tensor.relu, own = lambda x: seen.append(x) or relu(x), torch.Tensor.relu
        net(x)
    finally: F.relu, torch.Tensor.relu = relu, own
    on = torch.cat([(s > 0).flatten(1) for s in seen], 1)
    k = torch.tensor([[float((a == b).sum()) for b in on] for a in on], dtype=torch.float64)
    assert abs(SCORES["naswot"](net, x) - float(torch.linalg.slogdet(k)[1])) < 1e-9


@pytest.mark.parametrize("init, method", [(init, "mg-darts") for init in ("synflow", "grasp", "fisher", "naswot",
                                          "jacobian")] + [("synflow", "darts-v1")])
def test_a_start(init, method):
    few = {"rules.ops": "skip_connect,sep_conv_3x3"} if init in ("naswot", "jacobian") else {}
    cfg = preset("smoke", method, **TINY, **few, **{"rules.init": init})
    search = make_search(cfg, load_data(cfg.data, 0))
    search.events.listen(lambda e: alphas.append(search.net.alpha.detach().clone()), "stage")
    alphas = []
    search.step()
    (alpha,) = alphas
    assert alpha[0].std() > .05 and alpha.isfinite().all() and abs(float(alpha[0].mean())) < 1e-5
    if method == "darts-v1": assert alpha[1].equal(alpha[2]) # cells that are alike


@pytest.mark.parametrize("score", ("synflow", "jacobian"))
def test_a_decision(score):
    cfg = preset("smoke", "zero-cost-pt", **TINY, **{"rules.score": score, "rules.samples": 1, "rules.batches": 1,
                                                     "rules.ops": "skip_connect,sep_conv_3x3"})
    search = make_search(cfg, load_data(cfg.data, 0))
    search.run()
    assert search.net.op_live.sum((1, 2)).tolist() == [8] * 3


def test_a_trial_of_an_older_version_is_refused():
    cfg = preset("smoke", "zero-cost-pt", **{**TINY, "search.length": 0})
    search = make_search(cfg, load_data(cfg.data, 0))
    search.step()
    del search.trial["score"]
    with pytest.raises(InputError, match="older version"): search.step()


def test_the_command(tmp_path, capsys):
    arch = random_architecture(NetSpec(4, 3, 10, 8, in_channels=1), 8_000, 0)
    architecture.save(arch, tmp_path / "a")
    line = ["arch", "score", str(tmp_path / "a"), "--dataset", "digits", "--batch", "16", "--json"]
    assert cli.main(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 16 and list(found["scores"]) == list(SCORES)
    assert cli.main([*line, "--score", "naswot"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == {"naswot": found["scores"]["naswot"]}
    assert cli.main([*line, "--score", "synflo"]) == 2
    assert "did you mean 'synflow'" in capsys.readouterr().err
