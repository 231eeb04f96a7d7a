"""Progress: plain lines for files and pipes, a bar for a terminal."""

import sys

import pytest

from experiments.progress import progress


def test_plain_lines_where_there_is_no_terminal(capsys):
    now = 0.0
    with progress("base", 1200, "updates", done=200, clock=lambda: now) as bar:
        now = 12.5
        bar.advance(100, loss=0.75)
        for _ in range(8):
            now += 4
            bar.advance(100, loss=0.5)
    assert capsys.readouterr().out.splitlines() == [
        "base: 200/1,200 updates, compiling ...",
        "base: first 100 updates in 12.5 s, compilation included",
        "base: 600/1,200 updates, 25/s, 0:24 left, loss 0.5",
        "base: 900/1,200 updates, 25/s, 0:12 left, loss 0.5",
        "base: 1,100/1,200 updates in 0:44, loss 0.5",
    ]


def test_a_failure_still_ends_the_lines(capsys):
    with pytest.raises(ZeroDivisionError), progress("base", 3, "updates"):
        _ = 1 / 0
    assert capsys.readouterr().out.splitlines()[-1] == "base: 0/3 updates in 0:00"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with progress("base", 300, "updates") as bar:
        bar.advance(100, loss=0.5)
        bar.advance(200, loss=0.25)
    out = capsys.readouterr().out
    assert "first 100 updates in" in out
    assert "300/300 updates" in out
    assert "loss 0.25" in out
