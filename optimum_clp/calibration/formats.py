"""Files of text, by suffix: those that `datasets` reads, compressed or not, row by row and without a copy in its cache."""

import bz2
import contextlib
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..json_files import json_values

_TABLES = {".csv": ",", ".tsv": "\t"}
_JSON = (".json", ".jsonl", ".ndjson")
_COLUMNAR = (".parquet", ".arrow")
FILE_TYPES = (".txt", *_JSON, *_TABLES, *_COLUMNAR)
_ROWS_AT_ONCE = 256


class FormatProblem(ValueError):
    """What is wrong with a file: a clause whose subject is the file, and what to do."""

    def __init__(self, rule: str, remedy: str):
        super().__init__(rule)
        self.rule, self.remedy = rule, remedy


def kind_of(path: Path | str) -> str:
    """The suffix that says what is in a file, in lower case, that of a compressed one's content: `.jsonl` of `a.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_packed(path: Path | str) -> bool:
    """Whether a file is compressed, by its suffix."""
    return Path(path).suffix.lower() in _PACKED


def has_rows(path: Path) -> bool:
    """Whether a file has rows; otherwise it is running text."""
    return kind_of(path) in (*_JSON, *_TABLES, *_COLUMNAR)


@contextlib.contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """A file as text in UTF-8, with or without a byte order mark; unpacked as it is read.

    Args:
        path (`Path`): The file.
        newline (`str`, *optional*): As in Python's `open`.

    Raises:
        FormatProblem: If a compressed file is damaged.
        OSError: If it cannot be read.
    """
    suffix = path.suffix.lower()
    try:
        with _PACKED[suffix](path) if suffix in _PACKED else path.open("rb") as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise _damaged(suffix, error) from error
    except OSError as error:
        if suffix in _PACKED and error.errno is None:  # bz2 and pyarrow say so of damaged files
            raise _damaged(suffix, error) from error
        raise


def rows_of(path: Path, columns: Callable[[Sequence[str]], list[str]]) -> Iterator[Any]:
    """The rows of a file that [`has_rows`].

    Args:
        path (`Path`): The file.
        columns (`Callable`): From the names of all columns those that are wanted, for files that hold them one by one.

    Raises:
        JsonProblem, FormatProblem: If it is not what its suffix says.
        OSError, UnicodeDecodeError: If it cannot be read.
    """
    kind = kind_of(path)
    if kind in _COLUMNAR:
        if is_packed(path):
            raise FormatProblem(f"a {kind} file is read in pieces, and this one is packed as a whole", "Unpack it")
        yield from (_parquet_rows if kind == ".parquet" else _arrow_rows)(path, columns)
    elif kind in _TABLES:
        yield from _table_rows(path, _TABLES[kind])
    else:
        with opened(path) as stream:
            yield from json_values(stream, array=kind == ".json")


def _table_rows(path: Path, separator: str) -> Iterator[dict[str, str]]:
    import pandas

    # Python's csv refuses fields of more than 128 KiB, unless a setting of the whole process is changed
    options: dict[str, Any] = {"sep": separator, "dtype": str, "keep_default_na": False, "chunksize": _ROWS_AT_ONCE}
    with opened(path, newline="") as stream:
        try:
            for part in pandas.read_csv(stream, **options):
                yield from part.to_dict("records")
        except pandas.errors.EmptyDataError:
            return
        except pandas.errors.ParserError as error:
            rule = f"it is no table of values parted by {separator!r} ({' '.join(str(error).split())})"
            raise FormatProblem(rule, "Quote values that have a separator or a line break in them") from error


def _parquet_rows(path: Path, columns: Callable[[Sequence[str]], list[str]]) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = columns(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise FormatProblem(f"it is not a readable parquet file ({error})", "Write the file again") from error


def _arrow_rows(path: Path, columns: Callable[[Sequence[str]], list[str]]) -> Iterator[dict[str, Any]]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            # `datasets` writes streams; a table that was written as a file begins with its name
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            wanted = columns(reader.schema.names)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                    yield from batch.select(wanted).slice(start, _ROWS_AT_ONCE).to_pylist()
    except pyarrow.ArrowException as error:
        raise FormatProblem(f"it is not a readable Arrow file ({error})", "Write the file again") from error


def _by_pyarrow(path: Path, codec: str) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression=codec)


@contextlib.contextmanager
def _only_member(path: Path) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if len(names) != 1:
            raise FormatProblem(f"it is an archive of {len(names)} files", "Unpack it, and give one of them")
        with archive.open(names[0]) as member:
            yield member


def _damaged(suffix: str, error: Exception) -> FormatProblem:
    return FormatProblem(f"it is no whole {suffix} file ({error})", "Fetch or pack it again")


_PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".zst": lambda path: _by_pyarrow(path, "zstd"),
    ".lz4": lambda path: _by_pyarrow(path, "lz4"),
    ".zip": _only_member,
}
