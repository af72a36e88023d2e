"""Resumption, several processes, accumulation, loggers: tuning in processes of their own against one that runs through."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from notices import notice
from tiny_models import random_tokens, tiny_model

from optimum_clp.configuration.stages import TuningConfig
from optimum_clp.errors import ConfigurationError
from optimum_clp.forward.losses import kl_divergence
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.loop import TrainingLoop
from optimum_clp.tuning.rows import TuningRows

WORKER = str(Path(__file__).parent / "tuning_worker.py")
SETTINGS = {
    "init": "none",
    "hidden_epochs": 0,
    "epochs": 3,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "evaluations_per_epoch": 2,
}
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
LAUNCH = {"ddp": ["--num_processes", "2", "--multi_gpu"], "fsdp": ["--num_processes", "2", *FSDP]}
DENSE = tiny_model()


def test_each_step_compares_another_window_and_validation_all_positions(monkeypatch):
    dense, seen = DENSE, {"train": [], "validation": []}
    batch = TuningRows.batch

    def recorded(self, rows, logits, *, window=None, in_parts=False):
        seen["train" if len(self) == 8 else "validation"].append(window)
        return batch(self, rows, logits, window=window, in_parts=in_parts)

    monkeypatch.setattr(TuningRows, "batch", recorded)

    def run(masks=(None, None), **settings):
        for windows in seen.values():
            windows.clear()
        cut = cut_model(dense, [LayerSegment(2, 4)])
        config = TuningConfig(**{**SETTINGS, "epochs": 12, "patience": 100, **settings})
        rows = random_tokens(8, 12), random_tokens(4, 12)
        tune_layers(cut, dense, [1, 2], *rows, config, kept=[0, 1, 4, 5], masks=masks, quiet=True)
        return list(seen["train"]), list(seen["validation"])

    windows, validation = run(logit_share=0.4)
    assert len(windows) == 24 and set(validation) == {None}
    # side by side, no more than was said, each as likely: a pure function of seed and step
    assert {(w.start, w.stop) for w in windows} == {(0, 4), (4, 8), (8, 12)}
    assert run(logit_share=0.4)[0] == windows
    assert {w.stop - w.start for w in run(logit_share=0.01)[0]} == {1}
    # all positions, also where states are compared and where rows have a mask
    assert set(run()[0]) == {None}
    assert set(run(logit_share=0.4, loss={"kd": 1.0, "hidden": 1.0})[0]) == {None}
    assert set(run(logit_share=0.4, masks=(torch.ones(8, 12, dtype=torch.bool), None))[0]) == {None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stage_that_harms_is_undone_before_the_next(dtype, capsys):
    dense = tiny_model().to(dtype)

    def run(quiet=True, **settings):
        cut = cut_model(dense, [LayerSegment(2, 4)])
        # one step in an epoch: the order of rows does not matter
        config = TuningConfig(**{**SETTINGS, "batch_size": 8, "epochs": 4, **settings})
        rows = random_tokens(8, 12), random_tokens(4, 12, seed=1)
        return tune_layers(cut, dense, [1, 2], *rows, config, kept=[0, 1, 4, 5], quiet=quiet)

    plain, harmed = run(), run(quiet=False, hidden_epochs=3, hidden_batch_size=8, hidden_learning_rate=5.0)
    assert [stage.steps for stage in harmed.stages] == [3, 4]
    worst = max(step.validation_loss for step in harmed.history)
    assert worst > 1.5 * harmed.initial_validation_loss, "the stage harms"
    found, expected = ([step.validation_loss for step in result.history][-4:] for result in (harmed, plain))
    assert found == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 2e-2)
    assert harmed.improved
    assert re.search(
        r"tuning: a stage is undone, validation loss \d\.\d{4} -> \d+\.\d{4}; its rate was 5, half of that or less may do",
        capsys.readouterr().err,
    )


def test_a_stage_that_lowers_the_loss_stays_though_its_weights_are_not_kept(monkeypatch, capsys):
    # as where one kind of text is worse off
    monkeypatch.setattr("optimum_clp.tuning.loop.improves", lambda *arguments: False)
    cut = cut_model(DENSE, [LayerSegment(2, 4)])
    config = TuningConfig(**{**SETTINGS, "hidden_epochs": 3, "hidden_learning_rate": 3e-3})
    rows = random_tokens(8, 12), random_tokens(4, 12, seed=1)
    result = tune_layers(cut, DENSE, [1, 2], *rows, config, kept=[0, 1, 4, 5])
    hidden_steps = result.stages[0].steps
    assert (
        min(s.validation_loss for s in result.history if 0 < s.step <= hidden_steps) < result.initial_validation_loss
    )
    assert result.best_step == 0 and "a stage is undone" not in capsys.readouterr().err


def environment(dtype="float32"):
    """Of a process of its own: this folder's neighbours on its path, one thread, no GPU."""
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "TUNING_WORKER_DTYPE": dtype,
        "CUDA_VISIBLE_DEVICES": "",
    }


