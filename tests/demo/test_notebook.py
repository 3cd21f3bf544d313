"""The notebook runs from its first cell to its last, and shows what it promises."""

import nbclient
import nbformat
import pytest
from support.places import ROOT, environment


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(ROOT / "docs" / "try_it.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment())
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2 + 2 * 2 + 3
    text = "".join(output.get("text", "") for output in outputs)
    assert "pull " in text
    assert (tmp_path / "runs" / "try_it" / "report.html").is_file()


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(ROOT / "docs" / "try_it.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)
