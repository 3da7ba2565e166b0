"""`mgdarts` in a process of many that dies once.

usage: torchrun run.py FLAG HOW ARGUMENT... : when FLAG is not there, process 1 makes it after the epoch 3 and then is
killed (HOW = kill), gets a SIGUSR1 (HOW = signal) or has another alpha than the others (HOW = differ).
"""
import os
import signal
import sys
from pathlib import Path

import torch

from mgdarts.cli.main import main
from mgdarts.runs import run

FLAG, HOW = Path(sys.argv[1]), sys.argv[2]


class Disturbed(run.Compared):
    def __call__(self, event):
        if event.type == "epoch" and event.epoch == 3 and os.environ["RANK"] == "1" and not FLAG.exists():
            FLAG.touch()
            if HOW == "differ":
                with torch.no_grad(): self.loop.net.alpha[0, 0, 0] += 1
            else: os.kill(os.getpid(), signal.SIGKILL if HOW == "kill" else signal.SIGUSR1)
        super().__call__(event)


run.Compared = Disturbed
sys.exit(main(sys.argv[3:]))
