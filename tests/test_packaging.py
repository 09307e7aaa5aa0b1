"""The wheel: what is in it, and that it works away from the source tree."""

from __future__ import annotations

import configparser
import importlib
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import chunkcache
from chunkcache.native.library import SETS, libraries

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("chunkcache", "cli")
FILES = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
LEFTOVERS = shutil.ignore_patterns("__pycache__", "*.py[co]", "*.so", "unfinished")
COMPILED = (".cpp", ".h")  # in the source archive; their modules are in the wheel


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is made of, so that nothing is built inside the repository."""
    folder = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=LEFTOVERS)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive, as by anybody who downloads that."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it.

    It sees this environment's packages as a plain folder, in which .pth files do not count: not
    the editable chunkcache.
    """
    folder = tmp_path_factory.mktemp("home")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    seen = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(where.strip(), "dependencies.pth").write_text("\n".join(seen) + "\n")
    return folder


def use(home: Path, code: str) -> str:
    """Runs code against the installed wheel, away from the source tree."""
    return run(home / "env" / "bin" / "python", "-c", textwrap.dedent(code), cwd=home)


def files_of(source: Path) -> set[str]:
    """Where the wheel has to have each source file."""
    found = set()
    for name, place in (("chunkcache", "chunkcache"), ("cli", "chunkcache/cli")):
        for file in (source / name).rglob("*"):
            if file.is_file() and file.suffix not in COMPILED:
                found.add(str(PurePosixPath(place, file.relative_to(source / name))))
    return found


def test_wheel_holds_every_source_file_and_nothing_else(source: Path, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    modules = {name for name in packed if name.endswith(".so")}
    assert packed - modules == files_of(source)
    folder = "chunkcache/native/"
    built = {name for name in SETS if (ROOT / folder / f"_{name}.abi3.so").exists()}
    assert modules == {f"{folder}_{name}.abi3.so" for name in built}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_holds_package_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    model = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert names >= {f"chunkcache/demo/model/{name}" for name in model}
    assert names >= {"chunkcache/py.typed", "chunkcache/server/page.html"}


def test_setup_cfg_lists_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    folders = {file.parent for file in (ROOT / "chunkcache").rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(listed) == sorted(found | {"chunkcache.cli"})
    for folder in folders:
        assert (folder / "__init__.py").exists(), folder


def test_wheel_is_what_gets_imported(home: Path) -> None:
    code = """
        import sys, chunkcache, chunkcache.cli
        assert chunkcache.__file__.startswith(sys.prefix), chunkcache.__file__
        assert chunkcache.cli.__file__.startswith(sys.prefix), chunkcache.cli.__file__
        print(chunkcache.__version__)
    """
    assert use(home, code).strip() == chunkcache.__version__


def test_installed_program(home: Path) -> None:
    bin = home / "env" / "bin"
    ways = ([bin / "chunkcache"], [bin / "python", "-m", "chunkcache"])
    first, second = (run(*way, "--help", cwd=home) for way in ways)
    assert "Usage: chunkcache" in first
    assert first == second
    assert chunkcache.__version__ in run(bin / "chunkcache", "--version", cwd=home)


def test_installed_cache_works(home: Path) -> None:
    code = """
        import torch
        from transformers import AutoModelForCausalLM
        import chunkcache
        from chunkcache.demo import model_path

        model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
        ids = torch.arange(100, 300).unsqueeze(0)
        with chunkcache.wrap(model) as cached:
            first = cached.generate(ids, max_new_tokens=4, do_sample=False)
            assert torch.equal(first, cached.generate(ids, max_new_tokens=4, do_sample=False))
            print(cached.last_reuse[0].cached_tokens, cached.proof.kernel.split()[0])
    """
    kernel = "native" if libraries()[0] else "torch"
    assert use(home, code).split() == ["192", kernel]


def test_import_is_light_and_patches_nothing(home: Path) -> None:
    code = """
        import sys
        import chunkcache, chunkcache.tree, chunkcache.lab, chunkcache.cli.main
        heavy = {"torch", "transformers", "redis", "starlette"} & set(sys.modules)
        assert not heavy, heavy

        from transformers import GenerationMixin, PreTrainedModel
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def state():
            names = [sorted(ALL_ATTENTION_FUNCTIONS), sorted(ALL_MASK_ATTENTION_FUNCTIONS)]
            return names, dict(vars(GenerationMixin)), dict(vars(PreTrainedModel))

        before = state()
        import chunkcache.hf, chunkcache.attention.two_phase, chunkcache.server
        assert state() == before
        assert "chunkcache" not in before[0][0]
    """
    use(home, code)


def test_public_names_resolve() -> None:
    assert len(set(chunkcache.__all__)) == len(chunkcache.__all__)
    for name in chunkcache.__all__:
        assert getattr(chunkcache, name) is not None, name
    assert set(chunkcache.__all__) <= set(dir(chunkcache))
    with pytest.raises(AttributeError, match="nonsense"):
        importlib.import_module("chunkcache").nonsense  # noqa: B018


def test_all_errors_are_public() -> None:
    errors = importlib.import_module("chunkcache.errors")
    kinds = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, chunkcache.ChunkcacheError)
    }
    assert kinds <= set(chunkcache.__all__)
