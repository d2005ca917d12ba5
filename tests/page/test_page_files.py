"""The page's files: complete in both languages, and without anything from elsewhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "zimage_rt" / "serve" / "page"
SCRIPTS = sorted(PAGE.glob("scripts/**/*.js"))
TEXTS = [path for path in PAGE.rglob("*") if path.suffix in (".html", ".css", ".js", ".svg")]
LANGUAGES = sorted(PAGE.glob("scripts/languages/*.js"))
MOST_LINES = 400

SVG = "http://www.w3.org/2000/svg"
"""A name of SVG's, which no browser fetches."""


def words(language: Path) -> dict[str, str]:
    """The texts of a language, by key."""
    source = re.search(r"^export default (\{.*\});$", language.read_text("utf-8"), re.M | re.S)
    assert source
    quoted = re.sub(r"^  (\w+):", r'  "\1":', source[1], flags=re.M)
    pairs = json.loads(re.sub(r",\n\}$", "\n}", quoted), object_pairs_hook=list)
    keys = [key for key, _ in pairs]
    assert len(keys) == len(set(keys)), f"{language.name} has a key twice"
    return dict(pairs)


def values(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


class Names(HTMLParser):
    """The keys of texts that the HTML names, and the attributes that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []  # element, attribute, value

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name in ("data-text", "data-label", "data-placeholder"):
                self.keys.add(value or "")


def html() -> Names:
    found = Names()
    found.feed((PAGE / "index.html").read_text("utf-8"))
    return found


def test_both_languages_say_everything_with_the_same_values() -> None:
    assert [path.stem for path in LANGUAGES] == ["en", "zh"]
    english, chinese = (words(path) for path in LANGUAGES)
    assert set(english) == set(chinese)
    assert {key for key in english if values(english[key]) != values(chinese[key])} == set()
    assert {key for key in english if not english[key].strip() or not chinese[key].strip()} == set()
    same = {key for key in english if english[key] == chinese[key]}
    assert same == {"lora", "shift"}, "names of the field alone are the same in both"


def test_every_text_that_is_asked_for_exists_and_is_asked_for() -> None:
    known = set(words(LANGUAGES[0]))
    sources = "\n".join(path.read_text("utf-8") for path in SCRIPTS if path not in LANGUAGES)
    asked = html().keys | set(re.findall(r'\bt\(\s*"([^"]+)"', sources))
    plurals = set(re.findall(r'\bplural\(\s*"([^"]+)"', sources))
    asked |= {f"{key}.{form}" for key in plurals for form in ("one", "other")}
    assert asked - known == set()

    literals = set(re.findall(r'"([^"\n]+)"', sources)) | html().keys  # keys also pass through variables
    made = [re.escape(template) for template in re.findall(r"\bt\(`([^`]+)`", sources)]
    patterns = [re.sub(r"\\\$\\\{.*?\\\}", r"[\\w-]+", template) for template in made]
    unused = {key for key in known - asked - literals if not any(re.fullmatch(pattern, key) for pattern in patterns)}
    assert unused == set()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(PAGE).as_posix())
def test_a_file_names_nothing_elsewhere_and_is_short(path: Path) -> None:
    text = path.read_text("utf-8").replace(SVG, "")
    assert re.findall(r"(?:https?:|wss?:|ftp:)?//[\w.-]+\.\w+|@import|\burl\(", text) == []
    assert len(text.splitlines()) <= MOST_LINES


def test_the_html_has_no_script_or_style_of_its_own_and_its_files_exist() -> None:
    """The server's policy would refuse the one; the other would be missing."""
    attributes = html().attributes
    assert [each for each in attributes if each[1] == "style" or each[1].startswith("on")] == []
    linked = [value for _, name, value in attributes if name in ("src", "href") and not value.startswith("#")]
    assert linked
    for value in linked:
        assert value.startswith("page/"), value
        file, _, symbol = value.removeprefix("page/").partition("#")
        assert (PAGE / file).is_file(), value
        assert not symbol or f'id="{symbol}"' in (PAGE / file).read_text("utf-8"), value
    assert not re.search(r"<style|<script(?! type=\"module\" src=)", (PAGE / "index.html").read_text("utf-8"))


def test_every_icon_and_module_that_scripts_name_exists() -> None:
    icons = set(re.findall(r'<symbol id="(\w+)"', (PAGE / "icons.svg").read_text("utf-8")))
    for path in SCRIPTS:
        text = path.read_text("utf-8")
        for module in re.findall(r'^import .*?from "([^"]+)";', text, re.M):
            assert (path.parent / module).is_file(), f"{path.name}: {module}"
        named = set(re.findall(r'\bicon\("(\w+)"', text)) | set(re.findall(r'\bbutton\(\{ name: "(\w+)"', text))
        assert named - icons == set(), path.name
