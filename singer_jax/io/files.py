"""Files of a run, in local folders or in an object store that is given as a URL.

An object appears whole when it is written; it cannot be appended to, renamed or memory-mapped.
Code that needs one of these writes a local file, and the finished file is copied.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.util
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from singer_jax.errors import InputError, RunError, unknown

# The package that opens URLs of each scheme.
_LIBRARIES = {"gs": "gcsfs", "s3": "s3fs"}
_CHUNK = 2**24  # bytes
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def as_path(text: str | os.PathLike[str]) -> epath.Path:
    """Returns a user's path: a URL as it is, a local path made absolute.

    Raises:
      InputError: the URL is not of the form `gs://bucket/folder`, its scheme is unknown, or the
        package for its scheme is not installed.
    """
    text = os.fspath(text)
    scheme = _scheme(text)
    if not scheme:
        # pathlib's `absolute`, because epath's resolves `link/..` to the parent of the link itself.
        try:
            return epath.Path(Path(text).expanduser().absolute())
        except RuntimeError as error:  # `~` of an unknown user
            raise InputError(f"{text}: no home directory; give an absolute path") from error
    if scheme not in _LIBRARIES:
        known = " or ".join(f"{name}://" for name in _LIBRARIES)
        raise InputError(f"{text}: unknown scheme {scheme!r}; give a local path or {known}")
    if not re.match(rf"{scheme}://[^/]", text):
        raise InputError(f"{text}: no bucket; write it as {scheme}://bucket/folder")
    if ".." in text.split("/"):  # the copy would lie outside the cache
        raise InputError(f"{text}: the URL contains ..; write it without")
    if importlib.util.find_spec(_LIBRARIES[scheme]) is None:
        raise InputError(
            f"{text}: {scheme}:// URLs need another package; pip install {_LIBRARIES[scheme]}"
        )
    return epath.Path(text)


def config_file(given: str) -> str:
    """Returns the path of a configuration, followed by its protocol if one is given.

    Args:
      given: path, or name of a configuration of the package, optionally with `:protocol`.

    Raises:
      InputError: there is no such file.
    """
    name, colon, protocol = given.partition(":")
    if Path(name).is_file():
        return given
    shipped = shipped_configs()
    if name in shipped:
        return f"{shipped[name]}{colon}{protocol}"
    if shipped and re.fullmatch(r"\w+", name):
        raise unknown("--config", name, shipped)
    raise InputError(f"--config: no file {name}")


def shipped_configs() -> dict[str, Path]:
    """Returns the paths of the configurations of the package, by name."""
    package = Path(__file__).parents[1]
    # In an installed package, then in a source tree.
    for folder in (package / "configs", package.parent / "configs"):
        shipped = {file.stem: file for file in sorted(folder.glob("[!_]*.py"))}
        if shipped:
            return shipped
    return {}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a URL."""
    return bool(_scheme(os.fspath(path)))


def check_local(key: str, text: str) -> None:
    """Raises `InputError` if a setting that must be a local path is a URL."""
    if is_remote(text):
        raise InputError(f"{key}: {text} is a URL; images are read from local (or mounted) folders")


def check_takes_checkpoints(folder: epath.Path) -> None:
    """Raises `InputError` if orbax, which stores arrays with TensorStore, cannot write there."""
    if _scheme(os.fspath(folder)) not in ("", "gs"):
        raise InputError(f"{folder}: checkpoints are kept in local folders or gs:// only")


def _scheme(text: str) -> str:
    """Returns the scheme of a URL, even if the URL is malformed; empty for a local path."""
    url = _URL.match(text)
    return url[1] if url else ""


def make_workdir(folder: epath.Path) -> None:
    """Makes a work directory and checks that it can be written.

    Raises:
      InputError: it cannot be written.
    """
    with writing(folder):
        if is_remote(folder):
            trial = folder / f".writable-{uuid.uuid4().hex}"
            trial.write_text("")
            trial.unlink()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass


@contextlib.contextmanager
def writing(folder: epath.Path) -> Iterator[None]:
    """Turns a failure to write below a work directory into an `InputError`."""
    try:
        yield
    except failures(folder) as error:
        raise InputError(f"--workdir: cannot write to {folder} ({_reason(error)})") from error


