import csv
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from chat_templates import CHATML, FAMILIES, chat_tokenizer
from notices import notice, notices
from test_conversations import chat_model

from optimum_clp.calibration.chat_rows import packed, spoken
from optimum_clp.calibration.rows import load_calibration, tokenize_dataset
from optimum_clp.calibration.sources import read_passages
from optimum_clp.calibration.templates import split_template
from optimum_clp.configuration.stages import CalibrationConfig
from optimum_clp.errors import CalibrationError

TALK = [
    {"role": "user", "content": "Ask one?"},
    {"role": "assistant", "content": "Say one."},
    {"role": "user", "content": "Ask two?"},
    {"role": "assistant", "content": "Say two."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return chat_model(tokenizer)


def config_for(path, tmp_path, **changes):
    small = {"sequence_length": 128, "train_sequences": 6, "validation_sequences": 3, "test_sequences": 2}
    return CalibrationConfig(
        dataset=str(path), **{**small, "self_written_share": 0.0, "cache_dir": str(tmp_path), **changes}
    )


def file_of(rows, tmp_path, kind="jsonl"):
    path = tmp_path / f"talks.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows([{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows])
        path.write_text(text.getvalue())
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


FORMATS = {
    "messages": ({"messages": TALK}, TALK),
    "sharegpt": (
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK
            ]
        },
        TALK,
    ),
    "alpaca": ({"instruction": "Ask one?", "input": "", "output": "Say one."}, TALK[:2]),
    "alpaca with input": (
        {"instruction": "Ask", "input": "one?", "output": "Say one."},
        [{"role": "user", "content": "Ask\n\none?"}, TALK[1]],
    ),
    "prompt and completion": ({"prompt": "Ask one?", "completion": "Say one."}, TALK[:2]),
    "both as messages": ({"prompt": TALK[:1], "completion": TALK[1:2]}, TALK[:2]),
    "prompt": ({"prompt": "Ask one?"}, TALK[:1]),
    "messages without answer": ({"messages": TALK[:3]}, TALK[:3]),
}


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "csv"])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "both as messages"])
def test_every_format_is_read_from_every_file(tmp_path, name, kind):
    row, expected = FORMATS[name]
    passages = list(read_passages(str(file_of([row, row], tmp_path, kind))))
    assert [list(passage.messages) for passage in passages] == [expected] * 2


def test_prompt_and_completion_may_be_messages(tmp_path):
    row, expected = FORMATS["both as messages"]
    assert list(next(read_passages(str(file_of([row], tmp_path)))).messages) == expected


def test_a_named_column_may_hold_the_messages(tmp_path):
    path = file_of([{"talk": TALK, "prompt": "not this"}], tmp_path)
    assert list(next(read_passages(str(path), text_column="talk")).messages) == TALK


