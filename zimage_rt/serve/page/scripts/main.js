// Puts the parts of the page together.

import { announce } from "./announce.js";
import { request } from "./api.js";
import { confirmDelete } from "./ask.js";
import { Composer } from "./composer.js";
import { Control } from "./control.js";
import { byId } from "./dom.js";
import { examples } from "./examples.js";
import { Gallery } from "./gallery.js";
import { onLanguage, plural, startLanguages, t } from "./i18n.js";
import { listenForPastes } from "./image_field.js";
import { isPending, Jobs } from "./jobs.js";
import { listenForKeys } from "./keyboard.js";
import { Loras } from "./loras.js";
import { Plan } from "./plan.js";
import { blank } from "./pixels.js";
import { Sizes } from "./sizes.js";
import { Source } from "./source.js";
import { Stage } from "./stage.js";
import { Viewer } from "./viewer.js";

const RETRY = 3000; // milliseconds until the server is asked again at the start

startLanguages();
const state = await firstAnswer();

const origins = new Map(); // by the name of an image of this visit: the images that it was made from
let ready = false; // once the form is filled

function changed() {
  if (!ready) return;
  source.resized();
  plan.changed();
  explain(null);
}
const sizes = new Sizes(state, () => ready && composer.edited());
const loras = new Loras(state, () => ready && composer.edited());
const source = new Source({ changed, size: () => sizes.value(), fit: (width, height) => sizes.fit(width, height) });
const control = new Control(state, changed);
const composer = new Composer(state, { sizes, loras, changed });
const plan = new Plan(state, planned);
const jobs = new Jobs({ changed: jobChanged, made });
const acts = { again, vary, asInput, reuse, remove, cancel, open: (image) => viewer.open(image), example };
const stage = new Stage(acts, () => examples(state));
const gallery = new Gallery(acts);
const viewer = new Viewer(acts, (image, by) => gallery.beside(image, by));

start();

async function firstAnswer() {
  for (;;) {
    try {
      const answer = await request("GET", "api/state");
      byId("offline").hidden = true;
      return answer;
    } catch (error) {
      offline(error.message);
      await new Promise((resolve) => setTimeout(resolve, RETRY));
    }
  }
}

async function start() {
  describe();
  composer.restore();
  await source.recall().catch(() => {}); // an image that can be read no longer
  ready = true;
  plan.changed();
  stage.show(null, []);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  listenForKeys({ generate: () => generate(), cancel: () => jobs.current && cancel(jobs.current) });
  listenForPastes([source.field, control.field]);
  onLanguage(() => {
    describe();
    stage.render();
  });
  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && refresh());
  await refresh();
  document.documentElement.dataset.ready = "true";
}

/** Gallery and jobs, as the server has them now. */
async function refresh() {
  try {
    await Promise.all([gallery.load(true), jobs.resume()]);
    byId("offline").hidden = true;
  } catch (error) {
    offline(error.message);
  }
  show();
}

function describe() {
  const { bundle, executor } = state;
  byId("bundle").textContent = [bundle.name, executor].filter(Boolean).join(" · ");
  byId("bundle").title = byId("bundle").textContent;
}

function offline(message) {
  byId("offline").textContent = message;
  byId("offline").hidden = false;
}

/** What the server said against a job, beside the button that asked for it. */
function explain(message) {
  byId("refused").textContent = message ?? "";
  byId("refused").hidden = !message;
}

/** What the next job would say, null while it cannot be said. Images are small ones: their content costs no memory. */
function planned() {
  if (composer.problems().some(([field]) => field.id !== "prompt")) return null;
  const body = composer.body();
  if (body.cfg_scale <= 1) delete body.negative_prompt; // without effect; the form says so in the user's language
  Object.assign(body, control.body(16, 16));
  if (source.present) Object.assign(
    body,
    { image: blank(16, 16).toDataURL("image/png"), strength: source.effectiveStrength() },
  );
  return body;
}

/** Generates what the form says; `others` are settings that the form does not have. */
async function generate(others = {}) {
  explain(null);
  if (!composer.check()) return;
  const body = composer.body();
  const from = { source: source.snapshot(), control: control.snapshot() };
  byId("generate").disabled = true;
  try {
    const images = { ...source.body(body.width, body.height), ...control.body(body.width, body.height) };
    await jobs.submit({ ...body, ...images, ...others }, { from });
    byId("offline").hidden = true;
    if (byId("stage").getBoundingClientRect().top > innerHeight * 0.6) byId("stage").scrollIntoView({ block: "start" });
  } catch (error) {
    explain(error.message);
  } finally {
    byId("generate").disabled = false;
  }
}

