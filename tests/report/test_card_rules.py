"""The rules that the Hub documents for a card's metadata, over cards of several kinds of models; the Hub itself is not asked.

From the Hub's documentation: `modelcard.md`, `model-cards.md` and `repositories-licenses.md` of huggingface/hub-docs. `ModelCard.validate`
asks the Hub and is a test of its own, with the mark `hub`.
"""

import math
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from report_example import example_report, older_report
from transformers.pipelines import SUPPORTED_TASKS

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.report import origin
from optimum_clp.report.model_card import write_model_card
from optimum_clp.report.report import CLPReport

# the table of repositories-licenses.md; llama3 and the lines after it were added to it later, and are from memory
LICENSES = set(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other
    llama3 llama3.1 llama3.2 llama3.3 llama4 apple-amlr intel-research""".split()
)
TASK = {"task": "arc_easy", "num_examples": 9, "chance": 0.25}
HARNESS = {
    "version": "0.4.13", "task_version": "1.0", "metric": "acc_norm", "num_fewshot": 0, "chat_template": False,
    "dataset": "allenai/ai2_arc", "dataset_config": "ARC-Easy", "split": "test",
}  # fmt: skip


def dense(**stated):
    """A report whose dense model's card says so."""
    report = example_report()
    report.base_model["origin"] = {"repository": "example/stories-16l", "is_known": True, **stated}
    return report


def with_tasks():
    report = dense(
        license="llama3.1", language=["en", "de"], datasets=["allenai/c4"], tags=["chat"], base_model="meta/base"
    )
    score = {"name": "tuned", "accuracy": 0.5, "accuracy_stderr": 0.1, "plain_accuracy": 0.4, "retention": None}
    named = {**score, "metrics": {"acc_norm,none": 0.5}}
    report.evaluation["tasks"] = [{**TASK, "rows": [score]}, {**TASK, "lm_eval": HARNESS, "rows": [named]}]
    report.evaluation["texts"] = [
        {
            "text": 'C4, "en": 24 rows',
            "num_rows": 24,
            "rows": [{"name": "tuned", "perplexity": 31.5, "kl": 0.4, "retention": 0.7}],
        }
    ]
    report.calibration["dataset"] = "wikitext"
    return report


def without_figures():
    report = dense(license="gemma")
    report.evaluation = report.export = report.tuning = None
    return report


def figures_that_are_none():
    report = dense()
    for row in report.evaluation["rows"]:
        row.update(perplexity=math.nan, kl=math.inf)
    return report


def local():
    report = example_report()
    report.base_model["name_or_path"] = "/home/me/a model"
    return report


KINDS = {
    "a plain model of the Hub": lambda: dense(license="apache-2.0", language=["en"]),
    "a chat model with tasks": with_tasks,
    "other terms": lambda: dense(license="other", license_name="acme-terms", license_link="LICENSE"),
    "other terms without a name": lambda: dense(license="other"),
    "a licence in words": lambda: dense(
        license="Apache License, Version 2.0", license_link="https://acme.example/terms"
    ),
    "a licence in capitals": lambda: dense(license="MIT"),
    "terms whose name is in words": lambda: dense(license="other", license_name="Acme Terms (v2)"),
    "languages in words": lambda: dense(
        license="mit", language=["English", "en", "zh-CN", "code", "multilingual", "DE"]
    ),
    "no card": dense,
    "a local folder": local,
    "no figures": without_figures,
    "figures that are no numbers": figures_that_are_none,
    "an older report": older_report,
    "an empty report": CLPReport,
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(origin, "snapshot_download", unreachable)


@pytest.fixture(params=KINDS)
def card(request, tmp_path):
    return write_model_card(KINDS[request.param](), CLPConfig(), tmp_path, model_name="me/small")


def test_the_metadata_is_read_back_as_it_was_written(card):
    data = metadata_load(card)
    assert data == ModelCard.load(card).data.to_dict()
    again = ModelCardData(**data, ignore_metadata_errors=False)
    assert again.to_dict() == data
    assert ModelCard(f"---\n{again.to_yaml()}\n---\n# x\n").data.to_dict() == data


def test_the_metadata_keeps_to_the_rules(card):
    data = metadata_load(card)
    assert data["pipeline_tag"] in SUPPORTED_TASKS and data["library_name"] == "transformers"
    if "license" in data:
        assert data["license"] in LICENSES
        assert (data["license"] == "other") == ("license_name" in data)
    else:
        assert not {"license_name", "license_link"} & data.keys()
    assert re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", data.get("license_name", "x"))
    for language in data.get("language", ()):
        assert re.fullmatch(r"[a-z]{2,3}|code|multilingual", language)
    assert ("base_model" in data) == ("base_model_relation" in data)
    assert data.get("base_model_relation", "finetune") in ("adapter", "merge", "quantized", "finetune")
    for name in (*data.get("datasets", ()), *filter(None, [data.get("base_model")])):
        validate_repo_id(name)
    assert len(set(data["tags"])) == len(data["tags"]) and all(
        isinstance(t, str) and t.strip() == t for t in data["tags"]
    )


def test_the_figures_have_the_shape_of_a_model_index(card):
    index = metadata_load(card).get("model-index")
    if index is None:
        return
    (model,) = index
    assert set(model) == {"name", "results"} and model["results"]
    for result in model["results"]:
        assert set(result) <= {"task", "dataset", "metrics", "source"}
        assert result["task"]["type"] in SUPPORTED_TASKS
        assert result["dataset"]["type"] and isinstance(result["dataset"]["name"], str)
        assert set(result["dataset"]) <= {"type", "name", "config", "split", "revision", "args"}
        for metric in result["metrics"]:
            assert metric["type"] and isinstance(metric["value"], float) and math.isfinite(metric["value"])
            assert set(metric) <= {"type", "value", "name", "config", "args", "verified", "verifyToken"}
    name, results = model_index_to_eval_results(index)
    assert eval_results_to_model_index(name, results) == index


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "a licence in words",
            {
                "license": "other",
                "license_name": "apache-license-version-2.0",
                "license_link": "https://acme.example/terms",
            },
        ),
        ("a licence in capitals", {"license": "mit"}),
        ("terms whose name is in words", {"license": "other", "license_name": "acme-terms-v2"}),
        (
            "languages in words",
            {"license": "mit", "language": ["en", "code", "multilingual"], "language_bcp47": ["zh-CN"]},
        ),
    ],
)
def test_what_a_stranger_wrote_is_put_into_the_form_of_the_hub(kind, expected, tmp_path):
    data = metadata_load(write_model_card(KINDS[kind](), CLPConfig(), tmp_path))
    keys = ("license", "license_name", "license_link", "language", "language_bcp47")
    assert {key: data[key] for key in keys if key in data} == expected
