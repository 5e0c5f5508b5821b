r"""One decoder-only transformer for Llama 2 and 3, Mistral, Qwen 2, 2.5 and 3, Gemma 1, 2 and 3.

    x  = embedding[tokens] (times sqrt(width) in Gemma)
    x += attention(norm(x));  x += mlp(norm(x))        per layer; Gemma 2 and 3 norm what is added, too
    logits = cap(norm(x) @ unembedding)

with root-mean-square norms, rotary positions, grouped queries, and `mlp(h) = (act(h gate) * (h up)) down`. A `Config`
says which, and makes one set of functions serve all families. Parameters are a dictionary of arrays; those of the
layers are stacked, so that a network of any depth is one `lax.scan` and compiles in the time of one layer.

Parameters come from `init` or from `models.hf.load`. Arithmetic is in their type, and where they have several `x` keeps
the embedding's; norms, softmax and logits are in float32 at least. Attention is an argument: see `models.attention`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from esscher.core import tokens as token_ops
from esscher.core.arrays import normal
from esscher.models.attention import Attention, dot_product_attention
from esscher.models.functional import Params
from esscher.models.rope import Rope, angles, rotate

__all__ = [
    "Config",
    "axes",
    "embed",
    "final_norm",
    "fuse",
    "hidden",
    "init",
    "kinds",
    "layer",
    "logits",
    "query_scale",
    "shapes",
    "unembedding",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Which decoder. The defaults are Llama's; `models.hf` reads those of a checkpoint.

    Attributes:
      vocabulary: number of tokens.
      width: of the residual stream.
      depth: number of layers.
      heads: of queries.
      kv_heads: of keys and values; divides `heads`.
      head_dim: width of a head.
      mlp: hidden units of the feed-forward layers.
      rope: rotary positions.
      sliding_rope: of the sliding layers, if different.
      sliding: for each layer, whether a token sees only the `window` last ones, itself included; `()` for none.
      window: of the sliding layers.
      norm_eps: added to the mean square.
      offset_norms: norms multiply by `1 + w` instead of `w`.
      normalize_heads: norm queries and keys, each head by itself.
      attention_bias: queries, keys and values have biases.
      activation: of the feed-forward layers.
      sandwich: norm what attention and feed-forward layer add.
      scale_embedding: multiply embeddings by `sqrt(width)`.
      query_scale: of the attention's scores; `head_dim^-0.5` if absent.
      attention_softcap: `cap tanh(s / cap)` of the attention's scores.
      final_softcap: likewise of the logits.
      tied: the unembedding is the embedding.
      context: tokens that it is meant for at most, if known. Nothing that is computed depends on it, so configurations
        that differ only here are equal.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope: Rope = Rope()  # noqa: RUF009 - frozen
    sliding_rope: Rope | None = None
    sliding: tuple[bool, ...] = ()
    window: int | None = None
    norm_eps: float = 1e-6
    offset_norms: bool = False
    normalize_heads: bool = False
    attention_bias: bool = False
    activation: Literal["silu", "gelu"] = "silu"
    sandwich: bool = False
    scale_embedding: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    tied: bool = False
    context: int | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Refuses sizes that do not fit each other."""
        object.__setattr__(self, "sliding", tuple(self.sliding))  # a list could not be hashed
        for name in ("vocabulary", "width", "depth", "heads", "kv_heads", "head_dim", "mlp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.activation not in ("silu", "gelu"):
            raise ValueError(f'activation must be "silu" or "gelu", got {self.activation!r}')
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads={self.kv_heads}, got {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.sliding and len(self.sliding) != self.depth:
            raise ValueError(f"sliding must have one entry for each of {self.depth} layers, got {len(self.sliding)}")
        if any(self.sliding) and self.window is None:
            raise ValueError("window must be given when a layer is sliding")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")


# --- parameters -------------------------------------------------------------------------------------------------------


def _specification(config: Config) -> dict[str, Any]:
    """Shape, names of the axes, and standard deviation at initialisation (`None`: constant) of each parameter."""
    embed, heads, kv = ("embed", "heads", "kv")
    e, h, k, d, f = config.width, config.heads, config.kv_heads, config.head_dim, config.mlp
    small, constant = 0.02, None
    out = small / math.sqrt(2 * config.depth)
    layers = {
        "attention_norm": ((e,), (embed,), constant),
        "query": ((e, h, d), (embed, heads, kv), small),
        "key": ((e, k, d), (embed, heads, kv), small),
        "value": ((e, k, d), (embed, heads, kv), small),
        "output": ((h, d, e), (heads, kv, embed), out),
        "mlp_norm": ((e,), (embed,), constant),
        "gate": ((e, f), (embed, "mlp"), small),
        "up": ((e, f), (embed, "mlp"), small),
        "down": ((f, e), ("mlp", embed), out),
    }
    if config.attention_bias:
        layers |= {"query_bias": ((h, d), (heads, kv), 0.0)}
        layers |= dict.fromkeys(("key_bias", "value_bias"), ((k, d), (heads, kv), 0.0))
    if config.normalize_heads:
        layers |= dict.fromkeys(("query_norm", "key_norm"), ((d,), (kv,), constant))
    if config.sandwich:
        layers |= dict.fromkeys(("attention_post_norm", "mlp_post_norm"), ((e,), (embed,), constant))
    stacked = {name: ((config.depth, *s), ("layers", *names), std) for name, (s, names, std) in layers.items()}
    whole = {
        "embedding": ((config.vocabulary, e), ("vocab", embed), small),
        "layers": stacked,
        "final_norm": ((e,), (embed,), constant),
    }
    return whole if config.tied else whole | {"unembedding": ((e, config.vocabulary), (embed, "vocab"), small)}


def _is_leaf(node: Any) -> bool:
    return isinstance(node, tuple)


def shapes(config: Config, dtype: DTypeLike = jnp.float32) -> Params:
    """Shape and type of every parameter, as `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf[0], dtype), _specification(config), is_leaf=_is_leaf)


def axes(config: Config) -> Params:
    """Logical names of every parameter's axes, for `core.meshes.parameter_specs`."""
    return jax.tree.map(lambda leaf: leaf[1], _specification(config), is_leaf=_is_leaf)


def init(key: Array, config: Config, dtype: DTypeLike = jnp.float32) -> Params:
    """Draws parameters: matrices `N(0, 0.02^2)`, those that write to the stream divided by `sqrt(2 depth)`.

    Norms begin as the identity and biases at 0. Compile it with output shardings to draw a network that no single
    device could hold.
    """
    leaves, structure = jax.tree.flatten(_specification(config), is_leaf=_is_leaf)
    identity = 0.0 if config.offset_norms else 1.0
    drawn = [
        jnp.full(shape, identity, dtype) if std is None else (std * normal(key, shape, dtype)).astype(dtype)
        for key, (shape, _, std) in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    return structure.unflatten(drawn)


# --- the network ------------------------------------------------------------------------------------------------------


def hidden(
    params: Params,
    config: Config,
    tokens: Array,
    *,
    segments: Array | None = None,
    positions: Array | None = None,
    attention: Attention = dot_product_attention,
    remat: bool = False,
    layer_weights: Callable[[Any], Params] = lambda weights: weights,
) -> Array:
    """Hidden states after the final norm: what `tokens.linear_token_logps` and the heads take.

    Args:
      params: see `init`.
      config: which decoder.
      tokens: integers, `[B, T]`; an unknown one makes its sequence NaN.
      segments: `[B, T]`, the number of each token's sequence where a row packs several, -1 for padding. A token sees
        those before it in its own segment. If absent each row is one sequence, and padding on its right is harmless.
      positions: `[B, T]`; counted from 0 in each segment if absent.
      attention: how; see `models.attention`.
      remat: keep only each layer's input for the gradient and compute the rest again.
      layer_weights: makes a layer's weights of its slice of `params["layers"]`, which may be any pytree with a leading
        axis of layers; so adapters are merged, or a quantised base restored, one layer at a time.

    Returns:
      `[B, T, width]` in the type of the embedding.

    Raises:
      ValueError: tokens that are not integers `[B, T]`, or segments or positions of another shape.
    """
    _check_tokens(tokens, segments=segments, positions=positions)
    if positions is None:
        positions = token_ops.segment_positions(jnp.zeros_like(tokens) if segments is None else segments)
    if segments is not None:
        tokens = jnp.where(segments < 0, 0, tokens)
    see = None if segments is None else segments[:, :, None] == segments[:, None, :]
    rotations, masks = kinds(config, positions, positions, see)

    def body(x: Array, scanned: tuple[Any, Array]) -> tuple[Array, None]:
        weights, kind = scanned
        pick = lambda options: jax.tree.map(lambda *values: _choose(kind, values), *options)  # noqa: E731
        rotation, mask = pick(rotations), pick(masks)
        attend = lambda query, key, value: attention(  # noqa: E731
            query, key, value, mask=mask, scale=query_scale(config), softcap=config.attention_softcap
        )
        return layer(layer_weights(weights), config, x, rotation, attend), None

    body = jax.checkpoint(body) if remat else body
    kind = jnp.asarray(config.sliding or (False,) * config.depth, jnp.int32)
    x, _ = jax.lax.scan(body, embed(params, config, tokens), (params["layers"], kind))
    return final_norm(params, config, x)


def final_norm(params: Params, config: Config, x: Array) -> Array:
    """From the residual stream to hidden states."""
    return _norm(x, params["final_norm"], config)


def unembedding(params: Params) -> Array:
    """The matrix `[width, vocabulary]` from hidden states to logits."""
    return params["unembedding"] if "unembedding" in params else params["embedding"].T


def logits(params: Params, config: Config, states: Array) -> Array:
    """Logits of the next token, `[..., width] -> [..., vocabulary]`, float32 or wider, soft cap included."""
    wide = jnp.promote_types(states.dtype, jnp.float32)
    out = jnp.matmul(states, unembedding(params), preferred_element_type=wide)
    return out if config.final_softcap is None else config.final_softcap * jnp.tanh(out / config.final_softcap)


def embed(params: Params, config: Config, tokens: Array) -> Array:
    """Rows of the embedding, `[B, T] -> [B, T, width]`."""
    table = params["embedding"]
    x = table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return x * jnp.asarray(math.sqrt(config.width), x.dtype) if config.scale_embedding else x


def kinds(
    config: Config, queries: Array, keys: Array, see: Array | None
) -> tuple[tuple[tuple[Array, Array], ...], tuple[Array | None, ...]]:
    """What sets the two kinds of layers apart, full and sliding: rotations of the queries, and what they may see.

    Args:
      config: which decoder.
      queries: positions, `[B, T]`.
      keys: positions, `[B, S]`.
      see: `[B, T, S]`, whether a query may look at a key wherever it stands; `None` for all.

    Returns:
      For each kind (the second only if there are sliding layers) cosines and sines, and masks `[B, T, S]`; a mask of
      `None` is the causal one of `T = S` tokens in order.
    """
    full = angles(config.rope, config.head_dim, queries)
    if not any(config.sliding):
        return (full,), (see if see is None else see & _past(queries, keys),)
    past = _past(queries, keys) if see is None else see & _past(queries, keys)
    near = past & (queries[:, :, None] - keys[:, None, :] < config.window)
    turned = angles(config.sliding_rope, config.head_dim, queries) if config.sliding_rope else full
    return (full, turned), (past, near)


def _past(queries: Array, keys: Array) -> Array:
    return queries[:, :, None] >= keys[:, None, :]


def _choose(kind: Array, values: tuple[Array, ...]) -> Array:
    return values[0] if len(values) == 1 else jnp.where(kind, values[1], values[0])


def layer(
    weights: Params,
    config: Config,
    x: Array,
    rotation: tuple[Array, Array],
    attend: Callable[[Array, Array, Array], Array],
) -> Array:
    """One layer, `[B, T, width] -> [B, T, width]`.

    Args:
      weights: those of the layer, or what `fuse` made of them.
      config: which decoder.
      x: the residual stream.
      rotation: cosine and sine of the queries' angles, `[B, T, head_dim / 2]` each.
      attend: `(query[B, T, H, D], key[B, T, K, D], value) -> [B, T, H, D]`, positions applied.
    """
    query, key, value = _project(weights, config, _norm(x, weights["attention_norm"], config))
    if config.normalize_heads:
        query = _norm(query, weights["query_norm"], config)
        key = _norm(key, weights["key_norm"], config)
    seen = attend(rotate(query, *rotation), rotate(key, *rotation), value)
    added = _matmul(seen.reshape(*x.shape[:2], -1), weights["output"].reshape(-1, config.width))
    if config.sandwich:
        added = _norm(added, weights["attention_post_norm"], config)
    x = x + added
    added = _feed_forward(weights, config, _norm(x, weights["mlp_norm"], config))
    return x + (_norm(added, weights["mlp_post_norm"], config) if config.sandwich else added)


def fuse(weights: Params) -> Params:
    """A layer's weights with one matrix for query, key and value and one for gate and up: fewer, larger products."""
    kept = {name: value for name, value in weights.items() if not name.startswith(("query", "key", "value"))}
    kept |= {name: weights[name] for name in ("query_norm", "key_norm") if name in weights}
    gate, up = kept.pop("gate"), kept.pop("up")
    kept["gate_up"] = jnp.concatenate([gate, up], axis=-1)
    kept["qkv"] = jnp.concatenate([weights[name] for name in ("query", "key", "value")], axis=-2)
    if "query_bias" in weights:
        kept["qkv_bias"] = jnp.concatenate([weights[f"{name}_bias"] for name in ("query", "key", "value")], axis=-2)
    return kept


def _project(weights: Params, config: Config, x: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values, `[B, T, heads, D]` each."""
    if "qkv" in weights:
        fused = _matmul(x, weights["qkv"], weights.get("qkv_bias"))
        return tuple(jnp.split(fused, (config.heads, config.heads + config.kv_heads), axis=2))
    return tuple(_matmul(x, weights[name], weights.get(f"{name}_bias")) for name in ("query", "key", "value"))


def _feed_forward(weights: Params, config: Config, x: Array) -> Array:
    if "gate_up" in weights:
        gate, up = jnp.split(_matmul(x, weights["gate_up"]), 2, axis=-1)
    else:
        gate, up = _matmul(x, weights["gate"]), _matmul(x, weights["up"])
    active = jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return _matmul(active * up, weights["down"])


def _matmul(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """`x[B, T, n] @ weight[n, ...] + bias[...]`, in the type of `x`."""
    # Two-dimensional, because XLA's CPU backend takes four times as long for the gradient of a batched product.
    out = x.reshape(-1, x.shape[-1]) @ weight.reshape(x.shape[-1], -1)
    out = out.reshape(*x.shape[:2], *weight.shape[1:])
    return (out if bias is None else out + bias).astype(x.dtype)


def _norm(x: Array, weight: Array, config: Config) -> Array:
    precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = precise * jax.lax.rsqrt(jnp.square(precise).mean(-1, keepdims=True) + config.norm_eps)
    y = y * (1 + weight.astype(y.dtype)) if config.offset_norms else weight * y.astype(x.dtype)
    return y.astype(x.dtype)


def query_scale(config: Config) -> float:
    """What attention's scores are multiplied by."""
    return config.head_dim**-0.5 if config.query_scale is None else config.query_scale


def _check_tokens(tokens: Array, **others: Array | None) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} of {tokens.shape}")
    for name, value in others.items():
        if value is not None and value.shape != tokens.shape:
            raise ValueError(f"{name} must have shape {tokens.shape}, got {value.shape}")
