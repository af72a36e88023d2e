"""Where text comes from: a local file, a list of strings, or a `datasets` name; read lazily, passage by passage.

Local files are read directly, not through `datasets`, which would leave a converted copy of each in the user's cache.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configuration.rules import source_of_text, text_source
from ..errors import CalibrationError
from ..json_files import JsonProblem, is_whole
from ..progress import draws_bars
from .chats import COLUMNS, Message, chat_columns, messages_of
from .formats import FILE_TYPES, FormatProblem, has_rows, is_packed, kind_of, opened, rows_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Passage:
    """A stretch of text, or a conversation.

    Args:
        text (`str`): Not blank; of a conversation, what is said.
        opens (`bool`): A document begins with it.
        closes (`bool`): A document ends with it.
        messages (`tuple[dict, ...]`): Of a conversation, with `role` and `content`; empty for text.
    """

    text: str
    opens: bool = True
    closes: bool = True
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub, as `datasets.load_dataset` takes it.

    Args:
        path (`str`): Its id.
        config (`str` or `None`): The configuration.
        split (`str`): The split for calibration.
        evaluation_split (`str`): The split for measuring.
        streaming (`bool`): Only what is needed is downloaded.
        running_text (`bool`): The rows are lines of one text, not documents.
    """

    path: str
    config: str | None = None
    split: str = "train"
    evaluation_split: str = "train"
    streaming: bool = True
    running_text: bool = False


# of a text file, in characters, for what no text has; as `git` and `grep` do
_LOOKED_AT = 8000
_CONNECTION_ERRORS = {
    "ConnectionError",
    "TimeoutError",
    "Timeout",
    "TransportError",
    "ClientConnectionError",
    "LocalEntryNotFoundError",
}
# WikiText-2 is small and not streamed, so that a copy in the user's cache serves offline
_ALIASES = {
    "wikitext2": HubDataset(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        evaluation_split="test",
        streaming=False,
    ),
    "c4": HubDataset("allenai/c4", "en", evaluation_split="validation"),
}


def describe(dataset: str | list[str]) -> str:
    """The source in a few words, for a report: a file's name without its folder, a dataset's name, a list's length."""
    if not isinstance(dataset, str):
        return f"list of {len(dataset)} strings"
    return Path(dataset).name if Path(dataset).exists() else dataset


def describe_text(dataset: str | list[str], text_column: str = "text") -> str:
    """As [`describe`]; of a file also what is in it, since its name alone may say nothing: `"conversations (test.jsonl)"`.

    Raises:
        CalibrationError: If the file cannot be read.
    """
    if not isinstance(dataset, str) or not Path(dataset).exists():
        return describe(dataset)
    first = next(read_passages(dataset, text_column=text_column, evaluation=True), None)
    return f"{'conversations' if first is not None and first.messages else 'plain text'} ({describe(dataset)})"


def hub_dataset(dataset: str | list[str] | None) -> str | None:
    """The Hub id of a dataset: `Salesforce/wikitext` for `wikitext2`; `None` for the user's own text."""
    if not isinstance(dataset, str) or Path(dataset).exists():
        return None
    return _parse_name(dataset, evaluation=False).path


def checked_source(dataset: Any, name: str) -> str | list[str]:
    """A source as [`read_passages`] takes it, from what people have: also a path, a tuple, a column, a generator of strings.

    Raises:
        CalibrationError: If it is something else; names its type.
    """
    rule, kept = source_of_text(), text_source(dataset)
    if not rule.holds(kept):
        shown = dataset if isinstance(dataset, (str, bytes, int, float)) else type(dataset).__name__
        told = f"{rule.text}, and this is a {type(dataset).__name__}"
        raise CalibrationError.of(name, shown, told, rule.remedy)
    return kept


