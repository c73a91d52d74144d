"""Checks that several tables share."""

from django.core.validators import RegexValidator

validate_name = RegexValidator(
    r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,119}\Z",
    "Use letters, digits and . _ : / @ - (at most 120), starting with a letter or digit.",
)

validate_host_label = RegexValidator(
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z",
    "Use letters, digits and . _ - (at most 63), starting with a letter or digit.",
)
