import pytest
import torch
from tiny_models import tiny_model

from optimum_clp.exporters.room import ExportRoom
from optimum_clp.exporters.rounding.method import RoundingProblem
from optimum_clp.exporters.rounding.quanto import Quanto
from optimum_clp.mapped_weights import MappedWeights


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_lie_in_files_where_memory_does_not_hold_them(bits, tmp_path):
    model = tiny_model(num_layers=1, hidden_size=256, intermediate_size=512)
    rounded = [
        Quanto().round(RoundingProblem(model, bits, {}, 32, room=room))
        for room in (ExportRoom(), ExportRoom(tmp_path))
    ]
    free, bound = (found.matrices for found in rounded)
    mapped, large = MappedWeights(), 0
    for name, matrix in free.items():
        assert torch.equal(torch.from_numpy(bound[name].integers), torch.from_numpy(matrix.integers))
        assert not mapped.holds(torch.from_numpy(matrix.integers))
        assert mapped.holds(torch.from_numpy(bound[name].integers)) == (matrix.integers.nbytes >= 2**16)
        large += matrix.integers.nbytes >= 2**16
    assert large
