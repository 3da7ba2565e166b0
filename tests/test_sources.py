"Where images come from: sources by name, published sets to the last pixel, image folders, large sets on disk."
import gc, gzip, hashlib, multiprocessing, os, pickle, shutil, signal, subprocess, sys
import time
from pathlib import Path
import numpy as np, pytest, torch, torchvision
from PIL import Image
from mgdarts.base import folders, sources
from mgdarts.base.augment import Augment, normalise
from mgdarts.base.batches import Loader, eval_batches
from mgdarts.base.data import channel_stats, load_data
from mgdarts.base.events import RunFailed
from mgdarts.base.folders import Source
from mgdarts.base.images import Files, crop_box, decode, fit
from mgdarts.base.options import Data, InputError
from mgdarts.base.randomness import stream
from mgdarts.base.sources import DATASETS, open_source, read_idx
from mgdarts.methods.registry import preset
from mgdarts.runs import run as runs
from mgdarts.runs.folder import read_record
from toys import ids, image_folder, picture, refused, write

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
    a, b = make(200, np.random.default_rng(0)), make(60, np.random.default_rng(1))
    return Source(*a, *b, ["along", "across"], origin="made")

register(Dataset("stripes", stripes, "lines across or along", classes=2, size=8))
"""

def test_a_dataset_from_outside(tmp_path, monkeypatch):
    "Twenty lines in somebody else's file, and its name is searched on, retrained and recorded."
    monkeypatch.setattr(sources, "DATASETS", dict(DATASETS))
    refused("unknown dataset 'stripes'", Data(name="stripes"))
    assert len(OUTSIDE.strip().splitlines()) <= 20
    exec(OUTSIDE, {})
    few = {"data.subset": 1.0, "search.warmup": 0, "search.max_epochs": 2, "search.prune_every": 1, "train.epochs": 3,
           "train.batch": 16}
    result = runs.search(preset("smoke", **{"data.name": "stripes", **few}), tmp_path / "run")
    record, trained = read_record(tmp_path / "run"), runs.retrain(tmp_path / "run")
    assert result["run"] and (record["dataset"], record["data_source"]) == ("stripes", "made")
    assert record["images"]["test"] == 60
    assert trained["test_acc_final"] > 90  # colour and direction are plain to see
    refused("did you mean 'stripes'.*known: .*, stripes", Data(name="stripe"))

BLACK = np.zeros((4, 8, 8), np.uint8)

@pytest.mark.parametrize("images,labels,match", [
    (BLACK / 1, [0, 1, 0, 1], "uint8"), (BLACK, [0, 1, 0], "one for each image"), (BLACK, [0, 1, 2, 1], "from 0 to 1"),
    (BLACK[:0], [], "one or more"), (BLACK[0], [0] * 8, "uint8")])
def test_arrays_that_are_no_dataset(images, labels, match):
    with pytest.raises(InputError, match=match): Source(images, labels, images, labels, ["a", "b"])

def test_digits_and_statistics():
    d = load_data(Data(), 0)
    assert (d.num_classes, d.in_channels, d.size, d.label) == (10, 1, 8, "digits")
    assert len(d.train) + len(d.val) + len(d.test) == 1797
    assert d.train.images.dtype == torch.uint8 and d.train.labels.dtype == torch.int64 and len(d.fingerprint) == 64
    x = torch.cat([x for x, _ in eval_batches(d.train)])
    assert x.dtype == torch.float32 and abs(x.mean()) < 1e-4 and abs(x.std(correction=0) - 1) < 1e-4
    assert load_data(Data(size=16), 0).train.images.shape[1:] == (1, 16, 16)

def test_statistics_a_channel():
    images = torch.randint(0, 200, (50, 3, 6, 6), generator=stream(0), dtype=torch.uint8)
    mean, std = channel_stats(images)
    ref = images.double() / 255
    torch.testing.assert_close(mean, ref.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, ref.std((0, 2, 3), correction=0).float())
    assert channel_stats(torch.full((3, 1, 2, 2), 7, dtype=torch.uint8))[1] > 0

KINDS = pytest.mark.parametrize("kind,key", [("CIFAR10", "cifar10"), ("CIFAR100", "cifar100")])

def fake_cifar(base, kind, monkeypatch):
    """A tiny archive, unpacked, whose checksums torchvision takes for the published ones: 40 and 20 images of two
    classes, no two alike. (class, function that writes one of its files, pixels and labels by split)."""
    cls, label = getattr(torchvision.datasets, kind), {"CIFAR10": "labels", "CIFAR100": "fine_labels"}[kind]
    (base / cls.base_folder).mkdir(parents=True)
    def put(name, obj):
        raw = pickle.dumps(obj)
        (base / cls.base_folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()
    def made(seed, k): return np.random.default_rng(seed).integers(0, 256, (k, 3072), dtype=np.uint8), [0, 1] * (k // 2)
    splits = {"train": made(0, 40), "test": made(1, 20)}
    for n, file in (("train", "a"), ("test", "b")):
        md5 = put(file, {"data": splits[n][0], label: splits[n][1]})
        monkeypatch.setattr(cls, f"{n}_list", [[file, md5]])
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
    def download(self): return None if self._check_integrity() else pytest.fail("asked the network")
    monkeypatch.setattr(cls, "download", download)
    a, b = (load_data(Data(name=key, dir=str(tmp_path / d), val_fraction=.2), 3) for d in "ab")
    for x, y in ((getattr(a, n), getattr(b, n)) for n in ("train", "val", "test")):
        assert x.images.equal(y.images) and x.labels.equal(y.labels)
    assert a.fingerprint == b.fingerprint and a.classes == b.classes and a.label == b.label == key
    assert a.train.labels[:8].unique().tolist() == [0, 1]
    assert (a.origin, b.origin) == ("archive, md5 verified", "image folder, digest verified")
    # where both are, the archive is read; a damaged one is passed over, and nothing is fetched
    shutil.copytree(tmp_path / "b" / key, tmp_path / "a" / key)
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
    file.write_bytes(bytes(size)) # of the same size
    os.utime(file, ns=(at + 1, at + 1))
    what = "cifar10 does not hold CIFAR10 pixel for pixel: "
    refused(f"{what}.*renamed.png is no readable image of 32x32.*rename the folder", cfg)
    image = decode(str(next((folder / "train" / "y").iterdir()))).clone()
    image[0, 0, 0] ^= 1 # one level of one pixel
    write(image, file)
    refused(f"{what}the digest of its 60 images is .*rename the folder and give its new name as data.name", cfg)
    file.write_bytes(before)
    assert load_data(cfg, 0).fingerprint == first.fingerprint
    write(picture("small", h=16, w=16), folder / "test" / "y" / "more.png")
    refused("more.png is no readable image of 32x32", cfg)
    folder.rename(tmp_path / "mine")
    (tmp_path / "mine/test/y/more.png").unlink()
    own = load_data(Data(name="mine", dir=str(tmp_path)), 0)
    assert own.origin == "image folder" and own.label == "mine" and len(own.test) == 20
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
        images = torch.cat([d.train.images, d.val.images])
        seen.append((file.stat().st_size, [bool((images == n).flatten(1).all(1).any()) for n in (7, 9)]))
    assert seen == [(200, [True, False]), (200, [False, True])]

MEANS = {"cifar10": (10, (.49139968, .48215841, .44653091)), "cifar100": (100, (.50707516, .48654887, .44091784))}

@pytest.mark.parametrize("name", MEANS)
def test_the_published_images(name):
    """With every pixel: the digest holds, and the means are those that everybody normalises by. From the unpacked set,
    else from lossless sheets of its images."""
    base, (classes, mean) = Path(__file__).parents[1] / "data", MEANS[name]
    sheets = Path(os.environ.get("MGDARTS_SHARED", Path(__file__).parents[2] / "shared")) / f"data/{name}-sheets"
    if (base / name / "train").is_dir(): s = open_source(Data(name=name, dir=str(base)))
    elif not sheets.is_dir(): pytest.skip(f"neither {base / name}/train nor {sheets} is there")
    else: s = from_sheets(sheets, {"train": 50_000 // classes, "test": 10_000 // classes})
    assert s.origin in ("image folder, digest verified", "archive, md5 verified", "sheets")
    assert len(s.classes) == classes and s.classes == sorted(s.classes)
    assert s.train.shape == (50_000, 3, 32, 32) and s.test.shape == (10_000, 3, 32, 32)
    assert s.train_labels.bincount().tolist() == [50_000 // classes] * classes
    assert torch.allclose(channel_stats(s.train)[0].double(), torch.tensor(mean, dtype=torch.float64), atol=1e-7)
    lines = [f"{n}/{s.classes[y]}/{hashlib.sha256(x.permute(1, 2, 0).contiguous().numpy()).hexdigest()}"
             for n in ("train", "test") for x, y in zip(getattr(s, n), getattr(s, f"{n}_labels").tolist())]
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
        def size(*d): return b"".join(i.to_bytes(4, "big") for i in d)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + size(k, 28, 28) + x))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + size(len(y)) + y) # this one unpacked

@pytest.mark.parametrize("place", ["fashion-mnist", "FashionMNIST/raw", "debian"])
def test_fashion_mnist_is_found(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEBIAN_FASHION", tmp_path / "debian")
    write_fashion(tmp_path / place)
    s = open_source(Data(name="fashion-mnist", dir=str(tmp_path)))
    assert s.train.shape == (40, 1, 28, 28) and s.test.shape == (20, 1, 28, 28) and s.size == 28
    assert s.train_labels.tolist() == [i % 10 for i in range(40)]

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

@pytest.mark.parametrize("raw", [b"", b"\0\0", b"\0\0\x08\x01\0\0", b"\0\0\x09\x01\0\0\0\1\0",
                                 b"\0\0\x08\x01\0\0\0\2\0"])
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
    want = {picture(("train", c, i)).numpy().tobytes() for c in ("cat", "dog") for i in range(6)}
    assert ids(d.train) | ids(d.val) == want and not ids(d.train) & ids(d.val)
    assert ids(d.test) == {picture(("test", c, i)).numpy().tobytes() for c in ("cat", "dog") for i in range(3)}
    for x, y in zip(d.test.images, d.test.labels):
        assert x.numpy().tobytes() in {picture(("test", d.classes[y], i)).numpy().tobytes() for i in range(3)}

def test_folder_cache(tmp_path, monkeypatch):
    folder, cfg = image_folder(tmp_path), Data(name="toy", dir=str(tmp_path), val_fraction=.34)
    first = load_data(cfg, 0)
    cache = folder / ".mgdarts-cache-own.safetensors"
    kept = [cache.name, ".mgdarts-headers.safetensors"]
    assert cache.is_file() and sorted(p.name for p in folder.iterdir()) == [*kept, "test", "train"]
    with monkeypatch.context() as m:
        m.setattr(folders, "decode_all", lambda *a, **k: pytest.fail("decoded again"))
        assert load_data(cfg, 0).fingerprint == first.fingerprint
    cache.write_bytes(cache.read_bytes()[:-5]) # cut off: made again
    assert load_data(cfg, 0).fingerprint == first.fingerprint
    write(picture("new", h=12, w=12), folder / "train" / "cat" / "new.png") # another listing: made again
    assert len(load_data(cfg, 0).train) + len(load_data(cfg, 0).val) == 13
    assert load_data(Data(name="toy", dir=str(tmp_path), size=6, val_fraction=.34), 0).size == 6
    assert (folder / ".mgdarts-cache-6.safetensors").is_file()

def test_damaged_images_are_skipped_when_asked(tmp_path, monkeypatch):
    folder, cfg = image_folder(tmp_path), dict(name="toy", dir=str(tmp_path), val_fraction=.34)
    whole = load_data(Data(**cfg), 0)
    bad = [folder / "train" / "cat" / "000.png", folder / "test" / "dog" / "002.png"]
    for f in bad: f.write_text("hello")
    refused("000.png is not a readable image.*skip_damaged", Data(**cfg))
    for limit in (1 << 30, 100): # decoded at once, and on disk
        monkeypatch.setattr(folders, "IN_MEMORY", limit)
        d = load_data(Data(**cfg, skip_damaged=True), 0)
        assert d.skipped == [str(f) for f in bad] and d.fingerprint != whole.fingerprint
        assert len(d.train) + len(d.val) == 11 and len(d.test) == 5
        assert sum(len(x) for s in (d.train, d.val, d.test) for x, _ in eval_batches(s)) == 16
    kept = torch.cat([d.train.labels, d.val.labels])  # labels go with their images
    assert (d.test.labels == 0).sum() == 3 and (kept == 0).sum() == 5

def test_folder_that_cannot_keep_a_cache(tmp_path):
    folder = image_folder(tmp_path)
    # a rename onto this fails, as writing does in a read-only folder
    (folder / ".mgdarts-cache-own.safetensors" / "x").mkdir(parents=True)
    assert len(load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.34), 0).test) == 6
    kept = [".mgdarts-cache-own.safetensors", ".mgdarts-headers.safetensors"]
    assert sorted(p.name for p in folder.glob("*s")) == kept

def test_folder_resizes_and_cuts_the_centre(tmp_path):
    image_folder(tmp_path, h=12, w=20)
    def cfg(size): return Data(name="toy", dir=str(tmp_path), size=size, val_fraction=.34)
    refused("not squares of one size .*20x12.*: give data.size", cfg(0))
    centre = picture(("test", "cat", 0), h=12, w=20)[..., 4:16].contiguous()
    assert centre.numpy().tobytes() in ids(load_data(cfg(12), 0).test)
    assert load_data(cfg(7), 0).test.images.shape == (6, 3, 7, 7)

def test_grey_folder_and_jpeg(tmp_path):
    folder = image_folder(tmp_path, c=1)
    assert load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.34), 0).in_channels == 1
    (folder / "train" / "dog" / "000.png").unlink()
    # one class begins with a colour image: all are read as colour
    write(picture("jpeg"), folder / "train" / "dog" / "000.JPEG")
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
    def odd(f): write(picture("odd", h=5, w=9), f / "train" / "cat" / "003.png")
    broken("not squares of one size .*003.png is 9x5", odd)

def test_unknown_names(tmp_path):
    image_folder(tmp_path, "flowers")
    def cfg(name): return Data(name=name, dir=str(tmp_path))
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
    assert isinstance(d.train.images, Files) and d.train.images.shape == (12, 3, 16, 16)
    assert [len(d.val), len(d.test)] == [3, 9]
    assert not list(folder.glob(".mgdarts*")) and not set(d.train.images.paths) & set(d.val.images.paths)
    loader = Loader(d, "train", 4, 0, Augment(autoaugment=True))
    (x, _), (again, _), (other, _) = loader.batch(0, 1), loader.batch(0, 1), loader.batch(1, 1)
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
    again = load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.34), 0)
    assert isinstance(d.test.images, Files) and d.fingerprint == again.fingerprint
    (tmp_path / "toy" / "test" / "cat" / "001.png").write_text("spoiled later")
    with pytest.raises(InputError, match="001.png is not a readable"): list(eval_batches(d.test))
    (tmp_path / "toy" / "test" / "cat" / "001.png").unlink()
    with pytest.raises(InputError, match="001.png is missing"): list(eval_batches(d.test))

# ---- read ahead by other processes

def on_disk(tmp_path, monkeypatch):
    image_folder(tmp_path, "toy", 15, 5, h=20, w=20)
    monkeypatch.setattr(folders, "IN_MEMORY", 100)
    return load_data(Data(name="toy", dir=str(tmp_path), size=16, val_fraction=.34), 0)

def test_batches_are_the_same_with_any_number_of_workers(tmp_path, monkeypatch):
    d, how = on_disk(tmp_path, monkeypatch), Augment(autoaugment=True)
    assert len(d.train) == 20
    def loader(workers): return Loader(d, "train", 6, 0, how, drop_last=False, workers=workers)
    plain, n = loader(0), 4
    for workers in (1, 3):
        ahead = loader(workers)
        for k in (0, 1, 2, 3, 4, 5, 11, 12, 2, 1): # through an epoch and beyond, then elsewhere, and back
            (x, y), (want, labels) = ahead.batch(k // n, k % n), plain.batch(k // n, k % n)
            assert x.equal(want) and y.equal(labels) and len(y) == (2 if k % n == 3 else 6)
        reading = [p for p, _ in ahead.ahead.workers]
        assert len(reading) == workers and all(p.is_alive() for p in reading)
        ahead.close()
        assert [p.exitcode for p in reading] == [0] * workers
        for (x, y), (want, labels) in zip(ahead.eval(7), plain.eval(7), strict=True):
            assert x.equal(want) and y.equal(labels)
        assert not multiprocessing.active_children()
        assert ahead.batch(0, 1)[0].equal(plain.batch(0, 1)[0]) # begins anew
        ahead.close()

def test_nothing_is_started_before_the_first_batch(tmp_path, monkeypatch):
    loader = Loader(on_disk(tmp_path, monkeypatch), "train", 6, 0, Augment(), workers=2)
    loader.order(0), loader.drawn(0, 0), loader.ahead
    assert not loader.ahead.workers and not multiprocessing.active_children()
    loader.close()

def test_workers_end_with_whoever_forgets_them(tmp_path, monkeypatch):
    loader = Loader(on_disk(tmp_path, monkeypatch), "train", 6, 0, Augment(), workers=2)
    loader.batch(0, 0)
    reading = [p for p, _ in loader.ahead.workers]
    del loader
    gc.collect()
    for p in reading: p.join(10)
    assert [p.exitcode for p in reading] == [0, 0]

@pytest.mark.parametrize("at", ["waiting", "at rest"])
def test_a_killed_worker_is_one_clear_line(at, tmp_path, monkeypatch):
    loader = Loader(on_disk(tmp_path, monkeypatch), "train", 6, 0, Augment(), workers=2)
    loader.batch(0, 0)
    if at == "at rest": time.sleep(.5) # the next batches are there already
    (_, _), (process, _) = loader.ahead.workers
    process.kill()
    message = rf"a process that reads images ahead has ended \(pid {process.pid}, exit code -9\).*data.workers than 2"
    with pytest.raises(RunFailed, match=message) as e:
        for k in range(1, 6): loader.batch(0, k % 3)
    assert "\n" not in str(e.value) and not loader.ahead.workers and not multiprocessing.active_children()

def test_a_damaged_file_is_named_by_a_worker(tmp_path, monkeypatch):
    loader = Loader(on_disk(tmp_path, monkeypatch), "train", 20, 0, Augment(), workers=2)
    Path(loader.split.images.paths[3]).write_text("spoiled")
    with pytest.raises(InputError, match="png is not a readable image"): loader.batch(0, 0)
    assert not multiprocessing.active_children()

KILLED = """
import os, signal, sys
from mgdarts.base import folders
from mgdarts.base.augment import Augment
from mgdarts.base.batches import Loader
from mgdarts.base.data import load_data
from mgdarts.base.options import Data
folders.IN_MEMORY = 100
loader = Loader(load_data(Data(name="toy", dir=sys.argv[1], val_fraction=.34), 0), "train", 6, 0, Augment(), workers=2)
loader.batch(0, 0)
print(*(p.pid for p, _ in loader.ahead.workers), flush=True)
if sys.argv[2] == "killed": os.kill(os.getpid(), signal.SIGKILL)
"""

@pytest.mark.parametrize("how", ["killed", "over"])
def test_workers_end_with_the_run(how, tmp_path):
    "However it ends, and though they ignore SIGTERM."
    image_folder(tmp_path, "toy", 15, 5, h=20, w=20)
    command = [sys.executable, "-c", KILLED, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0), done.stderr
    pids, until = [int(n) for n in done.stdout.split()], time.monotonic() + 20
    while (left := [n for n in pids if Path(f"/proc/{n}").exists()]) and time.monotonic() < until: time.sleep(.1)
    assert len(pids) == 2 and not left

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
