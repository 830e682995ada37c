"""What a stranger gets: README's first snippet as it is written, and what follows from it.

    mkdir -p SOMEWHERE/benchmarks && cp -r README.md tests .ci/stranger.py SOMEWHERE
    cp -r benchmarks/__init__.py benchmarks/loopback_hub SOMEWHERE/benchmarks && cd SOMEWHERE && python stranger.py

Runs beside the package as it was installed, outside a checkout, against the tests' Hub on the loopback address. Only names are
put in place of those in the snippet: tiny random parents, a dataset of plain squares, a picture. Then a training that stops
and goes on, and another machine, which has no package, loads what was pushed.
"""

import re
import tempfile
import time
from pathlib import Path

from tests.helpers.hub_fixtures import Hub


PARENTS = """
import pathlib
import modeling_frozen
from datasets import Dataset
from huggingface_hub import HfApi
from tests.helpers import tiny

assert "site-packages" in modeling_frozen.__file__, modeling_frozen.__file__
for name, folder in zip(("me/tower", "me/words"), tiny.save_parents(pathlib.Path("parents"))):
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder)
rows = tiny.rows(16)
Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]}).to_parquet("squares.parquet")
HfApi().create_repo("me/squares", repo_type="dataset")
HfApi().upload_file(
    repo_id="me/squares", repo_type="dataset", path_or_fileobj="squares.parquet", path_in_repo="data/train.parquet"
)
"""

IN_PLACE = {
    "google/siglip2-base-patch16-224": "me/tower",
    "Qwen/Qwen3-0.6B": "me/words",
    'load_dataset("…"': 'load_dataset("me/squares"',
}
PICTURE = "from PIL import Image\nimage = Image.new('RGB', (20, 18), 'red')\n"

RESUME = """
import torch
from tests.helpers import tiny
from transformers import Trainer, TrainingArguments
from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor

def train(resume):
    torch.manual_seed(0)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained("me/tower", "me/words", connector_type="mlp")
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
    snippet = re.search(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    for written, tiny in IN_PLACE.items():
        assert written in snippet, f"README's first snippet has no {written!r} any more"
        snippet = snippet.replace(written, tiny)
    with tempfile.TemporaryDirectory() as folder:
        hub = Hub(Path(folder))
        try:
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
