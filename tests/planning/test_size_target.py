"""What is chosen for a size target, against arithmetic written out, plans of fixed ratios, and files that were written."""

import json
import re

import pytest
import torch
from tiny_models import random_tokens, tiny_config, tiny_model
from tiny_onnx import small_zoo_model
from transformers import LlamaConfig
from zoo import ALL

from optimum_clp import CLPConfig, plan_pruning
from optimum_clp.commands.clp import main
from optimum_clp.configuration.stages import ExportConfig
from optimum_clp.errors import ConfigurationError, ModelError
from optimum_clp.exporters.export import export_onnx
from optimum_clp.planning import size_target as size_target_module
from optimum_clp.planning.footprint import onnx_weight_bytes
from optimum_clp.planning.plan import build_on_meta, planned_size
from optimum_clp.planning.size_target import MB, TOLERANCE, quantization_within, size_target
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model

# SmolLM2-135M: a layer, the table, which is the head as well, and what has one dimension
LAYER, TABLE, NORMS = 576 * (2 * 576 + 2 * 192 + 3 * 1536), 49152 * 576, 4 * (61 * 576)
GRAPH_OF_LAYER = 2_500 + 7 * 400 + 2 * 950


def smollm2(**settings):
    """SmolLM2-135M's shape."""
    shape = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**shape | settings)


def plain_mb(layers):
    """Of SmolLM2's int4 file with so many layers, by hand: 4.5 bits a weight, norms in float32, the graph."""
    norms = NORMS - (30 - layers) * 2 * 576 * 4
    return ((layers * LAYER + TABLE) * 4.5 / 8 + norms + layers * GRAPH_OF_LAYER + 10_000) / MB


@pytest.mark.parametrize("target", [25, 40, 60, 64, 70.5, 76, 90, 130])
def test_layers_and_bits_of_smollm2_by_hand(target):
    found = planned_size(smollm2(), CLPConfig(target_size_mb=target))
    removed = next(n for n in range(1, 30) if plain_mb(30 - n) <= target)
    assert found.num_removed == removed
    left = 30 - removed
    spare = (target - plain_mb(left)) * MB
    assert found.bits_per_weight == pytest.approx(4.5 + 8 * spare / (left * LAYER + TABLE))
    assert target - 1e-5 <= found.bytes / MB <= target


def test_bits_go_first_and_layers_after():
    """From the whole model's 4.5 bits downwards layers go, and the bits of what is left stay near the plain format's."""
    dense = build_on_meta(smollm2(), torch.float32)
    found = [size_target(dense, CLPConfig(target_size_mb=mb)) for mb in range(20, 140, 3)]
    removed = [each.num_removed for each in found]
    assert removed == sorted(removed, reverse=True) and removed[-1] == 1
    assert all(each.bits_per_weight >= 4.5 for each in found)
    # what a layer would take is never left over
    assert all(each.bits_per_weight < 4.9 for each in found if each.num_removed > 1)


def refusal(config, **settings):
    with pytest.raises(ConfigurationError) as error:
        planned_size(config, CLPConfig(**settings))
    return str(error.value)


def test_a_target_that_is_too_small_or_too_large_names_the_nearest():
    text = refusal(smollm2(), target_size_mb=10)
    rule = "without 29 of 30 layers, the most that can go, the int4 file takes more in plain 4 bits"
    assert text.startswith(f"target_size_mb is 10: {rule}. The smallest that can be reached is ")
    smallest = float(re.search(r"([\d.]+)\.$", text)[1])
    assert smallest == pytest.approx(plain_mb(1), abs=0.011)
    assert planned_size(smollm2(), CLPConfig(target_size_mb=smallest)).num_removed == 29
    text = refusal(smollm2(), target_size_mb=200)
    rule = "without 1 of 30 layers, the fewest that can go, the int4 file is smaller whatever its bits"
    assert text.startswith(f"target_size_mb is 200: {rule}. The largest that can be reached is ")
    largest = float(re.search(r"([\d.]+)\.$", text)[1])
    assert planned_size(smollm2(), CLPConfig(target_size_mb=largest)).bits_per_weight == pytest.approx(8.5, abs=0.01)


