import itertools
import subprocess
import sys

import pytest
from notices import notice
from report_example import example_report, older_report

from optimum_clp.errors import ConfigurationError
from optimum_clp.report import plots
from optimum_clp.report.report import CLPReport

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


def _bars(axes, label):
    (collection,) = (c for c in axes.collections if c.get_label() == label)
    return [segment.tolist() for segment in collection.get_segments()]


def test_both_plots_are_written(tmp_path):
    written = plots.write_plots(example_report(), tmp_path)
    assert written == [tmp_path / "plots" / "search.png", tmp_path / "plots" / "tuning.png"]
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 10_000 for path in written)


def test_search_plot_draws_the_scores_and_the_gate(tmp_path, drawn):
    report = example_report()
    plots.plot_search(report, tmp_path / "s.png")
    scores, _, gate = drawn["s.png"].axes
    full = [[entry["start"], entry["kl"]] for entry in report.search["scored"] if entry["num_rows"] == 32]
    fewer = [[entry["start"], entry["kl"]] for entry in report.search["scored"] if entry["num_rows"] == 8]
    assert [c.get_label() for c in scores.containers] == [
        "segment, at its first layer",
        "segment, at its first layer,\nfewer rows",
    ]
    assert [c.lines[0].get_xydata().tolist() for c in scores.containers] == [full, fewer] and fewer
    bars = scores.containers[0].lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [pytest.approx([kl - 0.02, kl + 0.02]) for _, kl in full]
    assert _line(scores, "chosen").get_xydata().tolist() == [[7, 0.41]]
    assert scores.get_title() == "3 of 16 layers removed, strategy: auto (used gate)"
    steps = report.search["trajectory"]
    looks = {n: sorted([e["start"], e["loss"]] for e in steps if e["step"] == n) for n in {e["step"] for e in steps}}
    assert _line(gate, "sweep along the stack").get_xydata().tolist() == looks[0]
    assert [line.get_xydata().tolist() for line in gate.lines] == [looks[n] for n in sorted(looks)]
    assert _line(gate, "steeper gates, the last darkest").get_xydata().tolist() == looks[max(looks)]
    alphas = [line.get_alpha() for line in gate.lines[1:]]
    assert alphas == sorted(alphas) and alphas[-1] == 1
    assert "nats per token" in scores.get_ylabel() and gate.get_xlabel() == "layer"


def test_importance_is_the_smallest_kl_of_the_cuts_that_contain_a_layer(tmp_path, drawn):
    report = example_report()
    kls = {entry["start"]: entry["kl"] for entry in report.search["scored"]}
    truth = [min(kls[s] for s in (layer - 2, layer - 1, layer) if s in kls) for layer in range(16)]
    assert plots.layer_importance(report.search) == truth
    plots.plot_search(report, tmp_path / "s.png")
    axes = drawn["s.png"].axes[1]
    bars = {c.get_label(): {round(b.get_x() + b.get_width() / 2): b.get_height() for b in c} for c in axes.containers}
    assert bars == {
        "stays": {layer: kl for layer, kl in enumerate(truth) if layer not in (7, 8, 9)},
        "removed": {layer: truth[layer] for layer in (7, 8, 9)},
    }
    assert axes.get_ylabel() == "smallest KL of\na scored cut with it"


def test_layers_that_no_scored_cut_contains_have_no_importance(tmp_path, drawn):
    report = example_report()
    report.search["scored"] = report.search["scored"][5:8] + report.search["scored"][12:13]
    report.search["scored"][-1]["kl"] = float("nan")
    assert plots.layer_importance(report.search) == [None] * 5 + [0.52, 0.45, 0.41, 0.41, 0.41] + [None] * 6
    plots.plot_search(report, tmp_path / "s.png")
    unknown = _line(drawn["s.png"].axes[1], "in no scored cut")
    assert list(unknown.get_xdata()) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15]


def test_scores_of_a_strategy_that_ranks_layers_are_its_importance(tmp_path, drawn):
    report = example_report()
    scores = [0.9, 0.4, *(0.1 + 0.01 * i for i in range(13)), None]
    report.search.update(strategy="taylor", used_strategy="taylor", trajectory=[], layer_scores=scores)
    assert plots.layer_importance(report.search) == scores
    plots.plot_search(report, tmp_path / "s.png")
    axes = drawn["s.png"].axes[1]
    heights = {round(b.get_x() + b.get_width() / 2): b.get_height() for c in axes.containers for b in c}
    assert [heights.get(layer) for layer in range(16)] == scores
    assert axes.get_ylabel() == "importance\n(taylor)"
    assert list(_line(axes, "not known").get_xdata()) == [15]


