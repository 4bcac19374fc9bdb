"""Longer sounds: what is put together again followed each other in a recording, and every clip is still drawn once."""

import os
import shutil
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from lake_tools import batches_of, die, filled_lake, ids_of, make_lake, noise
from test_learning import CPU, frozen, learning_of, spectrograms, step  # noqa: F401
from test_train import assert_same_end, story_of
from train_tools import sounds_in

from hear_distill import checkpoint, lengths
from hear_distill.data import Batch, Drawing
from hear_distill.feed import Feed, View
from hear_distill.frontend import MelPcen
from hear_distill.locks import Owner
from hear_distill.objective import LossConfig
from hear_distill.schema import Part
from hear_distill.shards import Clip, read_infos, shard_bytes, write_shard

SIZES = (1, 2, 4)


def clips_of(*recordings: tuple[str, list[int]], seed: int = 0) -> list[Clip]:
    """Clips of these recordings, at these starts, in any order; a sound tells its recording and its start."""
    clips = [
        Clip("a.tar", key, start, 100.0, "x" * 900, noise(32_000, seed, number, start))
        for number, (key, starts) in enumerate(recordings)
        for start in starts
    ]
    return [clips[i] for i in np.random.default_rng(seed).permutation(len(clips))]


def row(count: int, begin: int = 0) -> list[int]:
    return [begin + 32_000 * i for i in range(count)]


def infos_of(tmp_path, clips: list[Clip]):
    write_shard(tmp_path / "1.tar", clips)
    return read_infos(tmp_path / "1.tar")


# ---- one shard ----


def test_a_run_has_neither_gap_nor_overlap_and_is_of_one_recording(tmp_path):
    long_key = "k" * 1500  # which the JSON cuts, as it does the other
    clips = clips_of(
        ("flush", [*row(2), 48_000]), ("gap", [0, 64_000, 96_000]), ("other", row(3, 64_000)), ("one", [0])
    )
    clips += clips_of((long_key + "1", row(2)), (long_key + "2", row(1, 64_000)))
    runs = lengths.runs_of(infos_of(tmp_path, clips))
    found = sorted([(clips[i].key[:5] + clips[i].key[-1], clips[i].start) for i in run] for run in runs)
    assert found == [
        *([("flushh", 0), ("flushh", 32_000)], [("flushh", 48_000)], [("gapp", 0)]),
        *([("gapp", 64_000), ("gapp", 96_000)], [("kkkkk1", 0), ("kkkkk1", 32_000)], [("kkkkk2", 64_000)]),
        *([("onee", 0)], [("otherr", 64_000), ("otherr", 96_000), ("otherr", 128_000)]),
    ]


def test_a_divided_shard_has_equally_many_clips_of_each_length_where_runs_are_long(tmp_path):
    infos = infos_of(tmp_path, clips_of(*((f"r{i}", row(40)) for i in range(25))))
    units = lengths.divide(infos, SIZES, seed=3, shard_id=9)
    assert {size: found.shape[1] for size, found in units.items()} == {2: 2, 4: 4}
    used = [clip for found in units.values() for clip in found.flat]
    assert len(set(used)) == len(used)
    shares = {size: found.size / len(infos) for size, found in units.items()}
    assert shares == {2: pytest.approx(1 / 3, abs=0.05), 4: pytest.approx(1 / 3, abs=0.05)}
    again = [lengths.divide(infos, SIZES, seed, shard_id) for seed, shard_id in ((3, 9), (4, 9), (3, 8))]
    assert [np.array_equal(units[4], other[4]) for other in again] == [True, False, False]


def test_what_is_intact_has_every_undrawn_clip_once():
    units = {2: np.array([[0, 3], [5, 1]]), 4: np.array([[2, 4, 6, 7]])}
    is_drawn = np.zeros(10, dtype=bool)
    is_drawn[[3, 8]] = True
    found = lengths.intact(units, is_drawn)
    assert {size: unit.tolist() for size, unit in found.items()} == {1: [[0], [9]], 2: [[5, 1]], 4: [[2, 4, 6, 7]]}
    assert not is_drawn[0], "what is asked about stays as it is"


def test_a_length_is_chosen_as_often_as_there_are_clips_of_it_and_only_if_there_are_enough():
    counts = {1: 100, 2: 300, 4: 600, 8: 15}
    chosen = Counter(lengths.choose(counts, 16, seed=1, index=index) for index in range(2000))
    assert chosen.keys() == {1, 2, 4}
    assert chosen[4] / 2000 == pytest.approx(0.6, abs=0.04) and chosen[1] / 2000 == pytest.approx(0.1, abs=0.03)
    assert lengths.choose(counts, 601, 1, 0) is None
    assert lengths.choose(counts, 16, 1, 5) == lengths.choose(counts, 16, 1, 5)


