"""The sets beside forget and retain, as training takes them.

Dimensions: F forget items, M companions of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from expunge.companions.alternates import write_alternates
from expunge.data.batches import TokenSequence
from expunge.data.companions import Answers, mismatched, paraphrased, random_labels, refused
from expunge.data.examples import Example
from expunge.data.refusals import read_refusals
from expunge.data.sets import Sets
from expunge.needs import BOTH, FORGET, Needs
from expunge.unlearn.companions import Companions, CompanionSet
from expunge.unlearn.sets import Half

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Making:
    """What the sets are made of."""

    sets: Sets
    forget: Sequence[TokenSequence]
    config: Companions
    encode: Callable[[list[Example]], list[TokenSequence]]
    tokenizer: PreTrainedTokenizerBase
    alternates: Answers | None = None
    """What the target wrote, where a set needs it."""


def companion_sets(halves: Iterable[Half], making: Making) -> dict[Half, CompanionSet]:
    """Those of `halves` that are neither forget nor retain, ready for training."""
    return {half: COMPANIONS[half].make(making) for half in halves if half in COMPANIONS}


def paired(wins: CompanionSet, forget: Sequence[TokenSequence]) -> CompanionSet:
    """Pairs of a wanted answer and the true one: (x, y') and (x, y).

    Source: direct preference optimization, Rafailov et al. 2023, arXiv:2305.18290; as unlearning,
        IdkDPO (Maini et al. 2024, arXiv:2401.06121) and AltPO (arXiv:2409.13474).
    Differs: wanted answers go round with the visits of an item, where the papers draw anew.
    """
    first = len(wins.sequences)
    of = [[(*win, first + item) for win in mine] for item, mine in enumerate(wins.of)]
    return CompanionSet([*wins.sequences, *forget], of, wins.each)


def in_turn(neutral: Sequence[TokenSequence], each: int) -> CompanionSet:
    """The recipe's neutral texts, one after the other, beside the retain items.

    Source: the normal prompts of LLMU, Yao et al. 2023, arXiv:2310.10683.
    Differs: in turn, not at random.
    """
    return CompanionSet(neutral, [[(number,) for number in range(len(neutral))]], each, common=True)


def _of_answers(making: Making, half: Half, answers: Answers) -> CompanionSet:
    """The forget prompts with these answers."""
    examples = [
        Example(f"{example.id}~{half}{number}", example.prompt, answer, example.task)
        for example, mine in zip(making.sets.forget, answers, strict=True)
        for number, answer in enumerate(mine)
    ]
    return _grouped(making.encode(examples), [len(mine) for mine in answers], making, half)


def _grouped(
    sequences: Sequence[TokenSequence], counts: Iterable[int], making: Making, half: Half
) -> CompanionSet:
    places, counts = iter(range(len(sequences))), list(counts)
    of = [[(next(places),) for _ in range(count)] for count in counts]
    items = [item for item, count in zip(making.forget, counts, strict=True) for _ in range(count)]
    both = zip(sequences, items, strict=True)
    made = [replace(sequence, asks=item.asks) for sequence, item in both]  # questions of questions
    return CompanionSet(made, of, making.config.each(half))


def _refusal(making: Making) -> CompanionSet:
    config, seed = making.config.refusal, making.config.seed
    sentences = read_refusals(config.file)
    answers = refused(making.sets.forget, sentences, count=config.count, seed=seed)
    return _of_answers(making, "refusal", answers)


def _alternate(making: Making) -> CompanionSet:
    assert making.alternates is not None
    return _of_answers(making, "alternate", making.alternates)


def _paraphrase(making: Making) -> CompanionSet:
    count = making.config.paraphrase.count
    return _of_answers(making, "paraphrase", paraphrased(making.sets.forget, count=count))


def _mismatch(making: Making) -> CompanionSet:
    config, seed = making.config.mismatch, making.config.seed
    others = making.sets.retain if config.of == "retain" else making.sets.forget
    answers = mismatched(making.sets.forget, others, count=config.count, seed=seed)
    return _of_answers(making, "mismatch", answers)


def _random_label(making: Making) -> CompanionSet:
    config, tokenizer = making.config, making.tokenizer
    special = set(tokenizer.all_special_ids)
    vocabulary = [token for token in range(tokenizer.vocab_size) if token not in special]
    drawn = random_labels(
        making.forget,
        vocabulary,
        count=config.random_label.count,
        seed=config.seed,
    )
    flat = [sequence for mine in drawn for sequence in mine]
    return _grouped(flat, [len(mine) for mine in drawn], making, "random_label")


def _neutral(making: Making) -> CompanionSet:
    return in_turn(making.encode(making.sets.neutral), making.config.neutral.each)


@dataclass(frozen=True)
class Companion:
    """One row: how a set is made."""

    fn: Callable
    """Where it is described."""
    make: Callable[[Making], CompanionSet]
    test: str
    needs: Needs = FORGET
    fidelity: str = "adapted"
    cost: str = "nothing is forwarded to make it"


_TESTS = "tests/data/test_companions.py"
_OTHER = "tests/companions/test_making.py"

COMPANIONS: dict[str, Companion] = {
    "refusal": Companion(
        refused, _refusal, f"{_TESTS}::test_no_refusal_contains_the_answer_it_stands_for"
    ),
    "alternate": Companion(
        write_alternates,
        _alternate,
        "tests/companions/test_alternates.py::test_no_alternate_is_the_truth",
        needs=replace(FORGET, besides=("the target writes them",)),
        cost="max_new_tokens x count steps of generation for each forget item, once",
    ),
    "paraphrase": Companion(
        paraphrased,
        _paraphrase,
        f"{_TESTS}::test_a_paraphrase_keeps_the_answer",
        fidelity="inspired",
    ),
    "mismatch": Companion(
        mismatched,
        _mismatch,
        f"{_TESTS}::test_a_mismatch_is_never_the_own_answer",
        needs=replace(BOTH, besides=("no retain with of: forget",)),
    ),
    "random_label": Companion(
        random_labels, _random_label, f"{_TESTS}::test_random_labels_keep_prompt_length_and_end"
    ),
    "neutral": Companion(
        in_turn, _neutral, f"{_OTHER}::test_neutral_texts_go_round", needs=Needs(("neutral",))
    ),
    "refusal_pair": Companion(
        paired,
        lambda making: paired(_refusal(making), making.forget),
        f"{_OTHER}::test_a_pair_is_a_wanted_answer_and_the_true_one",
    ),
    "alternate_pair": Companion(
        paired,
        lambda making: paired(_alternate(making), making.forget),
        f"{_OTHER}::test_a_pair_is_a_wanted_answer_and_the_true_one",
        needs=replace(FORGET, besides=("the target writes them",)),
        cost="as alternate",
    ),
}
