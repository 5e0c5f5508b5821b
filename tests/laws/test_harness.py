"""The harness itself: a sound function passes every law, and each function broken on purpose is caught by its law."""

import jax
import jax.numpy as jnp
import pytest
from laws.harness import LAWS, Example, applies

X, Y = jax.random.normal(jax.random.key(0), (2, 8, 3))
MASK = jnp.array([[1.0, 1.0, 0.0]] * 7 + [[0.0, 1.0, 0.0]])
BETA = jnp.asarray(0.7)
SEGMENTS = jnp.array([[0, 1, -1]] * 8)
KEY = jax.random.key(3)


def sound(x, y, mask, beta):
    """Masked smooth loss of pairs; `y` is a constant."""
    for name, value in (("x", x), ("y", y), ("mask", mask)):
        if value.shape != (x.shape[0], 3):
            raise ValueError(f"x, y and mask must have one shape, got {value.shape} for {name}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating, got {x.dtype}")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    kept = mask > 0
    error = jnp.where(kept, x.astype(wide), 0) - jnp.where(kept, jax.lax.stop_gradient(y).astype(wide), 0)
    return jnp.sum(jax.nn.softplus(beta * error) * kept, -1)


SOUND = Example(
    name="sound",
    function=sound,
    arguments={"x": X, "y": Y, "mask": MASK, "beta": BETA},
    covers=(sound,),
    hyperparameters=("beta",),
    differentiable=("x", "beta"),
    constants=("y",),
    masks={"mask": ("x", "y")},
    batch=("x", "y", "mask"),
)


def example(function, arguments=None, **declared):
    return Example("broken", function, {"x": X} if arguments is None else arguments, (function,), **declared)


def coupled(x):
    return (x - x.mean(0)).sum(-1)


@jax.custom_batching.custom_vmap
def forgets_its_batch(beta):
    return beta


@forgets_its_batch.def_vmap
def _(axis_size, in_batched, beta):
    return jnp.broadcast_to(beta[0], beta.shape), True


@jax.custom_vjp
def wrong_gradient(x):
    return (x**2).sum(-1)


wrong_gradient.defvjp(lambda x: ((x**2).sum(-1), x), lambda x, g: (x * g[:, None],))


def adds_in_bfloat16(x):
    # By hand, because the CPU's own reductions of bfloat16 are taken in float32.
    return jax.lax.scan(lambda total, column: (total + column, None), jnp.zeros(8, x.dtype), x.T)[0]


def branches(x, beta):
    return x.sum(-1) * (beta if beta > 0.5 else 1.0)


def draws_by_position(key, x):
    return x.sum(-1) + jax.random.normal(key, x.shape[:1])


