"""Processors over tiny tokenizers of every form, the images that they open, and chat templates of their parents."""

import io

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from modeling_frozen.processors import FrozenPrefixProcessor


WORDS = "<unk> <s> </s> a red blue dog cat runs sees what is it ? : User Assistant Question Answer . one two".split()
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0)}

# As text-only models of the Hub write them: content is a string, or trouble.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PRINTS_LISTS = "{{ bos_token }}{% for message in messages %}[{{ message['content'] | trim }}]{% endfor %}"


def word_tokenizer(bos: bool = True, **kwargs) -> PreTrainedTokenizerFast:
    """One id per word; BOS first where asked for, by a template as Llama's and Gemma's tokenizers have it."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """GPT-2's form: bytes, a few merges, one token for BOS, EOS and unknown, no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "d"), ("o", "g"), ("Ġd", "og"), ("Ġ", "c"), ("a", "t"), ("Ġc", "at"), ("r", "e"), ("re", "d")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges), "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end, **kwargs)


def space_tokenizer(scheme: str = "first") -> PreTrainedTokenizerFast:
    """SentencePiece's form: a space is put before every text ("always": after each special token too)."""
    letters = ["▁", "\n", *"abcdefghijklmnopqrstuvwxyz?:."]
    merges = [("▁", "d"), ("▁d", "o"), ("▁do", "g"), ("d", "o"), ("do", "g")]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *letters, *dict.fromkeys(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def image_processor(size: int = 8) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": size, "width": size})


def make(tokenizer=None, prefix_length: int = 3, **kwargs) -> FrozenPrefixProcessor:
    return FrozenPrefixProcessor(image_processor(), tokenizer or word_tokenizer(), prefix_length, **kwargs)


def picture(colour: str = "red", size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", size, COLOURS[colour]).convert(mode)


def words(processor: FrozenPrefixProcessor, ids) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(list(map(int, ids)))


def saved(image: Image.Image, kind: str, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()
