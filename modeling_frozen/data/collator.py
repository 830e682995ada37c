"""DataCollatorForFrozenPrefix: rows of a dataset to a training batch, with labels only on what is to be learnt.

The collator, not `dataset.map`, does the image work: images stay compressed in the dataset and are opened when their
batch comes. Text is tokenised in one call per batch. Masks come from where a token stands (placeholder, prompt,
padding by length), never from its id being the pad token's: where EOS pads too, the model would never learn to stop.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from ..prefix_sharing import begin_alike
from ..processors import load_rgb_image, load_video, load_waveform
from .columns import find_column, images_of, no_image_column, unread_image
from .draws import EpochForWorkers, current_epoch, draw, seeded
from .feature_store import StoredImage
from .image_reading import digest_of_image
from .tally import Tally


IGNORE_INDEX = -100
_UNKNOWN_LENGTH = int(1e20)  # transformers' own bound: above it, model_max_length means "not known"
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private-use characters that mark assistant turns while a chat is rendered
_MEDIA_KEYS = ("image", "video", "audio", "url", "path", "base64")
OTHERS = {"video": "videos", "audio": "audio"}  # by modality, the processor's argument


@dataclass
class _Example:
    """One row: pieces of text with whether they are learnt, images, and for encoder-decoders the decoder's text."""

    pieces: list[tuple[str, bool]]
    images: list[Any]
    others: dict[str, list[Any]] = field(default_factory=dict)  # videos and audio, by modality
    target: str | None = None
    add_special_tokens: bool = True
    add_eos: bool = True
    prompt_first: bool = False  # what truncation takes first
    after_images: bool = False  # learn nothing before the first placeholder
    turn_ends: list[int] = field(default_factory=list)  # how many pieces there are up to the end of each assistant turn
    cuts: list[tuple[int, dict[str, int]]] = field(default_factory=list)  # tokens and media up to there
    ids: list[int] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)
    fixed: list[bool] = field(default_factory=list)  # never cut


