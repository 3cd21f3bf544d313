"""Prints what a prepared dataset holds, checks it, and draws a contact sheet of its latents.

    python tools/overview.py DATASET --verify --out contact_sheet.png
    python tools/overview.py DATASET --page dataset.html

The contact sheet shows the latents' first three principal components as colours, since no decoder is needed for them.
The page plays decoded clips and says what was left out, and why; it needs the codec that the dataset was made with.
"""

from refalign_jax.command import OutputFile, require, run

# isort: split
import tyro
from tyro.conf import Positional


def overview(
    dataset: Positional[str],
    /,
    *,
    verify: bool = False,
    out: OutputFile = None,
    page: OutputFile = None,
    rows: int = 6,
    push_examples: int = 64,
) -> None:
    """Prints what a prepared dataset holds.

    Args:
      dataset: its folder, local or gs://.
      verify: read every shard and compare it with the manifest's SHA-256.
      out: PNG file for a contact sheet.
      page: HTML file for a page with clips that play.
      rows: examples on the contact sheet and on the page.
      push_examples: most examples from which the push that remains at perfect alignment is computed; 0 for all.
    """
    require(f"{dataset}/manifest.json", "the manifest of a prepared dataset")
    from refalign_jax.data.overview import inspect_dataset

    inspect_dataset(dataset, verify=verify, out=out, rows=rows, push_examples=push_examples)
    if page is not None:
        from refalign_jax.report.dataset import write_dataset_page

        write_dataset_page(dataset, page, rows)
        print(f"wrote       {page}")


def main(arguments: list[str], prog: str) -> None:
    """Parses and prints."""
    tyro.cli(overview, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