# Error numbers of a disk that is full, read-only or failing.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def working_disks(folder: epath.Path) -> Iterator[None]:
    """Turns errors of a full or failing disk during a job into a `RunError`.

    Args:
      folder: work directory of the job, which is named if the error names no file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise RunError(
            f"cannot write {error.filename or f'to {folder}'} ({error.strerror}); finished files "
            "are kept; fix the disk and repeat the command to continue"
        ) from error


def _reason(error: Exception) -> str:
    """Returns the reason of a failure in one line."""
    if isinstance(error, FileNotFoundError):
        return error.strerror or "no such bucket"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or repr(error)


def failures(folder: epath.Path) -> tuple[type[Exception], ...]:
    """Returns the exceptions of reads and writes in a folder whose disk or store fails."""
    if _scheme(os.fspath(folder)) != "gs":
        return (OSError,)
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    return (OSError, HttpError, GoogleAuthError)


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[Path]:
    """Yields a local file to write, which replaces `path` atomically if the block succeeds.

    The folder of `path` is made. The file has a unique name, so that several processes can write
    at the same time, and it is flushed to disk before it is renamed.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="singer_jax_") as folder:
            local = Path(folder) / path.name
            yield local
            upload(local, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    target = Path(path)
    partial = target.with_name(f"{target.stem}.{uuid.uuid4().hex[:8]}{_PARTIAL}{target.suffix}")
    try:
        yield partial
        sync(partial)
        partial.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()  # frees space on a full disk
        raise
    _remove_partials(target)


_PARTIAL = ".partial"
_STALE = 24 * 3600  # seconds


def sync(file: Path) -> None:
    """Flushes a file to disk, because a rename may reach the disk before the file's contents."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _remove_partials(target: Path) -> None:
    """Removes partial files of killed processes if they are a day older than the finished file.

    Both times come from the file system, so clocks of different machines are not compared.
    """
    with contextlib.suppress(OSError):
        newest = target.stat().st_mtime
        for found in target.parent.glob(f"{glob.escape(target.stem)}.*{_PARTIAL}{target.suffix}"):
            if newest - found.stat().st_mtime > _STALE:
                found.unlink()


def write_text(path: epath.Path, text: str) -> None:
    """Writes a whole file; a concurrent reader sees either the old or the new content."""
    with replacing(path) as file:
        file.write_text(text)


def object_digests(folder: epath.Path) -> dict[str, tuple[int, str]]:
    """Returns the size and CRC32C that the store reports for each object in a gs:// folder."""
    import gcsfs

    store, below = gcsfs.GCSFileSystem(), os.fspath(folder).removeprefix("gs://").rstrip("/") + "/"
    store.invalidate_cache()
    return {
        name.removeprefix(below): (int(found["size"]), found["crc32c"])
        for name, found in store.find(below, detail=True).items()
        if not name.endswith("/")
    }


def move(folder: epath.Path, place: epath.Path) -> None:
    """Renames a folder; in an object store, all objects are copied before any is removed."""
    if is_remote(folder):
        _copy_all(folder, place)
        folder.rmtree()
    else:
        folder.rename(place)


def _copy_all(folder: epath.Path, place: epath.Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _copy_all(path, place / path.name)
        else:
            path.copy(place / path.name)


def upload(file: Path, path: epath.Path) -> None:
    """Copies a local file to a URL, replacing an existing object."""
    epath.Path(file).copy(path, overwrite=True)


def cache_folder() -> Path | None:
    """Returns the cache folder, or None if it cannot be made or written.

    The folder is `singer_jax` in `$XDG_CACHE_HOME`, or in `.cache` of the user's home directory. A
    user of a container may not have a home directory.
    """
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(parent) / "singer_jax"
    if not folder.is_absolute():  # unknown user without a home directory
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def cached(path: epath.Path) -> Path:
    """Returns `path` itself if it is local, or the path of its copy in the cache if it is a URL."""
    if not is_remote(path):
        return Path(path)
    cache = cache_folder()
    if cache is None:
        raise InputError(
            f"{path}: there is no cache folder for a copy; set XDG_CACHE_HOME to a writable folder"
        )
    return cache / os.fspath(path).replace("://", "/")


def download(path: epath.Path) -> Path:
    """Returns a local file: `path` itself, or a fresh copy in the cache if it is a URL.

    Raises:
      FileNotFoundError: there is no such file.
    """
    local = cached(path)
    if is_remote(path):
        local.parent.mkdir(parents=True, exist_ok=True)
        # A unique folder, because several processes of a machine may start at the same time.
        with tempfile.TemporaryDirectory(dir=local.parent) as folder:
            partial = Path(folder) / path.name
            _fetch(path, partial)
            sync(partial)
            partial.replace(local)
    return local


def _fetch(path: epath.Path, local: Path) -> None:
    with path.open("rb") as source, local.open("wb") as target:
        shutil.copyfileobj(source, target, _CHUNK)


class Mirror:
    """A local folder for files that grow during a run; `push` copies them to the work directory.

    If the work directory is local, it is itself the local folder.

    Args:
      folder: the work directory.
      continued: names of files to append to if an earlier start of the run has written them.
    """

    def __init__(self, folder: epath.Path, continued: Sequence[str] = ()) -> None:
        self.folder = folder
        self._temporary = None
        self.local = Path(folder)
        if is_remote(folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="singer_jax_")
            self.local = Path(self._temporary.name)
            for name in continued:
                with contextlib.suppress(FileNotFoundError):
                    _fetch(folder / name, self.local / name)

    def push(self) -> None:
        """Copies the files of the local folder to the work directory.

        Raises:
          RunError: the store cannot be written.
        """
        if self._temporary is None:
            return
        try:
            for file in self.local.rglob("*"):
                if file.is_file():
                    upload(file, self.folder / file.relative_to(self.local))
        except failures(self.folder) as error:
            raise RunError(
                f"cannot write to {self.folder} ({_reason(error)}); finished checkpoints are kept"
            ) from error

    def close(self) -> None:
        """Calls `push` and removes the temporary folder; raises the errors of `push`."""
        self.push()
        if self._temporary is not None:
            self._temporary.cleanup()
