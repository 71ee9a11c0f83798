"""Generation: as one by one, whatever the batch."""

import copy

import pytest
import torch

from expunge.errors import EvaluationError
from expunge.evaluate import generate as generation
from expunge.evaluate.generate import EARLIEST_STOP, end_tokens, generate
from expunge.evaluate.prompts import context_length, fit_prompts
from expunge.evaluate.recurrent import continued_alone
from expunge.evaluate.sampling import Sampler


@pytest.fixture
def lively(tiny):
    """The tiny model with larger weights: its text varies with the prompt, and sometimes ends."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tiny.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    return tiny


def prompts(count=23):
    rng = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (count,), generator=rng).tolist()
    return [torch.randint(1, 257, (n,), generator=rng).tolist() for n in lengths]


@torch.no_grad()
def plainly(model, prompt, new):
    """Greedy without cache, batch or packing: the definition."""
    tokens = list(prompt)
    for _ in range(new):
        token = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if token == 0:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def with_end_at(model, token):
    """Make `token` an end of text too, so that rows end at different times."""
    model.generation_config.eos_token_id = [0, token]


@pytest.mark.parametrize("max_batch", [1, 3, 8, 64])
def test_any_batch_gives_the_definition_token_for_token(lively, tokenizer, max_batch):
    texts = prompts()
    expected = [plainly(lively, prompt, 20) for prompt in texts]
    assert len({tuple(text) for text in expected}) > 15  # control: the texts do differ
    assert generate(lively, tokenizer, texts, max_new_tokens=20, max_batch=max_batch) == expected


def test_rows_that_end_leave_and_others_take_their_slots(lively, tokenizer):
    texts = prompts()
    whole = generate(lively, tokenizer, texts, max_new_tokens=20)
    end = whole[0][4]
    expected = [text[: text.index(end)] if end in text else text for text in whole]
    assert expected != whole
    with_end_at(lively, end)
    assert generate(lively, tokenizer, texts, max_new_tokens=20, max_batch=4) == expected


def test_prompts_read_in_several_packs_give_the_same(lively, tokenizer, monkeypatch):
    expected = generate(lively, tokenizer, prompts(), max_new_tokens=6)
    monkeypatch.setattr(generation, "PACK_TOKENS", 50)
    assert generate(lively, tokenizer, prompts(), max_new_tokens=6) == expected


@pytest.mark.parametrize("max_batch", [2, 64])
def test_known_beginnings_are_read_and_not_written(lively, tokenizer, max_batch, monkeypatch):
    texts, steps = prompts(), []
    end = generate(lively, tokenizer, texts, max_new_tokens=20)[0][4]
    with_end_at(lively, end)
    step = generation._Rows.step
    monkeypatch.setattr(generation._Rows, "step", lambda rows: steps.append(1) or step(rows))
    expected = generate(lively, tokenizer, texts, max_new_tokens=20, max_batch=max_batch)
    plain, ends = len(steps), [[*text, end] if len(text) < 20 else text for text in expected]
    assert 0 < sum(text[-1] == end for text in ends) < len(texts)  # control
    known = [text[: number % 21] for number, text in enumerate(ends)]
    options = {"max_new_tokens": 20, "max_batch": max_batch}
    assert generate(lively, tokenizer, texts, known=known, **options) == expected
    steps.clear()
    assert generate(lively, tokenizer, texts, known=ends, **options) == expected
    assert len(steps) == 0 < plain
    cut = generate(lively, tokenizer, texts, known=ends, max_new_tokens=3)
    assert cut == [text[:3] for text in expected]
    assert not steps


def test_a_known_beginning_is_stopped_where_it_would_have_been(lively, tokenizer):
    told = {"max_new_tokens": 100, "settled": lambda number, tokens: number == 0}
    whole = generate(lively, tokenizer, [[5, 6], [9]], max_new_tokens=100)
    plain = generate(lively, tokenizer, [[5, 6], [9]], **told)
    assert plain == [whole[0][:EARLIEST_STOP], whole[1]]
    for count in (10, EARLIEST_STOP, 60):
        known = [text[:count] for text in whole]
        assert generate(lively, tokenizer, [[5, 6], [9]], known=known, **told) == plain


def test_nothing_to_generate_is_nothing(tiny, tokenizer):
    assert generate(tiny, tokenizer, []) == []


def test_a_text_that_ends_at_once_is_empty(lively, tokenizer):
    first = plainly(lively, [5, 6, 7], 1)[0]
    with_end_at(lively, first)
    assert generate(lively, tokenizer, [[5, 6, 7]], max_new_tokens=9) == [[]]


def test_a_settled_row_stops_but_never_before_the_earliest_stop(lively, tokenizer):
    asked = []

    def settled(number, tokens):
        asked.append(len(tokens))
        return number == 0

    found = generate(lively, tokenizer, [[5, 6], [9]], max_new_tokens=100, settled=settled)
    whole = generate(lively, tokenizer, [[5, 6], [9]], max_new_tokens=100)
    assert [len(text) for text in whole] == [100, 100]  # control
    assert found == [whole[0][:EARLIEST_STOP], whole[1]]
    assert min(asked) == EARLIEST_STOP


def test_a_prompt_too_long_keeps_its_end_and_is_counted(tiny):
    fitted, cut = fit_prompts([list(range(600)), [1, 2]], context_length(tiny), 12)
    assert fitted == [list(range(100, 600)), [1, 2]]
    assert cut == 1


def test_what_cannot_be_generated_is_refused(tiny, tokenizer):
    with pytest.raises(EvaluationError, match="prompt 1 holds no token"):
        generate(tiny, tokenizer, [[1], []])
    with pytest.raises(EvaluationError, match="context of 512"):
        generate(tiny, tokenizer, [[1] * 300])
    with pytest.raises(EvaluationError, match="holds only 512"):
        fit_prompts([[1]], context_length(tiny), 512)


@pytest.mark.parametrize("max_batch", [1, 3, 64])
def test_what_is_drawn_does_not_depend_on_the_batch(lively, tokenizer, max_batch):
    texts = prompts()

    def drawn(seed, **options):
        sampler = Sampler([f"{seed}:{n}" for n in range(len(texts))])
        return generate(lively, tokenizer, texts, max_new_tokens=12, choose=sampler, **options)

    assert drawn(1, max_batch=max_batch) == drawn(1)
    assert drawn(2) != drawn(1)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.5, 0.2, 0.3]).log().expand(4000, 3)
    sampler = Sampler([str(n) for n in range(4000)])
    counts = torch.bincount(torch.tensor(sampler(logits, range(4000))), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.2, 0.3]), atol=0.03, rtol=0)
    cold = Sampler([str(n) for n in range(4000)], temperature=0.01)
    assert set(cold(logits, range(4000))) == {0}


def test_a_turn_ends_a_text(lively, tokenizer):
    chatty = copy.deepcopy(tokenizer)
    texts = prompts(4)
    whole = generate(lively, chatty, texts, max_new_tokens=20)
    turn = whole[0][4]
    chatty.chat_template = "{% for m in messages %}{{ m.content }}" + chatty.decode([turn])
    chatty.chat_template += "{% endfor %}"
    assert generate(lively, chatty, texts, max_new_tokens=20) == whole  # control: no special one
    chatty.add_special_tokens({"additional_special_tokens": [chatty.decode([turn])]})
    expected = [text[: text.index(turn)] if turn in text else text for text in whole]
    assert generate(lively, chatty, texts, max_new_tokens=20) == expected
    assert continued_alone(lively, end_tokens(lively, chatty), texts, 20) == expected
