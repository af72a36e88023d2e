"""What a plan predicts, against published figures, arithmetic written out, and what the real stages make."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from big_shapes import BIG_SHAPES, PUBLISHED
from safetensors import safe_open
from tiny_models import MODEL_TYPES, VOCABULARY, random_tokens, tiny_config
from tiny_onnx import exported_llama, onnx_test_model
from transformers import AutoModelForCausalLM, LlamaConfig
from zoo import ALL, zoo_config

from optimum_clp import plan_pruning
from optimum_clp.architecture.lookup import allowed_segments, decoder_layers
from optimum_clp.checkpoint.saving import save_checkpoint
from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.configuration.stages import QuantizationConfig, TuningConfig
from optimum_clp.errors import ConfigurationError, CutError, ModelError
from optimum_clp.exporters.export import export_onnx
from optimum_clp.planning import plan as plan_module
from optimum_clp.planning.footprint import onnx_weight_bytes
from optimum_clp.planning.plan import build_on_meta
from optimum_clp.segments import LayerSegment, endpoint_layers, kept_layers
from optimum_clp.surgery import cut as surgery
from optimum_clp.surgery import guard
from optimum_clp.surgery.cut import cut_model
from optimum_clp.surgery.sizes import count_bytes, count_parameters
from optimum_clp.tuning.activations import layer_activations
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.loop import MasterAdamW, TrainingLoop

ROOT = Path(__file__).parents[2]
GRAPH_BYTES_PER_LAYER = 16_000
NO_ONNX = {"enabled": False}


@pytest.mark.parametrize("name", BIG_SHAPES)
def test_closed_form_and_meta_model_have_the_published_number_of_parameters(name):
    shape = BIG_SHAPES[name]
    assert shape.parameters() == PUBLISHED[name]
    model = build_on_meta(shape.config(), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


def check_big_plan(name):
    shape = BIG_SHAPES[name]
    plan = plan_pruning(shape.config(), CLPConfig(0.2))
    removed = {28: 6, 32: 6, 40: 8, 80: 16}[shape.layers]
    assert (plan.num_layers, plan.num_removed, plan.dtype) == (shape.layers, removed, "bfloat16")
    assert (plan.num_parameters, plan.bytes) == (PUBLISHED[name], 2 * PUBLISHED[name])
    assert set(plan.layer_parameters) == {shape.layer_parameters()} and len(plan.layer_parameters) == shape.layers
    assert [cut.segment for cut in plan.cuts] == [
        LayerSegment(s, s + removed) for s in range(shape.layers - removed + 1)
    ]
    left = shape.parameters(shape.layers - removed)
    for cut in plan.cuts:
        assert (cut.num_parameters, cut.bytes, cut.onnx["float32"]) == (left, 2 * left, 4 * left)
        # int4: 18 bytes for 32 weights. All widths are multiples of 32; norms and biases stay in float32
        vectors = left - 2 * shape.vocabulary * shape.hidden - (shape.layers - removed) * matrices(shape)
        assert cut.onnx["int4"] == (left - vectors) * 18 // 32 + 4 * vectors
    return plan


def matrices(shape):
    """Parameters of the linear layers of one decoder layer, biases left out."""
    head = shape.hidden // shape.heads
    return 2 * shape.hidden * head * (shape.heads + shape.key_value_heads) + 3 * shape.hidden * shape.intermediate


@pytest.mark.parametrize("name", ["LLaMA-2 7B", "Qwen2.5-7B"])
def test_plan_of_a_big_shape(name):
    check_big_plan(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG_SHAPES)
def test_plan_of_every_big_shape(name):
    check_big_plan(name)


def test_tuning_of_a_big_shape_by_hand():
    recipe = CLPConfig(0.2, export=NO_ONNX, calibration={"train_sequences": 192}, tuning={"init": "least_squares"})
    plan = plan_pruning(BIG_SHAPES["LLaMA-2 7B"].config(), recipe)
    layer, cut = 202_383_360, plan.cuts[10]  # two trained layers, 9 below the first, 17 above it
    assert cut.onnx == {}
    memory = cut.tuning
    assert memory.weights == 13_476_831_232
    assert memory.endpoints == 2 * layer * 2
    assert memory.masters == 2 * layer * 4
    assert memory.gradients == 2 * layer * 2 + 4096 * 11008 * 4
    assert memory.moments == 2 * layer * 8
    tokens = (192 + 24) * 256
    # what enters the first endpoint, what leaves the last layer, and what should leave the two endpoints
    assert memory.caches == 4 * tokens * 4096 * 2 + 8 * tokens
    assert memory.closed_form == 4 * 11008**2 * 8 + tokens * 4096 * 2
    frozen = 2 * 4 * (4096 + 1) + 2 * (
        4 * 4096 + 3 * 11008
    )  # two norms; twice the query, key, value; three of the MLP
    trained = frozen + 2 * (4 * 4096 + 4096 + 11008)
    assert memory.activations == 8 * 256 * (15 * frozen + 2 * trained + 4 * 4097)
    assert memory.logits == 32000 * (2048 * (2 * 2 + 2) + 4 * (2**22 // 32000) * 4), "logits and the gradient"
    recipe.tuning.logit_share = 0.25
    less = plan_pruning(BIG_SHAPES["LLaMA-2 7B"].config(), recipe).cuts[10].tuning
    # a validation batch, all of whose positions are compared
    assert less.logits == 32000 * (2048 * 2 * 2 + 4 * (2**22 // 32000) * 4)
    assert memory.main_memory == memory.caches
    assert plan.cuts[0].tuning.endpoints == layer * 2, "one trained layer: the cut has one side"


DRY_RUN = """
import resource, sys
from optimum_clp.commands.clp import main
status = main(["prune", "--model", sys.argv[1], "--dry-run", "--json"])
unit = 2**20 if sys.platform == "darwin" else 2**10
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, file=sys.stderr)
sys.exit(status)
"""


def peak_mebibytes(name, folder):
    BIG_SHAPES[name].config().save_pretrained(folder)
    done = subprocess.run([sys.executable, "-c", DRY_RUN, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base_model"]["num_parameters"] == PUBLISHED[name]
    return float(done.stderr.split()[-1])


def test_no_weight_is_allocated(tmp_path):
    assert peak_mebibytes("LLaMA-2 7B", tmp_path) < 1536 < 13_476_831_232 / 2**20 / 5


@pytest.mark.slow
def test_no_weight_of_70_billion_is_allocated(tmp_path):
    assert peak_mebibytes("LLaMA-2 70B", tmp_path) < 1536


def real_model(config, dtype):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def file_of_tensors(folder):
    """Bytes of the tensors in `model.safetensors`: the file without its header."""
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    with safe_open(path, "pt") as file:
        assert set(file.keys())
    return path.stat().st_size - 8 - header


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sizes_are_those_of_the_real_cut_and_its_file(model_type, dtype, tied, tmp_path):
    config = tiny_config(model_type, 6, tie_word_embeddings=tied)
    plan = plan_pruning(config, CLPConfig(0.34), dtype=dtype)
    dense = real_model(config, dtype)
    assert (plan.num_parameters, plan.bytes) == (count_parameters(dense), count_bytes(dense))
    planned = plan.cuts[len(plan.cuts) // 2]
    cut = cut_model(dense, [planned.segment])
    assert len(decoder_layers(cut)) == 4
    assert (planned.num_parameters, planned.bytes) == (count_parameters(cut), count_bytes(cut))
    save_checkpoint(cut, None, tmp_path)
    assert file_of_tensors(tmp_path) == planned.bytes


def test_layers_of_different_sizes_are_planned_one_by_one():
    tiny = next(t for t in ALL if t.model_type == "qwen3_moe")
    config = zoo_config(tiny)
    plan = plan_pruning(config, CLPConfig(0.25))
    assert len(set(plan.layer_parameters)) == 2, "dense and sparse layers"
    assert [c.segment for c in plan.cuts] == allowed_segments(config, 2)
    dense = real_model(config, torch.float32)
    for planned in plan.cuts:
        assert planned.num_parameters == count_parameters(cut_model(dense, [planned.segment]))
    gone = {cut.num_parameters: sum(plan.layer_parameters[cut.segment.start : cut.segment.stop]) for cut in plan.cuts}
    assert len(gone) > 1
    assert all(left == plan.num_parameters - removed for left, removed in gone.items())


def test_every_segment_meets_the_guard(monkeypatch):
    seen, original = [], guard.check_cut

    def check(cut, dense, kept):
        assert len(decoder_layers(cut)) == len(kept)
        seen.append(kept)
        return original(cut, dense, kept)

    # where plan and cut_model look it up: a first cut of a config is checked by the one, the others by the other
    monkeypatch.setattr(plan_module, "check_cut", check)
    monkeypatch.setattr(surgery, "check_cut", check)
    plan_pruning(tiny_config("qwen2", 6), CLPConfig(0.34))
    assert seen == [[2, 3, 4, 5], [0, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 5], [0, 1, 2, 3]]


def naive_cut(config, kept):
    """What a cut without rules does: the number of layers changes, and nothing else."""
    new = copy.deepcopy(config)
    for name in ("layer_types", "mlp_only_layers"):
        if getattr(config, name, None):
            setattr(new, name, getattr(config, name)[: len(kept)])
    new.num_hidden_layers = len(kept)
    return new


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe"])
def test_guard_refuses_a_config_that_does_not_say_what_is_left(model_type, monkeypatch):
    monkeypatch.setattr(plan_module, "cut_config", naive_cut)
    monkeypatch.setattr(surgery, "cut_config", naive_cut)
    with pytest.raises(CutError, match="cut model.* the dense model has .*nothing was written"):
        plan_pruning(zoo_config(next(t for t in ALL if t.model_type == model_type)), CLPConfig(0.25))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_left_has_the_tensors_of_the_real_cut(model_type):
    config = tiny_config(model_type, 6)
    planned, real = (
        cut_model(dense, [LayerSegment(2, 4)])
        for dense in (build_on_meta(config, torch.bfloat16), real_model(config, torch.bfloat16))
    )
    assert all(t.is_meta for t in planned.state_dict().values())
    assert [(n, t.shape, t.dtype) for n, t in planned.state_dict().items()] == [
        (n, t.shape, t.dtype) for n, t in real.state_dict().items()
    ]


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_onnx_bytes_are_those_of_a_tied_file_but_for_its_graph(weights):
    exported = exported_llama()
    (file,) = [f for f in exported.result.files if f.weights == weights]
    predicted = onnx_weight_bytes(exported.model, weights, QuantizationConfig())
    assert 0 < file.bytes - predicted < (2 + 1) * GRAPH_BYTES_PER_LAYER


@pytest.mark.parametrize(("method", "bits"), [("rtn", 4.5), ("hqq", 5.0)])
def test_bits_of_a_large_model_are_counted_with_their_scales(method, bits):
    """Of a model of 119 million weights: matrices take so many bits, norms 32."""
    config = LlamaConfig(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=15,
                         num_attention_heads=12, num_key_value_heads=4, tie_word_embeddings=True)  # fmt: skip
    model = build_on_meta(config, torch.float32)
    table = model.get_input_embeddings().weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - table
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    predicted = onnx_weight_bytes(model, "int4", QuantizationConfig(method=method))
    assert predicted == matrices * bits / 8 + table * 4.5 / 8 + norms * 4


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx_bytes_with_a_float_embedding_and_another_group_size(tied, tmp_path):
    model = onnx_test_model("qwen2", tied=tied, num_layers=2)
    quantization = QuantizationConfig(weights=["int4"], group_size=16, quantize_embeddings=False)
    result = export_onnx(model, tmp_path, quantization=quantization, quiet=True)
    for file in result.files:
        predicted = onnx_weight_bytes(model, file.weights, quantization)
        assert 0 < file.bytes - predicted < (2 + 1) * GRAPH_BYTES_PER_LAYER


def held(tensors):
    """Bytes of the distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def largest_of(student):
    return max(p.numel() for p in student.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("segment", "parameters"), [((0, 2), "none"), ((2, 4), "none"), ((2, 4), "linear"), ((4, 6), "none")]
)
@pytest.mark.parametrize("loss", ["kd", "hidden"])
def test_tuning_memory_is_that_of_the_tensors(dtype, segment, loss, parameters, monkeypatch):
    config = tiny_config("llama", 6)
    recipe = CLPConfig(
        0.34,
        calibration={"sequence_length": 24, "train_sequences": 5, "validation_sequences": 3},
        tuning={"batch_size": 2, "epochs": 1, "loss": loss, "overparametrization": parameters},
    )
    plan = plan_pruning(config, recipe, dtype=dtype)
    (predicted,) = [c.tuning for c in plan.cuts if c.segment.to_list() == list(segment)]
    dense = real_model(config, dtype)
    assert predicted.weights == held(dense.parameters())
    loops, optimizers, gradients = [], [], []

    class Loop(TrainingLoop):
        def __init__(self, accelerator, student, *arguments, **options):
            super().__init__(accelerator, student, *arguments, **options)
            # while they are what is trained: products are plain weights again at the end
            loops.append((held(student.parameters()), largest_of(student), [self.train, self.validation]))

    class Optimizer(MasterAdamW):
        def step(self, *arguments):
            found = (p.grad for group in self.param_groups for p in group["params"])
            gradients.append(held(gradient for gradient in found if gradient is not None))
            super().step(*arguments)
            optimizers.append(self)

    monkeypatch.setattr("optimum_clp.tuning.endpoints.TrainingLoop", Loop)
    monkeypatch.setattr("optimum_clp.tuning.loop.MasterAdamW", Optimizer)
    model = cut_model(dense, [LayerSegment(*segment)])
    layers = endpoint_layers([LayerSegment(*segment)], 6)
    kept = kept_layers([LayerSegment(*segment)], 6)
    rows = random_tokens(5, 24), random_tokens(3, 24, seed=1)
    tune_layers(model, dense, layers, *rows, recipe.tuning, kept=kept, quiet=True)
    (endpoints, largest, data), optimizer = loops[0], optimizers[-1]
    assert endpoints == predicted.endpoints
    masters = [state["master"] for state in optimizer.state.values() if "master" in state]
    assert held(masters) == predicted.masters
    largest = largest * 4 if dtype != torch.float32 else 0
    assert {size + largest for size in gradients} == {predicted.gradients}
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert held(moments) == predicted.moments
    caches = [t for rows in data for t in (rows.outputs.tokens, rows.inputs, *rows.outputs.hidden.values())]
    assert held(caches) == predicted.caches


