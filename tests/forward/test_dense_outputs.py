import os
from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_tokens, tiny_model

from optimum_clp.errors import TuningError
from optimum_clp.forward.dense_outputs import DenseOutputs, StateStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_on_disk_are_those_in_memory(tmp_path, dtype):
    model, tokens = tiny_model(dtype=dtype), random_tokens(7, 12)
    kept = DenseOutputs(model, tokens, batch_size=3, inputs_of=[2, 4])
    stored = DenseOutputs(model, tokens, batch_size=3, inputs_of=[2, 4], store=StateStore(tmp_path / "new", 0))
    expected = model(tokens, output_hidden_states=True).hidden_states[2]
    assert set(stored.hidden) == {2, 4, 6}
    for index in (2, 4, 6):
        assert torch.equal(kept.hidden[index], stored.hidden[index])
    torch.testing.assert_close(stored.hidden[2], expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(kept.logits(slice(1, 3)), stored.logits(torch.tensor([1, 2])))
    assert not os.listdir(tmp_path / "new")  # nothing is left if the process is killed


def test_memory_is_used_up_to_its_limit(tmp_path, monkeypatch):
    mapped, from_file = [], torch.from_file
    monkeypatch.setattr(
        torch, "from_file", lambda *args, **kwargs: mapped.append(kwargs["size"]) or from_file(*args, **kwargs)
    )
    store = StateStore(tmp_path, memory=100 * 4)
    sizes = [
        store.allocate((60,), torch.float32),
        store.allocate((50,), torch.float32),
        store.allocate((40,), torch.float32),
    ]
    assert store.free_memory == 0 and [len(t) for t in sizes] == [60, 50, 40]
    assert mapped == [50]


def test_a_full_disk_is_told_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_clp.spill.shutil.disk_usage", lambda folder: SimpleNamespace(free=2e9))
    with pytest.raises(TuningError) as error:
        StateStore(tmp_path, 0).allocate((10**6, 1000), torch.float32)
    assert str(error.value) == (
        f"calibration.cache_dir is {str(tmp_path)!r}: the hidden states of the text need 4.0 GB there, and 2.0 GB "
        "are free. Free some space, set calibration.cache_dir to a larger disk, or lower calibration.train_sequences."
    )
