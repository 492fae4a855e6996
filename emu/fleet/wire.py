"""Messages between a fleet's host and its guests: framed, versioned, validated, each with its number.

A frame is a length (4 bytes, big-endian) and so many bytes of JSON: one object with `v` (the protocol's version), `n`
(counts the sender's messages from 1; a number that comes again or out of order is a replay), and `type`, by which the
rest is checked: fields that aren't known, missing ones, wrong types and sizes are refused. What is refused ends the
connection: framing can't be trusted after it, and a host that goes on guessing is what an attacker wants.

Both sides trust nobody: a guest's process is the one that runs somebody's workload.
"""

import json
import struct
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from emu.errors import EmuError

__all__ = [
    "MAX_FRAME",
    "VERSION",
    "Answer",
    "Ask",
    "Bad",
    "Done",
    "Frames",
    "Go",
    "Hello",
    "Message",
    "Row",
    "Status",
    "Stop",
    "encode",
]

VERSION = 2
MAX_FRAME = 4 << 20  # bytes: a result is the largest
_HEAD = struct.Struct(">I")

Bytes = Annotated[int, Field(ge=0, le=1 << 60)]
Name = Annotated[str, Field(min_length=1, max_length=64)]
Text = Annotated[str, Field(max_length=4096)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Bad(EmuError):
    """A frame that was refused. Attributes: reason (one word, by which it is counted)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class _Message(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, frozen=True)


class Hello(_Message):
    """The first message of a guest: who it is, the token it was started with, and what it can be asked for."""

    type: Literal["hello"] = "hello"
    name: Name
    token: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    pid: Annotated[int, Field(gt=0)]
    can: Annotated[list[Literal["steal", "epoch", "purge", "swap"]], Field(max_length=4)]


class Status(_Message):
    """A guest's figures.

    Rss, side and pool by its kernel, the others by its own word. sampled: an estimate of touched. stealable: what
    the host could take by what the guest says of it, unused memory first, then by how long it has been idle
    (emu.host.stealing), in the order in which it goes.
    """

    type: Literal["status"] = "status"
    t: Seconds
    rss: Bytes
    side: Bytes
    pool: Bytes
    swapped: Bytes
    used: Bytes
    cached: Bytes
    free: Bytes
    available: Bytes
    sampled: Bytes | None
    touched: Bytes | None
    disk_read: Bytes
    evicted: Bytes
    throttled: Annotated[int, Field(ge=0)]
    swap_out: Bytes
    swap_in: Bytes
    stolen: Bytes
    stealable: Annotated[list[Bytes], Field(max_length=16)]


class Row(_Message):
    """A step of the workload is done."""

    type: Literal["row"] = "row"
    name: Text
    t: Seconds


class Answer(_Message):
    """What came of a request: bytes that went."""

    type: Literal["answer"] = "answer"
    ask: Annotated[int, Field(ge=1)]
    freed: Bytes


class Done(_Message):
    """The workload has ended (result: what `emu run --json` prints; frames verified, and wrong), or failed (error)."""

    type: Literal["done"] = "done"
    verified: Bytes
    corrupt: Bytes
    result: dict[str, Any] | None
    error: Text | None


class Go(_Message):
    """Begin the workload."""

    type: Literal["go"] = "go"


class Ask(_Message):
    """A request. age: of an epoch, guest seconds; size: bytes at most; within: seconds that it is waited for."""

    type: Literal["ask"] = "ask"
    ask: Annotated[int, Field(ge=1)]
    request: Literal["steal", "epoch", "purge", "swap"]
    size: Bytes
    age: Seconds
    within: Seconds


class Stop(_Message):
    """End: send the result, and exit."""

    type: Literal["stop"] = "stop"


Message = Hello | Status | Row | Answer | Done | Go | Ask | Stop
_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def encode(message: Message, number: int) -> bytes:
    """Return a message as a frame."""
    body = json.dumps({"v": VERSION, "n": number, **message.model_dump()}, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME:
        raise Bad("oversized", f"{len(body)} bytes to be sent, {MAX_FRAME} are the limit")
    return _HEAD.pack(len(body)) + body


def _decode(body: bytes, expected: int) -> Message:
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError):
        raise Bad("malformed", "not JSON") from None
    if not isinstance(raw, dict):
        raise Bad("malformed", "not an object")
    version, number = raw.pop("v", None), raw.pop("n", None)
    if type(version) is not int or version != VERSION:
        raise Bad("version", f"{version!r}, and this is {VERSION}")
    if type(number) is not int or number != expected:
        raise Bad("replayed", f"message {number!r} where {expected} was due")
    try:
        return _ADAPTER.validate_python(raw)
    except (ValidationError, RecursionError) as error:
        detail = str(error).splitlines()[:2]
        raise Bad("invalid", " ".join(detail)[:200]) from None


class Frames:
    """Bytes that came in, as messages. `feed` what was read, then take messages until there is none."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self._expected = 1
        #: bytes of the longest frame that is taken
        self.limit = limit

    def feed(self, data: bytes) -> None:
        """Add bytes."""
        self._buffer += data

    def take(self) -> Message | None:
        """Return the next message, or None when there is no whole one. Raises Bad."""
        if len(self._buffer) < _HEAD.size:
            return None
        (length,) = _HEAD.unpack_from(self._buffer)
        if not 2 <= length <= self.limit:
            raise Bad("oversized", f"a frame of {length} bytes, {self.limit} are the limit")
        end = _HEAD.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_HEAD.size : end])
        del self._buffer[:end]
        message = _decode(body, self._expected)
        self._expected += 1
        return message
