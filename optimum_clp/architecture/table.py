"""The model types that can be cut, what structure does not tell about them, and those that are refused, with the reason.

To add a model type here see docs/architectures.md: a row, and a line in the tests' zoo. Another package adds one with
[`register_architecture`], or with an entry point: docs/contribute/architecture.md.
"""

from dataclasses import dataclass

from ..doors import ARCHITECTURES
from ..errors import ConfigurationError
from .conditions import (
    AttentionStays,
    Condition,
    DonorsStay,
    IndexInTheMath,
    KindStays,
    LastKind,
    Refusal,
    SharedKeysStay,
    SinceTransformers5,
    Stays,
    Unless,
)
from .fields import (
    AttentionTypes,
    Cycle,
    DepthField,
    Dropped,
    FirstLayers,
    LastLayers,
    LayerIndices,
    Multiple,
    NestedIndices,
    NestedLists,
    Period,
    PerLayer,
    PerLayerOverrides,
    RedundantPeriod,
    Same,
    ScaledByDepth,
    SparseRange,
    SparseStep,
)


@dataclass(frozen=True)
class Architecture:
    """What structure alone does not tell about a `model_type`.

    Args:
        model_type (`str`): As in `config.json`.
        fields (`tuple[DepthField, ...]`): Rules for its own config fields, beyond `COMMON_FIELDS`.
        conditions (`tuple[Condition, ...]`): What else must hold for a cut.
        count (`str`): Config field with the number of layers.
        threads_state (`bool`): Layers hand later ones more than hidden states, so that those below a cut cannot be
            left out when a forward pass is resumed; see [`~optimum_clp.forward.layer_stack.LayerStack.resumed`].
    """

    model_type: str
    fields: tuple[DepthField, ...] = ()
    conditions: tuple[Condition, ...] = ()
    count: str = "num_hidden_layers"
    threads_state: bool = False


COMMON_FIELDS: tuple[DepthField, ...] = (
    PerLayer("layer_types"),
    PerLayer("mlp_layer_types"),
    PerLayer("layers_block_type"),
    PerLayer("no_rope_layers"),
    PerLayerOverrides(),
    NestedLists(),
    # further tokens, by all the names that checkpoints have for them
    Dropped("num_nextn_predict_layers"),
    Dropped("num_mtp_layers"),
    Dropped("mtp_num_hidden_layers"),
    Dropped("mtp_num_layers"),
)
"""Fields that mean the same in every config that has them."""

COMMON_CONDITIONS: tuple[Condition, ...] = (AttentionStays(),)
"""What must hold for every architecture."""

_WINDOW = RedundantPeriod("sliding_window_pattern", "layer_types", "full_attention")
_PRIVATE_WINDOW = RedundantPeriod("_sliding_window_pattern", "layer_types", "full_attention")
_GLOBAL = RedundantPeriod("global_attn_every_n_layers", "layer_types", "full_attention")
_NO_ROPE = RedundantPeriod("no_rope_layer_interval", "no_rope_layers", 0)
_FIRST_DENSE = FirstLayers("first_k_dense_replace")
_FIRST_WINDOWLESS = FirstLayers("max_window_layers")
_GEMMA4 = (
    Unless(
        "hidden_size_per_layer_input",
        (None, 0),
        "every layer has its own slice of one large embedding, which would have to be cut too",
        "Use a Gemma 4 without per-layer embeddings",
    ),
    SharedKeysStay(),
    LastKind("layer_types", "full_attention"),
)
_GEMMA4_FIELDS = (LastLayers("num_kv_shared_layers"),)
_SHARED_BLOCK = KindStays("layers_block_type", "hybrid", "hybrid layers share the weights of one transformer block")
_SHARED_INDEXER = (DonorsStay("indexer_types", "full", "shared"),)

_PLAIN = """
    apertus arcee aria_text axk1 axk2 biogpt bitnet bloom codegen cohere cohere_compass_text ctrl cwm
    dbrx doge ernie4_5 falcon falcon_h1 falcon_mamba flex_olmo gemma gemma2 glm glm4 glm4_moe_lite
    gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense
    hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 lfm3 llama mamba mamba2 mellum
    mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral moshi mpt nanochat nemotron
    nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen3_5_moe_text
    qwen3_5_text seed_oss solar_open stablelm starcoder2 vaultgemma xglm youtu
""".split()

