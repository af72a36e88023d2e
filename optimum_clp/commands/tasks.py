"""The options about tasks, looked at before a model is loaded."""

from typing import TYPE_CHECKING

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..configuration.clp_config import CLPConfig


def check_tasks(config: "CLPConfig") -> None:
    """Refuse settings of tasks without a task that they are for.

    Args:
        config ([`CLPConfig`]): From the options.

    Raises:
        ConfigurationError: If there is one.
    """
    evaluation = config.evaluation
    if evaluation.task_limit is not None and not evaluation.tasks:
        raise ConfigurationError.of("--limit", evaluation.task_limit, "there is no task to limit", "Give --tasks")
    if evaluation.named_tasks():
        return
    for name, default in (("num_fewshot", None), ("apply_chat_template", False), ("tasks_dir", None)):
        value = getattr(evaluation, name)
        if value != default:
            rule = "it is for tasks of lm-eval, and none is named; tasks in files are asked as they stand"
            remedy = "Name one, such as --tasks arc_easy, or leave it out"
            raise ConfigurationError.of(f"--{name.replace('_', '-')}", value, rule, remedy)


def read_named_tasks(config: "CLPConfig") -> None:
    """Let the data of lm-eval's tasks be read once, so that what is not to be had is known before a model is loaded.

    Args:
        config ([`CLPConfig`]): From the options.

    Raises:
        ConfigurationError, CalibrationError: As [`load_tasks`], and as [`check_tasks`].
    """
    check_tasks(config)
    evaluation = config.evaluation
    if evaluation.named_tasks():
        from ..evaluation.tasks import load_tasks

        load_tasks(evaluation.named_tasks(), evaluation)
