// The starting image and its mask over a reload: images are too large for localStorage.

const NAME = "zimage-rt";
const STORE = "kept";

/** One request to the store. Where the browser has none, nothing is kept. */
async function ask(mode, what) {
  const opening = indexedDB.open(NAME, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(STORE);
  const database = await answered(opening);
  try {
    return await answered(what(database.transaction(STORE, mode).objectStore(STORE)));
  } finally {
    database.close();
  }
}

const answered = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const asBlob = (canvas) => new Promise((resolve) => (canvas ? canvas.toBlob(resolve) : resolve(null)));

export async function keepSource({ canvas, mask, name, strength }) {
  const value = { image: await asBlob(canvas), mask: await asBlob(mask), name, strength };
  await ask("readwrite", (store) => store.put(value, "source")).catch(() => {});
}

export async function forgetSource() {
  await ask("readwrite", (store) => store.delete("source")).catch(() => {});
}

/** What was kept: blobs of image and mask, the name in the gallery, the strength; undefined where nothing was. */
export const keptSource = () => ask("readonly", (store) => store.get("source")).catch(() => undefined);
