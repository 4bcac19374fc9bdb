"""The experiments, on made-up sound: what a run sees, what an arm changes, what the table says; the small teacher."""

import dataclasses
import json
import math
from pathlib import Path

import ablate
import make_teacher
import numpy as np
import pytest
import small_run
import sounds
import torch
from small_run import Arm, RecordedTeacher

from hear_distill.learning import Learning
from hear_distill.student import Student, StudentConfig
from hear_distill.synthetic import write_source, write_table
from hear_distill.teacher import Teacher, load_teacher, save_stand_in

TINY = {"width": 16, "blocks": 2, "heads": 2, "mlp_width": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experiments") / "source"
    write_source(folder, num_tars=2, recordings_per_tar=21, seed=3)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("experiments") / "table.parquet"
    write_table(path, num_per_label=10, seed=4)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Teacher:
    return load_teacher(save_stand_in(tmp_path_factory.mktemp("experiments") / "teacher", seed=0))


@pytest.fixture(scope="module")
def material(source, teacher) -> small_run.Material:
    return small_run.make_material(source, teacher, 128, [0.0, 0.5], probe=None)


@pytest.fixture
def tiny(monkeypatch):
    """Runs of seconds: a narrow student, and a queue of half of the pool."""
    monkeypatch.setattr(small_run, "STUDENT", TINY)
    monkeypatch.setattr(small_run, "TARGET_CLIPS", 64)


# ------------------------------------------------------------------------------------------------------------- sounds


def test_a_view_is_the_same_alone_and_in_any_batch_and_another_for_another_seed(source):
    recordings = sounds.read_source(source)
    together, words = sounds.views(recordings, 5, range(8))
    alone, word = sounds.views(recordings, 5, [6])
    assert torch.equal(alone[0], together[6]) and word[0] == words[6]
    assert not torch.equal(sounds.views(recordings, 6, [6])[0], alone)


def test_a_mixed_view_is_the_sum_of_two_recordings_and_has_the_words_of_both():
    rng = np.random.default_rng(0)
    noise = [rng.integers(-9000, 9000, 32_000).astype(np.int16) for _ in range(2)]
    recordings = [sounds.Recording(str(i), noise[i], frozenset({f"word{i}"})) for i in range(2)]
    basis = np.stack(noise).astype(np.float64).T / 32768  # [n, 2]
    num_mixed = 0
    for index in range(40):
        found, words = sounds.view(recordings, 1, index)
        weights, rest, *_ = np.linalg.lstsq(basis, found, rcond=None)
        assert rest[0] < 1e-6
        heard = {f"word{i}" for i in range(2) if abs(weights[i]) > 0.1}
        assert words == heard
        num_mixed += len(heard) == 2
    assert 5 <= num_mixed <= 20  # a quarter on average: half are mixed, half of these with the other recording


def test_takes_of_one_recording_are_never_on_both_sides_of_the_split():
    silence = np.zeros(32_000, np.int16)
    keys = [f"esc10-1-{number}-{take}" for number in range(100) for take in "AB"] + [f"theo-{i:03d}" for i in range(50)]
    recordings = [sounds.Recording(key, silence, frozenset()) for key in keys]
    learned_from, held_out = ({sounds.group_of(r.key) for r in side} for side in sounds.split(recordings, 0))
    assert learned_from.isdisjoint(held_out)
    assert len(learned_from | held_out) == 150 and 15 <= len(held_out) <= 45


def test_the_effective_rank_is_the_exponential_of_the_entropy_of_the_eigenvalues():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64)).Q[:2]  # [2, 7]
    rows = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]], dtype=torch.float64) @ directions + 5
    expected = math.exp(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))  # eigenvalues 9 : 1
    assert sounds.effective_rank(rows) == pytest.approx(expected)