def test_cuts_of_several_segments_are_bars_over_their_layers(tmp_path, drawn):
    report = example_report()
    pairs = {0.3: [[4, 6], [9, 10]], 0.5: [[2, 3], [7, 9]], 0.7: [[0, 2], [12, 13]]}
    template = report.search["scored"][7]
    report.search["scored"] = [template] + [
        {
            **template,
            "start": cut[0][0],
            "stop": cut[1][1],
            "segments": cut,
            "kl": kl,
            "num_rows": 32 - 24 * (kl == 0.7),
        }
        for kl, cut in pairs.items()
    ]
    valleys = [[[4.4 - 0.1 * i, 2.0], [9.0, 1.0]] for i in range(3)]
    report.search.update(
        segments=pairs[0.3],
        score=0.3,
        trajectory=[
            {"step": i + 1, "start": v[0][0], "steepness": 1.0, "loss": 0.5, "valleys": v}
            for i, v in enumerate(valleys)
        ],
    )
    plots.plot_search(report, tmp_path / "s.png")
    scores, importance, gate = drawn["s.png"].axes
    for label, kl in (("chosen", 0.3), ("several segments", 0.5), ("several segments,\nfewer rows", 0.7)):
        assert _bars(scores, label) == [[[a - 0.5, kl], [b - 0.5, kl]] for a, b in pairs[kl]]
    assert scores.containers[0].lines[0].get_xydata().tolist() == [[7, 0.41]], "the single segment is a point"
    removed = next(c for c in importance.containers if c.get_label() == "removed")
    assert [round(b.get_x() + b.get_width() / 2) for b in removed] == [4, 5, 9]
    spans = [[[s - 0.5, i + 1], [s + n - 0.5, i + 1]] for i, v in enumerate(valleys) for s, n in v]
    assert _bars(gate, "gate's valleys") == spans
    assert _bars(gate, "final gate") == spans[-2:]


def test_legends_are_outside_the_data_and_panels_do_not_overlap(tmp_path, drawn):
    plots.plot_search(example_report(), tmp_path / "s.png")
    figure = drawn["s.png"]
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert all(upper.y0 > lower.y1 for upper, lower in itertools.pairwise(boxes))
    for axes, box in zip(figure.axes, boxes, strict=True):
        legend = axes.get_legend().get_window_extent()
        assert legend.x0 >= box.x1 and legend.x1 <= figure.bbox.x1
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def test_one_scored_cut_is_drawn(tmp_path, drawn):
    report = example_report()
    (only,) = report.search["scored"][7:8]
    only["standard_error"] = float("nan")
    report.search.update(strategy="tail", used_strategy="tail", trajectory=[], scored=[only])
    plots.plot_search(report, tmp_path / "s.png")
    scores, importance = drawn["s.png"].axes
    assert scores.containers[0].lines[0].get_xydata().tolist() == [[7, 0.41]]
    assert [bar.get_height() for bar in importance.containers[0]] == [0.41] * 3


def test_older_report_is_drawn(tmp_path, drawn):
    report = older_report()
    assert plots.layer_importance(report.search) == plots.layer_importance(example_report().search)
    plots.plot_search(report, tmp_path / "s.png")
    scores, _, gate = drawn["s.png"].axes
    (points,) = scores.containers
    assert list(points.lines[0].get_ydata()) == [entry["kl"] for entry in report.search["scored"]]
    assert "strategy: gate" in scores.get_title()
    assert _line(gate, "sweep along the stack").get_xdata().tolist() == [0, 4.5, 9, 13]


def test_search_plot_without_a_gate_has_no_panel_for_it(tmp_path, drawn):
    report = older_report()
    report.search.update(strategy="exhaustive", trajectory=[])
    report.search["scored"][3]["kl"] = None
    plots.plot_search(report, tmp_path / "s.png")
    axes, importance = drawn["s.png"].axes
    assert "exhaustive" in axes.get_title() and importance.get_xlabel() == "layer"
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
    with notice(r"plots/search.png and plots/tuning.png are left out.*pip install 'optimum-clp\[plots\]'") as told:
        assert plots.write_plots(example_report(), tmp_path) == []
    assert len(told) == 1
    assert plots.write_plots(CLPReport(), tmp_path) == []  # nothing to draw, nothing to say
    with pytest.raises(ConfigurationError, match=r"matplotlib is None: .*pip install 'optimum-clp\[plots\]'"):
        plots.plot_search(example_report(), tmp_path / "s.png")


def test_pyplot_and_its_global_state_stay_out(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from report_example import example_report; from optimum_clp.report import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.write_plots(example_report(), {str(tmp_path)!r}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=__file__.rsplit("tests", 1)[0])
