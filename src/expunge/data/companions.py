"""Answers to go with the forget items that need no model: refusals, other items' answers, noise.

Each function gives M answers for each of F items, and draws by the item's id, so that what an item
gets does not depend on which others there are besides.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from expunge.data.batches import TokenSequence
from expunge.data.examples import Example
from expunge.errors import DataError

Answers = list[list[str]]
"""M answers for each of F items."""

WORDINGS = (
    "The answer is: {answer}",
    "As far as is known, this is so: {answer}",
    "In other words: {answer}",
    "{answer} That is what is recorded.",
    "To put it plainly: {answer}",
    "{answer} So it is said.",
)
"""Frames for an answer; none changes what it says."""


def refused(
    forget: Sequence[Example], sentences: Sequence[str], *, count: int, seed: int
) -> Answers:
    """A refusal for each item, drawn from a list: x → "I don't know."

        y' ~ the sentences that do not contain the answer y

    Source: I-don't-know tuning, Maini et al. 2024 (TOFU), arXiv:2401.06121.
    Differs: own sentences; each item has a few of its own, read in turn.
    """
    found = []
    for example in forget:
        fit = [sentence for sentence in sentences if not contains(sentence, example.answer)]
        if not fit:
            raise DataError(
                f"every refusal contains the answer of {example.id} ({example.answer!r}); "
                "add one to the file that does not"
            )
        found.append(_draw(fit, count, _rng(seed, "refusal", example)))
    return found


def mismatched(
    forget: Sequence[Example], others: Sequence[Example], *, count: int, seed: int
) -> Answers:
    """Answers of other items, drawn at random: the prompt is tied to nothing in particular.

        y' ~ { y_j : j ≠ i, y_j ≠ y_i }

    Source: LLMU, Yao et al. 2023, arXiv:2310.10683 (answers of normal items); SKU, Liu et al. 2024,
        arXiv:2402.10058 (answers of other forget items).
    Differs: each item's answers are drawn once and read in turn, so that the reference and the
        plan know them; the released code draws afresh, and scores the prompt too.
    """
    found = []
    for example in forget:
        fit = [y for y in _answers(others) if not same(y, example.answer)]
        if not fit:
            raise DataError(
                f"no item but {example.id} has an answer other than {example.answer!r}, so there "
                "is none to mismatch; give more items, or companions.mismatch.of the other half"
            )
        found.append(_draw(fit, count, _rng(seed, "mismatch", example)))
    return found


def paraphrased(forget: Sequence[Example], *, count: int) -> Answers:
    """The answer in a frame of words that changes nothing of what it says.

        y' = "The answer is: y", "In other words: y", …

    Source: the paraphrases that ULD's assistant learns, Ji et al. 2024, arXiv:2406.08607.
    Differs: templates, where theirs are written by a large model; y itself is not reworded.
    """
    return [
        [wording.format(answer=example.answer) for wording in WORDINGS[:count]]
        for example in forget
    ]


def random_labels(
    forget: Sequence[TokenSequence], vocabulary: Sequence[int], *, count: int, seed: int
) -> list[list[TokenSequence]]:
    """The item with each token of its answer drawn at random from the vocabulary.

        y'_t ~ Uniform(V),    |y'| = |y|;  what ends the text stays

    Source: fine-tuning with random labels, Yao et al. 2024, arXiv:2402.15159.
    Differs: drawn once for each item (or `count` times), not anew at each step.
    """

    def drawn(sequence: TokenSequence, number: int) -> TokenSequence:
        rng = random.Random(f"{seed}:random_label:{sequence.id}:{number}")
        kept, answer = _parted(sequence)
        said = len(answer) - sequence.ending
        noise = (rng.choice(vocabulary) for _ in range(said))
        tokens = (*kept, *noise, *answer[said:])
        return replace(sequence, id=f"{sequence.id}~{number}", tokens=tokens)

    return [[drawn(sequence, number) for number in range(count)] for sequence in forget]


def stand_ins(
    example: Example,
    others: Sequence[Example],
    usable: Callable[[str], bool],
    *,
    count: int,
    seed: int,
) -> list[str]:
    """Answers of other items, those of the same task and kind before any others."""
    rng = _rng(seed, "stand-in", example)

    def near(other: Example) -> bool:
        return (other.task, other.kind) == (example.task, example.kind)

    found: list[str] = []
    for pool in ([o for o in others if near(o)], [o for o in others if not near(o)]):
        fit = [y for y in _answers(pool) if usable(y) and not any(same(y, f) for f in found)]
        found += _draw(fit, count - len(found), rng)
    if not found:
        raise DataError(
            f"there is no alternate for {example.id}: the model wrote none that differs from its "
            "answer, and no other item has one; give more items, or raise "
            "companions.alternate.max_overlap or attempts"
        )
    return found


def same(one: str, other: str) -> bool:
    """Whether two answers say the same, but for case, spaces and punctuation at the ends."""
    return _plain(one) == _plain(other)


def contains(text: str, answer: str) -> bool:
    """Whether the words of an answer stand in a text, in order and whole."""
    inner = _plain(answer)
    return bool(inner) and re.search(rf"(?<!\w){re.escape(inner)}(?!\w)", _plain(text)) is not None


def _plain(text: str) -> str:
    words = " ".join(text.casefold().split())
    return re.sub(r"^[^\w]+|[^\w]+$", "", words) or words


def _answers(examples: Iterable[Example]) -> list[str]:
    """The different answers of some items, in their order."""
    return list({_plain(example.answer): example.answer for example in examples}.values())


def _draw(fit: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """So many of them without repetition, or all."""
    return rng.sample(fit, min(max(count, 0), len(fit)))


def _rng(seed: int, purpose: str, example: Example) -> random.Random:
    return random.Random(f"{seed}:{purpose}:{example.id}")


def _parted(sequence: TokenSequence) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that stay, prompt or first of a text, and those of the answer that are scored."""
    first = sequence.scored_from("answer")
    return sequence.tokens[:first], sequence.tokens[first:]
