"""Running an exported file: transformers' own `generate()` over ONNX Runtime."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..argument_types import check_arguments
from ..errors import ConfigurationError, ModelError
from ..model_files import CONFIG, GENERATION_CONFIG, read_model_file
from .cache import (
    LAYER_TYPES,
    LEAST_ROOM,
    NUMPY,
    TOKEN_INPUTS,
    LayerWithRoom,
    Room,
    cache_dtype,
    cache_layer,
    have_room,
    past_shapes,
    shared_tensor,
)
from .folder import check_files, exported_folder
from .names import FUSED_ATTENTION, LOGITS_TO_KEEP
from .session import chooses_positions, open_session, quiet_options
from .tokens import check_mask, check_positions, check_tokens, position_limit, vocabulary_size

_CACHE_FIELD = next(
    name for name in ("cache", "past_key_values") if name in {f.name for f in fields(CausalLMOutputWithPast)}
)
"""What transformers' outputs call their cache, which `generate()` reads: `past_key_values` before 5.24."""


class OnnxCausalLM(GenerationMixin):
    """A causal LM in an ONNX file, called like the PyTorch model.

    `generate()` is transformers' own: greedy, sampling, beam search, left-padded batches and streamers work as with a
    PyTorch model. The key-value cache is a [`~transformers.DynamicCache`]. With a file whose attention is fused its tensors
    are views of memory with room for more tokens, which ONNX Runtime writes into; otherwise they are ONNX Runtime's
    outputs, handed over without a copy, and each step makes a new one.

    Args:
        session (`onnxruntime.InferenceSession`): Over a file with this package's input and output names.
        config ([`~transformers.PretrainedConfig`]): The model's configuration.
        generation_config ([`~transformers.GenerationConfig`], *optional*): Made from `config` if not given.

    Raises:
        ModelError: If the session's inputs or outputs are not those of an exported causal LM.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    dtype = torch.float32
    device = torch.device("cpu")
    _is_stateful = False
    _supports_cache_class = True

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        config: PretrainedConfig,
        generation_config: GenerationConfig | None = None,
    ):
        self.session = session
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self._vocabulary, self._positions = vocabulary_size(config), position_limit(config)
        # (heads, head size) of keys and values, layer by layer
        self._past_shapes = past_shapes(session)
        self._past_names = list(self._past_shapes)
        self._cache_dtype = cache_dtype(session)
        self._token_inputs = {value.name for value in session.get_inputs()}.intersection(TOKEN_INPUTS)
        self._present_names = [name.replace("past_key_values", "present") for name in self._past_names]
        self._is_fused = FUSED_ATTENTION in session.get_modelmeta().custom_metadata_map
        self._chooses_positions = chooses_positions(session)
        width = next(value.shape[-1] for value in session.get_outputs() if value.name == "logits")
        self._width = width if isinstance(width, int) else None
        # on another device ONNX Runtime would copy the tensors there and back
        self._appends_in_place = self._is_fused and session.get_providers()[0] == "CPUExecutionProvider"
        self._single_inputs = [
            name for name in TOKEN_INPUTS if name in self._token_inputs and name != "attention_mask"
        ]
        self._single_inputs += [LOGITS_TO_KEEP] if self._chooses_positions else []
        self._counts = {count: torch.tensor(count) for count in (0, 1)}

    @classmethod
    @check_arguments
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        file_name: str = "onnx/model.onnx",
        *,
        num_threads: int | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
        providers: Sequence[Any] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> "OnnxCausalLM":
        """Load a file from a folder with `config.json`.

        Args:
            folder (`str` or `os.PathLike`): Folder with `config.json` and, if there is one, `generation_config.json`; or a Hub
                id, of which these and the one file are fetched.
            file_name (`str`): The ONNX file, relative to `folder`: `"onnx/model.onnx"`,
                `"onnx/model_quantized.onnx"`, `"onnx/model_q4.onnx"`, ...
            num_threads (`int`, *optional*): Threads inside an operator, at least 1; by default one for each core.
            session_options (`onnxruntime.SessionOptions`, *optional*): Used as they are, instead of `num_threads`, and
                also instead of the accuracy level of a file of `export.format="qdq"`.
            providers (`Sequence`, *optional*): Execution providers that this installation has; by default the CPU's.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            token (`str` or `bool`, *optional*): For private or gated repositories.
            cache_dir (`str` or `os.PathLike`, *optional*): Where files of the Hub are kept; by default its own cache.

        Returns:
            [`OnnxCausalLM`]

        Raises:
            ModelError: If the file or `config.json` is missing or not in the folder, or the file cannot be loaded or is of
                another kind.
            ConfigurationError: If `num_threads` is below 1, or is given beside `session_options`; if there is no such provider.
        """
        _check_providers(providers)
        folder = exported_folder(folder, file_name, revision, token, cache_dir)
        file = folder / file_name
        check_files(folder, file)
        config, generation_config = _settings(folder)
        options = _session_options(num_threads, session_options)
        try:
            session = open_session(
                file, options, providers or ["CPUExecutionProvider"], as_exported=session_options is None
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ModelError.of(
                "file_name",
                str(file),
                f"ONNX Runtime {onnxruntime.__version__} cannot load it ({_first_line(error)})",
                "Export it again, or update onnxruntime",
            ) from error
        return cls(session, config, generation_config)

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: None = None,
        cache_position: Tensor | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        cache: DynamicCache | None = None,
        tokenizer: Any = None,
        assistant_tokenizer: Any = None,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids (`Tensor` of shape `[batch, length]`): The new tokens, length at least 1.
            attention_mask (`Tensor` of shape `[batch, past + length]`, *optional*): 0 on padding, 1 elsewhere, the
                cached tokens included; all 1 by default.
            position_ids (`Tensor` of shape `[batch, length]`, *optional*): By default counted along the mask; not used
                by a file that has no such input.
            past_key_values ([`~transformers.DynamicCache`], *optional*): Cache of the tokens so far, extended in place.
            use_cache (`bool`, *optional*): Return a cache; by default as the configuration says, and always if one is
                given.
            logits_to_keep (`int`): Positions that get logits, the last ones, at least 0; 0 for all. `generate()` asks for
                1, which saves most of the head's work on a prompt.
            cache ([`~transformers.DynamicCache`], *optional*): `past_key_values` under its name since transformers 5.24.
            inputs_embeds (`None`): As the next ones, what `generate()` passes on. The file takes no embeddings.
            cache_position: Not looked at.
            return_dict: Not looked at.
            output_attentions: The file gives none.
            output_hidden_states: The file gives none.
            tokenizer: Not looked at.
            assistant_tokenizer: Not looked at.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: `logits` of shape
            `[batch, min(length, logits_to_keep) or length, vocabulary]`, float32 on the CPU, and the cache, as
            `cache` or, before transformers 5.24, as `past_key_values`.

        Raises:
            ModelError: If a token is not in the vocabulary or a position not in the context, the mask does not fit, the cache is of another kind or given under both names, or something is
                asked for that the file does not have.
        """
        _refuse(
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        _check_logits_to_keep(logits_to_keep)
        cache = self._cache(past_key_values, cache)
        past_length = 0 if cache is None else cache.get_seq_length()
        if (
            isinstance(input_ids, Tensor)
            and input_ids.shape == (1, 1)
            and (logits := self._next(input_ids, attention_mask, position_ids, cache)) is not None
        ):
            step: dict[str, Any] = {_CACHE_FIELD: cache}
            return CausalLMOutputWithPast(logits=logits, **step)
        check_tokens(input_ids, self._vocabulary)
        batch, length = input_ids.shape
        mask = _full_mask(attention_mask, batch, past_length + length)
        if position_ids is None:
            position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past_length:]
        if "position_ids" in self._token_inputs:
            check_positions(position_ids, self._positions)
        tokens = (input_ids, mask, position_ids.expand(batch, -1))
        if use_cache is None:
            use_cache = cache is not None or bool(getattr(self.config, "use_cache", True))
        if self._is_fused and batch > 1 and length > 1 and past_length > 0:
            logits, cache = self._token_by_token(tokens, cache, past_length, use_cache)
        else:
            logits, cache = self._whole(tokens, cache, past_length, use_cache, logits_to_keep)
        named: dict[str, Any] = {_CACHE_FIELD: cache}
        # a no-op where the file has chosen
        return CausalLMOutputWithPast(logits=logits[:, -logits_to_keep:], **named)

    def _next(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: DynamicCache | None
    ) -> Tensor | None:
        """The logits of one token of one row behind a past with room, which is every step of `generate()` but the first; `None`
        where something about it is out of the ordinary, or wrong: it then goes the long way, and is told there.

        The weights fill the processor's caches at each step, so that whatever Python touches besides costs several times its share.
        """
        if cache is None or not self._appends_in_place or self._width is None or input_ids.dtype != torch.long:
            return None
        layers: Sequence[Any] = cache.layers
        length = cache.get_seq_length()
        if length == 0 or not have_room(layers, length, 1):
            return None
        if mask is not None and (
            mask.dtype != torch.long or mask.shape != (1, length + 1) or not mask.is_contiguous()
        ):
            return None
        token, position = int(input_ids), length
        if position_ids is not None:
            if position_ids.dtype != torch.long or position_ids.numel() != 1:
                return None
            position = int(position_ids)
        elif mask is not None:
            return None
        if not (0 <= token < (self._vocabulary or 0) and 0 <= position < (self._positions or position + 1)):
            return None
        room: Room = layers[0].room
        room.written = length  # of a cache that was cropped
        logits = room.step(self.session, self._single_inputs, token, position, mask, self._width)
        for layer in layers:
            layer.length = length + 1
        return logits

    def _whole(
        self,
        tokens: tuple[Tensor, Tensor, Tensor],
        cache: DynamicCache | None,
        past_length: int,
        use_cache: bool,
        logits_to_keep: int,
    ) -> tuple[Tensor, DynamicCache | None]:
        """All tokens in one run of the session: logits, and the cache with them if it is asked for."""
        batch, length = tokens[0].shape
        layers: Sequence[DynamicLayer]
        feeds = {
            name: tensor.to("cpu", torch.long).contiguous()
            for name, tensor in zip(TOKEN_INPUTS, tokens, strict=True)
            if name in self._token_inputs
        }
        if self._chooses_positions:
            count = self._counts.get(logits_to_keep)
            feeds[LOGITS_TO_KEEP] = torch.tensor(logits_to_keep) if count is None else count
        if use_cache and self._appends_in_place:
            with_room = self._layers_with_room(cache, batch, past_length, length)
            positions = min(length, logits_to_keep or length) if self._chooses_positions else length
            logits = self._run_in_place(feeds, with_room, positions, past_length + length)
            layers = with_room
        else:
            feeds |= self._past(cache, batch, past_length)
            logits, *present = self._run(feeds, ["logits", *(self._present_names if use_cache else [])])
            layers = [cache_layer(*present[i : i + 2]) for i in range(0, len(present), 2)]
        if not use_cache:
            return logits, None
        cache = DynamicCache() if cache is None else cache
        if cache.layers != layers:
            cache.layers[:] = layers
        return logits, cache

    def _run_in_place(
        self, feeds: dict[str, Tensor], layers: Sequence[LayerWithRoom], positions: int, length: int
    ) -> Tensor:
        """Logits, while keys and values are written behind the past; the cache then has `length` tokens."""
        room = layers[0].room
        binding = room.binding(self.session)
        for name, tensor in feeds.items():
            binding.bind_input(name, "cpu", 0, NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        if self._width is None:
            binding.bind_output("logits", "cpu")
            self.session.run_with_iobinding(binding)
            logits = shared_tensor(binding.get_outputs()[-1])
        else:
            # each call's own: the caller may keep them
            logits = torch.empty(room.batch, positions, self._width, dtype=torch.float32, device="cpu")
            binding.bind_output("logits", "cpu", 0, NUMPY[logits.dtype], tuple(logits.shape), logits.data_ptr())
            self.session.run_with_iobinding(binding)
        room.written = length
        for layer in layers:
            layer.length = length
        return logits

    def _token_by_token(
        self, tokens: tuple[Tensor, Tensor, Tensor], cache: Any, past_length: int, use_cache: bool
    ) -> tuple[Tensor, DynamicCache | None]:
        """ONNX Runtime's attention takes several tokens after a past in batches of one row only."""
        input_ids, mask, position_ids = tokens
        pieces = list[Tensor]()
        if not use_cache:
            # the caller's cache is not to be extended
            layers, cache = cache.layers, DynamicCache()
            cache.layers[:] = [cache_layer(layer.keys, layer.values) for layer in layers]
        for index in range(input_ids.shape[1]):
            past, one = past_length + index, slice(index, index + 1)
            token = (input_ids[:, one], mask[:, : past + 1], position_ids[:, one])
            logits, cache = self._whole(token, cache, past, use_cache=True, logits_to_keep=0)
            pieces.append(logits)
        return torch.cat(pieces, 1), cache if use_cache else None

    def can_generate(self) -> bool:
        """`True`; asked by transformers."""
        return True

    def is_remote_code(self) -> bool:
        """`False`; asked by transformers."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Empty; asked by transformers, which switches the kernels of mixture-of-experts models."""
        return {}

    def _cache(self, past_key_values: Any, cache: Any) -> DynamicCache | None:
        """The cache that was given, under either name."""
        name = "cache" if past_key_values is None else "past_key_values"
        if past_key_values is not None and cache is not None:
            raise ModelError.of(
                "cache", type(cache).__name__, "past_key_values is given too, and is the same", "Give one of them"
            )
        cache = cache if past_key_values is None else past_key_values
        plain = cache is None or (
            isinstance(cache, DynamicCache)
            # a sliding layer is fine while it is empty: generate() makes such a cache from the configuration
            and (cache.get_seq_length() == 0 or all(type(layer) in LAYER_TYPES for layer in cache.layers))
        )
        if not plain:
            raise ModelError.of(
                name,
                type(cache).__name__,
                "ONNX Runtime takes the whole past of each layer, as a plain DynamicCache() holds it",
                "Pass the cache of an earlier output, or none, and no cache_implementation",
            )
        return cache

    def _past(self, cache: DynamicCache | None, batch: int, past_length: int) -> dict[str, Tensor]:
        if cache is None or past_length == 0:
            return {
                name: torch.empty(batch, heads, 0, size, dtype=self._cache_dtype)
                for name, (heads, size) in self._past_shapes.items()
            }
        states: list[Any] = []
        for layer in cache.layers:
            assert isinstance(layer, DynamicLayer)
            states += [layer.keys, layer.values]
        return {
            name: tensor.to(self._cache_dtype).contiguous()
            for name, tensor in zip(self._past_names, states, strict=True)
        }

    def _layers_with_room(
        self, cache: DynamicCache | None, batch: int, past_length: int, length: int
    ) -> list[LayerWithRoom]:
        """The cache's layers, with memory behind the past that nothing else has written to; moved where there is none."""
        old: list[Any] = [] if cache is None or past_length == 0 else cache.layers
        if have_room(old, past_length, length):
            return old
        # some growth at each move: a token costs a constant number of copies, however long the text gets
        size = past_length + length + max(LEAST_ROOM, past_length // 4)
        past = {
            name: torch.empty(batch, heads, size, width, dtype=self._cache_dtype)
            for name, (heads, width) in self._past_shapes.items()
        }
        if old:
            for name, states in self._past(cache, batch, past_length).items():
                past[name][:, :, :past_length] = states
        return Room(past, self._present_names).layers()

    def _run(self, feeds: dict[str, Tensor], outputs: list[str]) -> list[Tensor]:
        """Run the session on the tensors' own memory, and take its outputs' memory over."""
        binding = self.session.io_binding()
        for name, tensor in feeds.items():
            binding.bind_input(name, "cpu", 0, NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for name in outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        return [shared_tensor(value) for value in binding.get_outputs()]


def _check_logits_to_keep(logits_to_keep: Any) -> None:
    if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ModelError.of(
            "logits_to_keep",
            logits_to_keep,
            "it must be a number of positions, the last ones, at least 0",
            "Give 0 for the logits of all positions, and choose among them",
        )


def _full_mask(mask: Tensor | None, batch: int, length: int) -> Tensor:
    """The mask that was given, if it covers cached and new tokens, or one of ones."""
    if mask is None:
        return torch.ones(batch, length, dtype=torch.long)
    check_mask(mask)
    if mask.shape != (batch, length):
        raise ModelError.of(
            "attention_mask",
            tuple(mask.shape),
            f"its shape must be {(batch, length)}: rows, cached tokens + new tokens",
            "Extend the mask by one column for each new token",
        )
    return mask


def _settings(folder: Path) -> tuple[PretrainedConfig, GenerationConfig | None]:
    """The folder's `config.json` and, if there is one, `generation_config.json`."""
    read_model_file(folder / CONFIG, folder)
    has_settings = (folder / GENERATION_CONFIG).is_file()
    if has_settings:
        read_model_file(folder / GENERATION_CONFIG, folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        return config, GenerationConfig.from_pretrained(folder) if has_settings else None
    except Exception as error:  # whatever a class of transformers makes of values that it does not expect
        raise ModelError.of(CONFIG, str(folder), _first_line(error), "Restore the model's config.json") from error


def _check_providers(providers: Sequence[Any] | None) -> None:
    """ONNX Runtime falls back to the CPU without an error where there is no such provider."""
    there = onnxruntime.get_available_providers()
    for provider in providers or ():
        name = provider[0] if isinstance(provider, tuple) and provider else provider
        if name not in there:
            rule = f"this installation of ONNX Runtime has {', '.join(there)}"
            raise ConfigurationError.of(
                "providers", provider, rule, "Choose among these, or install another onnxruntime"
            )


def _session_options(
    num_threads: int | None, session_options: onnxruntime.SessionOptions | None
) -> onnxruntime.SessionOptions:
    if num_threads is not None and (session_options is not None or num_threads < 1):
        raise ConfigurationError.of(
            "num_threads",
            num_threads,
            "it must be at least 1, and cannot be given beside session_options",
            "Give one of them; session_options.intra_op_num_threads is the same setting",
        )
    if session_options is not None:
        return session_options
    return quiet_options(num_threads or 0)


def _refuse(**asked: Any) -> None:
    for name, value in asked.items():
        if value is not None and value is not False:
            rule = "the ONNX file takes token ids, and gives logits and the cache only"
            shown = value if isinstance(value, bool) else type(value).__name__
            raise ModelError.of(name, shown, rule, "Use the PyTorch model for this")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
