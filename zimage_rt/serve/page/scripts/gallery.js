// What was made: newest first, a page at a time.

import { request } from "./api.js";
import { button, byId, element } from "./dom.js";
import { size } from "./format.js";
import { onLanguage, plural, t } from "./i18n.js";

const PAGE = 48;

export class Gallery {
  constructor(acts) {
    this.acts = acts;
    this.images = [];
    this.more = false;
    byId("gallery-more").addEventListener("click", () => this.load());
    onLanguage(() => this.render());
  }

  /** The next page or, with `newest`, what has come since. */
  async load(newest = false) {
    const before = newest ? "" : (this.images.at(-1)?.name ?? "");
    const query = `limit=${PAGE}${before && `&before=${encodeURIComponent(before)}`}`;
    const answer = await request("GET", `api/images?${query}`);
    const known = new Set(this.images.map((one) => one.name));
    const found = answer.images.filter((one) => !known.has(one.name));
    if (!newest || !known.size) this.more = answer.more;
    if (!found.length) return this.count();
    this.images = newest ? [...found, ...this.images] : [...this.images, ...found];
    this.render();
  }

  add(image) {
    if (this.images.some((one) => one.name === image.name)) return;
    this.images.unshift(image);
    byId("cards").prepend(this.card(image));
    this.count();
  }

  remove(image) {
    const index = this.images.findIndex((one) => one.name === image.name);
    if (index < 0) return;
    const card = byId("cards").children[index];
    const focused = card.contains(document.activeElement);
    this.images.splice(index, 1);
    card.remove();
    this.count();
    const next = byId("cards").children[Math.min(index, this.images.length - 1)];
    if (focused) (next?.querySelector(".open") ?? byId("gallery-title")).focus();
  }

  /** The image before (-1) or after (1) another one; undefined at the ends. */
  beside(image, by) {
    const index = this.images.findIndex((one) => one.name === image.name);
    return index < 0 ? undefined : this.images[index + by];
  }

  render() {
    byId("cards").replaceChildren(...this.images.map((image) => this.card(image)));
    this.count();
  }

  count() {
    byId("gallery-empty").hidden = this.images.length > 0;
    byId("gallery-more").hidden = !this.more;
    const number = this.images.length;
    byId("gallery-count").textContent = number ? `${plural("images", number)}${this.more ? "+" : ""}` : "";
  }

  card(image) {
    const prompt = image.settings?.prompt ?? image.name;
    const picture = element("img", { alt: prompt, loading: "lazy", decoding: "async", src: image.url });
    const label = t("gallery.open", { prompt, size: size(image) });
    const open = element(
      "button",
      { type: "button", class: "open", "aria-label": label, title: prompt, on: { click: () => this.acts.open(image) } },
      picture,
    );
    const quick = element(
      "div",
      { class: "quick" },
      image.settings && button({ name: "vary", label: t("vary"), on: () => this.acts.vary(image) }),
      button({ name: "input", label: t("as-input"), on: () => this.acts.asInput(image) }),
    );
    const card = element("li", { class: "card" }, open, quick);
    if (image.width && image.height) card.style.setProperty("--ratio", image.width / image.height);
    return card;
  }
}
