"""Models that read images or sound: their text decoder is cut inside them, and everything else stays as it was."""

import json

import pytest
import torch
from container_zoo import container, types
from gates import gated
from tiny_models import VOCABULARY, random_tokens, tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers import __version__ as transformers_version

from optimum_clp import CLPConfig, CLPPruner, LayerSegment
from optimum_clp.architecture.containers import container_class, text_type
from optimum_clp.architecture.lookup import (
    allowed_segments,
    cut_obstacle,
    decoder_layers,
    find_architecture,
    num_layers,
)
from optimum_clp.checkpoint.loading import load_model
from optimum_clp.checkpoint.processors import copy_processor
from optimum_clp.checkpoint.saving import save_checkpoint, verify_checkpoint
from optimum_clp.errors import ModelError
from optimum_clp.surgery.cut import cut_model

FIVE = transformers_version >= "5"
SMALL = {
    *"aya_vision deepseek_vl gemma3 idefics3 internvl llava llava_next llava_next_video llava_onevision mistral3".split(),
    *"ovis2 paligemma smolvlm vipllava aria".split(),
}
SMALL_IN_5 = set(
    """
    cohere_compass exaone4_5 gemma4 gemma4_unified glmasr granite_speech granite_speech_plus hyperclovax_vision_v2
    kimi_k25 lfm2_vl lighton_ocr minicpm_ocr minicpmv4_6 minicpmv4_7 qianfan_ocr qwen2_5_vl qwen2_audio qwen2_vl qwen3_5
    qwen3_5_moe qwen3_vl qwen3_vl_moe qwen4_exp video_llama_3 video_llava voxtral
    """.split()
)
NOT_TRIED = {
    "cohere2_vision": "millions of parameters, whatever its sizes",
    "cosmos3_omni": "sizes that must fit one another",
    "deepseek_vl_hybrid": "millions of parameters, whatever its sizes",
    "fast_vlm": "needs timm",
    "fun_asr_nano": "sizes that must fit one another",
    "idefics2": "sizes that must fit one another",
    "inkling_mm_model": "needs scipy",
    "janus": "millions of parameters, whatever its sizes",
    "lfm3_vl": "sizes that must fit one another",
    "llama4": "millions of parameters, whatever its sizes",
    "minimax_m3_vl": "sizes that must fit one another",
    "nemo_speechlm": "millions of parameters, whatever its sizes",
    "nemotron_h_omni": "sizes that must fit one another",
    "perception_lm": "needs timm",
    "qwen2_5_omni": "sizes that must fit one another",
    "qwen3_asr": "millions of parameters, whatever its sizes",
    "vibevoice_asr": "millions of parameters, whatever its sizes",
    "voxtral_realtime": "its text decoder also reads a time",
}


def tried():
    return sorted(SMALL | (SMALL_IN_5 if FIVE else set()))


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **more).logits


def gate_of(model, start, stop):
    gate = torch.ones(num_layers(model.config), dtype=torch.float64)
    gate[start:stop] = 0
    return gate


def test_every_type_of_this_transformers_is_tried_or_there_is_a_reason():
    known = SMALL | SMALL_IN_5 | NOT_TRIED.keys()
    if not FIVE:
        known |= {"lfm2_vl", *SMALL_IN_5}
    assert set(types()) <= known


@pytest.mark.parametrize("model_type", tried())
def test_the_cut_container_is_the_gated_one_and_reloads(model_type, tmp_path):
    model = container(model_type)
    segment = allowed_segments(model.config, 2)[2]
    smaller = cut_model(model, [segment])
    ids = random_tokens(1, 12) % (VOCABULARY - 3)
    with gated(decoder_layers(model), gate_of(model, segment.start, segment.stop)):
        expected = logits(model, ids)
    assert torch.equal(logits(smaller, ids), expected)
    outside = [n for n, _ in model.named_parameters() if "vision" in n or "audio" in n or "projector" in n]
    assert all(torch.equal(smaller.get_parameter(n), model.get_parameter(n)) for n in outside)
    save_checkpoint(smaller, None, tmp_path)
    verify_checkpoint(tmp_path, smaller)
    found = load_model(tmp_path, accept=find_architecture, quiet=True)
    assert type(found) is type(model) and num_layers(found.config) == num_layers(model.config) - 2


