"""How far each of some prompts is to be continued, and whether what is known of one is enough."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from expunge.evaluate.generate import Settled, last_asked
from expunge.evaluate.tables import Generation


@dataclass(frozen=True)
class Asked:
    """So many tokens after each prompt, whose row has a key, unless `settled` says otherwise."""

    keys: Sequence[str]
    max_new_tokens: int
    settled: Settled | None

    def serves(self, number: int, row: dict[str, Any]) -> bool:
        """Whether a row of the table is all that is asked of a prompt."""
        tokens = row["tokens"]
        if row["complete"] or len(tokens) >= self.max_new_tokens:
            return True
        asked = last_asked(len(tokens))
        return self.settled is not None and asked > 0 and self.settled(number, tokens[:asked])

    def stops(self, number: int, tokens: list[int]) -> bool:
        """Whether nobody who asks for this prompt needs more."""
        asking = self._alike[self.keys[number]]
        return self.settled is not None and all(self.settled(i, tokens) for i in asking)

    def taken(self, row: dict[str, Any]) -> Generation:
        """What is asked of a row that may hold more."""
        tokens = row["tokens"][: self.max_new_tokens]
        return Generation(list(tokens), row["complete"] or len(tokens) == self.max_new_tokens)

    @cached_property
    def _alike(self) -> dict[str, list[int]]:
        """The numbers of equal prompts."""
        found: dict[str, list[int]] = defaultdict(list)
        for number, key in enumerate(self.keys):
            found[key].append(number)
        return found
