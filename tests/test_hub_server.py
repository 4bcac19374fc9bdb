"""The hub that tests use, against huggingface_hub itself; and each fault, seen by a plain client."""

import hashlib
import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_faults
import pytest
from hub_faults import CloseAfter, ExpireSignature, IgnoreRange, LongerLength, ResetAfter, Stall, StallAfter, Trickle
from hub_server import HubServer

REPO = "org/sounds"
TAR = bytes(range(251)) * 800  # 200,800 bytes, several chunks; no two places a chunk apart look alike
# Every script runs behind this: a client that asked for any other machine would fail.
LOOPBACK_ONLY = """
import hashlib, json, sys
def stay_here(event, args):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(args[1], tuple)):
        host = args[0] if event == "socket.getaddrinfo" else args[1][0]
        assert host == "127.0.0.1", f"reached out to {host}"
sys.addaudithook(stay_here)
from huggingface_hub import HfApi, HfFileSystem, RepoFile, hf_hub_download, snapshot_download
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars, a text and two members of a subfolder."""
    folder = tmp_path / "sounds"
    (folder / "extra").mkdir(parents=True)
    files = {"a.tar": TAR, "b.tar": b"second", "extra/c d.tar": b"third", "extra/empty.tar": b""}
    for name, content in {**files, "README.md": b"# Sounds\n"}.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    with HubServer({REPO: folder}, models={"org/teacher": folder}, page_size=4) as hub:
        yield hub


def client(hub: HubServer, tmp_path: Path, script: str, token: str | None = None) -> object:
    """What `script` prints as JSON in its last line, run with huggingface_hub in a process of its own."""
    command, env = [sys.executable, "-c", LOOPBACK_ONLY + script], hub.environment(tmp_path / "hf_home", token)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Refusals are answers here, for a test to look at."""

    def http_response(self, request: urllib.request.Request, response: http.client.HTTPResponse) -> object:
        return super().http_response(request, response) if response.status == 302 else response


def ask(hub: HubServer, url: str, **headers: str) -> http.client.HTTPResponse:
    """GET by a plain client, through redirects. It waits for 30 s at most."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), AnyStatus)
    whole_url = url if url.startswith("http") else hub.url + url
    return opener.open(urllib.request.Request(whole_url, headers=headers), timeout=30)


def fetch(hub: HubServer, url: str, **headers: str) -> tuple[int, bytes]:
    """Status and body."""
    with ask(hub, url, **headers) as answer:
        return answer.status, answer.read()


def tar_url(name: str = "a.tar") -> str:
    return f"/datasets/{REPO}/resolve/main/{name}"


def asked(hub: HubServer, kind: str) -> list:
    return [request for request in hub.requests if request.kind == kind]


def wait_until(is_so: Callable[[], object]) -> None:
    """Until it is, but not for ever."""
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


# The client itself