def arguments(folder, name, stop_at, settings):
    """Of the worker."""
    config = json.dumps({**SETTINGS, **settings})
    return [str(folder / name), str(folder / f"{name}-run"), str(stop_at), config]


def saved_by(output, count):
    """What the first process has saved; the others have the same weights."""
    found = [torch.load(f"{output}-{rank}.pt", weights_only=False) for rank in range(count)]
    for other in found[1:]:
        assert all(torch.equal(a, other["weights"][n]) for n, a in found[0]["weights"].items())
    return found[0]


@pytest.fixture(scope="module")
def work():
    """Runs the worker to its end, on one process or on two that an engine brings together: what it has saved, or `None` if
    it was killed. Each process is real and its own, forked from one that has imported PyTorch and run nothing."""
    command = [sys.executable, WORKER]
    server = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(folder, name, *, engine=None, stop_at=-1, dtype="float32", streamed=False, **settings):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        request = {
            "arguments": arguments(folder, name, stop_at, settings),
            "environment": {"TUNING_WORKER_DTYPE": dtype, "TUNING_WORKER_STREAMED": "1" if streamed else ""},
            "launch": LAUNCH[engine] if engine else [],
            "port": port,
        }
        logs = [folder / f"{name}-{rank}.log" for rank in range(2 if engine else 1)]
        requests = [{**request, "rank": rank, "log": str(log)} for rank, log in enumerate(logs)]
        server.stdin.write(json.dumps(requests) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        if stop_at >= 0:
            assert codes == [-signal.SIGKILL] * len(logs)
            return None
        assert set(codes) == {0}, "\n".join(log.read_text() for log in logs)[-3000:]
        return saved_by(folder / name, len(logs))

    yield run
    server.kill()
    server.communicate()


def launched(folder, name, engine, *, stop_at=-1, **settings):
    """The same on two processes that `accelerate launch` starts."""
    command = [*LAUNCHER, *LAUNCH[engine], WORKER, *arguments(folder, name, stop_at, settings)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    if stop_at >= 0:
        assert done.returncode != 0
        return None
    assert done.returncode == 0, done.stderr[-3000:]
    return saved_by(folder / name, 2)


@pytest.mark.parametrize(
    ("stop_at", "dtype", "parameters"),
    [
        (5, "bfloat16", "none"),
        pytest.param(10, "float32", "none", marks=pytest.mark.slow),
        pytest.param(5, "bfloat16", "annealed", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path, work, stop_at, dtype, parameters):
    settings = {"checkpoint_seconds": 0, "dtype": dtype, "overparametrization": parameters}
    whole = work(tmp_path, "whole", **settings)
    work(tmp_path, "killed", **settings, stop_at=stop_at)
    saved = sorted(p.name for p in (tmp_path / "killed-run").glob("checkpoint-*"))
    assert saved == ([f"checkpoint-{stop_at}"] if stop_at else [])
    resumed = work(tmp_path, "killed", **settings)
    assert all(torch.equal(a, resumed["weights"][n]) for n, a in whole["weights"].items())
    assert resumed["result"]["history"] == whole["result"]["history"]
    assert resumed["result"]["best_step"] > 0


@pytest.fixture(scope="module")
def alone(work, tmp_path_factory):
    """One process, from beginning to end."""
    return work(tmp_path_factory.mktemp("alone"), "alone")


def check_together(alone, together):
    """Two processes that an engine brings together give what one gives."""
    # accelerate shards on accelerators alone: what is shown of FSDP here is that its options change nothing on CPUs
    assert (alone["engines"], together["engines"]) == ({"NO"}, {"MULTI_CPU"})
    assert together["clean"] and together["result"]["num_processes"] == 2
    assert together["result"]["num_tokens"] == alone["result"]["num_tokens"]
    for a, b in zip(alone["result"]["history"], together["result"]["history"], strict=True):
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-3)
        assert (a["train_loss"] or 0) == pytest.approx(b["train_loss"] or 0, rel=1e-3)
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(together["weights"][name], tensor, atol=3e-4, rtol=1e-2)


@pytest.mark.parametrize("engine", LAUNCH)
def test_two_processes_give_what_one_gives(tmp_path, work, alone, engine):
    if engine == "ddp":  # as users start it
        together = launched(tmp_path, "together", engine, checkpoint_seconds=0)
    else:
        together = work(tmp_path, "together", engine=engine, checkpoint_seconds=0)
    check_together(alone, together)


def test_frozen_layers_are_dealt_out_to_the_processes_under_fsdp(tmp_path, work, alone):
    """By PyTorch's `fully_shard` over gloo: each holds half of what lies elsewhere, and the weights are one process's."""
    together = work(tmp_path, "together", engine="fsdp", streamed=True, checkpoint_seconds=0)
    check_together(alone, together)
    assert alone["shares"] == [(0, 0, together["shares"][0][2])]
    for number, held, whole in together["shares"]:
        # of a matrix of an odd number of rows one of the two has a row more
        assert number == 1 and held == pytest.approx(whole / 2, rel=0.02)


@pytest.mark.slow
def test_two_processes_train_products_as_one_does(tmp_path, work):
    settings = {"checkpoint_seconds": 0, "overparametrization": "annealed", "learning_rate": 1e-3}
    check_together(work(tmp_path, "one", **settings), work(tmp_path, "two", engine="ddp", **settings))


@pytest.mark.slow
@pytest.mark.parametrize("engine", LAUNCH)
def test_two_processes_that_were_killed_go_on_to_the_same_weights(tmp_path, alone, engine):
    whole = launched(tmp_path, "whole", engine, checkpoint_seconds=0)
    check_together(alone, whole)
    launched(tmp_path, "killed", engine, checkpoint_seconds=0, stop_at=5)
    resumed = launched(tmp_path, "killed", engine, checkpoint_seconds=0)
    assert all(torch.equal(a, resumed["weights"][n]) for n, a in whole["weights"].items())


def tuned(config, rows=16, folder=None, dense=DENSE):
    cut = cut_model(dense, [LayerSegment(2, 4)])
    train, validation = random_tokens(rows, 20, seed=1), random_tokens(4, 20, seed=2)
    settings = TuningConfig(**{**SETTINGS, **config})
    result = tune_layers(cut, dense, (1, 2), train, validation, settings, folder=folder, quiet=True)
    return cut, result


@pytest.fixture(scope="module")
def undisturbed():
    return tuned({"checkpoint_seconds": 0})


@pytest.mark.parametrize("stop_at", [0, 1, 5, 11])
def test_a_run_that_fails_at_any_step_goes_on_to_the_same_weights(tmp_path, stop_at, monkeypatch, undisturbed):
    whole, result = undisturbed
    step = TrainingLoop._train_step

    def failing(loop):
        if loop.state.step == stop_at:
            raise RuntimeError("planted")
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_train_step", failing)
    with pytest.raises(RuntimeError, match="planted"):
        tuned({"checkpoint_seconds": 0}, folder=tmp_path)
    monkeypatch.undo()
    (tmp_path / "checkpoint-99").mkdir()  # one that was not finished
    (tmp_path / "checkpoint-98.tmp").mkdir()
    with notice(r"checkpoint-99 is damaged \(.*\): what it kept is trained again"):
        resumed, again = tuned({"checkpoint_seconds": 0}, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert again == result


def test_a_failure_leaves_the_best_weights(monkeypatch):
    step, dense = TrainingLoop._train_step, tiny_model()

    def failing(loop):
        if loop.state.step == 7:
            raise RuntimeError("planted")
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_train_step", failing)
    cut = cut_model(dense, [LayerSegment(2, 4)])
    rows = random_tokens(16, 20, seed=1), random_tokens(4, 20, seed=2)
    with pytest.raises(RuntimeError, match="planted"):
        tune_layers(cut, dense, (1, 2), *rows, TuningConfig(**SETTINGS), quiet=True)
    monkeypatch.undo()
    # evaluated after the steps 2, 4 and 6 of 12: the last of these is what the whole run saw there
    _, whole = tuned({}, dense=dense)
    with torch.no_grad():
        found = kl_divergence(dense(rows[1]).logits, cut(rows[1]).logits).mean().item()
    assert found == pytest.approx(min(h.validation_loss for h in whole.history if h.step < 7), rel=1e-4)


def test_accumulated_steps_are_whole_steps():
    one, first = tuned({})
    two, second = tuned({"gradient_accumulation_steps": 2})
    assert first.steps == second.steps and first.num_tokens == second.num_tokens
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=3e-4, rtol=1e-2)


def test_rows_that_do_not_fill_a_step_are_left_out():
    assert tuned({"epochs": 2}, rows=11)[1].steps == 4
    assert tuned({"epochs": 2}, rows=3)[1].steps == 2


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(ConfigurationError) as error:
        tuned({"gradient_accumulation_steps": 3})
    assert str(error.value) == (
        "tuning.batch_size is 4: a step of 4 rows must be dealt out evenly to 1 processes times 3 accumulation steps. "
        "Choose a multiple of 3, or fewer accumulation steps or processes."
    )


def test_mixed_precision_trains_too():
    _, result = tuned({"mixed_precision": "bf16"})
    assert result.improved and result.best_validation_loss < 0.95 * result.initial_validation_loss


def test_no_global_state_is_left_behind(tmp_path):
    from accelerate.state import AcceleratorState, PartialState

    before = random.getstate(), numpy.random.get_state()[1].tolist()
    with pytest.MonkeyPatch.context() as patch:
        # the models of these tests seed the global generator themselves
        patch.setattr(torch, "manual_seed", lambda seed: None)
        expected = torch.get_rng_state()
        tuned({"checkpoint_seconds": 0}, folder=tmp_path)
        tuned({"checkpoint_seconds": 0}, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), expected)
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before
    assert not AcceleratorState._shared_state and not PartialState._shared_state


def test_loggers_get_the_losses(tmp_path):
    from accelerate.tracking import GeneralTracker

    logged = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory = "memory", False

        @property
        def tracker(self):
            return logged

        def store_init_configuration(self, values):
            logged.append(values)

        def log(self, values, step=None, **kwargs):
            logged.append((step, *values))

    from accelerate import Accelerator

    start = Accelerator.init_trackers

    def planted(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.trackers = [Tracker()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "init_trackers", planted)
        patch.setattr("accelerate.accelerator.filter_trackers", lambda *a, **k: [])
        with pytest.warns(UserWarning, match="no supported trackers"):
            _, result = tuned({"report_to": ["memory"]})
    seen = [("validation_loss", "learning_rate"), ("validation_loss", "learning_rate", "train_loss")]
    assert [entry for entry in logged if "validation_loss" in entry] == [
        (h.step, *seen[h.step > 0]) for h in result.history
    ]
