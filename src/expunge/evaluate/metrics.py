"""The table of metrics: what each reads, its function, and where it is defined."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expunge.data import pii
from expunge.evaluate import (
    abilities,
    attacks,
    balance,
    choices,
    collapse,
    concepts,
    knowledge,
    membership,
    memorisation,
    mmlu,
    muse,
    paired,
    revival,
    rwku,
    semeval,
    tofu,
    two_sample,
)


@dataclass(frozen=True)
class Metric:
    """One row."""

    fn: Callable[..., Any]
    source: str
    needs: str
    test: str
    fidelity: str = "exact"
    cost: str = "generation"


_TRACES = "ConceptVectors, arXiv:2406.11614"
_LUME = "LUME, SemEval-2025 Task 4, arXiv:2504.02883"
_TOFU = "TOFU, arXiv:2401.06121"
_MUSE = "MUSE, arXiv:2407.06460"
_FORWARD = "one forward pass"
_SIDES = "members, non-members"

_TESTS = "tests/evaluate/test"
_COMPLETION = f"{_TESTS}_semeval.py::test_completion_is_rouge_l_recall_of_stems"
_ANSWER = f"{_TESTS}_semeval.py::test_knowledge_is_the_whole_answer_or_nothing"
_AGGREGATE = (
    f"{_TESTS}_semeval.py::test_the_aggregate_is_the_harmonic_mean_with_forgetting_turned_round"
)
_MIA = f"{_TESTS}_membership.py::test_low_losses_give_members_away_and_so_do_high_ones"
_AUC = f"{_TESTS}_membership.py::test_auc_by_hand"
_TPR = f"{_TESTS}_membership.py::test_tpr_by_hand"
_ATTACKS = f"{_TESTS}_membership.py::test_scores_by_hand"
_NORM = f"{_TESTS}_membership.py::test_a_norm_knows_the_head_as_embedding_and_finds_the_scores"
_QUESTIONS = f"{_TESTS}_mmlu.py::test_counts_are_of_all_questions_and_constant_answers_show"
_ACCURACIES = f"{_TESTS}_mmlu.py::test_accuracies_by_hand"
_CONSTANT = f"{_TESTS}_mmlu.py::test_one_letter_throughout_is_called_constant"
_DESTROYED = (
    f"{_TESTS}_collapse.py::test_a_destroyed_model_is_collapse_wherever_it_should_have_been_kept"
)
_DIVERSITY = f"{_TESTS}_collapse.py::test_diversity_by_hand"
_LOOPS = f"{_TESTS}_collapse.py::test_loops_are_short_cycles_that_fill_the_second_half"
_SHAPES = f"{_TESTS}_collapse.py::test_shapes_that_words_do_not_have"
_TWO_SIDED = f"{_TESTS}_balance.py::test_the_two_sided_attack_by_hand"
_GAP = f"{_TESTS}_balance.py::test_the_gap_goes_on_where_the_auc_has_ended"
_KS = f"{_TESTS}_two_sample.py::test_small_samples_by_hand"
_HITS = f"{_TESTS}_memorisation.py::test_hits_by_hand"
_COPIED = f"{_TESTS}_memorisation.py::test_copied_runs_by_hand"
_LEAK = f"{_TESTS}_memorisation.py::test_a_piece_is_found_however_it_is_written_and_nothing_near_it"
_PROBABILITIES = f"{_TESTS}_tofu.py::test_probabilities_by_hand"
_TRUTH = f"{_TESTS}_tofu.py::test_the_truth_ratio_is_a_geometric_mean_over_the_right_answer"
_ROUGE = f"{_TESTS}_tofu.py::test_rouge_is_the_share_of_the_answer_in_order"
_UTILITY = f"{_TESTS}_tofu.py::test_utility_is_the_harmonic_mean_of_nine"
_QUALITY = f"{_TESTS}_tofu.py::test_forget_quality_tells_who_forgot_from_who_remembers"
_VERBATIM = f"{_TESTS}_muse.py::test_verbatim_by_hand"
_GOES_ON = f"{_TESTS}_muse.py::test_an_answer_ends_where_the_model_goes_on_by_itself"
_LEAKAGE = f"{_TESTS}_muse.py::test_leakage_tells_what_is_known_from_what_never_was"
_FIRST_LINE = f"{_TESTS}_rwku.py::test_the_score_is_the_share_of_the_answer_in_the_first_line"
_EXACT = f"{_TESTS}_abilities.py::test_an_answer_is_exact_word_by_word"
_OVERLAPPING = f"{_TESTS}_abilities.py::test_f1_by_hand"
_TRUTHFUL = f"{_TESTS}_abilities.py::test_truthfulness_by_hand"
_VARIETY = f"{_TESTS}_abilities.py::test_entropy_by_hand"
_WORDS = f"{_TESTS}_knowledge.py::test_an_answer_is_found_as_whole_words_of_the_first_line"
_ENDS = f"{_TESTS}_knowledge.py::test_the_right_end_must_be_likelier_than_every_other"
_OVERLAP = f"{_TESTS}_traces.py::test_overlap_by_hand"
_DISTANCES = f"{_TESTS}_traces.py::test_distances_by_hand"
_CONCEPTS = f"{_TESTS}_traces.py::test_scores_by_hand"
_PAIRED = f"{_TESTS}_compare.py::test_a_paired_difference_by_hand"
_UNPAIRED = f"{_TESTS}_compare.py::test_an_unpaired_difference_by_hand"
_REVIVAL = f"{_TESTS}_robustness.py"

METRICS = {
    "regurgitation": Metric(semeval.completion_score, _LUME, "generations", _COMPLETION),
    "knowledge": Metric(semeval.knowledge_score, _LUME, "generations", _ANSWER),
    "task_aggregate": Metric(semeval.task_aggregate, _LUME, "the twelve terms", _AGGREGATE),
    "mia": Metric(membership.mia, _LUME, _SIDES, _MIA, cost=_FORWARD),
    "mmlu": Metric(mmlu.answer_mmlu, "arXiv:2009.03300", "questions", _QUESTIONS, cost=_FORWARD),
    "collapse": Metric(collapse.judge, "this project", "generations", _DESTROYED, "own"),
    "collapse_measures": Metric(
        collapse.measures, "this project", "generations", _DIVERSITY, "own"
    ),
    "looping": Metric(collapse.is_looping, "this project", "generations", _LOOPS, "own"),
    "nonword": Metric(collapse.is_nonword, "this project", "generations", _SHAPES, "own"),
    "distinct_n": Metric(collapse.distinct, "arXiv:1510.03055", "generations", _DIVERSITY),
    "entropy": Metric(collapse.entropy, "Shannon 1948", "generations", _DIVERSITY),
    "two_sided_auc": Metric(
        balance.two_sided_auc, "this project", _SIDES, _TWO_SIDED, "own", _FORWARD
    ),
    "separation_gap": Metric(
        balance.separation_gap, "Green and Swets 1966", _SIDES, _GAP, cost=_FORWARD
    ),
    "ks": Metric(two_sample.ks_test, "Kolmogorov 1933; Smirnov 1939", _SIDES, _KS, cost=_FORWARD),
    "auc": Metric(membership.auc, "Mann and Whitney 1947", _SIDES, _AUC, cost=_FORWARD),
    "tpr": Metric(membership.tpr, "arXiv:2112.03570", _SIDES, _TPR, cost=_FORWARD),
    "relearn": Metric(
        revival.relearn,
        "Hu et al. 2024, arXiv:2406.13356",
        "weights, forget items",
        f"{_REVIVAL}::test_what_is_hidden_comes_back_and_what_was_never_known_does_not",
        "adapted",
        "5 C of a quarter of the forget set, and a second model in memory",
    ),
    "quantise": Metric(
        revival.quantise,
        "Zhang et al. 2024, arXiv:2410.16454",
        "weights",
        f"{_REVIVAL}::test_rounding_by_hand",
        cost="one forward pass, and a second model in memory",
    ),
    "loss": Metric(attacks.loss, "arXiv:1709.01604", "documents", _ATTACKS, cost=_FORWARD),
    "zlib": Metric(attacks.zlib_ratio, "arXiv:2012.07805", "documents", _ATTACKS, cost=_FORWARD),
    "zlib_total": Metric(
        attacks.zlib_total, "arXiv:2012.07805", "documents", _ATTACKS, "adapted", _FORWARD
    ),
    "min_k": Metric(attacks.min_k, "arXiv:2310.16789", "documents", _ATTACKS, cost=_FORWARD),
    "min_k_plus_plus": Metric(
        attacks.min_k_plus_plus,
        "arXiv:2404.02936",
        "documents",
        _ATTACKS,
        fidelity="adapted",
        cost=_FORWARD,
    ),
    "reference": Metric(
        attacks.reference_gap,
        "arXiv:2203.03929",
        "documents, a reference model",
        _ATTACKS,
        cost="one forward pass of two models",
    ),
    "recall": Metric(
        attacks.recall,
        "arXiv:2406.15968",
        "documents, non-members",
        _ATTACKS,
        fidelity="adapted",
        cost="two forward passes",
    ),
    "gradient_norm": Metric(
        attacks.gradient_norm,
        "arXiv:2402.17012",
        "documents",
        _NORM,
        cost="one backward pass a document",
    ),
    "exact_memorisation": Metric(
        memorisation.exact_memorisation, "arXiv:2205.10770", "answers", _HITS, cost=_FORWARD
    ),
    "extraction_strength": Metric(
        memorisation.extraction_strength, "arXiv:2012.07805", "answers", _HITS, cost=_FORWARD
    ),
    "verbatim_length": Metric(
        memorisation.verbatim_length, "arXiv:2202.07646", "answers", _HITS, "adapted", _FORWARD
    ),
    "copied_length": Metric(
        memorisation.copied_length, "this project", "generations", _COPIED, "own"
    ),
    "pii_leak": Metric(pii.pii_leak, "this project", "generations", _LEAK, "own"),
    "tofu_probability": Metric(
        tofu.answer_probability, _TOFU, "token scores", _PROBABILITIES, cost=_FORWARD
    ),
    "tofu_option_probability": Metric(
        tofu.option_probability,
        _TOFU,
        "token scores of right and wrong answers",
        _PROBABILITIES,
        "as-released quirk",
        cost=_FORWARD,
    ),
    "tofu_truth_ratio": Metric(
        tofu.truth_ratio,
        _TOFU,
        "token scores of right and wrong answers",
        _TRUTH,
        "as-released quirk",
        cost=_FORWARD,
    ),
    "tofu_forget_truth": Metric(tofu.forget_truth, _TOFU, "truth ratios", _TRUTH, cost=_FORWARD),
    "tofu_kept_truth": Metric(tofu.kept_truth, _TOFU, "truth ratios", _TRUTH, cost=_FORWARD),
    "tofu_rouge": Metric(tofu.answer_rouge, _TOFU, "generations", _ROUGE, "adapted"),
    "tofu_model_utility": Metric(tofu.model_utility, _TOFU, "the nine terms", _UTILITY),
    "tofu_forget_quality": Metric(
        tofu.forget_quality,
        _TOFU,
        "truth ratios of two models",
        _QUALITY,
        "adapted",
        cost="one forward pass of each model",
    ),
    "muse_verbatim": Metric(muse.verbatim_score, _MUSE, "generations", _VERBATIM),
    "muse_knowledge": Metric(muse.knowledge_score, _MUSE, "generations", _GOES_ON),
    "muse_auc": Metric(
        muse.leakage_auc, _MUSE, "forgotten and held-out texts", _LEAKAGE, cost=_FORWARD
    ),
    "muse_leakage": Metric(
        muse.privacy_leakage,
        _MUSE,
        "the AUC of two models",
        _LEAKAGE,
        cost="one forward pass of each model",
    ),
    "accuracy": Metric(
        choices.accuracy, "arXiv:2009.03300", "letters chosen", _ACCURACIES, cost=_FORWARD
    ),
    "macro_accuracy": Metric(
        choices.macro_accuracy,
        "arXiv:2009.03300",
        "accuracies by subject",
        _ACCURACIES,
        cost=_FORWARD,
    ),
    "top_letter": Metric(
        choices.top_letter, "this project", "letters chosen", _ACCURACIES, "own", _FORWARD
    ),
    "constant_answer": Metric(
        choices.constant_answer, "this project", "letters chosen", _CONSTANT, "own", _FORWARD
    ),
    "rwku": Metric(
        rwku.answer_score, "RWKU, arXiv:2406.10890", "generations", _FIRST_LINE, "adapted"
    ),
    "exact_answer": Metric(
        abilities.exact_answer, "arXiv:1606.05250", "generations", _EXACT, "adapted"
    ),
    "token_f1": Metric(abilities.token_f1, "arXiv:1606.05250", "generations", _OVERLAPPING),
    "truthful_mc1": Metric(
        abilities.truthful_mc1, "arXiv:2109.07958", "token scores", _TRUTHFUL, cost=_FORWARD
    ),
    "truthful_mc2": Metric(
        abilities.truthful_mc2, "arXiv:2109.07958", "token scores", _TRUTHFUL, cost=_FORWARD
    ),
    "ngram_entropy": Metric(
        abilities.ngram_entropy, "arXiv:1809.05972", "generations", _VARIETY, "adapted"
    ),
    "contains_answer": Metric(
        knowledge.contains_answer, "this project", "generations", _WORDS, "own"
    ),
    "likeliest_first": Metric(
        knowledge.likeliest_first, "this project", "token scores", _ENDS, "own", _FORWARD
    ),
    "trace_jaccard": Metric(
        concepts.jaccard, _TRACES, "the model before", _OVERLAP, "exact", "weights alone"
    ),
    "trace_cosine": Metric(
        concepts.cosine, _TRACES, "the model before", _DISTANCES, "exact", "weights alone"
    ),
    "trace_distance": Metric(
        concepts.distance, _TRACES, "the model before", _DISTANCES, "adapted", "weights alone"
    ),
    "trace_score": Metric(
        concepts.concept_scores,
        _TRACES,
        "the model before, a concept's tokens",
        _CONCEPTS,
        "adapted",
        "weights alone",
    ),
    "paired_difference": Metric(
        paired.paired_difference, "Koehn 2004", "items of two models", _PAIRED, "exact", "none"
    ),
    "unpaired_difference": Metric(
        paired.unpaired_difference,
        "Newcombe 1998; Zou and Donner 2008",
        "intervals of two models",
        _UNPAIRED,
        "exact",
        "none",
    ),
}
