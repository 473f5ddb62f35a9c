from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.data.mixtures import MixturePart
from llava_npu.data.records import Source, fingerprint, open_records, open_sources
from llava_npu.errors import UserError


def write(folder: Path, name: str, count: int) -> Path:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"id": f"{name}{i}", "conversations": turns}) for i in range(count)))
    return path


def counts(sources: list[Source]) -> Counter[str]:
    return Counter(record.id for record in open_sources(sources))


def test_one_source_is_the_file_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "a", 5)
    assert [record.id for record in open_sources([Source(path)])] == [record.id for record in open_records(path)]


def test_weights_and_limits(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path, name, 10) for name in "abc")
    seen = counts([Source(a, weight=2), Source(b, weight=0.5), Source(c, limit=3, weight=2)])
    assert {key: value for key, value in seen.items() if key[0] == "a"} == {f"a{i}": 2 for i in range(10)}
    assert [value for key, value in seen.items() if key[0] == "b"] == [1] * 5
    assert [value for key, value in seen.items() if key[0] == "c"] == [2] * 3
    # Drawn, not the first ones, which in real files are all of one kind; and the same ones every time.
    assert {key for key in seen if key[0] == "c"} != {"c0", "c1", "c2"}
    assert counts([Source(c, limit=3)]).keys() == {key for key in seen if key[0] == "c"}
    assert counts([Source(a, limit=50)]) == counts([Source(a)])


@given(
    available=st.integers(1, 30),
    weight=st.floats(0.05, 4),
    limit=st.none() | st.integers(1, 40),
)
def test_every_taken_record_is_seen_equally_often(available: int, weight: float, limit: int | None) -> None:
    part = MixturePart(range(available), weight, limit)  # type: ignore[arg-type]
    taken = min(limit or available, available)
    wanted = round(weight * taken)
    if not wanted:
        with pytest.raises(UserError, match="less than one record"):
            part.choose()
        return
    seen = Counter(part.choose().tolist())
    assert seen.total() == wanted
    assert len(seen) == min(taken, wanted)
    assert max(seen.values()) - min(seen.values()) <= 1


def test_random_access_and_pickling(tmp_path: Path) -> None:
    mixture = open_sources([Source(write(tmp_path, "a", 3)), Source(write(tmp_path, "b", 2))])
    assert len(mixture) == 5
    assert [mixture[i].id for i in (4, 0, 3)] == ["b1", "a0", "b0"]
    assert [record.id for record in pickle.loads(pickle.dumps(mixture))[1:4]] == ["a1", "a2", "b0"]  # noqa: S301
    for outside in (5, -1):
        with pytest.raises(IndexError):
            mixture[outside]


def test_fingerprint_of_several(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", 3), write(tmp_path, "b", 2)
    assert fingerprint(a, b) != fingerprint(b, a) != fingerprint(a)
    before = fingerprint(a, b)
    b.write_text(b.read_text() + " ")
    assert fingerprint(a, b) != before
