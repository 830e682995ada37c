"""Runs what prints the figures of the documentation, and writes them where its pages include them: docs/tables/NAME.md.

    python -m benchmarks.results                        # all, in hours; on a quiet machine, for many are timings
    python -m benchmarks.results --only quickstart vqa
    python -m benchmarks.results --list                 # names, commands, what each needs, and how long it took

A file holds what the command printed (or the table that it wrote), and a last line that says by which command, when, on which
versions, on how many cores. A command that fails leaves its file as it is. Files whose last line says "earlier
code" were put together from what these commands printed before there was this one; running them writes the files anew.

Most need nothing that can't be had. The others name a place that an option stands for: `assets/…`, a folder with the story
model, photos and questions (`--assets`; the Hub's ids, in their place, where these are known), and checkouts of others' code
(`--clipcap`, `--nanovlm`), and the folder of a model (`--smollm2`). Without its place a result is left out, which is said.
Ids are fetched from the Hub; behind `python -m benchmarks.real_parents … --serve -- python -m benchmarks.results` they come
from the loopback.
"""

import argparse
import contextlib
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import modeling_frozen


ROOT = Path(__file__).parents[1]
TABLES = ROOT / "docs" / "tables"
PLACES = {  # option -> as commands name it
    "assets": "assets",
    "lite": "efficientnet-lite2",
    "clipcap": "CLIP_prefix_caption",
    "nanovlm": "nanoVLM",
    "smollm2": "SmolLM2-135M-Instruct",
}
EARLIER = "Taken on earlier code of 0.2.0, before a run wrote down its date and versions."
FOOTER = re.compile(r"\n\n```bash\n(?P<command>.+?)\n```\n\n\*(?P<taken>.+)\*\n$", re.DOTALL)


@dataclass(frozen=True)
class Result:
    """
    Args:
        name: of the file in docs/tables.
        command: what prints the figures, after what it needs, with `&&` between.
        timing: whether it measures time, so that nothing else may run beside it.
        table: whether the command's last word names a Markdown file that it writes; else what it prints is kept.
    """

    name: str
    command: str
    timing: bool = False
    table: bool = False

    @property
    def needs(self) -> list[str]:
        """Options without which it can't run."""
        return [option for option, place in PLACES.items() if re.search(rf"(^|[ =]){place}\b", self.command)]


OUT = "build/results"
SHAPES = f"python -m modeling_frozen.shapes --output_dir {OUT}/shapes && "
OFFLINE = f"--vision {OUT}/shapes/tower --text {OUT}/shapes/language_model --dataset {OUT}/shapes"
MOBILENET, STORY = "assets/vision/mobilenet_v2_1.0_224", "assets/lm/tinystories_instruct_3m_chat"
CAPTIONING = f"python examples/train_captioning.py --vision {MOBILENET} --text {STORY} --dataset assets/captions/flickr8k_1k"
GROWING = [f"--rows {10**power}" for power in (3, 4, 5, 6)]
EYES = " ".join(f"{OUT}/photos/{seed}/eyes" for seed in range(3))
ASKED = "--kinds sighted blind --num_beams 3 --max_new_tokens 24 --batch_size 25"
CURVE = (
    f"python -m benchmarks.learning_curve --no_chat --points 0.25 0.5 1 --vision {MOBILENET} --text {STORY} "
    f"--dataset assets/captions/flickr8k_1k --store {OUT}/learning_curve"
)
REAL_CURVE = (
    "python -m benchmarks.learning_curve --vision google/mobilenet_v2_1.0_224 --text HuggingFaceTB/SmolLM2-135M-Instruct"
)
CAPTIONED = " ".join(f"{OUT}/captioning/{seed}" for seed in range(3))

