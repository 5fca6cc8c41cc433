"""The plan of the house, read from the imports: no circles, no wing that imports one above it, maths without ranks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sm3_dist

ROOT = Path(sm3_dist.__file__).parent.parent
FLOORS = ("compat", "compiled", "layout", "maths", "ranks", "step", "kernels", "optimizer", "checkpoint", "matrices")
FLOORS += ("planner",)
"""From below; what is named nowhere here is on top of all. Three of them are files: what PyTorch's
releases differ in, the optimizer, which checkpoints are of, and which tensors are matrices."""


class WithoutTypes(ast.NodeTransformer):
    """Leaves out what only a type checker reads."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


class House:
    """The modules below a folder by their dotted names, and what each imports of the others, at any place in it."""

    def __init__(self, root: Path, *packages: str) -> None:
        paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
        self.paths = {self.name_of(path.relative_to(root)): path for path in paths}
        self.outside: dict[str, set[str]] = {}
        """What each module imports from elsewhere, other than for a type checker."""
        self.inside: dict[str, set[str]] = {}
        """The modules of the house that each imports."""
        for name, path in self.paths.items():
            tree = ast.parse(path.read_text())
            imported = set(self.imports(name, tree))
            self.inside[name] = {each for each in imported if each in self.paths and each != name}
            self.outside[name] = set(self.imports(name, WithoutTypes().visit(tree))) - self.inside[name]

    @staticmethod
    def name_of(path: Path) -> str:
        return ".".join(path.with_suffix("").parts).removesuffix(".__init__")

    def imports(self, module: str, tree: ast.AST) -> Iterator[str]:
        """What is imported: a module where ``from package import module`` names one, else the one that has the name."""
        package = module if self.paths[module].stem == "__init__" else module.rpartition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*above, *(node.module or "").split(".")]).strip(".")
                for alias in node.names:
                    within = f"{source}.{alias.name}"
                    yield within if within in self.paths or source not in self.paths else source

    def circles(self) -> list[list[str]]:
        """Of each knot of modules that import one another one way around."""
        found, done = [], set()

        def walk(name: str, way: list[str]) -> None:
            if name in way:
                found.append([*way[way.index(name) :], name])
            elif name not in done:
                for each in sorted(self.inside[name]):
                    walk(each, [*way, name])
                done.add(name)

        for name in self.paths:
            walk(name, [])
        return found

    def looking_up(self) -> list[str]:
        """Imports from a wing above the one that has them."""
        return [
            f"{name} imports {each}"
            for name, imported in self.inside.items()
            for each in sorted(imported)
            if floor(each) > floor(name)
        ]

    def distributed_maths(self) -> list[str]:
        """What would speak of ranks in the maths, or in what it imports from the house."""
        pending, seen = [name for name in self.paths if floor(name) == FLOORS.index("maths")], set()
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending += self.inside[name]
        return [f"{name} imports {each}" for name in sorted(seen) for each in sorted(self.outside[name]) if ranks(each)]


def floor(module: str) -> int:
    """The number of a module's floor, from below."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    return FLOORS.index(name) if package == "sm3_dist" and name in FLOORS else len(FLOORS)


def ranks(module: str) -> bool:
    return module.startswith("torch.distributed") or module.split(".")[0] == "fairscale"


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT, "sm3_dist", "launch")


def test_no_modules_import_one_another(house: House) -> None:
    assert house.circles() == []


def test_no_wing_imports_one_above_it(house: House) -> None:
    assert house.looking_up() == []


def test_the_maths_knows_nothing_of_ranks(house: House) -> None:
    assert house.distributed_maths() == []


def test_every_folder_of_the_package_is_a_wing() -> None:
    folders = {path.parent.name for path in (ROOT / "sm3_dist").glob("*/__init__.py")}
    assert folders == set(FLOORS) - {"compat", "optimizer", "matrices"}


FAULTS = {
    "circle": ("step/a.py", "def later():\n    from sm3_dist.step import b", "step/b.py", "import sm3_dist.step.a"),
    "circle through a package": ("step/__init__.py", "from .a import x", "step/a.py", "from . import x"),
    "looks up": ("layout/a.py", "from sm3_dist.ranks.b import x", "ranks/b.py", "x = 1"),
    "looks up to the top": ("planner/a.py", "from sm3_dist import SM3", "__init__.py", "SM3 = 1"),
    "distributed": ("maths/a.py", "import torch.distributed as dist", "maths/b.py", "import torch"),
    "distributed below": ("maths/a.py", "from ..layout import b", "layout/b.py", "from torch import distributed"),
}


@pytest.mark.parametrize(("fault", "files"), FAULTS.items(), ids=FAULTS)
def test_each_fault_is_found(tmp_path: Path, fault: str, files: tuple[str, str, str, str]) -> None:
    for name, text in zip(files[::2], files[1::2], strict=True):
        path = tmp_path / "sm3_dist" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    house = House(tmp_path, "sm3_dist")
    found = {"circle": house.circles(), "looks": house.looking_up(), "distributed": house.distributed_maths()}
    assert {kind: len(some) for kind, some in found.items()} == {kind: fault.split()[0] == kind for kind in found}
