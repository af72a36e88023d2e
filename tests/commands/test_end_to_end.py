"""The real commands on small models: what a user types, what comes out, and what bad input is answered."""

import json
import os

import pytest
import torch
from tiny_models import random_tokens, tiny_model, tiny_tokenizer
from transformers import BertConfig, BertModel, RwkvConfig, RwkvForCausalLM, T5Config, T5ForConditionalGeneration

from optimum_clp.commands.clp import main
from optimum_clp.tuning import losses

FAST = (
    "--pruning-ratio 0.33 --sequence-length 24 --train-sequences 8 --validation-sequences 2 --test-sequences 2 "
    "--search-sequences 4 --quiet"
)
TUNING = "--epochs 1 --batch-size 4 --max-new-tokens 4"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A current folder with a dense model in `dense`; nothing of the user's own is touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optimum_clp.evaluation.outcome.NEW_TOKENS", 3)
    tiny_model(tie_word_embeddings=True).save_pretrained("dense")
    tiny_tokenizer().save_pretrained("dense")
    return tmp_path


def call(line, capsys):
    status = main(line.split())
    out, err = capsys.readouterr()
    return status, out, err


def test_prune_then_every_other_command_on_what_it_wrote(workplace, capsys):
    fast = f"{FAST} --text-cache-dir {workplace / 'cache'}"
    status, out, err = call(f"prune --model dense {fast} {TUNING} --no-export --json out", capsys)
    assert status == 0 and err == ""
    report = json.loads(out)
    assert [row["name"] for row in report["evaluation"]["rows"]] == ["dense", "cut", "tuned"]
    status, out, err = call(f"search --model dense {fast} --strategy exhaustive", capsys)
    assert status == 0 and out.count("chosen") == 1
    status, out, err = call(
        f"tune --model out --text-cache-dir {workplace / 'cache'} --no-export --quiet tuned", capsys
    )
    assert (status, err) == (0, "") and "Validation loss" in out
    status, out, err = call("quantize --model out --weights int8 --quiet quanto", capsys)
    assert (status, err) == (0, "")
    (workplace / "text.txt").write_text(" ".join(f"w{i}" for i in random_tokens(1, 400)[0].tolist()))
    status, out, err = call("evaluate --model out --dataset text.txt --reference dense --quiet --json", capsys)
    assert status == 0 and json.loads(out)["kl"] > 0


def test_export_and_evaluate_the_file(workplace, capsys):
    status, out, err = call("export --model dense --segment 2:4 --weights int4 --group-size 16 --quiet out", capsys)
    assert (status, err) == (0, "") and "onnx/model_q4.onnx" in out
    assert not (workplace / "out" / "model.safetensors").exists()
    (workplace / "text.txt").write_text(" ".join(f"w{i}" for i in random_tokens(1, 400)[0].tolist()))
    line = "evaluate --model out --file onnx/model_q4.onnx --dataset text.txt --reference dense --quiet --json"
    status, out, err = call(line, capsys)
    assert status == 0 and json.loads(out)["perplexity"] > 1


def no_config():
    os.remove("dense/config.json")


def no_weights():
    os.remove("dense/model.safetensors")


def no_tokenizer():
    for name in os.listdir("dense"):
        if name.startswith("tokenizer"):
            os.remove(f"dense/{name}")


def truncated():
    os.truncate("dense/model.safetensors", 10_000)


def not_finite():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained("dense")


def replaced_by(model):
    no_weights()
    model.save_pretrained("dense")


def bert():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=50)
    replaced_by(BertModel(config))


def rwkv():
    replaced_by(RwkvForCausalLM(RwkvConfig(num_hidden_layers=2, hidden_size=8, vocab_size=50)))


def t5():
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=50)
    replaced_by(T5ForConditionalGeneration(config))


def quanto():
    assert main("quantize --model dense --segment 2:4 --quiet quanto".split()) == 0
    os.rename("dense", "kept")
    os.rename("quanto", "dense")


def full_output():
    os.mkdir("out")
    open("out/precious", "w").close()


def short_text():
    with open("text.txt", "w") as file:
        file.write("w5 w6 w7 w8")


def nothing():
    pass


