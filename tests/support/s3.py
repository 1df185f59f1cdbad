"""A real S3 server on free loopback ports, for tests: SeaweedFS, from the PyPI package that carries its program.

with S3() as s3:
    s3.client().create_bucket(Bucket="indexes")
    store = S3Store("s3://indexes/team/", s3.options)
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.service import Service

KEY, SECRET = "testkey", "test-secret-0123456789"
READER_KEY, READER_SECRET = "readkey", "read-secret-0123456789"
PROGRAM = Path(sys.executable).parent / "weed"
START_DEADLINE = 30.0
_IDENTITIES = [
    {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]},
    {
        "name": "reader",
        "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
        "actions": ["Read", "List"],
    },
]


class S3(Service):
    """A running server with one bucket, `indexes`. `env`: what boto3's usual chain finds the credentials in."""

    bucket = "indexes"

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="clip-s3-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: list[int] = []
        self.endpoint = ""
        self.env = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
        self.reader_env = {**self.env, "AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET}

    @property
    def options(self) -> dict[str, Any]:
        """As under `stores.s3.BUCKET` in the configuration."""
        return {"endpoint": self.endpoint, "region": "us-east-1", "path_style": True}

    def start(self) -> None:
        for last in (False, False, True):
            try:
                self._launch()
                break
            except RuntimeError:  # a port was taken in between
                if last:
                    raise
        self.client().create_bucket(Bucket=self.bucket)

    def _launch(self) -> None:
        self._end()
        names = ("master.port", "volume.port", "filer.port", "s3.port")
        numbers = _free_ports(2 * len(names))
        ports = dict(zip([*names, *(f"{name}.grpc" for name in names)], numbers, strict=True))
        (self._directory / "identities.json").write_text(json.dumps({"identities": _IDENTITIES}))
        command = [
            *(PROGRAM, "-logtostderr", "server", f"-dir={self._directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-filer", "-s3", f"-s3.config={self._directory}/identities.json", "-s3.iam=false", "-volume.max=8"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"),
            *(f"-{name}={number}" for name, number in ports.items()),
        ]
        log = self._directory / "log"
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                command, cwd=self._directory, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._ports = numbers
        self.endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        deadline = time.monotonic() + START_DEADLINE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the S3 server did not start:\n" + log.read_text(errors="replace")[-2000:])
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=1)
        except urllib.error.HTTPError:
            return True  # it wants credentials
        except OSError:
            return False
        return True

    def client(self) -> Any:
        """A boto3 client with all rights."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(s3={"addressing_style": "path"}),
        )

    def keys(self) -> list[str]:
        """All keys in the bucket."""
        listed = self.client().list_objects_v2(Bucket=self.bucket)
        return sorted(item["Key"] for item in listed.get("Contents", []))

    def uploads(self) -> int:
        """Uploads that were begun and neither ended nor given up."""
        return len(self.client().list_multipart_uploads(Bucket=self.bucket).get("Uploads", []))

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for number in self._ports:  # its sockets, which it makes there whatever one says
            for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                left.unlink(missing_ok=True)

    def stop(self) -> None:
        self._end()
        shutil.rmtree(self._directory, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    """Free ports below those that the kernel gives to connections: it listens on some only after seconds."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    while len(found) < count:
        number = random.randrange(10_000, low)
        try:
            socket.create_server(("127.0.0.1", number)).close()
        except OSError:
            continue
        if number not in found:
            found.append(number)
    return found
