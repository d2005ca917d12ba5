// A place for an image: chosen from a file, dropped, pasted, or taken from the gallery. Shows it, and what can be done.

import { announce } from "./announce.js";
import { button, element, icon, replace } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { blank, readImage } from "./pixels.js";

export class ImageField {
  /** `texts` begins the keys of the texts; `tools(field)` gives what stands beside the image. */
  constructor(root, texts, { tools, changed }) {
    Object.assign(this, { root, texts, tools, changed });
    this.canvas = null; // the image
    this.mask = null; // a canvas of the same shape, transparent where nothing is painted
    this.name = null; // in the gallery, where it is from there
    this.failure = null; // the key of a text
    this.file = element(
      "input",
      { type: "file", accept: "image/*", hidden: true, on: { change: () => this.chosen() } },
    );
    this.listenForDrops();
    onLanguage(() => this.render());
    this.render();
  }

  chosen() {
    const [file] = this.file.files;
    this.file.value = ""; // so that the same file can be chosen again
    if (file) this.take(file);
  }

  listenForDrops() {
    const over = (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      this.root.classList.add("dropping");
    };
    this.root.addEventListener("dragenter", over);
    this.root.addEventListener("dragover", over);
    this.root.addEventListener("dragleave", () => this.root.classList.remove("dropping"));
    this.root.addEventListener("drop", (event) => {
      event.preventDefault();
      this.root.classList.remove("dropping");
      const [file] = event.dataTransfer.files;
      if (file) this.take(file);
    });
  }

  /** Takes an image file or blob; `name` is the one in the gallery. */
  async take(blob, name = null) {
    try {
      this.canvas = await readImage(blob);
      Object.assign(this, { mask: null, name, failure: null });
      announce(t(`${this.texts}.taken`));
    } catch {
      this.failure = "error.image";
    }
    this.render();
    this.changed();
  }

  clear() {
    Object.assign(this, { canvas: null, mask: null, name: null, failure: null });
    this.render();
    this.changed();
  }

  setMask(mask) {
    this.mask = mask;
    this.render();
    this.changed();
  }

  render() {
    const failure = this.failure && element("p", { class: "field-error", role: "alert", textContent: t(this.failure) });
    replace(this.root, [this.file, this.canvas ? this.held() : this.invitation(), failure], this.root);
  }

  invitation() {
    const words = element(
      "span",
      {},
      element("strong", { textContent: t(`${this.texts}.choose`) }),
      element("span", { class: "small soft", textContent: t("image.hint") }),
    );
    return element(
      "button",
      { type: "button", class: "drop", on: { click: () => this.file.click() } },
      icon("image"),
      words,
    );
  }

  held() {
    const title = t(`${this.texts}.held`);
    const remove = button({ name: "close", label: t("image.remove"), kind: "quiet", on: () => this.clear() });
    const head = element(
      "div",
      { class: "held-head" },
      element("span", { class: "label", textContent: title }),
      remove,
    );
    const picture = element("div", { class: "picture" }, this.thumbnail());
    const tools = element("div", { class: "held-tools" }, ...this.tools(this).filter(Boolean));
    return element("div", { class: "held", role: "group", "aria-label": title }, head, picture, tools);
  }

  thumbnail() {
    const scale = Math.min(1, 320 / Math.max(this.canvas.width, this.canvas.height));
    const small = blank(Math.ceil(this.canvas.width * scale), Math.ceil(this.canvas.height * scale));
    const context = small.getContext("2d");
    context.drawImage(this.canvas, 0, 0, small.width, small.height);
    if (this.mask) {
      context.globalAlpha = 0.7;
      context.drawImage(this.mask, 0, 0, small.width, small.height);
    }
    small.setAttribute("role", "img");
    small.setAttribute("aria-label", t(this.mask ? "image.alt.masked" : "image.alt"));
    return small;
  }
}

/** Pasted images go to the field that has the focus, or else to the first one. */
export function listenForPastes(fields) {
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (!file || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    const shown = fields.filter((field) => !field.root.closest("[hidden]"));
    (shown.find((field) => field.root.contains(document.activeElement)) ?? shown[0])?.take(file);
  });
}
