"""Names and messages that others have written, escaped."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencer.config.errors import summarise_error
from sequencer.printing import printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name-1.jpg", "plain name-1.jpg"),
        ("日本 、\u3000Å ن\u200cم 👩\u200d🚀.png", "日本 、\u3000Å ن\u200cم 👩\u200d🚀.png"),
        (r"back\slash", r"back\slash"),
        ("two\nlines\r\tend", r"two\nlines\r\tend"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\x9b31m", r"\u009b31m"),
        ("gpj.\u202eexe\u2028", r"gpj.\u202eexe\u2028"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
        ("\ud800", r"\ud800"),
    ],
)
def test_names(name, shown):
    assert printable(name) == shown


@given(st.text(st.characters(categories=None)) | st.binary().map(os.fsdecode))
def test_every_name_becomes_one_line_of_unicode(name):
    shown = printable(name)
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    assert printable(shown) == shown


def test_messages_of_errors_keep_their_lines():
    assert summarise_error(ValueError("\x1b[2Jone\ntwo\x07\nthree")) == "\\x1b[2Jone\ntwo\\x07"
