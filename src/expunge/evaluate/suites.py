"""Suites: what can be measured of a model, each by name, with what it needs.

A suite is a function of a Reader and of its own Section; it returns `Measured`. To add one: a
module with its Section and its function, and a row in the table at the foot.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase as fnmatch
from typing import Any

from expunge.config import Section, parse_section, read_options
from expunge.errors import EvaluationError
from expunge.evaluate import (
    collapse_suite,
    harness,
    knowledge,
    membership_suite,
    memorisation_suite,
    mmlu,
    mmlu_suite,
    muse_suite,
    robustness_suite,
    rwku,
    semeval_suite,
    tofu_suite,
    traces,
    wmdp,
)
from expunge.evaluate.names import NUMBERS
from expunge.evaluate.numbers import Measured
from expunge.evaluate.reader import Reader
from expunge.evaluate.soundness import collapse_facts
from expunge.registry import lookup


@dataclass(frozen=True)
class Suite:
    """One row."""

    section: type[Section]
    """What it is told: its data, and how thoroughly it measures."""

    fn: Callable[[Reader, Any], Measured]
    source: str
    about: str
    aggregates: tuple[str, ...] = ()
    """Numbers by which a destroyed model would look good, as patterns of `fnmatch`: of a collapsed
    one they are not printed, nor compared."""


def parse_suites(names: Sequence[str], options: Sequence[str]) -> dict[str, Section]:
    """The sections of the suites asked for; options are `suite.field=value`, values in YAML."""
    fields = read_options(options, "--option")
    for suite, given in fields.items():
        if suite not in names:
            raise EvaluationError(f"--option {suite}: no suite of that name is asked for")
        if not isinstance(given, dict):
            raise EvaluationError(f"--option {suite} takes {suite}.field=value")
    return {
        name: parse_section(
            fields.get(name, {}), lookup(SUITES, name, "suite").section, origin=name
        )
        for name in names
    }


def measure(reader: Reader, sections: Mapping[str, Section]) -> dict[str, Measured]:
    """Run suites on one model; what they share is read once.

    The facts of each say whether the model has collapsed: one verdict, of all suites that judge it
    (by what it makes of kept texts, too), or of the built-in openings alone where none does.
    """
    found = {name: SUITES[name].fn(reader, section) for name, section in sections.items()}
    for suite, measured in found.items():
        unknown = [name for name in measured.numbers if not may_make(suite, name)]
        assert not unknown, f"names.NUMBERS[{suite!r}] lacks {', '.join(unknown)}"
    own = [measured.facts for measured in found.values() if "collapsed" in measured.facts]
    judged = own or [collapse_facts(reader, {}, texts=[])]
    reasons = list(dict.fromkeys(reason for facts in judged for reason in facts["reasons"]))
    for name, measured in found.items():
        barred = SUITES[name].aggregates
        measured.facts |= {
            "collapsed": bool(reasons),
            "reasons": reasons,
            "aggregates": [n for n in measured.numbers if any(fnmatch(n, p) for p in barred)],
        }
    return found


def may_make(suite: str, name: str) -> bool:
    """Whether a suite may have a number of this name."""
    patterns = map(_pattern, NUMBERS[suite])
    return any(re.fullmatch(pattern, name, re.DOTALL) for pattern in patterns)


def _pattern(declared: str) -> str:
    """`<half>.<task>.qa` as a regular expression."""
    plain = re.escape(declared).replace("<half>", "(forget|retain)")
    return re.sub("<[a-z]+>", ".+", plain)


SUITES: dict[str, Suite] = {
    "semeval": Suite(
        semeval_suite.Semeval,
        semeval_suite.semeval_suite,
        "LUME, SemEval-2025 Task 4, arXiv:2504.02883",
        "completion and knowledge of three tasks, membership, MMLU, collapse",
        ("task_aggregate", "final"),
    ),
    "membership": Suite(
        membership_suite.Membership,
        membership_suite.membership_suite,
        "Carlini et al. 2021, arXiv:2012.07805; Shi et al. 2024, arXiv:2310.16789; and others",
        "AUC and TPR at 1 % FPR of up to eight membership attacks",
        ("*",),
    ),
    "memorisation": Suite(
        memorisation_suite.Memorisation,
        memorisation_suite.memorisation_suite,
        "Carlini et al. 2021, arXiv:2012.07805; Tirumala et al. 2022, arXiv:2205.10770",
        "exact memorisation, extraction strength, verbatim runs, personal data that leaks",
        ("forget.*",),
    ),
    "robustness": Suite(
        robustness_suite.Robustness,
        robustness_suite.robustness_suite,
        "Hu et al. 2024, arXiv:2406.13356; Zhang et al. 2024, arXiv:2410.16454",
        "does forgotten text come back after a little training or rounding of the weights",
        ("*.forget.*", "*.recovered", "*.recovered_nll", "*.left"),
    ),
    "tofu": Suite(
        tofu_suite.Tofu,
        tofu_suite.tofu_suite,
        "TOFU, arXiv:2401.06121",
        "invented authors: probability, ROUGE, truth ratio, model utility, forget quality",
        ("model_utility", "forget_quality"),
    ),
    "muse": Suite(
        muse_suite.Muse,
        muse_suite.muse_suite,
        "MUSE, arXiv:2407.06460",
        "news or books: verbatim and knowledge memorisation, privacy leakage, utility",
        ("forget.*", "privacy.*"),
    ),
    "mmlu": Suite(
        mmlu.Mmlu,
        mmlu_suite.mmlu_suite,
        "Hendrycks et al. 2021, arXiv:2009.03300",
        "accuracy over all questions and by subject, and whether one letter is always answered",
        ("accuracy", "macro"),
    ),
    "wmdp": Suite(
        wmdp.Wmdp,
        wmdp.wmdp_suite,
        "Li et al. 2024, arXiv:2403.03218",
        "accuracy on hazardous knowledge: biology, cyber security, chemistry",
        ("accuracy", "macro", "bio", "cyber", "chem"),
    ),
    "rwku": Suite(
        rwku.Rwku,
        rwku.rwku_suite,
        "Jin et al. 2024, arXiv:2406.10890",
        "ROUGE-L recall on real people and neighbours; losses of member texts; five abilities",
        ("forget.*", "mia.*", "utility.fluency"),
    ),
    "knowledge": Suite(
        knowledge.Knowledge,
        knowledge.knowledge_suite,
        "this project",
        "sixty plain questions, answered in words and as sentences to complete",
    ),
    "collapse": Suite(
        collapse_suite.Collapse,
        collapse_suite.collapse_suite,
        "this project",
        "does it still write language: loops, diversity, non-words, entropy, perplexity; no data",
    ),
    "lm_eval": Suite(
        harness.LmEval,
        harness.lm_eval_suite,
        "Gao et al., lm-evaluation-harness 0.4",
        "any task of lm-evaluation-harness",
    ),
    "traces": Suite(
        traces.Traces,
        traces.traces_suite,
        "ConceptVectors, arXiv:2406.11614",
        "value vectors of the concepts before and after: are they still in the weights",
        ("forget.*",),
    ),
}
