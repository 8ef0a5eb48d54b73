"""Metrics against the papers' definitions, worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvgraph.eval.metrics import EXTRACT, METRICS, SETS, MultiHopRAG, multihop_rag, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Beatles!", "beatles"),
        ("A  man,\ta\nplan", "man plan"),
        ("an-other", "another"),  # punctuation goes first, so no article is left
        ("theatre and anthem", "theatre and anthem"),  # articles are whole words
        ("U.S.A.", "usa"),
        ("Ｗｏｗ！", "ｗｏｗ！"),  # full-width: lower case, but its punctuation isn't ASCII's
        ("a\u0301 b", "a\u0301 b"),  # a letter with a combining accent is one word, no article
        ("«le chat»", "«le chat»"),
        ("", ""),
        ("the", ""),
        ("...", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("metric", "answer", "references", "expected"),
    [
        ("substring_em", "It was Wilhelm Conrad Röntgen, in 1901.", ["Wilhelm Conrad Röntgen"], 1),
        ("substring_em", "the Beatles", ["The Beatles!"], 1),
        ("substring_em", "Beatles", ["The Beatles"], 1),
        ("substring_em", "man of the year", ["man of a year"], 1),  # both lose their article
        ("substring_em", "nothing", ["no"], 1),  # word borders don't matter in the papers' code
        ("substring_em", "1901", ["1902", "1901"], 1),  # any gold
        ("substring_em", "1901", ["1902", "1903"], 0),
        ("substring_em", "New York", ["New York City"], 0),  # the gold must be in the answer, not the other way round
        ("substring_em", "", ["x"], 0),
        ("substring_em", "anything", ["the"], 0),  # a gold that normalises to nothing is in every text: it never counts
        ("substring_em", "", [""], 0),
        ("substring_em", "x", [], 0),
        ("substring_em", "ＡＢＣ", ["abc"], 0),  # full-width letters are other letters
        ("substring_em", "cafe\u0301", ["caf\u00e9"], 0),  # no Unicode normalisation, as in the papers' code
        ("em", "The Beatles.", ["beatles"], 1),
        ("em", "The Beatles of Liverpool", ["beatles"], 0),
        ("em", "", [""], 0),
        ("em", "the", ["a"], 0),
        ("em", "b", ["a", "b"], 1),
        ("f1", "the cat sat", ["cat sat down"], 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
        ("f1", "cat cat", ["cat"], 2 * 0.5 * 1 / 1.5),  # counted with repetition
        ("f1", "cat", ["dog", "a cat", "cat and dog"], 1),  # the best gold
        ("f1", "", ["cat"], 0),
        ("f1", "the", ["a"], 0),
        ("f1", "yes they are", ["yes"], 0.5),
        ("hotpot_f1", "yes they are", ["yes"], 0),
        ("hotpot_f1", "yes", ["yes they are"], 0),
        ("hotpot_f1", "Yes.", ["yes"], 1),
        ("hotpot_f1", "the cat sat", ["cat sat down"], 0.8),
        ("accuracy", "A", ["A"], 1),  # no article here
        ("accuracy", " (b). ", ["B"], 1),
        ("accuracy", "Student", ["student", "staff"], 1),
        ("accuracy", "AB", ["A"], 0),
        ("accuracy", "", [""], 0),
        ("accuracy", "...", ["?"], 0),
        ("string_match_all", "The numbers are 12 and 34", ["12", "34"], 1),
        ("string_match_all", "ABC", ["abc", "xyz"], 0.5),
        ("string_match_all", "ABC", ["abc", ""], 0.5),
        ("string_match_all", "x", [], 0),
        ("word_overlap", "The Verge", ["the dog"], 1),  # lenient, as published
        ("word_overlap", "Yes.", ["Yes"], 0),  # strict, as published
        ("word_overlap", "Sam Bankman-Fried did", ["Sam Bankman-Fried"], 1),
        ("word_overlap", "", ["x"], 0),
        ("rouge1", "the cat sat", ["the cat sat"], 1),
        ("rouge1", "cats sat", ["the cat sat"], 0.8),  # stemmed; precision 1, recall 2/3
        ("rouge2", "the cat", ["the cat sat"], 2 * 1 * 0.5 / 1.5),
        ("rougeL", "sat cat", ["cat sat"], 0.5),  # the longest common subsequence is one word of two
        ("rougeL", "b", ["a", "b"], 1),  # the best gold
        ("rougeL", "", ["a"], 0),
        ("rougeL", "x", [], 0),
    ],
)
def test_scores(metric, answer, references, expected):
    assert METRICS[metric](answer, references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", sorted(METRICS))
@given(answer=st.text(max_size=30), references=st.lists(st.text(max_size=20), max_size=3))
def test_every_score_lies_in_0_to_1(metric, answer, references):
    assert 0 <= METRICS[metric](answer, references) <= 1


@pytest.mark.parametrize("metric", sorted(METRICS))
@given(references=st.lists(st.sampled_from(["", " ", "\n"]), max_size=3), answer=st.sampled_from(["", " ", "x"]))
def test_an_empty_gold_is_never_a_hit(metric, references, answer):
    assert METRICS[metric](answer, references) == 0


@pytest.mark.parametrize(
    ("name", "prediction", "expected"),
    [
        ("", " all of it\n", " all of it\n"),
        ("first_line", "Paris.\nThe documents say", "Paris."),
        ("first_line", "\nParis", ""),
        ("first_line", " a\rb ", "a\rb"),
        ("answer_line", "Step 1. Answer: 3\nSo the ANSWER:  4 apples\nmore", "4 apples"),
        ("answer_line", "Answer:\n  5", "5"),  # the white space may hold a line end
        ("answer_line", "no such line", "no such line"),
        ("answer_line", "Answer:", ""),
        ("answer_quote", 'The answer to the question is "Google", not "Yahoo".', "Google"),
        ("answer_quote", "The answer is: Google", "The answer is: Google"),
        ("answer_tag", "<answer>1</answer> or <ANSWER> 2\n</ANSWER> end", "2"),
        ("answer_tag", "<answer>1", "<answer>1"),
        ("choice", "**The correct answer is (B)**", "B"),
        ("choice", "The correct answer is C.", "C"),
        ("choice", "The correct answer is D. No: The correct answer is (A)", "A"),  # with brackets comes first
        ("choice", "B", ""),
        ("choice", "The correct answer is (E)", ""),
        ("choice", "", ""),
    ],
)
def test_extraction(name, prediction, expected):
    assert EXTRACT[name](prediction) == expected


@pytest.mark.parametrize("hits", [[1, 0, 0, 1], [1, 1], [0, 0, 0], [0]])
def test_multihop_rag_counts_as_its_evaluation_does(hits):
    """The counts of qa_evaluate.py: a miss is a false positive and a false negative, and in 2025 a true negative too."""
    tp, n = sum(hits), len(hits)
    fp = fn = tn = n - tp
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    f1 = 2 * precision * recall / (precision + recall) if tp else 0
    expected = MultiHopRAG(precision, recall, f1, tp / n, (tp + tn) / (tp + tn + fp + fn))
    assert multihop_rag(hits) == pytest.approx(expected)


def test_scores_of_no_set_at_all():
    assert set(multihop_rag([])) == {0.0}
    assert set(SETS) <= set(METRICS)
