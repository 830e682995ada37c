"""`python -m modeling_frozen.shapes`: parents and data, for a first try of anything that trains, without a network."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m modeling_frozen.shapes", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("--output_dir", type=Path, default=Path("shapes"), help="default: shapes")
    parser.add_argument("--pictures", type=int, default=1500, metavar="N", help="to train on (default: 1500)")
    parser.add_argument("--test_pictures", type=int, default=96, metavar="N", help="of held-out scenes (default: 96, all)")
    parser.add_argument("--tower_steps", type=int, default=1000, metavar="N", help="training of the tower (default: 1000)")
    parser.add_argument("--language_model_steps", type=int, default=110, metavar="N", help="of the other (default: 110)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    from .folders import write_data, write_parents

    steps = {"tower_steps": args.tower_steps, "language_model_steps": args.language_model_steps}
    write_parents(args.output_dir, **steps, seed=args.seed)
    write_data(args.output_dir, pictures=args.pictures, test_pictures=args.test_pictures, seed=args.seed)
    out = args.output_dir
    print(f"--vision {out / 'tower'} --text {out / 'language_model'} --dataset {out / 'questions'}  (or {out / 'captions'})")


if __name__ == "__main__":
    main()
