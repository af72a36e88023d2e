"""What goes along with a checkpoint: the chat template where others look for it, and the tokenizer's own files."""

import json

import pytest
from byte_tokenizer import tiny_tokenizer
from tiny_models import tiny_config
from transformers import AutoTokenizer

from optimum_clp.checkpoint.saving import save_tokenizer

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
