"""Runs that are made on another machine: what they are (a list), the images they need (a pack), the runs themselves, and bringing them home.

A list is a JSON list of the fields of `mgdarts.paper.arms.Job`. What a run is called depends on these alone, not on where its images lie: a run folder made elsewhere and unpacked
into runs/repro is found finished by `mgdarts reproduce`. A pack has the very images that the jobs' configurations and seeds choose, so the fingerprint of the data is that of a run at home.
"""
import dataclasses
import functools
import io
import json
import signal
import sys
import tarfile
import time
from pathlib import Path

import torch

from mgdarts.paper import running
from mgdarts.runs import folder as folders, make as making, run as runs
from mgdarts.paper.arms import Job
from mgdarts.base.options import InputError, configure, from_dict, to_dict
from mgdarts.base.data import Split, Splits, fingerprint, load_data
from mgdarts.base.files import read_json


def read_list(path) -> list:  # of Job
    return [Job(**j) for j in json.loads(Path(path).read_text("utf-8"))]


def listed(records: list, seeds: list, settings: dict, labels: list) -> list:  # of Job
    "The arms of some records, with other seeds and settings."
    from mgdarts.paper.record import jobs_in

    out = {}
    for path in records:
        for j in jobs_in(read_json(Path(path), "a record")):
            if labels and j.label not in labels: continue
            for seed in seeds or [j.seed]:
                change = lambda c: c and to_dict(configure(from_dict(c), **{**settings, "seed": seed}))
                new = dataclasses.replace(j, seed=seed, search=change(j.search), train=change(j.train))
                out.setdefault((new.place(), new.label), new)
    return list(out.values())


# the images
def name_of(cfg, seed: int) -> str:
    "What a choice of images depends on: the configuration of the data, wherever they lie, and the seed."
    return json.dumps({**dataclasses.asdict(cfg), "dir": "", "autoaugment": None, "flip": None, "crop": None, "cutout": None, "seed": seed}, sort_keys=True)


def pack(jobs: list, out: Path, data_dir: str = ""):
    "Write the images of some jobs, each of them once."
    from safetensors.torch import save_file

    wanted = {name_of(c.data, c.seed): c for j in jobs for d in (j.search, j.train) if d for c in (from_dict(d),)}
    splits = [load_data(dataclasses.replace(c.data, dir=data_dir or c.data.dir), c.seed) for c in wanted.values()]
    for s in splits:
        if not isinstance(s.train.images, torch.Tensor): raise InputError(f"{s.label} is too large to be packed: its images stay on disk")
    tensors, meta, pools = {}, [], {}
    for i, (name, s) in enumerate(zip(wanted, splits)):
        for part in ("train", "val", "test"): pools.setdefault(tuple(s.train.images.shape[1:]), []).append((f"{i}.{part}", getattr(s, part).images))
        meta.append({"name": name, "classes": s.classes, "size": s.size, "label": s.label, "fingerprint": s.fingerprint, "skipped": s.skipped})
        tensors |= {f"{i}.{part}.labels": getattr(s, part).labels for part in ("train", "val", "test")} | {f"{i}.mean": s.mean, f"{i}.std": s.std}
    for k, (shape, parts) in enumerate(pools.items()):
        every, where = torch.cat([images.flatten(1) for _, images in parts]).unique(dim=0, return_inverse=True)
        tensors[f"pool.{k}"] = every.view(-1, *shape)
        for (part, images), at in zip(parts, where.split([len(images) for _, images in parts])): tensors[f"{part}.at"], tensors[f"{part}.pool"] = at.int(), torch.tensor(k)
    save_file(tensors, out, metadata={"splits": json.dumps(meta)})
    return {"data": len(wanted), "images": sum(len(t) for k, t in tensors.items() if k.startswith("pool")), "mib": out.stat().st_size / 2**20}


