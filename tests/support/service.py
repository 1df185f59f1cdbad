"""Servers that tests run: started and stopped by a `with` block."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Service:
    """`stop` is called also when `start` fails."""

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
