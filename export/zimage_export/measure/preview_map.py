"""The map that previews are made with: least squares between latents and colours, through the bundle's autoencoder.

The images are drawn here: fields of one colour, gradients, shapes and noise. Each is encoded and decoded, and the
decoded image is averaged over the square of pixels that a place of the latents stands for.
"""

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.model.preview_map import PreviewMap
from zimage_runtime.model.programs import Program

_SIDE = 8  # places of the latents
_IMAGES = 8
_DIGITS = 6
_RIDGE = 1e-4  # of the latents' variance: channels that never move get no factor


def fit_preview_map(bundle: Bundle) -> PreviewMap:
    """Fits the map of a bundle, with its programs for the CPU."""
    vae, programs = bundle.manifest.config.vae, HostPrograms(bundle, low_memory=True)
    places: list[FloatArray] = []
    colours: list[FloatArray] = []
    for image in drawn_images(_SIDE * vae.scale):
        mean = programs.run(Program.ENCODER, {"image": image[None]})["mean"]
        decoded = programs.run(Program.DECODER, {"latents": mean})["image"][0]
        latents = (mean[0] - np.float32(vae.shift_factor)) * np.float32(vae.scaling_factor)
        places.append(latents.reshape(len(latents), -1))
        squares = np.clip(decoded, -1, 1).reshape(3, _SIDE, vae.scale, _SIDE, vae.scale)
        colours.append(squares.mean(axis=(2, 4)).reshape(3, -1))
    programs.release()
    return _fitted(np.concatenate(places, axis=1).T.astype(np.float64), np.concatenate(colours, axis=1).T)


def _fitted(places: NDArray[np.float64], colours: NDArray[np.floating]) -> PreviewMap:
    """Least squares: places [count, channels] to colours [count, 3], both centred for the bias."""
    middle, colour = places.mean(axis=0), colours.mean(axis=0, dtype=np.float64)
    moved = places - middle
    products = moved.T @ moved
    ridge = _RIDGE * np.trace(products) / len(products)
    factors = np.linalg.solve(products + ridge * np.eye(len(products)), moved.T @ (colours - colour))
    bias = colour - middle @ factors
    left = places @ factors + bias - colours
    residual = float(np.sqrt(np.mean(left**2))) * 255 / 2  # colours span 2
    return PreviewMap(
        tuple(tuple(round(float(value), _DIGITS) for value in row) for row in factors),
        tuple(round(float(value), _DIGITS) for value in bias),
        round(residual, 3),
    )


def drawn_images(side: int) -> list[FloatArray]:
    """The images, [3, side, side] each, from -1 to 1."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / np.float32(side)
    kinds = (_field, _gradient, _shapes, _noise)
    return [kinds[index % len(kinds)](rng, x, y).astype(np.float32) for index in range(_IMAGES)]


def _colour(rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.uniform(-1, 1, (3, 1, 1))


def _field(rng: np.random.Generator, x: FloatArray, y: FloatArray) -> NDArray[np.floating]:
    return np.broadcast_to(_colour(rng), (3, *x.shape))


def _gradient(rng: np.random.Generator, x: FloatArray, y: FloatArray) -> NDArray[np.floating]:
    angle = rng.uniform(0, 2 * np.pi)
    share = np.clip(0.5 + (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)), 0, 1)
    image: NDArray[np.floating] = _colour(rng) * share + _colour(rng) * (1 - share)
    return image


def _shapes(rng: np.random.Generator, x: FloatArray, y: FloatArray) -> NDArray[np.floating]:
    """Discs and rectangles on a field."""
    image = _field(rng, x, y)
    for number in range(6):
        across, down, size = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.1, 0.35)
        disc = (x - across) ** 2 + (y - down) ** 2 < size**2
        rectangle = (abs(x - across) < size) & (abs(y - down) < size / 2)
        image = np.where(disc if number % 2 else rectangle, _colour(rng), image)
    return image


def _noise(rng: np.random.Generator, x: FloatArray, y: FloatArray) -> NDArray[np.floating]:
    """Soft blots of all sizes, and grain."""
    image = _field(rng, x, y)
    for cells in (2, 4, 8, 16):
        blots = rng.normal(0, 0.4, (3, cells, cells))
        index = (np.arange(x.shape[0]) * cells) // x.shape[0]
        image = image + blots[:, index][:, :, index] * np.sqrt(2 / cells)
    return np.clip(image + rng.normal(0, 0.05, image.shape), -1, 1)
