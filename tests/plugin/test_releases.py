"""Every supported vLLM release has the classes, attributes and signatures that the plugin overrides and calls.

The plugin is type-checked against the sources of each release: those of the installed one, and of others out of their
wheels, from which only the Python files are kept. What a type checker does not see, a definition in a subclass that no
longer overrides anything, is looked up in the class bodies.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "mla_backend" / "plugin"
OTHER_RELEASES = ("0.26.0", "0.29.0", "0.33.0")

ASKED_SINCE = {"kv_cache_spec": (0, 31), "supports_device_cpu_query_lens_mismatch": (0, 28)}
ASKED_UNTIL = {"get_kv_cache_stride_order": (0, 28), "include_num_layers_dimension": (0, 28)}
"""Methods and parameters that the plugin defines and that not every release asks for."""

PATCHED = {
    "check_and_update_config": ["cls", "vllm_config"],
    "get_attn_backend_cls": ["cls", "selected_backend", "attn_selector_config", "num_heads"],
}
"""The platform's methods that the plugin answers before, with their parameters."""

RULES = [
    "AbstractUsage",
    "ArgumentType",
    "AssignmentType",
    "AttributeAccessIssue",
    "CallIssue",
    "GeneralTypeIssues",
    "IncompatibleMethodOverride",
    "IncompatibleVariableOverride",
    "IndexIssue",
    "MissingImports",
    "ReturnType",
]


def sources_of(version: str) -> Path:
    """Return a folder that holds the package vllm of `version`, downloading it once."""
    folder = ROOT / ".cache" / f"vllm-{version}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(partial)]
        wheel = ["--only-binary=:all:", "--platform", "manylinux_2_28_x86_64", "--python-version", "3.12"]
        subprocess.run([*pip, *wheel, f"vllm=={version}"], check=True)
        for path in partial.glob("*.whl"):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(partial, [n for n in archive.namelist() if n.endswith(".py")])
            path.unlink()
        partial.rename(folder)
    return folder


@pytest.fixture(scope="module", params=["installed", *OTHER_RELEASES])
def release(request: pytest.FixtureRequest) -> Path:
    if request.param == "installed":
        spec = importlib.util.find_spec("vllm")
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parents[1]
    return sources_of(request.param)


def type_errors(plugin: Path, release: Path, scratch: Path) -> list[str]:
    """Type-check the package at `plugin` against the vLLM in `release`."""
    config = {
        "include": [str(plugin)],
        "extraPaths": [str(release), str(ROOT)],
        "typeCheckingMode": "off",
        **{f"report{rule}": "error" for rule in RULES},
    }
    (scratch / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--project", str(scratch), "--pythonpath", sys.executable]
    report = json.loads(subprocess.run([*command, "--outputjson"], capture_output=True, text=True).stdout)
    assert report["summary"]["filesAnalyzed"] == len(list(plugin.glob("*.py")))
    return [f"{Path(e['file']).name}: {e['message']}" for e in report["generalDiagnostics"] if e["severity"] == "error"]


def classes(path: Path) -> Iterator[tuple[ast.ClassDef, dict[str, tuple[str, str]]]]:
    """Yield each class of a file with the file's imports: local name to (module, name)."""
    tree = ast.parse(path.read_text())
    imports = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node, imports


def defined_in(node: ast.ClassDef) -> dict[str, set[str]]:
    """Map the names that a class body defines to their parameters; attributes have none."""
    names: dict[str, set[str]] = {}
    for n in node.body:
        if isinstance(n, ast.FunctionDef):
            names[n.name] = {a.arg for a in (*n.args.posonlyargs, *n.args.args, *n.args.kwonlyargs)}
        elif isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name):
            names[n.target.id] = set()
        elif isinstance(n, ast.Assign):
            names |= {t.id: set() for t in n.targets if isinstance(t, ast.Name)}
    return names


