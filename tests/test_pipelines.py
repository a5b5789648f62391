import inspect
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("filelock")
yaml = pytest.importorskip("yaml")

import grids  # noqa: E402

import keras_dalign as kd  # noqa: E402
from pipelines import (  # noqa: E402
    __main__,
    datasets,
    evaluate,
    explore,
    files,
    frontier,
    method_settings,
    methods,
    prepare,
    repository,
    rerun,
    temperature,
    train,
    tune,
)
from pipelines.exploration import Job  # noqa: E402
from pipelines.exploration import explore as explore_job  # noqa: E402
from pipelines.held_out import held_out  # noqa: E402
from pipelines.layout import Layout  # noqa: E402
from pipelines.params import FILE, Frontier, Params, Run, Tuning, load  # noqa: E402
from pipelines.reporting import results  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PROFILES = [
    ".",
    *(f"profiles/{name}" for name in ("cpu", "letter", "semeion", "whole")),
]
MLP = {"model": {"name": "mlp"}, "epochs": 1, "batch_size": 1, "recipes": {}}


@pytest.fixture
def params(tmp_path: Path) -> Params:
    """A grid on a part of digits, with every kind of method."""
    return grids.tiny(tmp_path / "params.yaml")


def prepared(params, tmp_path):
    prepare.main("digits", params=params, root=tmp_path)
    return Layout(tmp_path)


@pytest.fixture(scope="module")
def base_trainings(tmp_path_factory):
    """A folder with the data and the base trainings, which no test changes."""
    folder = tmp_path_factory.mktemp("base")
    params = grids.tiny(folder / "params.yaml")
    prepared(params, folder)
    for augmentation in params.grid.augmentations:
        explore.main("digits", augmentation, 0, params=params, root=folder)
    return folder


@pytest.fixture
def layout(base_trainings, tmp_path):
    """A copy of them, for a test of what is done next."""
    shutil.copytree(base_trainings, tmp_path, dirs_exist_ok=True)
    return Layout(tmp_path)


def read(layout):
    data, _ = datasets.read(layout, "digits")
    return data


def finished(params, tmp_path, method, augmentation="none"):
    key = ("digits", augmentation, method, 0)
    train.main(*key, params=params, root=tmp_path)
    evaluate.main(*key, root=tmp_path)
    return files.read_json(Layout(tmp_path).metrics(Run(*key)))


def test_stages_from_raw_data_to_report(params, layout, tmp_path):
    pytest.importorskip("matplotlib")
    from pipelines import report

    for run in params.grid.runs():
        metrics = finished(params, tmp_path, run.method, run.augmentation)
        certificate = files.read_json(layout.certificate(run))
        assert metrics["train_loss"] == pytest.approx(certificate["loss"], rel=1e-4)
        assert metrics["gap"] == certificate["gap"] >= 0
        assert 0 < metrics["error_rate"] < 1
        assert metrics["nll"] > 0
        assert 0 < metrics["ece"] < 1
        assert 0 < metrics["brier"] < 2
        assert metrics["temperature"] is None
        assert metrics["provenance"]["augmentation"] == run.augmentation
        assert metrics["provenance"]["partial"] is True
        phases = {
            "base": [0, 0, 0, 0],
            "base_bn": [0, 0, 0, 0],
            "base_swa": [0, 0, 0, 0],
            "dalign": [0, 0],
            "solve": [0, 0],
        }.get(run.method, [0, 0, 1, 1])
        assert metrics["curves"]["phase"] == phases
        timing = files.read_json(layout.timing(run))
        assert timing["seconds"] == pytest.approx(sum(timing["phases"].values()))
        assert all(seconds > 0 for seconds in timing["phases"].values())
        two_phase = params.methods[run.method]["kind"] == "two_phase"
        assert (metrics["switch"] is not None) == two_phase
        if two_phase:
            assert metrics["switch"]["epoch"] == 2
            assert metrics["parameters"]["total"] > metrics["parameters"]["base"]
    # Methods that share an exploration start from the same weights, at the same time.
    explored = {
        files.read_json(layout.timing(Run("digits", "none", method, 0)))["phases"][
            "explore"
        ]
        for method in ("two_phase_random", "solve", "last_layer")
    }
    assert len(explored) == 1
    text = report.main(params=params, root=tmp_path).read_text(encoding="utf-8")
    assert "digits (210 of 1,797)" in text
    # Nothing temporary stays.
    assert not list(tmp_path.rglob(".*"))
    assert [path.suffix for path in (tmp_path / "backups").iterdir()] == [
        ".lock"
    ] * len(list((tmp_path / "backups").iterdir()))


