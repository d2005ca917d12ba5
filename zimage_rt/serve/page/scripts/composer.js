// The form: what it holds, what a job says of it, what is wrong with it.

import { byId, element } from "./dom.js";
import { language, t } from "./i18n.js";
import { remember, remembered } from "./store.js";

const LARGEST_SEED = 2n ** 64n - 1n;
const NUMBERS = ["steps", "count"];

export class Composer {
  /** `sizes` and `loras` are parts of the form with values of their own. */
  constructor(state, { sizes, loras, changed }) {
    Object.assign(this, { state, sizes, loras, changed });
    byId("steps").max = state.limits.max_steps;
    byId("count").max = state.limits.max_count;
    this.options("sampler", state.samplers);
    this.options("scheduler", state.schedulers);
    byId("composer").addEventListener("input", (event) => {
      this.clearError(event.target);
      this.edited();
    });
    byId("dice").addEventListener("click", () => {
      byId("seed").value = "";
      this.clearError(byId("seed"));
      this.edited();
    });
    byId("defaults").addEventListener(
      "click",
      () => this.fill({ ...state.defaults, shift: null, negative_prompt: "" }, { size: false }),
    );
  }

  options(id, values) {
    const named = values.map((value) => (typeof value === "string" ? { name: value, label: value } : value));
    byId(id).replaceChildren(...named.map(({ name, label }) => element(
      "option",
      { value: name, textContent: label ?? name },
    )));
  }

  /** As it was left in this browser, or as the bundle's defaults are. */
  restore() {
    const form = remembered().form;
    const same = form?.bundle === this.state.bundle.name; // another model has other settings
    this.fill({ ...this.state.defaults, count: 1, ...(same ? form : { prompt: form?.prompt }) });
    byId("more").open = Boolean(form?.more);
    byId("more").addEventListener("toggle", () => this.save());
  }

  /** Takes settings as jobs and images have them; what they lack stays. Returns the names of LoRA that are missing. */
  fill(settings, { size = true } = {}) {
    const set = (id, value) => value !== undefined && (byId(id).value = value ?? "");
    set("prompt", settings.prompt);
    set("negative", settings.negative_prompt);
    set("steps", settings.steps);
    set("count", settings.count);
    set("cfg", settings.cfg_scale);
    set("shift", settings.shift);
    set("seed", settings.seed);
    set("sampler", settings.sampler);
    set("scheduler", settings.scheduler);
    for (const field of byId("composer").querySelectorAll("[aria-invalid]")) this.clearError(field);
    const missing = settings.loras ? this.loras.set(settings.loras) : [];
    if (size && settings.width && settings.height) this.sizes.set(settings.width, settings.height);
    this.edited();
    return missing;
  }

  edited() {
    this.guidance();
    this.save();
    this.changed();
  }

  /** A negative prompt has no effect without guidance, and the form says so. */
  guidance() {
    byId("negative-idle").hidden = !(byId("negative").value.trim() && Number(byId("cfg").value) <= 1);
  }

  save() {
    const body = this.body();
    remember({ form: { ...body, bundle: this.state.bundle.name, more: byId("more").open } });
  }

  /** What a job says, images aside. Fields that hold no number are left out. */
  body() {
    const [width, height] = this.sizes.value();
    const body = { prompt: byId("prompt").value, width, height, loras: this.loras.value() };
    for (const id of NUMBERS) if (byId(id).value !== "") body[id] = Number(byId(id).value);
    if (byId("cfg").value !== "") body.cfg_scale = Number(byId("cfg").value);
    if (byId("negative").value.trim()) body.negative_prompt = byId("negative").value;
    body.shift = byId("shift").value === "" ? null : Number(byId("shift").value);
    body.seed = byId("seed").value.trim() === "" ? null : byId("seed").value.trim(); // text: it may have 64 bits
    body.sampler = byId("sampler").value;
    body.scheduler = byId("scheduler").value;
    return body;
  }

  /** What is wrong, as fields and messages, in the order of the form. */
  problems() {
    const wrong = [];
    if (!byId("prompt").value.trim()) wrong.push([byId("prompt"), t("error.prompt")]);
    for (const id of ["width", "height"]) wrong.push(...numberProblems(byId(id)));
    const [width, height] = this.sizes.value();
    const most = this.state.limits.max_pixels;
    if (width * height > most) wrong.push([
      byId("width"),
      t("error.pixels", { most: most.toLocaleString(language()) }),
    ]);
    const seed = byId("seed").value.trim();
    if (seed && !(/^\d+$/.test(seed) && BigInt(seed) <= LARGEST_SEED)) wrong.push([byId("seed"), t("error.seed")]);
    for (const id of ["steps", "count", "cfg", "shift"]) wrong.push(...numberProblems(byId(id)));
    return wrong;
  }

  /** Marks what is wrong, moves the focus to the first of it, and returns whether all is well. */
  check() {
    const wrong = this.problems();
    for (const [field, message] of wrong) this.showError(field, message);
    if (wrong.length) {
      byId("more").open ||= byId("more").contains(wrong[0][0]);
      wrong[0][0].focus();
    }
    return wrong.length === 0;
  }

  showError(field, message) {
    this.clearError(field);
    const id = `${field.id}-error`;
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", id);
    (field.closest(".field") ?? field.parentElement).append(element(
      "p",
      { class: "field-error", id, textContent: message },
    ));
  }

  clearError(field) {
    if (!field.hasAttribute("aria-invalid")) return;
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
    byId(`${field.id}-error`)?.remove();
  }
}

function numberProblems(field) {
  const { valueMissing, badInput, rangeUnderflow, rangeOverflow, stepMismatch } = field.validity;
  if (valueMissing || badInput) return [[field, t("error.number")]];
  if (rangeUnderflow || rangeOverflow) return [[field, t("error.range", { min: field.min, max: field.max })]];
  return stepMismatch ? [[field, t("error.multiple", { step: field.step })]] : [];
}
