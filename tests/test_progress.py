from __future__ import annotations

import io
import sys

from llm_streamline import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_an_eta(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.progress("training", 10) as advance:
        advance(4, "loss 0.5")
    assert "training" in sys.stderr.getvalue() and "4/10" in sys.stderr.getvalue()


def test_elsewhere_a_line_now_and_then_says_how_long_is_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress.progress("training", 10) as advance:
        advance(5, "loss 0.5")
        advance(5)
    assert capsys.readouterr().err == "training 5/10 loss 0.5, about 0 s left\n"


def test_quiet_is_quiet(capsys):
    with progress.progress("training", 10, quiet=True) as advance:
        advance(10)
    progress.say("words", quiet=True)
    assert capsys.readouterr().err == ""
