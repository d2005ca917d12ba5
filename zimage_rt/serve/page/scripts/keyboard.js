// Keys that work everywhere on the page. Keys that an input method is using are left to it.

import { byId } from "./dom.js";

const APPLE = /Mac|iP(hone|ad)/.test(navigator.platform);

export function listenForKeys({ generate, cancel }) {
  byId("generate-key").textContent = APPLE ? "⌘ ↵" : "Ctrl ↵";
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229 || event.defaultPrevented) return;
    if (document.querySelector("dialog[open]")) return; // dialogs have their own
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      generate();
    } else if (event.key === "Escape" && !event.repeat) cancel();
  });
}