@dataclass
class DataCollatorForFrozenPrefix:
    """Collates rows of one of three kinds, also mixed in one batch (told apart by their columns, in this order):

    - `messages` (a chat; images inside the turns, or in an image column): assistant turns are learnt, their end token
      with them, but for those with `"loss": false`. The template's `{% generation %}` markers are used where it has them.
    - `prompt` and `answer` (or `completion`) with an image column: answer and EOS are learnt. One space is put between the
      two where neither brings any; at inference, give the processor the prompt alone.
    - `text` with an image column: everything after the (first) placeholder and EOS are learnt.

    A model that takes videos or audio has them from the columns `video` (or `videos`) and `audio` in the same ways; a row
    with one of these needs no image column.

    An image column holds an image, a list of images, or None for a text-only row; every row of the last two kinds must
    have it. Texts without `<image>` get one per image where the processor puts them. `text` or `answer` may be a list
    (several captions of one image), of which one is drawn: in the data loader of `Trainer` or accelerate by `seed`, epoch
    and texts, so that a resumed training draws the same (with `dataloader_persistent_workers` it takes [`EpochCallback`]);
    elsewhere from torch's global generator. With `all_texts` each of them is a sample, and `prompt` may be as long a list
    (several questions about one image): the model then reads the image once for all of them.

    Use it with `TrainingArguments(remove_unused_columns=False)`, or Trainer drops the columns that it reads.

    Args:
        processor: a `FrozenPrefixProcessor`.
        max_length: longest sequence with placeholders, and longest target of an encoder-decoder. Default: the
            tokenizer's `model_max_length` where it is known. Text is cut on the tokenizer's `truncation_side`,
            placeholders never; prompts are cut before answers; a text cut on the right ends without EOS. Of a chat whole
            turns are cut at the end, with their images, until only the first answer is left.
        image_column: name of the image column. Default: `image`, else `images`.
        text_column, prompt_column, answer_column, messages_column: names of the others, such as
            `prompt_column="question"`.
        pad_to_multiple_of: pad sequences to a multiple of it.
        is_encoder_decoder: whether the model is an encoder-decoder. Default: what the processor says.
        share_images: process and encode an image of several samples of a batch once: the same object, path, bytes, or
            index in a store. The model's results are the same. Turn it off where something cuts batches up row by row
            (`dispatch_batches`, which accelerate sets for an `IterableDataset` in several processes; `nn.DataParallel`).
        all_texts: take every text of a row that has several, in place of one of them; a batch then has more samples than
            `per_device_train_batch_size` rows.
        augment: random change of every image at each use, from a PIL image in RGB to such a one; also in an evaluation
            that goes through this collator; drawn as texts are. Stored images can't be changed: give it to
            [`cache_vision_features`] then.
        seed: of what is drawn.
        prefix_length: of a model with several `prefix_lengths`, the one to train on (or to evaluate at). By default one is
            drawn for each batch, by its texts and the epoch.
        train_on: "all" assistant turns of a chat, or the "last".
        on_error: "raise" at an image that can't be opened, with its row; "skip" leaves the row out: a batch then has fewer
            rows, and where none is left, labels that teach nothing. `tally` counts them, and the chats that were cut;
            [`SkippedRowsCallback`] says so at the end of each epoch.

    Rows of [`cache_vision_features`] hold features in place of images, and no image is opened for them.

    Returns: a dict of `input_ids`, `attention_mask` (batch, sequence), padded on the right; `labels` of the same
    shape, -100 where nothing is learnt (encoder-decoder: (batch, target), the decoder's ids); `pixel_values`
    (images, C, H, W) in reading order, with whatever else the image processor makes; none in a batch without images. Where
    it saves something, `pixel_values` hold distinct images and `image_index` (images,) says which of them stands where; it is
    there too where rows begin with enough words in common (a system prompt), for with it the model reads those once. Of
    stored images `vision_features` (images, positions, vision_width) in their place, in the dtype of the store, with
    `vision_features_mask` (images, positions) where positions vary.

    Raises: ValueError that names the row, the numbers and the way out.
    """

    processor: Any
    max_length: int | None = None
    image_column: str | None = None
    text_column: str = "text"
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    messages_column: str = "messages"
    pad_to_multiple_of: int | None = None
    is_encoder_decoder: bool | None = None
    share_images: bool = True
    all_texts: bool = False
    augment: Callable[[Any], Any] | None = None
    seed: int = 0
    prefix_length: int | None = None
    train_on: str = "all"
    on_error: str = "raise"

    def __post_init__(self) -> None:
        tokenizer = self.processor.tokenizer
        for name, choices in {"train_on": ("all", "last"), "on_error": ("raise", "skip")}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {list(choices)}. [errors.md#collator]")
        self.tally = Tally()
        self._epoch = EpochForWorkers()
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}. [errors.md#collator]")
        if self.max_length is None and tokenizer.model_max_length < _UNKNOWN_LENGTH:
            self.max_length = tokenizer.model_max_length
        if self.is_encoder_decoder is None:
            self.is_encoder_decoder = bool(getattr(self.processor, "is_encoder_decoder", False))
        # What the tokenizer puts around a text: BOS, EOS, a language code.
        text = "a"
        if not self._tokenize([text])[0]:  # byte-pair vocabularies without "a" drop it
            ordinary = sorted(set(tokenizer.get_vocab()) - set(_special_tokens(self.processor)))
            text = next((one for one in ordinary if self._tokenize([one])[0]), text)
        bare, full = self._tokenize([text])[0], self._tokenize([text], add_special_tokens=True)[0]
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self._before, self._after = full[:start], full[start + len(bare) :]
        # SentencePiece-like tokenizers put a space before every text, but not in its middle.
        bare, line, follows = self._tokenize(["a", "\n", "\na"])
        self._adds_space = follows[: len(line)] == line and follows[len(line) :] != bare
        self._special_tokens = _special_tokens(self.processor)
        self._takes_strings = _takes_strings(self.processor)

    # ------------------------------------------------------------------------------------------------------- calls
    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        samples = self._samples(rows)
        examples = self._opened(samples, [self._read(index, sample) for index, sample in samples])
        if nothing_left := not examples:
            examples = [_Example([("\n", True)], [], target="\n" if self.is_encoder_decoder else None)]
        with self.processor.with_length(self._length_of(examples)):
            self._encode(examples)
            for index, example in enumerate(examples):
                self._truncate(index, example)
        for index, example in enumerate(examples):
            if example.target is None and not any(example.learn):
                raise ValueError(
                    f"Row {index} has nothing to learn: its loss would be an unseen zero. Leave such rows out."
                    " [errors.md#collator]"
                )
        labels = self._targets(examples) if self.is_encoder_decoder else [self._labels(one) for one in examples]
        batch: dict[str, Any] = {
            "input_ids": self._stack([one.ids for one in examples], self.processor.tokenizer.pad_token_id or 0),
            "attention_mask": self._stack([[1] * len(one.ids) for one in examples], 0),
            "labels": self._stack(labels, IGNORE_INDEX),
        }
        if nothing_left:
            batch["labels"].fill_(IGNORE_INDEX)
        for modality in OTHERS:
            media = [one for example in examples for one in example.others.get(modality, [])]
            if media:
                batch.update(self.processor(**{OTHERS[modality]: [media]}, return_tensors="pt"))
        images = [image for example in examples for image in example.images]
        if images:
            batch.update(self.process_images(images))
            if "image_index" not in batch and self._begin_alike(batch):
                batch["image_index"] = torch.arange(sum(self.processor.count_tiles(image) for image in images))
        return batch

    def _begin_alike(self, batch: dict[str, Any]) -> bool:
        """Whether the model is told to read what rows have in common once, such as a system prompt."""
        if self.is_encoder_decoder or not self.share_images or self.augment is not None:
            return False
        placeholders = [getattr(self.processor, f"{modality}_token_id") for modality in self.processor.tokens]
        return begin_alike(batch["input_ids"], batch["attention_mask"], placeholders)

    def _length_of(self, examples: list[_Example]) -> int | None:
        lengths = getattr(self.processor, "prefix_lengths", None)
        if self.prefix_length is not None or not lengths:
            return self.prefix_length
        return lengths[draw(len(lengths), "length", self.seed, [example.pieces for example in examples])]

    def _opened(self, samples: list[tuple[int, Mapping[str, Any]]], examples: list[_Example]) -> list[_Example]:
        """Examples with their images opened, less those that have one which can't be, where they are to be left out."""
        opened: dict[Any, Any] = {}
        kept = []
        for (index, row), example in zip(samples, examples, strict=True):
            own = f" (id {row['id']!r:.60})" if row.get("id") is not None else ""
            try:
                for place, image in enumerate(example.images):
                    if isinstance(image, str | os.PathLike | bytes | Mapping | Image.Image):
                        key = image_identity(image)
                        if key not in opened:
                            opened[key] = load_rgb_image(image, f"image {place} of row {index}{own}")
                        example.images[place] = opened[key]
                for modality, media in example.others.items():
                    for place, one in enumerate(media):
                        media[place] = open_media(self.processor, modality, one, f"{modality} {place} of row {index}{own}")
            except ValueError as error:
                if self.on_error == "raise":
                    raise
                self.tally.add("rows left out", str(error))
            else:
                kept.append(example)
        return kept

    def process_images(self, images: list[Any]) -> dict[str, torch.Tensor]:
        """Model inputs of all images of the batch, in reading order. Override it to take features from elsewhere."""
        index = None
        if self.share_images and self.augment is None:
            places: dict[Any, int] = {}
            order = [places.setdefault(image_identity(image), len(places)) for image in images]
            distinct = {place: image for place, image in zip(order, images, strict=True)}
            images = [distinct[place] for place in range(len(distinct))]
            if len(distinct) < len(order):
                tiles = [self.processor.count_tiles(image) for image in images]
                starts = [sum(tiles[:place]) for place in range(len(tiles))]
                index = torch.tensor([starts[place] + tile for place in order for tile in range(tiles[place])])
        if self.augment is not None:
            if any(isinstance(image, StoredImage) for image in images):
                raise ValueError(
                    "`augment` can't change stored images, which are the tower's features: store augmented views "
                    "(`cache_vision_features(..., views=k, augment=…)`), or train from the images. [errors.md#collator]"
                )
            images = [self._augmented(number, image) for number, image in enumerate(images)]
        batch = dict(self.processor(images=images, return_tensors="pt"))
        return batch if index is None else {**batch, "image_index": index}

    def _augmented(self, number: int, image: Any) -> Any:
        assert self.augment is not None
        image, epoch = load_rgb_image(image, f"image {number}"), current_epoch()
        if epoch is None:
            return self.augment(image)
        with seeded(self.seed, epoch, number, digest_of_image(image)):
            return self.augment(image)

    @staticmethod
    def _labels(example: _Example) -> list[int]:
        return [i if learn else IGNORE_INDEX for i, learn in zip(example.ids, example.learn, strict=True)]

    def _stack(self, rows: list[list[int]], padding: int) -> torch.Tensor:
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(map(len, rows)) // multiple) * multiple
        return torch.tensor([row + [padding] * (length - len(row)) for row in rows], dtype=torch.long)

    # -------------------------------------------------------------------------------------------------- reading rows
    def _samples(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
        """What the batch is made of, each with the number of its row."""
        if not rows:
            raise ValueError("The batch has no rows, so there is nothing to collate: give at least one. [errors.md#collator]")
        rows = [{name: _plain(value) for name, value in row.items()} for row in rows]
        if not self.all_texts:
            return list(enumerate(rows))
        return [(index, sample) for index, row in enumerate(rows) for sample in self._each_text(index, row)]

    def _each_text(self, index: int, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """A row for each of its texts, in place of one with a list of them."""
        answer = self._answer_in(row)
        column = self.text_column if row.get(answer) is None else answer
        texts, prompts = row.get(column), row.get(self.prompt_column)
        if not isinstance(texts, list | tuple) or not texts:
            return [row]
        if not isinstance(prompts, list | tuple):
            return [{**row, column: text} for text in texts]
        if len(prompts) != len(texts):
            raise ValueError(
                f"Row {index} has {len(prompts)} in {self.prompt_column!r} and {len(texts)} in {column!r}: with "
                "all_texts=True each prompt goes with one text, or give one prompt (a string) for all. [errors.md#collator]"
            )
        return [{**row, column: text, self.prompt_column: prompt} for prompt, text in zip(prompts, texts, strict=True)]

    def _answer_in(self, row: Mapping[str, Any]) -> str:
        return self.answer_column if row.get(self.answer_column) is not None else "completion"

    def _read(self, index: int, row: Mapping[str, Any]) -> _Example:
        if row.get(self.messages_column) is not None:
            return self._read_messages(index, row)
        answer, text = row.get(self._answer_in(row)), row.get(self.text_column)
        if answer is None and text is None:
            hint = f"a {self.prompt_column!r} alone has nothing to learn; " if row.get(self.prompt_column) else ""
            raise ValueError(
                f"Row {index} has no {self.messages_column!r}, {self.text_column!r} or {self.answer_column!r} "
                f"({hint}its columns: {sorted(row)}). Set remove_unused_columns=False in TrainingArguments, or name "
                "the columns: DataCollatorForFrozenPrefix(processor, text_column=…, prompt_column=…, answer_column=…)."
                " [errors.md#collator]"
            )
        others = others_of(self.processor, row)
        images = self._images(index, row, required=not others)
        if answer is None:
            text = place_media(self.processor, self._draw(index, self.text_column, text), images, others)
            if self.is_encoder_decoder:  # the images and all before them are read, the rest is written
                end = max((text.rfind(token) + len(token) for token in self._placeholders if token in text), default=0)
                return _Example([(text[:end], False)], images, others, target=text[end:])
            return _Example([(text, True)], images, others, after_images=True)
        prompt, answer = row.get(self.prompt_column) or "", self._draw(index, self._answer_in(row), answer)
        if not isinstance(prompt, str):
            raise ValueError(
                f"Row {index}: column {self.prompt_column!r} must be a string, got {prompt!r:.80}. [errors.md#collator]"
            )
        prompt = place_media(self.processor, prompt, images, others)
        if self.is_encoder_decoder:
            return _Example([(prompt, False)], images, others, target=answer)
        joined = not prompt or prompt[-1].isspace() or prompt.endswith(self._placeholders)
        space = "" if joined or answer[:1].isspace() else " "
        return _Example([(prompt, False), (space + answer, True)], images, others, prompt_first=True)

    @property
    def _placeholders(self) -> tuple[str, ...]:
        return tuple(self.processor.tokens.values())

    def _draw(self, index: int, column: str, value: Any) -> str:
        """The text itself, or one of several."""
        if isinstance(value, list | tuple) and value:
            value = value[draw(len(value), self.seed, *value)] if len(value) > 1 else value[0]
        if not isinstance(value, str):
            what = "an empty list" if isinstance(value, list | tuple) and not value else f"{value!r:.80}"
            raise ValueError(
                f"Row {index}: column {column!r} must be a string or a list of them, got {what}. [errors.md#collator]"
            )
        return value

    def _images(self, index: int, row: Mapping[str, Any], required: bool) -> list[Any]:
        images = images_of(row, self.image_column)
        if images is None and required:
            raise ValueError(
                f"Row {index} has {no_image_column(row, self.image_column)}. Trainer drops it unless "
                "TrainingArguments(remove_unused_columns=False). If it has another name, pass image_column=…; a text-only row "
                "has None in it. [errors.md#collator]"
            )
        return images or []

    def _shows_something(self, row: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
        """Whether a row that may be of text alone is none: its image column was named, or another one holds an image."""
        return not others and (self.image_column is not None or unread_image(row) is not None)

    def _read_messages(self, index: int, row: Mapping[str, Any]) -> _Example:
        """A chat as pieces, cut at both ends of each assistant turn: so the prompt's tokens are those of inference."""
        messages, media = clean_messages(row[self.messages_column])
        images, in_turns = media.pop("image"), {name: own for name, own in media.items() if own}
        others = {**others_of(self.processor, row), **in_turns}
        for modality in OTHERS:
            if modality not in self.processor.tokens and any(_has_item(one.get("content"), modality) for one in messages):
                raise ValueError(
                    f"Row {index} has {modality} in its turns, and the processor takes {list(self.processor.tokens)} alone."
                    " [errors.md#collator]"
                )
        if not images:
            images = self._images(index, row, required=self._shows_something(row, others))
            messages = place_in_turns(self.processor, messages, len(images))
        for modality in set(others) - set(in_turns):
            messages = place_in_turns(self.processor, messages, len(others[modality]), modality)
        tokenizer = self.processor.tokenizer
        learnt = [message.pop("loss", True) for message in messages if message["role"] == "assistant"]
        learnt = [flag and (self.train_on == "all" or i == len(learnt) - 1) for i, flag in enumerate(learnt)]
        if not any(learnt):
            raise ValueError(
                f"Row {index}: its messages have no assistant turn to learn, so there is nothing to learn."
                " [errors.md#collator]"
            )
        messages = [{key: value for key, value in message.items() if key != "loss"} for message in messages]
        if not self._takes_strings:
            messages = [_with_content_list(message) for message in messages]
        target, spans = None, list[tuple[int, int]]()
        if self.is_encoder_decoder:
            if messages[-1]["role"] != "assistant" or not learnt[-1]:
                raise ValueError(
                    f"Row {index}: for an encoder-decoder the last message must be the assistant's, and learnt."
                    " [errors.md#collator]"
                )
            target = plain_text(messages[-1]["content"])
            text = _render(self.processor, messages[:-1], add_generation_prompt=True)
        else:
            text, spans = assistant_spans(self.processor, messages, index)
            if len(spans) != len(learnt):
                if not all(learnt):
                    raise ValueError(
                        f"Row {index} has {len(learnt)} assistant turns, but the template's {{% generation %}} marks "
                        f"{len(spans)}, so it can't be told which are not to be learnt: learn all, or give the processor a "
                        "template that marks each turn once. [errors.md#collator]"
                    )
                learnt = [True] * len(spans)
        add_eos = False
        if spans and not text[spans[-1][1] :].strip():
            if not text[: spans[-1][1]].rstrip().endswith(tuple(_stop_tokens(self.processor))):
                text, add_eos = text[: spans[-1][1]], True
        pieces, turn_ends, last = list[tuple[str, bool]](), list[int](), 0
        for (start, end), flag in zip(spans, learnt, strict=False):
            pieces += [piece for piece in ((text[last:start], False), (text[start:end], flag)) if piece[0]]
            turn_ends.append(len(pieces))
            last = end
        # transformers' rule for rendered chats: a BOS that the template wrote is not added again.
        bos = tokenizer.special_tokens_map.get("bos_token")
        special = not (bos and text.startswith(bos))
        pieces.append((text[last:], False))
        return _Example(pieces, images, others, target, add_special_tokens=special, add_eos=add_eos, turn_ends=turn_ends)

    # -------------------------------------------------------------------------------------------------- token ids
    @property
    def _ids_of_eos(self) -> list[int]:
        eos = self.processor.tokenizer.eos_token_id
        return self._after if eos is None else [eos]

    def _tokenize(self, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        return self.processor.tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _context(self, before: str) -> str:
        """What a piece is tokenised behind, in place of all the text before: its special token, else a line break."""
        return next((token for token in self._special_tokens if before.endswith(token)), "\n")

    def _encode(self, examples: list[_Example]) -> None:
        """Fill ids, learn and fixed of every example; the texts of all of them in one tokenizer call."""
        texts, heads = [], []
        for example in examples:
            example.pieces = [piece for piece in example.pieces if piece[0]]
            texts += [text for text, _ in example.pieces]
            heads += [""] * len(example.pieces)
            for i in range(1, len(example.pieces) if self._adds_space else 0):
                heads[len(heads) - len(example.pieces) + i] = self._context(example.pieces[i - 1][0])
        encoded = self._tokenize([head + text for head, text in zip(heads, texts, strict=True)]) if texts else []
        known = dict(zip(set(heads), self._tokenize(list(set(heads))), strict=True)) if any(heads) else {"": []}
        for i, ids in enumerate(encoded):
            head = known[heads[i]]
            encoded[i] = ids[len(head) :] if ids[: len(head)] == head else self._tokenize([texts[i]])[0]
        ids_of = {getattr(self.processor, f"{modality}_token_id"): modality for modality in self.processor.tokens}
        rest, number = iter(encoded), 0
        eos = self.processor.tokenizer.eos_token_id
        for index, example in enumerate(examples):
            ids = list(self._before) if example.add_special_tokens else []
            learn, fixed, seen = [False] * len(ids), [True] * len(ids), dict.fromkeys(["image", *OTHERS], 0)
            for piece, (_, learnt) in enumerate(example.pieces, start=1):
                for token in next(rest):
                    modality, count = ids_of.get(token), 1
                    if modality is not None:
                        at = {"image_idx": number + seen["image"]}
                        is_image = modality == "image"
                        count = self.processor.num_image_tokens(**at) if is_image else self.processor.num_tokens(modality)
                        if is_image and seen["image"] < len(example.images):
                            count *= self.processor.count_tiles(example.images[seen["image"]])
                        seen[modality] += 1
                    ids += [token] * count
                    learn += [learnt and modality is None] * count
                    fixed += [modality is not None] * count
                if piece in example.turn_ends:
                    example.cuts.append((len(ids), dict(seen)))
            for modality, media in {"image": example.images, **dict.fromkeys(OTHERS, []), **example.others}.items():
                if seen[modality] != len(media):
                    token = self.processor.tokens.get(modality)
                    raise ValueError(
                        f"Row {index} holds {seen[modality]} {token} but has {len(media)} {modality}s. Write one {token} per "
                        f"{modality}, or none: then they are put in. [errors.md#placeholders]"
                    )
            number += seen["image"]
            if example.after_images and any(seen.values()):
                first = fixed.index(True, len(self._before))
                learn = [flag and i > first for i, flag in enumerate(learn)]
            if example.target is not None:
                ids += self._after if example.add_special_tokens else []
            elif example.add_eos and ids[-1:] != [eos]:
                ids += self._ids_of_eos
            ends_learnt = example.target is None and not (example.turn_ends and not example.pieces[-1][1])
            learn += [ends_learnt] * (len(ids) - len(learn))
            fixed += [example.target is not None] * (len(ids) - len(fixed))
            example.ids, example.learn, example.fixed = ids, learn, fixed

    def _truncate(self, index: int, example: _Example) -> None:
        excess = len(example.ids) - self.max_length if self.max_length is not None else 0
        if excess > 0 and len(example.cuts) > 1:
            excess = self._cut_turns(index, example)
        if excess <= 0:
            return
        order = [i for i, fixed in enumerate(example.fixed) if not fixed]
        order = order if self.processor.tokenizer.truncation_side == "left" else order[::-1]
        if example.prompt_first:
            order.sort(key=lambda i: example.learn[i])  # stable: the side's order within each part
        gone = set(order[:excess])
        kept = [i for i in range(len(example.ids)) if i not in gone]
        learnt = any(example.learn[i] for i in kept) or example.target is not None
        if len(order) < excess or not learnt:
            fixed = len(example.ids) - len(order)
            raise ValueError(
                f"Row {index}: {len(example.images)} images and special tokens take {fixed} positions that are never "
                f"cut, its text {len(order)}; max_length={self.max_length} leaves nothing to learn. Use a larger "
                "max_length, fewer images per row, a smaller prefix_length, or leave such rows out. [errors.md#collator]"
            )
        for name in ("ids", "learn", "fixed"):
            values = getattr(example, name)
            setattr(example, name, [values[i] for i in kept])

    def _cut_turns(self, index: int, example: _Example) -> int:
        """Leaves out the last turns of a chat, with their media, down to its first answer; returns what is still too much."""
        assert self.max_length is not None
        eos = self._ids_of_eos if example.add_eos else []
        lengths = [length + len(eos) for length, _ in example.cuts]
        kept = max((number for number, length in enumerate(lengths) if length <= self.max_length), default=0)
        while not any(example.learn[: example.cuts[kept][0]]) and kept < len(lengths) - 1:
            kept += 1  # what is learnt stands further on
        (end, seen), rest = example.cuts[kept], len(example.cuts) - 1 - kept
        if rest:
            self.tally.add(
                "chats cut", f"row {index}: {rest} of {len(lengths)} assistant turns are past max_length={self.max_length}"
            )
        example.ids = [*example.ids[:end], *eos]
        example.learn = [*example.learn[:end], *[example.learn[end - 1]] * len(eos)]
        example.fixed = [*example.fixed[:end], *[False] * len(eos)]
        example.images = example.images[: seen["image"]]
        example.others = {modality: media[: seen[modality]] for modality, media in example.others.items()}
        return len(example.ids) - self.max_length

    def _targets(self, examples: list[_Example]) -> list[list[int]]:
        """The decoder's ids: the target as the tokenizer writes targets (language codes), with EOS at the end."""
        tokenizer = self.processor.tokenizer
        texts = [example.target for example in examples]
        encoded = tokenizer(text_target=texts, return_attention_mask=False, verbose=False)["input_ids"]
        targets = []
        for ids in encoded:
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids = [*ids, tokenizer.eos_token_id]
            targets.append(list(ids[: self.max_length]))
        return targets


# ------------------------------------------------------------------------------------------------------------- images
def _plain(value: Any) -> Any:
    """An array of objects or strings, as pandas and numpy's format of `datasets` have them, as a list."""
    return value.tolist() if getattr(getattr(value, "dtype", None), "kind", "") in ("O", "U") else value


def image_identity(image: Any) -> Any:
    """Equal for images that are surely the same: by object, path, bytes or place in a store."""
    if isinstance(image, StoredImage | str | bytes):
        return image
    if isinstance(image, Mapping):
        data, path = image.get("bytes"), image.get("path")
        return (type(data), data) if isinstance(data, bytes) else path if isinstance(path, str) else id(image)
    return id(image)


# -------------------------------------------------------------------------------------------------------------- chats
def others_of(processor: Any, row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Videos and audio of a row, by modality, for those that the processor takes and the row has a column of."""
    media = {}
    for modality in OTHERS:
        column = find_column(row, modality=modality)
        if modality in processor.tokens and column is not None:
            own = [] if row[column] is None else processor.nest_media(modality, row[column])[0]
            media[modality] = [one for some in own for one in some]
    return media


def open_media(processor: Any, modality: str, media: Any, name: str) -> Any:
    """The frames of a video that the model sees, or a waveform at the rate of the feature extractor."""
    if modality == "video":
        return load_video(media, processor.num_frames, name)
    return load_waveform(media, processor.feature_extractor.sampling_rate, name)


def place_media(processor: Any, text: str, images: Sequence[Any], others: Mapping[str, Sequence[Any]]) -> str:
    """The text with a placeholder for each image, video and audio, where it has none of that modality."""
    order = [("image", images), *others.items()]
    for modality, media in order if processor.image_position == "end" else order[::-1]:
        text = processor.place_images(text, len(media), modality)
    return text


def clean_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Messages without the None that Arrow fills in, and the images, videos and audio in their turns."""
    cleaned = []
    media: dict[str, list[Any]] = {modality: [] for modality in ("image", *OTHERS)}
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content", "")
        if not isinstance(content, str):
            items = []
            for item in content:
                item = {"type": "text", "text": item} if isinstance(item, str) else item
                item = {key: value for key, value in item.items() if value is not None}
                if item.get("type") == "image_url":  # OpenAI's form
                    url = item["image_url"]
                    item = {"type": "image", "url": url["url"] if isinstance(url, Mapping) else url}
                if item.get("type") in media:
                    media[item["type"]] += [item[key] for key in _MEDIA_KEYS if key in item]
                    item = {"type": item["type"]}
                items.append(item)
            content = items
        cleaned.append({**message, "content": content})
    return cleaned, media


def place_in_turns(
    processor: Any, messages: list[dict[str, Any]], count: int, modality: str = "image"
) -> list[dict[str, Any]]:
    """Images (videos, audio) that came in a column, in the first user turn, unless the turns have placeholders already."""
    turns = [message["content"] for message in messages]
    if not count or any(_has_item(one, modality) or processor.count_image_tokens(plain_text(one), modality) for one in turns):
        return messages
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    own, items = turns[first], [{"type": modality}] * count
    if isinstance(own, str) or all(item.get("type") == "text" for item in own):
        content: Any = processor.place_images(plain_text(own), count, modality)
    else:
        content = [*own, *items] if processor.image_position == "end" else [*items, *own]
    return [{**one, "content": content} if i == first else one for i, one in enumerate(messages)]


def _has_item(content: Any, modality: str) -> bool:
    return not isinstance(content, str) and any(item.get("type") == modality for item in content or ())


def plain_text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(item.get("text", "") for item in content)


def _render(processor: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return processor.apply_chat_template(messages, tokenize=False, **options)


def _special_tokens(processor: Any) -> list[str]:
    """Special and added tokens, long ones first."""
    tokenizer = processor.tokenizer
    return sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)


def _stop_tokens(processor: Any) -> list[str]:
    """Those of them that may end a turn."""
    special = processor.tokenizer.special_tokens_map
    bos = special.get("bos_token") if special.get("bos_token") != special.get("eos_token") else None
    return [token for token in _special_tokens(processor) if token not in (*processor.tokens.values(), bos)]


def assistant_spans(processor: Any, messages: list[dict[str, Any]], index: int = 0) -> tuple[str, list[tuple[int, int]]]:
    """A rendered chat and the (start, end) characters of what the assistant is to say in it.

    Templates with `{% generation %}` mark it themselves. With others a turn runs from the end of the generation prompt
    (rendered with the turns before it) through the end token that follows the content. The content is found by
    rendering once more with private-use characters around it, not as the difference of growing prefixes: templates
    that rewrite earlier turns (reasoning models) have no such prefixes.

    Raises: ValueError where the template changes what the assistant said.
    """
    template = processor.template_of()
    if template is not None and re.search(r"\{%-?\s*generation\s*-?%\}", template):
        rendered: tuple[Any, Any] = render_jinja_template(  # type: ignore[assignment]  # it gives the spans too
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
        return rendered[0][0], list(rendered[1][0])

    text = _render(processor, messages)
    turn_of = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for strip in (False, True):  # many templates trim content; inside the marks they can't
        marked = _render(processor, [_mark(message, strip) for message in messages])
        contents = list(re.finditer(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}", marked))
        whole = marked.replace(_OPEN, "").replace(_CLOSE, "") == text
        if whole and len(contents) == marked.count(_OPEN) == marked.count(_CLOSE) == len(turn_of):
            break
    else:
        raise ValueError(
            f"Row {index}: the chat template changes what the assistant says, so it can't be located in the "
            "rendered chat. Give the processor a template with {% generation %} … {% endgeneration %} around its turns."
            " [errors.md#collator]"
        )
    stop = re.compile(r"\s*(?:" + "|".join(map(re.escape, _stop_tokens(processor))) + ")")
    spans, position = list[tuple[int, int]](), 0
    for number, match in enumerate(contents):
        start = match.start() - 2 * number
        end = start + len(match.group(1))
        try:
            prompt = _render(processor, messages[: turn_of[number]], add_generation_prompt=True)
        except Exception:  # templates refuse empty or unusual chats
            prompt = text[:start]
        if text.startswith(prompt) and position <= len(prompt) <= start:
            start = len(prompt)
        ending = stop.match(text, end)
        position = ending.end() if ending else end
        spans.append((start, position))
    return text, spans


def _mark(message: dict[str, Any], strip: bool) -> dict[str, Any]:
    if message["role"] != "assistant":
        return message
    if isinstance(message["content"], str):
        return {**message, "content": f"{_OPEN}{message['content'].strip() if strip else message['content']}{_CLOSE}"}
    items = [dict(item) for item in message["content"]]
    for place, mark in ((0, _OPEN), (-1, _CLOSE)):
        if not items or items[place].get("type") != "text":
            items.insert(len(items) if place else 0, {"type": "text", "text": ""})
        text = items[place]["text"]
        text = (text.rstrip() if place else text.lstrip()) if strip else text
        items[place]["text"] = text + mark if place else mark + text
    return {**message, "content": items}


def _with_content_list(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def _takes_strings(processor: Any) -> bool:
    """Whether the chat template renders content that is a string; some take lists alone, and print nothing of a string."""
    try:
        return "fp-probe" in _render(processor, [{"role": "user", "content": "fp-probe"}])
    except Exception:  # templates refuse unusual chats
        return True
