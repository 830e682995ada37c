"""Push, pull, trust: through the wire, each step in a process of its own, against `benchmarks/loopback_hub`."""

import json
from pathlib import Path

import pytest

from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from tests.helpers.hub_fixtures import Hub, module_hub  # noqa: F401
from tests.helpers.tiny import save_parents


pytestmark = pytest.mark.hub

ASK = """
import json, torch
from PIL import Image
def ask(model, processor):
    image = Image.new("RGB", (20, 18), (200, 30, 30))
    inputs = processor(images=image, text="<image> what colour ?", return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
"""

# Other kinds of the vision side: options of the model and of its processor.
KINDS: dict[str, tuple[dict, dict]] = {
    "lengths-and-tiles": (
        {"connector_type": "avg_pool", "prefix_lengths": [1, 4]},
        {"crop_to_patches": True, "min_patches": 2},
    ),
    "shuffled": ({"connector_type": "pixel_shuffle", "connector_config": {"scale_factor": 3}}, {}),
    "convolved": ({"connector_type": "c_abstractor", "prefix_length": 4, "connector_config": {"hidden_size": 16}}, {}),
}

PUSH = (
    ASK
    + """
import sys, tempfile
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers import Trainer, TrainerCallback, TrainingArguments
from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from transformers import CLIPImageProcessorPil
from tests.helpers.tiny import rows, save_parents, vision_config

folder = Path(tempfile.mkdtemp())
tower, words = save_parents(folder)
CLIPVisionModel.from_pretrained(tower).push_to_hub("me/tower")
AutoImageProcessor.from_pretrained(tower).push_to_hub("me/tower")
AutoModelForCausalLM.from_pretrained(words).push_to_hub("me/words")
AutoTokenizer.from_pretrained(words).push_to_hub("me/words")

model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained("me/tower", "me/words", connector_type="mlp")
processor = FrozenPrefixProcessor.from_model(model)
model.push_to_hub("me/eyes")
processor.push_to_hub("me/eyes")
answers = {"eyes": ask(model, processor), "record": model.config.text_base_model}

CLIPVisionModel(vision_config(image_size=24, hidden_size=16)).push_to_hub("me/finer")
size = {"height": 24, "width": 24}
CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size, image_mean=[0.1] * 3).push_to_hub("me/finer")
pair = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(["me/finer", "me/tower"], "me/words")
of_pair = FrozenPrefixProcessor.from_model(pair)
pair.push_to_hub("me/pair")
of_pair.push_to_hub("me/pair")
answers["pair"] = ask(pair, of_pair)

for name, (options, tiles) in {kinds!r}.items():
    other = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained("me/finer", "me/words", **options)
    of_other = FrozenPrefixProcessor.from_model(other, **tiles)
    other.push_to_hub(f"me/{name}")
    of_other.push_to_hub(f"me/{name}")
    answers[name] = ask(other, of_other)

class AfterEachPush(TrainerCallback):
    # transformers copies weights and config into a folder that a push may still be reading.
    def on_save(self, *_, **__):
        trainer.push_in_progress.wait_until_done()

trainer = Trainer(
    callbacks=[AfterEachPush()],
    model=model,
    args=TrainingArguments(
        str(folder / "trained"), hub_model_id="me/trained", push_to_hub=True, max_steps=2, save_steps=1,
        save_strategy="steps", hub_always_push=True, per_device_train_batch_size=2, learning_rate=0.1,
        remove_unused_columns=False, report_to="none", use_cpu=True, disable_tqdm=True,
    ),
    train_dataset=rows(8),
    data_collator=DataCollatorForFrozenPrefix(processor),
    processing_class=processor,
)
trainer.train()
trainer.push_to_hub()
model.eval()
answers["trained"] = ask(model, processor)
print(json.dumps(answers))
"""
)

