import errno
import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("yaml")

from pipelines import datasets, files, prepare
from pipelines.datasets import imported, sampling, semeion
from pipelines.datasets.known import KNOWN, WHOLE
from pipelines.datasets.pixels import Pixels
from pipelines.datasets.samples import Samples
from pipelines.datasets.verify import Trust, verify
from pipelines.layout import Layout
from pipelines.params import DataParams, Grid, Params

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("KERAS_DALIGN_SHARED", ROOT.parent / "shared")) / "data"


@pytest.fixture
def builders():
    """The part that imports TensorFlow."""
    pytest.importorskip("tensorflow")
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("importlib_resources")
    from pipelines.datasets import builders

    return builders


@pytest.fixture(autouse=True)
def no_import_folder(monkeypatch):
    monkeypatch.delenv(imported.VARIABLE, raising=False)


def params(name: str, n_train: int, n_test: int, seed: int = 0) -> Params:
    """Parameters with one data set."""
    wanted = {name: DataParams(n_train, n_test, seed)}
    return Params("tiny", ".", Grid((), (), (), ()), wanted, {}, {}, {})


def made_up(folder: Path, name: str, per_class=(3, 2), **changes) -> dict:
    """Writes a file of random images that says that they are made up."""
    known, rng = KNOWN[name], np.random.default_rng(7)
    top = round(1 / known.pixel_scale)
    ends = [""] if WHOLE in known.classes else ["_train", "_test"]
    arrays = {"synthetic": np.array(True)}
    for end, count in zip(ends, per_class, strict=False):
        y = rng.permutation(np.repeat(np.arange(known.n_classes), count))
        arrays[f"x{end}"] = rng.integers(0, top + 1, (len(y), *known.shape), "uint8")
        arrays[f"y{end}"] = y.astype("uint8")
    arrays = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{name}.npz", **arrays)
    return arrays


def from_shared(name: str) -> Path:
    path = SHARED / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


@functools.cache
def digits() -> Samples:
    from pipelines.datasets import digits

    return digits.raw()


# ---- what is known ----


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("digits", {WHOLE: 1_797}),
        ("semeion", {WHOLE: 1_593}),
        ("mnist", {"train": 60_000, "test": 10_000}),
        ("kmnist", {"train": 60_000, "test": 10_000}),
        ("cifar10", {"train": 50_000, "test": 10_000}),
        ("cifar100", {"train": 50_000, "test": 10_000}),
        ("svhn_cropped", {"train": 73_257, "test": 26_032}),
    ],
)
def test_class_counts_add_up_to_the_published_sizes(name, sizes):
    known = KNOWN[name]
    assert {part: known.size(part) for part in known.classes} == sizes
    assert known.n_classes == (100 if name == "cifar100" else 10)
    if known.usual_split:
        assert sum(known.usual_split) == sizes[WHOLE]


@pytest.mark.parametrize("name", ["mnist", "semeion", "cifar100"])
def test_the_shared_files_are_what_is_known(name):
    raw = imported.read(from_shared(name), KNOWN[name])
    assert verify(name, raw, KNOWN[name]) is Trust.CONTENT
    some = next(iter(raw.values()))
    some.x[0, 8, 8, 0] ^= 1
    assert some.content() != KNOWN[name].content.get("train")


# ---- samples and draws ----


def test_content_is_that_of_the_multiset():
    samples = digits().take(np.arange(50))
    order = np.random.default_rng(0).permutation(50)
    shuffled = samples.take(order)
    assert shuffled.content() == samples.content()
    first, second = samples.in_order_of_content(), shuffled.in_order_of_content()
    np.testing.assert_array_equal(first.x, second.x)
    np.testing.assert_array_equal(first.y, second.y)
    # Another label, a sample twice and another pixel are other contents.
    relabelled = Samples(samples.x, (samples.y + 1) % 10)
    twice = samples.take(np.r_[0, 0, 2:50])
    pixel = samples.x.copy()
    pixel[3, 4, 4, 0] ^= 1
    for other in (relabelled, twice, Samples(pixel, samples.y)):
        assert other.content() != samples.content()


