"Locks between processes: killed, suspended, racing, on another machine, and on file systems that cannot link."
import contextlib
import errno
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import locking
import pytest
from filelock import SoftReadWriteLock
from locking import Holder, context

from mgdarts.base import locks
from mgdarts.base.files import refuse_links
from mgdarts.base.locks import LockLost, inside, lock, turn
from mgdarts.base.options import InputError
from mgdarts.runs.folder import new_folder

LEASE = 2.0  # of these tests: short, so that it ends while one waits


@pytest.fixture
def holder(tmp_path):
    made = []

    def make(path=tmp_path, lease=LEASE, **options):
        made.append(Holder(path, lease, **options))
        return made[-1]

    yield make
    for h in made:
        h.end()


def refused(folder, lease=LEASE):
    "The message, and the seconds that it took."
    start = time.monotonic()
    with pytest.raises(InputError) as e, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with lock(folder, lease):
            raise AssertionError("two inside")
    return str(e.value), time.monotonic() - start


def test_who_holds_it_is_said_at_once(holder, tmp_path):
    h = holder()
    why, seconds = refused(tmp_path)
    assert f"another process is working on {tmp_path}: wait for it, or choose another --out" in why
    assert f"process {h.pid} on " in why and "since 20" in why and seconds < 1
    h.end()
    with lock(tmp_path, LEASE) as hold:
        hold.check()


def test_who_was_killed_here_is_noticed_at_once(holder, tmp_path):
    holder(lease=600.0).send(signal.SIGKILL)
    start = time.monotonic()
    with lock(tmp_path, 600.0):
        assert time.monotonic() - start < 35 and inside(tmp_path / ".lock.rw").who["pid"] == os.getpid()


def test_a_number_that_another_process_has_now_does_not_count(holder, tmp_path, monkeypatch):
    h = holder(lease=600.0)
    door = tmp_path / ".lock.rw"
    there = inside(door)
    h.send(signal.SIGKILL)
    with monkeypatch.context() as m:  # this very process has the number of the one that was killed, as in a container
        m.setattr(locks, "itself", lambda: there.who | {"pid": os.getpid()})
        locks.sign(door, there.number)
    with lock(tmp_path, 600.0) as hold:
        hold.check()


