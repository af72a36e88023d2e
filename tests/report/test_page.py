"""The page beside the card: what it shows is what the report says, and nothing that a report says becomes code."""

import base64
import copy
import hashlib
import re
from html.parser import HTMLParser

import pytest
from browser import browser_page
from report_example import example_report, older_report

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.report import origin
from optimum_clp.report.legend import GLOSSARY, meaning
from optimum_clp.report.page import REPORT_PAGE, report_page, write_report_page
from optimum_clp.report.report import CLPReport

EVIL = """</script></style></title><script>window.pwned = 1</script>"><img src=x onerror="window.pwned = 1">'`{{ 7 * 191 }}{% raw %}"""
LOOP = "I am here. " + "and so on, " * 3
ANSWERS = {"cut": LOOP, "dense": "Tokyo.", "onnx int4": "To\nkyo", "onnx": "Tokyo"}
NOTES = {
    name: {"num_tokens": 9, "ended": name != "cut", "whole": True, "loop_at": 11 if name == "cut" else None}
    for name in ANSWERS
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(origin, "snapshot_download", unreachable)


class Elements(HTMLParser):
    """Every element with its attributes, and all text outside of script and style."""

    def __init__(self, html):
        super().__init__()
        self.found, self.text, self.open = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in self.open, f"</{tag}> closes nothing"
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def row(name, loops):
    from optimum_clp.evaluation.generation import GenerationRow
    from optimum_clp.report.section import to_section

    return to_section(GenerationRow(name, loops, None, 0.5, None, 20.0, None, 0.0, 0.5, 20.0))


def full_report():
    report = example_report()
    report.tuning["history"][0]["by_kind"] = {"plain": 0.5, "conversations": 0.3}
    report.tuning["history"][1]["by_kind"] = {"plain": 0.2, "conversations": 0.1}
    report.tuning["stages"] = [
        {"loss": {"hidden": 1.0}, "steps": 60, "learning_rate": 7e-3, "num_tokens": 122880},
        {"loss": {"kd": 1.0}, "steps": 36, "learning_rate": 1e-4, "num_tokens": 73728},
    ]
    report.tuning["forecast"] = {
        "pilots": [
            {"num_tokens": 4096, "loss": 0.4, "seconds": 9.0},
            {"num_tokens": 8192, "loss": 0.3, "seconds": 9.0},
        ],
        "predictions": [
            {"num_tokens": 65536, "loss": 0.2512, "low": 0.24, "high": 0.26},
            {"num_tokens": 655360, "loss": 0.2, "low": 0.15, "high": 0.25},
        ],
    }
    kept = {"share": 0.6, "loops": 0.9, "ended": 0.9, "likelihood": 0.6}
    report.evaluation |= {
        "texts": [{"text": "c4", "num_rows": 2, "rows": [{"name": "tuned", "perplexity": 31.5, "kl": 0.4, "retention": 0.7}]}],
        "generation": {
            "asked": "chat", "note": None, "num_prompts": 2, "num_left_out": 0, "kinds": {"facts": 2}, "max_new_tokens": 64,
            "temperature": 0.8, "seed": 0, "rows": [row("dense", 0.0), row("cut", 0.5), row("onnx", 0.0), row("onnx int4", 0.0)],
            "examples": [{"prompt": "What is the capital of Japan?", "answers": ANSWERS, "notes": NOTES}],
        },
        "verdicts": [{"name": "onnx int4", "level": "usable", "text": "usable with losses", "losses": [], "generation_kept": kept, "retention": 0.8}],
    }  # fmt: skip
    return report


def page(report, config=None):
    html = report_page(report, config or CLPConfig())
    return html, Elements(html)


def test_every_figure_is_there(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2_500_000)
    path = write_report_page(full_report(), CLPConfig(0.3, seed=5), tmp_path)
    assert path == tmp_path / REPORT_PAGE
    html = path.read_text(encoding="utf-8")
    text = Elements(html).text
    assert "<h1>stories-16l-clp</h1>" in html
    assert "example/stories-16l (llama) without layers 7 to 9 of its 16, tuned next to the cut." in text.replace(
        "\n", " "
    )
    for figure in (
        "12.500",
        "0.4100",
        "2.10 MB",
        "0.0930",
        "84.0%",
        "720.0",
        "2.50 MB",
        "0.09 (usual: 0.1 to 0.5)",
        "+2.2%",
        "52.10 MB",
    ):
        assert figure in text, figure
    assert "14 cuts were scored (strategy auto (used gate), the work of 4.1 forward passes" in text
    assert "pruning_ratio" in text and "0.3" in text and "optimum-clp prune --model example/stories-16l" in text
    assert html.count('aria-label="Layers 7 to 9: KL 0.41 ± 0.02, on 32 rows (chosen)"') == 2  # wide and narrow


def test_what_a_column_means_is_told_at_its_head_and_below_the_table():
    _, elements = page(full_report())
    told = {a["title"] for a in elements.all("abbr")}
    for title in ("KL to dense (nats)", "loops", "end by themselves", "retention", "worst logit", "RAM"):
        assert meaning(title) in told and meaning(title) in elements.text
    assert [a["href"] for a in elements.all("a")].count(GLOSSARY) == 4  # measures, answers, other texts, files
    assert "What the columns mean" not in page(CLPReport())[1].text


def test_each_scored_cut_can_be_pointed_at():
    _, elements = page(full_report())
    tips = [
        a["aria-label"] for a in elements.all("g") if a.get("class") == "mark" and a["aria-label"].startswith("Layers")
    ]
    assert len(tips) == 2 * 14 and len(set(tips)) == 14
    assert "Layers 6 to 8: KL 0.45 ± 0.02, on 32 rows; +0.04 beside the chosen one (± 0.025)" in tips


def test_answers_stand_in_the_order_of_the_rows_with_loops_marked():
    html, elements = page(full_report())
    assert [a["data-answer-of"] for a in elements.all("div") if "data-answer-of" in a] == [
        "dense",
        "cut",
        "onnx",
        "onnx int4",
    ]
    assert "<p>I am here. <mark>and so on, and so on, and so on, </mark></p>" in html
    assert html.count("<mark>") == 1 and html.count(">loops</span>") == 1
    assert "stopped after 9 tokens" in html and "ends after 9 tokens" in html
    checked = [a["data-model"] for a in elements.all("input") if "checked" in a]
    assert checked == ["dense", "cut", "onnx int4"]


def test_examples_of_an_earlier_report_have_no_marks():
    report = full_report()
    (example,) = report.evaluation["generation"]["examples"]
    del example["notes"]
    example["answers"]["cut"] = "x" * 200
    html, _ = page(report)
    assert f"<p>{'x' * 200}…</p>" in html and "<mark>" not in html and "<p>Tokyo.</p>" in html


def test_nothing_is_fetched_and_only_the_pages_own_script_may_run():
    html, elements = page(full_report())
    (policy,) = (a["content"] for a in elements.all("meta") if a.get("http-equiv"))
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag, attributes in elements.found:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes), (tag, attributes)