def test_a_draw_is_stratified_and_seeded():
    y = np.repeat(np.arange(3), [50, 30, 20])
    samples = Samples(np.arange(100, dtype="uint8").reshape(-1, 1, 1, 1), y)
    # 17 samples: shares of 8.5, 5.1 and 3.4; the one that is left goes to 8.5.
    drawn = sampling.draw(samples, 17, seed=3)
    assert drawn.classes == [9, 5, 3]
    assert len(np.unique(drawn.x)) == 17
    np.testing.assert_array_equal(drawn.x, sampling.draw(samples, 17, seed=3).x)
    assert (drawn.x != sampling.draw(samples, 17, seed=4).x).any()
    np.testing.assert_array_equal(sampling.draw(samples, 100, seed=3).x, samples.x)
    # Shares of 49.5, 29.7 and 19.8.
    assert sampling.draw(samples, 99, seed=3).classes == [49, 30, 20]
    for n in (2, 101):
        with pytest.raises(ValueError, match=f"can be drawn. Received: {n}"):
            sampling.draw(samples, n, seed=3)


def test_a_split_is_disjoint_and_stratified():
    train, test = sampling.split(digits(), 1200, 597, 0)
    assert train.classes == [119, 122, 118, 122, 121, 122, 121, 119, 116, 120]
    # All 1,797 images differ.
    both = np.concatenate([train.x, test.x]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797
    for sizes in ((1200, 598), (9, 100)):
        with pytest.raises(ValueError, match="at least one sample of each of 10"):
            sampling.split(digits(), *sizes, 0)


# ---- digits: without tensorflow-datasets ----


def test_prepared_digits(tmp_path):
    path = prepare.main("digits", params=params("digits", 1200, 597), root=tmp_path)
    data, description = datasets.read(Layout(tmp_path), "digits")
    assert data.x_train.shape == (1200, 8, 8, 1)
    assert data.x_test.shape == (597, 8, 8, 1)
    assert data.x_train.dtype == np.float32
    assert data.x_train.max() == 1
    with np.load(path) as arrays:
        assert arrays["x_train"].dtype == np.uint8
        np.testing.assert_array_equal(data.x_train, arrays["x_train"] / 16)
    assert description["source"] == "scikit-learn digits (content verified)"
    assert description["title"] == "digits"
    assert description["partial"] is description["synthetic"] is False
    assert (description["full_train"], description["full_test"]) == (1200, 597)
    assert description["n_classes"] == 10
    before = path.read_bytes()
    prepare.main("digits", params=params("digits", 1200, 597), root=tmp_path)
    assert path.read_bytes() == before
    prepare.main("digits", params=params("digits", 1200, 597, 1), root=tmp_path)
    assert path.read_bytes() != before


def test_a_part_is_called_so(tmp_path):
    prepare.main("digits", params=params("digits", 150, 60), root=tmp_path)
    data, description = datasets.read(Layout(tmp_path), "digits")
    assert (len(data.x_train), len(data.x_test)) == (150, 60)
    assert description["title"] == "digits (210 of 1,797)"
    assert description["partial"] is True
    # Another split of everything is not a part.
    prepare.main("digits", params=params("digits", 1000, 797), root=tmp_path)
    _, description = datasets.read(Layout(tmp_path), "digits")
    assert description["title"] == "digits"
    assert description["partial"] is False


@pytest.mark.parametrize("scale", [1.0, 1 / 16, 1 / 255])
def test_pixels_end_at_one(scale):
    x = np.array([0, round(1 / scale)], "uint8").reshape(2, 1, 1, 1)
    samples = Samples(x, np.array([0, 1]))
    data = Pixels(samples, samples, scale).dataset()
    assert data.x_train.dtype == np.float32
    assert data.x_train.ravel().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"x_train": a["x_train"][1:]}, "Expected 20 train samples"),
        (lambda a: {"x_train": a["x_train"] * 3}, r"in \[0, 1\]"),
        (lambda a: {"x_test": a["x_test"] / 16}, "must be uint8"),
        (lambda a: {"x_test": a["x_test"][:, :1]}, "same for training and test"),
        (lambda a: {"y_train": a["y_train"] - 1}, "integers from 0"),
        (lambda a: {"y_train": a["y_train"] / 1.0}, "integers from 0"),
        (lambda a: {"y_test": a["y_test"] * 0}, "Every class"),
        (lambda a: {"y_test": a["y_test"] + 1}, "Every class"),
        (lambda a: {"y_test": np.arange(10) // 8}, "differ by 0.05"),
    ],
)
def test_bad_data_are_refused(change, message):
    arrays = {
        "x_train": np.full((20, 2, 2, 1), 8, "uint8"),
        "y_train": np.arange(20) % 2,
        "x_test": np.full((10, 2, 2, 1), 8, "uint8"),
        "y_test": np.arange(10) % 2,
    }

    def pixels(a):
        train = Samples(a["x_train"], a["y_train"])
        return Pixels(train, Samples(a["x_test"], a["y_test"]), 1 / 16)

    wanted = DataParams(20, 10)
    datasets.check(pixels(arrays), wanted)
    with pytest.raises(ValueError, match=message):
        datasets.check(pixels({**arrays, **change(arrays)}), wanted)


