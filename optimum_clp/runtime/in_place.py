"""A file whose weights are in it, opened as if they lay beside it: ONNX Runtime maps them, and does not hold them.

ONNX Runtime reads a file of one part whole, copies each weight out of it and, for most products, packs it anew: a process holds the
weights two or three times while a session is made. What lies beside a graph it maps into memory, where it is not this process's own. So the
graph is read here without the weights (protobuf, by its wire format), and says of each where it lies in the same file.
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

# smaller ones are worth no mapping
_SMALLEST = 2**12
# fields of ModelProto, GraphProto, TensorProto and StringStringEntryProto, and TensorProto.EXTERNAL
_GRAPH, _INITIALIZER, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION, _KEY, _VALUE, _EXTERNAL = 7, 5, 9, 13, 14, 1, 2, 1
_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5


def model_in_place(file: str | os.PathLike) -> bytes | None:
    """An ONNX file without its weights, each of which is said to lie in that file.

    Args:
        file (`str` or `os.PathLike`): The ONNX file; only the graph is read.

    Returns:
        `bytes` or `None`: A model, for a session that looks for weights in the file's folder; `None` if no large weight is in the file, or it
        is no ONNX file.
    """
    path = Path(file)
    if not path.stat().st_size:
        return None
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _model(content, path.name)
        except (IndexError, ValueError):  # it ends within a field, or has one that protobuf has not
            return None


def _model(content: mmap.mmap, name: str) -> bytes | None:
    parts: list[bytes] = []
    moved = 0
    for number, start, inner, stop in _fields(content, 0, len(content)):
        if number != _GRAPH:
            parts.append(content[start:stop])
            continue
        graph: list[bytes] = []
        for field, begin, inside, end in _fields(content, inner, stop):
            found = _weight(content, inside, end, name) if field == _INITIALIZER else None
            moved += found is not None
            graph.append(content[begin:end] if found is None else _delimited(_INITIALIZER, found))
        parts.append(_delimited(_GRAPH, b"".join(graph)))
    return b"".join(parts) if moved else None


def _weight(content: mmap.mmap, inner: int, stop: int, name: str) -> bytes | None:
    """A tensor whose numbers lie in the file, `None` if it is small or they are no plain bytes."""
    parts, found = [], None
    for number, start, inside, end in _fields(content, inner, stop):
        if number == _RAW_DATA and end - inside >= _SMALLEST:
            found = inside, end - inside
        else:
            parts.append(content[start:end])
    if found is None:
        return None
    for key, value in (("location", name), ("offset", str(found[0])), ("length", str(found[1]))):
        entry = _delimited(_KEY, key.encode()) + _delimited(_VALUE, value.encode())
        parts.append(_delimited(_EXTERNAL_DATA, entry))
    return b"".join([*parts, varint(_DATA_LOCATION << 3 | _VARINT), varint(_EXTERNAL)])


def _fields(content: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field between two places: its number, where it begins, where its contents begin, and where it ends."""
    place = start
    while place < stop:
        tag, inner = _read_varint(content, place)
        kind = tag & 7
        if kind == _VARINT:
            end = _read_varint(content, inner)[1]
        elif kind == _DELIMITED:
            size, inner = _read_varint(content, inner)
            end = inner + size
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            end = inner + (8 if kind == _EIGHT_BYTES else 4)
        else:
            raise ValueError(kind)
        if end > stop:
            raise IndexError(end)
        yield tag >> 3, place, inner, end
        place = end


def _read_varint(content: mmap.mmap, place: int) -> tuple[int, int]:
    """A number, and where what follows it begins."""
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _delimited(number: int, content: bytes) -> bytes:
    return varint(number << 3 | _DELIMITED) + varint(len(content)) + content


def varint(number: int) -> bytes:
    """Protobuf's variable-length form of a non-negative integer."""
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])
