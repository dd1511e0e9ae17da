"""README and docs: the example runs, links lead somewhere, Markdown shows what is meant; and the trained model.

`python tests/test_readme.py` writes the table in docs/configuration.md again, after a key has changed.
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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
CONFIGURATION = ROOT / "docs" / "configuration.md"


def configuration_table() -> str:
    """Each key with its default and help, by the groups of config.py."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for group, fields in configuration.groups().items():
        lines.append(f"| **{group}** | | |")
        for field in fields:
            star = " *" if field.metadata["free"] else ""
            default = configuration.default_text(field)
            lines.append(f"| `{field.name}`{star} | {default} | {as_markdown(field.metadata['help'])} |")
    return "\n".join(lines)


def as_markdown(text: str) -> str:
    """Text with formulas (k**l, k^l) and paths (<logdir>/...) in code spans, which Markdown leaves alone."""
    return re.sub(r"(?:<[^>]+>|[\w/()+-])*(?:\*\*|\^|<[^>]+>)(?:<[^>]+>|[\w/()+-])*", r"`\g<0>`", text)


def outside_code(page: str) -> str:
    """What Markdown interprets: neither code blocks, nor code spans, nor comments."""
    page = re.sub(r"^```.*?^```|^    .*?$|<!--.*?-->", "", page, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", "", page)


def with_table(page: str) -> str:
    """The page with the table in its place."""
    return re.sub(
        r"(<!-- configuration.*?-->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{configuration_table()}\n\n{match[2]}",
        page,
        flags=re.DOTALL,
    )


def test_configuration_table():
    """It is config.py's, with all keys, and Markdown shows it as it stands there."""
    page = CONFIGURATION.read_text()
    assert page == with_table(page), "write it again: python tests/test_readme.py"
    keys = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    assert keys == [field.name for field in dataclasses.fields(configuration.Config)]
    for shown in "`k^l`", "`k**(levels-1)`", "`<logdir>/<dataset>/<run name>`":
        assert shown in page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_markdown_keeps_what_is_meant(path):
    """Outside of code, `<name>` would be an HTML tag, and `4**2 and 8**2` bold."""
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


def test_readme_leads_to_each_page_and_file():
    text = (ROOT / "README.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name})" in text, page.name
    tree = re.findall(r"^    ([\w/.]+)  ", text, re.MULTILINE)
    assert "train.py" in tree and not [name for name in tree if not (ROOT / name).exists()]
    assert not [path.name for path in ROOT.glob("*.py") if path.name not in tree]


@pytest.mark.slow
def test_example(tmp_path):
    """As it stands there, in a directory of its own."""
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
def test_pretrained_model_predicts(tmp_path):
    """The next frame far better than the last one repeated."""
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