def test_changed_and_damaged_data_are_refused(tmp_path):
    path = prepare.main("digits", params=params("digits", 150, 60), root=tmp_path)
    layout = Layout(tmp_path)
    arrays = dict(
        zip(datasets.PARTS, files.read_arrays(path, *datasets.PARTS), strict=True)
    )
    changed = arrays | {"y_train": arrays["y_train"][::-1]}
    files.write_arrays(path, changed)
    with pytest.raises(ValueError, match="does not belong to its description"):
        datasets.read(layout, "digits")
    # Nor may the scale change.
    files.write_arrays(path, arrays)
    description = files.read_json(layout.description("digits"))
    files.write_json(layout.description("digits"), description | {"pixel_scale": 1.0})
    with pytest.raises(ValueError, match="does not belong to its description"):
        datasets.read(layout, "digits")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        datasets.read(layout, "digits")


def test_unknown_names_list_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"'mnits'; there are cifar10, .*svhn_cropped"):
        prepare.main("mnits", params=params("mnits", 10, 10), root=tmp_path)
    with pytest.raises(ValueError, match=r"under `prepare`.*'mnist'; there are digits"):
        prepare.main("mnist", params=params("digits", 10, 10), root=tmp_path)


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    path = prepare.main("digits", params=params("digits", 150, 60), root=tmp_path)
    before = path.read_bytes()

    def savez(file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match=r"(?s)disk is full.*Make room") as raised:
        prepare.main("digits", params=params("digits", 100, 60), root=tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert len(datasets.read(Layout(tmp_path), "digits")[0].x_train) == 150
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "digits.json",
        "digits.npz",
    ]


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path):
    def read_only():
        with files.explaining_a_full_disk(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError, match="Permission denied"):
        read_only()


def test_only_loading_imports_frameworks():
    code = (
        "import sys, pipelines.prepare; print([name for name in ('keras', 'sklearn', "
        "'tensorflow', 'tensorflow_datasets') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


# ---- import folders ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, "must have the arrays x_train, y_train, x_test, y_test"),
        ({"x_test": np.zeros((20, 28, 28, 1), "float32")}, "type float32"),
        ({"x_test": np.zeros((20, 32, 32, 3), "uint8")}, r"\(n, 28, 28, 1\)"),
        ({"y_test": np.zeros(19, "uint8")}, "label for each of 20 images"),
        ({"y_test": np.zeros(20, "float32")}, "integer label"),
        ({"y_test": np.full(20, 10)}, "10 classes, with labels from 0 to 9"),
        ({"y_test": np.arange(20) - 1}, "labels from -1"),
        ({"y_test": np.array([None] * 20)}, "damaged"),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path, changes, message):
    made_up(tmp_path, "mnist", **changes)
    with pytest.raises(ValueError, match=message):
        prepare.main(
            "mnist",
            params=params("mnist", 30, 20),
            root=tmp_path / "out",
            import_from=tmp_path,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "text", "npy"])
def test_damaged_files_are_refused(tmp_path, damage):
    made_up(tmp_path, "mnist")
    path = tmp_path / "mnist.npz"
    whole = path.read_bytes()
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        middle = len(whole) // 2
        path.write_bytes(
            {
                "truncated": whole[:middle],
                "changed": whole[:middle] + b"bad" + whole[middle + 3 :],
                "empty": b"",
                "text": b"404: not found",
            }[damage]
        )
    with pytest.raises(ValueError, match=r"damaged or truncated|must have the arrays"):
        imported.read(path, KNOWN["mnist"])


