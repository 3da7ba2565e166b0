"""Files that rot. Every kind of file that is read again is cut at random places, and has single bits turned.

Either nothing changes for the reader, or it is an `InputError`. Files that others write have no checksum: a turned bit
may be another genotype, but it may not be a traceback.
"""
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from mgdarts.base.data import load_data
from mgdarts.base.files import Checkpoints
from mgdarts.base.options import InputError
from mgdarts.methods.registry import preset
from mgdarts.net import files as architecture
from mgdarts.net.genotype import import_genotype, read_genotypes
from mgdarts.runs.frames import REPLAY_FILE, to_line
from mgdarts.runs.listen import Recorder
from mgdarts.runs.records import load_run
from mgdarts.views.replay import replay

from .process import text

_CELL = "[" + ", ".join(f"('sep_conv_3x3', {n - 2}, {n}, [4, 4, 4])" for n in range(2, 6)) + "]"
GENOTYPE = f"NET = Genotype(gene=[{', '.join([_CELL] * 3)}], concat=range(2, 6))\n"


@dataclass
class Kind:
    "A kind of file that is read again."
    path: Path
    read: Callable  # () -> what a reader gets
    strict: bool = True  # all damage must be noticed, for there is a checksum


def pictures(folder: Path):
    "Make a small image folder."
    for split, n in (("train", 12), ("test", 4)):
        for c in ("cat", "dog"):
            (folder / split / c).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (8, 8), (20 * i, 100 * (c == "cat"), 40)).save(folder / split / c / f"{i}.png")


def newest(folder: Path) -> str:
    "The newest state; falling back to the one before is noticing."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try: state = Checkpoints(folder).load()
        except UserWarning as e: raise InputError(str(e)) from None
    return text(state)


def _resumed(path: Path, kept: dict) -> bytes:
    "The events as a resumed run takes them."
    Recorder(path, kept).close()
    return path.read_bytes()


def _replayed(run: Path) -> list:
    "The frames of a run; those that were damaged are told."
    rep = replay(run)
    if rep.missing: raise InputError(rep.missing)
    return [to_line(f) for f in rep.frames]


def _of_runs(run: Path) -> dict:
    "The kinds of files that a finished run has."
    def whole(): return load_run(run)
    def found(): return architecture.load(run)
    trained = run / "train/checkpoint"
    kept = Checkpoints(trained).load()["record"]
    return {"config.json": Kind(run / "config.json", whole), "result.json": Kind(run / "result.json", whole),
            "events.jsonl, finished": Kind(run / "events.jsonl", whole),
            "events.jsonl, to go on with": Kind(run / "train/events.jsonl",
                                                lambda: _resumed(run / "train/events.jsonl", kept)),
            "checkpoint, search": Kind(Checkpoints(run / "checkpoint").files()[-1],
                                       lambda: newest(run / "checkpoint")),
            "checkpoint, retraining": Kind(Checkpoints(trained).files()[-1], lambda: newest(trained)),
            "architecture.json": Kind(run / "architecture.json", found),
            "masks.safetensors": Kind(run / "masks.safetensors", found),
            "replay.jsonl": Kind(run / REPLAY_FILE, lambda: _replayed(run))}


def kinds(run: Path, folder: Path) -> dict:
    "name -> `Kind`: the files of a finished run, and in `folder` those that runs do not have."
    pictures(folder / "pictures")
    own = {"name": "pictures", "dir": str(folder), "size": 0, "subset": 1., "val_fraction": .25}
    cfg = preset("smoke", **{f"data.{k}": v for k, v in own.items()}).data
    load_data(cfg, 0)
    (folder / "genotype.txt").write_text(GENOTYPE)
    masks = [[[torch.ones(4, 1, 3, 3), torch.ones(4, 4, 1, 1)] * 2 for _ in c] for c in read_genotypes(GENOTYPE)["NET"]]
    torch.save(masks, folder / "masks.pt")
    def imported(): return import_genotype(folder / "genotype.txt", folder / "masks.pt", channels=4)
    return _of_runs(run) | {
        "image cache": Kind(folder / "pictures/.mgdarts-cache-own.safetensors", lambda: load_data(cfg, 0).fingerprint),
        "genotype": Kind(folder / "genotype.txt", imported, False),
        "masks of a genotype": Kind(folder / "masks.pt", imported, False)}


def rot(name: str, kind: Kind, places: int) -> tuple:
    """Trials: a file is cut, and has a bit turned, at `places` random places each; it is whole again afterwards.

    (trials, noticed, what went wrong)
    """
    path, whole, want = kind.path, kind.path.read_bytes(), kind.read()
    r, noticed, wrong = random.Random(f"rot/{name}"), 0, []
    for i in range(2 * places):
        at = r.randrange(len(whole))
        turned = whole[:at] + bytes([whole[at] ^ 1 << r.randrange(8)]) + whole[at + 1:] if i % 2 == 0 else b""
        path.write_bytes(whole[:at] if i % 2 else turned)
        what = f"{'cut' if i % 2 else 'bit'} at {at}"
        try:
            if kind.read() != want and kind.strict: wrong.append(f"{what} not noticed")
        except InputError: noticed += 1
        except Exception as e: wrong.append(f"{what}: {type(e).__name__}")
    path.write_bytes(whole)
    return 2 * places, noticed, wrong
