// What a screen reader says without being asked.

import { byId } from "./dom.js";

let timer;

/** Says `text`; what follows within a moment replaces it. */
export function announce(text) {
  clearTimeout(timer);
  timer = setTimeout(() => (byId("announcer").textContent = text), 100);
}
