"""The house keeps its word: what README, docs, Makefile and pyproject say is what the code does."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import yaml

from megamoe_train.config import ENVIRONMENT
from megamoe_train.versions import MINIMUM, TESTED

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import configuration_tables  # noqa: E402

CODE = (".py", ".sh", ".yml", ".cu", ".cuh", ".cpp", ".hpp", "Makefile", "run", "bootstrap")


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def texts(suffixes: tuple[str, ...] = ()) -> dict[Path, str]:
    files = [path for path in tracked_files() if not suffixes or path.name.endswith(suffixes)]
    assert files
    return {path: path.read_text(errors="replace") for path in files}


def code_outside_tests() -> dict[Path, str]:
    return {path: text for path, text in texts(CODE).items() if path.relative_to(ROOT).parts[0] != "tests"}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_the_commands_of_the_readme_are_those_of_the_makefile():
    commands = [line.split("#")[0].strip() for line in fenced("sh")[0].splitlines()]
    assert commands == ["make train", "make test"]
    prose = "\n".join(text for path, text in texts((".md",)).items())
    named = set(re.findall(r"(?:`|[0-9] )make ([a-z]+)", prose))
    assert {"help", "clean", "docs"} <= named <= make_targets()
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"make ([a-z]+)\t", shown)) == make_targets()


def test_the_workflow_and_ci_run_the_two_commands():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in runs and "make train" in runs
    assert re.search(r"^make test ", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    pythons = {step["with"]["python-version"] for job in jobs.values() for step in job["steps"] if "with" in step}
    assert pythons == {TESTED["python"]}


def test_the_example_of_the_readme_runs():
    (example,) = fenced("python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["y"].shape == names["x"].shape
    for name in ("x", "fc1", "fc2"):
        gradient = names[name].grad
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


def test_versions_stand_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={MINIMUM['python']}"
    bounds = dict(re.fullmatch(r"([\w-]+)(.*)", item).groups() for item in project["dependencies"])
    for name in ("torch", "megatron-core"):
        assert bounds.pop(name) == f">={MINIMUM[name]}", name
    assert set(bounds.values()) == {""}, "only torch and megatron-core have a version that matters"
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"Megatron ([0-9.]+\d)", readme)) == {TESTED["megatron-core"]}
    assert set(re.findall(r"Python >= ([0-9.]+\d)", readme)) == {MINIMUM["python"]}


def test_recipes_are_importable_from_anywhere(tmp_path):
    ask = "import megamoe_train.recipes as r; print(r.__file__); from megamoe_train.recipes import *"
    command = [sys.executable, "-P", "-c", ask]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, f"is the package installed (pip install -e .)? {answer.stderr}"
    assert Path(answer.stdout.strip()) == ROOT / "recipes" / "__init__.py"


def test_a_wheel_holds_every_module(tmp_path):
    tree = tmp_path / "tree"
    for path in tracked_files():
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tree, env={"MEGAMOE_SKIP_CUDA_BUILD": "1"}, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    wanted = {path.relative_to(tree).as_posix() for path in tree.glob("megamoe_train/**/*.py")}
    wanted |= {f"megamoe_train/{path.relative_to(tree).as_posix()}" for path in tree.glob("recipes/**/*.py")}
    assert packed == wanted


def test_no_path_of_one_machine_stands_in_a_tracked_file():
    pattern = re.compile(r"(?<![\w.$}])/(root|home/\w+|Users/\w+|work|farm|data)/\S*")
    found = {str(path): hit[0] for path, text in texts().items() if (hit := pattern.search(text))}
    assert not found


def test_the_table_of_variables_is_complete_and_used():
    used: dict[str, set[str]] = {}
    for path, text in code_outside_tests().items():
        in_cpp, elsewhere = r'getenv\("(MEGAMOE_[A-Z0-9_]+)"', r"\b(MEGAMOE_[A-Z0-9_]*[A-Z0-9])\b"
        of_cpp = path.suffix in (".cu", ".cuh", ".cpp", ".hpp")  # there, MEGAMOE_ also begins names of macros
        for name in re.findall(in_cpp if of_cpp else elsewhere, text):
            used.setdefault(name, set()).add(path.name)
    unknown = {name: files for name, files in used.items() if name not in ENVIRONMENT}
    assert not unknown, "missing in megamoe_train/config.py: ENVIRONMENT"
    unread = [name for name in ENVIRONMENT if not used.get(name, set()) - {"config.py"}]
    assert not unread, "in the table, but nothing reads them"


def test_the_tables_of_the_docs_match_the_code():
    for path in configuration_tables.TABLES:
        text = path.read_text()
        assert configuration_tables.rendered(text, path) == text, f"{path.name}: run `make docs`"
    page = configuration_tables.PAGE.read_text()
    for entry in ("`MEGAMOE_PYTHON`", "`--megamoe-sizing ", "`--log-layers N`"):
        stale = page.replace(entry, "`something that is gone`")
        assert stale != page and configuration_tables.rendered(stale) == page


def test_every_error_of_the_troubleshooting_page_exists():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    phrases = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(phrases) >= 10
    code = "\n".join(code_outside_tests().values())
    assert [phrase for phrase in phrases if phrase not in code] == []


def test_links_between_pages_lead_somewhere():
    for path, text in texts((".md",)).items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/index.md").read_text()))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_pre_commit_runs_what_make_lint_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    assert entries == ["ruff check --fix", "ruff format", "clang-format -i"]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    for tool in ("ruff check .", "ruff format --check .", "clang-format --dry-run -Werror"):
        assert tool in lint


def test_the_licence_is_the_whole_of_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License") and "END OF TERMS AND CONDITIONS" in text
