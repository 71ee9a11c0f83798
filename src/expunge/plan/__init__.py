"""Plans: time and memory of a recipe's stages foretold, settings that fit, and budgets kept."""
