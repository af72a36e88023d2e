import copy
import json
import subprocess
import sys

import pytest
import torch
from byte_tokenizer import TEXT, tiny_tokenizer
from optimum.quanto import QLinear, freeze, quantize
from optimum.quanto.library.extensions import get_extension
from safetensors.torch import load_file, save_file
from tiny_models import MODEL_TYPES, random_tokens, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel
from zoo import ZOO, zoo_model

from optimum_clp.checkpoint.loading import load_model
from optimum_clp.checkpoint.saving import save_checkpoint
from optimum_clp.errors import ConfigurationError, ModelError, OutputError, QuantizationError
from optimum_clp.quantization import load_quantized, quanto_obstacle, save_quantized, without_compiler
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model


def quantized_by_quanto(model, weights, tied):
    """quanto's own in-place quantization of a copy: the independent truth."""
    model = copy.deepcopy(model)
    quantize(model, weights=f"q{weights}", exclude=["lm_head"] if tied else None)
    freeze(model)
    return model


def logits(model, ids):
    with torch.no_grad(), without_compiler():
        return model(ids).logits


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_reloaded_model_is_exactly_quantos_own(model_type, tied, weights, tmp_path):
    model, ids = (
        tiny_model(model_type, num_layers=3, tie_word_embeddings=tied, rope_theta=500000.0),
        random_tokens(2, 30),
    )
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    classes, config = [type(m) for m in model.modules()], model.config.to_dict()
    result = save_quantized(model, None, tmp_path / "q", weights, quiet=True)
    reloaded = load_quantized(tmp_path / "q")
    assert torch.equal(logits(reloaded, ids), logits(quantized_by_quanto(model, weights, tied), ids))
    assert not torch.equal(logits(reloaded, ids), logits(model, ids))
    assert not any(m.training for m in reloaded.modules())
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) is tied
    linear = [m for m in reloaded.modules() if isinstance(m, QLinear)]
    assert result.num_quantized == len(linear) == 3 * 7 + (not tied)
    assert result.to_dict() == {
        "folder": "q",
        "weights": weights,
        "num_quantized": len(linear),
        "bytes": (tmp_path / "q" / "quanto.safetensors").stat().st_size,
    }
    # the caller's model is what it was
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [type(m) for m in model.modules()] == classes
    assert model.config.to_dict() == config
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_group_sizes_and_dtypes(weights, dtype, tmp_path):
    # 256 and 384 inputs have groups of 128, for which quanto has a kernel of its own in bfloat16
    model, ids = wide_model(dtype, vocab_size=96), random_tokens(2, 20) % 96
    save_quantized(model, None, tmp_path / "q", weights, quiet=True)
    reloaded = load_quantized(tmp_path / "q")
    assert reloaded.dtype == dtype
    assert torch.equal(logits(reloaded, ids), logits(quantized_by_quanto(model, weights, False), ids))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integers_lie_in_files_where_memory_does_not_hold_them(weights, tmp_path, monkeypatch):
    model, mapped = wide_model(torch.bfloat16, vocab_size=512), []
    from_file = torch.from_file
    monkeypatch.setattr(
        torch, "from_file", lambda *args, **options: mapped.append(args) or from_file(*args, **options)
    )
    for name, limit in (("free", None), ("bound", 1)):
        save_quantized(model, None, tmp_path / name, weights, max_memory=limit, quiet=True)
        # what is written, and what is read back to be compared; smaller tensors stay
        assert len(mapped) == (0 if limit is None else {"int8": 2 * 6 + 1, "int4": 2 * 1 + 1}[weights])
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("free", "bound")]
    assert files[0] == files[1]


