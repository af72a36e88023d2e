"""Wrong input of every kind: each ends in an error of this package with name, value, rule and remedy, within 10 seconds and 2 GiB,
and leaves nothing behind.

The tables are made by a seeded generator (`wrong_values`). *Wrong* input must be refused; *odd* input, of which some is right, must
be refused or taken, and never end in another error.
"""

import gzip
import inspect
import json
import random
import resource
import signal
from pathlib import Path

import pytest
from byte_tokenizer import tiny_tokenizer
from report_example import example_report
from tiny_models import tiny_config, tiny_model
from wrong_values import HUGE, KINDS, LONG, SEED, changed, damaged_texts, odd_contents, wrong_for

from optimum_clp import CLPConfig, CLPPruner, LayerSegment, OnnxCausalLM, plan_pruning
from optimum_clp.calibration.rows import tokenize_dataset
from optimum_clp.chat.speakers import open_speakers
from optimum_clp.checkpoint.loading import load_model, load_tokenizer
from optimum_clp.commands.clp import main
from optimum_clp.configuration.recipe_files import read_recipe
from optimum_clp.configuration.recipe_text import recipe_yaml
from optimum_clp.configuration.stages import STAGES, all_settings
from optimum_clp.errors import CLPError
from optimum_clp.evaluation.prompts import load_prompts
from optimum_clp.evaluation.tasks import load_task
from optimum_clp.quantization import load_quantized, save_quantized
from optimum_clp.report.report import CLPReport
from optimum_clp.segments import check_segments

SECONDS, MEMORY = 10, 2 * 2**30
COUNTED = []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole model with its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model(num_layers=4, vocab_size=300).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quanto(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quanto") / "model"
    save_quantized(tiny_model(num_layers=2), None, folder, quiet=True)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder that is the current one; whatever is made in it counts as left behind."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pruner():
    model = CLPPruner(tiny_model(num_layers=4, vocab_size=300), tiny_tokenizer(), quiet=True)
    model.config.calibration.cache_dir = "cache"
    return model


@pytest.fixture(autouse=True)
def bounds():
    """Seconds and memory; the time also ends what would never end by itself."""

    def late(*_):
        raise TimeoutError(f"no answer within {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    former = signal.signal(signal.SIGALRM, late)
    # on a machine that others use too, an answer may wait for them
    signal.alarm(3 * SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def files(folder):
    return sorted(str(path) for path in Path(folder).rglob("*"))


def refuses(call, *names):
    """The call ends in an error of this package, each of whose problems says four things in a few lines."""
    before = files(".")
    with pytest.raises(CLPError) as caught:
        call()
    assert caught.value.problems and len(str(caught.value)) < 8000
    for problem in caught.value.problems:
        assert problem.name and problem.rule and problem.remedy, problem
        assert "unexpected" not in problem.rule
    assert not names or any(name in str(caught.value) for name in names)
    assert LONG not in str(caught.value)
    assert files(".") == before
    COUNTED.append(1)


def bears(call):
    """The call is right, or ends in an error of this package."""
    try:
        call()
    except CLPError as error:
        assert all(problem.name and problem.rule and problem.remedy for problem in error.problems)
        COUNTED.append(1)


# ---- every setting


def wrong_settings():
    return [
        pytest.param(name, kind, id=f"{name}-{kind}")
        for name, setting in all_settings().items()
        for kind in sorted(wrong_for(setting))
    ]


@pytest.mark.parametrize(("name", "kind"), wrong_settings())
def test_every_setting_refuses_what_it_cannot_be(name, kind, place):
    stage, dot, key = name.partition(".")
    value = KINDS[kind]
    content = {stage: {key: value}} if dot else {name: value}
    refuses(lambda: CLPConfig.from_dict(content), key)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"none", "dict"}))
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_refuses_what_is_no_stage(stage, kind, place):
    refuses(lambda: CLPConfig.from_dict({stage: KINDS[kind]}), stage)


