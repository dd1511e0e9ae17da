"""README and docs: the example runs, links are valid, Markdown has no accidental markup. And the pretrained model.

After a key has changed, `python tests/test_readme.py` writes the table in docs/configuration.md again.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import OPTIMIZED, ROOT
from PIL import Image

import config as configuration
import eval as evaluation

PRETRAINED = ROOT / "pretrained"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
CONFIGURATION = ROOT / "docs" / "configuration.md"


def configuration_table() -> str:
    """Return a table of all keys with default and help, in the groups of config.py."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for group, fields in configuration.groups().items():
        lines.append(f"| **{group}** | | |")
        for field in fields:
            star = " *" if field.metadata["free"] else ""
            default = configuration.default_text(field)
            lines.append(f"| `{field.name}`{star} | {default} | {as_markdown(field.metadata['help'])} |")
    return "\n".join(lines)


def as_markdown(text: str) -> str:
    """Return text with formulas (k**l, k^l) and paths (<logdir>/...) in code spans, which Markdown doesn't interpret."""
    return re.sub(r"(?:<[^>]+>|[\w/()+-])*(?:\*\*|\^|<[^>]+>)(?:<[^>]+>|[\w/()+-])*", r"`\g<0>`", text)


def outside_code(page: str) -> str:
    """Return the text that Markdown interprets, without code blocks, code spans and comments."""
    page = re.sub(r"^```.*?^```|^    .*?$|<!--.*?-->", "", page, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", "", page)


def with_table(page: str) -> str:
    """Return the page with the current table."""
    return re.sub(
        r"(<!-- configuration.*?-->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{configuration_table()}\n\n{match[2]}",
        page,
        flags=re.DOTALL,
    )


def test_the_configuration_table_is_up_to_date():
    """It equals config.py's, has all keys, and Markdown shows its formulas and paths."""
    page = CONFIGURATION.read_text()
    assert page == with_table(page), "write it again: python tests/test_readme.py"
    keys = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    assert keys == [field.name for field in dataclasses.fields(configuration.Config)]
    for shown in "`k^l`", "`k**(levels-1)`", "`<logdir>/<dataset>/<run name>`":
        assert shown in page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_markdown_has_no_accidental_markup(path):
    """Outside code, `<name>` would be an HTML tag, and `4**2 and 8**2` would be bold."""
    text = outside_code(path.read_text())
    assert not re.findall(r"<[^>\n]*>", text)
    assert not re.findall(r"\w\*\*[\w(]|\w\^\w", text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for link in re.findall(r"\]\(([^)]+)", path.read_text()):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_readme_links_each_page_and_lists_each_file():
    text = (ROOT / "README.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name})" in text, page.name
    tree = re.findall(r"^    ([\w/.]+)  ", text, re.MULTILINE)
    assert "train.py" in tree and not [name for name in tree if not (ROOT / name).exists()]
    assert not [path.name for path in ROOT.glob("*.py") if path.name not in tree]


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path):
    """Unchanged, in an empty directory."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "pretrained").symlink_to(PRETRAINED)
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"
    command, environment = [sys.executable, "-c", program], os.environ | OPTIMIZED
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "imagined.gif") as gif:
        assert getattr(gif, "n_frames", 1) > 900  # equal ones are merged
        gif.seek(500)
        assert np.asarray(gif.convert("L")).max() > 128  # still a digit


@pytest.mark.slow
def test_the_pretrained_model_predicts_better_than_the_last_frame(tmp_path):
    """Its first predicted frame has a PSNR at least 2 dB above that of the last context frame."""
    run = shutil.copytree(PRETRAINED, tmp_path / "run", ignore=shutil.ignore_patterns("eval_*"))
    flags = ["--logdir", str(run), "--num_examples", "8", "--eval_seq_len", "46", "--no_save_grid"]
    evaluation.evaluate(*evaluation.parse(flags))
    (path,) = run.glob("eval_*/metrics.json")
    psnr = json.loads(path.read_text())["lines"]["standard"]["psnr"]
    first = {name: line["curve"]["value"][0] for name, line in psnr.items()}
    assert first["prediction"] > first["last context frame"] + 2


def test_pretrained_model_is_small_and_names_no_machine():
    assert sum(path.stat().st_size for path in (PRETRAINED / "checkpoints").rglob("*") if path.is_file()) < 5e6
    c, default = configuration.load(PRETRAINED / "config.yml"), configuration.Config()
    assert (c.logdir, c.datadir, c.init_from) == (default.logdir, default.datadir, None)


if __name__ == "__main__":
    CONFIGURATION.write_text(with_table(CONFIGURATION.read_text()))
