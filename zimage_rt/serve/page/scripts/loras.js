// LoRA: which, and how much of each.

import { button, byId, element, replace } from "./dom.js";
import { onLanguage, t } from "./i18n.js";

export class Loras {
  constructor(state, changed) {
    this.known = state.loras.map((lora) => lora.name);
    this.most = 8; // the server's own limit
    this.chosen = []; // [{name, weight}]
    this.changed = changed;
    byId("loras").hidden = this.known.length === 0;
    onLanguage(() => this.render());
    this.render();
  }

  /** Those that the server does not have are left out, and returned by name. */
  set(chosen) {
    const found = chosen.map(({ name, weight }) => ({ name: this.match(name), weight, asked: name }));
    this.chosen = found.filter((one) => one.name).map(({ name, weight }) => ({ name, weight }));
    this.render();
    return found.filter((one) => !one.name).map((one) => one.asked);
  }

  /** The server's name of a LoRA. Images record the file's alone, without the folder that it is in. */
  match(name) {
    if (this.known.includes(name)) return name;
    const same = this.known.filter((one) => one.split("/").at(-1) === name);
    return same.length === 1 ? same[0] : undefined;
  }

  value() {
    return this.chosen.map(({ name, weight }) => ({ name, weight }));
  }

  add(name) {
    this.chosen.push({ name, weight: 1 });
    this.update();
  }

  update() {
    this.render();
    this.changed();
  }

  render() {
    const free = this.known.filter((name) => !this.chosen.some((one) => one.name === name));
    const first = element("option", { value: "", textContent: t("lora.add") });
    const disabled = free.length === 0 || this.chosen.length >= this.most;
    const picker = element(
      "select",
      { class: "input", id: "lora-add", disabled, on: { change: (event) => this.add(event.target.value) } },
      first,
      ...free.map((name) => element("option", { value: name, textContent: name })),
    );
    const label = element("label", { class: "label", htmlFor: "lora-add", textContent: t("lora") });
    const rows = element(
      "ul",
      { class: "lora-list", hidden: this.chosen.length === 0 },
      ...this.chosen.map((one) => this.row(one)),
    );
    replace(byId("loras"), [element("div", { class: "field" }, label, rows, picker)], picker);
  }

  row(one) {
    const weight = element("input", {
      class: "input numbers",
      type: "number",
      inputMode: "decimal",
      min: -4,
      max: 4,
      step: 0.05,
      value: one.weight,
      "aria-label": t("lora.weight", { name: one.name }),
      on: {
        input: (event) => {
          if (event.target.value !== "") one.weight = Number(event.target.value);
          this.changed();
        },
      },
    });
    const remove = button({
      name: "close",
      label: t("lora.remove", { name: one.name }),
      kind: "quiet",
      on: () => {
        this.chosen = this.chosen.filter((other) => other !== one);
        this.update();
      },
    });
    return element(
      "li",
      { class: "lora" },
      element("span", { class: "name", title: one.name, textContent: one.name }),
      weight,
      remove,
    );
  }
}
