"""Runs a script of this folder, unchanged, in the workers of Ray Train.

    python examples/on_ray.py --num_workers 2 examples/train_captioning.py --vision TOWER --text MODEL --dataset DATASET …

The other launchers start a script; Ray Train calls a function, and this is that function. It gives each worker the script's
name, its arguments and the folder that you are in, which every machine must see. Needs `pip install "frozen-prefix[ray]"`.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import Any


def work(job: dict[str, Any]) -> None:
    os.chdir(job["folder"])
    sys.argv = [job["script"], *job["arguments"]]
    sys.path.insert(0, str(Path(job["script"]).parent))
    runpy.run_path(job["script"], run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--use_gpu", action="store_true")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()  # before Ray is imported, so that --help comes at once
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    job = {"folder": os.getcwd(), "script": str(given.script.resolve()), "arguments": given.arguments}
    scaling = ScalingConfig(num_workers=given.num_workers, use_gpu=given.use_gpu)
    TorchTrainer(work, train_loop_config=job, scaling_config=scaling).fit()


if __name__ == "__main__":
    main()