# ---- a reader ----


@pytest.fixture
def lake(tmp_path):
    """Six shards, each with runs of 9, 9, 5, 3 and 1 clips and a flush last clip; the source is finished."""
    lake = make_lake(tmp_path / "lake", shard_clips=30)
    lake.db.execute("UPDATE tars SET state = 'done'")
    for number in range(6):
        recordings = [(f"{number} {i}", row(n)) for i, n in enumerate(RUNS)] + [(f"{number} f", [0, 9_000])]
        clips = clips_of(*recordings, seed=number)
        shard_id = lake.begin_shard("nobody", shard_bytes(len(clips)), "train")
        sha256 = write_shard(lake.path(shard_id, "train", ".tar.part"), clips)
        lake.publish(shard_id, [Part("train", len(clips), shard_bytes(len(clips)), sha256)], [], Counter())
    yield lake
    lake.close()


RUNS = (9, 9, 5, 3, 1)
NUM_CLIPS = 6 * (sum(RUNS) + 2)
OPTIONS = {"batch_size": 8, "sizes": SIZES, "batches_per_size": 2, "num_open": 3}


def places_in(lake) -> dict[tuple[int, int], tuple[str, int]]:
    """(shard, clip) -> key and start."""
    paths = {int(path.stem): path for path in (lake.root / "shards").glob("*.tar")}
    return {(i, n): (info.key, info.start) for i, path in paths.items() for n, info in enumerate(read_infos(path))}


def test_every_clip_is_drawn_once_and_every_sound_is_a_piece_of_one_recording(lake, reader_of):
    places, batches = places_in(lake), batches_of(reader_of(lake, **OPTIONS))
    drawn = ids_of(batches)
    assert max(drawn.values()) == 1 and len(places) - drawn.total() == len(places) % 8 == NUM_CLIPS % 8
    assert {batch.clips_per_sound for batch in batches} == set(SIZES)
    for batch in batches:
        for begin in range(0, 8, batch.clips_per_sound):
            sound = batch.ids[begin : begin + batch.clips_per_sound]
            key, start = places[sound[0]]
            assert [places[clip] for clip in sound] == [(key, start + 32_000 * i) for i in range(len(sound))]
    by_sound = {
        (shard, clip): sample.tobytes()
        for batch in batches
        for (shard, clip), sample in zip(batch.ids, batch.samples, strict=True)
    }
    for shard, clip in list(places)[::7]:
        key, start = places[shard, clip]
        number = "01234f".index(key.split()[1])
        assert by_sound[shard, clip] == noise(32_000, int(key.split()[0]), number, start).tobytes()


def test_what_is_left_of_sounds_when_no_length_has_enough_is_drawn_clip_by_clip_and_counted(lake, reader_of):
    batches = batches_of(reader_of(lake, **OPTIONS))
    num_long = sum(len(batch.ids) for batch in batches if batch.clips_per_sound > 1)
    divided = [
        lengths.divide(read_infos(path), SIZES, 1, int(path.stem)) for path in (lake.root / "shards").glob("*.tar")
    ]
    in_longer = sum(found.size for units in divided for found in units.values())
    assert 0 < sum(batch.num_broken_up for batch in batches) == in_longer - num_long < in_longer / 2
    assert all(batch.num_broken_up == 0 for batch in batches if batch.clips_per_sound > 1)


def test_as_many_batches_in_a_row_have_one_length_as_a_step_has_chunks(lake, reader_of):
    drawn = [batch.clips_per_sound for batch in batches_of(reader_of(lake, **OPTIONS | {"num_open": 6}), 12)]
    assert drawn[::2] == drawn[1::2] and len(set(drawn)) > 1
    assert drawn[1:-1:2] != drawn[2::2]


@pytest.mark.parametrize("num_before", [1, 4, 7])
def test_a_killed_and_resumed_reader_draws_the_sounds_of_the_unbroken_one(lake, reader_of, num_before, tmp_path):
    def told(batches):
        return [(batch.clips_per_sound, batch.ids, batch.num_broken_up) for batch in batches]

    first = reader_of(lake, **OPTIONS)
    head, state = batches_of(first, num_before), first.state()
    tail = told(batches_of(first))
    die(first)
    again = told(batches_of(reader_of(lake, **OPTIONS, state=state)))
    assert len(head) == num_before and again == tail


