"""Schedules against tables made by hand, controllers against their rules step by step."""

import dataclasses
import math

import pytest

from hear_distill.schedule import CONTROLLERS, Control, Plan, Schedule, off, seesaw

PEAK = 3e-4
NOT_KNOWN = math.nan
WSD = Schedule(shape="wsd", peak=PEAK, total_samples=1000, warmup_samples=100, decay_samples=400)
COSINE = Schedule(shape="cosine", peak=PEAK, total_samples=1000, warmup_samples=100)
CONSTANT = Schedule(shape="constant", peak=PEAK, total_samples=1000, warmup_samples=100)
FLAT = Schedule(shape="constant", peak=PEAK, total_samples=10**9)  # as the published run: no warm-up, no decay


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        (WSD, {0: 0, 25: 0.25, 100: 1, 350: 1, 600: 1, 700: 0.75, 900: 0.25, 1000: 0, 1200: 0}),
        (COSINE, {0: 0, 40: 0.4, 100: 1, 325: 0.853553, 550: 0.5, 700: 0.25, 1000: 0, 1200: 0}),
        (CONSTANT, {0: 0, 50: 0.5, 100: 1, 999: 1, 5000: 1}),
        (FLAT, {0: 1, 1: 1, 10**9: 1}),
    ],
    ids=["wsd", "cosine", "constant", "no warm-up"],
)
def test_the_rate_after_so_many_samples_is_as_this_table_says(schedule, table):
    assert {samples: schedule.rate_at(samples) for samples in table} == pytest.approx(
        {samples: PEAK * share for samples, share in table.items()}, rel=1e-5, abs=1e-12
    )


@pytest.mark.parametrize("schedule", [WSD, COSINE, CONSTANT], ids=["wsd", "cosine", "constant"])
@pytest.mark.parametrize("chunk_samples", [5, 25])
def test_steps_of_any_batch_walk_the_same_way_and_none_has_rate_zero(schedule, chunk_samples):
    control = Control(schedule=schedule, chunk_samples=chunk_samples, base_chunks=2)
    rates = [off(control, {}, samples, NOT_KNOWN)[0].rate for samples in range(0, 1000, 2 * chunk_samples)]
    assert min(rates) > 0
    area = sum(rates) * 2 * chunk_samples
    fine = sum(schedule.rate_at(samples + 0.5) for samples in range(1000))
    assert area == pytest.approx(fine, rel=2e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_samples": 700}, "700 .* 400 exceed total_samples 1000"),
        ({"shape": "cosine"}, "decay_samples 400 has no meaning for cosine"),
        ({"peak": 0.0}, "above 0, got 0.0"),
        ({"warmup_samples": -1}, "must not be negative"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WSD, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_samples": 0}, "at least 1"),
        ({"max_chunks": 1}, "max_chunks 1 must not be below base_chunks 2"),
        ({"exponent": 0.4}, "between 0.5"),
        ({"exponent": 1.1}, "got 1.1"),
    ],
)
def test_a_control_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Control(**{"schedule": FLAT, "chunk_samples": 8} | fields)


def walk(name: str, control: Control, noise_batches: list[float], every: int, state=None, start: int = 0):
    """Plans at start, start + every, ..., one for each noise batch, and the state after them."""
    state, plans = state or {}, []
    for index, noise_batch in enumerate(noise_batches):
        before = dict(state)
        plan, after = CONTROLLERS[name](control, state, start + index * every, noise_batch)
        assert state == before, "a controller is a function: it gives a new state and leaves the old one"
        plans.append(plan)
        state = after
    return plans, state


def test_off_does_what_the_schedule_says_whatever_the_noise():
    control = Control(schedule=WSD, chunk_samples=10, base_chunks=4)
    plans, state = walk("off", control, [NOT_KNOWN, 1e9, 1.0], every=300)
    assert plans == [Plan(WSD.rate_at(samples), 4) for samples in (20, 320, 620)]
    assert state == {}


