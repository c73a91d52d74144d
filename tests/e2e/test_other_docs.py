"""The commands of the accounting and security pages, run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import ROOT, Roundhouse

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]

BLOCKS = [
    pytest.param(block, id=f"{page} {number}")
    for page in ("accounting", "security")
    for number, block in enumerate(
        re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / f"{page}.md").read_text(), re.M | re.S)
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_each_block_runs(roundhouse: Roundhouse, tmp_path: Path, block: str):
    (tmp_path / "var").symlink_to(roundhouse.data)
    port = urlsplit(roundhouse.credentials["base_url"]).port
    command = block.replace(".venv/bin/python manage.py", f"{sys.executable} {ROOT / 'manage.py'}")
    done = subprocess.run(
        ["bash", "-ec", command.replace(":8000/", f":{port}/")],
        cwd=tmp_path,
        env=roundhouse.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert '"error"' not in done.stdout
