import json
from pathlib import Path

import keras
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
if keras.backend.backend() != "tensorflow" or not FOLDER.is_dir():
    pytest.skip("notebooks are run on TensorFlow", allow_module_level=True)

matplotlib = pytest.importorskip("matplotlib")
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path, kind):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(path):
    matplotlib.use("Agg")
    namespace = {"__name__": "__main__"}
    for cell in cells(path, "code"):
        exec(compile("".join(cell["source"]), path.name, "exec"), namespace)
    import matplotlib.pyplot as plt

    assert len(plt.get_fignums()) >= 2
    plt.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_name_no_folder(path):
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    printed = "".join("".join(o.get("text", "")) for o in outputs)
    assert str(Path.home()) not in printed
    assert str(FOLDER) not in printed