@pytest.mark.parametrize("quantization", [{"method": "hqq"}, {"bits_per_weight": 5.0}])
def test_where_bits_are_given_layers_alone_are_chosen(quantization):
    found = planned_size(smollm2(), CLPConfig(target_size_mb=70, quantization=quantization))
    assert found.bits_per_weight is None
    dense, settings = build_on_meta(smollm2(), torch.float32), CLPConfig(quantization=quantization).quantization
    sizes = {
        count: onnx_weight_bytes(cut_model(dense, [LayerSegment(3, 3 + count)]), "int4", settings) / MB
        for count in (found.num_removed - 1, found.num_removed)
    }
    graph = ((30 - found.num_removed) * GRAPH_OF_LAYER + 10_000) / MB
    assert sizes[found.num_removed] + graph <= 70 < sizes[found.num_removed - 1] + graph + GRAPH_OF_LAYER / MB
    # nothing fills a file that no layer need leave
    text = refusal(smollm2(), target_size_mb=100, quantization=quantization)
    largest = float(re.search(r"largest that can be reached is ([\d.]+)\.$", text)[1])
    assert planned_size(smollm2(), CLPConfig(target_size_mb=largest, quantization=quantization)).num_removed == 1


def test_a_plan_is_within_its_target():
    plan = plan_pruning(smollm2(), CLPConfig(target_size_mb=60))
    assert plan.size_target == planned_size(smollm2(), CLPConfig(target_size_mb=60))
    assert (plan.num_removed, plan.pruning_ratio) == (plan.size_target.num_removed, plan.num_removed / 30)
    assert len(plan.cuts) == 30 - plan.num_removed + 1
    for cut in plan.cuts:
        assert (1 - TOLERANCE) * 60 * MB <= cut.onnx["int4"] <= 60 * MB
    assert json.loads(json.dumps(plan.to_dict()))["size_target"]["target_size_mb"] == 60
    assert plan_pruning(smollm2(), CLPConfig(0.2)).to_dict()["size_target"] is None


