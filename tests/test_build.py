"""build.py counts the lines and tokens of the module, whole and by section, and holds them to their budgets."""

import ast
import collections
import os

import pytest

import build

BAR = "# " + "=" * 117
MODULE = f'''\
"""A module's docstring
of two lines."""

import os  # a comment is no token

{BAR}
# Store (12 lines, 40 tokens)
#
# What lives here.
{BAR}


class Store:
    """A class's docstring."""

    rows: int = setting(1, "Rows", "how many")

    def put(self):
        """A method's docstring."""

        def nested():
            """A nested function's docstring."""
            return f"{{self.rows!r:>{{4}}}} and {{f'{{os.name}}'}} of" "two parts"

        return nested


{BAR}
# Uplink
{BAR}


class Outer:
    class Inner:
        text: str = setting("", "Text", "not a docstring")

    "a string that is an attribute's, and no docstring"
'''


def tokens(source: str) -> int:
    return len(build.token_lines(source))


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("", 0),
        ("# only a comment\n\n", 0),
        ('"""only a docstring"""\n', 0),
        ("x = 1\n", 3),
        ("x = (\n    1,\n)  # layout is free, brackets and commas are not\n", 6),
        ('def f():\n    """docstring"""\n    # comment\n    return "text"\n', 7),
        ('async def f():\n    r"""docstring"""\n', 6),
        ('class A:\n    """docstring"""\n\n    def f(self):\n        """docstring"""\n', 9),
        ('x = 1\n"""a string that is not first"""\n', 4),
        ('x = """a text\nof two lines"""\n', 3),
        ("def f():\n    def g():\n        'docstring'\n        return 1\n", 12),
    ],
)
def test_comments_docstrings_and_layout_are_no_tokens(source, count):
    assert tokens(source) == count


@pytest.mark.parametrize(
    "text",
    [
        'f""',
        'f"plain"',
        'f"{a}"',
        'f"{a + b!r:>{width}} and {c[0]:,}"',
        "f\"{f'{a}' + g(f'{b}')} {{braces}}\"",
        'rf"""of\n{a}\nlines"""',
    ],
)
def test_an_f_string_is_one_token_on_every_python(text):
    assert tokens(f"x = {text}\n") == 3
    assert tokens(f"x = {text} {text}  # twice\n") == 4


def test_sections_begin_at_their_banners_and_cover_the_module():
    head, store, uplink = build.sections(MODULE)
    assert (head.title, head.lines, head.tokens) == ("Head", None, None)
    assert (store.title, store.lines, store.tokens) == ("Store", 12, 40)
    assert (uplink.title, uplink.lines, uplink.tokens) == ("Uplink", None, None)
    lines = MODULE.splitlines()
    assert [lines[part.first - 1] for part in (store, uplink)] == [BAR, BAR]
    assert (head.first, head.last + 1, store.last + 1, uplink.last) == (1, store.first, uplink.first, len(lines))


def test_a_module_without_banners_is_all_head():
    assert build.sections("x = 1\ny = 2\n") == [build.Section("Head", 1, 2)]


@pytest.mark.parametrize("title", ["Store (730 lines)", "Store (730 lines, 5600)", "Store (5,600 lines, 1 tokens)"])
def test_a_budget_that_cannot_be_read_is_an_error(title):
    with pytest.raises(build.BuildError, match="Store"):
        build.sections(f"{BAR}\n# {title}\n{BAR}\n")


def test_the_module_itself_has_sections():
    found = build.sections(build.AGENT.read_text("utf-8"))
    assert len(found) > 10


def test_counts():
    found = {(count.name, count.unit): count for count in build.counts(MODULE, {"lines": 100, "classes": 2})}
    assert [found[name, "lines"].found for name in ("Head", "Store", "Uplink", "whole")] == [5, 22, 10, 37]
    assert [found[name, "tokens"].found for name in ("Head", "Store", "Uplink", "whole")] == [2, 31, 19, 52]
    assert [found["Store", unit].budget for unit in ("lines", "tokens")] == [12, 40]
    assert [found["whole", unit].budget for unit in ("lines", "tokens")] == [100, None]
    assert found["classes", "classes"][2:4] == (3, 2)
    assert found["settings", "settings"][2:4] == (2, None)


def test_what_is_above_its_budget_is_named_with_the_remedy(tmp_path, monkeypatch, capsys):
    module = tmp_path / "medplum_agent.py"
    module.write_text(MODULE)
    (tmp_path / "pyproject.toml").write_text("[tool.medplum-agent.budget]\nlines = 37\ntokens = 52\nclasses = 2\n")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "AGENT", module)
    assert not build.module_is_within_budget()
    printed = capsys.readouterr()
    table = [line.split() for line in printed.out.splitlines()]
    assert table[1:] == [
        ["Head", "5", "-", "2", "-"],
        ["Store", "22", "12", "31", "40"],
        ["Uplink", "10", "-", "19", "-"],
        ["whole", "37", "37", "52", "52"],
        ["classes", "3", "2"],
        ["settings", "2", "-"],
    ]
    store, classes = printed.err.splitlines()
    assert "Store: 22 lines, 10 above the budget" in store
    assert "take it from elsewhere, or raise the number beside the banner" in store
    assert "classes: 3 classes, 1 above the budget" in classes
    assert "pyproject.toml" in classes
    module.write_text(MODULE.replace("(12 lines", "(22 lines").replace("class Outer:", "if True:"))
    assert build.module_is_within_budget()


@pytest.mark.parametrize("named", [True, False])
def test_what_is_installed_already_is_tested_without_compiling(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the release workflow does after it installed its own package."""
    names = ("MEDPLUM_AGENT_BINARY", "MEDPLUM_AGENT_ONE_FILE")
    compiled: list[bool] = []
    monkeypatch.setattr(os, "environ", dict.fromkeys(names, "installed") if named else {})
    monkeypatch.setattr(build, "ensure_binary", lambda: compiled.append(True))
    monkeypatch.setattr(build, "become", lambda *command: None)
    build.test_binary()
    assert compiled == ([] if named else [True])
    assert [os.environ[name] == "installed" for name in names] == [named] * 2


def test_no_name_of_the_module_is_given_twice() -> None:
    """The later value would count for both uses, and no linter says so."""
    names = collections.Counter(
        target.id
        for node in ast.parse(build.AGENT.read_text("utf-8")).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for given in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for target in ast.walk(given)
        if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
    )
    assert len(names) > 200 and [name for name, count in names.items() if count > 1] == []
