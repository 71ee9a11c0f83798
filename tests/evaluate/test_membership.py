"""Membership attacks: their scores, how well these separate, and the suite that asks for both."""

import json
import math
import weakref
import zlib

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from expunge.attention import PACKED_ATTENTION, register_attention
from expunge.data.batches import TokenSequence, encode_document, pack
from expunge.data.examples import Document
from expunge.errors import DataError, EvaluationError, RecipeError
from expunge.evaluate import gradients
from expunge.evaluate.attacks import (
    ATTACKS,
    Read,
    attack_score,
    gradient_norm,
    loss,
    min_k,
    min_k_plus_plus,
    recall,
    reference_gap,
    zlib_ratio,
    zlib_total,
)
from expunge.evaluate.balance import balance
from expunge.evaluate.collapse import NEUTRAL
from expunge.evaluate.gradients import gradient_norms
from expunge.evaluate.membership import auc, mia, separation, tpr
from expunge.evaluate.membership_suite import Membership, membership_suite
from expunge.evaluate.numbers import wilson
from expunge.evaluate.reader import open_reader, reader_of
from expunge.evaluate.suites import parse_suites
from expunge.evaluate.tables import TokenScores
from expunge.lora import Lora, add_adapter
from expunge.models import load_model
from expunge.scores import head_residuals, score


@pytest.mark.parametrize(
    ("members", "others", "value"),
    [
        ([3, 4], [1, 2], 1.0),
        ([1, 2], [3, 4], 0.0),
        ([1, 1], [1, 1], 0.5),
        ([2, 1], [1, 0], 3.5 / 4),  # 2>1 2>0 1=1 1>0
        ([float("-inf"), 2], [0], 0.5),
    ],
)
def test_auc_by_hand(members, others, value):
    assert auc(members, others) == value


def test_auc_equals_all_pairs_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 40).astype(float), rng.integers(0, 6, 30).astype(float)
    pairs = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert auc(a.tolist(), b.tolist()) == pytest.approx(pairs)


def test_low_losses_give_members_away_and_so_do_high_ones():
    known = mia([1.0, 1.1], [3.0, 3.1], seed=0, resamples=50)
    over = mia([9.0, 9.1], [3.0, 3.1], seed=0, resamples=50)
    assert (known["auc"], known["score"], known["n"]) == (1, 0, 4)
    assert (over["auc"], over["score"]) == (0, 0)
    assert mia([1.0, 3.0], [1.0, 3.0], seed=0, resamples=50)["score"] == 1


def test_the_interval_holds_the_auc_and_is_reproducible():
    rng = np.random.default_rng(1)
    members, others = rng.normal(0, 1, 60).tolist(), rng.normal(1, 1, 60).tolist()
    found = mia(members, others, seed=3, resamples=300)
    assert found["low"] < found["auc"] < found["high"] < found["low"] + 0.3
    assert found == mia(members, others, seed=3, resamples=300)


def test_one_sided_or_broken_scores_are_refused():
    with pytest.raises(EvaluationError, match="no non-member documents"):
        mia([1.0], [], seed=0)
    with pytest.raises(EvaluationError, match="1 of 2 member scores are NaN"):
        mia([1.0, math.nan], [1.0], seed=0)


@pytest.mark.parametrize(
    ("members", "others", "fpr", "value"),
    [
        ([5, 4, 3, 2], [1, 2, 3.5], 0.01, 0.5),  # none may pass: t = 3.5, found are 5 and 4
        ([5, 4, 3, 2], [1, 2, 3.5], 0.34, 0.75),  # one of three may: t = 2, and 2 = t is not found
        ([5, 4, 3, 2], [1, 2, 3.5], 0.33, 0.5),
        ([1, 1], [1, 1], 0.01, 0.0),
        ([9], [1], 0.01, 1.0),
        ([1.5, 98.5, 99.5], list(range(1, 101)), 0.01, 1 / 3),  # one of 100 may: t = 99
    ],
)
def test_tpr_by_hand(members, others, fpr, value):
    assert tpr(members, others, fpr=fpr) == pytest.approx(value)


