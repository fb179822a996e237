"""How bad input ends a script: one line on standard error, exit code 2, no traceback."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

AFTER_THE_FIRST = 2.0  # seconds that other processes wait with an error


class InputError(Exception):
    """Something only the user can mend; its text names the file or the flag, and says what to do."""


def one_line(error: BaseException) -> str:
    """The last line of an error's text, which is where a loader's worker puts the cause; its type if it has none."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")


def is_of_another_process(error: RuntimeError) -> bool:
    """Whether it only says that a process that shares the work has gone: Gloo's errors have no class of their own."""
    import torch.distributed as dist  # not above, so that a command line is read without it

    return isinstance(error, dist.DistBackendError) or "/gloo/transport/" in str(error)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that a GPU's memory is full."""
    import torch

    return isinstance(error, torch.cuda.OutOfMemoryError)


def is_first() -> bool:
    """Whether this is the first of torchrun's processes, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def fail(line: str) -> None:
    """Write the line, end with code 2. What all processes of torchrun have to say the first one says: it ends, and
    torchrun then ends the others while they wait."""
    if not is_first():
        time.sleep(AFTER_THE_FIRST)
    print("error:", line, file=sys.stderr)
    sys.exit(2)


class Stopped(KeyboardInterrupt):
    """A signal that asks to end: SIGINT (Ctrl-C) or SIGTERM (kill, systemctl stop, docker stop)."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def stop(number: int, frame: object) -> None:
    """The handler of such a signal."""
    raise Stopped(number)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Both signals raise `Stopped`, however the script was started: with & or nohup a shell has it ignore SIGINT, and
    SIGTERM would end it at once."""
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_script(main: Callable[[], None], on_interrupt: str = "stopped") -> None:
    """Call `main`; what only the user can mend becomes one line and exit code 2. A signal that asks to end becomes
    `on_interrupt` and 128 + its number, as shells report it."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    try:
        with stoppable():
            main()
    except KeyboardInterrupt as stopped:
        number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        if is_first():
            print(on_interrupt, file=sys.stderr)
        sys.exit(128 + number)
    except (InputError, OSError, MemoryError) as error:
        fail(one_line(error))
    except RuntimeError as error:
        if is_out_of_memory(error):
            fail(one_line(error))
        if not is_of_another_process(error):
            raise
        fail(f"another process of this run has ended; see what it says, on its machine ({one_line(error)})")
