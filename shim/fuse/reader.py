"""A thread that reads FUSE requests and answers what it can at once: the hot path of the daemon."""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from typing import TYPE_CHECKING

from shim import log
from shim.fuse import proto

if TYPE_CHECKING:
    from shim.fuse.server import BlobServer

_UNMOUNTED = (errno.ENODEV, errno.ECONNABORTED)


class Reader(threading.Thread):
    """One thread that reads requests. Its buffers are made once; a cached read makes no object that outlives it."""

    def __init__(self, server: BlobServer, number: int) -> None:
        super().__init__(name=f"fuse-read-{number}", daemon=True)
        self._server = server
        self._request = bytearray(proto.REQUEST_BUFFER)
        self._view = memoryview(self._request)
        self._data = memoryview(bytearray(proto.MAX_READ))
        self._head = bytearray(proto.OUT_HEADER.size)
        self._slices: dict[int, memoryview] = {}  # by length; the kernel asks for few different ones

    def run(self) -> None:
        server = self._server
        with select.epoll() as poll:
            poll.register(server.stop_fd, select.EPOLLIN)
            poll.register(server.fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            request = [self._request]
            while not server.stopping:
                try:
                    length = os.readv(server.fd, request)
                except OSError as error:
                    if error.errno == errno.EAGAIN:
                        poll.poll()
                    elif error.errno in _UNMOUNTED:
                        server.unmounted()
                        return
                    elif error.errno not in (errno.ENOENT, errno.EINTR):  # ENOENT: taken back before it was read
                        log.error("cannot read from /dev/fuse", error=str(error))
                        server.unmounted()
                        return
                else:
                    self._serve(length)

    def _serve(self, length: int) -> None:  # not `_handle`: from Python 3.13 on a Thread has one of its own
        if length < proto.IN_HEADER.size:
            return  # never from this kernel; there is no `unique` to answer
        _, opcode, unique, node_id, _, _, pid, _, _ = proto.IN_HEADER.unpack_from(self._request)
        server = self._server
        try:
            if opcode == proto.READ:
                self._read(unique, node_id, pid, length)
            elif opcode in (proto.FORGET, proto.BATCH_FORGET):
                pass  # node ids are ours and stay; these have no reply
            elif opcode == proto.INTERRUPT:
                server.interrupt(self._view[proto.IN_HEADER.size : length])  # nor has this
            else:
                server.dispatch(opcode, unique, node_id, self._view[proto.IN_HEADER.size : length])
        except struct.error:
            server.reply_error(unique, errno.EINVAL)
        except OSError as error:
            log.error("a FUSE request failed", opcode=opcode, error=str(error))
            server.reply_error(unique, error.errno or errno.EIO)
        except Exception:  # noqa: BLE001 - one bad request must not end the server of all others
            log.exception("a FUSE request failed", opcode=opcode)
            server.reply_error(unique, errno.EIO)

    def _read(self, unique: int, node_id: int, pid: int, length: int) -> None:
        server = self._server
        if length < proto.IN_HEADER.size + proto.READ_IN.size:
            server.reply_error(unique, errno.EINVAL)
            return
        blob = server.blobs.get(node_id)
        if blob is None:
            server.reply_error(unique, errno.ESTALE)
            return
        _, offset, size, _ = proto.READ_IN.unpack_from(self._request, proto.IN_HEADER.size)
        size = min(size, proto.MAX_READ, blob.size - offset)
        if size <= 0:
            server.reply(unique)
            return
        stamp = blob.stamp(offset, size)
        if stamp >= 0:
            view = self._slices.get(size) or self._slice(size)
            try:
                count = os.preadv(blob.data_fd, (view,), offset)
            except OSError:
                count = -1  # a bad sector: the blob finds out below, and fetches again
            if count == size and blob.epoch == stamp:
                proto.OUT_HEADER.pack_into(self._head, 0, proto.OUT_HEADER.size + size, 0, unique)
                server.send((self._head, view))
                return
        else:
            data = blob.read_cached(offset, size)
            if data is not None:
                server.reply(unique, data)
                return
        server.park(unique, pid, blob, offset, size)

    def _slice(self, size: int) -> memoryview:
        if len(self._slices) > 64:
            self._slices.clear()
        view = self._slices[size] = self._data[:size]
        return view
