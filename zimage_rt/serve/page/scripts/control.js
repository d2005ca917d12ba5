// A control image: edges, a pose or depth that the image follows.

import { byId, element } from "./dom.js";
import { number } from "./format.js";
import { t } from "./i18n.js";
import { ImageField } from "./image_field.js";
import { cropped } from "./pixels.js";

const TYPES = ["map", "canny"]; // a map that is ready, or edges that the server finds in a photograph
const FRESH = { scale: 0.75, start: 0, end: 1, type: "map" };

export class Control {
  constructor(state, changed) {
    this.settings = { ...FRESH };
    this.changed = changed;
    this.available = Boolean(state.control);
    const root = byId("control");
    root.hidden = !this.available;
    this.field = new ImageField(root, "control", { tools: () => this.tools(), changed });
  }

  tools() {
    const type = element(
      "select",
      { class: "input", id: "control-type", on: { change: (event) => this.change("type", event.target.value) } },
      ...TYPES.map((name) => element(
        "option",
        { value: name, selected: name === this.settings.type, textContent: t(`control.type.${name}`) },
      )),
    );
    const label = element("label", { class: "label", htmlFor: "control-type", textContent: t("control.type") });
    const sliders = [this.slider("scale", 2), this.slider("start", 1), this.slider("end", 1)];
    return [element("div", { class: "field" }, label, type), ...sliders];
  }

  slider(name, most) {
    const shown = element(
      "output",
      { class: "small numbers", htmlFor: `control-${name}`, textContent: number(this.settings[name]) },
    );
    const input = element("input", {
      type: "range",
      id: `control-${name}`,
      min: 0,
      max: most,
      step: 0.05,
      value: this.settings[name],
      on: {
        input: (event) => {
          this.change(name, Number(event.target.value));
          shown.textContent = number(this.settings[name]);
        },
      },
    });
    const label = element("label", { class: "label", htmlFor: `control-${name}`, textContent: t(`control.${name}`) });
    return element("div", { class: "field" }, element("div", { class: "label-row" }, label, shown), input);
  }

  change(name, value) {
    this.settings[name] = value;
    this.changed();
  }

  /** What is remembered of it beside a job, so that the same can be done again. */
  snapshot() {
    return this.field.canvas ? { canvas: this.field.canvas, settings: { ...this.settings } } : null;
  }

  restore(snapshot) {
    Object.assign(this.field, { canvas: snapshot?.canvas ?? null, failure: null });
    this.adopt(snapshot?.settings ?? FRESH);
  }

  /** The settings of an image that was made with control; the control image itself stays. */
  adopt({ scale, start, end, type }) {
    this.settings = { scale, start, end, type: type ?? "map" };
    this.field.render();
    this.changed();
  }

  get present() {
    return this.available && this.field.canvas !== null;
  }

  /** What a job says of it, for an image of width x height. */
  body(width, height) {
    if (!this.present) return {};
    const image = cropped(this.field.canvas, width, height).toDataURL("image/png");
    const { type, ...others } = this.settings;
    return { control: { image, ...others, ...(type === "map" ? {} : { type }) } };
  }
}
