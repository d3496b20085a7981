"""Text as tokens come: whole characters, stop strings over the borders of tokens, the same as all at once."""

from hypothesis import example, given
from hypothesis import strategies as st

from zigzag_ext.serve.text import TextStream


class Bytes:
    """A tokenizer of pieces of bytes, by their number; None is a special token."""

    def __init__(self, pieces: list[bytes | None]):
        self.pieces = pieces

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return b"".join(self.pieces[i] or b"" for i in ids).decode("utf-8", errors="replace")


def streamed(pieces, stop=()):
    """What each push releases, with what `finish` does at the end, and whether it stopped."""
    stream = TextStream(Bytes(pieces), stop)
    released = []
    for token in range(len(pieces)):
        released.append(stream.push(token))
        if stream.stopped:
            return released, True
    released.append(stream.finish())
    return released, stream.stopped


TEXTS = st.text(alphabet="abé€😀 \n", max_size=24)


@given(TEXTS, st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_pieces_of_characters_are_held_back(text, sizes):
    data, pieces = text.encode(), []
    while data:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[:size])
        data = data[size:]
    released, stopped = streamed(pieces)
    assert "".join(released) == text and not stopped
    assert not any("�" in part for part in released)


@given(TEXTS, st.lists(st.text(alphabet="abé€", min_size=1, max_size=3), min_size=1, max_size=3), st.integers(1, 4))
@example("abé", ["b", "abé"], 3)
def test_text_ends_before_the_first_stop_string(text, stop, size):
    """That comes first as tokens come; what is released is never taken back."""
    data = text.encode()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    released, stopped = streamed(pieces, stop)
    so_far = [b"".join(pieces[: n + 1]).decode("utf-8", errors="ignore") for n in range(len(pieces))]
    hit = next((each for each in so_far if any(s in each for s in stop)), None)
    wanted = text if hit is None else hit[: min(place for place in map(hit.find, stop) if place >= 0)]
    assert stopped == (hit is not None) and "".join(released) == wanted


def test_an_end_that_may_begin_a_stop_string_waits():
    assert streamed([b"one", b" E", b"N", b"D", b" two"], ["END"]) == (["one", " ", "", ""], True)
    assert streamed([b"one", b" E", b"N", b"d"], ["END"]) == (["one", " ", "", "ENd", ""], False)
    assert streamed([b"a E", b"N"], ["END"]) == (["a ", "", "EN"], False)


def test_bytes_that_are_no_character_come_at_the_end():
    assert streamed([b"a", b"\xe2\x82"]) == (["a", "", "�"], False)
    assert streamed([b"\xff", b"b"]) == (["", "�b", ""], False)


def test_special_tokens_have_no_text():
    assert streamed([b"a", None, b"b", None]) == (["a", "", "b", "", ""], False)
