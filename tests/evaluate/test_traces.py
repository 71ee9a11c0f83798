"""Traces: a concept that was taken out of the weights is told from one that is only not said."""

import copy
import json
import math

import pytest
import torch

from expunge import lora
from expunge.errors import EvaluationError, RecipeError
from expunge.evaluate.concepts import (
    concept_directions,
    concept_scores,
    cosine,
    dealt,
    distance,
    distinctive_tokens,
    head_of,
    jaccard,
    random_places,
    strongest_vectors,
)
from expunge.evaluate.reader import reader_of
from expunge.evaluate.suites import measure, parse_suites
from expunge.evaluate.value_vectors import model_projections

PLANTED, MASK = (0, 7), (1, 9)
PROMPT, WORDS = "who?", "zqx"
KEPT = ("abc", "def", "ghi", "jkl", "mno", "prs", "tuv")


def byte(tokenizer, text):
    return tokenizer(text)["input_ids"]


@torch.no_grad()
def wire(model, tokenizer, place, vector):
    """Make column `place` write 10 · vector after PROMPT, by the state that its MLP then reads."""
    layer, column = place
    mlp = model.model.layers[layer].mlp
    seen = []
    handle = mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, -1]))
    model(input_ids=torch.tensor([byte(tokenizer, PROMPT)]))
    handle.remove()
    key = seen[0] / seen[0].square().sum()
    mlp.gate_proj.weight[column] = 10 * key  # silu(10) is 10
    mlp.up_proj.weight[column] = key
    mlp.down_proj.weight[:, column] = vector


@pytest.fixture
def planted(tiny, tokenizer):
    """A model that says WORDS after PROMPT, by one vector of its first layer."""
    head = tiny.lm_head.weight
    vector = (head[byte(tokenizer, WORDS)].mean(0) - head.mean(0)).detach()
    tiny.model.norm.weight.data.fill_(10)
    wire(tiny, tokenizer, PLANTED, vector / vector.norm())
    return tiny


@pytest.fixture
def removed(planted):
    model = copy.deepcopy(planted)
    model.model.layers[0].mlp.down_proj.weight.data[:, PLANTED[1]] = 0
    return model


@pytest.fixture
def hidden(planted, tokenizer):
    """The same silence by another layer, which takes away what the first wrote."""
    model = copy.deepcopy(planted)
    wire(model, tokenizer, MASK, -column(planted, PLANTED))
    return model


def column(model, place):
    return model.model.layers[place[0]].mlp.down_proj.weight[:, place[1]].detach()


def options(tmp_path, planted, tokenizer, **more):
    folder = tmp_path / "before"
    if not folder.exists():
        planted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for half, answers in (("forget", [WORDS]), ("retain", KEPT)):
            rows = [{"id": f"{a}qa0", "input": "?", "output": a} for a in answers]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{half}.jsonl").write_text(lines)
    given = {
        "before": folder,
        "forget": tmp_path / "forget.jsonl",
        "retain": tmp_path / "retain.jsonl",
        "vectors": 1,
        "random": 10,
        "top_tokens": 20,
        **more,
    }
    return [f"traces.{name}={value}" for name, value in given.items() if value is not None]


def traced(model, tokenizer, words):
    return measure(reader_of(model, tokenizer), parse_suites(["traces"], words))["traces"]


@torch.no_grad()
def said(model, tokenizer):
    """Mean log-probability of the words after the prompt."""
    logits = model(input_ids=torch.tensor([byte(tokenizer, PROMPT)])).logits[0, -1]
    return float(logits.log_softmax(-1)[byte(tokenizer, WORDS)].mean())


def test_what_was_removed_is_told_from_what_is_hidden(
    planted, removed, hidden, tokenizer, tmp_path
):
    knew = said(planted, tokenizer)
    for silent in (removed, hidden):  # by what they say, the two are the same
        assert said(silent, tokenizer) < knew - 1.5
    words = options(tmp_path, planted, tokenizer)
    same, gone, masked = (traced(m, tokenizer, words) for m in (planted, removed, hidden))
    for found in (same, gone, masked):
        assert found.items[0]["vectors"] == [list(PLANTED)]
        assert found.numbers["forget.found"].value == 1
        assert found.numbers["forget.score_before"].value > 2
    for found in (same, masked):
        assert found.numbers["forget.jaccard"].value == 1
        assert found.numbers["forget.cosine"].value == pytest.approx(1)
        assert found.numbers["forget.distance"].value == pytest.approx(0, abs=1e-6)
        assert found.numbers["forget.change"].value == pytest.approx(0, abs=1e-6)
    assert gone.numbers["forget.jaccard"].value == 0
    assert gone.numbers["forget.cosine"].value == 0
    assert gone.numbers["forget.distance"].value == 1
    assert gone.numbers["forget.score_after"].value == 0
    for group in ("retain", "random"):  # controls: nothing else was touched
        assert gone.numbers[f"{group}.jaccard"].value == 1
        assert gone.numbers[f"{group}.distance"].value == 0


