// The image that one starts from, its mask, and how far to go from it.

import { button, byId, element } from "./dom.js";
import { number } from "./format.js";
import { t } from "./i18n.js";
import { ImageField } from "./image_field.js";
import { forgetSource, keepSource, keptSource } from "./keep.js";
import { paint } from "./painter.js";
import { cropped, drawn, isEmpty, isWhole, keptShare, readImage, readMask, whiteOnBlack } from "./pixels.js";

const WITHOUT_MASK = 0.6; // the server's own defaults
const WITH_MASK = 1;

const QUIET = 300; // milliseconds without a change, after which the image is kept for the next visit
const WORTH_SAYING = 0.9; // with less than this share of the image, it is said that edges are lost

export class Source {
  /** `changed` is called for every change; `size()` gives what is generated, `fit(width, height)` sets it. */
  constructor({ changed, size, fit }) {
    this.strength = null; // as the user set it
    Object.assign(this, { size, fit });
    this.changed = () => {
      this.keep();
      changed();
    };
    this.field = new ImageField(
      byId("source"),
      "source",
      { tools: (field) => this.tools(field), changed: this.changed },
    );
  }

  /** Keeps the image for the next visit, once it has stayed the same for a moment. */
  keep() {
    clearTimeout(this.keeping);
    this.keeping = setTimeout(() => (this.present ? keepSource(this.snapshot()) : forgetSource()), QUIET);
  }

  /** What was kept at the last visit. */
  async recall() {
    const kept = await keptSource();
    if (!kept?.image) return;
    const [canvas, mask] = [await readImage(kept.image), kept.mask && (await readMask(kept.mask))];
    this.restore({ ...kept, canvas, mask });
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
    return keptShare(this.field.canvas, ...this.size()) < WORTH_SAYING;
  }

  cropNote() {
    const { width, height } = this.field.canvas;
    const fit = button({ text: t("source.fit"), on: () => this.fit(width, height) });
    return element(
      "div",
      { class: "field" },
      element("p", { class: "small soft", textContent: t("source.cropped") }),
      fit,
    );
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
      element("p", { class: "small soft", id: "strength-hint" }, t(this.field.mask ? "strength.mask" : "strength.hint")),
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
    const { canvas = null, mask = null, name = null, strength = null } = snapshot ?? {};
    Object.assign(this.field, { canvas, mask, name, failure: null });
    this.strength = strength;
    this.field.render();
    this.changed();
  }
}
