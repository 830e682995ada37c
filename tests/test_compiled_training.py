"""`torch.compile(model)` in training: the loss by chunks of labels and what rows have in common stay as they are uncompiled,
tower, connector and language model are compiled, and lengths that change compile nothing anew."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration
from tests.helpers import families_joined, tiny
from tests.helpers.families_joined import IMAGE, PREFIX, pictures
from tests.helpers.families_text import DECODERS, VOCAB_SIZE
from tests.helpers.tiny import skip_where_torch_traces_no_forward
from tests.helpers.training import arguments


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(family: str = "llama", **options: Any) -> FrozenPrefixForConditionalGeneration:
    return families_joined.build(family, connector_type="mlp", **options).train()


def batch(family: str = "llama", rows: int = 3, words: int = 5, images: int = 1) -> dict[str, Any]:
    """Captions of unequal length, one behind each use of an image, padded on the right."""
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, VOCAB_SIZE - 8, (words - row % 2,), generator=generator).tolist() for row in range(rows)]
    decodes = family in DECODERS
    ids = [[5] + [IMAGE] * PREFIX + (text if decodes else []) for text in texts]
    padded = torch.tensor([one + [0] * (max(map(len, ids)) - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (padded.shape[1] - len(one)) for one in ids])
    written = torch.tensor([text + [-100] * (words - len(text)) for text in texts])
    labels = padded.masked_fill((mask == 0) | (padded == IMAGE) | (padded == 5), -100) if decodes else written
    index = torch.arange(rows) % images
    return {
        "input_ids": padded, "attention_mask": mask, "labels": labels, "pixel_values": pictures(images), "image_index": index,
    }  # fmt: skip


class Recorder:
    """A backend of `torch.compile` that keeps what it is given and runs it as it is."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.calls: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        number = len(self.graphs)
        self.graphs.append(graph)

        def run(*args: Any) -> Any:
            self.calls.append(number)
            return graph(*args)

        return run

    def most_logits(self) -> int:
        """Most values of a tensor with the vocabulary as its last axis."""
        values = [node.meta.get("example_value") for graph in self.graphs for node in graph.graph.nodes]
        tensors = [one for one in values if isinstance(one, torch.Tensor) and one.ndim > 1 and one.shape[-1] == VOCAB_SIZE]
        return max((one.numel() for one in tensors), default=0)

    def products(self) -> list[int]:
        """How many products with weights each graph runs."""
        names = ("linear", "addmm")
        return [sum(any(name in str(node.target) for name in names) for node in graph.graph.nodes) for graph in self.graphs]


def step(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**inputs, loss_config={"chunk_size": 3}, **options)
    output.loss.backward()
    return output, {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_equal(one: tuple, other: tuple) -> None:
    torch.testing.assert_close(one[0].loss, other[0].loss, atol=1e-6, rtol=1e-5)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt_350m", pytest.param("t5", marks=pytest.mark.slow)])
def test_no_graph_holds_logits(family: str) -> None:
    model, recorder = build(family), Recorder()
    plain = step(model, batch(family, images=3))
    compiled = torch.compile(model, backend=recorder)
    ours = step(compiled, batch(family, images=3))
    check_equal(plain, ours)
    assert ours[0].logits is None and recorder.most_logits() == 0
    skip_where_torch_traces_no_forward()
    assert sum(products >= 4 for products in recorder.products()) == 2, "tower and language model are to be compiled"


def test_an_image_of_several_captions_is_read_once() -> None:
    model, recorder = build(prefix_length=None), Recorder()
    inputs = batch(rows=6, images=1)
    ours = step(torch.compile(model, backend=recorder), inputs)  # before what is tried once is tried uncompiled
    check_equal(step(model, inputs), ours)
    skip_where_torch_traces_no_forward()
    read = []
    for graph, products in zip(recorder.graphs, recorder.products(), strict=True):
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        embeds = [value.shape[:2] for value in values if value.ndim == 3 and value.shape[-1] == model.config.embedding_dim]
        read += [tuple(map(int, shape)) for shape in embeds if products >= 4]
    # The last vector of the prefix foretells each caption's first word, so it is read with each.
    assert read == [(1, PREFIX), (6, 1 + 5)], "the prefix once, the captions by themselves"


def test_changing_lengths_compile_nothing_anew() -> None:
    model, recorder = build(), Recorder()
    compiled = torch.compile(model, backend=recorder)
    seen = []
    for words, rows in itertools.product((5, 7, 8, 10, 11, 12), (4, 6)):
        inputs = batch(rows=rows, words=words, images=2)
        check_equal(step(model, inputs), step(compiled, inputs))
        seen.append(len(recorder.graphs))
    # Once as they come, and once for any length and any number of rows.
    assert seen[-1] == seen[2] <= 8, seen
    skip_where_torch_traces_no_forward()
    assert seen[0] > 1


def test_one_graph_is_to_be_had_with_all_logits() -> None:
    skip_where_torch_traces_no_forward()
    model = build()
    inputs = batch(images=3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ours = step(compiled, inputs, skip_logits=False)
    check_equal(step(model, inputs), ours)
    assert ours[0].logits.shape[:2] == inputs["labels"].shape


def test_gated_blocks_too() -> None:
    model = build(fusion="cross_attention", cross_attention_config={"num_heads": 2, "head_dim": 8})
    for parameter in (p for name, p in model.named_parameters() if name.endswith("gate")):
        torch.nn.init.constant_(parameter, 0.5)
    inputs, recorder = batch(images=3), Recorder()
    ids = inputs["input_ids"]
    for name in ("input_ids", "attention_mask", "labels"):
        inputs[name] = torch.cat([inputs[name][:, :2], inputs[name][:, 1 + PREFIX :]], 1)
    assert (inputs["input_ids"] == IMAGE).sum() == len(ids)
    check_equal(step(model, inputs), step(torch.compile(model, backend=recorder), inputs))
    assert recorder.most_logits() == 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_trainer_compiles_it(tmp_path: Path, backend: str) -> None:
    tiny.save_parents(tmp_path)
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        torch.manual_seed(0)
        model, processor = tiny.join(tmp_path)
        recorded = []
        model.register_forward_hook(lambda _, __, output, kept=recorded: kept.append(output.get("logits")))
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path / "out", max_steps=4, logging_steps=1, **options),
            train_dataset=tiny.rows(16),
            data_collator=DataCollatorForFrozenPrefix(processor),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert recorded == [None] * 4
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-4, rtol=1e-4)
