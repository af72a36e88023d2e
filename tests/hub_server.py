"""A server that answers like the Hub where an upload asks, and fails as often as it is told to; no network is needed."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import huggingface_hub.utils

WRITER = {
    "name": "me",
    "type": "user",
    "orgs": [{"name": "team", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}],
}


class FakeHub:
    """What the server knows and has been asked.

    Attributes:
        who (`dict` or `None`): Whose token it is; `None`: it knows none.
        role (`str`): Of the token.
        repositories (`dict[str, dict]`): Those that are there.
        forbids (`bool`): Nobody may write.
        failures (`list[int]`): Answers of the next commits; 0 breaks the connection.
        busy (`list[int]`): Answers of the next requests of any kind.
        files (`dict[str, bytes]`): What has been committed.
        asked (`list[str]`): Requests, `"POST /api/..."`.
    """

    def __init__(self):
        self.who, self.role, self.forbids = WRITER, "write", False
        self.repositories, self.files = {}, {}
        self.failures, self.busy, self.asked = [], [], []

    def answer(self, verb, path, body):
        """Status and JSON; no status breaks the connection."""
        self.asked.append(f"{verb} {path}")
        if self.busy:
            return self.busy.pop(0), {"error": "busy"}
        if path == "/api/whoami-v2":
            if self.who is None:
                return 401, {"error": "Invalid username or password."}
            return 200, {**self.who, "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/repos/create":
            asked = json.loads(body)
            if self.forbids:
                return 403, {"error": "You do not have the rights"}
            name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"https://huggingface.co/{name}"}
            self.repositories[name] = {
                "id": name,
                "private": asked.get("private") or asked.get("visibility") == "private",
            }
            return 200, {"url": f"{huggingface_hub.constants.ENDPOINT}/{name}", "id": name, "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if "/commit/" in path:
            status = self.failures.pop(0) if self.failures else 200
            if status != 200:
                return status, {"error": "not now"}
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {
                "commitUrl": f"{huggingface_hub.constants.ENDPOINT}/me/x/commit/1",
                "commitOid": "1" * 40,
                "pullRequestUrl": None,
            }
        name = path.removeprefix("/api/models/").partition("?")[0].removesuffix("/revision/main")
        if name in self.repositories:
            return 200, {"modelId": name, "sha": "0" * 40, "id": name, "siblings": [], **self.repositories[name]}
        return 404, {"error": "Repository not found"}


@contextmanager
def fake_hub(monkeypatch):
    """Let huggingface_hub talk to a [`FakeHub`], with a token."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, found = hub.answer(self.command, self.path, body)
            if not status:
                self.close_connection = True
                self.connection.close()
                return
            text = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    reset_sessions()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        monkeypatch.undo()
        reset_sessions()


def reset_sessions():
    """The next request makes a session anew, by the settings of that moment."""
    close = getattr(huggingface_hub.utils._http, "close_session", None) or huggingface_hub.utils._http.reset_sessions
    close()
