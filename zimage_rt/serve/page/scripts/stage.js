// The image at work: its previews and progress; then the image itself, and what to do with it.

import { button, byId, element, icon, replace } from "./dom.js";
import { size } from "./format.js";
import { plural, t } from "./i18n.js";
import { isPending } from "./jobs.js";

export const LEAST = 512; // CSS pixels of the longer side: previews and images of small models are shown larger

export class Stage {
  /** `acts` does what the buttons say; `examples` are prompts for an empty stage. */
  constructor(acts, examples) {
    Object.assign(this, { acts, examples });
    this.root = byId("stage");
    this.root.tabIndex = -1;
    this.job = null; // at work, or the last one
    this.shown = 0; // which of its images
    this.waiting = [];
  }

  show(job, waiting) {
    if (job !== this.job) this.shown = 0;
    Object.assign(this, { job, waiting });
    this.render();
  }

  /** A step: only what changes with it. */
  step() {
    const { job } = this;
    if (!this.picture || !this.bar) return this.render();
    if (job.preview && this.picture.src !== job.preview) this.picture.src = job.preview;
    this.picture.hidden = !job.preview;
    this.bar.value = done(job);
    this.words.textContent = progressWords(job);
  }

  render() {
    const { job } = this;
    this.picture = this.bar = this.words = null;
    const easel = element("div", { class: "easel panel" }, ...this.parts(job));
    replace(this.root, [easel, this.queue()], this.root);
  }

  parts(job) {
    if (!job) return [this.empty()];
    if (isPending(job)) return [this.work(job), this.progress(job), this.strip(job)].filter(Boolean);
    const ended = job.state === "failed" ? this.failure(job) : null;
    if (!job.images.length) return [ended ?? this.blank("image", t("stage.cancelled"))];
    return [ended, ...this.result(job)].filter(Boolean);
  }

  empty() {
    const chips = this.examples().map((text) =>
      element(
        "button",
        { type: "button", class: "example", textContent: text, on: { click: () => this.acts.example(text) } },
      ),
    );
    return this.blank(
      "image",
      t("stage.empty"),
      element("p", { class: "small soft", textContent: t("stage.try") }),
      element("div", { class: "chips" }, ...chips),
    );
  }

  blank(name, words, ...more) {
    return element(
      "div",
      { class: "canvas" },
      element("div", { class: "blank" }, icon(name), element("p", { textContent: words }), ...more),
    );
  }

  failure(job) {
    return element(
      "p",
      { class: "message", role: "alert" },
      icon("warning"),
      element("span", { textContent: job.message || t("error.unknown") }),
    );
  }

  work(job) {
    const canvas = element("div", { class: "canvas" });
    this.picture = element("img", { alt: t("stage.preview"), hidden: !job.preview });
    if (job.preview) this.picture.src = job.preview;
    fit(this.picture, job);
    const words = job.state === "waiting" ? waitingWords(job) : t("stage.starting");
    if (job.preview) canvas.append(this.picture);
    else canvas.append(
      element("div", { class: "blank" }, icon("image"), element("p", { textContent: words })),
      this.picture,
    );
    this.picture.addEventListener("load", () => canvas.querySelector(".blank")?.remove(), { once: true });
    return canvas;
  }

  progress(job) {
    this.words = element("p", { class: "numbers", textContent: progressWords(job) });
    this.bar = element("progress", { max: 1, value: done(job), "aria-label": t("stage.progress") });
    const text = t(job.cancelling ? "cancelling" : "cancel");
    const cancel = button({ name: "close", text, id: "cancel", on: () => this.acts.cancel(job) });
    if (!job.cancelling) cancel.append(element("kbd", { "aria-hidden": "true", textContent: "Esc" }));
    cancel.disabled = Boolean(job.cancelling);
    cancel.setAttribute("aria-keyshortcuts", "Escape");
    return element(
      "div",
      { class: "progress" },
      this.words,
      cancel,
      this.bar,
      element("p", { class: "small soft words", textContent: job.prompt }),
    );
  }

