// SVG text, of which parts can be picked and handles dragged.
const GREY = "#7f8790"; // theme.GREY

function still(text) { // by itself: a size, colours of its own, no page behind it
  const whole = new DOMParser().parseFromString(text.replaceAll("currentColor", GREY), "image/svg+xml");
  const svg = whole.documentElement, [, , w, h] = svg.getAttribute("viewBox").split(" ");
  svg.removeAttribute("style");
  svg.setAttribute("width", w);
  svg.setAttribute("height", h);
  return { text: new XMLSerializer().serializeToString(svg), w: +w, h: +h };
}

async function raster({ text, w, h }, scale = 3) {
  const image = new Image(), canvas = node("canvas", { width: w * scale, height: h * scale });
  image.src = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  await image.decode();
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  URL.revokeObjectURL(image.src);
  return new Promise((r) => canvas.toBlob(r, "image/png"));
}

// Threshold handles: how far they are, in pixels and in values.
const between = (h, v) => Math.min(Math.max(v, +h.dataset.low), +h.dataset.high);
function place(h, value) {
  const d = h.dataset, x = +d.left + ((+d.right - +d.left) * (value - +d.low)) / (+d.high - +d.low);
  h.setAttribute("transform", `translate(${x} 0)`);
  h.setAttribute("aria-valuenow", value);
  d.value = value;
}
function valueAt(h, e, svg) {
  const d = h.dataset, r = svg.getBoundingClientRect(), x = ((e.clientX - r.left) * +d.width) / r.width;
  return between(h, +d.low + ((+d.high - +d.low) * (x - +d.left)) / (+d.right - +d.left));
}

function render({ model, el }) {
  el.classList.add("mg-pic");
  const label = () => model.get("label"), now = () => still(model.get("svg"));
  const box = node("div", { class: "mg-box", role: "group", "aria-label": label() });
  box.setAttribute("aria-description", model.get("hint"));
  const said = node("div", { class: "mg-said", "aria-live": "polite" });
  const buttons = take(label, {
    png: () => raster(now()), svg: () => new Blob([now().text], { type: "image/svg+xml" }),
    html: () => page(label(), [now().text]) });
  el.append(box);
  if (model.get("said")) el.append(said);
  if (model.get("saved")) el.append(buttons);

  let drag = null, last = 0, later = null;
  const tell = (name, value) => { // not more often than the kernel can draw
    const t = performance.now();
    clearTimeout(later);
    if (t - last > 60) { last = t; model.send({ drag: name, value }); }
    else later = setTimeout(() => tell(name, value), 65);
  };
  const speak = (text) => { if (said.textContent !== text) said.textContent = text; };
  function mark() {
    box.querySelectorAll(".sel").forEach((n) => n.classList.remove("sel"));
    const s = model.get("selected");
    if (s) box.querySelector(`[data-pick="${s}"]`)?.classList.add("sel");
    speak(model.get("said"));
  }
  function paint() {
    const f = document.activeElement, key = box.contains(f) ? f.dataset.key : null;
    box.innerHTML = model.get("svg");
    buttons.hidden = !model.get("svg");
    if (box.querySelector("[data-pick]")) box.tabIndex = 0;
    const held = drag && box.querySelector(`[data-drag="${drag.name}"]`);
    if (held) { drag.h = held; place(held, drag.value); }
    if (key) box.querySelector(`[data-key="${key}"]`)?.focus({ preventScroll: true });
    mark();
  }

  const pick = (e) => e.target.closest?.("[data-pick]"), handle = (e) => e.target.closest?.("[data-drag]");
  box.addEventListener("click", (e) => {
    if (!pick(e)) return;
    model.send({ pick: pick(e).dataset.pick });
    box.focus({ preventScroll: true });
  });
  box.addEventListener("mouseover", (e) => { if (pick(e)) speak(pick(e).dataset.text); });
  box.addEventListener("mouseleave", () => speak(model.get("said")));

  function move(e) {
    if (!drag) return;
    drag.value = valueAt(drag.h, e, box.querySelector("svg"));
    place(drag.h, drag.value);
    tell(drag.name, drag.value);
  }
  function drop() {
    clearTimeout(later);
    if (drag) model.send({ drag: drag.name, value: drag.value, end: true });
    drag = null;
    window.removeEventListener("pointermove", move);
    window.removeEventListener("pointerup", drop);
  }
  box.addEventListener("pointerdown", (e) => {
    const h = handle(e);
    if (!h) return;
    drag = { h, name: h.dataset.drag, value: +h.dataset.value };
    h.focus({ preventScroll: true });
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", drop);
    e.preventDefault();
  });
  const WAYS = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
  box.addEventListener("keydown", (e) => {
    const h = handle(e);
    if (!h || !WAYS[e.key]) return;
    const step = (+h.dataset.high - +h.dataset.low) / (e.shiftKey ? 20 : 200);
    place(h, between(h, +h.dataset.value + WAYS[e.key] * step));
    tell(h.dataset.drag, +h.dataset.value);
    e.preventDefault();
    e.stopPropagation();
  });
  paint();
  return listen(model, [["change:svg", paint], ["change:selected", mark], ["change:said", mark]]);
}
export default { render };
