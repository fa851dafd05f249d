"""The documentation is checked against the code: configs, keys, command lines, links, snippets, generated pages."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import io
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from diffalign import config, config_loading, losses, plugins
from diffalign.cli import build_parser
from diffalign.errors import ConfigError
from diffalign.health import Monitor
from diffalign.text.records import parse_row

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + [*ROOT.glob("docs/**/*.md")]
)
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [match["body"] for match in FENCE.finditer(text_of(page)) if match["language"] == language]


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every full `diffalign` command line: in shell blocks, and the start comments of configs."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield from _command(named(page), line)
    for name in CONFIGS:
        for line in re.sub(r"\\\n#\s*", "", text_of(ROOT / "configs" / f"{name}.yaml")).splitlines():
            if line.startswith("#"):  # "# Command    diffalign ...      (remark)"
                yield from _command(f"configs/{name}.yaml", re.sub(r"^#( Command)?|\s\(.*", "", line))


def _command(where: str, line: str) -> Iterator[tuple[str, list[str]]]:
    if not line.strip().startswith(("diffalign ", "accelerate ")):
        return
    words = shlex.split(line, comments=True)
    if words[0] == "accelerate":
        words = ["diffalign", *words[words.index("-m") + 2 :]]
    if words[:1] == ["diffalign"] and len(words) > 1:
        yield where, words[1:]


COMMANDS = list(commands())
SNIPPETS = [(named(p), body) for p in PAGES for body in blocks(p, "python") if "from diffalign import losses" in body]
PRINTED = [page for page in PAGES if blocks(page, "python") and blocks(page, "text")]
ROWS = [(named(page), row) for page in PAGES for body in blocks(page, "json") for row in body.splitlines()]
YAML = [(named(page), body) for page in PAGES for body in blocks(page, "yaml")]


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # relative paths in commands are those of the checkout


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) > 30
    assert len(YAML) > 2
    assert {where for where, _ in SNIPPETS} == {"README.md", "docs/explanation/preference-core.md"}
    assert ROOT / "docs/explanation/preference-core.md" in PRINTED
    assert len(ROWS) > 15


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_and_is_documented(name: str) -> None:
    loaded = config_loading.load_config(name)
    assert loaded.output_dir == f"runs/{name}"
    assert any(f"`{name}`" in text_of(page) or f"/{name}.yaml" in text_of(page) for page in PAGES)


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[f"{w}: {' '.join(c)[:60]}" for w, c in COMMANDS])
def test_commands_parse_and_their_settings_exist(where: str, words: list[str]) -> None:
    args, extra = build_parser().parse_known_args(words)
    assert all("=" in word and not word.startswith("-") for word in extra), f"{where}: {extra}"
    settings = [*getattr(args, "overrides", []), *extra]
    if words[:2] == ["data", "make"]:  # its settings are the recipe's
        return
    name = Path(getattr(args, "config", None) or "demo_dpo").stem
    config_loading.load_config(name if name in CONFIGS else "demo_dpo", settings)


@pytest.mark.parametrize(("where", "body"), YAML, ids=[where for where, _ in YAML])
def test_yaml_blocks_hold_known_keys(where: str, body: str) -> None:
    tree = config_loading.read_tree("demo_dpo")
    for section, values in yaml.safe_load(body).items():
        tree[section] = (
            values if section == "objective" or not isinstance(values, dict) else tree.get(section, {}) | values
        )
    assert config_loading.build(tree).output_dir


def test_keys_that_texts_mention_exist() -> None:
    sections = {
        f.name: {key.name for key in dataclasses.fields(cls)}
        for f, cls in (
            (f, getattr(config, f"{f.name.title()}Config", None)) for f in dataclasses.fields(config.RunConfig)
        )
        if cls is not None
    }
    objectives = [plugins.find("objectives", name) for name in plugins.names("objectives")]
    sections["objective"] = {"name", "anchor"} | {f.name for cls in objectives for f in dataclasses.fields(cls)}
    sections["objective"] |= {alias for cls in objectives for alias in cls.aliases}
    assert {"model", "data", "cache", "lora", "training", "sampling", "evaluation"} <= sections.keys()
    mention = re.compile(rf"(?<![\w./])({'|'.join(sections)})\.([a-z_][a-z0-9_]*)(?![\w/]*\()")
    files = {"json", "yaml", "md", "py", "html"}
    wrong = [
        f"{named(page)}: {section}.{key}"
        for page in PAGES
        for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text_of(page)))
        for section, key in mention.findall(code)
        if key not in sections[section] | files
    ]
    assert not wrong


def links() -> Iterator[tuple[Path, str, str]]:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
            if not target.startswith(("http://", "https://")):
                path, _, anchor = target.partition("#")
                yield page, path, anchor


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    broken = []
    for page, path, anchor in links():
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in slugs(target)):
            broken.append(f"{named(page)}: {path}#{anchor}")
    assert not broken


def test_every_page_is_reached_from_the_index() -> None:
    linked = {(page.parent / path).resolve() for page, path, _ in links() if page.name == "index.md"}
    assert {page for page in PAGES if "docs" in page.parts and page.name != "index.md"} <= linked


@pytest.mark.parametrize(("where", "body"), SNIPPETS, ids=[where for where, _ in SNIPPETS])
def test_snippets_of_the_loss_core_run(where: str, body: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(body, where, "exec"), {})
    assert "tensor(" in capsys.readouterr().out


@pytest.mark.parametrize("page", PRINTED, ids=named)
def test_python_blocks_of_a_page_print_what_it_says(page: Path) -> None:
    """All blocks of a page run in order in one namespace; a text block after one is what it printed."""
    names: dict[str, object] = {"__name__": "page"}
    printed = None
    for fence in FENCE.finditer(text_of(page)):
        if fence["language"] == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(fence["body"], named(page), "exec"), names)
            printed = out.getvalue()
        elif fence["language"] == "text" and printed is not None:
            assert printed == fence["body"]
            printed = None


@pytest.mark.parametrize(("where", "row"), ROWS, ids=[f"{where}: {row[:50]}" for where, row in ROWS])
def test_rows_of_text_data_can_be_read(where: str, row: str) -> None:
    fields = parse_row(json.loads(row))
    assert (fields["kind"] == "prompt") == ("responses" not in fields)


def test_every_objective_has_its_place_on_a_page_of_its_family() -> None:
    families = sorted((ROOT / "docs/explanation/objectives").glob("*.md"))
    linked = [name for page in families for name in re.findall(r"objectives\.md#(\w+)\)", text_of(page))]
    assert set(linked) == set(losses.names())


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "scripts" / "generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["config.md", "objectives.md", "components.md"])
def test_generated_pages_are_up_to_date(name: str) -> None:
    module = generator()
    assert text_of(module.FOLDER / name) == module.PAGES[name](), "run: make reference"


def test_generator_refuses_an_undescribed_key() -> None:
    @dataclasses.dataclass
    class Section:
        """A section.

        Attributes:
            known, also: two keys,
                described together.
        """

        known: int = 1
        also: str | None = None

    module = generator()
    assert module.attributes(Section) == {
        "known": "two keys, described together.",
        "also": "two keys, described together.",
    }
    Section.__doc__ = "A section.\n\nAttributes:\n    known: described."
    with pytest.raises(ValueError, match=r"Section.also is not described"):
        module.table(Section)


def test_command_line_page_is_complete() -> None:
    page = text_of(ROOT / "docs/reference/cli.md")
    (subparsers,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for name, parser in subparsers.choices.items():
        assert re.search(rf"^## {name}\b", page, re.MULTILINE), name
        options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        assert [option for option in options if option != "--help" and f"`{option}" not in page] == []


def test_metrics_and_core_pages_are_complete() -> None:
    metrics, core = text_of(ROOT / "docs/reference/metrics.md"), text_of(ROOT / "docs/explanation/preference-core.md")
    assert [code for code in Monitor()._checks() if f"`{code}`" not in metrics] == []
    objectives = {cls.__name__ for cls in losses.catalogue().values()}
    parts = [name for name in losses.__all__ if name not in objectives and inspect.isclass(getattr(losses, name))]
    assert [name for name in parts if name not in core] == []


def test_loss_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "loss_core.py"), run_name="__main__")
    rows = {line[:11].strip(): [float(p) for p in line[11:].split()] for line in capsys.readouterr().out.splitlines()}
    before = rows.pop("before")
    assert set(rows) == {"DPO", "IPO", "GRPO", "GRPO, held"}
    for probabilities in rows.values():
        assert probabilities == sorted(probabilities)  # worst to best answer
        assert probabilities[-1] > before[-1]
    assert rows["GRPO, held"][-1] < rows["GRPO"][-1]


def test_custom_objective_example(tmp_path: Path) -> None:
    name = "examples/custom_objective.py"
    loaded = config_loading.load_config(
        "demo_dpo",
        [f"objective.name={name}", "objective.anchor=0.5", "objective.beta=500", f"output_dir={tmp_path}"],
    )
    objective = loaded.objective
    assert (type(objective).__name__, objective.anchor, objective.beta) == ("AnchoredDPO", 0.5, 500)
    again = config_loading.build(
        yaml.safe_load(config_loading.dump(loaded))
    )  # what a run folder holds can be read back
    assert dataclasses.asdict(again.objective) == dataclasses.asdict(objective)

    reference, pairs = torch.full((4,), 0.1), losses.Pairs.halves(2)
    out = objective(losses.Scores.denoising(reference.clone(), reference), pairs)
    torch.testing.assert_close(out.per_item, torch.full((2,), objective.initial_loss()))
    # The winner of the first pair is worse than under the reference, that of the second better: only the first pays.
    error = torch.tensor([0.104, 0.096, 0.104, 0.1], requires_grad=True)
    scores = losses.Scores.denoising(error, reference)
    out, plain = objective(scores, pairs), losses.DPO(beta=500)(scores, pairs)
    charge = (out.per_item - plain.per_item).detach()
    torch.testing.assert_close(charge, torch.tensor([0.5 * 250 * 0.004, 0.0]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.metrics["anchor"], charge, rtol=1e-4, atol=1e-6)
    out.per_item.sum().backward()
    assert error.grad is not None
    assert error.grad[0] > error.grad[1] > 0
    with pytest.raises(ConfigError, match="anchor is -1"):
        config_loading.load_config("demo_dpo", [f"objective.name={name}", "objective.anchor=-1"])
