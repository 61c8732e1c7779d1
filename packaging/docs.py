"""The manual page and the completions of four shells, from the parser of medplum_agent.py: `docs.py FOLDER`.

All four scripts, in docs/, work alike: `at` is what stands there so far without options and their values, such as
`queue list`. It gets the words that may follow; where there are none, and after a dash, the options known there.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from string import Template
from typing import NamedTuple

import medplum_agent

PROGRAM = "medplum-agent"
PARSER = medplum_agent.command_parser(PROGRAM)
TEMPLATES = Path(__file__).with_name("docs")
Table = dict[str, dict[str, str]]  # at each place, words that may stand there, with what they mean


class Option(NamedTuple):
    """`verbs`: those that know it; "" is all. `takes`: the name of its value, "" for none."""

    flag: str
    help: str
    verbs: tuple[str, ...]
    takes: str
    choices: tuple[str, ...]


class Script(Template):
    delimiter = "@@"  # what shells leave alone


def usage() -> list[tuple[str, str, str]]:
    """The words of each verb, what it needs, and what it does; first the two forms without a verb."""
    line = re.compile(rf"(?:usage:)?\s+{PROGRAM}((?: [a-z]+)*) ?(.*?)(?: {{2,}}(.*))?")
    found = [line.fullmatch(text) for text in PARSER.format_usage().rstrip().splitlines()]
    return [(match[1].strip(), match[2], match[3] or "") for match in found if match]


def options() -> Iterator[Option]:
    """Their help begins with the verbs that know them, as in `queue retry, discard: only count`."""
    first = {words.split()[0] for words, _, _ in usage() if words}
    for action in PARSER.actions:
        if not action.option_strings:
            continue
        text, choices, verbs = action.help or "", tuple(action.choices or ()), [""]
        prefix = re.match(r"[a-z]+( [a-z]+)?(, [a-z]+)*: ", text)
        if prefix and re.split("[ ,:]", text)[0] in first:
            text, named = text[prefix.end() :], prefix[0][:-2].split(", ")
            verbs = [verb if verb.split()[0] in first else f"{named[0].split()[0]} {verb}" for verb in named]
        takes = "" if action.nargs == 0 else str(action.metavar or "|".join(choices))
        yield Option(action.option_strings[-1], text, tuple(verbs), takes, choices)


def followers() -> Table:
    """The words of verbs; `queue` means what can follow it."""
    found: Table = {}
    for words, needs, text in usage():
        parts = words.split()
        for number, word in enumerate(parts):
            here, rest = found.setdefault(" ".join(parts[:number]), {}), " ".join(parts[number + 1 :])
            here[word] = ", ".join(filter(None, (here.get(word), rest or text)))
        if needs == "[KIND]":
            found[words] = dict.fromkeys(medplum_agent.KINDS, "messages")
    return found


OPTIONS, FOLLOWERS = list(options()), followers()
KNOWN: Table = {verb: {o.flag: o.help for o in OPTIONS if verb in o.verbs} for o in OPTIONS for verb in o.verbs}
# Where files follow: at once, or after another word
FILES_AT = [words + " *" * (" " in needs) for words, needs, _ in usage() if re.search(r"^(\S+ )?FILE", needs)]


def quote(text: str, inner: str = r"'\''") -> str:
    return "'" + text.replace("'", inner) + "'"


def quote_more(text: str) -> str:  # PowerShell
    return quote(text, "''")


def arms(words: str, options: str, item: Callable[[str, str], str], between: str = " ") -> dict[str, str]:
    """One line for each place, in the form that is given."""
    return {
        name: "\n".join(form.format(at, between.join(item(*one) for one in of.items())) for at, of in table.items())
        for name, form, table in (("words", words, FOLLOWERS), ("options", options, KNOWN))
    }


def values(choice: str, between: str = "|", quoted: Callable[[str], str] = str) -> dict[str, str]:
    """Options with a value, by what a shell can do for it; `choice`: one of those that have a few values."""
    kinds: dict[str, list[str]] = {"file": [], "folder": [], "free": [], "valued": []}
    for one in OPTIONS:
        if one.takes:
            kinds["valued"].append(one.flag)
            if not one.choices:
                kinds[{"FILE": "file", "DIR": "folder"}.get(one.takes, "free")].append(one.flag)
    return {kind: between.join(map(quoted, flags)) for kind, flags in kinds.items()} | {
        "choices": "\n".join(choice.format(one.flag, " ".join(one.choices)) for one in OPTIONS if one.choices),
        "files": "|".join(at.replace("*", ".*") for at in FILES_AT),
    }  # fmt: skip


def fish() -> dict[str, str]:
    def row(patterns: Iterable[str], what: str, text: str) -> str:
        test = "; or ".join(f"__medplum_agent_at {quote(pattern)}" for pattern in patterns)
        about = f"-d {quote(text, chr(92) + chr(39))}" if text else ""
        return " ".join(f'complete -c {PROGRAM} -n "{test}" {what} {about}'.split())

    words = [row([at], f"-a {word}", text) for at, after in FOLLOWERS.items() for word, text in after.items()]
    how = {"": "", "FILE": "-rF", "DIR": "-xa '(__fish_complete_directories)'"}
    rows = [row([at], "-F", "") for at in FILES_AT]
    for one in OPTIONS:
        value = f"-xa {quote(' '.join(one.choices))}" if one.choices else how.get(one.takes, "-x")
        rows.append(row([f"{verb}*" for verb in one.verbs], f"-l {one.flag[2:]} {value}", one.help))
    return {"words": "\n".join(words), "options": "\n".join(rows)}


def manual() -> dict[str, str]:
    def plain(text: str) -> str:
        return text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq")

    def bold(name: str, needs: str) -> str:
        return rf"\fB{plain(name)}\fR {plain(needs)}".strip()

    about = {one.flag: f"({', '.join(one.verbs)}) " if any(one.verbs) else "" for one in OPTIONS}
    return {
        "version": medplum_agent.__version__, "description": plain(PARSER.description or ""),
        "environment": plain((PARSER.epilog or "").removeprefix("Environment: ")),
        "forms": "\n.br\n".join(bold(f"{PROGRAM} {words}".strip(), needs) for words, needs, _ in usage()),
        "verbs": "\n".join(f".TP\n{bold(words, needs)}\n{plain(text)}" for words, needs, text in usage() if words),
        "options": "\n".join(
            f".TP\n{bold(one.flag, one.takes)}\n{plain(about[one.flag] + one.help)}" for one in OPTIONS
        ),
    }  # fmt: skip


FILES = {  # `;;&` and `;|` go on to the next arm, as PowerShell does by itself
    "medplum-agent.bash": values('        {}) how=(-W "{}") ;;')
    | arms("        '{}') offer+=\" {}\" ;;", "        '{}'*) offer+=\" {}\" ;;&", lambda word, _: word),
    "_medplum-agent": values("  ({}) compadd -- {}; return ;;")
    | arms("  ('{}') offer+=({}) ;;", "  ('{}'*) offer+=({}) ;|", lambda word, text: quote(f"{word}:{text}")),
    "medplum-agent.fish": values("", " ") | fish(),
    "medplum-agent.ps1": values(
        "        '{}' {{ $offer = @('{}'.Split(' ') | ForEach-Object {{ , @($_, $_) }}) }}", ", ", quote
    )
    | arms(
        "        '{}' {{ {} }}", "        '{}*' {{ {} }}", lambda *one: f", @({', '.join(map(quote_more, one))})", "; "
    ),
    "medplum-agent.1": manual(),
}


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    head = f"# Completions of {PROGRAM}, made from its parser by packaging/docs.py"
    for name, known in FILES.items():
        text = Script((TEMPLATES / name).read_text("utf-8")).substitute(known, program=PROGRAM, head=head)
        (folder / name).write_text(text, "utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
