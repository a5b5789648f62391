import keras
import pytest

BACKEND = keras.backend.backend()


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
    """Many tests compile the same steps, which takes JAX longer than to run them."""
    if BACKEND == "jax":
        import jax

        jax.config.update(
            "jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jit"))
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
