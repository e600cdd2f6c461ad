"""Google Cloud Storage on this machine: what gcsfs, orbax and TensorStore reach behind gs://."""

import contextlib
import functools
import http.server
import threading
import urllib.parse
from collections.abc import Iterator

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class _Handler(RequestHandler):
    """The emulator, for several clients at once and for TensorStore."""

    lock = threading.Lock()  # its storage is not made for threads

    def _answer(self) -> None:
        with self.lock, contextlib.suppress(ConnectionError):
            Router(self).handle(self.command)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def end_headers(self) -> None:
        """TensorStore takes no object without its generation."""
        url = urllib.parse.urlparse(self.path)
        bucket, _, name = url.path.rpartition("/b/")[2].partition("/o/")
        if self.command == "GET" and "alt=media" in url.query:
            with contextlib.suppress(NotFound):
                stored = self.storage.get_file_obj(bucket, urllib.parse.unquote(name))
                self.send_header("x-goog-generation", stored["generation"])
        super().end_headers()


@contextlib.contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """Serves an empty bucket; gives the environment variables that lead a process to it."""
    storage = Storage(use_memory_fs=True)
    create_bucket(BUCKET, storage)
    handler = functools.partial(_Handler, storage)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://localhost:{server.server_port}"
        yield {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs, google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",  # TensorStore's
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks Google about the bucket
        }
        server.shutdown()
