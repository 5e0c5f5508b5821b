"""Time to import every objective, against importing jax and optax alone: medians of fresh processes, in turns.

python benchmarks/import_time.py [--rounds 9]
"""

import argparse
import statistics
import subprocess
import sys
import time

STATEMENTS = {
    "jax and optax": "import jax, optax",
    "esscher.objectives": (
        "import importlib, pkgutil, esscher.objectives as o\n"
        "for m in pkgutil.walk_packages(o.__path__, o.__name__ + '.'): importlib.import_module(m.name)"
    ),
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="repetitions of each measurement")
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(parser.parse_args().rounds):
        for name, statement in STATEMENTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:20} {value:.2f} s")
    print(f"ratio: {medians['esscher.objectives'] / medians['jax and optax']:.2f}")


if __name__ == "__main__":
    main()
