"""Amounts and progress in words, for commands and pages alike. No Django."""

from __future__ import annotations


def amount_of_bytes(count: float) -> str:
    """`93.2 MB`, in powers of ten."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def time_left(seconds: float) -> str:
    """`40 s left`, `3 min left`, `1.5 h left`."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"


def progress_in_words(
    *,
    step: str,
    done: int,
    total: int,
    unit: str,
    files_done: int = 0,
    files_total: int = 0,
    seconds_left: float | None = None,
) -> str:
    """`download, file 2 of 5, 1.2 GB of 2.8 GB, 43 %, 35 s left`: what is not known is not said."""
    said = [step] if step else []
    if files_total:
        said.append(f"file {min(files_done + 1, files_total)} of {files_total}")
    if done or total:
        amounts = [amount_of_bytes(done), amount_of_bytes(total)] if unit == "bytes" else [done, total]
        of_total = f" of {amounts[1]}" if total else ""
        said.append(f"{amounts[0]}{of_total}" + ("" if unit == "bytes" else f" {unit}"))
    if total:
        said.append(f"{min(100, 100 * done // total)} %")
    if seconds_left is not None and done < total:
        said.append(time_left(seconds_left))
    return ", ".join(said)
