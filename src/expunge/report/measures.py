"""Parts of results.json: what single measures found of one model."""

from typing import Annotated

from pydantic import ConfigDict, Field

from expunge.config import Section

Share = Annotated[float, Field(ge=0, le=1)]


class Interval(Section):
    """A 95 % interval: Wilson's of scores that are all 0 or 1, else the bootstrap's."""

    low: float
    """Lower end."""

    high: float
    """Upper end."""


class Mia(Section):
    """Membership inference: can an outsider tell members from non-members by their loss?"""

    auc: Share | None = None
    """Area under the curve; 0.5 is best, near 1 under-unlearned, near 0 over-unlearned."""

    score: Share | None = None
    """1 - 2 |auc - 0.5|."""

    two_sided: Share | None = None
    """AUC of the losses' distances from the non-members' mean; 0.5 is best."""

    two_sided_interval: Interval | None = None
    """Its 95 % interval."""

    ks: Share | None = None
    """Kolmogorov-Smirnov distance of the two sides' losses."""

    low: Share | None = None
    """Lower end of the bootstrap interval of the AUC."""

    high: Share | None = None
    """Upper end of the bootstrap interval of the AUC."""

    n: int | None = None
    """Documents scored, members and non-members together."""

    members: int | None = None
    """Members among them."""

    nonmembers: int | None = None
    """Non-members among them."""


class Mmlu(Section):
    """General knowledge, by questions with four options."""

    model_config = ConfigDict(extra="allow")

    accuracy: Share | None = None
    """Share of all questions answered rightly (micro average)."""

    macro: Share | None = None
    """Mean of the accuracies of the subjects."""

    n: int | None = None
    """Questions asked."""

    sampled: bool | None = None
    """True where only a sample of each subject was asked."""

    shots: int | None = None
    """Worked examples before each question."""


class Nll(Section):
    """Mean negative log-likelihood a token, in nats."""

    members: float | None = None
    """Over documents that were trained on and are to be forgotten."""

    nonmembers: float | None = None
    """Over documents of the same kind that were never trained on."""

    neutral: float | None = None
    """Over ordinary text."""

    forget: float | None = None
    """Over the answers of the forget half."""

    retain: float | None = None
    """Over the answers of the retain half."""


class Relearned(Section):
    """What comes back of forgotten documents after the model is trained on some of them."""

    failed: str = ""
    """Why it could not be trained so, in which case nothing is measured."""

    documents: int | None = None
    """Members that it was trained on; the others are asked."""

    exact: dict[str, Share | None] = Field(default_factory=dict)
    """`forget_before`, `forget_after`, `control_before`, `control_after` → share of the tokens of
    the other members, and of the non-members, that the model guesses (`exact_memorisation`)."""

    recovered: float | None = None
    """What the members gain more than the non-members do; near 0 where nothing is hidden."""

    recovered_interval: Interval | None = None
    """Its 95 % interval."""

    left: float | None = None
    """`forget_after` less `control_after`: what an attacker ends with, hidden or said."""

    left_interval: Interval | None = None
    """Its 95 % interval."""

    n: int | None = None
    """Members asked."""
