"""Builds the documentation site: `python docs/site.py [OUT]`, then open OUT/site/index.html.

Pages are the files of the repository as they are. This script lays them beside each other, points their links at each
other, and has zensical build them strictly. Links to files that are no pages become text. A page that the navigation
of mkdocs.yml does not name stands at its end.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {  # pages that lie elsewhere in the repository, and their names on the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "data/README.md": "data.md",
    "docker/README.md": "docker.md",
    "src/ldmlab/training/README.md": "training_code.md",
}
ROOMS = ["first_stages", "backbones", "conditioners", "losses", "diffusion", "samplers", "tasks", "data", "metrics"]
ROOMS += ["marking", "evaluation", "interop"]
API = """# {title}

::: ldmlab.{room}
    options:
      show_submodules: true
      show_if_no_docstring: false
      show_root_heading: false
      show_root_toc_entry: false
"""
LINK = re.compile(r"(?P<code>```.*?```|`[^`\n]*`)|(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", re.S)


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Files of the repository, and their names on the site."""
    inside = {file: file.relative_to(root / "docs").as_posix() for file in sorted((root / "docs").rglob("*.md"))}
    return inside | {root / file: name for file, name in OUTSIDE.items()}


def linked(text: str, source: Path, names: dict[Path, str]) -> str:
    """The page with its links to files pointed at pages and images of the site."""

    def replaced(match: re.Match[str]) -> str:
        target, _, anchor = (match["target"] or "").partition("#")
        if match["code"] or not target or re.match(r"[a-z]+:", target):
            return match[0]
        file = (source.parent / target).resolve()
        if not file.exists():
            raise SystemExit(f"{source}: the link to {match['target']} leads nowhere.")
        name = names.get(file) or (file.relative_to(ROOT / "docs").as_posix() if match["image"] else None)
        depth = "../" * names[source].count("/")
        return f"{match['image']}[{match['text']}]({depth}{name}{anchor and '#' + anchor})" if name else match["text"]

    return LINK.sub(replaced, text)


def staged(out: Path) -> Path:
    """Pages and images beside each other in `out`/docs, and a configuration there."""
    shutil.rmtree(out, ignore_errors=True)
    names = pages()
    for source, name in names.items():
        page = out / "docs" / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(linked(source.read_text(encoding="utf-8"), source, names), encoding="utf-8")
    for room in ROOMS:
        text = API.format(room=room, title=room.replace("_", " ").capitalize())
        (out / "docs" / f"api_{room}.md").write_text(text, encoding="utf-8")
    for image in (file for file in (ROOT / "docs").rglob("*") if file.suffix in (".png", ".jpg", ".css")):
        shutil.copy(image, out / "docs" / image.relative_to(ROOT / "docs"))
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    config["plugins"][-1]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT / "src")]
    listed = re.findall(r"[\w/]+\.md", yaml.safe_dump(config["nav"]))
    if more := [name for name in names.values() if name not in listed]:
        config["nav"].append({"More": more})
    (out / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return out / "mkdocs.yml"


def main(out: Path) -> int:
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(staged(out))]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs").resolve()))
