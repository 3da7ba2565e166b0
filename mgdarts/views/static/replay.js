// The keys of a replay: plotly's slider and buttons answer to the mouse only.
(() => {
  const figure = document.getElementById("figure-0"), slider = () => figure.layout.sliders[0];
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; };
  const go = (i) => {
    if (i < 0 || i >= slider().steps.length) return stop();
    const [to, how] = slider().steps[i].args;
    Plotly.animate(figure, to, how).catch(() => {});
  };
  document.addEventListener("keydown", (e) => {
    const at = slider().active, last = slider().steps.length - 1;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[e.key];
    if ((e.key !== " " && to === undefined) || e.ctrlKey || e.altKey || e.metaKey) return;
    e.preventDefault();
    if (timer || to !== undefined) stop();
    else timer = setInterval(() => go(slider().active + 1), 400);
    if (to !== undefined) go(Math.max(0, Math.min(last, to)));
  });
})();
