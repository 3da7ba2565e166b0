"""Wrong inputs. Each row is a command that cannot be right.

It has an exit code and some words of the one line that it has to answer with, and it may write nothing but its own
lock. The folders of `strangers` come from somebody who knows how the program works: their checksums are right, and what
they hold is meant to run code, to write elsewhere, or to fill the memory.
"""
import hashlib
import io
import json
import os
import shutil
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mgdarts.base import files
from mgdarts.net.files import JSON_FILE, MASK_FILE

from .process import call, one_line
from .rot import GENOTYPE, pictures

# --set of a search -> words of the answer
KNOBS = {
    "chanels=4": "did you mean", "batch=4": "ambiguous", "nonsense": "KEY=VALUE", "=4": "KEY=VALUE",
    "channels=5": "even", "channels=0": "out of range", "channels=many": "whole number", "cells=2": "out of range",
    "cells=65": "out of range", "aux_size=tiny": "aux_size", "stem=vgg": "stem", "data.size=-1": "out of range",
    "subset=0": "above 0", "subset=5": "too small", "subset=1e9": "more than", "subset=20.5": "whole number",
    "test_subset=3": "too small", "val_fraction=0": "out of range", "val_fraction=0.95": "out of range",
    "crop=65": "out of range", "crop=40": "could miss", "flip=perhaps": "yes or no", "target_m=0": "above 0",
    "target_m=-1": "out of range", "target_m=1000": "super-net's own size", "target_m=nan": "finite",
    "target_m=inf": "finite", "search.stages=2": "stages", "stage_keep=0.3,0.4": "stage_keep",
    "stage_keep=2,2,2": "out of range", "regrow=1.5": "out of range", "regrow_cells=some": "regrow_cells",
    "regrow_gamma=1": "out of range", "search.warmup=-1": "out of range", "search.warmup=many": "whole number",
    "prune_every=0": "out of range", "max_epochs=0": "out of range", "optimisation=both": "optimisation",
    "granularities=layer": "granularities", "granularities=": "granularities",
    "granularities=filter,filter": "different", "threshold_init=max": "threshold_init",
    "search.batch=0": "out of range", "search.batch=1.5": "whole number",
    "lr_weights=-1": "out of range", "lr_arch=1e99": "out of range", "search.momentum=1": "out of range",
    "cost=time": "cost", "lambda_step=2": "out of range", "prune_low=0.5": "prune_high", "impl=slow": "impl",
    "recompute=some": "recompute", "amp=maybe": "yes or no", "threads=-1": "out of range", "seed=-1": "out of range",
    "seed=one": "whole number", "train.epochs=0": "out of range", "train.lr=nan": "finite", "schedule=step": "schedule",
    "weights=zero": "weights", "drop_path=1": "out of range", "preset=../../x": "by its name",
    "data.name=../x": "not a path"}


@dataclass
class Row:
    what: str
    args: list
    words: str  # of the answer
    code: int = 2  # exit code


@dataclass
class Table:
    "The rows so far, and the places that they are about."
    d: Path  # an empty folder: what rows need is made in it
    run: Path  # a finished run
    rows: list = field(default_factory=list)

    @property
    def new(self) -> Path: return self.d / "new"

    @property
    def hacked(self) -> Path: return self.d / "hacked"  # is there when somebody's code has run

    def name(self, letter: str) -> Path: return self.d / f"{letter}{len(self.rows)}"

    def row(self, what: str, args: list, words: str):
        self.rows.append(Row(what, [str(a) for a in args], words))

    def rows_of(self, rows: tuple):
        "Rows that are called what they are."
        for *args, words in rows:
            said = " ".join(map(str, args)).replace(str(self.d), "…").replace(str(self.run), "RUN")
            self.row(said, args, words)


class Runs:
    "Something that would make a folder when it is unpickled."

    def __init__(self, folder): self.folder = str(folder)

    def __reduce__(self): return os.mkdir, (self.folder,)


def deflated(content: bytes) -> bytes:
    "A zip file, packed."
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as z, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for i in z.infolist(): packed.writestr(i.filename, z.read(i))
    return out.getvalue()


def by_hand(path: Path, change, seal: bool):
    "Change a JSON file by hand; `seal` it with a good checksum."
    d = json.loads(path.read_text())
    d.pop("sha256")
    change(d)
    path.write_text(json.dumps(d | ({"sha256": files.digest(d)} if seal else {})))


def replaced(name: str, old: str, new: str):
    "A change of a text file in a folder."
    def change(folder: Path):
        path = folder / name
        path.write_text(path.read_text().replace(old, new))
    return change