@pytest.mark.parametrize("fpr", [0.01, 0.07, 0.3, 0.9])
def test_tpr_is_the_best_of_all_thresholds(fpr):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 40, 50), rng.integers(0, 40, 100)
    tried = [t for t in range(-1, 41) if (b > t).sum() <= round(fpr * 100)]
    assert tpr(a.tolist(), b.tolist(), fpr=fpr) == max((a > t).mean() for t in tried)


def test_both_measures_see_order_alone():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.5, 1, 40), rng.normal(0, 1, 50)
    for measure in (auc, tpr):
        plain = measure(a.tolist(), b.tolist())
        assert measure(np.exp(3 * a).tolist(), np.exp(3 * b).tolist()) == plain
        assert measure(a[::-1].tolist(), rng.permutation(b).tolist()) == plain
    assert auc((-a).tolist(), (-b).tolist()) == pytest.approx(1 - auc(a.tolist(), b.tolist()))


def test_intervals_hold_the_values_and_both_sides_are_resampled():
    rng = np.random.default_rng(3)
    a, b = rng.normal(1, 1, 60).tolist(), rng.normal(0, 1, 60).tolist()
    area, share = separation(a, b, fpr=0.05, name="x", resamples=300)
    assert area.low < area.value == auc(a, b) < area.high < area.low + 0.3
    assert share.low <= share.value == tpr(a, b, fpr=0.05) <= share.high
    assert area.n == share.n == 120
    assert separation(a, b, fpr=0.05, name="x", resamples=300) == (area, share)
    one_sided, _ = separation([0.0], [-1.0, 1.0], name="x", resamples=300)
    assert (one_sided.low, one_sided.value, one_sided.high) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("m", "n", "low"),
    [(1, 1, 0.20655), (4, 4, 0.58228), (20, 40, 0.92468)],
)
def test_scores_that_are_told_apart_have_an_interval_that_their_number_narrows(m, n, low):
    """At value 1 the inequality is 1 - θ ≤ z² θ (1 + k (...)) / (m n)."""
    k = (m + n) / 2 - 1
    right = 1.959964**2 * low * (1 + k * ((1 - low) / (2 - low) + low / (1 + low))) / (m * n)
    assert 1 - low == pytest.approx(right, abs=1e-4)
    above, below = list(range(100, 100 + m)), list(range(n))
    area, share = separation(above, below, name="x", resamples=20)
    assert (area.value, area.high) == (1, 1)
    assert area.low == pytest.approx(low, abs=1e-4)
    assert (share.low, share.high) == wilson(m, m)
    turned = mia([-x for x in below], [-x for x in above], seed=0, resamples=20)
    assert (turned["auc"], turned["low"]) == (0, 0)
    assert turned["high"] == pytest.approx(1 - low, abs=1e-4)
    found = balance({"loss": (above, below)}, resamples=20)["loss"] if n > 1 else {}
    assert found.get("auc_low", low) == pytest.approx(low, abs=1e-4)


def said(*logps, entropy=1.0, variance=4.0):
    """Token scores of a text: log-probabilities as given, each distribution alike."""
    n = len(logps)
    return TokenScores(
        np.array(logps, np.float32),
        np.zeros(n, np.int32),
        np.zeros(n, bool),
        np.full(n, entropy, np.float32),
        np.full(n, variance, np.float32),
    )


def test_scores_by_hand():
    scores = said(-1, -2, -3, -4, -10)
    assert loss(scores) == -4
    text = "abc" * 50
    size = len(zlib.compress(text.encode()))
    assert size < 30
    assert zlib_ratio(scores, text) == pytest.approx(-4 / size)
    assert zlib_total(scores, text) == pytest.approx(-20 / size)
    assert min_k(scores, k=20) == -10
    assert min_k(scores, k=40) == -7
    assert min_k(scores, k=59) == -7  # 2.95 tokens are 2
    assert min_k(scores, k=100) == loss(scores)
    assert min_k(said(-3), k=20) == -3  # never fewer than one token
    assert min_k_plus_plus(scores, k=40) == pytest.approx(((-10 + 1) / 2 + (-4 + 1) / 2) / 2)
    assert reference_gap(scores, said(-5, -5, -5, -5, -5)) == 1
    assert recall(scores, said(-6, -6, -6, -6, -6)) == 1.5
    assert gradient_norm(2.5) == -2.5


