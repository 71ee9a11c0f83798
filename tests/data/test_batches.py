import pytest
import torch

from expunge.data.batches import (
    TokenSequence,
    encode,
    encode_document,
    pack,
    packs_by_length,
    prompt_tokens,
)
from expunge.data.examples import Document, Example
from expunge.errors import DataError

END = 0


def text_of(tokenizer, sequence: TokenSequence) -> tuple[str, str]:
    """Prompt and answer, the end of text shown as `$`."""
    prompt = tokenizer.decode(sequence.tokens[: sequence.answer_start])
    answer = tokenizer.decode(sequence.tokens[sequence.answer_start :])
    return prompt, answer.replace("<end>", "$")


@pytest.mark.parametrize(
    ("limits", "prompt", "answer", "cut"),
    [
        ({"max_length": 9}, "abcdef", "xy$", 0),
        ({"max_length": 8}, "abcdef", "xy", 1),  # the answer loses its end
        ({"max_length": 9, "prompt_tail": 2}, "ef", "xy$", 4),
        ({"max_length": 9, "prompt_tail": 0}, "", "xy$", 6),
        ({"max_length": 7}, "abcdef", "x", 2),
        ({"max_length": 6}, "def", "xy$", 3),  # no room for an answer: half goes to the prompt
        ({"max_length": 4}, "ef", "xy", 5),
        ({"max_length": 10, "separator": "-"}, "abcdef", "-xy$", 0),
    ],
)
def test_a_long_example_is_cut_by_rule(tokenizer, limits, prompt, answer, cut):
    sequence = encode(Example("e", "abcdef", "xy"), tokenizer, **limits)
    assert text_of(tokenizer, sequence) == (prompt, answer)
    assert sequence.cut == cut
    assert sequence.id == "e"


def test_a_plain_text_has_no_prompt_and_no_separator(tokenizer):
    sequence = encode(Example("e", "", "xy"), tokenizer, max_length=9, separator="-")
    assert text_of(tokenizer, sequence) == ("", "xy$")
    assert sequence.scored_from("answer") == 1  # nothing precedes the first token


def test_a_document_is_cut_at_its_end_and_has_no_end_of_text(tokenizer):
    sequence = encode_document(Document("d", "abcdef"), tokenizer, max_length=4)
    assert tokenizer.decode(sequence.tokens) == "abcd"
    assert (sequence.cut, sequence.answer_start) == (2, 0)
    with pytest.raises(DataError, match="document d has fewer than two tokens"):
        encode_document(Document("d", "a"), tokenizer, max_length=4)


def test_no_start_token_is_added_where_the_tokenizer_adds_none(tokenizer):
    assert tokenizer.decode(prompt_tokens(tokenizer, "ab")) == "ab"
    assert prompt_tokens(tokenizer, "") == []


ONE = TokenSequence("one", (11, 12, 13, END), answer_start=2)
TWO = TokenSequence("two", (21, 22, END), answer_start=0)


def test_a_pack_scores_answers_from_the_position_before(tokenizer):
    made = pack([ONE, TWO], "answer", "cpu")
    assert made.tokens.tolist() == [11, 12, 13, END, 21, 22, END]
    assert made.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert made.lengths == (4, 3)
    assert made.scored.tolist() == [1, 2, 4, 5]
    assert made.targets.tolist() == [13, END, 22, END]
    assert made.sequence.tolist() == [0, 0, 1, 1]
    assert made.ids == ("one", "two")


def test_a_pack_of_documents_scores_all_but_their_first_tokens():
    made = pack([ONE, TWO], "document", "cpu")
    assert made.scored.tolist() == [0, 1, 2, 4, 5]
    assert made.targets.tolist() == [12, 13, END, 22, END]
    assert made.sequence.tolist() == [0, 0, 0, 1, 1]
    assert made.scored.dtype == torch.int64


def sized(length: int, name: str) -> TokenSequence:
    return TokenSequence(name, (1,) * length, answer_start=0)


def test_packs_take_the_longest_first_and_keep_to_the_limit():
    sequences = [sized(3, "c"), sized(9, "a"), sized(5, "b"), sized(3, "d"), sized(2, "e")]
    groups = packs_by_length(sequences, max_tokens=8)
    assert [[sequence.id for sequence in group] for group in groups] == [
        ["a"],  # longer than the limit: alone
        ["b", "c"],
        ["d", "e"],
    ]


def test_packs_do_not_depend_on_the_order_given():
    sequences = [sized(length, str(number)) for number, length in enumerate((3, 1, 2, 3, 1))]
    there = list(packs_by_length(sequences, max_tokens=4))
    assert there == list(packs_by_length(reversed(sequences), max_tokens=4))
    assert list(packs_by_length([], max_tokens=4)) == []
