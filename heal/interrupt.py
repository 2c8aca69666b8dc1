"""The first Ctrl-C asks for a stop at the next whole step; a second one stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from layerprune.heal.world import world_size


@contextlib.contextmanager
def first_interrupt(heard: Callable[[], None]) -> Iterator[None]:
    """Within it the first SIGINT calls `heard`, and the next one raises KeyboardInterrupt, as it would without.

    Nothing changes outside the main thread, where somebody else handles or ignores SIGINT, and with several processes, which
    their launcher ends.
    """
    ours = threading.current_thread() is threading.main_thread() and world_size() == 1
    before = signal.getsignal(signal.SIGINT)
    if not ours or before is not signal.default_int_handler:
        yield
        return

    def hear(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        heard()

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
