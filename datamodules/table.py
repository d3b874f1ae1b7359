"""Rows of tables."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from cl_lightning.checks import at_least, within
from cl_lightning.data import Targets
from cl_lightning.data.labels import Classes
from cl_lightning.data.tables import Preprocessing, TableSource, column, pandas, quantile_bins, read_table
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.datamodules.stream import continued
from cl_lightning.stream import DatasetInfo, DomainIncremental, Scenario, Stream

if TYPE_CHECKING:
    from pandas import DataFrame


class Table(ContinualDataModule):
    """Rows of a CSV or Parquet file, or of a table of scikit-learn, with numeric and categorical columns.

    A row becomes a vector: numbers are standardised, missing ones replaced by the median, and a categorical column
    becomes one column for each of its values. Medians, means, standard deviations and categories are fitted on the
    training samples of the first task alone; a category that arrives later is a row of zeros in its columns. Needs
    pandas: ``pip install 'cl-lightning[tables]'``.

    Args:
        path: A file ``.csv``, ``.tsv`` or ``.parquet`` with named columns, or ``sklearn:breast_cancer``,
            ``sklearn:diabetes``, ``sklearn:digits``, ``sklearn:iris``, ``sklearn:wine``.
        target: Column of the class, or of the number.
        regression: Whether the target is a number, which is standardised by mean and standard deviation of the training
            samples of the first task; the stream then has one class, named as the column.
        test: File of the test samples, with the same columns; None to hold out ``test_fraction``.
        test_fraction: Share of the rows of each class, in each domain, that are test samples, in (0, 1), drawn by the
            seed; a class has at least one of them where it has two rows.
        domain: Column of the domain, for domain-incremental streams; it is no input. None for no domains.
        domain_bins: Number of domains of equal size into which the numbers of ``domain`` are divided, in ascending
            order, at least 2; None where its values are the domains.
        numeric: Columns of numbers; None for those whose values are numbers, apart from booleans and ``categorical``.
        categorical: Columns of categories; None for all others. With both lists, columns in neither are left out.
        drop: Columns to leave out, such as identifiers.
        kwargs: Options of :class:`ContinualDataModule`.

    Raises:
        ValueError: If an option is outside its range, and before training if the file or a column is missing, or a
            value is missing in ``target`` or ``domain``.
    """

    mean: ClassVar[tuple[float, ...]] = (0.0,)  # the preprocessing standardises
    std: ClassVar[tuple[float, ...]] = (1.0,)
    _any_kind = True

    def __init__(
        self,
        path: str,
        *,
        target: str = "target",
        regression: bool = False,
        test: str | None = None,
        test_fraction: float = 0.2,
        domain: str | None = None,
        domain_bins: int | None = None,
        numeric: list[str] | None = None,
        categorical: list[str] | None = None,
        drop: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        within(self, "(0, 1)", test_fraction=test_fraction)
        at_least(self, 2, domain_bins=domain_bins, optional=True)
        if domain_bins is not None and domain is None:
            raise ValueError(f"Table: domain_bins is {domain_bins}, but there is no domain; give the column as domain")
        if both := sorted(set(numeric or ()) & set(categorical or ())):
            raise ValueError(f"Table: the column {both[0]!r} is in numeric and in categorical; name it once")
        self.path, self.target, self.test, self.test_fraction = path, target, test, test_fraction
        self.regression = regression
        self.domain, self.domain_bins = domain, domain_bins
        self.numeric, self.categorical, self.drop = numeric, categorical, drop
        self._earlier: Stream | None = None
        self._parts: dict[bool, TableSource] = {}

    def default_scenario(self, info: DatasetInfo) -> Scenario:
        return super().default_scenario(info) if self.domain is None else DomainIncremental()

    def make_stream(self, seed: int, earlier: Stream | None = None) -> Stream:
        self.seed = seed if self.seed is None else self.seed  # the parts depend on it
        self._earlier = earlier
        return super().make_stream(seed, earlier)

    def source(self, *, train: bool) -> TableSource:
        if not self._parts:
            self._parts = self._read()
        return self._parts[train]

    def _read(self) -> dict[bool, TableSource]:
        """Both parts; the preprocessing is fitted on the first task, which labels and domains determine."""
        frames = [read_table(path) for path in (self.path, self.test) if path is not None]
        counts = [len(frame) for frame in frames]
        given = np.repeat(np.arange(len(frames)), counts)  # 0 for rows of the first file
        what = "the number" if self.regression else "the class"
        values = np.concatenate([np.asarray(column(frame, self.target, what)) for frame in frames])
        targets: Targets | None = None
        if self.regression:
            targets = Targets("number", values, 1, f"Table: {self.path}: column {self.target!r}")
            class_names: tuple[str, ...] = (self.target,)
            numbers = targets.labels()
        else:
            labels = Classes.of(values[given == 0], counts[0], None, f"Table: {self.path}")
            class_names, numbers = labels.names, labels.number(values, len(given), f"Table: {self.test or self.path}")
        domains, names = self._domains(frames, given)
        is_train = given == 0 if self.test is not None else ~self._held_out(numbers, domains)
        inputs = self._inputs(frames)
        parts = {train: np.flatnonzero(is_train == train) for train in (True, False)}
        info = DatasetInfo(
            numbers[parts[True]],
            numbers[parts[False]],
            class_names,
            train_domains=None if domains is None else domains[parts[True]],
            test_domains=None if domains is None else domains[parts[False]],
            domain_names=names,
        )
        scenario, seed = self.scenario or self.default_scenario(info), self.seed or 0
        if self._earlier is None:
            stream = scenario(info, seed=seed, val_fraction=self.val_fraction)
        else:
            stream = continued(self, scenario, info, self._earlier)
        pool = {train: inputs.iloc[rows] for train, rows in parts.items()}
        self.preprocessing = self._preprocessing(inputs).fit(pool[True].iloc[stream.train[0]])
        return {
            train: TableSource(
                pool[train],
                self.preprocessing(pool[train]),
                numbers[rows],
                class_names=class_names,
                targets=None if targets is None else targets.select(rows),
                domains=None if domains is None else domains[rows],
                domain_names=names,
                name=f"Table: {self.path}",
            )
            for train, rows in parts.items()
        }

    def _domains(self, frames: "list[DataFrame]", given: np.ndarray) -> tuple[np.ndarray | None, tuple[str, ...]]:
        """Domain of each row, and the names of the domains."""
        if self.domain is None:
            return None, ()
        values = np.concatenate([np.asarray(column(frame, self.domain, "the domain")) for frame in frames])
        if self.domain_bins is None:
            known = Classes.of(values[given == 0], int((given == 0).sum()), None, f"Table: {self.domain}", "domain")
            numbers = known.number(values, len(values), f"Table: {self.domain}", "domain")
            return numbers, tuple(f"{self.domain} {name}" for name in known.names)
        try:
            numbers = values.astype(np.float64)
        except ValueError as error:
            raise ValueError(f"Table: the column {self.domain!r} has no numbers; leave domain_bins out") from error
        return quantile_bins(numbers, given == 0, self.domain_bins, self.domain)

    def _held_out(self, labels: np.ndarray, domains: np.ndarray | None) -> np.ndarray:
        """Rows that are test samples, bool ``(N,)``: a share of each class in each domain."""
        groups = labels if domains is None else labels * (int(domains.max()) + 1) + domains
        random = np.random.default_rng([self.seed or 0, 0x7AB])
        held = np.zeros(len(groups), dtype=bool)
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            count = round(self.test_fraction * len(rows))
            count = min(max(count, 1), len(rows) - 1) if len(rows) > 1 else 0
            held[random.permutation(rows)[:count]] = True
        return held

    def _inputs(self, frames: "list[DataFrame]") -> "DataFrame":
        """Columns that are inputs, of the rows of all files."""
        left_out = {self.target, self.domain, *(self.drop or ())} - {None}
        for name in self.drop or ():
            column(frames[0], name, "to leave out", complete=False)
        names = [name for name in frames[0].columns if name not in left_out]
        if not names:
            raise ValueError(f"Table: {self.path} has no column apart from target, domain and drop; nothing is left")
        for frame in frames[1:]:
            if missing := [name for name in names if name not in frame.columns]:
                raise ValueError(f"Table: {self.test} lacks the column {missing[0]!r}; give test samples all columns")
        return pandas().concat([frame[names] for frame in frames], ignore_index=True)

    def _preprocessing(self, inputs: "DataFrame") -> Preprocessing:
        kinds = {name: inputs[name].dtype.kind if hasattr(inputs[name].dtype, "kind") else "O" for name in inputs}
        for name in (*(self.numeric or ()), *(self.categorical or ())):
            if name not in kinds:
                column(inputs, name, "an input", complete=False)
        named = {*(self.categorical or ())}
        numeric = self.numeric
        if numeric is None:
            numeric = [name for name, kind in kinds.items() if kind in "iuf" and name not in named]
        categorical = self.categorical
        if categorical is None:
            categorical = [name for name in kinds if name not in numeric]
        return Preprocessing(numeric, categorical)
