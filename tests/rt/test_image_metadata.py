"""Image metadata, read back with Pillow, ElementTree and another project's A1111 parser."""

import json
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import numpy as np
import pytest
from cli_tools import Capture, assert_one_line_error, call_rt, unchanged
from facts import assert_facts, raises_with
from PIL import Image, PngImagePlugin
from sd_parsers import ParserManager
from sd_parsers.data import Generators

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.checked_json import Fields
from zimage_runtime.errors import RequestError
from zimage_runtime.images.formats import ImageFormat
from zimage_runtime.images.image_files import encode_image, read_image_info
from zimage_runtime.images.metadata import REPLAY_VERSION, ImageInfo, LoraInfo, Recorded, differences
from zimage_runtime.model.sampling_names import SamplerName, SchedulerName

FORMATS = {".png": ImageFormat.PNG, ".jpg": ImageFormat.JPEG, ".webp": ImageFormat.WEBP}
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
SOURCE_TYPE_NAME = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
USER_COMMENT, EXIF_IFD = 0x9286, 0x8769

PROMPTS = {
    "plain": "a red fox in the snow",
    "empty": "",
    "latin-1": "café “au lait” – déjà vu",
    "chinese": "雪地里的一只红狐狸，水墨画",
    "emoji": "a 🦊 under a 🏳️‍🌈",
    "newlines": "first line\nsecond line\n\n\tlast",
    "returns": "one\r\ntwo\rthree",
    "quotes": "a sign that says \"open\", 'closed' & <b>\\n</b>]]>",
    "control": "bell \a escape \x1b[31m delete \x7f next \x85 separators \u2028 \ufeff",
    "like settings": "Steps: 3, Sampler: DDIM, Seed: 5\nNegative prompt: none",
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def info() -> ImageInfo:
    return ImageInfo(
        prompt="a fox",
        seed=7,
        width=48,
        height=32,
        steps=8,
        model="Z-Image-Turbo-fp32",
        fingerprint="0" * 64,
        executor="cpu",
    )


def generate(capsys: Capture, bundle: Path, prompt: str, output: str, *options: object) -> Path:
    size = ("--size", "48x32", "--steps", 2, "--seed", 7)
    outcome = call_rt(capsys, "run", "-m", bundle, *size, "-o", output, "--quiet", *options, "--", prompt)
    assert outcome.status == 0, outcome.err
    for line in outcome.err.splitlines():
        assert_facts(line, "prompt", "tokens")  # of prompts that are cut
    return Path(output)


def parameters(path: Path) -> str:
    """The A1111 text of an image: a PNG chunk, or the EXIF user comment in big-endian UTF-16."""
    with Image.open(path) as image:
        if image.format == "PNG":
            return str(image.info["parameters"])
        assert image.info["exif"].removeprefix(b"Exif\0\0")[:2] == b"MM"  # big-endian, as the comment is
        comment = image.getexif().get_ifd(EXIF_IFD)[USER_COMMENT]
    assert comment.startswith(b"UNICODE\0")
    return str(comment[8:].decode("utf-16-be"))


def xmp(path: Path) -> ElementTree.Element:
    with Image.open(path) as image:
        packet = image.info["xmp"]
    return ElementTree.fromstring(packet)


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_prompts_come_back_as_they_were(info: ImageInfo, suffix: str, prompt: str) -> None:
    info = replace(info, prompt=prompt)
    path = Path(f"image{suffix}")
    path.write_bytes(encode_image(Image.new("RGB", (48, 32)), FORMATS[suffix], info))
    assert read_image_info(path) == info
    assert parameters(path) == (
        f"{prompt}\nSteps: 8, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 48x32, Model: Z-Image-Turbo-fp32"
    )


@pytest.mark.parametrize("suffix", FORMATS)
def test_command_describes_what_it_generated(bundle: Path, capsys: Capture, suffix: str) -> None:
    manifest = Bundle.open(bundle).manifest
    path = generate(capsys, bundle, "a fox,\na hen", f"image{suffix}")
    expected = ImageInfo("a fox,\na hen", 7, 48, 32, 2, manifest.name, manifest.fingerprint, "cpu")
    library = f"onnxruntime {version('onnxruntime')}"
    assert read_image_info(path) == replace(expected, program="cpu", library=library)
    assert parameters(path).splitlines()[:2] == ["a fox,", "a hen"]


def test_each_of_several_images_bears_its_own_seed(bundle: Path, capsys: Capture) -> None:
    generate(capsys, bundle, "a fox", "image.png", "-n", 2)
    assert [read_image_info(Path(f"image-{seed}.png")).seed for seed in (7, 8)] == [7, 8]


@pytest.mark.parametrize("suffix", FORMATS)
def test_source_type_says_that_a_model_made_it(bundle: Path, capsys: Capture, suffix: str) -> None:
    path = generate(capsys, bundle, "a fox", f"image{suffix}")
    assert [e.get(SOURCE_TYPE_NAME) for e in xmp(path).iter() if e.get(SOURCE_TYPE_NAME)] == [SOURCE_TYPE]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("prompt", ["a red fox, 35mm: grain", "two\nlines", "雪地里的红狐狸"])
def test_another_projects_parser_reads_it(bundle: Path, capsys: Capture, suffix: str, prompt: str) -> None:
    found = ParserManager().parse(generate(capsys, bundle, prompt, f"image{suffix}"))
    assert found is not None
    assert found.generator == Generators.AUTOMATIC1111
    (sampler,) = found.samplers
    assert sampler.name == "Euler"
    assert sampler.parameters == {"cfg_scale": "1", "seed": "7", "steps": "2"}
    assert sampler.model is not None
    assert sampler.model.name == Bundle.open(bundle).manifest.name
    assert found.full_prompt == prompt
    assert found.full_negative_prompt == ""
    assert found.metadata == {"Size": "48x32"}


@pytest.mark.parametrize(
    ("model", "written"),
    [
        ("Z-Image-Turbo-fp32", "Z-Image-Turbo-fp32"),
        ("tuned, again", '"tuned, again"'),
        ("v1:2", '"v1:2"'),
        ("two\nlines", '"two\\nlines"'),
        ('say "fox", fox', '"say \\"fox\\", fox"'),
        ("红狐,1", '"红狐,1"'),
    ],
)
def test_values_are_quoted_where_the_grammar_needs_it(info: ImageInfo, model: str, written: str) -> None:
    text = replace(info, model=model).parameters()
    assert text.count("\n") == 1
    assert text.endswith(f", Model: {written}")
    if written != model:
        assert json.loads(written) == model


# as the first releases wrote them
VERSION_1 = (
    '{"version": 1, "prompt": "a fox", "seed": 7, "width": 48, "height": 32, "steps": 8, '
    '"model": "Z-Image-Turbo-fp32", "fingerprint": "%s", "executor": "cpu"}'
) % ("0" * 64)
VERSION_2 = (
    VERSION_1.replace('"version": 1', '"version": 2').removesuffix("}")
    + ', "strength": 0.6, "image": "abc", "mask": "def"}'
)


def test_documents_of_older_versions_are_read(info: ImageInfo) -> None:
    assert ImageInfo.from_replay(VERSION_1, "cat.png") == info
    from_image = replace(info, strength=0.6, image="abc", mask="def")
    assert ImageInfo.from_replay(VERSION_2, "cat.png") == from_image
    # and written as they were, so that those releases read ours
    assert json.loads(info.replay()) == json.loads(VERSION_1)
    assert json.loads(from_image.replay()) == json.loads(VERSION_2)


def test_how_an_image_was_computed_needs_no_newer_reader(info: ImageInfo) -> None:
    computed = replace(info, program="cpu", activation_bits=7, library="onnxruntime 1.29.0")
    document = json.loads(computed.replay())
    added = {"program": "cpu", "activation_bits": 7, "library": "onnxruntime 1.29.0"}
    assert document == {**json.loads(VERSION_1), **added}
    assert ImageInfo.from_replay(json.dumps(document), "cat.png") == computed


def test_what_changes_the_image_needs_a_reader_that_knows_it(info: ImageInfo) -> None:
    """A reader of version 2 would ignore how far the mask was grown, and generate another image."""
    grown = replace(info, strength=1.0, image="abc", mask="def", mask_grow=4)
    assert json.loads(grown.replay())["version"] == 3
    assert ImageInfo.from_replay(grown.replay(), "cat.png") == grown
    assert "mask_grow" not in replace(grown, mask_grow=0).replay()


def test_unknown_keys_are_ignored(info: ImageInfo) -> None:
    document = {**json.loads(VERSION_1), "version": REPLAY_VERSION, "made in": {"a later": ["version"]}}
    assert ImageInfo.from_replay(json.dumps(document), "cat.png") == info


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mask_grow", -1),
        ("mask_grow", 1.5),
        ("program", ""),
        ("program", 7),
        ("activation_bits", "8"),
        ("library", ["onnxruntime"]),
        ("strength", "1"),
        ("image", 1),
        ("cfg_scale", 0),
        ("negative", 3),
        ("cfg_normalization", 1),
        ("cfg_truncation", "all"),
        ("sampler", "ddim"),
        ("scheduler", "karras"),
        ("shift", 0),
        ("variation_seed", -1),
        ("loras", "fox"),
        ("loras", [{"name": "fox", "weight": "1", "hash": "c"}]),
        ("loras", [["fox", 1, "c"]]),
    ],
)
def test_optional_values_are_checked(key: str, value: object) -> None:
    with raises_with(RequestError, "cat.png:", key):
        ImageInfo.from_replay(json.dumps({**json.loads(VERSION_1), key: value}), "cat.png")


