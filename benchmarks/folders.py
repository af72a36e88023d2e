"""Where the benchmarks find their models and keep what they make."""

from pathlib import Path

HERE = Path(__file__).parent
# processes of their own are started here: `python -m benchmarks.NAME` finds the package
ROOT = HERE.parent
MODELS = HERE / "models"
CACHE = HERE / ".cache"


def model_folder(name: str, models_dir: Path) -> Path:
    """Where a model is: in `models_dir`, or where `benchmarks/models.py` puts what it trains."""
    for folder in (models_dir / name, CACHE / name):
        if (folder / "config.json").is_file():
            return folder
    raise SystemExit(
        f"{name} is not in {models_dir}; deep32 and deep80: python -m benchmarks.models {name} --data DATA"
    )
