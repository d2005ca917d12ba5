// Elements, made and found.

export const byId = (id) => document.getElementById(id);

/** An element with properties, and children that are nodes or text. `label` names it for people and screen readers. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class") made.className = value;
    else if (name === "label") setLabel(made, value);
    else if (name === "on") Object.entries(value).forEach(([event, listener]) => made.addEventListener(
      event,
      listener,
    ));
    else if (name in made && name !== "list" && !name.startsWith("aria")) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** What screen readers say, and what appears under the pointer. */
export function setLabel(target, text) {
  target.setAttribute("aria-label", text);
  target.title = text;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `page/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon, and with text unless it is square. */
export function button({ name, text, label, kind = "", on, ...others }) {
  const square = text === undefined;
  const made = element("button", {
    type: "button",
    class: `button ${kind} ${square ? "square" : ""}`.trim(),
    label: square ? label : undefined,
    on: { click: on },
    ...others,
  });
  if (name) made.append(icon(name));
  if (!square) made.append(element("span", { textContent: text }));
  return made;
}

/** Replaces the children of `parent`; focus that was inside moves to `fallback` instead of getting lost. */
export function replace(parent, children, fallback = null) {
  const hadFocus = parent.contains(document.activeElement);
  parent.replaceChildren(...children.filter(Boolean));
  if (hadFocus && !parent.contains(document.activeElement)) (fallback ?? parent).focus?.({ preventScroll: true });
}
