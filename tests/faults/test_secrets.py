"""Nothing secret is told: a run with everything that can hold a secret, at debug level, then a search through all that
it wrote, printed, served and kept."""

from __future__ import annotations

import base64
import json
import os
import signal
import tarfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import bundle, images
from tests.support.daemonclient import Client, descendants, log_lines, server_pid
from tests.support.faultserver import FaultServer
from tests.support.host import Host, wait_for
from tests.support.registry import Registry, TokenServer
from tests.support.tokens import PASSWORD, USER

HEADER = "header-secret-4711"
SIGNATURE = "presigned-secret-4712"
S3_SECRET = "s3-secret-4713"
WRONG = "wrong-secret-4714"


def files_below(*directories: Path) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every regular file; layers' data has no secrets of ours, and is skipped."""
    for directory in directories:
        for path in directory.rglob("*"):
            if "blobs" in path.parts or "trees" in path.parts[-3:-1] or path.name == "data" or path.is_symlink():
                continue
            if path.is_file():
                yield str(path), path.read_bytes()


def archive_files(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield f"{path.name}: {member.name}", file.read()


def login(host: Host, registry: str, password: str) -> None:
    directory = host.base / "docker"
    directory.mkdir(exist_ok=True)
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {registry: {"auth": auth}}}))
    host.env["DOCKER_CONFIG"] = str(directory)


def test_a_run_at_debug_level(tmp_path: Path) -> None:
    tokens = TokenServer(tmp_path / "tokens")
    issued: list[str] = []
    sign = tokens.sign
    tokens.sign = lambda *args, **more: issued.append(sign(*args, **more)) or issued[-1]  # type: ignore[method-assign,func-returns-value]
    with Registry(tokens=tokens) as registry, FaultServer(registry.host) as server:
        settings = {
            "CLIP_SHIM_LOG_LEVEL": "debug",
            "CLIP_SHIM_METRICS_LISTEN": "127.0.0.1:0",
            "CLIP_SHIM_READ_DEADLINE": "2s",
            "CLIP_SHIM_MOUNT_DEADLINE": "5s",
        }
        with Host(settings=settings) as host:
            image = images.image("shared-a")
            registry.push_image("team/app", "latest", [layer.path.read_bytes() for layer in image.layers])
            host.trust_registry(server.host)
            host.env |= {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": S3_SECRET}
            s3 = {"endpoint": server.url, "region": "eu-central-1", "path_style": True}
            config = {
                "registries": {server.host: {"headers": {"X-Team": HEADER}}},
                "stores": {"lookup": ["s3://bucket/indexes/"], "s3": {"bucket": s3}},
            }
            (host.base / "config.yaml").write_text(json.dumps(config))
            said: list[tuple[str, bytes]] = []

            def clip(*words: str | Path) -> None:
                done = host.clip("--debug", *words, check=False)
                said.append((" ".join(map(str, words)), (done.stdout + done.stderr).encode("utf-8", "surrogateescape")))

            # wrong credentials, then right ones
            login(host, server.host, WRONG)
            reference = f"{server.host}/team/app:latest"
            clip("index", reference, "-o", host.indexes / "never.clip")
            assert not (host.indexes / "never.clip").exists()
            login(host, server.host, PASSWORD)
            for layer in image.layers:
                server.serve(f"/storage/{layer.digest}", layer.path.read_bytes())

            def sign_address(path: str) -> str:
                return f"{server.url}/storage/{path[-71:]}?X-Amz-Signature={SIGNATURE}"

            server.faults.add("GET", "/blobs/", redirect=sign_address, need=("Range", "bytes="))
            index = host.base / "indexes" / "app.clip"
            clip("index", reference, "-o", index)
            clip("verify", index)
            host.start_daemon()
            with Client(host) as client:
                tree = Path(client.acquire(index)["tree"])
                # the address expires, the registry echoes what it was sent, a read fails
                echo = json.dumps({"errors": [{"message": f"no: {HEADER} {'x' * 9}"}]}).encode()
                server.faults.add("GET", "X-Amz-Signature", status=403, body=SIGNATURE.encode())
                with ThreadPoolExecutor(1) as pool:
                    failing = pool.submit((tree / "common/01").read_bytes)
                    wait_for("a read waits", lambda: host.status()["waiting"])
                    clip("status", "--waiting")
                    clip("status", "--json", "--waiting")
                    assert failing.exception() is not None
                wait_for("it is logged", lambda: log_lines(host, "read failed"))
                server.faults.clear()
                server.faults.add("*", "/v2/team/app/", status=403, body=echo)
                made = bundle.make(tmp_path / "one", ["/bin/true"], index=index)
                host.run(*host.oci, "run", "--bundle", made, "one", check=False)
                server.faults.clear()
                said += [("image://", json.dumps(client.ask(wanted(reference))).encode())]
                os.kill(server_pid(host), signal.SIGUSR1)  # every thread's stack, into the log
                clip("config", "show")
                clip("config", "show", "--json")
                clip("cache", "ls", "--json")
                checks = [word for name in ("registry", "stores", "configuration") for word in ("--check", name)]
                clip("doctor", *checks, "--support", host.base / "support.tar.gz")
                said += archive_files(host.base / "support.tar.gz")
                listen = log_lines(host, "metrics are served")[0]["listen"]
                with urllib.request.urlopen(f"http://{listen}/metrics", timeout=20) as answer:
                    said.append(("metrics", answer.read()))
                for pid in descendants(host.daemon.pid):
                    said.append((f"command line of {pid}", Path(f"/proc/{pid}/cmdline").read_bytes()))
            everything = [*said, *files_below(host.base / "log", host.run_dir, host.state_dir, host.indexes)]
            secrets = [HEADER, SIGNATURE, S3_SECRET, WRONG, PASSWORD, *issued]
            secrets += [base64.b64encode(f"{USER}:{word}".encode()).decode() for word in (PASSWORD, WRONG)]
            # the parts of a token that hold for no other
            secrets += [part for token in issued for part in token.split(".")[1:]]
            for where, text in everything:
                for secret in secrets:
                    assert secret.encode() not in text, f"{secret[:20]} in {where}"
            assert len(issued) >= 2
            assert server.count("GET", SIGNATURE) >= 1
            assert any(seen.headers.get("x-team") == HEADER for seen in server.requests())
            assert sum(len(text) for _, text in everything) > 10_000
    tokens.close()


def wanted(reference: str) -> dict[str, object]:
    return {"op": "acquire", "source": "annotation", "value": f"image://{reference}"}
