"""What a caller has set around a verb does not reach into it, and is as it was afterwards."""

import copy
import shutil
import threading
from contextlib import contextmanager

import pytest
import torch
from byte_tokenizer import tiny_tokenizer
from tiny_models import tiny_config, tiny_model
from tiny_models import tiny_tokenizer as tiny_tokenizer_of_words
from tiny_onnx import exported_llama

from optimum_clp import CLPConfig, CLPPruner, plan_pruning
from optimum_clp.chat.answering import Answering, AnswerSettings, answer_in_turn
from optimum_clp.chat.speakers import open_speakers
from optimum_clp.commands.clp import main
from optimum_clp.configuration.targets import with_target
from optimum_clp.errors import BusyError, ConfigurationError, ModelError
from optimum_clp.evaluation.prompts import load_prompts
from optimum_clp.own_state import in_own_state, own_state
from optimum_clp.quantization import load_quantized
from optimum_clp.tuning.loop import TrainingLoop


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS = {
    "nothing": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float16),
    "default device": lambda: default_device("meta"),
    "device": lambda: torch.device("meta"),
}


def recipe(cache, **changes):
    text = {"sequence_length": 8, "train_sequences": 8, "validation_sequences": 2, "test_sequences": 1}
    tuning = {"epochs": 1, "hidden_epochs": 1, "batch_size": 4, "evaluations_per_epoch": 1}
    return CLPConfig(
        0.25,
        calibration={**text, "cache_dir": str(cache)},
        search={"num_sequences": 4, **changes},
        tuning=tuning,
        export={"enabled": False},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    model = CLPPruner(tiny_model(num_layers=4), quiet=True).prune(recipe(tmp_path_factory.mktemp("cache")))
    return model.state_dict()


def settings():
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    return inference, grad, torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.get_default_device()


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_every_step_gives_the_same_within_any_surroundings(name, tmp_path, undisturbed):
    dense = tiny_model(num_layers=4)
    with SURROUNDINGS[name]():
        before = settings()
        model = CLPPruner(dense, quiet=True).prune(recipe(tmp_path / "cache"), tmp_path / "out")
        opened = CLPPruner.from_pretrained(tmp_path / "out", tokenizer=tiny_tokenizer(), quiet=True)
        assert settings() == before
    assert opened.report.failures is None
    for key, tensor in undisturbed.items():
        assert torch.equal(model.state_dict()[key], tensor) and torch.equal(
            opened.pruned_model.state_dict()[key], tensor
        )
    assert not any(p.is_inference() for p in opened.pruned_model.parameters())


@pytest.mark.parametrize("strategy", ["gate", "taylor"])
def test_the_callers_model_is_as_it_was(tmp_path, strategy):
    dense, called = tiny_model(num_layers=4).train(), []
    dense.model.layers[1].requires_grad_(False)
    dense.model.layers[2].eval()
    for number, parameter in enumerate(dense.parameters()):
        if number % 3 == 0 and parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)
    handle = dense.model.layers[0].register_forward_hook(lambda *_: called.append(1))

    def state():
        modules = list(dense.modules())
        hooks = [list(m._forward_hooks) + list(m._forward_pre_hooks) + list(m._backward_hooks) for m in modules]
        mine = [set(m.__dict__) for m in modules]
        grads = [None if p.grad is None else (id(p.grad), p.grad.sum().item()) for p in dense.parameters()]
        bits = [(id(p), p.data_ptr(), p.sum().item(), p.requires_grad) for p in dense.parameters()]
        return (
            hooks,
            mine,
            grads,
            bits,
            [m.training for m in modules],
            dense.config.to_dict(),
            torch.get_rng_state().tolist(),
        )

    before = state()
    pruner = CLPPruner(dense, quiet=True)
    pruner.prune(recipe(tmp_path / "cache", strategy=strategy), tmp_path / "out")
    pruner.evaluate(generation=False)
    assert state() == before and called
    handle.remove()


def test_a_second_thread_is_refused_at_once():
    found = []

    def other():
        try:
            in_own_state(lambda: found.append("worked"))()
        except BusyError as error:
            found.append(str(error))

    with own_state(), own_state():  # verbs call verbs
        thread = threading.Thread(target=other, name="the second")
        thread.start()
        thread.join()
    other()
    assert found[0].startswith("thread is 'the second': another thread of this process is at work")
    assert found[1] == "worked"