def test_solving_reaches_the_minimum_and_the_last_layer_does_not(
    params, layout, tmp_path
):
    solved = finished(params, tmp_path, "solve")
    assert solved["gap"] <= 1e-6
    assert solved["l2"] == 0
    with_l2 = finished(params, tmp_path, "solve_l2")
    assert with_l2["l2"] == 0.001
    assert with_l2["l2_gap"] <= 1e-6
    assert with_l2["train_loss"] > solved["train_loss"]
    assert finished(params, tmp_path, "last_layer")["gap"] > 1e-3


def test_a_short_base_run_has_epochs_of_its_own(params, layout, tmp_path):
    short = finished(params, tmp_path, "base_short")
    # 0.3 of 4 epochs, rounded up.
    assert short["curves"]["epoch"] == [1, 2]
    long = finished(params, tmp_path, "base_long")
    assert long["curves"]["epoch"] == list(range(1, 9))
    whole = finished(params, tmp_path, "base_bn")
    assert whole["curves"]["epoch"] == [1, 2, 3, 4]
    # Its cosine ends with it.
    assert short["curves"]["train_loss"][1] != whole["curves"]["train_loss"][1]
    assert not list(layout.backup(Run("digits", "none", "x", 0)).parent.glob("*.json"))


def test_a_temperature_is_fitted_on_what_another_run_has_not_seen(
    params, layout, tmp_path
):
    plain = finished(params, tmp_path, "base_bn")
    scaled = finished(params, tmp_path, "base_temperature")
    key = ("digits", "none")
    files_of = {
        method: [
            np.load(layout.logits(Run(*key, method, 0)))[part]
            for part in ("train", "test")
        ]
        for method in ("base_bn", "base_temperature")
    }
    found = scaled["temperature"]
    assert found != 1
    for one, two in zip(*files_of.values(), strict=True):
        np.testing.assert_allclose(two * found, one, rtol=1e-5, atol=1e-5)
    assert scaled["error_rate"] == plain["error_rate"]
    assert scaled["nll"] != plain["nll"]
    # The other run takes nearly as long.
    base, both = (
        files.read_json(layout.timing(Run(*key, method, 0)))["seconds"]
        for method in ("base_bn", "base_temperature")
    )
    assert both > 1.2 * base

    job = Job.of(Run(*key, "base_temperature", 0), params, read(layout))
    part = held_out(job.data, 0.1, 0)
    other = explore_job(replace(job, data=part), tmp_path / "other")
    second = other.model(1.0)
    kd.reestimate_batch_norm(second, part.x_train)
    logits = second.predict(part.x_test, batch_size=256, verbose=0)
    assert temperature.fit(logits, part.y_test) == found


@pytest.mark.parametrize("augmentation", ["none", "standard"])
def test_a_run_repeats_bit_for_bit(params, layout, tmp_path, augmentation):
    run = Run("digits", augmentation, "two_phase_random", 0)
    found = []
    for _ in range(2):
        finished(params, tmp_path, run.method, augmentation)
        folder = sorted(layout.run(run).iterdir())
        found.append({path.name: path.read_bytes() for path in folder})
    assert found[0] == found[1]


def test_tuning_holds_out_training_samples(params, tmp_path):
    prepared(params, tmp_path)
    data = read(Layout(tmp_path))
    held = held_out(data, 0.2, 0)
    assert held.n_classes == data.n_classes
    assert len(held.x_train) + len(held.x_test) == 150
    assert 25 <= len(held.x_test) <= 35
    test = {image.tobytes() for image in data.x_test}
    known = {image.tobytes() for image in data.x_train}
    parts = [
        {image.tobytes() for image in part} for part in (held.x_train, held.x_test)
    ]
    assert parts[0] | parts[1] == known
    assert not parts[1] & (test - known)
    assert not parts[0] & parts[1]


def test_a_share_that_holds_out_nothing_or_all_is_refused(params, tmp_path):
    data = read(prepared(params, tmp_path))
    for share, wrong in ((0.01, "none"), (0.99, "all")):
        with pytest.raises(ValueError, match=f"would be {wrong} of them.*{share} of"):
            held_out(data, share, 0)


def test_tuning_on_a_part_draws_it_by_class(params, tmp_path):
    tuning = replace(params.tune, samples=60, recipes=("constant",))
    params = replace(params, tune=tuning)
    prepared(params, tmp_path)
    tune.main("digits", "none", "constant", params=params, root=tmp_path)
    path = Layout(tmp_path).tuning("digits", "none", "constant")
    assert files.read_json(path)["samples"] == 60
    few = replace(params, tune=replace(tuning, samples=9))
    with pytest.raises(ValueError, match=r"one for each class.* 9 for 10 classes"):
        tune.main("digits", "none", "constant", params=few, root=tmp_path)


