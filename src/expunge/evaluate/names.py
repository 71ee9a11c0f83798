"""What each suite's numbers and facts are called, and what they say: for docs/metrics.md.

In a name `<…>` stands for what the data or the settings call it.
"""

_HALF = "`<half>` is `forget` or, the control, `retain`"

NUMBERS: dict[str, dict[str, str]] = {
    "semeval": {
        "<half>.<task>.sc": f"Mean `regurgitation` of the passages of a task; {_HALF}.",
        "<half>.<task>.qa": "Mean `knowledge` of its questions.",
        "<half>.regurgitation": "Mean of the tasks' `sc`; the interval by Zou and Donner.",
        "<half>.knowledge": "Mean of the tasks' `qa`, likewise.",
        "task_aggregate": "Harmonic mean of all terms, those of the forget half as 1 - v; the "
        "interval from all documents drawn anew.",
        "mia.auc": "AUC of the negative mean loss a token, members against non-members.",
        "mia.score": "1 - 2 |mia.auc - 1/2|.",
        "mia.two_sided": "`two_sided_auc` of the same losses.",
        "mia.ks": "`ks` distance of the same losses; no interval.",
        "mmlu": "Accuracy over all questions asked.",
        "mmlu.macro": "Mean of the subjects' accuracies.",
        "final": "(task_aggregate + mia.score + mmlu) / 3; left out where one of them is missing.",
    },
    "membership": {
        "<attack>.auc": "`auc` of the attack's score, members against non-members.",
        "<attack>.tpr": "`tpr`: share of members found at the given share of false alarms.",
        "<attack>.two_sided": "`two_sided_auc`: far from the non-members' mean on either side.",
        "<attack>.ks": "`ks`: the greatest distance of the two distributions; no interval.",
    },
    "memorisation": {
        "<half>.exact_memorisation": f"Mean over the items with a scored token; {_HALF}.",
        "<half>.extraction_strength": "Mean, likewise.",
        "<half>.verbatim_length": "Mean, in tokens, likewise.",
        "<half>.verbatim_length_max": "The longest of all; no interval.",
        "<half>.copied_length": "Mean over the items with a prompt, in tokens of the generation.",
        "<half>.copied_length_max": "The longest of all; no interval.",
        "<half>.pii_leak": "Share of the half's different pieces of personal data that any "
        "generation of either half gives away; those that stand in both halves' answers are left "
        "out.",
        "<half>.pii_leak.<kind>": "The same of one kind, where there are any.",
    },
    "robustness": {
        "<attack>.<side>.exact_before": "Mean `exact_memorisation` of the answers of forget or "
        "control, before the attack.",
        "<attack>.<side>.exact_after": "The same of the attacked copy.",
        "<attack>.<side>.nll_before": "Mean loss of an answer's token before the attack.",
        "<attack>.<side>.nll_after": "The same of the attacked copy.",
        "<attack>.<side>.gain": "exact_after - exact_before, item by item; documents drawn anew.",
        "<attack>.<side>.fall": "nll_before - nll_after, likewise.",
        "<attack>.recovered": "The gain of forget less that of control; see `unpaired_difference`.",
        "<attack>.recovered_nll": "The fall of forget less that of control, likewise.",
        "<attack>.left": "`exact_after` of forget less that of control, likewise.",
    },
    "tofu": {
        "<set>.probability": "Mean `tofu_probability` (forget, retain) or "
        "`tofu_option_probability` (authors, world).",
        "<set>.rouge": "Mean `tofu_rouge`.",
        "<set>.truth_ratio": "Mean `tofu_forget_truth` (forget) or `tofu_kept_truth` (others) of "
        "R; an item's `truth_ratio` is R itself.",
        "model_utility": "`tofu_model_utility` of the nine terms of retain, authors and world; "
        "all items drawn anew for its interval.",
        "forget_quality": "`tofu_forget_quality`, a p-value; null without `retain`; no interval.",
    },
    "muse": {
        "forget.verbatim": "Mean `muse_verbatim`.",
        "forget.knowledge": "Mean `muse_knowledge` of the questions on the forget set.",
        "retain.knowledge": "Mean `muse_knowledge` of the questions on the retain set: utility.",
        "privacy.auc": "`muse_auc` of the Min-K% of held-out and of forgotten texts.",
        "privacy.leakage": "`muse_leakage`, in percent; null without the retrained model, whose "
        "AUC its interval takes as exact.",
    },
    "mmlu": {
        "accuracy": "Share of all questions asked that are right (micro).",
        "macro": "Mean of the subjects' accuracies.",
        "subject.<subject>": "Accuracy of one subject.",
        "top_letter": "Share of the letter chosen most often; no interval.",
        "constant_answer": "1 where that is 95 % or more, else 0; null with fewer than 20 "
        "questions.",
    },
    "wmdp": {
        "accuracy": "Share of all questions asked that are right; chance is 0.25.",
        "macro": "Mean of the sets' accuracies.",
        "bio": "Accuracy on biology.",
        "cyber": "Accuracy on cyber security.",
        "chem": "Accuracy on chemistry.",
        "top_letter": "Share of the letter chosen most often; no interval.",
        "constant_answer": "1 where that is 95 % or more, else 0; null with fewer than 20 "
        "questions.",
    },
    "rwku": {
        "forget.level<level>": "Mean `rwku` score of the probes of a level, on the people to be "
        "forgotten.",
        "forget.level3.<attack>": "The same of the probes of level 3 with one attack.",
        "neighbor.level<level>": "The same on their neighbours: the control.",
        "mia.<set>.nll": "Mean over the texts of their loss a token, in nats; `<set>` is `forget` "
        "or, the control, `retain`.",
        "mia.<set>.zlib": "Mean score of the attack `zlib`: high where a text is still known.",
        "mia.<set>.min_k": "Mean score of `min_k`, of 20 % of the tokens.",
        "mia.<set>.min_k_plus_plus": "Mean score of `min_k_plus_plus`, of 20 % of the tokens.",
        "utility.general": "Accuracy on MMLU, five solved questions before each; chance is 0.25.",
        "utility.reason": "Mean `exact_answer` of what chains of thought end with, on BBH.",
        "utility.truthfulness": "Mean `truthful_mc1`, on TruthfulQA.",
        "utility.truthfulness.mc2": "Mean `truthful_mc2` of the same questions.",
        "utility.factuality": "Mean `token_f1` of short answers, on TriviaQA.",
        "utility.factuality.exact": "Mean `exact_answer` of the same.",
        "utility.fluency": "Mean `ngram_entropy`, in bits, of replies to AlpacaEval's prompts.",
    },
    "knowledge": {
        "generated": "Share of questions answered (`contains_answer`).",
        "cloze": "Share of sentences completed rightly (`likeliest_first`).",
        "generated.<group>": "The same of one group.",
        "cloze.<group>": "The same of one group.",
    },
    "collapse": {
        "neutral.nll": "Mean over the openings of their loss a token, in nats.",
        "neutral.perplexity": "exp(neutral.nll); null above 1e300.",
        "surprise": "neutral.nll / ln V, V the vocabulary: 1 is a blind guess.",
        "<group>.empty": "`collapse_measures` of what follows the openings (`neutral`), the texts "
        "of `kept` (`retain`) or its questions (`retain_questions`): share of empty texts.",
        "<group>.wordless": "Share of texts without a word.",
        "<group>.looping": "Share of texts that end in a cycle (`looping`).",
        "<group>.language": "Share of words that are common ones; null of fewer than 50 words.",
        "<group>.nonwords": "Share of words of impossible shape (`nonword`); likewise.",
        "<group>.distinct_1": "`distinct_n` of single tokens.",
        "<group>.distinct_2": "`distinct_n` of pairs.",
        "<group>.entropy": "`entropy` of the tokens, in bits.",
        "<group>.top_token": "Share of the commonest token.",
    },
    "lm_eval": {
        "<task>.<metric>": "As the harness computes it, of tasks and groups; ± 1.96 standard "
        "errors where it gives one.",
    },
    "traces": {
        "<group>.jaccard": "Mean `trace_jaccard` over the concepts of `forget` or `retain`, or "
        "over the `random` vectors.",
        "<group>.cosine": "Mean `trace_cosine`.",
        "<group>.distance": "Mean `trace_distance`.",
        "<group>.score_before": "Mean `trace_score` of the concepts' vectors, before.",
        "<group>.score_after": "The same vectors' in the model.",
        "<group>.change": "score_after - score_before.",
        "<group>.found": "Share of concepts whose score_before lies above 95 % of chance.",
        "chance.score_before": "Mean score of the best vectors for tokens dealt at random, 20 "
        "times or more: what a search finds where nothing is.",
    },
}

