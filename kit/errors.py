"""How bad input ends a script: one line on standard error, exit code 2, no traceback."""

import os
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

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
    return isinstance(error, dist.DistBackendError) or "/gloo/transport/" in str(error)


def fail(line: str) -> None:
    """Write the line, end with code 2. What all processes of torchrun have to say the first one says: it ends, and
    torchrun then ends the others while they wait."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(AFTER_THE_FIRST)
    print("error:", line, file=sys.stderr)
    sys.exit(2)


def run_script(main: Callable[[], None], on_interrupt: str = "stopped") -> None:
    """Call `main`; what only the user can mend becomes one line and exit code 2, Ctrl-C `on_interrupt` and 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    try:
        main()
    except KeyboardInterrupt:
        print(on_interrupt, file=sys.stderr)
        sys.exit(130)  # as shells report it
    except (InputError, OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:
        fail(one_line(error))
    except RuntimeError as error:
        if not is_of_another_process(error):
            raise
        fail("another process of this run has ended; see what it says, on its machine")
