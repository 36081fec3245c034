"""Tests compile fast and not well; what depends on XLA's optimisations is compiled here as in use."""

import programs

FILES = ("as_in_use.py", "engine/test_scale.py")
NAMES = "as_in_use or memory_follows_the_chunk"


def test_numbers_and_memory_are_right_as_compiled_in_use():
    """The numbers that `fdjax.runtime` saves, ordered sums, memory that follows the chunk."""
    files = [f"tests/{name}" for name in FILES]
    done = programs.run(
        "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files, "-k", NAMES, xla_flags=programs.AS_IN_USE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("4 passed")
