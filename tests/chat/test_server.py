import http.client
import json
import socket
import threading
import time

import pytest
import torch
from browser import browser_page

from optimum_clp.chat.answering import AnswerSettings
from optimum_clp.chat.server import ChatServer, checked_settings
from optimum_clp.chat.speakers import Speaker, Speakers
from optimum_clp.errors import ConfigurationError

ASKED = {"role": "user", "content": "w7 w8"}


def serving(found, **settings):
    server = ChatServer(found, AnswerSettings(**{"max_new_tokens": 10, **settings}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@pytest.fixture
def server(speakers):
    server = serving(speakers)
    yield server
    server.stop()
    server.shutdown()
    server.server_close()


def ask(server, method="GET", place="", body=None, secret=None, **headers):
    """Status, headers and content of an answer; a header that is `None` is left out."""
    port = server.server_port
    sent = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json", **headers}
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, f"/{server.secret if secret is None else secret}/{place}", skip_host=True)
    if content is not None:
        sent.setdefault("Content-Length", str(len(content)))
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(content)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def lines(content):
    return [json.loads(line) for line in content.splitlines()]


def test_the_page_and_who_answers(server):
    status, headers, page = ask(server)
    assert status == 200 and b"<title>optimum-clp chat</title>" in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"
    assert [ask(server, place=name)[0] for name in ("page.js", "page.css", "page.py", "../server.py")] == [
        200,
        200,
        404,
        404,
    ]
    found = json.loads(ask(server, place="speakers")[2])
    assert [s["name"] for s in found["speakers"]] == ["dense", "tuned", "onnx int4"]
    assert (found["max_new_tokens"], found["temperature"], found["continues"]) == (10, 0.0, None)


def generated(speakers, name, ids, number):
    """What `generate()` says by itself."""
    options = {
        "max_new_tokens": number,
        "do_sample": False,
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
    }
    said = speakers.named(name).model.generate(torch.tensor([ids]), **options)[0, len(ids) :]
    return speakers.tokenizer.decode(said, skip_special_tokens=True)


def test_all_answer_side_by_side(server, speakers):
    body = {"messages": {s.name: [ASKED] for s in speakers.all}, "max_new_tokens": 6}
    status, headers, content = ask(server, "POST", "answers", body)
    found = lines(content)
    assert status == 200 and headers["Content-Type"] == "application/x-ndjson"
    assert [line["name"] for line in found[:3]] == ["dense", "tuned", "onnx int4"]
    for name in ("dense", "tuned", "onnx int4"):
        own = [line for line in found if line["name"] == name]
        assert own[-1]["done"] and not any(line["done"] for line in own[:-1])
        text = "".join(line["added"] for line in own)
        assert own[-1]["tokens"] <= 6 and text == generated(speakers, name, (3, 7, 8, 4), 6)
    # the same answer again, behind what was said before
    later = {"messages": {"dense": [ASKED, {"role": "assistant", "content": "w9"}, ASKED]}, "max_new_tokens": 3}
    assert lines(ask(server, "POST", "answers", later)[2])[-1]["done"]


def test_what_cannot_be_asked_is_said_in_its_column(server):
    body = {
        "messages": {"dense": [{"role": "user", "content": "w5 " * 300}], "nobody": [ASKED], "tuned": [{"role": "x"}]}
    }
    told = {line["name"]: line for line in lines(ask(server, "POST", "answers", body)[2])}
    assert all(line["done"] for line in told.values())
    assert "tokens long" in told["dense"]["error"] and "none of this name" in told["nobody"]["error"]
    assert "which is none of system, user, assistant" in told["tuned"]["error"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("\ud800", "half of a character in it"),
        ("w5\0", None),
        (5, "an empty turn"),
        ([{"type": "text"}], "an empty turn"),
    ],
)
def test_odd_words_are_answered_or_refused(server, content, error):
    body = {"messages": {"dense": [{"role": "user", "content": content}]}, "max_new_tokens": 2}
    found = lines(ask(server, "POST", "answers", body)[2])
    assert found[-1]["done"] and (error is None or error in found[-1]["error"])


def test_a_template_that_fails_says_so(speakers, monkeypatch):
    def broken(self, *given):
        raise TypeError("somebody else's template")

    monkeypatch.setattr(Speakers, "tokens_of", broken)
    server = serving(speakers)
    (line,) = lines(ask(server, "POST", "answers", {"messages": {"dense": [ASKED]}})[2])
    assert line == {"name": "dense", "error": "TypeError: somebody else's template", "done": True}
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:{port}", "Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Host": "evil.example:{port}"}, 403),  # DNS rebinding
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": None}, 403),
        ({"Host": "127.0.0.1:{port}.evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),  # another server of this machine
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
    ],
)
def test_only_this_page_of_this_machine_may_ask(server, headers, status):
    filled = {name: value and value.format(port=server.server_port) for name, value in headers.items()}
    for method, place, body in (("GET", "speakers", None), ("POST", "stop", {})):
        found, sent, content = ask(server, method, place, body, **filled)
        assert found == status
        assert "Access-Control-Allow-Origin" not in sent and (status == 200 or server.secret.encode() not in content)


