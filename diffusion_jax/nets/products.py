"""Products of activations, with derivatives that move less memory than JAX's own."""

import functools

import jax
import jax.numpy as jnp

from diffusion_jax.nets.convolutions import convolved
from diffusion_jax.nets.norm import Parts, as_varying, spans


def product(parts: Parts, kernel: jax.Array) -> jax.Array:
    """Returns the product of an activation with a kernel, [B, H, W, C'].

    The parts are not concatenated, nor are their gradients, which come of one product.
    The gradient of the kernel is summed and left in float32.

    Args:
      parts: the activation, [B, H, W, C_i] each; C is the sum of their channels.
      kernel: [C, C'], in float32 or the type of the parts.

    >>> x = jnp.ones([2, 1, 1, 3])
    >>> print(product((x, x), jnp.ones([6, 1])).ravel())
    [6. 6.]
    """
    return _product(parts, as_varying(kernel, parts[0]))


@jax.custom_vjp
def _product(parts: Parts, kernel: jax.Array) -> jax.Array:
    kernel = kernel.astype(parts[0].dtype)
    # On a GPU a convolution, since a sum with its result is part of the same pass.
    sums = [
        jax.lax.platform_dependent(x, kernel[at], cpu=jnp.matmul, default=_pointwise)
        for x, at in zip(parts, spans(parts), strict=True)
    ]
    return functools.reduce(lambda total, y: y + total, sums)


def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolved(x, kernel[None, None], ((0, 0), (0, 0)))


def _product_forward(
    parts: Parts, kernel: jax.Array
) -> tuple[jax.Array, tuple[Parts, jax.Array]]:
    return _product(parts, kernel), (parts, kernel)


def _product_backward(
    kept: tuple[Parts, jax.Array], gradient: jax.Array
) -> tuple[Parts, jax.Array]:
    parts, kernel = kept
    back = jnp.einsum("...d,cd->...c", gradient, kernel.astype(gradient.dtype))
    of_parts = tuple(back[..., at] for at in spans(parts))
    flat = gradient.reshape(-1, gradient.shape[-1])
    rows = [
        jnp.einsum(
            "nc,nd->cd",
            x.reshape(-1, x.shape[-1]),
            flat,
            preferred_element_type=_wide(x),
        )
        for x in parts
    ]
    return of_parts, jnp.concatenate(rows).astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """Returns softmax(scale q k^T) v, [B, T, C], in the type of v.

    The softmax is computed in float32 whatever the type. The backward pass keeps its
    result and the output, in the type of v, but no scores (Dao et al. 2022).

    Args:
      q: queries, [B, T, C].
      k: keys, as q.
      v: values, as q.
      scale: of the scores.
    """
    return _attend_forward(q, k, v, scale)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = _wide(q)
    scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=wide)
    weights = jax.nn.softmax(scores * scale).astype(v.dtype)
    out = jnp.einsum("bqk,bkc->bqc", weights, v)
    return out, (q, k, v, weights, out)


def _attend_backward(
    scale: float, kept: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    q, k, v, weights, out = kept
    wide = _wide(q)
    of_weights = jnp.einsum("bqc,bkc->bqk", gradient, v, preferred_element_type=wide)
    # The mean of these by the weights, from the output.
    mean = (gradient.astype(wide) * out.astype(wide)).sum(-1, keepdims=True)
    of_scores = weights.astype(wide) * (of_weights - mean) * scale
    of_scores = of_scores.astype(q.dtype)
    return (
        jnp.einsum("bqk,bkc->bqc", of_scores, k),
        jnp.einsum("bqk,bqc->bkc", of_scores, q),
        jnp.einsum("bqk,bqc->bkc", weights, gradient),
    )


attend.defvjp(_attend_forward, _attend_backward)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