def test_shards_that_are_used_again_are_divided_again(lake, reader_of):
    """Three passes: each clip three times, give or take the pass that is going on."""
    batches = batches_of(reader_of(lake, **OPTIONS | {"reuse": True}), 3 * NUM_CLIPS // 8)
    drawn = ids_of(batches)
    assert len(drawn) == NUM_CLIPS and set(drawn.values()) <= {2, 3, 4}
    for begin in (0, NUM_CLIPS // 8, 2 * NUM_CLIPS // 8):
        of_pass = batches[begin : begin + NUM_CLIPS // 8]
        assert sum(len(batch.ids) for batch in of_pass if batch.clips_per_sound > 1) > NUM_CLIPS / 4


# ---- from the clips to the step ----


def test_a_long_sound_reaches_the_student_whole_and_the_teacher_in_windows_uncut():
    samples = np.stack([noise(32_000, 1, i) // (1 + i) for i in range(6)])
    frontend = MelPcen()
    whole, windows = View(frontend, CPU, seed=0, pad_share=1.0).long(samples, 3)
    assert whole.shape == (2, 1, 576, 128) and windows.shape == (6, 1, 192, 128)
    for i in range(2):
        sound = torch.from_numpy(np.concatenate(list(samples[3 * i : 3 * i + 3]))).float()[None] / 32768
        torch.testing.assert_close(whole[i : i + 1], frontend(sound))
    for i in range(6):
        torch.testing.assert_close(windows[i : i + 1], frontend(torch.from_numpy(samples[i : i + 1]).float() / 32768))


def test_the_target_of_a_long_sound_is_the_mean_and_its_tokens_are_those_of_the_windows_in_turn(frozen):  # noqa: F811
    learning = learning_of(frozen, LossConfig(patch=0.5))
    windows, whole = spectrograms(6, seed=3), torch.randn(2, 1, 576, 128)
    learning.begin_step()
    learning.wants_probe = True  # only then a step keeps its patches
    learning.add(whole, [(1, i) for i in range(6)], windows)
    found, objective = learning.chunks[0].targets, learning.objective
    with torch.no_grad():
        for i in range(2):
            raw = [frozen.embed_with_patches(windows[n : n + 1]) for n in range(3 * i, 3 * i + 3)]
            embedding = torch.stack([one[0][0] for one in raw]).mean(dim=0)
            expected = (embedding - objective.statistics.mean) / objective.statistics.scale
            torch.testing.assert_close(found.embedding[i], expected, rtol=1e-3, atol=1e-3)
            tokens = torch.cat([one[1][0] for one in raw])  # [3 N, P]
            torch.testing.assert_close(
                found.patches[i], objective.patches.standardise(tokens[None])[0], rtol=1e-3, atol=1e-3
            )
    assert found.patches.shape[1] == 288


def test_a_clip_of_the_sample_is_asked_about_anew_as_part_of_a_long_sound_and_is_used_up(frozen):  # noqa: F811
    learning = learning_of(frozen, LossConfig())
    ids = list(learning.objective.known_rows)[:6]
    learning.begin_step()
    windows = spectrograms(6, seed=3)
    learning.add(torch.randn(2, 1, 576, 128), ids, windows)
    found = learning.chunks[0].targets.embedding
    torch.testing.assert_close(found, learning.objective.targets_of(windows).joined(3).embedding)
    learning.add(torch.randn(2, 1, 576, 128), [(8, i) for i in range(6)], windows)
    learning.finish_step()
    assert not set(ids) & learning.objective.known_rows.keys()


def test_the_noise_is_measured_in_steps_of_clips_only_and_all_steps_count_their_clips(frozen):  # noqa: F811
    learning = learning_of(frozen, LossConfig(patch=0.5))
    step(learning, 1)
    before = {name: value.clone() for name, value in learning.pace.noise.state_dict().items()}
    for lengths_of_step in ((2, 2), (1, 2)):
        learning.begin_step()
        for part, k in enumerate(lengths_of_step):
            windows, ids = spectrograms(4, seed=10 * k + part), [(7, 4 * part + i) for i in range(4)]
            learning.add(*((windows, ids) if k == 1 else (torch.randn(2, 1, 384, 128), ids, windows)))
        learning.finish_step()
    after = learning.pace.noise.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (learning.step, learning.samples) == (3, 24)
    step(learning, 2)
    changed = learning.pace.noise.state_dict()
    assert not all(torch.equal(after[name], changed[name]) for name in after)


def test_long_and_broken_up_clips_are_counted_from_one_look_to_the_next(tmp_path):
    lake = filled_lake(tmp_path, 4)
    drawing = Drawing(run="r", seed=0, num_open=1, batch_size=4)
    owner = Owner(tmp_path, "train")
    feed = Feed(lake, owner, drawing, View(MelPcen(), CPU, seed=0, pad_share=0.0))
    samples, ids = np.stack([noise(32_000, i) for i in range(4)]), [(0, i) for i in range(4)]
    for clips_per_sound, num_broken_up in ((2, 0), (1, 3), (4, 0), (1, 2)):
        batch = Batch(samples, ids, clips_per_sound, num_broken_up)
        found = feed.spectrogram(batch) if clips_per_sound == 1 else feed.long_spectrograms(batch)[0]
        assert len(found) == 4 // clips_per_sound
    assert feed.num_pending == 16
    assert feed.take_length_counts() == {"long_clips": 8, "broken_up_clips": 5}
    assert feed.take_length_counts() == {"long_clips": 0, "broken_up_clips": 0}
    feed.reader.close()
    owner.release()
    lake.close()


# ---- the stage ----

LONGER = {"lengths": (2, 4), "chunk_size": 4, "open_shards": 8}


def test_a_run_with_longer_sounds_trains_on_every_clip_once_and_says_how_many_were_long(training, full_lake):
    run = training(**LONGER)
    assert run.run().code == 0
    in_lake, trained = sounds_in(full_lake), Counter(run.trained())
    assert not trained - in_lake and max(trained.values()) == 1 and (in_lake - trained).total() < 8
    lines = [line for line in story_of(run.out) if "long_clips" in line]
    num_long = sum(line["long_clips"] for line in lines)
    assert 8 <= num_long <= trained.total() - 16 and num_long % 4 == 0
    assert checkpoint.load(run.out / "latest.pt")["watch"]["skipped_steps"] == 0


def test_a_run_with_longer_sounds_killed_twice_ends_as_if_it_had_not_been(training, tmp_path, full_lake):
    whole = training(**LONGER)
    folder = tmp_path / "broken"
    folder.mkdir()
    shutil.copytree(full_lake, folder / "lake")
    broken = replace(whole, out=folder / "run", lake=folder / "lake")
    assert whole.run().code == 0
    assert [broken.run(crash_at="checkpoint-recorded").code for _ in range(2)] == [-9, -9]
    assert broken.run().code == 0
    assert_same_end(broken, whole)


def test_a_run_with_longer_sounds_that_is_stopped_between_log_lines_counts_them_as_if_it_had_not_been(
    training, tmp_path, full_lake
):
    whole = training(**LONGER, log_every=24, save_every=24)
    folder = tmp_path / "stopped"
    folder.mkdir()
    shutil.copytree(full_lake, folder / "lake")
    stopped = replace(whole, out=folder / "run", lake=folder / "lake")
    assert whole.run().code == 0
    for _ in range(3):
        assert "asked to stop" in stopped.run(edit=stopping_after_two_steps).said
    assert checkpoint.load(stopped.out / "latest.pt")["step"] == 6
    assert stopped.run().code == 0
    assert story_of(stopped.out) == story_of(whole.out) and stopped.trained() == whole.trained()
    assert sum(line.get("long_clips", 0) for line in story_of(whole.out)) > 0


def stopping_after_two_steps(stage) -> None:
    """Of this process, as by SIGTERM."""
    finish_step, steps = stage.finish_step, []

    def finish_and_stop(run):
        steps.append(finish_step(run))
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return steps[-1]

    stage.finish_step = finish_and_stop


@pytest.mark.parametrize(
    ("seconds", "chunk_size", "controller", "message"),
    [
        ((4, 8), 64, "off", "must hold 2"),
        ((2, 4, 4), 64, "off", "none twice"),
        ((2, 3), 64, "off", "--lengths 3: expected an even number"),
        ((2, 6), 64, "off", "--lengths 6: .* 64 clips"),
        ((2, 64), 32, "off", "two or more"),
        ((2, 0), 32, "off", "--lengths 0"),
        ((2, 4), 64, "seesaw", "other numbers of chunks: take --lengths 2"),
    ],
)
def test_lengths_that_no_training_can_have_are_refused(seconds, chunk_size, controller, message):
    with pytest.raises(ValueError, match=message):
        lengths.check(seconds, chunk_size, controller)


def test_lengths_that_are_possible_are_taken_in_any_order():
    lengths.check((8, 2, 4), 8, "ema-batch")
    lengths.check((2,), 7, "seesaw")
    assert lengths.sizes_of((8, 2, 4)) == (1, 2, 4)
