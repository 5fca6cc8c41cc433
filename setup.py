"""What pyproject.toml cannot say: a wheel for every Python, and a description whose links do not need this checkout.

The C kernel is a plain library, loaded with ctypes, and knows nothing of Python. `release/build.sh` sets
SM3_DIST_WHEEL: "any-python" names the library and the wheel for the platform alone, "pure" leaves the library out.
"""

import ctypes
import os
import re
import runpy
import shutil
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError as error:  # one that came with Python 3.11 or before, where nobody isolates the build
    raise ImportError("setuptools is too old. Install another: pip install 'setuptools>=77'") from error

WHEEL = os.environ.get("SM3_DIST_WHEEL")
SOURCES = runpy.run_path("sm3_dist/compiled/sources.py")


class AnyPython(bdist_wheel):
    """Tags the wheel for its platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


def is_current(library: Path) -> bool:
    """Whether there is a library that was made from the sources that lie here."""
    try:
        return SOURCES["is_current"](ctypes.CDLL(str(library.resolve())))
    except OSError:
        return False


class Library(build_ext):
    """Tells the library from which sources it is made.

    One that was made from others is made anew, whatever the times of the files: copies keep those of their originals.
    """

    def build_extension(self, ext: Extension) -> None:
        """Compile."""
        ext.define_macros.append(("SM3_SOURCES", str(SOURCES["checksum"]())))
        self.force = self.force or not is_current(Path(self.get_ext_fullpath(ext.name)))
        super().build_extension(ext)


class KeptLibrary(Library):
    """Leaves the library in the checkout, whose tests and commands import it from there however it was installed.

    An editable install compiles only if sources or options have changed since: pip begins anew with each install.
    """

    def build_extension(self, ext: Extension) -> None:
        """Compile, or take what lies in the checkout."""
        target = Path(self.get_ext_fullpath(ext.name))
        kept = Path(*ext.name.split(".")).with_name(target.name)
        is_new = is_current(kept) and kept.stat().st_mtime > os.path.getmtime("pyproject.toml")
        if self.editable_mode and is_new:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(kept, target)
        else:
            super().build_extension(ext)
            kept.unlink(missing_ok=True)  # a process that has loaded it keeps the old one
            shutil.copy2(target, kept)


class PlainLibrary(Library):
    """Names the library for no Python, and does without it in no case."""

    def finalize_options(self) -> None:
        """A wheel that is given to others has the library."""
        super().finalize_options()
        for extension in self.extensions:
            extension.optional = False

    def get_ext_filename(self, fullname: str) -> str:
        """Return its path."""
        return os.path.join(*fullname.split(".")) + ".so"


class Pure(Distribution):
    """Has no library."""

    def has_ext_modules(self) -> bool:
        """Nothing is compiled, and the wheel is for every platform."""
        return False


def description() -> str:
    """README without what leads to files of this checkout: links become text, pictures go."""
    text = re.sub(r"^!\[.*?\]\((?!https?://).*?\)\n\n?", "", Path("README.md").read_text(), flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\((?!https?://|#)[^)]*\)", r"\1", text)


setup(
    cmdclass={"bdist_wheel": AnyPython, "build_ext": PlainLibrary}
    if WHEEL == "any-python"
    else {"build_ext": KeptLibrary},
    distclass=Pure if WHEEL == "pure" else Distribution,
    long_description=description(),
    long_description_content_type="text/markdown",
)
