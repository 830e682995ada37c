"""The package as such: what importing it costs and does, and the rules that keep it loadable from the Hub."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modeling_frozen
from modeling_frozen.cli import COMMANDS
from tests.helpers import fresh_python


ROOT = Path(__file__).parents[1]
OWN = [path for path in (ROOT / "modeling_frozen").rglob("*.py") if path.parent.name != "processors"]  # that stands in
SOURCES = sorted([*OWN, *(ROOT / "processors").glob("*.py")])


def fresh(code: str) -> str:
    """Output of a fresh Python, that has imported nothing."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def forked(code: str, cwd: Path = ROOT) -> str:
    """The same, where torch may be there already."""
    done = fresh_python.run("-c", code, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_touches_neither_torch_nor_transformers() -> None:
    code = "import sys, modeling_frozen; print([m for m in ('torch', 'transformers', 'PIL', 'numpy') if m in sys.modules])"
    assert fresh(code) == "[]"


def test_beside_transformers_it_imports_nothing_heavy() -> None:
    """The Auto classes, torch and the processors wait until somebody asks for them."""
    code = "import sys, transformers{}; print(sorted(m for m in sys.modules if m.split('.')[0] in {}))"
    heavy = ("torch", "PIL", "tokenizers", "safetensors", "accelerate", "peft", "datasets")
    code += "; print(sorted(m for m in sys.modules if m.startswith('transformers.models.auto')))"
    assert fresh(code.format(", modeling_frozen", heavy)) == fresh(code.format("", heavy))


def test_the_command_and_each_of_its_commands_say_their_help_without_torch() -> None:
    code = """
import sys
from modeling_frozen.cli import COMMANDS, main
for arguments in [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]:
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0
print([m for m in ("torch", "transformers", "numpy", "PIL") if m in sys.modules])
"""
    said = fresh(code)
    assert said.startswith("usage: frozen-prefix") and said.endswith("[]")
    assert all(f"usage: frozen-prefix {name}" in said for name in COMMANDS) and f"\n{modeling_frozen.__version__}\n" in said


@pytest.mark.parametrize("first", ["import modeling_frozen", "from transformers import AutoModel, AutoProcessor"])
def test_the_auto_classes_know_the_type_whatever_is_imported_first(first: str) -> None:
    code = f"""
{first}
import modeling_frozen
import transformers
from modeling_frozen.hub import AUTO_MAP
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = modeling_frozen.FrozenPrefixConfig
assert transformers.CONFIG_MAPPING["frozen-prefix"] is config
for auto, target in AUTO_MAP.items():
    if auto.startswith("AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        assert mapping[config] is getattr(modeling_frozen, target.split(".")[1]), auto
assert PROCESSOR_MAPPING[config] is modeling_frozen.FrozenPrefixProcessor
print("known")
"""
    assert forked(code) == "known"


def test_it_is_registered_wherever_llava_is() -> None:
    import transformers

    from modeling_frozen.hub import AUTO_MAP

    names = [name for name in dir(transformers) if name.startswith("AutoModel")]
    mappings = {name: getattr(getattr(transformers, name), "_model_mapping", ()) for name in names}
    assert {name for name, mapping in mappings.items() if transformers.LlavaConfig in mapping} <= AUTO_MAP.keys()


def test_public_names_are_there() -> None:
    for name in modeling_frozen.__all__:
        assert getattr(modeling_frozen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = modeling_frozen.Nonsense


def test_one_version() -> None:
    from modeling_frozen.configuration_frozen_prefix import VERSION

    assert modeling_frozen.__version__ == VERSION


def imported(path: Path) -> set[str]:
    """Modules that a file imports, by the names that it says; of its own folder's, none."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}


def test_nobody_imports_a_second_copy_of_the_processors() -> None:
    """`import processors` would give other classes than `modeling_frozen.processors`, or a folder of the user's."""
    for path in [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        assert not any(name.split(".")[0] == "processors" for name in imported(path)), path


def test_no_test_imports_another() -> None:
    """Nor does the code that it runs in another process; what tests share is in tests/helpers/."""
    tests = {path.stem for path in ROOT.glob("tests/test_*.py")}
    for path in ROOT.glob("tests/**/*.py"):
        said = set(re.findall(r"\btests(?:\.| import )(test_\w+)", path.read_text(encoding="utf-8")))
        assert said & tests <= {path.stem}, path


def test_benchmarks_import_neither_tests_nor_examples() -> None:
    others_code = ("peers.py", "real_parents.py")  # of a checkout, of a wheel
    others = {"tests", "examples", *(path.stem for path in ROOT.glob("examples/*.py"))}
    for path in ROOT.glob("benchmarks/**/*.py"):
        assert not others & {name.split(".")[0] for name in imported(path)}, path
        assert "sys.path" not in path.read_text(encoding="utf-8") or path.name in others_code, path


def test_a_folder_named_processors_beside_a_script_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "processors").mkdir()
    (tmp_path / "processors" / "__init__.py").write_text("raise RuntimeError('the wrong folder')")
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}]
import importlib.util
if importlib.util.find_spec("modeling_frozen") is None:
    sys.path.append({str(ROOT)!r})
import modeling_frozen
print(modeling_frozen.FrozenPrefixProcessor.__module__)
"""
    assert forked(code, tmp_path) == "modeling_frozen.processors.processing_frozen_prefix"


def test_there_are_no_symbolic_links() -> None:
    """Git writes them as text files where links can't be made, as on Windows."""
    folders = (ROOT, *(ROOT / name for name in ("modeling_frozen", "processors", "examples", "benchmarks", "tests")))
    assert not [path for folder in folders for path in folder.iterdir() if path.is_symlink()]


