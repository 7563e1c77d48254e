// A slide's title, sentence, buttons and notes; and the keys of a clicker, once the demo was clicked.

const KEYS = { PageDown: "next", ArrowRight: "next", PageUp: "back", ArrowLeft: "back", Home: "reset" };
const WRITTEN = "textarea, input, select, [contenteditable=true]"; // where a key belongs to the text
const MOVED = `${WRITTEN}, [role=slider], [role=application], .wb-text`; // where arrows belong to the picture

function part(parent, tag, name, text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  parent.append(made);
  return made;
}

function render({ model, el }) {
  const root = part(el, "div", "wb-slide");
  root.tabIndex = 0;
  root.setAttribute("role", "region");
  root.setAttribute("aria-label", "Demo: PageDown and PageUp, or the arrow keys, change the slide; Home starts again");
  const title = part(root, "h2", "wb-slide-title"), said = part(root, "p", "wb-slide-said");
  said.setAttribute("aria-live", "polite");
  const bar = part(root, "div", "wb-slide-bar"), buttons = {};
  for (const [type, text] of [["back", "Back"], ["next", "Next"], ["reset", "Reset"], ["live", "Go live"]]) {
    buttons[type] = part(bar, "button", "jupyter-button wb-slide-button", text);
    buttons[type].addEventListener("click", () => model.send({ type }));
  }
  const place = part(bar, "span", "wb-slide-place"), status = part(bar, "span", "wb-slide-status");
  status.setAttribute("role", "status");
  const hint = part(root, "p", "wb-slide-hint");
  const details = part(root, "details", "wb-slide-notes");
  part(details, "summary", "", "Presenter notes");
  const notes = part(details, "p", "");
  let armed = false;

  const demo = () => root.closest(".wb-demo") ?? root;
  function arm(on) {
    armed = on;
    hint.textContent = on
      ? "Keys are on: PageDown or → next, PageUp or ← back, Home reset, Escape off"
      : "Click here once, then use a clicker or the keys PageDown, PageUp, →, ←";
  }
  const seen = (event) => arm(demo().contains(event.target));
  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !root.isConnected || root.offsetParent === null) return;
    if (event.key === "Escape" && armed) return arm(false);
    const type = KEYS[event.key];
    const target = event.target instanceof Element ? event.target : document.body;
    const paged = event.key.startsWith("Page");
    if (!type || !armed || target.closest(paged ? "textarea, [contenteditable=true]" : MOVED)) return;
    event.preventDefault();
    event.stopImmediatePropagation(); // the notebook would move its cells
    model.send({ type });
  }
  // On the window, before JupyterLab's own keys.
  window.addEventListener("keydown", key, true);
  window.addEventListener("pointerdown", seen, true);
  root.addEventListener("focusin", seen);

  function draw() {
    const slide = model.get("slide");
    title.textContent = slide.title;
    said.textContent = slide.said;
    notes.textContent = slide.notes;
    place.textContent = `${slide.number} of ${slide.count}`;
    status.textContent = slide.status;
    buttons.back.disabled = slide.number === 1;
    buttons.next.disabled = slide.number === slide.count;
    buttons.live.disabled = !slide.can_go_live;
    buttons.live.title = slide.about_live;
    root.dataset.number = slide.number;
    root.dataset.state = slide.state;
  }
  model.on("change:slide", draw);
  arm(false);
  draw();
  return () => {
    model.off("change:slide", draw);
    window.removeEventListener("keydown", key, true);
    window.removeEventListener("pointerdown", seen, true);
  };
}

export default { render };
