import json

import pytest

from optimum_clp.errors import ConfigurationError
from optimum_clp.evaluation.prompts import Prompt, load_prompts, spread_over_kinds


def test_ours_are_64_of_nine_kinds():
    prompts = load_prompts()
    kinds = [prompt.kind for prompt in prompts]
    assert len(prompts) == len(set(prompts)) == 64
    assert set(kinds) == {
        *("everyday", "writing", "facts", "arithmetic", "code", "lists", "json", "refusals", "two-turn"),
    }
    assert min(kinds.count(kind) for kind in kinds) >= 6
    assert {len(prompt.messages) for prompt in prompts if prompt.kind == "two-turn"} == {3}
    assert all(prompt.answer for prompt in prompts if prompt.kind == "arithmetic")


def test_a_file_has_messages_or_a_prompt(tmp_path):
    file = tmp_path / "p.jsonl"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"messages": turns, "more": 1}, {"prompt": "1 + 1?", "kind": "arithmetic", "answer": 2}]
    file.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert (
        load_prompts(file)
        == load_prompts(rows)
        == [
            Prompt((("system", "Be brief."), ("user", "Hi"))),
            Prompt((("user", "1 + 1?"),), "arithmetic", "2"),
        ]
    )


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "has the role 'bot', which is none of system, user, assistant",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, "has an empty turn of the role 'user'"),
        ({"messages": [{"role": "user"}]}, "has an empty turn of the role 'user'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "ends with a turn of the role 'assistant'"),
        ({"messages": ["x"]}, "has the role None"),
        ({"prompt": ""}, "has an empty turn of the role 'user'"),
        ({"prompt": "1 + 1?", "kind": "arithmetic"}, "is of the kind arithmetic and has no number as its answer"),
        ({"prompt": "x", "kind": 3}, "has a kind that is not a string"),
        ({"text": "x"}, "has neither messages nor a prompt"),
        ("x", "is not an object"),
    ],
)
def test_bad_rows_are_named(row, rule, tmp_path):
    with pytest.raises(ConfigurationError) as error:
        load_prompts([{"prompt": "fine"}, row])
    assert f"prompts is 'list of 2 rows': row 2 {rule}" in str(error.value)
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigurationError, match="p.jsonl': line 1 "):
        load_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "it cannot be read"),
        (b"", "there is no prompt in it"),
        (b"\n{", "line 2 is not valid JSON"),
        (b"\xff", "is not valid JSON"),
    ],
)
def test_bad_files_are_named(content, rule, tmp_path):
    if content is not None:
        (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ConfigurationError, match=rule):
        load_prompts(tmp_path / "p.jsonl")


def test_kinds_are_spread():
    prompts = [
        Prompt((("user", f"{kind}{n}"),), kind) for kind, count in (("a", 5), ("b", 2), ("c", 1)) for n in range(count)
    ]
    chosen = spread_over_kinds(prompts, 5)
    assert [prompt.last_words for prompt in chosen] == ["a0", "a1", "b0", "b1", "c0"]
    assert spread_over_kinds(prompts, 99) == prompts
