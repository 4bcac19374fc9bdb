"""The evaluation datasets through a hub on this machine: look-alikes in repositories, loaded as users do."""

import json
import subprocess
import sys
from pathlib import Path

import lookalikes
import pytest
from hub_server import HubServer
from lake_tools import ROOT

from hear_distill import coswara, flusense, fsd50k

TIMEOUT_S = 120
# What a process with this hub finds: one line of JSON for each dataset that is asked for.
ASK = """
import json, sys
from hear_distill.eval_datasets import load_dataset
from hear_distill.tasks import DatasetError
for spec in sys.argv[1:]:
    try:
        dataset = load_dataset(spec)
        found = dict(dataset.recordings())
        answer = {
            "revision": dataset.revision,
            "groups": dataset.groups.tolist(),
            "splits": {name: split.parts.tolist() for name, split in dataset.splits.items()},
            "tasks": {name: task.labels.tolist() for name, task in dataset.tasks.items() if task.kind == "binary"},
            "notes": dataset.notes,
            "problems": dataset.problems,
            "sums": [int(abs(found[row].astype(int)).sum()) for row in range(len(dataset.groups))],
        }
    except DatasetError as e:
        answer = {"error": str(e)}
    print(json.dumps(answer))
"""


def ask(hub: HubServer, home: Path, *specs: str, token: str | None = None, **environment: str) -> list[dict]:
    """What a fresh process answers about each dataset. Its cache is in `home`."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *specs],
        env={**hub.environment(home, token), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The repositories. FluSense has a script, and its Parquet files in the branch that the hub makes."""
    root = tmp_path_factory.mktemp("repositories")
    audio, labels = lookalikes.write_fsd50k_hub(root / "fsd50k")
    converted = root / "flusense" / "refs" / "convert" / "parquet" / "default" / "train" / "0000.parquet"
    lookalikes.write_flusense(converted, lookalikes.flusense_rows())
    (root / "flusense" / "flusense.py").write_text("raise RuntimeError('nobody runs scripts of the hub')\n")
    lookalikes.write_coswara(root / "coswara" / "audio" / "train-00000-of-00001.parquet")
    return {
        fsd50k.AUDIO: audio,
        fsd50k.LABELS: labels,
        flusense.HUB: root / "flusense",
        coswara.HUB: root / "coswara",
    }


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory) -> dict:
    """Of one process for the three datasets; then of one without network and the same cache."""
    home = tmp_path_factory.mktemp("user") / "home"
    with HubServer(folders) as hub:
        online = ask(hub, home, "fsd50k", "flusense", "coswara")
        commits = {name: hub.sha(name) for name in folders}
        commits[flusense.HUB] = hub.repos["datasets", flusense.HUB].commit_of("refs/convert/parquet")
        asked = {request.path for request in hub.requests if request.kind == "file"}
    with HubServer({}) as empty:
        offline = ask(empty, home, "fsd50k", "coswara", HF_HUB_OFFLINE="1")
    return {**dict(zip(("fsd50k", "flusense", "coswara"), online, strict=True)), "offline": offline} | {
        "commits": commits,
        "asked": asked,
    }


def test_fsd50k_joins_the_sounds_of_one_repository_with_the_labels_of_the_other(answers):
    found = answers["fsd50k"]

    commits = answers["commits"]
    assert found["revision"] == (f"{fsd50k.AUDIO}@{commits[fsd50k.AUDIO]} + {fsd50k.LABELS}@{commits[fsd50k.LABELS]}")
    clips = lookalikes.fsd50k_clips()
    in_order = [*clips[50:], *clips[:40], *clips[40:50]]  # test, train and validation of that repository
    assert found["groups"] == [clip["uploader"] for clip in in_order]
    assert found["splits"]["official"] == ["test" if clip["part"] == "eval" else "train" for clip in in_order]
    assert found["tasks"]["Cough"] == [clip["kind"] == 0 for clip in in_order]  # not 1, whose text has the word
    assert found["tasks"]["Speech"] == [clip["kind"] == 4 for clip in in_order]  # not 5, 'Speech synthesizer'
    assert found["notes"] == ["1 sounds are in neither dev.csv nor eval.csv"] and found["problems"] == {}


