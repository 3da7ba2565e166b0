"What image files mean: the right pixels, or a line that names the file."
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mgdarts.base import images
from mgdarts.base.data import load_data
from mgdarts.base.folders import header, read_folder
from mgdarts.base.images import decode
from mgdarts.base.options import Data, InputError
from toys import image_folder, picture, refused, write

SHADE = np.linspace(0, 1, 16)[None].repeat(8, 0)  # dark to bright, 8 rows of 16


def saved(path, image, **how):
    image.save(path, **how)
    return str(path)


def tagged(turn):
    tags = Image.Exif()
    tags[images.TURN] = turn
    return tags


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(suffix, tmp_path):
    deep = Image.fromarray((SHADE * 65535).round().astype(np.uint16))
    x = decode(saved(tmp_path / f"x.{suffix}", deep), rgb=False)
    assert x.dtype == torch.uint8 and np.abs(x[0].numpy() - SHADE * 255).max() <= .51
    path = saved(tmp_path / f"flat.{suffix}", Image.fromarray(np.full((16, 16), 40000, np.uint16)))
    assert decode(path).unique().tolist() == [round(40000 / 257)]


def test_sixteen_bits_are_turned_too(tmp_path):
    deep = Image.fromarray((SHADE * 65535).round().astype(np.uint16))
    x = decode(saved(tmp_path / "x.png", deep, exif=tagged(6)), rgb=False)
    assert x.shape == (1, 16, 8) and np.abs(x[0].numpy() - np.rot90(SHADE, -1) * 255).max() <= .51


def test_numbers_without_a_range_are_refused(tmp_path):
    for name, dtype in (("float.tif", np.float32), ("int.tif", np.int32)):
        path = saved(tmp_path / name, Image.fromarray(SHADE.astype(dtype)))
        with pytest.raises(InputError, match=f"{name} has numbers of 32 bits"): decode(path)


def test_what_is_transparent_lies_on_white(tmp_path):
    colours, alpha = picture("glass", h=8, w=16).permute(1, 2, 0).numpy(), (SHADE * 255).round().astype(np.uint8)
    glass = saved(tmp_path / "glass.png", Image.fromarray(np.dstack([colours, alpha])))
    want = 255 + (colours - 255.) * (alpha / 255)[..., None]
    assert np.abs(decode(glass).permute(1, 2, 0).numpy() - want).max() <= 1.01
    opaque = saved(tmp_path / "opaque.png", Image.fromarray(np.dstack([colours, np.full_like(alpha, 255)])))
    assert np.array_equal(decode(opaque).permute(1, 2, 0).numpy(), colours)
    grey = saved(tmp_path / "grey.png", Image.merge("LA", [Image.fromarray(a) for a in (colours[..., 0], alpha)]))
    assert decode(grey).shape[0] == 3 and not header(grey)[2]
    few = Image.fromarray(colours).quantize(8)
    few.info["transparency"] = 0
    path = saved(tmp_path / "palette.png", few, transparency=0)
    clear = np.asarray(few) == 0
    assert clear.any() and (decode(path).permute(1, 2, 0).numpy()[clear] == 255).all()


@pytest.mark.parametrize("ink", ["black", "white", "red"])
def test_a_shape_in_transparency_alone_is_refused(ink, tmp_path):
    image = Image.new("RGBA", (16, 8), ink)
    image.putalpha(Image.fromarray((SHADE * 255).astype(np.uint8)))
    with pytest.raises(InputError, match="x.png has one colour"): decode(saved(tmp_path / "x.png", image))
    image.putalpha(128)  # of one transparency: an even picture, and no shape is lost
    assert len(decode(saved(tmp_path / "x.png", image)).flatten(1).unique(dim=1)[0]) == 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_turned_upright(turn, suffix, tmp_path):
    colours = np.zeros((8, 16, 3), np.uint8)
    colours[:4, :8] = 255  # a bright corner
    how = {"lossless": True} if suffix == "webp" else {"quality": 95, "subsampling": 0} if suffix == "jpg" else {}
    path = saved(tmp_path / f"x.{suffix}", Image.fromarray(colours), exif=tagged(turn), **how)
    flips = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
             5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
             8: lambda a: np.rot90(a)}  # as EXIF's table says
    want, found = flips[turn](colours), decode(path).permute(1, 2, 0).numpy()
    assert found.shape == want.shape and header(path)[:2] == want.shape[1::-1]
    assert np.abs(found.astype(int) - want).max() < 40


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "PNG", "Jpeg"])
def test_further_kinds_are_read(suffix, tmp_path):
    folder = image_folder(tmp_path)
    first = folder / "train" / "cat" / "000.png"
    with Image.open(first) as image:
        kept = image.convert({"pgm": "L", "pbm": "1"}.get(suffix, "RGB"))
        saved(first.with_suffix(f".{suffix}"), kept, **({"lossless": True} if suffix == "webp" else {}))
    first.unlink()
    x = read_folder(folder, Data()).train[0]
    want = torch.from_numpy(np.array(kept.convert("RGB"))).permute(2, 0, 1)
    assert x.equal(want) or suffix == "Jpeg"