def base_names(node: ast.ClassDef) -> list[str]:
    bases = [b.value if isinstance(b, ast.Subscript) else b for b in node.bases]
    return [b.id for b in bases if isinstance(b, ast.Name)]


def inherited(release: Path, module: str, name: str) -> dict[str, set[str]]:
    """Return all that class `name` of a module of vLLM defines or inherits from other classes of vLLM."""
    path = release / (module.replace(".", "/") + ".py")
    local = {node.name: (node, imports) for node, imports in classes(path)}
    node, imports = local[name]
    found: dict[str, set[str]] = {}
    for base in base_names(node):
        origin = (module, base) if base in local else imports.get(base, ("", ""))
        if origin[0].startswith("vllm."):
            found |= inherited(release, *origin)
    return found | defined_in(node)


def empty_overrides(plugin: Path, release: Path, excused: set[str]) -> list[str]:
    """Name what the plugin's subclasses define, or name as a parameter, and their base classes do not have."""
    errors = []
    for path in plugin.glob("*.py"):
        for node, imports in classes(path):
            origins = [imports[base] for base in base_names(node) if imports.get(base, ("",))[0].startswith("vllm.")]
            if not origins or any(isinstance(d, ast.Name) and d.id == "dataclass" for d in node.decorator_list):
                continue  # a dataclass adds fields
            known = {name: params for origin in origins for name, params in inherited(release, *origin).items()}
            for name, params in defined_in(node).items():
                if name not in known and name not in excused and not name.startswith("describe_"):
                    errors.append(f"{path.name}: {node.name}.{name} overrides nothing")
                errors += [f"{path.name}: {name} has no {p}" for p in params - known.get(name, params) - excused]
    return errors


def excused(release: Path) -> set[str]:
    name, _, number = release.name.partition("-")
    at = tuple(int(part) for part in (number if name == "vllm" else version("vllm")).split(".")[:2])
    newer = {name for name, since in ASKED_SINCE.items() if at < since}
    return newer | {name for name, until in ASKED_UNTIL.items() if at > until}


def test_the_plugin_fits_the_release(release: Path, tmp_path: Path) -> None:
    assert type_errors(PLUGIN, release, tmp_path) == []
    assert empty_overrides(PLUGIN, release, excused(release)) == []


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_platform_has_the_methods_that_are_answered_before(release: Path, platform: str) -> None:
    tree = ast.parse((release / "vllm" / "platforms" / f"{platform}.py").read_text())
    methods = {n.name: [a.arg for a in n.args.args] for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert {name: methods.get(name) for name in PATCHED} == PATCHED


def test_what_does_not_fit_is_found(tmp_path: Path) -> None:
    plugin = tmp_path / "mla_backend" / "plugin"
    shutil.copytree(PLUGIN, plugin, ignore=shutil.ignore_patterns("__pycache__"))
    mistakes = [
        ("impl.py", "import MLACommonImpl\n", "import MLACommonImpl, MLANoSuchImpl\n", "MLANoSuchImpl"),
        ("impl.py", "layer: AttentionLayer,", "layer: AttentionLayer, more: int,", "forward_mqa"),
        ("backend.py", "def supports_dtype", "def supports_datatype", "supports_datatype overrides nothing"),
        ("selection.py", "in attention.backend_per_kind:", "in attention.backend_by_kind:", "backend_by_kind"),
        ("metadata.py", "max_num_seqs", "max_seqs", "max_seqs"),
        (
            "metadata.py",
            "seq_lens_device: torch.Tensor",
            "lens_device: torch.Tensor",
            "_build_decode has no lens_device",
        ),
    ]
    for file, right, wrong, _ in mistakes:
        text = (plugin / file).read_text()
        assert right in text
        (plugin / file).write_text(text.replace(right, wrong))
    release = sources_of("0.29.0")
    found = type_errors(plugin, release, tmp_path) + empty_overrides(plugin, release, excused(release))
    for *_, complaint in mistakes:
        assert any(complaint in error for error in found), (complaint, found)
