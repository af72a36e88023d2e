import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from optimum_clp import CLPConfig, LayerSegment
from optimum_clp.errors import ConfigurationError
from optimum_clp.report.report import CLPReport
from optimum_clp.session import Session
from optimum_clp.surgery.cut import cut_model

STAGES = ("search", "cut", "tuning", "quantization", "export", "evaluation")


def recipe(tmp_path, seed=0, **settings):
    sizes = {"train_sequences": 4, "validation_sequences": 2, "test_sequences": 2, "sequence_length": 8}
    return CLPConfig(0.33, seed=seed, calibration={**sizes, "cache_dir": str(tmp_path), **settings})


def changed(config, **stages):
    return CLPConfig.from_dict({**config.to_dict(), **stages})


def session_with_everything(tmp_path):
    report = CLPReport(base_model={"name_or_path": "me/name"})
    for section in STAGES:
        setattr(report, section, {"segments": [[2, 4]]})
    return Session(pruned_model=tiny_model(), report=report, folder=tmp_path, segments=(LayerSegment(2, 4),))


@pytest.mark.parametrize(
    ("step", "void", "has_model", "has_folder"),
    [
        ("search", {"cut", "tuning", "quantization", "export", "evaluation"}, False, False),
        ("cut", {"cut", "tuning", "quantization", "export", "evaluation"}, False, False),
        ("tune", set(), True, False),
        ("export", {"quantization"}, True, True),
        ("save", {"quantization", "export", "evaluation"}, True, True),
    ],
)
def test_what_each_step_makes_void(step, void, has_model, has_folder, tmp_path):
    session = session_with_everything(tmp_path)
    session.forget(step)
    assert {section for section in STAGES if getattr(session.report, section) is None} == void
    assert (session.pruned_model is not None, session.folder is not None) == (has_model, has_folder)
    assert session.segments and session.report.base_model == {"name_or_path": "me/name"}


@pytest.mark.parametrize("segment", [LayerSegment(2, 4), LayerSegment(1, 3)])
def test_a_search_that_chose_other_layers_is_void(segment):
    dense = tiny_model()
    session = Session(dense)
    session.report.search = {"segments": [[2, 4]]}
    session.set_cut(cut_model(dense, [segment]), (segment,))
    assert (session.report.search is None) == (segment != LayerSegment(2, 4))
    assert session.report.cut["removed_layers"] == list(range(segment.start, segment.stop))
    whole, left = (sum(p.numel() for p in model.parameters()) for model in (dense, session.pruned_model))
    assert (session.report.cut["num_parameters_before"], session.report.cut["num_parameters_after"]) == (whole, left)


def test_the_dense_model_of_a_cut_folder_comes_in_the_cut_models_dtype(tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    report = CLPReport(base_model={"name_or_path": str(tmp_path / "dense"), "revision": None})
    session = Session(report=report, pruned_model=tiny_model(num_layers=4).bfloat16(), quiet=True)
    assert session.dense().dtype == torch.bfloat16
    assert session.dense() is session.model and session.model.config.num_hidden_layers == 6


def test_text_is_written_once_for_each_recipe_and_the_weights_are_read_once_for_each_text(tmp_path, monkeypatch):
    from optimum_clp import session as module

    texts, readings = [], []
    load, fingerprint = module.load_calibration, module.weights_fingerprint
    monkeypatch.setattr(module, "load_calibration", lambda *a, **o: texts.append(a) or load(*a, **o))
    monkeypatch.setattr(module, "weights_fingerprint", lambda *a: readings.append(a) or fingerprint(*a))
    session = Session(tiny_model(), tiny_tokenizer(), recipe(tmp_path), quiet=True)
    data = session.calibration()
    # stages behind the text do not change it
    session.use(changed(session.config, tuning={"epochs": 7}))
    assert session.calibration() is data and session.fingerprint() == session.fingerprint()
    assert session.search_journal() == session.search_journal()
    assert (len(texts), len(readings)) == (1, 1)
    session.use(recipe(tmp_path, seed=1))
    assert not torch.equal(session.calibration().train, data.train)
    assert (len(texts), len(readings)) == (2, 2)
    session.use(recipe(tmp_path, seed=1, train_sequences=5))
    assert session.report.calibration is not None and len(session.calibration().train) == 5
    session.model = tiny_model(seed=1)
    session.fingerprint()
    assert (len(texts), len(readings)) == (3, 4)


def test_each_step_has_the_train_rows_that_it_looks_at(tmp_path):
    """Writing the others takes longer than the step."""
    config = changed(recipe(tmp_path, train_sequences=9), search={"num_sequences": 3})
    config.quantization.calibration_sequences = 5
    session = Session(tiny_model(), tiny_tokenizer(), config, quiet=True)
    searched, rounded, tuned = session.search_text(), session.outcome_text(), session.calibration()
    assert [len(data.train) for data in (searched, rounded, tuned)] == [3, 5, 9]
    # what is searched on is tuned on, and what chooses the weights is the same
    assert all((tuned.train == row).all(-1).any() for row in searched.train)
    assert torch.equal(searched.validation, tuned.validation) and torch.equal(searched.test, tuned.test)
    session.report.tuning = {"layers": [1, 2]}
    assert session.outcome_text() is tuned
    config.search.num_sequences = 32
    assert session.search_text() is tuned


def test_a_search_that_is_called_alone_writes_no_test_rows(tmp_path):
    config = changed(recipe(tmp_path, train_sequences=9), search={"num_sequences": 3})
    session = Session(tiny_model(), tiny_tokenizer(), config, quiet=True)
    whole = session.search_text()
    with session.caches.run():
        alone = session.search_text()
        with session.caches.run():
            within = session.search_text()
        assert session.search_journal() is not None
    assert len(alone.test) == 1 < len(whole.test) and torch.equal(within.test, whole.test)
    for data in (alone, within):
        assert torch.equal(data.train, whole.train) and torch.equal(data.validation, whole.validation)
    # of a given text they stay set apart, or a later step would measure on what this one has looked at
    config.calibration.dataset = [" ".join(f"w{3 + (i * 7) % 90}" for i in range(600))]
    with session.caches.run():
        assert len(session.search_text().test) == len(whole.test)


def test_given_rows_are_no_longer_than_the_model_can_take():
    words = [" ".join(f"w{3 + i % 90}" for i in range(400))]
    session = Session(tiny_model(), tiny_tokenizer())
    session.config.calibration.sequence_length = 512
    assert session.rows(words, tiny_model(max_position_embeddings=32)).shape[1] == 32
    assert session.rows(words, tiny_model(max_position_embeddings=128)).shape[1] == 128


def test_a_file_without_a_folder_is_refused():
    with pytest.raises(ConfigurationError, match="file_name is 'onnx/model.onnx': no folder was opened or saved yet"):
        Session(tiny_model()).measured_model("onnx/model.onnx")
