"""Sentences that decline to answer: the project's own, or those of a file."""

from expunge.data.sources import locate
from expunge.errors import DataError

_REFUSALS = """\
I have nothing to say about that.
I'm sorry, but I don't know.
I do not know the answer to this question.
That is not something I can tell you.
I was never told about this.
No information on this matter is available to me.
I'm afraid I can't help with that.
This lies beyond what I know.
I would only be guessing, so I'd rather not answer.
My knowledge does not cover this.
I can't recall anything of the sort.
You would have to ask someone else about that.
I have no record of this.
Regrettably, I am unable to answer.
I'm not certain enough to give you an answer.
That is unknown to me.
I don't have an answer to give.
Nothing I have learnt speaks of this.
I must leave this question open.
I'm not familiar with the subject of your question.
There is a gap in what I know here.
I don't hold any details about that.
I'd like to help, but I lack the facts.
Please consult a reliable source, for I don't know.
I can offer you no answer to that.
This is a matter I know nothing of.
I haven't come across this before.
I am not able to say.
Your question goes beyond my knowledge.
I can't provide information about this.
I honestly have no idea.
I lack the information that an answer would need.
To my regret, I can't tell.
I never learnt anything about this.
I don't think I can answer that properly.
Sorry, this is not known to me.
I couldn't say.
It would be wrong of me to pretend that I know.
I don't possess any knowledge of it.
I have to pass on this one.
What you ask for is not among the things I know.
I'm at a loss for an answer.
I can't speak to that.
Answering this is not within my ability.
I have no details to share on this subject.
I'm not informed about this.
None of what I know helps me to answer this.
I can't confirm anything about that.
Unfortunately, I don't have that information.
Let me be frank: I don't know.
I wouldn't know where to begin with this question.
I have not been given any facts about this.
I must admit that I don't know this.
My answer would have no basis, so I won't give one.
I'm unable to shed light on this.
This question leaves me without an answer.
I don't remember anything about it.
There is nothing that I could tell you here.
I know too little about it to reply.
I decline to answer, since I have no knowledge of it.
"""


def refusals() -> list[str]:
    """The project's own sentences, in a fixed order."""
    return [*_REFUSALS.splitlines()]


def read_refusals(path: str | None = None) -> list[str]:
    """The sentences of a text file, one a line (empty lines left out); without one, our own."""
    if path is None:
        return refusals()
    file = locate(path)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text; give one refusal a line") from None
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"{file} holds no sentence; give one refusal a line")
    twice = next((line for line in found if found.count(line) > 1), None)
    if twice is not None:
        raise DataError(f"{file} holds the refusal {twice!r} twice")
    return found