BAD = {
    "role": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        "row 1 has a message of the unknown role 'narrator'",
    ),
    "empty": (
        {"messages": [TALK[0], {"role": "assistant", "content": " "}]},
        "row 1 has an empty turn of the assistant",
    ),
    "missing": ({"conversations": [{"from": "human"}]}, "row 1 has an empty turn of the user"),
    "none": ({"messages": []}, "row 1 holds no list of messages"),
    "text": ({"messages": "hello"}, "row 1 holds a text where a list of messages should be"),
    "null": ({"prompt": None}, "row 1 holds no conversation"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_conversations_are_named(tmp_path, case, tokenizer, model):
    row, message = BAD[case]
    with pytest.raises(
        CalibrationError, match=rf"calibration.dataset is .*talks.jsonl': {message}\. Give messages with"
    ):
        load_calibration(config_for(file_of([row], tmp_path), tmp_path), tokenizer, model, 0, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_assistants_tokens_are_what_it_says_and_the_end(family):
    tokenizer = chat_tokenizer(FAMILIES[family][0])
    found = spoken(TALK, tokenizer, split_template(tokenizer))
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(found.tokens, clean_up_tokenization_spaces=False) == text
    said = tokenizer.decode([t for t, m in zip(found.tokens, found.assistant, strict=True) if m])
    end = FAMILIES[family][5]
    # what a channel's name or an empty thought adds is the assistant's too; one end is no end of an answer there
    for extra in ("<|channel|>final<|message|>", "<think>\n\n</think>\n\n"):
        said = said.replace(extra, "")
    first = "" if family == "channels" else end
    assert said.replace(" S", "S") == f"Say one.{first}Say two.{end}"


def test_rows_begin_with_a_conversation_and_go_on_with_the_next(tokenizer):
    talk = spoken(TALK[:2], tokenizer, split_template(tokenizer))
    size = len(talk.tokens)
    tokens, marks = packed([talk] * 7, None, 2 * size + 10)
    assert tokens.tolist() == [(talk.tokens * 3)[: 2 * size + 10]] * 2
    assert marks.tolist() == [(talk.assistant * 3)[: 2 * size + 10]] * 2
    # a row that ends before the answer teaches nothing
    assert packed([talk] * 3, None, talk.assistant.index(True))[0].shape == (0, talk.assistant.index(True))


@pytest.mark.parametrize("mask", ["all", "assistant"])
def test_given_conversations_are_rows_with_a_mask(tmp_path, tokenizer, model, mask):
    rows = [
        {"messages": [{"role": "user", "content": f"Q{i}?"}, {"role": "assistant", "content": f"A{i}." * 9}]}
        for i in range(99)
    ]
    data = load_calibration(config_for(file_of(rows, tmp_path), tmp_path, mask=mask), tokenizer, model, 0, True)
    assert data.train.shape == (6, 128) and data.test.shape == (2, 128)
    opening = split_template(tokenizer).opening
    assert all(row[: len(opening)] == list(opening) for row in data.train.tolist())
    assert data.to_dict()["mask"] == mask and data.train_kinds == ("given",) * 6
    if mask == "all":
        assert data.train_mask is None and data.validation_mask is None
        return
    assert data.train_mask.shape == (6, 128) and data.validation_mask.shape == (3, 128)
    for row, marks in zip(data.train, data.train_mask, strict=True):
        said = tokenizer.decode(row[marks])
        assert set(said.replace("<|im_end|>", "")) <= set("A.0123456789") and said.startswith("A")


def test_prompts_are_answered_by_the_dense_model_and_no_splits_share_one(tmp_path, tokenizer, model):
    prompts = [{"prompt": chr(48 + i % 10) + chr(97 + i // 10) + "?"} for i in range(60)]
    config = config_for(file_of(prompts, tmp_path), tmp_path, mask="assistant")
    asked = []
    data = load_calibration(config, tokenizer, model, 0, True, dense=lambda: asked.append(1) or model)
    assert asked == [1] and [len(split) for split in (data.train, data.validation, data.test)] == [6, 3, 2]
    seen = []
    for split in (data.train, data.validation, data.test):
        texts = tokenizer.batch_decode(split)
        parts = [part.split("<|im_end|>")[0] for text in texts for part in text.split("user\n")[1:]]
        seen.append({part for part in parts if part.endswith("?")})
    assert all(seen) and not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert not torch.isin(data.train[data.train_mask], torch.tensor(split_template(tokenizer).question_end)).all()


def test_prompts_longer_than_a_row(tmp_path, tokenizer, model):
    long = {"prompt": "x" * 200}
    with pytest.raises(
        CalibrationError, match="all 3 prompts are longer than a row of 128 tokens.*Raise calibration.seq"
    ):
        load_calibration(config_for(file_of([long] * 3, tmp_path), tmp_path), tokenizer, model, 0, True)
    rows = [long, *({"prompt": f"p{i}?"} for i in range(20))]
    with notice("1 prompts are left out: in a row of 128 tokens they leave no room"):
        load_calibration(config_for(file_of(rows, tmp_path), tmp_path), tokenizer, model, 0, True)


def test_a_source_is_of_one_kind(tmp_path, tokenizer, model):
    rows = [{"messages": TALK}, {"prompt": "And?"}] * 3
    with pytest.raises(CalibrationError, match="and a source is of one kind. Give one of them"):
        load_calibration(config_for(file_of(rows, tmp_path), tmp_path), tokenizer, model, 0, True)


def test_conversations_need_a_template(tmp_path, model):
    path = file_of([{"messages": TALK}] * 9, tmp_path)
    with pytest.raises(CalibrationError, match="the model has no chat template, so there are no conversations"):
        load_calibration(config_for(path, tmp_path), chat_tokenizer(None), model, 0, True)
    assert len(tokenize_dataset(str(path), chat_tokenizer(), sequence_length=200)) > 2


def own(tokenizer, model, tmp_path, **changes):
    changes = {"train_sequences": 12, "validation_sequences": 4, "test_sequences": 4, **changes}
    config = CalibrationConfig(sequence_length=160, cache_dir=str(tmp_path), **changes)
    return load_calibration(config, tokenizer, model, 0, True)


def test_a_chat_model_writes_both_kinds_mixed(tmp_path, tokenizer, model):
    data = own(tokenizer, model, tmp_path, mask="assistant")
    assert sorted(data.train_kinds) == ["conversations"] * 6 + ["plain"] * 6
    assert len(set(data.train_kinds[:6])) == 2  # the search looks at the first rows
    assert data.validation_kinds == ("plain",) * 2 + ("conversations",) * 2 == data.test_kinds
    opening = torch.tensor(split_template(tokenizer).opening)
    for row, kind, marks in zip(data.train, data.train_kinds, data.train_mask, strict=True):
        assert (kind == "conversations") == torch.equal(row[: len(opening)], opening)
        assert marks.all() == (kind == "plain") and marks.any()
    statistics = data.to_dict()["statistics"]["conversations"]
    assert statistics["questions"] >= 6 and 0 < statistics["distinct_openings_share"] <= 1


@pytest.mark.parametrize("case", ["share", "template", "no opening", "no template"])
def test_plain_text_alone_where_there_are_to_be_no_conversations(tmp_path, model, case):
    bare = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    templates = {"template": CHATML.replace("m.content", "m.content | upper"), "no opening": bare, "no template": None}
    template = templates.get(case, CHATML)
    tokenizer = chat_tokenizer(template)
    with notices() as caught:
        data = own(tokenizer, model, tmp_path, conversation_share=0.0 if case == "share" else 0.5)
    told = [text for text in caught if "chat template" in text]
    why = {"template": "it changes what is said", "no opening": "it puts no token before the user's first words"}
    assert len(told) == (case in why)
    assert not told or f"cannot be used ({why[case]}" in told[0] and "plain text alone" in told[0]
    assert set(data.train_kinds) == {"plain"} and data.train_mask is None
    assert data.statistics["conversations"] is None


def test_questions_of_one_kind_are_a_warning(tmp_path, tokenizer):
    model = chat_model(tokenizer, likely=[65])
    with notice(r"only .*% of the questions that the model wrote begin differently|only .* of the 4-grams") as told:
        own(tokenizer, model, tmp_path, openings_share=0.0)
    assert any("of the questions" in text for text in told)
