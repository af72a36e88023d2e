"""What a checkpoint holds, and what goes along with it: the chat template where others look for it, the tokenizer's own files."""

import json
import subprocess
import sys

import pytest
import torch
from byte_tokenizer import tiny_tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_clp.checkpoint import saving
from optimum_clp.checkpoint.saving import save_checkpoint, save_tokenizer, verify_checkpoint
from optimum_clp.errors import CutError
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model

CHAT = [{"role": "user", "content": "Tom ran home."}]


@pytest.fixture
def source(tmp_path):
    """A model's folder as it comes from the Hub, with files that transformers does not write again."""
    folder = tmp_path / "source"
    tiny_config(vocab_size=300).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for name in ("tokenizer.model", "merges.txt", "vocab.json", "preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text("{}" if name.endswith("json") else name)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "private.txt").write_text("nobody's business")
    return folder


def saved(tokenizer, folder):
    tiny_config(vocab_size=300).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def test_the_chat_template_is_in_the_tokenizers_config_as_well(tmp_path):
    tokenizer = tiny_tokenizer()
    folder = saved(tokenizer, tmp_path / "out")
    said = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert said == tokenizer.chat_template == (folder / "chat_template.jinja").read_text()
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False) == expected
    # each place alone is enough, in both versions of transformers
    (folder / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False) == expected


def test_several_templates_and_none(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ messages }}"}
    folder = saved(tokenizer, tmp_path / "several")
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    tokenizer.chat_template = None
    folder = saved(tokenizer, tmp_path / "none")
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_every_file_of_tokenizer_and_processor_goes_along(source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    folder = saved(tokenizer, tmp_path / "out")
    for name in ("tokenizer.model", "merges.txt", "vocab.json", "preprocessor_config.json", "processor_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    assert not (folder / "private.txt").exists() and not (folder / "model.safetensors").exists()
    reloaded = AutoTokenizer.from_pretrained(folder)
    assert reloaded("Tom ran  home.")["input_ids"] == tokenizer("Tom ran  home.")["input_ids"]


@pytest.mark.parametrize("changed", [False, True])
def test_files_about_tokens_go_along_as_long_as_they_are_true(changed, source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    end = "<|im_end|>" if changed else tokenizer.eos_token
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": tokenizer.eos_token}}))
    (source / "added_tokens.json").write_text(json.dumps({tokenizer.bos_token: tokenizer.bos_token_id + changed}))
    tokenizer.eos_token = end
    if changed:
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
        (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": "no such token"}))
    folder = saved(tokenizer, tmp_path / "out")
    # transformers 4 writes the first of them itself
    written = folder / "special_tokens_map.json"
    assert not written.exists() or "no such token" not in written.read_text()
    assert (folder / "added_tokens.json").exists() is not changed
    if not changed:
        assert written.exists()


def test_a_tokenizer_made_in_memory_has_nothing_to_go_along(tmp_path):
    folder = saved(tiny_tokenizer(), tmp_path / "out")
    assert not (folder / "tokenizer.model").exists()


def test_a_cut_checkpoint_has_the_dense_files_bytes_where_nothing_was_touched(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto").eval()
    cut = cut_model(dense, [LayerSegment(2, 4)])
    save_checkpoint(cut, None, tmp_path / "cut")
    verify_checkpoint(tmp_path / "cut", cut)
    before, after = (raw_tensors(tmp_path / name / "model.safetensors") for name in ("dense", "cut"))
    names = {name: name for name in before if ".layers." not in name}
    for new, old in enumerate([0, 1, 4, 5]):
        names |= {n.replace(f".{old}.", f".{new}."): n for n in before if f".layers.{old}." in n}
    assert after == {name: before[old] for name, old in names.items()}


def raw_tensors(file):
    """Shape, dtype and bytes of each tensor, by the format's own description: a length, a JSON header, and the data."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.pop("__metadata__")
    return {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()}


def test_large_models_have_shards_that_are_checked_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_SIZE", "100KB")
    model = tiny_model()
    save_checkpoint(model, None, tmp_path)
    verify_checkpoint(tmp_path, model)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 110_000 for shard in shards)
    tensors = load_file(shards[1])
    name = next(iter(tensors))
    tensors[name].view(-1)[3] += 1
    save_file(tensors, shards[1], metadata={"format": "pt"})
    with pytest.raises(CutError, match=f"read back, its tensor {name} differs from the one in memory"):
        verify_checkpoint(tmp_path, model)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's own figures of a process are Linux's")
def test_saving_a_mapped_model_and_checking_it_holds_no_copy_of_the_weights(tmp_path):
    """In a process of its own: private memory, looked at while 100 MB are written and read back."""
    script = """
import sys, threading
from transformers import AutoModelForCausalLM
from optimum_clp.checkpoint.saving import save_checkpoint, verify_checkpoint
from optimum_clp.forward.memory_bound import private_memory
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
before, peaks, over = private_memory(), [0], threading.Event()
def look():
    while not over.wait(0.002):
        peaks[0] = max(peaks[0], private_memory())
thread = threading.Thread(target=look)
thread.start()
save_checkpoint(model, None, sys.argv[2])
verify_checkpoint(sys.argv[2], model)
over.set()
thread.join()
print(peaks[0] - before)
"""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_layers": 6, "num_attention_heads": 8}
    tiny_model(**wide).save_pretrained(tmp_path / "dense")
    size = (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert size > 70e6
    arguments = [sys.executable, "-c", script, str(tmp_path / "dense"), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 0.3 * size