def test_what_is_set_later_is_checked_before_work(pruner, place):
    for name in STAGES:
        pruner.config = CLPConfig()
        setattr(pruner.config, name, 5)
        refuses(pruner.search, name)
    for wrong in (5, {"seed": 1}, None):
        pruner.config = wrong
        refuses(pruner.prune, "config")


# ---- files

CONFIG_KEYS = {
    "num_hidden_layers": [10**9, 0, -1, "4", 4.0, [4], HUGE],
    "max_position_embeddings": [-1, 0, "x", 10**12, 1.5],
    "hidden_size": [10**12, -5, "x", {}],
    "vocab_size": [10**12, -5, 0, "x"],
    "num_attention_heads": ["x", 10**9, -1],
    "num_key_value_heads": ["x", 10**9, -4],
    "intermediate_size": ["x", 2**40, -4],
    "head_dim": ["x", -8],
    "rms_norm_eps": ["x", 0, -1],
    "architectures": [5, [5], {"a": 1}, ["BertModel"]],
    "model_type": [None, "", 5, "no_such_type", LONG, "\0"],
    "dtype": [5, LONG],
    "tie_word_embeddings": ["x", 5],
    "eos_token_id": ["x", {}, 10**30],
    "rope_parameters": [5, "x"],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [pytest.param(k, v, id=f"{k}-{n}") for k, values in CONFIG_KEYS.items() for n, v in enumerate(values)],
)
def test_values_of_config_json(key, value, saved, place):
    content = {**json.loads((saved / "config.json").read_text()), key: value}
    folder = copied(saved, place, "config.json", json.dumps(content).encode())
    refuses(lambda: load_model(folder, quiet=True))


def copied(source, place, name, content):
    """A folder with links to the files of another, but for one."""
    folder = place / "model"
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        target = folder / file.name
        if file.name != name and not target.exists() and file.is_file():
            target.symlink_to(file)
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    return folder


def damaged(name, count=6):
    """Damages of a file, by their names; the file's own text is read in the test."""
    return [pytest.param(name, number, id=f"{name}-{number}") for number in range(12 + count)]


@pytest.mark.parametrize(
    ("name", "number"),
    [*damaged("config.json"), *damaged("generation_config.json"), *damaged("tokenizer_config.json")],
)
def test_damaged_files_of_a_model(name, number, saved, place):
    _, content = list(damaged_texts((saved / name).read_text(), 6, name))[number]
    folder = copied(saved, place, name, content)
    refuses(lambda: load_model(folder, quiet=True), name)


