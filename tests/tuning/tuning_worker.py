"""One tuning of a tiny model in a process of its own, for the tests of resumption and of several processes.

    python tuning_worker.py OUTPUT FOLDER STOP_AT CONFIG

`STOP_AT`: the step at which the process kills itself, or -1. `CONFIG`: of `TuningConfig`, as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny_models import random_tokens, tiny_model

from optimum_clp.configuration.stages import TuningConfig
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning import loop as training_loop
from optimum_clp.tuning.endpoints import tune_layers


def main(output: str, folder: str, stop_at: str, config: str) -> None:
    torch.set_num_threads(1)
    dense = tiny_model(dtype=getattr(torch, os.environ.get("TUNING_WORKER_DTYPE", "float32")))
    cut = cut_model(dense, [LayerSegment(2, 4)])
    step = training_loop.TrainingLoop._train_step

    def killed(loop):
        if loop.state.step == int(stop_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(loop)

    training_loop.TrainingLoop._train_step = killed
    result = tune_layers(
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
    torch.save({"weights": cut.state_dict(), "result": result.to_dict(), "clean": clean}, f"{output}-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
