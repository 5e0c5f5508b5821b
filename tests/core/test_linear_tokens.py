"""Statistics of tokens by chunks of the vocabulary against the dense logits: values, gradients, memory, sharding."""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from esscher.core import meshes, tokens

CHUNKS = [
    pytest.param(48, 16, id="one of each block"),
    pytest.param(96, 70, id="a rest in each block"),
    pytest.param(50, 7, id="two blocks"),
    pytest.param(37, 10, id="odd, with a rest"),
    pytest.param(37, 64, id="chunk beyond the vocabulary"),
    pytest.param(37, 1, id="single tokens"),
]
WARM = {"temperature": 0.7, "softcap": 3.0}


class Operands(NamedTuple):
    hidden: Array  # [4, 3, 5]
    unembedding: Array  # [5, V]
    other_hidden: Array  # [4, 3, 2]
    other_unembedding: Array  # [2, V]


def operands(vocabulary, dtype=jnp.float32):
    shapes = ((4, 3, 5), (5, vocabulary), (4, 3, 2), (2, vocabulary))
    keys = jax.random.split(jax.random.key(0), 4)
    return Operands(*(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)))


def targets_below(vocabulary, shape=(4, 3)):
    """The first and the last token among them."""
    return jax.random.randint(jax.random.key(1), shape, 0, vocabulary).at[0, :2].set(jnp.array([0, vocabulary - 1]))


def dense_laws(hidden, unembedding, temperature=1.0, softcap=None):
    logits = jnp.matmul(hidden, unembedding, preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32))
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jax.nn.log_softmax(logits / temperature)


def dense(x, targets, **settings):
    """All that the three functions give, from the whole table of logits."""
    p, q = dense_laws(*x[:2], **settings), dense_laws(*x[2:], **settings)
    logp = jnp.take_along_axis(p, targets[..., None], -1)[..., 0]
    entropy, log_collision = -jnp.sum(jnp.exp(p) * p, -1), jax.nn.logsumexp(2 * p, -1)
    return logp, (logp, entropy, log_collision), jnp.sum(jnp.exp(p) * (p - q), -1)


def chunked(x, targets, **settings):
    return (
        tokens.linear_token_logps(*x[:2], targets, **settings),
        tuple(tokens.linear_token_statistics(*x[:2], targets, **settings)),
        tokens.linear_token_kl(*x, **settings),
    )


def with_gradients(function, x, targets, **settings):
    """Results, and the gradients of a random projection of each."""

    @functools.partial(jax.jit, static_argnames="chunk")
    def run(x, targets, **settings):
        results, pull = jax.vjp(lambda x: function(x, targets, **settings), x)
        leaves, tree = jax.tree.flatten(results)
        weights = np.random.default_rng(0).normal(size=(len(leaves), *leaves[0].shape))
        alone = [np.where(np.arange(len(leaves)) == i, weights.T, 0).T for i in range(len(leaves))]
        cotangents = tree.unflatten(jnp.asarray(w, leaf.dtype) for w, leaf in zip(alone, leaves, strict=True))
        return results, jax.vmap(pull)(cotangents)

    return run(x, targets, **settings)


def assert_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize(("vocabulary", "chunk"), CHUNKS)
def test_values_and_gradients_are_those_of_the_whole_table(vocabulary, chunk, x64):
    x, targets = operands(vocabulary, jnp.float64), targets_below(vocabulary)
    ours = with_gradients(chunked, x, targets, chunk=chunk, **WARM)
    assert_close(ours, with_gradients(dense, x, targets, **WARM), 1e-11)


@pytest.mark.parametrize("settings", [{}, WARM], ids=["plain", "temperature and soft cap"])
def test_in_float32_they_agree_to_its_precision(settings):
    x, targets = operands(37), targets_below(37)
    ours = with_gradients(chunked, x, targets, chunk=10, **settings)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(ours))
    assert_close(ours, with_gradients(dense, x, targets, **settings), 1e-5)


def test_each_model_has_its_own_soft_cap():
    x = operands(37)
    for cap, other in ((3.0, None), (None, 2.0), (3.0, 2.0)):
        p, q = dense_laws(*x[:2], 0.7, cap), dense_laws(*x[2:], 0.7, other)
        out = tokens.linear_token_kl(*x, chunk=10, temperature=0.7, softcap=cap, other_softcap=other)
        assert_close(out, jnp.sum(jnp.exp(p) * (p - q), -1), 1e-5)


def test_wide_settings_leave_the_logits_in_their_type(x64):
    x, targets = operands(37, jnp.float32), targets_below(37)
    wide = {"temperature": np.float64(0.7), "softcap": jnp.asarray(3.0, jnp.float64)}
    out = tokens.linear_token_logps(*x[:2], targets, chunk=10, **wide)
    assert out.dtype == jnp.float32
    assert_close(out, dense(x, targets, **WARM)[0], 1e-5)


def test_bfloat16_operands_are_multiplied_and_summed_in_float32():
    x, targets = operands(96, jnp.bfloat16), targets_below(96)
    values, gradients = with_gradients(chunked, x, targets, chunk=32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(values))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(gradients))
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)
    expected, slopes = with_gradients(dense, exact, targets)
    assert_close(values, expected, 1e-5)
    assert_close(gradients, slopes, 2e-2)


