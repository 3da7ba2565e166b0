// A place for figures, as wide as there is room.
const BARS = { displaylogo: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"]] };
const text = (v) => JSON.stringify(v).replaceAll("<", "\\u003c"); // in a script, nothing may end it

function render({ model, el }) {
  const p = plotly(), label = () => model.get("label");
  const plot = node("div", { role: "group", "aria-label": label() });
  let due = true, drawing = false, width = 0;

  function now() {
    const f = JSON.parse(model.get("figure"));
    f.layout.width = el.clientWidth;
    f.layout.uirevision = f.data.length; // what the reader has zoomed into stays when other numbers come
    return f;
  }
  async function draw() { // one at a time; whatever has come meanwhile is drawn next
    if (drawing) return;
    drawing = true;
    try {
      const Plotly = await p.promise;
      while (due && el.clientWidth) {
        due = false;
        const { data, layout } = now();
        el.style.minHeight = `${layout.height}px`;
        await Plotly.react(plot, data, layout, BARS);
      }
    } finally { drawing = false; }
  }
  const renew = () => { due = true; draw(); };

  const picture = async (format) => {
    const Plotly = await p.promise, { data, layout } = now(), { width, height } = layout;
    if (format === "png") layout.paper_bgcolor = "white";
    const url = await Plotly.toImage({ data, layout }, { format, width, height, scale: format === "png" ? 2 : 1 });
    return (await fetch(url)).blob();
  };
  const whole = () => {
    const { data, layout } = now();
    delete layout.width;
    const start = `Plotly.newPlot("f", ${text(data)}, ${text(layout)}, { responsive: true })`;
    return page(label(), ["<script>", p.code, `<\/script><div id="f"></div><script>${start}<\/script>`]);
  };
  const buttons = take(label, { png: () => picture("png"), svg: () => picture("svg"), html: whole });
  el.classList.add("mg-plot");
  el.append(plot, buttons);

  const watch = new ResizeObserver(() => {
    if (!el.clientWidth || (!due && el.clientWidth === width)) return;
    width = el.clientWidth;
    renew();
  });
  watch.observe(el);
  const leave = listen(model, [["change:figure", renew]]);
  return async () => { watch.disconnect(); leave(); (await p.promise).purge(plot); };
}
export default { render };
