// One image at its full size, with its settings and what to do with it.

import { announce } from "./announce.js";
import { button, byId, element } from "./dom.js";
import { moment, number, size } from "./format.js";
import { t } from "./i18n.js";
import { imageActions, LEAST } from "./stage.js";

export class Viewer {
  /** `beside(image, by)` gives its neighbours. */
  constructor(acts, beside) {
    this.beside = beside;
    this.dialog = byId("viewer");
    this.acts = {
      ...acts,
      again: (image) => this.leave(() => acts.again(image)),
      vary: (image) => this.leave(() => acts.vary(image)),
      asInput: (image) => this.leave(() => acts.asInput(image)),
      reuse: (image) => this.leave(() => acts.reuse(image)),
    };
    this.dialog.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by && !event.target.closest(".words")) this.step(by);
    });
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // on the backdrop
    });
  }

  leave(then) {
    this.dialog.close();
    then();
  }

  step(by) {
    const next = this.beside(this.image, by);
    if (!next) return;
    this.render(next);
    this.dialog.querySelector(`[data-by="${by}"]`).focus();
    announce(next.settings?.prompt ?? next.name);
  }

  open(image) {
    this.render(image);
    this.dialog.showModal();
  }

  close() {
    this.dialog.close();
  }

  render(image) {
    this.image = image;
    const turn = (by, name, label) => {
      const made = button({ name, label, kind: "quiet", on: () => this.step(by), "data-by": by });
      made.disabled = !this.beside(image, by);
      return made;
    };
    const head = element(
      "header",
      { class: "dialog-head" },
      element("h2", { textContent: t("viewer") }),
      turn(-1, "left", t("viewer.newer")),
      turn(1, "right", t("viewer.older")),
      button({ name: "close", label: t("close"), kind: "quiet", on: () => this.dialog.close() }),
    );
    const picture = element("img", { src: image.url, alt: image.settings?.prompt ?? image.name });
    const longer = Math.max(image.width, image.height);
    if (longer && longer < LEAST) picture.style.width = `min(100%, ${(LEAST * image.width) / longer}px)`;
    const body = element(
      "div",
      { class: "viewer-body" },
      element("div", { class: "viewer-image" }, picture),
      this.facts(image),
    );
    this.dialog.replaceChildren(head, body);
  }

  facts(image) {
    const { settings } = image;
    const parts = [];
    if (settings) parts.push(element("p", { class: "words", tabIndex: 0, textContent: settings.prompt }));
    parts.push(imageActions(image, this.acts));
    if (settings?.negative_prompt) parts.push(element(
      "p",
      { class: "small" },
      element("strong", { textContent: `${t("negative")}: ` }),
      settings.negative_prompt,
    ));
    const list = element("dl");
    for (const [key, value] of this.rows(image)) list.append(
      element("dt", { textContent: t(key) }),
      element("dd", { textContent: value }),
    );
    parts.push(list);
    return element("div", { class: "viewer-facts" }, ...parts);
  }

  rows(image) {
    const s = image.settings ?? {};
    const rows = [
      ["size", size(image)],
      ["seed", s.seed],
      ["steps", s.steps],
      ["cfg", s.cfg_scale && number(s.cfg_scale)],
      ["sampler", s.sampler],
      ["scheduler", s.scheduler],
      ["shift", s.shift && number(s.shift)],
      ["strength", s.strength && number(s.strength)],
      ["lora", s.loras?.map((one) => `${one.name} (${number(one.weight)})`).join(", ")],
      ["control.held", s.control && `${s.control.name} (${number(s.control.scale)})`],
      ["fact.model", s.model],
      ["fact.executor", s.executor],
      ["fact.created", image.created && moment(image.created)],
    ];
    return rows.filter(([, value]) => value !== undefined && value !== null && value !== "");
  }
}
