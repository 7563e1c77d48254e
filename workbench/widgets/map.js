// A picture with a cross-hair over its cells; wheel, drag and keys ask the kernel for another part of what it shows.
// The kernel sets traits and then raises `sequence`; the page draws and repeats that number in `data-sequence`.

const THROTTLE_MS = 60, GESTURE_MS = 700, LATE_MS = 10_000;
const CLICK_PX = 4; // a press that moves less is a click
const DOUBLING_PX = 200; // of a turned wheel; a notch is about 100
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const PAGES = { PageUp: [-1, 0], PageDown: [1, 0], Home: [0, -1], End: [0, 1] };

function part(parent, name, attributes = {}) {
  const made = document.createElement("div");
  made.className = name;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

// Sends one request at a time; those made until it is answered are added up.
function requests(model) {
  const later = [];
  let waiting = null;
  function next() {
    if (!later.length || (waiting && performance.now() < waiting.until)) return;
    const now = performance.now();
    waiting = { id: now + Math.random(), until: now + LATE_MS };
    model.send({ ...later.shift(), ask: waiting.id });
  }
  return {
    waiting: () => waiting && performance.now() < waiting.until,
    ask(request) {
      const last = later.at(-1);
      if (last?.type !== request.type) later.push(request);
      else {
        for (const [name, value] of Object.entries(request)) {
          const add = ["by", "rows", "columns"].includes(name) && typeof value === "number";
          last[name] = add ? last[name] + value : value;
        }
      }
      next();
    },
    answered() { // true if what is drawn now was asked for here
      if (waiting?.id !== model.get("answered")) return false;
      waiting = null;
      next();
      return true;
    },
  };
}

function picture(model, root) {
  const title = part(root, "wb-row-title"), rowLabels = part(root, "wb-row-labels");
  const box = part(root, "wb-box", { tabindex: "0", role: "application" });
  const columnLabels = part(root, "wb-column-labels"), columnTitle = part(root, "wb-column-title");
  const hint = part(root, "wb-hint", { "aria-hidden": "true" }); // the label of the map says it, too
  const image = new Image();
  image.draggable = false;
  image.alt = "";
  box.append(image);
  const mark = part(box, "wb-mark"), across = part(box, "wb-across"), down = part(box, "wb-down"), band = part(box, "wb-band");
  band.hidden = true;
  const { ask, answered, waiting } = requests(model);
  let at = null, shown = null, url = null, last = 0, timer = null;
  let press = null, dragged = false; // where the button went down, until it goes up; whether it was more than a click
  let widest = 0, tallest = 0;
  let turn = 0, turned = 0, gesture = 0; // of the wheel

  const longest = (labels) => Math.max(0, ...labels.map(([, text]) => text.length));
  const share = (i, count) => `${(100 * (i + 0.5)) / count}%`;
  const within = (low, x, high) => Math.max(low, Math.min(high, x));
  const send = (type) => at && model.send({ type, row: at[0], column: at[1] });
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
  function shares(event) { // from the top and from the left
    const area = box.getBoundingClientRect();
    return [within(0, (event.clientY - area.top) / area.height, 1), within(0, (event.clientX - area.left) / area.width, 1)];
  }
  function place(event) {
    const [y, x] = shares(event), rows = model.get("rows"), columns = model.get("columns");
    at = [Math.min(rows - 1, Math.floor(y * rows)), Math.min(columns - 1, Math.floor(x * columns))];
    cross();
  }

  // Dragging moves the picture at once; the kernel is asked for the part that belongs there when the button goes up.
  function shift([y, x]) {
    image.style.translate = `${100 * x}% ${100 * y}%`;
    mark.style.translate = `0 ${y * box.clientHeight}px`;
    root.classList.add("wb-moving");
  }
  function settle() {
    image.style.translate = mark.style.translate = "";
    root.classList.remove("wb-moving");
  }
  function drag(event) {
    if (waiting()) press.from = shares(event); // counted from where the coming picture finds the pointer
    const [y, x] = shares(event), [top, left] = press.from;
    if (!dragged && Math.hypot(event.clientX - press.x, event.clientY - press.y) < CLICK_PX) return;
    if (!dragged) box.setPointerCapture(event.pointerId);
    dragged = true;
    press.to = [y, x];
    if (press.selects) {
      band.hidden = false;
      Object.assign(band.style, { top: `${100 * Math.min(y, top)}%`, left: `${100 * Math.min(x, left)}%`,
                                  height: `${100 * Math.abs(y - top)}%`, width: `${100 * Math.abs(x - left)}%` });
    } else if (!waiting()) {
      const [above, below, before, after] = model.get("room");
      press.way = [within(-below, y - top, above), within(-after, x - left, before)];
      shift(press.way);
    }
  }
  function stop(event) { // the button went up; without `event`, nothing comes of it
    const { from, to, way, selects } = press ?? {};
    press = null;
    band.hidden = true;
    if (event && dragged && selects && to[0] !== from[0] && to[1] !== from[1]) {
      ask({ type: "select", rows: [from[0], to[0]], columns: [from[1], to[1]] });
    } else if (event && way && (way[0] || way[1])) {
      ask({ type: "pan", rows: -way[0], columns: -way[1] });
    } else if (!waiting()) settle();
  }
  box.addEventListener("pointerdown", (event) => {
    dragged = false;
    if (event.button || !event.isPrimary) return;
    press = { x: event.clientX, y: event.clientY, from: shares(event), selects: event.shiftKey };
    if (!event.shiftKey) return;
    event.preventDefault(); // the notebook would select cells
    box.focus({ preventScroll: true });
  });
  box.addEventListener("pointermove", (event) => {
    if (press && event.buttons) return drag(event);
    if (press) stop(); // the button went up elsewhere
    place(event);
    hover();
  });
  box.addEventListener("pointerup", stop);
  box.addEventListener("pointercancel", () => stop());
  box.addEventListener("click", (event) => {
    if (dragged) return;
    place(event);
    send("click");
  });

  box.addEventListener("wheel", (event) => {
    const meant = event.ctrlKey || event.metaKey || box.matches(":focus");
    if (!meant || !event.deltaY) return; // the notebook scrolls
    event.preventDefault();
    event.stopPropagation();
    if (press) return;
    const now = performance.now();
    if (now - turned > GESTURE_MS) [turn, gesture] = [0, now];
    turned = now;
    turn -= (event.deltaY * [1, 33, 400][event.deltaMode]) / DOUBLING_PX; // pixels, lines or pages
    if (Math.abs(turn) < 0.25) return;
    place(event);
    const area = box.getBoundingClientRect(), y = event.clientY - area.top, x = event.clientX - area.left;
    ask({ type: "wheel", by: turn, y, x, gesture, row: at[0], column: at[1] });
    turn = 0;
  }, { passive: false });

  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape" && press) { event.stopPropagation(); return stop(); }
    const arrow = ARROWS[event.key], page = PAGES[event.key] ?? (event.altKey && arrow);
    const by = { "+": 1, "=": 1, "-": -1 }[event.key];
    const back = event.key === "b" || event.key === "Backspace", click = event.key === "Enter" || event.key === " ";
    if (!arrow && !page && !by && !back && !click && event.key !== "0") return;
    event.preventDefault();
    event.stopPropagation(); // the notebook would take them for its cells
    if (page) return ask({ type: "pan", rows: page[0] / 2, columns: page[1] / 2 });
    if (back) return ask({ type: "back", by: 1 });
    if (event.key === "0") return ask({ type: "whole" });
    at = at ?? [Math.max(0, model.get("mark")), 0];
    if (by) return ask({ type: "zoom", by, row: at[0], column: at[1] });
    if (click) return send("click");
    const many = event.shiftKey ? 10 : 1;
    at = [Math.max(0, at[0] + many * arrow[0]), Math.max(0, at[1] + many * arrow[1])];
    cross();
    hover();
  });

  function drawn(done) {
    if (answered()) settle();
    done();
  }
  return {
    draw(done) {
      root.style.setProperty("--wb-width", `${model.get("width")}px`);
      root.style.setProperty("--wb-height", `${model.get("height")}px`);
      box.setAttribute("aria-label", model.get("label"));
      title.textContent = model.get("row_title");
      columnTitle.textContent = model.get("column_title");
      hint.textContent = model.get("hint");
      label(rowLabels, "top", model.get("row_labels"));
      // As long as a part is shown, nothing around the picture moves because its labels or its height are others.
      const isPart = model.get("room").some((share) => share > 0);
      widest = Math.max(isPart ? widest : 0, 2 + longest(model.get("row_labels")));
      rowLabels.style.width = `${widest}ch`;
      label(columnLabels, "left", model.get("column_labels"));
      columnLabels.classList.toggle("wb-upright", model.get("upright"));
      columnLabels.style.height = model.get("upright") ? `${2 + longest(model.get("column_labels"))}ch` : "";
      tallest = isPart ? Math.max(tallest, root.offsetHeight) : 0;
      root.style.minHeight = isPart ? `${tallest}px` : "";
      const cell = model.get("cross"); // where the place pointed at lies in a new picture
      if (model.get("png") !== shown) at = cell.length ? [...cell] : null;
      cross();
      const png = model.get("png"), finish = () => drawn(done);
      if (png === shown) return image.complete ? finish() : image.addEventListener("load", finish, { once: true });
      shown = png;
      if (url) URL.revokeObjectURL(url); // what it showed is drawn already, or will never be
      url = URL.createObjectURL(new Blob([png], { type: "image/png" }));
      image.onload = image.onerror = finish;
      image.src = url;
    },
    close() { clearTimeout(timer); if (url) URL.revokeObjectURL(url); },
  };
}

export default {
  render({ model, el }) {
    const root = part(el, "wb-pointer wb-picture");
    const view = picture(model, root);
    const draw = () => {
      const sequence = model.get("sequence");
      view.draw(() => { root.dataset.sequence = Math.max(sequence, root.dataset.sequence ?? 0); });
    };
    model.on("change:sequence", draw);
    draw();
    return () => { model.off("change:sequence", draw); view.close(); };
  },
};
