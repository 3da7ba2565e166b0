"""Try every pair of strengths, schedules, pressures and decisions, and record which go together.

usage: python tools/compose.py [--out figures/compositions] [--jobs N]

Each pair is searched for some steps, with a small net on small digits, to the derived network. What neither is refused
in one line nor comes to a network is a fault: it is named, and the exit code is 1.
"""
import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
import torch
from tqdm import tqdm

from mgdarts.base.files import write_json
from mgdarts.paper.compositions import TINY, all_pairs, compose, matrix
from mgdarts.paper.show import draw
from mgdarts.runs.folder import environment


def tried(pair: dict) -> dict:
    try: return compose(pair)
    except Exception as e:  # noqa: BLE001 -- whatever it is, it is a fault of the pair
        return {"pair": pair, "method": None, "why": f"FAULT {type(e).__name__}: {e}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "compositions")
    parser.add_argument("--jobs", type=int, default=1)
    given, pairs = parser.parse_args(), all_pairs()
    with ProcessPoolExecutor(given.jobs) as pool:
        rows = list(tqdm(pool.map(tried, pairs), total=len(pairs)))
    faults = [r for r in rows if r["why"].startswith("FAULT")]
    for r in faults: print(r["pair"], r["why"])
    record = {"schema": 1, "item": "compositions", "title": "what goes together", "seed": 0, "dataset": "digits",
              "settings": TINY, "environment": environment(torch.device("cpu")), "rows": rows,
              "command": "python tools/compose.py"}
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "record.json", record)
    for note in draw(given.out, {"matrix": matrix(rows)}): print(note)
    print(f"{sum(bool(r['method']) for r in rows)} of {len(rows)} pairs go together, {len(faults)} faults")
    raise SystemExit(bool(faults))


if __name__ == "__main__": main()
