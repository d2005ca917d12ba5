// The image that one starts from, its mask, and how far to go from it.

import { button, byId, element } from "./dom.js";
import { number } from "./format.js";
import { t } from "./i18n.js";
import { ImageField } from "./image_field.js";
import { paint } from "./painter.js";
import { cropped, drawn, isEmpty, isWhole, kept, whiteOnBlack } from "./pixels.js";

const WITHOUT_MASK = 0.6; // the server's own defaults
const WITH_MASK = 1;

const WORTH_SAYING = 0.9; // with less than this share of the image, it is said that edges are lost

export class Source {
  /** `changed` is called for every change; `size()` gives what is generated, `fit(width, height)` sets it. */
  constructor({ changed, size, fit }) {
    this.strength = null; // as the user set it
    Object.assign(this, { size, fit });
    this.changed = changed;
    this.field = new ImageField(byId("source"), "source", { tools: (...given) => this.tools(...given), changed });
  }

  get present() {
    return this.field.canvas !== null;
  }

  async take(blob, name) {
    await this.field.take(blob, name);
  }

  tools(field) {
    const mask = button({
      name: "brush",
      text: t(field.mask ? "mask.edit" : "mask.paint"),
      on: () => this.paintMask(),
      id: "paint-mask",
    });
    this.crops = this.losesEdges();
    return [mask, this.crops ? this.cropNote() : null, this.strengthField()];
  }

  losesEdges() {
    return kept(this.field.canvas, ...this.size()) < WORTH_SAYING;
  }

  cropNote() {
    const { width, height } = this.field.canvas;
    const fit = button({ text: t("source.fit"), on: () => this.fit(width, height) });
    return element("div", { class: "field" }, element("p", { class: "small soft", textContent: t("source.cropped") }), fit);
  }

  /** The size has changed. */
  resized() {
    if (this.present && this.crops !== this.losesEdges()) this.field.render();
  }

  strengthField() {
    const value = this.effectiveStrength();
    const shown = element("output", { class: "small numbers", htmlFor: "strength", textContent: number(value) });
    const slider = element("input", {
      type: "range",
      id: "strength",
      min: 0.05,
      max: 1,
      step: 0.05,
      value,
      "aria-describedby": "strength-hint",
      on: {
        input: (event) => {
          this.strength = Number(event.target.value);
          shown.textContent = number(this.strength);
          this.changed();
        },
      },
    });
    const label = element("label", { class: "label", htmlFor: "strength", textContent: t("strength") });
    return element(
      "div",
      { class: "field" },
      element("div", { class: "label-row" }, label, shown),
      slider,
      element("p", { class: "small soft", id: "strength-hint", textContent: t(this.field.mask ? "strength.mask" : "strength.hint") }),
    );
  }

  effectiveStrength() {
    return this.strength ?? (this.field.mask ? WITH_MASK : WITHOUT_MASK);
  }

  async paintMask() {
    const mask = await paint(this.field.canvas, this.field.mask);
    if (mask !== undefined) this.field.setMask(mask && !isEmpty(mask) ? mask : null);
    byId("paint-mask")?.focus();
  }

  /** What a job says of it, for an image of width x height. */
  body(width, height) {
    if (!this.present) return {};
    const { canvas, mask, name } = this.field;
    const asIs = name !== null && isWhole(canvas, width, height);
    const image = asIs ? canvas : cropped(canvas, width, height);
    const said = { image: asIs ? { gallery: name } : image.toDataURL("image/png"), strength: this.effectiveStrength() };
    if (mask) {
      const shape = drawn(mask, width, height, image.width, image.height);
      said.mask = whiteOnBlack(shape).toDataURL("image/png");
    }
    return said;
  }

  /** What is remembered of it beside a job, so that the same can be done again. */
  snapshot() {
    const { canvas, mask, name } = this.field;
    return this.present ? { canvas, mask, name, strength: this.strength } : null;
  }

  restore(snapshot) {
    Object.assign(this.field, snapshot ?? { canvas: null, mask: null, name: null }, { failure: null });
    this.strength = snapshot?.strength ?? null;
    this.field.render();
    this.changed();
  }
}
