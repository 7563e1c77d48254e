// Clicks on the chart in the same box, which the page's own plotly draws, and draws anew for every change. The chart itself says
// what a click does and whom to tell (`layout.meta.click`); where none says so, as in a still picture, nothing happens and nothing is shown.

export default {
  render({ model, el }) {
    el.classList.add("wb-clicks");
    let box = null, charts = [];

    function clicked(event) {
      const of = charts[0]?.layout.meta.click.of;
      const point = event.points?.[0]; // none beside all bars and curves: then the place itself counts
      model.send({ type: "click", of, x: point?.x ?? event.xvals?.[0] ?? null, data: point?.customdata ?? null });
    }
    function listen() {
      charts = [...box.querySelectorAll(".js-plotly-plot")].filter((chart) => chart.on && chart.layout?.meta?.click);
      for (const chart of charts) {
        chart.removeListener("plotly_click", clicked); // a chart drawn twice must not tell twice
        chart.on("plotly_click", clicked);
      }
      const hint = charts[0]?.layout.meta.click.hint ?? "";
      if (el.textContent !== hint) el.textContent = hint; // this, too, changes the box, and would be heard again
    }
    const redrawn = new MutationObserver(listen);
    const appeared = new ResizeObserver(() => { // only what is in the page has a box around it
      box = el.parentElement?.closest(".widget-box");
      if (!box) return;
      appeared.disconnect();
      redrawn.observe(box, { childList: true, subtree: true });
      listen();
    });
    appeared.observe(el);
    return () => {
      appeared.disconnect();
      redrawn.disconnect();
      for (const chart of charts) chart.removeListener?.("plotly_click", clicked);
    };
  },
};