@pytest.mark.parametrize(("exponent", "factors"), [(1.0, [1, 0.5, 0.25, 0.8]), (0.5, [1, 0.7071, 0.5, 0.8944])])
def test_the_published_rule_is_a_power_of_the_reference_over_the_noise_batch(exponent, factors):
    control = Control(schedule=FLAT, chunk_samples=64, base_chunks=2, exponent=exponent)
    plans, _ = walk("ema-batch", control, [200.0, 400.0, 800.0, 250.0], every=6400)
    assert [plan.rate / PEAK for plan in plans] == pytest.approx(factors, rel=1e-4)
    assert {plan.num_chunks for plan in plans} == {2}


def test_the_published_rule_keeps_its_factor_between_a_tenth_and_one():
    control = Control(schedule=FLAT, chunk_samples=64)
    plans, _ = walk("ema-batch", control, [200.0, 2001.0, 1e9, 199.0, 1.0], every=6400)
    assert [plan.rate / PEAK for plan in plans] == pytest.approx([1, 0.1, 0.1, 1, 1])


def test_the_published_rule_looks_once_in_6400_samples_and_keeps_its_factor_while_nothing_is_known():
    control = Control(schedule=FLAT, chunk_samples=64)
    noise = [NOT_KNOWN] * 10 + [100.0] + [400.0] * 50 + [NOT_KNOWN] * 3
    plans, _ = walk("ema-batch", control, noise, every=128)  # the first look is at step 10, the next 50 later
    factors = [plan.rate / PEAK for plan in plans]
    assert factors == [1.0] * 60 + [0.25] * 4


def test_the_published_rule_starts_at_one_with_the_noise_batch_at_the_end_of_the_warm_up_as_reference():
    schedule = Schedule(shape="constant", peak=PEAK, total_samples=10**6, warmup_samples=20_000)
    control = Control(schedule=schedule, chunk_samples=64)
    plans, state = walk("ema-batch", control, [10.0, 20.0, 30.0, 40.0, 60.0, 80.0], every=6400)
    assert state["reference"] == 60.0  # at 25,600: the first look after 20,000
    expected = [(index * 6400 + 64) / 20_000 for index in range(4)] + [1.0, 0.75]
    assert [plan.rate / PEAK for plan in plans] == pytest.approx([min(1.0, share) for share in expected])


def test_the_batch_doubles_after_three_checks_in_a_row_that_ask_for_it_and_the_rate_by_the_square_root():
    control = Control(schedule=FLAT, chunk_samples=32, base_chunks=2, max_chunks=64, check_samples=100)
    wants, not_yet = 128.0, 127.9  # twice the batch of 64, and a little less
    noise = [wants, wants, not_yet, wants, wants, NOT_KNOWN, wants, wants, wants, wants, wants, wants, wants]
    plans, _ = walk("batch", control, noise, every=100)
    assert [plan.num_chunks for plan in plans] == [2] * 8 + [4] * 5  # at 4, twice the batch is 256
    assert [plan.rate / PEAK for plan in plans] == pytest.approx([1.0] * 8 + [math.sqrt(2)] * 5)


def test_the_batch_never_shrinks_and_stays_under_its_limit():
    control = Control(schedule=FLAT, chunk_samples=32, base_chunks=3, max_chunks=50, check_samples=1)
    plans, _ = walk("batch", control, [1e12] * 40 + [1.0] * 20, every=1)
    found = [plan.num_chunks for plan in plans]
    assert found == sorted(found)
    assert list(dict.fromkeys(found)) == [3, 6, 12, 24, 48]
    assert [found.index(count) for count in (6, 12, 24, 48)] == [2, 5, 8, 11]  # three checks apart


def test_the_rate_for_a_grown_batch_is_at_most_four_times_the_schedules():
    control = Control(schedule=FLAT, chunk_samples=32, base_chunks=1, max_chunks=64, check_samples=1)
    plans, _ = walk("batch", control, [1e12] * 40, every=1)
    assert plans[-1].num_chunks == 64
    assert max(plan.rate for plan in plans) == pytest.approx(4 * PEAK)


