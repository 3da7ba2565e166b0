// Plotly's code, once for all charts of a page.
function initialize({ model }) {
  const p = plotly();
  if (p.code) return;
  p.code = model.get("code");
  const url = URL.createObjectURL(new Blob([p.code], { type: "text/javascript" }));
  import(url).then(() => { p.resolve(globalThis.Plotly); URL.revokeObjectURL(url); });
}
export default { initialize };
