"""What a disk may do to a training run; what a killed one goes on from is in `test_loop.py` and `hostile/`."""

from types import SimpleNamespace

import pytest
import torch
from notices import notice

from optimum_clp.errors import TuningError
from optimum_clp.tuning.checkpoints import BestWeights, Checkpoints, TrainingState


def engine(**changes):
    """An accelerator of one process, as far as it is asked."""
    values = {"is_main_process": True, "num_processes": 1, "wait_for_everyone": lambda: None}
    return SimpleNamespace(**values, get_state_dict=lambda student: student.state_dict(), **changes)


def test_best_weights_that_were_damaged_since_are_not_taken(tmp_path):
    best, student = BestWeights(engine(), tmp_path), torch.nn.Linear(2, 2)
    best.save(student, 3)
    file = tmp_path / "best-3.pt"
    assert torch.equal(best.load(3)["weight"], student.weight) and file.stat().st_mode & 0o777 == 0o600
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)
    message = (
        "best weights is .*best-3.pt': its bytes are not those that were written in this run. Run the same command"
    )
    with pytest.raises(TuningError, match=message):
        best.load(3)


def test_best_weights_that_cannot_be_written_stay_in_memory(tmp_path):
    best, student = BestWeights(engine(), tmp_path / "missing"), torch.nn.Linear(2, 2)
    with notice("best-0.pt cannot be written .*: the best weights stay in memory"):
        best.save(student, 0)
    before = student.weight.detach().clone()
    with torch.no_grad():
        student.weight.zero_()
    assert torch.equal(best.load(0)["weight"], before) and best.digest is None


def test_a_full_disk_ends_the_checkpoints_and_not_the_run(tmp_path):
    def full(folder):
        raise OSError(28, "No space left on device")

    accelerator = engine(save_state=full)
    checkpoints = Checkpoints(accelerator, tmp_path, 0.0, BestWeights(accelerator, tmp_path))
    with notice("cannot be written .*No space left on device.*: no more checkpoints"):
        assert not checkpoints.save_if_due(TrainingState(step=1))
    assert not checkpoints.save_if_due(TrainingState(step=2))
    assert list(tmp_path.iterdir()) == []
