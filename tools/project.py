"""Keep the generated files of the repository equal to their sources.

usage: python tools/project.py [index] [readme] [environment] [docs]
       python tools/project.py publish RUN | lengths [ROOT]
  index         the table of chapters in nbs/start/index.ipynb, from nbs/chapters.txt and the notebooks' first lines
  readme        README.md from the prose and code of nbs/start/index.ipynb
  environment   environment.yml from settings.ini
  docs          the site, in _docs/, from the notebooks
  publish RUN   figures/NAME/: the figures of a run folder, or of a benchmark's or fault suite's folder, with the
                record they come from; of an executed notebook: figures/NAME.ipynb, for the site
  lengths       what is longer than tests allow, and the lines of the package by folder; ROOT: of another checkout
"""
import json
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def settings() -> dict:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def chapters() -> list:
    "The notebooks in reading order: (folder, title, names) of each part."
    out = []
    for line in (ROOT / "nbs/chapters.txt").read_text("utf-8").splitlines():
        if line.startswith("["):
            folder, title = line[1:].split("] ", 1)
            out.append((folder, title, []))
        elif not line.startswith("#"):
            out[-1][2].extend(line.split())
    return out


def chapter_table() -> str:
    "The chapters in reading order, each with a link, as the index has them."
    rows = ["| folder | what it is about | chapters |", "|---|---|---|"]
    for folder, title, names in chapters():
        links = (f"[{name}](../../nbs/{folder}/{name}.ipynb)" for name in names if name != "index")
        rows.append(f"| `{folder}` | {title} | {', '.join(links)} |")
    return "\n".join(rows)


def index() -> str:
    "The index notebook with the table of chapters as it should be."
    path = ROOT / "nbs/start/index.ipynb"
    book = json.loads(path.read_text("utf-8"))
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if source.startswith("## The chapters"):
            before, _, after = source.partition("\n| ")
            after = after[after.index("\n\n"):]
            cell["source"] = f"{before}\n{chapter_table()}{after}".splitlines(keepends=True)
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def readme() -> str:
    "README.md: markdown cells as they are, code cells as fenced blocks, outputs left out."
    parts = ["<!-- generated from nbs/start/index.ipynb by tools/project.py: edit the notebook -->"]
    for cell in json.loads((ROOT / "nbs/start/index.ipynb").read_text("utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        code = [line for line in source.split("\n") if not line.startswith("#|")]
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../../", "]("))  # the notebook is two folders down
        elif not source.startswith("#| hide") and any(code):
            parts.append("```python\n" + "\n".join(code).strip() + "\n```")
    return "\n\n".join(parts) + "\n"


def environment() -> str:
    "environment.yml: Python, pip and a compiler from conda, everything else the requirements of settings.ini."
    cfg = settings()
    pins = [r for key in ("requirements", "lab_requirements", "dev_requirements") for r in shlex.split(cfg[key])]
    lines = ["# generated from settings.ini by tools/project.py", f"name: {cfg['lib_name']}", "channels:",
             "  - conda-forge", "dependencies:", f"  - python>={cfg['min_python']}",
             *(f"  - {p}" for p in shlex.split(cfg["conda_packages"])), "  - pip", "  - pip:"]
    return "\n".join(lines + [f'      - "{r}"' for r in pins] + ["      - -e ."]) + "\n"


def publish(run: Path):
    "Figures as PNG (where a Chromium is found), and everything that says where they come from."
    if run.suffix == ".ipynb":
        return publish_notebook(run)
    from mgdarts.base.files import write_json
    from mgdarts.runs.records import load_run
    from mgdarts.views import drawings, figures
    folder = ROOT / "figures" / run.name
    if (run / "record.json").exists():  # of the benchmark notebook
        import plotly.io
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "record.json").write_bytes((run / "record.json").read_bytes())
        pictures = (p for p in sorted(run.glob("*.json")) if p.stem != "record")
        return draw(folder, {p.stem: plotly.io.read_json(p) for p in pictures})
    data = load_run(run)
    folder.mkdir(parents=True, exist_ok=True)
    trainings = {k: t["result"] for k, t in data["trainings"].items()}
    record = data["record"] | {"result": data["result"], "trainings": trainings}
    write_json(folder / "record.json", record)
    (folder / "events.jsonl").write_bytes((run / "events.jsonl").read_bytes())
    curves = {{"train": "searched", "random": "random"}[k]: t["events"] for k, t in data["trainings"].items()}
    draw(folder, {"dynamics": figures.dynamics(data["events"]), "size": figures.size_and_lambda(data["events"]),
                  "cells": drawings.cells(data["arch"]), "distribution": drawings.distribution(data["arch"]),
                  "retraining": figures.retrain_curves(curves)})


def publish_notebook(path: Path):
    "An executed notebook with its outputs, without what papermill notes of the machine."
    book = json.loads(path.read_text("utf-8"))
    book["metadata"] = {"kernelspec": book["metadata"]["kernelspec"]}
    for cell in book["cells"]:
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k == "tags"}
        if cell["cell_type"] == "code":
            printed = [o for o in cell["outputs"] if o.get("name") == "stdout"]
            if printed:  # line by line, as it came
                printed[0]["text"] = "".join(t for o in printed for t in o["text"])
            cell["outputs"] = printed[:1] + [o for o in cell["outputs"] if o["output_type"] != "stream"]
    (ROOT / "figures" / path.name).write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", "utf-8")


def draw(folder: Path, figures: dict):
    from mgdarts.base.options import InputError
    from mgdarts.views.save import save_figure
    for name, figure in figures.items():
        try:
            save_figure(figure, folder / f"{name}.png")
        except InputError as e:
            print(f"{name}.png not written: {e}")


def main(targets):
    if targets[0] == "publish":
        return publish(Path(targets[1])) if len(targets) == 2 else sys.exit(__doc__)
    if targets[0] == "lengths":
        from lengths import report
        return report(Path(targets[1]) if len(targets) == 2 else ROOT)
    for target in targets:
        if target == "index":
            (ROOT / "nbs/start/index.ipynb").write_text(index(), "utf-8")
        elif target == "readme":
            (ROOT / "README.md").write_text(readme(), "utf-8")
        elif target == "environment":
            (ROOT / "environment.yml").write_text(environment(), "utf-8")
        elif target == "docs":
            from docs import build
            build(ROOT, chapters())
        else:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit(__doc__))
