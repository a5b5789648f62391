"""A part of `python -m reliability faults`: what takes less than a second each."""

import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("filelock")
pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

from keras_dalign.head.alignment_head import AlignmentHead
from reliability import faults

# The pipelines use TensorFlow; other tests inject faults on all backends.
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the pipelines use TensorFlow"
)

CASES = faults.cases()
SMALL = {
    ("Ctrl-C", "solve", "iterations"),
    ("MemoryError", "fit", "features"),
    ("Ctrl-C", "certify", "outputs"),
    ("Ctrl-C", "check_alignment", "Jacobian"),
    ("files cannot grow", "save", "writing"),
    ("read-only folder", "BackupAndRestore", "writing"),
    ("read-only folder", "save_weights", "writing"),
    ("read-only folder", "write_json", "writing"),
    ("Ctrl-C", "save", "the head"),
    ("Ctrl-C", "load_weights", "the head"),
    ("full disk", "write_arrays", "writing"),
    ("a batch raises", "solve", "batch 3"),
    ("NaN in a batch", "certify", "batch 3"),
    ("memory limit", "fit", "gates"),
}


def test_there_are_enough_cases_and_none_twice():
    lines = [(case.fault, case.operation, case.where) for case in CASES]
    assert len(set(lines)) == len(lines) >= 60
    assert set(lines) >= SMALL


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if (case.fault, case.operation, case.where) in SMALL],
    ids=lambda case: f"{case.fault}-{case.operation}-{case.where}".replace(" ", "_"),
)
def test_faults(case):
    assert faults.outcome(case) == ""


def test_wrong_outcomes_are_found(tmp_path, monkeypatch):
    """A model that half a file was loaded into."""
    case = next(c for c in CASES if (c.fault, c.operation) == ("I/O", "load_weights"))
    monkeypatch.setattr(
        "keras_dalign.training.aligned_model.AlignedModel.snapshot",
        lambda _: lambda: None,
    )
    assert "WrongOutcome" in faults.outcome(case)


def test_no_fault_is_no_case(tmp_path):
    with (
        pytest.raises(faults.WrongOutcome, match="no fault was injected"),
        faults.failing(AlignmentHead, "start_exploiting", ValueError(), 1),
    ):
        np.zeros(1)
