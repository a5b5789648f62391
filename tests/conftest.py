import os
import re

import keras
import pytest

BACKEND = keras.backend.backend()

# Files are given to processes in the order of these beginnings of their names, those
# that take longest first: none of them is left over when the others are done.
LONG = (
    "test_dvc",
    "test_distribution",
    "test_stud",
    "test_training_run",
    "test_surgery",
    "test_aligned_model",
    "test_pipelines",
    "test_monitor",
    "test_alignment_head",
    "test_solver",
    "test_exploration",
    "test_levers",
)


# Those of the pipelines and the benchmarks, which use TensorFlow.
OF_PROGRAMS = re.compile(r"^(from|import) (pipelines|benchmarks)\b", re.MULTILINE)
# It reads files with the package as well, on each backend.
ON_EACH_BACKEND = {"test_reliability_files.py"}


def pytest_ignore_collect(collection_path):
    if BACKEND == "tensorflow" or collection_path.suffix != ".py":
        return None
    if collection_path.name in ON_EACH_BACKEND:
        return None
    text = collection_path.read_text(encoding="utf-8")
    return bool(OF_PROGRAMS.search(text)) or None


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.name
        ranks = (rank for rank, start in enumerate(LONG) if name.startswith(start))
        return next(ranks, len(LONG))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def two_cpus():
    """Two logical devices, which TensorFlow must be given before it starts."""
    if BACKEND != "tensorflow":
        return None
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    return ["cpu:0", "cpu:1"]


@pytest.fixture(scope="session")
def mirrored(two_cpus):
    """One strategy for all tests, as the reductions of several get mixed up."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(two_cpus)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Many tests compile the same steps, which takes JAX longer than to run them.

    All processes keep what they compiled in one folder: that of
    `JAX_COMPILATION_CACHE_DIR`, or one that this run has for itself.
    """
    if BACKEND == "jax":
        import jax

        if jax.config.jax_compilation_cache_dir is None:
            folder = tmp_path_factory.getbasetemp()
            if "PYTEST_XDIST_WORKER" in os.environ:
                folder = folder.parent
            jax.config.update("jax_compilation_cache_dir", str(folder / "jit"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
