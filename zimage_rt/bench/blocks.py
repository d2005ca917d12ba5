"""What a report is made of, and its two forms: Markdown that links its images, and one self-contained HTML file."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from .tables import markdown_table


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are numbers. Rows whose index is in `failed` stand out."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    failed: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A plot."""

    path: str  # below the report's folder
    alt: str  # what it shows, for readers who cannot see it
    svg: bytes


@dataclass(frozen=True)
class Tile:
    """An image in a grid; without `path`, only its caption."""

    caption: str
    path: str | None
    png: bytes | None
    failed: bool = False


@dataclass(frozen=True)
class Grid:
    """Images in rows, each row with a title."""

    rows: tuple[tuple[str, tuple[Tile, ...]], ...]


Block = Text | Table | Figure | Grid


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: tuple[Block, ...]


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown; plots and images are linked."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", *(_markdown(block) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Text(text):
            return text
        case Table(header, rows):
            return markdown_table(header, rows)
        case Figure(path, alt):
            return f"![{alt}]({path})"
        case Grid(rows):
            return "\n\n".join(_markdown_row(title, tiles) for title, tiles in rows)


def _markdown_row(title: str, tiles: Sequence[Tile]) -> str:
    header = [tile.caption for tile in tiles]
    images = [f"![{tile.caption}]({tile.path})" if tile.path else "no image" for tile in tiles]
    return f"{title}\n\n" + markdown_table(header, [images])


def to_html(title: str, sections: Sequence[Section]) -> str:
    """The report as one page that needs no other file and no network."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body += [f"<section><h2>{html.escape(section.title)}</h2>", *(_html(b) for b in section.blocks), "</section>"]
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Table(header, rows, failed):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = [
                f"<tr{' class=failed' if index in failed else ''}>"
                + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
                + "</tr>"
                for index, row in enumerate(rows)
            ]
            return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        case Figure(_, alt, svg):
            return f'<figure><img alt="{html.escape(alt)}" src="{_data("image/svg+xml", svg)}"></figure>'
        case Grid(rows):
            return "".join(_html_row(title, tiles) for title, tiles in rows)


def _html_row(title: str, tiles: Sequence[Tile]) -> str:
    return f"<h3>{html.escape(title)}</h3><div class=grid>" + "".join(_html_tile(tile) for tile in tiles) + "</div>"


def _html_tile(tile: Tile) -> str:
    caption = html.escape(tile.caption)
    inside = f'<img alt="{caption}" src="{_data("image/png", tile.png)}">' if tile.png else "<p>no image</p>"
    return f"<figure{' class=failed' if tile.failed else ''}>{inside}<figcaption>{caption}</figcaption></figure>"


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .3rem .65rem; border-bottom: 1px solid #d8dee4; text-align: right; vertical-align: top; }
th { background: #f3f5f7; font-weight: 600; } td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
tr.failed td { background: #fdecea; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
.grid { display: flex; flex-wrap: wrap; gap: 1rem; } .grid figure { margin: 0; width: 240px; }
.grid img { width: 240px; image-rendering: auto; border: 1px solid #d8dee4; }
.grid .failed img { outline: 3px solid #c62828; } figcaption { font-size: .8rem; overflow-wrap: anywhere; }
"""
