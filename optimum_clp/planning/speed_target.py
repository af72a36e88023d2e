"""How many layers must go, so that the int4 file decodes so many tokens in a second on this machine; and what else is settled before a run."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ..architecture.lookup import allowed_segments, num_layers
from ..configuration.clp_config import CLPConfig
from ..errors import ConfigurationError, ModelError
from ..processes import by_first
from ..progress import say
from ..report.section import to_section
from ..report.tables import form_line
from ..session import Session
from .size_target import SizeTarget, size_target
from .speed import LayerTimes, choose_for_speed, layer_times

SPEED_TOLERANCE = 0.03
"""How far below its target the int4 file's speed may be."""


@dataclass(frozen=True)
class SpeedTarget:
    """A speed that was asked for, and what is chosen for it.

    Args:
        target_tokens_per_second (`float`): As in the recipe.
        num_removed (`int`): Layers that must go for it.
        tokens_per_second (`float`): That the int4 file will decode then.
        dense_tokens_per_second (`float`): That one of the whole model decodes.
        threads (`int`): That computed.
    """

    target_tokens_per_second: float
    num_removed: int
    tokens_per_second: float
    dense_tokens_per_second: float
    threads: int


def speed_target(config: PretrainedConfig, recipe: CLPConfig, times: LayerTimes) -> SpeedTarget:
    """The fewest layers that must go from a model, so that the int4 file of the rest is as fast as the recipe asks.

    Args:
        config (`PretrainedConfig`): Of the dense model.
        recipe ([`CLPConfig`]): With `target_tokens_per_second`.
        times ([`LayerTimes`]): Measured.

    Returns:
        [`SpeedTarget`]: With no layer removed, if none must go and a size target beside it decides.

    Raises:
        ConfigurationError: If no number of layers gives such a speed; it names the nearest that can be reached.
        ModelError: If this architecture cannot be cut.
    """
    target, depth = recipe.target_tokens_per_second, times.num_layers
    assert target is not None
    dense = times.tokens_per_second(depth)
    allowed = [count for count in range(1, depth) if _can_go(config, recipe, count)]
    if not allowed:
        allowed_segments(config, 1)  # says why
    most = times.most_layers(target)
    if most >= depth and recipe.target_size_mb is not None:
        return SpeedTarget(target, 0, dense, dense, times.threads)
    if most >= depth:
        nearest = times.tokens_per_second(depth - allowed[0])
        rule = f"the int4 file of the whole model decodes {dense:.4g} tokens per second on this machine"
        remedy = f"Without {allowed[0]} of {depth} layers, the fewest that can go, it is {nearest:.4g}: give more than {dense:.4g}"
        raise ConfigurationError.of("target_tokens_per_second", target, rule, remedy)
    count = next((count for count in allowed if depth - count <= most), None)
    if count is None:
        fastest = times.tokens_per_second(depth - allowed[-1])
        rule = (
            f"without {allowed[-1]} of {depth} layers, the most that can go, the int4 file is slower on this machine"
        )
        remedy = f"The most that can be reached is {_down(fastest):g}"
        raise ConfigurationError.of("target_tokens_per_second", target, rule, remedy)
    return SpeedTarget(target, count, times.tokens_per_second(depth - count), dense, times.threads)


@dataclass(frozen=True)
class Aim:
    """A recipe with all that its targets leave open.

    Args:
        recipe ([`CLPConfig`]): With a ratio in place of targets.
        size ([`SizeTarget`] or `None`): What is chosen for a size.
        speed ([`SpeedTarget`] or `None`): What is chosen for a speed.
    """

    recipe: CLPConfig
    size: SizeTarget | None = None
    speed: SpeedTarget | None = None


def aim(dense: PreTrainedModel, recipe: CLPConfig, times: LayerTimes | None) -> Aim:
    """The recipe with a ratio in place of its targets: of a size and a speed the one for which more layers must go decides.

    Args:
        dense (`PreTrainedModel`): The model that is cut; may be on the meta device.
        recipe ([`CLPConfig`]): Not changed; without a target it is given back as it is.
        times ([`LayerTimes`] or `None`): Measured, where there is a speed target.

    Raises:
        ConfigurationError, ModelError: As [`size_target`] and [`speed_target`].
    """
    size = None if recipe.target_size_mb is None else size_target(dense, recipe)
    speed = None if times is None else speed_target(dense.config, recipe, times)
    if size is None and speed is None:
        return Aim(recipe)
    count = max(each.num_removed for each in (size, speed) if each is not None)
    values: dict[str, Any] = {"pruning_ratio": count / num_layers(dense.config)}
    values |= dict.fromkeys(("target_size_mb", "target_tokens_per_second"))
    return Aim(CLPConfig.from_dict(recipe.to_dict() | values), size, speed)


def settled(session: Session) -> CLPConfig:
    """The session's recipe, in which what is to be measured has been: the form of its int4 file, in place of `tune_for`.

    Measured once for a model and a recipe, by the first of several processes.
    """
    recipe = session.config
    if recipe.quantization.tune_for == "speed" and recipe.export.enabled:
        config = session.cut_or_dense_config() if session.model is None else session.source().config
        key = ("form", repr(config), repr(recipe.quantization), repr(recipe.export))
        choice = session.measured(key, lambda: by_first(lambda: choose_for_speed(config, recipe, quiet=session.quiet)))
        session.speed_choice = choice
        session.config = with_choice(recipe, choice)
        if not session.quiet:
            say(f"fastest on this machine: {form_line(to_section(choice))}")
    return session.config


def aimed(session: Session, config: CLPConfig | None = None) -> CLPConfig:
    """The session's recipe, or `config` in its place, with a ratio, chosen for its model, instead of targets; see [`aim`]."""
    session.use(config)
    recipe, dense = settled(session), session.source()
    times = None
    if recipe.target_tokens_per_second is not None:
        key = ("layers", repr(dense.config), repr(recipe.quantization), repr(recipe.export))
        times = session.measured(key, lambda: by_first(lambda: layer_times(dense.config, recipe, quiet=session.quiet)))
    found = aim(dense, recipe, times)
    session.ratio_chosen = None if found.speed is None else found.recipe.pruning_ratio
    return found.recipe


def with_choice(recipe: CLPConfig, choice: Any) -> CLPConfig:
    """A recipe with the form that was measured to be fastest, which measures nothing.

    Args:
        recipe ([`CLPConfig`]): Not changed.
        choice ([`~exporters.result.SpeedChoice`]): From [`choose_for_speed`].
    """
    values = recipe.to_dict()
    values["quantization"] |= {
        "tune_for": "size",
        "group_size": choice.group_size,
        "accuracy_level": choice.accuracy_level,
        "head_bits": None if choice.head_bits == 4 else choice.head_bits,
    }
    return CLPConfig.from_dict(values)


def _can_go(config: PretrainedConfig, recipe: CLPConfig, count: int) -> bool:
    if recipe.num_segments > 1:
        return True
    try:
        return bool(allowed_segments(config, count))
    except ModelError:
        return False


def _down(number: float) -> float:
    """A little less, of four digits: what is told to be reached can be."""
    return float(f"{number * 0.9995:.4g}")
