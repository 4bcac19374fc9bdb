"""A dataset of WebDataset tars on the Hugging Face hub, at one revision.

in:   org/name[@revision]; HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT of the environment
out:  the list of its tars, and a stream of each from any byte

The token goes from the environment into a request header and nowhere else. Addresses are never printed either: a
redirect of the hub is signed, and whoever has it can read the file.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    get_token,
    hf_raise_for_status,
    parse_ratelimit_headers,
)

from hear_distill.files import UserError
from hear_distill.remote import Dropped, RemoteStream, patiently
from hear_distill.tars import Stream, Tar, TarBroken

T = TypeVar("T")
TRY_AGAIN = (408, 425, 429, *range(500, 600))  # beyond 511 are those of the proxies before the hub


class HubSource:
    """One dataset of the hub. It is listed once, when a lake is made; names are never generated, as they have gaps."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        """`name` is org/name[@revision]; `revision` the commit that a lake keeps to, instead of today's.

        Raises UserError if there is no such dataset or the token does not open it, Unreachable after many failures.
        """
        self.name, _, asked = name.partition("@")
        token = get_token() or ""
        if not (token.isascii() and token.isprintable()):  # what cannot be a header would end in a traceback
            raise UserError("HF_TOKEN holds characters that no token has; copy it again, without quotes or blanks")
        self.revision = revision or self._ask(lambda: HfApi().dataset_info(self.name, revision=asked or None).sha)

    @cached_property
    def tars(self) -> list[Tar]:
        """All tars of the revision, by name."""
        api = HfApi()
        files = self._ask(
            lambda: list(api.list_repo_tree(self.name, repo_type="dataset", revision=self.revision, recursive=True))
        )
        tars = [Tar(file.path, file.size) for file in files if file.path.endswith(".tar")]
        if not tars:
            raise UserError(f"no *.tar among the {len(files)} files of the dataset {self.name}; give another --source")
        return sorted(tars, key=lambda tar: tar.name)

    def open(self, tar: Tar, offset: int, look: Callable[[], None]) -> AbstractContextManager[Stream]:
        """As in Source."""
        return closing(RemoteStream(tar.name, lambda at: self._connect(tar, at), offset, tar.num_bytes, look))

    def _ask(self, question: Callable[[], T]) -> T:
        """The answer of the hub's API, asked again while it is not to be had."""

        def attempt() -> T:
            impatient_session()
            with explained(self.name):
                return question()

        return patiently(self.name, attempt, time.sleep)

    def _connect(self, tar: Tar, offset: int) -> Generator[bytes, None, None]:
        """One GET. It starts at the hub's own address each time: the one that it redirects to expires."""
        url = hf_hub_url(self.name, tar.name, repo_type="dataset", revision=self.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={offset}-", "Accept-Encoding": "identity"}
        with (
            explained(self.name),
            impatient_session().stream("GET", url, headers=headers, follow_redirects=True) as response,
        ):
            hf_raise_for_status(response)
            check_range(response, tar, offset)
            yield from response.iter_raw()


def impatient_session() -> httpx2.Client:
    """huggingface_hub's session, which now waits for silence no longer than HF_HUB_DOWNLOAD_TIMEOUT.

    Its listings ask for no time-out, whatever that of the session is: a stalled one would be for ever. Asked for each
    time, because after some failures the session is a new one.
    """
    session = get_session()
    if limit_wait not in session.event_hooks["request"]:
        session.event_hooks["request"].append(limit_wait)
    return session


def limit_wait(request: httpx2.Request) -> None:
    """Give a request its time-out, just before it is sent."""
    request.extensions["timeout"] = httpx2.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT).as_dict()


def check_range(response: httpx2.Response, tar: Tar, offset: int) -> None:
    """Raise unless the body is the listed tar from `offset` on: bytes from elsewhere would be cut into clips."""
    if response.status_code == 200:
        if offset:
            raise Dropped(f"the server answered a request for byte {offset} with the whole file")
        length = response.headers.get("Content-Length", str(tar.num_bytes))
        if length != str(tar.num_bytes):  # the page of a proxy, most likely: the tar is not to blame
            raise Dropped(f"the server answered with {length} bytes of something else")
        return
    found = response.headers.get("Content-Range", "none")
    if not found.startswith(f"bytes {offset}-"):
        raise Dropped(f"the server answered a request for byte {offset} with the range {found!r}")
    if found.rpartition("/")[2] not in ("*", str(tar.num_bytes)):
        raise TarBroken(f"has the range {found!r}, but was listed with {tar.num_bytes} bytes")


@contextmanager
def explained(dataset: str) -> Iterator[None]:
    """Turn what the hub and the network raise into Dropped (try again), TarBroken (skip it) or UserError (stop)."""
    try:
        yield
    except OfflineModeIsEnabled as e:
        raise UserError(
            f"HF_HUB_OFFLINE is set, so {dataset} cannot be read; unset it, or give a folder with --source"
        ) from e
    except HFValidationError as e:
        raise UserError(f"{dataset!r} is no name of a dataset on the hub, expected org/name[@revision]: {e}") from e
    except HfHubHTTPError as e:
        raise explain_status(dataset, e) from e
    except (httpx2.RequestError, httpx2.StreamError) as e:
        raise Dropped(f"{type(e).__name__}: {e}") from e


def explain_status(dataset: str, error: HfHubHTTPError) -> Exception:
    """What an answer with an error status means for us."""
    response = error.response
    status = response.status_code
    if status in TRY_AGAIN:
        return Dropped(f"the hub answered {status}", retry_after_s(response))
    is_signed = response.url.netloc != httpx2.URL(constants.ENDPOINT).netloc
    if is_signed and status not in (404, 416):  # the address has expired, the next may be good
        return Dropped(f"a signed address of the hub answered {status}")
    page = f"{constants.ENDPOINT}/datasets/{dataset}"
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{dataset} is gated ({status}); accept its terms at {page}, and put the token of that account "
            f"into HF_TOKEN, in the environment or in .env"
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{dataset} has no such revision on the hub ({status}); look at {page}/commits/main")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return UserError(
            f"the hub answered {status}: there is no folder and no dataset {dataset}, or it is not open to you; "
            f"look at the name, and at HF_TOKEN in the environment or in .env (a token that has expired is refused)"
        )
    if status == 404:
        return TarBroken("404: no longer in the dataset")
    if status == 416:
        return TarBroken("416: shorter than it was listed")
    return UserError(f"the hub answered {status} for {dataset}, which is not expected; look at {page}")


def retry_after_s(response: httpx2.Response) -> float:
    """Seconds that the server asks us to wait: Retry-After, a number or a date, or the hub's own rate-limit header."""
    value = response.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return 0.0
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit and response.status_code == 429 else 0.0
