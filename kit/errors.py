"""How bad input ends a script: one line on standard error, exit code 2, no traceback."""

import sys
from collections.abc import Callable

import torch


class InputError(Exception):
    """Something only the user can mend; its text names the file or the flag, and says what to do."""


def one_line(error: BaseException) -> str:
    """The last line of an error's text, which is where a loader's worker puts the cause; its type if it has none."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")


def run_script(main: Callable[[], None], on_interrupt: str = "stopped") -> None:
    """Call `main`; what only the user can mend becomes one line and exit code 2, Ctrl-C `on_interrupt` and 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    try:
        main()
    except KeyboardInterrupt:
        print(on_interrupt, file=sys.stderr)
        sys.exit(130)  # as shells report it
    except (InputError, OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(2)
