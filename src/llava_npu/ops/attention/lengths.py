"""Lengths of packed sequences, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Lengths:
    """How many queries and keys each packed sequence has.

    Host integers, hashable: what a device needs of them (cumulative sums, as integers on an Ascend and as a tensor on
    a GPU) is made from them there and may be cached.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]

    def check(self, tokens: int, key_tokens: int) -> None:
        """Raises `ValueError` unless the lengths describe that many tokens."""
        if len(self.query) != len(self.key):
            raise ValueError(f"packed attention: {len(self.query)} query lengths but {len(self.key)} key lengths")
        for name, lengths, total in (("sequence_lengths", self.query, tokens), ("key_lengths", self.key, key_tokens)):
            if any(length < 0 for length in lengths) or sum(lengths) != total:
                raise ValueError(
                    f"packed attention: {name} {_abbreviated(lengths)} add up to {sum(lengths)}, but there are {total} "
                    "tokens. Every token belongs to a sequence: give padding at the end a sequence of its own."
                )

    @property
    def uniform(self) -> bool:
        """Whether all sequences have as many queries, and all as many keys."""
        return len(set(self.query)) <= 1 and len(set(self.key)) <= 1

    @property
    def cumulative_query(self) -> tuple[int, ...]:
        return tuple(accumulate(self.query))

    @property
    def cumulative_key(self) -> tuple[int, ...]:
        return tuple(accumulate(self.key))

    def fully_masked(self, causal: bool) -> tuple[int, ...]:
        """How many queries at the start of each sequence see no key."""
        if causal:
            return tuple(max(0, query - key) for query, key in zip(self.query, self.key, strict=True))
        return tuple(query if key == 0 else 0 for query, key in zip(self.query, self.key, strict=True))

    def without_queries(self, dropped: tuple[int, ...]) -> Lengths:
        return Lengths(tuple(query - drop for query, drop in zip(self.query, dropped, strict=True)), self.key)

    def without_empty(self) -> Lengths:
        """Leaves out sequences that have neither queries nor keys."""
        pairs = [(query, key) for query, key in zip(self.query, self.key, strict=True) if query or key]
        return Lengths(tuple(query for query, _ in pairs), tuple(key for _, key in pairs))

    def in_groups(self, most: int) -> list[Lengths]:
        """In groups of at most that many sequences, in order."""
        starts = range(0, len(self.query), most)
        return [Lengths(self.query[start : start + most], self.key[start : start + most]) for start in starts]


def _abbreviated(lengths: tuple[int, ...], shown: int = 8) -> str:
    head = ", ".join(str(length) for length in lengths[:shown])
    return f"({head}, … {len(lengths)} in all)" if len(lengths) > shown else f"({head})"
