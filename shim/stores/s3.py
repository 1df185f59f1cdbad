"""Indexes and archives in S3, or in what speaks its protocol.

    stores:
      s3:
        BUCKET:                          # or "*"
          endpoint: https://s3.example.com
          region: eu-central-1
          path_style: true               # https://HOST/BUCKET/KEY instead of https://BUCKET.HOST/KEY
          profile: indexes               # of ~/.aws/config
          ca: /etc/ssl/private-ca.pem

All may be left out; credentials are found as every AWS tool finds them (environment, files, instance role).
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from shim.errors import AbsentError, ConfigError, StoreError
from shim.index import container
from shim.registry.ref import ImageRef
from shim.stores.base import digest_name, name_of
from shim.stores.urls import S3Place

PART = 16 << 20  # bytes; longer files are sent in parts of at least this
_MAX_PARTS = 10_000  # S3 user guide, "Multipart upload limits"
_PARALLEL = 4
_ATTEMPTS = 3
_CHUNK = 1 << 20
_KEYS = {"endpoint": str, "region": str, "path_style": bool, "profile": str, "ca": str}
_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403")
_ABSENT = ("NoSuchKey", "NoSuchBucket", "404", "NotFound")

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""
T = TypeVar("T")


def options_of(table: Mapping[str, Any], bucket: str) -> dict[str, Any]:
    """What `stores.s3` says about a bucket. Raises ConfigError, naming the key."""
    found = table.get(bucket, table.get("*", {}))
    key = f"stores.s3.{bucket if bucket in table else '*'}"
    if not isinstance(found, Mapping):
        raise ConfigError(f"`{key}` must be a table")
    for name, value in found.items():
        if name not in _KEYS:
            near = difflib.get_close_matches(str(name), _KEYS, n=1)
            raise ConfigError(f"{key}: unknown key `{name}`", hint=f"did you mean `{near[0]}`?" if near else None)
        if not isinstance(value, _KEYS[name]):
            raise ConfigError(f"`{key}.{name}` must be {'true or false' if _KEYS[name] is bool else 'a text'}")
    return dict(found)


class S3Store:
    """One bucket, from `place.key` on. Thread-safe.

    An object appears whole or not at all, and `keep` writes on the condition that there is none (If-None-Match: *), so
    the first of two writers wins. A server that does not know the condition is asked whether there is one before: then
    the last of two writers wins, with an index of the same image.
    An upload in parts that fails is given up, so that no parts are left to be paid for.
    """

    def __init__(self, place: S3Place, options: Mapping[str, Any], *, part: int = PART) -> None:
        self._place = place
        self._options = options
        self._part = part
        self._lock = threading.Lock()
        self._made: Any = None

    @property
    def url(self) -> str:
        return str(self._place)

    def find(self, image: ImageRef, out: BinaryIO) -> bool:
        return self.fetch(name_of(image), out)

    def fetch(self, name: str, out: BinaryIO) -> bool:
        """Write the object called `name` below this place; False if there is none."""
        try:
            self.get(S3Place(self._place.bucket, self._place.key + name), out, limit=container.MAX_FILE)
        except AbsentError:
            return False
        return True

    def keep(self, image: ImageRef, file: Path) -> str:
        places = [S3Place(self._place.bucket, self._place.key + name) for name in (digest_name(file), name_of(image))]
        for place in places:
            self.put(place, file)
        return str(places[-1])

    def get(self, place: S3Place, out: BinaryIO, *, known: str | None = None, limit: int = 1 << 40) -> str | None:
        """Write the object to `out`, from its start; its ETag. None, and nothing written, if that is `known` already.

        Raises AbsentError, and StoreError when it is longer than `limit` bytes.
        """

        def read() -> str | None:
            out.seek(0)
            out.truncate()
            more = {"IfNoneMatch": known} if known else {}
            answer = self._client().get_object(Bucket=place.bucket, Key=place.key, **more)
            size = answer["ContentLength"]
            if size > limit:
                answer["Body"].close()
                raise StoreError(f"{place} has {size} bytes, at most {limit} are allowed")
            for chunk in answer["Body"].iter_chunks(_CHUNK):
                out.write(chunk)
            return str(answer["ETag"])

        try:
            return self._call(str(place), read)
        except _UnchangedError:
            return None

    @contextmanager
    def stream(self, place: S3Place, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """Bytes [start, end) of an object in chunks; fewer if it is shorter. Iterating raises StoreError too."""
        if start >= end:
            yield iter(())
            return
        more = {"Range": f"bytes={start}-{end - 1}"}
        body = self._call(
            str(place), lambda: self._client().get_object(Bucket=place.bucket, Key=place.key, **more)["Body"]
        )
        chunks = body.iter_chunks(_CHUNK)

        def read() -> Iterator[bytes]:
            while (chunk := self._once(str(place), lambda: next(chunks, b""))) != b"":
                yield chunk

        try:
            yield read()
        finally:
            body.close()

    def read(self, place: S3Place, offset: int, length: int) -> bytes:
        """`length` bytes of an object from `offset` on. Raises AbsentError, StoreError (also when it is shorter)."""
        with self.stream(place, offset, offset + length) as chunks:
            data = b"".join(chunks)
        if len(data) != length:
            raise StoreError(f"{place} is shorter than it was", retryable=True)
        return data

    def put(self, place: S3Place, file: Path, *, replace: bool = False, progress: Progress | None = None) -> bool:
        """Store `file`; False if there is an object already, which stays. replace: it does not."""
        size = file.stat().st_size
        condition = {} if replace else {"IfNoneMatch": "*"}
        try:
            if size <= self._part:
                self._call(str(place), lambda: self._put_whole(place, file, condition))
            else:
                self._put_parts(place, file, size, condition, progress)
        except _ExistsError:
            return False
        except _UnconditionalError:
            if self.size(place) is not None:
                return False
            return self.put(place, file, replace=True, progress=progress)
        if progress is not None:
            progress(size, size)
        return True

    def size(self, place: S3Place) -> int | None:
        """The length of an object in bytes, or None."""
        try:
            answer = self._call(str(place), lambda: self._client().head_object(Bucket=place.bucket, Key=place.key))
        except AbsentError:
            return None
        return int(answer["ContentLength"])

    def _put_whole(self, place: S3Place, file: Path, condition: dict[str, str]) -> None:
        with open(file, "rb") as body:
            self._client().put_object(Bucket=place.bucket, Key=place.key, Body=body, **condition)

    def _put_parts(
        self, place: S3Place, file: Path, size: int, condition: dict[str, str], progress: Progress | None
    ) -> None:
        client, where = self._client(), {"Bucket": place.bucket, "Key": place.key}
        part = max(self._part, -(-size // _MAX_PARTS))
        count = -(-size // part)
        upload = self._call(str(place), lambda: client.create_multipart_upload(**where))["UploadId"]
        done = 0
        lock = threading.Lock()

        def send(number: int) -> dict[str, Any]:
            nonlocal done
            with open(file, "rb") as source:
                source.seek(number * part)
                body = source.read(part)
            answer = self._call(
                str(place), lambda: client.upload_part(**where, UploadId=upload, PartNumber=number + 1, Body=body)
            )
            with lock:
                done += len(body)
                if progress is not None:
                    progress(done, size)
            return {"PartNumber": number + 1, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(_PARALLEL) as pool:
                futures = [pool.submit(send, number) for number in range(count)]
                try:
                    parts = [future.result() for future in futures]
                finally:
                    for future in futures:
                        future.cancel()
            self._call(
                str(place),
                lambda: client.complete_multipart_upload(
                    **where, UploadId=upload, MultipartUpload={"Parts": parts}, **condition
                ),
            )
        except BaseException:
            try:
                self._call(str(place), lambda: client.abort_multipart_upload(**where, UploadId=upload))
            except StoreError:
                pass  # the bucket's lifecycle rules have to; the first error says what is wrong
            raise

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = _make_client(self._options)
            return self._made

    def _once(self, what: str, work: Callable[[], T]) -> T:
        """`_call` for what cannot be done twice."""
        return self._call(what, work, attempts=1)

    def _call(self, what: str, work: Callable[[], T], attempts: int = _ATTEMPTS) -> T:
        """Do `work`; botocore's errors become ours. It retries by itself, but not a body that broke off."""
        from botocore import exceptions as botocore

        for attempt in range(1, attempts + 1):
            try:
                return work()
            except botocore.ClientError as error:
                raise _translate(error, what) from None
            except (botocore.NoCredentialsError, botocore.PartialCredentialsError, botocore.ProfileNotFound) as error:
                raise StoreError(f"{what}: {error}", hint="see `aws configure`, or give the daemon a role") from None
            except botocore.ConnectionError as error:
                raise StoreError(f"{what}: {self._where()} cannot be reached", retryable=True) from error
            except (botocore.HTTPClientError, botocore.IncompleteReadError) as error:
                if attempt == attempts:
                    raise StoreError(f"{what}: {self._where()} cut the answer short", retryable=True) from error
            except (botocore.BotoCoreError, ValueError) as error:
                raise StoreError(f"{what}: {type(error).__name__}: {error}") from None
        raise AssertionError("unreachable")

    def _where(self) -> str:
        return str(self._options.get("endpoint", "the S3 endpoint"))


