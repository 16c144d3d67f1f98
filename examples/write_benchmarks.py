"""Write four benchmarks about the tiny world, in the public forms of annotation.

    python examples/write_benchmarks.py outputs/benchmarks

`examples/evaluate_benchmark.py` scores a model on each of the folders that this leaves.
"""

import argparse
from pathlib import Path

from tiny_world.benchmarks import WRITERS


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--train", type=int, default=500, help="pictures to take examples from")
    parser.add_argument("--test", type=int, default=200, help="pictures that are scored")
    args = parser.parse_args()
    for name, write in WRITERS.items():
        write(args.output_dir / name, {"train2014": args.train, "val2014": args.test})
        print(args.output_dir / name)


if __name__ == "__main__":
    main()
