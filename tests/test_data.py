"Splits, augmentation, batches: nothing but the seed, the epoch and the step decides."
from pathlib import Path
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy
from mgdarts.base import folders
from mgdarts.base.augment import Augment, crop_flip, cutout, draw_places, normalise
from mgdarts.base.autoaugment import autoaugment, draw_changes, policy_of, uniform, words
from mgdarts.base.batches import Loader, epoch_order, train_batch
from mgdarts.base.data import apportion, channel_stats, hold_out, load_data, subset, train_and_val
from mgdarts.base.folders import Source
from mgdarts.base.images import Files
from mgdarts.base.options import Data, InputError, root
from mgdarts.base.randomness import stream
from mgdarts.base.sources import DATASETS, Dataset
from toys import image_folder, picture, refused

# ---- splits and subsets

def numbered(monkeypatch, per_class=(40, 30, 20), test=(8, 6, 4)):
    "A source whose images carry their own number."
    def source(folder, cfg):
        def make(sizes, first):
            labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            x = (torch.arange(len(labels)) + first).to(torch.uint8)[:, None, None, None]
            return x.expand(-1, 1, 4, 4).contiguous(), labels
        return Source(*make(per_class, 0), *make(test, 150), [str(c) for c in range(len(per_class))], 4)
    monkeypatch.setitem(DATASETS, "numbered", Dataset("numbered", source))

def test_splits_are_disjoint_and_stratified(monkeypatch):
    numbered(monkeypatch)
    d = load_data(Data(name="numbered", val_fraction=.1), 0)
    train, val, test = (set(s.images[:, 0, 0, 0].tolist()) for s in (d.train, d.val, d.test))
    assert len(train) == 81 and len(val) == 9 and len(test) == 18 and not train & val and not (train | val) & test
    assert d.val.labels.bincount().tolist() == [4, 3, 2] and d.train.labels.bincount().tolist() == [36, 27, 18]
    assert (d.num_classes, d.in_channels, d.size, d.label) == (3, 1, 4, "numbered")

@pytest.mark.parametrize("amount,want", [(45, [20, 15, 10]), (0.5, [20, 15, 10]), (47, [21, 16, 10]),
                                         (1.0, [40, 30, 20]), (90, [40, 30, 20])])
def test_subset_is_exact(amount, want):
    labels = torch.arange(3).repeat_interleave(torch.tensor([40, 30, 20]))
    chosen = subset(labels, amount, 3, stream(0))
    assert len(chosen.unique()) == len(chosen) == sum(want) and labels[chosen].bincount().tolist() == want

def test_every_class_stays():
    labels = torch.arange(3).repeat_interleave(torch.tensor([100, 2, 2]))
    assert labels[subset(labels, 5, 3, stream(0))].bincount().tolist() == [3, 1, 1]
    keep, held = hold_out(labels, .9, 3, stream(0))
    assert labels[keep].bincount().min() == labels[held].bincount(minlength=3).min() == 1
    assert len(held) == round(.9 * 104)

def test_apportion_sums_and_bounds():
    g = stream("apportion")
    for _ in range(200):
        sizes = (torch.randint(1, 40, (7,), generator=g)).tolist()
        total = int(torch.randint(7, sum(sizes) + 1, (), generator=g))
        out = apportion(sizes, total, sizes)
        assert sum(out) == total and all(1 <= x <= s for x, s in zip(out, sizes))

def test_seed_chooses_training_images_but_not_the_test_set():
    a, b, c = (load_data(Data(subset=300, test_subset=100), s) for s in (0, 0, 1))
    assert a.train.images.equal(b.train.images) and a.fingerprint == b.fingerprint
    assert not a.train.images.equal(c.train.images) and a.fingerprint != c.fingerprint
    assert a.test.images.equal(c.test.images)

SMALL = "training subset is too small"

@pytest.mark.parametrize("setting,match", [
    (dict(subset=5), "data.subset=5 is too small"), (dict(subset=0.001), "too small"),
    (dict(subset=1e6), "more than the 1438"), (dict(subset=20.5), "whole number"),
    (dict(test_subset=3), "data.test_subset=3 is too small"), (dict(subset=20), SMALL), (dict(subset=10), SMALL),
    (dict(subset=100, val_fraction=.95), SMALL)])
def test_bad_subsets(setting, match): refused(match, Data(**setting))

# ---- augmentation

