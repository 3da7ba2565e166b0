"Data: sources, splits, augmentation, batches. Fake datasets are made in a temporary folder."
import gzip, hashlib, os, pickle, shutil
from pathlib import Path
import numpy as np, pytest, torch, torchvision
from PIL import Image
from mgdarts.runs.folder import read_record
from mgdarts.base import folders, sources
from mgdarts.base.augment import Augment, autoaugment, crop_flip, cutout, normalise
from mgdarts.base.batches import Loader, epoch_order, eval_batches, train_batch
from mgdarts.base.data import apportion, channel_stats, hold_out, load_data, subset, train_and_val
from mgdarts.base.folders import Source
from mgdarts.base.images import Files, crop_box, decode, fit, resize
from mgdarts.base.options import Data, InputError, root
from mgdarts.methods.registry import preset
from mgdarts.base.randomness import stream
from mgdarts.base.sources import DATASETS, Dataset, open_source, read_idx
from mgdarts.runs import run as runs

def picture(key, c=3, h=12, w=12):
    "A smooth random image, the same for the same key."
    return resize(torch.randint(0, 256, (c, 4, 4), generator=stream(key), dtype=torch.uint8), h, w)

def write(image, path): Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(path)

def image_folder(base, name="toy", train=6, test=3, splits=("train", "test"), classes=("cat", "dog"), c=3, h=12, w=12):
    "base/name/split/class/NNN.png"
    for split, n in zip(splits, (train, test)):
        for cls in classes:
            (base / name / split / cls).mkdir(parents=True)
            for i in range(n): write(picture((split, cls, i), c, h, w), base / name / split / cls / f"{i:03}.png")
    return base / name

def refused(match, cfg, seed=0):
    with pytest.raises(InputError, match=match) as e: load_data(cfg, seed)
    assert "\n" not in str(e.value)

def ids(split): return {x.numpy().tobytes() for x in split.images}

# ---- splits and subsets

def numbered(monkeypatch, per_class=(40, 30, 20), test=(8, 6, 4)):
    "A source whose images carry their own number."
    def source(folder, cfg):
        def make(sizes, first):
            labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            return (torch.arange(len(labels)) + first).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous(), labels
        return Source(*make(per_class, 0), *make(test, 150), [str(c) for c in range(len(per_class))], 4)
    monkeypatch.setitem(DATASETS, "numbered", Dataset("numbered", source))

def test_splits_are_disjoint_and_stratified(monkeypatch):
    numbered(monkeypatch)
    d = load_data(Data(name="numbered", val_fraction=.1), 0)
    train, val, test = (set(s.images[:, 0, 0, 0].tolist()) for s in (d.train, d.val, d.test))
    assert len(train) == 81 and len(val) == 9 and len(test) == 18 and not train & val and not (train | val) & test
    assert d.val.labels.bincount().tolist() == [4, 3, 2] and d.train.labels.bincount().tolist() == [36, 27, 18]
    assert (d.num_classes, d.in_channels, d.size, d.label) == (3, 1, 4, "numbered")

@pytest.mark.parametrize("amount,want", [(45, [20, 15, 10]), (0.5, [20, 15, 10]), (47, [21, 16, 10]), (1.0, [40, 30, 20]), (90, [40, 30, 20])])
def test_subset_is_exact(amount, want):
    labels = torch.arange(3).repeat_interleave(torch.tensor([40, 30, 20]))
    chosen = subset(labels, amount, 3, stream(0))
    assert len(chosen.unique()) == len(chosen) == sum(want) and labels[chosen].bincount().tolist() == want

def test_every_class_stays():
    labels = torch.arange(3).repeat_interleave(torch.tensor([100, 2, 2]))
    assert labels[subset(labels, 5, 3, stream(0))].bincount().tolist() == [3, 1, 1]
    keep, held = hold_out(labels, .9, 3, stream(0))
    assert labels[keep].bincount().min() == labels[held].bincount(minlength=3).min() == 1 and len(held) == round(.9 * 104)

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
    assert not a.train.images.equal(c.train.images) and a.fingerprint != c.fingerprint and a.test.images.equal(c.test.images)

@pytest.mark.parametrize("setting,match", [(dict(subset=5), "data.subset=5 is too small"), (dict(subset=0.001), "too small"), (dict(subset=1e6), "more than the 1438"),
    (dict(subset=20.5), "whole number"), (dict(test_subset=3), "data.test_subset=3 is too small"), (dict(subset=20), "training subset is too small"),
    (dict(subset=10), "training subset is too small"), (dict(subset=100, val_fraction=.95), "training subset is too small")])
def test_bad_subsets(setting, match): refused(match, Data(**setting))

# ---- sources