def test_two_names_share_one_source(tmp_path):
    own = {"n_train": 150, "n_test": 60}
    params = grids.tiny(
        tmp_path / "params.yaml",
        prepare={"twin": {**own, "source": "digits", "note": "another network"}},
    )
    layout = prepared(params, tmp_path)
    prepare.main("twin", params=params, root=tmp_path)
    (one, described), (two, other) = (
        datasets.read(layout, name) for name in ("digits", "twin")
    )
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, two.arrays()[name])
    assert other["title"] == f"{described['title']}, another network"
    assert other["sha256"] == described["sha256"]
    nowhere = grids.tiny(
        tmp_path / "params.yaml", prepare={"twin": {**own, "source": "digit"}}
    )
    with pytest.raises(ValueError, match=r"no such data set\. Received: 'digit'"):
        prepare.main("twin", params=nowhere, root=tmp_path)


def test_tuning_tries_every_recipe(params, tmp_path):
    params = replace(params, grid=replace(params.grid, augmentations=("none",)))
    layout = prepared(params, tmp_path)
    assert results.read_tuning(params, layout, "digits") == {}
    tune.main("digits", "none", "constant", params=params, root=tmp_path)
    # Nothing is the best before all were tried.
    assert results.read_tuning(params, layout, "digits")["best"] == {}
    tune.main("digits", "none", "cosine", params=params, root=tmp_path)
    found = results.read_tuning(params, layout, "digits")
    errors = found["augmentations"]["none"]
    assert set(errors) == {"constant", "cosine"}
    least = min(each["base_bn"] for each in errors.values())
    assert errors[found["best"]["none"]]["base_bn"] == least
    assert all(0 < each["base"] <= 1 for each in errors.values())
    # The commit is in a file that DVC does not hash.
    for recipe in errors:
        timing = layout.timing(params.tune.run("digits", "none", recipe))
        assert files.read_json(timing) == repository.code()


def test_a_recipe_to_try_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"no such recipe .*Received: 'sine'"):
        grids.tiny(tmp_path / "params.yaml", tune={"recipes": ["sine"]})


def test_frontier_has_a_point_for_every_share_and_seed(params, layout, tmp_path):
    assert results.read_frontier(params, layout, "digits") == {}
    frontier.main("digits", 0, params=params, root=tmp_path)
    found = results.read_frontier(params, layout, "digits")
    assert [point["explore"] for point in found["points"]] == [0.5, 1.0]
    half, whole = found["points"]
    assert half["gap"] <= 1e-6
    assert whole["gap"] <= 1e-6
    assert len(found["base"]) == len(found["base_bn"]) == 1
    # The point and the method of the grid are one and the same.
    solved = finished(params, tmp_path, "solve")
    assert half["error_rate"] == solved["error_rate"]


