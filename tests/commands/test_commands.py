import errno
import json
import re
import subprocess
import sys

import pytest
from report_example import example_report, older_report

from optimum_clp.commands.clp import COMMANDS, main
from optimum_clp.commands.search import scored_segments
from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.errors import ModelError, OutputError, Problem
from optimum_clp.evaluation.tasks import load_task
from optimum_clp.report.legend import WORDS
from optimum_clp.report.report import CLPReport
from optimum_clp.segments import LayerSegment
from optimum_clp.version import __version__


def names(pruner):
    return [call[0] for call in pruner.calls]


def error_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("optimum-clp: error: ")]
    return line


def test_prune_runs_everything_and_prints_the_table(pruner, tmp_path, capsys):
    assert main("prune --model some/model --pruning-ratio 0.3 --dataset d.txt --epochs 2 out".split()) == 0
    (loaded, pruned) = pruner.calls
    assert loaded[1] == "some/model" and loaded[2]["quiet"] is False
    _, config, folder, options = pruned
    assert config == CLPConfig(pruning_ratio=0.3, calibration_dataset="d.txt", tuning={"epochs": 2})
    assert folder == tmp_path / "out" and options == {"overwrite": False}
    captured = capsys.readouterr()
    assert captured.out == f"{example_report().to_table()}\nWritten to out.\n"
    assert "library noise on stdout" in captured.err and "library noise on stderr" in captured.err


FAILED = [{"stage": "plots", "error": "RuntimeError: no font", "command": "optimum-clp finish --model out"}]


@pytest.mark.parametrize("command", ["prune --model m", "tune --model cut"])
def test_a_stage_that_failed_is_named_and_the_status_is_3(command, pruner, monkeypatch, capsys):
    monkeypatch.setattr(CLPReport, "failures", FAILED, raising=False)
    real = CLPReport.__init__

    def failed(report, *args, **options):
        real(report, *args, **{**options, "failures": FAILED})

    monkeypatch.setattr(CLPReport, "__init__", failed)
    assert (
        main(f"{command} --quiet --push-to-hub me/m out".split() if "prune" in command else f"{command} out".split())
        == 3
    )
    out = capsys.readouterr().out
    assert (
        "Failed: plots (RuntimeError: no font)\n  repeat it with: optimum-clp finish --model out\nWritten to out."
        in out
    )
    assert "push_to_hub" not in names(pruner)


def test_finish_does_again_what_failed(pruner, capsys):
    assert main("finish --model cut --quiet".split()) == 0
    assert names(pruner) == ["from_pretrained", "finish"]
    assert capsys.readouterr().out == f"{example_report().to_table()}\nWritten to cut.\n"


def caused_by(cause):
    error = ModelError(Problem("model", "m", "it could not be read (can't start new thread)", "Fetch it again"))
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("std::bad_alloc"),
        caused_by(RuntimeError("can't start new thread")),
    ],
)
def test_too_little_memory_is_said_in_words(error, pruner, capsys):
    pruner.fails_with = error
    assert main("prune --model m --quiet out".split()) == 1
    assert "memory is used up: this process may have no more (" in error_of(capsys)


