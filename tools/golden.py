"""What every method does at preset `smoke`, as checksums: they show that a change of structure changed no decision.

    python tools/golden.py record [NAME ...]  # into tests/golden.json, with the processor and the commit they are of
    python tools/golden.py check [NAME ...]   # search again and compare; exit code 1 where something differs
    python tools/golden.py begin FOLDER       # searches cut off in the middle, to be finished by a later version
    python tools/golden.py finish FOLDER [NAME ...]  # resume copies of them and compare

Floating-point sums depend on the processor: on another one, `record` first at the commit that tests/golden.json names
(PYTHONPATH may point to a checkout of it). The runs of the reference implementation have been recorded once more since:
its batch norms are PyTorch's own now, which add up in another order; losses of the first epoch agree to 6e-6.
"""
import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
FILE = HERE / "tests" / "golden.json"
METHODS = ("mg-darts", "darts-v1", "darts-v2", "pc-darts", "gdas", "p-darts", "gold-nas", "beta-darts", "dass",
           "tanglenas", "proxylessnas", "zero-cost-pt", "fixed-rate", "random", "shapley-nas", "csc-darts", "l-darts",
           "ctnas", "weaknas", "cdarts", "u-darts", "pa-darts", "aca-pc-darts")  # as old as they are


def settings(*changes): return [word for change in changes for word in ("--set", change)]


# name -> settings of the search; retraining of two of them covers the discrete networks, too
RUNS = {m: ["--method", m] for m in METHODS} | {
    "mg-darts mobilenet": settings("space.kind=mobilenet"),
    "mg-darts reference": settings("compute.impl=reference", "search.max_epochs=12", "search.target_m=0.02"),
    "mobilenet reference": settings("space.kind=mobilenet", "compute.impl=reference", "search.max_epochs=8"),
    "mg-darts second": settings("cells=5", "space.channels=6", "search.target_m=0.02", "seed=3")}
TRAINED = {"mg-darts": settings("train.epochs=3", "train.aux_weight=0.4", "train.drop_path=0.2"),
           "mg-darts mobilenet": settings("train.epochs=3")}
CLOCK = ("time", "wall_s", "seconds")
MAIN = ("import importlib\n"
        "for name in ('mgdarts.cli.main', 'mgdarts.runs.cli', 'mgdarts.cli'):\n"
        "    try: main = importlib.import_module(name).main\n"
        "    except (ImportError, AttributeError): continue\n"
        "    main()")


def command(*args):
    return [sys.executable, "-c", MAIN, *map(str, args)]


def sha(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def events(run):
    lines = (run / "events.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def architecture(run):
    "All of an architecture but where it comes from, masks included."
    file = run / "architecture.json"
    found = json.loads(file.read_text("utf-8")) if file.exists() else {}  # none where the target was not reached
    return {k: v for k, v in found.items() if k not in ("provenance", "sha256")}


def sums(run):
    return {"events": sha(events(run)), "architecture": sha(architecture(run))}


def search(name, out, *more):
    return command("search", "--preset", "smoke", "--out", out, *RUNS[name], *more)


def done(name, folder):
    "The checksums of a finished search, and of its retraining."
    run = folder / name.replace(" ", "_")
    subprocess.run(search(name, run), capture_output=True)  # 1: ended without reaching its target
    found = sums(run)
    if name in TRAINED:
        train = command("train", run, "--preset", "smoke", *TRAINED[name], "--out", folder / "train")
        subprocess.run(train, check=True, capture_output=True)
        found["train"] = sha(events(folder / "train"))
        shutil.rmtree(folder / "train")
    return found


def machine():
    import torch
    return {"cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def record(args):
    "All runs, or some of them among the others, each of which then says what commit it is of."
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    kept = {"commit": json.loads(FILE.read_text("utf-8"))["commit"] if args.what else commit, **machine()}
    found = golden() if args.what else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.what or RUNS:
            found[name] = done(name, Path(folder)) | ({"commit": commit} if args.what else {})
            print(name, found[name]["events"][:12], found[name]["architecture"][:12], flush=True)
    FILE.write_text(json.dumps({**kept, "runs": found}, indent=1) + "\n", "utf-8")


def golden():
    known = json.loads(FILE.read_text("utf-8"))
    if any(known[k] != v for k, v in machine().items()):
        sys.exit(f"{FILE.name} was recorded with {known['cpu']} and torch {known['torch']}: "
                 f"record at {known['commit'][:9]} first")
    return known["runs"]


def compare(name, found, known):
    wrong = [k for k in known if k != "commit" and found.get(k) != known[k]]
    print(f"{name}: {'as before' if not wrong else 'DIFFERS in ' + ', '.join(wrong)}", flush=True)
    return not wrong


def check(args):
    known = golden()
    with tempfile.TemporaryDirectory() as folder:
        good = [compare(name, done(name, Path(folder)), known[name]) for name in args.what or known]
    sys.exit(0 if all(good) else 1)


def begin(args):
    folder = Path(args.what[0])
    for name in RUNS:
        run = folder / name.replace(" ", "_")
        child = subprocess.Popen(search(name, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None:
            log = run / "events.jsonl"
            if log.exists() and log.read_text("utf-8").count('"type": "epoch"') >= 3:
                child.send_signal(signal.SIGTERM)
                child.wait()
            time.sleep(.05)
        print(name, "cut off after", log.read_text("utf-8").count('"type": "epoch"'), "epochs", flush=True)


def finish(args):
    known, good = golden(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.what[1:] or RUNS:
            run = Path(folder) / name.replace(" ", "_")
            shutil.copytree(Path(args.what[0]) / run.name, run)
            subprocess.run(command("search", "--out", run, "--resume"), capture_output=True)
            good.append(compare(name, sums(run), {k: v for k, v in known[name].items() if k != "train"}))
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("record", "check", "begin", "finish"))
    parser.add_argument("what", nargs="*", help="names of runs, or a folder and names")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    {"record": record, "check": check, "begin": begin, "finish": finish}[args.do](args)
