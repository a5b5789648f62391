import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from small import cross_entropy, digits

import keras_dalign as kd
from keras_dalign.__main__ import main


@pytest.fixture
def files(tmp_path):
    x, y = digits(60)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    np.savez(tmp_path / "named.npz", images=x, labels=y)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(10)]
    )
    model.compile("sgd", cross_entropy())
    model.save(tmp_path / "model.keras")
    return tmp_path


def run(files, command, *words, model="model.keras", data="data.npz"):
    return main([command, str(files / model), str(files / data), *words])


def test_certify_prints_what_the_function_returns(files, capsys):
    assert run(files, "certify") == 0
    model = keras.models.load_model(files / "model.keras")
    expected = kd.certify(model, *digits(60))
    assert capsys.readouterr().out == f"{expected}\n"
    assert run(files, "certify", "--json", "--tol", "1e-3") == 1
    record = json.loads(capsys.readouterr().out)
    assert record["gap"] == expected.gap


def test_solve_saves_a_certified_model(files, capsys):
    out = files / "better.keras"
    assert run(files, "solve", "--out", str(out), "--json", "--l2", "1e-2") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["converged"]
    assert result["l2"] == 1e-2
    words = ("--l2", "1e-2", "--tol", "1e-6", "--json")
    assert run(files, "certify", *words, model=out.name) == 0
    certificate = json.loads(capsys.readouterr().out)
    assert certificate["l2_gap"] == pytest.approx(result["gap"], abs=1e-7)
    # Solved further from the file; the other file is not replaced by accident.
    words = ("--l2", "1e-2", "--out", str(out))
    assert run(files, "solve", *words, model=out.name) == 2
    assert "exists" in capsys.readouterr().err
    assert run(files, "solve", *words, "--force", model=out.name) == 0
    assert f"Saved as {out}" in capsys.readouterr().out


def test_samples_for_validation_choose_the_l2_weight(files, capsys):
    words = ("--out", str(files / "out.keras"), "--json", "--force")
    assert run(files, "solve", *words) in {0, 1}
    held_out = json.loads(capsys.readouterr().out)["path"]
    validation = str(files / "data.npz")
    assert run(files, "solve", *words, "--validation", validation) in {0, 1}
    # The path goes further down: 1e-7 instead of 1e-3.
    path = json.loads(capsys.readouterr().out)["path"]
    assert path[-1]["l2"] < held_out[-1]["l2"]


def test_not_to_converge_is_exit_code_1(files, capsys):
    words = ("--out", str(files / "out.keras"), "--max-iterations", "1")
    assert run(files, "solve", *words, "--json") == 1
    assert not json.loads(capsys.readouterr().out)["converged"]


def test_check_prints_both_reports(files, capsys):
    assert run(files, "check", "--json") == 1
    record = json.loads(capsys.readouterr().out)
    assert record["structure"]["holds"]
    assert not record["alignment"]["aligned"]
    wide = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(200, "relu"), keras.layers.Dense(10)]
    )
    wide.compile("sgd", cross_entropy())
    wide.save(files / "wide.keras")
    assert run(files, "check", model="wide.keras") == 0
    assert "ligned" in capsys.readouterr().out


def test_arrays_and_loss_are_named(files, capsys):
    names = ("--x", "images", "--y", "labels")
    assert run(files, "certify", *names, "--loss", "softmax", data="named.npz") == 0
    named = capsys.readouterr().out
    assert run(files, "certify") == 0
    assert capsys.readouterr().out == named


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["certify", "none.keras", "data.npz"], "There is no file"),
        (["certify", "model.keras", "none.npz"], "none.npz"),
        (["certify", "model.keras", "named.npz"], "has no array x and no array y"),
        (["certify", "model.keras", "model.keras"], "has no array"),
        (["certify", "data.npz", "data.npz"], "File format not supported"),
        (["certify", "model.keras", "data.npz", "--loss", "binary"], "(60,)"),
        (["certify", "model.keras", "data.npz", "--l2", "1e-2"], "an alignment head"),
        (["certify", "model.keras", "data.npz", "--batch-size", "0"], "batch_size"),
        (["solve", "model.keras", "data.npz", "--out", "x.h5"], "must end in .keras"),
        (["solve", "model.keras", "data.npz", "--out", "no/x.keras"], "the folder"),
        (["solve", "model.keras", "data.npz", "--out", "x.keras", "--l2", "-1"], "l2"),
        (
            ["solve", "model.keras", "data.npz", "--out", "x.keras", "--width", "0"],
            "width",
        ),
    ],
)
def test_wrong_files_and_values_are_exit_code_2(
    files, capsys, monkeypatch, words, message
):
    monkeypatch.chdir(files)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out
    assert not (files / "x.keras").exists()


def test_the_module_is_a_program(files):
    command = [sys.executable, "-m", "keras_dalign", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"keras_dalign {kd.__version__}"
