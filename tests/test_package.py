"""The promises of the package as a whole: a light import, layers that point down, small files."""

import ast
import graphlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fdjax"
FILES = sorted(PACKAGE.rglob("*.py"))

# The lowest layer first, as the diagram in WORKSPACE.md draws it. A module may import from its own layer and from lower
# ones, and never in a circle.
LAYERS = (
    ("types", "errors", "keys", "runtime", "contract", "method", "digest", "own"),
    ("data",),
    ("models",),
    ("client",),
    ("exchange",),
    ("algorithms",),
    ("engine",),
    ("run",),
    ("__init__", "__main__", "compare"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Ways to run a function for many clients. Only engine/lift.py does that, and engine/lift_trials.py for trials; whoever
# else uses one says over what.
LIFTINGS = {"vmap", "pmap", "shard_map", "psum", "pmean", "all_gather", "lax.map"}
LIFTINGS_ALLOWED = {
    "engine/lift.py": LIFTINGS,
    "engine/lift_trials.py": LIFTINGS,
    "client/augment.py": {"vmap"},  # over the images of a batch
    "client/private.py": {"vmap"},  # over the examples of a microbatch
    "exchange/stacked.py": {"vmap"},  # over the models that a server was sent, on data of its own
    "engine/evaluate.py": {"lax.map"},  # over the two tests of one client
    "models/convolution.py": {"lax.map", "vmap"},  # the rule of a custom_vmap: over whatever axis the caller batches
}

MEDIAN_METHOD = 80  # lines; of the files in algorithms that have a METHOD
LONGEST_FUNCTION = 60  # lines; the builder of a method closes over its small functions and may be longer
HEAVY = (
    "tensorflow",
    "torch",
    "tensorflow_datasets",
    "array_record",
    "pyarrow",
    "matplotlib",
    "orbax",
    "flax",
    "pandas",
    "datasets",
    "tensorboardX",
    "wandb",
)


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def layer(module: str) -> str:
    """fdjax.data.mnist -> data; fdjax itself -> __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(path: Path) -> set[str]:
    """The absolute names of all modules that a file imports, also inside functions."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                found.add(submodule if submodule in MODULES else origin)
    return found


def liftings(path: Path) -> set[str]:
    """Which of LIFTINGS a file names, as jax.vmap, lax.map or imported by name."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            used |= {node.attr, f"{owner}.{node.attr}"}
        elif isinstance(node, ast.ImportFrom):
            owner = (node.module or "").split(".")[-1]
            used |= {name for alias in node.names for name in (alias.name, f"{owner}.{alias.name}")}
    return used & LIFTINGS


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light():
    loaded = run_python(f"import sys, fdjax; print(*(name for name in {HEAVY!r} if name in sys.modules))")
    assert loaded == "", f"import fdjax also imports: {loaded}; import them where they are used"


def test_no_module_starts_jax_or_needs_another_framework():
    # A jnp constant at module level would start the backend, after which nobody can set devices or join a cluster.
    libraries = [name for name, path in sorted(MODULES.items()) if '__name__ == "__main__"' not in path.read_text()]
    code = f"""
import importlib, sys
from jax._src import xla_bridge
for name in {libraries!r}:
    importlib.import_module(name)
    if xla_bridge.backends_are_initialized():
        print(name, "starts a JAX backend when imported")
        break
print(*(name for name in ("tensorflow", "keras", "torch") if name in sys.modules))
"""
    assert run_python(code) == ""


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_down(path):
    own = layer(module_name(path))
    assert own in LEVEL, f"{own!r} is in no layer: add it to LAYERS"
    for module in imported(path):
        top = module.split(".")[0]
        assert top not in ("benchmarks", "sweeps", "tests"), f"{relative(path)} imports the program {module}"
        if top == "fdjax":
            assert LEVEL.get(layer(module), 0) <= LEVEL[own], f"{relative(path)} imports {module}, of a higher layer"


def test_imports_have_no_cycle():
    graph = {name: (imported(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_clients_are_lifted_in_one_module(path):
    stray = liftings(path) - LIFTINGS_ALLOWED.get(relative(path), set())
    assert not stray, f"{relative(path)} uses {sorted(stray)}: if it is over clients, it belongs in lift.py"


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_stay_small(path):
    is_algorithm = path.parent.name == "algorithms" and path.name != "__init__.py"
    assert lines_of(path) <= (150 if is_algorithm else 399), f"{relative(path)} has {lines_of(path)} lines"


def test_most_methods_are_short():
    """What methods share has a module below them, so that a file of one is its paper and its equations."""
    methods = [path for path in FILES if path.parent.name == "algorithms" and "\nMETHOD = " in path.read_text()]
    assert len(methods) > 30
    assert statistics.median(map(lines_of, methods)) <= MEDIAN_METHOD


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_functions_stay_small(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and path.parent.name != "algorithms":
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{relative(path)}: {node.name} has {lines} lines"


def arrows_of_the_map() -> dict[str, set[str]]:
    """The diagram of WORKSPACE.md: a line `folder -> folder, folder` for each folder that imports others."""
    text = (ROOT / "WORKSPACE.md").read_text()
    block = text.split("<!-- imports -->")[1].split("```")[1]
    lines = [line.split("->") for line in block.splitlines() if "->" in line]
    return {name.strip(): {other.strip() for other in others.split(",")} for name, others in lines}


def test_the_map_draws_the_imports():
    """Every arrow between folders, no more and no less; the modules beside the folders are the ground for all."""
    ground, found = {*LAYERS[0]}, {}
    for name, path in MODULES.items():
        if (own := layer(name)) not in ground and own not in ("__init__", "__main__", "compare"):
            others = {layer(module) for module in imported(path) if module in MODULES} - ground - {own, "__init__"}
            found.setdefault(own, set()).update(others)
    assert arrows_of_the_map() == {name: others for name, others in found.items() if others}


def test_devices_may_wait_for_each_other():
    """XLA:CPU ends a process whose device waits 40 s for another, which one client more can take."""
    found = run_python("import fdjax, os, jaxlib; print(jaxlib.__version__, os.environ.get('XLA_FLAGS'))")
    if found.startswith("0.10."):
        seconds = int(found.split("--xla_cpu_collective_call_terminate_timeout_seconds=")[1].split()[0])
        assert seconds >= 86400