INDEX = {"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}


@pytest.mark.parametrize(
    "content",
    [
        *(content for _, content in damaged_texts(json.dumps(INDEX), 4, "index")),
        b"{}",
        *(
            json.dumps({"weight_map": wrong}).encode()
            for wrong in (
                [],
                5,
                {},
                {"a": 5},
                {"a": None},
                {"a": "../x"},
                {"a": "/etc/passwd"},
                {"a": ""},
                {"a": LONG},
                {"a": []},
            )
        ),
    ],
)
def test_the_index_of_weights(content, saved, place):
    folder = copied(saved, place, "model.safetensors.index.json", content)
    (folder / "model.safetensors").unlink()
    refuses(lambda: load_model(folder, quiet=True), "index", "weight files")


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = [
    *(content for _, content in damaged_texts(json.dumps({"a": TENSOR}), 4, "header")),
    *(
        json.dumps({"a": wrong}).encode()
        for wrong in (5, [], {}, {**TENSOR, "data_offsets": [0]}, {**TENSOR, "shape": "x"})
    ),
    *(
        json.dumps({"a": {**TENSOR, "data_offsets": wrong}}).encode()
        for wrong in ([0, -4], [0, 10**30], ["0", "4"], None)
    ),
]


@pytest.mark.parametrize("number", range(len(HEADERS)))
def test_safetensors_headers(number, saved, place):
    header = HEADERS[number]
    folder = copied(saved, place, "model.safetensors", len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refuses(lambda: load_model(folder, quiet=True), "model.safetensors")


@pytest.mark.parametrize("length", [0, 1, 7, 9, 1000])
@pytest.mark.parametrize("said", [0, 2, 2**31, 2**63, 2**64 - 1])
def test_lengths_of_safetensors_headers(length, said, saved, place):
    content = (said.to_bytes(8, "little") + b"{}" + b"\0" * 1000)[:length]
    folder = copied(saved, place, "model.safetensors", content)
    refuses(lambda: load_model(folder, quiet=True), "model.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        *(c for n, c in damaged_texts('{"model.layers.0.mlp.up_proj": {"weights": "qint8"}}', 3, "qmap")),
        *(
            json.dumps({"a": wrong}).encode()
            for wrong in (5, None, [], {"weights": 5}, {"weights": "qint99"}, {"weights": LONG}, {})
        ),
    ],
)
def test_quantos_map(content, quanto, place):
    folder = copied(quanto, place, "quanto_qmap.json", content)
    refuses(lambda: load_quantized(folder))


@pytest.mark.parametrize("number", range(16))
def test_damaged_reports(number, place):
    text = json.dumps(example_report().to_dict())
    name, content = list(damaged_texts(text, 4, "report"))[number]
    (place / "clp_report.json").write_bytes(content)
    refuses(lambda: CLPReport.load(place), "clp_report.json", "report")


REPORT = example_report().to_dict()
WRONG_REPORTS = {
    ("cut", "segments"): [None, 5, [], [[1]], [[4, 2]], [["a", "b"]], [[1, 2, 3]], [[-1, 3]]],
    ("cut", "num_layers_before"): [None, "x", 0, -1],
    ("base_model",): [5, [], {"name_or_path": 5}, {}],
    ("base_model", "name_or_path"): [5, [], {}],
    ("search", "scored"): [None, 5, [5], [{}]],
    ("search", "strategy"): [None, 5],
    ("tuning", "steps"): [None, "x", -1],
    ("tuning", "layers"): [None, 5, ["x"]],
    ("evaluation", "rows"): [None, 5, [5], [{"name": 5}]],
    ("calibration",): [5, {}, {"source": 5}],
    ("calibration", "source"): [None, 5],
    ("quantization",): [{}, [5], [{}]],
    ("export", "files"): [None, 5, [5]],
    ("schema_version",): [None, "1", 0, -1, True, 99, 1.0],
    ("created",): [None, 5, "yesterday"],
    ("no_such_section",): [5],
}


@pytest.mark.parametrize(
    ("path", "value"),
    [pytest.param(p, v, id=f"{'.'.join(p)}-{n}") for p, values in WRONG_REPORTS.items() for n, v in enumerate(values)],
)
def test_values_of_a_report(path, value, place):
    (place / "clp_report.json").write_text(json.dumps(changed(REPORT, path, value)))
    refuses(lambda: CLPReport.load(place), path[-1])


@pytest.mark.parametrize("number", range(16))
def test_damaged_recipes(number, place):
    text = json.dumps(CLPConfig().to_dict())
    name, content = list(damaged_texts(text, 4, "recipe"))[number]
    (place / "clp_config.json").write_bytes(content)
    refuses(lambda: CLPConfig.from_pretrained(place), "clp_config.json")
    assert main(["search", "--model", "m", "--config", str(place), "--quiet"]) == 1


RECIPE = recipe_yaml(CLPConfig(0.3, tuning={"learning_rate": 1e-3}, quantization={"weights": ["int4"]}))
WRONG_YAML = [
    b"",
    b"# a comment alone\n",
    b"5",
    b"- seed: 1",
    b"seed",
    b"seed: &a 1",
    b"a: &a [b, b]\nb: &b [*a, *a]\nseed: *b",
    b"seed: !!python/name:os.system x",
    b"<<: {seed: 1}",
    b"? [a]\n: 1",
    b"~: 1",
    b"seed: 1\nseed: 1",
    b"seed: 1\n---\nseed: 2",
    b"search:\n\tbatch_size: 4",
    b"seed: 1\0",
    b"seed: \xff",
    "seed: 1".encode("utf-16"),
    b"%YAML 3.0\n---\nseed: 1",
    b'calibration_dataset: "\\UFFFFFFFF"',
    b'calibration_dataset: "\\ud800"',
    b"[" * 20_000,
    b"seed: " + b"[" * 70 + b"]" * 70,
    b"".join(b" " * depth + b"seed:\n" for depth in range(700)),
    b"seed: [" + b"1," * 40_000 + b"]",
    b"#" * (2**20 + 1),
    b"seed: " + b"9" * 5000,
    b"seed: 0x" + b"f" * 200_000,
    b"seed: 1.0",
    b"seed: 2026-11-29",
    b"pruning_ratio: 1e999",
    b"pruning_ratio: .nan",
    b"pruning_ratio: yes",
    b"tuning.learning_rate: 1e-3",
    b"tuning: [learning_rate]",
    b"tuning: {rate: 1}",
    b"target_size_mb: -1",
    b"target_size_mb: 5\npruning_ratio: 0.2",
    b"max_memory: 0GiB",
    b"max_memory: 5 apples",
    b"budget: 1e300h",
    LONG.encode() + b": 1",
]


@pytest.mark.parametrize("number", range(len(WRONG_YAML)))
def test_recipes_in_yaml(number, place, capsys):
    (place / "recipe.yaml").write_bytes(WRONG_YAML[number])
    refuses(lambda: CLPConfig.from_file("recipe.yaml"))
    assert main(["recipe", "model", "--config", "recipe.yaml", "--quiet"]) == 1
    assert "unexpected" not in capsys.readouterr().err


@pytest.mark.parametrize("number", range(60))
def test_odd_recipes_in_yaml(number, place):
    rng = random.Random(f"{SEED} yaml {number}")
    text = RECIPE.replace("  # ", "  ", 3) if number % 3 else RECIPE
    at = rng.randrange(len(text))
    (place / "recipe.yaml").write_text(text[:at] + rng.choice("\t\n:#{}[]&*!|>'\"%@`-?,\0\u2028é") + text[at:])
    bears(lambda: CLPConfig.from_file("recipe.yaml").to_json_string())


@pytest.mark.parametrize(
    "content",
    [
        {"clp_version": "banana"},
        {"clp_version": 5},
        {"clp_version": "99.0", "new_setting": 1},
        {"configuration_files": 5},
        {"configuration_files": ["../../etc/passwd"]},
        {"unknown": 1},
        {LONG: 1},
        {"tuning": {"unknown": 1}},
        {"tuning": {LONG: HUGE}},
        {"pruning_ratio": "auto"},
        {"quantization": {"method": [], "bits_per_weight": 5}},
    ],
)
def test_contents_of_a_recipe(content, place):
    (place / "clp_config.json").write_text(json.dumps(content).replace(str(HUGE), "1e999"))
    refuses(lambda: CLPConfig.from_pretrained(place))


# ---- odd contents: taken or refused


@pytest.mark.parametrize("number", range(40))
def test_odd_reports(number, place):
    name, content = list(odd_contents(REPORT, 40, "report"))[number]
    (place / "clp_report.json").write_text(json.dumps(content))
    bears(lambda: CLPReport.load(place).to_table())


@pytest.mark.parametrize("number", range(60))
def test_odd_recipes(number, place):
    name, content = list(odd_contents(CLPConfig().to_dict(), 60, "recipe"))[number]
    bears(lambda: CLPConfig.from_dict(content).to_json_string())


@pytest.mark.parametrize("number", range(40))
def test_odd_configs(number, saved, place):
    name, content = list(odd_contents(json.loads((saved / "config.json").read_text()), 40, "config"))[number]
    folder = copied(saved, place, "config.json", json.dumps(content).encode())
    bears(lambda: load_model(folder, quiet=True))


# ---- data

WRONG_DATA = {
    "none.txt": None,
    "empty.txt": b"",
    "latin.txt": b"caf\xe9 " * 90,
    "number.jsonl": b'{"text": 5}\n',
    "column.jsonl": b'{"body": "a"}\n',
    "scalar.jsonl": b"5\n",
    "broken.jsonl": b'{"text": "a"}\n{"text": ',
    "deep.jsonl": b"[" * 100_000,
    "digits.jsonl": b'{"text": ' + b"9" * 5000 + b"}",
    "broken.json": b'[{"text": "a"}, {"text" "b"}]',
    "deep.json": b'{"text": ' * 60_000,
    "role.jsonl": b'{"messages": [{"role": ["user"], "content": "a"}]}',
    "role2.jsonl": b'{"messages": [{"role": "king", "content": "a"}]}',
    "turn.jsonl": b'{"messages": [{"role": "user", "content": ""}]}',
    "turns.jsonl": b'{"messages": "[[[["}',
    "messages.jsonl": b'{"messages": 5}',
    "mixed.jsonl": b'{"text": "a b c"}\n{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    "broken.csv": b'text,a\n"b,c\nd,e',
    "column.csv": b"a,b\n1,2",
    "column.tsv": b"a\tb\n1\t2",
    "empty.csv": b"",
    "broken.parquet": b"PAR1 no",
    "broken.arrow": b"ARROW1 no",
    "broken.gz": b"\x1f\x8b\x08 no",
    "broken.jsonl.xz": b"no",
    "broken.jsonl.zst": b"no",
    "broken.jsonl.zip": b"PK no",
    "nul.txt": b"\0" * 4 + b"\xff",
    "utf-16.txt": "a text without a mark at its beginning".encode("utf-16-le"),
    "sqlite.db": b"SQLite format 3\0" + b"\x01" * 200,
    "packed.txt.gz": gzip.compress(b"\0\0\0 numbers of a program" * 9),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_files_of_text(name, place):
    if WRONG_DATA[name] is not None:
        (place / name).write_bytes(WRONG_DATA[name])
    refuses(lambda: tokenize_dataset(name, tiny_tokenizer(), sequence_length=8))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"long"}))
