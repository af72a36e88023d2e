import subprocess
import sys

import pytest
from report_example import example_report

from optimum_clp import plots
from optimum_clp.errors import ConfigurationError
from optimum_clp.report import CLPReport

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, by file name."""
    figures = {}
    save = plots._save

    def keep(figure, path):
        figures[path.name if hasattr(path, "name") else path] = figure
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def _line(axes, label):
    return next(line for line in axes.lines if line.get_label() == label)


def test_both_plots_are_written(tmp_path):
    written = plots.write_plots(example_report(), tmp_path)
    assert written == [tmp_path / "plots" / "search.png", tmp_path / "plots" / "tuning.png"]
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 10_000 for path in written)


def test_search_plot_draws_the_scores_and_the_gate(tmp_path, drawn):
    report = example_report()
    plots.plot_search(report, tmp_path / "s.png")
    scores, gate = drawn["s.png"].axes
    assert list(scores.containers[0].lines[0].get_ydata()) == [entry["kl"] for entry in report.search["scored"]]
    assert _line(scores, "cut").get_xydata().tolist() == [[7, 0.41]]
    steps = report.search["trajectory"]
    assert _line(gate, "tried to begin from").get_xydata().tolist() == [
        [e["start"], 0] for e in steps if e["step"] == 0
    ]
    assert list(_line(gate, "gate").get_xdata()) == [entry["start"] for entry in steps if entry["step"] > 0]
    assert "nats per token" in scores.get_ylabel() and gate.get_xlabel() == "first layer removed"


def test_search_plot_without_a_gate_has_one_panel(tmp_path, drawn):
    report = example_report()
    report.search.update(strategy="exhaustive", trajectory=[])
    report.search["scored"][3]["kl"] = None
    plots.plot_search(report, tmp_path / "s.png")
    (axes,) = drawn["s.png"].axes
    assert "exhaustive" in axes.get_title()
    assert len(axes.containers[0].lines[0].get_ydata()) == 13, "the score that is null is left out"


def test_search_plot_of_scores_over_decades_is_logarithmic(tmp_path, drawn):
    report = example_report()
    report.search["scored"][0]["kl"] = 40.0
    plots.plot_search(report, tmp_path / "s.png")
    assert drawn["s.png"].axes[0].get_yscale() == "log"


def test_tuning_plot_draws_both_losses_and_the_untuned_model(tmp_path, drawn):
    report = example_report()
    plots.plot_tuning(report, tmp_path / "t.png")
    (axes,) = drawn["t.png"].axes
    assert set(_line(axes, "validation, not tuned").get_ydata()) == {0.41}
    history = report.tuning["history"]
    assert list(_line(axes, "train").get_ydata()) == [entry["train_loss"] for entry in history if entry["step"] > 0]
    assert list(_line(axes, "validation").get_xdata()) == [entry["step"] for entry in history]
    assert _line(axes, "kept").get_xydata().tolist() == [[96, 0.1006]]


def test_tuning_that_did_not_help_keeps_no_point(tmp_path, drawn):
    report = example_report()
    report.tuning.update(improved=False, best_step=0)
    plots.plot_tuning(report, tmp_path / "t.png")
    assert "kept" not in [line.get_label() for line in drawn["t.png"].axes[0].lines]


def test_stages_that_did_not_run_have_no_plot(tmp_path):
    assert plots.write_plots(CLPReport(), tmp_path) == []
    with pytest.raises(ConfigurationError, match=r"report\.search is None: there is no scored to draw"):
        plots.plot_search(CLPReport(), tmp_path / "s.png")
    with pytest.raises(ConfigurationError, match=r"report\.tuning is None: there is no history to draw"):
        plots.plot_tuning(CLPReport(), tmp_path / "t.png")


def test_without_matplotlib_plots_are_skipped_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "plots_available", lambda: False)
    assert plots.write_plots(example_report(), tmp_path) == []
    with pytest.raises(ConfigurationError, match=r"matplotlib is None: .*pip install 'optimum-clp\[plots\]'"):
        plots.plot_search(example_report(), tmp_path / "s.png")


def test_pyplot_and_its_global_state_stay_out(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from report_example import example_report; from optimum_clp import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.write_plots(example_report(), {str(tmp_path)!r}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=__file__.rsplit("tests", 1)[0])
