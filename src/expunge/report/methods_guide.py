"""The first part of docs/methods.md: the tables again, as a newcomer looks for a method."""

from collections.abc import Callable, Sequence

from expunge.needs import LEVELS, Needs
from expunge.report.methods_page import MethodRow
from expunge.report.tables import markdown

_FORWARD = ("embeddings", "logits")

_HAVE: tuple[tuple[str, Callable[[Needs], bool]], ...] = (
    (
        "the model run by transformers, its weights left alone, and helper models",
        lambda needs: needs.access in _FORWARD and bool(needs.models),
    ),
    (
        "the model run by transformers, its weights left alone",
        lambda needs: needs.access in _FORWARD,
    ),
    (
        "no more than prompts and answers, as an API gives them",
        lambda needs: needs.access == "text",
    ),
    (
        "the weights, a retain set, and a model or an adapter that is trained already",
        lambda needs: bool(needs.models) and "retain" in needs.data,
    ),
    (
        "the weights, and models or adapters that are trained already, as branches are",
        lambda needs: bool(needs.models),
    ),
    (
        "the weights, the forget set, and texts never read or a model that has not learnt it",
        lambda needs: LEVELS in needs.data,
    ),
    (
        "the weights, the forget set, and neutral texts",
        lambda needs: "neutral" in needs.data,
    ),
    (
        "the weights, the forget set and a retain set",
        lambda needs: "retain" in needs.data,
    ),
    ("the weights and the forget set alone", lambda needs: True),
)
"""The most demanding first: what holds of a method first is where it stands."""

WHERE = {
    "objective": "`objective` of a branch",
    "forget loss": "`terms`, half: forget",
    "retain loss": "`terms`, half: retain",
    "preference loss": "`terms`, half: refusal_pair or alternate_pair",
    "departure loss": "`terms`, half: forget or neutral",
    "token weighting": "`weighting` of a term",
    "set beside forget and retain": "`half` of a term, `companions`",
    "step rule": "`step` of a branch",
    "weight mask": "`mask` of a branch, training: full",
    "schedule": "`schedule` of a branch",
    "edit": "`edits`, `expunge edit`",
    "merge": "`merges`, `expunge merge`",
    "guard": "`guards`, `expunge guard`",
}
"""By kind of method."""

_WANT = {
    "to forget this far and no further": ("hinge", "hinge_token", "npo", "simnpo", "ce_u"),
    "to end where text never seen lies": (
        "hinge_level",
        "match_level",
        "match_profile",
        "match_standardized",
    ),
    "a balance between too much and too little": ("ties", "normalized", "sage"),
    "a refusal in place of an answer": ("idk", "idk_dpo", "flat", "prefix", "input_filter"),
    "another plausible answer in its place": ("alt_po", "relearn", "random_label"),
    "the retain set kept before all": ("dual", "ngdiff", "kl_minimisation", "wagle", "sage"),
    "that a fine-tune does not bring it back": ("sam", "latent_adversarial", "repselect", "tar"),
    "to remove a skill or a domain": ("rmu", "adaptive_rmu", "prune", "negate"),
    "to remove single tokens, such as a number": ("revs", "needle", "sensitive_tokens"),
    "one request after another": ("sequential", "layered", "sugd"),
    "an edit in seconds that can be taken back": ("negate", "needle", "revs", "revert"),
    "weights untouched": ("uld", "icul", "eco", "output_filter"),
}

_ONCE = """\
## What do I have?

A method of each table stands here once, beside the least that it takes. Other answers to the forget
prompts (refusals, alternates and the like) are made by the program. Where there is no retain set,
leave `data.retain` out: what reads it is named before any work.
"""
EXAMPLE = """\
branches:
  forgets:
    objective: npo                      # its terms, and what stands beside them
    terms:                              # what is changed of them, by set or loss
      npo: {options: {beta: 0.2}}
      retain: {weight: 2}
    optimizer: {lr: 1.0e-4}             # all other fields as ever
"""
_NAMED = f"""\
## How do I say it?

An `objective` by name is its terms and, field by field, what is not given beside it. A term is
called by its set, its loss or both (`retain.kl`); every field of it but these two may be changed.

```yaml
{EXAMPLE}```
"""


def methods_guide(rows: Sequence[MethodRow]) -> str:
    """What do I have, what do I want: the names of the methods for each answer."""
    have = []
    for title, _ in reversed(_HAVE):
        mine = [row for row in rows if asked_for(row.needs) == title]
        by_kind = {where: [r.name for r in mine if r.kind == kind] for kind, where in WHERE.items()}
        lines = [[where, _names(names)] for where, names in by_kind.items() if names]
        have += [["" if number else title, *line] for number, line in enumerate(lines)]
    known = {row.name for row in rows}
    want = [
        [title, _names([name for name in names if name in known])] for title, names in _WANT.items()
    ]
    return "\n".join(
        [
            _ONCE,
            markdown(["I have", "where", "look at"], have, text_columns=3),
            "## What do I want?\n",
            markdown(["I want", "look at"], want, text_columns=2),
            _NAMED,
        ]
    )


def asked_for(needs: Needs) -> str:
    """What one must have for a method that needs this, as the guide says it."""
    return next(title for title, holds in _HAVE if holds(needs))


def named() -> set[str]:
    """Every method that the guide names by hand."""
    return {name for names in _WANT.values() for name in names}


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
