"""The suite `muse`: news or books forgotten, as `expunge evaluate MODEL` measures it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from pydantic import Field, model_validator

from expunge.config import Section
from expunge.data.batches import answer_tokens, encode_document, prompt_tokens
from expunge.data.examples import Document
from expunge.data.records import part, read_records, sample
from expunge.errors import EvaluationError
from expunge.evaluate import muse
from expunge.evaluate.attacks import min_k
from expunge.evaluate.membership import mia
from expunge.evaluate.numbers import Behind, Measured, Number, estimate
from expunge.evaluate.prompts import fit_prompts
from expunge.evaluate.reader import Reader
from expunge.evaluate.reference import reference_reader, saved_items
from expunge.evaluate.soundness import collapse_facts
from expunge.evaluate.tables import Generation, text_hash


class Muse(Section):
    """Which corpus of MUSE is asked, and how."""

    path: str = "hub:muse-bench/MUSE-News"
    """`hub:ID` (also muse-bench/MUSE-Books), or a folder (also `data:NAME`) of files such as
    verbmem/forget.jsonl, knowmem/forget_qa.jsonl, knowmem/forget_qa_icl.jsonl, the same of
    retain_qa, privleak/forget.jsonl and privleak/holdout.jsonl."""

    revision: str | None = None
    """The commit of a Hub data set."""

    retrained: str | None = None
    """For the privacy leakage: a model trained without the forget set (as MODEL is given), or the
    folder that `expunge evaluate` wrote of it. Without it the leakage is null."""

    retrained_auc: float | None = Field(default=None, gt=0, le=1)
    """Or only that model's AUC, in the sense of `privacy.auc`."""

    verbatim_tokens: int = Field(default=128, ge=1)
    """Longest continuation of a passage, in tokens; the passage is compared as far."""

    knowledge_tokens: int = Field(default=32, ge=1)
    """Longest answer, in tokens."""

    before_answer: str = "Answer: "
    """What a question's prompt ends with: as released, a space included. A tokenizer that joins
    spaces to words does better with "Answer:"."""

    min_k: float = Field(default=40, gt=0, le=100)
    """Percent of the least likely tokens that Min-K% takes."""

    document_tokens: int = Field(default=2048, ge=2)
    """Longest text that Min-K% reads, in tokens, where the context allows it."""

    limit: int | None = Field(default=None, ge=1)
    """Ask a seeded sample of this many items of each set; null asks all."""

    seed: int = 0
    """Draws the sample and the interval of the AUC."""

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.retrained is not None and self.retrained_auc is not None:
            raise ValueError("give retrained or retrained_auc, not both")
        return self


@dataclass
class _Item:
    """One given item and what came of it; `score` stays None where the sample left it out."""

    group: str
    id: str
    prompt: str
    truth: str
    asked: bool
    score: float | None = None
    generation: str | None = None


def muse_suite(reader: Reader, section: Muse) -> Measured:
    """Verbatim memorisation, knowledge of both sets, and the privacy leakage.

    Differs: the released code reads whole texts for Min-K%, here up to `document_tokens`; and it
    counts the beginning-of-text token among the tokens that a passage is compared on.
    """
    items = _read(section)
    retrained = _retrained_auc(reader, items, section)  # first: it may be refused
    written, cut = _write(reader, items, section)
    texts = [item for item in items if item.group.startswith("privacy")]
    texts_cut = _score_texts(reader, texts, section)
    kept = [f"{i.prompt} {i.truth}" for i in items if i.group == "retain.knowledge"]
    facts = collapse_facts(reader, written, texts=kept)
    given = {group: sum(item.group == group for item in items) for group in GROUPS}
    return Measured(
        _numbers(items, retrained, section),
        [_row(item) for item in items],
        {**facts, "given": given, "prompts_cut": cut, "texts_cut": texts_cut},
        _behind(retrained),
    )


def _read(section: Muse) -> list[_Item]:
    """Every item of every set, in order."""
    items = []
    for group, (subset, split, prompt, truth) in GROUPS.items():
        source = part(section.path, subset, split=split, revision=section.revision)
        columns = [name for name in (prompt, truth) if name]
        records = read_records(source, columns)
        chosen = sample(len(records), section.limit, name=group, seed=section.seed)
        before = _shots(section, split) if subset == "knowmem" else ""
        for number, record in enumerate(records):
            asked = record[prompt] if prompt else ""
            if subset == "knowmem":
                asked = f"{before}Question: {asked}\n{section.before_answer}"
            items.append(_Item(group, record["id"], asked, record[truth], number in chosen))
    return items


def _shots(section: Muse, split: str) -> str:
    """The solved questions before each question of a split."""
    source = part(section.path, "knowmem", split=f"{split}_icl", revision=section.revision)
    records = read_records(source, ["question", "answer"])
    return "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in records)


