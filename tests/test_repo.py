"""What holds for the repository as a whole: its texts, its lock, its import."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
COMPILERS = ROOT / "requirements-compile.lock"
MODELS = ROOT / "requirements-models.lock"
REGISTRY = re.compile(r"(?:pypi|pythonhosted|npmjs|artifactory|devpi)[\w.-]*\.(?:com|io|net|org)\b")
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(?:home|Users|root|work)/\w")
SLOW_IMPORTS = ["flax", "huggingface_hub", "jax", "orbax", "tokenizers", "transformers"]
WRONG_NAME = re.compile(r"pip3? install\b[^\n;&|`]*?(?<![/\w])jaxserve\b(?!-llm)")


def texts() -> dict[str, str]:
    """The tracked and the not yet tracked text files, by name."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    found = {}
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            found[name] = data.decode()
    return found


@pytest.mark.parametrize("pattern", [REGISTRY, MACHINE_PATH, WRONG_NAME])
def test_no_text_has(pattern: re.Pattern[str]) -> None:
    hits = {name: match[0] for name, text in texts().items() if (match := pattern.search(text))}
    assert hits == {}


@pytest.mark.parametrize(
    ("pattern", "bad", "good"),
    [
        (REGISTRY, ["https://", "pypi", ".org/simple"], "PyPI, pypi.tsv"),
        (MACHINE_PATH, ["/ho", "me/someone/model"], "~/work/model, app/work/x, ${HOME}/work/x"),
        (WRONG_NAME, ["pip ", "install 'jaxserve[tpu]'"], "`pip install jaxserve-llm`: `jaxserve`"),
    ],
)
def test_a_pattern_sees_what_it_is_for(pattern: re.Pattern[str], bad: list[str], good: str) -> None:
    assert pattern.search("".join(bad))
    assert not pattern.search(good)


@pytest.mark.parametrize(("lock", "least"), [(LOCK, 50), (COMPILERS, 5), (MODELS, 5)])
def test_a_lock_has_a_version_and_hashes_for_each_package(lock: Path, least: int) -> None:
    text = re.sub(r"^#.*\n", "", lock.read_text(), flags=re.MULTILINE)
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) >= least
    pinned = re.compile(r"[\w.-]+==\S+( ; [^\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+")
    assert [entry for entry in entries if not pinned.fullmatch(entry)] == []


def test_the_lock_installs_no_torch_and_no_accelerator() -> None:
    names = re.findall(r"^([\w.-]+)==", LOCK.read_text(), flags=re.MULTILINE)
    assert [n for n in names if re.match(r"torch|triton|nvidia|libtpu|jax-cuda", n)] == []


def test_the_lock_holds_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["demo"], *extras["dev"], *extras["bench"]]
    names = {match[0].lower() for spec in asked if (match := re.match(r"[\w-]+", spec))}
    locked = set(re.findall(r"^([\w.-]+)==", LOCK.read_text(), flags=re.MULTILINE))
    assert names - locked == set()


def test_the_compilers_are_locked_apart_and_are_those_of_the_jax_in_the_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.split(r"[ ;=<>]", each)[0] for each in project["optional-dependencies"]["compile"]}
    versions = [dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), flags=re.MULTILINE))
                for lock in (LOCK, COMPILERS)]  # fmt: skip
    shared, compilers = versions
    assert asked - set(compilers) == set()
    assert {compilers[f"jax-cuda13-{part}"] for part in ("pjrt", "plugin")} == {shared["jax"]}
    assert set(shared) & set(compilers) == set()


@pytest.mark.parametrize("module", ["jaxserve", "jaxserve.cli"])
def test_importing_is_instant(module: str) -> None:
    code = f"import {module}, sys; print([m for m in {SLOW_IMPORTS} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
