"""Courses of training as tables, and what a model says of given texts."""

import math

import pytest
import torch

from expunge import lora
from expunge.analyse.likelihoods import kl_to_target, likelihoods, term_likelihoods
from expunge.analyse.trajectories import Course, epoch_of, epochs, objectives, trajectory_tables
from expunge.data.batches import TokenSequence
from expunge.data.examples import Document, Example
from expunge.evaluate.reader import reader_of
from expunge.evaluate.suite import Evaluate, EvaluationData, evaluate
from expunge.packs import hidden_states

READING = {"max_length": 200, "prompt_tail": None, "separator": " "}


@pytest.mark.parametrize(
    ("step", "epoch"), [(0, 0), (5, 0.5), (10, 1), (20, 1.5), (30, 2), (31, 2), (99, 2)]
)
def test_epochs_may_be_of_unequal_length(step, epoch):
    assert epoch_of(step, (10, 30)) == epoch


def measured(forget: float, retain: float, kl: float, **terms: float) -> dict:
    return {
        "nll": {"forget": forget, "retain": retain},
        "kl": kl,
        "terms": {
            f"forget/{name}": {"hits": value, "exact": value} for name, value in terms.items()
        },
    }


@pytest.fixture
def course():
    return Course(
        "strong",
        ends=(2, 4),
        log=[{"step": n + 1, "lr": 0.1, "forget": 1.0 - n} for n in range(4)],
        watched=[{"step": 2, "numbers": {"nll.forget": 1.5, "nll.retain": 0.5}}],
        measured={4: measured(3, 1, 0.5), 0: measured(0.1, 0.2, 0)},
        final=measured(3, 1, 0.5),
    )


def test_losses_and_kl_over_epochs_come_in_the_order_of_training(course):
    rows = objectives(course)
    assert [(r["step"], r["epoch"], r["source"]) for r in rows] == [
        (0, 0, "snapshot"),
        (2, 1, "watch"),
        (4, 2, "snapshot"),
        (4, 2, "final"),
    ]
    assert [r["forget_nll"] for r in rows] == [0.1, 1.5, 3, 3]
    assert [r["kl"] for r in rows] == [0, None, 0.5, 0.5]  # a watch measures none


def test_regurgitation_and_knowledge_by_half_and_task():
    # The scores of what was written, from an evaluation; without one, the first choices alone.
    written = {
        "semeval": {"terms": {"forget/Task1/sc": 0.8, "forget/Task1/qa": 0.4, "forget/Task2/qa": 0}}
    }
    scored = {"terms": {"forget/Task1/sc": {"hits": 0.6}, "forget/Task1/qa": {"exact": 0.5}}}
    rows = epochs(Course("a", (2,), measured={0: written, 2: scored}))
    found = {(r["step"], r["task"]): r for r in rows}
    assert found.keys() == {(0, "all"), (0, "Task1"), (0, "Task2"), (2, "all"), (2, "Task1")}
    assert found[0, "all"]["knowledge"] == pytest.approx(0.2)
    assert found[0, "all"]["regurgitation"] == 0.8  # of the one task that has it
    assert found[2, "Task1"]["completion_hits"] == 0.6
    assert found[2, "Task1"]["knowledge"] is None


def test_every_step_of_the_log_is_a_row(course):
    rows = trajectory_tables([course])["training"]
    assert [(r["branch"], r["step"], r["epoch"], r["forget"]) for r in rows] == [
        ("strong", 1, 0.5, 1.0),
        ("strong", 2, 1.0, 0.0),
        ("strong", 3, 1.5, -1.0),
        ("strong", 4, 2.0, -2.0),
    ]


@pytest.fixture
def data():
    items = {
        half: [
            Example(f"{half}-{n}{kind}0", f"{half} {n} ?", f"{n} is {kind}", "Task1")
            for n in range(3)
            for kind in ("sc", "qa")
        ]
        for half in ("forget", "retain")
    }
    documents = [Document(f"d{n}", f"the {n}th text") for n in range(4)]
    return EvaluationData(**items, members=documents[:2], nonmembers=documents[2:])


def test_likelihoods_are_those_of_the_whole_evaluation(tiny, tokenizer, data):
    reader, config = reader_of(tiny, tokenizer), Evaluate(max_new_tokens=2, resamples=20)
    found = likelihoods(reader, data, config, READING)
    read = reader.forwards
    entry, items = evaluate(reader, data, config, **READING)
    assert found["nll"] == entry["nll"]
    assert found["mia"] == entry["semeval"]["mia"]
    # Texts are known; prompts and openings are continued, but those whose scores said it all.
    assert read < reader.forwards <= read + 12 + 20
    own = [i["nll"] for i in items if i["half"] == "retain" and i["kind"] == "qa"]
    assert found["terms"]["retain/Task1/qa"]["nll"] == pytest.approx(sum(own) / 3)
    assert found["terms"]["retain/Task1/qa"]["n"] == 3


def test_first_choices_by_hand():
    from expunge.evaluate.tables import TokenScores

    def scores(*hits: bool) -> TokenScores:
        zeros = torch.zeros(len(hits)).numpy()
        return TokenScores(zeros - math.log(2), zeros, torch.tensor(hits).numpy(), zeros, zeros)

    examples = [Example(f"d{n}-qa0", "p", "a", "Task2") for n in range(2)]
    found = term_likelihoods("forget", examples, [scores(True, True), scores(True, False)])
    assert found == {
        "forget/Task2/qa": {"nll": pytest.approx(math.log(2)), "hits": 0.75, "exact": 0.5, "n": 2}
    }


def test_kl_to_the_target_is_that_of_the_whole_distributions(tiny):
    sequences = [
        TokenSequence(str(n), tuple(range(1 + n, 9 + 2 * n)), answer_start=3) for n in range(3)
    ]

    def log_probs(sequence):
        with torch.no_grad():
            logits = tiny(torch.tensor([sequence.tokens])).logits[0, 2:-1]
        return logits.log_softmax(-1)

    before = [log_probs(sequence) for sequence in sequences]
    lora.add_adapter(tiny, lora.Lora(rank=2, alpha=2, dropout=0), seed=0)
    from expunge.data.batches import pack

    with torch.no_grad():
        states = [hidden_states(tiny, pack([s], "answer", "cpu")) for s in sequences]
    assert kl_to_target(tiny, sequences, states) == pytest.approx(0, abs=1e-6)  # B = 0
    for layer in lora.adapters_of(tiny).values():
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
    after = [log_probs(sequence) for sequence in sequences]
    expected = [
        float((q.exp() * (q - p)).sum(-1).mean()) for q, p in zip(before, after, strict=True)
    ]
    assert kl_to_target(tiny, sequences, states) == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert kl_to_target(tiny, [], []) is None