def test_only_layers_that_can_go_are_counted_on(monkeypatch):
    dense, recipe = build_on_meta(smollm2(), torch.float32), CLPConfig(target_size_mb=60)
    fewest, plain = size_target(dense, recipe).num_removed, size_target_module.allowed_segments

    def allowed(config, length):
        if length % 5:
            raise ModelError.of("num_removed", length, "they come in fives", "Remove 5")
        return plain(config, length)

    monkeypatch.setattr(size_target_module, "allowed_segments", allowed)
    assert fewest % 5 and size_target(dense, recipe).num_removed == -(-fewest // 5) * 5
    with pytest.raises(ConfigurationError, match="without 25 of 30 layers, the most that can go"):
        size_target(dense, CLPConfig(target_size_mb=10))


def test_of_unlike_layers_the_largest_rest_fits():
    """Where several runs may go, the smallest layers may be the ones that do."""
    dense = build_on_meta(smollm2(), torch.float32)
    for layer in dense.model.layers[::2]:
        layer.mlp.down_proj = torch.nn.Linear(4 * 1536, 576, bias=False, device="meta")
    for count in (1, 2):
        recipe = CLPConfig(target_size_mb=90, num_segments=count)
        removed = size_target(dense, recipe).num_removed
        small = range(1, 2 * removed, 2) if count == 2 else range(1, removed + 1)  # odd ones are small
        kept = [i for i in range(30) if i not in small]
        left = sum(dense.model.layers[i].mlp.down_proj.in_features * 576 + LAYER - 576 * 1536 for i in kept) + TABLE
        norms = NORMS - removed * 2 * 576 * 4
        assert left * 4.5 / 8 + norms + len(kept) * GRAPH_OF_LAYER + 10_000 <= 90 * MB
    assert removed > size_target(dense, CLPConfig(target_size_mb=90)).num_removed


def test_several_runs_of_layers_are_allowed_for():
    one, two = (CLPConfig(target_size_mb=60, num_segments=count) for count in (1, 2))
    assert planned_size(smollm2(), one) == planned_size(smollm2(), two), "its layers are alike"


def test_a_cut_that_is_too_large_in_any_bits_is_refused():
    model = build_on_meta(smollm2(), torch.float32)
    cut = cut_model(model, [LayerSegment(3, 5)])
    assert quantization_within(cut, CLPConfig(0.2)).bits_per_weight is None
    assert quantization_within(cut, CLPConfig(target_size_mb=80)).bits_per_weight > 4.5
    message = (
        r"target_size_mb is 60: the int4 file of this cut model takes about 72.\d+ MB in plain 4 bits. Give at least"
    )
    with pytest.raises(ConfigurationError, match=message):
        quantization_within(cut, CLPConfig(target_size_mb=60))


def test_a_model_of_one_layer_has_none_to_spare():
    assert "a model of one layer has no layer to spare" in refusal(smollm2(num_hidden_layers=1), target_size_mb=60)


def check_file(model, folder, target, format="contrib", **quantization):
    recipe = CLPConfig(
        target_size_mb=target,
        export={"format": format},
        quantization={"weights": ["int4"], "method": "rtn", **quantization},
    )
    chosen = quantization_within(model, recipe)
    result = export_onnx(
        model, folder, ExportConfig(format=format), chosen, calibration=random_tokens(2, 32), quiet=True
    )
    (file,) = (file for file in result.files if file.weights == "int4")
    assert (1 - TOLERANCE) * target * MB <= file.bytes <= target * MB, (file.bytes, target)
    return chosen.bits_per_weight


WIDE = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64, "vocab_size": 500, "initializer_range": 0.03}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "format", "target"),
    [
        ("llama", "contrib", 3.6),
        ("llama", "contrib", 4.4),
        ("llama", "contrib", 5.5),
        ("llama", "qdq", 3.8),
        ("qwen3", "contrib", 5.0),
        ("qwen3", "qdq", 5.0),
    ],
)
def test_files_have_the_sizes_that_were_asked_for(model_type, format, target, tmp_path):
    assert 4.5 < check_file(tiny_model(model_type, num_layers=8, **WIDE), tmp_path, target, format) < 8.5


@pytest.mark.slow
@pytest.mark.parametrize("format", ["contrib", "qdq", "unpacked"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "mixtral", "qwen3_moe"])
def test_a_graph_takes_no_more_than_is_set_aside_for_it(model_type, format, tmp_path):
    model = small_zoo_model(next(tiny for tiny in ALL if tiny.model_type == model_type))
    quantization = CLPConfig(quantization={"weights": ["int4"], "method": "rtn"}).quantization
    result = export_onnx(model, tmp_path, ExportConfig(format=format), quantization, quiet=True)
    (file,) = (file for file in result.files if file.weights == "int4")
    recipe = CLPConfig(target_size_mb=file.bytes / MB, export={"format": format}, quantization=vars(quantization))
    # a target that the file has without any choice is one that it can have
    with pytest.raises(ConfigurationError) as error:
        quantization_within(model, recipe)
    assert float(re.search(r"about ([\d.]+) MB", str(error.value))[1]) * MB >= file.bytes


def test_the_command_line_refuses_a_target_before_any_weight_is_read(tmp_path, capsys):
    tiny_config(num_layers=6).save_pretrained(tmp_path / "m")  # no weights in it
    line = ["-m", str(tmp_path / "m"), "--target-size-mb", "500", str(tmp_path / "out")]
    for command in ("prune", "search"):
        assert main([command, *line]) == 1
        assert (
            "the int4 file is smaller whatever its bits. The largest that can be reached is" in capsys.readouterr().err
        )


def test_the_dry_run_says_what_is_chosen(tmp_path, capsys):
    smollm2().save_pretrained(tmp_path / "m")
    assert main(["prune", "--dry-run", "-m", str(tmp_path / "m"), "--target-size-mb", "60"]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM in float32: 8 of 30 layers would go." in said
    assert (
        "For 60 MB 8 layers go and the rest has 4.50 bits per weight, scales included: an int4 file of at most 60.00 MB"
        in said
    )