OUTSIDE = """
import numpy as np
from mgdarts.base.folders import Source
from mgdarts.base.sources import Dataset, register

def stripes(folder, cfg):
    "Bright lines across or along, in two colours."
    def make(n, rng):
        y = np.arange(n) % 2
        x = rng.integers(0, 80, (n, 3, 8, 8), dtype=np.uint8)
        for i, k in enumerate(rng.integers(0, 8, n)): (x[i, 1, k, :] if y[i] else x[i, 1, :, k])[:] = 250
        return x, y
    return Source(*make(200, np.random.default_rng(0)), *make(60, np.random.default_rng(1)), ["along", "across"], origin="made")

register(Dataset("stripes", stripes, "lines across or along", classes=2, size=8))
"""

def test_a_dataset_from_outside(tmp_path, monkeypatch):
    "Twenty lines in somebody else's file, and its name is searched on, retrained and recorded."
    monkeypatch.setattr(sources, "DATASETS", dict(DATASETS))
    refused("unknown dataset 'stripes'", Data(name="stripes"))
    assert len(OUTSIDE.strip().splitlines()) <= 20
    exec(OUTSIDE, {})
    few = {"data.subset": 1.0, "search.warmup": 0, "search.max_epochs": 2, "search.prune_every": 1, "train.epochs": 3, "train.batch": 16}
    result = runs.search(preset("smoke", **{"data.name": "stripes", **few}), tmp_path / "run")
    record, trained = read_record(tmp_path / "run"), runs.retrain(tmp_path / "run")
    assert result["run"] and (record["dataset"], record["data_source"]) == ("stripes", "made") and record["images"]["test"] == 60
    assert trained["test_acc_final"] > 90  # colour and direction are plain to see
    refused("did you mean 'stripes'.*known: .*, stripes", Data(name="stripe"))

@pytest.mark.parametrize("images,labels,match", [(np.zeros((4, 8, 8)), [0, 1, 0, 1], "uint8"), (np.zeros((4, 8, 8), np.uint8), [0, 1, 0], "one for each image"),
    (np.zeros((4, 8, 8), np.uint8), [0, 1, 2, 1], "from 0 to 1"), (np.zeros((0, 8, 8), np.uint8), [], "one or more"), (np.zeros((4, 8), np.uint8), [0, 1, 0, 1], "uint8")])
def test_arrays_that_are_no_dataset(images, labels, match):
    with pytest.raises(InputError, match=match): Source(images, labels, images, labels, ["a", "b"])

def test_digits_and_statistics():
    d = load_data(Data(), 0)
    assert (d.num_classes, d.in_channels, d.size, d.label) == (10, 1, 8, "digits") and len(d.train) + len(d.val) + len(d.test) == 1797
    assert d.train.images.dtype == torch.uint8 and d.train.labels.dtype == torch.int64 and len(d.fingerprint) == 64
    x = torch.cat([x for x, _ in eval_batches(d.train)])
    assert x.dtype == torch.float32 and abs(x.mean()) < 1e-4 and abs(x.std(correction=0) - 1) < 1e-4
    assert load_data(Data(size=16), 0).train.images.shape[1:] == (1, 16, 16)

def test_statistics_a_channel():
    images = torch.randint(0, 200, (50, 3, 6, 6), generator=stream(0), dtype=torch.uint8)
    mean, std = channel_stats(images)
    ref = images.double() / 255
    torch.testing.assert_close(mean, ref.mean((0, 2, 3)).float()); torch.testing.assert_close(std, ref.std((0, 2, 3), correction=0).float())
    assert channel_stats(torch.full((3, 1, 2, 2), 7, dtype=torch.uint8))[1] > 0

KINDS = pytest.mark.parametrize("kind,key", [("CIFAR10", "cifar10"), ("CIFAR100", "cifar100")])

