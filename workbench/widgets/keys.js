// Comes before the script of every widget that loads it; the page needs it once.
// Notebook 7 hears keys before the page's elements do, and would take Enter or an arrow for a command to its cells: a widget
// that has the focus keeps them. With the attribute on it the notebook looks for no command; it is there for one key only.
const KEPT = /^(Arrow\w+|Page\w+|Home|End|Enter|Backspace|Escape|[ +=\-0b])$/, NO_COMMANDS = "data-lm-suppress-shortcuts";

function keepKeys(event) {
  const command = event.ctrlKey || event.metaKey || (event.key === "Enter" && (event.shiftKey || event.altKey));
  const target = event.target;
  if (command || !KEPT.test(event.key) || !target.closest?.(".jupyter-widgets, .wb-pointer")) return;
  if (target.hasAttribute(NO_COMMANDS)) return;
  target.setAttribute(NO_COMMANDS, "");
  setTimeout(() => target.removeAttribute(NO_COMMANDS));
}

if (!window.wbKeepKeys) window.addEventListener("keydown", (window.wbKeepKeys = keepKeys), true);

