"""A preference loss that the command line names: found by its path, its arguments filled in by their names."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.errors import UsageError
from esscher.objectives import preference

__all__ = ["PROVIDED", "Objective", "apply", "resolve"]

HOME = "esscher.objectives.preference"
PAIRED = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
MASKS = ("chosen_mask", "rejected_mask")
SINGLE = ("policy", "reference", "desirable", "kl_baseline")
PROVIDED = (*PAIRED, "len_chosen", "len_rejected", "nll", *MASKS, *SINGLE)


class Objective(NamedTuple):
    """A loss, what it is to be given, and its options."""

    function: Callable[..., Array]
    arguments: tuple[str, ...]  # among PROVIDED
    fixed: dict[str, Any]  # options that are no numbers
    swept: dict[str, tuple[float, ...]]  # those that are, with one value or several

    @property
    def mismatched(self) -> bool:
        """Whether it asks for responses to other prompts."""
        return "kl_baseline" in self.arguments


def resolve(path: str, options: Sequence[str] = ()) -> Objective:
    """Finds a loss and checks that all its arguments are known.

    Args:
      path: name of a function in `esscher.objectives.preference`, or dotted path of one that Python can import from
        here.
      options: `name=value` each; numbers, several with commas between them, or true, false, or a word.

    Raises:
      UsageError: no such function, arguments that nobody gives, options that it does not have or does not take.
    """
    function = _find(path)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise UsageError(f"--objective {path} is no function of arrays") from error
    given = dict(_parse(option) for option in options)
    if unknown := [name for name in given if name not in parameters or name in PROVIDED]:
        known = [name for name in parameters if name not in PROVIDED]
        raise UsageError(f"--options: {path} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    asked = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    if missing := [name for name in asked if name not in PROVIDED and name not in given]:
        raise UsageError(
            f"--objective {path} needs {', '.join(missing)}: give a number or a word by --options {missing[0]}=...; "
            f"what is known of a pair is {', '.join(PROVIDED)}"
        )
    arguments = tuple(name for name in parameters if name in PROVIDED)
    if not arguments:
        raise UsageError(f"--objective {path} asks for nothing known of a pair, which is {', '.join(PROVIDED)}")
    for name, value in given.items():
        if isinstance(parameters[name].default, float) and not isinstance(value, tuple):
            raise UsageError(f"--options: {name} of {path} must be a number, got {value!r}")
    fixed = {name: value for name, value in given.items() if not isinstance(value, tuple)}
    objective = Objective(function, arguments, fixed, {name: v for name, v in given.items() if name not in fixed})
    _try(path, objective)
    return objective


def _try(path: str, objective: Objective) -> None:
    """Traces the loss on pairs of no content, so that what it objects to is said before anything is made."""
    logps, mask = jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4), bool)
    options = {name: jnp.zeros(()) for name in objective.swept}
    try:
        jax.eval_shape(lambda *arrays: apply(objective, *arrays, options), logps, logps, mask)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--objective {path}: {str(error).splitlines()[0]}") from error


def _find(path: str) -> Callable[..., Array]:
    module_name, _, name = path.rpartition(".")
    module_name = module_name or HOME
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for functions of the user's, whichever way the script was started
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, TypeError, ValueError) as error:  # the latter two for stray dots
        if isinstance(error, ModuleNotFoundError) and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports one that is not
        raise UsageError(f"--objective {path}: there is no module {module_name!r} to import from here") from error
    function = getattr(module, name, None)
    if not callable(function):
        close = difflib.get_close_matches(name, [x for x in dir(module) if callable(getattr(module, x))])
        raise UsageError(f"--objective: {module_name} has no function {name!r}; close: {', '.join(close) or 'none'}")
    return function


def _parse(option: str) -> tuple[str, Any]:
    name, equals, text = option.partition("=")
    if not equals or not name or not text:
        raise UsageError(f"--options must look like beta=0.1 or beta=0.05,0.1, got {option!r}")
    if text in ("true", "false"):
        return name, text == "true"
    try:
        return name, tuple(float(part) for part in text.split(","))
    except ValueError:
        return name, text


def apply(objective: Objective, policy: Array, reference: Array, mask: Array, options: Mapping[str, Array]) -> Array:
    """The loss of each pair, `[B]`; of a loss of single responses the mean of the two.

    A loss that asks for masks gets log-probabilities token by token, others their sums.

    Args:
      objective: the loss.
      policy: log-probability of each token of the chosen and the rejected response, and where the objective asks for a
        baseline of one to another prompt, `[B, 2 or 3, T]`.
      reference: likewise.
      mask: the tokens of the response.
      options: values of the objective's options that are numbers.

    Raises:
      UsageError: what comes back is no loss for each pair.
    """
    policy, reference = (jnp.where(mask, x, 0) for x in (policy, reference))
    length = mask.sum(-1)
    by_token = bool(set(MASKS) & set(objective.arguments))
    of_pair = [x if by_token else x.sum(-1) for x in (policy, reference)]
    sums = [x.sum(-1) for x in (policy, reference)]
    pairs = len(policy)
    known = dict(zip(PAIRED, (x[:, i] for x in of_pair for i in (0, 1)), strict=True))
    known |= {f"{name}_mask": mask[:, i] for i, name in enumerate(("chosen", "rejected"))}
    known |= {f"len_{name}": length[:, i] for i, name in enumerate(("chosen", "rejected"))}
    known["nll"] = preference.nll(policy[:, 0], mask[:, 0], normalize=True)
    single = {name: x[:, :2].T.reshape(-1) for name, x in zip(("policy", "reference"), sums, strict=True)}
    known |= single | {"desirable": jnp.repeat(jnp.array([1.0, 0.0]), pairs)}
    if objective.mismatched:
        known["kl_baseline"] = preference.kto_baseline(*(x[:, 2] for x in sums))
    arguments = {name: known[name] for name in objective.arguments}
    losses = objective.function(**arguments, **objective.fixed, **options)
    if jnp.shape(losses) not in ((pairs,), (2 * pairs,)):
        name = getattr(objective.function, "__name__", "it")
        raise UsageError(f"--objective: {name} gave {jnp.shape(losses)} for {pairs} pairs; it must give one loss each")
    return losses if len(losses) == pairs else losses.reshape(2, pairs).mean(0)
