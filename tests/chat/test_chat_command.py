import io
import json
import urllib.request
from threading import Thread

import pytest

from optimum_clp.chat.server import ChatServer
from optimum_clp.commands.clp import main


@pytest.fixture
def typed(monkeypatch):
    def say(text):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    return say


def test_in_the_terminal_what_was_said_is_the_result(written, typed, capsys):
    typed("w7 w8\n\n")
    line = ["chat", str(written.folder), "--no-browser", "--max-new-tokens", "3", "--quiet"]
    assert main([*line, "--json"]) == 0
    (turn,) = json.loads(capsys.readouterr().out)["turns"]
    assert turn["prompt"] == "w7 w8" and list(turn["answers"]) == ["dense", "tuned", "onnx int4"]
    assert all(1 <= answer["tokens"] <= 3 for answer in turn["answers"].values())
    typed("w7 w8\n")
    assert main(line) == 0
    said = capsys.readouterr().out
    assert said.startswith("> w7 w8\ndense: ") and f"\nonnx int4: {turn['answers']['onnx int4']['text']}\n" in said


def test_on_a_page_the_address_is_opened_and_told(written, monkeypatch, capsys):
    seen = {}

    def browser(address):
        seen["address"] = address

    def serve(self):
        thread = Thread(target=self.handle_request)
        thread.start()
        with urllib.request.urlopen(seen["address"]) as answer:
            seen["page"] = answer.read()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr("webbrowser.open", browser)
    monkeypatch.setattr(ChatServer, "serve_forever", serve)
    assert main(["chat", "-m", str(written.folder)]) == 0
    told = capsys.readouterr()
    assert b"Side by side" in seen["page"] and f"The page is at {seen['address']} (for this machine alone)" in told.err
    assert told.out == "The page is closed.\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("chat FOLDER --max-new-tokens 0", "max_new_tokens is 0: it must be a whole number from 1 to 8192"),
        ("chat FOLDER --temperature -1", "temperature is -1.0: it must be a number from 0"),
        ("chat FOLDER --dense no/such/model", "no/such/model"),
        ("chat nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_is_one_message(line, words, written, capsys):
    assert main(line.replace("FOLDER", str(written.folder)).split()) == 1
    told = capsys.readouterr().err
    assert "optimum-clp: error: " in told and words in told and "Traceback" not in told


@pytest.mark.parametrize("line", ["chat", "chat a -m b"])
def test_one_folder_is_needed(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2 and "give one FOLDER, alone or behind --model" in capsys.readouterr().err