def test_crop_flip_against_a_slow_reference():
    x, pad = torch.randint(1, 256, (32, 3, 8, 8), generator=stream(0), dtype=torch.uint8), 2
    out, g = crop_flip(x, pad, draw_places(32, pad, True, stream(1))), stream(1)
    top, left = torch.randint(2 * pad + 1, (2, 32, 1), generator=g).tolist()
    mirror = (torch.rand(32, 1, generator=g) < .5).tolist()
    for i in range(32):
        canvas = torch.zeros(3, 12, 12, dtype=torch.uint8)
        canvas[:, 2:10, 2:10] = x[i]
        want = canvas[:, top[i][0]:top[i][0] + 8, left[i][0]:left[i][0] + 8]
        assert out[i].equal(want.flip(-1) if mirror[i][0] else want)
    assert {t[0] for t in top} == {a[0] for a in left} == set(range(5)) and 5 < sum(m[0] for m in mirror) < 27

def test_cutout_against_a_slow_reference():
    centres = torch.randint(8, (2, 64), generator=stream(0))
    out = cutout(torch.ones(64, 2, 8, 8), 4, centres)
    for i in range(64):
        want = torch.ones(2, 8, 8)
        r, c = centres[:, i].tolist()
        want[:, max(0, r - 2):r + 2, max(0, c - 2):c + 2] = 0
        assert out[i].equal(want)

def one_by_one(x, g, policy="cifar10"):
    "torchvision's AutoAugment, image by image, with a seed from `g` for its generator."
    change, seed = AutoAugment(AutoAugmentPolicy(policy), fill=128), int(torch.randint(2 ** 62, (), generator=g))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([change(image) for image in x])

def autoaugmented(x, g, name="cifar10"):
    policy = policy_of(name, x.shape[-1])
    return autoaugment(x.clone(), policy, *draw_changes(len(x), policy, g))

@pytest.mark.parametrize("policy", ["cifar10", "imagenet"])
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("side", [8, 28, 32])
def test_autoaugment_is_torchvisions_to_the_last_bit(side, c, policy):
    "All pairs of operations come up, with both signs; some images are even, some have few levels, some are noise."
    x = torch.stack([picture(i, c, side, side) for i in range(500)])
    x[::13] //= 7
    x[::17] = 77
    x[::5] = torch.randint(256, x[::5].shape, generator=stream(9), dtype=torch.uint8)
    state = torch.get_rng_state()
    a, b, other = (autoaugmented(x, stream(n), policy) for n in (0, 0, 1))
    assert torch.get_rng_state().equal(state)
    assert a.dtype == torch.uint8 and a.equal(b) and a.equal(one_by_one(x, stream(0), policy)) and not a.equal(other)
    changed = (a != x).flatten(1).any(1)
    assert 0.5 < changed.float().mean() < 1 # each image its own draw

def test_autoaugment_of_large_images_and_of_none():
    x = torch.stack([picture(i, 3, 224, 224) for i in range(30)])
    assert autoaugmented(x, stream(0), "imagenet").equal(one_by_one(x, stream(0), "imagenet"))
    assert autoaugmented(x[:0], stream(0)).shape == (0, 3, 224, 224)

def test_the_words_of_the_generator_make_its_numbers():
    for seed in range(20):
        g, w = stream(seed), iter(words(stream(seed), 700)) # more than the generator makes at once
        for _ in range(350):
            assert int(torch.randint(25, (), generator=g)) == next(w) % 25
            assert float(torch.rand((), generator=g)) == uniform(next(w))

def test_the_policy_reaches_the_batches(tmp_path):
    image_folder(tmp_path, "toy", 30, 3)
    d = load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.1), 0)
    def batch(**k): return Loader(d, "train", 50, 0, Augment.of(Data(**k))).batch(0, 0)[0]
    assert batch(policy="cifar10").equal(batch()) and not batch(policy="imagenet").equal(batch())
    assert batch(policy="imagenet", autoaugment=False).equal(batch(autoaugment=False))

def test_training_on_the_images_of_validation_too(tmp_path, monkeypatch):
    image_folder(tmp_path, "toy", 20, 5)
    cfg = Data(name="toy", dir=str(tmp_path), subset=30, val_fraction=.2)
    for limit in (2 << 30, 100): # decoded at once, and on disk
        monkeypatch.setattr(folders, "IN_MEMORY", limit)
        d = load_data(cfg, 0)
        every = train_and_val(d)
        def content(*splits):
            pairs = ((x, y) for s in splits for x, y in zip(s.images[torch.arange(len(s))], s.labels))
            return sorted((x.numpy().tobytes(), int(y)) for x, y in pairs)
        assert isinstance(d.train.images, Files) == (limit == 100) and content(every.train) == content(d.train, d.val)
        assert len(every.train) == 30 and every.val is None and len(d.val) == 6
        assert content(every.test) == content(d.test) and every.fingerprint == d.fingerprint
        assert every.mean.equal(every.test.mean) and not every.mean.equal(d.mean)
        assert every.mean.equal(channel_stats(every.train.images)[0])