def test_a_current_folder_that_was_deleted_is_said_at_once(pruner, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(f"prune --model m --quiet {tmp_path / 'out'}".split()) == 1
    assert "current folder is None: it was deleted, and the libraries cannot be loaded" in error_of(capsys)
    assert pruner.calls == []


def test_loading_options_are_passed_on(pruner):
    line = (
        "prune --model m --dtype bfloat16 --device-map cpu --revision main --trust-remote-code --no-safetensors "
        "--tokenizer t --token hf_secret123456 --attn-implementation eager --model-cache-dir models "
        "--quiet --push-to-hub me/m out"
    )
    assert main(line.split()) == 0
    assert pruner.calls[0][2] == {
        "tokenizer": "t",
        "dtype": "bfloat16",
        "device_map": "cpu",
        "revision": "main",
        "token": "hf_secret123456",
        "trust_remote_code": True,
        "use_safetensors": False,
        "attn_implementation": "eager",
        "cache_dir": "models",
        "quiet": True,
    }
    assert pruner.calls[-1] == ("push_to_hub", "me/m", {"token": "hf_secret123456"})


def test_remote_code_and_pickles_are_off_by_default(pruner):
    assert main("prune --model m out".split()) == 0
    assert pruner.calls[0][2]["trust_remote_code"] is False
    assert pruner.calls[0][2]["use_safetensors"] is True


def test_json_is_the_only_thing_on_standard_output(pruner, capsys):
    assert main("prune --model m --json out".split()) == 0
    assert json.loads(capsys.readouterr().out) == example_report().to_dict()


def test_quiet_leaves_standard_error_empty(pruner, capsys):
    assert main("prune --model m --quiet out".split()) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "noise" not in captured.out and "perplexity" in captured.out


def test_config_file_is_overridden_by_options(pruner, tmp_path):
    CLPConfig(pruning_ratio=0.4, seed=3, tuning={"epochs": 9}).save_pretrained(tmp_path / "recipe")
    for given in ("recipe", "recipe/clp_config.json"):
        pruner.calls.clear()
        assert main(f"prune --model m --config {given} --epochs 1 --overwrite out".split()) == 0
        config = pruner.calls[-1][1]
        assert (config.pruning_ratio, config.seed, config.tuning.epochs) == (0.4, 3, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--config is 'r.json': it cannot be read \(No such file"),
        ("{", r"--config is 'r.json': it is not valid JSON \("),
        ("[]", r"--config is 'r.json': it holds no settings"),
        ('{"tuning": 3}', "tuning is 3: it must be a TuningConfig or a dict"),
        ('{"prunning_ratio": 0.2}', "prunning_ratio is 0.2: .* Did you mean 'pruning_ratio'?"),
    ],
)
def test_bad_config_file_is_one_message(content, message, pruner, tmp_path, capsys):
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    assert main("prune --model m --config r.json --epochs 3 out".split()) == 1
    assert re.search(message, error_of(capsys))
    assert pruner.calls == []


def test_search_prints_the_scores_best_first(pruner, capsys, tmp_path):
    assert main("search --model m --strategy exhaustive".split()) == 0
    assert pruner.calls[-1][1].search.strategy == "exhaustive"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layers", "KL", "to", "dense", "std.", "error", "rows", "behind"]
    assert lines[1].split() == ["7:10", "0.41000", "0.02000", "32", "<-", "chosen"]
    assert lines[2].split() == ["8:11", "0.44000", "0.02000", "32", "+0.03000", "±", "0.02500"]
    assert [line.split()[0] for line in lines[3:5]] == ["6:9", "9:12"]
    assert len(lines) == 1 + 14 + 2 + 1 and lines[-3].startswith("  KL to dense: ")
    assert lines[-1] == (
        "3 of 16 layers by strategy auto (used gate), 8,192 tokens in all rows, "
        "4.1 forward-equivalents of work: --segment 7:10"
    )
    assert list(tmp_path.iterdir()) == []


def test_search_ranks_by_the_rows_in_common_and_shows_several_segments():
    search = example_report().search
    chosen = search["scored"][7]
    worse = {**chosen, "start": 2, "stop": 9, "segments": [[2, 4], [8, 9]], "kl": 0.3, "behind": 0.2, "num_rows": 4}
    equal = {**chosen, "start": 0, "stop": 3, "segments": [[0, 3]], "kl": float("nan"), "behind": float("nan")}
    search["scored"] = [
        equal,
        worse,
        {**chosen, "segments": [[5, 7], [9, 10]], "start": 5, "standard_error": float("nan")},
    ]
    search["segments"] = [[5, 7], [9, 10]]
    lines = [line.split() for line in scored_segments(search).splitlines()]
    assert lines[1] == ["5:7,9:10", "0.41000", "-", "32", "<-", "chosen"], "0.3 was measured on easier rows"
    assert lines[2][:4] == ["2:4,8:9", "0.30000", "0.02000", "4"] and lines[3] == ["0:3", "-", "0.02000", "32", "-"]
    assert lines[-1][-4:] == ["--segment", "5:7", "--segment", "9:10"]


def test_search_shows_the_best_of_many_and_the_chosen_one():
    search = example_report().search
    template = search["scored"][7]
    search["scored"] = [
        {**template, "start": i, "stop": i + 3, "segments": [[i, i + 3]], "behind": 0.1 * (i - 29)} for i in range(30)
    ]
    search["segments"] = [[29, 32]]
    lines = scored_segments(search).splitlines()
    assert [line.split()[0] for line in lines[1:-4]] == [f"{i}:{i + 3}" for i in (*range(20), 29)]
    assert lines[-5].endswith("<- chosen") and lines[-4].startswith("9 more in the report")


def test_search_shows_the_numbers_of_layers_that_were_tried():
    search = example_report().search
    search["lengths"] = [
        {"num_removed": n, "segments": [[7, 7 + n]], "perplexity_increase": increase, "fits": n < 4}
        for n, increase in ((3, 0.081), (4, 0.5), (8, float("inf")))
    ]
    line = scored_segments(search).splitlines()[-2]
    assert line.endswith("perplexity: 3 (+8.1%), 4 (+50.0%, too much), 8 (-, too much)")


def test_search_shows_what_an_older_report_has():
    lines = scored_segments(older_report().search).splitlines()
    assert lines[1].split() == ["7:10", "0.41000", "0.02000", "-", "<-", "chosen"]
    assert lines[2].split() == ["8:11", "0.44000", "0.02000", "-", "-"]
    assert lines[-1].endswith("strategy gate, 8,192 tokens in all rows: --segment 7:10")


def test_search_writes_recipe_and_report(pruner, tmp_path, capsys):
    assert main("search --model m --seed 4 out".split()) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clp_config.json", "clp_report.json"]
    assert CLPConfig.from_pretrained(tmp_path / "out").seed == 4
    assert json.loads((tmp_path / "out" / "clp_report.json").read_text())["search"]["segments"] == [[7, 10]]
    assert capsys.readouterr().out.endswith("Written to out.\n")


def test_tune_cuts_a_dense_model_first(pruner, tmp_path, capsys):
    assert main("tune --model m --segment 7:9 --segment 11:12 --loss ce --overwrite out".split()) == 0
    assert names(pruner) == ["from_pretrained", "cut", "tune", "save_pretrained"]
    assert pruner.calls[1][1] == [LayerSegment(7, 9), LayerSegment(11, 12)]
    assert pruner.calls[2][1].tuning.loss == "ce"
    assert pruner.calls[3][1:] == (tmp_path / "out", {"overwrite": True})
    assert (
        "Validation loss 0.41000 -> 0.10060 nats per token in 96 steps (stopped: finished)" in capsys.readouterr().out
    )


def test_tune_starts_from_the_recipe_of_a_folder(pruner):
    assert main("tune --model cut --epochs 2 out".split()) == 0
    assert names(pruner) == ["from_pretrained", "tune", "save_pretrained"]
    config = pruner.calls[1][1]
    assert (config.pruning_ratio, config.seed, config.tuning.epochs) == (0.3, 5, 2)


def test_quantize_writes_a_quanto_folder(pruner, tmp_path, capsys):
    assert main("quantize --model cut --weights int4 out".split()) == 0
    assert pruner.calls[-1] == ("quantize", tmp_path / "out", {"weights": "int4", "overwrite": False})
    assert "91 modules quantized, 4.80 MB" in capsys.readouterr().out


def test_export_uses_the_options(pruner, tmp_path, capsys):
    assert main("export --model cut --opset 22 --weights int4 out".split()) == 0
    _, config, folder, options = pruner.calls[-1]
    assert (config.export.opset, config.quantization.weights, config.seed) == (22, ["int4"], 5)
    assert folder == tmp_path / "out" and options == {"overwrite": False}
    assert "onnx/model_q4.onnx         int4       2.10 MB" in capsys.readouterr().out


def test_evaluate_measures_a_file_against_the_dense_model(pruner, capsys):
    line = (
        "evaluate --model cut --file onnx/model_q4.onnx --dataset d.txt --sequence-length 32 --reference dense --json"
    )
    assert main(line.split()) == 0
    options = {"reference": "dense", "file_name": None, "tasks": None, "task_limit": None, "generation": None}
    assert pruner.calls[-1] == ("evaluate", "d.txt", {"num_sequences": None, **options})
    assert pruner.calls[0][2]["file_name"] == "onnx/model_q4.onnx"
    assert json.loads(capsys.readouterr().out) == {"name": "cut", "perplexity": 12.5, "num_tokens": 6120, "kl": 0.41}
    main(f"{line} --test-sequences 7".split())
    assert pruner.calls[-1] == ("evaluate", "d.txt", {"num_sequences": 7, **options})


OF_TASKS = "".join(f"  {title}: {WORDS[title]}\n" for title in ("accuracy", "plain", "chance"))


def test_evaluate_prints_one_figure_a_line(pruner, capsys):
    assert main("evaluate --model cut".split()) == 0
    assert pruner.calls[-1][1] is None, "a folder of ours is measured on the text of its report"
    assert capsys.readouterr().out == (
        f"name        cut\nperplexity  12.5\nnum_tokens  6,120\n  perplexity: {WORDS['perplexity']}\n"
    )


def test_evaluate_of_another_model_needs_a_text(pruner, capsys):
    assert main("evaluate --model m".split()) == 1
    assert "--dataset is None: m has no clp_report.json" in error_of(capsys)


@pytest.mark.parametrize(("met", "status"), [(False, 4), (True, 0)])
def test_prune_exits_with_4_where_the_model_falls_short(met, status, pruner, monkeypatch, capsys):
    def prune(self, config=None, save_directory=None, *, overwrite=False):
        self._stage("prune", config, save_directory, overwrite=overwrite)
        entry = {"name": "retention", "required": 0.9, "reached": 0.8, "row": "tuned", "met": met}
        self.report = example_report()
        self.report.evaluation["requirements"] = [entry]

    monkeypatch.setattr(pruner, "prune", prune)
    assert main("prune --model m --require-retention 0.9 --push-to-hub me/m out".split()) == status
    assert pruner.calls[1][1].evaluation.require_retention == 0.9
    out = capsys.readouterr().out
    assert ("Not uploaded: it falls short of what was required." in out) is not met
    assert ("push_to_hub" in names(pruner)) is met
    assert ("Falls short: retention 0.800 (tuned), at least 0.9 was required." in out) is not met


def test_a_task_list_may_stand_before_the_output_folder(pruner, tmp_path):
    assert main("prune --model m --tasks a=a.jsonl b=b.jsonl out".split()) == 0
    config, folder = pruner.calls[1][1:3]
    assert config.evaluation.task_files() == {"a": "a.jsonl", "b": "b.jsonl"} and folder == tmp_path / "out"


def test_what_is_required_must_be_measured(pruner, capsys):
    assert main("prune --model m --require-generation 0.8 --no-generation out".split()) == 1
    assert "evaluation.require_generation is 0.8: generation is not measured. Leave it out" in error_of(capsys)


def write_tasks(folder):
    (folder / "words.jsonl").write_text('{"context": "a b", "continuation": "c"}\n')
    (folder / "piqa.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 1}\n')


def test_evaluate_prints_a_line_for_each_task(pruner, tmp_path, capsys):
    write_tasks(tmp_path)
    line = "evaluate --model m --tasks lambada=words.jsonl piqa=piqa.jsonl --limit 5 --batch-size 3 --reference dense"
    assert main(line.split()) == 0
    tasks = [load_task("lambada", "words.jsonl"), load_task("piqa", "piqa.jsonl")]
    options = {"reference": "dense", "file_name": None, "tasks": tasks, "task_limit": 5, "generation": None}
    options["num_sequences"] = None
    assert pruner.calls[-1] == ("evaluate", None, options)
    assert capsys.readouterr().out == (
        "task     examples  accuracy  std. error   plain  chance  perplexity   dense\n"
        "lambada     1,838    0.6180      0.0123  0.6000  0.0000     15.2500  0.7000\n"
        "piqa        1,838    0.6180      0.0123  0.6000  0.5000           -  0.7000\n"
        f"{OF_TASKS}"
    ), "the column of what no task has is left out"


def test_evaluate_prints_figures_and_tasks(pruner, tmp_path, capsys):
    write_tasks(tmp_path)
    assert main("evaluate --model m --dataset d.txt --tasks any=piqa.jsonl".split()) == 0
    assert capsys.readouterr().out == (
        f"name        cut\nperplexity  12.5\nnum_tokens  6,120\n  perplexity: {WORDS['perplexity']}\n\n"
        "task  examples  accuracy  std. error   plain  chance\n"
        "any      1,838    0.6180      0.0123  0.6000  0.5000\n"
        f"{OF_TASKS}"
    )
    assert main("evaluate --model m --tasks any=piqa.jsonl --json".split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["tasks"] and result["tasks"]["any"]["accuracy_stderr"] == 0.0123


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("t=gone.jsonl", "task t is 'gone.jsonl': it cannot be read (No such file or directory)"),
        ("t=bad.jsonl", "task t is 'bad.jsonl': line 1 has the keys ['query']"),
        (
            "t=piqa.jsonl t=words.jsonl",
            "evaluation.tasks is ['t=piqa.jsonl', 't=words.jsonl']: it must be a list of tasks of lm-eval and "
            "of NAME=FILE, each name once. Give for example ['piqa=piqa.jsonl', 'arc_easy'].",
        ),
        (
            "t=piqa.jsonl --limit 0",
            "evaluation.task_limit is 0: it must be a whole number from 1 to 2147483647, or None.",
        ),
        (
            "t=piqa.jsonl --prompts gone.jsonl",
            "prompts is 'gone.jsonl': it cannot be read (No such file or directory).",
        ),
        ("--limit 3", "--limit is 3: there is no task to limit. Give --tasks."),
        (
            "t=piqa.jsonl --num-fewshot 5",
            "--num-fewshot is 5: it is for tasks of lm-eval, and none is named; tasks in files are asked as they stand. Name",
        ),
        ("--apply-chat-template", "--apply-chat-template is True: it is for tasks of lm-eval, and none is named"),
        ("--tasks-dir own", "--tasks-dir is 'own': it is for tasks of lm-eval, and none is named"),
    ],
)
def test_bad_tasks_are_reported_before_loading(given, message, pruner, tmp_path, capsys):
    write_tasks(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"query": "q"}\n')
    option = "" if given.startswith("--") else "--tasks "
    assert main(f"evaluate --model cut {option}{given}".split()) == 1
    assert message in error_of(capsys)
    assert pruner.calls == []


@pytest.mark.parametrize(
    "line",
    [
        "evaluate --model m --tasks arc_easy",
        "prune --model m --tasks arc_easy out",
        "tune --model cut --tasks arc_easy out",
    ],
)
def test_a_task_without_lm_eval_is_reported_before_loading(line, pruner, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(line.split()) == 1
    assert (
        "task is 'arc_easy': without =FILE it is a task of lm-eval, which is not installed. "
        "pip install 'optimum-clp[tasks]', or give its examples as a file"
    ) in error_of(capsys)
    assert pruner.calls == []


@pytest.mark.parametrize("given", ["piqa.jsonl", "=piqa.jsonl", "piqa=", "tasks/piqa", "a=a.jsonl piqa.jsonl"])
def test_tasks_are_names_and_files(given, pruner, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(f"evaluate --model m --tasks {given}".split())
    assert stopped.value.code == 2
    given = given.split()[-1]
    assert f"{given!r} is not the name of a task, or NAME=FILE, such as piqa=piqa.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tune", "quantize", "export"])
def test_dense_model_without_segment_is_refused(command, pruner, capsys):
    assert main([command, "--model", "m", "out"]) == 1
    assert "--segment is None: m is a dense model" in error_of(capsys)
    assert names(pruner) == ["from_pretrained"]


def test_segment_of_a_model_that_is_already_cut_is_refused(pruner, capsys):
    assert main("tune --model cut --segment 2:3 out".split()) == 1
    assert "--segment is '[2, 3)': cut is already cut" in error_of(capsys)


def test_segment_that_is_empty_is_refused_before_loading(pruner, capsys):
    assert main("tune --model m --segment 8:4 out".split()) == 1
    assert "segment is (8, 4): a segment is a half-open range" in error_of(capsys)
    assert pruner.calls == []


def test_every_mistake_in_the_options_is_reported_before_loading(pruner, capsys):
    for command in ("prune", "tune"):
        assert main(f"{command} --model m --epochs 0 --batch-size 0 out".split()) == 1
        captured = capsys.readouterr().err
        assert captured.startswith("optimum-clp: error: 2 problems:")
        assert "tuning.epochs is 0" in captured and "tuning.batch_size is 0" in captured
        assert pruner.calls == []


@pytest.mark.parametrize("command", ["prune", "search", "tune", "quantize", "export"])
def test_output_folder_that_is_not_empty_is_refused_before_loading(command, pruner, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert main([command, "--model", "m", "out"]) == 1
    assert "output folder is 'out': it is not empty" in error_of(capsys)
    assert pruner.calls == []
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_output_folder_that_holds_the_model_is_refused(pruner, tmp_path, capsys):
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.json").write_text("{}")
    for output in ("models/m", "models"):
        assert main(f"export --model models/m --segment 1:2 --overwrite {output}".split()) == 1
        assert f"output folder is '{output}': --model is read from there" in error_of(capsys)
    assert pruner.calls == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModelError(Problem("model", "m", "it is broken", "Mend it")), "model is 'm': it is broken. Mend it."),
        (
            OutputError(Problem("output folder", "o", "it is full", "Empty it")),
            "output folder is 'o': it is full. Empty it.",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "w.bin"),
            "No space left on device: 'w.bin'. Free some space",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "w.bin"), "[Errno 13] Permission denied: 'w.bin'"),
        (RuntimeError("shape '[3]' is invalid"), "unexpected RuntimeError: shape '[3]' is invalid"),
    ],
)
@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_error_is_one_message_and_status_1(error, message, quiet, pruner, capsys):
    pruner.fails_with = error
    assert main(["prune", "--model", "m", *quiet, "out"]) == 1
    assert message in error_of(capsys)


