"""Transformers' own generic suites, on our classes: a script, because its package is called `tests`, as ours is.

    python tests/helpers/library_suites.py FOLDER SUITE RESULTS.json

FOLDER holds transformers' `tests/` (its source distribution carries them: `pip download --no-deps --no-binary :all:
transformers==…`). Nothing of it is copied here; what the distribution leaves out is stood in for by empty modules.
`test_library_conventions.py` runs it. Each case that is left out stands below by name, with its reason.
"""

import importlib.util
import json
import sys
import types
import unittest
from pathlib import Path
from typing import Any, ClassVar


ROOT = Path(__file__).parents[2]

SMALL_RESAMPLER = {"num_layers": 1, "num_heads": 2, "hidden_size": 16}
SMALL_BLOCKS = {"num_heads": 2, "head_dim": 8}
VOCABULARY, PAD, IMAGE, VIDEO, AUDIO = 99, 1, 98, 97, 96

# Of every model suite.
_LEFT_OUT = {
    "test_resize_tokens_embeddings": "the language model is never resized: refused by name",
    "test_resize_embeddings_untied": "the language model is never resized: refused by name",
    "test_resize_embeddings_untied_no_reinit_on_post_init": "the language model is never resized: refused by name",
    "test_model_weights_reload_no_missing_tied_weights": "a checkpoint without the connector's weights is an error here, "
    "where transformers goes on with random ones and a warning",
    "test_correct_missing_keys": "likewise: missing weights are an error",
    "test_can_init_all_missing_weights": "reports tensors of SigLIP and T5, which transformers' own classes fill otherwise "
    "than their constructors do; no connector's (asked of those in test_library_conventions.py)",
    "test_bc_cache_name_forward": "a cache passed by its earlier name is no mistake here, so nothing warns of it",
}
_IMAGE_OUTPUTS = {
    "test_multimodal_outputs_are_returned": "what an encoder gave comes of `get_image_features`; beside logits are prefixes, "
    "`image_hidden_states`",
}
_OTHER_MEDIA = {
    f"test_get_{modality}_features_{case}": f"this model takes no {modality}; the suite ImagesAndAudio asks one that does"
    for modality, cases in {
        "video": ("output_0", "output_1", "output_2", "pooler_output", "hidden_states", "attentions"),
        "audio": ("output_0", "output_1", "output_2", "hidden_states", "attentions"),
    }.items()
    for case in cases
}
_UNUSED = {
    f"test_training_gradient_checkpointing{way}": "asks a gradient of every tensor, and a prefix is made without some of this "
    "tower's: CLIP's last norm, DINOv2's mask token"
    for way in ("", "_use_reentrant_false", "_use_reentrant_true")
}
_DRAWN = {
    f"test_model_rope_scaling_from_config_{case}": "draws ids at random, placeholders among them, and brings no image: refused"
    for case in ("0_linear", "1_dynamic", "2_yarn")
}
_BY_PLACEHOLDER = "gated blocks find an image's place by its placeholder, which embeddings don't show: refused by name"
_T5 = {
    "test_attention_outputs": "counts the fields of an encoder-decoder's output; ours has `image_hidden_states` too",
    "test_attn_implementation_composite_models": "T5's `get_text_config(decoder=True)` is a copy: what the case sets on "
    "it is lost whichever model holds it",
}
# Further towers and language models, with an MLP.
COMBINATIONS = {
    "ClipLlama": {"tower": "clip_vision_model"},
    "ClipT5": {"tower": "clip_vision_model", "words": "t5"},
    "SiglipGpt2": {"words": "gpt2"},
    "Dinov2Gpt2": {"tower": "dinov2", "words": "gpt2"},
    "VitQwen3": {"tower": "vit", "words": "qwen3"},
}
# Connectors on the grid, prefixes of several lengths, and two towers.
SMALL_CONVOLUTIONS = {"hidden_size": 16, "num_layers": 1}
VISION = {
    "Lengths": {"connector_type": "resampler", "connector_config": SMALL_RESAMPLER, "prefix_lengths": [1, 4]},
    "AvgPool": {"connector_type": "avg_pool", "prefix_lengths": [1, 4]},
    "PixelShuffle": {"connector_type": "pixel_shuffle"},
    "CAbstractor": {"connector_type": "c_abstractor", "prefix_length": 4, "connector_config": SMALL_CONVOLUTIONS},
    "TwoTowers": {"further": "siglip_vision_model"},
}
LEFT_OUT: dict[str, dict[str, str]] = {
    "Images": {**_LEFT_OUT, **_DRAWN, **_OTHER_MEDIA, **_IMAGE_OUTPUTS},
    "ImagesAndAudio": {**_LEFT_OUT, **_DRAWN, **_IMAGE_OUTPUTS},
    "CrossAttention": {
        **_LEFT_OUT,
        **_DRAWN,
        **_OTHER_MEDIA,
        **_IMAGE_OUTPUTS,
        "test_inputs_embeds": _BY_PLACEHOLDER,
        "test_inputs_embeds_matches_input_ids": _BY_PLACEHOLDER,
    },
    "EncoderDecoder": {
        **_LEFT_OUT,
        **_DRAWN,
        **_OTHER_MEDIA,
        **_T5,
    },
    "ClipLlama": {**_LEFT_OUT, **_DRAWN, **_OTHER_MEDIA, **_IMAGE_OUTPUTS, **_UNUSED},
    "ClipT5": {**_LEFT_OUT, **_DRAWN, **_OTHER_MEDIA, **_T5, **_UNUSED},
    "SiglipGpt2": {**_LEFT_OUT, **_DRAWN, **_OTHER_MEDIA, **_IMAGE_OUTPUTS},
    "Dinov2Gpt2": {**_LEFT_OUT, **_DRAWN, **_OTHER_MEDIA, **_IMAGE_OUTPUTS, **_UNUSED},
    "VitQwen3": {
        **_LEFT_OUT,
        **_DRAWN,
        **_OTHER_MEDIA,
        **_IMAGE_OUTPUTS,
        "test_reverse_loading_mapping": "names on disk are those of the state dict, whatever ViT's own checkpoints call them",
    },
    **{name: {**_LEFT_OUT, **_DRAWN, **_OTHER_MEDIA, **_IMAGE_OUTPUTS} for name in VISION},
    "Config": {},
    "ImageProcessor": {
        "test_model_input_names": "passes videos and audio to whatever takes `**kwargs`; what this processor has no "
        "tower for is refused, where transformers drops it without a word",
        "test_flat_kwarg_applied_when_modality_dict_lacks_it": "likewise passes videos and audio",
    },
}