def saved_by_autograd(model, first, trained, tokens):
    """Bytes that autograd keeps of the layers from `first` on, with these trained, for each token."""
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        layer.requires_grad_(index in trained)
    found, inside = {}, []
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    for layer in layers[first:]:
        layer.register_forward_pre_hook(lambda *_: inside.append(1))
        layer.register_forward_hook(lambda *_: inside.clear())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=tokens, use_cache=False).logits
    total = sum(size for size, _ in found.values())
    assert logits.requires_grad
    return total / tokens.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_activations_are_about_what_autograd_keeps(model_type, dtype):
    # with windows, where the kernels keep a mask and repeated keys, which the estimate leaves out
    model = real_model(tiny_config(model_type, 6, hidden_size=64, intermediate_size=176), dtype)
    model.requires_grad_(False)
    counted = saved_by_autograd(model, 1, {1, 2}, random_tokens(2, 48))
    layers = decoder_layers(model)
    itemsize = dtype.itemsize
    predicted = sum(layer_activations(layers[i], itemsize, trained=i in (1, 2)) for i in range(1, 6))
    assert predicted == pytest.approx(counted, rel=0.1)


def test_plan_without_tuning_and_with_a_wider_one():
    config = tiny_config("llama", 6)
    assert all(c.tuning is None for c in plan_pruning(config, CLPConfig(0.34, tuning={"enabled": False})).cuts)
    one, two = (
        plan_pruning(config, CLPConfig(0.34, tuning={"endpoint_width": width})).cuts[2].tuning for width in (1, 2)
    )
    assert two.moments == 2 * one.moments


