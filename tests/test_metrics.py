"""Scores against the official tools': stored values of captions written for this test, the real reference set where it
is at hand, and the Java tools themselves where they are. VQA accuracy and the others also by hand."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_frozen.metrics import scores as metrics
from modeling_frozen.metrics.ptb_tokenizer import tokenize_caption


needs_coco = pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap")

PREDICTIONS = [
    "A brown dog runs across the beach.",
    "Two men playing soccer on a green field",
    "a woman's holding an umbrella in the rain, smiling",
    "A plate of food with broccoli and rice",
    "a cat",
    "The train's at the station (platform 2).",
]
REFERENCES = [
    ["A dog runs along the beach.", "A brown dog is running on sand near the sea."],
    [
        "Two men are playing soccer.",
        "Soccer players fight for the ball on a green field.",
        "Men in red and white play football",
    ],
    ["A woman holds an umbrella in the rain."],
    ["Broccoli and rice on a white plate", "A plate with rice, broccoli and chicken.", "food on a plate"],
    ["A grey cat's sleeping on a black-and-white sofa", "Cat asleep on the couch!"],
    ["A train at a station platform", "A red train waits at the station.", "Commuters wait on platform 2"],
]
# By pycocoevalcap 1.2 with its Java tokenizer.
OFFICIAL = {
    "bleu_1": 0.7999999999822223,
    "bleu_2": 0.6405126152050201,
    "bleu_3": 0.46331583214635824,
    "bleu_4": 0.32129107490346515,
    "rouge_l": 0.635994271158188,
    "cider": 2.300371203249854,
}
OFFICIAL_CIDERS = [
    2.126588958761333,
    1.956616298554885,
    4.957828485907326,
    2.4029687697185125,
    0.8928660923091968,
    1.4653586142478727,
]


# --- Captions --------------------------------------------------------------------------------------------------------


@needs_coco
def test_caption_metrics_equal_the_official_ones():
    scores = metrics.caption_metrics(PREDICTIONS, REFERENCES)
    assert scores == pytest.approx(OFFICIAL, abs=1e-9)
    assert all(type(score) is float for score in scores.values())


@needs_coco
def test_caption_metrics_print_nothing(capsys):
    metrics.caption_metrics(PREDICTIONS, REFERENCES)
    assert capsys.readouterr().out == ""


@needs_coco
def test_bleu_and_rouge_agree_with_other_libraries():
    sacrebleu = pytest.importorskip("sacrebleu")
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scores = metrics.caption_metrics(PREDICTIONS, REFERENCES)
    predictions = [tokenize_caption(text) for text in PREDICTIONS]
    references = [[tokenize_caption(text) for text in texts] for texts in REFERENCES]
    most = max(map(len, references))
    columns = [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
    for n in (1, 2, 3, 4):
        bleu = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=n, force=True)
        assert bleu.corpus_score(predictions, columns).score / 100 == pytest.approx(scores[f"bleu_{n}"], abs=1e-8)

    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=str.split))
    expected = []
    for prediction, texts in zip(predictions, references, strict=True):
        single = [scorer.score(text, prediction)["rougeL"] for text in texts]
        precision, recall = max(one.precision for one in single), max(one.recall for one in single)
        expected.append((1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision))
    assert scores["rouge_l"] == pytest.approx(sum(expected) / len(expected), abs=1e-12)


@needs_coco
def test_scores_of_single_captions():
    single = metrics.caption_scores(PREDICTIONS, REFERENCES)
    assert list(single) == list(OFFICIAL)
    assert single["cider"] == pytest.approx(OFFICIAL_CIDERS, abs=1e-9)
    for name in ("rouge_l", "cider"):
        assert sum(single[name]) / len(PREDICTIONS) == pytest.approx(OFFICIAL[name], abs=1e-9)
    assert all(len(scores) == len(PREDICTIONS) for scores in single.values())


def test_without_pycocoevalcap_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ImportError, match=r"pip install frozen-prefix\[metrics\]"):
        metrics.caption_metrics(PREDICTIONS, REFERENCES)


@needs_coco
def test_one_image_has_no_cider_and_says_so():
    with pytest.warns(UserWarning, match="CIDEr of one image is always 0"):
        scores = metrics.caption_metrics(["a dog runs"], [["a dog runs"]])
    assert scores["cider"] == 0
    assert scores["bleu_3"] == pytest.approx(1) and scores["rouge_l"] == 1


@needs_coco
def test_empty_captions_score_nothing():
    scores = metrics.caption_metrics(["", " . "], [["a dog"], ["a cat", "the cat"]])
    assert scores == pytest.approx(dict.fromkeys(OFFICIAL, 0), abs=1e-6)
    assert metrics.caption_metrics(["", ""], [["."], [""]])["cider"] == 0  # not one word anywhere


@needs_coco
def test_captions_of_other_scripts():
    texts = ["два кота спят на диване", "犬 が 走る", "ein großer Hund läuft über die Straße"]
    scores = metrics.caption_metrics(texts, [[text] for text in texts])
    assert scores["bleu_1"] == pytest.approx(1) and scores["rouge_l"] == 1
    assert scores["cider"] == pytest.approx((10 + 7.5 + 10) / 3)  # the second has no 4 words in a row


@pytest.mark.real_data
@needs_coco
def test_reference_scores(assets):
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = assets / "metrics"
    official = json.loads((folder / "golden_pycocoevalcap.json").read_text())
    nlgeval = json.loads((folder / "nlgeval_example.json").read_text())
    clip = json.loads((folder / "clipscore_example.json").read_text())
    (file,) = (assets / "captions/flickr8k_1k/data").glob("test-*")
    captions = parquet.read_table(file, columns=["captions"])["captions"].to_pylist()
    first, rest = [texts[0] for texts in captions], [texts[1:] for texts in captions]
    constant = official["flickr8k_1k_test_constant_vs_5refs"]["caption"]
    sets = {
        "nlgeval_example_ptb": (nlgeval["hyp"], nlgeval["refs"]),
        "clipscore_example_good": (list(clip["good"].values()), list(clip["refs"].values())),
        "clipscore_example_bad": (list(clip["bad"].values()), list(clip["refs"].values())),
        "flickr8k_1k_test_human_cap0_vs_1to4": (first, rest),
        "flickr8k_1k_test_shifted_cap0_vs_1to4": (first[1:] + first[:1], rest),
        "flickr8k_1k_test_constant_vs_5refs": ([constant] * len(captions), captions),
    }
    names = dict(zip(OFFICIAL, ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"], strict=True))
    for name, (predictions, references) in sets.items():
        expected = {ours: official[name][theirs] for ours, theirs in names.items()}
        assert metrics.caption_metrics(predictions, references) == pytest.approx(expected, abs=1e-9), name


# --- Wrong inputs ----------------------------------------------------------------------------------------------------

TEXT_SCORES = [
    metrics.caption_metrics,
    metrics.caption_scores,
    metrics.vqa_accuracy,
    metrics.vqa_scores,
    metrics.exact_match,
    metrics.token_f1,
]


@pytest.mark.parametrize("score", [*TEXT_SCORES, metrics.accuracy])
def test_unequal_lengths_are_refused_with_both(score):
    with pytest.raises(ValueError, match="2 predictions for 3 references"):
        score(["a", "b"], [["a"], ["b"], ["c"]])


@pytest.mark.parametrize("score", [*TEXT_SCORES, metrics.accuracy])
def test_nothing_to_score_is_refused(score):
    with pytest.raises(ValueError, match="no predictions"):
        score([], [])


@pytest.mark.parametrize("score", TEXT_SCORES)
def test_misshapen_texts_are_refused_with_their_index(score):
    with pytest.raises(TypeError, match="references 1 are one string"):
        score(["a", "b"], [["a"], "b"])
    with pytest.raises(ValueError, match="prediction 1 has no references"):
        score(["a", "b"], [["a"], []])
    with pytest.raises(TypeError, match="prediction 0 is a list"):
        score([["a"], "b"], [["a"], ["b"]])


# --- VQA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("yes", "expected"),
    # Of ten people, n agree: n ways leave out one of them (n - 1 others agree), 10 - n leave all n.
    [(0, 0.0), (1, 9 / 10 / 3), (2, 0.6), (3, (3 * 2 / 3 + 7) / 10), (4, 1.0), (9, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_by_hand(yes, expected):
    answers = ["yes"] * yes + [f"no {n}" for n in range(10 - yes)]
    assert metrics.vqa_accuracy(["yes"], [answers]) == pytest.approx(expected)
    assert metrics.vqa_accuracy(["yes", "zebra"], [answers, answers]) == pytest.approx(expected / 2)
    assert metrics.vqa_scores(["yes", "zebra"], [answers, answers]) == pytest.approx([expected, 0])


def test_vqa_answers_are_normalised_only_where_people_disagree():
    # So in the official tool: ten equal answers are compared as they are.
    assert metrics.vqa_accuracy(["The Two."], [["2"] * 10]) == 0
    assert metrics.vqa_accuracy(["The Two."], [["2"] * 9 + ["three"]]) == 1
    assert metrics.vqa_accuracy([" 2\n"], [["2"] * 10]) == 1


@pytest.mark.parametrize(
    ("answer", "normalised"),
    # By the official tool, GT-Vision-Lab/VQA @ a013f00, under Python 3.
    [
        ("The Dog", "dog"),
        ("a cat, an owl", "cat owl"),
        ("none", "0"),
        ("Ten", "10"),
        ("twenty one", "twenty 1"),
        ("dont", "don't"),
        ("youd've", "you'd've"),
        ("you'dve", "you'd've"),
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("red/ blue-green", "red blue green"),
        ("black-and-white", "black and white"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("u.s.a.", "usa"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("12:30", "12:30"),
        ("it's", "it's"),
        ('"stop!"', "stop"),
        ("x" + "." * 33, "x."),
        ("", ""),
    ],
)
def test_vqa_normalisation(answer, normalised):
    assert metrics.normalize_vqa_answer(answer) == normalised


def test_the_table_of_contractions_is_whole():
    table = metrics._vqa_contractions()
    assert len(table) == 114  # as many as the official one maps to something else, of those in lower case
    assert all(key.replace("'", "") == value.replace("'", "") for key, value in table.items())


# --- Text, classes, perplexity ---------------------------------------------------------------------------------------


def test_exact_match_and_f1_by_hand():
    predictions = ["The red ball!", "two dogs", "cat", ""]
    references = [["red ball", "blue"], ["three dogs run", "dogs"], ["dog"], ["the", "x"]]
    assert metrics.exact_match(predictions, references) == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert metrics.token_f1(predictions, references) == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    # A word counts as often as it is in both.
    assert metrics.token_f1(["dog dog cat"], [["dog bird"]]) == pytest.approx(2 * 1 / (3 + 2))
    assert metrics.normalize_answer(" The  U.S. man's an-apple Ünder ") == "us mans anapple ünder"


def test_accuracy_takes_labels_of_any_kind():
    assert metrics.accuracy([1, 2, 3, 3], [1, 2, 3, 4]) == 0.75
    assert metrics.accuracy(["a", "b"], ["a", "c"]) == 0.5
    assert metrics.accuracy(torch.tensor([1, 0]), np.array([1, 0])) == 1


def test_perplexity():
    assert metrics.perplexity(0.0) == 1
    assert metrics.perplexity(torch.tensor(math.log(7.0))) == pytest.approx(7)
    assert metrics.perplexity(1e6) == math.inf
    # Two batches: the mean over their four tokens, not over the batches.
    assert metrics.perplexity([1.0, 2.0], [3, 1]) == pytest.approx(math.exp(1.25))
    with pytest.raises(ValueError, match="need num_tokens"):
        metrics.perplexity([1.0, 2.0])
    with pytest.raises(ValueError, match="2 predictions for 1"):
        metrics.perplexity([1.0, 2.0], [3])
    with pytest.raises(ValueError, match="sums to 0"):
        metrics.perplexity([1.0], [0])


# --- Retrieval -------------------------------------------------------------------------------------------------------


def test_recall_by_hand():
    # Texts 0 and 1 belong to image 0, 2 and 3 to image 1, 4 to image 2.
    similarity = [
        [0.9, 0.1, 0.3, 0.2, 0.5],  # its best text is the first of all
        [0.2, 0.3, 0.4, 0.6, 0.7],  # its best text is the second
        [0.8, 0.7, 0.6, 0.5, 0.4],  # its text is the last
    ]
    scores = metrics.recall_at_k(similarity, [0, 0, 1, 1, 2], ks=(1, 2, 5))
    assert scores == pytest.approx(
        {
            "image_to_text_recall_at_1": 1 / 3,
            "image_to_text_recall_at_2": 2 / 3,
            "image_to_text_recall_at_5": 1,
            # ranks of the right image: 1, 3, 2, 1, 3
            "text_to_image_recall_at_1": 2 / 5,
            "text_to_image_recall_at_2": 3 / 5,
            "text_to_image_recall_at_5": 1,
        }
    )
    assert metrics.recall_at_k(torch.tensor(similarity), torch.tensor([0, 0, 1, 1, 2]), ks=(1, 2, 5)) == scores


def test_equal_scores_find_nothing():
    scores = metrics.recall_at_k(np.ones((20, 20)))
    assert set(scores.values()) == {0.0}
    assert set(metrics.recall_at_k(np.eye(20)).values()) == {1.0}


def test_recall_equals_a_plain_sort():
    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(30), 5)[generator.permutation(150)]
    similarity = generator.normal(size=(30, 150))
    scores = metrics.recall_at_k(similarity, owner, ks=(3,))
    hits = [image in owner[np.argsort(-row)[:3]] for image, row in enumerate(similarity)]
    named = [owner[text] in np.argsort(-column)[:3] for text, column in enumerate(similarity.T)]
    assert 0 < np.mean(hits) < 1 and 0 < np.mean(named) < 1
    assert scores["image_to_text_recall_at_3"] == pytest.approx(np.mean(hits))
    assert scores["text_to_image_recall_at_3"] == pytest.approx(np.mean(named))


@pytest.mark.parametrize(
    ("similarity", "owner", "message"),
    [
        (np.ones((2, 3)), None, "2 images and 3 texts"),
        (np.ones((2, 3)), [0, 1], "2 entries for 3 texts"),
        (np.ones((2, 3)), [0, 1, 2], "names images 0 to 2"),
        (np.ones((2, 3)), [0, 0, 0], r"images \[1\] have no text"),
        (np.ones(3), None, r"shape \(3,\)"),
        (np.ones((0, 0)), None, "each at least 1"),
        (np.array([[np.nan]]), None, "not finite"),
    ],
)
def test_wrong_similarities_are_refused(similarity, owner, message):
    with pytest.raises(ValueError, match=message):
        metrics.recall_at_k(similarity, owner)
    with pytest.raises(ValueError, match="at least 1"):
        metrics.recall_at_k(np.eye(2), ks=(0,))


# --- compute_metrics for Trainer -------------------------------------------------------------------------------------


class Words:
    """A tokenizer of whole words: id n is the n-th word, 0 is special."""

    words = ["<pad>", "a", "dog", "cat", "runs", "sleeps", "red"]

    def batch_decode(self, rows, skip_special_tokens=False):
        assert skip_special_tokens
        return [" ".join(self.words[token] for token in row if token) for row in rows]


def prediction(predictions, labels):
    from transformers import EvalPrediction

    return EvalPrediction(predictions=predictions, label_ids=np.array(labels))


# Prompt, then "a dog runs" and "a cat sleeps"; the second sample is shorter by its prompt.
LABELS = [[-100, -100, 1, 2, 4, 0], [-100, 1, 3, 5, 0, -100]]
# What place n predicts is the label of place n + 1. "a dog runs", "a dog sleeps"; where nothing is asked, anything.
GUESSES = [[6, 1, 2, 4, 0, 6], [1, 2, 5, 0, 6, 6]]


@needs_coco
def test_teacher_forced_captions_are_named_so():
    compute = metrics.caption_compute_metrics(SimpleNamespace(tokenizer=Words()))
    scores = compute(prediction(np.array(GUESSES), LABELS))
    expected = metrics.caption_metrics(["a dog runs", "a dog sleeps"], [["a dog runs"], ["a cat sleeps"]])
    expected["token_accuracy"] = 7 / 8
    assert scores == pytest.approx({f"teacher_forced_{name}": score for name, score in expected.items()})


@needs_coco
def test_captions_of_encoder_decoders_are_not_shifted():
    labels = [[1, 2, 4, 0], [1, 3, 5, -100]]
    guesses = [[1, 2, 4, 0], [1, 2, 5, 6]]
    compute = metrics.caption_compute_metrics(Words(), [["a dog runs", "a red dog"], ["a cat"]], is_encoder_decoder=True)
    scores = compute(prediction(np.array(guesses), labels))
    expected = metrics.caption_metrics(["a dog runs", "a dog sleeps"], [["a dog runs", "a red dog"], ["a cat"]])
    assert scores["teacher_forced_token_accuracy"] == 6 / 7
    assert scores["teacher_forced_cider"] == pytest.approx(expected["cider"])
    assert scores["teacher_forced_bleu_2"] == pytest.approx(expected["bleu_2"])


@needs_coco
def test_generated_captions_may_be_longer_than_labels():
    compute = metrics.caption_compute_metrics(Words(), generated=True)
    ids = np.array([[1, 2, 4, 0, 0, 0, 0, -100], [1, 3, 5, 0, 0, 0, 0, -100]])
    scores = compute(prediction(ids, LABELS))
    assert list(scores) == list(OFFICIAL)
    assert scores["rouge_l"] == 1


def test_answers_for_trainer():
    compute = metrics.vqa_compute_metrics(Words(), [["dog runs"] * 9 + ["cat"], ["cat sleeps"] * 10])
    scores = compute(prediction(np.array(GUESSES), LABELS))
    assert scores["teacher_forced_exact_match"] == 0.5
    assert scores["teacher_forced_vqa_accuracy"] == 0.5
    assert "teacher_forced_vqa_accuracy" not in metrics.vqa_compute_metrics(Words())(prediction(np.array(GUESSES), LABELS))


def test_whole_logits_are_refused_with_the_way_out():
    compute = metrics.vqa_compute_metrics(Words())
    with pytest.raises(ValueError, match=r"\(2, 6, 7\).*preprocess_logits_for_metrics=argmax_logits"):
        compute(prediction(np.zeros((2, 6, 7)), LABELS))
    with pytest.raises(ValueError, match=r"\(2, 5\) and labels \(2, 6\)"):
        compute(prediction(np.zeros((2, 5), dtype=int), LABELS))


def test_argmax_of_logits_in_a_tuple():
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    assert metrics.argmax_logits(logits).tolist() == [[1, 0]]
    assert metrics.argmax_logits((logits, None), torch.zeros(1, 2)).tolist() == [[1, 0]]


def test_classes_for_trainer():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    scores = metrics.classification_compute_metrics(prediction(logits, [1, 0, 0]))
    assert scores == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}
    assert metrics.classification_compute_metrics(prediction((logits, None), [1, 0, 1])) == {"accuracy": 1, "f1": 1}


@pytest.mark.parametrize("several", [False, True])
def test_f1_as_scikit_learn(several: bool) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 4)) + [0.0, 0.0, 1.0, -9.0]  # the last is never said
    labels = rng.integers(0, 2, size=(50, 4)).astype(np.float32) if several else rng.integers(0, 3, size=50)
    said = (logits > 0).astype(int) if several else logits.argmax(-1)
    expected = {
        "accuracy": pytest.approx(sklearn.accuracy_score(labels, said)),
        "f1": pytest.approx(sklearn.f1_score(labels, said, average="macro", zero_division=0)),
    }
    assert metrics.classification_compute_metrics(prediction(logits, labels)) == expected
    if not several:
        assert metrics.f1([str(one) for one in said], [str(one) for one in labels]) == expected["f1"]


def test_retrieval_for_trainer():
    texts = np.array([[1.0, 0], [0, 2], [3, 3], [0, 1]])
    images = np.array([[5.0, 0], [1, 0], [1, 1], [0, 4]])
    outputs = (None, None, texts, images)
    scores = metrics.retrieval_compute_metrics(ks=(1,))(prediction(outputs, [0] * 4))
    cosine = [[1, 0, 0.5**0.5, 0], [1, 0, 0.5**0.5, 0], [0.5**0.5, 0.5**0.5, 1, 0.5**0.5], [0, 1, 0.5**0.5, 1]]
    assert scores == metrics.recall_at_k(cosine, ks=(1,))
    # Samples 0 and 1 show one image, named 7.
    outputs = (None, None, texts[[0, 0, 2, 1]], images[[0, 0, 2, 3]])
    scores = metrics.retrieval_compute_metrics([7, 7, 2, 9], ks=(1,))(prediction(outputs, [0] * 4))
    assert set(scores.values()) == {1.0}
    with pytest.raises(ValueError, match="4 predictions for 3"):
        metrics.retrieval_compute_metrics([7, 7, 2], ks=(1,))(prediction(outputs, [0] * 4))


@needs_coco
def test_in_trainer(tmp_path):
    """A causal model whose answers `Trainer` scores: the shift and the padding of several batches are its own."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=7, n_positions=16))
    rows = [
        {"input_ids": [1, 2, 4, 0], "labels": [-100, 2, 4, 0]},
        {"input_ids": [1, 3, 5, 0], "labels": [-100, 3, 5, 0]},
        {"input_ids": [1, 6, 2, 4, 2, 0], "labels": [-100, -100, 2, 4, 2, 0]},
    ]
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True, do_train=False
        ),
        data_collator=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")},
        compute_metrics=metrics.caption_compute_metrics(Words()),
        preprocess_logits_for_metrics=metrics.argmax_logits,
    )
    scores = trainer.evaluate(rows)
    right = []
    with torch.no_grad():
        for row in rows:
            best = model(torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1)
            right += [int(a) == b for a, b in zip(best, row["labels"][1:], strict=True) if b != -100]
    assert scores["eval_teacher_forced_token_accuracy"] == pytest.approx(sum(right) / len(right))
    assert "eval_teacher_forced_cider" in scores


def test_importing_metrics_imports_nothing_heavy():
    script = (
        "import sys; import modeling_frozen.metrics.scores;"
        "print([n for n in ('torch','numpy','datasets','pycocoevalcap') if n in sys.modules])"
    )
    root = Path(__file__).parents[1]
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root).stdout
    assert printed.strip() == "[]"
