"""What the API reference adds to signatures: nbdev's way to document parameters, for griffe.

A comment behind a parameter describes it, one behind the closing parenthesis describes the result,
and one behind a class's field describes the field. A function with `@patch` is a method of the
class of its first parameter.
"""

import ast
import io
import tokenize
from functools import lru_cache
from pathlib import Path

from griffe import Docstring, Extension


@lru_cache
def comments(path: Path) -> dict[int, str]:
    "The comments of a file by their line, without those that begin a line."
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
    }


def argument_comments(node: ast.FunctionDef, notes: dict[int, str]) -> dict[str, str]:
    "The comment of each parameter that has one; of several in a line it is the last one's."
    spec = node.args
    plain = [*spec.posonlyargs, *spec.args]
    ends = {a.arg: a.end_lineno for a in [*plain, *spec.kwonlyargs, spec.vararg, spec.kwarg] if a}
    with_default = [*plain[len(plain) - len(spec.defaults) :], *spec.kwonlyargs]
    for a, default in zip(with_default, [*spec.defaults, *spec.kw_defaults]):
        ends[a.arg] = default.end_lineno if default else ends[a.arg]
    last = {line: name for name, line in ends.items()}
    return {name: notes[line] for line, name in last.items() if line in notes}


def documented(text: str, lineno: int, of) -> Docstring:
    "A docstring of griffe's; a parameter without a type, such as `**about`, is no mistake."
    options = {"warn_missing_types": False}
    return Docstring(text, lineno=lineno, parser="google", parser_options=options, parent=of)


class Docments(Extension):
    "Comments as documentation, and patched functions as methods."

    def __init__(self):
        self.patched = []

    def on_function_instance(self, *, node, func, agent, **kwargs):
        "Append the comments to the docstring, as sections that griffe reads."
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        notes = comments(func.filepath)
        first = node.body[0].lineno
        text = func.docstring.value if func.docstring else ""
        result = notes.get(node.returns.end_lineno) if node.returns else None
        arguments = argument_comments(node, notes)
        if result and node.returns.end_lineno in {a.end_lineno for a in node.args.args}:
            arguments = {k: v for k, v in arguments.items() if v != result}  # all on one line
        if arguments:
            text += "\n\nArgs:\n" + "\n".join(f"    {k}: {v}" for k, v in arguments.items())
        if result:
            text += f"\n\nReturns:\n    {result}"
        if text:
            func.docstring = documented(text.strip(), first, func)
        if any(ast.unparse(d).split("(")[0] == "patch" for d in node.decorator_list):
            self.patched.append(func)

    def on_attribute_instance(self, *, node, attr, agent, **kwargs):
        "A comment behind a field or constant is its docstring."
        if not attr.docstring and (note := comments(attr.filepath).get(node.end_lineno)):
            attr.docstring = documented(note, node.lineno, attr)

    def on_package(self, *, pkg, loader, **kwargs):
        "Move each patched function into its class."
        for func in self.patched:
            module, owner = func.parent, func.parameters[0].annotation
            if module.members.get(func.name) is func:
                del module.members[func.name]
            cls = module[str(owner)]
            (cls.final_target if cls.is_alias else cls).set_member(func.name, func)
