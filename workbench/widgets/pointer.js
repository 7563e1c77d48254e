// A text whose tokens can be chosen.
// The kernel sets traits and then raises `sequence`; the page draws and repeats that number in `data-sequence`.

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
    const root = document.createElement("div");
    root.className = "wb-pointer wb-text";
    el.append(root);
    const view = text(model, root);
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
