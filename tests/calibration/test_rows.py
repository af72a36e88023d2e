import itertools
import json
import math

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from notices import notice
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_clp import resume
from optimum_clp.calibration.own import distinct_ngram_share
from optimum_clp.calibration.rows import CalibrationData, load_calibration, load_test_rows, tokenize_dataset
from optimum_clp.configuration.stages import CalibrationConfig
from optimum_clp.errors import CalibrationError

BOS, EOS, FIRST = 1, 2, 3
NUM_WORDS = 4000


def make_tokenizer(adds_bos=False, **special):
    """Word `w7` is token `FIRST + 7`; line ends are white space."""
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS, **{f"w{i}": FIRST + i for i in range(NUM_WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    )


def make_model(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": FIRST + NUM_WORDS,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model()


def words(start, stop):
    return " ".join(f"w{i}" for i in range(start, stop))


def ids(start, stop):
    return list(range(FIRST + start, FIRST + stop))


def config_for(dataset, **changes):
    small = {"sequence_length": 8, "train_sequences": 20, "validation_sequences": 5, "test_sequences": 5}
    small["self_written_share"] = 0.0
    return CalibrationConfig(dataset=dataset, **{**small, **changes})


def splits(data):
    return [data.train, data.validation, data.test]


DOCUMENTS = [words(10 * i, 10 * i + 10) for i in range(100)]


@pytest.mark.parametrize("kind", ["list", "one document", "file"])
def test_splits_share_no_token_and_depend_on_the_seed_alone(tokenizer, model, tmp_path, kind):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(words(i, i + 10) for i in range(0, NUM_WORDS, 10)))
    dataset = {"list": DOCUMENTS, "one document": [words(0, 1000)], "file": str(file)}[kind]
    data = load_calibration(config_for(dataset), tokenizer, model, seed=0)
    assert [tuple(split.shape) for split in splits(data)] == [(20, 8), (5, 8), (5, 8)]
    assert all(split.dtype == torch.int64 and split.device.type == "cpu" for split in splits(data))
    # every word occurs once in the source, so a word in two splits is a position in two splits
    used = [set(split.flatten().tolist()) - {BOS, EOS} for split in splits(data)]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(used, 2))
    assert sum(map(len, used)) == sum((split >= FIRST).sum().item() for split in splits(data))
    again = load_calibration(config_for(dataset), tokenizer, model, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(splits(data), splits(again), strict=True))
    if kind == "list":
        other = load_calibration(config_for(dataset), tokenizer, model, seed=1)
        assert not torch.equal(other.train, data.train)


def test_a_long_plain_text_is_sampled_across_the_file(tokenizer, model, tmp_path):
    file = tmp_path / "text.txt"
    # 60 lines of 4000 words; line k starts with word k
    file.write_text("\n".join(f"w{k} " + "w0 " * 4000 for k in range(60)))
    config = config_for(str(file), sequence_length=64, train_sequences=100)
    markers = []
    for seed in range(3):
        rows = torch.cat(splits(load_calibration(config, tokenizer, model, seed=seed)))
        markers.append(sorted(set(rows[rows > FIRST].tolist())))
    assert all(markers) and len({tuple(marker) for marker in markers}) == 3