def fake_cifar(base, kind, monkeypatch):
    "A tiny archive, unpacked, whose checksums torchvision takes for the published ones: 40 and 20 images of two classes, no two alike. (class, function that writes one of its files, pixels and labels by split)."
    cls, label = getattr(torchvision.datasets, kind), {"CIFAR10": "labels", "CIFAR100": "fine_labels"}[kind]
    (base / cls.base_folder).mkdir(parents=True)
    def put(name, obj):
        raw = pickle.dumps(obj); (base / cls.base_folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()
    splits = {n: (np.random.default_rng(i).integers(0, 256, (k, 3072), dtype=np.uint8), [0, 1] * (k // 2)) for i, (n, k) in enumerate((("train", 40), ("test", 20)))}
    for n, file in (("train", "a"), ("test", "b")): monkeypatch.setattr(cls, f"{n}_list", [[file, put(file, {"data": splits[n][0], label: splits[n][1]})]])
    monkeypatch.setattr(cls, "meta", {"filename": "m", "key": "names", "md5": put("m", {"names": ["x", "y"]})})
    monkeypatch.setattr(cls, "url", "file:///nowhere/at/all")
    return cls, lambda name, data, labels: put(name, {"data": data, label: labels}), splits

def as_folder(base, key, splits, monkeypatch):
    "The same images as an image folder, in another order, and the digest that they have."
    lines = []
    for n, (pixels, labels) in splits.items():
        for i, (row, y) in enumerate(zip(pixels[::-1], labels[::-1])):
            image = torch.from_numpy(row.reshape(3, 32, 32).copy())
            (base / key / n / "xy"[y]).mkdir(parents=True, exist_ok=True)
            write(image, base / key / n / "xy"[y] / f"{i:03}.png")
            lines.append(f"{n}/{'xy'[y]}/{hashlib.sha256(image.permute(1, 2, 0).numpy().tobytes()).hexdigest()}")
    monkeypatch.setitem(sources.DIGESTS, key, hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest())
    return base / key

def pairs(images, labels): return sorted((x.numpy().tobytes(), int(y)) for x, y in zip(images, labels))

@KINDS
def test_cifar_is_read_through_its_checksums(kind, key, tmp_path, monkeypatch):
    cls, put, splits = fake_cifar(tmp_path, kind, monkeypatch)
    s = open_source(Data(name=key, dir=str(tmp_path)))
    assert s.classes == ["x", "y"] and s.origin == "archive, md5 verified" and s.train.shape == (40, 3, 32, 32)
    for n in ("train", "test"): # every image with its own label, and none else
        assert pairs(getattr(s, n), getattr(s, f"{n}_labels")) == sorted((x.tobytes(), y) for x, y in zip(*splits[n]))
    put("a", splits["train"][0], [1, 0] * 20) # another file under the same name is not opened
    refused(f"no intact {kind}.*put {cls.filename} there.*{key}/train/<class>", Data(name=key, dir=str(tmp_path)))

@KINDS
def test_cifar_is_the_same_from_an_archive_and_from_a_folder(kind, key, tmp_path, monkeypatch):
    cls, put, splits = fake_cifar(tmp_path / "a", kind, monkeypatch)
    as_folder(tmp_path / "b", key, splits, monkeypatch)
    monkeypatch.setattr(cls, "download", lambda self: pytest.fail("asked the network") if not self._check_integrity() else None)
    a, b = (load_data(Data(name=key, dir=str(tmp_path / d), val_fraction=.2), 3) for d in "ab")
    for n in ("train", "val", "test"): assert getattr(a, n).images.equal(getattr(b, n).images) and getattr(a, n).labels.equal(getattr(b, n).labels)
    assert a.fingerprint == b.fingerprint and a.classes == b.classes and a.label == b.label == key and a.train.labels[:8].unique().tolist() == [0, 1]
    assert (a.origin, b.origin) == ("archive, md5 verified", "image folder, digest verified")
    shutil.copytree(tmp_path / "b" / key, tmp_path / "a" / key) # where both are, the archive is read; a damaged one is passed over, and nothing is fetched
    assert load_data(Data(name=key, dir=str(tmp_path / "a")), 3).origin == "archive, md5 verified"
    put("a", splits["train"][0], [1, 0] * 20)
    assert load_data(Data(name=key, dir=str(tmp_path / "a")), 3).origin == "image folder, digest verified"

def test_an_exact_folder_is_verified_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    _, _, splits = fake_cifar(tmp_path / "other", "CIFAR10", monkeypatch)
    folder, cfg = as_folder(tmp_path, "cifar10", splits, monkeypatch), Data(name="cifar10", dir=str(tmp_path))
    first, cache = load_data(cfg, 0), folder / ".mgdarts-cache-exact.safetensors"
    with monkeypatch.context() as m:
        m.setattr(sources, "decode", lambda *a, **k: pytest.fail("decoded again"))
        assert load_data(cfg, 0).fingerprint == first.fingerprint and cache.is_file()
    file = next((folder / "train" / "x").iterdir())
    file.rename(file.with_name("renamed.png")) # the same images under other names
    assert load_data(cfg, 0).fingerprint == first.fingerprint
    file, before = file.with_name("renamed.png"), file.with_name("renamed.png").read_bytes()
    at, size = file.stat().st_mtime_ns, len(before)
    file.write_bytes(bytes(size)); os.utime(file, ns=(at + 1, at + 1)) # of the same size
    refused("cifar10 does not hold CIFAR10 pixel for pixel: .*renamed.png is no readable image of 32x32.*rename the folder", cfg)
    image = decode(str(next((folder / "train" / "y").iterdir()))).clone()
    image[0, 0, 0] ^= 1 # one level of one pixel
    write(image, file)
    refused("cifar10 does not hold CIFAR10 pixel for pixel: the digest of its 60 images is .*rename the folder and give its new name as data.name", cfg)
    file.write_bytes(before)
    assert load_data(cfg, 0).fingerprint == first.fingerprint
    write(picture("small", h=16, w=16), folder / "test" / "y" / "more.png")
    refused("more.png is no readable image of 32x32", cfg)
    folder.rename(tmp_path / "mine")
    (tmp_path / "mine/test/y/more.png").unlink()
    assert (own := load_data(Data(name="mine", dir=str(tmp_path)), 0)).origin == "image folder" and own.label == "mine" and len(own.test) == 20
    (tmp_path / "cifar10" / "train" / "x").mkdir(parents=True) # half unpacked
    refused("x has no images: unpack", cfg)

def test_a_decoded_folder_notices_a_replaced_file_of_the_same_size(tmp_path):
    folder, cfg = image_folder(tmp_path), Data(name="toy", dir=str(tmp_path), val_fraction=.34)
    file, seen = folder / "train" / "cat" / "000.png", []
    for level in (7, 9):
        Image.fromarray(np.full((12, 12, 3), level, np.uint8)).save(file)
        file.write_bytes(file.read_bytes().ljust(200, b"\0")) # what follows the end of a PNG means nothing
        os.utime(file, ns=(0, level))
        d = load_data(cfg, 0)
        seen.append((file.stat().st_size, [any((x == n).all() for s in (d.train, d.val) for x in s.images) for n in (7, 9)]))
    assert seen == [(200, [True, False]), (200, [False, True])]

@pytest.mark.parametrize("name,classes,mean", [("cifar10", 10, (.49139968, .48215841, .44653091)), ("cifar100", 100, (.50707516, .48654887, .44091784))])
def test_the_published_images(name, classes, mean):
    "With every pixel: the digest holds, and the means are those that everybody normalises by. From the unpacked set, else from lossless sheets of its images."
    base, sheets = Path(__file__).parents[1] / "data", Path(os.environ.get("MGDARTS_SHARED", Path(__file__).parents[2] / "shared")) / f"data/{name}-sheets"
    if (base / name / "train").is_dir(): s = open_source(Data(name=name, dir=str(base)))
    elif not sheets.is_dir(): pytest.skip(f"neither {base / name}/train nor {sheets} is there")
    else: s = from_sheets(sheets, {"train": 50_000 // classes, "test": 10_000 // classes})
    assert s.origin in ("image folder, digest verified", "archive, md5 verified", "sheets") and len(s.classes) == classes and s.classes == sorted(s.classes)
    assert s.train.shape == (50_000, 3, 32, 32) and s.test.shape == (10_000, 3, 32, 32) and s.train_labels.bincount().tolist() == [50_000 // classes] * classes
    assert torch.allclose(channel_stats(s.train)[0].double(), torch.tensor(mean, dtype=torch.float64), atol=1e-7)
    lines = [f"{n}/{s.classes[y]}/{hashlib.sha256(x.permute(1, 2, 0).contiguous().numpy()).hexdigest()}" for n in ("train", "test") for x, y in zip(getattr(s, n), getattr(s, f"{n}_labels").tolist())]
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == sources.DIGESTS[name]

def from_sheets(folder, count):
    "A picture a class, in which the images stand row by row, split by split."
    parts, names = [], sorted(p.stem for p in (folder / "train").iterdir())
    for n, k in count.items():
        tiles = [np.asarray(Image.open(folder / n / f"{c}.webp").convert("RGB")) for c in names]
        tiles = [a.reshape(a.shape[0] // 32, 32, -1, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)[:k] for a in tiles]
        parts += sources.by_checksum(np.concatenate(tiles), np.arange(len(names)).repeat(k))[:2]
    return Source(*parts, names, origin="sheets")

def write_fashion(folder, n=(40, 20), labels=None):
    folder.mkdir(parents=True)
    for part, k in zip(("train", "t10k"), n):
        y = bytes(i % 10 for i in range(k)) if labels is None else labels
        x = np.random.default_rng(k).integers(0, 256, k * 784, dtype=np.uint8).tobytes()
        size = lambda *d: b"".join(i.to_bytes(4, "big") for i in d)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + size(k, 28, 28) + x))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + size(len(y)) + y) # this one unpacked

@pytest.mark.parametrize("place", ["fashion-mnist", "FashionMNIST/raw", "debian"])
def test_fashion_mnist_is_found(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEBIAN_FASHION", tmp_path / "debian")
    write_fashion(tmp_path / place)
    s = open_source(Data(name="fashion-mnist", dir=str(tmp_path)))
    assert s.train.shape == (40, 1, 28, 28) and s.test.shape == (20, 1, 28, 28) and s.train_labels.tolist() == [i % 10 for i in range(40)] and s.size == 28

def test_fashion_mnist_damaged_or_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEBIAN_FASHION", tmp_path / "debian")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["file:///nowhere/at/all/"])
    cfg = Data(name="fashion-mnist", dir=str(tmp_path))
    refused("no Fashion-MNIST.*train-images-idx3-ubyte.gz.*dataset-fashion-mnist", cfg)
    write_fashion(tmp_path / "fashion-mnist")
    file = tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    refused("train-images-idx3-ubyte.gz is damaged", cfg)
    file.write_bytes(file.read_bytes()[:200] + b"\xff" * 200)
    refused("train-images-idx3-ubyte.gz is damaged", cfg)
    write_fashion(tmp_path / "debian", labels=bytes(7))
    for f in (tmp_path / "fashion-mnist").iterdir(): f.unlink()
    refused("do not hold Fashion-MNIST", cfg)

@pytest.mark.parametrize("raw", [b"", b"\0\0", b"\0\0\x08\x01\0\0", b"\0\0\x09\x01\0\0\0\1\0", b"\0\0\x08\x01\0\0\0\2\0"])
def test_bad_idx(raw, tmp_path):
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(InputError, match="damaged"): read_idx(tmp_path / "f")

# ---- image folders

def test_folder(tmp_path):
    image_folder(tmp_path)
    cfg = Data(name="toy", dir=str(tmp_path), val_fraction=.34)
    d = load_data(cfg, 0)
    assert d.classes == ["cat", "dog"] and d.size == 12 and d.in_channels == 3 and d.label == "toy"
    assert [len(s) for s in (d.train, d.val, d.test)] == [8, 4, 6]
    want = {picture((s, c, i)).numpy().tobytes() for s, c, i in (("train", c, i) for c in ("cat", "dog") for i in range(6))}
    assert ids(d.train) | ids(d.val) == want and not ids(d.train) & ids(d.val)
    assert ids(d.test) == {picture(("test", c, i)).numpy().tobytes() for c in ("cat", "dog") for i in range(3)}
    for x, y in zip(d.test.images, d.test.labels): assert x.numpy().tobytes() in {picture(("test", d.classes[y], i)).numpy().tobytes() for i in range(3)}

def test_folder_cache(tmp_path, monkeypatch):
    folder, cfg = image_folder(tmp_path), Data(name="toy", dir=str(tmp_path), val_fraction=.34)
    first = load_data(cfg, 0)
    cache = folder / ".mgdarts-cache-own.safetensors"
    assert cache.is_file() and sorted(p.name for p in folder.iterdir()) == [cache.name, "test", "train"]
    with monkeypatch.context() as m:
        m.setattr(folders, "decode_all", lambda *a, **k: pytest.fail("decoded again"))
        assert load_data(cfg, 0).fingerprint == first.fingerprint
    cache.write_bytes(cache.read_bytes()[:-5]) # cut off: made again
    assert load_data(cfg, 0).fingerprint == first.fingerprint
    write(picture("new", h=12, w=12), folder / "train" / "cat" / "new.png") # another listing: made again
    assert len(load_data(cfg, 0).train) + len(load_data(cfg, 0).val) == 13
    assert load_data(Data(name="toy", dir=str(tmp_path), size=6, val_fraction=.34), 0).size == 6 and (folder / ".mgdarts-cache-6.safetensors").is_file()

def test_damaged_images_are_skipped_when_asked(tmp_path, monkeypatch):
    folder, cfg = image_folder(tmp_path), dict(name="toy", dir=str(tmp_path), val_fraction=.34)
    whole = load_data(Data(**cfg), 0)
    bad = [folder / "train" / "cat" / "000.png", folder / "test" / "dog" / "002.png"]
    for f in bad: f.write_text("hello")
    refused("000.png is not a readable image.*skip_damaged", Data(**cfg))
    for limit in (1 << 30, 100): # decoded at once, and on disk
        monkeypatch.setattr(folders, "IN_MEMORY", limit)
        d = load_data(Data(**cfg, skip_damaged=True), 0)
        assert d.skipped == [str(f) for f in bad] and len(d.train) + len(d.val) == 11 and len(d.test) == 5 and d.fingerprint != whole.fingerprint
        assert sum(len(x) for s in (d.train, d.val, d.test) for x, _ in eval_batches(s)) == 16
    assert (d.test.labels == 0).sum() == 3 and (torch.cat([d.train.labels, d.val.labels]) == 0).sum() == 5 # labels go with their images

def test_folder_that_cannot_keep_a_cache(tmp_path):
    folder = image_folder(tmp_path)
    (folder / ".mgdarts-cache-own.safetensors" / "x").mkdir(parents=True) # a rename onto this fails, as writing does in a read-only folder
    assert len(load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.34), 0).test) == 6
    assert sorted(p.name for p in folder.iterdir()) == [".mgdarts-cache-own.safetensors", "test", "train"]

def test_folder_resizes_and_cuts_the_centre(tmp_path):
    image_folder(tmp_path, h=12, w=20)
    cfg = lambda size: Data(name="toy", dir=str(tmp_path), size=size, val_fraction=.34)
    refused("not squares of one size: give data.size", cfg(0))
    assert picture(("test", "cat", 0), h=12, w=20)[..., 4:16].contiguous().numpy().tobytes() in ids(load_data(cfg(12), 0).test)
    assert load_data(cfg(7), 0).test.images.shape == (6, 3, 7, 7)

def test_grey_folder_and_jpeg(tmp_path):
    folder = image_folder(tmp_path, c=1)
    assert load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.34), 0).in_channels == 1
    (folder / "train" / "dog" / "000.png").unlink()
    write(picture("jpeg"), folder / "train" / "dog" / "000.JPEG") # one class begins with a colour image: all are read as colour
    assert load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.34), 0).in_channels == 3

def test_resize_is_an_antialiased_mean():
    x = torch.randint(0, 256, (2, 3, 32, 32), generator=stream(0), dtype=torch.uint8)
    ref = torch.nn.functional.interpolate(x.double(), (16, 16), mode="bilinear", antialias=True)
    assert (fit(x, 16).double() - ref).abs().max() <= 1.01

def test_half_unpacked_folders(tmp_path):
    cfg = Data(name="toy", dir=str(tmp_path), val_fraction=.34)
    def broken(match, hurt):
        folder = image_folder(tmp_path)
        hurt(folder)
        refused(match, cfg)
        shutil.rmtree(folder)
    def gone(part): return lambda f: shutil.rmtree(f / part)
    def emptied(f):
        for p in (f / "train" / "dog").iterdir(): p.unlink()
    broken("toy/train is missing: unpack", gone("train"))
    broken("toy/test is missing: unpack", gone("test"))
    broken("toy/test/dog is missing", gone("test/dog"))
    broken("toy/train/cat is missing", gone("train/cat"))
    broken("toy/train/dog has no images", emptied)
    broken("notes.txt is not an image", lambda f: (f / "test" / "cat" / "notes.txt").write_text("hello"))
    broken("002.png is not a readable image", lambda f: (f / "train" / "cat" / "002.png").write_text("hello"))
    broken("001.png is not a readable image", lambda f: (f / "test" / "dog" / "001.png").write_bytes(b""))
    broken("000.png is not a readable image", lambda f: (f / "train" / "dog" / "000.png").write_bytes(b"\x89PNG\r\n"))
    def one_class(f):
        for split in ("train", "test"): shutil.rmtree(f / split / "dog")
    def dangling(f): (f / "test" / "cat" / "link.png").symlink_to(f / "nowhere.png")
    broken("link.png is missing: put it back", dangling)
    broken("toy/train needs at least two folders", one_class)
    broken("003.png is 9x5, others are 12x12", lambda f: write(picture("odd", h=5, w=9), f / "train" / "cat" / "003.png"))

def test_unknown_names(tmp_path):
    image_folder(tmp_path, "flowers")
    cfg = lambda name: Data(name=name, dir=str(tmp_path))
    refused("unknown dataset 'cifar1': did you mean 'cifar10'.*known: digits.*image folder", cfg("cifar1"))
    refused("did you mean 'flowers'", cfg("flower"))
    refused("unknown dataset 'zzzz'.*choose from: digits, cifar10", cfg("zzzz"))
    refused("cifar10-jpeg is not in", cfg("cifar10-jpeg"))
    refused("imagenet is not in .*ILSVRC2012", cfg("imagenet"))
    for name in ("", "..", "a/b", str(tmp_path)): refused("must be a folder's name", cfg(name))

# ---- large sets stay on disk

def test_imagenet_layout(tmp_path):
    folder = image_folder(tmp_path, "imagenet", 5, 3, ("train", "val"), ("n01", "n02", "n03"), h=40, w=60)
    d = load_data(Data(name="imagenet", dir=str(tmp_path), size=16, val_fraction=.21), 0)
    assert isinstance(d.train.images, Files) and d.train.images.shape == (12, 3, 16, 16) and [len(d.val), len(d.test)] == [3, 9]
    assert not list(folder.glob(".mgdarts*")) and not set(d.train.images.paths) & set(d.val.images.paths)
    loader = Loader(d, "train", 4, 0, Augment(autoaugment=True))
    (x, y), (again, _), (other, _) = loader.batch(0, 1), loader.batch(0, 1), loader.batch(1, 1)
    assert x.shape == (4, 3, 16, 16) and x.equal(again) and not x.equal(other) and len(loader) == 3
    xs, ys = zip(*eval_batches(d.test, 4))
    assert torch.cat(ys).bincount().tolist() == [3, 3, 3]
    ref = torch.stack([fit(decode(p), 16, 18) for p in d.test.images.paths]) # centre cut out after resizing to 8/7
    torch.testing.assert_close(torch.cat(xs), normalise(ref, d.mean, d.std))
    assert [Path(p).parent.name for p in d.test.images.paths] == [d.classes[i] for i in torch.cat(ys)]

def test_large_folder_stays_on_disk(tmp_path, monkeypatch):
    image_folder(tmp_path)
    monkeypatch.setattr(folders, "IN_MEMORY", 100)
    d = load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.34), 0)
    assert isinstance(d.test.images, Files) and d.fingerprint == load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.34), 0).fingerprint
    (tmp_path / "toy" / "test" / "cat" / "001.png").write_text("spoiled later")
    with pytest.raises(InputError, match="001.png is not a readable"): list(eval_batches(d.test))
    (tmp_path / "toy" / "test" / "cat" / "001.png").unlink()
    with pytest.raises(InputError, match="001.png is missing"): list(eval_batches(d.test))

