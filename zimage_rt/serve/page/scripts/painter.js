// Painting a mask over an image: brush and eraser, by pointer or keyboard, with undo.

import { announce } from "./announce.js";
import { button, byId, element } from "./dom.js";
import { t } from "./i18n.js";
import { Mask } from "./mask.js";
import { drawn } from "./pixels.js";

const LONGER = 1024; // pixels of the mask's longer side: enough for any image, and 20 states of it fit in memory
const LARGEST = LONGER / 2; // a brush

/** Opens the painter. A canvas once it is done, null for no mask at all, undefined where nothing was changed. */
export function paint(image, existing) {
  return new Promise((resolve) => new Painter(image, existing, resolve));
}

class Painter {
  constructor(image, existing, resolve) {
    const scale = LONGER / Math.max(image.width, image.height);
    const [width, height] = [Math.ceil(image.width * scale), Math.ceil(image.height * scale)];
    this.image = drawn(image, image.width, image.height, width, height);
    this.mask = new Mask(width, height, existing);
    this.brush = LONGER / 8; // its width
    this.cursor = { x: width / 2, y: height / 2, shown: false };
    this.erasing = false;
    this.dialog = byId("painter");
    this.dialog.replaceChildren(
      this.head(),
      element("div", { class: "painter-body" }, this.tools(), this.area(), this.foot()),
    );
    this.resolve = resolve;
    this.dialog.onclose = () => {
      this.observer.disconnect();
      this.dialog.replaceChildren();
      resolve(undefined); // nothing more after `finish`
    };
    this.dialog.onkeydown = (event) => this.shortcut(event);
    this.dialog.showModal();
    this.observer = new ResizeObserver(() => this.fit());
    this.observer.observe(this.frame);
    this.canvas.focus();
    this.draw();
  }

  head() {
    const close = button({ name: "close", label: t("close"), kind: "quiet", on: () => this.dialog.close() });
    return element("header", { class: "dialog-head" }, element("h2", { textContent: t("painter") }), close);
  }

  tools() {
    const tool = (erasing, name) => {
      const radio = element("input", {
        type: "radio",
        name: "tool",
        value: name,
        checked: erasing === this.erasing,
        on: { change: () => (this.erasing = erasing) },
      });
      return element("label", { class: "chip" }, radio, t(name));
    };
    const slider = element("input", {
      type: "range",
      id: "brush-size",
      min: 1,
      max: LARGEST,
      value: this.brush,
      "aria-label": t("brush.size"),
      on: { input: (event) => this.setBrush(Number(event.target.value)) },
    });
    const act = (name, what) => button({ name, label: t(name), kind: "quiet", on: () => this.change(what) });
    return element(
      "div",
      { class: "painter-tools" },
      element(
        "div",
        { class: "chips", role: "radiogroup", "aria-label": t("tool") },
        tool(false, "brush"),
        tool(true, "eraser"),
      ),
      element("label", { class: "brush-size" }, element("span", { textContent: t("brush.size") }), slider),
      act("undo", () => this.mask.undo()),
      act("redo", () => this.mask.redo()),
      button({ text: t("mask.clear"), kind: "quiet", on: () => this.change(() => this.mask.clear()) }),
      button({ text: t("mask.invert"), kind: "quiet", on: () => this.change(() => this.mask.invert()) }),
    );
  }

  area() {
    this.canvas = element("canvas", {
      id: "mask-canvas",
      width: this.image.width,
      height: this.image.height,
      tabIndex: 0,
      role: "application",
      "aria-label": t("mask.canvas"),
      "aria-describedby": "painter-help",
      on: {
        pointerdown: (event) => this.press(event),
        pointermove: (event) => this.move(event),
        pointerup: () => this.lift(),
        pointercancel: () => this.lift(),
        pointerleave: () => this.hideCursor(),
        keydown: (event) => this.steer(event),
        blur: () => this.hideCursor(),
        focus: () => this.draw(),
      },
    });
    this.frame = element("div", { class: "painter-area" }, this.canvas);
    return this.frame;
  }

