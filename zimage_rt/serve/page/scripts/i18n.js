// English and Chinese. Texts of the page name their key in `data-text`, `data-label` or `data-placeholder`.

import { setLabel } from "./dom.js";
import en from "./languages/en.js";
import zh from "./languages/zh.js";
import { remember, remembered } from "./store.js";

const LANGUAGES = { en, zh };
const listeners = [];
let current = LANGUAGES[remembered().language] ? remembered().language : preferred();

function preferred() {
  const wanted = navigator.languages ?? [navigator.language];
  return wanted.map((tag) => tag.split("-")[0].toLowerCase()).find((tag) => tag in LANGUAGES) ?? "en";
}

export const language = () => current;

/** The text of a key, with `{name}` replaced by values. */
export function t(key, values = {}) {
  return LANGUAGES[current][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** The text for a number of things: `key.one` or `key.other`. */
export function plural(key, number, values = {}) {
  const form = new Intl.PluralRules(current).select(number) === "one" ? "one" : "other";
  return t(`${key}.${form}`, { number: number.toLocaleString(current), ...values });
}

/** Calls `listener` whenever the language changes. */
export const onLanguage = (listener) => listeners.push(listener);

export function translate(root = document) {
  document.documentElement.lang = current === "zh" ? "zh-Hans" : current;
  for (const node of root.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  for (const node of root.querySelectorAll("[data-label]")) {
    if (node.matches("button")) setLabel(node, t(node.dataset.label));
    else node.setAttribute("aria-label", t(node.dataset.label));
  }
  for (const node of root.querySelectorAll("[data-placeholder]")) node.placeholder = t(node.dataset.placeholder);
  for (const node of root.querySelectorAll("[data-language]")) {
    node.setAttribute("aria-pressed", String(node.dataset.language === current));
  }
}

export function startLanguages() {
  translate();
  for (const node of document.querySelectorAll("[data-language]")) {
    node.addEventListener("click", () => {
      current = node.dataset.language;
      remember({ language: current });
      translate();
      listeners.forEach((listener) => listener());
    });
  }
}
