// Width and height: by the shape of the image, or exactly.

import { byId, element } from "./dom.js";

const RATIOS = [[1, 1], [4, 3], [3, 4], [3, 2], [2, 3], [16, 9], [9, 16]];
const ICON = 18; // pixels of the longer side of a shape
const EXACT = 0.06; // how far a size on the grid may be from its ratio

export class Sizes {
  constructor(state, changed) {
    this.multiple = state.limits.multiple ?? 16;
    this.mostPixels = state.limits.max_pixels;
    this.changed = changed;
    this.area = state.defaults.width * state.defaults.height; // that ratios keep
    this.fields = [byId("width"), byId("height")];
    for (const field of this.fields) {
      Object.assign(field, { min: this.multiple, max: 16384, step: this.multiple });
      field.addEventListener("input", () => this.typed());
      field.addEventListener("change", () => this.snap(field));
    }
    byId("swap").addEventListener("click", () => {
      const [width, height] = this.value();
      this.set(height, width);
    });
    byId("ratios").replaceChildren(...RATIOS.map((ratio) => this.chip(ratio)));
  }

  chip([across, down]) {
    const name = `${across}:${down}`;
    const radio = element(
      "input",
      { type: "radio", name: "ratio", value: name, on: { change: () => this.choose(across, down) } },
    );
    const shape = element("span", { class: "shape" });
    const longer = Math.max(across, down);
    shape.style.width = `${Math.round((ICON * across) / longer)}px`;
    shape.style.height = `${Math.round((ICON * down) / longer)}px`;
    return element("label", { class: "chip" }, radio, shape, name);
  }

  value() {
    return this.fields.map((field) => Number(field.value));
  }

  /** Sets width and height, and with them the area that ratios keep. */
  set(width, height) {
    [this.fields[0].value, this.fields[1].value] = [width, height];
    this.typed();
  }

  /** The shape across : down, with as many pixels as before. */
  choose(across, down) {
    const [width, height] = this.shaped(across, down, this.area);
    [this.fields[0].value, this.fields[1].value] = [width, height];
    this.mark();
    this.changed();
  }

  /** The shape of an image, with its own pixels where the server allows them. */
  fit(width, height) {
    this.area = Math.min(width * height, this.mostPixels);
    const [w, h] = this.shaped(width, height, this.area);
    this.set(w, h);
  }

  shaped(across, down, area) {
    const unit = this.multiple;
    const round = (side) => Math.max(unit, Math.round(side / unit) * unit);
    const scale = Math.sqrt(Math.min(area, this.mostPixels) / (across * down));
    let [width, height] = [round(across * scale), round(down * scale)];
    while (width * height > this.mostPixels) {
      if (width >= height) width -= unit;
      else height -= unit;
    }
    return [width, height];
  }

  typed() {
    const [width, height] = this.value();
    if (width > 0 && height > 0) this.area = width * height;
    this.mark();
    this.changed();
  }

  /** A size between two that the model can generate becomes the nearest one. */
  snap(field) {
    const side = Number(field.value);
    if (side > 0) field.value = Math.max(this.multiple, Math.round(side / this.multiple) * this.multiple);
    this.typed();
  }

  /** Checks the ratio that the size has; none where it has none of them. */
  mark() {
    const [width, height] = this.value();
    const distance = ([across, down]) => Math.abs(Math.log((width * down) / (height * across)));
    const nearest = RATIOS.reduce((best, ratio) => (distance(ratio) < distance(best) ? ratio : best));
    for (const radio of byId("ratios").querySelectorAll("input")) {
      radio.checked = distance(nearest) < EXACT && radio.value === nearest.join(":");
    }
  }
}
