"""Tables: columns of a CSV or Parquet file, and their preprocessing by scikit-learn."""

import difflib
import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_lightning.checks import reason
from cl_lightning.data.samples import ArraySource

if TYPE_CHECKING:
    from pandas import DataFrame, Series

BUNDLED = ("breast_cancer", "diabetes", "digits", "iris", "wine")
"""Tables of scikit-learn that need no download, named ``sklearn:wine``; the column of the class is ``target``."""
_PREFIX = "sklearn:"


def pandas() -> Any:
    """The package pandas.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ValueError("Table: install pandas, which reads tables: pip install 'cl-lightning[tables]'") from error
    return pd


def read_table(path: str) -> "DataFrame":
    """A table with its columns: of a file ``.csv``, ``.tsv`` or ``.parquet``, or of scikit-learn (`BUNDLED`).

    Raises:
        ValueError: If there is no such file, or it cannot be read as a table with rows.
    """
    pd = pandas()
    if path.startswith(_PREFIX):
        name = path.removeprefix(_PREFIX)
        if name not in BUNDLED:
            raise ValueError(f"Table: scikit-learn has no table {name!r} without download; use {', '.join(BUNDLED)}")
        from sklearn import datasets

        return getattr(datasets, f"load_{name}")(as_frame=True).frame
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"Table: no file {file}; give the path of a .csv, .tsv or .parquet file, or sklearn:wine")
    readers = {".csv": pd.read_csv, ".tsv": lambda name: pd.read_csv(name, sep="\t"), ".parquet": pd.read_parquet}
    if file.suffix.lower() not in readers:
        raise ValueError(f"Table: {file} ends with {file.suffix or 'nothing'}; give a .csv, .tsv or .parquet file")
    try:
        frame = readers[file.suffix.lower()](file)
    except (OSError, ValueError, KeyError, ImportError, MemoryError, OverflowError) as error:
        raise ValueError(f"Table: {file} cannot be read as a table ({reason(error)})") from error
    if not len(frame) or not len(frame.columns):
        raise ValueError(f"Table: {file} has no rows; give a table with a line of names and at least one row")
    frame.columns = [str(name) for name in frame.columns]
    if twice := next((name for name in frame.columns if list(frame.columns).count(name) > 1), None):
        raise ValueError(f"Table: {file} has the column {twice!r} more than once; give each column its own name")
    return frame


def column(frame: "DataFrame", name: str, what: str, *, complete: bool = True) -> "Series[Any]":
    """A column, by default without missing values.

    Args:
        frame: The table.
        name: Name of the column.
        what: What the column is, for errors.
        complete: Whether each row must have a value.

    Raises:
        ValueError: If there is no column of this name, or a value is missing.
    """
    if name not in frame.columns:
        near = difflib.get_close_matches(name, frame.columns, 1)
        hint = f"; do you mean {near[0]!r}?" if near else f"; there are {', '.join(list(frame.columns)[:8])}"
        raise ValueError(f"Table: no column {name!r} ({what}){hint}")
    found = frame[name]
    if complete and found.isna().any():
        row = int(np.flatnonzero(found.isna().to_numpy())[0])
        raise ValueError(f"Table: row {row} has no value in the column {name!r} ({what}); fill it or remove the row")
    return found


def quantile_bins(values: np.ndarray, train: np.ndarray, bins: int, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number of the bin of each value, int64 ``(N,)``, and the names of the bins, in ascending order.

    Args:
        values: Numbers ``(N,)``.
        train: Rows whose quantiles are the edges of the bins, bool ``(N,)``.
        bins: Number of bins with equal numbers of these rows, at least 2.
        name: Name of the column.

    Raises:
        ValueError: If two edges coincide, so that a bin is empty.
    """
    edges = np.quantile(values[train], np.arange(1, bins) / bins)
    ends = [values[train].min(), *edges, values[train].max()]
    if np.any(np.diff(edges) <= 0) or ends[0] >= edges[0]:
        raise ValueError(f"Table: the column {name!r} has too few different values for {bins} domains; give fewer")
    shown = [f"{value:.4g}" for value in ends]
    names = tuple(f"{name} {low} to {high}" for low, high in pairwise(shown))
    return np.searchsorted(edges, values, side="left").astype(np.int64), names


class Preprocessing:
    """Rows of a table as vectors: numbers are standardised, categories become one column each.

    Missing numbers are replaced by the median, missing categories are a category of their own, and a category that did
    not occur in the rows of the fit is all zeros (scikit-learn's ``SimpleImputer``, ``StandardScaler``,
    ``OneHotEncoder``).

    Args:
        numeric: Names of the columns of numbers.
        categorical: Names of the columns of categories.
    """

    def __init__(self, numeric: Sequence[str], categorical: Sequence[str]) -> None:
        from sklearn.compose import ColumnTransformer
        from sklearn.impute import SimpleImputer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        self.numeric, self.categorical = list(numeric), list(categorical)
        numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
        one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
        self._transformer = ColumnTransformer(
            [("numbers", numbers, self.numeric), ("categories", one_hot, self.categorical)]
        )

    def fit(self, frame: "DataFrame") -> "Preprocessing":
        """Learn medians, means, standard deviations and categories of these rows."""
        self._transformer.fit(self._plain(frame))
        return self

    def __call__(self, frame: "DataFrame") -> np.ndarray:
        """Rows as vectors, float32 ``(N, D)``."""
        return np.asarray(self._transformer.transform(self._plain(frame)), dtype=np.float32)

    def _plain(self, frame: "DataFrame") -> "DataFrame":
        """Numbers as float64, categories as text, with a word for missing ones."""
        pd = pandas()
        columns: dict[str, Any] = {}
        for name in self.numeric:
            numbers = pd.to_numeric(frame[name], errors="coerce").astype("float64")
            wrong = np.flatnonzero((numbers.isna() & frame[name].notna()).to_numpy())
            if len(wrong):
                value = frame[name].iloc[wrong[0]]
                raise ValueError(
                    f"Table: the column {name!r} is numeric, and row {int(wrong[0])} has {value!r}; name the column in "
                    "data.categorical"
                )
            columns[name] = numbers.to_numpy()
        for name in self.categorical:
            pairs = zip(frame[name], frame[name].isna(), strict=True)
            filled = [_MISSING if missing else str(value) for value, missing in pairs]
            columns[name] = np.array(filled, dtype=object)
        return pd.DataFrame(columns)


_MISSING = "(missing)"


class TableSource(ArraySource):
    """Rows of a table as vectors; the digest is the hash of the rows before their preprocessing.

    Args:
        frame: The rows.
        vectors: The rows as vectors, float32 ``(N, D)``.
        labels: Raw labels, integers ``(N,)``.
        facts: Further arguments of `ArraySource`.
    """

    def __init__(self, frame: "DataFrame", vectors: np.ndarray, labels: np.ndarray, **facts: Any) -> None:
        super().__init__(vectors, labels, kind="vector", **facts)
        text = ("\0".join(map(str, row)) for row in frame.itertuples(index=False, name=None))
        rows = (row.encode("utf-8", "surrogatepass") for row in text)
        self._hashes = np.array(
            [int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "little") for row in rows]
        )

    def digest(self, indices: np.ndarray) -> bytes:
        return hashlib.blake2b(self._hashes[indices].tobytes(), digest_size=16).digest()
