import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from byte_tokenizer import TEXT, tiny_tokenizer
from notices import notice, notices
from safetensors.torch import load_file, save_file
from tiny_models import MODEL_TYPES, random_tokens, tiny_config, tiny_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from zoo import ZOO, zoo_model

from optimum_clp.checkpoint.files import QUANTO_MODEL_TYPE, legacy_rope
from optimum_clp.checkpoint.loading import check_finite, load_model, load_tokenizer
from optimum_clp.checkpoint.output import staged_folder
from optimum_clp.checkpoint.saving import save_checkpoint, verify_checkpoint
from optimum_clp.errors import CutError, ModelError
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as stock transformers writes it."""
    path = tmp_path / "model"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit_weights(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def refuses(message, path, **arguments):
    with pytest.raises(ModelError, match=message):
        load_model(path, quiet=True, **arguments)


# loading what is right


def test_load_gives_the_stock_model_in_eval_mode(folder):
    model, stock = load_model(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = random_tokens(2, 20)
    assert not model.training
    assert type(model) is type(stock)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)
    assert load_model(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_model_in_memory_is_returned_as_it_is():
    model = tiny_model().train()
    assert load_model(model) is model
    assert model.training


def test_sharded_and_pickled_weights_load(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    torch.save(model.state_dict(), _pickled(tmp_path, model) / "pytorch_model.bin")
    for path, arguments in ((tmp_path / "sharded", {}), (tmp_path / "pickled", {"use_safetensors": False})):
        assert torch.equal(load_model(path, quiet=True, **arguments).lm_head.weight, model.lm_head.weight)


def _pickled(tmp_path, model):
    model.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    return tmp_path / "pickled"


def test_rope_parameters_alone_are_read_by_every_transformers(tmp_path):
    model = tiny_model(rope_theta=500000.0, rope_scaling=dict(LLAMA3))
    save_checkpoint(model, None, tmp_path)
    # as transformers 5 writes it: transformers 4 would take its default base without a word
    rope = {"rope_theta": 500000.0, **LLAMA3}
    edit_json(tmp_path / "config.json", rope_parameters=rope, rope_theta=..., rope_scaling=...)
    ids = random_tokens(1, 60)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path, quiet=True)(ids).logits, model(ids).logits)


def test_legacy_rope_by_kind_of_layer():
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
    }
    scaling = {"rope_type": "linear", "factor": 8.0}
    expected = {
        "gemma3_text": {"rope_theta": 7.0, "rope_local_base_freq": 3.0, "rope_scaling": scaling},
        "modernbert-decoder": {"global_rope_theta": 7.0, "local_rope_theta": 3.0, "rope_scaling": scaling},
        "olmo3": {"rope_theta": 7.0, "rope_scaling": scaling},
        "laguna": {},  # transformers 4 does not know it
    }
    for model_type, legacy in expected.items():
        assert legacy_rope({"model_type": model_type, "rope_parameters": rope}) == legacy


def test_legacy_rope():
    assert legacy_rope({"rope_theta": 5.0}) == {}
    assert legacy_rope({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}) == {}
    assert legacy_rope({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}) == {
        "rope_theta": 5.0,
        "rope_scaling": None,
    }
    assert legacy_rope({"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5, **LLAMA3}}) == {
        "rope_theta": 5.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": LLAMA3,
    }


LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("model_type", "rope", "expected"),
    [
        ("phi3", {**LONG, "type": "longrope"}, {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
        ("phi3", {**LONG, "attention_factor": 1.5}, {**LONG, "attention_factor": 1.5}),  # cannot be said in three
        ("phimoe", LONG, LONG),
        ("olmo2", {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        ("olmo", {"rope_type": "dynamic", "type": "dynamic", "factor": 4.0}, {"type": "dynamic", "factor": 4.0}),
        ("llama", {"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_legacy_rope_where_transformers_4_counts_the_entries(model_type, rope, expected):
    found = legacy_rope({"model_type": model_type, "rope_parameters": {"rope_theta": 5.0, **rope}})
    assert found.pop("rope_theta") == 5.0
    assert found.pop("rope_scaling") == expected
    assert found == (
        {"original_max_position_embeddings": 32}
        if expected.get("long_factor") and model_type == "phi3" and "attention_factor" not in rope
        else {}
    )


# loading what is wrong


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "a/b/c", "~/model", "model/", ".", ""])
def test_missing_folder_or_no_checkpoint(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(
        r"model is '.*': (there is no such folder|the folder has no config\.json)\. (Check the path|Give the)", name
    )


def test_file_instead_of_folder(folder):
    refuses("it is a file, not a folder. Give the folder", folder / "model.safetensors")


def test_something_else_than_a_model():
    refuses("a int is not a model. Give a PreTrainedModel", 3)


def test_no_config(folder):
    (folder / "config.json").unlink()
    refuses(r"the folder has no config\.json\. Give the folder that save_pretrained wrote", folder)
    (folder / "adapter_config.json").write_text("{}")
    refuses("it holds an adapter, and its adapter_config.json does not name the model that it is for", folder)


@pytest.mark.parametrize(("text", "message"), [("{", r"config\.json is malformed"), ("[1]", "holds no JSON object")])
def test_malformed_config(folder, text, message):
    (folder / "config.json").write_text(text)
    refuses(message, folder)


def test_config_values_that_make_no_model(folder):
    edit_json(folder / "config.json", num_attention_heads=5)
    refuses(r"it could not be read \(.+\)\. Check its files", folder)
    edit_json(folder / "config.json", model_type=...)
    refuses(r"its config\.json has no model_type", folder)


def test_encoder_and_encoder_decoder(tmp_path):
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    bert = BertForMaskedLM(BertConfig(**small))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    for model, message in (
        (bert, "BertForMaskedLM is not a causal language model. Give a decoder-only model"),
        (t5, "T5ForConditionalGeneration is an encoder-decoder, not a causal language model"),
        (AutoModel.from_config(tiny_config()), "LlamaModel is not a causal language model"),
    ):
        refuses(message, model)
        model.save_pretrained(tmp_path / type(model).__name__)
        for weights in (tmp_path / type(model).__name__).glob("*.safetensors"):
            weights.write_bytes(b"not read before this is known")
        refuses(message, tmp_path / type(model).__name__)


@pytest.mark.parametrize("name", ["MPTForCausalLM", "LLaMAForCausalLM", "GPTRefactForCausalLM", "MyLlama"])
def test_a_class_that_transformers_does_not_have_says_nothing(folder, name):
    edit_json(folder / "config.json", architectures=[name])
    assert type(load_model(folder, quiet=True)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("MyForSequenceClassification", "Give the causal language model that it was made from"),
        ("LlamaForSequenceClassification", "Give the causal language model that it was made from"),
        ("GPT2DoubleHeadsModel", "Give the causal language model that it was made from"),
        ("LlamaModel", "It has no head for the next token"),
        ("MPTModel", "It has no head for the next token"),
        ("BertForMaskedLM", "Give a decoder-only model"),
        ("LlavaForConditionalGeneration", "Give a decoder-only model"),
    ],
)
def test_a_class_with_another_head_is_refused(folder, name, remedy):
    edit_json(folder / "config.json", architectures=[name])
    refuses(f"{name} is not a causal language model. {remedy}", folder)


OLD = {
    "gpt2": {"h.{}.attn.bias": torch.ones(1, 1, 9, 9), "h.{}.attn.masked_bias": torch.tensor(-1e4)},
    "gpt_neo": {
        "transformer.h.{}.attn.attention.bias": torch.ones(1, 1, 9, 9),
        "transformer.h.{}.attn.attention.masked_bias": torch.tensor(-1e9),
    },
    "gptj": {"transformer.h.{}.attn.bias": torch.ones(1, 1, 9, 9), "transformer.h.{}.attn.masked_bias": torch.ones(1)},
    "codegen": {"transformer.h.{}.attn.causal_mask": torch.ones(1, 1, 9, 9)},
    "gpt_neox": {"gpt_neox.layers.{}.attention.bias": torch.ones(1, 1, 9, 9)},
    "gpt_bigcode": {"transformer.h.{}.attn.bias": torch.ones(1, 1, 9, 9)},
    "openai-gpt": {"transformer.h.{}.attn.bias": torch.ones(1, 1, 9, 9)},
    "llama": {"model.layers.{}.self_attn.rotary_emb.inv_freq": torch.ones(8)},
}


@pytest.mark.parametrize("model_type", OLD)
def test_masks_that_old_checkpoints_carry_are_left_out(model_type, tmp_path):
    (tiny,) = [t for t in ZOO if t.name == model_type]
    model = zoo_model(tiny)
    model.save_pretrained(tmp_path)

    def add(tensors):
        if model_type == "gpt2":  # as openai-community/gpt2 has it
            for key in list(tensors):
                tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        for name, value in OLD[model_type].items():
            tensors |= {name.format(layer): value.clone() for layer in range(8)}
        return tensors

    edit_weights(tmp_path, add)
    found = load_model(tmp_path, quiet=True)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_mask_that_no_version_of_the_type_had_is_refused(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.bias": torch.ones(1, 1, 9, 9)}))
    refuses("1 weights are in the checkpoint but not in the model, the first is model.layers.0.self_attn.bias", folder)


def test_unknown_type_and_remote_code(folder):
    edit_json(folder / "config.json", model_type="new_model")
    refuses("its type 'new_model' is unknown to the installed transformers. Check config.json, or upgrade", folder)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    refuses(r"needs code that comes with the model, and trust_remote_code is False\. Read that code", folder)
    edit_json(folder / "config.json", model_type="llama")
    load_model(folder, quiet=True)
    assert not (folder / "ran").exists()


def test_a_stray_quantization_config_beside_plain_weights(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    model = load_model(folder, quiet=True)
    assert not hasattr(model.config, "quantization_config")
    assert all(torch.equal(tensor, tiny_model().state_dict()[name]) for name, tensor in model.state_dict().items())


def test_quantized_checkpoint(folder):
    def cast(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)

    edit_weights(folder, cast)
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    refuses(r"its weights are quantized \(fp8\).*quantization_config=FineGrainedFP8Config\(dequantize=True\)", folder)
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refuses(r"its weights are quantized \(gptq\).*Give the dense checkpoint", folder)
    edit_json(folder / "config.json", quantization_config={"load_in_8bit": True})
    refuses(r"its weights are quantized \(bitsandbytes\)", folder)


def test_quanto_folder(folder):
    message = "quantized with quanto.*Give the dense checkpoint.*optimum_clp.quantization.load_quantized"
    edit_json(folder / "config.json", model_type=QUANTO_MODEL_TYPE)
    refuses(message, folder)
    edit_json(folder / "config.json", model_type="llama")
    (folder / "quanto_qmap.json").write_text("{}")
    refuses(message, folder)
    (folder / "quanto_qmap.json").unlink()
    edit_weights(folder, lambda t: t.update({"lm_head.weight._data": t.pop("lm_head.weight")}))
    refuses(message, folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refuses(r"the folder has no weights \(model.safetensors\)", folder)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"")
    refuses("it has ONNX files, but no PyTorch weights. Give the folder of the PyTorch checkpoint", folder)


def test_pickled_weights_are_refused(tmp_path):
    path = _pickled(tmp_path, tiny_model())

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"x": Evil()}, path / "pytorch_model.bin")
    refuses(r"pickled weights only \(\.bin\).*Pass use_safetensors=False if you trust the file", path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(folder, keep):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    refuses(r"its model\.safetensors is truncated .*Fetch the model again", folder)


def test_missing_shard(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    refuses(f"1 of its {len(shards)} weight files are missing, the first is {shards[1].name}", tmp_path)
    edit_json(tmp_path / "model.safetensors.index.json", weight_map=...)
    refuses("has no weight_map", tmp_path)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (7, r"9 weights are missing from the checkpoint, the first is model\.layers\.6\.input_layernorm"),
        (5, r"9 weights are in the checkpoint but not in the model, the first is model\.layers\.5\.input_layernorm"),
    ],
)
def test_config_of_another_depth_never_gives_random_weights(folder, layers, message):
    edit_json(folder / "config.json", num_hidden_layers=layers)
    refuses(message + r".*do not belong together: check num_hidden_layers", folder)


def test_config_of_another_width(folder):
    edit_json(folder / "config.json", intermediate_size=64)
    refuses("it could not be read", folder)


def test_missing_tensor(folder):
    edit_weights(folder, lambda t: t.pop("model.norm.weight"))
    refuses(r"1 weights are missing from the checkpoint, the first is model\.norm\.weight", folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder, value):
    def edit(tensors):
        tensors["model.layers.3.mlp.up_proj.weight"][1, 2] = value

    edit_weights(folder, edit)
    message = r"its tensor model\.layers\.3\.mlp\.up_proj\.weight has 1 values that are NaN or infinite"
    refuses(message, folder)
    refuses(message, AutoModelForCausalLM.from_pretrained(folder))


def test_weights_that_are_not_in_memory():
    with pytest.raises(ModelError, match=r"its tensor weight was offloaded.*device_map=None"):
        check_finite("m", torch.nn.Linear(2, 2, device="meta"))


# the tokenizer


def test_load_tokenizer(folder):
    assert load_tokenizer(folder)(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_tokenizer(model_type, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the folder has no tokenizer \(tokenizer.json\).*as tokenizer="):
        load_tokenizer(tmp_path)


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"its tokenizer could not be read \(.*as tokenizer="):
        load_tokenizer(folder)
    with pytest.raises(ModelError, match="there is no such folder"):
        load_tokenizer("./no/such/folder")


# saving


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_saved_checkpoint_is_an_ordinary_one(model_type, tied, tmp_path):
    model, tokenizer = tiny_model(model_type, tie_word_embeddings=tied, rope_theta=500000.0), tiny_tokenizer()
    before, training = model.config.to_dict(), [m.training for m in model.modules()]
    save_checkpoint(model, tokenizer, tmp_path)
    verify_checkpoint(tmp_path, model)
    assert model.config.to_dict() == before
    assert [m.training for m in model.modules()] == training
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = random_tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(stock.eval()(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    files = {p.name for p in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt"))]


@pytest.mark.parametrize("prefix_space", [False, True])
def test_saved_tokenizer(prefix_space, tmp_path):
    tokenizer = tiny_tokenizer(prefix_space)
    save_checkpoint(tiny_model(), tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(config.get("extra_special_tokens"), list)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert set(reloaded(TEXT)) == {"input_ids", "attention_mask"}
    assert sorted(reloaded.all_special_tokens) == sorted(tokenizer.all_special_tokens)
    assert reloaded.chat_template == tokenizer.chat_template


def test_a_tokenizer_that_is_read_back_as_another_one_is_warned_of(tmp_path, monkeypatch):
    other = tiny_tokenizer(prefix_space=True)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: other)
    with notice("with other token ids, because of the model's type: load it with PreTrained"):
        save_checkpoint(tiny_model(), tiny_tokenizer(), tmp_path)


def test_no_local_path_in_the_files(folder, tmp_path):
    model, tokenizer = load_model(folder, quiet=True), load_tokenizer(folder)
    save_checkpoint(model, tokenizer, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_cut_model_that_shares_tensors_with_the_dense_one(tmp_path):
    dense = tiny_model(tie_word_embeddings=True)
    cut = cut_model(dense, [LayerSegment(2, 4)])
    save_checkpoint(cut, tiny_tokenizer(), tmp_path)
    verify_checkpoint(tmp_path, cut)
    assert sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values()) == sum(
        p.numel() for p in cut.parameters()
    )


def test_head_that_is_not_tied_although_the_config_asks_for_it(tmp_path):
    model = tiny_model()
    model.config.tie_word_embeddings = True
    save_checkpoint(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    verify_checkpoint(tmp_path, model)
    assert model.config.tie_word_embeddings is True


def test_generation_settings_that_transformers_refuses_to_write(tmp_path):
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=[2, 5], temperature=0.6, do_sample=False)
    save_checkpoint(model, None, tmp_path)
    assert model.generation_config.temperature == 0.6
    reloaded = GenerationConfig.from_pretrained(tmp_path)
    assert (reloaded.temperature, reloaded.eos_token_id) == (0.6, [2, 5])


def test_overwriting_the_folder_that_the_model_is_mapped_from(folder):
    model, tokenizer = load_model(folder, quiet=True), load_tokenizer(folder)
    ids = random_tokens(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        with staged_folder(folder, overwrite=True) as staged:
            save_checkpoint(cut_model(model, [LayerSegment(2, 4)]), tokenizer, staged)
        assert torch.equal(model(ids).logits, expected)
    assert load_model(folder, quiet=True).config.num_hidden_layers == 4
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777


# verification, with planted faults


def planted(folder, **changes):
    edit_json(folder / "config.json", **changes)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda f: planted(f, num_hidden_layers=5), r"has 9 unexpected keys, the first is model\.layers\.5"),
        (lambda f: planted(f, num_hidden_layers=7), r"has 9 missing keys, the first is model\.layers\.6"),
        (lambda f: edit_weights(f, lambda t: t.pop("model.norm.weight")), r"has 1 missing keys.*model\.norm"),
        (
            lambda f: edit_weights(f, lambda t: t["model.norm.weight"][3:4].add_(1e-6)),
            r"its tensor model\.norm\.weight differs from the one in memory",
        ),
        (lambda f: planted(f, dtype="bfloat16", torch_dtype="bfloat16"), r"its tensor .* differs"),
        (
            lambda f: planted(f, rope_theta=20000.0, rope_parameters={"rope_theta": 20000.0, "rope_type": "default"}),
            r"its buffer .*inv_freq is another: config\.json differs",
        ),
        (lambda f: planted(f, rms_norm_eps=1e-5), r"it computes other logits: config\.json differs"),
        (lambda f: planted(f, hidden_act="gelu"), r"it computes other logits"),
        (lambda f: (f / "config.json").write_text("{"), "transformers cannot read it"),
    ],
)
def test_verify_finds_planted_faults(fault, message, tmp_path):
    model = tiny_model().train()
    save_checkpoint(model, None, tmp_path)
    verify_checkpoint(tmp_path, model)
    assert all(module.training for module in model.modules())
    fault(tmp_path)
    with pytest.raises(CutError, match=r"checkpoint is '.*" + message):
        verify_checkpoint(tmp_path, model)


def test_verify_accepts_a_model_whose_buffers_were_cast(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    save_checkpoint(model, None, tmp_path)
    verify_checkpoint(tmp_path, model)


# another version of transformers, and the Hub


@pytest.mark.skipif("CLP_OTHER_PYTHON" not in os.environ, reason="CLP_OTHER_PYTHON names no other interpreter")
def test_another_transformers_reads_the_same_model_and_token_ids(tmp_path):
    expected, ids, tokenizer = {}, random_tokens(1, 60), tiny_tokenizer(prefix_space=True)
    variants = {name: tiny_model(name, rope_theta=500000.0) for name in MODEL_TYPES}
    variants["llama3"] = tiny_model(rope_theta=500000.0, rope_scaling=dict(LLAMA3), tie_word_embeddings=True)
    variants["longrope"] = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            original_max_position_embeddings=24,
            pad_token_id=0,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]},
        )
    ).eval()
    for name, model in variants.items():
        with notices():  # transformers 5 reads every tokenizer of a qwen2 model as Qwen2's
            save_checkpoint(model, tokenizer, tmp_path / name)
        expected[name] = model(ids).logits.detach().contiguous()
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    script = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
root = Path(sys.argv[1])
ids, logits = load_file(root / "ids.safetensors")["ids"], {}
for name in sys.argv[3:]:
    model, info = AutoModelForCausalLM.from_pretrained(root / name, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    logits[name] = model.eval()(ids).logits.detach().contiguous()
save_file(logits, root / "logits.safetensors")
tokenizer = AutoTokenizer.from_pretrained(root / "llama")
found = [tokenizer(sys.argv[2]).input_ids, sorted(tokenizer.all_special_tokens), tokenizer.chat_template]
(root / "tokens.json").write_text(json.dumps(found))
"""
    other = os.environ["CLP_OTHER_PYTHON"]
    subprocess.run([other, "-c", script, str(tmp_path), TEXT, *variants], check=True, cwd=tmp_path)
    found = load_file(tmp_path / "logits.safetensors")
    for name, logits in expected.items():
        assert (found[name] - logits).abs().max() <= 1e-5 * logits.abs().max(), name
    token_ids, special, template = json.loads((tmp_path / "tokens.json").read_text())
    assert token_ids == tokenizer(TEXT).input_ids
    assert special == sorted(tokenizer.all_special_tokens)
    assert template == tokenizer.chat_template


