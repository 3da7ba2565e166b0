"Retraining: resume, masks, events, the one reading of the test split."
import io, json, math
from dataclasses import replace
import pytest, torch
from mgdarts.net.discrete import DerivedNet
from mgdarts.net.sample import random_architecture
from mgdarts.base.options import InputError, Train
from mgdarts.base.events import Emitter, Event, NonFiniteLoss, evaluate
from mgdarts.space.darts import NetSpec
from mgdarts.search.train import Trainer, drop_path, learning_rate, run_fingerprint


class Toy:
    "Random images with the class in one colour channel; stateless."
    def __init__(self, steps=3, n=8, seed=0, nan_at=None):
        self.steps, self.n, self.seed, self.nan_at, self.reads = steps, n, seed, nan_at, 0
    def __len__(self): return self.steps
    def batch(self, epoch, step):
        g = torch.Generator().manual_seed(10_000 * self.seed + 100 * epoch + step)
        y = torch.randint(3, (self.n,), generator=g)
        x = torch.randn(self.n, 3, 8, 8, generator=g)
        x[torch.arange(self.n), y] += 1
        if self.nan_at == (epoch, step): x[:] = math.nan
        return x, y
    def eval(self):
        self.reads += 1
        return (self.batch(99, s) for s in range(2))

def loaders(**kw): return {"train": Toy(**kw), "val": Toy(seed=1), "test": Toy(seed=2)}
def arch():
    a = random_architecture(NetSpec(4, 3, classes=3, size=8), 8_000, seed=2)
    g = torch.Generator().manual_seed(0)
    return replace(a, masks={k: torch.rand(s, generator=g) < .7 for k, s in a.mask_shapes().items()})
CFG = Train(epochs=3, lr=.05, drop_path=.3, label_smoothing=.1, warmup=2)