PULL = (
    ASK
    + """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
trust = {trust!r}
if trust is None:
    import modeling_frozen
results = []
for name, revision in {wanted!r}:
    options = {{"trust_remote_code": trust, "revision": revision}}
    model = AutoModelForImageTextToText.from_pretrained(name, **options)
    processor = AutoProcessor.from_pretrained(name, **options)
    trainable = sorted({{n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad}})
    connector = [p.double().sum().item() for p in model.model.connector.parameters()]
    results.append({{"answers": ask(model, processor), "trainable": trainable, "connector": connector}})
    results[-1]["module"] = type(model).__module__
print(json.dumps(results))
"""
)


@pytest.fixture(scope="module")
def pushed(module_hub: Hub) -> dict:  # noqa: F811
    """Both parents and two checkpoints on the Hub, and what the models said before they were pushed."""
    return json.loads(module_hub.run(PUSH.replace("{kinds!r}", repr(KINDS))).splitlines()[-1])


def pull(hub: Hub, *wanted: tuple[str, str], trust: bool | None = None, **options: object) -> list[dict]:  # noqa: F811
    """What each (name, revision) answers, all in one process elsewhere."""
    return json.loads(hub.run(PULL.format(wanted=wanted, trust=trust), package=trust is None, **options).splitlines()[-1])


@pytest.fixture(scope="module", params=[None, True], ids=["with the package", "without it"])
def pulled(request: pytest.FixtureRequest, module_hub: Hub, pushed: dict) -> dict[str, dict]:  # noqa: F811
    """Both checkpoints, and the first commit that training pushed, where nothing was downloaded yet."""
    steps = [commit["id"] for commit in module_hub.commits("me/trained") if "step" in commit["title"]]
    assert len(steps) == 2
    wanted = {name: (f"me/{name}", "main") for name in ("eyes", "trained", "pair", *KINDS)} | {
        "first step": ("me/trained", steps[-1])
    }
    results = pull(module_hub, *wanted.values(), trust=request.param)
    code = "modeling_frozen" if request.param is None else "transformers_modules"
    assert all(one["module"].startswith(code) for one in results)
    return dict(zip(wanted, results, strict=True))


def test_pulled_elsewhere_it_says_the_same(pulled: dict[str, dict], pushed: dict) -> None:
    for name in ("eyes", "trained", "pair", *KINDS):
        assert pulled[name]["answers"] == pushed[name]
        assert pulled[name]["trainable"] == ["connector"]


def test_without_package_and_without_trust_it_is_refused(module_hub: Hub, pushed: dict) -> None:  # noqa: F811
    done = module_hub.attempt(PULL.format(wanted=[("me/eyes", "main")], trust=False), package=False)
    assert done.returncode != 0 and "trust_remote_code" in done.stderr


def test_a_file_that_a_push_is_reading_is_never_written_into(tmp_path: Path) -> None:
    tower, words = save_parents(tmp_path / "parents")
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(tower, words, connector_type="linear")
    processor = FrozenPrefixProcessor.from_model(model)
    for with_model in (False, True):
        folder = tmp_path / f"saved-{with_model}"
        if with_model:
            model.save_pretrained(folder)
        processor.save_pretrained(folder)
        names = {path.name for path in folder.glob("*.py")}
        assert "processing_frozen_prefix.py" in names and ("modeling_frozen_prefix.py" in names) == with_model
        reading = {}
        for path in folder.glob("*.py"):
            path.write_text(f"{path.read_text()}\n# of an older version\n")
            reading[path] = (path.open(), path.read_text())
        processor.save_pretrained(folder)
        for path, (file, older) in reading.items():
            with file:
                assert file.read() == older
            assert "older version" not in path.read_text()
        assert {path.name for path in folder.glob("*.py")} == names
        before = {path: path.stat().st_mtime_ns for path in reading}
        processor.save_pretrained(folder)
        assert {path: path.stat().st_mtime_ns for path in reading} == before


