"""One line on a terminal that moves: what is being done, how much of it, how fast, how long yet. On standard error, so
that the output can be piped; into a file nothing is written."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from kit.errors import is_first

Item = TypeVar("Item")

SHOW_EVERY = 0.2  # seconds
CLEAR = "\r\x1b[K"


def is_shown() -> bool:
    """Only on a terminal, and only by the first of several processes."""
    return sys.stderr.isatty() and is_first()


def counted(items: Iterable[Item], what: str, total: int, each: int = 1) -> Iterator[Item]:
    """The items, while a line counts them to `total`; an item stands for `each` of what is counted."""
    if not is_shown():
        yield from items
        return
    started = shown = time.monotonic()
    done = 0
    try:
        for item in items:
            yield item
            done = min(done + each, total)
            now = time.monotonic()
            if now - shown > SHOW_EVERY:
                shown = now
                sys.stderr.write(CLEAR + line(what, done, total, now - started))
                sys.stderr.flush()
    finally:
        clear()


def line(what: str, done: int, total: int, seconds: float) -> str:
    rate = done / seconds
    return f"{what}: {done} of {total}, {rate:.3g} a second, {(total - done) / rate:.0f} s left"


def clear() -> None:
    """Wipe the line, before something else is printed."""
    if is_shown():
        sys.stderr.write(CLEAR)
        sys.stderr.flush()
