"""The jobs: what .ci/run and the workflows of GitHub name is there, and versions agree wherever they are written."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RUN = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {_normal(key): version for key, _, version in (line.partition("==") for line in lines if line[0] != "#")}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def bash(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)


def requirements() -> list[Requirement]:
    """All that setup.py asks for, extras included."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    return [Requirement(one) for one in re.findall(r'"([A-Za-z_-]+(?:\[\w+\])?>=[\d.]+)"', text)]


# What publishes may do more, in the one job that runs no code of this repository, and never for a pull request.
MAY = {"docs.yml": {"pages": "write", "id-token": "write"}, "release.yml": {"id-token": "write"}}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_only_read(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert job["timeout-minutes"]
        if path.name in MAY and name == "publish":
            assert job["permissions"] == MAY[path.name] and not any("run" in step for step in job["steps"])
            assert "pull_request" not in content[True]  # YAML reads `on` so
        else:
            assert "permissions" not in job


def test_the_workflow_runs_each_job_on_the_pythons_that_are_promised() -> None:
    jobs = re.search(r"for job in (.*); do", RUN)[1].split()
    actual = workflow("tests.yml")["jobs"]
    assert sorted(actual) == sorted(jobs)
    for name, job in actual.items():
        assert job["steps"][-1]["run"] == f".ci/run {name}"
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert actual["stranger"]["strategy"]["matrix"]["python"] == promised


def test_the_oldest_job_names_tests_that_are_there() -> None:
    names = re.search(r"oldest_tests=\(.*?\n\)", RUN, re.DOTALL)[0]
    listed = bash(f"{names}\nprintf '%s\\n' \"${{oldest_tests[@]}}\"", ROOT).stdout.split()
    assert len(listed) > 10 and not [name for name in listed if not (ROOT / name).is_file()]


def test_a_job_that_fails_fails_the_whole(tmp_path: Path) -> None:
    """The script itself, with environments that can't be made, and with jobs of which one fails."""
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    environment = '    python3 -m venv "$work/venv"\n    . "$work/venv/bin/activate"\n'
    assert RUN.count(environment) == 1 and RUN.count('\n    "$1"\n') == 1
    script.write_text(RUN.replace(environment, "    false\n"), encoding="utf-8")
    done = bash("bash .ci/run", tmp_path)
    assert done.returncode == 3 and "failed: newest oldest stranger" in done.stdout
    script.write_text(RUN.replace(environment, "").replace('\n    "$1"\n', '\n    [ "$1" != oldest ]\n'), encoding="utf-8")
    done = bash("bash .ci/run", tmp_path)
    assert done.returncode == 1 and "failed: oldest" in done.stdout and "stranger: done" in done.stdout


def test_the_lower_bounds_are_those_that_are_tried() -> None:
    oldest, newest = pins("compat.txt"), pins("constraints.txt")
    asked = requirements()
    assert {_normal(one.name) for one in asked} >= {"transformers", "torch", "peft", "datasets", "numpy"}
    for one in asked:
        (bound,) = one.specifier
        assert bound.operator == ">=", f"{one}: an upper bound would keep people from upgrading"
        name = _normal(one.name)
        if name in oldest:
            assert Version(oldest[name]) == Version(bound.version), one
        if name == "vllm":  # which pins torch and transformers, and so has an environment of its own
            continue
        assert Version(newest[name]) >= Version(bound.version), one


def test_a_commit_is_linted_by_the_ruff_of_the_checks() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (ruff,) = [one for one in hooks if one["repo"].endswith("/ruff-pre-commit")]
    assert ruff["rev"] == f"v{pins('constraints.txt')['ruff']}"


def test_the_documentation_is_published_as_it_is_checked() -> None:
    """The workflow installs what the extra `docs` names, without torch, and builds as `.ci/run` does."""
    asked = re.search(r'extras\["docs"\] = \[(.*)\]', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    steps = [step.get("run", "") for step in workflow("docs.yml")["jobs"]["build"]["steps"]]
    (install,) = [step for step in steps if step.startswith("pip install")]
    for one in re.findall(r'"([^"]+)"', asked):
        assert one.partition(">=")[0] in install, one
    assert "python docs/build_site.py" in steps and "python docs/build_site.py" in RUN


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_issue_forms_are_what_github_reads(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name != "config.yml":
        assert form["name"] and form["description"] and form["body"]
        for field in form["body"]:
            assert field["type"] in ("markdown", "textarea", "input", "checkboxes", "dropdown")
            assert field["type"] == "markdown" or field["id"] and field["attributes"]["label"]
