"""The repository's own rules that no linter knows."""

import platform
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_platform_is_the_standard_librarys():
    assert Path(platform.__file__).is_relative_to(sysconfig.get_paths()["stdlib"])
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_each_requirement_tells_its_reason():
    for file in ROOT.glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            if line and not line.startswith(("#", "-")):
                assert " # " in line, f"{file.name}: {line}"


def test_no_channel_layer_is_configured():
    from django.conf import settings

    assert not hasattr(settings, "CHANNEL_LAYERS")