@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_damaged_images_are_named(suffix, tmp_path):
    file, g = tmp_path / f"x.{suffix}", stream(suffix)
    write(picture("damage", h=24, w=24), file)
    good = file.read_bytes()
    for at in torch.randint(len(good), (150,), generator=g).tolist():
        for raw in (good[:at], good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1:]):
            file.write_bytes(raw)
            try: assert decode(str(file)).dim() == 3 # a damaged pixel may go unnoticed
            except InputError as e: assert f"x.{suffix} is not a readable image" in str(e)

def test_crop_boxes_stay_inside():
    for u in torch.rand(500, 4, generator=stream(0)).tolist():
        for h, w in ((40, 60), (7, 3), (1, 1)):
            top, left, bh, bw = crop_box(h, w, u)
            assert 0 <= top and 0 <= left and 1 <= bh <= h - top and 1 <= bw <= w - left

# ---- augmentation

def test_crop_flip_against_a_slow_reference():
    x, pad = torch.randint(1, 256, (32, 3, 8, 8), generator=stream(0), dtype=torch.uint8), 2
    out, g = crop_flip(x, pad, True, stream(1)), stream(1)
    top, left = torch.randint(2 * pad + 1, (2, 32, 1), generator=g).tolist()
    mirror = (torch.rand(32, 1, generator=g) < .5).tolist()
    for i in range(32):
        canvas = torch.zeros(3, 12, 12, dtype=torch.uint8)
        canvas[:, 2:10, 2:10] = x[i]
        want = canvas[:, top[i][0]:top[i][0] + 8, left[i][0]:left[i][0] + 8]
        assert out[i].equal(want.flip(-1) if mirror[i][0] else want)
    assert {t[0] for t in top} == {l[0] for l in left} == set(range(5)) and 5 < sum(m[0] for m in mirror) < 27

