"""Memory of a process and its workers as Linux counts it, for benchmarks that say how it grows, or that it doesn't.

What several processes share is counted once (Pss_Anon), and what is mapped from files not at all: the system takes that back
when it needs the room. A forked worker copies the modules that it shares with its parent little by little, as it counts
references to them, whatever it does: [`copy_what_is_shared`] has it copy all of them at once, before anything is measured.
"""

import ctypes
import mmap
import threading
from typing import Any

import psutil


def resident(*processes: Any) -> int:
    """Bytes in memory of their own."""
    held = 0
    for one in processes:
        try:
            with open(f"/proc/{one.pid}/smaps_rollup") as file:
                lines = file.read().splitlines()
        except (psutil.NoSuchProcess, OSError):  # it has ended
            continue
        held += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return held


def copy_what_is_shared() -> int:
    """Called in a forked worker; returns its bytes from then on."""
    with open("/proc/self/maps") as file:
        lines = file.read().splitlines()
    for line in lines:
        span, mode = line.split()[:2]
        if mode == "rw-p":
            start, end = (int(address, 16) for address in span.split("-"))
            for address in range(start, end, mmap.PAGESIZE):
                byte = ctypes.c_ubyte.from_address(address)
                byte.value = byte.value  # written, if to what it was: the page is the worker's own now
    return resident(psutil.Process())


class Peak:
    """Bytes that this process and those it started hold at most while it is open, above what it held alone before."""

    def __enter__(self) -> "Peak":
        self._process, self._stop, self.bytes = psutil.Process(), threading.Event(), 0
        self._before = resident(self._process)
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            held = resident(self._process, *self._process.children(recursive=True))
            self.bytes = max(self.bytes, held - self._before)

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._watcher.join()
