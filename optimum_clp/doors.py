"""What can be chosen by name, or added by another installed package: a registry for each kind, a line for each name.

How another package adds one is in `CONTRIBUTING.md`.
"""

import importlib
from typing import Any

from .registry import Registry

# `search.strategy`: a `Strategy` of `search.problem`
STRATEGIES = Registry("strategy", "optimum_clp.strategies")
STRATEGIES.register(
    "auto",
    "optimum_clp.search.strategies:auto_search",
    says="whichever of gate, exhaustive and halving is best for the model's depth",
)
STRATEGIES.register(
    "gate", "optimum_clp.search.strategies:by_gate", says="gradient descent on the concave gate's position"
)
STRATEGIES.register("exhaustive", "optimum_clp.search.enumeration:exhaustive_search", says="every cut on every row")
STRATEGIES.register("halving", "optimum_clp.search.enumeration:halving_search", says="a race of every cut")
STRATEGIES.register(
    "block_influence",
    "optimum_clp.search.importance:block_influence",
    says="the layers that turn the hidden states least (ShortGPT)",
)
STRATEGIES.register(
    "angular",
    "optimum_clp.search.importance:angular",
    says="the segment over which hidden states turn least, by angle",
)
STRATEGIES.register(
    "cosine_block",
    "optimum_clp.search.importance:cosine_block",
    says="the segment over which hidden states turn least, by cosine (LLM-Streamline)",
)
STRATEGIES.register(
    "taylor",
    "optimum_clp.search.importance:taylor",
    says="first-order Taylor importance of the weights (LLM-Pruner, Shortened LLaMA)",
)
STRATEGIES.register(
    "perplexity_greedy",
    "optimum_clp.search.importance:perplexity_greedy",
    says="one layer after the other, by perplexity (SLEB)",
)
STRATEGIES.register("tail", "optimum_clp.search.importance:tail", says="the last layers")
STRATEGIES.register("random", "optimum_clp.search.importance:random", says="layers drawn by the seed")

# `tuning.loss`: a `Loss` of `tuning.losses`
LOSSES = Registry("loss", "optimum_clp.losses")
LOSSES.register("kd", "optimum_clp.tuning.losses:Distillation", says="KL to the dense model's logits")
LOSSES.register(
    "jsd",
    "optimum_clp.tuning.losses:JensenShannon",
    says="Jensen-Shannon divergence to the dense model's likely tokens",
)
LOSSES.register("ce", "optimum_clp.tuning.losses:CrossEntropy", says="next-token cross-entropy")
LOSSES.register(
    "hidden",
    "optimum_clp.tuning.losses:HiddenStates",
    says="the dense model's hidden states behind each trained layer",
)

# `tuning.init`: a `Start` of `tuning.starts`
STARTS = Registry("start", "optimum_clp.starts")
STARTS.register("none", "optimum_clp.tuning.starts:AsCut", says="the cut as it is")
STARTS.register("fold", "optimum_clp.tuning.starts:Fold", says="a linear map folded into each output projection")
STARTS.register("least_squares", "optimum_clp.tuning.starts:LeastSquares", says="the output projections refitted")

# `quantization.method`: a `RoundingMethod` of `exporters.rounding.method`
ROUNDINGS = Registry("rounding method", "optimum_clp.roundings")
ROUNDINGS.register("auto", "optimum_clp.exporters.rounding.auto:Auto", says="gptq where there is text, else rtn")
ROUNDINGS.register("rtn", "optimum_clp.exporters.rounding.nearest:ToNearest", says="to nearest")
ROUNDINGS.register(
    "hqq", "optimum_clp.exporters.rounding.half_quadratic:HalfQuadratic", says="a fitted zero point for each group"
)
ROUNDINGS.register("gptq", "optimum_clp.exporters.rounding.gptq:Gptq", says="error feedback on calibration text")
ROUNDINGS.register("quanto", "optimum_clp.exporters.rounding.quanto:Quanto", says="optimum-quanto's own integers")

# what is written beside the ONNX files: a `Runtime` of `exporters.runtimes.runtime`
RUNTIMES = Registry("runtime", "optimum_clp.runtimes")
RUNTIMES.register("genai", "optimum_clp.exporters.runtimes.genai:Genai", says="onnxruntime-genai")
RUNTIMES.register(
    "transformers_js", "optimum_clp.exporters.runtimes.transformers_js:TransformersJs", says="transformers.js"
)

# model types beyond those of `architecture.table`: an `Architecture` of that module
ARCHITECTURES = Registry("architecture", "optimum_clp.architectures")


def report_schema() -> dict[str, Any]:
    """The JSON schema of `clp_report.json`, from the dataclasses of the stages, which all stand above the report."""
    return importlib.import_module("optimum_clp.report_schema").report_schema()


def load_chosen(config: Any) -> None:
    """Import what a recipe names, so that a package that cannot be imported is told of before any work.

    Args:
        config ([`CLPConfig`]): Whose names are valid.

    Raises:
        ConfigurationError: If another package adds one of the names and cannot be imported.
    """
    STRATEGIES.get(config.search.strategy)
    if config.tuning.enabled:
        STARTS.get(config.tuning.init)
        for name in config.tuning.loss_weights():
            LOSSES.get(name)
    if config.export.enabled and config.quantization.weights:
        ROUNDINGS.get(config.quantization.method)
