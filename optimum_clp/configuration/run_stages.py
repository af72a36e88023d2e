"""The stages of a whole run, as they are told while it works."""

from .clp_config import CLPConfig


def stages_of_run(config: CLPConfig, writes: bool) -> dict[str, str]:
    """The stages of a run by this recipe, in their order, and what each is for.

    Args:
        config ([`CLPConfig`]): The recipe.
        writes (`bool`): A folder is written.
    """
    export, quanto = config.export.enabled, config.quantization.quanto
    found = {
        "search": "which layers can go",
        "tuning": "the layers next to the cut learn to make up for it" if config.tuning.enabled else "",
        "checkpoint": "the smaller model is saved, read back and compared" if writes else "",
        "quanto": "checkpoints of integers for optimum-quanto" if writes and quanto else "",
        "ONNX files": "exported, rounded and compared with PyTorch" if writes and export else "",
        "figures": "what the models and files say, how fast, in how much memory" if writes else "",
        "records": "report, page and model card" if writes else "",
    }
    return {name: purpose for name, purpose in found.items() if purpose}
