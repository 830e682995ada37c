"""Scores of captions, answers and retrieval, equal to the official tools' and without their Java."""

from .ptb_tokenizer import tokenize_caption
from .scores import (
    accuracy,
    argmax_logits,
    caption_compute_metrics,
    caption_metrics,
    caption_scores,
    classification_compute_metrics,
    exact_match,
    f1,
    normalize_answer,
    normalize_vqa_answer,
    perplexity,
    recall_at_k,
    retrieval_compute_metrics,
    token_f1,
    vqa_accuracy,
    vqa_compute_metrics,
    vqa_scores,
)


__all__ = [
    "accuracy",
    "argmax_logits",
    "caption_compute_metrics",
    "caption_metrics",
    "caption_scores",
    "classification_compute_metrics",
    "exact_match",
    "f1",
    "normalize_answer",
    "normalize_vqa_answer",
    "perplexity",
    "recall_at_k",
    "retrieval_compute_metrics",
    "token_f1",
    "tokenize_caption",
    "vqa_accuracy",
    "vqa_compute_metrics",
    "vqa_scores",
]
