"""The family table tells right from wrong: each kind of cell is met where its cause is known."""

import pytest
import torch

from tests.helpers import families
from tests.helpers.families import (
    IMAGE_SIZE,
    PATCHES,
    blip2,
    kind_row,
    llava,
    markdown,
    outcome,
    random_pictures,
    tower_row,
    vision_config,
)
from tests.helpers.families_text import language_model, text_config
from tests.helpers.families_vision import Tower


def cell(column: str, family: str) -> str:
    return outcome(column, text_config(family), vision_config(), random_pictures(3, IMAGE_SIZE, IMAGE_SIZE), family=family)


@pytest.mark.parametrize("family", ["gpt2", "opt_350m", "granite", "bloom", "t5"])
def test_our_model_sees_where_a_peer_fails(family: str) -> None:
    assert cell("frozen-prefix", family) == "sees"


@pytest.mark.parametrize("column", ["frozen-prefix", "Llava", "Blip2", "VisionEncoderDecoder"])
def test_every_column_can_pass(column: str) -> None:
    assert cell(column, "xglm") == "sees"


@pytest.mark.parametrize(
    ("column", "family", "expected"),
    [
        ("VisionEncoderDecoder", "bloom", "blind"),
        ("Llava", "granite", "wrong: text"),
        ("Llava", "gpt2", "build: AttributeError"),
        ("Blip2", "opt_350m", "wrong: prefix"),
        ("Blip2", "bart", "wrong: parent"),
    ],
)
def test_each_failure_is_reported_by_its_kind(column: str, family: str, expected: str) -> None:
    assert cell(column, family) == expected


@torch.no_grad()
def test_blip2_cuts_its_vectors_up_where_the_embedding_width_is_not_the_hidden_size() -> None:
    """What "wrong: prefix" is, number by number: 4 vectors of 32 in 4 places of 24."""
    text = text_config("opt_350m")
    picture = random_pictures(3, IMAGE_SIZE, IMAGE_SIZE)[0]
    composite = blip2(text, vision_config(), picture)
    written: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    with families._recorded(composite.projector, written, inputs=False):
        with families._recorded(composite.reader, read, inputs=True):
            composite.model.eval()(**composite.inputs, **picture)
    held = read[-1][composite.inputs["input_ids"] == composite.placeholder]
    assert (held.shape, written[-1].shape) == ((PATCHES, 24), (1, PATCHES, 32))
    assert torch.equal(held.flatten(), written[-1].flatten()[: held.numel()])


@torch.no_grad()
def test_llava_loses_the_scale_of_granites_head() -> None:
    """What "wrong: text" is: with the parent's own weights its logits are `logits_scaling` times too large."""
    composite = llava(text_config("granite"), vision_config(), random_pictures(3, IMAGE_SIZE, IMAGE_SIZE)[0])
    parent = language_model("granite", seed=1)
    composite.adopt(parent)
    ours = composite.model.eval()(**composite.text_inputs).logits
    theirs = parent(**composite.text_inputs).logits
    torch.testing.assert_close(ours, theirs * parent.config.logits_scaling)


def test_a_composite_that_ignores_its_picture_is_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(*parents: object) -> families.Composite:
        composite = families.frozen_prefix(*parents)
        composite.projector.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        return composite

    monkeypatch.setitem(families.COLUMNS, "frozen-prefix", blind)
    assert cell("frozen-prefix", "gpt2") == "blind"


@pytest.mark.parametrize("kind", families.KINDS)
@pytest.mark.parametrize("family", ["gpt2", "opt_350m", "llama", "t5"])
def test_every_kind_of_vision_side_sees(kind: str, family: str) -> None:
    assert kind_row(family, [kind]) == {kind: "sees"}


def test_a_kind_whose_second_tower_is_not_read_is_no_longer_right(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"pixel_values_2": families.kind_pictures("two towers")[0]["pixel_values_2"]}
    one = {**random_pictures(3, IMAGE_SIZE, IMAGE_SIZE)[0], **same}
    assert outcome("two towers", text_config("gpt2"), vision_config(), (one, one)) == "blind"
    only_second = tuple(
        {**one, **{"pixel_values_2": other["pixel_values_2"]}} for other in families.kind_pictures("two towers")
    )
    assert outcome("two towers", text_config("gpt2"), vision_config(), only_second) == "sees"


def test_a_table_has_one_row_per_family_and_counts_those_that_see() -> None:
    rows = {"gpt2": {"A": "sees", "B": "blind"}, "opt": {"A": "sees", "B": "sees"}}
    assert markdown("decoder", rows).splitlines() == [
        "| decoder | A | B |",
        "| --- | --- | --- |",
        "| gpt2 | sees | blind |",
        "| opt | sees | sees |",
        "| **sees** | 2 of 2 | 1 of 2 |",
    ]


def test_a_tower_that_hides_patches_at_random_is_reported_by_its_kind() -> None:
    assert tower_row("vit_mae") == {
        "frozen-prefix": "sees",
        "Llava": "wrong: random",
        "VisionEncoderDecoder": "wrong: random",
    }


def test_a_tower_row_passes_on_what_the_tower_needs_beside_pixels() -> None:
    assert tower_row("siglip2_naflex")["frozen-prefix"] == "sees"


def test_a_row_that_cannot_run_here_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.TOWERS, "absent", Tower("vit", requires="no_such_package"))
    assert set(tower_row("absent").values()) == {"needs no_such_package"}