RESULTS = (
    # ----------------------------------------------------------------------------------------- examples, without a network
    Result("quickstart", f"python examples/quickstart.py --output_dir {OUT}/quickstart"),
    Result("vqa", f"{SHAPES}python examples/train_vqa.py {OFFLINE}/questions --output_dir {OUT}/vqa"),
    Result("vqa_lora", f"{SHAPES}python examples/train_vqa.py {OFFLINE}/questions --lora_rank 8 --output_dir {OUT}/vqa_lora"),
    Result("search", f"{SHAPES}python examples/search.py {OFFLINE}/captions --learning_rate 1e-3 --output_dir {OUT}/search"),
    Result("classify", f"{SHAPES}python examples/classify.py {OFFLINE}/questions --output_dir {OUT}/classify"),
    Result(
        "multilingual",
        f"python -m benchmarks.shapes.languages --output_dir {OUT}/languages && python examples/train_multilingual.py "
        f"--vision {OUT}/languages/tower --text {OUT}/languages/language_model --dataset {OUT}/languages/texts "
        f"--output_dir {OUT}/multilingual",
    ),
    Result("stories", f"python -m benchmarks.shapes.stories --output_dir {OUT}/stories"),
    Result("films", f"python -m benchmarks.shapes.films --output_dir {OUT}/films"),
    Result("few_shot", f"python -m benchmarks.shapes.few_shot --output_dir {OUT}/few_shot"),
    Result("faithfulness", f"python -m benchmarks.shapes.faithfulness --seeds 0 1 2 --output_dir {OUT}/faithfulness"),
    Result("digits", "python -m benchmarks.digits"),
    # ----------------------------------------------------------------------------------------------------------- real data
    Result(
        "photos",
        " && ".join(f"python examples/quickstart_real.py --seed {seed} --output_dir {OUT}/photos/{seed}" for seed in range(3))
        + f" && frozen-prefix evaluate --model {EYES} --dataset jxie/flickr8k --split test --rows 125 {ASKED} "
        f"--output_dir {OUT}/photos/scores",
    ),
    Result("photos_long", f"python examples/quickstart_real.py --steps 700 --crops 3 --output_dir {OUT}/photos_long"),
    Result(
        "photos_wide",
        f"python examples/quickstart_real.py --connector_config '{{\"hidden_size\": 2880}}' --output_dir {OUT}/photos_wide",
    ),
    Result(
        "captioning",
        " && ".join(f"{CAPTIONING} --seed {seed} --output_dir {OUT}/captioning/{seed}" for seed in range(3))
        + f" && frozen-prefix evaluate --model {CAPTIONED} --dataset assets/captions/flickr8k_1k --split test --no_chat "
        f"--num_beams 5 --no_repeat_ngram_size 3 --output_dir {OUT}/captioning/scores",
    ),
    Result(
        "captioning_coco",
        f"frozen-prefix evaluate --model {OUT}/captioning/0 --dataset assets/captions/coco_open --split test --no_chat "
        "--kinds sighted --num_beams 5 --no_repeat_ngram_size 3",
    ),
    Result(
        "photos_coco",
        f"frozen-prefix evaluate --model {EYES} --dataset assets/captions/coco_open/data/*.parquet {ASKED} "
        f"--output_dir {OUT}/photos_coco",
    ),
    Result(
        "two_stages",
        f"python -m benchmarks.two_stages {OUT}/photos/0/eyes assets --output_dir {OUT}/two_stages "
        "--table docs/tables/two_stages.md",
        table=True,
    ),
    Result(
        "learning_curve_story",
        f"{CURVE} --only peers --our_epochs 5 --clipcap CLIP_prefix_caption --output {OUT}/learning_curve_story.json "
        "--table docs/tables/learning_curve_story.md",
        table=True,
    ),
    Result(
        "learning_curve",
        f"{REAL_CURVE} --dataset assets/captions/flickr8k_1k --clipcap CLIP_prefix_caption "
        '--only ours "ClipCap\'s code, rate 0.001" '
        f'"transformers\' LLaVA, rate 0.001" --epochs 1 --points 0.25 0.5 1 --store {OUT}/learning_curve '
        f"--output {OUT}/learning_curve.json --table docs/tables/learning_curve.md",
        table=True,
    ),
    Result(
        "learning_changes",
        f"{CURVE} --only changes --points 0.5 1 --output {OUT}/learning_changes.json --table docs/tables/learning_changes.md",
        table=True,
    ),
    Result(
        "learning_moved",
        f"{REAL_CURVE} --from_text {STORY} --dataset assets/captions/flickr8k_1k "
        '--only "as it is" "moved from a smaller language model" '
        f"--epochs 1 --points 0 0.5 1 --store {OUT}/learning_curve --output {OUT}/learning_moved.json "
        "--table docs/tables/learning_moved.md",
        table=True,
    ),
    Result(
        "few_shot_photos",
        f"python -m benchmarks.few_shot_photos {OUT}/photos/0/eyes jxie/flickr8k --episodes 50 --shots 1 3 "
        f"--store {OUT}/few_shot_photos/store --output {OUT}/few_shot_photos.json --table docs/tables/few_shot_photos.md",
        table=True,
    ),
    Result(
        "masked_words",
        f"python -m benchmarks.masked_words assets --vision {MOBILENET} --output_dir {OUT}/masked_words "
        "--table docs/tables/masked_words.md",
        table=True,
    ),
    Result("real_parents", f"python -m benchmarks.real_parents --output_dir {OUT}/parents"),
    Result(
        "easy_vqa",
        f"python examples/train_vqa.py --vision {MOBILENET} --text {STORY} --dataset assets/vqa/easy_vqa --rows 6000 "
        f"--output_dir {OUT}/easy_vqa",
    ),
    Result(
        "recall",
        "python -m benchmarks.retrieval assets/captions/flickr8k_1k google/mobilenet_v2_1.0_224 "
        "sentence-transformers/all-MiniLM-L6-v2 --steps 200 --parents-learning-rate 5e-5 --projection-dropout 0.5 "
        '--candidates "locked image" "transformers, locked image" '
        f"--output {OUT}/recall.json --table docs/tables/recall.md",
        table=True,
    ),
    Result(
        "recall_frozen",
        "python -m benchmarks.retrieval assets/captions/flickr8k_1k google/mobilenet_v2_1.0_224 "
        "sentence-transformers/all-MiniLM-L6-v2 --steps 120 --projection-dim 512 --logit-scale 2.0 "
        f'--candidates "both frozen" "both frozen, by a prefix" --output {OUT}/recall_frozen.json '
        "--table docs/tables/recall_frozen.md",
        table=True,
    ),
    Result(
        "recall_story",
        f"python -m benchmarks.retrieval assets/captions/flickr8k_1k assets/vision/mobilenet_v1_0.25_128 {STORY} --steps 120 "
        f"--projection-dim 256 --logit-scale 2.66 --output {OUT}/recall_story.json --table docs/tables/recall_story.md",
        table=True,
    ),
    Result(
        "connectors",
        f"python -m benchmarks.connectors assets --further efficientnet-lite2 --store {OUT}/connectors "
        f"--output {OUT}/connectors.json --table docs/tables/connectors.md",
        table=True,
    ),
    Result(
        "clipcap",
        f"python -m benchmarks.clipcap CLIP_prefix_caption --vision {MOBILENET} --text {STORY} "
        "--dataset assets/captions/flickr8k_1k --epochs 1 --batch-size 20",
    ),
    # ----------------------------------------------------------------------------------- bytes, and pixels in a browser's way
    Result("hub_bytes", "python -m tests.helpers.hub_bytes"),
    Result(
        "browser",
        "FROZEN_PREFIX_ASSETS=assets python -m pytest -q -s -m slow tests/test_transformers_js.py -k real_weights",
    ),
    Result(
        "training_memory",
        "python -m benchmarks.training_memory --model SmolLM2-135M-Instruct --table docs/tables/training_memory.md",
        table=True,
    ),
    # ------------------------------------------------------------------------------------------------------------- timings
    Result("training", "python -m benchmarks.training", timing=True),
    Result("generation", "python -m benchmarks.generation", timing=True),
    Result(
        "generation_clipcap", "python -m benchmarks.generation --text-type gpt2 --clipcap CLIP_prefix_caption", timing=True
    ),
    Result("lit_step", "python -m benchmarks.lit_step", timing=True),
    Result("feature_cache", "python -m benchmarks.feature_cache --images 192", timing=True),
    Result(
        "batching",
        f"python -m benchmarks.batching --dataset assets/captions/flickr8k_1k --text {STORY} --prefix 10 49 --every 10",
        timing=True,
    ),
    Result("rows", f"python -m benchmarks.rows --rounds 1 {' '.join(GROWING)}", timing=True),
    Result("stored_rows", f"python -m benchmarks.stored_rows --rounds 1 {' '.join(GROWING)}", timing=True),
    Result("serving", "python -m benchmarks.serving", timing=True),  # where vLLM is installed
    Result("main_job", f"python -m benchmarks.main_job {' '.join(GROWING[:3])}", timing=True),
    Result("loading", "python -m benchmarks.loading --clock cpu --profile", timing=True),
    Result(
        "loading_large",
        "python -m benchmarks.loading --clock cpu --profile --rounds 3 --text-width 1024 --text-layers 16 --vocab-size 64000",
        timing=True,
    ),
    Result("llava", "python -m benchmarks.llava --rounds 1 --pictures 8", timing=True),
    Result(
        "llava_compiled",
        "python -m benchmarks.llava --rounds 1 --pictures 8 --vocab-sizes 151936 --short-batch 0 --compile inductor",
        timing=True,
    ),
    Result(
        "assisted",
        f"python -m benchmarks.assisted {OUT}/photos/eyes jxie/flickr8k --split test --assistant {STORY} --clock cpu",
        timing=True,
    ),
    Result("peers", "python -m benchmarks.peers --nanovlm nanoVLM --rounds 5", timing=True),
)


