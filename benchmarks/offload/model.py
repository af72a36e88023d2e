"""A model in LLaMA's shape of any number of layers, written shard by shard: nothing ever holds more than a few of them.

    python -m benchmarks.offload.model FOLDER --gigabytes 1

Random weights in bfloat16, a tokenizer of words and a text beside them. All layers have one shape, 23.6 MB, so that two sizes differ
by their number alone.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, VOCABULARY = 1024, 2816, 16, 8, 8192
LAYERS_IN_A_SHARD = 8
WORDS = 40_000


def shape(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def shapes_of_a_layer() -> dict[str, tuple[int, ...]]:
    keys = HIDDEN // HEADS * KEY_HEADS
    return {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }


def layers_for(size: float) -> int:
    """Layers that make a model of about so many bytes."""
    layer = 2 * sum(torch.Size(s).numel() for s in shapes_of_a_layer().values())
    return max(4, round((size - 2 * VOCABULARY * HIDDEN) / layer))


def write_model(folder: Path, layers: int, seed: int = 0) -> int:
    """Write it, with tokenizer and text.

    Returns:
        `int`: Bytes of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape(layers).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    written = 0
    count = -(-layers // LAYERS_IN_A_SHARD)
    for number, tensors in enumerate(_shards(layers, generator), 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        written += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": written}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _tokenizer().save_pretrained(folder)
    words = torch.randint(3, VOCABULARY, (WORDS,), generator=generator).tolist()
    lines = [" ".join(f"w{word}" for word in words[i : i + 100]) for i in range(0, WORDS, 100)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    return written


def _shards(layers: int, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    for first in range(0, layers, LAYERS_IN_A_SHARD):
        tensors = {}
        if first == 0:
            tensors["model.embed_tokens.weight"] = _weight((VOCABULARY, HIDDEN), 1.0, generator)
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for index in range(first, min(layers, first + LAYERS_IN_A_SHARD)):
            for name, size in shapes_of_a_layer().items():
                key = f"model.layers.{index}.{name}.weight"
                # wide enough that no two layers do the same, narrow enough that hundreds do not blow up
                tensors[key] = (
                    _weight(size, size[-1] ** -0.5 / 2, generator) if len(size) > 1 else torch.ones(HIDDEN).bfloat16()
                )
        yield tensors


def _weight(size: tuple[int, ...], deviation: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16).normal_(0, deviation, generator=generator)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    args = parser.parse_args()
    layers = layers_for(args.gigabytes * 1e9)
    print(f"{write_model(args.folder, layers) / 1e9:.2f} GB, {layers} layers")


if __name__ == "__main__":
    main()
