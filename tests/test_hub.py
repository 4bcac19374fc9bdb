"""The streamer on a dataset of the hub: whatever the network does, each clip is cut once, and the user is told.

The hub is the one of tests/hub_server.py, the client is the real huggingface_hub, and the streamer runs as its users
run it, but for shorter pauses between attempts.
"""

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest
from hub_faults import (
    BodyFault,
    CloseAfter,
    ExpireSignature,
    Fault,
    IgnoreRange,
    LongerLength,
    Refuse,
    Reply,
    Request,
    ResetAfter,
    Stall,
    StallAfter,
    Trickle,
    bad_token,
    entry_not_found,
    not_in_the_list,
    server_error,
    text_reply,
    too_many_requests,
)
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from lake_tools import (
    ROOT,
    STREAMER,
    TIMEOUT_S,
    assert_exactly_once,
    assert_in_order,
    clips_on_disk,
    encoded,
    members_of,
    noise,
    write_source,
    write_tar,
)
from reference.chunker import Clips, clips_of

from hear_distill.files import MIB, UserError
from hear_distill.hub import explain_status
from hear_distill.lake import Lake
from hear_distill.remote import Dropped

DATASET = "laion/small"
TOKEN = "hf_thisIsTheSecretOfTheUser"
IMPATIENT = f"""
import runpy, signal, sys
from hear_distill import remote
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
remote.FIRST_WAIT_S, remote.MAX_WAIT_S = 0.01, 0.05
sys.argv[0] = {str(STREAMER)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FLAGS = ("--shard-clips", 8, "--val-clips", 0, "--val-fraction", 0, "--open-tars", 3, "--cap-gb", 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), num_tars=4, recordings_per_tar=6)


@pytest.fixture(scope="module")
def expected(source) -> Clips:
    return clips_of(source)


@pytest.fixture
def hub(source):
    with HubServer({DATASET: source}, page_size=3) as server:
        yield server


@contextmanager
def start(
    hub: HubServer, lake: Path, *flags: object, token: str | None = None, **environment: str
) -> Iterator["subprocess.Popen[str]"]:
    """Begin to stream the dataset into a lake; it is over with the block, whatever fails in there."""
    command = [sys.executable, "-c", IMPATIENT, "--source", DATASET, "--lake", str(lake), *map(str, (*FLAGS, *flags))]
    with subprocess.Popen(
        command,
        cwd=lake.parent,  # no .env there
        env={**hub.environment(lake.parent / "home", token), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def stream(hub: HubServer, lake: Path, *flags: object, token: str | None = None, **environment: str):
    """Stream to the end."""
    with start(hub, lake, *flags, token=token, **environment) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ask_to_leave(worker: "subprocess.Popen[str]", signal_number: int) -> tuple[str, str]:
    """Stdout and stderr of a worker that must be gone within five seconds."""
    worker.send_signal(signal_number)
    asked = time.monotonic()
    out, err = worker.communicate(timeout=TIMEOUT_S)
    assert time.monotonic() - asked < 5
    return out, err


def ranges(hub: HubServer, path: str) -> list[str | None]:
    """Byte ranges that were asked for, of the signed address of one tar."""
    return [request.range for request in hub.requests if request.kind == "file" and request.path == path]


# ---- exactly once ----


def test_a_tar_is_one_request_that_begins_at_its_first_byte(hub, source, expected, tmp_path):
    worker = stream(hub, tmp_path / "lake")
    assert (worker.returncode, worker.stderr) == (0, "")
    assert_exactly_once(clips_on_disk(tmp_path / "lake"), expected)
    for path in source.glob("*.tar"):
        assert ranges(hub, path.name) == ["bytes=0-"]
        assert hub.bytes_sent[path.name] == path.stat().st_size
    lake = assert_in_order(tmp_path / "lake")
    assert lake.setting("revision") == hub.sha(DATASET)


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        (ResetAfter(100_000), {"times": 3}),
        (CloseAfter(123_457), {"times": 4}),
        (CloseAfter(0), {"times": 8}),
        (LongerLength(5_000), {"times": 2}),
        (server_error(503), {"kind": "resolve", "times": 3}),
        (server_error(500), {"kind": "file", "times": 3}),
        (server_error(502), {"kind": "tree", "times": 2}),
        (server_error(503), {"kind": "info", "times": 2}),
        (server_error(520), {"kind": "resolve", "times": 2}),
        (Trickle(30_000, 0.05), {"times": 1}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_the_network_does_wrong_costs_no_clip_and_gives_none_twice(hub, expected, tmp_path, fault, options):
    rule = hub.inject(fault, **options)
    worker = stream(hub, tmp_path / "lake")
    assert worker.returncode == 0, worker.stderr
    assert rule.hits == options["times"]
    assert_exactly_once(clips_on_disk(tmp_path / "lake"), expected)
    assert_in_order(tmp_path / "lake")


def test_a_connection_that_breaks_off_is_resumed_at_its_byte_through_a_new_signature(hub, source, expected, tmp_path):
    hub.inject(CloseAfter(200_000), path="source-1.tar", times=2)
    hub.inject(ExpireSignature(), path="source-1.tar", times=2)
    assert stream(hub, tmp_path / "lake").returncode == 0
    assert_exactly_once(clips_on_disk(tmp_path / "lake"), expected)
    assert ranges(hub, "source-1.tar") == ["bytes=0-", "bytes=200000-", "bytes=400000-"]
    resolved = [request for request in hub.requests if request.kind == "resolve" and request.path == "source-1.tar"]
    assert len(resolved) == 3, "each connection asks the hub for a new address"


def test_a_server_that_answers_a_range_with_the_whole_file_is_not_believed(hub, expected, tmp_path):
    hub.inject(CloseAfter(200_000), path="source-2.tar")
    hub.inject(IgnoreRange(), path="source-2.tar", skip=1)
    worker = stream(hub, tmp_path / "lake")
    assert worker.returncode == 0
    assert "answered a request for byte 200000 with the whole file" in worker.stderr
    assert_exactly_once(clips_on_disk(tmp_path / "lake"), expected)


def test_a_wait_that_the_hub_asks_for_is_kept(hub, expected, tmp_path):
    hub.inject(too_many_requests(retry_after_s=2), kind="resolve")
    began = time.monotonic()
    worker = stream(hub, tmp_path / "lake")
    assert time.monotonic() - began > 2
    assert "the hub answered 429; trying again in 2 s" in worker.stderr
    assert_exactly_once(clips_on_disk(tmp_path / "lake"), expected)


class LogInPage(BodyFault):
    """What the network of a hotel says instead."""

    def reply(self, reply: Reply, ask: Request, hub: HubServer) -> Reply:
        return text_reply(200, "<html>please log in</html>" * 100)


class Circle(Fault):
    """A redirect to the same address."""

    def reply(self, reply: Reply, ask: Request, hub: HubServer) -> Reply:
        return Reply(302, {"Location": ask.url}, 0, [])


@pytest.mark.parametrize(("fault", "kind"), [(LogInPage(), "file"), (Circle(), "resolve")], ids=["page", "circle"])
def test_what_is_not_the_answer_of_a_hub_is_tried_again_and_no_tar_is_blamed(hub, expected, tmp_path, fault, kind):
    rule = hub.inject(fault, kind=kind, path="source-2.tar", times=2)
    worker = stream(hub, tmp_path / "lake")
    assert (worker.returncode, rule.hits) == (0, 2), worker.stderr
    assert_exactly_once(clips_on_disk(tmp_path / "lake"), expected)


# ---- stopping and going on ----


@pytest.fixture(scope="module")
def long_source(tmp_path_factory) -> Path:
    """Two tars of 24 MiB, six times what is fetched ahead."""
    folder = tmp_path_factory.mktemp("long")
    for tar in range(2):
        audio = [encoded(noise(16_000 * 64, tar, i)) for i in range(12)]
        write_tar(folder / f"{tar}.tar", [m for i, a in enumerate(audio) for m in members_of(f"{tar}-{i}", a)])
    return folder


def test_a_killed_worker_goes_on_at_a_recording_and_fetches_little_again(long_source, tmp_path):
    lake = tmp_path / "lake"
    num_bytes = sum(path.stat().st_size for path in long_source.glob("*.tar"))
    shard_bytes = 64 * 64_000  # as long in the source, which is WAV at 16 kHz
    with HubServer({DATASET: long_source}) as hub:
        kills = 3
        for killed in range(kills):
            with start(hub, lake, "--shard-clips", 64) as worker:
                while len(list((lake / "shards").glob("*.tar"))) < 2 * killed + 1 and worker.poll() is None:
                    time.sleep(0.01)
                worker.kill()
        assert stream(hub, lake, "--shard-clips", 64).returncode == 0
        assert_exactly_once(clips_on_disk(lake), clips_of(long_source))
        assert_in_order(lake)
        again = sum(hub.bytes_sent.values()) - num_bytes
        in_flight = 3 * MIB  # in the sockets' buffers
        assert again <= kills * (shard_bytes + 2 * (4 * MIB + in_flight + 2_100_000)), "a recording is 2.1 MB"
        assert len([r for path in ("0.tar", "1.tar") for r in ranges(hub, path) if r != "bytes=0-"]) >= 2


@pytest.mark.parametrize("fault", [StallAfter(2_500_000), Stall()], ids=["in mid-body", "before the header"])
def test_a_worker_that_waits_for_a_stalled_network_leaves_in_seconds_with_what_it_has(long_source, tmp_path, fault):
    with HubServer({DATASET: long_source}) as hub:
        rule = hub.inject(fault, kind="file", path="1.tar")
        with start(hub, tmp_path / "lake", "--shard-clips", 5_000) as worker:
            while not rule.hits and worker.poll() is None:
                time.sleep(0.01)
            time.sleep(1.0)
            out, err = ask_to_leave(worker, signal.SIGTERM)
    assert (worker.returncode, err) == (0, "")
    assert "asked to stop" in out
    lake = assert_in_order(tmp_path / "lake")
    assert lake.tar_states()["free"] == 2
    cut = Counter(clip.info["tar"] for clip in clips_on_disk(tmp_path / "lake"))
    assert cut.total() == lake.books().ready
    assert cut.total() > 0 or type(fault) is Stall


def test_a_worker_that_fetches_a_long_recording_without_a_pause_leaves_in_seconds(tmp_path):
    write_tar(tmp_path / "source" / "a.tar", members_of("a", encoded(noise(16_000 * 600, 1))))
    with HubServer({DATASET: tmp_path / "source"}) as hub:
        hub.inject(Trickle(10_000, 0.01))  # a minute for 19 MB
        with start(hub, tmp_path / "lake") as worker:
            while not hub.bytes_sent and worker.poll() is None:
                time.sleep(0.01)
            time.sleep(1.0)
            out, err = ask_to_leave(worker, signal.SIGTERM)
    assert (worker.returncode, err, "asked to stop" in out) == (0, "", True)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("fault", [too_many_requests(retry_after_s=86_400), Stall()], ids=["wait a day", "stalled"])
def test_a_worker_that_waits_for_the_listing_leaves_in_seconds(hub, tmp_path, fault, signal_number):
    hub.inject(fault, kind="tree")
    with start(hub, tmp_path / "lake") as worker:
        while not any(request.kind == "tree" for request in hub.requests) and worker.poll() is None:
            time.sleep(0.01)
        time.sleep(0.5)
        _, err = ask_to_leave(worker, signal_number)
    assert worker.returncode == (-signal.SIGTERM if signal_number == signal.SIGTERM else 1)
    assert "Traceback" not in err


def test_a_network_that_stays_down_ends_the_worker_for_now_with_what_it_has(hub, tmp_path):
    hub.inject(CloseAfter(300_000), times=4)
    hub.inject(server_error(503), kind="resolve", skip=4, times=None)
    worker = stream(hub, tmp_path / "lake")
    assert worker.returncode == 75
    last = worker.stderr.splitlines()[-1]
    assert last.startswith("error: source-") and "12 attempts in a row failed" in last and "answered 503" in last
    lake = assert_in_order(tmp_path / "lake")
    assert lake.books().ready > 0
    assert lake.tar_states()["free"] == 4


def test_a_tar_that_cannot_be_reached_does_not_stop_the_others(hub, expected, tmp_path):
    """Each worker gives up on it once; the next ones leave it for the end."""
    rule = hub.inject(server_error(503), kind="resolve", path="source-1.tar", times=None)
    ends = [stream(hub, tmp_path / "lake", "--open-tars", 1).returncode for _ in range(2)]
    assert ends == [75, 75] and rule.hits > 12
    assert assert_in_order(tmp_path / "lake").tar_states() == {"done": 3, "open": 1, "free": 1}
    found = clips_on_disk(tmp_path / "lake")
    assert_exactly_once(found, {k: v for k, v in expected.items() if k[0] != "source-1.tar"})


def test_a_wait_of_a_day_is_not_sat_through(hub, tmp_path):
    hub.inject(too_many_requests(retry_after_s=86_400), kind="resolve", times=None)
    worker = stream(hub, tmp_path / "lake")
    assert worker.returncode == 75
    assert "asks us to wait for 86400 s" in worker.stderr
    assert_in_order(tmp_path / "lake")


def test_a_supervisor_that_is_asked_to_stop_while_the_hub_is_down_leaves_nobody_behind(hub, tmp_path):
    hub.inject(server_error(503), kind="info", times=None)
    command = [sys.executable, str(ROOT / "datalake" / "run_lake.py"), "--source", DATASET, "--lake", "lake"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=hub.environment(tmp_path / "home"), stdout=subprocess.PIPE, text=True
    ) as supervisor:
        while not hub.requests and supervisor.poll() is None:
            time.sleep(0.05)
        (asking,) = psutil.Process(supervisor.pid).children()
        supervisor.terminate()
        out, _ = supervisor.communicate(timeout=10)
    assert (supervisor.returncode, out) == (0, "stopped before anything was started\n")
    assert not asking.is_running()


# ---- what is in the dataset ----


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(entry_not_found(), "resolve"), (Refuse(404, "NoSuchKey"), "file"), (Refuse(416, "InvalidRange"), "file")],
    ids=["at the hub", "behind its address", "shorter"],
)
def test_a_tar_that_is_not_there_any_more_is_recorded_and_the_others_go_on(hub, expected, tmp_path, fault, kind):
    hub.inject(fault, kind=kind, path="source-3.tar", times=None)
    worker = stream(hub, tmp_path / "lake")
    assert worker.returncode == 0
    assert f"source-3.tar is broken: {fault.status}" in worker.stderr
    assert_exactly_once(clips_on_disk(tmp_path / "lake"), {k: v for k, v in expected.items() if k[0] != "source-3.tar"})
    assert assert_in_order(tmp_path / "lake").tar_states() == {"done": 3, "broken": 1}


def test_a_lake_keeps_to_its_revision_and_lists_it_once(tmp_path):
    folder = write_source(tmp_path / "growing", 2, 3)
    with HubServer({DATASET: folder}) as hub:
        assert stream(hub, tmp_path / "lake", "--check").returncode == 0
        first = hub.sha(DATASET)
        listed = len(hub.requests)
        write_source(tmp_path / "more", 4, 3)
        for name in ("source-2.tar", "source-3.tar"):
            (tmp_path / "more" / name).rename(folder / name)
        assert hub.sha(DATASET) != first
        worker = stream(hub, tmp_path / "lake")
        assert (worker.returncode, worker.stderr) == (0, "")
        assert {request.kind for request in hub.requests[listed:]} == {"resolve", "file"}
        assert {clip.info["tar"] for clip in clips_on_disk(tmp_path / "lake")} == {"source-0.tar", "source-1.tar"}

        pinned = stream(hub, tmp_path / "pinned", "--source", f"{DATASET}@{first}")
        assert pinned.returncode == 0
        assert {clip.info["tar"] for clip in clips_on_disk(tmp_path / "pinned")} == {"source-0.tar", "source-1.tar"}
        newest = stream(hub, tmp_path / "newest", "--source", f"hf://datasets/{DATASET}")
        assert newest.returncode == 0
        assert len({clip.info["tar"] for clip in clips_on_disk(tmp_path / "newest")}) == 4
        other = stream(hub, tmp_path / "pinned", "--source", f"{DATASET}@{hub.sha(DATASET)}")
        assert other.returncode == 2 and "is another one" in other.stderr


def test_a_dataset_without_tars_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "README.md").write_text("no audio")
    with HubServer({DATASET: tmp_path / "text"}) as hub:
        worker = stream(hub, tmp_path / "lake")
    assert (worker.returncode, worker.stdout) == (2, "")
    assert worker.stderr.startswith("error: no *.tar among the 1 files of the dataset laion/small")


# ---- access ----


@pytest.mark.parametrize("kind", ["tree", "resolve"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (bad_token(), "the hub answered 401: .* HF_TOKEN"),
        (not_in_the_list(), "is gated .403.; accept its terms at http.*/datasets/laion/small.* HF_TOKEN"),
    ],
    ids=["bad token", "gated"],
)
def test_what_the_user_must_accept_or_set_is_said_in_one_line(hub, tmp_path, fault: Fault, said, kind):
    rule = hub.inject(fault, kind=kind, times=None)
    worker = stream(hub, tmp_path / "lake", token=TOKEN)
    assert rule.hits
    assert worker.returncode == 2
    assert len(worker.stderr.splitlines()) == 1
    assert re.search(said, worker.stderr), worker.stderr
    if kind == "resolve":
        assert assert_in_order(tmp_path / "lake").tar_states()["free"] == 4


def test_a_gated_dataset_opens_to_its_token_which_is_written_nowhere(source, expected, tmp_path):
    with HubServer({DATASET: source}, gated={DATASET: {TOKEN}}) as hub:
        hub.inject(ResetAfter(50_000), times=2)
        hub.inject(entry_not_found(), kind="resolve", path="source-0.tar")
        refused = stream(hub, tmp_path / "lake")
        assert (refused.returncode, "gated" in refused.stderr) == (2, True)
        worker = stream(hub, tmp_path / "lake", token=TOKEN)
        assert worker.returncode == 0
        for request in hub.requests:
            if request.kind == "file":
                assert request.token is None, "the signed address is of another host"
    said = worker.stdout + worker.stderr + refused.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert TOKEN not in said and "signature=" not in said
    assert not [path for path in files if TOKEN.encode() in path.read_bytes() or b"signature=" in path.read_bytes()]


@pytest.mark.parametrize(
    ("name", "environment", "said"),
    [
        ("laion/other", {}, "there is no folder and no dataset laion/other"),
        (f"{DATASET}@v9", {}, "laion/small has no such revision on the hub (404)"),
        (DATASET, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("laion/..small", {}, "'laion/..small' is no name of a dataset"),
    ],
)
def test_a_dataset_that_is_not_to_be_had_is_refused_in_one_line_and_leaves_no_lake(
    hub, tmp_path, name, environment, said
):
    worker = stream(hub, tmp_path / "lake", "--source", name, token=TOKEN, **environment)
    assert (worker.returncode, worker.stdout) == (2, "")
    assert said in worker.stderr
    assert len(worker.stderr.splitlines()) == 1
    assert not (tmp_path / "lake").exists()


def test_a_refusal_after_a_redirect_within_the_hub_is_its_own(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    for host, kind in [("hub.example", UserError), ("cdn.example", Dropped)]:  # a dataset that was renamed; a signature
        request = httpx2.Request("GET", f"https://{host}/datasets/laion/new/resolve/main/a.tar")
        answer = httpx2.Response(403, request=request, history=[httpx2.Response(307)])
        assert type(explain_status("laion/old", HfHubHTTPError("refused", response=answer))) is kind


@pytest.mark.parametrize("token", ["hf_ä", "hf_a\x0bb"])
def test_a_token_that_is_none_is_refused_and_not_repeated(hub, tmp_path, token):
    worker = stream(hub, tmp_path / "lake", token=token)
    assert worker.returncode == 2
    assert worker.stderr.startswith("error: HF_TOKEN holds characters") and "hf_" not in worker.stderr


def test_no_request_to_a_stalled_hub_is_waited_for_without_end(hub, tmp_path):
    for kind in ("info", "tree", "file"):
        hub.inject(Stall(), kind=kind)
    code = f"""
from huggingface_hub import close_session
from hear_distill.hub import HubSource
source = HubSource({DATASET!r})
close_session()  # as huggingface_hub itself does after some failures
tar, *_ = source.tars
close_session()
with source.open(tar, 0, lambda: None) as stream:
    assert stream.read(100)
"""
    environment = {**hub.environment(tmp_path), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "ReadTimeout" in done.stderr


def test_what_the_ledger_knows_of_the_dataset_holds_no_address(hub, tmp_path):
    assert stream(hub, tmp_path / "lake", "--check").returncode == 0
    lake = Lake.open(tmp_path / "lake")
    assert lake.setting("source") == DATASET
    assert lake.tar_states() == {"waiting": 4, "free": 4}
