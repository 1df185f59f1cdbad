"""A blob's bytes [start, end) as a stream that survives what networks and registries do.

Asked for with Range; continued where it broke off, on the next host if need be; bytes not asked for never reach
the reader. What is *in* the bytes is not checked here: the spans' digests do that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from shim.errors import RegistryError
from shim.registry.hooks import Hooks
from shim.registry.retry import RetryPolicy, pause
from shim.registry.transport import CHUNK, Response

if TYPE_CHECKING:
    from shim.registry.endpoint import Endpoint

PROGRESS = 64 << 10  # bytes that make an attempt count as having got somewhere
STALL_SECONDS = 30.0
STALL_BYTES = 16 << 10  # fewer bytes than this in STALL_SECONDS: the connection is given up for another
CORRUPT_SECONDS = 600.0
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/(?:([0-9]{1,18})|\*)\s*\Z")

# (first byte, one past the last or None, deadline) -> an answer for that range, and who gave it
OpenAt = Callable[[int, int | None, float | None], tuple["Endpoint", Response]]


class BlobStream:
    """Iterate for chunks of bytes (as they arrive, up to 256 KiB); close it, or use it as a context manager.

    `position` is the blob offset of the next byte; `host` the host[:port] that is being read from.
    """

    def __init__(
        self,
        open_at: OpenAt,
        what: str,
        start: int,
        end: int | None,
        *,
        deadline: float | None,
        hooks: Hooks,
        policy: RetryPolicy,
        max_discard: int,
    ) -> None:
        self.position = start
        self._open_at = open_at
        self._what = what
        self._end = end
        self._deadline = deadline
        self._hooks = hooks
        self._policy = policy
        self._max_discard = max_discard
        self._endpoint: Endpoint | None = None
        self._response: Response | None = None
        self._exact = True  # the response ends where our range ends
        self._open_ended = end is None
        self._chunks: Iterator[bytes] = iter(())
        if end is None or start < end:
            self._endpoint, self._response = open_at(start, end, deadline)
            self._chunks = self._run()

    @property
    def host(self) -> str:
        return self._endpoint.name if self._endpoint else ""

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._chunks)

    def __enter__(self) -> BlobStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream; nothing is read from the network any more."""
        self._chunks = iter(())
        if self._response is not None:
            self._response.close()
            self._response = None

    def report_corrupt(self) -> None:
        """The bytes did not verify: ask this host last for ten minutes."""
        if self._endpoint is not None:
            self._endpoint.put_off(CORRUPT_SECONDS)

    def _run(self) -> Iterator[bytes]:
        failures = 0
        while True:
            began = self.position
            try:
                if self._response is None:
                    self._endpoint, self._response = self._open_at(self.position, self._end, self._deadline)
                self._accept(self._response)
                yield from self._body(self._response)
                return
            except RegistryError as error:
                self._drop()
                failures = 1 if self.position - began >= PROGRESS else failures + 1
                if not error.retryable or failures >= self._policy.attempts:
                    raise
                if self._endpoint is not None:
                    self._endpoint.put_off(self._policy.cap)
                if not pause(self._policy, self._hooks, failures, error, self._deadline):
                    raise

    def _body(self, response: Response) -> Iterator[bytes]:
        """Hand on what the open response holds, up to the end. Raises RegistryError (retryable) when it ends early."""
        window, seen = self._hooks.clock(), 0
        while self._end is None or self.position < self._end:
            want = CHUNK if self._end is None else min(CHUNK, self._end - self.position)
            data = response.read_some(want)
            if not data:
                if self._end is None:
                    break  # a body of unknown length ends where it ends
                raise RegistryError(f"{self.host} cut {self._what} short at byte {self.position}", retryable=True)
            self.position += len(data)
            yield data
            now = self._hooks.clock()
            seen += len(data)
            if self._deadline is not None and now > self._deadline:
                raise RegistryError(f"{self.host} did not send {self._what} before the deadline", retryable=True)
            if now - window > STALL_SECONDS:
                if seen < STALL_BYTES:
                    raise RegistryError(f"{self.host} sends {self._what} too slowly", retryable=True)
                window, seen = now, 0
        self._finish()

    def _finish(self) -> None:
        if self._response is not None and self._exact:
            self._response.discard()  # at its end already: the connection can be used again
        self._drop()

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def _accept(self, response: Response) -> None:
        """Bring `response` to our position. What it says about the range was checked by `check_range`."""
        total = check_range(response, self.position, self._end, self._what)
        if self._open_ended and total is not None:
            self._end = total
        if response.status == 206:
            self._exact = True
            return
        length = response.length()
        self._exact = length is not None and length == self._end
        self._skip(response, self.position)

    def _skip(self, response: Response, size: int) -> None:
        """Read past the bytes before our position, which a host without ranges sends all the same."""
        if size == 0:
            return
        if size > self._max_discard:
            response.close()
            raise RegistryError(
                f"{response.host} ignores Range: {size} bytes of {self._what} would be fetched for nothing",
                hint="the registry or a proxy before it must support range requests",
            )
        self._hooks.warn(f"{response.host} ignores Range: reading {size} bytes of {self._what} for nothing")
        while size:
            data = response.read_some(min(CHUNK, size))
            if not data:
                raise RegistryError(f"{response.host} cut {self._what} short", retryable=True)
            size -= len(data)
            if self._deadline is not None and self._hooks.clock() > self._deadline:
                raise RegistryError(f"{response.host} did not send {self._what} before the deadline", retryable=True)


def check_range(response: Response, start: int, end: int | None, what: str) -> int | None:
    """The blob's whole size, if the answer says it. Raises RegistryError when the answer is not for [start, end).

    RFC 9110 14.4: a 206 says which bytes it holds; fewer than asked for is allowed, others are not.
    """
    total: int | None
    if response.status == 416:
        raise RegistryError(f"{response.host} says {what} has no byte {start}", status=416)
    if response.status == 206:
        match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
        if match is None:
            raise RegistryError(f"{response.host} sent a part of {what} without saying which", status=206)
        first, last = int(match[1]), int(match[2])
        total = int(match[3]) if match[3] else None
        wrong = first != start or last < first or (end is not None and last >= end)
        length = response.length()
        if wrong or (length is not None and length != last - first + 1) or (total is not None and last >= total):
            asked = f"{start}-{'' if end is None else end - 1}"
            raise RegistryError(
                f"{response.host} was asked for bytes {asked} of {what} and sent {first}-{last}", status=206
            )
    else:
        if response.status != 200:
            raise RegistryError(f"{response.host} answered {response.status} for {what}", status=response.status)
        total = response.length()
    if total is not None and total < (start if end is None else end):
        raise RegistryError(f"{what} at {response.host} is only {total} bytes long", status=response.status)
    return total