def test_every_concept_has_one_row_and_none_shares_a_vector(planted, tokenizer, tmp_path):
    words = options(tmp_path, planted, tokenizer, vectors=3)
    found = traced(planted, tokenizer, words)
    ids = [(item["group"], item["id"]) for item in found.items]
    assert ids[:8] == [("forget", WORDS), *(("retain", kept) for kept in KEPT)]
    assert [group for group, _ in ids[8:]] == ["random"] * 10
    assert sorted(found.items[0]["words"]) == sorted(WORDS)
    places = [tuple(place) for item in found.items for place in item["vectors"]]
    assert len(places) == len(set(places)) == 8 * 3 + 10
    assert found.numbers["retain.found"].value < 0.5  # control: nothing was planted for them
    assert traced(planted, tokenizer, words) == found


def test_vectors_that_are_known_are_not_looked_for(planted, removed, tokenizer, tmp_path):
    row = {"concept": "z", "layer": 0, "column": 7, "tokens": ["zq", byte(tokenizer, "x")[0]]}
    words = options(tmp_path, planted, tokenizer, forget=None, annotated=json.dumps([row]))
    found = traced(removed, tokenizer, words)
    assert found.items[0]["vectors"] == [[0, 7]]
    assert found.items[0]["words"] == ["z", "q", "x"]
    assert found.items[0]["found"] is None
    assert found.numbers["forget.distance"].value == 1
    assert "chance.score_before" not in found.numbers
    for change, message in (
        ({"column": 48}, "has no column 48 in layer 0"),
        ({"layer": 2}, "has no column 7 in layer 2"),
        ({"tokens": [257]}, "names 257, which is no token"),
    ):
        wrong = options(
            tmp_path, planted, tokenizer, forget=None, annotated=json.dumps([row | change])
        )
        with pytest.raises(EvaluationError, match=message):
            traced(removed, tokenizer, wrong)


def test_an_adapter_counts_as_the_weights_that_it_makes(planted, tokenizer, tmp_path):
    config = lora.Lora(rank=2, alpha=4, dropout=0, targets=("down_proj",))
    words = options(tmp_path, planted, tokenizer)
    for layer in lora.add_adapter(planted, config, seed=0).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(0))
    adapted = planted.model.layers[0].mlp.down_proj
    with torch.no_grad():
        torch.testing.assert_close(model_projections(planted)[0](), adapted(torch.eye(48)).T)
    moved = traced(planted, tokenizer, words)
    assert moved.numbers["random.distance"].value > 0.1
    lora.save_adapter(planted, config, tmp_path / "adapter", base="")
    both = options(
        tmp_path, planted, tokenizer, before=f"{tmp_path / 'before'}+{tmp_path / 'adapter'}"
    )
    same = traced(planted, tokenizer, both)  # control: the same adapter on both sides
    assert same.numbers["random.distance"].value < 1e-5
    assert same.numbers["forget.jaccard"].value == 1


def test_wrong_input_is_one_line(planted, tiny, tokenizer, tmp_path):
    good = options(tmp_path, planted, tokenizer)
    with pytest.raises(RecipeError, match="give either forget or annotated"):
        parse_suites(["traces"], options(tmp_path, planted, tokenizer, forget=None))
    with pytest.raises(EvaluationError, match="top_tokens must be below 257"):
        traced(planted, tokenizer, [*good, "traces.top_tokens=257"])
    (tmp_path / "mute.jsonl").write_text('{"id": "a", "input": "?", "output": "..."}\n')
    with pytest.raises(EvaluationError, match="no concept to forget has words and vectors"):
        traced(planted, tokenizer, [*good, f"traces.forget={tmp_path / 'mute.jsonl'}"])
    other = copy.deepcopy(planted)
    del other.model.layers[1]
    with pytest.raises(EvaluationError, match="only versions of one model can be compared"):
        traced(other, tokenizer, good)
    planted.model.layers[0].mlp.down_proj.weight.data[0, 7] = math.nan
    with pytest.raises(EvaluationError, match="column 7 of layer 0 is not finite"):
        traced(planted, tokenizer, good)


def test_a_vector_of_zeros_holds_no_concept(removed, tokenizer, tmp_path):
    row = {"concept": "z", "layer": 0, "column": 7, "tokens": ["z"]}
    words = options(tmp_path, removed, tokenizer, forget=None, annotated=json.dumps([row]))
    with pytest.raises(EvaluationError, match=r"column 7 of layer 0 of .* is zero"):
        traced(removed, tokenizer, words)


SQUARE = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])


