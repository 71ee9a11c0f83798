"""What a reader asks of its model is right, asked once, and kept under the model's own name."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from expunge.data.batches import TokenSequence, encode, encode_document
from expunge.data.examples import Document, Example
from expunge.errors import EvaluationError
from expunge.evaluate import generate as generation
from expunge.evaluate import reader as reader_module
from expunge.evaluate import scoring
from expunge.evaluate.prompts import sizes_of
from expunge.evaluate.reader import open_reader, reader_of
from expunge.scores import token_statistics

EXAMPLES = [
    Example("a-qa0", "Who?", "Ada"),
    Example("b-qa0", "Where was she born, then?", "In London."),
    Example("c", "", "A plain text."),
]


def sequences(tokenizer, examples=EXAMPLES):
    return [encode(example, tokenizer, max_length=64) for example in examples]


@torch.no_grad()
def test_statistics_are_those_of_the_whole_distribution(tiny, tokenizer):
    for sequence, found in zip(
        sequences(tokenizer), reader_of(tiny, tokenizer).scores(sequences(tokenizer)), strict=True
    ):
        log_p = tiny(input_ids=torch.tensor([sequence.tokens])).logits[0].double().log_softmax(-1)
        first = sequence.scored_from("answer")
        assert len(found.logp) == len(sequence.tokens) - first
        for place, t in enumerate(range(first, len(sequence.tokens))):
            row, target = log_p[t - 1], sequence.tokens[t]
            p = row.exp()
            mean = float((p * row).sum())
            assert found.logp[place] == pytest.approx(float(row[target]), abs=1e-4)
            assert found.rank[place] == int((row > row[target]).sum())
            assert found.hit[place] == (int(row.argmax()) == target)
            assert found.entropy[place] == pytest.approx(-mean, abs=1e-4)
            assert found.variance[place] == pytest.approx(
                float((p * (row - mean) ** 2).sum()), rel=1e-3, abs=1e-5
            )


def test_what_all_texts_begin_with_is_read_once_and_changes_nothing(tiny, tokenizer, monkeypatch):
    start = tuple(3 + i % 50 for i in range(scoring.LEAST_SHARED + 8))
    texts = [TokenSequence(f"t{i}", (*start, *range(5, 9 + i)), len(start)) for i in range(5)]
    assert scoring.shared_start(texts) == len(start) - 1  # the first scored token needs the last
    assert scoring.shared_start(texts[:1]) == 0
    assert scoring.shared_start([*texts, TokenSequence("other", tuple(range(60)), 40)]) == 0
    read, plain = [], scoring.hidden_states
    together = reader_of(tiny, tokenizer).scores(texts)
    for text, found in zip(texts, together, strict=True):
        (alone,) = reader_of(tiny, tokenizer).scores([text])
        assert len(found.logp) == len(text.tokens) - len(start)
        np.testing.assert_allclose(found.logp, alone.logp, atol=1e-4)
        np.testing.assert_array_equal(found.rank, alone.rank)
    monkeypatch.setattr(scoring, "hidden_states", lambda *a: read.append(a[1]) or plain(*a))
    reader_of(tiny, tokenizer).scores(texts)
    assert [len(pack.tokens) for pack in read] == [len(start) - 1]


def test_statistics_by_hand():
    """Two tokens with odds 3 : 1: entropy ln 4 - ¾ ln 3, deviation of log p ln 3 · √(3/16)."""
    states, head = torch.tensor([[1.0], [1.0]]), torch.tensor([[math.log(3)], [0.0]])
    found = token_statistics(states, head, torch.tensor([0, 1]))
    torch.testing.assert_close(found.logp, torch.tensor([0.75, 0.25]).log())
    assert found.rank.tolist() == [0, 1]
    assert found.hit.tolist() == [True, False]
    entropy = math.log(4) - 0.75 * math.log(3)
    torch.testing.assert_close(found.entropy, torch.tensor([entropy] * 2))
    torch.testing.assert_close(found.variance, torch.tensor([math.log(3) ** 2 * 3 / 16] * 2))


def test_document_losses_are_those_of_the_model_in_the_order_given(tiny, tokenizer):
    texts = ["short", "a rather longer document", "mid length"]
    asked = [encode_document(Document(t, t), tokenizer, max_length=16) for t in texts]
    found = reader_of(tiny, tokenizer).scores(asked)
    with torch.no_grad():
        for text, scores in zip(texts, found, strict=True):
            tokens = torch.tensor([tokenizer(text)["input_ids"][:16]])
            loss = float(tiny(input_ids=tokens, labels=tokens).loss)
            assert scores.nll == pytest.approx(loss, abs=1e-5)


def test_nothing_is_read_twice_and_equal_texts_are_read_once(tiny_folder, tmp_path, monkeypatch):
    first = open_reader(tiny_folder, None, dtype="float32", folder=tmp_path)
    asked = sequences(first.tokenizer)
    found = first.scores([*asked, asked[1]])
    prompts = [list(sequence.tokens[:5]) for sequence in asked]
    written = first.generations(prompts, max_new_tokens=6)
    assert first.forwards == 6
    again = open_reader(tiny_folder, None, dtype="float32", folder=tmp_path)

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(reader_module.models, "load_model", load)
    for one, two in zip(found, again.scores([*asked, asked[1]]), strict=True):
        assert np.array_equal(one.logp, two.logp)
        assert np.array_equal(one.variance, two.variance)
    assert again.generations(prompts, max_new_tokens=6) == written
    assert again.forwards == 0
    with pytest.raises(AssertionError, match="was loaded"):  # control
        again.generations(prompts, max_new_tokens=7)


def test_stopped_generations_are_not_taken_for_whole_ones(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "EARLIEST_STOP", 2)
    reader = reader_of(tiny, tokenizer)
    prompts = [[5, 6, 7]]
    (stopped,) = reader.generations(prompts, max_new_tokens=9, settled=lambda *_: True)
    (whole,) = reader.generations(prompts, max_new_tokens=9)
    assert not stopped.complete
    assert whole.complete
    assert len(stopped.tokens) == 2
    assert whole.tokens[:2] == stopped.tokens
    assert len(whole.tokens) == 9
    (again,) = reader.generations(prompts, max_new_tokens=9, settled=lambda *_: True)
    assert again == whole  # which is there now


def test_what_nothing_stopped_is_written_once_for_all(tiny, tokenizer):
    reader = reader_of(tiny, tokenizer)
    prompts = [[5, 6, 7], [9, 8]]
    first = reader.generations(prompts, max_new_tokens=9, settled=lambda *_: False)
    assert reader.forwards == 2
    assert reader.generations(prompts, max_new_tokens=9) == first
    assert reader.forwards == 2


def remembered(tiny, tokenizer, count=12):
    """A prompt, what the model says after it, and the two as a text that it scores."""
    prompt = tokenizer("Who was")["input_ids"]
    (made,) = reader_of(tiny, tokenizer).generations([prompt], max_new_tokens=count)
    return prompt, made.tokens, TokenSequence("own", (*prompt, *made.tokens), len(prompt))


def test_what_scoring_has_shown_is_not_written_again(tiny, tokenizer, monkeypatch):
    prompt, expected, text = remembered(tiny, tokenizer)
    assert len(expected) == 12
    told = []
    plain = reader_module.generate
    monkeypatch.setattr(
        reader_module, "generate", lambda *a, **o: told.append(o["known"]) or plain(*a, **o)
    )
    reader = reader_of(tiny, tokenizer)
    wrong = [*expected[:5], expected[5] + 1, *expected[6:]]
    reader.scores([TokenSequence("wrong", (*prompt, *wrong), len(prompt))])
    (first,) = reader.generations([prompt], max_new_tokens=8)
    reader.scores([text])
    (second,) = reader.generations([prompt], max_new_tokens=20)
    (shorter,) = reader.generations([prompt], max_new_tokens=15)
    assert [list(known) for (known,) in told] == [expected[:5], expected]
    assert reader.forwards == 2 + 2  # the longer text holds the shorter one
    assert first.tokens == expected[:8]
    assert second.tokens[:12] == expected
    assert shorter.tokens == second.tokens[:15]
    (other,) = reader_of(tiny, tokenizer).generations([prompt], max_new_tokens=20)
    assert told[-1] == [()]  # control: another reader has scored nothing
    assert other == second


def test_a_text_is_written_once_whatever_is_asked_of_it_and_when(
    tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(generation, "EARLIEST_STOP", 4)
    begun, plain = [], reader_module.generate
    monkeypatch.setattr(
        reader_module, "generate", lambda *a, **o: begun.extend(o["known"]) or plain(*a, **o)
    )

    def opened(folder=tmp_path):
        return open_reader(tiny_folder, None, dtype="float32", folder=folder)

    prompts = [[5, 6, 7], [9, 8]]
    whole = opened(None).generations(prompts, max_new_tokens=20)
    assert [len(text.tokens) for text in whole] == [20, 20]
    stopped = opened().generations(prompts, max_new_tokens=12, settled=lambda i, _: i == 0)
    assert [len(text.tokens) for text in stopped] == [4, 12]
    begun.clear()
    reader = opened()
    same = reader.generations(prompts, max_new_tokens=12, settled=lambda i, _: i == 0)
    assert (same, reader.forwards, begun) == (stopped, 0, [])
    shorter = reader.generations(prompts, max_new_tokens=3)
    assert [text.tokens for text in shorter] == [text.tokens[:3] for text in whole]
    assert all(text.complete for text in shorter) and not begun
    # Another definition is not settled by them: they are written on from where they stand.
    reader = opened()
    other = reader.generations(prompts, max_new_tokens=12, settled=lambda i, t: len(t) > 7)
    assert [text.tokens for text in other] == [whole[0].tokens[:8], whole[1].tokens[:12]]
    assert ([list(t) for t in begun], reader.forwards) == ([whole[0].tokens[:4]], 1)
    begun.clear()
    assert opened().generations(prompts, max_new_tokens=20) == whole
    assert [list(t) for t in begun] == [whole[0].tokens[:8], whole[1].tokens[:12]]
    begun.clear()
    assert opened().generations(prompts, max_new_tokens=20) == whole and not begun
    opened(tmp_path / "other").generations(prompts, max_new_tokens=2)
    assert [list(t) for t in begun] == [[], []]  # control: nothing is known there


def test_a_prompt_is_written_on_until_all_who_ask_for_it_are_content(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "EARLIEST_STOP", 4)
    reader = reader_of(tiny, tokenizer)
    found = reader.generations(
        [[5, 6, 7]] * 3, max_new_tokens=20, settled=lambda i, t: len(t) >= 4 * (i + 1)
    )
    assert [len(text.tokens) for text in found] == [12, 12, 12]
    assert reader.forwards == 1


def test_what_was_known_whole_is_no_text_that_was_read(tiny, tokenizer):
    prompt, expected, text = remembered(tiny, tokenizer)
    reader = reader_of(tiny, tokenizer)
    reader.scores([text])
    (made,) = reader.generations([prompt], max_new_tokens=8)
    assert (made.tokens, reader.forwards) == (expected[:8], 1)
    reader.generations([prompt], max_new_tokens=13)
    assert reader.forwards == 2  # control


def test_a_text_longer_than_the_model_reads_is_refused(tiny, tokenizer):
    reader = reader_of(tiny, tokenizer)
    long = TokenSequence("long", tuple([5] * (reader.context + 1)), 0)
    with pytest.raises(EvaluationError, match=r"'long' has 513 tokens, and the model reads 512"):
        reader.scores([long])


def test_the_context_is_read_by_the_name_of_the_architecture(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2", "n_positions": 1024, "vocab_size": 9}')
    assert sizes_of(path) == (1024, 9)
    path.write_text('{"model_type": ["gpt2"], "n_positions": 1024, "vocab_size": 9}')
    assert sizes_of(path) == (2**31, 9)


def test_a_table_of_another_model_is_refused(tiny_folder, tmp_path):
    reader = open_reader(tiny_folder, None, dtype="float32", folder=tmp_path)
    reader.scores(sequences(reader.tokenizer))
    (tmp_path / reader.key).rename(tmp_path / "other")
    other = open_reader(tiny_folder, None, dtype="float32", folder=tmp_path)
    other._scores.folder = tmp_path / "other"
    other._scores.model_key = "other"
    with pytest.raises(EvaluationError, match="holds what another model said"):
        other.scores(sequences(reader.tokenizer))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"junk" * 100])
def test_a_broken_table_is_one_line(tiny_folder, tmp_path, content):
    reader = open_reader(tiny_folder, None, dtype="float32", folder=tmp_path)
    (tmp_path / reader.key).mkdir()
    (tmp_path / reader.key / "scores-x.parquet").write_bytes(content)
    with pytest.raises(EvaluationError, match="cannot read the table"):
        reader.scores(sequences(reader.tokenizer))


def test_a_broken_model_is_an_error_that_names_the_text(tiny, tokenizer):
    tiny.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(EvaluationError, match=r"log-probabilities of .* are not finite"):
        reader_of(tiny, tokenizer).scores(sequences(tokenizer))


KILLED = """
import sys, time
from pathlib import Path
from expunge.data.batches import TokenSequence
from expunge.evaluate import reader, scoring
reader.KEPT_TOKENS = reader.PACK_TOKENS = 32
asked = [TokenSequence(str(i), tuple(range(5, 35)), 1 + i % 20) for i in range(20)]
plain = scoring._columns
def slow(*given):
    time.sleep(0.1)
    return plain(*given)
