"""A FUSE mount whose requests are read and never answered: who looks below it hangs in the kernel.

`silent` in a test; `python3 FILE DIRECTORY` elsewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shim.fuse import connection, proto


def serve(fd: int) -> None:
    """Take requests, until somebody unmounts it (`umount -f -l`: who hangs gets an error)."""
    os.set_blocking(fd, True)
    init = os.read(fd, proto.REQUEST_BUFFER)
    body = proto.init_out(proto.negotiate(memoryview(init)[proto.IN_HEADER.size :]))
    unique = proto.IN_HEADER.unpack_from(init)[2]
    os.write(fd, proto.OUT_HEADER.pack(proto.OUT_HEADER.size + len(body), 0, unique) + body)
    with suppress(OSError):
        while True:
            os.read(fd, proto.REQUEST_BUFFER)


@contextmanager
def silent(directory: Path) -> Iterator[None]:
    directory.mkdir()
    fd = connection.mount(directory)
    thread = threading.Thread(target=serve, args=(fd,))
    thread.start()
    try:
        yield
    finally:
        subprocess.run(["umount", "-f", "-l", directory], check=True)
        thread.join()
        os.close(fd)


if __name__ == "__main__":
    serve(connection.mount(Path(sys.argv[1])))
