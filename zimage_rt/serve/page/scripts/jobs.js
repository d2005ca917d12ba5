// Jobs: put in the queue, followed through their events, found again after a reload.
//
// A browser opens six connections to a server at most, so one job is followed at a time: the one that runs or, where
// none does, the first that waits. The others' places in the queue are asked for now and then.

import { events, request } from "./api.js";
import { t } from "./i18n.js";
import { remember, remembered } from "./store.js";

const ASK = 2000; // milliseconds between questions about the queue
const REMEMBERED = 100; // jobs of this browser
const LONGEST_WAIT = 10_000; // milliseconds between attempts to reach the server

export class Jobs {
  /** `changed(job, what)` is called for every change, `made(image, job)` for every image. */
  constructor({ changed, made }) {
    Object.assign(this, { changed, made });
    this.pending = []; // jobs that wait or run, in the order in which they came
    this.followed = null;
  }

  /** Finds the jobs of this browser that wait or run on the server. Those of others are none of its business. */
  async resume() {
    const own = remembered().jobs ?? [];
    for (const found of await request("GET", "api/jobs")) {
      if (!own.includes(found.id) || this.find(found.id)) continue;
      this.pending.push({ ...fresh(found, found), steps: 0 }); // the list has the steps of all images together
    }
    this.next();
  }

  async submit(body, extra = {}) {
    const answer = await request("POST", "api/jobs", body);
    const job = { ...fresh(answer, body), ...extra };
    remember({ jobs: [...(remembered().jobs ?? []), job.id].slice(-REMEMBERED) });
    this.pending.push(job);
    this.changed(job, "queued");
    this.next();
    return job;
  }

  async cancel(job) {
    job.cancelling = true;
    this.changed(job, "cancelling");
    await request("DELETE", `api/jobs/${job.id}`).catch((error) => {
      job.cancelling = false;
      if (error.status !== 404) throw error; // it has just ended
    });
  }

  find(id) {
    return this.pending.find((job) => job.id === id);
  }

  /** The job that everyone looks at: the one that runs, or else the first that waits. */
  get current() {
    return this.pending.find((job) => job.state === "running") ?? this.pending[0] ?? null;
  }

  next() {
    clearTimeout(this.timer);
    const job = this.current;
    if (!job) return;
    if (this.followed !== job) {
      this.stop?.abort();
      this.followed = job;
      this.follow(job);
    }
    if (this.pending.length > 1) this.timer = setTimeout(() => this.askForPlaces(), ASK);
  }

  /** Where the jobs are that are not followed. */
  async askForPlaces() {
    const listed = await request("GET", "api/jobs").catch(() => null);
    const found = new Map((listed ?? []).map((one) => [one.id, one]));
    for (const job of listed ? this.pending.filter((one) => one !== this.followed) : []) {
      const now = found.get(job.id) ?? (await this.over(job));
      if (now === null) continue;
      if (isOver(now.state)) {
        for (const image of now.images) this.image(job, image);
        this.end(job, now.state, now.error);
      } else if (job.state !== now.state || job.position !== now.position) {
        Object.assign(job, { state: now.state, position: now.position });
        this.changed(job, "place");
      }
    }
    this.next();
  }

  /** A job that is on the list no longer; null if the server cannot be reached. */
  over(job) {
    return request("GET", `api/jobs/${job.id}`).catch((error) =>
      error.status === 404 ? { state: "failed", error: t("error.lost"), images: [] } : null,
    );
  }

  /** Reads a job's events until the last one, through lost connections. */
  async follow(job) {
    const stop = (this.stop = new AbortController());
    let wait = 500;
    while (this.find(job.id) && !stop.signal.aborted) {
      try {
        for await (const event of events(`api/jobs/${job.id}/events`, job.last, stop.signal)) {
          wait = 500;
          this.lost = false;
          job.last = event.id || job.last;
          this.take(job, event);
        }
      } catch (error) {
        if (error.name === "AbortError") return;
        if (error.status === 404) return this.end(job, "failed", t("error.lost"));
        this.lost = true;
        this.changed(job, "unreachable");
      }
      if (!this.find(job.id)) return;
      await new Promise((resolve) => setTimeout(resolve, wait));
      wait = Math.min(2 * wait, LONGEST_WAIT);
    }
  }

  take(job, { name: what, data }) {
    if (what === "queued") Object.assign(job, { state: "waiting", position: data.position });
    else if (what === "started") Object.assign(job, { state: "running", position: 0 });
    else if (what === "notice") job.notices.push(data.text);
    else if (what === "step") {
      const { image, step, steps, preview } = data;
      if (image !== job.image) job.preview = null;
      Object.assign(job, { state: "running", image, step, steps, preview: preview ?? job.preview });
    } else if (what === "image") return this.image(job, data);
    else if (isOver(what)) return this.end(job, what, data.message);
    this.changed(job, what);
  }

  image(job, image) {
    if (job.images.some((one) => one.name === image.name)) return;
    job.images.push(image);
    this.made(image, job);
    this.changed(job, "image");
  }

  end(job, state, message) {
    Object.assign(job, { state, message, preview: null });
    this.pending = this.pending.filter((one) => one !== job);
    if (this.followed === job) this.followed = null;
    this.changed(job, state);
    this.next();
  }
}

function fresh({ id, state, position }, body) {
  const { prompt, width, height, count } = body;
  return {
    id,
    prompt,
    width,
    height,
    count: count ?? 1,
    state: state ?? "waiting",
    position: position ?? 0,
    image: 0, // the index of the one at work
    step: 0,
    steps: body.steps ?? 0,
    preview: null,
    images: [],
    notices: [],
    last: "",
  };
}

export const isPending = ({ state }) => state === "waiting" || state === "running";
const isOver = (name) => ["done", "failed", "cancelled"].includes(name);
