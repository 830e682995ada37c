"""What the functions of `interpret` return, and their figures: prefixes as a table of words, attention over the image,
words coloured by what they lose without it. Figures are drawn by `plot()`, which needs matplotlib (the extra `plots`).
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import torch

from ..evaluation.plots import BLUE, GREY, finish, new_figure, plain_axes, show_image, shown


def _ink(colour: Any) -> str:
    """Black or white, whichever has more contrast on a colour (WCAG 2.2, relative luminance)."""
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in colour[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


# -------------------------------------------------------------------------------------------------------- nearest words


@dataclass
class NearestWords:
    """
    Of `nearest_words`: a list over images in each field.

    Args:
        words: `words[image][position][rank]`.
        ids (`list[torch.LongTensor]` of shape `(prefix_length, top_k)`): theirs.
        similarities (`list[torch.FloatTensor]` of shape `(prefix_length, top_k)`): cosines.
        norms (`list[torch.FloatTensor]` of shape `(prefix_length,)`): L2 norms of the prefix vectors.
        word_norm: the median L2 norm of the words' embeddings, to compare with.
        images: as they were passed.
    """

    words: list[list[list[str]]]
    ids: list[torch.Tensor]
    similarities: list[torch.Tensor]
    norms: list[torch.Tensor]
    word_norm: float
    images: list[Any] = field(default_factory=list, repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """One plain row per image, position and rank: for a table, a data frame or JSON."""
        return [
            {"image": image, "position": position, "rank": rank, "word": word, "similarity": float(value)}
            for image, (words, similarities) in enumerate(zip(self.words, self.similarities, strict=True))
            for position, (row, values) in enumerate(zip(words, similarities, strict=True))
            for rank, (word, value) in enumerate(zip(row, values, strict=True))
        ]

    def table(self, image: int = 0) -> str:
        """One line per prefix vector of an image: its nearest words with their cosines, to be printed."""
        lines = []
        for position, (words, values) in enumerate(zip(self.words[image], self.similarities[image].tolist(), strict=True)):
            cells = (f"{word.strip() or repr(word)} {value:.2f}" for word, value in zip(words, values, strict=True))
            lines.append(f"{position:>4}  " + "  ".join(f"{cell:<16}" for cell in cells).rstrip())
        return "\n".join(lines)

    def plot(
        self, path: str | Path | None = None, *, image: int = 0, max_positions: int = 32, width: float | None = None
    ) -> Any:
        """A table of one image's prefix, darker where a word is nearer; a matplotlib `Figure`, written to `path`. Where
        `width` (inches) is too little for the image beside it, or for all ranks, these are left out."""
        return _draw_nearest_words(self, path, image=image, max_positions=max_positions, width=width)


def _draw_nearest_words(
    result: NearestWords,
    path: str | Path | None = None,
    *,
    image: int = 0,
    max_positions: int = 32,
    width: float | None = None,
) -> Any:
    """A row per prefix vector, a column per rank, darker where the word is nearer."""
    words, values = result.words[image][:max_positions], result.similarities[image][:max_positions]
    shown_image = result.images[image] if result.images else None
    column, beside, around = 1.15, 2.6, 1.9  # inches
    if width is not None:
        column = 0.9
        room = max(1, int((width - around) / column))
        if around + beside + column * len(words[0]) > width:
            shown_image = None
        words, values = [row[:room] for row in words], values[:, :room]
    positions, top_k = len(words), len(words[0])
    table_width = around + column * top_k
    alone = shown_image is None
    figure = new_figure(table_width + (0 if alone else beside), max(2.8 if alone else 3.4, 0.34 * positions + 1.2))
    if shown_image is None:
        axes = figure.add_subplot()
    else:
        left, axes = figure.subplots(1, 2, width_ratios=[beside, table_width])
        show_image(left, shown_image)
        left.set_anchor("N")
        norms = result.norms[image]
        left.set_xlabel(
            f"L2 norm of its prefix vectors:\n{float(norms.mean()):.2f} on average; words: {result.word_norm:.2f}",
            fontsize=9,
            color=GREY,
        )
    highest = max(float(values.max()), 0.6)  # so that figures compare, and chance looks pale
    drawn = axes.imshow(values.numpy(), cmap="Blues", vmin=min(0.0, float(values.min())), vmax=highest, aspect="auto")
    for row, (names, cosines) in enumerate(zip(words, values.tolist(), strict=True)):
        for column, (name, cosine) in enumerate(zip(names, cosines, strict=True)):
            name = shown(name)
            name = name if len(name) <= 12 else name[:11] + "…"
            ink = _ink(drawn.cmap(drawn.norm(cosine)))
            axes.text(column, row, name, ha="center", va="center", fontsize=9.5, color=ink)
    axes.set_xticks(range(top_k), [str(rank + 1) for rank in range(top_k)])
    step = 1 if positions <= 40 else 5
    axes.set_yticks(range(0, positions, step), [str(position) for position in range(0, positions, step)])
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("nearest words, in order")
    total = len(result.words[image])
    axes.set_ylabel("prefix vector" + (f" (the first {positions} of {total})" if total > positions else ""))
    figure.colorbar(drawn, ax=axes, label="cosine similarity", pad=0.02, aspect=30)
    return finish(figure, path)


# ---------------------------------------------------------------------------------------------------- image attention


@dataclass
class ImageAttention:
    """
    Of `attention_to_image`.

    Args:
        words: what the model wrote (or the text that was passed), token by token.
        ids (`torch.LongTensor` of shape `(words,)`): theirs.
        attention (`list[torch.FloatTensor]` of shape `(heads, words, prefix_length)`, one per layer):
            From the place that wrote the word to each prefix vector, as a part of all its attention; the rest went to
            words. With gated cross-attention, which reads nothing but the image, rows sum to one.
        kind: `"self"` (decoders), `"cross"` (encoder-decoders), `"gated"` (gated cross-attention).
        origins (`torch.FloatTensor` of shape `(prefix_length, positions)`, *optional*):
            See [`~connector_attention.prefix_origins`].
        grid: rows and columns of the positions on the image; `None` where the prefix is not spatial.
        num_leading: positions before the grid's (class token …), with `vision_feature_select_strategy="full"`.
        why_not_spatial: the reason where `grid` is `None`.
        image (`torch.FloatTensor` of shape `(height, width, channels)`): what the tower saw, from 0 to 1.
        joined: the words that are drawn: each as text, and the tokens `[start, end)` that it is made of, over which its
            attention is averaged. Left empty, each token is a word.
    """

    words: list[str]
    ids: torch.Tensor
    attention: list[torch.Tensor]
    kind: str
    origins: torch.Tensor | None
    grid: tuple[int, int] | None
    num_leading: int
    why_not_spatial: str | None
    image: torch.Tensor = field(repr=False)
    joined: list[tuple[str, int, int]] = field(default_factory=list, repr=False)

    def by_word(self, layers: int | Sequence[int] | None = None) -> torch.Tensor:
        """Attention `(tokens, prefix_length)`, averaged over heads and over `layers` (an index or several; all)."""
        chosen = range(len(self.attention)) if layers is None else [layers] if isinstance(layers, int) else layers
        return torch.stack([self.attention[layer].mean(dim=0) for layer in chosen]).mean(dim=0)

    def share(self, layers: int | Sequence[int] | None = None) -> torch.Tensor:
        """The part `(words,)` of each word's attention that goes to the image."""
        return self.by_word(layers).sum(dim=-1)

    def maps(self, layers: int | Sequence[int] | None = None) -> torch.Tensor:
        """
        Attention laid out on the image: `(words, rows, columns)`.

        Raises:
            ValueError: if the prefix is not spatial; says why.
        """
        if self.grid is None or self.origins is None:
            raise ValueError(f"The prefix is not spatial: {self.why_not_spatial} Use `by_word()`. [errors.md#figures]")
        on_positions = self.by_word(layers) @ self.origins
        return on_positions[:, self.num_leading :].reshape(-1, *self.grid)

    def plot(
        self,
        path: str | Path | None = None,
        *,
        layers: int | Sequence[int] | None = None,
        max_words: int = 24,
        width: float | None = None,
    ) -> Any:
        """Over the image where the prefix is spatial, else bars; a matplotlib `Figure`, written to `path`, at most so many
        inches wide."""
        return _draw_attention(self, path, layers=layers, max_words=max_words, width=width)


