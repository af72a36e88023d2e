import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import random_tokens, tiny_model

from optimum_clp import ExportConfig, QuantizationConfig
from optimum_clp.errors import ModelError
from optimum_clp.exporters.export import export_onnx
from optimum_clp.runtime.apart import FileApart
from optimum_clp.runtime.causal_lm import OnnxCausalLM


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("exported"), tiny_model(num_layers=2)
    export_onnx(
        model, folder, ExportConfig(), QuantizationConfig(weights=["int4"], method="rtn", group_size=16), quiet=True
    )
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx/model_q4.onnx"])
def test_it_says_what_the_file_says_here(exported, name):
    tokens = random_tokens(3, 12)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    here = OnnxCausalLM.from_pretrained(exported, name)
    with FileApart(exported / name) as there:
        for rows in (slice(0, 3), slice(1, 2)):
            found = there.logits(tokens[rows].numpy(), mask[rows].numpy())
            expected = here(input_ids=tokens[rows], attention_mask=mask[rows], use_cache=False).logits
            np.testing.assert_array_equal(found, expected.numpy())
        process = there._process
    assert process.returncode == 0


def test_a_file_that_cannot_be_loaded_is_an_error_that_says_why(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    message = r"model\.onnx.*ended without an answer, status 1 \(.*(?i:model|protobuf).*\).*Free memory for it"
    with FileApart(tmp_path / "model.onnx") as there:
        with pytest.raises(ModelError, match=message):
            there.logits(np.ones((1, 2), np.int64), np.ones((1, 2), np.int64))


def test_it_needs_neither_torch_nor_transformers():
    code = "import sys, optimum_clp.runtime.apart; print({'torch', 'transformers', 'onnx_ir'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
