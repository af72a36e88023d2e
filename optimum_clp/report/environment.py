"""The machine and the versions that something was measured with."""

import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from .section import Key, to_section


@dataclass(frozen=True)
class Environment:
    """The `environment` section of the report; a library that is not installed has no version."""

    python: str
    torch: str
    transformers: str | None
    optimum: str | None
    onnxruntime: str | None
    platform: str
    device: Annotated[str, Key("Kind and name of the processor.")]
    num_threads: Annotated[int, Key("Intra-op threads of PyTorch.", minimum=1)]


def environment_info(device: Any = "cpu") -> dict[str, Any]:
    """Versions and machine, for the report.

    Args:
        device (`str` or `torch.device`): Where the model is.

    Returns:
        `dict`: The section of [`Environment`].
    """
    import torch

    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    environment = Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=_version("transformers"),
        optimum=_version("optimum"),
        onnxruntime=_version("onnxruntime"),
        platform=f"{platform.system()} {platform.machine()}",
        device=f"{device.type} ({name})" if name else device.type,
        num_threads=torch.get_num_threads(),
    )
    return to_section(environment)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpu_info.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor()