def test_the_probe_reads_labels_from_an_embedding_that_has_them_and_none_from_noise(table):
    probe = sounds.Probe(table, "2", every=2)
    labels = {name: i for i, name in enumerate(np.unique(probe.labels))}
    of_window = [labels[probe.labels[row]] for row in probe.row_of_window]
    knowing = torch.nn.functional.one_hot(torch.tensor(of_window), len(labels)).float()
    noise = torch.randn(knowing.shape, generator=torch.Generator().manual_seed(0))

    def told_by(answers: torch.Tensor) -> dict[str, float]:
        parts = iter(answers.split(sounds.PART))
        return probe.measure(lambda _: next(parts))

    assert told_by(knowing) == {"map": 1.0, "accuracy": 1.0}
    assert told_by(noise)["map"] < 0.6
    assert len(probe.test_spectrograms()) < len(probe.spectrograms) / 3


def test_a_fold_that_the_table_lacks_is_refused(table):
    with pytest.raises(ValueError, match="no fold '6'"):
        sounds.Probe(table, "6")


# ------------------------------------------------------------------------------------------------------------ teacher


def test_an_encoder_that_sees_all_patches_is_the_whole_model_and_hidden_ones_have_no_say():
    torch.manual_seed(0)
    encoder = make_teacher.new_encoder(64, 2).eval()
    spectrogram = torch.rand(2, 1, 192, 128)
    order = torch.stack([torch.randperm(96), torch.randperm(96)])
    tokens, embedding = make_teacher.encode_visible(encoder, spectrogram, order)
    whole = encoder(spectrogram)
    torch.testing.assert_close(embedding, whole.pooler_output)
    torch.testing.assert_close(tokens[1, 0], whole.last_hidden_state[1, 1 + order[1, 0]])

    changed = spectrogram.clone()
    row, column = divmod(int(order[0, 40]), 8)
    changed[0, 0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 1
    few = order[:, :24]
    torch.testing.assert_close(
        make_teacher.encode_visible(encoder, changed, few)[1],
        make_teacher.encode_visible(encoder, spectrogram, few)[1],
    )
    assert not torch.allclose(encoder(changed).pooler_output[0], whole.pooler_output[0])


def test_the_spread_loss_is_minus_the_log_of_the_participation_ratio_at_any_scale():
    rows = np.random.default_rng(0).normal(size=(9, 5)) * [0.1, 0.5, 1, 2, 3] + 4
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T))
    expected = -math.log(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum())
    for scale in (1e-3, 1.0, 30.0):
        assert float(make_teacher.spread_loss(torch.from_numpy(scale * rows))) == pytest.approx(expected)


def test_an_equalised_pooling_has_the_rank_that_is_wanted_and_forgets_nothing_of_the_class_token(monkeypatch):
    monkeypatch.setattr(make_teacher, "WANTED_RANK", 20.0)
    torch.manual_seed(0)
    encoder = make_teacher.new_encoder(64, 1).eval().requires_grad_(False)
    spectrogram = torch.rand(80, 1, 1, 128).pow(3).expand(-1, -1, 192, -1).contiguous()
    before = encoder(spectrogram)
    assert sounds.effective_rank(before.pooler_output) < 15
    power = make_teacher.equalise(encoder, spectrogram)
    after = encoder(spectrogram)
    assert 20 <= sounds.effective_rank(after.pooler_output) < 21 and 0 < power < 1
    token = after.last_hidden_state[:, 0].double()
    told = torch.linalg.lstsq(
        torch.nn.functional.pad(after.pooler_output.double(), (0, 1), value=1.0), token, driver="gelsd"
    ).solution
    residual = token - torch.nn.functional.pad(after.pooler_output.double(), (0, 1), value=1.0) @ told
    assert residual.norm() < 1e-3 * (token - token.mean(dim=0)).norm()


