"""The commands of the documentation: which ones run, and that a failure is noticed."""

import re
from pathlib import Path

from scripts import run_docs

ROOT = Path(__file__).parents[1]
PAGE = """
```bash
x=1
```

1. A step:

    <!-- not run: needs a GPU -->
    ```bash
    false
    ```

```text
false
```

```bash
test "$x" = 1; echo ran
```
"""


def test_blocks_run_in_one_shell_except_output_and_those_with_a_reason(tmp_path: Path, capfd) -> None:
    page_blocks = list(run_docs.blocks("page.md", PAGE))
    assert [(block.code, block.reason) for block in page_blocks] == [
        ("x=1\n", ""),
        ("false\n", "needs a GPU"),
        ('test "$x" = 1; echo ran\n', ""),
    ]
    assert [PAGE.splitlines()[block.line] for block in page_blocks] == [
        "x=1",
        "    false",
        'test "$x" = 1; echo ran',
    ]
    done = list(run_docs.run(tmp_path, [block for block in page_blocks if not block.reason]))
    assert [code for _, _, code in done] == [0, 0] and "ran" in capfd.readouterr().out


def test_a_block_that_fails_ends_its_page(tmp_path: Path) -> None:
    todo = list(run_docs.blocks("page.md", PAGE))
    assert [(block.line, code) for block, _, code in run_docs.run(tmp_path, todo)][1:] == [(todo[1].line, 1)]


def test_every_block_of_the_documentation_says_what_it_is() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        opened = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)[::2]
        assert {*opened} <= {"bash", "python", "text"}, page


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 1000