def test_sources_of_text(kind, place):
    refuses(lambda: tokenize_dataset(KINDS[kind], tiny_tokenizer(), sequence_length=8, name="text"))


WRONG_ROWS = [
    b"",
    b"5",
    b"[]",
    b"{",
    b"[" * 100_000,
    b'{"a": ' * 5000,
    b"9" * 5000,
    b"\xff",
    *(
        json.dumps(row).encode()
        for row in (
            {},
            {"context": 5, "continuation": "a"},
            {"context": "a", "continuation": ""},
            {"query": "a", "choices": ["b"], "gold": 0},
            {"query": "a", "choices": ["b", "c"], "gold": 2},
            {"query": "a", "choices": ["b", "c"], "gold": True},
            {"query": "a", "choices": "bc", "gold": 0},
            {"messages": [{"role": "king", "content": "a"}]},
            {"messages": [{"role": ["user"], "content": "a"}]},
            {"messages": [{"role": "assistant", "content": "a"}]},
            {"prompt": ""},
            {"prompt": "a", "kind": "arithmetic", "answer": "x"},
            {"prompt": "a", "kind": 5},
            {"prompt": "\ud800"},
            {"context": "\udfff", "continuation": "a"},
            {"query": "a", "choices": ["b", "\ud800"], "gold": 0},
        )
    ),
]


