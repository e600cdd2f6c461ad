"""Commands: one file each, with a function of its name that takes settings and a folder.

The annotation of the function's first argument is the class of its settings.
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
