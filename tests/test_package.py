"""The promises of the package as a whole: a light import, layers that point down, small files."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fdjax"
FILES = sorted(PACKAGE.rglob("*.py"))

# The lowest layer first. A module may import from its own layer and from lower ones, and never in a circle.
LAYERS = (
    ("types", "errors", "runtime"),
    ("models", "data", "federation", "augment"),
    ("losses", "reductions", "robust", "keys", "privacy", "coding"),
    ("local",),
    ("lift",),
    ("algorithms",),
    ("layout", "evaluate", "plan", "hosts", "simulate", "checkpoint", "communication", "settings"),
    ("experiment", "runner", "trials"),
    ("report", "program"),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Ways to run a function for many clients. Only lift.py does that; whoever else uses one says over what.
LIFTINGS = {"vmap", "pmap", "shard_map", "psum", "pmean", "all_gather", "lax.map"}
LIFTINGS_ALLOWED = {
    "lift.py": LIFTINGS,
    "augment.py": {"vmap"},  # over the images of a batch
    "models/convolution.py": {"lax.map", "vmap"},  # the rule of a custom_vmap: over whatever axis the caller batches
}

HEAVY = ("tensorflow", "torch", "tensorflow_datasets", "array_record", "pyarrow", "matplotlib", "orbax", "flax")


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


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_stay_small(path):
    lines = len(path.read_text().splitlines())
    is_algorithm = path.parent.name == "algorithms" and path.name != "__init__.py"
    assert lines <= (150 if is_algorithm else 399), f"{relative(path)} has {lines} lines"


def test_devices_may_wait_for_each_other():
    """XLA:CPU ends a process whose device waits 40 s for another, which one client more can take."""
    found = run_python("import fdjax, os, jaxlib; print(jaxlib.__version__, os.environ.get('XLA_FLAGS'))")
    if found.startswith("0.10."):
        seconds = int(found.split("--xla_cpu_collective_call_terminate_timeout_seconds=")[1].split()[0])
        assert seconds >= 86400
