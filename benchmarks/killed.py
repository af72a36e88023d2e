"""A full run with export, killed (SIGKILL) at random moments and started again until it ends: what it leaves is compared,
byte by byte, with what an undisturbed run leaves.

    python -m benchmarks.killed [--trials 100] [--seed 0] [--model FOLDER] [--kills 1]

Each trial starts the same command, kills it after a random share of the time that an undisturbed run takes, and starts it
again; with `--kills` more than once. Without `--model` the model is a small random one, made here. Not compared: figures of
time, which are never the same twice (the report, the plots and the card have some).

A run is a process of its own, forked from one in which all libraries are loaded: loading them takes longer than the run, and
nothing is on disk before it is done.
"""

import argparse
import hashlib
import os
import random
import signal
import tempfile
import time
import traceback
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

# these hold seconds and speeds
TIMED = ("clp_report.json", "README.md", "plots", "report.html")
OPTIONS = (
    "--pruning-ratio 0.34 --sequence-length 32 --train-sequences 24 --validation-sequences 4 --test-sequences 4 "
    "--search-sequences 8 --epochs 3 --batch-size 4 --checkpoint-seconds 0 --no-generation --weights int8 --group-size 16 "
    "--tokenizer {tokenizer} --quiet"
)


def main() -> int:
    """Run the trials; 0 if all results are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--kills", type=int, default=1, help="in each trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="folder of a dense model; a small random one is made if not given")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    load_libraries()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = args.model or str(small_model(folder / "dense"))
        began = time.monotonic()
        run(model, folder, "undisturbed")
        seconds = time.monotonic() - began
        expected = contents(folder / "undisturbed" / "out")
        bad = 0
        for trial in range(args.trials):
            at = [moments.uniform(0, seconds) for _ in range(args.kills)]
            found = killed_run(model, folder, f"trial-{trial}", at)
            bad += found != expected
            verdict = "equal" if found == expected else f"DIFFERENT: {differing(found, expected)}"
            print(f"trial {trial}: killed after {', '.join(f'{each:.1f} s' for each in at)}: {verdict}", flush=True)
    print(f"{args.trials - bad} of {args.trials} results equal an undisturbed run's ({seconds:.0f} s)")
    return 1 if bad else 0


def killed_run(model: str, folder: Path, name: str, moments: list[float]) -> dict[str, str]:
    """A run that is killed at each of the moments, and then left alone; what is in its folder, and beside it."""
    for moment in moments:
        process, until = start(model, folder, name), time.monotonic() + moment
        while not (ended := os.waitpid(process, os.WNOHANG)[0] == process) and time.monotonic() < until:
            time.sleep(0.002)
        if not ended:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        if (folder / name / "out").exists():
            break  # it was faster, or the folder was there already: it is whole, or not there
    found = {}
    if not (folder / name / "out").exists():
        run(model, folder, name)
        places = (folder / name).iterdir(), (folder / name / "cache" / "optimum_clp").iterdir()
        left = {path.name.split("-")[0] for place in places for path in place} - {"out", "cache", "self_written"}
        found = {"left behind": ", ".join(sorted(left))} if left else {}
    return contents(folder / name / "out") | found


def run(model: str, folder: Path, name: str) -> None:
    """A run to its end."""
    status = os.waitstatus_to_exitcode(os.waitpid(start(model, folder, name), 0)[1])
    if status != 0:
        raise SystemExit(f"{name}: exit status {status}: {(folder / f'{name}.log').read_text()[-2000:]}")


def load_libraries() -> None:
    """All that a run imports: these are imported for that alone."""
    # threads of this process would not be in a forked one
    torch.set_num_threads(1)
    import matplotlib.pyplot  # noqa: F401
    import onnxruntime  # noqa: F401

    import optimum_clp.exporters.export
    import optimum_clp.pruner  # noqa: F401


def start(model: str, folder: Path, name: str) -> int:
    """The command, in a process of its own, and its number."""
    from optimum_clp.commands.clp import main as command

    (folder / name).mkdir(exist_ok=True)
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.chdir(folder / name)
        # the recipe holds the folders: the same in every trial
        options = [*OPTIONS.format(tokenizer=model).split(), "--text-cache-dir", "cache", "out"]
        status = command(["prune", "--model", model, *options])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def contents(folder: Path) -> dict[str, str]:
    """For each file its hash, but for those that hold times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path, name in names.items()
        if not name.startswith(TIMED)
    }


def differing(found: dict[str, str], expected: dict[str, str]) -> str:
    """Names of what is not the same."""
    return ", ".join(sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)))


def small_model(folder: Path) -> Path:
    """A random model of 6 layers, with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=100, num_hidden_layers=6, max_position_embeddings=256, initializer_range=0.15, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 100)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
