"""The laws that every public function obeys: checks of an `Example` that raise where it breaks its law.

Numbers in brackets are those of the design. To put a function under the laws, add an `Example` to the list of its
family in `laws/examples/`; a law applies by what the example declares, so nothing else needs saying.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["LAWS", "Example", "applies"]


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A function with small arguments of it, away from kinks, and what the docstring promises of each.

    Batch axes have length 8, or a multiple, so that they split over 8 devices.
    """

    name: str
    function: Callable[..., Any]  # of keyword arguments, all arrays; bind the rest with a lambda or `functools.partial`
    arguments: Mapping[str, Array]
    covers: tuple[Callable, ...]  # the public functions that this example stands for
    hyperparameters: tuple[str, ...] = ()  # floats: traceable [1], and mapped over [3]
    differentiable: tuple[str, ...] = ()  # gradients equal finite differences [2]
    constants: tuple[str, ...] = ()  # gradients are zero [8]
    masks: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # mask -> what it hides [4]
    batch: Mapping[str, int] | tuple[str, ...] = ()  # arguments with a batch axis, and which (the first) [5, 7]
    output_axis: int | None = 0  # batch axis of the results; None: they do not have one
    independent: bool = True  # each example's result depends on that example alone
    bf16_tolerance: float = 0.02  # relative and absolute, against float32 on the same rounded inputs [6]
    extremes: tuple[str, ...] | None = None  # set to +-1e4 [6]; by default what is differentiable and in the batch
    bad: Mapping[str, tuple[str, Array]] = dataclasses.field(default_factory=dict)  # label -> (argument, value) [9]
    exempt: Mapping[str, str] = dataclasses.field(default_factory=dict)  # law -> why it cannot hold; shown in reports

    def __post_init__(self) -> None:
        # Strong types, because `jnp.asarray(0.5)` is weakly typed, and another type compiles anew.
        strong = {
            name: value if _is_key(value) else jnp.asarray(np.asarray(value)) for name, value in self.arguments.items()
        }
        object.__setattr__(self, "arguments", strong)

    @property
    def axes(self) -> dict[str, int]:
        """Batch axis of each batched argument."""
        return dict(self.batch) if isinstance(self.batch, Mapping) else dict.fromkeys(self.batch, 0)

    @property
    def stretched(self) -> tuple[str, ...]:
        """Arguments that law 6 sets to large values."""
        if self.extremes is not None:
            return self.extremes
        return tuple(name for name in self.differentiable if name in self.axes)

    @property
    def keyed(self) -> bool:
        """Whether a random key serves the whole batch: then a result depends on its position."""
        keys = {name for name, value in self.arguments.items() if _is_key(value)}
        return bool(keys - set(self.axes))


# --- shared pieces ----------------------------------------------------------------------------------------------------


@functools.cache
def _compiler_options() -> dict[str, Any]:
    """What makes XLA compile for the CPU four times faster; nothing where it does not know the options."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.sin, compiler_options=options)(1.0)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def _jit(function: Callable) -> Callable:
    return jax.jit(function, compiler_options=_compiler_options())


@functools.lru_cache(maxsize=4)
def _program(example: Example) -> tuple[Callable[[dict], tuple[Any, dict]], list]:
    """A compiled `arguments -> (value, gradients of a random projection of it)`, and a list that grows per tracing."""
    traces = []
    names = (*example.differentiable, *example.constants)

    def run(arguments):
        traces.append(None)

        def project(active):
            value = example.function(**{**arguments, **active})
            return sum(jnp.vdot(w, leaf) for w, leaf in _projections(value)), value

        if not names:
            return example.function(**arguments), {}
        gradients, value = jax.grad(project, has_aux=True)({name: arguments[name] for name in names})
        return value, gradients

    return _jit(run), traces


def _projections(value: Any) -> list[tuple[np.ndarray, Any]]:
    """Fixed random weights for each floating leaf, so that one number depends on every output."""
    leaves = [leaf for leaf in jax.tree.leaves(value) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    draw = np.random.default_rng(0).normal
    return [(draw(size=leaf.shape).astype(_wide(leaf.dtype)), leaf.astype(_wide(leaf.dtype))) for leaf in leaves]


def _is_key(value: Array) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


# Arguments are rearranged in NumPy: in JAX each small operation would be compiled for each shape.


def _cast(value: Array, dtype: Any) -> Any:
    """A floating argument in another precision; others, keys among them, as they are."""
    return np.asarray(value).astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _take(value: Array, order: np.ndarray, axis: int) -> Any:
    if _is_key(value):
        return jnp.take(value, order, axis)
    return np.take(np.asarray(value), order, axis)


def _assert_close(actual: Any, expected: Any, rtol: float, what: str, atol: float | None = None) -> None:
    """Compares two pytrees, leaf by leaf; the absolute tolerance defaults to `rtol` times the largest entry."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected), f"{what}: {len(actual)} results instead of {len(expected)}"
    for a, b in zip(actual, expected, strict=True):
        if _is_key(b):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = (np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x) for x in (a, b))
        size = np.max(np.abs(b[np.isfinite(b)]), initial=0.0) if b.dtype == np.float64 else 0.0
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * size if atol is None else atol, err_msg=what)


