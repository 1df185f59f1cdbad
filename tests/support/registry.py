"""Debian's docker-registry (distribution 2.8) on a free loopback port, for tests: plain, htpasswd, token auth, TLS.

    with Registry() as registry:
        digest = registry.push_image("small", "v1", [layer_tar_gz])
        ref = registry.ref("small", "v1")

The registry is the real thing; images are pushed over its HTTP API. It is killed and its storage removed at the end.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import http.server
import io
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import tarfile
import tempfile
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shim.registry.client import RegistryClient
from shim.registry.credentials import CredentialStore
from shim.registry.hooks import Hooks
from shim.registry.retry import RetryPolicy
from tests.support.service import Service
from tests.support.tokens import PASSWORD, USER, TokenServer

PROGRAM = "docker-registry"
# bcrypt of PASSWORD at the least cost: a registry checks it with every request
HTPASSWD = "alice:$2b$05$abcdefghijklmnopqrstuuKqhJSfTIYV1SkiVqP0GjQATd/vnrS1a\n"
OCI = "application/vnd.oci.image."
START_DEADLINE = 20.0


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """A plain tar of regular files, the same bytes each time."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def gzip_of(data: bytes) -> bytes:
    return gzip.compress(data, 6, mtime=0)


class World(Hooks):
    """Hooks whose waits take no time: `sleeps` has them, and the clock goes on by as much. Warnings are kept."""

    def __init__(self) -> None:
        self.sleeps: list[float] = []
        self.warnings: list[str] = []
        self.extra = 0.0
        super().__init__(
            clock=lambda: time.monotonic() + self.extra,
            wall=lambda: time.time() + self.extra,
            sleep=self._sleep,
            random=lambda: 1.0,
            warn=self.warnings.append,
        )

    def _sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.extra += seconds


def make_client(
    home: Path, registries: Mapping[str, Any] | None = None, *, hooks: Hooks | None = None, **options: Any
) -> RegistryClient:
    """A client that knows nothing of this machine: credentials from `home` alone, no certs.d, quick retries."""
    hooks = hooks or Hooks()
    env = {"HOME": str(home), "XDG_RUNTIME_DIR": str(home / "run")}
    options.setdefault("credentials", CredentialStore(env, hooks=hooks))
    options.setdefault("policy", RetryPolicy(base=0.01, cap=0.05))
    return RegistryClient(registries, hooks=hooks, certs_dirs=(), **options)


def make_certificates(directory: Path, *names: str) -> None:
    """ca.crt, ca.key, server.crt, server.key (for 127.0.0.1, localhost and `names`), client.crt, client.key."""
    directory.mkdir(parents=True, exist_ok=True)

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=directory, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30")
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=clip-shim test CA")
    alt = ",".join(["IP:127.0.0.1", "IP:127.0.0.2", "DNS:localhost", *(f"DNS:{name}" for name in names)])
    for who, extension in (("server", f"subjectAltName={alt}"), ("client", "extendedKeyUsage=clientAuth")):
        openssl("req", "-new", *curve[:-2], "-keyout", f"{who}.key", "-out", f"{who}.csr", "-subj", f"/CN={who}")
        (directory / f"{who}.ext").write_text(extension + "\n")
        openssl(
            *("x509", "-req", "-in", f"{who}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", "30", "-out", f"{who}.crt", "-extfile", f"{who}.ext"),
        )


