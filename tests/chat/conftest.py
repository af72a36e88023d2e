"""A folder as `prune` leaves it, tiny: dense model elsewhere, cut checkpoint, ONNX files, tokenizer with a chat template."""

import copy
import shutil
from types import SimpleNamespace

import pytest
from report_example import example_report
from tiny_models import tiny_model, tiny_tokenizer
from tiny_onnx import exported_llama

from optimum_clp.chat.speakers import open_speakers

TEMPLATE = "{% for m in messages %}w3 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """`folder`, `dense` (its dense model's folder) and `base`, the same folder of a base model."""
    place = tmp_path_factory.mktemp("chat")
    exported = exported_llama()
    tokenizer = tiny_tokenizer()
    # transformers 4 would have it give token_type_ids as well, which no tokenizer of a decoder does
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    dense = place / "dense"
    tiny_model(num_layers=3, initializer_range=0.3).save_pretrained(dense)
    folders = []
    for name, template in (("chat", TEMPLATE), ("base", None)):
        folder = place / name
        shutil.copytree(exported.folder, folder)
        # saving writes into the model's config, and this model is other tests' too
        copy.deepcopy(exported.model).save_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        report = example_report()
        report.base_model["name_or_path"] = str(dense)
        report.export["files"] = [
            {**entry, "file": name} for entry, name in zip(report.export["files"], onnx_files(folder), strict=True)
        ]
        report.save(folder)
        folders.append(folder)
    return SimpleNamespace(folder=folders[0], base=folders[1], dense=dense)


def onnx_files(folder):
    names = ("model.onnx", "model_quantized.onnx", "model_q4.onnx")
    assert all((folder / "onnx" / name).is_file() for name in names)
    return [f"onnx/{name}" for name in names]


@pytest.fixture(scope="session")
def speakers(written):
    return open_speakers(written.folder, quiet=True)


@pytest.fixture(scope="session")
def base_speakers(written):
    return open_speakers(written.base, quiet=True)
