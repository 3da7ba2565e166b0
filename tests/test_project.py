"The repository keeps its promises: generated files equal their sources, and the package needs no notebook tools."
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("project", ROOT / "tools/project.py")
project = importlib.util.module_from_spec(spec)
spec.loader.exec_module(project)


def test_environment_is_the_twin_of_settings():
    text = (ROOT / "environment.yml").read_text("utf-8")
    assert text == project.environment()
    pip = yaml.safe_load(text)["dependencies"][-1]["pip"]
    assert set(project.settings()["requirements"].split()) <= set(pip)


def test_readme_is_generated_from_the_index():
    assert (ROOT / "README.md").read_text("utf-8") == project.readme()


def test_package_is_exported_from_the_notebooks(tmp_path):
    for name in ("nbs", "mgdarts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for path in (tmp_path / "mgdarts").rglob("[!_]*.py"):
        path.unlink()
    outside = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev exports nothing while it tests
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=tmp_path, env=outside, check=True, capture_output=True)
    ours, theirs = ({str(p.relative_to(folder)): p.read_text("utf-8") for p in (folder / "mgdarts").rglob("*.py")} for folder in (ROOT, tmp_path))
    assert ours.keys() == theirs.keys() and [n for n in ours if ours[n] != theirs[n]] == []


def test_chapters_are_listed_once_in_reading_order():
    listed = [f"{folder}/{name}" for folder, _, names in project.chapters() for name in names]
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "nbs"))[:-6] for p in (ROOT / "nbs").rglob("[!.]*.ipynb"))


def test_runs_without_notebook_tools():
    code = """
import sys
for name in ("nbdev", "fastcore", "execnb", "IPython", "ipykernel", "jupyterlab", "ipywidgets", "papermill"): sys.modules[name] = None
import mgdarts.cli.main, mgdarts.runs.run, mgdarts.views.plots
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_core_imports_torch_alone():
    allowed = {"torch", "math", "copy", "dataclasses", "functools", "itertools", "__future__", "mgdarts"}
    for path in (p for folder in ("space", "net", "search", "fast") for p in (ROOT / "mgdarts" / folder).glob("*.py") if p.stem not in ("architecture", "mobile_architecture", "genotype", "train", "compiled")):
        text = path.read_text("utf-8")
        found = {m.split(".")[0] for line in re.findall(r"^(?:import|from) (.+)$", text, re.M) for m in ([line.split(" import")[0].strip()] if " import" in line else [x.strip() for x in line.split(",")]) if not m.startswith(".")}
        assert found <= allowed, (path.name, found - allowed)


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("[!.]*.ipynb")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_notebooks_are_committed_clean(path):
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")


def test_the_command_line_answers_before_torch_is_loaded():
    code = "import sys; from mgdarts.cli import main; main.main(['count', '--channels', '4', '--cells', '3']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