def test_second_derivatives_are_those_of_the_whole_table(x64):
    """Reverse over reverse: a Hessian times a random direction."""
    x, targets = operands(37, jnp.float64), targets_below(37)
    along = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), x)

    def hessian_product(function, **settings):
        total = lambda x: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(function(x, targets, **settings)))  # noqa: E731
        slope = lambda x: sum(map(jnp.vdot, jax.grad(total)(x), along))  # noqa: E731
        return jax.jit(jax.grad(slope))(x)

    assert_close(hessian_product(chunked, chunk=10), hessian_product(dense), 1e-10)
    with pytest.raises(TypeError, match="custom_vjp"):  # as the docstring says
        jax.jvp(lambda hidden: tokens.linear_token_logps(hidden, x.unembedding, targets), x[:1], along[:1])


def test_extreme_logits_give_exact_values_and_finite_gradients():
    """Whole numbers up to 2e4, exact in float32: nearly all mass on one token, or split evenly over ties."""
    unembedding = jnp.array([[1.0, -1.0, 0.0, 1.0, 2.0], [0.0, 1.0, -1.0, 0.0, -2.0]])
    hidden = 1e4 * jnp.array([[[1.0, 1.0], [1.0, 0.0], [-1.0, -1.0]], [[0.0, 0.0], [0.0, 1.0], [1.0, 0.5]]])
    x = Operands(hidden, unembedding, hidden[:, ::-1], unembedding)
    targets = jnp.array([[0, 4, 2], [1, 1, 3]])
    values, gradients = with_gradients(chunked, x, targets, chunk=2)
    assert_close(values, dense(x, targets), 1e-6)
    assert np.isfinite(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])).all()
    capped, gradients = with_gradients(chunked, x, targets, chunk=2, **WARM)
    assert_close(capped, dense(x, targets, **WARM), 1e-5)
    assert np.isfinite(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])).all()


def test_targets_outside_the_vocabulary_give_nan_and_no_gradient():
    x, targets = operands(37), jnp.array([[-1, 0, 37], [36, 2, 1000], [5, 6, -37], [7, 8, 9]])
    outside = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]], bool)
    run = jax.jit(jax.value_and_grad(lambda *x: jnp.nansum(tokens.linear_token_logps(*x, targets)), (0, 1)))
    logps = jax.jit(tokens.linear_token_logps)(*x[:2], targets)
    np.testing.assert_array_equal(np.isnan(logps), outside)
    statistics = jax.jit(tokens.linear_token_statistics)(*x[:2], targets)
    np.testing.assert_array_equal(np.isnan(statistics.logp), outside)
    assert np.isfinite(statistics.entropy).all()
    assert np.isfinite(statistics.log_collision).all()
    total, gradients = run(*x[:2])
    expected = lambda *x: jnp.where(outside, 0, dense((*x, *x), jnp.where(outside, 0, targets))[0]).sum()  # noqa: E731
    assert_close((total, gradients), jax.value_and_grad(expected, (0, 1))(*x[:2]), 1e-5)
    assert not np.asarray(gradients[0])[outside].any()


def test_identities_of_uniform_and_equal_laws():
    x = operands(96)
    still = x._replace(hidden=jnp.zeros((4, 3, 5)))
    uniform = tokens.linear_token_statistics(*still[:2], targets_below(96), chunk=32)
    np.testing.assert_allclose(uniform.logp, -math.log(96), rtol=1e-6)
    np.testing.assert_allclose(uniform.entropy, math.log(96), rtol=1e-6)
    np.testing.assert_allclose(uniform.log_collision, -math.log(96), rtol=1e-6)
    kl = jax.jit(functools.partial(tokens.linear_token_kl, chunk=32))
    assert (np.asarray(kl(*x)) > 0).all()
    twice = (*x[:2], *x[:2])
    np.testing.assert_allclose(kl(*twice), 0, atol=1e-6)
    slopes = jax.jit(jax.grad(lambda *x: kl(*x).sum(), (0, 1, 2, 3)))(*twice)
    for slope in slopes:  # the minimum
        np.testing.assert_allclose(slope, 0, atol=2e-6)


def test_mapping_over_unembeddings_and_temperatures_is_a_loop():
    x, targets = operands(50), targets_below(50)
    unembeddings = jnp.stack([x.unembedding, 2 * x.unembedding, x.unembedding[:, ::-1]])
    temperatures = jnp.array([0.5, 1.0, 2.0])

    def run(unembedding, temperature):
        logps = lambda *x: tokens.linear_token_logps(*x, targets, chunk=16, temperature=temperature)  # noqa: E731
        value, pull = jax.vjp(logps, x.hidden, unembedding)
        return value, pull(jnp.ones_like(value))

    mapped = jax.jit(jax.vmap(run))(unembeddings, temperatures)
    one = jax.jit(run)
    for i in range(3):
        assert_close(jax.tree.map(lambda leaf: leaf[i], mapped), one(unembeddings[i], temperatures[i]), 1e-6)