def footer(command: str, taken: str) -> str:
    """The last lines of a file, which `FOOTER` reads: the commands, a line each, and what is known of the run."""
    lines = "\n".join(command.split(" && "))
    return f"\n\n```bash\n{lines}\n```\n\n*{taken}*\n"


def taken_now(seconds: float) -> str:
    """When and on what: the date, versions, cores."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "peft", "datasets"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    threads = os.environ.get("OMP_NUM_THREADS")
    cores = f"{os.cpu_count()} cores" + (f", {threads} thread(s) a process" if threads else "")
    code = f"frozen-prefix {modeling_frozen.__version__}, {', '.join(found)}"
    return f"Taken on {time.strftime('%Y-%m-%d')} in {seconds:.0f} seconds; {code}; {cores}."


def printed(stdout: str) -> str:
    """What is kept of what a command printed: of a training what comes behind the last line that Trainer logs."""
    lines = stdout.splitlines()
    logged = [number for number, line in enumerate(lines) if line.startswith("{'")]
    kept = lines[logged[-1] + 1 :] if logged else lines
    return "```\n" + "\n".join(line.rstrip() for line in kept).strip("\n") + "\n```"


def words_of(command: str, places: dict[str, str]) -> list[tuple[dict[str, str], list[str]]]:
    """The commands of a line, as they are run here, each with its variables: this Python, the places that were named."""
    commands = []
    for part in command.split(" && "):
        words, variables = shlex.split(part), {}
        while found := re.match(r"([A-Z_]+)=(.+)", words[0]):
            variables[found[1]] = places.get(found[2], found[2])
            words.pop(0)
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        words = [sys.executable, "-m", "modeling_frozen.cli", *words[1:]] if words[0] == "frozen-prefix" else words
        for shown, place in places.items():
            words = [re.sub(rf"^{shown}(?=/|$)", lambda _, place=place: place, word) for word in words]
        commands.append((variables, words))
    return commands


def seconds_before(result: Result, folder: Path = TABLES) -> str:
    """How long the commands took when the file was written, in words; nothing where it doesn't say."""
    path = folder / f"{result.name}.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^\*Taken on .* in (\d+) seconds;", text, re.MULTILINE)
    return f"  (took {found[1]} seconds)" if found else ""


