"""Ctrl-C and SIGTERM: finish the step, write a checkpoint, exit."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)


class StopRequest:
    """While active, the first SIGINT or SIGTERM only sets `signal`; a second one interrupts at once.

    Attributes:
        signal: the signal number received, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        log.warning("%s: stopping after this step with a checkpoint", signal.Signals(number).name)
