"""What hub_server.py can be told to do wrong, one small thing each, and the requests and answers that it happens to."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import ClassVar, Protocol
from urllib.parse import parse_qs, urlsplit


@dataclass
class Request:
    """One thing that a client asked for, in the order of arrival."""

    method: str
    url: str
    """path and query as they came"""
    range: str | None
    token: str | None
    kind: str = "other"
    """info, tree, paths-info, resolve (the redirect), file (the signed address), other (nothing that is known here);
    and the KINDS of hub_uploads.py"""
    type: str = "models"
    repo: str = ""
    revision: str = "main"
    path: str = ""
    """a file or folder within the repository; empty for all of it"""
    status: int = 0
    """of the answer; 0 until there is one"""


@dataclass
class Reply:
    """An answer before it is sent: `num_bytes` is the Content-Length that the client is promised."""

    status: int
    headers: dict[str, str]
    num_bytes: int
    chunks: Iterable[bytes]


class HangUp(Exception):
    """The connection ends here: with a TCP reset, or politely as at the end of a body."""

    def __init__(self, reset: bool) -> None:
        super().__init__()
        self.reset = reset


def text_reply(status: int, text: str, headers: Mapping[str, str] | None = None) -> Reply:
    body = text.encode()
    return Reply(status, {"Content-Type": "text/plain; charset=utf-8", **(headers or {})}, len(body), [body])


def json_reply(content: object, headers: Mapping[str, str]) -> Reply:
    return text_reply(200, json.dumps(content), {"Content-Type": "application/json; charset=utf-8", **headers})


def refusal(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Reply:
    """An error as the hub words it: huggingface_hub makes its typed exceptions from these headers."""
    coded = {"X-Error-Code": code} if code else {}
    return text_reply(status, json.dumps({"error": message}), {**coded, "X-Error-Message": message, **(headers or {})})


class Hub(Protocol):
    """What a fault may ask of the hub."""

    def pause(self, seconds: float) -> None: ...

    def stall(self) -> None: ...

    def expire(self, signature: str) -> None: ...

    def file_reply(self, ask: Request, wanted: str | None) -> Reply: ...


def first_bytes(chunks: Iterable[bytes], num_bytes: int) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk[:num_bytes]
        num_bytes -= len(chunk)
        if num_bytes <= 0:
            return


def signature_of(ask: Request) -> str:
    return parse_qs(urlsplit(ask.url).query).get("signature", [""])[0]


class Fault:
    """One thing that goes wrong with an answer. Several may befall the same answer, in the order of their injection."""

    kind: ClassVar[str | None] = None  # what it befalls where inject() is not told; None is everything
    needs_body: ClassVar[bool] = False  # then a HEAD, which has none, does not use it up

    def reply(self, reply: Reply, ask: Request, hub: Hub) -> Reply:
        """The answer to send instead."""
        return reply

    def body(self, chunks: Iterable[bytes], hub: Hub) -> Iterable[bytes]:
        """The body to send instead; HangUp ends it early."""
        return chunks


class BodyFault(Fault):
    kind = "file"
    needs_body = True


@dataclass(frozen=True)
class ResetAfter(BodyFault):
    """A TCP reset after so many bytes of the body. What a slow reader has not fetched by then may be lost as well."""

    num_bytes: int

    def body(self, chunks: Iterable[bytes], hub: Hub) -> Iterator[bytes]:
        yield from first_bytes(chunks, self.num_bytes)
        raise HangUp(reset=True)


@dataclass(frozen=True)
class CloseAfter(BodyFault):
    """The connection is closed, as after a complete answer, when so many bytes of the body are out."""

    num_bytes: int

    def body(self, chunks: Iterable[bytes], hub: Hub) -> Iterator[bytes]:
        yield from first_bytes(chunks, self.num_bytes)
        raise HangUp(reset=False)


@dataclass(frozen=True)
class LongerLength(BodyFault):
    """The Content-Length promises so many bytes more than there are; the whole body comes, then the end."""

    num_bytes: int

    def reply(self, reply: Reply, ask: Request, hub: Hub) -> Reply:
        return Reply(reply.status, reply.headers, reply.num_bytes + self.num_bytes, reply.chunks)

    def body(self, chunks: Iterable[bytes], hub: Hub) -> Iterator[bytes]:
        yield from chunks
        raise HangUp(reset=False)


@dataclass(frozen=True)
class Trickle(BodyFault):
    """The body comes in pieces of `num_bytes`, with a pause of `every_s` after each."""

    num_bytes: int
    every_s: float

    def body(self, chunks: Iterable[bytes], hub: Hub) -> Iterator[bytes]:
        for chunk in chunks:
            for start in range(0, len(chunk), self.num_bytes):
                yield chunk[start : start + self.num_bytes]
                hub.pause(self.every_s)


class IgnoreRange(BodyFault):
    """The whole file with status 200, whatever Range was asked for."""

    def reply(self, reply: Reply, ask: Request, hub: Hub) -> Reply:
        return hub.file_reply(ask, None) if reply.status in (206, 416) else reply


class ExpireSignature(BodyFault):
    """This answer is the last that the signature buys: with a break after it, going on takes a new redirect."""

    def reply(self, reply: Reply, ask: Request, hub: Hub) -> Reply:
        if reply.status in (200, 206):
            hub.expire(signature_of(ask))
        return reply


class Stall(Fault):
    """Not even a header until hub.release() or the end of the hub; then the answer."""

    def reply(self, reply: Reply, ask: Request, hub: Hub) -> Reply:
        hub.stall()
        return reply


@dataclass(frozen=True)
class StallAfter(BodyFault):
    """So many bytes of the body, then silence until hub.release() or the end of the hub; then the rest."""

    num_bytes: int

    def body(self, chunks: Iterable[bytes], hub: Hub) -> Iterator[bytes]:
        before = self.num_bytes
        for chunk in chunks:
            if 0 <= before < len(chunk):
                yield chunk[:before]
                hub.stall()
                yield chunk[before:]
            else:
                yield chunk
            before -= len(chunk)


@dataclass(frozen=True)
class Refuse(Fault):
    """A status instead of the answer. The functions below name the common ones."""

    status: int
    message: str
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    def reply(self, reply: Reply, ask: Request, hub: Hub) -> Reply:
        return refusal(self.status, self.code, self.message, self.headers)


def server_error(status: int = 500) -> Refuse:
    return Refuse(status, "Internal Error - We're working hard to fix this as soon as possible!")


def too_many_requests(retry_after_s: int) -> Refuse:
    return Refuse(429, "Too many requests", headers={"Retry-After": str(retry_after_s)})


def bad_token() -> Refuse:
    return Refuse(401, "Invalid credentials in Authorization header")


def not_in_the_list() -> Refuse:
    """Gated, and this token's owner was not let in."""
    return Refuse(403, "Access is restricted and you are not in the authorized list.", "GatedRepo")


def entry_not_found() -> Refuse:
    return Refuse(404, "Entry not found", "EntryNotFound")


@dataclass
class Rule:
    """A fault and what it waits for. `hits` counts the answers it has befallen: at 0 a test has tested nothing."""

    fault: Fault
    kind: str | None
    path: str
    method: str | None
    skip: int
    times: int | None
    hits: int = 0

    def befalls(self, ask: Request) -> bool:
        """Whether this fault befalls the answer to `ask`; asking counts."""
        is_match = self.kind in (None, ask.kind) and self.method in (None, ask.method) and fnmatch(ask.path, self.path)
        if not is_match or (ask.method == "HEAD" and self.fault.needs_body) or self.hits == self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.hits += 1
        return True