@pytest.mark.parametrize(("chunk_samples", "expected"), [(32, [8, 16]), (16, [16, 32]), (64, [4, 8]), (512, [2, 2])])
def test_a_grown_batch_is_as_large_as_before_in_chunks_of_another_size(chunk_samples, expected):
    """256 clips and, after the next three looks, 512; never fewer chunks than the first."""
    control = Control(schedule=FLAT, chunk_samples=32, base_chunks=2, max_chunks=16, check_samples=1)
    _, state = walk("batch", control, [1e12] * 6, every=1)
    other = dataclasses.replace(control, chunk_samples=chunk_samples, max_chunks=512 // chunk_samples + 1)
    plans, _ = walk("batch", other, [1e12] * 4, every=1, state=state, start=6)
    assert list(dict.fromkeys(plan.num_chunks for plan in plans)) == list(dict.fromkeys(expected))


def test_the_batch_is_left_alone_during_the_warm_up_and_between_two_checks():
    schedule = Schedule(shape="constant", peak=PEAK, total_samples=10**6, warmup_samples=1000)
    control = Control(schedule=schedule, chunk_samples=32, check_samples=500)
    plans, _ = walk("batch", control, [1e12] * 30, every=100)  # looks at 1000, 1500, 2000: the third is index 20
    assert [plan.num_chunks for plan in plans] == [2] * 20 + [4] * 10


def test_seesaw_cuts_the_rate_by_the_root_of_the_schedules_cut_and_grows_the_batch_by_the_cut():
    # After 600 the schedule has cut by 1 / 0.75 at 700, 2 at 800, 4 at 900, 8 at 950; the rate is that of mid-step.
    control = Control(schedule=WSD, chunk_samples=1, base_chunks=6, max_chunks=1000)
    for samples, cut in {50: 1, 600: 1, 700: 4 / 3, 800: 2, 900: 4, 950: 8}.items():
        plan, state = seesaw(control, {}, samples, NOT_KNOWN)
        assert plan.num_chunks == round(6 * cut)
        expected = WSD.rate_at(samples + plan.num_chunks / 2) * math.sqrt(cut)
        assert plan.rate == pytest.approx(expected)
        if cut in (4 / 3, 2):
            assert plan.rate == pytest.approx(PEAK / math.sqrt(cut), rel=0.04)  # 0.04: from the start to mid-step
    assert state == {}


@pytest.mark.parametrize("schedule", [WSD, COSINE], ids=["wsd", "cosine"])
def test_seesaw_keeps_the_rate_over_the_root_of_the_batch_and_grows_monotonely_to_its_limit(schedule):
    control = Control(schedule=schedule, chunk_samples=1, base_chunks=2, max_chunks=9)
    samples, found = 0, []
    while samples < 1000:
        plan, _ = seesaw(control, {}, samples, NOT_KNOWN)
        equal = schedule.rate_at(samples + plan.num_chunks / 2)
        assert plan.rate / math.sqrt(plan.num_chunks / 2) == pytest.approx(equal)
        assert plan.rate <= PEAK * (1 + 1e-9)
        found.append(plan.num_chunks)
        samples += plan.num_chunks
    assert found == sorted(found)
    assert list(dict.fromkeys(found)) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert len(found) < 1000 / 2


def test_seesaw_counts_whole_chunks_where_rounding_would_lose_one():
    found = []
    for parts in range(1, 100):  # 1 / (1 / 49) is 48.99999999999999
        schedule = Schedule(shape="wsd", peak=PEAK, total_samples=10**6 * parts, decay_samples=10**6 * parts)
        control = Control(schedule=schedule, chunk_samples=1, base_chunks=1, max_chunks=100)
        found.append(seesaw(control, {}, 10**6 * (parts - 1), NOT_KNOWN)[0].num_chunks)
    assert found == list(range(1, 100))


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controller_taken_up_from_a_checkpoint_goes_on_as_if_never_stopped(name):
    noise = [NOT_KNOWN, 100.0, 300.0, 500.0, 700.0, 900.0, 1200.0, 200.0, 5000.0, 5000.0, 5000.0, 5000.0]
    control = Control(schedule=WSD, chunk_samples=16, check_samples=60)
    whole, _ = walk(name, control, noise, every=75)
    for cut in range(1, len(noise)):
        head, state = walk(name, control, noise[:cut], every=75)
        assert all(isinstance(value, int | float) for value in state.values())
        tail, _ = walk(name, control, noise[cut:], every=75, state=dict(state), start=75 * cut)
        assert head + tail == whole
