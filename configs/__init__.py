"""The recipes, one a file; installed as `refalign_jax.configs`. A recipe is Python that is executed to be read."""
