"""The Hub of real parents: folders under ids, the commits that connectors record, and a command that is run with it. What
the wheels hold is checked by the command itself, for which a package index is needed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import real_parents
from benchmarks.loopback_hub.store import Store


READ = """
import json
from datasets import load_dataset
from transformers import AutoConfig, AutoModel
rows = load_dataset("jxie/flickr8k", split="test")
print(json.dumps([AutoModel.from_pretrained("{name}").config.model_type, rows.column_names, rows[0]["caption_4"]]))
"""


def lay_out(folder: Path) -> tuple[Path, Path]:
    """A folder of parents as the command leaves it, and one of assets."""
    from datasets import Dataset, Image
    from PIL import Image as PILImage
    from transformers import MobileNetV2Config, MobileNetV2Model

    assets, tower = folder / "assets", MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.35))
    tower.save_pretrained(assets / "vision" / "mobilenet_v2_1.0_224")
    PILImage.new("RGB", (8, 8), "red").save(folder / "red.png")
    rows = {"image": [str(folder / "red.png")], "captions": [[f"a red square {index} ." for index in range(5)]]}
    data = assets / "captions" / "flickr8k_1k" / "data"
    data.mkdir(parents=True)
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(data / "test-00000-of-00001.parquet")
    return folder / "parents", assets


def test_a_command_finds_parents_and_photos_under_the_ids_they_have_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    parents, assets = lay_out(tmp_path)
    monkeypatch.setattr(real_parents, "make", lambda folder: {})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-c", READ.format(name=real_parents.MOBILENET)]
    asked = ["--output_dir", str(parents), "--assets", str(assets), "--serve", "--", *command]
    assert real_parents.main(asked) == 0
    columns = ["image", *(f"caption_{index}" for index in range(5))]
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == ["mobilenet_v2", columns, "a red square 4 ."]
    assert (parents / "home" / "hub").is_dir()  # not the user's own cache: the bytes are others than outside
    failing = [*asked[:-3], sys.executable, "-c", "raise SystemExit(3)"]
    assert real_parents.main(failing) == 3


def test_a_folder_keeps_its_commit_until_it_changes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "data").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "data" / "model.safetensors").write_bytes(b"weights")
    commits = [Store(tmp_path / "hub").put_folder("models", "me/model", folder) for _ in range(2)]
    assert commits[0] == commits[1]
    store = Store(tmp_path / "hub")
    tree = store.repos["models/me/model"]["commits"][commits[0]]["tree"]
    assert {name: file["lfs"] for name, file in tree.items()} == {
        ".gitattributes": False, "config.json": False, "data/model.safetensors": True
    }  # fmt: skip
    (folder / "config.json").write_text("{ }")
    assert store.put_folder("models", "me/model", folder) != commits[0]
    assert len(store.repos["models/me/model"]["commits"]) == 2


def test_a_model_that_differs_from_its_authors_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def maker(folder: Path, *name: str) -> None:
        (folder / "config.json").write_text("{}")
        real_parents.report("a model", "largest difference", float("nan") if name == ("efficientnet-lite1",) else 0.0, 1e-5)

    for name in ("make_smollm2", "make_minilm", "make_lite"):
        monkeypatch.setattr(real_parents, name, maker)
    with pytest.raises(RuntimeError, match="a model: largest difference is nan, above 1e-05"):
        real_parents.make(tmp_path)
    made = {name for name in (*real_parents.LITE, real_parents.SMOLLM2) if (tmp_path / name).exists()}
    assert made == {"efficientnet-lite0", real_parents.SMOLLM2}


def test_squeeze_and_excitation_are_off() -> None:
    """Of whatever block: what goes in comes out, to the last bit."""
    from transformers import EfficientNetConfig, EfficientNetModel

    ours = EfficientNetModel(EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320))
    names = {f"efficientnet.{name}": tensor for name, tensor in ours.state_dict().items()}

    class Named(nn.Module):
        def state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def, override]
            return names

    weights = real_parents.lite_weights(nn.Module(), Named())
    ours.load_state_dict({name.removeprefix("efficientnet."): tensor for name, tensor in weights.items()}, strict=False)
    inputs = torch.randn(2, ours.encoder.blocks[1].squeeze_excite.dim, 4, 4)
    assert torch.equal(ours.encoder.blocks[1].squeeze_excite(inputs), inputs)


def test_the_server_ends_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.error
    import urllib.request

    monkeypatch.setattr(real_parents, "make", lambda folder: {})
    with real_parents.served(tmp_path, None) as environment:
        address = environment["HF_ENDPOINT"] + "/api/models"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert opener.open(address, timeout=10).read() == b"[]"
    with pytest.raises(urllib.error.URLError):
        opener.open(address, timeout=10)
