"""A small random model of every decoder architecture: the data of the contract suite.

Adding a model type is one line in `ZOO`: its name, and what its configuration needs beyond `COMMON` so that its layers
differ from one another (dense and expert layers, sliding windows, layers without rotary embedding), which is what a
naive cut would break.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from tiny_models import VOCABULARY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers import __version__ as transformers_version

NUM_LAYERS = 8
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "hidden_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# multi-head latent attention
MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GROUPS = {"n_group": 1, "topk_group": 1}
MAMBA1 = {"mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}
GATED_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}
SLIDING, FULL = "sliding_attention", "full_attention"
# irregular on purpose: no cut of two layers leaves it periodic
WINDOWS = {"sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, FULL, FULL]}
LINEAR = "linear_attention"


@dataclass(frozen=True)
class TinyType:
    """One model type of the zoo.

    Args:
        model_type (`str`): As in `config.json`.
        settings (`dict`): Configuration, on top of `COMMON`; for a model with a nested text configuration, of that.
        cuts (`tuple`): Segments to remove, one tuple of `(start, stop)` pairs for each cut.
        transformers (`str`): Configuration values that exist in one major version only are kept apart by it: `"4"`,
            `"5"`, or `""` for both.
        tying (`bool`): Whether the class can tie its head to its embedding.
        plantable (`bool`): Whether zeroing a layer's matrices makes it the identity.
        variant (`str`): Tells apart several models of one type.
        outer (`dict`): Configuration outside a nested text configuration.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    cuts: tuple[tuple[tuple[int, int], ...], ...] = (((0, 2),), ((3, 5),), ((6, 8),), ((1, 2), (4, 6)))
    transformers: str = ""
    tying: bool = True
    plantable: bool = True
    variant: str = ""
    outer: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For test ids."""
        return f"{self.model_type}-{self.variant}" if self.variant else self.model_type


def _(model_type: str, /, **options: Any) -> TinyType:
    own = {f.name for f in fields(TinyType)} - {"model_type", "settings"}
    settings = {name: value for name, value in options.items() if name not in own}
    return TinyType(model_type, settings, **{name: value for name, value in options.items() if name in own})


SPARSE = ["dense", "sparse", "sparse", "dense", "sparse", "sparse", "dense", "sparse"]
ALL = (
    _("afmoe", **WINDOWS, num_dense_layers=4, global_attn_every_n_layers=4),
    _("apertus"),
    _("arcee"),
    _("aria_text", moe_num_experts=4, moe_topk=2),
    _("axk1", **MLA, **GROUPS, mlp_layer_types=SPARSE),
    _("axk2", **MLA, **INDEXER, **GROUPS, mlp_layer_types=SPARSE),
    _(
        "bailing_hybrid",
        tying=False,
        **MLA,
        **GROUPS,
        layer_types=[LINEAR, LINEAR, FULL, LINEAR, FULL, LINEAR, LINEAR, FULL],
        mlp_layer_types=SPARSE,
    ),
    _("bamba", **MAMBA2, attn_layer_indices=[1, 4, 5], cuts=(((0, 2),), ((3, 5),), ((6, 8),), ((1, 2), (4, 5)))),
    _("beam", **WINDOWS, **GROUPS, mlp_layer_types=SPARSE, cuts=(((7, 8),), ((5, 8),), ((4, 8),))),
    _("biogpt"),
    _("bitnet"),
    _("bloom", n_head=4),
    _("codegen", n_ctx=128, rotary_dim=4),
    _("cohere"),
    _("cohere2", **WINDOWS),
    _("cohere2_moe", **WINDOWS, mlp_layer_types=SPARSE),
    _(
        "cohere_compass_text",
        **WINDOWS,
        rope_parameters={k: {"rope_type": "default", "rope_theta": 10000.0} for k in (SLIDING, FULL)},
    ),
    _("ctrl", dff=48),
    _("cwm", **WINDOWS),
    _(
        "dbrx",
        tying=False,
        d_model=32,
        n_heads=4,
        n_layers=8,
        max_seq_len=128,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        transformers="4",
    ),
    _(
        "dbrx",
        tying=False,
        d_model=32,
        n_heads=4,
        n_layers=8,
        max_seq_len=128,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        transformers="5",
    ),
    _("deepseek_v2", **MLA, **GROUPS, first_k_dense_replace=4),
    _("deepseek_v3", **MLA, **GROUPS, first_k_dense_replace=4),
    _("deepseek_v32", **MLA, **INDEXER, **GROUPS, mlp_layer_types=SPARSE),
    _("deepseek_v4", plantable=False, **MLA, **INDEXER),
    _("diffllama", cuts=(((7, 8),), ((5, 8),), ((4, 8),))),
    _("doge"),
    _("dots1", **WINDOWS, **GROUPS, first_k_dense_replace=4, max_window_layers=3),
    _("ernie4_5"),
    _(
        "ernie4_5_moe",
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=1,
        moe_layer_end_index=6,
        moe_layer_interval=2,
    ),
    _("exaone4", **WINDOWS),
    _("exaone_moe", **WINDOWS, **GROUPS, mlp_layer_types=SPARSE),
    _("falcon"),
    _("falcon_h1", **MAMBA2, mamba_d_ssm=64),
    _("falcon_mamba", state_size=4, time_step_rank=2),
    _("flex_olmo"),
    _("flint", **WINDOWS, mlp_only_layers=[0, 3], decoder_sparse_step=2),
    _("gemma"),
    _("gemma2", **WINDOWS),
    _("gemma3_text", **WINDOWS),
    _(
        "gemma3",
        tying=False,
        **WINDOWS,
        outer={
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 8,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    _(
        "gemma4_text",
        **WINDOWS,
        hidden_size_per_layer_input=0,
        global_head_dim=16,
        cuts=(((0, 2),), ((3, 5),), ((5, 7),), ((1, 2), (4, 6))),
    ),
    _(
        "gemma4_unified_text",
        **WINDOWS,
        global_head_dim=16,
        num_kv_shared_layers=3,
        variant="shared_kv",
        cuts=(((0, 2),), ((2, 3),), ((5, 6),), ((0, 2), (5, 7))),
    ),
    _("gemma4_unified_text", **WINDOWS, global_head_dim=16, cuts=(((0, 2),), ((3, 5),), ((5, 7),), ((1, 2), (4, 6)))),
    _("glm", pad_token_id=0),
    _("glm4"),
    _("glm4_moe", **GROUPS, first_k_dense_replace=4),
    _("glm4_moe_lite", **MLA, **GROUPS, mlp_layer_types=SPARSE),
    _(
        "glm_moe_dsa",
        **MLA,
        **INDEXER,
        **GROUPS,
        mlp_layer_types=SPARSE,
        indexer_types=["full", "full", "shared", "full", "shared", "shared", "full", "shared"],
        cuts=(((1, 3),), ((3, 6),), ((6, 8),), ((1, 3), (6, 8))),
    ),
    _("gpt2"),
    _(
        "gpt2",
        variant="inverse_index",
        scale_attn_by_inverse_layer_idx=True,
        cuts=(((7, 8),), ((5, 8),), ((4, 8),)),
    ),
    _("gpt_bigcode"),
    _(
        "gpt_neo",
        num_layers=8,
        attention_types=[[["global", "local", "local"], 2], [["local", "global"], 1]],
        window_size=6,
    ),
    _("gpt_neox"),
    _("gpt_neox_japanese", cuts=(((0, 2),), ((3, 5),), ((5, 7),), ((1, 2), (4, 6)))),
    _("gpt_oss", **WINDOWS),
    _("gptj", rotary_dim=4),
    _("granite"),
    _("granite_swa", **WINDOWS),
    _("granitemoe"),
    _("granitemoe_swa", **WINDOWS),
    _(
        "granitemoehybrid",
        **MAMBA2,
        layer_types=["mamba", "attention", "mamba", "mamba", "attention", "mamba", "attention", "mamba"],
        transformers="4",
    ),
    _(
        "granitemoehybrid",
        **MAMBA2,
        layer_types=[LINEAR, FULL, LINEAR, LINEAR, FULL, LINEAR, FULL, LINEAR],
        transformers="5",
    ),
    _("granitemoeshared"),
    _("helium"),
    _("hunyuan_v1_dense"),
    _("hunyuan_v1_moe"),
    _("hy_v3", mlp_layer_types=SPARSE),
    _("hy_v4", **MLA, **INDEXER, mlp_layer_types=SPARSE, cuts=(((2, 4),), ((5, 8),), ((6, 8),), ((2, 3), (5, 8)))),
    _("hyperclovax"),
    _(
        "inkling_text",
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        sliding_window_size=6,
        rel_extent=16,
        layer_types=[
            "hybrid_sliding",
            "hybrid",
            "hybrid_sliding",
            "hybrid_sliding",
            "hybrid",
            "hybrid_sliding",
            "hybrid",
            "hybrid",
        ],
        mlp_layer_types=SPARSE,
        tying=False,
    ),
    _("internlm3"),
    _("iquestcoder"),
    _("jais2"),
    _(
        "jamba",
        **MAMBA1,
        attn_layer_period=4,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        cuts=(((0, 4),), ((2, 6),), ((6, 8),), ((0, 2), (6, 8))),
    ),
    _("jetmoe"),
    _(
        "kimi_linear",
        tying=False,
        **MLA,
        **GROUPS,
        linear_head_dim=8,
        linear_num_heads=4,
        layer_types=[LINEAR, FULL, LINEAR, LINEAR, FULL, LINEAR, FULL, FULL],
        mlp_layer_types=SPARSE,
    ),
    _("kolibri1"),
    _("laguna", **WINDOWS, mlp_layer_types=SPARSE),
    _("lfm2", layer_types=["conv", "conv", FULL, "conv", FULL, "conv", "conv", FULL]),
    _("lfm2_moe", layer_types=["conv", "conv", FULL, "conv", FULL, "conv", "conv", FULL], num_dense_layers=4),
    _("lfm3"),
    _("llama"),
    _(
        "llama4_text",
        layer_types=[
            "chunked_attention",
            FULL,
            "chunked_attention",
            "chunked_attention",
            FULL,
            "chunked_attention",
            FULL,
            FULL,
        ],
        no_rope_layers=[1, 0, 1, 1, 0, 1, 0, 0],
        moe_layers=[1, 2, 5],
        intermediate_size_mlp=40,
        attention_chunk_size=6,
    ),
    _(
        "longcat_flash",
        plantable=False,
        **MLA,
        num_layers=8,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        moe_topk=2,
        zero_expert_num=2,
    ),
    _("mamba", state_size=4, time_step_rank=2),
    _("mamba2", transformers="5", num_heads=8, head_dim=8, n_groups=1, state_size=4, chunk_size=8),
    _("mamba2", transformers="4", tying=False, num_heads=8, head_dim=8, n_groups=1, state_size=4, chunk_size=8),
    _("mellum", **WINDOWS, mlp_layer_types=SPARSE),
    _("mimo_v2_flash", **WINDOWS, mlp_layer_types=SPARSE),
    _("minicpm3", **MLA, cuts=(((0, 2),), ((3, 5),), ((6, 8),), ((1, 2), (4, 5)))),
    _("minimax_m2"),
    _(
        "minimax_m3_vl_text",
        mlp_layer_types=SPARSE,
        dense_intermediate_size=48,
        shared_intermediate_size=16,
        rotary_dim=4,
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=2,
    ),
    _("ministral", **WINDOWS),
    _("ministral3"),
    _("mistral", sliding_window=6),
    _("mixtral", sliding_window=6),
    _(
        "modernbert-decoder",
        **WINDOWS,
        local_attention=12,
        transformers="5",
        cuts=(((1, 3),), ((3, 5),), ((6, 8),), ((1, 2), (4, 6))),
    ),
    _(
        "modernbert-decoder",
        layer_types=WINDOWS["layer_types"],
        transformers="4",
        cuts=(((1, 3),), ((3, 5),), ((6, 8),), ((1, 2), (4, 6))),
    ),
    _("moshi", tying=False, ffn_dim=96),
    _("mpt"),
    _("nanochat"),
    _("nemotron"),
    _(
        "nemotron_h",
        tying=False,
        layers_block_type=[LINEAR, "moe", FULL, "mlp", LINEAR, FULL, "moe", LINEAR],
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=4,
        chunk_size=8,
        moe_shared_expert_intermediate_size=16,
    ),
    _("olmo"),
    _("olmo2"),
    _("olmo3", **WINDOWS),
    _("olmo_hybrid", layer_types=[LINEAR, FULL, LINEAR, LINEAR, FULL, LINEAR, FULL, FULL]),
    _("olmoe"),
    _("openai-gpt", plantable=False),
    _("opt", ffn_dim=48, word_embed_proj_dim=32),
    _("persimmon"),
    _("phi"),
    _("phi3", sliding_window=6),
    _("phimoe", sliding_window=6),
    _("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=4),
    _(
        "qwen2_moe",
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=4,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
    _("qwen3", use_sliding_window=True, sliding_window=6, max_window_layers=4),
    _("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3]),
    _(
        "qwen3_next",
        **GATED_DELTA,
        layer_types=[LINEAR, FULL, LINEAR, LINEAR, FULL, LINEAR, FULL, FULL],
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
    _("qwen3_5_text", **GATED_DELTA, layer_types=[LINEAR, FULL, LINEAR, LINEAR, FULL, LINEAR, FULL, FULL]),
    _("qwen3_5_moe_text", **GATED_DELTA, layer_types=[LINEAR, FULL, LINEAR, LINEAR, FULL, LINEAR, FULL, FULL]),
    _(
        "qwen4_exp_text",
        **GATED_DELTA,
        layer_types=[
            LINEAR,
            "indexed_attention",
            LINEAR,
            LINEAR,
            "indexed_attention",
            LINEAR,
            "indexed_attention",
            "indexed_attention",
        ],
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
        hc_lowrank=8,
    ),
    _(
        "recurrent_gemma",
        transformers="5",
        block_types=["recurrent", "attention", "recurrent"],
        attention_window_size=6,
        lru_width=32,
    ),
    _("seed_oss"),
    _(
        "smollm3",
        no_rope_layers=[1, 0, 1, 1, 0, 1, 0, 0],
        use_sliding_window=True,
        sliding_window=6,
        layer_types=WINDOWS["layer_types"],
    ),
    _("solar_open", **GROUPS),
    _("stablelm"),
    _("starcoder2", sliding_window=6),
    _("vaultgemma", **WINDOWS),
    _("xglm", d_model=32, attention_heads=4, ffn_dim=48, num_layers=8),
    _("xlstm", transformers="5", tying=False),
    _("youtu", **MLA, pad_token_id=None),
    _("zamba", **MAMBA1, cuts=(((0, 2),), ((3, 5),), ((5, 7),), ((0, 1), (4, 6)))),
)


ZOO = tuple(
    tiny
    for tiny in ALL
    if tiny.model_type in CONFIG_MAPPING and tiny.transformers in ("", transformers_version.partition(".")[0])
)
"""Those that the installed transformers has."""


def _takes(config, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        return hasattr(config, name)
    except Exception:  # a setting that varies from layer to layer cannot be read
        return True


def zoo_config(tiny: TinyType, **overrides: Any):
    """The configuration of a small model; `overrides` win."""
    cls = CONFIG_MAPPING[tiny.model_type]
    default = cls()
    inner = default.get_text_config(decoder=True)
    known = {k: v for k, v in COMMON.items() if _takes(inner, k)}
    settings = {**known, **tiny.settings, **overrides}
    if inner is default:
        return cls(**settings)
    return cls(**{"text_config": settings, **tiny.outer})


def zoo_model(tiny: TinyType, seed: int = 0, **overrides: Any):
    """A random model in evaluation mode whose outputs are far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(zoo_config(tiny, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv" not in name:
                parameter.normal_(0, 0.2)
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(torch.rand_like(parameter), alpha=0.5)
    return model