def test_cutout_against_a_slow_reference():
    out, centres = cutout(torch.ones(64, 2, 8, 8), 4, stream(0)), torch.randint(8, (2, 64, 1), generator=stream(0)).tolist()
    for i in range(64):
        want = torch.ones(2, 8, 8)
        r, c = centres[0][i][0], centres[1][i][0]
        want[:, max(0, r - 2):r + 2, max(0, c - 2):c + 2] = 0
        assert out[i].equal(want)

@pytest.mark.parametrize("c", [1, 3])
def test_autoaugment(c):
    x = torch.stack([picture(i, c, 16, 16) for i in range(200)]) # every one of the 25 sub-policies comes up
    state = torch.get_rng_state()
    a, b, other = autoaugment(x, stream(0)), autoaugment(x, stream(0)), autoaugment(x, stream(1))
    assert a.dtype == torch.uint8 and a.shape == x.shape and a.equal(b) and not a.equal(other) and torch.get_rng_state().equal(state)
    changed = (a != x).flatten(1).any(1)
    assert 0.5 < changed.float().mean() < 1 # each image its own draw

def test_each_policy_of_autoaugment_is_torchvisions():
    from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy
    x = torch.stack([picture(i, 3, 16, 16) for i in range(60)])
    found = {p: autoaugment(x, stream(0), p) for p in ("cifar10", "imagenet")}
    assert found["cifar10"].equal(autoaugment(x, stream(0))) and not found["cifar10"].equal(found["imagenet"])
    for name, policy in (("cifar10", AutoAugmentPolicy.CIFAR10), ("imagenet", AutoAugmentPolicy.IMAGENET)):
        seed = int(torch.randint(2 ** 62, (), generator=stream(0)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            change = AutoAugment(policy, fill=128)
            assert torch.stack([change(image) for image in x]).equal(found[name])

def test_the_policy_reaches_the_batches(tmp_path):
    image_folder(tmp_path, "toy", 30, 3)
    d = load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.1), 0)
    batch = lambda **k: Loader(d, "train", 50, 0, Augment.of(Data(**k))).batch(0, 0)[0]
    assert batch(policy="cifar10").equal(batch()) and not batch(policy="imagenet").equal(batch()) and batch(policy="imagenet", autoaugment=False).equal(batch(autoaugment=False))