def test_certainty_is_no_division_by_zero():
    assert min_k_plus_plus(said(0.0, entropy=0, variance=0)) == 0
    assert np.isfinite(min_k_plus_plus(said(-80.0, entropy=0, variance=0)))
    assert recall(said(0.0), said(0.0)) == 1
    assert recall(said(0.0), said(-1.0)) == math.inf


def test_the_scores_know_what_they_read():
    read = Read(said(-1, -2), "text")
    found = {name: attack_score(name, read, k=50) for name in ATTACKS}
    unread = {name for name, value in found.items() if value is None}
    assert unread == {"reference", "recall", "gradient_norm"}
    whole = Read(said(-1, -2), "text", said(-3, -3), said(-3, -3), 2.0)
    assert attack_score("min_k", whole, k=50) == -2
    assert None not in {attack_score(name, whole, k=50) for name in ATTACKS}


def test_every_attack_puts_what_was_trained_on_first():
    """The law of the table: low loss, small gradient, much to lose, all score higher."""
    known = Read(said(-0.1, -0.2), "text", said(-3, -3), said(-2, -2), 0.1)
    unseen = Read(said(-3, -4), "text", said(-3, -3), said(-3, -4), 9.0)
    for name in ATTACKS:
        assert attack_score(name, known, k=20) > attack_score(name, unseen, k=20), name


def plain_norm(model, text) -> float:
    """The norm of the gradient as transformers and torch form it."""
    model.zero_grad()
    tokens = torch.tensor([text.tokens])
    model(input_ids=tokens, labels=tokens).loss.backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())


@pytest.mark.parametrize("block", [4, 256])
@pytest.mark.parametrize("tied", [True, False])
def test_a_norm_knows_the_head_as_embedding_and_finds_the_scores(
    tiny, tokenizer, tied, block, monkeypatch
):
    """Texts shorter and longer than the width go two ways, one of which forms the gradient."""
    monkeypatch.setattr("expunge.heads.BLOCK", block)
    config = tiny.config
    config.tie_word_embeddings, config.pad_token_id = tied, 5  # whose embedding does not move
    register_attention()
    model = LlamaForCausalLM._from_config(config, attn_implementation=PACKED_ATTENTION).eval()
    width, reader = config.hidden_size, reader_of(model, tokenizer)
    texts = [TokenSequence(str(n), (0, *[5, 7, 5, 11] * n), 1) for n in (3, width)]
    assert len(texts[0].tokens) < width < len(texts[1].tokens)
    found = gradient_norms(reader, texts)
    for text, norm in zip(texts, found, strict=True):
        assert norm == pytest.approx(plain_norm(model, text), rel=1e-5)
    read = reader.forwards
    scores = reader.scores(texts)
    assert reader.forwards == read
    for ours, again in zip(scores, reader_of(model, tokenizer).scores(texts), strict=True):
        np.testing.assert_allclose(ours.logp, again.logp, atol=1e-5)
        np.testing.assert_allclose(ours.variance, again.variance, rtol=1e-4)
        np.testing.assert_array_equal(ours.rank, again.rank)