def poisoned(value, evil=EVIL):
    """A report whose every string is hostile, and every name that is not ours."""
    free = {"plain", "conversations", "facts"}
    if isinstance(value, dict):
        return {f"{evil} {key}" if key in free else key: poisoned(item, evil) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, evil) for item in value]
    return f"{value}{evil}" if isinstance(value, str) else value


def poisoned_report(evil=EVIL):
    report = full_report()
    report.failures = [{"stage": "a", "error": "b", "command": "c"}]
    report.base_model |= {"revision": "r", "origin": {"repository": "a/b", "license": "mit"}}
    for section in (
        "base_model",
        "calibration",
        "search",
        "cut",
        "tuning",
        "quantization",
        "export",
        "failures",
        "environment",
    ):
        setattr(report, section, poisoned(getattr(report, section), evil))
    evaluation = copy.deepcopy(report.evaluation)
    names = [entry["name"] for entry in evaluation["rows"]]
    asked = evaluation["generation"]["asked"]
    report.evaluation = poisoned(evaluation, evil)
    report.evaluation["generation"]["asked"] = asked
    # names of rows are keys as well
    for example in report.evaluation["generation"]["examples"]:
        for key in ("answers", "notes"):
            example[key] = {f"{name}{evil}": value for name, value in example[key].items()}
    assert len(names) == 6
    return report


def poisoned_config():
    config = CLPConfig(calibration_dataset=EVIL)
    config.evaluation.texts = [EVIL]
    config.calibration.text_column = EVIL
    return config


