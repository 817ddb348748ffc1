"""Networks of two hidden layers, which learn in seconds what has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

WIDTH = 32


def fresh(key, inputs, outputs):
    keys = jax.random.split(key, 3)
    sizes = (inputs, WIDTH, WIDTH, outputs)
    return [
        (jax.random.normal(k, (a, b)) / np.sqrt(a), jnp.zeros(b))
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def through(params, x):
    for i, (kernel, bias) in enumerate(params):
        x = x @ kernel + bias[None]
        x = jnp.tanh(x) if i < len(params) - 1 else x
    return x


def trained(loss, params, steps, rate):
    """The parameters after steps of Adam on loss(params, key, step)."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99)

    @jax.jit
    def run(params):
        def step(carry, n):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(5), n)
            grad = jax.grad(loss)(params, key, n)
            updates, state = optimizer.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, jnp.arange(steps))[0][0]

    return run(params)