def test_the_teacher_is_a_folder_that_the_trainer_takes_and_its_report_names_it(source, table, tmp_path, monkeypatch):
    monkeypatch.setattr(make_teacher, "untrained", lambda seed: {})
    small = {"width": 64, "layers": 1, "reconstruct_views": 128, "label_views": 128, "test_fold": "1"}
    out = tmp_path / "teacher"
    make_teacher.main(make_teacher.Config(source=source, table=table, out=out, **small))
    report = json.loads((out / "report.json").read_text())
    loaded = load_teacher(out)
    assert loaded.is_stand_in and loaded.revision == report["revision"]
    assert report["teacher"] != report["before the words"]


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_recorded_teacher_says_what_the_teacher_says_and_knows_no_other_clip(teacher):
    recorded, spectrogram = RecordedTeacher(teacher), torch.rand(5, 1, 192, 128).half()
    recorded.record(spectrogram[:4])
    shuffled = spectrogram[[2, 0, 3]].float()
    embedding, patches = teacher.embed_with_patches(shuffled)
    torch.testing.assert_close(recorded(shuffled), embedding)
    torch.testing.assert_close(recorded.embed_with_patches(shuffled)[1], patches, atol=1e-2, rtol=1e-3)
    with pytest.raises(KeyError):
        recorded(spectrogram[4:].float())


def test_with_circular_padding_a_student_cannot_tell_where_a_sound_is_and_with_zeros_it_can():
    torch.manual_seed(0)
    student = Student(StudentConfig(**TINY, canon_kernel=5)).eval()
    spectrogram = torch.rand(1, 1, 192, 128)
    moved = spectrogram.roll((48, 32), dims=(2, 3))
    assert not torch.allclose(student(moved), student(spectrogram), atol=1e-4)
    small_run.make_circular(student)
    torch.testing.assert_close(student(moved), student(spectrogram), atol=1e-5, rtol=1e-5)


def test_a_run_shows_each_clip_of_the_pool_once_and_gives_the_same_numbers_again(material, tiny, monkeypatch):
    seen, add = [], Learning.add
    monkeypatch.setattr(Learning, "add", lambda self, x, ids: (seen.extend(ids), add(self, x, ids))[1])
    arm = Arm(name="x", question="", pad_share=0.5)
    first = small_run.run(material, arm, 2e-3, seed=1)
    assert sorted(seen) == [(0, i) for i in range(128)]
    again = small_run.run(material, arm, 2e-3, seed=1)
    other = small_run.run(material, arm, 2e-3, seed=2)
    assert {**first, "cpu_s": 0} == {**again, "cpu_s": 0}
    assert first["whole_mse"] != other["whole_mse"]


def test_a_longer_run_is_closer_to_the_teacher_on_clips_that_it_never_saw(source, teacher, tiny):
    arm = Arm(name="x", question="", pad_share=0.0, loss={"patch": 0.0})
    short, long = (
        small_run.run(small_run.make_material(source, teacher, n, [0.0], None), arm, 4e-3, seed=0) for n in (64, 768)
    )
    assert long["whole_explained_variance"] > short["whole_explained_variance"] + 0.05


def test_of_the_pool_the_given_share_of_clips_is_cut_short_and_of_the_held_out_ones_all_or_none(material):
    def share_of_equal(one: torch.Tensor, other: torch.Tensor) -> float:
        assert one.shape == other.shape
        return float((one == other).flatten(1).all(dim=1).float().mean())

    assert 0.35 < share_of_equal(material.pools[0.0], material.pools[0.5]) < 0.65
    assert share_of_equal(material.held_out["whole"], material.held_out["padded"]) < 0.2  # some end in silence


@pytest.mark.parametrize("arm", ablate.ARMS, ids=lambda arm: arm.name)
def test_every_arm_makes_a_learning_that_differs_from_the_recipe_in_what_it_names_only(arm, material, tiny):
    learning = small_run.new_learning(material.teacher, arm, 1e-3, 0, 4096)
    recipe = small_run.new_learning(material.teacher, ablate.ARMS[0], 1e-3, 0, 4096)
    assert dataclasses.asdict(learning.model) == dataclasses.asdict(recipe.model) | dict(arm.model)
    assert dataclasses.asdict(learning.loss) == dataclasses.asdict(recipe.loss) | dict(arm.loss)
    is_same = (learning.pace.controller is recipe.pace.controller) == (arm.controller == "off")
    assert is_same and learning.pace.control == recipe.pace.control
    changes = sum(map(bool, (arm.model, arm.loss, arm.controller != "off", arm.is_circular, arm.pad_share != 0.15)))
    assert changes == (arm.name != "best")