PUSH_FOLDER = (
    ASK
    + """
from transformers import AutoModelForImageTextToText, AutoProcessor
import modeling_frozen
model, processor = (auto.from_pretrained("me/eyes") for auto in (AutoModelForImageTextToText, AutoProcessor))
from pathlib import Path
from modeling_frozen.model_card import write_model_card
for part in (model, processor, model, processor):  # the second time everything lies there already, as after a training
    part.save_pretrained("saved")
write_model_card("saved", model, metrics={"sighted": {"cider": 0.61}, "blind": {"cider": 0.12}})
model.save_pretrained("saved", push_to_hub=True, repo_id="me/saved-model")
card = Path("saved/README.md")
written = card.read_text().replace("Calls without an image", "It likes squares. Calls without an image")
card.write_text(written)
processor.save_pretrained("saved", push_to_hub=True, repo_id="me/saved")
model.save_pretrained("saved", push_to_hub=True, repo_id="me/saved")
processor.save_pretrained("apart", push_to_hub=True, repo_id="me/saved-processor")
print(json.dumps(ask(model, processor)))
"""
)


def test_a_folder_is_pushed_with_the_code_that_lies_in_it(module_hub: Hub, pushed: dict) -> None:  # noqa: F811
    answers = module_hub.run_json(PUSH_FOLDER)
    assert [one["answers"] for one in pull(module_hub, ("me/saved", "main"), trust=True)] == [answers] == [pushed["eyes"]]
    whole = set(module_hub.files("me/eyes")) - {".gitignore"}  # nothing in that is for whoever loads
    assert set(module_hub.files("me/saved")) == whole
    assert "modeling_frozen_prefix.py" in module_hub.files("me/saved-model")
    assert "processing_frozen_prefix.py" in module_hub.files("me/saved-processor")
    # The folder's own card goes up: its scores, and what a person wrote into it.
    assert "| cider | 0.61 | 0.12 |" in module_hub.read("me/saved-model", "README.md").decode()
    edited = module_hub.read("me/saved", "README.md").decode()
    assert "| cider | 0.61 | 0.12 |" in edited and "It likes squares." in edited


def test_a_commit_pushed_in_mid_training_loads_with_its_own_connector(pulled: dict[str, dict]) -> None:
    assert pulled["first step"]["trainable"] == ["connector"]
    assert pulled["first step"]["connector"] != pulled["trained"]["connector"]


def test_only_safetensors_and_text_are_pushed(module_hub: Hub, pushed: dict) -> None:  # noqa: F811
    for name in ("me/eyes", "me/trained"):
        suffixes = {Path(file).suffix for file in module_hub.files(name)}
        # Trainer itself pushes its arguments as a pickle; nothing loads it.
        assert suffixes - {".safetensors", ".json", ".py", ".md", ".jinja", ".txt", ".gitattributes", ""} <= {".bin"}
        assert {file for file in module_hub.files(name) if file.endswith(".bin")} <= {"training_args.bin"}
    weights = module_hub.files("me/eyes")["model.safetensors"]
    assert weights < module_hub.files("me/words")["model.safetensors"] / 4


def test_offline_it_comes_from_the_cache_and_moved_parents_at_their_commit(module_hub: Hub, pushed: dict) -> None:  # noqa: F811
    """The parent's repository moves on; the recorded commit still gives the model that the connector was trained with."""
    record = pushed["record"]
    assert record["name_or_path"] == "me/words"
    assert record["revision"] in {commit["id"] for commit in module_hub.commits("me/words")}
    module_hub.run(
        """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/words")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(1.5)
model.push_to_hub("me/words")
"""
    )
    assert module_hub.commits("me/words")[0]["id"] != record["revision"]
    home = module_hub.new_home()
    main = ("me/eyes", "main")
    assert pull(module_hub, main, home=home)[0]["answers"] == pushed["eyes"]
    module_hub.stop()
    try:
        assert pull(module_hub, main, home=home, offline=True)[0]["answers"] == pushed["eyes"]
    finally:
        module_hub.start()