def test_a_setting_that_is_added_is_a_field_and_nothing_else(info: ImageInfo) -> None:
    @dataclass(frozen=True)
    class Later(ImageInfo):
        sharpness: Annotated[float | None, Recorded(Fields.number, since=REPLAY_VERSION + 1)] = None

    guided = Later(**vars(info), sharpness=4.5)
    assert Later.from_replay(guided.replay(), "cat.png") == guided
    assert Later.from_replay(VERSION_1, "cat.png") == Later(**vars(info))
    assert json.loads(Later(**vars(info)).replay()) == json.loads(VERSION_1)
    with raises_with(RequestError, "cat.png:", "upgrade zimage-rt"):
        ImageInfo.from_replay(guided.replay(), "cat.png")


@pytest.mark.parametrize("suffix", FORMATS)
def test_all_that_is_recorded_comes_back_from_a_file(info: ImageInfo, suffix: str) -> None:
    full = replace(
        info,
        strength=0.25,
        image="a" * 64,
        mask="b" * 64,
        mask_grow=4,
        cfg_scale=4.5,
        negative="blurry: a\nhen",
        cfg_normalization=True,
        cfg_truncation=0.5,
        sampler=SamplerName.DPMPP_2M,
        scheduler=SchedulerName.SGM_UNIFORM,
        shift=4.5,
        variation_seed=9,
        variation_strength=0.25,
        loras=(LoraInfo('a fox, "red"', -0.3, "c" * 64), LoraInfo("b", 1.0, "d" * 64)),
        control="e" * 64,
        controlnet="union, 2.1-int8",
        controlnet_hash="f" * 64,
        control_type="canny",
        control_scale=0.65,
        control_start=0.125,
        control_end=0.75,
        program="cuda-weight-only",
        activation_bits=8,
        library='onnxruntime 1.29.0, with a "name"',
    )
    assert all(getattr(full, each.name) != each.default for each in fields(full))  # a new field belongs here, too
    path = Path(f"image{suffix}")
    path.write_bytes(encode_image(Image.new("RGB", (48, 32)), FORMATS[suffix], full))
    assert read_image_info(path) == full


