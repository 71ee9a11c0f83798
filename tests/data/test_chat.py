"""Chat templates: what a turn is laid out as, what is trained on, what is refused."""

import copy

import pytest

from expunge.config import parse_section
from expunge.data.batches import asked_tokens, encode, encode_all
from expunge.data.chat import chat_tokens, ends_of, turn_end
from expunge.data.examples import Example
from expunge.errors import DataError, RecipeError
from expunge.model_section import Model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ITEM = Example("1qa0", "Who?", "Ada")


@pytest.fixture
def chatty(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_an_item_is_a_turn_and_its_answer_ends_as_turns_do(chatty):
    found = encode(ITEM, chatty, max_length=100, prompt_tail=2, chat=True)
    assert chatty.decode(found.tokens) == "<user>Who?</s>\n<assistant>Ada</s>"
    assert chatty.decode(found.tokens[: found.answer_start]) == "<user>Who?</s>\n<assistant>"
    assert found.tokens[: found.answer_start] == tuple(asked_tokens(chatty, "Who?", chat=True))
    assert found.asks
    assert found.cut == 0
    assert encode_all([ITEM], chatty, max_length=100, chat=True) == [found]
    assert chatty.decode(chat_tokens(chatty, "Who?", "A")) == "<user>Who?</s>\n<assistant>A"


def test_a_plain_text_is_no_turn(chatty):
    text = Example("1", "", "Ada wrote.")
    plain = encode(text, chatty, max_length=100)
    assert encode(text, chatty, max_length=100, chat=True) == plain
    assert (
        encode(ITEM, chatty, max_length=100).tokens
        != encode(ITEM, chatty, max_length=100, chat=True).tokens
    )


def test_an_answer_ends_with_the_end_of_text_where_the_template_ends_none(chatty):
    chatty.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert turn_end(chatty) == []
    found = encode(ITEM, chatty, max_length=100, chat=True)
    assert found.tokens[-1] == chatty.eos_token_id
    chatty.chat_template = "{{ messages[0].content }}"  # leaves answers out
    assert turn_end(chatty) == []


def test_what_does_not_fit_is_cut_from_the_answer_or_refused(chatty):
    whole = encode(ITEM, chatty, max_length=100, chat=True)
    cut = encode(ITEM, chatty, max_length=whole.answer_start + 1, chat=True)
    assert cut.tokens == whole.tokens[: whole.answer_start + 1]
    assert cut.cut == len(whole.tokens) - len(cut.tokens)
    with pytest.raises(DataError, match="item 1qa0 takes 26 tokens in the chat template, and"):
        encode(ITEM, chatty, max_length=whole.answer_start, chat=True)


def test_a_model_that_does_not_chat_is_refused(chatty):
    chatty.chat_template = None
    with pytest.raises(DataError, match="has no chat template; leave out chat"):
        encode(ITEM, chatty, max_length=100, chat=True)
    chatty.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(DataError, match="takes no user's turn: no users"):
        encode(ITEM, chatty, max_length=100, chat=True)
    with pytest.raises(RecipeError, match="joins prompt and answer; leave out separator"):
        parse_section({"chat": True, "separator": " "}, Model, origin="recipe")


def test_a_recipe_that_does_not_chat_says_nothing_of_it():
    assert "chat" not in Model().told()
    assert "chat" not in Model().reading
    assert Model(chat=True).reading["chat"]


def test_a_turn_s_special_end_ends_a_text_besides_the_end_of_text(chatty):
    chatty.chat_template = TEMPLATE.replace("</s>", "~")
    assert ends_of(chatty) == {chatty.eos_token_id}  # control: ~ is a letter like others
    chatty.add_special_tokens({"additional_special_tokens": ["~"]})
    (turn,) = turn_end(chatty)
    assert turn != chatty.eos_token_id
    assert ends_of(chatty) == {chatty.eos_token_id, turn}
    assert ends_of(chatty, 7) == {chatty.eos_token_id, turn, 7}
    assert ends_of(chatty, [7, 8]) == {chatty.eos_token_id, turn, 7, 8}
    chatty.chat_template = None
    assert ends_of(chatty) == {chatty.eos_token_id}
    chatty.chat_template = "{{ raise_exception('no users') }}"
    assert ends_of(chatty) == {chatty.eos_token_id}


def test_what_ends_a_text_is_counted_as_far_as_it_fits(chatty):
    whole = encode(ITEM, chatty, max_length=100, chat=True)
    assert whole.ending == len("</s>")
    assert chatty.decode(whole.tokens[whole.answer_start : -whole.ending]) == "Ada"
    for lost in range(1, 7):
        cut = encode(ITEM, chatty, max_length=len(whole.tokens) - lost, chat=True)
        assert cut.ending == max(0, 4 - lost)
    plain = encode(ITEM, chatty, max_length=100)
    assert plain.ending == 1
    assert encode(ITEM, chatty, max_length=len(plain.tokens) - 1).ending == 0
