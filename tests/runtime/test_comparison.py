import subprocess
import sys

import numpy as np
import pytest

from optimum_clp.errors import ExportError
from optimum_clp.runtime.comparison import (
    ReferenceStep,
    read_result,
    read_steps,
    relative_error,
    write_result,
    write_steps,
)


def steps_of_two_texts():
    """A padded prompt with a cached step, and another text of which one token's logits are kept."""
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    positions = np.array([[0, 0], [0, 1]])
    shapes = ((2, 2), (2, 1), (1, 3))
    ids = [np.arange(rows * length).reshape(rows, length) for rows, length in shapes]
    return [
        ReferenceStep(ids[0], mask[:, :2], positions, np.ones((2, 2, 5), np.float32)),
        ReferenceStep(ids[1], mask, positions[:, :1] + 1, np.ones((2, 1, 5), np.float32)),
        ReferenceStep(ids[2], np.ones((1, 3), np.int64), ids[2] + 4, np.ones((1, 1, 5), np.float32)),
    ]


def test_a_step_says_whether_it_begins_a_text_and_what_is_padding():
    steps = steps_of_two_texts()
    assert [step.begins_text for step in steps] == [True, False, True]
    assert [step.is_real.tolist() for step in steps] == [[[False, True], [True, True]], [[True], [True]], [[True]]]


def test_steps_are_read_as_they_were_written(tmp_path):
    steps = steps_of_two_texts()
    write_steps(iter(steps), tmp_path / "reference.npz")
    read = list(read_steps(tmp_path / "reference.npz"))
    assert len(read) == len(steps)
    for ours, theirs in zip(steps, read, strict=True):
        for name, array in vars(ours).items():
            np.testing.assert_array_equal(array, vars(theirs)[name], strict=True)


def test_a_file_that_does_not_run_is_named(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"model\.onnx is .*ONNX Runtime .* cannot run it") as here:
        relative_error(tmp_path / "model.onnx", steps_of_two_texts())
    write_steps(steps_of_two_texts(), tmp_path / "reference.npz")
    write_result(tmp_path / "model.onnx", tmp_path / "reference.npz", tmp_path / "result.json")
    with pytest.raises(ExportError) as there:
        read_result(tmp_path / "result.json")
    assert there.value.problems == here.value.problems


def test_it_needs_neither_torch_nor_transformers():
    code = "import sys, optimum_clp.runtime.comparison; print({'torch', 'transformers', 'onnx_ir'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
