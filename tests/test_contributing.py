"""CONTRIBUTING's map: what it names exists, and every room of the packages is on it."""

import re
from pathlib import Path

import pytest
import test_house

REPOSITORY = Path(__file__).parents[1]
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"

INDENT = 4


def places() -> dict[str, str]:
    """The map's paths, folders with a slash at their end, and the phrase beside each."""
    block = re.search(r"^## The map\n\n```\n(.*?)^```", CONTRIBUTING.read_text("utf-8"), re.M | re.S)
    assert block
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines():
        parts = re.fullmatch(r"( *)(\S+) {2,}(\S.*)", line)
        assert parts, f"not a path and a phrase: {line!r}"
        depth = len(parts[1]) // INDENT
        path = "".join(folders[:depth]) + parts[2]
        folders[depth:] = [parts[2]]
        found[path] = parts[3]
    return found


def test_what_is_on_the_map_exists() -> None:
    missing = [path for path in places() if not (REPOSITORY / path).exists()]
    assert missing == []


@pytest.mark.parametrize("package", test_house.FLOORS)
def test_every_room_is_on_the_map(package: str) -> None:
    folder = (test_house.HOMES[package] / package).relative_to(REPOSITORY)
    rooms = {test_house.room_of(name) for name in test_house.modules() if test_house.package_of(name) == package} - {""}
    named = {path.removeprefix(f"{folder}/").strip("/").removesuffix(".py") for path in places()}
    assert rooms - named == set()
