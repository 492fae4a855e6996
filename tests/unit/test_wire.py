"""The fleet's messages: what is right goes through, everything else is refused, and nothing crashes."""

import json
import struct

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from emu.fleet.wire import MAX_FRAME, VERSION, Answer, Ask, Bad, Done, Frames, Go, Hello, Row, Status, Stop, encode

STATUS = {name: 1 for name in Status.model_fields if name not in ("type", "t")} | {"t": 1.0, "stealable": [1, 2]}
GOOD = [
    Hello(name="vm", token="a" * 32, pid=5, can=["epoch"]),
    Status(**STATUS),
    Row(name="boot", t=0.0),
    Answer(ask=1, freed=0),
    Done(verified=5, corrupt=0, result={"a": [1, None]}, error=None),
    Go(),
    Ask(ask=1, request="swap", size=4096, age=0.0, within=2.0),
    Stop(),
]


def frame(body):
    return struct.pack(">I", len(body)) + body


def everything(frames):
    got = []
    while (message := frames.take()) is not None:
        got.append(message)
    return got


@given(st.lists(st.sampled_from(GOOD), max_size=20), st.integers(1, 97))
def test_messages_come_out_as_they_went_in(messages, cut):
    data = b"".join(encode(message, number) for number, message in enumerate(messages, 1))
    frames, got = Frames(), []
    for at in range(0, len(data), cut):
        frames.feed(data[at : at + cut])
        got += everything(frames)
    assert got == messages


@settings(max_examples=4000)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_waited_for(data):
    frames = Frames()
    frames.feed(data)
    with (
        pytest.raises(Bad) if len(data) >= 4 and not 2 <= struct.unpack_from(">I", data)[0] <= MAX_FRAME else _either()
    ):
        everything(frames)


class _either:
    # nothing, or a refusal
    def __enter__(self):
        return self

    def __exit__(self, kind, value, tb):
        return kind is None or issubclass(kind, Bad)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
KEYS = ["type", "v", "n", "name", "token", "pid", "can", "ask", "freed", "t", "rss", "result", "error"]


@settings(max_examples=4000)
@given(
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=8),
    st.sampled_from(["hello", "status", "done", "answer", None]),
)
def test_objects_that_are_nearly_messages(fields, kind):
    body = {"v": VERSION, "n": 1} | fields | ({} if kind is None else {"type": kind})
    frames = Frames()
    frames.feed(frame(json.dumps(body).encode()))
    with _either():
        assert len(everything(frames)) == 1  # then it was one


@settings(max_examples=2500)
@given(st.sampled_from(GOOD), st.integers(0, 400), st.integers(1, 255))
def test_a_flipped_byte(message, at, flip):
    data = bytearray(encode(message, 1))
    data[at % len(data)] ^= flip
    frames = Frames()
    frames.feed(bytes(data))
    with _either():
        everything(frames)


def test_what_is_refused_and_as_what():
    def refused(data, *, after=b""):
        frames = Frames()
        frames.feed(after)
        everything(frames)
        frames.feed(data)
        with pytest.raises(Bad) as caught:
            everything(frames)
        return caught.value.reason

    one = encode(Go(), 1)
    assert refused(one, after=one) == "replayed"
    assert refused(encode(Go(), 3), after=one) == "replayed"
    assert refused(encode(Go(), 2)) == "replayed"
    assert refused(struct.pack(">I", MAX_FRAME + 1)) == "oversized"
    assert refused(struct.pack(">I", 0)) == "oversized"
    assert refused(frame(b"[1]")) == "malformed"
    assert refused(frame(b"{]")) == "malformed"
    assert refused(frame(b"[" * 100_000)) == "malformed"
    assert refused(frame(b'{"v":1,"n":1,"type":"go"}')) == "version"
    assert refused(frame(b'{"v":true,"n":1,"type":"go"}')) == "version"
    assert refused(frame(b'{"v":2,"n":true,"type":"go"}')) == "replayed"
    assert refused(frame(b'{"v":2,"n":1,"type":"go","more":1}')) == "invalid"
    assert refused(frame(b'{"v":2,"n":1,"type":"answer","ask":"1","freed":0}')) == "invalid"
    assert refused(frame(b'{"v":2,"n":1,"type":"answer","ask":1,"freed":-1}')) == "invalid"
    assert refused(frame(b'{"v":2,"n":1,"type":"row","name":"x","t":NaN}')) == "invalid"
    with pytest.raises(Bad):
        encode(Done(verified=0, corrupt=0, result={"x": "y" * MAX_FRAME}, error=None), 1)