def run(result: Result, places: dict[str, str], folder: Path = TABLES) -> bool:
    """Runs a result's commands and writes its file; False where one of them fails."""
    start, stdout = time.monotonic(), ""
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.md"
    for variables, words in words_of(result.command, places):
        print(f"$ {shlex.join(words)}{seconds_before(result, folder)}", flush=True)
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})
        if done.returncode != 0:
            print(f"{result.name}: exit code {done.returncode}; {path} stays as it is.\n{done.stdout[-2000:]}", flush=True)
            return False
        stdout = done.stdout
    body = path.read_text(encoding="utf-8").rstrip("\n") if result.table else printed(stdout)
    for shown, place in places.items():  # what a machine calls its folders is nobody's business
        body = body.replace(place, shown)
    path.write_text(body + footer(result.command, taken_now(time.monotonic() - start)), encoding="utf-8")
    print(body, flush=True)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [result.name for result in RESULTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="these")
    parser.add_argument("--without_timings", action="store_true", help="leave out what measures time")
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    for option, shown in PLACES.items():
        parser.add_argument(f"--{option}", metavar="FOLDER", help=f"what commands call {shown}")
    args = parser.parse_args(arguments)
    places = {shown: getattr(args, option) for option, shown in PLACES.items() if getattr(args, option)}
    failed = []
    for result in RESULTS:
        if result.name not in args.only or (args.without_timings and result.timing):
            continue
        missing = [f"--{option}" for option in result.needs if PLACES[option] not in places]
        if args.list:
            needs = f"  (needs {', '.join(missing)})" if missing else ""
            print(f"{result.name}: {result.command}{needs}{seconds_before(result)}")
        elif missing:
            print(f"{result.name} is left out: it needs {', '.join(missing)}.")
        elif not run(result, places):
            failed.append(result.name)
    if failed:
        print(f"failed: {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
