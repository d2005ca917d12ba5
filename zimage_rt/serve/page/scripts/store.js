// What the browser remembers between visits: the language and the form.

const NAME = "zimage-rt";

export function remembered() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {}; // storage is off, or holds something else
  }
}

export function remember(changes) {
  try {
    localStorage.setItem(NAME, JSON.stringify({ ...remembered(), ...changes }));
  } catch {
    // storage is off or full: the page works without
  }
}