def _stand_in(name: str, **attributes: Any) -> None:
    """An empty module where the distribution has none."""
    try:
        installed = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(attributes)
        sys.modules[name] = module


_SIZES = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}


def _parents(tower: str, words: str) -> tuple[Any, Any, Any]:
    from transformers import AutoConfig, WhisperConfig

    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
    t5 = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    # Of SigLIP without its pooling head every tensor is used; of CLIP's the last norm has no part in a prefix.
    towers = {"siglip_vision_model": {"vision_use_head": False}}
    families = {
        "llama": {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512},
        "qwen3": {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512},
        "gpt2": gpt2,
        "t5": t5,
    }
    vision_config = AutoConfig.for_model(tower, **_SIZES, image_size=8, patch_size=4, **towers.get(tower, {}))
    audio_config = WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=10, max_target_positions=8,
        vocab_size=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return vision_config, AutoConfig.for_model(words, **ids, **families[words]), audio_config


class ModelTester:
    """Tiny configs and inputs, by the names that transformers' mixin asks for."""

    # Of fewer rows than 7 a case makes the rest itself, of ids without placeholders beside images of their own.
    batch_size, seq_length, num_hidden_layers, hidden_size, num_attention_heads = 7, 24, 2, 32, 4
    is_training, encoder_seq_length, key_length, image_size, num_frames = True, 24, 24, 8, 2

    def __init__(
        self, audio: bool = False, tower: str = "siglip_vision_model", words: str = "llama", further: str = "", **options: Any
    ):
        self.audio, self.parents, self.further, self.options = audio, (tower, words), further, options
        self.encoder_decoder = words == "t5"
        self.audio_config = {"num_hidden_layers": 2}

    def get_config(self) -> Any:
        from modeling_frozen import FrozenPrefixConfig

        tower, words, audio_config = _parents(*self.parents)
        options = {"connector_type": "mlp", "image_token_id": IMAGE, "trainable": ("connector", "vision", "text")}
        if self.audio:
            options |= {"audio_config": audio_config, "audio_prefix_length": 3, "audio_token_id": AUDIO}
            options |= {"audio_connector_type": "resampler", "audio_connector_config": SMALL_RESAMPLER}
            options |= {"num_frames": self.num_frames, "video_pooling": "mean", "video_token_id": VIDEO}
            options["trainable"] = ("connector", "vision", "text", "audio")
        if self.further:
            tower = [tower, _parents(self.further, self.parents[1])[0]]
            options["trainable"] = ("connector", "vision", "vision_2", "text")
        return FrozenPrefixConfig.from_vision_text_configs(tower, words, **{**options, **self.options})

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        import torch

        config = self.get_config()
        batch, length = self.batch_size, self.seq_length
        ids = torch.randint(3, VOCABULARY - 5, (batch, length))
        inputs = {"pixel_values": torch.rand(batch, 3, 8, 8)}
        if self.further:
            inputs["pixel_values_2"] = torch.rand(batch, 3, 8, 8)
        counts = [(IMAGE, config.num_image_tokens)]
        if self.audio:
            inputs["pixel_values_videos"] = torch.rand(batch, self.num_frames, 3, 8, 8)
            inputs["input_features"] = torch.rand(batch, 8, 20)
            counts += [(VIDEO, config.num_video_tokens), (AUDIO, config.num_audio_tokens)]
        at = 1
        for index, count in counts:
            ids[:, at : at + count] = index
            at += count
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
        if self.encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY - 5, (batch, length))
        return config, inputs


