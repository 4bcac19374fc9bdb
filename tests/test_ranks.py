"""Several ranks train one model: every clip once on one of them, and all have the same weights; whatever ends them.

Ranks are forked, as in train_tools, and meet at a store of the test's own; tests/test_launch.py starts them for real.
"""

import functools
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lake_tools import make_lake, stream
from test_train import END_BYTES, RECORD_BYTES, assert_in_order, has_room, story_of, wait_for, without_check
from torch.distributed import TCPStore
from train_tools import (
    FORKS,
    SMALL_SHARDS,
    TIMEOUT_S,
    TRAINER,
    Ended,
    Training,
    end_runs,
    load_stage,
    set_cap,
    sounds_in,
)

from hear_distill import checkpoint
from hear_distill.files import GIB, UserError
from hear_distill.lake import Lake
from hear_distill.learning import Learning
from hear_distill.objective import LossConfig, measure
from hear_distill.pace import Pace
from hear_distill.ranks import RANK_LOST, Ranks
from hear_distill.schedule import Control, Schedule
from hear_distill.student import StudentConfig
from hear_distill.teacher import load_teacher

WIDE = {"log_every": 16, "save_every": 48}  # of steps of 8 clips


@pytest.fixture(autouse=True)
def nothing_goes_on_after_the_test():
    yield
    end_runs()


def meeting_point(num_ranks: int) -> tuple[TCPStore, dict[str, str]]:
    """A store at a port that the operating system chose, and what torchrun would put into the environment for it."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    words = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    return store, words | {"TORCHELASTIC_USE_AGENT_STORE": "True"}


class Crew:
    """Ranks of one run, on one lake or several; a lake is a machine."""

    def __init__(self, *trainings: Training) -> None:
        self.ranks = list(trainings)

    def start(self, **options) -> list[multiprocessing.Process]:
        """Begin or resume."""
        self.store, common = meeting_point(len(self.ranks))
        lakes = [training.lake for training in self.ranks]
        for rank, lake in enumerate(lakes):
            words = {"RANK": rank, "LOCAL_RANK": lakes[:rank].count(lake), "LOCAL_WORLD_SIZE": lakes.count(lake)}
            words["GROUP_RANK"] = list(dict.fromkeys(lakes)).index(lake)
            environment = common | {name: str(number) for name, number in words.items()}
            self.ranks[rank] = replace(self.ranks[rank], environment=environment)
        self.processes = [rank.start(**options) for rank in self.ranks]
        return self.processes

    def run(self, **options) -> list[Ended]:
        """Begin or resume, to the end."""
        self.start(**options)
        return self.end()

    def end(self) -> list[Ended]:
        """How each rank ended."""
        return [rank.end_of(process) for rank, process in zip(self.ranks, self.processes, strict=True)]

    def trained(self) -> Counter[str]:
        """Sounds of the surviving history, of all ranks."""
        return sum((Counter(rank.trained()) for rank in self.ranks), Counter())


@pytest.fixture
def crew_of(training):
    """So many ranks on one lake."""
    return lambda num_ranks, **flags: Crew(*[training(**WIDE, **flags)] * num_ranks)


def assert_trained_once(trained: Counter[str], lake: Path, in_lake: Counter[str]) -> None:
    """Each sound at most once, few not at all; the books say the same.

    Of two ranks, at the end one has less than its 4 clips of a step, the other at most a shard of 10 more than that.
    """
    assert not trained - in_lake and max(trained.values()) == 1
    assert (in_lake - trained).total() <= 3 + 13
    assert_in_order(lake, trained.total())


def first_rank_takes_all(stage) -> None:
    """The second one looks for shards when the first has read ahead to the end. Each writes down what it learned."""
    leave, look = stage.leave, stage.Feed._look

    def look_late(feed, stop):
        while feed.ranks.rank == 1 and feed.reader.num_batches == 0 and feed.lake.ready("train"):
            time.sleep(0.02)
        look(feed, stop)

    def write_and_leave(run, is_stopping):
        state = {name: value.clone() for name, value in run.learning.learner.state_dict().items()}
        torch.save(state | {"queue": run.learning.objective.queue.rows}, f"{run.config.out}.weights.{run.ranks.rank}")
        return leave(run, is_stopping)

    stage.leave, stage.Feed._look = write_and_leave, look_late


@pytest.mark.parametrize("open_shards", [3, 100], ids=["the other reads ahead", "the other has opened all"])
def test_two_ranks_of_which_one_is_dry_train_on_each_clip_once_and_end_with_the_same_weights(
    crew_of, full_lake, open_shards
):
    crew = crew_of(2, open_shards=open_shards)
    ended = crew.run(edit=first_rank_takes_all)
    assert [e.code for e in ended] == [0, 0], ended
    out, in_lake, trained = crew.ranks[0].out, sounds_in(full_lake), crew.trained()
    assert_trained_once(trained, crew.ranks[0].lake, in_lake)
    assert "step 0: a rank has run dry" in ended[0].said
    assert f"the lake is drained, {(in_lake - trained).total()} clips are left over" in ended[0].said
    state = checkpoint.load(out / "latest.pt")
    assert state["samples"] == trained.total() == 8 * state["step"]
    weights = [torch.load(f"{out}.weights.{rank}") for rank in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert ended[0].said.count("\nstep ") > 4 and ended[1].said == ""
    errors = [line["anchor_mse"] for line in story_of(out) if "anchor_mse" in line]
    assert len(errors) >= 2 and errors[-1] < errors[0]


# ---- the gradient ----

IDS = [(0, 3, clip) for clip in range(12)]
CPU = torch.device("cpu")


def images(num_clips: int, seed: int) -> torch.Tensor:
    """Not symmetric, of different levels."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(num_clips, 1, 1, 1, generator=generator)
    return level + torch.randn(num_clips, 1, 192, 128, generator=generator).cumsum(dim=3) / 20


