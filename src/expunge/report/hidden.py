"""What forgetting was bought with, in plain words: is the text gone or hidden, is more lost?"""

from expunge.report.results import ModelResults

_SIDES = ("forget", "control")

LOST = 1.0
"""Nats a token by which the NLL of unseen documents may rise before the verdict says so: e times
as unlikely, each token."""


def hidden(model: ModelResults, grade: str) -> str:
    """What the verdict adds where relearning brings back more than never-seen documents gain;
    nothing where it does not, was not tried, or where little is forgotten (`grade` not)."""
    interval = model.relearn and model.relearn.recovered_interval
    if grade == "not" or not interval or interval.low <= 0:
        return ""
    return " But it is hidden, not gone: training on a few documents brings back others."


def relearned(model: ModelResults, name: str) -> list[str]:
    """One sentence on what it guesses of documents before and after; none if not tried."""
    found = model.relearn
    if found is None:
        return []
    if found.failed:
        return [f"Whether the {name} model hides what it forgot is not known: {found.failed}."]
    shares = [found.exact.get(f"{s}_{when}") for s in _SIDES for when in ("before", "after")]
    before, after, unseen_before, unseen_after = map(percent, shares)
    return [
        f"Trained on {found.documents} of the forgotten documents, the {name} model guesses "
        f"{after} of the tokens of the others (before: {before}), and {unseen_after} of those of "
        f"never-seen documents (before: {unseen_before})."
    ]


def lost_unseen(before: ModelResults, after: ModelResults, name: str) -> list[str]:
    """One sentence where documents that were never read have become unlikely, too: then membership
    is balanced between two kinds of text that are both lost."""
    was, now = before.nll.nonmembers, after.nll.nonmembers
    if was is None or now is None or now - was <= LOST:
        return []
    return [
        f"Documents that no model has read were lost as well: the {name} model's NLL of them is "
        f"{now:.2f} nats a token (before: {was:.2f}), so that a comparison with them says little."
    ]


def percent(share: float | None) -> str:
    """A share in whole hundredths, as text."""
    return "an unknown share" if share is None else f"{100 * share:.0f} %"