def test_a_dataset_of_the_hub_gives_the_same_sounds_as_its_files_in_a_folder(answers, folders, tmp_path):
    with HubServer({}) as empty:
        [local] = ask(empty, tmp_path / "home", f"coswara={folders[coswara.HUB]}")

    assert len(set(local["sums"])) == 28 and local["sums"] == answers["coswara"]["sums"]
    assert local["tasks"] == answers["coswara"]["tasks"]
    assert answers["coswara"]["revision"] == f"{coswara.HUB}@{answers['commits'][coswara.HUB]}"
    assert local["revision"].startswith("files:")


def test_a_dataset_that_is_a_script_is_read_from_what_the_hub_made_of_it_and_the_script_is_not_fetched(answers):
    found = answers["flusense"]

    assert found["revision"] == f"{flusense.HUB}@{answers['commits'][flusense.HUB]}"
    assert len(found["groups"]) == 90 and set(found["groups"]) == set(lookalikes.VIDEOS)
    assert "flusense.py" not in answers["asked"]


def test_what_is_in_the_cache_needs_no_network_and_is_the_same_revision(answers):
    assert answers["offline"] == [answers["fsd50k"], answers["coswara"]]


def test_a_gated_dataset_names_its_page_and_opens_with_the_token(folders, tmp_path):
    with HubServer({coswara.HUB: folders[coswara.HUB]}, gated={coswara.HUB: ["hf_good"]}) as hub:
        [refused] = ask(hub, tmp_path / "home", "coswara")
        [open_to_us] = ask(hub, tmp_path / "home", "coswara", token="hf_good")

    assert f"the dataset {coswara.HUB} is gated" in refused["error"]
    assert f"signed in:  https://huggingface.co/datasets/{coswara.HUB}\n" in refused["error"]
    assert (
        f"hf download {coswara.HUB} --repo-type dataset --include '*.parquet' --local-dir data/coswara"
        in refused["error"]
    )
    assert len(open_to_us["groups"]) == 28


def test_a_dataset_that_is_not_there_or_has_no_parquet_or_cannot_be_reached_is_said_in_words(tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("nothing\n")
    with HubServer({flusense.HUB: tmp_path / "bare"}) as hub:
        bare, missing = ask(hub, tmp_path / "home", "flusense", "coswara")
    [gone] = ask(hub, tmp_path / "home", "coswara")  # the hub has closed
    for answer, message in [
        (bare, f"the dataset {flusense.HUB} has no Parquet files, and the hub has made none of it (HTTP 404"),
        (missing, f"no dataset {coswara.HUB} on the hub that this account may see (HTTP 401"),
        (gone, "the hub cannot be reached (ConnectError)"),
    ]:
        assert answer["error"].startswith(message), answer
        assert "fetch it elsewhere:  hf download" in answer["error"]


def test_a_cache_with_one_of_two_files_is_not_taken_for_the_dataset(tmp_path):
    repository = tmp_path / "coswara"
    for number in (0, 1):
        lookalikes.write_coswara(repository / "audio" / f"train-{number:05d}-of-00002.parquet", age=[30 + number] * 14)
    home = tmp_path / "home"
    with HubServer({coswara.HUB: repository}) as hub:
        [whole] = ask(hub, home, "coswara")
    [second] = home.rglob("train-00001-of-00002.parquet")
    second.unlink()
    with HubServer({}) as empty:
        [partial] = ask(empty, home, "coswara", HF_HUB_OFFLINE="1")

    assert len(whole["groups"]) == 28
    assert f"the dataset {coswara.HUB} is not in its cache on this machine, or not all of it" in partial["error"]
