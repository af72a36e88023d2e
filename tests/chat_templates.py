"""Chat templates in the shape of the main families, in words of ours, and a tokenizer that has their special tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}"""
_PROMPT = """{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_SYSTEM = """{% if messages[0].role != 'system' %}<|im_start|>system
Be of use.<|im_end|>
{% endif %}"""
_HEADERS = """{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>

{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>

{% endif %}"""
_GEMMA = """{{ bos_token }}{% for m in messages %}<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<|/turn|>
{% endfor %}{% if add_generation_prompt %}<|turn|>model
{% endif %}"""
_MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""
_PHI = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
_QWEN3 = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% if loop.last %}<think>

</think>

{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
EMPTY{% endif %}"""
_NO_THOUGHT = """<think>

</think>

"""
_DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"""
_CHANNELS = """<|start|>system<|message|>Channels.<|end|>{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""

# for each family: the template, what opens, what leads to the answer, to the next question, what closes; what ends an answer
FAMILIES = {
    "chatml": (
        _SYSTEM + _CHATML + _PROMPT,
        "<|im_start|>system\nBe of use.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n",
        "<|im_end|>",
    ),
    "llama3": (
        _HEADERS,
        "<s><|head|>user<|/head|>\n\n",
        "<|eot|><|head|>assistant<|/head|>\n\n",
        "<|eot|><|head|>user<|/head|>\n\n",
        "<|eot|>",
        "<|eot|>",
    ),
    "gemma": (
        _GEMMA,
        "<s><|turn|>user\n",
        "<|/turn|>\n<|turn|>model\n",
        "<|/turn|>\n<|turn|>user\n",
        "<|/turn|>\n",
        "<|/turn|>",
    ),
    # the space before a word is the word's own
    "mistral": (_MISTRAL, "<s>[INST]", " [/INST]", "</s>[INST]", "</s>", "</s>"),
    "phi": (
        _PHI,
        "<|user|>\n",
        "<|end|>\n<|assistant|>\n",
        "<|end|>\n<|user|>\n",
        "<|end|>\n",
        "<|end|>",
    ),
    # thoughts are taken out of what was said before, so a conversation has one turn
    "qwen3": (
        _QWEN3.replace("EMPTY", ""),
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        None,
        "<|im_end|>\n",
        "<|im_end|>",
    ),
    "qwen3 without thinking": (
        _QWEN3.replace("EMPTY", _NO_THOUGHT),
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n" + _NO_THOUGHT,
        None,
        "<|im_end|>\n",
        "<|im_end|>",
    ),
    "deepseek": (_DEEPSEEK, "<s><|User|>", "<|Assistant|>", "</s><|User|>", "</s>", "</s>"),
    # the model names the channel itself, and an answer may have several parts
    "channels": (
        _CHANNELS,
        "<|start|>system<|message|>Channels.<|end|><|start|>user<|message|>",
        "<|end|><|start|>assistant",
        None,
        "<|return|>",
        "<|return|>",
    ),
}
CHATML = FAMILIES["chatml"][0]
SPECIAL = (
    "<s> </s> <|im_start|> <|im_end|> <|head|> <|/head|> <|eot|> <|turn|> <|/turn|> [INST] [/INST] <|user|> <|assistant|> "
    "<|end|> <|User|> <|Assistant|> <|start|> <|channel|> <|message|> <|return|>"
).split()


def chat_tokenizer(template=CHATML, special=SPECIAL):
    """A byte is a token; behind the bytes come the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer
