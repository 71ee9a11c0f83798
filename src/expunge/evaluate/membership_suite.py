"""The suite `membership`: what members and non-members score under every membership attack."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from expunge import models
from expunge.config import Section
from expunge.data.batches import TokenSequence, encode_document, prompt_tokens
from expunge.data.examples import Document
from expunge.data.sources import Source, read_documents
from expunge.errors import EvaluationError
from expunge.evaluate.attacks import ATTACKS, Read, attack_score
from expunge.evaluate.balance import balance
from expunge.evaluate.gradients import gradient_norms
from expunge.evaluate.membership import separation
from expunge.evaluate.numbers import RESAMPLES, Behind, Measured, Number
from expunge.evaluate.reader import Reader, open_reader
from expunge.evaluate.tables import TokenScores, text_hash
from expunge.registry import did_you_mean

GROUPS = ("members", "nonmembers")


class Membership(Section):
    """Whose documents are told apart, and by what."""

    members: Source
    """Documents that the model was trained on, or was to forget."""

    nonmembers: Source
    """Documents of the same distribution that no model has seen."""

    attacks: tuple[str, ...] = ("loss", "zlib", "zlib_total", "min_k", "min_k_plus_plus")
    """Which scores; beside these `reference` (needs a reference), `recall` (reads every document
    once more, after others) and `gradient_norm` (a backward pass for every document)."""

    reference: str | None = None
    """A model that saw neither side, for the attack `reference`: an id, a folder or a GGUF file."""

    reference_dtype: models.Dtype = "float32"
    """Type in which the reference's weights are held."""

    k: float = Field(default=20, gt=0, le=100)
    """Percent of a document's tokens that min_k and min_k_plus_plus look at."""

    fpr: float = Field(default=0.01, gt=0, lt=1)
    """Share of non-members that may be taken for members, where the share found is counted."""

    recall_shots: int = Field(default=3, ge=1)
    """Non-members, the first of their file, that `recall` puts before every document; they are not
    scored by it themselves."""

    document_tokens: int = Field(default=2048, ge=2)
    """Longest document read, in tokens, where the context allows it."""

    resamples: int = Field(default=RESAMPLES, ge=1)
    """Bootstrap draws behind each interval."""

    @field_validator("attacks")
    @classmethod
    def _attacks_are_known(cls, attacks: tuple[str, ...]) -> tuple[str, ...]:
        for name in attacks:
            if name not in ATTACKS:
                near, known = did_you_mean(name, ATTACKS), ", ".join(ATTACKS)
                raise ValueError(f"no attack is called '{name}'.{near} Known: {known}")
        if not attacks:
            raise ValueError(f"attacks is empty; known: {', '.join(ATTACKS)}")
        if len(set(attacks)) < len(attacks):
            raise ValueError("attacks names one twice")
        return attacks

    @model_validator(mode="after")
    def _reference_is_named(self) -> Self:
        if ("reference" in self.attacks) != (self.reference is not None):
            raise ValueError("the attack 'reference' and a reference model go together")
        return self


def membership_suite(reader: Reader, section: Membership) -> Measured:
    """AUC, TPR, two-sided AUC and KS distance of every attack, and each document's scores.

    A score is high where a document looks like a member's. Both sides are drawn anew for the
    intervals. `two_sided` and `ks` need two non-members; the `recall_shots` non-members that
    `recall` puts before every document are not scored by it.
    """
    sides = {group: read_documents(getattr(section, group)) for group in GROUPS}
    _check_apart(sides)
    documents = [document for side in sides.values() for document in side]
    groups = [group for group, side in sides.items() for _ in side]
    reads, facts = _read(reader, section, documents, sides["nonmembers"])
    items = [
        {
            "group": group,
            "id": document.id,
            "text": text_hash(document.text),
            "tokens": len(read.scores.logp),
            **{name: attack_score(name, read, k=section.k) for name in section.attacks},
        }
        for group, document, read in zip(groups, documents, reads, strict=True)
    ]
    numbers: dict[str, Number] = {}
    behind: dict[str, Behind] = {}
    for name in section.attacks:
        scored = {
            group: [row[name] for row in items if row["group"] == group and row[name] is not None]
            for group in GROUPS
        }
        numbers[f"{name}.auc"], numbers[f"{name}.tpr"] = separation(
            scored["members"],
            scored["nonmembers"],
            fpr=section.fpr,
            name=name,
            resamples=section.resamples,
        )
        if len(scored["nonmembers"]) > 1:
            sides = scored["members"], scored["nonmembers"]
            shape = balance({name: sides}, resamples=section.resamples)[name]
            ends = shape["two_sided_low"], shape["two_sided_high"]
            count = len(sides[0]) + len(sides[1])
            numbers[f"{name}.two_sided"] = Number(shape["two_sided"], count, *ends)
            numbers[f"{name}.ks"] = Number(shape["ks"], count)
        behind[f"{name}.auc"] = Behind(name, GROUPS, "auc")
        behind[f"{name}.two_sided"] = Behind(name, GROUPS, "two_sided")
    return Measured(numbers, items, facts, behind)