def _draw_attention(
    result: ImageAttention,
    path: str | Path | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    max_words: int = 24,
    width: float | None = None,
) -> Any:
    """An image per word with the attention over it; without places, bars over the prefix vectors."""
    if not result.words:
        raise ValueError("There are no words to draw: the model wrote nothing but special tokens. [errors.md#figures]")
    averaged = "all layers" if layers is None else f"layer {layers}" if isinstance(layers, int) else f"layers {list(layers)}"
    title = f"Attention of each word to the image, averaged over heads and {averaged}"
    if result.kind == "cross":
        title = f"Cross-attention of each word to the image, averaged over heads and {averaged}"
    if result.kind == "gated":
        title = f"Attention of the gated blocks to the image, averaged over heads and {averaged}"
    draw = _draw_bars if result.grid is None else _draw_maps
    return finish(draw(result, title, layers, max_words, width), path)


def _spans(words: list[str], joined: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    return joined or [(word, index, index + 1) for index, word in enumerate(words)]


def _over_words(result: ImageAttention, values: torch.Tensor, max_words: int) -> torch.Tensor:
    """Values of tokens (first axis), averaged over those of each word that is drawn."""
    spans = _spans(result.words, result.joined)[:max_words]
    return torch.stack([values[start:end].mean(dim=0) for _, start, end in spans])


def _titles(result: ImageAttention, layers: Any, max_words: int) -> list[str]:
    words = [shown(word) for word, _, _ in _spans(result.words, result.joined)[:max_words]]
    if result.kind == "gated":  # all of it is the image's
        return words
    shares = _over_words(result, result.share(layers), max_words).tolist()
    return [f"{word}  {share:.0%}" for word, share in zip(words, shares, strict=True)]


def _fitted(text: str, wide: float, points: float) -> str:
    """A line broken so that it fits into so many inches, at about half its size a letter."""
    return textwrap.fill(text, int(wide * 72 / (0.58 * points)))


def _points(text: str, wide: float, most: float) -> float:
    """The size at which a line fits into so many inches; bold letters are two thirds of it wide."""
    return min(most, wide * 72 / (0.66 * len(text)))


def _draw_maps(result: ImageAttention, title: str, layers: Any, max_words: int, wide: float | None) -> Any:
    from matplotlib import colormaps

    titles = _titles(result, layers, max_words)
    height, width = result.image.shape[:2]
    side = 2.0 if wide is None else min(2.0, (wide - 1.1) / 2)
    columns = min(6 if wide is None else max(2, int((wide - 1.1) / side)), len(titles) + 1)
    rows = -(-(len(titles) + 1) // columns)
    wide = max(6.5, side * columns + 1.1) if wide is None else side * columns + 1.1
    title = _fitted(title, wide, 12)
    lines = 0.2 * title.count("\n")
    figure = new_figure(wide, (side * height / width + 0.3) * rows + 0.75 + 2 * lines)
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False)
    maps = _over_words(result, result.maps(layers), max_words)
    grey = result.image.mean(dim=-1, keepdim=True).expand(-1, -1, 3)
    grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp(min=0.2)  # outlines have to show through the colours
    colours, drawn = colormaps["viridis"], None
    for index, place in enumerate(axes.flat):
        place.set_axis_off()
        if index == 0:
            place.imshow(result.image.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            title = "what the tower saw"
            place.set_title(title, fontsize=_points(title, side, 10), color=GREY)
        elif index <= len(titles):
            there = maps[index - 1]
            there = there / there.max().clamp(min=1e-12)
            place.imshow((0.4 + 0.6 * grey).numpy())
            # Cells, not a smooth cloud: the model knows no finer places.
            drawn = place.imshow(
                there.numpy(), cmap=colours, vmin=0, vmax=1, alpha=0.62, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
            )
            title = titles[index - 1]
            place.set_title(title, fontsize=_points(title, side, 11), fontweight="bold")
    bar = figure.colorbar(drawn, ax=axes, location="right", shrink=0.8, aspect=25, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["none", "half", "most"])
    bar.set_label("attention, within each word")
    if result.kind != "gated":
        note = "Percentages: the part of the word's whole attention that goes to the image."
        figure.supxlabel(_fitted(note, wide, 9.5), fontsize=9.5, color=GREY)
    return figure


def _draw_bars(result: ImageAttention, title: str, layers: Any, max_words: int, wide: float | None) -> Any:
    titles, values = _titles(result, layers, max_words), 100 * _over_words(result, result.by_word(layers), max_words)
    wide = 7.6 if wide is None else min(7.6, wide)
    title = _fitted(title, wide, 12)
    figure = new_figure(wide, 0.55 * len(titles) + 1.7 + 0.2 * title.count("\n"))
    figure.suptitle(title, fontsize=12)
    all_axes = figure.subplots(len(titles), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, name, bars in zip(all_axes, titles, values, strict=True):
        plain_axes(axes).bar(range(len(bars)), bars.tolist(), color=BLUE, width=0.8)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11, fontweight="bold")
        axes.tick_params(length=2)
        axes.locator_params(axis="y", nbins=2)
    all_axes[-1].xaxis.get_major_locator().set_params(integer=True)
    reason = (result.why_not_spatial or "").rstrip(".")
    reason = _fitted(f"(no places on the image: {reason})", wide - 1.5, 9.5)
    all_axes[-1].set_xlabel(f"prefix vector\n{reason}", fontsize=9.5)
    figure.supylabel("% of the word's attention", fontsize=10)
    return figure


# --------------------------------------------------------------------------------------------------------- sightedness


@dataclass
class WordSightedness:
    """
    One text of `sightedness`.

    Args:
        words: the tokens that were scored, EOS among them where the model learns to write it.
        ids (`torch.LongTensor` of shape `(words,)`): theirs.
        log_likelihood (`torch.FloatTensor` of shape `(words,)`): nats, with the text's own image.
        swapped (`torch.FloatTensor` of shape `(others, words)`): nats, with each other image.
        image, prompt: as they were passed.
        joined: the words that are drawn: each as text, and the tokens `[start, end)` that it is made of, whose nats are
            added. Left empty, each token is a word.
    """

    words: list[str]
    ids: torch.Tensor
    log_likelihood: torch.Tensor
    swapped: torch.Tensor
    image: Any = field(default=None, repr=False)
    prompt: str = ""
    joined: list[tuple[str, int, int]] = field(default_factory=list, repr=False)

    @property
    def drop(self) -> torch.Tensor:
        """Nats `(tokens,)` that each token loses when the image is another, averaged over the others. Positive: its own
        image made it likelier; zero: the model did not use the image; negative: it was misled."""
        return self.log_likelihood - self.swapped.mean(dim=0)


@dataclass
class Sightedness:
    """Of `sightedness`: `samples`, one `WordSightedness` per text."""

    samples: list[WordSightedness]

    @property
    def mean(self) -> float:
        """Nats a token, over all tokens of all texts."""
        return float(torch.cat([sample.drop for sample in self.samples]).mean())

    def rows(self) -> list[dict[str, Any]]:
        """One plain row per token: for a table, a data frame or JSON."""
        return [
            {"text": text, "position": position, "word": word, "log_likelihood": own, "drop": drop}
            for text, sample in enumerate(self.samples)
            for position, (word, own, drop) in enumerate(
                zip(sample.words, sample.log_likelihood.tolist(), sample.drop.tolist(), strict=True)
            )
        ]

    def plot(self, path: str | Path | None = None, *, max_texts: int = 6, width: float = 8.8) -> Any:
        """Words coloured by their drop, beside their images; a matplotlib `Figure` so many inches wide, written to `path`."""
        return _draw_sightedness(self, path, max_texts=max_texts, wide=width)


def _draw_sightedness(result: Sightedness, path: str | Path | None = None, *, max_texts: int = 6, wide: float = 8.8) -> Any:
    """Each text beside its image, every word on the colour of its drop, with the number under it."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import FancyBboxPatch

    samples = result.samples[:max_texts]
    drops = [_drops(sample) for sample in samples]
    furthest = max([0.1, *(abs(drop) for some in drops for drop in some)])
    colours = ScalarMappable(TwoSlopeNorm(0, -furthest, furthest), colormaps["PuOr"])
    beside = min(1.7, wide / 4)
    width, line = wide - beside - 0.7, 0.56  # inches
    laid = [_lay_out(sample, width) for sample in samples]
    tops = [0.42 if sample.prompt else 0.12 for sample in samples]
    heights = [max(1.15, line * (rows[-1][0] + 1) + top) for rows, top in zip(laid, tops, strict=True)]
    title = _fitted("What each word loses when the image is another", wide, 12)
    label = _fitted("log-likelihood with its own image minus with others (nats per word)", wide, 11)
    figure = new_figure(wide, sum(heights) + 1.35 + 0.2 * f"{title}{label}".count("\n"))
    figure.suptitle(title, fontsize=12)
    all_axes = figure.subplots(len(samples), 2, squeeze=False, width_ratios=[beside, width], height_ratios=heights)
    for (left, right), sample, of_words, rows, height, top in zip(all_axes, samples, drops, laid, heights, tops, strict=True):
        if sample.image is None:
            left.set_axis_off()
        else:
            show_image(left, sample.image)
        right.set_axis_off()
        right.set_xlim(0, width)
        right.set_ylim(height, 0)
        if sample.prompt:
            prompt, room = " ".join(sample.prompt.split()), int(width * 72 / (0.58 * 10))
            prompt = prompt if len(prompt) <= room else f"… {prompt[2 - room :]}"  # a chat's question stands at its end
            right.text(0, 0.22, prompt, fontsize=10, color=GREY, va="center", style="italic")
        for (row, x, across, word), drop in zip(rows, of_words, strict=True):
            colour = colours.to_rgba(drop)
            y = top + line * row
            box = FancyBboxPatch(
                (x, y), across, 0.27, "round,pad=0,rounding_size=0.05", linewidth=0.6, facecolor=colour, edgecolor="#999999"
            )
            right.add_patch(box)
            right.text(x + across / 2, y + 0.135, word, ha="center", va="center", fontsize=10.5, color=_ink(colour))
            right.text(
                x + across / 2,
                y + 0.38,
                f"{drop:+.1f}".replace("-0.0", "+0.0"),
                ha="center",
                va="center",
                fontsize=7.5,
                color=GREY,
            )
    bar = figure.colorbar(colours, ax=all_axes, location="bottom", shrink=0.6, aspect=40, pad=0.02)
    bar.set_label(label)
    for left in all_axes[:, 0]:  # beside the first line; the bar moves them
        left.set_anchor("N")
    return finish(figure, path)


def _drops(sample: WordSightedness) -> list[float]:
    """Nats that each word loses, as they are drawn: those of its tokens together."""
    return [float(sample.drop[start:end].sum()) for _, start, end in _spans(sample.words, sample.joined)]


def _lay_out(sample: Any, width: float) -> list[tuple[int, float, float, str]]:
    """Row, left edge, width and text of each word, in inches, broken into lines."""
    places, row, x = [], 0, 0.0
    for word, _, _ in _spans(sample.words, sample.joined):
        word = shown(word)
        letters = sum(1.8 if east_asian_width(letter) in "WF" else 1.0 for letter in word)
        wide = max(0.36, 0.095 * letters + 0.14)
        if x and x + wide > width:
            row, x = row + 1, 0.0
        places.append((row, x, wide, word))
        x += wide + 0.06
    return places


__all__ = ["ImageAttention", "NearestWords", "Sightedness", "WordSightedness"]
