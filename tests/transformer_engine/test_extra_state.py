"""FP8 recipes, as Transformer Engine saves them, pass the look that is taken before they are unpickled."""

import re

import pytest

from tests.transformer_engine import models
from tests.transformer_engine.ranks import ranks
from tests.transformer_engine.test_specs import RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_pass(recipe):
    saved, refused = ranks(True, 1).run(models.look_at_recipe, recipe)[0]
    assert RECIPES[recipe].encode() in saved
    assert refused == ""


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_made_again_as_they_were(recipe):
    saved, found = ranks(True, 1).run(models.recipe_again, recipe)[0]
    assert saved == found and "fp8_format" in found


def test_other_names_of_the_same_modules_are_refused():
    refused = ranks(True, 1).run(models.look_at_names_beside_recipes)[0]
    assert len(refused) == 2
    # A method of a class is a dotted name, or, where it is a classmethod, a call of getattr.
    assert all(re.search("cannot be read: it (names|calls) ", error) for error in refused)