@pytest.mark.parametrize(
    "first", ["modeling_frozen", "modeling_frozen.processors", "modeling_frozen.processors.image_loading"]
)
def test_one_copy_of_the_processors_runs_from_the_top(first: str) -> None:
    """In a checkout, whichever name is imported first, and in a process that starts from nothing but a pickle."""
    code = f"""
import {first}
import pickle, sys
import modeling_frozen
from modeling_frozen.processors import FrozenPrefixProcessor, load_rgb_image
from modeling_frozen.processors.image_loading import load_rgb_image as same
assert modeling_frozen.FrozenPrefixProcessor is FrozenPrefixProcessor and same is load_rgb_image
assert modeling_frozen.processors is sys.modules["modeling_frozen.processors"]
assert pickle.loads(pickle.dumps(FrozenPrefixProcessor)) is FrozenPrefixProcessor
print({{name: module.__file__ for name, module in sys.modules.items() if "processing_frozen_prefix" in name}})
"""
    here = ROOT / "processors" / "processing_frozen_prefix.py"
    assert fresh(code) == str({"modeling_frozen.processors.processing_frozen_prefix": str(here)})


def test_static_tools_find_the_processors() -> None:
    """They can follow `modeling_frozen.processors` to the top of a checkout, but none of its modules."""
    for path in [*SOURCES, *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not re.match(r"(modeling_frozen\.)?processors\.", node.module or ""), (path, ast.unparse(node))


def hub_files() -> list[Path]:
    """Files that are copied beside a checkpoint."""
    from transformers.dynamic_module_utils import get_relative_import_files

    from modeling_frozen.hub import AUTO_MAP, _source

    files: set[Path] = set()
    for module in {target.split(".")[0] for target in AUTO_MAP.values()}:
        source = _source(module)
        assert source is not None, module
        files |= {source, *map(Path, get_relative_import_files(source))}
    return sorted(files)


def test_code_for_the_hub_follows_its_rules() -> None:
    """Only `from .module import name` of the same folder is copied; anything else fails for people without the package."""
    files = hub_files()
    names = [file.name for file in files]
    assert len(names) == len(set(names)), "two files of one name would overwrite each other"
    assert {"modeling_frozen_prefix.py", "configuration_frozen_prefix.py", "processing_frozen_prefix.py"} <= set(names)
    for file in files:
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, (file.name, ast.unparse(node))
                assert f"{node.module}.py" in names, (file.name, node.module)
        # transformers finds imports by pattern, in docstrings too.
        for module in re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE):
            assert f"{module}.py" in names, (file.name, module)


def test_what_is_carried_into_other_repositories_names_its_licence() -> None:
    for file in hub_files():
        assert file.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n"), file


def test_every_file_says_what_lives_in_it() -> None:
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def imports_of(file: Path) -> set[str]:
    """Modules of our own that a file imports anywhere, in functions and for the type checker too."""
    package = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    package = package.replace("processors", "modeling_frozen.processors", 1) if package.startswith("processors") else package
    parts = package.removesuffix(".__init__").split(".") if file.name == "__init__.py" else package.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level + 1]
            target = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            found |= {f"{target}.{alias.name}" for alias in node.names} | {target}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modeling_frozen"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def modules() -> dict[str, Path]:
    files = [*(ROOT / "modeling_frozen").rglob("*.py"), *(ROOT / "processors").rglob("*.py")]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    del names["modeling_frozen.processors"]  # the stand-in of a checkout
    return {name if name.startswith("modeling_frozen") else f"modeling_frozen.{name}": file for name, file in names.items()}


def test_no_import_goes_in_a_circle() -> None:
    """Those for the type checker count: who reads one file of a circle has to read all."""
    known = modules()
    # The packages' own files gather names; nothing in the package may read them from there.
    graph = {name: (imports_of(file) & known.keys()) - {name} for name, file in known.items() if file.name != "__init__.py"}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_what_a_checkpoint_carries_imports_from_its_own_folder() -> None:
    known = modules()
    carried = {name for name in known if name.count(".") == 1 and known[name].parent.name == "modeling_frozen"}
    carried -= {"modeling_frozen.lora", "modeling_frozen._registration"}
    folders = {name for name, file in known.items() if file.parent.name not in ("modeling_frozen", "processors")}
    for name in carried:
        assert not imports_of(known[name]) & folders, name


def test_the_root_says_what_goes_to_the_hub() -> None:
    assert len(list((ROOT / "modeling_frozen").glob("*.py"))) <= 30


def test_custom_code_asks_for_nothing_that_only_some_need() -> None:
    """transformers loads no repository whose code imports what is not installed, wherever the import stands."""
    from transformers.dynamic_module_utils import get_imports

    needed = {
        "torch",
        "transformers",
        "huggingface_hub",
        "safetensors",
        "accelerate",
        "packaging",
        "numpy",
        "PIL",
        "typing_extensions",
    }
    for folder in ("modeling_frozen", "processors"):
        for file in (ROOT / folder).glob("*.py"):
            if file.name not in ("__init__.py", "lora.py", "_registration.py", "torch_builds.py"):
                others = set(get_imports(file)) - needed - set(sys.stdlib_module_names) - {"tokenizers"}
                assert not others, f"{file.name}: {others}"
