"""The Unix socket on which a writer passes the handle of its device memory.

The writer speaks first, one packet a connection (cf_ring_handle in csrc/client/ring.h), and reads nothing: so a client
that says nothing, or dies, or never takes what it was sent, holds nobody up.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import tempfile
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from cfengine.config import runtime_dir
from cfengine.errors import RingError

MAGIC = b"CFRHND1\0"
PACKET = struct.Struct("<8sQQQII16s64s8x")
PATH_BYTES = 107  # of a Unix socket, without the zero
SOCKET = "handles"
BACKLOG = 64
_HERE: weakref.WeakSet[HandleServer] = weakref.WeakSet()  # of this process
PAUSE = 0.1  # seconds until a connection is tried again for which there was no descriptor


def packet(*, generation: int, size: int, stride: int, slots: int, kind: int, uuid: bytes, ipc: bytes = b"") -> bytes:
    return PACKET.pack(MAGIC, generation, size, stride, slots, kind, uuid, ipc)


class HandleServer:
    """A listening socket in a private folder, and from `start` on a thread that answers.

    path: what a ring's header names      Raises RingError where there is no place for a socket.
    """

    def __init__(self) -> None:
        self._folder = _private_folder()
        self.path = str(self._folder / SOCKET)
        with ExitStack() as undo:
            undo.callback(_remove, self._folder)
            try:
                self._listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                self._listener.bind(f"{self.path}~")
                self._listener.listen(BACKLOG)
                self._listener.setblocking(False)
                os.rename(f"{self.path}~", self.path)  # under its name it listens: see _sweep
                self._selector = undo.enter_context(selectors.DefaultSelector())
                self._stop, self._wake = socket.socketpair()
            except OSError as error:
                raise RingError(f"the socket {self.path} cannot be made ({error}); set XDG_RUNTIME_DIR") from error
            undo.pop_all()
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        _HERE.add(self)

    def start(self, packet: bytes, fd: int | None) -> None:
        """Answer with this from now on, and give each client its own copy of the descriptor; who came before waited."""
        self._thread = threading.Thread(target=self._serve, args=(packet, fd), name="cfengine-handles", daemon=True)
        self._thread.start()

    def _serve(self, packet: bytes, fd: int | None) -> None:
        listening = self._selector.register(self._listener, selectors.EVENT_READ)
        stopping = self._selector.register(self._stop, selectors.EVENT_READ)
        while True:
            ready = [key for key, _ in self._selector.select()]
            if stopping in ready:
                return
            if listening in ready and not self._answer(packet, fd):
                self._stop.settimeout(PAUSE)
                with suppress(TimeoutError):
                    self._stop.recv(1)
                    return

    def _answer(self, packet: bytes, fd: int | None) -> bool:
        """Serve one client; False where this process has no descriptor left for it."""
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):  # gone again
            return True
        except OSError:
            return False
        with client, suppress(OSError):  # it has gone
            client.setblocking(False)
            if _uid_of(client) == os.geteuid():
                if fd is None:
                    client.send(packet)
                else:
                    socket.send_fds(client, [packet], [fd])
        return True

    def close(self) -> None:
        """Answer nobody any more; harmless twice, and in a child that was forked, where it is the parent's."""
        if self._wake.fileno() < 0:
            return
        if self._thread is not None and self._thread.is_alive():
            self._wake.send(b"x")
            self._thread.join()
        for part in (self._selector, self._stop, self._wake, self._listener):
            part.close()
        if self._pid == os.getpid():
            _remove(self._folder)


def _leave_to_the_parent() -> None:
    """In a child that was forked: where its parent has died nobody listens."""
    for server in list(_HERE):
        server._listener.close()


os.register_at_fork(after_in_child=_leave_to_the_parent)


def _uid_of(client: socket.socket) -> int:
    return struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[1]


def _private_folder() -> Path:
    """A new folder of mode 0700 whose sockets have paths that are short enough."""
    why = ""
    for place in filter(None, (runtime_dir(), Path(tempfile.gettempdir()), Path("/tmp"))):
        if len(os.fsencode(place / f"cfengine-{'x' * 8}" / f"{SOCKET}~")) > PATH_BYTES:
            why = f"{place} is too long for a socket's path of {PATH_BYTES} bytes"
            continue
        if not place.is_absolute():
            why = f"{place} is not absolute"
            continue
        _sweep(place)
        try:
            return Path(tempfile.mkdtemp(prefix="cfengine-", dir=place))
        except OSError as error:
            why = str(error)
    raise RingError(f"there is no folder for the socket of device memory ({why}); set XDG_RUNTIME_DIR to a short one")


def _sweep(place: Path) -> None:
    """Remove folders of writers that were killed: they have a socket, and nobody listens on it."""
    for folder in place.glob("cfengine-????????"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.settimeout(PAUSE)
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid() or not (folder / SOCKET).is_socket():
                continue
            try:
                probe.connect(str(folder / SOCKET))
            except ConnectionRefusedError:
                _remove(folder)


def _remove(folder: Path) -> None:
    removals: list[Callable[[], None]] = [(folder / SOCKET).unlink, (folder / f"{SOCKET}~").unlink, folder.rmdir]
    for remove in removals:
        with suppress(OSError):
            remove()