def test_rows_are_no_longer_than_the_context():
    short, long = (
        plan_pruning(tiny_config("llama", 6), CLPConfig(0.34, calibration={"sequence_length": n})) for n in (128, 999)
    )
    assert short.cuts == long.cuts


def test_cross_entropy_alone_needs_one_distribution():
    kd, ce = (
        plan_pruning(tiny_config("llama", 6), CLPConfig(0.34, tuning=TuningConfig(loss=loss))).cuts[0].tuning.logits
        for loss in ("kd", "ce")
    )
    tokens = 8 * 128
    assert kd - ce == VOCABULARY * tokens * 4  # one more set of float32 logits; one gradient, one distribution


def test_dtype_is_the_configs_unless_given():
    config = tiny_config("llama", 6, dtype="float16")
    assert plan_pruning(config, CLPConfig(0.34)).dtype == "float16"
    assert plan_pruning(config, CLPConfig(0.34), dtype="auto").dtype == "float16"
    assert plan_pruning(config, CLPConfig(0.34), dtype="bfloat16").dtype == "bfloat16"
    assert plan_pruning(tiny_config("llama", 6), CLPConfig(0.34)).dtype == "float32"
    for wrong in ("float33", "int8", torch.int64, "nn"):
        with pytest.raises(
            ConfigurationError, match="dtype is .*: it must be a floating-point type of torch, or auto"
        ):
            plan_pruning(config, CLPConfig(0.34), dtype=wrong)


