# ruff: noqa: F811 (fixtures are imported by name)
"""Trainer with FrozenPrefixHubCallback against the test Hub: every commit is whole, and its card is ours.

One process trains and pushes; others, on machines that have downloaded nothing, load what each commit holds.
"""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

import pytest
from huggingface_hub import ModelCard

from modeling_frozen.model_card.edits import is_edited
from tests.helpers.hub_fixtures import Hub, module_hub  # noqa: F401


pytestmark = pytest.mark.hub

TRAIN = """
import json, pathlib
from huggingface_hub import HfApi
from transformers import Trainer, TrainerCallback, TrainingArguments
from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixHubCallback
from modeling_frozen import FrozenPrefixProcessor
from tests.helpers import tiny

api = HfApi()
for name, folder in zip(("me/tower", "me/words"), tiny.save_parents(pathlib.Path("parents"))):
    licence = "mit" if name == "me/tower" else "gemma"
    (pathlib.Path(folder) / "README.md").write_text(f"---\\nlicense: {licence}\\n---\\n")
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=folder)

class WaitForPushes(TrainerCallback):  # Trainer skips a push while another one is under way
    def on_step_begin(self, *args, **kwargs):
        trainer._finish_current_push()

model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained("me/tower", "me/words")
processor = FrozenPrefixProcessor.from_model(model)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        "out/eyes", hub_model_id="me/eyes", push_to_hub=True, save_steps=1, max_steps=2, logging_steps=1,
        per_device_train_batch_size=2, learning_rate=0.01, remove_unused_columns=False, use_cpu=True, report_to=[],
    ),
    train_dataset=tiny.rows(4),
    data_collator=DataCollatorForFrozenPrefix(processor),
    processing_class=processor,
    callbacks=[WaitForPushes()],
)
callback = FrozenPrefixHubCallback(trainer, dataset={"name": "Squares"})
trainer.add_callback(callback)
trainer.train()
callback.metrics = {"sighted": {"accuracy": 0.75}, "blind": {"accuracy": 0.25}, "random_connector": {"accuracy": 0.2}}
trainer.push_to_hub(tags="mine")

# Somebody writes into the card on the Hub; the next push must not undo it.
card = pathlib.Path(api.hf_hub_download("me/eyes", "README.md")).read_text()
edited = card.replace("## Limits\\n", "## Limits\\n\\nIt has only ever seen squares.\\n")
api.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="me/eyes", commit_message="by hand")
trainer.push_to_hub(commit_message="after the edit")

# Or only into its metadata.
changed = card.replace("license: gemma", "license: cc-by-4.0").encode()
api.upload_file(path_or_fileobj=changed, path_in_repo="README.md", repo_id="me/eyes", commit_message="licence")
pathlib.Path("out/eyes/README.md").write_text(card)
trainer.create_model_card()
relicensed = pathlib.Path("out/eyes/README.md").read_text()

# A model that is pushed by itself keeps what is known of these weights.
api.create_repo("me/copy")
api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="me/copy", commit_message="its card")
model.push_to_hub("me/copy")
print(json.dumps({"card": card, "edited": edited, "relicensed": relicensed}))
"""

LOAD = """
import json, tempfile
from PIL import Image
{first}
from transformers import AutoModelForImageTextToText, AutoProcessor

image = Image.new("RGB", (20, 18), (220, 30, 30))
said = {{}}
for commit in {commits!r}:
    options = {{"revision": commit, "cache_dir": tempfile.mkdtemp(), {options}}}  # each from an empty cache
    model = AutoModelForImageTextToText.from_pretrained("me/eyes", **options)
    processor = AutoProcessor.from_pretrained("me/eyes", **options)
    inputs = processor(images=image, text="<image> a", return_tensors="pt")
    connector = sum(p.double().sum().item() for p in model.model.connector.parameters())
    said[commit] = [model.generate(**inputs, max_new_tokens=4).tolist(), connector]
print(json.dumps(said))
"""

