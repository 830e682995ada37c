"""The private names of transformers and torch that the package uses: each with its reason, and there on every release.

What has no public way is listed here. A name that a release drops, or one that is used without being listed, fails.
"""

import ast
import importlib
import inspect
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import modeling_frozen
import modeling_frozen.processors


def is_private(name: str) -> bool:
    return name.isidentifier() and name.startswith("_") and not name.startswith("__") and name != "_"


@dataclass(frozen=True)
class Private:
    """
    One private name, or several on one path.

    Args:
        path: `package.module.object.name`; with `()` of an instance made without arguments; with `:` before the name where no
            object has it from the start, but the module's source reads or writes it.
        why: what it is used for, and why by a private name.
        since, until: the release that brought it, and the first one without it, where that lies in the supported range.
    """

    path: str
    why: str
    since: str | None = None
    until: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in self.path.replace("()", "").replace(":", ".").split(".") if is_private(name)]

    @property
    def expected(self) -> bool:
        release = Version(Version(self.library.__version__).base_version)
        late_enough = self.since is None or release >= Version(self.since)
        return late_enough and (self.until is None or release < Version(self.until))

    @property
    def library(self) -> Any:
        return importlib.import_module(self.path.partition(".")[0])

    def exists(self) -> bool:
        path, _, read = self.path.partition(":")
        if read:
            source = inspect.getsource(importlib.import_module(path))
            return read in {name for name, _ in names_in(ast.parse(source))}
        owner, _, name = path.rpartition(".")
        try:
            thing = pkgutil.resolve_name(owner.removesuffix("()"))
        except (ImportError, AttributeError):
            return False
        return hasattr(thing() if owner.endswith("()") else thing, name)


HOOK_OF_GENERATE = "hook of generate(), meant to be overridden; there is no public one"
HOOK_OF_PROCESSOR = "hook of ProcessorMixin, which transformers' processors override too; there is no public one"
FLAG = "flag of a model class, set by each model of transformers; there is no public one"
CONFIG_KEY = "key that transformers hands to a config's constructor; named so as not to be refused as unknown"
WHY_NOT_FOUND = "tells why a file can't be had: the repository lacks it, or is out of reach; else all are an OSError"
HANDLER = "the server's handlers, which its constructor makes and names nowhere else: they are given our generate()"
CALLED_OTHERWISE = "tells that somebody changed how a module is called; torch has no public name for it"

SHARDED = "what loading a model whole sets, told of one whose language model alone was loaded; there is no public way"

