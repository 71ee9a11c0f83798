"""The verdict's sentences say what the numbers say, and no more than their intervals allow."""

import math

import numpy as np
import pytest

from expunge.errors import GateError
from expunge.evaluate.gates import check_runs, parse_gates
from expunge.evaluate.membership import auc_interval
from expunge.evaluate.numbers import Number, wilson
from expunge.report.certainty import doubts, half_number
from expunge.report.page import cards
from expunge.report.pieces import Material
from expunge.report.results import Results, Semeval
from expunge.report.story import models_compared
from expunge.report.verdict import verdict


def test_the_verdict_follows_the_numbers(results):
    def after(forget, retain, collapsed=False):
        content = results.model_dump()
        merged = content["models"]["merged"]
        merged["collapse"]["collapsed"] = collapsed
        for term in merged["semeval"]["terms"]:
            merged["semeval"]["terms"][term] = forget if term.startswith("forget") else retain
        return verdict(Results.model_validate(content))[0]

    assert after(0.1, 0.9) == "The merged model forgot what it should, and kept the rest."
    assert after(0.49, 0.9).startswith("The merged model forgot only part of what it should, but")
    assert "still knows what it should forget, but kept" in after(0.51, 0.9)
    assert "forgot what it should, but kept only part" in after(0.1, 0.7)
    assert "forgot what it should, but lost the rest" in after(0.1, 0.4)
    assert "Failed" in after(0.9, 0.4)
    assert "destroyed" in after(0.1, 0.9, collapsed=True)
    assert "was not measured" in after(0.1, 0.9, collapsed=None)


def test_models_that_the_contest_would_refuse_for_their_mmlu_are_named(results):
    content = results.model_dump()
    scores = {"target": 0.4, "strong": 0.29, "linear": 0.3, "merged": 0.38}
    for name, accuracy in scores.items():
        content["models"][name]["semeval"]["mmlu"] = {"accuracy": accuracy}

    def said() -> list[str]:
        found = verdict(Results.model_validate(content))
        return [sentence for sentence in found if "MMLU" in sentence]

    assert said() == [
        "Of the target model's MMLU accuracy less than 75 % is left, which the contest asks for: "
        "strong 72 %."
    ]
    content["models"]["strong"]["semeval"]["mmlu"] = {"accuracy": 0.31}
    assert said() == []
    content["models"]["target"]["semeval"]["mmlu"] = None
    assert said() == []


def test_without_a_retain_set_the_verdict_is_of_the_forget_half_alone(results):
    content = results.model_dump()
    for model in content["models"].values():
        terms = model["semeval"]["terms"]
        model["semeval"]["terms"] = {t: v for t, v in terms.items() if t.startswith("forget")}

    def after(forget, count=None) -> list[str]:
        merged = content["models"]["merged"]["semeval"]
        for term in merged["terms"]:
            merged["terms"][term], merged["counts"][term] = forget, count
        return verdict(Results.model_validate(content))

    unsaid = "whether it kept the rest was not measured."
    assert after(0.1)[0] == f"The merged model forgot what it should; {unsaid}"
    assert "Kept: at least" in " ".join(after(0.1))
    assert after(0.9)[0].startswith("Failed: the merged model still knows what it should forget;")
    assert after(0.2, count=1)[0] == (
        f"6 items are too few to say whether the merged model forgot them; {unsaid}"
    )
    del content["models"]["target"]["semeval"]["terms"]["forget/Task1/sc"]
    content["models"]["target"]["semeval"]["terms"] = {"retain/Task1/sc": 0.9}
    assert after(0.1)[0].startswith("There is no verdict")  # control: it was measured before


def test_the_verdict_tells_its_thresholds(results):
    told = " ".join(verdict(results)[1:])
    assert "Forgotten: at most 30 % of what was known before is left" in told
    assert "Kept: at least 80 % is left; lost: less than 50 %" in told
    kept = {name: results.models[name] for name in ("target", "strong")}  # control: no grade
    assert "Kept: at least" not in " ".join(verdict(results.model_copy(update={"models": kept})))


def asked(results, count, forget, retain) -> str:
    """The headline where each term has so many items, with the intervals of hits and misses."""
    content = results.model_dump()
    merged = content["models"]["merged"]["semeval"]
    for term in merged["terms"]:
        value = forget if term.startswith("forget") else retain
        low, high = wilson(value * count, count)
        merged["terms"][term], merged["counts"][term] = value, count
        merged["intervals"][term] = {"low": low, "high": high}
    return verdict(Results.model_validate(content))[0]