def options(t: Table):
    "Options and arguments of commands."
    d, run = t.d, t.run
    for given, words in KNOBS.items():
        t.row(f"--set {given}", ["search", "--preset", "smoke", "--set", given, "--out", t.new], words)
    (d / "text").write_text("hello")
    (d / "bytes").write_bytes(bytes(range(256)))
    t.rows_of((
        ("search", "--preset", "smok", "did you mean"), ("search", "--dataset", "no-such", "no-such"),
        ("search", "--dataset", "../x", "not a path"), ("search", "--method", "magic", "magic"),
        ("search", "--device", "cuda:99", "cuda:99"), ("search", "--device", "toaster", "toaster"),
        ("search", "--bogus", "bogus"), ("search", "--seed", "x", "seed"), ("search", "--resume", "--out"),
        ("search", "--resume", "--out", d / "nowhere", "run folder"),
        ("search", "--resume", "--seed", "1", "--out", run, "leave out"), ("search", "--out", run, "exists"),
        ("search", "--out", d / "text", "exists"), ("search", "--out", d / "text/x", "not a folder"),
        ("search", "--save-every", "-1", "save-every"), ("train", d / "nowhere", "not there"), ("train", run, "exists"),
        ("train", d / "text", "preset"),
        ("train", run, "--set", "train.epochs=3", "--resume", "another configuration"),
        ("train", run, "--set", "data.size=16", "--out", t.new, "size"), ("runs", d / "nowhere", "not a folder"),
        ("nonsense", "nonsense"), ("knobs", "nonsense", "nonsense"), ("count", "--channels", 0, "out of range"),
        ("count", "--channels", "x", "channels"), ("count", "--space", "mars", "mars"),
        ("count", "--classes", 0, "classes"), ("plan", "--stages", 2, "stages"), ("plan", "--batch", 0, "out of range"),
        ("plan", "--figure", d / "plan.gif", ".html"), ("bench", "step", "--live", 0, "live"),
        ("bench", "step", "--steps", 0, "steps"), ("bench", "step", "--stage", 4, "stage"),
        ("bench", "data", "--batches", 0, "batches"), ("bench", "search", "--epochs", 0, "epochs"),
        ("arch", "show", d / "nowhere", "no file"), ("arch", "show", d / "text", "JSON"),
        ("arch", "show", d, "no file")))


def genotypes(t: Table):
    "Genotypes in the authors' text format, and masks that belong to them."
    def row(what, text, words, *more, channels=4):
        file = t.name("g")
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        t.row(what, ["arch", "import", "--genotype", file, "--channels", channels, "--out", t.new, *more], words)

    makes = f"__import__('os').mkdir({str(t.hacked)!r})"
    row("a genotype that is prose", "hello", "not a genotype")
    row("a genotype in bytes", bytes(range(256)), "not a text file")
    row("a genotype that makes a folder", GENOTYPE.replace("'sep_conv_3x3'", makes, 1), "not a genotype")
    row("a genotype that is a call", f"NET = {makes}", "not a genotype")
    row("a genotype nested 100,000 deep", "NET = Genotype(gene=" + "[" * 100_000, "not a genotype")
    row("a genotype with an unknown operation", GENOTYPE.replace("sep_conv_3x3", "sep_conv_9x9"), "sep_conv_9x9")
    row("a genotype with an edge backwards", GENOTYPE.replace("0, 2,", "3, 2,"), "edge")
    row("a genotype with 10^9 filters", GENOTYPE.replace("[4, 4, 4]", "[4, 1000000000, 4]"), "4096")
    row("a genotype of 1 cell", "NET = Genotype(gene=[[('skip_connect', 0, 2, [4])]], concat=range(2, 6))",
        "number of cells")
    row("a genotype by another name", GENOTYPE, "no genotype", "--name", "OTHER")
    row("an odd number of channels", GENOTYPE, "channels", channels=-3)
    zeros = [[torch.zeros(10 ** 6)]]
    for what, content in (
            ("masks that are text", b"hello"), ("masks that make a folder", files.pickled(Runs(t.hacked))),
            ("masks that grow from 3 kB to 4 GB", files.pickled([[torch.zeros(1).expand(10 ** 9)]])),
            ("masks that are packed 1000 to 1", deflated(files.pickled(zeros))),
            ("masks for another genotype", files.pickled([[torch.ones(3)]]))):
        file = t.name("m")
        file.write_bytes(content)
        row(what, GENOTYPE, str(file), "--masks", file)


def _pipe(folder: Path):
    (folder / JSON_FILE).unlink()
    os.mkfifo(folder / JSON_FILE)


def _huge(folder: Path):
    "Masks that say they are 1 TB."
    head = json.dumps({"x": {"dtype": "BOOL", "shape": [10 ** 12], "data_offsets": [0, 10 ** 12]}}).encode()
    content = len(head).to_bytes(8, "little") + head
    (folder / MASK_FILE).write_bytes(content)
    by_hand(folder / JSON_FILE, lambda a: a.update(masks_sha256=hashlib.sha256(content).hexdigest()), True)


