"""What disks do to files."""

from pathlib import Path


def flip(file: Path, place: int, bit: int = 0) -> None:
    """One bit; places beyond the end go round."""
    content = bytearray(file.read_bytes())
    if content:
        content[place % len(content)] ^= 1 << bit
        file.write_bytes(content)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder: Path) -> Path:
    return max(files(folder), key=lambda file: file.stat().st_size)
