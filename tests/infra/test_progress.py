"""What a run prints: plain lines to a file, a live bar on a terminal, JSON lines in both cases."""

import io
import json

import pytest

from tests.infra.test_stage import Square
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.progress import RunLog, StageProgress, clock, size_text
from winnow.infra.stages.runner import Budget, execute


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    return Terminal()


def run(tmp_path, stream, steps=None):
    log = RunLog(str(tmp_path), stream, steps)
    execute(Square((1, 2, 3), str(tmp_path), bad=(2,)), SerialExecutor(), budget=Budget(1), log=log)
    return stream.getvalue(), [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


def test_plain_lines_without_a_terminal(tmp_path):
    text, events = run(tmp_path, io.StringIO(), steps=(2, 7))
    assert "\x1b" not in text and text.startswith("square") and text.count("\n") == 1
    assert "3/3  3 items" in text and "complete with 1 skipped" in text
    assert [event["event"] for event in events] == ["start", "done"]
    assert events[1]["units"] == events[1]["of"] == 3 and events[1]["skipped"] == 1


def test_a_live_bar_on_a_terminal(tmp_path, terminal):
    text, events = run(tmp_path, terminal, steps=(2, 7))
    assert "[2/7] square" in text and "0/3" in text and "1 skipped" in text and "items" in text
    assert "complete with 1 skipped" in text.splitlines()[-1]
    assert [event["event"] for event in events] == ["start", "done"]


def test_lines_and_notes_while_a_bar_is_shown(terminal):
    log = RunLog(stream=terminal)
    with StageProgress(log, "train", 1, 100) as progress:
        log.say("something [odd] happened")
        progress.tick("step 5 loss 1.25 [x]")
    assert "something [odd] happened" in terminal.getvalue() and "step 5 loss 1.25 [x]" in terminal.getvalue()


def test_a_dumb_terminal_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    RunLog(stream=terminal).say("text")
    assert terminal.getvalue() == "text\n"


def test_a_line_at_most_every_few_seconds():
    stream = io.StringIO()
    log = RunLog(stream=stream)
    quiet, chatty = StageProgress(log, "a", 2, 0), StageProgress(log, "b", 2, 0, every=0)
    quiet.add(items=1, size=0, skipped=0)
    assert not stream.getvalue()
    chatty.add(items=1, size=1536, skipped=0)
    assert "1/2" in stream.getvalue() and "1.5 KB written" in stream.getvalue() and "left" in stream.getvalue()


def test_units():
    assert [clock(93), clock(3725), size_text(5), size_text(2e13)] == ["1:33", "1:02:05", "5 B", "20.0 TB"]
