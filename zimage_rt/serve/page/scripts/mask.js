// The mask itself: a canvas that is opaque where the image is repainted, and what it was before.

import { blank } from "./pixels.js";

const STEPS = 20; // that can be undone
const COLOUR = "#12b48b"; // on screen only; what is sent is white on black

export class Mask {
  constructor(width, height, existing = null) {
    this.canvas = blank(width, height);
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    if (existing) this.context.drawImage(existing, 0, 0, width, height);
    this.past = [];
    this.future = [];
  }

  /** Remembers the present state, before a change. */
  begin() {
    this.past.push(this.pixels());
    this.past = this.past.slice(-STEPS);
    this.future = [];
  }

  /** A line as wide as the brush, round at both ends. */
  stroke(from, to, width, erases) {
    const { context } = this;
    context.globalCompositeOperation = erases ? "destination-out" : "source-over";
    context.strokeStyle = COLOUR;
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = width;
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x + (from.x === to.x && from.y === to.y ? 0.01 : 0), to.y); // a line of no length is not drawn
    context.stroke();
    context.globalCompositeOperation = "source-over";
  }

  clear() {
    this.begin();
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  invert() {
    this.begin();
    this.context.globalCompositeOperation = "source-out";
    this.context.fillStyle = COLOUR;
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.context.globalCompositeOperation = "source-over";
  }

  undo() {
    this.swap(this.past, this.future);
  }

  redo() {
    this.swap(this.future, this.past);
  }

  swap(from, to) {
    const pixels = from.pop();
    if (!pixels) return;
    to.push(this.pixels());
    this.context.putImageData(pixels, 0, 0);
  }

  pixels() {
    return this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
  }
}