def test_a_file_of_several_pictures_is_refused(tmp_path):
    frames = [Image.fromarray(picture(i, h=8, w=8).permute(1, 2, 0).numpy()) for i in range(3)]
    for name in ("x.tif", "x.webp", "x.png"):
        path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        with pytest.raises(InputError, match=f"{name} holds 3 pictures"): decode(path)


def test_a_picture_that_fills_the_memory_is_refused_by_its_header(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.png", Image.new("1", (9000, 9000)))
    with pytest.raises(InputError, match="x.png has more than 64 million pixels"): header(path)
    monkeypatch.setattr(images, "MOST_PIXELS", 50)
    with pytest.raises(InputError, match="more than"): decode(saved(tmp_path / "y.png", Image.new("L", (10, 10))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(InputError, match="more than"): decode(str(tmp_path / "y.png"))


def test_a_pipe_in_the_way_hangs_nobody(tmp_path):
    folder, cfg = image_folder(tmp_path), Data(name="toy", dir=str(tmp_path), val_fraction=.34)
    os.mkfifo(folder / ".mgdarts-cache-own.safetensors")
    assert len(load_data(cfg, 0).test) == 6
    (folder / "train" / "cat" / "001.png").unlink()
    os.mkfifo(folder / "train" / "cat" / "001.png")
    refused("001.png is no file, but a pipe", cfg)


def test_colours_anywhere_are_colours_everywhere(tmp_path):
    folder = image_folder(tmp_path, c=1)
    write(picture("late"), folder / "test" / "dog" / "002.png")
    d = load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.34), 0)
    assert d.in_channels == 3 and "17 of 18 grey images read in colour" in d.origin


def test_even_images_are_refused(tmp_path):
    folder = image_folder(tmp_path)
    for f in (folder / "test").glob("*/*"): write(torch.full((3, 12, 12), 9, dtype=torch.uint8), f)
    refused("all test images of toy are of one even colour", Data(name="toy", dir=str(tmp_path), val_fraction=.34))


def test_replaced_pixels_are_read_again_and_change_the_fingerprint(tmp_path):
    folder, cfg = image_folder(tmp_path), Data(name="toy", dir=str(tmp_path), val_fraction=.34)
    first, file = load_data(cfg, 0), folder / "train" / "cat" / "000.png"
    size = file.stat().st_size
    for key in range(200):  # another picture of as many bytes
        write(picture(("other", key)), file)
        if file.stat().st_size == size: break
    assert file.stat().st_size == size
    assert load_data(cfg, 0).fingerprint != first.fingerprint


def test_validation_images_of_its_own(tmp_path):
    for splits in (("train", "test"), ("val",)): image_folder(tmp_path, splits=splits)
    d = load_data(Data(name="toy", dir=str(tmp_path)), 0)
    again = load_data(Data(name="toy", dir=str(tmp_path)), 1)
    assert len(d.train) == 12 and len(d.val) == len(again.val) and d.val.images.equal(again.val.images)
    refused("toy has validation images of its own: leave out", Data(name="toy", dir=str(tmp_path), val_fraction=.34))


def test_where_nothing_is_for_testing_validation_images_are(tmp_path):
    folder = image_folder(tmp_path, splits=("train", "valid"))
    d = load_data(Data(name="toy", dir=str(tmp_path), val_fraction=.34), 0)
    assert len(d.train) + len(d.val) == 12 and len(d.test) == len(list((folder / "valid").glob("*/*")))
    assert "valid/ for testing" in d.origin
    (folder / "val").mkdir()
    refused("has val and valid: which of them", Data(name="toy", dir=str(tmp_path)))


def test_a_folder_without_splits_is_split(tmp_path):
    folder = image_folder(tmp_path)
    (folder / "train").rename(tmp_path / "whole")
    cfg = {"name": "whole", "dir": str(tmp_path), "val_fraction": .4}
    one, two = load_data(Data(**cfg), 0), load_data(Data(**cfg), 1)
    assert len(one.test) == 2 and one.test.images.equal(two.test.images) and "for testing" in one.origin
    assert len(load_data(Data(**cfg, test_fraction=.5), 0).test) == 6
    for f in sorted((tmp_path / "whole" / "cat").iterdir())[1:]: f.unlink()
    refused("whole/cat has one image, and one is needed", Data(**cfg))


def test_remedies_fit(tmp_path):
    folder, cfg = image_folder(tmp_path), Data(name="toy", dir=str(tmp_path), val_fraction=.34)
    (folder / "train" / "cat" / "more").mkdir()
    refused("more is a folder inside a class, and nested folders are not read", cfg)
    (folder / "train" / "cat" / "more").rmdir()
    (folder / "train" / "cat" / "x.gif").touch()
    refused("x.gif is not an image that is read .*convert it, or move it out", cfg)
    (folder / "train" / "cat" / "x.gif").unlink()
    for f in sorted((folder / "train" / "cat").iterdir())[1:]: f.unlink()
    refused("class cat of toy has 1 training image, and one is needed", cfg)


def test_nothing_is_said_beside(tmp_path):
    folder = image_folder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_folder(folder, Data())