def test_huggingface_hub_reads_the_facts_and_lists_the_tree_over_two_pages(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    script = f"""
api = HfApi()
info = api.dataset_info("{REPO}")
tree = list(api.list_repo_tree("{REPO}", repo_type="dataset", recursive=True))
top = [entry.path for entry in api.list_repo_tree("{REPO}", repo_type="dataset")]
few = api.get_paths_info("{REPO}", ["b.tar", "extra", "no.tar"], repo_type="dataset")
print(json.dumps([
    [info.id, info.sha, info.private, info.gated, [sibling.rfilename for sibling in info.siblings]],
    {{entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}},
    [entry.path for entry in tree if not isinstance(entry, RepoFile)],
    top, [entry.path for entry in few], api.model_info("org/teacher").sha,
]))
"""
    facts, files, folders, top, few, main = client(hub, tmp_path, script)
    sizes = {"README.md": 9, "a.tar": len(TAR), "b.tar": 6, "extra/c d.tar": 5, "extra/empty.tar": 0}
    assert facts == [REPO, hub.sha(REPO), False, False, sorted(sizes)]
    assert (files, folders) == (sizes, ["extra"])
    assert top == ["README.md", "a.tar", "b.tar", "extra"]
    assert few == ["b.tar", "extra"]
    assert main == hub.sha("org/teacher", "models")
    assert {request.token for request in hub.requests} == {None}
    assert ["cursor" in request.url for request in asked(hub, "tree")] == [False, True, False]


def test_huggingface_hub_downloads_through_the_signed_address_and_leaves_its_token_behind(hub, tmp_path):
    script = f"""
tar = hf_hub_download("{REPO}", "a.tar", repo_type="dataset")
print(json.dumps([tar, snapshot_download("org/teacher", allow_patterns=["extra/*"])]))
"""
    paths = client(hub, tmp_path, script, token="hf_secret")
    assert Path(paths[0]).read_bytes() == TAR
    assert Path(paths[1], "extra", "c d.tar").read_bytes() == b"third"
    assert all(Path(path).is_relative_to(tmp_path / "hf_home") for path in paths)
    assert hub.bytes_sent == {"a.tar": len(TAR), "extra/c d.tar": 5}
    assert {request.token for request in asked(hub, "resolve")} == {"hf_secret"}
    assert {request.token for request in asked(hub, "file")} == {None}


def test_the_file_system_of_huggingface_hub_globs_reads_streams_and_seeks(hub, tmp_path):
    script = f"""
fs = HfFileSystem()
with fs.open("datasets/{REPO}/a.tar", block_size=0) as stream:
    whole = hashlib.sha256(stream.read()).hexdigest()
with fs.open("datasets/{REPO}/a.tar", block_size=1000, cache_type="readahead") as stream:
    stream.seek(200_000)
    ends = stream.read(700).hex()
print(json.dumps([fs.glob("datasets/{REPO}/**/*.tar"), whole, ends]))
"""
    found, whole, ends = client(hub, tmp_path, script)
    assert found == [f"datasets/{REPO}/{name}" for name in ("a.tar", "b.tar", "extra/c d.tar", "extra/empty.tar")]
    assert whole == hashlib.sha256(TAR).hexdigest()
    assert bytes.fromhex(ends) == TAR[200_000:200_700]
    assert [request.range for request in asked(hub, "file")] == [None, "bytes=200000-200799"]


def test_huggingface_hub_raises_its_own_error_for_each_refusal(folder, tmp_path):
    script = """
from huggingface_hub.errors import HfHubHTTPError
def name(call, *args, **more):
    try:
        call(*args, repo_type="dataset", **more)
    except HfHubHTTPError as e:
        return [type(e).__name__, e.response.status_code]
tree = lambda *args, **more: list(HfApi().list_repo_tree(*args, **more))
print(json.dumps([
    name(HfApi().repo_info, "org/none"),
    name(HfApi().repo_info, "org/sounds", revision="0" * 40),
    name(tree, "org/sounds", "no folder"),
    name(hf_hub_download, "org/sounds", "no.tar"),
    name(hf_hub_download, "org/gated", "b.tar"),
    name(tree, "org/gated"),
    name(HfApi().repo_info, "org/gated"),
]))
"""
    with HubServer({REPO: folder, "org/gated": folder}, gated={"org/gated": {"hf_member"}}) as hub:
        stranger = client(hub, tmp_path / "1", script)
        visitor = client(hub, tmp_path / "2", script, token="hf_other")
        member = client(hub, tmp_path / "3", script, token="hf_member")
    missing = [["RevisionNotFoundError", 404], ["RemoteEntryNotFoundError", 404], ["RemoteEntryNotFoundError", 404]]
    repo = "RepositoryNotFoundError"
    assert stranger == [[repo, 401], *missing, ["GatedRepoError", 401], ["GatedRepoError", 401], None]
    assert visitor == [[repo, 404], *missing, ["GatedRepoError", 403], ["GatedRepoError", 403], None]
    assert member == [[repo, 404], *missing, None, None, None]


def test_huggingface_hub_goes_on_through_a_new_redirect_where_a_closed_connection_left_it(hub, tmp_path):
    faults = [hub.inject(CloseAfter(70_000)), hub.inject(ExpireSignature())]
    faults.append(hub.inject(hub_faults.server_error(503), kind="tree"))
    script = f"""
names = [entry.path for entry in HfApi().list_repo_tree("{REPO}", repo_type="dataset")]
with HfFileSystem().open("datasets/{REPO}/a.tar", block_size=0) as stream:
    whole = b"".join(iter(lambda: stream.read(1000), b""))
print(json.dumps([hashlib.sha256(whole).hexdigest(), names]))
"""
    whole, names = client(hub, tmp_path, script)
    assert whole == hashlib.sha256(TAR).hexdigest()
    assert len(names) == 4
    assert [rule.hits for rule in faults] == [1, 1, 1]
    assert [request.status for request in asked(hub, "tree")][:2] == [503, 200]
    assert [(request.range, request.status) for request in asked(hub, "file")] == [(None, 200), ("bytes=70000-", 206)]
    assert len({request.url for request in asked(hub, "file")}) == 2
    assert hub.bytes_sent["a.tar"] == len(TAR)


# What the tests of others build on


def test_main_follows_the_folder_and_an_older_revision_keeps_its_own_listing(hub, folder):
    before = hub.sha(REPO)
    (folder / "new.tar").write_bytes(b"new")
    after = hub.sha(REPO)

    def names(revision: str) -> tuple[str, list[str]]:
        facts = json.loads(fetch(hub, f"/api/datasets/{REPO}/revision/{revision}")[1])
        return facts["sha"], [sibling["rfilename"] for sibling in facts["siblings"]]

    old = ["README.md", "a.tar", "b.tar", "extra/c d.tar", "extra/empty.tar"]
    assert names(before) == (before, old)
    assert names("main") == names(after) == (after, sorted([*old, "new.tar"]))
    assert fetch(hub, f"/datasets/{REPO}/resolve/{after}/new.tar") == (200, b"new")
    assert fetch(hub, f"/datasets/{REPO}/resolve/{before}/new.tar")[0] == 404
    assert fetch(hub, f"/datasets/{REPO}/resolve/{before}/b.tar") == (200, b"second")


@pytest.mark.parametrize(
    ("wanted", "status", "start", "stop"),
    [
        ("bytes=100-299", 206, 100, 300),
        ("bytes=200000-", 206, 200_000, 200_800),
        ("bytes=-800", 206, 200_000, 200_800),
        ("bytes=200799-999999", 206, 200_799, 200_800),
        ("bytes=5-2", 200, 0, 200_800),
        ("lines=1-2", 200, 0, 200_800),
    ],
)
def test_a_range_brings_these_bytes_and_no_others(hub, wanted, status, start, stop):
    with ask(hub, tar_url(), Range=wanted) as answer:
        assert (answer.status, answer.read()) == (status, TAR[start:stop])
    assert answer.headers["Content-Range"] == (f"bytes {start}-{stop - 1}/{len(TAR)}" if status == 206 else None)
    assert hub.bytes_sent["a.tar"] == stop - start


@pytest.mark.parametrize(("name", "size"), [("a.tar", 200_800), ("extra/empty.tar", 0)])
def test_a_range_beyond_the_end_is_refused_with_the_length(hub, name, size):
    with ask(hub, tar_url(name), Range=f"bytes={size}-") as answer:
        assert answer.status == 416
    assert answer.headers["Content-Range"] == f"bytes */{size}"
    assert hub.bytes_sent[name] == 0


def test_a_signed_address_is_good_for_its_uses_its_time_and_its_own_file(folder):
    with HubServer({REPO: folder}, signature_uses=2) as hub:
        with ask(hub, tar_url("b.tar")) as answer:
            url = answer.url
        for changed in (url.replace("b.tar", "a.tar"), url[:-1], url.partition("?")[0]):
            assert fetch(hub, changed)[0] == 403
        assert fetch(hub, url) == (200, b"second")
        assert fetch(hub, url)[0] == 403
        with ask(hub, tar_url("b.tar")) as answer:
            hub.expire_signatures()
            assert fetch(hub, answer.url)[0] == 403
    with HubServer({REPO: folder}, signature_s=0) as hub:
        assert fetch(hub, tar_url())[0] == 403


def test_a_file_that_changes_under_a_revision_fails_the_test_that_changed_it(folder):
    with pytest.raises(RuntimeError, match=r"a\.tar has changed"), HubServer({REPO: folder}) as hub:
        before = hub.sha(REPO)
        (folder / "a.tar").write_bytes(b"other")
        with pytest.raises(http.client.RemoteDisconnected):
            fetch(hub, f"/datasets/{REPO}/resolve/{before}/a.tar")


def test_nothing_of_a_hub_is_left_when_its_block_ends_even_in_a_stall(folder):
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("hub-")]

    with HubServer({REPO: folder}) as hub:
        hub.inject(StallAfter(10), path="a.tar")
        hub.inject(Trickle(1, every_s=3600), path="b.tar")
        streams = [ask(hub, tar_url(name)) for name in ("a.tar", "b.tar")]
        assert [stream.read(1) for stream in streams] == [TAR[:1], b"s"]
        idle = http.client.HTTPConnection("127.0.0.1", int(hub.url.rpartition(":")[2]), timeout=30)
        idle.request("GET", "/")
        assert idle.getresponse().read() == b"Not Found"
        assert len(threads()) >= 5  # one for each port, for each stream and for the idle connection
    assert not threads()
    idle.close()
    for stream in streams:
        with pytest.raises(http.client.IncompleteRead):
            stream.read()
    with pytest.raises(urllib.error.URLError, match="refused"):
        fetch(hub, tar_url())


