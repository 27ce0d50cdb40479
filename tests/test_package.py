"""The package as it is shipped: what the wheel holds, what the code may import, and which floors know which."""

import ast
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwen3_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
TORCH = PACKAGE / "parity" / "reference.py"  # what it compares with; imported when a comparison starts

# From the cellar up: a module imports from its own floor or from those before it.
FLOORS = [
    ["config"],
    ["sharding", "distributed"],
    ["ops"],
    ["rope", "cache"],
    ["model"],
    ["sampling_params"],
    ["sampling"],
    ["checkpoint"],
    ["placement"],
    ["text"],
    ["request"],
    ["reply"],
    ["loaded"],
    ["steps"],
    ["layerwise"],
    ["runner"],
    ["generate", "shardings", "plan", "parity", "pooling"],
    ["engine"],
    ["server"],
    ["train"],
    ["evaluate"],
    ["preflight"],
    ["cli_options"],
    ["cli_batch", "cli_eval", "cli_folder", "cli_mesh", "cli_serve", "cli_text", "cli_train"],
    ["cli", "__main__", "__init__"],
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_wheel_holds_configs_and_the_demo_and_nothing_foreign(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for config in (ROOT / "configs").rglob("*.*"):
        assert f"qwen3_jax/{config.relative_to(ROOT)}" in held
    for file in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert f"qwen3_jax/demo/{file}" in held
    assert {name.split("/")[0] for name in held} <= {"qwen3_jax", f"qwen3_jax-{version()}.dist-info"}
    assert not [name for name in held if "__pycache__" in name]


def version() -> str:
    return importlib.import_module("qwen3_jax").__version__


def test_one_version():
    assert f'version = "{version()}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_torch_at_import_and_nothing_that_executes_data(path):
    """PyTorch is for one module of the parity tool; no pickle, no eval, no remote code anywhere."""
    heads = {name.split(".")[0] for name in imports(path)}
    assert path == TORCH or not heads & {"torch", "transformers"}
    assert "qwen3_jax.parity.reference" not in imports(path, top_level_only=True)
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            assert not (isinstance(node.func, ast.Name) and name in ("eval", "exec", "__import__")), node.lineno
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            for switch in ("allow_pickle", "trust_remote_code", "shell"):
                assert not keywords.get(switch), node.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        if name.startswith("qwen3_jax."):
            other = name.split(".")[1]
            if other in FLOOR:  # else a name of the package itself, such as __version__
                assert FLOOR[other] <= FLOOR[own], f"{own} imports {other}, a floor above"


def test_importing_the_package_does_not_touch_a_device_or_torch():
    code = (
        "import sys, qwen3_jax; import jax._src.xla_bridge as b; "
        "assert not b._backends, 'a backend was initialised'; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
