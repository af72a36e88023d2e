import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_clp import processes

LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
]


def test_a_process_alone_writes_and_waits_for_nobody():
    assert processes.is_first() and processes.own_device_map() is None
    processes.wait_for_all()
    processes.join_group()
    assert not torch.distributed.is_initialized()


def test_the_others_of_a_group_do_not_write(monkeypatch):
    waited = []
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "barrier", lambda: waited.append(1))
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert not processes.is_first() and processes.own_device_map() == {"": 3}
    processes.wait_for_all()
    assert waited == [1]


@pytest.mark.slow
def test_two_processes_write_one_folder(tmp_path):
    """The whole of `prune` under a launcher: one folder, one answer, the segment and the weights of a single process."""
    dense = tmp_path / "dense"
    tiny_model().save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    options = (
        "--pruning-ratio 0.34 --sequence-length 16 --train-sequences 16 --validation-sequences 4 --test-sequences 4"
    )
    line = ["prune", "--model", str(dense), *options.split(), "--no-export", "--json", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    answers = []
    for name, start in (("one", [sys.executable]), ("two", LAUNCH)):
        command = [*start, "-m", "optimum_clp.commands.clp", *line, "--cache-dir", str(tmp_path / f"cache-{name}")]
        done = subprocess.run([*command, str(tmp_path / name)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        answers.append(json.loads(done.stdout))
    assert answers[0]["cut"] == answers[1]["cut"]
    assert [a["tuning"]["num_processes"] for a in answers] == [1, 2]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two")]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=3e-4, rtol=1e-2)
