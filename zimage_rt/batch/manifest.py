"""`manifest.parquet`: a row for each row of the request file, in its order, with its image or its error."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from zimage_runtime.errors import RequestError

from .items import Item
from .parquet import pyarrow_parquet
from .records import Record, recorded_keys, remove_records, write_record
from .store import Store

MANIFEST = "manifest.parquet"


def read_manifest(store: Store) -> dict[str, Record]:
    """The finished images of an earlier manifest, by their keys. Raises `RequestError` for one that is damaged."""
    data = store.read(MANIFEST)
    if data is None:
        return {}
    try:
        rows = pyarrow_parquet().read_table(io.BytesIO(data)).to_pylist()
    except (ValueError, ArithmeticError, OSError) as error:
        where = store.location(MANIFEST)
        raise RequestError(f"{where}: is damaged ({error}); remove it, and its images are generated again") from None
    records = (Record.from_values(row) for row in rows)
    return {record.key: record for record in records if record is not None}


def write_manifest(
    store: Store, items: Iterable[Item], records: Mapping[str, Record], errors: Mapping[str, str], before: set[str]
) -> None:
    """Replaces the manifest. `records` and `errors` are by key; `before` are the keys that the earlier manifest has.

    Images of rows that the file no longer has keep records of their own, for when the rows come back.
    """
    import pyarrow as pa

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("request", pa.string()),
            ("seed", pa.uint64()),
            ("file", pa.string()),
            ("size", pa.int64()),
            ("sha256", pa.string()),
            ("seconds", pa.float64()),
            ("executor", pa.string()),
            ("error", pa.string()),
            ("key", pa.string()),
        ]
    )
    listed = list(items)
    keys = {item.key for item in listed}
    for key in before - keys:
        write_record(store, records[key])
    rows = [_row(item, records.get(item.key), errors.get(item.key)) for item in listed]
    buffer = io.BytesIO()
    pyarrow_parquet().write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    store.write(MANIFEST, buffer.getvalue(), durable=True)
    remove_records(store, keys & recorded_keys(store))


def _row(item: Item, record: Record | None, error: str | None) -> dict[str, Any]:
    known = {"id": item.id, "request": item.request.document(), "seed": item.seed, "key": item.key, "error": error}
    return known if record is None or error is not None else {**asdict(record), **known}
