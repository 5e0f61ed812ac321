"""The whole test run: strict dtypes and ranks, several simulated CPU devices."""

import os

# Before jax is imported: the number of devices is fixed by its first use.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # Half the time to compile, which is most of what the tests do.
    " --xla_backend_optimization_level=0"
)

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example of a property slow; no test is timed.
hypothesis.settings.register_profile("lottery_flow", deadline=None, max_examples=25)
hypothesis.settings.load_profile("lottery_flow")
