"""Evaluation: every score beside that of the same model without its images; figures of a training; recall."""

from .evaluator import KINDS, Evaluation, EvaluationCallback, evaluate, over_seeds, random_connectors, table_over_seeds
from .retrieval import evaluate_retrieval, zero_shot_classify


__all__ = [
    "KINDS",
    "Evaluation",
    "EvaluationCallback",
    "evaluate",
    "evaluate_retrieval",
    "over_seeds",
    "random_connectors",
    "table_over_seeds",
    "zero_shot_classify",
]
