"""What README.md and docs/ show works: every block of code and every command, see `documentation.py`."""

import fnmatch
import re

import documentation
import pytest

import fdjax
from fdjax.errors import InputError

PAGES = documentation.pages()
ROOT = documentation.ROOT


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_works(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documentation.run(page)


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", [*filter(documentation.takes_long, PAGES)], ids=lambda page: page.name)
def test_what_takes_long_works_too(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documentation.run(page, long=True)


def shown(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    documentation.run(page)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("```python\n1 / 0\n```\n", ZeroDivisionError, "division"),
        ("```bash\nfdjax --roundz=3\n```\n", SystemExit, "2"),
        ("```bash\n# needs MNIST\nfdjax --dataset=mnist --roundz=3\n```\n", SystemExit, "2"),
        ("```bash\nfdjax --rounds=0\n```\n", InputError, "--rounds=0"),
        ("```bash\nmake nothing\n```\n", AssertionError, "nothing"),
        ("```bash\npip install 'fdjax[nothing]'\n```\n", AssertionError, "the extras are"),
        ("```bash\nrm -r x\n```\n", AssertionError, "no program is known"),
        ("```pyhton\n1\n```\n", AssertionError, "of no language that is run"),
        ("```\n1\n```\n", AssertionError, "of no language that is run"),
    ],
)  # fmt: skip
def test_what_does_not_work_is_seen(tmp_path, monkeypatch, text, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        shown(tmp_path, text)


def test_a_page_sees_its_own_files_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown(
        tmp_path,
        "```{code-block} python\n:caption: mine.py\nvalue = 3\n```\n```python\nn = 2\n```\n"
        "```python\nassert n == 2\nimport pathlib\nassert 'value = 3' in pathlib.Path('mine.py').read_text()\n```\n",
    )


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs/api.md").read_text()
    missing = [name for name in fdjax.__all__ if not re.search(rf"fdjax\.{name}\b", text)]
    assert not missing, f"docs/api.md lacks {missing}"


def test_every_page_is_reached_from_the_first():
    text = (ROOT / "docs/index.md").read_text()
    listed = " ".join(re.findall(r"```{toctree}(.*?)```", text, re.DOTALL)).split()
    written = {page.stem for page in PAGES if page.parent == ROOT / "docs"} - {"index"}
    lost = [name for name in written if not any(fnmatch.fnmatch(name, pattern) for pattern in listed)]
    assert not lost, f"the table of contents in docs/index.md lacks {lost}"