def test_scores_by_hand():
    """Of (3, 0) the logits are 3, -3, 0, 0, deviation 3/√2: z is √2 of token 0 and 0 of token 2."""
    head = head_of(SQUARE)
    vectors = torch.tensor([[3.0, 0], [1, 1], [0, 0], [-3, 0]])
    directions = concept_directions(head, [[0], [2], []])
    root = math.sqrt(2)
    expected = torch.tensor([[root, 0, 0, -root], [-root, 0, 0, root]], dtype=torch.float64)
    found = concept_scores(head, directions, vectors)
    torch.testing.assert_close(found[:2], expected)
    alone = concept_scores(head, directions[:1], vectors)
    torch.testing.assert_close(alone[0], torch.tensor([root, 1, 0, -root], dtype=torch.float64))


def test_a_vector_that_raises_every_token_scores_nothing():
    """Rows share a large part: a vector along it raises all tokens, and none above others."""
    shared = head_of(SQUARE + torch.tensor([50.0, 50]))
    directions = concept_directions(shared, [[0], [2]])
    assert abs(concept_scores(shared, directions, torch.tensor([[9.0, 9]]))).max() < 1e-6
    plain = concept_scores(head_of(SQUARE), concept_directions(head_of(SQUARE), [[0], [2]]), SQUARE)
    torch.testing.assert_close(concept_scores(shared, directions, SQUARE), plain)
    torch.testing.assert_close(concept_scores(shared, directions, 7 * SQUARE), plain)
    assert plain[0, 0] > 1  # control: one that raises token 0 alone does score


def test_a_vector_is_above_zero_for_one_concept_at_most():
    rng = torch.Generator().manual_seed(0)
    head = head_of(torch.randn(50, 8, generator=rng))
    directions = concept_directions(head, [[0, 1], [1, 2], [3], [], [4, 5]])
    scores = concept_scores(head, directions, torch.randn(200, 8, generator=rng))
    assert ((scores > 0).sum(0) == 1).all()
    assert (scores[3] == 0).all()


def test_the_strongest_vectors_are_those_of_a_whole_search():
    rng = torch.Generator().manual_seed(0)
    head = head_of(torch.randn(50, 8, generator=rng))
    layers = {n: torch.randn(8, 30, generator=rng) for n in (3, 1)}
    directions = concept_directions(head, [[0, 1], [2], []])
    given = {n: lambda weight=weight: weight for n, weight in layers.items()}
    found, means = strongest_vectors(given, head, directions, 4)
    ordered = [(n, c) for n in (1, 3) for c in range(30)]
    scores = concept_scores(head, directions, torch.cat([layers[1].T, layers[3].T]))
    for number in (0, 1):
        best = sorted(range(60), key=lambda p, row=scores[number]: -row[p])[:4]
        assert found[number] == [ordered[p] for p in best]
        assert float(means[number]) == pytest.approx(float(scores[number, best].mean()))
    assert found[2] == []
    assert means[2] == 0


def test_distances_by_hand():
    before = torch.tensor([[3.0, 4], [3, 4], [3, 4]])
    after = torch.tensor([[6.0, 8], [0, 0], [4, -3]])
    torch.testing.assert_close(cosine(before, after), torch.tensor([1.0, 0, 0]).double())
    expected = torch.tensor([1, 1, math.sqrt(2)]).double()
    torch.testing.assert_close(distance(before, after), expected, atol=1e-6, rtol=0)


def test_overlap_by_hand():
    """Of 4 3 2 1 and 4 1 3 0 the two highest share one of three."""
    head = torch.eye(4)
    before = torch.tensor([[4.0, 3, 2, 1]] * 4)
    after = torch.tensor([[4.0, 1, 3, 0], [8, 6, 4, 2], [1, 2, 3, 4], [0, 0, 0, 0]])
    found = jaccard(head, before, head, after, k=2)
    torch.testing.assert_close(found, torch.tensor([1 / 3, 1, 0, 0]).double(), atol=1e-6, rtol=0)


def test_distinctive_tokens_by_hand():
    """Of four, more than half have 9; 1 counts 2 ln 5, 2 counts ln 5/2, 3 counts ln 5."""
    given = [[1, 1, 2, 9], [2, 3, 9], [4, 9], [5, 7]]
    assert distinctive_tokens(given, lambda token: token != 7, 5) == [[1, 2], [3, 2], [4], [5]]
    assert distinctive_tokens(given, lambda _: True, 1) == [[1], [3], [4], [5]]
    assert distinctive_tokens([[6, 8, 6]], lambda _: True, 5) == [[6, 8]]


def test_tokens_are_dealt_whole_and_places_drawn_from_the_rest():
    given = [[1, 2, 3], [4], [], [5, 6]]
    found = dealt(given, seed=0)
    assert [len(tokens) for tokens in found] == [3, 1, 0, 2]
    assert sorted(token for tokens in found for token in tokens) == [1, 2, 3, 4, 5, 6]
    assert found == dealt(given, seed=0) != dealt(given, seed=1)
    weight = torch.ones(2, 4)
    weight[:, 1] = 0
    assert random_places({0: lambda: weight}, {(0, 3)}, 9, seed=0) == [(0, 0), (0, 2)]