_ROWS = (
    *map(Architecture, _PLAIN),
    Architecture("afmoe", (FirstLayers("num_dense_layers"), _GLOBAL)),
    Architecture(
        "bailing_hybrid",
        (_FIRST_DENSE, RedundantPeriod("layer_group_size", "layer_types", "full_attention")),
    ),
    Architecture("beam", conditions=(IndexInTheMath("it scales the residual stream"),)),
    Architecture("bamba", (LayerIndices("attn_layer_indices"),)),
    Architecture("cohere2", (_WINDOW, _PRIVATE_WINDOW)),
    Architecture("cohere2_moe", (_WINDOW,)),
    Architecture("deepseek_v2", (_FIRST_DENSE,)),
    Architecture("deepseek_v32", (_FIRST_DENSE,)),
    Architecture("deepseek_v3", (_FIRST_DENSE,)),
    Architecture("deepseek_v4"),
    Architecture("diffllama", conditions=(IndexInTheMath("the initial lambda of its differential attention"),)),
    Architecture("dots1", (_FIRST_DENSE, _FIRST_WINDOWLESS)),
    Architecture("ernie4_5_moe", (SparseRange(),)),
    Architecture("exaone4", (_WINDOW,)),
    Architecture("exaone_moe", (_WINDOW, _FIRST_DENSE)),
    Architecture("flint", (SparseStep(),)),
    Architecture("gemma3", (_PRIVATE_WINDOW,)),
    Architecture("gemma3_text", (_PRIVATE_WINDOW,)),
    Architecture("gemma4_text", _GEMMA4_FIELDS, _GEMMA4, threads_state=True),
    Architecture("gemma4_unified_text", _GEMMA4_FIELDS, _GEMMA4, threads_state=True),
    Architecture("glm4_moe", (_FIRST_DENSE,)),
    Architecture("glm_moe_dsa", (PerLayer("indexer_types"), _FIRST_DENSE), _SHARED_INDEXER, threads_state=True),
    Architecture(
        "gpt2", conditions=(IndexInTheMath("attention scores are divided by it", "scale_attn_by_inverse_layer_idx"),)
    ),
    Architecture("gpt_neo", (AttentionTypes(),)),
    Architecture("gpt_neox_japanese", conditions=(Stays(-1, "the last layer alone has a bias in its attention"),)),
    Architecture("granite_swa", (PerLayer("layer_rope_theta"),)),
    Architecture("granitemoe_swa", (PerLayer("layer_rope_theta"),)),
    Architecture(
        "hunyuan_v1_moe",
        tuple(map(PerLayer, ("moe_topk", "num_experts", "num_shared_expert", "moe_intermediate_size"))),
    ),
    Architecture("hy_v4", (PerLayer("indexer_types"),), _SHARED_INDEXER, threads_state=True),
    Architecture("inkling_text", (LayerIndices("local_layer_ids"),)),
    Architecture(
        "jamba",
        (
            Period("attn_layer_period", "attn_layer_offset"),
            Period("expert_layer_period", "expert_layer_offset"),
        ),
    ),
    Architecture(
        "kimi_linear", (_FIRST_DENSE, NestedIndices("linear_attn_config", ("full_attn_layers", "kda_layers")))
    ),
    Architecture("laguna", (PerLayer("num_attention_heads_per_layer"),)),
    Architecture("lfm2", (LayerIndices("full_attn_idxs"),)),
    Architecture("lfm2_moe", (FirstLayers("num_dense_layers"),)),
    Architecture("llama4_text", (LayerIndices("moe_layers"), _NO_ROPE)),
    Architecture("longcat_flash", (Multiple("num_hidden_layers"),), count="num_layers"),
    Architecture("minicpm3", (ScaledByDepth("scale_depth"),)),
    Architecture(
        "modernbert-decoder",
        (RedundantPeriod("global_attn_every_n_layers", "layer_types", "full_attention", True),),
        (Stays(0, "the first layer alone has no norm before its attention"),),
    ),
    Architecture("qwen2", (_FIRST_WINDOWLESS,)),
    Architecture("qwen2_moe", (_FIRST_WINDOWLESS, SparseStep())),
    Architecture("qwen3", (_FIRST_WINDOWLESS,)),
    Architecture("qwen3_moe", (SparseStep(),)),
    Architecture("qwen3_next", (SparseStep(),)),
    Architecture("qwen4_exp_text", (LayerIndices("ple_layer_ids", base=1),)),
    Architecture(
        "recurrent_gemma",
        (Cycle("block_types"),),
        (SinceTransformers5("its layers keep the state of the last batch, also without a cache"),),
    ),
    Architecture("smollm3", (_NO_ROPE,)),
    Architecture("xlstm", (Same("num_blocks"),), (SinceTransformers5("a saved model cannot be read back"),)),
    Architecture("zamba", conditions=(_SHARED_BLOCK,)),
)

# transformers reads these as text models as well as with their other parts, or has one class for both
_TEXT_MODELS = {
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}
BUILT_IN: dict[str, Architecture] = {row.model_type: row for row in _ROWS}
BUILT_IN |= {outer: BUILT_IN[inner] for outer, inner in _TEXT_MODELS.items()}
"""By `model_type`: those whose cuts the contract suite tests."""