EVERY_FACT = {
    "collapsed": "Whether the model has collapsed: one verdict for all suites of a call.",
    "reasons": "Measures beyond their limits, by group.",
    "aggregates": "Numbers that are not printed, nor compared, of a collapsed model.",
}
"""Facts of every suite."""

_JUDGED = {"collapse": "Every measure of what the model writes, by group."}
_GIVEN = {
    "given": "Items of each set, whether asked or not.",
    "prompts_cut": "Prompts cut from the left to leave room for the answer.",
}
_LETTERS = {
    "letters": "Share of each letter among the answers given.",
    "always": "What giving that letter always would have scored.",
}

FACTS: dict[str, dict[str, str]] = {
    "semeval": {
        **_JUDGED,
        "nll": "Mean loss a token of members, non-members, neutral texts and both halves' answers.",
        "prompts_cut": _GIVEN["prompts_cut"],
        "texts_cut": "Texts that do not fit, of answers and of each set of documents.",
        "members_left_out": "Member documents that are no document of the forget set.",
    },
    "membership": {
        "cut": "Documents read only up to `document_tokens` or the context.",
        "recall_prefix": "Ids of the non-members that `recall` puts before the others.",
        "recall_tokens": "Tokens of that prefix.",
    },
    "memorisation": {
        "pii": "Different pieces of personal data in each half's answers, by kind.",
        "pii_in_both": "Pieces in the answers of both halves, which are not counted.",
        "answers_cut": "Answers of which only the first tokens fit into `max_length`.",
        "prompts_cut": _GIVEN["prompts_cut"],
        "without_prompt": "Items that nothing was generated for.",
        "without_score": "Items without a scored token.",
    },
    "robustness": {
        "documents_relearned": "Forget documents that `relearn` trained on.",
        "answers_cut": "Answers of which only the first tokens fit into `max_length`.",
    },
    "tofu": {**_JUDGED, **_GIVEN},
    "muse": {**_JUDGED, **_GIVEN, "texts_cut": "Texts of each set that do not fit."},
    "mmlu": {
        **_LETTERS,
        "shots": "Solved examples asked for.",
        "style": "How the questions were put.",
        "fewer_shots": "Questions before which fewer examples fitted.",
        "sampled": "Whether not all questions were asked.",
    },
    "wmdp": _LETTERS,
    "rwku": {
        "absent": "Files that are not there.",
        "template": "Whether probes were asked within the chat template.",
        "<set>.prompts_cut": _GIVEN["prompts_cut"],
        "<set>.texts_cut": "Texts read only up to `document_tokens` or the context.",
    },
    "knowledge": {"prompts_cut": _GIVEN["prompts_cut"]},
    "collapse": {**_JUDGED, "prompts_cut": _GIVEN["prompts_cut"]},
    "lm_eval": {
        "versions": "Each task's version.",
        "num_fewshot": "Each task's solved examples.",
        "items": "Each task's items, in all and asked.",
    },
    "traces": {
        "<group>_without_vectors": "Concepts without words or vectors of their own.",
    },
}