def test_quickstart_prints_the_answer_and_paths_last(params, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from pipelines import quickstart

    grid = replace(
        params.grid, methods=("base", "solve"), augmentations=("none",), seeds=(0,)
    )
    params = replace(params, grid=grid, frontier=replace(params.frontier, datasets=()))
    table = quickstart.main(params=params, root=tmp_path)
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert any(line == f"table:  {table}" for line in lines)
    assert any("there is nothing to answer" in line for line in lines)
    figures = [
        line.split(maxsplit=1)[1] for line in lines if line.startswith("figure:")
    ]
    assert figures
    assert all(Path(figure).is_file() for figure in figures)


def test_evaluate_refuses_what_does_not_belong_together(params, layout, tmp_path):
    run = Run("digits", "none", "base", 0)
    finished(params, tmp_path, "base")
    certificate = files.read_json(layout.certificate(run))
    files.write_json(layout.certificate(run), certificate | {"loss": 1e-9})
    with pytest.raises(ValueError, match="does not belong to its logits"):
        evaluate.main("digits", "none", "base", 0, root=tmp_path)
    made_with = files.read_json(layout.provenance(run))
    files.write_json(layout.provenance(run), made_with | {"data_sha256": "other"})
    with pytest.raises(ValueError, match="made with other data"):
        evaluate.main("digits", "none", "base", 0, root=tmp_path)
    with pytest.raises(FileNotFoundError, match="earlier stage"):
        evaluate.main("digits", "none", "base", 1, root=tmp_path)


@pytest.mark.parametrize(
    ("stage", "foreign"),
    [("evaluate", ("keras",)), ("gate", ("keras", "numpy", "yaml"))],
)
def test_some_stages_need_little(stage, foreign):
    code = f"import sys, pipelines.{stage}; print({set(foreign)} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "set()"


def test_unknown_names_list_what_there_is(params, tmp_path, capsys):
    prepared(params, tmp_path)
    with pytest.raises(ValueError, match="there are base, base_bn"):
        train.main("digits", "none", "bass", 0, params=params, root=tmp_path)
    with pytest.raises(SystemExit, match=r"must be a stage: prepare, explore.*trian"):
        __main__.cli(["trian"])


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("train", {"epochs": 3}, "must have the keys batch_size, epochs"),
        ("grid", {"methods": ["magic"]}, "'magic'; there are base"),
        ("grid", {"augmentations": ["much"]}, "'much'; there are none"),
        ("recipes", {"constant_1e3": {"rate": 1}}, "must have the keys learning_rate"),
        ("train", {**MLP, "short": {"none": 1.5}}, "at most 1, .* 1.5 for 'none'"),
        ("tune", {"samples": 0}, r"`tune.samples` must be .* Received: 0"),
        ("tune", {"samples": 10.5}, r"`tune.samples` must be .* Received: 10.5"),
        ("tune", {"validation": 1.0}, r"`tune.validation` must be .* Received: 1.0"),
        (
            "methods",
            {"base": {"temperature": 1.0}},
            r"base.temperature` .* 1.0",
        ),
        ("methods", {"base": {"epochs": 0}}, r"methods.base.epochs` .* Received: 0"),
        ("methods", {"base": {"average": 0.1}}, r"`methods.base.average` .* 0.1"),
        (
            "methods",
            {"solve": {"exploit": "sole"}},
            r"solve.exploit` .*'sole'",
        ),
        ("methods", {"solve": {"explore": 0.0}}, r"`methods.solve.explore` .* 0.0"),
        (
            "methods",
            {"letter": {"gates": "learned", "average": True}},
            "learned gates explore by themselves.*methods.letter",
        ),
    ],
)
def test_bad_params_are_refused(tmp_path, section, change, message):
    raw = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    if section == "train":
        raw["train"]["digits"] = change
    else:
        raw[section] |= change
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(path)


def test_all_mistakes_in_the_params_are_reported_at_once(tmp_path):
    raw = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    raw["laebls"] = raw.pop("labels")
    raw["grid"] |= {"methods": ["base", "dalgn"], "seeds": 3}
    raw["train"]["digits"] |= {"epoch": 3, "batch_size": "64"}
    raw["recipes"]["cosine_1e2"] = {"learning_rate": "1e-2"}
    raw["tune"] |= {"recipes": ["cosine_1e0"]}
    raw["methods"]["base_bn"] |= {"restimate": True, "epochs": -1}
    raw["methods"]["solve"] |= {"kind": "two_phases"}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^params.yaml has 10 mistakes:") as caught:
        load(path)
    lines = sorted(str(caught.value).splitlines()[1:])
    expected = [
        "The file has no key 'laebls'; the nearest is 'labels'",
        "`grid.seeds` must be a list, each entry an integer. Received: 3",
        "`train.digits` has no key 'epoch'; the nearest is 'epochs'",
        "`train.digits.batch_size` must be an integer. Received: '64'",
        "`recipes.cosine_1e2.learning_rate` must be a number. Received: '1e-2'",
        "`methods.base_bn` has no key 'restimate'; the nearest is 'reestimate'",
        "`methods.base_bn.epochs` must be a positive multiple",
        "There is no such method. Received: 'dalgn'; there are base, ",
        "There is no such kind of method (of `methods.solve`). Received: 'two_phases'",
        "There is no such recipe (for `tune.recipes`). Received: 'cosine_1e0'",
    ]
    for line, start in zip(lines, sorted(expected), strict=True):
        assert line.startswith(f"- {start}")
    assert sum("the nearest is" in line for line in lines) == 6


def test_names_are_checked_where_sections_can_be_read(tmp_path):
    raw = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    raw["grid"] |= {"datasets": ["digit"], "methods": ["dalgn"]}
    raw["labels"] = 3
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(ValueError, match="4 mistakes") as caught:
        load(path)
    message = str(caught.value)
    assert "`labels` must be a mapping. Received: 3" in message
    assert message.count("the nearest is 'digits'") == 2
    assert "Received: 'dalgn'" in message


