"""What a stranger gets: README's first snippet as it is written, and what follows from it.

    mkdir -p SOMEWHERE/benchmarks && cp -r README.md tests .ci/stranger.py SOMEWHERE
    cp -r benchmarks/__init__.py benchmarks/loopback_hub SOMEWHERE/benchmarks && cd SOMEWHERE && python stranger.py

Runs beside the package as it was installed, outside a checkout, against the tests' Hub on the loopback address, which serves
tiny random parents and plain squares under the names in the snippet. Then a training that stops and goes on, and another
machine, which has no package, loads what was pushed.
"""

import tempfile
import time
from pathlib import Path

from tests.helpers.docs_world import OWNERS, blocks
from tests.helpers.hub_fixtures import Hub


PARENTS = """
import modeling_frozen
from tests.helpers.docs_world import serve

assert "site-packages" in modeling_frozen.__file__, modeling_frozen.__file__
serve()
"""
PICTURE = "from PIL import Image\nimage = Image.new('RGB', (20, 18), 'red')\n"

RESUME = """
import torch
from tests.helpers import tiny
from transformers import Trainer, TrainingArguments
from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor

def train(resume):
    torch.manual_seed(0)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        "google/siglip2-base-patch16-224", "Qwen/Qwen3-0.6B", connector_type="mlp"
    )
    args = TrainingArguments(
        "eyes", max_steps=8, save_steps=4, learning_rate=1e-2, remove_unused_columns=False, use_cpu=True, report_to=[]
    )
    collator = DataCollatorForFrozenPrefix(FrozenPrefixProcessor.from_model(model))
    trainer = Trainer(model=model, args=args, train_dataset=tiny.rows(16), data_collator=collator)
    frozen = model.model.language_model
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    trainer.train(resume_from_checkpoint=resume)
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items())
    return {name: value.clone() for name, value in model.model.connector.state_dict().items()}

whole, resumed = train(None), train("eyes/checkpoint-4")
assert all(torch.equal(whole[name], value) for name, value in resumed.items())
"""

LOADED = """
import torch
from PIL import Image
{first}from transformers import AutoModelForImageTextToText, AutoProcessor

options = {options!r}
model = AutoModelForImageTextToText.from_pretrained("me/eyes", **options)
processor = AutoProcessor.from_pretrained("me/eyes", **options)
inputs = processor(images=Image.new("RGB", (20, 18), "red"), text="<image> a", return_tensors="pt")
print([round(value, 4) for value in model(**inputs).logits[0, -1].tolist()])
"""


def step(title: str, hub: Hub, code: str, **options: object) -> str:
    start = time.monotonic()
    printed = hub.run(code, **options)
    print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)
    return printed


def main() -> None:
    snippet = blocks(Path("README.md"), "python")[0][1]
    with tempfile.TemporaryDirectory() as folder:
        hub = Hub(Path(folder))
        try:
            hub.add_user("me", hub.token, orgs=OWNERS)
            step("tiny parents and a dataset on a Hub", hub, PARENTS)
            said = step("README's first snippet", hub, PICTURE + snippet)
            print(f"it says {said.splitlines()[-1]!r}")
            step("a training that stops and goes on", hub, RESUME)
            with_package = step("pulled with the package", hub, LOADED.format(first="import modeling_frozen\n", options={}))
            without = LOADED.format(first="", options={"trust_remote_code": True})
            assert step("pulled without the package", hub, without, package=False) == with_package
        finally:
            hub.stop()
    print("5 passed, 0 failed")


if __name__ == "__main__":
    main()
