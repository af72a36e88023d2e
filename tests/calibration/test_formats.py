"""Every suffix against `datasets`' own readers, and what is said of damaged files."""

import bz2
import gzip
import json
import lzma
import zipfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from notices import notice

from optimum_clp.calibration.formats import FILE_TYPES, kind_of
from optimum_clp.calibration.sources import read_passages
from optimum_clp.errors import CalibrationError

TEXTS = ['one, "two"', "three\nfour", "caf\u00e9\tfive", "x" * 200_000, "last"]
ROWS = [{"id": index, "text": text} for index, text in enumerate(TEXTS)]


def csv_of(separator):
    def quoted(value):
        return '"' + str(value).replace('"', '""') + '"'

    lines = [["id", "text"], *([row["id"], row["text"]] for row in ROWS)]
    return "\n".join(separator.join(map(quoted, line)) for line in lines).encode()


def arrow(as_file):
    table, sink = pyarrow.Table.from_pylist(ROWS), pyarrow.BufferOutputStream()
    with (pyarrow.ipc.new_file if as_file else pyarrow.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def packed_by_arrow(codec):
    def pack(content):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()

    return pack


LINES = "\n".join(map(json.dumps, ROWS)).encode()
CONTENTS = {
    ".csv": csv_of(","),
    ".tsv": csv_of("\t"),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".parquet": parquet(),
    ".arrow": arrow(False),
}
PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": packed_by_arrow("zstd"),
    ".lz4": packed_by_arrow("lz4"),
}


def texts_of(path, **options):
    return [passage.text for passage in read_passages(str(path), **options)]


@pytest.mark.parametrize("suffix", CONTENTS)
def test_each_suffix_gives_the_documents_that_datasets_reads(suffix, tmp_path):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(CONTENTS[suffix])
    assert texts_of(path) == TEXTS
    builder = {".tsv": "csv", ".jsonl": "json", ".ndjson": "json"}.get(suffix, suffix[1:])
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    read = datasets.load_dataset(
        builder, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"), **options
    )
    assert list(read["text"]) == TEXTS
    assert set(CONTENTS) | {".txt"} == set(FILE_TYPES)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_compressed_files_are_read_as_what_is_in_them(packer, suffix, tmp_path):
    path = tmp_path / f"data.v2{suffix}{packer}"
    path.write_bytes(PACKERS[packer](CONTENTS[suffix]))
    assert kind_of(path) == suffix
    assert texts_of(path) == TEXTS


def test_running_text_and_archives_of_one_file(tmp_path):
    words = "one two\nthree\n" * 50
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(words.encode()))
    assert "".join(texts_of(tmp_path / "a.txt.gz")) == words
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("inside.jsonl", LINES)
    assert texts_of(tmp_path / "a.jsonl.zip") == TEXTS
    with zipfile.ZipFile(tmp_path / "b.jsonl.zip", "w") as archive:
        archive.writestr("one.jsonl", LINES)
        archive.writestr("two.jsonl", LINES)
    with pytest.raises(CalibrationError, match="it is an archive of 2 files. Unpack it"):
        texts_of(tmp_path / "b.jsonl.zip")


def test_an_arrow_table_written_as_a_file(tmp_path):
    (tmp_path / "data.arrow").write_bytes(arrow(True))
    assert texts_of(tmp_path / "data.arrow") == TEXTS


@pytest.mark.parametrize("packer", [*PACKERS, ".zip"])
@pytest.mark.parametrize("damage", ["half", "other"])
def test_damaged_compressed_files_are_one_error(packer, damage, tmp_path):
    path = tmp_path / f"data.jsonl{packer}"
    whole = PACKERS[packer](LINES) if packer in PACKERS else b"PK\3\4 no archive"
    path.write_bytes(b"no archive at all" if damage == "other" else whole[: len(whole) // 2])
    with pytest.raises(
        CalibrationError, match=rf"dataset is '.*{packer}': it is no whole {packer} file .*Fetch or pack"
    ):
        texts_of(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"}', r"line 1 is not valid JSON \(Expecting ',' delimiter\)"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', r"line 2 is not valid JSON \(Expecting ',' delimiter"),
        ("a.json", b"[" * 100_000, "line 1 is nested more than 64 deep"),
        ("a.jsonl", b'\n{"text": ' + b"[" * 100_000, "line 2 is nested more than 64 deep"),
        ("a.json", b'[{"text": "a"}, {"text": "b" "c"}]' + b" " * 10**6, "line 1 is not valid JSON"),
        ("a.json", b'{"text": ' + b"9" * 5000 + b"}", "line 1 is not valid JSON"),
        ("a.csv", b'text,other\n"a,b\nc,d', "it is no table of values parted by ','"),
        ("a.arrow", b"no arrow", "it is not a readable Arrow file"),
        ("a.parquet.gz", b"x", "a .parquet file is read in pieces, and this one is packed as a whole. Unpack it"),
    ],
)
def test_damaged_files_say_where(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        texts_of(tmp_path / name)


def test_a_list_is_read_row_by_row(tmp_path):
    """An array of 300 MB in one line of a `.json` is not held whole: the first rows come before the rest is read."""
    path = tmp_path / "data.json"
    with path.open("w") as file:
        file.write("[")
        for index in range(2000):
            file.write(json.dumps({"text": f"{index} " + "y" * 20_000}) + ", ")
        file.write("broken")
    passages = read_passages(str(path))
    assert [next(passages).text.split()[0] for _ in range(1990)] == [str(i) for i in range(1990)]


def test_numbers_escapes_and_literals_that_a_chunk_cuts_in_two_are_whole(tmp_path, monkeypatch):
    from optimum_clp import json_files

    monkeypatch.setattr(json_files, "_CHUNK", 1)
    values = [12345, -1.5e10, True, None, "\u00e9\U0001f600\n", {"a": [1, {"b": "]"}]}, [], ""]
    for text in (json.dumps(values), json.dumps(values, indent=2), " ".join(map(json.dumps, values)), ""):
        (tmp_path / "a.json").write_text(text)
        with (tmp_path / "a.json").open() as stream:
            assert list(json_files.json_values(stream, array=True)) == (values if text else [])


def test_half_a_character_leaves_its_row_out_and_is_counted(tmp_path):
    rows = [
        {"text": "a"},
        {"text": "b \ud83d"},
        {"text": "\U0001f600"},
        {"messages": [{"role": "user", "content": "\udc00"}]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with notice("dataset: 2 rows have half of a character in it"):
        assert texts_of(path) == ["a", "\U0001f600"]
    with notice("1 row has half"):
        assert [p.text for p in read_passages(["a", "\ud800"])] == ["a"]
