"Run folders that somebody else had in his hands, to be resumed, retrained or looked at."
import hashlib
import os
import shutil
from pathlib import Path

import torch

from mgdarts.base import files
from mgdarts.base.files import Checkpoints

from .inputs import Runs, Table, by_hand, deflated, replaced

CONFIG, EVENTS, RESULT = "config.json", "events.jsonl", "result.json"


def state(change=None, content: bytes | None = None):
    "A change of a run folder: another state, with a good checksum."
    def put(run: Path):
        folder = Checkpoints(run / "checkpoint")
        new = content
        if new is None:
            old = folder.load()
            new = files.pack_state(change(old) or old)
        for f in folder.files(): f.write_bytes(new)
    return put


def sealed(body: bytes) -> bytes:
    "Anything at all as the content of a state, with a good checksum."
    head = b"%s %d %s\n" % (files.STATE, files.STATE_VERSION, hashlib.sha256(body).hexdigest().encode())
    return head + body


def copy(t: Table, change, finished: bool = False) -> Path:
    "A copy of the run, or of its unfinished self, after somebody else had it."
    folder = t.name("r")
    shutil.copytree(t.run, folder, ignore=shutil.ignore_patterns("plotly.min.js"))
    if not finished:
        shutil.rmtree(folder / "train")
        for name in (RESULT, "report.html"): (folder / name).unlink()
    change(folder)
    return folder


def _config(change): return lambda run: by_hand(run / CONFIG, change, True)


def configurations(t: Table):
    "What is wrong with a configuration."
    def search(**knobs): return _config(lambda c: c["config"]["search"].update(knobs))
    def cut(run): (run / CONFIG).write_bytes((run / CONFIG).read_bytes()[:200])

    for what, words, change in (
            ("a configuration cut in half", "damaged", cut),
            ("a configuration that is a list", "damaged", lambda run: (run / CONFIG).write_text("[1]")),
            ("a configuration nested 100,000 deep", "damaged", lambda run: (run / CONFIG).write_text("[" * 100_000)),
            ("a configuration of 65 MiB", "too large", lambda run: os.truncate(run / CONFIG, 65 << 20)),
            ("one digit of a configuration changed", "checksum", replaced(CONFIG, '"seed": 0', '"seed": 1')),
            ("a configuration without a schema", "no schema", _config(lambda c: c.pop("schema"))),
            ("a configuration of a later schema", "later", _config(lambda c: c.update(schema=99))),
            ("a configuration with an unknown key", "unknown config key", search(run="rm")),
            ("a configuration with a bad value", "out of range", search(batch=-1)),
            ("a configuration that names files outside", "plain word",
             _config(lambda c: c["config"].update(preset="../../x"))),
            ("a record without its data", "lacks", _config(lambda c: c.pop("dataset"))),
            ("other images than at the beginning", "not those", _config(lambda c: c.update(data_fingerprint="0")))):
        t.row(what, ["search", "--resume", "--out", copy(t, change)], words)


def states(t: Table):
    "What is wrong with a state."
    grows = files.pickled({"mom": torch.zeros(1).expand(10 ** 9)})
    packed = deflated(files.pickled({"mom": torch.zeros(10 ** 6)}))
    later = files.pack_state({}).replace(b"state 1 ", b"state 9 ", 1)

    def another_shape(s): s["net"].update(alpha=s["net"]["alpha"][:1])

    for what, words, change in (
            ("no whole state", "new run", state(content=b"garbage")),
            ("a state of a later version", "later mgdarts", state(content=later)),
            ("a state that makes a folder", "new run", state(content=sealed(files.pickled({"x": Runs(t.hacked)})))),
            ("a state that grows from 3 kB to 4 GB", "new run", state(content=sealed(grows))),
            ("a state that is packed 1000 to 1", "new run", state(content=sealed(packed))),
            ("a state that is a list", "new run", state(content=sealed(files.pickled([1])))),
            ("a state without optimizers", "does not fit", state(lambda s: s.pop("optimizer") and None)),
            ("a state with another shape", "does not fit", state(another_shape)),
            ("a state at stage 10^9", "does not fit", state(lambda s: s["counters"].update(stage=10 ** 9))),
            ("another run's state", "another search", state(lambda s: s.update(seed=5)))):
        t.row(what, ["search", "--resume", "--out", copy(t, change)], words)


def _link(t: Table, name: str):
    "A change of a run folder: something in it is a link to somebody's own."
    def change(run: Path):
        mine = t.name("precious")
        shutil.move(run / name, mine)
        (run / name).symlink_to(mine)
    return change


def records(t: Table):
    "What is wrong with events and results, and with what lies in their places."
    def lock(run):
        shutil.rmtree(run / ".lock.rw", ignore_errors=True)
        (run / ".lock.rw").symlink_to(t.hacked)

    def pipe(run):
        (run / EVENTS).unlink()
        os.mkfifo(run / EVENTS)

    def warm(run): (run / EVENTS).write_bytes((run / EVENTS).read_bytes().replace(b"warm-up", b"warm-UP"))
    def longer(run): (run / EVENTS).write_bytes((run / EVENTS).read_bytes()[:-5] + b"0}\n")

    for what, words, change in (
            ("events that are gone", "no file", lambda run: (run / EVENTS).unlink()),
            ("events of another run", "damaged", warm),
            ("events that are a link to somebody's file", "link", _link(t, EVENTS)),
            ("a checkpoint folder that is a link", "link", _link(t, "checkpoint")),
            ("a lock that is a link", "link", lock), ("events that are a pipe", "device", pipe)):
        t.row(what, ["search", "--resume", "--out", copy(t, change)], words)
    for what, words, change in (
            ("a result with one digit changed", "checksum", replaced(RESULT, '"stages_reached"', '"stages_reacheD"')),
            ("events changed after the end", "not what the run recorded", longer),
            ("a line that is no event", "", lambda run: (run / EVENTS).write_text("{}\n"))):
        folder = copy(t, change, finished=True)
        shutil.rmtree(folder / "train")
        t.row(f"retraining of a run with {what}", ["train", folder], words)
