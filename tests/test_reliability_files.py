"""Old, damaged and hostile files: the measurements in small, and what they found."""

import argparse
import json
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
from small import assert_equal, weights

import keras_dalign as kd

pytest.importorskip("yaml")
pytest.importorskip("sklearn")

from pipelines import files, gate, params
from pipelines.datasets import imported
from pipelines.datasets.known import KNOWN
from pipelines.studies import settings
from reliability import backends, mutations, old_files

BACKEND = keras.backend.backend()
RELEASES = sorted(old_files.FOLDER.glob("*/*"))
OLD = [path for path in RELEASES if path.suffix in {".keras", ".h5"}]
EXPLOITING = old_files.FOLDER / "0.2.0" / "learned-exploiting.keras"


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize(
    "path", OLD, ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_files_of_every_release_give_what_they_gave(path):
    with np.load(path.with_name(old_files.OUTPUTS), allow_pickle=False) as arrays:
        expected = arrays[old_files.name_of(path)]
    found = old_files.predicted(old_files.opened(path))
    assert old_files.difference(found, expected) <= old_files.TOLERANCE


def test_files_are_small_and_of_every_model():
    assert sum(path.stat().st_size for path in RELEASES) < 300_000
    names = {path.stem for path in OLD if path.parent.name == "0.2.0"}
    assert names >= set(old_files.MODELS)


def test_another_output_is_a_difference():
    expected = np.ones((20, 3))
    assert old_files.difference(expected + 1e-3, expected) == pytest.approx(1e-3)
    assert old_files.difference(expected * np.nan, expected) == np.inf
    assert old_files.difference(expected[:5], expected) == np.inf


def edited(change):
    """A model's file whose configuration was changed."""
    members = {}
    with zipfile.ZipFile(EXPLOITING) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    change(config)
    members["config.json"] = json.dumps(config).encode()
    return mutations._packed(list(members.items()))


def test_a_file_that_pytorch_saved_loads_on_each_backend(tmp_path):
    """Keras writes down its own optimizers for PyTorch, by modules that import it."""

    def change(config):
        inner = config["compile_config"]["optimizer"]["config"]["inner_optimizer"]
        inner["module"] = "keras.src.backend.torch.optimizers.torch_adam"
        inner["registered_name"] = "Adam"

    path = tmp_path / "model.keras"
    path.write_bytes(edited(change))
    model = keras.saving.load_model(path)
    assert isinstance(model.optimizer.inner_optimizer, keras.optimizers.Adam)
    config = model.optimizer.get_config()
    config["inner_optimizer"]["module"] = (
        "keras.src.backend.torch.optimizers.torch_adam"
    )
    again = kd.DAlign.from_config(config)
    assert isinstance(again.inner_optimizer, keras.optimizers.Adam)


def remove(*keys):
    def change(config):
        for key in keys[:-1]:
            config = config[key]
        del config[keys[-1]]

    return change


def assign(value, *keys):
    def change(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


OPTIMIZER = ("compile_config", "optimizer", "config")


@pytest.mark.parametrize(
    "change",
    [
        remove("config", "trunk"),
        remove("config", "head"),
        remove("config", "head", "config", "dense"),
        remove(*OPTIMIZER, "inner_optimizer"),
        assign("x", "config", "dtype"),
        assign(None, "config", "head", "build_config", "input_shape"),
        assign(1.5, "config", "head", "config", "units"),
        assign("3", "config", "head", "config", "slope"),
        assign(float("inf"), "config", "head", "config", "n_samples"),
    ],
)
def test_damaged_configurations_are_refused_as_such(change, tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(edited(change))
    # The second one is Keras's own.
    with pytest.raises(ValueError, match=r"Received|Cannot convert"):
        keras.saving.load_model(path)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("name", ["q", "phase_index"])
def test_units_of_another_shape_leave_the_model_as_it_was(name, shape, tmp_path):
    if (name, shape) == ("phase_index", ()):
        shape = (1,)
    model = old_files.opened(EXPLOITING)
    before = weights(model)
    source = EXPLOITING.with_name("learned-exploiting.weights.h5")
    path = tmp_path / "other.weights.h5"
    path.write_bytes(source.read_bytes())
    with h5py.File(path, "r+") as file:
        del file[f"head/vars/{name}"]
        file[f"head/vars/{name}"] = np.ones(shape, "float32")
    with pytest.raises(ValueError, match="left as it was"):
        model.load_weights(path)
    assert_equal(before, weights(model))


def test_a_file_that_breaks_off_leaves_the_model_as_it_was(monkeypatch):
    model = old_files.opened(EXPLOITING)
    before = weights(model)
    path = EXPLOITING.with_name("learned-exploiting.weights.h5")
    for weight in model.trunk.weights:
        weight.assign(weight + 1)
    changed = weights(model)

    def load(self, *args, **kwargs):
        keras_load(self, *args, **kwargs)
        raise OSError("Can't read data")

    keras_load = keras.Model.load_weights
    monkeypatch.setattr(keras.Model, "load_weights", load)
    with pytest.raises(OSError, match="Can't read"):
        model.load_weights(path)
    assert_equal(changed, weights(model))
    monkeypatch.undo()
    model.load_weights(path)
    assert_equal(before, weights(model))


@pytest.mark.parametrize(
    "text",
    [
        "grid: [",
        "grid: !!python/object/apply:os.system ['touch x']",
        "grid: {datasets: 3, augmentations: [], methods: [], seeds: []}",
        "prepare: 3",
        "[1, 2]",
        "profile: " + 2000 * "[" + 2000 * "]",
        "a: !!timestamp 'x'",
    ],
)
def test_damaged_parameters_are_refused(text, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="Received"):
        params.load(path)
    with pytest.raises(ValueError, match="Received"):
        settings.load(path)


def test_an_error_does_not_write_out_aliases_of_aliases(tmp_path):
    original = (backends.ROOT / "params.yaml").read_bytes()
    rng = np.random.default_rng(0)
    for index in range(5):
        path = tmp_path / f"{index}.yaml"
        path.write_bytes(mutations.aliased(original, rng))
        try:
            params.load(path)
        except ValueError as error:
            assert len(str(error)) < 5000  # noqa: PT017


def test_shown_is_short():
    value = ["x"]
    for _ in range(60):
        value = [value] * 8
    assert len(files.shown(value)) < 500


@pytest.mark.parametrize("number", range(8))
def test_damaged_arrays_are_refused(number, tmp_path):
    """Errors of NumPy's parser of headers, of zipfile and of zlib."""
    path = tmp_path / "semeion.npz"
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (5,"[: 40 + 2 * number]
    inner = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    arrays = [("x.npy", inner), ("y.npy", inner)]
    content = mutations._packed(arrays)
    if number >= 4:
        # The archive is damaged, too, where its members are compressed.
        content = content[:45] + bytes([255 - number] * 4) + content[49:]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        files.read_arrays(path, "x", "y")
    with pytest.raises(ValueError, match="damaged"):
        imported.read(path, KNOWN["semeion"])


def test_a_lock_with_paths_outside_of_stages_is_refused():
    lock = "stages:\n  a:\n    deps:\n    - path: x\n"
    assert gate.locked_paths(lock) == {"a": {"deps": ["x"], "outs": []}}
    for text in ("    - path: x\n", "  a:\n    params:\n    - path: x\n"):
        with pytest.raises(ValueError, match=r"damaged dvc\.lock"):
            gate.locked_paths(text)


def test_mutations_differ_from_the_original_and_repeat_by_seed():
    content = {
        "keras": EXPLOITING.read_bytes(),
        "weights": EXPLOITING.with_name("quadratic.weights.h5").read_bytes(),
        "npz": EXPLOITING.with_name(old_files.OUTPUTS).read_bytes(),
        "yaml": (backends.ROOT / "params.yaml").read_bytes(),
    }
    for kind, original in content.items():
        found = [mutations.mutated(kind, original, (0, i)) for i in range(30)]
        again = [mutations.mutated(kind, original, (0, i)) for i in range(3)]
        assert [name for name, _ in found[:3]] == [name for name, _ in again]
        assert all(content != original for _, content in found)
        assert len({name for name, _ in found}) > 4


@pytest.mark.skipif(BACKEND != "tensorflow", reason="The pipelines use TensorFlow.")
@pytest.mark.skipif(sys.platform == "win32", reason="There is no fork.")
def test_the_measurement_in_small(tmp_path):
    """In a process of its own: the tests' has threads, which a fork would lose."""
    log = tmp_path / "log.jsonl"
    code = (
        "from reliability import mutated_files, backends\n"
        "def child(task):\n"
        "    from pathlib import Path\n"
        "    numbers = range(task['files'])\n"
        "    rows = mutated_files.run(numbers, 0, Path(task['log']))\n"
        "    return mutated_files.report(rows, {}).measurements\n"
        "backends.serve(child)\n"
    )
    (tmp_path / "small_measurement.py").write_text(code)
    task = {"files": 12, "log": str(log)}
    found = backends.run(
        "small_measurement", task, BACKEND, sys.executable, path=str(tmp_path)
    )
    assert found == {"faults": []}
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(r["number"] for r in rows if "number" in r) == list(range(12))


def test_the_watch_sees_what_it_is_to_see(tmp_path):
    code = (
        "import marshal, os, pickle, subprocess, sys, types\n"
        "from pathlib import Path\n"
        "from reliability import backends\n"
        "def child(task):\n"
        "    from reliability.mutated_files import Watch\n"
        "    inside, outside = Path(task['inside']), Path(task['outside'])\n"
        "    watch = Watch(inside)\n"
        "    code = marshal.dumps(compile('1', '<mutated>', 'exec'))\n"
        "    acts = {\n"
        "        'inside': lambda: (inside / 'x').write_text('x'),\n"
        "        'read': lambda: (inside / 'x').read_text(),\n"
        "        'write': lambda: (outside / 'x').write_text('x'),\n"
        "        'mkdir': lambda: (outside / 'y').mkdir(),\n"
        "        'system': lambda: os.system('true'),\n"
        "        'popen': lambda: subprocess.run(['true']),\n"
        "        'pickle': lambda: pickle.loads(b'cos\\nsystem\\n.'),\n"
        "        'marshal': lambda: marshal.loads(code),\n"
        "    }\n"
        "    seen = {}\n"
        "    for name, act in acts.items():\n"
        "        watch.seen.clear()\n"
        "        watch.on = True\n"
        "        act()\n"
        "        watch.on = False\n"
        "        seen[name] = len(watch.seen)\n"
        "    return seen\n"
        "backends.serve(child)\n"
    )
    (tmp_path / "watching.py").write_text(code)
    inside = tmp_path / "inside"
    inside.mkdir()
    task = {"inside": str(inside), "outside": str(tmp_path)}
    seen = backends.run("watching", task, BACKEND, sys.executable, path=str(tmp_path))
    assert seen.pop("inside") == seen.pop("read") == 0
    assert all(seen.values()), seen


def test_options():
    from reliability import mutated_files

    for module in (old_files, mutated_files):
        parser = argparse.ArgumentParser()
        module.add_options(parser)
        assert parser.parse_args([])