def test_what_differs_in_how_an_image_is_computed_is_said(info: ImageInfo) -> None:
    recorded = replace(info, program="cpu", activation_bits=8, library="onnxruntime 1.29.0")
    assert differences(recorded, recorded) == []
    for change, facts in (
        ({"activation_bits": 7}, ("8-bit", "7-bit")),
        ({"library": "onnxruntime 1.30.0"}, ("onnxruntime 1.29.0", "onnxruntime 1.30.0")),
        ({"program": "cpu-other"}, ("cpu,", "cpu-other")),
        # whose program is another one by itself
        (
            {"executor": "tensorrt", "program": "tensorrt", "activation_bits": None},
            ("cpu", "tensorrt"),
        ),
    ):
        (line,) = differences(recorded, replace(recorded, **change))
        assert_facts(line, *facts)
    assert len(differences(recorded, replace(recorded, executor="cuda", activation_bits=7, library="other 2"))) == 3


def test_what_an_older_image_does_not_record_is_not_compared(info: ImageInfo) -> None:
    now = replace(info, program="cpu", activation_bits=8, library="onnxruntime 1.29.0")
    assert differences(info, now) == []
    assert len(differences(info, replace(now, executor="cuda"))) == 1


@pytest.mark.parametrize("suffix", FORMATS)
def test_no_metadata_leaves_nothing_but_the_image(bundle: Path, capsys: Capture, suffix: str) -> None:
    bare = generate(capsys, bundle, "a fox", f"bare{suffix}", "--no-metadata")
    described = generate(capsys, bundle, "a fox", f"described{suffix}")
    with Image.open(bare) as image:
        image.load()
        assert not set(image.info) & {"parameters", "zimage", "XML:com.adobe.xmp", "xmp", "exif", "comment"}
        assert not getattr(image, "text", {})
        assert not image.getexif()
    assert b"a fox" not in bare.read_bytes()
    assert np.array_equal(pixels(bare), pixels(described))


