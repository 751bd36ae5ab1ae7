"""Find the inputs of all sources. A container is listed once, and again when it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.originals import ABSOLUTE, source_folder
from pipelines.preprocess.sources.folder import list_folder
from pipelines.preprocess.sources.inputs import LISTED_SCHEMA, MISSING, PROBLEM, STAMP, keyed, listed, stamps_of
from pipelines.preprocess.sources.survey import LISTINGS, Container, Survey, where_is
from pipelines.preprocess.sources.tables import list_arrow, list_parquet
from pipelines.preprocess.sources.tar import list_tar
from pipelines.schema import Column
from pipelines.storage import Storage, StorageOptions

LISTERS = {"parquet": list_parquet, "webdataset": list_tar, "huggingface": list_arrow}
LISTING_READERS = 16
NUMBER, ERROR = "number", "error"  # columns of what `write_listings` takes and gives


def list_inputs(
    surveys: Sequence[Survey], options: StorageOptions, read: Callable[[Container], pa.Table] | None = None
) -> pa.Table:
    """Every input, in the order of sources, and there of files and rows; `read` gives a container's list.

    Raises FileNotFoundError where a source has no image, ValueError for what `list_container` or metadata raise.
    """
    return pa.concat_tables([_list_source(survey, options, read) for survey in surveys])


def list_container(container: Container, options: StorageOptions) -> pa.Table:
    """The inputs of a container without keys. Raises ValueError where its columns are not those that are asked for."""
    storage, _ = source_folder(container.source.path, options)
    return LISTERS[container.kind](storage, container.name, container.size, container.source)


def unlisted(surveys: Sequence[Survey], dataset: Storage) -> list[Container]:
    """The containers of which the index's folder has no list yet."""
    there = {file.name for file in dataset.list(LISTINGS)}
    return [container for survey in surveys for container in survey.containers if container.listing not in there]


def write_listings(rows: pa.Table, containers: Sequence[Container], dataset: Storage) -> pa.Table:
    """List the containers whose numbers are in `rows` into the index's folder; gives what was wrong with each."""
    errors: list[str | None] = []
    for number in rows.column(NUMBER).to_pylist():
        container = containers[number]
        try:
            listing = list_container(container, dataset.options)
        except ValueError as error:  # of the settings: it is told once, in its own words
            errors.append(str(error))
        else:
            dataset.write_table(container.listing, listing, compression="zstd")
            errors.append(None)
    return pa.table({ERROR: pa.array(errors, pa.string())})


def forget_listings(surveys: Sequence[Survey], dataset: Storage) -> None:
    """Delete the lists of containers that are not there any more, or have changed."""
    wanted = {container.listing for survey in surveys for container in survey.containers}
    for file in dataset.list(LISTINGS):
        if file.name not in wanted:
            dataset.delete(file.name)


def _list_source(found: Survey, options: StorageOptions, read: Callable[[Container], pa.Table] | None) -> pa.Table:
    if found.kind == "folder":
        storage, _ = source_folder(found.source.path, options)
        return keyed(list_folder(storage, found.files, found.source), found.source.name)
    with ThreadPoolExecutor(LISTING_READERS) as pool:
        tables = list(pool.map(read or (lambda container: list_container(container, options)), found.containers))
    stamped = [
        _stamped(table, container, found.files) for table, container in zip(tables, found.containers, strict=True)
    ]
    rows = pa.concat_tables(stamped)
    if not rows.num_rows:
        raise FileNotFoundError(f"{where_is(found.source)}: no image in {listed(c.name for c in found.containers)}")
    return keyed(rows, found.source.name)


def _stamped(rows: pa.Table, container: Container, files: pa.Table) -> pa.Table:
    """Listed inputs with their stamps: the container's for what lies in it, a file's own for one below the source.

    Files elsewhere are not looked at before they are read. They have the container's: touching it reads them again.
    """
    names = rows.column(Column.FILE)
    own = pc.or_(pc.is_valid(rows.column(Column.OFFSET)), pc.is_valid(rows.column(PROBLEM)))
    own = pc.or_(own, pc.fill_null(pc.match_substring_regex(names, ABSOLUTE), False))
    if pc.all(own).as_py():
        return _with(rows, STAMP, pa.repeat(container.stamp, rows.num_rows))
    known = stamps_of(files).take(pc.index_in(names, files.column("name")))
    rows = _with(rows, STAMP, pc.if_else(own, container.stamp, known))
    gone = pc.is_null(rows.column(STAMP))
    return _with(rows, PROBLEM, pc.if_else(gone, MISSING, rows.column(PROBLEM)))


def _with(rows: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), LISTED_SCHEMA.field(name), values)
