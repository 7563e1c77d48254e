// A search field with a count and buttons. What is typed is sent once typing rests; Enter sends it at once, or goes on.

const REST_MS = 200;

export default {
  render({ model, el }) {
    const root = document.createElement("div");
    root.className = "wb-find";
    root.setAttribute("role", "search");
    const make = (tag, more, parent = root) => parent.appendChild(Object.assign(document.createElement(tag), more));
    const field = make("input", { type: "search", placeholder: "Find in the text", autocomplete: "off", spellcheck: false });
    field.setAttribute("aria-label", "Find in the text");
    field.dir = "auto";
    const button = (name, title, message) =>
      make("button", { type: "button", className: "lm-Widget jupyter-widgets jupyter-button widget-button", textContent: name, title,
        onclick: () => model.send(message) });
    const before = button("Previous", "the match before (Shift+Enter)", { type: "go", by: -1 });
    const next = button("Next", "the next match (Enter)", { type: "go", by: 1 });
    const told = make("output", {});
    told.setAttribute("aria-live", "polite");
    const label = make("label", {});
    const exact = make("input", { type: "checkbox" }, label);
    label.append("Match case");
    const choose = button("Make it the query", "ask what the match's last token looks at", { type: "choose" });
    let timer = null;

    function search() {
      clearTimeout(timer);
      const asked = field.value !== model.get("needle") || exact.checked !== model.get("match_case");
      if (asked) { model.set("needle", field.value); model.set("match_case", exact.checked); model.save_changes(); }
      return asked;
    }
    field.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(search, REST_MS); });
    exact.addEventListener("change", search);
    field.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key !== "Enter" || event.isComposing) return;
      event.preventDefault();
      if (!search()) model.send({ type: "go", by: event.shiftKey ? -1 : 1 });
    });
    function draw() {
      told.textContent = model.get("told");
      for (const each of [before, next, choose]) each.disabled = !model.get("found");
    }
    function take() {
      if (document.activeElement !== field) field.value = model.get("needle");
      exact.checked = model.get("match_case");
    }
    const listening = [["told", draw], ["found", draw], ["needle", take], ["match_case", take]];
    for (const [name, act] of listening) model.on(`change:${name}`, act);
    el.append(root);
    take();
    draw();
    return () => { clearTimeout(timer); for (const [name, act] of listening) model.off(`change:${name}`, act); };
  },
};
