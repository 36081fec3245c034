"""Tests compile fast and not well; what depends on XLA's optimisations is compiled here as in use."""

import programs

CHOSEN = ("as_in_use.py", "test_algorithms.py", "test_scale.py")
NAMES = "as_in_use or memory_follows_the_chunk or (under_every_lifting and feddistill and (vmap or shard_map))"


def test_numbers_and_memory_are_right_as_compiled_in_use():
    """The numbers that `fdjax.runtime` saves, memory that follows the chunk, a method on one, two and four devices."""
    files = [f"tests/{name}" for name in CHOSEN]
    done = programs.run(
        "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files, "-k", NAMES, xla_flags=programs.AS_IN_USE
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("6 passed")