def test_debug_shows_the_traceback(pruner, capsys):
    pruner.fails_with = RuntimeError("shape")
    assert main("prune --model m --debug out".split()) == 1
    captured = capsys.readouterr().err
    assert (
        "Traceback (most recent call last)" in captured and "optimum-clp: error: unexpected RuntimeError" in captured
    )


def test_interrupt_is_status_130(pruner, capsys):
    pruner.fails_with = KeyboardInterrupt()
    assert main("prune --model m --quiet out".split()) == 130
    assert capsys.readouterr().err == "optimum-clp: interrupted\n"


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("recipe", "search", "evaluate", "finish", "chat")])
def test_missing_output_is_a_usage_error(name, pruner, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--model", "m", "--quiet"])
    assert stopped.value.code == 2
    assert "the following arguments are required: OUTPUT" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["", "prune out", "dance --model m", "prune --model m --epochs many out"])
def test_usage_errors_are_status_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    assert "usage: optimum-clp" in capsys.readouterr().err


def test_example_in_the_help_is_valid():
    from optimum_clp.commands.clp import build_parser

    for name, command in COMMANDS.items():
        args = build_parser().parse_args(command.EXAMPLE.split()[1:])
        assert args.command == name


def test_a_token_is_never_shown(pruner, capsys):
    pruner.fails_with = ValueError("bad credentials: hf_secret123456 and a-plain-secret")
    for secret in ("hf_secret123456", "a-plain-secret"):
        for debug in ([], ["--debug"]):
            assert main(["prune", "--model", "m", "--token", secret, *debug, "out"]) == 1
            captured = capsys.readouterr()
            assert secret not in captured.err and "***" in captured.err and secret not in captured.out


