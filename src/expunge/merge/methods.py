"""Merge methods: a table with one row of choices for each.

A row's `options` are ours; `mergekit` holds the defaults under which it is mergekit's, where those
differ.
"""

from expunge.merge import pieces, spectral
from expunge.merge import span as spans
from expunge.merge.families import REQUIRED, Elect, Matrix, Method, Piece, Span

LINEAR = Span(spans.linear, measures=False)

_SUM = {"vote": "unweighted", "divide": "none", "lambda": 1.0}
_MEAN = {**_SUM, "divide": "count"}
_TRIM = {"density": 1.0, "rescale": "none", "trim": "tensor"}
_DRAW = {"density": 1.0, "rescale": "chance"}
_MERGEKIT = {"vote": "weighted", "divide": "none"}
_MERGEKIT_MEAN = {"vote": "weighted", "divide": "weights"}
_TWO_PASSES = "three passes over each tensor: two to find the bound, one to merge"
_SIGNED = "divides by Σ|w|, where mergekit's Σ w would undo a negative weight"
_TESTS = "tests/merge/test_methods.py"

METHODS = {
    "linear": Method(LINEAR, source="arXiv:2203.05482", options={"normalize": True}, base=False),
    "slerp": Method(
        Span(spans.slerp),
        source="Shoemake 1985",
        options={"t": REQUIRED},
        models=(1, 1),
        cost="two passes",
    ),
    "nuslerp": Method(
        Span(spans.nuslerp, of="either"),
        source="mergekit",
        options={"nuslerp_flatten": True, "nuslerp_row_wise": False},
        base=False,
        models=(2, 2),
        cost="two passes",
        fidelity="adapted",
        differs="cosines in float64",
    ),
    "multislerp": Method(
        Span(spans.multislerp, of="either"),
        source="mergekit",
        options={"normalize_weights": True, "eps": 1e-8},
        base=False,
        grows=False,
        cost="two passes",
    ),
    "karcher": Method(
        Span(spans.karcher),
        source="arXiv:2603.04972",
        options={"max_iter": 10, "tol": 1e-5},
        base=False,
        cost="two passes",
        fidelity="adapted",
        differs="iterates on inner products in float64; mergekit on the tensors in float32",
    ),
    "model_stock": Method(
        Span(spans.model_stock, of="deltas"),
        source="arXiv:2403.19522",
        options={"filter_wise": False},
        models=(2, 1 << 30),
        cost="two passes",
    ),
    "passthrough": Method(
        Span(spans.passthrough, measures=False),
        source="mergekit",
        options={"scale": None},
        base=False,
        models=(1, 1),
    ),
    "task_arithmetic": Method(
        Elect(),
        summary="Sum of the weighted deltas; a negative weight unlearns.",
        source="arXiv:2212.04089",
        options=_SUM,
        mergekit=_MERGEKIT,
        differs=_SIGNED,
        fidelity="adapted",
    ),
    "ties": Method(
        Elect("largest", elect=True),
        summary="Keep the largest entries of each delta, elect signs, average those that agree.",
        source="arXiv:2306.01708",
        options={**_MEAN, **_TRIM},
        mergekit=_MERGEKIT_MEAN,
        fidelity="adapted",
        differs="trims each tensor by itself; `trim: model` trims the model as a whole, as the "
        f"paper does. Under mergekit's defaults {_SIGNED}",
        needs=("density",),
        cost=_TWO_PASSES,
    ),
    "dare_linear": Method(
        Elect("random"),
        summary="Drop entries at random, sum the rest.",
        source="arXiv:2311.03099",
        options={**_SUM, **_DRAW},
        mergekit={**_MERGEKIT, "rescale": "l1"},
        needs=("density", "seed"),
    ),
    "dare_ties": Method(
        Elect("random", elect=True),
        summary="Drop entries at random, elect signs, average those that agree.",
        source="arXiv:2311.03099",
        options={**_MEAN, **_DRAW},
        mergekit={**_MERGEKIT, "rescale": "l1"},
        fidelity="adapted",
        differs="drops at random in place of the trim of TIES, as peft and mergekit do",
        needs=("density", "seed"),
    ),
    "della": Method(
        Elect("ranked", elect=True),
        summary="Drop entries at random, small ones sooner; elect signs, average those that agree.",
        source="arXiv:2406.11617",
        options={**_MEAN, **_DRAW, "epsilon": 0.15},
        mergekit={**_MERGEKIT_MEAN, "rescale": "l1"},
        needs=("density", "seed"),
        cost="two passes: one ranks each row, one merges",
    ),
    "della_linear": Method(
        Elect("ranked"),
        summary="Drop entries at random, small ones sooner; sum the rest.",
        source="arXiv:2406.11617",
        options={**_SUM, **_DRAW, "epsilon": 0.15},
        mergekit={**_MERGEKIT, "rescale": "l1"},
        needs=("density", "seed"),
        cost="two passes: one ranks each row, one merges",
    ),
    "breadcrumbs": Method(
        Elect("middle"),
        summary="Drop the largest and the smallest entries, sum the rest.",
        source="arXiv:2312.06795",
        options={**_SUM, **_TRIM, "gamma": 0.01},
        mergekit=_MERGEKIT,
        needs=("density", "gamma"),
        cost=_TWO_PASSES,
    ),
    "breadcrumbs_ties": Method(
        Elect("middle", elect=True),
        summary="Drop the largest and the smallest entries, elect signs, average those that agree.",
        source="arXiv:2312.06795",
        options={**_MEAN, **_TRIM, "gamma": 0.01},
        mergekit=_MERGEKIT,
        fidelity="adapted",
        differs="breadcrumbs' trim before the election of TIES, as in mergekit",
        needs=("density", "gamma"),
        cost=_TWO_PASSES,
    ),
    "magnitude_prune": Method(
        Elect("largest"),
        summary="Keep the largest entries of each delta, sum them.",
        source="peft add_weighted_adapter",
        options={**_SUM, **_TRIM},
        needs=("density",),
        cost=_TWO_PASSES,
        test=f"{_TESTS}::test_exactly_the_asked_number_is_kept_and_ties_go_to_the_lowest_index",
    ),
    "sce": Method(
        Elect("variance", elect=True, by_energy=True),
        summary="Keep entries in which models differ most, weigh by energy, elect signs.",
        source="arXiv:2408.07990",
        options={"select_topk": 1.0, "lambda": 1.0},
        grows=False,
        needs=("select_topk",),
        cost="four passes",
    ),
    "ram": Method(
        Piece(pieces.ram), source="arXiv:2601.13572", options={"epsilon": 1e-5}, grows=False
    ),
    "ramplus_tl": Method(
        Piece(pieces.ram_plus, pieces.count_unique),
        source="arXiv:2601.13572",
        options={"epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
        grows=False,
        cost="two passes",
    ),
    "nearswap": Method(
        Piece(pieces.nearswap), source="mergekit", options={"t": REQUIRED}, models=(1, 1)
    ),
    "arcee_fusion": Method(
        Piece(pieces.arcee_fusion, pieces.fusion_threshold, looks=True),
        source="mergekit",
        fidelity="adapted",
        differs="exact quartiles, where mergekit samples tensors of more than a million",
        models=(1, 1),
        cost="seven passes",
    ),
    "consensus": Method(
        Piece(pieces.consensus),
        source="arXiv:2405.07813",
        options={"mask_scale": 0.4, "agree": 2, "lambda": 1.0},
        test=f"{_TESTS}::test_consensus_drops_what_serves_one_model_alone",
        grows=False,
    ),
    "pcb": Method(
        Piece(pieces.pcb, pieces.balance),
        source="arXiv:2410.02396",
        options={"density": 0.1, "lambda": 1.0},
        fidelity="adapted",
        differs="does not clip outliers before weighing",
        needs=("density",),
        cost="four passes",
        test=f"{_TESTS}::test_pcb_weighs_entries_by_how_they_compete",
    ),
    "knots": Method(
        Matrix(spectral.knots),
        source="arXiv:2410.19735",
        options={"density": 1.0, "lambda": 1.0},
        fidelity="adapted",
        differs="what is not a matrix is averaged",
        cost="an SVD of the models side by side",
        test=f"{_TESTS}::test_knots_and_tsv_give_back_what_does_not_overlap",
    ),
    "tsv": Method(
        Matrix(spectral.tsv),
        source="arXiv:2412.00081",
        options={"lambda": 1.0},
        differs="what is not a matrix is averaged",
        cost="an SVD of each model and two of their bases",
        fidelity="adapted",
        test=f"{_TESTS}::test_knots_and_tsv_give_back_what_does_not_overlap",
    ),
    "regmean": Method(
        Matrix(spectral.regmean, statistics=True),
        source="arXiv:2212.09849",
        options={"shrink": 0.9},
        needs=("a Gram matrix of inputs for each model",),
        differs="a Gram matrix is a mean over its set's tokens, so sets weigh alike whatever their "
        "size; what has none is averaged",
        cost="one linear solve a matrix",
        fidelity="adapted",
        test=f"{_TESTS}::test_regmean_fits_each_model_on_its_own_inputs",
    ),
    "eul_fusion": Method(
        Matrix(spectral.regmean, statistics=True),
        summary="Fuse unlearning layers: each stays what it is on its own forget set's inputs.",
        source="arXiv:2310.20150",
        options={"shrink": 1.0},
        needs=("a Gram matrix of inputs for each model",),
        differs="`regmean` without its shrinking; a ridge of 1e-6; a Gram matrix is a mean over "
        "its set's tokens, so sets weigh alike whatever their size; what has none is averaged",
        cost="one linear solve a matrix",
        test="tests/edit/test_arithmetic.py::test_eul_fusion_is_the_least_squares_map",
        fidelity="adapted",
    ),
    "fisher": Method(
        Matrix(spectral.fisher, statistics=True),
        source="arXiv:2111.09832",
        needs=("the Fisher information of each model",),
        fidelity="adapted",
        differs="the texts' own tokens stand for draws from the model (the empirical Fisher "
        "information), and log p is a mean over a text's tokens",
        test="tests/merge/test_statistics.py::test_fisher_information_counts_by_its_ratios_however_small_"
        "and_none_is_equal",
    ),
}
