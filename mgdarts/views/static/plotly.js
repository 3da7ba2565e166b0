// Where the charts of a page meet plotly's code, whichever of them is first.
function plotly() {
  const p = (globalThis.mgdartsPlotly ??= {});
  p.promise ??= new Promise((r) => { p.resolve = r; });
  return p;
}
