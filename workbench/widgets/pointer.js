// What needs the pointer: a picture with a cross-hair over its cells, or a text whose tokens can be chosen.
// The kernel sets traits and then raises `sequence`; the page draws and repeats that number in `data-sequence`.

const THROTTLE_MS = 60;

function part(parent, name, attributes = {}) {
  const made = document.createElement("div");
  made.className = name;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

function picture(model, root) {
  const title = part(root, "wb-row-title"), rowLabels = part(root, "wb-row-labels");
  const box = part(root, "wb-box", { tabindex: "0", role: "application" });
  const columnLabels = part(root, "wb-column-labels"), columnTitle = part(root, "wb-column-title");
  const image = new Image();
  image.draggable = false;
  image.alt = "";
  box.append(image);
  const mark = part(box, "wb-mark"), across = part(box, "wb-across"), down = part(box, "wb-down");
  let at = null, shown = null, url = null, last = 0, timer = null;

  const longest = (labels) => Math.max(0, ...labels.map(([, text]) => text.length));
  const share = (i, count) => `${(100 * (i + 0.5)) / count}%`;
  const send = (type, more = {}) => at && model.send({ type, row: at[0], column: at[1], ...more });
  function hover() {
    clearTimeout(timer); // at most one message per THROTTLE_MS, and always the last place
    const wait = Math.max(0, last + THROTTLE_MS - performance.now());
    timer = setTimeout(() => { last = performance.now(); send("hover"); }, wait);
  }
  function cross() {
    const rows = model.get("rows"), columns = model.get("columns"), chosen = model.get("mark");
    mark.hidden = chosen < 0 || chosen >= rows;
    mark.style.top = share(chosen, rows);
    if (at) at = [Math.min(at[0], rows - 1), Math.min(at[1], columns - 1)];
    across.hidden = down.hidden = !at;
    if (at) { across.style.top = share(at[0], rows); down.style.left = share(at[1], columns); }
    box.dataset.cell = at ? at.join(",") : "";
  }
  function label(parent, side, labels) {
    parent.replaceChildren();
    for (const [place, text] of labels) {
      const made = document.createElement("span");
      made.style[side] = `${100 * place}%`;
      made.textContent = text;
      parent.append(made);
    }
  }
  function place(event) {
    const area = image.getBoundingClientRect();
    const cell = (offset, size, count) => Math.max(0, Math.min(count - 1, Math.floor((count * offset) / size)));
    at = [cell(event.clientY - area.top, area.height, model.get("rows")),
          cell(event.clientX - area.left, area.width, model.get("columns"))];
    cross();
  }
  box.addEventListener("pointermove", (event) => { place(event); hover(); });
  box.addEventListener("click", (event) => { place(event); send("click"); });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const zoom = { "+": 1, "=": 1, "-": -1, 0: 0 }[event.key];
    if (!step && zoom === undefined && event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    event.stopPropagation(); // arrow keys would otherwise move the notebook's selected cell
    at = at ?? [Math.max(0, model.get("mark")), 0];
    if (step) {
      const many = event.shiftKey ? 10 : 1;
      at = [Math.max(0, at[0] + many * step[0]), Math.max(0, at[1] + many * step[1])];
      cross();
      hover();
    } else if (zoom !== undefined) send("zoom", { by: zoom });
    else send("click");
  });
  return {
    draw(done) {
      root.style.setProperty("--wb-width", `${model.get("width")}px`);
      root.style.setProperty("--wb-height", `${model.get("height")}px`);
      box.setAttribute("aria-label", model.get("label"));
      title.textContent = model.get("row_title");
      columnTitle.textContent = model.get("column_title");
      label(rowLabels, "top", model.get("row_labels"));
      rowLabels.style.width = `${2 + longest(model.get("row_labels"))}ch`;
      label(columnLabels, "left", model.get("column_labels"));
      columnLabels.classList.toggle("wb-upright", model.get("upright"));
      columnLabels.style.height = model.get("upright") ? `${2 + longest(model.get("column_labels"))}ch` : "";
      const cell = model.get("cross"); // where the place pointed at lies in a new picture
      if (model.get("png") !== shown) at = cell.length ? [...cell] : null;
      cross();
      const png = model.get("png");
      if (png === shown) return image.complete ? done() : image.addEventListener("load", done, { once: true });
      shown = png;
      const old = url;
      url = URL.createObjectURL(new Blob([png], { type: "image/png" }));
      image.onload = () => { if (old) URL.revokeObjectURL(old); done(); };
      image.src = url;
    },
    close() { clearTimeout(timer); if (url) URL.revokeObjectURL(url); },
  };
}

function text(model, root) {
  function showChosen() {
    const chosen = root.querySelector("[data-show]") ?? root.querySelector("[data-token].q");
    if (!chosen) return;
    const top = chosen.offsetTop - root.offsetTop, above = root.querySelector("p")?.offsetHeight ?? 0; // it stays on top
    if (top < root.scrollTop + above || top > root.scrollTop + root.clientHeight - 24) root.scrollTop = top - root.clientHeight / 2;
  }
  // What is drawn before it is in the page has no height and cannot be scrolled yet.
  const appeared = new ResizeObserver(() => {
    if (!root.clientHeight) return;
    appeared.disconnect();
    showChosen();
  });
  appeared.observe(root);
  root.addEventListener("click", (event) => {
    const token = event.target.closest("[data-token]");
    if (token) model.send({ type: "click", token: token.dataset.token });
  });
  root.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key.startsWith("Arrow")) event.stopPropagation();
    if (event.target !== root || by === undefined) return;
    event.preventDefault();
    model.send({ type: "move", by });
  });
  return {
    draw(done) {
      const focused = root.contains(document.activeElement) && document.activeElement.dataset.token;
      root.style.maxHeight = model.get("height") ? `${model.get("height")}px` : "none";
      if (model.get("height")) root.tabIndex = 0;
      root.setAttribute("role", "group");
      root.setAttribute("aria-label", model.get("label"));
      root.innerHTML = model.get("html"); // escaped by the kernel
      if (focused) root.querySelector(`[data-token="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
      showChosen();
      done();
    },
    close() { appeared.disconnect(); },
  };
}

export default {
  render({ model, el }) {
    const root = part(el, `wb-pointer wb-${model.get("mode")}`);
    const view = model.get("mode") === "picture" ? picture(model, root) : text(model, root);
    const draw = () => {
      const sequence = model.get("sequence");
      view.draw(() => {
        root.dataset.sequence = Math.max(sequence, root.dataset.sequence ?? 0);
        if (model.get("reports")) model.send({ type: "drawn", sequence });
      });
    };
    model.on("change:sequence", draw);
    draw();
    return () => { model.off("change:sequence", draw); view.close(); };
  },
};