def learn(ranks: Ranks, teacher: Path, spoiled_step: int = -1) -> dict:
    """Four steps of two chunks in all, each chunk on the rank whose turn it is."""
    schedule = Schedule(peak=1e-2, total_samples=400, shape="constant")
    control = Control(schedule=schedule, chunk_samples=4 * ranks.size, base_chunks=2 // ranks.size)
    loss, model = LossConfig(patch=0.5), StudentConfig(width=24, heads=2, blocks=1, mlp_width=24)
    torch.manual_seed(ranks.rank)  # what is not taken from the seed or from the first rank differs
    frozen = load_teacher(teacher)
    learning = Learning(frozen, model, loss, Pace(control, "off", False, CPU, ranks), 0.05, seed=0)
    parts = [(IDS[begin : begin + 3], images(12, seed=1)[begin : begin + 3]) for begin in range(0, 12, 3)]
    mine = parts[2 * ranks.rank : 2 * ranks.rank + 2] if ranks.size > 1 else parts
    learning.start_with(measure(frozen, loss, mine, 0, ranks))
    terms = {}
    for step in range(4):
        learning.begin_step()
        for chunk in range(2):
            if chunk % ranks.size == ranks.rank:
                is_spoiled = step == spoiled_step and chunk == 1
                ids = [(0, 50 + step, 4 * chunk + i) for i in range(4)] if step else IDS[4 * chunk : 4 * chunk + 4]
                learning.add(images(4, seed=10 * step + chunk) * (torch.nan if is_spoiled else 1), ids)
        terms = learning.finish_step()
    learning.settle()
    state = learning.state_dict()
    return {"state": state, "terms": terms, "counts": learning.watch.counts()}


def plain(value: object) -> object:
    """A module's state as the dict that it is."""
    return dict(value) if isinstance(value, dict) else value


def _rank(function: Callable[..., dict], environment: dict[str, str], path: Path, arguments: tuple) -> None:
    os.environ |= environment
    ranks = Ranks.join("cpu")
    torch.save(function(ranks, *arguments), path)
    ranks.leave()


def on_ranks(num_ranks: int, folder: Path, function: Callable[..., dict], *arguments) -> list[dict]:
    """What a function returns in each of so many ranks."""
    store, common = meeting_point(num_ranks)
    paths = [folder / f"{num_ranks}-{rank}.pt" for rank in range(num_ranks)]
    processes = []
    for rank, path in enumerate(paths):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(FORKS.Process(target=_rank, args=(function, environment, path, arguments)))
        processes[-1].start()
    for process in processes:
        process.join(TIMEOUT_S)
    assert [process.exitcode for process in processes] == [0] * num_ranks
    del store
    return [torch.load(path) for path in paths]


@pytest.mark.parametrize("spoiled_step", [-1, 2], ids=["all finite", "one chunk is not finite"])
def test_two_ranks_with_a_chunk_each_learn_what_one_learns_from_both_and_measure_the_same_noise(
    teacher, tmp_path, spoiled_step
):
    (alone,) = on_ranks(1, tmp_path, learn, teacher, spoiled_step)
    first, second = on_ranks(2, tmp_path, learn, teacher, spoiled_step)
    for name, value in alone["state"]["learner"].items():
        assert torch.equal(first["state"]["learner"][name], second["state"]["learner"][name]), name
        torch.testing.assert_close(first["state"]["learner"][name], value, rtol=1e-3, atol=2e-4)
    for name, value in alone["state"]["pace"]["noise"].items():
        torch.testing.assert_close(first["state"]["pace"]["noise"][name], value, rtol=1e-2, atol=1e-3, equal_nan=True)
        assert torch.equal(first["state"]["pace"]["noise"][name], second["state"]["pace"]["noise"][name])
    for part in ("queue", "known_ids", "known", "statistics"):
        ours, theirs = (state["state"]["objective"][part] for state in (first, second))
        assert checkpoint.digest(plain(ours)) == checkpoint.digest(plain(theirs)), part
    for name in ("rows", "oldest"):
        torch.testing.assert_close(
            first["state"]["objective"]["queue"][name], alone["state"]["objective"]["queue"][name], rtol=1e-4, atol=1e-4
        )
    assert first["state"]["objective"]["known_ids"].tolist() == [list(i) for i in IDS[8:]]
    assert first["counts"] == second["counts"] == alone["counts"]
    assert first["counts"]["skipped_steps"] == (spoiled_step >= 0)
    assert first["state"]["samples"] == alone["state"]["samples"] == 32
    torch.testing.assert_close(first["terms"], alone["terms"], rtol=1e-2, atol=1e-3)


# ---- two lakes, as two machines ----


@pytest.fixture(scope="session")
def two_lakes(tmp_path_factory, source) -> list[Path]:
    """Two disjoint parts of the source, of different sizes; only copied."""
    lakes = [tmp_path_factory.mktemp(f"lake{node}") for node in range(2)]
    for node, lake in enumerate(lakes):
        assert stream(source, lake, *SMALL_SHARDS, "--num-nodes", 2, "--node-rank", node).returncode == 0
    return lakes


def crew_on(folder: Path, lakes: list[Path], teacher: Path, **flags) -> Crew:
    """A rank on a copy of each lake, and a run folder for each: nothing is shared."""
    folder.mkdir()
    for node, lake in enumerate(lakes):
        shutil.copytree(lake, folder / f"lake{node}")
    runs = [Training(folder / f"run{i}", folder / f"lake{i}", teacher).but(**WIDE, **flags) for i in range(len(lakes))]
    return Crew(*runs)


def seen_before_loading(stage) -> None:
    """Machines wait eight minutes for each other, and loading takes minutes; a supervisor takes ten for a hang."""
    open_run = stage.open_run

    def open_if_seen(config, ranks):
        assert (config.out / stage.progress_file(ranks.node)).exists()
        return open_run(config, ranks)

    stage.open_run = open_if_seen


def test_two_machines_with_a_lake_each_go_on_to_the_bit_where_one_was_killed(tmp_path, two_lakes, teacher):
    """Each has a lake to itself, so which shards it leases does not depend on the moment."""
    whole = crew_on(tmp_path / "whole", two_lakes, teacher)
    ended = whole.run(edit=seen_before_loading)
    assert [e.code for e in ended] == [0, 0], ended
    counts = [Counter(rank.trained()) for rank in whole.ranks]
    sizes = [sounds_in(lake) for lake in two_lakes]
    for count, size, rank in zip(counts, sizes, whole.ranks, strict=True):
        assert not count - size and max(count.values()) == 1
        assert_in_order(rank.lake, count.total())
    left = sum(sizes, Counter()) - whole.trained()
    assert counts[0].total() == counts[1].total() > min(size.total() for size in sizes) - 4
    assert f"{left.total()} clips are left over" in ended[0].said
    assert [path.name for path in whole.ranks[1].out.iterdir()] == ["progress-1.json"]

    broken = crew_on(tmp_path / "broken", two_lakes, teacher)
    broken.start(crash_at="checkpoint-recorded")
    codes = {e.code for e in broken.end()}
    assert -signal.SIGKILL in codes and codes <= {-signal.SIGKILL, RANK_LOST}
    assert [e.code for e in broken.run()] == [0, 0]
    states = [checkpoint.load(crew.ranks[0].out / "latest.pt") for crew in (broken, whole)]
    for part in ("learner", "ema", "optimizer", "pace", "watch", "objective", "samples"):
        assert checkpoint.digest(states[0][part]) == checkpoint.digest(states[1][part]), part
    for ours, theirs in zip(broken.ranks, whole.ranks, strict=True):
        assert ours.trained() == theirs.trained()
        assert_in_order(ours.lake, len(theirs.trained()))
    assert story_of(broken.ranks[0].out) == story_of(whole.ranks[0].out)


def test_a_lake_that_the_run_has_not_learned_from_is_refused_also_of_another_rank(tmp_path, two_lakes, teacher):
    crew = crew_on(tmp_path / "crew", two_lakes, teacher, schedule__total_samples=16)
    assert [e.code for e in crew.run()] == [0, 0]
    strange = Crew(crew.ranks[0], replace(crew.ranks[1], lake=two_lakes[1].parent / "strange"))
    shutil.copytree(two_lakes[1], strange.ranks[1].lake)
    ledger = Lake.open(strange.ranks[1].lake)
    ledger.db.execute("UPDATE settings SET value = 'another' WHERE name = 'id'")
    ledger.close()
    ended = strange.run()
    assert ended[1].code == 2 and "another lake" in ended[1].said
    assert ended[0].code in (2, RANK_LOST)


# ---- what ends one of them ----


def slowly(stage) -> None:
    """So that a run is not over before something happens to it."""
    finish_step = stage.finish_step
    stage.finish_step = lambda run: time.sleep(0.1) or finish_step(run)


def test_when_one_rank_is_killed_the_others_leave_and_the_run_goes_on_where_it_was(crew_of, full_lake):
    crew = crew_of(2)
    processes = crew.start(edit=slowly)
    wait_for((crew.ranks[0].out / "latest.pt").exists)
    processes[1].kill()
    ended = crew.end()
    assert [e.code for e in ended] == [RANK_LOST, -signal.SIGKILL]
    assert "leaving, as another rank has ended" in ended[0].said and "Traceback" not in ended[0].said
    assert [e.code for e in crew.run()] == [0, 0]
    assert_trained_once(crew.trained(), crew.ranks[0].lake, sounds_in(full_lake))


def steps_of(training: Training) -> list[list[str]]:
    """The sounds of each step that a rank has made since its file was begun; none of these was undone."""
    path = training.beside("trained")
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [entry for entry in entries if isinstance(entry, list)]


def take_sounds(*trainings: Training) -> Counter[str]:
    """Of all these steps; their files begin anew."""
    sounds = Counter(sound for training in trainings for step in steps_of(training) for sound in step)
    for training in trainings:
        training.beside("trained").unlink()
    return sounds


def test_a_run_is_stopped_by_any_rank_and_goes_on_with_fewer_or_more_of_them(crew_of, full_lake):
    """Two ranks, one, then two again: no clip is lost or trained on twice."""
    crew = crew_of(2, target_clips=8)
    processes = crew.start(edit=slowly)
    wait_for(lambda: len(steps_of(crew.ranks[1])) >= 2)
    processes[1].terminate()
    ended = crew.end()
    assert [e.code for e in ended] == [0, 0] and "asked to stop" in ended[0].said
    first = checkpoint.load(crew.ranks[0].out / "latest.pt")
    trained = take_sounds(*crew.ranks)
    assert trained.total() == first["samples"] == 8 * first["step"] >= 16
    assert_in_order(crew.ranks[0].lake, trained.total())

    alone = replace(crew.ranks[0], environment={})
    process = alone.start(edit=slowly)
    wait_for(lambda: len(steps_of(alone)) >= 2)
    process.terminate()
    assert alone.end_of(process).code == 0
    second = checkpoint.load(alone.out / "latest.pt")
    trained += take_sounds(alone)
    assert trained.total() == second["samples"] > first["samples"]
    assert_in_order(alone.lake, trained.total())

    assert [e.code for e in crew.run()] == [0, 0]
    assert_trained_once(trained + take_sounds(*crew.ranks), alone.lake, sounds_in(full_lake))


# ---- room ----


def reading_little_ahead(stage) -> None:
    without_check(stage)
    stage.Drawing = functools.partial(stage.Drawing, ahead_clips=2)


def test_while_one_rank_starves_in_a_full_lake_all_save_and_room_comes_back(tmp_path, source, teacher, full_lake):
    cap = ("--cap-gb", (60 * RECORD_BYTES + 9 * END_BYTES) / GIB)
    lake = tmp_path / "lake"
    assert "the lake is full" in stream(source, lake, *SMALL_SHARDS, *cap).stdout
    flags = {"save_every": 4000, "log_every": 4000, "open_shards": 1}
    crew = Crew(*[Training(tmp_path / "run", lake, teacher).but(**flags)] * 2)
    processes, said = crew.start(edit=reading_little_ahead), ""
    while "no tar is left" not in said and all(process.exitcode is None for process in processes):
        wait_for(lambda: has_room(lake) or any(process.exitcode is not None for process in processes))
        said = stream(source, lake, *SMALL_SHARDS, *cap).stdout
    assert [e.code for e in crew.end()] == [0, 0]
    assert_trained_once(crew.trained(), lake, sounds_in(full_lake))


# ---- refusals ----


@pytest.fixture
def two_ranks(monkeypatch):
    """As many on this machine, as far as a process that only checks can tell."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return load_stage(TRAINER)


def test_ranks_that_share_a_lake_cannot_use_its_shards_again(two_ranks):
    with pytest.raises(UserError, match="--consume reuse is for one GPU"):
        two_ranks.check(two_ranks.Config(device="cpu", consume="reuse"))


def test_each_rank_needs_room_for_its_open_shards_and_for_what_it_reads_ahead(two_ranks, tmp_path):
    """10 clips a shard: 2 workers, 2 ranks with 3 open shards and 103 ahead, 2 intervals of 64, 2 sets of 8."""
    lake = make_lake(tmp_path / "lake", shard_clips=10, val_clips=8)
    config = two_ranks.Config(lake=lake.root, device="cpu", open_shards=3, save_every=64, log_every=32, chunk_size=2)
    config = replace(config, target_clips=8)
    for cap_clips, is_enough in ((2_284, True), (2_283, False)):
        set_cap(lake.root, cap_clips * RECORD_BYTES + 1_024)
        if is_enough:
            two_ranks.check(config)
            continue
        with pytest.raises(UserError, match="212 open shards"):
            two_ranks.check(config)


def test_one_chunk_on_each_of_two_ranks_is_enough_to_measure_the_noise(two_ranks):
    assert two_ranks.Config(chunks=1, chunk_size=64).batch_size() == 128
    with pytest.raises(ValueError, match="at least 2"):
        two_ranks.Config(chunks=0)


def test_half_of_the_environment_of_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="no RANK"):
        Ranks.join("cpu")


def test_a_run_goes_on_with_each_of_its_lakes_and_with_no_other(tmp_path):
    stage, lake = load_stage(TRAINER), make_lake(tmp_path / "lake")
    config = stage.Config(lake=lake.root, out=tmp_path / "run")
    asked = stage.remembered(config)
    state = {"remembered": asked, "reader": {"num_batches": 3, "lakes": {"another": [], lake.setting("id"): []}}}
    stage.refuse_another(config.out, asked, state, lake)
    del state["reader"]["lakes"][lake.setting("id")]
    with pytest.raises(UserError, match="learned from another lake"):
        stage.refuse_another(config.out, asked, state, lake)
