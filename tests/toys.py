"Small made-up datasets for tests."
import pytest, torch
from PIL import Image
from mgdarts.base.data import load_data
from mgdarts.base.images import resize
from mgdarts.base.options import InputError
from mgdarts.base.randomness import stream

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