def test_documents_keep_the_tokenizers_own_marks(model):
    documents = [words(0, 5), "  \n ", words(5, 9)]
    plain = tokenize_dataset(documents, make_tokenizer(), sequence_length=11)
    assert plain.tolist() == [[*ids(0, 5), EOS, *ids(5, 9), EOS]]
    marked = tokenize_dataset(documents, make_tokenizer(adds_bos=True), sequence_length=11)
    assert marked.tolist() == [[BOS, *ids(0, 5), BOS, *ids(5, 9)]]
    without = tokenize_dataset(documents, make_tokenizer(eos_token=None), sequence_length=9)
    assert without.tolist() == [ids(0, 9)]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_plain_text_file_is_one_running_text(tmp_path, adds_bos):
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeff".encode() + "\r\n\r\n".join(words(i, i + 5) for i in range(0, 100, 5)).encode())
    rows = tokenize_dataset(str(file), make_tokenizer(adds_bos), sequence_length=9)
    expected = ([BOS] if adds_bos else []) + ids(0, 100)
    expected = expected[: len(expected) // 9 * 9]
    if adds_bos:
        expected[::9] = [BOS] * (len(expected) // 9)
    assert rows.flatten().tolist() == expected


def test_every_row_begins_as_a_document_does(model):
    documents = [words(i, i + 7) for i in range(0, NUM_WORDS - 7, 7)]
    config = config_for(documents, sequence_length=16)
    plain, marked = (
        torch.cat(splits(load_calibration(config, make_tokenizer(adds_bos), model, seed=0)))
        for adds_bos in (False, True)
    )
    assert (marked[:, 0] == BOS).all() and (plain != BOS).all()
    # documents inside a row keep theirs
    assert ((marked == BOS).sum(1) > 1).all()
    short = tokenize_dataset(documents, make_tokenizer(adds_bos=True), sequence_length=1, num_sequences=3)
    assert short.tolist() == [[BOS]] * 3


def test_one_endless_line_is_cut_between_words(tokenizer, model, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(words(0, NUM_WORDS))
    config = config_for(str(file), sequence_length=64, train_sequences=50)
    rows = torch.cat(splits(load_calibration(config, tokenizer, model, seed=0)))
    assert (rows >= FIRST).all()
    assert len(rows.unique()) == rows.numel()


@pytest.mark.parametrize("kind", ["json", "json lines", "jsonl", "parquet", "json strings"])
def test_every_file_type_gives_the_same_tokens(tokenizer, tmp_path, kind):
    rows = [{"id": i, "story": text} for i, text in enumerate(DOCUMENTS)]
    rows.insert(3, {"id": -1, "story": None})
    path = tmp_path / f"data.{kind.split()[0]}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "json strings":
        path.write_text(json.dumps(DOCUMENTS))
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)))
    got = tokenize_dataset(str(path), tokenizer, sequence_length=50, text_column="story")
    assert torch.equal(got, tokenize_dataset(DOCUMENTS, tokenizer, sequence_length=50))
    assert len(got) == 22


def test_measuring_takes_rows_from_the_start_or_all(tokenizer):
    rows = tokenize_dataset([words(0, 100)], tokenizer, sequence_length=8)
    assert rows.shape == (12, 8)
    assert torch.equal(tokenize_dataset([words(0, 100)], tokenizer, sequence_length=8, num_sequences=3), rows[:3])


def test_reading_stops_when_there_is_enough(tokenizer, model, tmp_path):
    file = tmp_path / "data.jsonl"
    line = json.dumps({"text": words(0, 100)})
    lines = 1 + 2**22 // len(words(0, 100))  # so much is read ahead, to be shuffled
    file.write_text("\n".join([line] * lines + ["{broken"]))
    load_calibration(config_for(str(file)), tokenizer, model, seed=0)
    tokenize_dataset(str(file), tokenizer, sequence_length=8, num_sequences=3)
    with pytest.raises(
        CalibrationError, match=rf"data.jsonl.*line {lines + 1} is not valid JSON .*Correct or remove that line"
    ):
        tokenize_dataset(str(file), tokenizer, sequence_length=8)


def test_little_of_a_large_file_is_tokenized(tokenizer, model, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text((words(0, 1000) + "\n") * 500)
    characters = []

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, texts, **options):
            characters.append(sum(map(len, texts)))
            return tokenizer(texts, **options)

    tokenize_dataset(str(file), Counting(), sequence_length=8, num_sequences=3)
    load_calibration(config_for(str(file)), Counting(), model, seed=0)
    assert sum(characters) < file.stat().st_size / 3


