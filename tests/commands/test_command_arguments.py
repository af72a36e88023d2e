import argparse
import re
from dataclasses import replace

import pytest

from optimum_clp.commands import arguments
from optimum_clp.commands.clp import COMMANDS, build_parser
from optimum_clp.commands.running import load_pruner
from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.configuration.rules import integer
from optimum_clp.configuration.settings import Setting
from optimum_clp.configuration.stages import STAGES, all_settings
from optimum_clp.doors import STRATEGIES
from optimum_clp.precisions import QUANTIZED
from optimum_clp.registry import Row


def parse(line):
    return build_parser().parse_args(line.split())


def values(line, base=None):
    return arguments.configuration_values(parse(line), base or {})


@pytest.mark.parametrize(
    ("line", "weights", "output"),
    [
        ("--weights int8 int4 out", ["int8", "int4"], "out"),
        ("--weights int4 out --json", ["int4"], "out"),
        ("--weights int8,int4 out", ["int8", "int4"], "out"),
        ("--weights int4 --json out", ["int4"], "out"),
        ("out --weights int4", ["int4"], "out"),
        ("--json out", None, "out"),
    ],
)
def test_weights_and_output_in_any_order(line, weights, output):
    args = parse(f"prune --model m {line}")
    assert getattr(args, "quantization.weights") == weights
    assert args.output == output


@pytest.mark.parametrize("line", ["-o out", "--output out", "out", "-o out --weights int4", "--weights int4 -o out"])
def test_the_output_folder_stands_alone_or_behind_an_option(line):
    assert parse(f"prune -m m {line}").output == "out"


@pytest.mark.parametrize("line", ["-o out other", "other -o out", "-o out -o other", "--weights int4 other -o out"])
def test_two_output_folders_are_refused(line, capsys):
    with pytest.raises(SystemExit):
        parse(f"prune -m m {line}")
    assert re.search("'(out|other)' is a second output folder, beside '(out|other)'", capsys.readouterr().err)


def test_words_of_an_option_may_be_joined_by_underscores(capsys):
    line = "prune -m m --pruning_ratio 0.3 --no_tune --max_new_tokens=9 --trust_remote_code out"
    assert values(line) == {"pruning_ratio": 0.3, "tuning": {"enabled": False}, "evaluation": {"max_new_tokens": 9}}
    assert parse(line).trust_remote_code
    with pytest.raises(SystemExit):
        parse("prune --help")
    assert "_ratio" not in capsys.readouterr().out


def test_a_device_is_one_place_and_a_map_several(capsys):
    args = parse("prune -m m --device cuda:1 out")
    assert (args.device, args.device_map) == ("cuda:1", None)
    with pytest.raises(SystemExit):
        parse("prune -m m --device cpu --device-map auto out")
    assert "--device-map: not allowed with argument --device" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_how_models_are_read_and_kept(command, capsys):
    # a recipe comes from the config alone: nothing computes attention
    attention = "" if command == "recipe" else "--attn-implementation eager"
    args = parse(f"{command} -m m {attention} --model_cache_dir models")
    assert getattr(args, "attn_implementation", "eager") == "eager" and args.model_cache_dir == "models"
    assert parse(f"{command} -m m").model_cache_dir is None and not hasattr(args, "cache_dir")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--cache-dir there", "--cache_dir=there", "--cache-dir"])
