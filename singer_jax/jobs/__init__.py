"""The commands: one file each, with a function of the same name that takes settings and a folder.

The function's annotation is the class of its settings. Other files here are parts of commands.
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
