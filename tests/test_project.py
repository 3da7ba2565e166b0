"The repository keeps its promises: generated files equal their sources, imports go one way, code keeps its measure."
import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def tool(name):
    "A module of tools/, which is no package."
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


project, lengths = tool("project"), tool("lengths")
NOTEBOOKS = sorted(str(p.relative_to(ROOT / "nbs"))[:-6] for p in (ROOT / "nbs").rglob("[!.]*.ipynb"))


def python(*args, **more):
    "What a fresh Python process says: (exit code, output)."
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, **more)
    return done.returncode, done.stdout + done.stderr


# ---- generated files

def test_environment_is_the_twin_of_settings():
    text = (ROOT / "environment.yml").read_text("utf-8")
    assert text == project.environment(), "run: python tools/project.py environment"
    pip = yaml.safe_load(text)["dependencies"][-1]["pip"]
    assert set(project.settings()["requirements"].split()) <= set(pip)


def test_the_index_lists_the_chapters():
    assert (ROOT / "nbs/start/index.ipynb").read_text("utf-8") == project.index()


def test_readme_is_generated_from_the_index():
    assert (ROOT / "README.md").read_text("utf-8") == project.readme(), "run: python tools/project.py readme"


def test_package_is_exported_from_the_notebooks(tmp_path):
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "mgdarts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unwanted)
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for path in (tmp_path / "mgdarts").rglob("[!_]*.py"):
        path.unlink()
    outside = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev exports nothing while it tests
    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", export], cwd=tmp_path, env=outside, check=True, capture_output=True)
    ours, theirs = ({str(p.relative_to(folder)): p.read_text("utf-8") for p in (folder / "mgdarts").rglob("*.py")}
                    for folder in (ROOT, tmp_path))
    assert ours.keys() == theirs.keys() and [n for n in ours if ours[n] != theirs[n]] == [], "run: nbdev_export"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_committed_clean(name):
    cells = json.loads((ROOT / f"nbs/{name}.ipynb").read_text("utf-8"))["cells"]
    assert not [c for c in cells if c.get("outputs") or c.get("execution_count")], "run: nbdev_clean"
    assert len({c["id"] for c in cells}) == len(cells), "cells have been merged twice"


# ---- what imports what

def test_runs_without_notebook_tools():
    code = """
import sys
tools = "nbdev", "fastcore", "execnb", "IPython", "ipykernel", "jupyterlab", "ipywidgets", "papermill"
for name in tools: sys.modules[name] = None
import mgdarts.cli.main, mgdarts.runs.run, mgdarts.views.figures
"""
    assert python("-c", code) == (0, "")


def test_the_command_line_answers_before_torch_is_loaded():
    code = """
import sys
from mgdarts.cli import main
main.main(["count", "--channels", "4", "--cells", "3"])
sys.exit("torch" in sys.modules)
"""
    assert python("-c", code)[0] == 0


def imported(path):
    "The full names of all that a file of the package imports, wherever in the file it does."
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join((*package[:-node.level], *filter(None, [node.module]))) if node.level else node.module
            yield from (module, *(f"{module}.{a.name}" for a in node.names))


def test_core_imports_torch_alone():
    "At their tops, the rooms below the runs import what Python brings, PyTorch, and each other."
    for folder in ("space", "net", "search", "methods"):
        for path in (ROOT / "mgdarts" / folder).glob("*.py"):
            found = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
            assert found <= {"torch", "safetensors", "mgdarts"}, (path.name, found)


def test_imports_go_down():
    "The floors of the house, no circles: the contracts are in pyproject.toml."
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout


# ---- chapters

def test_chapters_are_listed_once_in_reading_order():
    assert sorted(f"{folder}/{name}" for folder, _, names in project.chapters() for name in names) == NOTEBOOKS


def test_chapters_use_what_was_read_before():
    "Of the package: fast/, which is read last, may be taken on trust, since it computes what the chapters say."
    order = [f"mgdarts.{folder}.{name}" for folder, _, names in project.chapters() for name in names]
    early = {(chapter, name) for at, chapter in enumerate(order)
             if (path := ROOT / (chapter.replace(".", "/") + ".py")).exists()
             for name in imported(path) if name in order[at:]}
    trusted = {(a, b) for a, b in early if b.startswith("mgdarts.fast.") and not a.startswith("mgdarts.fast.")}
    said = [f"{a} imports {b}, which comes later in nbs/chapters.txt" for a, b in sorted(early - trusted)]
    assert not said, "\n".join(said)


# ---- style, types and lengths

def test_ruff_finds_nothing():
    code, said = python("-m", "ruff", "check", "--no-cache", "-q", "--output-format=concise",
                        "mgdarts", "nbs", "tests", "tools")
    assert code == 0, said


def test_types_of_the_core():
    "basedpyright, without its warnings, reads base, space, net and search."
    code, said = python("-m", "basedpyright", "--level", "error", "--pythonpath", sys.executable)
    assert code == 0, said


def test_lengths():
    "Cells that a reader takes in at once, files that one scrolls through, lines that fit the page."
    found = lengths.offences(ROOT)
    assert not found, "\n".join(found)
