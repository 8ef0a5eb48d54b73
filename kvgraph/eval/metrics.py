"""Metrics: scores of one answer, the part of it that is scored, and scores of whole sets. See docs/reference/evaluation.md.

A metric is a function (answer, references) -> number in [0, 1], `references` being every acceptable answer. Where the papers' code
gives a point for nothing, it isn't given here: a reference without any letter or digit (after normalising, for metrics that
normalise) never matches, although an empty text is a part of every text.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import regex

Metric = Callable[[str, Sequence[str]], float]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no words a, an, the, single spaces.

    `regex` and not `re`, as in the papers' code: for it a letter with a combining accent is one word.
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(regex.sub(r"\b(a|an|the)\b", " ", text).split())


def substring_em(answer: str, references: Sequence[str]) -> float:
    """1 if any normalised reference is a part of the normalised answer: "best_subspan_em" of Lost in the Middle
    (arXiv 2307.03172), used unchanged by Block-Attention, KVLink and Graph-KV. Word borders don't matter."""
    text = normalise(answer)
    return float(any(reference in text for reference in _normalised(references)))


def em(answer: str, references: Sequence[str]) -> float:
    """1 if the normalised answer equals any normalised reference: SQuAD's exact match (arXiv 1606.05250)."""
    return float(normalise(answer) in _normalised(references))


def f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over normalised words, counted with repetition; the best reference counts.

    SQuAD's F1 (arXiv 1606.05250, section 6.1).
    """
    words = normalise(answer).split()
    return max((_word_f1(words, reference.split()) for reference in _normalised(references)), default=0.0)


def hotpot_f1(answer: str, references: Sequence[str]) -> float:
    """`f1`, but 0 when either is just yes, no or noanswer and the other isn't the same.

    The official F1 of HotpotQA (arXiv 1809.09600), 2WikiMultiHopQA and MoreHopQA: "yes, they are" is no "yes".
    """
    text = normalise(answer)
    closed = {"yes", "no", "noanswer"}
    allowed = [
        reference for reference in _normalised(references) if reference == text or not closed & {reference, text}
    ]
    return max((_word_f1(text.split(), reference.split()) for reference in allowed), default=0.0)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, without regard to case, outer punctuation and spaces.

    For labels and choices; nothing is removed inside, so the choice "A" isn't taken for an article.
    """
    label = _label(answer)
    return float(bool(label) and label in map(_label, references))


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """The share of references that stand in the answer, without regard to case: RULER's string_match_all (arXiv 2404.06654)."""
    text = answer.lower()
    found = [bool(reference.strip()) and reference.lower() in text for reference in references]
    return sum(found) / len(found) if found else 0.0


def word_overlap(answer: str, references: Sequence[str]) -> float:
    """1 if the answer shares a word with any reference, in lower case, split at spaces, punctuation kept.

    What MultiHop-RAG's qa_evaluate.py counts as right (arXiv 2401.15391). It is lenient ("The Verge" and "the dog" share
    a word) and strict ("Yes." and "Yes" don't): kept, because published numbers are made with it.
    """
    words = set(answer.lower().split())
    return float(any(words & set(reference.lower().split()) for reference in references))


def rouge(kind: str) -> Metric:
    """F-measure of rouge1, rouge2 or rougeL with Porter stemming, by the rouge-score package; the best reference counts."""

    def score(answer: str, references: Sequence[str]) -> float:
        scorer = _rouge_scorer(kind)
        return max((float(scorer.score(reference, answer)[kind].fmeasure) for reference in references), default=0.0)

    return score


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "substring_em": substring_em,
        "em": em,
        "f1": f1,
        "hotpot_f1": hotpot_f1,
        "accuracy": accuracy,
        "string_match_all": string_match_all,
        "word_overlap": word_overlap,
        "rouge1": rouge("rouge1"),
        "rouge2": rouge("rouge2"),
        "rougeL": rouge("rougeL"),
    }
)
"""Metrics by name."""


def first_line(prediction: str) -> str:
    """What stands before the first line end: Lost in the Middle's evaluation, so that copying the documents earns nothing."""
    return prediction.split("\n", 1)[0].strip()


def answer_line(prediction: str) -> str:
    """What follows the last "Answer:" on its line, whatever its case; without one, all. As Graph-KV scores MoreHopQA."""
    found = re.findall(r"answer:\s*(.*)", prediction, re.IGNORECASE)
    return found[-1] if found else prediction


def answer_quote(prediction: str) -> str:
    """What stands in quotes after 'The answer to the question is'; without it, all. As MultiHop-RAG's qa_evaluate.py."""
    found = re.search(r'The answer to the question is "(.*?)"', prediction)
    return found[1] if found else prediction


def answer_tag(prediction: str) -> str:
    """What stands between the last <answer> and the last </answer>; without them, all. As MoreHopQA's own evaluation."""
    found = re.match(r".*<answer>(.*)</answer>", prediction, re.IGNORECASE | re.DOTALL)
    return found[1].strip() if found else prediction


def choice(prediction: str) -> str:
    """The letter of "The correct answer is (B)" or "The correct answer is B"; without it, nothing. As LongBench-v2."""
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return found[1] if found else ""


EXTRACT: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "": str,
        "first_line": first_line,
        "answer_line": answer_line,
        "answer_quote": answer_quote,
        "answer_tag": answer_tag,
        "choice": choice,
    }
)
"""What of a prediction is scored, by name; "" is all of it."""


class MultiHopRAG(NamedTuple):
    """MultiHop-RAG's numbers of a set of answers. accuracy_2025: as its repository computed it from April 2025 on."""

    precision: float
    recall: float
    f1: float
    accuracy: float
    accuracy_2025: float


def multihop_rag(hits: Iterable[float]) -> MultiHopRAG:
    """Precision, recall, F1 and accuracy as MultiHop-RAG's qa_evaluate.py computes them, of the items' `word_overlap`.

    Every answer that isn't right is counted as a false positive and as a false negative, so that precision, recall and
    F1 all equal the share of right answers. The newest version sets accuracy to the same. Before, every wrong answer was
    counted as a true negative as well, which gives n / (3n - 2 · right), a third when all are wrong; `accuracy_2025` is
    that number, for comparison with results made with it (Graph-KV's evaluation calls that version).
    """
    scores = list(hits)
    n, right = len(scores), sum(scores)
    if not n:
        return MultiHopRAG(0.0, 0.0, 0.0, 0.0, 0.0)
    share = right / n
    return MultiHopRAG(share, share, share, share, n / (3 * n - 2 * right))


SETS: Mapping[str, tuple[str, Callable[[Iterable[float]], MultiHopRAG]]] = MappingProxyType(
    {"word_overlap": ("multihop_rag", multihop_rag)}
)
"""Scores of whole sets: a metric's name -> (name, function of the items' scores). Computed for tasks with that metric."""


def _normalised(references: Sequence[str]) -> list[str]:
    """The references that hold anything once they are normalised."""
    return [text for reference in references if (text := normalise(reference))]


def _word_f1(words: Sequence[str], reference: Sequence[str]) -> float:
    same = (Counter(words) & Counter(reference)).total()
    return 2 * same / (len(words) + len(reference)) if same else 0.0


def _label(text: str) -> str:
    return text.strip(string.punctuation + string.whitespace).casefold()


@cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)