class Packed:
    "In the place of `load_data`: the images of a pack, checked against the fingerprint of the data they were taken from."

    def __init__(self, path: Path):
        from safetensors import safe_open

        with safe_open(path, "pt") as f: self.meta, self.tensors = json.loads(f.metadata()["splits"]), {k: f.get_tensor(k) for k in f.keys()}

    def __call__(self, cfg, seed, device="cpu") -> Splits:
        for i, m in enumerate(self.meta):
            if m["name"] == name_of(cfg, seed): break
        else: raise InputError(f"the pack has no images for {cfg.name} with seed {seed} and these settings: pack them again")
        get = lambda k: self.tensors[f"{i}.{k}"]
        parts = [(self.tensors[f"pool.{int(get(f'{p}.pool'))}"][get(f"{p}.at").long()], get(f"{p}.labels")) for p in ("train", "val", "test")]
        if fingerprint(parts) != m["fingerprint"]: raise InputError(f"the pack is damaged: its images of {cfg.name} with seed {seed} are not those it was made from")
        mean, std = get("mean").to(device), get("std").to(device)
        return Splits(*(Split(x.to(device), y.to(device), mean, std) for x, y in parts), m["classes"], m["size"], m["label"], m["fingerprint"], m["skipped"])


# the runs
def made_of(commit: str):
    "Say which commit the package is: what was carried to a machine need not be what git says there."
    if not commit: return
    real = folders.environment

    def environment(device): return {**real(device), "commit": commit, "modified": False}

    folders.environment = runs.environment = environment


def work(job: Job, folder, images: str, commit: str):
    "What a process does with a job: `running.do`, with its images from a pack."
    if images: runs.load_data = running.load_data = making.load_data = Packed(Path(images))
    if commit and runs.environment.__module__ == "mgdarts.runs.folder": made_of(commit)
    running.do(job, folder)


class TimeUp(Exception): pass


def run(jobs: list, folder: Path, images: str = "", workers: int = 0, limit: float = 0, commit: str = "") -> dict:
    "Run jobs side by side until they are finished or the time is up. Runs that are not finished have saved their state."
    def up(*_): raise TimeUp

    start, failed, late = time.time(), {}, False
    before = signal.signal(signal.SIGALRM, up)
    if limit: signal.setitimer(signal.ITIMER_REAL, limit)
    try: failed = running.run_arms(jobs, folder, workers, functools.partial(work, images=str(images or ""), commit=commit))
    except TimeUp: late = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return {"jobs": len(jobs), "finished": sum(j.finished(folder) for j in jobs), "failed": [{"label": jobs[i].label, "seed": jobs[i].seed, "why": why} for i, why in failed.items()],
            "time_is_up": late, "wall_s": round(time.time() - start, 1)}


# bringing them home
def collected(jobs: list, folder: Path, out: Path, most: int = 5, mib: float = 14.0) -> dict:
    "Put run folders into archives of at most about `mib`: finished ones first, and without their states where all their jobs are finished."
    folder, groups = Path(folder), {}
    for j in jobs: groups.setdefault(j.key(), []).append(j)
    found = []
    for key, mine in groups.items():
        if not (folder / key / "config.json").exists(): continue
        done = all(j.finished(folder) for j in mine)
        keep = lambda info, done=done: None if Path(info.name).name in ("plotly.min.js", ".lock") or done and "checkpoint" in Path(info.name).parts else info
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as tar: tar.add(folder / key, key, filter=keep)
        found.append((not done, packed.tell(), key, keep))
    bins, left = [], []
    for late, size, key, keep in sorted(found, key=lambda f: f[:3]):
        if size > mib * 2**20: left.append(key); continue
        home = next((b for b in bins if sum(s for s, *_ in b) + size <= mib * 2**20), None)
        if home is None and len(bins) == most: left.append(key); continue
        if home is None: bins.append(home := [])
        home.append((size, key, keep))
    out.mkdir(parents=True, exist_ok=True)
    for i, b in enumerate(bins):
        with tarfile.open(out / f"runs-{i}.tar.gz", "w:gz", compresslevel=6) as tar:
            for _, key, keep in b: tar.add(folder / key, key, filter=keep)
    return {"archives": {p.name: p.stat().st_size for p in sorted(out.glob("runs-*.tar.gz"))}, "runs": sum(map(len, bins)), "left_out": left}


def unpack(archives: list, folder: Path) -> list:  # names of new runs
    "Unpack run folders; one that is there already stays as it is, unless it is not finished and the new one is."
    folder, new = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for path in archives:
        with tarfile.open(path) as tar:
            names = {Path(m.name).parts[0] for m in tar.getmembers()}
            fresh = {n for n in names if not (folder / n).exists()}
            tar.extractall(folder, [m for m in tar.getmembers() if Path(m.name).parts[0] in fresh], filter="data")
            new += sorted(fresh)
            for n in sorted(names - fresh): print(f"{n} is there already: left as it is", file=sys.stderr)
    return new
