"What a person reads of a record: a line a row, and a summary at the end."
BRIEF = {"steps": ("C", "L", "live", "how", "impl", "cudnn_search", "ms", "graph_ms", "allocated_mib",
                   "launches", "error", "graph_error"),
         "layouts": ("C", "side", "how", "variant", "layout", "ms", "graph_ms", "kernels", "busy_ms", "error_relative",
                     "error"),
         "convolutions": ("C", "side", "what", "how", "layout", "forward_ms", "input_ms", "weight_ms", "error")}


def short(v) -> str:
    if isinstance(v, float): return f"{v:.4g}"
    if not isinstance(v, dict): return str(v)
    return "{" + " ".join(f"{k}={short(x)}" for k, x in v.items() if not isinstance(x, (list, dict))) + "}"


def line(row: dict) -> str:
    "A row, short: what is long is in the record only."
    text = " ".join(f"{k}={short(v)}" for k, v in row.items()
                    if not isinstance(v, list) and k not in ("batch", "capability", "where", "macs"))
    where = sorted((row.get("where") or {}).items(), key=lambda kv: -kv[1])
    return (text + "".join(f"\n      {n} x {at}" for at, n in where[:6]))[:420]


def lines(name: str, part: dict) -> list:
    "A part, short: what it is, and its rows."
    note = f", {part['note']}" if "note" in part else ""
    brief = ({k: r[k] for k in BRIEF.get(name, r) if k in r} or r for r in part["rows"])
    return [f"## {name}: {len(part['rows'])} rows, {part['seconds']} s{note}", *map(line, brief)]


def number(v, digits: int = 1) -> str: return f"{v:.{digits}f}" if isinstance(v, (int, float)) else "-"


def rows_of(record: dict, part: str) -> list: return record["parts"].get(part, {}).get("rows", [])


def of_steps(record: dict) -> list:
    "Steps with their plan."
    same = ("C", "L", "batch", "live", "how", "impl")
    plans = {tuple(r[k] for k in same): r for r in rows_of(record, "planned") if r.get("of") == "steps"}
    out = ["# steps: C L live how impl | ms, graph ms | kernels, busy ms | "
           "allocated, planned now, planned native, MiB"]
    for r in (r for r in rows_of(record, "steps") if "C" in r):
        plan, launches = plans.get(tuple(r[k] for k in same), {}), r.get("launches") or {}
        what = " ".join(str(r[k]) for k in ("C", "L", "live", "how", "impl")) + " search" * r["cudnn_search"]
        mib = (r.get("allocated_mib"), plan.get("planned_mib"), plan.get("planned_native_mib"))
        out.append(f"{what} | {number(r.get('ms'))} {number(r.get('graph_ms'))} | {launches.get('kernels', '-')} "
                   f"{number(launches.get('busy_ms'))} | {' '.join(number(m, 0) for m in mib)} "
                   f"{r.get('error', r.get('graph_error', ''))[:120]}")
    return out


def cost(row: dict) -> float: return row.get("graph_ms", row["ms"])


def of_layouts(record: dict) -> list:
    "Operation by operation, and the best layouts."
    found = {}
    for r in rows_of(record, "layouts"):
        if "ms" in r: found.setdefault((r["C"], r["side"], r["how"]), []).append(r)
    out = ["# layouts: C, side, how | graph ms (or eager) of operation by operation and of the three best"]
    for key, rows in found.items():
        plain = [r for r in rows if r["variant"] == "apart"]
        best = sorted((r for r in rows if r["variant"] != "apart"), key=cost)[:3]
        out.append(f"{key} | " + "; ".join(f"{r['variant']} {r['layout']} {cost(r):.2f}" for r in plain + best))
    return out


def summary(record: dict) -> str:
    "The end of the output: steps with their plan, the best layouts, what failed."
    parts = record["parts"]
    failed = "; ".join(f"{name}: {r[k][:110]}" for name, p in parts.items() for r in p["rows"]
                       for k in r if k.endswith("error"))
    notes = "; ".join(f"{name}: {r['note']}" for name, p in parts.items() for r in (p, *p["rows"]) if "note" in r)
    return "\n".join(["", *of_steps(record), *of_layouts(record), f"# failed: {failed[:2500] or 'nothing'}",
                      f"# notes: {notes or 'none'}; {record['wall_s']} s"])
