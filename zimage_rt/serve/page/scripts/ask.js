// A short question before something that cannot be undone.

import { button, byId, element } from "./dom.js";
import { t } from "./i18n.js";

/** Whether an image is really to be deleted. */
export function confirmDelete() {
  const dialog = byId("ask");
  const answer = (value, text, kind) => button({ text, kind, type: "submit", value });
  const form = element(
    "form",
    { method: "dialog" },
    element("h2", { id: "ask-title", textContent: t("delete.title") }),
    element("p", { textContent: t("delete.words") }),
    element("div", { class: "actions" }, answer("keep", t("delete.keep")), answer("delete", t("delete"), "danger")),
  );
  dialog.replaceChildren(form);
  dialog.returnValue = "";
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "delete");
    dialog.showModal();
  });
}
