"What processes do that test_locks.py starts. They are forks of a server that has imported it once."
import multiprocessing
import os
import random
import signal
import time
import warnings

from mgdarts.base import locks
from mgdarts.base.options import InputError

context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
context.set_forkserver_preload(["mgdarts.base.locks"])


def hold(kind, path, lease, elsewhere, ask):
    "Hold a lock, and say when asked whether it is still there; `elsewhere`: as a process of another machine."
    if elsewhere:
        locks.neighbourhood = lambda: f"another machine {os.getpid()}"
    try:
        with warnings.catch_warnings(record=True) as said, getattr(locks, kind)(path, lease) as held:
            ask.send("in" + "".join(str(w.message) for w in said))
            while ask.recv():
                try:
                    held.check()
                    ask.send("mine")
                except locks.LockLost as e:
                    ask.send(f"lost: {e}")
    except InputError as e:
        ask.send(f"refused: {e}")
    except EOFError:
        pass


class Holder:
    "A process that holds a lock, or was refused."

    def __init__(self, path, lease, elsewhere=False, kind="lock", wait=True):
        self.end_, other = context.Pipe()
        self.process = context.Process(target=hold, args=(kind, path, lease, elsewhere, other), daemon=True)
        self.process.start()
        other.close()
        self.said = self.end_.recv() if wait else None
        self.pid = self.process.pid

    def ask(self):
        self.end_.send(True)
        return self.end_.recv()

    def send(self, number):
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self.process.join()

    def end(self):
        if self.process.is_alive():
            self.send(signal.SIGCONT)
            self.end_.send(False)
        self.process.join()


def race(folder, seed, elsewhere, start, seconds, out):
    "Come in and leave, or die inside, again and again, and tell how often; -1: another was inside."
    warnings.simplefilter("ignore")
    if elsewhere:
        locks.neighbourhood = lambda: f"machine {seed}"
    r, n = random.Random(seed), 0
    time.sleep(max(start - time.time(), 0))
    while time.time() < start + seconds:
        try:
            with locks.lock(folder, 2.0) as held:
                try:
                    os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    return out.put((seed, -1))
                time.sleep(r.uniform(0, 0.02))
                held.check()
                os.unlink(folder / "inside")
                n += 1
                out.put((seed, n))
                if not elsewhere and r.random() < 0.2:
                    time.sleep(0.05)  # the queue's thread writes
                    os.kill(os.getpid(), signal.SIGKILL)
        except InputError:
            time.sleep(r.uniform(0, 0.02))
