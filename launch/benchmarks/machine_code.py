"""Machine code of a function for x86-64 as objdump prints it: instructions, loops, and the ways through these."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LINE = re.compile(r"^ +([0-9a-f]+):\s+(?:(?:bnd|notrack|lock|rep\w*) )*(\w\S*) *([^#<\n]*)", re.MULTILINE)
OPERAND = re.compile(r"(?:[^,()\s]|\([^)]*\))+")
LANES = {"x": 4, "y": 8, "z": 16}
NO_ACCESS = ("lea", "nop", "prefetch", "j", "call")
"""Names of instructions that may have an address among their operands, and neither read nor write there."""

Weight = tuple[int, int, int]
"""What is added up along a way. The first number counts, the others if it is the same."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: without prefixes.
        operands: as AT&T's notation has them: the one that is written stands last.
    """

    name: str
    operands: tuple[str, ...]

    @property
    def is_vector(self) -> bool:
        """Whether it works on vectors, or on masks of them."""
        return self.name[0] in "vk"

    @property
    def is_move(self) -> bool:
        """Whether it takes a vector or a mask from one place to another as it is."""
        return self.name.startswith(("vmov", "kmov"))

    @property
    def roots(self) -> int:
        """How many square roots in float32 it takes."""
        return LANES[self.operands[-1][1]] if self.name == "vsqrtps" else 0

    @property
    def loads(self) -> bool:
        """Whether it reads memory."""
        reads_last = not self.is_vector and not self.name.startswith(("mov", "set"))
        return any("(" in operand for operand in self._accessed[: None if reads_last else -1])

    @property
    def stores(self) -> bool:
        """Whether it writes memory."""
        return any("(" in operand for operand in self._accessed[-1:]) and not self.name.startswith(("cmp", "test"))

    @property
    def is_local(self) -> bool:
        """Whether it has to do with the stack, or with constants."""
        return any("(%rsp" in operand or "(%rip" in operand for operand in self.operands)

    @property
    def jumps_to(self) -> int | None:
        """An address."""
        found = re.match("[0-9a-f]+$", self.operands[0]) if self.name[0] == "j" else None
        return int(found[0], 16) if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next one may follow."""
        return self.name not in ("jmp", "ret", "ud2", "hlt")

    @property
    def _accessed(self) -> tuple[str, ...]:
        return () if self.name.startswith(NO_ACCESS) else self.operands


@dataclass(frozen=True)
class Loop:
    """Instructions, by their numbers.

    Attributes:
        first: where each time around begins.
        body: all of them.
    """

    first: int
    body: frozenset[int]


class Function:
    """One function.

    Args:
        text: what objdump prints of it.

    Attributes:
        instructions: in the order in which they lie.
        next: the numbers of those that may follow each.
    """

    def __init__(self, text: str) -> None:
        lines = LINE.findall(text)
        numbers = {int(address, 16): number for number, (address, _, _) in enumerate(lines)}
        self.instructions = [Instruction(name, tuple(OPERAND.findall(operands))) for _, name, operands in lines]
        self.next: list[list[int]] = []
        for number, each in enumerate(self.instructions):
            following = [number + 1] if each.goes_on and number + 1 < len(lines) else []
            self.next.append(following + [numbers[to] for to in [each.jumps_to] if to in numbers])
        self._backwards, self._returns = self._explored()

    def innermost_loops(self) -> Iterator[Loop]:
        """Those that have no other in them."""
        before: list[list[int]] = [[] for _ in self.next]
        for number, following in enumerate(self.next):
            for each in following:
                before[each].append(number)
        bodies: dict[int, set[int]] = {}
        for last, first in self._returns:
            body, pending = bodies.setdefault(first, {first}), [last]
            while pending:
                number = pending.pop()
                if number not in body:
                    body.add(number)
                    pending += before[number]
        for first, body in bodies.items():
            if body & bodies.keys() == {first}:
                yield Loop(first, frozenset(body))

    def way(self, loop: Loop, weight: Callable[[Instruction], Weight]) -> list[Instruction]:
        """Of the ways once around an innermost loop the one with the most weight."""
        ways: dict[int, tuple[Weight, int]] = {}  # from each instruction: what comes together, and the next one
        for number in self._backwards:
            if number in loop.body:
                here = weight(self.instructions[number])
                ends = [((0, 0, 0), each) for each in self.next[number] if each == loop.first]
                most, following = max(ends + [(ways[each][0], each) for each in self.next[number] if each in ways])
                ways[number] = (here[0] + most[0], here[1] + most[1], here[2] + most[2]), following
        numbers = [loop.first]
        while ways[numbers[-1]][1] != loop.first:
            numbers.append(ways[numbers[-1]][1])
        return [self.instructions[number] for number in numbers]

    def _explored(self) -> tuple[list[int], list[tuple[int, int]]]:
        """All that may be reached, each one after those that follow it; and the steps that return to the way there."""
        done: list[int] = []
        returns: list[tuple[int, int]] = []
        is_on_the_way = {0: True}
        way = [(0, iter(self.next[0]))]
        while way:
            number, following = way[-1]
            for each in following:
                if each not in is_on_the_way:
                    is_on_the_way[each] = True
                    way.append((each, iter(self.next[each])))
                    break
                if is_on_the_way[each]:
                    returns.append((number, each))
            else:
                is_on_the_way[number] = False
                done.append(number)
                way.pop()
        return done, returns
