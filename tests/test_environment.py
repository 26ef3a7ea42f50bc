"""One set of versions and one address: the files that state them agree, and the guards hold."""

import importlib.metadata
import re
import socket
import subprocess
import sys
import zipfile

import pytest
import tomllib
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import coursekit

CONDA_NAMES = {"pytorch-cpu": "torch"}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def pyproject():
    return tomllib.loads(read("pyproject.toml"))


def ranges(*groups):
    """Requirements of the package itself ("dependencies") and of the named extras."""
    project = pyproject()["project"]
    for group in groups:
        extra = project["optional-dependencies"].get(group)
        lines = project["dependencies"] if group == "dependencies" else extra
        for requirement in map(Requirement, lines):
            if requirement.name == "coursekit":
                yield from ranges(*requirement.extras)
            else:
                yield requirement


def lock():
    """Version of each distribution in requirements.lock, by canonical name."""
    lines = [line for line in read("requirements.lock").splitlines() if line and line[0] != "#"]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pairs}


def conda():
    """Requirements in environment.yml, under the names that pip knows them by."""
    lines = [d for d in yaml.safe_load(read("environment.yml"))["dependencies"] if d != "pip"]
    for line in (d for d in lines if isinstance(d, str)):
        requirement = Requirement(re.sub(r"(?<=[\w])=(?=\d)", "==", line))
        requirement.name = CONDA_NAMES.get(requirement.name, requirement.name)
        yield requirement


def tracked():
    """Names of the files under version control, without those that are not text."""
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    binary = (".gz", ".png", ".webp", ".woff", ".ico")
    return [n for n in out.stdout.splitlines() if not n.endswith(binary) and (ROOT / n).is_file()]


# ---- versions ----


def test_every_line_of_the_lock_is_an_exact_pin_and_stands_once():
    lines = read("requirements.lock").splitlines()
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert len(lock()) == len(lines) > 100


def test_the_lock_satisfies_every_range_of_the_package_and_its_extras():
    build = map(Requirement, pyproject()["build-system"]["requires"])
    wanted = [*build, *ranges("dependencies", "book", "data", "instructor", "test")]
    assert len(wanted) > 25
    for requirement in wanted:
        version = lock().get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in the lock"
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_the_lock_names_everything_that_its_entries_need():
    missing = set()
    for name in lock():
        if name == "torch":  # its GPU build pins the GPU libraries itself
            continue
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            needed = not requirement.marker or requirement.marker.evaluate({"extra": ""})
            if needed and canonicalize_name(requirement.name) not in lock():
                missing.add(f"{requirement.name}, needed by {name}")
    assert not missing


def test_what_is_installed_is_what_the_lock_says():
    differ = {}
    for name, version in lock().items():
        installed = importlib.metadata.version(name)
        if Version(installed).public != version:
            differ[name] = (installed, version)
    assert not differ, "remove .venv and run make again"


def test_the_ranges_let_an_installed_torch_and_numpy_stay():
    by_name = {r.name: r for r in ranges("dependencies")}
    assert by_name["torch"].specifier.contains("2.2.0")
    assert by_name["numpy"].specifier.contains("1.26.4")
    for requirement in by_name.values():
        assert {s.operator for s in requirement.specifier} == {">="}, requirement


def test_the_conda_environment_has_the_ranges_of_the_package():
    here = {r.name: str(r.specifier) for r in conda()}
    wanted = {r.name: str(r.specifier) for r in ranges("dependencies", "data")}
    wanted |= {r.name: str(r.specifier) for r in ranges("book") if r.name == "ipywidgets"}
    assert {name: here.get(name) for name in wanted} == wanted


def test_the_conda_environment_installs_this_checkout_with_a_cpu_build_of_torch():
    environment = yaml.safe_load(read("environment.yml"))
    assert "conda-forge" in environment["channels"]
    assert {"pip": ["-e ."]} in environment["dependencies"]
    assert any(str(d).startswith("pytorch-cpu") for d in environment["dependencies"])


def test_one_python_version_is_used_everywhere():
    (python,) = [str(r.specifier).strip("=") for r in conda() if r.name == "python"]
    in_workflows = set()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        in_workflows |= set(re.findall(r'python-version: "([\d.]+)"', path.read_text("utf-8")))
    assert in_workflows == {python} == {pyproject()["tool"]["mypy"]["python_version"]}
    minimum = pyproject()["project"]["requires-python"].removeprefix(">=")
    assert Version(minimum) <= Version(python)
    assert pyproject()["tool"]["ruff"]["target-version"] == "py" + minimum.replace(".", "")


def test_one_version_of_the_package_is_stated():
    version = pyproject()["project"]["version"]
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version == coursekit.__version__


# ---- address ----


def addresses(text, repository):
    """Owners under which a text names the repository, in any of its hosts' spellings."""
    pattern = (
        rf"(?:github\.com/|/gh/|/github/)([\w.-]+)/{repository}\b|([\w-]+)\.github\.io/{repository}"
    )
    return {a or b for a, b in re.findall(pattern, text)}


def test_every_file_that_names_the_repository_names_the_one_of_the_configuration():
    owner, repository = yaml.safe_load(read("_config.yml"))["repository"]["url"].split("/")[-2:]
    named = {name: addresses(read(name), repository) for name in tracked()}
    assert {name: owners for name, owners in named.items() if owners - {owner}} == {}
    for name in ("_config.yml", "CITATION.cff", "README.md"):
        assert named[name] == {owner}, name


def test_another_owner_would_be_noticed():
    links = [
        "https://github.com/me/the-book",
        "https://mybinder.org/v2/gh/me/the-book/main",
        "https://colab.research.google.com/github/me/the-book/blob/main/a.ipynb",
        "https://me.github.io/the-book/",
    ]
    assert [addresses(link, "the-book") for link in links] == [{"me"}] * 4
    assert addresses("https://github.com/me/the-bookshelf-of-mine", "the-books") == set()


# ---- distribution ----


def test_the_wheel_holds_every_file_of_the_package_and_the_licences(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {n for n in tracked_in_package() if n not in held} == set()
    licences = {name.split("licenses/")[1] for name in held if "licenses/" in name}
    assert "LICENSE" in licences
    assert len(licences) == 1 + len(list((ROOT / "coursekit/data/shipped").glob("*/LICENSE.txt")))
    assert not any("__pycache__" in name or name.startswith("tests") for name in held)


def tracked_in_package():
    """Files of the package under version control, data included."""
    command = ["git", "ls-files", "coursekit"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return out.stdout.splitlines()


# ---- guards of the test run ----


@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_no_test_reaches_another_machine_but_loopback_works():
    with pytest.raises(RuntimeError, match=r"socket\.connect\(\) with host \"192\.0\.2\.1\""):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_a_child_process_finds_no_way_out():
    code = "import urllib.request as u; u.urlopen('http://example.invalid', timeout=5)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "Connection refused" in run.stderr
