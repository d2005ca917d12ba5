// Numbers and times for people.

import { language } from "./i18n.js";

const MIB = 2 ** 20;
const GIB = 2 ** 30;

export function memory(bytes) {
  const [unit, size] = bytes < GIB ? ["MiB", MIB] : ["GiB", GIB];
  const digits = unit === "GiB" ? 1 : 0;
  return `${(bytes / size).toLocaleString(language(), { maximumFractionDigits: digits })} ${unit}`;
}

export const number = (value) => Number(value).toLocaleString(language(), { maximumFractionDigits: 2 });

export const size = ({ width, height }) => (width && height ? `${width} × ${height}` : "");

export function moment(created) {
  const date = new Date(typeof created === "number" ? created * 1000 : created);
  return date.toLocaleString(language(), { dateStyle: "medium", timeStyle: "short" });
}