@pytest.mark.parametrize("number", range(len(WRONG_ROWS)))
def test_tasks_and_prompts(number, place):
    (place / "rows.jsonl").write_bytes(WRONG_ROWS[number])
    refuses(lambda: load_task("t", "rows.jsonl"), "task t")
    refuses(lambda: load_prompts("rows.jsonl"), "prompts")


# ---- arguments

PATHS = ["none", "true", "int", "empty", "nul", "half", "long", "bytes", "list", "dict", "object"]
NOT_A_CONFIG = ["true", "int", "word", "bytes", "list", "dict", "object"]
# for each public function the kinds that no argument of that name can be; what is not given has a right value
ARGUMENTS = {
    "from_pretrained": {
        "model_or_path": ["none", "true", "int", "float", "empty", "nul", "half", "long", "bytes", "list", "dict"],
        "file_name": ["true", "int", "bytes", "list", "dict"],
        "tokenizer": ["true", "int", "bytes", "list", "dict", "object"],
        "revision": ["true", "int", "bytes", "list", "empty", "nul", "half", "long"],
        "token": ["int", "bytes", "list"],
        "dtype": ["none", "int", "bytes", "list", "word"],
        "trust_remote_code": ["none", "int", "word"],
        "use_safetensors": ["none", "int", "word"],
        "quiet": ["none", "int", "word"],
        "device_map": ["true", "float", "empty", "word", "nul", "half", "long", "bytes", "list", "object"],
        "attn_implementation": ["true", "int", "word", "nul", "half", "long", "bytes", "list"],
        "cache_dir": ["true", "int", "nul", "half", "long", "bytes", "list", "dict"],
    },
    "prune": {
        "copy": ["none", "int", "word"],
        "config": NOT_A_CONFIG,
        "save_directory": [kind for kind in PATHS if kind != "none"],
        "overwrite": ["int", "word"],
    },
    "search": {"config": NOT_A_CONFIG},
    "tune": {"config": NOT_A_CONFIG},
    "cut": {
        "copy": ["none", "int", "word"],
        "segments": ["true", "int", "word", "bytes", "list", "dict", "set", "object", "none"],
    },
    "quantize": {
        "save_directory": PATHS,
        "weights": ["none", "int", "word", "list"],
        "overwrite": ["int", "word"],
        "file_prefix": ["word"],
    },
    "export": {"save_directory": PATHS, "overwrite": ["none", "int", "word"]},
    "evaluate": {
        "text": ["true", "int", "float", "bytes", "dict", "set", "object", "nul", "empty", "half"],
        "tasks": ["int", "word", "list", "dict", "bytes"],
        "num_sequences": ["true", "float", "word", "negative"],
        "task_limit": ["true", "float", "word", "negative"],
        "generation": ["int", "word"],
        "file_name": ["int", "bytes", "word"],
        "reference": ["int", "bytes", "list", "dict"],
    },
    "save_pretrained": {"save_directory": PATHS, "push_to_hub": ["int", "word"], "overwrite": ["int", "word"]},
    "push_to_hub": {"repo_id": ["none", "int", "word", "nul", "long", "bytes", "list", "half"]},
}
RIGHT = {
    "from_pretrained": "model_or_path",
    "quantize": "save_directory",
    "export": "save_directory",
    "save_pretrained": "save_directory",
}


