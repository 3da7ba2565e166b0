"""System calls that fail: the disk is full, a write stops half way, a rename is refused.

The command has to end with exit code 1 and one line that names the file; when the fault is gone, the run goes on to the
same bits.
"""
import builtins
import errno
import os
import random
import shutil
from pathlib import Path

from .process import bits, call, one_line, steps

CALLS = ("write", "short write", "fsync", "replace")


class _Watched:
    "A file whose writes somebody else looks at first."

    def __init__(self, file, look): self._file, self._look = file, look

    def write(self, content):
        self._look(self._file, content)
        return self._file.write(content)

    def __getattr__(self, name): return getattr(self._file, name)

    def __enter__(self): return self

    def __exit__(self, *_): self._file.close()


def watch_writes(look):
    "In this process, call `look(file, content)` before anything is written into a file of bytes."
    real = builtins.open

    def watched(file, mode="r", *args, **kwargs):
        f = real(file, mode, *args, **kwargs)
        return _Watched(f, look) if mode in ("wb", "ab") and not str(file).endswith(".lock") else f

    builtins.open = watched


def fail_in(what: str, k: int, number: int):
    "A preparation: the k-th call of one of `CALLS` fails with an error, and all that come after, as on a full disk."
    def prepare():
        calls = iter(range(10 ** 9))

        def fail(*_):
            if next(calls) >= k: raise OSError(number, os.strerror(number))

        def half(file, content):
            if next(calls) < k: return
            file.write(content[:len(content) // 2])
            raise OSError(number, os.strerror(number))

        if what not in ("fsync", "replace"): return watch_writes(half if what == "short write" else fail)
        inner = getattr(os, what)

        def refused(*args):
            fail()
            return inner(*args)

        setattr(os, what, refused)
    return prepare


def fail(seed: int, run: Path, whole) -> tuple:
    "A trial: a run in which the system fails, resumed and compared. (call, what went wrong)"
    r, what = random.Random(f"fail/{seed}"), CALLS[seed % len(CALLS)]
    at, number = seed // len(CALLS) % 2, r.choice([errno.ENOSPC, errno.EIO, errno.EDQUOT])
    named = {"fsync": "force to disk", "replace": "rename"}
    n = len(whole.times[at][named[what]]) if what in named else whole.writes[at]
    for i in (0, 1):
        if i == at:
            code, err, k = 0, "", r.randrange(n)
            while code == 0:  # a run that saves less often than the undisturbed one may never come to its k-th call
                shutil.rmtree(run / "train" if i else run, ignore_errors=True)
                code, err = call(steps(run)[i], fail_in(what, k, number))
                k //= 2
            line = one_line(err)
            if code != 1 or os.strerror(number) not in line or str(run) not in line:
                return what, f"exit {code}: {err[-300:]}"
        code, err = call(steps(run)[i])
        if code: return what, f"exit {code}: {err[-300:]}"
    return what, "" if bits(run) == whole.bits else "other bits"
