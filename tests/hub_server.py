"""A small Hugging Face hub on the loopback interface, for tests: repositories made of folders, and faults on demand.

    with HubServer({"org/name": folder}) as hub:
        hub.inject(ResetAfter(1000), path="a.tar")  # the next GET of a.tar breaks off; a second one would not
        subprocess.run([...], env=hub.environment(tmp_path))

It speaks what huggingface_hub 2.4 asks for: the facts of a repository, its tree in pages, paths-info, and files behind
a redirect to a signed address that serves byte ranges. As on the real hub that address is of another origin (a second
port), so a client is to leave its token behind. Every file is served as an LFS file is. Revisions are `main`, which
follows the folder, branches below `refs/` (see Repo), and the 40 digits of every listing that was ever seen. Files may
be added (by renaming them into the folder) and removed, never changed: a file that a revision lists and the folder
lacks gets no answer, and leaving the `with` block raises. A large file costs one SHA-256. With `uploads` it takes
models as well, see hub_uploads.py.

What a client is told is noted before the bytes leave, so a test may look at `requests` and `bytes_sent` at any time.
"""

import os
import re
import secrets
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

from hub_faults import Fault, HangUp, Reply, Request, Rule, json_reply, refusal, signature_of, text_reply
from hub_repos import File, Repo, read_span, rows_of, span_of
from hub_uploads import API as UPLOAD_API
from hub_uploads import CDN as UPLOAD_CDN
from hub_uploads import KINDS as UPLOAD_KINDS
from hub_uploads import Uploads