def test_augment_sizes():
    assert Augment().at(32) == Augment(4, True, 16) and Augment().at(16) == Augment(2, True, 8)
    assert Augment(0, False, 0).at(8) == Augment(0, False, 0)
    assert Augment.of(Data(crop=1, flip=False), autoaugment=False) == Augment(1, False, -1, False)
    with pytest.raises(InputError, match="data.crop=9 is more than the image side 8"): Augment(crop=9).at(8)

# ---- batches

def test_order():
    batches = epoch_order(103, 10, 0, 4)
    assert len(batches) == 10 and len(torch.cat(batches).unique()) == 100 and all(len(b) == 10 for b in batches)
    assert torch.cat(epoch_order(103, 10, 0, 4, drop_last=False)).sort().values.equal(torch.arange(103))
    assert [len(b) for b in epoch_order(7, 10, 0, 0)] == [7] and len(epoch_order(20, 10, 0, 0)) == 2
    def order(*key): return torch.cat(epoch_order(103, 10, *key)).tolist()
    assert order(0, 4) == order(0, 4) and order(0, 4) != order(0, 5) and order(0, 4) != order(1, 4)

@pytest.mark.parametrize("n,batch,drop", [(360, 64, True), (360, 64, False), (360, 1000, True), (360, 360, True),
                                          (360, 90, False)])
def test_length_of_an_epoch(n, batch, drop):
    loader = Loader(load_data(Data(subset=400), 0), batch=batch, drop_last=drop)
    assert len(loader) == len(loader.order(0)) == len(loader.order(9))