def test_a_private_parent_passes_the_hub_clients_error_on(module_hub: Hub, pushed: dict) -> None:  # noqa: F811
    code = """
from modeling_frozen import FrozenPrefixForConditionalGeneration
try:
    FrozenPrefixForConditionalGeneration.from_pretrained("me/eyes", text_base_model="me/nowhere")
except OSError as error:
    print(type(error).__name__, str(error).replace("\\n", " "))
"""
    said = module_hub.run(code).splitlines()[-1]
    assert "me/nowhere" in said and "language model" in said and "text_base_model=" in said


CUT = """
from modeling_frozen import FrozenPrefixForConditionalGeneration
FrozenPrefixForConditionalGeneration.from_pretrained("me/eyes")
print("loaded")
"""


@pytest.mark.parametrize("repository", ["eyes", "words"])
def test_a_cut_download_leaves_nothing_half_loaded(module_hub: Hub, pushed: dict, repository: str) -> None:  # noqa: F811
    home = module_hub.new_home()
    module_hub.cut(rf"GET /me/{repository}/resolve/.*model\.safetensors", after_bytes=500, how="reset", times=None)
    done = module_hub.attempt(CUT, home=home)
    assert done.returncode != 0 and "loaded" not in done.stdout
    module_hub.mend()
    assert module_hub.run(CUT, home=home).splitlines()[-1] == "loaded"


PUSH_AGAIN = """
from modeling_frozen import FrozenPrefixForConditionalGeneration
model = FrozenPrefixForConditionalGeneration.from_pretrained("me/eyes")
model.push_to_hub("me/copy")
"""


def test_a_cut_push_shows_no_commit(module_hub: Hub, pushed: dict) -> None:  # noqa: F811
    home = module_hub.new_home()
    module_hub.cut(r"POST /api/models/me/copy/commit", after_bytes=100, how="reset", times=1)
    assert module_hub.attempt(PUSH_AGAIN, home=home).returncode != 0
    assert "config.json" not in module_hub.files("me/copy")
    module_hub.mend()
    module_hub.run(PUSH_AGAIN, home=home)
    assert {"config.json", "model.safetensors", "modeling_frozen_prefix.py"} <= set(module_hub.files("me/copy"))


PUSH_HEADS = """
from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixForImageTextRetrieval, FrozenPrefixModel
from modeling_frozen import FrozenPrefixForSequenceClassification, FrozenPrefixProcessor
for head, options in (
    (FrozenPrefixModel, {}), (FrozenPrefixForConditionalGeneration, {}), (FrozenPrefixForImageTextRetrieval, {}),
    (FrozenPrefixForSequenceClassification, {"num_labels": 2}),
):
    model = head.from_vision_text_pretrained("me/tower", "me/words", **options)
    model.push_to_hub(f"me/{head.__name__}")
    FrozenPrefixProcessor.from_model(model).push_to_hub(f"me/{head.__name__}")
"""

PULL_HEADS = """
import json, transformers
found = {}
for name, (auto, *others) in json.loads('%s').items():
    model = getattr(transformers, auto).from_pretrained(f"me/{name}", trust_remote_code=True)
    transformers.AutoProcessor.from_pretrained(f"me/{name}", trust_remote_code=True)
    found[name] = [type(model).__name__, type(model).__module__.split(".")[0]]
    for other in others:
        found[name].append(type(getattr(transformers, other).from_config(model.config, trust_remote_code=True)).__name__)
print(json.dumps(found))
"""
# What loads a repository of each head, and what loads as another.
HEADS = {
    "FrozenPrefixModel": ["AutoModel"],
    "FrozenPrefixForConditionalGeneration": ["AutoModelForImageTextToText", "AutoModelForPreTraining"],
    "FrozenPrefixForImageTextRetrieval": ["AutoModelForZeroShotImageClassification", "AutoModelForImageTextToText"],
    "FrozenPrefixForSequenceClassification": ["AutoModelForSequenceClassification", "AutoModelForImageClassification"],
}