# --- where it runs ----------------------------------------------------------------------------------------------------


def shapes_in(program, operation=""):
    """All shapes in a compiled program's text, or those on the lines of one operation."""
    lines = [line for line in program.splitlines() if operation in line]
    found = re.findall(r"\b(?:f64|f32|bf16|f16|s32|pred)\[([\d,]+)\]", "\n".join(lines))
    return {tuple(map(int, shape.split(","))) for shape in found}


def test_an_unembedding_split_by_vocabulary_stays_where_it_is():
    rows, vocabulary, width, chunk = 24, 4096, 8, 512
    mesh = meshes.make(data=1, tensor=8)
    hidden = jax.random.normal(jax.random.key(2), (rows, width))
    unembedding = jax.random.normal(jax.random.key(3), (width, vocabulary))
    targets = jnp.arange(rows) * 170
    split = NamedSharding(mesh, PartitionSpec(None, "tensor"))

    def loss(hidden, unembedding):
        statistics = tokens.linear_token_statistics(hidden, unembedding, targets, chunk=chunk)
        return jnp.sum(jnp.stack(statistics) * jnp.array([[1.0], [0.3], [0.2]]))

    run = jax.value_and_grad(loss, (0, 1))
    places = (NamedSharding(mesh, PartitionSpec()), split)
    compiled = jax.jit(run, in_shardings=places).lower(hidden, unembedding).compile()
    result = compiled(*map(jax.device_put, (hidden, unembedding), places))
    assert result[1][1].sharding.is_equivalent_to(split, 2)
    assert_close(result, jax.jit(run)(hidden, unembedding), 1e-5)
    program = compiled.as_text()
    gathered = shapes_in(program, "all-gather")
    assert max(map(math.prod, gathered), default=0) < width * vocabulary / 8, f"gathers {gathered}"
    every = shapes_in(program)
    assert (width, vocabulary // 8) in every, "the test does not find the local part of the unembedding"
    tables = {shape for shape in every if math.prod(shape) >= rows * vocabulary / 8}
    assert not tables, f"as large as the logits, or a device's part of them: {tables}"


def test_memory_is_that_of_a_chunk_of_logits():
    rows, vocabulary, width = 512, 8192, 32
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, width), (width, vocabulary))]
    targets = jnp.arange(rows)

    def temporary(function):
        compiled = jax.jit(jax.value_and_grad(lambda *x: function(*x).sum(), (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporary(lambda *x: tokens.linear_token_logps(*x, targets, chunk=512))
    whole = temporary(lambda hidden, unembedding: tokens.token_logps(hidden @ unembedding, targets))
    assert whole >= 4 * rows * vocabulary
    assert ours <= whole / 4, f"{ours} bytes by chunks, {whole} for the whole table"


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named():
    hidden, unembedding, targets = jnp.ones((2, 3, 4)), jnp.ones((4, 7)), jnp.zeros((2, 3), jnp.int32)
    for function in (tokens.linear_token_logps, tokens.linear_token_statistics):
        with pytest.raises(ValueError, match=r"targets must have the leading axes of hidden, \(2, 3\), got \(2,\)"):
            function(hidden, unembedding, targets[:, 0])
        with pytest.raises(ValueError, match="targets must be integers, got float32"):
            function(hidden, unembedding, targets + 0.5)
        with pytest.raises(ValueError, match=r"unembedding must have shape \[4, V\], got \(7, 4\)"):
            function(hidden, unembedding.T, targets)
        with pytest.raises(ValueError, match="hidden must be of a floating type, got int32"):
            function(hidden.astype(jnp.int32), unembedding, targets)
        with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
            function(hidden, unembedding, targets, chunk=0)
        for name, shape in (("temperature", (7,)), ("temperature", (2, 3)), ("softcap", (2,))):
            with pytest.raises(ValueError, match=re.escape(f"{name} must be a scalar, got shape {shape}")):
                function(hidden, unembedding, targets, **{name: jnp.ones(shape)})
    kl = functools.partial(tokens.linear_token_kl, hidden, unembedding)
    with pytest.raises(ValueError, match=r"hidden and other_hidden must agree .*: \(2, 3, 4\), \(3, 4\)"):
        kl(hidden[0], unembedding)
    with pytest.raises(ValueError, match=r"other_softcap must be a scalar, got shape \(7,\)"):
        kl(hidden, unembedding, other_softcap=jnp.ones(7))
    with pytest.raises(ValueError, match="other_softcap must be a number, None or \"same\", got 'none'"):
        kl(hidden, unembedding, other_softcap="none")
    with pytest.raises(ValueError, match="other_unembedding must have the vocabulary of unembedding, 7, got 6"):
        kl(hidden, unembedding[:, :6])
    with pytest.raises(ValueError, match=r"other_unembedding must have shape \[4, V\], got \(3, 7\)"):
        kl(hidden, unembedding[:3])
    with pytest.raises(ValueError, match="other_hidden must be of a floating type, got int32"):
        kl(hidden.astype(jnp.int32), unembedding)