def same(a, b):
    if isinstance(a, torch.Tensor): return a.equal(b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Two threads only get in each other's way on nets this small."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope="module")
def whole():
    t = Trainer(arch(), loaders(), CFG, seed=4)
    t.run()
    return t

@pytest.mark.parametrize("steps", range(1, 10))
def test_resume_at_any_step_gives_the_same_bits(whole, steps):
    t = Trainer(arch(), loaders(), CFG, seed=4)
    for _ in range(steps): t.run("step")
    file = io.BytesIO()
    torch.save(t.state_dict(), file)
    file.seek(0)
    torch.manual_seed(steps)
    torch.rand(5) # the global generator must not matter
    new = Trainer(arch(), loaders(), CFG, seed=4)
    new.load_state_dict(torch.load(file, weights_only=True))
    assert new.run() == whole.result and same(new.state_dict(), whole.state_dict())

@pytest.mark.parametrize("type", ("step", "epoch", "result"))
def test_state_saved_by_a_listener_resumes(whole, type):
    t, states = Trainer(arch(), loaders(), CFG, seed=4), []
    t.events.listen(lambda e: states.append((t.state_dict())), type)
    t.run()
    for s in states:
        data = loaders()
        new = Trainer(arch(), data, CFG, seed=4)
        new.load_state_dict(s)
        assert new.run() == whole.result and same(new.state_dict(), whole.state_dict())
        assert data["test"].reads == (type != "result")

def test_state_is_a_snapshot():
    t = Trainer(arch(), loaders(), CFG)
    t.run("step")
    s = t.state_dict()
    copy = torch.load(_bytes(s), weights_only=True)
    t.run()
    assert same(s, copy)
    new = Trainer(arch(), loaders(), CFG)
    new.load_state_dict(s)
    new.run()
    assert same(s, copy)

def _bytes(s):
    file = io.BytesIO()
    torch.save(s, file)
    file.seek(0)
    return file

def test_masked_weights_are_exactly_zero_afterwards(whole):
    for key, m in whole.arch.masks.items():
        assert not whole.net.kernel(key)[~m].any() and whole.net.kernel(key)[m].all()

def test_test_split_is_read_once_at_the_end():
    data = loaders()
    t = Trainer(arch(), data, CFG)
    for _ in range(8): t.run("step")
    assert data["test"].reads == 0
    r = t.run()
    t.run()
    t.step()
    assert data["test"].reads == 1 and data["val"].reads == 3 and t.finished
    assert r["best_val_epoch"] == max(range(3), key=lambda e: t.history[e]["val_acc"])
    assert r["val_acc_best"] == max(h["val_acc"] for h in t.history)
    assert all(0 <= r[k] <= 100 for k in ("test_acc_final", "test_acc_best_val", "val_acc_final", "val_acc_best"))

def test_best_epoch_is_the_one_that_is_tested():
    "With validation data that only the first epoch gets right, the best network is that of the first epoch."
    class Val(Toy):
        def eval(self):
            self.reads += 1
            for x, y in super().eval(): yield x, (t.net.eval()(x)[0].argmax(1) + (self.reads > 2)) % 3
    data = loaders() | {"val": Val(seed=1)}
    t = Trainer(arch(), data, CFG)
    t.run("epoch")
    first = {k: v.clone() for k, v in t.net.state_dict().items()}
    r = t.run()
    net = DerivedNet(t.arch, True)
    net.load_state_dict(first)
    assert r["best_val_epoch"] == 0 and same(t.best["net"], first)
    assert r["test_acc_best_val"] == evaluate([net], Toy(seed=2).eval(), torch.device("cpu"))[0][0]

def test_without_validation_the_last_epoch_counts_and_nothing_speaks_of_validation():
    data, cfg, heard = {k: v for k, v in loaders().items() if k != "val"}, replace(CFG, images="train+val"), []
    t = Trainer(arch(), data, cfg, seed=4)
    t.events.listen(heard.append, "epoch", "result")
    for _ in range(4): t.run("step")
    new = Trainer(arch(), data, cfg, seed=4)
    new.load_state_dict(torch.load(_bytes(t.state_dict()), weights_only=True))
    r = t.run()
    assert new.run() == r and same(new.state_dict(), t.state_dict()) # it resumes as any other
    assert r["trained_on"] == "train+val"
    assert r["test_acc_final"] == evaluate([t.net], Toy(seed=2).eval(), torch.device("cpu"))[0][0]
    assert t.best["net"] is None
    assert not [k for k in r if "val" in k] and len(heard) == 4 and not [k for e in heard for k in e.data if "val" in k]
    assert not [k for h in t.history for k in h if "val" in k]

def test_with_validation_it_is_the_same_training(whole):
    "Looking at validation images changes nothing: the same images, with and without them, give the same network."
    other = Trainer(arch(), {k: v for k, v in loaders().items() if k != "val"}, replace(CFG, images="train+val"),
                    seed=4)
    r = other.run()
    assert whole.result["trained_on"] == "train"
    assert {k: v for k, v in whole.result.items() if k in r and k != "trained_on"} == {k: v for k,
                                                                                       v in r.items()
                                                                                       if k != "trained_on"}
    assert all(a.equal(b) for a, b in zip(whole.net.state_dict().values(), other.net.state_dict().values()))

def test_loaders_that_do_not_fit_the_images():
    data = loaders()
    with pytest.raises(InputError, match="loader val out"): Trainer(arch(), data, replace(CFG, images="train+val"))
    del data["val"]
    with pytest.raises(InputError, match="loaders train, val, test: val missing"): Trainer(arch(), data, CFG)

def test_states_from_before_a_setting_was_there_still_fit():
    "The checksum of a run with the defaults of younger settings is what it was without them."
    from dataclasses import asdict
    import hashlib
    from mgdarts.net.files import fingerprint
    t = Trainer(arch(), loaders(), CFG, seed=4)
    old = {k: v for k, v in asdict(CFG).items() if k not in ("images", "cutout")}
    assert run_fingerprint(t) == hashlib.sha256(json.dumps([fingerprint(t.arch), old, 4, 3],
                                                        sort_keys=True).encode()).hexdigest()
    others = [Trainer(arch(), loaders(), replace(CFG, cutout=False), seed=4),
              Trainer(arch(), {k: v for k, v in loaders().items() if k != "val"}, replace(CFG, images="train+val"),
                      seed=4)]
    assert len({run_fingerprint(t), *(run_fingerprint(o) for o in others)}) == 3

def test_events(whole):
    t, heard = Trainer(arch(), loaders(), CFG, seed=4), []
    t.events.listen(heard.append, "step", "epoch", "result")
    t.run()
    assert [e.type for e in heard] == (["step"] * 3 + ["epoch"]) * 3 + ["result"] and t.result == whole.result
    assert [e.step for e in heard if e.type == "step"] == list(range(1, 10)) and {e.stage for e in heard} == {"train"}
    epochs = [e for e in heard if e.type == "epoch"]
    assert [e.epoch for e in epochs] == [0, 1, 2] and [e.step for e in epochs] == [3, 6, 9]
    assert abs(epochs[0].loss - sum(e.loss for e in heard[:3]) / 3) < 1e-6
    for e in heard: json.dumps(e.to_dict(), allow_nan=False)
    assert t.history == [{"epoch": e.epoch, "loss": e.loss, **e.data} for e in epochs]

def test_run_until():
    t = Trainer(arch(), loaders(), CFG)
    t.run("step")
    assert (t.epoch, t.epoch_step) == (0, 1)
    t.run("epoch")
    assert (t.epoch, t.epoch_step) == (1, 0)
    assert t.run("epoch") is None and t.epoch == 2 and t.run("epoch") == t.result is not None
    with pytest.raises(InputError): t.run("tomorrow")

@pytest.mark.parametrize("at, check", (((1, 1), 50), ((1, 0), 1)))
def test_non_finite_loss(at, check):
    t = Trainer(arch(), loaders(nan_at=at), CFG, check_every=check)
    with pytest.raises(NonFiniteLoss) as e: t.run()
    assert e.value.epoch == 1 and e.value.step == (2 if check == 50 else 0)
    new = Trainer(arch(), loaders(), CFG)
    new.load_state_dict(t.safe_state)
    assert (new.epoch, new.epoch_step) == (1, 0) and math.isfinite(new.run()["train_loss_final"])

def test_learning_rates():
    c = Train(epochs=10, lr=1., schedule="cosine")
    assert learning_rate(c, 0) == 1
    assert [learning_rate(c, e) for e in range(10)] == sorted((learning_rate(c, e) for e in range(10)), reverse=True)
    assert 0 < learning_rate(c, 9) < .03
    c = replace(c, schedule="linear", warmup=4)
    assert learning_rate(c, 0) == .25 and learning_rate(c, 5) == .5
    assert drop_path(c, 0) == 0 and abs(drop_path(c, 9) - .18) < 1e-12

def test_settings_are_used():
    "Each of them changes the network that comes out."
    base = Trainer(arch(), loaders(), CFG)
    base.run()
    for change in (dict(lr=.04), dict(momentum=0.), dict(weight_decay=.01), dict(schedule="linear"), dict(warmup=0),
                   dict(clip=.01), dict(aux_weight=.1), dict(drop_path=0.), dict(label_smoothing=0.)):
        t = Trainer(arch(), loaders(), replace(CFG, **change))
        t.run()
        assert not t.net.classifier.weight.equal(base.net.classifier.weight), change
    assert Trainer(arch(), loaders(), replace(CFG, aux_weight=0.)).net.aux is None

def test_drop_path_differs_by_step_epoch_and_seed():
    seeds = []
    for seed in (0, 1):
        t = Trainer(arch(), loaders(), CFG, seed=seed)
        t.events.listen(lambda e: seeds.append(t.net.drop_path_generator.initial_seed()), "step")
        t.run()
    assert len(set(seeds)) == 18

def test_no_clipping():
    t = Trainer(arch(), loaders(), replace(CFG, clip=0.))
    t.run()

def test_start_from_given_weights():
    net = DerivedNet(arch(), False, seed=9)
    t = Trainer(arch(), loaders(), CFG, init_state=net.state_dict())
    assert t.net.classifier.weight.equal(net.classifier.weight) and t.net.aux is not None
    state = net.state_dict()
    state.pop("classifier.weight")
    for bad in (state, {**net.state_dict(), "x": torch.ones(1)},
                {**net.state_dict(), "classifier.weight": torch.ones(1)}):
        with pytest.raises(InputError): Trainer(arch(), loaders(), CFG, init_state=bad)

def test_checkpoints_of_other_runs_are_refused():
    t = Trainer(arch(), loaders(), CFG, seed=1)
    s = t.state_dict()
    for other in (Trainer(arch(), loaders(), CFG, seed=2), Trainer(arch(), loaders(), replace(CFG, lr=.1), seed=1),
                  Trainer(replace(arch(), masks={}), loaders(), CFG, seed=1), Trainer(arch(), loaders(steps=4), CFG,
                                                                                      seed=1)):
        with pytest.raises(InputError): other.load_state_dict(s)
    for bad in ({}, None, {"version": 2}):
        with pytest.raises(InputError): t.load_state_dict(bad)

def test_missing_loaders():
    data = loaders()
    data.pop("val")
    with pytest.raises(InputError, match="val"): Trainer(arch(), data, CFG)
    with pytest.raises(InputError, match="step"): Trainer(arch(), loaders(steps=0), CFG)


def test_emitter():
    bus, heard = Emitter(), []
    assert not bus.wants("step")
    off = bus.listen(heard.append, "epoch", "result")
    bus.emit(Event("epoch", 1, 0, "train"))
    bus.emit(Event("step", 1, 0, "train"))
    assert len(heard) == 1 and bus.wants("result") and not bus.wants("step")
    gone = []
    def once(e):
        gone.append(e)
        leave()
    leave = bus.listen(once)
    assert bus.wants("step")
    for _ in range(2): bus.emit(Event("step", 1, 0, "train"))
    off()
    off()
    assert len(gone) == 1 and bus.listeners == []

def test_event_to_dict():
    e = Event("epoch", 3, 1, "train", float("nan"), {"a": torch.tensor([1., math.inf]), 3: (1, {"x": None}), "b": True})
    assert e.to_dict() == {"type": "epoch", "step": 3, "epoch": 1, "stage": "train", "loss": None, "a": [1., None],
                           "3": [1, {"x": None}], "b": True}
    assert "loss" not in Event("x", 0, 0, "s").to_dict()
    with pytest.raises(ValueError): Event("x", 0, 0, "s", None, {"step": 1}).to_dict()
