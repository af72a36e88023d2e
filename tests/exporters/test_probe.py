"""Files that are only timed, against files of an export and the shapes of their nodes."""

import onnx
import pytest
import torch
from tiny_onnx import onnx_test_model

from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.probe import WeightForm, write_probes
from optimum_clp.planning.footprint import onnx_weight_bytes
from optimum_clp.runtime.causal_lm import OnnxCausalLM
from optimum_clp.runtime.session import open_session


def products(file):
    """Of each product with integers: outputs, inputs, bits, block size and level."""
    found = []
    for node in onnx.load(file, load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            said = {attribute.name: attribute.i for attribute in node.attribute}
            found.append(tuple(said[name] for name in ("N", "K", "bits", "block_size", "accuracy_level")))
    return sorted(found)


@pytest.mark.parametrize(("tied", "form"), [(True, WeightForm(32, 4)), (False, WeightForm(16, 1, head_bits=8))])
def test_a_probe_is_the_export_but_for_its_weights(tied, form, tmp_path):
    model = onnx_test_model("llama", tied=tied, num_layers=1)
    (probe,) = write_probes(float32_copy(model), [form], tmp_path, ExportConfig())
    chosen = QuantizationConfig(weights=["int4"], method="rtn", **vars(form))
    assert WeightForm.of(chosen) == form
    (_, made) = export_onnx(model, tmp_path / "e", ExportConfig(), chosen, quiet=True).files
    file = tmp_path / "e" / made.file
    assert products(probe) == products(file)
    assert probe.stat().st_size == pytest.approx(file.stat().st_size, rel=0.01)
    assert file.stat().st_size == pytest.approx(onnx_weight_bytes(model, "int4", chosen), abs=20_000)
    assert {bits for _, _, bits, _, _ in products(file)} == ({4} if form.head_bits == 4 else {4, 8})
    logits = OnnxCausalLM(open_session(probe), model.config)(torch.arange(3, 9)[None]).logits
    assert logits.isfinite().all() and 0.01 < logits.std() < 100, "sizes of states are those of a model"
