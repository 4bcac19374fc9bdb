"""One step of learning: what a bad one leaves alone, what chunks add up to, and which targets are learned."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from hear_distill.files import UserError
from hear_distill.learning import Learning
from hear_distill.objective import Learner, LossConfig, Objective, embed, measure
from hear_distill.pace import NUM_KEPT, Pace, is_passed
from hear_distill.schedule import Control, Schedule
from hear_distill.student import Student, StudentConfig
from hear_distill.teacher import load_teacher

MODEL = StudentConfig(width=24, heads=2, blocks=1, mlp_width=24)
IDS = [(shard, clip) for shard in (3, 5) for clip in range(6)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def frozen(teacher):
    return load_teacher(teacher)


def spectrograms(num_clips: int, seed: int) -> torch.Tensor:
    """Images that differ in level and in shape, not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(num_clips, 1, 1, 1, generator=generator)
    return level + torch.randn(num_clips, 1, 192, 128, generator=generator).cumsum(dim=3) / 20


def learning_of(frozen, loss: LossConfig, is_critical: bool = False, **schedule) -> Learning:
    """A small one, whose targets were measured on the clips IDS."""
    control = Control(schedule=Schedule(**{"peak": 1e-2, "total_samples": 400, **schedule}), chunk_samples=4)
    learning = Learning(frozen, MODEL, loss, Pace(control, "off", is_critical, CPU), 0.05, seed=0)
    learning.start_with(measure(frozen, loss, [(IDS[:7], sample()[:7]), (IDS[7:], sample()[7:])], seed=0))
    return learning


def sample() -> torch.Tensor:
    return spectrograms(len(IDS), seed=1)


def step(learning: Learning, seed: int, spoiled: bool = False) -> dict[str, torch.Tensor]:
    for part in range(learning.begin_step().num_chunks):
        images = spectrograms(4, seed=100 * seed + part)
        learning.add(images * math.nan if spoiled else images, [(seed, 10 * part + i) for i in range(4)])
    return learning.finish_step()


BEST = LossConfig(patch=0.5)