# ------------------------------------------------------------------------------------------------------ order and table


def record(arm: str, rate: float, seed: int, value: float, cpu_s: float = 60.0) -> dict:
    return {"arm": arm, "rate": rate, "seed": seed, "cpu_s": cpu_s, "whole_explained_variance": value}


def test_an_arm_is_compared_with_another_that_is_there():
    names = [arm.name for arm in ablate.ARMS]
    assert len(set(names)) == len(names)
    assert all(arm.against in names for arm in ablate.ARMS)


def test_an_arm_tries_all_rates_with_the_first_seed_and_goes_on_with_the_best_one():
    low, middle, high = rates = (0.1, 0.2, 0.4)
    values = {(low, 0): 0.3, (middle, 0): math.nan, (high, 0): 0.2, (low, 1): 0.1, (low, 2): 0.5}
    records = [record("other", high, 0, 0.9)]
    order = []
    while missing := ablate.next_run(records, "x", rates):
        order.append(missing)
        records.append(record("x", *missing, values[missing]))
    assert order == [(low, 0), (middle, 0), (high, 0), (low, 1), (low, 2)]


def test_the_table_pairs_seeds_and_names_what_was_not_run_and_where_the_rate_lies():
    records = []
    for arm, of_seeds in (("best", [0.5, 0.1, 0.3]), ("kernel 5", [0.6, 0.25, 0.35])):
        records += [record(arm, 1e-3, 0, 0.0)] + [record(arm, 4e-3, 0, 0.0)] * (arm == "best")
        records += [record(arm, 2e-3, seed, value) for seed, value in enumerate(of_seeds)]
    records += [record("no Canon", 1e-3, 0, 0.2), *(record("positions", 2e-3, seed, 0.4) for seed in range(3))]
    text = ablate.as_markdown(records)
    # gaps 0.10, 0.15, 0.05: mean 0.1, deviation 0.05, t(0.975, 2) = 4.3027
    assert f"+0.100 ± {4.3027 * 0.05 / math.sqrt(3):.3f} |" in text
    assert "| best | 0.002 | 60 | 0.300 |" in text
    assert "| kernel 5 | 0.002 (border) | 60 | 0.400 |" in text and "| positions | 0.002 (only) |" in text
    assert "Not run: no Canon, circular padding" in text and "13 runs, 13 min" in text


def test_a_difference_has_a_star_where_its_interval_leaves_out_zero_only():
    base = {seed: record("a", 0.1, seed, value) for seed, value in enumerate([0.1, 0.5, 0.3])}
    same = {seed: record("b", 0.1, seed, value) for seed, value in enumerate([0.2, 0.61, 0.4])}
    loose = {seed: record("b", 0.1, seed, value) for seed, value in enumerate([0.2, 0.9, 0.31])}
    assert ablate.difference(same, base, "whole_explained_variance").endswith("*")
    assert not ablate.difference(loose, base, "whole_explained_variance").endswith("*")


def test_no_run_begins_after_the_budget_and_a_second_call_repeats_none(
    source, teacher, tiny, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(ablate, "ARMS", ablate.ARMS[:1])
    out = tmp_path / "runs.jsonl"
    config = ablate.Config(
        out=out, source=source, teacher=Path(teacher.name), num_clips=64, budget_minutes=1e-6, workers=1
    )
    ablate.main(config)
    assert len(ablate.records_in(out)) == 1
    ablate.main(dataclasses.replace(config, budget_minutes=60))
    done = [(r["rate"], r["seed"]) for r in ablate.records_in(out)]
    assert len(done) == len(set(done)) == 5
    assert "Not run: none" in capfd.readouterr().out
    with pytest.raises(ValueError, match="choose another --out"):
        ablate.main(dataclasses.replace(config, num_clips=128))