@pytest.mark.parametrize("suffix", FORMATS)
def test_replay_generates_the_same_image(bundle: Path, capsys: Capture, suffix: str) -> None:
    path = generate(capsys, bundle, "a 🦊,\n“red”", f"image{suffix}")
    outcome = call_rt(capsys, "run", "-m", bundle, "--replay", path, "-o", f"again{suffix}", "--quiet")
    assert (outcome.lines, outcome.err) == ([f"again{suffix}"], "")
    assert Path(f"again{suffix}").read_bytes() == path.read_bytes()


def test_replay_of_a_jpeg_as_png_is_what_was_generated(bundle: Path, capsys: Capture) -> None:
    png = generate(capsys, bundle, "a fox", "original.png")
    jpeg = generate(capsys, bundle, "a fox", "image.jpg")
    outcome = call_rt(capsys, "run", "-m", bundle, "--replay", jpeg, "--quiet")
    assert outcome.lines == ["zimage-7.png"]
    assert Path("zimage-7.png").read_bytes() == png.read_bytes()


def test_replay_of_one_of_several(bundle: Path, capsys: Capture) -> None:
    generate(capsys, bundle, "a fox", "cat.png", "-n", 2)
    outcome = call_rt(capsys, "run", "-m", bundle, "--replay", "cat-8.png", "-o", "again.png", "--quiet")
    assert outcome.status == 0
    assert Path("again.png").read_bytes() == Path("cat-8.png").read_bytes()


def refuse_replay(capsys: Capture, bundle: Path, path: Path, *named: object) -> None:
    with unchanged(Path()):
        outcome = call_rt(capsys, "run", "-m", bundle, "--replay", path, "--quiet")
    assert_one_line_error(outcome, path, *named)


def test_replay_of_a_missing_file(bundle: Path, capsys: Capture) -> None:
    refuse_replay(capsys, bundle, Path("cat.png"), "no such file")


def test_replay_of_a_folder(bundle: Path, capsys: Capture) -> None:
    refuse_replay(capsys, bundle, bundle)


