"""What every test gets: one thread a process, no network, shapes enforced, one device list."""

import ast
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 7000  # lines of code in the package

# Before torch or numpy is imported: two threads on two busy cores are many times slower than one.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# pytest-socket guards this process. Child processes (kernels, pip, the browser) get a proxy that
# nobody listens on, so they find loopback and nothing else.
for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ[name] = os.environ[name.upper()] = "http://127.0.0.1:9"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "localhost,127.0.0.1,::1"
os.environ["PIP_NO_INDEX"] = "1"

# The full data sets, where somebody has put them beside the checkout; tests that need them say so.
if (ROOT.parent / "shared" / "data").is_dir():
    os.environ.setdefault("COURSEKIT_DATA", str(ROOT.parent / "shared" / "data"))

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

# CI draws the same examples every time; a developer's machine keeps looking for new ones.
settings.register_profile("coursekit", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("coursekit")


def package_files():
    """Every source file of the package, sorted."""
    return sorted((ROOT / "coursekit").rglob("*.py"))


def lines_of_code(source):
    """Number of lines that hold code: no blank line, comment or docstring.

    Shapes, sources and worked examples are not to compete with code for room.
    """
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(
        number not in documented and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in enumerate(source.splitlines(), start=1)
    )


def module_name(path):
    """Dotted name of a source file: coursekit/lacim/__init__.py is coursekit.lacim."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Shapes are checked at every call, in the modules that declare any. The others are left as they
# are: a wrapper around each call of the autodiff engine would cost more than the engine.
_checked = [module_name(p) for p in package_files() if "jaxtyping" in p.read_text(encoding="utf-8")]
_early = sorted(set(_checked) & set(sys.modules))
if _early:
    raise RuntimeError(f"imported before their shapes could be enforced: {', '.join(_early)}")
jaxtyping.install_import_hook(_checked, "beartype.beartype")


@pytest.fixture
def unchecked_shapes():
    """The package as a reader has it: a bad argument reaches coursekit's own error message."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request):
    """Every device this machine has."""
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    """The two precisions the package is written for."""
    return request.param


def pytest_terminal_summary(terminalreporter):
    """Show the size of the package at the end of every run."""
    lines = sum(lines_of_code(p.read_text(encoding="utf-8")) for p in package_files())
    terminalreporter.write_line(f"coursekit has {lines:,} lines of code of at most {BUDGET:,}")
