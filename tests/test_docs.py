"""The pages of docs/ are true: every command in them runs as it is written, or says in its block what it needs.

    ```sh                  run here, in order, in one empty folder per page, with exit code 0
    ```sh needs=docker     not run here: a cluster, docker, a GPU, ... must be there; its pift commands are parsed
    ```python file=NAME    written into that folder first
    a line's `# exit 2`    ends with that code;  `# dry: minutes` is run with --dry-run
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from orchestrator.cli import _parser
from workers.recorder import METRICS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
NEEDS = {"docker", "cluster", "gpu", "checkout", "browser", "key", "weights", "network", "server"}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", flags=re.S | re.M)
SECONDS = 180


class Block(NamedTuple):
    """A fenced block: its language, the words name=value after it, its text."""

    language: str
    words: dict[str, str]
    text: str


def blocks(text: str) -> list[Block]:
    found = []
    for head, body in FENCE.findall(text):
        language, *words = head.split() or [""]
        found.append(Block(language, dict(word.partition("=")[::2] for word in words), body))
    return found


def lines(block: Block) -> list[str]:
    """Its commands; a line that ends in a backslash goes on."""
    joined = block.text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def split(line: str) -> tuple[str, int]:
    """(what to run, the exit code it promises)."""
    command, _, comment = line.partition("    #") if "    #" in line else line.partition(" #")
    code = re.search(r"\bexit (\d+)", comment)
    return command.strip() + (" --dry-run" if "dry:" in comment else ""), int(code[1]) if code else 0


def pages_with(needs: bool) -> list[tuple[Path, Block]]:
    found = [(page, block) for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]
    return [(page, block) for page, block in found if block.language == "sh" and ("needs" in block.words) == needs]


def runnable() -> list[Path]:
    return sorted({page for page, _ in pages_with(needs=False)})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", runnable(), ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """In one shell, as a reader would. Kills: a page that names an option, a file or a setting that is not there."""
    here = blocks(page.read_text(encoding="utf-8"))
    for block in here:
        if "file" in block.words:
            path = tmp_path / block.words["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    script = ["set -u"]
    for block in here:
        for line in lines(block) if block.language == "sh" and "needs" not in block.words else ():
            command, code = split(line)
            said = shlex.quote(f"{page.name}: {line}")
            script.append(f"{command}\nfound=$?; [ $found -eq {code} ] || {{ echo {said} ended with $found; exit 1; }}")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PIFT_")}
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("page", "block"), pages_with(needs=True), ids=lambda value: value.stem if isinstance(value, Path) else ""
)
def test_other_commands_are_written_right(page: Path, block: Block) -> None:
    """What cannot run here is at least what the command line takes."""
    assert block.words["needs"] in NEEDS, f"{page.name}: needs={block.words['needs']}; known: {sorted(NEEDS)}"
    for line in lines(block):
        for words in calls(line):
            _parser().parse_args(words or ["--help"])


def calls(line: str) -> list[list[str]]:
    """What each `pift` of a command line is given, one in the container of compose's service `sweep` too."""
    found, rest = [], shlex.split(line, comments=True)
    while rest:
        end = next((at for at, word in enumerate(rest) if word in ("|", "||", "&", "&&", ";", ">")), len(rest))
        words, rest = rest[:end], rest[end + 1 :]
        if words and words[0].rpartition("/")[2] == "pift":
            found.append(words[1:])
        elif words[:2] == ["docker", "compose"] and "run" in words and "sweep" in words:
            found.append(words[words.index("sweep") + 1 :])
    return found


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_a_shell_reads_every_command(page: Path) -> None:
    """Kills: seed=range(0,3) without quotes."""
    script = "\n".join(block.text for block in blocks(page.read_text(encoding="utf-8")) if block.language == "sh")
    done = subprocess.run(["bash", "-n"], input=re.sub(r"<[\w ]+>", "X", script), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to what is not there: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_is_linked_from_the_readme(page: Path) -> None:
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_metric_has_its_line() -> None:
    """docs/metrics.md names every metric that is recorded, and none that is not."""
    named = set(re.findall(r"^\| `([a-z_]+/[\w/]+)`", (ROOT / "docs/metrics.md").read_text(), flags=re.M))
    own = {name for name in named if name.split("/")[0] in ("dpok", "pi_ft")}
    assert named - own == set(METRICS)


MESSAGE = re.compile(r"^### `(.+)`$", flags=re.M)


def test_the_messages_of_troubleshooting_are_ours() -> None:
    """Every quoted message is in the source, piece by piece between its dots. Kills: a message that was reworded."""
    files = [path for folder in ("orchestrator", "workers", "docker") for path in (ROOT / folder).rglob("*.py")]
    text = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    for message in MESSAGE.findall((ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")):
        for piece in message.split("..."):
            assert piece.strip() in text, f"docs/troubleshooting.md quotes {piece.strip()!r}, which nothing says"


def test_a_false_page_is_seen() -> None:
    """The reading of blocks, lines and codes itself."""
    text = "```sh\npift plan   # why\n\n# only words\npift a \\\n  b    # exit 2\n```\n```sh needs=gpu\nx\n```\n"
    [one, two] = blocks(text)
    assert [split(line) for line in lines(one)] == [("pift plan", 0), ("pift a    b", 2)]
    assert calls("x/pift plan a && ls | pift b") == [["plan", "a"], ["b"]]
    assert calls("docker compose run --rm sweep plan a") == [["plan", "a"]]
    assert two.words == {"needs": "gpu"} and split("pift launch    # dry: minutes") == ("pift launch --dry-run", 0)
