"""Packs: every sample once, none too full, all alike, and the same whoever asks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_npu.data.packing import TILE, AlikePlan, TokenCounts, balanced_packs, plan_packs
from llava_npu.data.plan import Plan
from llava_npu.errors import UserError


def counts_of(tokens: list[int], images: list[int] | None = None) -> TokenCounts:
    return TokenCounts(np.array(tokens, dtype=np.int32), np.array(images or [0] * len(tokens), dtype=np.int32))


def instruction_mix(num_samples: int, seed: int = 0) -> TokenCounts:
    """Lengths like those of LLaVA's 665k: most with one image of 576 tokens, some long texts."""
    draw = np.random.default_rng(seed)
    is_text = draw.random(num_samples) < 0.06
    text = np.clip(draw.lognormal(5.0, 0.7, num_samples), 20, 1472).astype(np.int32)
    long_text = np.clip(draw.lognormal(6.6, 0.8, num_samples), 30, 2048).astype(np.int32)
    return TokenCounts(np.where(is_text, long_text, 576 + text), (~is_text).astype(np.int32))


@settings(max_examples=60)
@given(
    tokens=st.lists(st.integers(1, 200), min_size=1, max_size=60),
    batch=st.sampled_from([1, 4, 6, 12]),
    epochs=st.sampled_from([0.5, 1.0, 3.0]),
    processes=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**32),
)
def test_packs_hold_each_sample_of_a_step_once_and_never_too_many(
    tokens: list[int], batch: int, epochs: float, processes: int, seed: int
) -> None:
    plan, counts = Plan(len(tokens), batch, epochs, seed), counts_of(tokens)
    if batch % processes:
        with pytest.raises(UserError, match="not a multiple of 2 devices"):
            plan_packs(plan, counts, 256, processes)
        return
    layout = plan_packs(plan, counts, 256, processes)
    assert layout.pack_length <= 256
    seen = []
    for step in range(plan.num_steps):
        shares = [layout.share(step, rank) for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1
        packs = [pack for share in shares for pack in share]
        assert all(len(pack) and counts.tokens[pack].sum() <= layout.pack_length for pack in packs)
        samples = np.concatenate(packs)
        assert sorted(samples) == sorted(layout.alike.step(step))
        seen.append(samples)
    # In the end all are seen as often as without packing.
    expected = np.concatenate([plan.step(step) for step in range(plan.num_steps)])
    assert sorted(np.concatenate(seen)) == sorted(expected)


def test_a_step_does_not_depend_on_those_before_nor_on_the_number_of_processes() -> None:
    plan, counts = Plan(3000, 16, epochs=2, seed=3), instruction_mix(3000)
    alone, four = plan_packs(plan, counts, 4096, 1), plan_packs(plan, counts, 4096, 4)
    for step in (370, 0, 129, 128):
        expected = sorted(plan_packs(plan, counts, 4096, 1).alike.step(step))
        assert sorted(np.concatenate(alone.share(step, 0))) == expected
        assert sorted(np.concatenate([p for rank in range(4) for p in four.share(step, rank)])) == expected


@pytest.mark.parametrize(("processes", "batch", "budget"), [(1, 128, 8192), (1, 128, 16384), (8, 128, 8192)])
def test_steps_and_packs_of_an_instruction_mix_are_alike(processes: int, batch: int, budget: int) -> None:
    plan, counts = Plan(40_000, batch, seed=1), instruction_mix(40_000)
    layout = plan_packs(plan, counts, budget, processes)
    assert layout.pack_length % TILE == 0
    assert layout.fill() > 0.92
    totals, images, numbers = [], [], set()
    for step in range(plan.num_steps):
        shares = [layout.share(step, rank) for rank in range(processes)]
        numbers.add(len(shares[0]))
        totals.append(sum(counts.tokens[pack].sum() for share in shares for pack in share))
        images += [counts.images[pack].sum() for share in shares for pack in share]
        for packs in zip(*shares, strict=True):  # computed at the same time
            assert np.ptp([counts.images[pack].sum() for pack in packs]) <= 4
    assert len(numbers) <= 2  # with very few steps of one more pack
    assert np.std(totals) / np.mean(totals) < 0.01
    random_order = [counts.tokens[plan.step(step)].sum() for step in range(plan.num_steps)]
    assert np.std(totals) < np.std(random_order) / 2
    assert np.ptp(images) <= 6
    assert np.mean(images) == pytest.approx(
        counts.images.mean() * batch / (layout.packs_per_process * processes), rel=0.05
    )


def test_samples_of_each_kind_are_spread_over_the_packs() -> None:
    counts = counts_of([700] * 8 + [100] * 8, [1] * 8 + [0] * 8)
    packs = balanced_packs(np.arange(16), counts, 4)
    assert [counts.images[pack].sum() for pack in packs] == [2, 2, 2, 2]
    assert [counts.tokens[pack].sum() for pack in packs] == [1600] * 4


def test_small_data_makes_small_packs() -> None:
    layout = plan_packs(Plan(10, 4), counts_of([40] * 10), 8192, 1)
    assert layout.pack_length == 256  # 4 × 40 in whole tiles
    assert layout.packs_per_process == 1


def test_a_sample_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(UserError, match=r"pack_tokens 100: the longest sample has 120 tokens; set pack_tokens to at"):
        plan_packs(Plan(3, 1), counts_of([10, 120, 30]), 100, 1)


def test_steps_beyond_the_end() -> None:
    with pytest.raises(IndexError):
        AlikePlan(Plan(4, 2), counts_of([1, 2, 3, 4])).step(2)
