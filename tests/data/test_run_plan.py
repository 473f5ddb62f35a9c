from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.data.plan import Plan, micro_batches, plan_order
from llava_npu.errors import UserError


@given(
    num_samples=st.integers(1, 40),
    batch=st.integers(1, 50),
    epochs=st.sampled_from([0.3, 1.0, 1.5, 3.0]),
    seed=st.integers(0, 2**32),
)
def test_every_sample_is_seen_equally_often(num_samples: int, batch: int, epochs: float, seed: int) -> None:
    plan = Plan(num_samples, batch, epochs, seed)
    steps = [plan.step(i) for i in range(plan.num_steps)]
    assert all(step.shape == (batch,) for step in steps)
    order = np.concatenate(steps)
    wanted = int(np.ceil(num_samples * epochs))
    assert wanted <= len(order) < wanted + batch
    counts = np.bincount(order, minlength=num_samples)
    assert len(counts) == num_samples
    assert counts.max() - counts.min() <= 1
    for start in range(0, len(order) - num_samples + 1, num_samples):
        assert sorted(order[start : start + num_samples]) == list(range(num_samples))


def test_a_step_does_not_depend_on_those_before() -> None:
    plan = Plan(10, 4, epochs=3, seed=7)
    forward = [plan.step(i).tolist() for i in range(plan.num_steps)]
    assert [plan.step(i).tolist() for i in reversed(range(plan.num_steps))] == forward[::-1]
    assert np.concatenate(forward).tolist() == plan_order(10, 7, 0, 4 * plan.num_steps).tolist()


def test_order_differs_by_epoch_and_seed() -> None:
    orders = [tuple(plan_order(50, seed, 50 * epoch, 50)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_order_is_fixed_for_ever() -> None:
    """A stored checkpoint counts on it: changing the order is changing every unfinished run."""
    assert plan_order(8, 42, 0, 16).tolist() == ORDER


ORDER = [4, 1, 3, 6, 0, 7, 2, 5, 1, 2, 5, 3, 6, 0, 4, 7]  # seed 42, two epochs of eight samples


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 1), (2, 3), (4, 3), (3, 2)])
def test_micro_batches_share_out_the_batch(world_size: int, micro: int) -> None:
    batch = plan_order(100, 0, 0, 12)
    shares = [micro_batches(batch, rank, world_size, micro) for rank in range(world_size)]
    assert {share.shape for share in shares} == {(12 // (world_size * micro), micro)}
    assert np.stack(shares, axis=1).reshape(-1).tolist() == batch.tolist()


def test_uneven_batch() -> None:
    with pytest.raises(UserError, match=r"global batch size 10 .* 2 device\(s\) × micro batch 3; use 6 or 12"):
        micro_batches(np.arange(10), 0, 2, 3)


@pytest.mark.parametrize(
    "arguments",
    [(0, 1), (5, 0), (5, 1, 0.0), (5, 1, -1.0), (5, 1, float("nan")), (5, 1, float("inf")), (5, 1, 1.0, -1)],
)
def test_impossible_plans(arguments: tuple[float, ...]) -> None:
    with pytest.raises(UserError):
        Plan(*arguments)  # type: ignore[arg-type]


def test_steps_beyond_the_end() -> None:
    with pytest.raises(IndexError):
        Plan(4, 2).step(2)
