// The memory that the image will take, before anything is pressed.

import { request } from "./api.js";
import { byId, element, icon } from "./dom.js";
import { memory } from "./format.js";
import { onLanguage, t } from "./i18n.js";

const QUIET = 400; // milliseconds without a change, after which the server is asked

/** Asks for the plan of what `body()` says, null where that is nothing, whenever `changed` was called. */
export class Plan {
  constructor(state, body) {
    this.executor = state.executor;
    this.body = body;
    this.answer = null;
    this.asked = 0;
    this.last = "";
    onLanguage(() => this.render());
  }

  changed() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(), QUIET);
  }

  async ask() {
    const body = this.body();
    const words = body && Math.ceil(body.prompt.length / 64); // what they say weighs nothing, and their number little
    const text = body && JSON.stringify({ ...body, prompt: words });
    if (text === this.last) return;
    this.last = text;
    const turn = ++this.asked;
    if (!body) return byId("plan").replaceChildren(); // no memory for what is wrong with the form
    const failed = ({ message }) => ({ fits: false, message, failed: true });
    const answer = await request("POST", "api/plan", body).catch(failed);
    if (turn !== this.asked) return; // a newer question is on its way
    if (answer.failed) this.last = "";
    this.answer = answer;
    this.render();
  }

  render() {
    if (!this.answer || !this.last) return;
    const { fits, message, plan, lines } = this.answer;
    const line = [
      icon(fits ? "memory" : "warning"),
      element("span", { textContent: fits ? this.words(plan) : message }),
    ];
    const parts = [];
    if (fits && lines?.length) {
      const whole = element(
        "pre",
        { tabIndex: 0, lang: "en", "aria-label": t("plan.details"), textContent: lines.join("\n") },
      );
      const details = element("details", {}, element("summary", { title: t("plan.details") }, ...line), whole);
      details.open = byId("plan").querySelector("details")?.open ?? false;
      parts.push(details);
    } else parts.push(element("p", { class: fits ? "line" : "line refused" }, ...line));
    if (fits && message) parts.push(element("p", { lang: "en", textContent: message }));
    const shown = element("div", {}, ...parts);
    if (shown.textContent === byId("plan").textContent) return; // or it would be read out again
    byId("plan").replaceChildren(shown);
  }

  words(plan) {
    if (!plan?.peak) return t("plan.fits");
    return t(this.executor === "cpu" ? "plan.memory" : "plan.vram", { peak: memory(plan.peak) });
  }
}
