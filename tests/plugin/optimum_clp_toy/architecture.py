"""A model type, with the classes that transformers has not; importing this module tells transformers of them."""

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_clp.architecture.table import Architecture


class ToyLlamaConfig(LlamaConfig):
    """A LLaMA's."""

    model_type = "toy_llama"


class ToyLlamaForCausalLM(LlamaForCausalLM):
    """A LLaMA by another name."""

    config_class = ToyLlamaConfig


AutoConfig.register("toy_llama", ToyLlamaConfig)
AutoModelForCausalLM.register(ToyLlamaConfig, ToyLlamaForCausalLM)
ROW = Architecture("toy_llama")
