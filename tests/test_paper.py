"The paper's numbers: well-formed, true to its text where that is at hand, consistent except for the slips listed."
import operator
import os
import re
from itertools import groupby
from pathlib import Path

import pytest

from mgdarts.paper import data as paper
from mgdarts.base.options import Config, InputError
from mgdarts.paper.data import claims, figures, slips, systems, table

SHARED = Path(os.environ.get("MGDARTS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
TEXT = SHARED / "paper/mg-darts.txt"
needs_text = pytest.mark.skipif(not TEXT.exists(), reason="the paper's text is not at hand: set MGDARTS_SHARED")
ROMAN = "I II III IV V VI VII VIII IX X".split()
ITEMS = {f"table{n:02}" for n in range(1, 11)} | {f"fig{n:02}" for n in range(1, 10)}
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")
FILES = {f"table{n:02}" for n in range(1, 11)} | {"figures", "claims", "systems", "slips"}


def printed(n): return paper.rows_of(f"table{n:02}") # as texts


def numbers(text): return {float(x) for x in NUMBER.findall(re.sub(r"CIFAR-\d+", "", text))}


def cells(item): # the numbers of a table; a figure has none
    if not item.startswith("table"): return set()
    return set().union(*(numbers(v) for r in printed(int(item[-2:])) for v in r.values()))


# ---- without the text

@pytest.mark.parametrize("name", sorted(FILES))
def test_files_are_well_formed(name):
    path = paper.root() / "data/paper" / f"{name}.csv"
    text = path.read_bytes().decode("utf-8")
    assert "\r" not in text and text.endswith("\n") and not text.startswith("\ufeff")
    rows = paper.rows_of(name)
    assert rows and len(set(rows[0])) == len(rows[0])
    for r in rows: assert None not in r and None not in r.values() and all(v == v.strip() for v in r.values()), r
    assert len({tuple(r.values()) for r in rows}) == len(rows)
    assert f"`{name}.csv`" in (path.parent / "README.md").read_text("utf-8")
    readme = (path.parent / "README.md").read_text("utf-8").splitlines()
    described = next(line for line in readme if line.startswith(f"| `{name}.csv`"))
    _, _, count, columns, _ = (c.strip() for c in described.split("|"))
    assert int(count) == len(rows) and columns.split(", ") == list(rows[0])


def test_no_other_file():
    assert {p.name for p in (paper.root() / "data/paper").iterdir()} == {f"{n}.csv" for n in FILES} | {"README.md"}


@pytest.mark.parametrize("n", range(1, 11))
def test_numbers_have_units(n):
    without = {"Reference", "Search space", "Search epochs", "Regrowing ratio"} # names, counts and a plain ratio
    rows = table(n)
    for k in rows[0]:
        values = [r[k] for r in rows if r[k] is not None]
        if re.search(r" \((%|M|GB|h|%/M)\)$", k): assert values and all(isinstance(v, float) for v in values), k
        else: assert k in without or all(isinstance(v, str) for v in values), k


def densities():
    "Every printed density with the accuracy and the size it is made of."
    for n in (1, 2, 3, 5):
        for r in printed(n):
            for k in r:
                if k.endswith("ensity (%/M)") and r[k]:
                    accuracy = k.removesuffix("density (%/M)") + "top-1 (%)" if k[0] == "C" else "Top-1 (%)"
                    yield f"table{n:02}", next(iter(r.values())), k, r[k], float(r[accuracy]) / float(r["Params (M)"])


def test_densities_are_accuracy_over_size_except_for_the_slips():
    found = list(densities())
    # rounded or cut to two places, never more than one unit of the last place away
    wrong = {d[:4] for d in found if abs(float(d[3]) - d[4]) >= 0.01}
    listed = {(s["item"], s["row"], s["column"], s["printed"]) for s in slips() if s["kind"] == "density"}
    assert len(found) == 57 and wrong == listed and len(wrong) == 3


def evaluate(how):
    "`12 / 3 + 1`, from left to right."
    first, *rest = how.split()
    x = float(first)
    do = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    for op, y in zip(rest[::2], rest[1::2]): x = do[op](x, float(y))
    return x


@pytest.mark.parametrize("slip", slips(), ids=lambda s: f"{s['item']}-{s['row']}")
def test_slips_can_be_recomputed(slip):
    rows = printed(int(slip["item"][-2:]))
    assert slip["kind"] in ("density", "text", "blank") and slip["note"] and slip["column"] in rows[0]
    if slip["kind"] == "blank": assert any(slip["row"] in r.values() and r[slip["column"]] == "" for r in rows)
    if not slip["how"]: return
    assert float(slip["recomputed"]) == round(evaluate(slip["how"]), 2) != float(slip["printed"])
    assert set(slip["how"].split()) - set("+-*/") - {"100"} <= {v for r in rows for v in r.values()}
    assert any(slip["row"] in r.values() for r in rows)


def test_claims_and_figures_name_what_there_is():
    ids = [c["id"] for c in claims()]
    assert len(set(ids)) == len(ids) >= 20 and all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", i) for i in ids)
    assert {c["item"] for c in claims()} == ITEMS - {"fig02", "fig03", "fig04"} # those are drawings of the method
    assert all(c["claim"].endswith(".") and c["claim"].count(". ") == 0 for c in claims())
    assert all(f["item"] in ITEMS and isinstance(f["value"], float) and f["unit"] for f in figures())
    for c in claims():  # a claim about a table rests on its cells
        if c["item"].startswith("table"): assert cells(c["item"]) & numbers(c["numbers"])


def test_systems_are_those_of_the_tables():
    names = [s["name"] for s in systems()]
    assert len(set(names)) == len(names)
    rows = {}
    for n in (1, 2, 3, 6, 7):
        for r in printed(n):  # Table VII cites nobody
            rows.setdefault(r["Method"].split(" (")[0], []).append((f"table{n:02}", r.get("Reference")))
    assert len(rows) == 20 and set(rows) == {s["name"] for s in systems() if "table" in s["items"]}
    for s in systems():
        assert s["kind"] and s["summary"].endswith(".") and set(s["items"].split()) <= ITEMS
        mine = [i for i in s["items"].split() if i.startswith("table")]
        if s["name"] != "MG-DARTS": assert mine == sorted({i for i, _ in rows.get(s["name"], [])})
        assert {ref for _, ref in rows.get(s["name"], [])} <= {s["reference"], None}
    assert Config().method == next(s["method"] for s in systems() if s["name"] == "MG-DARTS")


def test_reading_refuses_what_is_not_there(tmp_path, monkeypatch):
    for n in (0, 11, "1"):
        with pytest.raises(InputError, match="has 1 to 10"): table(n)
    monkeypatch.setenv("MGDARTS_ROOT", str(tmp_path))
    with pytest.raises(InputError, match="table01.csv is not there") as e: table(1)
    assert "\n" not in str(e.value)


# ---- against the text

@pytest.fixture(scope="module")
def lines(): return [line.replace("\f", "").strip() for line in TEXT.read_text("utf-8").splitlines()]


def cited(r): # "DASS (small)", 17 -> "DASS [17] (small)"
    name, *rest = r["Method"].split(" (", 1)
    return name + (f" [{r['Reference']}]" if r["Reference"] else "") + "".join(f" ({x}" for x in rest)


def dash(r, *keys, mark="-"): return " ".join(r[k] or mark for k in keys)


def as_printed(n):
    "The lines of a table's body as they are in the text, made from the file."
    rows = printed(n)
    match n:
        case 1:
            def top(r): return r["C10 top-1 (%)"] + (f"±{r['C10 top-1 std (%)']}" if r["C10 top-1 std (%)"] else "")
            others = "C100 top-1 (%)", "Params (M)", "C10 density (%/M)", "C100 density (%/M)", "Granularity"
            return [f"{cited(r)} {top(r)} {dash(r, *others)}" for r in rows]
        case 2:
            columns = "Top-1 (%)", "Top-5 (%)", "Params (M)", "Density (%/M)", "Granularity"
            return [f"{cited(r)} {dash(r, *columns)}" for r in rows]
        case 3:
            columns = "Top-1 (%)", "Params (M)", "Density (%/M)", "Granularity"
            whole = [f"{cited(r)} {dash(r, *columns, mark='–')}" for r in rows]
            return [x for line in whole for x in re.split(r"(?<=filter,) ", line)]
        case 4:
            one, *stages = [dash(r, "Stage", "Max memory (GB)") for r in rows]
            same = {(r["Method"], r["Search cost (h)"], r["Accuracy (%)"]) for r in rows[1:]}
            assert same == {("Multi-stage", "10", "96.56")} and rows[0]["Stage"] == ""
            whole = dash(rows[0], "Max memory (GB)", "Search cost (h)", "Accuracy (%)")
            second = f"{dash(rows[1], 'Search cost (h)', 'Accuracy (%)')}{rows[1]['Method']} {stages[1]}"
            return [f"{rows[0]['Method']} {whole}", stages[0], second, *stages[2:]]
        case 6:
            out = []
            for _, group in groupby(rows, key=lambda r: r["Method"]):
                group = list(group)
                assert [r["Search space"] for r in group] == ["1", "2", "3"]
                assert len({r["Memory reduction"] for r in group}) == 1
                spaces = " ".join(dash(r, "Top-1 (%)", "Params (M)") for r in group)
                out += re.split(r" (?=with)", f"{cited(group[0])} {spaces} {group[0]['Memory reduction']}")
            return out
        case 7: # settings that span rows stand between the pairs of ratio and accuracy, in the order of the page
            out = ["DASS", "10"]
            setting = operator.itemgetter("Method", "Search epochs", "Evaluation mode")
            blocks = [list(g) for _, g in groupby(rows, key=setting)]
            want = [("DASS", e, m, h) for e, h in (("10", "7"), ("70", "55")) for m in ("from scratch", "finetune")]
            want += [("MG-DARTS", "10", "from scratch", "5")]
            assert [{(*setting(r), r["Search cost (h)"]) for r in b} for b in blocks] == [{w} for w in want]
            assert {r["Ratio kind"] for b in blocks[:4] for r in b} == {"fixed"}
            assert blocks[4][0]["Ratio kind"] == "adaptive"
            pairs = [[dash(r, "Weight ratio (%)", "Accuracy (%)") for r in b] for b in blocks]
            ours = blocks[4][0]
            last = f"scratch Adaptive ({ours['Weight ratio (%)']}) {dash(ours, 'Accuracy (%)', 'Search cost (h)')}"
            return [*out, "from", "scratch", pairs[0][0], "7", *pairs[0][1:], "finetune", *pairs[1], "70", "from",
                    "scratch", pairs[2][0], "55", *pairs[2][1:], "finetune", *pairs[3], "MG-DARTS 10 from", last]
        case _: return [dash(r, *r) for r in rows]


@needs_text
@pytest.mark.parametrize("n", range(1, 11))
def test_table_is_as_printed(n, lines):
    body = [x for x in lines[lines.index(f"TABLE {ROMAN[n - 1]}") + 1:] if x]
    want = as_printed(n)
    start = next(i for i, x in enumerate(body) if x == want[0])
    got = body[start:start + len(want)]
    # its own caption and header, nothing else
    assert start <= 16 and not any(x.startswith("TABLE") for x in body[:start])
    assert got == want


@pytest.fixture(scope="module")
def sections(lines):
    "Section V, subsection D, item 1 as `V-D1`: their texts in one line each, up to the references."
    out, at = {}, ["", "", 0]
    for line in lines[:lines.index("REFERENCES")]:
        if m := re.fullmatch(r"([IVX]+)\. [A-Z ]+", line): at = [m[1], "", 0]
        elif (m := re.match(r"([A-Z])\. [A-Z]", line)) and ord(m[1]) == ord(at[1] or "@") + 1: at[1:] = m[1], 0
        elif (m := re.match(r"(\d)\) [A-Z]", line)) and int(m[1]) == at[2] + 1:
            at[2] += 1 # a list inside an item starts again at 1
        label = at[0] + f"-{at[1]}{at[2] or ''}".rstrip("-")
        out[label] = f"{out.get(label, '')} {line}".strip()
    return out


@needs_text
def test_sections_are_found(sections):
    starts = {"V-D1": "1) Results on CIFAR-10", "V-E2": "2) Comparison with different pruning",
              "V-E4": "4) Effect of the optimization", "V-F1": "1) Reduction of memory",
              "V-G2": "2) Architectural Patterns"}
    for label, start in starts.items():
        assert sections[label].startswith(start)


@needs_text
@pytest.mark.parametrize("f", figures(), ids=lambda f: f"{f['item']}-{f['value']:g}{f['unit']}")
def test_figures_numbers_are_in_their_words(f, sections):
    assert f["quote"] in sections[f["section"]] and f["value"] in numbers(f["quote"])


@needs_text
@pytest.mark.parametrize("c", claims(), ids=lambda c: c["id"])
def test_claims_rest_on_printed_numbers(c, sections):
    text = sections[c["section"]]
    assert numbers(c["numbers"]) <= cells(c["item"]) | numbers(text)
    number = int(re.sub(r"\D", "", c["item"]))
    name = rf"Table {ROMAN[number - 1]}\b" if c["item"].startswith("table") else rf"Fig(ure|\.) {number}\b"
    assert re.search(name, text) # the section speaks of it


@needs_text
def test_systems_are_cited_as_in_the_text(lines):
    text = " ".join(lines)
    for s in systems(): assert (f"{s['name']} [{s['reference']}]" if s["reference"] else s["name"]) in text


@needs_text
@pytest.mark.parametrize("slip", [s for s in slips() if s["kind"] == "text"],
                         ids=lambda s: f"{s['item']}-{s['printed']}")
def test_slips_of_the_text_are_in_the_section_they_name(slip, sections):
    assert float(slip["printed"]) in numbers(sections[re.search(r"\bV-[A-G]\d?", slip["note"])[0]])