def model_suite(name: str, **options: Any) -> type[unittest.TestCase]:
    from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixModel
    from tests.generation.test_utils import GenerationTesterMixin
    from tests.test_modeling_common import ModelTesterMixin

    class Suite(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
        all_model_classes = (FrozenPrefixModel, FrozenPrefixForConditionalGeneration)
        is_encoder_decoder = options.get("words") == "t5"
        _is_composite = True
        test_resize_embeddings = False
        # With the ids of a prompt come its images; those that a suite's model does not take are not in its inputs.
        additional_model_inputs: ClassVar = ["pixel_values", "pixel_values_2", "pixel_values_videos", "input_features"]
        test_can_init_all_missing_weights_before_2023 = True
        skip_test_video_features_output_shape = True  # the tower's own output is frame by frame, not video by video

        def setUp(self) -> None:
            self.model_tester = ModelTester(**options)

        def _prepare_for_class(self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False) -> dict:
            inputs_dict = super()._prepare_for_class(inputs_dict, model_class)
            if return_labels and model_class is FrozenPrefixForConditionalGeneration:
                inputs_dict["labels"] = inputs_dict["input_ids"].clone()
            return inputs_dict

    Suite.__name__ = Suite.__qualname__ = name
    return Suite


def config_suite(name: str) -> type[unittest.TestCase]:
    import transformers

    from modeling_frozen import FrozenPrefixConfig

    # It reads the package from the folder of the tests, where the distribution has none.
    transformers.utils.direct_transformers_import = lambda *_: transformers
    from tests.test_configuration_common import ConfigTester

    class Suite(unittest.TestCase):
        def test_config(self) -> None:
            self.model_tester = ModelTester()
            tester = ConfigTester(
                self,
                config_class=FrozenPrefixConfig,
                has_text_modality=False,
                common_properties=["image_token_id", "vision_config", "text_config"],
            )
            for check in dir(tester):
                if check.startswith(("create_and_test", "check_")):
                    with self.subTest(check):
                        getattr(tester, check)()

    Suite.__name__ = Suite.__qualname__ = name
    return Suite


def processor_suite(name: str) -> type[unittest.TestCase]:
    from modeling_frozen.processors import FrozenPrefixProcessor
    from tests.helpers import processors as own
    from tests.test_processing_common import ProcessorTesterMixin

    class Suite(ProcessorTesterMixin, unittest.TestCase):
        processor_class = FrozenPrefixProcessor

        @classmethod
        def _setup_tokenizer(cls) -> Any:
            return own.byte_tokenizer()

        @classmethod
        def _setup_image_processor(cls) -> Any:
            return own.image_processor()

        @staticmethod
        def prepare_processor_dict() -> dict[str, Any]:
            return {"prefix_length": 4}

    Suite.__name__ = Suite.__qualname__ = name
    return Suite


SUITES: dict[str, Any] = {
    "Images": lambda name: model_suite(name),
    "ImagesAndAudio": lambda name: model_suite(name, audio=True),
    "CrossAttention": lambda name: model_suite(name, fusion="cross_attention", cross_attention_config=SMALL_BLOCKS),
    "EncoderDecoder": lambda name: model_suite(name, words="t5"),
    **{name: lambda name: model_suite(name, **{**COMBINATIONS, **VISION}[name]) for name in (*COMBINATIONS, *VISION)},
    "Config": config_suite,
    "ImageProcessor": processor_suite,
}


class _Result(unittest.TestResult):
    """Outcome and reason by the name of the case."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, tuple[str, str]] = {}

    def _put(self, test: Any, outcome: str, reason: str = "") -> None:
        name = getattr(test, "test_case", test).id().rsplit(".", 1)[-1]
        if self.outcomes.get(name, ("",))[0] != "failed":
            self.outcomes[name] = (outcome, reason)

    def addSuccess(self, test: Any) -> None:  # noqa: N802
        self._put(test, "passed")

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802
        self._put(test, "skipped", reason)

    def addFailure(self, test: Any, error: Any) -> None:  # noqa: N802
        self._put(test, "failed", self._exc_info_to_string(error, getattr(test, "test_case", test)))

    addError = addFailure  # noqa: N815

    def addSubTest(self, test: Any, subtest: Any, error: Any) -> None:  # noqa: N802
        if error is not None:
            self.addFailure(subtest, error)


def main(folder: str, suite: str, results: str, *only: str) -> None:
    here = str(Path(__file__).parent)
    sys.path[:] = [folder, *(path for path in sys.path if path not in ("", here)), str(ROOT)]
    package = types.ModuleType("tests")  # both packages of this name, by hand: the distribution's has no `__init__.py`
    package.__path__ = [str(Path(folder) / "tests"), str(ROOT / "tests")]
    sys.modules["tests"] = package
    stand_ins = {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})}
    _stand_in("tests.exporters")
    _stand_in("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in("tests.generation")
    _stand_in("tests.generation.test_utils", **stand_ins)
    _stand_in("tests.utils")
    _stand_in("tests.utils.test_configuration_utils", config_common_kwargs={})
    photo = Path(results).with_name("photo.png")
    _stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url, **_: str(photo) if url.endswith("png") else url)
    from PIL import Image

    Image.effect_noise((40, 30), 80).convert("RGB").save(photo)
    cases = SUITES[suite](suite)
    for name, reason in LEFT_OUT[suite].items():
        if hasattr(cases, name):
            setattr(cases, name, unittest.skip(reason)(getattr(cases, name)))
    names = [name for name in unittest.defaultTestLoader.getTestCaseNames(cases) if not only or name in only]
    result = _Result()
    unittest.TestSuite(map(cases, names)).run(result)
    Path(results).write_text(json.dumps(result.outcomes, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
