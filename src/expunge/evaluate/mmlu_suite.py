"""The suite `mmlu`: accuracy over all questions and by subject, and the letters chosen."""

from expunge.data.sources import locate
from expunge.errors import DataError
from expunge.evaluate.choices import measure_choices
from expunge.evaluate.mmlu import HUB, Mmlu, choose, read_mmlu
from expunge.evaluate.numbers import Measured
from expunge.evaluate.reader import Reader


def mmlu_suite(reader: Reader, section: Mmlu) -> Measured:
    """Ask the test questions; one item each, also for those that the sample leaves out.

    The answer is the likeliest of the tokens of A, B, C and D after `Answer:`. The interval of
    `macro` draws each subject's questions anew; it has none where a subject has one question.

    Source: Hendrycks et al. 2021, arXiv:2009.03300.
    """
    questions = read_mmlu(section.path if section.path == HUB else locate(section.path))
    test = [question for question in questions if question.split == "test"]
    if not test:
        raise DataError(f"{section.path} holds no question of the split 'test'")
    asked, chosen, shots = choose(reader, questions, section)
    taken = {id(question) for question in asked}
    left = iter(chosen)
    letters = [next(left) if id(question) in taken else None for question in test]
    answers, hashes = [q.answer for q in test], [q.hash for q in test]
    found = measure_choices([q.subject for q in test], answers, letters, hashes)
    found.facts |= {
        "shots": section.shots,
        "style": section.style,
        "fewer_shots": sum(kept < section.shots for kept in shots),
        "sampled": section.per_subject is not None,
    }
    return found