def test_a_folder_without_the_file_says_what_it_has(tmp_path, monkeypatch):
    made_up(tmp_path, "semeion")
    wanted = params("mnist", 30, 20)
    with pytest.raises(FileNotFoundError, match=r"no mnist.npz.*with semeion.npz.*x_t"):
        prepare.main("mnist", params=wanted, root=tmp_path, import_from=tmp_path)
    monkeypatch.setenv(imported.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no mnist.npz.*with no npz file"):
        prepare.main("mnist", params=wanted, root=tmp_path)


def fake(name, part="train", per_class=None):
    """Samples of blank images with so many of each class."""
    y = np.repeat(np.arange(len(per_class)), per_class)
    return {part: Samples(np.zeros((len(y), *KNOWN[name].shape), "uint8"), y)}


def test_what_is_not_the_data_set_is_refused():
    known = KNOWN["mnist"]
    with pytest.raises(ValueError, match="10 classes, and each must occur"):
        verify("mnist", fake("mnist", per_class=[5] * 9), known, synthetic=True)
    with pytest.raises(ValueError, match="10 classes, and each must occur"):
        verify("mnist", fake("mnist", per_class=[5, 0] * 5), known, synthetic=True)
    with pytest.raises(ValueError, match="shape"):
        verify("mnist", fake("cifar10", per_class=[5] * 10), known)
    # As many samples as there should be, but not of each class.
    with pytest.raises(ValueError, match="or fewer"):
        verify("mnist", fake("mnist", "test", [1_000] * 10), known)
    with pytest.raises(ValueError, match="or fewer"):
        verify("mnist", fake("mnist", "test", [981] + [1] * 9), known)


def test_unknown_content_is_refused_or_marked():
    known = KNOWN["mnist"]
    part = fake("mnist", per_class=[2] * 10)
    with pytest.raises(
        ValueError, match=r"Received: train samples.*expected: train c8"
    ):
        verify("mnist", part, known)
    assert verify("mnist", part, known, allow_unverified=True) is Trust.UNVERIFIED
    assert verify("mnist", part, known, downloaded=True) is Trust.DOWNLOAD
    assert verify("mnist", part, known, synthetic=True) is Trust.SYNTHETIC
    # Where the whole is not known, there is nothing to compare with.
    part = fake("kmnist", per_class=[2] * 10)
    assert verify("kmnist", part, KNOWN["kmnist"]) is Trust.UNVERIFIED


# ---- through the builders of tensorflow-datasets ----


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("mnist", "MNIST (30 of 60,000, synthetic)"),
        ("kmnist", "KMNIST (30 of 60,000, synthetic)"),
        ("cifar10", "CIFAR-10 (30 of 50,000, synthetic)"),
        ("cifar100", "CIFAR-100 (300 of 50,000, synthetic)"),
        ("svhn_cropped", "SVHN (30 of 73,257, synthetic)"),
        ("semeion", "Semeion (50 of 1,593, synthetic)"),
    ],
)
def test_an_import_goes_through_the_builder_unchanged(builders, tmp_path, name, title):
    per_class = (5,) if name == "semeion" else (3, 2)
    arrays = made_up(tmp_path, name, per_class)
    classes = KNOWN[name].n_classes
    sizes = (3 * classes, 2 * classes)
    path = prepare.main(
        name, params=params(name, *sizes), root=tmp_path / "out", import_from=tmp_path
    )
    data, description = datasets.read(Layout(tmp_path / "out"), name)
    assert (len(data.x_train), len(data.x_test)) == sizes
    assert description["title"] == title
    assert description["partial"] is description["synthetic"] is data.synthetic is True
    assert description["source"].startswith("import folder, through tensorflow-datase")
    # The same samples have come out, in whatever order.
    with np.load(path) as prepared:
        found = {key: prepared[key] for key in datasets.PARTS}
    if name == "semeion":
        both = [np.concatenate([found[f"{k}_train"], found[f"{k}_test"]]) for k in "xy"]
        pairs = [(both, (arrays["x"], arrays["y"]))]
    else:
        pairs = [
            ((found[f"x_{k}"], found[f"y_{k}"]), (arrays[f"x_{k}"], arrays[f"y_{k}"]))
            for k in ("train", "test")
        ]
    for after, before in pairs:
        assert Samples(*after).content() == Samples(*before).content()