def test_the_former_name_of_the_texts_cache_is_refused_with_the_new_ones(command, option, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(f"{command} -m m {option}")
    assert stopped.value.code == 2
    assert (
        "argument --cache-dir: there is no such option any more: models from the Hub are kept in --model-cache-dir, "
        "self-written text in --text-cache-dir (the former --cache-dir)"
    ) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(f"{command} --help")
    assert " --cache-dir" not in capsys.readouterr().out


@pytest.mark.parametrize("line", ["--weights int2 out", "--weights int8 out more", "out --weights int8 more"])
def test_unknown_weights_are_refused(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(f"prune --model m {line}")
    assert stopped.value.code == 2
    assert re.search(
        r"--weights: invalid choice: '(int2|out|more)' \(choose from float16, int8, int4, int4_float16\)",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    ("line", "tasks", "output"),
    [
        ("--tasks piqa,arc_easy out", ["piqa", "arc_easy"], "out"),
        ("--tasks piqa arc_easy out", ["piqa", "arc_easy"], "out"),
        ("--tasks piqa a=b.jsonl out", ["piqa", "a=b.jsonl"], "out"),
        ("--tasks a=b,c.jsonl --json out", ["a=b,c.jsonl"], "out"),
        ("--tasks piqa -o out", ["piqa"], "out"),
        ("out --tasks piqa arc_easy", ["piqa", "arc_easy"], "out"),
        ("--tasks piqa,boolq some/folder", ["piqa", "boolq"], "some/folder"),
        ("--tasks piqa x,y", ["piqa", "x", "y"], None),
    ],
)
def test_names_of_tasks_and_output_in_any_order(line, tasks, output):
    args = parse(f"prune --model m {line}")
    assert (getattr(args, "evaluation.tasks"), getattr(args, "output", None)) == (tasks, output)


def test_every_word_is_a_task_where_there_is_no_output():
    args = parse("evaluate -m m --tasks piqa arc_easy mine=m.jsonl --num_fewshot 5 --limit 9 --batch-size 3")
    assert values("evaluate -m m --tasks piqa arc_easy --num_fewshot 5 --limit 9 --batch-size 3") == {
        "evaluation": {"tasks": ["piqa", "arc_easy"], "num_fewshot": 5, "task_limit": 9},
        "search": {"batch_size": 3},
    }
    assert getattr(args, "evaluation.tasks") == ["piqa", "arc_easy", "mine=m.jsonl"]


def test_segments_are_pairs_of_numbers(capsys):
    assert parse("tune --model m --segment 4:8 --segment 10:11 out").segment == [(4, 8), (10, 11)]
    for text in ("4-8", "4:", "4:8:9", "a:b"):
        with pytest.raises(SystemExit):
            parse(f"tune --model m --segment {text} out")
        assert f"{text!r} is not START:STOP, such as 4:8 for the layers 4, 5, 6 and 7" in capsys.readouterr().err


def test_loss_is_a_name_or_weights(capsys):
    assert values("prune --model m --loss ce out")["tuning"] == {"loss": "ce"}
    assert values("prune --model m --loss kd=0.9,ce=0.1 out")["tuning"] == {"loss": {"kd": 0.9, "ce": 0.1}}
    with pytest.raises(SystemExit):
        parse("prune --model m --loss kd=much out")
    assert "'kd=much' is neither a loss nor weights such as kd=0.9,ce=0.1" in capsys.readouterr().err


def test_options_that_are_not_given_say_nothing():
    assert values("prune --model m out") == {}


def test_every_option_reaches_the_configuration():
    line = (
        "prune --model m --pruning-ratio 0.3 --seed 7 --max-memory 24GiB --dataset d.txt --self-written-share 0.2 --conversation-share 0.3 --openings-share 0.1 --mask assistant --text-column body --sequence-length 64 "
        "--train-sequences 9 --validation-sequences 8 --test-sequences 7 --temperature 0.9 --generation-batch-size 4 "
        "--text-cache-dir c --strategy exhaustive --search-sequences 6 --search-batch-size 5 --search-budget 7 "
        "--init fold --train-final-norm --train-head --gradient-accumulation-steps 2 --mixed-precision bf16 "
        "--checkpoint-seconds 9 --cache-memory-gib 1 --report-to tensorboard,wandb --logging-dir l "
        "--num-rescored 3 --search-repair linear_map --loss ce --endpoint-width 2 --overparametrization linear --learning-rate 1e-3 --hidden-learning-rate 2e-3 --hidden-epochs 4 --hidden-batch-size 3 --on-policy-rounds 2 --on-policy-sequences 40 --tuning-tokens 9000 --epochs 5 --batch-size 6 --logit-share 0.5 --patience 7 "
        "--initial-steepness 9 --warmup-ratio 0.5 --weight-decay 0.1 --max-grad-norm 2 --evaluations-per-epoch 3 "
        "--method rtn --bits-per-weight 5 --calibration-sequences 3 --scale-epochs 0 --no-tune --no-export --quanto --weights int4 --group-size 64 --accuracy-level 1 --head-bits 8 --no-quantize-embeddings "
        "--format qdq --opset 22 --tolerance 1e-3 --logits-to-keep 1 --no-float-file "
        "--no-generation --prompts p.jsonl --num-prompts 3 --max-new-tokens 9 --texts c4,other.txt --limit 5 --num-fewshot 4 --apply-chat-template --tasks-dir own --memory-context 99 "
        "--require-retention 0.9 --tasks piqa=p.jsonl arc_easy,boolq out"
    )
    config = CLPConfig.from_dict(values(line))
    default = CLPConfig()
    assert (config.pruning_ratio, config.seed, config.max_memory) == (0.3, 7, "24GiB")
    unchanged = {
        f"{stage}.{key}"
        for stage in STAGES
        for key, value in vars(getattr(config, stage)).items()
        if value == getattr(getattr(default, stage), key)
    }
    # what is required must be measured, what is measured is not given, and standard operators have no 6 bits
    assert unchanged == {"evaluation.require_generation", "quantization.tune_for", "quantization.six_bits"}
    assert values("prune --model m --six-bits out")["quantization"] == {"six_bits": True}
    assert values("prune --model m --require-generation 0.8 out")["evaluation"] == {"require_generation": 0.8}
    assert config.evaluation.tasks == ["piqa=p.jsonl", "arc_easy", "boolq"] and config.evaluation.texts == [
        "c4",
        "other.txt",
    ]


def test_how_many_layers_go_can_be_left_to_a_quality_budget():
    line = "search --model m --pruning-ratio auto --max-perplexity-increase 0.2 --num-segments 3"
    config = CLPConfig.from_dict(values(line))
    assert (config.pruning_ratio, config.perplexity_bound(), config.num_segments) == ("auto", 0.2, 3)
    config = CLPConfig.from_dict(values("search --model m --pruning-ratio auto --min-retention 0.8"))
    assert config.perplexity_bound() == pytest.approx(0.25)


def test_of_ratio_and_size_target_the_one_that_is_given_replaces_the_recipes():
    base = {"pruning_ratio": "auto", "min_retention": 0.9, "target_size_mb": None}
    found = arguments.configuration_values(parse("prune -m m --target-size-mb 60 out"), base)
    assert found == {"pruning_ratio": None, "min_retention": None, "target_size_mb": 60.0}
    base = {"pruning_ratio": None, "target_size_mb": 60.0}
    found = arguments.configuration_values(parse("search -m m --pruning-ratio 0.3"), base)
    assert found == {"pruning_ratio": 0.3, "target_size_mb": None}
    both = "--target-size-mb 60 --pruning-ratio 0.3 --min-retention 0.9"
    found = arguments.configuration_values(parse(f"search -m m {both}"), base)
    assert found == {"pruning_ratio": 0.3, "target_size_mb": 60.0, "min_retention": 0.9}
    found = arguments.configuration_values(
        parse("prune -m m --target-tokens-per-second 90 out"), {"pruning_ratio": 0.2}
    )
    assert found == {"pruning_ratio": None, "target_tokens_per_second": 90.0}


def test_a_form_for_speed_is_the_targets_where_nothing_can_be_measured():
    found = values("prune --model m --target arm --tune-for speed out", {})["quantization"]
    assert found == {"weights": ["int4"], "tune_for": "size", "group_size": 32, "accuracy_level": 4}
    assert values("prune --model m --tune-for speed out", {})["quantization"] == {"tune_for": "speed"}


def test_a_ratio_that_is_no_number_is_told(capsys):
    with pytest.raises(SystemExit):
        parse("prune --model m --pruning-ratio most out")
    assert "'most' is neither a number nor auto" in capsys.readouterr().err


def test_options_override_a_base_and_leave_it_as_it_is():
    base = {"seed": 3, "calibration_dataset": "old.txt", "tuning": {"epochs": 9, "patience": 2}}
    args = parse("prune --model m --epochs 1 --dataset new.txt out")
    assert arguments.configuration_values(args, base) == {
        "seed": 3,
        "tuning": {"epochs": 1, "patience": 2},
        "calibration": {"dataset": "new.txt"},
    }
    assert base == {"seed": 3, "calibration_dataset": "old.txt", "tuning": {"epochs": 9, "patience": 2}}


def _configuration_actions():
    recipe = CLPConfig().to_dict()
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        for action in parser._actions:
            if "." in action.dest or action.dest in recipe:
                yield name, action


def _value(config, name):
    stage, dot, key = name.partition(".")
    return getattr(getattr(config, stage), key) if dot else getattr(config, name)


def test_a_target_stands_between_a_base_and_the_options():
    base = {"export": {"format": "qdq", "opset": 22}, "quantization": {"weights": ["int8"]}}
    found = values("prune --model m --target web --weights int4 out", base)
    assert found["quantization"] == {"weights": ["int4"]}
    assert found["export"] == {"format": "unpacked", "opset": 22, "float_file": False, "logits_to_keep": 1}
    assert base == {"export": {"format": "qdq", "opset": 22}, "quantization": {"weights": ["int8"]}}


def test_every_option_names_a_key_of_the_configuration():
    config = CLPConfig()
    seen = 0
    for _, action in _configuration_actions():
        _value(config, action.dest)
        assert action.default is None, action.option_strings
        seen += 1
    assert seen > 100


def test_every_key_of_the_configuration_has_a_flag():
    recipe = CLPConfig().to_dict()
    keys = {f"{stage}.{key}" for stage in STAGES for key in recipe[stage]}
    keys |= {
        "pruning_ratio",
        "target_size_mb",
        "target_tokens_per_second",
        "num_segments",
        "max_perplexity_increase",
        "min_retention",
        "budget",
        "max_memory",
        "seed",
    }
    flags = {action.dest: tuple(action.option_strings) for name, action in _configuration_actions() if name == "prune"}
    assert set(flags) == keys == set(all_settings())
    assert flags == {name: setting.flags for name, setting in all_settings().items()}


def test_flags_that_are_not_made_from_the_name_keep_their_spelling():
    others = {
        name: setting.flag
        for name, setting in all_settings().items()
        if setting.flag != f"--{name.rpartition('.')[2].replace('_', '-')}"
    }
    assert others == {
        "calibration.cache_dir": "--text-cache-dir",
        "search.num_sequences": "--search-sequences",
        "search.batch_size": "--search-batch-size",
        "search.budget": "--search-budget",
        "search.repair": "--search-repair",
        "tuning.tokens": "--tuning-tokens",
        "tuning.enabled": "--tune",
        "export.enabled": "--export",
        "evaluation.task_limit": "--limit",  # lm-eval's
    }


def test_a_switch_overrides_the_recipe_both_ways():
    base = {"tuning": {"enabled": False}, "quantization": {"quanto": True, "quantize_embeddings": False}}
    line = "prune --model m --tune --no-quanto --quantize-embeddings out"
    assert arguments.configuration_values(parse(line), base) == {
        "tuning": {"enabled": True},
        "quantization": {"quanto": False, "quantize_embeddings": True},
    }


def test_defaults_in_the_help_are_those_of_the_configuration():
    config = CLPConfig()
    without = set()
    for _, action in _configuration_actions():
        default = _value(config, action.dest)
        shown = re.search(r"\(default: ([^)]+)\)$", action.help)
        if shown is None:
            without.add(action.dest)
        elif isinstance(default, bool):
            assert shown.group(1) == ("yes" if default else "no"), action.option_strings
        elif isinstance(default, list):
            assert shown.group(1) == (", ".join(default) or "none"), action.option_strings
        elif default is not None:
            assert type(default)(shown.group(1)) == default, action.option_strings
    assert without == {"max_perplexity_increase", "min_retention"}
    assert config.quantization.weights == list(QUANTIZED)
    help_text = next(
        a.help
        for a in build_parser()._subparsers._group_actions[0].choices["prune"]._actions
        if a.dest == "pruning_ratio"
    )
    assert f"(default: {config.pruning_ratio})" in help_text


def test_help_lists_names_with_what_they_say_also_those_of_other_packages(monkeypatch, capsys):
    monkeypatch.setattr(STRATEGIES, "_added", {"mine": Row("their_package:mine", package="their-package")})
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse("search --help")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--strategy STRATEGY" in line]
    assert "; exhaustive: every cut on every row; " in line
    assert "; mine: of the package their-package (default: auto)" in line
    assert values("search --model m --strategy mine")["search"] == {"strategy": "mine"}


def test_a_percent_sign_in_a_help_is_no_placeholder(monkeypatch):
    seed = Setting("seed", "`int`", 5, integer(0), "half, that is 50 % of it", "", "--seed", "N", "")
    monkeypatch.setattr(
        arguments,
        "all_settings",
        lambda: {
            "seed": seed,
            **{name: replace(seed, name=name, flag=f"--{name}") for name in ("budget", "max_memory")},
        },
    )
    parser = argparse.ArgumentParser()
    arguments.add_recipe(parser)
    assert "50 % of it (default: 5)" in parser.format_help()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_may_be_abbreviated(command, capsys):
    for line in (["--tok", "SECRET"], ["--toke=SECRET"], ["--tokens", "SECRET"], ["--quie"], ["--mode", "SECRET"]):
        with pytest.raises(SystemExit) as stopped:
            build_parser().parse_args([command, "--model", "m", *line, *([] if command == "evaluate" else ["out"])])
        told = capsys.readouterr()
        assert stopped.value.code == 2 and "SECRET" not in told.err + told.out
        assert "unrecognized arguments: --" in told.err


def test_a_token_is_an_option_of_its_own():
    args = parse("prune --model m --token hf_abc --tokenizer t out")
    assert (args.token, args.tokenizer) == ("hf_abc", "t")


@pytest.mark.parametrize("option", ["--epochs", "--segment", "--weights", "--learning-rate", "--pruning-ratio"])
def test_long_values_are_not_repeated_whole(option, capsys):
    command = "tune" if option == "--segment" else "prune"
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--model", "m", option, "=" + "9" * 5000, "out"])
    told = capsys.readouterr().err
    assert "9" * 300 not in told and option in told and "..." in told


@pytest.mark.parametrize(
    ("options", "expected"),
    [("", {"": 1}), ("--max-memory 24GiB", {"": 1}), ("--max-memory 0=9GiB,1=9GiB", None), ("--device cpu", "cpu")],
)
def test_a_process_of_a_group_loads_to_its_own_accelerator_what_that_may_hold(options, expected, monkeypatch):
    """What a bound does not hold is loaded to where it is mapped, and placed later."""
    asked = {}
    monkeypatch.setattr("optimum_clp.processes.join_group", lambda: None)
    monkeypatch.setattr("optimum_clp.processes.own_device_map", lambda: {"": 1})
    monkeypatch.setattr("optimum_clp.pruner.CLPPruner.from_pretrained", lambda *_, **given: asked.update(given))
    load_pruner(parse(f"prune --model m {options} out"))
    assert asked["device_map"] == expected