@pytest.mark.parametrize("data", [b"", b"a fox", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP"])
def test_replay_of_what_is_no_image(bundle: Path, capsys: Capture, data: bytes) -> None:
    Path("cat.png").write_bytes(data)
    refuse_replay(capsys, bundle, Path("cat.png"))


@pytest.mark.parametrize("suffix", [*FORMATS, ".gif"])
def test_replay_of_an_image_without_metadata(bundle: Path, capsys: Capture, suffix: str) -> None:
    path = Path(f"holiday{suffix}")
    Image.new("RGB", (48, 32)).save(path)
    refuse_replay(capsys, bundle, path)


def write_png(path: Path, document: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("zimage", document)
    Image.new("RGB", (16, 16)).save(path, pnginfo=chunks)


@pytest.mark.parametrize(
    "change",
    [
        {"version": REPLAY_VERSION + 1},
        {"version": "1"},
        {"prompt": None},
        {"prompt": ["a fox"]},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 7.5},
        {"seed": True},
        {"width": "48"},
        {"width": 0},
        {"width": 47},
        {"height": 2**62},
        {"steps": 0},
        {"steps": 1000},
        {"model": ""},
        {"fingerprint": 5},
        {"executor": None},
    ],
)
def test_replay_of_a_document_with_a_wrong_value(bundle: Path, capsys: Capture, change: dict[str, object]) -> None:
    info = read_image_info(generate(capsys, bundle, "a fox", "image.png"))
    write_png(Path("changed.png"), json.dumps({**json.loads(info.replay()), **change}))
    with unchanged(Path()):
        outcome = call_rt(capsys, "run", "-m", bundle, "--replay", "changed.png", "--quiet")
    assert_one_line_error(outcome, next(iter(change)))


@pytest.mark.parametrize("document", ["{", "null", "[]", "7", "{}", "[" * 100_000, '{"version": 1' + "0" * 5000 + "}"])
def test_replay_of_a_damaged_document(bundle: Path, capsys: Capture, document: str) -> None:
    write_png(Path("damaged.png"), document)
    refuse_replay(capsys, bundle, Path("damaged.png"))


def test_replay_of_a_prompt_that_is_not_unicode(bundle: Path, capsys: Capture) -> None:
    info = read_image_info(generate(capsys, bundle, "a fox", "image.png"))
    write_png(Path("changed.png"), json.dumps({**json.loads(info.replay()), "prompt": "\ud83e"}))
    outcome = call_rt(capsys, "run", "-m", bundle, "--replay", "changed.png", "--quiet")
    assert_one_line_error(outcome, "prompt", "UTF-8")


@pytest.mark.parametrize("encoding", ["nonsense", "utf-32", "base64", "utf-8"])
def test_damaged_xmp_holds_nothing(encoding: str) -> None:
    packet = f'<?xml version="1.0" encoding="{encoding}"?><x:xmpmeta'.encode()
    Image.new("RGB", (16, 16)).save("image.jpg", xmp=packet)
    with raises_with(RequestError, "image.jpg:", "metadata"):
        read_image_info(Path("image.jpg"))


@pytest.mark.deep
def test_replay_of_another_bundles_image(bundle: Path, qwen_bundle: Path, capsys: Capture) -> None:
    path = generate(capsys, bundle, "a fox", "image.png")
    refuse_replay(
        capsys, qwen_bundle, path, Bundle.open(bundle).manifest.name, Bundle.open(qwen_bundle).manifest.name, "-m"
    )


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize("prompt", ["x" * 40_000, "狐" * 11_000], ids=["english", "chinese"])
def test_prompt_too_long_for_the_format_fails_before_generating(
    bundle: Path, capsys: Capture, suffix: str, prompt: str
) -> None:
    path = Path(f"image{suffix}")
    with unchanged(Path()):
        # generating this one would take minutes
        size = ("--size", "2048x2048", "--steps", 256)
        outcome = call_rt(capsys, "run", prompt, "-m", bundle, *size, "-o", path, "--quiet")
    assert_one_line_error(outcome, "prompt", "PNG", "--no-metadata")


@pytest.mark.deep
def test_longest_prompt_that_fits_is_written(info: ImageInfo, bundle: Path, capsys: Capture) -> None:
    """Whether a prompt fits does not depend on the seed, so what is accepted is written in the end."""

    def fits(length: int) -> bool:
        longest = replace(info, prompt="狐" * length, seed=2**64 - 1)
        try:
            encode_image(Image.new("RGB", (1, 1)), ImageFormat.JPEG, longest)
        except RequestError:
            return False
        return True

    length = max(length for length in range(10_000, 11_000) if fits(length))
    path = generate(capsys, bundle, "狐" * (length - 300), "image.jpg")
    assert read_image_info(path).prompt == "狐" * (length - 300)
    png = generate(capsys, bundle, "狐" * 20_000, "image.png")
    assert read_image_info(png).prompt == "狐" * 20_000


def test_replay_says_what_differs_even_when_quiet(bundle: Path, capsys: Capture) -> None:
    path = generate(capsys, bundle, "a fox", "image.png")
    info = read_image_info(path)
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    other = replace(info, executor="cuda", program="cuda-weight-only", library="onnxruntime 1.2.3")
    Path("other.png").write_bytes(encode_image(pixels, ImageFormat.PNG, other))
    outcome = call_rt(capsys, "run", "--replay", "other.png", "-m", bundle, "--quiet", "-o", "again.png")
    assert outcome.status == 0
    for fact in ("cuda", "cpu", "onnxruntime 1.2.3", version("onnxruntime")):
        assert fact in outcome.err
    same = call_rt(capsys, "run", "--replay", path, "-m", bundle, "--quiet", "-o", "again.png")
    assert (same.status, same.err) == (0, "")


def test_metadata_of_a_stranger_does_not_control_the_terminal(bundle: Path, capsys: Capture) -> None:
    path = generate(capsys, bundle, "a fox", "image.png")
    info = replace(read_image_info(path), library="\x1b[2J\rnothing\nis wrong")
    with Image.open(path) as image:
        Path("other.png").write_bytes(encode_image(image.convert("RGB"), ImageFormat.PNG, info))
    outcome = call_rt(capsys, "run", "--replay", "other.png", "-m", bundle, "--quiet", "-o", "again.png")
    assert outcome.status == 0
    (line,) = outcome.err.removesuffix("\n").split("\n")
    assert "is wrong" in line
    assert line.isprintable()