async function cancel(job) {
  await jobs.cancel(job).catch((error) => explain(error.message));
}

function jobChanged(job, what) {
  if (what === "unreachable") offline(t("error.unreachable"));
  else if (!jobs.lost) byId("offline").hidden = true;
  if (what === "step" && job === stage.job) stage.step();
  else show(what === "done" || what === "failed" || what === "cancelled" ? job : null);
  title();
  say(job, what);
}

/** The stage: what runs or waits; else what just ended, what was there before, or the newest image. */
function show(ended = null) {
  const current = jobs.current;
  const newest = gallery.images[0];
  const last = ended ?? (stage.job && !isPending(stage.job) ? stage.job : null);
  const idle = last ?? (newest ? { state: "done", images: [newest], notices: [], count: 1, prompt: "" } : null);
  stage.show(current ?? idle, jobs.pending.filter((job) => job !== current));
}

function title() {
  const job = jobs.current;
  const progress = job?.step ? `${job.step}/${job.steps} · ` : "";
  document.title = `${progress}zimage-rt`;
}

function say(job, what) {
  if (what === "queued" && job.position > 1) announce(t("stage.place", { position: job.position }));
  else if (what === "started") announce(t("stage.starting"));
  else if (what === "step" && job.step === Math.ceil(job.steps / 2)) announce(t(
    "stage.step",
    { step: job.step, steps: job.steps },
  ));
  else if (what === "done") announce(plural("done", job.images.length));
  else if (what === "cancelled") announce(t("stage.cancelled"));
}

function made(image, job) {
  if (job.from) origins.set(image.name, job.from);
  image.created ??= Date.now() / 1000;
  gallery.add(image);
}

/** The settings of an image, in the form. Says what cannot be had again, and returns whether all can. */
function reuse(image, changes = {}) {
  const { settings } = image;
  const origin = origins.get(image.name);
  const missing = composer.fill({ ...settings, count: 1, ...changes });
  if (origin) {
    source.restore(origin.source);
    control.restore(origin.control);
  } else {
    if (!settings.from_image) source.restore(null);
    if (settings.control) control.adopt(settings.control);
    else control.restore(null);
  }
  const lacks = [
    missing.length && t("lora.missing", { names: missing.join(", ") }),
    settings.from_image && !source.present && t("source.missing"),
    settings.control && !control.present && t("control.missing"),
  ].filter(Boolean);
  explain(lacks.join(" ") || null);
  if (!byId("viewer").open) byId("prompt").focus();
  return lacks.length === 0;
}

/** The same image, to the bit: also what was mixed in by another client, for which the form has no fields. */
async function again(image) {
  const { variation_seed, variation_strength } = image.settings;
  if (reuse(image)) await generate(variation_strength ? { variation_seed, variation_strength } : {});
}

async function vary(image) {
  if (reuse(image, { seed: null })) await generate();
}

async function asInput(image) {
  try {
    const response = await fetch(image.url);
    if (!response.ok) throw new Error(t("error.gone"));
    await source.take(await response.blob(), image.name);
    sizes.set(image.width, image.height);
    byId("source").scrollIntoView({ block: "nearest" });
    byId("paint-mask")?.focus({ preventScroll: true });
  } catch (error) {
    explain(error.message);
  }
}

async function remove(image) {
  if (!(await confirmDelete())) return;
  try {
    await request("DELETE", `api/images/${image.name}`);
  } catch (error) {
    if (error.status !== 404) return explain(error.message);
  }
  const next = gallery.beside(image, 1) ?? gallery.beside(image, -1);
  gallery.remove(image);
  if (byId("viewer").open) {
    if (next) viewer.render(next);
    else viewer.close();
  }
  const { job } = stage;
  if (job?.images?.some((one) => one.name === image.name)) {
    job.images = job.images.filter((one) => one.name !== image.name);
    if (!job.images.length) stage.job = null;
  }
  show();
  announce(t("delete.done"));
}

function example(text) {
  composer.fill({ prompt: text });
  byId("prompt").focus();
}
