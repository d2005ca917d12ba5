"""Files of rows: JSONL, CSV, TSV and Parquet, and what is wrong with them, by line."""

from pathlib import Path

import pyarrow as pa
import pytest
from facts import assert_facts, raises_with
from pyarrow import parquet

from zimage_rt.batch.rows import BadRow, Row, read_rows
from zimage_runtime.errors import RequestError


def written(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def only_bad(path: Path) -> BadRow:
    (bad,) = [row for row in read_rows(path) if isinstance(row, BadRow)]
    return bad


def test_jsonl(tmp_path: Path) -> None:
    text = '\ufeff{"id": "a", "prompt": "狐", "seed": 1, "image": null}\r\n\n{"prompt": "x"}'
    rows = read_rows(written(tmp_path, "r.jsonl", text))
    assert rows == [Row(1, {"id": "a", "prompt": "狐", "seed": 1}), Row(3, {"prompt": "x"})]


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        (b'{"prompt": "caf\xe9"}', ("UTF-8", "0xe9")),
        (b"{'prompt': 1}", ("JSON",)),
        (b'{"prompt": "a", "prompt": "b"}', ("'prompt'", "twice")),
        (b'{"strength": NaN}', ("NaN",)),
        (b'["a fox"]', ("object", "list")),
        (b"[" * 100_000, ("nested",)),
        (b'{"seed": ' + b"9" * 10_000 + b"}", ("JSON",)),
    ],
)
def test_a_bad_line_of_jsonl(tmp_path: Path, line: bytes, facts: tuple[str, ...]) -> None:
    path = written(tmp_path, "r.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    assert [row.line for row in read_rows(path)] == [1, 2, 3]
    bad = only_bad(path)
    assert bad.line == 2
    assert_facts(bad.why, *facts)


def test_csv(tmp_path: Path) -> None:
    text = '\ufeffid, prompt,seed\r\na,"a fox,\na ""hen""",\r\n\r\n,x,7\r\n'
    assert read_rows(written(tmp_path, "r.csv", text)) == [
        Row(2, {"id": "a", "prompt": 'a fox,\na "hen"'}, textual=True),
        Row(5, {"prompt": "x", "seed": "7"}, textual=True),
    ]


def test_tsv(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, "r.tsv", "id\tprompt\na\tone, two\n"))
    assert rows == [Row(2, {"id": "a", "prompt": "one, two"}, textual=True)]


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        (b"a,caf\xe9", ("prompt", "UTF-8")),
        (b"a", ("1", "2")),
        (b"a,b,c", ("3", "2")),
        (b'a,"b"c', ("CSV",)),
        (b"a," + b"x" * ((1 << 20) + 1), ("CSV",)),
    ],
)
def test_a_bad_line_of_csv(tmp_path: Path, line: bytes, facts: tuple[str, ...]) -> None:
    bad = only_bad(written(tmp_path, "r.csv", b"id,prompt\nx,a fox\n" + line + b"\n"))
    assert bad.line == 3
    assert_facts(bad.why, *facts)


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    with raises_with(RequestError, "r.csv", "'seed'"):
        read_rows(written(tmp_path, "r.csv", "seed,prompt,seed\n1,a,2\n"))


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b"], "seed": pa.array([1.0, None], pa.float64()), "size": [[64, 48], None]})
    parquet.write_table(table, tmp_path / "r.parquet")
    rows = read_rows(tmp_path / "r.parquet")
    assert rows == [Row(1, {"prompt": "a", "seed": 1.0, "size": [64, 48]}), Row(2, {"prompt": "b"})]


@pytest.mark.parametrize(
    ("name", "data"),
    [("r.parquet", b"PAR1 and nothing else"), ("r.parquet", b""), ("r.jsonl", b"\n\n"), ("r.csv", b"id,prompt\n")],
)
def test_a_file_without_rows(tmp_path: Path, name: str, data: bytes) -> None:
    with raises_with(RequestError, name):
        read_rows(written(tmp_path, name, data))


def test_utf_16_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("id,prompt\na,狐狸\n".encode("utf-16"))
    with raises_with(RequestError, "x.csv", "UTF-16", "UTF-8"):
        read_rows(tmp_path / "x.csv")


def test_what_is_no_file_of_rows(tmp_path: Path) -> None:
    with raises_with(RequestError, "none.jsonl", "no such file"):
        read_rows(tmp_path / "none.jsonl")
    with raises_with(RequestError, "r.xlsx", ".jsonl", ".csv", ".parquet"):
        read_rows(written(tmp_path, "r.xlsx", b"x"))
    (tmp_path / "d.csv").mkdir()
    with raises_with(RequestError, "d.csv"):
        read_rows(tmp_path / "d.csv")