def test_a_permuted_copy_gives_the_same_draw(builders, tmp_path, monkeypatch):
    arrays = made_up(tmp_path / "a", "mnist")
    order = np.random.default_rng(1).permutation(30)
    permuted = {key: arrays[key][order] for key in ("x_train", "y_train")}
    made_up(tmp_path / "b", "mnist", **permuted)
    found = []
    for folder in ("a", "b"):
        monkeypatch.setenv(imported.VARIABLE, str(tmp_path / folder))
        # The same root: what was imported from another file is not taken for this.
        path = prepare.main("mnist", params=params("mnist", 20, 10), root=tmp_path)
        found.append(path.read_bytes())
        _, description = datasets.read(Layout(tmp_path), "mnist")
        assert description["train_classes"] == [2] * 10
        assert description["test_classes"] == [1] * 10
    assert found[0] == found[1]


def test_unverified_data_are_marked(builders, tmp_path):
    made_up(tmp_path, "mnist", synthetic=None)
    wanted = params("mnist", 30, 20)
    given = {"params": wanted, "root": tmp_path / "out", "import_from": tmp_path}
    with pytest.raises(ValueError, match="not the mnist that is known"):
        prepare.main("mnist", **given)
    assert not Layout(tmp_path / "out").description("mnist").exists()
    prepare.main("mnist", **given, allow_unverified=True)
    _, description = datasets.read(Layout(tmp_path / "out"), "mnist")
    assert description["title"] == "MNIST (30 of 60,000, unverified)"
    assert description["source"].endswith("(unverified)")


def test_real_semeion(builders, tmp_path):
    folder = from_shared("semeion").parent
    given = {"root": tmp_path, "import_from": folder}
    prepare.main("semeion", params=params("semeion", 1000, 593), **given)
    data, description = datasets.read(Layout(tmp_path), "semeion")
    assert description["title"] == "Semeion"
    assert description["trust"] == "content"
    assert description["partial"] is False
    assert set(np.unique(data.x_train)) == {0.0, 1.0}
    both = np.concatenate([data.x_train, data.x_test]).reshape(1593, -1)
    assert len(np.unique(both, axis=0)) == 1593


def kill_after(monkeypatch, builders, n, error):
    """Makes the builder raise an error in the middle of its work."""
    image = builders.tfds.features.Image
    encode, left = image.encode_example, iter(range(n))

    def dying(self, example):
        if next(left, None) is None:
            raise error
        return encode(self, example)

    monkeypatch.setattr(image, "encode_example", dying)


