"""Names that stand for objects: nothing is imported for a name, and other packages may add some."""

import subprocess
import sys
import types
from importlib import metadata

import pytest

from optimum_clp import doors
from optimum_clp.errors import ConfigurationError
from optimum_clp.registry import Registry

DOORS = {name: door for name, door in vars(doors).items() if isinstance(door, Registry)}
BUILT_IN = [(kind, name) for kind, door in DOORS.items() for name in door if door.row(name).package is None]
GROUP = "optimum_clp.things"


def thing():
    return "a thing"


@pytest.fixture
def registry():
    registry = Registry("thing", GROUP)
    registry.register("first", f"{__name__}:thing", says="the first one")
    registry.register("second", thing)
    return registry


@pytest.fixture
def installed(monkeypatch):
    """Let packages be installed: `installed("name = module:object", ...)`, of the distribution `theirs`."""

    def install(*lines):
        points = [metadata.EntryPoint(*line.split(" = "), GROUP) for line in lines]
        for point in points:
            vars(point)["dist"] = types.SimpleNamespace(name="theirs")
        monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == GROUP else [])

    install()
    return install


@pytest.fixture
def their_module(tmp_path, monkeypatch):
    """Writes a module that can be imported, and says whether it has been."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        (tmp_path / "their_things.py").write_text(text)
        return lambda: "their_things" in sys.modules

    yield write
    sys.modules.pop("their_things", None)


def test_names_come_in_the_order_of_registration(registry, installed):
    assert registry.names == tuple(registry) == ("first", "second")
    assert len(registry) == 2 and "first" in registry and "third" not in registry
    assert registry.get("first") is registry.get("second") is thing
    assert registry.says("first") == "the first one" and registry.says("second") == ""


def test_an_unknown_name_is_told_which_there_are(registry, installed):
    for ask in (registry.get, registry.says, registry.row):
        with pytest.raises(ConfigurationError) as error:
            ask("third")
        assert str(error.value) == (
            "thing is 'third': it must be one of 'first', 'second'. Choose one of 'first', 'second'."
        )


def test_a_name_is_registered_once(registry):
    with pytest.raises(ConfigurationError) as error:
        registry.register("first", thing)
    assert str(error.value) == ("thing is 'first': there is one of that name already. Register it under another name.")
    assert registry.row("first").says == "the first one"


def test_another_package_adds_names_which_are_imported_when_they_are_used(registry, installed, their_module):
    imported = their_module("def made(): return 42\n")
    installed("zebra = their_things:made", "ant = their_things:made")
    assert registry.names == ("first", "second", "ant", "zebra")
    assert registry.row("ant").package == "theirs" and registry.says("ant") == "of the package theirs"
    assert not imported()
    assert registry.get("ant")() == 42 and imported()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import not_installed_anywhere", "No module named 'not_installed_anywhere'"),
        ("other = 1", "module 'their_things' has no attribute 'made'"),
        ("raise SystemError('no\\n  licence')", "no licence"),
        ("raise RuntimeError", "RuntimeError"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named(registry, installed, their_module, text, reason):
    their_module(text + "\n")
    installed("broken = their_things:made")
    assert "broken" in registry and registry.get("first") is thing
    with pytest.raises(ConfigurationError) as error:
        registry.get("broken")
    assert str(error.value) == (
        f"thing is 'broken': the package theirs adds it as their_things:made, and that cannot be imported ({reason}). "
        "Repair or remove theirs, or choose another thing."
    )


def test_a_name_that_there_is_already_is_left_out(registry, installed, their_module):
    imported = their_module("made = 1\n")
    installed("first = their_things:made", "new = their_things:made", "new = their_things:other")
    with pytest.warns(UserWarning) as warned:
        assert registry.names == ("first", "second", "new")
    assert [str(w.message) for w in warned] == [
        f"theirs adds the thing {name!r}, and there is one of that name already: it is left out"
        for name in ("first", "new")
    ]
    assert registry.get("first") is thing and not imported()
    assert registry.get("new") == 1


def test_a_package_without_a_distribution_is_called_by_its_module(registry, monkeypatch):
    point = metadata.EntryPoint("theirs", "their_things.more:made", GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    assert registry.row("theirs").package == "their_things"


def test_every_registry_has_its_own_group_and_kind():
    for of in ("kind", "group"):
        assert len({getattr(door, of) for door in DOORS.values()}) == len(DOORS) >= 6
    assert all(door.group.startswith("optimum_clp.") for door in DOORS.values())


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_every_built_in_name_leads_to_an_object_and_says_what_it_is(kind, name):
    assert callable(DOORS[kind].get(name))
    assert DOORS[kind].says(name)


def test_nothing_is_imported_for_names():
    code = (
        "import sys, warnings\n"
        "from optimum_clp import doors\n"
        "from optimum_clp.registry import Registry\n"
        "kinds = [door for door in vars(doors).values() if isinstance(door, Registry)]\n"
        "said = [door.says(name) for door in kinds for name in door.names]\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnx', 'optimum_clp.tuning', 'optimum_clp.search'}\n"
        "print(len(kinds), len(said) > 20, sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{len(DOORS)} True []"
