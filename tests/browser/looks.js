// What tests/browser/test_looks.py asks of a page: contrast of its text, what leaves its place, what lies over another.
(() => {
  const numbers = (text) => (text.match(/-?[\d.]+(e-?\d+)?%?/g) ?? []).map((x) => (x.endsWith("%") ? parseFloat(x) / 100 : +x));
  function colour(text) {  // red, green, blue 0..1 and alpha
    if (text === "transparent" || text === "none") return [0, 0, 0, 0];
    const [r, g, b, a = 1] = numbers(text.replace(/^color\(srgb/, "").replace(/^rgba?/, ""));
    return text.startsWith("color(srgb") ? [r, g, b, a] : [r / 255, g / 255, b / 255, a];
  }
  const over = (top, ground) => [0, 1, 2].map((i) => top[i] * top[3] + ground[i] * (1 - top[3])).concat(1);
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  function ratio(one, other) {
    const [a, b] = [luminance(one), luminance(other)].sort((x, y) => x - y);
    return (b + 0.05) / (a + 0.05);
  }
  const seen = (e) => e.checkVisibility({ visibilityProperty: true }) && [...e.getClientRects()].some((r) => r.width && r.height);
  const said = (e) => `${e.tagName} .${e.getAttribute("class") ?? ""} "${e.textContent.trim().slice(0, 40)}"`;

  function ofText(element) {
    const layers = [];
    let shown = 1;
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      shown *= +style.opacity;
      if (e.namespaceURI !== "http://www.w3.org/2000/svg") layers.push(colour(style.backgroundColor));
    }
    const ground = layers.reverse().reduce((below, layer) => over(layer, below), [1, 1, 1, 1]);
    const style = getComputedStyle(element), drawn = element.namespaceURI === "http://www.w3.org/2000/svg";
    const ink = colour(drawn ? style.fill : style.color);
    ink[3] *= shown * (drawn ? +style.fillOpacity : 1);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
    return { ratio: ratio(over(ink, ground), ground), least: large ? 3 : 4.5 };
  }

  // Text nodes of `root` with too little contrast. Disabled controls need none, and a label inside a bar stands on the bar.
  function pale(root) {
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), found = [];
    let texts = 0;
    while (walk.nextNode()) {
      const e = walk.currentNode.parentElement;
      if (!walk.currentNode.data.trim() || e.closest("style, script, [disabled], .bartext-inside, .hoverlayer") || !seen(e)) continue;
      texts += 1;
      const { ratio, least } = ofText(e);
      if (!(ratio >= least)) found.push(`${said(e)}: ${ratio.toFixed(2)} of ${least}`);
    }
    return { texts, found };
  }

  // Elements that end right of the output they are in, unless a box of its own scrolls them.
  function wide(root) {
    const right = root.getBoundingClientRect().right + 1.5;
    const scrolls = (e) => e !== root && /auto|scroll|hidden/.test(getComputedStyle(e).overflowX);
    const cut = [...root.querySelectorAll(".js-plotly-plot .main-svg text")].filter((e) => seen(e) &&
      e.getBoundingClientRect().right > e.closest(".js-plotly-plot").getBoundingClientRect().right + 1.5);
    return [...root.querySelectorAll("*")].filter((e) => {
      if (cut.includes(e)) return true;  // a chart hides what does not fit
      if (!seen(e) || e.getBoundingClientRect().right <= right) return false;
      for (let up = e.parentElement; up && up !== root; up = up.parentElement) if (scrolls(up)) return false;
      return true;
    }).map((e) => `${said(e)} ends ${Math.round(e.getBoundingClientRect().right - right)} px right of its output`);
  }

  // Children of one box, and texts of one chart, that lie over each other by more than two pixels both ways.
  function overlapping(root) {
    const found = [];
    function check(elements) {
      const boxes = elements.filter(seen).map((e) => [e, e.getBoundingClientRect()]);
      boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
        const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (across > 2 && down > 2) found.push(`${said(a)} and ${said(b)}: ${across.toFixed(0)} x ${down.toFixed(0)} px`);
      }));
    }
    root.querySelectorAll(".widget-box, .jupyter-widget-box, .wb-slide, .wb-walk").forEach((box) => check([...box.children]));
    root.querySelectorAll(".js-plotly-plot").forEach((chart) => {
      check([...chart.querySelectorAll(".main-svg text")].filter((e) => e.textContent.trim() && !e.closest(".hoverlayer")));
    });
    return found;
  }
  // What a place that Tab reached shows of it: an outline or a shadow, or colours that it has not without.
  function focusRing() {
    const look = () => {
      const s = getComputedStyle(e);
      return [s.outlineStyle === "none" ? "" : s.outline, s.boxShadow, s.borderColor, s.backgroundColor].join("; ");
    };
    const e = document.activeElement, within = look();
    e.blur();
    const without = look();
    e.focus({ focusVisible: true });
    return within !== without;
  }
  window.wbLooks = { pale, wide, overlapping, focusRing };
})();
