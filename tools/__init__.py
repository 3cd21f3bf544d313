"""The commands; installed as `refalign_jax.tools`, and run by `refalign NAME` or `python tools/NAME.py`."""
