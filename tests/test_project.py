"""Promises of the package as a whole."""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from against_eager import needs_c
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sm3_dist
from sm3_dist.compiled.library import COMPILE, library

ROOT = Path(sm3_dist.__file__).parent.parent

IMPORT_EVERY_MODULE = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed where only torch is", name=name)

sys.meta_path.insert(0, Refuse())
import sm3_dist
for module in pkgutil.walk_packages(sm3_dist.__path__, "sm3_dist."):
    of_triton = module.name.startswith("sm3_dist.kernels.triton.") and not module.name.endswith("availability")
    # _cpu is a library for ctypes, not a module; what is written in Triton is imported where Triton is there.
    if not (of_triton or module.name.endswith(("__main__", "kernels.c._cpu"))):
        importlib.import_module(module.name)
        print(module.name)
"""


def required_by(distribution):
    """The names of a distribution and of all that it requires, without extras."""
    found, pending = set(), [distribution]
    while pending:
        name = canonicalize_name(pending.pop())
        if name not in found:
            found.add(name)
            requirements = [Requirement(text) for text in requires(name) or []]
            pending += [each.name for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})]
    return found


def owners_of_packages():
    """The names of the distributions that each package came with; Python 3.10 itself knows those of a few."""
    owners = defaultdict(set)
    for distribution in distributions():
        for file in distribution.files or []:
            if file.suffix == ".py":
                owners[file.parts[0].removesuffix(".py")].add(canonicalize_name(distribution.metadata["Name"]))
    return owners


def test_every_module_is_imported_where_only_torch_is_installed():
    allowed = {"sm3-dist", *required_by("torch")}
    forbidden = {package for package, owners in owners_of_packages().items() if not allowed & owners}
    assert {"numpy", "pytest"} <= forbidden
    code = IMPORT_EVERY_MODULE.format(forbidden=forbidden)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "sm3_dist.optimizer" in result.stdout.splitlines()


def test_every_header_of_the_kernel_compiles_it_anew():
    headers = [path.name for path in (ROOT / "sm3_dist" / "kernels" / "c").glob("*.h")]
    listed = (ROOT / "pyproject.toml").read_text()
    assert headers
    assert [name for name in headers if f'"sm3_dist/kernels/c/{name}"' not in listed] == []


@needs_c
@pytest.mark.skipif(
    not shutil.which("objdump") or not sys.platform.startswith("linux"),
    reason="objdump lists a Linux library's symbols",
)
def test_a_release_ties_the_kernel_to_no_new_c_library():
    """What this machine's C library has in a newer version than manylinux_2_17 has is named in ``old_glibc.h``."""
    listed = subprocess.run(["objdump", "-T", library()._name], capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"\(?GLIBC_2\.([0-9]+)[0-9.]*\)? +(\w+)$", listed, flags=re.MULTILINE)
    new = {name for version, name in symbols if int(version) > 17}
    named = re.findall(r"\.symver (\w+),", (ROOT / "release" / "old_glibc.h").read_text())
    assert {"memcpy", "pthread_create"} <= {name for _, name in symbols}
    assert new <= set(named)


def test_the_command_that_compiles_the_kernel_takes_no_wheel():
    """Neither the one for every platform, nor the one that pip made and kept when there was no compiler."""
    assert {"--no-binary", "--no-cache-dir", "--force-reinstall"} <= set(COMPILE.split())
    assert COMPILE in " ".join((ROOT / "docs" / "faq.md").read_text().split())


def test_an_old_setuptools_is_an_error_that_says_what_to_do():
    code = "import sys, runpy; sys.modules['setuptools.command.bdist_wheel'] = None; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.endswith("ImportError: setuptools is too old. Install another: pip install 'setuptools>=77'\n")


@needs_c
@pytest.mark.parametrize("change", [None, "sources", "options"])
def test_an_editable_install_compiles_what_has_changed_alone(tmp_path, change):
    """Whatever the times of the sources: those of another checkout, copied over, may be older than the library here."""
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "sm3_dist/__init__.py", "sm3_dist/kernels/c")
    for name in (*names, "sm3_dist/compiled"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    sources = sorted((tmp_path / "sm3_dist" / "kernels" / "c").glob("*.[ch]"))
    if change == "sources":
        sources[0].write_text(sources[0].read_text() + "/* Changed. */")
    for path in (*sources, tmp_path / "pyproject.toml"):
        os.utime(path, (0, 0))
    if change == "options":
        (tmp_path / "pyproject.toml").touch()
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\ntouch called\nexit 1\n")
    compiler.chmod(0o755)
    code = "from setuptools.build_meta import build_editable; build_editable('.')"
    environment = os.environ | {"CC": str(compiler)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "called").exists() == (change is not None)


def test_no_source_is_longer_than_400_lines():
    folders = [ROOT / folder for folder in ("sm3_dist", "launch", "tests", "docs")]
    sources = [path for folder in folders for kind in ("py", "c", "h") for path in folder.rglob(f"*.{kind}")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_documents_name_files_that_are_there():
    """Paths in the running text, in commands and in links."""
    missing, seen = [], 0
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        text = document.read_text()
        links = [document.parent / link for link in re.findall(r"\]\((?!\w+:)([^)#]+)", text)]
        paths = [ROOT / path for path in re.findall(r"(?<![\w./-])(?:sm3_dist|launch|tests|docs)/[\w./-]*\w", text)]
        seen += len(links) + len(paths)
        missing += [f"{document.name}: {path}" for path in [*links, *paths] if not path.exists()]
    assert seen > 50
    assert missing == []