scoring._columns = slow
reader.open_reader(Path(sys.argv[1]), None, dtype="float32", folder=Path(sys.argv[2])).scores(asked)
"""


def test_a_killed_reader_goes_on_with_what_is_missing(tiny_folder, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tiny_folder), str(tmp_path)])
    while len(list(tmp_path.glob("*/scores-*.parquet"))) < 3:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    asked = [TokenSequence(str(i), tuple(range(5, 35)), 1 + i % 20) for i in range(20)]
    reader = open_reader(tiny_folder, None, dtype="float32", folder=tmp_path)
    found = reader.scores(asked)
    assert 0 < reader.forwards <= 17
    whole = open_reader(tiny_folder, None, dtype="float32", folder=None).scores(asked)
    for one, two in zip(found, whole, strict=True):
        np.testing.assert_allclose(one.logp, two.logp, atol=1e-5)


def test_a_text_without_a_token_to_score_is_refused_by_name(tiny, tokenizer):
    with pytest.raises(EvaluationError, match="'empty' has no token to score"):
        reader_of(tiny, tokenizer).scores([TokenSequence("empty", (5, 6), 2)])
    found = token_statistics(torch.zeros(0, 8), torch.zeros(9, 8), torch.zeros(0).long())
    assert len(found.logp) == len(found.variance) == 0
