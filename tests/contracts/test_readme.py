"""README and docs agree with the code: files, links, verbs, settings, the tree, the picture."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

import pytest
from pydantic import BaseModel

import notellm2_ray
from notellm2_ray.cli import parser
from notellm2_ray.core.config import nested_models
from notellm2_ray.core.settings import Settings
from notellm2_ray.presets import PRESETS, load_settings
from tests.contracts.test_layers import MAY_IMPORT

ROOT = Path(notellm2_ray.__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"settings.md"}  # made by docs/generated.py from the code
OF_RAY = {"ray.data.llm", "serve.batch"}  # look like settings of this package

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
VERB = re.compile(r"\bnotellm2 ([a-z][a-z-]*)\b")
# A path in text or commands that begins with a folder of the repository.
FILE = re.compile(r"(?<![\w/.-])((?:docs|benchmarks|jobs|serve_configs|requirements|tests|notellm2_ray)/[\w./-]*)")
KNOB = re.compile(r"^([a-z_]+(?:\.[a-z_]+)*)=(.*)$", re.DOTALL)


def _verbs() -> dict[str, str]:
    """Each verb of the command line and its help."""
    actions = parser()._actions
    (verbs,) = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    return {choice.dest: choice.help or "" for choice in verbs._choices_actions}


def _blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of the page's code blocks."""
    yield from BLOCK.findall(page.read_text(encoding="utf-8"))


def _spans(page: Path) -> list[str]:
    """The page's inline code."""
    return SPAN.findall(BLOCK.sub("", page.read_text(encoding="utf-8")))


def _commands(page: Path) -> Iterator[list[str]]:
    """The words of every `notellm2` command in the page's shell blocks."""
    for language, text in _blocks(page):
        for line in text.replace("\\\n", " ").splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["notellm2"]:
                yield words


def _has_knob(key: str, models: list[type[BaseModel]]) -> bool:
    """Whether a dotted key names a setting, or a section, of one of the classes."""
    first, _, rest = key.partition(".")
    for model in models:
        field = model.model_fields.get(first)
        if field is not None and get_origin(field.annotation) is dict:
            rest = rest.partition(".")[2]  # its first part is a name of the user's own
        if field is not None and (not rest or _has_knob(rest, nested_models(field.annotation))):
            return True
    return False


def _table(page: Path, head: str) -> dict[str, str]:
    """First and second column of the table whose first column is called ``head`` and holds code."""
    rows = page.read_text(encoding="utf-8").partition(f"| {head} |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `([\w-]+)` \| ([^|]*) \|", rows, re.MULTILINE))


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request) -> Path:
    return request.param


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_tree_lists_exactly_the_rooms():
    (tree,) = [text for _, text in _blocks(README) if text.startswith("notellm2_ray/\n")]
    listed = [line.split()[0] for line in tree.splitlines()[1:]]
    rooms = {f"{path.parent.name}/" for path in (ROOT / "notellm2_ray").glob("*/__init__.py")}
    loose = {path.name for path in (ROOT / "notellm2_ray").glob("*.py")} - {"__init__.py"}
    assert sorted(listed) == sorted(rooms | loose)


def test_design_lists_the_rooms_and_what_each_may_import():
    rows = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("| room |")[2].partition("\n\n")[0]
    listed = {room: set(SPAN.findall(rest)) for room, rest in re.findall(r"^\| `(\w+)` .*\| (.*) \|$", rows, re.M)}
    rooms = [path.parent.name for path in (ROOT / "notellm2_ray").glob("*/__init__.py")]
    assert listed == {room: MAY_IMPORT[room] for room in rooms}


def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path = target.partition("#")[0]
        if path and "://" not in path and path not in GENERATED:
            assert (page.parent / path).exists(), target


def test_named_files_exist(page):
    if page.name == "experiments.md":
        pytest.skip("a log: what it names was there on its day")
    text = page.read_text(encoding="utf-8").replace("notellm2_ray/\n", "")
    for name in FILE.findall(LINK.sub("", text)):
        assert (ROOT / name.rstrip(".")).exists(), name


def test_named_verbs_exist(page):
    code = [text for language, text in _blocks(page) if language != "python"] + _spans(page)
    named = {verb for text in code for verb in VERB.findall(text)}
    assert named <= _verbs().keys()


def test_named_settings_exist(page):
    spans = [word for span in _spans(page) for word in (span.split() if span.startswith("notellm2 ") else [span])]
    for span in spans:
        key = KNOB.sub(r"\1", span.strip("\"'"))
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", key) and key.partition(".")[0] in Settings.model_fields:
            module = ROOT / "notellm2_ray" / f"{key.replace('.', '/')}.py"
            assert key in OF_RAY or module.is_file() or _has_knob(key, [Settings]), span


@pytest.mark.parametrize(
    "words", [words for page in PAGES for words in _commands(page)], ids=lambda words: " ".join(words)[:60]
)
def test_documented_commands_are_accepted(words):
    options, rest = parser().parse_known_args([word for word in words[1:] if word != "-h"])
    assert all("=" in word for word in rest)
    if hasattr(options, "preset"):
        config = str(ROOT / options.config) if options.config else None
        load_settings(config, options.preset, rest)


def test_job_configs_are_accepted():
    needed = {"movielens": ["source.directory=x"], "microlens": ["source.pairs=x", "source.titles=x"]}
    for path in sorted((ROOT / "jobs" / "configs").glob("*.yaml")):
        load_settings(str(path), None, needed.get(path.stem, []))


def test_steps_lists_the_verbs():
    assert _table(ROOT / "docs" / "steps.md", "verb") == _verbs()


def test_steps_lists_the_presets():
    assert _table(ROOT / "docs" / "steps.md", "preset") == {name: text for name, (text, _) in PRESETS.items()}


def test_page_of_settings_needs_only_what_docs_lock_has():
    code = (
        "import importlib.metadata, sys\n"
        "sys.modules['cloudpickle'] = None\n"  # pyarrow uses it if installed
        "from notellm2_ray.core.config import nested_models\n"
        "from notellm2_ray.core.settings import Settings\n"
        "todo = [Settings]\n"
        "for model in todo:\n"
        "    todo += [one for field in model.model_fields.values() for one in nested_models(field.annotation)]\n"
        "homes = importlib.metadata.packages_distributions()\n"
        "print(*{home for name, module in sys.modules.items() if module for home in homes.get(name, ())})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    locked = {line.partition("==")[0] for line in (ROOT / "requirements" / "docs.lock").read_text().splitlines()}
    needed = {name.lower().replace("_", "-") for name in done.stdout.split()} - {"notellm2-ray", "setuptools", "pip"}
    assert needed <= {name.lower().replace("_", "-") for name in locked}


def test_the_picture_is_drawn_from_its_script_and_names_verbs():
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs" / "picture.py")
    assert spec is not None and spec.loader is not None
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    assert picture.FILE.read_text(encoding="utf-8") == picture.draw(), "run python docs/picture.py"
    assert {verb for *_, verb in picture.VERBS} <= _verbs().keys()
