"""Ends of programs: signals raised as an exception at a safe moment, and exit codes."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

import jax

from config import ConfigError

SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""The signals that schedulers send before they kill. A closed terminal also sends SIGHUP, which `nohup` ignores."""


class Interrupted(BaseException):
    """The exception of Ctrl-C or a scheduler's signal.

    `exit_code` is that of a shell, 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Interrupts:
    """A context in which the first signal raises `Interrupted`, immediately or at the end of a `deferred` block.

    A second Ctrl-C ends the process immediately. JAX stops several processes after the same step, on SIGTERM. The other
    signals of schedulers are turned into SIGTERM there.
    """

    entered: ClassVar["Interrupts | None"] = None
    """The innermost context of the main thread."""

    def __init__(self) -> None:
        self.waiting_for = ""
        """What the program does between a signal and its end, if that takes a while."""
        self.received: int | None = None
        self.depth = 0
        self.earlier: dict[int, Any] = {}
        self.outer: Interrupts | None = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            handled = [signal.SIGINT, *SCHEDULER_SIGNALS]
            if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
                handled.remove(signal.SIGHUP)
            self.earlier = {signum: signal.signal(signum, self._handle) for signum in handled}
            self.outer, Interrupts.entered = Interrupts.entered, self
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self.earlier.items():
            signal.signal(signum, handler)
        if Interrupts.entered is self:
            Interrupts.entered = self.outer

    def _handle(self, signum: int, _: Any) -> None:
        if signum in SCHEDULER_SIGNALS and signum != signal.SIGTERM and jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self.received is not None:
            if signum == signal.SIGINT:
                os._exit(130)
            return
        self.received = signum
        if self.waiting_for:  # not by print(), since the signal may have interrupted a call of it
            os.write(2, f"\n{signal.Signals(signum).name}: waiting for {self.waiting_for}\n".encode())
        if not self.depth:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def deferred_at_exit(self) -> Iterator[None]:
        """Raise nothing from the end of the block on, so that what is closed after it is closed completely."""
        try:
            yield
        finally:
            self.depth += 1

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Complete the block, and raise `Interrupted` after it if a signal came."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if self.received is not None and not self.depth:
            raise Interrupted(self.received)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Complete the block, or the function that this decorates, before a signal raises `Interrupted`."""
    with Interrupts.entered.deferred() if Interrupts.entered else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """End the program with one line and exit code 2 on a ConfigError, and with the signal's code on `Interrupted`.

    An OSError that nothing else has handled is treated like a ConfigError. Messages can be printed with any bytes in
    file names, and in any encoding of the terminal.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # notebooks have another type
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        path, reason = error.filename or "a file", error.strerror or error
        remedy = "make room or permit it there, or name another path"
        print(f"error: {path} can't be read or written ({reason}); {remedy}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as interrupt:
        print(f"Interrupted by {interrupt}; call the same command again to resume", file=sys.stderr)
        exit_now(interrupt.exit_code)


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for its threads. The `with` blocks have closed everything.

    Python would wait for all threads. It would wait forever if an exception came while a library's pool was starting
    one.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
