"""The machine and the versions that something was measured with."""

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any


def environment_info(device: Any = "cpu") -> dict[str, Any]:
    """Versions and machine, for the report.

    Args:
        device (`str` or `torch.device`): Where the model is.

    Returns:
        `dict`: `python`, `torch`, `transformers`, `optimum`, `onnxruntime` (versions, or `None` where not installed),
        `platform`, `device` (name of the processor), `num_threads` (PyTorch's intra-op threads).
    """
    import torch

    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in ("transformers", "optimum", "onnxruntime")},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": f"{device.type} ({name})" if name else device.type,
        "num_threads": torch.get_num_threads(),
    }


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
