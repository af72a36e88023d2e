import pytest
import torch
from byte_tokenizer import tiny_tokenizer as byte_tokenizer
from tiny_models import random_tokens, tiny_model, tiny_tokenizer

from optimum_clp.errors import ConfigurationError
from optimum_clp.evaluation.answers import Answer, AnswerRules, write_answers
from optimum_clp.evaluation.generation import GenerationRow, check_prompts, measure_generation
from optimum_clp.evaluation.prompts import load_prompts
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model

TEXT = random_tokens(6, 40)
SMALL = {"num_prompts": 6, "max_new_tokens": 8, "quiet": True}
# the end of a turn is EOS, so that a random model ends some answers
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


@pytest.fixture(scope="module")
def models():
    dense = tiny_model()
    return dense, cut_model(dense, [LayerSegment(2, 4)])


def chat_model(context=512):
    return tiny_model(num_layers=2, vocab_size=300, max_position_embeddings=context)


def chat_tokenizer(template=TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_base_model_goes_on_with_text(models):
    dense, cut = models
    found = measure_generation({"cut": cut}, dense, tiny_tokenizer(), text_rows=TEXT, **SMALL)
    assert (found.asked, found.num_prompts, found.kinds) == ("text", 6, {})
    assert found.note == "the tokenizer has no chat template: it goes on with held-out text"
    first, second = found.rows
    assert (first.name, first.kl, first.agreement, second.name) == ("dense", 0.0, 1.0, "cut")
    assert second.kl > 0.05 and second.agreement < 1 and second.dense_loss > first.dense_loss
    assert first.json_parses is None and first.arithmetic_right is None
    assert [list(example.answers) for example in found.examples] == [["dense", "cut"]] * len(found.examples)
    assert found.examples[0].prompt == " ".join(f"w{i}" for i in TEXT[0, :20].tolist())


def test_agreement_is_counted_place_by_place(models):
    dense, cut = models
    found = measure_generation({"cut": cut}, dense, None, text_rows=TEXT, **SMALL)
    rules = AnswerRules(frozenset({2}), 97, 8)
    prompts = TEXT[:, :20].tolist()
    ours, theirs = (write_answers(m, prompts, rules, batch_size=1, name="", quiet=True) for m in (cut, dense))
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        places = range(max(len(a.tokens), len(b.tokens)))
        shares.append(sum(a.tokens[i : i + 1] == b.tokens[i : i + 1] for i in places) / len(places))
    assert found.rows[1].agreement == pytest.approx(sum(shares) / len(shares))
    assert found.examples == ()


def test_the_dense_model_beside_itself_loses_nothing(models):
    dense, _ = models
    first, second = measure_generation({"same": tiny_model()}, dense, None, text_rows=TEXT, **SMALL).rows
    assert second.kl == pytest.approx(0, abs=1e-6)
    assert second == GenerationRow(**{**vars(first), "name": "same", "kl": second.kl, "kl_error": second.kl_error})


def test_models_are_made_when_their_turn_comes(models):
    dense, cut = models
    made = []

    def make():
        made.append("cut")
        return cut

    found = measure_generation({"late": make, "now": cut}, dense, None, text_rows=TEXT, **SMALL)
    late, now = found.rows[1:]
    assert made == ["cut"] and {**vars(late), "name": "now"} == vars(now)


def test_without_a_dense_model_there_is_nothing_beside_it(models):
    found = measure_generation({"cut": models[1]}, None, tiny_tokenizer(), text_rows=TEXT, **SMALL)
    (row,) = found.rows
    assert (row.name, row.dense_loss, row.kl, row.agreement) == ("cut", None, None, None)
    assert 0 <= row.ended <= 1 and row.length >= 1


def test_a_chat_model_is_asked_through_its_template():
    found = measure_generation({}, chat_model(), chat_tokenizer(), num_prompts=9, max_new_tokens=4, quiet=True)
    assert (found.asked, found.note, found.num_prompts, found.num_left_out) == ("chat", None, 9, 0)
    assert set(found.kinds.values()) == {1} and len(found.kinds) == 9
    # a random model does neither
    assert found.rows[0].json_parses == found.rows[0].arithmetic_right == 0
    assert len(found.examples) == 8
    notes = [example.notes["dense"] for example in found.examples]
    assert all(1 <= note.num_tokens <= 4 and note.whole and note.loop_at is None for note in notes)
    # whoever has not ended has been stopped
    assert all(note.ended or note.num_tokens == 4 for note in notes)


def test_an_example_says_at_which_character_its_loop_begins(monkeypatch):
    tokenizer = chat_tokenizer()
    text = "Let me see: " + "no, " * 50
    said = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(
        "optimum_clp.evaluation.generation.write_answers",
        lambda model, prompts, rules, **options: [Answer(tuple(said), False) for _ in prompts],
    )
    found = measure_generation({}, chat_model(), tokenizer, num_prompts=1, max_new_tokens=len(said), quiet=True)
    (example,) = found.examples
    note = example.notes["dense"]
    assert example.answers["dense"] == text and (note.num_tokens, note.ended, note.whole) == (len(said), False, True)
    # nine tenths of 64 tokens must agree: a few of those before the loop may belong to its first 64
    assert 0 <= note.loop_at <= len("Let me see: ")
    assert found.rows[0].loops == 1


def test_right_answers_are_counted(monkeypatch):
    """What is read is the answer's text, by the prompt's kind."""
    prompts = load_prompts(
        [{"prompt": f"{n}", "kind": "arithmetic", "answer": n} for n in (1, 2, 3, 4)]
        + [{"prompt": "a", "kind": "json"}, {"prompt": "b", "kind": "json"}]
    )
    said = iter(["it is 1", "2", "4", "5", '{"a": 1}', "no"])
    monkeypatch.setattr("optimum_clp.evaluation.generation.decoded", lambda tokenizer, ids: next(said))
    monkeypatch.setattr("optimum_clp.evaluation.generation._Measurement.examples", lambda self: ())
    # JSON is read first
    said = iter(['{"a": 1}', "no", "it is 1", "2", "4", "5"])
    found = measure_generation(
        {}, chat_model(), chat_tokenizer(), prompts, num_prompts=6, max_new_tokens=2, quiet=True
    )
    assert (found.rows[0].json_parses, found.rows[0].arithmetic_right) == (0.5, 0.5)
    assert found.kinds == {"arithmetic": 4, "json": 2}


def test_a_model_that_never_ends_its_answers():
    model = chat_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = None
    (row,) = measure_generation({}, model, tokenizer, num_prompts=3, max_new_tokens=5, quiet=True).rows
    assert (row.ended, row.sampled_ended, row.length, row.length_error) == (0, 0, 5, 0)


def test_a_template_that_raises_gives_way_to_text():
    tokenizer = chat_tokenizer("{{ raise_exception('never') }}")
    rows = random_tokens(3, 40)
    found = measure_generation({}, chat_model(), tokenizer, text_rows=rows, **SMALL)
    assert (found.asked, found.num_prompts) == ("text", 3)
    assert found.note.startswith("the tokenizer's chat template raises TemplateError: never")
    with pytest.raises(ConfigurationError, match="prompts is None: the tokenizer's chat template raises"):
        measure_generation({}, chat_model(), tokenizer, **SMALL)


def test_given_prompts_are_put_to_a_base_model_as_they_are(models):
    prompts = load_prompts([{"prompt": "w3 w4 w5"}, {"prompt": "w9"}])
    found = measure_generation({}, models[0], tiny_tokenizer(), prompts, **SMALL)
    assert (found.asked, found.num_prompts, found.note) == ("prompts", 2, "the tokenizer has no chat template")


def test_prompts_that_are_longer_than_the_context():
    prompts = load_prompts([{"prompt": "Hi"}, {"prompt": "Hi there " * 90}])
    model, tokenizer = chat_model(context=64), chat_tokenizer()
    found = measure_generation({}, model, tokenizer, prompts, num_prompts=2, max_new_tokens=90, quiet=True)
    assert (found.num_prompts, found.num_left_out) == (1, 1)
    assert found.rows[0].sampled_length <= 62
    with pytest.raises(ConfigurationError, match="none of the 1 prompts is at most 48 tokens long"):
        check_prompts(prompts[1:], tokenizer, 8, 64)


def test_something_must_be_measured():
    with pytest.raises(ConfigurationError, match="models is {}: there is none to measure"):
        measure_generation({}, None, None, text_rows=torch.zeros(1, 9))
