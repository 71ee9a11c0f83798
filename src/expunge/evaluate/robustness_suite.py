"""The suite `robustness`: is what was forgotten gone, or does a little training bring it back?"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from expunge import lora
from expunge.config import Section
from expunge.data.batches import TokenSequence, encode, encode_document
from expunge.data.examples import Document, Example, check_disjoint
from expunge.data.sources import Source, read_examples
from expunge.errors import EvaluationError
from expunge.evaluate.memorisation import exact_memorisation
from expunge.evaluate.numbers import Measured, Number, estimate, resampled
from expunge.evaluate.paired import paired_difference, unpaired_difference
from expunge.evaluate.reader import Reader
from expunge.evaluate.revival import Quantise, Relearn, quantise, relearn
from expunge.evaluate.tables import key_of, text_hash

Attack = Literal["relearn", "quantise"]
CHANGES = {"exact": "gain", "nll": "fall"}
"""What a change of a metric for the better is called."""
RECOVERED = {"exact": "recovered", "nll": "recovered_nll"}


class Robustness(Section):
    """What is attacked, and how hard."""

    forget: Source
    """Items or texts that were to be forgotten."""

    control: Source | None = None
    """Some of the same form that the model has never read: what they gain is what any would. Null
    leaves out `recovered`."""

    attacks: tuple[Attack, ...] = Field(default=("relearn", "quantise"), min_length=1)
    """Which."""

    relearn: Relearn = Relearn()
    """How hard it is trained."""

    quantise: Quantise = Quantise()
    """How coarsely it is rounded."""

    max_length: int = Field(default=256, ge=8)
    """Longest sequence that is scored, in tokens."""

    prompt_tail: int | None = Field(default=204, ge=1)
    """There, a prompt keeps this many of its last tokens."""

    separator: str = ""
    """Put before the answer."""

    chat: bool = False
    """Put prompts into the tokenizer's chat template."""

    @field_validator("attacks")
    @classmethod
    def _each_once(cls, attacks: tuple[Attack, ...]) -> tuple[Attack, ...]:
        if len(set(attacks)) < len(attacks):
            raise ValueError("attacks names one twice")
        return attacks


@dataclass(frozen=True)
class _Item:
    side: str
    example: Example
    sequence: TokenSequence
    document: str


def robustness_suite(reader: Reader, section: Robustness) -> Measured:
    """What a model says of forgotten answers before and after attacks on a copy of its weights.

        recovered = gain of forget - gain of control,       gain = exact_after - exact_before
        recovered_nll = fall of forget - fall of control,   fall = nll_before - nll_after
        left = exact_after of forget - exact_after of control

    `exact` is `exact_memorisation`, `nll` the loss of an answer's token. `relearn` trains on a
    share of the forget documents and measures the others; `quantise` measures all. A text that the
    model no longer holds gains as much as a control's, that it never read: `recovered` near 0. One
    that it hides comes back; of one that it still says (`exact_before` of forget above that of
    control) nothing is left to come back, which is near 0 too. `left` is what an attacker ends
    with, hidden or said: near 0 where forget and control are texts of one kind. The copy is loaded
    beside the model; an adapter is folded into it.

    Source: Hu et al. 2024, arXiv:2406.13356; Zhang et al. 2024, arXiv:2410.16454.
    """
    if reader.guard:
        raise EvaluationError("robustness attacks the weights, which no guard is part of")
    items = _items(reader, section)
    known, others = _parted(items, section.relearn) if "relearn" in section.attacks else ([], [])
    attacks: dict[str, tuple[Section, list[_Item], Callable[[Any], None]]] = {
        "quantise": (section.quantise, items, partial(quantise, how=section.quantise)),
        "relearn": (
            section.relearn,
            others,
            partial(relearn, known=[i.sequence for i in known], how=section.relearn),
        ),
    }
    found = Measured(
        facts={
            "documents_relearned": len({i.document for i in known}),
            "answers_cut": sum(item.sequence.cut > 0 for item in items),
        }
    )
    for name in section.attacks:
        how, asked, change = attacks[name]
        trained = [item.sequence.tokens for item in known] if name == "relearn" else []
        changed = _attacked(reader, change, name, repr(how.keyed()), trained)
        _measure(found, name, asked, reader, changed)
    return found