def keyword_arguments(function):
    parameters = inspect.signature(function).parameters.values()
    kinds = {each.kind for each in parameters}
    names = {
        each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return names, inspect.Parameter.VAR_KEYWORD in kinds


def test_the_settings_of_methods_are_the_arguments_of_their_functions():
    head = set(method_settings.HEAD)
    assert keyword_arguments(kd.align) == (head | {"gates", "seed", "copy"}, False)
    assert set(methods.KINDS) == set(method_settings.SETTINGS)
    for kind, function in methods.KINDS.items():
        names, takes_head = keyword_arguments(function)
        assert set(method_settings.SETTINGS[kind]) == names | (
            head if takes_head else set()
        )


def test_a_rerun_keeps_only_what_it_made_itself(params, tmp_path, monkeypatch):
    layout = Layout(tmp_path)
    metrics = layout.metrics(params.grid.runs()[0])
    found = []

    def killed(params, root, *, skip_evaluated):
        assert skip_evaluated
        found.append(metrics.is_file())
        files.write_json(metrics, {})
        if len(found) < 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(rerun.quickstart, "run", killed)
    monkeypatch.setattr(rerun.report, "main", lambda **_: None)
    monkeypatch.setattr(rerun, "dvc", lambda *_: None)
    none = replace(params, tune=Tuning(), frontier=Frontier())
    changed = replace(none, labels={"base": "another"})
    files.write_json(metrics, {})
    for each in (none, none, changed):
        with pytest.raises(KeyboardInterrupt):
            rerun.main(params=each, root=tmp_path)
    rerun.main(params=changed, root=tmp_path)
    # Those of before, its own, those of other parameters, its own.
    assert found == [False, True, False, True]
    assert not layout.rerun.exists()


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "numbers.json"
    files.write_json(path, {"a": 1.0})
    with pytest.raises(ValueError, match="must be finite"):
        files.write_json(path, {"a": float("nan")})

    def killed():
        with files.replacing(path) as temporary:
            temporary.write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert files.read_json(path) == {"a": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_profiles_have_one_pipeline():
    files_of_profiles = {(ROOT / folder / "dvc.yaml").resolve() for folder in PROFILES}
    assert files_of_profiles == {ROOT / "dvc.yaml"}


@pytest.mark.parametrize("folder", PROFILES)
def test_profiles_are_complete(folder):
    params = load(ROOT / folder / "params.yaml")
    assert (ROOT / folder / params.code).resolve() == ROOT
    for name in params.grid.datasets:
        wanted = params.prepare[name]
        known = datasets.KNOWN[wanted.source or name]
        sizes = known.usual_split or (known.size("train"), known.size("test"))
        assert 0 < wanted.n_train <= sizes[0]
        assert 0 < wanted.n_test <= sizes[1]
    for name in params.grid.methods:
        share = params.methods[name].get("explore")
        learned = params.methods[name].get("gates") == "learned"
        for each in params.train.values():
            kept = {round(part * each.epochs) for part in each.checkpoints}
            assert share is None or learned or round(share * each.epochs) in kept
    for name in params.frontier.datasets:
        epochs = params.train[name].epochs
        kept = {round(part * epochs) for part in params.train[name].checkpoints}
        assert {round(part * epochs) for part in params.frontier.explore} <= kept


@pytest.mark.parametrize("folder", PROFILES)
def test_recipes_are_the_best_for_the_base_and_not_at_the_edge(folder):
    params, layout = load(ROOT / folder / "params.yaml"), Layout(ROOT / folder)
    found = {
        name: results.read_tuning(params, layout, name) for name in params.tune.datasets
    }
    if not any(found.values()):
        pytest.skip("nothing was tuned")
    for name, tuning in found.items():
        used = params.train[name].recipes
        best = tuning.get("best", {})
        assert {each: used[each] for each in best} == best
        for recipe in map(params.recipes.get, best.values()):
            tried = {
                other.learning_rate
                for other in map(params.recipes.get, params.tune.recipes)
                if (other.schedule, other.optimizer)
                == (recipe.schedule, recipe.optimizer)
            }
            assert min(tried) < recipe.learning_rate < max(tried)


@pytest.mark.parametrize("folder", [*PROFILES, "profiles/studies"])
def test_locks_have_no_stages_beside_the_pipeline_s(folder):
    pytest.importorskip("dvc")
    lock = ROOT / folder / "dvc.lock"
    if not lock.exists() or not (ROOT / ".dvc").exists():
        pytest.skip("not a checkout with results")
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only", "dvc.yaml"],
        cwd=ROOT / folder,
        capture_output=True,
        text=True,
        check=True,
    )
    locked = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
    stages = {name.split(":")[-1] for name in result.stdout.split()}
    # The larger profiles may have been run in part.
    assert set(locked) <= stages
    if folder == ".":
        assert set(locked) == stages
