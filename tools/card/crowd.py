"Many small steps at once: on the card, with and without CUDA's multi-process service, and on the machine's CPU."
import collections
import contextlib
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from card.ground import Ground, said
from card.steps import trained, whole_net
from mgdarts.fast.compiled import kernels_in_use
from mgdarts.runs.bench import bench_step


def small_step(device: str, toy: bool):
    "A step at the size of the scaled-down searches: C=8, L=6, 16 pixels, batch 64."
    net = whole_net(*((4, 3, 1.0, 8) if toy else (8, 6, 1.0, 16))).to(device)
    return trained(net, 8 if toy else 64, Ground(device, toy))


def for_a_while(g: Ground, step, seconds: float) -> tuple:
    "Milliseconds of a step, on the clock and of this process, in `seconds` of steps."
    done, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        step()
        g.wait()
        done += 1
    return 1e3 * (time.perf_counter() - start) / done, 1e3 * (time.process_time() - cpu) / done


def paced(i: int, rounds: list, seconds: float, device: str, toy: bool, gate, answers):
    "A process that makes steps in those rounds in which it takes part."
    try:
        torch.set_num_threads(1)
        step, g = small_step(device, toy), Ground(device, toy)
        for _ in range(3): step()
        for at, n in enumerate(rounds):
            g.wait()
            gate.wait(120)
            if i < n: answers.put((at, *for_a_while(g, step, seconds)))
            gate.wait(120)
    except Exception as e: answers.put((-1, said(e), 0.0))


def round_of(n: int, times: list) -> dict:  # times: of each process, on the clock and its own
    "The row of a round."
    ms, cpu = zip(*times)
    return {"processes": n, "ms": statistics.fmean(ms), "slowest_ms": max(ms), "cpu_ms": statistics.fmean(cpu),
            "steps_per_s": sum(1e3 / m for m in ms)}


def together(rounds: list, seconds: float, device: str, toy: bool) -> list:  # a row a round
    "Milliseconds of a step with several processes at once."
    context, many = multiprocessing.get_context("spawn"), max(rounds)
    gate, answers = context.Barrier(many), context.Queue()
    team = [context.Process(target=paced, args=(i, rounds, seconds, device, toy, gate, answers)) for i in range(many)]
    for p in team: p.start()
    found, errors = collections.defaultdict(list), []
    try:
        for _ in range(sum(rounds)):
            at, ms, cpu = answers.get(timeout=150)
            if at < 0:
                errors.append(ms)
                break
            found[at].append((ms, cpu))
    except Exception as e: errors.append(said(e))
    finally:
        if errors: gate.abort()
        for p in team:
            p.join(20)
            if p.is_alive(): p.kill()
    return [round_of(n, found[at]) for at, n in enumerate(rounds) if found[at]] + [{"error": e} for e in errors]


def processor() -> str:
    "What Linux calls the processor."
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def crowd_cpu(g: Ground):
    "One-thread steps on the machine's CPU, alone and with as many processes as it has cores, but one."
    cores = len(os.sched_getaffinity(0))
    yield {"cpu": processor(), "cores": cores, "capability": torch.backends.cpu.get_cpu_capability(),
           "kernels": kernels_in_use()}
    found = bench_step(4, 3, 8, size=8, steps=1) if g.toy else bench_step(8, 6, 64, size=16, steps=5)
    told = ("cpu_s", "wall_s", "matmul_gflops", "times_floor", "kernels", "channels", "cells", "batch", "size")
    yield {"bench_step": {k: found[k] for k in told}}
    many = max(2, cores - 1)
    rounds, seconds = ([2], 0.2) if g.toy else ([1, many], 3.0)
    for row in together(rounds, seconds, "cpu", g.toy): yield {"device": "cpu", **row}


def crowd(g: Ground):
    "Small steps on the card: one process, four, eight; and again through CUDA's multi-process service, if it is there."
    rounds, seconds = ([1], 0.2) if g.toy else ([1, 4, 8], 3.0)
    for row in together(rounds, seconds, g.device.type, g.toy): yield {"mps": False, **row}
    server = shutil.which("nvidia-cuda-mps-control")
    if not g.gpu or not server or g.left() < 25:
        yield {"mps": "not tried" if g.gpu and server else "not there"}
        return
    with tempfile.TemporaryDirectory() as folder:
        place = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        os.environ.update(place)
        try:
            subprocess.run([server, "-d"], timeout=20, check=True, capture_output=True)
            for row in together([4, 8], seconds, "cuda", g.toy): yield {"mps": True, **row}
        except Exception as e: yield {"mps": True, "error": said(e)}
        finally:
            with contextlib.suppress(Exception):
                subprocess.run([server], input=b"quit\n", timeout=20, capture_output=True)
            for k in place: os.environ.pop(k, None)
