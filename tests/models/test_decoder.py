"""The decoder against itself: cached and whole, packed and alone, split and not; and what its parts must keep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from esscher.core import meshes
from esscher.models import attention, decoder
from esscher.models.decoder import Config
from esscher.models.language_model import language_model
from esscher.models.rope import Rope

LLAMA = Config(vocabulary=32, width=16, depth=2, heads=4, kv_heads=2, head_dim=6, mlp=24)
QWEN = dataclasses.replace(LLAMA, attention_bias=True, normalize_heads=True, sliding=(False, True), window=3)
GEMMA = dataclasses.replace(
    LLAMA,
    rope=Rope(1e6, "linear", 8.0),
    sliding_rope=Rope(1e4),
    sliding=(True, False),
    window=3,
    offset_norms=True,
    activation="gelu",
    sandwich=True,
    scale_embedding=True,
    query_scale=0.3,
    attention_softcap=5.0,
    final_softcap=4.0,
    tied=True,
)
CONFIGS = {"llama": LLAMA, "qwen": QWEN, "gemma": GEMMA}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


def draw(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), "float32"), decoder.shapes(config))


def draw_tokens(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, LLAMA.vocabulary, shape), jnp.int32)


@functools.cache
def compiled(config):
    return jax.jit(lambda params, tokens, **given: forward(params, config, tokens, **given))


def forward(params, config, tokens, **given):
    return decoder.logits(params, config, decoder.hidden(params, config, tokens, **given))


# --- parameters -------------------------------------------------------------------------------------------------------


@each_config
def test_init_draws_what_shapes_and_axes_say(config):
    params, shapes, axes = decoder.init(jax.random.key(0), config), decoder.shapes(config), decoder.axes(config)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    for (path, leaf), shape, name in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(shapes), names, strict=True
    ):
        assert (leaf.shape, leaf.dtype, leaf.ndim) == (shape.shape, shape.dtype, len(name))
        kind, spread = path[-1].key, float(jnp.std(leaf))
        if "norm" in kind:
            assert np.all(leaf == (0 if config.offset_norms else 1))
        elif "bias" in kind:
            assert not np.any(leaf)
        else:
            assert spread == pytest.approx(0.01 if kind in ("output", "down") else 0.02, rel=0.15)
    assert ("unembedding" in params) == (not config.tied)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads=3, got 4"),
        ({"head_dim": 5}, "head_dim must be even, got 5"),
        ({"sliding": (True,), "window": 2}, "sliding must have one entry for each of 2 layers, got 1"),
        ({"sliding": (True, False)}, "window must be given"),
        ({"sliding": (True, False), "window": -1}, "window must be at least 1, got -1"),
        ({"kv_heads": 0}, "kv_heads must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"activation": "relu"}, 'activation must be "silu" or "gelu", got \'relu\''),
    ],
)
def test_sizes_that_do_not_fit_are_rejected(sizes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **sizes)


def test_configurations_are_hashable_and_equal_whatever_their_context():
    given = dataclasses.replace(QWEN, sliding=[False, True], context=99)
    assert given == QWEN
    assert hash(given) == hash(QWEN)


def test_parameters_drawn_in_bfloat16_have_tails():
    """A bfloat16 normal has 128 values, none beyond 2.9."""
    table = decoder.init(jax.random.key(0), dataclasses.replace(LLAMA, vocabulary=4096), jnp.bfloat16)["embedding"]
    assert table.dtype == jnp.bfloat16
    assert np.abs(table.astype(jnp.float32)).max() > 3.5 * 0.02  # by chance less for e^-30 of all keys
    assert len(np.unique(table.astype(jnp.float32))) > 1000


@pytest.mark.parametrize(
    ("tokens", "given", "message"),
    [
        (jnp.zeros(3, jnp.int32), {}, r"tokens must be integers \[B, T\], got int32 of \(3,\)"),
        (jnp.zeros((1, 3)), {}, r"tokens must be integers \[B, T\], got float32 of \(1, 3\)"),
        (jnp.zeros((1, 3), int), {"segments": jnp.zeros(3)}, r"segments must have shape \(1, 3\), got \(3,\)"),
        (jnp.zeros((1, 3), int), {"positions": jnp.zeros((1, 2))}, r"positions must have shape \(1, 3\), got \(1, 2\)"),
    ],
)
def test_wrong_arguments_are_named(tokens, given, message):
    with pytest.raises(ValueError, match=message):
        decoder.hidden(decoder.shapes(LLAMA), LLAMA, tokens, **given)


@pytest.mark.parametrize("config", [QWEN, GEMMA], ids=["qwen", "gemma"])
@pytest.mark.parametrize("wide", ["norm", "bias", "key", "embedding"])
def test_parameters_of_several_types_keep_the_embeddings(config, wide):
    kind = lambda path: jnp.float32 if wide in path[-1].key else jnp.bfloat16  # noqa: E731
    params = jax.tree.map_with_path(lambda path, leaf: leaf.astype(kind(path)), draw(config))
    read = lambda params: decoder.hidden(params, config, draw_tokens(1, 1, 5))  # noqa: E731
    start = lambda params: language_model(params, config, 6).init(draw_tokens(1, 1, 5), jnp.ones((1, 5)))  # noqa: E731
    dtype = params["embedding"].dtype
    assert jax.eval_shape(read, params).dtype == dtype
    logits, cache = jax.eval_shape(start, params)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in (*cache.keys, *cache.values)} == {dtype}


# --- cached as whole --------------------------------------------------------------------------------------------------

MASK = jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@each_config
def test_prompt_steps_extension_and_rewinding_agree_with_the_full_pass(config):
    """Rows of different lengths, unrolled layers with a cache, against scanned layers without."""
    params, tokens, other = draw(config), draw_tokens(1, 2, 9), draw_tokens(2, 2)
    junk = jnp.where(MASK == 1, tokens[:, :5], 10**6)

    @jax.jit
    def cached(params):
        model = language_model(params, config, 11)
        first, start = model.init(junk, MASK)
        read = lambda cache, token: model.step(cache, token)[::-1]  # noqa: E731
        _, stepped = jax.lax.scan(read, start, tokens[:, 5:].T)
        extended, cache = model.extend(start, tokens[:, 5:])
        back = model.rewind(cache, jnp.array([1, 3]))  # to 8 and 6 tokens
        again, cache = model.step(back, other)
        return first, stepped.swapaxes(0, 1), extended, again, model.step(cache, tokens[:, 0])[0]

    first, stepped, extended, again, last = cached(params)
    segments = jnp.pad(MASK, ((0, 0), (0, 4)), constant_values=1) - 1
    full = compiled(config)(params, tokens, segments=segments)
    close(first, full[:, 4])
    close(stepped, full[:, 5:])
    close(extended, full[:, 5:])
    rewound = tokens.at[0, 8].set(other[0]).at[1, 6].set(other[1]).at[1, 7].set(tokens[1, 0])
    full = compiled(config)(params, rewound, segments=segments)
    close(again, jnp.stack([full[0, 8], full[1, 6]]))
    close(last[1], full[1, 7])


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_a_prompt_padded_on_the_right_is_read_as_one_padded_on_the_left(config):
    tokens = draw_tokens(1, 2, 9)
    left = jnp.where(MASK == 1, tokens[:, :5], 0)
    right = left.at[1].set(jnp.roll(left[1], -2))

    @jax.jit
    def read(params, prompt, mask):
        first, cache = language_model(params, config, 7).init(prompt, mask)
        return first, language_model(params, config, 7).step(cache, tokens[:, 5])[0]

    params = draw(config)
    for one, other in zip(read(params, left, MASK), read(params, right, MASK.at[1].set(MASK[1, ::-1])), strict=True):
        close(one, other)


def test_past_the_capacity_logits_are_nan_and_a_prompt_beyond_it_is_refused():
    model = language_model(draw(LLAMA), LLAMA, 6)

    @jax.jit
    def run():
        _, cache = model.init(draw_tokens(1, 1, 5), jnp.ones((1, 5)))
        fits, full = model.step(cache, jnp.array([3]))
        return fits, model.step(full, jnp.array([3]))[0], model.extend(cache, jnp.array([[3, 4]]))[0]

    fits, *beyond = run()
    assert np.all(np.isfinite(fits))
    assert all(np.all(np.isnan(out)) for out in beyond)


SHAPES = jax.eval_shape(lambda: language_model(draw(LLAMA), LLAMA, 6).init(draw_tokens(1, 2, 3), jnp.ones((2, 3))))[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m.init(draw_tokens(1, 1, 7), jnp.ones((1, 7))),
            "prompt must have 1 to 6 tokens, the capacity, got 7",
        ),
        (lambda m: m.init(draw_tokens(1, 3), jnp.ones(3)), r"prompt must be integers \[B, T0\], got int32 of \(3,\)"),
        (lambda m: m.init(jnp.ones((1, 3)), jnp.ones((1, 3))), r"prompt must be integers \[B, T0\], got float32 of"),
        (
            lambda m: m.init(draw_tokens(1, 2, 3), jnp.ones((1, 3))),
            r"must have one shape: prompt \(2, 3\), mask \(1, 3\)",
        ),
        (lambda m: m.step(SHAPES, draw_tokens(1, 2, 1)), r"token must be integers \[2\], got int32 of \(2, 1\)"),
        (lambda m: m.step(SHAPES, draw_tokens(1, 1)), r"token must be integers \[2\], got int32 of \(1,\)"),
        (lambda m: m.extend(SHAPES, draw_tokens(1, 2)), r"tokens must be integers \[2, G\], got int32 of \(2,\)"),
        (lambda m: m.extend(SHAPES, jnp.ones((2, 1))), r"tokens must be integers \[2, G\], got float32 of \(2, 1\)"),
        (lambda m: m.extend(SHAPES, draw_tokens(1, 2, 7)), "tokens must have at most 6 a row, the capacity, got 7"),
    ],
)
def test_what_the_language_model_cannot_read_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: call(language_model(params, LLAMA, 6)), decoder.shapes(LLAMA))


def test_after_no_token_logits_are_nan_and_rewinding_stops_there():
    params, tokens = draw(LLAMA), draw_tokens(1, 2, 3)

    @jax.jit
    def run(params):
        model = language_model(params, LLAMA, 6)
        nothing, empty = model.init(tokens, jnp.zeros((2, 3)).at[0, 2].set(1))
        first, _ = model.step(empty, tokens[:, 0])
        _, cache = model.init(tokens, jnp.ones((2, 3)))
        emptied = model.rewind(cache, jnp.array([10, 3]))
        return nothing, first, emptied, model.step(emptied, tokens[:, 0])[0]

    nothing, first, emptied, again = run(params)
    np.testing.assert_array_equal(np.isnan(nothing), [[False] * 32, [True] * 32])
    assert np.all(emptied.positions == -1)
    assert np.all(emptied.position == 0)
    assert np.all(emptied.slot == 0)
    alone = compiled(LLAMA)(params, tokens[:, :1])[:, 0]
    close(again, alone)
    close(first[1], alone[1])


# --- what a token sees ------------------------------------------------------------------------------------------------


@each_config
def test_sequences_packed_into_a_row_do_not_see_each_other(config):
    params, tokens = draw(config), draw_tokens(3, 2, 9)
    segments = jnp.array([[7, 7, 7, 7, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, -1, -1]])
    junk = jnp.where(segments < 0, jnp.array([-5, 10**6])[:, None], tokens)
    out = compiled(config)(params, junk, segments=segments)
    assert np.all(np.isfinite(out))
    parts = [(0, 0, 4), (0, 4, 9), (1, 0, 5), (1, 5, 7)]
    alone = jnp.zeros((4, 9), jnp.int32)
    for i, (row, start, stop) in enumerate(parts):
        alone = alone.at[i, : stop - start].set(tokens[row, start:stop])
    expected = compiled(config)(params, alone)
    for i, (row, start, stop) in enumerate(parts):
        close(out[row, start:stop], expected[i, : stop - start])


@each_config
def test_the_past_counts_and_the_future_does_not(config):
    params, tokens = draw(config), draw_tokens(4, 1, 9)
    variants = jnp.concatenate([tokens, tokens.at[0, 4].set((tokens[0, 4] + 1) % 32)])
    out = compiled(config)(params, variants)
    close(out[0, :4], out[1, :4])
    assert np.all(np.abs(out[0, 4:7] - out[1, 4:7]).max(-1) > 1e-3)


def test_an_unknown_token_makes_its_sequence_nan_and_no_other():
    out = compiled(LLAMA)(draw(LLAMA), draw_tokens(5, 2, 9).at[1, 0].set(32))
    assert np.all(np.isfinite(out[0]))
    assert np.all(np.isnan(out[1]))


def test_a_window_as_long_as_the_sequence_is_none():
    params, tokens = draw(LLAMA), draw_tokens(6, 2, 9)
    windowed = lambda n: compiled(dataclasses.replace(LLAMA, sliding=(True, True), window=n))(params, tokens)  # noqa: E731
    full = compiled(LLAMA)(params, tokens)
    close(windowed(9), full)
    one = windowed(8)  # whose last token has lost sight of the first
    close(one[:, :8], full[:, :8])
    assert np.abs(one[:, 8] - full[:, 8]).max() > 1e-4


def test_a_distant_softcap_is_none():
    params, tokens = draw(LLAMA), draw_tokens(7, 2, 9)
    capped = dataclasses.replace(LLAMA, attention_softcap=1e4, final_softcap=1e4)
    close(compiled(capped)(params, tokens), compiled(LLAMA)(params, tokens))


def test_grouped_queries_are_repeated_keys_and_values():
    params, tokens = draw(LLAMA), draw_tokens(8, 2, 9)
    repeated = {name: jnp.repeat(params["layers"][name], 2, axis=2) for name in ("key", "value")}
    whole = params | {"layers": params["layers"] | repeated}
    out = compiled(dataclasses.replace(LLAMA, kv_heads=4))(whole, tokens)
    close(out, compiled(LLAMA)(params, tokens))


def test_both_kinds_of_attention_follow_the_definition():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 5, heads, 4)).astype("float32") for heads in (4, 2, 2))
    scores = 0.7 * np.einsum("bthd,bshd->bhts", query, np.repeat(key, 2, 2))
    mask = np.tri(5, dtype=bool)[None] & (rng.random((2, 5, 5)) < 0.7) | np.eye(5, dtype=bool)
    for seen in (mask, None):
        for cap in (None, 1.5):
            capped = scores if cap is None else cap * np.tanh(scores / cap)
            weights = np.exp(capped) * (np.tri(5) if seen is None else seen[:, None])
            weights /= weights.sum(-1, keepdims=True)
            expected = np.einsum("bhts,bshd->bthd", weights, np.repeat(value, 2, 2))
            close(attention.dot_product_attention(query, key, value, mask=seen, scale=0.7, softcap=cap), expected)


def test_float64_is_not_narrowed(x64):
    """Values that float32 could not have, of the two products that ask for a type of their own."""
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 1, 2, 1, 4))
    scores = np.tanh(query[0, :, 0] @ key[0, :, 0].T)
    weights = np.exp(scores) * np.tri(2)
    expected = weights / weights.sum(-1, keepdims=True) @ value[0, :, 0]
    out = attention.dot_product_attention(query, key, value, mask=None, scale=1.0, softcap=1.0)
    np.testing.assert_allclose(out[0, :, 0], expected, rtol=1e-12)
    states, table = rng.normal(size=(1, 2, 16)), rng.normal(size=(16, 32))
    np.testing.assert_allclose(decoder.logits({"unembedding": table}, LLAMA, states), states @ table, rtol=1e-12)


def test_positions_may_be_given_and_only_their_differences_count():
    params, tokens = draw(LLAMA), draw_tokens(9, 2, 9)
    positions = 100 + jnp.broadcast_to(jnp.arange(9), (2, 9))
    close(compiled(LLAMA)(params, tokens, positions=positions), compiled(LLAMA)(params, tokens), atol=1e-3)


# --- gradients and devices --------------------------------------------------------------------------------------------


def loss(params, tokens, config=GEMMA, **given):
    out = jax.nn.log_softmax(forward(params, config, tokens[:, :-1], **given))
    return -jnp.take_along_axis(out, tokens[:, 1:, None], 2).mean()


def test_gradients_are_finite_reach_everything_and_do_not_depend_on_recomputation():
    params, tokens = draw(GEMMA), draw_tokens(10, 2, 9)
    plain, recomputed = (jax.jit(jax.grad(functools.partial(loss, remat=remat)))(params, tokens) for remat in (0, 1))
    for path, leaf in jax.tree.leaves_with_path(plain):
        assert np.all(np.isfinite(leaf)), path
        assert np.all(np.any(leaf != 0, axis=tuple(range(1, leaf.ndim)))) or "embedding" in str(path), path
    jax.tree.map(close, plain, recomputed)


def layout(config, mesh):
    return meshes.shardings(mesh, meshes.parameter_specs(decoder.axes(config), decoder.shapes(config), mesh))


def test_split_over_eight_devices_it_computes_the_same():
    params, tokens, mesh = draw(QWEN), draw_tokens(11, 4, 9), meshes.make(data=2, fsdp=2, tensor=2)
    split = jax.device_put(params, layout(QWEN, mesh))
    assert split["layers"]["query"].sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)
    step = jax.jit(jax.value_and_grad(functools.partial(loss, config=QWEN)))
    value, gradient = step(params, tokens)
    split_value, split_gradient = step(split, meshes.place(tokens, mesh))
    close(split_value, value)
    jax.tree.map(close, split_gradient, gradient)


def test_the_gradient_compiles_for_a_tpu_slice():
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'esscher[tpu]' (Linux, x86-64)")
    mesh = meshes.make(data=2, fsdp=2, tensor=2, devices=meshes.topology("v5e:2x4"))
    config = dataclasses.replace(QWEN, width=256, head_dim=128, mlp=512, vocabulary=512)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        decoder.shapes(config, "bfloat16"),
        layout(config, mesh),
    )
    tokens = jax.ShapeDtypeStruct((8, 129), jnp.int32, sharding=NamedSharding(mesh, meshes.BATCH))
    step = jax.jit(jax.grad(functools.partial(loss, config=config, remat=True)), out_shardings=layout(config, mesh))
    text = step.lower(params, tokens).compile().as_text()
    assert "all-reduce" in text or "reduce-scatter" in text