def read_passages(
    dataset: str | list[str],
    *,
    text_column: str = "text",
    piece_characters: int = 2**18,
    evaluation: bool = False,
    name: str = "dataset",
) -> Iterator[Passage]:
    """The passages of a source, in its order, read as they are asked for.

    Args:
        dataset (`str` or `list[str]`): A file; a list of documents; or a `datasets` name `id[:config[:split]]`. A
            local path that exists wins over a name. A file of another type than
            [`~optimum_clp.calibration.formats`] has is read as plain text.
        text_column (`str`): The column with the text, where there are columns.
        piece_characters (`int`): Running text (a plain text file) comes in pieces of about so many characters, cut at
            the ends of lines; rows of the other sources come whole, one document each.
        evaluation (`bool`): For a name without a split: the split that is usual for measuring, not the one for
            training. Only the aliases `wikitext2` and `c4` have one.
        name (`str`): What the source is called in errors.

    Raises:
        CalibrationError: If the source is missing, cannot be read, or does not have the column.
    """
    if not isinstance(dataset, str):
        return _documents(dataset, name)
    path = Path(dataset).expanduser()
    if path.exists() or _looks_like_a_file(dataset):
        return _read_file(path, dataset, text_column, piece_characters, name)
    return _read_hub(_parse_name(dataset, evaluation), dataset, text_column, piece_characters, name)


def _looks_like_a_file(dataset: str) -> bool:
    return kind_of(dataset) in FILE_TYPES or is_packed(dataset) or dataset.startswith((".", "~", "/", "\\"))


def _read_file(path: Path, shown: str, text_column: str, piece_characters: int, name: str) -> Iterator[Passage]:
    if not path.exists():
        raise CalibrationError.of(name, shown, "there is no such file", "Check the path")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no ordinary file"
        raise CalibrationError.of(name, shown, f"it is {kind}", f"Give one file ({', '.join(FILE_TYPES)})")

    def wanted(there: Sequence[str]) -> list[str]:
        columns = [text_column] if text_column in there else chat_columns(there)
        if not columns:
            raise _missing_column(name, shown, text_column, list(there))
        return columns

    try:
        if has_rows(path):
            yield from _documents(_texts(rows_of(path, wanted), shown, text_column, name), name)
        else:
            with opened(path) as lines:
                yield from _running_text(_of_text(_bounded_lines(lines, piece_characters)), piece_characters)
    except JsonProblem as problem:
        raise CalibrationError.of(name, shown, problem.rule, "Correct or remove that line") from problem
    except FormatProblem as problem:
        raise CalibrationError.of(name, shown, problem.rule, problem.remedy) from problem
    except UnicodeDecodeError as error:
        rule = f"it is not UTF-8 text ({error.reason})"
        raise CalibrationError.of(name, shown, rule, "Convert it to UTF-8, for example with iconv -t UTF-8") from error
    except OSError as error:
        raise CalibrationError.of(
            name, shown, f"it cannot be read ({error})", "Check the file and its permissions"
        ) from error


def _bounded_lines(file: Any, limit: int) -> Iterator[str]:
    """The lines of a text file; one of more than `limit` characters comes in parts, cut after white space if it can."""
    rest = ""
    while part := file.readline(limit):
        part = rest + part
        rest = ""
        if not part.endswith("\n") and len(part) >= limit:
            cut = max(part.rfind(" "), part.rfind("\t")) + 1
            part, rest = (part[:cut], part[cut:]) if cut > 0 else (part, "")
        yield part
    if rest:
        yield rest


def _of_text(lines: Iterator[str]) -> Iterator[str]:
    """Refuse what UTF-8 can read and is no text: UTF-16 without its mark, or numbers of a program."""
    characters = 0
    for line in lines:
        if characters < _LOOKED_AT and "\0" in line[: _LOOKED_AT - characters]:
            rule = "it is no text in UTF-8: there are NUL characters in its beginning"
            raise FormatProblem(rule, "Give a text file; one in UTF-16 can be converted with iconv -f UTF-16 -t UTF-8")
        characters += len(line)
        yield line


def _running_text(lines: Iterable[str], piece_characters: int) -> Iterator[Passage]:
    piece: list[str] = []
    size, opens = 0, True
    for line in itertools.chain(lines, [None]):
        if line is not None:
            piece.append(line)
            size += len(line)
        if line is None or size >= piece_characters:
            text = "".join(piece)
            if text.strip():
                yield Passage(text, opens=opens, closes=False)
                opens = False
            piece, size = [], 0