class Registry(Service):
    """A running docker-registry. `host` is 127.0.0.1:PORT, `storage` its files."""

    def __init__(
        self,
        *,
        htpasswd: bool = False,
        tokens: TokenServer | None = None,
        tls: Path | None = None,
        client_ca: Path | None = None,
        storage: Path | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        """tls: a directory of make_certificates; client_ca: a CA whose client certificates are demanded."""
        self._own = Path(tempfile.mkdtemp(prefix="clip-registry-"))
        self.storage = storage or self._own / "storage"
        self.tls = tls
        self.tokens = tokens
        self._address = address
        self._http: dict[str, Any] = {"addr": f"{address}:0", "secret": "tests", "net": "tcp"}
        if tls is not None:
            self._http["tls"] = {"certificate": str(tls / "server.crt"), "key": str(tls / "server.key")}
            if client_ca is not None:
                self._http["tls"]["clientcas"] = [str(client_ca)]
        self._client_ca = client_ca
        self._auth: dict[str, Any] = {}
        if htpasswd:
            (self._own / "htpasswd").write_text(HTPASSWD)
            self._auth = {"htpasswd": {"realm": "tests", "path": str(self._own / "htpasswd")}}
        if tokens is not None:
            bundle = str(tokens.directory / "cert.pem")
            options = {"realm": tokens.url, "service": tokens.service, "issuer": "tests", "rootcertbundle": bundle}
            self._auth = {"token": options}
        self.host = ""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self.storage)}, "delete": {"enabled": True}},
            "http": self._http,
        }
        config |= {"auth": self._auth} if self._auth else {}
        path, log = self._own / "config.yml", self._own / "log"
        path.write_text(json.dumps(config))  # JSON is YAML
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [PROGRAM, "serve", str(path)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
                start_new_session=True,
            )
        deadline = time.monotonic() + START_DEADLINE
        while True:
            found = re.search(r"listening on [^\s\"]*:(\d+)", log.read_text(errors="replace"))
            if found:
                self.host = f"{self._address}:{found[1]}"
                self._http["addr"] = self.host  # a restart keeps the port
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("docker-registry did not start:\n" + log.read_text(errors="replace")[-2000:])
            time.sleep(0.01)

    def kill(self) -> None:
        """End the process at once; `start` brings it back on the same port with the same storage."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self._own, ignore_errors=True)

    def ref(self, name: str, tag: str = "latest") -> str:
        return f"{self.host}/{name}:{tag}"

    def push_blob(self, name: str, data: bytes) -> str:
        """Upload one blob; its digest."""
        digest = sha256(data)
        status, headers, body = self._call("POST", name, f"/v2/{name}/blobs/uploads/", b"", {})
        _expect(status, 202, body)
        target = urllib.parse.urlsplit(headers["Location"])
        path = f"{target.path}?{target.query}&digest={urllib.parse.quote(digest)}"
        status, _, body = self._call("PUT", name, path, data, {"Content-Type": "application/octet-stream"})
        _expect(status, 201, body)
        return digest

    def push_manifest(self, name: str, reference: str, manifest: Mapping[str, Any] | bytes, media_type: str) -> str:
        """Put a manifest or index under a tag or digest ("" for its own digest); its digest."""
        raw = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        path = f"/v2/{name}/manifests/{reference or sha256(raw)}"
        status, _, body = self._call("PUT", name, path, raw, {"Content-Type": media_type})
        _expect(status, 201, body)
        return sha256(raw)

    def push_image(
        self,
        name: str,
        tag: str,
        layers: Sequence[bytes],
        *,
        config: Mapping[str, Any] | None = None,
        diff_ids: Sequence[str] | None = None,
        platform: str = "linux/amd64",
        layer_type: str = OCI + "layer.v1.tar+gzip",
    ) -> str:
        """Push an OCI image; tag "" pushes by digest only. `diff_ids` default to those of the gunzipped layers."""
        if diff_ids is None:
            diff_ids = [sha256(gzip.decompress(layer) if layer[:2] == b"\x1f\x8b" else layer) for layer in layers]
        parts = platform.split("/")
        full = {"os": parts[0], "architecture": parts[1], "config": {}} | ({"variant": parts[2]} if parts[2:] else {})
        full |= {"rootfs": {"type": "layers", "diff_ids": list(diff_ids)}, **(config or {})}
        raw = json.dumps(full).encode()
        self.push_blob(name, raw)
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI + "manifest.v1+json",
            "config": {"mediaType": OCI + "config.v1+json", "digest": sha256(raw), "size": len(raw)},
            "layers": [
                {"mediaType": layer_type, "digest": self.push_blob(name, layer), "size": len(layer)} for layer in layers
            ],
        }
        return self.push_manifest(name, tag, manifest, OCI + "manifest.v1+json")

    def push_index(
        self, name: str, tag: str, images: Mapping[str, str], extra: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Push an image index of platform -> digest of a manifest that is there; `extra` entries are put in front."""
        entries: list[Mapping[str, Any]] = [*extra]
        for platform, digest in images.items():
            parts = platform.split("/")
            described = {"os": parts[0], "architecture": parts[1]} | ({"variant": parts[2]} if parts[2:] else {})
            size = len(self.get(f"/v2/{name}/manifests/{digest}", name)[1])
            entries.append(
                {"mediaType": OCI + "manifest.v1+json", "digest": digest, "size": size, "platform": described}
            )
        index = {"schemaVersion": 2, "mediaType": OCI + "index.v1+json", "manifests": entries}
        return self.push_manifest(name, tag, index, OCI + "index.v1+json")

    def push_layout(self, layout: Path, name: str, tag: str, source_tag: str = "") -> None:
        """Copy an OCI layout with skopeo, as users do."""
        source = f"oci:{layout}" + (f":{source_tag}" if source_tag else "")
        command = ["skopeo", "copy", "-q", "--insecure-policy", "--dest-tls-verify=false"]
        if "htpasswd" in self._auth:
            command += ["--dest-creds", f"{USER}:{PASSWORD}"]
        subprocess.run([*command, source, f"docker://{self.ref(name, tag)}"], check=True, capture_output=True)

    def get(self, path: str, name: str = "") -> tuple[int, bytes]:
        """(status, body) of a GET with the right to read `name`."""
        kinds = (
            f"{OCI}manifest.v1+json",
            f"{OCI}index.v1+json",
            "application/vnd.docker.distribution.manifest.v2+json",
        )
        accept = {"Accept": ", ".join((*kinds, "*/*"))}
        status, _, body = self._call("GET", name, path, None, accept)
        return status, body

    def _call(
        self, method: str, name: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        sent = dict(headers)
        if "htpasswd" in self._auth:
            sent["Authorization"] = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.tokens is not None:
            sent["Authorization"] = "Bearer " + self.tokens.sign([f"repository:{name}:pull,push"], 300)
        connection: http.client.HTTPConnection
        if self.tls is not None:
            context = ssl.create_default_context(cafile=str(self.tls / "ca.crt"))
            if self._client_ca is not None:
                context.load_cert_chain(self.tls / "client.crt", self.tls / "client.key")
            connection = http.client.HTTPSConnection(self.host, context=context, timeout=30)
        else:
            connection = http.client.HTTPConnection(self.host, timeout=30)
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()


def _expect(status: int, wanted: int, body: bytes) -> None:
    if status != wanted:
        raise RuntimeError(f"the registry answered {status}: {body[:500]!r}")
