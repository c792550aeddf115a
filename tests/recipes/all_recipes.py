"""fairseq's recipes, and what becomes of each under δ-SAM: README's support table is tested against this list."""

from __future__ import annotations

from tests.recipes.language import LANGUAGE, SENTENCES
from tests.recipes.recipe import TRAINS, Recipe
from tests.recipes.speech import SPEECH
from tests.recipes.translation import TRANSLATION

__all__ = ["ALL", "RECIPES", "TRAINS", "Recipe"]

ALL = [*TRANSLATION, *LANGUAGE, *SENTENCES, *SPEECH]
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in ALL}
