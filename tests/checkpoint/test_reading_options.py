"""How models are read: which attention they compute, and in which cache of the Hub's files they are kept."""

import copy

import pytest
import torch
from hub_cache import put_into_cache
from tiny_models import random_tokens, tiny_config, tiny_model, tiny_tokenizer

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.checkpoint.loading import check_attention, load_config, load_model, load_tokenizer
from optimum_clp.checkpoint.processors import copy_processor
from optimum_clp.errors import ModelError
from optimum_clp.runtime.folder import exported_folder

NAME = "acme/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    tiny_model(tie_word_embeddings=True).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    (path / "LICENSE").write_text("terms")
    (path / "tokenizer.model").write_bytes(b"for llama.cpp")
    return path


@pytest.fixture
def cache(folder, tmp_path):
    put_into_cache(folder, tmp_path / "hub", NAME)
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_the_attention_that_was_asked_for_is_computed(folder, name):
    model, given = load_model(folder, attn_implementation=name), tiny_model(tie_word_embeddings=True)
    assert model.config._attn_implementation == name
    if name != "flex_attention":  # it compiles itself
        ids = random_tokens(2, 12)
        torch.testing.assert_close(model(ids).logits, given(ids).logits, rtol=1e-4, atol=1e-5)


def test_transformers_chooses_the_attention_if_none_is_named(folder):
    assert load_model(folder).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nonsense", r'Specified `attn_implementation="nonsense"` is not supported. The only possible arguments are'),
        ("", r'Specified `attn_implementation=""` is not supported'),
        ("flash_attention_2", "FlashAttention2 has been toggled on, but it cannot be used due to the following error"),
    ],
)
def test_an_attention_that_transformers_refuses_is_refused_in_its_words(folder, name, reason):
    with pytest.raises(
        ModelError, match=rf"^attn_implementation is '{name}': transformers refuses it \({reason}"
    ) as told:
        load_model(folder, attn_implementation=name)
    assert "Give eager, sdpa, flash_attention_2 or another one that transformers has for this model" in str(told.value)


def test_a_model_in_memory_keeps_its_own_attention_and_another_one_is_refused():
    model = tiny_model()
    assert load_model(model, attn_implementation=model.config._attn_implementation) is model
    with pytest.raises(ModelError) as told:
        CLPPruner.from_pretrained(model, attn_implementation="eager")
    assert str(told.value) == (
        "attn_implementation is 'eager': the model that was given is in memory, is not changed, and computes attention by "
        "'sdpa'. Call model.set_attn_implementation('eager') before, or give its folder or Hub id, or leave it out."
    )
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert CLPPruner.from_pretrained(model, attn_implementation="eager").model is model


def test_a_refusal_comes_before_weights_are_read(folder, tmp_path):
    put = put_into_cache(folder, tmp_path, NAME)
    (put / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="it could not be read"):
        load_model(NAME, cache_dir=tmp_path)
    with pytest.raises(ModelError, match="attn_implementation is 'nonsense'"):
        load_model(NAME, cache_dir=tmp_path, attn_implementation="nonsense")


def test_a_kernel_of_the_hub_is_code_and_is_run_only_if_that_is_allowed(folder):
    with pytest.raises(ModelError, match="'someone/kernel': it names a kernel on the Hugging Face Hub, which is code"):
        load_model(folder, attn_implementation="someone/kernel")
    with pytest.raises(
        ModelError, match="'someone/kernel': transformers refuses it"
    ):  # the package kernels is not there
        load_model(folder, attn_implementation="someone/kernel", trust_remote_code=True)


def test_a_model_that_cannot_be_built_at_all_is_not_blamed_on_the_attention():
    config = tiny_config(num_attention_heads=4)
    config.vocab_size = -1
    check_attention(config, "nonsense")


def test_the_config_is_left_as_it_was():
    config = tiny_config()
    before = copy.deepcopy(vars(config))
    check_attention(config, "eager")
    assert vars(config) == before


def test_models_of_the_hub_are_read_from_the_cache_that_is_named(cache):
    with pytest.raises(ModelError, match="the Hugging Face Hub could not be reached"):
        load_model(NAME)
    model = load_model(NAME, cache_dir=cache)
    assert torch.equal(model.lm_head.weight, tiny_model(tie_word_embeddings=True).lm_head.weight)
    assert load_config(NAME, cache_dir=str(cache)).num_hidden_layers == 6
    assert len(load_tokenizer(NAME, cache_dir=cache)) == len(tiny_tokenizer())


def test_files_that_go_along_and_exported_ones_are_found_there_too(folder, tmp_path):
    put = put_into_cache(folder, tmp_path / "hub", NAME)
    (put / "processor_config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    assert copy_processor(NAME, tmp_path / "out") == []
    assert copy_processor(NAME, tmp_path / "out", tmp_path / "hub") == ["processor_config.json"]
    with pytest.raises(ModelError, match="no such repository could be had"):
        exported_folder(NAME, "onnx/model.onnx")
    assert exported_folder(NAME, "onnx/model.onnx", cache_dir=tmp_path / "hub") == put


def test_a_run_from_such_a_cache_takes_along_what_lies_beside_the_model(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_clp.evaluation.outcome.NEW_TOKENS", 3)
    sizes = {"train_sequences": 4, "validation_sequences": 2, "test_sequences": 2, "sequence_length": 8}
    recipe = CLPConfig(
        calibration={**sizes, "cache_dir": str(tmp_path / "text")},
        tuning={"enabled": False},
        export={"enabled": False},
        evaluation={"max_new_tokens": 4},
    )
    options = {"cache_dir": cache, "attn_implementation": "eager", "quiet": True}
    pruner = CLPPruner.from_pretrained(NAME, **options)
    assert pruner.prune(recipe, tmp_path / "out").config._attn_implementation == "eager"
    assert (tmp_path / "out/LICENSE").read_text() == "terms"
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"for llama.cpp"
    assert pruner.report.base_model["origin"]["license"] == "mit"
    assert "attn" not in (tmp_path / "out/config.json").read_text()
    again = CLPPruner.from_pretrained(tmp_path / "out", **options)
    again.evaluate()  # the text of the folder's report, which the dense model writes
    assert again.pruned_model.config._attn_implementation == again.model.config._attn_implementation == "eager"
    put_into_cache(tmp_path / "out", cache, "acme/cut")
    opened = CLPPruner.from_pretrained("acme/cut", cache_dir=cache, quiet=True)
    assert opened.segments == pruner.segments and opened.report.base_model["name_or_path"] == NAME
    assert "kl" in again.evaluate(["w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"], reference=NAME)