def _assert_finite(tree: Any, what: str) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            place = f"{what}{jax.tree_util.keystr(path)}"
            assert np.isfinite(np.asarray(leaf, np.float64)).all(), f"{place} is not finite:\n{leaf}"


def _batch_size(example: Example) -> int:
    name, axis = next(iter(example.axes.items()))
    return example.arguments[name].shape[axis]


def _varied(example: Example, member: int) -> dict[str, Array]:
    """Hyperparameters of a member of a sweep: near their value, each moving out of step with the others."""
    values = {name: np.asarray(example.arguments[name]) for name in example.hyperparameters}
    return {
        name: np.asarray(value + 0.1 * ((member + position) % 3) * np.maximum(np.abs(value), 0.1), value.dtype)
        for position, (name, value) in enumerate(values.items())
    }


# --- the laws ---------------------------------------------------------------------------------------------------------


def check_jit(example: Example) -> None:
    """[1] Compiled equals uncompiled, hyperparameters as arrays or Python floats; a new value compiles nothing."""
    run, traces = _program(example)
    floats = {name: example.arguments[name] for name in example.hyperparameters}
    floats = {name: float(value) if value.ndim == 0 else value for name, value in floats.items()}
    eager = example.function(**{**example.arguments, **floats})
    _assert_close(run(dict(example.arguments))[0], eager, 1e-5, "jit(f) differs from f")
    before = len(traces)
    run({**example.arguments, **_varied(example, 1)})
    assert len(traces) == before, "a new value of a hyperparameter compiled the function again"


def check_gradients(example: Example) -> None:
    """[2] Gradients are finite and agree with central differences in float64 along a random direction."""
    run, _ = _program(example)
    _assert_finite(run(dict(example.arguments))[1], "gradient of ")
    with jax.enable_x64(True):
        arguments, step = {name: _cast(value, np.float64) for name, value in example.arguments.items()}, 1e-5
        _, gradients = run(arguments)
        for name in example.differentiable:
            direction = np.random.default_rng(1).normal(size=arguments[name].shape)
            ends = [run({**arguments, name: arguments[name] + sign * step * direction})[0] for sign in (1, -1)]
            plus, minus = (sum(np.vdot(w, leaf) for w, leaf in _projections(value)) for value in ends)
            slope = np.vdot(gradients[name], direction)
            message = f"gradient of {name} differs from finite differences"
            np.testing.assert_allclose(slope, (plus - minus) / (2 * step), rtol=1e-5, atol=1e-8, err_msg=message)


def check_vmap(example: Example) -> None:
    """[3] Mapping over the hyperparameters equals a loop."""
    run, _ = _program(example)
    members = [_varied(example, member) for member in range(3)]
    stacked = jax.tree.map(lambda *values: np.stack(values), *members)
    batched = _jit(jax.vmap(lambda hyper: example.function(**{**example.arguments, **hyper})))(stacked)
    for i, member in enumerate(members):
        looped = run({**example.arguments, **member})[0]
        _assert_close(jax.tree.map(lambda x: _take(x, i, 0), batched), looped, 1e-5, "vmap differs from a loop")