def architectures(t: Table):
    "Architectures of others: with a good checksum, but not what they say; or changed under their old one."
    def row(what, words, change):
        copy = t.name("a")
        copy.mkdir()
        for name in (JSON_FILE, MASK_FILE): shutil.copy(t.run / name, copy)
        change(copy)
        t.row(what, ["arch", "show", copy], words)

    for what, words, change in (
            ("of a later schema", "update", lambda a: a.update(schema=99)),
            ("without cells", "lacks", lambda a: a.pop("cells")),
            ("with another key", "unknown key", lambda a: a.update(run="rm")),
            ("with masks elsewhere", "unknown key", lambda a: a.update(masks="../../x")),
            ("with 20 times the cells", "number of cells", lambda a: a.update(cells=a["cells"] * 30)),
            ("10^9 channels wide", "whole number", lambda a: a.update(channels=10 ** 9)),
            ("with 4096 filters everywhere", "join", lambda a: a["cells"][0].update(widths=[4096] * 6)),
            ("with a name of 10^5 letters", "name", lambda a: a.update(name="x" * 10 ** 5)),
            ("with images of 10^7 pixels", "size", lambda a: a.update(size=10 ** 7)),
            ("with half a class", "classes", lambda a: a.update(classes=.5)),
            ("with a list for provenance", "provenance", lambda a: a.update(provenance=[1]))):
        row(f"an architecture {what}", words, lambda c, change=change: by_hand(c / JSON_FILE, change, True))
    for what, words, change in (
            ("changed by hand under its old checksum", "checksum",
             replaced(JSON_FILE, '"classes": 10', '"classes": 11')),
            ("with NaN", "NaN", replaced(JSON_FILE, '"classes": 10', '"classes": NaN')),
            ("without its masks", "no file", lambda c: (c / MASK_FILE).unlink()),
            ("with other masks", "not the file", lambda c: (c / MASK_FILE).write_bytes(b"x")),
            ("that is a pipe", "no file", _pipe)):
        row(f"an architecture {what}", words, change)
    row("masks that say they are 1 TB", "not a safetensors file", _huge)


def images(t: Table):
    "Folders of images."
    small = [x for s in ("data.size=8", "subset=1", "val_fraction=.25") for x in ("--set", s)]

    def row(what, words, change, *more):
        folder = t.name("i")
        pictures(folder)
        change(folder)
        t.row(what, ["search", "--preset", "smoke", "--dataset", folder.name, "--data-dir", t.d, *small, "--out", t.new,
                     *more], words)

    def gone(f):
        (f / "train/cat/3.png").unlink()
        (f / "train/cat/3.png").symlink_to("nowhere")

    def half(f): (f / "train/cat/3.png").write_bytes((f / "train/cat/3.png").read_bytes()[:40])

    row("a folder without training images", "train is missing", lambda f: shutil.rmtree(f / "train"))
    row("a class that is only trained on", "missing", lambda f: shutil.rmtree(f / "test/cat"))
    row("a class without images", "no images", lambda f: [p.unlink() for p in (f / "train/cat").iterdir()])
    row("an image that is text", "3.png is not a readable image", lambda f: (f / "train/cat/3.png").write_text("hello"))
    row("an image cut in half", "3.png is not a readable image", half)
    row("an image that is gone", "3.png is missing", gone)
    row("a text among images", "notes.txt is not an image", lambda f: (f / "test/cat/notes.txt").write_text("hello"))
    row("a class of unreadable images, skipped", "no readable image",
        lambda f: [p.write_text("x") for p in (f / "train/cat").iterdir()], "--set", "skip_damaged=true")


def tree(folder: Path) -> dict:
    "Everything in a folder but locks and caches, and by what a change of it is seen."
    out = {}
    for path, names, there in os.walk(folder):
        for n in there + names:
            p = Path(path) / n
            s = os.lstat(p)
            if n.startswith((".lock", ".mgdarts-")) or ".lock.rw" in path: continue
            out[str(p)] = (s.st_mode, s.st_ino, *(() if stat.S_ISDIR(s.st_mode) else (s.st_size, s.st_mtime_ns)))
    return out


def refuse(row: Row, d: Path) -> tuple:
    "A trial: a wrong input, answered with one line and nothing written. (line, what went wrong)"
    before = tree(d)
    got, err = call(row.args, lambda: os.environ.update(MGDARTS_ROOT=str(d)))
    line = one_line(err)
    if got != row.code or not line or row.words not in line:
        return line, f"exit {got}, asked for {row.code} and {row.words!r}: {err[-300:]}"
    return line, "" if tree(d) == before else "something was written"
