import pytest
import torch
from tiny_models import VOCABULARY, random_tokens, tiny_model
from tiny_onnx import exported_llama
from zoo import ZOO, zoo_model

from optimum_clp.errors import ModelError
from optimum_clp.evaluation.answers import Answer, AnswerRules, end_tokens, write_answers
from optimum_clp.runtime.causal_lm import OnnxCausalLM

LENGTHS = (3, 11, 5, 5, 8)
PROMPTS = [random_tokens(1, length, seed).flatten().tolist() for seed, length in enumerate(LENGTHS)]
# a fifth of the vocabulary ends an answer, so that rows end at different times
ENDS = frozenset(range(0, VOCABULARY, 5))


def rules(**settings):
    return AnswerRules(**{"ends": ENDS, "vocabulary": VOCABULARY, "max_new_tokens": 12, **settings})


def naive_greedy(model, prompt, ends, limit):
    """One row, the whole text for each token."""
    text = list(prompt)
    with torch.no_grad():
        while len(text) - len(prompt) < limit:
            text.append(model(torch.tensor([text])).logits[0, -1].argmax().item())
            if text[-1] in ends:
                return Answer(tuple(text[len(prompt) :]), True)
    return Answer(tuple(text[len(prompt) :]), False)


def write(model, settings, batch_size=5):
    return write_answers(model, PROMPTS, settings, batch_size=batch_size, name="", quiet=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mamba", "openai-gpt", "gemma3_text", "qwen3_moe"])
def test_answers_of_a_batch_are_those_of_each_prompt_alone(name):
    """Learnt positions, ALiBi, states, no cache, sliding windows, experts: none of them is padded."""
    tiny = next((tiny for tiny in ZOO if tiny.name == name), None) or pytest.skip("not in this transformers")
    model = zoo_model(tiny)
    size = model.get_input_embeddings().weight.shape[0]
    ends = frozenset(range(0, size, 5))
    wanted = [naive_greedy(model, prompt, ends, 12) for prompt in PROMPTS]
    settings = AnswerRules(ends=ends, vocabulary=size, max_new_tokens=12)
    assert write(model, settings) == wanted
    assert write(model, settings, batch_size=2) == wanted


def test_an_onnx_file_answers_as_its_model(tmp_path_factory):
    exported = exported_llama()
    model, file = exported.model, OnnxCausalLM.from_pretrained(exported.folder)
    assert write(file, rules()) == write(model, rules()) == [naive_greedy(model, p, ENDS, 12) for p in PROMPTS]


def test_a_sampled_answer_depends_on_seed_and_place_alone():
    model = tiny_model()
    first = write(model, rules(temperature=1.0))
    assert write(model, rules(temperature=1.0), batch_size=1) == first
    assert write(model, rules(temperature=1.0, seed=1)) != first
    assert write(model, rules(temperature=1e-4)) == write(model, rules())


def test_samples_follow_the_models_distribution():
    model, count = tiny_model(), 3000
    found = write_answers(
        model, [[5, 6]] * count, rules(temperature=1.0, max_new_tokens=1), batch_size=count, name="", quiet=True
    )
    shares = torch.bincount(torch.tensor([answer.tokens[0] for answer in found]), minlength=VOCABULARY) / count
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    assert (shares - expected).abs().max() < 4 * (expected * (1 - expected) / count).sqrt().max()


def test_limits_hold():
    model = tiny_model()
    endless = write(model, rules(ends=frozenset(), context=12))
    assert [(len(answer.tokens), answer.ended) for answer in endless] == [
        (9, False),
        (1, False),
        *[(7, False)] * 2,
        (4, False),
    ]
    few = write(model, rules(vocabulary=4, ends=frozenset()))
    assert all(max(answer.tokens) < 4 for answer in few)


def test_words_leave_out_the_end():
    assert Answer((4, 2), True).words == (4,) and Answer((4, 2), False).words == (4, 2)
    assert end_tokens(tiny_model(eos_token_id=[2, 7]), None) == {2, 7}


def test_logits_that_are_not_finite_are_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="model is 'NaN': its logits must be finite to answer"):
        write(model, rules())


def test_the_model_is_left_as_it_is():
    model = tiny_model().train()
    write(model, rules())
    assert model.training
