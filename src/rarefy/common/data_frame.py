"""Tables as data frames of pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rarefy.common.errors import DataError


def data_frame(rows: Iterable[Mapping[str, Any]], first: str | None = None) -> Any:
    """Return rows as a data frame of pandas, with a column for each key, in their order.

    Args:
        rows: one dict for each row.
        first: a column that the frame has even without rows.

    Raises:
        DataError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise DataError("to_pandas needs pandas: pip install pandas") from None
    rows = [dict(r) for r in rows]
    columns = [*([first] if first else []), *(name for row in rows for name in row)]
    return pd.DataFrame(rows, columns=list(dict.fromkeys(columns)))