def test_who_waits_to_be_reaped_is_dead(tmp_path):
    order = ("import sys; from mgdarts.base.locks import lock; lock(sys.argv[1], 600.).__enter__(); "
             "print(1, flush=True); input()")
    p = subprocess.Popen([sys.executable, "-c", order, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    p.stdout.readline()
    os.kill(p.pid, signal.SIGKILL)  # and nobody hears of it yet: a zombie
    while locks.started(p.pid):
        time.sleep(0.01)
    with lock(tmp_path, 600.0) as hold:
        hold.check()
    p.communicate()


def test_a_beating_heart_elsewhere_is_left_in_peace(holder, tmp_path):
    h = holder(elsewhere=True)
    for _ in range(2):
        why, seconds = refused(tmp_path)
        assert f"process {h.pid}" in why and seconds < LEASE
    time.sleep(LEASE * 1.5)
    assert "process" in refused(tmp_path)[0] and h.ask() == "mine"


def test_who_is_suspended_for_less_than_the_lease_is_not_robbed(holder, tmp_path):
    h = holder(lease=6.0, elsewhere=True)
    h.send(signal.SIGSTOP)
    thief = holder(lease=6.0, wait=False)
    time.sleep(4)
    assert not thief.end_.poll()
    h.send(signal.SIGCONT)
    assert "refused: another process is working on" in thief.end_.recv()
    assert h.ask() == "mine"


def test_who_was_suspended_for_longer_notices_that_it_was_robbed(holder, tmp_path):
    h = holder(elsewhere=True)
    h.send(signal.SIGSTOP)
    start = time.monotonic()
    with pytest.warns(UserWarning, match=f"process {h.pid}"), lock(tmp_path, LEASE) as hold:
        assert time.monotonic() - start >= LEASE
        h.send(signal.SIGCONT)
        said = h.ask()
        assert said.startswith("lost") and f"process {os.getpid()} on" in said and "\n" not in said
        h.end()  # what it does at its end takes nothing from this one
        hold.check()
        assert "another process" in refused(tmp_path)[0]


def test_who_was_killed_elsewhere_is_noticed_after_the_lease(holder, tmp_path):
    holder(elsewhere=True).send(signal.SIGKILL)
    start = time.monotonic()
    with pytest.warns(UserWarning, match="looking for"), lock(tmp_path, LEASE):
        assert LEASE <= time.monotonic() - start < 4 * LEASE


def race(folder, n, elsewhere):
    "How often processes came in, and how many died inside."
    out, start = context.Queue(), time.time() + 1
    team = [context.Process(target=locking.race, args=(folder, i, elsewhere, start, 6, out)) for i in range(n)]
    for p in team:
        p.start()
    came_in = {}
    while any(p.is_alive() for p in team) or not out.empty():
        with contextlib.suppress(queue.Empty):
            seed, times = out.get(timeout=0.1)
            assert times > 0, "two were inside"
            came_in[seed] = times
    assert all(p.exitcode in (0, -signal.SIGKILL) for p in team)
    return sum(came_in.values()), sum(p.exitcode == -signal.SIGKILL for p in team)


def test_of_many_who_break_a_dead_ones_lock_one_gets_it(holder, tmp_path):
    "Ten processes race, and most of them die with the lock, so that it is broken again and again."
    holder().send(signal.SIGKILL)
    came_in, died = race(tmp_path, 10, False)
    assert came_in >= 10 and died >= 5, (came_in, died)


def test_of_many_who_wait_for_a_lease_to_end_one_gets_it(holder, tmp_path):
    "Six machines find the lock of one that is gone: they wait for the lease, and one after the other comes in."
    holder(elsewhere=True).send(signal.SIGKILL)
    assert race(tmp_path, 6, True)[0] >= 6


def test_turns_are_taken_past_a_dead_one(holder, tmp_path):
    holder(tmp_path / "turn", 600.0, kind="turn").send(signal.SIGKILL)
    with turn(tmp_path / "turn", 600.0) as hold:
        hold.check()


def test_a_dead_heart_is_noticed(tmp_path, monkeypatch):
    "A thread that ends with an error nobody expected must not leave a run that believes it has the lock."
    monkeypatch.setattr(locks, "BEATS", 50)
    with lock(tmp_path, LEASE) as hold:
        monkeypatch.setattr(hold.lock._hold.participant, "heartbeat", lambda: 1 / 0)
        hold.beat.join(5)
        with pytest.raises(LockLost, match="go on with --resume"):
            hold.check()


def test_files_that_cannot_be_reached_count_as_lost_before_the_lease_ends(tmp_path, monkeypatch):
    with lock(tmp_path, LEASE) as hold:
        gone = OSError(errno.ESTALE, "Stale file handle")
        monkeypatch.setattr(hold.lock._hold.participant, "heartbeat", lambda: ("transient", gone))
        hold.beat.join(2 * LEASE)
        assert hold.lock.compromise.reason == "refresh-failed"
        with pytest.raises(LockLost):
            hold.check()


def test_a_lock_that_could_not_be_given_back_ends_with_its_lease(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device: '.*lock.rw'"), lock(tmp_path, LEASE):
        monkeypatch.setattr(os, "fsync", full)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="looking for"), lock(tmp_path, LEASE) as hold:
        hold.check()


def test_the_first_error_is_said(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ZeroDivisionError), lock(tmp_path, LEASE):
        monkeypatch.setattr(os, "fsync", full)
        1 / 0


def test_a_folder_may_be_removed_inside(tmp_path):
    (tmp_path / "a").mkdir()
    with lock(tmp_path / "a", LEASE):
        shutil.rmtree(tmp_path / "a")


def test_locks_of_earlier_versions_are_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_bytes(b"")
    with lock(tmp_path, LEASE):
        new_folder(tmp_path)  # what begins with a dot is not seen
        refuse_links(tmp_path)
    new_folder(tmp_path)


def test_a_copy_of_a_folder_is_nobodys(tmp_path):
    (tmp_path / "a").mkdir()
    with lock(tmp_path / "a", LEASE):
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        with pytest.warns(UserWarning, match="it has not said who it is"), lock(tmp_path / "b", LEASE) as hold:
            hold.check()


def test_a_link_in_the_folder_is_refused(tmp_path):
    (tmp_path / ".lock.rw").symlink_to(tmp_path.parent)
    with pytest.raises(InputError, match="is a link"):
        with lock(tmp_path, LEASE):
            pass


@pytest.mark.parametrize("damage", [b"", b"\xff" * 50, b'{"number": 1}', b'{"number": 1, "pid": "x"}', b"[" * 2000])
def test_what_a_stranger_says_of_itself_is_not_believed(tmp_path, damage):
    with SoftReadWriteLock(tmp_path / ".lock", is_singleton=False, heartbeat_interval=0.1,
                           stale_threshold=LEASE).write_lock():
        (tmp_path / ".lock.rw/who.json").write_bytes(damage)
        assert "it has not said who it is" in refused(tmp_path)[0]


def test_without_hard_links_the_systems_lock_is_used(tmp_path, monkeypatch):
    def no(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no)
    with pytest.warns(UserWarning, match="for this machine only"), lock(tmp_path, LEASE) as hold:
        hold.check()
        assert "another process is working on" in refused(tmp_path)[0]
    with pytest.warns(UserWarning, match="for this machine only"), turn(tmp_path / "turn", LEASE):
        pass


def test_in_random_order_nobody_is_inside_with_another(holder):
    "Holders that are suspended and go on while others come in: at most one believes itself inside."
    r, team = random.Random(0), []
    for _ in range(5):
        h = holder(elsewhere=True)
        team += [h] * h.said.startswith("in")
        r.choice(team).send(r.choice((signal.SIGSTOP, signal.SIGSTOP, signal.SIGCONT)))
    for h in team:
        h.send(signal.SIGCONT)
    answers = [h.ask() for h in team]
    assert len(team) > 1 and answers.count("mine") <= 1 and all(a == "mine" or "lost" in a for a in answers), answers


def test_damaged_files_of_a_lock_do_not_end_in_a_crash(tmp_path):
    with lock(tmp_path, LEASE):
        pass
    for n in (tmp_path / ".lock.rw/gen").glob("0*"):
        n.write_bytes(b"?")
    with pytest.warns(UserWarning, match="for this machine only"), lock(tmp_path, LEASE):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert "another process is working on" in refused(tmp_path)[0]


def test_the_folder_has_no_more_files_than_it_needs(tmp_path):
    for _ in range(5):
        with lock(tmp_path, LEASE):
            pass
    left = [p for p in Path(tmp_path).rglob("*") if p.is_file()]
    assert len(left) < 20 and sum(p.stat().st_size for p in left) < 4096