PRIVATE = [
    # ------------------------------------------------------------------------------------------------ tensor parallel
    Private("transformers.PreTrainedModel._tp_size", SHARDED),
    Private("transformers.PreTrainedModel._device_mesh", SHARDED),
    Private("transformers.PreTrainedModel._is_distributed_loading_by_transformers", SHARDED, since="5.19"),
    # ---------------------------------------------------------------------------------------------------------- serving
    Private("transformers.cli.serve:_chat_handler", HANDLER),
    Private("transformers.cli.serve:_completion_handler", HANDLER),
    Private("transformers.cli.serve:_response_handler", HANDLER),
    # ------------------------------------------------------------------------------------------------------ generate()
    Private("transformers.GenerationMixin._expand_inputs_for_generation", HOOK_OF_GENERATE),
    Private("transformers.GenerationMixin._expand_multimodal_outputs", HOOK_OF_GENERATE, since="5.18"),
    Private("transformers.GenerationMixin._get_candidate_generator", HOOK_OF_GENERATE),
    Private("transformers.GenerationMixin._get_logits_processor", HOOK_OF_GENERATE),
    Private("transformers.GenerationMixin._maybe_prepare_encoder_kwargs_for_generation", HOOK_OF_GENERATE, since="5.18"),
    Private("transformers.GenerationMixin._prefill", HOOK_OF_GENERATE),
    Private("transformers.GenerationMixin._prepare_cache_for_generation", HOOK_OF_GENERATE),
    Private("transformers.GenerationMixin._prepare_encoder_decoder_kwargs_for_generation", HOOK_OF_GENERATE, until="5.18"),
    Private("transformers.GenerationMixin._prepare_multimodal_encoder_kwargs_for_generation", HOOK_OF_GENERATE, since="5.18"),
    Private(
        "transformers.GenerationMixin._prepare_text_encoder_decoder_kwargs_for_generation", HOOK_OF_GENERATE, since="5.18"
    ),
    Private("transformers.GenerationMixin._validate_model_kwargs", HOOK_OF_GENERATE),
    Private(
        "transformers.GenerationMixin._supports_default_dynamic_cache",
        "which families have a cache of their own kind: transformers keeps the list to itself",
    ),
    Private(
        "transformers.GenerationConfig()._from_model_config",
        "tells a generation config that nobody chose from one that a checkpoint holds; nothing public does",
    ),
    Private(
        "transformers.GenerationMixin._prepare_generated_length",
        "hook of generate(): ends an answer where learned positions run out",
    ),
    # ---------------------------------------------------------------------------------------------------------- models
    Private("transformers.PreTrainedModel._can_compile_fullgraph", FLAG),
    Private("transformers.PreTrainedModel._is_stateful", FLAG),
    Private("transformers.PreTrainedModel._keep_in_fp32_modules_strict", FLAG),
    Private("transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected", FLAG),
    Private("transformers.PreTrainedModel._keys_to_ignore_on_save", FLAG),
    Private("transformers.PreTrainedModel._no_split_modules", FLAG),
    Private("transformers.PreTrainedModel._skip_keys_device_placement", FLAG),
    Private("transformers.PreTrainedModel._supports_attention_backend", FLAG),
    Private("transformers.PreTrainedModel._supports_flash_attn", FLAG),
    Private("transformers.PreTrainedModel._supports_flex_attn", FLAG),
    Private("transformers.PreTrainedModel._supports_sdpa", FLAG),
    Private(
        "transformers.PreTrainedModel._from_config",
        "builds a class that `AutoModel.from_config` does not give: a half, an encoder",
    ),
    Private(
        "transformers.PreTrainedModel._load_pretrained_model",
        "hook of from_pretrained: takes away the rules for names of a backbone's own repository, which no option does; and "
        "of load_adapter: adds those for an adapter's whole modules, before 5.18, which are known only there",
    ),
    Private(
        "transformers.PreTrainedModel._adjust_missing_and_unexpected_keys",
        "hook of from_pretrained: the report on the checkpoint itself, where an adapter's is returned in its place",
    ),
    Private(
        "transformers.PreTrainedModel._get_dtype_plan",
        "hook of from_pretrained: parents of different dtypes; `dtype={...}` goes by sub-config, and not as saved",
    ),
    Private(
        "transformers.PreTrainedModel._set_gradient_checkpointing",
        "hook in which gradient_checkpointing_enable and, from 5.24 on, activation_checkpointing_enable end",
    ),
    Private(
        "transformers.PreTrainedModel._upload_modified_files",
        "hook in which push_to_hub and save_pretrained(push_to_hub=True) end",
    ),
    Private(
        "transformers.ProcessorMixin._upload_modified_files",
        "hook in which push_to_hub and save_pretrained(push_to_hub=True) end",
    ),
    Private(
        "transformers.modeling_layers:_gradient_checkpointing_func",
        "the checkpointing function that was set on a layer; it is nowhere else",
    ),
    Private(
        "transformers.initialization:_is_hf_initialized",
        "mark of modules and tensors that post_init() is to leave as they are; there is no public one",
    ),
    Private(
        "transformers.Wav2Vec2PreTrainedModel._get_feat_extract_output_lengths",
        "asked of an audio tower where it has it: no public method tells how long its features are",
    ),
    Private(
        "transformers.generation.utils._slice_mm_encoder_output",
        "asked for, for nothing public tells whether a prompt is read in chunks with its images",
        since="5.23",
    ),
    # --------------------------------------------------------------------------------------------------------- configs
    Private("transformers.PreTrainedConfig()._attn_implementation", "by which every model reads it; no public name reads it"),
    Private("transformers.PreTrainedConfig()._experts_implementation", "likewise, of how experts are multiplied"),
    Private("transformers.PreTrainedConfig()._name_or_path", CONFIG_KEY),
    # ------------------------------------------------------------------------------------------------------ processors
    Private("transformers.ProcessorMixin._get_arguments_from_pretrained", HOOK_OF_PROCESSOR),
    Private("transformers.ProcessorMixin._process_audio", HOOK_OF_PROCESSOR),
    Private("transformers.ProcessorMixin._process_videos", HOOK_OF_PROCESSOR),
    Private("transformers.ProcessorMixin._process_images", HOOK_OF_PROCESSOR),
    Private("transformers.ProcessorMixin._merge_kwargs", HOOK_OF_PROCESSOR + "; called, too, for what comes before"),
    Private("transformers.processing_utils:_defaults", "of a processor's keywords, in its guide to custom processors"),
    Private("transformers.utils.chat_template_utils._CONTROL_TOKEN_START", "stands in rendered chats alone", since="5.20"),
    Private("transformers.utils.chat_template_utils._CONTROL_TOKEN_END", "stands in rendered chats alone", since="5.20"),
    # ---------------------------------------------------------------------------------------- Auto classes and the Hub
    Private(
        "transformers.models.auto.modeling_auto.MODEL_MAPPING._reverse_config_mapping",
        "adds a class by its name: `register` wants the class, and with it seconds of imports",
    ),
    Private("transformers.models.auto.modeling_auto.MODEL_MAPPING._modules", "as _reverse_config_mapping"),
    Private("transformers.models.auto.modeling_auto.AutoModel._model_mapping", "as _reverse_config_mapping"),
    Private("transformers.models.auto.modeling_auto.MODEL_MAPPING._model_mapping", "as _reverse_config_mapping"),
    Private("transformers.models.auto.configuration_auto.CONFIG_MAPPING._modules", "as _reverse_config_mapping"),
    Private("transformers.utils.hub:_raise_exceptions_for_missing_entries", WHY_NOT_FOUND),
    # ----------------------------------------------------------------------------------------------------------- torch
    Private("torch.nn.Module()._backward_hooks", CALLED_OTHERWISE),
    Private("torch.nn.Module()._backward_pre_hooks", CALLED_OTHERWISE),
    Private("torch.nn.Module()._compiled_call_impl", CALLED_OTHERWISE),
    Private("torch.nn.Module()._forward_hooks", CALLED_OTHERWISE),
    Private("torch.nn.Module()._forward_pre_hooks", CALLED_OTHERWISE + "; and whether ours is there"),
    Private("torch.nn.modules.module:_is_replica", "mark of nn.DataParallel's copies; there is no public one"),
    Private("torch.nn.Module()._modules", "a copy with one part replaced; by a public name the original would change too"),
    Private(
        "torch.nn.Module()._non_persistent_buffers_set",
        "which buffers are not saved; the state dict, which tells too, is gathered where it is sharded",
    ),
    Private("torch._C._current_graph_task_id", "tells that a backward pass runs; nothing public does"),
    Private(
        "torch._C._dynamo.eval_frame.get_eval_frame_callback",
        "what compiles the model, so that its parts are compiled by the same where the rest runs beside a graph",
    ),
    Private("torch._C._dynamo.eval_frame.set_eval_frame", "the same; `torch.compile` would have to be told its options again"),
    Private("torch._dynamo.exc.UserError", "what torch.export raises of a graph that can't be; no public module has it"),
    Private("torch._subclasses.fake_tensor.FakeTensorMode", "shapes without memory, on a device that counts as the CPU"),
]

