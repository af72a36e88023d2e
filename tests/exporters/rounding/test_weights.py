import collections
import copy
import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from quantized_files import dequantized_model, logits_of, read_file, relative_difference
from tiny_models import random_tokens, tiny_model
from tiny_onnx import exported_llama, onnx_test_model, small_zoo_model, state_of, traced_qwen3
from zoo import ZOO, zoo_model

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.errors import ConfigurationError, QuantizationError
from optimum_clp.exporters import export as exporters
from optimum_clp.exporters.experts import unrolled_experts
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.graph.quantize import graph_matrices, quantize_graph
from optimum_clp.exporters.obstacle import onnx_obstacle
from optimum_clp.exporters.rounding.bit_plan import plan_bits, rounding_costs
from optimum_clp.exporters.rounding.half_quadratic import round_half_quadratic
from optimum_clp.exporters.rounding.input_grams import visit_layers, weight_names
from optimum_clp.exporters.rounding.matrices import GraphMatrix, IntegerForm
from optimum_clp.exporters.rounding.nearest import round_to_nearest
from optimum_clp.exporters.rounding.weights import round_weights
from optimum_clp.quantization import load_quantized, save_quantized, without_compiler
from optimum_clp.runtime.session import open_session

TOKENS = random_tokens(6, 20, seed=1)


def inputs_of(model, names, tokens=TOKENS):
    """What enters some linear modules, `[tokens, inputs]`, seen by hooks on one whole forward pass."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture
def no_tracing(monkeypatch):
    """`export_onnx(qwen3.model, ...)` takes the graph that was traced already."""
    monkeypatch.setattr(exporters, "export_float_graph", lambda *args, **options: traced_qwen3().graph.clone())


def linear_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def shrunken(weights, share):
    """What `quantize` returns, with other numbers than integers' for it."""
    return [lambda rows=slice(None), weight=known.weight: weight[rows] * np.float32(share) for known in weights]


def gram_of(sums):
    """Over all tokens."""
    return sum(gram.double() for gram in sums.grams).numpy()


