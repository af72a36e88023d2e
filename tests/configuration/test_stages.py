import subprocess
import sys
from importlib import metadata

import pytest

from optimum_clp import CLPConfig
from optimum_clp.configuration.stages import STAGES, PlainSettings, all_settings
from optimum_clp.doors import LOSSES, ROUNDINGS, STARTS, STRATEGIES
from optimum_clp.errors import ConfigurationError

CHOSEN_BY_NAME = {
    "search.strategy": STRATEGIES,
    "tuning.init": STARTS,
    "tuning.loss": LOSSES,
    "quantization.method": ROUNDINGS,
}


def test_settings_and_their_check_need_neither_torch_nor_transformers():
    code = (
        "import sys, optimum_clp.configuration.stages, optimum_clp.configuration.validation as v\n"
        "v.checked_values({'search': {'strategy': 'gate'}})\n"
        "assert not {'torch', 'transformers', 'optimum', 'numpy', 'optimum_clp.search'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_field_is_a_setting_whose_default_keeps_its_rule():
    settings = all_settings()
    assert len(settings) > 50
    for name, setting in settings.items():
        assert setting.rule.problems(name, setting.default) == [], name
        assert setting.help and not setting.help.endswith("."), name
        assert not setting.more or setting.more.endswith("."), name


def test_defaults_are_those_of_the_configuration():
    config = CLPConfig()
    for name, setting in all_settings().items():
        stage, dot, key = name.partition(".")
        assert (getattr(getattr(config, stage), key) if dot else getattr(config, name)) == setting.default, name


def test_flags_are_not_given_twice():
    flags = [flag for setting in all_settings().values() for flag in setting.flags]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("cls", [CLPConfig, PlainSettings, *STAGES.values()])
def test_docstrings_have_a_line_for_every_setting(cls):
    stage = {c: f"{name}." for name, c in STAGES.items()}.get(cls, "")
    settings = {n: s for n, s in all_settings().items() if (n.startswith(stage) if stage else "." not in n)}
    assert settings
    for setting in settings.values():
        help = " ".join(setting.help.split())
        line = f"{setting.key} ({setting.kind}, defaults to `{setting.default!r}`): {help[0].upper()}{help[1:]}"
        assert line in " ".join(cls.__doc__.split())
    assert "{settings}" not in cls.__doc__


@pytest.fixture
def foreign_names(monkeypatch):
    """A package that adds a name `mine` to every registry; it is not even importable."""

    def entry_points(*, group):
        return [metadata.EntryPoint("mine", "their_package.module:object", group)]

    monkeypatch.setattr("optimum_clp.registry.metadata.entry_points", entry_points)
    for registry in CHOSEN_BY_NAME.values():
        monkeypatch.setattr(registry, "_added", None)


@pytest.mark.parametrize("name", CHOSEN_BY_NAME)
def test_a_name_of_another_package_is_valid(name, foreign_names):
    stage, _, key = name.partition(".")
    assert getattr(getattr(CLPConfig(**{stage: {key: "mine"}}), stage), key) == "mine"
    with pytest.raises(ConfigurationError, match=f"{name} is 'yours': .*, 'mine'"):
        CLPConfig(**{stage: {key: "yours"}})
    assert "their_package" not in sys.modules


def test_a_loss_of_another_package_can_be_weighted(foreign_names):
    assert CLPConfig(tuning={"loss": {"kd": 0.5, "mine": 0.5}}).tuning.loss_weights() == {"kd": 0.5, "mine": 0.5}


@pytest.mark.parametrize(("name", "registry"), CHOSEN_BY_NAME.items())
def test_every_name_of_a_registry_is_valid(name, registry):
    stage, _, key = name.partition(".")
    assert len(registry) >= 3
    for choice in registry:
        CLPConfig(**{stage: {key: choice}})
