// What all widgets share; it stands before the code of each.

// An element with attributes and children.
function node(tag, attrs = {}, ...kids) {
  const n = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) n.setAttribute(k, v);
  n.append(...kids);
  return n;
}

// Buttons that save what `how` makes: a function that gives a blob, for each suffix.
function take(label, how) {
  const name = label().replace(/[^\p{L}\d]+/gu, "-").replace(/^-|-$/g, "");
  const give = async (kind) => {
    const link = node("a", { href: URL.createObjectURL(await how[kind]()), download: `${name}.${kind}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };
  const button = (kind) => {
    const text = kind.toUpperCase(), name = `save ${label()} as ${text}`;
    const b = node("button", { type: "button", "aria-label": name }, text);
    b.addEventListener("click", (e) => { e.stopPropagation(); give(kind); });
    return b;
  };
  const attrs = { class: "mg-take", role: "group", "aria-label": `save ${label()}` };
  return node("div", attrs, ...Object.keys(how).map(button));
}

// A page that stands alone.
const page = (title, body) =>
  new Blob([`<!doctype html><meta charset="utf-8"><title>${title}</title>`, ...body], { type: "text/html" });

// Listen to traits of a model; call what comes back to stop.
function listen(model, listeners) {
  for (const [what, f] of listeners) model.on(what, f);
  return () => { for (const [what, f] of listeners) model.off(what, f); };
}