BROKEN = {
    "a Python branch on a float": (
        "jit",
        example(branches, {"x": X, "beta": BETA}, hyperparameters=("beta",)),
    ),
    "another result when compiled": (
        "jit",
        example(lambda x: x.sum(-1) + (0.1 if isinstance(x, jax.core.Tracer) else 0.0)),
    ),
    "a gradient that is stopped": (
        "gradients",
        example(lambda x: (x * jax.lax.stop_gradient(x)).sum(-1), differentiable=("x",)),
    ),
    "a custom gradient off by a factor": ("gradients", example(wrong_gradient, differentiable=("x",))),
    "a gradient that is not a number": (
        "gradients",
        example(lambda x: jnp.linalg.norm(x - x, axis=-1), differentiable=("x",)),
    ),
    "a batching rule that is wrong": (
        "vmap",
        example(lambda x, beta: x.sum(-1) * forgets_its_batch(beta), {"x": X, "beta": BETA}, hyperparameters=("beta",)),
    ),
    "zero times NaN under a mask": (
        "masks",
        example(lambda x, mask: (x * mask).sum(-1), {"x": X, "mask": MASK}, masks={"mask": ("x",)}),
    ),
    "a gradient through the unused branch of a mask": (
        "masks",
        example(
            lambda x, mask: jnp.where(mask > 0, jnp.exp(x), 0).sum(-1),
            {"x": X, "mask": MASK}, masks={"mask": ("x",)}, differentiable=("x",),
        ),
    ),
    "a mean over masked positions too": (
        "masks",
        example(lambda x, seg: x.sum(-1), {"x": X, "seg": SEGMENTS}, masks={"seg": ("x",)}),
    ),
    "an order of examples that matters": ("batch", example(lambda x: jnp.cumsum(x.sum(-1)), batch=("x",))),
    "examples that see each other": ("batch", example(coupled, batch=("x",))),
    "a reduction that depends on order": (
        "batch",
        example(lambda x: (x.sum(-1) * jnp.arange(8)).sum(), batch=("x",), output_axis=None),
    ),
    "examples that see each other, on devices": ("devices", example(coupled, batch=("x",))),
    "sums in bfloat16": (
        "bfloat16",
        example(adds_in_bfloat16, {"x": jnp.ones((8, 999))}, batch=("x",)),
    ),
    "an exponential of an unbounded input": ("extremes", example(lambda x: jnp.exp(x).sum(-1), extremes=("x",))),
    "a value saved by a select, and its gradient not": (
        "extremes",
        example(
            lambda x: jnp.where(x > 50, x, jnp.log1p(jnp.exp(x))).sum(-1), batch=("x",), differentiable=("x",)
        ),
    ),
    "only one argument larger than the other": (
        "extremes",
        example(lambda x, y: jnp.exp(x - y).sum(-1), {"x": X, "y": Y}, batch=("x", "y"), differentiable=("x", "y")),
    ),
    "four arguments that only overflow together": (
        "extremes",
        example(
            lambda a, b, c, d: jnp.exp(((a - b) - (c - d)) / 300).sum(-1),
            {"a": X, "b": Y, "c": X, "d": Y}, extremes=("a", "b", "c", "d"),
        ),
    ),
    "a constant with a gradient": (
        "constants",
        example(lambda x, y: (x * y).sum(-1), {"x": X, "y": Y}, differentiable=("x",), constants=("y",)),
    ),
    "shapes that broadcast": (
        "errors",
        example(lambda x, y: (x - y).sum(-1), {"x": X, "y": Y[:, :1]}, batch=("x", "y")),
    ),
    "an error that names nothing": (
        "errors",
        example(lambda x, y: jnp.stack([x, y]).sum(0).sum(-1), {"x": X, "y": Y}, batch=("x", "y")),
    ),
    "whole numbers accepted": ("errors", example(lambda x: jnp.sin(x).sum(-1), differentiable=("x",))),
    "a bad value accepted": ("errors", example(lambda x: x.sum(-1), bad={"a vector": ("x", X[0])})),
}  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
def test_a_sound_function_passes(law):
    assert applies(law, SOUND)
    LAWS[law][0](SOUND)


@pytest.mark.parametrize(("law", "broken"), BROKEN.values(), ids=BROKEN)
def test_the_law_catches(law, broken):
    assert applies(law, broken)
    with pytest.raises((AssertionError, jax.errors.TracerBoolConversionError)):
        LAWS[law][0](broken)


def test_each_law_is_broken_by_something():
    assert {law for law, _ in BROKEN.values()} == set(LAWS)


def test_laws_without_anything_to_say_are_not_generated():
    plain = example(lambda x: x.sum(-1))
    assert [law for law in LAWS if applies(law, plain)] == ["jit"]


def test_one_key_for_a_whole_batch_leaves_the_sharded_law_only():
    noisy = example(draws_by_position, {"key": KEY, "x": X}, batch=("x",))
    assert not applies("batch", noisy)
    LAWS["devices"][0](noisy)
    per_example = example(
        jax.vmap(lambda key, x: jax.random.normal(key) + x.sum()),
        {"key": jax.random.split(KEY, 8), "x": X}, batch=("key", "x"),
    )  # fmt: skip
    for law in ("batch", "devices"):
        assert applies(law, per_example)
        LAWS[law][0](per_example)


def test_laws_hold_on_other_batch_axes():
    across = Example(
        "across", lambda x: jnp.cos(x.T), {"x": X}, (), batch={"x": 0}, output_axis=1, differentiable=("x",)
    )
    for law in ("batch", "devices", "gradients"):
        LAWS[law][0](across)
