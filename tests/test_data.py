import threading

import pytest

from kit.data import prefetched


def test_items_come_in_order_and_the_next_is_made_while_one_is_used():
    started = [threading.Event() for _ in range(4)]

    def items():
        for number in range(3):
            started[number].set()
            yield number
        started[3].set()

    found = []
    for number in prefetched(items()):
        assert started[number + 1].wait(timeout=5)  # before it is requested
        found.append(number)
    assert found == [0, 1, 2]


def test_what_is_raised_while_an_item_is_made_is_raised_where_it_is_asked_for():
    def items():
        yield 1
        raise OSError("broken")

    coming = prefetched(items())
    assert next(coming) == 1
    with pytest.raises(OSError, match="broken"):
        next(coming)
