"""The suite `semeval`: SemEval-2025 Task 4 as `expunge evaluate MODEL` runs it."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from expunge.config import Section
from expunge.data.sets import Data, read_sets
from expunge.data.sources import Source, locate, read_documents
from expunge.evaluate.choices import macro_number
from expunge.evaluate.mmlu import HUB, read_mmlu
from expunge.evaluate.numbers import Behind, Measured, Number, mean_of, wilson
from expunge.evaluate.reader import Reader
from expunge.evaluate.semeval import HALVES, final_of, mia_score_of
from expunge.evaluate.suite import Evaluate, EvaluationData, beside_items, evaluate

_MEANS = (("qa", "knowledge"), ("sc", "regurgitation"))


class Semeval(Section):
    """What SemEval-2025 Task 4 scores, and how thoroughly."""

    forget: Source
    """Items that were to be forgotten."""

    retain: Source
    """Items that were to be kept."""

    members: Source | None = None
    """Whole documents of the forget set; those of other documents are left out and counted."""

    nonmembers: Source | None = None
    """Documents of the same distribution that no model has seen."""

    evaluate: Evaluate = Evaluate()
    """How thoroughly."""

    max_length: int = Field(default=256, ge=8)
    """Longest sequence in which an answer's loss is measured, in tokens."""

    prompt_tail: int | None = Field(default=204, ge=1)
    """There, a prompt keeps this many of its last tokens."""

    separator: str = ""
    """There, put before the answer."""

    chat: bool = False
    """Put prompts into the tokenizer's chat template."""

    @model_validator(mode="after")
    def _both_sides(self) -> Self:
        if (self.members is None) != (self.nonmembers is None):
            raise ValueError("members and nonmembers go together")
        return self


def semeval_suite(reader: Reader, section: Semeval) -> Measured:
    """The twelve terms, the task aggregate, membership, MMLU, and whether the model collapsed.

        final = (task_aggregate + mia.score + mmlu) / 3,    mia.score = 1 - 2 |mia.auc - 1/2|
        task_aggregate = 12 / Σ 1/v,    v a term of retain, or 1 - a term of forget

    A term is the mean score of one half, task and kind: `regurgitation` of passages (sc),
    `knowledge` of questions (qa). Prompts are generated from whole; `max_length` and `prompt_tail`
    cut only where answers' losses are read, and documents are read up to
    `evaluate.document_tokens`. A member is a document of the forget set; MMLU is asked where
    `evaluate.mmlu` says how.

    Source: Ramakrishna et al. 2025, arXiv:2504.02883.
    """
    names = ("forget", "retain", "members", "nonmembers")
    sets = read_sets(Data(**{name: getattr(section, name) for name in names}))
    config = section.evaluate.mmlu
    questions = []
    if config is not None:
        questions = read_mmlu(config.path if config.path == HUB else locate(config.path))
    data = EvaluationData(sets.forget, sets.retain, sets.members, sets.nonmembers, mmlu=questions)
    entry, rows = evaluate(
        reader,
        data,
        section.evaluate,
        max_length=section.max_length,
        prompt_tail=section.prompt_tail,
        separator=section.separator,
        chat=section.chat,
    )
    items = [{"group": entry_group(row), **row} for row in rows]
    told = beside_items(reader, data, section.evaluate)
    collapse = entry["collapse"]
    facts = {
        "collapsed": collapse["collapsed"],
        "reasons": collapse["reasons"],
        "collapse": collapse,
        "nll": entry["nll"],
        "prompts_cut": entry["prompts_cut"],
        "texts_cut": entry["texts_cut"],
        "members_left_out": 0
        if section.members is None
        else len(read_documents(section.members)) - len(sets.members),
    }
    return Measured(entry_numbers(entry), items + told, facts, entry_behind(entry))


def entry_group(row: Mapping[str, Any]) -> str:
    """The group of an item, named as its number is: forget.Task1.sc, …"""
    return f"{row['half']}.{row['task']}.{row['kind']}"


def entry_behind(entry: Mapping[str, Any]) -> dict[str, Behind]:
    """The items behind the means over tasks, the aggregate, the AUC and MMLU."""
    names = [t.replace("/", ".") for t, v in entry["semeval"]["terms"].items() if v is not None]
    found = {"task_aggregate": Behind("score", tuple(names), "aggregate")}
    for half in HALVES:
        for kind, name in _MEANS:
            own = tuple(n for n in names if n.startswith(f"{half}.") and n.endswith(f".{kind}"))
            found[f"{half}.{name}"] = Behind("score", own, "means")
    return found | {
        "mia.auc": Behind("nll", ("members", "nonmembers"), "auc"),
        "mia.two_sided": Behind("nll", ("members", "nonmembers"), "two_sided"),
        "mmlu": Behind("correct"),
        "mmlu.macro": Behind("correct", how="means"),
    }


def entry_numbers(entry: Mapping[str, Any]) -> dict[str, Number]:
    """The dotted names: forget.Task1.sc, …, forget.knowledge and forget.regurgitation (means over
    the tasks), retain likewise, task_aggregate, mia.auc, mmlu, final."""
    scored = entry["semeval"]
    numbers: dict[str, Number] = {}
    for term, value in scored["terms"].items():
        numbers[term.replace("/", ".")] = _number(
            value, scored["counts"].get(term) or 0, scored["intervals"].get(term)
        )
    for half in HALVES:
        for kind, name in _MEANS:
            own = [n for t, n in numbers.items() if t.startswith(f"{half}.") and t.endswith(kind)]
            if own:
                numbers[f"{half}.{name}"] = mean_of(own)
    total = sum(count or 0 for count in scored["counts"].values())
    interval = scored["intervals"].get("task_aggregate")
    numbers["task_aggregate"] = _number(scored["task_aggregate"], total, interval)
    mia, mmlu = scored["mia"], scored["mmlu"]
    if mia:
        numbers["mia.auc"] = Number(mia["auc"], mia["n"] or 0, mia["low"], mia["high"])
        numbers["mia.score"] = mia_score_of(numbers["mia.auc"])
        for name in ("two_sided", "ks"):
            if mia.get(name) is not None:
                interval = mia.get(f"{name}_interval")
                numbers[f"mia.{name}"] = _number(mia[name], mia["n"] or 0, interval)
    if mmlu:
        numbers |= _of_mmlu(mmlu)
    if scored["final"] is not None:
        numbers["final"] = final_of(*(numbers[n] for n in ("task_aggregate", "mia.score", "mmlu")))
    return numbers


def _of_mmlu(mmlu: Mapping[str, Any]) -> dict[str, Number]:
    """The share of all questions (Wilson's interval), and the mean of the subjects'."""
    accuracy, n = mmlu["accuracy"], mmlu["n"]
    subjects = mmlu.get("per_subject") or {}
    hits = {s: [i < of["correct"] for i in range(of["n"])] for s, of in subjects.items()}
    bounds = macro_number(hits) if hits else Number(None, n)
    return {
        "mmlu": Number(accuracy, n, *wilson(accuracy * n, n)),
        "mmlu.macro": Number(mmlu["macro"], n, bounds.low, bounds.high),
    }


def _number(value: float | None, n: int, interval: dict[str, float] | None) -> Number:
    return Number(value, n, **(interval or {}))