def wide_model(dtype, **overrides):
    torch.manual_seed(0)
    config = tiny_config(num_layers=1, hidden_size=256, intermediate_size=384, head_dim=64, **overrides)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def test_head_whose_size_quantos_kernel_refuses(tmp_path):
    # 97 outputs: quanto itself fails to make an int4 layer of it in bfloat16
    model, hidden = wide_model(torch.bfloat16), torch.randn(2, 5, 256, dtype=torch.bfloat16)
    save_quantized(model, None, tmp_path / "q", "int4", quiet=True)
    stored = load_file(tmp_path / "q" / "quanto.safetensors")
    data, scale, shift = (stored[f"lm_head.weight.{part}"].float() for part in ("_data._data", "_scale", "_shift"))
    # two groups of 128 inputs per row; the low halves of the bytes are the first rows
    weight = (torch.cat([data % 16, data // 16]) * scale - shift).reshape(97, 256)
    with torch.no_grad(), without_compiler():
        found = load_quantized(tmp_path / "q").lm_head(hidden).float()
    expected = hidden.float() @ weight.t()
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert (weight - model.lm_head.weight).norm() < 0.15 * weight.norm()


def test_rounding_error_is_that_of_the_number_of_bits(tmp_path):
    model, ids = tiny_model(), random_tokens(2, 30)
    exact, errors = logits(model, ids), {}
    for weights in ("int8", "int4"):
        save_quantized(model, None, tmp_path / weights, weights, quiet=True)
        errors[weights] = ((logits(load_quantized(tmp_path / weights), ids) - exact).norm() / exact.norm()).item()
    assert errors["int8"] < 0.05 < errors["int4"] < 0.7


def test_cut_model_generates_as_quantos_own(tmp_path):
    cut = cut_model(tiny_model(tie_word_embeddings=True), [LayerSegment(2, 4)])
    cut.generation_config = GenerationConfig(eos_token_id=[2, 5], pad_token_id=0)
    save_quantized(cut, None, tmp_path / "q", "int4", quiet=True)
    reloaded, arguments = load_quantized(tmp_path / "q"), {"max_new_tokens": 12, "do_sample": False}
    assert reloaded.generation_config.eos_token_id == [2, 5]
    ids = random_tokens(1, 9)
    with without_compiler():
        expected = quantized_by_quanto(cut, "int4", True).generate(ids, **arguments)
        assert torch.equal(reloaded.generate(ids, **arguments), expected)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_stock_transformers_refuses_the_folder(weights, tmp_path):
    save_quantized(tiny_model(), None, tmp_path / "q", weights, quiet=True)
    with pytest.raises(ValueError, match=r"model type `optimum_clp\.quantization\.load_quantized`"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    with pytest.raises(OSError, match="no file named"):
        type(tiny_model()).from_pretrained(tmp_path / "q")
    with pytest.raises(ModelError, match=r"quantized with quanto.*optimum_clp\.quantization\.load_quantized"):
        load_model(tmp_path / "q")


def test_stock_transformers_refuses_it_in_a_process_without_this_package(tmp_path):
    save_quantized(tiny_model(), None, tmp_path / "q", quiet=True)
    script = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "q")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "optimum_clp.quantization.load_quantized" in done.stderr


def test_tokenizer_is_saved_beside(tmp_path):
    save_quantized(tiny_model(), tiny_tokenizer(), tmp_path / "q", quiet=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "q")(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    for file in (tmp_path / "q").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_head_that_is_not_tied_although_the_config_asks_for_it(tmp_path):
    model, ids = tiny_model(), random_tokens(1, 20)
    model.config.tie_word_embeddings = True
    assert save_quantized(model, None, tmp_path / "q", quiet=True).num_quantized == 6 * 7 + 1
    model.config.tie_word_embeddings = False
    assert torch.equal(
        logits(load_quantized(tmp_path / "q"), ids), logits(quantized_by_quanto(model, "int8", False), ids)
    )


# no compiler


def test_without_compiler_restores_and_gives_the_same_numbers(tmp_path, monkeypatch):
    extension = get_extension("quanto_cpp")
    monkeypatch.setattr(extension, "_lib", None)
    packed = torch.randint(256, (6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with without_compiler():
        assert torch.equal(torch.ops.quanto.unpack(packed, 4), torch.cat([packed % 16, packed // 16]))
        assert torch.ops.quanto.unpack(packed, 2).max() == 3
    assert extension._lib is None
    with pytest.raises(RuntimeError), without_compiler():
        raise RuntimeError
    assert extension._lib is None
    # saving and loading leave nothing behind, and never compile
    monkeypatch.setattr(type(extension), "lib", property(lambda self: self._lib or pytest.fail("would compile")))
    save_quantized(tiny_model(), None, tmp_path / "q", "int4", quiet=True)
    load_quantized(tmp_path / "q")
    assert extension._lib is None
    marker = object()
    monkeypatch.setattr(extension, "_lib", marker)
    with without_compiler():
        assert extension._lib is marker
    assert extension._lib is marker


# bad input


def test_unknown_weights(tmp_path):
    with pytest.raises(ConfigurationError, match="weights is 'int2': it must be one of 'int8', 'int4'"):
        save_quantized(tiny_model(), None, tmp_path / "q", "int2")


def test_nothing_to_quantize(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=9))
    with pytest.raises(
        QuantizationError, match="model is 'GPT2LMHeadModel': linear layers.*less than half.*0%; .*in Conv1D"
    ):
        save_quantized(gpt2, None, tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_a_module_in_two_blocks(tmp_path):
    model = tiny_model()
    model.model.layers[3].mlp = model.model.layers[2].mlp
    with pytest.raises(QuantizationError, match=r"same module under two names \(model\.layers\.3\.mlp\.down_proj\)"):
        save_quantized(model, None, tmp_path / "q")


def test_half_of_the_weights_is_enough(tmp_path):
    model = tiny_model(num_layers=1)
    linear = sum(m.weight.numel() for n, m in model.model.named_modules() if isinstance(m, nn.Linear))
    model.model.layers[0].extra = nn.Conv1d(linear, 1, 1)
    assert quanto_obstacle(model) is None
    model.model.layers[0].extra = nn.Conv1d(linear + 1, 1, 1)
    assert "less than half of its weights (50%; most of the rest is in Conv1d)" in str(quanto_obstacle(model))


def zoo_member(name):
    return zoo_model(next(tiny for tiny in ZOO if tiny.name == name))


def test_linear_layers_that_do_more_than_a_product_stay_in_float(tmp_path):
    model = zoo_member("llama4_text")
    routers = [n for n, m in model.named_modules() if type(m).__name__ == "Llama4Router"]
    save_quantized(model, None, tmp_path / "q", quiet=True)
    reloaded = load_quantized(tmp_path / "q")
    assert routers
    for name in routers:
        assert torch.equal(reloaded.get_submodule(name).weight, model.get_submodule(name).weight)
        assert not isinstance(reloaded.get_submodule(name), QLinear)
    assert torch.isfinite(logits(reloaded, random_tokens(1, 9))).all()


def test_infinite_numbers_in_the_configuration(tmp_path):
    model = zoo_member("mamba2")
    assert model.config.time_step_limit[1] == float("inf")
    save_quantized(model, None, tmp_path / "q", quiet=True)
    assert load_quantized(tmp_path / "q").config.time_step_limit[1] == float("inf")


def test_quantized_twice(tmp_path):
    save_quantized(tiny_model(), None, tmp_path / "q", quiet=True)
    with pytest.raises(QuantizationError, match="it is quantized already. Give the dense model"):
        save_quantized(load_quantized(tmp_path / "q"), None, tmp_path / "q2")


def test_folder_that_is_not_empty(tmp_path):
    (tmp_path / "x").write_text("1")
    with pytest.raises(OutputError, match="it is not empty"):
        save_quantized(tiny_model(), None, tmp_path)
    save_quantized(tiny_model(), None, tmp_path, overwrite=True, quiet=True)
    assert not (tmp_path / "x").exists()


def test_a_layer_that_is_left_is_named(tmp_path, monkeypatch):
    from optimum_clp import quantization

    read = quantization._read

    def partly(folder, room):
        model = read(folder, room)
        model.model.layers[1].mlp.up_proj = nn.Linear(32, 56, bias=False)
        return model

    monkeypatch.setattr(quantization, "_read", partly)
    with pytest.raises(
        QuantizationError, match=r"42 of 43 linear layers are quantized; left are model\.layers\.1\.mlp"
    ):
        save_quantized(tiny_model(), None, tmp_path / "q", quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.model.layers[1].mlp.up_proj.weight._data.neg_(),
            r"its tensor model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (lambda m: m.model.layers[1].mlp.up_proj.weight._scale.mul_(2), r"its tensor model\.layers\.1\.mlp\.up_proj"),
        (lambda m: m.model.norm.weight.add_(1e-6), r"its tensor model\.norm\.weight differs"),
        (lambda m: m.model.rotary_emb.inv_freq.mul_(0.5), r"its tensor model\.rotary_emb\.inv_freq differs"),
    ],
)
def test_a_model_that_is_read_back_wrong_is_found(edit, message, tmp_path, monkeypatch):
    from optimum_clp import quantization

    read = quantization._read

    def wrong(folder, room):
        model = read(folder, room)
        with torch.no_grad():
            edit(model)
        return model

    monkeypatch.setattr(quantization, "_read", wrong)
    with pytest.raises(QuantizationError, match=f"read back, {message}"):
        save_quantized(tiny_model(), None, tmp_path / "q", quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def quantized(tmp_path):
    save_quantized(tiny_model(), None, tmp_path / "q", "int4", quiet=True)
    return tmp_path / "q"


def test_loading_another_folder(tmp_path, quantized):
    save_checkpoint(tiny_model(), None, tmp_path / "plain")
    with pytest.raises(ModelError, match=r"has no quanto_qmap\.json.*load others with AutoModelForCausalLM"):
        load_quantized(tmp_path / "plain")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config["model_config"], "model_type": "llama"}))
    with pytest.raises(ModelError, match=r"not written by .*save_quantized.*QuantizedModelForCausalLM"):
        load_quantized(quantized)


def test_loading_damaged_files(quantized):
    file = quantized / "quanto.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    file.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=r"its quanto\.safetensors is truncated"):
        load_quantized(quantized)
    scale = "model.layers.2.mlp.down_proj.weight._scale"
    save_file({key: tensor for key, tensor in tensors.items() if key != scale}, file)
    with pytest.raises(ModelError, match=rf"lacks 1 tensors and has 0 more, first {scale}"):
        load_quantized(quantized)
    save_file({**tensors, "extra": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="lacks 0 tensors and has 1 more, first extra"):
        load_quantized(quantized)
    (quantized / "quanto_qmap.json").write_text('{"lm_head": {"weights": "qint3"}}')
    with pytest.raises(ModelError, match=r"its quanto_qmap\.json is malformed"):
        load_quantized(quantized)
