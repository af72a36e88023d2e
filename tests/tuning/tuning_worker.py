"""One tuning of a tiny model in a process of its own, for the tests of resumption and of several processes.

    python tuning_worker.py OUTPUT FOLDER STOP_AT CONFIG
    python tuning_worker.py

With `TUNING_WORKER_STREAMED` in the environment, layers lie elsewhere than where they run, for which the CPU stands in.

`STOP_AT`: the step at which the process kills itself, or -1. `CONFIG`: of `TuningConfig`, as JSON.

Without arguments the process, once all is imported, forks others. It reads requests, one on each line: a list of
`{"arguments": the four above, "launch": options of `accelerate launch`, "rank", "port", "environment", "log": file}` for
processes that run at one time. It answers with a line, the list of their exit codes.
"""

import json
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_models import random_tokens, tiny_model

from optimum_clp.checkpoint.offloaded import bare_copy
from optimum_clp.configuration.stages import TuningConfig
from optimum_clp.forward.streamed_layers import LayerCopies, run_on
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning import endpoints
from optimum_clp.tuning import loop as training_loop
from optimum_clp.tuning.sharded_layers import local_bytes


def main(output: str, folder: str, stop_at: str, config: str) -> None:
    torch.set_num_threads(1)
    dense = tiny_model(dtype=getattr(torch, os.environ.get("TUNING_WORKER_DTYPE", "float32")))
    if os.environ.get("TUNING_WORKER_STREAMED"):
        dense = bare_copy(dense)
        run_on(dense, LayerCopies(torch.device("cpu")))
    shares, sharded = [], endpoints.sharded

    @contextmanager
    def watched(layers):
        with sharded(layers) as twins:
            whole = sum(p.nbytes for layer in layers for p in layer.parameters())
            shares.append((len(twins), sum(map(local_bytes, twins)), whole))
            yield twins

    endpoints.sharded = watched
    cut = cut_model(dense, [LayerSegment(2, 4)])
    step, engines = training_loop.TrainingLoop._train_step, set()

    def killed(loop):
        engines.add(AcceleratorState().distributed_type.value)
        if loop.state.step == int(stop_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(loop)

    training_loop.TrainingLoop._train_step = killed
    result = endpoints.tune_layers(
        cut,
        dense,
        (1, 2),
        random_tokens(17, 20, seed=1),
        random_tokens(5, 20, seed=2),
        TuningConfig(**json.loads(config)),
        kept=[0, 1, 4, 5],
        folder=Path(folder),
        quiet=True,
    )
    rank = int(os.environ.get("RANK", 0))
    clean = type(cut.model.layers[1]) is type(dense.model.layers[1])
    saved = {
        "weights": cut.state_dict(),
        "result": result.to_dict(),
        "clean": clean,
        "engines": engines,
        "shares": shares,
    }
    torch.save(saved, f"{output}-{rank}.pt")


def serve() -> None:
    for line in sys.stdin:
        processes = [forked(request) for request in json.loads(line)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in processes]), flush=True)


def forked(request: dict) -> int:
    """The number of a new process that tunes, with its output in the log."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        with open(request["log"], "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ.update(request["environment"])
        if request["launch"]:
            os.environ.update(environment_of(**request))
        main(*request["arguments"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def environment_of(launch: list[str], rank: int, port: int, **_) -> dict[str, str]:
    """What `accelerate launch` with these options, and PyTorch's launcher under it, tell a process of theirs."""
    args = launch_command_parser().parse_args([*launch, "--num_machines", "1", "--mixed_precision", "no",
                                               "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
                                               "--main_process_port", str(port), __file__])  # fmt: skip
    world = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": args.num_processes,
        "LOCAL_WORLD_SIZE": args.num_processes,
    }
    group = {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return prepare_multi_gpu_env(args) | {name: str(value) for name, value in group.items()}


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else serve()
