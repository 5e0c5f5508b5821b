"""Functions that the command line names: found by their paths, their arguments filled in by their names."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_origin

import jax
from jax import Array

from esscher.core.errors import UsageError

__all__ = ["Named", "Place", "attempt", "call", "find", "options_of", "resolve", "swept"]


class Place(NamedTuple):
    """What a flag may name."""

    flag: str  # e.g. --objective
    options: str  # the flag with further arguments, e.g. --options
    home: str  # module in which plain names are looked for
    known: tuple[str, ...]  # arguments that a function is given if it has them
    prefix: str  # of its options' names among the hyperparameters


class Named(NamedTuple):
    """A function, what it is to be given, and its options."""

    place: Place
    path: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]  # among the known ones
    fixed: dict[str, Any]  # options that are no numbers
    numbers: dict[str, tuple[float, ...]]  # those that are, with one value or several


def resolve(place: Place, path: str, options: Sequence[str] = ()) -> Named:
    """Finds a function and checks that all its arguments are known or given.

    Args:
      place: the flag.
      path: name of a function in the place's home, or dotted path of one that Python can import from here.
      options: `name=value` each; numbers, several with commas between them, or true, false, or a word.

    Raises:
      UsageError: no such function, arguments that nobody gives, or options that it does not have.
    """
    function = find(place.flag, path, place.home)
    try:
        if get_origin(function):  # the type of functions, to which Python 3.13 gives a signature
            raise TypeError(function)
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise UsageError(f"{place.flag} {path} is no function of arrays") from error
    parameters = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    given = dict(_parse(place, option) for option in options)
    if len(given) < len(options):
        raise UsageError(f"{place.options}: an option is given twice; several numbers go together, e.g. beta=0.1,0.2")
    if unknown := [name for name in given if name not in parameters or name in place.known]:
        free = ", ".join(name for name in parameters if name not in place.known) or "none"
        raise UsageError(f"{place.options}: {path} has no option {unknown[0]!r}; it has {free}")
    known, asked = ", ".join(place.known), [name for name, p in parameters.items() if p.default is p.empty]
    if missing := [name for name in asked if name not in place.known and name not in given]:
        raise UsageError(
            f"{place.flag} {path} needs {', '.join(missing)}: give a number or a word by {place.options} "
            f"{missing[0]}=...; what is known without is {known}"
        )
    arguments = tuple(name for name in parameters if name in place.known)
    if not arguments:
        raise UsageError(f"{place.flag} {path} asks for nothing that is known, which is {known}")
    for name, value in given.items():
        if isinstance(parameters[name].default, float) and not isinstance(value, tuple):
            raise UsageError(f"{place.options}: {name} of {path} must be a number, got {value!r}")
    fixed = {name: value for name, value in given.items() if not isinstance(value, tuple)}
    numbers = {name: value for name, value in given.items() if name not in fixed}
    return Named(place, path, function, arguments, fixed, numbers)


def find(flag: str, path: str, home: str) -> Callable[..., Any]:
    """The function of a dotted path, or of a plain name in the module `home`.

    Raises:
      UsageError: there is none.
    """
    module_name, _, name = path.rpartition(".")
    module_name = module_name or home
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for functions of the user's, whichever way the script was started
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, TypeError, ValueError) as error:  # the latter two for stray dots
        if isinstance(error, ModuleNotFoundError) and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports one that is not
        raise UsageError(f"{flag} {path}: there is no module {module_name!r} to import from here") from error
    function = getattr(module, name, None)
    if not callable(function):
        close = difflib.get_close_matches(name, [x for x in dir(module) if callable(getattr(module, x))])
        raise UsageError(f"{flag}: {module_name} has no function {name!r}; close: {', '.join(close) or 'none'}")
    return function


def _parse(place: Place, option: str) -> tuple[str, Any]:
    name, equals, text = option.partition("=")
    if not equals or not name or not text:
        raise UsageError(f"{place.options} must look like beta=0.1 or beta=0.05,0.1, got {option!r}")
    if text in ("true", "false"):
        return name, text == "true"
    try:
        return name, tuple(float(part) for part in text.split(","))
    except ValueError:
        return name, text


def swept(named: Named) -> dict[str, tuple[float, ...]]:
    """The options that are numbers, under the names that they have among the hyperparameters of a run."""
    return {f"{named.place.prefix}{name}": values for name, values in named.numbers.items()}


def options_of(named: Named, hyper: Mapping[str, Array]) -> dict[str, Array]:
    """The values of these options, out of the hyperparameters of a run."""
    return {name: hyper[f"{named.place.prefix}{name}"] for name in named.numbers}


def call(named: Named, known: Mapping[str, Any], options: Mapping[str, Array]) -> Any:
    """The function of what it asks for among the known arguments."""
    return named.function(**{name: known[name] for name in named.arguments}, **named.fixed, **options)


def attempt(named: Named, function: Callable[..., Any], *shapes: Any) -> Any:
    """Shapes of `function(*shapes)`, which calls the named one, so that what that objects to is said at the start.

    Raises:
      UsageError: with what the named function raised.
    """
    try:
        return jax.eval_shape(function, *shapes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{named.place.flag} {named.path}: {str(error).splitlines()[0]}") from error
