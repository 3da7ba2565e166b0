"""Keep the generated files of the repository equal to their sources.

usage: python tools/project.py [readme] [environment] [docs]
  readme        README.md from the prose and code of nbs/index.ipynb
  environment   environment.yml from settings.ini
  docs          the site, in _docs/, from the notebooks
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


def readme() -> str:
    "README.md: markdown cells as they are, code cells as fenced blocks, outputs left out."
    parts = ["<!-- generated from nbs/index.ipynb by tools/project.py: edit the notebook -->"]
    for cell in json.loads((ROOT / "nbs/index.ipynb").read_text("utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        code = [line for line in source.split("\n") if not line.startswith("#|")]
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif not source.startswith("#| hide") and any(code):
            parts.append("```python\n" + "\n".join(code).strip() + "\n```")
    return "\n\n".join(parts) + "\n"


def environment() -> str:
    "environment.yml: Python and pip from conda, everything else the requirements of settings.ini."
    cfg = settings()
    pins = [r for key in ("requirements", "lab_requirements", "dev_requirements") for r in shlex.split(cfg[key])]
    lines = [f"# generated from settings.ini by tools/project.py", f"name: {cfg['lib_name']}", "channels:",
             "  - conda-forge", "dependencies:", f"  - python>={cfg['min_python']}", "  - pip", "  - pip:"]
    return "\n".join(lines + [f'      - "{r}"' for r in pins] + ["      - -e ."]) + "\n"


def main(targets):
    for target in targets:
        if target == "readme":
            (ROOT / "README.md").write_text(readme(), "utf-8")
        elif target == "environment":
            (ROOT / "environment.yml").write_text(environment(), "utf-8")
        elif target == "docs":
            from docs import build
            build(ROOT)
        else:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit(__doc__))