def everything(learning: Learning) -> dict[str, torch.Tensor]:
    """What a step that is not taken must leave alone."""
    moments = {
        f"{i} {name}": value.clone()
        for i, state in learning.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    parts = {"learner": learning.learner.state_dict(), "ema": learning.ema.model.state_dict(), "moments": moments}
    parts |= {"noise": learning.pace.noise.state_dict(), "queue": {"rows": learning.objective.queue.rows}}
    return {f"{part} {name}": value.clone() for part, state in parts.items() for name, value in state.items()}


def test_a_step_that_is_not_finite_leaves_weights_moments_average_queue_and_noise_and_books_its_clips(frozen):
    learning = learning_of(frozen, BEST)
    for seed in range(3):
        step(learning, seed)
    before = everything(learning)
    step(learning, 3, spoiled=True)
    after = everything(learning)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert learning.watch.counts() == {"skipped_steps": 1, "skipped_clips": 8, "loss_spikes": 0}
    assert (learning.step, learning.samples) == (4, 32)
    step(learning, 4)
    changed = {name for name, value in everything(learning).items() if not torch.equal(before[name], value)}
    assert {name.split()[0] for name in changed} == {"learner", "ema", "moments", "noise", "queue"}


def test_two_chunks_have_the_gradient_of_their_clips_in_one(frozen):
    """With a queue the loss of a clip does not see its neighbours, so no chunk does."""
    images, ids = spectrograms(8, seed=9), [(9, i) for i in range(8)]
    gradients = []
    for size in (4, 8):
        learning = learning_of(frozen, BEST)
        learning.pace.control = replace(learning.pace.control, chunk_samples=size)
        learning.begin_step()
        for begin in range(0, 8, size):
            learning.add(images[begin : begin + size], ids[begin : begin + size])
        learning.gradients.finish()
        gradients.append([p.grad for p in learning.learner.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("is_critical", [False, True])
def test_a_step_keeps_what_is_large_of_its_chunks_only_where_it_looks_for_the_critical_rate(frozen, is_critical):
    """Else a batch that a controller has grown would need more memory than the first one."""
    learning = learning_of(frozen, BEST, is_critical, warmup_samples=0)
    learning.pace.control = replace(learning.pace.control, check_samples=16)  # at every second step
    for looks in (False, is_critical):
        step(learning, int(looks))
        kept = [(chunk.spectrogram is not None, chunk.targets.patches is not None) for chunk in learning.chunks]
        assert kept == [(looks, looks)] * 2
    assert len(learning.pace.training.probes) == is_critical


def test_the_queue_changes_after_the_step_and_takes_the_clips_of_all_chunks(frozen):
    learning = learning_of(frozen, BEST)
    before = learning.objective.queue.rows.clone()
    learning.begin_step()
    images = [spectrograms(4, seed=20 + part) for part in range(2)]
    for part in range(2):
        learning.add(images[part], [(20, 10 * part + i) for i in range(4)])
        assert torch.equal(learning.objective.queue.rows, before)
    learning.finish_step()
    raw = embed(frozen, torch.cat(images), with_patches=False)[0]
    expected = (raw - learning.objective.statistics.mean) / learning.objective.statistics.scale
    torch.testing.assert_close(learning.objective.queue.rows[:8], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(learning.objective.queue.rows[8:], before[8:])


def test_a_clip_of_the_sample_gets_the_target_that_was_measured_until_it_was_trained_on(frozen):
    learning = learning_of(frozen, BEST)
    objective, other = learning.objective, spectrograms(3, seed=5)
    expected = objective.known[[4, 9]].clone()
    found = objective.targets_of(other, [IDS[4], (77, 0), IDS[9]]).embedding
    assert torch.equal(found[[0, 2]], expected)  # though these images are others
    torch.testing.assert_close(found[1], objective.targets_of(other, [(1, 1), (77, 0), (1, 2)]).embedding[1])
    objective.finish_step(objective.targets_of(other).embedding, [IDS[4]], torch.ones(()))
    assert not torch.equal(objective.targets_of(other, [IDS[4], (77, 0), IDS[9]]).embedding[0], expected[0])
    assert len(objective.state_dict()["known"]) == len(IDS) - 1


def test_the_teacher_is_not_asked_where_all_is_known(frozen):
    learning = learning_of(frozen, LossConfig())
    asked = copy.copy(learning.objective)
    asked.teacher = None
    assert torch.equal(asked.targets_of(sample()[:2], IDS[:2]).embedding, learning.objective.known[:2])


def test_a_state_that_is_taken_up_gives_the_same_targets_and_losses(frozen):
    loss = LossConfig(patch=0.5, prototype=0.0)
    first = learning_of(frozen, loss)
    step(first, 1)
    objective = Objective(frozen, loss, first.objective.state_dict(), CPU)
    assert objective.weights == first.objective.weights
    images, ids = spectrograms(4, seed=6), [*IDS[:2], (9, 9), (9, 8)]
    ours, theirs = (o.targets_of(images, ids) for o in (objective, first.objective))
    assert torch.equal(ours.embedding, theirs.embedding) and torch.equal(ours.patches, theirs.patches)
    losses = [o.losses_of(first.learner, images, ours, 0.9) for o in (objective, first.objective)]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[1])


def test_a_resumed_run_has_the_weight_decay_that_is_asked_for_now(frozen):
    first = learning_of(frozen, BEST)
    step(first, 1)
    resumed = Learning(frozen, MODEL, BEST, Pace(first.pace.control, "off", False, CPU), weight_decay=0.5, seed=0)
    resumed.load_state_dict(first.state_dict())
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize("num_clips", [0, 1])
def test_the_critical_rate_is_not_looked_for_on_too_few_clips(frozen, num_clips):
    with pytest.raises(UserError, match=f"two clips or more in the anchor.*found {num_clips}; take --warmup linear"):
        learning_of(frozen, BEST, is_critical=True).hold_out(spectrograms(num_clips, seed=1))


def test_the_patch_term_fades_over_the_last_fifth(frozen):
    learning = learning_of(frozen, BEST)
    images = spectrograms(4, seed=7)
    targets = learning.objective.targets_of(images)
    with torch.no_grad():
        losses = [learning.objective.losses_of(learning.learner, images, targets, p) for p in (0.5, 0.9)]
    assert float(losses[0]["loss"] - losses[1]["loss"]) == pytest.approx(0.25 * float(losses[0]["patch"]), rel=1e-3)


def test_the_learner_predicts_tokens_beside_the_embedding_of_their_mean():
    learner = Learner(Student(MODEL), token_width=40)
    images = spectrograms(3, seed=0)
    embedding, patches = learner(images)
    tokens = learner.student.tokens(images)
    torch.testing.assert_close(embedding, learner.student.project(learner.student(images)))
    torch.testing.assert_close(patches[1, 17], learner.patch_head.weight @ tokens[1, 17] + learner.patch_head.bias)
    assert Learner(Student(MODEL), None)(images)[1] is None


# ---- the pace ----


def test_a_multiple_is_passed_once_whatever_the_steps():
    seen, passed = 0, []
    for batch in (3, 7, 10, 1, 29, 50):
        if is_passed(seen, seen + batch, 10):
            passed.append(seen + batch)
        seen += batch
    assert passed == [10, 20, 50, 100]


def test_a_critical_warm_up_leaves_weights_and_moments_as_they_are_and_sets_the_peak(frozen):
    """The probing step against the same step without the look."""
    loss = LossConfig()
    plain = learning_of(frozen, loss, warmup_samples=8 * NUM_KEPT)
    looking = learning_of(frozen, loss, is_critical=True, warmup_samples=8 * NUM_KEPT)
    looking.held_out = spectrograms(4, seed=50)
    for seed in range(4):
        for learning in (plain, looking):
            learning.begin_step()
        assert plain.plan == looking.plan or looking.pace.held_out.value()[0] > 0
        looking.plan = plain.plan  # the same rate, to compare
        for learning in (plain, looking):
            for part in range(2):
                learning.add(spectrograms(4, seed=10 * seed + part), [(seed, part)] * 4)
            learning.finish_step()
    assert len(looking.pace.held_out.probes) == 4 and not looking.pace.training.probes
    for name, value in plain.learner.state_dict().items():
        assert torch.equal(value, looking.learner.state_dict()[name]), name


def test_the_peak_is_half_of_the_held_out_critical_rate_and_stays_under_the_ceiling():
    schedule = Schedule(peak=1e-3, total_samples=1000, warmup_samples=100)
    pace = Pace(Control(schedule=schedule, chunk_samples=4), "off", True, CPU)
    assert pace.plan(500).rate == 1e-3
    pace.held_out.probes = [[2.0, 100.0], [2.2, 110.0], [1.8, 90.0], [2.0, 101.0]]  # 2 x 2 / 100.25
    assert pace.plan(500).rate == pytest.approx(2 / 100.25)
    pace.training.probes = [[1.0, 1000.0], [1.1, 1010.0], [0.9, 990.0], [1.0, 1000.0]]
    assert pace.plan(500).rate == pytest.approx(0.8 * 2e-3)
    resumed = Pace(Control(schedule=schedule, chunk_samples=4), "off", True, CPU)
    resumed.load_state_dict(pace.state_dict())
    assert resumed.plan(700) == pace.plan(700)


def test_a_warm_up_that_ends_without_a_critical_rate_says_once_what_is_the_peak_instead(capsys):
    schedule = Schedule(peak=3e-3, total_samples=1000, warmup_samples=100)
    looking, linear = (Pace(Control(schedule=schedule, chunk_samples=4), "off", way, CPU) for way in (True, False))
    looking.held_out.probes = [[2.0, -1.0], [2.0, 1.0], [2.0, 0.5]]
    looking.plan(99)
    assert capsys.readouterr().out == ""
    assert [looking.plan(samples).rate for samples in (100, 104, 500)] == [3e-3] * 3
    assert linear.plan(100).rate == 3e-3
    said = capsys.readouterr().out
    assert said.startswith("WARNING: 3 looks") and said.endswith("--schedule.peak 0.003 stays the peak\n")
    assert said.count("\n") == 1
    looking.held_out.probes = [[2.0, 100.0], [2.2, 110.0], [1.8, 90.0], [2.0, 101.0]]
    looking.has_warned = False
    assert looking.plan(100).rate == pytest.approx(2 / 100.25) and capsys.readouterr().out == ""


@pytest.mark.parametrize("controller", ["off", "ema-batch", "batch", "seesaw"])
def test_the_noise_is_measured_under_every_controller_and_seen_by_it_at_log_points_only(controller):
    control = Control(schedule=Schedule(total_samples=10**6), chunk_samples=8, check_samples=1)
    pace, generator = Pace(control, controller, False, CPU), torch.Generator().manual_seed(0)
    for _ in range(200):
        gradients = 1 + 8 * torch.randn(2, 8, 50, generator=generator).mean(dim=1)  # noise batch 64
        squared = gradients.square().sum(dim=1)
        pace.measure(torch.stack([squared, squared]), gradients.mean(dim=0).square().sum().repeat(2))
    assert math.isnan(pace.noise_batch)
    before = pace.plan(10)
    assert pace.plan(10) == before
    values = pace.look()
    assert values["noise_batch"] == pytest.approx(64, rel=0.3)
    resumed = Pace(control, controller, False, CPU)
    resumed.load_state_dict(pace.state_dict())
    assert resumed.noise_batch == pace.noise_batch == values["noise_batch"]
    assert resumed.plan(20) == pace.plan(20)
    assert resumed.state_dict()["controller"] == pace.state_dict()["controller"]
