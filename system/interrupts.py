"""How programs end: signals as an exception that comes at a safe moment, and exit codes."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from config import ConfigError

WARNINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What schedulers send before they kill. SIGHUP also comes when a terminal closes; `nohup` has it ignored."""


class Interrupted(BaseException):
    """Ctrl-C or a scheduler's warning. `exit_code` is the shell's convention, 128 + the signal's number: 130 for
    Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Interrupts:
    """While entered, the first signal raises `Interrupted`, at once or at the end of a `deferred` block.

    A second Ctrl-C ends the process at once. Of several processes, all are stopped by JAX after the same step, by
    SIGTERM, which other warnings are turned into there.
    """

    def __init__(self) -> None:
        self.waiting_for = ""
        """What happens between a signal and the program's end, if that takes a while."""
        self.received: int | None = None
        self.depth = 0
        self.earlier: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python doesn't allow handlers
            handled = [signal.SIGINT, *WARNINGS]
            if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
                handled.remove(signal.SIGHUP)
            self.earlier = {signum: signal.signal(signum, self._handle) for signum in handled}
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self.earlier.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: Any) -> None:
        if signum in WARNINGS and signum != signal.SIGTERM and jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self.received is not None:
            if signum == signal.SIGINT:
                os._exit(130)
            return
        self.received = signum
        if self.waiting_for:  # print() could be interrupted by this very call of it
            os.write(2, f"\n{signal.Signals(signum).name}: waiting for {self.waiting_for}\n".encode())
        if not self.depth:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def held_at_exit(self) -> Iterator[None]:
        """Only note signals from the end of the block on, so that what is closed after it is closed whole."""
        try:
            yield
        finally:
            self.depth += 1

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Do what is inside whole, and raise `Interrupted` after it if a signal came."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if self.received is not None and not self.depth:
            raise Interrupted(self.received)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """End a program on a ConfigError with one line and exit code 2, and on a signal with the signal's own code.

    So does an OSError that nothing closer to it has told of, such as that of a folder that may not be searched.
    Messages can be printed, whatever bytes are in names of files, and whatever encoding the terminal has.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # notebooks have another one
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        what, reason = error.filename or "a file", error.strerror or error
        remedy = "make room or permit it there, or name another path"
        print(f"error: {what} can't be read or written ({reason}); {remedy}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as interrupt:
        print(f"Interrupted by {interrupt}; call the same command again to resume", file=sys.stderr)
        leave(interrupt.exit_code)


def leave(code: int) -> NoReturn:
    """End the process at once. All that has to be closed has been, by the `with` blocks that were left.

    Python would wait for all threads, and forever if an exception came while a library's pool was starting one.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