TITLES = ["initial commit", "Training in progress, step 1", "Training in progress, step 2", "End of training"]

# With the package and without it: what `load` fills in, and what runs the card's own block.
WAYS = {"package": ("import modeling_frozen", ""), "remote code": ("", "'trust_remote_code': True")}


@pytest.fixture(scope="module")
def pushed(module_hub: Hub) -> dict[str, Any]:
    """What the training process says of its cards, and the commits of me/eyes by title, oldest first."""
    cards = module_hub.run_json(TRAIN)
    commits = {commit["title"]: commit["id"] for commit in reversed(module_hub.commits("me/eyes"))}
    return {**cards, "commits": commits}


@pytest.fixture(scope="module")
def loaded(module_hub: Hub, pushed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Way of loading -> commit -> what the model said, its connector's sum. Then the card's block runs as written."""
    commits = [pushed["commits"][title] for title in TITLES[1:]]
    blocks = re.findall(r"```python\n(.*?)```", pushed["card"], re.DOTALL)
    processes = {}
    for (way, (first, options)), block in zip(WAYS.items(), blocks, strict=True):
        photo = "Image.new('RGB', (30, 20), 'red').save('photo.jpg')\n"
        code = LOAD.format(first=first, commits=commits, options=options) + photo + textwrap.dedent(block)
        processes[way] = module_hub.spawn(code, package=way == "package")
    results = {}
    for way, process in processes.items():
        done = module_hub.finish(process)
        assert done.returncode == 0, done.stderr
        answer, words = done.stdout.splitlines()[-2:]
        results[way] = {**json.loads(answer), "block": words}
    return results


def test_every_commit_loads_with_and_without_the_package(pushed: dict[str, Any], loaded: dict[str, Any]) -> None:
    assert list(pushed["commits"]) == [*TITLES, "by hand", "after the edit", "licence"]
    assert loaded["package"] == loaded["remote code"]
    first, second, end = (loaded["package"][pushed["commits"][title]] for title in TITLES[1:])
    assert first[1] != second[1] and second == end  # it learnt between the two, and no more


def test_the_cards_own_blocks_run(loaded: dict[str, Any]) -> None:
    assert loaded["package"]["block"] and loaded["package"]["block"] == loaded["remote code"]["block"]


def test_the_card_of_each_commit(module_hub: Hub, pushed: dict[str, Any]) -> None:
    for step, title in enumerate(TITLES[1:3]):
        text = module_hub.read("me/eyes", "README.md", pushed["commits"][title]).decode()
        data = ModelCard(text).data
        assert data.pipeline_tag == "image-text-to-text" and data.base_model == ["me/tower", "me/words"]
        assert data.eval_results is None and "- learning_rate: 0.01" in text
        assert len(re.findall(r"^\| \d \| [\d.]+ \| [\d.]+ \|$", text, re.MULTILINE)) == step + 1
    text = module_hub.read("me/eyes", "README.md", pushed["commits"]["End of training"]).decode()
    assert text == pushed["card"] and not is_edited(text)
    data = ModelCard(text).data
    assert data.license == "gemma" and data["base_model_relation"] == "adapter"
    assert data.tags == ["frozen-prefix", "visual-prefix", "mine"]
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        "accuracy": 0.75, "accuracy, blind (image replaced)": 0.25, "accuracy, random connector": 0.2,
    }  # fmt: skip
    assert data.eval_results[0].dataset_name == "Squares" and "- data: Squares, 4 rows" in text
    parents = [line for line in text.splitlines() if line.startswith(("| vision tower", "| language model"))]
    for line, (name, licence) in zip(parents, {"me/tower": "mit", "me/words": "gemma"}.items(), strict=True):
        commit = module_hub.commits(name)[0]["id"]
        assert f"[{name}](https://huggingface.co/{name})" in line and line.endswith(f"| {licence} |")
        assert f"(https://huggingface.co/{name}/tree/{commit})" in line


def test_a_card_edited_on_the_hub_survives_the_next_push(module_hub: Hub, pushed: dict[str, Any]) -> None:
    after = module_hub.read("me/eyes", "README.md", pushed["commits"]["after the edit"]).decode()
    assert after == pushed["edited"] != pushed["card"]
    assert ModelCard(pushed["relicensed"]).data.license == "cc-by-4.0"
    assert "under `cc-by-4.0`" in pushed["relicensed"]


def test_a_push_of_the_model_alone_keeps_what_is_known(module_hub: Hub, pushed: dict[str, Any]) -> None:
    text = module_hub.read("me/copy", "README.md").decode()
    expected = pushed["card"].replace("me/eyes", "me/copy").replace("# eyes", "# copy").replace("name: eyes", "name: copy")
    assert not is_edited(text) and text.partition("<!--")[0] == expected.partition("<!--")[0]


def test_nothing_but_safetensors_and_text(module_hub: Hub, pushed: dict[str, Any]) -> None:
    wanted = (".safetensors", ".json", ".jinja", ".py", ".md", ".gitattributes", ".gitignore")
    for commit in pushed["commits"].values():
        assert [file for file in module_hub.files("me/eyes", commit) if not file.endswith(wanted)] == []


PLAIN = """
import json, pathlib, sys
from huggingface_hub import get_token
from transformers import Trainer, TrainerCallback, TrainingArguments
from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixHubCallback
from modeling_frozen import FrozenPrefixProcessor
from tests.helpers import tiny


class WaitForPushes(TrainerCallback):
    # With hub_always_push Trainer else writes into its folder while the push before reads it, and that push fails.
    def on_save(self, *args, **kwargs):
        trainer.push_in_progress.wait_until_done()


TOKEN = get_token()
tower, words = tiny.save_parents(pathlib.Path("private folder").resolve())
model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(tower, words)
processor = FrozenPrefixProcessor.from_model(model)
for name, with_callback in (("bare", False), ("plain", False), ("called", True)):
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            f"out/{name}", hub_model_id=f"me/{name}", push_to_hub=True, hub_token=TOKEN, hub_strategy="all_checkpoints",
            hub_always_push=True, save_steps=1, max_steps=2, per_device_train_batch_size=2, remove_unused_columns=False,
            use_cpu=True, report_to=[],
        ),
        train_dataset=tiny.rows(4),
        data_collator=DataCollatorForFrozenPrefix(processor),
        processing_class=None if name == "bare" else processor,
        callbacks=[WaitForPushes()],
    )
    if with_callback:
        trainer.add_callback(FrozenPrefixHubCallback(trainer))
    trainer.train()
    trainer.push_to_hub()
    print(f"{name} is done", file=sys.stderr)
print(json.dumps({"token": TOKEN, "folder": str(pathlib.Path("private folder").resolve())}))
"""


def test_no_push_of_trainer_gives_its_arguments_away(module_hub: Hub) -> None:
    """The pickle of TrainingArguments holds the Hub's token. Nobody needs it, and nobody asked to publish it."""
    process = module_hub.spawn(PLAIN)
    done = module_hub.finish(process)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    for repo in ("me/bare", "me/plain", "me/called"):
        commits = module_hub.commits(repo)
        assert len(commits) >= 4
        for commit in commits:
            files = module_hub.files(repo, commit["id"])
            assert not [file for file in files if file.endswith("training_args.bin")], (repo, commit["title"])
            secret = facts["token"].encode()
            assert not [file for file in files if secret in module_hub.read(repo, file, commit["id"])]
        assert any("checkpoint-1/" in file for file in module_hub.files(repo, commits[0]["id"]))  # what resuming needs
    for title in ("vision tower", "language model"):
        told = re.compile(rf"names the {title} by a path of this machine, .*private folder")
        assert told.search(done.stderr.partition("bare is done")[0]), done.stderr