def check_masks(example: Example) -> None:
    """[4] What stands at masked positions changes neither values nor gradients, and gets no gradient."""
    run, _ = _program(example)
    clean = run(dict(example.arguments))
    _assert_finite(clean, "with ordinary masked values: ")
    for mask_name, names in example.masks.items():
        mask = np.asarray(example.arguments[mask_name])
        hidden = mask < 0 if np.issubdtype(mask.dtype, np.integer) else mask == 0  # integers are segment ids
        assert hidden.any(), f"{mask_name} hides nothing: the example is too easy"
        for poison in (np.nan, np.inf, -np.inf):
            arguments = dict(example.arguments)
            for name in names:
                value = np.asarray(arguments[name])
                fill = poison if jnp.issubdtype(value.dtype, jnp.floating) else np.iinfo(value.dtype).max
                where = hidden.reshape(hidden.shape + (1,) * (value.ndim - hidden.ndim))
                arguments[name] = np.where(where, np.asarray(fill, value.dtype), value)
            _assert_close(run(arguments), clean, 1e-6, f"{poison} where {mask_name} is 0 changes the result", atol=0)
        for name in set(names) & set(clean[1]):
            assert not np.asarray(clean[1][name])[hidden].any(), f"{name} has a gradient where {mask_name} is 0"


