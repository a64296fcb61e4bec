"""Any change of a recipe's text parses, or raises a RecipeError that says where."""

import random

from helpers.recipes import FULL
from rarefy.common.errors import RecipeError
from rarefy.recipe import parser as recipes

SPICE = "\t\x00 \n:-[]{},#&*!|>'\"%@`~?=.0189eExXyYnN_<aé\u2028\U0001f600"
WORDS = ["2:4", "null", "true", "1e999", ".nan", "-.inf", "9" * 30, "!!int", "!!python/name:os.system ", "&a ", "*a", "<<: ", "2024-99-99",
         "1:60:60", "0x", "0b2", "---\n", "...\n", "'", '"', "  ", "\n- ", "!!set ", "!!omap ", "!!binary ", "!!timestamp ", "{}", "[]", "~"]  # fmt: skip


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 2)):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        match rng.randrange(6):
            case 0:
                text = text[:i] + rng.choice(SPICE) + text[i + 1 :]
            case 1:
                text = text[:i] + rng.choice(WORDS) + text[i:]
            case 2:
                text = text[:i] + text[min(j, i + 12) :]
            case 3:
                text = text[:i] + text[i : i + 20] + text[i:]
            case 4:
                lines = text.split("\n")
                a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
                lines[a], lines[b] = lines[b], lines[a]
                text = "\n".join(lines)
            case 5:  # another value for a key
                at = text.find(": ", i) + 2
                text = (
                    text[:at]
                    + rng.choice(WORDS)
                    + text[min((k for k in (text.find(c, at) for c in ",}\n") if k >= 0), default=at) :]
                )
    return text


def test_mutations_parse_or_raise_recipe_errors_and_nothing_else():
    rng, parsed, wrong = random.Random(7), 0, []
    for _ in range(300):
        text = mutated(FULL, rng)
        try:
            r = recipes.from_yaml(text)
        except RecipeError as error:
            assert "recipe" in str(error) or "line" in str(error)  # says where
        except Exception as error:  # the test is about these
            wrong.append((type(error).__name__, str(error)[:80], text))
        else:
            parsed += 1
            assert recipes.from_dict(r.to_dict()) == r or "nan" in text
    assert not wrong, (len(wrong), wrong[0])
    assert parsed > 10  # else the mutations are too wild to test anything beyond the parser
