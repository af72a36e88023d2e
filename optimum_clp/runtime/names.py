"""Names in an exported file that those who run it need too."""

# metadata of a file whose attention is ONNX Runtime's: several tokens after a past only in batches of one row, and the
# tensors of the cache may have room behind the past, which the present is then written into if it is the same memory
FUSED_ATTENTION = "optimum_clp.attention"
# metadata of a file with standard operators: `accuracy_level` of the MatMulNBits that ONNX Runtime makes of them
ACCURACY_LEVEL = "optimum_clp.accuracy_level"
# the session's entry for it
ACCURACY_LEVEL_ENTRY = "session.qdq_matmulnbits_accuracy_level"
# input with a default: how many positions of a text get logits, the last ones; 0 for all. transformers.js has the name
LOGITS_TO_KEEP = "num_logits_to_keep"
# ONNX Runtime's names for what a cache may be stored in, and numpy's
CACHE_KINDS = {"tensor(float)": "float32", "tensor(float16)": "float16"}


def cache_names(prefix: str, num_layers: int) -> list[str]:
    """Names of the cache's tensors in the graph's order: `{prefix}.0.key`, `{prefix}.0.value`, `{prefix}.1.key`, ..."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]
