"""Sparse training on top of jax and optax alone: masks, rules, one transformation."""