def test_the_headline_is_no_surer_than_its_items(results):
    few = asked(results, 1, 0.1, 0.9)
    assert few == (
        "Too few items to say whether the merged model forgot what it should (6 items) "
        "or kept the rest (6 items)."
    )
    some = asked(results, 20, 0.2, 1.0)
    assert some == "The merged model probably forgot what it should, and kept the rest."
    sure = asked(results, 200, 0.2, 1.0)  # control: the same shares of more items
    assert sure == "The merged model forgot what it should, and kept the rest."
    half = asked(results, 4, 0.0, 0.75)
    assert half.endswith("; 24 items are too few to say whether it kept the rest.")


def test_the_interval_of_a_half_is_that_of_its_tasks_together():
    terms = {"forget/a/sc": 0.0, "forget/b/sc": 0.5, "forget/c/sc": 0.4, "retain/a/sc": 1.0}
    semeval = Semeval.model_validate(
        {
            "terms": terms,
            "counts": {"forget/a/sc": 2, "forget/b/sc": 9, "forget/c/sc": 1},
            "intervals": {
                "forget/a/sc": {"low": 0.0, "high": 0.0},  # of an older version
                "forget/b/sc": {"low": 0.2, "high": 0.9},
                "forget/c/sc": None,
            },
        }
    )
    found = half_number(semeval, "forget", "sc")
    assert (found.value, found.n) == (pytest.approx(0.3), 12)
    assert found.low == pytest.approx(0.3 - math.hypot(0.3, 0.4) / 3)
    assert found.high == pytest.approx(0.3 + math.hypot(wilson(0, 2)[1], 0.4, 0.6) / 3)
    assert half_number(semeval, "retain", "sc") == Number(1.0, 0)  # nothing tells its spread


def test_the_verdict_is_about_the_calibrated_model_where_there_is_one(results):
    content = results.model_dump()
    content["models"]["calibrated"] = content["models"]["merged"]
    assert models_compared(Results.model_validate(content)) == ("target", "calibrated")
    assert models_compared(results) == ("target", "merged")
    content["models"]["calibrated"] = {}  # made, and not measured yet
    assert models_compared(Results.model_validate(content)) == ("target", "merged")


def test_a_target_that_was_broken_before_is_not_blamed_on_unlearning(results):
    def told(before, after):
        content = results.model_dump()
        content["models"]["target"]["collapse"]["collapsed"] = before
        content["models"]["merged"]["collapse"]["collapsed"] = after
        return verdict(Results.model_validate(content))

    for after in (True, False):
        (sentence,) = told(True, after)
        assert sentence == (
            "Nothing can be judged: the target model was no working language model before "
            "anything was removed."
        )
    assert told(False, True)[0].startswith("Failed: the merged model is destroyed")  # control


def test_one_sentence_names_every_destroyed_model_without_its_measures(results):
    def told(*names):
        content = results.model_dump()
        for name, model in content["models"].items():
            model["collapse"] |= {"collapsed": name in names, "reasons": ["neutral: looping 1.00"]}
        said = verdict(Results.model_validate(content))
        assert "looping" not in " ".join(said)
        return [one for one in said if "destroyed" in one]

    assert told() == []
    assert told("strong") == [
        "The strong model is destroyed as a language model; its scores mean nothing."
    ]
    assert told("strong", "linear", "merged")[1:] == [
        "The strong, merged and linear models are destroyed as language models; their scores "
        "mean nothing."
    ]
    (only,) = told("merged")  # the headline
    assert only.startswith("Failed")


def test_a_change_of_nothing_is_no_change(results):
    def told(after):
        rows = {
            name: [
                {"id": f"{n}sc1", "half": "retain", "task": "a", "kind": "sc", "score": score}
                for n, score in enumerate(scores)
            ]
            for name, scores in {"target": [0.5] * 6, "merged": after}.items()
        }
        material = Material(results, rows)
        (card,) = [card for card in cards(material) if card.name == "retain half, completion"]
        return " ".join(doubts(material)), card.note

    said, note = told([0.5] * 6)
    assert "The retain completion did not change: each of 6 items scores as before." in said
    assert note == "did not change" and "explains" not in said
    said, note = told([0.4, 0.6] * 3)  # control: each item changes, their mean does not
    assert "no more than the choice of 6 items explains" in said and "did not change" not in said
    assert note == "no more than noise"
    assert "the 1 item scores as before" in told([0.5])[0]


def test_there_is_no_verdict_on_what_was_not_known_before(results):
    content = results.model_dump()
    terms = content["models"]["target"]["semeval"]["terms"]
    terms |= {term: 0.1 for term in terms if term.startswith("forget")}
    assert "no verdict" in verdict(Results.model_validate(content))[0]
    only = results.model_copy(update={"models": {"target": results.models["target"]}})
    assert "no verdict" in verdict(only)[0]