def test_training_on_the_images_of_validation_too(tmp_path, monkeypatch):
    image_folder(tmp_path, "toy", 20, 5)
    cfg = Data(name="toy", dir=str(tmp_path), subset=30, val_fraction=.2)
    for limit in (2 << 30, 100): # decoded at once, and on disk
        monkeypatch.setattr(folders, "IN_MEMORY", limit)
        d = load_data(cfg, 0)
        every = train_and_val(d)
        content = lambda *splits: sorted((x.numpy().tobytes(), int(y)) for s in splits for x, y in zip(s.images[torch.arange(len(s))], s.labels))
        assert isinstance(d.train.images, Files) == (limit == 100) and content(every.train) == content(d.train, d.val) and len(every.train) == 30 and every.val is None and len(d.val) == 6
        assert content(every.test) == content(d.test) and every.fingerprint == d.fingerprint
        assert every.train.mean.equal(every.test.mean) and every.train.mean.equal(channel_stats(every.train.images)[0]) and not every.mean.equal(d.mean)

def test_augment_sizes():
    assert Augment().at(32) == Augment(4, True, 16) and Augment().at(16) == Augment(2, True, 8) and Augment(0, False, 0).at(8) == Augment(0, False, 0)
    assert Augment.of(Data(crop=1, flip=False), autoaugment=False) == Augment(1, False, -1, False)
    with pytest.raises(InputError, match="data.crop=9 is more than the image side 8"): Augment(crop=9).at(8)

