#!/usr/bin/env python3
"""Roundhouse's commands: `manage.py help` lists them, `manage.py up` starts everything."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# `platform/` is a source folder, never a package: with an `__init__.py` it would hide the
# standard library's `platform`. Position 1 keeps the folder of this script first.
sys.path.insert(1, str(ROOT / "platform"))


def main() -> None:
    if sys.argv[1:2] == ["node"]:
        # A node runs without Django: leave before Django is imported.
        from inference.agent.command import main as node

        raise SystemExit(node(sys.argv[2:]))

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings.production")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
