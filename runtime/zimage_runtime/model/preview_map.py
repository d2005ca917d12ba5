"""A linear map from latents to colours: what a preview is made with, at a thousandth of the decoder's cost."""

from dataclasses import dataclass

COLOURS = 3


@dataclass(frozen=True)
class PreviewMap:
    """Fitted by the exporter to what the bundle's own autoencoder does."""

    factors: tuple[tuple[float, ...], ...]  # [latent channels][red, green, blue], for colours from -1 to 1
    bias: tuple[float, ...]  # [red, green, blue]
    residual: float  # root mean square of what the fit leaves, of 255

    def __post_init__(self) -> None:
        if any(len(row) != COLOURS for row in (*self.factors, self.bias)):
            raise ValueError(f"factors and bias must be lists of {COLOURS} numbers")
