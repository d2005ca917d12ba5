"""pyarrow, where it is installed."""

from typing import Any

from zimage_runtime.errors import RequestError


def pyarrow_parquet() -> Any:
    """pyarrow's module for Parquet. Raises `RequestError` where it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise RequestError("zimage-rt batch needs pyarrow; install it with: pip install 'zimage-rt[batch]'") from None
    return parquet
