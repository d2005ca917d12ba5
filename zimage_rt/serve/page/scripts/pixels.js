// Images as canvases: read upright, without transparency, cropped to the shape that is generated.

const MOST_PIXELS = 16_000_000; // kept in memory; a photograph with more is made smaller when it is read

/** A canvas of an image file. Rejects for what the browser cannot read. */
export async function readImage(blob) {
  const bitmap = await createImageBitmap(blob); // upright, whatever its EXIF orientation
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
  const canvas = blank(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // the model knows no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas;
}

/** A canvas of a mask that was kept, transparent where it is. */
export async function readMask(blob) {
  const bitmap = await createImageBitmap(blob);
  const canvas = blank(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas;
}

export function blank(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** The largest middle part of the shape width : height, as [x, y, width, height] in whole pixels. */
export function middle(canvas, width, height) {
  const scale = Math.min(canvas.width / width, canvas.height / height);
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  return [Math.floor((canvas.width - w) / 2), Math.floor((canvas.height - h) / 2), w, h];
}

/** How much of an image is in its middle part, as a share. */
export function keptShare(canvas, width, height) {
  const [, , w, h] = middle(canvas, width, height);
  return (w * h) / (canvas.width * canvas.height);
}

/** Whether the middle part is all of it. */
export function isWhole(canvas, width, height) {
  const [, , w, h] = middle(canvas, width, height);
  return w === canvas.width && h === canvas.height;
}

/** The middle part as a canvas, never larger than width x height: the server makes it larger itself. */
export function cropped(canvas, width, height) {
  const [, , w, h] = middle(canvas, width, height);
  return drawn(canvas, width, height, Math.min(w, width), Math.min(h, height));
}

/** The middle part of the shape width : height, at a size. */
export function drawn(canvas, width, height, toWidth, toHeight) {
  const made = blank(toWidth, toHeight);
  const context = made.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(canvas, ...middle(canvas, width, height), 0, 0, toWidth, toHeight);
  return made;
}

/** A mask, transparent where nothing is painted, as white on black. */
export function whiteOnBlack(mask) {
  const made = blank(mask.width, mask.height);
  const context = made.getContext("2d");
  context.drawImage(mask, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, made.width, made.height);
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#000";
  context.fillRect(0, 0, made.width, made.height);
  return made;
}

export function isEmpty(mask) {
  const { data } = mask.getContext("2d").getImageData(0, 0, mask.width, mask.height);
  for (let at = 3; at < data.length; at += 4) if (data[at] > 127) return false;
  return true;
}