# ---- batches

def test_order():
    batches = epoch_order(103, 10, 0, 4)
    assert len(batches) == 10 and len(torch.cat(batches).unique()) == 100 and all(len(b) == 10 for b in batches)
    assert torch.cat(epoch_order(103, 10, 0, 4, drop_last=False)).sort().values.equal(torch.arange(103))
    assert [len(b) for b in epoch_order(7, 10, 0, 0)] == [7] and len(epoch_order(20, 10, 0, 0)) == 2
    order = lambda *key: torch.cat(epoch_order(103, 10, *key)).tolist()
    assert order(0, 4) == order(0, 4) and order(0, 4) != order(0, 5) and order(0, 4) != order(1, 4)

@pytest.mark.parametrize("n,batch,drop", [(360, 64, True), (360, 64, False), (360, 1000, True), (360, 360, True), (360, 90, False)])
def test_length_of_an_epoch(n, batch, drop):
    loader = Loader(load_data(Data(subset=400), 0), batch=batch, drop_last=drop)
    assert len(loader) == len(loader.order(0)) == len(loader.order(9))

@pytest.mark.parametrize("auto", [False, True])
def test_batches_depend_on_seed_epoch_and_step_alone(auto):
    d = load_data(Data(subset=400), 0)
    make = lambda seed=0: Loader(d, "train", 64, seed, Augment(autoaugment=auto))
    a = make()
    ahead = [a.batch(e, s) for e in (0, 1) for s in range(len(a))]
    torch.manual_seed(99) # the global generator does not matter
    b = make()
    for k in reversed(range(len(ahead))): # nor does what was asked before
        x, y = b.batch(k // len(b), k % len(b))
        assert x.equal(ahead[k][0]) and y.equal(ahead[k][1])
    assert not make(1).batch(0, 0)[0].equal(ahead[0][0])
    i = torch.arange(64)
    draw = lambda *key: train_batch(d.train, i, a.augment, *key)[0]
    assert draw(0, 0, 0).equal(draw(0, 0, 0)) and all(not draw(0, 0, 0).equal(draw(*k)) for k in ((0, 0, 1), (0, 1, 0), (1, 0, 0)))

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
    assert [len(s) for s in (d.train, d.val, d.test)] == [2700, 300, 2000] and d.in_channels == 3 and d.num_classes == 10 and d.label == "cifar10-jpeg"
    assert d.train.labels.bincount().tolist() == [270] * 10 and d.test.labels.bincount().tolist() == [200] * 10
    assert torch.allclose(d.mean, torch.tensor([.4914, .4822, .4465]), atol=.015)
