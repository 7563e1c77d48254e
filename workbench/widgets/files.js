// Files in and out of the page. A chosen file is compressed and goes to the kernel piece by piece, each when the kernel has
// asked for it, so neither the page nor the connection is ever held up by a large one. What the kernel sends is downloaded.

const PIECE = 1 << 20;

function button(parent, text, title) {
  const made = document.createElement("button");
  Object.assign(made, { textContent: text, title, className: "jupyter-button" });
  parent.append(made);
  return made;
}

export default {
  render({ model, el }) {
    el.classList.add("wb-files");
    const input = document.createElement("input");
    Object.assign(input, { type: "file", accept: ".json,.gz", hidden: true });
    el.append(input);
    const load = button(el, "Import a trace…", "Chrome-trace JSON: this workbench's own, or what torch.profiler exports (.json, .json.gz)");
    const save = button(el, "Export as Chrome trace", "JSON that ui.perfetto.dev and chrome://tracing open");
    let sending = null;

    async function send(file) {
      const packs = typeof CompressionStream !== "undefined" && !file.name.endsWith(".gz");
      const stream = packs ? file.stream().pipeThrough(new CompressionStream("gzip")) : file.stream();
      const data = await new Response(stream).blob();
      sending = { id: `${Math.random()}`, name: file.name, data };
      await piece(0);
    }
    async function piece(index) {
      const { id, name, data } = sending, count = Math.max(1, Math.ceil(data.size / PIECE));
      if (index >= count) return;
      const part = await data.slice(index * PIECE, (index + 1) * PIECE).arrayBuffer();
      model.send({ type: "piece", id, name, index, count }, undefined, [part]);
    }
    function heard(message, buffers) {
      if (message.type === "next" && sending?.id === message.id) piece(message.index);
      if (message.type === "file" && message.to === asked) {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(new Blob([buffers[0]], { type: "application/json" }));
        link.download = message.name;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      }
    }
    let asked = null;
    load.addEventListener("click", () => input.click());
    save.addEventListener("click", () => { asked = `${Math.random()}`; model.send({ type: "save", id: asked }); });
    input.addEventListener("change", () => { if (input.files[0]) send(input.files[0]); input.value = ""; });
    const able = () => { save.disabled = !model.get("can_save"); load.disabled = model.get("busy"); };
    model.on("msg:custom", heard);
    model.on("change:can_save change:busy", able);
    able();
    return () => { model.off("msg:custom", heard); model.off("change:can_save change:busy", able); };
  },
};
