"""Token weights: which tokens they mark, by hand, and that training then acts on these alone."""

import pytest
import torch

from expunge.data.batches import encode
from expunge.data.examples import Example
from expunge.errors import DataError
from expunge.unlearn.section import Branch
from expunge.unlearn.weighting import WEIGHTINGS, Weighting, token_places, token_weights

ANSWER = "Call Zoë at 212-555-0187, or the office."


@pytest.fixture(scope="module")
def item(tokenizer):
    return encode(Example("f0", "Who is it? ", ANSWER), tokenizer, max_length=99)


def marked(item, tokenizer, scope="answer", **fields) -> str:
    """The text of the tokens that weigh 1; the tokenizer's are bytes."""
    (weights,) = token_weights(Weighting(**fields), [item], scope, tokenizer, None)
    tokens = item.tokens[item.scored_from(scope) :]
    assert len(weights) == len(tokens)
    return tokenizer.decode([t for t, w in zip(tokens, weights, strict=True) if w == 1])


def test_weights_worked_by_hand(item, tokenizer):
    assert marked(item, tokenizer, kind="spans", patterns=["off.*e"]) == "office"
    assert marked(item, tokenizer, kind="spans", pii=["phone"]) == "212-555-0187"
    assert marked(item, tokenizer, kind="entities") == "CallZoë212-555-0187"
    both = {"kind": "spans", "patterns": ["is"], "pii": ["phone", "email"]}
    assert marked(item, tokenizer, "document", **both) == "is212-555-0187"
    logps = torch.tensor([0.0, -1.0, -9.0])
    for kind, wanted in (("surprisal", 1 - logps.exp()), ("memorised", logps.exp())):
        (weights,) = token_weights(Weighting(kind=kind), [item], "answer", tokenizer, [logps])
        torch.testing.assert_close(weights, wanted)
        (weights,) = token_weights(
            Weighting(kind=kind, least=0.5), [item], "answer", tokenizer, [logps]
        )
        torch.testing.assert_close(weights, wanted.clamp_min(0.5))


def test_the_memorisation_gap_by_hand(item, tokenizer):
    """A token that both models know weighs nothing, nor does one that the base knows better."""
    count = len(item.tokens) - item.answer_start
    logps = torch.full((count,), 0.9).log()
    levels = torch.full((len(item.tokens) - 1, 2), 0.9).log()
    levels[-3:, 0] = torch.tensor([0.2, 0.9, 0.95]).log()
    levels[:, 1] = 7.0  # the standardised ones, which are not read
    config = Weighting(kind="memorisation_gap")
    (weights,) = token_weights(config, [item], "answer", tokenizer, [logps], [levels])
    assert weights[-3:].tolist() == pytest.approx([0.7, 0.0, 0.0], abs=1e-6)
    assert not weights[:-3].any()


def test_a_gap_without_levels_of_tokens_is_refused():
    term = {"half": "forget", "loss": "gradient_ascent"}
    term["weighting"] = {"kind": "memorisation_gap"}
    assert Branch.model_validate({"terms": [term], "levels": {"of": "original"}})  # control
    for levels, says in (
        (None, "weighting memorisation_gap reads a level for each item; give levels.of"),
        ({"of": "unseen"}, "weighting memorisation_gap reads a level for each token, and"),
    ):
        with pytest.raises(ValueError, match=says):
            Branch.model_validate({"terms": [term], "levels": levels})
    with pytest.raises(ValueError, match="only the items of forget have levels, not those of ref"):
        Branch.model_validate({"terms": [{**term, "half": "refusal", "loss": "nll"}]})


def test_tokens_lie_where_their_text_is(item, tokenizer):
    text, places = token_places(tokenizer, item.tokens)
    assert text == "Who is it? " + ANSWER
    assert len(places) == len(item.tokens)
    assert places[-1] == (len(text), len(text))  # the end of text has no place
    two = [place for place in places if text[slice(*place)] == "ë"]
    assert len(two) == 2  # bytes
    assert [place for place in places if place[1] - place[0] > 1] == []
    cut = token_places(tokenizer, item.tokens[: item.tokens.index(item.tokens[0]) + 20])
    assert len(cut[1]) == 20


def test_the_least_weight_is_that_of_all_other_tokens(item, tokenizer):
    config = Weighting(kind="spans", patterns=["office"], least=0.25)
    (weights,) = token_weights(config, [item], "answer", tokenizer, None)
    assert weights.unique().tolist() == [0.25, 1.0]


def test_weights_that_mark_nothing_anywhere_are_refused(item, tokenizer):
    config = Weighting(kind="spans", patterns=["elephant"])
    with pytest.raises(DataError, match="the weighting spans gives no token of 1 items a weight"):
        token_weights(config, [item], "answer", tokenizer, None)


def test_every_weighting_lies_between_its_least_and_1(item, tokenizer):
    logps = [-torch.rand(len(item.tokens) - item.answer_start, generator=torch.Generator())]
    for kind in WEIGHTINGS:
        given = {"patterns": ("a",)} if kind == "spans" else {}
        config = Weighting(kind=kind, least=0.1, **given)
        levels = [torch.full((len(item.tokens) - 1, 2), -1.0)]
        (weights,) = token_weights(config, [item], "answer", tokenizer, logps, levels)
        assert weights.min() >= 0.1, kind
        assert weights.max() <= 1, kind
        assert weights.unique().numel() > 1, kind  # control: they differ