  foot() {
    return element(
      "footer",
      { class: "painter-foot" },
      element(
        "p",
        { class: "small soft", id: "painter-help" },
        `${t("painter.help")} `,
        element("span", { class: "keys", textContent: t("painter.keys") }),
      ),
      button({ text: t("cancel"), on: () => this.dialog.close() }),
      button({ text: t("mask.done"), kind: "primary", id: "mask-done", on: () => this.finish() }),
    );
  }

  finish() {
    this.resolve(this.mask.canvas); // at once: the next key may be the one that generates
    this.dialog.close();
  }

  change(what) {
    what();
    this.draw();
  }

  setBrush(width) {
    this.brush = Math.max(1, Math.min(LARGEST, Math.round(width)));
    byId("brush-size").value = this.brush;
    this.draw();
  }

  setTool(erasing) {
    this.erasing = erasing;
    this.dialog.querySelector(`[name=tool][value=${erasing ? "eraser" : "brush"}]`).checked = true;
    announce(t(erasing ? "eraser" : "brush"));
  }

  /** The canvas as large as its frame allows. */
  fit() {
    const style = getComputedStyle(this.frame);
    const width = this.frame.clientWidth - parseFloat(style.paddingLeft) * 2;
    const height = this.frame.clientHeight - parseFloat(style.paddingTop) * 2;
    const scale = Math.min(width / this.image.width, height / this.image.height);
    this.canvas.style.width = `${this.image.width * scale}px`;
    this.canvas.style.height = `${this.image.height * scale}px`;
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.image.width / box.width;
    return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
  }

  press(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.focus();
    this.canvas.setPointerCapture(event.pointerId);
    this.last = this.at(event);
    this.mask.begin();
    this.stroke(this.last);
  }

  move(event) {
    const points = this.last ? (event.getCoalescedEvents?.() ?? [event]) : [event];
    for (const point of points.length ? points : [event]) this.stroke(this.at(point));
  }

  /** The cursor goes to a place, painting on the way there where the pointer is down. */
  stroke(place) {
    if (this.last) this.mask.stroke(this.last, place, this.brush, this.erasing);
    if (this.last) this.last = place;
    Object.assign(this.cursor, place, { shown: true });
    this.draw();
  }

  lift() {
    this.last = null;
  }

  hideCursor() {
    this.cursor.shown = false;
    this.draw();
  }

  /** Arrows move the cursor, and paint while Shift is held; Space paints one dab. */
  steer(event) {
    const step = Math.max(1, this.brush / 4);
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
    const paints = event.key === " " || event.key === "Enter";
    if ((dx === undefined && !paints) || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const from = { x: this.cursor.x, y: this.cursor.y };
    const place = {
      x: Math.max(0, Math.min(this.image.width, from.x + (dx ?? 0) * step)),
      y: Math.max(0, Math.min(this.image.height, from.y + (dy ?? 0) * step)),
    };
    if (paints || event.shiftKey) {
      this.mask.begin();
      this.mask.stroke(from, place, this.brush, this.erasing);
    }
    Object.assign(this.cursor, place, { shown: true });
    this.draw();
    announce(t(
      "mask.cursor",
      { x: Math.round((100 * place.x) / this.image.width), y: Math.round((100 * place.y) / this.image.height) },
    ));
  }

  shortcut(event) {
    const command = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    if (command && key === "z") this.change(() => (event.shiftKey ? this.mask.redo() : this.mask.undo()));
    else if (command && key === "enter") this.finish();
    else if (command) return;
    else if (key === "b") this.setTool(false);
    else if (key === "e") this.setTool(true);
    else if (key === "[") this.setBrush(this.brush / 1.25);
    else if (key === "]") this.setBrush(this.brush * 1.25 + 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  draw() {
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, this.image.width, this.image.height);
    context.drawImage(this.image, 0, 0);
    context.globalAlpha = 0.7;
    context.drawImage(this.mask.canvas, 0, 0);
    context.globalAlpha = 1;
    if (!this.cursor.shown && document.activeElement !== this.canvas) return;
    const pixel = this.image.width / (this.canvas.getBoundingClientRect().width || this.image.width);
    for (const [colour, width] of [["#000", 3 * pixel], ["#fff", 1.5 * pixel]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.beginPath();
      context.arc(this.cursor.x, this.cursor.y, this.brush / 2, 0, 2 * Math.PI);
      context.stroke();
    }
  }
}
