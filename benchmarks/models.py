"""Deep, narrow models for the benchmarks, trained from a seed on given text.

    python -m benchmarks.models deep32 --data DATA

DATA holds folders `stories` and `wikipedia`, each with `train.txt` (trained on) and `test.txt` (measured on only). The
tokenizer is that of `benchmarks/models/stories-llama-16l`. The model goes to `benchmarks/.cache/NAME`, which git
ignores; what it is and how well it knows the text goes to `benchmarks/results/models/NAME.json`. An interrupted run is
continued by the same command.

    python -m benchmarks.models speed100m

makes the model of the speed benchmark: 119 million random weights, no data.

A model counts as trained when its perplexity on the test text is below half that of a unigram model, whose
frequencies are those of the training text.
"""

import argparse
import dataclasses
import json
import math
import os
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.folders import CACHE, HERE, MODELS
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.report.environment import environment_info

TOKENIZER = MODELS / "stories-llama-16l"
TEXTS = ("stories", "wikipedia")
LENGTH = 128
SAVE_EVERY_SECONDS = 120


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model's shape and its training: AdamW, linear warm-up, cosine to a tenth of the rate."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    steps: int
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: int = 100
    seed: int = 0


RECIPES = {
    "deep32": Recipe(num_layers=32, hidden_size=96, intermediate_size=256, steps=1800),
    "deep80": Recipe(num_layers=80, hidden_size=64, intermediate_size=160, steps=1200),
}
SPEED = "speed100m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=[*sorted(RECIPES), SPEED])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.data is None and args.names != [SPEED]:
        parser.error("--data: deep models are trained on text")
    for name in args.names:
        if name == SPEED:
            print(speed100m())
        else:
            train(name, args.data, args.device)


def speed100m() -> Path:
    """The folder of a model that is as fast as a trained one of its shape: 15 layers, 119 million weights, tied."""
    folder = CACHE / SPEED
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=15,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            # a text that goes on to the end: no token ends it
            eos_token_id=None,
        )
        LlamaForCausalLM(config).eval().save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def train(name: str, data: Path, device: str) -> None:
    recipe = RECIPES[name]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    train_tokens = torch.cat([token_stream(data / text / "train.txt", tokenizer) for text in TEXTS])
    model = new_model(recipe, tokenizer).to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    checkpoint = CACHE / f"{name}.training.pt"
    first, spent, losses = resume(checkpoint, model, optimizer)
    generator = torch.Generator()
    begin = saved = time.perf_counter()
    for step in range(first, recipe.steps):
        generator.manual_seed(recipe.seed * 1_000_003 + step)  # a step's rows depend on its number alone
        starts = torch.randint(len(train_tokens) - LENGTH, (recipe.batch_size,), generator=generator)
        batch = torch.stack([train_tokens[s : s + LENGTH] for s in starts]).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        now = time.perf_counter()
        if now - saved > SAVE_EVERY_SECONDS:
            save(checkpoint, model, optimizer, step + 1, spent + now - begin, losses)
            saved = now
            print(f"{name} step {step + 1} of {recipe.steps}, loss {sum(losses[-50:]) / len(losses[-50:]):.3f}, "
                  f"{spent + now - begin:.0f} s", flush=True)  # fmt: skip
    seconds = spent + time.perf_counter() - begin
    finish(name, recipe, model.float().cpu().eval(), tokenizer, train_tokens, data, seconds, device)
    checkpoint.unlink(missing_ok=True)


def token_stream(file: Path, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """All tokens of a file, int64, with the start token before each paragraph."""
    paragraphs = [p for p in file.read_text(encoding="utf-8").split("\n\n") if p.strip()]
    rows = tokenizer(paragraphs, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (tokenizer.bos_token_id, *row)])


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.hidden_size // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # GPT-2's scale: what 2L residual branches add has the size of what one would
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight /= math.sqrt(2 * recipe.num_layers)
            layer.mlp.down_proj.weight /= math.sqrt(2 * recipe.num_layers)
    return model.train()


def learning_rate(recipe: Recipe, step: int) -> float:
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def resume(checkpoint: Path, model, optimizer) -> tuple[int, float, list[float]]:
    if not checkpoint.is_file():
        return 0, 0.0, []
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"], state["losses"]


def save(checkpoint: Path, model, optimizer, step: int, seconds: float, losses: list[float]) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "step": step, "seconds": seconds, "losses": losses}, f"{checkpoint}.tmp")
    os.replace(f"{checkpoint}.tmp", checkpoint)


def finish(name, recipe, model, tokenizer, train_tokens, data: Path, seconds: float, device: str) -> None:
    """Save the model, and record how well it knows the text beside the unigram model."""
    figures = {}
    for text in TEXTS:
        stream = token_stream(data / text / "test.txt", tokenizer)
        rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
        figures[text] = {
            "perplexity": evaluate_tokens(model, rows, quiet=True).perplexity,
            "unigram_perplexity": unigram_perplexity(train_tokens, rows[:, 1:].reshape(-1), len(tokenizer)),
            "num_tokens": rows[:, 1:].numel(),
        }
    folder = CACHE / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "name": name,
        "recipe": dataclasses.asdict(recipe),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": recipe.steps * recipe.batch_size * LENGTH,
        "test": figures,
        "seconds": round(seconds),
        "environment": environment_info(device),
    }
    file = HERE / "results" / "models" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["test"]), flush=True)
    poor = [t for t, f in figures.items() if f["perplexity"] >= f["unigram_perplexity"] / 2]
    if poor:
        raise SystemExit(f"{name} does not know {', '.join(poor)}: perplexity is above half of a unigram model's")


def unigram_perplexity(train_tokens: torch.Tensor, test_tokens: torch.Tensor, vocabulary: int) -> float:
    """Of test tokens under the add-one frequencies of the training tokens."""
    counts = torch.bincount(train_tokens, minlength=vocabulary).double() + 1
    return math.exp(-(counts / counts.sum()).log()[test_tokens].mean().item())


if __name__ == "__main__":
    main()
