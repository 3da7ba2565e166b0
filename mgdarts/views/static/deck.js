// Buttons, state line, keys.
const BUTTONS = [
  ["run", "Run", "to the end (space)"], ["pause", "Pause", "after this step (space)"], ["step", "Step", "one step (.)"],
  ["commit", "to commit", "run to the next commit"], ["epoch", "to epoch", "run to the end of the epoch"],
  ["stage", "to stage", "run to the end of the stage"], ["stop", "Stop", "save and end"],
  ["checkpoint", "Checkpoint", "save the state now"],
  ["pictures", "Save pictures", "charts and cells as files in the run folder"], ["keys", "Keys", "list the keys (?)"]];
const KEYS = [["space", "run, pause"], [".", "one step"], ["← →", "edge of the selected operation"],
  ["↑ ↓", "type of operation"], ["[ ]", "cell"], ["?", "this list"]];

function render({ model, el }) {
  const title = node("div", { class: "mg-title" });
  const bar = node("div", { class: "mg-buttons", role: "toolbar", "aria-label": "search" });
  const word = node("b", { class: "word", role: "status", "aria-live": "polite" }), why = node("span");
  const line = node("div", { class: "mg-line" }, word, why), facts = node("div", { class: "mg-line" }), size = node("div");
  const keys = node("div", { class: "mg-keys", hidden: "" }), buttons = {};
  keys.append(...KEYS.flatMap(([k, v], i) => [node("kbd", {}, k), ` ${v}${i + 1 < KEYS.length ? " · " : ""}`]));

  const act = (what) => {
    if (what === "keys") keys.hidden = !keys.hidden;
    else if (buttons[what].getAttribute("aria-disabled") !== "true") order(what, Date.now());
  };
  // a kernel may drop what reaches it right after the page was loaded again: what it does not confirm is said again
  const order = (what, n, left = 4) => {
    model.send({ do: what, n });
    if (left) setTimeout(() => { if (model.get("heard") < n) order(what, n, left - 1); }, 1500);
  };
  for (const [what, label, help] of BUTTONS) {
    buttons[what] = node("button", { type: "button", title: help, "data-do": what }, label);
    buttons[what].addEventListener("click", () => act(what));
    bar.append(buttons[what]);
  }
  el.append(title, bar, keys, line, facts, size);

  function paint() {
    const s = model.get("state");
    if (!s.can) return;
    title.replaceChildren(node("b", {}, s.title), `  ${s.about}`);
    for (const [what, b] of Object.entries(buttons)) {
      b.setAttribute("aria-disabled", String(what !== "keys" && !s.can.includes(what)));
      b.classList.toggle("main", what === s.main);
    }
    if (word.textContent !== s.word) word.textContent = s.word;
    word.className = `word ${s.word}`;
    why.textContent = s.why;
    facts.replaceChildren(...s.facts.map((f) => node("span", {}, f)));
    size.replaceChildren();
    if (!s.bar) return;
    const done = node("i", { style: `width:${s.bar.at}%` }), target = node("u", { style: `left:${s.bar.target}%` });
    size.append(node("div", { class: "mg-bar", role: "img", "aria-label": s.bar.text }, done, target));
    size.append(node("span", {}, s.bar.text));
  }

  function onkey(e) {
    const t = e.target, role = t.getAttribute("role") || "", k = e.key;
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    e.stopPropagation(); // JupyterLab's keys are for what is :focus, whatever is around it
    if (/INPUT|TEXTAREA|SELECT/.test(t.tagName) || t.isContentEditable) return;
    if (k === " ") {
      if (t.tagName === "BUTTON" || role === "tab") return;
      act(model.get("state").main || "run");
    } else if (k === ".") act("step");
    else if (k === "?") act("keys");
    else if (/^Arrow|^[[\]]$/.test(k)) {
      if (/slider|tab/.test(role)) return;
      model.send({ key: k });
    } else return;
    e.preventDefault();
  }
  let tries = 0, root;
  function hook() { // the workbench around this is there a little later
    root = el.closest(".mgdarts-wb");
    if (!root) { if (tries++ < 200) setTimeout(hook, 50); return; }
    root.setAttribute("data-lm-suppress-shortcuts", "true");
    root.addEventListener("keydown", onkey);
  }
  hook();
  paint();
  const leave = listen(model, [["change:state", paint]]);
  return () => { leave(); root?.removeEventListener("keydown", onkey); };
}
export default { render };
