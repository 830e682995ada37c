"""Scores of captions, answers and retrieval, equal to the official tools' and without their Java.

Plain functions first; then the same as `compute_metrics` functions for `Trainer`. Fractions are in [0, 1]: a paper's
BLEU-4 of 33.5 is 0.335 here, its CIDEr of 113 is 1.13. The scorers of captions are pycocoevalcap's own (`pip install
frozen-prefix[metrics]`), fed by a Python tokenizer that gives the tokens of coco-caption. Nothing heavy is imported
before it is used.
"""

from __future__ import annotations

import collections
import functools
import importlib
import math
import re
import string
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .ptb_tokenizer import tokenize_caption


if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import EvalPrediction


IGNORE_INDEX = -100


def _check_pairs(predictions: Collection[Any], references: Collection[Any]) -> None:
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: give one entry of each to each image"
            " [errors.md#evaluation]"
        )
    if len(predictions) == 0:
        raise ValueError("there are no predictions to score [errors.md#evaluation]")


def _check_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    _check_pairs(predictions, references)
    for index, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise TypeError(
                f"prediction {index} is a {type(prediction).__name__}: give one string to each image [errors.md#evaluation]"
            )
        if isinstance(texts, str):
            raise TypeError(
                f"references {index} are one string: give a list of strings, [{texts!r}] if there is but one"
                " [errors.md#evaluation]"
            )
        if len(texts) == 0:
            raise ValueError(
                f"prediction {index} has no references: leave it out or give it at least one [errors.md#evaluation]"
            )


def _mean(values: Iterable[float]) -> float:
    values = [float(value) for value in values]
    return math.fsum(values) / len(values)


# --- Captions --------------------------------------------------------------------------------------------------------


def caption_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """
    Corpus scores of captions as coco-caption computes them (Chen et al. 2015, arXiv 1504.00325): lower-cased Penn
    Treebank tokens without punctuation; BLEU with the closest reference length (Papineni et al. 2002), ROUGE-L with
    beta 1.2 (Lin 2004), CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726), whose word weights come from the references
    passed here: scores of different sets, or of parts of one, can't be compared. For a single image all its weights
    are zero, and so is CIDEr.

    Args:
        predictions (`list[str]`): one caption to each image.
        references (`list[list[str]]`): one or more captions of people to each image.

    Returns:
        `bleu_1` … `bleu_4`, `rouge_l` in [0, 1], `cider` in [0, 10].

    Raises:
        ValueError: for unequal lengths, no predictions or an image without references.
        ImportError: without pycocoevalcap.
    """
    scores = _coco_scores(*_tokenized(predictions, references))[0]
    if len(predictions) == 1:
        warnings.warn("CIDEr of one image is always 0: its weights are counted over images", stacklevel=2)
    return scores


def caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """
    The scores of [`caption_metrics`] for each caption by itself, in order, for intervals and for looking at single
    images. `rouge_l` and `cider` average to the corpus's scores; `bleu_n` do not, since BLEU counts over the whole
    corpus.
    """
    return _coco_scores(*_tokenized(predictions, references))[1]