def test_a_repository_of_each_head_carries_its_own_code_and_loads(module_hub: Hub, pushed: dict) -> None:  # noqa: F811
    module_hub.run(PUSH_HEADS)
    heads = {"FrozenPrefixForImageTextRetrieval": "retrieval", "FrozenPrefixForSequenceClassification": "classification"}
    for name in HEADS:
        files = set(module_hub.files(f"me/{name}"))
        assert {file for file in files if file in {f"modeling_frozen_prefix_{head}.py" for head in heads.values()}} == (
            {f"modeling_frozen_prefix_{heads[name]}.py"} if name in heads else set()
        )
        auto_map = json.loads(module_hub.read(f"me/{name}", "config.json"))["auto_map"]
        assert {f"{target.split('.')[0]}.py" for target in auto_map.values()} <= files
    found = module_hub.run_json(PULL_HEADS % json.dumps(HEADS), package=False)
    writes = "FrozenPrefixForConditionalGeneration"
    others = {HEADS["FrozenPrefixForImageTextRetrieval"][1]: writes, HEADS[writes][1]: writes}
    for name, (_, *more) in HEADS.items():
        assert found[name] == [name, "transformers_modules", *(others.get(other, name) for other in more)]


PUSH_END = """
from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
model = FrozenPrefixForConditionalGeneration.from_pretrained("me/eyes")
for name in ("me/end", "me/bare"):
    model.push_to_hub(name)
FrozenPrefixProcessor.from_model(model, image_position="end").push_to_hub("me/end")
"""

POSITION = """
import modeling_frozen
from transformers import AutoProcessor
for load in (AutoProcessor.from_pretrained, modeling_frozen.FrozenPrefixProcessor.from_pretrained):
    try:
        print(load({name!r}).image_position)
    except Exception as error:  # httpx's own where the connection is reset
        print("error")
"""

WITHOUT_PROCESSOR = """
from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
FrozenPrefixProcessor.from_model(FrozenPrefixForConditionalGeneration.from_pretrained("me/end"))
"""


@pytest.fixture(scope="module")
def end(module_hub: Hub, pushed: dict) -> str:  # noqa: F811
    """Code that says where the processor of me/end puts an image."""
    module_hub.run(PUSH_END)
    return POSITION.format(name="me/end")


# Those that the Hub's client tries again for a minute are slow.
@pytest.mark.parametrize("status", [401, 403, *(pytest.param(status, marks=pytest.mark.slow) for status in (429, 500))])
def test_a_hub_that_fails_gives_no_other_processor(module_hub: Hub, end: str, status: int) -> None:  # noqa: F811
    module_hub.answer_with(r" /me/end/resolve/[^/]+/processor_config\.json", status, times=None)
    try:
        assert module_hub.run(end).split() == ["error"] * 2
    finally:
        module_hub.mend()
    assert module_hub.run(end).split() == ["end"] * 2


def test_only_not_found_means_that_there_is_no_processor(module_hub: Hub, end: str) -> None:  # noqa: F811
    """Then it is the one of the backbones, offline too."""
    home, bare = module_hub.new_home(), POSITION.format(name="me/bare")
    assert module_hub.run(bare, home=home).split() == ["start"] * 2
    assert module_hub.run(bare, home=home, offline=True).split() == ["start"] * 2


@pytest.mark.slow
def test_without_a_connection_nobody_knows_whether_there_is_a_processor(module_hub: Hub, end: str) -> None:  # noqa: F811
    home = module_hub.new_home()
    module_hub.run(WITHOUT_PROCESSOR, home=home)  # all but the processor of me/end is in the cache
    module_hub.stop()
    try:
        assert module_hub.run(end, home=home).split() == ["error"] * 2
    finally:
        module_hub.start()
