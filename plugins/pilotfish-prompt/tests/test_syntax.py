"""Brackets and signs: what parts a prompt has, and what they weigh."""

import pytest
from compel import Compel
from pilotfish_prompt.syntax import automatic1111, compel

from pilotfish import InputError


def near(parts):
    return [(" ".join(text.split()), pytest.approx(weight)) for text, weight in parts]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a red cat", [("a red cat", 1)]),
        ("a (red) cat", [("a", 1), ("red", 1.1), ("cat", 1)]),
        ("a [red] cat", [("a", 1), ("red", 1 / 1.1), ("cat", 1)]),
        ("a (red:1.3) cat", [("a", 1), ("red", 1.3), ("cat", 1)]),
        ("(red : .5 )", [("red", 0.5)]),
        ("(red:-1)", [("red", -1)]),
        ("((red))", [("red", 1.21)]),
        ("[[red]]", [("red", 1 / 1.21)]),
        ("((a:1.2) red) cat", [("a", 1.32), ("red", 1.1), ("cat", 1)]),
        ("([red cat])", [("red cat", 1)]),
        (r"a \(red\) \[cat\]", [("a (red) [cat]", 1)]),
        (r"(16\:9:2)", [("16:9", 2)]),
        ("photo: a cat | a dog", [("photo: a cat | a dog", 1)]),
        ("a (<ink(1)[2]:3>:1.5)", [("a", 1), ("<ink(1)[2]:3>", 1.5)]),
        ("1 < 2 (3)", [("1 < 2", 1), ("3", 1.1)]),
        ("() cat", [("cat", 1)]),
        ("", []),
    ],
)
def test_automatic1111_is_read_as_its_users_write_it(prompt, parts):
    assert near(automatic1111(prompt)) == near(parts)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red cat",
        "a red+ cat",
        "a red++ cat---",
        "(a red)+ cat",
        "(a red)1.3 cat",
        "(a red)0.5 cat",
        "(a red)2 cat",
        "(a (red)+ cat)1.2",
        "(a red) cat",
        "red+ cat+",
        "red- cat-, black+",
        "a red+, black- cat.",
        "well-known cat",
        "a well-known+ cat",
        'a "red cat"++ on white',
        "a cat - red - on white",
        r"a \(red\) cat+",
    ],
)
def test_compel_is_read_as_compel_reads_it(prompt):
    (theirs,) = Compel.parse_prompt_string(prompt).prompts
    expected = [(f.text.replace(" ,", ",").replace(" .", "."), f.weight) for f in theirs.children]
    assert near(compel(prompt)) == near(expected)


def test_a_word_of_the_runs_vocabulary_is_whole_whatever_signs_are_in_it():
    assert near(compel("a <ink-->++ cat")) == near([("a", 1), ("<ink-->", 1.21), ("cat", 1)])


@pytest.mark.parametrize(
    ("read", "prompt", "message"),
    [
        (automatic1111, "a (red cat", r"( has no partner, at character 3, in 'a (red cat'"),
        (automatic1111, "a red) cat", r") has no partner, at character 6,"),
        (automatic1111, "a red:2) cat", r") has no partner, at character 8,"),
        (automatic1111, "a (red] cat", r"] has no partner, at character 7,"),
        (automatic1111, "a [red", r"one that is text is written \["),
        (automatic1111, "a (red:very) cat", r"'very' is none, at character 7,"),
        (automatic1111, "a (red:) cat", r"the bracket's end: '' is none"),
        (automatic1111, "a (red: cat (b))", r"lead to a number and the bracket's end, at"),
        (automatic1111, "a [red:blue:0.5]", r": in [ ] changes words during the run"),
        (automatic1111, "a [red|blue]", r"| in [ ] changes words during the run"),
        (compel, "a (red cat", r"( has no partner, at character 3,"),
        (compel, "a red)1.2 cat", r") has no partner, at character 6,"),
        (compel, 'a "red', r'" has no partner, at character 3,'),
        (compel, '("a", "b").blend(1, 1)', r".blend(...) is an operator of compel"),
        (compel, "a (cat).swap(dog)", r".swap(...) is an operator of compel"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(read, prompt, message):
    with pytest.raises(InputError) as error:
        read(prompt)
    assert message in str(error.value)
