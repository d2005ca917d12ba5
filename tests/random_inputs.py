"""Random and altered inputs for property-based tests: JSON documents and bytes."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**31, max_value=10**400)
    | st.floats()
    | st.text()
    | st.sampled_from(["/etc/passwd", "../x", "a\\b", "\ud800", "\0", "cpu", "F32", "1", "tokenizer.json"])
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8
)
SMALL_BYTES = st.binary(max_size=200)


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of all values inside a JSON document."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def edited(document: Any, place: tuple[str | int, ...], edit: Callable[[Any, str | int], object]) -> Any:
    """A copy of a document whose value at a place is edited: `edit` is given its container and its key."""
    copy = json.loads(json.dumps(document))
    container = copy
    for key in place[:-1]:
        container = container[key]
    edit(container, place[-1])
    return copy


@st.composite
def altered_documents(draw: st.DrawFn, document: Any) -> Any:
    """A document with one to three of its values replaced, removed or moved under another name."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(document) or [()]))
        if not place:
            break
        kind, value, name = draw(st.sampled_from(["replace", "remove", "rename"])), draw(JSON), draw(st.text())

        def edit(container: Any, key: str | int, kind: str = kind, value: Any = value, name: str = name) -> None:
            if kind == "replace":
                container[key] = value
            else:
                taken = container.pop(key)
                if kind == "rename" and isinstance(container, dict):
                    container[name] = taken

        document = edited(document, place, edit)
    return document


@st.composite
def altered_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of which some are overwritten, removed or inserted."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(start + 16, len(data))))
        data = data[:start] + draw(st.binary(max_size=16)) + data[stop:]
    return data