def test_no_string_of_a_report_becomes_markup():
    clean = Elements(report_page(poisoned_report(""), CLPConfig()))
    html = report_page(poisoned_report(), poisoned_config(), title=EVIL)
    elements = Elements(html)
    assert len(elements.all("script")) == len(elements.all("style")) == len(elements.all("title")) == 1
    assert not elements.all("img") and "onerror" not in {name for _, a in elements.found for name in a}
    # the recipe's table has a few rows more
    assert {tag for tag, _ in elements.found} == {tag for tag, _ in clean.found}
    assert "1337" not in html and "7 * 191" in html
    assert all(a["href"].startswith("https://huggingface.co/") or a["href"] == GLOSSARY for a in elements.all("a"))


def test_a_lone_surrogate_is_written(tmp_path):
    report = full_report()
    report.evaluation["generation"]["examples"][0]["answers"]["dense"] = "a \ud83d b\x00\u202ec"
    assert "a ? b" in write_report_page(report, CLPConfig(), tmp_path).read_text(encoding="utf-8")


def test_local_folders_are_not_named(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    report = full_report()
    report.base_model["name_or_path"] = str(tmp_path / "my-model")
    report.calibration["source"] = report.evaluation["text"] = str(tmp_path / "corpus.txt")
    config = CLPConfig(calibration_dataset=str(tmp_path / "corpus.txt"))
    config.calibration.cache_dir = config.tuning.logging_dir = str(tmp_path)
    config.evaluation.texts = [str(tmp_path / "corpus.txt")]
    html, _ = page(report, config)
    assert str(tmp_path) not in html and "corpus.txt" in html and "--model path/to/my-model" in html


@pytest.mark.parametrize("report", [CLPReport(), older_report(), CLPReport(base_model=example_report().base_model)])
def test_a_report_with_gaps_has_a_page_without_them(report):
    html, elements = page(report)
    assert "None" not in elements.text and "nan" not in elements.text
    assert ("Why these layers" in html) == bool(report.search)


def test_figures_that_are_not_numbers_are_left_out():
    report = full_report()
    report.search["scored"][3]["kl"] = float("nan")
    report.tuning["history"][2]["validation_loss"] = float("inf")
    report.evaluation["rows"][1].update(perplexity=float("nan"), kl=None)
    html, elements = page(report)
    assert not re.search(r"\b(nan|inf|None)\b", elements.text)
    assert not re.search(r'="-?(nan|inf)"', html)


def test_grammar_of_one():
    report = full_report()
    report.cut.update(segments=[[7, 8]], removed_layers=[7])
    report.tuning["layers"] = [6]
    report.search["scored"] = report.search["scored"][:1]
    text = " ".join(page(report)[1].text.split())
    assert "without layer 7 of its 16" in text and "Layer 6 of what is left" in text and "was trained" in text
    assert "1 cut was scored" in text


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(width, tmp_path):
    """Both the plain report and the hostile one: no error, nothing wider than the screen, marks say what they are."""
    plain = write_report_page(full_report(), CLPConfig(), tmp_path).rename(tmp_path / "plain.html")
    hostile = write_report_page(poisoned_report(), poisoned_config(), tmp_path)
    with browser_page(width, "dark") as (page, wrong):
        for path in (plain, hostile):
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("window.pwned === undefined")
        page.goto(plain.as_uri())
        mark = page.locator("g.mark:visible[data-segments='7-10']").first
        mark.hover()
        assert page.locator("#tip").inner_text() == "Layers 7 to 9: KL 0.41 ± 0.02, on 32 rows (chosen)"
        hot = page.locator(".layer.hot:visible")
        assert [hot.nth(i).get_attribute("data-layer") for i in range(hot.count())] == ["7", "8", "9"]
        sizes = page.evaluate(
            "[...document.querySelectorAll('svg text')].filter(t => t.getClientRects().length).map(t => t.getBoundingClientRect().height)"
        )
        assert min(sizes) > 9, "text that shrinks with the screen cannot be read"
        assert not page.locator("[data-answer-of='onnx']").is_visible()
        page.locator("input[data-model='onnx']").check()
        assert page.locator("[data-answer-of='onnx']").is_visible()
        assert wrong == []