def test_an_upload_that_fails_leaves_the_answer_and_says_so(pruner, capsys, monkeypatch):
    def refused(self, repo_id, **options):
        raise OutputError.of("repo_id", repo_id, "the Hub could not be reached", "Upload later")

    monkeypatch.setattr(pruner, "push_to_hub", refused)
    assert main("prune -m m --push-to-hub me/m out".split()) == 3
    said = capsys.readouterr()
    words = "repo_id is 'me/m': the Hub could not be reached. Upload later."
    assert said.out.endswith(f"Written to out. Not uploaded: {words}\n") and "perplexity" in said.out
    assert f"optimum-clp: error: not uploaded: {words}" in said.err


def test_a_private_repository_and_a_device(pruner, capsys):
    assert main("prune -m m --device cuda:1 --quiet --push-to-hub me/m --private out".split()) == 0
    assert pruner.calls[-1] == ("push_to_hub", "me/m", {"private": True})
    assert pruner.calls[0][2]["device_map"] == "cuda:1"
    capsys.readouterr()
    assert main("prune -m m --private out".split()) == 1
    assert "--private is None: nothing is uploaded. Give --push-to-hub as well" in error_of(capsys)


def test_the_package_is_a_program():
    done = subprocess.run([sys.executable, "-m", "optimum_clp", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"optimum-clp {__version__}\n")


def test_a_repository_that_cannot_be_is_told_before_any_work(pruner, capsys):
    assert main(["prune", "--model", "m", "--push-to-hub", "no/such/name", "out"]) == 1
    assert "repo_id is 'no/such/name': no repository of the Hub can have this name. Give for" in error_of(capsys)
    assert pruner.calls == []


def test_search_asks_for_no_test_rows(pruner):
    assert main("search --model m --train-sequences 500 --search-sequences 20 --test-sequences 9 out".split()) == 0
    ((_, config, _),) = [call for call in pruner.calls if call[0] == "search"]
    text = config.calibration
    assert (text.train_sequences, text.validation_sequences, text.test_sequences) == (500, 24, 1)
    # what is written down is the recipe that was given
    assert '"train_sequences": 500' in open("out/clp_config.json").read()
