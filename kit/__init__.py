"""The tools that the methods use, one subject per file. Nothing here imports a method or the top level.

The scripts import this before PyTorch, which reads the setting below on import: how long PyTorch's threads spin while
they wait for each other, before they sleep. OpenMP's default is some milliseconds. On a busy machine spinning threads
take time from the others: with one other busy process per core, training fell to 0.22 of its speed. With less spinning
it keeps 0.40, and on an idle machine it loses nothing."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class InputError(Exception):
    """An error that only the user can fix. Its text names the file or the flag, and says what to do."""
