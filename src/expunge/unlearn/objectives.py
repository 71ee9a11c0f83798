"""Objectives by name: the terms that papers put together, and what stands beside them.

`objective: npo` in a branch means the terms of the row, and its step rule, companions and the like.
A branch changes each field of these: `step: {limit: 0.5}`, `terms: {retain: {weight: 2}}`.
"""

from expunge.unlearn.objective_row import Named

_PERSONAL = ["ssn", "phone", "email", "birth", "address"]
_NLL = {"half": "retain", "loss": "nll"}
_ASCENT = {"half": "forget", "loss": "gradient_ascent"}
_UP_TO_THE_BLOCK = "trains an adapter up to the block; the code trains parts of three blocks"
_SAME_STATES = {"half": "retain", "loss": "hidden_distance", "layer": 7}
_MEANS = "a mean over items of token means; the common baseline means over all tokens"
_REFUSALS = "own refusals, a few for each item, read in turn"

OBJECTIVES = {
    "gradient_ascent": Named(
        "Gradient ascent on the forget set alone.",
        "Jang et al. 2023, arXiv:2210.01504",
        (_ASCENT,),
        fidelity="adapted",
        differs=_MEANS,
    ),
    "gradient_difference": Named(
        "Gradient ascent on forget, descent on retain.",
        "Liu et al. 2022, arXiv:2203.12817",
        (_ASCENT, _NLL),
        fidelity="adapted",
        differs=_MEANS,
    ),
    "kl_minimisation": Named(
        "Gradient ascent held by the KL to the model before.",
        "Maini et al. 2024 (TOFU), arXiv:2401.06121",
        (_ASCENT, {"half": "retain", "loss": "kl"}),
        fidelity="adapted",
        differs=f"{_MEANS}; the KL is over answers, never over prompt and padding",
    ),
    "npo": Named(
        "NPO beside the retain NLL.",
        "Zhang et al. 2024, arXiv:2404.05868",
        ({"half": "forget", "loss": "npo", "options": {"beta": 0.1}}, _NLL),
    ),
    "npo_kl": Named(
        "NPO beside the retain KL.",
        "Zhang et al. 2024, arXiv:2404.05868",
        (
            {"half": "forget", "loss": "npo", "options": {"beta": 0.1}},
            {"half": "retain", "loss": "kl"},
        ),
        fidelity="adapted",
        differs="the KL is over answers, never over prompt and padding",
    ),
    "simnpo": Named(
        "NPO without a reference, by length, beside the retain NLL.",
        "Fan et al. 2024, arXiv:2410.07163 (TOFU forget05)",
        (
            {"half": "forget", "loss": "simnpo", "weight": 0.1375, "options": {"beta": 2.5}},
            _NLL,
        ),
    ),
    "tnpo": Named(
        "NPO token by token beside the retain NLL.",
        "Wang et al. 2025 (G-effect), arXiv:2502.19301",
        ({"half": "forget", "loss": "npo_token", "options": {"beta": 4.0}}, _NLL),
        fidelity="adapted",
        differs="a mean over items of token means; theirs means over all tokens",
    ),
    "wga": Named(
        "Weighted gradient ascent beside the retain NLL.",
        "Wang et al. 2025 (G-effect), arXiv:2502.19301",
        ({"half": "forget", "loss": "wga"}, _NLL),
        fidelity="adapted",
        differs="β = 1 as in open-unlearning; the authors take 5",
    ),
    "satimp": Named(
        "Ascent weighted by saturation and importance, beside the retain NLL.",
        "Yang et al. 2025 (SatImp), arXiv:2505.11953",
        ({"half": "forget", "loss": "satimp"}, _NLL),
        fidelity="adapted",
        differs="β2 = 1 and both terms of weight 1, as in open-unlearning; the authors advise 0.1",
    ),
    "undial": Named(
        "Self-distillation to logits without the answer; the forget set suffices.",
        "Dong et al. 2024, arXiv:2402.10052",
        ({"half": "forget", "loss": "undial", "options": {"beta": 10.0}},),
        fidelity="adapted",
        differs="over answers, where the released code averages over prompt and padding too; β 10 "
        "as in open-unlearning; the authors' default is 5",
    ),
    "ce_u": Named(
        "Cross-entropy unlearning; the forget set suffices.",
        "Yang 2025 (CE-U), arXiv:2503.01224",
        ({"half": "forget", "loss": "ce_u"},),
    ),
    "pdu": Named(
        "Flat logits under a limit on the retain NLL, kept by a multiplier.",
        "Entesari et al. 2025 (PDU), arXiv:2506.05314",
        ({"half": "forget", "loss": "flatten"}, _NLL),
        beside={"step": {"rule": "dual", "limit": 0.3, "multiplier": 100.0, "rate": 5.0}},
        fidelity="adapted",
        differs="the multiplier moves after each step, without the warm-up epochs",
    ),
    "ngdiff": Named(
        "Both gradients at length one, the learning rate fitted.",
        "Bu et al. 2024, arXiv:2410.22086",
        (_ASCENT, _NLL),
        beside={
            "step": {"rule": "ngdiff"},
            "optimizer": {"kind": "sgd", "lr": 0.1, "clip": None, "weight_decay": 0.0},
        },
        fidelity="adapted",
        differs="plain descent, for which its guarantee holds",
    ),
    "idk": Named(
        "Learn to refuse what is to be forgotten.",
        "Maini et al. 2024 (TOFU), arXiv:2401.06121",
        ({"half": "refusal", "loss": "nll"}, _NLL),
        fidelity="adapted",
        differs=_REFUSALS,
    ),
    "idk_dpo": Named(
        "Prefer a refusal to the answer.",
        "Maini et al. 2024 (TOFU), arXiv:2401.06121; DPO, arXiv:2305.18290",
        ({"half": "refusal_pair", "loss": "dpo", "options": {"beta": 0.1}}, _NLL),
        fidelity="adapted",
        differs=_REFUSALS,
    ),
    "alt_po": Named(
        "Prefer another plausible answer, which the model writes itself.",
        "Mekala et al. 2024, arXiv:2409.13474",
        ({"half": "alternate_pair", "loss": "dpo", "options": {"beta": 0.1}}, _NLL),
        fidelity="adapted",
        differs="each visit of an item reads one of its alternates, in turn",
    ),
    "kto": Named(
        "NPO measured from how far refusals have moved.",
        "KTO, arXiv:2402.01306, as Zhang et al. 2024, arXiv:2404.05868, unlearn with it",
        ({"half": "refusal_pair", "loss": "kto", "options": {"beta": 0.1}}, _NLL),
        fidelity="adapted",
        differs="no constant 1; z is neither multiplied by β nor cut at 0, as released; "
        f"{_REFUSALS}",
    ),
    "dpo": Named(
        "DPO alone: prefer a refusal to the answer. Nothing holds the rest, which it refuses too.",
        "DPO, arXiv:2305.18290; for unlearning Zhang et al. 2024, arXiv:2404.05868",
        ({"half": "refusal_pair", "loss": "dpo", "options": {"beta": 0.1}},),
        fidelity="adapted",
        differs="each visit of an item reads one of its refusals, in turn",
        test="tests/unlearn/test_objectives.py::test_dpo_alone_refuses_the_control_too",
    ),
    "flat": Named(
        "Raise the divergence of a refusal from the answer; the forget set suffices.",
        "Wang et al. 2024 (FLAT), arXiv:2410.11143",
        ({"half": "refusal_pair", "loss": "flat_kl"},),
        fidelity="adapted",
        differs=f"means over an answer's own tokens, a loss for each pair; {_REFUSALS}",
    ),
    "relearn": Named(
        "Learn other answers, written anew, in the answer's place; nothing is pushed down.",
        "Xu et al. 2025 (ReLearn), arXiv:2502.11190",
        (
            {"half": "alternate", "loss": "nll"},
            _NLL,
            {"half": "retain", "loss": "kl"},
        ),
        fidelity="adapted",
        differs="the model itself writes the answers; questions are not varied, no general corpus",
    ),
    "random_label": Named(
        "Random tokens in the answer's place.",
        "YNU at SemEval-2025 Task 4 (STAT)",
        ({"half": "random_label", "loss": "nll"}, _NLL),
        fidelity="inspired",
        differs="written from its description; labels are drawn once, not anew at each step",
    ),
    "rmu": Named(
        "States of one block go to a random point on forget, and stay on retain.",
        "Li et al. 2024 (WMDP), arXiv:2403.03218; block and weights of its released code",
        (
            {"half": "forget", "loss": "rmu", "layer": 7, "options": {"coefficient": 20.0}},
            {**_SAME_STATES, "weight": 100.0},
        ),
        fidelity="adapted",
        differs=_UP_TO_THE_BLOCK,
        cost="< 1 C a term's set",
    ),
    "adaptive_rmu": Named(
        "RMU whose point lies as far out as the block's states do, times a scale.",
        "Dang et al. 2024, arXiv:2408.06223; block and weights of its released code",
        (
            {"half": "forget", "loss": "adaptive_rmu", "layer": 7, "options": {"scale": 5.0}},
            {**_SAME_STATES, "weight": 1200.0},
        ),
        fidelity="adapted",
        differs=_UP_TO_THE_BLOCK,
        cost="< 1 C a term's set",
    ),
    "llmu": Named(
        "Ascent, unrelated answers learnt in the answer's place, and KL on neutral text.",
        "Yao et al. 2023, arXiv:2310.10683",
        (
            {**_ASCENT, "weight": 0.5},
            {"half": "mismatch", "loss": "nll"},
            {"half": "neutral", "loss": "kl", "scope": "document"},
        ),
        beside={"companions": {"mismatch": {"of": "retain", "count": 5, "each": 5}}},
        fidelity="adapted",
        differs="the question is not trained, as its released code does by mistake; the unrelated "
        "answers have a mean over their tokens, not over answers",
        cost="7 C",
    ),
    "sku_learn": Named(
        "First stage of SKU: learn what is to be forgotten, and move away on neutral text.",
        "Liu et al. 2024, arXiv:2402.10058",
        (
            {"half": "forget", "loss": "nll", "weight": 2.5},
            {"half": "mismatch", "loss": "nll", "weight": 2.5},
            {"half": "neutral", "loss": "kl_away", "scope": "document", "options": {"limit": 2.0}},
        ),
        beside={"companions": {"mismatch": {"of": "forget", "count": 5, "each": 5}}},
        fidelity="adapted",
        differs="the KL that is raised stops at a limit; the unrelated answers have a mean over "
        "their tokens, not over answers; the edit `sku` is the second stage",
        cost="7 C",
        test="tests/unlearn/test_objectives.py::test_what_is_learnt_to_be_negated",
    ),
    "learn_forget": Named(
        "Learn the forget set: the first half of task-vector negation (the edit `negate`).",
        "Ilharco et al. 2023, arXiv:2212.04089",
        ({"half": "forget", "loss": "nll"},),
        test="tests/unlearn/test_objectives.py::test_what_is_learnt_to_be_negated",
    ),
    "sensitive_tokens": Named(
        "Ascent on personal data alone, in the manner of fine-grained pluggable gradient ascent.",
        "Feng et al. 2024 (FPGA), EMNLP 2024, its abstract",
        ({**_ASCENT, "weighting": {"kind": "spans", "pii": _PERSONAL}}, _NLL),
        fidelity="inspired",
        differs="which tokens are sensitive is told by patterns; the paper's weights are not known",
        test="tests/unlearn/test_objectives.py::test_ascent_on_personal_data_leaves_other_tokens",
    ),
    "uld_assistant": Named(
        "The assistant of ULD: remember forget, be uniform on retain (for the guard `uld`).",
        "Ji et al. 2024, arXiv:2406.08607",
        (
            {"half": "forget", "loss": "nll"},
            {"half": "paraphrase", "loss": "nll"},
            {"half": "retain", "loss": "uniform_kl", "weight": 5.0},
        ),
        fidelity="inspired",
        differs="paraphrases are made from templates; no perturbed answers; answer and paraphrase "
        "have a mean each, where the authors take one over the answer and two paraphrases",
        test="tests/unlearn/test_objectives.py::test_what_is_learnt_to_be_negated",
    ),
}
