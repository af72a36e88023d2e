"""What transformers 5 has cut and saved, read by transformers 4: the same logits, for every architecture that both have.

Needs another interpreter with transformers 4, named by CLP_OTHER_PYTHON; `make test-across` does that, and so does CI.
"""

import json
import os
import subprocess

import pytest
from safetensors.torch import save_file
from test_contract import dense_model, logits, random_tokens, segments_of
from transformers import __version__ as transformers_version
from zoo import ZOO

from optimum_clp.checkpoint.saving import save_checkpoint
from optimum_clp.surgery.cut import cut_model

TOLERANCE = 1e-5
# what transformers 4.57.6 makes of a checkpoint of 5.23 is another model, or none, cut or not
KNOWN = {
    "apertus": "its activation is computed in another way (9e-4)",
    "dbrx": "its configuration refuses what transformers 5 writes",
    "gemma2": "its SDPA leaves out the soft cap",
    "gemma3": "the vision tower's tensors have other names",
    "gpt2-inverse_index": "its SDPA leaves the layer's index out",
    "granitemoehybrid": "its kinds of layers have other names",
    "longcat_flash": "the same logits, with tensors left over",
    "mamba2": "it cannot read an infinite number",
    "modernbert-decoder": "its window is computed from another field",
    "qwen2_moe": "it has one window for all layers",
    "recurrent_gemma": "its window has another rule",
    "vaultgemma": "its SDPA leaves out the soft cap",
    "zamba": "its kinds of layers have other names",
}
READ = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    if json.loads((folder / "config.json").read_text())["model_type"] not in CONFIG_MAPPING:
        continue
    expected = load_file(folder / "expected.safetensors")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        left = [str(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]]
        with torch.no_grad():
            logits = model.eval()(input_ids=expected["ids"], use_cache=False).logits
        error = ((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()).item()
        found[folder.name] = "left over: " + left[0][:200] if left else error
    except Exception as error:
        found[folder.name] = type(error).__name__
print(json.dumps(found))
"""


@pytest.mark.timeout(900)
@pytest.mark.skipif("CLP_OTHER_PYTHON" not in os.environ, reason="CLP_OTHER_PYTHON names no other interpreter")
@pytest.mark.skipif(transformers_version.startswith("4."), reason="transformers 5 writes, transformers 4 reads")
def test_transformers_4_reads_the_same_models(tmp_path):
    ids = random_tokens(2, 20)
    for tiny in ZOO:
        smaller = cut_model(dense_model(tiny.name, False if tiny.tying else None), segments_of(tiny.cuts[-1]))
        save_checkpoint(smaller, None, tmp_path / tiny.name)
        expected = {"ids": ids, "logits": logits(smaller, ids).contiguous()}
        save_file(expected, tmp_path / tiny.name / "expected.safetensors")
    command = [os.environ["CLP_OTHER_PYTHON"], "-W", "ignore", "-c", READ, str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(printed.splitlines()[-1])
    assert len(found) > 70
    differ = {name: outcome for name, outcome in found.items() if isinstance(outcome, str) or outcome > TOLERANCE}
    assert differ.keys() == KNOWN.keys(), differ