IDLE_S = 60  # a connection on which a client neither asks nor reads for so long is closed
STALL_S = 120  # a stall that nobody releases ends here
JOIN_S = 10  # what a thread gets to end when the hub closes
REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
API = re.compile(
    rf"/api/(?P<type>datasets|models)/{REPO}"
    r"(?:/(?P<kind>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
RESOLVE = re.compile(rf"/(?:(?P<type>datasets)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
SIGNED = re.compile(rf"/cdn/(?P<type>datasets|models)/{REPO}/(?P<revision>[0-9a-f]{{40}})/(?P<path>.+)")


@dataclass
class Signature:
    path: str
    deadline: float
    uses: int | None


class HubServer:
    """The hub, from the beginning of a `with` block to its end.

    Args:
        datasets, models: folders by repository id. `models` may be gated as well.
        gated: the tokens that a gated repository lets in, by its id. Its facts are public; its listings and files are
            not (the real hub has been seen to refuse paths-info and resolve; for the tree this is a guess).
        page_size: entries in one page of a tree.
        signature_s, signature_uses: how long and how often a signed address is good; None is for ever.
        uploads: the models that clients may make, and the tokens that may; without it, nobody may.
    """

    def __init__(
        self,
        datasets: Mapping[str, Path],
        models: Mapping[str, Path] | None = None,
        gated: Mapping[str, Collection[str]] | None = None,
        page_size: int = 1000,
        signature_s: float = 3600,
        signature_uses: int | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        folders = {"datasets": datasets, "models": models or {}}
        self.repos = {(type, name): Repo(path) for type, some in folders.items() for name, path in some.items()}
        self.requests: list[Request] = []
        self.bytes_sent: Counter[str] = Counter()
        """body bytes of files that were handed to the network, by path within the repository"""
        self.failures: list[BaseException] = []
        self._gated = gated or {}
        self._uploads = uploads or Uploads(None, ())
        self._page_size = page_size
        self._signature_s, self._signature_uses = signature_s, signature_uses
        self._signatures: dict[str, Signature] = {}
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._closing, self._released = threading.Event(), threading.Event()

    def __enter__(self) -> "HubServer":
        self._api, self._cdn = _Listener(self, "api"), _Listener(self, "cdn")
        self.url, self._cdn_url = self._api.url, self._cdn.url
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._closing.set()
        self.release()
        for listener in (self._api, self._cdn):
            listener.close()
        if self.failures and error is None:
            raise self.failures[0]
        if self.failures:
            error.add_note(f"the hub failed as well: {self.failures[0]!r}")

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """For a child process: this hub and no other, no proxy, nothing of the user's own cache and token."""
        foreign = ("HF_", "HUGGING")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and not k.lower().endswith("_proxy")}
        mine = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **mine, **({"HF_TOKEN": token} if token else {})}

    def sha(self, name: str, type: str = "datasets") -> str:
        """What `main` of a repository is now."""
        return self.repos[type, name].main()

    def inject(
        self,
        fault: Fault,
        *,
        kind: str | None = None,
        path: str = "*",
        method: str | None = None,
        skip: int = 0,
        times: int | None = 1,
    ) -> Rule:
        """Let `fault` befall the next `times` answers that match (None: all), after `skip`; `path` is a glob.

        Two faults that match the same answer befall it together; for one after the other, let the second skip.
        """
        rule = Rule(fault, kind or fault.kind, path, method, skip, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def faults_for(self, ask: Request) -> list[Fault]:
        """Note the request, and count it against the rules."""
        with self._lock:
            self.requests.append(ask)
            return [rule.fault for rule in self._rules if rule.befalls(ask)]

    def pause(self, seconds: float) -> None:
        """Wait, unless the hub closes: then hang up."""
        if self._closing.wait(seconds):
            raise HangUp(reset=False)

    def stall(self) -> None:
        """Wait for release(); hang up if it does not come."""
        if not self._released.wait(STALL_S) or self._closing.is_set():
            raise HangUp(reset=False)

    def release(self) -> None:
        """End the stalls that are in progress. Later ones stall again."""
        with self._lock:
            self._released.set()
            self._released = threading.Event()
            if self._closing.is_set():
                self._released.set()

    def expire(self, signature: str) -> None:
        """This signature buys nothing any more."""
        with self._lock:
            self._signatures[signature].deadline = 0

    def expire_signatures(self) -> None:
        """Nor do any that were given out so far."""
        with self._lock:
            for signature in self._signatures.values():
                signature.deadline = 0

    def reply_to(self, ask: Request, form: bytes) -> Reply:
        """The answer, before any fault."""
        if ask.kind == "other":
            return text_reply(404, "Not Found")
        if ask.kind == "file":
            return self._signed_reply(ask)
        if ask.kind in UPLOAD_KINDS:
            return self._uploads.reply(self.repos, ask, form, (self.url, self._cdn_url))
        repo = self.repos.get((ask.type, ask.repo))
        if repo is None:  # as the hub does: who may not know whether there is such a repository is told to log in
            return refusal(404 if ask.token else 401, "RepoNotFound", "Repository not found")
        if ask.kind != "info" and ask.repo in self._gated and ask.token not in self._gated[ask.repo]:
            message = f"Access to {ask.type} {ask.repo} is restricted."
            return refusal(403 if ask.token else 401, "GatedRepo", message)
        sha = repo.commit_of(ask.revision)
        if sha not in repo.listings:
            return refusal(404, "RevisionNotFound", f"Invalid rev id: {ask.revision}")
        listing, commit = repo.listings[sha], {"X-Repo-Commit": sha}
        if ask.kind == "info":
            return json_reply(self._facts(ask, sha, listing), commit)
        if ask.kind == "tree":
            return self._tree_reply(ask, listing, commit)
        if ask.kind == "paths-info":
            rows = rows_of(listing)
            wanted = (path.strip("/") for path in parse_qs(form.decode()).get("paths", []))
            return json_reply([rows[path] for path in wanted if path in rows], commit)
        return self._redirect(ask, listing, sha)

    def _facts(self, ask: Request, sha: str, listing: Mapping[str, File]) -> dict:
        return {
            "id": ask.repo,
            "modelId" if ask.type == "models" else "_id": ask.repo,
            "author": ask.repo.rpartition("/")[0] or None,
            "sha": sha,
            "private": False,
            "gated": "auto" if ask.repo in self._gated else False,
            "disabled": False,
            "lastModified": "2025-01-01T00:00:00.000Z",
            "tags": [],
            "siblings": [{"rfilename": path} for path in listing],
        }

    def _tree_reply(self, ask: Request, listing: Mapping[str, File], commit: dict[str, str]) -> Reply:
        """One page of the whole tree or of one folder. The cursor is the last path of the page before."""
        query = dict(parse_qsl(urlsplit(ask.url).query))
        prefix = ask.path + "/" if ask.path else ""
        rows = [row for path, row in rows_of(listing).items() if path.startswith(prefix)]
        if prefix and not rows:
            return refusal(404, "EntryNotFound", f"{ask.path} does not exist on {ask.revision}", commit)
        if query.get("recursive") != "true":
            rows = [row for row in rows if "/" not in row["path"].removeprefix(prefix)]
        rows = [row for row in rows if row["path"] > query.get("cursor", "")]
        page = rows[: min(self._page_size, int(query.get("limit", self._page_size)))]
        if len(page) < len(rows):
            following = urlencode({**query, "cursor": page[-1]["path"]})
            commit = {**commit, "Link": f'<{self.url}{urlsplit(ask.url).path}?{following}>; rel="next"'}
        return json_reply(page, commit)

    def _redirect(self, ask: Request, listing: Mapping[str, File], sha: str) -> Reply:
        """To a signed address at the other origin. The facts of the file are here: a client's HEAD goes no further."""
        commit = {"X-Repo-Commit": sha}
        if ask.path not in listing:
            return refusal(404, "EntryNotFound", "Entry not found", commit)
        file, signature = listing[ask.path], secrets.token_hex(16)
        path = f"/cdn/{ask.type}/{ask.repo}/{sha}/{quote(ask.path)}"
        with self._lock:
            deadline = time.monotonic() + self._signature_s
            self._signatures[signature] = Signature(path, deadline, self._signature_uses)
        location = f"{self._cdn_url}{path}?signature={signature}"
        linked = {"X-Linked-Size": str(file.num_bytes), "X-Linked-ETag": f'"{file.sha256}"', "ETag": f'"{file.sha256}"'}
        headers = {**commit, **linked, "Accept-Ranges": "bytes", "Location": location}
        return text_reply(302, f"Found. Redirecting to {location}", headers)

    def _signed_reply(self, ask: Request) -> Reply:
        with self._lock:
            signature = self._signatures.get(signature_of(ask))
            is_good = (
                signature is not None
                and signature.path == urlsplit(ask.url).path
                and time.monotonic() < signature.deadline
                and signature.uses != 0
            )
            if is_good and signature.uses is not None:
                signature.uses -= 1
        return self.file_reply(ask, ask.range) if is_good else text_reply(403, "AccessDenied: signature expired")

    def file_reply(self, ask: Request, wanted: str | None) -> Reply:
        """A file, or what a Range header wants of it. Raises if the folder no longer has what the revision lists."""
        repo = self.repos[ask.type, ask.repo]
        file, path = repo.listings[ask.revision][ask.path], repo.folder / ask.path
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (file.num_bytes, file.modified_ns):
            raise RuntimeError(f"{path} has changed since revision {ask.revision} listed it; a hub's files never do")
        headers = {"Content-Type": "binary/octet-stream", "Accept-Ranges": "bytes", "ETag": f'"{file.sha256}"'}
        span, whole = span_of(wanted, file.num_bytes), range(file.num_bytes)
        if span is None:
            return Reply(200, headers, len(whole), read_span(path, whole))
        if not span:
            return text_reply(416, "InvalidRange", {"Content-Range": f"bytes */{file.num_bytes}"})
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{file.num_bytes}"
        return Reply(206, headers, len(span), read_span(path, span))

    def count(self, ask: Request, num_bytes: int) -> None:
        """Add to bytes_sent what is about to be sent of a file; a refusal is none of its bytes."""
        if ask.kind == "file" and ask.status in (200, 206):
            with self._lock:
                self.bytes_sent[ask.path] += num_bytes


class _Listener(ThreadingHTTPServer):
    """One port of the hub, with its threads and open connections, all of which end with close()."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, name: str) -> None:
        self.hub, self.name = hub, name
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._running: list[threading.Thread] = []
        self._start(f"hub-{name}", self.serve_forever, 0.05)

    def _start(self, name: str, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._running.append(thread)
        thread.start()

    def server_bind(self) -> None:
        """Without http.server's look-up of the host's name, which may leave the machine."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        self._open.add(request)
        self._start(f"hub-{self.name}-{client_address[1]}", self.process_request_thread, request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # a client that leaves early is no failure of the hub
            self.hub.failures.append(error)

    def close(self) -> None:
        """Stop listening, break what is open, wait for every thread. Raises if one does not end."""
        self.shutdown()
        self.server_close()
        for request in list(self._open):
            with suppress(OSError):  # its thread was faster
                request.shutdown(socket.SHUT_RDWR)
        for thread in self._running:
            thread.join(JOIN_S)
            if thread.is_alive():
                raise RuntimeError(f"{thread.name} did not end within {JOIN_S} s")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server: _Listener

    def do_GET(self) -> None:
        """Answer one request of any method."""
        hub, ask = self.server.hub, self._request()
        form = self._body()
        faults = hub.faults_for(ask)
        try:
            reply = hub.reply_to(ask, form)
            for fault in faults:
                reply = fault.reply(reply, ask, hub)
            self._send(ask, reply, faults)
        except HangUp as end:
            self.close_connection = True
            if end.reset:  # zero seconds of lingering: close() sends a reset and drops what is still queued
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()
                self.connection.close()

    do_HEAD = do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        """Of the request, which may come in chunks of sizes that stand before each."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while num_bytes := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(num_bytes))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _request(self) -> Request:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        ask = Request(self.command, self.path, self.headers.get("Range"), token if scheme == "Bearer" else None)
        is_api = self.server.name == "api"
        patterns = {**UPLOAD_API, "": API, "resolve": RESOLVE} if is_api else {**UPLOAD_CDN, "file": SIGNED}
        for kind, pattern in patterns.items():
            if match := pattern.fullmatch(urlsplit(self.path).path):
                parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                ask.kind = kind or parts.pop("kind", "info").replace("revision", "info")
                ask.type, ask.repo = parts.get("type", "models"), parts.get("repo", "")
                ask.revision, ask.path = parts.get("revision", "main"), parts.get("path", "")
                break
        return ask

    def _send(self, ask: Request, reply: Reply, faults: list[Fault]) -> None:
        ask.status = reply.status
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(reply.num_bytes)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        chunks = reply.chunks
        for fault in faults:
            chunks = fault.body(chunks, self.server.hub)
        for chunk in chunks:
            self.server.hub.count(ask, len(chunk))
            self.wfile.write(chunk)

    def log_message(self, *_: object) -> None:
        """Nothing: `requests` is the log."""
