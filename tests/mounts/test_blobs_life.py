"""Blob files on a real FUSE mount: status, journal, coming and going, hostile programs, a successor."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from shim.errors import DaemonError
from shim.fuse import connection
from shim.fuse.journal import Journal
from tests.support.blobmount import READ_ONE, Make, direct_io, make
from tests.support.lazylayers import sample_layer

__all__ = ["direct_io", "make"]


def test_status_names_those_who_wait(make: Make) -> None:
    mount = make(direct_io=True)
    _, source = mount.add(sample_layer(), b"a")
    source.gate.clear()
    reader = mount.spawn(READ_ONE, 8192)
    mount.wait_parked()
    (waiting,) = mount.server.waiting()
    assert (waiting.pid, waiting.blob, waiting.offset, waiting.size) == (reader.pid, "a", 8192, 4096)
    assert waiting.age >= 0
    assert waiting.trouble == "registry.test: no bytes came yet"
    source.gate.set()
    reader.communicate(timeout=20)
    assert mount.server.waiting() == []


def test_opens_and_releases_are_journalled(make: Make) -> None:
    mount = make()
    lazy, _ = mount.add(sample_layer(), b"a")
    holder = mount.spawn("files = [open(path + '/a', 'rb') for _ in range(3)]\nprint(1, flush=True)\nsignal.pause()")
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    assert mount.server.open_count(lazy.node_id) == 3
    assert not mount.server.remove(lazy.node_id)
    copy = mount.state / "copy"
    copy.write_bytes((mount.state / "journal").read_bytes())
    journal = Journal(copy, fresh=False)
    assert journal.nodes == {lazy.node_id: (b"a", lazy.size)}
    assert list(journal.opens.values()) == [lazy.node_id] * 3
    assert journal.init == mount.server.init
    journal.close()
    holder.kill()
    holder.wait()
    until = time.monotonic() + 10
    while mount.server.open_count(lazy.node_id):
        assert time.monotonic() < until
    records = [json.loads(line) for line in (mount.state / "journal").read_text().splitlines()]
    assert sum("close" in record for record in records) == 3
    assert mount.server.remove(lazy.node_id)


def test_a_blob_comes_goes_and_comes_again(make: Make) -> None:
    mount = make()
    look = """
try:
    print(os.stat(path + "/a").st_size, len(open(path + "/a", "rb").read(10)), sorted(os.listdir(path)))
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    assert mount.run(look).strip() == "ENOENT"
    lazy, _ = mount.add(sample_layer(), b"a")
    assert mount.run(look).split() == [str(lazy.size), "10", "['a']"]
    with pytest.raises(DaemonError):
        mount.server.add(lazy)
    until = time.monotonic() + 10
    while not mount.server.remove(lazy.node_id):
        assert time.monotonic() < until
    lazy.close()
    mount.cache.close_layer(lazy.cached)
    assert mount.run("print(os.listdir(path))").strip() == "[]"
    again, _ = mount.add(sample_layer(), b"a")
    assert again.node_id != lazy.node_id
    # the kernel has forgotten the old node; mounts open an O_PATH descriptor, which looks nothing up again
    by_descriptor = "fd = os.open(path + '/a', os.O_PATH)\nprint(len(open(f'/proc/self/fd/{fd}', 'rb').read(10)))"
    assert mount.run(by_descriptor).strip() == "10"
    assert mount.run(look).split() == [str(lazy.size), "10", "['a']"]


def test_the_server_survives_whatever_programs_ask(make: Make) -> None:
    mount = make()
    mount.add(sample_layer(), b"a")
    script = """
import ctypes, fcntl, mmap
name = path + "/a"
def fails(code, call, *args):
    try:
        call(*args)
    except OSError as error:
        assert error.errno in code, (call, error)
    else:
        assert False, call
fails((errno.EROFS,), os.mkdir, path + "/d")
fails((errno.EROFS,), os.unlink, name)
fails((errno.EROFS,), os.rename, name, path + "/b")
fails((errno.EROFS, errno.EACCES), open, name, "r+b")
fails((errno.EROFS,), os.chmod, name, 0o777)
fails((errno.ENOENT,), os.stat, path + "/nothing")
fails((errno.ENOENT,), os.stat, path + "/" + "n" * 255)
fails((errno.ENOTDIR,), os.listdir, name)
fails((errno.ENOTSUP, errno.ENODATA), os.getxattr, name, "user.x")
fails((errno.ENOTSUP,), os.listxattr, name)
assert os.statvfs(path).f_files == 1
assert os.access(name, os.R_OK) and os.access(path, os.X_OK)
fd = os.open(name, os.O_RDONLY)
assert os.lseek(fd, 0, os.SEEK_DATA) == 0
fails((errno.ENOTTY, errno.ENOSYS), fcntl.ioctl, fd, 0x5401)
fcntl.flock(fd, fcntl.LOCK_SH)
fcntl.lockf(fd, fcntl.LOCK_SH)
os.fsync(fd)
import select
poll = select.poll(); poll.register(fd, select.POLLIN); poll.poll(100)
view = mmap.mmap(fd, 1 << 20, prot=mmap.PROT_READ)
assert view[5000:6000] == os.pread(fd, 1000, 5000)
assert os.pread(fd, 100, os.fstat(fd).st_size) == b""
assert len(os.pread(fd, 100, os.fstat(fd).st_size - 10)) == 10
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
assert os.listdir(path) == ["a"]
dirfd = os.open(path, os.O_RDONLY); os.fsync(dirfd)
assert os.stat(path).st_mode & 0o7777 == 0o500
"""
    mount.run(script)
    assert mount.failures == []


def test_unmounting_ends_the_server(make: Make) -> None:
    mount = make()
    mount.add(sample_layer(), b"a")
    mount.run("open(path + '/a', 'rb').read(10)")
    subprocess.run(["umount", str(mount.path)], check=True, timeout=30)
    assert mount.unmounted.wait(10)


def test_a_successor_serves_the_same_descriptor(make: Make) -> None:
    """Built from descriptor, INIT state and journal: a read that its predecessor left unanswered gets its bytes."""
    mount = make(direct_io=True)
    lazy, source = mount.add(sample_layer(), b"a")
    source.gate.clear()
    reader = mount.spawn(READ_ONE, 4096)
    mount.wait_parked()
    init = mount.server.init
    mount.server.stop()
    journal = Journal(mount.state / "journal", fresh=False)
    assert journal.init == init
    assert list(journal.opens.values()) == [lazy.node_id]
    mount.server = mount.make_server(journal.init, journal)
    assert mount.server.node_id(b"a") == lazy.node_id
    mount.server.add(lazy)
    mount.server.start()
    late = mount.spawn(READ_ONE, 8192)
    assert init is not None
    if init.can_resend:
        mount.server.resend()
    else:
        reader.kill()  # an old kernel never gives that request out again
    source.gate.set()
    out, _ = late.communicate(timeout=20)
    assert out.split()[1] == b"4096"
    out, _ = reader.communicate(timeout=20)
    assert not init.can_resend or out.split()[1:] == [b"4096", sample_layer().data[4096:4104].hex().encode()]
    until = time.monotonic() + 10
    while mount.server.open_count(lazy.node_id):
        assert time.monotonic() < until


def test_mounting_on_nothing_is_a_clear_error(disk_path: Path) -> None:
    from shim.errors import MountError

    with pytest.raises(MountError, match=os.strerror(errno.ENOENT)):
        connection.mount(disk_path / "missing")
