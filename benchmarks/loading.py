"""Loading, side by side with loading the two parents by themselves; bytes of the checkpoint; what importing costs.

    python -m benchmarks.loading --output loading.json

Every timing is taken in a fresh Python, as a user's script meets it (with the files in the system's cache); `--warm` times it
again and again in one process too. There are three things to load, not two, so beside the parents stand the parents with
the plainest model that transformers can load: a list of tensors, of the connector's shapes (transformers takes its time for
each tensor, whatever its size). What loading leaves in mapped files, the first use reads; so loading and writing a first
caption are timed together too, beside the parents' loading, the tower's look at the picture and the bare language model's
tokens. `--profile` says what the rest is: the milliseconds of each step of ours, and of the
parents' own loading by themselves.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.loading_profile import profile
from benchmarks.timing import CLOCKS, Report, alternate, alternate_processes
from benchmarks.timing import add_arguments as add_timing_arguments


TIMED = """
import time
import torch, transformers, modeling_frozen
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionModel
transformers.utils.logging.disable_progress_bar()
{imports}
start = time.{clock}()
{load}
print(time.{clock}() - start)
"""
OURS = 'model = modeling_frozen.FrozenPrefixForConditionalGeneration.from_pretrained("{saved}"{options})'
BOTH = (
    'parents = CLIPVisionModel.from_pretrained("{tower}"{options}), AutoModelForCausalLM.from_pretrained("{words}"{options})'
)
# Loading, and then a first caption: of one picture, 20 tokens.
WRITES = "; model.generate(torch.tensor([{asked}]), pixel_values=torch.zeros({picture}), max_new_tokens=20, min_new_tokens=20)"
BOTH_WRITE = (
    "; parents[0](torch.zeros({picture})); parents[1].generate(torch.tensor([{plain}]), max_new_tokens=20, min_new_tokens=20)"
)
THIRD = """
class ThirdConfig(transformers.PreTrainedConfig):
    model_type = "third"
    shapes: list | None = None

class Third(transformers.PreTrainedModel):
    config_class = ThirdConfig

    def __init__(self, config):
        super().__init__(config)
        self.tensors = torch.nn.ParameterList(torch.empty(shape) for shape in config.shapes or ())
        self.post_init()
"""
FLOOR = BOTH + '; third = Third.from_pretrained("{third}"{options})'
# Classes are imported when they are first used; that is no part of loading.
IMPORTS = (
    "modeling_frozen.FrozenPrefixForConditionalGeneration, transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel" + THIRD
)

IMPORTED = "import time; start = time.{clock}(); {code}; print(time.{clock}() - start)"


def main(arguments: argparse.Namespace) -> Report:
    # The benchmark's own process must not have imported what it measures elsewhere; it builds the parents here.
    from benchmarks.parents import join, sizes_of

    sizes = sizes_of(arguments)
    report = Report("loading", clock=arguments.clock, **sizes.as_dict())
    with tempfile.TemporaryDirectory() as folder:
        model = join(folder, sizes)
        saved = Path(folder) / "model"
        model.save_pretrained(saved)
        places = {
            "saved": str(saved),
            "tower": model.config.vision_base_model["name_or_path"],
            "words": model.config.text_base_model["name_or_path"],
            "third": str(Path(folder) / "third"),
        }
        asked = [model.config.image_token_id] * model.config.num_image_tokens + [5] * 8
        places |= {"asked": asked, "plain": [5] * len(asked), "picture": [1, 3, sizes.image_size, sizes.image_size]}
        shapes = [list(p.shape) for p in model.model.connector.parameters()]
        connector = sum(p.numel() * p.element_size() for p in model.model.connector.parameters())
        parents = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
        save_third(places["third"], shapes)
        del model
        for name, options in (("", ""), (", bfloat16", ", dtype=torch.bfloat16")):
            code = {
                key: TIMED.format(
                    clock=CLOCKS[arguments.clock].__name__, imports=IMPORTS, load=load.format(**places, options=options)
                )
                for key, load in (
                    ("ours", OURS),
                    ("both", BOTH),
                    ("floor", FLOOR),
                    ("first", OURS + WRITES),
                    ("both first", BOTH + BOTH_WRITE),
                )
            }
            timings = alternate_processes(code, rounds=arguments.rounds)
            report.compare(f"from_pretrained, to both parents{name}", timings["ours"], timings["both"], bar=1.1)
            report.compare(f"the parents and a plain third model, to both parents{name}", timings["floor"], timings["both"])
            report.compare(f"from_pretrained, to the parents and a plain third model{name}", timings["ours"], timings["floor"])
            report.compare(f"loading and a first caption, to both parents{name}", timings["first"], timings["both first"])
        if arguments.profile:
            loads = {"ours": OURS.format(**places, options=""), "both": BOTH.format(**places, options="")}
            for which, load in loads.items():
                for step, seconds in profile(load, rounds=arguments.rounds, clock=arguments.clock).items():
                    report.figure(f"{which}, {step}", seconds * 1e3, "ms")
        if arguments.warm:
            warm(places, arguments, report)
        written = sum(file.stat().st_size for file in saved.iterdir())
        report.figure("checkpoint beyond the connector", written - connector, "bytes", limit=connector, bar=64 * 1024)
        report.figure("checkpoint", written, "bytes", limit=connector)
        report.figure("checkpoint, to both parents' bytes", written, "bytes", limit=parents)
    imports(arguments, report)
    report.print()
    report.save(arguments.output)
    return report


def save_third(folder: str, shapes: list[list[int]]) -> None:
    """A model of tensors of these shapes and nothing else."""
    import torch
    import transformers

    space = {"torch": torch, "transformers": transformers}
    exec(THIRD, space)
    third = space["Third"](space["ThirdConfig"](shapes=shapes))
    for tensor in third.tensors:
        torch.nn.init.normal_(tensor)
    third.save_pretrained(folder)


def warm(places: dict[str, str], arguments: argparse.Namespace, report: Report) -> None:
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    from modeling_frozen import FrozenPrefixForConditionalGeneration

    def both() -> tuple:
        return CLIPVisionModel.from_pretrained(places["tower"]), AutoModelForCausalLM.from_pretrained(places["words"])

    calls = {"ours": lambda: FrozenPrefixForConditionalGeneration.from_pretrained(places["saved"]), "both": both}
    timings = alternate(calls, rounds=3 * arguments.rounds, clock=arguments.clock)
    report.compare("from_pretrained, to both parents, warm", timings["ours"], timings["both"], bar=1.1)


def imports(arguments: argparse.Namespace, report: Report) -> None:
    clock = CLOCKS[arguments.clock].__name__
    code = {
        "ours": IMPORTED.format(clock=clock, code="import transformers, modeling_frozen"),
        "transformers": IMPORTED.format(clock=clock, code="import transformers"),
        "alone": IMPORTED.format(clock=clock, code="import modeling_frozen"),
    }
    timings = alternate_processes(code, rounds=3 * arguments.rounds)
    report.compare("import transformers, modeling_frozen", timings["ours"], timings["transformers"])
    above = (timings["ours"].median - timings["transformers"].median) * 1e3
    report.figure("import modeling_frozen, above transformers", above, "ms", bar=50)
    report.figure("import modeling_frozen alone", timings["alone"].median * 1e3, "ms", bar=50)


if __name__ == "__main__":
    from transformers import logging

    from benchmarks.parents import add_arguments

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_timing_arguments(parser)
    parser.add_argument("--profile", action="store_true", help="print and keep the milliseconds of each step of loading")
    parser.add_argument("--warm", action="store_true", help="time loading in one process too")
    main(parser.parse_args())