@pytest.mark.parametrize("secret", ["", "x", "%C3%A9", "none/../"])
def test_without_the_secret_nothing_is_shown(server, secret):
    status, _, content = ask(server, place="speakers", secret=secret)
    assert status == 403 and b"dense" not in content


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"messages": {}}, {"Content-Type": "text/plain"}, 415),
        ({"messages": {}}, {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({}, {}, 400),
        ({"messages": []}, {}, 400),
        ([], {}, 400),
        (b"{", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"\xff", {}, 400),
        ({"messages": {"dense": [ASKED]}, "max_new_tokens": 0}, {}, 400),
        ({"messages": {"dense": [ASKED]}, "temperature": "hot"}, {}, 400),
        (b"", {"Content-Length": "9" * 30}, 413),
        (b"", {"Content-Length": "9" * 5000}, 413),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, {}, 400),
        ({"messages": {"dense": [ASKED]}, "temperature": 1e-320}, {}, 400),
        (b"", {"Content-Length": "-1"}, 411),
        (b"", {"Content-Length": None}, 411),
    ],
)
def test_a_wrong_request_is_refused(server, body, headers, status):
    assert ask(server, "POST", "answers", body, **headers)[0] == status
    assert ask(server, "PUT", "answers")[0] == 501 and ask(server, "POST", "")[0] == 404


def test_it_listens_to_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1" and server.server_port > 1023
    assert len(server.secret) >= 32 and server.secret in server.address


class Talker:
    """A model that never stops by itself, a token each 5 ms."""

    def __init__(self, model):
        self.config, self.generation_config, self.device = model.config, model.generation_config, "cpu"
        self.written = 0

    def generate(self, prompt, *, streamer, stopping_criteria, generation_config, **options):
        streamer.put(prompt)
        for _ in range(generation_config.max_new_tokens):
            time.sleep(0.005)
            self.written += 1
            streamer.put(torch.tensor([7]))
            if stopping_criteria(prompt, None).all():
                return


@pytest.fixture
def talker(speakers):
    model = Talker(speakers.all[0].model)
    server = serving(Speakers((Speaker("dense", model, "d"),), speakers.tokenizer), max_new_tokens=4000)
    yield server, model
    server.stop()
    server.shutdown()
    server.server_close()


def begin(server):
    """A connection on which an answer is being written."""
    body = json.dumps({"messages": {"dense": [ASKED]}})
    link = socket.create_connection(("127.0.0.1", server.server_port), timeout=30)
    head = f"POST /{server.secret}/answers HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
    link.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    assert link.recv(64).startswith(b"HTTP/1.1 200")
    while not server.answering:
        time.sleep(0.005)
    return link


def quiet_after(model, seconds=5.0):
    """Whether a model says nothing more, within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = model.written
        time.sleep(0.05)
        if model.written == before:
            return True
    return False


def test_who_goes_away_is_not_answered_any_more(talker):
    server, model = talker
    begin(server).close()
    assert quiet_after(model) and 0 < model.written < 1000
    assert server.turn.acquire(timeout=5), "the next one has to be answered"
    server.turn.release()


def test_an_answer_that_loops_can_be_stopped(talker):
    server, model = talker
    with begin(server) as link:
        assert ask(server, "POST", "stop", {"name": "somebody else"})[0] == 200
        assert not quiet_after(model, 0.2)
        ask(server, "POST", "stop", {"name": "dense"})
        content = b""
        while part := link.recv(65536):
            content += part
    last = json.loads(content.splitlines()[-1])
    assert last["done"] and not last["ended"] and last["loops"] == (last["tokens"] >= 64) and quiet_after(model)


@pytest.mark.parametrize(
    "values", [(0, 0), (True, 0), (1.5, 0), (10**6, 0), (5, -1), (5, 11), (5, float("nan")), (5, None), (5, 1e-320)]
)
def test_settings_that_are_none_are_refused(values):
    with pytest.raises(ConfigurationError, match="it must be a (whole )?number from"):
        checked_settings(*values)


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(speakers, base_speakers, width):
    for found in (speakers, base_speakers):
        server = serving(found)
        with browser_page(width) as (page, wrong):
            page.goto(server.address)
            for turn in (1, 2):
                page.fill("#words", "w7 w8 <img src=x onerror=alert(1)>")
                page.press("#words", "Enter")
                page.locator(".answer:not(.going)").nth(3 * turn - 1).wait_for()
            assert page.locator(".asked").first.inner_text() == "w7 w8 <img src=x onerror=alert(1)>"
            assert page.locator("img").count() == 0
            heads = [head.split("\n")[0] for head in page.locator(".answer h2 span").all_inner_texts()]
            assert heads == ["dense", "tuned", "onnx int4"] * 2
            feet = page.locator(".answer footer").all_inner_texts()
            assert all("token" in foot and ("cut short" in foot or "ended by itself" in foot) for foot in feet)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.click("#fresh")
            assert page.locator(".answer").count() == 0
            assert wrong == []
        server.shutdown()
        server.server_close()


def test_a_loop_is_marked_in_a_browser_and_one_column_is_stopped(talker):
    server, model = talker
    with browser_page() as (page, wrong):
        page.goto(server.address)
        page.fill("#words", "w7")
        page.click("#send")
        page.locator(".answer.going footer b", has_text="loops").wait_for()
        assert page.locator("#send").is_disabled()
        page.locator(".answer footer button").click()
        page.locator(".answer:not(.going)").wait_for()
        assert "cut short" in page.locator(".answer footer").inner_text()
        page.locator("#send:enabled").wait_for()
        assert wrong == [] and quiet_after(model)