def test_config_is_left_as_it_is_and_the_plan_is_json():
    config = tiny_config("qwen3", 6)
    before = config.to_dict()
    plan = plan_pruning(config)
    assert config.to_dict() == before
    values = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert values == plan.to_dict()
    assert values["num_removed"] == 1 and values["pruning_ratio"] == 0.2
    assert values["cuts"][0]["tuning"]["total"] == plan.cuts[0].tuning.total


def test_refusals_name_what_is_wrong():
    with pytest.raises(ConfigurationError, match=r"pruning_ratio is 0.01: it removes none .* nearest valid ratio is"):
        plan_pruning(tiny_config("llama", 6), CLPConfig(0.01))
    with pytest.raises(ModelError, match="model_type is 'bert': "):
        from transformers import BertConfig

        plan_pruning(BertConfig())
    with pytest.raises(ModelError, match=r"model is 'llama': transformers cannot build it .*Check its config.json"):
        plan_pruning(tiny_config("llama", 6, vocab_size=-5), CLPConfig(0.34))


@pytest.mark.parametrize("model_type", ["llama", "diffllama", "bloom"])  # diffllama's constructor draws values
def test_every_tensor_of_the_model_is_on_the_meta_device(model_type):
    config = zoo_config(next(t for t in ALL if t.model_type == model_type))
    meta, real = build_on_meta(config, torch.float32), real_model(config, torch.float32)
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    assert not meta.training
    shapes = [(name, p.shape, p.dtype) for name, p in real.named_parameters()]
    assert [(name, p.shape, p.dtype) for name, p in meta.named_parameters()] == shapes