def test_a_killed_preparation_is_not_taken_for_whole(builders, tmp_path, monkeypatch):
    made_up(tmp_path, "mnist")
    wanted = params("mnist", 30, 20)
    given = {"params": wanted, "root": tmp_path / "out", "import_from": tmp_path}
    with monkeypatch.context() as patch:
        # In the second split, when the first one is written.
        kill_after(patch, builders, 40, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare.main("mnist", **given)
    layout = Layout(tmp_path / "out")
    assert not layout.arrays("mnist").exists()
    assert not list((tmp_path / "out").rglob("dataset_info.json"))
    with pytest.raises(FileNotFoundError, match="earlier stage"):
        datasets.read(layout, "mnist")
    prepare.main("mnist", **given)
    assert len(datasets.read(layout, "mnist")[0].x_test) == 20


def test_a_disk_that_fills_up_in_tensorflow_is_called_so(
    builders, tmp_path, monkeypatch
):
    made_up(tmp_path, "mnist")
    full = builders.tf.errors.ResourceExhaustedError(
        None, None, "shard-0; No space left on device"
    )
    kill_after(monkeypatch, builders, 5, full)
    with pytest.raises(OSError, match=r"(?s)disk is full.*Make room") as raised:
        prepare.main(
            "mnist",
            params=params("mnist", 30, 20),
            root=tmp_path,
            import_from=tmp_path,
        )
    assert raised.value.errno == errno.ENOSPC
    assert not Layout(tmp_path).arrays("mnist").exists()


# ---- Semeion's own file, and downloads ----


def lines(table: np.ndarray) -> str:
    """The table as UCI writes it: pixels with decimals, labels without."""
    return "".join(
        " ".join(f"{v:.4f}" for v in row[:256]) + " " + " ".join(map(str, row[256:]))
        + " \n"
        for row in table
    )  # fmt: skip


def table_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hstack([x.reshape(-1, 256), np.eye(10, dtype="uint8")[y]])


def test_semeion_is_parsed(tmp_path):
    arrays = made_up(tmp_path, "semeion")
    table = table_of(arrays["x"], arrays["y"])
    parsed = semeion.parse(lines(table))
    np.testing.assert_array_equal(parsed, table)
    found = semeion.samples(parsed)
    np.testing.assert_array_equal(found.x, arrays["x"])
    np.testing.assert_array_equal(found.y, arrays["y"])
    with pytest.raises(ValueError, match=r"1593 lines.*Received: 30 lines"):
        semeion.check_table(parsed)


@pytest.mark.parametrize(
    "line",
    [
        "0 1",
        "<html>",
        " ".join(["0"] * 266),
        " ".join(["0.5"] + ["0"] * 264 + ["1"]),
        " ".join(["0"] * 264 + ["1", "1"]),
        " ".join(["0"] * 266 + ["1"]),
    ],
)
def test_what_is_no_line_of_semeion_is_refused(line):
    good = " ".join(["0.0000"] * 256 + ["1"] + ["0"] * 9)
    assert semeion.parse(f"{good}\n\n{good}\n").shape == (2, 266)
    with pytest.raises(ValueError, match="line 2"):
        semeion.parse(f"{good}\n{line}\n")


def test_semeion_is_checked_by_content():
    with np.load(from_shared("semeion")) as arrays:
        table = table_of(arrays["x"], arrays["y"])
    semeion.check_table(semeion.parse(lines(table)))
    table[[0, 1]] = table[[1, 0]]
    semeion.check_table(table) if (table[0] == table[1]).all() else None
    with pytest.raises(ValueError, match="Download it again"):
        semeion.check_table(table)


@pytest.fixture
def server(tmp_path):
    """A folder, and the address under which a server gives it away."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_semeion_is_downloaded(builders, server, tmp_path, monkeypatch):
    from pipelines.datasets.semeion_builder import Semeion

    folder, address = server
    monkeypatch.setattr(Semeion, "URL", f"{address}/semeion.data")
    given = {"params": params("semeion", 1000, 593), "root": tmp_path}
    # Nothing is there: 404.
    with pytest.raises(
        ConnectionError, match=r"could not be downloaded(.|\n)*--import"
    ):
        prepare.main("semeion", **given)
    # Something else is there.
    arrays = made_up(tmp_path, "semeion")
    (folder / "semeion.data").write_text(lines(table_of(arrays["x"], arrays["y"])))
    with pytest.raises(ValueError, match="Received: 30 lines"):
        prepare.main("semeion", **given)
    assert not Layout(tmp_path).arrays("semeion").exists()
    with np.load(from_shared("semeion")) as real:
        text = lines(table_of(real["x"], real["y"]))
    (folder / "semeion.data").write_text(text)
    prepare.main("semeion", **given)
    data, description = datasets.read(Layout(tmp_path), "semeion")
    assert description["source"] == (
        "tensorflow-datasets semeion 1.0.0 (content verified)"
    )
    assert len(data.x_train) == 1000


def test_a_download_that_fails_says_what_to_do(builders, tmp_path, monkeypatch):
    from tensorflow_datasets.core.download import downloader

    from pipelines.datasets.semeion_builder import Semeion

    # Nobody listens there, however often one asks.
    monkeypatch.setattr(downloader, "MAX_RETRIES", 1)
    monkeypatch.setattr(Semeion, "URL", "http://127.0.0.1:9/semeion.data")
    with pytest.raises(ConnectionError) as raised:
        prepare.main("semeion", params=params("semeion", 10, 10), root=tmp_path)
    for words in ("same command again", "--import-from", imported.VARIABLE, "x and y"):
        assert words in str(raised.value)
    assert "semeion.npz with images of shape (n, 16, 16, 1)" in str(raised.value)