BAD_INPUT = [
    (no_config, "", "model is 'dense': the folder has no config.json. Give the folder"),
    (no_weights, "", "model is 'dense': the folder has no weights (model.safetensors)"),
    (no_tokenizer, "", "model is 'dense': the folder has no tokenizer (tokenizer.json). Pass the tokenizer"),
    (truncated, "", "model is 'dense': its model.safetensors is truncated or damaged (10000 bytes"),
    (not_finite, "", "its tensor model.layers.3.mlp.up_proj.weight has 1 values that are NaN or infinite"),
    (bert, "", "model is 'dense': BertModel is not a causal language model"),
    (rwkv, "", "model_type is 'rwkv': it divides its weights in place while it runs"),
    (t5, "", "T5ForConditionalGeneration is an encoder-decoder, not a causal language model"),
    (quanto, "", "its weights are quantized with quanto and cannot be cut, tuned or exported"),
    (full_output, "", "output folder is 'out': it is not empty"),
    (
        short_text,
        "--dataset text.txt",
        "5 rows of 24 tokens, the least there must be, need 120 tokens, and it has 4. Give more text",
    ),
    (nothing, "--dataset wikitext2", "the Hugging Face Hub could not be reached. Give a local file"),
    (nothing, "--pruning-ratio 1.5", "pruning_ratio is 1.5: it must be a number between 0 and 1, both excluded"),
    (nothing, "--pruning-ratio 0.01", "it removes none of the model's 6 layers. The nearest valid ratio is 0.1667"),
    (nothing, "--pruning-ratio 0.99", "it leaves none of the model's 6 layers. The nearest valid ratio is 0.8333"),
    (
        nothing,
        "--learning-rate -1",
        "tuning.learning_rate is -1.0: it must be a number above 0 and at most 1e+38, or None",
    ),
]


@pytest.mark.parametrize(("spoil", "options", "message"), BAD_INPUT, ids=[m[2][:40] for m in BAD_INPUT])
def test_bad_input_is_one_message_and_nothing_written(workplace, capsys, spoil, options, message):
    spoil()
    capsys.readouterr()
    before = sorted(str(p) for p in workplace.rglob("*"))
    line = f"prune --model dense {FAST} --text-cache-dir {workplace / 'cache'} {TUNING} {options} out"
    status, out, err = call(line, capsys)
    assert status == 1 and out == ""
    assert err.startswith("optimum-clp: error: ") and message in err
    assert "Traceback" not in err and err.count("optimum-clp: error") == 1
    left = [str(p) for p in workplace.rglob("*") if "cache" not in p.parts]
    assert sorted(left) == before


def test_a_loss_that_becomes_nan_is_one_message_and_the_last_good_weights_are_saved(workplace, capsys, monkeypatch):
    original, calls = losses.kl_divergence, []

    def planted(teacher, student, *args):
        calls.append(1)
        return original(teacher, student) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(losses, "kl_divergence", planted)
    line = f"prune --model dense {FAST} {TUNING} --text-cache-dir {workplace / 'cache'} --no-export out"
    status, out, err = call(line, capsys)
    assert status == 3 and err == ""
    assert "Failed: tuning (tuning loss is nan: it must stay finite" in out and "were kept" in out
    assert "  repeat it with: optimum-clp tune --model out --learning-rate RATE out-tuned\nWritten to out." in out
    assert json.loads((workplace / "out" / "clp_report.json").read_text())["tuning"]["stopped"] == "nan"


def test_a_learning_rate_beyond_all_measure_leaves_the_best_weights_and_status_3(workplace, capsys):
    line = f"prune --model dense {FAST} {TUNING} --text-cache-dir {workplace / 'cache'} --no-export --learning-rate 1e30 out"
    status, out, err = call(line, capsys)
    report = json.loads((workplace / "out" / "clp_report.json").read_text())
    assert (status, err) == (3, "") and [entry["stage"] for entry in report["failures"]] == ["tuning"]
    assert report["tuning"]["best_validation_loss"] <= report["tuning"]["initial_validation_loss"]
    status, out, err = call("tune --model out --learning-rate 1e-3 --quiet out-tuned", capsys)
    assert status == 0
    status, out, err = call("finish --model out --quiet", capsys)
    assert status == 1 and "nothing in it has failed that could be done again" in err


def test_plots_that_fail_cost_the_plots_alone_and_finish_makes_them(workplace, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to find font DejaVu Sans")

    line = f"prune --model dense {FAST} {TUNING} --text-cache-dir {workplace / 'cache'} --no-export out"
    with monkeypatch.context() as patch:
        patch.setattr("optimum_clp.output_folder.write_plots", fail)
        status, out, err = call(line, capsys)
    assert (status, err) == (3, "") and "Failed: plots (RuntimeError: Failed to find font DejaVu Sans)" in out
    assert not (workplace / "out" / "plots").exists() and (workplace / "out" / "model.safetensors").exists()
    status, out, err = call("finish --model out --quiet", capsys)
    assert (status, err) == (0, "")
    report = json.loads((workplace / "out" / "clp_report.json").read_text())
    assert report["failures"] is None and report["evaluation"]["rows"]


def test_a_missing_model_is_refused(workplace, capsys):
    status, out, err = call("prune --model ./missing out", capsys)
    assert status == 1 and "model is './missing': there is no such folder" in err