def test_rows_are_no_longer_than_the_models_context(tokenizer, model):
    config = config_for([words(0, NUM_WORDS)], sequence_length=256)
    data = load_calibration(config, tokenizer, model, seed=0)
    assert data.sequence_length == 64
    assert data.to_dict() == {
        "source": "list of 1 strings",
        "sequence_length": 64,
        "train_sequences": 20,
        "validation_sequences": 5,
        "test_sequences": 5,
        "statistics": None,
        "train_kinds": {"given": 20},
        "validation_kinds": {"given": 5},
        "test_kinds": {"given": 5},
        "mask": "all",
    }


def test_too_little_text_says_how_much_is_needed(tokenizer, model):
    message = (
        r"8 rows of 8 tokens, the least there must be, need 64 tokens, and it has 61\. Give more text, or lower cal"
    )
    with pytest.raises(CalibrationError, match=message):
        load_calibration(config_for([words(0, 60)]), tokenizer, model, seed=0)
    with pytest.raises(CalibrationError, match="1 rows of 200 tokens need 200 tokens, and it has 101"):
        tokenize_dataset([words(0, 100)], tokenizer, sequence_length=200)


def test_less_text_than_planned_is_a_warning_with_the_number_of_rows(tokenizer, model):
    told = r"the text has 101 tokens, which is 12 rows of 8 instead of the 30 that are planned: 6 train, 3 validation and 3 test"
    with notice(told):
        data = load_calibration(config_for([words(0, 100)]), tokenizer, model, seed=0)
    assert [len(part) for part in splits(data)] == [6, 3, 3]
    found = torch.cat(splits(data)).flatten().tolist()
    assert len(set(found)) == len(found)  # no token of the text is in two rows
    with notice("the text has 12 rows of 8 tokens, not 13"):
        assert len(tokenize_dataset([words(0, 100)], tokenizer, sequence_length=8, num_sequences=13)) == 12


def test_a_text_just_long_enough_begins(tokenizer, model):
    with notice("8 rows of 8 instead of the 30"):
        data = load_calibration(config_for([words(0, 63)]), tokenizer, model, seed=0)
    assert [len(part) for part in splits(data)] == [4, 2, 2]


def test_more_rows_than_memory_are_refused_before_any_text_is_read(model):
    message = r"calibration.train_sequences is 2147483647: with the other splits these rows of 64 tokens take .* bytes"
    with pytest.raises(CalibrationError, match=message):
        load_calibration(config_for("missing.txt", sequence_length=64, train_sequences=2**31 - 1), None, model, seed=0)


@pytest.mark.parametrize("wrong", [5, b"a.txt", {"text": "a"}, [], [1], object(), 2.5])
def test_what_is_no_source_is_refused_with_its_type(tokenizer, wrong):
    with pytest.raises(
        CalibrationError, match=f"text is .*: .* and this is a {type(wrong).__name__}. Give one of them; of a"
    ):
        tokenize_dataset(wrong, tokenizer, sequence_length=8, name="text")


def test_datasets_are_refused_with_the_line_that_works(tokenizer):
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    for given in (rows, rows.to_iterable_dataset()):
        with pytest.raises(
            CalibrationError, match=rf'this is a {type(given).__name__}. .*the column, dataset\["text"\]'
        ):
            tokenize_dataset(given, tokenizer, sequence_length=8)
    expected = tokenize_dataset(DOCUMENTS, tokenizer, sequence_length=8)
    for given in (rows["text"], tuple(DOCUMENTS), iter(DOCUMENTS)):
        assert torch.equal(tokenize_dataset(given, tokenizer, sequence_length=8), expected)


def test_exactly_enough_text_is_enough(tokenizer, model):
    data = load_calibration(config_for([words(0, 239)]), tokenizer, model, seed=0)
    assert sorted(torch.cat(splits(data)).flatten().tolist()) == [EOS, *ids(0, 239)]