@pytest.mark.parametrize(
    ("function", "argument", "kind"),
    [
        pytest.param(function, argument, kind, id=f"{function}-{argument}-{kind}")
        for function, arguments in ARGUMENTS.items()
        for argument, kinds in arguments.items()
        for kind in kinds
    ],
)
def test_arguments_of_the_pruner(function, argument, kind, pruner, saved, place):
    needed = RIGHT.get(function)
    given = {argument: KINDS[kind]}
    if needed and needed != argument:
        given[needed] = str(saved) if function == "from_pretrained" else "out"
    if function in ("quantize", "export", "tune", "save_pretrained"):
        pruner.cut([(1, 2)])
    if function == "evaluate" and argument == "task_limit":
        given |= {"tasks": {"t": [{"context": "a", "continuation": "b"}]}}
    refuses(lambda: getattr(pruner, function)(**given))


def test_every_argument_of_the_pruner_is_in_the_table():
    for function, method in inspect.getmembers(CLPPruner, callable):
        if not function.startswith("_"):
            found = inspect.signature(method).parameters.values()
            named = {p.name for p in found if p.name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD}
            assert named == set(ARGUMENTS.get(function, ())), function


@pytest.mark.parametrize("argument", ["cache_dir", "token", "session_options"])
@pytest.mark.parametrize("kind", ["int", "float", "bytes", "list", "dict", "object"])
def test_more_arguments_of_the_onnx_model(argument, kind, saved, place):
    refuses(lambda: OnnxCausalLM.from_pretrained(saved, **{argument: KINDS[kind]}), argument)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"none"}))
