"""What the tests of the samples share: building with the compilers of the system, and programs that talk in lines."""

from __future__ import annotations

import queue
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "csrc" / "client" / "samples"
PATIENCE = 120.0  # seconds; a machine may be busy, and no test waits longer than it has to


def need(program: str, package: str) -> str:
    """Path of a program of the system. Fails with the name of the package that has it."""
    path = shutil.which(program)
    assert path, f"{program} was not found; on Debian and Ubuntu: apt install {package}"
    return path


def need_file(path: str, package: str) -> Path:
    assert Path(path).exists(), f"{path} was not found; on Debian and Ubuntu: apt install {package}"
    return Path(path)


def run(*command: str | Path, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=PATIENCE, **kwargs)
    assert not check or done.returncode == 0, f"{command} said {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def compile_c(out: Path, *sources: Path | str) -> Path:
    """Compile C against the headers of the client; writer.h is among them."""
    client = ROOT / "csrc" / "client"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-pthread"]
    run(need("cc", "gcc"), *flags, f"-I{client / 'include'}", f"-I{client}", *sources, "-o", out)
    return out


def client_sources() -> list[Path]:
    """The client library and the writer's half."""
    return sorted((ROOT / "csrc" / "client").glob("*.c"))


class Program:
    """A running program, of which both outputs are read line by line."""

    def __init__(self, *command: str | Path, **kwargs) -> None:
        self.command = [str(c) for c in command]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.process = subprocess.Popen(self.command, **pipes, **kwargs)
        self.lines: list[str] = []
        self._arriving: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._arriving.put(line.rstrip("\n"))
        self._arriving.put(None)

    def _next(self, until: float) -> str | None:
        try:
            line = self._arriving.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise AssertionError(f"{self.command} said nothing more after {self.lines}") from None
        if line is not None:
            self.lines.append(line)
        return line

    def wait_for(self, text: str) -> str:
        """The next line that holds `text`."""
        until = time.monotonic() + PATIENCE
        while (line := self._next(until)) is not None:
            if text in line:
                return line
        raise AssertionError(f"{self.command} ended without {text!r}: {self.lines}")

    def end(self) -> list[str]:
        """Close its input and wait until it has ended well; all its lines."""
        if not self.process.stdin.closed:
            self.process.stdin.close()
        until = time.monotonic() + PATIENCE
        while self._next(until) is not None:
            pass
        assert self.process.wait(PATIENCE) == 0, f"{self.command} said {self.process.returncode}: {self.lines}"
        return self.lines

    def kill(self) -> None:
        """Without a chance to clean up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(PATIENCE)