BAD_FILES = {
    "empty.txt": (b"", "it is empty: there is no text in it"),
    "blank.txt": (b" \n\n ", "it is empty"),
    "empty.json": (b"", "it is empty"),
    "empty.jsonl": (b"\n\n", "it is empty"),
    "latin.txt": ("caf\u00e9 ".encode("latin-1") * 90, r"it is not UTF-8 text \(.*\)\. Convert it to UTF-8"),
    "latin.jsonl": (b'{"text": "caf\xe9 "}', "it is not UTF-8 text"),
    "column.jsonl": (b'{"a": "x", "b": "y"}', r"it has no column 'text'; its columns are 'a', 'b'\. Name the column"),
    "broken.json": (b'[{"text": "a"},\n{"text" "b"}]', "line 2 is not valid JSON"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": ', "line 3 is not valid JSON"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 5}', "row 2 holds a int where text should be"),
    "broken.parquet": (b"PAR1 hello", "it is not a readable parquet file"),
}


@pytest.mark.parametrize("file", BAD_FILES)
def test_bad_files_are_named_with_what_is_wrong(tokenizer, model, tmp_path, file):
    contents, message = BAD_FILES[file]
    path = tmp_path / file
    path.write_bytes(contents)
    with pytest.raises(CalibrationError, match=rf"(?s)calibration.dataset is '.*{file}': .*{message}"):
        load_calibration(config_for(str(path)), tokenizer, model, seed=0)


def test_parquet_without_the_column_names_those_there_are(tokenizer, tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": "x", "b": 1}]), path)
    with pytest.raises(CalibrationError, match="it has no column 'text'; its columns are 'a', 'b'"):
        tokenize_dataset(str(path), tokenizer, sequence_length=8)


@pytest.mark.parametrize("path", ["missing.txt", "./missing", "folder/data.PARQUET"])
def test_a_missing_file_is_not_looked_up_on_the_hub(tokenizer, monkeypatch, path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("looked up"))
    with pytest.raises(CalibrationError, match=f"--dataset is '{path}': there is no such file. Check the path"):
        tokenize_dataset(path, tokenizer, sequence_length=8, name="--dataset")


def test_a_folder_is_refused(tokenizer, tmp_path):
    with pytest.raises(
        CalibrationError,
        match=r"it is a folder. Give one file \(.txt, .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow\)",
    ):
        tokenize_dataset(str(tmp_path), tokenizer, sequence_length=8)


def test_text_without_a_tokenizer_is_refused(model):
    with pytest.raises(CalibrationError, match="text needs a tokenizer.*Give tokenizer=, or leave the text out"):
        load_calibration(config_for(DOCUMENTS), None, model, seed=0)
    with pytest.raises(CalibrationError, match="text needs a tokenizer"):
        tokenize_dataset(DOCUMENTS, None, sequence_length=8)


def test_tokens_beyond_the_models_vocabulary_are_refused(tokenizer):
    small = make_model(vocab_size=100)
    load_calibration(config_for([words(0, 97)] * 9), tokenizer, small, seed=0)
    message = "token is 100: the text has this token, and the model's vocabulary ends at 99"
    with pytest.raises(CalibrationError, match=message):
        load_calibration(config_for([words(0, 98)] * 9), tokenizer, small, seed=0)


@pytest.fixture
def hub(monkeypatch):
    """Answers `load_dataset` with the documents and records how it was called."""
    calls = []

    def load_dataset(path, config, split, streaming):
        calls.append((path, config, split, streaming))
        return [{"text": text} for text in DOCUMENTS]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return calls


@pytest.mark.parametrize(
    ("name", "calibration", "evaluation"),
    [
        (
            "wikitext2",
            ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False),
            ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False),
        ),
        ("c4", ("allenai/c4", "en", "train", True), ("allenai/c4", "en", "validation", True)),
        ("c4:de:validation", ("allenai/c4", "de", "validation", True), ("allenai/c4", "de", "validation", True)),
        ("me/stories", ("me/stories", None, "train", True), ("me/stories", None, "train", True)),
        ("me/stories::test", ("me/stories", None, "test", True), ("me/stories", None, "test", True)),
        ("me/stories:en", ("me/stories", "en", "train", True), ("me/stories", "en", "train", True)),
    ],
)
def test_hub_names(tokenizer, model, hub, name, calibration, evaluation):
    data = load_calibration(config_for(name), tokenizer, model, seed=0)
    rows = tokenize_dataset(name, tokenizer, sequence_length=8)
    assert hub == [calibration, evaluation]
    assert data.source == name
    # WikiText's rows are paragraphs of one running text
    assert (rows == EOS).any() == (name != "wikitext2")