CONTAINED: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("qwen2_vl_text", (_FIRST_WINDOWLESS,)),
        Architecture("qwen2_5_vl_text", (_FIRST_WINDOWLESS,)),
        Architecture("qwen3_vl_text"),
        Architecture("qwen3_vl_moe_text", (SparseStep(),)),
    )
}
"""By `model_type`: text decoders that are only found inside a container with other parts."""

_ENCODERS = """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert qdqbert rembert roberta
    roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod
""".split()
_ENCODER_DECODERS = """
    bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody mvp pegasus plbart prophetnet
    speech_to_text_2 trocr whisper xlm-prophetnet
""".split()
_MULTIMODAL = "dots3_note emu3 fuyu git mllama moss_transcribe_diarize phi4_multimodal".split()
_NEEDS_AN_IMAGE = (
    "it cannot run without an image, so that its text decoder cannot be searched",
    "Cut its text decoder: give `model.language_model`, which is a causal language model",
)
_PER_LAYER_EMBEDDING = (
    "every layer has its own slice of one embedding and shares keys and values with others: a cut would have to rewrite "
    "tensors, and its config.json says by the number of layers which layers share",
    "Use a Gemma 3 (gemma3_text) instead; support would need a cut that slices embed_tokens_per_layer",
)
_ANOTHER = "Use a decoder-only model of another type"
REFUSED: dict[str, Refusal] = {
    **dict.fromkeys(
        _ENCODERS, ("it is an encoder, with a language model head only where is_decoder is set", _ANOTHER)
    ),
    **dict.fromkeys(
        _ENCODER_DECODERS, ("it is the decoder of an encoder-decoder; its layers also read an encoder", _ANOTHER)
    ),
    **dict.fromkeys(
        _MULTIMODAL,
        (
            "it reads images or sound as well, and a cut of its text decoder alone is not tested",
            "Save its text decoder as a model of its own, if it has one, and cut that",
        ),
    ),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _NEEDS_AN_IMAGE),
    "blt": ("it is made of several stacks of layers (bytes, patches, bytes)", _ANOTHER),
    "cpmant": ("its cached generation is broken in transformers 4.57 and inexact in 5.23", _ANOTHER),
    "dots3_note_text": ("layers differ in their number of heads in a way that is not tested", _ANOTHER),
    "gemma3n": _PER_LAYER_EMBEDDING,
    "gemma3n_text": _PER_LAYER_EMBEDDING,
    "gemma4_assistant": ("it drafts for another model, whose keys and values it reads", "Cut the other model"),
    "gemma4_unified_assistant": ("it drafts for another model, whose keys and values it reads", "Cut the other model"),
    **dict.fromkeys(
        ("got_ocr2", "pp_chart2table"),
        ("read back, it computes other logits, cut or not", "Use another type for reading text in images"),
    ),
    "hrm_text": ("it runs its layers several times, in cycles, so that no layer has one place in the stack", _ANOTHER),
    "inkling2_text": ("blocks of layers share residuals by the layers' index", _ANOTHER),
    "mega": ("transformers has removed it", _ANOTHER),
    "minimax": (
        "the decay of its linear attention depends on the layer's index and on the number of layers",
        _ANOTHER,
    ),
    "open-llama": ("transformers has removed it", _ANOTHER),
    "reformer": ("its layers are reversible and carry two streams", _ANOTHER),
    "rwkv": (
        "it divides its weights in place while it runs, by an amount that depends on the layer's index",
        "Use a Mamba or xLSTM model for a recurrent one",
    ),
    "shieldgemma2": ("it is a classifier of images over a Gemma 3", "Use the Gemma 3 (gemma3) that it was made from"),
    "transfo-xl": ("transformers has removed it", _ANOTHER),
    "xlnet": ("its layers carry two streams, and it predicts in permuted order", _ANOTHER),
    "zamba2": ("its shared transformer block keeps an adapter for each place in the stack where it is used", _ANOTHER),
    "zaya": ("each layer's router reads the state of the router before it, which a cut would exchange", _ANOTHER),
}
"""By `model_type`: why no cut is exact, and what would be needed."""


def register_architecture(architecture: Architecture) -> None:
    """Add a model type that this package does not know, so that it can be cut; the guard checks its cuts like any other.

    Args:
        architecture ([`Architecture`]): Its row.

    Raises:
        ConfigurationError: If the type is one that this package cuts or refuses itself, or that was added before.
    """
    model_type = architecture.model_type
    if model_type in REFUSED:
        raise ConfigurationError.of(
            "architecture",
            model_type,
            f"no cut of that type is exact ({REFUSED[model_type][0]}), and that cannot be overridden",
            REFUSED[model_type][1],
        )
    if model_type in BUILT_IN:
        raise ConfigurationError.of(
            "architecture",
            model_type,
            "this package has a row for that type, which its tests hold, and that cannot be overridden",
            "Leave yours out, or change the row in optimum_clp/architecture/table.py",
        )
    ARCHITECTURES.register(model_type, architecture)
