from tiny_models import random_tokens, tiny_model, tiny_tokenizer

from optimum_clp.evaluation.model import evaluate_model
from optimum_clp.evaluation.tasks import evaluate_task, load_task
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs

ROWS = random_tokens(3, 12)
TASK = load_task("piqa", [{"query": "w5 w6", "choices": ["w7 w8", "w9"], "gold": i % 2} for i in range(4)])


def test_rows_and_tasks_are_measured_as_by_themselves():
    model, dense, tokenizer = tiny_model(), tiny_model(seed=1), tiny_tokenizer()
    on_rows = evaluate_tokens(model, ROWS, reference=DenseOutputs(dense, ROWS, quiet=True), quiet=True).to_dict()
    score = evaluate_task(model, tokenizer, TASK, limit=3, quiet=True).to_dict()
    both = evaluate_model(model, dense, ROWS, [TASK], tokenizer, task_limit=3, quiet=True)
    assert {key: value for key, value in both.items() if key != "tasks"} == on_rows and on_rows["kl"] > 0
    assert both["tasks"]["piqa"].items() >= score.items() and score["num_examples"] == 3
    assert (
        both["tasks"]["piqa"]["dense_accuracy"] == evaluate_task(dense, tokenizer, TASK, limit=3, quiet=True).accuracy
    )
    assert evaluate_model(model, dense, ROWS, [], None, quiet=True) == on_rows
    assert evaluate_model(model, None, None, [TASK], tokenizer, task_limit=3, quiet=True) == {"tasks": {"piqa": score}}
    assert evaluate_model(model, None, ROWS, [], None, quiet=True)["kl"] is None
