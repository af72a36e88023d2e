import json
import re
import shutil

import pytest
from hub_cache import put_into_cache

from optimum_clp.chat.speakers import open_speakers
from optimum_clp.errors import ConfigurationError, ModelError
from optimum_clp.evaluation.prompts import load_prompts


def change_report(folder, **changes):
    path = folder / "clp_report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, **changes}))


def base_of(folder):
    return json.loads((folder / "clp_report.json").read_text())["base_model"]


def names(found):
    return [(speaker.name, speaker.source) for speaker in found.all]


def prompt(*contents):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": words} for i, words in enumerate(contents)]
    return load_prompts([{"messages": turns}])[0]


@pytest.fixture
def copy(written, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written.folder, folder)
    return folder


def test_dense_tuned_and_the_smallest_file_answer(speakers):
    assert names(speakers) == [("dense", "dense"), ("tuned", "chat"), ("onnx int4", "onnx/model_q4.onnx")]
    assert speakers.left_out == () and speakers.continues is None
    assert [s.model.config.num_hidden_layers for s in speakers.all] == [3, 2, 2]


def test_a_folder_of_the_hub_and_its_dense_model_are_read_from_the_cache_that_is_named(written, copy, tmp_path):
    put_into_cache(written.dense, tmp_path / "hub", "acme/dense")
    change_report(copy, base_model={**base_of(copy), "name_or_path": "acme/dense"})
    put_into_cache(copy, tmp_path / "hub", "acme/cut")
    found = open_speakers("acme/cut", cache_dir=tmp_path / "hub", attn_implementation="eager", quiet=True)
    assert [name for name, _ in names(found)] == ["dense", "tuned", "onnx int4"] and found.left_out == ()
    assert {speaker.model.config._attn_implementation for speaker in found.all[:2]} == {"eager"}


def test_who_is_missing_is_left_out_with_a_word(copy):
    change_report(copy, base_model={**base_of(copy), "name_or_path": str(copy / "nowhere")}, tuning=None)
    (copy / "onnx" / "model_q4.onnx").unlink()
    found = open_speakers(copy, quiet=True)
    assert names(found) == [("cut", "copy")]
    dense, file = found.left_out
    assert dense.startswith("dense is left out: ") and file.startswith("onnx int4 is left out: there is no such file.")


def test_a_report_that_names_no_dense_model(copy):
    change_report(copy, base_model={**base_of(copy), "name_or_path": None}, export=None)
    shutil.rmtree(copy / "onnx")
    found = open_speakers(copy, quiet=True)
    assert found.left_out == (
        "The report does not name the dense model: --dense does.",
        "There is no ONNX file in the folder: `optimum-clp export` writes them.",
    )


def test_what_is_named_must_be_there(copy, written):
    with pytest.raises(ModelError, match="nowhere"):
        open_speakers(copy, dense=copy / "nowhere", quiet=True)
    with pytest.raises(ModelError, match=r"file_name is '.*none\.onnx': there is no such file"):
        open_speakers(copy, file_name="onnx/none.onnx", quiet=True)
    found = open_speakers(copy, dense=written.dense, file_name="onnx/model_quantized.onnx", quiet=True)
    assert [name for name, _ in names(found)] == ["dense", "tuned", "onnx int8"]


def test_a_folder_of_onnx_files_alone_and_one_without_a_report(copy):
    (copy / "model.safetensors").unlink()
    found = open_speakers(copy, quiet=True)
    assert [name for name, _ in names(found)] == ["dense", "onnx int4"] and "tuned is left out" in found.left_out[0]
    (copy / "clp_report.json").unlink()
    found = open_speakers(copy, quiet=True)
    assert names(found) == [("onnx int4", "onnx/model_q4.onnx")]
    shutil.rmtree(copy / "onnx")
    with pytest.raises(ModelError, match="weights"):
        open_speakers(copy, quiet=True)


def test_a_conversation_goes_through_the_template_and_a_base_model_gets_the_last_words(speakers, base_speakers):
    talk = prompt("w7 w8", "w9", "w10")
    assert speakers.tokens_of(talk, speakers.all[0]) == (3, 7, 8, 3, 9, 3, 10, 4)
    assert base_speakers.continues == "the tokenizer has no chat template"
    assert base_speakers.tokens_of(prompt("w7 w8"), base_speakers.all[0]) == (7, 8)


def test_words_that_do_not_fit_are_told(speakers, base_speakers):
    long = prompt("w5 " * 200)
    with pytest.raises(ConfigurationError, match="at most 118 tokens long"):
        speakers.tokens_of(long, speakers.all[0], new_tokens=10)
    with pytest.raises(ConfigurationError, match=re.escape("it has 200 tokens; the model takes 1 to 118")):
        base_speakers.tokens_of(long, base_speakers.all[0], new_tokens=10)
    with pytest.raises(ConfigurationError, match="there is none of this name, only dense, tuned, onnx int4"):
        speakers.named("other")