@pytest.mark.parametrize("seen", [False, True])
def test_datasets_draws_no_bars_into_a_log(tokenizer, hub, monkeypatch, seen):
    drawn = []
    answer = datasets.load_dataset
    monkeypatch.setattr("optimum_clp.calibration.sources.draws_bars", lambda: seen)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **k: drawn.append(not datasets.are_progress_bars_disabled()) or answer(*a, **k),
    )
    tokenize_dataset("me/stories", tokenizer, sequence_length=8)
    assert drawn == [seen] and not datasets.are_progress_bars_disabled()


def test_offline_only_the_cache_is_read(tokenizer, hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    tokenize_dataset("c4", tokenizer, sequence_length=8)
    assert hub == [("allenai/c4", "en", "validation", False)]


def test_a_local_file_wins_over_a_hub_name(tokenizer, hub, monkeypatch, tmp_path, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").write_text(words(0, 1000))
    data = load_calibration(config_for("c4"), tokenizer, model, seed=0)
    assert not hub
    assert data.source == "c4"
    assert load_calibration(config_for(str(tmp_path / "c4")), tokenizer, model, seed=0).source == "c4"


@pytest.mark.parametrize("name", ["wikitext2", "c4", "me/no-such-dataset:en"])
def test_a_hub_that_cannot_be_reached(tokenizer, model, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = (
        rf"calibration.dataset is '{name}': the dataset .* the Hugging Face Hub could not be reached\. Give a local"
    )
    with pytest.raises(CalibrationError, match=message + ".* leave it out: then the model writes its own text"):
        load_calibration(config_for(name), tokenizer, model, seed=0)


def test_other_hub_errors_are_passed_on(tokenizer, hub, monkeypatch):
    def load_dataset(*arguments, **options):
        raise ValueError("Unknown split 'tset'")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        CalibrationError, match="could not be loaded .ValueError: Unknown split 'tset'.*id:config:split"
    ):
        tokenize_dataset("me/stories::tset", tokenizer, sequence_length=8)


def test_self_written_text_needs_no_tokenizer(model, tmp_path):
    config = config_for(None, cache_dir=str(tmp_path), temperature=0.9)
    data = load_calibration(config, None, model, seed=4, quiet=True)
    assert isinstance(data, CalibrationData) and data.source == "self-written"
    assert [tuple(split.shape) for split in splits(data)] == [(20, 8), (5, 8), (5, 8)]
    with torch.no_grad():
        logits = model(data.train).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.train[:, 1:].flatten()).item()
    ngrams = [tuple(row[i : i + 4]) for row in data.train.tolist() for i in range(5)]
    assert data.to_dict()["statistics"] == {
        "distinct_4gram_share": len(set(ngrams)) / 100,
        "dense_perplexity": pytest.approx(math.exp(loss), rel=1e-4),
        "seed": 4,
        "temperature": 0.9,
        "conversations": None,
    }
    json.dumps(data.to_dict())
    assert len(torch.unique(torch.cat(splits(data)), dim=0)) == 30
    other = load_calibration(config, None, model, seed=5, quiet=True)
    assert not torch.equal(other.train, data.train)


def test_the_weights_are_read_once_for_both_samples(model, tmp_path, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return resume.weights_fingerprint(*arguments)

    monkeypatch.setattr("optimum_clp.calibration.own.weights_fingerprint", counted)
    monkeypatch.setattr("optimum_clp.calibration.writing.weights_fingerprint", counted)
    load_calibration(config_for(None, cache_dir=str(tmp_path)), None, model, seed=0, quiet=True)
    assert len(calls) == 1
    assert len(list((tmp_path / "optimum_clp").iterdir())) == 2


def test_text_that_repeats_itself_is_a_warning(tmp_path):
    model = make_model()
    with torch.no_grad():
        # token 7 always follows, whatever was before
        model.model.embed_tokens.weight.fill_(1.0)
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1.0
    message = r"only 2\.0% of the 4-grams .* are distinct .*calibration.dataset, or raise calibration.temperature"
    with notice(message):
        data = load_calibration(config_for(None, cache_dir=str(tmp_path)), None, model, seed=0, quiet=True)
    # per row: BOS 7 7 7, then 7 7 7 7
    assert data.statistics["distinct_4gram_share"] == 2 / 100


def test_distinct_ngram_share():
    tokens = torch.tensor([[1, 2, 1, 2, 1], [3, 1, 2, 4, 4]])
    # 12 21 12 21 | 31 12 24 44
    assert distinct_ngram_share(tokens, 2) == 5 / 8
    assert distinct_ngram_share(tokens, 5) == 1


@pytest.mark.parametrize(("share", "train", "validation"), [(0.5, 10, 2), (0.01, 1, 1), (0.99, 19, 4), (1.0, 20, 5)])
def test_given_and_self_written_rows_are_mixed(tokenizer, model, tmp_path, share, train, validation):
    changes = {"cache_dir": str(tmp_path), "self_written_share": share}
    data = load_calibration(config_for(DOCUMENTS, **changes), tokenizer, model, seed=0, quiet=True)
    written = load_calibration(
        config_for(None, train_sequences=train, validation_sequences=validation, cache_dir=str(tmp_path)),
        tokenizer,
        model,
        seed=0,
        quiet=True,
    )
    assert [tuple(split.shape) for split in splits(data)] == [(20, 8), (5, 8), (5, 8)]
    rows = {tuple(row) for row in data.train.tolist()}
    own = {tuple(row) for row in written.train.tolist()}
    assert own <= rows and len(own) == train
    assert data.validation_kinds == ("given",) * (5 - validation) + ("plain",) * validation
    assert (
        sorted(data.train_kinds) == ["given"] * (20 - train) + ["plain"] * train and data.test_kinds == ("given",) * 5
    )
    assert torch.equal(data.validation[5 - validation :], written.validation)
    assert data.source.endswith(" and self-written") and data.statistics["seed"] == 0
    # what is measured on is given text, and none of it is trained on
    used = set(data.test.flatten().tolist()) - {BOS, EOS}
    others = [r for r in data.train.tolist() if tuple(r) not in own] + data.validation[: 5 - validation].tolist()
    assert used.isdisjoint({token for row in others for token in row})


def test_rows_of_both_kinds_come_first(tokenizer, model, tmp_path):
    config = config_for(DOCUMENTS, cache_dir=str(tmp_path), self_written_share=0.5)
    first = load_calibration(config, tokenizer, model, seed=0, quiet=True)
    again = load_calibration(config, tokenizer, model, seed=0, quiet=True)
    assert torch.equal(first.train, again.train)
    written = {tuple(r) for r in first.train.tolist() if r[0] == BOS and r.count(EOS) == 0}
    assert 0 < sum(tuple(r) in written for r in first.train[:10].tolist()) < 10


@pytest.mark.parametrize("dataset", [None, DOCUMENTS, DOCUMENTS[:12]])
@pytest.mark.notices
def test_test_rows_alone_are_those_of_the_whole(dataset, tokenizer, model, tmp_path):
    config = config_for(dataset, self_written_share=0.5, cache_dir=str(tmp_path))
    whole = load_calibration(config, tokenizer, model, seed=3)
    assert torch.equal(load_test_rows(config, tokenizer, model, seed=3), whole.test)