def _texts(rows: Iterable[Any], shown: str, text_column: str, name: str) -> Iterator[str | list[Message]]:
    for number, row in enumerate(rows, 1):
        text = row
        if isinstance(row, dict):
            text = row.get(text_column)
            if text_column not in row or isinstance(text, (list, tuple)):
                # the column that is named may itself hold the messages
                columns = row if text_column not in row else {"messages": text}
                if not chat_columns(columns):
                    raise _missing_column(name, shown, text_column, list(row))
                yield messages_of(columns, shown, name, number)
                continue
        if text is None:
            continue
        if not isinstance(text, str):
            rule = f"row {number} holds a {type(text).__name__} where text should be"
            raise CalibrationError.of(name, shown, rule, "Give rows that are strings, or objects with a text column")
        yield text


def _documents(texts: Iterable[str | list[Message]], name: str) -> Iterator[Passage]:
    """A passage for each text that is not blank; those with half a character in them are left out, and counted."""
    halves = 0
    try:
        for text in texts:
            said = text if isinstance(text, str) else "\n".join(message["content"] for message in text)
            if not is_whole(said):
                halves += 1
            elif not isinstance(text, str):
                yield Passage(said, messages=tuple(text))
            elif said.strip():
                yield Passage(said)
    finally:
        if halves:
            rows = f"{halves} row{'s have' if halves > 1 else ' has'}"
            logger.warning(f"{name}: {rows} half of a character in it (a lone surrogate) and is left out")


def _parse_name(dataset: str, evaluation: bool) -> HubDataset:
    identifier, config, split = (dataset.split(":", 2) + ["", ""])[:3]
    base = _ALIASES.get(identifier, HubDataset(identifier))
    return HubDataset(
        base.path,
        config or base.config,
        split or (base.evaluation_split if evaluation else base.split),
        streaming=base.streaming,
        running_text=base.path == "Salesforce/wikitext",
    )


def _read_hub(source: HubDataset, shown: str, text_column: str, piece_characters: int, name: str) -> Iterator[Passage]:
    import datasets

    # offline, only a copy in the user's cache can be read, and only without streaming
    streaming = source.streaming and not datasets.config.HF_HUB_OFFLINE
    try:
        with _bars_where_they_are_seen():
            rows = datasets.load_dataset(source.path, source.config, split=source.split, streaming=streaming)
        texts = _texts(rows, shown, text_column, name)
        if source.running_text:
            # joined as published perplexities on WikiText join it
            yield from _running_text((f"{text}\n\n" for text in texts), piece_characters)
        else:
            yield from _documents(texts, name)
    except CalibrationError:
        raise
    except Exception as error:
        advice = "Give a local file or a list of strings, or leave it out: then the model writes its own text"
        if _is_connection_error(error):
            rule = f"the dataset {source.path} is not in the cache and the Hugging Face Hub could not be reached"
            raise CalibrationError.of(name, shown, rule, advice) from error
        rule = f"the dataset {source.path} could not be loaded ({type(error).__name__}: {error})"
        raise CalibrationError.of(name, shown, rule, f"Give id, id:config or id:config:split. {advice}") from error


@contextlib.contextmanager
def _bars_where_they_are_seen() -> Iterator[None]:
    """Let `datasets` draw no bars into a log, unless its own variable asks for them."""
    import datasets

    asked = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None
    if asked or draws_bars() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _is_connection_error(error: BaseException | None) -> bool:
    """Whether the network is to blame: requests, httpx, aiohttp and huggingface_hub each have classes of their own."""
    while error is not None:
        names = {cls.__name__ for cls in type(error).__mro__}
        if names & _CONNECTION_ERRORS:
            return True
        error = error.__cause__ or error.__context__
    return False


def _missing_column(name: str, shown: str, text_column: str, columns: list) -> CalibrationError:
    rule = f"it has no column {text_column!r}; its columns are {', '.join(map(repr, columns)) or 'none'}"
    remedy = f"Name the column with the text in calibration.text_column, or give conversations ({', '.join(COLUMNS)})"
    return CalibrationError.of(name, shown, rule, remedy)
