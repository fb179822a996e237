"""Run docs/lecture.py as a notebook, then the solutions of its exercises. It fails if a cell fails, or if
docs/lecture.ipynb has other cells, no outputs, or too many bytes. With --write it writes that file again.

    pip install jupytext nbformat nbclient ipykernel matplotlib; python .ci/lecture.py [--write]"""

import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

DOCS = Path(__file__).parents[1] / "docs"
LIMIT = 3e6  # bytes
TIMEOUT = 600  # seconds, of a cell


def lecture() -> nbformat.NotebookNode:
    """The notebook without outputs, the same every time."""
    notebook = jupytext.read(DOCS / "lecture.py")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = {}
    return notebook


def solutions() -> list[str]:
    """The code blocks of docs/solutions.md."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / "solutions.md").read_text(), re.MULTILINE | re.DOTALL)


def run(notebook: nbformat.NotebookNode) -> None:
    """Fill in the outputs. The solutions run in cells after the last one, which are removed again."""
    count = len(notebook.cells)
    for number, block in enumerate(solutions()):
        notebook.cells.append(new_code_cell(block, id=f"solution-{number}"))
    client = NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(DOCS)}})
    client.execute()
    for cell in notebook.cells[count:]:
        print("".join(output.get("text", "") for output in cell.outputs), end="")
    del notebook.cells[count:]
    for cell in notebook.cells:
        cell.metadata = {}  # without the times


def check(made: nbformat.NotebookNode, kept: nbformat.NotebookNode, size: int) -> None:
    """Exit with a line if the committed notebook does not have these cells, or has no outputs or too many bytes."""
    sources = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (made, kept)]
    if sources[0] != sources[1]:
        sys.exit("docs/lecture.ipynb does not match docs/lecture.py; run python .ci/lecture.py --write")
    if not any(cell.get("outputs") for cell in kept.cells):
        sys.exit("docs/lecture.ipynb has no outputs; run python .ci/lecture.py --write")
    if size > LIMIT:
        sys.exit(f"docs/lecture.ipynb has {size} bytes, more than {LIMIT:.0f}")


def main() -> None:
    file = DOCS / "lecture.ipynb"
    notebook = lecture()
    if "--write" not in sys.argv:
        check(notebook, nbformat.read(file, as_version=4), file.stat().st_size)  # first: it takes no time
    started = time.perf_counter()
    run(notebook)
    print(f"ran the lecture and its solutions in {time.perf_counter() - started:.0f} s")
    if "--write" in sys.argv:
        nbformat.write(notebook, file)
        check(notebook, nbformat.read(file, as_version=4), file.stat().st_size)


if __name__ == "__main__":
    main()