def _read(
    reader: Reader,
    section: Membership,
    documents: Sequence[Document],
    nonmembers: Sequence[Document],
) -> tuple[list[Read], dict[str, Any]]:
    """What the attacks read of each document, and what is worth knowing of how."""
    length = min(section.document_tokens, reader.context)
    texts = [encode_document(d, reader.tokenizer, max_length=length) for d in documents]
    facts: dict[str, Any] = {"cut": sum(text.cut > 0 for text in texts)}
    reference: Sequence[TokenScores | None] = [None] * len(texts)
    conditioned, gradients = list(reference), [None] * len(texts)
    if "gradient_norm" in section.attacks:
        gradients = gradient_norms(reader, texts)  # first, as it finds the scores as well
    scores = reader.scores(texts, label="score documents")
    if "reference" in section.attacks:
        reference = _by_reference(reader, section, documents, texts)
    if "recall" in section.attacks:
        first = len(texts) - len(nonmembers)  # of the non-members, who come last
        shots = range(first, first + section.recall_shots)
        conditioned, prefix = _after_nonmembers(reader, texts, documents, shots)
        facts |= {"recall_prefix": [documents[i].id for i in shots], "recall_tokens": prefix}
    kept = [
        reader.text(text.tokens) if text.cut else document.text
        for text, document in zip(texts, documents, strict=True)
    ]
    given = zip(scores, kept, reference, conditioned, gradients, strict=True)
    return [Read(*parts) for parts in given], facts


def _by_reference(
    reader: Reader,
    section: Membership,
    documents: Sequence[Document],
    texts: Sequence[TokenSequence],
) -> list[TokenScores]:
    """The scores of the same tokens by the reference model."""
    assert section.reference is not None
    other = open_reader(
        models.resolve(section.reference),
        None,
        dtype=section.reference_dtype,
        folder=reader.folder,
    )
    longest = max(len(text.tokens) for text in texts)
    if longest > other.context:
        raise EvaluationError(
            f"the reference {section.reference} reads {other.context} tokens, but a document has "
            f"{longest}; set document_tokens to what both read"
        )
    for document, text in zip(documents, texts, strict=True):
        if encode_document(document, other.tokenizer, max_length=len(text.tokens)) != text:
            raise EvaluationError(
                f"the reference {section.reference} makes other tokens of document "
                f"{document.id!r}, so its losses cannot be compared; take a model with the same "
                "tokenizer"
            )
    found = other.scores(texts, label="score by reference")
    reader.forwards += other.forwards
    return found


def _after_nonmembers(
    reader: Reader,
    texts: Sequence[TokenSequence],
    documents: Sequence[Document],
    shots: range,
) -> tuple[list[TokenScores | None], int]:
    """The scores of each text's tokens after the texts `shots`, for which there are none; and how
    many tokens stood before.

    The prefix loses its beginning where a text would not fit in the context behind it.
    """
    if shots.stop >= len(texts):
        raise EvaluationError(
            f"recall puts {len(shots)} non-members before every document, and there are only "
            f"{len(texts) - shots.start}; lower recall_shots"
        )
    bare = prompt_tokens(reader.tokenizer, "")  # BOS, where the tokenizer adds one
    joined = "".join(documents[i].text + "\n\n" for i in shots)
    prefix = prompt_tokens(reader.tokenizer, joined)[len(bare) :]
    rest = {i: text for i, text in enumerate(texts) if i not in shots}
    room = reader.context - max(len(text.tokens) for text in rest.values())
    prefix = prefix[-room:] if room > 0 else []
    if not prefix:
        raise EvaluationError(
            f"recall has no room before a document of {reader.context} tokens, the whole context; "
            "lower document_tokens"
        )
    after = []
    for text in rest.values():
        tokens = (*bare, *prefix, *text.tokens[len(bare) :])
        after.append(TokenSequence(text.id, tokens, len(prefix) + 1, text.cut))
    found = dict(zip(rest, reader.scores(after, label="score after others"), strict=True))
    return [found.get(i) for i in range(len(texts))], len(prefix)


def _check_apart(sides: Mapping[str, Sequence[Document]]) -> None:
    """Refuse a text that is on both sides."""
    members = {document.text: document.id for document in sides["members"]}
    for document in sides["nonmembers"]:
        if document.text in members:
            raise EvaluationError(
                f"member {members[document.text]!r} and non-member {document.id!r} are the same "
                "text; take it out of one side"
            )
