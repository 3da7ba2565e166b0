// Rows to be sorted by a click on a head, filtered by a word, and chosen.
function show(v) {
  if (typeof v !== "number") return v === null ? "–" : v;
  return Number.isInteger(v) ? v.toLocaleString("en") : v.toFixed(2);
}
function order(x, y) {
  if (x === null || y === null) return x === null ? 1 : -1;
  return typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
}

function render({ model, el }) {
  const filter = node("input", { type: "search", placeholder: "filter", "aria-label": "filter the runs" });
  const scroll = node("div", { class: "mg-scroll" });
  let by = 0, down = false;

  function head(c, i) {
    const b = node("button", { type: "button", class: "mg-sort" }, c + (i === by ? (down ? " ↓" : " ↑") : ""));
    b.addEventListener("click", () => { down = i === by ? !down : false; by = i; paint(); });
    return node("th", { scope: "col", "aria-sort": i !== by ? "none" : down ? "descending" : "ascending" }, b);
  }
  function line(r) {
    const box = node("input", { type: "checkbox", "aria-label": `compare ${r[0]}` });
    box.checked = model.get("chosen").includes(r[0]);
    box.addEventListener("change", () => {
      const others = model.get("chosen").filter((k) => k !== r[0]);
      model.set("chosen", box.checked ? [...others, r[0]] : others);
      model.save_changes();
    });
    return node("tr", {}, node("td", {}, box), ...r.map((v) => node("td", {}, String(show(v)))));
  }
  function paint() {
    const words = filter.value.toLowerCase().split(/\s+/);
    const rows = model.get("rows").filter((r) => words.every((w) => r.join(" ").toLowerCase().includes(w)));
    rows.sort((a, b) => (down ? -1 : 1) * order(a[by], b[by]));
    const heads = node("tr", {}, node("th", { scope: "col" }, ""), ...model.get("columns").map(head));
    const table = { class: "mg-table" };
    scroll.replaceChildren(node("table", table, node("thead", {}, heads), node("tbody", {}, ...rows.map(line))));
  }
  filter.addEventListener("input", paint);
  el.append(filter, scroll);
  paint();
  return listen(model, [["change:rows", paint], ["change:chosen", paint]]);
}
export default { render };