# Each fault, as a plain client sees it


@pytest.mark.parametrize(
    ("fault", "status", "header", "value"),
    [
        (hub_faults.server_error(500), 500, "X-Error-Code", None),
        (hub_faults.server_error(503), 503, "X-Error-Code", None),
        (hub_faults.too_many_requests(7), 429, "Retry-After", "7"),
        (hub_faults.bad_token(), 401, "X-Error-Message", "Invalid credentials in Authorization header"),
        (hub_faults.not_in_the_list(), 403, "X-Error-Code", "GatedRepo"),
        (hub_faults.entry_not_found(), 404, "X-Error-Code", "EntryNotFound"),
    ],
)
def test_a_refusal_befalls_what_it_names_as_often_as_told_and_nothing_else(hub, fault, status, header, value):
    rule = hub.inject(fault, kind="resolve", path="a.*", method="GET", skip=1, times=2)
    seen = []
    for name in ("a.tar", "b.tar", "a.tar", "b.tar", "a.tar", "a.tar"):
        with ask(hub, tar_url(name)) as answer:
            seen.append(answer.status)
        if answer.status != 200:
            assert answer.headers[header] == value
    assert seen == [200, 200, status, 200, status, 200]
    assert rule.hits == 2
    assert [request.status for request in asked(hub, "resolve")] == [302, 302, status, 302, status, 302]


