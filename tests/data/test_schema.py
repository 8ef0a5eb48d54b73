"""The field types that several data sets share."""

import pytest

from kvgraph.data.schema import references


def test_references_of_nested_answers():
    assert references([["a", "b"], "c", ["a"]]) == ("a", "b", "c")
    assert references("x") == ("x",)
    assert references([None, "", [" "], 3, 2.5]) == ("3", "2.5")


@pytest.mark.parametrize("nothing", [[], None, "", [[" "]]])
def test_no_answer_is_an_error(nothing):
    with pytest.raises(ValueError, match="there is no answer"):
        references(nothing)


@pytest.mark.parametrize("wrong", [{"a": 1}, [True], b"x"])
def test_other_types_are_an_error(wrong):
    with pytest.raises(ValueError, match="answers are texts, numbers or lists"):
        references(wrong)
