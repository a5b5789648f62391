"""The table of architectures: one model of it, and how failures are shown."""

import argparse
import warnings
from types import SimpleNamespace

import keras
import pytest

pytest.importorskip("sklearn")

from reliability import architectures

BACKEND = keras.backend.backend()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="The graph is the same on all.")
@pytest.mark.parametrize("name", ["MobileNet", "KerasHub Bert"])
def test_a_model_is_aligned_solved_saved_and_loaded(name, tmp_path):
    if name.startswith("KerasHub"):
        pytest.importorskip("keras_hub")
    with warnings.catch_warnings(action="ignore"):
        row = architectures.tried(name, architectures.models()[name], tmp_path)
    assert row.right, row
    assert row.parameters > 1000


def test_a_model_that_fails_is_a_row_that_says_why(tmp_path, capsys):
    def build():
        raise RuntimeError("There is no such model.\nMore.")

    row = architectures.tried("missing", build, tmp_path)
    assert not row.right
    assert row.error == "RuntimeError: There is no such model."
    assert "Traceback" in capsys.readouterr().err
    report = architectures.report([row], ["missing"])
    assert "RuntimeError" in report.body[1]
    assert [target.met for target in report.targets] == [False, False]


def test_wrong_names_are_refused():
    parser = argparse.ArgumentParser()
    architectures.add_options(parser)
    assert parser.parse_args([]).only is None
    with pytest.raises(ValueError, match=r"no models Unknown.*There are: ConvNeXtTiny"):
        architectures.measure(SimpleNamespace(only=["Unknown"]))
