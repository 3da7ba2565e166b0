// A slider over moments that have names, and a button that plays them.
function render({ model, el }) {
  el.classList.add("mg-moments");
  const play = node("button", { type: "button", "aria-label": "play" }, "▶"), said = node("span");
  const slider = node("input", { type: "range", min: 0, "aria-label": "moment of the search" });
  const last = () => Math.max(model.get("labels").length - 1, 0), at = () => model.get("value");
  let timer = null;

  function paint() {
    const t = model.get("labels")[at()];
    slider.max = last();
    slider.value = at();
    said.textContent = t === undefined ? "" : `${t} (${at() + 1} of ${last() + 1})`;
    slider.setAttribute("aria-valuetext", said.textContent);
  }
  function go(i) { model.set("value", i); model.save_changes(); }
  function run(on) {
    clearInterval(timer);
    timer = on ? setInterval(() => (at() < last() ? go(at() + 1) : run(false)), 400) : null;
    play.textContent = on ? "❚❚" : "▶";
    play.setAttribute("aria-label", on ? "pause the replay" : "play");
  }
  play.addEventListener("click", () => { if (!timer && at() >= last()) go(0); run(!timer); });
  slider.addEventListener("input", () => { run(false); go(+slider.value); });
  el.append(play, slider, said);
  paint();
  const leave = listen(model, [["change:labels", paint], ["change:value", paint]]);
  return () => { run(false); leave(); };
}
export default { render };
