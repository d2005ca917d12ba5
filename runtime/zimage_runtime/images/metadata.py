"""What an image file says about itself, and reading it back to generate the same image again.

Three things are written: the A1111 ``parameters`` text, which many viewers show; a ``zimage`` JSON document, which
replays the image exactly; and XMP ``DigitalSourceType`` (IPTC), which says that a model made it. PNG holds them as
text chunks; JPEG and WebP hold the text as the EXIF user comment and the document inside the XMP packet.
"""

import io
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from zimage_runtime.checked_json import Fields
from zimage_runtime.errors import ConfigError, RequestError
from zimage_runtime.model.noise import MAX_SEED

from .outputs import ImageFormat

REPLAY_VERSION = 2
"""The newest that we read. Without an image to start from we write 1, which older versions can replay."""

_PARAMETERS = "parameters"
_REPLAY = "zimage"
_XMP = "XML:com.adobe.xmp"
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_NAMESPACE = "urn:zimage-rt:1"
_EXIF_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769
_UNICODE = b"UNICODE\0"
_MAX_TEXT = 1 << 20
_MAX_SEGMENT = 65_000  # bytes that fit in one JPEG segment, names and lengths left out


@dataclass(frozen=True)
class ImageInfo:
    """All that decides an image."""

    prompt: str
    seed: int
    width: int  # pixels
    height: int
    steps: int
    model: str  # the bundle's name, precision included
    fingerprint: str  # of the bundle's files
    executor: str
    strength: float | None = None  # where an image was started from
    image: str | None = None  # the hash of that image's pixels
    mask: str | None = None  # and of the mask's

    def parameters(self) -> str:
        """The A1111 text: the prompt, then a line of settings. Values with , : or a newline are JSON-quoted."""
        settings: dict[str, Any] = {
            "Steps": self.steps,
            "Sampler": "Euler",
            "CFG scale": 1,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.model,
        }
        if self.strength is not None:
            settings["Denoising strength"] = f"{self.strength:g}"
        line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items())
        return f"{self.prompt}\n{line}"

    def replay(self) -> str:
        """The document that `--replay` reads."""
        version = 1 if self.image is None else REPLAY_VERSION
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps({"version": version, **values})  # ASCII, so that XML can carry any prompt

    @classmethod
    def from_replay(cls, text: str | bytes, where: str) -> Self:
        """Raises `RequestError` for a document that is damaged or written by a newer version."""
        try:
            fields = Fields(json.loads(text), where)
            if fields.integer("version") > REPLAY_VERSION:
                raise RequestError(f"{where}: written by a newer version; upgrade zimage-rt")
            prompt = fields.raw("prompt")
            if not isinstance(prompt, str):
                raise fields.fail("prompt", "a string")
            return cls(
                prompt=prompt,
                seed=fields.integer("seed", minimum=0, maximum=MAX_SEED),
                width=fields.integer("width"),
                height=fields.integer("height"),
                steps=fields.integer("steps"),
                model=fields.text("model"),
                fingerprint=fields.text("fingerprint"),
                executor=fields.text("executor"),
                strength=fields.number("strength") if "image" in fields else None,
                image=fields.optional_text("image"),
                mask=fields.optional_text("mask"),
            )
        except ConfigError as error:
            raise RequestError(str(error)) from None
        except (ValueError, RecursionError):
            raise RequestError(f"{where}: its zimage metadata is damaged") from None


def encode_image(image: Image.Image, kind: ImageFormat, info: ImageInfo | None) -> bytes:
    """The bytes of an image file, with its metadata unless `info` is None.

    Raises `RequestError` for a prompt that is too long for the format's metadata.
    """
    buffer = io.BytesIO()
    match kind:
        case ImageFormat.PNG:
            image.save(buffer, "PNG", pnginfo=_png_chunks(info) if info else None)
        case ImageFormat.JPEG:
            image.save(buffer, "JPEG", quality=95, subsampling=0, **_exif_and_xmp(info))
        case ImageFormat.WEBP:
            image.save(buffer, "WEBP", quality=95, method=4, **_exif_and_xmp(info))
    return buffer.getvalue()


def read_image_info(path: Path) -> ImageInfo:
    """What an image that we wrote says about itself. Raises `RequestError` if it says nothing."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=list(ImageFormat)) as image:
            document = image.info.get(_REPLAY) or _replay_in_xmp(image)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise RequestError(f"{path}: not a PNG, JPEG or WebP image") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged image may make the library raise anything
        raise RequestError(f"{path}: damaged: {error}") from None
    if not isinstance(document, str) or len(document) > _MAX_TEXT:
        raise RequestError(
            f"{path}: holds no zimage metadata; only images that zimage-rt wrote with it can be replayed"
        )
    return ImageInfo.from_replay(document, str(path))


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else value


def _png_chunks(info: ImageInfo) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(_PARAMETERS, info.parameters())
    chunks.add_text(_REPLAY, info.replay())
    chunks.add_itxt(_XMP, _xmp(None).decode())
    return chunks


def _exif_and_xmp(info: ImageInfo | None) -> dict[str, Any]:
    if info is None:
        return {}
    comment, xmp = info.parameters().encode("utf-16-be"), _xmp(info.replay())
    if max(len(comment), len(xmp)) > _MAX_SEGMENT:
        raise RequestError("the prompt is too long for a JPEG's or WebP's metadata; write a PNG, or use --no-metadata")
    exif = Image.Exif()
    # "UNICODE" in EXIF means UTF-16 of the file's byte order; readers of A1111's images expect big-endian
    exif.endian = ">"
    exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = _UNICODE + comment
    return {"exif": exif, "xmp": xmp}


def _xmp(replay: str | None) -> bytes:
    ours = f" xmlns:zimage={quoteattr(_NAMESPACE)} zimage:replay={quoteattr(replay)}" if replay else ""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f' Iptc4xmpExt:DigitalSourceType="{_SOURCE_TYPE}"{ours}/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _replay_in_xmp(image: Image.Image) -> str | None:
    packet = image.info.get("xmp")
    if not isinstance(packet, bytes) or len(packet) > _MAX_TEXT or b"<!" in packet:
        return None
    try:
        root = ElementTree.fromstring(packet)
    except (ElementTree.ParseError, LookupError, ValueError):  # the latter two for a declared encoding
        return None
    for element in root.iter():
        replay = element.get(f"{{{_NAMESPACE}}}replay")
        if replay:
            return replay
    return None
