"""Build the site from the notebooks: Markdown pages, then MkDocs. No Quarto, no network."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import plotly
import plotly.io as pio
import yaml


def page(notebook: Path) -> str:
    "A notebook as Markdown: prose, code, and those outputs it was saved with."
    parts, charts = [], False
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../../figures/", "](../figures/"))
            continue
        if source.startswith("#| hide") or not source:
            continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if code:
            parts.append(f"```python\n{code}\n```")
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "application/vnd.plotly.v1+json" in data:
                charts = True
                figure = pio.from_json(json.dumps(data["application/vnd.plotly.v1+json"]), skip_invalid=True)
                parts.append(f'<div class="chart">{figure.to_html(full_html=False, include_plotlyjs=False)}</div>')
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            elif "".join(data.get("text/html", "")).startswith("<svg"):
                parts.append("<div>" + "".join(data["text/html"]) + "</div>")
            elif "text" in out or "text/plain" in data:
                text = out.get("text") or data["text/plain"]
                parts.append("```text\n" + "".join(text).rstrip() + "\n```")
    if charts:  # the library must be there before the first chart
        parts.insert(1, '<script src="../../assets/plotly.min.js"></script>')
    return "\n\n".join(parts) + "\n"


def build(root: Path, chapters: list):
    "Write _docs/ from nbs/, chapter by chapter, with the executed quickstart where a recorded one is kept."
    source, site = root / "_proc", root / "_docs"
    shutil.rmtree(source, ignore_errors=True)
    (source / "assets").mkdir(parents=True)
    shutil.copy(Path(plotly.__file__).parent / "package_data/plotly.min.js", source / "assets")
    # on a wide screen a line of code, 120 columns, fits beside both lists
    wide = ".md-grid { max-width: 84rem; } .md-typeset pre > code { font-size: .65rem; }"
    (source / "assets/wide.css").write_text(wide + "\n", "utf-8")
    for picture in (root / "figures").rglob("*.png"):
        target = source / picture.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    nav = []
    for folder, title, names in chapters:
        pages = []
        (source / folder).mkdir()
        for name in names:
            executed = root / "figures" / f"{name}.ipynb"
            text = page(executed if executed.exists() else root / "nbs" / folder / f"{name}.ipynb")
            target = source / ("index.md" if name == "index" else f"{folder}/{name}.md")
            target.write_text(text.replace("](../figures/", "](figures/") if name == "index" else text, "utf-8")
            pages.append({re.search(r"^# (.+)$", text, re.M).group(1): str(target.relative_to(source))})
        nav.append({title: pages})
    config = {"site_name": "mgdarts", "docs_dir": str(source), "site_dir": str(site), "nav": nav,
              "theme": {"name": "material", "font": False, "palette": [
                  {"media": "(prefers-color-scheme: light)", "scheme": "default",
                   "toggle": {"icon": "material/weather-night", "name": "dark"}},
                  {"media": "(prefers-color-scheme: dark)", "scheme": "slate",
                   "toggle": {"icon": "material/weather-sunny", "name": "light"}}]},
              "markdown_extensions": ["tables", "attr_list", {"pymdownx.arithmatex": {"generic": True}},
                                      "pymdownx.highlight", "pymdownx.superfences"],
              "extra_css": ["assets/wide.css"],
              # equations are typeset where there is a network, and stay TeX where there is none
              "extra_javascript": ["https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"]}
    path = root / "_proc.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    try:
        subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(path)], check=True)
    finally:
        path.unlink()
    print(site / "index.html")
