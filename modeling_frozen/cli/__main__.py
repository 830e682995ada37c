"""`python -m modeling_frozen.cli`, for `torchrun -m` and where the script is not on the path."""

from . import main


if __name__ == "__main__":
    raise SystemExit(main())
