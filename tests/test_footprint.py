"""Importing an objective costs its user JAX and Optax, nothing else."""

import subprocess
import sys

FOREIGN = (
    "flax",
    "tensorflow",
    "tensorflow_datasets",
    "grain",
    "matplotlib",
    "orbax",
    "sklearn",
    "tyro",
    "rich",
    "tensorboardX",
)


def modules_after(statement):
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_objectives_and_samplers_import_nothing_heavy():
    before = set(modules_after("import jax, optax"))
    every = (
        "import importlib, pkgutil\nfrom esscher import objectives, samplers\n"
        "for room in (objectives, samplers):\n"
        "    for found in pkgutil.walk_packages(room.__path__, room.__name__ + '.'): importlib.import_module(found[1])"
    )
    loaded = modules_after(every)
    assert {"esscher.objectives.policy.losses", "esscher.samplers.diffusion.svdd"} <= set(loaded)
    assert not [name for name in set(loaded) - before if name.split(".")[0] in FOREIGN]


def test_the_command_lists_its_experiments_without_importing_jax():
    assert "jax" not in modules_after("from esscher.experiments import cli; cli.experiments()")
