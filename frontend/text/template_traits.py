"""What a chat template expects of the messages that it is given, read from its syntax tree."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import nodes

from frontend.text.template_environment import parse_template


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """Templates differ in the forms that they understand.

    Attributes:
        takes_parts: it goes through a message's content as a list of parts.
        takes_text: it takes a content that is one text.
        takes_argument_text: it writes the arguments of earlier calls as they are, so that they must be text.
        knows_developer: it has a role "developer".
        knows_calls: it shows the calls of earlier turns.
        knows_results: it has a role "tool".
    """

    takes_parts: bool
    takes_text: bool
    takes_argument_text: bool
    knows_developer: bool
    knows_calls: bool
    knows_results: bool

    @classmethod
    def read(cls, source: str) -> TemplateTraits:
        """Reads a template's traits without running it.

        Raises:
            jinja2.TemplateError: it has an error.
        """
        tree = parse_template(source)
        contents = _names_of(tree, "content")
        takes_parts = any(_is_field(loop.iter, "content", contents) for loop in tree.find_all(nodes.For))
        asks_for_text = any(
            test.name == "string" and _is_field(test.node, "content", contents)
            for test in tree.find_all(nodes.Test)
        )
        return cls(
            takes_parts=takes_parts,
            takes_text=asks_for_text or not takes_parts,
            takes_argument_text=_writes_arguments_as_they_are(tree),
            knows_developer="developer" in source,
            knows_calls="tool_calls" in source,
            knows_results="tool_calls" in source
            or any(constant.value == "tool" for constant in tree.find_all(nodes.Const)),
        )


def _names_of(tree: nodes.Template, field: str) -> frozenset[str]:
    """Variables that the template sets to a field of something."""
    return frozenset(
        assignment.target.name
        for assignment in tree.find_all(nodes.Assign)
        if isinstance(assignment.target, nodes.Name) and _is_field(assignment.node, field, frozenset())
    )


def _is_field(node: nodes.Node, field: str, names: frozenset[str]) -> bool:
    """Whether an expression is a field of something, or a variable that holds it, perhaps sliced or filtered
    as a list."""
    if isinstance(node, nodes.Filter) and node.node is not None and node.name in ("list", "selectattr"):
        return _is_field(node.node, field, names)
    if isinstance(node, nodes.Getattr):
        return node.attr == field
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            return _is_field(node.node, field, names)
        return isinstance(node.arg, nodes.Const) and node.arg.value == field
    return isinstance(node, nodes.Name) and node.name in names


def _writes_arguments_as_they_are(tree: nodes.Template) -> bool:
    """Whether arguments are joined to text, and nowhere treated as an object."""
    names = _names_of(tree, "arguments")

    def has_arguments(parts: list[nodes.Expr]) -> bool:
        return any(_is_field(part, "arguments", names) for part in parts)

    filtered = [each.node for each in tree.find_all(nodes.Filter) if each.node is not None]
    tested = [each.node for each in tree.find_all(nodes.Test)]
    if has_arguments(filtered) or has_arguments(tested):
        return False
    joined = [part for each in tree.find_all(nodes.Concat) for part in each.nodes]
    joined += [part for each in tree.find_all(nodes.Add) for part in (each.left, each.right)]
    return has_arguments(joined)