@pytest.mark.parametrize("auto", [False, True])
def test_batches_depend_on_seed_epoch_and_step_alone(auto):
    d = load_data(Data(subset=400), 0)
    def make(seed=0): return Loader(d, "train", 64, seed, Augment(autoaugment=auto))
    a = make()
    ahead = [a.batch(e, s) for e in (0, 1) for s in range(len(a))]
    torch.manual_seed(99) # the global generator does not matter
    b = make()
    for k in reversed(range(len(ahead))): # nor does what was asked before
        x, y = b.batch(k // len(b), k % len(b))
        assert x.equal(ahead[k][0]) and y.equal(ahead[k][1])
    assert not make(1).batch(0, 0)[0].equal(ahead[0][0])
    i = torch.arange(64)
    def draw(*key): return train_batch(d.train, i, a.augment, *key)[0]
    assert draw(0, 0, 0).equal(draw(0, 0, 0))
    assert all(not draw(0, 0, 0).equal(draw(*k)) for k in ((0, 0, 1), (0, 1, 0), (1, 0, 0)))

@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 100])
def test_draws_in_blocks(steps, drop):
    "Whatever is drawn at once, from wherever one begins, and back and forth: the same batches."
    d, how = load_data(Data(subset=400), 0), Augment(autoaugment=True)
    a = Loader(d, "train", 64, 0, how, drop)
    a.block = steps
    n = len(a)
    for k in (2, 3, n - 1, n, n + 1, 3 * n, 1, 0):
        (x, y), order = a.batch(k // n, k % n), a.order(k // n)[k % n]
        want, labels = train_batch(d.train, order, how, 0, k // n, k % n)
        assert x.equal(want) and y.equal(labels)

class OnDevice(TorchDispatchMode):
    """Tensors that are marked lie on a device, as does what is computed from them. Notes what would copy between it
    and the host, ask it for a value, or depend on one in its shape, and where marked and plain tensors meet."""
    ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "item", "unique", "_unique2", "bincount")
    ALONE = ("arange", "ones", "zeros", "full", "empty", "new_zeros", "new_ones", "full_like", "linspace", "tensor",
             "scalar_tensor") # made on the device, of nothing

    def __init__(self, *tensors):
        super().__init__()
        self.there, self.seen = list(tensors), []
        self.ids = {id(t) for t in tensors}
    def mark(self, *tensors):
        self.there += tensors # kept, so that no other gets their id
        self.ids |= {id(t) for t in tensors}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [id(t) in self.ids for t in given]
        out = func(*args, **(kwargs or {}))
        if name in self.ASKS: self.seen.append(name)
        if name in ("lift_fresh", "copy_", "_to_copy") and not any(there): self.seen.append(f"{name} from the host")
        mixed = [t for t, t_there in zip(given, there) if not t_there and t.dim()]
        if any(there) and mixed: self.seen.append(f"{name} of both")
        indices = args[1] if name in ("index", "index_put_") else ()
        if any(i is not None and i.dtype == torch.bool for i in indices): self.seen.append(f"{name} by a mask")
        if any(there) or name in self.ALONE: self.mark(*(t for t in tree_leaves(out) if isinstance(t, torch.Tensor)))
        return out

def on_device(loader):
    s = loader.split
    policy = [getattr(loader.views.policy, k) for k in ("places", "levels", "shares")] if loader.views.policy else []
    return OnDevice(s.images, s.labels, s.mean, s.std, *policy)

@pytest.mark.parametrize("policy", ["cifar10", "imagenet"])
def test_a_step_copies_nothing_to_or_from_the_device_of_the_images(policy):
    loader = Loader(load_data(Data(subset=600), 0), "train", 64, 0, Augment(autoaugment=True, policy=policy))
    want = [loader.batch(2, k) for k in range(len(loader))]
    with on_device(loader) as device:
        for k in range(len(loader)):
            drawn = loader.drawn(2, k)
            device.mark(drawn.numbers, drawn.changes) # they were moved when the epoch began
            x, y = loader.batch(2, k)
            assert id(x) in device.ids and id(y) in device.ids and not device.seen
    assert all(x.equal(loader.batch(2, k)[0]) for k, (x, _) in enumerate(want)) # the images themselves stay

def test_what_would_copy_is_noticed():
    loader = Loader(load_data(Data(subset=600), 0), "train", 64, 0, Augment())
    images, labels = loader.split.images, loader.split.labels
    for slow in (lambda: images[torch.arange(4) + loader.order(0)[0][:4]], lambda: images[:4].float().mean().item(),
                 lambda: labels[labels > 3], lambda: images[0, 0] + torch.tensor([[1] * 8]), lambda: labels.nonzero()):
        loader.order(0)
        with on_device(loader) as device: slow()
        assert device.seen

def test_an_epoch_is_moved_in_two_copies(monkeypatch):
    moved, to = [], torch.Tensor.to
    loader = Loader(load_data(Data(subset=600), 0), "train", 64, 0, Augment(autoaugment=True))
    loader.views # its tables lie there already
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: moved.append(t) or to(t, *a, **k))
    for epoch in (0, 1): loader.drawn(epoch, 3), loader.drawn(epoch, 0), loader.drawn(epoch, 7)
    assert len(moved) == 4 and sum(t.numel() * 8 for t in moved) < 2 * 600 * 80

def test_plain_batches():
    d = load_data(Data(subset=400), 0)
    x, y = train_batch(d.train, torch.tensor([5, 2]), None, 0, 0, 0)
    assert x.equal(normalise(d.train.images[[5, 2]], d.mean, d.std)) and y.equal(d.train.labels[[5, 2]])
    assert torch.cat([y for _, y in Loader(d, "test").eval(50)]).equal(d.test.labels)

def test_channels_last():
    x = normalise(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((3,), .5), torch.full((3,), .25))
    assert x.is_contiguous(memory_format=torch.channels_last) and torch.allclose(x, torch.tensor(-2.))

# ---- the project's folder, and the real images

def test_root(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.delenv("MGDARTS_ROOT", raising=False)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert root() == tmp_path
    monkeypatch.setenv("MGDARTS_ROOT", str(tmp_path / "a"))
    assert root() == tmp_path / "a"
    monkeypatch.setenv("MGDARTS_ROOT", str(tmp_path / "none"))
    with pytest.raises(InputError, match="MGDARTS_ROOT"): root()

def test_real_images():
    base = Path(__file__).parents[1] / "data"
    if not (base / "cifar10-jpeg").is_dir(): pytest.skip("data/cifar10-jpeg is not unpacked")
    d = load_data(Data(name="cifar10-jpeg", dir=str(base), size=16, subset=3000, test_subset=2000), 0)
    assert [len(s) for s in (d.train, d.val, d.test)] == [2700, 300, 2000] and d.label == "cifar10-jpeg"
    assert d.in_channels == 3 and d.num_classes == 10
    assert d.train.labels.bincount().tolist() == [270] * 10 and d.test.labels.bincount().tolist() == [200] * 10
    assert torch.allclose(d.mean, torch.tensor([.4914, .4822, .4465]), atol=.015)