def test_the_verdict_reads_the_membership_attack(results):
    def sentence(name):
        kept = {n: results.models[n] for n in ("target", name)}
        return " ".join(verdict(results.model_copy(update={"models": kept})))

    assert "no better than guessing (AUC 0.50" in sentence("merged")
    assert "below what a stranger knows" in sentence("strong")
    assert "was not measured" in sentence("linear")


def with_membership(results, **mia) -> list[str]:
    """The verdict where the merged model's membership is this."""
    content = results.model_dump()
    content["models"]["merged"]["semeval"]["mia"] = mia
    return verdict(Results.model_validate(content))


def test_a_model_that_can_be_told_to_be_trained_on_it_has_not_simply_forgotten(results):
    def headline(auc, low, high, n=80):
        return with_membership(results, auc=auc, low=low, high=high, n=n)[0]

    above = headline(0.92, 0.87, 0.97)
    assert above.startswith("The merged model no longer says what it should forget, and kept")
    assert ". But one can still tell that it was trained on what it should forget." in above
    assert "below unseen text" in headline(0.1, 0.03, 0.2)
    for told in (headline(0.5, 0.42, 0.58), headline(0.62, 0.4, 0.83)):  # control
        assert told == "The merged model forgot what it should, and kept the rest."
    low, high = auc_interval(1.0, np.ones(20), 2, 2)
    assert "still tell" not in headline(1.0, low, high, n=4)  # two and two part by chance
    low, high = auc_interval(1.0, np.ones(20), 6, 6)
    assert "still tell" in headline(1.0, low, high, n=12)


def test_a_wide_membership_interval_is_not_called_guessing(results):
    def sentences(low, high, **counts):
        return " ".join(with_membership(results, auc=0.6, low=low, high=high, **counts))

    wide = sentences(0.40, 0.83, n=15, members=8, nonmembers=7)
    assert "8 forgotten and 7 never-seen documents cannot tell" in wide
    assert "guessing is 0.50" in wide and "no better than guessing" not in wide
    assert "15 documents cannot tell" in sentences(0.40, 0.83, n=15)
    narrow = sentences(0.45, 0.64, n=150, members=80, nonmembers=70)  # control
    assert "no better than guessing (80 forgotten and 70 never-seen documents: AUC 0.60" in narrow


def attacked(results: Results, low: float) -> Results:
    content = results.model_dump()
    content["models"]["merged"]["relearn"] = {
        "documents": 10,
        "exact": {
            "forget_before": 0.45,
            "forget_after": 0.67,
            "control_before": 0.455,
            "control_after": 0.46,
        },
        "recovered": 0.215,
        "recovered_interval": {"low": low, "high": 0.3},
        "left": 0.21,
        "n": 80,
    }
    return Results.model_validate(content)


def test_the_verdict_says_that_what_comes_back_was_hidden(results):
    told = verdict(attacked(results, low=0.1))
    assert "But it is hidden, not gone: training on a few documents brings back others." in told[0]
    assert (
        "Trained on 10 of the forgotten documents, the merged model guesses 67 % of the tokens of "
        "the others (before: 45 %), and 46 % of those of never-seen documents (before: 46 %)."
    ) in told
    within = verdict(attacked(results, low=-0.1))  # control: may be chance
    assert "hidden" not in within[0] and any("Trained on 10" in one for one in within)
    assert "hidden" not in " ".join(verdict(results))
    content = results.model_dump()
    content["models"]["merged"]["relearn"] = {"failed": "the loss became nan"}
    told = verdict(Results.model_validate(content))
    said = "Whether the merged model hides what it forgot is not known: the loss became nan."
    assert said in told and "hidden" not in told[0]


def test_what_comes_back_is_a_number_for_gates(results):
    content = attacked(results, low=0.1).model_dump(mode="json")
    models = {"merged": content["models"]["merged"]}
    models["merged"]["semeval"]["final"] = None
    said = r"merged\.relearn\.recovered is 0\.215, and must not be > 0\.05"
    with pytest.raises(GateError, match=said):
        check_runs(parse_gates(["merged.relearn.recovered > 0.05"]), {"run": models})
    check_runs(parse_gates(["merged.relearn.recovered > 0.5"]), {"run": models})


def test_the_verdict_says_that_unseen_documents_were_lost_too(results):
    content = results.model_dump()

    def said(now) -> list[str]:
        for name, nll in (("target", 2.69), ("merged", now)):
            content["models"][name]["nll"]["nonmembers"] = nll
        told = verdict(Results.model_validate(content))
        return [one for one in told if "lost as well" in one]

    assert said(9.48) == [
        "Documents that no model has read were lost as well: the merged model's NLL of them is "
        "9.48 nats a token (before: 2.69), so that a comparison with them says little."
    ]
    assert said(3.6) == [] and said(None) == []  # control: within a nat, and not measured
