"""The rules of the package that can be read off its source: arrows, size, randomness, docstrings.

Each checker takes source text and yields what is wrong with it, so each is tried on planted faults
before it is trusted with the package.
"""

import ast
import re
import subprocess
import sys

import pytest
import tomllib
from conftest import BUDGET, ROOT, lines_of_code, module_name, package_files
from packaging.requirements import Requirement

FLOOR = {"_check", "data", "models", "train", "curvature", "experiment", "plot", "widgets"}
ONLY_FOR_PAGES = {"plot", "widgets"}
ROOMS_THAT_MAY_MEET = {("dcasgd", "parallelism")}
OUTSIDE = {"tests", "experiments", "notebooks", "benchmarks", "book", "assignments"}
# Where a distribution and the module it brings have different names.
IMPORT_NAMES = {"scikit-learn": "sklearn", "pillow": "PIL", "ipython": "IPython"}
# Matplotlib's documented way to set a colour cycle imports its companion by name.
COMPANIONS = {"cycler"}

GLOBAL_TORCH = {"manual_seed", "seed", "set_rng_state", "manual_seed_all"}
NUMPY_GENERATORS = {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox"}
DRAWS_FROM_TORCH = {
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson",
    "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "trunc_normal_",
}  # fmt: skip


# ---- reading ----


def imports(source, module, is_package=False):
    """Dotted names that a module imports, wherever the statement stands."""
    home = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def dotted(node):
    """Dotted name of an expression, for instance np.random.rand; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def public_definitions(source):
    """Public functions and classes of a module, and the public methods of those classes."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def own_nodes(function):
    """Nodes of a function's body, without those of functions inside it."""
    stack = list(function.body)
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            stack.extend(ast.iter_child_nodes(node))


def parameters(function):
    """Names of a function's parameters, without self and cls."""
    a = function.args
    names = [p.arg for p in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if p]
    return [n for n in names if n not in ("self", "cls")]


# ---- the rules ----


def wrong_arrows(source, module, is_package=False):
    """Imports against the direction: pages -> rooms -> floor -> torch, numpy."""
    room = (module.split(".") + [""])[1]
    for name in imports(source, module, is_package):
        top, target = (name.split(".") + [""])[:2]
        if top in OUTSIDE:
            yield f"{module} imports {name}: the package knows nothing of its users"
        elif top != "coursekit":
            own = top in sys.stdlib_module_names or (room == "autodiff" and top == "numpy")
            if room in ("", "autodiff") and not own:
                yield f"{module} imports {name}: {room or 'coursekit'} must stay light"
        elif target == room or not target:
            continue
        elif room == "autodiff":
            yield f"{module} imports {name}: autodiff imports NumPy alone"
        elif target in ONLY_FOR_PAGES and room not in ONLY_FOR_PAGES:
            yield f"{module} imports {name}: only pages draw"
        elif target not in FLOOR and (room, target) not in ROOMS_THAT_MAY_MEET:
            yield f"{module} imports {name}: no room imports another"


def global_randomness(source, module):
    """Calls that read or move the global random state of torch, NumPy or Python."""
    stdlib_random = "random" in set(imports(source, module))
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        name, last = dotted(call.func), getattr(call.func, "attr", "")
        has_generator = any(k.arg in ("generator", None) for k in call.keywords)
        if (
            (name.startswith("torch.") and last in GLOBAL_TORCH)
            or (re.match(r"(np|numpy)\.random\.", name) and last not in NUMPY_GENERATORS)
            or (stdlib_random and name.startswith("random.") and last != "Random")
            or (last == "default_rng" and not call.args and not call.keywords)
            or (is_torch_draw(call, name, last) and not has_generator)
        ):
            yield f"{module}:{call.lineno} {name or last} uses the global random state"


def is_torch_draw(call, name, last):
    """Whether a call draws numbers by torch: torch.rand(...), init.normal_(...), x.uniform_()."""
    return last in DRAWS_FROM_TORCH and (last.endswith("_") or name.startswith("torch."))


def unsafe_reading(source, module):
    """Anything that could run a pickle."""
    for name in imports(source, module):
        if name.split(".")[0] in {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}:
            yield f"{module} imports {name}: no pickles"
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        options = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        if dotted(call.func) == "torch.load" and options.get("weights_only") is not True:
            yield f"{module}:{call.lineno} torch.load without weights_only=True"
        if options.get("allow_pickle"):
            yield f"{module}:{call.lineno} allow_pickle=True"


def asserts(source, module):
    """Assert statements, which vanish under -O and name neither expectation nor value."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            yield f"{module}:{node.lineno} assert instead of an exception with a message"


def hidden_mutation(source, module):
    """Functions that change an argument's elements and do not say so by a trailing underscore."""
    for name, function in public_definitions(source):
        if isinstance(function, ast.ClassDef) or name.endswith("_") or "." in name:
            continue
        nodes = list(own_nodes(function))
        rebound = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        given = set(parameters(function)) - rebound
        for node in nodes:
            changed = ""
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                changed = dotted(node.value)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                method = node.func.attr
                if method.endswith("_") and not method.startswith("_"):
                    changed = dotted(node.func.value)
            if changed in given:
                yield f"{module}:{node.lineno} {name} changes {changed} in place: end it with _"


def docstring_faults(source, module, exported=None):
    """Public names without a docstring, or with one that leaves out what a caller must know.

    A folder's own names are public when its __init__ hands them on: those are `exported`.
    """
    for name, node in public_definitions(source):
        where, text = f"{module}.{name}", ast.get_docstring(node) or ""
        if exported is not None and name.split(".")[0] not in exported:
            continue
        if not text:
            yield f"{where} has no docstring"
        elif not re.match(r"[^\n]+[.:?]\s*(\n\n|$)", text):
            yield f"{where}: the docstring does not begin with one sentence on a line of its own"
        elif isinstance(node, ast.FunctionDef) and "." not in name:
            yield from (f"{where}: {fault}" for fault in missing_sections(node, text))


def missing_sections(function, text):
    """What a function's signature and body call for and its docstring lacks.

    A function of one or two arguments may say it all in sentences; one that has a Parameters
    section has the others too, unless its first word is Return.
    """
    nodes, names = list(own_nodes(function)), parameters(function)
    sections = set(re.findall(r"^(\w[\w ]*)\n-{3,}$", text, flags=re.M))
    gives_back = any(isinstance(n, ast.Return) and n.value is not None for n in nodes)
    yields = any(isinstance(n, ast.Yield | ast.YieldFrom) for n in nodes)
    if len(names) > 2 and "Parameters" not in sections:
        yield "no Parameters section"
    if "Parameters" in sections:
        yield from (f"{n} is not described" for n in names if not re.search(rf"\b{n}\b", text))
        if (gives_back or yields) and not (sections & {"Returns", "Yields"}):
            if not text.startswith(("Return ", "Yield ")):
                yield f"no {'Yields' if yields else 'Returns'} section"
    for node in nodes:
        error = dotted(getattr(node.exc, "func", node.exc)) if isinstance(node, ast.Raise) else ""
        if error and error not in text:
            yield f"{error} is raised and not named"


def undeclared(source, module, declared):
    """Imports of distributions that pyproject.toml does not name."""
    for name in imports(source, module):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top != "coursekit" and top not in declared:
            yield f"{module} imports {top}, which pyproject.toml does not name"


# ---- the package ----


def declared_imports():
    """Modules that an installation of the package, or of an extra that it can use, brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["data"] + extras["book"] + extras["ray"]
    names = [Requirement(line).name for line in lines]
    return {IMPORT_NAMES.get(name, name) for name in names} | COMPANIONS


def exported_by_folder(module):
    """Names that the folder of a module hands on; None for a module that is a room by itself."""
    parts = module.split(".")
    if parts[-1].startswith("_"):
        return set()
    if len(parts) < 3:
        return None
    init = (ROOT / "/".join(parts[:2]) / "__init__.py").read_text(encoding="utf-8")
    return {name.split(".")[-1] for name in imports(init, ".".join(parts[:2]), is_package=True)}


RULES = {
    "arrows": lambda s, m, p: wrong_arrows(s, m, p),
    "randomness": lambda s, m, p: global_randomness(s, m),
    "pickles": lambda s, m, p: unsafe_reading(s, m),
    "asserts": lambda s, m, p: asserts(s, m),
    "in-place names": lambda s, m, p: hidden_mutation(s, m),
    "docstrings": lambda s, m, p: docstring_faults(s, m, exported_by_folder(m)),
    "declared imports": lambda s, m, p: undeclared(s, m, declared_imports()),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps(rule):
    faults = []
    for path in package_files():
        source = path.read_text(encoding="utf-8")
        faults += RULES[rule](source, module_name(path), path.name == "__init__.py")
    assert not faults, "\n".join(faults)


def test_lines_of_code_are_counted_without_comments_and_docstrings():
    source = '"""Two\nlines."""\n\n# why\ndef f():\n    """One."""\n    return """no\n    doc"""\n'
    assert lines_of_code(source) == 3


def test_the_package_stays_under_its_line_budget():
    sources = {p.relative_to(ROOT): p.read_text("utf-8") for p in package_files()}
    code = {str(p): lines_of_code(source) for p, source in sources.items()}
    assert code["coursekit/__init__.py"] > 0
    assert sum(code.values()) < BUDGET, f"{sum(code.values())} lines of code in {len(code)} files"
    whole = {str(p): len(source.splitlines()) for p, source in sources.items()}
    assert not {p: n for p, n in whole.items() if n > 450}, "look for the second room inside"


@pytest.mark.parametrize("module", ["coursekit", "coursekit.autodiff"])
def test_importing_it_loads_nothing_heavy(module):
    heavy = {"torch", "sklearn", "matplotlib", "IPython", "jaxtyping", "scipy", "pooch"}
    heavy |= {"numpy"} if module == "coursekit" else set()
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


# ---- the rules themselves, on planted faults ----


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("coursekit.train", "import tests.helpers", "nothing of its users"),
        ("coursekit.dropout", "from experiments.x import run", "nothing of its users"),
        ("coursekit.dropout", "from coursekit import bagging", "no room imports another"),
        ("coursekit.dropout", "from . import bagging", "no room imports another"),
        ("coursekit.dropout", "from .bagging import majority_vote", "no room imports another"),
        ("coursekit.parallelism.rules", "from .. import dcasgd", "no room imports another"),
        ("coursekit.train", "def f():\n    import coursekit.dropout", "no room imports another"),
        ("coursekit.dropout", "from coursekit import plot", "only pages draw"),
        ("coursekit.train", "from .widgets import frames", "only pages draw"),
        ("coursekit.autodiff", "import torch", "must stay light"),
        ("coursekit.autodiff.core", "from .._check import shape", "NumPy alone"),
    ],
)
def test_an_import_against_the_arrows_is_found(module, source, message):
    (fault,) = wrong_arrows(source, module)
    assert message in fault


def test_an_init_file_that_imports_torch_is_found():
    (fault,) = wrong_arrows("import torch.nn as nn", "coursekit", is_package=True)
    assert "must stay light" in fault


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("coursekit.dropout", "import torch\nfrom . import _check, train"),
        ("coursekit.dcasgd", "from .parallelism import rules"),
        ("coursekit.parallelism.simulate", "from . import rules\nfrom .rules import asgd"),
        ("coursekit.autodiff.core", "import numpy as np\nimport itertools\nfrom . import checks"),
        ("coursekit.widgets", "from . import plot"),
    ],
)
def test_an_import_along_the_arrows_is_let_through(module, source):
    assert not list(wrong_arrows(source, module))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.manual_seed(0)",
        "import torch\ntorch.cuda.manual_seed_all(0)",
        "import numpy as np\nnp.random.seed(0)",
        "import numpy\nx = numpy.random.randn(3)",
        "import numpy as np\nrng = np.random.default_rng()",
        "import random\nrandom.shuffle([1, 2])",
        "import torch\nx = torch.randn(3)",
        "x.normal_(0, 1)",
        "from torch import nn\nnn.init.uniform_(w)",
    ],
)
def test_a_call_that_touches_a_global_random_state_is_found(source):
    assert len(list(global_randomness(source, "m"))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nx = torch.randn(3, generator=g)",
        "import numpy as np\nrng = np.random.default_rng(0)\nrng.normal(size=3)",
        "import random\nr = random.Random(0)",
        "w.normal_(generator=g)",
    ],
)
def test_a_draw_from_a_generator_is_let_through(source):
    assert not list(global_randomness(source, "m"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_a_way_to_run_a_pickle_is_found(source):
    assert len(list(unsafe_reading(source, "m"))) == 1


def test_weights_alone_may_be_loaded():
    assert not list(unsafe_reading("torch.load(path, weights_only=True)", "m"))


def test_an_assert_on_input_is_found():
    assert list(asserts("def f(x):\n    assert x > 0\n", "m")) == [
        "m:2 assert instead of an exception with a message"
    ]


@pytest.mark.parametrize("body", ["x[0] = 1", "del x[0]", "x.mul_(2)"])
def test_a_function_that_changes_its_argument_must_end_with_an_underscore(body):
    assert len(list(hidden_mutation(f"def scale(x):\n    {body}\n", "m"))) == 1
    assert not list(hidden_mutation(f"def scale_(x):\n    {body}\n", "m"))
    assert not list(hidden_mutation(f"def scale(x):\n    x = x.clone()\n    {body}\n", "m"))


GOOD = '''
def scale(x, *, by):
    """Multiply by a number.

    Parameters
    ----------
    x : array of shape (n,)
    by : float

    Returns
    -------
    array of shape (n,)

    Raises
    ------
    ValueError
        If ``by`` is zero.
    """
    if by == 0:
        raise ValueError("scale: expected a number other than zero, got 0")
    return x * by
'''


def test_a_complete_docstring_is_let_through():
    assert not list(docstring_faults(GOOD, "m"))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("    Returns\n    -------\n    array of shape (n,)\n", "", "no Returns section"),
        ("    ValueError\n", "", "ValueError is raised and not named"),
        ("(x, *, by)", "(x, *, factor=2, by)", "factor is not described"),
        ("Multiply by a number.", "Multiply\n    by a number.", "one sentence"),
        (GOOD[GOOD.index('"""') : GOOD.rindex('"""') + 3], "pass", "no docstring"),
    ],
)
def test_a_docstring_that_lacks_something_is_found(before, after, message):
    assert before in GOOD
    (fault,) = docstring_faults(GOOD.replace(before, after), "m")
    assert message in fault


def test_three_parameters_need_a_section():
    (fault,) = docstring_faults('def f(a, b, c):\n    """Add."""\n', "m")
    assert "no Parameters section" in fault
    assert not list(docstring_faults('def f(a, b):\n    """Add."""\n', "m"))


def test_only_what_a_folder_hands_on_needs_a_docstring():
    assert not list(docstring_faults("def helper(): pass", "m", exported={"grad"}))
    assert len(list(docstring_faults("def grad(): pass", "m", exported={"grad"}))) == 1


def test_an_undeclared_dependency_is_found():
    assert list(undeclared("import numpy\nimport pandas", "m", {"numpy"})) == [
        "m imports pandas, which pyproject.toml does not name"
    ]


# ---- the test set-up itself ----


def test_shapes_are_enforced_in_tests_and_can_be_let_go(unchecked_shapes):
    import jaxtyping
    import torch
    from beartype import beartype

    @jaxtyping.jaxtyped(typechecker=beartype)
    def rows(x: jaxtyping.Float[torch.Tensor, "rows columns"]):
        return len(x)

    assert rows(torch.zeros(3)) == 3
    jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(jaxtyping.TypeCheckError):
        rows(torch.zeros(3))


def test_every_module_with_shapes_was_imported_through_the_hook():
    import importlib

    for path in package_files():
        if "jaxtyping" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(module_name(path))
        assert type(module.__loader__).__module__.startswith("jaxtyping"), module.__name__
