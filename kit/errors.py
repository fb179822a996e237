"""How a script ends on bad input: one line on standard error, exit code 2, no traceback."""

import os
import signal
import sys
import time
from collections.abc import Callable

AFTER_THE_FIRST = 6.0  # seconds that other processes wait with an error


class InputError(Exception):
    """An error that only the user can fix. Its text names the file or the flag, and says what to do."""


def one_line(error: BaseException) -> str:
    """The last line of an error's text, where a loader's worker puts the cause; the error's type if it has no text."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")


def is_first() -> bool:
    """Whether this is the first of torchrun's processes, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def fail(line: str) -> None:
    """Write the line and end with code 2. If all processes of torchrun fail, only the first one writes: it ends, and
    torchrun then ends the others while they wait."""
    if not is_first():
        time.sleep(AFTER_THE_FIRST)
    print("error:", line, file=sys.stderr)
    sys.exit(2)


def stop(number: int, frame: object) -> None:
    """The handler of a signal that asks to end: SIGINT (Ctrl-C) or SIGTERM (kill, systemctl stop, docker stop)."""
    if hasattr(signal, "SIGCHLD"):  # background processes may end, too: PyTorch need not complain about that
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def quit_on_signals() -> None:
    """Outside of `run_script`, such a signal ends the process at once, without a traceback: while PyTorch is imported,
    and after the script has ended, there is nothing to complete."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os._exit(128 + number))


def run_script(main: Callable[[], None], on_interrupt: str = "stopped") -> None:
    """Call `main`. An error that only the user can fix becomes one line and exit code 2. A signal that asks to end
    becomes the line `on_interrupt` and exit code 128 + its number, as shells report it."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    # By default, a script started with & or nohup ignores SIGINT.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        if is_first():
            print(on_interrupt, file=sys.stderr)
        sys.exit(128 + number)
    except (InputError, OSError, MemoryError) as error:
        fail(one_line(error))
    except RuntimeError as error:
        kind = type(error).__name__  # PyTorch's classes, without importing it: the command line is read before
        if kind == "OutOfMemoryError":  # of a GPU
            fail(one_line(error))
        if str(error).startswith("DataLoader worker"):
            fail("a background process was killed, perhaps because the memory was full; continue with --resume")
        if kind != "DistBackendError" and "/gloo/transport/" not in str(error):  # Gloo's errors have no class
            raise
        fail(
            "another process of this run has ended; read the error that it printed, perhaps on another machine "
            f"({one_line(error)})"
        )
