"""The paper's supplementary experiments differ from the board in what they vary alone."""

from pathlib import Path

import pytest

from expunge.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = sorted(path.stem for path in RECIPES.glob("paper-*.yaml"))


@pytest.mark.parametrize("name", [*PAPER, "trajectories"])
def test_target_and_branches_are_the_boards(name):
    board, recipe = load_recipe(RECIPES / "board.yaml"), load_recipe(RECIPES / f"{name}.yaml")
    assert (recipe.model, recipe.data, recipe.tune) == (board.model, board.data, board.tune)
    assert recipe.evaluate == board.evaluate
    for branch in ("strong", "weak") if name in PAPER else ():
        assert recipe.branches[branch] == board.branches[branch]


def test_the_full_objective_is_the_strong_branch_and_npo_alone_its_first_term():
    strong = load_recipe(RECIPES / "board.yaml").branches["strong"]
    branches = load_recipe(RECIPES / "trajectories.yaml").branches
    assert branches["full_objective"].terms == strong.terms
    assert branches["npo_only"].terms == strong.terms[:1]
    for branch in branches.values():
        assert branch.keep is not None and branch.keep.epochs
        assert (branch.schedule, branch.optimizer) == (strong.schedule, strong.optimizer)


def test_each_ablation_drops_terms_and_changes_none():
    recipe = load_recipe(RECIPES / "paper-branch-ablations.yaml")
    whole = recipe.branches["strong"].terms
    left = {"no_kl": (0, 2), "no_nll": (0, 1), "npo_only": (0,)}
    for name, kept in left.items():
        assert recipe.branches[name].terms == tuple(whole[i] for i in kept)
        assert recipe.merges[f"merged_{name}"].of == (name, "weak")


def test_the_density_sweep_has_the_densities_of_the_paper():
    merges = load_recipe(RECIPES / "paper-density-sweep.yaml").merges
    densities = {m.density for m in merges.values() if m.space == "factors"}
    assert {0.2, 0.6, 0.8, 1.0} <= densities
    assert {m.method for m in merges.values()} == {"ties"}
