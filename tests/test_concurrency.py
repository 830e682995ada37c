"""One model in many threads, and for a long time: the same words as one after the other, and no memory that stays."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_frozen import DataCollatorForFrozenPrefix
from tests.helpers.tiny import join, rows


FUSIONS = {
    "prefix": {},
    "cross_attention": {"fusion": "cross_attention", "cross_attention_config": {"num_heads": 2, "head_dim": 8}},
}
PROMPTS = ["a picture", "what colour ?", "a", "that is a"]


def opened(folder: Path, fusion: str) -> tuple[Any, Any]:
    """A model whose pictures change what it says; gates are shut at first."""
    model, processor = join(folder, **FUSIONS[fusion])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.fill_(2.0)
    model.generation_config.eos_token_id = None
    return model, processor


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """All at once; what one raises is raised."""
    output: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(i: int) -> None:
        barrier.wait()
        try:
            output[i] = calls[i]()
        except Exception as error:
            output[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in output:
        if isinstance(result, Exception):
            raise result
    return output


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
def test_eight_threads_say_what_one_says(tmp_path: Path, fusion: str, options: dict[str, Any]) -> None:
    model, processor = opened(tmp_path, fusion)
    generator = torch.Generator().manual_seed(0)
    calls = []
    for i in range(8):
        inputs = dict(processor(images=rows(8)[i]["image"], text=PROMPTS[i % 4], return_tensors="pt"))
        inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=generator)
        if i == 7:  # words alone, among the others
            inputs = dict(processor(text="a picture that", return_tensors="pt"))
        calls.append(lambda inputs=inputs: model.generate(**inputs, max_new_tokens=8, do_sample=False, **options))
    alone = [call() for call in calls]
    assert len({tuple(one[0, -8:].tolist()) for one in alone}) > 3  # pictures matter
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(alone, in_threads(calls), strict=True))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_threads_score_and_differentiate_as_one(tmp_path: Path, fusion: str) -> None:
    model, processor = opened(tmp_path, fusion)
    collator = DataCollatorForFrozenPrefix(processor)
    batches = [collator(rows(8)[i : i + 2]) for i in range(0, 8, 2)]
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradients(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [g for g in torch.autograd.grad(model(**batch).loss, weights, allow_unused=True) if g is not None]

    calls = [lambda batch=batch: gradients(batch) for batch in batches]
    alone = [call() for call in calls]
    for one, other in zip(alone, in_threads(calls), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def tensors() -> int:
    gc.collect()
    return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("calls", [80, pytest.param(200, marks=pytest.mark.slow)])
def test_many_calls_leave_nothing_behind(tmp_path: Path, fusion: str, calls: int) -> None:
    model, processor = opened(tmp_path, fusion)
    process = pytest.importorskip("psutil").Process()
    image = rows(1)[0]["image"]

    def call(i: int) -> None:
        inputs = processor(images=image, text=PROMPTS[i % 4], return_tensors="pt")
        model.generate(**inputs, max_new_tokens=4, do_sample=False)

    for i in range(20):  # allocators and lazy modules are warm then
        call(i)
    count, memory = tensors(), process.memory_info().rss
    for i in range(calls):
        call(i)
    assert tensors() <= count + 2
    assert process.memory_info().rss - memory < 4 * 2**20  # 200 caches alone would be 1.6 MB, their graphs far more


@pytest.mark.parametrize("fusion", FUSIONS)
def test_steps_of_training_leave_nothing_behind(tmp_path: Path, fusion: str) -> None:
    model, processor = opened(tmp_path, fusion)
    batch = DataCollatorForFrozenPrefix(processor)(rows(8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    counts = []
    for step in range(30):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss
        if step in (9, 29):
            counts.append(tensors())
    assert counts[1] <= counts[0]
