"""Uploads: what is missing is told before the work, and a server that is busy for a moment is asked again."""

import logging

import huggingface_hub.constants
import pytest
from hub_server import WRITER, fake_hub, reset_sessions
from report_example import example_report

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.errors import ConfigurationError, OutputError
from optimum_clp.report import hub_access
from optimum_clp.report.hub import upload
from optimum_clp.report.hub_access import check_upload, patiently, wanted_upload


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(hub_access, "WAITS", (0.01, 0.01, 0.01, 0.01))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with fake_hub(monkeypatch) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "out"
    (folder / "onnx").mkdir(parents=True)
    example_report().save(folder)
    CLPConfig().save_pretrained(folder)
    (folder / "onnx" / "model_q4.onnx").write_bytes(b"weights")
    return folder


def test_who_may_write_there_goes_on(hub):
    for name in ("me/x", "x", "team/x"):
        check_upload(name)
    hub.repositories["me/x"] = {"private": True}
    check_upload("me/x", private=True)
    assert not [line for line in hub.asked if line.startswith("POST")], "nothing is made before the work"


@pytest.mark.parametrize(
    ("repo", "change", "said"),
    [
        (
            "me/x",
            {"who": None},
            "the Hugging Face Hub does not know this token (401). Log in with `hf auth login`, or set HF_TOKEN",
        ),
        ("me/x", {"role": "read"}, "the token of me may only read. Log in with"),
        ("you/x", {}, "me, whose token this is, may not write in you. Give 'me/x', or a token of somebody who may."),
        ("club/x", {}, "me, whose token this is, may not write in club."),
        ("me/x", {"busy": [503] * 9}, "could not be reached (it answered 503), 5 times. Check the network"),
        ("me/x", {"busy": [418]}, "the Hugging Face Hub refused it (418"),
    ],
)
def test_what_is_missing_is_told_before_the_work(hub, repo, change, said):
    vars(hub).update(change)
    with pytest.raises(OutputError) as told:
        check_upload(repo)
    assert str(told.value).startswith(f"repo_id is {repo!r}: ") and said in str(told.value)


def test_without_a_token_it_says_how_to_log_in(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(
        OutputError,
        match="nobody is logged in to the Hugging Face Hub here. Log in with `hf auth login`, or set HF_TOKEN",
    ):
        check_upload("me/x")


def test_a_public_repository_does_not_become_private_by_itself(hub):
    hub.repositories["me/x"] = {"private": False}
    with pytest.raises(
        ConfigurationError, match=r"private is True: me/x: the repository exists and is public, and would stay so"
    ):
        check_upload("me/x", private=True)


def test_without_a_network(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        OutputError,
        match=r"could not be reached \(.*\), 5 times. Check the network and .* or upload later, from the folder",
    ):
        check_upload("me/x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    with pytest.raises(
        OutputError, match="HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or upload later"
    ):
        check_upload("me/x")


def test_an_upload_goes_on_after_a_busy_server_and_a_broken_connection(hub, folder, caplog):
    hub.failures = [503, 0]
    with caplog.at_level(logging.INFO, "optimum_clp"):
        assert "/commit/1" in upload(folder, "me/x", private=True)
    assert hub.files["onnx/model_q4.onnx"] == b"weights" and b"me/x" in hub.files["README.md"]
    assert hub.repositories["me/x"]["private"] and hub.failures == []
    commits = [line for line in hub.asked if "/commit/" in line]
    assert len(commits) == 3
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"forbids": True},
            "the Hugging Face Hub does not let this token write there (403). Give a repository of your own.",
        ),
        ({"failures": [403]}, "the Hugging Face Hub does not let this token write there (403)"),
        ({"failures": [500] * 40}, "could not be reached (it answered 500), 5 times"),
        ({"failures": [400]}, "the Hugging Face Hub refused it (400"),
    ],
)
def test_an_upload_that_is_refused_says_what_to_do_and_leaves_the_folder(hub, folder, change, said):
    vars(hub).update(change)
    with pytest.raises(OutputError) as told:
        upload(folder, "me/x")
    assert said in str(told.value) and (folder / "onnx" / "model_q4.onnx").read_bytes() == b"weights"


def test_what_would_not_go_away_is_not_asked_again():
    calls = []

    def fails():
        calls.append(1)
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        patiently(fails, "work")
    assert calls == [1] and hub_access.hub_problem(ValueError("x"), "me/x") is None


def test_an_upload_that_is_asked_for_with_the_folder_is_checked_before(hub, tmp_path):
    options = {"repo_id": "team/x", "private": None}
    assert wanted_upload(tmp_path / "out", options) == "team/x" and options == {"private": None}
    assert wanted_upload(tmp_path / "out", {}) == "out" and WRITER["name"] == "me"
