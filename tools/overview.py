"""Says what a prepared dataset holds, checks it, and draws a contact sheet of its latents.

python tools/overview.py DATASET [--verify] [--out contact_sheet.png]
"""

from refalign_jax.command import run
from refalign_jax.data.overview import inspect_dataset

if __name__ == "__main__":
    run(inspect_dataset)