QWEN2_LEVELS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@pytest.mark.parametrize("batch_size", [4, 8])
def test_grams_are_those_of_the_modules_below_as_they_were_replaced(batch_size):
    model, visited, groups = tiny_model("qwen2", num_layers=3), {}, []
    before = state_of(model)
    changed = tiny_model("qwen2", num_layers=3)

    def quantize(weights, sums, tied):
        for known in weights:
            (name,) = known.names
            assert not tied and known.weight.dtype == np.float32
            np.testing.assert_array_equal(known.weight, model.get_parameter(name).detach().numpy())
            visited[name] = sums
        groups.append([known.names[0].rpartition(".")[0].rpartition(".")[2] for known in weights])
        return shrunken(weights, 0.9)

    names = [f"{name}.weight" for name in linear_names(model)]
    visit_layers(model, TOKENS, ["model.embed_tokens.weight", *names], quantize, batch_size=batch_size, quiet=True)
    assert state_of(model) == before
    assert list(visited) == ["model.embed_tokens.weight", *names]
    assert visited.pop("model.embed_tokens.weight") is None
    # modules that share their input come together
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert groups == [["embed_tokens"], *layer * 3, ["lm_head"]]
    floats = inputs_of(model, linear_names(model))
    levels = [[f"model.layers.{index}.{name}" for name in level] for index in range(3) for level in QWEN2_LEVELS]
    with torch.no_grad():
        changed.model.embed_tokens.weight.mul_(0.9)
    # halves are even and odd rows of each batch, all of which have an even number of rows here
    even = (torch.arange(TOKENS.numel()) // TOKENS.shape[1]) % 2 == 0
    for level in [*levels, ["lm_head"]]:
        for name, inputs in inputs_of(changed, level).items():
            found, drift = visited[f"{name}.weight"], floats[name] - inputs
            for rows, gram, change in zip((even, ~even), found.grams, found.drifts, strict=True):
                assert gram.dtype == change.dtype == torch.float32
                scale = float(inputs.square().sum())
                expected = (inputs[rows].T @ inputs[rows], drift[rows].T @ inputs[rows])
                for sums, right in zip((gram, change), expected, strict=True):
                    torch.testing.assert_close(sums.double(), right, rtol=1e-4, atol=1e-5 * scale)
        with torch.no_grad():
            for name in level:
                changed.get_parameter(f"{name}.weight").mul_(0.9)


def test_the_float_model_computes_each_layer_once():
    """One pass of it serves all levels; the rounded model computes what lies below a level for each of them."""
    model = tiny_model("llama", num_layers=3)
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    wanted = [f"{name}.weight" for name in linear_names(model)]
    calls = collections.Counter()
    for module in names:
        module.register_forward_pre_hook(lambda module, args: calls.update([names[module]]))

    def counted(batch_size):
        calls.clear()
        visit_layers(
            model, TOKENS, wanted, lambda found, sums, tied: shrunken(found, 1), batch_size=batch_size, quiet=True
        )
        return calls.copy()

    # what two batches more cost: there are looks at a single batch too
    more = {name: count // (2 * 3) for name, count in (counted(2) - counted(6)).items() if "_proj" in name}
    # the float model; the module's own level, which ends before the last of it, and those above; what leaves the layer
    above = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 3, "gate_proj": 2, "up_proj": 2, "down_proj": 1}
    assert more == {name: 1 + levels + 1 for name, levels in above.items()}


def test_the_table_of_a_tied_model_comes_first_with_what_enters_its_head():
    calls = []

    def quantize(weights, sums, tied):
        calls.append(([known.names for known in weights], tied, sums))
        return shrunken(weights, 0.9)

    model = tiny_model("llama", num_layers=2, tie_word_embeddings=True)
    wanted = ["lm_head.weight", "model.layers.0.self_attn.q_proj.weight"]
    visit_layers(model, TOKENS, wanted, quantize, quiet=True)
    assert [(names, tied) for names, tied, _ in calls] == [
        ([["model.embed_tokens.weight", "lm_head.weight"]], True),
        ([["model.layers.0.self_attn.q_proj.weight"]], False),
    ]
    inputs = inputs_of(model, ["lm_head"])["lm_head"]
    np.testing.assert_allclose(gram_of(calls[0][2]), (inputs.T @ inputs).numpy(), rtol=1e-4, atol=1e-2)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.9)
    inputs = inputs_of(model, ["model.layers.0.self_attn.q_proj"])["model.layers.0.self_attn.q_proj"]
    np.testing.assert_allclose(gram_of(calls[1][2]), (inputs.T @ inputs).numpy(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("batch_size", [8, 1])
def test_experts_have_grams_of_the_tokens_that_reach_them(batch_size):
    if batch_size == 1 and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 calls no expert without tokens, and its Mixtral has no ONNX file")
    (tiny,) = [tiny for tiny in ZOO if tiny.name == "mixtral"]
    model, found = small_zoo_model(tiny, num_layers=1), {}
    # one by one, few tokens reach few experts
    tokens = TOKENS if batch_size == 8 else TOKENS.reshape(-1, 1)[:64]

    def quantize(weights, sums, tied):
        found.update({known.names[0]: sums for known in weights})
        return shrunken(weights, 0.9)

    with unrolled_experts(model):
        names = [name for names in weight_names(model).values() for name in names]
    visit_layers(model, tokens, names, quantize, batch_size=batch_size, quiet=True)
    experts = {name: sums for name, sums in found.items() if ".experts." in name}
    # of the two matrices that read an expert's tokens, transformers 4 keeps `w1` and `w3`, and 5 one for both
    first = {name: sums for name, sums in experts.items() if ".up." in name or ".w1." in name}
    assert len(first) == model.config.num_local_experts
    # tokens may go elsewhere in the quantized model, so there is nothing to compare with
    assert all(sums.drifts is None and len(sums.grams) == 1 for sums in experts.values())
    assert found["model.layers.0.self_attn.o_proj.weight"].drifts is not None
    # each token reaches so many experts with what leaves the norm behind the attention as it is quantized
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name or "embed_tokens" in name:
                parameter.mul_(0.9)
    seen = []
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=tokens)
    total = sum(np.trace(gram_of(sums)) for sums in first.values())
    expected = model.config.num_experts_per_tok * float(seen[0].double().square().sum())
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_states_that_are_not_finite_are_told():
    model = tiny_model("llama", num_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    names = [f"{name}.weight" for name in linear_names(model)]
    with pytest.raises(QuantizationError, match=r"weight is 'model\.layers\.1\.mlp\.down_proj\.weight': .*not finite"):
        visit_layers(model, TOKENS, names, lambda weights, sums, tied: shrunken(weights, 1), quiet=True)


@pytest.mark.parametrize("tied", [True, False])
def test_gptq_has_smaller_errors_than_rounding_to_nearest(tied):
    model = exported_llama().model if tied else traced_qwen3().model
    if tied:
        graph = ir.load(exported_llama().folder / "onnx/model.onnx")
    else:
        graph = traced_qwen3().graph.clone()
    before = state_of(model)
    matrices = graph_matrices(graph, True)
    config = QuantizationConfig(method="gptq", group_size=16)
    rounded = round_weights(model, 4, matrices, config, TOKENS, quiet=True)
    assert state_of(model) == before
    assert rounded.matrices.keys() == matrices.keys() - ({"model.embed_tokens.weight"} if not tied else set())
    errors = {"fed": 0.0, "nearest": 0.0}
    for name, inputs in inputs_of(model, linear_names(model)).items():
        # a tied table is in the graph under one of its two names
        name = name if f"{name}.weight" in matrices else "model.embed_tokens"
        weight = model.get_parameter(f"{name}.weight").detach().numpy()
        for kind, matrix in (
            ("fed", rounded.matrices[f"{name}.weight"]),
            ("nearest", round_to_nearest(weight, 4, 16)),
        ):
            error = ((weight - matrix.dequantize()) @ inputs.float().numpy().T) ** 2
            errors[kind] += error.sum() / (weight @ inputs.float().numpy().T).var() / error.size
    assert errors["fed"] < 0.8 * errors["nearest"]


def test_gptq_export_holds_what_was_rounded(no_tracing, tmp_path):
    model = traced_qwen3().model
    config = QuantizationConfig(weights=["int4"], method="gptq", accuracy_level=1)
    result = export_onnx(model, tmp_path, quantization=config, calibration=TOKENS, quiet=True)
    rounded = round_weights(model, 4, graph_matrices(traced_qwen3().graph, True), config, TOKENS, quiet=True)
    stored = read_file(tmp_path / "onnx/model_q4.onnx")
    assert len(rounded.matrices) == 15
    for name, matrix in rounded.matrices.items():
        np.testing.assert_allclose(stored[name][:, : matrix.columns], matrix.dequantize(), rtol=1e-6)
    ids = random_tokens(2, 9)
    with torch.no_grad():
        reference = dequantized_model(model, tmp_path / "onnx/model_q4.onnx")(input_ids=ids).logits
    assert relative_difference(logits_of(tmp_path / "onnx/model_q4.onnx", ids), reference) < 1e-5
    assert [file.num_quantized_matmuls for file in result.files] == [0, 15]


def test_auto_is_gptq_where_there_is_text(no_tracing, tmp_path):
    model = traced_qwen3().model
    values = {}
    for name, method, text in (
        ("auto", "auto", TOKENS),
        ("gptq", "gptq", TOKENS),
        ("none", "auto", None),
        ("rtn", "rtn", None),
    ):
        config = QuantizationConfig(weights=["int4"], method=method)
        export_onnx(model, tmp_path / name, quantization=config, calibration=text, quiet=True)
        values[name] = (tmp_path / name / "onnx/model_q4.onnx").read_bytes()
    assert values["auto"] == values["gptq"] != values["none"] == values["rtn"]


def test_bits_per_weight_are_what_the_file_stores(no_tracing, tmp_path):
    result = export_onnx(traced_qwen3().model, tmp_path, quiet=True)
    assert result.files[0].bits_per_weight == 32
    weights = sum(p.numel() for p in traced_qwen3().model.parameters() if p.dim() == 2)
    for file in result.files[1:]:
        stored = onnx.load(tmp_path / file.file).graph.initializer
        parts = [onnx.numpy_helper.to_array(t) for t in stored if "_int" in t.name or "_scales" in t.name]
        size = sum(part.nbytes for part in parts if part.dtype != np.int64)
        assert file.bits_per_weight == pytest.approx(8 * size / weights)
        assert json.loads(json.dumps(result.to_dict()))["files"][1]["bits_per_weight"] > 8.5


def test_costs_are_near_the_divergence_of_each_matrix_alone():
    model = onnx_test_model("llama", tied=True, num_layers=2)
    tokens = random_tokens(40, 24, seed=2)
    names = [n for n, p in model.named_parameters() if p.dim() == 2]
    before = state_of(model)
    costs = rounding_costs(model, tokens, names, 16, quiet=True)
    assert state_of(model) == before and costs.keys() == set(names)
    with torch.no_grad():
        dense = model(input_ids=tokens).logits.log_softmax(-1)
        measured = {}
        for name in names:
            parameter = model.get_parameter(name)
            original = parameter.clone()
            parameter.copy_(torch.from_numpy(round_to_nearest(original.numpy(), 4, 16).dequantize()))
            found = model(input_ids=tokens).logits.log_softmax(-1)
            measured[name] = (dense.exp() * (dense - found)).sum(-1).mean().item()
            parameter.copy_(original)
    ratios = [costs[name] / measured[name] for name in names]
    assert 0.4 < min(ratios) and max(ratios) < 2.5, dict(zip(names, ratios, strict=True))
    order = [np.argsort([values[name] for name in names]).argsort() for values in (costs, measured)]
    assert np.corrcoef(order)[0, 1] > 0.9


@pytest.mark.parametrize("tied", [True, False])
def test_costs_are_the_same_beside_an_embedding_that_stays_in_float(tied):
    model = onnx_test_model("llama", tied=tied, num_layers=1)
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 2]
    others = [name for name in names if name != "model.embed_tokens.weight"]
    costs = rounding_costs(model, TOKENS, names, 16, quiet=True)
    assert rounding_costs(model, TOKENS, others, 16, quiet=True) == {name: costs[name] for name in others}
    assert min(costs.values()) > 0


def test_plan_spends_the_budget_on_what_costs_most():
    matrices = {
        "small": GraphMatrix(16, 32),
        "large": GraphMatrix(64, 32),
        "router": GraphMatrix(4, 32, is_router=True),
        "unseen": GraphMatrix(8, 32),
    }
    costs = {"small": 1.0, "large": 2.0, "router": 9.0}
    weights = sum(m.rows * m.columns for m in matrices.values())

    def spent(names):
        bits = {n: 8 if n in names or m.is_router else 4 for n, m in matrices.items()}
        return 8 * sum(m.stored_bytes(IntegerForm(bits[n], 32)) for n, m in matrices.items()) / weights

    assert plan_bits(matrices, costs, 32, spent(()) + 1e-9) == {}
    assert plan_bits(matrices, costs, 32, spent(("small",))) == {"small": IntegerForm(8, 32)}
    # the small one gains more for a byte, and both fit
    assert list(plan_bits(matrices, costs, 32, spent(("small", "large")))) == ["small", "large"]
    # the small one alone fits
    assert list(plan_bits(matrices, {"small": 1.0, "large": 8.0}, 32, spent(("small",)) + 0.1)) == ["small"]
    with pytest.raises(
        QuantizationError, match=r"bits_per_weight is 4\.25: in 4 bits with groups of 32 this model takes 4\.67"
    ):
        plan_bits(matrices, costs, 32, 4.25)


def test_plan_gives_many_6_bits_before_it_gives_some_8():
    """And scales for 64 weights where there are more than 4 bits, until there is room for more of them."""
    matrices = {name: GraphMatrix(16, 128) for name in ("a", "b", "c")} | {"odd": GraphMatrix(16, 96)}
    costs = {"a": 1.2, "b": 1.1, "c": 1.0, "odd": 0.6}
    found = {
        bits: plan_bits(matrices, costs, 32, bits, offered=(6, 8)) for bits in (4.5, 5.0, 6.0, 6.3, 7.0, 8.4, 8.5, 10)
    }
    six, eight = IntegerForm(6, 64), IntegerForm(8, 64)
    assert found[4.5] == {}
    assert found[5.0] == {"a": six}
    assert found[6.0] == {"a": six, "b": six, "c": six}
    assert found[6.3] == {"a": six, "b": six, "c": six, "odd": IntegerForm(6, 32)}
    assert {name: form.bits for name, form in found[7.0].items()} == {"a": 8, "b": 6, "c": 6, "odd": 6}
    assert set(found[8.4].values()) >= {eight}
    assert found[8.5] == found[10] == dict.fromkeys(matrices, IntegerForm(8, 32))
    # what is to have one form costs what all of it costs, and fits as a whole or not at all
    group = [frozenset({"b", "c"})]
    assert plan_bits(matrices, costs, 32, 5.0, (6, 8), group) == {"a": six}
    assert plan_bits(matrices, {"b": 5.0}, 32, 5.5, (6, 8), group) == {"b": six, "c": six}
    # without it as before
    assert plan_bits(matrices, costs, 32, 6.3) == {"a": eight, "odd": IntegerForm(8, 32)}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_budget_is_kept_by_the_file(method, no_tracing, tmp_path):
    config = QuantizationConfig(weights=["int4"], method=method, bits_per_weight=7.5)
    result = export_onnx(traced_qwen3().model, tmp_path, quantization=config, calibration=TOKENS, quiet=True)
    assert 7 < result.files[1].bits_per_weight <= 7.5
    nodes = onnx.load(tmp_path / "onnx/model_q4.onnx").graph.node
    bits = [a.i for node in nodes for a in node.attribute if a.name == "bits"]
    assert len(bits) == 16 and set(bits) == {4, 8}
    assert result.files[1].max_relative_error < 0.5


@pytest.mark.parametrize("budget", [None, 7.5])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_head_has_8_bits_if_it_is_asked_for(method, budget, no_tracing, tmp_path):
    model = traced_qwen3().model
    config = QuantizationConfig(weights=["int4"], method=method, head_bits=8, bits_per_weight=budget)
    result = export_onnx(model, tmp_path, quantization=config, calibration=TOKENS, quiet=True)
    said = [
        {a.name: a.i for a in node.attribute}
        for node in onnx.load(tmp_path / "onnx/model_q4.onnx").graph.node
        if node.op_type == "MatMulNBits"
    ]
    heads = [each["bits"] for each in said if each["N"] == model.config.vocab_size]
    assert heads == [8]
    others = {each["bits"] for each in said if each["N"] != model.config.vocab_size}
    assert others == ({4} if budget is None else {4, 8})
    assert budget is None or 7 < result.files[1].bits_per_weight <= budget


def test_quanto_int8_file_says_what_quanto_says(no_tracing, tmp_path):
    model = traced_qwen3().model
    config = QuantizationConfig(weights=["int8"], method="quanto")
    result = export_onnx(model, tmp_path, quantization=config, quiet=True)
    save_quantized(model, None, tmp_path / "quanto", "int8", quiet=True)
    ids = random_tokens(2, 9)
    with torch.no_grad():
        reference = load_quantized(tmp_path / "quanto")(input_ids=ids).logits
    assert relative_difference(logits_of(tmp_path / "onnx/model_quantized.onnx", ids), reference) < 1e-4
    assert (result.files[1].num_quantized_matmuls, result.files[1].num_quantized_embeddings) == (15, 0)


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(32, 56), (256, 192)])
def test_quanto_int4_file_says_what_quanto_says(hidden_size, intermediate_size, tmp_path):
    """Rows without groups; groups of 128 and of 96, of which `MatMulNBits` has no block."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    model = onnx_test_model("llama", tied=True, num_layers=1, **sizes)
    config = QuantizationConfig(weights=["int4"], method="quanto")
    result = export_onnx(model, tmp_path, quantization=config, quiet=True)
    save_quantized(model, None, tmp_path / "quanto", "int4", quiet=True)
    ids = random_tokens(2, 9)
    with torch.no_grad(), without_compiler():
        reference = load_quantized(tmp_path / "quanto")(input_ids=ids).logits
    assert relative_difference(logits_of(tmp_path / "onnx/model_q4.onnx", ids), reference) < 1e-4
    # the rounding itself is far larger than that
    assert result.files[1].max_relative_error > 0.01
    assert (result.files[1].num_quantized_matmuls, result.files[1].num_quantized_embeddings) == (7, 0)


@pytest.mark.parametrize("format", ["contrib", "qdq"])
def test_hqq_file_says_what_the_rounded_matrices_say(format, no_tracing, tmp_path):
    model = traced_qwen3().model
    config = QuantizationConfig(weights=["int4"], method="hqq", accuracy_level=1, quantize_embeddings=False)
    result = export_onnx(model, tmp_path, ExportConfig(format=format), config, quiet=True)
    assert result.files[1].bits_per_weight >= 5
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear):
                matrix = round_half_quadratic(module.weight.numpy(), 4, 32)
                module.weight.copy_(torch.from_numpy(matrix.dequantize()))
        ids = random_tokens(2, 9)
        reference = rounded(input_ids=ids).logits
    file = tmp_path / "onnx/model_q4.onnx"
    # a plain session multiplies standard operators in int8, whatever the file was exported to
    assert relative_difference(logits_of(file, ids, open_session(file)), reference) < 1e-4


def test_calibration_text_is_asked_for_before_any_work(tmp_path):
    model = traced_qwen3().model
    with pytest.raises(
        ConfigurationError, match=r"quantization\.method is 'gptq': .*none was given\. Give calibration"
    ):
        export_onnx(model, tmp_path, quantization=QuantizationConfig(method="gptq"))
    planned = QuantizationConfig(method="rtn", bits_per_weight=6)
    with pytest.raises(ConfigurationError, match=r"quantization\.bits_per_weight is 6: .*none was given"):
        export_onnx(model, tmp_path, quantization=planned, calibration=TOKENS[:0])
    assert list(tmp_path.iterdir()) == []


def test_a_rounded_weight_that_is_not_in_the_graph_is_told():
    matrix = round_to_nearest(np.ones((4, 32), np.float32), 4, 32)
    with pytest.raises(QuantizationError, match="'elsewhere.weight': 1 weights that were rounded .* are not in the"):
        quantize_graph(
            traced_qwen3().graph.clone(),
            4,
            block_size=32,
            accuracy_level=4,
            quantize_embeddings=True,
            rounded={"elsewhere.weight": matrix},
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "awq"}, r"quantization\.method is 'awq': .*'auto', 'rtn', 'hqq', 'gptq', 'quanto'"),
        ({"bits_per_weight": 3}, r"quantization\.bits_per_weight is 3: it must be a number between 4 and 10, or None"),
        ({"calibration_sequences": 0}, r"quantization\.calibration_sequences is 0: .*from 1 to"),
        ({"method": "quanto", "bits_per_weight": 6}, r"bits_per_weight is 6: quanto's integers are taken as they are"),
        (
            {"method": "hqq", "bits_per_weight": 6},
            r"bits_per_weight is 6: .* groups without zero points, which HQQ has",
        ),
    ],
)
def test_values_out_of_range_are_told(values, message):
    with pytest.raises(ConfigurationError, match=message):
        CLPConfig(quantization=values)


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [pytest.param(tiny, id=tiny.name) for tiny in ZOO])
def test_every_matrix_of_every_architecture_is_visited(tiny):
    if onnx_obstacle(zoo_model(tiny)) is not None:
        pytest.skip("has no ONNX file")
    model, visited = small_zoo_model(tiny), {}
    model = copy.deepcopy(model).float()

    def quantize(weights, sums, tied):
        visited.update({known.names[0]: sums for known in weights})
        return shrunken(weights, 0.98)

    with unrolled_experts(model):
        aliases = list(weight_names(model).values())
    before = state_of(model)
    visit_layers(model, TOKENS, [name for names in aliases for name in names], quantize, quiet=True)
    assert state_of(model) == before
    missed = {names[0] for names in aliases if ".layers." in names[0]} - visited.keys()
    # a tower for pictures, experts that no token reaches, and a router that multiplies by its weight in its own way
    apart = ("vision", ".experts.", ".router.")
    assert not [name for name in missed if not any(part in name for part in apart)]
    with_drifts = [name for name, sums in visited.items() if sums is not None and sums.drifts is not None]
    assert len(with_drifts) >= sum("o_proj" in name for name in visited)
