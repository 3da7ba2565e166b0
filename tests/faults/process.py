"""A run in a process of its own.

Hundreds of runs are needed, and importing PyTorch takes longer than one of them. So each run is a fork of this process,
which has imported everything and has done the same once itself: kernels that were compiled then are there in all forks.
The runs are tiny, but they have all parts: three stages, commits, compaction, regrowing, fine-tuning, retraining. They
save their state often.
"""
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from mgdarts.base.files import Checkpoints, read_json
from mgdarts.cli.main import main
from mgdarts.net.files import JSON_FILE, MASK_FILE
from mgdarts.runs.frames import REPLAY_FILE
from mgdarts.runs.listen import read_events

FAST = {"data.subset": 120, "data.test_subset": 50, "search.warmup": 1, "search.max_epochs": 2, "search.prune_every": 1,
        "search.lambda_step": .2, "search.batch": 54, "train.batch": 54, "train.epochs": 2,
        "rules.ops": "skip_connect,sep_conv_3x3,max_pool_3x3"}
SETS = [x for k, v in FAST.items() for x in ("--set", f"{k}={v}")]
OFTEN = ["--save-every", "0.3"]
CLOCKS = ("record", "run", "wall_s", "cpu_s", "events")  # and paths: what may differ between two runs


def _child(args: list, err, prepare, after):
    "What the fork does; it does not come back."
    code = 99
    try:
        os.dup2(err.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for name in ("FORCE_COLOR", "CLICOLOR_FORCE"): os.environ.pop(name, None)  # no progress bar into a file
        if prepare: prepare()
        code = main([str(a) for a in args])
        if after: after()
    except BaseException: traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def call(args: list, prepare=None, after=None) -> tuple:
    """The command line in a fork; `prepare` and `after` are called in it, before and after the command.

    (exit code, or minus the signal that ended it; what it said on stderr)
    """
    with tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0: _child(args, err, prepare, after)
        _, status = os.waitpid(pid, 0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), err.read().decode(errors="replace")


def one_line(err: str) -> str:
    "What a user reads when something is wrong; warnings of Python come before it. Empty: it was not one line."
    lines = [line for line in err.splitlines() if line.strip()]
    mine = [line for line in lines if line.startswith("mgdarts: ")]
    return mine[0] if len(mine) == 1 and "Traceback" not in err and lines[-1] == mine[0] else ""


def steps(run: Path) -> tuple:
    "The commands that bring a run folder, in whatever state it is, to its end: two lists of arguments."
    searched = ["--resume"] if (run / "config.json").exists() else ["--preset", "smoke", *SETS]
    trained = ["--resume"] if (run / "train/config.json").exists() else []
    return ["search", *searched, *OFTEN, "--out", run], ["train", run, *OFTEN, *trained]


def text(state: dict) -> str:
    "A state, tensors with their types and shapes, as text to compare."
    def spell(t): return [str(t.dtype), list(t.shape), t.contiguous().view(-1).numpy().tobytes().hex()]
    return json.dumps(state, default=spell)


def _left_behind(part: Path, files: tuple) -> tuple:
    def strip(d): return {k: v for k, v in d.items() if k not in CLOCKS}
    events = [{k: v for k, v in e.items() if k != "time"} for e in read_events(part / "events.jsonl")]
    state, result = Checkpoints(part / "checkpoint").load(), read_json(part / "result.json", "a result")
    return events, text(strip(state)), strip(result), [(part / name).read_bytes() for name in files]


def bits(run: Path) -> dict:
    "Everything that a run and its retraining leave behind and that must not depend on interruptions."
    return {"search": _left_behind(run, (JSON_FILE, MASK_FILE, REPLAY_FILE)),
            "retraining": _left_behind(run / "train", (JSON_FILE, MASK_FILE))}