def check_batch(example: Example) -> None:
    """[5] Examples in another order give results in that order, and (if independent) repeated ones repeat theirs."""
    run, _ = _program(example)
    value, _ = run(dict(example.arguments))
    size = _batch_size(example)
    orders = [np.random.default_rng(2).permutation(size)]
    if example.independent and example.output_axis is not None:
        orders.append(np.arange(size) // 2)
    for order in orders:
        expected = value
        if example.output_axis is not None:
            expected = jax.tree.map(lambda x: _take(x, order, example.output_axis), value)
        taken = {name: _take(example.arguments[name], order, axis) for name, axis in example.axes.items()}
        _assert_close(run({**example.arguments, **taken})[0], expected, 1e-5, f"examples in the order {order.tolist()}")


def check_bfloat16(example: Example) -> None:
    """[6] In bfloat16 values and gradients are those of float32 on the same rounded inputs, within the tolerance."""
    run, _ = _program(example)
    names = {*example.axes, *example.differentiable} - {*example.hyperparameters}
    low = {name: _cast(value, jnp.bfloat16) if name in names else value for name, value in example.arguments.items()}
    reference = run({name: _cast(value, example.arguments[name].dtype) for name, value in low.items()})
    result = run(low)
    _assert_finite(result, "in bfloat16: ")
    _assert_close(result, reference, example.bf16_tolerance, "bfloat16 differs from float32")


def check_extremes(example: Example) -> None:
    """[6] Inputs of +-1e4, in every pattern of signs over the arguments and in a checkered one, leave all finite."""
    run, _ = _program(example)
    names = example.stretched
    patterns = itertools.islice(itertools.product((1, -1), repeat=len(names)), 64)
    for signs in (*patterns, None):
        arguments = dict(example.arguments)
        for i, name in enumerate(names):
            shape = arguments[name].shape
            sign = 1 - 2 * ((np.indices(shape).sum(0) + i) % 2) if signs is None else signs[i]
            arguments[name] = np.broadcast_to(1e4 * sign, shape).astype(arguments[name].dtype)
        _assert_finite(run(arguments), f"signs {signs or 'checkered'} of 1e4 in {', '.join(names)}: ")


def check_devices(example: Example) -> None:
    """[7] A batch split over 8 devices gives the same numbers: by sharded `jit` and, if independent, by two maps."""
    devices = jax.devices()
    assert len(devices) >= 8, "law 7 needs 8 devices: run with --xla_force_host_platform_device_count=8"
    mesh = Mesh(np.array(devices[:8]), ("data",))
    expected = _program(example)[0](dict(example.arguments))[0]
    specs = {
        name: PartitionSpec(*[None] * example.axes[name], "data") if name in example.axes else PartitionSpec()
        for name in example.arguments
    }
    whole = lambda arguments: example.function(**arguments)  # noqa: E731
    sharded = {
        name: jax.device_put(value, NamedSharding(mesh, specs[name])) for name, value in example.arguments.items()
    }
    _assert_close(_jit(whole)(sharded), expected, 1e-5, "jit with a sharded batch")
    if example.keyed or not example.independent or example.output_axis is None:
        return
    out = PartitionSpec(*[None] * example.output_axis, "data")
    by_hand = _jit(jax.shard_map(whole, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False))
    _assert_close(by_hand(dict(example.arguments)), expected, 1e-5, "shard_map over the batch")
    split = {name: _split(example.arguments[name], axis) for name, axis in example.axes.items()}
    rest = {name: value for name, value in example.arguments.items() if name not in split}
    # One argument: pmap of JAX 0.10 may read `in_axes=(0, None)` array by array, and leave some whole.
    mapped = _jit(jax.pmap(lambda split: whole({**split, **rest}), devices=devices[:8]))(split)
    expected = jax.tree.map(lambda x: _split(x, example.output_axis), expected)
    _assert_close(mapped, expected, 1e-5, "pmap over the batch")


def _split(x: Array, axis: int) -> Any:
    """A leading axis of 8 devices in place of 8 shares of `axis`."""
    if _is_key(x):
        return jnp.stack(jnp.split(x, 8, axis))
    return np.stack(np.split(np.asarray(x), 8, axis))


def check_constants(example: Example) -> None:
    """[8] What the docstring calls constant has a gradient of exactly zero."""
    gradients = _program(example)[0](dict(example.arguments))[1]
    for name in example.constants:
        assert not np.asarray(gradients[name]).any(), f"{name} is called constant and has a gradient"


def check_errors(example: Example) -> None:
    """[9] Wrong shapes, ranks and types raise while tracing: a ValueError or assertion that names the argument."""
    for label, (name, value) in {**_wrong(example), **example.bad}.items():
        error = _refusal(example, name, value)
        assert error is not None, f"{label} was accepted: {name} {value.dtype}{list(value.shape)}"
        friendly = isinstance(error, (ValueError, AssertionError)) and re.search(rf"\b{name}\b", str(error))
        assert friendly, f"{label}: wanted a ValueError that names {name!r}, got {type(error).__name__}: {error}"


def _refusal(example: Example, name: str, value: Array) -> Exception | None:
    """What tracing raises with another value of one argument."""
    try:
        jax.eval_shape(lambda arguments: example.function(**arguments), {**example.arguments, name: value})
    except Exception as error:
        return error
    return None


def _wrong(example: Example) -> dict[str, tuple[str, Array]]:
    """What is wrong by what the example declares: one of several batches too long or of another rank, whole numbers."""
    wrong = {}
    if len(example.axes) > 1:
        for name, axis in example.axes.items():
            value = example.arguments[name]
            longer = np.append(np.arange(value.shape[axis]), 0)
            wrong[f"a longer {name}"] = (name, _take(value, longer, axis))
            wrong[f"{name} with one more axis"] = (name, value.reshape(*value.shape, 1))
    for name in example.differentiable:
        if name not in example.hyperparameters:
            wrong[f"{name} of whole numbers"] = (name, np.asarray(example.arguments[name]).astype(np.int32))
    return wrong


LAWS: dict[str, tuple[Callable[[Example], None], Callable[[Example], bool]]] = {
    "jit": (check_jit, lambda example: True),
    "gradients": (check_gradients, lambda example: bool(example.differentiable)),
    "vmap": (check_vmap, lambda example: bool(example.hyperparameters)),
    "masks": (check_masks, lambda example: bool(example.masks)),
    "batch": (check_batch, lambda example: bool(example.axes) and not example.keyed),
    "bfloat16": (
        check_bfloat16,
        lambda example: bool({*example.axes, *example.differentiable} - {*example.hyperparameters}),
    ),
    "extremes": (check_extremes, lambda example: bool(example.stretched)),
    "devices": (check_devices, lambda example: bool(example.axes)),
    "constants": (check_constants, lambda example: bool(example.constants)),
    "errors": (check_errors, lambda example: bool({**_wrong(example), **example.bad})),
}
"""Each law by name: its check, and whether it has something to say about an example."""


def applies(law: str, example: Example) -> bool:
    """Whether a law has something to say about an example; exemptions are the caller's to report."""
    return LAWS[law][1](example)
