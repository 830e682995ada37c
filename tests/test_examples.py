# ruff: noqa: F811 (fixtures are imported by name)
"""What holds for every example: a reader can copy it, its help comes at once, and it needs no data of one's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import fresh_python
from tests.helpers.hub_fixtures import Hub, module_hub  # noqa: F401
from tests.helpers.tiny import save_parents


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
COUNT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("\\nimported", *sorted({"torch", "datasets", "matplotlib", "ray", "openai"} & set(sys.modules)))
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_is_short_and_stands_by_itself(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    others = {other.stem for other in EXAMPLES}
    said = {line.split()[1].split(".")[0] for line in lines if line.lstrip().startswith(("import ", "from "))}
    assert not said & (others | {"benchmarks", "tests", "examples"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_its_help_comes_before_torch(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", COUNT, path, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage, _, imported = done.stdout.rpartition("\nimported")
    assert usage.startswith("usage: ") and len(usage.splitlines()) < 90
    assert not imported.split()


# The datasets that examples take where none is named, as their columns are on the Hub.
SERVED = """
from pathlib import Path
from datasets import Dataset, Features, Image, Value
from huggingface_hub import HfApi
from tests.helpers.tiny import COLOURS, rows

def serve(name, splits):
    folder = Path(name.replace("/", "-"))
    (folder / "data").mkdir(parents=True)
    for split, some in splits.items():
        texts = {column: Value("string") for column in some[0] if column != "image"}
        table = Dataset.from_list(some, features=Features({"image": Image(), **texts}))
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    HfApi().create_repo(name, repo_type="dataset")
    HfApi().upload_folder(repo_id=name, folder_path=folder, repo_type="dataset")

pictures, colours = [row["image"] for row in rows(40)], list(COLOURS)
for number, picture in enumerate(pictures):
    picture.putpixel((0, 0), (number, 0, 0))  # no two alike
asked = [{"image": one, "question": "what colour ?", "answer": colours[i % 4]} for i, one in enumerate(pictures)]
serve("flaviagiammarino/vqa-rad", {"train": asked[:24], "test": asked[24:]})
sold = [{"id": str(i), "gender": ("Men", "Women")[i % 2], "masterCategory": "Apparel", "productDisplayName": "a red one",
         "image": one} for i, one in enumerate(pictures)]
serve("ashraq/fashion-product-images-small", {"train": sold})
told = [{"image": one, "en": "a square", "de": "ein Quadrat", "fr": "un carre", "cs": "ctverec"} for one in pictures[:8]]
serve("romrawinjp/multi30k", {"train": told, "validation": told, "test": told})
captioned = [{"image": one, **{f"caption_{n}": "that is a red square , a red one" for n in range(5)}} for one in pictures[:12]]
serve("jxie/flickr8k", {"train": captioned, "validation": captioned, "test": captioned})
"""
FEW = {
    "train_vqa": ["--max_new_tokens", "2"],
    "classify": ["--connector_config", '{"num_layers": 1, "num_heads": 2, "hidden_size": 16}', "--prefix_length", "2"],
    "train_multilingual": ["--max_new_tokens", "2", "--test_pictures", "2"],
    "train_captioning": ["--max_new_tokens", "2"],
}


@pytest.fixture(scope="module")
def served(module_hub: Hub) -> Hub:
    module_hub.add_user("me", module_hub.token, orgs=("flaviagiammarino", "ashraq", "romrawinjp", "jxie"))
    module_hub.run(SERVED)
    return module_hub


@pytest.mark.hub
@pytest.mark.parametrize("name", FEW)
def test_without_a_dataset_it_takes_one_of_the_hub(name: str, served: Hub, tmp_path: Path) -> None:
    tower, words = save_parents(tmp_path / "parents", text={"max_position_embeddings": 128})
    script = str(fresh_python.ROOT / "examples" / f"{name}.py")
    few = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--use_cpu", "true"]
    flags = ["--vision", tower, "--text", words, "--output_dir", str(tmp_path / "out"), *few, *FEW[name]]
    done = fresh_python.run(script, *flags, env=served.env(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "blind" in scores or all("blind" in some for some in scores.values())
