"""Credentials from where Docker and podman keep them. Read again when the file changes; never shown.

Files, first match wins: $REGISTRY_AUTH_FILE (then alone of podman's), $DOCKER_CONFIG/config.json or
~/.docker/config.json, and podman's $XDG_RUNTIME_DIR/containers/auth.json, /run/containers/UID/auth.json,
/run/user/UID/containers/auth.json, ~/.config/containers/auth.json (containers-auth.json(5); docker-login(1)). Home is
/root when HOME is not set, as for a daemon. Helpers are run as docker-credential-helpers describes:
`docker-credential-NAME get`, the server on standard input.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shim.registry.helper import run_helper
from shim.registry.hooks import Hooks

MAX_FILE = 1 << 20
HELPER_TTL = 300.0  # seconds a helper's answer is used again; its tokens live for an hour or more
HUB_NAMES = ("docker.io", "index.docker.io", "registry-1.docker.io")
HUB_SERVER = "https://index.docker.io/v1/"
TOKEN_USER = "<token>"  # noqa: S105 - what helpers give as user name beside an identity token


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and password, or an identity (refresh) token, or a ready bearer token. `source` may be shown."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    source: str = ""

    @property
    def basic(self) -> str:
        """The value of an Authorization header for basic auth."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()

    def secrets(self) -> tuple[str, ...]:
        """Texts that must never be shown."""
        own = (self.password, self.identity_token, self.registry_token)
        return (*own, self.basic.removeprefix("Basic ")) if self.password else own


class CredentialStore:
    """Looks credentials up. Thread-safe. `env` and `uid` default to the process's; `extra` files come first."""

    def __init__(
        self, env: Mapping[str, str] | None = None, *, hooks: Hooks | None = None, extra: tuple[str, ...] = ()
    ) -> None:
        self._env = os.environ if env is None else env
        self._hooks = hooks or Hooks()
        self._extra = extra
        self._lock = threading.Lock()
        self._files: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {}
        self._helped: dict[tuple[str, str], tuple[float, Credentials | None]] = {}
        self.problems: dict[str, str] = {}  # file or helper -> why it could not be used; shown beside auth errors

    def lookup(self, host: str, repository: str) -> Credentials | None:
        """What to tell `host` (host[:port], docker.io for Docker Hub) for `repository`, or None. Never raises."""
        for path in self._paths():
            found = self._from_file(path, self._load(path), host, repository)
            if found is not None:
                return found
        return None

    def forget(self, host: str) -> None:
        """Ask helpers again for `host`: what they gave was refused."""
        with self._lock:
            for key in [key for key in self._helped if key[1] in (host, HUB_SERVER)]:
                del self._helped[key]

    def _paths(self) -> Iterator[str]:
        env, uid = self._env, os.getuid()
        home = env.get("HOME") or "/root"
        yield from self._extra
        named = env.get("REGISTRY_AUTH_FILE")
        if named:
            yield named
        yield os.path.join(env.get("DOCKER_CONFIG") or os.path.join(home, ".docker"), "config.json")
        if named:
            return
        if env.get("XDG_RUNTIME_DIR"):
            yield os.path.join(env["XDG_RUNTIME_DIR"], "containers/auth.json")
        yield f"/run/containers/{uid}/auth.json"
        yield f"/run/user/{uid}/containers/auth.json"
        yield os.path.join(env.get("XDG_CONFIG_HOME") or os.path.join(home, ".config"), "containers/auth.json")

    def _load(self, path: str) -> dict[str, Any]:
        stamp = None
        try:
            info = os.stat(path)
            stamp = (info.st_ino, info.st_size, info.st_mtime_ns)
            with self._lock:
                known = self._files.get(path)
            if known is not None and known[0] == stamp:
                return known[1]
            if info.st_size > MAX_FILE:
                return self._broken(path, stamp, f"it is larger than {MAX_FILE} bytes")
            with open(path, "rb") as file:
                data = json.loads(file.read(MAX_FILE))
        except FileNotFoundError:
            return {}
        except OSError as error:
            return self._broken(path, None, error.strerror or "it cannot be read")
        except (ValueError, RecursionError):
            return self._broken(path, stamp, "it is not valid JSON")
        if not isinstance(data, dict):
            return self._broken(path, stamp, "it is not a JSON object")
        with self._lock:
            self._files[path] = (stamp, data)
            self.problems.pop(path, None)
        return data

    def _broken(self, path: str, stamp: tuple[int, int, int] | None, why: str) -> dict[str, Any]:
        with self._lock:
            if stamp is not None:
                self._files[path] = (stamp, {})
            new = self.problems.get(path) != why
            self.problems[path] = why
        if new:
            self._hooks.warn(f"{path} is not used for credentials: {why}")
        return {}

    def _from_file(self, path: str, data: dict[str, Any], host: str, repository: str) -> Credentials | None:
        helpers = _table(data.get("credHelpers"))
        for key in _keys(host, repository):
            for name, helper in helpers.items():
                if _plain_key(name) == key and isinstance(helper, str):
                    return self._from_helper(helper, host)  # as with Docker: a registry's helper has the last word
        store = data.get("credsStore")
        if isinstance(store, str) and store:
            found = self._from_helper(store, host)
            if found is not None:
                return found
        auths = {_plain_key(name): entry for name, entry in _table(data.get("auths")).items()}
        for key in _keys(host, repository):
            found = _decode(auths.get(key), path)
            if found is not None:
                return found
        return None

    def _from_helper(self, helper: str, host: str) -> Credentials | None:
        server = HUB_SERVER if host in HUB_NAMES else host
        now = self._hooks.clock()
        with self._lock:
            known = self._helped.get((helper, server))
        if known is not None and now < known[0]:
            return known[1]
        username, secret, problem = run_helper(helper, server, self._env)
        name = f"docker-credential-{helper[:60]}"
        if problem:
            with self._lock:
                self.problems[name] = problem
            self._hooks.warn(f"{name} gave no credentials for {host}: {problem}")
            return None
        found = None
        if secret:
            token = username == TOKEN_USER
            found = Credentials("" if token else username, "" if token else secret, secret if token else "", "", name)
        with self._lock:
            self.problems.pop(name, None)
            self._helped[(helper, server)] = (now + HELPER_TTL, found)
        return found


