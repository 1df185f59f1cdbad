"""A token service for tests (distribution-spec "token authentication"), on loopback."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

USER, PASSWORD = "alice", "s3cret:pass"


@dataclass
class TokenServer:
    """A token service for docker-registry: signs JWTs (RS256, by openssl). Counts what it is asked.

    life: seconds a token is said to last; `users`: name -> password; `refresh_tokens`: accepted identity tokens;
    anonymous: whether tokens are given to nobody in particular.
    """

    directory: Path
    users: dict[str, str] = field(default_factory=lambda: {USER: PASSWORD})
    refresh_tokens: set[str] = field(default_factory=set)
    anonymous: bool = False
    life: int = 300
    service: str = "test-registry"
    issued: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    delay: float = 0.0

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "30",
                "-keyout",
                "key.pem",
                "-out",
                "cert.pem",
                "-subj",
                "/CN=tokens",
            ],
            cwd=self.directory,
            check=True,
            capture_output=True,
        )
        tokens = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
                tokens.answer(self, "GET", query)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                tokens.answer(self, "POST", urllib.parse.parse_qs(body.decode()))

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/token"

    def answer(self, handler: http.server.BaseHTTPRequestHandler, method: str, query: dict[str, list[str]]) -> None:
        header = handler.headers.get("Authorization", "")
        self.requests.append({"method": method, "query": query, "authorization": header})
        time.sleep(self.delay)  # how slow the service is, not a wait for anything
        allowed = self.anonymous and not header and method == "GET"
        if header.startswith("Basic "):
            user, _, password = base64.b64decode(header[6:]).decode().partition(":")
            allowed = self.users.get(user) == password
        if method == "POST":
            allowed = query.get("refresh_token", [""])[0] in self.refresh_tokens
        status = 200 if allowed else 401
        data: dict[str, Any] = {"errors": [{"code": "UNAUTHORIZED"}]}
        if allowed:
            self.issued += 1
            scopes = [scope for text in query.get("scope", []) for scope in text.split()]
            data = {"token" if method == "GET" else "access_token": self.sign(scopes), "expires_in": self.life}
        body = json.dumps(data).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def sign(self, scopes: Sequence[str], life: int | None = None) -> str:
        """A JWT that docker-registry accepts for `scopes` ("repository:NAME:pull,push")."""
        now = int(time.time())
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        pem = (self.directory / "cert.pem").read_text()
        der = "".join(line for line in pem.splitlines() if not line.startswith("-"))
        claims = {"iss": "tests", "sub": USER, "aud": self.service, "access": access, "jti": str(self.issued)}
        claims |= {"nbf": now - 10, "iat": now, "exp": now + (self.life if life is None else life)}
        parts = [_b64(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "RS256", "x5c": [der]}, claims)]
        signed = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", "key.pem"],
            cwd=self.directory,
            input=".".join(parts).encode(),
            capture_output=True,
            check=True,
        ).stdout
        return ".".join((*parts, _b64(signed)))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
