"""Random C programs and random edits of them, for tests of the differ against the truth of symbols.

A program is data and functions that use it; an edit changes, adds, removes or moves some of either. Every
program compiles; none is meant to be run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random


@dataclass(frozen=True)
class Variable:
    """``kind`` decides declaration and use; ``value`` what it holds."""

    name: str
    kind: str
    value: tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """Statements are (how, what it names, a number)."""

    name: str
    statements: tuple[tuple[str, str, int], ...]
    is_static: bool


@dataclass(frozen=True)
class Program:
    variables: tuple[Variable, ...]
    functions: tuple[Function, ...]
    counter: int = field(default=0, compare=False)  # for names that were never used before

    def text(self) -> str:
        """The C source."""
        parts = [
            "#include <stdio.h>\n#include <string.h>\n#include <stdlib.h>\n"
            "#define N __attribute__((noinline,noclone,noipa))\n"
        ]
        parts += [_declaration(v) for v in self.variables]
        parts += [f"{_head(f)};\n" for f in self.functions]
        kinds = {v.name: v for v in self.variables}
        parts += [f"{_head(f)} {{\n{_body(f, kinds)}  return x;\n}}\n" for f in self.functions]
        calls = "".join(f"  n += {f.name}(n);\n" for f in self.functions if not f.is_static or f.statements)
        return "".join([*parts, f"int main(int n, char **v) {{\n{calls}  return n;\n}}\n"])


KINDS = (
    "int bss", "int data", "array bss", "array data", "buffer", "struct", "global",
    "const ints", "const doubles", "const strings", "strings", "const bytes", "thread-free pointer", "callbacks",
)  # fmt: skip
SIZE = {"array bss": 12, "buffer": 40}


def _declaration(v: Variable) -> str:
    numbers = ",".join(map(str, v.value))
    strings = ",".join(f'"{v.name} {n} text"' for n in v.value)
    return {
        "int bss": f"static int {v.name};\n",
        "int data": f"static int {v.name} = {v.value[0]};\n",
        "global": f"int {v.name} = {v.value[0]};\n",
        "array bss": f"static long {v.name}[{len(v.value) + 1}];\n",
        "array data": f"static int {v.name}[] = {{{numbers}}};\n",
        "buffer": f"static char {v.name}[{8 * len(v.value) + 4}];\n",
        "struct": f"static struct {{ int a; long b; char c[{len(v.value)}]; }} {v.name};\n",
        "const ints": f"static const int {v.name}[] = {{{numbers}}};\n",
        "const doubles": f"static const double {v.name}[] = {{{numbers}}};\n",
        "const bytes": f"static const unsigned char {v.name}[] = {{{','.join(str(n & 255) for n in v.value)}}};\n",
        "const strings": f"static const char *const {v.name}[] = {{{strings}}};\n",
        "strings": f"static const char *{v.name}[] = {{{strings}}};\n",
        "thread-free pointer": f"static char *{v.name};\n",
        "callbacks": f"static void (*{v.name}[{len(v.value)}])(int);\n",
    }[v.kind]


def _head(f: Function) -> str:
    return f"{'static ' if f.is_static else ''}N int {f.name}(int x)"


def _body(f: Function, kinds: dict[str, Variable]) -> str:
    lines = []
    for how, name, number in f.statements:
        if how == "use":
            lines.append(_use(kinds[name], number))
        elif how == "call":
            lines.append(f"  x += {name}(x - {number});\n")
        elif how == "print":
            lines.append(f'  printf("{name} {number} %d\\n", x);\n')
        elif how == "switch":
            cases = "".join(
                f'    case {k}: x += {k * k + number}; puts("case {k} of {number}"); break;\n' for k in range(6)
            )
            lines.append(f"  switch (x) {{\n{cases}  }}\n")
        else:
            lines.append(f"  x = x * {number} + 1;\n")
    return "".join(lines)


def _use(v: Variable, number: int) -> str:
    k = number % len(v.value)
    if v.kind in ("int bss", "int data", "global"):
        return f"  {v.name} += x * {number};\n" if number % 2 else f"  if ({v.name} > {number}) x++;\n"
    if v.kind in ("array bss", "array data"):
        return (
            f"  {v.name}[{k}] += x;\n" if number % 3 == 0
            else f"  {v.name}[x & 1] ^= {number};\n" if number % 3 == 1
            else f"  for (__typeof__({v.name}[0]) *p = {v.name}; p != {v.name} + {len(v.value)}; p++) x += *p;\n"
        )  # fmt: skip
    if v.kind == "buffer":
        return f'  snprintf({v.name}, sizeof {v.name}, "%d", x);\n' if number % 2 else f"  x += {v.name}[{k}];\n"
    if v.kind == "struct":
        return f"  {v.name}.b += x; {v.name}.c[0] = {number & 63};\n" if number % 2 else f"  x += {v.name}.a;\n"
    if v.kind in ("const ints", "const doubles", "const bytes"):
        return (
            f"  x += {v.name}[x & 1];\n" if number % 2
            else f"  for (const __typeof__({v.name}[0]) *p = {v.name}; p != {v.name} + {len(v.value)}; p++)"
            " x += *p * x;\n"
        )  # fmt: skip
    if v.kind in ("const strings", "strings"):
        return f"  puts({v.name}[x & 1]);\n"
    if v.kind == "callbacks":
        return f"  {v.name}[x & 1](x);\n"
    return f"  if (!{v.name}) {v.name} = malloc({number});\n"


def random_program(random: Random, size: int) -> Program:
    """``size`` functions, and about as many variables."""
    program = Program((), ())
    for _ in range(size):
        program = _add_variable(program, random)
    for _ in range(size):
        program = _add_function(program, random)
    return program


def _add_variable(program: Program, random: Random) -> Program:
    value = tuple(random.randrange(1, 1000) for _ in range(random.randrange(2, 7)))
    fresh = Variable(f"v{program.counter}", random.choice(KINDS), value)
    at = random.randrange(len(program.variables) + 1)
    variables = (*program.variables[:at], fresh, *program.variables[at:])
    return replace(program, variables=variables, counter=program.counter + 1)


def _add_function(program: Program, random: Random) -> Program:
    statements = tuple(_statement(program, random) for _ in range(random.randrange(1, 8)))
    fresh = Function(f"f{program.counter}", statements, random.random() < 0.5)
    at = random.randrange(len(program.functions) + 1)
    functions = (*program.functions[:at], fresh, *program.functions[at:])
    return replace(program, functions=functions, counter=program.counter + 1)


def _statement(program: Program, random: Random) -> tuple[str, str, int]:
    number = random.randrange(1, 500)
    how = random.choice(("use", "use", "use", "call", "print", "number", "switch" if random.random() < 0.3 else "use"))
    if how == "call" and program.functions:
        return how, random.choice(program.functions).name, number
    if how == "use":
        return how, random.choice(program.variables).name, number
    return (
        ("print", f"text{number % 7}", number) if how == "print" else (how if how != "call" else "number", "", number)
    )


def _edit_function(program: Program, random: Random, change: Callable[[Function], Function]) -> Program:
    at = random.randrange(len(program.functions))
    functions = list(program.functions)
    functions[at] = change(functions[at])
    return replace(program, functions=tuple(functions))


def edit_number(program: Program, random: Random) -> Program:
    def change(f: Function) -> Function:
        at = random.randrange(len(f.statements))
        how, name, number = f.statements[at]
        return replace(f, statements=(*f.statements[:at], (how, name, number + 2), *f.statements[at + 1 :]))

    return _edit_function(program, random, change)


def add_statement(program: Program, random: Random) -> Program:
    def change(f: Function) -> Function:
        at = random.randrange(len(f.statements) + 1)
        return replace(f, statements=(*f.statements[:at], _statement(program, random), *f.statements[at:]))

    return _edit_function(program, random, change)


def remove_statement(program: Program, random: Random) -> Program:
    def change(f: Function) -> Function:
        at = random.randrange(len(f.statements))
        left = (*f.statements[:at], *f.statements[at + 1 :])
        return replace(f, statements=left or (("number", "", 77),))

    return _edit_function(program, random, change)


def use_new_variable(program: Program, random: Random) -> Program:
    program = _add_variable(program, random)
    fresh = f"v{program.counter - 1}"

    def change(f: Function) -> Function:
        return replace(f, statements=(*f.statements, ("use", fresh, random.randrange(1, 500))))

    for _ in range(random.randrange(1, 3)):
        program = _edit_function(program, random, change)
    return program


def swap_variable(program: Program, random: Random) -> Program:
    """A function uses another variable of the same kind instead: often the same bytes."""

    def change(f: Function) -> Function:
        statements = list(f.statements)
        for at, (how, name, number) in enumerate(statements):
            if how == "use":
                kind = next(v for v in program.variables if v.name == name)
                others = [v.name for v in program.variables if v.kind == kind.kind and len(v.value) == len(kind.value)]
                statements[at] = (how, random.choice(others), number)
        return replace(f, statements=tuple(statements))

    return _edit_function(program, random, change)


def swap_callee(program: Program, random: Random) -> Program:
    def change(f: Function) -> Function:
        statements = [
            (how, random.choice(program.functions).name if how == "call" else name, number)
            for how, name, number in f.statements
        ]
        return replace(f, statements=tuple(statements))

    return _edit_function(program, random, change)


def edit_constant(program: Program, random: Random) -> Program:
    constants = [k for k, v in enumerate(program.variables) if v.kind.startswith("const")]
    if not constants:
        return program
    at = random.choice(constants)
    variables = list(program.variables)
    value = list(variables[at].value)
    value[random.randrange(len(value))] += 1
    variables[at] = replace(variables[at], value=tuple(value))
    return replace(program, variables=tuple(variables))


def add_function(program: Program, random: Random) -> Program:
    program = _add_function(program, random)
    fresh = f"f{program.counter - 1}"

    def change(f: Function) -> Function:
        return replace(f, statements=(*f.statements, ("call", fresh, random.randrange(1, 500))))

    return _edit_function(program, random, change)


def move_functions(program: Program, random: Random) -> Program:
    functions = list(program.functions)
    random.shuffle(functions)
    return replace(program, functions=tuple(functions))


def move_variables(program: Program, random: Random) -> Program:
    variables = list(program.variables)
    random.shuffle(variables)
    return replace(program, variables=tuple(variables))


EDITS = (
    edit_number, add_statement, remove_statement, use_new_variable, swap_variable, swap_callee, edit_constant,
    add_function, move_functions, move_variables,
)  # fmt: skip


def random_edit(program: Program, random: Random, number: int) -> tuple[Program, list[str]]:
    """``number`` edits, and their names."""
    chosen = [random.choice(EDITS) for _ in range(number)]
    for edit in chosen:
        program = edit(program, random)
    return program, [edit.__name__ for edit in chosen]
