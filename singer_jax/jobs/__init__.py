"""The commands: one file each, with a function of its name that takes settings and a folder.

The function's annotation says of which class its settings are.
"""

JOBS = (
    "distill",
    "evaluate",
    "report",
    "compare",
    "export",
    "nullspace",
    "plan",
    "prepare",
    "check_data",
    "check_run",
    "replay",
    "models",
    "quickstart",
    "study",
)
