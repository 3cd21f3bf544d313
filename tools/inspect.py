"""Says what a prepared dataset holds, checks it, and draws a contact sheet of its latents.

python tools/inspect.py DATASET [--verify] [--out contact_sheet.png]
"""

import os
import sys

if __name__ == "inspect":
    # Python puts a script's folder first on its path, so whatever command of this folder runs, a library that asks
    # for the standard library's `inspect` finds this file. It makes way.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    del sys.modules["inspect"]
    import inspect  # noqa: F401

if __name__ == "__main__":
    from refalign_jax.command import run
    from refalign_jax.data.overview import inspect_dataset

    run(inspect_dataset)