# Ours, on objects that are not: names that begin with `_frozen_prefix`, and these.
OWN_MARKS = {"_active_connector", "_specs_of_connectors", "_generator"}


# ---------------------------------------------------------------------------------------------------------- the sources


def names_in(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names, with their lines, that somebody may look up on an object: attributes, members of classes, keywords, imports, and
    strings that stand where a name does."""
    for node in ast.walk(tree):
        candidates: list[Any] = []
        if isinstance(node, ast.Attribute):
            candidates = [node.attr]
        elif isinstance(node, ast.ClassDef):
            candidates = members(node)
        elif isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
            place = {"getattr": 1, "hasattr": 1, "setattr": 1, "delattr": 1, "get": 0, "pop": 0, "setdefault": 0}.get(called)
            candidates = [keyword.arg for keyword in node.keywords] + ([] if place is None else node.args[place : place + 1])
        elif isinstance(node, ast.Dict):
            candidates = node.keys
        elif isinstance(node, (ast.Set, ast.Tuple, ast.List)):
            candidates = node.elts
        elif isinstance(node, ast.Subscript):
            candidates = [node.slice]
        elif isinstance(node, ast.JoinedStr):  # a name that is put together
            candidates = node.values[:1]
        elif isinstance(node, ast.arg):
            candidates = [node.arg]
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            candidates = ".".join(modules).split(".")
        for name in candidates:
            name = name.value if isinstance(name, ast.Constant) else name
            if isinstance(name, str) and is_private(name):
                yield name, node.lineno


def members(node: ast.ClassDef) -> list[str]:
    """Of a class: methods, attributes, and what methods set on `self`."""
    functions = [inner.name for inner in node.body if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef))]
    stores = [inner for inner in ast.walk(node) if isinstance(getattr(inner, "ctx", None), ast.Store)]
    on_self = [
        one.attr for one in stores if isinstance(one, ast.Attribute) and getattr(one.value, "id", "") in ("self", "cls")
    ]
    targets = [target for inner in node.body for target in getattr(inner, "targets", [getattr(inner, "target", None)])]
    return functions + on_self + [target.id for target in targets if isinstance(target, ast.Name)]


@cache
def package_trees() -> dict[str, ast.Module]:
    folders = {Path(package.__file__).parent for package in (modeling_frozen, modeling_frozen.processors)}
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    return {str(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


@cache
def uses() -> dict[str, list[str]]:
    """Where the package uses each private name, its own and others'."""
    places = defaultdict(list)
    for file, tree in package_trees().items():
        for name, line in names_in(tree):
            places[name].append(f"{file}:{line}")
    return dict(places)


@cache
def own_names() -> set[str]:
    """What the package itself defines."""
    own = set()
    for tree in package_trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                own.update([node.name, *members(node)])
            elif isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    return own


@cache
def names_of_base_classes() -> dict[str, str]:
    """Private names in the modules of all classes of the libraries from which the package's own classes descend."""
    sources = set()
    for package in (modeling_frozen, modeling_frozen.processors):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                module = importlib.import_module(info.name)
            except ImportError:  # it needs an extra that is not installed
                continue
            classes = [one for one in vars(module).values() if inspect.isclass(one)]
            bases = {base for one in classes if one.__module__.startswith("modeling_frozen") for base in one.__mro__}
            sources |= {base.__module__ for base in bases if base.__module__.partition(".")[0] in ("transformers", "torch")}
    names = {}
    for source in sorted(sources - {"torch._C"}):  # of no Python
        tree = ast.parse(inspect.getsource(importlib.import_module(source)))
        names.update({name: source for name, _ in names_in(tree)})
    return names


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize("one", PRIVATE, ids=[one.path for one in PRIVATE])
def test_a_private_name_is_there_on_every_release_that_is_said_to_have_it(one: Private) -> None:
    where = ", ".join(place for name in one.names for place in uses().get(name, []))
    release = f"{one.library.__name__} {one.library.__version__}"
    assert one.exists() is one.expected, (
        f"{one.path} is {'there' if one.exists() else 'gone'} in {release}, and is listed as since={one.since}, "
        f"until={one.until}. It is used in {where}: {one.why}."
    )


def test_every_private_name_in_use_is_listed_with_its_reason() -> None:
    known = {name for one in PRIVATE for name in one.names} | OWN_MARKS
    own, inherited = own_names(), names_of_base_classes()
    unlisted = {}
    for name, places in uses().items():
        if name in known or name.startswith("_frozen_prefix"):
            continue
        if name not in own:
            unlisted[name] = f"is another library's, at {', '.join(places)}"
        elif name in inherited:  # it overrides or is overridden, meant or not
            unlisted[name] = f"is ours and a base class's too (`{inherited[name]}`), at {', '.join(places)}"
    assert not unlisted, f"list these in PRIVATE with their reason, or do without: {unlisted}"


def test_every_listed_name_is_in_use() -> None:
    unused = [one.path for one in PRIVATE if not all(name in uses() for name in one.names)]
    assert not unused, f"PRIVATE lists what the package uses no more: {unused}"
    assert OWN_MARKS <= uses().keys()


def test_both_libraries_are_looked_at() -> None:
    assert {one.library.__name__ for one in PRIVATE} == {"torch", "transformers"}
    assert {"_prefill", "_keys_to_ignore_on_save", "_merge_kwargs", "_modules"} <= names_of_base_classes().keys()
