"""How long things are: exported cells, files, lines of prose. For tests/test_project.py and `project.py lengths`."""
import json
import re
from pathlib import Path
from statistics import median

COLUMNS, CELL, TYPICAL, FILE = 120, 60, 12, 500
EXPORT = re.compile(r"^#\|\s*exports?i?\b", re.M)
SOURCES = ("mgdarts/**/*", "tests/*.py", "tools/**/*.py")  # recordings in tests/oracles have the size that they have
LANGUAGES = {".py": "#", ".cpp": "//", ".cu": "//", ".js": "//", ".css": "/*"}


def notebooks(root: Path) -> dict:
    "The cells of every notebook, by the notebook's name under nbs/."
    return {str(p.relative_to(root / "nbs"))[:-6]: json.loads(p.read_text("utf-8"))["cells"]
            for p in sorted(root.glob("nbs/**/[!.]*.ipynb")) if ".ipynb_checkpoints" not in p.parts}


def exported_cells(root: Path) -> list:
    "(lines, notebook, number of the cell) of every exported cell, without the lines that speak to nbdev."
    found = []
    for name, cells in notebooks(root).items():
        for i, cell in enumerate(cells):
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and EXPORT.search(source):
                found.append((sum(not line.startswith("#|") for line in source.strip().splitlines()), name, i))
    return found


def files(root: Path) -> dict:
    "Lines of every file of the package, the tests and the tools that a person reads."
    paths = (p for pattern in SOURCES for p in sorted(root.glob(pattern)))
    return {str(p.relative_to(root)): p.read_text("utf-8").splitlines()
            for p in paths if p.suffix in LANGUAGES and p.name != "_modidx.py"}


def code_lines(name: str, lines: list) -> int:
    "Lines of a file that are neither blank nor a comment and nothing else; docstrings count."
    comment = LANGUAGES[Path(name).suffix]
    return sum(bool(line.strip()) and not line.lstrip().startswith(comment) for line in lines)


def long_prose(root: Path) -> list:
    """Lines of Markdown that are wider than the page: (columns, notebook, number of the cell, the line).

    Rows of tables stay on one line, and the address of a link or picture is not counted: neither can be broken. A
    chapter's summary, `> ...`, becomes the docstring of its module, between quotes.
    """
    found = []
    for name, cells in notebooks(root).items():
        for i, cell in enumerate(cells):
            if cell["cell_type"] != "markdown": continue
            for line in "".join(cell["source"]).splitlines():
                columns = len(re.sub(r"\]\([^)]*\)", "]()", line)) + 4 * line.startswith("> ")
                if columns > COLUMNS and not line.lstrip().startswith("|"): found.append((columns, name, i, line))
    return found


def offences(root: Path) -> list:
    "What is longer than this project allows, one sentence each, the longest first of each kind."
    cells, said = sorted(exported_cells(root), reverse=True), []
    middle = median(n for n, *_ in cells)
    if middle > TYPICAL: said.append(f"half of all exported cells have more than {middle:g} lines; at most {TYPICAL}")
    said += [f"{name}: {len(lines)} lines; a file has at most {FILE}: split it"
             for name, lines in sorted(files(root).items(), key=lambda f: -len(f[1])) if len(lines) > FILE]
    said += [f"nbs/{name}.ipynb, cell {i}: {n} lines; an exported cell has at most {CELL}"
             for n, name, i in cells if n > CELL]
    return said + [f"nbs/{name}.ipynb, cell {i}: {n} columns of prose; at most {COLUMNS}: {line[:60]}..."
                   for n, name, i, line in sorted(long_prose(root), reverse=True)]


def tree(root: Path) -> list:
    "Code lines of the package by folder and file, and of tests and tools: lines to print."
    folders, said = {}, []
    for name, lines in files(root).items():
        folders.setdefault(str(Path(name).parent), {})[Path(name).name] = code_lines(name, lines)
    sums = {folder: sum(sizes.values()) for folder, sizes in folders.items()}
    for folder, sizes in folders.items():
        listed = ", ".join(f"{name} {n}" for name, n in sorted(sizes.items(), key=lambda f: -f[1]) if n)
        said.append(f"{sums[folder]:7} {folder}/" + (f": {listed}" if folder.startswith("mgdarts") else ""))
    package = {folder: n for folder, n in sums.items() if folder.startswith("mgdarts")}
    core = sum(n for folder, n in package.items() if not folder.endswith(("/fast", "/views", "/paper")))
    cells = [n for n, *_ in exported_cells(root)]
    return said + [f"{sum(package.values()):7} in the package, {core} of them outside fast, views and paper",
                   f"{len(cells):7} exported cells, median {median(cells):g} lines, longest {max(cells)}"]


def report(root: Path):
    "Print what is too long, then the tree."
    print(*offences(root), "code lines, without blank lines and comments:", *tree(root), sep="\n")
