"""The page to try a folder on, served to this machine's own user and nobody else.

It listens on the loopback interface, on a port that the system chooses, and its address has a secret in it. That alone does
not hold other web pages off, which the same browser shows: so each request must name this server as its host (a name that a
stranger lets point to 127.0.0.1 does not: DNS rebinding), must come from this page if it says where it comes from
(`Origin`, `Sec-Fetch-Site`), and what changes something must be JSON, which a foreign page cannot send without asking first.
"""

import hmac
import http.server
import json
import secrets
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ..errors import CLPError, ConfigurationError
from ..evaluation.prompts import load_prompts
from ..json_files import JsonProblem, parse
from .answering import Answering, AnswerSettings, answer_in_turn
from .speakers import Speakers

_PARTS = Path(__file__).parent
_FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
_LARGEST_BODY = 2**20
_MOST_TOKENS = 8192
# below it logits are divided to infinities
_LEAST_TEMPERATURE = 0.001


class ChatServer(http.server.ThreadingHTTPServer):
    """Serves the page and the answers.

    Args:
        speakers ([`Speakers`]): Who answers.
        settings ([`AnswerSettings`]): How, if the page does not say otherwise.

    Attributes:
        address (`str`): Where the page is, secret included.
    """

    daemon_threads = True
    allow_reuse_address = False

    def __init__(self, speakers: Speakers, settings: AnswerSettings | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.speakers, self.settings = speakers, settings or AnswerSettings()
        self.secret = secrets.token_urlsafe(24)
        # the models answer one request at a time
        self.turn = threading.Lock()
        self.answering: dict[str, Answering] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.secret}/"

    def stop(self, name: str | None = None) -> None:
        """Let an answer end that is being written, or all of them."""
        for answer in list(self.answering.values()):
            if name in (None, answer.name):
                answer.stop()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error."""


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, why: str):
        super().__init__(why)
        self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "optimum-clp", ""
    # of a client that says nothing
    timeout = 60

    def do_GET(self) -> None:
        self._answer({**dict.fromkeys(_FILES, self._file), "speakers": self._speakers})

    def do_POST(self) -> None:
        self._answer({"answers": self._answers, "stop": self._stop})

    def _answer(self, doors: dict[str, Any]) -> None:
        self.close_connection = True
        try:
            place = self._place()
            if place not in doors:
                raise _Refused(HTTPStatus.NOT_FOUND, "There is nothing here.")
            doors[place](place)
        except _Refused as refused:
            self._send(refused.status, "text/plain; charset=utf-8", f"{refused}\n".encode())

    def _place(self) -> str:
        """What is asked for, if whoever asks may."""
        port = self.server.server_port
        hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        if self.headers.get("Host") not in hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "This server has another name.")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site")
        if origin is not None and origin not in {f"http://{host}" for host in hosts}:
            raise _Refused(HTTPStatus.FORBIDDEN, "Other pages may not ask.")
        # none: typed into the address bar
        if site not in (None, "same-origin", "none"):
            raise _Refused(HTTPStatus.FORBIDDEN, "Other pages may not ask.")
        secret, _, place = self.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(secret.encode("utf-8", "replace"), self.server.secret.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "The secret in the address is missing or wrong.")
        return place

    def _file(self, place: str) -> None:
        name, kind = _FILES[place]
        self._send(HTTPStatus.OK, kind, (_PARTS / name).read_bytes())

    def _speakers(self, place: str) -> None:
        speakers, settings = self.server.speakers, self.server.settings
        found = {
            "speakers": [{"name": speaker.name, "source": speaker.source} for speaker in speakers.all],
            "left_out": list(speakers.left_out),
            "continues": speakers.continues,
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
        }
        self._send(HTTPStatus.OK, "application/json", json.dumps(found).encode())

    def _stop(self, place: str) -> None:
        name = self._body().get("name")
        self.server.stop(name if isinstance(name, str) else None)
        self._send(HTTPStatus.OK, "application/json", b"{}")

    def _answers(self, place: str) -> None:
        """Answers as they grow: a JSON object a line, until the connection closes; a browser that closes it stops them."""
        body = self._body()
        settings, asked = self._settings(body), body.get("messages")
        if not isinstance(asked, dict) or not asked:
            raise _Refused(HTTPStatus.BAD_REQUEST, "There are no messages.")
        with self.server.turn:
            self.send_response(HTTPStatus.OK)
            self._headers("application/x-ndjson")
            try:
                self._write_answers(asked, settings)
            except OSError:  # the browser has gone, or was told to stop
                pass
            finally:
                self.server.answering = {}

    def _write_answers(self, asked: dict[str, Any], settings: AnswerSettings) -> None:
        speakers, prepared = self.server.speakers, []
        for name, messages in asked.items():
            try:
                speaker = speakers.named(name)
                (prompt,) = load_prompts([{"messages": messages}])
                prepared.append((speaker, speakers.tokens_of(prompt, speaker)))
            except CLPError as error:
                self._line({"name": name, "error": error.problems[0].rule, "done": True})
            except Exception as error:  # of a template or a tokenizer that is somebody else's
                self._line({"name": name, "error": _said(error), "done": True})
        # threads begin here, and nothing that may fail lies between them and what ends them
        answers = [Answering(speakers, speaker, ids, settings) for speaker, ids in prepared]
        self.server.answering = {answer.name: answer for answer in answers}
        for answer, added in answer_in_turn(answers):
            line = {"name": answer.name, "added": added, **answer.figures()}
            if answer.error is not None:
                line["error"] = _said(answer.error)
            self._line(line)

    def _settings(self, body: dict[str, Any]) -> AnswerSettings:
        own = self.server.settings
        try:
            return checked_settings(
                body.get("max_new_tokens", own.max_new_tokens), body.get("temperature", own.temperature)
            )
        except ConfigurationError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from error

    def _body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "What is sent must be JSON.")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "What is sent must say its length.")
        # no number of more digits is made of what a stranger sends
        if len(length) > len(str(_LARGEST_BODY)) or int(length) > _LARGEST_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "What is sent is too long.")
        try:
            body = parse(self.rfile.read(int(length)))
        except JsonProblem as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, "What is sent is not JSON.") from error
        if not isinstance(body, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "What is sent is no object.")
        return body

    def _line(self, values: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(values).encode() + b"\n")

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self._headers(kind, {"Content-Length": str(len(content))})
        self.wfile.write(content)

    def _headers(self, kind: str, more: dict[str, str] | None = None) -> None:
        for name, value in {"Content-Type": kind, "Connection": "close", **_HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address, which would be in each line, has a secret in it."""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def checked_settings(max_new_tokens: Any, temperature: Any) -> AnswerSettings:
    """How answers are to be written, from what a stranger sends or a user types.

    Raises:
        ConfigurationError: If a value is none.
    """
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or not 1 <= max_new_tokens <= _MOST_TOKENS
    ):
        rule = f"it must be a whole number from 1 to {_MOST_TOKENS}"
        raise ConfigurationError.of("max_new_tokens", max_new_tokens, rule, "Give for example 256")
    known = not isinstance(temperature, bool) and isinstance(temperature, (int, float))
    if not known or not (temperature == 0 or _LEAST_TEMPERATURE <= temperature <= 10):
        rule = f"it must be a number from 0 (the most likely token) to 10, and at least {_LEAST_TEMPERATURE} if it is not 0"
        raise ConfigurationError.of("temperature", temperature, rule, "Give for example 0.7")
    return AnswerSettings(max_new_tokens, float(temperature))
