"""Bodies of OpenAI's Images API, and our extensions of them.

Source: ``image_generate_params.py``, ``image_edit_params.py`` and ``images_response.py`` of openai-python. What
OpenAI's models do with `quality`, `style`, `moderation`, `input_fidelity` and `user` has no counterpart here: they are
accepted and have no effect.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from zimage_runtime.images.formats import ImageFormat

from ..jobs import Job
from ..refusals import InvalidError
from .named import NamedLora

Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})", re.ASCII)


def _lora(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class CommonBody(BaseModel):
    """The fields of both routes."""

    prompt: str
    model: str | None = Field(None, description="Any name; this server has one model.")
    n: int | None = Field(1, description="Images, with the seeds seed, seed + 1, …")
    size: str | None = Field(None, description="WIDTHxHEIGHT in multiples of 16, or auto.")
    quality: Quality | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(None, description="Of JPEG and WebP.")
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    user: str | None = None
    # extensions
    seed: int | None = None
    negative_prompt: str | None = Field(None, description="Has an effect with a cfg_scale above 1.")
    steps: int | None = None
    cfg_scale: float | None = None
    sampler: str | None = None
    scheduler: str | None = None
    shift: float | None = None
    loras: list[Annotated[NamedLora, BeforeValidator(_lora)]] | None = None

    def pixels(self) -> tuple[int, int] | None:
        """The size; None for `auto`. Raises `InvalidError`."""
        if self.size in (None, "auto"):
            return None
        match = _SIZE.fullmatch(self.size or "")
        if not match:
            raise InvalidError(f"size must be WIDTHxHEIGHT, like 1024x1024, or auto; not {self.size!r}")
        return int(match[1]), int(match[2])

    @property
    def kind(self) -> ImageFormat:
        """The format of the images."""
        return {"jpeg": ImageFormat.JPEG, "webp": ImageFormat.WEBP}.get(self.output_format or "", ImageFormat.PNG)

    @property
    def by_url(self) -> bool:
        """Whether the answer has addresses instead of images: by default for the models that always did so."""
        if self.response_format is None:
            return (self.model or "").startswith("dall-e")
        return self.response_format == "url"

    def check(self) -> None:
        """Raises `InvalidError` for what this server cannot do."""
        if self.background == "transparent":
            raise InvalidError("background: this model makes no transparent images; use opaque or auto")
        if self.stream and self.by_url and self.response_format is not None:
            raise InvalidError("response_format: a stream carries the images themselves; leave url out")


class GenerationBody(CommonBody):
    """`POST /v1/images/generations`."""

    moderation: Literal["low", "auto"] | None = None
    style: Literal["vivid", "natural"] | None = None


class ImageReference(BaseModel):
    """An image in JSON."""

    image_url: str = Field(description="A data URL or base64; addresses are not fetched.")


class EditBody(CommonBody):
    """`POST /v1/images/edits` as JSON. As a form, `image` and `mask` are files."""

    image: str | list[str] | None = Field(None, description="A data URL or base64; one image.")
    images: list[ImageReference] | None = None
    mask: str | ImageReference | None = Field(None, description="Transparent areas are repainted.")
    input_fidelity: Literal["high", "low"] | None = None
    # extensions
    strength: float | None = Field(None, description="How far from the image, above 0 and up to 1.")
    mask_grow: int | None = None

    def sources(self) -> list[str]:
        """The images that were given."""
        given = [self.image] if isinstance(self.image, str) else list(self.image or ())
        return given + [one.image_url for one in self.images or ()]

    def mask_text(self) -> str | None:
        """The mask that was given."""
        return self.mask.image_url if isinstance(self.mask, ImageReference) else self.mask


def edit_schema(*, form: bool) -> dict[str, Any]:
    """The body's schema for the OpenAPI document, without references."""
    schema = EditBody.model_json_schema()
    schema.pop("$defs", None)
    properties = schema["properties"]
    lora = {"type": "object", "properties": {"name": {"type": "string"}, "weight": {"type": "number"}}}
    if form:
        binary = {"type": "string", "format": "binary"}
        properties.pop("images")
        properties |= {"image": binary, "mask": binary, "loras": {"type": "string", "description": "JSON."}}
        schema["required"] = ["prompt", "image"]
    else:
        properties["images"] = {"type": "array", "items": ImageReference.model_json_schema()}
        properties["mask"] = {"type": "string", "description": "Transparent areas are repainted."}
        properties["loras"] = {"type": "array", "items": lora}
    return schema


def described(body: CommonBody, job: Job) -> dict[str, Any]:
    """What answers and events say of the images."""
    size = f"{job.images[0].width}x{job.images[0].height}" if job.images else None
    if size is None:
        asked = job.order.wanted.size
        size = body.size if asked is None else f"{asked[0]}x{asked[1]}"
    return {
        "background": "opaque",
        "output_format": body.output_format or "png",
        "quality": body.quality if body.quality in ("low", "medium", "high") else "high",
        "size": size,
    }


def usage(job: Job, images: int, *, edited: bool) -> dict[str, Any]:
    """Tokens: the prompt's in its template, and those of images of this size in the transformer."""
    source, made = job.image_tokens if edited else 0, job.image_tokens * images
    return {
        "input_tokens": job.text_tokens + source,
        "input_tokens_details": {"text_tokens": job.text_tokens, "image_tokens": source},
        "output_tokens": made,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": made},
        "total_tokens": job.text_tokens + source + made,
    }
