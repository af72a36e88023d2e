"""Opening an exported file in ONNX Runtime."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from .in_place import model_in_place
from .names import ACCURACY_LEVEL, ACCURACY_LEVEL_ENTRY, LOGITS_TO_KEEP

# what a session takes that is not told
_DEFAULT_LEVEL = "4"
_NO_PACKING = "session.disable_prepacking"
_FOLDER = "session.model_external_initializers_file_folder_path"


def quiet_options(num_threads: int = 0) -> onnxruntime.SessionOptions:
    """Options that tell errors only: ONNX Runtime warns of every input with a default, and of every shorter output.

    Args:
        num_threads (`int`): Threads inside an operator; 0 for one per core.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    return options


def in_place_options() -> onnxruntime.SessionOptions:
    """Options that leave weights where they lie, mapped into memory: nothing is packed anew.

    Products are slower, and a quantized file multiplies in another way. A float file of 0.5 GB takes 0.06 GB of a process's own
    memory instead of 0.8.
    """
    options = quiet_options()
    options.add_session_config_entry(_NO_PACKING, "1")
    return options


def open_session(
    file: str | os.PathLike,
    options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    *,
    as_exported: bool = True,
    mapped: bool = False,
) -> onnxruntime.InferenceSession:
    """A session that multiplies as the file was exported to: by `quantization.accuracy_level`.

    `MatMulNBits` carries the level itself. Standard operators cannot, so it is in the file's metadata, which only an open
    session can read: a file of another level than ONNX Runtime's own is opened twice.

    Args:
        file (`str` or `os.PathLike`): The ONNX file.
        options (`onnxruntime.SessionOptions`, *optional*): Such a file's level is added to them.
        providers (`Sequence`): Execution providers.
        as_exported (`bool`): `False` leaves `options` as they are, whatever the file says.
        mapped (`bool`): Weights are mapped into memory until they are packed, also those that lie in the file of the graph
            ([`model_in_place`]): a quarter to a third less of a process's own memory, and the same answers. The file must stay
            as it is. With [`in_place_options`] they always are.

    Returns:
        `onnxruntime.InferenceSession`

    Raises:
        Exception: ONNX Runtime's own, which have no common base, if it cannot load the file.
    """
    options = options or quiet_options()
    session = _opened(file, options, providers, mapped)
    level = session.get_modelmeta().custom_metadata_map.get(ACCURACY_LEVEL, _DEFAULT_LEVEL)
    if level == _DEFAULT_LEVEL or not as_exported:
        return session
    # its memory goes before the other's comes
    del session
    options.add_session_config_entry(ACCURACY_LEVEL_ENTRY, level)
    return _opened(file, options, providers, mapped)


def _opened(
    file: str | os.PathLike, options: onnxruntime.SessionOptions, providers: Sequence[Any], mapped: bool
) -> onnxruntime.InferenceSession:
    found = model_in_place(file) if mapped or _packs_nothing(options) else None
    if found is not None:
        options.add_session_config_entry(_FOLDER, str(Path(file).parent))
    return onnxruntime.InferenceSession(str(file) if found is None else found, options, providers=list(providers))


def _packs_nothing(options: onnxruntime.SessionOptions) -> bool:
    try:
        return options.get_session_config_entry(_NO_PACKING) == "1"
    except RuntimeError:  # there is no such entry
        return False


def chooses_positions(session: onnxruntime.InferenceSession) -> bool:
    """Whether a file can be told how many positions get logits; files of other exporters, and older ones, give all."""
    return any(value.name == LOGITS_TO_KEEP for value in session.get_overridable_initializers())
