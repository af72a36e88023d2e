"""What `sharded` leaves alone; that it deals layers out is seen with two processes, in `test_loop.py`."""

import pytest
import torch
from notices import notice
from tiny_models import random_tokens, tiny_model

from optimum_clp.checkpoint.offloaded import bare_copy
from optimum_clp.forward.streamed_layers import LayerCopies, run_on, streamed_forward
from optimum_clp.tuning import sharded_layers
from optimum_clp.tuning.sharded_layers import asks_for_sharding, local_bytes, sharded

CPU = torch.device("cpu")


def streamed(**options):
    twin = bare_copy(tiny_model())
    run_on(twin, LayerCopies(CPU, **options))
    return twin


@pytest.mark.parametrize(
    ("value", "processes", "asks"), [("true", 2, True), ("true", 1, False), ("false", 2, False), (None, 2, False)]
)
def test_it_is_asked_for_by_the_launcher(monkeypatch, value, processes, asks):
    monkeypatch.setattr(sharded_layers, "world_size", lambda: processes)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if value is not None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    assert asks_for_sharding() == asks


def test_a_process_alone_and_layers_that_run_where_they_lie_are_left_alone(monkeypatch):
    with sharded(list(streamed().model.layers)) as twins:
        assert twins == []
    monkeypatch.setattr(sharded_layers, "asks_for_sharding", lambda: True)
    with sharded(list(tiny_model().model.layers)) as twins:
        assert twins == []


def test_parts_that_do_not_fit_are_told_and_layers_come_from_main_memory(monkeypatch):
    monkeypatch.setattr(sharded_layers, "asks_for_sharding", lambda: True)
    monkeypatch.setattr(sharded_layers, "world_size", lambda: 2)
    model = streamed(work_memory=2**16)
    told = r"tuning: the frozen layers are not sharded, and come from main memory: 0.00 GiB of each process and two layers"
    with notice(told), sharded(list(model.model.layers)) as twins:
        assert twins == [] and streamed_forward(model.model.layers[0]) is not None
        with torch.no_grad():
            assert torch.equal(model(random_tokens(1, 8)).logits, tiny_model()(random_tokens(1, 8)).logits)


def test_bytes_of_a_plain_module_are_all_of_them():
    assert local_bytes(torch.nn.Linear(3, 5)) == 4 * (15 + 5)