@pytest.mark.parametrize("model_type", ["llava", "gemma3"])
def test_with_an_image(model_type):
    model = container(model_type)
    patches = {"llava": 16, "gemma3": 4}[model_type]
    for parameter in model.parameters():  # Gemma 3's projection starts at 0
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.full((1, patches), VOCABULARY - 1), random_tokens(1, 6) % (VOCABULARY - 3)], dim=1)
    given = {"pixel_values": pixels}
    if model_type == "gemma3":
        given["token_type_ids"] = (ids == VOCABULARY - 1).long()
    smaller = cut_model(model, [LayerSegment(3, 5)])
    with gated(decoder_layers(model), gate_of(model, 3, 5)):
        expected = logits(model, ids, **given)
    assert torch.equal(logits(smaller, ids, **given), expected)
    assert not torch.equal(expected, logits(smaller, ids, **{**given, "pixel_values": -pixels}))


@pytest.mark.skipif(not FIVE, reason="transformers 4 builds it otherwise")
def test_layers_that_an_image_is_added_to_stay():
    config = container("qwen3_vl").config
    fed = len(config.vision_config.deepstack_visual_indexes)
    count = num_layers(config)
    assert fed > 0
    assert "the image is added to what leaves them" in cut_obstacle(config, range(1, count))
    assert all(segment.start >= fed for segment in allowed_segments(config, 2))


def test_prune_keeps_the_processor(tmp_path):
    """From a folder, as its publisher wrote it, to a folder that the stock class reads."""
    folder = tmp_path / "dense"
    container("llava").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    (folder / "processor_config.json").write_text('{"processor_class": "LlavaProcessor", "patch_size": 8}')
    recipe = CLPConfig(
        pruning_ratio=0.25,
        calibration={
            "sequence_length": 16,
            "train_sequences": 6,
            "validation_sequences": 2,
            "test_sequences": 2,
            "cache_dir": str(tmp_path / "cache"),
        },
        search={"num_sequences": 4},
        tuning={"epochs": 1, "batch_size": 2},
        export={"enabled": False},
        evaluation={"max_new_tokens": 2},
    )
    out = tmp_path / "out"
    CLPPruner.from_pretrained(folder, quiet=True).prune(recipe, save_directory=out)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (out / name).read_text() == (folder / name).read_text()
    stock, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(stock).__name__ == "LlavaForConditionalGeneration" and stock.config.text_config.num_hidden_layers == 6
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]


def test_processor_files_of_what_cannot_be_found(tmp_path):
    assert copy_processor(None, tmp_path) == []
    assert copy_processor("", tmp_path) == []
    assert copy_processor("no/such-model", tmp_path) == []
    assert copy_processor("/no/such/folder", tmp_path) == []


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("blip-2", "it cannot run without an image.*give `model.language_model`, which is a causal language model"),
        ("mllama", "it reads images or sound as well"),
        (
            "glm4v",
            r"Glm4vForConditionalGeneration holds a text decoder of type 'glm4v_text'.*`model.get_decoder\(\)` takes",
        ),
        ("shieldgemma2", "it is a classifier of images"),
    ],
)
def test_what_cannot_be_cut_says_so(model_type, message):
    with pytest.raises(ModelError, match=message):
        find_architecture(CONFIG_MAPPING[model_type]())


def test_names_of_classes():
    assert container_class("llava") == "LlavaForConditionalGeneration"
    assert container_class("llama") is None
    assert text_type(CONFIG_MAPPING["llava"]()) == "llama"
    assert text_type(CONFIG_MAPPING["llama"]()) is None