@pytest.mark.parametrize(
    ("fault", "error", "sent", "promised"),
    [
        (ResetAfter(70_000), ConnectionResetError, 70_000, len(TAR)),
        (CloseAfter(70_000), http.client.IncompleteRead, 70_000, len(TAR)),
        (LongerLength(1000), http.client.IncompleteRead, len(TAR), len(TAR) + 1000),
    ],
)
def test_a_broken_body_ends_as_its_fault_says_and_the_next_is_whole(hub, fault, error, sent, promised):
    hub.inject(fault)
    with ask(hub, tar_url()) as answer, pytest.raises(error):
        answer.read()
    assert hub.bytes_sent["a.tar"] == sent
    assert answer.headers["Content-Length"] == str(promised)
    assert fetch(hub, tar_url()) == (200, TAR)


def test_a_server_that_ignores_ranges_sends_the_whole_file_as_200(hub):
    hub.inject(IgnoreRange(), times=2)
    assert fetch(hub, tar_url(), Range="bytes=100-") == (200, TAR)
    assert fetch(hub, tar_url(), Range="bytes=999999-") == (200, TAR)
    assert fetch(hub, tar_url(), Range="bytes=100-") == (206, TAR[100:])


def test_a_trickle_sends_one_piece_and_then_pauses(hub):
    hub.inject(Trickle(4, every_s=3600))
    answer, got = ask(hub, tar_url()), []
    reader = threading.Thread(target=lambda: [got.append(answer.read(4)) for _ in range(2)], daemon=True)
    reader.start()
    wait_until(lambda: got)
    reader.join(0.3)
    assert reader.is_alive()
    assert got == [TAR[:4]]
    assert hub.bytes_sent["a.tar"] == 4


@pytest.mark.parametrize(("fault", "num_bytes"), [(Stall(), 0), (StallAfter(70_000), 70_000)])
def test_a_stall_lasts_until_it_is_released(hub, fault, num_bytes):
    hub.inject(fault, kind="file")
    got = []
    reader = threading.Thread(target=lambda: got.append(fetch(hub, tar_url())))
    reader.start()
    wait_until(lambda: asked(hub, "file") and hub.bytes_sent["a.tar"] == num_bytes)
    reader.join(0.3)
    assert reader.is_alive()
    assert hub.bytes_sent["a.tar"] == num_bytes
    hub.release()
    reader.join(30)
    assert got == [(200, TAR)]


def test_the_signature_that_expires_midway_serves_to_the_end_and_not_again(hub):
    hub.inject(ExpireSignature())
    with ask(hub, tar_url()) as answer:
        assert answer.read() == TAR
    assert fetch(hub, answer.url, Range="bytes=70000-")[0] == 403
    assert fetch(hub, tar_url(), Range="bytes=70000-") == (206, TAR[70_000:])


def test_faults_add_up_on_one_answer(hub):
    rules = [hub.inject(fault) for fault in (IgnoreRange(), Trickle(1000, every_s=0), CloseAfter(70_500))]
    with ask(hub, tar_url(), Range="bytes=100-") as answer, pytest.raises(http.client.IncompleteRead) as error:
        answer.read()
    assert error.value.partial == TAR[:70_500]
    assert [rule.hits for rule in rules] == [1, 1, 1]


def test_a_fault_of_the_body_is_not_used_up_by_a_head(hub):
    rule = hub.inject(CloseAfter(10), kind="resolve")
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.url.rpartition(":")[2]), timeout=30)
    connection.request("HEAD", tar_url())
    answer = connection.getresponse()
    connection.close()
    assert (answer.status, rule.hits) == (302, 0)
    assert answer.headers["X-Repo-Commit"] == hub.sha(REPO)
    assert answer.headers["X-Linked-Size"] == str(len(TAR))