def _write(
    reader: Reader, items: Sequence[_Item], section: Muse
) -> tuple[dict[str, list[Generation]], int]:
    """Generate for the sampled items and score them, in place; what was written, and cut."""
    found: dict[str, list[Generation]] = {}
    cut = 0
    for group in ("forget.verbatim", "forget.knowledge", "retain.knowledge"):
        asked = [item for item in items if item.group == group and item.asked]
        verbatim = group == "forget.verbatim"
        room = section.verbatim_tokens if verbatim else section.knowledge_tokens
        raw = [prompt_tokens(reader.tokenizer, item.prompt) for item in asked]
        prompts, shortened = fit_prompts(raw, reader.context, room)
        made = reader.generations(prompts, max_new_tokens=room, label=group)
        for item, generation in zip(asked, made, strict=True):
            item.generation = reader.text(generation.tokens)
            if verbatim:
                # Without its end of text, and as far as the continuation can go.
                truth = answer_tokens(reader.tokenizer, item.truth)[:-1][:room]
                item.score = muse.verbatim_score(reader.text(truth), item.generation)
            else:
                item.score = muse.knowledge_score(item.truth, item.generation)
        found[group if group != "retain.knowledge" else "retain_questions"] = made
        cut += shortened
    return found, cut


def _score_texts(reader: Reader, items: Sequence[_Item], section: Muse) -> int:
    """The Min-K% of the sampled texts, in place; returns how many texts were cut."""
    asked = [item for item in items if item.asked]
    length = min(section.document_tokens, reader.context)
    documents = [
        encode_document(
            Document(f"{item.group} {item.id}", item.truth), reader.tokenizer, max_length=length
        )
        for item in asked
    ]
    found = reader.scores(documents, label="score texts")
    for item, scores in zip(asked, found, strict=True):
        item.score = min_k(scores, k=section.min_k)
    return sum(document.cut > 0 for document in documents)


def _numbers(items: Sequence[_Item], retrained: float | None, section: Muse) -> dict[str, Number]:
    """forget.verbatim, forget.knowledge, retain.knowledge, privacy.auc, privacy.leakage."""
    numbers = {
        group: estimate(_scores(items, group), name=f"muse.{group}")
        for group in GROUPS
        if not group.startswith("privacy")
    }
    forget, holdout = (_scores(items, f"privacy.{name}") for name in ("forget", "holdout"))
    # mia takes losses, and its interval resamples both sides.
    drawn = mia([-x for x in holdout], [-x for x in forget], seed=section.seed)
    value, n = muse.leakage_auc(forget, holdout), int(drawn["n"])
    numbers["privacy.auc"] = Number(value, n, float(drawn["low"]), float(drawn["high"]))
    numbers["privacy.leakage"] = Number(None, 0)
    if retrained is not None:
        low, high = (float(drawn[end]) for end in ("low", "high"))
        leakages = [muse.privacy_leakage(x, retrained) for x in (value, low, high)]
        numbers["privacy.leakage"] = Number(leakages[0], n, leakages[1], leakages[2])
    return numbers


def _behind(retrained: float | None) -> dict[str, Behind]:
    """The texts behind the AUC, and behind the leakage where the retrained model's is known."""
    area = Behind("score", ("privacy.holdout", "privacy.forget"), "auc")
    if retrained is None:
        return {"privacy.auc": area}
    leakage = replace(area, scale=100 / retrained, shift=-100)
    return {"privacy.auc": area, "privacy.leakage": leakage}


def _retrained_auc(reader: Reader, items: Sequence[_Item], section: Muse) -> float | None:
    """Of the retrained model, taken as exact by the interval of the leakage."""
    if section.retrained is None:
        return section.retrained_auc
    same = ("limit", "seed", "min_k", "document_tokens")
    saved = saved_items(section.retrained, "muse", section, same)
    texts = [item for item in items if item.group.startswith("privacy")]
    if saved is None:
        theirs = [replace(item, score=None) for item in texts]
        _score_texts(reference_reader(section.retrained, reader), theirs, section)
    else:
        rows = [row for row in saved if row["group"].startswith("privacy")]
        theirs = [
            _Item(row["group"], row["id"], "", "", row["score"] is not None, row["score"])
            for row in rows
        ]
        keys = ("group", "id", "text")
        if [[r.get(k) for k in keys] for r in rows] != [[_row(i)[k] for k in keys] for i in texts]:
            raise EvaluationError(f"{section.retrained} was measured on other texts than these")
    return muse.leakage_auc(_scores(theirs, "privacy.forget"), _scores(theirs, "privacy.holdout"))


def _scores(items: Sequence[_Item], group: str) -> list[float]:
    return [item.score for item in items if item.group == group and item.score is not None]


def _row(item: _Item) -> dict[str, Any]:
    """The `score` is ROUGE-L, or of a text of `privacy.…`, which a hash stands for, its Min-K%."""
    row = {"group": item.group, "id": item.id, "score": item.score}
    if item.group.startswith("privacy"):
        return {**row, "text": text_hash(item.truth)}
    return {**row, "prompt": item.prompt, "truth": item.truth, "generation": item.generation}


GROUPS = {
    "forget.verbatim": ("verbmem", "forget", "prompt", "gt"),
    "forget.knowledge": ("knowmem", "forget_qa", "question", "answer"),
    "retain.knowledge": ("knowmem", "retain_qa", "question", "answer"),
    "privacy.forget": ("privleak", "forget", "", "text"),
    "privacy.holdout": ("privleak", "holdout", "", "text"),
}
"""Of each group of items: subset, split, and the columns of its prompt and of its truth."""
