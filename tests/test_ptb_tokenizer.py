"""Caption tokens against those of coco-caption's Java tool: stored ones, and the tool itself where it is at hand."""

import importlib.util
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from modeling_frozen.metrics.ptb_tokenizer import _DROPPED, ptb_tokens, tokenize_caption


needs_java = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="needs pycocoevalcap and java",
)


def java_tokens(captions: list[str]) -> list[str]:
    """coco-caption's own tokenizer, with a line between any two: no caption sees the next one's first word."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "\n".join(line for caption in captions for line in (caption, "zz"))
    printed = subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout.decode()
    lines = printed.split("\n")[: 2 * len(captions) : 2]
    assert len(lines) == len(captions)
    return [" ".join(token for token in line.rstrip().split(" ") if token not in ptbtokenizer.PUNCTUATIONS) for line in lines]


def stored_tokens() -> dict[str, str]:
    stored = json.loads((Path(__file__).parent / "data/ptb_tokens.json").read_text(encoding="utf-8"))
    return stored["captions"]


@pytest.mark.parametrize(("caption", "tokens"), list(stored_tokens().items()))
def test_tokens_equal_the_stored_ones_of_the_java_tool(caption, tokens):
    assert tokenize_caption(caption) == tokens


@needs_java
def test_tokens_equal_the_java_tools_on_random_captions():
    pieces = (
        "a the dog man's Dogs TV t-shirt St. Mr. vs. etc. u.s. U.S. a.m. 3 12 2nd 90's '90s 1,000 1.5 3/4"
        " and/or it's don't can't cannot gonna o'clock rock 'n' O'Brien y'all isn't they're we've I'd I'll"
        " café über $5 50% #1 5' 5'6\" 12:30 3:30pm black-and-white two-year-old mother-in-law's x-ray -- - — …"
        " ... . , ; : ! ? ( ) [ ] \" it’s man’s girls' & B&W w/ / * + ½ 1/2 é :) <unk> <b> _ ~ naïve man. dog,"
        " dog; (cat) \"cat\" cat's. cat), 'cat' cat?! l'eau qu'il"
    ).split()
    draw = random.Random(0)
    captions = [" ".join(draw.choices(pieces, k=draw.randint(1, 9))) for _ in range(3000)]
    captions += ["".join(draw.choices("ab cd1 2.,:'-", k=draw.randint(2, 8))).strip() or "a" for _ in range(2000)]
    different = [
        (caption, official)
        for caption, official in zip(captions, java_tokens(captions), strict=True)
        if tokenize_caption(caption) != official
    ]
    assert different == []


@needs_java
@pytest.mark.real_data
def test_tokens_equal_the_java_tools_on_real_captions(assets):
    parquet = pytest.importorskip("pyarrow.parquet")
    captions = []
    for folder, column in (("captions", "captions"), ("multi30k", "en_captions"), ("multi30k", "fr")):
        for file in sorted((assets / folder).rglob("*.parquet")):
            rows = parquet.read_table(file, columns=[column])[column].to_pylist()[:1000]
            captions += [text for row in rows if row for text in (row if isinstance(row, list) else [row])]
    captions = sorted({" ".join(caption.split()) for caption in captions} - {""})
    assert len(captions) > 20_000
    different = [
        (caption, official)
        for caption, official in zip(captions, java_tokens(captions), strict=True)
        if tokenize_caption(caption) != official
    ]
    assert different == []


def test_brackets_stay_and_punctuation_goes():
    # coco-caption means to drop brackets too, but lists them in capitals, which the lower-cased tokens never match.
    assert tokenize_caption("A dog (brown), runs!") == "a dog -lrb- brown -rrb- runs"
    assert ptb_tokens("Dogs run.") == ["dogs", "run", "."]
    assert tokenize_caption("?! ? !") == "?!"
    assert not _DROPPED & set(tokenize_caption("'a' \"b\" ``c'' - -- ... . , ; : ? !").split())


@pytest.mark.parametrize("caption", ["", "  \t ", "\n", "...", "😀", "\u200b"])
def test_captions_without_a_word_have_no_tokens(caption):
    assert tokenize_caption(caption) == ""