def _table(value: object) -> dict[str, Any]:
    return {k: v for k, v in value.items() if isinstance(k, str)} if isinstance(value, dict) else {}


def _keys(host: str, repository: str) -> Iterator[str]:
    """Most specific first: host/a/b, host/a, host (containers-auth.json(5))."""
    names = HUB_NAMES if host in HUB_NAMES else (host,)
    parts = repository.split("/")
    for n in range(len(parts), 0, -1):
        for name in names:
            yield f"{name}/{'/'.join(parts[:n])}".lower()
    for name in names:
        yield name.lower()


def _plain_key(key: str) -> str:
    """A key with a scheme is an old URL: only its host counts. One without may have a repository."""
    text = key.lower()
    bare = re.sub(r"\Ahttps?://", "", text)
    if bare != text:
        return bare.partition("/")[0]
    return re.sub(r"/v[12]/?\Z", "", bare).rstrip("/")


def _decode(entry: object, source: str) -> Credentials | None:
    item = _table(entry)
    username, password = item.get("username"), item.get("password")
    if isinstance(item.get("auth"), str) and item["auth"]:
        try:
            text = base64.b64decode(item["auth"], validate=False).decode()
        except (ValueError, binascii.Error):
            return None
        username, _, password = text.partition(":")
        password = password.rstrip("\0")  # old Docker clients pad with NUL
    tokens = [item.get(name) for name in ("identitytoken", "registrytoken")]
    texts = [value if isinstance(value, str) else "" for value in (username, password, *tokens)]
    found = Credentials(texts[0], texts[1], texts[2], texts[3], source)
    return found if found.password or found.identity_token or found.registry_token else None