def _tokenized(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    _check_texts(predictions, references)
    ours = {index: [tokenize_caption(text)] for index, text in enumerate(predictions)}
    theirs = {index: [tokenize_caption(text) for text in texts] for index, texts in enumerate(references)}
    return ours, theirs


def _coco_scores(
    predictions: dict[int, list[str]], references: dict[int, list[str]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    bleu, bleus = _scorer("bleu.bleu", "Bleu")(4).compute_score(references, predictions, verbose=0)
    rouge, rouges = _scorer("rouge.rouge", "Rouge")().compute_score(references, predictions)
    if any(text for texts in references.values() for text in texts):
        cider, ciders = _scorer("cider.cider", "Cider")().compute_score(references, predictions)
    else:  # the scorer fails on a corpus without a single word
        cider, ciders = 0.0, [0.0] * len(predictions)
    corpus = {f"bleu_{n}": float(score) for n, score in enumerate(bleu, start=1)}
    single = {f"bleu_{n}": [float(score) for score in scores] for n, scores in enumerate(bleus, start=1)}
    corpus.update(rouge_l=float(rouge), cider=float(cider))
    single.update(rouge_l=[float(score) for score in rouges], cider=[float(score) for score in ciders])
    return corpus, single


def _scorer(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)
    except ImportError as error:
        raise ImportError("caption scores need pycocoevalcap: pip install frozen-prefix[metrics] [errors.md#extra]") from error


# --- Answers ---------------------------------------------------------------------------------------------------------

_VQA_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
# The official table maps each of these from the spelling that lacks one of its apostrophes.
_VQA_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd"
    " he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've"
    " needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've"
    " somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll"
    " that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've"
    " weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll"
    " why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


@functools.cache
def _vqa_contractions() -> dict[str, str]:
    table = {"somebody'd": "somebodyd"}  # so in the official table
    for written in _VQA_CONTRACTIONS.split():
        for place, character in enumerate(written):
            if character == "'":
                table[written[:place] + written[place + 1 :]] = written
    return table


def normalize_vqa_answer(answer: str) -> str:
    """
    An answer as the official VQA evaluation compares it (visualqa.org/evaluation): signs dropped or made spaces, full
    stops dropped outside numbers, lower case, number words as digits, articles dropped, contractions with their
    apostrophes.
    """
    joined = re.search(r"\d,\d", answer) is not None
    text = answer
    for sign in _VQA_SIGNS:
        text = text.replace(sign, "" if joined or f"{sign} " in answer or f" {sign}" in answer else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # the official tool stops at 32 of them
    words = [_VQA_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_vqa_contractions().get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """The accuracy of [`vqa_accuracy`] for each question by itself, in order."""
    _check_texts(predictions, answers)
    return [_vqa_score(prediction, people) for prediction, people in zip(predictions, answers, strict=True)]


def _vqa_score(prediction: str, answers: Sequence[str]) -> float:
    prediction, *people = (re.sub(r"[\n\t]", " ", text).strip() for text in (prediction, *answers))
    if len(set(people)) > 1:  # the official tool normalises only where people disagree
        prediction, *people = map(normalize_vqa_answer, (prediction, *people))
    agreeing = [answer == prediction for answer in people]
    return _mean(min(1.0, (sum(agreeing) - agrees) / 3) for agrees in agreeing)


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """
    VQA accuracy (Antol et al. 2015, arXiv 1505.00468), in [0, 1]. An answer's accuracy is min(1, agreeing people /
    3), averaged over all ways to leave one of the (usually ten) people out. With fewer than four answers it can't
    reach 1.

    Args:
        predictions (`list[str]`): one answer to each question.
        answers (`list[list[str]]`): the people's answers to each question.
    """
    return _mean(vqa_scores(predictions, answers))


def normalize_answer(text: str) -> str:
    """As SQuAD v1.1's official script: lower case, no ASCII punctuation, no articles (a, an, the), single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Fraction of predictions that equal a reference after [`normalize_answer`] (SQuAD, arXiv 1606.05250)."""
    _check_texts(predictions, references)
    return _mean(
        normalize_answer(prediction) in map(normalize_answer, texts)
        for prediction, texts in zip(predictions, references, strict=True)
    )


def token_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """
    Mean F1 between the bags of words of a prediction and of its best reference, after [`normalize_answer`] (SQuAD).
    Two texts without a word agree (as in SQuAD v2's script).
    """
    _check_texts(predictions, references)
    return _mean(
        max(_bag_f1(normalize_answer(prediction).split(), normalize_answer(text).split()) for text in texts)
        for prediction, texts in zip(predictions, references, strict=True)
    )


def _bag_f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    common = (collections.Counter(prediction) & collections.Counter(reference)).total()
    return 2 * common / (len(prediction) + len(reference))


# --- Classes, retrieval, language modelling --------------------------------------------------------------------------


def accuracy(predictions: Collection[Any], references: Collection[Any]) -> float:
    """Fraction of predictions equal to their references, as they are."""
    _check_pairs(predictions, references)
    return _mean(bool(one == other) for one, other in zip(predictions, references, strict=True))


def recall_at_k(
    similarity: np.ndarray | torch.Tensor | Sequence[Sequence[float]],
    text_to_image: Collection[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """
    Recall of retrieval both ways. An image is found at k if any of its captions is among the k texts nearest to it
    (Karpathy and Fei-Fei 2015, arXiv 1412.2306), a text if its image is among the k nearest images. Ties count
    against the model, so that equal scores for everything find nothing.

    Args:
        similarity (`(images, texts)`): larger is nearer.
        text_to_image (`list[int]`, *optional*): the row of each text's image; by default text n belongs to image n.
        ks (`list[int]`): the cut-offs.

    Returns: `image_to_text_recall_at_{k}` and `text_to_image_recall_at_{k}` in [0, 1] for each k.
    """
    import numpy as np

    similarity = _to_numpy(similarity).astype(np.float64)
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(
            f"similarity has shape {similarity.shape}: it must be (images, texts), each at least 1 [errors.md#range]"
        )
    images, texts = similarity.shape
    if not np.isfinite(similarity).all():
        raise ValueError("similarity holds values that are not finite: there is no order among them [errors.md#search]")
    if text_to_image is None and images != texts:
        raise ValueError(
            f"similarity has {images} images and {texts} texts: say by text_to_image which belong together [errors.md#search]"
        )
    owner = np.arange(texts) if text_to_image is None else _to_numpy(text_to_image)
    if owner.shape != (texts,):
        raise ValueError(f"text_to_image has {len(owner)} entries for {texts} texts [errors.md#search]")
    if owner.min() < 0 or owner.max() >= images:
        raise ValueError(
            f"text_to_image names images {owner.min()} to {owner.max()}: there are images 0 to {images - 1} [errors.md#search]"
        )
    missing = sorted(set(range(images)) - set(owner.tolist()))
    if missing:
        raise ValueError(
            f"images {missing[:5]} have no text ({len(missing)} in all): leave their rows out [errors.md#evaluation]"
        )
    if any(k < 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}: each must be at least 1 [errors.md#range]")

    own = owner[None, :] == np.arange(images)[:, None]
    best_own = np.where(own, similarity, -np.inf).max(axis=1, keepdims=True)
    image_ranks = (~own & (similarity >= best_own)).sum(axis=1)
    right = similarity[owner, np.arange(texts)]
    text_ranks = (~own & (similarity >= right)).sum(axis=0)
    scores = {f"image_to_text_recall_at_{k}": float((image_ranks < k).mean()) for k in ks}
    return scores | {f"text_to_image_recall_at_{k}": float((text_ranks < k).mean()) for k in ks}


def perplexity(loss: float | Sequence[float], num_tokens: Sequence[int] | None = None) -> float:
    """
    exp of a mean cross-entropy in nats. Several losses (of batches) are averaged with their numbers of predicted
    tokens as weights, without which the mean would not be one over tokens. Infinite where exp overflows.
    """
    losses = _to_numpy(loss).astype(float)
    if num_tokens is None:
        if losses.ndim:
            raise ValueError("several losses need num_tokens, the number of predicted tokens of each [errors.md#evaluation]")
        mean = float(losses)
    else:
        _check_pairs(losses, num_tokens)
        if sum(num_tokens) <= 0:
            raise ValueError(f"num_tokens sums to {sum(num_tokens)}: there must be at least one token [errors.md#range]")
        mean = math.fsum(losses * _to_numpy(num_tokens)) / float(sum(num_tokens))
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def _to_numpy(values: Any) -> np.ndarray:
    import numpy as np

    if hasattr(values, "detach"):
        values = values.detach().float().cpu() if values.is_floating_point() else values.cpu()
    return np.asarray(values)


def f1(predictions: Collection[Any], references: Collection[Any]) -> float:
    """
    Macro-averaged F1: the plain mean over all classes that were predicted or should have been, so that rare classes count
    as much as frequent ones (as scikit-learn's `f1_score(average="macro")`).
    """
    _check_pairs(predictions, references)
    pairs = collections.Counter(zip(_plain(predictions), _plain(references), strict=True))
    predicted: collections.Counter[Any] = collections.Counter()
    actual: collections.Counter[Any] = collections.Counter()
    for (one, other), count in pairs.items():
        predicted[one] += count
        actual[other] += count
    return _mean(2 * pairs[name, name] / (predicted[name] + actual[name]) for name in predicted.keys() | actual.keys())


def _plain(values: Collection[Any]) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


# --- For Trainer -----------------------------------------------------------------------------------------------------


def argmax_logits(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor | None = None) -> torch.Tensor:
    """For `Trainer(preprocess_logits_for_metrics=…)`: the best token of each place instead of the whole vocabulary."""
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    return logits.argmax(dim=-1)


def _texts(processor: Any, rows: np.ndarray) -> list[str]:
    tokenizer = getattr(processor, "tokenizer", processor)
    kept = [[int(token) for token in row if token >= 0] for row in rows]
    return [text.strip() for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]


def _predicted_and_labels(
    prediction: EvalPrediction, *, generated: bool, is_encoder_decoder: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, -100 where there is nothing. Place n of a causal model predicts the label of place n + 1."""
    import numpy as np

    predicted, labels = prediction.predictions, _to_numpy(prediction.label_ids)
    predicted = _to_numpy(predicted[0] if isinstance(predicted, (tuple, list)) else predicted)
    if generated:
        return predicted, labels
    if predicted.ndim != 2:
        raise ValueError(
            f"predictions have shape {predicted.shape}, not (samples, places): give Trainer"
            " preprocess_logits_for_metrics=argmax_logits, or say generated=True for the ids of generate()"
            " [errors.md#evaluation]"
        )
    if predicted.shape != labels.shape:
        raise ValueError(
            f"predictions have shape {predicted.shape} and labels {labels.shape}: they must agree [errors.md#evaluation]"
        )
    if not is_encoder_decoder:
        predicted, labels = predicted[:, :-1], labels[:, 1:]
    return np.where(labels == IGNORE_INDEX, IGNORE_INDEX, predicted), labels


def _text_compute_metrics(
    scores: Callable[[list[str], Sequence[Sequence[str]]], Mapping[str, float]],
    processor: Any,
    references: Sequence[Sequence[str]] | None,
    generated: bool,
    is_encoder_decoder: bool,
) -> Callable[[EvalPrediction], dict[str, float]]:
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted, labels = _predicted_and_labels(prediction, generated=generated, is_encoder_decoder=is_encoder_decoder)
        texts = _texts(processor, predicted)
        expected = [[text] for text in _texts(processor, labels)] if references is None else references
        results = dict(scores(texts, expected))
        if generated:
            return results
        named = labels != IGNORE_INDEX
        results["token_accuracy"] = accuracy(predicted[named], labels[named])
        return {f"teacher_forced_{name}": score for name, score in results.items()}

    return compute_metrics


def caption_compute_metrics(
    processor: Any,
    references: Sequence[Sequence[str]] | None = None,
    *,
    generated: bool = False,
    is_encoder_decoder: bool = False,
) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    `compute_metrics` for `Trainer` with the scores of [`caption_metrics`].

    `Trainer` evaluates by one forward over the right answer, so with `preprocess_logits_for_metrics=argmax_logits`
    each word is predicted after the *right* words before it. Such scores serve to choose among checkpoints cheaply;
    they are far above those of generated captions, so they are named `teacher_forced_…`, beside
    `teacher_forced_token_accuracy`. Publish scores of generated text only: `generated=True` takes the ids that
    `generate()` gave, by `Seq2SeqTrainer` with `predict_with_generate` and an encoder-decoder. (Not so with a causal
    model: its evaluation batches hold the answer.)

    Args:
        processor: the processor or its tokenizer, to decode with.
        references (`list[list[str]]`, *optional*): all captions of each sample, in the evaluation set's order; by
            default each sample's own label is its one reference.
        generated (`bool`): predictions are ids that `generate()` wrote, the prompt's not among them.
        is_encoder_decoder (`bool`): labels stand where they are predicted, not one place later.
    """
    return _text_compute_metrics(caption_metrics, processor, references, generated, is_encoder_decoder)


def vqa_compute_metrics(
    processor: Any,
    answers: Sequence[Sequence[str]] | None = None,
    *,
    generated: bool = False,
    is_encoder_decoder: bool = False,
) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    `compute_metrics` for `Trainer` with `exact_match`, `token_f1` and, where the people's `answers` to each question
    are given, `vqa_accuracy`. The arguments and the prefix `teacher_forced_` are those of [`caption_compute_metrics`].
    """

    def scores(predictions: list[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        results = {"exact_match": exact_match(predictions, references), "token_f1": token_f1(predictions, references)}
        if answers is not None:
            results["vqa_accuracy"] = vqa_accuracy(predictions, references)
        return results

    return _text_compute_metrics(scores, processor, answers, generated, is_encoder_decoder)


def classification_compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    `compute_metrics` for `Trainer`: accuracy and macro F1 of the largest of `(samples, classes)` logits. With labels of
    that same shape (several per sample): the share of samples with all right, and the mean over classes of the F1 of
    "yes", where a positive logit says yes.
    """
    logits = prediction.predictions
    logits, labels = _to_numpy(logits[0] if isinstance(logits, (tuple, list)) else logits), _to_numpy(prediction.label_ids)
    if labels.ndim == 2:
        said, right = logits > 0, labels > 0.5
        both, either = (said & right).sum(0), said.sum(0) + right.sum(0)
        scores = [2 * hits / total if total else 0.0 for hits, total in zip(both, either, strict=True)]
        return {"accuracy": _mean((said == right).all(-1)), "f1": _mean(scores)}
    predicted = logits.argmax(axis=-1)
    return {"accuracy": accuracy(predicted, labels), "f1": f1(predicted, labels)}


def retrieval_compute_metrics(
    text_to_image: Sequence[int] | None = None,
    *,
    text_embeds: int = 2,
    image_embeds: int = 3,
    ks: Sequence[int] = (1, 5, 10),
) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    `compute_metrics` for `Trainer` with [`recall_at_k`] over the whole evaluation set, from the embeddings that the
    model gave batch by batch.

    Args:
        text_to_image (`list[int]`, *optional*): for sample n, the index of its image, the same for all samples that
            show one image; by default each sample has its own.
        text_embeds, image_embeds (`int`): where the embeddings stand among the model's outputs after the loss, as in
            CLIP's.
        ks (`list[int]`): the cut-offs.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        import numpy as np

        texts, images = (_to_numpy(prediction.predictions[place]) for place in (text_embeds, image_embeds))
        texts, images = (values / np.linalg.norm(values, axis=-1, keepdims=True) for values in (texts, images))
        if text_to_image is None:
            return recall_at_k(images @ texts.T, ks=ks)
        _check_pairs(texts, text_to_image)
        _, first, owner = np.unique(_to_numpy(text_to_image), return_index=True, return_inverse=True)
        return recall_at_k(images[first] @ texts.T, owner, ks)

    return compute_metrics
