"""Tables as data frames of pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rarefy.common.errors import DataError


def data_frame(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Return rows as a data frame of pandas, with a column for each key, in their order.

    Raises:
        DataError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise DataError("to_pandas needs pandas: pip install pandas") from None
    rows = [dict(r) for r in rows]
    return pd.DataFrame(rows, columns=list(dict.fromkeys(name for row in rows for name in row)))