class _ExistsError(StoreError):
    """What is to be written is there already."""


class _UnchangedError(StoreError):
    """What is asked for is what the caller has."""


class _UnconditionalError(StoreError):
    """The server does not know conditional writes."""


def _translate(error: Any, what: str) -> StoreError:
    """Our words for an error answer: the code only, since messages may hold parts of what was sent."""
    code = str(error.response.get("Error", {}).get("Code", ""))[:60]
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
        return _ExistsError(f"{what} is there already")
    if status == 304:
        return _UnchangedError(f"{what} is unchanged")
    if code == "NotImplemented" or status == 501:
        return _UnconditionalError(f"{what}: the server does not know conditional writes")
    if code in _ABSENT:
        kind = "there is no such bucket" if code == "NoSuchBucket" else "there is no such object"
        return AbsentError(f"{what}: {kind}")
    if code in _REFUSED or status in (401, 403):
        return StoreError(
            f"{what}: the store refused the credentials ({code})", hint="see `aws sts get-caller-identity`"
        )
    return StoreError(f"{what}: the store answered {status} {code}", retryable=status >= 500)


def _make_client(options: Mapping[str, Any]) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    try:
        session = boto3.session.Session(profile_name=options.get("profile"))
        region = options.get("region") or session.region_name
        return session.client(
            "s3",
            endpoint_url=options.get("endpoint"),
            region_name=region or "us-east-1",
            verify=options.get("ca"),
            config=Config(
                s3={"addressing_style": "path" if options.get("path_style") else "auto"},
                retries={"mode": "standard", "max_attempts": 4},
                connect_timeout=10,
                read_timeout=60,
                # others than AWS refuse the checksums that botocore adds by itself
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    except (BotoCoreError, ValueError, OSError) as error:
        raise StoreError(f"S3 cannot be used: {type(error).__name__}: {error}") from None