def relearned(
    reader: Reader,
    members: Sequence[Document],
    nonmembers: Sequence[Document],
    how: Relearn,
    *,
    document_tokens: int,
    label: str = "relearn",
) -> dict[str, Any]:
    """The entry `relearn` of results.json: `relearn` on some members, asked of the other members
    and of the non-members, as `robustness_suite` asks of items."""
    longest = min(document_tokens, reader.context)
    items = [
        _Item(
            side,
            Example(document.id, "", document.text),
            encode_document(document, reader.tokenizer, max_length=longest),
            document.id,
        )
        for side, documents in (("forget", members), ("control", nonmembers))
        for document in documents
    ]
    known, others = _parted(items, how)
    trained = [item.sequence for item in known]
    change = partial(relearn, known=trained, how=how, label=label)
    named = [repr(how.keyed()), [sequence.tokens for sequence in trained]]
    found = Measured()
    _measure(found, "relearn", others, reader, _attacked(reader, change, "relearn", *named))
    said = {name.removeprefix("relearn."): number for name, number in found.numbers.items()}
    return {
        "documents": len(known),
        "exact": {
            f"{side}_{when}": said[f"{side}.exact_{when}"].value
            for side in ("forget", "control")
            for when in ("before", "after")
        },
        **{name: said[name].value for name in ("recovered", "left")},
        **{f"{name}_interval": _interval(said[name]) for name in ("recovered", "left")},
        "n": sum(item.side == "forget" for item in others),
    }


def _interval(number: Number) -> dict[str, float | None] | None:
    return None if number.low is None else {"low": number.low, "high": number.high}


def _items(reader: Reader, section: Robustness) -> list[_Item]:
    sides = {"forget": read_examples(section.forget)}
    if section.control is not None:
        sides["control"] = read_examples(section.control)
        check_disjoint(sides["forget"], sides["control"])
    longest = min(section.max_length, reader.context)
    read = {"separator": section.separator, "chat": section.chat, "max_length": longest}
    how = {**read, "prompt_tail": section.prompt_tail}
    return [
        _Item(side, example, encode(example, reader.tokenizer, **how), example.document)
        for side, examples in sides.items()
        for example in examples
    ]


def _parted(items: Sequence[_Item], how: Relearn) -> tuple[list[_Item], list[_Item]]:
    """The forget items that are trained on, and everything else."""
    documents = list(dict.fromkeys(i.document for i in items if i.side == "forget"))
    count = how.trained_on(len(documents))
    drawn = np.random.default_rng(how.seed).permutation(len(documents))[:count]
    chosen = {documents[i] for i in drawn}
    known, others = list[_Item](), list[_Item]()
    for item in items:
        trained = item.side == "forget" and item.document in chosen
        (known if trained else others).append(item)
    return known, others


def _attacked(reader: Reader, change: Callable[[Any], None], *named: Any) -> Reader:
    """A reader of a copy that is changed when it is first needed, with tables of its own."""

    def load() -> Any:
        model = reader.load()
        if model is vars(reader).get("model", model):  # which others go on asking
            model = copy.deepcopy(model)
        lora.fold_adapter(model)
        change(model)
        return model

    return Reader(
        load,
        reader.tokenizer,
        context=reader.context,
        vocabulary_size=reader.vocabulary_size,
        key=key_of("attacked", reader.key, *named),
        folder=reader.folder,
        dtype=reader.dtype,
    )


def _measure(
    found: Measured, attack: str, items: Sequence[_Item], reader: Reader, changed: Reader
) -> None:
    sequences = [item.sequence for item in items]
    both = [one.scores(sequences, label=f"score, {attack}") for one in (reader, changed)]
    reader.forwards += changed.forwards
    rows = []
    for item, *said in zip(items, *both, strict=True):
        row = {"group": f"{attack}.{item.side}", "id": item.example.id}
        row["text"] = text_hash(item.example.prompt + item.example.answer)
        for when, scores in zip(("before", "after"), said, strict=True):
            hits = scores.hit[: len(scores.hit) - item.sequence.ending].tolist()
            row |= {f"exact_{when}": exact_memorisation(hits), f"nll_{when}": scores.nll}
        rows.append(row)
    found.items += rows
    changes: dict[tuple[str, str], Number] = {}
    for side in dict.fromkeys(item.side for item in items):
        own = [item for item in zip(items, rows, strict=True) if item[0].side == side]
        for metric, change in CHANGES.items():
            when = [f"{metric}_{name}" for name in ("before", "after")]
            known = [(i.document, r) for i, r in own if r[when[0]] is not None]
            then, now = ([row[name] for _, row in known] for name in when)
            for name, values in zip(when, (then, now), strict=True):
                full = f"{attack}.{side}.{name}"
                found.numbers[full] = (resampled if metric == "nll" else estimate)(
                    values, name=full
                )
            ends = (now, then) if metric == "nll" else (then, now)
            full = f"{attack}.{side}.{change}"
            owners = [document for document, _ in known]
            changes[side, metric] = paired_difference(*ends, owners, name=full)
            found.numbers[full] = changes[side, metric]
    for metric, name in RECOVERED.items():
        if ("control", metric) in changes:
            sides = (changes[side, metric] for side in ("control", "forget"))
            found.numbers[f"{attack}.{name}"] = unpaired_difference(*sides)
    ends = [f"{attack}.{side}.exact_after" for side in ("control", "forget")]
    if ends[0] in found.numbers:
        found.numbers[f"{attack}.left"] = unpaired_difference(*(found.numbers[n] for n in ends))