def test_a_norm_holds_no_more_residuals_than_the_head_has_numbers(tiny, tokenizer, monkeypatch):
    """Of a text longer than the width a block at a time; a shorter one's are kept."""
    monkeypatch.setattr("expunge.heads.BLOCK", 4)
    seen, most = [], []

    def noted(*given):
        for statistics, residual in head_residuals(*given):
            seen.append(weakref.ref(residual))
            most.append(sum(one() is not None for one in seen))
            yield statistics, residual

    monkeypatch.setattr(gradients, "head_residuals", noted)
    width, reader = tiny.config.hidden_size, reader_of(tiny, tokenizer)
    for count, held in ((width - 2, 8), (2 * width, 2)):
        most.clear()
        gradient_norms(reader, [TokenSequence(str(count), (0, *[5, 7] * (count // 2)), 1)])
        assert max(most) == held
        assert 4 * held <= width  # tokens


def test_gradient_norms_are_those_of_the_model_and_kept(tiny_folder, tmp_path):
    reader = open_reader(tiny_folder, None, dtype="float32", folder=tmp_path)
    documents = [Document("a", "short"), Document("b", "a rather longer document")]
    texts = [encode_document(d, reader.tokenizer, max_length=32) for d in documents]
    found = gradient_norms(reader, texts)
    model = load_model(tiny_folder)
    for text, norm in zip(texts, found, strict=True):
        assert norm == pytest.approx(plain_norm(model, text), rel=1e-4)
    again = open_reader(tiny_folder, None, dtype="float32", folder=tmp_path)
    assert gradient_norms(again, texts) == found
    assert again.forwards == 0


def test_an_adapter_counts_as_merged(tiny_folder, tiny, tokenizer):
    adapters = add_adapter(tiny, Lora(rank=4, alpha=4, dropout=0), seed=0)
    for layer in adapters.values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    text = encode_document(Document("a", "some text"), tokenizer, max_length=32)
    (found,) = gradient_norms(reader_of(tiny, tokenizer), [text])
    assert {name for name, p in tiny.named_parameters() if p.requires_grad} == {
        f"{name}.{part}" for name in adapters for part in ("lora_A", "lora_B")
    }
    merged = load_model(tiny_folder)
    (untouched,) = gradient_norms(reader_of(merged, tokenizer), [text])
    for name, layer in adapters.items():
        update = layer.scale * layer.lora_B.detach() @ layer.lora_A.detach()
        merged.get_submodule(name).weight.data += update
    (expected,) = gradient_norms(reader_of(merged, tokenizer), [text])
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(found - untouched) > 1e-3 * untouched  # control: the adapter does something


def test_biases_count_in_the_norm_and_a_layer_used_twice_is_refused(tiny, tokenizer):
    config = tiny.config
    config.attention_bias = config.mlp_bias = True
    register_attention()
    model = LlamaForCausalLM._from_config(config, attn_implementation=PACKED_ATTENTION).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    text = encode_document(Document("a", "some text"), tokenizer, max_length=32)
    (found,) = gradient_norms(reader_of(model, tokenizer), [text])
    assert found == pytest.approx(plain_norm(model, text), rel=1e-4)
    first = model.model.layers[0].mlp
    first.up_proj = first.gate_proj
    with pytest.raises(EvaluationError, match="used twice in one pass"):
        gradient_norms(reader_of(model, tokenizer), [text])


def test_a_broken_model_has_no_gradient_norm(tiny, tokenizer):
    tiny.model.norm.weight.data.fill_(math.nan)
    text = encode_document(Document("a", "some text"), tokenizer, max_length=32)
    with pytest.raises(EvaluationError, match="the gradient of 'a' is not finite"):
        gradient_norms(reader_of(tiny, tokenizer), [text])


MEMBERS = [document.text[:30] for document in NEUTRAL[0:16:2]]
OTHERS = [document.text[:30] for document in NEUTRAL[1:16:2]]


@pytest.fixture
def sides(tmp_path):
    given = {}
    for name, texts in (("members", MEMBERS), ("nonmembers", OTHERS)):
        rows = [{"id": f"d{n}", "document": text} for n, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        given[name] = str(tmp_path / f"{name}.jsonl")
    return given


def test_trained_members_are_found_by_every_attack_and_an_untrained_model_hides_them(
    tiny_folder, tiny, tokenizer, sides
):
    section = Membership(
        **sides,
        attacks=tuple(ATTACKS),
        reference=str(tiny_folder),
        recall_shots=2,
        resamples=20,
    )
    control = membership_suite(reader_of(tiny, tokenizer), section)
    texts = [encode_document(Document("", t), tokenizer, max_length=64) for t in MEMBERS]
    optimiser = torch.optim.Adam(tiny.parameters(), lr=5e-3)
    for _ in range(120):
        nll = score(tiny, pack(texts, "answer", "cpu")).nll.mean()
        nll.backward()
        optimiser.step()
        optimiser.zero_grad()
    found = membership_suite(reader_of(tiny, tokenizer), section)
    for name in ATTACKS:
        if name != "recall":
            assert found.numbers[f"{name}.auc"].value > 0.9, name
            assert found.numbers[f"{name}.tpr"].value > 0.5, name
    assert 0.1 < control.numbers["loss.auc"].value < 0.9
    own = control.numbers["reference.auc"]  # it is its own reference: nothing but rounding
    assert own.low < 0.5 < own.high
    assert found.numbers["loss.auc"].n == 16
    assert found.numbers["recall.auc"].n == 14
    assert [(row["group"], row["id"]) for row in found.items] == [
        (group, f"d{n}") for group in ("members", "nonmembers") for n in range(8)
    ]
    assert [row["recall"] is None for row in found.items] == [False] * 8 + [True] * 2 + [False] * 6
    assert found.facts["recall_prefix"] == ["d0", "d1"]


def test_recall_scores_the_same_tokens_after_others(tiny, tokenizer, sides):
    section = Membership(**sides, attacks=("recall",), recall_shots=1, resamples=5)
    found = membership_suite(reader_of(tiny, tokenizer), section)
    prefix = tokenizer(OTHERS[0] + "\n\n")["input_ids"]
    text = tokenizer(MEMBERS[0])["input_ids"]

    def nll(tokens, first):
        with torch.no_grad():
            log_p = tiny(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        return -np.mean([float(log_p[t - 1, tokens[t]]) for t in range(first, len(tokens))])

    expected = nll(prefix + text, len(prefix) + 1) / nll(text, 1)
    assert found.items[0]["recall"] == pytest.approx(expected, rel=1e-4)
    assert found.facts["recall_tokens"] == len(prefix)


def test_a_document_that_is_cut_is_compressed_as_it_was_read(tiny, tokenizer, sides):
    section = Membership(**sides, attacks=("zlib",), document_tokens=9, resamples=5)
    found = membership_suite(reader_of(tiny, tokenizer), section)
    (row, scores) = (
        found.items[0],
        reader_of(tiny, tokenizer).scores(
            [encode_document(Document("", MEMBERS[0]), tokenizer, max_length=9)]
        ),
    )
    assert found.facts["cut"] == 16
    assert row["tokens"] == 8
    size = len(zlib.compress(MEMBERS[0][:9].encode()))
    assert row["zlib"] == pytest.approx(-scores[0].nll / size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["attacks=[lost]"], "no attack is called 'lost'. Did you mean 'loss'"),
        (["attacks=[]"], "attacks is empty"),
        (["attacks=[loss, loss]"], "names one twice"),
        (["attacks=[reference]"], "go together"),
        (["reference=x"], "go together"),
        (["k=0"], "k"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(sides, options, message):
    given = [f"membership.{name}={path}" for name, path in sides.items()]
    with pytest.raises(RecipeError, match=message):
        parse_suites(["membership"], [*given, *(f"membership.{o}" for o in options)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ("recall",), "recall_shots": 8}, "there are only 8; lower recall_shots"),
        ({"members": None}, "are the same text"),
    ],
)
def test_sides_that_cannot_be_told_apart_are_refused(tiny, tokenizer, sides, changes, message):
    changes = {k: sides["nonmembers"] if v is None else v for k, v in changes.items()}
    with pytest.raises(EvaluationError, match=message):
        membership_suite(reader_of(tiny, tokenizer), Membership(**{**sides, **changes}))


def test_recall_needs_room_and_a_document_needs_two_tokens(tiny, tokenizer, sides, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "x", "document": "a" * 600}))
    section = Membership(
        **{**sides, "members": str(tmp_path / "long.jsonl")}, attacks=("recall",), recall_shots=1
    )
    with pytest.raises(EvaluationError, match="recall has no room"):
        membership_suite(reader_of(tiny, tokenizer), section)
    (tmp_path / "short.jsonl").write_text(json.dumps({"id": "x", "document": "a"}))
    section = Membership(**{**sides, "members": str(tmp_path / "short.jsonl")})
    with pytest.raises(DataError, match="x has fewer than two tokens"):
        membership_suite(reader_of(tiny, tokenizer), section)
