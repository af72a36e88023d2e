import pytest
import torch
from tiny_models import random_tokens, tiny_model
from zoo import ZOO, zoo_model

from optimum_clp.architecture.lookup import decoder_layers, find_architecture
from optimum_clp.configuration.stages import TuningConfig
from optimum_clp.evaluation.live_memory import LiveTensorBytes
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.layer_major import Residence
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.layer_major_student import LayerMajorStudent
from optimum_clp.tuning.student import EndpointStudent

LENGTH = 12
LOSSES = [{"kd": 1.0}, {"ce": 1.0}, {"jsd": 1.0}, {"hidden": 1.0}, {"kd": 0.5, "hidden": 2.0}]
BY_LAYERS = [tiny for tiny in ZOO if not find_architecture(zoo_model(tiny).config).threads_state]


def problem(kind, model, weights, rows=5, first=1, mask=None, window=None, **options):
    """A student of two layers, and what it is called with."""
    torch.manual_seed(3)
    trained = list(decoder_layers(model))[first : first + 2]
    model.requires_grad_(False)
    for layer in trained:
        layer.requires_grad_(True)
    tokens, depth = random_tokens(rows, LENGTH), len(decoder_layers(model))
    dense = DenseOutputs(model, tokens, inputs_of=[first], quiet=True)
    # some types' states are several streams wide
    hidden, target = dense.hidden[first] + 0.1 * torch.randn_like(dense.hidden[first]), dense.hidden[depth]
    teacher = torch.randn_like(dense.logits(slice(None)))[:, window or slice(None)]
    student = kind(model, trained, first, weights, [first + 1], **options)
    given = (lambda part: teacher[part]) if kind is LayerMajorStudent else teacher
    arguments = {"tokens": tokens, "hidden": hidden, "teacher_logits": given, "targets": {first + 1: target}}
    return student, {**arguments, "mask": mask, "window": window}


def step(kind, model, weights, **options):
    """The loss of each row and the gradients of two trained layers."""
    student, arguments = problem(kind, model, weights, **options)
    losses = student(**arguments)
    losses.mean().backward()
    # experts that no token goes to have none
    found = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return losses.detach(), found


def check_same(model, weights, work, **options):
    losses, gradients = step(EndpointStudent, model, weights, **options)
    found, ours = step(LayerMajorStudent, model, weights, **options, residence=Residence(1, work_memory=work))
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
    assert ours.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("weights", LOSSES, ids=str)
@pytest.mark.parametrize("work", [0, float("inf")], ids=["row by row", "all rows"])
def test_losses_and_gradients_are_the_plain_students(weights, work):
    mask = torch.rand(5, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.5
    check_same(tiny_model(), weights, work, mask=mask)


@pytest.mark.parametrize("weights", [{"kd": 1.0}, {"ce": 1.0}, {"kd": 0.5, "jsd": 0.5}], ids=str)
def test_a_window_of_positions_has_the_plain_students_losses_and_gradients(weights):
    mask = torch.rand(5, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.5
    check_same(tiny_model(), weights, 0, mask=mask, window=slice(3, 8))


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "gpt2", "falcon", "mamba", "deepseek_v4", "qwen3_next"])
def test_other_kinds_of_layers_have_the_same_gradients(model_type):
    tiny = next((tiny for tiny in BY_LAYERS if tiny.model_type == model_type), None)
    if tiny is None:
        pytest.skip("this version of transformers has no such type")
    test_every_architecture_that_goes_layer_by_layer_has_the_same_gradients(tiny)


@pytest.mark.slow
@pytest.mark.parametrize("tiny", BY_LAYERS, ids=lambda t: f"{t.model_type}{t.variant}")
def test_every_architecture_that_goes_layer_by_layer_has_the_same_gradients(tiny):
    model = zoo_model(tiny).eval()
    check_same(model, {"kd": 1.0}, 0, rows=2, first=len(decoder_layers(model)) - 3)


def test_a_step_reads_a_layer_twice_whatever_its_rows():
    model, ran = tiny_model(), []
    for index, layer in enumerate(decoder_layers(model)):
        layer.self_attn.register_forward_hook(lambda *_, i=index: ran.append(i))
    student, arguments = problem(LayerMajorStudent, model, {"kd": 1.0}, rows=4, residence=Residence(work_memory=0))
    ran.clear()
    student(**arguments).mean().backward()
    forward, back = ran[: 4 * 5], ran[4 * 5 :]
    # five layers above the first, four rows one by one, up and down: never back to a layer that was left
    assert forward == [i for i in range(1, 6) for _ in range(4)]
    assert back == [i for i in range(5, 0, -1) for _ in range(4)]


def test_one_layers_activations_of_a_few_rows_are_held():
    model = tiny_model(num_layers=24, hidden_size=32, intermediate_size=256)
    peaks = {}
    for name, kind, options in (
        ("plain", EndpointStudent, {}),
        ("layers", LayerMajorStudent, {"residence": Residence(1, work_memory=0)}),
    ):
        student, arguments = problem(kind, model, {"kd": 1.0}, rows=8, **options)
        with LiveTensorBytes(model) as counted:
            weights = counted.live
            student(**arguments).mean().backward()
        peaks[name] = counted.peak - weights
    border = 24 * 8 * LENGTH * 32 * 4
    gradients = 4 * sum(p.numel() for layer in list(decoder_layers(model))[1:3] for p in layer.parameters())
    assert peaks["layers"] < border + gradients < peaks["plain"] / 10


def test_tuning_under_a_bound_gives_the_same_weights():
    dense = tiny_model()
    tuned = {}
    for name, residence in (("free", None), ("bound", Residence(1, state_memory=0, work_memory=0))):
        cut = cut_model(dense, [LayerSegment(2, 4)])
        settings = TuningConfig(epochs=2, hidden_epochs=1, batch_size=4, learning_rate=3e-3)
        rows = random_tokens(16, 20, seed=1), random_tokens(6, 20, seed=2)
        options = {"kept": [0, 1, 4, 5], "residence": residence, "quiet": True}
        tuned[name] = cut, tune_layers(cut, dense, (1, 2), *rows, settings, **options)
    (free, known), (bound, found) = tuned.values()
    assert found.steps == known.steps and found.best_step == known.best_step
    for a, b in zip(known.history, found.history, strict=True):
        assert b.validation_loss == pytest.approx(a.validation_loss, rel=1e-4)
    for a, b in zip(free.parameters(), bound.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=3e-4, rtol=1e-2)