  result(job) {
    const image = job.images[Math.min(this.shown, job.images.length - 1)];
    const picture = element("img", { src: image.url, alt: image.settings?.prompt || job.prompt });
    const look = element(
      "button",
      { type: "button", class: "look", "aria-label": t("open"), on: { click: () => this.acts.open(image) } },
      picture,
    );
    fit(look, image);
    const facts = element("p", { class: "facts" });
    facts.append(...factsOf(image).map((text) => element("span", { textContent: text })));
    const caption = element(
      "div",
      { class: "caption" },
      element("p", { class: "words", textContent: image.settings?.prompt ?? job.prompt }),
      facts,
      ...job.notices.map((text) => element("p", { class: "small soft", lang: "en", textContent: text })),
      imageActions(image, this.acts),
    );
    return [element("div", { class: "canvas" }, look), this.strip(job), caption];
  }

  strip(job) {
    if (job.images.length < 2 && !(job.images.length && job.count > 1)) return null;
    const over = job.state !== "running";
    const thumbs = job.images.map((image, index) =>
      element(
        "button",
        {
          type: "button",
          "aria-pressed": over ? String(index === this.shown) : null,
          "aria-label": t("stage.nth", { number: index + 1 }),
          on: { click: () => (over ? this.select(index) : this.acts.open(image)) },
        },
        element("img", { src: image.url, alt: "" }),
      ),
    );
    return element("div", { class: "strip", role: "group", "aria-label": t("stage.images") }, ...thumbs);
  }

  select(index) {
    this.shown = index;
    this.render();
    this.root.querySelectorAll(".strip button")[index]?.focus();
  }

  queue() {
    if (!this.waiting.length) return null;
    const rows = this.waiting.map((job, index) => {
      const label = t("queue.cancel", { prompt: job.prompt });
      const cancel = button({ name: "close", label, kind: "quiet", on: () => this.acts.cancel(job) });
      cancel.disabled = Boolean(job.cancelling);
      const place = element("span", { class: "place numbers", textContent: job.position || index + 1 });
      return element("li", {}, place, element("span", { class: "words", textContent: job.prompt }), cancel);
    });
    const title = element("h2", { id: "queue-title", textContent: plural("queue", this.waiting.length) });
    return element(
      "section",
      { class: "queue panel", "aria-labelledby": "queue-title" },
      title,
      element("ol", {}, ...rows),
    );
  }
}

/** What one can do with an image, here and in the viewer. */
export function imageActions(image, acts) {
  const act = (name, key, what) => button({ name, text: t(key), "data-act": key, on: () => what(image) });
  const known = Boolean(image.settings);
  const download = element(
    "a",
    { class: "button", href: image.url, download: image.name, "data-act": "download" },
    icon("download"),
    t("download"),
  );
  return element(
    "div",
    { class: "actions" },
    known && act("again", "again", acts.again),
    known && act("vary", "vary", acts.vary),
    act("input", "as-input", acts.asInput),
    known && act("settings", "reuse", acts.reuse),
    download,
    act("trash", "delete", acts.remove),
  );
}

export function factsOf(image) {
  const { seed, steps } = image.settings ?? image;
  const facts = [size(image), seed !== undefined && t("fact.seed", { seed }), steps && plural("fact.steps", steps)];
  return facts.filter(Boolean);
}

/** The width at which an image fills its place without leaving it; small ones are enlarged. */
function fit(picture, { width, height }) {
  if (!width || !height) return; // a job of another client that left the size to the model, or a file that says nothing
  const longer = Math.max(width, height, LEAST);
  const most = Math.round((longer * width) / Math.max(width, height));
  picture.style.aspectRatio = `${width} / ${height}`;
  picture.style.width = `min(100%, ${most}px, calc(var(--tall) * ${width / height}))`;
}

const waitingWords = (job) => (job.position > 1 ? t("stage.place", { position: job.position }) : t("stage.waiting"));

function done(job) {
  return job.steps ? Math.min(1, (job.image + job.step / job.steps) / job.count) : 0;
}

function progressWords(job) {
  if (job.state === "waiting") return waitingWords(job);
  const step = job.step ? t("stage.step", { step: job.step, steps: job.steps }) : t("stage.starting");
  return job.count > 1 ? `${t("stage.image", { number: job.image + 1, count: job.count })} · ${step}` : step;
}