def test_dtypes_of_a_plan(kind, place):
    refuses(lambda: plan_pruning(tiny_config(), dtype=KINDS[kind]), "dtype")


@pytest.mark.parametrize("name", ["model", "tokenizer", "config", "report", "pruned_model", "segments", "quiet"])
@pytest.mark.parametrize("kind", ["int", "bytes", "list", "true"])
def test_arguments_of_the_pruners_constructor(name, kind, place):
    if name == "quiet" and kind == "true" or name == "segments" and kind == "list":
        pytest.skip("right")
    refuses(lambda: CLPPruner(**{"model": None, name: KINDS[kind]}))


SEGMENTS = [
    5,
    None,
    "ab",
    [5],
    ["ab"],
    [(1,)],
    [(1, 2, 3)],
    [("a", "b")],
    [(2, 1)],
    [(-1, 2)],
    [(0, 9)],
    [(0, 4)],
    [],
    [(1, 3), (2, 4)],
]
SEGMENTS += [[True], [(True, 2)], [(1.0, 2.0)], [(0, HUGE)], [None], [{}], {1: 2}, b"ab", [(1, 1)]]


@pytest.mark.parametrize("number", range(len(SEGMENTS)))
def test_segments(number, place):
    refuses(lambda: check_segments(SEGMENTS[number], 4), "segment")


@pytest.mark.parametrize("bounds_", [(None, 1), ("0", 1), (0.0, 1.0), (True, 2), (3, 3), (-1, 2), (0, float("nan"))])
def test_bounds_of_a_segment(bounds_, place):
    refuses(lambda: LayerSegment(*bounds_), "segment")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_public_functions(kind, saved, place):
    value = KINDS[kind]
    calls = [
        lambda: load_tokenizer(value) if isinstance(value, str) else load_model(value),
        lambda: load_quantized(value),
        lambda: OnnxCausalLM.from_pretrained(value),
        lambda: plan_pruning(value),
        lambda: plan_pruning(tiny_config(), value if value is not None else 5),
        lambda: CLPConfig.from_dict(value) if kind != "dict" else CLPConfig.from_dict({5: 5}),
        lambda: CLPConfig.from_pretrained(value),
        lambda: CLPConfig.from_file(value),
        lambda: read_recipe(value),
        lambda: open_speakers(value, quiet=True),
        lambda: CLPReport.from_dict(value),
        lambda: load_task("t", value),
        lambda: load_prompts(value if value is not None else 5),
    ]
    for call in calls:
        refuses(call)


@pytest.mark.parametrize("kind", ["true", "int", "float", "word", "bytes", "list", "dict", "object", "none"])
@pytest.mark.parametrize("name", ["file_name", "num_threads", "providers", "revision"])
def test_arguments_of_the_onnx_model(name, kind, saved, place):
    if kind == "none" and name != "file_name":
        pytest.skip("right")
    refuses(lambda: OnnxCausalLM.from_pretrained(saved, **{name: KINDS[kind]}))


# ---- command lines

NUMBERS = ["x", "nan", "inf", "-1", "9" * 5000, "", "1e999", "\0", LONG]


