"""The progress line on a terminal."""

import io
import sys

import pytest

from kit import processes as progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_line_counts_and_goes_at_the_end(monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))  # each call is a second later
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.counted("abc", "reading images", 20, each=8)) == ["a", "b", "c"]
    written = sys.stderr.getvalue().split(progress.CLEAR)
    assert written[1] == "reading images: 8 of 20, 8 per second, 2 s left"
    assert written[3].startswith("reading images: 20 of 20") and written[-1] == ""
    assert capsys.readouterr().out == ""


def test_it_goes_when_the_work_fails(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError):
        for _ in progress.counted("abc", "reading images", 3):
            raise ValueError
    assert sys.stderr.getvalue().endswith(progress.CLEAR)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_into_a_file_or_by_another_process_nothing_is_written(monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "stderr", Terminal() if rank == "1" else io.StringIO())
    assert list(progress.counted("abc", "reading images", 3)) == ["a", "b", "c"]
    assert sys.stderr.getvalue() == ""