def test_hub_offline():
    refuses("there is no such folder, and the Hugging Face Hub could not be reached. Check the network", "org/model")
    refuses("there is no such folder, and it is not a valid Hub id", "my model")
    with pytest.raises(ModelError, match="Hugging Face Hub could not be reached"):
        load_tokenizer("org/model")


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: org/model at revision "v1" needs a token."""

    def do_HEAD(self):
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        root, repository = self.server.root, (self.path + "///").split("/")[2]
        file = Path(root) / self.path.rpartition("/")[2]
        error, status = None, 200
        if "/resolve/" not in self.path:
            status = 404
        elif repository == "gated":
            error, status = "GatedRepo", 403
        elif repository not in ("model", "private") or self.headers.get("Authorization") != "Bearer hf_secret":
            error, status = "RepoNotFound", 404
        elif "/resolve/v1/" not in self.path and "/resolve/" + "a" * 40 not in self.path:
            error, status = "RevisionNotFound", 404
        elif not file.is_file():
            error, status = "EntryNotFound", 404
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        body = file.read_bytes() if status == 200 else b""
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{file.name}-{len(body)}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


def test_hub_downloads_only_what_is_needed(folder, tmp_path):
    for name in ("pytorch_model.bin", "big.gguf", "evil.py"):
        (folder / name).write_bytes(b"not wanted")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.root, server.requests = folder, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = """
import sys
from optimum_clp.checkpoint.loading import load_model, load_tokenizer
from optimum_clp.errors import ModelError
good = dict(revision="v1", token="hf_secret")
model = load_model("org/model", quiet=True, **good)
print("layers", model.config.num_hidden_layers, len(load_tokenizer("org/model", **good)))
for name, arguments in (("org/private", dict(revision="v1", token=False)), ("org/gated", good), ("org/none", good),
                        ("org/model", dict(revision="v2", token="hf_secret"))):
    try:
        load_model(name, quiet=True, **arguments)
    except ModelError as error:
        print(error)
"""
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
        )
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    layers, private, gated, unknown, revision = done.stdout.splitlines()
    assert layers == f"layers 6 {len(tiny_tokenizer())}"
    assert "no such model on the Hugging Face Hub. Check the name; for a private model pass token=" in private
    assert "access to it is restricted on the Hugging Face Hub. Accept its terms" in gated
    assert "no such model on the Hugging Face Hub" in unknown
    assert "has no such revision of it. Choose another revision" in revision
    assert "hf_secret" not in done.stdout + done.stderr
    fetched = {
        path.rpartition("/")[2] for command, path, _ in server.requests if command == "GET" and "resolve" in path
    }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "big.gguf", "evil.py"}
