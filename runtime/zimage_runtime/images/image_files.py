"""Image files with metadata in them: encoding an image with what decides it, and reading that back.

Three things are written: the A1111 ``parameters`` text, which many viewers show; a ``zimage`` JSON document, which
replays the image exactly; and XMP ``DigitalSourceType`` (IPTC), which says that a model made it. PNG holds them as
text chunks; JPEG and WebP hold the text as the EXIF user comment and the document inside the XMP packet.
"""

import io
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ..errors import RequestError
from .formats import ImageFormat, not_an_image
from .metadata import ImageInfo

_PARAMETERS = "parameters"
_REPLAY = "zimage"
_XMP = "XML:com.adobe.xmp"
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_NAMESPACE = "urn:zimage-rt:1"
_EXIF_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769
_UNICODE = b"UNICODE\0"
_MAX_TEXT = 1 << 20
_QUALITY = 95
_MAX_SEGMENT = 65_000  # bytes that fit in one JPEG segment beside its name and length


def encode_image(image: Image.Image, kind: ImageFormat, info: ImageInfo | None, quality: int | None = None) -> bytes:
    """The bytes of an image file, with its metadata unless `info` is None. A JPEG's or WebP's `quality` is 0 to 100.

    Raises `RequestError` for a prompt that is too long for the format's metadata.
    """
    buffer = io.BytesIO()
    quality = _QUALITY if quality is None else quality
    match kind:
        case ImageFormat.PNG:
            image.save(buffer, "PNG", pnginfo=_png_chunks(info) if info else None)
        case ImageFormat.JPEG:
            image.save(buffer, "JPEG", quality=quality, subsampling=0, **_exif_and_xmp(info))
        case ImageFormat.WEBP:
            image.save(buffer, "WEBP", quality=quality, method=4, **_exif_and_xmp(info))
    return buffer.getvalue()


def read_image_info(path: Path) -> ImageInfo:
    """The metadata of an image that zimage-rt wrote.

    Raises `RequestError` for a file that cannot be read, is not an image, or contains no such metadata.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=list(ImageFormat)) as image:
            document = image.info.get(_REPLAY) or _replay_in_xmp(image)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise not_an_image(path, "a PNG, JPEG or WebP image") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged image may make the library raise anything
        raise RequestError(f"{path}: damaged: {error}") from None
    if not isinstance(document, str) or len(document) > _MAX_TEXT:
        raise RequestError(
            f"{path}: contains no zimage metadata; only images that zimage-rt saved with metadata can be replayed"
        )
    return ImageInfo.from_replay(document, str(path))


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
        raise RequestError(
            "the prompt is too long for the metadata of a JPEG or WebP; save a PNG, or use --no-metadata"
        )
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
    except (ElementTree.ParseError, LookupError, ValueError):  # the last two for an encoding that it declares
        return None
    for element in root.iter():
        replay = element.get(f"{{{_NAMESPACE}}}replay")
        if replay:
            return replay
    return None
