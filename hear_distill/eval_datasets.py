"""The evaluation datasets by name.

in:   'fsd50k' (from the hub), 'fsd50k=PATH' (a folder or a Parquet file), 'table=FILE.parquet' (any labelled sounds)
out:  Dataset
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from hear_distill import circor, coswara, flusense, fsd50k, icbhi
from hear_distill.tabular import ParquetRows, find_parquet, revision_of
from hear_distill.tasks import GROUPED, LAYOUT, Dataset, DatasetError, Split, one_against_the_rest

LOADERS: dict[str, Callable[[Path | None], Dataset]] = {
    module.NAME: module.load for module in (fsd50k, flusense, coswara, icbhi, circor)
}
TABLE = "table"


def load_dataset(spec: str) -> Dataset:
    """The dataset that `spec` names. Raises DatasetError: no such name, no such place, or data that cannot be used."""
    name, separator, text = spec.partition("=")
    place = Path(text).expanduser() if separator else None
    if name != TABLE and name not in LOADERS:
        raise DatasetError(f"no dataset {name!r}; expected one of {', '.join((*LOADERS, TABLE))}, or one of them=PATH")
    if separator and not text:
        raise DatasetError(f"--dataset {spec} names no place; expected {name}=PATH")
    if name == TABLE:
        return load_labelled(place)
    if place is not None and not place.exists() and name not in (icbhi.NAME, circor.NAME):  # those print how to fetch
        raise DatasetError(f"no folder or file {place}; --dataset {name} without a place takes it from the hub")
    return LOADERS[name](place)


def load_labelled(place: Path | None) -> Dataset:
    """A table of anyone's: columns audio, label, group and perhaps fold; one task per label, one against the rest."""
    if place is None or not place.exists():
        found = "no file named" if place is None else f"no file {place}"
        raise DatasetError(f"--dataset table=FILE.parquet: {found}; {LAYOUT}")
    files = find_parquet(place)
    if not files:
        raise DatasetError(f"no Parquet file in {place}; {LAYOUT}")
    rows = ParquetRows(files)
    missing = [column for column in ("label", "group") if column not in rows.names]
    if missing:
        raise DatasetError(
            f"{place} has no column {' or '.join(missing)}; found {', '.join(sorted(rows.names))}; {LAYOUT}"
        )
    columns = {column: rows.text(column) for column in ("label", "group", "fold") if column in rows.names}
    for column, values in columns.items():
        if "" in values:
            raise DatasetError(
                f"column {column} of {place} is empty in {values.count('')} of {len(values)} rows; fill it"
            )
    labels = np.array(columns["label"], dtype=str)
    splits = {"folds": Split(kind="folds", parts=np.array(columns["fold"], dtype=str))} if "fold" in columns else {}
    everyone = np.ones(len(labels), bool)
    return Dataset(
        name=place.name,
        title=f"{place.name}, one label against the rest",
        revision=revision_of(files),
        event="peak",
        group_word="group",
        groups=np.array(columns["group"], dtype=str),
        tasks=one_against_the_rest(labels, everyone, {str(label): str(label) for label in np.unique(labels)}),
        read=lambda: rows.read(np.arange(len(labels))),
        splits=splits,
        split_names=tuple(splits) or (GROUPED,),
    )