# of each command the options that name something outside of it; each is read before any work
PATH_OPTIONS = {
    "prune": [
        "--model",
        "--tokenizer",
        "--device",
        "--dtype",
        "--revision",
        "--config",
        "--text-cache-dir",
        "--tasks-dir",
    ],
    "search": ["--model", "--attn-implementation", "--dataset"],
    "evaluate": ["--file", "--reference", "--dataset", "--prompts", "--device-map"],
    "recipe": ["--model", "--revision", "--dtype", "--config"],
    "chat": ["--dense", "--file", "--tokenizer", "--device", "--dtype", "--attn-implementation"],
}


def command_lines():
    options = [setting for setting in all_settings().values() if setting.rule.parse in (int, float)]
    for index, setting in enumerate(options):
        yield (
            f"{setting.flag}-{index % len(NUMBERS)}",
            ["prune", "--model", "model", f"{setting.flag}={NUMBERS[index % len(NUMBERS)]}", "out"],
        )
    for command in ("prune", "search", "tune", "quantize", "export", "evaluate"):
        output = [] if command == "evaluate" else ["out"]
        for number, line in enumerate(
            (
                [],
                ["--model"],
                ["--model", ""],
                ["--model", "no/such/model/here"],
                ["--model", "\0"],
                ["--model", LONG],
                ["--model", "model", "--config", "none.json"],
                ["--model", "model", "--config", "\0"],
                ["--model", "model", "--seed", str(2**64)],
                ["--model", "model", "--no-such-option", "SECRET"],
            )
        ):
            yield f"{command}-{number}", [command, *line, *output]
    for number, line in enumerate((["\0"], [LONG], ["x" * 300], [""], ["."], ["/"], ["model"], ["\udce9"])):
        yield f"output-{number}", ["prune", "--model", "model", *line]
    for command, *words in (
        ("finish",),
        ("finish", "--model", "model"),
        ("recipe",),
        ("recipe", "model", "--model", "model"),
        ("recipe", "model", "--target", "moon"),
        ("recipe", "model", "--target-size-mb", "1e-9"),
        ("recipe", "model", "-o", "recipe.json"),
        ("recipe", "model", "-o", "no/such/folder.yaml"),
        ("chat",),
        ("chat", "model", "--model", "model"),
        ("chat", "model", "--no-browser", "--max-new-tokens", "0"),
        ("chat", "model", "--no-browser", "--temperature", "1e-320"),
        ("prune", "--model", "model", "--max-memory", "1KB", "--dry-run"),
    ):
        yield " ".join([command, *words]), [command, *words]
    for command, options in PATH_OPTIONS.items():
        for option in options:
            for kind in ("nul", "half", "long", "name"):
                # a branch may have such a name, and a run goes on without a cache that cannot be made
                if kind == "name" and option in ("--revision", "--text-cache-dir"):
                    continue
                value = "y" * 300 if kind == "name" else KINDS[kind]
                words = [command, "model"] if command in ("recipe", "chat") else [command, "--model", "model"]
                words += ["--no-browser"] if command == "chat" else ["out"] if command in ("prune", "search") else []
                yield f"{command} {option} {kind}", [*words, f"{option}={value}"]


LINES = dict(command_lines())


@pytest.mark.parametrize("name", LINES)
def test_command_lines(name, saved, place, capsys):
    (place / "model").symlink_to(saved)
    before = files(place)
    try:
        status = main(LINES[name])
    except SystemExit as stopped:
        status = stopped.code
    told = capsys.readouterr()
    assert status in (1, 2) and told.out == ""
    assert "unexpected" not in told.err and "Traceback" not in told.err and "SECRET" not in told.err
    assert "error: " in told.err and LONG not in told.err and "9" * 400 not in told.err
    assert files(place) == before
    COUNTED.append(1)


def test_there_are_enough_of_them(request):
    """Of a whole run of this file; a part of it has fewer."""
    ran = sum(item.path == request.path for item in request.session.items)
    if ran > 800:
        assert sum(COUNTED) >= 700