def test_a_second_run_in_another_thread_is_refused_and_the_first_is_not_disturbed(tmp_path, undisturbed, monkeypatch):
    at_work, go_on, found = threading.Event(), threading.Event(), []
    step = TrainingLoop._train_step

    def waiting(loop):
        at_work.set()
        assert go_on.wait(60)
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_train_step", waiting)

    def run(name):
        try:
            model = CLPPruner(tiny_model(num_layers=4), quiet=True)
            found.append(model.prune(recipe(tmp_path / "cache"), tmp_path / name))
        except BusyError as error:
            found.append(error)

    first, second = (threading.Thread(target=run, args=(name,), name=name) for name in ("first", "second"))
    first.start()
    assert at_work.wait(60)
    second.start()
    second.join()
    assert not go_on.is_set() and "thread is 'second': another thread" in str(found[0])
    assert not (tmp_path / "second").exists()
    go_on.set()
    first.join()
    assert all(torch.equal(found[1].state_dict()[name], tensor) for name, tensor in undisturbed.items())


@contextmanager
def everything():
    """All of them at once, as in a caller who is himself in the middle of something."""
    with default_dtype(torch.float16), default_device("meta"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint with ONNX files beside it, and another model."""
    folder, found = tmp_path_factory.mktemp("exported"), exported_llama()
    shutil.copytree(found.folder, folder / "out")
    copy.deepcopy(found.model).save_pretrained(folder / "out")
    tiny_tokenizer_of_words().save_pretrained(folder / "out")
    tiny_model(num_layers=4).save_pretrained(folder / "dense")
    return folder


def chat(folder, place):
    speakers = open_speakers(folder / "out", dense=folder / "dense", file_name="onnx/model_q4.onnx", quiet=True)
    (prompt,) = load_prompts([{"prompt": "w5 w6"}])
    answers = [Answering(speakers, s, speakers.tokens_of(prompt, s), AnswerSettings(4)) for s in speakers.all]
    for _ in answer_in_turn(answers):
        pass
    return [(answer.name, answer.tokens, answer.error) for answer in answers]


def plan(folder, place):
    return plan_pruning(tiny_config(), CLPConfig(target_size_mb=0.08)).to_dict()


def written_recipe(folder, place):
    assert main(["recipe", str(folder / "dense"), "-o", str(place / "r.yaml"), "--json"]) == 0
    return (place / "r.yaml").read_text().replace(str(place), "")


def evaluate(folder, place):
    rows = [{"query": "w3 w4", "choices": ["w5", "w6"], "gold": 0}]
    pruner = CLPPruner.from_pretrained(folder / "out", quiet=True)
    of_file = CLPPruner.from_pretrained(folder / "out", "onnx/model_q4.onnx", quiet=True)
    text = " ".join(f"w{3 + i % 90}" for i in range(300))
    return pruner.evaluate([text], reference=folder / "dense", tasks={"t": rows}), of_file.evaluate([text])


def export_for_web(folder, place):
    pruner = CLPPruner.from_pretrained(folder / "out", quiet=True)
    pruner.config = CLPConfig.from_dict(with_target({"quantization": {"weights": ["int4_float16"]}}, "web", over=True))
    pruner.config.quantization.method = "rtn"
    pruner.cut([(0, 1)])
    pruner.export(place / "web")
    return {file.name: file.read_bytes() for file in (place / "web" / "onnx").iterdir()}


def quanto(folder, place):
    pruner = CLPPruner.from_pretrained(folder / "out", quiet=True)
    pruner.cut([(0, 1)])
    pruner.quantize(place / "quanto")
    return {name: tensor.dtype for name, tensor in load_quantized(place / "quanto").state_dict().items()}


@pytest.mark.parametrize(
    "verb",
    [chat, plan, written_recipe, evaluate, quanto, pytest.param(export_for_web, marks=pytest.mark.slow)],
    ids=lambda verb: verb.__name__,
)
def test_every_other_verb_gives_the_same_within_any_surroundings(verb, exported, tmp_path):
    found = []
    for number, surroundings in enumerate((torch.enable_grad, everything, torch.inference_mode)):
        place = tmp_path / str(number)
        place.mkdir()
        with surroundings():
            before = settings()
            found.append(verb(exported, place))
            assert settings() == before
    assert found[0] == found[1] == found[2]


def test_weights_that_no_gradient_passes_through_are_refused(tmp_path):
    with torch.inference_mode():
        dense = tiny_model(num_layers=4)
    with pytest.raises(ModelError, match=r"its weights were made within torch.inference_mode\(\)"):
        CLPPruner(dense, quiet=True).prune(recipe(tmp_path))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc': this environment variable is a launcher's, and must be a whole"),
        ({"RANK": "one"}, "RANK is 'one': this environment variable is a launcher's"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is '': this environment variable is a launcher's"),
        ({"WORLD_SIZE": "2"}, "RANK is None: WORLD_SIZE is 2, and processes find one another by this"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is None: WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is '2': it must be below"),
    ],
)
def test_a_launchers_environment_that_cannot_be(environment, message, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=message), own_state():
        pytest.fail("the block must not run")
    monkeypatch.undo()
    with own_state():
        pass
