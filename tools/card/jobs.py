"""Runs that are made on another machine, and brought home.

What they are is a list, the images they need a pack. A list is a JSON list of the fields of `mgdarts.sweep.jobs.Job`.
What a run is called depends on these alone, not on where its images lie: a run folder made elsewhere and unpacked into
runs/repro is found finished by `mgdarts reproduce`. A pack has the very images that the jobs' configurations and seeds
choose, so the fingerprint of the data is that of a run at home.
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
from safetensors import safe_open
from safetensors.torch import save_file

from mgdarts.base.data import Split, Splits, fingerprint, load_data
from mgdarts.base.files import read_json
from mgdarts.base.options import InputError, configure, from_dict, to_dict
from mgdarts.paper.record import jobs_in
from mgdarts.runs import folder as folders, run as runs
from mgdarts.sweep.executors import Local, run_jobs
from mgdarts.sweep.jobs import Job
from mgdarts.sweep.work import do

PARTS = ("train", "val", "test")


def read_list(path) -> list:  # of Job
    return [Job(**j) for j in json.loads(Path(path).read_text("utf-8"))]


def changed(job: Job, seed: int, settings: dict) -> Job:
    "An arm with another seed and other settings."
    def change(c): return c and to_dict(configure(from_dict(c), **{**settings, "seed": seed}))
    return dataclasses.replace(job, seed=seed, search=change(job.search), train=change(job.train))


def listed(records: list, seeds: list, settings: dict, labels: list) -> list:  # of Job
    "The arms of some records, with other seeds and settings."
    out = {}
    for path in records:
        for j in jobs_in(read_json(Path(path), "a record")):
            if labels and j.label not in labels: continue
            for new in (changed(j, seed, settings) for seed in seeds or [j.seed]):
                out.setdefault((new.place(), new.label), new)
    return list(out.values())


# the images
def name_of(cfg, seed: int) -> str:
    "What a choice of images depends on: the configuration of the data, wherever they lie, and the seed."
    of_no_matter = {"dir": "", "autoaugment": None, "flip": None, "crop": None, "cutout": None}
    return json.dumps({**dataclasses.asdict(cfg), **of_no_matter, "seed": seed}, sort_keys=True)


def chosen(jobs: list, data_dir: str) -> dict:  # name of a choice of images -> Splits
    "The images that some jobs need."
    wanted = {name_of(c.data, c.seed): c for j in jobs for d in (j.search, j.train) if d for c in (from_dict(d),)}
    found = {name: load_data(dataclasses.replace(c.data, dir=data_dir or c.data.dir), c.seed)
             for name, c in wanted.items()}
    for s in found.values():
        if isinstance(s.train.images, torch.Tensor): continue
        raise InputError(f"{s.label} is too large to be packed: its images stay on disk")
    return found


def pooled(parts: list) -> tuple:  # different images; for each part, which of them it has
    "Images, each of them once."
    every, where = torch.cat([images.flatten(1) for images in parts]).unique(dim=0, return_inverse=True)
    return every.view(-1, *parts[0].shape[1:]), where.split([len(images) for images in parts])


def pack(jobs: list, out: Path, data_dir: str = "") -> dict:
    "Write the images of some jobs, each of them once."
    splits, tensors, meta, pools = chosen(jobs, data_dir), {}, [], {}
    for i, (name, s) in enumerate(splits.items()):
        said = ("classes", "size", "label", "fingerprint", "skipped", "origin")
        meta.append({"name": name} | {k: getattr(s, k) for k in said})
        tensors |= {f"{i}.mean": s.mean, f"{i}.std": s.std}
        pool = pools.setdefault(tuple(s.train.images.shape[1:]), {})
        for part in PARTS:
            tensors[f"{i}.{part}.labels"] = getattr(s, part).labels
            pool[f"{i}.{part}"] = getattr(s, part).images
    for k, pool in enumerate(pools.values()):
        tensors[f"pool.{k}"], where = pooled(list(pool.values()))
        for part, at in zip(pool, where): tensors |= {f"{part}.at": at.int(), f"{part}.pool": torch.tensor(k)}
    save_file(tensors, out, metadata={"splits": json.dumps(meta)})
    images = sum(len(t) for k, t in tensors.items() if k.startswith("pool"))
    return {"data": len(splits), "images": images, "mib": out.stat().st_size / 2**20}


class Packed:
    "In the place of `load_data`: the images of a pack, checked against the fingerprint of the data they come from."

    def __init__(self, path: Path):
        with safe_open(path, "pt") as f:
            self.meta, self.tensors = json.loads(f.metadata()["splits"]), {k: f.get_tensor(k) for k in f.keys()}

    def part(self, i: int, name: str) -> tuple:  # images, labels
        pool = self.tensors[f"pool.{int(self.tensors[f'{i}.{name}.pool'])}"]
        return pool[self.tensors[f"{i}.{name}.at"].long()], self.tensors[f"{i}.{name}.labels"]

    def __call__(self, cfg, seed, device="cpu") -> Splits:
        asked = f"{cfg.name} with seed {seed}"
        i = next((i for i, m in enumerate(self.meta) if m["name"] == name_of(cfg, seed)), None)
        if i is None: raise InputError(f"the pack has no images for {asked} and these settings: pack them again")
        m, parts = self.meta[i], [self.part(i, name) for name in PARTS]
        if fingerprint(parts) != m["fingerprint"]:
            raise InputError(f"the pack is damaged: its images of {asked} are not those it was made from")
        mean, std = (self.tensors[f"{i}.{k}"].to(device) for k in ("mean", "std"))
        splits = (Split(x.to(device), y.to(device), mean, std) for x, y in parts)
        return Splits(*splits, m["classes"], m["size"], m["label"], m["fingerprint"], m["skipped"], m.get("origin", ""))


# the runs
def made_of(commit: str):
    "Say which commit the package is: what was carried to a machine need not be what git says there."
    if not commit: return
    real = folders.environment

    def environment(*what, **more): return {**real(*what, **more), "commit": commit, "modified": False}

    folders.environment = runs.environment = environment


def work(job: Job, folder, images: str, commit: str):
    "What a process does with a job: `sweep.work.do`, with its images from a pack."
    if runs.environment.__module__ == "mgdarts.runs.folder": made_of(commit)
    do(job, folder, load=Packed(Path(images)) if images else load_data)


class TimeUp(Exception): pass


def run(jobs: list, folder: Path, images: str = "", workers: int = 0, limit: float = 0, commit: str = "") -> dict:
    "Run jobs side by side until they are finished or the time is up. Others have saved their state."
    def up(*_): raise TimeUp

    start, failed, late = time.time(), {}, False
    before = signal.signal(signal.SIGALRM, up)
    if limit: signal.setitimer(signal.ITIMER_REAL, limit)
    with_images = functools.partial(work, images=str(images or ""), commit=commit)
    try: failed = run_jobs(jobs, folder, Local(workers), with_images)
    except TimeUp: late = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    told = [{"label": jobs[i].label, "seed": jobs[i].seed, "why": why} for i, why in failed.items()]
    return {"jobs": len(jobs), "finished": sum(j.finished(folder) for j in jobs), "failed": told,
            "time_is_up": late, "wall_s": round(time.time() - start, 1)}


# bringing them home
@dataclasses.dataclass
class Load:
    "A run folder to be brought home."
    late: bool  # not all its jobs are finished
    size: int  # packed, bytes
    key: str  # its name
    folder: Path  # of all runs

    def keep(self, info):  # None: it stays
        "Its files, without states where its jobs are finished."
        path = Path(info.name)
        unwanted = path.name in ("plotly.min.js", ".lock", ".lock.rw") or not self.late and "checkpoint" in path.parts
        return None if unwanted else info

    def into(self, tar): tar.add(self.folder / self.key, self.key, filter=self.keep)


def loads(jobs: list, folder: Path) -> list:  # of Load
    "The run folders of some jobs, as large as they are when packed: finished ones first, small ones first."
    groups, found = {}, []
    for j in jobs: groups.setdefault(j.key(), []).append(j)
    for key, mine in groups.items():
        if not (folder / key / "config.json").exists(): continue
        load, packed = Load(not all(j.finished(folder) for j in mine), 0, key, folder), io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as tar: load.into(tar)
        found.append(dataclasses.replace(load, size=packed.tell()))
    return sorted(found, key=lambda load: (load.late, load.size, load.key))


def stowed(found: list, most: int, room: float) -> tuple:  # lists of Load that go together; those left out
    "What goes into at most so many archives of at most so many bytes: each where it first finds room."
    bins, left = [], []
    for load in found:
        home = next((b for b in bins if sum(other.size for other in b) + load.size <= room), None)
        if home is not None: home.append(load)
        elif load.size <= room and len(bins) < most: bins.append([load])
        else: left.append(load)
    return bins, left


def collected(jobs: list, folder: Path, out: Path, most: int = 5, mib: float = 14.0) -> dict:
    "Put run folders into archives of at most about `mib`, without their states where all their jobs are finished."
    bins, left = stowed(loads(jobs, Path(folder)), most, mib * 2**20)
    out.mkdir(parents=True, exist_ok=True)
    for i, b in enumerate(bins):
        with tarfile.open(out / f"runs-{i}.tar.gz", "w:gz", compresslevel=6) as tar:
            for load in b: load.into(tar)
    archives = {p.name: p.stat().st_size for p in sorted(out.glob("runs-*.tar.gz"))}
    return {"archives": archives, "runs": sum(map(len, bins)), "left_out": [load.key for load in left]}


def unpack(archives: list, folder: Path) -> list:  # names of new runs
    "Unpack run folders; one that is there already stays as it is."
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
