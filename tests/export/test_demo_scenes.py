"""The demo's scenes, captions, tokenizer and checker, without any model."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from demo_model.captions import caption
from demo_model.checker import Verdict, judge, see
from demo_model.scenes import COLOURS, HELD_OUT, PLACES, RELATIONS, SHAPES, Scene, Thing, draw, random_scene
from demo_model.scoring import held_out_requests, summary
from demo_model.vocabulary import write_tokenizer
from zimage_runtime.model.tokenizer import PromptTokenizer

SIZES = [(128, 128), (192, 128), (128, 192), (192, 192)]


def picture(scene: Scene, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    return (draw(scene, *size) * 255 + 0.5).astype(np.uint8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(path)
    return path


@pytest.mark.deep
@pytest.mark.parametrize("size", SIZES)
def test_the_checker_reads_what_was_drawn(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, held_out=bool(number % 2)) for number in range(40)]
    scores = summary([judge(scene, see(picture(scene, size))) for scene in scenes])
    assert (scores.colour, scores.shape, scores.pairs, scores.position) == (1, 1, 1, 1)


def test_the_checker_refuses_what_was_not_asked_for() -> None:
    circle = Thing("circle", "red", 0.25, 0.5, 0.18)
    square = Thing("square", "blue", 0.75, 0.5, 0.18)
    asked = Scene((circle, square), ("white",), relation="left")
    drawn = {
        "colour": Scene((circle, Thing("square", "green", 0.75, 0.5, 0.18)), ("white",)),
        "shape": Scene((circle, Thing("star", "blue", 0.75, 0.5, 0.18)), ("white",)),
        "position": Scene(
            (Thing("circle", "red", 0.75, 0.5, 0.18), Thing("square", "blue", 0.25, 0.5, 0.18)), ("white",)
        ),
        "pairs": Scene((Thing("circle", "blue", 0.25, 0.5, 0.18), Thing("square", "red", 0.75, 0.5, 0.18)), ("white",)),
    }
    assert judge(asked, see(picture(asked))) == Verdict(colour=True, shape=True, pairs=True, position=True)
    for what, scene in drawn.items():
        assert not getattr(judge(asked, see(picture(scene))), what), what
    wrong = Verdict(colour=False, shape=False, pairs=False, position=False)
    assert judge(asked, see(picture(Scene((circle,), ("white",))))) == wrong
    assert judge(asked, see(np.full((128, 128, 3), 255, np.uint8))) == wrong


def test_training_never_shows_a_held_out_pair() -> None:
    rng = np.random.default_rng(1)
    shown = {(thing.colour, thing.shape) for _ in range(2000) for thing in random_scene(rng).things}
    assert not shown & HELD_OUT
    assert len(shown) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)  # and everything else


def test_every_held_out_request_asks_for_a_held_out_pair() -> None:
    for language in ("en", "zh"):
        for scene, prompt in held_out_requests(language, 50):
            assert HELD_OUT & {(thing.colour, thing.shape) for thing in scene.things}
            assert prompt.isascii() == (language == "en")


def test_captions_tell_what_the_scene_says() -> None:
    """English is read back by its words; the same scenes all differ in Chinese."""
    rng = np.random.default_rng(2)
    for _ in range(300):
        scene = random_scene(rng)
        words = caption(scene, "en", rng).lower().replace(",", " ").replace(".", " ").split()
        for thing in scene.things:
            assert words.count(thing.colour) >= 1
            assert thing.shape in words
        assert ("background" in words) == scene.mentions_background
    plain = [Scene((Thing(shape, colour, 0.5, 0.5, 0.2),), ("white",)) for shape in SHAPES for colour in COLOURS]
    captions = [{caption(scene, "zh", rng) for _ in range(40)} for scene in plain]
    assert sum(map(len, captions)) == len(set().union(*captions))


def test_a_relation_is_the_same_whichever_object_comes_first() -> None:
    rng = np.random.default_rng(3)
    first, second = Thing("circle", "red", 0.25, 0.5, 0.18), Thing("square", "blue", 0.75, 0.5, 0.18)
    for relation in RELATIONS:
        texts = {caption(Scene((first, second), ("white",), relation=relation), "en", rng).lower() for _ in range(60)}
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]
        for text in texts:
            circle_first = text.index("circle") < text.index("square")
            if " of " in text.replace("picture of", "") or "above" in text or "below" in text:
                assert ((relation if circle_first else opposite) in text) or "under" in text, text


def test_places_are_where_their_names_say() -> None:
    assert PLACES["top left"] == (-1, -1)
    assert PLACES["right"] == (1, 0)
    assert PLACES["centre"] == (0, 0)
    assert PLACES["bottom"] == (0, 1)


@pytest.mark.deep
@given(st.text(max_size=80))
def test_the_tokenizer_keeps_any_text(tokenizer: Path, text: str) -> None:
    import unicodedata

    words = Tokenizer.from_file(str(tokenizer))
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    if any(mark in text for mark in special):
        return
    assert words.decode(words.encode(text).ids) == unicodedata.normalize("NFC", text)


def test_words_of_captions_are_single_tokens_and_never_joined(tokenizer: Path) -> None:
    words = Tokenizer.from_file(str(tokenizer))
    for word in (*COLOURS, *SHAPES):
        assert len(words.encode(f" {word}").ids) == 1
    pieces = [words.decode([number]) for number in words.encode("一个红色的圆形在一个蓝色的正方形的左边").ids]
    assert pieces == ["一个", "红色", "的", "圆形", "在", "一个", "蓝色", "的", "正方形", "的", "左边"]


def test_captions_fit_the_shortest_padding(tokenizer: Path) -> None:
    prompts = PromptTokenizer(tokenizer)
    rng = np.random.default_rng(4)
    lengths = [
        len(prompts.encode(caption(random_scene(rng), language, rng))) for language in ("en", "zh") for _ in range(200)
    ]
    assert max(lengths) <= 32
